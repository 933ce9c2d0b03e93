"""Partitions of an installed machine, on loop devices: planned, written, read by the bring-up."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mosinit import init, layout
from mosinit.host import Failure, Host
from mosinit.layout import Consent

GIB = layout.GIB
DISK = layout.Disk(Path("/dev/none"), "none", 8 * GIB, 512, False, "serial-1", "model", "")


def counted() -> Callable[[], str]:
    numbers = itertools.count(1)
    return lambda: f"00000000-0000-4000-8000-{next(numbers):012}"


@contextlib.contextmanager
def loop(file: Path, size: int = 8 * GIB, sector: int = 512, *words: str) -> Iterator[Path]:
    """Attach a file of that size as a disk."""
    if not file.exists():
        file.touch()
        os.truncate(file, size)
    command = ["losetup", "--find", "--show", "--partscan", "--sector-size", str(sector), *words, str(file)]
    device = Path(subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(init.MIB)


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("size", [8 * GIB, 8 * GIB + 12345 * 4096, 110 * GIB, 20 << 40])
@pytest.mark.parametrize("state", [0, 64 << 20, 1 << 30])
def test_a_plan_fits_its_disk(size: int, sector: int, state: int) -> None:
    plan = layout.make_plan(replace(DISK, size=size, sector=sector), state, counted())
    end = init.MIB
    for part in plan.partitions:
        assert part.start == end
        assert part.start % init.MIB == part.size % init.MIB == 0
        end += part.size
    assert end <= size - init.MIB
    assert len({part.uuid for part in plan.partitions} | {plan.identity}) == len(plan.partitions) + 1
    assert plan.named("machine-store").size >= 2 * plan.named("machine-scratch").size > 0.24 * (size - GIB)


def test_the_smallest_disk() -> None:
    plan = layout.make_plan(DISK, 0, counted())
    sizes = {part.name: part.size >> 20 for part in plan.partitions}
    assert sizes == {"esp": 512, "machine-config": 128, "machine-store": 3775, "machine-scratch": 1887}
    with pytest.raises(Failure, match="a machine needs a disk of 8192 MiB"):
        layout.make_plan(replace(DISK, size=8 * GIB - 4096))


@pytest.mark.parametrize("state", [1, (64 << 20) - 1, 1889 << 20, 1 << 60])
def test_a_state_volume_that_does_not_fit(state: int) -> None:
    with pytest.raises(Failure, match="can have 64 to 1888 MiB"):
        layout.make_plan(DISK, state)


def sizes_of(plan: layout.Plan) -> dict[str, int]:
    return {part.name.removeprefix("machine-"): part.size >> 20 for part in plan.partitions}


@pytest.mark.parametrize(
    ("state", "store", "scratch", "expected"),
    [
        (0, 1000, 0, {"store": 1000, "scratch": 1887}),
        (0, 0, 64, {"store": 3775, "scratch": 64}),
        (3000, 2000, 1000, {"store": 2000, "scratch": 1000, "state": 3000}),
        (0, 7486, 64, {"store": 7486, "scratch": 64}),
        (64, 7422, 64, {"store": 7422, "scratch": 64, "state": 64}),
    ],
)
def test_sizes_that_were_chosen(state: int, store: int, scratch: int, expected: dict[str, int]) -> None:
    plan = layout.make_plan(DISK, state << 20, counted(), store=store << 20, scratch=scratch << 20)
    assert sizes_of(plan) == {"esp": 512, "config": 128, **expected}
    last = plan.partitions[-1]
    assert last.start + last.size <= DISK.size - init.MIB


@pytest.mark.parametrize(
    ("state", "store", "scratch", "words"),
    [
        (0, 63, 0, "a store volume on /dev/none can have 64 to 5663 MiB beside 0 MiB of state and 1887 MiB"),
        (0, 5664, 0, "a store volume on /dev/none can have 64 to 5663 MiB"),
        (0, 0, 3776, "a scratch volume on /dev/none can have 64 to 3775 MiB"),
        (0, 0, 63, "a scratch volume on /dev/none can have 64 to 3775 MiB"),
        (0, 1 << 30, 1 << 30, "a store volume on /dev/none can have 64 to 0 MiB beside"),
        (65, 7422, 64, "a state volume on /dev/none can have 64 to 64 MiB beside"),
    ],
)
def test_sizes_that_do_not_fit(state: int, store: int, scratch: int, words: str) -> None:
    with pytest.raises(Failure, match=words):
        layout.make_plan(DISK, state << 20, store=store << 20, scratch=scratch << 20)


@pytest.mark.parametrize("sector", [512, 4096])
def test_the_bring_up_reads_what_is_written(
    sector: int, host: Host, need: Callable[..., None], memory: Path
) -> None:
    need("sfdisk", "losetup")
    with loop(memory / "disk", 8 * GIB, sector) as device:
        disk = layout.inspect(host, device)
        assert (disk.size, disk.sector, disk.content) == (8 * GIB, sector, "")
        layout.check_usable(host, disk)
        plan = layout.make_plan(disk, 100 << 20)
        layout.write(host, plan)
        layout.wait_for_devices(host, plan)
        assert layout.inspect(host, device).unfinished
        layout.check_usable(host, layout.inspect(host, device))
        again = layout.make_plan(layout.inspect(host, device))
        layout.write(host, again)
        layout.wait_for_devices(host, again)
        layout.take_id(host, again)
        layout.wipe_mark(host, again)
        done = layout.inspect(host, device)
        assert not done.unfinished
        assert done.content == "4 partitions (512 MiB, 128 MiB, 3775 MiB, 1887 MiB)"
        names = subprocess.run(
            ["sfdisk", "--dump", device], capture_output=True, check=True, text=True
        ).stdout
        assert f"label-id: {again.identity.upper()}" in names
        assert [line.rpartition("name=")[2] for line in names.splitlines() if "name=" in line] == [
            '"esp"', '"machine-config"', '"machine-store"', '"machine-scratch"',
        ]  # fmt: skip


def test_content_is_lost_only_for_who_says_so(host: Host, need: Callable[..., None], memory: Path) -> None:
    need("losetup", "mkfs.ext4")
    with loop(memory / "disk") as device:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        disk = layout.inspect(host, device)
        before = head(memory / "disk")
        with pytest.raises(Failure, match=f"to lose all of it, say --erase {disk.word}"):
            layout.check_usable(host, disk)
        with pytest.raises(Failure, match="nothing was erased"):
            layout.check_usable(host, disk, Consent("another"))
        layout.check_usable(host, disk, Consent(disk.word))
        assert head(memory / "disk") == before
    (memory / "disk").unlink()
    with loop(memory / "disk") as device:
        with device.open("r+b") as file:
            file.seek(-4096, os.SEEK_END)
            file.write(b"EFI PART")
        with pytest.raises(Failure, match="data without a valid partition table"):
            layout.check_usable(host, layout.inspect(host, device))


def test_a_disk_in_use(host: Host, need: Callable[..., None], memory: Path) -> None:
    need("losetup", "mkfs.ext4", "sfdisk")
    with loop(memory / "disk") as device:
        plan = layout.make_plan(layout.inspect(host, device))
        layout.write(host, plan)
        layout.wait_for_devices(host, plan)
        part = layout.device(plan, plan.named("machine-store"))
        subprocess.run(["mkfs.ext4", "-q", part], check=True)
        (memory / "mnt").mkdir()
        host.mount(str(part), str(memory / "mnt"), "ext4")
        try:
            with pytest.raises(Failure, match=f"is in use \\({part} is mounted at {memory}/mnt\\)"):
                layout.check_usable(host, layout.inspect(host, device))
            with pytest.raises(OSError, match="busy"):
                layout.write(host, plan)
        finally:
            host.unmount(str(memory / "mnt"))
        found = layout.inspect(host, device)
        layout.check_usable(host, found, layout.Consent(found.word))
        with part.open("rb") as file:
            fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_EXCL)
        try:
            with pytest.raises(Failure, match="is in use \\(Device or resource busy\\): name another disk"):
                layout.check_usable(host, layout.inspect(host, device))
        finally:
            os.close(fd)


@pytest.mark.parametrize("offset", [0, 512, 1024])
@pytest.mark.parametrize("ended", [True, False])
def test_a_table_that_was_torn_is_known_as_ours(
    host: Host, need: Callable[..., None], memory: Path, offset: int, ended: bool
) -> None:
    need("sfdisk", "losetup")
    with loop(memory / "disk") as device:
        plan = layout.make_plan(layout.inspect(host, device))
        layout.write(host, plan)
        tear(device, offset)
        layout.check_usable(host, layout.inspect(host, device))
        plan = layout.make_plan(layout.inspect(host, device))
        layout.write(host, plan)
        layout.wait_for_devices(host, plan)
        layout.note_complete(host, plan, b"\0\x0b" + bytes(32))
        layout.take_id(host, plan)
        if ended:
            layout.wipe_mark(host, plan)
        tear(device, offset)
        # What was a machine's, or may have been, is lost only for who says so.
        with pytest.raises(Failure, match=f"say --erase {device.name}-"):
            layout.check_usable(host, layout.inspect(host, device))


def tear(device: Path, offset: int) -> None:
    with device.open("r+b", buffering=0) as file:
        file.seek(offset)
        file.write(b"torn".ljust(512, b"?"))
        os.fsync(file.fileno())


def test_a_disk_that_cannot_be_written(host: Host, need: Callable[..., None], memory: Path) -> None:
    need("losetup")
    with loop(memory / "disk", 8 * GIB, 512, "--read-only") as device:
        disk = layout.inspect(host, device)
        with pytest.raises(Failure, match="cannot be written"):
            layout.check_usable(host, disk)


class Booted(Host):
    """A host that was booted from a partition."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part

    def efi_read(self, name: str, guid: str) -> tuple[int, bytes] | None:
        """Say what the stub left."""
        return 6, struct.pack("<") + (self.part.upper() + "\0").encode("utf-16-le")


def test_the_medium_itself(host: Host, need: Callable[..., None], memory: Path) -> None:
    need("losetup", "sfdisk")
    with loop(memory / "disk") as device:
        plan = layout.make_plan(layout.inspect(host, device))
        layout.write(host, plan)
        layout.take_id(host, plan)
        layout.wipe_mark(host, plan)
        disk = layout.inspect(host, device)
        with pytest.raises(Failure, match="is the medium that this system was booted from"):
            layout.check_usable(Booted(plan.partitions[0].uuid), disk, Consent(disk.word))
        layout.check_usable(Booted("11111111-2222-3333-4444-555555555555"), disk, Consent(disk.word))


@pytest.mark.parametrize("name", ["/dev/null", "/dev/mosinit-none", "/etc/passwd"])
def test_no_whole_disk(host: Host, name: str) -> None:
    with pytest.raises(Failure, match="name one of /dev/disk/by-id"):
        layout.inspect(host, Path(name))


def test_a_partition_is_no_disk(host: Host, need: Callable[..., None], memory: Path) -> None:
    need("losetup", "sfdisk")
    with loop(memory / "disk") as device:
        plan = layout.make_plan(layout.inspect(host, device))
        layout.write(host, plan)
        layout.wait_for_devices(host, plan)
        with pytest.raises(Failure, match="is no whole disk"):
            layout.inspect(host, layout.device(plan, plan.partitions[0]))


def test_a_disk_that_forgets(host: Host, need: Callable[..., None], memory: Path) -> None:
    need("losetup", "sfdisk")
    with loop(memory / "disk") as device:
        plan = layout.make_plan(layout.inspect(host, device))
        layout.write(host, plan)
        with pytest.raises(Failure, match="does not keep what is written"):
            layout.check(host, layout.make_plan(plan.disk))
