"""Trees written as one plain tar, which depends on the tree alone.

It is sorted, names every folder, has every number in range, and whiteouts as overlayfs has them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import IO

from mosinit.host import Failure
from mosinit.trees import (
    CHUNK,
    FOLDER,
    LINK,
    OPAQUE_XATTR,
    RECORD,
    WHITEOUT,
    XATTR_PREFIX,
    Content,
    Folder,
    Leaf,
    Meta,
    walk,
)


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
            if content and size:
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
