"""manifest.git as the package writes it: the bring-up takes it, real git finds no fault, a power cut does no
harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mosinit import generations, init
from mosinit.host import Failure, Host
from tests.fake import PRODUCT, UKI_ID, policy_json
from tests.test_init_generations import BOOTKIT, LEAF, install_manifest
from tests.test_init_manifest import CA, P256, sign

POLICY = init.parse_policy(policy_json(), UKI_ID.encode(), {"manifest-ca.pem": CA})


def signed(text: bytes) -> generations.SignedManifest:
    return generations.SignedManifest(hashlib.sha256(text).hexdigest(), text, sign(P256, text), LEAF)


def generation(sequence: int, *texts: bytes, uki: str = UKI_ID) -> generations.NewGeneration:
    manifests = [signed(text) for text in texts or (install_manifest(sequence),)]
    targets = {
        target.service_name: manifest.sha256
        for manifest in manifests
        for target in init.parse_manifest(manifest.text).targets
    }
    return generations.NewGeneration(PRODUCT, sequence, uki, tuple(targets.items()), manifests)


def picked(folder: Path) -> init.Manifest:
    return init.pick_generation(generations.Elsewhere({init.MANIFEST_GIT: folder}), POLICY)


def fsck(folder: Path) -> str:
    words = ["git", "-c", "safe.directory=*", f"--git-dir={folder}", "fsck", "--strict", "--full"]
    done = subprocess.run(words, capture_output=True, check=True, text=True)
    return done.stdout + done.stderr.replace("notice: HEAD points to an unborn branch (main)\n", "")


@pytest.fixture
def folder(host: Host, need: Callable[..., None], tmp_path: Path) -> Path:
    """An empty manifest.git."""
    need("git")
    generations.create(host, tmp_path / "manifest.git")
    return tmp_path / "manifest.git"


def test_the_bring_up_takes_what_was_written(host: Host, folder: Path) -> None:
    first = generations.add(host, folder, generation(7))
    manifest = picked(folder)
    assert (manifest.contents.sequence, manifest.sha256) == (7, signed(install_manifest(7)).sha256)
    second = generations.add(host, folder, generation(8))
    assert picked(folder).contents.sequence == 8
    assert [each.commit for each in generations.list_all(folder, PRODUCT)] == [second, first]
    assert fsck(folder) == ""


def test_targets_from_two_manifests(host: Host, folder: Path) -> None:
    texts = install_manifest(4), install_manifest(5, "targets:\n" + BOOTKIT, "partial")
    generations.add(host, folder, generation(5, *texts))
    assert {target.service_name for target in picked(folder).contents.targets} == {"hostfs", "bootkit"}


def test_a_generation_of_a_release(host: Host, folder: Path) -> None:
    text = install_manifest(3)
    manifest = init.verify_manifest(text, sign(P256, text), LEAF, POLICY)
    generations.add(host, folder, generations.of_release(manifest, UKI_ID, signed(text)))
    assert picked(folder) == manifest


def test_numbers_that_yaml_would_take_for_others(host: Host, folder: Path) -> None:
    """An id of digits alone, or one that looks like a power of ten, is text."""
    for uki in ("1" * 64, "1e" + "5" * 62, "0" * 64):
        generations.add(host, folder, generation(7, uki=uki))
        assert generations.list_all(folder, PRODUCT)[0].uki == uki


def test_marked_as_good(host: Host, folder: Path) -> None:
    first = generations.add(host, folder, generation(7))
    second = generations.add(host, folder, generation(8))
    for _ in range(2):
        generations.mark_good(host, folder, first)
        marks = [generations.is_good(folder, commit) for commit in (first, second)]
        assert marks == [True, False]
    assert (picked(folder).contents.sequence, fsck(folder)) == (8, "")
    with pytest.raises(Failure, match="is no generation"):
        generations.mark_good(host, folder, "../heads/main")


def test_nothing_is_packed_and_no_hook_is_there(host: Host, folder: Path) -> None:
    for sequence in range(1, 5):
        generations.add(host, folder, generation(sequence))
    assert list(folder.rglob("*.pack")) == []
    assert not (folder / "hooks").exists()
    words = ["git", f"--git-dir={folder}", "-c", "safe.directory=*", "gc", "--auto"]
    subprocess.run(words, check=True)
    assert picked(folder).contents.sequence == 4


def test_nobody_s_configuration_counts(host: Host, folder: Path, tmp_path: Path) -> None:
    """Neither the user's, nor what somebody left in the repository itself."""
    first = generations.add(host, folder, generation(6))
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "reference-transaction").write_text(f"#!/bin/sh\necho hook >> {tmp_path}/ran\nexit 1\n")
    (hooks / "reference-transaction").chmod(0o755)
    (tmp_path / ".gitconfig").write_text(f"[core]\nhooksPath = {hooks}\n")
    shutil.copytree(hooks, folder / "hooks")
    (folder / "config").write_text(
        f"[core]\nrepositoryformatversion = 1\nbare = true\nhooksPath = {hooks}\n"
        f"fsmonitor = {hooks}/reference-transaction\n[extensions]\npartialClone = origin\n"
        '[remote "origin"]\nurl = ssh://nowhere/x\npromisor = true\n'
        f'uploadpack = "echo fetch >> {tmp_path}/ran"\n[core]\nsshCommand = "echo ssh >> {tmp_path}/ran"\n'
    )
    (folder / "refs/replace").mkdir()
    (folder / "refs/replace" / first).write_text("12" * 20 + "\n")
    before = dict(os.environ)
    try:
        os.environ |= {"HOME": str(tmp_path), "GIT_CONFIG_GLOBAL": str(tmp_path / ".gitconfig")}
        second = generations.add(host, folder, generation(7))
        for commit in (first, second):
            generations.mark_good(host, folder, commit)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert picked(folder).contents.sequence == 7
    assert not (tmp_path / "ran").exists()


def test_a_fifo_in_the_place_of_a_file_is_not_waited_for(host: Host, folder: Path) -> None:
    generations.add(host, folder, generation(6))
    (folder / generations.BRANCH).unlink()
    os.mkfifo(folder / generations.BRANCH)
    with pytest.raises(init.Refused, match="GIT-"):
        generations.add(host, folder, generation(7))


class Recorder(Host):
    """The real host, that notes what is done and keeps what a power cut after it would leave.

    A file is durable once it was synced; its name is durable once its folder was synced after it appeared,
    and that of each folder above.
    """

    def __init__(self, folder: Path, kept: Path) -> None:
        super().__init__()
        self.folder, self.kept = folder, kept
        self.steps: list[str] = []
        self.replaced: tuple[Path, bytes | None] = folder, None
        self.durable: dict[Path, set[str]] = {}
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                self.durable[path] = set(os.listdir(path))

    def _cut(self, step: str) -> None:
        self.steps.append(step)
        self._copy(self.folder, self.kept / f"{len(self.steps):03}")

    def _copy(self, source: Path, target: Path) -> None:
        target.mkdir(parents=True)
        for name in self.durable.get(source, set()):
            path = source / name
            if path.is_dir():
                self._copy(path, target / name)
            elif path.exists():
                shutil.copyfile(path, target / name)

    @contextlib.contextmanager
    def replacing(self, path: str | os.PathLike[str], *, mode: int = 0o644) -> Iterator[Path]:
        """Replace; until its folder is synced, what was replaced may come back."""
        target = Path(path)
        self.steps.append(f"replacing {target.relative_to(self.folder)}")
        self.replaced = target, target.read_bytes() if target.exists() else None
        with super().replacing(path, mode=mode) as fresh:
            yield fresh

    def _cut_with(self, path: Path, content: bytes) -> None:
        new = path.read_bytes()
        path.write_bytes(content)
        self._cut("what was there before")
        path.write_bytes(new)

    def sync_file(self, path: str | os.PathLike[str]) -> None:
        """Sync, and cut before and after."""
        real = Path(path)
        target, old = self.replaced
        if old is not None and target.parent == real and target.read_bytes() != old:
            self._cut_with(target, old)
            self.replaced = target, None
        super().sync_file(path)
        if real.is_dir():
            self.durable[real] = set(os.listdir(real))
        self._cut(f"sync {real.relative_to(self.folder)}")


def test_a_power_cut_leaves_the_old_generation_or_the_new_one(
    host: Host, folder: Path, tmp_path: Path
) -> None:
    generations.add(host, folder, generation(7))
    recorder = Recorder(folder, tmp_path / "cuts")
    commit = generations.add(recorder, folder, generation(8))
    generations.mark_good(recorder, folder, commit)
    found = []
    for cut in sorted((tmp_path / "cuts").iterdir()):
        found.append(picked(cut).contents.sequence)
        assert "error" not in fsck(cut)
        # A machine that comes back does the same again.
        generations.add(host, cut, generation(9))
        assert picked(cut).contents.sequence == 9
    assert found == sorted(found)
    assert (found[0], found[-1]) == (7, 8)


def test_folders_are_synced_before_the_branch_moves(host: Host, folder: Path, tmp_path: Path) -> None:
    recorder = Recorder(folder, tmp_path / "cuts")
    commit = generations.add(recorder, folder, generation(7))
    moved = recorder.steps.index(f"replacing {generations.BRANCH}")
    before, after = recorder.steps[:moved], recorder.steps[moved:]
    objects = {path.parent for path in (folder / "objects").glob("??/*")}
    wanted = {f"sync {path.relative_to(folder)}" for path in objects} | {"sync objects"}
    assert wanted <= set(before)
    assert {"sync refs/heads", "sync refs"} <= set(after)
    assert commit == generations.head(folder)
