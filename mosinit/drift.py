"""What of PCR 7 differs between two event logs, event by event and in words: between the last good boot and
this one, or between this one and what is approved in advance.

Both logs are untrusted, and what is found serves a person. Nothing but Python is needed here.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mosinit import eventlog, init
from mosinit.eventlog import DB, DBX, EV_ACTION, EV_AUTHORITY, EV_SEPARATOR, EV_VARIABLE, KEK, PK, Event

SHA256_GUID = "c1c41626-504c-4092-aca9-41f936934328"  # UEFI 2.10, 32.4.1: EFI_CERT_SHA256_GUID
SHOWN = 6  # entries of a variable that are named one by one
WORDS = 120  # characters of anything that a log says

_UNDO = "undo it in the firmware's setup"
_ADVANCE = "let the organisation approve it (`mosinit approve`), and lay that by `mosinit recover --reseal`"
_SETUP = {
    "SecureBoot": "switch Secure Boot on in the firmware's setup",
    "AuditMode": "leave audit mode in the firmware's setup",
}


class Difference(NamedTuple):
    """One event that differs: which, in what way, and what to do about it."""

    event: str
    what: str
    remedy: str


class Entry(NamedTuple):
    """An entry of a signature database: the type and owner (GUIDs), and what it is of."""

    kind: str
    owner: str
    data: bytes


def compare(before: Sequence[Event], now: Sequence[Event]) -> list[Difference]:
    """Return what PCR 7 has of `now` that it had not of `before`, in the order of the events; nothing if the
    two give the same value.
    """
    old, new = ([event for event in events if _counts(event)] for events in (before, now))
    if eventlog.replay(old, eventlog.PLATFORM) == eventlog.replay(new, eventlog.PLATFORM):
        return []
    found = [*_false_words(new), *_variables(old, new), *_authorities(old, new), *_others(old, new)]
    if not found:
        order = "the firmware measured the same, in another order or another number of times"
        found = [Difference("PCR 7", order, _ADVANCE)]
    return found


def _counts(event: Event) -> bool:
    return event.pcr == eventlog.PLATFORM and event.kind != eventlog.EV_NO_ACTION


def _false_words(new: Sequence[Event]) -> Iterator[Difference]:
    for event in new:
        if hashlib.sha256(event.data).digest() != event.digest:
            what = "the log says another thing than the firmware measured"
            yield Difference(_shown(eventlog.name(event)), what, "do not believe this log")


# --- Variables ---------------------------------------------------------------------------------------


def _variables(old: Sequence[Event], new: Sequence[Event]) -> Iterator[Difference]:
    """Compare the variables that the firmware measures before it starts anything."""
    before, now = ({v.name: v.content for v in _parsed(events, EV_VARIABLE)} for events in (old, new))
    for full in dict.fromkeys([*now, *before]):
        name = _shown(full[1])
        if before.get(full) == now.get(full):
            continue
        if full not in now:
            yield Difference(name, f"{name} is not measured any more", _ADVANCE)
        elif full not in before:
            yield Difference(name, f"{name} is measured now, and was not before", _ADVANCE)
        elif full in (PK, KEK, DB, DBX):
            for what in _entries_changed(name, before[full], now[full]):
                yield Difference(name, what, f"{_UNDO}, or {_ADVANCE}")
        else:
            yield _switched(name, before[full], now[full])


def _parsed(events: Sequence[Event], kind: int) -> Iterator[eventlog.Variable]:
    for event in events:
        if event.kind == kind:
            try:
                yield eventlog.parse_variable(event.data)
            except ValueError:
                # Told by `_others`, which compares what is no variable as it is.
                continue


def _switched(name: str, before: bytes, now: bytes) -> Difference:
    """Tell of a variable that is a switch."""
    words = {b"\0": "off", b"\1": "on", b"": "empty"}
    states = [words.get(value, value.hex()[:WORDS]) for value in (before, now)]
    called = "Secure Boot" if name == "SecureBoot" else name
    what = f"{called} was switched {states[1]}" if states in (["on", "off"], ["off", "on"]) else ""
    remedy = _SETUP.get(name, f"{_UNDO}, or {_ADVANCE}")
    return Difference(name, what or f"{called} changed from {states[0]} to {states[1]}", remedy)


def _entries_changed(name: str, before: bytes, now: bytes) -> Iterator[str]:
    """Say what changed in a database of certificates and hashes."""
    try:
        old, new = Counter(parse_entries(before)), Counter(parse_entries(now))
    except ValueError as error:
        yield f"{name} changed, and cannot be read: {error}"
        return
    came, went = list((new - old).elements()), list((old - new).elements())
    if came and Counter((each.kind, each.data) for each in came) == Counter((e.kind, e.data) for e in went):
        yield f"{name} has the same entries, under another owner"
        return
    for entries, word in ((came, "added"), (went, "removed")):
        if entries:
            yield f"{name} changed: {len(entries)} {'entry' if len(entries) == 1 else 'entries'} {word}" + (
                f": {', '.join(describe(each) for each in entries[:SHOWN])}"
                f"{' and more' if len(entries) > SHOWN else ''}"
            )
    if not came and not went:
        yield f"{name} has the same entries, in another order or in other lists"


_LIST = struct.Struct("<16sIII")  # UEFI 2.10, 32.4.1, EFI_SIGNATURE_LIST


def parse_entries(data: bytes) -> tuple[Entry, ...]:
    """Return the entries of a signature database; ValueError for what the bring-up does not take either."""
    init.parse_signature_database(data)
    found: list[Entry] = []
    while data:
        kind, size, _, each = _LIST.unpack_from(data)
        for start in range(_LIST.size, size, each):
            entry = data[start : start + each]
            found.append(Entry(init.format_guid(kind), init.format_guid(entry), entry[16:]))
        data = data[size:]
    return tuple(found)


def describe(entry: Entry) -> str:
    """Name an entry: a certificate by its subject's common name, others by their digest."""
    if entry.kind == init.EFI_CERT_X509:
        digest = hashlib.sha256(entry.data).hexdigest()
        return f"certificate {_shown(common_name(entry.data) or 'without a name')} ({digest[:16]}…)"
    if entry.kind == SHA256_GUID:
        return f"program {entry.data.hex()[:16]}…"
    return f"{entry.kind} {hashlib.sha256(entry.data).hexdigest()[:16]}…"


# --- What was started, and all else ------------------------------------------------------------------


def _authorities(old: Sequence[Event], new: Sequence[Event]) -> Iterator[Difference]:
    """Compare by what the firmware verified the programs that it started."""
    before, now = (dict.fromkeys(_parsed(events, EV_AUTHORITY)) for events in (old, new))
    came = [each for each in now if each not in before]
    went = [each for each in before if each not in now]
    remedy = f"start what this organisation signed, by the loader of its disk; or {_ADVANCE}"
    if came and went:
        what = f"the boot loader was verified by {_verifier(came[0])}, before by {_verifier(went[0])}"
        yield Difference("authority", what, remedy)
        came, went = came[1:], went[1:]
    for each in came:
        yield Difference("authority", f"something more was started, verified by {_verifier(each)}", remedy)
    for each in went:
        yield Difference("authority", f"nothing was started that is verified by {_verifier(each)}", remedy)


def _verifier(variable: eventlog.Variable) -> str:
    """Name the entry of a database by which a program was verified."""
    name = _shown(variable.name[1])
    if len(variable.content) <= 16 or variable.name != DB:
        return f"an entry of {name}"
    # What verified is no list: owner and entry. Only a certificate begins as DER does.
    kind = init.EFI_CERT_X509 if variable.content[16:17] == b"\x30" else SHA256_GUID
    entry = Entry(kind, init.format_guid(variable.content), variable.content[16:])
    return f"the entry of {name}: {describe(entry)}, owner {entry.owner}"


def _others(old: Sequence[Event], new: Sequence[Event]) -> Iterator[Difference]:
    """Compare separators, actions, and whatever is none of the kinds that we know."""
    before, now = (Counter(event for event in events if not _is_variable(event)) for events in (old, new))
    came, gone = now - before, before - now
    errors = [[event for event in events if _is_error(event)] for events in (came, gone)]
    for event in errors[0]:
        what = f"a separator says that the firmware met an error ({event.data.hex()[:WORDS]})"
        yield Difference("separator", what, "switch the machine off and on; mend its firmware")
    for _ in errors[1]:
        yield Difference("separator", "a separator says of an error no more", _ADVANCE)
    for events, word in ((came, "new"), (gone, "gone")):
        for event in events:
            # Where an error was met, it stands in the place of the usual separator.
            if event.kind != EV_SEPARATOR or not (errors[0] or errors[1]):
                yield _other(event, word)


def _is_error(event: Event) -> bool:
    return event.kind == EV_SEPARATOR and event.data != eventlog.SEPARATOR


def _other(event: Event, word: str) -> Difference:
    if event.kind == EV_SEPARATOR:
        return Difference("separator", f"a separator is {word}", _ADVANCE)
    remedy = f"{_UNDO}, or {_ADVANCE}"
    if event.kind == EV_ACTION:
        said = _shown(event.data.decode("ascii", "replace").rstrip("\0"))
        what = "the firmware says" if word == "new" else "the firmware says no more"
        return Difference("action", f"{what}: {said}", remedy)
    kind = _shown(eventlog.name(event))
    return Difference(kind, f"an event is {word}: {kind}", remedy)


def _is_variable(event: Event) -> bool:
    if event.kind not in (EV_VARIABLE, EV_AUTHORITY):
        return False
    return bool([*_parsed([event], event.kind)])


def firmware_changed(before: Sequence[Event], now: Sequence[Event]) -> bool:
    """Say whether the firmware's own code is another (PCR 0): then it was updated."""
    return _replayed(before, init.Pcr(0)) != _replayed(now, init.Pcr(0))


def _replayed(events: Sequence[Event], pcr: init.Pcr) -> bytes | None:
    try:
        return eventlog.replay(events, pcr)
    except ValueError:
        return None


def _shown(words: str) -> str:
    """Return what a log says without what could move a terminal's cursor, and not all of it."""
    return "".join(c if c.isprintable() else "?" for c in words)[:WORDS]


# --- The name of a certificate, without a library ----------------------------------------------------

_COMMON_NAME = bytes.fromhex("0603550403")  # X.520: id-at-commonName, 2.5.4.3, as a DER element


def common_name(certificate: bytes) -> str:
    """Return the common name of a certificate's subject (RFC 5280, 4.1); empty if it has none, or is no
    certificate: this serves a person, nobody decides by it.
    """
    try:
        _, body, _ = _element(certificate, 0)
        _, fields, _ = _element(body, 0)
        at, parts = 0, list[tuple[int, bytes]]()
        while at < len(fields) and len(parts) < 8:
            tag, content, at = _element(fields, at)
            parts.append((tag, content))
        # [0] version, where there is one; serial, signature, issuer, validity, subject.
        subject = parts[5 if parts[0][0] == 0xA0 else 4][1]
        place = subject.rfind(_COMMON_NAME)
        if place < 0:
            return ""
        tag, content, _ = _element(subject, place + len(_COMMON_NAME))
        return content.decode("utf-16-be" if tag == 0x1E else "utf-8", "replace")
    except (ValueError, IndexError):
        return ""


def _element(data: bytes, at: int) -> tuple[int, bytes, int]:
    """Return tag and content of the DER element at a place, and where the next begins (X.690, 8.1)."""
    tag, first = data[at], data[at + 1]
    count = first & 0x7F if first & 0x80 else 0
    begin = at + 2 + count
    size = int.from_bytes(data[at + 2 : begin], "big") if count else first
    if count > 3 or begin + size > len(data):
        raise ValueError("no DER element")
    return tag, data[begin : begin + size], begin + size
