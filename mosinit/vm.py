"""Boot a disk image in a virtual machine with Secure Boot and a TPM, and return the machine's own report.

A machine has a folder, its STATE: the firmware's variables, the TPM's state, `console.log`, `report.json`. A
folder that is new gets its certificates from a keyset or from the medium; one that is not keeps what it has,
so that a disk can be moved to another machine, or a machine get another disk.

A machine can also be saved where the bring-up begins, and be restored from there with another disk: the
firmware, the stub and the kernel are then not run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

from qemu.qmp.message import Message

from mosinit import accelerator, firmware, init, terminal, tools
from mosinit.console import Lines, Log, Report
from mosinit.host import Failure, Host
from mosinit.machine import VARIABLES, Hardware, Machine, last_words, powered
from mosinit.verdict import Until, Verdict, Watch

# What is typed in the menu that a refused medium shows to a machine in setup mode: down, down, enter.
ENROL_KEYS = (b"Enroll Secure Boot keys: mosinit", b"\x1b[B\x1b[B\r")
CERTIFICATES = "certificates"  # what the firmware of a machine was made to trust
SAVE_SECONDS = 120.0  # for QEMU to write or read the memory of a machine
EXCHANGE_BYTES = 4 << 20  # of one line of the exchange port
QUEUE = 256  # happenings that may wait: beyond, the guest's console waits


@dataclass(frozen=True)
class BootOptions:
    """What to boot and what to wait for. `folder` is STATE, `timeout` counts seconds.

    `keys` is a keyset folder, for a new STATE; with `setup_mode` that has no keys, and the medium's are
    enrolled in the boot loader's menu. `report` is one more place for the report. `interactive`
    joins the terminal to the machine's console until the machine stops or Ctrl-] is typed. `answers` are
    typed there one after the other: (what the console must show before, what is typed). `exchange` answers
    a line that the started system writes to its exchange port.
    """

    disk: Path
    folder: Path
    keys: Path | None = None
    setup_mode: bool = False
    report: Path | None = None
    until: Literal["multi-user", "pivoted", "request", "installed"] = "multi-user"
    timeout: float = 300.0
    interactive: bool = False
    answers: tuple[tuple[bytes, bytes], ...] = ()
    exchange: Callable[[bytes], bytes] | None = None
    hardware: Hardware = field(default_factory=Hardware)


@dataclass(frozen=True)
class Outcome:
    """How a boot ended: `status` 0 as asked, 1 failed, 3 refused by a check; `reason` is a line for people.

    `system` is what the started system says: its `failed_units`, and whether it has its kernel's `modules`.
    `seconds` is all the time it took; `marks` says at what second the kernel, the bring-up ("start"), its
    report and multi-user.target were seen.
    """

    status: int
    report: Report | None
    reason: str
    console: Path
    seconds: float
    marks: Mapping[str, float]
    system: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A machine that was saved: its folder, seconds of boot and save, bytes of its memory file, and what it
    asked to be enrolled by.
    """

    folder: Path
    boot_seconds: float
    save_seconds: float
    size: int
    request: bytes


def boot(host: Host, options: BootOptions) -> Outcome:
    """Boot a machine from power-on. Raises `Failure` when it cannot be made."""
    options = _unattended(options)
    with _prepared(host, options) as session:
        _enroll_if_new(host, options)
        kind = accelerator.choose(host)
        return asyncio.run(_boot(session, kind))


def _unattended(options: BootOptions) -> BootOptions:
    """Have the medium's keys chosen for a machine in setup mode, unless a person is there to do that."""
    if options.interactive or not options.setup_mode:
        return options
    return replace(options, answers=(ENROL_KEYS, *options.answers))


def save(host: Host, options: BootOptions, saved: Path) -> Saved:
    """Boot a machine to the first line of its bring-up and keep it in the new folder `saved`; or, until its
    "request", to where it asks to be enrolled.

    Raises `Failure` when it does not get there, or got further: if a disk was read since the kernel started,
    a restored machine would remember what the saved one saw.
    """
    if saved.exists():
        raise Failure(f"{saved} exists, and a saved machine is never overwritten: remove it first")
    options = _unattended(options)
    with _prepared(host, options) as session, _fresh_folder(saved) as fresh:
        _enroll_if_new(host, options)
        kind = accelerator.choose(host)
        watch, seconds = asyncio.run(_save(session, kind, fresh / "memory"))
        shutil.copyfile(options.folder / VARIABLES, fresh / VARIABLES)
        (fresh / "machine.json").write_text(json.dumps(shape(options, kind)))
        size = (fresh / "memory").stat().st_size
        return Saved(saved, watch.marks[watch.until], seconds, size, watch.request)


def restore(host: Host, saved: Path, options: BootOptions) -> Outcome:
    """Let a saved machine go on with another disk of the same size; STATE is made anew.

    Raises `Failure` when the hardware is not the one that was saved.
    """
    try:
        kept = json.loads((saved / "machine.json").read_text())
    except (OSError, ValueError) as error:
        raise Failure(f"{saved} holds no saved machine: save one there first") from error
    kind = accelerator.choose(host)
    if kept != shape(options, kind):
        raise Failure(f"{saved} holds a machine of other hardware or disk size: save one like this first")
    with _prepared(host, options) as session:
        shutil.rmtree(options.folder / "tpm", ignore_errors=True)
        shutil.copyfile(saved / VARIABLES, options.folder / VARIABLES)
        return asyncio.run(_restore(session, kind, saved / "memory"))


# --- Before and after -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Session:
    """One use of a STATE folder: nobody else uses it meanwhile."""

    host: Host
    options: BootOptions
    disks: list[Path]
    log: Log

    def outcome(self, watch: Watch, verdict: Verdict) -> Outcome:
        """Keep the report where people look for it, and sum up."""
        folder = self.options.folder
        for path in (folder / "report.json", self.options.report):
            if path and watch.report:
                path.parent.mkdir(parents=True, exist_ok=True)
                with self.host.replacing(path) as fresh:
                    fresh.write_text(json.dumps(watch.report, indent=2) + "\n")
        return Outcome(
            status=verdict.status,
            report=watch.report,
            reason=verdict.reason,
            console=folder / "console.log",
            seconds=round(watch.clock(), 2),
            marks=watch.marks,
            system=watch.system,
        )


@contextlib.contextmanager
def _prepared(host: Host, options: BootOptions) -> Iterator[_Session]:
    """Take the STATE folder, drop what an earlier boot said, and open the disks as the hardware asks."""
    disks = [options.disk, *options.hardware.extra_disks]
    for disk in disks:
        _check_disk(host, disk)
    if options.interactive:
        terminal.need()
        host.say("this terminal is the machine's console; Ctrl-] stops the machine")
    _check_folder(options.folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_taken(options.folder))
        for report in (options.folder / "report.json", options.report):
            if report is not None and report.is_file():
                report.unlink()  # what it says is of another boot
        layers = options.folder / "layers"
        shutil.rmtree(layers, ignore_errors=True)  # of a run that was killed
        if options.hardware.snapshot:
            layers.mkdir()
            stack.callback(shutil.rmtree, layers)
            disks = [
                _layer_over(host, disk, layers / f"{number}.qcow2") for number, disk in enumerate(disks)
            ]
        log = stack.enter_context(contextlib.closing(Log(options.folder / "console.log")))
        yield _Session(host, options, disks, log)


@contextlib.contextmanager
def _taken(folder: Path) -> Iterator[None]:
    """Make the folder of a machine and keep others out of it; of a command that is refused before there is a
    machine nothing stays.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    before = set() if missing else set(os.listdir(folder))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Failure(f"a machine runs in {folder}: stop it or take another folder") from error
        try:
            yield
        except BaseException:
            if not (folder / VARIABLES).exists():
                _leave_nothing(folder, before, missing)
            raise


def _leave_nothing(folder: Path, before: set[str], missing: list[Path]) -> None:
    """Remove what is new in a folder, and the folders that were missing."""
    for name in set(os.listdir(folder)) - before:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for place in missing:
        with contextlib.suppress(OSError):  # somebody put something there meanwhile
            place.rmdir()


def _check_folder(folder: Path) -> None:
    """Refuse to fill a folder with a machine that holds something else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise Failure(f"{folder} is no folder: a machine needs one, name another with --dir")
    if os.listdir(folder) and not (folder / VARIABLES).exists() and not (folder / "lock").exists():
        raise Failure(f"{folder} is not empty and holds no machine: name another with --dir")


def _check_disk(host: Host, disk: Path) -> None:
    """Refuse a disk that is not there, and one that would make QEMU open other files of this computer."""
    if not (disk.is_file() or disk.is_block_device()):
        raise Failure(f"cannot read the disk {disk}: make it first, or name another")
    if disk.suffix != ".qcow2":
        return
    facts = json.loads(host.run(["qemu-img", "info", "--output=json", "-f", "qcow2", disk], timeout=60))
    own = facts.get("format-specific", {}).get("data", {})
    if "backing-filename" in facts or "data-file" in own:
        raise Failure(
            f"{disk} refers to another file: convert it by `qemu-img convert -O raw` where you trust it"
        )


def _layer_over(host: Host, disk: Path, layer: Path) -> Path:
    """Make the file that takes what is written to a disk whose own file must not change."""
    backing = "qcow2" if disk.suffix == ".qcow2" else "raw"
    host.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", backing, "-b", disk.absolute(), layer], timeout=60
    )
    return layer


def _enroll_if_new(host: Host, options: BootOptions) -> None:
    """Give a new machine its certificates; see that an older one has those of the keyset that is named."""
    certificates = firmware.certificates_of_keyset(options.keys) if options.keys else None
    record = options.folder / CERTIFICATES
    if (options.folder / VARIABLES).exists():
        if certificates and record.exists() and record.read_text() != firmware.fingerprints(certificates):
            raise Failure(
                f"the machine in {options.folder} trusts another keyset: no --keys, or a new --dir"
            )
        if options.setup_mode and record.exists():
            raise Failure(
                f"the machine in {options.folder} trusts a keyset already: no --setup-mode, or a new --dir"
            )
        return
    if options.setup_mode:
        host.say(f"{options.folder} is new: its firmware is in setup mode and trusts nobody")
        firmware.empty(host, options.folder / VARIABLES)
        return
    if certificates is None:
        certificates = firmware.certificates_of_medium(host, options.disk)
        host.say(
            f"{options.folder} is new: its firmware trusts the certificates in keys/ on the medium's ESP"
        )
    firmware.enroll(host, options.folder / VARIABLES, certificates)
    with host.replacing(record) as fresh:
        fresh.write_text(firmware.fingerprints(certificates))


def shape(options: BootOptions, kind: str) -> dict[str, object]:
    """Return what must be equal in the machine that is saved and the one that is restored."""
    hardware = asdict(options.hardware) | {"smbios": list(options.hardware.smbios)}
    del hardware["extra_disks"], hardware["snapshot"]
    sizes = [_size(disk) for disk in (options.disk, *options.hardware.extra_disks)]
    return {"hardware": hardware, "disks": sizes, "accelerator": kind, "tools": tools.key()}


def _size(disk: Path) -> int:
    with disk.open("rb") as file:
        return file.seek(0, os.SEEK_END)


@contextlib.contextmanager
def _fresh_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes `target` if all goes well and is gone otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield fresh
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


# --- While it runs --------------------------------------------------------------------------------

Happening = Callable[[Watch], Verdict | None]


def _watch(until: Until, setup: bool = False) -> Watch:
    started = time.monotonic()
    return Watch(until, lambda: time.monotonic() - started, setup=setup)


async def _boot(session: _Session, kind: str) -> Outcome:
    options = session.options
    watch = _watch(options.until, options.setup_mode)
    async with powered(options.hardware, session.disks, options.folder, kind) as machine:
        return session.outcome(watch, await _until_settled(session, machine, watch))


async def _save(session: _Session, kind: str, memory: Path) -> tuple[Watch, float]:
    options = session.options
    watch = _watch("request" if options.until == "request" else "start", options.setup_mode)
    async with powered(options.hardware, session.disks, options.folder, kind) as machine:
        reads: list[int] = []

        async def count_reads() -> None:
            if not reads and "kernel" in watch.marks:
                reads.append(await _disk_reads(machine))

        verdict = await _until_settled(session, machine, watch, count_reads)
        await machine.command("stop")
        if verdict.status != 0:
            raise Failure(f"cannot save the machine: {verdict.reason}; see {options.folder / 'console.log'}")
        if watch.until == "start" and reads != [await _disk_reads(machine)]:
            raise Failure("cannot save the machine: its disk was read before it could be stopped; try again")
        begun = watch.clock()
        await _migrate(machine, "migrate", memory)
        return watch, round(watch.clock() - begun, 2)


async def _restore(session: _Session, kind: str, memory: Path) -> Outcome:
    options, watch = session.options, _watch(session.options.until)
    more = ("-incoming", "defer")
    async with powered(options.hardware, session.disks, options.folder, kind, more) as machine:
        await _migrate(machine, "migrate-incoming", memory)
        watch.marks |= {"kernel": 0.0, "start": round(watch.clock(), 2)}
        return session.outcome(watch, await _until_settled(session, machine, watch))


async def _disk_reads(machine: Machine) -> int:
    """Count what the machine read from all its disks so far."""
    answer = await machine.command("query-blockstats")
    return sum(int(row["stats"]["rd_operations"]) for row in cast(list[dict[str, dict[str, int]]], answer))


async def _migrate(machine: Machine, command: str, memory: Path) -> None:
    """Write a stopped machine to a file, or read it from there, and wait until that is done."""
    await machine.command("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    address = {"transport": "file", "filename": str(memory.absolute()), "offset": 0}
    await machine.command(command, channels=[{"channel-type": "main", "addr": address}])
    try:
        async with asyncio.timeout(SAVE_SECONDS):
            while (state := _migration_state(await machine.events.get())) != "completed":
                if state == "failed":
                    raise Failure(f"QEMU did not {command} {memory}: {last_words(machine.log)}")
    except TimeoutError as error:
        raise Failure(f"QEMU did not {command} {memory} within {SAVE_SECONDS:.0f} s") from error


def _migration_state(event: Message) -> object:
    return cast(dict[str, object], event["data"])["status"] if event["event"] == "MIGRATION" else None


async def _until_settled(
    session: _Session, machine: Machine, watch: Watch, each: Callable[[], Awaitable[None]] | None = None
) -> Verdict:
    """Run the machine until its boot is settled, and on while a person is at its console."""
    options = session.options
    async with _happenings(session, machine) as queue:
        try:
            async with asyncio.timeout(options.timeout):
                await machine.go()
                verdict = await _next_verdict(watch, queue, each)
        except TimeoutError:
            return watch.late(options.timeout)
        if options.interactive and verdict.status == 0:
            await _next_verdict(watch, queue, each)
        return verdict


async def _next_verdict(
    watch: Watch,
    queue: asyncio.Queue[Happening],
    each: Callable[[], Awaitable[None]] | None,
) -> Verdict:
    while True:
        verdict = (await queue.get())(watch)
        if each:
            await each()
        if verdict:
            return verdict


@contextlib.asynccontextmanager
async def _happenings(session: _Session, machine: Machine) -> AsyncIterator[asyncio.Queue[Happening]]:
    """Yield the queue of all that happens: lines of console and report port, events of QEMU, its end."""
    queue: asyncio.Queue[Happening] = asyncio.Queue(QUEUE)
    left = asyncio.Event()
    with contextlib.ExitStack() as stack:
        if session.options.interactive:
            stack.enter_context(terminal.joined(machine.console, left))
        tasks = [
            asyncio.create_task(_console(session, machine, queue)),
            asyncio.create_task(_report_port(machine, queue)),
            asyncio.create_task(_exchange_port(session, machine, queue)),
            asyncio.create_task(_events(machine, queue)),
            asyncio.create_task(_end(machine, queue)),
            asyncio.create_task(_leaving(left, queue)),
        ]
        try:
            yield queue
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _console(session: _Session, machine: Machine, queue: asyncio.Queue[Happening]) -> None:
    lines, seen, answers = Lines(), b"", list(session.options.answers)
    async for data in _received(machine.console):
        session.log.write(data)
        seen = (seen + data)[-65536:]
        if answers and answers[0][0] in seen:
            await asyncio.get_running_loop().sock_sendall(machine.console, answers.pop(0)[1])
            seen = b""
        if session.options.interactive:
            terminal.show(data)
        for line in lines.feed(data):
            await queue.put(partial(Watch.line, untrusted=line))


async def _report_port(machine: Machine, queue: asyncio.Queue[Happening]) -> None:
    lines = Lines()
    async for data in _received(machine.report):
        for line in lines.feed(data):
            await queue.put(partial(Watch.port, untrusted=line))


async def _exchange_port(session: _Session, machine: Machine, queue: asyncio.Queue[Happening]) -> None:
    lines = Lines(EXCHANGE_BYTES)
    async for data in _received(machine.exchange):
        for line in lines.feed(data):
            await queue.put(partial(Watch.asks, untrusted=line))
            if session.options.exchange is None:
                continue
            try:
                reply = await asyncio.to_thread(session.options.exchange, line)
            except (Failure, init.Refused) as error:
                await queue.put(partial(_not_answered, words=str(error)))
                return
            await asyncio.get_running_loop().sock_sendall(machine.exchange, reply + b"\n")


def _not_answered(watch: Watch, words: str) -> Verdict:
    return Verdict(1, f"what the machine asked for was not granted: {words}")


async def _received(end: socket.socket) -> AsyncIterator[bytes]:
    with contextlib.suppress(ConnectionError):
        while data := await asyncio.get_running_loop().sock_recv(end, 65536):
            yield data


async def _events(machine: Machine, queue: asyncio.Queue[Happening]) -> None:
    async for event in machine.events:
        await queue.put(partial(Watch.event, name=str(event["event"])))


async def _end(machine: Machine, queue: asyncio.Queue[Happening]) -> None:
    await machine.qemu.wait()
    await queue.put(partial(Watch.ended, words=last_words(machine.log)))


async def _leaving(left: asyncio.Event, queue: asyncio.Queue[Happening]) -> None:
    await left.wait()
    await queue.put(lambda watch: Verdict(1, "the person left the machine before it was up"))
