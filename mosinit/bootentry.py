"""The firmware's boot entry of an installed machine: `mosinit`, first in the firmware's order.

Written here and not by efibootmgr, whose only report of what exists is text for people: entries of earlier
installations would have to be found in that. UEFI specification 2.10: 3.1.3 load options, 10.3 device paths.
"""

from __future__ import annotations

import re
import struct
import uuid
from dataclasses import dataclass

from mosinit import init
from mosinit.host import Failure, Host

LABEL = "mosinit"
LOADER = "\\EFI\\systemd\\systemd-bootx64.efi"
ACTIVE = 1
GPT, BY_GUID = 2, 2
MAX_ENTRIES = 0x10000

_HEAD = struct.Struct("<IH")  # attributes, bytes of the device path
_HARD_DRIVE = struct.Struct("<BBHIQQ16sBB")  # 10.3.5.1
assert _HARD_DRIVE.size == 42
_FILE = struct.Struct("<BBH")  # 10.3.5.4, then the path
_END = b"\x7f\xff\x04\x00"
_NAME = re.compile(f"Boot([0-9A-F]{{4}})-{init.EFI_GLOBAL}")


@dataclass(frozen=True)
class Entry:
    """A boot loader of ours: the number of its partition, begin and size in sectors, the partition's id."""

    number: int
    start: int
    size: int
    uuid: str


def encode(entry: Entry) -> bytes:
    """Encode an EFI_LOAD_OPTION."""
    disk = _HARD_DRIVE.pack(
        4, 1, _HARD_DRIVE.size, entry.number, entry.start, entry.size, uuid.UUID(entry.uuid).bytes_le,
        GPT, BY_GUID,
    )  # fmt: skip
    path = disk + _file_node() + _END
    return _HEAD.pack(ACTIVE, len(path)) + _wide(LABEL) + path


def parse(data: bytes) -> Entry | None:
    """Return what an EFI_LOAD_OPTION starts if it is one that `encode` made, also a disabled one."""
    try:
        fields = _HARD_DRIVE.unpack_from(data, _HEAD.size + len(_wide(LABEL)))
    except struct.error:
        return None
    entry = Entry(fields[3], fields[4], fields[5], str(uuid.UUID(bytes_le=fields[6])))
    return entry if encode(entry)[4:] == data[4:] else None


def _file_node() -> bytes:
    name = _wide(LOADER)
    return _FILE.pack(4, 4, _FILE.size + len(name)) + name


def _wide(text: str) -> bytes:
    return f"{text}\0".encode("utf-16-le")


def register(host: Host, entry: Entry) -> str:
    """Make an entry the first one, in the place of one that an earlier installation made; return its name.

    A machine has one: others of ours lead to disks of earlier installations. Raises `Failure` or `OSError`
    if the firmware does not take it.
    """
    numbers = {int(found[1], 16) for found in map(_NAME.fullmatch, host.names(init.EFIVARS)) if found}
    ours = [number for number in sorted(numbers) if parse(_read(host, _name(number)))]
    number = next(n for n in (*ours, *range(MAX_ENTRIES)) if n in ours or n not in numbers)
    order = _read(host, "BootOrder")
    if len(order) % 2:
        raise Failure(f"BootOrder has {len(order)} bytes, which no list of entries has")
    others = [n for n in struct.unpack(f"<{len(order) // 2}H", order) if n not in (number, *ours)]
    _write(host, _name(number), encode(entry))
    _write(host, "BootOrder", struct.pack(f"<{1 + len(others)}H", number, *others))
    for stale in ours[1:]:
        _write(host, _name(stale), b"")
    return _name(number)


def _name(number: int) -> str:
    return f"Boot{number:04X}"


def _read(host: Host, name: str) -> bytes:
    return (host.efi_read(name, init.EFI_GLOBAL) or (0, b""))[1]


def _write(host: Host, name: str, value: bytes) -> None:
    """Write a variable unless it is like that already: the memory for them wears out."""
    if _read(host, name) == value:
        return
    host.efi_write(name, init.EFI_GLOBAL, value)
    if _read(host, name) != value:
        raise Failure(f"the firmware does not keep {name}")
