"""Machine records and SUDI certificates: what is written is what the core reads and other programs take."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from mosinit import init, keys, records

Need = Callable[..., None]
PROOF, STORAGE_KEY, INDEX = bytes(range(32)), b"\0\x0b" + bytes([1] * 32), b"\0\x0b" + bytes([2] * 32)


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def certificate(keyset: keys.Keyset, key: ec.EllipticCurvePrivateKey) -> bytes:
    record = records.encode_record(keyset.product, PROOF, STORAGE_KEY, INDEX)
    return records.issue(keyset, key.public_key(), record, bytes(32))


def test_the_core_reads_the_record(keyset: keys.Keyset, certificate: bytes) -> None:
    ca = keyset.certificate_path("sudi-ca").read_bytes()
    read = init.verify_record(certificate, ca, keyset.product)
    assert read == init.MachineRecord(keyset.product, PROOF, STORAGE_KEY, INDEX)


def test_a_record_is_pinned() -> None:
    """The bytes by hand: DER OCTET STRING of 117 bytes, version, product, proof, names."""
    product = "7d0f8a3e-0c1d-4c5a-9a55-1f2e3d4c5b6a"
    expected = "0475" + "01" + product.replace("-", "") + PROOF.hex() + STORAGE_KEY.hex() + INDEX.hex()
    assert records.encode_record(product, PROOF, STORAGE_KEY, INDEX).hex() == expected


def test_a_record_of_another_product_or_ca_is_refused(keyset: keys.Keyset, certificate: bytes) -> None:
    with pytest.raises(init.Refused, match="RECORD-PRODUCT"):
        ca = keyset.certificate_path("sudi-ca").read_bytes()
        init.verify_record(certificate, ca, "11111111-2222-4333-8444-555555555555")
    with pytest.raises(init.Refused, match="RECORD-SIGNATURE"):
        other = keyset.certificate_path("manifest-ca").read_bytes()
        init.verify_record(certificate, other, keyset.product)


def test_what_the_certificate_says(
    keyset: keys.Keyset, key: ec.EllipticCurvePrivateKey, certificate: bytes
) -> None:
    made = x509.load_der_x509_certificate(certificate)
    find = made.extensions.get_extension_for_class
    public = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    digest = hashes.Hash(hashes.SHA256())
    digest.update(public)
    assert made.subject.rfc4514_string() == f"CN={digest.finalize().hex()[:16]},O=acme"
    assert not find(x509.BasicConstraints).value.ca
    assert find(x509.KeyUsage).critical
    assert find(x509.KeyUsage).value.digital_signature
    assert set(find(x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.CLIENT_AUTH,
        ExtendedKeyUsageOID.SERVER_AUTH,
    }
    names = find(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"urn:uuid:{keyset.product}"]
    record = made.extensions.get_extension_for_oid(records.RECORD_OID)
    assert not record.critical
    years = (made.not_valid_after_utc - made.not_valid_before_utc) / keys.YEAR
    assert years == records.YEARS
    assert len(certificate) <= init.BLOCK


def test_openssl_accepts_it(keyset: keys.Keyset, certificate: bytes, tmp_path: Path, need: Need) -> None:
    need("openssl")
    (tmp_path / "sudi.der").write_bytes(certificate)
    words = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile"]
    for ca, status in (("sudi-ca", 0), ("manifest-ca", 2)):
        done = subprocess.run(
            [*words, str(keyset.certificate_path(ca)), str(tmp_path / "sudi.der")],
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr


def test_public_areas_go_round(key: ec.EllipticCurvePrivateKey) -> None:
    area = records.encode_point(key.public_key(), init.SRK_HEAD)
    assert records.parse_point(area, init.SRK_HEAD) == key.public_key()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda area: area[:-1],
        lambda area: area + b"\0",
        lambda area: records.SUDI_HEAD + area[len(init.SRK_HEAD) :],
        lambda area: area[: len(init.SRK_HEAD)] + b"\0\x1f" + area[len(init.SRK_HEAD) + 2 :],
        lambda area: area[:-32] + bytes(32),  # not on the curve
        lambda area: b"",
    ],
)
def test_other_public_areas_are_errors(
    key: ec.EllipticCurvePrivateKey, spoil: Callable[[bytes], bytes]
) -> None:
    area = records.encode_point(key.public_key(), init.SRK_HEAD)
    with pytest.raises(ValueError):
        records.parse_point(spoil(area), init.SRK_HEAD)
