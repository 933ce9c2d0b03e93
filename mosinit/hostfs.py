"""hostfs and the kernel: what mkosi builds from `mkosi.conf` and the `mkosi.*` folders beside it.

This module knows nothing of distributions and packages; those are `mkosi.conf`'s. What is built is kept in
the user's cache under a name derived from everything it was built from, so that a second call is instant.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mosinit import tools
from mosinit.host import Failure, Host, Usage, closed_environment

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
INSTALLER_KEYS = "mkosi.extra/etc/mosinit/installer_keys"  # mosinit-live-ssh.service looks there
REGISTRY_CA = "mkosi.extra/etc/mosinit/registry-ca.pem"  # registry.py looks there
TOKEN_KEYS = ("sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com")


@dataclass(frozen=True)
class KernelTree:
    """A kernel image and its modules (the folder `lib/modules/VERSION`)."""

    version: str
    vmlinuz: Path
    modules: Path


def build(
    host: Host,
    out: Path,
    profile: str | None = None,
    *,
    installer_keys: bytes = b"",
    registry_ca: bytes = b"",
) -> Path:
    """Return the OCI layout of hostfs at `out/hostfs`, building it if need be; `profile` is mkosi's,
    `installer_keys` are who may install by SSH, and `registry_ca` is one more CA (PEM) of registries.
    """
    names = [name for name in _configuration() if name != "mkosi.images"]
    words = ["--dependency=", *(["--profile", profile] if profile else [])]
    given = {INSTALLER_KEYS: installer_keys, REGISTRY_CA: registry_ca}
    more = {name: content for name, content in given.items() if content}
    cached = _cached(host, "hostfs", [*names, "mosinit", "mosinit.py"], words, more)
    return _place(host, cached, out / "hostfs")


def check_profile(profile: str) -> None:
    """Raise `Usage` for a profile that the checkout does not have: mkosi would build hostfs without a word
    about it.
    """
    names = sorted(
        path.name.removesuffix(".conf") for path in (tools.checkout() / "mkosi.profiles").iterdir()
    )
    if profile not in names:
        raise Usage(
            f"there is no profile {profile}: --profile takes {', '.join(names)} (see mkosi.profiles)"
        )


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


def read_installer_keys(path: Path) -> bytes:
    """Read who may install by SSH: plain public keys, one a line. Raises `Failure`.

    Options in front of a key are for commands and forwardings, and there are none.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeError) as error:
        raise Failure(
            f"cannot read the keys {path}: name a file as ~/.ssh/authorized_keys is one"
        ) from error
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    for line in keys:
        _check_ssh_key(path, line.split())
    if not keys:
        raise Failure(f"{path} holds no public key: put one a line into it, as `ssh-keygen` writes them")
    return "".join(f"{line}\n" for line in keys).encode()


def _check_ssh_key(path: Path, words: list[str]) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import dsa, rsa
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    what = f"{path}: {' '.join(words)[:40]!r}"
    try:
        blob = base64.b64decode("".join(words[1:2]), validate=True)
        if not blob.startswith(len(words[0]).to_bytes(4) + words[0].encode()):
            raise ValueError("another kind inside")
        if words[0] in TOKEN_KEYS:
            return  # of a token: sshd reads those itself
        key = load_ssh_public_key(" ".join(words[:2]).encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Failure(
            f"{what} is no public key of SSH: write `ssh-ed25519 AAAA… NAME`, one a line"
        ) from error
    if isinstance(key, dsa.DSAPublicKey) or (isinstance(key, rsa.RSAPublicKey) and key.key_size < 3072):
        raise Failure(f"{what} is too weak a key: use an Ed25519 key, or an RSA key of 3072 bits or more")


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


def _cached(
    host: Host, image: str, names: list[str], words: list[str], more: Mapping[str, bytes] | None = None
) -> Path:
    """Return the cached result of mkosi's `image`; if there is none, build it and put it there whole.

    `more` are files beside those of the checkout.
    """
    cache = tools.own_cache()
    with host.scratch(near=cache / image) as folder:
        source = folder / "source"
        source.mkdir()
        stage(tools.checkout(), names, source)
        for name, content in (more or {}).items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
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
