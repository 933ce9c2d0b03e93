"""The `build` verb: from a keyset to a medium that boots, every part beside it in one folder.

kernel/             the kernel and its modules, from mkosi
live.cpio.zst       the frozen bring-up of live mode: what boots a medium
run.cpio.zst        that of run mode: what boots an installed machine
live.policy.json, run.policy.json    what those check by: build-initrd.sh makes them again of it
live.efi, run.efi   the UKIs, signed
bootkit/            the UKI of run mode and the kernel's modules, an OCI layout
hostfs/             the root file system, an OCI layout, from mkosi
manifest.yaml       what a person would write
release/            manifest, signatures and images, published
live.raw            the live medium
build.json          what all of it was made from: a second call with the same inputs does nothing
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mosinit import __version__, disk, hostfs, images, init, initrd, keys, publish, registry, tools, uki
from mosinit.host import Failure, Host
from mosinit.tools import checkout

INPUTS = ("build-initrd.sh", "mkosi.", "mosinit", "mosinit.py")


@dataclass(frozen=True)
class Bootable:
    """What every medium and machine of a keyset starts from."""

    kernel: hostfs.KernelTree
    initrds: Mapping[str, initrd.Initrd]  # by mode: live, run
    ukis: Mapping[str, uki.Uki]
    bootkit: Path


def build(
    host: Host,
    keyset_folder: Path,
    out: Path,
    epoch: int | None = None,
    *,
    sequence: int = 1,
    manifest: Path | None = None,
    profile: str | None = None,
    installer_keys: Path | None = None,
    registry_ca: Path | None = None,
) -> dict[str, object]:
    """Build everything; returns paths, sizes in bytes and ids.

    Without an `epoch` it is the keyset's, without a `manifest` of the caller's the medium carries hostfs and
    bootkit alone, without `installer_keys` nobody installs by SSH; `registry_ca` is one more CA that
    registries may have their certificate from. Raises `Failure`, `Refused`.
    """
    keyset = keys.open_keyset(host, keyset_folder)
    epoch = keys.choose_epoch(epoch, keyset.epoch)
    keys.check_out(out, keyset.folder)
    if out.exists() and not out.is_dir():
        raise Failure(f"{out} is not a folder: name another one with --out")
    if profile is not None:
        hostfs.check_profile(profile)
    ssh = hostfs.read_installer_keys(installer_keys) if installer_keys else b""
    ca = registry.read_ca(registry_ca, "--registry-ca") if registry_ca else b""
    if manifest is not None:
        sequence = check_manifest(manifest, out, epoch).sequence
    out.mkdir(parents=True, exist_ok=True)
    key = inputs_key(keyset, manifest, [epoch, sequence, profile, ssh.decode(), ca.decode()])
    done = _read_record(out / "build.json", key)
    if done is not None:
        host.say(f"{out} holds this very build already")
        return done
    (out / "build.json").unlink(missing_ok=True)
    bootable = make_bootable(host, keyset, out, epoch)
    host.say("hostfs")
    hostfs.build(host, out, profile, installer_keys=ssh, registry_ca=ca)
    written = manifest or _write_manifest(host, out, keyset.product, epoch, sequence)
    release = out / "release"
    # A build makes all that is in its folder anew, whatever the sequence.
    cache = images.open_cache(host)
    published = publish.publish(host, written, keyset, f"oci:{release}", cache=cache, anew=True)
    host.say("live medium")
    disk.live_medium(host, bootable.ukis["live"].path, release, keyset, out / "live.raw")
    record = {
        "key": key,
        **_describe(bootable, out / "live.raw"),
        "release": str(release),
        "manifest_sha256": published.manifest_sha256,
        "sequence": sequence,
        "epoch": epoch,
    }
    with host.replacing(out / "build.json") as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
    return record


def _describe(bootable: Bootable, medium: Path) -> dict[str, object]:
    """Return where medium and UKIs lie, their sizes in bytes, and the ids of the UKIs."""
    return {
        "medium": str(medium),
        "medium_bytes": medium.stat().st_size,
        "ukis": {mode: str(made.path) for mode, made in bootable.ukis.items()},
        "uki_ids": {mode: made.uki_id for mode, made in bootable.ukis.items()},
        "uki_bytes": {mode: made.path.stat().st_size for mode, made in bootable.ukis.items()},
        "initrd_bytes": {mode: made.path.stat().st_size for mode, made in bootable.initrds.items()},
        "kernel": bootable.kernel.version,
    }


def check_manifest(manifest: Path, out: Path, epoch: int) -> init.Contents:
    """Read the caller's manifest; refuse what could only fail, or be refused at boot, after a long build."""
    contents = publish.read_written(manifest)
    if contents.epoch < epoch:
        raise Failure(
            f"{manifest} is of epoch {contents.epoch}, and a UKI of epoch {epoch} refuses it: write "
            f"`epoch: {epoch}` into it, or build with --epoch {contents.epoch}"
        )
    for target in contents.targets:
        kind, _, place = target.source.partition(":")
        path = manifest.parent / place.partition(":")[0]
        # Two are made by the build itself.
        made = path.absolute().parent == out.absolute() and path.name in ("hostfs", "bootkit")
        if kind != "docker" and not path.exists() and not made:
            raise Failure(
                f"{manifest}: {target.source} of {target.service_name} is not there (paths begin at "
                f"{manifest.absolute().parent})"
            )
    return contents


def make_bootable(host: Host, keyset: keys.Keyset, out: Path, epoch: int) -> Bootable:
    """Build the kernel, initrd and UKI of each mode, and the bootkit."""
    host.say("kernel and modules")
    kernel = hostfs.kernel(host, out)
    initrds, ukis = {}, {}
    for mode in ("live", "run"):
        host.say(f"initrd and UKI of {mode} mode")
        packed = out / f"{mode}.cpio.zst"
        initrds[mode] = initrd.build(
            host, kernel, keyset, packed, mode=mode, epoch=epoch, cmdline=uki.CMDLINE
        )
        ukis[mode] = uki.build(host, kernel, initrds[mode], keyset, out / f"{mode}.efi")
    host.say("bootkit")
    shutil.rmtree(out / "bootkit", ignore_errors=True)
    layout = images.Layout(out / "bootkit")
    layout.write_index(host, [uki.bootkit(host, kernel, ukis, layout)])
    return Bootable(kernel, initrds, ukis, out / "bootkit")


def _write_manifest(host: Host, out: Path, product: str, epoch: int, sequence: int) -> Path:
    """Write the manifest that a person would for hostfs and bootkit alone."""
    lines = ["version: 1", f"product: {product}", f"sequence: {sequence}", f"epoch: {epoch}"]
    lines += ["update_type: complete", "targets:"]
    for name in ("hostfs", "bootkit"):
        lines += [f"  - service_name: {name}", f"    service_type: {name}", f"    source: oci:./{name}"]
        lines += [f'    version: "{__version__}"'] + (["    writable: all"] if name == "hostfs" else [])
    with host.replacing(out / "manifest.yaml") as path:
        path.write_text("\n".join(lines) + "\n")
    return out / "manifest.yaml"


def inputs_key(keyset: keys.Keyset, manifest: Path | None, words: list[object]) -> str:
    """Name everything that a build depends on, in 64 hex digits."""
    root = checkout()
    digest = hashlib.sha256(tools.key().encode())
    names = sorted(name for name in os.listdir(root) if name.startswith(INPUTS))
    files = [path for name in names for path in sorted([root / name, *(root / name).rglob("*")])]
    for path in files:
        if path.is_file() and "__pycache__" not in path.parts and "mkosi.sandbox" not in path.parts:
            digest.update(f"{path.relative_to(root)}\0{path.stat().st_mode}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(json.dumps([role["fingerprint"] for role in keyset.describe()]).encode())
    digest.update(b"" if manifest is None else manifest.read_bytes())
    digest.update(json.dumps([*words, initrd.revoked(keyset)]).encode())
    return digest.hexdigest()


def _read_record(path: Path, key: str) -> dict[str, object] | None:
    """Return what an earlier build wrote, if it was made from the same and its files are still there."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("key") != key:
        return None
    files = [record.get("medium"), record.get("release"), *dict(record.get("ukis", {})).values()]
    whole = all(Path(str(file)).exists() for file in files)
    return record if whole else None
