"""hostfs's cache and its inputs, with a recorded mkosi; the real one runs in vm-tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mosinit import hostfs, tools
from mosinit.host import Failure, Host

ROOT = tools.checkout()


class RecordedMkosi(Host):
    """A host whose mkosi writes a small result and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.builds: list[list[str]] = []
        self.sources: dict[str, str] = {}
        self.distribution = "debian"
        self.fails = False
        self.kernels: tuple[str, ...] = ("6.12.0-test",)

    def run(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
    ) -> bytes:
        words = [str(word) for word in command]
        assert words[0] == "mkosi"
        source = Path(words[words.index("--directory") + 1])
        if words[-1] == "summary":
            summary = {"Distribution": self.distribution, "Release": "trixie"}
            return json.dumps({"Images": [{"Distribution": "other"}, summary]}).encode()
        self.builds.append(words)
        self.sources = {
            str(path.relative_to(source)): path.read_text(errors="replace")
            for path in source.rglob("*")
            if path.is_file() and not path.is_symlink()
        }
        output = Path(words[words.index("--output-directory") + 1])
        (output / "hostfs").mkdir()
        (output / "hostfs/index.json").write_text("demo" if "demo" in words else "{}")
        if self.fails:
            raise Failure("mkosi failed with status 1: no network")
        for version in self.kernels:
            (output / "bootkit/usr/lib/modules" / version).mkdir(parents=True)
            (output / "bootkit/usr/lib/modules" / version / "vmlinuz").write_text("kernel")
        return b""


@pytest.fixture
def mkosi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordedMkosi:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return RecordedMkosi()


def test_a_second_build_is_the_first_one(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    first = hostfs.build(mkosi, tmp_path / "one")
    second = hostfs.build(mkosi, tmp_path / "two")
    assert first == tmp_path / "one/hostfs"
    assert (second / "index.json").read_text() == "{}"
    assert len(mkosi.builds) == 1
    shutil.rmtree(first)
    assert (hostfs.build(mkosi, tmp_path / "one") / "index.json").exists()
    assert len(mkosi.builds) == 1


def test_a_profile_is_another_image(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    hostfs.build(mkosi, tmp_path)
    assert (hostfs.build(mkosi, tmp_path, "demo") / "index.json").read_text() == "demo"
    assert (hostfs.build(mkosi, tmp_path) / "index.json").read_text() == "{}"
    assert ["--profile" in words for words in mkosi.builds] == [False, True]


def test_what_mkosi_is_given(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    hostfs.build(mkosi, tmp_path)
    assert "--dependency=" in mkosi.builds[0]
    assert mkosi.sources["mosinit.py"] == (ROOT / "mosinit.py").read_text()
    assert "mkosi.conf" in mkosi.sources
    assert not [name for name in mkosi.sources if name.startswith(("mkosi.images", "tests", ".git"))]
    hostfs.kernel(mkosi, tmp_path)
    assert "--dependency=bootkit" in mkosi.builds[1]
    assert not [name for name in mkosi.sources if name.startswith(("mosinit", "mkosi.extra"))]


def test_the_kernel_tree(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    kernel = hostfs.kernel(mkosi, tmp_path)
    assert kernel.version == "6.12.0-test"
    assert kernel.vmlinuz.read_text() == "kernel"
    assert kernel.modules == tmp_path / "kernel/6.12.0-test"


@pytest.mark.parametrize("kernels", [(), ("6.1", "6.12")])
def test_there_must_be_one_kernel(kernels: tuple[str, ...], mkosi: RecordedMkosi, tmp_path: Path) -> None:
    mkosi.kernels = kernels
    if not kernels:
        mkosi.kernels = ("6.1",)
        hostfs.kernel(mkosi, tmp_path)
        (cached,) = tools.cache().glob("bootkit-*")
        (cached / "6.1/vmlinuz").unlink()
        shutil.rmtree(tmp_path / "kernel")
    with pytest.raises(Failure, match=f"must install one kernel, it has {len(kernels)}"):
        hostfs.kernel(mkosi, tmp_path)


def test_a_failed_build_leaves_nothing(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    mkosi.fails = True
    with pytest.raises(Failure, match="no network"):
        hostfs.build(mkosi, tmp_path)
    assert sorted(path.name for path in tools.cache().iterdir()) == ["mkosi.lock", "packages"]
    assert not (tmp_path / "hostfs").exists()
    mkosi.fails = False
    hostfs.build(mkosi, tmp_path)
    assert len(mkosi.builds) == 2


def test_only_the_newest_results_are_kept(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    for number in range(hostfs.KEPT + 2):
        hostfs.build(mkosi, tmp_path, f"profile{number}")
    assert len(list(tools.cache().glob("hostfs-*"))) == hostfs.KEPT


def test_debian_packages_come_from_where_this_host_has_its_own(mkosi: RecordedMkosi, tmp_path: Path) -> None:
    hostfs.build(mkosi, tmp_path)
    name = "mkosi.sandbox/etc/apt/sources.list.d/mkosi.sources"
    lines = tools.debian_sources(Path("/etc/apt"), "trixie")
    assert mkosi.sources.get(name, "").count("Suites: ") == len(lines)
    for line in lines:
        assert f"URIs: {line.split()[2]}\nSuites: {line.split()[3]}\n" in mkosi.sources[name]
    mkosi.distribution = "fedora"
    hostfs.build(mkosi, tmp_path, "other")
    assert name not in mkosi.sources


def test_the_umask_of_a_checkout_changes_nothing(tmp_path: Path) -> None:
    for name, mask in (("one", 0o022), ("two", 0o077)):
        folder = tmp_path / name / "mkosi.extra/etc"
        folder.mkdir(parents=True, mode=0o777 & ~mask)
        (folder / "file").write_text("content")
        (folder / "file").chmod(0o666 & ~mask)
        (folder / "tool").write_text("content")
        (folder / "tool").chmod(0o777 & ~mask)
        (folder / "link").symlink_to("/dev/null")
        (folder / "__pycache__").mkdir()
        (tmp_path / name / "staged").mkdir(mode=0o777 & ~mask)
        hostfs.stage(tmp_path / name, ["mkosi.extra"], tmp_path / name / "staged")
    one, two = (tmp_path / name / "staged" for name in ("one", "two"))
    assert hostfs.key_of(one, []) == hostfs.key_of(two, [])
    assert not (one / "mkosi.extra/etc/__pycache__").exists()
    assert (two / "mkosi.extra/etc/file").stat().st_mode & 0o777 == 0o644
    assert os.readlink(two / "mkosi.extra/etc/link") == "/dev/null"


@pytest.mark.parametrize(
    "target", ["sleep", "suspend", "hibernate", "hybrid-sleep", "suspend-then-hibernate"]
)
def test_machines_do_not_sleep(target: str, tmp_path: Path) -> None:
    """What `systemctl mask` makes, and what comes of it in the image's inputs."""
    hostfs.stage(ROOT, ["mkosi.extra"], tmp_path)
    assert os.readlink(tmp_path / f"mkosi.extra/etc/systemd/system/{target}.target") == "/dev/null"


@pytest.mark.parametrize(
    "change",
    ["echo >> mkosi.conf", "chmod +x mkosi.conf", "mv mkosi.conf mkosi.local.conf", "ln -sfn other link"],
)
def test_every_change_of_an_input_is_another_key(change: str, tmp_path: Path) -> None:
    (tmp_path / "mkosi.conf").write_text("[Content]\n")
    (tmp_path / "mkosi.conf").chmod(0o644)
    (tmp_path / "link").symlink_to("one")
    before = hostfs.key_of(tmp_path, [])
    assert hostfs.key_of(tmp_path, []) == before
    subprocess.run(change, shell=True, cwd=tmp_path, check=True)
    assert hostfs.key_of(tmp_path, []) != before
