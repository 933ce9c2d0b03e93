"""The tools tree: a Debian 13 folder with every program that builds, signs and boots, so that the host's own do not matter.

The tree is made once by mmdebstrap from the host's own package sources, kept in the user's cache under a name derived
from what is in it, and entered by a mount namespace of its own: `/usr`, `/etc` and `/var` are the tree's, every other
folder of the host (home, work folders, `/tmp`, `/dev`) appears where it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from mosinit import init
from mosinit.host import Failure, Host

SUITE = "trixie"
PACKAGES = (
    "ca-certificates", "cpio", "cryptsetup-bin", "dosfstools", "e2fsprogs", "erofs-utils", "faketime", "fdisk", "git",
    "kmod", "libtss2-tcti-swtpm0t64", "mkosi", "mtools", "mypy", "openssl", "ovmf", "python3", "python3-cryptography",
    "python3-hypothesis", "python3-pip", "python3-pyelftools", "python3-pytest", "python3-rich",
    "python3-virt-firmware", "python3-yaml", "qemu-system-x86", "qemu-utils", "sbsigntool", "shellcheck", "skopeo",
    "squashfs-tools", "swtpm", "swtpm-tools", "systemd", "systemd-boot-efi", "systemd-repart", "systemd-ukify",
    "tpm2-tools", "uidmap", "zstd",
)  # fmt: skip
WHEELS = ("qemu.qmp==0.0.3", "ruff==0.14.5", "types-PyYAML==6.0.12.20250915")

STAMP = "usr/share/mosinit/tools-tree"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
TREE_OWN = {"bin", "boot", "etc", "lib", "lib32", "lib64", "libx32", "lost+found", "sbin", "usr", "var"}
FROM_HOST_ETC = ("resolv.conf", "hosts", "pip.conf", "ssl/certs/ca-certificates.crt", "localtime")


def key() -> str:
    """Name what the tree holds: a tree of another content has another key."""
    return hashlib.sha256("\n".join((SUITE, *PACKAGES, *WHEELS, "1")).encode()).hexdigest()[:16]


def cache() -> Path:
    """Return the user's cache folder for mosinit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mosinit"


def inside() -> bool:
    """Say whether this process runs inside the tools tree of this very content."""
    try:
        return Path("/", STAMP).read_text() == key()
    except OSError:
        return False


def run_inside(host: Host, arguments: list[str]) -> None:
    """Return if this process is inside the tools tree; otherwise make the tree, enter it and start the command again."""
    if inside():
        return
    if os.geteuid() != 0:
        raise Failure("this needs root (mounts, loop devices, a tools tree): run it as root")
    enter(host, ensure(host), ["/usr/bin/python3", "-m", "mosinit", *arguments])


def ensure(host: Host) -> Path:
    """Return the tools tree, making it first if the cache has none."""
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    tree = folder / f"tools-{key()}"
    with open(folder / "tools.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (tree / STAMP).exists():
            _make(host, tree)
    return tree


def _make(host: Host, tree: Path) -> None:
    host.say("making the tools tree (Debian 13, about 800 MB, once): one to three minutes")
    _need_mmdebstrap(host)
    fresh = tree.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    sources = "".join(f"{line}\n" for line in debian_sources(Path("/etc/apt"), SUITE)).encode()
    host.run(
        ["mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", *_apt_proxies(host),
         SUITE, fresh, *(["-"] if sources else [])],
        stdin=sources,
        timeout=1800,
    )  # fmt: skip
    host.say("tools tree: adding what Debian lacks from PyPI")
    pip = ["/usr/bin/python3", "-m", "pip", "install", "--quiet", "--break-system-packages", "--no-deps",
           "--root-user-action=ignore", *WHEELS]  # fmt: skip
    _in_child(host, fresh, pip)
    (fresh / STAMP).parent.mkdir(parents=True, exist_ok=True)
    (fresh / STAMP).write_text(key())
    shutil.rmtree(tree, ignore_errors=True)
    fresh.rename(tree)


def _need_mmdebstrap(host: Host) -> None:
    if shutil.which("mmdebstrap"):
        return
    if not shutil.which("apt-get"):
        raise Failure("mmdebstrap is missing and this is no Debian or Ubuntu: install mmdebstrap")
    host.say("installing mmdebstrap, which makes the tools tree")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    host.run(["apt-get", "update", "-q"], env=quiet, timeout=600)
    host.run(["apt-get", "install", "-qy", "--no-install-recommends", "mmdebstrap"], env=quiet, timeout=900)


def _apt_proxies(host: Host) -> list[str]:
    """Pass on the proxy that the host's own apt uses."""
    if not shutil.which("apt-config"):
        return []
    lines = host.run(["apt-config", "dump"]).decode().splitlines()
    return [f"--aptopt={line}" for line in lines if line.startswith("Acquire::http") and "::Proxy " in line]


def debian_sources(apt: Path, suite: str) -> list[str]:
    """Return one-line apt sources for `suite`, on the mirrors that the host's own Debian sources name.

    Empty when the host has none (another distribution): mmdebstrap then takes its own default mirror.
    """
    lines = []
    for uri, old in dict.fromkeys(_host_sources(apt)):
        pocket = old.partition("-")[2] if "-" in old else ""
        if pocket in ("", "updates", "security"):
            new = suite + (f"-{pocket}" if pocket else "")
            lines.append(f"deb [signed-by={KEYRING}] {uri} {new} main")
    return list(dict.fromkeys(lines))


def _host_sources(apt: Path) -> Iterator[tuple[str, str]]:
    """Yield (mirror, suite) of every Debian source with the component main that the host uses."""
    for path in (apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))):
        for line in path.read_text().splitlines() if path.is_file() else ():
            words = [word for word in line.split("#")[0].split() if not word.startswith(("[", "signed-by", "arch="))]
            if len(words) >= 4 and words[0] == "deb" and "main" in words[3:] and _is_debian(words[1], words[2]):
                yield words[1].rstrip("/"), words[2]
    for path in sorted((apt / "sources.list.d").glob("*.sources")):
        for stanza in path.read_text().split("\n\n"):
            field = {k.strip().lower(): v.split() for k, _, v in (x.partition(":") for x in stanza.splitlines()
                     if x and not x.startswith("#"))}  # fmt: skip
            if "deb" in field.get("types", []) and "main" in field.get("components", []):
                yield from ((u.rstrip("/"), s) for u in field.get("uris", []) for s in field.get("suites", [])
                            if _is_debian(u, s))  # fmt: skip


def _is_debian(uri: str, suite: str) -> bool:
    path = uri.rstrip("/").rsplit("/", 1)[-1]
    codenames = ("bullseye", "bookworm", "trixie", "forky", "sid", "stable", "testing")
    return path in ("debian", "debian-security") and suite.partition("-")[0] in codenames


def _in_child(host: Host, tree: Path, command: list[str]) -> None:
    """Run a command inside the tree and wait for it."""
    child = os.fork()
    if child == 0:
        try:
            enter(host, tree, command)
        except BaseException as error:  # the child must never return into the parent's code
            host.say(f"cannot enter the tools tree: {error}")
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise Failure(f"{os.path.basename(command[0])} failed inside the tools tree; its messages are above")


def enter(host: Host, tree: Path, command: list[str]) -> NoReturn:
    """Replace this process by `command`, run with the tree's system folders and the host's everything else."""
    here = Path.cwd()
    host.unshare_mounts()
    # Any folder that is not shown inside will do as the mount point: one that is would contain itself.
    root = Path("/boot")
    host.mount("mosinit-tools", str(root), "tmpfs", init.MountFlag(0), "mode=0755")
    for name in sorted(TREE_OWN & set(os.listdir(tree)) - {"boot"}):
        _show(host, tree / name, root / name)
    for name in sorted(set(os.listdir("/")) - TREE_OWN):
        _show(host, Path("/", name), root / name)
    _show(host, Path("/var/tmp"), root / "var/tmp")
    for name in FROM_HOST_ETC:
        if Path("/etc", name).is_file():
            (root / "etc" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "etc" / name).touch()
            host.mount(os.path.realpath(f"/etc/{name}"), str(root / "etc" / name), "", init.MountFlag.BIND)
    host.pivot_root(str(root))
    os.chdir(here)
    env = {**os.environ, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    for name in ("PYTHONHOME", "PYTHONPATH", "LD_PRELOAD", "LD_LIBRARY_PATH"):
        env.pop(name, None)
    sys.stdout.flush()
    os.execve(command[0], command, env)


def _show(host: Host, source: Path, target: Path) -> None:
    """Make a folder or symlink of the tree or the host appear below the new root."""
    if source.is_symlink():
        if not target.is_symlink():
            target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        host.mount(str(source), str(target), "", init.MountFlag.BIND | init.MountFlag.REC)
