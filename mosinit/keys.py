"""The keyset: a folder with every key of an organisation, one role per key, and the one way to sign.

    keyset.json        {"schema": 1, "name": NAME, "product": UUID, "epoch": the lowest that is safe}
    ROLE.key           private key, PKCS#8 PEM, mode 0600; the folder is 0700
    ROLE.pem           certificate
    pcr.pub, platform.pub    public keys (SubjectPublicKeyInfo PEM), for tools that measure

Roles do not mix. Firmware ignores key usage, so a key that may sign two kinds of things could be made to
sign one in place of the other; and TPM policies tell keys in db apart only if each is an entry of its own.
No private key is ever printed or overwritten.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mosinit import explain, init
from mosinit.host import Failure, Host, Usage, closed_environment

SCHEMA = 1
YEAR = datetime.timedelta(days=365)
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

PrivateKey: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


class Role(NamedTuple):
    """What a key of the keyset is for, and what kind of key and certificate that takes."""

    title: str
    algorithm: str
    years: int = 30
    ca: bool = False
    issuer: str | None = None  # None: self-signed
    public: bool = False  # also kept as a bare public key
    decrypts: bool = False  # instead of signing


ROLES: Mapping[str, Role] = {
    "PK": Role("owner of the firmware's Secure Boot variables", "RSA-2048"),
    "KEK": Role("signs changes of db and dbx", "RSA-2048"),
    "uki": Role("signs what the firmware starts", "RSA-2048"),
    "layer": Role("signs dm-verity root hashes", "RSA-2048"),
    "pcr": Role("approves PCR 11 of a UKI", "RSA-2048", public=True),
    "platform": Role("approves PCR 7 values of a machine", "RSA-2048", public=True),
    "manifest-ca": Role("issues product certificates", "ECDSA P-384", ca=True),
    "product": Role("signs install manifests", "ECDSA P-256", years=10, issuer="manifest-ca"),
    "sudi-ca": Role("issues machine identities and machine records", "ECDSA P-384", ca=True),
    "recovery": Role("decrypts recovery records", "RSA-3072", decrypts=True),
}

# The time that Authenticode signatures carry: firmware does not look at it, and a constant keeps two builds
# of the same input equal.
SIGNING_TIME = 1735689600  # 2025-01-01T00:00:00Z


class Signer(Protocol):
    """Whatever signs for one role: a file here, a token or a service elsewhere."""

    @property
    def certificate(self) -> x509.Certificate:
        """The certificate that verifies what this signer signs."""

    def sign(self, data: bytes) -> bytes:
        """Sign the exact bytes as the key's type wants it; `openssl pkeyutl -verify -rawin` verifies it."""

    def sign_pkcs7(self, data: bytes, *, with_certificate: bool = False) -> bytes:
        """Return a detached PKCS#7 (DER) without attributes: what dm-verity takes; firmware wants the
        signer's certificate in it.
        """

    def sign_pe(self, source: Path, target: Path) -> None:
        """Write `source` with an Authenticode signature to `target`; the same input gives the same bytes."""

    def sign_certificate(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        """Sign a certificate that this role issues."""

    def open_cms(self, message: bytes) -> bytes:
        """Decrypt a message (CMS, DER) that was encrypted for this role's certificate."""


@dataclass(frozen=True)
class FileSigner:
    """Signs with a private key that lies in a file."""

    host: Host
    key: Path
    certificate_path: Path
    certificate: x509.Certificate

    def sign(self, data: bytes) -> bytes:
        """Sign the exact bytes: ECDSA (RFC 6979, so that it repeats), RSA PKCS#1 v1.5, or Ed25519."""
        key = _read_key(self.key)
        if isinstance(key, rsa.RSAPrivateKey):
            return key.sign(data, padding.PKCS1v15(), hashes.SHA256())
        if isinstance(key, ed25519.Ed25519PrivateKey):
            return key.sign(data)
        digest = hashes.SHA384() if key.curve.key_size > 256 else hashes.SHA256()
        return key.sign(data, ec.ECDSA(digest, deterministic_signing=True))

    def sign_pkcs7(self, data: bytes, *, with_certificate: bool = False) -> bytes:
        """Return the detached PKCS#7 over the exact bytes."""
        bare = [] if with_certificate else ["-nocerts"]
        return self.host.run(
            ["openssl", "smime", "-sign", "-binary", "-noattr", *bare, "-md", "sha256",
             "-outform", "DER", "-signer", self.certificate_path, "-inkey", self.key],
            stdin=data,
            env=closed_environment(),
        )  # fmt: skip

    def sign_pe(self, source: Path, target: Path) -> None:
        """Write the signed copy of a PE file; its time is a constant."""
        time = datetime.datetime.fromtimestamp(SIGNING_TIME, datetime.timezone.utc)
        frozen = time.strftime("%Y-%m-%d %H:%M:%S")
        with self.host.replacing(target) as fresh:
            self.host.run(
                ["faketime", "-f", frozen,
                 "sbsign", "--key", self.key, "--cert", self.certificate_path, "--output", fresh, source],
                env=closed_environment(),
            )  # fmt: skip

    def sign_certificate(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        """Sign it with the hash that the key's size asks for."""
        return builder.sign(_read_key(self.key), _digest(self.certificate.public_key()))

    def open_cms(self, message: bytes) -> bytes:
        """Decrypt the message; `Failure` if it is for another key, or was changed."""
        return self.host.run(
            ["openssl", "cms", "-decrypt", "-binary", "-inform", "DER",
             "-recip", self.certificate_path, "-inkey", self.key],
            stdin=message, env=closed_environment(), timeout=60,
        )  # fmt: skip


@dataclass(frozen=True)
class Keyset:
    """An opened keyset: every role is there, private, and fits its certificate."""

    host: Host
    folder: Path
    name: str
    product: str
    epoch: int
    certificates: Mapping[str, x509.Certificate]

    def certificate(self, role: str) -> x509.Certificate:
        """Return a role's certificate."""
        return self.certificates[role]

    def certificate_path(self, role: str) -> Path:
        """Return the PEM file of a role's certificate."""
        return self.folder / f"{role}.pem"

    def public_path(self, role: str) -> Path:
        """Return the PEM file of a role's bare public key; only pcr and platform have one."""
        if not ROLES[role].public:
            raise Failure(f"the role {role} keeps no bare public key: use its certificate")
        return self.folder / f"{role}.pub"

    def signer(self, role: str) -> Signer:
        """Return what signs for a role."""
        return FileSigner(
            self.host, self.folder / f"{role}.key", self.certificate_path(role), self.certificates[role]
        )

    def describe(self) -> list[dict[str, str]]:
        """List the roles as plain data; a fingerprint is the SHA-256 of the DER certificate."""
        return [
            {
                "role": role,
                "title": ROLES[role].title,
                "algorithm": _algorithm(certificate.public_key()),
                "fingerprint": certificate.fingerprint(hashes.SHA256()).hex(),
                "not_before": certificate.not_valid_before_utc.isoformat(),
                "not_after": certificate.not_valid_after_utc.isoformat(),
                "path": str(self.certificate_path(role)),
            }
            for role, certificate in self.certificates.items()
        ]


def new(host: Host, folder: Path, product_name: str) -> Keyset:
    """Make a keyset with a new key for each role and a new product id; it appears complete or not at all."""
    if not NAME.fullmatch(product_name):
        raise Usage(
            f"product name {product_name!r} does not fit: name one of 1 to 64 small letters, digits, '.', "
            "'_' and '-' that begins with a letter or digit, such as --product acme"
        )
    if os.path.lexists(folder):
        raise Failure(f"{folder} exists already and keys are never overwritten: choose another folder")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    product = str(uuid.uuid4())
    with host.scratch(near=folder) as scratch:
        fresh = scratch / "keyset"
        fresh.mkdir(mode=0o700)
        _write_roles(host, fresh, product_name, product)
        _write(host, fresh / "keyset.json", _encode_description(product_name, product, 1), 0o644)
        # rename(2) would replace an empty folder made meanwhile, never one with something in it.
        fresh.rename(folder)
        host.sync_file(folder.absolute().parent)
    return open_keyset(host, folder)


def open_keyset(host: Host, folder: Path) -> Keyset:
    """Open a keyset.

    Raises `Failure` if a role is missing, readable by others, or does not fit its certificate.
    """
    name, product, epoch = _read_description(folder / "keyset.json")
    if folder.stat().st_mode & 0o022:
        raise Failure(f"{folder} can be changed by others: chmod 700 {folder}")
    check_owner(
        folder, *(path for role in ROLES for path in (folder / f"{role}.key", folder / f"{role}.pem"))
    )
    if (folder / "PK.pem").exists() and not any(folder.glob("*.key")):
        raise Failure(f"{folder} holds public parts alone: name the keyset itself, which has the keys")
    certificates = {role: _open_role(folder, role) for role in ROLES}
    owners: dict[bytes, str] = {}
    for role, certificate in certificates.items():
        other = owners.setdefault(_spki(certificate.public_key()), role)
        if other != role:
            raise Failure(
                f"{folder} has one key for {other} and {role}: roles must not mix, make a new keyset"
            )
    return Keyset(host, folder, name, product, epoch, certificates)


def raise_epoch(host: Host, folder: Path, epoch: int) -> Keyset:
    """Call everything below an epoch unsafe: from here the keyset makes and enrolls nothing for it."""
    keyset = open_keyset(host, folder)
    if epoch < keyset.epoch:
        raise Failure(
            f"the epoch of {folder} is {keyset.epoch}, and it never falls: name {keyset.epoch} or more"
        )
    description = _encode_description(keyset.name, keyset.product, epoch)
    _write(host, folder / "keyset.json", description, 0o644)
    return open_keyset(host, folder)


def choose_epoch(asked: int | None, lowest: int, remedy: str = "") -> int:
    """Return the epoch that was asked for, the organisation's lowest safe one if none was.

    Raises `Refused` for one below that, with the remedy of who did not ask by --epoch.
    """
    epoch = lowest if asked is None else asked
    if epoch < lowest:
        expected = f"epoch {lowest} or later: the organisation calls what is below unsafe"
        remedy = remedy or f"leave --epoch away, or say --epoch {lowest} or more"
        raise explain.advised(init.Refused("EPOCH", expected=expected, seen=f"epoch {epoch}"), remedy)
    return epoch


def check_out(out: Path, *folders: Path) -> None:
    """Refuse a place for results in one of the folders, where keys or machines lie, and what is neither file
    nor folder.
    """
    place = out.absolute().parent.resolve() / out.name
    for folder in folders:
        if any(path.is_relative_to(folder.resolve()) for path in (place, place.resolve())):
            raise Usage(f"{out} lies in {folder}, where nothing else goes: name another place")
    if os.path.lexists(out) and not (out.is_file() or out.is_dir()):
        raise Failure(f"{out} is neither file nor folder: name another place")


def check_owner(*paths: Path) -> None:
    """Refuse what belongs to somebody else: they could change it at any moment, mode or no mode."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # that is told by who needs it
            owner = path.stat().st_uid
            if owner != os.geteuid():
                raise Failure(
                    f"{path} belongs to another user (uid {owner}): chown it to the one who uses it"
                )


@dataclass(frozen=True)
class Organisation:
    """The public parts of a keyset: what a machine that is to be provisioned gets to know."""

    folder: Path
    name: str
    product: str
    epoch: int
    files: Mapping[str, bytes]  # by file name; `open_organisation` saw that each is what its name says

    def certificate(self, role: str) -> x509.Certificate:
        """Return a role's certificate."""
        return x509.load_pem_x509_certificate(self.files[f"{role}.pem"])

    def policy(self) -> init.Policy:
        """Return the policy by which what its keys signed is verified outside of a boot."""
        return trust(self.product, self.files)


def trust(product: str, files: Mapping[str, bytes], revoked: Iterable[str] = ()) -> init.Policy:
    """Return the policy of a machine of the product, as far as it decides whose signatures count."""
    return init.Policy("run", product, 1, "", "", (), (), (), tuple(revoked), "", files)


def open_organisation(folder: Path) -> Organisation:
    """Read the public parts of a keyset from what `export` made, or from the keyset itself.

    Private keys are not read. Raises `Failure` if a part is missing or damaged.
    """
    if not (folder / "keyset.json").exists():
        raise Failure(
            f"{folder} holds no public parts of a keyset (it has no keyset.json): name what `mosinit keys "
            "export` wrote"
        )
    name, product, epoch = _read_description(folder / "keyset.json")
    bare = [f"{role}.pub" for role, kind in ROLES.items() if kind.public]
    files = {"keyset.json": _encode_description(name, product, epoch)}
    for file in (*(f"{role}.pem" for role in ROLES), *bare):
        try:
            files[file] = _public_part(folder / file)
        except FileNotFoundError as error:
            raise Failure(f"{folder} lacks {file}: make it again by `mosinit keys export`") from error
        except (OSError, ValueError) as error:
            raise Failure(
                f"cannot read {folder / file}: {_reason(error)}; make it again by `mosinit keys export`"
            ) from error
    made = Organisation(folder, name, product, epoch, files)
    for file in bare:
        if files[file] != _spki(made.certificate(file.removesuffix(".pub")).public_key()):
            raise Failure(f"{folder / file} does not fit its certificate: export the keyset again")
    return made


def _public_part(path: Path) -> bytes:
    """Read a certificate or a public key, and return it written anew; ValueError if the file holds more."""
    content = path.read_bytes()
    if path.suffix == ".pem":
        return _read_certificate(content).public_bytes(serialization.Encoding.PEM)
    return _spki(serialization.load_pem_public_key(_one_block(content)))


def _read_certificate(content: bytes) -> x509.Certificate:
    """Read one certificate; ValueError for a file with anything beside it."""
    certificate = x509.load_pem_x509_certificate(_one_block(content))
    certificate.public_key()
    return certificate


def _one_block(content: bytes) -> bytes:
    """Return a PEM file that holds one block and nothing else. A key in it would go wherever that goes."""
    lines = content.strip().splitlines()
    edges = [line for line in lines if line.startswith(b"-----")]
    if len(edges) != 2 or edges != [lines[0], lines[-1]]:
        raise ValueError("not exactly one block of PEM: remove everything else")
    return content


def export(host: Host, folder: Path, out: Path) -> Organisation:
    """Write the public parts of a keyset to a new folder, complete or not at all."""
    check_out(out, folder)
    _read_description(folder / "keyset.json")  # says what to do where there is no keyset
    organisation = open_organisation(folder)
    if os.path.lexists(out):
        raise Failure(f"{out} exists already: choose another folder")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with host.scratch(near=out) as scratch:
        write_organisation(host, organisation, scratch / "organisation")
        (scratch / "organisation").rename(out)
        host.sync_file(out.absolute().parent)
    return open_organisation(out)


def write_organisation(host: Host, organisation: Organisation, folder: Path) -> None:
    """Write the public parts to a folder that does not exist yet."""
    folder.mkdir(mode=0o755)
    for name, content in organisation.files.items():
        _write(host, folder / name, content, 0o644)


def _encode_description(name: str, product: str, epoch: int) -> bytes:
    words = {"schema": SCHEMA, "name": name, "product": product, "epoch": epoch}
    return (json.dumps(words, indent=1) + "\n").encode()


def _read_description(path: Path) -> tuple[str, str, int]:
    try:
        words = init.parse_json(path.read_bytes(), "")
        if not isinstance(words, dict):
            raise ValueError("no object")
        if words["schema"] != SCHEMA:
            raise Failure(f"{path} has schema {words['schema']}, this mosinit knows {SCHEMA}")
        epoch = words.get("epoch", 1)
        if type(epoch) is not int or not 1 <= epoch <= init.MAX_EPOCH:
            raise ValueError(f"the epoch is no number from 1 to {init.MAX_EPOCH}")
        return str(words["name"]), str(uuid.UUID(words["product"])), epoch
    except FileNotFoundError as error:
        raise Failure(
            f"{path.parent} is no keyset (it has no keyset.json): make one by `mosinit keys new`"
        ) from error
    except (init.Refused, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"cannot read {path}: {_reason(error)}; restore it from a backup") from error


def _open_role(folder: Path, role: str) -> x509.Certificate:
    key, certificate_path = folder / f"{role}.key", folder / f"{role}.pem"
    try:
        certificate = _read_certificate(certificate_path.read_bytes())
        mode = key.stat().st_mode
        if mode & 0o077:
            raise Failure(f"{key} is open to others (mode {mode & 0o777:04o}): chmod 600 {key}")
        public = _spki(_read_key(key).public_key())
        if public != _spki(certificate.public_key()):
            raise Failure(f"{key} does not fit {certificate_path}: restore the pair from a backup")
        if ROLES[role].public and (folder / f"{role}.pub").read_bytes() != public:
            raise Failure(
                f"{folder / f'{role}.pub'} does not fit {certificate_path}: restore it from a backup"
            )
    except FileNotFoundError as error:
        raise Failure(f"the keyset lacks {error.filename}: restore it from a backup") from error
    except (OSError, ValueError) as error:
        raise Failure(
            f"cannot read role {role} of keyset {folder}: {_reason(error)}; restore it from a backup"
        ) from error
    return certificate


def _reason(error: Exception) -> str:
    """Return what is wrong with a file, without the path that the message has anyway."""
    return (error.strerror or "") if isinstance(error, OSError) else str(error)


def _read_key(path: Path) -> PrivateKey:
    try:
        # That it fits its certificate is compared by whoever opens it; the full check of primes takes long.
        key = serialization.load_pem_private_key(
            path.read_bytes(), password=None, unsafe_skip_rsa_key_validation=True
        )
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Failure(f"cannot read {path}: not an unencrypted PKCS#8 key in PEM form") from error
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise Failure(f"cannot use {path}: not an RSA, ECDSA or Ed25519 key")
    return key


def _write_roles(host: Host, folder: Path, name: str, product: str) -> None:
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    # Whoever keeps a keyset in a checkout must not publish it with the next commit.
    _write(host, folder / ".gitignore", b"*\n", 0o644)
    made: dict[str, tuple[PrivateKey, x509.Certificate]] = {}
    for role, kind in ROLES.items():
        key = _generate(kind.algorithm)
        issuer_key, issuer = made[kind.issuer] if kind.issuer else (key, None)
        made[role] = key, _certify(role, key, issuer_key, issuer, name, product, now)
    for role, (key, certificate) in made.items():
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _write(host, folder / f"{role}.key", private, 0o600)
        _write(host, folder / f"{role}.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        if ROLES[role].public:
            _write(host, folder / f"{role}.pub", _spki(key.public_key()), 0o644)


def _certify(
    role: str,
    key: PrivateKey,
    issuer_key: PrivateKey,
    issuer: x509.Certificate | None,
    name: str,
    product: str,
    now: datetime.datetime,
) -> x509.Certificate:
    """Make a role's certificate (RFC 5280), signed by `issuer_key`; self-signed if there is no `issuer`."""
    kind = ROLES[role]
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, name), x509.NameAttribute(NameOID.COMMON_NAME, role)]
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key
    builder = (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + kind.years * YEAR)
        .add_extension(x509.BasicConstraints(ca=kind.ca, path_length=0 if kind.ca else None), critical=True)
        .add_extension(key_usage(ca=kind.ca, decrypts=kind.decrypts), critical=True)
        .add_extension(identifier(key.public_key()), critical=False)
    )
    if issuer:
        authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
            identifier(issuer_key.public_key())
        )
        builder = builder.add_extension(authority, critical=False)
    if role == "product":
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"urn:uuid:{product}")])
        code = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
        builder = builder.add_extension(code, critical=False).add_extension(names, critical=False)
    return builder.sign(issuer_key, _digest(issuer_key.public_key()))


def _digest(issuer: object) -> hashes.SHA256 | hashes.SHA384:
    """Return the hash with which a key signs certificates."""
    return hashes.SHA384() if _algorithm(issuer) == "ECDSA P-384" else hashes.SHA256()


def key_usage(*, ca: bool = False, decrypts: bool = False) -> x509.KeyUsage:
    """Return the one use of a key: issuing, decrypting, or signing."""
    return x509.KeyUsage(
        digital_signature=not ca and not decrypts,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=decrypts,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _generate(algorithm: str) -> PrivateKey:
    if algorithm.startswith("RSA-"):
        return rsa.generate_private_key(public_exponent=65537, key_size=int(algorithm[4:]))
    return ec.generate_private_key(ec.SECP384R1() if algorithm == "ECDSA P-384" else ec.SECP256R1())


def _algorithm(key: object) -> str:
    """Name a public key's algorithm and size."""
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA-{key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"ECDSA P-{key.key_size}"
    return "Ed25519" if isinstance(key, ed25519.Ed25519PublicKey) else type(key).__name__


def _spki(key: object) -> bytes:
    """Return a public key as SubjectPublicKeyInfo in PEM form."""
    assert isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey)
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _write(host: Host, path: Path, content: bytes, mode: int) -> None:
    """Write a file durably that has its mode from the first moment."""
    with host.replacing(path, mode=mode) as fresh:
        fresh.write_bytes(content)
