"""The tools tree: a Debian 13 folder with every program that builds, signs and boots.

The tree is made once by mmdebstrap from the host's own package sources, kept in the user's cache under a
name derived from what is in it, and entered by a mount namespace of its own: `/usr`, `/etc` and `/var` are
the tree's, every other folder of the host (home, work folders, `/tmp`, `/dev`) appears where it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from mosinit import init
from mosinit.host import Failure, Host, Usage

SUITE = "trixie"
PACKAGES = (
    "ca-certificates", "cpio", "cryptsetup-bin", "docker-registry", "dosfstools", "e2fsprogs", "erofs-utils",
    "faketime", "fdisk", "git", "iproute2", "kmod", "libtss2-tcti-swtpm0t64", "mkosi", "mtools", "mypy",
    "openssh-client", "openssl", "ovmf", "python3", "python3-cryptography", "python3-hypothesis",
    "python3-jsonschema", "python3-pip", "python3-pyelftools", "python3-pytest", "python3-pytest-xdist",
    "python3-rich", "python3-tpm2-pytss", "python3-urwid", "python3-virt-firmware", "python3-yaml",
    "qemu-system-x86", "qemu-utils", "sbsigntool", "shellcheck", "skopeo", "squashfs-tools", "swtpm",
    "swtpm-tools", "systemd", "systemd-boot-efi", "systemd-repart", "systemd-ukify", "tmux", "tpm2-openssl",
    "tpm2-tools", "uidmap", "umoci", "user-mode-linux", "zstd",
)  # fmt: skip
WHEELS = ("qemu.qmp==0.0.3", "ruff==0.14.5", "types-PyYAML==6.0.12.20250915")

STAMP = "usr/share/mosinit/tools-tree"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
TREE_OWN = {"bin", "boot", "etc", "lib", "lib32", "lib64", "libx32", "lost+found", "sbin", "usr", "var"}
NEEDED_BYTES = 3 << 30  # the tree, and as much again while it is made
UNUSED_SECONDS = 7 * 24 * 3600

# The package alone, shown at a path of its own: the folder it lies in may be full of another Python's
# modules, and the current folder must not be able to put a module of its own into a process of root.
CODE = "/.mosinit"
START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    f"sys.path.insert(0, {CODE!r}); from mosinit.cli import main; sys.exit(main())"
)
FROM_HOST_ETC = ("resolv.conf", "hosts", "pip.conf", "ssl/certs/ca-certificates.crt", "localtime")


def key_of(suite: str, packages: Sequence[str], wheels: Sequence[str]) -> str:
    """Name the content of a tree: another content has another key."""
    # The last word counts the ways in which trees were made.
    return hashlib.sha256("\n".join((suite, *packages, *wheels, "1")).encode()).hexdigest()[:16]


def key() -> str:
    """Name the tree that this code needs."""
    return key_of(SUITE, PACKAGES, WHEELS)


def cache() -> Path:
    """Return the user's cache folder for mosinit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mosinit"


def own_cache(folder: Path | None = None) -> Path:
    """Return the cache folder, made if need be, which nobody but this user and root can change.

    What lies in it runs as root. Raises `Failure`.
    """
    folder = folder or cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(
            f"cannot write {folder}: {error.strerror}; set XDG_CACHE_HOME to another folder"
        ) from error
    real = Path(os.path.realpath(folder))
    check_own(real)
    return real


def check_own(folder: Path) -> None:
    """Raise `Failure` if somebody else can change what lies in a folder, or put another in its place."""
    for place in (folder, *folder.parents):
        found = place.lstat()
        # In /tmp nobody can rename what is another's.
        shared = found.st_mode & 0o022 and not (found.st_mode & stat.S_ISVTX and place != folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (0, os.geteuid()) or shared:
            raise Failure(
                f"{place} is one that others may change, and what lies there would run as root: name a "
                "folder of your own with XDG_CACHE_HOME"
            )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file. Raises `Failure`."""
    try:
        handle = _open_lock(path)
    except OSError as error:
        raise Failure(f"cannot lock {path}: {error.strerror}; remove it") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def inside() -> bool:
    """Say whether this process runs inside the tools tree of this very content."""
    try:
        return Path("/", STAMP).read_text() == key()
    except OSError:
        return False


def on_machine(left: Path = Path(init.LEFT)) -> bool:
    """Say whether mosinit started this system: its hostfs has what the verbs of machines call."""
    return (left / "policy.json").is_file()


def run_inside(host: Host, arguments: list[str]) -> None:
    """Return if this process is inside the tools tree; otherwise enter it and start the command again.

    Raises `Usage` if the current folder cannot be seen from inside, `Failure` without root.
    """
    if inside():
        return
    if os.geteuid() != 0:
        raise Failure("this needs root (mounts, loop devices, a tools tree): run it as root")
    check_visible(Path.cwd(), "the current folder")
    tree = ensure(host)
    _use(tree)
    enter(host, tree, ["/usr/bin/python3", "-P", "-c", START, *arguments])


def checkout() -> Path:
    """Return the checkout that this code runs from. Raises `Failure` if it runs from anywhere else."""
    root = Path(__file__).resolve().parent.parent
    if not all((root / name).exists() for name in ("pyproject.toml", "mosinit.py", "mkosi.conf")):
        raise Failure("this needs a checkout: clone the project and run `python3 -m mosinit` in it")
    return root


def hidden(path: Path) -> bool:
    """Say whether a path of the host lies where the tools tree shows its own files instead."""
    real = Path(os.path.realpath(path))
    return real.parts[1:2] != () and real.parts[1] in TREE_OWN and not real.is_relative_to("/var/tmp")


def check_visible(path: Path, name: str) -> None:
    """Raise `Usage` if the tools tree hides a path that the command is to work with."""
    if not inside() and hidden(path):
        raise Usage(
            f"{name} ({path}) lies where the tools tree has its own files: use /root, /home, /srv or /tmp"
        )


def ensure(host: Host, folder: Path | None = None) -> Path:
    """Return the tools tree, making it first if the cache has none; unused old trees are removed."""
    folder = folder or cache()
    check_visible(folder, "the cache folder, see XDG_CACHE_HOME,")
    folder = own_cache(folder)
    tree = folder / f"tools-{key()}"
    with locked(folder / "tools.lock"):
        if not (tree / STAMP).exists():
            _make(host, tree)
        check_own(tree)
        _remove_unused(host, tree)
    return tree


def _use(tree: Path) -> None:
    """Say that this process, and what it becomes by exec, uses the tree: nobody removes it meanwhile."""
    handle = _open_lock(Path(f"{tree}.lock"))
    fcntl.flock(handle, fcntl.LOCK_SH)
    os.utime(handle)
    os.set_inheritable(handle, True)


def _remove_unused(host: Host, keep: Path) -> None:
    """Remove trees of another content that no process uses and none has used for a week."""
    for tree in (path for path in keep.parent.glob("tools-*") if path.is_dir() and path != keep):
        lock = _open_lock(Path(f"{tree}.lock"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            half_made = tree.suffix != ""
            if half_made or time.time() - os.stat(lock).st_mtime > UNUSED_SECONDS:
                host.say(f"removing {tree.name}, an unused tools tree of another version")
                _remove(host, tree)
                os.unlink(f"{tree}.lock")
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def _remove(host: Host, tree: Path) -> None:
    """Remove a tree, whatever an interrupted run left mounted in it."""
    doomed = tree.with_suffix(".old")
    if tree.is_dir() and tree != doomed:
        if doomed.is_dir():
            _remove(host, doomed)
        # A tree that is half gone must not be taken for a whole one: its stamp may be the last file to go.
        tree.rename(doomed)
    for point in reversed(mounts_below(Path("/proc/self/mountinfo").read_text(), doomed)):
        # Removing files would otherwise go on into the host's own /dev.
        host.unmount(point, lazy=True)
    if doomed.is_dir():
        shutil.rmtree(doomed)


def mounts_below(mountinfo: str, folder: Path) -> list[str]:
    """Return the mount points below a folder, in the order they were mounted (proc(5), mountinfo)."""
    points = [line.split()[4] for line in mountinfo.splitlines()]
    plain = [re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point) for point in points]
    return [point for point in plain if point.startswith(f"{os.path.realpath(folder)}/")]


def _make(host: Host, tree: Path) -> None:
    free = shutil.disk_usage(tree.parent).free
    if free < NEEDED_BYTES:
        raise Failure(
            f"{tree.parent} has {free >> 20} MiB free, the tools tree needs {NEEDED_BYTES >> 20} MiB"
        )
    _need_mmdebstrap(host)
    host.say("making the tools tree (Debian 13, about 800 MB, once): one to three minutes")
    fresh = tree.with_suffix(".new")
    _remove(host, fresh)
    sources = "".join(f"{line}\n" for line in debian_sources(Path("/etc/apt"), SUITE)).encode()
    # Its end is tied to ours, and its processes and mounts to its own: an interrupted run leaves only files.
    status = host.call(
        ["setpriv", "--pdeathsig", "KILL",
         "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
         "mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", *_apt_network(host),
         SUITE, fresh, *(["-"] if sources else [])],
        stdin=sources,
    )  # fmt: skip
    if status != 0:
        raise Failure(f"mmdebstrap failed with status {status}: its messages are above")
    host.say("tools tree: adding what Debian lacks from PyPI")
    pip = ["/usr/bin/python3", "-m", "pip", "install", "--quiet", "--break-system-packages", "--no-deps",
           "--root-user-action=ignore", *WHEELS]  # fmt: skip
    _in_child(host, fresh, pip)
    (fresh / STAMP).parent.mkdir(parents=True, exist_ok=True)
    (fresh / STAMP).write_text(key())
    _remove(host, tree)
    fresh.rename(tree)


def _need_mmdebstrap(host: Host) -> None:
    # Ubuntu has mmdebstrap without the keys that Debian's packages are signed with.
    missing = [] if shutil.which("mmdebstrap") else ["mmdebstrap"]
    missing += [] if Path(KEYRING).exists() else ["debian-archive-keyring"]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise Failure(
            f"{' and '.join(missing)} missing, and this is no Debian or Ubuntu: install them first"
        )
    host.say(f"installing {' and '.join(missing)}, to make the tools tree with")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-qy", "-o", "DPkg::Lock::Timeout=120"]
    host.run([*apt, "update"], env=quiet, timeout=600)
    host.run([*apt, "install", "--no-install-recommends", *missing], env=quiet, timeout=900)


def _apt_network(host: Host) -> list[str]:
    """Pass on how the host's own apt reaches the network: proxies, certificates of a mirror."""
    if not shutil.which("apt-config"):
        return []
    lines = host.run(["apt-config", "dump"]).decode().splitlines()
    wanted = re.compile(r'Acquire::https?::\S+ ".+";')
    return [f"--aptopt={line}" for line in lines if wanted.fullmatch(line)]


def debian_sources(apt: Path, suite: str) -> list[str]:
    """Return one-line apt sources for `suite`, on the mirrors that the host's own Debian sources name.

    Empty when the host has none (another distribution): mmdebstrap then takes its own default mirror.
    """
    lines = {}
    for uri, old in _host_sources(apt):
        pocket = old.partition("-")[2]
        if pocket in ("", "updates", "security"):
            lines[f"deb [signed-by={KEYRING}] {uri} {suite}{'-' if pocket else ''}{pocket} main"] = pocket
    # Updates alone are no distribution.
    return list(lines) if "" in lines.values() else []


def _host_sources(apt: Path) -> Iterator[tuple[str, str]]:
    """Yield (mirror, suite) of every Debian source with the component main that the host uses."""
    parts = apt / "sources.list.d"
    found: list[tuple[str, str]] = []
    for path in (apt / "sources.list", *sorted(parts.glob("*.list"))):
        found += _one_line_sources(path.read_text(errors="replace")) if path.is_file() else []
    for path in sorted(parts.glob("*.sources")):
        found += _deb822_sources(path.read_text(errors="replace"))
    for uri, suite in found:
        if _is_debian(uri, suite):
            yield uri.rstrip("/"), suite


def _one_line_sources(text: str) -> list[tuple[str, str]]:
    entry = re.compile(r"deb\s+(?:\[[^\]]*\]\s*)?(?P<uri>[^\s\[]+)\s+(?P<suite>\S+)\s+(?P<components>.*)")
    found = [entry.fullmatch(line.partition("#")[0].strip()) for line in text.splitlines()]
    return [(line["uri"], line["suite"]) for line in found if line and "main" in line["components"].split()]


def _deb822_sources(text: str) -> list[tuple[str, str]]:
    found = []
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, list[str]] = {}
        name = ""
        for line in (line for line in stanza.splitlines() if not line.startswith("#")):
            if not line[:1].isspace():
                name, _, line = line.partition(":")
            fields.setdefault(name.lower(), []).extend(line.split())
        enabled = fields.get("enabled", ["yes"])[:1] not in (["no"], ["false"], ["0"], ["off"], ["without"])
        if enabled and "deb" in fields.get("types", []) and "main" in fields.get("components", []):
            found += [(uri, suite) for uri in fields.get("uris", []) for suite in fields.get("suites", [])]
    return found


def _is_debian(uri: str, suite: str) -> bool:
    # Others publish for Debian's suites too: the folder's name, above a snapshot's date, tells them apart.
    path = re.sub(r"/\d{8}T\d{6}Z$", "", uri.rstrip("/")).rpartition("/")[2]
    codenames = ("bullseye", "bookworm", "trixie", "forky", "sid", "stable", "testing")
    return path.startswith("debian") and suite.partition("-")[0] in codenames


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
    """Replace this process by `command`, run with the tree's system folders and the host's other ones."""
    here = Path.cwd()
    try:
        host.unshare_mounts()
    except OSError as error:
        raise Failure(f"{error}: a container needs to be privileged for the tools tree") from error
    # Any folder that is not shown inside will do as the mount point: one that is would contain itself.
    root = Path("/boot" if Path("/boot").is_dir() else "/var/lib")
    host.mount("mosinit-tools", str(root), "tmpfs", init.MountFlag(0), "mode=0755")
    for name in sorted(TREE_OWN & set(os.listdir(tree)) - {"boot"}):
        _show(host, tree / name, root / name)
    for name in sorted(set(os.listdir("/")) - TREE_OWN):
        _show(host, Path("/", name), root / name)
    _show(host, Path("/var/tmp"), root / "var/tmp")
    _show_code(host, root)
    for name in FROM_HOST_ETC:
        if Path("/etc", name).is_file():
            (root / "etc" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "etc" / name).touch()
            host.mount(os.path.realpath(f"/etc/{name}"), str(root / "etc" / name), "", init.MountFlag.BIND)
    host.pivot_root(str(root))
    os.chdir(here)
    env = {
        **os.environ,
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
    }
    temporary = ("TMPDIR",) if hidden(Path(env.get("TMPDIR", "/tmp"))) else ()
    for name in ("PYTHONHOME", "PYTHONPATH", "LD_PRELOAD", "LD_LIBRARY_PATH", *temporary):
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


def _show_code(host: Host, root: Path) -> None:
    """Make this package, and nothing else of the folder it lies in, importable inside."""
    package, shown = Path(__file__).resolve().parent, Path(f"{root}{CODE}", "mosinit")
    shown.parent.mkdir()
    if hidden(package):
        shown.mkdir()
        host.mount(str(package), str(shown), "", init.MountFlag.BIND)
    else:
        # A link, so that a checkout is still found from where its files really are.
        shown.symlink_to(package)
