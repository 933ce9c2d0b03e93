"""What root once left on a disk, or a person on it, and the way back in: none of it keeps a machine from
being recovered, and nobody's partition is taken for the machine's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mosinit import damage, esp, generations, init, install, layout, machinedisk, releases, sources
from mosinit.host import Failure, Host
from tests import installation, recovering
from tests.installation import TOOLS
from tests.recovering import NativeRecoverer, Site
from tests.test_recover import NEEDED, config_of, machine_id
from tests.test_recover_damage import (
    esp_files,
    git,
    in_config,
    in_store,
    mended,
    overwrite,
    spoil_blob,
    wipe,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A machine whose TPM is as it was."""
    with recovering.site(tmp_path_factory.mktemp("machine")) as made:
        yield made


@pytest.fixture
def disk(site: Site, need: Callable[..., None], memory: Path) -> Iterator[Path]:
    """A copy of the machine's disk."""
    need(*NEEDED, *TOOLS)
    with recovering.copy_of(site, memory) as device:
        yield device


@pytest.fixture
def not_for_ever() -> Iterator[None]:
    """End a test that waits for what never comes."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(240)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- What is beyond repair


def no_file_system(disk: Path, number: int) -> None:
    overwrite(f"{disk}p{number}", installation.DATA, bytes(8 << 20))


@pytest.mark.parametrize("number", [2, 3])
def test_a_file_system_that_is_gone_is_made_anew(site: Site, disk: Path, number: int) -> None:
    no_file_system(disk, number)
    with pytest.raises((Failure, init.Refused)) as error:
        site.recover(disk, site.first, source=f"oci:{site.release}")
    told = f"{error.value} {getattr(error.value, '__notes__', '')}"
    assert "--anew" in told
    plan = site.plan(disk, site.first, anew=True, source=f"oci:{site.release}")
    assert "anew" in str(plan["will do"])
    done = site.recover(disk, site.first, anew=True, source=f"oci:{site.release}")
    assert done["status"] == 0
    assert site.boots(disk, site.first).contents.sequence == 7


def test_a_new_file_system_makes_no_older_release_good(site: Site, disk: Path, tmp_path: Path) -> None:
    """With the word for it a store with faults is made anew: not to fill it with what came before."""
    with installation.data_behind(Path(f"{disk}p3")) as data:
        words: list[str | Path] = ["debugfs", "-w", "-R", "setb 9000 20", data]
        subprocess.run(words, check=True, capture_output=True)
    older = installation.make_release(Host(), tmp_path / "older", site.made.keyset, 6)
    with pytest.raises(init.Refused, match="MANIFEST-SEQUENCE"):
        site.plan(disk, anew=True, source=f"oci:{older}")


@pytest.mark.parametrize("number", [2, 3])
def test_broken_off_before_the_file_system_it_is_made_anew(site: Site, disk: Path, number: int) -> None:
    class Cut(NativeRecoverer):
        def run(self, command, **more):  # type: ignore[no-untyped-def]
            if str(command[0]).startswith("mkfs.ext4"):
                raise KeyboardInterrupt
            return super().run(command, **more)

    overwrite(f"{disk}p{number}", 0, bytes(2 * init.LUKS_COPY))
    overwrite(f"{disk}p{number}", installation.DATA, bytes(8 << 20))
    given: dict[str, Any] = {"anew": True, "source": f"oci:{site.release}"}
    with pytest.raises(KeyboardInterrupt):
        site.recover(disk, site.first, Cut(site.made), **given)
    assert site.recover(disk, site.first, **given)["status"] == 0
    assert site.boots(disk, site.first).contents.sequence == 7


def test_broken_off_a_new_config_has_all_that_one_has(site: Site, disk: Path) -> None:
    overwrite(config_of(disk), 0, bytes(2 * init.LUKS_COPY))
    host = site.host
    host.failing = "config: manifest.git"
    with pytest.raises(OSError, match="Input/output"):
        site.recover(disk, site.first, host, anew=True)
    assert site.recover(disk, site.first, anew=True)["status"] == 0
    assert machine_id(disk)


def test_a_generation_for_another_uki(site: Site, disk: Path) -> None:
    """Nobody signs which UKI a generation is for: one of this release for none is none."""

    def plant(folder: Path) -> None:
        repository = folder / "manifest.git"
        head = generations.list_all(repository, site.made.keyset.product)[0]
        machine = generations.Elsewhere({init.MANIFEST_GIT: repository})
        parts = [
            init.read_git_object(machine, oid, "blob")
            for name, oid in sorted(head.files.items())
            if name != "manifest.yaml"
        ]
        signed = generations.SignedManifest(head.targets[0][1], parts[1], parts[2], parts[0])
        other = generations.NewGeneration(
            site.made.keyset.product, head.sequence, "99" * 32, head.targets, [signed]
        )
        (repository / generations.BRANCH).unlink()
        generations.add(Host(), repository, other)

    in_config(disk, plant)
    mended(site, disk, "GENERATION", "add that generation")


def test_superblocks_that_no_boot_takes(site: Site, disk: Path) -> None:
    """Root can have a kernel panic at the first error it meets there."""
    for number in (2, 3, 5):
        with installation.data_behind(Path(f"{disk}p{number}")) as data:
            subprocess.run(["tune2fs", "-e", "panic", data], check=True, capture_output=True)
    mended(site, disk, "VOLUME-READ", "e2fsck")


# --- What root left in config


def test_a_key_without_end(site: Site, disk: Path) -> None:
    def plant(folder: Path) -> None:
        (folder / "sudi/sudi.auth").chmod(0o600)
        os.truncate(folder / "sudi/sudi.auth", 1 << 40)

    in_config(disk, plant)
    done = site.recover(disk, site.first)
    assert (done["status"], "machine identity" in str(done["found"])) == (0, True)


def deep(folder: Path) -> None:
    """Make folders in folders in folders."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_folders_without_end(site: Site, disk: Path) -> None:
    def plant(folder: Path) -> None:
        (folder / "sudi").rename(folder / "kept")
        (folder / "sudi").mkdir()
        for name in ("sudi.key", "sudi.auth", "sudi.pem"):
            (folder / "sudi" / name).mkdir()
        deep(folder / "sudi/sudi.key")
        (folder / ".manifest.git.new").mkdir()
        deep(folder / ".manifest.git.new")
        (folder / "manifest.git/refs/heads/main").unlink()
        deep(folder / "manifest.git/refs/heads")

    in_config(disk, plant)
    done = site.recover(disk, site.first)
    assert done["status"] == 0


def test_files_that_may_not_be_changed(site: Site, disk: Path) -> None:
    def plant(folder: Path) -> None:
        (folder / "manifest.git/refs/heads/main").write_text("nothing\n")
        for name in ("sudi.key", "sudi.auth"):
            (folder / "sudi" / name).chmod(0o600)
            (folder / "sudi" / name).write_text("another")
        fixed = ("manifest.git/refs/heads/main", "manifest.git", "sudi/sudi.key", "sudi")
        subprocess.run(["chattr", "+i", *(folder / name for name in fixed)], check=True)

    in_config(disk, plant)
    done = site.recover(disk, site.first)
    assert done["status"] == 0
    assert site.boots(disk, site.first).contents.sequence == 7


def test_a_config_without_room(site: Site, disk: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "manifest.git/refs/heads/main").unlink()
        with pytest.raises(OSError, match="No space left"):
            (folder / "junk").write_bytes(bytes(256 << 20))

    in_config(disk, fill)
    with pytest.raises(init.Refused, match="VOLUME-READ.*without room"):
        site.recover(disk, site.first)
    assert site.recover(disk, site.first, anew=True)["status"] == 0
    assert site.boots(disk, site.first).contents.sequence == 7


def release_of(site: Site, folder: Path, sequence: int) -> generations.NewGeneration:
    path = installation.make_release(Host(), folder, site.made.keyset, sequence)
    policy = install.policy_of_live(site.left)
    found = releases.verify(Host(), sources.open_source(f"oci:{path}"), policy)
    return damage.new_generation(found)


def test_a_generation_of_a_release_that_is_not_there(site: Site, disk: Path, tmp_path: Path) -> None:
    """Nobody signs which UKI a generation is for: what the store does not have gets no place on the ESP."""
    new = release_of(site, tmp_path / "newer", 8)
    in_config(disk, lambda folder: generations.add(Host(), folder / "manifest.git", new))
    assert site.plan(disk)["found"] == []
    wipe(disk)
    assert site.recover(disk)["status"] == 0
    assert [name for name in esp_files(disk) if "Linux" in name] == ["EFI/Linux/mosinit_7+3.efi"]


def test_two_generations_of_one_release(site: Site, disk: Path, tmp_path: Path) -> None:
    def plant(folder: Path) -> None:
        repository = folder / "manifest.git"
        head = generations.head(repository)
        assert head
        generations.mark_good(Host(), repository, head)
        git(folder, "update-ref", "refs/heads/main", again(folder, head))

    def again(folder: Path, head: str) -> str:
        words = ["git", "-c", "safe.directory=*", "-c", "user.name=x", "-c", "user.email=x",
                 f"--git-dir={folder / 'manifest.git'}", "commit-tree", f"{head}^{{tree}}",
                 "-p", head, "-m", "x"]  # fmt: skip
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()

    in_config(disk, plant)
    wipe(disk)
    assert site.recover(disk)["status"] == 0
    assert [name for name in esp_files(disk) if "Linux" in name] == ["EFI/Linux/mosinit_7.efi"]


# --- In the store, and on the ESP


def test_a_pipe_beside_the_release(site: Site, disk: Path, not_for_ever: None) -> None:
    def plant(folder: Path) -> None:
        shutil.rmtree(folder)
        os.mkfifo(folder.parent / "pipe")
        os.mkfifo(folder.parent / "lost+found/pipe")

    in_store(disk, plant)
    mended(site, disk, "the store has no whole release", "fill the store", source=f"oci:{site.release}")


def test_a_boot_loader_that_fills_the_memory(site: Site, disk: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(96 << 20)
    subprocess.run(["mcopy", "-o", "-i", f"{disk}p1", large, f"::{esp.STARTED}"], check=True)
    tracemalloc.start()
    try:
        assert "boot loader" in str(site.plan(disk)["found"])
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_file_system_with_so_many_faults(site: Site, disk: Path, tmp_path: Path) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "e2fsck").write_text("#!/bin/sh\nhead -c 100000000 /dev/zero\nexit 4\n")
    (fake / "e2fsck").chmod(0o755)
    tracemalloc.start()
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{fake}:{before}"
    try:
        assert site.host.e2fsck(Path("/dev/null"), "-n") == 4
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()
        os.environ["PATH"] = before


# --- A disk with more on it


def test_a_label_makes_no_partition_the_machines(site: Site, disk: Path) -> None:
    """A boot goes by types; somebody's own partition may be called like one of ours."""
    words = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel"]
    subprocess.run([*words, "--part-label", disk, "5", "store"], check=True)
    parts = machinedisk.read_partitions(Host(), layout.inspect(Host(), disk))
    assert [part.name for part in parts.partitions] == ["esp", "config", "store", "scratch", ""]
    subprocess.run([*words, "--part-label", disk, "1", "esp"], check=True)
    subprocess.run([*words, "--part-type", disk, "1", init.LINUX_TYPE], check=True)
    with pytest.raises(init.Refused, match="one partition esp"):
        machinedisk.read_partitions(Host(), layout.inspect(Host(), disk))


def test_a_state_that_somebody_took_away(site: Site, disk: Path, tmp_path: Path) -> None:
    """No boot starts without it: nobody is told that all is well."""
    words = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel"]
    subprocess.run([*words, "--part-label", disk, "5", "somebody's"], check=True)
    with pytest.raises(init.Refused, match="VOLUME-STATE"):
        site.recover(disk)
    in_store(disk, spoil_blob)
    storage = "storage:\n  - label: state\n    persistent: true\n    size: 64M\n"
    newer = installation.make_release(Host(), tmp_path / "newer", site.made.keyset, 8, storage=storage)
    with pytest.raises(init.Refused, match="VOLUME-STATE"):
        site.plan(disk, source=f"oci:{newer}")
