"""Provisioning against a real TPM in software: what it makes, what it refuses, and every interruption."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import ssl
import stat
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from mosinit import cli, commands, enroll, exchange, init, keys, provision, records
from mosinit import tpm as tpms
from mosinit.host import Failure, Host, Usage
from tests.eventlogs import encode_event, encode_log, measured
from tests.provisioned import (
    Site,
    boot,
    disable_endorsement,
    open_config,
    read_record,
    remedy,
    set_lockout,
    writes,
)
from tests.recorder import Watched
from tests.tpms import Breaking, TpmMachine

SRK = ("-G", "ecc256:aes128cfb", "-g", "sha256", "-a",
       "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt")  # fmt: skip


# --- What is made ------------------------------------------------------------------------------------


def test_the_core_finds_its_machine(done: Site) -> None:
    _, record = read_record(done, done.state)
    machine = TpmMachine(done.tpm)
    public = init.check_tpm(machine, record, 1)
    assert init.tpm_name(public) == record.storage_key
    assert init.read_epoch(machine) == 1


def test_the_core_opens_the_secret_before_the_fence_alone(done: Site) -> None:
    booted = boot(done)
    assert open_config(done, booted, done.state) == (done.state / "config.key").read_bytes()
    init.fence(booted[0])
    with pytest.raises(init.Refused, match="TPM-APPROVAL"):
        open_config(done, booted, done.state)


def test_the_end_says_what_comes_next(done: Site) -> None:
    """What to keep, until when, and what to erase."""
    told = str(done.finish()["next"])
    assert f"`mosinit install --disk DEV --dir {done.state}`" in told
    assert re.search(r"keep .*state until .*then erase it", told)


def test_files_are_private_and_passwords_are_gone(done: Site) -> None:
    assert stat.S_IMODE(done.state.stat().st_mode) == 0o700
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in done.state.iterdir() if path.is_file()}
    assert files == dict.fromkeys(
        ("closing", "config.key", "machine.json", "recovery.key", "request.json", "seal.json", "sudi.auth",
         "sudi.key", "sudi.pem"), 0o600,
    )  # fmt: skip
    assert not any(b"PRIVATE KEY" in path.read_bytes() for path in (done.state / "organisation").iterdir())


def test_the_tpm_is_closed(done: Site) -> None:
    assert done.flags() & init.PROVISIONED == init.PROVISIONED
    properties = done.tpm.run("tpm2_getcap", "properties-variable").decode()
    for line in ("MAX_AUTH_FAIL: 0x20", "LOCKOUT_INTERVAL: 0x258", "LOCKOUT_RECOVERY: 0x15180"):
        assert f"TPM2_PT_{line}\n" in properties
    done.tpm.run("tpm2_clear", fails=True)
    done.tpm.run("tpm2_nvundefine", hex(init.EPOCH_INDEX), fails=True)


def test_the_sudi_key_stays_in_its_tpm(done: Site) -> None:
    attributes = struct.unpack_from(">I", records.SUDI_HEAD, 4)[0]
    assert attributes & (0x2 | 0x10 | 0x20) == 0x2 | 0x10 | 0x20
    words = json.loads((done.state / "machine.json").read_text())
    key = records.parse_point(bytes.fromhex(words["sudi"]), records.SUDI_HEAD)
    certificate = x509.load_pem_x509_certificate((done.state / "sudi.pem").read_bytes())
    assert certificate.public_key() == key
    assert b"TSS2 PRIVATE KEY" in (done.state / "sudi.key").read_bytes()


def test_the_recovery_key_is_one_as_systemd_makes_them() -> None:
    """Modhex, 8 groups of 8 (systemd's src/shared/recovery-key.c)."""
    assert exchange.make_recovery_key(bytes(range(32))) == (
        "cccbcdce-cfcgchci-cjckclcn-crctcucv-bcbbbdbe-bfbgbhbi-bjbkblbn-brbtbubv"
    )


# --- Secrets -----------------------------------------------------------------------------------------


def secrets_of(state: Path) -> list[str]:
    auths = json.loads((state / "auths.json").read_text())
    names = ("sudi.auth", "recovery.key")
    return [*auths.values(), *((state / name).read_text().strip() for name in names)]


def test_no_secret_shows(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither on the bus, nor in what programs are started with, nor in what is said or sent."""
    host = site.host = Watched()
    try:
        with Breaking(site.tpm) as way:
            site.request(tcti=way.tcti)
            secrets, config = secrets_of(site.state), (site.state / "config.key").read_bytes()
            site.enroll()
            site.finish(tcti=way.tcti)
            bus = way.bus
    finally:
        site.host = Host()
    request = (site.state / "request.json").read_text()
    said = capfd.readouterr()
    words = "\n".join(f"{program.words} {program.environment}" for program in host.started)
    assert words
    assert len(secrets) == 5
    for secret in secrets:
        for place in (words, said.out, said.err, request, site.answer.read_text()):
            assert secret not in place
    # tpm2-openssl sends the SUDI key's password as it is: whoever reads the bus must still have the TPM.
    sudi = (site.state / "sudi.auth").read_bytes().strip()
    assert not any(secret.encode() in bus for secret in secrets if secret.encode() != sudi)
    assert config not in bus
    assert config.hex() not in words + said.out + said.err + request
    filed = b"".join(path.read_bytes() for path in site.machines.rglob("*") if path.is_file())
    assert not any(secret.encode() in filed for secret in secrets)


def test_two_machines_share_no_secret(site: Site) -> None:
    site.request()
    first = secrets_of(site.state)
    site.request(state=site.folder / "second")
    assert not set(first) & set(secrets_of(site.folder / "second"))


# --- What a TPM may hold before ------------------------------------------------------------------------


def make_srk(site: Site, *more: str) -> None:
    site.tpm.run("tpm2_createprimary", "-C", "o", *SRK, "-c", "srk.ctx", *more)
    site.tpm.run("tpm2_evictcontrol", "-C", "o", "-c", "srk.ctx", hex(init.SRK))
    site.tpm.run("tpm2_flushcontext", "-t")


def endorsed_key(site: Site) -> None:
    """A key of the same template, but of another hierarchy."""
    site.tpm.run("tpm2_createprimary", "-C", "e", *SRK, "-c", "srk.ctx")
    site.tpm.run("tpm2_evictcontrol", "-C", "o", "-c", "srk.ctx", hex(init.SRK))
    site.tpm.run("tpm2_flushcontext", "-t")


def key_with_password(site: Site) -> None:
    make_srk(site, "-p", "secret")


@pytest.mark.parametrize("leave", [make_srk, endorsed_key, key_with_password, Site.request])
def test_a_storage_key_that_was_left_is_made_anew(site: Site, leave: Callable[[Site], object]) -> None:
    leave(site)
    if site.state.exists():
        shutil.rmtree(site.state)
    before = site.tpm.run("tpm2_readpublic", "-c", hex(init.SRK))
    site.provision()
    after = site.tpm.run("tpm2_readpublic", "-c", hex(init.SRK))
    assert after != before
    site.tpm.run("tpm2_createprimary", "-C", "o", "-P", owner_password(site), *SRK, "-c", "srk.ctx")
    assert site.tpm.run("tpm2_readpublic", "-c", "srk.ctx") != after


def owner_password(site: Site) -> str:
    filed = next(site.machines.glob("*/recovery.cms"))
    return enroll.open_recovery(filed, site.keyset).auths["owner"].decode()


@pytest.mark.parametrize("cut", [slice(2, 34), slice(36, 68)])
def test_a_key_with_a_short_coordinate_is_refused(cut: slice) -> None:
    """As TPMs make them that leave out zeros in front."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    area = records.encode_point(key, init.SRK_HEAD)
    assert tpms.whole_point(area, init.SRK_HEAD) == area
    point = area[len(init.SRK_HEAD) :]
    short = point[: cut.start - 2] + b"\0\x1f" + point[cut.start + 1 :]
    with pytest.raises(init.Refused, match="TPM-ANSWER.*coordinates of 32 bytes"):
        tpms.whole_point(init.SRK_HEAD + short, init.SRK_HEAD)


def disable(site: Site) -> None:
    site.tpm.run("tpm2_hierarchycontrol", "-C", "o", "shEnable", "clear")


def set_owner(site: Site) -> None:
    site.tpm.run("tpm2_changeauth", "-c", "o", "secret")


def set_endorsement(site: Site) -> None:
    site.tpm.run("tpm2_changeauth", "-c", "e", "secret")


def lock_out(site: Site) -> None:
    site.tpm.run("tpm2_dictionarylockout", "-s", "-n", "1", "-t", "600", "-l", "600")
    site.tpm.run(
        "tpm2_nvdefine", "-C", "o", "-p", "secret", "-s", "8", "-a", "authwrite|authread", "0x1500001"
    )
    site.tpm.run("tpm2_nvread", "0x1500001", "-P", "wrong", fails=True)


def foreign_key(site: Site) -> None:
    site.tpm.run("tpm2_createprimary", "-C", "o", "-G", "rsa2048", "-c", "srk.ctx")
    site.tpm.run("tpm2_evictcontrol", "-C", "o", "-c", "srk.ctx", hex(init.SRK))
    site.tpm.run("tpm2_flushcontext", "-t")


def foreign_index(site: Site) -> None:
    site.tpm.run("tpm2_nvdefine", "-C", "o", "-s", "8", "-a", "ownerwrite|authread", hex(init.EPOCH_INDEX))


def later_epoch(site: Site) -> None:
    site.request(state=site.folder / "other", epoch=2)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (disable, "switch the hierarchies on in the firmware's setup"),
        (set_owner, "--again .*or clear the TPM in the firmware's setup"),
        (foreign_index, "another organisation's request .*tpm2_nvundefine -C o 0x1845050"),
        (later_epoch, "--epoch 2 or later"),
    ],
)
def test_a_refused_request_has_a_remedy_for_who_provisions(
    site: Site, spoil: Callable[[Site], None], says: str
) -> None:
    spoil(site)
    with pytest.raises(init.Refused) as caught:
        site.request()
    assert re.search(says, remedy(caught.value))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (disable, "TPM-STATE.*hierarchies of owner and endorsement.*seen hierarchies 0x5"),
        (disable_endorsement, "TPM-STATE.*seen hierarchies 0x3"),
        (set_owner, "TPM-STATE.*--again.*seen owner password"),
        (set_endorsement, "TPM-STATE.*seen endorsement password"),
        (set_lockout, "TPM-STATE.*seen lockout password"),
        (lock_out, "TPM-LOCKOUT"),
        (foreign_key, "another object at 0x81004d53.*tpm2_evictcontrol"),
        (foreign_index, "TPM-INDEX"),
        (later_epoch, "EPOCH.*epoch 1 or before.*seen epoch 2"),
    ],
)
def test_other_tpms_are_refused_before_anything_is_written(
    site: Site, spoil: Callable[[Site], None], says: str
) -> None:
    spoil(site)
    with Breaking(site.tpm) as way, pytest.raises((Failure, init.Refused), match=says):
        site.request(tcti=way.tcti)
    assert writes(way.seen) == []
    assert not site.state.exists()
    assert not list(site.folder.glob(".mosinit-*"))


def test_the_epoch_is_the_organisation_s(site: Site) -> None:
    keyset = site.folder / "keys"
    shutil.copytree(site.keyset.folder, keyset)
    keys.raise_epoch(site.host, keyset, 5)
    organisation = keys.export(site.host, keyset, site.folder / "organisation").folder
    options = provision.Options(organisation, site.state, event_log=site.log, tcti=site.tpm.tcti)
    with Breaking(site.tpm) as way, pytest.raises(init.Refused, match="EPOCH.*epoch 5 or later"):
        provision.request(site.host, replace(options, epoch=1, tcti=way.tcti))
    assert writes(way.seen) == []
    provision.request(site.host, options)
    assert exchange.parse_request((site.state / "request.json").read_bytes(), "request").epoch == 5
    assert init.read_epoch(TpmMachine(site.tpm)).bit_length() == 5


def test_an_epoch_above_the_organisation_s_is_said_before_it_is_for_good(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be meant, but nothing of the organisation's own epoch opens such a machine again."""
    told = site.request(epoch=2)
    said = capsys.readouterr().err
    assert "warning: epoch 2 is later than the organisation's, 1: from here this TPM refuses" in said
    assert "`mosinit keys epoch KEYSET 2`" in said
    assert "--keys KEYSET --epoch 2 --out answer.json`" in str(told["next"])
    # This TPM is of that epoch by now: to say so is no news, and nothing else is taken.
    site.request(state=site.folder / "second", epoch=2)
    assert "is later" not in capsys.readouterr().err
    site.renew(site.folder)
    site.request()
    assert "is later" not in capsys.readouterr().err


def test_an_absent_tpm_is_refused(site: Site) -> None:
    for tcti in ("device:/dev/none", "swtpm:path=/none"):
        with pytest.raises(init.Refused, match="TPM-ABSENT") as caught:
            site.request(tcti=tcti)
        assert re.search("--tpm: .*swtpm:path=SOCKET.* SOCKET.ctrl", remedy(caught.value))
    for tcti in ("nonsense", ":", "a b:c"):
        with pytest.raises(Usage, match="is no TCTI"):
            site.request(tcti=tcti)


def test_the_event_log_must_be_there(site: Site) -> None:
    content = site.log.read_bytes()
    try:
        site.log.write_bytes(b"")
        with pytest.raises(Failure, match="is empty"):
            site.request()
        site.log.write_bytes(bytes(exchange.LOG_BYTES + 1))
        with pytest.raises(Failure, match="more than"):
            site.request()
        site.log.unlink()
        with pytest.raises(Failure, match="--event-log"):
            site.request()
    finally:
        site.log.write_bytes(content)


def replace_log(site: Site, content: bytes) -> Path:
    """Return another event log beside the machine's."""
    path = site.folder / "other-log"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("content", [b"garbage", bytes(1000), b"{}"])
def test_what_is_no_event_log_is_refused_before_the_tpm_is_touched(site: Site, content: bytes) -> None:
    log = replace_log(site, content)
    with Breaking(site.tpm) as way, pytest.raises(Failure, match="other-log is no event log.*--event-log"):
        provision.request(site.host, replace(site.options(tcti=way.tcti), event_log=log))
    assert way.seen == []
    assert not site.state.exists()


def test_the_event_log_of_another_start_is_refused_before_anything_is_written(site: Site) -> None:
    log = replace_log(site, encode_log([measured(7, 4, bytes(4))]))
    with Breaking(site.tpm) as way, pytest.raises(Failure, match="other-log gives PCR 7 .* the TPM has"):
        provision.request(site.host, replace(site.options(tcti=way.tcti), event_log=log))
    assert writes(way.seen) == []
    assert not site.state.exists()


def test_a_second_run_with_another_event_log_is_told(site: Site) -> None:
    site.request()
    content = (site.state / "request.json").read_bytes()
    more = encode_event(measured(4, 1, b"more"), ("sha1", "sha256"))
    log = replace_log(site, site.log.read_bytes() + more)
    with pytest.raises(Failure, match="state is from another run, with another event log: remove it"):
        provision.request(site.host, replace(site.options(), event_log=log))
    assert (site.state / "request.json").read_bytes() == content
    (site.state / "request.json").write_text("{}")
    with pytest.raises(Failure, match="is no request"):
        site.request()


# --- TLS by the SUDI key ---------------------------------------------------------------------------------


def test_the_sudi_key_serves_tls_after_the_fence(done: Site, tmp_path: Path) -> None:
    done.restart()
    machine = TpmMachine(done.tpm)
    init.fence(machine)
    assert machine.report.fenced
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-naccept", "1", "-quiet", "-tls1_3",
         "-provider", "tpm2", "-provider", "default", "-cert", str(done.state / "sudi.pem"),
         "-key", str(done.state / "sudi.key"), "-pass", f"file:{done.state / 'sudi.auth'}"],
        env=done.tpm.environment(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    context = ssl.create_default_context(cafile=str(done.keyset.certificate_path("sudi-ca")))
    context.check_hostname = False  # a SUDI certificate names a product and a serial, no host
    try:
        with contextlib.closing(connect(port, server)) as plain, context.wrap_socket(plain) as tls:
            seen = tls.getpeercert(binary_form=True)
    finally:
        server.terminate()
        server.communicate(timeout=20)
    assert seen is not None
    record = init.verify_record(
        seen, done.keyset.certificate_path("sudi-ca").read_bytes(), done.keyset.product
    )
    assert record.storage_key == init.tpm_name(init.read_storage_key(machine) or b"")


def connect(port: int, server: subprocess.Popen[bytes]) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=20)
        except ConnectionRefusedError:
            assert server.poll() is None, server.stderr and server.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_sudi_key_is_a_tls_client_too(done: Site, tmp_path: Path) -> None:
    done.restart()  # no resource manager frees here what a killed program had loaded
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(done.other.folder / "uki.pem"), str(done.other.folder / "uki.key"))
    context.load_verify_locations(str(done.keyset.certificate_path("sudi-ca")))
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        client = subprocess.Popen(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{listener.getsockname()[1]}", "-quiet",
             "-provider", "tpm2", "-provider", "default", "-cert", str(done.state / "sudi.pem"),
             "-key", str(done.state / "sudi.key"), "-pass", f"file:{done.state / 'sudi.auth'}"],
            env=done.tpm.environment(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            plain, _ = listener.accept()
            plain.settimeout(20)
            with contextlib.closing(plain), context.wrap_socket(plain, server_side=True) as tls:
                seen = tls.getpeercert()
        finally:
            client.kill()
            client.communicate(timeout=20)
    assert seen is not None
    assert ("URI", f"urn:uuid:{done.keyset.product}") in seen["subjectAltName"]


def test_without_its_password_the_sudi_key_does_nothing(done: Site, tmp_path: Path) -> None:
    done.restart()
    (tmp_path / "wrong").write_text("wrong\n")
    done.tpm.run(
        "openssl", "pkeyutl", "-provider", "tpm2", "-provider", "default", "-sign", "-rawin", "-digest",
        "sha256", "-inkey", done.state / "sudi.key", "-passin", f"file:{tmp_path / 'wrong'}",
        "-in", done.state / "machine.json", "-out", tmp_path / "signature", fails=True,
    )  # fmt: skip
    assert not done.flags() & init.Permanent.IN_LOCKOUT


# --- The command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("provision --dir s", "name one thing: --organisation ORG .*, --answer FILE .* --approvals FILE"),
        (
            "provision --dir s --organisation o --answer a",
            "name one thing: --organisation ORG .*, --answer FILE .* --approvals FILE",
        ),
        ("provision --dir s --answer a --again c", "--again goes with --organisation"),
        ("provision --dir s --answer a --auths c", "--auths goes with --organisation"),
        ("provision --dir s --answer a --epoch 2", "--epoch goes with --organisation"),
        ("provision --dir s --answer a --event-log l", "--event-log goes with --organisation"),
        ("provision --dir s --organisation o --again c", "--again and --auths go together"),
        ("provision --dir s --organisation o --auths c", "--again and --auths go together"),
        ("provision --organisation o", "name by --dir where"),
        (
            "provision --dir s --answer a --approvals b",
            "name one thing: --organisation ORG .* --approvals FILE",
        ),
        ("provision --approvals a --dir s", "--dir goes with --organisation or --answer"),
        ("provision --approvals a --epoch 2", "--epoch goes with --organisation"),
        ("provision --dir s --organisation . --epoch 65", "from 1 to 64"),
        ("provision --dir s --organisation none", "none holds no public parts .*`mosinit keys export`"),
        ("provision --dir none --answer a", "is not what `mosinit provision"),
        (
            "provision --dir /etc/passwd --answer a",
            "/etc/passwd is not what .* it made, or begin anew in a new one",
        ),
    ],
)
def test_wrong_words(
    words: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    table = tuple(replace(verb, tools=False) for verb in commands.VERBS)
    status = cli.main(words.split(), table)
    said = capsys.readouterr()
    assert status in (1, 2)
    assert said.err.count("\n") == 1
    assert re.search(says, said.err)
    assert list(tmp_path.iterdir()) == []
