"""The firmware's event log: what it says it measured, and what that makes of a PCR.

Who enrols a machine reads it, and who explains a boot; no boot does, so the bring-up has no parser for it.
It comes from whoever brings a request: everything is bounded. Nothing but Python is needed here.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Sequence
from typing import NamedTuple

from mosinit import init


class Event(NamedTuple):
    """One event of the firmware's log: its digest in the SHA-256 bank, and what it is said to be of."""

    pcr: init.Pcr
    kind: int
    digest: bytes
    data: bytes


EV_NO_ACTION, EVENT_LIMIT, EVENT_BYTES = 3, 4096, 64 * 1024  # the first: in the log alone, never extended

# TCG PC Client Platform Firmware Profile, 10.4.1
EV_SEPARATOR = 0x4
EV_VARIABLE = 0x80000001  # EV_EFI_VARIABLE_DRIVER_CONFIG
EV_ACTION = 0x80000007  # EV_EFI_ACTION
EV_AUTHORITY = 0x800000E0  # EV_EFI_VARIABLE_AUTHORITY
KINDS = {
    EV_NO_ACTION: "EV_NO_ACTION",
    EV_SEPARATOR: "EV_SEPARATOR",
    EV_VARIABLE: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    EV_ACTION: "EV_EFI_ACTION",
    EV_AUTHORITY: "EV_EFI_VARIABLE_AUTHORITY",
}
SEPARATOR = bytes(4)  # any other one says that the firmware met an error
PLATFORM = init.PLATFORM_STATE[0]  # PCR 7

SECURE_BOOT = (init.EFI_GLOBAL, "SecureBoot")
PK, KEK = (init.EFI_GLOBAL, "PK"), (init.EFI_GLOBAL, "KEK")
DB, DBX = (init.EFI_IMAGE_SECURITY, "db"), (init.EFI_IMAGE_SECURITY, "dbx")


def parse_event_log(untrusted: bytes) -> tuple[Event, ...]:
    """Parse a crypto-agile event log of up to 1 MiB (TCG PC Client PFP, 10.2, 10.4); ValueError for others.

    It proves nothing before `replay` gives what the TPM holds, nor `data` before its digest is compared.
    """
    at, events, sha256 = 0, list[Event](), init.TPM_ALGORITHMS["sha256"]

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        if size > EVENT_BYTES or at > min(len(untrusted), init.MIB):
            raise ValueError(f"an event log of {len(untrusted)} bytes cannot have {size} at {at - size}")
        return untrusted[at - size : at]

    def number(size: int = 4) -> int:
        return int.from_bytes(take(size), "little")

    head, end = take(28), number() + at
    if head != struct.pack("<II20x", 0, EV_NO_ACTION) or take(24)[:16] != b"Spec ID Event03\0":
        raise ValueError("an event log that is not crypto-agile")
    count = number()
    sizes = {number(2): number(2) for _ in range(min(count, 16))}
    take(number(1))  # the vendor's words
    if (at, len(sizes), sizes.get(sha256)) != (end, count, 32):
        raise ValueError("an event log of another head, or without SHA-256")
    while at < len(untrusted):
        pcr, kind, seen = init.Pcr(number()), number(), number()
        digests = {(name := number(2)): take(sizes.get(name, 0)) for _ in range(min(seen, count))}
        if seen != count or set(digests) != set(sizes) or len(events) == EVENT_LIMIT:
            raise ValueError(f"event {len(events)} has not one digest of each kind, or is one too many")
        events.append(Event(pcr, kind, digests[sha256], take(number())))
    return tuple(events)


def replay(events: Sequence[Event], pcr: init.Pcr) -> bytes:
    """Return what the log makes of a PCR, of PCR 0 with the locality that started the TPM."""
    value = bytes(32)
    for event in events:
        if event.pcr == pcr and event.kind != EV_NO_ACTION:
            value = hashlib.sha256(value + event.digest).digest()
        elif event.pcr == pcr == 0 and event.data[:16] == b"StartupLocality\0":
            if value != bytes(32) or len(event.data) != 17:
                raise ValueError("an event StartupLocality that comes late or has another size")
            value = bytes(31) + event.data[16:]
    return value


# --- What PCR 7 holds: variables of the firmware ------------------------------------------------------


class Variable(NamedTuple):
    """A variable of the firmware as PCR 7 has it: (vendor, name), and the content."""

    name: tuple[str, str]
    content: bytes


# UEFI_VARIABLE_DATA: vendor, characters of the name, bytes of the content; both follow.
_VARIABLE = struct.Struct("<16sQQ")
assert _VARIABLE.size == 32


def encode_variable(variable: Variable) -> bytes:
    """Encode what the firmware hashes of a variable (TCG PFP, 10.2.6)."""
    (vendor, name), content = variable
    head = _VARIABLE.pack(uuid.UUID(vendor).bytes_le, len(name), len(content))
    return head + name.encode("utf-16-le") + content


def parse_variable(data: bytes) -> Variable:
    """Parse what the firmware hashed of a variable; ValueError for anything else."""
    if len(data) < _VARIABLE.size:
        raise ValueError("a variable that is cut short")
    vendor, characters, size = _VARIABLE.unpack_from(data)
    start = _VARIABLE.size + 2 * characters
    if start + size != len(data):
        raise ValueError("a variable of another size")
    return Variable((init.format_guid(vendor), data[32:start].decode("utf-16-le")), data[start:])


def name(event: Event) -> str:
    """Name an event for people."""
    kind = KINDS.get(event.kind, f"kind {event.kind:#x}")
    try:
        return f"{kind} {parse_variable(event.data).name[1]!r}"
    except ValueError:
        return f"{kind} {event.data[:40]!r}"
