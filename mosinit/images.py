"""Images: OCI image layouts, and layers as files that dm-verity can check.

A verity layer file is an erofs image, padded to 4096-byte blocks, one block with veritysetup's superblock,
and the hash tree: SHA-256, blocks of 4096 bytes, hash type 1. UUIDs and salt come from the content, so the
same layer gives the same bytes everywhere. A converted image keeps its config; each layer's descriptor names
the root hash in an annotation.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import struct
import tarfile
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mosinit import host as seam
from mosinit import init, kept, plaintar, tars, tools, trees
from mosinit.host import Failure, Host, closed_environment, logged

LAYER_LIMIT = 256  # of one image; overlayfs stacks 500, and other targets' come on top
INDEX_DEPTH = 3

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"  # OCI image specification 1.1, media-types.md
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
DOCKER_CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
MANIFEST_TYPES = (MANIFEST_TYPE, "application/vnd.docker.distribution.manifest.v2+json")
INDEX_TYPES = (INDEX_TYPE, "application/vnd.docker.distribution.manifest.list.v2+json")
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EROFS_TYPE = "application/vnd.stacker.image.layer.erofs"
ROOT_HASH, _ = init.ROOT_HASH_ANNOTATIONS
REF_NAME = "org.opencontainers.image.ref.name"

# How the layers of other tools are packed; docker's names remain where skopeo did not translate them.
PACKINGS = {
    "application/vnd.oci.image.layer.v1.tar": "",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
}

# Of 128 MB hostfs: lz4hc 57 MB in 2 s, zstd 50 MB in 4 s. lz4 wins where it counts, in reading: every page
# that a booting machine touches is decompressed, and mkfs.erofs calls its zstd experimental. No `fragments`:
# they differ from one run to the next.
COMPRESSION = ("-zlz4hc", "-C65536", "-Eztailpacking")

MEDIA_TYPE = re.compile(
    r"[A-Za-z0-9][\w!#$&^.+-]{0,126}/[A-Za-z0-9][\w!#$&^.+-]{0,126}", re.ASCII
)  # RFC 6838
KEYS = {
    key.casefold(): key
    for key in (
        "annotations", "architecture", "artifactType", "config", "data", "diff_ids", "digest", "features",
        "layers", "manifests", "mediaType", "os", "os.features", "os.version", "platform", "rootfs",
        "schemaVersion", "size", "subject", "urls", "variant",
    )
}  # fmt: skip

DOCUMENT_LIMIT = 4 * init.MIB
CHUNK = init.MIB
ARCHIVE_LIMIT = trees.Limits().content
CHECK_SECONDS, CHECK_BYTES = 1800, 8 << 30  # of processor and address space: for reading a file system


@dataclass(frozen=True)
class Descriptor:
    """An OCI content descriptor: what a blob is, its digest, its size in bytes."""

    media_type: str
    digest: str
    size: int
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> dict[str, object]:
        """Return the descriptor as OCI writes it; what is empty is left out."""
        optional = {"artifactType": self.artifact_type, "annotations": dict(self.annotations)}
        return {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size,
            **{key: value for key, value in optional.items() if value},
        }


@dataclass(frozen=True)
class VerityLayer:
    """A layer whose blocks dm-verity can check: its blob and its root hash (64 hex digits)."""

    descriptor: Descriptor
    root_hash: str


@dataclass(frozen=True)
class ConvertedImage:
    """An image all of whose layers are verity layers, and its manifest's descriptor."""

    manifest: Descriptor
    layers: tuple[VerityLayer, ...]


def encode(document: object) -> bytes:
    """Return the one JSON encoding we write: compact, keys sorted."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


# --- OCI image layouts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """An OCI image layout in a folder. Blobs are checked when read, and appear whole or not at all."""

    path: Path

    def blob_path(self, digest: str) -> Path:
        """Return where the blob lies or would lie. Raises `Failure` for what is no SHA-256 digest."""
        # The digest becomes a path: anything but hex digits could leave the folder.
        if not init.DIGEST.fullmatch(digest):
            raise Failure(f"{self.path} names a blob by {digest[:80]!r}: only sha256 digests are supported")
        return self.path / "blobs/sha256" / digest.removeprefix("sha256:")

    def add_blob(
        self,
        host: Host,
        content: bytes | Path,
        media_type: str,
        *,
        artifact_type: str = "",
        annotations: Mapping[str, str] | None = None,
    ) -> Descriptor:
        """Add bytes or a file as a blob, unless it is there already, and return its descriptor."""
        digest, size = digest_file(content) if isinstance(content, Path) else digest_bytes(content)
        descriptor = Descriptor(media_type, digest, size, artifact_type, annotations or {})
        target = self.blob_path(digest)
        if target.is_file() and digest_file(target) == (digest, size):
            return descriptor
        self._prepare(host)
        with host.replacing(target) as fresh:
            if isinstance(content, bytes):
                fresh.write_bytes(content)
            elif _copy(content, fresh, size) != digest:
                raise Failure(f"{content} changed while it was read: leave it alone, and try again")
        return descriptor

    def take_file(self, host: Host, path: Path, layer: Descriptor) -> None:
        """Make a file on the same disk, just made and of this digest, a blob: it is moved, not copied."""
        target = self.blob_path(layer.digest)
        self._prepare(host)
        path.chmod(0o644)
        host.sync_file(path)
        path.rename(target)
        host.sync_file(target.parent)

    def _prepare(self, host: Host) -> None:
        (self.path / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        marker = self.path / "oci-layout"
        if not marker.exists():
            with host.replacing(marker) as fresh:
                fresh.write_bytes(encode({"imageLayoutVersion": "1.0.0"}))

    def check_blob(self, descriptor: Descriptor) -> Path:
        """Return the path of a blob that has the digest and size that its descriptor says.

        It still has them only where nobody else can write.
        """
        path = self._sized(descriptor)
        if digest_file(path)[0] != descriptor.digest:
            raise self._damaged(path)
        return path

    def copy_blob(self, descriptor: Descriptor, target: Path) -> Path:
        """Copy a blob to a file of our own, which has the digest and size that its descriptor says."""
        path = self._sized(descriptor)
        if _copy(path, target, descriptor.size) != descriptor.digest:
            target.unlink()
            raise self._damaged(path)
        return target

    def _sized(self, descriptor: Descriptor) -> Path:
        path = self.blob_path(descriptor.digest)
        # Size first: nobody should wait for the digest of a terabyte that cannot be right.
        if not path.is_file() or path.stat().st_size != descriptor.size:
            raise Failure(f"{path} is missing or not {descriptor.size} bytes long: fetch the image again")
        return path

    def _damaged(self, path: Path) -> Failure:
        return Failure(f"{path} is damaged, its digest is another: fetch the image again")

    def read_blob(self, descriptor: Descriptor) -> bytes:
        """Return a document of at most 4 MiB whose digest and size are as its descriptor says."""
        if descriptor.size > DOCUMENT_LIMIT:
            raise Failure(f"{descriptor.digest} in {self.path} is larger than 4 MiB, which no document is")
        path = self._sized(descriptor)
        with path.open("rb") as file:
            content = file.read(descriptor.size + 1)
        if digest_bytes(content) != (descriptor.digest, descriptor.size):
            raise self._damaged(path)
        return content

    def read_index(self) -> tuple[Descriptor, ...]:
        """Return what index.json lists."""
        path = self.path / "index.json"
        if not path.is_file():
            raise Failure(f"{self.path} is no OCI image layout (it has no index.json): name another source")
        if path.stat().st_size > DOCUMENT_LIMIT:
            raise Failure(f"{path} is larger than 4 MiB, which no index is")
        with path.open("rb") as file:
            return _descriptors(file.read(DOCUMENT_LIMIT), "manifests")

    def write_index(self, host: Host, descriptors: Iterable[Descriptor]) -> None:
        """Make index.json list these and nothing else."""
        self._prepare(host)
        document = index_of(descriptors)
        with host.replacing(self.path / "index.json") as fresh:
            fresh.write_bytes(encode(document))


def index_of(descriptors: Iterable[Descriptor]) -> dict[str, object]:
    """Return an OCI image index of these descriptors."""
    return {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [item.json() for item in descriptors]}


def digest_bytes(content: bytes) -> tuple[str, int]:
    """Return digest and size of bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}", len(content)


def digest_file(path: Path) -> tuple[str, int]:
    """Return digest and size of a file."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}", file.tell()


def _copy(source: Path, target: Path, size: int) -> str:
    """Copy a file of so many bytes, or one byte more of a longer one; return the digest of the copy."""
    hasher, left = hashlib.sha256(), size + 1
    with source.open("rb") as file, target.open("wb") as copy:
        while chunk := file.read(min(CHUNK, left)):
            hasher.update(chunk)
            copy.write(chunk)
            left -= len(chunk)
    return f"sha256:{hasher.hexdigest()}"


def listed(layout: Layout, descriptor: Descriptor, key: str = "") -> tuple[Descriptor, ...]:
    """Return what an index lists, or the blobs of an image manifest of a layout."""
    document = layout.read_blob(descriptor)
    if key:
        return _descriptors(document, key)
    raw, layers = init.parse_descriptors(document, "layers", "IMAGE-FORMAT")
    config = init.parse_descriptor(raw.get("config"), "IMAGE-FORMAT")
    return tuple(Descriptor(*item) for item in (config, *layers))


def _descriptors(document: bytes, key: str) -> tuple[Descriptor, ...]:
    _, parsed = init.parse_descriptors(document, key, "IMAGE-FORMAT")
    return tuple(Descriptor(*item) for item in parsed)


# --- Sources ------------------------------------------------------------------------------------------


def convert(
    host: Host,
    source: str,
    layout: Layout,
    cache: kept.Cache | None = None,
    check: Callable[[trees.Image], None] | None = None,
    archive_limit: int = ARCHIVE_LIMIT,
) -> ConvertedImage:
    """Add the image that `source` names to a layout, with verity layers: oci:DIR[:TAG] or
    docker-archive:FILE[:NAME]. What `cache` has is not made again; `check` looks at all layers together.

    Raises `Failure` or `Refused` for an image that is not what its digests say, or of a kind that cannot be
    converted.
    """
    host.say(f"converting {source}")
    try:
        return _convert_source(host, source, layout, Below(cache, check), archive_limit)
    except init.Refused as refused:
        if refused.check != "IMAGE-FORMAT":
            raise
        # What a machine's owner is told of that check is no help to whoever brings the image.
        raise Failure(
            f"{source} is no image that can be used ({refused}): make or fetch it again"
        ) from refused


def _convert_source(
    host: Host, source: str, layout: Layout, below: Below, archive_limit: int
) -> ConvertedImage:
    kind, _, name = source.partition(":")
    if kind == "oci":
        folder_name, tag = _split_tag(name)
        return _convert(host, Source(Layout(Path(folder_name)), source), tag, layout, below)
    if kind != "docker-archive":
        raise Failure(f"{source} is no image: name it oci:DIR[:TAG] or docker-archive:FILE")
    if not Path(name.partition(":")[0]).is_file():
        raise Failure(
            f"{name.partition(':')[0]} is no file: name an archive that docker or podman saved, without `:`"
        )
    with host.scratch(near=layout.path) as folder:
        # skopeo unpacks a packed archive before it looks at it.
        limit = min(archive_limit, max(init.MIB, shutil.disk_usage(folder).free // 2))
        try:
            host.run(
                ["prlimit", f"--fsize={limit}", "skopeo", "copy", "--quiet",
                 "--override-os=linux", "--override-arch=amd64",
                 "--dest-oci-accept-uncompressed-layers", source, f"oci:{folder}/image"],
                timeout=3600,
                env=closed_environment(TMPDIR=folder),
            )  # fmt: skip
        except Failure as failure:
            reason = logged(str(failure))
            if re.search(r"file too large|short write", reason, re.IGNORECASE):
                reason = f"it unpacks to more than {limit >> 20} MiB"
            raise Failure(f"cannot use {source}: {reason[:300]}; save it again, or check its name") from None
        return _convert(host, Source(Layout(folder / "image"), source), "", layout, below)


@dataclass(frozen=True)
class Source:
    """A layout to convert from, and what a person called it."""

    layout: Layout
    name: str


def check_document(name: str, descriptor: Descriptor, text: bytes) -> dict[str, object]:
    """Return an index or image manifest that is only one of them, and what its descriptor says it is."""
    raw = init.parse_json(text, "IMAGE-FORMAT")
    if not isinstance(raw, dict):
        raise Failure(f"{name}: {descriptor.digest} is no OCI document: name another image")
    # What one program takes for an index and another for an image is two things under one digest.
    if raw.get("mediaType", descriptor.media_type) != descriptor.media_type:
        raise Failure(f"{name}: {descriptor.digest} is listed as {descriptor.media_type} and says another")
    if "manifests" in raw and "layers" in raw:
        raise Failure(f"{name}: {descriptor.digest} is both an index and an image")
    if type(raw.get("schemaVersion")) is not int:
        raise Failure(f"{name}: {descriptor.digest} has no whole schemaVersion: make the image again")
    annotations, artifact = raw.get("annotations", {}), raw.get("artifactType", "")
    if not isinstance(annotations, dict) or not all(isinstance(text, str) for text in annotations.values()):
        raise Failure(f"{name}: {descriptor.digest} has annotations that are no texts: make the image again")
    parts = [raw, raw.get("config"), raw.get("subject")]
    for key in ("manifests", "layers"):
        entries = raw.get(key)
        parts += entries if isinstance(entries, list) else []
    fields = [part for part in parts if isinstance(part, dict)]
    kinds = [part[key] for part in fields for key in ("mediaType", "artifactType") if key in part]
    for kind in (*kinds, *([artifact] if artifact else [])):
        if not isinstance(kind, str) or not MEDIA_TYPE.fullmatch(kind):
            raise Failure(f"{name}: {str(kind)[:100]!r} is no media type: make the image again")
    _check_keys(name, *fields, *(part.get("platform") for part in fields))
    return raw


def _check_keys(name: str, *fields: object) -> None:
    """Refuse keys in other letters: programs in Go take them for the ones that we know."""
    for key in (key for part in fields if isinstance(part, dict) for key in part):
        if KEYS.get(key.casefold(), key) != key:
            raise Failure(
                f"{name}: the key {key[:100]!r} is {KEYS[key.casefold()]} to other programs: remove it"
            )


def _split_tag(name: str) -> tuple[str, str]:
    """Split DIR:TAG; a colon before the last slash belongs to the folder."""
    folder, _, tag = name.rpartition(":")
    return (folder, tag) if folder and "/" not in tag else (name, "")


def _convert(host: Host, source: Source, tag: str, layout: Layout, below: Below) -> ConvertedImage:
    descriptor = _find_image(source, tag)
    document = source.layout.read_blob(descriptor)
    raw = check_document(source.name, descriptor, document)
    descriptors = _descriptors(document, "layers")
    if len(descriptors) > LAYER_LIMIT:
        raise Failure(
            f"{source.name} has {len(descriptors)} layers, more than {LAYER_LIMIT}: squash some of them"
        )
    config = Descriptor(*init.parse_descriptor(raw.get("config"), "IMAGE-FORMAT"))
    expected = _diff_ids(source, config, len(descriptors))
    # docker's config is OCI's by another name, and its layers are none of docker's any more.
    kind = CONFIG_TYPE if config.media_type == DOCKER_CONFIG_TYPE else config.media_type
    kept_config = layout.add_blob(host, source.layout.read_blob(config), kind)
    _refuse_elsewhere(source, raw)
    converted, roots = [], []
    with host.scratch(near=layout.path) as folder:
        for number, (item, diff_id) in enumerate(zip(descriptors, expected, strict=True), 1):
            label = f"{source.name}: layer {number} of {len(descriptors)}"
            job = LayerJob(host, source.layout, item, diff_id, label, folder / str(number))
            layer = _convert_layer(job, below, layout)
            converted.append(layer.descriptor if layer else item)
            roots += [layer] if layer else []
        if below.check:
            below.check(below.read())
    if tuple(converted) == descriptors:
        # Nothing changed: the manifest stays what its author made, digest included.
        return ConvertedImage(layout.add_blob(host, document, descriptor.media_type), tuple(roots))
    kept = {key: raw[key] for key in ("artifactType", "annotations") if key in raw}
    manifest = {
        **kept,
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {**config.json(), "mediaType": kept_config.media_type},
        "layers": [item.json() for item in converted],
    }
    return ConvertedImage(layout.add_blob(host, encode(manifest), MANIFEST_TYPE), tuple(roots))


def _refuse_elsewhere(source: Source, raw: dict[str, object]) -> None:
    """Refuse layers that lie on somebody's web server: a release holds all that it needs."""
    layers = raw["layers"]
    assert isinstance(layers, list)  # _descriptors checked it
    for number, item in enumerate(layers, 1):
        if item.get("urls") or "foreign" in item["mediaType"] or "nondistributable" in item["mediaType"]:
            raise Failure(
                f"{source.name}: layer {number} of {len(layers)} is kept elsewhere (a foreign layer): "
                "make the image without it"
            )


def _find_image(source: Source, tag: str) -> Descriptor:
    """Return the image manifest that a tag names, or the only one; of several platforms, linux/amd64."""
    path, listed = source.layout.path, source.layout.read_index()
    found = [item for item in listed if not tag or item.annotations.get(REF_NAME) == tag]
    if len(found) != 1:
        tags = ", ".join(sorted(item.annotations.get(REF_NAME, "(no tag)") for item in listed)[:20])
        raise Failure(f"{path} has {len(found)} images{f' tagged {tag}' if tag else ''}: name one of {tags}")
    return find_image(source.name, found[0], source.layout.read_blob)


def find_image(name: str, listed: Descriptor, read: Callable[[Descriptor], bytes]) -> Descriptor:
    """Return the image manifest that a tag leads to, in a folder or a registry; of several platforms,
    linux/amd64. `read` returns a document that has its digest and size.
    """
    image = listed
    # index.json, its entry, and what buildx lays between: nothing in use is deeper.
    for _ in range(INDEX_DEPTH):
        document = read(image)
        raw = check_document(name, image, document)
        if image.media_type in MANIFEST_TYPES:
            return image
        if image.media_type not in INDEX_TYPES:
            raise Failure(f"{name}: {image.digest} is {image.media_type[:100]}, not an image: name another")
        parsed = _descriptors(document, "manifests")
        entries = raw["manifests"]
        assert isinstance(entries, list)  # _descriptors checked it
        ours = [item for item, entry in zip(parsed, entries, strict=True) if _is_ours(item, entry)]
        if len(ours) != 1:
            raise Failure(f"{name} has {len(ours)} images for linux/amd64: name one that has exactly one")
        image = ours[0]
    raise Failure(
        f"{name} has indexes in indexes, more than {INDEX_DEPTH} deep: name the image by its own tag"
    )


def _is_ours(item: Descriptor, entry: dict[str, object]) -> bool:
    """Say whether an entry of an index leads to an image for linux/amd64; an index need not say for what."""
    unsaid = entry.get("platform") is None and item.media_type in INDEX_TYPES
    return unsaid or _platform(entry) == ("linux", "amd64")


def _platform(entry: dict[str, object]) -> tuple[object, object]:
    platform = entry.get("platform")
    return (platform.get("os"), platform.get("architecture")) if isinstance(platform, dict) else (None, None)


def _diff_ids(source: Source, config: Descriptor, count: int) -> list[str | None]:
    """Return the digests that the unpacked layers must have; none for what is no image of files."""
    if config.media_type not in (CONFIG_TYPE, DOCKER_CONFIG_TYPE):
        return [None] * count
    raw = init.parse_json(source.layout.read_blob(config), "IMAGE-FORMAT")
    if not isinstance(raw, dict):
        raise Failure(f"the config of {source.name} is no JSON object")
    _check_keys(source.name, raw, raw.get("rootfs"))
    platform = raw.get("os", "linux"), raw.get("architecture", "amd64")
    if platform != ("linux", "amd64"):
        raise Failure(
            f"{source.name} is for {str(platform[0])[:40]}/{str(platform[1])[:40]}, not linux/amd64"
        )
    rootfs = raw.get("rootfs")
    ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(ids, list) or len(ids) != count:
        raise Failure(f"the config of {source.name} does not list its {count} layers")
    return [str(digest) for digest in ids]


# --- Layers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerJob:
    """A layer to convert: where from, what its tar must be, its name for people, a path for files."""

    host: Host
    source: Layout
    layer: Descriptor
    diff_id: str | None
    label: str
    work: Path

    def take(self) -> Path:
        """Copy the layer as it is packed. Nobody else can write the copy: what was checked is used."""
        target = self.work.with_name(self.layer.digest.removeprefix("sha256:"))
        return target if target.is_file() else self.source.copy_blob(self.layer, target)


class Below:
    """What lies below the layer in hand. Of layers that were kept it is read when another needs it, not
    before.
    """

    def __init__(self, cache: kept.Cache | None, check: Callable[[trees.Image], None] | None) -> None:
        self.cache, self.check = cache, check
        self._image = trees.Image()
        self._unread: list[LayerJob | None] = []
        self.taken: list[tuple[str, int, set[str]]] = []  # verity layers, as they are
        self._chain: list[tuple[str, str, str | None]] = []

    def key(self, job: LayerJob) -> str:
        """Name what becomes of the next layer: it depends on its tar and on all that lies below.

        Both its digests count: only that a packed layer unpacks to its diff_id makes it the same.
        """
        self._chain.append((job.layer.media_type, job.layer.digest, job.diff_id))
        return self.cache.key(self._chain) if self.cache else ""

    def later(self, job: LayerJob | None) -> None:
        """Lie on a layer that is read when it is needed, or (None) on one whose names nobody knows."""
        self._unread.append(job)

    def read(self) -> trees.Image:
        """Return the layers below as they look together."""
        for job in self._unread:
            if job is None:
                self._image.forget()
            else:
                tar = _unpack(job, job.take(), self._image, "reading what it holds")
                tars.read_layer(tar, job.label, self._image)
        self._unread.clear()
        return self._image


def _convert_layer(job: LayerJob, below: Below, layout: Layout) -> VerityLayer | None:
    """Add a layer to the layout; None for a UKI, which is no file system."""
    layer, host, key = job.layer, job.host, below.key(job)
    roots = {layer.annotations[name] for name in init.ROOT_HASH_ANNOTATIONS if name in layer.annotations}
    if (layer.digest, layer.size, roots) in below.taken:
        return VerityLayer(layer, min(roots))
    path = job.take()
    if layer.media_type == init.UKI_MEDIA_TYPE or roots:
        for root_hash in roots:
            check_layer(host, path, root_hash)
        if roots:
            _check_filesystem(host, path, job.label)
            below.later(None)
        layout.take_file(host, path, layer)
        below.taken += [(layer.digest, layer.size, roots)] if roots else []
        return VerityLayer(layer, min(roots)) if roots else None
    if layer.media_type not in PACKINGS:
        hint = ": build it with a verity root hash" if "stacker" in layer.media_type else ""
        raise Failure(f"{job.label} is {layer.media_type}, which mosinit cannot convert{hint}")
    if job.diff_id is None:
        raise Failure(f"{job.label} has no diff_id: the image needs a config that lists its layers")
    work = job.work.with_suffix(".erofs")
    if below.cache and (found := below.cache.fetch(key, work)):
        path.unlink()
        host.say(f"{job.label}: converted before")
        below.later(job)
        return _take_layer(host, work, layout, found)
    stack = below.read()
    tar = _unpack(job, path, stack)
    tree = tars.read_layer(tar, job.label, stack)
    made = add_tree(host, tree, job.diff_id, work, layout, job.label)
    # A hard link of a later layer may ask for any file of this one; of a layer without content, for nothing.
    if not trees.size_of(tree):
        tar.unlink()
    if below.cache:
        blob = made.descriptor
        below.cache.keep(
            host, key, layout.blob_path(blob.digest), kept.Kept(blob.digest, blob.size, made.root_hash)
        )
    return made


def _take_layer(host: Host, work: Path, layout: Layout, layer: kept.Kept) -> VerityLayer:
    """Move a verity layer file into the layout."""
    descriptor = Descriptor(EROFS_TYPE, layer.digest, layer.size, annotations={ROOT_HASH: layer.root_hash})
    layout.take_file(host, work, descriptor)
    return VerityLayer(descriptor, layer.root_hash)


def _check_filesystem(host: Host, path: Path, label: str) -> None:
    """Refuse what the bring-up would not mount: the magic number of a file system is not all of it."""
    with path.open("rb") as file:
        kind = init.find_filesystem(file.read(init.BLOCK), label)
    # fsck.erofs ends with status 0 also where it finds no file system: what counts is its last word.
    program = {"erofs": "fsck.erofs -d3 --extract", "squashfs": "unsquashfs -lln"}[kind].split()
    limits = ["prlimit", f"--cpu={CHECK_SECONDS}", f"--as={CHECK_BYTES}"]
    both = ["sh", "-c", 'exec "$@" 2>&1', "sh"]
    left, said = trees.Limits().metadata, b""
    try:
        with (
            path.open("rb") as file,
            host.pipe([*both, *limits, *program, str(path)], stdin=file, env=closed_environment()) as words,
        ):
            while chunk := words.read(CHUNK):
                said, left = (said + chunk)[-500:], left - len(chunk)
                if left < 0:
                    raise Failure("it lists more names than an image may have")
        if kind == "erofs" and not said.rstrip().endswith(b"No errors found"):
            raise Failure("it is none")
    except Failure as failure:
        reason = (said.decode(errors="replace").splitlines() or [str(failure)])[-1]
        raise Failure(f"{label}: its {kind} cannot be read ({reason}): make it again") from failure


def _unpack(job: LayerJob, path: Path, stack: trees.Image, doing: str = "unpacking") -> Path:
    """Return the bare tar of a layer, after a check that it is the one that the config lists."""
    packing = PACKINGS[job.layer.media_type]
    target = job.work.with_name(f"{path.name}.tar")
    # skopeo calls the bare tars of a docker archive gzip: the digest knows better.
    if job.layer.digest == job.diff_id:
        return path
    if not packing:
        raise Failure(f"{job.label} is not its diff_id {job.diff_id}")
    # An image may list a layer more than once.
    if target.is_file() and digest_file(target)[0] == job.diff_id:
        path.unlink()
        return target
    hasher = hashlib.sha256()
    left = stack.limits.content - stack.content
    with (
        job.host.progress(f"{job.label}: {doing}", job.layer.size) as advance,
        path.open("rb") as packed,
        target.open("wb") as plain,
    ):
        done = 0
        for chunk in _chunks(job, packing, packed):
            left -= len(chunk)
            if left < 0:
                raise Failure(f"{job.label} unpacks to more than an image may: {stack.limits.content} bytes")
            hasher.update(chunk)
            plain.write(chunk)
            # What zstd has read of the file that it shares with us moves our place in it too.
            place = os.lseek(packed.fileno(), 0, os.SEEK_CUR)
            advance(place - done)
            done = place
    if f"sha256:{hasher.hexdigest()}" != job.diff_id:
        raise Failure(f"{job.label} does not unpack to its diff_id {job.diff_id}")
    path.unlink()
    return target


def _chunks(job: LayerJob, packing: str, packed: IO[bytes]) -> Iterator[bytes]:
    """Yield the bare tar of a packed layer piece by piece."""
    if packing == "zstd":
        with job.host.pipe(
            ["zstd", "--decompress", "--quiet", "--stdout"], stdin=packed, env=closed_environment()
        ) as plain:
            yield from iter(lambda: plain.read(CHUNK), b"")
        return
    try:
        with gzip.GzipFile(fileobj=packed, mode="rb") as unpacked:
            yield from iter(lambda: unpacked.read(CHUNK), b"")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Failure(f"{job.label} is not the gzip file that it says it is: {error}") from error


def tree_layer(host: Host, folder: Path, layout: Layout) -> Descriptor:
    """Add a plain folder as a verity layer: owned by root, dates zero, modes and links as they are."""
    with host.scratch(near=layout.path) as scratch:
        tar = scratch / "tree.tar"
        with tar.open("wb") as file:
            write_tar(folder, file)
        return add_layer(host, tar, scratch / "tree.erofs", layout).descriptor


def write_tar(folder: Path, file: IO[bytes], *, prefix: str = "", modes: bool = True) -> None:
    """Write a folder as a tar that depends on names, modes (if asked for), links and contents alone."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in [folder, *sorted(folder.rglob("*"))]:
            entry = archive.gettarinfo(path, arcname=f"./{prefix}{path.relative_to(folder)}")
            # Hard links are an accident of the folder, for example of a cache: each file is whole here.
            if path.is_file() and not path.is_symlink():
                entry.type, entry.linkname, entry.size = tarfile.REGTYPE, "", path.stat().st_size
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = 0
            if not modes:
                entry.mode = 0o755 if entry.isdir() else 0o644
            if entry.isreg():
                with path.open("rb") as content:
                    archive.addfile(entry, content)
            else:
                archive.addfile(entry)


def add_layer(host: Host, tar: Path, work: Path, layout: Layout) -> VerityLayer:
    """Add a tar that lies on nothing as a verity layer. `work` is a path for a temporary file."""
    label = f"the tar of {layout.path.name}"
    tree = tars.read_layer(tar, label, trees.Image())
    return add_tree(host, tree, digest_file(tar)[0], work, layout, label)


def add_tree(
    host: Host, tree: trees.Folder, identity: str, work: Path, layout: Layout, label: str
) -> VerityLayer:
    """Add a tree as a verity layer. `identity` is a digest that the UUID is made of, `work` a path for a
    temporary file.
    """
    words = _erofs_words(uuid_of(identity.removeprefix("sha256:")), COMPRESSION)
    # mkfs.erofs keeps what it has read of a pipe in TMPDIR, and /tmp may be memory.
    environment = closed_environment(TMPDIR=work.parent)
    with (
        host.progress(f"{label}: making its file system", trees.size_of(tree)) as advance,
        host.pipe([*words, work], env=environment) as out,
    ):
        plaintar.write_tree(tree, out, advance)
    _check_count(work, trees.count(tree), label)
    _pad(work)
    digest = digest_file(work)[0].removeprefix("sha256:")
    root_hash = append_verity(host, work, salt=digest, name=digest)
    return _take_layer(host, work, layout, kept.Kept(*digest_file(work), root_hash))


def open_cache(host: Host) -> kept.Cache | None:
    """Return the user's cache of converted layers, or None if there can be none."""
    folder = kept.open_folder(host, tools.cache() / "layers")
    try:
        return kept.Cache(folder, _maker(host)) if folder else None
    except Failure:
        return None  # whoever converts will say what is missing


def _maker(host: Host) -> str:
    """Name what converts: our code, its programs, and the libraries that those load (the compressors)."""
    files = [str(module.__file__) for module in (init, kept, seam, tars)] + [__file__]
    for name in ("mkfs.erofs", "veritysetup"):
        program = shutil.which(name)
        if program is None:
            raise Failure(f"{name} is missing: run mosinit in its tools tree")
        listed = host.run(["ldd", program], env=closed_environment()).decode()
        files += [program, *re.findall(r"(/\S+) \(0x", listed)]
    return digest_bytes(encode([digest_file(Path(name))[0] for name in files]))[0]


def _check_count(path: Path, expected: int, label: str) -> None:
    """Raise `Failure` unless the file system has all inodes: mkfs.erofs tells nobody where it stopped."""
    with path.open("rb") as file:
        # linux/fs/erofs/erofs_fs.h, struct erofs_super_block: magic, checksum, features, sizes, root, inodes
        magic, inodes = struct.unpack_from("<I12xQ", file.read(init.BLOCK), 1024)
    if (magic, inodes) != (0xE0F5E1E2, expected):
        raise Failure(f"{label}: mkfs.erofs made {inodes} of {expected} files: use the tools tree's")


# --- erofs and dm-verity ------------------------------------------------------------------------------


def uuid_of(digest: str) -> str:
    """Return a UUID made of a digest (hex): the same content has the same one."""
    return str(uuid.UUID(bytes=bytes.fromhex(digest)[:16], version=4))


def make_erofs(host: Host, tar: Path, target: Path, options: Iterable[str] = ()) -> None:
    """Make an erofs image of a tar that we wrote ourselves; the same tar gives the same bytes."""
    identity = uuid_of(digest_file(tar)[0].removeprefix("sha256:"))
    host.run([*_erofs_words(identity, options), target, tar], timeout=3600, env=closed_environment())
    _pad(target)


def _erofs_words(identity: str, options: Iterable[str]) -> list[str]:
    return ["mkfs.erofs", "--quiet", "-T0", "--mkfs-time", f"-U{identity}", *options, "--tar=f"]


def _pad(path: Path) -> None:
    os.truncate(path, -(-path.stat().st_size // init.BLOCK) * init.BLOCK)


def append_verity(host: Host, path: Path, *, salt: str, name: str) -> str:
    """Append superblock and hash tree to a file of whole blocks; returns the root hash.

    `salt` is up to 256 bytes in hex, `name` a digest that the superblock's UUID is made of.
    """
    size = path.stat().st_size
    with host.scratch(near=path) as folder:
        host.run(
            ["veritysetup", "format", *_verity_words(size), f"--salt={salt}", f"--uuid={uuid_of(name)}",
             f"--root-hash-file={folder}/root-hash", path, path],
            timeout=3600,
            env=closed_environment(),
        )  # fmt: skip
        root_hash = (folder / "root-hash").read_text().strip()
    if init.verity_data_blocks(path.stat().st_size) != size // init.BLOCK:
        raise Failure(
            f"veritysetup made a tree of another size than expected for {path.name}: use the tools tree's"
        )
    return root_hash


def check_layer(host: Host, path: Path, root_hash: str) -> None:
    """Raise `Failure` or `Refused` unless every block of a verity layer file agrees with its root hash."""
    if not init.HEX64.fullmatch(root_hash):
        raise Failure(f"{root_hash[:80]!r} is no root hash of {path.name}: it has 64 hex digits")
    blocks = init.verity_data_blocks(path.stat().st_size)
    with path.open("rb") as file:
        file.seek(blocks * init.BLOCK)
        init.parse_verity_salt(file.read(init.BLOCK), blocks)
    host.run(
        ["veritysetup", "verify", f"--hash-offset={blocks * init.BLOCK}", path, path, root_hash],
        timeout=3600,
        env=closed_environment(),
    )


def _verity_words(size: int) -> list[str]:
    return [
        "--format=1", "--hash=sha256", f"--data-block-size={init.BLOCK}", f"--hash-block-size={init.BLOCK}",
        f"--data-blocks={size // init.BLOCK}", f"--hash-offset={size}",
    ]  # fmt: skip
