"""What the happenings of a boot mean: from console lines, report lines and events to how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from mosinit.console import (
    FRAME,
    RESULTS,
    START,
    BadReport,
    Report,
    check_report,
    parse_json,
    parse_report,
    plain,
)

MULTI_USER = "multi-user.target"
INSTALLED = "installed"
FIRMWARE_RESETS = 2  # that firmware may do by itself before a kernel starts
SETUP_MODE = "SB-MODE"  # the check that a machine without keys does not pass
KERNEL = b"Linux version "
PANIC = b"Kernel panic - not syncing"
NOT_STARTED = b"BdsDxe: failed to "
NOTHING_BOOTABLE = b"BdsDxe: No bootable option or device was found"
# systemd-boot says why it goes back to the firmware, and edk2 may then crash and stand still.
LOADER_ERROR = b": Error loading "
FIRMWARE_CRASH = b"!!!! X64 Exception Type"
UNTRUSTED = "no certificate of this machine's db verifies it; a machine for other keys needs a new folder"

Until = Literal["start", "pivoted", "multi-user", "request", "installed"]
INSTALLING: tuple[Until, ...] = ("request", "installed")  # what a machine that installs itself goes on to


class Verdict(NamedTuple):
    """How the boot ended: exit status and one line for people."""

    status: int
    reason: str


@dataclass
class Watch:
    """Follows one boot. Each method takes one happening and returns a verdict if that settles the boot.

    `clock` gives seconds since the machine was started; `marks` collects when its milestones were seen.
    With `setup` the machine has no keys yet: it is refused once for that, and begins anew.
    """

    until: Until
    clock: Callable[[], float]
    report: Report | None = None
    system: Mapping[str, object] = field(default_factory=dict)
    marks: dict[str, float] = field(default_factory=dict)
    last_line: str = ""
    resets: int = 0
    complaint: str = ""
    setup: bool = False
    request: bytes = b""

    def line(self, untrusted: bytes) -> Verdict | None:
        """Take a line of the console."""
        text = plain(untrusted.decode(errors="replace")).strip()
        self.last_line = text[:200] or self.last_line
        if KERNEL in untrusted:
            self._mark("kernel")
        # A hypervisor may write the command line, and the kernel repeats it: behind a time stamp.
        words = untrusted.strip(b"\r\n")
        if words == START:
            self._mark("start")
            return Verdict(0, "the bring-up begins") if self.until == "start" else None
        if words.startswith(FRAME) and "start" in self.marks:
            return self._frame(words.removeprefix(FRAME))
        if PANIC in untrusted:
            return Verdict(1, f"the kernel panicked: {text[:200]}")
        return self._firmware_line(untrusted, text)

    def _firmware_line(self, untrusted: bytes, text: str) -> Verdict | None:
        if "kernel" in self.marks:
            return None
        if NOT_STARTED in untrusted:
            denied = b"Access Denied" in untrusted
            self.complaint = text[:200] + (f" ({UNTRUSTED})" if denied else "")
        if LOADER_ERROR in untrusted:
            self.complaint = text[:200]
        if FIRMWARE_CRASH in untrusted:
            return Verdict(1, self._with_complaint("the firmware crashed"))
        if NOTHING_BOOTABLE in untrusted:
            return Verdict(1, self.complaint or "the firmware found nothing to boot")
        return None

    def _frame(self, untrusted: bytes) -> Verdict | None:
        try:
            report = parse_report(untrusted)
        except BadReport as error:
            # The kernel writes its messages into the middle of such a line: the next one may be whole.
            self.complaint = f"a report came that cannot be read: {error}"
            return None
        if self.report and report["result"] == "pivoted":
            return None  # what is said after the hand-over can only make it worse
        if self.setup and report.get("failed") == SETUP_MODE:
            self._begin_anew()
            return None
        self.report = report
        self._mark("report")
        return self._settled(report) if report["result"] != "pivoted" or self.until == "pivoted" else None

    def _begin_anew(self) -> None:
        """Expect the restart into the boot loader's menu, and the one once keys are enrolled."""
        self.setup, self.resets, self.complaint = False, self.resets - FIRMWARE_RESETS, ""
        self.marks = {"setup mode": round(self.clock(), 2)}

    def port(self, untrusted: bytes) -> Verdict | None:
        """Take a line that the started system wrote to its report port."""
        try:
            message = parse_json(untrusted)
            if message.get("target") == INSTALLED and self.until in INSTALLING:
                return self._installed(message)
            if message.get("target") != MULTI_USER:
                return None
            if isinstance(report := message.get("report"), dict):
                self.report = check_report(report)
            self.system = {name: message[name] for name in ("failed_units", "modules") if name in message}
        except BadReport as error:
            return Verdict(1, f"the started system sent a report that cannot be read: {error}")
        self._mark("multi-user")
        if self.report is None:
            return Verdict(1, f"{MULTI_USER} is reached, and no boot report came")
        return self._settled(self.report) if self.until not in INSTALLING else None

    def asks(self, untrusted: bytes) -> Verdict | None:
        """Take a line that the started system wrote to its exchange port: what is to be enrolled."""
        self.request = untrusted
        self._mark("request")
        return Verdict(0, "the machine asks to be enrolled") if self.until == "request" else None

    def _installed(self, message: Mapping[str, object]) -> Verdict:
        self._mark("installed")
        if isinstance(done := message.get("installed"), dict):
            self.system = {**self.system, "installed": done}
            return Verdict(0, "the machine is installed")
        return Verdict(1, f"the machine was not installed: {str(message.get('error'))[:500]}")

    def event(self, name: str) -> Verdict | None:
        """Take an event of QEMU's (qapi/run-state.json)."""
        if name == "WATCHDOG":
            return Verdict(1, self._with_complaint("the hardware watchdog fired"))
        if name == "GUEST_PANICKED":
            return Verdict(1, "the kernel panicked")
        if name == "RESET" and "kernel" not in self.marks and self.resets < FIRMWARE_RESETS:
            self.resets += 1
            return None
        if name not in ("RESET", "SHUTDOWN"):
            return None
        how = "restarted" if name == "RESET" else "powered off"
        before = "before multi-user.target" if self.report else "without a report"
        return Verdict(1, self._with_complaint(f"the machine {how} {before}"))

    def ended(self, words: str) -> Verdict:
        """Take the end of QEMU itself."""
        return Verdict(1, f"QEMU ended: {words}")

    def late(self, seconds: float) -> Verdict:
        """Take the end of the time that the boot had."""
        wanted = MULTI_USER if self.report else "report"
        last = f"; the console's last line: {self.last_line}" if self.last_line else ""
        return Verdict(1, self._with_complaint(f"no {wanted} within {seconds:.0f} s{last}"))

    def _settled(self, report: Report) -> Verdict:
        result = str(report["result"])
        reached = MULTI_USER if "multi-user" in self.marks else "the hostfs"
        reasons = {
            "pivoted": f"{reached} is reached",
            "refused": f"refused: {report.get('failed')}",
            "crashed": "the bring-up crashed, and said so in its report",
        }
        return Verdict(RESULTS[result], reasons[result])

    def _with_complaint(self, reason: str) -> str:
        return f"{reason} ({self.complaint})" if self.complaint else reason

    def _mark(self, name: str) -> None:
        self.marks.setdefault(name, round(self.clock(), 2))
