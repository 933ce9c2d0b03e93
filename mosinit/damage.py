"""What is wrong with a machine's disk, and what a recovery will do about it: all that `recover` looks at.

Nothing is written here: config is looked into through a copy in memory, since to open it is to replay its
journal. A disk is this machine's if the recovery key opens its config or store.
"""

from __future__ import annotations

import contextlib
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
ROOM, ROOM_FILES = 8 * init.MIB, 512  # in config, for what may have to be laid there
OPENED = f"{install.OPENED}recover-"  # closed by the next run if a killed one left it
_NEW_IDS = "; machine-id and SSH host keys will be new"
_OTHER_KEY = (
    "if a recovery was broken off, name the recovery key of the other provisioning as well (--key may be "
    "repeated)"
)
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
            # Whoever made it may have chosen that a kernel panics at the first error.
            self.mount(str(device), str(point), "ext4", flags, "noload,errors=continue")
            try:
                yield point
            finally:
                self.patiently(lambda: self.unmount(str(point)))

    def mend(self, device: Path) -> bool:
        """Repair a file system as far as that loses nothing, and say whether a boot then takes it."""
        if superblock_fault("", device):
            # What a kernel does at an error, and options: no word of a file's content.
            for words in (("-e", "continue"), ("-E", "mount_opts=")):
                _quietly("tune2fs", *words, str(device))
        return not self.e2fsck(device, "-p") & ~3 and superblock_fault("", device) is None

    def e2fsck(self, device: Path, *words: str) -> int:
        """Check a file system and return e2fsck's status; it never asks."""
        return _quietly("e2fsck", "-f", *words, str(device))


def _quietly(*command: str) -> int:
    """Run a program and return its status. What it says is for nobody, and may be more than memory holds."""
    null = subprocess.DEVNULL
    return subprocess.run(command, stdin=null, stdout=null, stderr=null, check=False).returncode


class Finding(NamedTuple):
    """What was found, by the check that a boot refuses it with, and what will be done; or what is left."""

    check: str
    found: str
    will: str = ""
    left: str = ""


_NOTHING = Finding("STORE-BLOB", "the store has no whole release (it is lost)")


class Stored(NamedTuple):
    """The release in a store, all of whose blobs are what they should be."""

    manifest: init.Manifest
    signed: generations.SignedManifest
    blobs: tuple[Blob, ...]
    uki: Blob
    uki_id: str
    epoch: int  # of the UKI: firmware has to be approved up to it


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
    emptied: bool = False  # its file system is to be made anew

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
    tpm_fits: bool = True  # it is the record's

    @property
    def tokens(self) -> init.Tokens:
        """Return what config's header will say for the TPM."""
        tokens = self.provisioned.tokens if self.provisioned else self.volumes["config"].header.tokens
        assert tokens  # config is lost only with a new provisioning
        return tokens

    @property
    def loader(self) -> bytes:
        """Return the boot loader of the medium."""
        return self.options.loader.read_bytes()

    def with_volume(self, volume: Volume, *findings: Finding) -> Look:
        """Return the same with a volume that was found to be otherwise."""
        return self.add(*findings, volumes={**self.volumes, volume.name: volume})

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
    seen = look_at_approval(host, look_at_store(host, seen))
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
    files = refused.check == "VOLUME-READ"  # alone: its header, and with it its key, stays
    if name == "store":
        remedy += " and name the release as SOURCE"
    if name == "config" or not files:
        remedy += ", and --dir with what `mosinit provision` made"
    if name == "config":
        remedy += _NEW_IDS
    if files:
        remedy += "; or open it by the recovery key elsewhere, and run e2fsck by hand"
    if name not in MADE:
        remedy = f"{name} holds what is nowhere else: repair its header by hand, or install again"
    if refused.check == "VOLUME-KEY":
        remedy = f"{_OTHER_KEY}; if none opens it: {remedy}"
    return explain.advised(refused, remedy)


def look_at_headers(seen: Look) -> Look:
    """Say what is to be done with headers, and see that the record is of this organisation and no epoch
    falls.
    """
    config, provisioned = seen.volumes["config"], seen.provisioned
    lost = [volume.name for volume in seen.volumes.values() if volume.lost]
    if lost and not provisioned:
        raise Failure(
            f"{lost[0]} is lost, and a new one needs the secret of a new provisioning: {PROVISION}"
        )
    for name, volume in seen.volumes.items():
        fault = volume.found.fault
        if volume.lost:
            what = str(fault or "it does not open by the recovery key")
            note = _NEW_IDS if name == "config" else ""
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
    """See that the TPM is the record's."""
    tokens, machine, medium = seen.tokens, host.machine(), install.policy_of_live(seen.options.left)
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
        return seen.add(Finding(refused.check, str(refused), left=PROVISION), tpm_fits=False)
    return replace(seen, policy=seen.policy._replace(epoch=max(seen.policy.epoch, epoch)))


def look_at_approval(host: Recoverer, seen: Look) -> Look:
    """See that the TPM would open in this firmware, to the UKI of the release in the store."""
    if not seen.tpm_fits:
        return seen
    machine, medium = host.machine(), install.policy_of_live(seen.options.left)
    epoch = max(seen.policy.epoch, seen.release.epoch if seen.release else 0)
    try:
        value, approval = init.find_approval(machine, seen.tokens, epoch)
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
    blob, uki_id = releases.find_uki(machine, bootkit)
    return Stored(
        manifest, signed, blobs, blob, uki_id, releases.uki_epoch(releases.read_uki(machine, blob))
    )


def look_at_store(host: Recoverer, seen: Look) -> Look:
    """Look into the store: its file system, and the release in it."""
    store, found, before = seen.volumes["store"], _NOTHING, None
    if not store.lost:
        header = store.header
        with host.unlocked(store.device, header, store.key, f"{OPENED}look-store", read_only=True) as device:
            seen = _look_at_files(host, seen, store, device)
            store = seen.volumes["store"]
            if not store.emptied:
                release = _release_on(host, seen, device)
                if isinstance(release, Stored):
                    return replace(seen, release=release)
                found = release
            else:
                with contextlib.suppress(OSError):
                    before = _release_on(host, seen, device)
    source = seen.options.source
    if source is None:
        left = "name the release that is to be in it, or a later one: oci:DIR or docker://…"
        if store.lost or store.emptied:
            raise Failure(f"{found.found}: {left}")
        return seen.add(found._replace(left=left))
    incoming = releases.verify(host, open_source(source, seen.options.access), seen.policy)
    if isinstance(before, Stored):
        _check_newer(incoming, before.manifest.contents.sequence)
    return seen.add(found._replace(will=f"fill the store from {source}"), incoming=incoming)


def _release_on(host: Recoverer, seen: Look, device: Path) -> Stored | Finding:
    """Return the release in the store's file system, or why there is none."""
    with host.seen(device) as folder:
        try:
            return stored_release(Elsewhere({init.STORE: folder}), seen.policy, host)
        except (init.Refused, OSError) as error:
            check = error.check if isinstance(error, init.Refused) else "STORE-BLOB"
            told = str(error).replace(str(folder), init.STORE)
            return Finding(check, f"the store has no whole release ({told})")


def _look_at_files(host: Recoverer, seen: Look, volume: Volume, device: Path) -> Look:
    """Check a file system without changing it; config's is a copy, and is repaired to see whether it can be.

    Raises `Refused` if it is beyond repair, unless it may be made anew.
    """
    odd = superblock_fault(volume.name, device)
    if host.e2fsck(device, "-n") == 0 and odd is None:
        return seen
    what = f"the file system of {volume.name} has faults{f' ({odd.seen})' if odd else ''}"
    lost = _beyond_repair(host, seen.options, volume, device)
    if not lost:
        changed = replace(volume, broken=True)
        return seen.with_volume(changed, Finding("VOLUME-READ", what, "e2fsck -p"))
    return _with_new_files(seen, volume, lost)


def _with_new_files(seen: Look, volume: Volume, lost: str) -> Look:
    """Say that the file system of config or store is to be made anew; `lost` says what that of now is.

    Raises `Refused` unless it may be, `Failure` without what it takes.
    """
    name = volume.name
    if not seen.options.anew:
        raise _about_lost(init.Refused("VOLUME-READ", expected="an ext4 file system", seen=lost), name)
    if name == "config" and seen.provisioned is None:
        raise Failure(f"config is lost, and a new one needs the identity of a new provisioning: {PROVISION}")
    will = f"make the file system of {name} anew{_NEW_IDS if name == 'config' else ''}"
    finding = Finding("VOLUME-READ", f"{name} is lost: {lost}", will)
    return seen.with_volume(replace(volume, emptied=True), finding)


def superblock_fault(name: str, device: Path) -> init.Refused | None:
    """Return why a boot would not mount a file system, if its superblock alone says so."""
    try:
        init.mount_ext4(_Unmounted(), str(device), name, init.RO_STRICT)
    except init.Refused as refused:
        return refused
    return None


class _Unmounted(Quiet):
    """A machine that looks, and mounts nothing."""

    def mount(self, *_: object) -> None:
        """Do nothing."""


def _beyond_repair(host: Recoverer, options: Options, volume: Volume, device: Path) -> str:
    """Say why a file system with faults has to be made anew, empty if it can be repaired."""
    if volume.name == "config":
        return "" if host.mend(device) else "one that e2fsck -p does not repair"
    if volume.name == "store" and options.anew and options.source:
        return "one with faults, and what it is to hold comes from the release"
    if volume.name == "store":
        try:
            with host.seen(device):
                return ""
        except OSError as error:
            return error.strerror or str(error)
    return ""  # what state holds is nowhere else


def look_at_state(host: Recoverer, seen: Look) -> Look:
    """Check the file system of /var, and that there is one if the release demands it."""
    volume, release = seen.volumes.get(init.STATE), seen.release or seen.incoming
    if volume is None:
        if release and init.STATE in {each.label for each in release.manifest.contents.storage}:
            refused = init.Refused(
                "VOLUME-STATE", expected="a volume `state`, as the release says", seen="none"
            )
            raise explain.advised(refused, "name a release that does without, or install the machine again")
        return seen
    header = volume.header
    with host.unlocked(volume.device, header, volume.key, f"{OPENED}look-state", read_only=True) as device:
        return _look_at_files(host, seen, volume, device)


def look_at_config(host: Recoverer, seen: Look) -> Look:
    """Look into config, through a copy in memory."""
    config = seen.volumes["config"]
    if config.lost:
        return _with_release(seen)
    with host.scratch() as work:
        copy = work / "config"
        _copy(config.device, copy)
        with host.unlocked(copy, config.header, config.key, f"{OPENED}look-config") as device:
            seen = _look_at_files(host, seen, config, device)
            if seen.volumes["config"].emptied:
                return _with_release(seen)
            try:
                with host.seen(device) as folder:
                    found = repository.look(folder / "manifest.git", seen.policy)
                    if not found.whole:
                        seen = _about_repository(host, seen, found, folder / "manifest.git")
                    other = _other_identity(folder, seen.provisioned)
                    good = good_of(folder / "manifest.git", found)
                    full = _is_full(folder)
            except OSError as error:
                lost = error.strerror or str(error)
                return _with_release(_with_new_files(seen, seen.volumes["config"], lost))
    if other:
        seen = seen.add(Finding("TPM-IDENTITY", "config has another machine identity", "lay the new one"))
    release = seen.release or seen.incoming
    if full and (other or not found.whole or (release and not runs(release, found))):
        lost = "one without room for what is to be laid there"
        return _with_release(_with_new_files(seen, seen.volumes["config"], lost))
    seen = replace(seen, repository=found, good=good, other_identity=other)
    return _about_generations(seen, found)


def _is_full(folder: Path) -> bool:
    """Say whether a file system has no room for a manifest.git and an identity."""
    seen = os.statvfs(folder)
    return seen.f_bfree * seen.f_frsize < ROOM or seen.f_ffree < ROOM_FILES


def _with_release(seen: Look) -> Look:
    """See that there is a release, without which a new config would have no generation. Raises `Failure`."""
    if seen.release is None and seen.incoming is None:
        raise Failure(
            "config is to be made anew for the release in the store, and there is none: name SOURCE"
        )
    return seen


def good_of(git: Path, found: repository.State) -> frozenset[str]:
    """Return the usable generations that have started well."""
    commits = [each.commit for each, _ in found.usable]
    return frozenset(commit for commit in commits if generations.is_good(git, commit))


def _about_generations(seen: Look, found: repository.State) -> Look:
    """See that a generation runs the release of the store, which is no older than what the machine ran."""
    release = seen.release or seen.incoming
    if release is None or not found.usable or runs(release, found):
        return seen
    newest = max((each.sequence for each, _ in found.usable), default=0)
    _check_newer(release, newest)
    what = f"no generation runs the release {release.manifest.contents.sequence}"
    return seen.add(Finding("GENERATION", what, "add that generation to manifest.git"))


def _check_newer(release: Stored | releases.Release, newest: int) -> None:
    """Refuse a release that is older than what the machine ran."""
    sequence = release.manifest.contents.sequence
    if sequence < newest:
        refused = init.Refused("MANIFEST-SEQUENCE", expected=f"{newest} or later", seen=str(sequence))
        raise explain.advised(refused, "name the release that this machine runs, or a later one, as SOURCE")


def runs(release: Stored | releases.Release, found: repository.State) -> bool:
    """Say whether a boot of the release's UKI finds a generation with it."""
    return any(_of(release, each, manifest) for each, manifest in found.usable)


def _of(release: Stored | releases.Release, generation: init.Generation, manifest: init.Manifest) -> bool:
    """Say whether a generation is of a release: nobody signs which UKI it is for."""
    return (generation.uki, manifest.sha256) == (release.uki_id, release.manifest.sha256)


def _copy(device: Path, target: Path) -> None:
    with open(device, "rb") as source, target.open("wb") as file:
        while chunk := source.read(CHUNK):
            file.write(chunk)


def _other_identity(folder: Path, provisioned: Provisioned | None) -> bool:
    if provisioned is None:
        return False
    return not all(esp.holds(folder / "sudi" / name, content) for name, content in provisioned.sudi)


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
    """Return what must lie on the ESP: the UKI of the release that is in the store."""
    release = seen.release or seen.incoming
    if release is None:
        return []
    ours = {
        each.commit for each, manifest in (found.usable if found else ()) if _of(release, each, manifest)
    }
    return [esp.Entry(release.manifest.contents.sequence, release.uki, bool(ours & good))]


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
