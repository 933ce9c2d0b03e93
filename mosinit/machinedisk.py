"""Which disk is a machine's, and the partitions it has."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from mosinit import init, layout
from mosinit.host import Failure, Host

NAMES = {
    init.ESP_TYPE: "esp",
    init.CONFIG_TYPE: "config",
    init.STORE_TYPE: "store",
    init.SCRATCH_TYPE: "scratch",
}


def find_disk(host: Host, named: Path | None) -> layout.Plan:
    """Return the disk of a machine, with its partitions. Raises `Failure` if it has to be named, `Refused`
    if it is no machine's.
    """
    disk = layout.inspect(host, named or _only_disk(host))
    # Nothing is erased: what is on it is what this is about.
    layout.check_free(host, disk)
    if disk.unfinished:
        raise Failure(f"{disk.path} is of an installation that did not end: install again")
    planned = read_partitions(host, disk)
    # Kernel and table must agree on where a partition lies.
    layout.wait_for_devices(host, planned)
    return planned


def machines(host: Host) -> list[layout.Disk]:
    """Return the disks that have a machine's partitions and are not the medium."""
    found = []
    for name in host.names("/sys/block"):
        if name.startswith(("loop", "ram", "zram", "dm-", "md", "fd", "mtd", "sr", "nbd")):
            continue
        with contextlib.suppress(Failure, init.Refused, OSError):
            disk = layout.inspect(host, Path("/dev", name))
            if not layout.boot_medium(host, disk) and read_partitions(host, disk):
                found.append(disk)
    return found


def _only_disk(host: Host) -> Path:
    found = machines(host)
    if len(found) != 1:
        names = ", ".join(f"{disk.path} (serial {disk.serial})" for disk in found)
        raise Failure(f"{names or 'no disk'} could be the machine's: name its disk by --disk")
    return found[0].path


def read_partitions(host: Host, disk: layout.Disk) -> layout.Plan:
    """Return the partition table of a machine's disk, as the bring-up reads it. Raises `Refused` if it is
    none.
    """
    with init.held(os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        header, entries = (host.read_at(fd, at * disk.sector, 16384) for at in (1, 2))
    parts = init.parse_gpt(header[: disk.sector], entries, disk.sector, disk.size // disk.sector)
    rows = []
    for part in parts:
        # By their types alone, as a boot takes them, but for the one that has a name, too.
        other = init.STATE if (part.kind, part.name) == (init.LINUX_TYPE, init.STATE) else ""
        name = NAMES.get(part.kind, other)
        rows.append(layout.Partition(part.number, name, part.kind, part.uuid, part.start, part.size, ""))
    names = [row.name for row in rows]
    for name in ("esp", "config", "store", "scratch"):
        if names.count(name) != 1:
            expected = f"one partition {name} on {disk.path}"
            raise init.Refused("DISK-PARTITION", expected=expected, seen=str(names.count(name)))
    if names.count(init.STATE) > 1:
        raise init.Refused("DISK-PARTITION", expected="at most one partition state", seen="more")
    return layout.Plan(disk, layout.disk_id(header[: disk.sector]), tuple(rows), "")
