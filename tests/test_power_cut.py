"""The power fails while a machine is installed: every write of an installation is recorded by dm-log-writes,
in User Mode Linux, and the disk is looked at as it is after each of them.

At any moment either firmware finds no boot loader, or all of the machine is there. Until then the same
command takes the disk again or finishes it; from then on nobody takes it without a word.
"""

from __future__ import annotations

import pickle
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mosinit import init, layout
from mosinit.esp import STARTED
from mosinit.host import Failure, Host
from tests import installation, uml
from tests.installation import TOOLS, NativeInstaller, Setting
from tests.test_install_uml import BOOT
from tests.test_layout import loop

SECTOR = 512
# linux/drivers/md/dm-log-writes.c
SUPER, ENTRY = struct.Struct("<QQQI"), struct.Struct("<QQQQ")
MAGIC, DISCARD, MARK = 0x6A736677736872, 4, 8

# The disk is a loop device, which has partitions, over the device that records, over /dev/ubda.
INSTALL = """
import pickle
from pathlib import Path
from mosinit import install
for name in ("nls_cp437", "nls_ascii", "nls_iso8859-1", "vfat", "dm-log-writes"):
    run("modprobe", "--set-version", os.uname().release, "--dirname", "/run/m", name)
run("dmsetup", "create", "logged", "--table", "0 {sectors} log-writes /dev/ubda /dev/ubdb")
attach = ["losetup", "--find", "--show", "--partscan", "--direct-io=on", "/dev/mapper/logged"]
disk = run(*attach).decode().strip()
class Installer(install.Installer):
    def say(self, text):
        if (step := text.split(":")[0]) in install.ACTS:
            run("dmsetup", "message", "logged", "0", "mark", step.replace(" ", "-"))
    def check_layer(self, machine, name, layer, signature):
        assert machine.exists(init.blob_path(layer.digest))
options, provisioned = pickle.loads(Path({needed!r}).read_bytes())
options = install.Options(**{{**vars(options), "disk": Path(disk)}})
host = Installer()
planned, release, policy = install.plan(host, options)
closing = install.Closing("closed")
done = install.act(host, planned, release, policy, provisioned, options.loader, closing)
run("losetup", "--detach", disk)
run("dmsetup", "remove", "--retry", "logged")
print("installed")
print(done["generation"], done["boot entry"])
"""

UNENDED = ("disk-id", "start", "boot-entry")  # steps behind the TPM's, which the same command goes on with


@dataclass(frozen=True)
class Write:
    """A write to the disk; or a mark, with the step that begins."""

    sector: int
    data: bytes
    mark: str


def read_log(path: Path) -> Iterator[Write]:
    """Yield what was recorded, in the order in which the disk had it."""
    with path.open("rb") as log:
        magic, version, count, size = SUPER.unpack(log.read(SUPER.size))
        assert (magic, version, size) == (MAGIC, 1, SECTOR)
        log.seek(SECTOR)
        for _ in range(count):
            block = log.read(SECTOR)
            sector, sectors, flags, length = ENTRY.unpack(block[: ENTRY.size])
            if flags & MARK:
                yield Write(0, b"", block[ENTRY.size : ENTRY.size + length].rstrip(b"\0").decode())
            elif not flags & DISCARD and sectors:
                yield Write(sector, log.read(sectors * SECTOR), "")


class Disk:
    """A disk image to which recorded writes are done, one sector after the other where that matters."""

    def __init__(self, image: Path, serial: str = "ubda") -> None:
        self.image, self.serial, self.host = image, serial, Host()
        self.size = image.stat().st_size
        self.file = image.open("r+b", buffering=0)

    def put(self, sector: int, data: bytes) -> None:
        self.file.seek(sector * SECTOR)
        self.file.write(data)

    def esp(self) -> init.Partition | None:
        """Return the EFI system partition if firmware sees a valid table."""
        head = self.host.read_at(self.file.fileno(), SECTOR, SECTOR + 16384)
        try:
            parts = init.parse_gpt(head[:SECTOR], head[SECTOR:], SECTOR, self.size // SECTOR)
        except init.Refused:
            return None
        return next((part for part in parts if part.kind == init.ESP_TYPE), None)

    def loader(self) -> bytes | None:
        """Return what firmware would start; an empty file is nothing."""
        esp = self.esp()
        if esp is None:
            return None
        command = ["mcopy", "-n", "-i", f"{self.image}@@{esp.start}", f"::{STARTED}", "-"]
        done = subprocess.run(command, capture_output=True, check=False)
        return done.stdout or None if done.returncode == 0 else None

    def asks(self) -> str:
        """Return what an installation would want to be told before it takes this disk."""
        content, unfinished, _ = self._look()
        return "" if unfinished else content

    def complete(self) -> bool:
        """Say whether the same command finishes it, with the TPM that was closed for it."""
        return bool(self._look()[2])

    def _look(self) -> tuple[str, bool, str]:
        disk = layout.Disk(self.image, "ubda", self.size, SECTOR, False, self.serial, "", "")
        return layout._content(disk, *layout.read_ends(self.host, self.file.fileno(), self.size))


def pieces(write: Write, disk: Disk) -> Iterator[tuple[int, bytes]]:
    """Cut a write where it may be torn in a way that matters: at every sector of tables and folders."""
    edge = layout.EDGES // SECTOR
    last = disk.size // SECTOR - edge
    small = len(write.data) <= 64 * SECTOR and (write.sector < edge or write.sector >= last)
    step = (
        SECTOR if small else 64 * SECTOR if write.sector < edge or write.sector >= last else len(write.data)
    )
    for at in range(0, len(write.data), step):
        yield write.sector + at // SECTOR, write.data[at : at + step]


@pytest.fixture
def recorded(
    need: Callable[..., None], host: Host, memory: Path, tmp_path: Path
) -> tuple[Setting, Disk, Path, str]:
    """Setting, the disk before (of an installation that was broken off), the log, the generation."""
    need("linux.uml", "dmsetup", "mcopy", *TOOLS)
    made = installation.setting(host, tmp_path)
    with loop(memory / "disk") as device:
        layout.write(host, layout.make_plan(layout.inspect(host, device)))
    subprocess.run(["cp", "--sparse=always", memory / "disk", memory / "replayed"], check=True)
    with (memory / "log").open("wb") as file:
        file.truncate(4 << 30)
    options = installation.options(made, Path("/dev/none"), state=64 * init.MIB)
    (tmp_path / "needed").write_bytes(pickle.dumps((options, made.provisioned)))
    program = INSTALL.format(needed=str(tmp_path / "needed"), sectors=layout.SMALLEST // SECTOR)
    printed = uml.run(tmp_path, program, [memory / "disk", memory / "log"], 300)
    generation, entry = printed[-1].split()
    assert entry == "None"  # that machine has no firmware
    return made, Disk(memory / "replayed"), memory / "log", generation


def boots(made: Setting, image: Path, folder: Path, generation: str) -> None:
    """See that the bring-up opens and verifies all of a disk."""
    policy = made.left / "policy.json"
    policy.write_text(policy.read_text().replace('"live"', '"run"'))
    try:
        program = BOOT.format(needed=str(folder / "needed"), uki_id=installation.RUN_ID.encode())
        assert uml.run(folder, program, [image])[-1] == f"{generation} 7"
    finally:
        policy.write_text(policy.read_text().replace('"run"', '"live"'))


def test_no_moment_leaves_half_a_machine(
    recorded: tuple[Setting, Disk, Path, str], memory: Path, tmp_path: Path
) -> None:
    made, disk, log, generation = recorded
    step, steps, complete, checked = "", [], 0, 0
    machine = "5 partitions (512 MiB, 128 MiB, 3775 MiB, 1887 MiB, 64 MiB)"
    for write in read_log(log):
        if write.mark:
            step = write.mark
            steps.append(step)
            if step in ("machine-store", "reading-everything-back"):
                taken_again(made, disk, memory)
            continue
        for sector, data in pieces(write, disk):
            disk.put(sector, data)
            esp = disk.esp()
            in_esp = esp is not None and esp.start <= sector * SECTOR < esp.start + esp.size
            edges = not layout.EDGES <= sector * SECTOR < disk.size - layout.EDGES
            if not edges and not in_esp:
                continue
            checked += 1
            loader = disk.loader()
            assert disk.complete() or step not in UNENDED, f"{step}: nobody finishes it at sector {sector}"
            if loader is None:
                assert complete == 0, "a boot loader that was there is gone"
                # Its own id comes before the boot loader's name: between them the same command finishes it.
                given_id = step in ("disk-id", "start") and disk.complete()
                assert disk.asks() == "" or given_id, f"{step}: {disk.asks()} at sector {sector}"
                continue
            assert step in ("start", "boot-entry", "mark")
            assert loader == installation.LOADER
            # The TPM may be cleared at any time later: what has started is lost only for who says so.
            assert disk.asks() == machine, f"{step}: taken without a word at sector {sector}"
            complete += 1
            if complete == 1:
                boots(made, copy_of(disk, memory), tmp_path, generation)
    assert steps[1:6] == ["machine-config", "machine-store", "state", "esp", "reading-everything-back"]
    assert steps[6:11] == ["TPM", *UNENDED, "mark"]
    assert (checked > 100, complete > 10) == (True, True)
    assert (disk.asks(), disk.complete()) == (machine, False)
    boots(made, copy_of(disk, memory), tmp_path, generation)


def copy_of(disk: Disk, memory: Path) -> Path:
    target = memory / "copy"
    target.unlink(missing_ok=True)
    subprocess.run(["cp", "--sparse=always", disk.image, target], check=True)
    return target


def taken_again(made: Setting, disk: Disk, memory: Path) -> None:
    """See that the same command installs on a disk as it is now."""
    with loop(copy_of(disk, memory)) as device:
        installation.run(NativeInstaller(), made, device)
        with pytest.raises(Failure, match="to lose all of it"):
            installation.run(NativeInstaller(), made, device)
    (memory / "copy").unlink()
