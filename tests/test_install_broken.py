"""A disk breaks while a machine is installed on it, in User Mode Linux: from one step on reads and writes
fail, as when its cable is pulled; or a part of it cannot be read or written.

The command says so in one line, and the same command finishes once the disk is whole again.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mosinit import layout
from mosinit.host import Host
from tests import installation, uml
from tests.installation import TOOLS

SECTOR = 512

# The disk is a loop device, which has partitions, over a mapping that breaks, over /dev/ubda.
PROGRAM = """
import hashlib, pickle
from pathlib import Path
from mosinit import install, layout, luks
for name in ("nls_cp437", "nls_ascii", "nls_iso8859-1", "vfat"):
    run("modprobe", "--set-version", os.uname().release, "--dirname", "/run/m", name)
SECTORS = {sectors}
WHOLE = f"0 {{SECTORS}} linear /dev/ubda 0"
def table(words):
    run("dmsetup", "load", "disk", "--table", words)
    run("dmsetup", "resume", "--noflush", "disk")
run("dmsetup", "create", "disk", "--table", WHOLE)
class Installer(install.Installer):
    failing = ""
    def say(self, text):
        if self.failing and text.startswith(self.failing):
            table(f"0 {{SECTORS}} error")
    def format_volume(self, path, kind, uuid, key, recovery):
        luks.format_volume(self, path, kind, uuid, key)
    def check_layer(self, machine, name, layer, signature):
        assert machine.exists(init.blob_path(layer.digest))
def attach():
    words = ("--find", "--show", "--partscan", "--direct-io=on", "/dev/mapper/disk")
    return run("losetup", *words).decode().strip()
def other():
    return hashlib.sha256(Path("/dev/ubdb").read_bytes()).hexdigest()
options, provisioned = pickle.loads(Path({needed!r}).read_bytes())
untouched = other()
def attempt(host, disk):
    given = install.Options(**{{**vars(options), "disk": Path(disk)}})
    planned, release, policy = install.plan(host, given)
    closing = install.Closing("closed")
    return install.act(host, planned, release, policy, provisioned, given.loader, closing)
def broken(disk, failing=""):
    host = Installer()
    host.failing = failing
    try:
        attempt(host, disk)
    except (install.Failure, init.Refused) as error:
        print("said:", failing, "|", str(error).replace("\\n", "NEWLINE"))
    else:
        print("said: nothing", failing)
for step in {steps!r}:
    disk = attach()
    broken(disk, step)
    left = sorted(path.name for path in Path("/dev/mapper").glob(f"{{install.OPENED}}*"))
    install._close(Installer(), left)
    run("losetup", "--detach", disk)
    table(WHOLE)
# A part that neither reads nor writes: in the middle of what becomes the store.
hole = 700 << 11
table("\\n".join((f"0 {{hole}} linear /dev/ubda 0", f"{{hole}} 262144 error",
                f"{{hole + 262144}} {{SECTORS - hole - 262144}} linear /dev/ubda {{hole + 262144}}")))
disk = attach()
broken(disk)
run("losetup", "--detach", disk)
table(WHOLE)
disk = attach()
broken(disk, "start")
run("losetup", "--detach", disk)
table(WHOLE)
# Where the disk has its own id, only what is missing is done: as `install.resume` does it, with a TPM.
host, disk = Installer(), attach()
broken(disk)
found = layout.inspect(host, Path(disk))
planned = layout.plan_of(host, found)
layout.wait_for_devices(host, planned)
install.let_start(host, planned)
layout.wipe_mark(host, planned)
after = layout.inspect(host, Path(disk))
print("done:", len(found.complete), found.unfinished, bool(after.complete), untouched == other())
"""
STEPS = ("partitions", "machine-config", "machine-store", "esp", "reading everything", "TPM", "disk id")


@pytest.fixture
def said(need: Callable[..., None], host: Host, memory: Path, tmp_path: Path) -> list[str]:
    """What was printed, attempt by attempt."""
    need("linux.uml", "dmsetup", *TOOLS)
    made = installation.setting(host, tmp_path)
    for name, size in (("disk", layout.SMALLEST), ("other", 4 << 20)):
        with (memory / name).open("wb") as file:
            file.write(name.encode() * 100)
            file.truncate(size)
    with (memory / "disk").open("r+b") as file:
        file.write(bytes(1000))
    options = installation.options(made, Path("/dev/none"))
    (tmp_path / "needed").write_bytes(pickle.dumps((options, made.provisioned)))
    program = PROGRAM.format(needed=str(tmp_path / "needed"), sectors=layout.SMALLEST // SECTOR, steps=STEPS)
    printed = uml.run(tmp_path, program, [memory / "disk", memory / "other"], 400)
    found = [re.search(r"(said|done): .*", line) for line in printed]
    return [line[0] for line in found if line]


def test_a_disk_that_breaks_is_told_in_one_line_and_taken_again(said: list[str]) -> None:
    assert said[-1] == "done: 68 False False True"
    assert len(said) == len(STEPS) + 4
    assert "to lose all of it" in said[-2]
    for line in said[:-2]:
        assert "NEWLINE" not in line
        assert "nothing" not in line
        assert re.search(
            r"/dev/loop\d+ is not installed \(.*\): run this command again, or name another", line
        )
