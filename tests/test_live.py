"""What a live system offers a person, and an installed one never."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from mosinit import enrolment, live
from mosinit.host import Failure
from mosinit.live import Live, Places
from tests.recorder import Recorder, Started


class Became(BaseException):
    """The process became another program."""


class Recorded(Recorder, Live):
    """A live system that records what is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[object] = []
        self.result = "exec-condition"  # of mosinit-install.service

    def answer(self, program: Started) -> bytes:
        """Tell how a service ended, and record what else is started."""
        assert program.timeout
        if program.words[:2] == ["systemctl", "show"]:
            assert program.words[-1] == "mosinit-install.service"
            return f"{self.result}\n".encode()
        self.done.append(program.words)
        return b""

    def quiet_kernel(self, level: int) -> None:
        """Record it."""
        self.done.append(("quiet", level))

    def signal(self, process: int, number: int) -> None:
        """Record a signal."""
        self.done.append((process, number))

    def turn_into(self, words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
        """Record the program."""
        self.done.append((list(words), dict(environment)))
        raise Became


@pytest.fixture
def host() -> Recorded:
    return Recorded()


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A live system with a screen and two serial ports, of which one is only configured."""
    made = Places(
        tmp_path / "report.json", tmp_path / "answers", tmp_path / "active", tmp_path / "dev",
        tmp_path / "host_key",
    )  # fmt: skip
    made.report.write_text(json.dumps({"mode": "live"}))
    made.consoles.write_text("tty0 ttyS0 ttyS1\n")
    made.devices.mkdir()
    for name in ("tty1", "ttyS0"):
        _, theirs = os.openpty()
        (made.devices / name).symlink_to(os.ttyname(theirs))
    (made.devices / "ttyS1").symlink_to("/dev/null")
    return made


QUIET = [("quiet", 1), (1, signal.SIGRTMIN + 21)]


def test_the_consoles_that_are_there_get_the_installer(host: Recorded, places: Places) -> None:
    assert live.start_consoles(host, places) == ["tty1", "ttyS0"]
    units = ["mosinit-console@tty1.service", "mosinit-console@ttyS0.service"]
    assert host.done == [*QUIET, ["systemctl", "start", "--no-block", "--", *units]]
    assert host.said == []


def test_a_machine_without_any_terminal(host: Recorded, places: Places) -> None:
    places.consoles.write_text("ttyS1 ttyAMA7\n")
    assert live.start_consoles(host, places) == []
    assert (host.done, host.said) == ([], [])


def no_report(host: Recorded, places: Places) -> None:
    places.report.unlink()


def torn_report(host: Recorded, places: Places) -> None:
    places.report.write_text('{"mode": "li')


def run_mode(host: Recorded, places: Places) -> None:
    places.report.write_text(json.dumps({"mode": "run"}))


def answers(host: Recorded, places: Places) -> None:
    places.answers.mkdir()


def wrong_answers(host: Recorded, places: Places) -> None:
    host.result = "exit-code"


Change = Callable[[Recorded, Places], None]


@pytest.mark.parametrize("change", [no_report, torn_report, run_mode, answers, wrong_answers])
def test_nobody_is_asked_elsewhere(change: Change, host: Recorded, places: Places) -> None:
    change(host, places)
    assert live.start_consoles(host, places) == []
    assert (host.done, host.said) == ([], [])


@pytest.mark.parametrize("result", ["", "success", "exec-condition"])
def test_no_answers(result: str, host: Recorded, places: Places) -> None:
    host.result = result
    assert live.start_consoles(host, places) == ["tty1", "ttyS0"]


@pytest.mark.parametrize(
    ("terminal", "given"),
    [("linux", "linux"), ("xterm-256color", "xterm-256color"), ("", "vt220"), ("../../tmp/x", "vt220"),
     ("a b", "vt220"), ("x" * 41, "vt220"), ("vt100\n", "vt220")],
)  # fmt: skip
def test_the_installer_starts_with_nothing_of_a_person_s(terminal: str, given: str, host: Recorded) -> None:
    with pytest.raises(Became):
        live.become_installer(host, terminal)
    environment = {"PATH": "/usr/sbin:/usr/bin", "LANG": "C.UTF-8", "HOME": "/", "TERM": given}
    assert host.done == [(["/usr/bin/mosinit", "install"], environment)]
    assert host.said == []


def test_no_key_stops_what_runs_on_a_console(host: Recorded) -> None:
    numbers = (signal.SIGTSTP, signal.SIGQUIT, signal.SIGTTIN, signal.SIGTTOU)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with pytest.raises(Became):
            live.run_console(host, "vt220")
        assert {signal.getsignal(number) for number in numbers} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- SSH -------------------------------------------------------------------------------------------------


def test_each_boot_has_a_host_key_of_its_own(host: Recorded, places: Places) -> None:
    fingerprint = live.prepare_ssh(host, places)
    assert fingerprint.startswith("SHA256:")
    assert fingerprint == enrolment.ssh_fingerprint(places.key)
    assert stat.S_IMODE(places.key.stat().st_mode) == 0o600
    assert live.prepare_ssh(host, places) == fingerprint  # sshd is started again
    other = replace(places, key=places.key.with_name("other"))
    assert live.prepare_ssh(host, other)
    assert enrolment.ssh_fingerprint(other.key) != fingerprint


def test_the_fingerprint_is_told_where_the_unit_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live, "prepare_ssh", lambda host: "SHA256:abc")
    assert live.main(["prepare-ssh"]) == live.YES
    assert capsys.readouterr() == ("SSH host key of this boot: SHA256:abc (ED25519)\n", "")
    monkeypatch.setattr(live, "prepare_ssh", lambda host: "")
    assert live.main(["prepare-ssh"]) == live.NO
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("change", [no_report, torn_report, run_mode])
def test_only_a_live_system_answers_by_ssh(change: Change, host: Recorded, places: Places) -> None:
    change(host, places)
    assert not live.prepare_ssh(host, places)
    assert not places.key.exists()


def test_whoever_has_a_terminal_gets_the_installer(host: Recorded) -> None:
    with pytest.raises(Became):
        live.run_ssh(host, {"SSH_TTY": "/dev/pts/0", "TERM": "xterm"})


class Served:
    """Stands for standard input and output."""

    def __init__(self, data: bytes = b"") -> None:
        self.buffer = io.BytesIO(data)


@pytest.fixture
def stdout(monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr(sys, "stdin", Served())
    monkeypatch.setattr(sys, "stdout", made := Served())
    return made


@pytest.mark.parametrize(
    ("environment", "status", "says"),
    [
        ({}, 2, "`request` prints"), ({"SSH_ORIGINAL_COMMAND": "sh -c id"}, 2, "`request` prints"),
        ({"SSH_ORIGINAL_COMMAND": "sh", "SSH_TTY": "/dev/pts/0"}, 2, "`request` prints"),
        ({"SSH_ORIGINAL_COMMAND": "request"}, 1, "no request yet"),
        ({"SSH_ORIGINAL_COMMAND": "event-log /etc/shadow"}, 2, "`event-log` prints"),
        ({"SSH_ORIGINAL_COMMAND": "approvals"}, 1, "not started by mosinit"),
    ],
)  # fmt: skip
def test_the_rest_of_ssh(
    environment: dict[str, str], status: int, says: str, host: Recorded, stdout: Served
) -> None:
    assert not enrolment.REQUEST.exists()  # this is no live machine
    assert live.run_ssh(host, environment) == status
    assert says in host.said[0]
    assert stdout.buffer.getvalue() == b""


def test_a_refusal_has_its_status(host: Recorded, stdout: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from mosinit import init

    def refuse(*given: object) -> None:
        raise init.Refused("TPM-IDENTITY", expected="one", seen="other\x1b[2J")

    def break_off(*given: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(enrolment, "serve", refuse)
    assert live.run_ssh(host, {"SSH_ORIGINAL_COMMAND": "answer"}) == 3
    assert "TPM-IDENTITY" in host.said[0]
    monkeypatch.setattr(enrolment, "serve", break_off)
    assert live.run_ssh(host, {"SSH_ORIGINAL_COMMAND": "answer"}) == Failure.status
