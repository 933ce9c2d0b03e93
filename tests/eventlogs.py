"""Event logs as a firmware would write them: the other side of `eventlog.parse_event_log`."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping

from mosinit import eventlog, init

SIZES = {"sha1": 20, "sha256": 32, "sha384": 48}


def measured(pcr: int, kind: int, data: bytes) -> eventlog.Event:
    """Return the event of data that are measured themselves."""
    return eventlog.Event(init.Pcr(pcr), kind, hashlib.sha256(data).digest(), data)


def unmeasured(data: bytes, pcr: int = 0) -> eventlog.Event:
    """Return an event that is in the log alone."""
    return eventlog.Event(init.Pcr(pcr), eventlog.EV_NO_ACTION, bytes(32), data)


def encode_head(banks: Mapping[str, int], vendor: bytes = b"", ident: bytes = b"Spec ID Event03\0") -> bytes:
    """Encode the first event: the specification's version, the banks and the size of their digests."""
    pairs = b"".join(struct.pack("<HH", init.TPM_ALGORITHMS[bank], size) for bank, size in banks.items())
    spec = ident + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(banks)) + pairs + bytes([len(vendor)]) + vendor
    return struct.pack("<II20xI", 0, eventlog.EV_NO_ACTION, len(spec)) + spec


def encode_event(event: eventlog.Event, banks: Iterable[str]) -> bytes:
    """Encode one event; only its SHA-256 digest means something."""
    head = struct.pack("<II", event.pcr, event.kind)
    digests = [
        struct.pack("<H", init.TPM_ALGORITHMS[bank])
        + (event.digest if bank == "sha256" else bytes(SIZES[bank]))
        for bank in banks
    ]
    body = struct.pack("<I", len(digests)) + b"".join(digests)
    return head + body + struct.pack("<I", len(event.data)) + event.data


def encode_log(events: Iterable[eventlog.Event], banks: Iterable[str] = ("sha1", "sha256")) -> bytes:
    """Encode a whole log."""
    sizes = {bank: SIZES[bank] for bank in banks}
    return encode_head(sizes) + b"".join(encode_event(event, sizes) for event in events)
