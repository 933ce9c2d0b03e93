"""Install manifests: what the strict YAML takes, what it refuses with line and key, and who may sign."""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Iterable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from mosinit import init, publish
from tests.fake import PRODUCT, UKI_ID, policy_json

HEAD = f"""version: 1
product: {PRODUCT}
sequence: 42
epoch: 1
update_type: complete
"""
DIGEST = "sha256:" + "ab" * 32
HOSTFS = f"""targets:
  - service_name: hostfs
    service_type: hostfs
    version: 1.0.0
    digest: {DIGEST}
    size: 1000
    layer_signatures: [{DIGEST}]
"""
WRITTEN = """storage:
  - {label: zot-data, persistent: true, nsgroup: zot, size: 2G}
targets:
  - service_name: hostfs
    service_type: hostfs
    source: oci:./images:hostfs
    writable: all
    version: 1.0.0
  - service_name: zot
    service_type: container
    source: docker://registry.example/zot:2.1
    version: "2.1"
    nsgroup: zot
    network: {type: simple, ipv4: 10.0.3.99/24, ports: [{host: 80, container: 5000}]}
    storage: [{dest: /zot, label: zot-data}]
"""


def test_a_written_manifest() -> None:
    contents = init.parse_manifest((HEAD + WRITTEN).encode(), publish.WRITTEN)
    assert contents[:5] == (1, PRODUCT, 42, 1, "complete")
    assert contents.storage == (init.Volume("zot-data", True, "zot", 2 << 30),)
    hostfs, zot = contents.targets
    assert (hostfs.writable, hostfs.source, hostfs.version) == ("all", "oci:./images:hostfs", "1.0.0")
    assert zot.network == init.Network("simple", "10.0.3.99/24", "", (init.Port(80, 5000),))
    assert zot.storage == (init.StorageMount("/zot", "zot-data"),)
    assert zot.service_type == "container"


def test_a_signed_manifest() -> None:
    (hostfs,) = init.parse_manifest((HEAD + HOSTFS).encode()).targets
    assert (hostfs.digest, hostfs.size, hostfs.layer_signatures) == (DIGEST, 1000, (DIGEST,))
    assert (hostfs.source, hostfs.writable) == ("", "")


@pytest.mark.parametrize("sequence", [1, 10**18 - 1, 10**18, init.MAX_SEQUENCE])
def test_large_sequences(sequence: int) -> None:
    text = (HEAD + HOSTFS).replace("sequence: 42", f"sequence: {sequence}")
    assert init.parse_manifest(text.encode()).sequence == sequence


@pytest.mark.parametrize(
    "product", ["12345678-1234-1234-1234-123456789012", "0000000e-0000-4000-8000-00000000000b"]
)
def test_product_ids_that_look_like_numbers(product: str) -> None:
    text = (HEAD + HOSTFS).replace(PRODUCT, product)
    assert init.parse_manifest(text.encode()).product == product


def replaced(old: str, new: str) -> str:
    text = HEAD + HOSTFS
    assert old in text
    return text.replace(old, new)


FAULTS: list[tuple[str, str]] = [
    ("", "an empty file"),
    ("- 1\n", "line 1, top"),
    ("{", "while parsing"),
    ("a: \x00", "control characters"),
    (HEAD + HOSTFS + "---\na: b\n", "another at line"),
    (replaced("sequence: 42", "sequence: 42\nsequence: 43"), "line 4, sequence"),
    (replaced("sequence: 42", "sequense: 42"), "line 3, sequense"),
    (replaced("sequence: 42\n", ""), "no sequence"),
    (replaced("sequence: 42", "sequence: '42'"), "line 3, sequence: '42'"),
    (replaced("sequence: 42", "sequence: 0"), "line 3, sequence"),
    (replaced("sequence: 42", "sequence: 042"), "line 3, sequence: '042'"),
    (replaced("sequence: 42", "sequence: 4_2"), "line 3, sequence: '4_2'"),
    (replaced("sequence: 42", "sequence: 1e3"), "line 3, sequence: '1e3'"),
    (replaced("sequence: 42", "sequence: true"), "line 3, sequence"),
    (replaced("sequence: 42", "sequence: ~"), "line 3, sequence: '~'"),
    (replaced("sequence: 42", "sequence: 99999999999999999999"), "line 3, sequence"),
    (replaced("epoch: 1", "epoch: 65"), "line 4, epoch"),
    (replaced("version: 1\n", "version: 2\n"), "line 1, version"),
    (replaced("complete", "whole"), "line 5, update_type: 'whole'"),
    (replaced("complete", "yes"), "line 5, update_type: 'yes'"),
    (replaced("complete", "!!str complete"), "line 5, update_type"),
    (replaced("complete", "&a complete"), "an anchor or alias"),
    (replaced("complete", "*a"), "alias"),
    (replaced(PRODUCT, PRODUCT.upper()), "line 2, product"),
    (replaced("1.0.0\n", "1.10\n"), "line 9, targets[0].version: '1.10'"),
    (replaced("service_name: hostfs", "service_name: Hostfs"), "targets[0].service_name"),
    (replaced("service_name: hostfs", "service_name: ../x"), "targets[0].service_name"),
    (replaced("service_name: hostfs", "service_name: other"), "targets[0].service_name"),
    (replaced("service_type: hostfs", "service_type: vm"), "targets[0].service_type: 'vm'"),
    (replaced("service_type: hostfs", "service_type: fs-only\n    writable: all"), "targets[0].writable"),
    (replaced("size: 1000", "size: 1000\n    source: oci:x"), "targets[0].source"),
    (replaced("size: 1000", "size: 5000000"), "targets[0].size"),
    (replaced(f"[{DIGEST}]", f"[{DIGEST[:-1]}]"), "targets[0].layer_signatures[0]"),
    (replaced(f"[{DIGEST}]", DIGEST), "targets[0].layer_signatures"),
    (
        replaced("    size", "    storage: [{dest: /a, label: nowhere}]\n    size"),
        "targets[0].storage: 'nowhere'",
    ),
    (replaced("sequence: 42", "sequence: 42\n7: x"), "line 4, top: '7'"),
    (replaced("sequence: 42", "sequence: 42\n[a]: x"), "line 4, top: 'list'"),
    (replaced("    size", "    storage: [" + "x, " * 65 + "]\n    size"), "targets[0].storage: 'list'"),
    (
        HEAD + HOSTFS + "storage:\n" + 2 * "  - {label: a, persistent: true, size: 2G}\n",
        "storage[1].label: 'a'",
    ),
    (HEAD + HOSTFS + "#" * init.MANIFEST_BYTES, "at most"),
    (replaced("    size", "    network: {type: host}\n    size"), "targets[0].network"),
    (HEAD + HOSTFS + HOSTFS.partition("\n")[2], "targets[1].service_name: 'hostfs'"),
    (HEAD + "targets: []\nstorage:\n  - {label: a, persistent: true, size: 20}\n", "storage[0].size: '20'"),
    (HEAD + "targets: []\nstorage:\n  - {label: a, persistent: 1, size: 2G}\n", "storage[0].persistent"),
    (HEAD + "targets: []\nstorage: &x\n  - *x\n", "an anchor or alias"),
    ("a: " + "[" * 50 + "]" * 50, "at most 12 levels"),
    ("a: [" + "1, " * 30000 + "]", "YAML nodes"),
]


@pytest.mark.parametrize(("text", "names"), FAULTS, ids=range(len(FAULTS)))
def test_faults_name_line_and_key(text: str, names: str) -> None:
    with pytest.raises(init.Refused) as refused:
        init.parse_manifest(text.encode())
    assert refused.value.check == "MANIFEST-FORMAT"
    assert names in str(refused.value)


@pytest.mark.parametrize("plain", [".".join(["1"] * 100_000) + ":1", "1" * 100_000, "a" * 257], ids=len)
def test_a_long_plain_word_takes_no_time(plain: str) -> None:
    begun = time.monotonic()
    with pytest.raises(init.Refused, match="at most 256 characters"):
        init.parse_manifest(f"version: {plain}\n".encode())
    assert time.monotonic() - begun < 2


NETWORKS = [
    "{type: simple, ipv4: 10.0.3.99}",
    "{type: simple, ipv4: 'fd00::1/64'}",
    "{type: simple, ipv6: 10.0.0.1/8}",
    "{type: simple, ipv4: 1.2.3.4/0.0.0.255}",
    "{type: simple, ipv4: 1.2.3.4/255.255.255.0}",
    "{type: simple, ipv4: 1.2.3.4/08}",
    "{type: simple, ipv4: 1.2.3.4/33}",
    "{type: simple, ipv4: 256.2.3.4/24}",
    '{type: simple, ipv4: "1.2.3.4/24\\n"}',
    "{type: simple, ipv6: 'fe80::1%eth0/64'}",
    '{type: simple, ipv6: "fe80::1%x\\nExecStart=/bin/sh/64"}',
    '{type: simple, ipv6: "fe80::1/64\\n"}',
    "{type: simple, ipv6: 'fe80::1/064'}",
    "{type: simple, ipv6: 'fe80::1::2/64'}",
    "{type: simple, ports: [{host: 0, container: 1}]}",
    "{type: simple, ports: [{host: 80}]}",
    "{type: host, ports: [{host: 80, container: 80}]}",
    "{type: bridge}",
    "{}",
]


@pytest.mark.parametrize("network", NETWORKS)
def test_network_faults(network: str) -> None:
    text = (HEAD + WRITTEN).replace(
        "{type: simple, ipv4: 10.0.3.99/24, ports: [{host: 80, container: 5000}]}", network
    )
    with pytest.raises(init.Refused, match=r"targets\[1\].network"):
        init.parse_manifest(text.encode(), publish.WRITTEN)


@pytest.mark.parametrize("dest", ["zot", "/", "/a/../b", "/a,b", "/a:b", "/a b", "/a//b", "/./a", "/a\\b"])
def test_mount_paths_that_something_would_misread(dest: str) -> None:
    text = (HEAD + WRITTEN).replace("dest: /zot", f"dest: '{dest}'")
    with pytest.raises(init.Refused, match=r"storage\[0\].dest"):
        init.parse_manifest(text.encode(), publish.WRITTEN)


@given(st.text(max_size=300) | st.binary(max_size=300).map(lambda b: b.decode("latin-1")))
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(init.Refused, match="MANIFEST-FORMAT"):
        init.parse_manifest(text.encode("utf-8", "surrogatepass"))


def test_a_manifest_for_machines_has_one_hostfs_and_one_bootkit() -> None:
    contents = init.parse_manifest((HEAD + HOSTFS).encode())
    with pytest.raises(init.Refused, match="MANIFEST-TARGET"):
        init.boot_targets(contents)


PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
P256, P384 = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())
URI = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"urn:uuid:{PRODUCT}")])
SIGN = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
SIGN_CERTIFICATES = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
CODE = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
LEAF: list[x509.ExtensionType] = [x509.BasicConstraints(False, None), SIGN, CODE, URI]


def certificate(
    key: PrivateKey,
    issuer_key: PrivateKey,
    issuer: str = "CA",
    subject: str = "leaf",
    extensions: Iterable[x509.ExtensionType] = LEAF,
    days: int = 10,
    more: x509.ExtensionType | None = None,
) -> bytes:
    """Make a certificate in PEM form."""
    start = datetime.datetime(2020, 1, 1)
    builder = x509.CertificateBuilder(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]),
        key.public_key(), x509.random_serial_number(), start, start + datetime.timedelta(days=days),
    )  # fmt: skip
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    if more is not None:
        builder = builder.add_extension(more, critical=False)
    algorithm = None if isinstance(issuer_key, ed25519.Ed25519PrivateKey) else hashes.SHA384()
    return builder.sign(issuer_key, algorithm).public_bytes(serialization.Encoding.PEM)


CA_KEY = P384
CA = certificate(CA_KEY, CA_KEY, "CA", "CA", [x509.BasicConstraints(True, 0), SIGN_CERTIFICATES])
POLICY = init.parse_policy(policy_json(), UKI_ID.encode(), {"manifest-ca.pem": CA})
TEXT = (HEAD + HOSTFS).encode()


def sign(key: PrivateKey, data: bytes = TEXT) -> bytes:
    """Sign as the key's type demands."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(data, ec.ECDSA(hashes.SHA256() if key.key_size == 256 else hashes.SHA384()))
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(data, padding.PKCS1v15(), hashes.SHA256())
    return key.sign(data)


def verify(
    key: PrivateKey = P256, pem: bytes | None = None, text: bytes = TEXT, signature: bytes | None = None
) -> init.Manifest:
    pem = certificate(key, CA_KEY) if pem is None else pem
    return init.verify_manifest(text, sign(key) if signature is None else signature, pem, POLICY)


@pytest.mark.parametrize(
    "key", [P256, P384, ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 3072)]
)
def test_each_kind_of_key_signs(key: PrivateKey) -> None:
    """The certificate ran out in 2020: at boot the clock is no gate."""
    manifest = verify(key)
    assert manifest.contents.sequence == 42
    for bad in (sign(key)[:-1], b"", sign(key, TEXT + b" ")):
        with pytest.raises(init.Refused, match="MANIFEST-SIGNATURE"):
            verify(key, signature=bad)


@pytest.mark.parametrize(
    "key", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP521R1())]
)
def test_other_keys_do_not(key: PrivateKey) -> None:
    with pytest.raises(init.Refused, match="MANIFEST-CERTIFICATE"):
        verify(key)


def swap(index: int, extension: x509.ExtensionType) -> list[x509.ExtensionType]:
    return [*LEAF[:index], extension, *LEAF[index + 1 :]]


OTHER = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"urn:uuid:{PRODUCT[:-1]}0")])
BOTH = x509.SubjectAlternativeName([*URI, *OTHER])
ANY = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING, ExtendedKeyUsageOID.SERVER_AUTH])
BAD_CERTIFICATES: list[tuple[str, bytes]] = [
    ("MANIFEST-CHAIN", certificate(P256, P256)),
    ("MANIFEST-CHAIN", certificate(P256, ec.generate_private_key(ec.SECP384R1()))),
    ("MANIFEST-CHAIN", certificate(P256, CA_KEY, issuer="other CA")),
    ("MANIFEST-CERTIFICATE", CA),
    ("MANIFEST-CERTIFICATE", b""),
    ("MANIFEST-CERTIFICATE", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    ("MANIFEST-CERTIFICATE", certificate(P256, CA_KEY) + CA),
    ("MANIFEST-CERTIFICATE", certificate(P256, CA_KEY) + b" " * 20000),
    ("MANIFEST-CERTIFICATE", certificate(P256, CA_KEY, extensions=swap(0, x509.BasicConstraints(True, 0)))),
    ("MANIFEST-CERTIFICATE", certificate(P256, CA_KEY, extensions=swap(1, SIGN_CERTIFICATES))),
    ("MANIFEST-CERTIFICATE", certificate(P256, CA_KEY, extensions=swap(2, ANY))),
    ("MANIFEST-CERTIFICATE", certificate(P256, CA_KEY, extensions=LEAF[:3])),
    ("MANIFEST-CERTIFICATE", certificate(P256, CA_KEY, extensions=[*LEAF, x509.InhibitAnyPolicy(0)])),
    ("MANIFEST-PRODUCT", certificate(P256, CA_KEY, extensions=swap(3, OTHER))),
    ("MANIFEST-PRODUCT", certificate(P256, CA_KEY, extensions=swap(3, BOTH))),
]  # fmt: skip


def test_an_unknown_extension_that_is_not_critical_is_no_reason() -> None:
    extra = x509.SubjectKeyIdentifier(b"x" * 20)
    assert verify(pem=certificate(P256, CA_KEY, extensions=LEAF, more=extra)).contents.sequence == 42


@pytest.mark.parametrize(("check", "pem"), BAD_CERTIFICATES, ids=range(len(BAD_CERTIFICATES)))
def test_certificates_that_may_not_sign(check: str, pem: bytes) -> None:
    with pytest.raises(init.Refused) as refused:
        verify(pem=pem)
    assert refused.value.check == check


def test_a_revoked_certificate_counts_no_more() -> None:
    pem = certificate(P256, CA_KEY)
    der = x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    policy = POLICY._replace(revoked=("ab" * 32, hashlib.sha256(der).hexdigest()))
    with pytest.raises(init.Refused, match="MANIFEST-REVOKED") as refused:
        init.verify_manifest(TEXT, sign(P256), pem, policy)
    assert refused.value.check == "MANIFEST-REVOKED"
    assert init.verify_manifest(
        TEXT, sign(P256), certificate(P256, CA_KEY), policy
    )  # a new one of the same key


def test_one_flipped_bit_anywhere_in_a_certificate_is_refused() -> None:
    der = x509.load_pem_x509_certificate(certificate(P256, CA_KEY)).public_bytes(serialization.Encoding.DER)
    import base64

    for index in range(0, len(der), 7):
        spoiled = bytearray(der)
        spoiled[index] ^= 4
        pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(spoiled) + b"-----END CERTIFICATE-----\n"
        with pytest.raises(init.Refused):
            verify(pem=pem)


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        ("MANIFEST-PRODUCT", PRODUCT, PRODUCT[:-1] + "0"),
        ("MANIFEST-SIGNATURE", "sequence: 42", "sequence: 43"),
        ("MANIFEST-EPOCH", "", ""),
    ],
)
def test_what_a_valid_signature_does_not_cover(check: str, old: str, new: str) -> None:
    text = TEXT.replace(old.encode(), new.encode()) if old else TEXT
    policy = POLICY._replace(epoch=2) if check == "MANIFEST-EPOCH" else POLICY
    signature = sign(P256, TEXT if check == "MANIFEST-SIGNATURE" else text)
    with pytest.raises(init.Refused) as refused:
        init.verify_manifest(text, signature, certificate(P256, CA_KEY), policy)
    assert refused.value.check == check
