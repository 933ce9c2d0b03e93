"""The package's seam to the world: the core's `Kernel`, extended by what only a build host or a booted
machine needs.

Everything that starts a process, writes a file a person keeps, or talks to that person goes through `Host`,
so that a test can hand a recorder to any verb.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from mosinit import init

CLONE_NEWNS = 0x00020000  # linux/sched.h
RENAME_EXCHANGE = 2  # linux/fs.h
PR_SET_DUMPABLE = 4  # linux/prctl.h
SYS_PIVOT_ROOT = 155  # arch/x86/entry/syscalls/syscall_64.tbl
SCRATCH, STALE_SECONDS = ".mosinit-", 60.0
FULL_BYTES = 64 << 10  # what is left where something did not fit
MOVING_BYTES = 4096  # a program that only wakes up and looks around moves less


class Failure(Exception):
    """What a person can act on: one line that names the thing and the remedy. Exit status 1."""

    status = 1


class Usage(Failure):
    """The command was called wrongly. Exit status 2."""

    status = 2


def told(errors: bytes) -> str:
    """Return the line of a program's messages that says most: apt's first error, or else the last line."""
    lines = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith("E: ")]
    line = (causes or lines[-1:] or ["no message"])[0]
    # What is at the end tells most, after the names of all that was tried.
    return line if len(line) <= 500 else f"{line[:150]} … {line[-340:]}"


def logged(message: str) -> str:
    """Return the words of a message that a program wrote as a log's entry (`level=fatal msg="…"`)."""
    found = re.search(r'msg="((?:[^"\\]|\\.)*)"', message)
    return found[1].replace('\\"', '"') if found else message


def amount(done: int, total: int, seconds: float) -> str:
    """Say how much of something is done, and how fast it was."""
    mib = [value / init.MIB for value in (min(done, total), total, done / max(seconds, 0.001))]
    return f"{mib[0]:.1f} of {mib[1]:.1f} MiB, {mib[2]:.1f} MiB/s"


def closed_environment(**more: str | os.PathLike[str]) -> dict[str, str]:
    """Return the whole environment of a program whose output is signed, or that sees a secret.

    SOURCE_DATE_EPOCH, TZ and whatever else a person's shell has would change what it makes.
    """
    path = os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    return {"PATH": path, "LC_ALL": "C.UTF-8", "TZ": "UTC"} | {name: str(more[name]) for name in more}


def printable(text: str) -> str:
    """Return a text with whatever is no letter, sign or space escaped: it could move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _one_reason(error: Exception) -> str:
    """Say why something failed; copying a tree (`shutil.Error`) tells each file of it."""
    rows = error.args[0] if isinstance(error, shutil.Error) else None
    return str(rows[0][2]) if isinstance(rows, list) and rows else str(error)


class Broken(Failure):
    """A program that failed: what it says is told, and who started it says what to do."""


class FullDisk(Failure):
    """A folder whose disk is full, and what failed because of that."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"the disk of {folder} is full: make room there ({reason[:200]})")
        self.reason = reason


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Lock a folder while it is in use; yield whether nobody else had it. A lock ends with its process."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        free = True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(fd)


@contextlib.contextmanager
def _making_in(folder: Path | None) -> Iterator[None]:
    """Name the folder if nothing can be made in it: a temporary name says nothing to a person."""
    try:
        yield
    except OSError as error:
        if folder is None:
            raise
        # /proc and its like say of what they do not take that it is not there.
        if error.errno == errno.ENOENT and folder.is_dir():
            raise Failure(
                f"nothing can be made in {folder} ({error.strerror}): name a folder elsewhere"
            ) from error
        raise OSError(error.errno, error.strerror, str(folder)) from error


def _remove_stale(parent: Path) -> None:
    """Remove the temporary folders that killed runs of ours left: there may be secrets in them."""
    for folder in parent.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            seen = folder.lstat()
            ours = stat.S_ISDIR(seen.st_mode) and seen.st_uid == os.geteuid()
            # One that was made just now may not be locked yet.
            if ours and time.time() - seen.st_mtime > STALE_SECONDS:
                with _held(folder) as free:
                    if free:
                        shutil.rmtree(folder)


class Host(init.Kernel):
    """The core's seam plus processes, temporary folders and messages to the person."""

    plain_seconds = 10.0  # between lines of progress where there is no terminal

    def say(self, text: str) -> None:
        """Print one line of progress to standard error; standard output is for results."""
        print(f"mosinit: {printable(text)}", file=sys.stderr, flush=True)

    def run(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """Run a program to its end and return its standard output.

        Raises `Failure` with the last line of its standard error when it cannot start, fails or exceeds
        `timeout` seconds. Secrets go through `stdin` or a file of mode 0600, never through `command`.
        """
        name = os.path.basename(str(command[0]))
        try:
            done = subprocess.run(
                [str(word) for word in command],
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                env=None if env is None else dict(env),
                cwd=cwd,
                timeout=timeout,
                check=False,
            )
        except FileNotFoundError as error:
            raise Failure(f"cannot start {name}: {error.strerror} ({error.filename})") from error
        except subprocess.TimeoutExpired as error:
            raise Broken(f"{name} did not end within {timeout:.0f} s") from error
        if done.returncode != 0:
            raise Broken(f"{name} failed with status {done.returncode}: {told(done.stderr)}")
        return done.stdout

    @contextlib.contextmanager
    def pipe(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        stdin: IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Iterator[IO[bytes]]:
        """Start a program and yield the end of a pipe: its output if it reads `stdin`, or else its input.

        Raises `Failure` with the last line of its standard error when it cannot start or fails. It does not
        outlive the block.
        """
        name = os.path.basename(str(command[0]))
        words = [str(word) for word in command]
        environment = None if env is None else dict(env)
        ends = (stdin, subprocess.PIPE) if stdin else (subprocess.PIPE, subprocess.DEVNULL)
        with tempfile.TemporaryFile() as errors:
            try:
                child = subprocess.Popen(
                    words, stdin=ends[0], stdout=ends[1], stderr=errors, env=environment
                )
            except FileNotFoundError as error:
                raise Failure(f"cannot start {name}: {error.strerror} ({error.filename})") from error
            end = child.stdout if stdin else child.stdin
            assert end is not None  # asked for above
            try:
                # A program that ends early breaks our pipe; its own words say more than that.
                with contextlib.suppress(BrokenPipeError), end:
                    yield end
            except BaseException:
                child.kill()
                child.wait()
                raise
            if child.wait() != 0:
                errors.seek(0)
                raise Failure(f"{name} failed with status {child.returncode}: {told(errors.read())}")

    @contextlib.contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show how a long step advances: a bar on a terminal, a line now and then elsewhere. Call what is
        yielded with how many bytes more are done.
        """
        label = printable(label)
        if not sys.stderr.isatty():
            yield self._plain_progress(label, total)
            return
        try:
            from rich import console, progress
        except ImportError:
            yield self._plain_progress(label, total)
            return
        columns = (
            progress.TextColumn("mosinit: {task.description}", markup=False),
            progress.BarColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.advance(task, done)

    def _plain_progress(self, label: str, total: int) -> Callable[[int], None]:
        """Say what begins, and how far it is whenever some time has passed."""
        self.say(label)
        begun = shown = time.monotonic()
        all_done = 0

        def advance(done: int) -> None:
            nonlocal all_done, shown
            all_done += done
            now = time.monotonic()
            if now - shown >= self.plain_seconds:
                shown = now
                self.say(f"{label}: {amount(all_done, total, now - begun)}")

        return advance

    def call(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> int:
        """Run a program that talks to the person itself and return its exit status, 128 + N if signal N
        ended it.

        Without `stdin` it has this process's own. Raises `Failure` if it cannot start.
        """
        try:
            done = subprocess.run(
                [str(word) for word in command],
                input=stdin,
                env=None if env is None else dict(env),
                cwd=cwd,
                check=False,
            )
        except FileNotFoundError as error:
            raise Failure(f"cannot start {command[0]}: {error.strerror}") from error
        return done.returncode if done.returncode >= 0 else 128 - done.returncode

    def hide_memory(self) -> None:
        """Let no core dump, ours or of a program we start, and no debugger of our user have what we hold."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0:
            raise init.os_error("prctl", "PR_SET_DUMPABLE")

    @contextlib.contextmanager
    def scratch(self, near: str | os.PathLike[str] | None = None) -> Iterator[Path]:
        """Yield a temporary folder of mode 0700 that is gone afterwards, beside `near` if given (same file
        system). What killed runs left there is removed.
        """
        parent = None if near is None else Path(near).absolute().parent
        if parent is not None:
            _remove_stale(parent)
        with _making_in(parent):
            made = tempfile.TemporaryDirectory(prefix=SCRATCH, dir=parent)
        with made as folder, _held(Path(folder)):
            try:
                yield Path(folder)
            except (Failure, OSError) as error:
                # Tools tell in many words, or in none, that a disk is full.
                if shutil.disk_usage(folder).free >= FULL_BYTES:
                    raise
                reason = error.reason if isinstance(error, FullDisk) else _one_reason(error)
                raise FullDisk(Path(folder).parent, reason) from error

    @contextlib.contextmanager
    def replacing(self, path: str | os.PathLike[str], *, mode: int = 0o644) -> Iterator[Path]:
        """Yield a temporary path; on success it is synced and renamed to `path`, on failure it is removed.

        Nobody ever sees a half-written `path`, also after a power cut. Raises `Failure` if something else
        than a regular file is there: no device is replaced.
        """
        target = Path(path)
        if os.path.lexists(target) and not stat.S_ISREG(target.lstat().st_mode):
            raise Failure(f"{target} is no regular file, and only such are replaced: name another")
        with _making_in(target.absolute().parent):
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.absolute().parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(mode)
            self.sync_file(temporary)
            temporary.rename(target)
            self.sync_file(target.absolute().parent)
        finally:
            temporary.unlink(missing_ok=True)

    def sync_file(self, path: str | os.PathLike[str]) -> None:
        """Make a file's or folder's content durable."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def sync_tree(self, folder: Path) -> None:
        """Make every file and folder below durable, names last."""
        for path in sorted(folder.rglob("*"), reverse=True):
            if not path.is_symlink():
                self.sync_file(path)
        self.sync_file(folder)

    def write_at(self, fd: int, offset: int, data: bytes) -> None:
        """Write into an open file or device, durably."""
        while data:
            written = os.pwrite(fd, data, offset)
            offset, data = offset + written, data[written:]
        os.fsync(fd)

    def swap(self, one: Path, two: Path) -> None:
        """Let two names change places at once."""
        libc = ctypes.CDLL(None, use_errno=True)
        here = init.AT_FDCWD
        if libc.renameat2(here, os.fsencode(one), here, os.fsencode(two), RENAME_EXCHANGE) < 0:
            raise init.os_error("swap", str(one))

    @contextlib.contextmanager
    def mounted(self, device: Path, fstype: str, *, read_only: bool = False) -> Iterator[Path]:
        """Mount a file system where nobody else sees it, and yield the folder."""
        flags = init.SAFE | init.MountFlag.NOSYMFOLLOW
        with self.scratch() as folder:
            point = folder / "mounted"
            point.mkdir()
            self.mount(str(device), str(point), fstype, flags | (init.MountFlag.RDONLY if read_only else 0))
            try:
                yield point
            except BaseException:
                # What went wrong is told, not what cannot be unmounted because of it.
                self.unmount(str(point), lazy=True)
                raise
            self.patiently(lambda: self.unmount(str(point)))

    def patiently(self, remove: Callable[[], object], seconds: float = 30) -> None:
        """Remove a device or mount, again if need be.

        udev looks at each device that is new or changed, and holds it for a moment.
        """
        deadline = self.monotonic() + seconds
        while True:
            try:
                remove()
                return
            except (OSError, Failure):
                if self.monotonic() > deadline:
                    raise
            self.sleep(0.1)

    def unshare_mounts(self) -> None:
        """Give this process a mount namespace of its own, whose mounts the host never sees."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNS) < 0:
            raise init.os_error("unshare", "mounts")
        self.mount("", "/", "", init.MountFlag.REC | init.MountFlag.SLAVE)

    def pivot_root(self, new: str) -> None:
        """Make `new` the root of this mount namespace and drop the old one."""
        libc = ctypes.CDLL(None, use_errno=True)
        os.chdir(new)
        if libc.syscall(SYS_PIVOT_ROOT, b".", b".") < 0:
            raise init.os_error("pivot_root", new)
        self.unmount(".", lazy=True)
        os.chdir("/")
