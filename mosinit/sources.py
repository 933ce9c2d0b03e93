"""Where a release is installed from: a folder, or a registry over HTTPS.

A folder is read whole before the disk is touched. Of a registry's release that holds for its documents, by
which everything is decided: signatures, chain, product, epoch, and which blobs there must be. The blobs may
be larger than a machine's memory: they go straight to the new store, each compared with its digest on the
way, and are read back before the disk is a machine's.

What no digest names is the list alone, by which a folder says what its release is: it is read once, and
written anew where the release is stored (`lists`), since whoever keeps a medium may change it meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mosinit import images, init, publish
from mosinit.generations import Elsewhere, Quiet
from mosinit.host import Failure, Host, Usage

if TYPE_CHECKING:
    from mosinit.registry import Access, Connection

STORE = f"{init.STORE}/{init.REPOSITORY}"
INDEX = f"{STORE}/index.json"


@dataclass(frozen=True)
class Blob:
    """A blob of a release."""

    digest: str
    size: int


class Source(Protocol):
    """A release as it lies there: untrusted, each blob compared with its digest when it is read."""

    name: str
    machine: init.Machine  # whose store is the release, the same one for as long as it is open

    def blob(self, blob: Blob) -> Iterator[bytes]:
        """Yield a blob's bytes; raises at the end unless they were exactly the right ones."""

    def check(self, host: Host, blobs: Sequence[Blob]) -> None:
        """See that all blobs are there, as far as that can be seen. Raises `Failure`, `Refused`."""


def open_source(
    source: str, access: Access | None = None, say: Callable[[str], None] = lambda text: None
) -> Source:
    """Return the release that `oci:DIR` or `docker://…` names; `say` is told when the way there breaks.

    Raises `Failure`, `Usage`.
    """
    kind, _, name = source.partition(":")
    if kind == "docker":
        return _open_registry(source, access, say)
    if kind != "oci" or not name:
        raise Usage(
            f"cannot install from {source[:200]}: name a release as oci:DIR or docker://HOST/NAME:TAG"
        )
    if not (Path(name) / "index.json").is_file():
        raise Failure(f"{name} is no release (it has no index.json): name one that `mosinit publish` made")
    return Folder(Path(name).absolute())


def lists(index: images.Descriptor) -> dict[str, bytes]:
    """Return what lies in an image layout beside its blobs, with this index alone: as it is published."""
    named = images.Descriptor(
        index.media_type, index.digest, index.size, annotations={images.REF_NAME: publish.TAG}
    )
    return {
        "oci-layout": images.encode({"imageLayoutVersion": "1.0.0"}),
        "index.json": images.encode(images.index_of([named])),
    }


# --- A folder --------------------------------------------------------------------------------------------


class Folder:
    """A release in an OCI image layout."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, f"oci:{folder}"
        self._store = FolderStore({STORE: folder})
        self.machine: init.Machine = self._store

    def blob(self, blob: Blob) -> Iterator[bytes]:
        """Yield a blob's bytes."""
        return read_checked(self._store.real_path(init.blob_path(blob.digest)), blob)

    def check(self, host: Host, blobs: Sequence[Blob]) -> None:
        """Read every byte."""
        with host.progress("verifying the release", sum(blob.size for blob in blobs)) as advance:
            for blob in blobs:
                for chunk in self.blob(blob):
                    advance(len(chunk))


class FolderStore(Elsewhere):
    """A store as the bring-up reads it, whose list is read once: all else is asked for by digest."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        super().__init__(places)
        self._index: bytes | None = None

    def read(self, path: str, limit: int = init.MIB) -> bytes:
        """Read a file of the release."""
        if path != INDEX:
            return super().read(path, limit)
        if self._index is None:
            self._index = super().read(path, limit)
        return self._index


def _at_once(path: str, flags: int) -> int:
    # A pipe in the place of a file would keep whoever opens it.
    return os.open(path, flags | os.O_NONBLOCK)


def read_checked(path: str, blob: Blob) -> Iterator[bytes]:
    """Yield a blob's bytes; raises `Refused` at the end unless they were exactly the right ones."""
    digest, size = hashlib.sha256(), 0
    with init.refusing("STORE-BLOB", f"blob {blob.digest}"), open(path, "rb", opener=_at_once) as file:
        while chunk := file.read(images.CHUNK):
            digest.update(chunk)
            size += len(chunk)
            if size > blob.size:
                break
            yield chunk
    seen = f"sha256:{digest.hexdigest()}, {size} bytes"
    if seen != (expected := f"{blob.digest}, {blob.size} bytes"):
        raise init.Refused("IMAGE-DIGEST", expected=expected, seen=seen)


# --- A registry ------------------------------------------------------------------------------------------


def _open_registry(source: str, access: Access | None, say: Callable[[str], None]) -> Source:
    """Resolve a tag once: from there on everything is asked for by digest."""
    from mosinit import registry

    reference = registry.parse_reference(source)
    connection = registry.connect(access or registry.Access(), reference)
    index, data = connection.manifest(reference.digest or reference.tag or "latest")
    return Registry(connection, index, data, say)


class Registry:
    """A release in a registry."""

    def __init__(
        self, connection: Connection, index: images.Descriptor, data: bytes, say: Callable[[str], None]
    ) -> None:
        place = connection.reference
        self.name = f"docker://{place.host}/{place.name}@{index.digest}"
        self.connection, self.say = connection, say
        store = RegistryStore(connection, index, data)
        self.machine: init.Machine = store
        self._manifests = store.manifests

    def blob(self, blob: Blob) -> Iterator[bytes]:
        """Yield a blob's bytes: a manifest's from memory, others as they come."""
        if blob.digest in self._manifests:
            yield init.read_blob(self.machine, blob.digest, blob.size, "IMAGE-DIGEST")
        else:
            yield from self.connection.stream(images.Descriptor("", blob.digest, blob.size), self.say)

    def check(self, host: Host, blobs: Sequence[Blob]) -> None:
        """Ask the registry for every blob that was not read yet."""
        for blob in blobs:
            known = blob.digest in self._manifests
            if not known and not self.connection.has(images.Descriptor("", blob.digest, blob.size)):
                seen = f"a registry without it ({self.connection.reference.host})"
                raise init.Refused("STORE-BLOB", expected=f"blob {blob.digest}", seen=seen)


class RegistryStore(Quiet):
    """A store as the bring-up reads it, whose documents come from a registry when they are first read.

    Whoever reads compares digest and size: `init.read_blob` does. So nothing is asked for that something
    verified, or the index that was named, does not lead to, and each has at most the 4 MiB that are read.
    """

    def __init__(self, connection: Connection, index: images.Descriptor, data: bytes) -> None:
        super().__init__()
        _, listed = init.parse_descriptors(data, "manifests", "MANIFEST-ABSENT")
        self.manifests = {index.digest, *(item.digest for item in listed)}
        self._connection = connection
        self._known = {f"{STORE}/{name}": content for name, content in lists(index).items()}
        self._known[init.blob_path(index.digest)] = data

    def read(self, path: str, limit: int = init.MIB) -> bytes:
        """Read a document of the release; what is not there is an OSError, as in a folder."""
        if path not in self._known:
            digest = f"sha256:{path.rpartition('/')[2]}"
            if path != init.blob_path(digest) or not init.DIGEST.fullmatch(digest):
                raise FileNotFoundError(errno.ENOENT, "no document of a release", path)
            self._known[path] = self._fetch(digest, limit)
        if len(self._known[path]) > limit:
            raise OSError(errno.EFBIG, f"{path} is larger than {limit} bytes")
        return self._known[path]

    def _fetch(self, digest: str, limit: int) -> bytes:
        from mosinit import wire

        try:
            if digest in self.manifests:
                return self._connection.manifest(digest)[1]
            return self._connection.document(digest, limit)
        except wire.Absent as error:
            raise FileNotFoundError(errno.ENOENT, "the registry does not have it", digest) from error
