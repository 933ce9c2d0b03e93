"""Approving in advance: what a variable holds after an update, what PCR 7 will be, what is never signed."""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from mosinit import (
    approvals,
    approve,
    cli,
    commands,
    drift,
    eventlog,
    exchange,
    firmware,
    init,
    keys,
    reseal,
    siglists,
)  # fmt: skip
from mosinit.approve import Options
from mosinit.eventlog import DB, DBX, EV_AUTHORITY, KEK, PK, Event
from mosinit.host import Failure, Host, Usage
from mosinit.siglists import Update
from tests.eventlogs import encode_log, measured
from tests.test_approvals import swap, variable_event
from tests.test_drift import hashes, lists

Need = Callable[..., None]


@pytest.fixture(scope="module")
def trusted(keyset: keys.Keyset) -> firmware.Certificates:
    return firmware.certificates_of_keyset(keyset.folder)


def good(trusted: firmware.Certificates, dbx: bytes = firmware.EMPTY_DBX) -> list[Event]:
    return list(approvals.platform_events(trusted, dbx))


# --- Appending, as a firmware does -------------------------------------------------------------------


def blob(kind: int, size: int, *names: int) -> bytes:
    """Return a list of entries of a size, all of one owner."""
    body = b"".join(bytes(16) + bytes([name]) * (size - 16) for name in names)
    return struct.pack("<16sIII", bytes([kind]) * 16, 28 + len(body), 0, size) + body


APPENDED = {
    "to nothing": (b"", blob(1, 48, 1, 2), blob(1, 48, 1, 2)),
    "nothing": (blob(1, 48, 1), b"", blob(1, 48, 1)),
    "one more": (blob(1, 48, 1), blob(1, 48, 2), blob(1, 48, 1) + blob(1, 48, 2)),
    "one that is there": (blob(1, 48, 1), blob(1, 48, 1), blob(1, 48, 1)),
    "some that are there": (
        blob(1, 48, 1, 2), blob(1, 48, 2, 3, 1, 4), blob(1, 48, 1, 2) + blob(1, 48, 3, 4),
    ),
    "in another list": (
        blob(1, 48, 1) + blob(2, 48, 2), blob(2, 48, 1, 2), blob(1, 48, 1) + blob(2, 48, 2) + blob(2, 48, 1),
    ),
    "of another size": (blob(1, 48, 1), blob(1, 49, 1), blob(1, 48, 1) + blob(1, 49, 1)),
    "twice in what is new": (blob(1, 48, 1), blob(1, 48, 2, 2), blob(1, 48, 1) + blob(1, 48, 2, 2)),
    "two lists": (
        blob(1, 48, 1), blob(1, 48, 1) + blob(3, 40, 3), blob(1, 48, 1) + blob(3, 40, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", APPENDED)
def test_appending_skips_what_is_there(case: str) -> None:
    before, more, after = APPENDED[case]
    assert siglists.append(before, more) == after


def test_another_owner_is_another_entry() -> None:
    one, two = hashes(b"a"), hashes(b"a", owner=b"x" * 16)
    assert siglists.append(one, two) == one + two


some_lists = st.lists(
    st.builds(
        lambda kind, size, names: blob(kind, size, *names),
        st.integers(1, 3), st.sampled_from([40, 48]), st.lists(st.integers(0, 5), min_size=1, max_size=5),
    ),
    max_size=4,
).map(b"".join)  # fmt: skip


@given(some_lists, some_lists)
def test_appended_twice_nothing_changes(before: bytes, more: bytes) -> None:
    after = siglists.append(before, more)
    assert after.startswith(before)
    assert siglists.append(after, more) == after
    assert set(drift.parse_entries(after)) == {*drift.parse_entries(before), *drift.parse_entries(more)}


def test_virt_firmware_reads_the_same_entries(need: Need) -> None:
    module = pytest.importorskip("virt.firmware.efi.siglist")
    after = siglists.append(firmware.EMPTY_DBX + hashes(b"a", b"b"), hashes(b"b", b"c", b"a") + hashes(b"d"))
    theirs = [
        (str(each.guid), str(item["guid"]), bytes(item["data"]))
        for each in module.EfiSigDB(after)
        for item in each
    ]
    assert theirs == [tuple(each) for each in drift.parse_entries(after)]
    names = [b"", b"a", b"b", b"c", b"d"]
    assert [data for _, _, data in theirs] == [hashlib.sha256(name).digest() for name in names]


# --- Updates -----------------------------------------------------------------------------------------


def signed(
    host: Host, folder: Path, keyset: keys.Keyset, name: str, content: bytes, *words: str, role: str = "KEK"
) -> bytes:
    """Sign an update by efitools."""
    (folder / "list").write_bytes(content)
    key, certificate = keyset.folder / f"{role}.key", keyset.certificate_path(role)
    host.run(
        ["sign-efi-sig-list", *words, "-k", key, "-c", certificate, name, folder / "list", folder / "auth"]
    )
    return (folder / "auth").read_bytes()


@pytest.mark.parametrize(("words", "append"), [(("-a",), True), ((), False)])
def test_the_signature_says_whether_it_is_appended(
    need: Need, host: Host, keyset: keys.Keyset, tmp_path: Path, words: Sequence[str], append: bool
) -> None:
    need("sign-efi-sig-list")
    content = hashes(b"a", b"b")
    for role in ("KEK", "PK"):
        data = signed(host, tmp_path, keyset, "dbx", content, *words, role=role)
        assert siglists.read_update(host, keyset, DBX, data, "x") == Update(content, append)


def test_a_bare_list_is_the_whole_content(host: Host, keyset: keys.Keyset) -> None:
    for content in (b"", hashes(b"a"), firmware.EMPTY_DBX):
        update = siglists.read_update(host, keyset, DBX, content, "x")
        assert (update, update.applied(hashes(b"c"))) == (Update(content, False), content)


@pytest.mark.parametrize("name", ["PK", "KEK", "db"])
def test_the_updates_that_a_medium_carries_are_read(
    host: Host, keyset: keys.Keyset, trusted: firmware.Certificates, name: str
) -> None:
    content = lists(*{"PK": [trusted.pk], "KEK": [trusted.kek], "db": trusted.db}[name])
    signer = "KEK" if name == "db" else "PK"
    data = firmware.signed_update(keyset.signer(signer), name, content)
    full = siglists.NAMES[name.lower()]
    assert siglists.read_update(host, keyset, full, data, "x") == Update(content, False)


def test_an_update_that_no_firmware_takes_is_refused(
    need: Need, host: Host, keyset: keys.Keyset, other: keys.Keyset, tmp_path: Path
) -> None:
    need("sign-efi-sig-list")
    content = hashes(b"a")
    mine, theirs = (signed(host, tmp_path, each, "dbx", content, "-a") for each in (keyset, other))
    layer = signed(host, tmp_path, keyset, "dbx", content, "-a", role="layer")
    changed = mine[:-1] + bytes([mine[-1] ^ 1])
    later = bytes([mine[0] ^ 1]) + mine[1:]
    for data, name in ((theirs, DBX), (layer, DBX), (changed, DBX), (later, DBX), (mine, DB), (mine, KEK)):
        with pytest.raises(Failure, match=f"x is no update of {name[1]} that this keyset's"):
            siglists.read_update(host, keyset, name, data, "x")


def test_what_holds_no_lists_is_refused(host: Host, keyset: keys.Keyset) -> None:
    for data in (b"words", hashes(b"a")[:-1], struct.pack("<I", 0x27) + hashes(b"a"), blob(1, 48)):
        with pytest.raises(Failure, match="x holds no signature lists"):
            siglists.read_update(host, keyset, DBX, data, "x")


@given(st.binary(max_size=100))
def test_no_file_does_more_than_be_refused(data: bytes) -> None:
    content, signature = siglists._take_apart(data)
    assert data.endswith(content) or not content
    assert siglists.wrapped(data)
    assert len(signature) <= len(data)


def test_a_signed_data_is_wrapped_as_openssl_writes_it(host: Host, keyset: keys.Keyset) -> None:
    whole = keyset.signer("KEK").sign_pkcs7(b"words", with_certificate=True)
    assert siglists.wrapped(firmware.bare_signed_data(whole)) == siglists.wrapped(whole) == whole


# --- Predicting --------------------------------------------------------------------------------------


def test_a_new_dbx_takes_the_place_of_the_old(trusted: firmware.Certificates) -> None:
    more = hashes(b"a")
    for append in (True, False):
        dbx = firmware.EMPTY_DBX + more if append else more
        made = approve.predict(good(trusted), {DBX: Update(more, append)}, trusted)
        assert made == good(trusted, dbx)
        assert eventlog.replay(made, init.Pcr(7)) == approvals.predict_pcr7(trusted, dbx)


def test_what_is_not_of_pcr_7_counts_for_nothing(trusted: firmware.Certificates) -> None:
    log = [measured(0, 8, b"x"), *good(trusted), measured(4, 5, b"y")]
    assert approve.predict(log, {}, trusted) == good(trusted)


def test_a_new_uki_key_is_the_one_that_verifies(
    keyset: keys.Keyset, other: keys.Keyset, trusted: firmware.Certificates
) -> None:
    """The log is of before: the loader that comes with the new db is signed by its key."""
    theirs = firmware.certificates_of_keyset(other.folder)
    after = replace(trusted, db=theirs.db)
    made = approve.predict(good(trusted), {DB: Update(lists(*theirs.db), False)}, after)
    assert made == good(after)


def test_an_entry_of_another_owner_verifies_as_that(trusted: firmware.Certificates) -> None:
    content = lists(*trusted.db)
    moved = content[:28] + b"o" * 16 + content[44:]
    made = approve.predict(good(trusted), {DB: Update(moved, False)}, trusted)
    entry = b"o" * 16 + trusted.db[0].public_bytes(Encoding.DER)
    assert made == [*swap(good(trusted), DB, moved)[:-1], variable_event(DB, entry, EV_AUTHORITY)]
    # Both keys' programs verified by one entry from now on: that is measured once.
    two = [*good(trusted), variable_event(DB, b"p" * 16 + entry[16:], EV_AUTHORITY)]
    assert approve.predict(two, {DB: Update(moved, False)}, trusted) == made


def test_a_variable_that_the_log_does_not_have_cannot_change(trusted: firmware.Certificates) -> None:
    without = [event for event in good(trusted) if event != good(trusted)[4]]
    false = [*good(trusted)[:4], good(trusted)[4]._replace(digest=bytes(32)), *good(trusted)[5:]]
    late = swap(good(trusted), DBX, b"damaged")
    for log, words in ((without, "no dbx"), (false, "no dbx"), (late, "dbx of the log cannot be read")):
        with pytest.raises(Failure, match=words):
            approve.predict(log, {DBX: Update(hashes(b"a"), True)}, trusted)


# --- The verb ----------------------------------------------------------------------------------------


class Site:
    """Files of a person at the organisation's computer."""

    def __init__(self, host: Host, keyset: keys.Keyset, folder: Path) -> None:
        self.host, self.keyset, self.folder = host, keyset, folder
        self.out = folder / "approvals.json"
        self.trusted = firmware.certificates_of_keyset(keyset.folder)

    def log(self, events: Sequence[Event], name: str = "log") -> Path:
        return self.file(name, encode_log([measured(0, 8, b"version"), *events]))

    def file(self, name: str, data: bytes) -> Path:
        (self.folder / name).write_bytes(data)
        return self.folder / name

    def approve(self, *logs: Path, **options: object) -> dict[str, Any]:
        given = Options(logs=logs, **options)  # type: ignore[arg-type]
        return approve.approve(self.host, self.keyset, self.out, given)

    def approved(self) -> Mapping[str, int]:
        """Return what the file approves up to which epoch, as a machine reads it."""
        policy = keys.trust(self.keyset.product, self.files())
        read = reseal.read_approvals(self.out, policy)
        for each in read.approvals:
            approval = init.PlatformApproval(each.epoch, each.signature)
            platform = policy.organisation["platform.pub"]
            reseal.verify_approval(platform, reseal.keys_of(policy), each.pcr7.hex(), approval)
        return {each.pcr7.hex(): each.epoch for each in read.approvals}

    def files(self) -> Mapping[str, bytes]:
        folder = self.keyset.folder
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".pem", ".pub")}


@pytest.fixture
def site(host: Host, keyset: keys.Keyset, tmp_path: Path) -> Site:
    return Site(host, keyset, tmp_path)


def test_the_log_of_a_good_machine_is_approved_as_it_is(site: Site) -> None:
    told = site.approve(site.log(good(site.trusted)))
    pcr7 = approvals.predict_pcr7(site.trusted, firmware.EMPTY_DBX).hex()
    assert site.approved() == {pcr7: 1}
    (row,) = told["approved"]
    assert (row["pcr7"], row["reason"], row["changes"]) == (pcr7, "as in log", [])
    assert f"mosinit provision --approvals {site.out.name}" in told["next"]


def test_a_change_of_dbx_is_approved_and_named(site: Site, need: Need) -> None:
    need("sign-efi-sig-list")
    more = hashes(b"a", b"") + hashes(b"b")
    update = signed(site.host, site.folder, site.keyset, "dbx", more, "-a")
    dbx = site.file("dbx.auth", update)
    told = site.approve(site.log(good(site.trusted)), changes={"dbx": dbx}, epoch=9, reason="CVE of today")
    after = siglists.append(firmware.EMPTY_DBX, more)
    pcr7 = approvals.predict_pcr7(site.trusted, after).hex()
    assert site.approved() == {pcr7: 9}
    (row,) = told["approved"]
    assert (row["dbx_bytes"], row["reason"]) == (len(after), "CVE of today")
    assert row["changes"][0].startswith("dbx changed: 3 entries added: program ")


def test_a_person_reads_once_what_is_approved(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """As lines on standard output: nothing of it is progress."""
    dbx = site.file("dbx", firmware.EMPTY_DBX + hashes(b"a"))
    words = ["approve", str(site.log(good(site.trusted))), "--keys", str(site.keyset.folder)]
    words += ["--out", str(site.out), "--dbx", str(dbx), "--epoch", "9"]
    bare = tuple(replace(verb, tools=False, secrets=False) for verb in commands.VERBS)
    assert cli.main(words, bare) == 0
    out, err = capsys.readouterr()
    assert err == ""
    pcr7 = approvals.predict_pcr7(site.trusted, dbx.read_bytes()).hex()
    first, *lines = out.splitlines()
    assert first == (
        "approved one state of firmware (PCR 7) up to epoch 9: Secure Boot with exactly this keyset"
    )
    at = lines.index("approved:")
    assert lines[at + 1 : at + 3] == ["  - reason: dbx changed, from log", f"    pcr7: {pcr7}"]
    assert lines[at + 6] == "    changes:"
    assert lines[at + 7].startswith("      dbx changed: 1 entry added: program ")
    assert out.count(pcr7) == out.count("dbx changed: ") == 1
    assert not set('[]{}"') & set(out)


def test_a_change_is_told_from_the_log_that_is_filed(site: Site, need: Need) -> None:
    """Beside another log, also where a variable changes."""
    mode = variable_event((init.EFI_GLOBAL, "DeployedMode"), b"\0")
    newer = [*good(site.trusted)[:5], mode, *good(site.trusted)[5:]]
    filed(site, good(site.trusted))
    dbx = site.file("dbx", firmware.EMPTY_DBX + hashes(b"a"))
    places = {"machine": "1234", "machines": site.folder / "machines"}
    (row,) = site.approve(site.log(newer), changes={"dbx": dbx}, **places)["approved"]
    first, second = sorted(row["changes"])
    assert first == "DeployedMode is measured now, and was not before"
    assert second.startswith("dbx changed: 1 entry added: program ")


def test_a_firmware_update_is_approved_by_the_log_of_another_machine(site: Site) -> None:
    mode = variable_event((init.EFI_GLOBAL, "DeployedMode"), b"\0")
    newer = [*good(site.trusted)[:5], mode, *good(site.trusted)[5:]]
    filed(site, good(site.trusted))
    told = site.approve(site.log(newer), machine="1234", machines=site.folder / "machines")
    assert told["approved"][0]["changes"] == ["DeployedMode is measured now, and was not before"]


def test_what_a_log_hides_behind_a_change_is_named(site: Site) -> None:
    """A machine whose dbx was rolled back asks, at the same time as its organisation changes something."""
    filed(site, swap(good(site.trusted), DBX, hashes(b"a", b"b")))
    log = site.log(swap(good(site.trusted), DBX, hashes(b"a")))
    kek = site.file("kek", firmware.signature_list(site.trusted.kek))
    given = {"machine": "1234", "machines": site.folder / "machines", "changes": {"kek": kek}}
    told = site.approve(log, **given)
    assert any("dbx changed: 1 entry removed" in change for change in told["approved"][0]["changes"])


def filed(site: Site, events: Sequence[Event]) -> None:
    folder = site.folder / "machines/1234"
    folder.mkdir(parents=True)
    words = {"serial": "1234", "storage_key": "00", "record": "00"}
    (folder / "machine.json").write_text(json.dumps(words))
    (folder / "eventlog.bin").write_bytes(encode_log(events))


def test_a_filed_machine_has_its_log(site: Site) -> None:
    machines = site.folder / "machines"
    filed(site, good(site.trusted))
    told = site.approve(machine="1234", machines=machines, changes={"dbx": site.file("dbx", hashes(b"a"))})
    assert site.approved() == {approvals.predict_pcr7(site.trusted, hashes(b"a")).hex(): 1}
    assert told["approved"][0]["reason"] == "dbx changed, from machine 1234"
    (machines / "1234/eventlog.bin").unlink()
    with pytest.raises(Failure, match="no event log of machine 1234 is filed"):
        site.approve(machine="1234", machines=machines)
    with pytest.raises(Failure, match="no machine 5678 is filed"):
        site.approve(machine="5678", machines=machines)
    with pytest.raises(Usage, match="no serial"):
        site.approve(machine="../1234", machines=machines)


def test_several_models_in_one_file(site: Site) -> None:
    mode = variable_event((init.EFI_GLOBAL, "DeployedMode"), b"\1")
    one, two = good(site.trusted), [*good(site.trusted)[:5], mode, *good(site.trusted)[5:]]
    told = site.approve(*(site.log(events, f"log{n}") for n, events in enumerate((one, two, one))))
    assert len(told["approved"]) == len(site.approved()) == 2
    many = [site.log(swap(one, DBX, hashes(bytes([n]))), f"many{n}") for n in range(17)]
    with pytest.raises(Failure, match="a list of 1 to 16 approvals"):
        site.approve(*many)


def request(site: Site, events: Sequence[Event], pcr7: bytes) -> Path:
    part, log = b"\0", encode_log(events)
    made = exchange.Request(site.keyset.product, 1, part, part, part, part, part, pcr7, log, part)
    return site.file("request.json", exchange.encode_request(made))


def test_a_request_brings_its_log(site: Site) -> None:
    events = good(site.trusted)
    pcr7 = eventlog.replay(events, init.Pcr(7))
    site.approve(request(site, events, pcr7))
    assert site.approved() == {pcr7.hex(): 1}
    with pytest.raises(Failure, match="request.json does not give the PCR 7 that it says"):
        site.approve(request(site, events, bytes(32)))


def test_what_a_boot_would_refuse_is_never_approved(site: Site, other: keys.Keyset) -> None:
    theirs = firmware.certificates_of_keyset(other.folder)
    events, trusted = good(site.trusted), site.trusted
    audit = variable_event((init.EFI_GLOBAL, "AuditMode"), b"\1")
    layer = list(approvals.platform_events(trusted, b"", trusted.db[1]))
    logs = {
        "'SecureBoot': its value is 00": swap(events, eventlog.SECURE_BOOT, b"\0"),
        "'AuditMode': its value is 01": [*events[:5], audit, *events[5:]],
        "'PK': it holds other certificates than the keyset's: none": swap(events, PK, b""),
        "'db': it holds other certificates": swap(events, DB, lists(*trusted.db, theirs.pk)),
        "verified by the layer key": layer,
        "no separator": events[:5],
    }
    for words, log in logs.items():
        with pytest.raises(Failure, match=words):
            site.approve(site.log(log))
    contents = {
        ("pk", "'PK': it holds other"): lists(theirs.pk),
        ("pk", "'PK': .* none"): b"",
        ("kek", "'KEK': it holds other"): lists(trusted.kek, theirs.kek),
        ("db", "'db': it holds other"): lists(*trusted.db, theirs.db[0]),
        ("dbx", "would revoke the keyset's own .*layer"): lists(trusted.db[1]),
        ("dbx", "would revoke the keyset's own .*uki"): revoked_by_hash(trusted),
    }
    for (word, words), content in contents.items():
        with pytest.raises(Failure, match=words):
            site.approve(site.log(events), changes={word: site.file("new", content)})
    assert not site.out.exists()


def revoked_by_hash(trusted: firmware.Certificates, kind: str = approve.X509_SHA256) -> bytes:
    """Return a list of EFI_CERT_X509_SHA256 or its kin: the hash of what is signed of a certificate, and a
    time.
    """
    digest = approve.X509_HASHES[kind](trusted.db[0].tbs_certificate_bytes).digest()
    entry = bytes(16) + digest + bytes(16)
    head = struct.pack("<16sIII", uuid.UUID(kind).bytes_le, 28 + len(entry), 0, len(entry))
    return head + entry


@pytest.mark.parametrize("kind", approve.X509_HASHES)
def test_a_dbx_that_revokes_the_keyset_by_any_hash(site: Site, kind: str) -> None:
    log = site.log(good(site.trusted, revoked_by_hash(site.trusted, kind)))
    with pytest.raises(Failure, match="would revoke the keyset's own .*uki"):
        site.approve(log)


@pytest.mark.parametrize("dbx", [b"words", struct.pack("<16sIII", bytes(16), 28 + 17, 1, 17) + bytes(17)])
def test_a_dbx_that_is_none_is_not_approved(site: Site, dbx: bytes) -> None:
    with pytest.raises(Failure, match="event [0-9] of PCR 7 .*'dbx': a signature list"):
        site.approve(site.log(good(site.trusted, dbx)))
    with pytest.raises(Failure, match="'dbx': a signature list"):
        approvals.check_platform(good(site.trusted, dbx), site.trusted, "")


def test_no_log_and_no_place(site: Site) -> None:
    for log in (b"", b"words", encode_log(good(site.trusted))[:-1]):
        with pytest.raises(Failure, match="log is no event log of a firmware"):
            site.approve(site.file("log", log))
    with pytest.raises(Usage, match="name an event log"):
        site.approve()
    with pytest.raises(Usage, match="--reason"):
        site.approve(site.log(good(site.trusted)), reason="\x1b[2J")
    with pytest.raises(init.Refused, match="EPOCH"):
        raised = replace(site.keyset, epoch=3)
        approve.approve(site.host, raised, site.out, Options([site.log(good(site.trusted))], epoch=2))
    site.out = site.keyset.folder / "approvals.json"
    with pytest.raises(Usage, match="nothing else goes"):
        site.approve(site.log(good(site.trusted)))
    site.out = site.folder / "none/approvals.json"
    with pytest.raises(Usage, match="in a folder that exists"):
        site.approve(site.log(good(site.trusted)))


def test_a_log_with_a_name_that_moves_the_cursor(site: Site) -> None:
    told = site.approve(site.log(good(site.trusted), "log\x1b[2J" + "x" * 210))
    assert told["approved"][0]["reason"].startswith("as in log?[2Jxxx")
    assert len(told["approved"][0]["reason"]) == 200
