"""The disk of an installed machine: which partitions it gets, and which disks may be made into one.

First everything is looked at and a plan is made; only `write` changes anything, and only the planned disk.
"""

from __future__ import annotations

import os
import re
import stat
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mosinit import init
from mosinit.host import Failure, Host

GIB = 1 << 30
SMALLEST = 8 * GIB
ESP_BYTES, CONFIG_BYTES = 512 * init.MIB, 128 * init.MIB
SMALLEST_VOLUME = 64 * init.MIB
# A disk has this id while it is being installed: whoever finds it may begin anew without asking.
UNFINISHED = "5a3d1b0e-6f0c-4d7a-9c55-d0b3a1f7e2c4"
EDGES = init.MIB  # of a disk, where tables and superblocks lie
# Written before anything else, where no partition table reaches and no partition lies: so a disk whose table
# a power cut tore is known as one that was being installed.
MARK = f"mosinit is installing on this disk {UNFINISHED}\n".encode().ljust(4096, b"\0")
MARK_OFFSET = EDGES // 2


@dataclass(frozen=True)
class Disk:
    """What is known of a disk before anything is done with it."""

    path: Path
    name: str
    size: int
    sector: int
    read_only: bool
    serial: str
    model: str
    content: str  # what is on it, for a person; empty if nothing
    unfinished: bool = False


@dataclass(frozen=True)
class Partition:
    """A partition to be made; `start` and `size` in bytes, `holds` for a person."""

    number: int
    name: str
    kind: str
    uuid: str
    start: int
    size: int
    holds: str


@dataclass(frozen=True)
class Plan:
    """What will be on a disk, and what will no longer be there."""

    disk: Disk
    identity: str
    partitions: tuple[Partition, ...]
    lost: str

    def named(self, name: str) -> Partition:
        """Return the partition of that name."""
        return next(part for part in self.partitions if part.name == name)


def make_plan(
    disk: Disk, state: int = 0, new_uuid: Callable[[], str] = lambda: str(uuid.uuid4()), *,
    store: int = 0, scratch: int = 0,
) -> Plan:  # fmt: skip
    """Lay out a disk. Raises `Failure`.

    `state` is bytes of a volume for what must survive, 0 for none; store and scratch have half and a quarter
    of what is left, or so many bytes.
    """
    if disk.size < SMALLEST:
        raise Failure(
            f"{disk.path} has {disk.size >> 20} MiB: a machine needs a disk of {SMALLEST >> 20} MiB"
        )
    # The last MiB holds the second partition table.
    rest = disk.size // init.MIB * init.MIB - 2 * init.MIB - ESP_BYTES - CONFIG_BYTES
    asked = {init.STATE: state, "store": store, "scratch": scratch}
    sizes = {**asked, "store": store or rest // 2, "scratch": scratch or rest // 4}
    for name in sorted(sizes, key=lambda name: not asked[name]):
        most = rest - sum(_whole(size) for other, size in sizes.items() if other != name)
        if sizes[name] and not SMALLEST_VOLUME <= sizes[name] <= most:
            others = " and ".join(f"{sizes[other] >> 20} MiB of {other}" for other in sizes if other != name)
            raise Failure(
                f"a {name} volume on {disk.path} can have {SMALLEST_VOLUME >> 20} to {max(0, most) >> 20} "
                f"MiB beside {others}: choose other sizes"
            )
    rows = [
        ("esp", init.ESP_TYPE, ESP_BYTES, "boot loader and UKIs, FAT32"),
        ("machine-config", init.CONFIG_TYPE, CONFIG_BYTES, "/config, encrypted with integrity"),
        ("machine-store", init.STORE_TYPE, _whole(sizes["store"]), "/atomfs-cache, encrypted"),
        (
            "machine-scratch",
            init.SCRATCH_TYPE,
            _whole(sizes["scratch"]),
            "/scratch-writes, encrypted anew at each boot",
        ),
    ]
    if state:
        rows.append((init.STATE, init.LINUX_TYPE, _whole(state), "/var, encrypted"))
    partitions, start = [], init.MIB
    for number, (name, kind, size, holds) in enumerate(rows, 1):
        partitions.append(Partition(number, name, kind, new_uuid(), start, size, holds))
        start += size
    return Plan(disk, new_uuid(), tuple(partitions), disk.content)


def _whole(size: int) -> int:
    return size // init.MIB * init.MIB


def script(plan: Plan, identity: str) -> bytes:
    """Return what sfdisk makes the partition table from."""
    sector = plan.disk.sector
    lines = ["label: gpt", f"label-id: {identity}", "unit: sectors", f"first-lba: {init.MIB // sector}"]
    lines += [
        f"start={part.start // sector}, size={part.size // sector}, type={part.kind}, uuid={part.uuid}, "
        f"name={part.name}"
        for part in plan.partitions
    ]
    return "".join(f"{line}\n" for line in lines).encode()


# --- Looking ------------------------------------------------------------------------------------------


def _disks(folder: Path = Path("/dev/disk/by-id")) -> str:
    """Return which disks there are, for a message: who installs may see this computer by no other way."""
    try:
        names = sorted(
            name for name in os.listdir(folder) if not re.search(r"-part[0-9]+$|^dm-|^wwn-", name)
        )
    except OSError:
        names = []
    return ", ".join(f"{folder}/{name}" for name in names[:8]) or str(folder)


def inspect(host: Host, path: Path) -> Disk:
    """Return what is known of a disk. Raises `Failure` for what is no whole disk."""
    real = Path(os.path.realpath(path))
    try:
        mode = real.stat().st_mode
    except OSError as error:
        raise Failure(f"there is no disk {path}: name one of {_disks()}") from error
    folder = Path("/sys/block") / real.name
    if not stat.S_ISBLK(mode) or not folder.is_dir():
        raise Failure(f"{path} is no whole disk: name one of /dev/disk/by-id")
    fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size, sector = host.device_size(fd)
        if not size:
            raise Failure(f"{path} is empty, a drive without a medium: name another disk")
        content, unfinished = _content(host, fd, size, sector)
    finally:
        os.close(fd)
    return Disk(
        real, real.name, size, sector, _first(folder / "ro") != "0",
        _first(folder / "serial", folder / "device/serial", folder / "device/wwid", folder / "wwid")
        or real.name,
        _first(folder / "device/model"), content, unfinished,
    )  # fmt: skip


def _first(*paths: Path) -> str:
    for path in paths:
        try:
            text = "".join(c for c in path.read_text(errors="replace").strip() if c.isprintable())
        except OSError:
            continue
        if text:
            return text[:200]
    return ""


def _content(host: Host, fd: int, size: int, sector: int) -> tuple[str, bool]:
    """Say what a disk holds: its partitions if it has a table, or just that it is not empty."""
    if sector not in (512, 4096):
        return "", False
    head = host.read_at(fd, 0, min(EDGES, size))
    if size < 2 * EDGES:
        return ("data" if any(head) else ""), False
    header, entries = head[sector : 2 * sector], head[2 * sector : 2 * sector + 16384]
    try:
        parts = init.parse_gpt(header, entries, sector, size // sector)
    except init.Refused:
        tail = host.read_at(fd, size - EDGES, EDGES)
        marked = head[MARK_OFFSET : MARK_OFFSET + len(MARK)] == MARK
        empty = not any(head) and not any(tail)
        return ("" if empty else "data without a valid partition table"), marked
    unfinished = init.format_guid(header[56:72]) == UNFINISHED  # UEFI specification 5.3.2
    sizes = ", ".join(f"{part.size >> 20} MiB" for part in parts)
    return f"{len(parts)} partitions ({sizes})" if parts else "an empty partition table", unfinished


def check_usable(host: Host, disk: Disk, erase: str | None = None) -> None:
    """Refuse a disk that is in use, cannot be written, or holds what nobody said may be lost.

    `erase` is the serial of the disk whose content may go. Raises `Failure`.
    """
    if disk.read_only:
        raise Failure(f"{disk.path} cannot be written: name another disk")
    if disk.sector not in (512, 4096):
        raise Failure(f"{disk.path} has sectors of {disk.sector} bytes: 512 or 4096 are supported")
    if medium := boot_medium(host, disk):
        raise Failure(f"{disk.path} is the medium that this system was booted from ({medium}): name another")
    # The kernel lends a disk to one user at a time, its partitions count: mounts, swap, RAID, mappings.
    try:
        os.close(os.open(disk.path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        using = users(disk) or error.strerror
        raise Failure(f"{disk.path} is in use ({using}): name another disk, or stop its user") from error
    if erase is not None and erase != disk.serial:
        raise Failure(f"{disk.path} has the serial {disk.serial!r}, not {erase!r}: nothing was erased")
    if disk.content and not disk.unfinished and erase is None:
        raise Failure(
            f"{disk.path} ({disk.model or 'no model'}) holds {disk.content}: to lose all of it, say "
            f"--erase {disk.serial}"
        )


def users(disk: Disk) -> str:
    """Say who uses a disk or its partitions, as far as the kernel tells."""
    folder = Path("/sys/block") / disk.name
    found = []
    for part in [folder, *sorted(path.parent for path in folder.glob("*/partition"))]:
        number, name = _first(part / "dev"), f"/dev/{part.name}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            words = line.split(" ")
            if words[2] == number:
                found.append(f"{name} is mounted at {words[4]}")
        for line in Path("/proc/swaps").read_text().splitlines()[1:]:
            if line.split()[0] == name:
                found.append(f"{name} is swap space")
        held = [_first(holder / "dm/name") or holder.name for holder in sorted(part.glob("holders/*"))]
        found += [f"{name} belongs to {holder}" for holder in held]
    return ", ".join(found)[:300]


def boot_medium(host: Host, disk: Disk) -> str:
    """Return the id of the partition that this system was started from if it lies on this disk."""
    hint = host.efi_read("LoaderDevicePartUUID", init.LOADER_GUID)
    wanted = hint[1].decode("utf-16-le", errors="replace").rstrip("\0").lower() if hint else ""
    if not wanted:
        return ""
    fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header, entries = (host.read_at(fd, at * disk.sector, 16384) for at in (1, 2))
        parts = init.parse_gpt(header[: disk.sector], entries, disk.sector, disk.size // disk.sector)
    except init.Refused:
        return ""
    finally:
        os.close(fd)
    return wanted if wanted in {part.uuid for part in parts} else ""


# --- Acting -------------------------------------------------------------------------------------------


def write(host: Host, plan: Plan) -> None:
    """Make the partition table, marked as unfinished; what was at the edges of the disk is wiped."""
    disk = plan.disk
    fd = os.open(disk.path, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
    try:
        os.pwrite(fd, MARK, MARK_OFFSET)
        os.fsync(fd)
        os.pwrite(fd, bytes(MARK_OFFSET), 0)
        behind = MARK_OFFSET + len(MARK)
        os.pwrite(fd, bytes(EDGES - behind), behind)
        os.pwrite(fd, bytes(EDGES), disk.size - EDGES)
        for part in plan.partitions:
            # Nothing that an earlier owner left may look like a volume of ours.
            for offset in (part.start, part.start + part.size - EDGES):
                os.pwrite(fd, bytes(EDGES), offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    host.run(
        ["sfdisk", "--quiet", "--lock=yes", "--wipe=always", "--wipe-partitions=never", disk.path],
        stdin=script(plan, UNFINISHED), timeout=120,
    )  # fmt: skip
    check(host, plan)


def finish(host: Host, plan: Plan) -> None:
    """Give the disk its own id: from here it is a machine's, and needs a word to be erased."""
    words = ["--quiet", "--lock=yes", "--no-reread", "--disk-id", str(plan.disk.path), plan.identity]
    host.run(["sfdisk", *words], timeout=120)
    host.sync_file(plan.disk.path)
    with open(plan.disk.path, "r+b", buffering=0) as file:
        file.seek(MARK_OFFSET)
        file.write(bytes(len(MARK)))
        os.fsync(file.fileno())
    check(host, plan)
    wait_for_devices(host, plan)


def check(host: Host, plan: Plan) -> None:
    """See that the bring-up reads the table that was planned. Raises `Refused`, `Failure`."""
    disk = plan.disk
    fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header, entries = (host.read_at(fd, at * disk.sector, 16384) for at in (1, 2))
    finally:
        os.close(fd)
    seen = init.parse_gpt(header[: disk.sector], entries, disk.sector, disk.size // disk.sector)
    wanted = tuple((p.number, p.kind, p.uuid, p.start, p.size) for p in plan.partitions)
    if tuple((p.number, p.kind, p.uuid, p.start, p.size) for p in seen) != wanted:
        raise Failure(f"{disk.path} does not keep what is written to it: use another disk")


def device(plan: Plan, part: Partition) -> Path:
    """Return the block device of a partition; `devices` waits for it."""
    disk = plan.disk
    separator = "p" if disk.name[-1].isdigit() else ""
    return disk.path.with_name(f"{disk.name}{separator}{part.number}")


def wait_for_devices(host: Host, plan: Plan, seconds: float = 10) -> None:
    """Tell the kernel of the partitions, and wait until it shows them as they were planned."""
    # One that reads no such tables itself is told as well.
    host.run(["partx", "--update", plan.disk.path], timeout=60)
    deadline = host.monotonic() + seconds
    for part in plan.partitions:
        path = device(plan, part)
        wanted = f"{part.start // 512} {part.size // 512}"
        folder = Path("/sys/block") / plan.disk.name / path.name
        while (
            f"{_first(folder / 'start')} {_first(folder / 'size')}" != wanted or not path.is_block_device()
        ):
            if host.monotonic() > deadline:
                raise Failure(f"the kernel does not show {path}: restart and install again")
            host.sleep(0.05)
