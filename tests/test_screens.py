"""The installer's screens in a real terminal: what a person sees and presses, on the terminals that machines
have. The machine behind them is one in memory (`fakeworld`).
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mosinit import pages, screens
from mosinit.screens import Look
from tests.fakeworld import KEY, SSD
from tests.terminals import SECONDS, Terminal, terminal

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _tools(need: Callable[..., None]) -> None:
    need("tmux")


@contextmanager
def installer(
    *words: str, size: tuple[int, int] = (80, 24), term: str = "vt220", first: str = ""
) -> Iterator[Terminal]:
    """Show the installer."""
    program = shlex.join([sys.executable, "-m", "tests.fakeworld", "FOLDER", *words])
    script = f"{first}; cd {shlex.quote(str(ROOT))} && {program}"
    with terminal(["sh", "-c", script.removeprefix("; ")], size, term) as shown:
        shown.wait("[ Continue ]")
        yield shown


def calls(shown: Terminal) -> list[str]:
    """Return what the installer did, once it has ended."""
    return (shown.folder / "calls").read_text().splitlines()


def go(shown: Terminal, name: str, text: str = "") -> None:
    """Let the machine behind the screens go on."""
    (shown.folder / f".{name}").write_text(text)
    (shown.folder / f".{name}").rename(shown.folder / name)


def to_disks(shown: Terminal) -> str:
    shown.press("Enter")
    shown.wait("Where does the release come from?")
    shown.press("Enter")
    return shown.wait("Choose the disk")


def to_plan(shown: Terminal) -> str:
    to_disks(shown)
    shown.press("Enter")
    return shown.wait("[ Erase this disk and install ]")


def consent(shown: Terminal) -> None:
    to_plan(shown)
    shown.type(SSD.serial)
    shown.press("Enter", "Enter")


# --- The whole way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "term"),
    [((80, 24), "vt220"), ((80, 25), "vt102"), ((80, 25), "tmux-256color"), ((80, 24), "linux")],
)
def test_the_whole_way_by_keys_alone(size: tuple[int, int], term: str) -> None:
    with installer("enrol", size=size, term=term) as shown:
        seen = to_plan(shown)
        for part in (*SSD.rows, f"type the serial of this disk: {SSD.serial}"):
            assert part in seen
        shown.type(SSD.serial)
        shown.press("Enter", "Enter")
        shown.wait("waits to be enrolled", "0123456789abcdef", "root@192.0.2.7 request", gone="not taken")
        go(shown, "wrong", "answer.json is of another machine")
        shown.wait("The last answer was not taken: answer.json is of another machine")
        go(shown, "answer")
        seen = shown.wait("copying the release", "47%", "100.0 of 214.0 MiB", "MiB/s")
        assert ("#" in seen, "█" in seen) == ((True, False) if term.startswith("vt") else (False, True))
        go(shown, "copied")
        shown.wait("* reading everything back")
        go(shown, "read")
        shown.wait("This machine is installed.", "Remove the medium")
        shown.press("Enter")
        shown.ended(0)
        assert calls(shown) == [
            "source  ", "disks", "plan /dev/nvme0n1 0", "check /dev/nvme0n1", "install /dev/nvme0n1 0",
        ]  # fmt: skip


def test_a_terminal_that_does_not_say_its_size_has_80_by_24() -> None:
    with installer(first="stty rows 0 cols 0") as shown:
        seen = to_disks(shown)
        assert "Esc: back" in seen.splitlines()[23]
        assert seen.splitlines()[0].startswith(" mosinit | Disk")


# --- Ways out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "status"), [("C-c", 130), ("Escape", 1), ("l", 1)])
def test_who_leaves_at_the_first_page_did_nothing(key: str, status: int) -> None:
    with installer() as shown:
        shown.press(key)
        if key == "l":
            shown.wait("> [ Leave ]")
            shown.press("Enter")
        shown.ended(status)
        assert calls(shown) == []


def test_ctrl_c_on_a_later_page_leaves_too() -> None:
    with installer() as shown:
        to_plan(shown)
        shown.press("C-c")
        shown.ended(130)
        assert not any(call.startswith(("check", "install")) for call in calls(shown))


def test_esc_leads_back() -> None:
    with installer() as shown:
        to_plan(shown)
        for page in ("Choose the disk", "Where does the release", "[ Continue ]"):
            shown.press("Escape")
            shown.wait(page)


def test_neither_ctrl_z_nor_ctrl_backslash_leads_to_a_shell_or_a_core() -> None:
    with installer() as shown:
        shown.press("C-z", "C-\\")
        to_disks(shown)


def test_an_installer_whose_terminal_is_gone_ends(tmp_path: Path) -> None:
    with installer(first="echo $$ > FOLDER/pid") as shown:
        to_disks(shown)
        (child,) = Path(f"/proc/{(shown.folder / 'pid').read_text().strip()}/task").glob("*/children")
        pid = int(child.read_text().split()[0])
        shown.close()
        deadline = time.monotonic() + SECONDS
        while Path(f"/proc/{pid}/fd/0").exists():
            assert time.monotonic() < deadline
            time.sleep(0.03)


def test_a_terminated_installer_leaves_the_terminal_as_it_was() -> None:
    with installer(first="echo $$ > FOLDER/pid; exec 2>&1") as shown:
        to_disks(shown)
        (child,) = Path(f"/proc/{(shown.folder / 'pid').read_text().strip()}/task").glob("*/children")
        os.kill(int(child.read_text().split()[0]), signal.SIGTERM)
        shown.ended(143)


def test_a_fault_in_the_flow_leaves_the_terminal_as_it_was() -> None:
    with installer("explode") as shown:
        shown.press("Enter")
        shown.ended(1)
        assert "a fault in the flow" in (shown.folder / "errors").read_text()


# --- Consent -----------------------------------------------------------------------------------------------


def test_a_wrong_serial_writes_nothing_and_the_right_one_after_it_installs() -> None:
    with installer() as shown:
        to_plan(shown)
        shown.type("S5GXNX0R12345")
        shown.press("Enter", "Enter")
        shown.wait("'S5GXNX0R12345' is not the serial of this disk: nothing was")
        shown.press("BTab")
        shown.type("6")
        shown.press("Tab", "Enter")
        shown.wait("copying the release")
        go(shown, "copied")
        go(shown, "read")
        shown.wait("This machine is installed.")


def test_enter_alone_erases_nothing() -> None:
    with installer() as shown:
        to_plan(shown)
        shown.press("Enter", "Enter", "Enter")
        shown.wait("no serial was typed: nothing was written")
        shown.press("C-c")
        shown.ended(130)
        assert not any(call.startswith("install") for call in calls(shown))


def test_a_disk_that_changed_is_said_on_the_page_of_disks() -> None:
    with installer("changed") as shown:
        consent(shown)
        seen = shown.wait("Choose the disk", "/dev/nvme0n1 is another disk now")
        assert SSD.model not in seen


# --- Disks -------------------------------------------------------------------------------------------------


def test_twelve_disks_are_reached_by_arrows_and_what_is_on_each_is_below() -> None:
    with installer("twelve") as shown:
        seen = to_disks(shown)
        assert "> sda" in seen
        assert "Disk number 9, serial SERIAL-a" in seen
        shown.press(*["Down"] * 11)
        shown.wait("> sdl", "Disk number 20, serial SERIAL-l")
        shown.press("Enter")
        shown.wait("/dev/sdl  Disk number 20  serial SERIAL-l")


def test_a_disk_that_cannot_be_chosen_is_passed_over() -> None:
    with installer() as shown:
        seen = to_disks(shown)
        assert "cannot be chosen: the medium that this system was booted from" in seen
        shown.press("Down")
        shown.wait("> sda", "nothing is on it")
        shown.press("Down")
        shown.wait("> sdc", "linux_raid_member")


def test_what_a_device_says_moves_nothing_on_the_terminal() -> None:
    with installer("hostile") as shown:
        title = shown.ask("pane_title")
        record = shown.folder / "bytes"
        shown.record(record)
        lines = to_disks(shown).splitlines()
        assert lines[0].startswith(" mosinit | Disk")
        assert any(
            line.startswith(" > sda") and r"S\x1b[1A1" in line and r"Evil\x1b[2J" in line for line in lines
        )
        assert all(len(line) <= 80 for line in lines)
        assert shown.ask("pane_title") == title
        assert not any(part in record.read_bytes() for part in (b"\x1b[1A", b"\x1b]0;", b"\x07", b"\x9b"))
        shown.press("Down")
        shown.wait("> sda", "QEMU HARDDISK, serial QM00001")


@pytest.mark.parametrize("size", [screens.SMALLEST, (80, 24)])
def test_what_a_disk_says_at_length_leaves_room_for_the_list(size: tuple[int, int]) -> None:
    rows = tuple(f"partition {number}, 100 MiB: {'ext4, ' * 50}'{'label' * 16}'" for number in range(12))
    page = pages.Page("disks", "Disk\n\u0301", (pages.Choice("disk:a", "sda\n\u0301", "", rows),))
    canvas = screens.View(page, Look("xterm", "utf-8"), lambda action: None).render(size, focus=True)
    assert any(b"> sda" in line for line in canvas.text)
    assert any(b"partition 5," in line for line in canvas.text)


def test_keys_that_come_before_a_page_is_drawn_are_of_that_page() -> None:
    with installer() as shown:
        shown.press("Enter", "Down")
        shown.wait("> A registry, over TLS")


# --- Sizes, letters, other writers -------------------------------------------------------------------------


def test_another_size_in_the_middle_keeps_page_and_typed_words() -> None:
    with installer() as shown:
        to_plan(shown)
        shown.type("S5GXN")
        shown.wait("Serial: S5GXN")
        for size in ((60, 16), (132, 43), (40, 12), (20, 5), (80, 24)):
            shown.resize(*size)
            if size[0] >= 40:
                shown.wait("mosinit | Plan", "Serial: S5GXN")
        shown.type("X0R123456")
        shown.press("Enter", "Enter")
        shown.wait("copying the release")


def test_first_letters_lead_to_lines_and_are_plain_letters_in_fields() -> None:
    with installer() as shown:
        shown.press("n")
        shown.wait("> [ Network ]")
        shown.press("c")
        shown.wait("> [ Continue ]")
        shown.press("Enter")
        shown.wait("Where does the release come from?")
        shown.press("a", "Enter")
        shown.wait("Release : docker://")
        shown.type("nvb.example/os:1")
        shown.wait("Release : docker://nvb.example/os:1")
        shown.press("Tab")
        shown.type("me")
        shown.press("Down")
        shown.type("hush")
        seen = shown.wait("User    : me", "Password: ****")
        assert "hush" not in seen


def test_an_error_of_a_registry_is_shown_and_what_was_typed_stays() -> None:
    with installer("unregistered") as shown:
        shown.press("Enter")
        shown.wait("Where does the release come from?")
        shown.press("Down", "Enter")
        shown.wait("docker://")
        shown.type("registry.example/os:1")
        shown.press("Tab", "Tab", "Tab", "Enter")
        shown.wait("registry.example does not answer", "docker://registry.example/os:1")


def test_what_others_wrote_to_the_terminal_is_gone_after_ctrl_l() -> None:
    with installer() as shown:
        with open(shown.ask("pane_tty"), "w") as tty:
            tty.write("\x1b[3;10Husb 1-1: new device")
        shown.wait("usb 1-1: new device")
        shown.press("C-l")
        shown.wait("[ Continue ]", gone="usb 1-1: new device")


# --- Progress ----------------------------------------------------------------------------------------------


def test_an_error_in_mid_install_says_why_and_what_to_do() -> None:
    with installer("broken") as shown:
        consent(shown)
        shown.wait("47%")
        go(shown, "copied")
        shown.wait("This machine is not installed.", "Input/output error", "it finishes what it began")
        shown.press("Escape")
        assert "error: [Errno 5] Input/output error" in shown.ended(1)


def test_an_installation_is_stopped_after_a_question() -> None:
    with installer() as shown:
        consent(shown)
        shown.wait("47%")
        shown.press("C-c")
        shown.wait("Stop the installation?", "> [ Go on ]")
        shown.press("Enter")
        shown.wait("47%")
        shown.press("Escape")
        shown.wait("Stop the installation?")
        shown.press("s", "Enter")
        shown.wait("stopped by you")
        shown.press("Escape")
        shown.ended(130)


def test_a_serial_line_is_not_flooded_by_progress() -> None:
    with installer("busy") as shown:
        consent(shown)
        shown.wait("47%")
        record, begun = shown.folder / "bytes", time.monotonic()
        shown.record(record)
        while time.monotonic() < begun + 2:
            time.sleep(0.05)
        seen = record.stat().st_size
        # Two rows at most change at each look.
        assert 0 < seen <= (time.monotonic() - begun + 1) / screens.TICK_SECONDS * 240


# --- Recovery ----------------------------------------------------------------------------------------------


def to_ways(shown: Terminal) -> str:
    shown.press("r", "Enter")
    return shown.wait("> Firmware or its keys changed", "TPM is new, or the disk is damaged")


def test_a_new_tpm_by_keys_alone() -> None:
    with installer() as shown:
        to_ways(shown)
        shown.press("Down", "Enter")
        shown.wait("The recovery key of /dev/vda", "Recovery key:")
        shown.type(KEY)
        shown.press("Tab", "Tab", "Tab", "Tab", "Enter")
        shown.wait("Recovery: enrolment", "waits to be enrolled", "0123456789abcdef")
        go(shown, "answer")
        seen = shown.wait("config is sealed to an earlier provisioning", "[ Do this to /dev/vda ]")
        assert KEY not in seen
        shown.press("d", "Enter")
        shown.wait("This machine is being recovered.", "* config: the key of the new provisioning")
        go(shown, "written")
        shown.wait("read back as a boot does", "remove the medium and restart", "> [ Leave ]")
        shown.press("Enter")
        shown.ended(0)
        assert calls(shown) == ["machines", "provision", "look /dev/vda 1  True", "recover /dev/vda"]


def test_the_recovery_key_is_shown_as_stars() -> None:
    with installer() as shown:
        to_ways(shown)
        shown.press("Down", "Enter")
        shown.wait("Recovery key:")
        record = shown.folder / "bytes"
        shown.record(record)
        shown.type(KEY[:8])
        shown.wait("Recovery key: ********")
        shown.press("C-c")
        shown.ended(130)
        assert KEY[:8].encode() not in record.read_bytes()
        assert calls(shown) == ["machines"]


def test_what_is_lost_is_not_made_anew_by_enter_alone() -> None:
    with installer("lost") as shown:
        to_ways(shown)
        shown.press("Down", "Enter")
        shown.wait("Recovery key:")
        shown.type(KEY)
        shown.press("Tab", "Tab", "Tab", "Enter")
        shown.wait("config is lost", "type: anew", "[ Make anew what is lost")
        shown.press("Enter", "Enter", "Enter")
        shown.wait("the word anew was not typed: nothing was written")
        shown.press("Escape")
        shown.wait("Firmware or its keys changed")
        shown.press("C-c")
        shown.ended(130)
        assert calls(shown) == ["machines", "look /dev/vda 1  False"]


def test_approvals_are_waited_for_on_one_screen() -> None:
    with installer() as shown:
        to_ways(shown)
        shown.press("Enter")
        shown.wait(
            "TPM-POLICY", "root@192.0.2.7 event-log > event-log",
            "approve event-log --machine 0123456789abcdef",
            "root@192.0.2.7 approvals < approvals.json", "[ Save the event log on a USB stick ]",
            "[ Take approvals from a USB stick ]",
        )  # fmt: skip
        shown.press("s", "Enter")
        shown.wait("Save the event log on which stick?", "sdd1")
        shown.press("Enter")
        shown.wait("saved as mosinit/event-log-0123456789abcdef.bin")
        go(shown, "approvals")
        shown.wait("remove the medium and restart")
        shown.press("Escape")
        shown.ended(0)
        assert calls(shown) == ["machines", "reseal /dev/vda", "sticks", "log sdd1"]


# --- Which terminals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "encoding", "plain"),
    [("vt102", "utf-8", True), ("", "utf-8", True), ("xterm", "ascii", True), ("linux", "UTF-8", False)],
)
def test_which_terminals_get_plain_signs(term: str, encoding: str, plain: bool) -> None:
    look = Look(term, encoding)
    assert look.plain is plain
    assert look.clean("ä\x1b[2J\u202e\nb") == ("?" if plain else "ä") + "\\x1b[2J\\u202e\nb"
