"""The interactive installer, page by page: source, disk, plan, consent, enrolment, progress, what is next.

A state machine over plain data: it knows neither the terminal (`screens` draws its pages) nor the machine,
which it reaches through a `World` (`interactive` has the real one). Nothing is written before the person
typed the serial of the disk on the page that says what will be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mosinit import explain, init
from mosinit.host import Failure, printable
from mosinit.jobs import Job, Stopped, words_of
from mosinit.pages import Bar, Button, Choice, Field, Item, Page, Text

DONE, FAILED, INTERRUPTED = 0, 1, 130
SHOWN_LINES = 8  # of what the work said last
AGAIN = "Start the installation again: it finishes what it began. Other disks were not touched."
MEMBERS_WORD = "members"
LAST_STEP = 6


@dataclass(frozen=True)
class Wording:
    """What the pages call the work that writes."""

    enrolment: str
    progress: str
    doing: str
    stop: str
    after: str  # what is so once it was stopped


INSTALLATION = Wording(
    f"Enrolment (step 5 of {LAST_STEP})",
    f"Progress (step 6 of {LAST_STEP})",
    "The system is being installed.",
    "Stop the installation?",
    f"What is on the disk by then starts no machine. {AGAIN}",
)


class Carry(NamedTuple):
    """What a stick is wanted for: the question which one, what is shown meanwhile, and the work."""

    question: str
    doing: str
    do: Callable[[Job[Any], object], str]


@dataclass(frozen=True)
class Facts:
    """What the first page says of this machine. With a `problem` nothing can be installed here."""

    product: str
    release: str
    secure_boot: str
    tpm: str
    problem: str = ""


@dataclass(frozen=True)
class DiskView:
    """A disk as a person sees it: `rows` is what is on it, `unusable` why it cannot be chosen."""

    path: Path
    name: str
    model: str
    serial: str
    size: int
    transport: str
    rows: tuple[str, ...] = ()
    unusable: str = ""

    @property
    def line(self) -> str:
        """Its line in the list: what is longest comes last, where it may be cut off."""
        head = f"{self.name:<8} {gibibytes(self.size):>11}  {self.transport:<6}"
        return f"{head} {self.serial:<20.20}  {self.model or 'no model'}"

    @property
    def details(self) -> tuple[str, ...]:
        """What it is in full, and what is on it."""
        return (f"{self.model or 'no model'}, serial {self.serial}", *(self.rows or ("nothing is on it",)))


@dataclass(frozen=True)
class LinkView:
    """A network interface as a person sees it."""

    name: str
    words: str
    link: Any = None


@dataclass(frozen=True)
class Choices:
    """What the person chose so far; an empty `source` is the medium's release."""

    source: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    disk: Path | None = None
    state: int = 0


@dataclass(frozen=True)
class Planned:
    """A plan, as `install --plan` says it: which disk, what will be done, what will be lost. A person types
    `serial`, empty if there is nothing to lose; `members` is what of it is encrypted or may belong to other
    disks too, which takes a word more. `plan` is the plan itself.
    """

    disk: str
    lines: tuple[str, ...]
    lost: tuple[str, ...]
    serial: str
    members: str = ""
    plan: Any = None


@dataclass(frozen=True)
class Enrolment:
    """A request that waits for its answer: the ways there are, and what was wrong with the last answer."""

    serial: str
    ways: tuple[str, ...]
    wrong: str = ""


@dataclass(frozen=True)
class Outcome:
    """How an installation ended."""

    lines: tuple[str, ...]
    data: Any = None


class Changed(Failure):
    """The disk is not what the person saw."""


class World(Protocol):
    """What the installer can do. Each raises `Failure`, `Refused` or OSError."""

    def facts(self) -> Facts:
        """Say what this machine is."""

    def links(self, job: Job[Any]) -> Sequence[LinkView]:
        """List the network interfaces."""

    def use_dhcp(self, job: Job[Any], link: LinkView) -> str:
        """Have an interface configured by DHCP; say how it is then."""

    def use_static(self, job: Job[Any], link: LinkView, address: str, gateway: str, dns: str) -> str:
        """Configure an interface; say how it is then."""

    def look_at_source(self, job: Job[Any], choices: Choices) -> str:
        """Verify a release; say what it is."""

    def disks(self, job: Job[Any]) -> Sequence[DiskView]:
        """List the disks."""

    def plan(self, job: Job[Any], choices: Choices) -> Planned:
        """Plan the installation; nothing is written."""

    def check_unchanged(self, job: Job[Any], planned: Planned) -> None:
        """Look at the planned disk again. Raises `Changed`."""

    def install(self, job: Job[Any], choices: Choices, planned: Planned) -> Outcome:
        """Provision and install; while it waits for an answer `job.waiting` is an `Enrolment`."""

    def sticks(self, job: Job[Any]) -> Sequence[tuple[str, object]]:
        """List USB sticks: what to call them, and what they are."""

    def save_request(self, job: Job[Any], stick: object) -> str:
        """Save the request on a stick; say where."""

    def take_answer(self, job: Job[Any], stick: object) -> str:
        """Take the answer from a stick; say so."""

    def restart(self) -> None:
        """Restart the machine."""


def reason(error: BaseException) -> tuple[str, str]:
    """Return why something failed, and what to do, each in one line: no registry or disk writes others."""
    words, remedy = _reason(error)
    return printable(words), printable(remedy)


def _reason(error: BaseException) -> tuple[str, str]:
    if isinstance(error, init.Refused):
        refusal = explain.refusal(error)
        words = f"{refusal['failed']}: expected {refusal['expected']}, seen {refusal['seen']}"
        return words, refusal["remedy"]
    if isinstance(error, Stopped):
        return "stopped by you", ""
    if isinstance(error, Failure | OSError):
        return str(error), ""
    return f"{type(error).__name__}: {error}", "this is a fault of mosinit: please report it"


def gibibytes(size: int) -> str:
    """Write a disk's size."""
    return f"{size / (1 << 30):.1f} GiB"


class Flow:
    """Where the person is, and what was said and chosen so far."""

    more: tuple[Button, ...] = ()  # on the first page
    waits: tuple[str, ...] = ("progress", "enrolment")  # pages of work that writes

    def __init__(
        self, world: World, choices: Choices | None = None,
        start: Callable[[Job[Any]], None] = lambda job: job.start(),
    ) -> None:  # fmt: skip
        self.world, self.choices = world, choices or Choices()
        self._start = start
        self.facts = world.facts()
        self.at, self.over, self.status = "welcome", False, FAILED
        self.error: BaseException | None = None
        self.outcome: Outcome | None = None
        self.problem = self.note = self.release = ""
        self.job: Job[Any] | None = None
        self._then: Callable[[Any], None] = lambda result: None
        self._back = "welcome"
        self.installing: Job[Any] | None = None
        self._ended: Callable[[Job[Any]], None] = self._end_of_installation
        self.words = INSTALLATION
        self.disks: tuple[DiskView, ...] = ()
        self.links: tuple[LinkView, ...] = ()
        self.sticks: tuple[tuple[str, object], ...] = ()
        self._of_stick = self._from_sticks = ""
        self.link: LinkView | None = None
        self._from_network = "welcome"
        self.planned: Planned | None = None

    # --- What `screens` asks

    def page(self) -> Page:
        """Return what is to be seen now."""
        made: Page = getattr(self, f"_page_{self.at}")()
        return made

    def act(self, action: str, values: Mapping[str, str]) -> None:
        """Take what a person did."""
        if action == "interrupt":
            self._interrupt()
            return
        self.problem = self.note = ""
        getattr(self, f"_act_{self.at}")(action, {name: text.strip() for name, text in values.items()})

    def tick(self) -> None:
        """Go on where work has ended."""
        if (job := self.job) and job.ended:
            self.job = None
            self._end_of_work(job)
        if (job := self.installing) and job.ended:
            self.installing = None
            if self.job:
                self.job.stop()
                self.job = None
            self._ended(job)
        elif job and self.at in self.waits:
            self.at = self._page_of(job)

    def _page_of(self, job: Job[Any]) -> str:
        """Return the page of work that writes: what it waits for, or how far it is."""
        return "enrolment" if job.waiting else "progress"

    def close(self, seconds: float) -> None:
        """Stop what still runs, and give it a while to close what it opened."""
        for job in filter(None, (self.job, self.installing)):
            job.stop()
            job.join(seconds)

    # --- Work

    def _work(
        self, name: str, work: Callable[[Job[Any]], Any], then: Callable[[Any], None], back: str
    ) -> None:
        """Do something that takes a while; then go on, or back with what went wrong."""
        self.job, self._then, self._back, self.at = Job(name, work), then, back, "working"
        self._start(self.job)
        self.tick()

    def _end_of_work(self, job: Job[Any]) -> None:
        if job.error is None:
            self._then(job.result())
            return
        self.at = self._back
        if isinstance(job.error, Changed):
            self._to_disks(str(job.error))
        elif not isinstance(job.error, Stopped):
            self.problem = "; ".join(filter(None, reason(job.error)))

    def _begin(self, name: str, work: Callable[[Job[Any]], Any], ended: Callable[[Job[Any]], None]) -> None:
        """Begin work that writes, which shows what it says and is stopped only after a question."""
        self.installing, self._ended, self.at = Job(name, work), ended, "progress"
        self._start(self.installing)
        self.tick()

    def _leave(self, status: int) -> None:
        self.over, self.status = True, status

    def _interrupt(self) -> None:
        """Ctrl-C: leave where nothing is being written; there, ask first, and leave at the second time."""
        if self.installing is None or self.installing.stopping:
            for job in filter(None, (self.job, self.installing)):
                job.stop()
            self._leave(INTERRUPTED)
        elif self.at == "stop":
            self.installing.stop()
        else:
            self.at = "stop"

    def _page_working(self) -> Page:
        job = self.job
        items: list[Item] = [Text(f"{job.name if job else 'One moment'} ...")]
        if job and (progress := job.progress):
            items += [Text(""), Text(progress.label), Bar(progress.done, progress.total, words_of(progress))]
        if job and job.stopping:
            items += [Text(""), Text("Stopping ...")]
        return Page("working", "One moment", tuple(items), keys="Esc: stop this")

    def _act_working(self, action: str, values: Mapping[str, str]) -> None:
        if self.job:
            self.job.stop()

    # --- 1. Welcome

    def _page_welcome(self) -> Page:
        facts = self.facts
        items: list[Item] = [
            Text("This installs a verified system on a disk of this machine.", "strong"),
            Text(""),
            Text(f"Product      {facts.product}"),
            Text(f"On medium    {facts.release}"),
            Text(f"Secure Boot  {facts.secure_boot}"),
            Text(f"TPM          {facts.tpm}"),
            Text(""),
        ]
        if facts.problem:
            return Page("welcome", "Installation", (
                *items, Text(facts.problem, "error"), Text(""), Button("back", "Leave"),
            ), keys="Enter, Esc: leave")  # fmt: skip
        steps = (
            "You choose a release and a disk, and see what would be lost. Nothing is written before you",
            "typed that disk's serial. Then the machine asks your organisation to be enrolled, gets its",
            "system, reads it back, and is ready to restart. Every step can be left and begun again.",
        )
        items += [Text(" ".join(steps)), Text(""), *self._problem()]
        items += [
            Button("go", "Continue"),
            Button("network", "Network"),
            *self.more,
            Button("back", "Leave"),
        ]
        return Page(
            "welcome", "Installation", tuple(items), keys="Arrows, Tab: move   Enter: choose   Esc: leave"
        )

    def _act_welcome(self, action: str, values: Mapping[str, str]) -> None:
        if action == "back":
            self._leave(FAILED)
        elif action == "network":
            self._to_network("welcome")
        else:
            self.at = "source"

    def _problem(self) -> list[Item]:
        found: list[Item] = [Text(self.problem, "error"), Text("")] if self.problem else []
        return found + ([Text(self.note, "good"), Text("")] if self.note else [])

    # --- 2. Network

    def _to_network(self, back: str) -> None:
        self._from_network = back

        def then(links: Sequence[LinkView]) -> None:
            self.links, self.at = tuple(links), "network"

        self._work("Looking at the network", lambda job: self.world.links(job), then, back)

    def _page_network(self) -> Page:
        rows: list[Item] = [
            Choice(f"link:{place}", f"{link.name:<12} {link.words}") for place, link in enumerate(self.links)
        ]
        items = [
            Text("Choose an interface to change how it gets its address.", "strong"), Text(""),
            *self._problem(),
            *(rows or [Text("there is no network interface: look at card and cable", "warning")]),
            Text(""), Button("again", "Look again"), Button("go", "Continue"),
        ]  # fmt: skip
        return Page("network", "Network", tuple(items))

    def _act_network(self, action: str, values: Mapping[str, str]) -> None:
        if action.startswith("link:"):
            self.link, self.at = self.links[int(action.partition(":")[2])], "link"
        elif action == "again":
            self._to_network(self._from_network)
        else:
            self.at = self._from_network

    def _page_link(self) -> Page:
        assert self.link
        items = [
            Text(f"{self.link.name}: {self.link.words}", "strong"), Text(""), *self._problem(),
            Button("dhcp", "Get everything by DHCP"), Text(""),
            Text("Or type it in:"),
            Field("address", "Address/prefix (10.0.0.5/24)"),
            Field("gateway", "Gateway                     "),
            Field("dns", "DNS server                  "),
            Button("static", "Use these"), Text(""), Button("back", "Back"),
        ]  # fmt: skip
        return Page("link", "Network", tuple(items), focus="dhcp")

    def _act_link(self, action: str, values: Mapping[str, str]) -> None:
        link = self.link
        assert link

        def then(words: str) -> None:
            self._to_network(self._from_network)
            self.note = words

        if action == "dhcp":
            self._work("Asking for an address", lambda job: self.world.use_dhcp(job, link), then, "link")
        elif action == "static":
            given = (values.get("address", ""), values.get("gateway", ""), values.get("dns", ""))
            self._work(
                "Setting the address", lambda job: self.world.use_static(job, link, *given), then, "link"
            )
        else:
            self.at = "network"

    # --- 3. Source

    def _page_source(self) -> Page:
        items = [
            Text("Where does the release come from?", "strong"), Text(""), *self._problem(),
            Choice("medium", f"This medium: {self.facts.release}"),
            Choice("registry", ": ".join(filter(None, ("A registry, over TLS", self.choices.source)))),
            Text(""), Button("back", "Back"),
        ]  # fmt: skip
        focus = "registry" if self.choices.source else "medium"
        return Page("source", f"Source (step 1 of {LAST_STEP})", tuple(items), focus=focus)

    def _act_source(self, action: str, values: Mapping[str, str]) -> None:
        if action == "medium":
            self._look_at_source(replace(self.choices, source="", user="", password=""), "source")
        else:
            self.at = "registry" if action == "registry" else "welcome"

    def _page_registry(self) -> Page:
        items = [
            Text("Type the release as docker://HOST[:PORT]/NAME:TAG", "strong"), Text(""), *self._problem(),
            Field("source", "Release ", self.choices.source or "docker://"),
            Field("user", "User    ", self.choices.user),
            Field("password", "Password", self.choices.password, secret=True),
            Text("  User and password stay empty where the registry asks for none."),
            Text(""),
            Button("verify", "Verify and continue"), Button("network", "Network"), Button("back", "Back"),
        ]  # fmt: skip
        return Page("registry", f"Source: registry (step 1 of {LAST_STEP})", tuple(items), focus="source")

    def _act_registry(self, action: str, values: Mapping[str, str]) -> None:
        if action == "back":
            self.at = "source"
            return
        source, user, password = (values.get(name, "") for name in ("source", "user", "password"))
        self.choices = replace(self.choices, source=source, user=user, password=password)
        if action == "network":
            self._to_network("registry")
        elif bool(user) != bool(password):
            self.problem = "a login is a user and a password: type both, or none"
        else:
            self._look_at_source(self.choices, "registry")

    def _look_at_source(self, choices: Choices, back: str) -> None:
        def then(words: str) -> None:
            self.choices, self.release = choices, words
            self._to_disks()

        work = "Verifying the release"
        self._work(work, lambda job: self.world.look_at_source(job, choices), then, back)

    # --- 4. Disk

    def _to_disks(self, problem: str = "") -> None:
        def then(disks: Sequence[DiskView]) -> None:
            self.disks, self.at, self.problem = tuple(disks), "disks", problem

        self._work("Looking at the disks", lambda job: self.world.disks(job), then, "source")

    def _page_disks(self) -> Page:
        rows: list[Item] = [
            Choice(f"disk:{disk.path}", disk.line, disk.unusable, disk.details) for disk in self.disks
        ]
        items = [
            Text(f"Release: {self.release}"), Text(""), *self._problem(),
            Text("Choose the disk: all of it becomes this machine's. Below is what is on it now.", "strong"),
            *(rows or [Text("there is no disk: look at cables and controllers", "warning")]),
            Text(""), Button("again", "Look again"), Button("back", "Back"),
        ]  # fmt: skip
        focus = f"disk:{self.choices.disk}" if self.choices.disk else ""
        return Page("disks", f"Disk (step 2 of {LAST_STEP})", tuple(items), focus=focus)

    def _act_disks(self, action: str, values: Mapping[str, str]) -> None:
        if action.startswith("disk:"):
            self.choices = replace(self.choices, disk=Path(action.removeprefix("disk:")))
            self._make_plan("disks")
        elif action == "again":
            self._to_disks()
        else:
            self.at = "source"

    # --- 5. Sizes

    def _page_sizes(self) -> Page:
        items = [
            Text("A volume can keep /var over restarts; without one, /var is new at each boot.", "strong"),
            Text("Where the release demands one it has the demanded size, also if nothing is typed here."),
            Text(""), *self._problem(),
            Field("state", "MiB of a volume for /var", str(self.choices.state or "")),
            Text(""), Button("use", "Plan with this"), Button("back", "Back"),
        ]  # fmt: skip
        return Page("sizes", f"Sizes (step 3 of {LAST_STEP})", tuple(items), focus="state")

    def _act_sizes(self, action: str, values: Mapping[str, str]) -> None:
        if action == "back":
            self.at = "plan"
            return
        text = values.get("state", "")
        if text and not (text.isascii() and text.isdigit() and len(text) <= 9):
            self.problem = f"{text[:40]!r} is no number of MiB: type digits alone, or nothing"
            return
        self.choices = replace(self.choices, state=int(text or 0))
        self._make_plan("sizes")

    # --- 6. Plan and consent

    def _make_plan(self, back: str) -> None:
        choices = self.choices

        def then(planned: Planned) -> None:
            self.planned, self.at = planned, "plan"

        self._work("Planning: nothing is written", lambda job: self.world.plan(job, choices), then, back)

    def _page_plan(self) -> Page:
        planned = self.planned
        assert planned
        items: list[Item] = [Text(planned.disk, "strong")]
        if planned.lost:
            items += [
                Text("ALL OF THIS WILL BE LOST:", "warning"), *(Text(f"  {row}") for row in planned.lost)
            ]  # fmt: skip
        else:
            items.append(Text("It holds nothing that could be lost.", "good"))
        items.append(Text(""))
        if planned.serial:
            items.append(Text(f"To consent, type the serial of this disk: {planned.serial}", "strong"))
            items.append(Field("serial", "Serial"))
        if planned.members:
            words = f"Encrypted, or of a set of disks: {planned.members}. To lose it, type: {MEMBERS_WORD}"
            items += [Text(words, "warning"), Field("members", "Word  ")]
        items += self._problem()
        label = "Erase this disk and install" if planned.lost else "Install"
        items += [Button("install", label), Button("sizes", "Sizes"), Button("back", "Another disk")]
        items += [Text(""), Text("What will be done, in this order:", "strong")]
        items += [Text(line) for line in planned.lines]
        keys = "Arrows, PgUp, PgDn: read   Tab: move   Enter: choose   Esc: back"
        return Page("plan", f"Plan and consent (step 4 of {LAST_STEP})", tuple(items), keys=keys)

    def _act_plan(self, action: str, values: Mapping[str, str]) -> None:
        planned = self.planned
        assert planned
        if action == "sizes":
            self.at = "sizes"
        elif action != "install":
            self._to_disks()
        elif planned.serial and values.get("serial", "") != planned.serial:
            typed = values.get("serial", "")
            what = f"{typed[:60]!r} is not the serial of this disk" if typed else "no serial was typed"
            self.problem = f"{what}: nothing was written. Its serial is {planned.serial}"
        elif planned.members and values.get("members", "") != MEMBERS_WORD:
            self.problem = f"the word {MEMBERS_WORD} was not typed: nothing was written"
        else:
            self._consented(planned)

    def _consented(self, planned: Planned) -> None:
        def then(_: None) -> None:
            choices = self.choices
            self._begin(
                "install",
                lambda job: self.world.install(job, choices, planned),
                self._end_of_installation,
            )

        work = "Looking at the disk again"
        self._work(work, lambda job: self.world.check_unchanged(job, planned), then, "plan")

    # --- 7. Enrolment

    def _page_enrolment(self) -> Page:
        waiting = self.installing.waiting if self.installing else None
        if not isinstance(waiting, Enrolment):  # the answer came since somebody looked
            return self._page_progress()
        items: list[Item] = [
            Text("This machine waits to be enrolled by your organisation.", "strong"),
            Text(f"Its identity is {waiting.serial}: compare it with what `mosinit enroll` says."),
            Text(""), *(Text(way) for way in waiting.ways), Text(""),
        ]  # fmt: skip
        if waiting.wrong:
            items += [Text(f"The last answer was not taken: {waiting.wrong}", "error"), Text("")]
        items += self._problem()
        items += [
            Button("save", "Save the request on a USB stick"),
            Button("take", "Take the answer from a USB stick"),
            Text(""),
            Text("It goes on by itself as soon as the answer is here."),
        ]
        return Page("enrolment", self.words.enrolment, tuple(items))

    def _act_enrolment(self, action: str, values: Mapping[str, str]) -> None:
        if action in self._carries():
            self._to_sticks(action, "enrolment")
        else:
            self.at = "stop"

    def _carries(self) -> Mapping[str, Carry]:
        """Return what sticks are wanted for, by action."""
        save, take = self.world.save_request, self.world.take_answer
        return {
            "save": Carry("Save the request on which stick?", "Saving the request", save),
            "take": Carry("On which stick is answer.json?", "Taking the answer", take),
        }

    def _to_sticks(self, action: str, back: str) -> None:
        self._of_stick, self._from_sticks = action, back

        def then(sticks: Sequence[tuple[str, object]]) -> None:
            self.sticks, self.at = tuple(sticks), "sticks"

        self._work("Looking for USB sticks", lambda job: self.world.sticks(job), then, back)

    def _page_sticks(self) -> Page:
        head = self._carries()[self._of_stick].question
        rows: list[Item] = [Choice(f"stick:{place}", words) for place, (words, _) in enumerate(self.sticks)]
        none = Text("there is no USB stick with a FAT file system: plug one in, look again", "warning")
        items = (
            Text(head, "strong"), Text(""), *(rows or [none]), Text(""),
            Button("again", "Look again"), Button("back", "Back"),
        )  # fmt: skip
        return Page("sticks", self.words.enrolment, items)

    def _act_sticks(self, action: str, values: Mapping[str, str]) -> None:
        back = self._from_sticks
        if not action.startswith("stick:"):
            self.at = back
            if action == "again":
                self._to_sticks(self._of_stick, back)
            return
        _, stick = self.sticks[int(action.partition(":")[2])]

        def then(words: str) -> None:
            self.note, self.at = words, back

        carry = self._carries()[self._of_stick]
        self._work(carry.doing, lambda job: carry.do(job, stick), then, back)

    # --- 8. Progress

    def _page_progress(self) -> Page:
        job = self.installing
        items: list[Item] = [Text(self.words.doing, "strong"), Text("")]
        if job and (progress := job.progress):
            items += [Text(progress.label), Bar(progress.done, progress.total, words_of(progress)), Text("")]
        lines = job.lines[-SHOWN_LINES:] if job else ()
        items += [
            Text(f"{'* ' if place == len(lines) else '  '}{line}") for place, line in enumerate(lines, 1)
        ]
        if job and job.stopping:
            items += [Text(""), Text("Stopping at the end of this step; Ctrl-C: leave at once", "warning")]
        keys = "Esc: stop   Ctrl-L: draw anew"
        return Page("progress", self.words.progress, tuple(items), keys=keys)

    def _act_progress(self, action: str, values: Mapping[str, str]) -> None:
        if self.installing and not self.installing.stopping:
            self.at = "stop"

    def _page_stop(self) -> Page:
        items = (
            Text(self.words.stop, "strong"),
            Text(self.words.after),
            Text(""), Button("on", "Go on"), Button("stop", "Stop"),
        )  # fmt: skip
        return Page("stop", "Stop?", items, focus="on")

    def _act_stop(self, action: str, values: Mapping[str, str]) -> None:
        self.at = "progress"
        if action == "stop" and self.installing:
            self.installing.stop()
        self.tick()

    def _end_of_installation(self, job: Job[Any]) -> None:
        self.error = job.error
        if isinstance(job.error, Changed):
            self.error = None
            self._to_disks(str(job.error))
        elif job.error:
            self.at = "failed"
        else:
            self.outcome, self.at = job.result(), "done"

    def _page_failed(self) -> Page:
        assert self.error
        words, remedy = reason(self.error)
        items: list[Item] = [
            Text("This machine is not installed.", "error"),
            Text(""),
            Text(words),
            Text(""),
        ]
        if remedy:
            items += [Text(f"What to do: {remedy}"), Text("")]
        items += [
            Text(AGAIN),
            Text(""),
            Button("again", "Begin again at the disks"),
            Button("back", "Leave"),
        ]
        return Page("failed", "Not installed", tuple(items), keys="Enter: choose   Esc: leave")

    def _act_failed(self, action: str, values: Mapping[str, str]) -> None:
        if action == "again":
            self.error = None
            self._to_disks()
        else:
            self._leave(INTERRUPTED if isinstance(self.error, Stopped) else FAILED)

    # --- 9. Done

    def _page_done(self) -> Page:
        assert self.outcome
        items = (
            Text("This machine is installed.", "good"), Text(""),
            *(Text(line) for line in self.outcome.lines), Text(""),
            Text("Remove the medium, then restart: the machine starts from its disk.", "strong"), Text(""),
            *self._problem(),
            Button("back", "Leave"), Button("restart", "Restart now"),
        )  # fmt: skip
        return Page("done", "Installed", items, keys="Enter: choose   Esc: leave")

    def _act_done(self, action: str, values: Mapping[str, str]) -> None:
        if action == "restart":
            try:
                self.world.restart()
            except (Failure, OSError) as error:
                self.problem = str(error)
                return
        self._leave(DONE)
