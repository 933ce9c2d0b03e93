"""The live medium: one raw GPT image that a machine boots from and that holds a whole release.

1. ESP, FAT32: systemd-boot, signed, as EFI/BOOT/BOOTX64.EFI; the UKI; certificates for the firmware's setup
   in keys/*.der, and signed updates of its variables where systemd-boot offers them in setup mode.
2. Seal: number of data blocks and root hash of the store, signed by the layer key.
3. Store: an erofs image with the release at mosinit/ and the signed systemd-boot at boot/, for the disks of
   machines; dm-verity superblock, hash tree.

Every id is made of content, so the same input gives the same bytes; those of the disk and the ESP are made
of the UKI alone, so that media with the same UKI are the same disk to a machine.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from cryptography.hazmat.primitives.serialization import Encoding

from mosinit import firmware, images, init
from mosinit.host import Failure, Host
from mosinit.keys import Keyset, Signer

SECTOR = 512
# FAT32 means 65525 clusters at least (Microsoft's FAT specification); ours are of one sector.
SMALLEST_ESP = 34 * init.MIB
SEAL_BYTES = 16384
BOOT_LOADER = Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi")
STORED_LOADER = "boot/systemd-bootx64.efi"
UKI_PLACE = "EFI/Linux/mosinit.efi"
# No menu, unless the bring-up asks for one (in setup mode) or somebody holds a key; no other systems; and
# keys are enrolled by a person who chooses that in the menu, never by themselves.
LOADER_CONF = b"timeout 0\neditor no\nauto-entries no\nsecure-boot-enroll manual\n"
ENROLMENT = {"PK": "PK", "KEK": "KEK", "db-uki": "uki", "db-layer": "layer"}
# In the order of trust: which variable, who signs its update, whose certificates it holds.
UPDATES = (("PK", "PK", ("PK",)), ("KEK", "PK", ("KEK",)), ("db", "KEK", ("uki", "layer")))
# FAT has no dates before 1980, and nobody reads these.
EPOCH = 315532800


@dataclass(frozen=True)
class Store:
    """A store image: its file, what the seal partition says about it, and its root hash in hex."""

    path: Path
    seal: bytes
    root_hash: str


@dataclass(frozen=True)
class Part:
    """A partition to be written: its type and content, and what its UUID is made of (hex)."""

    kind: str
    name: str
    content: Path
    identity: str


def live_medium(host: Host, uki: Path, release: Path, keyset: Keyset, target: Path) -> None:
    """Write the live medium of a release; `target` appears when it is whole."""
    if not (release / "index.json").is_file():
        raise Failure(f"{release} is no OCI image layout: publish a release there first")
    identity = _hex(b"mosinit live medium", images.digest_file(uki)[0].encode())
    target.parent.mkdir(parents=True, exist_ok=True)
    with host.scratch(near=target) as folder:
        files = esp_files(uki, keyset, folder)
        esp = make_esp(host, files, folder / "esp", identity)
        more = {STORED_LOADER: folder / "boot.efi"}
        store = seal_store(host, release, keyset.signer("layer"), folder / "store", more)
        (folder / "seal").write_bytes(store.seal)
        parts = [
            Part(init.ESP_TYPE, "esp", esp, _hex(b"esp", identity.encode())),
            Part(init.LIVE_SEAL_TYPE, "live-seal", folder / "seal", _hex(b"seal", store.seal)),
            Part(init.LIVE_STORE_TYPE, "live-store", store.path, _hex(b"store", store.root_hash.encode())),
        ]
        write_disk(host, parts, identity, target)


def _hex(purpose: bytes, content: bytes) -> str:
    return hashlib.sha256(purpose + b"\0" + content).hexdigest()


# --- ESP ----------------------------------------------------------------------------------------------


def esp_files(uki: Path, keyset: Keyset, folder: Path) -> dict[str, bytes | Path]:
    """Return what lies on the EFI system partition: signed boot loader, UKI, keys to enrol."""
    if not BOOT_LOADER.is_file():
        raise Failure(f"cannot read {BOOT_LOADER}: install systemd-boot-efi")
    # Every db that starts our UKIs starts this loader too, from whichever medium: it decides nothing.
    keyset.signer("uki").sign_pe(BOOT_LOADER, folder / "boot.efi")
    certificates = {name: keyset.certificate(role) for name, role in ENROLMENT.items()}
    ders = {f"keys/{name}.der": each.public_bytes(Encoding.DER) for name, each in certificates.items()}
    updates = {
        f"loader/keys/mosinit/{name}.auth": firmware.signed_update(
            keyset.signer(signer),
            name,
            b"".join(firmware.signature_list(keyset.certificate(role)) for role in roles),
        )
        for name, signer, roles in UPDATES
    }
    loader: dict[str, bytes | Path] = {
        "EFI/BOOT/BOOTX64.EFI": folder / "boot.efi",
        "loader/loader.conf": LOADER_CONF,
    }
    return {**loader, UKI_PLACE: uki, **ders, **updates}


def make_esp(host: Host, files: Mapping[str, bytes | Path], target: Path, identity: str) -> Path:
    """Make the EFI system partition with these files; `identity` gives its volume id."""
    used = sum(len(item) if isinstance(item, bytes) else item.stat().st_size for item in files.values())
    # A fortieth for the two allocation tables (4 bytes per sector each), rounded up generously.
    size = max(SMALLEST_ESP, _round_up(used * 21 // 20 + init.MIB, init.MIB))
    with target.open("wb") as file:
        file.truncate(size)
    host.run(
        ["mkfs.vfat", "-F32", "-s1", f"-S{SECTOR}", f"-i{identity[:8]}", "-nESP", target],
        env=_fixed_time(),
    )
    folders = sorted({str(parent) for place in files for parent in PurePath(place).parents} - {"."})
    host.run(["mmd", "-i", target, *(f"::{folder}" for folder in folders)], env=_fixed_time())
    with host.scratch(near=target) as folder:
        for place, content in files.items():
            # One file at a time, and a copy with a date of ours: the order and dates of a folder are chance.
            copy = folder / "copy"
            if isinstance(content, Path):
                shutil.copyfile(content, copy)
            else:
                copy.write_bytes(content)
            os.utime(copy, (EPOCH, EPOCH))
            host.run(["mcopy", "-m", "-i", target, copy, f"::{place}"], env=_fixed_time())
    return target


def _fixed_time() -> dict[str, str]:
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "LC_ALL": "C.UTF-8", "TZ": "UTC", "SOURCE_DATE_EPOCH": str(EPOCH)}


# --- Store and seal -----------------------------------------------------------------------------------


def seal_store(
    host: Host, release: Path, signer: Signer, target: Path, more: Mapping[str, Path] | None = None
) -> Store:
    """Make a store of an OCI layout, whatever it holds, and `more` files; have `signer` vouch for it."""
    with host.scratch(near=target) as folder:
        tar = folder / "store.tar"
        _stage_store(release, folder / "store", more or {})
        with tar.open("wb") as file:
            # The modes of a release are those that its publisher's umask left.
            images.write_tar(folder / "store", file, modes=False)
        images.make_erofs(host, tar, target)
    blocks = target.stat().st_size // init.BLOCK
    name = images.digest_file(target)[0].removeprefix("sha256:")
    root_hash = images.append_verity(host, target, salt=init.live_store_salt(blocks), name=name)
    signature = signer.sign_pkcs7(root_hash.encode())
    return Store(target, encode_live_seal(init.LiveSeal(blocks, root_hash, signature)), root_hash)


def _stage_store(release: Path, target: Path, more: Mapping[str, Path]) -> None:
    """Put together what a store holds."""

    def place(source: str, copy: str) -> None:
        try:
            os.link(source, copy)
        except OSError:  # another file system
            shutil.copyfile(source, copy)

    target.mkdir()
    shutil.copytree(release, target / init.REPOSITORY, copy_function=place)
    for name, source in more.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / name)


def encode_live_seal(seal: init.LiveSeal) -> bytes:
    """Return the seal partition's content; `init.parse_live_seal` reads it."""
    root = bytes.fromhex(seal.root_hash)
    checksum = init.live_seal_checksum(seal.data_blocks, root, seal.signature)
    header = init.LIVE_SEAL.pack(
        init.LIVE_SEAL_MAGIC, 1, len(seal.signature), seal.data_blocks, root, checksum
    )
    if len(header) + len(seal.signature) > SEAL_BYTES:
        raise Failure("the layer key's signature is longer than a seal can hold: use a smaller key")
    return (header + seal.signature).ljust(SEAL_BYTES, b"\0")


# --- The disk -----------------------------------------------------------------------------------------


def write_disk(host: Host, parts: list[Part], identity: str, target: Path) -> None:
    """Write a GPT disk image with these partitions, each from the next whole MiB on."""
    lines = ["label: gpt", f"label-id: {images.uuid_of(identity)}", "unit: sectors", "first-lba: 2048"]
    starts, start = [], init.MIB
    for part in parts:
        size = _round_up(part.content.stat().st_size, init.BLOCK)
        lines.append(
            f"start={start // SECTOR}, size={size // SECTOR}, type={part.kind}, name={part.name}, "
            f"uuid={images.uuid_of(part.identity)}"
        )
        starts.append(start)
        start = _round_up(start + size, init.MIB)
    with host.replacing(target) as fresh:
        os.truncate(fresh, start + init.MIB)  # the last MiB holds the second GPT
        script = "".join(f"{line}\n" for line in lines).encode()
        host.run(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", fresh], stdin=script)
        with fresh.open("r+b") as disk:
            for part, offset in zip(parts, starts, strict=True):
                disk.seek(offset)
                with part.content.open("rb") as content:
                    shutil.copyfileobj(content, disk, images.CHUNK)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
