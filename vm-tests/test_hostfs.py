"""hostfs by the real mkosi: twice the same bytes, and what must not be in it."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from mosinit import hostfs, images, tools, uki
from mosinit.host import Host


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> images.Layout:
    """hostfs as everything else uses it, perhaps built days ago."""
    return images.Layout(hostfs.build(Host(), tmp_path_factory.mktemp("hostfs")))


@pytest.fixture(scope="module")
def members(built: images.Layout, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tarfile.TarInfo]:
    """What lies in the image's one layer, by absolute path."""
    (layer,) = (path for path in (built.path / "blobs/sha256").iterdir() if path.stat().st_size > 1 << 20)
    tar = tmp_path_factory.mktemp("tar") / "layer.tar"
    Host().run(["zstd", "--decompress", "--quiet", layer, "-o", tar])
    with tarfile.open(tar) as archive:
        return {os.path.normpath("/" + entry.name): entry for entry in archive}


def test_another_build_gives_the_same_bytes(
    built: images.Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tools.cache() / "packages"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "an/empty/cache"))
    tools.cache().mkdir(parents=True)
    (tools.cache() / "packages").symlink_to(packages)
    again = images.Layout(hostfs.build(Host(), tmp_path / "out"))
    assert again.read_index() == built.read_index()


def test_a_machine_finds_its_mount_points(members: dict[str, tarfile.TarInfo]) -> None:
    for path in ("/config", "/atomfs-cache", "/scratch-writes", "/storage", "/proc", "/sys", "/dev", "/run"):
        assert members[path].isdir()
    assert members["/etc/machine-id"].size == 0


def test_nobody_can_log_in(members: dict[str, tarfile.TarInfo]) -> None:
    for unit in ("getty@", "serial-getty@", "console-getty", "autovt@", "debug-shell", "rescue"):
        assert members[f"/etc/systemd/system/{unit}.service"].linkname == "/dev/null"
    # A user manager would start for whoever /var/lib/systemd/linger names, and read units in its home.
    for unit in ("systemd-firstboot", "user@"):
        assert members[f"/etc/systemd/system/{unit}.service"].linkname == "/dev/null"


def test_of_ssh_there_is_what_a_live_system_answers_with(members: dict[str, tarfile.TarInfo]) -> None:
    assert {"/usr/sbin/sshd", "/usr/lib/mosinit/sshd_config"} <= set(members)
    # A host key in an image would be the key of every machine; the rest are programs for others' machines.
    unwanted = ("/etc/ssh/ssh_host_", "/usr/bin/ssh", "/usr/bin/scp", "/usr/bin/sftp", "/root/.ssh")
    assert [path for path in members if path.startswith(unwanted)] == []
    named = [path for path in members if path.endswith(("sftp-server", "installer_keys"))]
    # Of that package there is a name among the copyrights alone, without anything in it.
    assert named == ["/usr/share/doc/openssh-sftp-server"]
    assert [path for path in members if path.startswith(f"{named[0]}/")] == []
    enabled = [path for path in members if ".wants/" in path or ".requires/" in path]
    ours = "/etc/systemd/system/multi-user.target.wants/mosinit-live-ssh.service"
    assert [path for path in enabled if "ssh" in path and "/user/" not in path and "/var/" not in path] == [
        ours
    ]
    assert members["/etc/systemd/system-generators/systemd-ssh-generator"].linkname == "/dev/null"
    # It would lay /root/.ssh, and an authorized_keys from whatever credential is named as it expects.
    assert members["/etc/tmpfiles.d/provision.conf"].linkname == "/dev/null"


def test_nothing_in_var_replaces_usr_or_etc(members: dict[str, tarfile.TarInfo]) -> None:
    for unit in uki.EXTENSIONS:
        assert members[f"/etc/systemd/system/{unit}"].linkname == "/dev/null"


def test_hostfs_carries_no_kernel_and_no_documents(members: dict[str, tarfile.TarInfo]) -> None:
    unwanted = ("/boot/", "/usr/lib/modules", "/usr/share/man", "/usr/share/locale", "/var/lib/apt", "/work")
    assert [path for path in members if path.startswith(unwanted)] == []
    assert [path for path, entry in members.items() if entry.mtime > 0] == []
    assert [path for path in members if "/__pycache__/" in path and not path.endswith(".pyc")] == []
