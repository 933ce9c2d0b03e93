"""What lies on a disk, for whoever decides whether it may be lost: partitions, file systems, members.

Nothing is written. Whatever a disk says of itself may be meant to deceive: only its printable part is kept.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mosinit import init
from mosinit.host import Failure, Host

TEXT = 80  # characters that are kept of a label or a type
SECONDS = 60.0
# UEFI specification 5.3.3, the Discoverable Partitions Specification, and Microsoft's.
KINDS = {
    init.ESP_TYPE: "EFI system",
    init.CONFIG_TYPE: "machine-config",
    init.STORE_TYPE: "machine-store",
    init.SCRATCH_TYPE: "machine-scratch",
    init.LINUX_TYPE: "Linux",
    "21686148-6449-6e6f-744e-656564454649": "BIOS boot",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "Microsoft reserved",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "Windows data",
    "de94bba4-06d1-4d40-a16a-bfd50179d6ac": "Windows recovery",
    "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3": "Windows LDM metadata",
    "af9b60a0-1431-4f62-bc68-3311714a69ad": "Windows LDM data",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap",
    "a19d880f-05fc-4d3b-a006-743f0f84911e": "Linux RAID",
    "e6d6d379-f507-44c2-a23c-238f2a3df928": "Linux LVM",
    "ca7d7ccb-63ed-4c53-861c-1742536059cc": "Linux LUKS",
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "Linux root",
    "933ac7e1-2eb4-4f13-b844-0e14e2aef915": "Linux home",
    "6a898cc3-1dd2-11b2-99a6-080020736631": "ZFS",
    "e75caf8f-f680-4cee-afa3-b001e56efc2d": "Windows storage spaces",
    "aa31e02a-400f-11db-9590-000c2911d1b8": "VMFS",
    "4fbd7e29-9d25-41b8-afd0-062c0ceff05d": "Ceph",
    "52414944-0000-11aa-aa11-00306543ecac": "Apple RAID",
    # Partition tables of MS-DOS.
    "5": "extended", "f": "extended", "7": "Windows data", "b": "FAT", "c": "FAT", "e": "FAT",
    "ef": "EFI system", "82": "Linux swap", "83": "Linux", "8e": "Linux LVM", "ee": "GPT",
    "fd": "Linux RAID", "42": "Windows LDM", "fb": "VMFS",
}  # fmt: skip
EXTENDED = ("5", "f", "85")
# libblkid calls some of what belongs to other disks too a file system, or something else.
MEMBER_KINDS = {
    "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3", "af9b60a0-1431-4f62-bc68-3311714a69ad",
    "a19d880f-05fc-4d3b-a006-743f0f84911e", "e6d6d379-f507-44c2-a23c-238f2a3df928",
    "ca7d7ccb-63ed-4c53-861c-1742536059cc", "6a898cc3-1dd2-11b2-99a6-080020736631", "8e", "fd",
    "e75caf8f-f680-4cee-afa3-b001e56efc2d", "aa31e02a-400f-11db-9590-000c2911d1b8",
    "4fbd7e29-9d25-41b8-afd0-062c0ceff05d", "52414944-0000-11aa-aa11-00306543ecac", "42", "fb",
}  # fmt: skip
MEMBERS = ("bcache", "ceph_bluestore", "drbd", "stratis", "vmfs")
# libblkid/blkid.h: BLKID_SUBLKS_LABEL, TYPE, USAGE, MAGIC, BADCSUM: what is damaged counts too.
FLAGS = 1 << 1 | 1 << 5 | 1 << 7 | 1 << 9 | 1 << 10
MOST = 16  # signatures of one place
MOST_ENTRIES = 1024  # of a GPT, which may announce any number; usual are 128
# UEFI specification 5.3.2: magic, where the other copy is, how many entries, bytes of each.
_GPT = struct.Struct("<8s24xQ40xII")
BTRFS_DEVICES = (64 << 10) + 0x88  # btrfs_super_block.num_devices: on how many devices it lies
OURS = (init.CONFIG_TYPE, init.STORE_TYPE, init.SCRATCH_TYPE)


@dataclass(frozen=True)
class Row:
    """A partition of a disk; or, with the number 0, what the disk as a whole is said to be."""

    number: int
    size: int  # bytes
    kind: str  # the type of the partition, in words if it is known
    holds: str = ""  # a file system, or what it is a member of; empty if there is nothing known
    label: str = ""
    member: bool = False  # encrypted, or part of what may lie on other disks too

    def __str__(self) -> str:
        """Say it in one line."""
        name = f"partition {self.number}" if self.number else "the whole disk"
        what = self.holds or self.kind or "unknown"
        label = f" {self.label!r}" if self.label else ""
        return f"{name}, {self.size >> 20} MiB: {what}{label}"


def printable(text: object) -> str:
    """Return the part of a text that moves no cursor, and not too much of it."""
    return " ".join("".join(c for c in str(text) if c.isprintable()).split())[:TEXT]


def rows(host: Host, path: Path, size: int, sector: int) -> tuple[Row, ...]:
    """Return what lies on a disk: signatures of the disk as a whole first, then its partitions.

    Raises `Failure` where it says that it has more partitions than anybody has looked at.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check_entries(path, fd, size, sector)
        whole = [
            Row(0, size, "", kind, label, is_member(kind, usage))
            for kind, usage, label in signatures(fd, 0, size)
        ]
        parts = list(_partitions(host, path, fd, size, sector))
    finally:
        os.close(fd)
    kinds = [kind for _, kind in parts]
    ours = all(kinds.count(kind) == 1 for kind in OURS)
    found = [_foreign(row, ours=ours and kind in (*OURS, init.LINUX_TYPE)) for row, kind in parts]
    return (*whole, *found)


def _check_entries(path: Path, fd: int, size: int, sector: int) -> None:
    """Raise `Failure` for a table that would take memory and time without end: sfdisk reads all that one
    announces.
    """
    first = os.pread(fd, _GPT.size, sector)
    other = _GPT.unpack(first)[1] if len(first) == _GPT.size else 0
    for block in (1, size // sector - 1, other):
        header = os.pread(fd, _GPT.size, block * sector) if block < size // sector else b""
        if len(header) < _GPT.size:
            continue
        magic, _, count, each = _GPT.unpack(header)
        if magic == b"EFI PART" and (count > MOST_ENTRIES or count * each > MOST_ENTRIES * 128):
            raise Failure(
                f"{path} has a table of {count} partitions of {each} bytes each, too much to look at: name "
                "another disk"
            )


def _foreign(row: Row, *, ours: bool) -> Row:
    """Leave encrypted volumes of a machine that mosinit installed out of the members."""
    member = row.member and not (ours and row.holds == "crypto_LUKS")
    return Row(row.number, row.size, row.kind, row.holds, row.label, member)


def _partitions(host: Host, path: Path, fd: int, size: int, sector: int) -> Iterator[tuple[Row, str]]:
    """Yield each partition, by whatever kind of table, and its type as it lies there."""
    try:
        table = json.loads(host.run(["sfdisk", "--json", path], timeout=SECONDS))["partitiontable"]
        listed = [
            (int(re.findall(r"[0-9]+$", part["node"])[0]), int(part["start"]), int(part["size"]),
             str(part["type"]).lower(), str(part.get("name", "")))
            for part in table.get("partitions", [])
        ]  # fmt: skip
    except (Failure, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return
    for number, start, count, kind, name in listed:
        # A table may be that of a larger disk: what lies behind the end is nowhere.
        there = min(count * sector, size - start * sector)
        found = [] if kind in EXTENDED or there <= 0 else signatures(fd, start * sector, there)
        holds = ", ".join(each for each, _, _ in found)
        label = next((text for _, _, text in found if text), printable(name))
        member = kind in MEMBER_KINDS or any(is_member(each, usage) for each, usage, _ in found)
        yield Row(number, count * sector, KINDS.get(kind) or printable(kind), holds, label, member), kind


def signatures(fd: int, start: int, size: int) -> list[tuple[str, str, str]]:
    """Return type, usage and label of everything that a part of a disk is said to be.

    blkid(8) tells nothing of what says to be two things; who asks libblkid for one after the other, as
    wipefs(8) does, learns all.
    """
    library = ctypes.CDLL("libblkid.so.1")
    library.blkid_new_probe.restype = ctypes.c_void_p
    probe = ctypes.c_void_p(library.blkid_new_probe())
    found: list[tuple[str, str, str]] = []
    try:
        offsets = ctypes.c_int64(start), ctypes.c_int64(size)
        if not probe or library.blkid_probe_set_device(probe, fd, *offsets):
            raise OSError(errno.EIO, "cannot be looked at")
        library.blkid_probe_enable_superblocks(probe, 1)
        library.blkid_probe_set_superblocks_flags(probe, FLAGS)
        while len(found) < MOST and library.blkid_do_probe(probe) == 0:
            kind, usage, label = (_value(library, probe, name) for name in (b"TYPE", b"USAGE", b"LABEL"))
            if kind == "btrfs" and os.pread(fd, 8, start + BTRFS_DEVICES) != (1).to_bytes(8, "little"):
                usage = "raid"
            if kind not in {each for each, _, _ in found}:
                found.append((kind, usage, label))
    finally:
        library.blkid_free_probe(probe)
    return found


def _value(library: ctypes.CDLL, probe: ctypes.c_void_p, name: bytes) -> str:
    data, size = ctypes.c_char_p(), ctypes.c_size_t()
    if library.blkid_probe_lookup_value(probe, name, ctypes.byref(data), ctypes.byref(size)):
        return ""
    return printable((data.value or b"").decode(errors="replace"))


def is_member(kind: str, usage: str) -> bool:
    """Say whether losing this may lose more than what lies here, or what somebody locked on purpose."""
    return usage in ("raid", "crypto") or kind.endswith("_member") or kind.lower().startswith(MEMBERS)
