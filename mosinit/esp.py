"""The EFI system partition of a machine: looked at, and made anew where something is wrong with it.

Firmware checks what it starts, so nothing here is a matter of trust: the boot loader comes from the medium,
whose store is sealed, and UKIs come from the machine's store by digest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mosinit import init, install
from mosinit.generations import Elsewhere
from mosinit.host import Failure, Host
from mosinit.sources import Blob, read_checked

FOLDER = "EFI/Linux"


@dataclass(frozen=True)
class Entry:
    """What must lie there for one generation."""

    sequence: int
    uki: Blob
    good: bool  # it has started well: no tries are counted

    @property
    def place(self) -> str:
        """Return where it is laid."""
        return f"{FOLDER}/mosinit_{self.sequence}.efi" if self.good else install.uki_place(self.sequence)


def look(host: Host, device: Path, entries: Sequence[Entry], loader: bytes) -> str:
    """Say what is wrong with an EFI system partition, nothing if a machine starts from it."""
    try:
        host.run(["fsck.vfat", "-n", device], timeout=120)
        with host.mounted(device, "vfat", read_only=True) as folder:
            return next((fault for entry in entries if (fault := _entry_fault(folder, entry))), "") or (
                _loader_fault(folder, loader)
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
    for name in (install.LOADER, install.STARTED):
        path = folder / name
        if not path.is_file() or path.read_bytes() != loader:
            return f"{name} is not the boot loader of the medium"
    settings = folder / "loader/loader.conf"
    if not settings.is_file() or settings.read_bytes() != install.LOADER_CONF:
        return "loader/loader.conf is another"
    more = [
        path for path in (folder / "loader").rglob("*") if path.is_file() and path.parent.name == "entries"
    ]
    return f"{more[0].name} is a boot entry of somebody else" if more else ""


def make(host: Host, device: Path, uuid: str, entries: Sequence[Entry], loader: bytes, store: Path) -> None:
    """Make the partition anew. No firmware finds a boot loader there before all else is durable."""
    host.run(["mkfs.vfat", "-F32", "-nESP", f"-i{uuid.replace('-', '')[:8]}", device], timeout=60)
    files = {
        "loader/loader.conf": install.LOADER_CONF,
        install.LOADER: loader,
        install.NOT_YET: loader,
    }
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
        install.sync_tree(host, folder)
    with host.mounted(device, "vfat") as folder:
        (folder / install.NOT_YET).rename(folder / install.STARTED)
        # The file first: until it is synced its new name is that of an empty file, which no firmware starts.
        host.sync_file(folder / install.STARTED)
        host.sync_file((folder / install.STARTED).parent)
