"""Booting in a VM, as far as it goes without one: what a guest says, what it means, who ends with whom."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosinit import console, keys, machine, verdict, vm
from mosinit.host import Failure, Host

Need = Callable[..., None]
PIVOTED = {"schema": 1, "result": "pivoted", "failed": None, "checks": [], "stages": []}
REFUSED = {**PIVOTED, "result": "refused", "failed": "SB-OFF"}
CRASHED = {**PIVOTED, "result": "crashed"}


def framed(report: object) -> bytes:
    return console.FRAME + json.dumps(report).encode()


# --- What the guest says -----------------------------------------------------------------------------


def test_a_report_is_taken_as_it_is() -> None:
    assert console.parse_report(json.dumps(REFUSED).encode()) == REFUSED


@pytest.mark.parametrize(
    ("untrusted", "complaint"),
    [
        (b"", "no JSON"),
        (b"[]", "no JSON object"),
        (b"\xff{}", "no JSON"),
        (b'{"schema": 1, "result": NaN}', "NaN is no number"),
        (b'{"schema": 1, "schema": 1}', "twice"),
        (b"[" * 60000, "nested too deeply"),
        (b'{"a": "' + b"x" * console.REPORT_LIMIT + b'"}', "more than 65536 bytes"),
        (b'{"result": "pivoted"}', "schema"),
        (b'{"schema": "1", "result": "pivoted"}', "schema"),
        (b'{"schema": 1, "result": "fine"}', "result"),
        (b'{"schema": 1, "result": ["pivoted"]}', "result"),
        (b'{"schema": 1, "result": "refused", "failed": null}', "without naming a check"),
        (b'{"schema": 1, "result": "refused", "failed": "sb off"}', "no check id"),
        (b'{"schema": 1, "result": "refused", "failed": 7}', "no check id"),
        (b'{"schema": 1, "result": "pivoted", "checks": {}}', "checks"),
        (b'{"schema": 1, "result": "pivoted", "stages": [1]}', "stages"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_a_bad_report_is_refused(untrusted: bytes, complaint: str) -> None:
    with pytest.raises(console.BadReport, match=complaint):
        console.parse_report(untrusted)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_make_the_parser_stumble(untrusted: bytes) -> None:
    try:
        assert console.parse_report(untrusted)["schema"] == 1
    except console.BadReport as error:
        assert str(error)


def test_a_report_cannot_drive_the_terminal() -> None:
    report = {**REFUSED, "\x1b[2Jkey": [{"seen": "a\x1b]0;title\x07b\nc\x9b31m"}]}
    assert console.parse_report(json.dumps(report).encode())["key"] == [{"seen": "abc31m"}]


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_lines_do_not_depend_on_how_the_bytes_arrive(data: bytes, cuts: list[int]) -> None:
    data += b"\n"
    bounds = [0, *sorted(cuts), len(data)]
    lines = console.Lines()
    pieces = [line for a, b in itertools.pairwise(bounds) for line in lines.feed(data[a:b])]
    assert pieces == [line.strip(b"\r") for line in data.split(b"\n")[:-1]]


def test_a_line_without_end_stays_small() -> None:
    lines = console.Lines(limit=100)
    for _ in range(50):
        assert list(lines.feed(b"x" * 999)) == []
    assert list(lines.feed(b"\nnext\n")) == [b"x" * 100, b"next"]


def test_a_log_stops_at_its_limit_and_says_so(tmp_path: Path) -> None:
    log = console.Log(tmp_path / "console.log", limit=1000)
    for _ in range(10):
        log.write(b"x" * 300)
    log.close()
    kept = (tmp_path / "console.log").read_bytes()
    assert kept.startswith(b"x" * 1000 + b"\n[the console log ends here")
    assert len(kept) < 1100


# --- What it means -----------------------------------------------------------------------------------


class Boot:
    """A boot that a test tells as a story: each word is a line of the console, or an event."""

    def __init__(self, until: verdict.Until = "multi-user") -> None:
        self.watch = verdict.Watch(until, lambda: 1.0)
        if until != "start":
            self.watch.line(console.START)

    def sees(self, *lines: bytes) -> verdict.Verdict | None:
        verdicts = [self.watch.line(line) for line in lines]
        assert not any(verdicts[:-1]), "settled too early"
        return verdicts[-1]


LINUX = b"[    0.000000] Linux version 6.12.0"


@pytest.mark.parametrize(("report", "status"), [(REFUSED, 3), (CRASHED, 1)])
def test_a_report_of_failure_settles_the_boot(report: dict[str, object], status: int) -> None:
    boot = Boot()
    settled = boot.sees(LINUX, console.START, framed(report))
    assert settled and settled.status == status
    assert boot.watch.report == report
    assert set(boot.watch.marks) == {"kernel", "start", "report"}


GOOD = b'mosinit-report: {"schema":1,"result":"pivoted","failed":null}'


@pytest.mark.parametrize(
    "line",
    [
        b"[    0.1] Kernel command line: console=ttyS0 -- " + GOOD,
        b"[    0.1] Kernel command line: console=ttyS0 -- mosinit: start",
        b" " + GOOD,
        GOOD,
    ],
)
def test_what_a_hypervisor_adds_to_the_command_line_is_no_report(line: bytes) -> None:
    watch = verdict.Watch("pivoted", lambda: 1.0)
    assert (watch.line(line), watch.line(b"[    0.2] " + GOOD), watch.report) == (None, None, None)


def test_a_refusal_names_its_check() -> None:
    assert Boot().sees(framed(REFUSED)) == (3, "refused: SB-OFF")


def test_hand_over_is_enough_only_if_asked() -> None:
    assert Boot().sees(framed(PIVOTED)) is None
    assert Boot("pivoted").sees(framed(PIVOTED)) == (0, "the hostfs is reached")


def test_the_started_system_has_the_last_word() -> None:
    boot = Boot()
    boot.sees(framed(PIVOTED))
    assert boot.watch.port(b'{"target": "basic.target"}') is None
    full = {**PIVOTED, "sequence": 7}
    settled = boot.watch.port(json.dumps({"target": "multi-user.target", "report": full}).encode())
    assert settled == (0, "multi-user.target is reached")
    assert boot.watch.report == full


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"target": "multi-user.target"}', "no boot report came"),
        (b'{"target": "multi-user.target", "report": {"schema": 2}}', "schema"),
        (b"nonsense", "cannot be read"),
    ],
)
def test_a_started_system_without_report_has_failed(line: bytes, reason: str) -> None:
    settled = Boot().watch.port(line)
    assert settled and settled.status == 1
    assert reason in settled.reason


def test_a_torn_report_waits_for_the_next_one() -> None:
    # The kernel writes into the middle of lines on the serial console; the bring-up says its report again.
    torn = framed(REFUSED)[:30] + b"[    9.9] tsc: Refined" + framed(REFUSED)[30:]
    assert Boot().sees(torn, framed(REFUSED)) == (3, "refused: SB-OFF")


def test_a_torn_report_alone_is_told() -> None:
    boot = Boot()
    boot.sees(LINUX, framed(REFUSED)[:30])
    settled = boot.watch.event("RESET")
    assert settled and settled.status == 1
    assert "without a report (a report came that cannot be read" in settled.reason


def test_what_comes_after_the_hand_over_only_makes_it_worse() -> None:
    boot = Boot()
    assert boot.sees(framed(PIVOTED), framed({**PIVOTED, "sequence": 9})) is None
    assert boot.watch.report == PIVOTED
    assert boot.sees(framed(CRASHED)) == (1, "the bring-up crashed, and said so in its report")


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ("RESET", "the machine restarted without a report"),
        ("SHUTDOWN", "the machine powered off without a report"),
        ("WATCHDOG", "the hardware watchdog fired"),
        ("GUEST_PANICKED", "the kernel panicked"),
    ],
)
def test_an_end_without_report_is_a_failure(event: str, reason: str) -> None:
    boot = Boot()
    boot.sees(LINUX)
    assert boot.watch.event(event) == (1, reason)


def test_a_restart_between_hand_over_and_multi_user_is_a_failure() -> None:
    boot = Boot()
    boot.sees(LINUX, framed(PIVOTED))
    settled = boot.watch.event("RESET")
    assert settled == (1, "the machine restarted before multi-user.target")


def test_a_panic_is_a_failure_at_once() -> None:
    settled = Boot().sees(LINUX, b"[ 3.1] Kernel panic - not syncing: \x1b[31mno init found")
    assert settled == (1, "the kernel panicked: [ 3.1] Kernel panic - not syncing: no init found")


def test_firmware_may_restart_twice_before_a_kernel_runs() -> None:
    boot = Boot()
    reset = [boot.watch.event("RESET") for _ in range(3)]
    assert reset[:2] == [None, None]
    assert boot.watch.resets == 2
    assert reset[2] and reset[2].status == 1


UNENROLLED = {**REFUSED, "failed": "SB-MODE"}


def unenrolled(setup: bool) -> tuple[Boot, verdict.Verdict | None]:
    """Tell of a machine whose kernel runs without any keys, up to the refusal."""
    boot = Boot("pivoted")
    boot.watch.setup = setup
    boot.sees(LINUX)
    return boot, boot.sees(framed(UNENROLLED))


def test_a_machine_in_setup_mode_is_refused_once_and_begins_anew() -> None:
    boot, settled = unenrolled(setup=True)
    assert settled is None
    # Into the menu, by what is chosen there, and twice by the firmware itself.
    assert [boot.watch.event("RESET") for _ in range(4)] == 4 * [None]
    assert set(boot.watch.marks) == {"setup mode"}
    assert boot.sees(LINUX, console.START) is None
    settled = boot.sees(framed(PIVOTED))
    assert settled
    assert settled.status == 0
    assert set(boot.watch.marks) == {"setup mode", "kernel", "start", "report"}


def test_a_machine_whose_keys_nobody_enrolled_is_refused() -> None:
    assert unenrolled(setup=False)[1] == verdict.Verdict(3, "refused: SB-MODE")
    boot, _ = unenrolled(setup=True)
    boot.sees(LINUX, console.START)
    settled = boot.sees(framed(UNENROLLED))
    assert settled == verdict.Verdict(3, "refused: SB-MODE")


def test_a_machine_in_setup_mode_does_not_restart_for_ever() -> None:
    boot, _ = unenrolled(setup=True)
    resets = [boot.watch.event("RESET") for _ in range(6)]
    assert [each for each in resets if each] == [resets[4], resets[5]]


def test_a_machine_may_be_waited_for_until_it_asks_to_be_enrolled() -> None:
    boot = Boot("request")
    assert boot.sees(framed(PIVOTED)) is None
    assert boot.watch.port(b'{"target": "multi-user.target"}') is None
    settled = boot.watch.asks(b'{"serial": 1}')
    assert settled
    assert settled.status == 0
    assert boot.watch.request == b'{"serial": 1}'
    assert Boot("installed").watch.asks(b"{}") is None


def test_a_machine_that_cannot_ask_says_why() -> None:
    settled = Boot("request").watch.port(b'{"target": "installed", "error": "no such disk"}')
    assert settled == (1, "the machine was not installed: no such disk")


def test_firmware_that_finds_nothing_says_why() -> None:
    settled = Boot().sees(
        b"BdsDxe: loading Boot0001",
        b"BdsDxe: failed to load Boot0001: Access Denied",
        verdict.NOTHING_BOOTABLE,
    )
    assert settled and settled.status == 1
    assert settled.reason.startswith("BdsDxe: failed to load Boot0001: Access Denied (no certificate")


def test_a_firmware_that_crashes_is_not_waited_for() -> None:
    error = rb"../src/boot/boot.c:2576@image_start: Error loading \vmlinuz: Access denied"
    crash = b"\x1b[0m!!!! X64 Exception Type - 0D(#GP - General Protection)  CPU Apic ID - 00000000 !!!!"
    settled = Boot().sees(b"BdsDxe: starting Boot0001", b"\x1b[1m" + error, crash)
    assert settled == (1, f"the firmware crashed ({error.decode()})")
    # A started system may write what it likes.
    assert Boot().sees(verdict.KERNEL, crash) is None


def test_a_timeout_quotes_the_last_line() -> None:
    boot = Boot()
    boot.sees(b"\x1b[2Jwaiting for\x07 the disk", b"")
    assert boot.watch.late(30) == (1, "no report within 30 s; the console's last line: waiting for the disk")


# --- QEMU's command ----------------------------------------------------------------------------------


def command(hardware: machine.Hardware, *disks: str) -> list[str]:
    channels = machine.Channels(qmp=3, console=4, report=5, exchange=7, tpm=6)
    return machine.command_line(hardware, [Path(disk) for disk in disks], Path("/s/v.fd"), "tcg", channels)


def test_a_plain_machine_has_no_network_and_reads_no_configuration() -> None:
    words = command(machine.Hardware(), "/d.raw")
    assert {"-no-user-config", "-nodefaults", "-S"} <= set(words)
    assert not [word for word in words if "netdev" in word]


@pytest.mark.parametrize(("network", "restrict"), [("restricted", "on"), ("user", "off")])
def test_a_network_is_closed_unless_it_is_asked_to_be_open(network: str, restrict: str) -> None:
    words = command(machine.Hardware(network="user" if network == "user" else "restricted"), "/d.raw")
    assert f"user,id=net,restrict={restrict}" in words


def test_a_machine_without_tpm_has_none() -> None:
    assert any("tpm" in word for word in command(machine.Hardware(), "/d.raw"))
    assert not any("tpm" in word for word in command(machine.Hardware(tpm=False), "/d.raw"))


def test_a_stick_beside_a_disk_and_a_network_card_of_real_machines() -> None:
    hardware = machine.Hardware(bus="usb", extra_bus="nvme", nic="e1000e", network="restricted")
    words = command(hardware, "/stick.raw", "/disk.raw")
    devices = [words[n + 1].partition(",") for n, word in enumerate(words) if word == "-device"]
    kinds = [kind for kind, _, _ in devices]
    assert kinds.index("qemu-xhci") < kinds.index("usb-storage") < kinds.index("nvme")
    assert "e1000e" in kinds
    assert not [kind for kind in kinds if kind.startswith("virtio-blk") or kind.startswith("virtio-net")]
    (stick,) = (set(rest.split(",")) for kind, _, rest in devices if kind == "usb-storage")
    assert {"drive=disk0", "bootindex=1"} <= stick


def test_no_value_becomes_an_option() -> None:
    words = command(machine.Hardware(smbios=("a=b,path=/etc/shadow",)), "/a,b.raw")
    assert "type=11,value=a=b,,path=/etc/shadow" in words
    node = json.loads(words[words.index("-blockdev") + 1])
    assert node["file"]["filename"] == "/a,b.raw"


def test_the_format_of_a_disk_is_not_guessed() -> None:
    words = command(machine.Hardware(extra_disks=()), "/a.raw", "/b.img", "/c.qcow2")
    nodes = [json.loads(words[n + 1]) for n, word in enumerate(words) if word == "-blockdev"]
    assert [node["driver"] for node in nodes] == ["raw", "raw", "qcow2"]


# --- Before a machine is made ------------------------------------------------------------------------


def options(folder: Path, **changes: object) -> vm.BootOptions:
    disk = folder / "disk.raw"
    disk.touch()
    return vm.BootOptions(disk=disk, folder=folder / "state", **changes)  # type: ignore[arg-type]


def test_a_missing_disk_is_named(host: Host, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="cannot read the disk .*/none"):
        vm.boot(host, vm.BootOptions(disk=tmp_path / "none", folder=tmp_path / "state"))
    assert not (tmp_path / "state").exists()


def test_one_folder_is_one_machine(host: Host, tmp_path: Path) -> None:
    wanted = options(tmp_path)
    wanted.folder.mkdir()
    with (wanted.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Failure, match="a machine runs in"):
            vm.boot(host, wanted)


def test_an_interactive_boot_needs_a_terminal(host: Host, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="needs a terminal"):
        vm.boot(host, options(tmp_path, interactive=True))


def test_a_saved_machine_is_not_overwritten(host: Host, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="never overwritten"):
        vm.save(host, options(tmp_path), tmp_path)


def test_other_hardware_is_not_restored(host: Host, tmp_path: Path) -> None:
    wanted = options(tmp_path)
    for text in ('{"hardware": {"memory": 1}}', "no json"):
        (tmp_path / "machine.json").write_text(text)
        with pytest.raises(Failure, match="save"):
            vm.restore(host, tmp_path, wanted)


def test_the_shape_of_a_machine_is_all_but_the_content_of_its_disks(tmp_path: Path) -> None:
    one, two = options(tmp_path), options(tmp_path, hardware=machine.Hardware(snapshot=True))
    assert vm.shape(one, "tcg") == vm.shape(two, "tcg")
    for other in (
        machine.Hardware(memory=2048),
        machine.Hardware(smbios=("x",)),
        machine.Hardware(tpm=False),
        machine.Hardware(bus="ahci"),
    ):
        assert vm.shape(options(tmp_path, hardware=other), "tcg") != vm.shape(one, "tcg")
    before = vm.shape(one, "tcg")
    one.disk.write_bytes(b"longer")
    assert vm.shape(one, "tcg") != before


# --- The terminal of an interactive machine ----------------------------------------------------------

TYPES = """
import asyncio, socket, sys
from mosinit import terminal
async def main():
    ours, machine = socket.socketpair()
    left = asyncio.Event()
    terminal.need()
    with terminal.joined(ours, left):
        terminal.show(b"ready")
        await left.wait()
    machine.setblocking(False)
    print(machine.recv(100))
asyncio.run(main())
"""


def test_the_terminal_is_the_machines_until_it_is_left() -> None:
    ours, theirs = os.openpty()
    before = termios.tcgetattr(theirs)
    command = [sys.executable, "-B", "-c", TYPES]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, env={**os.environ, "PYTHONPATH": "."}
    ) as process:
        assert os.read(ours, 100) == b"ready"
        os.write(ours, b"a\x03\r\x1dnot this")  # Ctrl-C is the machine's, what follows Ctrl-] is nobody's
        assert process.wait(20) == 0
    assert os.read(ours, 100) == b"b'a\\x03\\r'\r\n"
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


# --- Who ends with whom ------------------------------------------------------------------------------

STARTS_A_CHILD = """
import asyncio, sys
from mosinit import machine
async def main():
    with open(sys.argv[1], "wb") as log:
        async with machine.process(["sleep", "600"], log) as child:
            print(child.pid, flush=True)
            await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.fixture
def parent(need: Need, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that started another one by `machine.process`, and the other's id."""
    need("setpriv")
    command = [sys.executable, "-B", "-c", STARTS_A_CHILD, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}) as process:
        assert process.stdout
        yield process, int(process.stdout.readline())
        process.kill()


def test_a_program_is_told_to_end(need: Need, tmp_path: Path) -> None:
    need("setpriv")

    async def start_and_leave() -> int | None:
        with (tmp_path / "log").open("wb") as log:
            async with machine.process(["sleep", "600"], log) as child:
                pass
            return child.returncode

    before = time.monotonic()
    assert asyncio.run(start_and_leave()) == -signal.SIGTERM
    assert time.monotonic() - before < machine.QUIT_SECONDS


def ended(process: int) -> bool:
    """Say whether a process is gone, or dead and not yet waited for by whoever adopted it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_program_ends_with_who_started_it(
    parent: tuple[subprocess.Popen[bytes], int], how: signal.Signals
) -> None:
    process, child = parent
    process.send_signal(how)
    process.wait(20)
    deadline = time.monotonic() + 20
    while not ended(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ended(child)


@pytest.mark.parametrize("how", [["-b", "SECRET", "-F", "raw"], ["-o", "data_file=SECRET"]])
def test_a_disk_that_refers_to_other_files_is_not_opened(
    need: Need, host: Host, tmp_path: Path, how: list[str]
) -> None:
    need("qemu-img")
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(1 << 20))
    disk = tmp_path / "disk.qcow2"
    words = [word.replace("SECRET", str(secret)) for word in how]
    host.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, disk, "1M"])
    with pytest.raises(Failure, match="refers to another file"):
        vm.boot(host, vm.BootOptions(disk=disk, folder=tmp_path / "state"))


def boot_of(tmp_path: Path, **more: object) -> vm.BootOptions:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    return vm.BootOptions(disk=disk, folder=tmp_path / "state", **more)  # type: ignore[arg-type]


def test_another_keyset_than_the_machine_has_is_not_ignored(
    need: Need, host: Host, keyset: keys.Keyset, other: keys.Keyset, tmp_path: Path
) -> None:
    need("virt-fw-vars")
    wanted = boot_of(tmp_path, keys=keyset.folder)
    wanted.folder.mkdir()
    vm._enroll_if_new(host, wanted)
    vm._enroll_if_new(host, wanted)
    with pytest.raises(Failure, match="trusts another keyset"):
        vm.boot(host, boot_of(tmp_path, keys=other.folder))
    with pytest.raises(Failure, match="is no keyset"):
        vm.boot(host, boot_of(tmp_path, keys=tmp_path / "nothing"))
    with pytest.raises(Failure, match="trusts a keyset already: no --setup-mode"):
        vm.boot(host, boot_of(tmp_path, setup_mode=True))


def test_a_folder_with_something_else_is_not_filled(host: Host, tmp_path: Path) -> None:
    wanted = boot_of(tmp_path)
    wanted.folder.write_text("a file")
    with pytest.raises(Failure, match="is no folder"):
        vm.boot(host, wanted)
    wanted.folder.unlink()
    wanted.folder.mkdir()
    (wanted.folder / "letter").write_text("mine")
    with pytest.raises(Failure, match="holds no machine"):
        vm.boot(host, wanted)
    assert os.listdir(wanted.folder) == ["letter"]


def test_a_refused_command_leaves_no_machine(host: Host, tmp_path: Path) -> None:
    """A disk without an ESP has no certificates to enrol."""
    wanted = boot_of(tmp_path)
    for folder in (wanted.folder, tmp_path / "some/new/folder"):
        with pytest.raises(Failure, match="keys"):
            vm.boot(host, replace(wanted, folder=folder))
    assert os.listdir(tmp_path) == ["disk.raw"]
    wanted.folder.mkdir()
    for left in ([], ["lock"]):
        for name in left:
            (wanted.folder / name).touch()
        with pytest.raises(Failure, match="keys"):
            vm.boot(host, wanted)
        assert os.listdir(wanted.folder) == left


def test_a_machine_stays_whatever_comes_then(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with pytest.raises(Failure, match="later"), vm._taken(folder):
        (folder / machine.VARIABLES).touch()
        raise Failure("later")
    assert set(os.listdir(folder)) == {machine.VARIABLES, "lock"}
    with pytest.raises(Failure, match="a machine runs in"), vm._taken(folder), vm._taken(folder):
        pass
    (folder / machine.VARIABLES).unlink()
    with pytest.raises(Failure, match="a machine runs in"), vm._taken(folder), vm._taken(folder):
        pass
    assert os.listdir(folder) == ["lock"]


def test_a_report_of_an_earlier_boot_does_not_stay(host: Host, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text("{}")
    with pytest.raises(Failure, match="keys"):  # a disk without an ESP has no certificates to enrol
        vm.boot(host, boot_of(tmp_path, report=report))
    assert not report.exists()


def test_as_many_machines_run_at_a_time_as_there_are_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0").touch()
    monkeypatch.setenv(machine.SLOTS, str(tmp_path))

    async def runs(seen: list[str], name: str, until: asyncio.Event) -> None:
        async with machine._slot():
            seen.append(name)
            await until.wait()
        seen.append(f"{name} ends")

    async def story() -> list[str]:
        seen, first, second = list[str](), asyncio.Event(), asyncio.Event()
        one = asyncio.create_task(runs(seen, "one", first))
        await asyncio.sleep(0)
        two = asyncio.create_task(runs(seen, "two", second))
        await asyncio.sleep(0.5)
        assert seen == ["one"]
        first.set()
        await one
        second.set()
        await two
        return seen

    assert asyncio.run(story()) == ["one", "one ends", "two", "two ends"]
