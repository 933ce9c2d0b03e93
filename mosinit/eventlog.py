"""The firmware's event log: what it says it measured, and what that makes of a PCR.

Who enrols a machine reads it; no boot does, so the bring-up has no parser for it. It comes from whoever
brings a request: everything is bounded.
"""

from __future__ import annotations

import hashlib
import struct
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
