"""hostfs and the kernel: what mkosi builds from `mkosi.conf` and the `mkosi.*` folders beside it.

This module knows nothing of distributions and packages; those are `mkosi.conf`'s. What is built is kept in
the user's cache under a name derived from everything it was built from, so that a second call is instant.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mosinit import tools
from mosinit.host import Failure, Host, closed_environment

# What mkosi itself writes, and the image that only wraps a UKI.
NOT_INPUTS = {
    "mkosi.builddir",
    "mkosi.cache",
    "mkosi.output",
    "mkosi.tools",
    "mkosi.uki",
    "mkosi.workspace",
}
KERNEL_INPUTS = {
    "mkosi.conf",
    "mkosi.conf.d",
    "mkosi.images",
    "mkosi.local",
    "mkosi.local.conf",
    "mkosi.sandbox",
}
# Changes whenever the way this module calls mkosi changes what comes out.
RECIPE = "1"
KEPT = 3


@dataclass(frozen=True)
class KernelTree:
    """A kernel image and its modules (the folder `lib/modules/VERSION`)."""

    version: str
    vmlinuz: Path
    modules: Path


def build(host: Host, out: Path, profile: str | None = None) -> Path:
    """Return the OCI layout of hostfs at `out/hostfs`, building it if need be; `profile` is mkosi's."""
    names = [name for name in _configuration() if name != "mkosi.images"]
    words = ["--dependency=", *(["--profile", profile] if profile else [])]
    return _place(host, _cached(host, "hostfs", [*names, "mosinit", "mosinit.py"], words), out / "hostfs")


def kernel(host: Host, out: Path) -> KernelTree:
    """Return the kernel and modules that mkosi.images/bootkit names, at `out/kernel`."""
    names = [name for name in _configuration() if name in KERNEL_INPUTS]
    modules = _place(
        host, _cached(host, "bootkit", names, ["--format=none", "--dependency=bootkit"]), out / "kernel"
    )
    versions = [folder.name for folder in modules.iterdir() if (folder / "vmlinuz").is_file()]
    if len(versions) != 1:
        raise Failure(
            f"mkosi.images/bootkit must install one kernel, it has {len(versions)}: change its Packages="
        )
    return KernelTree(versions[0], modules / versions[0] / "vmlinuz", modules / versions[0])


# --- What a build is made from ------------------------------------------------------------------------


def _configuration() -> list[str]:
    """Name the files and folders beside mkosi.conf that mkosi reads."""
    names = os.listdir(tools.checkout())
    return sorted(name for name in names if name.startswith("mkosi.") and name not in NOT_INPUTS)


def stage(root: Path, names: list[str], target: Path) -> None:
    """Copy a build's inputs, with the modes that git keeps: no checkout's umask ends up in an image."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in names:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, symlinks=True, ignore=ignore)
        else:
            shutil.copyfile(root / name, target / name)
            shutil.copymode(root / name, target / name)
    for path in [target, *target.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def key_of(source: Path, words: list[str]) -> str:
    """Name everything that a build depends on, in 16 hex digits."""
    digest = hashlib.sha256(json.dumps([RECIPE, tools.key(), words]).encode())
    for path in sorted(source.rglob("*")):
        content = (
            os.readlink(path).encode() if path.is_symlink() else b"" if path.is_dir() else path.read_bytes()
        )
        entry = [str(path.relative_to(source)), path.lstat().st_mode, hashlib.sha256(content).hexdigest()]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()[:16]


# --- Running mkosi ------------------------------------------------------------------------------------


def _cached(host: Host, image: str, names: list[str], words: list[str]) -> Path:
    """Return the cached result of mkosi's `image`; if there is none, build it and put it there whole."""
    cache = tools.own_cache()
    with host.scratch(near=cache / image) as folder:
        source = folder / "source"
        source.mkdir()
        stage(tools.checkout(), names, source)
        result = cache / f"{image}-{key_of(source, words)}"
        if not result.exists():
            # One at a time: another process may be building just this.
            with tools.locked(cache / "mkosi.lock"):
                if not result.exists():
                    _mkosi(host, image, words, folder).rename(result)
                os.utime(result)
                _forget_old(cache, image)
    tools.check_own(result)
    os.utime(result)
    return result


def _mkosi(host: Host, image: str, words: list[str], folder: Path) -> Path:
    """Run mkosi on `folder/source` and return the part of its result that is kept."""
    host.say(f"building {image} with mkosi: under a minute when the packages are near")
    source, output, work, packages = (
        folder / "source",
        folder / "output",
        folder / "work",
        tools.cache() / "packages",
    )
    for path in (output, work, packages):
        path.mkdir(exist_ok=True)
    _write_sources(host, source)
    host.run(
        ["mkosi", "--directory", source, *words, "--output-directory", output, "--workspace-directory", work,
         "--package-cache-dir", packages, "--force", "build"],
        timeout=1800,
        env=_environment(),
    )  # fmt: skip
    return output / "hostfs" if image == "hostfs" else output / image / "usr/lib/modules"


def _environment() -> dict[str, str]:
    """Let mkosi see the way to the network, and nothing that would change what it builds."""
    ways = ("HOME", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
    return closed_environment(**{name: os.environ[name] for name in ways if name in os.environ})


def _write_sources(host: Host, source: Path) -> None:
    """Let mkosi fetch Debian packages where this host does; other distributions keep mkosi's own choice."""
    target = source / "mkosi.sandbox/etc/apt/sources.list.d/mkosi.sources"
    image = json.loads(host.run(["mkosi", "--directory", source, "--json", "summary"], env=_environment()))[
        "Images"
    ][-1]
    if image["Distribution"] != "debian" or target.exists():
        return
    stanzas = []
    for line in tools.debian_sources(Path("/etc/apt"), image["Release"]):
        _, keyring, uri, suite, component = line.split()
        signed_by = keyring.strip("[]").partition("=")[2]
        stanzas.append(
            f"Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: {component}\nSigned-By: {signed_by}\n"
        )
    if stanzas:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(stanzas))


def _forget_old(cache: Path, image: str) -> None:
    """Keep the newest few results of an image: every change of a file makes one of tens of megabytes."""
    old = sorted(cache.glob(f"{image}-*"), key=lambda path: path.stat().st_mtime)[:-KEPT]
    for path in old:
        shutil.rmtree(path)


def _place(host: Host, cached: Path, target: Path) -> Path:
    """Copy a cached result to `target`, unless it is there: what a person does to theirs stays theirs."""
    stamp = target.with_name(f".{target.name}.key")
    if target.is_dir() and stamp.is_file() and stamp.read_text() == cached.name:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    with host.scratch(near=target) as folder:
        shutil.copytree(cached, folder / "new", symlinks=True)
        shutil.rmtree(target, ignore_errors=True)
        (folder / "new").rename(target)
    with host.replacing(stamp) as fresh:
        fresh.write_text(cached.name)
    return target
