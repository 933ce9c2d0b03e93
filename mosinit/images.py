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
import shutil
import tarfile
import uuid
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mosinit import init
from mosinit.host import Failure, Host

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"  # OCI image specification 1.1, media-types.md
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
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

DOCUMENT_LIMIT = 4 * init.MIB
CHUNK = init.MIB


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
            if isinstance(content, Path):
                shutil.copyfile(content, fresh)
            else:
                fresh.write_bytes(content)
        return descriptor

    def _prepare(self, host: Host) -> None:
        (self.path / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        marker = self.path / "oci-layout"
        if not marker.exists():
            with host.replacing(marker) as fresh:
                fresh.write_bytes(encode({"imageLayoutVersion": "1.0.0"}))

    def check_blob(self, descriptor: Descriptor) -> Path:
        """Return the path of a blob that has the digest and size that its descriptor says."""
        path = self.blob_path(descriptor.digest)
        # Size first: nobody should wait for the digest of a terabyte that cannot be right.
        if not path.is_file() or path.stat().st_size != descriptor.size:
            raise Failure(f"{path} is missing or not {descriptor.size} bytes long: fetch the image again")
        if digest_file(path)[0] != descriptor.digest:
            raise Failure(f"{path} is damaged, its digest is another: fetch the image again")
        return path

    def read_blob(self, descriptor: Descriptor) -> bytes:
        """Return a document of at most 4 MiB whose digest and size are as its descriptor says."""
        if descriptor.size > DOCUMENT_LIMIT:
            raise Failure(f"{descriptor.digest} in {self.path} is larger than 4 MiB, which no document is")
        return self.check_blob(descriptor).read_bytes()

    def read_index(self) -> tuple[Descriptor, ...]:
        """Return what index.json lists."""
        path = self.path / "index.json"
        if not path.is_file():
            raise Failure(f"{self.path} is no OCI image layout (it has no index.json): name another source")
        if path.stat().st_size > DOCUMENT_LIMIT:
            raise Failure(f"{path} is larger than 4 MiB, which no index is")
        return _descriptors(path.read_bytes(), "manifests")

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


def _descriptors(document: bytes, key: str) -> tuple[Descriptor, ...]:
    _, parsed = init.parse_descriptors(document, key, "IMAGE-FORMAT")
    return tuple(Descriptor(*item) for item in parsed)


# --- Sources ------------------------------------------------------------------------------------------


def convert(host: Host, source: str, layout: Layout) -> ConvertedImage:
    """Add the image that `source` (oci:DIR[:TAG] or docker://…) names to a layout, with verity layers.

    Raises `Failure` or `Refused` for an image that is not what its digests say, or of a kind that cannot be
    converted.
    """
    host.say(f"converting {source}")
    if source.startswith("docker://"):
        with host.scratch(near=layout.path) as folder:
            host.run(
                ["skopeo", "copy", "--quiet", "--override-os=linux", "--override-arch=amd64",
                 source, f"oci:{folder}/image"],
                timeout=3600,
            )  # fmt: skip
            return _convert(host, Layout(folder / "image"), "", layout)
    if not source.startswith("oci:"):
        raise Failure(f"{source} is no image: name it oci:DIR[:TAG] or docker://REGISTRY/NAME")
    folder_name, tag = _split_tag(source.removeprefix("oci:"))
    return _convert(host, Layout(Path(folder_name)), tag, layout)


def _split_tag(name: str) -> tuple[str, str]:
    """Split DIR:TAG; a colon before the last slash belongs to the folder."""
    folder, _, tag = name.rpartition(":")
    return (folder, tag) if folder and "/" not in tag else (name, "")


def _convert(host: Host, source: Layout, tag: str, layout: Layout) -> ConvertedImage:
    descriptor = _find_image(source, tag)
    document = source.read_blob(descriptor)
    raw, _ = init.parse_descriptors(document, "layers", "IMAGE-FORMAT")
    descriptors = _descriptors(document, "layers")
    config = Descriptor(*init.parse_descriptor(raw.get("config"), "IMAGE-FORMAT"))
    layout.add_blob(host, source.read_blob(config), config.media_type)
    expected = _diff_ids(source, config, len(descriptors))
    converted, roots = [], []
    for item, diff_id in zip(descriptors, expected, strict=True):
        layer = _convert_layer(host, source, item, diff_id, layout)
        converted.append(layer.descriptor if layer else item)
        roots += [layer] if layer else []
    if tuple(converted) == descriptors:
        # Nothing changed: the manifest stays what its author made, digest included.
        return ConvertedImage(layout.add_blob(host, document, descriptor.media_type), tuple(roots))
    kept = {key: raw[key] for key in ("artifactType", "annotations") if key in raw}
    manifest = {
        **kept,
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": config.json(),
        "layers": [item.json() for item in converted],
    }
    return ConvertedImage(layout.add_blob(host, encode(manifest), MANIFEST_TYPE), tuple(roots))


def _find_image(source: Layout, tag: str) -> Descriptor:
    """Return the image manifest that a tag names, or the only one; of several platforms, linux/amd64."""
    listed = source.read_index()
    found = [item for item in listed if not tag or item.annotations.get(REF_NAME) == tag]
    if len(found) != 1:
        tags = ", ".join(sorted(item.annotations.get(REF_NAME, "(no tag)") for item in listed))
        raise Failure(
            f"{source.path} has {len(found)} images{f' tagged {tag}' if tag else ''}: name one of {tags}"
        )
    if found[0].media_type != INDEX_TYPE:
        return found[0]
    document = source.read_blob(found[0])
    raw, _ = init.parse_descriptors(document, "manifests", "IMAGE-FORMAT")
    entries = raw["manifests"]
    assert isinstance(entries, list)  # parse_descriptors checked it
    ours = [
        item
        for item, entry in zip(_descriptors(document, "manifests"), entries, strict=True)
        if _platform(entry) == ("linux", "amd64")
    ]
    if len(ours) != 1:
        raise Failure(f"{source.path} has {len(ours)} images for linux/amd64: name one that has exactly one")
    return ours[0]


def _platform(entry: dict[str, object]) -> tuple[object, object]:
    platform = entry.get("platform")
    return (platform.get("os"), platform.get("architecture")) if isinstance(platform, dict) else (None, None)


def _diff_ids(source: Layout, config: Descriptor, count: int) -> list[str | None]:
    """Return the digests that the unpacked layers must have, where the config says any."""
    if config.media_type != CONFIG_TYPE:
        return [None] * count
    raw = init.parse_json(source.read_blob(config), "IMAGE-FORMAT")
    rootfs = raw.get("rootfs") if isinstance(raw, dict) else None
    ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(ids, list) or len(ids) != count:
        raise Failure(f"the config of an image in {source.path} does not list its {count} layers")
    return [str(digest) for digest in ids]


# --- Layers -------------------------------------------------------------------------------------------


def _convert_layer(
    host: Host, source: Layout, layer: Descriptor, diff_id: str | None, layout: Layout
) -> VerityLayer | None:
    """Add a layer to the layout; None for a UKI, which is no file system."""
    path = source.check_blob(layer)
    roots = {layer.annotations[name] for name in init.ROOT_HASH_ANNOTATIONS if name in layer.annotations}
    if layer.media_type == init.UKI_MEDIA_TYPE or roots:
        for root_hash in roots:
            check_layer(host, path, root_hash)
        layout.add_blob(host, path, layer.media_type)
        return VerityLayer(layer, min(roots)) if roots else None
    if layer.media_type not in PACKINGS:
        raise Failure(f"a layer of {source.path} is {layer.media_type}, which mosinit cannot convert")
    with host.scratch(near=layout.path) as folder:
        tar = _unpack(host, path, PACKINGS[layer.media_type], folder / "layer.tar")
        if diff_id is not None and digest_file(tar)[0] != diff_id:
            raise Failure(f"layer {layer.digest} of {source.path} does not unpack to its diff_id {diff_id}")
        return add_layer(host, tar, folder / "layer.erofs", layout)


def _unpack(host: Host, path: Path, packing: str, target: Path) -> Path:
    """Return the bare tar of a layer, at `target` if it had to be unpacked."""
    if packing == "zstd":
        host.run(["zstd", "--decompress", "--quiet", path, "-o", target], timeout=3600)
        return target
    if packing == "gzip":
        try:
            with gzip.open(path) as packed, target.open("wb") as plain:
                shutil.copyfileobj(packed, plain, CHUNK)
        except (OSError, EOFError, zlib.error) as error:
            raise Failure(f"{path} is not the gzip file that it says it is: {error}") from error
        return target
    return path


def tree_layer(host: Host, folder: Path, layout: Layout) -> Descriptor:
    """Add a plain folder as a verity layer: owned by root, dates zero, modes and links as they are."""
    with host.scratch(near=layout.path) as scratch:
        tar = scratch / "tree.tar"
        with tar.open("wb") as file:
            write_tar(folder, file)
        return add_layer(host, tar, scratch / "tree.erofs", layout).descriptor


def write_tar(folder: Path, file: IO[bytes], *, prefix: str = "") -> None:
    """Write a folder as a tar that depends on names, modes, links and contents alone."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in [folder, *sorted(folder.rglob("*"))]:
            entry = archive.gettarinfo(path, arcname=f"./{prefix}{path.relative_to(folder)}")
            # Hard links are an accident of the folder, for example of a cache: each file is whole here.
            if path.is_file() and not path.is_symlink():
                entry.type, entry.linkname, entry.size = tarfile.REGTYPE, "", path.stat().st_size
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = 0
            if entry.isreg():
                with path.open("rb") as content:
                    archive.addfile(entry, content)
            else:
                archive.addfile(entry)


def add_layer(host: Host, tar: Path, work: Path, layout: Layout) -> VerityLayer:
    """Add a tar as a verity layer; whiteouts become overlayfs's. `work` is a path for a temporary file."""
    make_erofs(host, tar, work, COMPRESSION)
    digest = digest_file(work)[0].removeprefix("sha256:")
    root_hash = append_verity(host, work, salt=digest, name=digest)
    descriptor = layout.add_blob(host, work, EROFS_TYPE, annotations={ROOT_HASH: root_hash})
    return VerityLayer(descriptor, root_hash)


# --- erofs and dm-verity ------------------------------------------------------------------------------


def uuid_of(digest: str) -> str:
    """Return a UUID made of a digest (hex): the same content has the same one."""
    return str(uuid.UUID(bytes=bytes.fromhex(digest)[:16], version=4))


def make_erofs(host: Host, tar: Path, target: Path, options: Iterable[str] = ()) -> None:
    """Make an erofs image of a tar; the same tar gives the same bytes."""
    identity = uuid_of(digest_file(tar)[0].removeprefix("sha256:"))
    host.run(
        [
            "mkfs.erofs",
            "--quiet",
            "-T0",
            "--mkfs-time",
            f"-U{identity}",
            *options,
            "--tar=f",
            "--aufs",
            target,
            tar,
        ],
        timeout=3600,
    )
    size = target.stat().st_size
    os.truncate(target, -(-size // init.BLOCK) * init.BLOCK)


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
        )  # fmt: skip
        root_hash = (folder / "root-hash").read_text().strip()
    if init.verity_data_blocks(path.stat().st_size) != size // init.BLOCK:
        raise Failure(
            f"veritysetup made a tree of another size than expected for {path.name}: use the tools tree's"
        )
    return root_hash


def check_layer(host: Host, path: Path, root_hash: str) -> None:
    """Raise `Failure` or `Refused` unless every block of a verity layer file agrees with its root hash."""
    blocks = init.verity_data_blocks(path.stat().st_size)
    with path.open("rb") as file:
        file.seek(blocks * init.BLOCK)
        init.parse_verity_salt(file.read(init.BLOCK), blocks)
    host.run(
        ["veritysetup", "verify", f"--hash-offset={blocks * init.BLOCK}", path, path, root_hash],
        timeout=3600,
    )


def _verity_words(size: int) -> list[str]:
    return [
        "--format=1", "--hash=sha256", f"--data-block-size={init.BLOCK}", f"--hash-block-size={init.BLOCK}",
        f"--data-blocks={size // init.BLOCK}", f"--hash-offset={size}",
    ]  # fmt: skip
