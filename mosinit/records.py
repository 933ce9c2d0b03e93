"""What the organisation says of a machine: its SUDI certificate with the machine record in it, and the
public areas (TPM 2.0 library, part 2, 12.2.4) that a request shows.

The core reads records (`init.verify_record`); they are written here.
"""

from __future__ import annotations

import datetime
import hashlib
import struct
import uuid

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mosinit import init
from mosinit.host import Failure
from mosinit.keys import YEAR, Keyset, key_usage

RECORD_OID = x509.ObjectIdentifier(init.RECORD_OID)
YEARS = 20
VERSION = 1  # of the record

# The SUDI key: fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, sign; P-256, any scheme. Its
# auth value is random, so nobody guesses it, and a wrong one must not lock the TPM for everybody else.
SUDI_HEAD = struct.pack(
    ">HHIHHHHH", 0x0023, 0x000B, 0x2 | 0x10 | 0x20 | 0x40 | 0x400 | 0x40000, 0,
    0x0010, 0x0010, 0x0003, 0x0010,
)  # fmt: skip


def encode_record(product: str, secret_proof: bytes, storage_key: bytes, epoch_index: bytes) -> bytes:
    """Encode a machine record as the value of its extension; the last two are TPM names."""
    fields = (VERSION, uuid.UUID(product).bytes, secret_proof, storage_key, epoch_index)
    return init.RECORD_HEAD + init.RECORD.pack(*fields)


def parse_point(area: bytes, head: bytes) -> ec.EllipticCurvePublicKey:
    """Return the P-256 key of a public area that begins with a pinned head; ValueError for any other."""
    rest = area[len(head) :]
    if not area.startswith(head) or len(rest) != 68 or (rest[:2], rest[34:36]) != (b"\0\x20", b"\0\x20"):
        raise ValueError("another kind of key than the pinned one")
    x, y = int.from_bytes(rest[2:34], "big"), int.from_bytes(rest[36:], "big")
    return ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()


def encode_point(key: ec.EllipticCurvePublicKey, head: bytes) -> bytes:
    """Return the public area of a P-256 key with a pinned head."""
    numbers = key.public_numbers()
    return head + b"".join(b"\0\x20" + part.to_bytes(32, "big") for part in (numbers.x, numbers.y))


def serial_of(key: ec.EllipticCurvePublicKey) -> str:
    """Return the serial of a machine: the first 16 hex digits of its SUDI key's SHA-256."""
    public = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(public).hexdigest()[:16]


def issue(keyset: Keyset, key: ec.EllipticCurvePublicKey, record: bytes) -> bytes:
    """Return the SUDI certificate (DER) of a machine with its encoded record, signed by the SUDI CA.

    The record is not critical: peers of a TLS connection do not know it, and need not.
    """
    ca = keyset.certificate("sudi-ca")
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, keyset.name),
            x509.NameAttribute(NameOID.COMMON_NAME, serial_of(key)),
        ]
    )
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    names = [x509.UniformResourceIdentifier(f"urn:uuid:{keyset.product}")]
    authority = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority)
    builder = (
        x509.CertificateBuilder(subject_name=subject, issuer_name=ca.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(min(now + YEARS * YEAR, ca.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(issuer, critical=False)
        .add_extension(x509.UnrecognizedExtension(RECORD_OID, record), critical=False)
    )
    made = keyset.signer("sudi-ca").sign_certificate(builder)
    der = made.public_bytes(serialization.Encoding.DER)
    if len(der) > init.BLOCK:
        raise Failure(f"the SUDI certificate has {len(der)} bytes, at most {init.BLOCK} are taken")
    return der
