"""The event log of the last good boot, kept on the boot partition: EFI/mosinit/eventlog.bin.

It is public and nobody believes it: `explain` alone reads it, to name what differs in PCR 7, and needs no
secret for that, on a live medium either. Neither firmware nor boot loader nor boot stub looks into its
folder.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from mosinit import eventlog, init
from mosinit.host import Failure, Host

EVENT_LOG = Path("/sys/kernel/security/tpm0/binary_bios_measurements")  # of this boot, as the kernel has it
PLACE = "EFI/mosinit/eventlog.bin"
LIMIT = 256 << 10
NOT_DISKS = ("loop", "ram", "zram", "dm-", "md", "fd", "mtd")


def keep(host: Host, esp: Path, log: Path = EVENT_LOG) -> bool:
    """Keep this boot's event log on a boot partition, and say whether it was another one that lay there.

    What cannot be kept is said, and is no failure: no boot needs it.
    """
    try:
        current = read(log)
        eventlog.parse_event_log(current)
        place = esp / PLACE
        with contextlib.suppress(OSError, ValueError):
            if read(place) == current:
                return False
        place.parent.mkdir(parents=True, exist_ok=True)
        for left in place.parent.glob(f".{place.name}.*"):
            left.unlink()  # by a power cut
        with host.replacing(place) as fresh:
            fresh.write_bytes(current)
        host.sync_file(place.parent.parent)
    except (OSError, ValueError, Failure) as error:
        host.say(f"the event log of this boot is not kept for `mosinit explain`: {error}")
        return False
    return True


def read(path: Path) -> bytes:
    """Read a log of at most `LIMIT` bytes, and nothing that could wait or lead elsewhere.

    Raises OSError, ValueError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path} is no file")
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise ValueError(f"{path} has more than {LIMIT} bytes")
    return data


def find(host: Host, machine: init.Machine) -> list[tuple[str, bytes]]:
    """Return what the boot partitions of installed machines' disks keep, by the disk's name.

    Nothing is written. The caller gave this process a mount namespace of its own.
    """
    found = []
    for disk in installed_disks(machine):
        with contextlib.suppress(OSError, ValueError, Failure, init.Refused):
            found.append((disk.name, _read_kept(host, machine, disk)))
    return found


def installed_disks(machine: init.Machine) -> Iterator[init.BootDisk]:
    """Yield the disks that have a boot partition and a config volume."""
    for name in machine.names("/sys/block"):
        if name.startswith(NOT_DISKS):
            continue
        with contextlib.suppress(OSError, init.Refused):
            disk = init.BootDisk(name, read_table(machine, name))
            if len(disk.find(init.ESP_TYPE)) == len(disk.find(init.CONFIG_TYPE)) == 1:
                yield disk


def read_table(machine: init.Machine, name: str) -> tuple[init.Partition, ...]:
    """Return the partitions of a disk, by the bring-up's own parser."""
    fd = machine.open_device(f"/dev/{name}")
    try:
        size, sector = machine.device_size(fd)
        if size < init.MIB or sector not in (512, 4096):
            return ()
        head, entries = machine.read_at(fd, sector, sector), machine.read_at(fd, 2 * sector, 128 * 128)
        return init.parse_gpt(head, entries, sector, size // sector)
    finally:
        machine.close(fd)


def _read_kept(host: Host, machine: init.Machine, disk: init.BootDisk) -> bytes:
    fd, _ = init.open_partition(machine, disk, init.ESP_TYPE)
    try:
        device = Path(os.readlink(f"/proc/self/fd/{fd}"))
        with host.mounted(device, "vfat", read_only=True) as folder:
            return read(folder / PLACE)
    finally:
        machine.close(fd)
