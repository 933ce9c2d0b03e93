"""The `recover` verb: on the live medium, the way back into a machine that no longer opens by itself.

1. Look (damage.py): which disk, which of its volumes the recovery key opens, what is wrong with them.
2. Say it, and what is to be done; `--plan` ends here.
3. Act, each step one that may be interrupted: the same command goes on from there.
4. Read all of it back as a boot would.

A disk is this machine's if the recovery key opens its config or store. Nothing else of it is written, and no
check is weaker afterwards: headers are what the bring-up's list allows, releases and epoch orders are
verified by its own functions, and none below the epoch of the TPM or of the disk counts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mosinit import (
    damage,
    esp,
    generations,
    init,
    install,
    layout,
    luks,
    machinedisk,
    rekey,
    releases,
    repository,
    state,
)  # fmt: skip
from mosinit.damage import OPENED, Look, Options, Recoverer, Stored, Volume
from mosinit.generations import Elsewhere, Quiet
from mosinit.host import Failure, Host
from mosinit.install import Provisioned
from mosinit.removal import let_change, remove
from mosinit.sources import Blob, read_checked

# What recover mends, and how it is called for that: the remedies of these checks, and no others, say so.
_ANEW, _MENDED, _FILLED = "--dir STATE --key FILE", "--key FILE", "SOURCE --key FILE"
HANDLED = {
    **dict.fromkeys(
        ("TPM-STATE", "TPM-CLEARED", "TPM-SRK", "TPM-IDENTITY", "TPM-INDEX", "TPM-SEAL", "EPOCH-ORDER",
         "RECORD-FORMAT", "LUKS-TOKEN", "VOLUME-KEY"), _ANEW,
    ),
    **dict.fromkeys(("TPM-APPROVAL", "TPM-POLICY"), "--reseal"),
    **dict.fromkeys(
        ("LUKS-HEADER", "VOLUME-READ", "GENERATION", "GIT-REF", "GIT-OBJECT", "GIT-PACKED", "ESP-EXTRA"),
        _MENDED,
    ),
    **dict.fromkeys(("STORE-BLOB", "IMAGE-DIGEST", "LAYER-SIZE", "LAYER-READ"), _FILLED),
    "VOLUME-IDENTITY": f"--anew {_ANEW}",
}  # fmt: skip


def recover(host: Recoverer, options: Options) -> dict[str, object]:
    """Look, act, read back; returns what was done. Raises `Failure`, `Refused`."""
    with install.alone(host):
        return act(host, damage.look(host, options))


def act(host: Recoverer, seen: Look) -> dict[str, object]:
    """Do what was found to be needed. Interrupted at any step, the same command goes on."""
    # While it is open no other disk gets its name, should it be pulled.
    with init.held(os.open(seen.planned.disk.path, os.O_RDONLY | os.O_CLOEXEC)):
        check_same_disk(host, seen)
        return _act(host, seen)


def _act(host: Recoverer, seen: Look) -> dict[str, object]:
    for finding in seen.findings:
        host.say(f"found: {finding.found}; {finding.will or 'left'}")
    volumes = {name: restore_header(host, seen, volume) for name, volume in seen.volumes.items()}
    seen = replace(seen, volumes=volumes)
    for volume in seen.volumes.values():
        if volume.emptied:
            host.say(f"{volume.name}: its file system anew")
            with _opened(host, volume) as device:
                make_files(host, volume, device)
        elif volume.broken and not volume.lost:
            with _opened(host, volume) as device:
                repair(host, volume.name, device)
    if seen.incoming is not None:
        with _opened(host, seen.volumes["store"]) as device:
            seen = replace(seen, release=refill(host, seen.incoming, seen.policy, device))
        # The firmware may be approved for the one that was there, and not up to the epoch of this one.
        if not any(each.check in ("TPM-APPROVAL", "TPM-POLICY") for each in seen.findings):
            seen = damage.look_at_approval(host, seen)
    entries = restore_config(host, seen)
    if seen.release is not None:
        restore_esp(host, seen, entries)
    read_back(host, seen)
    done = {**damage.describe(seen), "boot entry": install.add_boot_entry(host, seen.planned)}
    done["status"] = 1 if done["left"] else 0
    done["next"] = "remove the medium and restart" if not done["left"] else "see what is left"
    return done


def check_same_disk(host: Host, seen: Look) -> None:
    """See that the disk is still the one that was looked at."""
    now = machinedisk.find_disk(host, seen.planned.disk.path)
    if now != seen.planned:
        raise Failure(f"{now.disk.path} is not the disk that was looked at: nothing was changed; run again")


@contextlib.contextmanager
def _opened(host: Recoverer, volume: Volume, *, read_only: bool = False) -> Iterator[Path]:
    name = f"{OPENED}{volume.name}"
    with host.unlocked(volume.device, volume.header, volume.key, name, read_only=read_only) as device:
        yield device


def restore_header(host: Recoverer, seen: Look, volume: Volume) -> Volume:
    """Make a volume's header one that a boot takes, with the keys of a new provisioning if there is one."""
    provisioned = seen.provisioned
    if volume.lost:
        return make_anew(host, seen, volume)
    if not volume.found.whole:
        host.say(f"{volume.name}: both copies of its header")
        rekey.heal(host, volume.device, volume.kind, volume.found)
    if provisioned is None:
        return _again(host, volume)
    header, tokens = volume.header, None
    if volume.name == "config":
        assert header.tokens  # of a config volume
        tokens = provisioned.tokens
    fault = volume.found.fault
    if not volume.ours or (fault and fault.check == "LUKS-TOKEN"):
        host.say(f"{volume.name}: the key of the new provisioning, and its recovery key")
        secret = damage.key_of(provisioned, volume.name, volume.part.uuid)
        keys = rekey.Keys(secret, provisioned.recovery)
        fresh = rekey.renewed(host, header, volume.kind, volume.key, keys, tokens)
        rekey.write(host, volume.device, volume.kind, header, fresh)
    else:
        if damage.other_tokens(volume, provisioned, seen.policy):
            wanted = damage.wanted_tokens(volume, provisioned, seen.policy)
            luks.import_tokens(host, volume.device, wanted)
        rekey.wipe_unused(host, volume.device, luks.read_header(host, volume.device, volume.kind))
    return _again(host, volume)


def _again(host: Host, volume: Volume) -> Volume:
    """Read a header back; a boot must take it."""
    return replace(volume, found=rekey.Found(luks.read_header(host, volume.device, volume.kind)))


def make_anew(host: Recoverer, seen: Look, volume: Volume) -> Volume:
    """Make a volume that is lost anew, with an empty file system."""
    host.say(f"{volume.name}: made anew")
    provisioned = seen.provisioned
    if provisioned is None:
        raise Failure(f"a new {volume.name} needs the secret of a new provisioning: {damage.PROVISION}")
    secret = damage.key_of(provisioned, volume.name, volume.part.uuid)
    host.format_volume(volume.device, volume.kind, volume.part.uuid, secret, provisioned.recovery)
    if volume.name == "config":
        luks.import_tokens(host, volume.device, provisioned.tokens)
    made = _again(host, volume)
    key = luks.read_volume_key(made.header, luks.SECRET_SLOT, secret)
    assert key  # it was made with it
    made = replace(made, key=key, ours=True)
    with _opened(host, made) as device:
        make_files(host, made, device)
    return made


def make_files(host: Host, volume: Volume, device: Path) -> None:
    """Make an empty file system in a volume."""
    words = ["-L", f"machine-{volume.name}", "-U", volume.part.uuid]
    host.run([*install.EXT4, *words, device], timeout=600)


def repair(host: Recoverer, name: str, device: Path) -> None:
    """Repair a file system as far as that loses nothing. Raises `Failure`."""
    host.say(f"{name}: e2fsck -p")
    if not host.mend(device):
        anew = {"config": ", or say --anew, with --dir STATE", "store": ", or say --anew, and name SOURCE"}
        raise Failure(
            f"e2fsck -p does not repair the file system of {name}, and answering yes to its questions may "
            f"lose files: open the volume by the recovery key and run e2fsck by hand{anew.get(name, '')}"
        )


def refill(host: Recoverer, release: releases.Release, policy: init.Policy, device: Path) -> Stored:
    """Fill the store with a release: what is there already stays."""
    with host.mounted(device, "ext4") as folder:
        let_change(folder)
        target = folder / init.REPOSITORY
        places = target, target / "blobs", target / "blobs/sha256"
        for place in places:
            if place.is_symlink() or not place.is_dir():
                remove(place)
                place.mkdir()
            let_change(place)
        with host.progress("copying the release", release.size) as advance:
            for blob in release.blobs:
                path = target / f"blobs/sha256/{blob.digest.removeprefix('sha256:')}"
                if not _has(path, blob):
                    _make_way(path)
                    with host.replacing(path) as fresh, fresh.open("wb") as file:
                        file.writelines(release.source.blob(blob))
                advance(blob.size)
        for name, content in release.lists.items():
            _make_way(target / name)
            with host.replacing(target / name) as fresh:
                fresh.write_bytes(content)
        # Each file was synced where it was written; what else lies there is nobody's to open.
        for place in (*reversed(places), folder):
            host.sync_file(place)
        return damage.stored_release(Elsewhere({init.STORE: folder}), policy, host)


def _make_way(path: Path) -> None:
    """Let a file be replaced, and remove what is none where one has to be."""
    let_change(path)
    if path.is_symlink() or not path.is_file():
        remove(path)


def _has(path: Path, blob: Blob) -> bool:
    try:
        for _ in read_checked(str(path), blob):
            pass
    except (OSError, init.Refused):
        return False
    return True


def restore_config(host: Recoverer, seen: Look) -> list[esp.Entry]:
    """Bring manifest.git and the machine's identity in order; return what then belongs on the ESP."""
    config, found = seen.volumes["config"], seen.repository
    release = seen.release
    stale = found is None or not found.whole or (release is not None and not damage.runs(release, found))
    if found is not None and not stale and not seen.other_identity:
        return damage.entries_of(seen, found, seen.good)
    with _opened(host, config) as device, host.mounted(device, "ext4") as folder:
        git = folder / "manifest.git"
        let_change(folder)
        if seen.provisioned:
            lay_identity(host, folder, seen.provisioned)
        if not os.path.lexists(folder / "state"):
            lay_state(host, folder, volume=init.STATE in seen.volumes)
        # The last: without it this begins again, also where config was made anew and that was broken off.
        if found is None or stale:
            host.say("config: manifest.git")
            found = bring_in_order(host, seen, git)
        host.sync_file(folder)
        return damage.entries_of(seen, found, damage.good_of(git, found))


def bring_in_order(host: Recoverer, seen: Look, git: Path) -> repository.State:
    """Make manifest.git one that a boot takes, with a generation that the store can run."""
    release = seen.release
    new = damage.new_generation(release) if release else None
    found = repository.rebuild(host, git, seen.policy, new)
    if release and new and not damage.runs(release, found):
        generations.add(host, git, new)
        found = repository.look(git, seen.policy)
    return found


def lay_identity(host: Host, folder: Path, provisioned: Provisioned) -> None:
    """Lay the SUDI key of the new provisioning into config, whatever root left in its place."""
    sudi = folder / "sudi"
    if sudi.is_symlink() or not sudi.is_dir():
        remove(sudi)
        sudi.mkdir(mode=0o700)
    let_change(sudi)
    for name, content in provisioned.sudi:
        path = sudi / name
        _make_way(path)
        if not esp.holds(path, content):
            with host.replacing(path, mode=0o400) as fresh:
                fresh.write_bytes(content)


def lay_state(host: Host, folder: Path, *, volume: bool) -> None:
    """Give config what outlives the boots of a new machine, all of it at once."""
    fresh = folder / ".state.new"
    remove(fresh)
    fresh.mkdir(mode=0o700)
    state.make(host, fresh, volume=volume)
    fresh.rename(folder / "state")
    host.sync_file(folder)


def restore_esp(host: Recoverer, seen: Look, entries: list[esp.Entry]) -> None:
    """Make the EFI system partition anew if something is wrong with it, and no other partition."""
    part = seen.planned.named("esp")
    device = layout.device(seen.planned, part)
    if not esp.look(host, device, entries, seen.loader):
        return
    host.say("esp: boot loader and UKI")
    store = seen.volumes["store"]
    with (
        _opened(host, store, read_only=True) as mapped,
        host.mounted(mapped, "ext4", read_only=True) as folder,
    ):
        esp.make(host, device, part.uuid, entries, seen.loader, folder)


def read_back(host: Recoverer, seen: Look) -> None:
    """See that a boot would take what is on the disk, by what the boot itself calls."""
    host.say("reading everything back")
    check_headers(host, seen)
    config, store = seen.volumes["config"], seen.volumes["store"]
    with (
        _opened(host, config) as config_device,
        _opened(host, store, read_only=True) as store_device,
        _mounted(host, config_device) as config_folder,
        _mounted(host, store_device) as store_folder,
    ):
        machine = Elsewhere({init.CONFIG: config_folder, init.STORE: store_folder})
        found = repository.look(config_folder / "manifest.git", seen.policy)
        if seen.release is None:
            return
        policy = seen.policy._replace(uki_id=seen.release.uki_id, mode="run")
        manifest = init.load_manifest(machine, policy, init.Volumes((), (), dict.fromkeys(seen.volumes, "")))
        for target in init.boot_targets(manifest.contents):
            image = init.parse_image(init.read_blob(machine, target.digest, target.size, "IMAGE-DIGEST"))
            pairs = zip(image.layers, target.layer_signatures, strict=True)
            for index, (layer, signature) in enumerate(pairs):
                host.check_layer(machine, f"{OPENED}{target.service_name}-{index}", layer, signature)
        entries = damage.entries_of(seen, found, damage.good_of(config_folder / "manifest.git", found))
    device = layout.device(seen.planned, seen.planned.named("esp"))
    if fault := esp.look(host, device, entries, seen.loader):
        raise Failure(f"{seen.planned.disk.path} does not keep what is written to it ({fault}): use another")


@contextlib.contextmanager
def _mounted(host: Host, device: Path) -> Iterator[Path]:
    """Mount as the bring-up does, which looks at the superblock before."""
    with host.scratch() as folder:
        point = folder / "mounted"
        point.mkdir()
        init.mount_ext4(Quiet(), str(device), str(point), init.RO_STRICT)
        try:
            yield point
        finally:
            host.patiently(lambda: host.unmount(str(point)))


def check_headers(host: Recoverer, seen: Look) -> None:
    """See that headers are what a boot takes, and open by what its TPM will give."""
    provisioned = seen.provisioned
    for volume in seen.volumes.values():
        header = luks.read_header(host, volume.device, volume.kind)
        if header.note:
            raise init.Refused("LUKS-HEADER", expected="two copies that agree", seen=header.note)
        if provisioned is None:
            continue
        secret = bytearray(damage.key_of(provisioned, volume.name, volume.part.uuid))
        try:
            init.open_volume(host, header, str(volume.device), secret, None)
        finally:
            init.wipe(secret)
        if volume.name == "config":
            if damage.other_tokens(replace(volume, found=rekey.Found(header)), provisioned, seen.policy):
                raise init.Refused("LUKS-TOKEN", expected="the tokens of this machine", seen="others")
            install.check_tokens(provisioned, seen.policy)
