"""Tars: layers as other tools pack them, read strictly into trees, and trees written as one plain tar.

A layer's tar comes from strangers, and what makes file systems of it is C code. So it is read here, where a
damaged or ambiguous archive is an error; it becomes a tree, in which a name means one thing; and the tree is
written in one way: sorted, every folder named, every number in range, whiteouts as overlayfs has them. The
next program sees nothing else. Nothing is extracted and no link is ever followed.

What a layer says depends on what lies below it: folders that it passes through but does not list keep their
attributes, and a hard link to a file of a lower layer takes that file, with all its names, into this layer.

Names may hold any byte but NUL and `/`: whatever stacks or mounts layers compares names and parses none.
Symbolic links may point anywhere: they are resolved where the tree is a root, never here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, NoReturn

from mosinit.host import Failure

RECORD = 512  # POSIX.1-2017, pax, "ustar Interchange Format"
NAME_MAX, PATH_MAX, DEPTH_MAX = 255, 4095, 512  # linux/limits.h; the depth is ours
ID_MAX = (1 << 32) - 2  # -1 means "no change" to chown
MAJOR_MAX, MINOR_MAX = (1 << 12) - 1, (1 << 20) - 1  # linux/kdev_t.h
SECONDS_MAX = 1 << 40
CHUNK = 1 << 20

WHITEOUT_PREFIX, OPAQUE_MARK = b".wh.", b".wh..wh..opq"  # OCI image specification 1.1, layer.md
OPAQUE_XATTR = (b"trusted.overlay.opaque", b"y")  # Documentation/filesystems/overlayfs.rst
XATTR_PREFIX = b"SCHILY.xattr."
# erofs and the kernel know these. Others, such as those of macOS, have no place on Linux and are left out.
XATTR_SPACES = (b"user.", b"trusted.", b"security.")
XATTR_NAMES = (b"system.posix_acl_access", b"system.posix_acl_default")
# Whoever could write these would tell overlayfs where to look for names and data.
OVERLAY_XATTRS = (b"trusted.overlay.", b"user.overlay.")

FILE, LINK, SYMLINK, CHARACTER, BLOCK, FOLDER, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"


@dataclass(frozen=True)
class Limits:
    """What all layers of one image together may cost.

    The largest images in use have half a million files; a million take about half a GiB of memory.
    """

    entries: int = 1_000_000
    content: int = 64 << 30  # bytes, unpacked and with holes filled
    metadata: int = 256 << 20  # bytes of names, link targets, extended attributes, sparse maps
    extension: int = 1 << 20  # bytes of one extended header, as in Go's archive/tar
    xattrs: int = 64 << 10  # bytes of one entry's extended attributes; linux/limits.h, XATTR_LIST_MAX


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
    """A folder. Without `meta` the tar passed through it but never listed it."""

    meta: Meta | None = None
    children: dict[bytes, Leaf | Folder] = field(default_factory=dict)
    hidden: set[bytes] = field(default_factory=set)
    opaque: bool = False


WHITEOUT = Leaf(CHARACTER, Meta(mode=0))


class Image:
    """The layers read so far: what they look like together, and what they have cost."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.root: Folder | None = Folder(Meta())
        self.entries = self.content = self.metadata = 0

    def forget(self) -> None:
        """Lie on a layer whose names we do not know."""
        self.root = None

    def spend(self, *, entries: int = 0, content: int = 0, metadata: int = 0) -> str:
        """Count what an entry costs and return which limit is passed, or nothing."""
        self.entries += entries
        self.content += content
        self.metadata += metadata
        if self.entries > self.limits.entries:
            return f"is one too many: an image has at most {self.limits.entries} files and folders"
        if self.content > self.limits.content:
            return f"makes the image unpack to more than {self.limits.content} bytes"
        if self.metadata > self.limits.metadata:
            return f"makes names and attributes of the image more than {self.limits.metadata} bytes"
        return ""


def read_layer(tar: Path, label: str, image: Image) -> Folder:
    """Read a layer's bare tar as the next layer of an image and return its tree.

    Raises `Failure` with `label` and the entry for whatever is damaged, ambiguous or beyond the limits.
    """
    with tar.open("rb") as file:
        reader = _Reader(file, tar, label, image)
        reader.read()
    _take_links(reader, image)
    _settle(reader, image)
    if image.root is not None:
        _merge(image.root, reader.root)
    return reader.root


# --- Headers ------------------------------------------------------------------------------------------


@dataclass
class _Header:
    """One entry as its header and extended headers have it."""

    name: bytes
    kind: bytes
    link: bytes
    numbers: dict[str, int]
    mtime: int
    records: list[tuple[bytes, bytes]]
    block: bytes
    data: int = 0
    size: int = 0


class _Reader:
    """Reads one tar into a tree. `entry` is the name that messages blame."""

    def __init__(self, file: IO[bytes], path: Path, label: str, image: Image) -> None:
        self.file, self.path, self.label, self.image = file, path, label, image
        self.end = path.stat().st_size
        self.entry = b""
        self.root = Folder()
        self.borrowed: set[Leaf] = set()

    def refuse(self, reason: str) -> NoReturn:
        name = self.entry[:160].decode(errors="backslashreplace")
        raise Failure(f"{self.label}: entry {name!r} {reason}")

    def read(self) -> None:
        """Read every entry, and nothing but zeros behind them."""
        position = 0
        while (header := self._next(position)) is not None:
            # Reading a sparse file's map may move where its data begins.
            _add(self, header)
            position = header.data + -(-header.size // RECORD) * RECORD

    def _next(self, position: int) -> _Header | None:
        """Read the entry that begins here, extended headers first; None at the end of the archive."""
        extended: dict[bytes, bytes] = {}
        records: list[tuple[bytes, bytes]] = []
        while True:
            block = self.take(position, RECORD)
            position += RECORD
            if not any(block):
                if extended or records:
                    self.refuse("is followed by an extended header without an entry")
                self._check_end(position)
                return None
            header = self._parse(block)
            if header.kind not in b"LKxg":
                break
            if header.size > self.image.limits.extension:
                self.refuse(f"has an extended header of {header.size} bytes")
            data = self.take(position, header.size)
            position += -(-header.size // RECORD) * RECORD
            if header.kind in extended:
                self.refuse("has two extended headers of one kind")
            if header.kind == b"g":
                self._check_global(data)
                continue
            extended[header.kind] = data
            if header.kind == b"x":
                records = self._records(data)
        header.data, header.records = position, records
        self._apply(header, extended)
        return header

    def take(self, position: int, size: int) -> bytes:
        """Return bytes of the tar, all of them."""
        self.file.seek(position)
        data = self.file.read(size) if position + size <= self.end else b""
        if len(data) != size:
            self.refuse("is the last that is whole: the tar is cut short")
        return data

    def _check_end(self, position: int) -> None:
        self.file.seek(position)
        while chunk := self.file.read(CHUNK):
            if chunk.count(0) != len(chunk):
                self.refuse("is the last, but the tar has data behind its end")

    def _parse(self, block: bytes) -> _Header:
        """Parse the fixed header: ustar, GNU's or the oldest."""
        checksum = sum(block[:148]) + 8 * 0x20 + sum(block[156:])
        if self._number(block[148:156], "checksum") != checksum:
            self.refuse("is followed by a damaged header")
        kind = b"0" if block[156:157] in (b"\0", b"7") else block[156:157]
        name = block[:100].partition(b"\0")[0]
        if block[257:263] == b"ustar\0":
            prefix = block[345:476] if block[508:512] == b"tar\0" else block[345:500]
            name = b"/".join(filter(None, (prefix.partition(b"\0")[0], name)))
        elif block[257:265] not in (b"ustar  \0", bytes(8)):
            self.refuse("is followed by a header of an unknown tar format")
        if kind not in b"LKxg":
            self.entry = name
        fields = {"mode": (100, 8), "uid": (108, 8), "gid": (116, 8), "size": (124, 12)}
        if kind in (CHARACTER, BLOCK):
            fields |= {"major": (329, 8), "minor": (337, 8)}
        numbers = {key: self._number(block[at : at + size], key) for key, (at, size) in fields.items()}
        seconds = self._number(block[136:148], "mtime", signed=True)
        link = block[157:257].partition(b"\0")[0]
        return _Header(name, kind, link, numbers, seconds * 10**9, [], block, size=numbers["size"])

    def _number(self, raw: bytes, name: str, *, signed: bool = False) -> int:
        """Parse octal digits, or GNU's base 256 for what does not fit them."""
        if raw[0] == 0x80:
            return int.from_bytes(raw[1:], "big")
        if raw[0] == 0xFF and signed:
            return int.from_bytes(raw, "big", signed=True)
        digits = raw.strip(b" \0")
        if not re.fullmatch(rb"[0-7]*", digits):
            self.refuse(f"or its successor has a {name} that is no number")
        return int(digits or b"0", 8)

    # --- Extended headers

    def _records(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Parse pax records: length, blank, key, `=`, value, newline."""
        records, at = [], 0
        while at < len(data):
            digits = re.compile(rb"([1-9][0-9]{0,7}) ").match(data, at)
            stop = at + int(digits[1]) if digits else 0
            if not digits or stop > len(data) or data[stop - 1 : stop] != b"\n" or stop <= digits.end():
                self.refuse("is followed by a damaged extended header")
            key, equals, value = data[digits.end() : stop - 1].partition(b"=")
            if not (key and equals):
                self.refuse("is followed by a damaged extended header")
            records.append((key, value))
            at = stop
        repeated = {b"GNU.sparse.offset", b"GNU.sparse.numbytes"}
        keys = [key for key, _ in records if key not in repeated]
        if len(keys) != len(set(keys)):
            self.refuse("is followed by an extended header that says one thing twice")
        return records

    def _check_global(self, data: bytes) -> None:
        """Global headers may comment (git does), but set nothing: some readers heed them and some do not."""
        for key, _ in self._records(data):
            if key in _KNOWN or key.startswith((XATTR_PREFIX, b"GNU.sparse.")):
                self.refuse(f"is followed by a global header that sets {key.decode(errors='replace')}")

    def _apply(self, header: _Header, extended: dict[bytes, bytes]) -> None:
        """Put what extended headers say into the entry."""
        found = {key: value for key, value in header.records if value}
        for kind, key, name in ((b"L", b"path", "name"), (b"K", b"linkpath", "link")):
            if kind in extended and key in found:
                self.refuse(f"or its successor has two values for its {name}")
            if kind in extended:
                found[key] = extended[kind].partition(b"\0")[0]
        if b"GNU.sparse.name" in found:
            found[b"path"] = found[b"GNU.sparse.name"]
        header.name = found.get(b"path", header.name)
        self.entry = header.name
        header.link = found.get(b"linkpath", header.link)
        for field_name in ("uid", "gid", "size"):
            if (value := found.get(field_name.encode())) is not None:
                header.numbers[field_name] = self._decimal(value, field_name)
        header.size = header.numbers["size"]
        if b"mtime" in found:
            match = re.fullmatch(rb"(-?)([0-9]{1,19})(?:\.([0-9]*))?", found[b"mtime"])
            if not match:
                self.refuse("has a date that is no number")
            value_ns = int(match[2]) * 10**9 + int(((match[3] or b"") + bytes(b"0" * 9))[:9])
            # mkfs.erofs adds a fraction to a negative number: dates before 1970 have none.
            header.mtime = -(value_ns // 10**9) * 10**9 if match[1] else value_ns
        if not -SECONDS_MAX < header.mtime // 10**9 < SECONDS_MAX:
            self.refuse("has a date that no clock will show")
        if max(header.numbers["uid"], header.numbers["gid"]) > ID_MAX:
            self.refuse("has an owner or group beyond 32 bits")

    def _decimal(self, value: bytes, name: str) -> int:
        if not re.fullmatch(rb"[0-9]{1,19}", value):
            self.refuse(f"has a {name} that is no number")
        return int(value)

    # --- Sparse files

    def content(self, header: _Header) -> Content:
        """Find a file's bytes in the tar, holes and all."""
        start, stored = header.data, header.size
        if start + stored > self.end:
            self.refuse("has more data than the tar: it is cut short")
        found = dict(header.records)
        if header.kind == b"S":
            size, pairs, skipped = self._old_sparse(header)
        elif found.get(b"GNU.sparse.major"):
            if (found[b"GNU.sparse.major"], found.get(b"GNU.sparse.minor")) != (b"1", b"0"):
                self.refuse("is a sparse file of an unknown format")
            size, (pairs, skipped) = self._real_size(found), self._sparse_map(start, stored)
        elif any(key.startswith(b"GNU.sparse.") for key in found):
            size, pairs, skipped = self._real_size(found), self._pax_sparse(header.records), 0
        else:
            size, pairs, skipped = stored, [(0, stored)], 0
        start += skipped
        if header.kind == b"S":
            header.data, skipped = start, 0
        return self._pieces(size, pairs, start, stored - skipped)

    def _pieces(self, size: int, pairs: list[tuple[int, int]], start: int, stored: int) -> Content:
        """Check that the pieces of a file ascend, lie in it, and use up what is stored."""
        if problem := self.image.spend(content=size, metadata=24 * len(pairs)):
            self.refuse(problem)
        pieces, last, at = [], 0, start
        for position, length in pairs:
            if position < last or position + length > size:
                self.refuse("is a sparse file whose pieces overlap or leave it")
            if length:
                pieces.append((position, length, at))
            last, at = position + length, at + length
        if at - start != stored or at > self.end:
            self.refuse("is a sparse file whose pieces are not what is stored")
        return Content(self.path, size, tuple(pieces))

    def _real_size(self, found: dict[bytes, bytes]) -> int:
        return self._decimal(found.get(b"GNU.sparse.realsize", found.get(b"GNU.sparse.size", b"")), "size")

    def _old_sparse(self, header: _Header) -> tuple[int, list[tuple[int, int]], int]:
        """GNU's first format: four pieces in the header, 21 in each block that follows."""
        block, at, count, more = header.block, 386, 4, header.block[482]
        size, pairs, skipped = self._number(block[483:495], "size"), list[tuple[int, int]](), 0
        while True:
            for index in range(count):
                raw = block[at + 24 * index : at + 24 * index + 24]
                if raw[0] and len(pairs) > self.image.limits.extension // 8:
                    self.refuse("is a sparse file of too many pieces")
                if raw[0]:
                    pairs.append((self._number(raw[:12], "piece"), self._number(raw[12:], "piece")))
            if not more:
                return size, pairs, skipped
            block, at, count = self.take(header.data + skipped, RECORD), 0, 21
            more, skipped = block[504], skipped + RECORD

    def _pax_sparse(self, records: list[tuple[bytes, bytes]]) -> list[tuple[int, int]]:
        """Formats 0.0 (a record for each number) and 0.1 (one record with all)."""
        numbers = [value for key, value in records if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes")]
        for key, value in records:
            if key == b"GNU.sparse.map":
                numbers = value.split(b",")
        values = [self._decimal(value, "piece") for value in numbers]
        if len(values) % 2:
            self.refuse("is a sparse file with half a piece")
        return list(zip(values[::2], values[1::2], strict=True))

    def _sparse_map(self, start: int, stored: int) -> tuple[list[tuple[int, int]], int]:
        """Format 1.0: decimal lines before the data, filled up to a block."""
        blocks, lines, wanted = list[bytes](), 0, 1
        while lines < wanted:
            used = RECORD * len(blocks)
            if used >= min(stored, self.image.limits.extension):
                self.refuse("is a sparse file without a whole map")
            blocks.append(self.take(start + used, RECORD))
            lines += blocks[-1].count(b"\n")
            if len(blocks) == 1:
                wanted += 2 * self._decimal(blocks[0].partition(b"\n")[0], "piece")
        text = b"".join(blocks)
        values = [self._decimal(line, "piece") for line in text.split(b"\n")[1:wanted]]
        return list(zip(values[::2], values[1::2], strict=True)), len(text)


_KNOWN = {b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime"}


# --- From entries to a tree ---------------------------------------------------------------------------


def _add(reader: _Reader, header: _Header) -> None:
    """Put an entry into the tree, or refuse what has no one meaning."""
    if header.kind not in (FILE, LINK, SYMLINK, CHARACTER, BLOCK, FOLDER, FIFO, b"S"):
        reader.refuse(f"is of type {header.kind!r}, which no layer has")
    if header.kind not in (FILE, b"S") and header.size:
        reader.refuse("is no file but has data")
    path = _split(reader, header.name)
    if header.kind != FOLDER and header.name.endswith((b"/", b"/.")):
        reader.refuse("is named like a folder but is none")
    if problem := reader.image.spend(metadata=len(header.name) + len(header.link)):
        reader.refuse(problem)
    if not path:
        if header.kind != FOLDER:
            reader.refuse("is the root but no folder")
        reader.root.meta = _meta(reader, header)
        return
    parent = _parent(reader, path)
    if path[-1].startswith(WHITEOUT_PREFIX):
        _add_whiteout(reader, header, parent, path[-1])
    elif header.kind == FOLDER:
        _add_folder(reader, parent, path[-1], _meta(reader, header))
    else:
        leaf = _linked(reader, header) if header.kind == LINK else _leaf(reader, header)
        _put(reader, parent, path[-1], leaf)


def _split(reader: _Reader, name: bytes) -> list[bytes]:
    """Return the components of a name. A leading `/` is the layer's root, as for every other reader."""
    if not name or b"\0" in name:
        reader.refuse("has a name or hard link that is empty or holds a NUL")
    path = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in path:
        reader.refuse("has `..` in its name or hard link")
    if len(name) > PATH_MAX or len(path) > DEPTH_MAX or any(len(part) > NAME_MAX for part in path):
        reader.refuse("has a name or hard link longer or deeper than Linux allows")
    if any(part.startswith(WHITEOUT_PREFIX) for part in path[:-1]):
        reader.refuse("lies in a whiteout")
    return path


def _parent(reader: _Reader, path: list[bytes]) -> Folder:
    """Return the folder that an entry lies in, making those on the way that the tar did not list."""
    folder = reader.root
    for name in path[:-1]:
        child = folder.children.get(name)
        if child is None:
            if problem := reader.image.spend(entries=1, metadata=len(name)):
                reader.refuse(problem)
            child = folder.children[name] = Folder()
        if not isinstance(child, Folder):
            reader.refuse("goes through a link or file: name the place where it is to be")
        folder = child
    return folder


def _add_whiteout(reader: _Reader, header: _Header, parent: Folder, name: bytes) -> None:
    if header.kind != FILE or header.size:
        reader.refuse("is a whiteout but no empty file")
    hidden = name.removeprefix(WHITEOUT_PREFIX)
    if name == OPAQUE_MARK:
        parent.opaque = True
    elif hidden in (b"", b".", b"..") or hidden.startswith(WHITEOUT_PREFIX):
        reader.refuse("is no whiteout of anything: pack the layer with another tool")
    else:
        if problem := reader.image.spend(entries=1):
            reader.refuse(problem)
        parent.hidden.add(hidden)


def _add_folder(reader: _Reader, parent: Folder, name: bytes, meta: Meta) -> None:
    found = parent.children.get(name)
    if found is None:
        if problem := reader.image.spend(entries=1):
            reader.refuse(problem)
        found = parent.children[name] = Folder()
    if not isinstance(found, Folder):
        reader.refuse("is a folder here and something else before")
    found.meta = meta


def _put(reader: _Reader, parent: Folder, name: bytes, leaf: Leaf) -> None:
    """Give a leaf a name; of two with one name the later counts, as for tar."""
    if isinstance(parent.children.get(name), Folder):
        reader.refuse("is a folder before and something else here")
    if problem := reader.image.spend(entries=1):
        reader.refuse(problem)
    parent.children[name] = leaf


def _leaf(reader: _Reader, header: _Header) -> Leaf:
    meta = _meta(reader, header)
    if header.kind in (FILE, b"S"):
        return Leaf(FILE, meta, content=reader.content(header))
    if header.kind == SYMLINK:
        if not 0 < len(header.link) <= PATH_MAX or b"\0" in header.link:
            reader.refuse("is a link without a target, or with one that is too long")
        # Linux has no modes of links; tars have all kinds.
        return Leaf(SYMLINK, replace(meta, mode=0o777), target=header.link)
    if header.kind == FIFO:
        return Leaf(FIFO, meta)
    device = header.numbers["major"], header.numbers["minor"]
    if header.kind == CHARACTER and device == (0, 0):
        reader.refuse("is the device 0/0, which overlayfs takes for a deleted file")
    if device[0] > MAJOR_MAX or device[1] > MINOR_MAX:
        reader.refuse("is a device beyond Linux's numbers")
    return Leaf(header.kind, meta, device=device)


def _linked(reader: _Reader, header: _Header) -> Leaf:
    """Return what a hard link names: of this layer if it is there, or else of those below."""
    path = _split(reader, header.link)
    found = _look_up(reader, reader.root, path)
    if found is None and (found := _look_up(reader, reader.image.root, path)) is not None:
        if _covered(reader.root, tuple(path)):
            reader.refuse("is a hard link to a file that this layer removes")
        reader.borrowed.add(found)
    if found is None:
        name = header.link[:160].decode(errors="backslashreplace")
        reader.refuse(f"is a hard link to {name!r}, which is no file before it")
    return found


def _look_up(reader: _Reader, root: Folder | None, path: list[bytes]) -> Leaf | None:
    """Return the file at a path, which no symbolic link may be part of."""
    found: Leaf | Folder | None = root
    for part in path:
        if isinstance(found, Leaf):
            reader.refuse("is a hard link through a link or file")
        found = found.children.get(part) if found else None
    return found if isinstance(found, Leaf) else None


def _meta(reader: _Reader, header: _Header) -> Meta:
    xattrs: list[tuple[bytes, bytes]] = []
    for key, value in header.records:
        # A record without a value takes one back, so that an attribute without a value cannot be said.
        if not key.startswith(XATTR_PREFIX) or not value:
            continue
        name = key.removeprefix(XATTR_PREFIX)
        if name.startswith(OVERLAY_XATTRS):
            reader.refuse(
                f"has the attribute {name.decode(errors='backslashreplace')}, which is overlayfs's own"
            )
        if name in XATTR_NAMES or (name.startswith(XATTR_SPACES) and name not in XATTR_SPACES):
            if b"\0" in name or len(name) > NAME_MAX:
                reader.refuse("has an attribute whose name Linux does not allow")
            xattrs.append((name, value))
    cost = sum(len(name) + len(value) for name, value in xattrs)
    if cost > reader.image.limits.xattrs:
        reader.refuse(f"has more than {reader.image.limits.xattrs} bytes of attributes")
    if problem := reader.image.spend(metadata=cost):
        reader.refuse(problem)
    numbers = header.numbers
    mode = numbers["mode"] & 0o7777
    return Meta(mode, numbers["uid"], numbers["gid"], header.mtime, tuple(sorted(xattrs)))


# --- What lies below ----------------------------------------------------------------------------------


def walk(root: Folder) -> Iterator[tuple[tuple[bytes, ...], Leaf | Folder]]:
    """Yield every path of a tree with what is there: sorted, folders before what is in them."""
    waiting: list[tuple[tuple[bytes, ...], Leaf | Folder]] = [((), root)]
    while waiting:
        path, found = waiting.pop()
        yield path, found
        if isinstance(found, Folder):
            names = sorted(found.children, reverse=True)
            waiting += [((*path, name), found.children[name]) for name in names]


def _take_links(reader: _Reader, image: Image) -> None:
    """Take a lower file that this layer links to with all its names, or they would be two files."""
    if not reader.borrowed or image.root is None:
        return
    for leaf in reader.borrowed:
        size = leaf.content.size if leaf.content else 0
        if problem := image.spend(content=size):
            reader.refuse(problem)
    for path, found in walk(image.root):
        if isinstance(found, Leaf) and found in reader.borrowed and not _covered(reader.root, path):
            reader.entry = b"/".join(path)
            _put(reader, _parent(reader, list(path)), path[-1], found)


def _covered(root: Folder, path: tuple[bytes, ...]) -> bool:
    """Say whether a layer hides what is below at a path."""
    folder: Leaf | Folder = root
    for name in path:
        if not isinstance(folder, Folder) or folder.opaque or name in folder.hidden:
            return True
        if name not in folder.children:
            return False
        folder = folder.children[name]
    return True


def _settle(reader: _Reader, image: Image) -> None:
    """Give folders that the tar passed through their attributes, and keep the whiteouts that hide something.

    Overlayfs shows a whiteout as a device where no lower layer has the folder: there are none of those.
    """
    known = image.root is not None
    waiting: list[tuple[Folder, Leaf | Folder | None, tuple[bytes, ...]]] = [(reader.root, image.root, ())]
    while waiting:
        folder, below, path = waiting.pop()
        reader.entry = b"/".join(path) or b"/"
        if folder.meta is None:
            if isinstance(below, Leaf):
                reader.refuse(
                    "is a folder only in passing, but a link or file below: name where it is to be"
                )
            if not known and path:
                reader.refuse("is a folder that the tar does not list, and the layer below is not a tar")
            folder.meta = below.meta if below and below.meta else Meta()
        under = below if isinstance(below, Folder) and not folder.opaque else None
        folder.opaque = folder.opaque and (isinstance(below, Folder) or not known)
        for name in folder.hidden:
            child = folder.children.get(name)
            if isinstance(child, Folder):
                child.opaque = True
            elif child is None and (not known or (under and name in under.children)):
                folder.children[name] = WHITEOUT
        for name, child in folder.children.items():
            if isinstance(child, Folder):
                # A whiteout beside it makes it a new folder, whatever was there.
                if name in folder.hidden and child.meta is None:
                    child.meta = Meta()
                waiting.append((child, under.children.get(name) if under else None, (*path, name)))


def _merge(below: Folder, layer: Folder) -> None:
    """Lay a settled layer over what is below it."""
    waiting = [(below, layer)]
    while waiting:
        lower, upper = waiting.pop()
        lower.meta = upper.meta
        if upper.opaque:
            lower.children.clear()
        for name, child in upper.children.items():
            found = lower.children.get(name)
            if child is WHITEOUT:
                lower.children.pop(name, None)
            elif isinstance(child, Leaf):
                lower.children[name] = child
            else:
                if not isinstance(found, Folder):
                    found = lower.children[name] = Folder()
                waiting.append((found, child))


# --- Writing ------------------------------------------------------------------------------------------


def head(leaf: Leaf, size: int) -> bytes:
    """Return the first bytes of a file."""
    if leaf.content is None:
        return b""
    data = bytearray(min(size, leaf.content.size))
    with leaf.content.source.open("rb") as file:
        for start, length, place in leaf.content.pieces:
            if start < len(data):
                file.seek(place)
                piece = file.read(min(length, len(data) - start))
                data[start : start + len(piece)] = piece
    return bytes(data)


def count(root: Folder) -> int:
    """Return how many inodes a tree has."""
    found = [node for _, node in walk(root)]
    return len(set(found)) + max(0, found.count(WHITEOUT) - 1)


def size_of(root: Folder) -> int:
    """Return how many bytes of content a tree has, holes filled: what writing it takes longest over."""
    files = {found for _, found in walk(root) if isinstance(found, Leaf)}
    return sum(leaf.content.size for leaf in files if leaf.content)


def write_tree(root: Folder, out: IO[bytes], advance: Callable[[int], None] = lambda done: None) -> None:
    """Write a tree as a tar that depends on the tree alone."""
    names: dict[Leaf, bytes] = {}
    for path, found in walk(root):
        name = b"/".join(path) or b"."
        if isinstance(found, Folder):
            assert found.meta is not None  # the tree is settled
            xattrs = (*found.meta.xattrs, OPAQUE_XATTR) if found.opaque else found.meta.xattrs
            out.write(_encode(name + b"/", FOLDER, found.meta, xattrs=xattrs))
        elif found in names:
            out.write(_encode(name, LINK, found.meta, target=names[found], xattrs=()))
        else:
            if found is not WHITEOUT:
                names[found] = name
            content = found.content
            size = content.size if content else 0
            out.write(_encode(name, found.kind, found.meta, found.target, found.device, size))
            if content:
                _copy(content, out, advance)
                out.write(bytes(-size % RECORD))
    out.write(bytes(2 * RECORD))
    out.flush()


def _copy(content: Content, out: IO[bytes], advance: Callable[[int], None]) -> None:
    with content.source.open("rb") as source:
        done = 0
        for position, length, at in (*content.pieces, (content.size, 0, 0)):
            _fill(position - done, out, advance)
            source.seek(at)
            done = position + length
            while length:
                chunk = source.read(min(CHUNK, length))
                if not chunk:
                    raise Failure(f"{content.source} became shorter while it was read")
                out.write(chunk)
                advance(len(chunk))
                length -= len(chunk)


def _fill(size: int, out: IO[bytes], advance: Callable[[int], None]) -> None:
    zeros = bytes(min(size, CHUNK))
    while size > 0:
        out.write(zeros[:size])
        advance(min(size, CHUNK))
        size -= CHUNK


def _encode(
    name: bytes,
    kind: bytes,
    meta: Meta,
    target: bytes = b"",
    device: tuple[int, int] = (0, 0),
    size: int = 0,
    xattrs: tuple[tuple[bytes, bytes], ...] | None = None,
) -> bytes:
    """Write one header; what does not fit its fields goes into pax records before it."""
    seconds, nanoseconds = divmod(meta.mtime, 10**9)
    records = [
        (b"path", name, len(name) > 100),
        (b"linkpath", target, len(target) > 100),
        (b"size", b"%d" % size, size >= 8**11),
        (b"uid", b"%d" % meta.uid, meta.uid >= 8**7),
        (b"gid", b"%d" % meta.gid, meta.gid >= 8**7),
        (
            b"mtime",
            b"%d.%09d" % (seconds, nanoseconds) if nanoseconds else b"%d" % seconds,
            nanoseconds > 0 or not 0 <= seconds < 8**11,
        ),
        *((XATTR_PREFIX + key, value, True) for key, value in (meta.xattrs if xattrs is None else xattrs)),
    ]
    pax = b"".join(_record(key, value) for key, value, wanted in records if wanted)
    numbers = [meta.mode, meta.uid % 8**7, meta.gid % 8**7]
    header = _header(name[:100], kind, numbers, size % 8**11, max(0, seconds) % 8**11, target[:100], device)
    if not pax:
        return header
    extended = _header(b"pax", b"x", [0, 0, 0], len(pax), 0, b"", (0, 0))
    return extended + pax + bytes(-len(pax) % RECORD) + header


def _record(key: bytes, value: bytes) -> bytes:
    """Write a pax record, whose length counts its own digits."""
    rest = len(key) + len(value) + 3
    size = rest + len(str(rest))
    size = rest + len(str(size))
    return b"%d %s=%s\n" % (size, key, value)


_USTAR = struct.Struct("100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x")
assert _USTAR.size == RECORD


def _header(
    name: bytes,
    kind: bytes,
    numbers: list[int],
    size: int,
    seconds: int,
    target: bytes,
    device: tuple[int, int],
) -> bytes:
    words = [b"%07o\0" % number for number in (*numbers, *device)]
    block = _USTAR.pack(
        name, *words[:3], b"%011o\0" % size, b"%011o\0" % seconds, b" " * 8, kind, target, b"ustar\00000",
        b"", b"", *words[3:], b"",
    )  # fmt: skip
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]
