"""The EFI system partition of a machine: looked at, and made anew where something is wrong with it.

Firmware checks what it starts, so nothing here is a matter of trust: the boot loader comes from the medium,
whose store is sealed, and UKIs come from the machine's store by digest.
"""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mosinit import init, lastgood
from mosinit.generations import Elsewhere
from mosinit.host import Failure, Host
from mosinit.sources import Blob, read_checked

FOLDER = "EFI/Linux"
LOADER = "EFI/systemd/systemd-bootx64.efi"
# What firmware starts by itself, and what that is called before: short names, each one entry of a folder.
STARTED, NOT_YET = "EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/BOOTX64.NEW"
# No menu unless a key is held, no other systems, no keys to enrol.
LOADER_CONF = b"timeout 0\neditor no\nauto-entries no\nauto-firmware no\nsecure-boot-enroll off\n"
TRIES = 3
# What systemd-boot(7) and systemd-stub(7) take from there besides, and mosinit never lays there.
TAKEN = ("loader/entries", "loader/keys", "loader/addons", "loader/credentials", "EFI/systemd/drivers")


@dataclass(frozen=True)
class Entry:
    """What must lie there for one generation."""

    sequence: int
    uki: Blob
    good: bool = False  # it has started well: no tries are counted

    @property
    def place(self) -> str:
        """Return where it is laid."""
        return f"{FOLDER}/mosinit_{self.sequence}.efi" if self.good else uki_place(self.sequence)


def uki_place(sequence: int) -> str:
    """Return where the UKI of a generation lies while it has all its tries."""
    return f"{FOLDER}/mosinit_{sequence}+{TRIES}.efi"


def look(host: Host, device: Path, entries: Sequence[Entry], loader: bytes) -> str:
    """Say what is wrong with an EFI system partition, nothing if a machine starts from it."""
    try:
        host.run(["fsck.vfat", "-n", device], timeout=120)
        with host.mounted(device, "vfat", read_only=True) as folder:
            faults = (_entry_fault(folder, entry) for entry in entries)
            return (
                next((fault for fault in faults if fault), "")
                or _loader_fault(folder, loader)
                or _foreign_fault(folder, entries)
            )
    except (Failure, OSError) as error:
        return f"no FAT that could be used ({str(error)[:200]})"


def _entry_fault(folder: Path, entry: Entry) -> str:
    name = re.compile(rf"mosinit_{entry.sequence}(\+[0-9]+(-[0-9]+)?)?\.efi", re.IGNORECASE)
    try:
        found = [each for each in sorted(os.listdir(folder / FOLDER)) if name.fullmatch(each)]
        if len(found) != 1:
            return f"{len(found)} UKIs of sequence {entry.sequence}"
        for _ in read_checked(str(folder / FOLDER / found[0]), entry.uki):
            pass
    except (OSError, init.Refused):
        return f"the UKI of sequence {entry.sequence} is missing or damaged"
    return ""


def _loader_fault(folder: Path, loader: bytes) -> str:
    for name in (LOADER, STARTED):
        if not holds(folder / name, loader):
            return f"{name} is not the boot loader of the medium"
    if not holds(folder / "loader/loader.conf", LOADER_CONF):
        return "loader/loader.conf is another"
    return ""


def holds(path: Path, content: bytes) -> bool:
    """Say whether a file is exactly that. One of another size is not read: it may be larger than memory."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != len(content):
        return False
    return hmac.compare_digest(path.read_bytes(), content)


def _foreign_fault(folder: Path, entries: Sequence[Entry]) -> str:
    """Say what else boot loader or boot stub would take: it would start before the machine's UKI, or have it
    refused.
    """
    newest = max((entry.sequence for entry in entries), default=10**20)
    for name in sorted(os.listdir(folder / FOLDER)) if (folder / FOLDER).is_dir() else []:
        ours = re.fullmatch(r"mosinit_([0-9]{1,20})(\+[0-9]+(-[0-9]+)?)?\.efi", name, re.IGNORECASE)
        if not ours or int(ours[1]) > newest:
            return f"{FOLDER}/{name[:60]} is of somebody else"
    for place in TAKEN:
        if (folder / place).is_dir() and (found := sorted(os.listdir(folder / place))):
            return f"{place}/{found[0][:60]} is of somebody else"
    return ""


def make(host: Host, device: Path, uuid: str, entries: Sequence[Entry], loader: bytes, store: Path) -> None:
    """Make the partition anew. No firmware finds a boot loader there before all else is durable."""
    fill(host, device, uuid, entries, loader, store)
    let_start(host, device)


def fill(host: Host, device: Path, uuid: str, entries: Sequence[Entry], loader: bytes, store: Path) -> None:
    """Make the partition's file system and all that is on it, with a boot loader that no firmware finds yet.

    UKIs come from `store`. The event log of this boot is kept there too: its firmware is the machine's.
    """
    host.run(["mkfs.vfat", "-F32", "-nESP", f"-i{uuid.replace('-', '')[:8]}", device], timeout=60)
    files = {"loader/loader.conf": LOADER_CONF, LOADER: loader, NOT_YET: loader}
    machine = Elsewhere({init.STORE: store})
    with host.mounted(device, "vfat") as folder:
        for name in (*(entry.place for entry in entries), *files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for entry in entries:
            stored = machine.real_path(init.blob_path(entry.uki.digest))
            with (folder / entry.place).open("wb") as file:
                file.writelines(read_checked(stored, entry.uki))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        lastgood.keep(host, folder)
        host.sync_tree(folder)


def let_start(host: Host, device: Path) -> None:
    """Give the boot loader the name by which firmware finds it, in one rename."""
    with host.mounted(device, "vfat") as folder:
        # It may have it already, where an installation goes on that was broken off.
        if (folder / NOT_YET).exists() or not (folder / STARTED).exists():
            (folder / NOT_YET).rename(folder / STARTED)
        # The file first: until it is synced its new name is that of an empty file, which no firmware starts.
        host.sync_file(folder / STARTED)
        host.sync_file((folder / STARTED).parent)
