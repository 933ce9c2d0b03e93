"""Enrolling: what is answered, what is refused, and that nothing is written then."""

from __future__ import annotations

import json
import os
import random
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mosinit import (
    approvals,
    cli,
    commands,
    enroll,
    exchange,
    explain,
    firmware,
    init,
    keys,
    provision,
    records,
)
from mosinit.host import Failure, Usage
from tests import provisioned
from tests.eventlogs import encode_event, encode_log, measured
from tests.provisioned import Site


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """An organisation, a machine, and its request."""
    with provisioned.site(tmp_path_factory.mktemp("site")) as made:
        made.start()
        made.request()
        yield made


@pytest.fixture
def site(shared: Site, tmp_path: Path) -> Site:
    """The same, with an empty folder for what comes of it."""
    (tmp_path / "state").symlink_to(shared.folder / "state")
    return replace(shared, folder=tmp_path)


def sent(site: Site) -> exchange.Request:
    return exchange.parse_request((site.state / "request.json").read_bytes(), "request.json")


def enroll_changed(site: Site, **changes: Any) -> dict[str, object]:
    path = site.folder / "changed.json"
    path.write_bytes(exchange.encode_request(sent(site)._replace(**changes)))
    return enroll.enroll(site.host, path, site.keyset, site.answer, site.machines)


# --- The answer ----------------------------------------------------------------------------------------


def test_what_a_machine_gets(site: Site) -> None:
    told = site.enroll()
    answer = exchange.parse_answer(site.answer.read_bytes(), "answer.json")
    ca = site.keyset.certificate_path("sudi-ca").read_bytes()
    record = init.verify_record(answer.certificate, ca, site.keyset.product)
    assert record.storage_key == init.tpm_name(sent(site).storage_key)
    assert record.epoch_index == init.tpm_name(site.policy().epoch_index)
    assert list(answer.approvals) == [sent(site).pcr7.hex()]
    policy = keys.open_organisation(site.keyset.folder).policy()
    assert init.verify_epoch_order(*answer.order, policy) == 1
    assert told["pcr7"] == sent(site).pcr7.hex()
    assert told["enrolled_before"] == []


def test_what_is_filed(site: Site) -> None:
    folder = site.machines / str(site.enroll()["serial"])
    assert (folder / "recovery.cms").read_bytes() == sent(site).recovery
    names = {"machine.json", "recovery.cms", "certificate.pem", "eventlog.bin"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "eventlog.bin").read_bytes() == site.log.read_bytes()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_machines_lie_in_the_keyset_unless_told(site: Site) -> None:
    request = site.state / "request.json"
    serial = str(enroll.enroll(site.host, request, site.keyset, site.answer)["serial"])
    assert (site.keyset.folder / "machines" / serial / "recovery.cms").exists()


def test_the_same_request_twice_is_answered_twice(site: Site) -> None:
    serial = site.enroll()["serial"]
    done = site.enroll()
    assert done["enrolled_before"] == [serial]
    assert enroll.notes(done)[1:] == [
        f"machine {serial} was filed already, with this very record: it is answered once more"
    ]


def test_a_filed_machine_that_asks_with_another_firmware_state(site: Site) -> None:
    """Root can have the same record answered once more, after an older dbx was put back."""
    serial = str(site.enroll()["serial"])
    certificates = firmware.certificates_of_keyset(site.keyset.folder)
    before = approvals.platform_events(certificates, firmware.EMPTY_DBX)
    (site.machines / serial / "eventlog.bin").write_bytes(encode_log(before))
    assert "dbx changed: 1 entry removed" in str(site.enroll()["changes"])
    assert site.enroll()["changes"] == []


def test_a_filed_recovery_record_is_never_replaced(site: Site) -> None:
    serial = str(site.enroll()["serial"])
    site.answer.unlink()
    (site.machines / serial / "recovery.cms").write_bytes(b"another")
    with pytest.raises(Failure, match="has another recovery record of the same machine"):
        site.enroll()
    assert (site.machines / serial / "recovery.cms").read_bytes() == b"another"
    assert not site.answer.exists()


def other_request(site: Site, key: ec.EllipticCurvePrivateKey | None = None) -> Path:
    """Ask for another secret of the same TPM, by its SUDI key, as root on it can, or by another."""
    organisation = keys.open_organisation(site.organisation)
    old, folder = sent(site), site.folder / "made"
    folder.mkdir()
    (folder / "organisation").symlink_to(site.organisation)
    sudi = records.encode_point(key.public_key(), records.SUDI_HEAD) if key else old.sudi
    made = provision.Made(old.storage_key, old.epoch_index, exchange.Seal(b"", b""), sudi, b"", old.pcr7)
    secrets, product = provision.make_secrets(site.host), site.keyset.product
    recovery = provision.encrypt_recovery(site.host, folder, organisation, made, secrets)
    request = old._replace(sudi=sudi, recovery=recovery)
    digest = records.request_digest(request, organisation.certificate)
    if key:
        names = init.tpm_name(old.storage_key), init.tpm_name(old.epoch_index)
        record = records.encode_record(product, init.secret_proof(secrets.config, product), *names)
        signed = csr(key, record, digest)
    else:
        signed = provision.make_csr(
            site.host, site.state, site.tpm.tcti, made, product, secrets.config, digest
        )
    path = folder / "request.json"
    path.write_bytes(exchange.encode_request(request._replace(csr=signed)))
    return path


@pytest.mark.parametrize("foreign", [False, True])
def test_another_record_of_a_filed_tpm_must_be_said(site: Site, foreign: bool) -> None:
    serial = str(site.enroll()["serial"])
    site.answer.unlink()
    first = {path.name: path.read_bytes() for path in (site.machines / serial).iterdir()}
    request = other_request(site, KEY if foreign else None)
    args = (site.host, request, site.keyset, site.answer, site.machines)
    with pytest.raises(Failure, match=f"machine {serial}: .*--again {serial}"):
        enroll.enroll(*args)
    with pytest.raises(Usage, match="no machine 0 is filed"):
        enroll.enroll(*args, again="0")
    assert not site.answer.exists()
    assert [path.name for path in site.machines.iterdir()] == [serial]
    told = enroll.enroll(*args, again=serial)
    said = enroll.notes(told, serial)
    before = [f"this TPM was enrolled before, as {serial}"] if foreign else []
    again = f"enrolled again in place of {serial}, as you said: its record of before holds no more"
    assert said[1:] == [*before, again]
    assert told["enrolled_before"] == [serial]
    assert (told["serial"] == serial) != foreign
    kept = site.machines / (serial if foreign else f"{serial}-1")
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == first
    # The one of before is not answered again by itself.
    with pytest.raises(Failure, match="--again"):
        site.enroll()


def test_an_organisation_at_a_later_epoch_takes_no_machine_below(site: Site) -> None:
    """Without anybody naming an epoch: the documented commands."""
    keyset = replace(site.keyset, epoch=5)
    args = (site.host, site.state / "request.json", keyset, site.answer, site.machines)
    with pytest.raises(init.Refused, match=r"EPOCH.*epoch 5.*seen epoch 1") as caught:
        enroll.enroll(*args)
    assert re.search("`mosinit keys export`.* new request", explain.refusal(caught.value)["remedy"])
    with pytest.raises(init.Refused, match=r"EPOCH.*epoch 5 or later.*seen epoch 1") as caught:
        enroll.enroll(*args, epoch=1)
    assert "leave --epoch away" in explain.refusal(caught.value)["remedy"]
    assert not site.answer.exists()


def test_the_whole_record_is_filed(site: Site) -> None:
    serial = str(site.enroll()["serial"])
    words = json.loads((site.machines / serial / "machine.json").read_text())
    assert bytes.fromhex(words["record"]) == record_of(site)


@pytest.mark.parametrize(
    "content",
    ["[]", "[" * 100000, "{}", '{"serial": "x"}', "9" * 5000],
    ids=["list", "deep", "empty", "other", "digits"],
)
def test_a_damaged_file_of_machines_is_told(site: Site, content: str) -> None:
    serial = str(site.enroll()["serial"])
    (site.machines / serial / "machine.json").write_text(content)
    with pytest.raises(Failure, match=r"cannot read .*machine\.json: restore it"):
        site.enroll()


def test_the_recovery_record_opens(site: Site) -> None:
    serial = str(site.enroll()["serial"])
    opened = enroll.open_recovery(site.machines / serial / "recovery.cms", site.keyset)
    assert opened.recovery_key == (site.state / "recovery.key").read_text()
    assert {name: word.decode() for name, word in opened.auths.items()} == json.loads(site.saved_auths())
    with pytest.raises(Failure, match="no recovery record for this keyset's recovery key"):
        enroll.open_recovery(site.machines / serial / "recovery.cms", site.other)
    assert exchange.parse_recovery(exchange.encode_recovery(opened), "again") == opened


def test_consent_names_one_machine(site: Site) -> None:
    serial = str(site.enroll()["serial"])
    out = site.folder / "consent.json"
    enroll.consent(site.host, serial, site.keyset, out, site.machines)
    consent = exchange.parse_consent(out.read_bytes(), "consent")
    init.verify_signature(site.keyset.certificate("sudi-ca"), consent.signature, consent.statement)
    assert json.loads(consent.statement)["storage_key"] == init.tpm_name(sent(site).storage_key).hex()
    for wrong, kind, says in (("0" * 16, Failure, "no machine 0"), ("../x", Usage, "no serial")):
        with pytest.raises(kind, match=says):
            enroll.consent(site.host, wrong, site.keyset, out, site.machines)


# --- Requests that are not right -----------------------------------------------------------------------


def csr(key: ec.EllipticCurvePrivateKey, record: bytes, digest: bytes, *more: x509.ExtensionType) -> bytes:
    builder = x509.CertificateSigningRequestBuilder(x509.Name([]))
    for extension in (
        x509.UnrecognizedExtension(records.RECORD_OID, record),
        x509.UnrecognizedExtension(records.REQUEST_OID, records.encode_digest(digest)),
        *more,
    ):
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


KEY = ec.generate_private_key(ec.SECP256R1())
NAMED = x509.SubjectAlternativeName([x509.DNSName("example.org")])


def record_of(site: Site) -> bytes:
    request = x509.load_der_x509_csr(sent(site).csr)
    value = request.extensions.get_extension_for_oid(records.RECORD_OID).value
    assert isinstance(value, x509.UnrecognizedExtension)
    return value.value


def spoil(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if at >= 0 else spoil(data, len(data) + at)


def own_key(site: Site, record: bytes | None = None, **changes: Any) -> dict[str, object]:
    """Return a request that only its SUDI key makes another: nobody can tell it from a machine's own."""
    sudi = records.encode_point(KEY.public_key(), records.SUDI_HEAD)
    request = sent(site)._replace(sudi=sudi, **changes)
    digest = records.request_digest(request, site.keyset.certificate)
    signed = csr(KEY, record_of(site) if record is None else record, digest)
    return request._replace(csr=signed)._asdict()


def rewrapped(site: Site) -> bytes:
    """Encrypt a recovery record of this machine with other passwords: everybody can."""
    opened = enroll.open_cms(site.keyset, sent(site).recovery, "recovery")
    fake = provision.make_secrets(site.host)
    recovery = opened._replace(auths=fake.auths, recovery_key=fake.recovery_key)
    return site.host.run(
        ["openssl", "cms", "-encrypt", "-binary", "-aes-256-gcm", "-outform", "DER",
         "-recip", site.keyset.certificate_path("recovery"),
         "-keyopt", "rsa_padding_mode:oaep", "-keyopt", "rsa_oaep_md:sha256"],
        stdin=exchange.encode_recovery(recovery),
    )  # fmt: skip


def other_log(site: Site) -> bytes:
    """Return the log with an event more, of a PCR that nobody looks at."""
    return sent(site).event_log + encode_event(measured(4, 1, b"more"), ("sha1", "sha256"))


def other_trust(site: Site) -> dict[str, object]:
    """The request of a machine that was given another recovery certificate, as its own key signs it."""
    foreign = lambda role: (site.other if role == "recovery" else site.keyset).certificate(role)  # noqa: E731
    request = exchange.Request(**own_key(site))  # type: ignore[arg-type]
    signed = csr(KEY, record_of(site), records.request_digest(request, foreign))
    return request._replace(csr=signed)._asdict()


CHANGES: list[tuple[Callable[[Site], dict[str, object]], str]] = [
    (lambda site: {"product": "11111111-2222-4333-8444-555555555555"}, "RECORD-PRODUCT"),
    (lambda site: {"epoch": 2}, r"EPOCH.*epoch 1 \(--epoch\).*seen epoch 2"),
    (lambda site: {"csr": spoil(sent(site).csr, -1)}, "not signed by its own key"),
    (lambda site: {"csr": b"\x30\x00"}, "none of a machine's"),
    (lambda site: {"csr": csr(KEY, record_of(site), bytes(32))}, "for other keys than come with it"),
    (lambda site: {"csr": csr(KEY, record_of(site), bytes(32), NAMED)}, "other extensions"),
    (lambda site: own_key(site, spoil(record_of(site), -1)), "for other keys"),
    (lambda site: own_key(site, record_of(site) + b"\0"), "for other keys"),
    (lambda site: own_key(site, b""), "for other keys"),
    (lambda site: {"storage_key": spoil(sent(site).storage_key, 7)}, "of their templates"),
    (lambda site: {"storage_key": records.encode_point(KEY.public_key(), init.SRK_HEAD)}, "for other keys"),
    (lambda site: {"sudi": spoil(sent(site).sudi, 7)}, "of their templates"),
    (lambda site: {"sudi": records.encode_point(KEY.public_key(), records.SUDI_HEAD)}, "for other keys"),
    (lambda site: {"epoch_index": spoil(sent(site).epoch_index, -3)}, "TPM-INDEX"),
    (lambda site: {"sealed": spoil(sent(site).sealed, 20)}, "TPM-SEAL"),
    (lambda site: {"sealed": sent(site).sealed + b"\0"}, "TPM-SEAL"),
    (lambda site: {"sealed": spoil(sent(site).sealed, -1)}, "not the one that its machine signed"),
    (lambda site: {"recovery": rewrapped(site)}, "not the one that its machine signed"),
    (lambda site: {"event_log": other_log(site)}, "not the one that its machine signed"),
    (lambda site: {"pcr7": bytes([7] * 32)}, "not the one that its machine signed"),
    (other_trust, "other certificates than this keyset's: export the keyset again"),
    (own_key, "comes with the recovery record of machine"),
    (lambda site: own_key(site, recovery=b"garbage"), "cannot open the recovery record"),
    (lambda site: own_key(site, recovery=spoil(sent(site).recovery, -1)), "cannot open the recovery record"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_a_request_that_is_not_right_leaves_nothing(
    site: Site, change: Callable[[Site], dict[str, object]], says: str
) -> None:
    with pytest.raises((Failure, init.Refused), match=says):
        enroll_changed(site, **change(site))
    assert not site.answer.exists()
    assert not site.machines.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"product": "11111111-2222-4333-8444-555555555555"}, "by --keys, or .*`mosinit keys export`"),
        ({"epoch": 2}, "say --epoch 2"),
        ({"sealed": bytes(200)}, "`mosinit keys export` .*new request"),
        ({"epoch_index": bytes(40)}, "`mosinit keys export` .*new request"),
    ],
)
def test_a_refused_request_has_a_remedy_for_who_enrolls(
    site: Site, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(init.Refused) as caught:
        enroll_changed(site, **changes)
    assert re.search(says, explain.refusal(caught.value)["remedy"])


def test_no_device_is_replaced(site: Site) -> None:
    os.mkfifo(site.answer)
    with pytest.raises(Failure, match="neither file nor folder"):
        site.enroll()
    with pytest.raises(Failure, match="only such are replaced"), site.host.replacing(site.answer):
        pass
    assert stat.S_ISFIFO(site.answer.lstat().st_mode)
    assert not site.machines.exists()


def test_another_organisation_does_not_answer(site: Site) -> None:
    with pytest.raises(init.Refused, match="RECORD-PRODUCT"):
        enroll.enroll(site.host, site.state / "request.json", site.other, site.answer, site.machines)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pcr7": bytes([7] * 32)}, "the machine's event log gives PCR 7"),
        ({"event_log": b"garbage"}, "event log"),
    ],
)
def test_a_firmware_that_may_not_be_approved_is_not(
    shared: Site, tmp_path: Path, changes: dict[str, bytes], says: str
) -> None:
    """As its machine signs the request: its own recovery record and all."""
    key = ec.generate_private_key(ec.SECP256R1())
    sudi = records.encode_point(key.public_key(), records.SUDI_HEAD)
    site, old = replace(shared, folder=tmp_path), sent(shared)
    made = provision.Made(old.storage_key, b"", exchange.Seal(b"", b""), sudi, b"", b"")
    organisation = keys.open_organisation(site.organisation)
    (tmp_path / "organisation").symlink_to(site.organisation)
    secrets = provision.make_secrets(site.host)
    recovery = provision.encrypt_recovery(site.host, tmp_path, organisation, made, secrets)
    request = old._replace(sudi=sudi, recovery=recovery, **changes)  # type: ignore[arg-type]
    digest = records.request_digest(request, organisation.certificate)
    path = tmp_path / "request.json"
    path.write_bytes(exchange.encode_request(request._replace(csr=csr(key, record_of(shared), digest))))
    with pytest.raises(Failure, match=says):
        enroll.enroll(site.host, path, site.keyset, site.answer, site.machines)
    assert not site.machines.exists()


def without(name: str) -> Callable[[dict[str, object]], object]:
    return lambda words: {key: value for key, value in words.items() if key != name}


DOCUMENTS: list[tuple[Callable[[dict[str, object]], object], str]] = [
    (lambda words: [], "is no request of schema 1"),
    (lambda words: {**words, "schema": 2}, "is no request of schema 1"),
    (lambda words: {**words, "type": "answer"}, "is no request of schema 1"),
    (lambda words: {**words, "more": 1}, "has an unknown field 'more'"),
    (without("csr"), "lacks the field 'csr'"),
    (lambda words: {**words, "csr": "%%%"}, "csr is not base64"),
    (lambda words: {**words, "csr": ""}, "csr is not 1 to 4096 bytes"),
    (lambda words: {**words, "csr": 7}, "csr is not base64"),
    (lambda words: {**words, "csr": "é"}, "csr is not base64"),
    (lambda words: {**words, "epoch": True}, "epoch is not a number from 1 to 64"),
    (lambda words: {**words, "epoch": 65}, "epoch is not a number from 1 to 64"),
    (lambda words: {**words, "pcr7": "AB"}, "pcr7 is not 32 bytes in hex"),
    (lambda words: {**words, "product": "acme"}, "product is not a uuid"),
]


@pytest.mark.parametrize(("change", "says"), DOCUMENTS)
def test_a_request_is_read_strictly(
    site: Site, change: Callable[[dict[str, object]], object], says: str
) -> None:
    words = json.loads((site.state / "request.json").read_text())
    with pytest.raises(Failure, match=says) as caught:
        exchange.parse_request(json.dumps(change(words)).encode(), "request.json")
    assert "\n" not in str(caught.value)


def test_spoiled_documents_are_failures_and_nothing_else(site: Site) -> None:
    site.enroll()
    dice = random.Random(7)
    for data, parse in (
        ((site.state / "request.json").read_bytes(), exchange.parse_request),
        (site.answer.read_bytes(), exchange.parse_answer),
    ):
        for _ in range(150):
            at = dice.randrange(len(data))
            piece = bytes(dice.randrange(256) for _ in range(dice.randrange(3)))
            spoiled = data[:at] + piece + data[at + dice.randrange(4) :]
            try:
                parse(spoiled, "spoiled")
            except Failure as failure:
                assert str(failure).startswith("spoiled")


def test_documents_go_round(site: Site) -> None:
    site.enroll()
    request, answer = sent(site), exchange.parse_answer(site.answer.read_bytes(), "answer.json")
    assert exchange.parse_request(exchange.encode_request(request), "again") == request
    assert exchange.parse_answer(exchange.encode_answer(answer), "again") == answer
    sealed = exchange.Sealed(request.product, exchange.Seal(request.sealed, b"private"), answer)
    assert exchange.parse_sealed(exchange.encode_sealed(sealed), "again") == sealed
    consent = exchange.Consent(b"statement", b"signature")
    assert exchange.parse_consent(exchange.encode_consent(consent), "again") == consent


# --- The command ---------------------------------------------------------------------------------------


def run(site: Site, words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(site.folder)
    table = tuple(replace(verb, tools=False) for verb in commands.VERBS)
    return cli.main(words.replace("KEYS", str(site.keyset.folder)).split(), table)


def test_the_command(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "enroll state/request.json --keys KEYS --out answer.json --machines machines --json"
    assert run(site, words, monkeypatch) == 0
    said = capsys.readouterr()
    serial = json.loads(said.out)["serial"]
    secrets = [*json.loads(site.saved_auths()).values(), (site.state / "recovery.key").read_text()]
    assert not any(secret in said.out + said.err for secret in secrets)
    assert run(site, f"enroll --open-recovery machines/{serial}/recovery.cms --keys KEYS", monkeypatch) == 0
    assert all(secret in capsys.readouterr().out for secret in secrets[:1])
    saved = f"enroll --open-recovery machines/{serial}/recovery.cms --keys KEYS --out opened.json"
    assert run(site, saved, monkeypatch) == 0
    assert all(secret not in capsys.readouterr().out for secret in secrets)
    assert stat.S_IMODE((site.folder / "opened.json").stat().st_mode) == 0o600
    assert all(secret in (site.folder / "opened.json").read_text() for secret in secrets[:1])
    consent = f"enroll --consent {serial} --keys KEYS --out consent.json --machines machines"
    assert run(site, consent, monkeypatch) == 0
    assert (site.folder / "consent.json").exists()


def test_a_person_reads_once_what_is_signed(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As lines on standard output: nothing of it is progress."""
    words = "enroll state/request.json --keys KEYS --out answer.json --machines machines"
    assert run(site, words, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (serial,) = (path.name for path in site.machines.iterdir())
    first, *lines = out.splitlines()
    assert (
        first == f"machine {serial} is enrolled: its firmware has Secure Boot on, with exactly this keyset"
    )
    pcr7 = sent(site).pcr7.hex()
    assert {f"serial: {serial}", f"pcr7: {pcr7}", "platform:", "enrolled_before: none"} <= set(lines)
    assert lines[lines.index("platform:") + 1].startswith("  dbx_bytes: ")
    assert out.count(pcr7) == 1
    assert not set('[]{}"') & set(out)
    assert run(site, words, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("filed already, with this very record") == 1


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ("enroll --keys KEYS --out a", 2, "name one thing"),
        ("enroll state/request.json --consent x --keys KEYS --out a", 2, "name one thing"),
        ("enroll state/request.json --keys KEYS", 2, "--out names where"),
        ("enroll --open-recovery f --keys KEYS --out a", 1, "name KEYS/machines/SERIAL/recovery.cms"),
        ("enroll --open-recovery f --keys KEYS --out KEYS/uki.key", 2, "nothing else goes"),
        ("enroll --consent 0 --keys KEYS --out KEYS/platform.key", 2, "nothing else goes"),
        ("enroll state/request.json --keys KEYS --out KEYS/platform.key", 2, "nothing else goes"),
        ("enroll state/request.json --keys KEYS --out m/a --machines .", 2, "name a file for the answer"),
        ("enroll state/request.json --keys KEYS --out a --machines .", 2, "nothing else goes"),
        ("enroll --again 0 --consent 0 --keys KEYS --out a", 2, "--again goes with a REQUEST"),
        ("enroll --epoch 1 --consent 0 --keys KEYS --out a", 2, "--epoch goes with a REQUEST"),
        ("enroll --epoch 1 --open-recovery f --keys KEYS", 2, "--epoch goes with a REQUEST"),
        ("enroll none.json --keys KEYS --out a", 1, "cannot use none.json"),
        ("enroll state --keys KEYS --out a", 1, "state is no file"),
        ("enroll state/machine.json --keys KEYS --out a", 1, "machine.json is no request"),
        ("enroll state/config.key --keys KEYS --out a", 1, "config.key is no JSON"),
        ("enroll state/request.json --keys KEYS --out state", 2, "name a file for the answer"),
        ("enroll state/request.json --keys KEYS --out none/a --machines m", 2, "name a file for the answer"),
        ("enroll state/request.json --keys KEYS --out a --epoch 2", 3, "refused: EPOCH"),
        ("enroll --consent 0 --keys KEYS --out a", 1, "no machine 0 is filed"),
        (
            "enroll --open-recovery state/config.key --keys KEYS",
            1,
            "cannot open state/config.key: it is no recovery record for this keyset's recovery key: name "
            "KEYS/machines/SERIAL/recovery.cms, and the keyset that enrolled the machine",
        ),
        ("enroll --open-recovery none --keys KEYS", 1, "name KEYS/machines/SERIAL/recovery.cms"),
        ("enroll --open-recovery state --keys KEYS", 1, "name KEYS/machines/SERIAL/recovery.cms"),
    ],
)
def test_bad_input(
    site: Site, words: str, status: int, says: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(site, words, monkeypatch) == status
    said = capsys.readouterr()
    assert says.replace("KEYS", str(site.keyset.folder)) in said.err
    assert "Traceback" not in said.err
    assert {path.name for path in site.folder.iterdir()} <= {"state"}
