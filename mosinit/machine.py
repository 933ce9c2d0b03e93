"""A virtual machine: QEMU with OVMF and swtpm as processes, driven over QMP.

Every channel is a socket pair that QEMU and swtpm inherit: nothing listens, nothing has a path, and nothing
is left behind. Both programs die with this process, whatever ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Literal

from qemu.qmp import EventListener, QMPClient, QMPError

from mosinit.host import Failure

CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd")
VARIABLES = "OVMF_VARS.fd"
SLOTS = "MOSINIT_VM_SLOTS"  # in the environment: a folder; as many machines run at a time as it has files
REPORT_PORT = "org.mosinit.report"
EXCHANGE_PORT = "org.mosinit.exchange"
# Translated, a second processor makes no boot faster, and once in some hundred boots its timer never rings:
# the kernel then stands still before the bring-up begins.
ACCELERATORS = {
    "kvm": ["-accel", "kvm", "-cpu", "host", "-smp", "2"],
    "tcg": ["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1"],
}
CHANNELS = ("qmp", "console", "report", "exchange")
QUIT_SECONDS = 5.0  # that a process has to end by itself


Bus = Literal["virtio", "usb", "nvme", "ahci"]
DEVICES: dict[Bus, str] = {
    "virtio": "virtio-blk-pci",
    "usb": "usb-storage,bus=xhci.0,removable=on",
    "nvme": "nvme",
    "ahci": "ide-hd",
}


@dataclass(frozen=True)
class Hardware:
    """What the machine is made of, besides its boot disk. `memory` in MiB.

    `bus` is what the boot disk hangs on, `extra_bus` what the others do; `nic` is QEMU's name of a card.
    `network` is QEMU's user network: "restricted" reaches nothing outside, "user" what the host reaches.
    `ssh` is a port of this computer's own 127.0.0.1 that leads to the machine's port 22.
    `smbios` are strings of type 11. With `snapshot` the disks keep nothing of what is written to them.
    """

    memory: int = 1024
    tpm: bool = True
    network: Literal["none", "restricted", "user"] = "none"
    smbios: tuple[str, ...] = ()
    extra_disks: tuple[Path, ...] = ()
    bus: Bus = "virtio"
    extra_bus: Bus = "virtio"
    nic: Literal["virtio-net-pci", "e1000e"] = "virtio-net-pci"
    snapshot: bool = False
    ssh: int = 0


@dataclass(frozen=True)
class Channels:
    """The file descriptors that QEMU inherits."""

    qmp: int
    console: int
    report: int
    exchange: int
    tpm: int


def command_line(
    hardware: Hardware, disks: list[Path], variables: Path, accelerator: str, channels: Channels
) -> list[str]:
    """Return the command that starts QEMU, stopped before its first instruction."""
    words = ["qemu-system-x86_64", "-no-user-config", "-nodefaults", "-display", "none", "-S"]
    words += ["-machine", "q35,smm=on", *ACCELERATORS[accelerator]]
    words += ["-m", str(hardware.memory)]
    # Only code in System Management Mode writes the variables: the guest's kernel is not trusted.
    words += ["-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1"]
    words += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={_escape(CODE)}"]
    words += ["-drive", f"if=pflash,unit=1,format=raw,file={_escape(variables)}"]
    words += ["-chardev", f"socket,id=qmp,fd={channels.qmp}", "-mon", "chardev=qmp,mode=control"]
    words += ["-chardev", f"socket,id=console,fd={channels.console}", "-serial", "chardev:console"]
    words += ["-chardev", f"socket,id=report,fd={channels.report}", "-device", "virtio-serial-pci"]
    words += ["-device", f"virtserialport,chardev=report,name={REPORT_PORT}"]
    words += ["-chardev", f"socket,id=exchange,fd={channels.exchange}"]
    words += ["-device", f"virtserialport,chardev=exchange,name={EXCHANGE_PORT}"]
    # A machine that is off stays, so that its last words are read before QEMU ends.
    words += ["-device", "i6300esb", "-action", "reboot=reset,shutdown=pause,panic=pause,watchdog=reset"]
    if hardware.tpm:
        words += ["-chardev", f"socket,id=tpm,fd={channels.tpm}", "-tpmdev", "emulator,id=tpm,chardev=tpm"]
        words += ["-device", "tpm-crb,tpmdev=tpm"]
    if "usb" in (hardware.bus, hardware.extra_bus):
        words += ["-device", "qemu-xhci,id=xhci"]
    for number, disk in enumerate(disks):
        words += _disk(number, disk, hardware.extra_bus if number else hardware.bus, hardware.snapshot)
    for text in hardware.smbios:
        words += ["-smbios", f"type=11,value={_escape(text)}"]
    if hardware.network != "none":
        restrict = "on" if hardware.network == "restricted" else "off"
        forward = f",hostfwd=tcp:127.0.0.1:{hardware.ssh}-:22" if hardware.ssh else ""
        words += [
            "-netdev",
            f"user,id=net,restrict={restrict}{forward}",
            "-device",
            f"{hardware.nic},netdev=net,romfile=",
        ]
    return words


def _disk(number: int, path: Path, bus: Bus, snapshot: bool) -> list[str]:
    # A raw disk is never guessed to be another format: what the guest writes into it must not decide that.
    driver = "qcow2" if path.suffix == ".qcow2" else "raw"
    cache = {"no-flush": snapshot}
    node = {
        "node-name": f"disk{number}", "driver": driver, "discard": "unmap", "cache": cache,
        "file": {"driver": _protocol(path), "filename": str(path), "cache": cache},
    }  # fmt: skip
    serial = "boot" if number == 0 else f"extra{number}"
    device = f"{DEVICES[bus]},id=blk{number},drive=disk{number},serial={serial},bootindex={number + 1}"
    return ["-blockdev", json.dumps(node), "-device", device]


def _protocol(path: Path) -> str:
    return "host_device" if path.is_block_device() else "file"


def _escape(value: str | Path) -> str:
    return str(value).replace(",", ",,")  # QEMU's options are separated by commas


@contextlib.contextmanager
def channel() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield the two ends of a channel: ours, which does not block, and the one that a program inherits."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


# A parent that died before setpriv asked for the signal sends none: the child looks who its parent is.
UNLESS_ORPHANED = '[ "$PPID" = "$0" ] && exec "$@"'


@contextlib.asynccontextmanager
async def process(
    command: list[str], log: IO[bytes], *fds: int
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program that ends with this context, and with this process even if that is killed.

    A session of its own keeps the terminal's Ctrl-C from it. Its messages go to `log`. Raises `Failure` when
    it is not there to be started.
    """
    try:
        child = await asyncio.create_subprocess_exec(
            "/usr/bin/setpriv", "--pdeathsig", "KILL", "--",
            "/bin/sh", "-c", UNLESS_ORPHANED, str(os.getpid()), *command,
            stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=fds, start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise Failure(f"cannot start {command[0]}: {error.filename} is missing") from error
    try:
        yield child
    finally:
        await asyncio.shield(_end(child))


async def _end(child: asyncio.subprocess.Process) -> None:
    """Tell a process to end, wait for it, and kill it when it does not."""
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        await asyncio.wait_for(child.wait(), QUIT_SECONDS)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def swtpm_command(folder: Path, control: int) -> list[str]:
    """Return the command of a software TPM that ends with the machine; its state lies in `folder`."""
    return ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder.absolute()},mode=0600",
            "--ctrl", f"type=unixio,clientfd={control}", "--terminate"]  # fmt: skip


def last_words(log: Path) -> str:
    """Return the last line of a log of QEMU or swtpm, for a message."""
    try:
        lines = log.read_bytes()[-4096:].decode(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "no message"


@dataclass(frozen=True)
class Machine:
    """A machine that exists and does not run yet: `go` starts it."""

    qmp: QMPClient
    events: EventListener
    console: socket.socket
    report: socket.socket
    exchange: socket.socket
    qemu: asyncio.subprocess.Process
    log: Path

    async def go(self) -> None:
        """Let the machine run."""
        await self.command("cont")

    async def command(self, name: str, /, **arguments: object) -> object:
        """Give QEMU a command over QMP and return its answer. Raises `Failure`."""
        try:
            return await self.qmp.execute(name, arguments)
        except (QMPError, EOFError, OSError) as error:
            raise Failure(f"QEMU did not do {name}: {error}; it said: {last_words(self.log)}") from error


@contextlib.asynccontextmanager
async def _slot() -> AsyncIterator[None]:
    """Be one of few machines at a time, where somebody wants that; wait for a place."""
    folder = os.environ.get(SLOTS)
    if folder is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(path.open("rb")) for path in sorted(Path(folder).iterdir())]
        while not any(_taken(place) for place in places):
            await asyncio.sleep(0.2)
        yield


def _taken(place: IO[bytes]) -> bool:
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.asynccontextmanager
async def powered(
    hardware: Hardware, disks: list[Path], folder: Path, accelerator: str, more: tuple[str, ...] = ()
) -> AsyncIterator[Machine]:
    """Make a machine whose variables and TPM state lie in `folder`, and end it with this context.

    `more` are further words for QEMU. Raises `Failure` with QEMU's own words when it refuses.
    """
    log = folder / "qemu.log"
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(_slot())
        messages = stack.enter_context(log.open("wb"))
        pairs = {name: stack.enter_context(channel()) for name in CHANNELS}
        tpm_of_qemu, tpm_of_swtpm = (stack.enter_context(end) for end in socket.socketpair())
        if hardware.tpm:
            (folder / "tpm").mkdir(mode=0o700, exist_ok=True)
            swtpm = swtpm_command(folder / "tpm", tpm_of_swtpm.fileno())
            await stack.enter_async_context(process(swtpm, messages, tpm_of_swtpm.fileno()))
        theirs = {name: end.fileno() for name, (_, end) in pairs.items()}
        channels = Channels(**theirs, tpm=tpm_of_qemu.fileno())
        command = command_line(hardware, disks, folder / VARIABLES, accelerator, channels)
        qemu = await stack.enter_async_context(process([*command, *more], messages, *astuple(channels)))
        # Whoever inherited an end must be its only owner: that the other is gone is seen by nothing else.
        for end in (tpm_of_qemu, tpm_of_swtpm, *(theirs for _, theirs in pairs.values())):
            end.close()
        client = QMPClient()
        events = EventListener()
        client.register_listener(events)
        try:
            await client.connect(pairs["qmp"][0])
        except (QMPError, EOFError, OSError) as error:
            await qemu.wait()
            raise Failure(f"QEMU did not start: {last_words(log)}") from error
        stack.push_async_callback(_quit, client)
        console, report, exchange = (pairs[name][0] for name in CHANNELS[1:])
        yield Machine(client, events, console, report, exchange, qemu, log)


async def _quit(client: QMPClient) -> None:
    """Ask QEMU to end; who waits for it kills it if it does not."""
    with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
        await asyncio.wait_for(client.execute("quit"), QUIT_SECONDS)
    with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
        await asyncio.wait_for(client.disconnect(), QUIT_SECONDS)
