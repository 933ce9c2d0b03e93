"""Converted images as the kernel mounts them, against what umoci unpacks, file by file. Needs root."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mosinit import images, init
from mosinit.host import Host

Need = Callable[..., None]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners, devices and mounts need root")

TAR = "application/vnd.oci.image.layer.v1.tar"
NOW = time.time()
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_raw=ep, as setcap writes it


@pytest.fixture(autouse=True)
def tools(need: Need) -> None:
    need("mkfs.erofs", "veritysetup", "umoci", "tar")


@dataclass(frozen=True)
class Entry:
    """An entry of a tar, by names that can hold any byte."""

    name: bytes
    kind: bytes = tarfile.REGTYPE
    content: bytes = b""
    target: bytes = b""
    mode: int = 0o644
    owner: tuple[int, int] = (0, 0)
    device: tuple[int, int] = (0, 0)
    mtime: float = 1_700_000_000.25
    xattrs: dict[str, bytes] = field(default_factory=dict)


def folder(name: bytes, mode: int = 0o755, owner: tuple[int, int] = (0, 0)) -> Entry:
    return Entry(name, tarfile.DIRTYPE, mode=mode, owner=owner)


def link(name: bytes, target: bytes) -> Entry:
    return Entry(name, tarfile.LNKTYPE, target=target)


def pack(entries: Sequence[Entry], format: int = tarfile.PAX_FORMAT) -> bytes:
    """Write a tar by Python's own module, which knows nothing of ours."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, encoding="utf-8") as archive:
        for entry in entries:
            info = tarfile.TarInfo(os.fsdecode(entry.name))
            info.type, info.linkname, info.mode = entry.kind, os.fsdecode(entry.target), entry.mode
            info.uid, info.gid = entry.owner
            info.devmajor, info.devminor = entry.device
            info.mtime = entry.mtime if format == tarfile.PAX_FORMAT else int(entry.mtime)
            info.size = len(entry.content)
            info.pax_headers = {
                f"SCHILY.xattr.{key}": os.fsdecode(value) for key, value in entry.xattrs.items()
            }
            archive.addfile(info, io.BytesIO(entry.content))
    return buffer.getvalue()


def holes(folder: Path) -> None:
    """Make two sparse files: all hole, and one with more pieces than a header has room for."""
    folder.mkdir()
    with (folder / "holes").open("wb") as file:
        for index in range(40):
            file.seek((2 * index + 1) * 65536)
            file.write(bytes([65 + index]) * 5000)
        file.truncate(100 * 65536 + 7)
    (folder / "hole").touch()
    os.truncate(folder / "hole", 1 << 20)


def gnu_tar(folder: Path, name: str, *words: str) -> bytes:
    """Write a tar by GNU tar, in a folder `name` of the layer."""
    return subprocess.run(
        ["tar", "--create", "--owner=7", "--group=8", "--mtime=@5", f"--transform=s,^,{name}/,", *words,
         "-C", str(folder), "hole", "holes"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip


LONG = b"/".join([b"long" * 30, b"name" * 40, b"\xc3\xa4" * 100])
BASE = [
    folder(b"./", 0o751, (1, 2)),
    folder(b"bin"),
    Entry(b"bin/su", content=b"\x7fELF" * 5000, mode=0o4755),
    Entry(b"bin/ping", content=b"ping", mode=0o755, xattrs={"security.capability": CAPABILITY}),
    link(b"bin/ping6", b"./bin/ping"),
    folder(b"etc", 0o700, (5, 6)),
    Entry(b"etc/gone", content=b"gone"),
    Entry(b"etc/kept", content=os.urandom(100_000), owner=(3 << 30, (1 << 32) - 2)),
    link(b"etc/also", b"/etc/kept"),
    folder(b"tmp", 0o1777),
    Entry(b"dev/null", tarfile.CHRTYPE, mode=0o666, device=(1, 3)),
    Entry(b"dev/big", tarfile.BLKTYPE, mode=0o660, device=(4095, (1 << 20) - 1)),
    Entry(b"dev/block0", tarfile.BLKTYPE, mode=0o660),
    Entry(b"run/fifo", tarfile.FIFOTYPE, mode=0o600),
    Entry(b"lib", tarfile.SYMTYPE, target=b"../../usr/lib", mode=0o777),
    link(b"lib-too", b"lib"),
    Entry(
        b"odd/\xff\xfe \\x2d:\n", content=b"odd", xattrs={"user.\u00e4": b"\x00\xff=\n", "trusted.t": b""}
    ),
    Entry(b"odd/link", tarfile.SYMTYPE, target=b"\xff" * 300, mode=0o777),
    Entry(LONG, content=b"long", mode=0o600),
    folder(b"opq"),
    Entry(b"opq/old", content=b"old"),
    folder(b"opq/sub"),
    Entry(b"opq/sub/old", content=b"old"),
    folder(b"remade", 0o700, (9, 9)),
    Entry(b"remade/old", content=b"old"),
    Entry(b"before-unix", mtime=-5),
    Entry(b"epoch", content=bytes(3 << 20), mtime=0),
    Entry(b"/absolute//and/./so", content=b"under the root"),
    Entry(b"d/" * 511 + b"deepest", content=b"deep"),
    Entry(b"turns", content=b"a file"),
    folder(b"turned"),
    Entry(b"turned/old", content=b"old"),
    Entry(b"twice", content=b"first"),
    link(b"of-first", b"twice"),
    Entry(b"twice", content=b"second"),
]
UPPER = [
    Entry(b"etc/new", content=b"new", mtime=7),
    Entry(b"etc/.wh.gone"),
    Entry(b"etc/.wh.never"),
    Entry(b"opq/.wh..wh..opq"),
    Entry(b"opq/sub/new", content=b"new"),
    link(b"etc/third", b"etc/also"),
    folder(b"turns"),
    Entry(b"turns/into", content=b"a folder"),
    Entry(b"turned", tarfile.SYMTYPE, target=b"turns", mode=0o640),
    Entry(b".wh.remade"),
    folder(b"remade", 0o711, (1, 1)),
    Entry(b"remade/new", content=b"new"),
]
TOP = [
    Entry(b"usr/share/" + b"deep/" * 60 + b"file", content=b"deep", owner=(1 << 21, (1 << 21) + 1)),
    Entry(b"g" * 255, content=b"gnu"),
    Entry(b"gnu-link", tarfile.SYMTYPE, target=b"t" * 150, mode=0o777),
    Entry(b"opq/.wh.sub"),
    Entry(b"etc/.wh.also"),
]


def store(host: Host, path: Path, tars: Sequence[bytes]) -> None:
    """Make a layout that umoci, too, takes."""
    layout = images.Layout(path)
    ids = [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars]
    config = {
        "os": "linux",
        "architecture": "amd64",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": ids},
    }
    document = {
        "schemaVersion": 2,
        "config": layout.add_blob(host, json.dumps(config).encode(), images.CONFIG_TYPE).json(),
        "layers": [layout.add_blob(host, gzip.compress(tar), f"{TAR}+gzip").json() for tar in tars],
    }
    tag = {images.REF_NAME: "latest"}
    layout.write_index(
        host, [layout.add_blob(host, images.encode(document), images.MANIFEST_TYPE, annotations=tag)]
    )


@contextlib.contextmanager
def stacked(host: Host, layout: images.Layout, image: images.ConvertedImage, where: Path) -> Iterator[Path]:
    """Mount an image as the bring-up does, but without dm-verity, which hosts may lack."""
    with contextlib.ExitStack() as undo:
        lowers: list[str] = []
        for number, layer in enumerate(image.layers):
            place = where / str(number)
            place.mkdir(parents=True)
            try:
                loop, _ = host.attach_loop(str(layout.blob_path(layer.descriptor.digest)))
            except FileNotFoundError:
                pytest.skip("this host has no loop devices")
            undo.callback(host.close, loop)
            host.mount(os.readlink(f"/proc/self/fd/{loop}"), str(place), "erofs", init.MountFlag.RDONLY)
            undo.callback(host.unmount, str(place))
            lowers.insert(0, str(place))
        for name in ("root", "empty"):
            (where / name).mkdir()
        options = {"redirect_dir": "nofollow", "metacopy": "off", "index": "off", "xino": "off"}
        # Overlayfs wants two lowers if there is nothing to write to.
        host.mount_overlay(str(where / "root"), [*lowers, str(where / "empty")], options, read_only=True)
        undo.callback(host.unmount, str(where / "root"))
        yield where / "root"


@dataclass(frozen=True)
class Seen:
    """What a program could see of one file."""

    mode: int
    owner: tuple[int, int]
    device: int
    mtime: int
    content: str
    xattrs: dict[str, bytes]
    names: frozenset[bytes]


def snapshot(root: Path) -> dict[bytes, Seen]:
    """Look at every file of a tree."""
    top = os.fsencode(root)
    paths = [top]
    for where, folders, files in os.walk(top):
        paths += [os.path.join(where, name) for name in folders + files]
    groups: dict[tuple[int, int], set[bytes]] = {}
    for path in paths:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            groups.setdefault((found.st_dev, found.st_ino), set()).add(os.path.relpath(path, top))
    return {os.path.relpath(path, top): look(path, groups) for path in paths}


def look(path: bytes, groups: dict[tuple[int, int], set[bytes]]) -> Seen:
    found = os.lstat(path)
    content = ""
    if stat.S_ISREG(found.st_mode):
        content = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest()
    elif stat.S_ISLNK(found.st_mode):
        content = os.fsdecode(os.readlink(path))
    names = os.listxattr(path, follow_symlinks=False)
    return Seen(
        found.st_mode,
        (found.st_uid, found.st_gid),
        found.st_rdev,
        # Folders that no tar lists have a date of their own, and for umoci it is now.
        found.st_mtime_ns if found.st_mtime < NOW else 0,
        content,
        {name: os.getxattr(path, name, follow_symlinks=False) for name in names},
        frozenset(groups.get((found.st_dev, found.st_ino), ())),
    )


def both(
    host: Host, tmp_path: Path, tars: Sequence[bytes], umocis: Sequence[bytes]
) -> tuple[dict[bytes, Seen], dict[bytes, Seen]]:
    """Return what our layers look like when mounted, and what umoci makes of the image."""
    store(host, tmp_path / "source", tars)
    store(host, tmp_path / "umoci", umocis)
    layout = images.Layout(tmp_path / "converted")
    image = images.convert(host, f"oci:{tmp_path}/source", layout)
    host.run(["umoci", "unpack", "--image", f"{tmp_path}/umoci", tmp_path / "bundle"])
    with stacked(host, layout, image, tmp_path / "mounts") as root:
        return snapshot(root), snapshot(tmp_path / "bundle/rootfs")


SPARSE = [
    ["--format=gnu"],
    ["--format=posix"],
    ["--format=posix", "--sparse-version=0.1"],
    ["--format=posix", "--sparse-version=0.0"],
]


def test_the_mounted_stack_is_what_umoci_unpacks(host: Host, tmp_path: Path) -> None:
    holes(tmp_path / "files")
    sparse = [
        gnu_tar(tmp_path / "files", f"s{index}", "--sparse", *words) for index, words in enumerate(SPARSE)
    ]
    # umoci knows no sparse files: it gets the same ones without holes.
    whole = [gnu_tar(tmp_path / "files", f"s{index}", *words[:1]) for index, words in enumerate(SPARSE)]
    ends = [pack(BASE), pack(UPPER)], [pack(TOP, tarfile.GNU_FORMAT)]
    ours, theirs = both(host, tmp_path, [*ends[0], *sparse, *ends[1]], [*ends[0], *whole, *ends[1]])
    assert (sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())) == ([], [])
    unequal = {}
    for path, seen in ours.items():
        # umoci forgets the dates of folders in which it makes or removes something.
        dated = replace(seen, mtime=0) if not theirs[path].mtime else seen
        if dated != theirs[path]:
            unequal[path] = (seen, theirs[path])
    assert unequal == {}


BELOW = [
    folder(b"./"),
    folder(b"etc", 0o700, (7, 7)),
    Entry(b"etc/shadow", content=b"root::0:0::::", mode=0o666),
    folder(b"etc/ssl", 0o700, (8, 8)),
    Entry(b"etc/ssl/old"),
    folder(b"var/log"),
    Entry(b"file"),
    Entry(b"lib", tarfile.SYMTYPE, target=b"etc", mode=0o777),
]
HIDING = {
    "an opaque root": [[Entry(b".wh..wh..opq"), Entry(b"init", content=b"x")]],
    "after the rest": [[folder(b"etc", 0o711), Entry(b"lib"), folder(b"new"), Entry(b".wh..wh..opq")]],
    "a folder passed through": [[Entry(b"etc/ssl/new"), Entry(b".wh..wh..opq")]],
    "twice": [[Entry(b".wh..wh..opq"), Entry(b"a")], [Entry(b"./.wh..wh..opq"), Entry(b"b")]],
    "something above": [[Entry(b".wh..wh..opq"), Entry(b"a")], [folder(b"etc"), Entry(b"etc/new")]],
    "a whiteout of nothing": [
        [Entry(b"new/deep/.wh.x"), Entry(b"etc/new/.wh.x"), Entry(b"opq/.wh..wh..opq")]
    ],
    "within what goes": [[Entry(b".wh.etc"), Entry(b"etc/.wh.shadow"), Entry(b"etc/ssl/.wh.old")]],
    "passed through, then removed": [[Entry(b"etc/ssl/new"), Entry(b".wh.etc")]],
}


@pytest.mark.parametrize("case", HIDING)
def test_what_umoci_hides_the_kernel_hides(case: str, host: Host, tmp_path: Path) -> None:
    tars = [pack(BELOW), *[pack(layer) for layer in HIDING[case]]]
    ours, theirs = both(host, tmp_path, tars, tars)
    assert {path: replace(seen, mtime=0) for path, seen in ours.items()} == {
        path: replace(seen, mtime=0) for path, seen in theirs.items()
    }


def test_sizes_of_what_has_no_data_mean_nothing(host: Host, tmp_path: Path) -> None:
    """Premise: umoci, too, goes on with the next record."""
    entries = [folder(b"./"), folder(b"d"), Entry(b"f", content=b"x"), link(b"l", b"f"), Entry(b"g")]
    tar = bytearray(pack(entries, tarfile.GNU_FORMAT))
    for name in (b"d/", b"l"):
        at = next(at for at in range(0, len(tar), 512) if tar[at : at + 100].rstrip(b"\0") == name)
        tar[at + 124 : at + 136] = b"%011o\0" % 512
        total = sum(tar[at : at + 148]) + 8 * 32 + sum(tar[at + 156 : at + 512])
        tar[at + 148 : at + 156] = b"%06o\0 " % total
    ours, theirs = both(host, tmp_path, [bytes(tar)], [bytes(tar)])
    assert set(ours) == set(theirs) == {b".", b"d", b"f", b"g", b"l"}
