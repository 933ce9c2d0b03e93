"""manifest.git, written: each generation is one commit on the branch main, made by git's plumbing.

The bring-up reads it without git (`init.read_generations`) and knows loose objects alone: nothing here ever
packs. A generation counts from the moment that the branch names it, and before that all of it is on the
disk: objects and their folders are synced, then the branch is moved, then its folder is synced. Which
generations have proved good is said by refs below refs/good/.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mosinit import init
from mosinit.host import Failure, Host

BRANCH = "refs/heads/main"
GOOD = "refs/good"
# On a running machine a repack would cost the boot (GIT-PACKED); what is written must outlive a power cut.
SETTINGS = (
    "gc.auto=0", "maintenance.auto=false", "core.fsync=all", "core.fsyncMethod=fsync",
    "core.logAllRefUpdates=false", "safe.directory=*",
)  # fmt: skip
# No configuration but ours, no hooks to run, and nobody's name: the same generation is the same commit.
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
    for setting in SETTINGS[:2]:
        # For whoever works here by hand.
        _git(host, folder, "config", *setting.split("="))


def add(host: Host, folder: Path, generation: NewGeneration) -> str:
    """Commit a generation above what is there, and return its commit: it is durable then.

    Objects without a generation, which a power cut may leave, disturb nobody.
    """
    files = {"manifest.yaml": encode(generation)}
    for manifest in generation.manifests:
        files[f"{manifest.sha256}.yaml"] = manifest.text
        files[f"{manifest.sha256}.yaml.signed"] = manifest.signature
        files[f"{manifest.sha256}.pem"] = manifest.certificate
    blobs = {name: _git(host, folder, "hash-object", "-w", "--stdin", stdin=files[name]) for name in files}
    rows = "".join(f"100644 blob {blob}\t{name}\n" for name, blob in sorted(blobs.items()))
    tree = _git(host, folder, "mktree", stdin=rows.encode())
    parent = head(folder)
    words = ["-p", parent] if parent else []
    commit = _git(host, folder, "commit-tree", tree, *words, "-m", f"generation {generation.sequence}")
    _sync_objects(host, folder, [*blobs.values(), tree, commit])
    _git(host, folder, "update-ref", BRANCH, commit, parent or "0" * 40)
    _sync_ref(host, folder, BRANCH)
    return commit


def mark_good(host: Host, folder: Path, commit: str) -> None:
    """Say durably that a generation has started well; said before, nothing changes."""
    reference = good_reference(commit)
    if not (folder / reference).exists():
        _git(host, folder, "update-ref", reference, commit)
    _sync_ref(host, folder, reference)


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
    try:
        return (folder / BRANCH).read_text().strip()
    except FileNotFoundError:
        return None


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


# --- git, and what it leaves to us ----------------------------------------------------------------------


def _git(host: Host, folder: Path, *words: str, stdin: bytes | None = None) -> str:
    settings = [word for setting in SETTINGS for word in ("-c", setting)]
    command = ["git", *settings, f"--git-dir={folder}", *words]
    return host.run(command, stdin=stdin, env=ENVIRONMENT, cwd=folder).decode().strip()


def _sync_objects(host: Host, folder: Path, names: Sequence[str]) -> None:
    """Make objects durable. Git synced the files it wrote; one that was there already is whose it was."""
    for name in names:
        host.sync_file(folder / "objects" / name[:2] / name[2:])
    for first in sorted({name[:2] for name in names}):
        host.sync_file(folder / "objects" / first)
    host.sync_file(folder / "objects")


def _sync_ref(host: Host, folder: Path, reference: str) -> None:
    path = folder / reference
    host.sync_file(path)
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
