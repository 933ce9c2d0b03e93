"""The firmware's variables: a file for OVMF with the Secure Boot certificates of one organisation in it.

PK, KEK and db hold exactly the certificates that are given; no vendor's are added. The owner GUID of the
entries is a constant, since the firmware measures it: machines with the same certificates have the same PCR
7.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import struct
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mosinit import init
from mosinit.host import Failure, Host
from mosinit.keys import SIGNING_TIME, Signer

TEMPLATE = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
OWNER = "9391f455-1d06-5c39-886f-52232b682dd8"  # uuid5(DNS, "secure-boot.mosinit")
SHIM = "605dab50-e046-4300-abb6-3dd810dd8b23"  # shim's vendor GUID, of MokListRT and its kin
X509_GUID = "a5c059a1-94e4-4aa7-87b5-ab155c2bf072"  # UEFI 2.10, 32.4.1: EFI_CERT_X509_GUID
NV_BS_RT = 0x07  # UEFI 2.10, 8.2: non-volatile, boot service, runtime
NV_BS_RT_TIMED = 0x27  # the same, and time-based authenticated
PKCS7_GUID = "4aafd29d-68df-49ee-8aa9-347d375665a7"  # UEFI 2.10, 32.2.4: EFI_CERT_TYPE_PKCS7_GUID
ESP_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
CERTIFICATE_LIMIT = 16 * 1024  # bytes of one certificate on a medium

# What virt-fw-vars writes into dbx, so that it is one: an EFI_CERT_SHA256 list with the hash of nothing.
EMPTY_DBX = bytes.fromhex(
    "2616c4c14c509240aca941f9369343284c0000000000000030000000a3a8baa01d04a848bc87c36d121b5e3d"
) + hashlib.sha256(b"").digest()  # fmt: skip

_LIST = struct.Struct("<16sIII16s")  # type, size of the list, of its header, of an entry; the entry's owner
assert _LIST.size == 44
_TIME = struct.Struct("<H5B9x")  # UEFI 2.10, 8.3: EFI_TIME; what is below a second, and where, is zero
assert _TIME.size == 16
_CERTIFICATE = struct.Struct("<IHH16s")  # UEFI 2.10, 32.2.4: WIN_CERTIFICATE_UEFI_GUID
assert _CERTIFICATE.size == 24


@dataclass(frozen=True)
class Certificates:
    """What Secure Boot trusts: the machine's owner, who may change db, and db itself."""

    pk: x509.Certificate
    kek: x509.Certificate
    db: tuple[x509.Certificate, ...]


@dataclass(frozen=True)
class Variable:
    """One more variable of the firmware, with its attributes (UEFI 2.10, 8.2)."""

    name: str
    guid: str
    data: bytes
    attributes: int = NV_BS_RT


def enroll(
    host: Host,
    target: Path,
    certificates: Certificates,
    *,
    secure_boot: bool = True,
    variables: Sequence[Variable] = (),
) -> None:
    """Write the variables of a new machine, whose firmware trusts exactly these certificates.

    `secure_boot=False` keeps the certificates and turns enforcement off; `variables` are added as they are.
    Raises `Failure` when OVMF or virt-fw-vars is missing or refuses.
    """
    with host.scratch(_checked(target)) as folder, host.replacing(target) as fresh:
        command = ["virt-fw-vars", "--input", str(TEMPLATE), "--output", str(fresh), "--secure-boot"]
        command += ["--set-pk", OWNER, _pem(folder / "PK.pem", certificates.pk)]
        command += ["--add-kek", OWNER, _pem(folder / "KEK.pem", certificates.kek)]
        for number, certificate in enumerate(certificates.db):
            command += ["--add-db", OWNER, _pem(folder / f"db-{number}.pem", certificate)]
        host.run(command, timeout=60)
        if not secure_boot:
            host.run(["virt-fw-vars", "--inplace", fresh, "--set-false", "SecureBootEnable"], timeout=60)
        _add(host, fresh, folder, variables)


def empty(host: Host, target: Path, variables: Sequence[Variable] = ()) -> None:
    """Write the variables of a new machine in setup mode: nobody's certificates. Raises `Failure`."""
    with host.scratch(_checked(target)) as folder, host.replacing(target) as fresh:
        shutil.copyfile(TEMPLATE, fresh)
        _add(host, fresh, folder, variables)


def _checked(target: Path) -> Path:
    if not TEMPLATE.is_file():
        raise Failure(f"cannot read {TEMPLATE}: install ovmf")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _add(host: Host, target: Path, folder: Path, variables: Sequence[Variable]) -> None:
    if variables:
        (folder / "variables.json").write_text(_encode_variables(variables))
        host.run(["virt-fw-vars", "--inplace", target, "--set-json", folder / "variables.json"], timeout=60)


def fingerprints(certificates: Certificates) -> str:
    """Return the SHA-256 of each certificate, a line each: PK, KEK, db."""
    every = (certificates.pk, certificates.kek, *certificates.db)
    return "".join(f"{hashlib.sha256(item.public_bytes(Encoding.DER)).hexdigest()}\n" for item in every)


def mok_list(certificate: x509.Certificate) -> Variable:
    """Return the variable by which shim gives the kernel a certificate that db does not hold."""
    return Variable("MokListRT", SHIM, signature_list(certificate))


def signature_list(certificate: x509.Certificate) -> bytes:
    """Encode one certificate as an EFI_SIGNATURE_LIST (UEFI 2.10, 32.4.1)."""
    der = certificate.public_bytes(Encoding.DER)
    entry = 16 + len(der)
    kind, owner = uuid.UUID(X509_GUID).bytes_le, uuid.UUID(OWNER).bytes_le
    return _LIST.pack(kind, _LIST.size - 16 + entry, 0, entry, owner) + der


def signed_update(signer: Signer, name: str, content: bytes) -> bytes:
    """Return the update (`.auth`) that gives PK, KEK or db this content; it depends on its input alone.

    EFI_VARIABLE_AUTHENTICATION_2 (UEFI 2.10, 8.2.2), signed over name, vendor, attributes, time and content.
    Its time is a constant, so a later change of the variable needs another tool and a later time.
    """
    vendor = init.EFI_IMAGE_SECURITY if name == "db" else init.EFI_GLOBAL
    time = datetime.datetime.fromtimestamp(SIGNING_TIME, datetime.timezone.utc)
    stamp = _TIME.pack(time.year, time.month, time.day, time.hour, time.minute, time.second)
    head = name.encode("utf-16-le") + uuid.UUID(vendor).bytes_le + struct.pack("<I", NV_BS_RT_TIMED)
    signature = bare_signed_data(signer.sign_pkcs7(head + stamp + content, with_certificate=True))
    size = _CERTIFICATE.size + len(signature)
    certificate = _CERTIFICATE.pack(size, 0x0200, 0x0EF1, uuid.UUID(PKCS7_GUID).bytes_le)
    return stamp + certificate + signature + content


def bare_signed_data(pkcs7: bytes) -> bytes:
    """Return the SignedData within a PKCS#7 (RFC 5652, 3): not every firmware takes it wrapped."""
    sequence, end = _der(pkcs7, 0, 0x30)
    _, after_type = _der(pkcs7, sequence, 0x06)
    signed_data, inner_end = _der(pkcs7, after_type, 0xA0)
    if (end, inner_end) != (len(pkcs7), len(pkcs7)):
        raise ValueError("more than a PKCS#7")
    return pkcs7[signed_data:]


def _der(data: bytes, start: int, tag: int) -> tuple[int, int]:
    """Return where the content of the DER element at `start` begins and ends (X.690, 8.1)."""
    if data[start : start + 1] != bytes([tag]) or len(data) < start + 2:
        raise ValueError(f"no DER element of type {tag:#x} at {start}")
    count = data[start + 1] & 0x7F if data[start + 1] & 0x80 else 0
    begin = start + 2 + count
    size = int.from_bytes(data[start + 2 : begin], "big") if count else data[start + 1]
    return begin, begin + size


def certificates_of_keyset(folder: Path) -> Certificates:
    """Read what Secure Boot needs from a keyset folder; its private keys need not be there."""

    def read(role: str) -> bytes:
        try:
            return (folder / f"{role}.pem").read_bytes()
        except OSError as error:
            raise Failure(
                f"cannot read {folder / role}.pem ({error.strerror}): {folder} is no keyset: "
                "make one by `mosinit keys new`"
            ) from error

    return _certificates(read, x509.load_pem_x509_certificate, ("PK", "KEK", "uki", "layer"), str(folder))


def certificates_of_medium(host: Host, disk: Path) -> Certificates:
    """Read the certificates that a medium offers for enrolment: the folder `keys/` of its EFI system
    partition.

    A medium that enrols itself is trusted at first use, as at a real machine in setup mode. Raises `Failure`
    when it has no such folder.
    """
    offset = _esp_offset(host, disk)

    def read(name: str) -> bytes:
        try:
            return host.run(
                ["mtype", "-i", f"{disk.absolute()}@@{offset}", f"::keys/{name}.der"], timeout=60
            )
        except Failure as error:
            raise Failure(
                f"{disk} offers no keys/{name}.der on its ESP: name the keyset that signed it by --keys"
            ) from error

    return _certificates(
        read, x509.load_der_x509_certificate, ("PK", "KEK", "db-uki", "db-layer"), f"the ESP of {disk}"
    )


def _certificates(
    read: Callable[[str], bytes],
    parse: Callable[[bytes], x509.Certificate],
    names: tuple[str, str, str, str],
    where: str,
) -> Certificates:
    """Read PK, KEK and the two entries of db by these names."""

    def load(name: str) -> x509.Certificate:
        untrusted = read(name)
        if len(untrusted) > CERTIFICATE_LIMIT:
            raise Failure(f"the certificate {name} of {where} has more than {CERTIFICATE_LIMIT} bytes")
        try:
            return parse(untrusted)
        except ValueError as error:
            raise Failure(
                f"the certificate {name} of {where} cannot be read: make the medium or keyset again"
            ) from error

    pk, kek, uki, layer = (load(name) for name in names)
    return Certificates(pk, kek, (uki, layer))


def _esp_offset(host: Host, disk: Path) -> int:
    """Return where the EFI system partition of a raw image begins, in bytes."""
    try:
        table = json.loads(host.run(["sfdisk", "--json", disk], timeout=60))["partitiontable"]
        sector = int(table.get("sectorsize", 512))
        starts = [int(row["start"]) for row in table["partitions"] if row["type"].upper() == ESP_TYPE]
    except (Failure, ValueError, KeyError) as error:
        raise Failure(
            f"{disk} has no partition table that can be read: name an image that a machine starts from; or, "
            "for a disk without keys of its own, the keyset by --keys"
        ) from error
    if len(starts) != 1:
        raise Failure(f"{disk} has {len(starts)} EFI system partitions, not one: name the keyset by --keys")
    return starts[0] * sector


def _pem(path: Path, certificate: x509.Certificate) -> str:
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
    return str(path)


def _encode_variables(variables: Sequence[Variable]) -> str:
    """Encode variables as virt-fw-vars reads them."""
    rows = [
        {"name": each.name, "guid": each.guid, "attr": each.attributes, "data": each.data.hex()}
        for each in variables
    ]
    return json.dumps({"version": 2, "variables": rows})
