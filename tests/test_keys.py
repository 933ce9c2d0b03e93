"""The keyset: `keys new` makes what firmware, TPM and kernel need, and other tools accept what it signs."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from mosinit import init, keys
from mosinit.host import Failure, Host, Usage

Need = Callable[..., None]
SELF_SIGNED = [role for role, kind in keys.ROLES.items() if kind.issuer is None]
STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One keyset that no test changes."""
    folder = tmp_path_factory.mktemp("keys") / "keyset"
    keys.new(Host(), folder, "acme")
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of the keyset to spoil."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def openssl(*words: str | Path, stdin: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *words], input=stdin, capture_output=True, check=True).stdout


# --- What a keyset is --------------------------------------------------------------------------------


def test_every_role_has_a_key_of_its_own(made: Path, host: Host) -> None:
    keyset = keys.open_keyset(host, made)
    publics = {
        keyset.certificate(role)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        for role in keys.ROLES
    }
    assert len(publics) == len(keys.ROLES) == 10


def test_private_files_are_private(made: Path) -> None:
    assert made.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in made.glob("*.key")}
    assert modes == {f"{role}.key": 0o600 for role in keys.ROLES}


def test_the_folder_holds_nothing_else(made: Path) -> None:
    wanted = {f"{role}.{kind}" for role in keys.ROLES for kind in ("key", "pem")}
    assert {path.name for path in made.iterdir()} == wanted | {
        ".gitignore", "keyset.json", "pcr.pub", "platform.pub",
    }  # fmt: skip
    assert (made / ".gitignore").read_text() == "*\n"


def test_description_file(made: Path, host: Host) -> None:
    words = json.loads((made / "keyset.json").read_text())
    keyset = keys.open_keyset(host, made)
    assert words == {"schema": 1, "name": "acme", "product": keyset.product, "epoch": 1}


@pytest.mark.parametrize("role", ["PK", "KEK", "uki", "layer", "pcr", "platform"])
def test_keys_for_firmware_and_tpm_are_rsa_2048_and_no_ca(made: Path, host: Host, role: str) -> None:
    certificate = keys.open_keyset(host, made).certificate(role)
    public = certificate.public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    assert (public.key_size, public.public_numbers().e) == (2048, 65537)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca


@pytest.mark.parametrize("role", ["manifest-ca", "sudi-ca"])
def test_authorities(made: Path, host: Host, role: str) -> None:
    certificate = keys.open_keyset(host, made).certificate(role)
    public = certificate.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert public.curve.name == "secp384r1"
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert usage.critical
    assert (usage.value.key_cert_sign, usage.value.crl_sign, usage.value.digital_signature) == (
        True,
        True,
        False,
    )


def test_the_recovery_key_decrypts_and_signs_nothing(made: Path, host: Host) -> None:
    certificate = keys.open_keyset(host, made).certificate("recovery")
    public = certificate.public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    assert public.key_size == 3072
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert (usage.value.key_encipherment, usage.value.digital_signature, usage.value.key_cert_sign) == (
        True,
        False,
        False,
    )


# --- What a machine gets to know -----------------------------------------------------------------------


def test_export_has_the_public_parts_alone(made: Path, host: Host, tmp_path: Path) -> None:
    organisation = keys.export(host, made, tmp_path / "org")
    names = {path.name for path in (tmp_path / "org").iterdir()}
    assert names == {f"{role}.pem" for role in keys.ROLES} | {"keyset.json", "pcr.pub", "platform.pub"}
    assert not any(b"PRIVATE" in path.read_bytes() for path in (tmp_path / "org").iterdir())
    assert organisation.product == keys.open_keyset(host, made).product
    assert organisation.certificate("sudi-ca") == keys.open_keyset(host, made).certificate("sudi-ca")


def test_a_keyset_is_an_organisation_too_and_its_private_keys_are_not_read(copy: Path) -> None:
    for path in copy.glob("*.key"):
        path.write_bytes(b"unreadable")
    assert keys.open_organisation(copy).name == "acme"


@pytest.mark.parametrize("more", ["uki.key", "layer.pem", "text"])
def test_a_certificate_comes_alone(copy: Path, host: Host, tmp_path: Path, more: str) -> None:
    """Whoever keeps key and certificate in one file must not give the key away."""
    pem = copy / "uki.pem"
    other = b"subject=CN = uki\n" if more == "text" else (copy / more).read_bytes()
    for content in (pem.read_bytes() + other, other + pem.read_bytes()):
        pem.write_bytes(content)
        with pytest.raises(Failure, match="not exactly one block of PEM"):
            keys.open_keyset(host, copy)
        with pytest.raises(Failure, match="not exactly one block of PEM"):
            keys.export(host, copy, tmp_path / "org")
    assert not (tmp_path / "org").exists()


def test_export_writes_anew(copy: Path, host: Host, tmp_path: Path) -> None:
    """Nothing hides between the lines of a block, or in keyset.json."""
    pem = copy / "uki.pem"
    before = pem.read_bytes()
    pem.write_bytes(b"\n\n" + before.replace(b"\n", b"\r\n"))
    words = json.loads((copy / "keyset.json").read_text())
    (copy / "keyset.json").write_text(json.dumps({**words, "token": "secret"}))
    keys.export(host, copy, tmp_path / "org")
    assert (tmp_path / "org/uki.pem").read_bytes() == before
    assert json.loads((tmp_path / "org/keyset.json").read_text()) == words


def test_what_belongs_to_others_is_not_used(copy: Path, host: Host) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    for path in (copy / "uki.key", copy / "uki.pem", copy):
        os.chown(path, 65534, -1)
        with pytest.raises(Failure, match=rf"{path.name} belongs to another user \(uid 65534\)"):
            keys.open_keyset(host, copy)
        os.chown(path, 0, -1)
    keys.open_keyset(host, copy)


def test_results_do_not_go_where_keys_lie(copy: Path, host: Host, tmp_path: Path) -> None:
    with pytest.raises(Usage, match="lies in"):
        keys.export(host, copy, copy / "org")
    (tmp_path / "link").symlink_to(copy)
    (tmp_path / "key").symlink_to(copy / "uki.key")
    os.mkfifo(tmp_path / "pipe")
    for place in (copy, copy / "uki.key", tmp_path / "link/new", tmp_path / "key", copy / "../copy/new"):
        with pytest.raises(Usage, match="lies in"):
            keys.check_out(place, copy)
    with pytest.raises(Failure, match="neither file nor folder"):
        keys.check_out(tmp_path / "pipe", copy)
    keys.check_out(tmp_path / "new", copy)


def test_export_replaces_nothing(made: Path, host: Host, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    with pytest.raises(Failure, match="exists already"):
        keys.export(host, made, tmp_path / "org")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("sudi-ca.pem", None, "lacks sudi-ca.pem: make it again by `mosinit keys export`"),
        ("recovery.pem", b"garbage", "recovery.pem"),
        ("pcr.pub", b"garbage", "pcr.pub: not exactly one block of PEM"),
        ("keyset.json", None, "holds no public parts of a keyset"),
    ],
)
def test_a_damaged_organisation_is_told(copy: Path, name: str, content: bytes | None, says: str) -> None:
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    with pytest.raises(Failure, match=says):
        keys.open_organisation(copy)


def test_the_epoch_is_raised_and_never_falls(copy: Path, host: Host, tmp_path: Path) -> None:
    assert keys.open_keyset(host, copy).epoch == 1
    assert keys.raise_epoch(host, copy, 3).epoch == 3
    assert keys.raise_epoch(host, copy, 3).epoch == 3
    with pytest.raises(Failure, match="is 3, and it never falls"):
        keys.raise_epoch(host, copy, 2)
    assert keys.export(host, copy, tmp_path / "org").epoch == 3
    assert keys.choose_epoch(None, 3) == 3
    assert keys.choose_epoch(4, 3) == 4
    with pytest.raises(init.Refused, match="EPOCH.*epoch 3 or later.*seen epoch 2"):
        keys.choose_epoch(2, 3)


def test_product_certificate(made: Path, host: Host) -> None:
    keyset = keys.open_keyset(host, made)
    certificate = keyset.certificate("product")
    extensions = certificate.extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"urn:uuid:{keyset.product}"]
    purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.CODE_SIGNING]
    assert extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    certificate.verify_directly_issued_by(keyset.certificate("manifest-ca"))


@pytest.mark.parametrize("role", keys.ROLES)
def test_validity(made: Path, host: Host, role: str) -> None:
    certificate = keys.open_keyset(host, made).certificate(role)
    years = 10 if role == "product" else 30
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == years * datetime.timedelta(
        365
    )
    age = datetime.datetime.now(datetime.timezone.utc) - certificate.not_valid_before_utc
    assert datetime.timedelta(0) <= age < datetime.timedelta(hours=1)


@pytest.mark.parametrize("role", SELF_SIGNED)
def test_openssl_accepts_the_self_signed_ones(made: Path, role: str, need: Need) -> None:
    need("openssl")
    path = made / f"{role}.pem"
    assert b"OK" in openssl("verify", "-check_ss_sig", "-x509_strict", "-CAfile", path, path)


def test_openssl_accepts_the_chain_of_the_product(made: Path, need: Need) -> None:
    need("openssl")
    words = ("verify", "-x509_strict", "-CAfile")
    assert b"OK" in openssl(*words, made / "manifest-ca.pem", made / "product.pem")
    with pytest.raises(subprocess.CalledProcessError):
        openssl(*words, made / "sudi-ca.pem", made / "product.pem")


@pytest.mark.parametrize("role", ["pcr", "platform"])
def test_public_files_are_what_openssl_extracts(made: Path, role: str, need: Need) -> None:
    need("openssl")
    assert (made / f"{role}.pub").read_bytes() == openssl(
        "x509", "-in", made / f"{role}.pem", "-noout", "-pubkey"
    )


def test_fingerprints_are_those_of_openssl(made: Path, host: Host, need: Need) -> None:
    need("openssl")
    for row in keys.open_keyset(host, made).describe():
        shown = openssl("x509", "-in", row["path"], "-noout", "-fingerprint", "-sha256").decode()
        assert shown.strip().rpartition("=")[2].replace(":", "").lower() == row["fingerprint"]


def test_description_tells_nothing_private(made: Path, host: Host) -> None:
    keyset = keys.open_keyset(host, made)
    shown = json.dumps(keyset.describe()) + repr(keyset) + repr(keyset.signer("uki"))
    for path in made.glob("*.key"):
        assert path.read_text().splitlines()[1] not in shown
    assert "PRIVATE" not in shown


# --- What it refuses ---------------------------------------------------------------------------------


def test_new_never_overwrites(made: Path, host: Host) -> None:
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    with pytest.raises(Failure, match="never overwritten"):
        keys.new(host, made, "acme")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_new_does_not_follow_a_dangling_link(tmp_path: Path, host: Host) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Failure, match="never overwritten"):
        keys.new(host, tmp_path / "link", "acme")


@pytest.mark.parametrize("name", ["", "Acme", "-acme", "a b", "a/b", "a" * 65, "acme\n"])
def test_new_refuses_names(tmp_path: Path, host: Host, name: str) -> None:
    with pytest.raises(Usage, match="product name"):
        keys.new(host, tmp_path / "keyset", name)
    assert list(tmp_path.iterdir()) == []


def test_new_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    class FullDisk(Host):
        def sync_file(self, path: object) -> None:
            if str(path).endswith(".pem") or ".pem." in str(path):
                raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        keys.new(FullDisk(), tmp_path / "keyset", "acme")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["layer.key", "layer.pem", "pcr.pub"])
def test_open_names_what_is_missing(copy: Path, host: Host, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(Failure, match=f"lacks .*{name}"):
        keys.open_keyset(host, copy)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610, 0o644])
def test_open_refuses_a_key_that_others_can_use(copy: Path, host: Host, mode: int) -> None:
    (copy / "uki.key").chmod(mode)
    with pytest.raises(Failure, match=r"open to others .*chmod 600"):
        keys.open_keyset(host, copy)


def test_open_refuses_a_key_of_another_role(copy: Path, host: Host) -> None:
    shutil.copy(copy / "uki.key", copy / "layer.key")
    with pytest.raises(Failure, match="does not fit"):
        keys.open_keyset(host, copy)


def test_open_refuses_a_public_key_of_another_role(copy: Path, host: Host) -> None:
    shutil.copy(copy / "pcr.pub", copy / "platform.pub")
    with pytest.raises(Failure, match=r"platform\.pub does not fit"):
        keys.open_keyset(host, copy)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "[]",
        "{",
        '{"schema": 2, "name": "x", "product": "7d0f8a3e-0000-4000-8000-000000000000"}',
        '{"schema": 1, "name": "x"}',
        '{"schema": 1, "name": "x", "product": "y"}',
        '{"schema": 1, "name": "x", "product": "7d0f8a3e-0000-4000-8000-000000000000", "epoch": 0}',
        '{"schema": 1, "name": "x", "product": "7d0f8a3e-0000-4000-8000-000000000000", "epoch": true}',
        pytest.param("[" * 100000, id="deep"),
        pytest.param("9" * 5000, id="digits"),
    ],
)
def test_open_refuses_another_description(copy: Path, host: Host, words: str) -> None:
    (copy / "keyset.json").write_text(words)
    with pytest.raises(Failure, match="keyset.json"):
        keys.open_keyset(host, copy)


@pytest.mark.parametrize("name", ["uki.key", "uki.pem"])
def test_open_refuses_garbage(copy: Path, host: Host, name: str) -> None:
    (copy / name).write_bytes(b"-----BEGIN NONSENSE-----\n")
    with pytest.raises(Failure, match="uki"):
        keys.open_keyset(host, copy)


def test_open_refuses_what_is_no_keyset(tmp_path: Path, host: Host) -> None:
    with pytest.raises(Failure, match="no keyset.*mosinit keys new"):
        keys.open_keyset(host, tmp_path)


# --- Signing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "digest"),
    [("product", "sha256"), ("manifest-ca", "sha384"), ("uki", "sha256"), ("layer", "sha256")],
)
def test_openssl_verifies_what_a_role_signs(
    made: Path, host: Host, tmp_path: Path, need: Need, role: str, digest: str
) -> None:
    need("openssl")
    signature = tmp_path / "signature"
    signature.write_bytes(keys.open_keyset(host, made).signer(role).sign(b"the exact bytes"))
    verify = ("pkeyutl", "-verify", "-rawin", "-digest", digest, "-certin", "-inkey", made / f"{role}.pem")
    data = tmp_path / "data"
    data.write_bytes(b"the exact bytes")
    assert b"Verified" in openssl(*verify, "-sigfile", signature, "-in", data)
    data.write_bytes(b"the exact bytez")
    with pytest.raises(subprocess.CalledProcessError):
        openssl(*verify, "-sigfile", signature, "-in", data)


@pytest.mark.parametrize("role", ["product", "manifest-ca", "uki"])
def test_signatures_repeat(made: Path, host: Host, role: str) -> None:
    signer = keys.open_keyset(host, made).signer(role)
    assert signer.sign(b"data") == signer.sign(b"data")


def test_an_organisation_may_bring_an_ed25519_key(copy: Path, host: Host, need: Need) -> None:
    need("openssl")
    key = ed25519.Ed25519PrivateKey.generate()
    (copy / "product.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    subject = ("-subj", "/CN=product", "-days", "2")
    (copy / "product.pem").write_bytes(
        openssl("req", "-x509", "-new", "-key", copy / "product.key", *subject)
    )
    signature = keys.open_keyset(host, copy).signer("product").sign(b"data")
    key.public_key().verify(signature, b"data")
    with pytest.raises(InvalidSignature):
        key.public_key().verify(signature, b"other data")


def test_pkcs7_is_detached_bare_and_repeats(made: Path, host: Host, tmp_path: Path, need: Need) -> None:
    need("openssl")
    signer = keys.open_keyset(host, made).signer("layer")
    blob = signer.sign_pkcs7(b"one\n" * 16)
    assert blob == signer.sign_pkcs7(b"one\n" * 16)
    structure = openssl("asn1parse", "-inform", "DER", stdin=blob).decode()
    # cont [0] below depth 3 would be certificates or signed attributes; either makes the kernel refuse or
    # wander.
    assert [line for line in structure.splitlines() if "cont [ 0 ]" in line and "d=1" not in line] == []
    assert ":sha256" in structure
    (tmp_path / "blob").write_bytes(blob)
    (tmp_path / "data").write_bytes(b"one\n" * 16)
    verify = ["smime", "-verify", "-binary", "-inform", "DER", "-nointern", "-noverify"]
    verify += ["-in", str(tmp_path / "blob"), "-certfile", str(made / "layer.pem")]
    openssl(*verify, "-content", tmp_path / "data")
    (tmp_path / "data").write_bytes(b"one\n" * 15 + b"two\n")
    with pytest.raises(subprocess.CalledProcessError):
        openssl(*verify, "-content", tmp_path / "data")


def test_sbverify_accepts_a_signed_pe_and_signing_repeats(
    made: Path, host: Host, tmp_path: Path, need: Need
) -> None:
    need("sbsign", "sbverify", "sbattach", "faketime", "openssl", STUB)
    signer = keys.open_keyset(host, made).signer("uki")
    for name in ("first", "second"):
        signer.sign_pe(STUB, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    detach = ["sbattach", "--detach", str(tmp_path / "blob"), str(tmp_path / "first")]
    subprocess.run(detach, capture_output=True, check=True)
    # keys.SIGNING_TIME: a signature of this very second would repeat only by luck.
    assert b":250101000000Z" in openssl("asn1parse", "-inform", "DER", "-in", tmp_path / "blob")
    verify = ["sbverify", "--cert", str(made / "uki.pem"), str(tmp_path / "first")]
    subprocess.run(verify, capture_output=True, check=True)
    verify[2] = str(made / "layer.pem")
    assert subprocess.run(verify, capture_output=True).returncode != 0


def test_only_measuring_roles_have_a_bare_public_key(made: Path, host: Host) -> None:
    keyset = keys.open_keyset(host, made)
    assert keyset.public_path("pcr") == made / "pcr.pub"
    with pytest.raises(Failure, match="no bare public key"):
        keyset.public_path("uki")


def test_one_key_for_two_roles_is_refused(host: Host, copy: Path) -> None:
    for kind in ("key", "pem"):
        shutil.copy(copy / f"uki.{kind}", copy / f"layer.{kind}")
    with pytest.raises(Failure, match="one key for uki and layer"):
        keys.open_keyset(host, copy)


def test_a_folder_that_others_can_change_is_refused(host: Host, copy: Path) -> None:
    copy.chmod(0o777)
    with pytest.raises(Failure, match="can be changed by others"):
        keys.open_keyset(host, copy)
