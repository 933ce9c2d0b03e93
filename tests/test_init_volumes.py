"""Volumes of cryptsetup, opened by the bring-up's own code on a kernel that can: User Mode Linux."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from mosinit import init
from mosinit.host import Host
from tests import uml, volumes

Need = Callable[..., None]
MIB = init.MIB
KINDS = {
    "config": (init.CONFIG_TYPE, 24), "store": (init.STORE_TYPE, 24), "scratch": (init.SCRATCH_TYPE, 32),
    "state": (init.LINUX_TYPE, 24),
}  # fmt: skip
UUIDS = {name: str(uuid.uuid5(uuid.NAMESPACE_DNS, name)) for name in KINDS}

MAKE = f"""
from pathlib import Path
from mosinit import luks
from mosinit.host import Host
from tests import volumes
host, uuids = Host(), {UUIDS!r}
for number, name in ((1, "config"), (2, "store"), (4, "state")):
    secret = bytearray(volumes.SECRET)
    key = secret if name == "config" else init.derive_key(secret, name, uuids[name])
    path, kind = Path(f"/dev/ubda{{number}}"), "config" if name == "config" else "plain"
    luks.format_volume(host, path, kind, uuids[name], key)
    if name == "config":
        luks.add_recovery(host, path, key, volumes.RECOVERY)
        assert luks.import_tokens(host, path, volumes.TOKENS).tokens == volumes.TOKENS
    typed = volumes.RECOVERY if name == "config" else key
    run("cryptsetup", "open", "--key-file", "-", path, name, data=typed)
    run("mke2fs", "-q", "-t", "ext4", f"/dev/mapper/{{name}}")
    os.makedirs(f"/mnt/{{name}}")
    k.mount(f"/dev/mapper/{{name}}", f"/mnt/{{name}}", "ext4", init.MountFlag(0))
    Path(f"/mnt/{{name}}/file").write_text(name * 100_000)
    os.symlink("file", f"/mnt/{{name}}/link")
    k.unmount(f"/mnt/{{name}}")
    run("cryptsetup", "close", name)
"""

OPEN = """
import contextlib
from pathlib import Path
from tests import volumes
for folder in (init.CONFIG, init.STORE, init.SCRATCH, "/var-of-hostfs"):
    os.makedirs(folder)
with contextlib.ExitStack() as owned:
    disk = init.BootDisk("ubda", init._read_gpt(k, "ubda"))
    fd, _ = init.open_partition(k, disk, init.CONFIG_TYPE)
    header = init.read_luks_header(k, fd, "config")
    secret = bytearray(volumes.SECRET)
    try:
        opened = init.open_volumes(k, disk, init.Config(fd, header, secret), owned)
        init.mount_volumes(k, opened)
    except init.Refused as refused:
        print("refused", refused.check)
        raise SystemExit
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, need_uml: None) -> Path:
    """A disk with the four kinds of volumes."""
    folder = tmp_path_factory.mktemp("volumes")
    disk, start, rows = folder / "disk", MIB, ["label: gpt", "unit: sectors"]
    for name, (kind, size) in KINDS.items():
        place = f"start={start // 512}, size={size * MIB // 512}"
        rows.append(f"{place}, type={kind}, name={name}, uuid={UUIDS[name]}")
        start += size * MIB
    with disk.open("wb") as file:
        file.truncate(start + MIB)
    Host().run(["sfdisk", "--quiet", disk], stdin="".join(f"{row}\n" for row in rows).encode())
    uml.run(folder, MAKE, [disk])
    return disk


@pytest.fixture(scope="module")
def need_uml() -> None:
    if shutil.which("linux.uml") and os.geteuid() == 0:
        return
    (pytest.fail if os.environ.get("MOSINIT_REQUIRE_TOOLS") == "1" else pytest.skip)("needs linux.uml, root")


def spoiled(made: Path, folder: Path, changes: dict[int, bytes]) -> Path:
    """Copy the disk and change bytes of it."""
    disk = folder / "disk"
    Host().run(["cp", "--sparse=always", made, disk])
    with disk.open("r+b") as file:
        for at, data in changes.items():
            file.seek(at)
            file.write(data)
    return disk


def test_the_volumes_of_an_installed_machine_open_and_mount(made: Path, tmp_path: Path) -> None:
    program = """
init.mount_ext4(k, opened.opened[init.STATE], "/var-of-hostfs", init.MountFlag.NOSUID | init.MountFlag.NODEV)
for folder, name in ((init.CONFIG, "config"), (init.STORE, "store"), ("/var-of-hostfs", "state")):
    assert Path(folder, "file").read_text() == name * 100_000, folder
for folder in (init.CONFIG, init.STORE):
    for path in ("link", "new"):
        try:
            Path(folder, path).write_text("x")
        except OSError as error:
            print(folder, path, error.errno)
for folder in (init.SCRATCH, "/var-of-hostfs"):
    Path(folder, "new").write_text("written")
assert secret == volumes.SECRET, "wiped by its owner, who is not open_volumes"
print(Path("/run/mosinit/volume-secret").read_bytes().hex())
print(*(line for line in Path("/proc/mounts").read_text().splitlines() if "ext4" in line), sep="\\n")
print(run("dmsetup", "table", "--showkeys").decode())
print([row["name"] for row in k.report.stages])
"""
    shown = uml.run(tmp_path, OPEN + program, [spoiled(made, tmp_path, {})])
    text = "\n".join(shown)
    for folder in (init.CONFIG, init.STORE):
        assert f"{folder} link 40" in shown and f"{folder} new 30" in shown  # ELOOP, EROFS
    key = init.derive_key(bytearray(volumes.SECRET), "service")
    assert key.hex() in shown
    mounts = {words[1]: set(words[3].split(",")) for words in map(str.split, shown) if "ext4" in words}
    strict = {"ro", "nosuid", "nodev", "noexec", "nosymfollow"}
    assert strict <= mounts[init.CONFIG] and strict <= mounts[init.STORE]
    assert {"rw", "nosuid", "nodev", "noexec"} <= mounts[init.SCRATCH]
    assert {"rw", "nosuid", "nodev"} <= mounts["/var-of-hostfs"]
    # Whoever may read the tables reads where a key was, and no key.
    assert "mosinit-config: 0" in text and ":96:logon:cryptsetup:" in text
    assert text.count(":64:logon:cryptsetup:") == 2 and ":64:user:mosinit-scratch" in text


def test_a_journal_on_a_disk_in_clear_is_not_replayed(need_uml: None, tmp_path: Path) -> None:
    """The file system of a volume names another disk for its journal; that disk is changed from outside."""
    disks = [tmp_path / name for name in ("volume", "clear")]
    for disk in disks:
        with disk.open("wb") as file:
            file.truncate(24 * MIB)
    shown = uml.run(tmp_path, JOURNAL, disks)
    assert shown[-1] == "refused VOLUME-READ"


JOURNAL = """
run("mke2fs", "-q", "-F", "-b", "4096", "-O", "journal_dev", "/dev/ubdb")
run("mke2fs", "-q", "-F", "-b", "4096", "-t", "ext4", "-J", "device=/dev/ubdb", "/dev/ubda")
os.makedirs("/mnt/volume")
k.mount("/dev/ubda", "/mnt/volume", "ext4", init.RO_STRICT)  # the premise: the kernel takes it
k.unmount("/mnt/volume")
try:
    init.mount_ext4(k, "/dev/ubda", "/mnt/volume", init.RO_STRICT)
except init.Refused as refused:
    print("refused", refused.check)
"""


def place(name: str) -> int:
    """Return where a partition begins."""
    return MIB * (1 + sum(size for _, size in list(KINDS.values())[: list(KINDS).index(name)]))


def test_volumes_that_were_exchanged_do_not_open(made: Path, tmp_path: Path) -> None:
    """The whole of store and state, header and all; then their entries in the partition table."""
    raw = made.read_bytes()
    store, state = (raw[place(name) : place(name) + 24 * MIB] for name in ("store", "state"))
    disk = spoiled(made, tmp_path, {place("store"): state, place("state"): store})
    assert "refused VOLUME-KEY" in uml.run(tmp_path, OPEN, [disk])
    Host().run(["sfdisk", "--quiet", "--no-reread", "--part-uuid", disk, "2", str(uuid.uuid4())])
    Host().run(["sfdisk", "--quiet", "--no-reread", "--part-uuid", disk, "4", UUIDS["store"]])
    Host().run(["sfdisk", "--quiet", "--no-reread", "--part-uuid", disk, "2", UUIDS["state"]])
    assert "refused VOLUME-KEY" in uml.run(tmp_path, OPEN, [disk])


def test_a_changed_block_of_config_is_no_content(made: Path, tmp_path: Path) -> None:
    raw = made.read_bytes()[place("config") : place("config") + 24 * MIB]
    begin = raw.index(b"integrt\0") // 4096 + 1
    blocks = range(begin, len(raw) // 4096)
    # The data area, not journal and tags: wherever the file system's first blocks lie.
    changes = {place("config") + 4096 * block + 100: b"\x5a" * 16 for block in blocks if block % 2}
    shown = uml.run(tmp_path, OPEN + "\nprint('opened')", [spoiled(made, tmp_path, changes)])
    assert "refused VOLUME-READ" in shown
    assert "opened" not in shown
