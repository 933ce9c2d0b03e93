"""Objects of a git pack, read with bounds: whoever was root on the machine may have written it, and a few
bytes of a pack can stand for gigabytes. Git itself never sees one of those packs.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mosinit import init

KINDS = {1: "commit", 2: "tree", 3: "blob", 4: "tag"}  # gitformat-pack(5)
OFFSET_DELTA, NAME_DELTA = 6, 7
OBJECT_BYTES = init.MIB  # of one object: what the bring-up reads
DEPTH = 64  # of deltas upon deltas; git makes 50
_CHUNK = 4096


@dataclass
class Budget:
    """What all packs together may still have: objects, and bytes once inflated."""

    objects: int = 20_000
    size: int = 64 * init.MIB

    def take(self, size: int, objects: int = 0) -> None:
        """Take from it. Raises ValueError if there is not so much left."""
        self.objects -= objects
        self.size -= size
        if self.objects < 0 or self.size < 0:
            raise ValueError("more than a manifest.git has")


class _Entry(NamedTuple):
    """An entry of a pack: an object, or a delta to the one at a place or of a name."""

    place: int
    kind: int
    base: int | str | None
    data: bytes


def read(untrusted: bytes, budget: Budget) -> Iterator[tuple[str, bytes]]:
    """Yield the objects of a pack, name and content with its head, up to the first that is damaged or goes
    beyond the budget.
    """
    entries: list[_Entry] = []
    with contextlib.suppress(ValueError, IndexError, struct.error, zlib.error):
        for entry in _entries(untrusted, budget):
            entries.append(entry)  # noqa: PERF402 - those before a damaged one count
    with contextlib.suppress(ValueError):
        yield from _resolved(entries, budget)


def _entries(untrusted: bytes, budget: Budget) -> Iterator[_Entry]:
    """Yield what is whole of a pack."""
    magic, version, count = struct.unpack_from(">4sII", untrusted)
    if magic != b"PACK" or version not in (2, 3):
        raise ValueError("no pack")
    at = 12
    for _ in range(count):
        place, (kind, size, at) = at, _head(untrusted, at)
        base: int | str | None = None
        if kind == OFFSET_DELTA:
            distance, at = _distance(untrusted, at)
            base = place - distance
        elif kind == NAME_DELTA:
            base, at = untrusted[at : at + 20].hex(), at + 20
        elif kind not in KINDS:
            raise ValueError("an entry of no kind that there is")
        if size > OBJECT_BYTES:
            raise ValueError("an object that is too large")
        budget.take(size, 1)
        data, at = _inflated(untrusted, at, size)
        yield _Entry(place, kind, base, data)


def _head(data: bytes, at: int) -> tuple[int, int, int]:
    """Return kind and size of an entry, and where its rest begins."""
    byte, shift = data[at], 4
    kind, size = byte >> 4 & 7, byte & 15
    while byte & 0x80 and shift < 32:
        at += 1
        byte = data[at]
        size |= (byte & 0x7F) << shift
        shift += 7
    return kind, size, at + 1


def _distance(data: bytes, at: int) -> tuple[int, int]:
    """Return how far before an entry its base lies, and where the rest begins."""
    byte = data[at]
    value, end = byte & 0x7F, at + 5
    while byte & 0x80 and at < end:
        at += 1
        byte = data[at]
        value = (value + 1) << 7 | byte & 0x7F
    return value, at + 1


def _inflated(data: bytes, at: int, size: int) -> tuple[bytes, int]:
    """Return so many bytes out of a stream, and where that ends."""
    stream, out = zlib.decompressobj(), b""
    while not stream.eof:
        chunk = data[at : at + _CHUNK]
        out += stream.decompress(chunk, size + 1 - len(out))
        if not chunk or len(out) > size:
            raise ValueError("an entry of another size")
        at += len(chunk) - len(stream.unused_data) - len(stream.unconsumed_tail)
    if len(out) != size:
        raise ValueError("an entry of another size")
    return out, at


# --- Deltas ----------------------------------------------------------------------------------------------


def _resolved(entries: list[_Entry], budget: Budget) -> Iterator[tuple[str, bytes]]:
    """Yield the objects that entries are of; a base may come behind what is made of it."""
    places: dict[int | str, tuple[str, bytes]] = {}
    for _ in range(DEPTH):
        waiting = []
        for entry in entries:
            with contextlib.suppress(ValueError, IndexError):
                made = _object(entry, places, budget)
                if made is None:
                    waiting.append(entry)
                    continue
                kind, content = made
                whole = f"{kind} {len(content)}".encode() + b"\0" + content
                name = hashlib.sha1(whole).hexdigest()
                places[entry.place] = places[name] = made
                yield name, whole
        if len(waiting) in (0, len(entries)):
            return
        entries = waiting


def _object(
    entry: _Entry, places: Mapping[int | str, tuple[str, bytes]], budget: Budget
) -> tuple[str, bytes] | None:
    """Return kind and content of an entry's object, None while its base is not known."""
    if entry.base is None:
        return KINDS[entry.kind], entry.data
    if entry.base not in places:
        return None
    kind, base = places[entry.base]
    return kind, _applied(base, entry.data, budget)


def _applied(base: bytes, delta: bytes, budget: Budget) -> bytes:
    """Return what a delta makes of its base. Raises ValueError, IndexError."""
    before, at = _size(delta, 0)
    after, at = _size(delta, at)
    if before != len(base) or after > OBJECT_BYTES:
        raise ValueError("a delta to something else, or to too much")
    budget.take(after)
    out = bytearray()
    while at < len(delta) and len(out) <= after:
        code, at = delta[at], at + 1
        if code & 0x80:
            numbers = [0] * 7
            for bit in range(7):
                if code >> bit & 1:
                    numbers[bit], at = delta[at], at + 1
            start, size = int.from_bytes(numbers[:4], "little"), int.from_bytes(numbers[4:], "little")
            out += base[start : start + (size or 0x10000)]
        else:
            out += delta[at : at + code]
            at += code
    if len(out) != after:
        raise ValueError("a delta that makes another size")
    return bytes(out)


def _size(data: bytes, at: int) -> tuple[int, int]:
    """Return a size as a delta has it, and where the rest begins."""
    value = 0
    for shift in range(0, 35, 7):
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            break
    return value, at
