"""manifest.git, repaired: packs, planted configuration, damage; the bring-up and git are the judges."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mosinit import generations, init, repository
from mosinit.host import Failure, Host
from tests.test_generations import POLICY, fsck, generation, picked
from tests.test_packs import BLOB, made


@pytest.fixture
def folder(host: Host, need: Callable[..., None], tmp_path: Path) -> Path:
    """A manifest.git of three generations; the second is good."""
    need("git")
    folder = tmp_path / "config/manifest.git"
    folder.parent.mkdir()
    generations.create(host, folder)
    commits = [generations.add(host, folder, generation(sequence)) for sequence in (7, 8, 9)]
    generations.mark_good(host, folder, commits[1])
    return folder


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "safe.directory=*", f"--git-dir={folder}", *words]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout


def sequences(folder: Path) -> list[int]:
    return [each.sequence for each in generations.list_all(folder, POLICY.product)]


def loose(folder: Path, name: str) -> Path:
    return folder / "objects" / name[:2] / name[2:]


def good(folder: Path) -> list[bool]:
    return [
        generations.is_good(folder, each.commit) for each in generations.list_all(folder, POLICY.product)
    ]


def test_a_whole_one_is_left_alone(folder: Path) -> None:
    state = repository.look(folder, POLICY)
    assert (state.whole, [each.sequence for each, _ in state.usable]) == (True, [9, 8, 7])


def test_packs_become_loose_objects(host: Host, folder: Path) -> None:
    before = git(folder, "rev-parse", "main").strip()
    git(folder, "gc", "--quiet")
    git(folder, "pack-refs", "--all")
    with pytest.raises(init.Refused, match="GIT-PACKED"):
        picked(folder)
    state = repository.look(folder, POLICY)
    assert state.fault is not None
    assert (state.fault.check, state.foreign) == ("GIT-PACKED", ("packed-refs", "objects/pack"))
    assert repository.rebuild(host, folder, POLICY, None).whole
    assert (sequences(folder), good(folder), fsck(folder)) == ([9, 8, 7], [False, True, False], "")
    assert picked(folder).contents.sequence == 9
    assert git(folder, "rev-parse", "main").strip() == before
    assert os.listdir(folder.parent) == ["manifest.git"]


def test_what_root_left_there_does_not_run(host: Host, folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    (folder / "config").write_text(
        f"[core]\nrepositoryformatversion = 1\nfsmonitor = {program}\npager = {program}\n"
        f"hooksPath = {tmp_path}\n[extensions]\npartialClone = evil\n[remote \"evil\"]\npromisor = true\n"
        f"url = ext::{program}\n[alias]\nfsck = !{program}\n"
    )  # fmt: skip
    for name in ("reference-transaction", "post-index-change"):
        (folder / "hooks").mkdir(exist_ok=True)
        shutil.copy(program, folder / "hooks" / name)
    (folder / "objects/info").mkdir(exist_ok=True)
    (folder / "objects/info/alternates").write_text(f"{tmp_path}\n")
    (folder / "info").mkdir(exist_ok=True)
    (folder / "info/grafts").write_text("x\n")
    (folder / "refs/replace").mkdir()
    assert set(repository.look(folder, POLICY).foreign) == {
        "objects/info/alternates", "info/grafts", "refs/replace",
    }  # fmt: skip
    assert repository.rebuild(host, folder, POLICY, None).whole
    assert not ran.exists()
    assert sequences(folder) == [9, 8, 7]
    assert "evil" not in (folder / "config").read_text()
    assert not (folder / "hooks").exists()


def test_a_damaged_generation_hides_none_behind_it(host: Host, folder: Path) -> None:
    commits = [each.commit for each in generations.list_all(folder, POLICY.product)]
    loose(folder, commits[1]).chmod(0o644)
    loose(folder, commits[1]).write_bytes(b"damaged")
    assert repository.look(folder, POLICY).fault is not None
    repository.rebuild(host, folder, POLICY, None)
    # What nothing leads to any more cannot be known to be a generation.
    assert (sequences(folder), fsck(folder)) == ([9], "")


def test_a_damaged_head_and_a_good_one(host: Host, folder: Path) -> None:
    commits = [each.commit for each in generations.list_all(folder, POLICY.product)]
    loose(folder, commits[0]).unlink()
    repository.rebuild(host, folder, POLICY, generation(12))
    assert (sequences(folder), good(folder), fsck(folder)) == ([8, 7], [True, False], "")


def test_nothing_is_left_but_a_release(host: Host, folder: Path) -> None:
    shutil.rmtree(folder / "objects")
    with pytest.raises(Failure, match="no generation"):
        repository.rebuild(host, folder, POLICY, None)
    assert repository.rebuild(host, folder, POLICY, generation(12)).whole
    assert sequences(folder) == [12]


def test_an_older_epoch_is_no_generation(host: Host, folder: Path) -> None:
    policy = POLICY._replace(epoch=9)
    state = repository.look(folder, policy)
    assert (state.usable, state.fault and state.fault.check) == ((), "GENERATION")
    with pytest.raises(Failure, match="no generation"):
        repository.rebuild(host, folder, policy, None)
    assert sequences(folder) == [9, 8, 7]


@pytest.mark.parametrize("kind", ["link", "file", "none"])
def test_something_else_in_its_place(host: Host, folder: Path, tmp_path: Path, kind: str) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    if kind == "link":
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        folder.write_text("no folder")
    assert repository.rebuild(host, folder, POLICY, generation(12)).whole
    assert not folder.is_symlink()
    assert (tmp_path / "elsewhere/config").exists()


def test_an_interrupted_run_is_done_again(host: Host, folder: Path) -> None:
    git(folder, "gc", "--quiet")
    (folder.parent / repository.NEW / "objects").mkdir(parents=True)
    assert repository.rebuild(host, folder, POLICY, None).whole
    assert os.listdir(folder.parent) == ["manifest.git"]


@pytest.mark.parametrize("kind", ["file", "link", "fifo"])
def test_something_else_where_the_new_one_is_made(
    host: Host, folder: Path, tmp_path: Path, kind: str
) -> None:
    fresh = folder.with_name(repository.NEW)
    if kind == "link":
        fresh.symlink_to(tmp_path)
    elif kind == "file":
        fresh.write_text("no folder")
    else:
        os.mkfifo(fresh)
    git(folder, "gc", "--quiet")
    assert repository.rebuild(host, folder, POLICY, None).whole
    assert os.listdir(folder.parent) == ["manifest.git"]


@pytest.mark.parametrize("kind", ["file", "fifo", "loop"])
def test_no_folder_of_objects(host: Host, folder: Path, kind: str) -> None:
    objects = folder / "objects"
    shutil.rmtree(objects)
    if kind == "loop":
        objects.symlink_to(objects.name)
    elif kind == "file":
        objects.write_text("no folder")
    else:
        os.mkfifo(objects)
    state = repository.look(folder, POLICY)
    assert state.fault is not None
    assert state.fault.check == "GIT-OBJECT"
    assert repository.rebuild(host, folder, POLICY, generation(12)).whole


def test_objects_of_a_pack_that_are_more_than_a_manifest_git_has(
    host: Host, folder: Path, tmp_path: Path
) -> None:
    bomb = made([(BLOB, b"%d" % number) for number in range(100_000)])
    (folder / "objects/pack").mkdir(exist_ok=True)
    (folder / "objects/pack/bomb.pack").write_bytes(bomb)
    generations.create(host, tmp_path / "made")
    repository.gather(folder, tmp_path / "made")
    assert len(list((tmp_path / "made/objects").rglob("*"))) < 25_000
    assert repository.rebuild(host, folder, POLICY, None).whole
    assert sequences(folder) == [9, 8, 7]


class Cut(Host):
    """A host whose power fails when the new repository is to take its place."""

    def swap(self, one: Path, two: Path) -> None:
        raise KeyboardInterrupt


def test_the_old_one_stays_until_the_new_one_is_whole(host: Host, folder: Path) -> None:
    git(folder, "gc", "--quiet")
    with pytest.raises(KeyboardInterrupt):
        repository.rebuild(Cut(), folder, POLICY, None)
    assert (folder / "objects/pack").exists()
    assert repository.look(folder.with_name(repository.NEW), POLICY).whole
    assert repository.rebuild(host, folder, POLICY, None).whole


def test_names_without_end_are_not_all_read(
    host: Host, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of names of one commit, and as many commits of one tree, fit into a few megabytes."""
    head = generations.head(folder)
    assert head
    names = "".join(f"{head} refs/good/{number:040x}\n" for number in range(300))
    (folder / "packed-refs").write_text(names)
    written = subprocess.run(
        ["git", "-c", "safe.directory=*", f"--git-dir={folder}", "fast-import", "--quiet"],
        input=b"".join(
            b"commit refs/good/%040x\ncommitter x <x> %d +0000\ndata 1\nx\nfrom %s\n\n"
            % (10**6 + number, number, head.encode())
            for number in range(90)
        ),
        check=False, capture_output=True,
    )  # fmt: skip
    assert written.returncode == 0, written.stderr
    (folder / "refs/heads/main").write_text("0" * 40)
    looks = []

    def look(folder: Path, policy: init.Policy) -> repository.State:
        looks.append(folder)
        return real(folder, policy)

    real = repository.look
    monkeypatch.setattr(repository, "look", look)
    assert repository.rebuild(host, folder, POLICY, None).whole
    assert len(looks) < 100
    assert sequences(folder)[:1] == [9]
