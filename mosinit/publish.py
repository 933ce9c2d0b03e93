"""The `publish` verb: a person's manifest and its images become a signed release.

A release is an OCI image layout whose index.json has one entry, an image index (tag `release`) with

1. the install artefact: signed manifest, signature, product certificate, and a PKCS#7 for each layer,
2. the image manifest of each target, all layers of it verity layers.

It passes through any registry as one unit, and the same input gives the same bytes.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from mosinit import images, init
from mosinit.host import Failure, Host, Usage
from mosinit.keys import Keyset

TAG = "release"
TARGET_ANNOTATION = "io.mosinit.target"


@dataclass(frozen=True)
class Published:
    """What was published: digests are `sha256:…`, those of targets are of image manifests, by name."""

    sequence: int
    manifest_sha256: str
    index_digest: str
    targets: Mapping[str, str]


@dataclass(frozen=True)
class SignedTarget:
    """A target with its converted image and the PKCS#7 blob of each layer."""

    target: init.Target
    image: images.ConvertedImage
    signatures: tuple[images.Descriptor, ...]


def publish(host: Host, manifest: Path, keyset: Keyset, destination: str) -> Published:
    """Convert, sign and write the release that a person's manifest describes to `oci:DIR`.

    A relative source is one beside the manifest. An earlier release at DIR is replaced when the new one is
    whole. Raises `Refused` (the machine's own checks) or `Failure`.
    """
    folder = _destination(destination)
    try:
        written = init.parse_manifest(manifest.read_bytes(), published=False)
    except OSError as error:
        raise Failure(f"cannot read {manifest}: {error.strerror}") from error
    policy = check_signer(keyset, written)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with host.scratch(near=folder) as scratch:
        layout = images.Layout(scratch / "release")
        targets = [_sign_target(host, item, manifest.parent, keyset, layout) for item in written.targets]
        text = encode_manifest(written, targets)
        signature = keyset.signer("product").sign(text)
        certificate = _pem(keyset, "product")
        signed = init.verify_manifest(text, signature, certificate, policy)
        _check_images(layout, signed)
        index = _write_release(host, layout, (text, signature, certificate), targets)
        layout.path.chmod(0o755)
        _replace_folder(layout.path, folder, scratch / "old")
    host.sync_file(folder.parent)
    names = {item.target.service_name: item.image.manifest.digest for item in targets}
    host.say(f"published sequence {written.sequence} to {folder}: {', '.join(names)}")
    return Published(written.sequence, signed.sha256, index.digest, names)


def _destination(destination: str) -> Path:
    if not destination.startswith("oci:") or not destination.removeprefix("oci:"):
        raise Usage(f"cannot publish to {destination}: a release goes to oci:DIR")
    folder = Path(destination.removeprefix("oci:")).absolute()
    if folder.exists() and not (folder / "oci-layout").is_file():
        raise Failure(f"{folder} exists and is no OCI image layout: name another folder")
    return folder


def _replace_folder(new: Path, target: Path, old: Path) -> None:
    """Put a whole folder in the place of another; whoever looks sees one of them, or for a moment none."""
    if target.exists():
        target.rename(old)
    new.rename(target)


# --- What may be signed, and by whom ------------------------------------------------------------------


def check_signer(keyset: Keyset, contents: init.Contents) -> init.Policy:
    """Return the policy of a machine of this product, if it would take manifests of this keyset.

    Machines do not look at validity dates when they boot, because their clocks are no evidence: dates count
    here. Raises `Failure`, `Refused`.
    """
    if contents.product != keyset.product:
        raise Failure(
            f"the manifest is for product {contents.product}, the keyset for {keyset.product}: take its own"
        )
    init.verify_certificate(_pem(keyset, "product"), _pem(keyset, "manifest-ca"), keyset.product)
    now = datetime.datetime.now(datetime.timezone.utc)
    for role in ("product", "manifest-ca"):
        certificate = keyset.certificate(role)
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not begin <= now <= end:
            raise Failure(
                f"the {role} certificate is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}: renew it"
            )
    return init.Policy("run", keyset.product, 1, "", "", (), (), (), "", _pem(keyset, "manifest-ca"))


def _pem(keyset: Keyset, role: str) -> bytes:
    return keyset.certificate(role).public_bytes(serialization.Encoding.PEM)


def _sign_target(
    host: Host, target: init.Target, beside: Path, keyset: Keyset, layout: images.Layout
) -> SignedTarget:
    source = target.source
    if source.startswith("oci:"):
        source = "oci:" + str(beside.absolute() / source.removeprefix("oci:"))
    image = images.convert(host, source, layout)
    signer = keyset.signer("layer")
    signatures = [
        # The kernel checks the signature of the root hash as text: 64 hex digits, no line end.
        layout.add_blob(host, signer.sign_pkcs7(layer.root_hash.encode()), init.LAYER_SIGNATURE_MEDIA_TYPE)
        for layer in image.layers
    ]
    return SignedTarget(target, image, tuple(signatures))


def _check_images(layout: images.Layout, manifest: init.Manifest) -> None:
    """See that a machine would find in the images what it needs."""
    for target in manifest.contents.targets:
        document = layout.read_blob(images.Descriptor(images.MANIFEST_TYPE, target.digest, target.size))
        layers = init.parse_image(document).layers
        if len(layers) != len(target.layer_signatures):
            raise Failure(
                f"{target.service_name} has {len(layers)} layers, {len(target.layer_signatures)} are signed"
            )


# --- The signed manifest ------------------------------------------------------------------------------


def encode_manifest(written: init.Contents, targets: Sequence[SignedTarget]) -> bytes:
    """Return the signed form of a manifest: `init.parse_manifest` reads back the same."""
    document: dict[str, object] = {
        "version": written.version,
        "product": written.product,
        "sequence": written.sequence,
        "epoch": written.epoch,
        "update_type": written.update_type,
        "storage": [
            _without_defaults({**volume._asdict(), "size": _size(volume.size)}) for volume in written.storage
        ],
        "targets": [_target(item) for item in targets],
    }
    lines = _yaml({key: value for key, value in document.items() if value != []})
    return "".join(f"{line}\n" for line in lines).encode()


def _target(item: SignedTarget) -> dict[str, object]:
    fields = item.target._asdict()
    network = item.target.network
    fields |= {
        "source": "",
        "digest": item.image.manifest.digest,
        "size": item.image.manifest.size,
        "layer_signatures": [signature.digest for signature in item.signatures],
        "network": [],
        "storage": [mount._asdict() for mount in item.target.storage],
    }
    if network.type != "none":
        ports = [port._asdict() for port in network.ports]
        fields["network"] = _without_defaults({**network._asdict(), "ports": ports})
    # An image of UKI alone has no layers to sign: the list is a required one, and then an empty one.
    kept = {"layer_signatures": fields["layer_signatures"]}
    return _without_defaults(fields) | kept


def _without_defaults(fields: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in fields.items() if value not in ("", [], ())}


def _size(size: int) -> str:
    """Return bytes with the largest unit that is exact (K, M, G, T)."""
    unit = max(power for power in range(1, 5) if size % (1 << 10 * power) == 0)
    return f"{size >> 10 * unit}{'KMGT'[unit - 1]}"


def _yaml(value: object) -> Iterator[str]:
    """Write mappings, lists, texts and numbers as YAML lines; texts are quoted, so that none is a number."""
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, dict | list) and item:
                yield f"{key}:"
                yield from (f"  {line}" for line in _yaml(item))
            else:
                yield f"{key}: {json.dumps(item)}"
    elif isinstance(value, list):
        for item in value:
            lines = list(_yaml(item))
            yield f"- {lines[0]}"
            yield from (f"  {line}" for line in lines[1:])
    else:
        yield json.dumps(value)


# --- The release --------------------------------------------------------------------------------------


def _write_release(
    host: Host, layout: images.Layout, signed: tuple[bytes, bytes, bytes], targets: Sequence[SignedTarget]
) -> images.Descriptor:
    """Write artefact, index and index.json; returns the index's descriptor."""
    kinds = (init.MANIFEST_MEDIA_TYPE, init.SIGNATURE_MEDIA_TYPE, init.CERTIFICATE_MEDIA_TYPE)
    layers = [layout.add_blob(host, blob, kind) for blob, kind in zip(signed, kinds, strict=True)]
    layers += {blob.digest: blob for item in targets for blob in item.signatures}.values()
    config = layout.add_blob(host, b"{}", images.EMPTY_TYPE)
    artefact = {
        "schemaVersion": 2,
        "mediaType": images.MANIFEST_TYPE,
        "artifactType": init.RELEASE_ARTIFACT,
        "config": config.json(),
        "layers": [layer.json() for layer in layers],
    }
    entries = [
        layout.add_blob(
            host, images.encode(artefact), images.MANIFEST_TYPE, artifact_type=init.RELEASE_ARTIFACT
        )
    ]
    entries += [
        images.Descriptor(
            item.image.manifest.media_type,
            item.image.manifest.digest,
            item.image.manifest.size,
            annotations={TARGET_ANNOTATION: item.target.service_name},
        )
        for item in targets
    ]
    index = layout.add_blob(
        host, images.encode(images.index_of(entries)), images.INDEX_TYPE, annotations={images.REF_NAME: TAG}
    )
    layout.write_index(host, [index])
    return index
