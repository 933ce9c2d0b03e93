"""The live medium against independent tools, and twice the same."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from mosinit import disk, init, keys, uki
from mosinit.host import Failure, Host

TOOLS = (
    "mkfs.erofs", "veritysetup", "sfdisk", "mkfs.vfat", "mcopy", "openssl", "faketime", "sbsign",
)  # fmt: skip


@pytest.fixture(scope="module")
def parts(keyset: keys.Keyset, tmp_path_factory: pytest.TempPathFactory) -> tuple[keys.Keyset, Path, Path]:
    """A keyset, something in the place of a UKI, something in the place of a release."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "uki.efi").write_bytes(b"MZ" + os.urandom(100_000))
    (folder / "release/blobs/sha256").mkdir(parents=True)
    (folder / "release/index.json").write_text("{}")
    (folder / "release/blobs/sha256/aa").write_bytes(os.urandom(3_000_000))
    return keyset, folder / "uki.efi", folder / "release"


@pytest.fixture
def medium(
    need: Callable[..., None], parts: tuple[keys.Keyset, Path, Path], host: Host, tmp_path: Path
) -> Path:
    need(*TOOLS)
    keyset, uki, release = parts
    disk.live_medium(host, uki, release, keyset, tmp_path / "live.raw")
    return tmp_path / "live.raw"


def partitions(medium: Path) -> tuple[init.Partition, ...]:
    raw = medium.read_bytes()
    return init.parse_gpt(raw[512:1024], raw[1024 : 1024 + 16384], 512, len(raw) // 512)


def cut(medium: Path, kind: str, target: Path) -> Path:
    (partition,) = [partition for partition in partitions(medium) if partition.kind == kind]
    target.write_bytes(medium.read_bytes()[partition.start : partition.start + partition.size])
    return target


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, check=True).stdout.decode()


def test_the_partitions_are_what_others_read(medium: Path) -> None:
    run("sfdisk", "--verify", medium)
    seen = json.loads(run("sfdisk", "--json", medium))["partitiontable"]["partitions"]
    assert [item["type"].lower() for item in seen] == [
        init.ESP_TYPE,
        init.LIVE_SEAL_TYPE,
        init.LIVE_STORE_TYPE,
    ]
    assert [item["uuid"].lower() for item in seen] == [partition.uuid for partition in partitions(medium)]


def test_the_esp_is_clean_and_holds_uki_and_certificates(
    medium: Path, parts: tuple[keys.Keyset, Path, Path], tmp_path: Path
) -> None:
    keyset, given, _ = parts
    esp = cut(medium, init.ESP_TYPE, tmp_path / "esp")
    run("fsck.vfat", "-n", esp)
    run("mcopy", "-i", esp, f"::{disk.UKI_PLACE}", tmp_path / "got.efi")
    assert (tmp_path / "got.efi").read_bytes() == given.read_bytes()
    run("mcopy", "-i", esp, "::EFI/BOOT/BOOTX64.EFI", tmp_path / "loader.efi")
    run("sbverify", "--cert", keyset.certificate_path("uki"), tmp_path / "loader.efi")
    assert {found.kind for found in find_binaries(esp, keyset)} == {"systemd-boot"}
    for name, role in disk.ENROLMENT.items():
        run("mcopy", "-n", "-o", "-i", esp, f"::keys/{name}.der", tmp_path / "der")
        seen = run(
            "openssl", "x509", "-inform", "DER", "-in", tmp_path / "der", "-noout", "-fingerprint", "-sha256"
        )
        expected = next(item["fingerprint"] for item in keyset.describe() if item["role"] == role)
        assert seen.partition("=")[2].strip().replace(":", "").lower() == expected.replace(":", "").lower()


def find_binaries(esp: Path, keyset: keys.Keyset) -> tuple[uki.Binary, ...]:
    """Return what db would start of an ESP."""
    db = [keyset.certificate_path(role) for role in ("uki", "layer")]
    return tuple(found for found in uki.check_signed_binaries(Host(), [esp], db) if found.accepted)


@pytest.mark.parametrize(("name", "signer", "roles"), disk.UPDATES)
def test_a_firmware_in_setup_mode_gets_signed_updates(
    name: str,
    signer: str,
    roles: tuple[str, ...],
    medium: Path,
    parts: tuple[keys.Keyset, Path, Path],
    tmp_path: Path,
) -> None:
    keyset, esp, update = parts[0], cut(medium, init.ESP_TYPE, tmp_path / "esp"), tmp_path / "update"
    run("mcopy", "-i", esp, f"::loader/keys/mosinit/{name}.auth", update)
    raw = update.read_bytes()
    # UEFI 2.10, 8.2.2, EFI_VARIABLE_AUTHENTICATION_2: time, length, revision, type, PKCS#7 GUID, signature.
    length, revision, kind = struct.unpack_from("<IHH", raw, 16)
    assert (revision, kind) == (0x0200, 0x0EF1)
    assert raw[24:40] == uuid.UUID("4aafd29d-68df-49ee-8aa9-347d375665a7").bytes_le
    time_of_signing, signature, content = raw[:16], raw[40 : 16 + length], raw[16 + length :]
    assert time_of_signing == struct.pack("<H6BIHBB", 2025, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)
    certificates = [keyset.certificate(role) for role in roles]
    expected = [hashlib.sha256(each.public_bytes(Encoding.DER)).hexdigest() for each in certificates]
    assert sorted(init.parse_signature_database(content)) == sorted(expected)
    # Section 8.2.6: what is signed is name, vendor, attributes, time and content.
    vendor = init.EFI_GLOBAL if name in ("PK", "KEK") else init.EFI_IMAGE_SECURITY
    signed = name.encode("utf-16-le") + uuid.UUID(vendor).bytes_le + struct.pack("<I", 0x27)
    (tmp_path / "signed").write_bytes(signed + time_of_signing + content)
    # The firmware wants bare SignedData; openssl wants it wrapped (RFC 5652, section 3).
    inner = b"\xa0" + der_length(len(signature)) + signature
    wrapped = bytes.fromhex("06092a864886f70d010702") + inner
    (tmp_path / "signature").write_bytes(b"\x30" + der_length(len(wrapped)) + wrapped)
    run("openssl", "smime", "-verify", "-binary", "-inform", "DER", "-in", tmp_path / "signature",
        "-content", tmp_path / "signed", "-CAfile", keyset.certificate_path(signer), "-purpose", "any",
        "-partial_chain", "-no_check_time", "-out", tmp_path / "verified")  # fmt: skip


def der_length(size: int) -> bytes:
    """Encode a length of DER's long form (X.690, 8.1.3.5)."""
    return b"\x82" + size.to_bytes(2, "big")


def test_the_store_verifies_with_the_seal_and_the_seal_with_the_layer_key(
    medium: Path, parts: tuple[keys.Keyset, Path, Path], tmp_path: Path
) -> None:
    store = cut(medium, init.LIVE_STORE_TYPE, tmp_path / "store")
    seal = init.parse_live_seal(cut(medium, init.LIVE_SEAL_TYPE, tmp_path / "seal").read_bytes())
    offset = str(seal.data_blocks * init.BLOCK)
    verify = ["veritysetup", "verify", "--hash-offset", offset, str(store), str(store), seal.root_hash]
    run(*verify)
    dump = run("veritysetup", "dump", "--hash-offset", offset, store)
    assert init.live_store_salt(seal.data_blocks) in dump.replace(" ", "")
    (tmp_path / "signature").write_bytes(seal.signature)
    (tmp_path / "root").write_text(seal.root_hash)
    certificate = parts[0].certificate_path("layer")
    names = [str(tmp_path / name) for name in ("signature", "root")]
    check = ["openssl", "smime", "-verify", "-binary", "-inform", "DER", "-in", names[0],
             "-content", names[1], "-certfile", str(certificate), "-nointern", "-noverify"]  # fmt: skip
    run(*check)
    (tmp_path / "root").write_text(seal.root_hash[:-1] + ("0" if seal.root_hash[-1] != "0" else "1"))
    with pytest.raises(subprocess.CalledProcessError):
        run(*check)
    data = store.read_bytes()
    store.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    with pytest.raises(subprocess.CalledProcessError):
        run(*verify)


def test_the_seal_is_what_the_core_reads() -> None:
    seal = init.LiveSeal(77, "ab" * 32, b"signature")
    encoded = disk.encode_live_seal(seal)
    assert len(encoded) == disk.SEAL_BYTES
    assert init.parse_live_seal(encoded) == seal
    with pytest.raises(Failure, match="use a smaller key"):
        disk.encode_live_seal(seal._replace(signature=bytes(disk.SEAL_BYTES)))


def test_twice_the_same_and_only_the_store_of_another_release_differs(
    medium: Path, parts: tuple[keys.Keyset, Path, Path], host: Host, tmp_path: Path
) -> None:
    keyset, uki, release = parts
    again = tmp_path / "elsewhere/again.raw"
    again.parent.mkdir()
    time.sleep(2.1)  # FAT's clock ticks in two seconds
    disk.live_medium(host, uki, release, keyset, again)
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(medium.read_bytes()).digest()
    other = tmp_path / "other"
    (other / "blobs").mkdir(parents=True)
    (other / "index.json").write_text("[]")
    disk.live_medium(host, uki, other, keyset, again)
    esp, seal, store = partitions(medium)
    new_esp, new_seal, new_store = partitions(again)
    assert (new_esp, again.read_bytes()[:440]) == (esp, medium.read_bytes()[:440])
    assert new_store.uuid != store.uuid
    assert new_seal.uuid != seal.uuid


def test_no_release_no_medium(parts: tuple[keys.Keyset, Path, Path], host: Host, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="publish a release there first"):
        disk.live_medium(host, parts[1], tmp_path, parts[0], tmp_path / "live.raw")
    assert os.listdir(tmp_path) == []


def test_the_store_holds_the_release(
    medium: Path, parts: tuple[keys.Keyset, Path, Path], need: Callable[..., None], tmp_path: Path
) -> None:
    need("fsck.erofs")
    store = cut(medium, init.LIVE_STORE_TYPE, tmp_path / "store")
    run("fsck.erofs", f"--extract={tmp_path}/out", "--no-preserve", store)
    release, out = parts[2], tmp_path / "out" / init.REPOSITORY
    files = [path.relative_to(release) for path in release.rglob("*") if path.is_file()]
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == set(files)
    assert all((release / path).read_bytes() == (out / path).read_bytes() for path in files)


@pytest.mark.parametrize("mebibytes", [1, 31, 33, 100])
def test_a_uki_of_any_size_fits(
    mebibytes: int,
    parts: tuple[keys.Keyset, Path, Path],
    need: Callable[..., None],
    host: Host,
    tmp_path: Path,
) -> None:
    need("mkfs.vfat", "mcopy", "fsck.vfat")
    uki = tmp_path / "uki.efi"
    uki.write_bytes(b"")
    os.truncate(uki, mebibytes * init.MIB - 1)
    esp = disk.make_esp(host, {disk.UKI_PLACE: uki, "keys/PK.der": b"PK"}, tmp_path / "esp", 64 * "a")
    run("fsck.vfat", "-n", esp)
    assert esp.read_bytes()[82:90] == b"FAT32   "
    assert esp.stat().st_size < max(36 * init.MIB, (mebibytes + 8) * init.MIB)


def test_a_failure_leaves_the_earlier_medium_as_it_was(
    medium: Path, parts: tuple[keys.Keyset, Path, Path], host: Host
) -> None:
    before = medium.read_bytes()
    bad = disk.Part("no type", "odd", parts[1], 64 * "a")
    with pytest.raises(Failure, match="sfdisk failed"):
        disk.write_disk(host, [bad], 64 * "b", medium)
    assert medium.read_bytes() == before
    assert os.listdir(medium.parent) == [medium.name]
