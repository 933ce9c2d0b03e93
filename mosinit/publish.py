"""The `publish` verb: a person's manifest and its images become a signed release.

A release is an OCI image layout whose index.json has one entry, an image index (tag `release`) with

1. the install artefact: signed manifest, signature, product certificate, the product key's statement of the
   epoch with its signature, and a PKCS#7 for each layer,
2. the image manifest of each target, all layers of it verity layers.

It passes through any registry as one unit, and the same input gives the same bytes.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives import serialization

from mosinit import images, init, initrd, kept, registry, trees
from mosinit.host import Failure, Host, Usage, closed_environment
from mosinit.keys import Keyset, check_out, choose_epoch, trust

TAG = "release"
MAX_LINKS = 40  # linux/namei.h, MAXSYMLINKS
TARGET_ANNOTATION = "io.mosinit.target"
_SOURCE = re.compile(r"(oci:|docker-archive:|docker://)[!-~]{1,500}")
_SOURCE_WORDS = "oci:DIR[:TAG], docker-archive:FILE or docker://…"
# The keys of a target as a person writes it: a source, where the signed form has digest and signatures.
WRITTEN = {**init.TARGET, "source": init.Field(init.text_like(_SOURCE, _SOURCE_WORDS), init.REQUIRED)}


@dataclass(frozen=True)
class Published:
    """What was published: digests are `sha256:…`, those of targets are of image manifests, by name. What it
    took the place of is a sequence, or the digest that the tag named; empty if it is what was there.
    """

    sequence: int
    manifest_sha256: str
    signature_sha256: str
    index_digest: str
    targets: Mapping[str, str]
    replaced: str = ""


@dataclass(frozen=True)
class SignedTarget:
    """A target with its converted image and the PKCS#7 blob of each layer."""

    target: init.Target
    image: images.ConvertedImage
    signatures: tuple[images.Descriptor, ...]


def publish(
    host: Host,
    manifest: Path,
    keyset: Keyset,
    destination: str,
    access: registry.Access | None = None,
    cache: kept.Cache | None = None,
    *,
    anew: bool = False,
) -> Published:
    """Convert, sign and write the release that a person's manifest describes to `oci:DIR` or
    `docker://HOST[:PORT]/NAME:TAG`.

    A relative source is one beside the manifest. Layers that `cache` has are not converted again.
    An earlier release there is replaced when the new one is whole, but no later one and no other one of the
    same sequence, unless the caller makes it `anew` each time. Raises `Refused` (the machine's own checks)
    or `Failure`.
    """
    sources = Sources(manifest.parent, access or registry.Access(), cache)
    target = parse_destination(destination)
    written = read_written(manifest)
    policy = check_signer(keyset, written)
    if isinstance(target, registry.Reference):
        registry.probe(sources.access, target)
        near = Path(os.environ.get("TMPDIR", "/var/tmp")) / "release"
    else:
        check_out(target, keyset.folder)
        if target.exists() and not anew:
            _check_order(_read_earlier(target, target), target, written)
        near = target
        near.parent.mkdir(parents=True, exist_ok=True)
    with host.scratch(near=near) as scratch:
        layout = images.Layout(scratch / "release")
        targets = [_sign_target(host, item, sources, keyset, layout) for item in written.targets]
        text = encode_manifest(written, targets)
        signed = _sign(keyset, text, written.epoch)
        index = _write_release(host, layout, signed, targets)
        accepted = check_release(host, layout, policy, keyset)
        if isinstance(target, registry.Reference):
            before = registry.push(host, sources.access, layout, target)
            replaced = before if before != index.digest else ""
        else:
            replaced = _put(host, layout, target, accepted, anew=anew)
    names = {item.target.service_name: item.image.manifest.digest for item in targets}
    signature = hashlib.sha256(signed[init.SIGNATURE_MEDIA_TYPE]).hexdigest()
    return Published(written.sequence, accepted.sha256, signature, index.digest, names, replaced)


def parse_destination(destination: str) -> Path | registry.Reference:
    """Return where a release goes: the folder of an OCI layout, or a tag in a registry."""
    if destination.startswith("docker://"):
        reference = registry.parse_reference(destination)
        if not reference.tag or reference.digest:
            raise Usage(f"cannot publish to {destination}: a release in a registry needs a tag, NAME:TAG")
        return reference
    if not destination.startswith("oci:") or destination == "oci:":
        place = destination if destination != "oci:" else "oci: without a folder"
        raise Usage(f"cannot publish to {place}: a release goes to oci:DIR or docker://HOST/NAME:TAG")
    folder = Path(destination.removeprefix("oci:")).absolute()
    if folder.exists():
        _check_replaceable(folder, folder)
    return folder


class Earlier(NamedTuple):
    """A release that is in a folder already."""

    product: str
    sequence: int
    sha256: str  # of its manifest


def _held(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}


def _check_replaceable(folder: Path, name: Path) -> None:
    """Raise `Failure` unless a folder is empty or a release: it is replaced as a whole, never what is
    somebody's.
    """
    held = _held(folder)
    if not held:
        return
    if not (folder / "oci-layout").is_file():
        raise Failure(f"{name} exists and is no OCI image layout: name another folder")
    names = [entry.annotations.get(images.REF_NAME) for entry in images.Layout(folder).read_index()]
    if names != [TAG]:
        raise Failure(f"{name} holds images that are no release: name another folder")
    others = held - {"oci-layout", "index.json", "blobs"}
    others |= {path.name for path in (folder / "blobs").glob("*")} - {"sha256"}
    blobs = {path.name for path in (folder / "blobs/sha256").glob("*")}
    others |= {each for each in blobs if not init.HEX64.fullmatch(each)}
    if others:
        raise Failure(f"{name} holds more than a release ({min(others)[:80]}): name another folder")


def _read_earlier(folder: Path, name: Path) -> Earlier | None:
    """Return the release in a folder, None if that is empty. Raises `Failure`."""
    if not _held(folder):
        return None
    store, kind = Store(images.Layout(folder)), init.MANIFEST_MEDIA_TYPE
    try:
        part = init.only([each for each in init.find_release(store).values() if each.media_type == kind],
                         "MANIFEST-ABSENT", "an install manifest")  # fmt: skip
        text = init.read_blob(store, part.digest, part.size, "MANIFEST-ABSENT")
        contents = init.parse_manifest(text)
    except init.Refused as refused:
        raise Failure(
            f"the release in {name} cannot be read ({str(refused)[:200]}): remove it, or name another folder"
        ) from refused
    return Earlier(contents.product, contents.sequence, hashlib.sha256(text).hexdigest())


def _check_order(earlier: Earlier | None, name: Path, coming: init.Contents, sha256: str = "") -> None:
    """Raise `Failure` if a release does not come after the earlier one: nobody could tell them apart, or get
    the later one back. Its `sha256` is known once it is made.
    """
    if earlier is None:
        return
    if earlier.product != coming.product:
        raise Failure(f"{name} holds a release of product {earlier.product}: name another folder")
    higher = f"write `sequence: {earlier.sequence + 1}` into the manifest, or name another folder"
    if earlier.sequence > coming.sequence:
        raise Failure(f"{name} holds sequence {earlier.sequence}, and this is {coming.sequence}: {higher}")
    if earlier.sequence == coming.sequence and sha256 not in ("", earlier.sha256):
        raise Failure(f"{name} holds another release of sequence {earlier.sequence}: {higher}")


def read_written(manifest: Path) -> init.Contents:
    """Read a manifest as a person wrote it. Raises `Failure`, `Refused`."""
    try:
        if manifest.stat().st_size > init.MANIFEST_BYTES:
            raise Failure(f"{manifest} is larger than {init.MANIFEST_BYTES} bytes, which no manifest is")
        contents = init.parse_manifest(manifest.read_bytes(), WRITTEN)
        state_bytes(contents)
        return contents
    except init.Refused as error:
        raise init.Refused(error.check, expected=error.expected, seen=f"{manifest}: {error.seen}") from error
    except OSError as error:
        raise Failure(f"cannot read {manifest}: {error.strerror}; name the manifest to publish") from error


def state_bytes(contents: init.Contents) -> int:
    """Return the size of the volume for /var that a manifest demands, 0 for none. Raises `Failure`.

    Its label is reserved: the bring-up mounts the volume, keeps it, and knows no other owner than root.
    """
    for volume in contents.storage:
        if volume.label == init.STATE:
            if not volume.persistent or volume.nsgroup:
                raise Failure(
                    f"storage {init.STATE} is /var, which is root's and is kept: say persistent: true and "
                    "no nsgroup, or give it another label"
                )
            return volume.size
    return 0


def _put(host: Host, layout: images.Layout, target: Path, manifest: init.Manifest, *, anew: bool) -> str:
    """Put a release in its place, and name the earlier one that was there."""

    def check(folder: Path) -> Earlier | None:
        _check_replaceable(folder, target)
        earlier = None if anew else _read_earlier(folder, target)
        _check_order(earlier, target, manifest.contents, manifest.sha256)
        return earlier

    layout.path.chmod(0o755)
    earlier = _replace_folder(host, layout.path, target, layout.path.with_name("old"), check)
    host.sync_file(target.parent)
    return f"sequence {earlier.sequence}" if earlier and earlier.sha256 != manifest.sha256 else ""


Check = Callable[[Path], Earlier | None]


def _replace_folder(host: Host, new: Path, target: Path, old: Path, check: Check) -> Earlier | None:
    """Put a whole folder in the place of another, which is at `new` or `old` then, and return what that was;
    whoever looks sees one of them. What is there may have changed since it was looked at: a failure leaves
    it where it is.
    """
    try:
        if not os.path.lexists(target):
            new.rename(target)  # no folder replaces one that holds something
            return None
        check(target)
        try:
            host.swap(new, target)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):
                raise
            return _move_aside(new, target, old, check)
        try:
            return check(new)
        except BaseException:
            host.swap(new, target)
            raise
    except OSError as error:
        raise Failure(
            f"cannot put the release in its place, {target}: {error.strerror}; try again"
        ) from error


def _move_aside(new: Path, target: Path, old: Path, check: Check) -> Earlier | None:
    """Do the same where a file system cannot swap: for a moment nothing is there."""
    target.rename(old)
    try:
        earlier = check(old)
        new.rename(target)
        return earlier
    except BaseException:
        old.rename(target)
        raise


# --- What may be signed, and by whom ------------------------------------------------------------------


def check_signer(keyset: Keyset, contents: init.Contents) -> init.Policy:
    """Return the policy of a machine of this product, if it would take manifests of this keyset.

    Machines do not look at validity dates when they boot, because their clocks are no evidence: dates count
    here. Raises `Failure`, `Refused`.
    """
    if contents.product != keyset.product:
        raise Failure(
            f"the manifest is for product {contents.product}, the keyset for {keyset.product}: write that "
            "into the manifest, or name the other's keyset by --keys"
        )
    choose_epoch(contents.epoch, keyset.epoch, f"write `epoch: {keyset.epoch}` into the manifest")
    organisation = {"manifest-ca.pem": _pem(keyset, "manifest-ca")}
    policy = trust(keyset.product, organisation, initrd.revoked(keyset))
    init.verify_certificate(_pem(keyset, "product"), policy)
    now = datetime.datetime.now(datetime.timezone.utc)
    for role in ("product", "manifest-ca", "layer"):
        certificate = keyset.certificate(role)
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not begin <= now <= end:
            raise Failure(
                f"the {role} certificate is valid from {begin:%Y-%m-%d} to {end:%Y-%m-%d}: renew it"
            )
    return policy


def _pem(keyset: Keyset, role: str) -> bytes:
    return keyset.certificate(role).public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True)
class Sources:
    """Where images come from: relative ones from a folder, others from registries; layers from a cache."""

    beside: Path
    access: registry.Access
    cache: kept.Cache | None


def _sign_target(
    host: Host, target: init.Target, sources: Sources, keyset: Keyset, layout: images.Layout
) -> SignedTarget:
    image = _convert(host, target, sources, layout)
    signer = keyset.signer("layer")
    # The kernel checks the signature of the root hash as text: 64 hex digits, no line end.
    signatures = {
        root_hash: layout.add_blob(
            host, signer.sign_pkcs7(root_hash.encode()), init.LAYER_SIGNATURE_MEDIA_TYPE
        )
        for root_hash in {layer.root_hash for layer in image.layers}
    }
    return SignedTarget(target, image, tuple(signatures[layer.root_hash] for layer in image.layers))


def _convert(
    host: Host, target: init.Target, sources: Sources, layout: images.Layout
) -> images.ConvertedImage:
    source, check = target.source, _check_init if target.service_type == "hostfs" else None
    kind, _, name = source.partition(":")
    if kind in ("oci", "docker-archive"):
        beside = f"{kind}:{sources.beside.absolute() / name}"
        return images.convert(host, beside, layout, sources.cache, check)
    with host.scratch(near=layout.path) as folder:
        fetched = registry.fetch(host, sources.access, source, folder)
        try:
            return images.convert(host, f"oci:{fetched}", layout, sources.cache, check)
        except Failure as failure:
            # A person knows the name of the image, and nothing of a folder that is gone by then.
            raise Failure(str(failure).replace(str(fetched), source)) from failure


# --- What a machine would say -------------------------------------------------------------------------


class Root(init.Machine):
    """The layers of a hostfs, stacked in memory, seen by the bring-up's own functions."""

    def __init__(self, top: trees.Folder) -> None:
        super().__init__()
        self._top = top

    def read_in_root(self, root: str, path: str, size: int) -> tuple[int, bytes] | None:
        """Return mode and first bytes of a file, links taken as the kernel does; None if there is none."""
        parts, here, links = path.encode().split(b"/"), [self._top], 0
        while parts:
            name = parts.pop(0)
            if name == b"..":
                here = here[:-1] or here
            if name in (b"", b".", b".."):
                continue
            found = here[-1].children.get(name)
            if isinstance(found, trees.Folder):
                here.append(found)
            elif found is not None and found.kind == trees.SYMLINK and links < MAX_LINKS:
                links += 1
                here = here[:1] if found.target.startswith(b"/") else here
                parts = found.target.split(b"/") + parts
            elif found is None or found.kind == trees.SYMLINK or parts:
                return None
            else:
                kind = stat.S_IFREG if found.kind == trees.FILE else 0
                return kind | found.meta.mode, trees.head(found, size)
        return stat.S_IFDIR, b""


def _check_init(image: trees.Image) -> None:
    """Refuse a hostfs that has no init for the bring-up; of layers under verity already nobody knows."""
    if image.root is not None:
        init.find_init(Root(image.root))


class Store(init.Machine):
    """A release in a folder, read by the bring-up's own functions as if it were a machine's store."""

    def __init__(self, layout: images.Layout) -> None:
        super().__init__()
        self._layout = layout

    def real_path(self, path: str) -> Path:
        """Return where in the folder a file of the store lies."""
        return self._layout.path / path.removeprefix(f"{init.STORE}/{init.REPOSITORY}/")

    def read(self, path: str, limit: int = init.MIB) -> bytes:
        """Read a file of the store."""
        return super().read(str(self.real_path(path)), limit)

    def log(self, text: str) -> None:
        """Say nothing: this is no boot."""

    def print(self, text: str) -> None:
        """Say nothing: this is no boot."""


def check_release(host: Host, layout: images.Layout, policy: init.Policy, keyset: Keyset) -> init.Manifest:
    """Return the manifest of a release if a machine would take it and all its layers.

    The manifest is found, read and verified by what the bring-up itself calls. Raises `Refused`.
    """
    store = Store(layout)
    manifest = init.verify_release(store, policy)
    order = read_epoch_order(store, policy)
    if order.epoch != manifest.contents.epoch:
        raise init.Refused(
            "EPOCH-ORDER", expected=f"epoch {manifest.contents.epoch}", seen=f"epoch {order.epoch}"
        )
    if manifest.contents.update_type == "complete":
        init.boot_targets(manifest.contents)
    parsed = [
        init.parse_image(init.read_blob(store, target.digest, target.size, "IMAGE-DIGEST"))
        for target in manifest.contents.targets
    ]
    pairs = list(zip(manifest.contents.targets, parsed, strict=True))
    starts = ("hostfs", "bootkit")
    init.check_lowers(sum(len(image.layers) for target, image in pairs if target.service_type in starts))
    seen_layers = set()
    for target, image in pairs:
        if target.service_type == "bootkit" and not init.HEX64.fullmatch(image.uki_ids.get("run", "")):
            seen = str(dict(image.uki_ids))
            raise init.Refused("MANIFEST-UKI", expected="a bootkit that names its UKI", seen=seen)
        if len(image.layers) != len(target.layer_signatures):
            seen = f"{len(target.layer_signatures)} for {len(image.layers)} layers of {target.service_name}"
            raise init.Refused("LAYER-SIGNATURE", expected="a signature for each layer", seen=seen)
        for layer, signature in zip(image.layers, target.layer_signatures, strict=True):
            if (layer, signature) not in seen_layers:
                _check_layer(layout, layer)
                _check_signature(host, store, layer, signature, keyset)
            seen_layers.add((layer, signature))
    return manifest


class EpochOrder(NamedTuple):
    """A release's statement that everything below an epoch is unsafe: only `read_epoch_order` makes one."""

    epoch: int
    statement: bytes
    signature: bytes
    certificate: bytes


def read_epoch_order(store: init.Machine, policy: init.Policy) -> EpochOrder:
    """Return the verified epoch order of the release in a store. Raises `Refused`."""
    release = init.find_release(store)
    kinds = (init.EPOCH_MEDIA_TYPE, init.EPOCH_SIGNATURE_MEDIA_TYPE, init.CERTIFICATE_MEDIA_TYPE)
    blobs = []
    for kind in kinds:
        if kind not in release:
            raise init.Refused("EPOCH-ORDER", expected=kind, seen=", ".join(release))
        blobs.append(init.read_blob(store, release[kind].digest, release[kind].size, "EPOCH-ORDER"))
    statement, signature, certificate = blobs
    epoch = init.verify_epoch_order(statement, signature, certificate, policy)
    return EpochOrder(epoch, statement, signature, certificate)


def _check_layer(layout: images.Layout, layer: init.Layer) -> None:
    """See what the bring-up sees of a layer before it mounts it, and that it is what the manifest names."""
    path = layout.blob_path(layer.digest)
    with init.refusing("STORE-BLOB", f"blob {layer.digest}"), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size != layer.size:
            raise init.Refused(
                "LAYER-SIZE", expected=f"{layer.size} bytes", seen=f"{size} bytes in {layer.digest}"
            )
        blocks = init.verity_data_blocks(size)
        file.seek(blocks * init.BLOCK)
        init.parse_verity_salt(file.read(512), blocks)
        file.seek(0)
        init.find_filesystem(file.read(init.BLOCK), layer.digest)
        file.seek(0)
        seen = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    if seen != layer.digest:
        raise init.Refused("LAYER-READ", expected=layer.digest, seen=seen)


def _check_signature(host: Host, store: Store, layer: init.Layer, digest: str, keyset: Keyset) -> None:
    """See that the layer certificate, and so a kernel that finds it in db, accepts a layer's signature."""
    with init.refusing("STORE-BLOB", f"blob {digest}"):
        seen, _ = images.digest_bytes(store.read(init.blob_path(digest), 16384))
    if seen != digest:
        raise init.Refused("LAYER-SIGNATURE", expected=digest, seen=seen)
    with host.scratch() as folder:
        (folder / "root-hash").write_text(layer.root_hash)
        try:
            host.run(
                ["openssl", "smime", "-verify", "-binary", "-inform", "DER",
                 "-in", store.real_path(init.blob_path(digest)), "-content", folder / "root-hash",
                 "-nointern", "-noverify", "-certfile", keyset.certificate_path("layer")],
                timeout=60,
                env=closed_environment(),
            )  # fmt: skip
        except Failure as failure:
            raise init.Refused(
                "LAYER-SIGNATURE", expected="a signature by the layer key", seen=str(failure)
            ) from failure


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


def _sign(keyset: Keyset, text: bytes, epoch: int) -> dict[str, bytes]:
    """Return what the product key has to say of a release, by media type."""
    sign = keyset.signer("product").sign
    statement = images.encode(init.epoch_statement(keyset.product, epoch))
    return {
        init.MANIFEST_MEDIA_TYPE: text,
        init.SIGNATURE_MEDIA_TYPE: sign(text),
        init.CERTIFICATE_MEDIA_TYPE: _pem(keyset, "product"),
        init.EPOCH_MEDIA_TYPE: statement,
        init.EPOCH_SIGNATURE_MEDIA_TYPE: sign(statement),
    }


def _write_release(
    host: Host, layout: images.Layout, signed: Mapping[str, bytes], targets: Sequence[SignedTarget]
) -> images.Descriptor:
    """Write artefact, index and index.json; returns the index's descriptor."""
    layers = [layout.add_blob(host, blob, kind) for kind, blob in signed.items()]
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
