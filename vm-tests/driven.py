"""A machine in the hand of a test: it sees what happens, and meanwhile tells QEMU or the TPM what to do.

It goes on over restarts, as a machine does, where `vm.boot` ends with the first verdict.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

from installed import Installed
from world import World

from mosinit import accelerator, firmware, init, vm
from mosinit.console import Lines
from mosinit.host import Host
from mosinit.machine import VARIABLES, Hardware, Machine, powered

T = TypeVar("T")
SECONDS = 240.0  # for a machine to get where a test waits for it


@dataclass
class Driven:
    """A machine that runs: what it said and what happened to it."""

    machine: Machine
    folder: Path
    console: bytearray = field(default_factory=bytearray)
    place: int = 0  # up to where the console was looked at
    events: list[str] = field(default_factory=list)
    asked: list[bytes] = field(default_factory=list)  # lines from its exchange port
    told: list[bytes] = field(default_factory=list)  # lines from its report port
    news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def until(self, holds: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
        """Wait until something holds."""
        try:
            async with asyncio.timeout(seconds), self.news:
                await self.news.wait_for(holds)
        except TimeoutError as error:
            tail = self.console[-3000:].decode(errors="replace")
            raise AssertionError(f"no {what} within {seconds:.0f} s; {self.events}\n{tail}") from error

    async def says(self, words: bytes) -> bytes:
        """Wait until it says these words, after what was waited for before; return what came between."""
        begin = self.place
        await self.until(lambda: words in self.console[begin:], repr(words))
        self.place = self.console.index(words, begin) + len(words)
        return bytes(self.console[begin : self.place])

    async def happens(self, event: str, seconds: float = SECONDS) -> None:
        """Wait for an event of QEMU's; those before it are done with."""
        await self.until(lambda: event in self.events, event, seconds)
        del self.events[: self.events.index(event) + 1]

    async def asks(self) -> bytes:
        """Wait for a line of the exchange port."""
        await self.until(lambda: bool(self.asked), "line of the exchange port")
        return self.asked.pop(0)

    async def answer(self, line: bytes) -> None:
        """Answer on the exchange port."""
        await asyncio.get_running_loop().sock_sendall(self.machine.exchange, line + b"\n")

    async def type(self, keys: bytes) -> None:
        """Type on its console."""
        await asyncio.get_running_loop().sock_sendall(self.machine.console, keys)

    async def save(self, folder: Path) -> None:
        """Keep it as it is now in a new folder, from where machines like it can go on."""
        folder.mkdir()
        await self.machine.command("stop")
        path = str((folder / "memory").absolute())
        address = {"transport": "file", "filename": path, "offset": 0}
        await self.machine.command("migrate", channels=[{"channel-type": "main", "addr": address}])
        async with asyncio.timeout(vm.SAVE_SECONDS):
            while (state := await self._migration()) != "completed":
                assert state != "failed"
                await asyncio.sleep(0.05)
        shutil.copyfile(self.folder / VARIABLES, folder / VARIABLES)

    async def _migration(self) -> object:
        return cast(dict[str, object], await self.machine.command("query-migrate")).get("status")

    async def throttle_disk(self, rate: int) -> None:
        """Let the boot disk give so many bytes a second; 0 is no limit."""
        limits = dict.fromkeys(("bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
        device = "/machine/peripheral/blk0/virtio-backend"
        await self.machine.command("block_set_io_throttle", id=device, bps=rate, **limits)

    async def starve_disk(self) -> None:
        """Let no request to the boot disk come back for as long as any test lasts."""
        await self.throttle_disk(1)

    async def feed_disk(self) -> None:
        """Let the boot disk answer again."""
        await self.throttle_disk(0)

    async def memory(self) -> bytes:
        """Return all that its memory holds."""
        # Below the gap for devices; the machines of these tests have no more.
        path = self.folder / "memory"
        await self.machine.command("pmemsave", val=0, size=1024 * init.MIB, filename=str(path.absolute()))
        data = await asyncio.to_thread(path.read_bytes)
        path.unlink()
        return data


@contextlib.asynccontextmanager
async def running(made: Installed, saved: Path | None) -> AsyncIterator[Driven]:
    """Let a saved machine go on with the disk of `made`; without one, switch that machine on."""
    hardware = made.options().hardware
    async with started(made.world.host, hardware, [made.disk], made.state, saved) as machine:
        yield machine


@contextlib.asynccontextmanager
async def attended(
    world: World, folder: Path, hardware: Hardware, disks: list[Path]
) -> AsyncIterator[Driven]:
    """Switch on a machine with these disks, the boot disk first; a new `folder` trusts the keyset."""
    if not folder.exists():
        folder.mkdir()
        certificates = firmware.certificates_of_keyset(world.keyset.folder)
        firmware.enroll(world.host, folder / VARIABLES, certificates)
    async with started(world.host, hardware, disks, folder, None) as machine:
        yield machine


@contextlib.asynccontextmanager
async def started(
    host: Host, hardware: Hardware, disks: list[Path], state: Path, saved: Path | None,
    more: tuple[str, ...] = (),
) -> AsyncIterator[Driven]:  # fmt: skip
    """Run a machine, from where it was saved or from power-on; `more` are further words for QEMU."""
    if saved:
        shutil.rmtree(state / "tpm", ignore_errors=True)
        shutil.copyfile(saved / VARIABLES, state / VARIABLES)
        more = (*more, "-incoming", "defer")
    async with powered(hardware, disks, state, accelerator.choose(host), more) as machine:
        if saved:
            await vm._migrate(machine, "migrate-incoming", saved / "memory")
        driven = Driven(machine, state)
        works = (_console, _events, _exchange, _reports)
        tasks = [asyncio.create_task(work(driven)) for work in works]
        try:
            await machine.go()
            yield driven
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _console(driven: Driven) -> None:
    with (driven.folder / "console.log").open("wb", buffering=0) as log:
        async for data in vm._received(driven.machine.console):
            log.write(data)
            async with driven.news:
                driven.console += data
                driven.news.notify_all()


async def _events(driven: Driven) -> None:
    async for event in driven.machine.events:
        async with driven.news:
            driven.events.append(str(event["event"]))
            driven.news.notify_all()


async def _exchange(driven: Driven) -> None:
    await _lines(driven, driven.machine.exchange, driven.asked)


async def _reports(driven: Driven) -> None:
    await _lines(driven, driven.machine.report, driven.told)


async def _lines(driven: Driven, port: socket.socket, kept: list[bytes]) -> None:
    lines = Lines(vm.EXCHANGE_BYTES)
    async for data in vm._received(port):
        for line in lines.feed(data):
            async with driven.news:
                kept.append(line)
                driven.news.notify_all()


class Beside:
    """Runs stories of machines in a thread of its own, beside the tests: who hangs takes no processor."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._futures: list[Future[object]] = []

    def start(self, story: Coroutine[object, object, T]) -> Future[T]:
        """Start a story; its result or failure is asked of the future."""
        future = asyncio.run_coroutine_threadsafe(story, self._loop)
        self._futures.append(cast("Future[object]", future))
        return future

    def close(self) -> None:
        """End all that still run, and their machines with them."""
        for future in self._futures:
            future.cancel()
        tasks = asyncio.run_coroutine_threadsafe(self._ended(), self._loop)
        tasks.result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _ended(self) -> None:
        me = asyncio.current_task()
        await asyncio.gather(
            *(task for task in asyncio.all_tasks() if task is not me), return_exceptions=True
        )
