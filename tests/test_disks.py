"""Which disks a machine has, what lies on them, and which word lets that be lost: on loop devices."""

from __future__ import annotations

import dataclasses
import os
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from mosinit import content, init, layout
from mosinit.host import Failure, Host
from mosinit.layout import Consent
from tests.test_layout import GIB, loop

# A physical volume of LVM2 begins so, in its second sector: lib/format_text/layout.h
_LABEL = (b"\x20\0\0\0" + b"LVM2 001" + b"A" * 32).ljust(492, b"\0")
_CHECKSUM = zlib.crc32(_LABEL, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
LVM = b"LABELONE" + (1).to_bytes(8, "little") + _CHECKSUM.to_bytes(4, "little") + _LABEL
UUID = "00000000-0000-4000-8000-000000000001"


def run(*words: str | Path, data: str = "") -> None:
    subprocess.run([str(word) for word in words], input=data.encode(), check=True, capture_output=True)


def put(disk: Path, offset: int, data: bytes) -> None:
    with disk.open("r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)


def said(disk: Path) -> list[str]:
    return [str(row) for row in layout.inspect(Host(), disk).rows]


def members(disk: Path) -> list[str]:
    return [str(row) for row in layout.inspect(Host(), disk).members]


def luks(path: Path, offset: int = 0) -> None:
    """Make a LUKS header at a place of a disk."""
    with loop(path.with_name("luks"), 64 << 20) as volume:
        options = ("--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
        run("cryptsetup", "luksFormat", *options, "--key-file", "-", volume, data="secret")
        put(path, offset, volume.read_bytes()[: 16 << 20])


# --- What lies there -------------------------------------------------------------------------------------


def test_an_empty_disk(disk: Path) -> None:
    found = layout.inspect(Host(), disk)
    assert (found.rows, found.content, found.members) == ((), "", ())
    assert found.word.startswith(f"{disk.name}-")
    assert len(found.fingerprint) == 64


def test_partitions_of_a_gpt(disk: Path, memory: Path) -> None:
    kinds = (init.ESP_TYPE, init.LINUX_TYPE, "e6d6d379-f507-44c2-a23c-238f2a3df928", UUID)
    table = "".join(f"size=100MiB, type={kind}, name=p{number}\n" for number, kind in enumerate(kinds))
    run("sfdisk", disk, data=f"label: gpt\n{table}")
    put(disk, (201 << 20) + 512, LVM)
    with loop(memory / "fs", 100 << 20) as volume:
        run("mkfs.ext4", "-q", "-L", "music", volume)
        put(disk, 101 << 20, volume.read_bytes()[: 8 << 20])
    assert said(disk) == [
        "partition 1, 100 MiB: EFI system 'p0'",
        "partition 2, 100 MiB: ext4 'music'",
        "partition 3, 100 MiB: LVM2_member 'p2'",
        f"partition 4, 100 MiB: {UUID} 'p3'",
    ]
    assert members(disk) == ["partition 3, 100 MiB: LVM2_member 'p2'"]
    assert layout.inspect(Host(), disk).content == "4 partitions (100 MiB, 100 MiB, 100 MiB, 100 MiB)"


def test_partitions_of_ms_dos(disk: Path, memory: Path) -> None:
    run(
        "sfdisk",
        disk,
        data="label: dos\np1: size=100MiB, type=7\np2: size=300MiB, type=f\np5: size=50MiB, type=83\n",
    )
    luks(disk, 1 << 20)
    assert said(disk)[:2] == ["partition 1, 100 MiB: crypto_LUKS", "partition 2, 300 MiB: extended"]
    assert said(disk)[2].startswith("partition 5, 50 MiB: Linux")
    assert members(disk) == ["partition 1, 100 MiB: crypto_LUKS"]
    assert layout.inspect(Host(), disk).content.startswith("3 partitions (100 MiB, 300 MiB, 50 MiB)")


def test_a_file_system_on_the_whole_disk(disk: Path) -> None:
    run("mkfs.ext4", "-q", "-L", "whole", disk)
    found = layout.inspect(Host(), disk)
    assert [str(row) for row in found.rows] == ["the whole disk, 8192 MiB: ext4 'whole'"]
    assert (found.content, found.members) == ("data without a valid partition table", ())


@pytest.mark.parametrize("kind", ["luks", "lvm", "raid"])
def test_a_member_that_is_the_whole_disk(disk: Path, kind: str) -> None:
    if kind == "luks":
        luks(disk)
    elif kind == "lvm":
        put(disk, 512, LVM)
    else:
        # A superblock of MD 1.2, linux/raid/md_p.h: magic, version, then what libblkid compares.
        put(disk, 4096, bytes.fromhex("fc4e2ba901000000") + bytes(8) + b"U" * 16 + b"name".ljust(32, b"\0"))
        put(disk, 4096 + 128 + 16, (8).to_bytes(8, "little"))
    (row,) = layout.inspect(Host(), disk).members
    assert row.number == 0
    assert {"luks": "crypto_LUKS", "lvm": "LVM2_member", "raid": "linux_raid_member"}[kind] == row.holds


def test_signatures_that_contradict_each_other(disk: Path, memory: Path, need: Callable[..., None]) -> None:
    need("mkfs.btrfs")
    run("sfdisk", disk, data="label: gpt\nsize=200MiB\n")
    with loop(memory / "fs", 200 << 20) as volume:
        run("mkfs.btrfs", "-q", volume)
        put(disk, (1 << 20) + (64 << 10), volume.read_bytes()[64 << 10 : 68 << 10])
        run("mkfs.ext4", "-q", volume)
        put(disk, 1 << 20, volume.read_bytes()[: 60 << 10])
    (row,) = layout.inspect(Host(), disk).rows
    assert (set(row.holds.split(", ")), row.member) == ({"ext4", "btrfs"}, False)
    luks(disk, 100 << 20)
    put(disk, 1 << 20, disk_part(disk, 100 << 20, 512))
    (row,) = layout.inspect(Host(), disk).rows
    assert (set(row.holds.split(", ")), row.member) == ({"ext4", "btrfs", "crypto_LUKS"}, True)


def disk_part(disk: Path, offset: int, size: int) -> bytes:
    with disk.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def test_a_partition_that_is_called_a_member(disk: Path) -> None:
    run("sfdisk", disk, data="label: gpt\nsize=1GiB, type=a19d880f-05fc-4d3b-a006-743f0f84911e\nsize=1GiB\n")
    assert members(disk) == ["partition 1, 1024 MiB: Linux RAID"]


@pytest.mark.parametrize(
    ("kind", "usage", "expected"),
    [
        ("crypto_LUKS", "crypto", True), ("BitLocker", "crypto", True), ("linux_raid_member", "raid", True),
        ("LVM2_member", "raid", True), ("isw_raid_member", "raid", True), ("drbd", "other", True),
        ("zfs_member", "filesystem", True), ("bcache", "other", True), ("ceph_bluestore", "other", True),
        ("VMFS_volume_member", "raid", True), ("ext4", "filesystem", False), ("swap", "other", False),
        ("", "", False),
    ],
)  # fmt: skip
def test_what_belongs_to_other_disks_too(kind: str, usage: str, expected: bool) -> None:
    assert content.is_member(kind, usage) is expected


def test_no_label_moves_a_cursor(disk: Path, memory: Path) -> None:
    run("sfdisk", disk, data='label: gpt\nsize=100MiB, name="a\x1b[2J\x07b"\nsize=100MiB\n')
    with loop(memory / "fs", 100 << 20) as volume:
        run("mkfs.ext4", "-q", "-L", "\x1b]0;hi\x07", volume)
        put(disk, 101 << 20, volume.read_bytes()[: 8 << 20])
    found = layout.inspect(Host(), disk)
    assert all(str(row).isprintable() and row.label.isprintable() for row in found.rows)
    assert len(found.rows) == 2
    assert found.rows[1].holds == "ext4"


# --- Which disks there are -------------------------------------------------------------------------------


def test_every_disk_is_listed_also_one_that_cannot_be_read(tmp_path: Path) -> None:
    names = ("loop0", "ram1", "zram0", "dm-0", "md127", "sr0", "fd0", "nbd3", "mmcblk0boot0", "mmcblk0rpmb")
    for name in (*names, "none0"):
        (tmp_path / name).mkdir()
    assert layout.disks(Host(), tmp_path) == ()  # no device, and no size
    for name in ("sda", "vda", "nvme0n1", "mmcblk0", "ubda", "xvda"):
        assert not layout.NO_DISKS.match(name)


class Broken(Host):
    """A host whose disks do not answer."""

    def read_at(self, fd: int, offset: int, size: int) -> bytes:
        """Fail."""
        raise OSError(5, "Input/output error")


def test_a_disk_that_cannot_be_read(disk: Path) -> None:
    found = layout.look(Broken(), disk)
    assert found is not None
    assert (found.size, found.unusable) == (8 * GIB, "cannot be read (Input/output error)")
    with pytest.raises(Failure, match="cannot be read .Input/output error.: name another disk"):
        layout.inspect(Broken(), disk)


def test_why_a_disk_cannot_be_chosen(disk: Path, memory: Path) -> None:
    found = layout.look(Host(), disk)
    assert found is not None
    assert found.unusable == ""
    with loop(memory / "small", GIB) as small:
        tiny = layout.look(Host(), small)
        assert tiny is not None
        assert tiny.unusable == "has 1024 MiB, and a machine needs a disk of 8192 MiB"
    with loop(memory / "fixed", 8 * GIB, 512, "--read-only") as fixed:
        locked = layout.look(Host(), fixed)
        assert locked is not None
        assert locked.unusable == "cannot be written"
    fd = os.open(disk, os.O_RDONLY | os.O_EXCL)
    try:
        used = layout.look(Host(), disk)
        assert used is not None
        assert used.unusable.startswith("is in use")
    finally:
        os.close(fd)
    with loop(memory / "none", 4096) as dust:
        assert layout.look(Host(), dust) is not None  # whose ends are one and the same


def test_two_disks_that_cannot_be_told_apart(disk: Path) -> None:
    one = dataclasses.replace(layout.inspect(Host(), disk), serial="S1", path=Path("/dev/a"))
    two, three = (dataclasses.replace(one, path=Path(f"/dev/{name}")) for name in "bc")
    marked = layout.mark_twins([one, two, dataclasses.replace(three, serial="S2")])
    assert [each.unusable for each in marked] == [
        "has the serial 'S1', as /dev/b has",
        "has the serial 'S1', as /dev/a has",
        "",
    ]
    # Two namespaces of one controller have its serial, and each its own name.
    spaces = [dataclasses.replace(one, wwn="eui.1"), dataclasses.replace(two, wwn="eui.2")]
    assert [each.unusable for each in layout.mark_twins(spaces)] == ["", ""]
    copies = [dataclasses.replace(one, wwn="eui.1"), dataclasses.replace(three, serial="S2", wwn="eui.1")]
    assert all(each.unusable for each in layout.mark_twins(copies))


def test_a_disk_that_has_a_twin_is_refused(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = layout.inspect(Host(), disk)
    seen = dataclasses.replace(found, wwn="eui.1")
    twin = dataclasses.replace(found, path=Path("/dev/twin"), name="twin")
    monkeypatch.setattr(layout, "_others", lambda disk: [twin])
    words = f"has the serial '{found.serial}', as /dev/twin has: take out the one that is not meant"
    for check in (layout.check_usable, layout.check_free):
        with pytest.raises(Failure, match=words):
            check(Host(), found)
    # Names of their own tell them apart, but not for who names a disk by its serial alone.
    twin = dataclasses.replace(twin, wwn="eui.2")
    layout.check_usable(Host(), seen)
    layout.check_usable(Host(), seen, Consent(seen.word, serial_is_enough=True))
    with pytest.raises(Failure, match=words):
        layout.check_usable(Host(), seen, Consent(seen.serial, serial_is_enough=True))


def test_serials_and_transports(tmp_path: Path) -> None:
    usb = tmp_path / "devices/pci0/usb1/1-2"
    scsi = usb / "1-2:1.0/host3/target3:0:0/3:0:0:0"
    (scsi / "block/sdx").mkdir(parents=True)
    (scsi / "block/sdx/device").symlink_to(scsi)
    (usb / "idVendor").write_text("1234\n")
    (usb / "serial").write_text("STICK 1\x1b[\n")
    folder = scsi / "block/sdx"
    assert (layout.own_serial(folder), layout.transport(folder)) == ("STICK 1[", "usb")
    (scsi / "vpd_pg80").write_bytes(b"\0\x80\0\x08S3RIAL\x1b ")
    assert layout.own_serial(folder) == "S3RIAL"
    nvme = tmp_path / "devices/pci0/nvme/nvme0/nvme0n1"
    nvme.mkdir(parents=True)
    assert (layout.own_serial(nvme), layout.transport(nvme)) == ("", "nvme")


# --- The word --------------------------------------------------------------------------------------------


def refused(disk: Path, consent: Consent, words: str) -> None:
    before = disk.read_bytes()[: 2 << 20] if disk.stat().st_size else b""
    with pytest.raises(Failure, match=words) as caught:
        layout.check_usable(Host(), layout.inspect(Host(), disk), consent)
    assert "\n" not in str(caught.value)
    assert (disk.read_bytes()[: 2 << 20] if before else b"") == before


def test_the_word_is_of_the_disk_as_it_was_shown(disk: Path) -> None:
    run("sfdisk", disk, data="label: gpt\nsize=100MiB\n")
    shown = layout.inspect(Host(), disk)
    layout.check_usable(Host(), shown, Consent(shown.word))
    refused(disk, Consent(), f"say --erase {shown.word}")
    refused(disk, Consent(shown.serial), f"wants the word {shown.word}")
    run("sfdisk", disk, data="label: gpt\nsize=100MiB\nsize=100MiB\n")
    refused(disk, Consent(shown.word), "has other partition tables or signatures than when")
    other = dataclasses.replace(shown, size=9 * GIB)
    refused(disk, Consent(other.word), "has another size than when")
    other = dataclasses.replace(shown, serial="ANOTHER")
    refused(disk, Consent(other.word), "has the serial '.*', not that of 'ANOTHER-")
    refused(disk, Consent("\x1b[2J"), "not '.2J'")


def test_a_word_is_one_that_a_person_can_type() -> None:
    made = layout.Disk(Path("/dev/x"), "x", 8 * GIB, 512, False, "t10.ATA  \u00e9 a-b'$(x)\"", "", "")
    word = dataclasses.replace(made, fingerprint="ab" * 32).word
    assert word.startswith("t10.ATA_a_b_x_-")
    assert word.endswith("ababababab")


def test_members_want_a_word_more(disk: Path) -> None:
    luks(disk)
    word = layout.inspect(Host(), disk).word
    refused(
        disk, Consent(word), r"encrypted .* \(the whole disk, 8192 MiB: crypto_LUKS\): .*--erase-members"
    )
    refused(disk, Consent(None, members=True), "say --erase")
    layout.check_usable(Host(), layout.inspect(Host(), disk), Consent(word, members=True))


def test_a_serial_alone_is_enough_for_answers_but_loses_no_machine(disk: Path) -> None:
    run("mkfs.ext4", "-q", disk)
    bare = Consent(disk.name, serial_is_enough=True)
    layout.check_usable(Host(), layout.inspect(Host(), disk), bare)
    plan = layout.make_plan(layout.inspect(Host(), disk))
    layout.write(Host(), plan)
    layout.check_usable(Host(), layout.inspect(Host(), disk), Consent())  # it is ours, and unfinished
    layout.wait_for_devices(Host(), plan)
    layout.take_id(Host(), plan)
    layout.wipe_mark(Host(), plan)
    luks(disk, plan.named("machine-config").start)
    found = layout.inspect(Host(), disk)
    assert ("crypto_LUKS", False) in {(row.holds, row.member) for row in found.rows}
    refused(disk, bare, "holds an installed machine, and its serial alone")
    layout.check_usable(Host(), found, Consent(found.word, serial_is_enough=True))


@pytest.mark.parametrize(
    "kind",
    ["e75caf8f-f680-4cee-afa3-b001e56efc2d", "aa31e02a-400f-11db-9590-000c2911d1b8",
     "4fbd7e29-9d25-41b8-afd0-062c0ceff05d", "52414944-0000-11aa-aa11-00306543ecac"],
)  # fmt: skip
def test_partitions_that_are_members_by_their_type(disk: Path, kind: str) -> None:
    run("sfdisk", disk, data=f"label: gpt\nsize=100MiB, type={kind}\n")
    assert len(members(disk)) == 1
    run("sfdisk", "--wipe=always", disk, data="label: dos\nsize=100MiB, type=42\nsize=100MiB, type=fb\n")
    assert len(members(disk)) == 2


def test_a_btrfs_on_many_disks_is_a_member(disk: Path, memory: Path, need: Callable[..., None]) -> None:
    need("mkfs.btrfs")
    run("mkfs.btrfs", "--quiet", "--force", disk)
    assert (members(disk), said(disk)) == ([], ["the whole disk, 8192 MiB: btrfs"])
    with loop(memory / "second", 1 << 30) as second:
        run("mkfs.btrfs", "--quiet", "--force", "-d", "raid0", "-m", "raid1", disk, second)
    assert members(disk) == ["the whole disk, 8192 MiB: btrfs"]


@pytest.mark.parametrize(("start", "size"), [(2048, 4_000_000_000), (16_777_215, 5), (4_000_000_000, 2048)])
def test_a_table_of_a_larger_disk(disk: Path, start: int, size: int) -> None:
    """A copy on a smaller disk, which nobody would get rid of by this medium."""
    entry = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", start, size)
    put(disk, 446, entry.ljust(64, b"\0") + b"\x55\xaa")
    assert said(disk) == [f"partition 1, {size >> 11} MiB: Linux"]
    found = layout.look(Host(), disk)
    assert found is not None
    assert (found.unusable, found.content) == ("", f"1 partitions ({size >> 11} MiB)")
    layout.check_usable(Host(), found, Consent(found.word))


def table(count: int, each: int, other: int = 1) -> bytes:
    """Return the header of a GPT that announces so many entries."""
    head = struct.pack("<8sIIIIQQQQ16s", b"EFI PART", 0x10000, 92, 0, 0, 1, other, 34, 99, b"")
    return head + struct.pack("<QIII", 2, count, each, 0)


@pytest.mark.parametrize("each", [128, 1 << 20, 1])
@pytest.mark.parametrize("place", ["first", "last", "named by the first"])
def test_a_table_without_end_is_not_read(disk: Path, place: str, each: int) -> None:
    blocks = {"first": 1, "last": (8 * GIB >> 9) - 1, "named by the first": 5000}
    put(disk, 512, table(128, 128, 5000))
    put(disk, blocks[place] * 512, table(1025, each))
    found = layout.look(Host(), disk)
    assert found is not None
    assert found.unusable == f"has a table of 1025 partitions of {each} bytes each, too much to look at"


def test_a_table_may_be_larger_than_usual(disk: Path) -> None:
    run("sfdisk", disk, data="label: gpt\ntable-length: 1024\nsize=1MiB\n")
    assert said(disk) == ["partition 1, 1 MiB: Linux"]


# --- Between looking and acting --------------------------------------------------------------------------


def test_what_changed_since_it_was_looked_at_is_not_written_to(disk: Path) -> None:
    plan = layout.make_plan(layout.inspect(Host(), disk))
    for offset in (0, 4096, layout.MARK_OFFSET, layout.EDGES - 1, 8 * GIB - layout.EDGES, 8 * GIB - 1):
        put(disk, offset, b"?")
        with pytest.raises(Failure, match="changed since it was looked at .*: nothing was written"):
            layout.write(Host(), plan)
        put(disk, offset, b"\0")
    layout.write(Host(), plan)


def test_what_came_into_a_partition_since_it_was_looked_at_is_not_lost(disk: Path) -> None:
    run("sfdisk", disk, data="label: gpt\nsize=100MiB\n")
    before = layout.inspect(Host(), disk)
    consent = Consent(before.word, members=True)
    layout.check_usable(Host(), before, consent)
    luks(disk, 1 << 20)
    refused(disk, consent, "has other partition tables or signatures than when .* was shown")
    with pytest.raises(Failure, match="changed since it was looked at .*: nothing was written"):
        layout.write(Host(), layout.make_plan(before))


def test_another_disk_in_the_same_place(disk: Path, memory: Path) -> None:
    plan = layout.make_plan(layout.inspect(Host(), disk))
    run("losetup", "--detach", disk)
    run("truncate", "--size", "8G", memory / "other")
    run("losetup", "--partscan", disk, memory / "other")
    acts: list[Callable[[], None]] = [lambda: layout.write(Host(), plan), lambda: hold(plan)]
    for act in acts:
        with pytest.raises(
            Failure, match=r"another disk than .* \(its sequence number was .*nothing was writ"
        ):
            act()
    assert (memory / "other").stat().st_blocks == 0


def hold(plan: layout.Plan) -> None:
    with layout.held(Host(), plan.disk):
        raise AssertionError("another disk is held")


def test_a_disk_that_is_gone(disk: Path) -> None:
    plan = layout.make_plan(
        dataclasses.replace(layout.inspect(Host(), disk), path=Path("/dev/mosinit-none"))
    )
    with pytest.raises(Failure, match="is gone since it was looked at"):
        layout.write(Host(), plan)


@pytest.mark.parametrize("what", ["serial", "wwn", "size", "number"])
def test_a_disk_that_says_something_else(disk: Path, what: str) -> None:
    seen = layout.inspect(Host(), disk)
    other = dataclasses.replace(seen, **{what: 16 * GIB if what == "size" else "other"})  # type: ignore[arg-type]
    with pytest.raises(Failure, match="is another disk than the one that was looked at"):
        layout.write(Host(), layout.make_plan(other))
    assert layout.inspect(Host(), disk) == seen


def test_a_mark_that_was_copied_lets_nothing_be_lost(disk: Path) -> None:
    host = Host()
    plan = layout.make_plan(layout.inspect(host, disk))
    layout.write(host, plan)
    assert layout.inspect(host, disk).unfinished
    other = dataclasses.replace(plan.disk, size=16 * GIB)
    put(disk, layout.MARK_OFFSET, layout.mark(other))
    assert not layout.inspect(host, disk).unfinished
    put(disk, layout.MARK_OFFSET, layout.mark(dataclasses.replace(plan.disk, serial="a serial of its own")))
    assert not layout.inspect(host, disk).unfinished
    put(disk, layout.MARK_OFFSET, layout.mark(plan.disk))
    assert layout.inspect(host, disk).unfinished


@pytest.mark.parametrize("use", ["lvm", "ms-dos", "gpt", "luks"])
def test_a_disk_that_was_used_since_an_installation_was_broken_off(disk: Path, use: str) -> None:
    plan = layout.make_plan(layout.inspect(Host(), disk))
    layout.write(Host(), plan)
    assert layout.inspect(Host(), disk).unfinished
    uses: dict[str, Callable[[], None]] = {
        "lvm": lambda: without_tables(disk, (512, LVM)),
        "ms-dos": lambda: run("sfdisk", "--wipe=always", disk, data="label: dos\nsize=1GiB, type=83\n"),
        # Its table goes on to be used: the disk keeps its id.
        "gpt": lambda: run("sfdisk", "--wipe=always", disk, data=f"{same_id()}size=1GiB, type=L\n"),
        "luks": lambda: luks(disk, plan.named("esp").start),
    }
    uses[use]()
    found = layout.inspect(Host(), disk)
    assert (found.unfinished, found.complete, bool(found.rows)) == (False, "", True)
    refused(disk, Consent(), "to lose all of it, say --erase")


def same_id() -> str:
    return f"label: gpt\nlabel-id: {layout.UNFINISHED}\n"


def without_tables(disk: Path, *signatures: tuple[int, bytes]) -> None:
    run("wipefs", "--all", "--quiet", disk)
    for offset, data in signatures:
        put(disk, offset, data)


# --- What is no disk -------------------------------------------------------------------------------------


def test_names_that_lead_nowhere(tmp_path: Path, disk: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(Failure, match="there is no disk .*Too many levels of symbolic links"):
        layout.inspect(Host(), tmp_path / "a")
    (tmp_path / "disk").symlink_to(disk)
    assert layout.inspect(Host(), tmp_path / "disk").path == disk
