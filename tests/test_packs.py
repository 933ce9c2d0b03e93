"""Git packs, read without git: as git writes them, damaged, and made to eat memory."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosinit import packs

BLOB, DELTA = 3, 7
Need = Callable[..., None]


def git(folder: Path, *words: str, stdin: bytes = b"") -> bytes:
    command = ["git", f"--git-dir={folder}", *words]
    return subprocess.run(command, input=stdin, capture_output=True, check=True).stdout


@pytest.fixture
def folder(need: Need, tmp_path: Path) -> Path:
    """A repository of blobs that resemble each other."""
    need("git")
    folder = tmp_path / "git"
    subprocess.run(["git", "init", "--quiet", "--bare", folder], check=True)
    source = random.Random(1)
    lines = [source.randbytes(30).hex().encode() + b"\n" for _ in range(3000)]
    for number in range(40):
        lines[number * 50 : number * 50 + 2] = [b"changed %d\n" % number]
        git(folder, "hash-object", "-w", "--stdin", stdin=b"".join(lines))
    return folder


def packed(folder: Path, *words: str) -> bytes:
    """Return a pack of all that is there, as git makes it."""
    names = git(folder, "cat-file", "--batch-all-objects", "--batch-check=%(objectname)")
    return git(folder, "pack-objects", "--stdout", "-q", *words, stdin=names)


@pytest.mark.parametrize("words", [["--delta-base-offset"], ["--window=0"], ["--depth=50", "--window=50"]])
def test_all_that_git_packs_is_read(folder: Path, words: Sequence[str]) -> None:
    pack = packed(folder, *words)
    found = dict(packs.read(pack, packs.Budget()))
    names = git(folder, "cat-file", "--batch-all-objects", "--batch-check=%(objectname)").decode().split()
    assert sorted(found) == sorted(names)
    assert (len(pack) < 200_000) == (words != ["--window=0"])  # there are deltas
    for name, whole in found.items():
        head, _, content = whole.partition(b"\0")
        assert (head, content) == (b"blob %d" % len(content), git(folder, "cat-file", "blob", name))


@pytest.mark.parametrize("words", [["--delta-base-offset"], []])
def test_a_base_may_come_later(folder: Path, words: Sequence[str]) -> None:
    pack = packed(folder, *words)
    entries = list(packs._entries(pack, packs.Budget()))
    found = dict(packs._resolved(entries[::-1], packs.Budget()))
    assert found == dict(packs.read(pack, packs.Budget()))


@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_no_damage_does_more_than_lose_objects(place: int, value: int, cut: bool) -> None:
    delta = b"\x05\x08\x90\x05\x03abc"
    base = hashlib.sha1(b"blob 5\0hello").digest()
    pack = made([(BLOB, b"hello"), (BLOB, b"x" * 5000), (DELTA, base + delta)])
    whole = dict(packs.read(pack, packs.Budget()))
    assert [text for _, _, text in (each.partition(b"\0") for each in whole.values())][-1] == b"helloabc"
    place %= len(pack)
    pack = pack[:place] if cut else pack[:place] + bytes([value]) + pack[place + 1 :]
    for name, content in packs.read(pack, packs.Budget()):
        assert hashlib.sha1(content).hexdigest() == name


@given(st.binary(max_size=400))
def test_anything_may_lie_there(data: bytes) -> None:
    head = struct.pack(">4sII", b"PACK", 2, 5)
    for pack in (data, head + data):
        for name, content in packs.read(pack, packs.Budget()):
            assert hashlib.sha1(content).hexdigest() == name


def made(objects: Sequence[tuple[int, bytes]]) -> bytes:
    """Return a pack; of a delta the name of its base comes first."""
    body = struct.pack(">4sII", b"PACK", 2, len(objects))
    for kind, data in objects:
        base, data = (data[:20], data[20:]) if kind == DELTA else (b"", data)
        size, head = len(data) >> 4, bytearray([kind << 4 | len(data) & 15])
        while size:
            head[-1] |= 0x80
            head.append(size & 0x7F)
            size >>= 7
        body += bytes(head) + base + zlib.compress(data)
    return body + hashlib.sha1(body).digest()


def test_small_packs_that_stand_for_much() -> None:
    many = packs.read(made([(BLOB, b"%d" % number) for number in range(200)]), packs.Budget(objects=100))
    assert len(list(many)) == 100
    large = made([(BLOB, b"first"), (BLOB, bytes(packs.OBJECT_BYTES + 1)), (BLOB, b"last")])
    assert [whole for _, whole in packs.read(large, packs.Budget())] == [b"blob 5\0first"]
    base = bytes(1000)
    name = hashlib.sha1(b"blob 1000\0" + base).digest()
    # Each copies the base a hundred times.
    delta = name + b"\xe8\x07" + b"\xa0\x8d\x06" + b"\xb0\xe8\x03" * 100
    pack = made([(BLOB, base), *[(DELTA, delta)] * 50])
    assert {len(whole) for _, whole in packs.read(pack, packs.Budget())} == {1010, 100_012}
    budget = packs.Budget(size=300_000)
    assert len(list(packs.read(pack, budget))) == 1 + 2
    # What one pack took, the next does not have.
    assert list(packs.read(pack, budget)) == []


def test_a_delta_says_how_much_it_makes() -> None:
    base = bytes(1000)
    name = hashlib.sha1(b"blob 1000\0" + base).digest()
    for delta in (
        b"\xe8\x07" + b"\xff\xff\xff\x7f" + b"\xb0\xe8\x03" * 9,  # too much
        b"\xe8\x07" + b"\x0a" + b"\xb0\xe8\x03" * 1000,  # more than it says
        b"\xe9\x07" + b"\xe8\x07" + b"\xb0\xe8\x03",  # another base
        b"\xe8\x07" + b"\xe8\x07" + b"\xb0\xe8",  # cut
    ):
        found = dict(packs.read(made([(BLOB, base), (DELTA, name + delta)]), packs.Budget()))
        assert list(found) == [name.hex()]
