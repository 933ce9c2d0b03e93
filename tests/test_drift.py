"""What differs in PCR 7, in words: every event that can, and no words of a log that move a cursor."""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Sequence
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from mosinit import approvals, drift, eventlog, firmware, init, keys
from mosinit.eventlog import DB, DBX, EV_ACTION, EV_AUTHORITY, EV_SEPARATOR, EV_VARIABLE, KEK, PK, Event
from mosinit.host import Host
from tests.eventlogs import measured, unmeasured
from tests.test_approvals import GOLDEN, certificates, swap, variable_event
from tests.test_eventlog import some_events

TRUSTED = certificates("ovmf")
GOOD = approvals.platform_events(TRUSTED, firmware.EMPTY_DBX)
OTHER_OWNER = uuid.UUID(int=7).bytes_le


def hashes(*names: bytes, owner: bytes = bytes(16)) -> bytes:
    """Return a list of SHA-256 hashes."""
    body = b"".join(owner + hashlib.sha256(name).digest() for name in names)
    kind = uuid.UUID(drift.SHA256_GUID).bytes_le
    return struct.pack("<16sIII", kind, 28 + len(body), 0, 48) + body


def lists(*each: x509.Certificate) -> bytes:
    return b"".join(firmware.signature_list(one) for one in each)


def told(now: Sequence[Event], before: Sequence[Event] = GOOD) -> list[str]:
    return [each.what for each in drift.compare(before, now)]


def test_two_boots_of_one_firmware_do_not_differ() -> None:
    real = eventlog.parse_event_log((GOLDEN / "ovmf-event-log.bin").read_bytes())
    assert told(real) == told(GOOD, real) == []
    assert told([*GOOD, unmeasured(b"words", 7), measured(4, EV_ACTION, b"words")]) == []


DBX_NOW = firmware.EMPTY_DBX + hashes(b"a", b"b", b"c")
CHANGES: dict[str, tuple[Sequence[Event], str]] = {
    "Secure Boot off": (swap(GOOD, eventlog.SECURE_BOOT, b"\0"), "Secure Boot was switched off"),
    "three more in dbx": (swap(GOOD, DBX, DBX_NOW), "dbx changed: 3 entries added: program ca978112ca1bbd"),
    "dbx emptied": (swap(GOOD, DBX, b""), "dbx changed: 1 entry removed: program e3b0c44298fc1c14…"),
    "damaged dbx": (swap(GOOD, DBX, b"words"), "dbx changed, and cannot be read: a signature list is cut"),
    "one more in db": (
        swap(GOOD, DB, lists(*TRUSTED.db, TRUSTED.pk)),
        "db changed: 1 entry added: certificate PK (",
    ),
    "KEK removed": (swap(GOOD, KEK, b""), "KEK changed: 1 entry removed: certificate KEK ("),
    "PK removed": (swap(GOOD, PK, b""), "PK changed: 1 entry removed: certificate PK ("),
    "db turned": (swap(GOOD, DB, lists(*TRUSTED.db[::-1])), "db has the same entries, in another order"),
    "another owner": (
        swap(GOOD, PK, lists(TRUSTED.pk)[:28] + OTHER_OWNER + lists(TRUSTED.pk)[44:]),
        "PK has the same entries, under another owner",
    ),
    "no dbx": ([event for event in GOOD if event != GOOD[4]], "dbx is not measured any more"),
    "a new variable": (
        [*GOOD[:5], variable_event((init.EFI_GLOBAL, "AuditMode"), b"\1"), *GOOD[5:]],
        "AuditMode is measured now, and was not before",
    ),
    "an error": ([*GOOD[:5], measured(7, EV_SEPARATOR, b"\1\0\0\0"), GOOD[6]],
                 "a separator says that the firmware met an error (01000000)"),
    "no separator": ([*GOOD[:5], GOOD[6]], "a separator is gone"),
    "debug mode": ([measured(7, EV_ACTION, b"UEFI Debug Mode\0"), *GOOD], "the firmware says: UEFI Debug"),
    "an unknown kind": ([*GOOD, measured(7, 0x800000E1, b"x")], "an event is new: kind 0x800000e1 b'x'"),
    "a variable cut short": ([*GOOD, measured(7, EV_VARIABLE, b"x")], "an event is new: EV_EFI_VARIABLE_D"),
    "nothing started": (GOOD[:6], "nothing was started that is verified by the entry of db: certificate"),
    "twice the same": ([*GOOD, GOOD[-1]], "the firmware measured the same, in another order or another num"),
    "false words": (
        [GOOD[0]._replace(digest=bytes(32)), *GOOD[1:]],
        "the log says another thing than the firmware measured",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_the_event_that_differs_is_named(case: str) -> None:
    now, words = CHANGES[case]
    (only,) = drift.compare(GOOD, now)
    assert only.what.startswith(words)
    assert only.remedy


def test_back_again_each_is_the_opposite() -> None:
    off = swap(GOOD, eventlog.SECURE_BOOT, b"\0")
    assert told(GOOD, off) == ["Secure Boot was switched on"]
    assert told(GOOD, swap(GOOD, DBX, DBX_NOW)) == [
        "dbx changed: 3 entries removed: program ca978112ca1bbdca…, program 3e23e8160039594a…, "
        "program 2e7d2c03a9507ae2…"
    ]
    assert told(GOOD, [measured(7, EV_ACTION, b"x"), *GOOD]) == ["the firmware says no more: x"]
    assert told(GOOD, [*GOOD[:5], measured(7, EV_SEPARATOR, b"\1\0\0\0"), GOOD[6]]) == [
        "a separator says of an error no more"
    ]
    mode = (init.EFI_GLOBAL, "DeployedMode")
    two = [[*GOOD[:5], variable_event(mode, value), *GOOD[5:]] for value in (b"\1", b"\0", b"", b"\2")]
    assert told(two[1], two[0]) == ["DeployedMode was switched off"]
    assert told(two[3], two[2]) == ["DeployedMode changed from empty to 02"]


def test_the_boot_loader_of_another_entry() -> None:
    layer = approvals.platform_events(TRUSTED, firmware.EMPTY_DBX, TRUSTED.db[1])
    (only,) = told(layer)
    assert only.startswith("the boot loader was verified by the entry of db: certificate layer (")
    assert ", before by the entry of db: certificate uki (" in only
    (more,) = told([*GOOD, layer[-1]])
    assert more.startswith("something more was started, verified by the entry of db: certificate layer")
    shim = variable_event((firmware.SHIM, "MokList"), bytes(20), EV_AUTHORITY)
    assert told([*GOOD, shim]) == ["something more was started, verified by an entry of MokList"]


def test_all_that_differs_is_told_in_order() -> None:
    now = swap(swap(GOOD, eventlog.SECURE_BOOT, b"\0"), DBX, DBX_NOW)[:-1]
    assert [each.event for each in drift.compare(GOOD, now)] == ["SecureBoot", "dbx", "authority"]


def test_other_pcrs_count_for_nothing() -> None:
    log = [measured(4, EV_ACTION, b"words"), *swap(GOOD, eventlog.SECURE_BOOT, b"\0")]
    assert told(log) == ["Secure Boot was switched off"]


def test_what_a_log_says_is_cut_and_moves_no_cursor() -> None:
    (what,) = told([measured(7, EV_ACTION, b"\x1b[2J" + b"x" * 1000), *GOOD])
    assert what.startswith("the firmware says: ?[2Jxxx")
    assert len(what) < 200


def test_of_many_entries_some_are_named() -> None:
    now = swap(GOOD, DBX, firmware.EMPTY_DBX + hashes(*(bytes([n]) for n in range(9))))
    (what,) = told(now)
    assert what.startswith("dbx changed: 9 entries added: ")
    assert (what.count("program"), what.endswith(" and more")) == (drift.SHOWN, True)


def test_the_same_entry_more_often_is_told() -> None:
    twice = swap(GOOD, DBX, firmware.EMPTY_DBX * 2)
    assert told(twice) == ["dbx changed: 1 entry added: program e3b0c44298fc1c14…"]


def test_a_firmware_update_is_seen() -> None:
    before, now = ([measured(0, 8, version), *GOOD] for version in (b"1", b"2"))
    assert drift.firmware_changed(before, now)
    assert not drift.firmware_changed(before, before)
    odd = [measured(0, 8, b"1"), unmeasured(b"StartupLocality\0\3")]
    assert drift.firmware_changed(before, odd)


@given(st.lists(some_events, max_size=6), st.lists(some_events, max_size=6))
def test_whatever_two_logs_say_is_shown_plainly(before: list[Event], now: list[Event]) -> None:
    seven = [[event._replace(pcr=init.Pcr(7)) for event in events] for events in (before, now)]
    found = drift.compare(*seven)
    assert bool(found) == (eventlog.replay(seven[0], init.Pcr(7)) != eventlog.replay(seven[1], init.Pcr(7)))
    for each in found:
        assert all(word.isprintable() for word in each)
        assert len(each.what) < 2000


@given(st.binary(max_size=120))
def test_no_list_and_no_certificate_do_more_than_be_refused(data: bytes) -> None:
    for content in (data, hashes(b"a") + data, lists(TRUSTED.pk)[:28] + data):
        assert all(each.what.isprintable() for each in drift.compare(GOOD, swap(GOOD, DB, content)))
    assert isinstance(drift.common_name(data), str)


@given(st.data())
def test_a_spoiled_certificate_has_a_name_or_none(data: st.DataObject) -> None:
    der = bytearray(TRUSTED.pk.public_bytes(Encoding.DER))
    for _ in range(data.draw(st.integers(1, 4))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    assert isinstance(drift.common_name(bytes(der)), str)


def test_common_names_are_those_that_the_library_reads(keyset: keys.Keyset) -> None:
    for role in ("PK", "KEK", "uki", "layer", "sudi-ca", "product"):
        certificate = keyset.certificate(role)
        (wanted,) = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        assert drift.common_name(certificate.public_bytes(Encoding.DER)) == wanted.value
    assert drift.common_name(b"") == drift.common_name(b"\x30\x84\xff\xff\xff\xff") == ""


def test_a_log_with_many_entries_does_not_take_long() -> None:
    """A hostile log is read at each call: what grows with the square of its size would stand still."""
    many = struct.pack("<16sIII", bytes(16), 28 + 17 * 3700, 0, 17)
    contents = [
        many + b"".join(owner.to_bytes(16, "big") + b"x" for owner in range(start, start + 3700))
        for start in (0, 9999)
    ]
    found = drift.compare(*(swap(GOOD, DBX, content) for content in contents))
    assert [each.event for each in found] == ["dbx"] * len(found)


def test_other_owner_of_one_db_entry_changes_what_verifies(host: Host) -> None:
    moved = replace(TRUSTED, db=TRUSTED.db)
    content = lists(moved.db[0])[:28] + OTHER_OWNER + lists(moved.db[0])[44:] + lists(moved.db[1])
    entry = OTHER_OWNER + moved.db[0].public_bytes(Encoding.DER)
    now = [*swap(GOOD, DB, content)[:-1], variable_event(DB, entry, EV_AUTHORITY)]
    first, second = told(now)
    assert first == "db has the same entries, under another owner"
    assert "owner 00000000-0000-0000-0000-000000000007, before by" in second
