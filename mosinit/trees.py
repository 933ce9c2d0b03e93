"""Trees: what the layers of an image hold, as the reader of tars makes it and the writer takes it.

Names are bytes. Names of one file share one leaf; a folder knows whether its tar listed it, what it hides of
the layers below, and whether it hides all of it. `Image` is what the layers look like together so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

RECORD = 512  # POSIX.1-2017, pax, "ustar Interchange Format"
CHUNK = 1 << 20

OPAQUE_XATTR = (b"trusted.overlay.opaque", b"y")  # Documentation/filesystems/overlayfs.rst
XATTR_PREFIX = b"SCHILY.xattr."

FILE, LINK, SYMLINK, CHARACTER, BLOCK, FOLDER, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"


@dataclass(frozen=True)
class Limits:
    """What all layers of one image together may cost.

    The largest images in use have half a million files; a million take about half a GiB of memory.
    """

    entries: int = 1_000_000
    headers: int = 4_000_000  # records of 512 bytes, extended headers and what makes no file included
    content: int = 64 << 30  # bytes of the layers' tars, unpacked, and of holes
    metadata: int = 256 << 20  # bytes of memory for names, link targets, extended attributes, sparse maps
    extension: int = 1 << 20  # bytes of one extended header, as in Go's archive/tar
    xattrs: int = 64 << 10  # bytes of one entry's extended attributes; linux/limits.h, XATTR_LIST_MAX
    padding: int = 1 << 20  # bytes of zeros behind the end of a tar; GNU tar fills up to 10 KiB


@dataclass(frozen=True, slots=True)
class Meta:
    """What an inode has besides content; the time in nanoseconds."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Content:
    """A file's bytes: pieces (position in the file, length, position in the tar), holes between them."""

    source: Path
    size: int
    pieces: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """What is not a folder. Names of one file share one leaf: identity is what a hard link is."""

    kind: bytes
    meta: Meta
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    content: Content | None = None


@dataclass(slots=True, eq=False)
class Folder:
    """A folder. Without `meta` the tar passed through it but never listed it.

    It is `made` if it is listed or something but whiteouts lies in it: a whiteout alone makes no folder.
    """

    meta: Meta | None = None
    children: dict[bytes, Leaf | Folder] = field(default_factory=dict)
    hidden: set[bytes] = field(default_factory=set)
    opaque: bool = False
    made: bool = False


WHITEOUT = Leaf(CHARACTER, Meta(mode=0))


class Image:
    """The layers read so far: what they look like together, and what they have cost."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.root: Folder | None = Folder(Meta())
        self.entries = self.headers = self.content = self.metadata = 0
        # Of files with several names, all that the layers gave them; some may be gone.
        self.names: dict[Leaf, set[bytes]] = {}

    def forget(self) -> None:
        """Lie on a layer whose names we do not know."""
        self.root = None

    def spend(self, *, entries: int = 0, headers: int = 0, content: int = 0, metadata: int = 0) -> str:
        """Count what an entry costs and return which limit is passed, or nothing."""
        self.entries += entries
        self.headers += headers
        self.content += content
        self.metadata += metadata
        if self.entries > self.limits.entries:
            return f"is one too many: an image has at most {self.limits.entries} files and folders"
        if self.headers > self.limits.headers:
            return f"makes headers of the image more than {self.limits.headers} records of {RECORD} bytes"
        if self.content > self.limits.content:
            return f"makes the image unpack to more than {self.limits.content} bytes"
        if self.metadata > self.limits.metadata:
            return f"makes names and attributes of the image take more than {self.limits.metadata} bytes"
        return ""


def walk(root: Folder) -> Iterator[tuple[tuple[bytes, ...], Leaf | Folder]]:
    """Yield every path of a tree with what is there: sorted, folders before what is in them."""
    yield (), root
    path: list[bytes] = []
    levels = [(root, iter(sorted(root.children)))]
    while levels:
        folder, names = levels[-1]
        if (name := next(names, None)) is None:
            levels.pop()
            del path[-1:]
            continue
        found = folder.children[name]
        path.append(name)
        yield tuple(path), found
        if isinstance(found, Folder):
            levels.append((found, iter(sorted(found.children))))
        else:
            path.pop()


def head(leaf: Leaf, size: int) -> bytes:
    """Return the first bytes of a file."""
    if leaf.content is None:
        return b""
    data = bytearray(min(size, leaf.content.size))
    if not leaf.content.pieces:
        return bytes(data)  # the tar may be gone
    with leaf.content.source.open("rb") as file:
        for start, length, place in leaf.content.pieces:
            if start < len(data):
                file.seek(place)
                piece = file.read(min(length, len(data) - start))
                data[start : start + len(piece)] = piece
    return bytes(data)


def count(root: Folder) -> int:
    """Return how many inodes a tree has."""
    folders, leaves, whiteouts = 0, set[Leaf](), 0
    for _, found in walk(root):
        if isinstance(found, Folder):
            folders += 1
        elif found is WHITEOUT:
            whiteouts += 1
        else:
            leaves.add(found)
    return folders + len(leaves) + whiteouts


def size_of(root: Folder) -> int:
    """Return how many bytes of content a tree has, holes filled: what writing it takes longest over."""
    files = {found for _, found in walk(root) if isinstance(found, Leaf)}
    return sum(leaf.content.size for leaf in files if leaf.content)
