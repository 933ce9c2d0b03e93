"""The firmware's variables: virt-firmware reads back what is enrolled; sfdisk and mtools make media."""

from __future__ import annotations

import datetime
import json
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from mosinit import firmware, init
from mosinit.host import Failure, Host

Need = Callable[..., None]
ON, OFF = b"\x01", b"\x00"


def certificate(name: str) -> x509.Certificate:
    """Make a certificate that nothing else knows."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    start = datetime.datetime(2025, 1, 1)
    return (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )


@pytest.fixture(scope="module")
def ours() -> firmware.Certificates:
    """The certificates of one organisation."""
    names = ("PK", "KEK", "uki", "layer")
    pk, kek, *db = (certificate(name) for name in names)
    return firmware.Certificates(pk, kek, tuple(db))


@pytest.fixture
def ovmf(need: Need) -> None:
    """What writes and reads variables."""
    need("virt-fw-vars", firmware.TEMPLATE)


def variables(path: Path) -> dict[str, tuple[int, bytes]]:
    """Read a variable file back: name to attributes and data."""
    out = path.with_suffix(".json")
    subprocess.run(["virt-fw-vars", "-i", path, "--output-json", out], check=True, capture_output=True)
    rows = json.loads(out.read_text())["variables"]
    return {row["name"]: (row["attr"], bytes.fromhex(row["data"])) for row in rows}


def in_list(data: bytes) -> list[bytes]:
    """Take the DER certificates out of a signature database, with virt-firmware's own parser."""
    from virt.firmware.efi import siglist

    return [bytes(signature["data"]) for entry in siglist.EfiSigDB(data) for signature in entry]


def der(*certificates: x509.Certificate) -> list[bytes]:
    return [each.public_bytes(Encoding.DER) for each in certificates]


@pytest.mark.usefixtures("ovmf")
def test_enrolled_firmware_trusts_exactly_what_was_given(
    host: Host, tmp_path: Path, ours: firmware.Certificates
) -> None:
    firmware.enroll(host, tmp_path / "new/vars.fd", ours)
    found = variables(tmp_path / "new/vars.fd")
    assert in_list(found["PK"][1]) == der(ours.pk)
    assert in_list(found["KEK"][1]) == der(ours.kek)
    assert in_list(found["db"][1]) == der(*ours.db)
    assert found["SecureBootEnable"][1] == ON
    assert not [name for name in found if name.startswith("Mok")]


@pytest.mark.usefixtures("ovmf")
def test_secure_boot_off_keeps_the_certificates(
    host: Host, tmp_path: Path, ours: firmware.Certificates
) -> None:
    firmware.enroll(host, tmp_path / "vars.fd", ours, secure_boot=False)
    found = variables(tmp_path / "vars.fd")
    assert found["SecureBootEnable"][1] == OFF
    assert in_list(found["db"][1]) == der(*ours.db)


@pytest.mark.usefixtures("ovmf")
def test_foreign_entries_are_there_when_a_test_wants_them(
    host: Host, tmp_path: Path, ours: firmware.Certificates
) -> None:
    foreign = certificate("foreign")
    more = replace(ours, db=(*ours.db, foreign))
    firmware.enroll(host, tmp_path / "vars.fd", more, variables=[firmware.mok_list(foreign)])
    found = variables(tmp_path / "vars.fd")
    assert in_list(found["db"][1]) == der(*ours.db, foreign)
    attributes, data = found["MokListRT"]
    assert (attributes, in_list(data)) == (7, der(foreign))


@pytest.mark.usefixtures("ovmf")
def test_two_enrolments_are_equal(host: Host, tmp_path: Path, ours: firmware.Certificates) -> None:
    # PCR 7 is a digest of these: it must depend on the certificates alone.
    for name in ("a.fd", "b.fd"):
        firmware.enroll(host, tmp_path / name, ours)
    assert (tmp_path / "a.fd").read_bytes() == (tmp_path / "b.fd").read_bytes()
    assert uuid.uuid5(uuid.NAMESPACE_DNS, "secure-boot.mosinit") == uuid.UUID(firmware.OWNER)


@pytest.mark.usefixtures("ovmf")
def test_a_failed_enrolment_leaves_nothing(host: Host, tmp_path: Path, ours: firmware.Certificates) -> None:
    bad = firmware.Variable("X", "no guid", b"")
    with pytest.raises(Failure, match="virt-fw-vars"):
        firmware.enroll(host, tmp_path / "vars.fd", ours, variables=[bad])
    assert list(tmp_path.iterdir()) == []


def test_signature_list_is_what_uefi_defines(ours: firmware.Certificates) -> None:
    data = firmware.signature_list(ours.pk)
    assert data[:16] == uuid.UUID(firmware.X509_GUID).bytes_le
    assert int.from_bytes(data[16:20], "little") == len(data)
    assert int.from_bytes(data[24:28], "little") == 16 + len(der(ours.pk)[0])
    assert data[44:] == der(ours.pk)[0]


# --- Certificates of a keyset and of a medium --------------------------------------------------------


def test_a_keyset_needs_no_private_keys(tmp_path: Path, ours: firmware.Certificates) -> None:
    for name, each in zip(("PK", "KEK", "uki", "layer"), (ours.pk, ours.kek, *ours.db), strict=True):
        (tmp_path / f"{name}.pem").write_bytes(each.public_bytes(Encoding.PEM))
    assert firmware.certificates_of_keyset(tmp_path) == ours


def test_a_folder_that_is_no_keyset_is_named(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"PK\.pem .*is no keyset"):
        firmware.certificates_of_keyset(tmp_path)


def medium(path: Path, files: dict[str, bytes], esps: int = 1) -> Path:
    """Make a raw image whose first ESP has these files in `keys/`."""
    path.write_bytes(b"")
    subprocess.run(["truncate", "--size=16M", path], check=True)
    rows = "".join(f"start={2048 + 8192 * n}, size=8192, type={firmware.ESP_TYPE}\n" for n in range(esps))
    table = f"label: gpt\nstart={2048 + 8192 * esps}, size=2048\n{rows}"
    subprocess.run(["sfdisk", "--quiet", path], input=table.encode(), check=True)
    image = f"{path}@@1M"
    subprocess.run(["mformat", "-i", image, "-T", "8192", "-h", "16", "-s", "32", "::"], check=True)
    subprocess.run(["mmd", "-i", image, "::keys"], check=True)
    for name, data in files.items():
        subprocess.run(["mcopy", "-i", image, "-", f"::keys/{name}"], input=data, check=True)
    return path


@pytest.fixture
def offered(need: Need, ours: firmware.Certificates) -> dict[str, bytes]:
    """The files that a live medium carries for enrolment."""
    need("sfdisk", "mformat", "mtype")
    names = ("PK.der", "KEK.der", "db-uki.der", "db-layer.der")
    return dict(zip(names, der(ours.pk, ours.kek, *ours.db), strict=True))


def test_a_medium_offers_its_certificates(
    host: Host, tmp_path: Path, offered: dict[str, bytes], ours: firmware.Certificates
) -> None:
    assert firmware.certificates_of_medium(host, medium(tmp_path / "live.raw", offered)) == ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"KEK.der": None}, r"offers no keys/KEK\.der.*--keys"),
        ({"db-uki.der": b"no certificate"}, "db-uki of the ESP .* cannot be read"),
        ({"PK.der": b"\x30" * 20000}, "PK of the ESP .* more than 16384 bytes"),
    ],
)
def test_a_medium_with_bad_certificates_is_refused(
    host: Host, tmp_path: Path, offered: dict[str, bytes], change: dict[str, bytes | None], message: str
) -> None:
    files = {name: data for name, data in (offered | change).items() if data is not None}
    with pytest.raises(Failure, match=message):
        firmware.certificates_of_medium(host, medium(tmp_path / "live.raw", files))


def test_a_medium_with_two_esps_is_refused(host: Host, tmp_path: Path, offered: dict[str, bytes]) -> None:
    with pytest.raises(Failure, match="2 EFI system partitions"):
        firmware.certificates_of_medium(host, medium(tmp_path / "live.raw", offered, esps=2))


def test_a_disk_without_partitions_is_refused(host: Host, tmp_path: Path, need: Need) -> None:
    need("sfdisk")
    disk = tmp_path / "empty.raw"
    disk.write_bytes(bytes(1 << 20))
    with pytest.raises(Failure, match="no partition table.*--keys"):
        firmware.certificates_of_medium(host, disk)


@pytest.mark.usefixtures("ovmf")
def test_firmware_in_setup_mode_trusts_nobody(host: Host, tmp_path: Path) -> None:
    entry = firmware.Variable("Boot0007", init.EFI_GLOBAL, b"somebody's")
    firmware.empty(host, tmp_path / "vars", (entry,))
    found = variables(tmp_path / "vars")
    assert found["Boot0007"] == (entry.attributes, entry.data)
    assert not {"PK", "KEK", "db", "SecureBootEnable"} & set(found)
