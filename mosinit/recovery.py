"""The way back in, page by page: what `recover` does, for who stands at a live machine without a shell.

    which way ─ firmware changed ─► what resealing waits for: approvals ─► done
              └ new TPM, or damage ─► recovery key ─ (enrolment) ─► what was found ─ consent ─► done

Pages over plain data, as `installer` has them, which these follow on from; `interactive` has the real
machine. Nothing is written to the disk before the person saw what, and what is lost takes a typed word. An
error leads back to the first page, with what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mosinit import installer, recoverykey
from mosinit.host import Failure
from mosinit.installer import DONE, INSTALLATION, Carry, Choices, DiskView, Outcome, Wording, reason
from mosinit.jobs import Job
from mosinit.pages import Button, Choice, Field, Item, Page, Text

ANEW_WORD = "anew"
RECOVERY = Wording(
    "Recovery: enrolment",
    "Recovery",
    "This machine is being recovered.",
    "Stop the recovery?",
    "Begun again, it goes on where it was stopped.",
)
TITLE = "Recovery"


@dataclass(frozen=True)
class Rescue:
    """What the person said so far; an empty `source` is the medium's release. With `renewed` the TPM is new
    and was provisioned.
    """

    disk: Path | None = None
    key: str = field(default="", repr=False)
    other: str = field(default="", repr=False)
    source: str = ""
    renewed: bool = False

    def keys(self) -> tuple[bytes, ...]:
        """Return the recovery keys as they were typed. Raises `Failure` for what is none."""
        typed = [words.encode(errors="replace") for words in (self.key, self.other) if words]
        return tuple(recoverykey.parse(words, "-") for words in typed)


@dataclass(frozen=True)
class Found:
    """What `recover --plan` says. With `lost` something is made anew, which takes a typed word; `plan` is
    what was seen itself.
    """

    disk: str
    found: tuple[str, ...]
    will: tuple[str, ...]
    left: tuple[str, ...]
    lost: str = ""
    plan: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Approving:
    """A disk that waits for an approval of what PCR 7 is now, and what was wrong with the last ones."""

    disk: str
    found: tuple[str, ...]
    serial: str
    ways: tuple[str, ...]
    wrong: str = ""


class World(installer.World, Protocol):
    """What installer and recovery can do. Each raises `Failure`, `Refused` or OSError."""

    def machines(self, job: Job[Any]) -> Sequence[DiskView]:
        """List the disks that have a machine's partitions."""

    def reseal(self, job: Job[Any], disk: Path) -> Outcome:
        """Lay an approval; while it waits for one `job.waiting` is an `Approving`."""

    def save_event_log(self, job: Job[Any], stick: object) -> str:
        """Save the firmware's event log on a stick; say where."""

    def take_approvals(self, job: Job[Any], stick: object) -> str:
        """Take approvals from a stick; say so."""

    def provision(self, job: Job[Any]) -> None:
        """Provision the TPM; while it waits for an answer `job.waiting` is an `Enrolment`."""

    def look(self, job: Job[Any], rescue: Rescue) -> Found:
        """Look at a disk; nothing is written."""

    def recover(self, job: Job[Any], found: Found) -> Outcome:
        """Do what was found to be needed, if that is still so."""


class Flow(installer.Flow):
    """The installer, with a way back in from its first page."""

    more = (Button("recover", "Recover a machine that no longer opens"),)
    waits = (*installer.Flow.waits, "approving")
    world: World

    def __init__(
        self, world: World, choices: Choices | None = None,
        start: Callable[[Job[Any]], None] = lambda job: job.start(),
    ) -> None:  # fmt: skip
        self.rescue = Rescue()
        self.machines: tuple[DiskView, ...] = ()
        self.found: Found | None = None
        self._way = ""
        super().__init__(world, choices, start)

    def _act_welcome(self, action: str, values: Mapping[str, str]) -> None:
        if action == "recover":
            self._to_ways()
        else:
            super()._act_welcome(action, values)

    def _page_of(self, job: Job[Any]) -> str:
        return "approving" if isinstance(job.waiting, Approving) else super()._page_of(job)

    def _carries(self) -> Mapping[str, Carry]:
        save, take = self.world.save_event_log, self.world.take_approvals
        return {
            **super()._carries(),
            "log": Carry("Save the event log on which stick?", "Saving the event log", save),
            "approvals": Carry("On which stick is approvals.json?", "Taking the approvals", take),
        }

    def _failed(self, error: BaseException) -> None:
        """Go back to the first page, with why and what to do."""
        self._to_ways("; ".join(filter(None, reason(error))))

    # --- 1. Which way

    def _to_ways(self, problem: str = "") -> None:
        self.words, self.at, self.problem = RECOVERY, "ways", problem

    def _page_ways(self) -> Page:
        reseal = ("as `mosinit recover --reseal`: takes an approval of your organisation, and no key", "")
        key = (
            "as `mosinit recover --key FILE`: takes the recovery key, which your organisation has;",
            "a new or cleared TPM (`--dir STATE`) is provisioned and enrolled first",
        )
        items = (
            Text("The way back into a machine that no longer opens its disk.", "strong"),
            Text("What happened to it? Nothing is written before you have seen what."),
            Text(""), *self._problem(),
            Choice("reseal", "Firmware or its keys changed", details=reseal),
            Choice("key", "TPM is new, or the disk is damaged", details=key),
            Text(""), Button("network", "Network"), Button("back", "Back"),
        )  # fmt: skip
        return Page("ways", TITLE, items)

    def _act_ways(self, action: str, values: Mapping[str, str]) -> None:
        if action == "network":
            self._to_network("ways")
        elif action in ("reseal", "key"):
            self._way = action
            work = "Looking for this machine's disk"
            self._work(work, lambda job: self.world.machines(job), self._with_machines, "ways")
        else:
            self.rescue, self.words, self.at = Rescue(), INSTALLATION, "welcome"

    # --- 2. Which disk

    def _with_machines(self, machines: Sequence[DiskView]) -> None:
        self.machines = tuple(machines)
        if not machines:
            self._to_ways("no disk here has a machine's partitions: look at cables and controllers")
        elif len(machines) == 1:
            self._with_disk(machines[0].path)
        else:
            self.at = "machines"

    def _page_machines(self) -> Page:
        rows: list[Item] = [
            Choice(f"disk:{disk.path}", disk.line, "", disk.details) for disk in self.machines
        ]
        head = Text("Which disk is the machine's?", "strong")
        items = (head, Text(""), *rows, Text(""), Button("back", "Back"))
        return Page("machines", TITLE, items)

    def _act_machines(self, action: str, values: Mapping[str, str]) -> None:
        if action.startswith("disk:"):
            self._with_disk(Path(action.removeprefix("disk:")))
        else:
            self.at = "ways"

    def _with_disk(self, disk: Path) -> None:
        self.rescue = replace(self.rescue, disk=disk)
        if self._way == "reseal":
            self._begin("reseal", lambda job: self.world.reseal(job, disk), self._end_of_recovery)
        else:
            self.at = "key"

    # --- 3. Firmware changed: approvals

    def _page_approving(self) -> Page:
        waiting = self.installing.waiting if self.installing else None
        if not isinstance(waiting, Approving):  # they came since somebody looked
            return self._page_progress()
        items: list[Item] = [
            Text(waiting.disk, "strong"),
            *(Text(line) for line in waiting.found),
            Text("Its TPM opens it again once your organisation approves this state of the firmware."),
            Text(""), *(Text(way) for way in waiting.ways), Text(""),
        ]  # fmt: skip
        if waiting.wrong:
            items += [Text(f"The last approvals were not taken: {waiting.wrong}", "error"), Text("")]
        items += self._problem()
        items += [
            Button("log", "Save the event log on a USB stick"),
            Button("approvals", "Take approvals from a USB stick"),
            Text(""),
            Text("As soon as they are here they are laid into the disk's header: nothing else is written."),
        ]
        return Page("approving", "Recovery: approval", tuple(items))

    def _act_approving(self, action: str, values: Mapping[str, str]) -> None:
        if action in self._carries():
            self._to_sticks(action, "approving")
        else:
            self.at = "stop"

    # --- 4. The recovery key, and a new TPM

    def _page_key(self) -> Page:
        rescue = self.rescue
        items = (
            Text(f"The recovery key of {rescue.disk}: your organisation has it.", "strong"),
            Text("(`mosinit enroll --open-recovery`)"), Text(""), *self._problem(),
            Field("key", "Recovery key", rescue.key, secret=True),
            Field("other", "Another one ", rescue.other, secret=True),
            Text("  Another one is needed only after a recovery that was broken off."),
            Field("source", "Release     ", rescue.source),
            Text("  Only if the store is damaged: docker://HOST/NAME:TAG; empty, this medium's."), Text(""),
            Button("look", "Look at the disk: the TPM is as it was"),
            Button("enrol", "The TPM is new or was cleared: provision it, then look"),
            Button("back", "Back"),
        )  # fmt: skip
        return Page("key", "Recovery: key", items, focus="key")

    def _act_key(self, action: str, values: Mapping[str, str]) -> None:
        if action == "back":
            self.at = "ways"
            return
        key, other, source = (values.get(name, "") for name in ("key", "other", "source"))
        self.rescue = replace(self.rescue, key=key, other=other, source=source, renewed=action == "enrol")
        try:
            typed = self.rescue.keys()
        except Failure as failure:
            self.problem = str(failure)
            return
        if not key or not typed:
            self.problem = "no recovery key was typed: nothing was done"
        elif action == "enrol":
            self._begin("provision", lambda job: self.world.provision(job), self._end_of_provisioning)
        else:
            self._look()

    def _end_of_provisioning(self, job: Job[Any]) -> None:
        if job.error:
            self._failed(job.error)
        else:
            self._look()

    # --- 5. What was found, and consent

    def _look(self) -> None:
        rescue = self.rescue

        def then(found: Found) -> None:
            self.found, self.at = found, "found"

        work = "Looking at the disk: nothing is written"
        self._work(work, lambda job: self.world.look(job, rescue), then, "ways")

    def _page_found(self) -> Page:
        found = self.found
        assert found
        items: list[Item] = [Text(found.disk, "strong")]
        for head, lines, none in (
            ("Found:", found.found, "nothing is wrong with it"),
            ("Will be done:", found.will, "nothing but to read it back, and a boot entry"),
            ("Left, what this cannot do:", found.left, ""),
        ):
            if shown := lines or ((none,) if none else ()):
                items += [Text(head, "strong"), *(Text(f"  {line}") for line in shown)]
        items += [Text(""), *self._problem()]
        label = f"Do this to {self.rescue.disk}"
        if found.lost:
            words = f"{found.lost}. To consent that this is made anew, type: {ANEW_WORD}"
            items += [Text(words, "warning"), Field("word", "Word")]
            label = f"Make anew what is lost, and do the rest of this to {self.rescue.disk}"
        items += [Button("act", label), Button("back", "Back")]
        keys = "Arrows, PgUp, PgDn: read   Tab: move   Enter: choose   Esc: back"
        return Page("found", "Recovery: what was found, and what will be done", tuple(items), keys=keys)

    def _act_found(self, action: str, values: Mapping[str, str]) -> None:
        found = self.found
        assert found
        if action != "act":
            self.at = "ways"
        elif found.lost and values.get("word", "") != ANEW_WORD:
            self.problem = f"the word {ANEW_WORD} was not typed: nothing was written"
        else:
            self._begin("recover", lambda job: self.world.recover(job, found), self._end_of_recovery)

    # --- 6. Done

    def _end_of_recovery(self, job: Job[Any]) -> None:
        if job.error:
            self._failed(job.error)
        else:
            self.outcome, self.rescue, self.at = job.result(), Rescue(), "recovered"

    def _page_recovered(self) -> Page:
        assert self.outcome
        items = (
            *(Text(line) for line in self.outcome.lines), Text(""), *self._problem(),
            Button("ways", "Back to the ways of recovery"), Button("back", "Leave"),
            Button("restart", "Restart now"),
        )  # fmt: skip
        return Page("recovered", TITLE, items, keys="Enter: choose   Esc: leave", focus="back")

    def _act_recovered(self, action: str, values: Mapping[str, str]) -> None:
        if action == "ways":
            self.outcome = None
            self._to_ways()
        elif action == "restart":
            self._act_done(action, values)
        else:
            self._leave(self._status())

    def _status(self) -> int:
        """Return the exit status that the verb has."""
        status = self.outcome.data.get("status", DONE) if self.outcome and self.outcome.data else DONE
        return status if isinstance(status, int) else DONE
