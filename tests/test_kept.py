"""Kept layers: the same bytes with and without them, whatever state the cache is in."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mosinit import images, init, kept
from mosinit.host import Failure, Host
from tests.recorder import Watched
from tests.test_images import TAR, image, make_tar
from tests.test_publish import snapshot
from tests.test_tars import END, link

Need = Callable[..., None]

LOWER = make_tar({"etc/": b"", "etc/kept": b"kept " * 3000, "etc/gone": b"gone", "usr/": b""})
# What each of these becomes depends on what lies below: an attribute, a file, something to hide.
UPPER = make_tar({"etc/new": b"new " * 3000, "etc/.wh.gone": b""})
LINKING = link("usr/link", "etc/kept") + END
OTHER = make_tar({"etc/": b"", "etc/kept": b"other " * 2000})


@pytest.fixture(autouse=True)
def tools(need: Need) -> None:
    need("mkfs.erofs", "veritysetup", "ldd")


class Counting(Watched):
    """A host that counts how often a file system is made."""

    @property
    def made(self) -> int:
        return sum(words[0] == "mkfs.erofs" for words in self.ran)


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
def cache(counting: Counting, tmp_path: Path) -> kept.Cache:
    folder = kept.open_folder(counting, tmp_path / "cache/layers")
    assert folder
    return kept.Cache(folder, "this maker", reserve=0)


def source(folder: Path, tars: Sequence[bytes]) -> str:
    """Make an image of these layers; returns its name."""
    host, layout = Host(), images.Layout(folder)
    layers = [layout.add_blob(host, gzip.compress(tar, mtime=0), TAR + "+gzip") for tar in tars]
    layout.write_index(host, [image(host, layout, layers, list(tars))])
    return f"oci:{folder}"


def converted(host: Host, name: str, target: Path, cache: kept.Cache | None) -> dict[str, str]:
    """Convert to a new layout; returns the digests of all that is in it."""
    images.convert(host, name, images.Layout(target), cache)
    found = snapshot(target)
    shutil.rmtree(target)
    return found


def same(host: Counting, name: str, tmp_path: Path, cache: kept.Cache) -> int:
    """See that the cache changes nothing; returns how many layers were made in spite of it."""
    plain = converted(Host(), name, tmp_path / "plain", None)
    before = host.made
    assert converted(host, name, tmp_path / "with", cache) == plain
    return host.made - before


# --- What is kept is used, and only where it is the same ----------------------------------------------


def test_what_was_converted_is_not_converted_again(
    counting: Counting, cache: kept.Cache, tmp_path: Path
) -> None:
    name = source(tmp_path / "image", [LOWER, UPPER, LINKING])
    assert same(counting, name, tmp_path, cache) == 3
    assert same(counting, name, tmp_path, cache) == 0
    assert sum("converted before" in line for line in counting.said) == 3
    assert {path.stat().st_mode & 0o777 for path in cache.folder.iterdir()} == {0o600}


def test_a_kept_layer_that_another_needs_is_read(
    counting: Counting, cache: kept.Cache, tmp_path: Path
) -> None:
    """It is not converted once more, and nothing says so."""
    same(counting, source(tmp_path / "one", [LOWER]), tmp_path, cache)
    name = source(tmp_path / "two", [LOWER, UPPER])
    counting.said.clear()
    converted(counting, name, tmp_path / "with", cache)
    first = [line.rpartition(": ")[2] for line in counting.said if "layer 1 of 2" in line]
    assert first == ["converted before", "reading what it holds"]


def test_a_new_layer_over_kept_ones_sees_what_they_hold(
    counting: Counting, cache: kept.Cache, tmp_path: Path
) -> None:
    assert same(counting, source(tmp_path / "one", [LOWER]), tmp_path, cache) == 1
    for tar in (UPPER, LINKING):
        name = source(tmp_path / "two", [LOWER, tar])
        assert same(counting, name, tmp_path, cache) == 1
        shutil.rmtree(tmp_path / "two")


def test_a_layer_over_others_is_another(counting: Counting, cache: kept.Cache, tmp_path: Path) -> None:
    """The same tar, and other bytes: the linked file is another, and there is nothing to hide."""
    for number, stack in enumerate([[LOWER, UPPER, LINKING], [OTHER, UPPER, LINKING], [OTHER, LINKING]]):
        assert same(counting, source(tmp_path / f"{number}", stack), tmp_path, cache) > 0
    with pytest.raises(Failure, match="which is no file before it"):
        images.convert(counting, source(tmp_path / "alone", [LINKING]), images.Layout(tmp_path / "x"), cache)


def test_another_maker_makes_it_anew(counting: Counting, cache: kept.Cache, tmp_path: Path) -> None:
    name = source(tmp_path / "image", [LOWER])
    assert same(counting, name, tmp_path, cache) == 1
    assert same(counting, name, tmp_path, kept.Cache(cache.folder, "another", reserve=0)) == 1


def test_the_maker_is_our_code_and_its_programs(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    one = images._maker(counting)
    assert images._maker(counting) == one
    monkeypatch.setattr(images, "__file__", kept.__file__)
    assert images._maker(counting) != one


def test_a_layer_that_lies_about_its_diff_id_is_refused_all_the_same(
    counting: Counting, cache: kept.Cache, tmp_path: Path
) -> None:
    assert same(counting, source(tmp_path / "good", [LOWER]), tmp_path, cache) == 1
    layout = images.Layout(tmp_path / "bad")
    layer = layout.add_blob(counting, gzip.compress(OTHER), TAR + "+gzip")
    layout.write_index(counting, [image(counting, layout, [layer], [LOWER])])
    with pytest.raises(Failure, match="does not unpack to its diff_id"):
        images.convert(counting, f"oci:{layout.path}", images.Layout(tmp_path / "x"), cache)


def test_a_damaged_source_is_refused_all_the_same(
    counting: Counting, cache: kept.Cache, tmp_path: Path
) -> None:
    name = source(tmp_path / "image", [LOWER])
    assert same(counting, name, tmp_path, cache) == 1
    packed = gzip.compress(LOWER, mtime=0)
    (blob,) = [path for path in (tmp_path / "image/blobs/sha256").iterdir() if path.read_bytes() == packed]
    blob.write_bytes(packed[:-1] + b"x")
    with pytest.raises(Failure, match="is damaged"):
        images.convert(counting, name, images.Layout(tmp_path / "x"), cache)


# --- A cache in a bad state ---------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_content(path: Path) -> None:
    """Put a sound layer file of something else in the place of this one."""
    path.write_bytes(bytes(path.stat().st_size))


def change_record(**changes: object) -> Callable[[Path], None]:
    return lambda path: void(path.write_text(json.dumps(json.loads(path.read_text()) | changes)))


def void(result: object) -> None:
    """Drop a result."""


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Remove the file, and make something else of its name."""

    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a blob with a wrong bit": ("layer", flip),
    "a blob that is another": ("layer", other_content),
    "a blob cut short": ("layer", lambda path: os.truncate(path, 4096)),
    "a blob that goes on": ("layer", lambda path: os.truncate(path, path.stat().st_size + 1)),
    "an empty blob": ("layer", lambda path: os.truncate(path, 0)),
    "no blob": ("layer", Path.unlink),
    "a link for a blob": ("layer", replaced(lambda path: path.symlink_to("/dev/zero"))),
    "a pipe for a blob": ("layer", replaced(os.mkfifo)),
    "no record": ("json", Path.unlink),
    "an empty record": ("json", lambda path: os.truncate(path, 0)),
    "half a record": ("json", lambda path: os.truncate(path, 100)),
    "a record of anything": ("json", lambda path: void(path.write_bytes(b"\xff\0[" * 3000))),
    "a record too deep": ("json", lambda path: void(path.write_text("[" * 4000))),
    "another root hash": ("json", change_record(root_hash=64 * "a")),
    "another digest": ("json", change_record(digest="sha256:" + 64 * "a")),
    "a digest that is a path": ("json", change_record(digest="sha256:../../x")),
    "another size": ("json", change_record(size=1)),
    "the record of another key": ("json", change_record(key="x")),
    "a pipe for a record": ("json", replaced(os.mkfifo)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_made_anew(
    name: str, counting: Counting, cache: kept.Cache, tmp_path: Path
) -> None:
    made = source(tmp_path / "image", [LOWER])
    assert same(counting, made, tmp_path, cache) == 1
    ending, damage = DAMAGE[name]
    (path,) = cache.folder.glob(f"*.{ending}")
    damage(path)
    assert same(counting, made, tmp_path, cache) == 1
    assert same(counting, made, tmp_path, cache) == 0


def test_a_record_of_another_layer_under_this_name_is_not_believed(
    counting: Counting, cache: kept.Cache, tmp_path: Path
) -> None:
    one, two = source(tmp_path / "one", [LOWER]), source(tmp_path / "two", [OTHER])
    assert same(counting, one, tmp_path, cache) == 1
    (first,) = cache.folder.glob("*.json")
    assert same(counting, two, tmp_path, cache) == 1
    (second,) = set(cache.folder.glob("*.json")) - {first}
    shutil.copyfile(second, first)
    assert same(counting, one, tmp_path, cache) == 1


def test_whoever_was_killed_left_nothing_that_counts(
    counting: Counting, cache: kept.Cache, tmp_path: Path
) -> None:
    name = source(tmp_path / "image", [LOWER])
    assert same(counting, name, tmp_path, cache) == 1
    (blob,) = cache.folder.glob("*.layer")
    (record,) = cache.folder.glob("*.json")
    record.unlink()
    blob.rename(cache.folder / ".new-1")
    assert same(counting, name, tmp_path, cache) == 1


@pytest.mark.parametrize("size", ["4k", "40k"])
def test_a_full_disk_keeps_nothing_and_stops_nothing(
    size: str, counting: Counting, cache: kept.Cache, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("a small file system needs root")
    name = source(tmp_path / "image", [make_tar({"random": os.urandom(100_000)}), LOWER])
    counting.mount("tmpfs", str(cache.folder), "tmpfs", init.MountFlag(0), f"size={size},mode=0700")
    try:
        # It says that there is room, as a disk does that others are filling.
        eager = kept.Cache(cache.folder, cache.maker, reserve=-(1 << 40))
        assert same(counting, name, tmp_path, eager) == 2
        assert any("No space left" in line for line in counting.said)
        assert not list(cache.folder.glob(".new-*"))
        counting.said.clear()
        assert same(counting, name, tmp_path, cache) in (1, 2)
        assert not any("No space left" in line for line in counting.said)
    finally:
        counting.unmount(str(cache.folder))


# --- Its bounds, and who may use it -------------------------------------------------------------------


def test_the_oldest_go_first(counting: Counting, cache: kept.Cache, tmp_path: Path) -> None:
    tars = [make_tar({"random": os.urandom(400_000)}) for _ in range(3)]
    names = [source(tmp_path / f"{number}", [tar]) for number, tar in enumerate(tars)]
    small = kept.Cache(cache.folder, cache.maker, limit=1_000_000, reserve=0)
    for number in (0, 1):
        assert same(counting, names[number], tmp_path, small) == 1
        for path in cache.folder.iterdir():
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**12))
    assert same(counting, names[0], tmp_path, small) == 0  # and so it is newer than the other
    assert same(counting, names[2], tmp_path, small) == 1
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 1_000_000
    assert same(counting, names[0], tmp_path, small) == 0
    assert same(counting, names[1], tmp_path, small) == 1


def test_what_is_larger_than_all_pushes_nothing_out(
    counting: Counting, cache: kept.Cache, tmp_path: Path
) -> None:
    small = kept.Cache(cache.folder, cache.maker, limit=200_000, reserve=0)
    assert same(counting, source(tmp_path / "one", [LOWER]), tmp_path, small) == 1
    large = source(tmp_path / "two", [make_tar({"random": os.urandom(400_000)})])
    assert same(counting, large, tmp_path, small) == 1
    assert same(counting, f"oci:{tmp_path}/one", tmp_path, small) == 0


def test_the_end_of_a_disk_is_left_alone(counting: Counting, cache: kept.Cache, tmp_path: Path) -> None:
    greedy = kept.Cache(cache.folder, cache.maker, reserve=1 << 60)
    assert same(counting, source(tmp_path / "image", [LOWER]), tmp_path, greedy) == 1
    assert list(cache.folder.iterdir()) == []


def test_a_folder_that_others_may_write_is_not_used(counting: Counting, tmp_path: Path) -> None:
    folder = tmp_path / "cache/layers"
    assert kept.open_folder(counting, folder) == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    assert kept.open_folder(counting, folder) is None
    assert f"chmod 700 {folder}" in counting.said[-1]
    folder.rename(tmp_path / "cache/else")
    folder.symlink_to(tmp_path / "cache/else")
    (tmp_path / "cache/else").chmod(0o700)
    assert kept.open_folder(counting, folder) is None
    (tmp_path / "file").touch()
    assert kept.open_folder(counting, tmp_path / "file/layers") is None
    assert counting.said[-1].endswith("layers keeps no layers: File exists")


def test_a_folder_of_somebody_else_is_not_used(counting: Counting, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("to give a folder away needs root")
    (tmp_path / "layers").mkdir(mode=0o700)
    os.chown(tmp_path / "layers", 1234, 1234)
    assert kept.open_folder(counting, tmp_path / "layers") is None
