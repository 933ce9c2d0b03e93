"""A release as an installation takes it: verified by what the bring-up itself calls, all its blobs known.

Its documents decide, and they are signed; the list of what lies beside them is not, so nothing may be in it
that no document names.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509

from mosinit import approvals, images, init, pe, publish
from mosinit.generations import SignedManifest
from mosinit.host import Failure, Host
from mosinit.sources import INDEX, Blob, Source, lists, read_checked

# What a release says of itself, beside the signatures of layers.
KINDS = (
    init.MANIFEST_MEDIA_TYPE, init.SIGNATURE_MEDIA_TYPE, init.CERTIFICATE_MEDIA_TYPE, init.EPOCH_MEDIA_TYPE,
    init.EPOCH_SIGNATURE_MEDIA_TYPE,
)  # fmt: skip


@dataclass(frozen=True)
class Release:
    """A verified release: where it lies, its index, its manifest, all its blobs, and the UKI of run mode."""

    source: Source
    index: images.Descriptor
    manifest: init.Manifest
    signed: SignedManifest
    blobs: tuple[Blob, ...]
    uki: Blob
    uki_id: str

    @property
    def size(self) -> int:
        """Bytes of all blobs."""
        return sum(blob.size for blob in self.blobs)

    @property
    def lists(self) -> dict[str, bytes]:
        """Return what lies in a store beside the blobs: of what was verified, wherever it came from."""
        return lists(self.index)


def verify(host: Host, source: Source, policy: init.Policy) -> Release:
    """Return a release if a machine of that policy takes all of it. Raises `Refused`, `Failure`."""
    machine = source.machine
    manifest = init.verify_release(machine, policy)
    order = publish.read_epoch_order(machine, policy)
    if order.epoch != manifest.contents.epoch:
        expected = f"epoch {manifest.contents.epoch}"
        raise init.Refused("EPOCH-ORDER", expected=expected, seen=f"epoch {order.epoch}")
    if manifest.contents.update_type != "complete":
        raise Failure(f"{source.name} is a partial release: install a complete one first")
    _, bootkit = init.boot_targets(manifest.contents)
    signed = signed_manifest(machine, manifest)
    _check_dates(signed.certificate, policy)
    check_nothing_more(machine, manifest)
    blobs = list_blobs(machine)
    uki, uki_id = find_uki(machine, bootkit)
    for target in manifest.contents.targets:
        check_target(machine, target, blobs)
    source.check(host, blobs)
    return Release(source, find_index(machine), manifest, signed, blobs, uki, uki_id)


def signed_manifest(machine: init.Machine, manifest: init.Manifest) -> SignedManifest:
    """Return the manifest that was verified as it lies in the release, signature and certificate."""
    parts = init.find_release(machine)
    kinds = (init.MANIFEST_MEDIA_TYPE, init.SIGNATURE_MEDIA_TYPE, init.CERTIFICATE_MEDIA_TYPE)
    blobs = [
        init.read_blob(machine, parts[kind].digest, parts[kind].size, "MANIFEST-ABSENT") for kind in kinds
    ]
    if hashlib.sha256(blobs[0]).hexdigest() != manifest.sha256:
        raise init.Refused("MANIFEST-FORMAT", expected=manifest.sha256, seen="another one, read again")
    return SignedManifest(manifest.sha256, blobs[0], blobs[1], blobs[2])


def _check_dates(certificate: bytes, policy: init.Policy) -> None:
    """Refuse certificates out of their dates: a boot cannot look at a clock, an installation can."""
    now = datetime.datetime.now(datetime.timezone.utc)
    for name, pem in (("product", certificate), ("manifest CA", policy.manifest_ca)):
        parsed = x509.load_pem_x509_certificate(pem)
        begin, end = parsed.not_valid_before_utc, parsed.not_valid_after_utc
        if not begin <= now <= end:
            raise Failure(
                f"the {name} certificate is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}, and the clock "
                f"says {now:%Y-%m-%d}: set the clock, or publish with a new certificate"
            )


def check_nothing_more(machine: init.Machine, manifest: init.Manifest) -> None:
    """See that a release lists what its manifest names and nothing else: the list itself is not signed, and
    whoever keeps a release could fill the store, or this machine's memory.
    """
    index = find_index(machine)
    data = init.read_blob(machine, index.digest, index.size, "MANIFEST-ABSENT")
    _, listed = init.parse_descriptors(data, "manifests", "MANIFEST-ABSENT")
    artefact = next(item for item in listed if item.artifact_type == init.RELEASE_ARTIFACT)
    data = init.read_blob(machine, artefact.digest, artefact.size, "MANIFEST-ABSENT")
    raw, parts = init.parse_descriptors(data, "layers", "MANIFEST-ABSENT")
    config = init.parse_descriptor(raw.get("config"), "MANIFEST-ABSENT")
    targets = manifest.contents.targets
    named = {target.digest for target in targets} | {artefact.digest}
    signatures = {digest for target in targets for digest in target.layer_signatures}
    more = [item.digest for item in listed if item.digest not in named]
    others = [part for part in parts if part.digest not in signatures]
    kinds = [part.media_type for part in others]
    more += [
        part.digest for part in others if part.media_type not in KINDS or kinds.count(part.media_type) > 1
    ]
    more += [part.digest for part in (*parts, config) if part.size > 4 * init.MIB]
    if more:
        raise Failure(f"the release lists {more[0]}, which its manifest does not name: publish it again")


def find_index(machine: init.Machine) -> images.Descriptor:
    """Return the index of a store's one release, which `init.find_release` has found."""
    data = machine.read(INDEX)
    _, releases = init.parse_descriptors(data, "manifests", "MANIFEST-ABSENT")
    only = init.only(releases, "MANIFEST-ABSENT", "one release")
    return images.Descriptor(only.media_type, only.digest, only.size)


def list_blobs(machine: init.Machine) -> tuple[Blob, ...]:
    """Return every blob of the store's one release, each once."""
    index = find_index(machine)
    found = {index.digest: index.size}
    data = init.read_blob(machine, index.digest, index.size, "MANIFEST-ABSENT")
    _, listed = init.parse_descriptors(data, "manifests", "MANIFEST-ABSENT")
    for image in listed:
        data = init.read_blob(machine, image.digest, image.size, "IMAGE-DIGEST")
        raw, parts = init.parse_descriptors(data, "layers", "IMAGE-FORMAT")
        config = init.parse_descriptor(raw.get("config"), "IMAGE-FORMAT")
        found |= {item.digest: item.size for item in (image, config, *parts)}
    return tuple(Blob(digest, size) for digest, size in found.items())


def find_uki(machine: init.Machine, bootkit: init.Target) -> tuple[Blob, str]:
    """Return the UKI of run mode that a bootkit brings, and its id."""
    data = init.read_blob(machine, bootkit.digest, bootkit.size, "IMAGE-DIGEST")
    _, parts = init.parse_descriptors(data, "layers", "IMAGE-FORMAT")
    found = [part for part in parts if part.media_type == init.UKI_MEDIA_TYPE]
    uki_id = init.parse_image(data).uki_ids.get("run", "")
    if len(found) != 1 or not init.HEX64.fullmatch(uki_id):
        seen = f"{len(found)} UKIs, id {uki_id or 'missing'}"
        raise init.Refused("MANIFEST-UKI", expected="a bootkit with the UKI of run mode", seen=seen)
    return Blob(found[0].digest, found[0].size), uki_id


def read_uki(machine: init.Machine, uki: Blob) -> bytes:
    """Return a UKI of a release in a folder. It is not mapped: a disk that cannot be read would end this
    process without a word.
    """
    return b"".join(read_checked(machine.real_path(init.blob_path(uki.digest)), uki))  # type: ignore[attr-defined]


def uki_epoch(data: pe.Bytes) -> int:
    """Return the epoch for which a UKI of run mode was approved. Raises `Refused` for one that was not."""
    try:
        section = pe.parse(data).section(data, approvals.APPROVAL)
    except ValueError as error:
        raise init.Refused("TPM-APPROVAL", expected="a UKI of run mode", seen=str(error)) from error
    return init.parse_uki_approval(section.rstrip(b"\0")).epoch


def check_target(machine: init.Machine, target: init.Target, blobs: Sequence[Blob]) -> None:
    """See that an image is the signed one, and its layers and their signatures belong to the release."""
    image = init.parse_image(init.read_blob(machine, target.digest, target.size, "IMAGE-DIGEST"))
    if len(image.layers) != len(target.layer_signatures):
        seen = f"{len(target.layer_signatures)} for {len(image.layers)} layers of {target.service_name}"
        raise init.Refused("LAYER-SIGNATURE", expected="a signature for each layer", seen=seen)
    present = {blob.digest for blob in blobs}
    for digest in (*(layer.digest for layer in image.layers), *target.layer_signatures):
        if digest not in present:
            raise init.Refused("STORE-BLOB", expected=f"blob {digest}", seen="a release without it")
