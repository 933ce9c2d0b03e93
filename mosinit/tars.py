"""Tars: layers as other tools pack them, read strictly into trees.

A layer's tar comes from strangers, and what makes file systems of it is C code. So it is read here, where a
damaged or ambiguous archive is an error; it becomes a tree, in which a name means one thing; and the next
program sees nothing but that tree, written in one way. Nothing is extracted and no link is ever followed.

What a layer says depends on what lies below it: folders that it passes through but does not list keep their
attributes, and a hard link to a file of a lower layer takes that file, with all its names, into this layer.

Names may hold any byte but NUL and `/`: whatever stacks or mounts layers compares names and parses none.
Symbolic links may point anywhere: they are resolved where the tree is a root, never here.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NoReturn

from mosinit.host import Failure
from mosinit.trees import (
    BLOCK,
    CHARACTER,
    CHUNK,
    FIFO,
    FILE,
    FOLDER,
    LINK,
    RECORD,
    SYMLINK,
    WHITEOUT,
    XATTR_PREFIX,
    Content,
    Folder,
    Image,
    Leaf,
    Meta,
)

NAME_MAX, PATH_MAX, DEPTH_MAX = 255, 4095, 512  # linux/limits.h; the depth is ours
ID_MAX = (1 << 32) - 2  # -1 means "no change" to chown
MAJOR_MAX, MINOR_MAX = (1 << 12) - 1, (1 << 20) - 1  # linux/kdev_t.h
SECONDS_MAX = 1 << 40
# Bytes of memory, measured with Python 3.13: an attribute besides its text, a piece, a name of several.
XATTR_COST, PIECE_COST, NAME_COST = 200, 192, 192

WHITEOUT_PREFIX, OPAQUE_MARK = b".wh.", b".wh..wh..opq"  # OCI image specification 1.1, layer.md

# GNU tar manual, "Storing Sparse Files": each format has these records, and no reader needs fewer.
SPARSE_PREFIX = b"GNU.sparse."
_NAME, _SIZE, _COUNT, _MAP = (SPARSE_PREFIX + key for key in (b"name", b"size", b"numblocks", b"map"))
_OFFSET, _BYTES = SPARSE_PREFIX + b"offset", SPARSE_PREFIX + b"numbytes"
_MAJOR, _MINOR, _REAL_SIZE = (SPARSE_PREFIX + key for key in (b"major", b"minor", b"realsize"))
SPARSE_0_0 = {_SIZE, _COUNT, _OFFSET, _BYTES}
SPARSE_0_1 = {_NAME, _SIZE, _COUNT, _MAP}
SPARSE_1_0 = {_NAME, _MAJOR, _MINOR, _REAL_SIZE}
GNU_MAGIC = b"ustar  \0"

# erofs and the kernel know these. Others, such as those of macOS, have no place on Linux and are left out.
XATTR_SPACES = (b"user.", b"trusted.", b"security.")
XATTR_NAMES = (b"system.posix_acl_access", b"system.posix_acl_default")
# Whoever could write these would tell overlayfs where to look for names and data.
OVERLAY_XATTRS = (b"trusted.overlay.", b"user.overlay.")


def read_layer(tar: Path, label: str, image: Image) -> Folder:
    """Read a layer's bare tar as the next layer of an image and return its tree.

    Raises `Failure` with `label` and the entry for whatever is damaged, ambiguous or beyond the limits.
    """
    with tar.open("rb") as file:
        reader = _Reader(file, tar, label, image)
        # All of it, whatever it says of itself: zeros are unpacked and read too.
        if problem := image.spend(content=reader.end):
            raise Failure(f"{label} {problem}")
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
        self.borrowed: dict[Leaf, None] = {}
        self.pax = False

    def spend(self, *, entries: int = 0, headers: int = 0, content: int = 0, metadata: int = 0) -> None:
        problem = self.image.spend(entries=entries, headers=headers, content=content, metadata=metadata)
        if problem:
            self.refuse(problem)

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
            self.spend(headers=1)
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
            self.spend(headers=-(-header.size // RECORD))
            position += -(-header.size // RECORD) * RECORD
            self.pax |= header.kind in b"xg"
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
        if self.end - position > self.image.limits.padding:
            self.refuse(f"is the last, but more than {self.image.limits.padding} bytes of zeros follow")
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
        elif block[257:265] not in (GNU_MAGIC, bytes(8)):
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
        keys = [key for key, _ in records if key not in (_OFFSET, _BYTES)]
        if len(keys) != len(set(keys)):
            self.refuse("is followed by an extended header that says one thing twice")
        return records

    def _check_global(self, data: bytes) -> None:
        """Global headers may comment (git does), but set nothing: some readers heed them and some do not."""
        for key, _ in self._records(data):
            if key in _KNOWN or key.startswith((XATTR_PREFIX, SPARSE_PREFIX)):
                self.refuse(f"is followed by a global header that sets {key.decode(errors='replace')}")

    def _apply(self, header: _Header, extended: dict[bytes, bytes]) -> None:
        """Put what extended headers say into the entry."""
        found = {key: value for key, value in header.records if value}
        # GNU tar stores a sparse file under a name of its own making, and its own in a record.
        if _NAME in found:
            found[b"path"] = found[_NAME]
        for kind, key, name in ((b"L", b"path", "name"), (b"K", b"linkpath", "link")):
            if kind in extended and key in found:
                self.refuse(f"or its successor has two values for its {name}")
            if kind in extended:
                found[key] = extended[kind].partition(b"\0")[0]
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
        sparse = [(key, value) for key, value in header.records if key.startswith(SPARSE_PREFIX)]
        found = dict(sparse)
        if header.kind == b"S":
            size, pairs, skipped = self._old_sparse(header)
        elif not all(found.values()):
            self.refuse("is a sparse file of no known format")
        elif found.keys() == SPARSE_1_0 and (found[_MAJOR], found[_MINOR]) == (b"1", b"0"):
            size, (pairs, skipped) = (
                self._decimal(found[_REAL_SIZE], "size"),
                self._sparse_map(start, stored),
            )
        elif found.keys() in (SPARSE_0_0, SPARSE_0_1):
            size, pairs, skipped = self._decimal(found[_SIZE], "size"), self._pax_sparse(sparse), 0
        elif sparse:
            self.refuse("is a sparse file of no known format")
        else:
            size, pairs, skipped = stored, [(0, stored)], 0
        start += skipped
        if header.kind == b"S":
            header.data, skipped = start, 0
        return self._pieces(size, pairs, start, stored - skipped)

    def _pieces(self, size: int, pairs: list[tuple[int, int]], start: int, stored: int) -> Content:
        """Check that the pieces of a file ascend, lie in it, and use up what is stored."""
        # What is stored was counted with the tar.
        self.spend(content=max(0, size - stored), metadata=PIECE_COST * max(0, len(pairs) - 1))
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

    def _old_sparse(self, header: _Header) -> tuple[int, list[tuple[int, int]], int]:
        """GNU's first format: four pieces in the header, 21 in each block that follows."""
        if header.block[257:265] != GNU_MAGIC:
            self.refuse("is a sparse file in a header of another format")
        if any(key == b"size" for key, _ in header.records):
            self.refuse("is sparse in two ways")
        block, at, count, more = header.block, 386, 4, header.block[482]
        size, pairs, skipped, ended = self._number(block[483:495], "size"), list[tuple[int, int]](), 0, False
        while True:
            for index in range(count):
                raw = block[at + 24 * index : at + 24 * index + 24]
                # Some readers stop at the first that is empty, some at the first that has no length.
                if bool(raw[0]) != bool(raw[12]) or (ended and raw[0]):
                    self.refuse("is a sparse file with a piece behind the last")
                if ended := not raw[0]:
                    continue
                if len(pairs) > self.image.limits.extension // 8:
                    self.refuse("is a sparse file of too many pieces")
                pairs.append((self._number(raw[:12], "piece"), self._number(raw[12:], "piece")))
            if not more:
                return size, pairs, skipped
            self.spend(headers=1)
            block, at, count = self.take(header.data + skipped, RECORD), 0, 21
            more, skipped = block[504], skipped + RECORD

    def _pax_sparse(self, records: list[tuple[bytes, bytes]]) -> list[tuple[int, int]]:
        """Formats 0.0 (a record for each number) and 0.1 (one record with all)."""
        found = dict(records)
        if _MAP in found:
            numbers = found[_MAP].split(b",")
        else:
            pieces = [(key, value) for key, value in records if key in (_OFFSET, _BYTES)]
            if [key for key, _ in pieces] != [_OFFSET, _BYTES] * (len(pieces) // 2):
                self.refuse("is a sparse file whose pieces are out of order")
            numbers = [value for _, value in pieces]
        if len(numbers) != 2 * self._decimal(found[_COUNT], "count"):
            self.refuse("is a sparse file with other than its count of pieces")
        values = [self._decimal(value, "piece") for value in numbers]
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
    # Measured: where no pax says otherwise, no reader takes what follows a folder or hard link for its data.
    told = any(key == b"size" for key, _ in header.records)
    if (header.kind == FOLDER and not told) or (header.kind == LINK and not reader.pax):
        header.size = 0
    if header.kind not in (FILE, b"S") and header.size:
        reader.refuse(
            "is no file but has a size: readers disagree on what is its data and what the next entry"
        )
    sparse = any(key.startswith(SPARSE_PREFIX) for key, _ in header.records)
    if sparse and header.kind != FILE:
        reader.refuse("is sparse but no file" if header.kind != b"S" else "is sparse in two ways")
    path = _split(reader, header.name)
    if header.kind != FOLDER and header.name.endswith((b"/", b"/.")):
        reader.refuse("is named like a folder but is none")
    reader.spend(metadata=len(header.name) + len(header.link))
    if not path:
        if header.kind != FOLDER:
            reader.refuse("is the root but no folder")
        reader.root.meta = _meta(reader, header)
        return
    whiteout = path[-1].startswith(WHITEOUT_PREFIX)
    parent = _parent(reader, path, made=not whiteout)
    if whiteout:
        _add_whiteout(reader, header, parent, path[-1])
    elif header.kind == FOLDER:
        _add_folder(reader, parent, path[-1], _meta(reader, header))
    else:
        leaf = _linked(reader, header, path) if header.kind == LINK else _leaf(reader, header)
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


def _parent(reader: _Reader, path: list[bytes], *, made: bool = True) -> Folder:
    """Return the folder that an entry lies in, making those on the way that the tar did not list."""
    folder, below = reader.root, reader.image.root
    for name in path[:-1]:
        child = folder.children.get(name)
        seen = below.children.get(name) if below and not (folder.opaque or name in folder.hidden) else None
        below = seen if isinstance(seen, Folder) else None
        if child is None:
            # Now, as the tar has it so far: who unpacks in order follows the link, whatever comes later.
            if isinstance(seen, Leaf):
                reader.refuse(
                    "goes through a link or file of a lower layer: name the place where it is to be"
                )
            reader.spend(entries=1, metadata=len(name))
            child = folder.children[name] = Folder()
        if not isinstance(child, Folder):
            reader.refuse("goes through a link or file: name the place where it is to be")
        folder = child
        folder.made |= made
    return folder


def _add_whiteout(reader: _Reader, header: _Header, parent: Folder, name: bytes) -> None:
    sparse = any(key.startswith(SPARSE_PREFIX) for key, _ in header.records)
    if header.kind != FILE or header.size or sparse:
        reader.refuse("is a whiteout but no empty file")
    hidden = name.removeprefix(WHITEOUT_PREFIX)
    if name == OPAQUE_MARK:
        parent.opaque = True
    elif hidden in (b"", b".", b"..") or hidden.startswith(WHITEOUT_PREFIX):
        reader.refuse("is no whiteout of anything: pack the layer with another tool")
    else:
        reader.spend(entries=1)
        parent.hidden.add(hidden)


def _add_folder(reader: _Reader, parent: Folder, name: bytes, meta: Meta) -> None:
    found = parent.children.get(name)
    if found is None:
        reader.spend(entries=1)
        found = parent.children[name] = Folder()
    if not isinstance(found, Folder):
        reader.refuse("is a folder here and something else before")
    found.meta, found.made = meta, True


def _put(reader: _Reader, parent: Folder, name: bytes, leaf: Leaf) -> None:
    """Give a leaf a name; of two with one name the later counts, as for tar."""
    if isinstance(parent.children.get(name), Folder):
        reader.refuse("is a folder before and something else here")
    reader.spend(entries=1)
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


def _linked(reader: _Reader, header: _Header, name: list[bytes]) -> Leaf:
    """Return what a hard link names: of this layer if it is there, or else of those below."""
    path = _split(reader, header.link)
    # Others remove what has the name before they make the link.
    if path[: len(name)] == name:
        reader.refuse("is a hard link to itself or to what it replaces")
    found = _look_up(reader, reader.root, path)
    if found is None and (found := _look_up(reader, reader.image.root, path)) is not None:
        if _covered(reader.root, path):
            reader.refuse("is a hard link to a file that this layer removes")
        reader.borrowed[found] = None
    if found is None:
        target = header.link[:160].decode(errors="backslashreplace")
        reader.refuse(f"is a hard link to {target!r}, which is no file before it")
    names = reader.image.names.setdefault(found, set())
    for new in {b"/".join(path), b"/".join(name)} - names:
        reader.spend(metadata=len(new) + NAME_COST)
        names.add(new)
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
            _check_xattr(reader, header.kind, name, value)
            xattrs.append((name, value))
    size = sum(len(name) + len(value) for name, value in xattrs)
    if size > reader.image.limits.xattrs:
        reader.refuse(f"has more than {reader.image.limits.xattrs} bytes of attributes")
    reader.spend(metadata=size + XATTR_COST * len(xattrs))
    numbers = header.numbers
    mode = numbers["mode"] & 0o7777
    return Meta(mode, numbers["uid"], numbers["gid"], header.mtime, tuple(sorted(xattrs)))


# linux/capability.h, struct vfs_ns_cap_data: flags and revision 2, two sets; revision 3 has a user too.
_CAPABILITY = re.compile(rb"[\x00\x01]\x00\x00(?:\x02.{16}|\x03.{16}(?!\xff{4}).{4})", re.DOTALL)
# linux/posix_acl.h, tags: owner, users, group, groups, mask, the rest. Users and groups want a mask.
_ACL = re.compile(rb"\x01(?:\x04\x10?|\x02*\x04\x08*\x10)\x20")
_ACL_VERSION, _ACL_ENTRY = b"\2\0\0\0", struct.Struct("<HHI")  # linux/posix_acl_xattr.h: tag, mode, id


def _check_xattr(reader: _Reader, kind: bytes, name: bytes, value: bytes) -> None:
    """Refuse an attribute that Linux would let nobody set: erofs would show it, and what then depends."""
    if b"\0" in name or len(name) > NAME_MAX:
        taken = False
    elif name.startswith(b"user."):
        taken = kind in (FILE, b"S", FOLDER)
    elif name == b"security.capability":
        taken = bool(_CAPABILITY.fullmatch(value))
    elif name in XATTR_NAMES:
        taken = kind == FOLDER or (kind != SYMLINK and name == XATTR_NAMES[0])
        taken = taken and _is_acl(value)
    else:
        taken = True
    if not taken:
        shown = name[:80].decode(errors="backslashreplace")
        reader.refuse(f"has the attribute {shown}, which Linux does not take of such a file or value")


def _is_acl(value: bytes) -> bool:
    if value[:4] != _ACL_VERSION or len(value) % _ACL_ENTRY.size != 4:
        return False
    entries = list(_ACL_ENTRY.iter_unpack(value[4:]))
    tags = bytes(min(tag, 255) for tag, _, _ in entries)
    named = [owner for tag, _, owner in entries if tag in (2, 8)]
    return (
        bool(_ACL.fullmatch(tags))
        and all(mode <= 7 for _, mode, _ in entries)
        and max(named, default=0) <= ID_MAX
    )


# --- What lies below ----------------------------------------------------------------------------------


def _take_links(reader: _Reader, image: Image) -> None:
    """Take a lower file that this layer links to with all its names, or they would be two files."""
    if not reader.borrowed or image.root is None:
        return
    for leaf in reader.borrowed:
        size = leaf.content.size if leaf.content else 0
        reader.spend(content=size)
        names = image.names[leaf]
        names -= {
            name for name in names if not _is(image.root, name, leaf) and not _is(reader.root, name, leaf)
        }
        for name in sorted(names):
            path = name.split(b"/")
            if _is(image.root, name, leaf) and not _covered(reader.root, path):
                reader.entry = name
                _put(reader, _parent(reader, path), path[-1], leaf)


def _is(root: Folder, name: bytes, leaf: Leaf) -> bool:
    """Say whether a file has this name."""
    found: Leaf | Folder | None = root
    for part in name.split(b"/"):
        found = found.children.get(part) if isinstance(found, Folder) else None
    return found is leaf


def _covered(root: Folder, path: list[bytes]) -> bool:
    """Say whether a layer hides what is below at a path."""
    folder: Leaf | Folder = root
    for name in path:
        if not isinstance(folder, Folder) or folder.opaque or name in folder.hidden:
            return True
        if name not in folder.children:
            return False
        folder = folder.children[name]
    return True


# A path linked backwards: a tuple for each of many deep folders would be most of the memory.
_Trail = tuple["_Trail", bytes] | None


def _settle(reader: _Reader, image: Image) -> None:
    """Give folders that the tar passed through their attributes, and keep the whiteouts that hide something.

    Overlayfs shows a whiteout as a device where no lower layer has the folder: there are none of those.
    """
    known = image.root is not None
    _open_root(reader, image)
    waiting: list[tuple[Folder, Leaf | Folder | None, bool, _Trail]] = [
        (reader.root, image.root, True, None)
    ]
    while waiting:
        folder, below, visible, trail = waiting.pop()
        if folder.meta is None:
            folder.meta = _passed(reader, below, trail, known=known)
        lower = below.children if isinstance(below, Folder) else {}
        folder.opaque = folder.opaque and visible and (isinstance(below, Folder) or not known)
        visible = visible and not folder.opaque
        for name, child in list(folder.children.items()):
            hidden, beneath = name in folder.hidden, lower.get(name)
            if not isinstance(child, Folder):
                continue
            if not (child.made or (visible and not hidden and (beneath or not known))):
                del folder.children[name]
                continue
            # A whiteout beside it makes it a new folder, whatever was there.
            child.opaque |= hidden
            waiting.append((child, beneath, visible, (trail, name)))
        for name in folder.hidden - folder.children.keys():
            if visible and (name in lower or not known):
                folder.children[name] = WHITEOUT


def _open_root(reader: _Reader, image: Image) -> None:
    """Say one by one what an opaque root hides: overlayfs does not heed the mark of a layer's root."""
    if not reader.root.opaque:
        return
    if image.root is None:
        reader.entry = b"/"
        reader.refuse("hides all that is below, and a layer below is not a tar: name what is to go")
    reader.root.opaque = False
    reader.root.hidden |= image.root.children.keys()


def _passed(reader: _Reader, below: Leaf | Folder | None, trail: _Trail, *, known: bool) -> Meta:
    """Return the attributes of a folder that the tar does not list: those it has below, hidden or not.

    A private folder must not become open because its path was the shortest way to say something else.
    """
    reader.entry = _name(trail)
    if not known and trail:
        reader.refuse("is a folder that the tar does not list, and the layer below is not a tar")
    return below.meta if isinstance(below, Folder) and below.meta else Meta()


def _name(trail: _Trail) -> bytes:
    parts = []
    while trail:
        trail, part = trail
        parts.append(part)
    return b"/".join(reversed(parts)) or b"/"


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
