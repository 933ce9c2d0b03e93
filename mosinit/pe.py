"""PE files: their sections, and every one of them that is hidden in a file, a disk image or another PE.

Only what is needed to see what a firmware would start; the format is in Microsoft's "PE Format".
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

_DOS_HEADER = 0x40
_COFF = struct.Struct("<4sHHIIIHH")
assert _COFF.size == 24
_SECTION = struct.Struct("<8sIIII16x")
assert _SECTION.size == 40
_MAGICS = {0x10B: 96, 0x20B: 112}  # optional header: PE32, PE32+; where its data directories begin
_START = re.compile(rb"MZ")
_CERTIFICATES = 4  # index of the certificate table among the data directories


class Bytes(Protocol):
    """What is searched: bytes, or a mapped file."""

    def __len__(self) -> int: ...
    def __getitem__(self, where: slice, /) -> bytes: ...


@dataclass(frozen=True)
class Section:
    """One section: where its content lies in the PE file, in bytes, and how many it has once loaded.

    What lies in the file is `size`; if `memory` is more, zeros follow.
    """

    name: str
    offset: int
    size: int
    memory: int


@dataclass(frozen=True)
class Image:
    """A PE file within other data: its offset there, and its size, which is 0 when nothing signs it."""

    offset: int
    sections: tuple[Section, ...]
    signed_size: int

    @property
    def names(self) -> frozenset[str]:
        """Names of the sections."""
        return frozenset(section.name for section in self.sections)

    def section(self, data: Bytes, name: str) -> bytes:
        """Return a section's content, empty if there is none. Raises ValueError if there are several."""
        found = [section for section in self.sections if section.name == name]
        if len(found) > 1:
            raise ValueError(f"{len(found)} sections {name}")
        start = self.offset + found[0].offset if found else 0
        return bytes(data[start : start + found[0].size]) if found else b""


def parse(data: Bytes, offset: int = 0) -> Image:
    """Read the headers of the PE file at `offset`. Raises ValueError if there is none."""
    dos = data[offset : offset + _DOS_HEADER]
    if len(dos) < _DOS_HEADER or dos[:2] != b"MZ":
        raise ValueError("no PE file")
    header = offset + int(struct.unpack_from("<I", dos, 0x3C)[0])
    raw = data[header : header + _COFF.size]
    if len(raw) < _COFF.size or raw[:4] != b"PE\0\0":
        raise ValueError("no PE file")
    _, _, count, _, _, _, optional, _ = _COFF.unpack(raw)
    options = data[header + _COFF.size : header + _COFF.size + optional]
    if len(options) < 2 or struct.unpack_from("<H", options)[0] not in _MAGICS:
        raise ValueError("no PE file")
    table = header + _COFF.size + optional
    sections = [_section(data[table + 40 * i : table + 40 * (i + 1)]) for i in range(count)]
    return Image(offset, tuple(sections), _signed_size(options))


def _section(raw: bytes) -> Section:
    if len(raw) < _SECTION.size:
        raise ValueError("a PE file is cut short")
    name, virtual, _, size, offset = _SECTION.unpack(raw)
    return Section(name.rstrip(b"\0").decode(errors="replace"), offset, min(virtual, size) or size, virtual)


def _signed_size(options: bytes) -> int:
    """Return the size of a PE file up to the end of its signatures, its last part; 0 without any."""
    directories = _MAGICS[struct.unpack_from("<H", options)[0]]
    place = directories + 8 * _CERTIFICATES
    if len(options) < place + 8:
        return 0
    start, size = struct.unpack_from("<II", options, place)
    return int(start + size) if start and size else 0


def find(data: Bytes) -> Iterator[Image]:
    """Find every PE file in `data`, those inside other PE files included."""
    for hit in _START.finditer(data):  # type: ignore[call-overload]  # mmap is a buffer
        try:
            yield parse(data, hit.start())
        except ValueError:
            continue
