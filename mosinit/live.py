"""What a live system offers a person: the installer on its consoles, and by SSH for keys of its image.

Both are for live mode alone, where nothing of another machine can be read, and neither leads to a shell. An
installed system has all of these files too; there the first look at the boot report ends each of them.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mosinit import enrolment, init
from mosinit.host import Failure, Host

NO, YES = 1, 0  # systemd.service(5), ExecCondition=
REFUSED = 3  # as of the command
INSTALLER = ("/usr/bin/mosinit", "install")
# What a terminal is called by whoever sits at it: no program of ours takes it for a path.
TERMINAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,39}")
STATUS_OFF = signal.SIGRTMIN + 21  # systemd(1)


class Live(Host):
    """The package's seam, with what only a live system does."""

    def signal(self, process: int, number: int) -> None:
        """Send a signal."""
        os.kill(process, number)

    def turn_into(self, words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
        """Start a program in the place of this process."""
        os.execve(words[0], list(words), dict(environment))


@dataclass(frozen=True)
class Places:
    """Where a live system has what; tests have it elsewhere."""

    report: Path = Path(init.LEFT, "report.json")
    answers: Path = Path("/run/mosinit-answers")
    consoles: Path = Path("/sys/class/tty/console/active")
    devices: Path = Path("/dev")
    key: Path = enrolment.SSH_KEY


def is_live(host: Host, places: Places) -> bool:
    """Say whether the bring-up was one of live mode; what it did not write counts as no."""
    try:
        report = init.parse_json(host.read(str(places.report)), "")
    except (OSError, init.Refused):
        return False
    return isinstance(report, dict) and report.get("mode") == "live"


# --- Consoles --------------------------------------------------------------------------------------------


def consoles(host: Host, places: Places | None = None) -> list[str]:
    """Return the terminals that the kernel's consoles are on, as agetty and systemd name them."""
    places = places or Places()
    names = host.read(str(places.consoles)).decode(errors="replace").split()
    # tty0 is the screen that is seen, the first of them belongs to nobody else.
    found = dict.fromkeys("tty1" if name == "tty0" else name for name in names)
    return [name for name in found if _is_terminal(places.devices / name)]


def _is_terminal(device: Path) -> bool:
    """Say whether something is there: a serial port that is only configured answers with an error."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return stat.S_ISCHR(os.fstat(fd).st_mode) and os.isatty(fd)
    finally:
        os.close(fd)


def start_consoles(host: Live, places: Places | None = None) -> list[str]:
    """Start the installer on the consoles of a live system for which nobody left answers."""
    places = places or Places()
    if not is_live(host, places) or _answered(host, places):
        return []
    names = consoles(host, places)
    units = [f"mosinit-console@{name}.service" for name in names]
    if units:
        quieten(host)
        host.run(["systemctl", "start", "--no-block", "--", *units], timeout=60)
    return names


def _answered(host: Host, places: Places) -> bool:
    """Say whether somebody left answers: where they are wrong, the console keeps saying so."""
    words = ["systemctl", "show", "--property=Result", "--value", "mosinit-install.service"]
    result = host.run(words, timeout=60).decode().strip()
    return places.answers.exists() or result not in ("", "success", "exec-condition")


def quieten(host: Live) -> None:
    """Keep what the kernel and systemd say away from the consoles: it would lie over a screen."""
    host.quiet_kernel(1)
    host.signal(1, STATUS_OFF)


def run_console(host: Live, terminal: str) -> NoReturn:
    """Become the installer on this service's terminal. No key stops it, or leaves anything but it."""
    for number in (signal.SIGTSTP, signal.SIGQUIT, signal.SIGTTOU, signal.SIGTTIN):
        signal.signal(number, signal.SIG_IGN)
    become_installer(host, terminal)


def become_installer(host: Live, terminal: str) -> NoReturn:
    """Start the installer in the place of this process, with nothing of a person's in its environment."""
    words = {"PATH": "/usr/sbin:/usr/bin", "LANG": "C.UTF-8", "HOME": "/"}
    host.turn_into(INSTALLER, {**words, "TERM": terminal if TERMINAL.fullmatch(terminal) else "vt220"})


# --- SSH -------------------------------------------------------------------------------------------------


def prepare_ssh(host: Host, places: Places | None = None) -> str:
    """Make this boot's host key, and return its fingerprint; empty where there is to be no SSH."""
    from mosinit import state

    places = places or Places()
    if not is_live(host, places):
        return ""
    if not places.key.exists():
        made = state.make_ssh_keys()
        for suffix, mode in ((".pub", 0o644), ("", 0o600)):
            with host.replacing(f"{places.key}{suffix}", mode=mode) as fresh:
                fresh.write_bytes(made[f"etc/ssh/ssh_host_ed25519_key{suffix}"])
    return enrolment.ssh_fingerprint(places.key)


def run_ssh(host: Live, environment: Mapping[str, str]) -> int:
    """Do what somebody asks for who has logged in by SSH; return the exit status."""
    command = environment.get("SSH_ORIGINAL_COMMAND", "")
    if not command and environment.get("SSH_TTY"):
        become_installer(host, environment.get("TERM", ""))
    try:
        enrolment.serve(host, command.split(), sys.stdin.buffer, sys.stdout.buffer)
    except init.Refused as refused:
        host.say(f"refused: {refused.check}: expected {refused.expected}, seen {refused.seen}")
        return REFUSED
    except Failure as failure:
        host.say(f"error: {failure}")
        return failure.status
    except OSError as error:
        host.say(f"error: {error}")
        return Failure.status
    return 0


def main(words: Sequence[str]) -> int:
    """Do what a unit or sshd asks for."""
    host = Live()
    if list(words) == ["console"]:
        run_console(host, os.environ.get("TERM", ""))
    if list(words) == ["prepare-ssh"]:
        if not (fingerprint := prepare_ssh(host)):
            return NO
        # Standard output goes to the consoles, where what sshd says has no place.
        print(f"SSH host key of this boot: {fingerprint} (ED25519)", flush=True)
        return YES
    if list(words) == ["ssh"]:
        return run_ssh(host, os.environ)
    start_consoles(host)
    return 0
