"""Machine records and epoch orders: who may say which machine this is, and what is no longer safe."""

from __future__ import annotations

import json
import os
import uuid

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from mosinit import init
from tests.fake import PRODUCT
from tests.test_init_manifest import BAD_CERTIFICATES, CA, CA_KEY, LEAF, P256, POLICY, certificate, sign

PROOF, STORAGE_KEY, INDEX = os.urandom(32), b"\0\x0b" + os.urandom(32), b"\0\x0b" + os.urandom(32)
FIELDS = init.RECORD.pack(1, uuid.UUID(PRODUCT).bytes, PROOF, STORAGE_KEY, INDEX)


def der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)


def record(value: bytes, key: ec.EllipticCurvePrivateKey = CA_KEY, issuer: str = "CA") -> bytes:
    """Make a SUDI certificate with this value of our extension."""
    extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(init.RECORD_OID), value)
    return der(certificate(P256, key, issuer, extensions=LEAF[:2], more=extension))


GOOD = record(init.RECORD_HEAD + FIELDS)


def test_a_record_says_what_belongs_together() -> None:
    assert init.verify_record(GOOD, CA, PRODUCT) == (PRODUCT, PROOF, STORAGE_KEY, INDEX)


OTHER_PRODUCT = init.RECORD_HEAD + FIELDS[:1] + bytes(16) + FIELDS[17:]
RECORD_FAULTS = [
    ("RECORD-PRODUCT", record(OTHER_PRODUCT)),
    ("RECORD-SIGNATURE", record(init.RECORD_HEAD + FIELDS, ec.generate_private_key(ec.SECP384R1()))),
    ("RECORD-SIGNATURE", record(init.RECORD_HEAD + FIELDS, issuer="another CA")),
    ("RECORD-SIGNATURE", record(init.RECORD_HEAD + FIELDS, P256)),
    ("RECORD-FORMAT", b""),
    ("RECORD-FORMAT", GOOD[:-1]),
    ("RECORD-FORMAT", GOOD + b"\0"),
    ("RECORD-FORMAT", GOOD + bytes(5000)),
    ("RECORD-FORMAT", b"\x30" * 4096),
    ("RECORD-FORMAT", der(certificate(P256, CA_KEY))),
    ("RECORD-FORMAT", record(FIELDS)),
    ("RECORD-FORMAT", record(init.RECORD_HEAD + FIELDS[:-1])),
    ("RECORD-FORMAT", record(init.RECORD_HEAD + FIELDS + b"\0")),
    ("RECORD-FORMAT", record(b"\x04\x82" + FIELDS)),
    ("RECORD-FORMAT", record(init.RECORD_HEAD + b"\2" + FIELDS[1:])),
    ("RECORD-FORMAT", record(init.RECORD_HEAD + FIELDS[:49] + b"\0\x04" + FIELDS[51:])),
    ("RECORD-FORMAT", record(init.RECORD_HEAD + FIELDS[:83] + b"\0\x0c" + FIELDS[85:])),
]


@pytest.mark.parametrize(("check", "untrusted"), RECORD_FAULTS)
def test_record_faults(check: str, untrusted: bytes) -> None:
    with pytest.raises(init.Refused) as refused:
        init.verify_record(untrusted, CA, PRODUCT)
    assert refused.value.check == check


@given(st.integers(0, 8 * len(GOOD) - 1))
def test_no_flipped_bit_of_a_record_passes(bit: int) -> None:
    spoilt = bytearray(GOOD)
    spoilt[bit // 8] ^= 1 << bit % 8
    with pytest.raises(init.Refused):
        init.verify_record(bytes(spoilt), CA, PRODUCT)


@given(st.binary(max_size=600))
def test_no_bytes_crash_the_reader_of_records(untrusted: bytes) -> None:
    with pytest.raises(init.Refused):
        init.verify_record(untrusted, CA, PRODUCT)


def order(**changes: object) -> bytes:
    return json.dumps({**init.epoch_statement(PRODUCT, 7), **changes}).encode()


def test_an_order_of_the_publisher_counts() -> None:
    leaf = certificate(P256, CA_KEY)
    assert init.verify_epoch_order(order(), sign(P256, order()), leaf, POLICY) == 7


ORDER_FAULTS = [
    order(epoch=0), order(epoch=65), order(epoch=True), order(epoch="7"), order(epoch=None), order(schema=2),
    order(type="manifest"), order(product=PRODUCT[:-1] + "0"), order(more=1), order()[:-1], b"", b"[]", b"7",
    order()[:-1] + b', "epoch": 7}',
]  # fmt: skip


@pytest.mark.parametrize("statement", ORDER_FAULTS)
def test_order_faults(statement: bytes) -> None:
    leaf = certificate(P256, CA_KEY)
    with pytest.raises(init.Refused, match="EPOCH-ORDER"):
        init.verify_epoch_order(statement, sign(P256, statement), leaf, POLICY)


@pytest.mark.parametrize("leaf", [pem for _, pem in BAD_CERTIFICATES])
def test_an_order_under_another_certificate_does_not_count(leaf: bytes) -> None:
    with pytest.raises(init.Refused, match="EPOCH-ORDER"):
        init.verify_epoch_order(order(), sign(P256, order()), leaf, POLICY)


def test_an_order_that_was_changed_does_not_count() -> None:
    leaf = certificate(P256, CA_KEY)
    for signature in (sign(P256, order(epoch=6)), b"", sign(CA_KEY, order())):
        with pytest.raises(init.Refused, match="EPOCH-ORDER"):
            init.verify_epoch_order(order(), signature, leaf, POLICY)
