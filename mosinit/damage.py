"""What is wrong with a machine's disk, and what a recovery will do about it: all that `recover` looks at.

Nothing is written here: config is looked into through a copy in memory, since to open it is to replay its
journal. A disk is this machine's if the recovery key opens its config or store.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mosinit import (
    esp,
    explain,
    generations,
    init,
    install,
    layout,
    luks,
    machinedisk,
    rekey,
    releases,
    repository,
    reseal,
)  # fmt: skip
from mosinit.generations import Elsewhere, Quiet
from mosinit.host import Failure, Host
from mosinit.install import Provisioned
from mosinit.sources import Blob, open_source, read_checked

if TYPE_CHECKING:
    from mosinit.registry import Access

KINDS = {"config": init.CONFIG_TYPE, "store": init.STORE_TYPE, "state": init.LINUX_TYPE}
MADE = ("config", "store")  # what can be made anew; what lies in state is nowhere else
CHUNK = 4 * init.MIB
OPENED = f"{install.OPENED}recover-"  # closed by the next run if a killed one left it
PROVISION = (
    "provision the machine (`mosinit provision`, `mosinit enroll`), then recover with --dir and the folder "
    "that it made"
)


@dataclass(frozen=True)
class Options:
    """What to recover, and what with. `anew` allows that config or store, if lost, is made anew."""

    disk: Path | None = None
    recovery: tuple[bytes, ...] = ()
    provisioned: Path | None = None
    source: str | None = None
    anew: bool = False
    left: Path = install.LEFT
    loader: Path = install.BOOT_LOADER
    access: Access | None = None


class Recoverer(install.Installer):
    """The package's seam, with what only a recovery does to volumes."""

    def machine(self) -> init.Machine:
        """Return the machine whose TPM this is."""
        return Quiet()

    @contextlib.contextmanager
    def unlocked(
        self, path: Path, header: init.LuksHeader, key: bytes, name: str, *, read_only: bool = False
    ) -> Iterator[Path]:
        """Open a volume by its own key, and yield its device."""
        luks.activate(header, path, key, name, read_only=read_only)
        try:
            yield Path("/dev/mapper", name)
        except BaseException:
            # What went wrong is told, not what cannot be closed because of it.
            with contextlib.suppress(Failure):
                self._remove(name)
            raise
        self.patiently(lambda: self._remove(name))

    def _remove(self, name: str) -> None:
        """Remove a device. `cryptsetup close` would read the header on the disk, and write a copy of it anew
        where one is damaged, by its own rules.
        """
        for each in (name, f"{name}_dif"):
            if os.path.lexists(f"/dev/mapper/{each}"):
                self.run(["dmsetup", "remove", each], timeout=60)

    @contextlib.contextmanager
    def seen(self, device: Path) -> Iterator[Path]:
        """Mount a file system to look into it: its journal is not replayed."""
        flags = init.RO_STRICT
        with self.scratch() as folder:
            point = folder / "seen"
            point.mkdir()
            self.mount(str(device), str(point), "ext4", flags, "noload")
            try:
                yield point
            finally:
                self.patiently(lambda: self.unmount(str(point)))

    def e2fsck(self, device: Path, *words: str) -> int:
        """Check a file system and return e2fsck's status; it never asks."""
        command = ["e2fsck", "-f", *words, str(device)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return done.returncode


class Finding(NamedTuple):
    """What was found, by the check that a boot refuses it with, and what will be done; or what is left."""

    check: str
    found: str
    will: str = ""
    left: str = ""


class Stored(NamedTuple):
    """The release in a store, all of whose blobs are what they should be."""

    manifest: init.Manifest
    signed: generations.SignedManifest
    blobs: tuple[Blob, ...]
    uki: Blob
    uki_id: str


@dataclass(frozen=True)
class Volume:
    """One encrypted volume of the disk."""

    name: str
    part: layout.Partition
    device: Path
    found: rekey.Found
    key: bytes = field(default=b"", repr=False)  # its own; empty if nothing opens it
    ours: bool = False  # slot 0 takes what provisioning left
    broken: bool = False  # its file system needs a repair
    lost: bool = False  # it is to be made anew

    @property
    def kind(self) -> str:
        """Return the kind of its header."""
        return "config" if self.name == "config" else "plain"

    @property
    def header(self) -> init.LuksHeader:
        """Return the header of a volume that was opened."""
        assert self.found.header
        return self.found.header


@dataclass(frozen=True)
class Look:
    """All that was found."""

    options: Options
    planned: layout.Plan
    policy: init.Policy
    volumes: Mapping[str, Volume]
    provisioned: Provisioned | None
    findings: tuple[Finding, ...] = ()
    release: Stored | None = None  # of the store
    repository: repository.State | None = None
    incoming: releases.Release | None = None  # with which the store is to be filled
    good: frozenset[str] = frozenset()  # generations that have started well
    other_identity: bool = False  # in config, than the one that was provisioned

    @property
    def loader(self) -> bytes:
        """Return the boot loader of the medium."""
        return self.options.loader.read_bytes()

    def add(self, *findings: Finding, **changes: object) -> Look:
        """Return the same with more findings, and changed."""
        return replace(self, findings=(*self.findings, *findings), **changes)  # type: ignore[arg-type]


def look(host: Recoverer, options: Options) -> Look:
    """Look at everything, change nothing. Raises `Failure` or `Refused` if it is not this machine's."""
    policy = install.policy_of_live(options.left)
    planned = machinedisk.find_disk(host, options.disk)
    provisioned = install.read_provisioned(options.provisioned, policy) if options.provisioned else None
    volumes = {
        part.name: prove(host, _volume(host, planned, part, provisioned), options, provisioned)
        for part in planned.partitions
        if part.name in KINDS
    }
    seen = Look(options, planned, policy, check_proved(planned, volumes, options), provisioned)
    seen = look_at_headers(seen)
    seen = look_at_tpm(host, seen)
    seen = look_at_store(host, seen)
    seen = look_at_config(host, seen)
    return look_at_state(host, look_at_esp(host, seen))


def _volume(
    host: Host, planned: layout.Plan, part: layout.Partition, provisioned: Provisioned | None
) -> Volume:
    device = layout.device(planned, part)
    kind = "config" if part.name == "config" else "plain"
    tokens = provisioned.tokens if provisioned else None
    return Volume(part.name, part, device, rekey.find_header(host, device, kind, tokens))


def key_of(provisioned: Provisioned, name: str, uuid: str) -> bytes:
    """Return what key slot 0 of a volume takes, as the bring-up derives it."""
    if name == "config":
        return provisioned.secret
    secret = bytearray(provisioned.secret)
    try:
        return bytes(init.derive_key(secret, name, uuid))
    finally:
        init.wipe(secret)


def prove(host: Host, volume: Volume, options: Options, provisioned: Provisioned | None) -> Volume:
    """Open a volume by what provisioning left, or by the recovery key; return it with its own key."""
    header = volume.found.header
    if header is None:
        return volume
    if provisioned:
        secret = key_of(provisioned, volume.name, volume.part.uuid)
        if key := luks.read_volume_key(header, luks.SECRET_SLOT, secret):
            return replace(volume, key=key, ours=True)
    for recovery in options.recovery:
        for slot in header.slots[1:]:
            host.say(f"{volume.name}: trying the recovery key on slot {slot}")
            if key := luks.read_volume_key(header, slot, recovery):
                return replace(volume, key=key)
    return volume


def check_proved(
    planned: layout.Plan, volumes: Mapping[str, Volume], options: Options
) -> Mapping[str, Volume]:
    """See that a disk is the recovery key's, whole; return its volumes, lost ones told apart."""
    disk = planned.disk
    opened = [volume.name for volume in volumes.values() if volume.key]
    if not {"config", "store"} & set(opened):
        if not options.recovery:
            raise Failure("the recovery key is needed: name its file by --key, or type it (--key -)")
        raise Failure(
            f"the recovery key opens neither config nor store of {disk.path} (serial {disk.serial}): "
            "nothing was changed; name the key of this machine's last provisioning"
        )
    checked = {}
    for name, volume in volumes.items():
        if volume.key:
            checked[name] = volume
        elif options.anew and name in MADE:
            checked[name] = replace(volume, lost=True)
        elif volume.found.header is not None:
            # A damaged slot looks like somebody else's volume: whoever stands there has to say which.
            expected = f"{name} opened by the recovery key that opens {' and '.join(opened)}"
            raise _about_lost(init.Refused("VOLUME-KEY", expected=expected, seen="another key"), name)
        else:
            assert volume.found.fault
            raise _about_lost(volume.found.fault, name)
    return checked


def _about_lost(refused: init.Refused, name: str) -> init.Refused:
    if refused.check == "LUKS-TOKEN":
        return explain.advised(refused, PROVISION)
    remedy = f"{name} is lost: if it is to be made anew, say --anew"
    if name == "config":
        remedy += ", and --dir with what `mosinit provision` made; machine-id and SSH host keys will be new"
    if name not in MADE:
        remedy = f"{name} holds what is nowhere else: repair its header by hand, or install again"
    return explain.advised(refused, remedy)


def look_at_headers(seen: Look) -> Look:
    """Say what is to be done with headers, and see that the record is of this organisation and no epoch
    falls.
    """
    config, provisioned = seen.volumes["config"], seen.provisioned
    if config.lost and not provisioned:
        raise Failure(f"config is lost, and a new one needs the secret of a new provisioning: {PROVISION}")
    for name, volume in seen.volumes.items():
        fault = volume.found.fault
        if volume.lost:
            what = str(fault or "it does not open by the recovery key")
            note = "; machine-id and SSH host keys will be new" if name == "config" else ""
            seen = seen.add(Finding(_check(fault, "LUKS-HEADER"), f"{name} is lost: {what}",
                                    f"make {name} anew{note}"))  # fmt: skip
            continue
        if not volume.found.whole:
            will = "make both copies of the header agree with the good one"
            if fault and fault.check == "LUKS-TOKEN":
                will = "write the tokens of the new provisioning" if provisioned else ""
            left = "" if will else PROVISION
            what = f"{name}: {fault or volume.found.note}"
            seen = seen.add(Finding(_check(fault, "LUKS-HEADER"), what, will, left))
        if provisioned and (not volume.ours or other_tokens(volume, provisioned, seen.policy)):
            what = "new tokens" if volume.ours else "the key of the new provisioning and its recovery key"
            will = f"give {name} {what} in place of the old"
            seen = seen.add(Finding("TPM-IDENTITY", f"{name} is sealed to an earlier provisioning", will))
    return seen if config.lost else _check_record(seen)


def _check(refused: init.Refused | None, otherwise: str) -> str:
    return refused.check if refused else otherwise


def wanted_tokens(volume: Volume, provisioned: Provisioned, policy: init.Policy) -> init.Tokens:
    """Return the tokens that config's header is to have: what provisioning left, and approvals that came
    later and that the organisation signed.
    """
    tokens, left = volume.header.tokens, provisioned.tokens
    assert tokens  # of a config volume
    approvals = dict(left.approvals)
    platform, keys = policy.organisation["platform.pub"], reseal.keys_of(policy)
    for value, approval in tokens.approvals.items():
        known = approvals.get(value)
        if len(approvals) < reseal.LIMIT if known is None else known.epoch < approval.epoch:
            with contextlib.suppress(init.Refused):
                reseal.verify_approval(platform, keys, value, approval)
                approvals[value] = approval
    return left._replace(approvals=approvals)


def other_tokens(volume: Volume, provisioned: Provisioned, policy: init.Policy) -> bool:
    """Say whether config's header lacks what provisioning left, or has what nobody signed."""
    return volume.name == "config" and volume.header.tokens != wanted_tokens(volume, provisioned, policy)


def _check_record(seen: Look) -> Look:
    tokens, policy = seen.volumes["config"].header.tokens, seen.policy
    assert tokens  # of a config volume
    order = 0
    try:
        init.verify_record(tokens.record, policy.organisation["sudi-ca.pem"], policy.product)
        order = _order_of(tokens, policy)
    except init.Refused as refused:
        # What cannot be read can be written anew; what says another organisation or product cannot.
        if refused.check not in ("RECORD-FORMAT", "EPOCH-ORDER"):
            raise
        will = "write the tokens of the new provisioning" if seen.provisioned else ""
        seen = seen.add(Finding(refused.check, str(refused), will, "" if will else PROVISION))
    fresh = _order_of(seen.provisioned.tokens, policy) if seen.provisioned else order
    if order > policy.epoch:
        expected, seen_epoch = f"a medium of epoch {order} or later", f"one of {policy.epoch}"
        raise explain.advised(
            init.Refused("EPOCH", expected=expected, seen=seen_epoch), f"recover with {expected}"
        )
    if fresh < order:
        expected = f"an order of epoch {order} or later"
        raise explain.advised(
            init.Refused("EPOCH", expected=expected, seen=f"one of {fresh}"),
            f"provision the machine for epoch {order} or later: a disk's epoch never falls",
        )
    # A release of the machine's own epoch is good, also on a medium of a later one.
    return replace(seen, policy=policy._replace(epoch=max(order, fresh, 1)))


def _order_of(tokens: init.Tokens, policy: init.Policy) -> int:
    parts = (tokens.order_statement, tokens.order_signature, tokens.order_certificate)
    return init.verify_epoch_order(*parts, policy)


def look_at_tpm(host: Recoverer, seen: Look) -> Look:
    """See that the TPM is the record's, and would open in this firmware."""
    tokens = seen.provisioned.tokens if seen.provisioned else seen.volumes["config"].header.tokens
    assert tokens  # config is lost only with a new provisioning
    machine, medium = host.machine(), install.policy_of_live(seen.options.left)
    try:
        record = init.verify_record(tokens.record, medium.organisation["sudi-ca.pem"], medium.product)
        init.check_tpm(machine, record, medium.epoch)
        epoch = init.read_epoch(machine).bit_length()
    except init.Refused as refused:
        if refused.check == "EPOCH":
            explain.advised(refused, "recover with a medium of that epoch or later")
            raise
        if seen.provisioned:
            what = f"{seen.options.provisioned} is not of this TPM's last provisioning: name that"
            explain.advised(refused, what)
            raise
        return seen.add(Finding(refused.check, str(refused), left=PROVISION))
    seen = replace(seen, policy=seen.policy._replace(epoch=max(seen.policy.epoch, epoch)))
    try:
        value, approval = init.find_approval(machine, tokens, seen.policy.epoch)
        # The TPM looks at the signature as well.
        platform, keys = medium.organisation["platform.pub"], reseal.keys_of(medium)
        reseal.verify_approval(platform, keys, value.hex(), approval)
    except init.Refused as refused:
        return seen.add(
            Finding(refused.check, str(refused), left="run `mosinit recover --reseal` after this")
        )
    return seen


def stored_release(machine: init.Machine, policy: init.Policy, host: Host) -> Stored:
    """Return the release of a store if it is whole, verified as the bring-up does it, every blob read.

    Dates are not looked at: what was installed boots whatever the clock says.
    """
    manifest = init.verify_release(machine, policy)
    _, bootkit = init.boot_targets(manifest.contents)
    blobs = releases.list_blobs(machine)
    for target in manifest.contents.targets:
        releases.check_target(machine, target, blobs)
    with host.progress("reading the store", sum(blob.size for blob in blobs)) as advance:
        for blob in blobs:
            for chunk in read_checked(machine.real_path(init.blob_path(blob.digest)), blob):  # type: ignore[attr-defined]
                advance(len(chunk))
    signed = releases.signed_manifest(machine, manifest)
    return Stored(manifest, signed, blobs, *releases.find_uki(machine, bootkit))


def look_at_store(host: Recoverer, seen: Look) -> Look:
    """Look into the store: its file system, and the release in it."""
    store, fault, told = seen.volumes["store"], None, "it is lost"
    if not store.lost:
        header = store.header
        with host.unlocked(store.device, header, store.key, f"{OPENED}look-store", read_only=True) as device:
            seen = _look_at_files(host, seen, store, device)
            try:
                with host.seen(device) as folder:
                    release = stored_release(Elsewhere({init.STORE: folder}), seen.policy, host)
                    return replace(seen, release=release)
            except (init.Refused, OSError) as error:
                fault = error
                told = str(error).replace(str(folder), init.STORE)
    check = fault.check if isinstance(fault, init.Refused) else "STORE-BLOB"
    what = f"the store has no whole release ({told})"
    source = seen.options.source
    if source is None:
        left = "name the release that is to be in it, or a later one: oci:DIR or docker://…"
        if store.lost:
            raise Failure(f"{what}: {left}")
        return seen.add(Finding(check, what, left=left))
    incoming = releases.verify(host, open_source(source, seen.options.access), seen.policy)
    return seen.add(Finding(check, what, f"fill the store from {source}"), incoming=incoming)


def _look_at_files(host: Recoverer, seen: Look, volume: Volume, device: Path) -> Look:
    """Check a file system without changing it."""
    if host.e2fsck(device, "-n") == 0:
        return seen
    volumes = {**seen.volumes, volume.name: replace(volume, broken=True)}
    finding = Finding("VOLUME-READ", f"the file system of {volume.name} has faults", "e2fsck -p")
    return seen.add(finding, volumes=volumes)


def look_at_state(host: Recoverer, seen: Look) -> Look:
    """Check the file system of /var."""
    volume = seen.volumes.get(init.STATE)
    if volume is None:
        return seen
    header = volume.header
    with host.unlocked(volume.device, header, volume.key, f"{OPENED}look-state", read_only=True) as device:
        return _look_at_files(host, seen, volume, device)


def look_at_config(host: Recoverer, seen: Look) -> Look:
    """Look into config, through a copy in memory."""
    config = seen.volumes["config"]
    if config.lost:
        return seen
    with host.scratch() as work:
        copy = work / "config"
        _copy(config.device, copy)
        with host.unlocked(copy, config.header, config.key, f"{OPENED}look-config") as device:
            seen = _look_at_files(host, seen, config, device)
            try:
                with host.seen(device) as folder:
                    found = repository.look(folder / "manifest.git", seen.policy)
                    if not found.whole:
                        seen = _about_repository(host, seen, found, folder / "manifest.git")
                    other = _other_identity(folder, seen.provisioned)
                    good = good_of(folder / "manifest.git", found)
            except OSError as error:
                refused = init.Refused("VOLUME-READ", expected="an ext4 file system", seen=str(error))
                raise _about_lost(refused, "config") from error
    if other:
        seen = seen.add(Finding("TPM-IDENTITY", "config has another machine identity", "lay the new one"))
    seen = replace(seen, repository=found, good=good, other_identity=other)
    return _about_generations(seen, found)


def good_of(git: Path, found: repository.State) -> frozenset[str]:
    commits = [each.commit for each, _ in found.usable]
    return frozenset(commit for commit in commits if generations.is_good(git, commit))


def _about_generations(seen: Look, found: repository.State) -> Look:
    """See that a generation runs the release of the store, which is no older than what the machine ran."""
    release = seen.release or seen.incoming
    if release is None or not found.usable or runs(release, found):
        return seen
    newest = max((each.sequence for each, _ in found.usable), default=0)
    sequence = release.manifest.contents.sequence
    if sequence < newest:
        refused = init.Refused("MANIFEST-SEQUENCE", expected=f"{newest} or later", seen=str(sequence))
        raise explain.advised(refused, "name the release that this machine runs, or a later one, as SOURCE")
    what = f"no generation runs the release {sequence}"
    return seen.add(Finding("GENERATION", what, "add that generation to manifest.git"))


def runs(release: Stored | releases.Release, found: repository.State) -> bool:
    sha256 = release.manifest.sha256
    return any(manifest.sha256 == sha256 for _, manifest in found.usable)


def _copy(device: Path, target: Path) -> None:
    with open(device, "rb") as source, target.open("wb") as file:
        while chunk := source.read(CHUNK):
            file.write(chunk)


def _other_identity(folder: Path, provisioned: Provisioned | None) -> bool:
    if provisioned is None:
        return False
    for name, content in provisioned.sudi:
        path = folder / "sudi" / name
        if not path.is_file() or not hmac.compare_digest(path.read_bytes(), content):
            return True
    return False


def _about_repository(host: Recoverer, seen: Look, found: repository.State, folder: Path) -> Look:
    """Say what is wrong with manifest.git, and what it will be; made anew in memory to see that."""
    what = str(found.fault) if found.fault else f"manifest.git has {', '.join(found.foreign)}"
    check = _check(found.fault, "GIT-PACKED")
    release = seen.release or seen.incoming
    try:
        made = repository.preview(host, folder, seen.policy, new_generation(release) if release else None)
    except Failure as failure:
        return seen.add(Finding(check, what, left=f"{failure}: name one as SOURCE"))
    listed = ", ".join(str(each.sequence) for each, _ in made.usable)
    return seen.add(Finding(check, what, f"make manifest.git anew, with generation {listed}"))


def new_generation(release: Stored | releases.Release) -> generations.NewGeneration:
    """Return the generation that runs a release."""
    return generations.of_release(release.manifest, release.uki_id, release.signed)


def entries_of(seen: Look, found: repository.State | None, good: frozenset[str]) -> list[esp.Entry]:
    """Return what must lie on the ESP: the UKI of each generation whose release is in the store."""
    release = seen.release or seen.incoming
    if release is None:
        return []
    entries = [
        esp.Entry(each.sequence, release.uki, each.commit in good)
        for each, manifest in (found.usable if found else ())
        if each.uki == release.uki_id
    ]
    sequence = release.manifest.contents.sequence
    return entries or [esp.Entry(sequence, release.uki, False)]


def look_at_esp(host: Recoverer, seen: Look) -> Look:
    """Look at the EFI system partition."""
    device = layout.device(seen.planned, seen.planned.named("esp"))
    fault = esp.look(host, device, entries_of(seen, seen.repository, seen.good), seen.loader)
    if not fault:
        return seen
    will = "make its FAT anew, with the medium's boot loader and the store's UKI"
    finding = Finding("", f"the EFI system partition: {fault}", will)
    if seen.release is None and seen.incoming is None:
        finding = finding._replace(will="", left="name a release: its UKI has to come from the store")
    return seen.add(finding)


def describe(seen: Look) -> dict[str, object]:
    """Return what was found, and what is to be done, as plain data."""
    disk = seen.planned.disk
    return {
        "disk": str(disk.path),
        "model": disk.model,
        "serial": disk.serial,
        "found": [f"{each.check}: {each.found}" if each.check else each.found for each in seen.findings],
        "will do": [each.will for each in seen.findings if each.will],
        "left": [each.left for each in seen.findings if each.left],
    }


def show_plan(host: Recoverer, options: Options) -> dict[str, object]:
    """Return what a recovery would do."""
    with install.alone(host):
        return describe(look(host, options))
