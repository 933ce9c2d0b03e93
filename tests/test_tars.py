"""Layers' tars: what is refused, what becomes of the rest, and bytes that nobody thought of."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosinit import plaintar, tars, trees
from mosinit.host import Failure

SETTINGS = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100
)


def entry(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **fields: object) -> bytes:
    """Return the bytes of one entry, as Python's own module writes it."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)


def folder(name: str, **fields: object) -> bytes:
    return entry(name, tarfile.DIRTYPE, b"", **fields)


def symlink(name: str, target: str) -> bytes:
    return entry(name, tarfile.SYMTYPE, linkname=target)


def link(name: str, target: str) -> bytes:
    return entry(name, tarfile.LNKTYPE, linkname=target)


def xattr(name: str, key: str, value: str | bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    text = value if isinstance(value, str) else os.fsdecode(value)
    records = {f"SCHILY.xattr.{key}": text}
    return entry(name, kind, pax_headers=records, linkname="target", devmajor=1, devminor=3)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """Return a POSIX ACL as Linux keeps it, of tags, modes and ids; linux/posix_acl_xattr.h."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *item) for item in entries)


NOBODY = 0xFFFFFFFF
OWNER, GROUP, MASK, REST = (1, 6, NOBODY), (4, 4, NOBODY), (16, 4, NOBODY), (32, 4, NOBODY)
USER_5, GROUP_6 = (2, 4, 5), (8, 4, 6)
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_raw=ep, as setcap writes it


def device(name: str, major: int, minor: int) -> bytes:
    return entry(name, tarfile.CHRTYPE, devmajor=major, devminor=minor)


def patched(raw: bytes, at: int, value: bytes) -> bytes:
    """Change bytes of a header and correct its checksum."""
    raw = raw[:at] + value + raw[at + len(value) :]
    total = sum(raw[:148]) + 8 * 32 + sum(raw[156:512])
    return raw[:148] + b"%06o\0 " % total + raw[156:]


def sized(raw: bytes, size: int = 512) -> bytes:
    """Give an entry a size, but nothing more that lies behind it."""
    return patched(raw, 124, b"%011o\0" % size)


def extended(kind: bytes, data: bytes, size: int | None = None) -> bytes:
    head = patched(entry("x"), 156, kind)
    head = patched(head, 124, b"%011o\0" % (len(data) if size is None else size))
    return head + data + bytes(-len(data) % 512)


def record(key: str, value: str) -> bytes:
    """Return a pax record of at least ten and less than a hundred bytes."""
    rest = f" {key}={value}\n".encode()
    return b"%d" % (len(rest) + 2) + rest


def sparse(*more: tuple[str, str], **fields: str) -> bytes:
    """Return an extended header of GNU's, to lie before a file; `more` is for what comes twice."""
    found = [*fields.items(), *more]
    return extended(b"x", b"".join(record(f"GNU.sparse.{key}", value) for key, value in found))


END = bytes(1024)
OPAQUE = "SCHILY.xattr.trusted.overlay.opaque"

Read = Callable[..., trees.Folder]


@pytest.fixture
def image() -> trees.Image:
    return trees.Image()


@pytest.fixture
def read(tmp_path: Path, image: trees.Image) -> Read:
    """Return a function that reads entries as the next layer of the image."""

    def layer(*entries: bytes, end: bytes = END) -> trees.Folder:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.tar"
        path.write_bytes(b"".join(entries) + end)
        return tars.read_layer(path, "image, layer 1", image)

    return layer


def written(tree: trees.Folder) -> bytes:
    buffer = io.BytesIO()
    plaintar.write_tree(tree, buffer)
    return buffer.getvalue()


def listed(tree: trees.Folder) -> dict[str, tarfile.TarInfo]:
    """Return what Python's own module reads in what we write."""
    with tarfile.open(fileobj=io.BytesIO(written(tree))) as archive:
        return {item.name: item for item in archive.getmembers()}


# --- Refused ------------------------------------------------------------------------------------------

WHOLE = entry("file", content=b"content")
LARGE = "f" * 200
POINT_ONE = {"name": "a", "size": "9", "numblocks": "1", "map": "0,7"}
# Two pieces of a byte: bytes 386 to 482 have four, 482 says whether more follow, 483 has the size.
OLD_SPARSE = patched(
    patched(patched(entry("a", content=b"xy"), 156, b"S"), 257, b"ustar  \0"),
    386,
    b"".join(b"%011o\0" % number for number in (1, 1, 4, 1)) + bytes(49) + b"%011o\0" % 5,
)

REFUSED = {
    "dots": ([entry("a/../../etc/passwd")], r"`\.\.`"),
    "dots at the end": ([folder("a/..")], r"`\.\."),
    "no name": ([patched(WHOLE, 0, bytes(100))], "empty"),
    "NUL in a pax name": ([extended(b"x", record("path", "abc\0def")), WHOLE], "NUL"),
    "long component": ([entry("n" * 256)], "longer or deeper"),
    "long name": ([entry("/".join(["n" * 100] * 41))], "longer or deeper"),
    "deep name": ([entry("a/" * 512 + "a")], "longer or deeper"),
    "file as folder": ([entry("a/")], "named like a folder"),
    "root as file": ([entry("./.", tarfile.FIFOTYPE)], "named like a folder"),
    "through a link": ([symlink("a", "/etc"), entry("a/passwd")], "goes through a link"),
    "through a file": ([entry("a"), entry("a/b")], "goes through a link or file"),
    "through a link, folder": ([symlink("a", "b"), folder("a/c")], "goes through a link"),
    "hard link out": ([link("a", "../../etc/shadow")], r"`\.\.`"),
    "hard link to nothing": ([link("a", "etc/shadow")], "no file before it"),
    "hard link ahead": ([link("a", "b"), entry("b")], "no file before it"),
    "hard link through a link": ([symlink("a", "/etc"), link("b", "a/shadow")], "through a link"),
    "hard link to a folder": ([folder("a"), link("b", "a")], "no file before it"),
    "hard link to itself": ([link("a", "a")], "to itself"),
    "hard link to itself, of a file": ([entry("a"), link("a", "./a")], "to itself"),
    "hard link without target": ([link("a", "")], "hard link that is empty"),
    "hard link with data, pax": (
        [extended(b"x", record("comment", "pax")), entry("a"), sized(link("b", "a"))],
        "readers disagree",
    ),
    "hard link with data, by record": (
        [entry("a"), extended(b"x", record("size", "00000000512")), link("b", "a")],
        "readers disagree",
    ),
    "hard link with data, global": (
        [extended(b"g", record("comment", "pax")), entry("a"), sized(link("b", "a"))],
        "readers disagree",
    ),
    "folder with data, by record": (
        [extended(b"x", record("size", "00000000512")), folder("d"), entry("e")],
        "readers disagree",
    ),
    "symlink with data": ([sized(symlink("b", "a"))], "readers disagree"),
    "pipe with data": ([sized(entry("b", tarfile.FIFOTYPE))], "readers disagree"),
    "device with data": ([sized(device("b", 1, 3))], "readers disagree"),
    "symlink without target": ([symlink("a", "")], "without a target"),
    "long symlink": ([symlink("a", "t" * 4096)], "too long"),
    "folder, then file": ([folder("a"), entry("a")], "a folder before"),
    "file, then folder": ([entry("a"), folder("a")], "something else before"),
    "passed through, then file": ([entry("a/b"), entry("a")], "a folder before"),
    "overlay attribute": ([xattr("a", "trusted.overlay.redirect", "/etc")], "overlayfs's own"),
    "overlay attribute of users": ([xattr("a", "user.overlay.whiteout", "y")], "overlayfs's own"),
    "overlay attribute, escaped": ([xattr("a", "trusted.overlay.overlay.opaque", "y")], "overlayfs's own"),
    "many attributes": ([xattr("a", "user.a", "v" * 65536)], "65536 bytes of attributes"),
    "whiteout device": ([device("a", 0, 0)], "device 0/0"),
    "large device": ([device("a", 4096, 0)], "beyond Linux's numbers"),
    "whiteout of nothing": ([entry(".wh.")], "no whiteout of anything"),
    "whiteout of dot": ([entry("a/.wh..")], "no whiteout of anything"),
    "whiteout of dots": ([entry(".wh...")], "no whiteout of anything"),
    "bookkeeping of aufs": ([entry(".wh..wh.aufs")], "no whiteout of anything"),
    "whiteout with content": ([entry(".wh.a", content=b"a")], "no empty file"),
    "whiteout as folder": ([folder(".wh.a")], "no empty file"),
    "whiteout as link": ([entry("b"), link(".wh.a", "b")], "no empty file"),
    "in a whiteout": ([entry(".wh.a/b")], "lies in a whiteout"),
    "unknown type": ([patched(WHOLE, 156, b"M")], "which no layer has"),
    "damaged header": ([WHOLE, b"x" + entry("file2")[1:]], "damaged header"),
    "another format": ([patched(WHOLE, 257, b"ustra\0")], "unknown tar format"),
    "negative size": ([patched(WHOLE, 124, b"\xff" * 12)], "size that is no number"),
    "bad number": ([patched(WHOLE, 108, b"0000009\0")], "uid that is no number"),
    "huge owner": ([extended(b"x", record("uid", "4294967295")), WHOLE], "beyond 32 bits"),
    "negative owner": ([extended(b"x", record("uid", "-1000000")), WHOLE], "uid that is no number"),
    "size beyond the tar": ([patched(WHOLE, 124, b"00000100000\0")], "cut short"),
    "huge size": ([patched(WHOLE, 124, b"\x80" + b"\xff" * 11)], "cut short"),
    "bad date": ([extended(b"x", record("mtime", "12e999")), WHOLE], "date that is no number"),
    "far date": ([extended(b"x", record("mtime", "9" * 19)), WHOLE], "no clock"),
    "huge extended header": ([extended(b"x", b"", 1 << 30), WHOLE], "1073741824 bytes"),
    "damaged record": ([extended(b"x", b"99 path=a\n"), WHOLE], "damaged extended header"),
    "record of no length": ([extended(b"x", b"0 path=a\n"), WHOLE], "damaged extended header"),
    "record without equals": ([extended(b"x", b"11 path ab\n"), WHOLE], "damaged extended header"),
    "record without end": ([extended(b"x", b"11 path=abc"), WHOLE], "damaged extended header"),
    "one thing twice": ([extended(b"x", 2 * record("path", "abcdef")), WHOLE], "one thing twice"),
    "two extended headers": ([2 * extended(b"x", record("path", "abcdef")), WHOLE], "of one kind"),
    "two long names": ([2 * extended(b"L", b"abc\0"), WHOLE], "of one kind"),
    "two ways of naming": (
        [extended(b"L", b"abc\0"), extended(b"x", record("path", "abcdef")), WHOLE],
        "two values for its name",
    ),
    "global name": ([extended(b"g", record("path", "abcdef")), WHOLE], "global header that sets path"),
    "extended header of nothing": ([WHOLE, extended(b"x", record("path", "abcdef"))], "without an entry"),
    "sparse out of itself": (
        [sparse(map="0,9", size="5", numblocks="1", name="a"), WHOLE],
        "overlap or leave",
    ),
    "sparse of other bytes": (
        [sparse(map="0,5", size="50", numblocks="1", name="a"), WHOLE],
        "not what is stored",
    ),
    "half a piece": (
        [sparse(map="0,7,9", size="50", numblocks="1", name="a"), WHOLE],
        "other than its count",
    ),
    "sparse bomb": (
        [sparse(map="0,7", size="9" * 18, numblocks="1", name="a"), WHOLE],
        "unpack to more than",
    ),
    "sparse.name of a link": ([sparse(name="b"), symlink("a", "t")], "sparse but no file"),
    "sparse.name of a folder": ([sparse(name="b"), folder("a")], "sparse but no file"),
    "sparse.name of a hard link": ([entry("f"), sparse(name="b"), link("a", "f")], "sparse but no file"),
    "sparse.name of a pipe": ([sparse(name="b"), entry("a", tarfile.FIFOTYPE)], "sparse but no file"),
    "sparse whiteout": (
        [sparse(map="0,0", size="0", numblocks="1", name=".wh.a"), entry("a")],
        "no empty file",
    ),
    "sparse in two ways": (
        [sparse(**POINT_ONE), patched(OLD_SPARSE, 124, b"00000000007\0")],
        "sparse in two ways",
    ),
    "sparse.name alone": ([sparse(name="b"), WHOLE], "no known format"),
    "realsize alone": ([sparse(realsize="7"), WHOLE], "no known format"),
    "realsize of nothing": ([sparse(realsize="30"), entry("a")], "no known format"),
    "two sizes": ([sparse(**POINT_ONE, realsize="20"), WHOLE], "no known format"),
    "two maps": ([sparse(**POINT_ONE, offset="2", numbytes="7"), WHOLE], "no known format"),
    "format 0.1 without its name": ([sparse(map="0,7", size="9", numblocks="1"), WHOLE], "no known format"),
    "format 0.1 without a count": ([sparse(map="0,7", size="9", name="a"), WHOLE], "no known format"),
    "format 0.0 without a count": ([sparse(size="9", offset="0", numbytes="7"), WHOLE], "no known format"),
    "format 0.0 without pieces": ([sparse(size="9", numblocks="0"), entry("a")], "no known format"),
    "format 1.0 without a size": ([sparse(major="1", minor="0", name="a"), WHOLE], "no known format"),
    "format 1.0 without a name": ([sparse(major="1", minor="0", realsize="9"), WHOLE], "no known format"),
    "format 1.1": ([sparse(major="1", minor="1", name="a", realsize="9"), WHOLE], "no known format"),
    "format 0.1 by number": ([sparse(**POINT_ONE, major="0", minor="1"), WHOLE], "no known format"),
    "sparse and more": ([sparse(**POINT_ONE, other="1"), WHOLE], "no known format"),
    "format taken back": ([sparse(major="", minor="", name="a", realsize="9"), WHOLE], "no known format"),
    "sparse size taken back": ([sparse(**POINT_ONE, realsize=""), WHOLE], "no known format"),
    "sparse name taken back": ([sparse(**{**POINT_ONE, "name": ""}), WHOLE], "no known format"),
    "false count, map": ([sparse(**{**POINT_ONE, "numblocks": "7"}), WHOLE], "other than its count"),
    "false count, pieces": (
        [sparse(size="9", numblocks="2", offset="0", numbytes="7"), WHOLE],
        "other than its count",
    ),
    "numbytes before offset": (
        [sparse(size="9", numblocks="1", numbytes="7", offset="0"), WHOLE],
        "out of order",
    ),
    "two offsets": (
        [
            sparse(
                ("offset", "1"),
                ("offset", "1"),
                ("numbytes", "1"),
                ("numbytes", "1"),
                size="9",
                numblocks="2",
            ),
            WHOLE,
        ],
        "out of order",
    ),
    "two names of one sparse file": (
        [extended(b"L", b"abc\0"), sparse(**POINT_ONE), WHOLE],
        "two values for its name",
    ),
    "old sparse, another format": ([patched(OLD_SPARSE, 257, b"ustar\00000")], "another format"),
    "old sparse, another size": (
        [extended(b"x", record("size", "00000000512")), OLD_SPARSE],
        "sparse in two ways",
    ),
    "old sparse, a piece behind the last": (
        [patched(OLD_SPARSE, 458, b"%011o\0%011o\0" % (5, 0))],
        "behind",
    ),
    "old sparse, half a piece": ([patched(OLD_SPARSE, 410, bytes(12))], "behind"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_one_meaning_is_refused(case: str, read: Read) -> None:
    entries, message = REFUSED[case]
    with pytest.raises(Failure, match=message) as failure:
        read(*entries)
    assert str(failure.value).startswith("image, layer 1: entry ")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (b"", "cut short"),
        (bytes(512) + b"x", "data behind its end"),
        (bytes(512) + WHOLE, "data behind its end"),
        (bytes(100), "cut short"),
    ],
)
def test_a_tar_ends_with_zeros(end: bytes, message: str, read: Read) -> None:
    with pytest.raises(Failure, match=message):
        read(WHOLE, end=end)
    assert read(WHOLE, end=bytes(20480)).children


LIMITS = trees.Limits(
    entries=10, headers=40, content=30_000, metadata=4000, extension=512, xattrs=100, padding=4096
)
OLD_BLOCK = bytes(504) + b"\1" + bytes(7)


@pytest.mark.parametrize(
    "entries",
    [
        [entry(str(number)) for number in range(11)],
        [entry("/".join("abcdefghijk"))],
        [entry(f".wh.{number}") for number in range(11)],
        [entry("a", content=bytes(15_000)), entry("b", content=bytes(15_000))],
        [sparse(map="0,7", size="30000", numblocks="1", name="a"), WHOLE],
        [symlink(str(number), "t" * 500) for number in range(9)],
        [folder(".")] * 41,
        [entry("a")] * 41,
        [extended(b"g", record("comment", "a commit"))] * 21 + [WHOLE],
        [extended(b"x", record("comment", "c" * 70)) + extended(b"L", b"a\0") + entry("a")] * 9,
        [patched(OLD_SPARSE[:512], 482, b"\1") + OLD_BLOCK * 41 + bytes(512) + OLD_SPARSE[512:]],
        [
            sparse(map="0,1,1,1,2,1,3,1,4,1,5,1,6,1", size="9", numblocks="7", name=str(number)) + WHOLE
            for number in range(4)
        ],
        [entry("a", pax_headers={f"SCHILY.xattr.user.{number}": "v" for number in range(20)})],
        [xattr("a", "user.a", "v" * 101)],
        [xattr("a", "user.a", "v" * 600)],
    ],
)
def test_bombs_meet_limits(entries: list[bytes], tmp_path: Path) -> None:
    tar = tmp_path / "tar"
    tar.write_bytes(b"".join(entries) + END)
    assert tars.read_layer(tar, "x", trees.Image())
    with pytest.raises(Failure, match=r"^x(: entry '.*')? (is|makes|has) "):
        tars.read_layer(tar, "x", trees.Image(LIMITS))


def test_limits_hold_for_all_layers_together(tmp_path: Path) -> None:
    image = trees.Image(LIMITS)
    for number in range(2):
        (tmp_path / str(number)).write_bytes(entry(str(number), content=bytes(10_000)) + END)
        tars.read_layer(tmp_path / str(number), "x", image)
    with pytest.raises(Failure, match="x makes the image unpack to more than 30000 bytes"):
        tars.read_layer(tmp_path / "0", "x", image)


def test_what_is_no_file_takes_room_too(tmp_path: Path) -> None:
    image = trees.Image(LIMITS)
    (tmp_path / "tar").write_bytes(bytes(512) + bytes(4096))
    for _ in range(6):
        tars.read_layer(tmp_path / "tar", "x", image)
    with pytest.raises(Failure, match="unpack to more than 30000 bytes"):
        tars.read_layer(tmp_path / "tar", "x", image)
    (tmp_path / "tar").write_bytes(bytes(512) + bytes(4097))
    with pytest.raises(Failure, match="more than 4096 bytes of zeros"):
        tars.read_layer(tmp_path / "tar", "x", trees.Image(LIMITS))


TINY = entry("a", pax_headers={f"SCHILY.xattr.user.{number}": str(number) for number in range(1000, 5000)})
PIECES = ",".join(f"{2 * number},1" for number in range(1000, 6000))
LARGE_SPARSE = entry(
    "a",
    content=bytes(5000),
    pax_headers={
        "GNU.sparse.name": "a",
        "GNU.sparse.size": "1000000",
        "GNU.sparse.numblocks": "5000",
        "GNU.sparse.map": PIECES,
    },
)


@pytest.mark.parametrize("raw", [TINY, LARGE_SPARSE], ids=["attributes", "pieces"])
def test_what_an_entry_is_charged_is_what_it_takes(raw: bytes, tmp_path: Path) -> None:
    image = trees.Image()
    (tmp_path / "tar").write_bytes(raw + END)
    tracemalloc.start()
    try:
        assert tars.read_layer(tmp_path / "tar", "x", image)
        assert tracemalloc.get_traced_memory()[0] < image.metadata + 20_000
    finally:
        tracemalloc.stop()


def test_many_deep_files_and_folders_take_little_memory(tmp_path: Path) -> None:
    """A path of 500 names takes 4 KiB: as many as there are files would be most of the memory."""
    base = "d/" * 499
    (tmp_path / "tar").write_bytes(b"".join(entry(base + f"{number:x}/f") for number in range(2000)) + END)
    tracemalloc.start()
    try:
        tree = tars.read_layer(tmp_path / "tar", "x", trees.Image())
        assert sum(1 for _ in trees.walk(tree)) == 4500
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()


class Unwalked(dict[bytes, trees.Leaf | trees.Folder]):
    """The children of a folder, which can be asked for, but not all of them."""

    def __iter__(self) -> Iterator[bytes]:
        raise AssertionError("the whole image is walked for one link")

    keys = values = items = __iter__  # type: ignore[assignment]


def test_a_link_to_a_lower_file_does_not_walk_the_image(read: Read, image: trees.Image) -> None:
    read(folder("d"), entry("d/a", content=b"abc"), link("d/b", "d/a"), link("c", "d/b"), link("gone", "c"))
    read(entry(".wh.gone"), entry("c", content=b"other"))
    assert image.root
    image.root.children = Unwalked(image.root.children)
    assert set(listed(read(link("new", "d/b")))) == {".", "d", "d/a", "d/b", "new"}
    assert set(listed(read(link("last", "new"), entry("d/.wh.a")))) == {
        ".",
        "d",
        "d/a",
        "d/b",
        "new",
        "last",
    }


# --- Made harmless, and kept --------------------------------------------------------------------------


def test_names_mean_places_under_the_root(read: Read) -> None:
    tree = read(
        entry("/abs", content=b"1"), entry("./a//b/./c", content=b"2"), entry("dotted..", content=b"3")
    )
    assert set(listed(tree)) == {".", "abs", "a", "a/b", "a/b/c", "dotted.."}


def test_the_later_of_two_counts(read: Read) -> None:
    tree = read(
        entry("a", content=b"first"), link("b", "a"), entry("a", content=b"second"), folder("d", uid=1),
        entry("d/e"), folder("d", uid=2), symlink("e", "x"), entry("e", content=b"no link"),
    )  # fmt: skip
    found = listed(tree)
    assert (found["a"].size, found["b"].size, found["d"].uid, found["e"].isreg()) == (6, 5, 2, True)


def test_attributes_without_a_place_on_linux_are_left_out(read: Read) -> None:
    names = ("com.apple.x", "user.a", "system.nfs4_acl", "system.other", "user.")
    tree = read(entry("a", pax_headers={f"SCHILY.xattr.{name}": "v" for name in names}))
    leaf = tree.children[b"a"]
    assert leaf.meta is not None
    assert [name for name, _ in leaf.meta.xattrs] == [b"user.a"]


ATTRIBUTES = [
    (tarfile.REGTYPE, "system.posix_acl_access", acl(OWNER, GROUP, REST)),
    (tarfile.REGTYPE, "system.posix_acl_access", acl(OWNER, USER_5, USER_5, GROUP, GROUP_6, MASK, REST)),
    (tarfile.FIFOTYPE, "system.posix_acl_access", acl(OWNER, GROUP, MASK, REST)),
    (tarfile.DIRTYPE, "system.posix_acl_default", acl(OWNER, GROUP, REST)),
    (tarfile.REGTYPE, "security.capability", CAPABILITY),
    (tarfile.REGTYPE, "security.capability", b"\0\0\0\3" + CAPABILITY[4:] + b"\7\0\0\0"),
    (tarfile.SYMTYPE, "trusted.a", b"v"),
    (tarfile.SYMTYPE, "security.selinux", b"v"),
    (tarfile.DIRTYPE, "user.a", b"v"),
]
UNFIT = [
    (tarfile.REGTYPE, "system.posix_acl_access", b"junk"),
    (tarfile.REGTYPE, "system.posix_acl_access", acl()),
    (tarfile.REGTYPE, "system.posix_acl_access", b"\1" + acl(OWNER, GROUP, REST)[1:]),
    (tarfile.REGTYPE, "system.posix_acl_access", acl(OWNER, GROUP, REST) + b"x"),
    (tarfile.REGTYPE, "system.posix_acl_access", acl(GROUP, OWNER, REST)),
    (tarfile.REGTYPE, "system.posix_acl_access", acl(OWNER, USER_5, GROUP, REST)),
    (tarfile.REGTYPE, "system.posix_acl_access", acl(OWNER, GROUP, (32, 8, NOBODY))),
    (tarfile.REGTYPE, "system.posix_acl_access", acl(OWNER, (2, 4, NOBODY), GROUP, MASK, REST)),
    (tarfile.REGTYPE, "system.posix_acl_access", acl(OWNER, GROUP, (300, 4, NOBODY), REST)),
    (tarfile.SYMTYPE, "system.posix_acl_access", acl(OWNER, GROUP, REST)),
    (tarfile.REGTYPE, "system.posix_acl_default", acl(OWNER, GROUP, REST)),
    (tarfile.REGTYPE, "security.capability", b"junk"),
    (tarfile.REGTYPE, "security.capability", CAPABILITY[:12]),
    (tarfile.REGTYPE, "security.capability", b"\1\0\0\1" + CAPABILITY[4:12]),
    (tarfile.REGTYPE, "security.capability", b"\3" + CAPABILITY[1:]),
    (tarfile.REGTYPE, "security.capability", CAPABILITY + bytes(4)),
    (tarfile.REGTYPE, "security.capability", b"\0\0\0\3" + CAPABILITY[4:] + b"\xff" * 4),
    (tarfile.SYMTYPE, "user.a", b"v"),
    (tarfile.FIFOTYPE, "user.a", b"v"),
    (tarfile.CHRTYPE, "user.a", b"v"),
]


@pytest.mark.parametrize("case", range(len(ATTRIBUTES)))
def test_attributes_that_linux_takes_are_kept(case: int, read: Read) -> None:
    kind, name, value = ATTRIBUTES[case]
    found = read(xattr("a", name, value, kind)).children[b"a"]
    assert found.meta
    assert found.meta.xattrs == ((name.encode(), value),)


@pytest.mark.parametrize("case", range(len(UNFIT)))
def test_attributes_that_linux_does_not_take_are_refused(case: int, read: Read) -> None:
    kind, name, value = UNFIT[case]
    with pytest.raises(Failure, match=f"entry 'a' has the attribute {name}, which Linux does not take"):
        read(xattr("a", name, value, kind))


@pytest.mark.parametrize("case", range(len(ATTRIBUTES) + len(UNFIT)))
def test_linux_agrees_about_attributes(case: int, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("devices and attributes need root")
    kind, name, value = [*ATTRIBUTES, *UNFIT][case]
    make: dict[bytes, Callable[[Path], None]] = {
        tarfile.REGTYPE: Path.touch,
        tarfile.DIRTYPE: Path.mkdir,
        tarfile.SYMTYPE: lambda path: path.symlink_to("target"),
        tarfile.FIFOTYPE: os.mkfifo,
        tarfile.CHRTYPE: lambda path: os.mknod(path, 0o20644, os.makedev(1, 3)),
    }
    try:
        os.setxattr(tmp_path, "user.a", b"v")
    except OSError:
        pytest.skip("this file system has no attributes")
    make[kind](tmp_path / "a")
    try:
        os.setxattr(tmp_path / "a", name, value, follow_symlinks=False)
        # An ACL without entries is how Linux is told to remove one.
        taken = name in os.listxattr(tmp_path / "a", follow_symlinks=False) or value == acl(
            OWNER, GROUP, REST
        )
    except OSError:
        taken = False
    assert taken == (case < len(ATTRIBUTES))


@pytest.mark.parametrize("after", [b"", entry("c")])
def test_no_data_follows_a_folder_or_hard_link_whatever_its_size(after: bytes, read: Read) -> None:
    tree = read(entry("a", content=b"abc"), sized(folder("d")), sized(link("b", "a")), after)
    assert set(tree.children) == {b"a", b"b", b"d"} | ({b"c"} if after else set())


def test_comments_for_the_whole_tar_are_no_harm(read: Read) -> None:
    assert read(extended(b"g", record("comment", "a commit")), WHOLE).children


def test_whiteouts_that_hide_nothing_are_left_out(read: Read) -> None:
    read(folder("etc", uid=7), entry("etc/old"), folder("opq"), entry("opq/old"))
    tree = read(
        entry("etc/.wh.old"), entry("etc/.wh.never"), entry("opq/.wh..wh..opq"), entry("opq/.wh.old"),
        entry("new/.wh.x"), entry("new/.wh..wh..opq"),
    )  # fmt: skip
    found = listed(tree)
    assert set(found) == {".", "etc", "etc/old", "opq"}
    assert (found["etc/old"].type, found["etc"].uid) == (tarfile.CHRTYPE, 7)
    assert [name for name in found if OPAQUE in found[name].pax_headers] == ["opq"]


def test_what_a_layer_removed_is_gone_for_those_above(read: Read) -> None:
    read(folder("a", uid=7), entry("a/old"), folder("b", uid=7), entry("b/old"), entry("c"))
    read(entry(".wh.a"), entry("b/.wh..wh..opq"), entry(".wh.c"))
    found = listed(read(entry("a/new"), entry("b/.wh.old"), entry(".wh.c")))
    assert (set(found), found["a"].uid, found["b"].uid) == ({".", "a", "a/new", "b"}, 0, 7)
    with pytest.raises(Failure, match="no file before it"):
        read(link("d", "b/old"))


def test_a_folder_beside_its_whiteout_shows_nothing_old(read: Read) -> None:
    read(folder("a", uid=7), entry("a/old"), symlink("l", "a"))
    tree = read(entry("a/new"), entry(".wh.a"), entry(".wh.l"), entry("l/new"))
    found = listed(tree)
    assert (found["l"].uid, set(found)) == (0, {".", "a", "a/new", "l", "l/new"})
    assert OPAQUE in found["a"].pax_headers
    assert OPAQUE not in found["l"].pax_headers


@pytest.mark.parametrize("mark", [".wh.a", "a/.wh.b", "a/.wh..wh..opq", ".wh..wh..opq"])
@pytest.mark.parametrize("order", [1, -1])
def test_no_private_folder_becomes_open_by_being_passed_through(mark: str, order: int, read: Read) -> None:
    read(folder("a", uid=7, mode=0o700), folder("a/b", uid=8, mode=0o700), entry("a/b/old"))
    found = listed(read(*[entry("a/b/new"), entry(mark)][::order]))
    assert [(found[name].uid, found[name].mode) for name in ("a", "a/b")] == [(7, 0o700), (8, 0o700)]
    assert set(found) == {".", "a", "a/b", "a/b/new"}
    assert [name for name in found if OPAQUE in found[name].pax_headers]
    # Who lists the folder says what it is.
    assert listed(read(entry(mark), folder("a", uid=9), entry("a/b/new")))["a"].uid == 9


def test_an_opaque_root_hides_every_name_below(read: Read) -> None:
    """Overlayfs does not heed the mark of a layer's root."""
    read(folder("etc", uid=7), entry("etc/shadow"), entry("file"), symlink("lib", "usr"), folder("gone"))
    found = listed(read(entry(".wh..wh..opq"), entry("etc/new"), folder("lib"), entry("init")))
    assert set(found) == {".", "etc", "etc/new", "file", "gone", "init", "lib"}
    assert {name for name, item in found.items() if item.type == tarfile.CHRTYPE} == {"file", "gone"}
    assert [name for name in found if OPAQUE in found[name].pax_headers] == ["etc"]
    # What is gone stays gone, and is not hidden twice.
    assert set(listed(read(entry(".wh..wh..opq"), entry(".wh.file")))) == {".", "etc", "init", "lib"}
    with pytest.raises(Failure, match="no file before it"):
        read(link("late", "etc/new"))


def test_nothing_can_be_opaque_over_a_layer_of_unknown_names(read: Read, image: trees.Image) -> None:
    image.forget()
    with pytest.raises(Failure, match="entry '/' hides all that is below"):
        read(entry(".wh..wh..opq"), entry("init"))
    # Below an opaque folder nothing is left to hide: a whiteout would be seen, as a device.
    found = listed(
        read(folder("a"), entry("a/.wh..wh..opq"), entry("a/.wh.b"), folder("a/c"), entry("a/c/.wh.d"))
    )
    assert set(found) == {".", "a", "a/c"}
    assert [name for name in found if OPAQUE in found[name].pax_headers] == ["a"]


def test_a_whiteout_alone_makes_no_folder(read: Read) -> None:
    read(folder("old", uid=7), entry("old/x"), folder("bare"))
    found = listed(
        read(entry("new/deep/.wh.x"), entry("new/.wh..wh..opq"), entry("old/.wh.x"), entry("bare/in/.wh.x"))
    )
    assert set(found) == {".", "old", "old/x", "bare"}
    found = listed(read(entry("old/.wh.y"), entry(".wh.old"), entry("in/.wh.x"), entry("in/real")))
    assert set(found) == {".", "old", "in", "in/real"}
    assert found["old"].type == tarfile.CHRTYPE


def test_a_link_to_what_it_replaces_is_refused(read: Read) -> None:
    read(folder("d"), entry("d/a", content=b"abc"))
    for name, target in (("d/a", "/d/a"), ("d", "d/a")):
        with pytest.raises(Failure, match="to itself or to what it replaces"):
            read(link(name, target))


def test_a_folder_passed_through_keeps_what_it_is_below(read: Read) -> None:
    read(folder("a", uid=7, mtime=5), symlink("lib", "usr/lib"), folder("usr/lib"))
    found = listed(read(entry("a/b")))["a"]
    assert (found.uid, found.mtime) == (7, 5)
    with pytest.raises(Failure, match="'lib/x.so' goes through a link or file of a lower layer"):
        read(entry("lib/x.so"))
    # Who lists the folder means it, as for every other reader.
    assert read(folder("lib"), entry("lib/x.so"))


@pytest.mark.parametrize(
    "later",
    [folder("lib"), entry(".wh.lib"), entry("lib/.wh..wh..opq"), entry(".wh..wh..opq")],
    ids=range(4),
)
@pytest.mark.parametrize("first", [entry("lib/x.so"), entry("lib/.wh.x")], ids=range(2))
def test_what_goes_through_a_lower_link_is_not_mended_later(first: bytes, later: bytes, read: Read) -> None:
    """Who unpacks in order has followed the link by then."""
    read(symlink("lib", "usr/lib"), folder("usr/lib"))
    with pytest.raises(Failure, match=r"'lib/.*' goes through a link or file of a lower layer"):
        read(first, later)
    if later != entry("lib/.wh..wh..opq"):
        assert read(later, first)


def test_a_link_to_a_lower_file_brings_all_its_names(read: Read) -> None:
    read(folder("d", uid=3), entry("d/a", content=b"abc"), link("d/b", "d/a"), link("c", "d/a"))
    found = listed(read(link("new", "d/b"), entry("c", content=b"other")))
    assert set(found) == {".", "c", "d", "d/a", "d/b", "new"}
    assert (found["d"].uid, found["d/a"].size, found["c"].size) == (3, 3, 5)
    assert {found["d/b"].linkname, found["new"].linkname} == {"d/a"}
    with pytest.raises(Failure, match="that this layer removes"):
        read(entry("d/.wh.b"), link("late", "d/b"))


def test_over_a_layer_of_unknown_names_nothing_is_guessed(read: Read, image: trees.Image) -> None:
    image.forget()
    assert set(listed(read(folder("a"), entry("a/.wh.b")))) == {".", "a", "a/b"}
    with pytest.raises(Failure, match="the tar does not list"):
        read(entry("a/b"))
    with pytest.raises(Failure, match="no file before it"):
        read(link("a", "b"))


MAP = b"2\n1\n1\n4\n1\n"


@pytest.mark.parametrize(
    "raw",
    [
        [OLD_SPARSE],
        [
            sparse(
                ("offset", "1"),
                ("numbytes", "1"),
                ("offset", "4"),
                ("numbytes", "1"),
                size="5",
                numblocks="2",
            ),
            entry("a", content=b"xy"),
        ],
        [
            sparse(name="a", size="5", numblocks="2", map="1,1,4,1"),
            entry("GNUSparseFile.0/a", content=b"xy"),
        ],
        [
            sparse(major="1", minor="0", name="a", realsize="5"),
            entry("GNUSparseFile.0/a", content=MAP + bytes(512 - len(MAP)) + b"xy"),
        ],
    ],
    ids=["old", "0.0", "0.1", "1.0"],
)
def test_each_form_of_sparse_files_is_the_same_file(raw: list[bytes], read: Read) -> None:
    leaf = read(*raw).children[b"a"]
    assert isinstance(leaf, trees.Leaf)
    assert leaf.content
    assert (leaf.content.size, [piece[:2] for piece in leaf.content.pieces]) == (5, [(1, 1), (4, 1)])


def test_a_tar_that_shrinks_meanwhile_is_no_endless_file(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(entry("a", content=bytes(5000)) + END)
    tree = tars.read_layer(tmp_path / "tar", "x", trees.Image())
    (tmp_path / "tar").write_bytes(bytes(1000))
    with pytest.raises(Failure, match="became shorter"):
        written(tree)


# --- Bytes that nobody thought of ---------------------------------------------------------------------

NAMES = st.binary(min_size=1, max_size=120).filter(
    lambda name: not (set(name) & {0, 47} or name in (b".", b"..") or name.startswith(b".wh."))
)
METAS = st.builds(
    trees.Meta,
    mode=st.integers(0, 0o7777),
    uid=st.integers(0, tars.ID_MAX),
    gid=st.integers(0, tars.ID_MAX),
    mtime=st.integers(0, 1 << 62) | st.integers(-(1 << 33), 0).map(lambda seconds: seconds * 10**9),
    # The key of a pax record ends at its first `=`.
    xattrs=st.dictionaries(
        NAMES.map(lambda name: b"trusted." + name.replace(b"=", b"-")), st.binary(min_size=1), max_size=2
    )
    .filter(lambda found: not any(name.startswith(b"trusted.overlay.") for name in found))
    .map(lambda found: tuple(sorted(found.items()))),
)  # fmt: skip
LEAVES = st.one_of(
    st.builds(trees.Leaf, st.just(trees.FIFO), METAS),
    st.builds(
        lambda meta, target: trees.Leaf(trees.SYMLINK, replace(meta, mode=0o777), target),
        METAS,
        st.binary(min_size=1, max_size=300).filter(lambda target: 0 not in target),
    ),
    st.builds(
        lambda meta, device: trees.Leaf(trees.BLOCK, meta, device=device),
        METAS,
        st.tuples(st.integers(0, tars.MAJOR_MAX), st.integers(0, tars.MINOR_MAX)),
    ),
)
TREES = st.recursive(
    st.builds(trees.Folder, METAS, st.dictionaries(NAMES, LEAVES, max_size=4)),
    lambda inner: st.builds(trees.Folder, METAS, st.dictionaries(NAMES, LEAVES | inner, max_size=4)),
    max_leaves=8,
)


@SETTINGS
@given(TREES)
def test_what_is_written_reads_back(tmp_path: Path, tree: trees.Folder) -> None:
    (tmp_path / "tar").write_bytes(written(tree))
    again = tars.read_layer(tmp_path / "tar", "x", trees.Image())
    assert written(again) == written(tree)
    for (path, one), (other_path, other) in zip(trees.walk(tree), trees.walk(again), strict=True):
        assert (path, one.meta) == (other_path, other.meta)
        if isinstance(one, trees.Leaf):
            assert isinstance(other, trees.Leaf)
            assert (one.kind, one.target, one.device) == (other.kind, other.target, other.device)


SAMPLE = b"".join([
    folder("usr"), entry("usr/" + LARGE, content=b"c" * 600), link("usr/l", "usr/" + LARGE),
    symlink("s", LARGE), xattr("x", "user.a", "v"), device("null", 1, 3), entry(".wh.gone"),
    xattr("y", "security.capability", CAPABILITY),
    xattr("z", "system.posix_acl_access", acl(OWNER, GROUP, REST)),
    entry("usr/.wh..wh..opq"),
    sparse(map="0,3,9,4", size="50", numblocks="2", name="sparse"), WHOLE, OLD_SPARSE, END,
])  # fmt: skip


@SETTINGS
@given(
    st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.binary(min_size=1, max_size=12)), max_size=4),
    st.data(),
)
def test_damaged_tars_are_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    raw = SAMPLE
    for at, value in changes:
        raw = (raw[:at] + value + raw[at + len(value) :])[: len(SAMPLE)]
        # Half of the changes are of the kind that an author, not an accident, makes.
        if data.draw(st.booleans()):
            start = at // 512 * 512
            raw = raw[:start] + patched(raw[start : start + 512], 0, b"") + raw[start + 512 :]
    (tmp_path / "tar").write_bytes(raw)
    try:
        tree = tars.read_layer(tmp_path / "tar", "x", trees.Image())
    except Failure:
        return
    (tmp_path / "again").write_bytes(canonical := written(tree))
    # What was a whiteout is a device now, which no strange tar may have.
    if (
        not any(found is trees.WHITEOUT for _, found in trees.walk(tree))
        and b"trusted.overlay" not in canonical
    ):
        assert written(tars.read_layer(tmp_path / "again", "x", trees.Image())) == canonical


@SETTINGS
@given(st.binary(max_size=2048))
def test_no_bytes_crash_the_reader(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "tar").write_bytes(raw)
    with pytest.raises(Failure):
        tars.read_layer(tmp_path / "tar", "x", trees.Image())
