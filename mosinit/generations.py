"""manifest.git, written: each generation is one commit on the branch main, made by git's plumbing.

Git never runs in manifest.git itself: whoever was root here once may have left a configuration there, and
git obeys it in ways that no option takes back (hooks, promisor remotes, includes). So objects are made in a
fresh repository, and files are all that is added here.

The bring-up reads it without git (`init.read_generations`) and knows loose objects alone: nothing here ever
packs. A generation counts from the moment that the branch names it, and before that all of it is on the
disk: objects and their folders are synced, then the branch is moved, then its folder is synced. Which
generations have proved good is said by refs below refs/good/.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mosinit import init
from mosinit.host import Failure, Host

BRANCH = "refs/heads/main"
GOOD = "refs/good"
# For whoever works there by hand: a repack would cost the boot (GIT-PACKED).
SETTINGS = ("gc.auto=0", "maintenance.auto=false")
# No configuration but ours, and nobody's name: the same generation is the same commit.
ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    **{f"GIT_{role}_NAME": "mosinit" for role in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{role}_EMAIL": "mosinit@localhost" for role in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{role}_DATE": "@0 +0000" for role in ("AUTHOR", "COMMITTER")},
}


@dataclass(frozen=True)
class SignedManifest:
    """An install manifest as it was published: its bytes, signature and certificate."""

    sha256: str
    text: bytes
    signature: bytes
    certificate: bytes


@dataclass(frozen=True)
class NewGeneration:
    """What is to be committed; `targets` are (service name, SHA-256 of one of the manifests)."""

    product: str
    sequence: int
    uki: str
    targets: Sequence[tuple[str, str]]
    manifests: Sequence[SignedManifest]


def create(host: Host, folder: Path) -> None:
    """Make an empty manifest.git; the caller syncs the file system once something is in it."""
    words = ["init", "--quiet", "--bare", "--template=", "--object-format=sha1", "--initial-branch=main"]
    host.run(["git", *words, folder], env=ENVIRONMENT, cwd=folder.parent)
    for setting in SETTINGS:
        _git(host, folder, "config", *setting.split("="))


def add(host: Host, folder: Path, generation: NewGeneration) -> str:
    """Commit a generation above what is there, and return its commit: it is durable then.

    Objects without a generation, which a power cut may leave, disturb nobody. Raises `Failure` if another
    program moved the branch meanwhile, `Refused` if what is there is damaged.
    """
    parent = head(folder)
    with host.scratch() as work:
        create(host, work / "git")
        commit, names = _commit(host, work / "git", generation, _parent(folder, parent))
        objects = {name: _loose(work / "git", name).read_bytes() for name in names}
    for name, data in objects.items():
        _loose(folder, name).parent.mkdir(exist_ok=True)
        with host.replacing(_loose(folder, name), mode=0o444) as fresh:
            fresh.write_bytes(data)
    host.sync_file(folder / "objects")
    if head(folder) != parent:
        raise Failure(f"{folder} was changed by another program meanwhile: try again")
    _write_ref(host, folder, BRANCH, commit)
    return commit


def _commit(
    host: Host, folder: Path, generation: NewGeneration, parent: bytes | None
) -> tuple[str, list[str]]:
    """Commit in a repository that nobody else has seen; return the commit and all objects that it needs."""
    files = {"manifest.yaml": encode(generation)}
    for manifest in generation.manifests:
        files[f"{manifest.sha256}.yaml"] = manifest.text
        files[f"{manifest.sha256}.yaml.signed"] = manifest.signature
        files[f"{manifest.sha256}.pem"] = manifest.certificate
    write = ("hash-object", "-w", "--stdin", "-t")
    blobs = {name: _git(host, folder, *write, "blob", stdin=files[name]) for name in files}
    rows = "".join(f"100644 blob {blob}\t{name}\n" for name, blob in sorted(blobs.items()))
    tree = _git(host, folder, "mktree", stdin=rows.encode())
    above = [] if parent is None else ["-p", _git(host, folder, *write, "commit", stdin=parent)]
    commit = _git(host, folder, "commit-tree", tree, *above, "-m", f"generation {generation.sequence}")
    return commit, [*blobs.values(), tree, commit]


def _parent(folder: Path, commit: str | None) -> bytes | None:
    """Return the commit that a generation is laid upon, as the bring-up reads it."""
    machine = Elsewhere({init.MANIFEST_GIT: folder})
    return None if commit is None else init.read_git_object(machine, commit, "commit")


def set_branch(host: Host, folder: Path, commit: str) -> None:
    """Let the branch name a commit that is there, durably."""
    _write_ref(host, folder, BRANCH, commit)


def mark_good(host: Host, folder: Path, commit: str) -> None:
    """Say durably that a generation has started well; said before, nothing changes."""
    reference = good_reference(commit)
    (folder / reference).parent.mkdir(parents=True, exist_ok=True)
    _write_ref(host, folder, reference, commit)


def is_good(folder: Path, commit: str) -> bool:
    """Say whether a generation was marked."""
    return (folder / good_reference(commit)).exists()


def good_reference(commit: str) -> str:
    """Return the ref that marks a generation."""
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise Failure(f"{commit[:60]!r} is no generation: name one by its commit")
    return f"{GOOD}/{commit}"


def head(folder: Path) -> str | None:
    """Return the newest generation's commit."""
    return _read_ref(folder, BRANCH)


def encode(generation: NewGeneration) -> bytes:
    """Encode manifest.yaml; `init.read_generations` reads it."""
    rows = [
        "version: 1",
        f'product: "{generation.product}"',
        f"sequence: {generation.sequence}",
        f'uki: "{generation.uki}"',
        "targets:",
    ]
    for name, sha256 in generation.targets:
        rows += [f'  - service_name: "{name}"', f'    manifest: "{sha256}"']
    return "".join(f"{row}\n" for row in rows).encode()


def of_release(manifest: init.Manifest, uki: str, signed: SignedManifest) -> NewGeneration:
    """Return the generation of a release that is complete in itself."""
    contents = manifest.contents
    targets = tuple((target.service_name, manifest.sha256) for target in contents.targets)
    return NewGeneration(contents.product, contents.sequence, uki, targets, (signed,))


# --- Files of a repository ------------------------------------------------------------------------------


def _git(host: Host, folder: Path, *words: str, stdin: bytes | None = None) -> str:
    command = ["git", f"--git-dir={folder}", *words]
    return host.run(command, stdin=stdin, env=ENVIRONMENT, cwd=folder, timeout=60).decode().strip()


def _loose(folder: Path, name: str) -> Path:
    return folder / "objects" / name[:2] / name[2:]


def _read_ref(folder: Path, reference: str) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        return Quiet().read(str(folder / reference), 64).decode(errors="replace").strip()
    return None


def _write_ref(host: Host, folder: Path, reference: str, commit: str) -> None:
    """Let a ref name a commit, durably, in one step."""
    path = folder / reference
    if _read_ref(folder, reference) != commit:
        with host.replacing(path) as fresh:
            fresh.write_text(f"{commit}\n")
    while path != folder:
        path = path.parent
        host.sync_file(path)


def list_all(folder: Path, product: str) -> list[init.Generation]:
    """Return the generations of a manifest.git, newest first, as the bring-up reads them."""
    return list(init.read_generations(Elsewhere({init.MANIFEST_GIT: folder}), product))


class Quiet(init.Machine):
    """A machine that reads as the bring-up does, and says nothing: this is no boot."""

    def log(self, text: str) -> None:
        """Say nothing."""

    def print(self, text: str) -> None:
        """Say nothing."""


class Elsewhere(Quiet):
    """A machine whose folders lie elsewhere: the bring-up's functions read an installed one through it."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        super().__init__()
        self._places = dict(places)

    def real_path(self, path: str) -> str:
        """Return where a file of that machine lies."""
        for place, real in self._places.items():
            if path == place or path.startswith(f"{place}/"):
                return os.path.join(real, path[len(place) + 1 :])
        return path

    def read(self, path: str, limit: int = init.MIB) -> bytes:
        """Read a file of that machine."""
        return super().read(self.real_path(path), limit)

    def exists(self, path: str) -> bool:
        """Say whether that machine has a file."""
        return super().exists(self.real_path(path))

    def names(self, path: str) -> list[str]:
        """List a folder of that machine."""
        return super().names(self.real_path(path))

    def attach_loop(self, path: str) -> tuple[int, int]:
        """Attach a loop device to a file of that machine."""
        return super().attach_loop(self.real_path(path))

    def efi_read(self, name: str, guid: str) -> tuple[int, bytes] | None:
        """Return nothing: what this machine's firmware says is not about that one."""
        return None
