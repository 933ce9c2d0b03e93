"""The `build` verb: from a keyset to a medium that boots, every part beside it in one folder.

kernel/             the kernel and its modules, from mkosi
initrd.cpio.zst     the frozen bring-up
mosinit.efi         the UKI, signed
bootkit/            UKI and modules, an OCI layout
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
from dataclasses import dataclass
from pathlib import Path

from mosinit import __version__, disk, hostfs, images, initrd, keys, publish, tools, uki
from mosinit.host import Failure, Host
from mosinit.tools import checkout

INPUTS = ("build-initrd.sh", "mkosi.", "mosinit", "mosinit.py")


@dataclass(frozen=True)
class Bootable:
    """What every medium and machine of a keyset starts from."""

    kernel: hostfs.KernelTree
    initrd: initrd.Initrd
    uki: uki.Uki
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
) -> dict[str, object]:
    """Build everything; returns paths, sizes in bytes and ids.

    Without an `epoch` it is the keyset's, without a `manifest` of the caller's the medium carries hostfs and
    bootkit alone. Raises `Failure`, `Refused`.
    """
    keyset = keys.open_keyset(host, keyset_folder)
    epoch = keys.choose_epoch(epoch, keyset.epoch)
    keys.check_out(out, keyset.folder)
    if out.exists() and not out.is_dir():
        raise Failure(f"{out} is not a folder: name another one with --out")
    out.mkdir(parents=True, exist_ok=True)
    key = inputs_key(keyset, manifest, [epoch, sequence, profile])
    done = _read_record(out / "build.json", key)
    if done is not None:
        host.say(f"{out} holds this very build already")
        return done
    (out / "build.json").unlink(missing_ok=True)
    bootable = make_bootable(host, keyset, out, epoch)
    host.say("hostfs")
    hostfs.build(host, out, profile)
    written = manifest or _write_manifest(host, out, keyset.product, epoch, sequence)
    release = out / "release"
    published = publish.publish(host, written, keyset, f"oci:{release}", cache=images.open_cache(host))
    host.say("live medium")
    disk.live_medium(host, bootable.uki.path, release, keyset, out / "live.raw")
    record = {
        "key": key,
        "medium": str(out / "live.raw"),
        "medium_bytes": (out / "live.raw").stat().st_size,
        "uki": str(bootable.uki.path),
        "uki_id": bootable.uki.uki_id,
        "uki_bytes": bootable.uki.path.stat().st_size,
        "initrd_bytes": bootable.initrd.path.stat().st_size,
        "kernel": bootable.kernel.version,
        "release": str(release),
        "manifest_sha256": published.manifest_sha256,
        "sequence": sequence,
        "epoch": epoch,
    }
    with host.replacing(out / "build.json") as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
    return record


def make_bootable(host: Host, keyset: keys.Keyset, out: Path, epoch: int) -> Bootable:
    """Build kernel, initrd, UKI and bootkit of live mode."""
    host.say("kernel and modules")
    kernel = hostfs.kernel(host, out)
    host.say("initrd")
    packed = initrd.build(
        host, kernel, keyset, out / "initrd.cpio.zst", mode="live", epoch=epoch, cmdline=uki.LIVE_CMDLINE
    )
    host.say("UKI and bootkit")
    made = uki.build(host, kernel, packed, keyset, out / "mosinit.efi")
    shutil.rmtree(out / "bootkit", ignore_errors=True)
    layout = images.Layout(out / "bootkit")
    layout.write_index(host, [uki.bootkit(host, kernel, made, layout)])
    return Bootable(kernel, packed, made, out / "bootkit")


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
    digest.update(json.dumps(words).encode())
    return digest.hexdigest()


def _read_record(path: Path, key: str) -> dict[str, object] | None:
    """Return what an earlier build wrote, if it was made from the same and its files are still there."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("key") != key:
        return None
    whole = all(Path(str(record.get(name))).exists() for name in ("medium", "uki", "release"))
    return record if whole else None
