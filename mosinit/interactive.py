"""The interactive installer on a live machine: pages of `installer` and `recovery`, and behind them what the
verbs do.

Plan and act are `install`'s, `recover`'s and `resealing`'s, request and answer `provision`'s, what carries
them `enrolment`'s: nothing is decided here a second time. What writes runs in a thread of its own, which
alone holds the lock and the mounts; the screen goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mosinit import (
    damage,
    enrolment,
    explain,
    init,
    install,
    installed,
    installer,
    layout,
    machinedisk,
    network,
    provision,
    recover,
    recovery,
    releases,
    resealing,
    unattended,
)
from mosinit.host import Failure, Host, printable
from mosinit.install import Installer
from mosinit.installer import Choices, DiskView, Enrolment, Facts, Flow, LinkView, Outcome, Planned
from mosinit.jobs import Job, Stopped
from mosinit.recovery import Approving, Found, Rescue
from mosinit.sources import open_source
from mosinit.tpm import DEVICE, open_tpm

if TYPE_CHECKING:
    from mosinit.registry import Access

ONLINE_SECONDS = 30
POLL_SECONDS = 0.5
LEAVE_SECONDS = 20.0  # for the work to close what it opened
Made: TypeAlias = tuple[layout.Plan, releases.Release, init.Policy]


class Shown(install.Installer):
    """An installation's seam whose messages and progress go to a job instead of the terminal."""

    def __init__(self, job: Job[Any]) -> None:
        super().__init__()
        self._job = job

    def say(self, text: str) -> None:
        """Tell a line."""
        self._job.say(printable(text))

    def sleep(self, seconds: float) -> None:
        """Wait, but not for who wants to stop."""
        self._job.sleep(seconds)

    @contextlib.contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Measure a step."""
        with self._job.measure(label, total) as advance:
            yield advance


class ShownRecoverer(Shown, damage.Recoverer):
    """The same of a recovery."""


@dataclass(frozen=True)
class Given:
    """What the command line says already, and where things are: tests have them elsewhere."""

    source: str = ""
    state: Path = enrolment.STATE
    tls_ca: Path | None = None
    login: Path | None = None
    timeout: float = 120.0
    token_hosts: tuple[str, ...] = ()
    left: Path = install.LEFT
    loader: Path = install.BOOT_LOADER
    tcti: str = DEVICE
    event_log: Path = provision.EVENT_LOG
    port: Path = unattended.PORT
    medium: str = install.MEDIUM_RELEASE
    approvals: Path = enrolment.Reseal().approvals
    shown: Callable[[Job[Any]], install.Installer] = Shown
    recovering: Callable[[Job[Any]], damage.Recoverer] = ShownRecoverer

    @property
    def reseal(self) -> enrolment.Reseal:
        """Return where approvals wait to be laid."""
        return enrolment.Reseal(self.approvals, self.left, self.event_log)


def run(host: Host, given: Given) -> dict[str, object]:
    """Lead a person through an installation or a recovery; return what was done. Raises what failed."""
    from mosinit import screens  # with urwid, which nothing else needs

    if os.geteuid() != 0:
        raise Failure("installing needs root: run it as root")
    # What is mounted from here ends with this process, sticks included.
    host.unshare_mounts()
    flow = recovery.Flow(Live(host, given), Choices(source=given.source))
    try:
        screens.run(flow)
    finally:
        flow.close(LEAVE_SECONDS)
    return ending(flow)


def ending(flow: Flow) -> dict[str, object]:
    """Return what was done, or raise why nothing was."""
    if flow.error and not isinstance(flow.error, Stopped):
        raise flow.error
    if flow.status == installer.INTERRUPTED:
        raise KeyboardInterrupt
    if flow.outcome is None:
        raise Failure("left before anything was installed: start it again when you like")
    data: dict[str, object] = flow.outcome.data
    return {**data, "next": data.get("next", "remove the medium and restart")}


@dataclass(frozen=True)
class Decided:
    """What a person decides on: a disk as it was seen, and what is done with it. Without `made` an
    installation that was broken off is finished.
    """

    disk: layout.Disk
    options: install.Options
    made: Made | None = None


# --- The machine -------------------------------------------------------------------------------------------


class Live:
    """What the pages can do on a live machine."""

    def __init__(self, host: Host, given: Given) -> None:
        self._host, self._given = host, given
        self._resealed = ""  # the serial of the machine that waits for approvals

    def facts(self) -> Facts:
        """Say what this machine is, from what the bring-up left and the TPM says."""
        try:
            policy = install.policy_of_live(self._given.left)
            report = installed.running(installed.Paths(self._given.left)).report
        except (Failure, init.Refused) as error:
            return Facts("unknown", "unknown", "unknown", self._tpm(), str(error))
        return Facts(
            policy.product,
            f"sequence {report.get('sequence')}, epoch {report.get('epoch')}",
            secure_boot(report),
            self._tpm(),
        )

    def _tpm(self) -> str:
        try:
            with open_tpm(self._given.tcti) as machine:
                flags, _ = machine.flags()
        except (Failure, init.Refused, OSError) as error:
            return f"cannot be used: {error}"
        if (self._given.state / "seal.json").exists():
            return "2.0, provisioned for this installation"
        if flags & provision.PASSWORDS:
            return "2.0, provisioned before: to be cleared in the firmware's setup, or with consent"
        return "2.0, ready to be provisioned"

    # --- Network

    def links(self, job: Job[Any]) -> Sequence[LinkView]:
        """List the network interfaces."""
        return [LinkView(link.name, words_of(link), link) for link in network.links(self._given.shown(job))]

    def use_dhcp(self, job: Job[Any], link: LinkView) -> str:
        """Have an interface configured by DHCP; say how it is then."""
        host = self._given.shown(job)
        network.use_dhcp(host, link.link)
        return self._online(host, link.name)

    def use_static(self, job: Job[Any], link: LinkView, address: str, gateway: str, dns: str) -> str:
        """Configure an interface; say how it is then."""
        host = self._given.shown(job)
        network.use_static(host, link.link, address, gateway, dns)
        return self._online(host, link.name)

    def _online(self, host: Host, name: str) -> str:
        network.wait_online(host, ONLINE_SECONDS)
        now = next((link for link in network.links(host) if link.name == name), None)
        return f"{name}: {words_of(now)}" if now else f"{name} is gone"

    # --- Source

    def look_at_source(self, job: Job[Any], choices: Choices) -> str:
        """Verify a release; say what it is."""
        policy = install.policy_of_live(self._given.left)
        source = open_source(choices.source or self._given.medium, self._access(choices))
        return words_of_release(releases.verify(self._given.shown(job), source, policy), choices)

    def _access(self, choices: Choices) -> Access | None:
        """Return how a registry is reached, with the login that was typed or the one that was named."""
        if not choices.source:
            return None
        from mosinit import registry

        reference, given = registry.parse_reference(choices.source), self._given
        # What the command line says is for the registry that it names.
        named = registry.parse_reference(given.source).host if given.source.startswith("docker:") else ""
        own = not choices.user and named in ("", reference.host)
        access = registry.open_access(
            given.tls_ca, given.login if own else None, given.timeout, choices.source, [], given.token_hosts
        )
        if not choices.user:
            return access if own else replace(access, login=None)
        if ":" in choices.user or not (choices.user + choices.password).isprintable():
            raise Failure("this is no login: a user has no colon in it, and both are printable")
        words = f"{choices.user}:{choices.password}"
        return replace(access, login=registry.Login(reference.host, words))

    # --- Disk and plan

    def disks(self, job: Job[Any]) -> Sequence[DiskView]:
        """List the disks."""
        return [view(disk) for disk in layout.disks(self._given.shown(job))]

    def _options(self, choices: Choices, disk: layout.Disk) -> install.Options:
        """Return what is to be installed where. That a person consents is seen to by the pages: this is the
        consent to that disk as it was seen, and to no other.
        """
        given = self._given
        return install.Options(
            disk.path, given.state, source=choices.source or self._given.medium,
            consent=layout.Consent(disk.word, members=True), state=choices.state << 20, left=given.left,
            loader=given.loader, access=self._access(choices), tcti=given.tcti,
        )  # fmt: skip

    def plan(self, job: Job[Any], choices: Choices) -> Planned:
        """Plan the installation; nothing is written."""
        assert choices.disk
        host = self._given.shown(job)
        disk = layout.inspect(host, choices.disk)
        options = self._options(choices, disk)
        if broken := install.find_broken_off(host, disk, without_consent(options)):
            lines = tuple(f"{step.name}: {step.does}" for step in broken.steps)
            return Planned(name_of(disk), lines, (), "", plan=Decided(disk, options))
        made = install.plan(host, options)
        return planned(made, options)

    def check_unchanged(self, job: Job[Any], planned: Planned) -> None:
        """Look at the planned disk again."""
        before: layout.Disk = planned.plan.disk
        try:
            now = layout.inspect(self._given.shown(job), before.path)
            layout.check_consent(now, layout.Consent(before.word, members=True))
        except Failure as error:
            raise installer.Changed(str(error)) from error

    # --- Installing

    def install(self, job: Job[Any], choices: Choices, planned: Planned) -> Outcome:
        """Provision and install, as the plan says; or finish what was broken off."""
        host, decided = self._given.shown(job), planned.plan
        with install.alone(host):
            return outcome(self._install(host, job, planned, decided))

    def _install(
        self, host: Installer, job: Job[Any], planned: Planned, decided: Decided
    ) -> dict[str, object]:
        options, made = decided.options, decided.made
        if made is None:
            if done := install.resume(host, without_consent(options)):
                return done
            # The TPM was set back: all begins anew, where nothing can be lost that nobody was asked for.
            made = install.plan(host, without_consent(options))
        if not (options.provisioned / "seal.json").exists():
            self._enrol(host, job)
        self.check_unchanged(job, planned)
        layout_plan, release, policy = made
        provisioned = install.read_provisioned(options.provisioned, policy)
        closing = install.Closing(
            install.closing_of(options), lambda: provision.close(host, options.provisioned, options.tcti)
        )
        return install.act(host, layout_plan, release, policy, provisioned, options.loader, closing)

    def _enrol(self, host: Installer, job: Job[Any]) -> None:
        """Make a request, and wait for the answer to it: whichever way it comes."""
        given = self._given
        host.say("provisioning: identity, epoch and seal in the TPM")
        organisation = given.left / "organisation"
        provision.request(
            host, provision.Options(organisation, given.state, event_log=given.event_log, tcti=given.tcti)
        )
        if given.port.exists():
            threading.Thread(target=self._by_port, args=(host,), daemon=True).start()
        said = ways(_links(host), enrolment.ssh_fingerprint(), given.port)
        waiting = Enrolment(enrolment.serial(given.state), said)
        tried, job.waiting = (0, 0), waiting
        while True:
            if (now := stamp(given.state / enrolment.ANSWER.name)) != tried:
                tried = now
                try:
                    provision.take(host, given.state, given.state / enrolment.ANSWER.name, given.tcti)
                    break
                except (Failure, init.Refused, OSError) as error:
                    job.waiting = replace(waiting, wrong="; ".join(filter(None, installer.reason(error))))
            job.sleep(POLL_SECONDS)
        job.waiting = None

    def _by_port(self, host: Installer) -> None:
        """Ask whoever listens at a virtual machine's port; what comes is looked at like every answer."""
        with contextlib.suppress(Failure, init.Refused, OSError, Stopped):
            reply = unattended.exchange(self._given.port, enrolment.read_request(self._given.state))
            enrolment.put_answer(host, reply, str(self._given.port), self._given.state)

    # --- Recovering

    def machines(self, job: Job[Any]) -> Sequence[DiskView]:
        """List the disks that have a machine's partitions."""
        return [view(disk) for disk in machinedisk.machines(self._given.shown(job))]

    def reseal(self, job: Job[Any], disk: Path) -> Outcome:
        """Lay an approval of what PCR 7 is now, once there is one."""
        given, host = self._given, self._given.recovering(job)
        options = resealing.Options(disk, None, left=given.left, event_log=given.event_log)
        with install.alone(host):
            host.say("looking at the disk and at the TPM")
            seen = resealing.look(host, options)
            if not resealing.lacks_approval(seen):
                return resealed(resealing.nothing(seen))
            self._resealed = resealing.serial(seen)
            done = self._await_approvals(host, job, options, seen)
            given.approvals.unlink(missing_ok=True)
            return resealed(done)

    def _await_approvals(
        self, host: damage.Recoverer, job: Job[Any], options: resealing.Options, seen: resealing.Seen
    ) -> dict[str, object]:
        """Lay the approvals that come, whichever way they come, as soon as they are right."""
        path = self._given.approvals
        asked = resealing.nothing(seen) if seen.shut is None else resealing.describe(seen)
        told = (str(asked["next"]),) if seen.shut is None else lines_of(asked, "found")
        # What `mosinit explain` says of it: nobody should approve what they did not mean.
        changed = explain.compare_with_kept(host, self._given.event_log, host.machine())
        told += tuple(f"in PCR 7: {each.what}" for each in changed or ())
        said = ways_of_approvals(_links(host), enrolment.ssh_fingerprint(), self._resealed)
        waiting = Approving(name_of(seen.planned.disk), told, self._resealed, said)
        tried, job.waiting = (0, 0), waiting
        while True:
            if (now := stamp(path)) != tried:
                tried = now
                try:
                    done = resealing.reseal_disk(host, replace(options, approvals=path))
                    break
                except (Failure, init.Refused, OSError) as error:
                    job.waiting = replace(waiting, wrong="; ".join(filter(None, installer.reason(error))))
            job.sleep(POLL_SECONDS)
        job.waiting = None
        return done

    def provision(self, job: Job[Any]) -> None:
        """Provision the TPM of this machine, as far as that is not done."""
        host, state = self._given.recovering(job), self._given.state
        with install.alone(host):
            if not (state / "seal.json").exists():
                self._enrol(host, job)
            host.say("closing the TPM: passwords set, TPM2_Clear off")
            provision.close(host, state, self._given.tcti)

    def look(self, job: Job[Any], rescue: Rescue) -> Found:
        """Look at a disk; nothing is written."""
        given, host = self._given, self._given.recovering(job)
        options = damage.Options(
            rescue.disk, rescue.keys(), given.state if rescue.renewed else None,
            rescue.source or given.medium, left=given.left, loader=given.loader,
            access=self._access(Choices(source=rescue.source)),
        )  # fmt: skip
        with install.alone(host):
            return found(*self._look(host, options))

    def _look(self, host: damage.Recoverer, options: damage.Options) -> tuple[damage.Look, str]:
        """Look; if something is lost, say why, and look at what it would be to make that anew."""
        try:
            return damage.look(host, options), ""
        except init.Refused as refused:
            with contextlib.suppress(Failure, init.Refused, OSError):
                seen = damage.look(host, replace(options, anew=True))
                return seen, "; ".join(filter(None, installer.reason(refused)))
            raise

    def recover(self, job: Job[Any], found: Found) -> Outcome:
        """Do what was found to be needed, if that is still so."""
        host, before = self._given.recovering(job), found.plan
        with install.alone(host):
            host.say("looking at the disk again")
            now = damage.look(host, before.options)
            if (now.planned, damage.describe(now)) != (before.planned, damage.describe(before)):
                raise Failure(f"{found.disk} is not as it was shown: nothing was written; look again")
            return recovered(recover.act(host, now))

    def save_event_log(self, job: Job[Any], stick: object) -> str:
        """Save the firmware's event log on a stick; say where."""
        assert isinstance(stick, enrolment.Stick)
        given = self._given
        name = enrolment.save_event_log(given.shown(job), stick, self._resealed, given.event_log)
        return f"saved as {name}: the stick can be taken out"

    def take_approvals(self, job: Job[Any], stick: object) -> str:
        """Take approvals from a stick; say so."""
        assert isinstance(stick, enrolment.Stick)
        return f"{enrolment.take_approvals(self._given.shown(job), stick, self._given.reseal)} is taken"

    # --- By hand

    def sticks(self, job: Job[Any]) -> Sequence[tuple[str, object]]:
        """List USB sticks."""
        return [(stick.title, stick) for stick in enrolment.sticks(self._given.shown(job))]

    def save_request(self, job: Job[Any], stick: object) -> str:
        """Save the request on a stick; say where."""
        assert isinstance(stick, enrolment.Stick)
        name = enrolment.save_request(self._given.shown(job), stick, self._given.state)
        return f"saved as {name}: the stick can be taken out"

    def take_answer(self, job: Job[Any], stick: object) -> str:
        """Take the answer from a stick; say so."""
        assert isinstance(stick, enrolment.Stick)
        return f"{enrolment.take_answer(self._given.shown(job), stick, self._given.state)} is taken"

    def restart(self) -> None:
        """Restart the machine."""
        self._host.run(["systemctl", "reboot"], timeout=60)


# --- How things read ---------------------------------------------------------------------------------------


def secure_boot(report: Any) -> str:
    """Say what the bring-up saw of Secure Boot: it starts nothing without."""
    rows = [row for row in report.get("checks", []) if isinstance(row, dict) and row.get("id") == "SB-DB"]
    return "on, with this organisation's keys alone" if rows and rows[-1].get("ok") else "on"


def words_of(link: network.Link) -> str:
    """Say how an interface is."""
    if not link.carrier:
        return f"{link.mac}  no cable"
    addresses = ", ".join(link.addresses) or "no address"
    return f"{link.mac}  {addresses} ({link.how}){f' via {link.gateway}' if link.gateway else ''}"


def words_of_release(release: releases.Release, choices: Choices) -> str:
    """Say what a release is."""
    contents = release.manifest.contents
    origin = choices.source or "this medium"
    return f"sequence {contents.sequence}, epoch {contents.epoch}, {release.size >> 20} MiB, from {origin}"


def view(disk: layout.Disk) -> DiskView:
    """Return what a person sees of a disk."""
    rows = tuple(map(str, disk.rows)) or ((disk.content,) if disk.content else ())
    if disk.unfinished:
        rows = ("an installation that was broken off: it can be begun anew", *rows)
    return DiskView(
        disk.path, disk.name, disk.model, disk.serial, disk.size, disk.transport, rows, disk.unusable
    )


def name_of(disk: layout.Disk) -> str:
    """Say which disk it is."""
    return f"{disk.path}  {disk.model or 'no model'}  serial {disk.serial}  {disk.size / layout.GIB:.1f} GiB"


def planned(made: Made, options: install.Options) -> Planned:
    """Return what a person sees of a plan: what `install --plan` says. What is lost and the consent to that
    have places of their own.
    """
    plan, release, _ = made
    shown = install.describe(plan, release, install.closing_of(options))
    text = install.plan_text(shown).splitlines()
    lines = tuple(line for line in text if not line.startswith(("disk ", "lost ", "consent ")))
    disk = plan.disk
    keeps = bool(shown["erase"])
    lost = (tuple(map(str, disk.rows)) or (plan.lost,)) if keeps else ()
    members = "; ".join(map(str, disk.members)) if keeps else ""
    decided = Decided(disk, options, made)
    return Planned(name_of(disk), lines, lost, typed_serial(disk) if keeps else "", members, decided)


def typed_serial(disk: layout.Disk) -> str:
    """Return what a person types for a serial: any keyboard has these signs, whatever a device says."""
    return re.sub(r"[^!-~]+", "_", disk.serial)[:64]


def without_consent(options: install.Options) -> install.Options:
    """Return options by which an installation that was broken off is finished, and nothing is begun."""
    return replace(options, consent=layout.Consent())


def outcome(done: dict[str, object]) -> Outcome:
    """Say how an installation ended, in three lines."""
    entry = f"boot entry: {done['boot entry'] or 'none, the firmware took none'}"
    if "sequence" not in done:
        return Outcome((f"{done['disk']}: what was broken off is finished", entry), done)
    lines = (
        f"sequence {done['sequence']} on {done['disk']}, in {done['seconds']} s",
        f"generation {done['generation']}",
        entry,
    )
    return Outcome(lines, done)


def found(seen: damage.Look, lost: str) -> Found:
    """Return what a person sees of what `recover` found: what `recover --plan` says."""
    told = damage.describe(seen)
    will = tuple(dict.fromkeys(lines_of(told, "will do")))
    return Found(
        name_of(seen.planned.disk), lines_of(told, "found"), will, lines_of(told, "left"), lost, seen
    )


def lines_of(done: Mapping[str, object], name: str) -> tuple[str, ...]:
    """Return what a verb says under a name."""
    rows = done.get(name)
    return tuple(map(str, rows)) if isinstance(rows, list | tuple) else ()


def recovered(done: dict[str, object]) -> Outcome:
    """Say how a recovery ended."""
    did = [f"done: {line}" for line in dict.fromkeys(lines_of(done, "will do"))]
    left = [f"left: {line}" for line in lines_of(done, "left")]
    entry = f"boot entry: {done['boot entry'] or 'none, the firmware took none'}"
    head = f"{done['disk']}, serial {done['serial']}: read back as a boot does"
    return Outcome((head, *(did or ["nothing had to be done"]), *left, entry, str(done["next"])), done)


def resealed(done: dict[str, object]) -> Outcome:
    """Say how resealing ended."""
    did = [f"done: {line}" for line in lines_of(done, "will do")]
    return Outcome((f"{done['disk']}, serial {done['serial']}", *did, str(done["next"])), done)


def ways_of_approvals(links: Sequence[network.Link], fingerprint: str, number: str) -> tuple[str, ...]:
    """Say how the event log gets to the organisation from here, and approvals back."""
    approve = "  mosinit approve event-log --machine {} --keys DIR --out approvals.json"
    why = "(once you know why the firmware's state, PCR 7, changed)"
    if not fingerprint:
        return ("By a USB stick, with what is below, and where the keyset is:", approve.format(number), why)
    address = _address(links)
    return (
        "Over SSH, from where the keyset is:",
        f"  ssh root@{address} event-log > event-log",
        approve.format(number),
        f"  ssh root@{address} approvals < approvals.json",
        why,
        f"This machine's host key: {fingerprint}",
        "Or by a USB stick, with what is below.",
    )


def _address(links: Sequence[network.Link]) -> str:
    addresses = [address.partition("/")[0] for link in links for address in link.addresses]
    return addresses[0] if addresses else "ADDRESS (there is no network)"


def ways(links: Sequence[network.Link], fingerprint: str, port: Path) -> tuple[str, ...]:
    """Say how a request gets to the organisation from here; without a fingerprint nobody comes by SSH."""
    said: list[str] = []
    if fingerprint:
        address = _address(links)
        said += [
            "Over SSH, from where the keyset is:",
            f"  ssh root@{address} request > request.json",
            "  mosinit enroll request.json --keys DIR --out answer.json",
            f"  ssh root@{address} answer < answer.json",
            f"This machine's host key: {fingerprint}",
        ]
    if port.exists():
        said.append("By the virtual machine's port org.mosinit.exchange: the request went out there.")
    return (*said, "By a USB stick, with what is below.")


def _links(host: Host) -> tuple[network.Link, ...]:
    try:
        return network.links(host)
    except (Failure, OSError):
        return ()


def stamp(path: Path) -> tuple[int, int]:
    """Return what changes when a file is replaced; zeros if there is none."""
    try:
        seen = path.stat()
    except OSError:
        return 0, 0
    return seen.st_mtime_ns, seen.st_ino
