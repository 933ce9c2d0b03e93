"""manifest.git, repaired: what is good in it goes into a new one, which then takes its place in one step.

Whoever was root on the machine wrote there what they liked, and git obeys a repository's configuration. So
git sees none of it: objects are read here, loose ones must have their name's SHA-1, and of everything else
only the branch and the marks of good generations are taken over.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mosinit import generations, init, packs
from mosinit.generations import Elsewhere, NewGeneration, SignedManifest
from mosinit.host import Failure, Host
from mosinit.removal import let_change, remove

NEW = ".manifest.git.new"  # beside it, while it is made
# What ours never has: with it git sees other objects than the bring-up, or a boot sees none.
FOREIGN = (
    "packed-refs", "objects/info/alternates", "objects/info/http-alternates", "info/grafts", "shallow",
    "refs/replace", "commondir", "worktrees", "modules", "config.worktree",
)  # fmt: skip
MAX_OBJECTS, MAX_PACKS = 20_000, 64
OBJECT_BYTES, PACK_BYTES = init.MIB, 64 * init.MIB
_COMMIT = re.compile("[0-9a-f]{40}")
_REF = re.compile(rf"([0-9a-f]{{40}}) ({re.escape(generations.BRANCH)}|{generations.GOOD}/[0-9a-f]{{40}})")


@dataclass(frozen=True)
class State:
    """What a manifest.git is found to be."""

    usable: tuple[tuple[init.Generation, init.Manifest], ...]  # that verify, newest first
    fault: init.Refused | None = None  # why a boot takes none of it, or not all
    foreign: tuple[str, ...] = ()  # what does not belong there

    @property
    def whole(self) -> bool:
        """Say whether nothing is to be done."""
        return bool(self.usable) and self.fault is None and not self.foreign


def look(folder: Path, policy: init.Policy) -> State:
    """Read a manifest.git as the bring-up does; nothing is changed, and git does not run."""
    machine, usable = Elsewhere({init.MANIFEST_GIT: folder}), []
    foreign = [name for name in FOREIGN if os.path.lexists(folder / name)]
    foreign += ["objects/pack"] if _names(folder / "objects/pack") else []
    fault = None
    try:
        for each in init.read_generations(machine, policy.product):
            try:
                usable.append((each, init.verify_generation(machine, each, policy)))
            except init.Refused as refused:
                # One that its publisher calls unsafe meanwhile is none, and no damage.
                fault = fault if refused.check in ("MANIFEST-EPOCH", "MANIFEST-REVOKED") else refused
    except init.Refused as refused:
        fault = refused
    if fault:
        seen = fault.seen.replace(str(folder), init.MANIFEST_GIT)
        fault = init.Refused(fault.check, expected=fault.expected, seen=seen)
    if not usable and fault is None:
        fault = init.Refused("GENERATION", expected="a generation that holds", seen="none")
    return State(tuple(usable), fault, tuple(foreign))


def _names(folder: Path) -> list[str]:
    """List a folder that may be none."""
    with contextlib.suppress(OSError):
        if not folder.is_symlink():
            return sorted(os.listdir(folder))
    return []


def rebuild(host: Host, folder: Path, policy: init.Policy, release: NewGeneration | None) -> State:
    """Put a new manifest.git in the place of `folder`: with the generations that are there, or if none
    holds, with a release's. Raises `Failure` if there is neither.

    The old one stays until the new one is durable; what an interrupted run left is removed.
    """
    fresh = folder.with_name(NEW)
    remove(fresh)
    with host.scratch() as work:
        shutil.copytree(_made_anew(host, folder, work / "git", policy, release), fresh)
    sync_tree(host, fresh)
    if os.path.lexists(folder):
        let_change(folder)
        host.swap(fresh, folder)
    else:
        fresh.rename(folder)
    host.sync_file(folder.parent)
    remove(fresh)
    host.sync_file(folder.parent)
    return look(folder, policy)


def preview(host: Host, folder: Path, policy: init.Policy, release: NewGeneration | None) -> State:
    """Return what `rebuild` would make; nothing is changed. Raises `Failure`."""
    with host.scratch() as work:
        return look(_made_anew(host, folder, work / "git", policy, release), policy)


def _made_anew(
    host: Host, folder: Path, made: Path, policy: init.Policy, release: NewGeneration | None
) -> Path:
    """Make a repository of what is good in another, or of a release."""
    generations.create(host, made)
    gather(folder, made)
    if not _keep_chain(host, folder, made, policy):
        kept = _usable(host, made, read_refs(folder), policy)
        if not kept:
            if release is None:
                raise Failure("manifest.git has no generation that holds, and there is no release")
            kept = [(release, False)]
        shutil.rmtree(made)
        generations.create(host, made)
        for new, good in kept:
            commit = generations.add(host, made, new)
            if good:
                generations.mark_good(host, made, commit)
    check(host, made)
    _prune(made, policy)
    return made


def sync_tree(host: Host, folder: Path) -> None:
    """Make every file and folder below durable, names last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        host.sync_file(path)
    host.sync_file(folder)


# --- Objects ---------------------------------------------------------------------------------------------


def gather(folder: Path, made: Path) -> None:
    """Bring every object that is whole into a repository of ours: loose ones, and those in packs."""
    for name, data in _loose_objects(folder):
        _lay(made, name, data)
    budget = packs.Budget()
    names = [name for name in _names(folder / "objects/pack") if name.endswith(".pack")]
    for pack in names[:MAX_PACKS]:
        # What can be had of a pack that is damaged is had; what counts is read again below.
        for name, whole in packs.read(_read(folder / "objects/pack" / pack, PACK_BYTES), budget):
            _lay(made, name, zlib.compress(whole))


def _lay(made: Path, name: str, data: bytes) -> None:
    target = made / "objects" / name[:2] / name[2:]
    target.parent.mkdir(exist_ok=True)
    if not target.exists():
        target.write_bytes(data)


def _loose_objects(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the loose objects that are what their names say."""
    count = 0
    for first in _names(folder / "objects"):
        if not re.fullmatch("[0-9a-f]{2}", first):
            continue
        for rest in _names(folder / "objects" / first):
            count += 1
            if count > MAX_OBJECTS:
                return
            name = first + rest
            data = _read(folder / "objects" / first / rest, OBJECT_BYTES)
            if _COMMIT.fullmatch(name) and _is_object(name, data):
                yield name, data


def _is_object(name: str, data: bytes) -> bool:
    stream = zlib.decompressobj()
    with contextlib.suppress(zlib.error):
        whole = stream.decompress(data, OBJECT_BYTES)
        return stream.eof and not stream.unused_data and hashlib.sha1(whole).hexdigest() == name
    return False


def _read(path: Path, limit: int) -> bytes:
    """Read a regular file; nothing if it is none, or cannot be read."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with init.held(os.open(path, flags)) as fd, open(fd, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    except OSError:
        return b""
    return data if len(data) <= limit else b""


# --- Refs ------------------------------------------------------------------------------------------------


def _keep_chain(host: Host, folder: Path, made: Path, policy: init.Policy) -> bool:
    """Take the branch over as it is, with the marks of its generations; say whether all of it is whole."""
    named = read_refs(folder)
    head = named.get(generations.BRANCH)
    if head is None or not _exists(made, head):
        return False
    generations.set_branch(host, made, head)
    state = look(made, policy)
    if not state.whole:
        return False
    for name, commit in named.items():
        if name.startswith(generations.GOOD) and commit in {each.commit for each, _ in state.usable}:
            generations.mark_good(host, made, commit)
    try:
        check(host, made)
    except Failure:
        return False
    return True


def _usable(
    host: Host, made: Path, named: dict[str, str], policy: init.Policy
) -> list[tuple[NewGeneration, bool]]:
    """Return every generation that a ref leads to and that verifies, by sequence, and whether it is good.

    Each is to be committed anew: what a damaged one hides behind it would stay hidden.
    """
    found: dict[int, tuple[NewGeneration, bool]] = {}
    machine = Elsewhere({init.MANIFEST_GIT: made})
    heads = dict.fromkeys([named.get(generations.BRANCH, ""), *named.values()])
    there = (commit for commit in heads if _exists(made, commit))
    # Each is read with all that is behind it, and names cost whoever wrote them nothing.
    for commit in itertools.islice(there, init.MAX_GENERATIONS):
        generations.set_branch(host, made, commit)
        for each, manifest in look(made, policy).usable:
            good = f"{generations.GOOD}/{each.commit}" in named
            if each.sequence not in found or good:
                found[each.sequence] = (_as_new(machine, each, manifest.contents.product), good)
    return [found[sequence] for sequence in sorted(found)]


def _as_new(machine: init.Machine, generation: init.Generation, product: str) -> NewGeneration:
    """Return a generation as it is committed."""
    manifests = []
    for sha256 in dict.fromkeys(dict(generation.targets).values()):
        names = [f"{sha256}{ending}" for ending in (".yaml", ".yaml.signed", ".pem")]
        parts = [init.read_git_object(machine, generation.files[name], "blob") for name in names]
        manifests.append(SignedManifest(sha256, *parts))
    return NewGeneration(product, generation.sequence, generation.uki, generation.targets, manifests)


def _exists(made: Path, commit: str) -> bool:
    return (made / "objects" / commit[:2] / commit[2:]).is_file()


def read_refs(folder: Path) -> dict[str, str]:
    """Return the refs of ours that a manifest.git has, packed or loose, by name."""
    found = {}
    for line in _read(folder / "packed-refs", init.MIB).decode(errors="replace").splitlines():
        if named := _REF.fullmatch(line):
            found[named[2]] = named[1]
    names = [
        generations.BRANCH,
        *(f"{generations.GOOD}/{name}" for name in _names(folder / generations.GOOD)),
    ]
    for name in names:
        commit = _read(folder / name, 64).decode(errors="replace").strip()
        if _REF.fullmatch(f"{commit} {name}"):
            found[name] = commit
    return found


# --- What came of it -------------------------------------------------------------------------------------


def check(host: Host, folder: Path) -> None:
    """Have git look at all of a repository that is ours. Raises `Failure`."""
    words = ["git", f"--git-dir={folder}", "fsck", "--full", "--no-dangling"]
    host.run(words, env=generations.ENVIRONMENT, cwd=folder, timeout=120)


def _prune(folder: Path, policy: init.Policy) -> None:
    """Leave only what the branch leads to: others would be carried along for ever."""
    machine, needed = Elsewhere({init.MANIFEST_GIT: folder}), set()
    with contextlib.suppress(init.Refused):
        for each in init.read_generations(machine, policy.product):
            tree = re.match(rb"tree ([0-9a-f]{40})\n", init.read_git_object(machine, each.commit, "commit"))
            needed |= {each.commit, *each.files.values(), *({tree[1].decode()} if tree else set())}
    for first in _names(folder / "objects"):
        for rest in _names(folder / "objects" / first) if len(first) == 2 else []:
            if first + rest not in needed:
                (folder / "objects" / first / rest).unlink()
