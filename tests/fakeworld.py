"""A machine for the installer's screens that exists only in memory; as a program it shows it to a terminal.

What takes time waits for files below a folder, so that whoever drives the screens says when it goes on:
`python3 -m tests.fakeworld FOLDER [WORD ...]`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mosinit import init
from mosinit.host import Failure
from mosinit.installer import (
    Changed,
    Choices,
    DiskView,
    Enrolment,
    Facts,
    LinkView,
    Outcome,
    Planned,
)  # fmt: skip
from mosinit.jobs import Job
from mosinit.recovery import Approving, Flow, Found, Rescue

GIB = 1 << 30
FACTS = Facts(
    product="7d0f8a3e-0c1d-4c5a-9a55-1f2e3d4c5b6a",
    release="sequence 42, epoch 1",
    secure_boot="on, with the keys of this organisation",
    tpm="2.0, not provisioned",
)
OLD_SYSTEM = (
    "1  512.0 MiB  vfat         EFI",
    "2  930.5 GiB  ext4         photos-and-thesis",
)
SSD = DiskView(
    Path("/dev/nvme0n1"),
    "nvme0n1",
    "Samsung SSD 980 PRO 1TB",
    "S5GXNX0R123456",
    931 * GIB,
    "nvme",
    OLD_SYSTEM,
)
EMPTY = DiskView(Path("/dev/sda"), "sda", "QEMU HARDDISK", "QM00001", 16 * GIB, "sata")
MEDIUM = DiskView(
    Path("/dev/sdb"), "sdb", "Ultra Fit", "4C530001", 28 * GIB, "usb", ("1  512.0 MiB  vfat  ESP",),
    "the medium that this system was booted from",
)  # fmt: skip
MEMBER = DiskView(
    Path("/dev/sdc"), "sdc", "WDC WD40EFRX", "WD-WCC4E1", 3726 * GIB, "sata",
    ("whole disk  linux_raid_member  nas:0",),
)  # fmt: skip
ENROLMENT = Enrolment(
    "0123456789abcdef",
    (
        "Over SSH, from where the keyset is:",
        "  ssh root@192.0.2.7 request > request.json",
        "  mosinit enroll request.json --keys DIR --out answer.json",
        "  ssh root@192.0.2.7 answer < answer.json",
        "Host key: SHA256:qwJ3Zk0pY0XGx2bQbq5mXvV7eX2m3o0m0n2JmB3b1Qk",
    ),
)


MACHINE = DiskView(
    Path("/dev/vda"), "vda", "QEMU HARDDISK", "QM00007", 16 * GIB, "sata",
    ("1  512.0 MiB  vfat  esp", "2  128.0 MiB  crypto_LUKS  machine-config"),
)  # fmt: skip
KEY = "-".join(["cbdefghi"] * 8)
FOUND = Found(
    "/dev/vda  QEMU HARDDISK  serial QM00007",
    ("TPM-IDENTITY: config is sealed to an earlier provisioning",),
    ("give config the key of the new provisioning and its recovery key in place of the old",),
    (),
)
LOST = "LUKS-HEADER: expected a good copy, seen none; config is lost"
APPROVING = Approving(
    FOUND.disk,
    ("TPM-POLICY: expected an approved PCR 7",),
    "0123456789abcdef",
    (
        "Over SSH, from where the keyset is:",
        "  ssh root@192.0.2.7 event-log > event-log",
        "  mosinit approve event-log --machine 0123456789abcdef --keys DIR --out approvals.json",
        "  ssh root@192.0.2.7 approvals < approvals.json",
        "(once you know why the firmware's state, PCR 7, changed)",
        "This machine's host key: SHA256:qwJ3Zk0pY0XGx2bQbq5mXvV7eX2m3o0m0n2JmB3b1Qk",
        "Or by a USB stick, with what is below.",
    ),
)
RECOVERED = Outcome(
    ("/dev/vda: read back as a boot does", "done: give config the key", "remove the medium and restart"),
    {"disk": "/dev/vda", "status": 0, "next": "remove the medium and restart"},
)

OUTCOME = Outcome(
    (
        "sequence 42 on /dev/nvme0n1, generation 5f2b1c9a, in 74 s",
        "identity 0123456789abcdef",
        "boot entry Boot0004 (mosinit)",
    )
)


@dataclass
class FakeWorld:
    """What the installer reaches: each call is noted; `fail` says by name what a call raises."""

    seen: tuple[DiskView, ...] = (SSD, EMPTY, MEDIUM, MEMBER)
    known: Facts = FACTS
    fail: dict[str, BaseException] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    installation: Callable[[Job[Any]], Outcome] = lambda job: OUTCOME
    after: tuple[DiskView, ...] | None = None  # the disks once somebody looked at them
    of_machines: tuple[DiskView, ...] = (MACHINE,)
    seen_there: Found = FOUND
    recovery: Callable[[Job[Any]], Outcome] = lambda job: RECOVERED
    resealing: Callable[[Job[Any]], Outcome] = lambda job: RECOVERED
    provisioning: Callable[[Job[Any]], None] = lambda job: None

    def _note(self, name: str, *words: object) -> None:
        self.calls.append(" ".join(map(str, (name, *words))))
        if name in self.fail:
            raise self.fail[name]

    def facts(self) -> Facts:
        """Say what this machine is."""
        return self.known

    def links(self, job: Job[Any]) -> Sequence[LinkView]:
        """List the interfaces."""
        self._note("links")
        return (LinkView("enp1s0", "no carrier"), LinkView("enp2s0", "192.0.2.7/24 by DHCP"))

    def use_dhcp(self, job: Job[Any], link: LinkView) -> str:
        """Note it."""
        self._note("dhcp", link.name)
        return f"{link.name} has 192.0.2.7/24"

    def use_static(self, job: Job[Any], link: LinkView, address: str, gateway: str, dns: str) -> str:
        """Note it."""
        self._note("static", link.name, address, gateway, dns)
        return f"{link.name} has {address}"

    def look_at_source(self, job: Job[Any], choices: Choices) -> str:
        """Verify nothing."""
        self._note("source", choices.source, choices.user)
        return "sequence 42, epoch 1, 214 MiB" + (f", from {choices.source}" if choices.source else "")

    def disks(self, job: Job[Any]) -> Sequence[DiskView]:
        """List the disks."""
        self._note("disks")
        return self.seen

    def plan(self, job: Job[Any], choices: Choices) -> Planned:
        """Plan what the real one would."""
        self._note("plan", choices.disk, choices.state)
        disk = next(disk for disk in self.seen if disk.path == choices.disk)
        volume = (f"partition state          {choices.state:>6} MiB  /var, encrypted",)
        lines = (
            "release   this medium  sequence 42",
            "partition esp               512 MiB  boot loader and UKIs, FAT32",
            "partition machine-config    128 MiB  /config, encrypted with integrity",
            "partition machine-store    7900 MiB  /atomfs-cache, encrypted",
            "partition machine-scratch  3900 MiB  /scratch-writes, encrypted anew at each boot",
            *(volume if choices.state else ()),
            "step 1    partitions: marked as unfinished",
            "step 2    machine-config: manifest.git, the machine's identity, what the TPM opens it by",
            "step 3    machine-store: 31 blobs, each compared with its digest",
            "step 4    esp: boot loader and UKI, nothing that firmware finds yet",
            "step 5    reading everything back: by what the boot itself calls",
            "step 6    TPM: it is provisioned first, then closed",
            "step 7    start: from here the disk starts a machine",
            "step 8    boot entry: first in the firmware's order, others stay",
        )
        name = f"{disk.path}  {disk.model}  serial {disk.serial}"
        members = "linux_raid_member nas:0" if disk == MEMBER else ""
        return Planned(name, lines, disk.rows, disk.serial if disk.rows else "", members, plan=disk)

    def check_unchanged(self, job: Job[Any], planned: Planned) -> None:
        """See whether the disk is what it was."""
        self._note("check", planned.plan.path)
        if self.after is not None:
            self.seen, self.after = self.after, None
        if planned.plan not in self.seen:
            raise Changed(f"{planned.plan.path} is another disk now: its serial was {planned.plan.serial}")

    def install(self, job: Job[Any], choices: Choices, planned: Planned) -> Outcome:
        """Do what the test says."""
        self._note("install", planned.plan.path, choices.state)
        return self.installation(job)

    def sticks(self, job: Job[Any]) -> Sequence[tuple[str, object]]:
        """List one stick."""
        self._note("sticks")
        return (("sdd1  KEYS  7.5 GiB", "sdd1"),)

    def save_request(self, job: Job[Any], stick: object) -> str:
        """Note it."""
        self._note("save", stick)
        return "saved as mosinit/request-0123456789abcdef.json"

    def take_answer(self, job: Job[Any], stick: object) -> str:
        """Note it."""
        self._note("take", stick)
        return "the answer was taken"

    def machines(self, job: Job[Any]) -> Sequence[DiskView]:
        """List the disks that have a machine's partitions."""
        self._note("machines")
        return self.of_machines

    def reseal(self, job: Job[Any], disk: Path) -> Outcome:
        """Do what the test says."""
        self._note("reseal", disk)
        return self.resealing(job)

    def save_event_log(self, job: Job[Any], stick: object) -> str:
        """Note it."""
        self._note("log", stick)
        return "saved as mosinit/event-log-0123456789abcdef.bin"

    def take_approvals(self, job: Job[Any], stick: object) -> str:
        """Note it."""
        self._note("approvals", stick)
        return "mosinit/approvals.json is taken"

    def provision(self, job: Job[Any]) -> None:
        """Do what the test says."""
        self._note("provision")
        self.provisioning(job)

    def look(self, job: Job[Any], rescue: Rescue) -> Found:
        """Find what the test says."""
        self._note("look", rescue.disk, len(rescue.keys()), rescue.source, rescue.renewed)
        return self.seen_there

    def recover(self, job: Job[Any], found: Found) -> Outcome:
        """Do what the test says."""
        self._note("recover", found.disk.split()[0])
        return self.recovery(job)

    def restart(self) -> None:
        """Note it."""
        self._note("restart")


# --- On a terminal -----------------------------------------------------------------------------------


def gated(folder: Path, words: Sequence[str]) -> FakeWorld:
    """Make a machine that waits for files below a folder."""
    world = FakeWorld()

    def wait(job: Job[Any], name: str) -> None:
        while not (folder / name).exists():
            job.sleep(0.02)

    def installation(job: Job[Any]) -> Outcome:
        job.say("provisioning: identity, epoch and seal in the TPM")
        if "enrol" in words:
            job.waiting = ENROLMENT
            wait(job, "wrong")
            text = (folder / "wrong").read_text()
            job.waiting = Enrolment(ENROLMENT.serial, ENROLMENT.ways, text)
            wait(job, "answer")
            job.waiting = None
        job.say("partitions on /dev/nvme0n1")
        seconds = [0.0]
        if "still" in words:  # a picture is the same at each time
            job.clock = lambda: seconds[0]
        with job.measure("copying the release", 214 * init.MIB) as advance:
            seconds[0] = 1.6
            advance(100 * init.MIB)
            while "busy" in words and not (folder / "copied").exists():
                advance(1024)
                job.sleep(0.001)
            wait(job, "copied")
            if "broken" in words:
                raise OSError(5, "Input/output error", "/dev/nvme0n1p3")
            if "crash" in words:
                raise ZeroDivisionError("division by zero")
            advance(114 * init.MIB)
        job.say("reading everything back")
        wait(job, "read")
        return OUTCOME

    world.installation = installation
    gate_recovery(world, wait, words)
    if "twelve" in words:
        world.seen = tuple(
            DiskView(
                Path(f"/dev/sd{c}"), f"sd{c}", f"Disk number {place}", f"SERIAL-{c}", place * GIB, "sata"
            )
            for place, c in enumerate("abcdefghijkl", 9)
        )
    if "hostile" in words:
        evil = "Evil\x1b[2J\x1b]0;owned\x07\x9b31m\u202eModel " + "very long " * 30
        world.seen = (
            DiskView(Path("/dev/sda"), "sda", evil, "S\x1b[1A1", 16 * GIB, "usb", (f"1  {evil}",)), EMPTY,
        )  # fmt: skip
    if "changed" in words:
        world.after = (EMPTY, MEDIUM)
    if "unregistered" in words:
        world.fail["source"] = Failure("registry.example does not answer (timed out): look at the network")
    return world


def gate_recovery(world: FakeWorld, wait: Callable[[Job[Any], str], None], words: Sequence[str]) -> None:
    """Let a recovery wait for files, too."""

    def provisioning(job: Job[Any]) -> None:
        job.waiting = ENROLMENT
        wait(job, "answer")
        job.waiting = None

    def recovery(job: Job[Any]) -> Outcome:
        job.say("config: the key of the new provisioning, and its recovery key")
        wait(job, "written")
        return RECOVERED

    def resealing(job: Job[Any]) -> Outcome:
        job.waiting = APPROVING
        wait(job, "approvals")
        job.waiting = None
        return RECOVERED

    world.provisioning, world.recovery, world.resealing = provisioning, recovery, resealing
    if "lost" in words:
        world.seen_there = replace(FOUND, lost=LOST)


def main() -> int:
    """Show it; write down what was called, and how it ended."""
    from mosinit import cli, screens

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, cli._terminated)
    folder, *words = Path(sys.argv[1]), *sys.argv[2:]
    world = gated(folder, words)
    flow = Flow(world)
    try:
        screens.run(Explodes(flow) if "explode" in words else flow)
    finally:
        (folder / "calls").write_text("\n".join(world.calls))
    if flow.error:
        print(f"error: {flow.error}", flush=True)
    return flow.status


class Explodes:
    """A flow with a fault."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self.over = False

    def page(self) -> Any:
        """Return the page."""
        return self._flow.page()

    def act(self, action: str, values: Any) -> None:
        """Fail."""
        raise RuntimeError("a fault in the flow")

    def tick(self) -> None:
        """Do nothing."""


if __name__ == "__main__":
    sys.exit(main())
