"""Images in a medium that the layer key sealed again: what does not fit the signed manifest is refused.

So the store's own seal always fits: these are the machine's answers to a publisher's mistake, a mirror that
lost something, or a store that another release was laid into.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from programs import init_program
from world import GOOD_HOSTFS, HELLO, World, check_refused, flip, get, part_of, put, replace_parts

from mosinit import init, keys


@dataclass
class Draft:
    """A copy of a release that can be changed and signed again."""

    world: World
    release: Path
    layout: Path
    text: bytes = field(init=False)

    def __post_init__(self) -> None:
        shutil.copytree(self.release, self.layout)
        self.text = part_of(self.layout, init.MANIFEST_MEDIA_TYPE)

    def target(self, name: str) -> init.Target:
        """Return what the manifest says about a target."""
        (found,) = (each for each in init.parse_manifest(self.text).targets if each.service_name == name)
        return found

    def image(self, name: str) -> dict[str, Any]:
        """Return the image manifest of a target."""
        return dict(json.loads(get(self.layout, self.target(name).digest)))

    def blob(self, digest: str) -> Path:
        """Return the file of a blob."""
        return self.layout / "blobs/sha256" / digest.removeprefix("sha256:")

    def layer(self) -> Path:
        """Return the file of hostfs's layer."""
        return self.blob(self.image("hostfs")["layers"][0]["digest"])

    def replace(self, old: str, new: str) -> None:
        """Change words of the manifest."""
        assert old in self.text.decode()
        self.text = self.text.replace(old.encode(), new.encode())

    def set_image(self, name: str, image: dict[str, Any]) -> None:
        """Give a target another image manifest, and the manifest its digest and size."""
        old, new = self.target(name), put(self.layout, json.dumps(image).encode(), str(image["mediaType"]))
        pattern = rb'digest: "%s"\n( +)size: \d+' % old.digest.encode()
        digest = f'digest: "{new["digest"]}"\n'.encode()
        self.text, count = re.subn(pattern, digest + f"\\g<1>size: {new['size']}".encode(), self.text)
        assert count == 1

    def signed(self, signer: keys.Signer | None = None) -> Path:
        """Sign the manifest and return the release."""
        signer = signer or self.world.keyset.signer("product")
        replace_parts(
            self.layout,
            {
                init.MANIFEST_MEDIA_TYPE: self.text,
                init.SIGNATURE_MEDIA_TYPE: signer.sign(self.text),
                init.CERTIFICATE_MEDIA_TYPE: signer.certificate.public_bytes(serialization.Encoding.PEM),
            },
        )
        return self.layout


def second_product(world: World) -> keys.Signer:
    """Return a signer for another product, whose certificate is under the same manifest CA."""
    folder = world.folder / "second-product"
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    authority = world.keyset.certificate("manifest-ca")
    loaded = serialization.load_pem_private_key(
        world.keyset.signer("manifest-ca").private_key_path().read_bytes(), None
    )
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    ours = world.keyset.certificate("product")
    kept = [each for each in ours.extensions if not isinstance(each.value, x509.SubjectAlternativeName)]
    builder = x509.CertificateBuilder(
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "another product")]),
        issuer_name=authority.subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=ours.not_valid_before_utc,
        not_valid_after=ours.not_valid_before_utc + datetime.timedelta(days=1),
    )
    for extension in kept:
        builder = builder.add_extension(extension.value, extension.critical)
    name = x509.UniformResourceIdentifier(f"urn:uuid:{uuid.uuid4()}")
    builder = builder.add_extension(x509.SubjectAlternativeName([name]), critical=False)
    certificate = builder.sign(loaded, hashes.SHA256())
    assert (
        ExtendedKeyUsageOID.CODE_SIGNING
        in certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    )
    (folder / "key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return keys.FileSigner(world.host, folder / "key", folder / "unused", certificate)


# --- What is changed ---------------------------------------------------------------------------------------


def layer_changed(change: Callable[[bytes], bytes]) -> Callable[[Draft], Path]:
    """Change the file of hostfs's layer under its old name: no digest is looked at, verity must see it."""

    def make(draft: Draft) -> Path:
        layer = draft.layer()
        layer.write_bytes(change(layer.read_bytes()))
        return draft.layout

    return make


def in_tree(layer: bytes) -> bytes:
    """Flip a bit of the hash tree's leaf that holds the first block's hash."""
    blocks = init.verity_data_blocks(len(layer))
    tree = (blocks + 1) * init.BLOCK
    assert len(layer) - tree == 4 * init.BLOCK  # three leaves under a root: veritysetup puts the root first
    return flip(layer, tree + init.BLOCK)


def image_flipped(draft: Draft) -> Path:
    path = draft.blob(draft.target("hostfs").digest)
    path.write_bytes(flip(path.read_bytes(), 30))
    return draft.layout


def without_blob(find: Callable[[Draft], Path]) -> Callable[[Draft], Path]:
    def make(draft: Draft) -> Path:
        find(draft).unlink()
        return draft.layout

    return make


def without_root_hash(draft: Draft) -> Path:
    image = draft.image("hostfs")
    for name in init.ROOT_HASH_ANNOTATIONS:
        image["layers"][0]["annotations"].pop(name, None)
    draft.set_image("hostfs", image)
    return draft.signed()


def without_signature(draft: Draft) -> Path:
    (digest,) = draft.target("hostfs").layer_signatures
    pattern = rb'layer_signatures:\n +- "%s"\n' % digest.encode()
    draft.text, count = re.subn(pattern, b"layer_signatures: []\n", draft.text)
    assert count == 1
    return draft.signed()


def signature_of_another_layer(draft: Draft) -> Path:
    (ours,), (other,) = (draft.target(name).layer_signatures for name in ("hostfs", "bootkit"))
    draft.replace(ours, other)
    return draft.signed()


def absent_image(draft: Draft) -> Path:
    draft.replace(draft.target("hostfs").digest, "sha256:" + 64 * "5")
    return draft.signed()


def other_product(draft: Draft) -> Path:
    draft.replace(draft.world.keyset.product, str(uuid.uuid4()))
    return draft.signed()


def other_products_certificate(draft: Draft) -> Path:
    return draft.signed(second_product(draft.world))


CASES: dict[str, tuple[str, Callable[[Draft], Path]]] = {
    "a bit of the layer's data": ("LAYER-READ", layer_changed(lambda data: flip(data, 1024 + 8))),
    "a bit of the layer's hash tree": ("LAYER-READ", layer_changed(in_tree)),
    "a layer cut short": ("LAYER-SIZE", layer_changed(lambda data: data[: -init.BLOCK])),
    "a layer that is longer": ("LAYER-SIZE", layer_changed(lambda data: data + bytes(init.BLOCK))),
    "a bit of the image manifest": ("IMAGE-DIGEST", image_flipped),
    "no such layer": ("STORE-BLOB", without_blob(Draft.layer)),
    "no such signature": (
        "STORE-BLOB",
        without_blob(lambda draft: draft.blob(draft.target("hostfs").layer_signatures[0])),
    ),
    "no such image": ("STORE-BLOB", absent_image),
    "no root hash": ("LAYER-ROOTHASH", without_root_hash),
    "no signature": ("LAYER-SIGNATURE", without_signature),
    "another layer's signature": ("LAYER-SIGNATURE", signature_of_another_layer),
    "another product's manifest": ("MANIFEST-PRODUCT", other_product),
    "another product's certificate": ("MANIFEST-PRODUCT", other_products_certificate),
}


@pytest.fixture(scope="module")
def large(world: World) -> Path:
    """A release whose hostfs has a hash tree of two levels."""
    return world.release("large", {**GOOD_HOSTFS, "usr/data": os.urandom(300 * init.BLOCK)})


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_the_signed_manifest_is_refused(
    world: World, medium: Path, large: Path, case: str
) -> None:
    check, change = CASES[case]
    draft = Draft(world, large, world.folder / case.replace(" ", "-").replace("'", ""))
    check_refused(world.go_on(world.medium(change(draft))), check)


def test_a_corrupt_block_that_hostfs_meets_restarts_the_machine(world: World, medium: Path) -> None:
    """Nothing reads it before the hand-over; with a mere error for an answer, the program would speak."""
    data = os.urandom(16 * init.BLOCK)
    hostfs = {"sbin/init": init_program(HELLO, "hang", b"/usr/data"), "usr/data": data}
    draft = Draft(world, world.release("met-later", hostfs), world.folder / "corrupt-block")
    layer = draft.layer().read_bytes()
    draft.layer().write_bytes(flip(layer, layer.index(data[:512]) + 100))
    outcome = world.go_on(world.medium(draft.layout), until="multi-user", timeout=60)
    console = outcome.console.read_bytes()
    assert (outcome.status, outcome.reason) == (1, "the machine restarted before multi-user.target")
    assert b'"result": "pivoted"' in console
    assert HELLO.strip() not in console
