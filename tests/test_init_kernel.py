"""The core's seam against the real kernel of this host: loops, overlays, paths. Needs root."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
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
