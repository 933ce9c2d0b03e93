"""Machines that never say how they are: each ends, says why, and leaves nothing running.

The kernel is Debian's; the init is a few instructions made here, since no program of ours is this bad.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from programs import init_program

from mosinit import console, firmware, hostfs, keys, vm
from mosinit.host import Host

pytestmark = pytest.mark.cold


class Bench:
    """Makes signed media whose init misbehaves, and machines that trust them."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self.folder = host, folder
        self.kernel = hostfs.kernel(host, folder / "kernel")
        self.keyset = keys.new(host, folder / "keys", "bench")

    def medium(self, name: str, init: bytes, signed: bool = True) -> Path:
        """Return an image whose UKI starts this init."""
        root, uki = self.folder / f"{name}.root", self.folder / f"{name}.efi"
        root.mkdir()
        (root / "init").write_bytes(init)
        (root / "init").chmod(0o755)
        initrd = self.folder / f"{name}.cpio"
        initrd.write_bytes(self.host.run(["cpio", "-o", "-H", "newc", "--quiet"], stdin=b"init\n", cwd=root))
        self.host.run(
            ["ukify", "build", f"--linux={self.kernel.vmlinuz}", f"--initrd={initrd}", f"--output={uki}",
             "--cmdline=console=ttyS0,115200 panic=-1", "--os-release=ID=bench"]
        )  # fmt: skip
        if signed:
            self.keyset.signer("uki").sign_pe(uki, uki)
        return self._on_esp(uki)

    def _on_esp(self, uki: Path) -> Path:
        disk = uki.with_suffix(".raw")
        with disk.open("wb") as file:
            file.truncate(64 << 20)
        self.host.run(
            ["sfdisk", "--quiet", disk], stdin=f"label: gpt\nstart=2048, type={firmware.ESP_TYPE}\n".encode()
        )
        image = f"{disk}@@1M"
        self.host.run(["mformat", "-i", image, "-F", "-T", "124000", "-h", "16", "-s", "63", "::"])
        self.host.run(["mmd", "-i", image, "::EFI", "::EFI/BOOT"])
        self.host.run(["mcopy", "-i", image, uki, "::EFI/BOOT/BOOTX64.EFI"])
        return disk

    def options(self, disk: Path, timeout: float = 120) -> vm.BootOptions:
        """Return how to boot a medium of this bench."""
        state = self.folder / f"{disk.stem}.state"
        return vm.BootOptions(disk=disk, folder=state, keys=self.keyset.folder, timeout=timeout)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One kernel and one keyset for all machines of this file."""
    return Bench(Host(), tmp_path_factory.mktemp("bench"))


def processes_of(state: Path) -> list[str]:
    """List the command lines of QEMU and swtpm that name this STATE folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(state) in words and words.startswith(("qemu", "swtpm")):
            found.append(words)
    return found


def test_a_restart_without_report(bench: Bench) -> None:
    wanted = bench.options(bench.medium("restart", init_program(b"mosinit: start\n", "restart")))
    outcome = vm.boot(bench.host, wanted)
    assert (outcome.status, outcome.report) == (1, None)
    assert outcome.reason == "the machine restarted without a report"
    assert {"kernel", "start"} <= set(outcome.marks)
    assert processes_of(wanted.folder) == []


@pytest.fixture(scope="module")
def saved(bench: Bench) -> tuple[vm.BootOptions, Path]:
    """A machine that was saved at its first line, and that then says the same line for ever."""
    wanted = bench.options(bench.medium("flood", init_program(b"mosinit: start\n", "flood")))
    kept = vm.save(bench.host, wanted, bench.folder / "saved")
    assert kept.size < 400 << 20
    return wanted, kept.folder


def test_endless_words_until_the_time_is_over(bench: Bench, saved: tuple[vm.BootOptions, Path]) -> None:
    wanted, folder = saved
    outcome = vm.restore(bench.host, folder, replace(wanted, timeout=5))
    assert (outcome.status, outcome.report) == (1, None)
    assert outcome.reason == "no report within 5 s; the console's last line: mosinit: start"
    assert 5 <= outcome.seconds < 30
    words = outcome.console.read_bytes()
    assert b"mosinit: start" in words
    assert b"Linux version" not in words
    assert len(words) <= console.LOG_LIMIT + 1000
    assert processes_of(wanted.folder) == []


RESTORES = """
import sys
from pathlib import Path
from mosinit import vm
from mosinit.host import Host
disk, state, saved = map(Path, sys.argv[1:])
vm.restore(Host(), saved, vm.BootOptions(disk=disk, folder=state, timeout=120))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_running(saved: tuple[vm.BootOptions, Path], how: signal.Signals) -> None:
    wanted, folder = saved
    command = [sys.executable, "-B", "-c", RESTORES, str(wanted.disk), str(wanted.folder), str(folder)]
    console_log = wanted.folder / "console.log"
    console_log.unlink(missing_ok=True)
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": "."}, stderr=subprocess.DEVNULL
    ) as process:
        wait_for(lambda: console_log.exists() and console_log.stat().st_size > 0)
        assert len(processes_of(wanted.folder)) == 2
        process.send_signal(how)
        process.wait(20)
    wait_for(lambda: not processes_of(wanted.folder))


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until it holds, for 30 s at most."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_db_does_not_know_is_not_started(bench: Bench) -> None:
    wanted = bench.options(bench.medium("unsigned", init_program(b"", "hang"), signed=False))
    outcome = vm.boot(bench.host, wanted)
    assert (outcome.status, outcome.report) == (1, None)
    assert "Access Denied" in outcome.reason
    assert b"Linux version" not in outcome.console.read_bytes()
