"""The core's seam against the real kernel of this host: loops, overlays, paths. Needs root."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from mosinit import init

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="loop devices and mounts need root")


@pytest.fixture
def k() -> init.Kernel:
    return init.Kernel()


def test_a_loop_is_read_only_in_blocks_of_4096(k: init.Kernel, tmp_path: Path) -> None:
    file = tmp_path / "layer"
    file.write_bytes(os.urandom(12288))
    try:
        loop, size = k.attach_loop(str(file))
    except FileNotFoundError:
        pytest.skip("this host has no loop devices")
    try:
        assert (size, k.device_size(loop)) == (12288, (12288, 4096))
        assert k.read_at(loop, 4096, 512) == file.read_bytes()[4096:4608]
        with pytest.raises(OSError, match="only 0 of 512"):
            k.read_at(loop, 12288, 512)
        writer = os.open(os.readlink(f"/proc/self/fd/{loop}"), os.O_WRONLY)
        with pytest.raises(OSError):
            os.pwrite(writer, bytes(4096), 0)
        os.close(writer)
    finally:
        k.close(loop)


def test_no_loop_is_waited_for(k: init.Kernel, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError):
        k.attach_loop(str(tmp_path / "fifo"))


def test_a_loop_follows_no_link(k: init.Kernel, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(bytes(4096))
    with pytest.raises(OSError) as error:
        k.attach_loop(str(tmp_path / "link"))
    assert error.value.errno == errno.ELOOP


@pytest.fixture
def layers(k: init.Kernel, tmp_path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Seventy layers with odd names on a file system of their own, and where to mount them."""
    k.mount("tmpfs", str(tmp_path), "tmpfs", init.SAFE)
    names = [f"{number:02d}:,\\ x" for number in range(70)]
    for name in names:
        (tmp_path / "layers" / name).mkdir(parents=True)
        (tmp_path / "layers" / name / "top").write_text(name)
        (tmp_path / "layers" / name / f"of-{name[:2]}").write_text("")
    (tmp_path / "root").mkdir()
    yield tmp_path, [str(tmp_path / "layers" / name) for name in names]
    k.unmount(str(tmp_path), lazy=True)


def test_seventy_layers_stack_first_on_top(k: init.Kernel, layers: tuple[Path, list[str]]) -> None:
    folder, lowers = layers
    options = {"redirect_dir": "nofollow", "metacopy": "off", "index": "off", "xino": "off"}
    k.mount_overlay(str(folder / "root"), lowers, options, read_only=True)
    assert (folder / "root/top").read_text().startswith("00:")
    assert len(os.listdir(folder / "root")) == 71
    with pytest.raises(OSError) as error:
        (folder / "root/new").write_text("")
    assert error.value.errno == errno.EROFS
    k.unmount(str(folder / "root"))


def test_a_writable_layer_takes_all_writes(k: init.Kernel, layers: tuple[Path, list[str]]) -> None:
    folder, lowers = layers
    for name in ("upper", "work"):
        (folder / name).mkdir()
    options = {"upperdir": str(folder / "upper"), "workdir": str(folder / "work")}
    k.mount_overlay(str(folder / "root"), lowers[:2], options, read_only=False)
    (folder / "root/top").write_text("changed")
    assert (folder / "upper/top").read_text() == "changed"
    assert Path(lowers[0], "top").read_text() != "changed"
    k.unmount(str(folder / "root"))


def test_a_bad_option_names_the_call(k: init.Kernel, layers: tuple[Path, list[str]]) -> None:
    folder, lowers = layers
    with pytest.raises(OSError, match="cannot call fsconfig"):
        k.mount_overlay(str(folder / "root"), lowers[:2], {"no-such-option": "1"}, read_only=True)


class Rooted(init.Machine):
    """A machine whose every path lies below a folder."""

    def __init__(self, top: Path) -> None:
        super().__init__()
        self.top = str(top)

    def read(self, path: str, limit: int = init.MIB) -> bytes:
        return super().read(self.top + path, limit)

    def write(self, path: str, data: bytes | bytearray, mode: int = 0o644) -> None:
        super().write(self.top + path, data, mode)

    def exists(self, path: str) -> bool:
        return super().exists(self.top + path)

    def make_folder(self, path: str, mode: int = 0o755) -> None:
        super().make_folder(self.top + path, mode)

    def read_in_root(self, root: str, path: str, size: int) -> tuple[int, bytes] | None:
        return super().read_in_root(self.top + root, path, size)

    def mount(
        self, source: str, target: str, fstype: str, flags: init.MountFlag = init.RO_SAFE, data: str = ""
    ) -> None:
        super().mount(source, self.top + target, fstype, flags, data)

    def unmount(self, target: str, *, lazy: bool = False) -> None:
        super().unmount(self.top + target, lazy=lazy)

    def mount_overlay(
        self, target: str, lowers: Sequence[str], options: Mapping[str, str], *, read_only: bool
    ) -> None:
        below = [self.top + lower for lower in lowers]
        moved = {key: self.top + value if value[0] == "/" else value for key, value in options.items()}
        super().mount_overlay(self.top + target, below, moved, read_only=read_only)


@pytest.fixture
def rooted(k: init.Kernel, tmp_path: Path) -> Iterator[Rooted]:
    """A machine with two layers, each a file system of its own, and something in /config/state."""
    k.mount("tmpfs", str(tmp_path), "tmpfs", init.MountFlag(0))
    files = {
        "config/state/etc/machine-id": "kept", "config/state/etc/shadow": "?",
        "config/state/etc/ssh/ssh_host_rsa_key": "key", "hostfs/etc/ssh/sshd_config": "config",
        "hostfs/etc/machine-id": "", "hostfs/sbin/init": "#!/sbin/init\n", "bootkit/usr/modules": "",
    }  # fmt: skip
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    (tmp_path / "hostfs/sbin/init").chmod(0o755)
    for name in ("sysroot", "scratch-writes"):
        (tmp_path / name).mkdir()
    for name in ("hostfs", "bootkit"):
        k.mount(str(tmp_path / name), str(tmp_path / name), "", init.MountFlag.BIND)
    yield Rooted(tmp_path)
    k.unmount(str(tmp_path), lazy=True)


@pytest.mark.parametrize("writable", ["all", "etc", "none"])
def test_what_a_machine_keeps_is_in_every_root(rooted: Rooted, tmp_path: Path, writable: str) -> None:
    layers = init.Mounted(("/hostfs", "/bootkit"), (), writable)
    assert init.stack(rooted, layers) == "/sbin/init"
    root = tmp_path / "sysroot"
    assert {path.name for path in (root / "etc").iterdir()} == {"machine-id", "ssh"}
    contents = [(root / "etc" / name).read_text() for name in ("machine-id", "ssh/sshd_config")]
    assert contents == ["kept", "config"]
    key = root / "etc/ssh/ssh_host_rsa_key"
    assert (key.read_text(), key.stat().st_mode & 0o777) == ("key", 0o600)
    assert can_write(root / "etc/new") is (writable != "none")
    assert can_write(root / "new") is (writable == "all")
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    assert not [point for point in points if point.startswith(f"{tmp_path}/run/")]


def can_write(path: Path) -> bool:
    try:
        path.write_text("")
    except OSError as error:
        assert error.errno == errno.EROFS
        return False
    return True


def test_links_in_a_root_stay_in_it(k: init.Kernel, tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/init").write_bytes(b"\x7fELF and more")
    (tmp_path / "usr/bin/init").chmod(0o755)
    (tmp_path / "sbin").symlink_to("/usr/bin")
    (tmp_path / "out").symlink_to("../../../../../../../../etc/passwd")
    (tmp_path / "abs").symlink_to("/etc/passwd")
    found = k.read_in_root(str(tmp_path), "/sbin/init", 4)
    assert found is not None
    assert (found[0] & 0o777, found[1]) == (0o755, b"\x7fELF")
    assert k.read_in_root(str(tmp_path), "/out", 4) is None
    assert k.read_in_root(str(tmp_path), "/abs", 4) is None
    assert k.read_in_root(str(tmp_path), "/usr", 4) == (os.stat(tmp_path / "usr").st_mode, b"")


def test_reading_is_bounded(k: init.Kernel, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    assert k.read(str(tmp_path / "file"), 100) == bytes(100)
    with pytest.raises(OSError, match="larger than 99"):
        k.read(str(tmp_path / "file"), 99)
    with pytest.raises(OSError, match="larger than"):
        k.read("/dev/zero", 4096)
    os.mkfifo(tmp_path / "fifo")  # nobody writes, and nobody waits for it
    assert k.read(str(tmp_path / "fifo")) == b""
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OSError):
        k.read(str(tmp_path / "link"))


def test_without_device_mapper_the_error_is_an_os_error(k: init.Kernel) -> None:
    if os.path.exists("/dev/mapper/control"):
        pytest.skip("this host has device-mapper")
    with pytest.raises(OSError):
        k.dm(init.DmCommand.DEV_CREATE, "mosinit-test")


def test_there_is_no_such_keyring(k: init.Kernel) -> None:
    assert k.keyring(".no-such-keyring") is None
