"""The `install` verb: on the booted live medium, a provisioned machine gets its disk.

1. Look: the release is verified by the bring-up's own functions, the disk is looked at, a plan made.
2. Act, on that disk alone: partitions, encrypted volumes, the release by digest, manifest.git, the tokens of
   the seal, the UKI.
3. Read all of it back as a boot would. Only then the TPM is closed, the disk is called a machine's, and the
   boot loader gets the name by which firmware finds it, in one rename: half a machine does not start.

Whatever fails before leaves a disk and a TPM that the same command takes again, and so does a power cut; one
that comes while the TPM is closed, or behind it, is mended by the same command too (`resume`). Of what may
have started nothing is lost without a word, whatever became of its TPM: the disk has its own id by then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hmac
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mosinit import (
    bootentry,
    esp,
    explain,
    generations,
    init,
    installed,
    layout,
    luks,
    publish,
    releases,
    state,
)
from mosinit.generations import Elsewhere
from mosinit.host import Broken, Failure, Host, printable
from mosinit.releases import Release
from mosinit.sources import open_source, read_checked

if TYPE_CHECKING:
    from mosinit.registry import Access

LEFT = Path(init.LEFT)
MEDIUM_RELEASE = f"oci:{init.STORE}/{init.REPOSITORY}"
# On the medium beside the release: signed by the uki key, sealed with the store.
BOOT_LOADER = Path(init.STORE, "boot/systemd-bootx64.efi")
OPENED = "mosinit-install-"  # how the devices are called that an installation opens
LOCK = Path("/run/mosinit-install.lock")
SUDI_FILES = ("sudi.key", "sudi.auth", "sudi.pem")
# Beside the images: what ext4 keeps for itself, and room for the next release to come.
STORE_MARGIN = 64 * init.MIB
EXT4 = ("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "metadata_csum,64bit")


@dataclass(frozen=True)
class Options:
    """What to install where. Sizes in bytes: `state` of the volume for /var, 0 for what the release demands;
    store and scratch, 0 for half and a quarter of the disk. `access` is how registries are reached.
    """

    disk: Path
    provisioned: Path
    source: str = MEDIUM_RELEASE
    consent: layout.Consent = layout.Consent()
    state: int = 0
    left: Path = LEFT
    loader: Path = BOOT_LOADER
    store: int = 0
    scratch: int = 0
    access: Access | None = None
    tcti: str = "device:/dev/tpmrm0"


@dataclass(frozen=True)
class Provisioned:
    """What `provision` left: the secrets of the disk, and what its header says for the TPM."""

    secret: bytes
    recovery: bytes
    tokens: init.Tokens
    sudi: tuple[tuple[str, bytes], ...]


class Installer(Host):
    """The package's seam, with what only an installation does to volumes."""

    def format_volume(self, path: Path, kind: str, uuid: str, key: bytes, recovery: bytes) -> None:
        """Make an encrypted volume that opens with its key, or with the recovery key."""
        luks.format_volume(self, path, kind, uuid, key)
        luks.add_recovery(self, path, key, recovery)

    @contextlib.contextmanager
    def opened(self, path: Path, kind: str, key: bytes, name: str) -> Iterator[Path]:
        """Open a volume as a boot does, and yield its device."""
        secret = bytearray(key)
        try:
            init.open_volume(self, luks.read_header(self, path, kind), str(path), secret, name)
        finally:
            init.wipe(secret)
        close = ["cryptsetup", "close", name]
        try:
            yield Path("/dev/mapper", name)
        except BaseException:
            # What went wrong is told, not what cannot be closed because of it.
            with contextlib.suppress(Failure):
                self.run(close, timeout=60)
            raise
        self.patiently(lambda: self.run(close, timeout=60))

    def check_layer(self, machine: init.Machine, name: str, layer: init.Layer, signature: str) -> None:
        """Have the kernel check a layer's signature, as a boot does."""
        verity = init.open_layer(machine, name, layer, signature)
        self.patiently(lambda: self.dm(init.DmCommand.DEV_REMOVE, verity.name))


# --- What the live system knows -------------------------------------------------------------------------


def policy_of_live(left: Path) -> init.Policy:
    """Return the policy of the machine to be: what this live system's signed initrd left of its own.

    Raises `Failure` on any other system.
    """
    policy = installed.running(installed.Paths(left)).policy
    if policy.mode != "live":
        raise Failure("this is an installed machine: boot the live medium to install")
    # Its UKI is another one, of which the release knows the id.
    return policy._replace(mode="run", uki_id="")


def read_provisioned(folder: Path, policy: init.Policy) -> Provisioned:
    """Return what `provision` left, if it is whole and of this organisation. Raises `Failure`, `Refused`."""
    from mosinit import exchange

    if not (folder / "seal.json").is_file():
        raise Failure(f"{folder} is of no provisioned machine: run `mosinit provision` to its end first")
    path = folder / "seal.json"
    sealed = exchange.parse_sealed(exchange.read_file(path, init.MIB), str(path))
    if sealed.product != policy.product:
        raise init.Refused("RECORD-PRODUCT", expected=policy.product, seen=sealed.product)
    secret, recovery = ((folder / name).read_bytes() for name in ("config.key", "recovery.key"))
    sudi = tuple((name, (folder / name).read_bytes()) for name in SUDI_FILES)
    provisioned = Provisioned(secret, recovery.strip(), sealed.tokens(), sudi)
    check_tokens(provisioned, policy)
    return provisioned


def check_tokens(provisioned: Provisioned, policy: init.Policy) -> None:
    """See that record, secret and epoch order are what a boot takes. Raises `Refused`."""
    tokens = provisioned.tokens
    record = init.verify_record(tokens.record, policy.organisation["sudi-ca.pem"], policy.product)
    secret = bytearray(provisioned.secret)
    try:
        init.check_secret(record, secret)
    finally:
        init.wipe(secret)
    order = (tokens.order_statement, tokens.order_signature, tokens.order_certificate)
    init.verify_epoch_order(*order, policy)


def check_epoch(provisioned: Provisioned, release: Release, policy: init.Policy) -> None:
    """Refuse a release of an epoch that this machine's TPM calls unsafe: it would never start."""
    tokens = provisioned.tokens
    order = (tokens.order_statement, tokens.order_signature, tokens.order_certificate)
    epoch, seen = init.verify_epoch_order(*order, policy), release.manifest.contents.epoch
    if seen < epoch:
        expected = f"a release of epoch {epoch} or later, which this machine was provisioned for"
        raise init.Refused("EPOCH", expected=expected, seen=f"epoch {seen}")


def check_approved(provisioned: Provisioned, release: Release, store: Elsewhere) -> None:
    """Refuse a UKI of a later epoch than this machine's firmware is approved for: it would open nothing."""
    epoch = releases.uki_epoch(releases.read_uki(store, release.uki))
    most = max(approval.epoch for approval in provisioned.tokens.approvals.values())
    if most < epoch:
        expected, seen = f"an approval of this firmware for epoch {epoch}", f"one up to epoch {most}"
        raise explain.advised(
            init.Refused("TPM-APPROVAL", expected=expected, seen=seen),
            f"install a release of epoch {most}; or raise the keyset's epoch (`mosinit keys epoch`), and "
            "provision the machine from a medium that was built after that",
        )


# --- The verb --------------------------------------------------------------------------------------------


def plan(host: Host, options: Options) -> tuple[layout.Plan, Release, init.Policy]:
    """Look at everything, change nothing. Raises `Failure`, `Refused`."""
    policy = policy_of_live(options.left)
    disk = layout.inspect(host, options.disk)
    layout.check_usable(host, disk, options.consent)
    planned = _lay_out(disk, options, options.state)
    release = releases.verify(host, open_source(options.source, options.access, host.say), policy)
    if (state := demanded_state(release.manifest.contents, options.state)) != options.state:
        planned = _lay_out(disk, options, state)
    store, needed = planned.named("machine-store").size, (release.size + STORE_MARGIN) * 10 // 9
    if needed > store:
        raise Failure(
            f"the release takes a store of {(needed >> 20) + 1} MiB, and that of {disk.path} has "
            f"{store >> 20} MiB: choose a larger one, or a larger disk"
        )
    return planned, release, policy._replace(uki_id=release.uki_id)


def _lay_out(disk: layout.Disk, options: Options, state: int) -> layout.Plan:
    return layout.make_plan(disk, state, store=options.store, scratch=options.scratch)


def demanded_state(contents: init.Contents, asked: int) -> int:
    """Return the size of the volume for /var, never less than a release demands. Raises `Failure`."""
    size = publish.state_bytes(contents)
    demanded = max(-(-size // init.MIB) * init.MIB, layout.SMALLEST_VOLUME) if size else 0
    if asked and asked < demanded:
        raise Failure(
            f"the release demands a state volume of {demanded >> 20} MiB, {asked >> 20} MiB were asked for: "
            "ask for more, or name no size"
        )
    return asked or demanded


@dataclass(frozen=True)
class Step:
    """One step of an installation: its name, by which it is carried out, and what it does."""

    name: str
    does: str


def steps(planned: layout.Plan, release: Release, closing: str = "") -> tuple[Step, ...]:
    """Return what an installation does, in this order: this is shown, and this is carried out.

    `closing` says what happens to the TPM; without it nothing does.
    """
    disk, blobs = planned.disk, len(release.blobs)
    told = {
        "machine-config": f"manifest.git with sequence {release.manifest.contents.sequence}, the machine's "
        "identity, what the TPM opens it by",
        "machine-store": f"{blobs} blobs, {release.size} bytes, from {release.source.name}, each compared "
        "with its digest",
        init.STATE: "empty",
    }
    volumes = [part for part in planned.partitions if part.name in told]
    made = [
        Step(part.name, f"{part.size >> 20} MiB, opens with its key and the recovery key: {told[part.name]}")
        for part in volumes
    ]
    place = esp.uki_place(release.manifest.contents.sequence)
    return (
        Step("partitions", f"{len(planned.partitions)} on {disk.path}, marked as unfinished; lost is "
             f"{planned.lost or 'nothing, the disk is empty'}"),
        *made,
        Step("esp", f"boot loader and {place}, nothing that firmware finds yet"),
        Step("reading everything back", "by what the boot itself calls"),
        *([Step("TPM", closing)] if closing else []),
        *ending("gets"),
    )  # fmt: skip


def ending(gets: str) -> tuple[Step, ...]:
    """Return what is done once the TPM is closed; `gets`, or has, where the power broke it off."""
    return (
        Step("disk id", f"the disk {gets} an id of its own: from here it needs a word to be erased"),
        Step("start", f"the boot loader {gets} the name {esp.STARTED}: from here the disk starts a machine"),
        Step("boot entry", f"{bootentry.LABEL} is first in the firmware's order, others stay"),
        Step("mark", "the mark of what is being installed is wiped: nothing is left to be finished"),
    )


def describe(planned: layout.Plan, release: Release, closing: str = "") -> dict[str, object]:
    """Return a plan as plain data."""
    disk, contents = planned.disk, release.manifest.contents
    return {
        "disk": disk.path,
        "model": disk.model,
        "serial": disk.serial,
        "bytes": disk.size,
        "lost": planned.lost or "nothing: the disk is empty",
        "erase": disk.word if planned.lost and not disk.unfinished else "",
        "content": [str(row) for row in disk.rows],
        "members": [str(row) for row in disk.members],
        "product": contents.product,
        "sequence": contents.sequence,
        "source": release.source.name,
        "release": release.index.digest,
        "release bytes": release.size,
        "targets": [target.service_name for target in contents.targets],
        "partitions": [
            {"name": part.name, "bytes": part.size, "holds": part.holds} for part in planned.partitions
        ],
        "steps": [{"step": step.name, "does": step.does} for step in steps(planned, release, closing)],
    }


def plan_text(shown: Mapping[str, Any]) -> str:
    """Write a plan for a person."""
    lines = [
        f"disk      {shown['disk']}  {shown['model']}  serial {shown['serial']}  "
        f"{int(shown['bytes']) / layout.GIB:.1f} GiB"
    ]
    if shown.get("release"):
        lines.append(f"release   {shown['source']}  sequence {shown['sequence']}  {shown['release']}")
    lines += [f"lost      {line}" for line in (shown["content"] or [shown["lost"]])]
    lines += [
        f"partition {part['name']:<16}{part['bytes'] >> 20:>9} MiB  {part['holds']}"
        for part in shown["partitions"]
    ]
    lines += [f"step {at:<4} {step['step']}: {step['does']}" for at, step in enumerate(shown["steps"], 1)]
    if shown["erase"]:
        more = " --erase-members" if shown["members"] else ""
        lines.append(f"consent   --erase {shown['erase']}{more}")
    return "\n".join(printable(line) for line in lines)


def show_plan(host: Host, options: Options) -> dict[str, object]:
    """Return what an installation would do; nothing is written.

    What is on the disk needs no consent to be shown, and the word for it is part of the plan.
    """
    disk = layout.inspect(host, options.disk)
    if found := find_broken_off(host, disk, options):
        return {**_bare(disk), "steps": [{"step": step.name, "does": step.does} for step in found.steps]}
    seen = dataclasses.replace(options, consent=layout.Consent(disk.word, members=True))
    planned, release, _ = plan(host, options if options.consent.word else seen)
    return describe(planned, release, closing_of(options))


def _bare(disk: layout.Disk) -> dict[str, object]:
    """Return what is said of a disk to which nothing new comes."""
    return {
        "disk": disk.path, "model": disk.model, "serial": disk.serial, "bytes": disk.size, "lost": "nothing",
        "erase": "", "content": [], "members": [], "partitions": [],
    }  # fmt: skip


def closing_of(options: Options) -> str:
    """Say what an installation does to the TPM."""
    from mosinit import provision

    folder = options.provisioned
    if provision.is_closed(folder):
        return "it is closed already; it is looked at"
    first = "" if (folder / "seal.json").exists() else "it is provisioned first, then "
    return f"{first}closed: passwords set, TPM2_Clear off; {folder / 'auths.json'} is removed"


@contextlib.contextmanager
def alone(host: Host, lock: Path | None = None, mapped: Path = Path("/dev/mapper")) -> Iterator[None]:
    """Be the only installation of this machine, with mounts that end with this process whatever ends it;
    what a killed one left open is closed. Raises `Failure`.
    """
    with (lock or LOCK).open("a+") as file:
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            where = file.read(200) or file.name
            raise Failure(
                f"another installation runs ({where}): go on there, or wait for its end"
            ) from error
        file.truncate(0)
        print(_terminal(), end="", file=file, flush=True)
        host.unshare_mounts()
        left = sorted(path.name for path in mapped.glob(f"{OPENED}*"))
        try:
            host.patiently(lambda: _close(host, left))
        except OSError as error:
            raise Failure(
                f"{left[0]}, which another installation left, cannot be closed ({error}): restart"
            ) from error
        yield


def _terminal() -> str:
    """Say where a person finds this process."""
    with contextlib.suppress(OSError):
        return f"on {os.ttyname(0)}"
    return f"without a terminal, as process {os.getpid()}"


def _close(host: Host, left: list[str]) -> None:
    """Remove devices, whichever can go first: some lie in file systems of others."""
    failed = None
    for name in tuple(left):
        try:
            host.dm(init.DmCommand.DEV_REMOVE, name)
            left.remove(name)
        except OSError as error:
            failed = error
    if failed:
        raise failed


def install(host: Installer, options: Options) -> dict[str, object]:
    """Install a release on a disk; returns what was done. Raises `Failure`, `Refused`."""
    with alone(host):
        return install_provisioned(host, options)


def install_provisioned(host: Installer, options: Options) -> dict[str, object]:
    """Install a release on a disk, for who is `alone`; or finish one that was broken off."""
    from mosinit import provision

    if done := resume(host, options):
        return done
    planned, release, policy = plan(host, options)
    provisioned = read_provisioned(options.provisioned, policy)
    tpm = Closing(closing_of(options), lambda: provision.close(host, options.provisioned, options.tcti))
    return act(host, planned, release, policy, provisioned, options.loader, tpm)


@dataclass(frozen=True)
class Closing:
    """What happens to the TPM once all is on the disk: said, and done."""

    said: str = ""
    close: Callable[[], None] = lambda: None


@dataclass
class Work:
    """An installation while it is carried out."""

    host: Installer
    planned: layout.Plan
    release: Release
    policy: init.Policy
    provisioned: Provisioned
    loader: Path
    closing: Closing
    commit: str = ""
    ended: dict[str, str | None] = field(default_factory=dict)


def act(
    host: Installer, planned: layout.Plan, release: Release, policy: init.Policy, provisioned: Provisioned,
    loader: Path, closing: Closing = Closing(),  # noqa: B008 (it is frozen)
) -> dict[str, object]:  # fmt: skip
    """Carry out a plan; raises `Failure` or `Refused` and leaves a disk that can be taken again."""
    begun = host.monotonic()
    check_epoch(provisioned, release, policy)
    if isinstance(there := release.source.machine, Elsewhere):  # a registry's is known once it was copied
        check_approved(provisioned, release, there)
    work = Work(host, planned, release, policy, provisioned, loader, closing)
    with layout.held(host, planned.disk), _told(planned.disk):
        for step in steps(planned, release, closing.said):
            host.say(f"{step.name}: {step.does}")
            ACTS[step.name](work)
    return {
        **describe(planned, release, closing.said), "generation": work.commit, "uki": release.uki_id,
        "boot entry": work.ended["boot entry"], "seconds": round(host.monotonic() - begun, 1),
    }  # fmt: skip


@contextlib.contextmanager
def _told(disk: layout.Disk) -> Iterator[None]:
    """Tell what became of the disk, and what to do, where a device or a program tells only what failed."""
    try:
        yield
    except (Broken, OSError) as error:
        raise Failure(
            f"{disk.path} is not installed ({error}): run this command again, or name another disk"
        ) from error
    except init.Refused as refused:
        # A check that could not read is no check that something else was found.
        if isinstance(refused.__cause__, OSError):
            raise Failure(
                f"{disk.path} is not installed ({refused.check}: {refused.seen}): run this command again, "
                "or name another disk"
            ) from refused
        raise


def _partition(work: Work) -> None:
    layout.write(work.host, work.planned)
    layout.wait_for_devices(work.host, work.planned)


def _config(work: Work) -> None:
    work.commit = fill_config(work.host, work.planned, work.release, work.provisioned)


def _back(work: Work) -> None:
    read_back(work.host, work.planned, work.release, work.policy, work.provisioned, work.commit, work.loader)


def _close_tpm(work: Work) -> None:
    """Close the TPM, once the disk says for which machine all is on it: see `resume`."""
    certificate = work.policy.organisation["sudi-ca.pem"]
    record = init.verify_record(work.provisioned.tokens.record, certificate, work.policy.product)
    layout.note_complete(work.host, work.planned, record.storage_key)
    work.closing.close()


# What follows the closing of the TPM, also where that was broken off: see `ending`.
ENDS: Mapping[str, Callable[[Installer, layout.Plan], str | None]] = {
    "disk id": lambda host, planned: layout.take_id(host, planned),
    "start": lambda host, planned: let_start(host, planned),
    "boot entry": lambda host, planned: add_boot_entry(host, planned),
    "mark": lambda host, planned: layout.wipe_mark(host, planned),
}


def _end(name: str) -> Callable[[Work], None]:
    """Return how a step behind the closing of the TPM is carried out."""

    def act(work: Work) -> None:
        work.ended[name] = ENDS[name](work.host, work.planned)

    return act


ACTS: Mapping[str, Callable[[Work], None]] = {
    "partitions": _partition,
    "machine-config": _config,
    "machine-store": lambda work: fill_store(work.host, work.planned, work.release, work.provisioned),
    init.STATE: lambda work: fill_state(work.host, work.planned, work.provisioned),
    "esp": lambda work: fill_esp(work.host, work.planned, work.release, work.provisioned, work.loader),
    "reading everything back": _back,
    "TPM": _close_tpm,
    **{name: _end(name) for name in ENDS},
}


# --- What was broken off behind its last byte --------------------------------------------------------------


@dataclass(frozen=True)
class BrokenOff:
    """An installation whose disk is complete, and whose TPM is being closed, or was."""

    plan: layout.Plan
    undo: bool  # the TPM can only be set back: then all begins anew
    steps: tuple[Step, ...]


def find_broken_off(host: Host, disk: layout.Disk, options: Options) -> BrokenOff | None:
    """Return the installation that the end of which is missing on this disk, if this TPM is the one that was
    being closed. None where nothing is to be done, or all can begin anew.
    """
    if not disk.complete or options.consent.word == disk.word:
        return None
    from mosinit import provision, tpm

    with tpm.open_tpm(options.tcti) as machine:
        key, (flags, _), others = machine.find_storage_key(), machine.flags(), machine.keeps_others()
    if key is None or init.tpm_name(key).hex() != disk.complete or not flags & provision.PASSWORDS:
        return None
    closed = flags & init.PROVISIONED == init.PROVISIONED
    if not closed and not disk.unfinished:
        return None  # its TPM was closed before it got its id: somebody opened that since
    planned = layout.plan_of(host, disk)
    kept = not closed and (options.provisioned / "auths.json").exists()
    # Clearing would also end what another system keeps in this TPM: then it is closed to the end.
    undo = not (kept or others or flags & (init.Permanent.LOCKOUT_AUTH | init.Permanent.CLEAR_DISABLED))
    if undo:
        step = Step("TPM", "cleared: closing it was broken off, and its passwords went with the power")
        return BrokenOff(planned, True, (step,))
    words = "closed to the end" + ("" if kept or closed else ", with new passwords where it has none yet")
    step = Step("TPM", "it is closed already; it is looked at" if closed else words)
    return BrokenOff(planned, False, (step, *ending("has")))


def resume(host: Installer, options: Options) -> dict[str, object] | None:
    """Finish an installation that the power broke off after all was on the disk; nothing of it is secret.

    Returns None if there is none, or if it has to begin anew. Raises `Failure`, `Refused`.
    """
    disk = layout.inspect(host, options.disk)
    found = find_broken_off(host, disk, options)
    if found is None:
        return None
    policy = policy_of_live(options.left)
    # Anybody may have written that mark: only the organisation's own word on this TPM lets it be touched.
    record = _record_of(host, found.plan, disk, policy)
    if found.undo:
        _clear(host, options)
        return None
    host.say(f"{disk.path}: all is on it; what was broken off is finished")
    ended = {}
    with layout.held(host, disk), _told(disk):
        closing, *rest = found.steps
        host.say(f"{closing.name}: {closing.does}")
        _close_to_the_end(host, options, record, policy)
        for step in rest:
            host.say(f"{step.name}: {step.does}")
            ended[step.name] = ENDS[step.name](host, found.plan)
    return {
        "disk": disk.path, "serial": disk.serial, "finished": "what was broken off",
        "boot entry": ended["boot entry"],
    }  # fmt: skip


def _record_of(
    host: Host, planned: layout.Plan, disk: layout.Disk, policy: init.Policy
) -> init.MachineRecord:
    """Return the machine record on a complete disk. Raises `Refused` unless it is of this machine."""
    header = luks.read_header(host, layout.device(planned, planned.named("machine-config")), "config")
    if header.tokens is None:
        raise init.Refused("LUKS-TOKEN", expected="the tokens of this machine", seen="none")
    record = init.verify_record(header.tokens.record, policy.organisation["sudi-ca.pem"], policy.product)
    if record.storage_key.hex() != disk.complete:
        raise init.Refused("TPM-IDENTITY", expected=disk.complete, seen=record.storage_key.hex())
    return record


def _clear(host: Host, options: Options) -> None:
    """Take a TPM back to before it was provisioned: nothing of ours depends on it yet."""
    from mosinit import tpm

    host.say(
        "closing the TPM was broken off, and its passwords are gone: it is cleared, and all begins anew"
    )
    with tpm.open_tpm(options.tcti) as machine:
        machine.clear()


def _close_to_the_end(host: Host, options: Options, record: init.MachineRecord, policy: init.Policy) -> None:
    """Close the TPM with the passwords that STATE still has; or, where it went with the power, set new ones
    in the place of those that are missing.
    """
    from mosinit import exchange, provision, tpm

    folder = options.provisioned
    if (folder / "auths.json").exists() and (folder / "seal.json").exists():
        provision.close(host, folder, options.tcti)
    with tpm.open_tpm(options.tcti) as machine:
        flags, _ = machine.flags()
        if flags & init.PROVISIONED != init.PROVISIONED and not flags & init.Permanent.LOCKOUT_AUTH:
            host.say(
                "the TPM gets new passwords in the place of those that were not set yet: the recovery "
                "record has others; to provision it once more, clear the TPM in the firmware's setup"
            )
            machine.end_closing({name: host.random(16).hex().encode() for name in exchange.HIERARCHIES})
        provision.check_closed(machine, record, policy.epoch)


# --- Volumes ---------------------------------------------------------------------------------------------


def key_of(provisioned: Provisioned, planned: layout.Plan, name: str) -> bytes:
    """Return the key of a volume, as the bring-up derives it."""
    if name == "machine-config":
        return provisioned.secret
    purpose = name.removeprefix("machine-")
    secret = bytearray(provisioned.secret)
    try:
        return bytes(init.derive_key(secret, purpose, planned.named(name).uuid))
    finally:
        init.wipe(secret)


@contextlib.contextmanager
def _volume(
    host: Installer, planned: layout.Plan, provisioned: Provisioned, name: str, *, read_only: bool = False
) -> Iterator[Path]:
    """Open and mount a volume of the machine to be."""
    device = layout.device(planned, planned.named(name))
    kind = "config" if name == "machine-config" else "plain"
    with (
        host.opened(device, kind, key_of(provisioned, planned, name), f"{OPENED}{name}") as mapped,
        host.mounted(mapped, "ext4", read_only=read_only) as folder,
    ):
        yield folder


def _make_volume(host: Installer, planned: layout.Plan, provisioned: Provisioned, name: str) -> None:
    """Make a volume with an empty file system."""
    part = planned.named(name)
    device = layout.device(planned, part)
    kind = "config" if name == "machine-config" else "plain"
    key = key_of(provisioned, planned, name)
    host.format_volume(device, kind, part.uuid, key, provisioned.recovery)
    if kind == "config":
        luks.import_tokens(host, device, provisioned.tokens)
    with host.opened(device, kind, key, f"{OPENED}{name}") as mapped:
        host.run([*EXT4, "-L", name, "-U", part.uuid, mapped], timeout=600)


def fill_config(host: Installer, planned: layout.Plan, release: Release, provisioned: Provisioned) -> str:
    """Make the config volume: manifest.git, identity, state. Returns the first generation's commit."""
    _make_volume(host, planned, provisioned, "machine-config")
    with _volume(host, planned, provisioned, "machine-config") as folder:
        repository = folder / "manifest.git"
        generations.create(host, repository)
        new = generations.of_release(release.manifest, release.uki_id, release.signed)
        commit = generations.add(host, repository, new)
        for name in ("sudi", "state"):
            (folder / name).mkdir(mode=0o700)
        state.make(host, folder / "state", volume=planned.partitions[-1].name == init.STATE)
        for name, content in provisioned.sudi:
            with host.replacing(folder / "sudi" / name, mode=0o400) as fresh:
                fresh.write_bytes(content)
        host.sync_tree(folder)
    return commit


def fill_store(host: Installer, planned: layout.Plan, release: Release, provisioned: Provisioned) -> None:
    """Make the store: every blob of the release, its digest checked while it is copied."""
    _make_volume(host, planned, provisioned, "machine-store")
    with _volume(host, planned, provisioned, "machine-store") as folder:
        target = folder / init.REPOSITORY
        (target / "blobs/sha256").mkdir(parents=True)
        with host.progress("copying the release", release.size) as advance:
            for blob in release.blobs:
                name = f"blobs/sha256/{blob.digest.removeprefix('sha256:')}"
                with host.replacing(target / name) as fresh, fresh.open("wb") as file:
                    for chunk in release.source.blob(blob):
                        file.write(chunk)
                        advance(len(chunk))
        for name, content in release.lists.items():
            with host.replacing(target / name) as fresh:
                fresh.write_bytes(content)
        host.sync_tree(folder)


def fill_state(host: Installer, planned: layout.Plan, provisioned: Provisioned) -> None:
    """Make the volume that keeps /var, empty."""
    _make_volume(host, planned, provisioned, init.STATE)


# --- The ESP ---------------------------------------------------------------------------------------------


def fill_esp(
    host: Installer, planned: layout.Plan, release: Release, provisioned: Provisioned, loader: Path
) -> None:
    """Make the EFI system partition, with a boot loader that no firmware finds yet."""
    part = planned.named("esp")
    entry = esp.Entry(release.manifest.contents.sequence, release.uki)
    with _volume(host, planned, provisioned, "machine-store", read_only=True) as store:
        esp.fill(host, layout.device(planned, part), part.uuid, [entry], loader.read_bytes(), store)


def let_start(host: Installer, planned: layout.Plan) -> None:
    """From here the disk starts a machine."""
    esp.let_start(host, layout.device(planned, planned.named("esp")))


def add_boot_entry(host: Host, planned: layout.Plan) -> str | None:
    """Have the firmware start this disk first. Where it takes no entry it has to find the boot loader by
    itself: that is said, and no failure.
    """
    part, sector = planned.named("esp"), planned.disk.sector
    entry = bootentry.Entry(part.number, part.start // sector, part.size // sector, part.uuid)
    try:
        return bootentry.register(host, entry)
    except (OSError, Failure) as error:
        host.say(
            f"the firmware took no boot entry ({error}): if it does not start {planned.disk.path} by "
            f"itself, choose {esp.STARTED} on it in the firmware's setup"
        )
        return None


# --- Reading back ----------------------------------------------------------------------------------------


def read_back(
    host: Installer, planned: layout.Plan, release: Release, policy: init.Policy, provisioned: Provisioned,
    commit: str, loader: Path,
) -> None:  # fmt: skip
    """See that a boot would take what is on the disk, by what the boot itself calls."""
    layout.check(host, planned)
    _check_header(host, planned, policy, provisioned)
    with (
        _volume(host, planned, provisioned, "machine-config", read_only=True) as config,
        _volume(host, planned, provisioned, "machine-store", read_only=True) as store,
    ):
        machine = Elsewhere({init.CONFIG: config, init.STORE: store})
        manifest = init.pick_generation(machine, policy)
        if (machine.report.facts["generation"], manifest) != (commit, release.manifest):
            raise init.Refused("GENERATION", expected=commit, seen=str(machine.report.facts["generation"]))
        for blob in release.blobs:
            for _ in read_checked(machine.real_path(init.blob_path(blob.digest)), blob):
                pass
        check_approved(provisioned, release, machine)
        for target in manifest.contents.targets:
            releases.check_target(machine, target, release.blobs)
            image = init.parse_image(init.read_blob(machine, target.digest, target.size, "IMAGE-DIGEST"))
            pairs = zip(image.layers, target.layer_signatures, strict=True)
            for index, (layer, signature) in enumerate(pairs):
                host.check_layer(machine, f"{OPENED}{target.service_name}-{index}", layer, signature)
    with host.mounted(layout.device(planned, planned.named("esp")), "vfat", read_only=True) as folder:
        for _ in read_checked(str(folder / esp.uki_place(release.manifest.contents.sequence)), release.uki):
            pass
        for name in (esp.LOADER, esp.NOT_YET):
            if (folder / name).read_bytes() != loader.read_bytes():
                raise Failure(f"{planned.disk.path} does not keep what is written to it: use another disk")


def _check_header(host: Host, planned: layout.Plan, policy: init.Policy, provisioned: Provisioned) -> None:
    """See that the config volume's header says what provisioning left, in a form that a boot takes."""
    header = luks.read_header(host, layout.device(planned, planned.named("machine-config")), "config")
    if header.tokens != provisioned.tokens:
        raise init.Refused("LUKS-TOKEN", expected="the tokens of this machine", seen="others")
    record = init.verify_record(
        provisioned.tokens.record, policy.organisation["sudi-ca.pem"], policy.product
    )
    proof = init.secret_proof(provisioned.secret, policy.product)
    if not hmac.compare_digest(proof, record.secret_proof):
        raise init.Refused("VOLUME-IDENTITY", expected=record.secret_proof.hex(), seen=proof.hex())
