"""OCI layouts and verity layers: against veritysetup, fsck.erofs and skopeo, and twice the same."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosinit import images, init, trees
from mosinit.host import Failure, Host

Need = Callable[..., None]
TAR = "application/vnd.oci.image.layer.v1.tar"
ZEROS = "sha256:" + 64 * "0"


@pytest.fixture(autouse=True)
def tools(need: Need) -> None:
    need("mkfs.erofs", "veritysetup", "zstd")


# A static program of x86-64, as far as its header goes: elf(5).
PROGRAM = struct.pack("<4s14xH12xQ14xHH", b"\x7fELF", 62, 64, 56, 0).ljust(64, b"\0")


def make_tar(files: dict[str, bytes], *, padding: int = 0) -> bytes:
    """Make a tar of files, the last byte of a name telling kinds: `/` a folder, `@` a link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name.rstrip("/@"))
            entry.mode = 0o755
            if name.endswith("/"):
                entry.type = tarfile.DIRTYPE
            elif name.endswith("@"):
                entry.type, entry.linkname = tarfile.SYMTYPE, content.decode()
            else:
                entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue() + bytes(padding)


def linked(name: str, target: str) -> bytes:
    """Make an entry that is a hard link."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.LNKTYPE, target
    return entry.tobuf()


TREE = make_tar({"usr/": b"", "usr/bin/hello": b"hello " * 9000, "bin@": b"usr/bin", "etc/.wh.gone": b""})


def put(host: Host, layout: images.Layout, document: object, kind: str) -> images.Descriptor:
    return layout.add_blob(host, json.dumps(document).encode(), kind)


def image(
    host: Host, layout: images.Layout, layers: list[images.Descriptor], tars: list[bytes]
) -> images.Descriptor:
    """Add an image of these layers, whose config lists the digests of these tars."""
    ids = [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars]
    config = put(
        host, layout, {"os": "linux", "rootfs": {"type": "layers", "diff_ids": ids}}, images.CONFIG_TYPE
    )
    manifest = {
        "schemaVersion": 2,
        "mediaType": images.MANIFEST_TYPE,
        "config": config.json(),
        "layers": [layer.json() for layer in layers],
    }
    return put(host, layout, manifest, images.MANIFEST_TYPE)


def plain(host: Host, folder: Path, content: bytes = TREE, kind: str = TAR, tar: bytes = TREE) -> Path:
    """Make a layout with one image of one layer."""
    layout = images.Layout(folder)
    layout.write_index(host, [image(host, layout, [layout.add_blob(host, content, kind)], [tar])])
    return folder


def fits(path: Path, root_hash: str) -> bool:
    size = str(init.verity_data_blocks(path.stat().st_size) * init.BLOCK)
    command = ["veritysetup", "verify", "--hash-offset", size, str(path), str(path), root_hash]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# --- The environment ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("SOURCE_DATE_EPOCH", "1650000000"), ("SOURCE_DATE_EPOCH", "junk"), ("TZ", "Asia/Tokyo")],
)
def test_the_environment_of_whoever_publishes_changes_nothing(
    name: str, value: str, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in (1600000000, 1700000000):
            entry = tarfile.TarInfo(f"of-{number}")
            entry.mtime = number
            archive.addfile(entry)
    tar = buffer.getvalue()
    source = plain(host, tmp_path / "source", tar=tar, content=tar)
    one = images.convert(host, f"oci:{source}", images.Layout(tmp_path / "one"))
    (tmp_path / "tree.tar").write_bytes(tar)
    images.make_erofs(host, tmp_path / "tree.tar", tmp_path / "one.erofs")
    monkeypatch.setenv(name, value)
    two = images.convert(host, f"oci:{source}", images.Layout(tmp_path / "two"))
    images.make_erofs(host, tmp_path / "tree.tar", tmp_path / "two.erofs")
    assert one == two
    assert (tmp_path / "one.erofs").read_bytes() == (tmp_path / "two.erofs").read_bytes()


def test_programs_see_nothing_of_the_environment(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what nobody thinks of today: OPENSSL_CONF, LD_LIBRARY_PATH, a variable of a later release."""
    monkeypatch.setenv("MOSINIT_STRANGER", "1")
    seen: list[tuple[object, object]] = []

    class Recorder(Host):
        def run(self, command: object, **options: object) -> bytes:
            seen.append((command, options.get("env")))
            return super().run(command, **options)  # type: ignore[arg-type]

        @contextlib.contextmanager
        def pipe(self, command: object, **options: object) -> Iterator[IO[bytes]]:
            seen.append((command, options.get("env")))
            with super().pipe(command, **options) as end:  # type: ignore[arg-type]
                yield end

    packed = subprocess.run(["zstd", "-qc"], input=TREE, capture_output=True, check=True).stdout
    source = plain(host, tmp_path / "source", packed, f"{TAR}+zstd")
    images.convert(Recorder(), f"oci:{source}", images.Layout(tmp_path / "out"))
    assert len(seen) >= 3
    for command, environment in seen:
        assert isinstance(environment, dict), command
        assert set(environment) <= {"PATH", "LC_ALL", "TZ", "TMPDIR"}, command


# --- Layouts ------------------------------------------------------------------------------------------


def test_a_blob_is_stored_once_and_read_back(host: Host, tmp_path: Path) -> None:
    layout = images.Layout(tmp_path / "layout")
    (tmp_path / "file").write_bytes(b"content")
    first = layout.add_blob(host, b"content", "text/plain")
    assert layout.add_blob(host, tmp_path / "file", "text/plain") == first
    assert layout.read_blob(first) == b"content"
    assert [path.name for path in (layout.path / "blobs/sha256").iterdir()] == [first.digest[7:]]


def test_a_damaged_blob_is_refused_and_written_anew(host: Host, tmp_path: Path) -> None:
    layout = images.Layout(tmp_path)
    blob = layout.add_blob(host, b"content", "text/plain")
    layout.blob_path(blob.digest).write_bytes(b"contenT")
    with pytest.raises(Failure, match="is damaged"):
        layout.read_blob(blob)
    layout.blob_path(blob.digest).write_bytes(b"content and more")
    with pytest.raises(Failure, match="not 7 bytes long"):
        layout.read_blob(blob)
    layout.add_blob(host, b"content", "text/plain")
    assert layout.read_blob(blob) == b"content"


@pytest.mark.parametrize(
    "digest", ["sha256:../../../etc/passwd", "sha512:" + 128 * "0", "sha256:" + 64 * "A", ""]
)
def test_a_digest_that_is_none_never_becomes_a_path(digest: str, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="only sha256 digests"):
        images.Layout(tmp_path).read_blob(images.Descriptor("text/plain", digest, 1))


def test_documents_are_bounded(host: Host, tmp_path: Path) -> None:
    layout = images.Layout(tmp_path)
    with pytest.raises(Failure, match="larger than 4 MiB"):
        layout.read_blob(images.Descriptor("text/plain", ZEROS, images.DOCUMENT_LIMIT + 1))
    (tmp_path / "index.json").write_bytes(b" " * (images.DOCUMENT_LIMIT + 1))
    with pytest.raises(Failure, match="larger than 4 MiB"):
        layout.read_index()


def test_an_index_reads_back(host: Host, tmp_path: Path) -> None:
    layout = images.Layout(tmp_path)
    listed = [
        images.Descriptor("a/b", ZEROS, 3, "c/d", {"key": "value"}),
        images.Descriptor("a/b", ZEROS, 4),
    ]
    layout.write_index(host, listed)
    assert list(layout.read_index()) == listed
    with pytest.raises(Failure, match="no OCI image layout"):
        images.Layout(tmp_path / "elsewhere").read_index()


# --- Conversion ---------------------------------------------------------------------------------------


def host_zstd(content: bytes) -> bytes:
    """Return a content packed by zstd, or something that fails like it where there is none."""
    if not shutil.which("zstd"):
        return content
    return subprocess.run(["zstd", "-q", "-c"], input=content, capture_output=True, check=True).stdout


PACKED = {
    TAR: TREE,
    TAR + "+gzip": gzip.compress(TREE),
    TAR + "+zstd": b"zstd",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": gzip.compress(TREE),
}


@pytest.mark.parametrize("kind", PACKED)
def test_however_it_is_packed_the_layer_is_the_same(kind: str, host: Host, tmp_path: Path) -> None:
    content = PACKED[kind]
    if content == b"zstd":
        content = host.run(["zstd", "-q", "-c"], stdin=TREE)
    one = images.convert(host, f"oci:{plain(host, tmp_path / 'a')}", images.Layout(tmp_path / "one"))
    two = images.convert(
        host, f"oci:{plain(host, tmp_path / 'far/away', content, kind)}", images.Layout(tmp_path / "two")
    )
    assert one == two
    assert len(two.layers) == 1


def test_veritysetup_agrees_with_each_layer(host: Host, tmp_path: Path) -> None:
    layout = images.Layout(tmp_path / "converted")
    converted = images.convert(host, f"oci:{plain(host, tmp_path / 'plain')}", layout)
    (layer,) = init.parse_image(layout.read_blob(converted.manifest)).layers
    path = layout.blob_path(layer.digest)
    assert (layer.size, layer.root_hash) == (path.stat().st_size, converted.layers[0].root_hash)
    assert fits(path, layer.root_hash)
    data = path.read_bytes()
    salt = init.parse_verity_salt(
        data[(blocks := init.verity_data_blocks(len(data))) * init.BLOCK :], blocks
    )
    assert salt == hashlib.sha256(data[: blocks * init.BLOCK]).hexdigest()
    for offset in (0, 1024, blocks * init.BLOCK - 1):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        assert not fits(path, layer.root_hash)


def test_the_layer_holds_what_the_tar_held(host: Host, need: Need, tmp_path: Path) -> None:
    need("fsck.erofs", "dump.erofs")
    layout = images.Layout(tmp_path / "converted")
    converted = images.convert(host, f"oci:{plain(host, tmp_path / 'plain')}", layout)
    path = layout.blob_path(converted.layers[0].descriptor.digest)
    subprocess.run(
        ["fsck.erofs", f"--extract={tmp_path}/out", "--no-preserve", path], capture_output=True, check=False
    )
    assert (tmp_path / "out/usr/bin/hello").read_bytes() == b"hello " * 9000
    assert os.readlink(tmp_path / "out/bin") == "usr/bin"


def test_the_config_is_kept(host: Host, tmp_path: Path) -> None:
    source, layout = images.Layout(plain(host, tmp_path / "plain")), images.Layout(tmp_path / "converted")
    images.convert(host, f"oci:{source.path}", layout)
    (listed,) = source.read_index()
    config = json.loads(source.read_blob(listed))["config"]["digest"]
    assert layout.blob_path(config).read_bytes() == source.blob_path(config).read_bytes()


def test_an_image_of_verity_layers_passes_unchanged(host: Host, tmp_path: Path) -> None:
    once, twice = images.Layout(tmp_path / "once"), images.Layout(tmp_path / "twice")
    layers = images.convert(host, f"oci:{plain(host, tmp_path / 'plain')}", once).layers
    # In its author's own way of writing JSON: the digest of a manifest counts, not its meaning.
    manifest = image(host, once, [layer.descriptor for layer in layers], [TREE])
    once.write_index(host, [manifest])
    assert images.convert(host, f"oci:{once.path}", twice) == images.ConvertedImage(manifest, layers)


def test_a_layer_that_lies_about_its_root_hash_is_refused(host: Host, tmp_path: Path) -> None:
    layout = images.Layout(tmp_path / "once")
    first = images.convert(host, f"oci:{plain(host, tmp_path / 'plain')}", layout)
    layer = first.layers[0].descriptor
    liar = images.Descriptor(
        layer.media_type, layer.digest, layer.size, annotations={images.ROOT_HASH: 64 * "a"}
    )
    layout.write_index(host, [image(host, layout, [liar], [TREE])])
    with pytest.raises(Failure, match="veritysetup failed"):
        images.convert(host, f"oci:{layout.path}", images.Layout(tmp_path / "twice"))


def test_a_uki_is_carried_along(host: Host, tmp_path: Path) -> None:
    source, layout = images.Layout(tmp_path / "source"), images.Layout(tmp_path / "converted")
    uki = source.add_blob(host, b"MZ", init.UKI_MEDIA_TYPE)
    tar = source.add_blob(host, TREE, TAR)
    source.write_index(host, [image(host, source, [tar, uki], [TREE, b""])])
    converted = images.convert(host, f"oci:{source.path}", layout)
    assert len(converted.layers) == 1
    assert layout.read_blob(uki) == b"MZ"
    assert uki.json() in json.loads(layout.read_blob(converted.manifest))["layers"]


def test_a_layer_must_unpack_to_what_the_config_says(host: Host, tmp_path: Path) -> None:
    source = plain(host, tmp_path / "plain", tar=TREE + b"x")
    with pytest.raises(Failure, match="diff_id"):
        images.convert(host, f"oci:{source}", images.Layout(tmp_path / "converted"))


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"x" + TREE, TAR + "+gzip", "not the gzip file"),
        (gzip.compress(TREE)[:-9], TAR + "+gzip", "not the gzip file"),
        (b"x" + TREE, TAR + "+zstd", "zstd failed"),
        (host_zstd(TREE)[:-20], TAR + "+zstd", "zstd failed"),
        (gzip.compress(TREE) + b"garbage", TAR + "+gzip", "not the gzip file"),
        (gzip.compress(TREE + bytes(512)), TAR + "+gzip", "diff_id"),
        (TREE + bytes(512), TAR, "diff_id"),
        (TREE, "application/vnd.example.unknown", "cannot convert"),
    ],
)
def test_what_cannot_be_converted_is_named(
    content: bytes, kind: str, message: str, host: Host, tmp_path: Path
) -> None:
    source = plain(host, tmp_path / "plain", content, kind)
    with pytest.raises(Failure, match=message):
        images.convert(host, f"oci:{source}", images.Layout(tmp_path / "converted"))


def test_nothing_temporary_is_left(host: Host, tmp_path: Path) -> None:
    layout = images.Layout(tmp_path / "new/converted")
    layout.path.parent.mkdir()
    images.convert(host, f"oci:{plain(host, tmp_path / 'plain')}", layout)
    assert [path.name for path in layout.path.parent.iterdir()] == ["converted"]
    assert not list(layout.path.rglob(".*"))


# --- Choosing an image --------------------------------------------------------------------------------


def test_a_tag_chooses_among_images(host: Host, tmp_path: Path) -> None:
    layout = images.Layout(tmp_path / "with:colon/layout")
    other = make_tar({"other": b"1"})
    listed = []
    for tag, tar in (("first", TREE), ("second", other)):
        made = image(host, layout, [layout.add_blob(host, tar, TAR)], [tar])
        listed.append(
            images.Descriptor(made.media_type, made.digest, made.size, annotations={images.REF_NAME: tag})
        )
    layout.write_index(host, listed)
    target = images.Layout(tmp_path / "converted")
    first, second = (images.convert(host, f"oci:{layout.path}:{tag}", target) for tag in ("first", "second"))
    assert first.manifest != second.manifest
    for name in (str(layout.path), f"{layout.path}:third"):
        with pytest.raises(Failure, match="name one of first, second"):
            images.convert(host, f"oci:{name}", target)


def test_of_several_platforms_ours_is_taken(host: Host, tmp_path: Path) -> None:
    layout = images.Layout(tmp_path / "source")
    entries = []
    for architecture, tar in (("arm64", make_tar({"arm": b"1"})), ("amd64", TREE)):
        made = image(host, layout, [layout.add_blob(host, tar, TAR)], [tar])
        entries.append({**made.json(), "platform": {"os": "linux", "architecture": architecture}})
    index = {"schemaVersion": 2, "mediaType": images.INDEX_TYPE, "manifests": entries}
    layout.write_index(host, [put(host, layout, index, images.INDEX_TYPE)])
    expected = images.convert(
        host, f"oci:{plain(host, tmp_path / 'plain')}", images.Layout(tmp_path / "one")
    )
    assert images.convert(host, f"oci:{layout.path}", images.Layout(tmp_path / "two")) == expected
    layout.write_index(host, [put(host, layout, {**index, "manifests": entries[:1]}, images.INDEX_TYPE)])
    with pytest.raises(Failure, match="0 images for linux/amd64"):
        images.convert(host, f"oci:{layout.path}", images.Layout(tmp_path / "two"))


def test_skopeo_reads_what_we_write(host: Host, need: Need, tmp_path: Path) -> None:
    need("skopeo")
    layout = images.Layout(tmp_path / "converted")
    converted = images.convert(host, f"oci:{plain(host, tmp_path / 'plain')}", layout)
    layout.write_index(host, [converted.manifest])
    assert host.run(["skopeo", "inspect", "--raw", f"oci:{layout.path}"]) == layout.read_blob(
        converted.manifest
    )
    host.run(["skopeo", "copy", "--all", "--preserve-digests", f"oci:{layout.path}", f"oci:{tmp_path}/copy"])
    for path in (layout.path / "blobs/sha256").iterdir():
        assert (tmp_path / "copy/blobs/sha256" / path.name).read_bytes() == path.read_bytes()


# --- Folders ------------------------------------------------------------------------------------------


def test_a_folder_gives_the_same_layer_wherever_it_comes_from(host: Host, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "deep/two"
    (one / "usr/lib").mkdir(parents=True)
    (one / "usr/lib/b").write_bytes(b"content")
    (one / "usr/lib/a").write_bytes(b"content")
    (one / "lib").symlink_to("usr/lib")
    shutil.copytree(one, two, symlinks=True)
    (two / "usr/lib/a").unlink()
    os.link(two / "usr/lib/b", two / "usr/lib/a")
    os.utime(two / "usr/lib/b", (1, 1))
    layers = [
        images.tree_layer(host, folder, images.Layout(tmp_path / f"layout{index}"))
        for index, folder in enumerate((one, two))
    ]
    assert layers[0] == layers[1]
    path = images.Layout(tmp_path / "layout0").blob_path(layers[0].digest)
    assert fits(path, layers[0].annotations[images.ROOT_HASH])
    (two / "usr/lib/b").chmod(0o600)
    assert images.tree_layer(host, two, images.Layout(tmp_path / "layout1")) != layers[0]


def test_whoever_owns_the_folder_root_owns_the_layer(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    if os.geteuid() == 0:
        os.chown(tmp_path / "file", 1234, 1234)
    buffer = io.BytesIO()
    images.write_tar(tmp_path, buffer, prefix="in/")
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive:
        entries = archive.getmembers()
    assert [os.path.normpath(entry.name) for entry in entries] == ["in", "in/file"]
    assert {(entry.uid, entry.gid, entry.uname, entry.mtime) for entry in entries} == {(0, 0, "", 0)}


def test_the_smallest_tree_has_a_valid_layer(host: Host, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    layout = images.Layout(tmp_path / "layout")
    layer = images.tree_layer(host, tmp_path / "empty", layout)
    assert fits(layout.blob_path(layer.digest), layer.annotations[images.ROOT_HASH])


# --- Docker archives, layers of stacker ---------------------------------------------------------------


def docker_archive(path: Path, layers: list[bytes]) -> None:
    """Write what `docker save` writes."""
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    ids = [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in layers]
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": ids}}
    listing = [{"Config": "config.json", "RepoTags": ["example/app:1"], "Layers": names}]
    files = {"manifest.json": json.dumps(listing).encode(), "config.json": json.dumps(config).encode()}
    path.write_bytes(make_tar(files | dict(zip(names, layers, strict=True))))


def test_a_docker_archive_gives_the_layers_of_its_tars(host: Host, need: Need, tmp_path: Path) -> None:
    need("skopeo")
    upper = make_tar({"etc/": b"", "etc/upper": b"upper"})
    docker_archive(tmp_path / "saved.tar", [TREE, upper])
    layout = images.Layout(tmp_path / "one")
    converted = images.convert(host, f"docker-archive:{tmp_path}/saved.tar", layout)
    expected = images.convert(
        host, f"oci:{plain(host, tmp_path / 'plain')}", images.Layout(tmp_path / "two")
    )
    assert converted.layers[0] == expected.layers[0]
    assert len(converted.layers) == 2
    named = images.convert(host, f"docker-archive:{tmp_path}/saved.tar:example/app:1", layout)
    assert named == converted
    with pytest.raises(Failure, match="is no file"):
        images.convert(host, f"docker-archive:{tmp_path}/absent.tar", layout)


def squashfs(host: Host, folder: Path, target: Path) -> str:
    """Make what stacker makes of a folder: squashfs and verity data with a random salt."""
    host.run(["mksquashfs", folder, target, "-comp", "zstd", "-noappend", "-quiet"])
    size = target.stat().st_size
    assert size % 4096 == 0
    told = host.run(
        ["veritysetup", "format", "--data-block-size=4096", "--hash-block-size=4096",
         f"--data-blocks={size // 4096}", f"--hash-offset={size}", target, target]
    ).decode()  # fmt: skip
    return next(line.split()[-1] for line in told.splitlines() if line.startswith("Root hash"))


STACKER_TYPE = "application/vnd.stacker.image.layer.squashfs+zstd"


@pytest.mark.parametrize("name", init.ROOT_HASH_ANNOTATIONS)
@pytest.mark.parametrize("suffix", ["", "+verity"])
def test_layers_of_stacker_pass_unchanged(
    name: str, suffix: str, host: Host, need: Need, tmp_path: Path
) -> None:
    need("mksquashfs")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"content" * 9999)
    root_hash = squashfs(host, tmp_path / "tree", tmp_path / "layer")
    source, target = images.Layout(tmp_path / "source"), images.Layout(tmp_path / "target")
    layer = source.add_blob(host, tmp_path / "layer", STACKER_TYPE + suffix, annotations={name: root_hash})
    listed = image(host, source, [layer], [b"anything"])
    source.write_index(host, [listed])
    converted = images.convert(host, f"oci:{source.path}", target)
    assert converted == images.ConvertedImage(listed, (images.VerityLayer(layer, root_hash),))
    assert target.blob_path(layer.digest).read_bytes() == (tmp_path / "layer").read_bytes()
    (parsed,) = init.parse_image(target.read_blob(converted.manifest)).layers
    assert (parsed.root_hash, parsed.size) == (root_hash, layer.size)


@pytest.mark.parametrize("place", ["first block", "last data block", "superblock", "tree", "cut", "longer"])
def test_a_damaged_layer_of_stacker_is_refused(place: str, host: Host, need: Need, tmp_path: Path) -> None:
    need("mksquashfs")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(os.urandom(700_000))
    root_hash = squashfs(host, tmp_path / "tree", tmp_path / "layer")
    data = (tmp_path / "layer").read_bytes()
    end = init.verity_data_blocks(len(data)) * 4096
    flip = {"first block": 100, "last data block": end - 1, "superblock": end + 100, "tree": end + 4096 + 5}
    if place in flip:
        at = flip[place]
        data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    else:
        data = data[:-4096] if place == "cut" else data + bytes(4096)
    source = images.Layout(tmp_path / "source")
    layer = source.add_blob(host, data, STACKER_TYPE, annotations={images.ROOT_HASH: root_hash})
    source.write_index(host, [image(host, source, [layer], [b"anything"])])
    with pytest.raises((Failure, init.Refused)):
        images.convert(host, f"oci:{source.path}", images.Layout(tmp_path / "target"))


@pytest.mark.parametrize(
    ("kind", "annotations", "message"),
    [
        (STACKER_TYPE, {}, "build it with a verity root hash"),
        (STACKER_TYPE, {images.ROOT_HASH: "--help"}, "no root hash"),
        (STACKER_TYPE, {images.ROOT_HASH: 64 * "A"}, "no root hash"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", {}, "foreign layer"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", {}, "foreign layer"),
    ],
)
def test_layers_that_are_elsewhere_or_unverified(
    kind: str, annotations: dict[str, str], message: str, host: Host, tmp_path: Path
) -> None:
    source = images.Layout(tmp_path / "source")
    layer = source.add_blob(host, TREE, kind, annotations=annotations)
    source.write_index(host, [image(host, source, [layer], [TREE])])
    with pytest.raises(Failure, match=message):
        images.convert(host, f"oci:{source.path}", images.Layout(tmp_path / "target"))


def test_verity_over_what_no_machine_mounts_is_refused(host: Host, tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(b"ext4" * 4096)
    root_hash = images.append_verity(host, tmp_path / "layer", salt="00", name=64 * "0")
    source = images.Layout(tmp_path / "source")
    layer = source.add_blob(host, tmp_path / "layer", "a/b", annotations={images.ROOT_HASH: root_hash})
    source.write_index(host, [image(host, source, [layer], [b""])])
    with pytest.raises(init.Refused, match="LAYER-FILESYSTEM"):
        images.convert(host, f"oci:{source.path}", images.Layout(tmp_path / "target"))


def test_over_a_verity_layer_a_tar_lists_its_folders(host: Host, tmp_path: Path) -> None:
    source = images.Layout(tmp_path / "once")
    below = images.convert(host, f"oci:{plain(host, tmp_path / 'plain')}", source).layers[0].descriptor
    for tar, message in (
        (make_tar({"new/": b"", "new/a": b"a"}), ""),
        (make_tar({"new/a": b"a"}), "not list"),
    ):
        layers = [below, source.add_blob(host, tar, TAR)]
        source.write_index(host, [image(host, source, layers, [TREE, tar])])
        target = images.Layout(tmp_path / "twice")
        if not message:
            assert images.convert(host, f"oci:{source.path}", target).layers[0].descriptor == below
            continue
        with pytest.raises(Failure, match=message):
            images.convert(host, f"oci:{source.path}", target)


def test_a_file_system_of_fewer_files_is_noticed(host: Host, tmp_path: Path) -> None:
    """Premise: mkfs.erofs takes two blocks of zeros for the end, and is content."""
    (tmp_path / "tar").write_bytes(make_tar({"a": b""})[:512] + bytes(1024) + make_tar({"b": b""}))
    images.make_erofs(host, tmp_path / "tar", tmp_path / "erofs")
    images._check_count(tmp_path / "erofs", 2, "layer")
    with pytest.raises(Failure, match="made 2 of 3 files"):
        images._check_count(tmp_path / "erofs", 3, "layer")


@pytest.mark.parametrize("packing", ["+gzip", "+zstd"])
def test_a_bomb_is_not_unpacked(packing: str, host: Host, tmp_path: Path) -> None:
    layout, bomb = images.Layout(tmp_path / "layout"), bytes(8 << 20)
    packed = gzip.compress(bomb) if packing == "+gzip" else host_zstd(bomb)
    layer = layout.add_blob(host, packed, TAR + packing)
    (tmp_path / "work").mkdir()
    job = images.LayerJob(host, layout, layer, ZEROS, "layer 1", tmp_path / "work/1")
    stack = trees.Image(trees.Limits(content=2 << 20))
    stack.spend(content=1 << 20)
    with pytest.raises(Failure, match="unpacks to more than an image may"):
        images._unpack(job, layout.blob_path(layer.digest), stack)
    assert [path.stat().st_size <= 1 << 20 for path in (tmp_path / "work").iterdir()] == [True]


def test_a_layer_that_is_listed_twice_is_unpacked_once(host: Host, tmp_path: Path) -> None:
    layout, diff_id = images.Layout(tmp_path / "layout"), f"sha256:{hashlib.sha256(TREE).hexdigest()}"
    layer = layout.add_blob(host, gzip.compress(TREE), TAR + "+gzip")
    (tmp_path / "work").mkdir()
    below, target = images.Below(None, None), images.Layout(tmp_path / "target")
    first = images.LayerJob(host, layout, layer, diff_id, "layer 1", tmp_path / "work/1")
    one = images._convert_layer(first, below, target)
    (tar,) = (tmp_path / "work").iterdir()
    tar.touch()
    before = tar.stat()
    second = images.LayerJob(host, layout, layer, diff_id, "layer 2", tmp_path / "work/2")
    assert images._convert_layer(second, below, target) == one
    assert [path.stat() for path in (tmp_path / "work").iterdir()] == [before]
    third = images.LayerJob(host, layout, layer, ZEROS, "layer 3", tmp_path / "work/3")
    with pytest.raises(Failure, match="does not unpack to its diff_id"):
        images._convert_layer(third, below, target)


def test_an_unpacked_layer_that_no_other_can_need_goes_at_once(host: Host, tmp_path: Path) -> None:
    layout, tar = images.Layout(tmp_path / "layout"), make_tar({"a/": b"", "b@": b"a", "empty": b""})
    layer = layout.add_blob(host, gzip.compress(tar), TAR + "+gzip")
    (tmp_path / "work").mkdir()
    below, target = images.Below(None, None), images.Layout(tmp_path / "target")
    diff_id = f"sha256:{hashlib.sha256(tar).hexdigest()}"
    job = images.LayerJob(host, layout, layer, diff_id, "layer 1", tmp_path / "work/1")
    images._convert_layer(job, below, target)
    assert not list((tmp_path / "work").iterdir())
    # The empty file of the layer whose tar is gone still has its names.
    upper = linked("again", "empty") + bytes(1024)
    blob = layout.add_blob(host, upper, TAR)
    job = images.LayerJob(host, layout, blob, blob.digest, "layer 2", tmp_path / "work/2")
    assert images._convert_layer(job, below, target)
    assert layout.blob_path(blob.digest).is_file()


# --- Documents that do not mean well ------------------------------------------------------------------


def change(host: Host, layout: images.Layout, which: str, changes: dict[str, object]) -> None:
    """Change the manifest or config of a layout's only image, and every digest above it."""
    (listed,) = layout.read_index()
    manifest = json.loads(layout.read_blob(listed))
    if which == "config":
        config = images.Descriptor(
            images.CONFIG_TYPE, manifest["config"]["digest"], manifest["config"]["size"]
        )
        document = json.loads(layout.read_blob(config)) | changes
        manifest["config"] = put(host, layout, document, images.CONFIG_TYPE).json()
    elif which == "layer":
        manifest["layers"][0] |= changes
    else:
        manifest |= changes
    layout.write_index(host, [put(host, layout, manifest, images.MANIFEST_TYPE)])


@pytest.mark.parametrize(
    ("which", "changes", "message"),
    [
        ("config", {"architecture": "arm64"}, "is for linux/arm64"),
        ("config", {"os": "windows"}, "is for windows/amd64"),
        ("config", {"rootfs": {"type": "layers", "diff_ids": []}}, "does not list its 1 layers"),
        ("config", {"rootfs": []}, "does not list its 1 layers"),
        ("config", {"rootfs": {"diff_ids": [7]}}, "diff_id"),
        ("layer", {"urls": ["https://example.com/layer"]}, "foreign layer"),
        ("manifest", {"mediaType": images.INDEX_TYPE}, "says another"),
        ("manifest", {"mediaType": ["a"]}, "says another"),
        ("manifest", {"manifests": []}, "both an index and an image"),
        ("manifest", {"schemaVersion": 1}, "IMAGE-FORMAT"),
        ("manifest", {"layers": {}}, "IMAGE-FORMAT"),
        ("manifest", {"config": None}, "IMAGE-FORMAT"),
    ],
)
def test_documents_that_contradict_are_refused(
    which: str, changes: dict[str, object], message: str, host: Host, tmp_path: Path
) -> None:
    layout = images.Layout(plain(host, tmp_path / "plain"))
    change(host, layout, which, changes)
    with pytest.raises((Failure, init.Refused), match=message):
        images.convert(host, f"oci:{layout.path}", images.Layout(tmp_path / "target"))


def test_a_tar_layer_needs_a_config_that_lists_it(host: Host, tmp_path: Path) -> None:
    layout = images.Layout(plain(host, tmp_path / "plain"))
    empty = layout.add_blob(host, b"{}", images.EMPTY_TYPE)
    change(host, layout, "manifest", {"config": empty.json()})
    with pytest.raises(Failure, match="has no diff_id"):
        images.convert(host, f"oci:{layout.path}", images.Layout(tmp_path / "target"))


def test_indexes_nest_a_little(host: Host, tmp_path: Path) -> None:
    layout = images.Layout(plain(host, tmp_path / "plain"))
    (listed,) = layout.read_index()
    entry: dict[str, object] = {**listed.json(), "platform": {"os": "linux", "architecture": "amd64"}}
    attestation = {**listed.json(), "platform": {"os": "unknown", "architecture": "unknown"}}
    for depth in range(1, images.INDEX_DEPTH + 1):
        index = {"schemaVersion": 2, "mediaType": images.INDEX_TYPE, "manifests": [entry, attestation]}
        nested = put(host, layout, index, images.INDEX_TYPE)
        layout.write_index(host, [nested])
        entry = dict(nested.json())
        target = images.Layout(tmp_path / "target")
        if depth < images.INDEX_DEPTH:
            assert images.convert(host, f"oci:{layout.path}", target)
            continue
        with pytest.raises(Failure, match="more than 3 deep"):
            images.convert(host, f"oci:{layout.path}", target)


def test_layers_are_counted(host: Host, tmp_path: Path) -> None:
    layout = images.Layout(tmp_path / "source")
    layer = layout.add_blob(host, TREE, TAR)
    many = images.LAYER_LIMIT + 1
    layout.write_index(host, [image(host, layout, [layer] * many, [TREE] * many)])
    with pytest.raises(Failure, match="257 layers, more than 256"):
        images.convert(host, f"oci:{layout.path}", images.Layout(tmp_path / "target"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["schemaVersion", "mediaType", "config", "layers", "manifests", "annotations", "urls", "digest", "size",
     "platform", "rootfs", "diff_ids", "os", "architecture"]
)  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    which=st.sampled_from(["manifest", "config", "layer"]),
    changes=st.dictionaries(KEYS, JSON, min_size=1, max_size=2),
)
def test_no_document_crashes_the_conversion(
    which: str, changes: dict[str, object], host: Host, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("json")
    layout = images.Layout(plain(host, folder / "plain"))
    try:
        change(host, layout, which, changes)
        assert images.convert(host, f"oci:{layout.path}", images.Layout(folder / "target")).layers
    except (Failure, init.Refused) as error:
        assert str(error)
    shutil.rmtree(folder)


# --- Size ---------------------------------------------------------------------------------------------

CONVERT = r"""
import re, resource, sys
from pathlib import Path
from mosinit import host, images
images.convert(host.Host(), sys.argv[1], images.Layout(Path(sys.argv[2])))
# Not ru_maxrss of this process: that one counts what its parent had before it became this program.
own = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_a_large_image_takes_little_memory(host: Host, tmp_path: Path) -> None:
    """Of 400 MiB. Measured with 4 GiB of zeros it is the same; that takes twenty seconds."""
    size = 400 << 20
    entry = tarfile.TarInfo("zeros")
    entry.size = size
    hasher = hashlib.sha256()
    with gzip.open(tmp_path / "tar.gz", "wb", compresslevel=1) as packed:
        for chunk in (entry.tobuf(), *[bytes(1 << 20)] * 400, bytes(1024)):
            packed.write(chunk)
            hasher.update(chunk)
    layout = images.Layout(tmp_path / "source")
    layer = layout.add_blob(host, tmp_path / "tar.gz", TAR + "+gzip")
    layout.write_index(host, [image(host, layout, [layer], [b""])])
    change(host, layout, "config", {"rootfs": {"diff_ids": [f"sha256:{hasher.hexdigest()}"]}})
    root = Path(images.__file__).parent.parent
    told = host.run(
        [sys.executable, "-c", CONVERT, f"oci:{layout.path}", tmp_path / "target"],
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert max(int(kib) for kib in told.split()) < 128 << 10


def test_a_full_disk_leaves_nothing(host: Host, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a small file system needs root")
    (tmp_path / "small").mkdir()
    host.mount("tmpfs", str(tmp_path / "small"), "tmpfs", init.MountFlag(0), "size=1m")
    try:
        content = make_tar({"random": os.urandom(3 << 20)})
        source = plain(host, tmp_path / "plain", gzip.compress(content), TAR + "+gzip", content)
        layout = images.Layout(tmp_path / "small/target")
        with pytest.raises(Failure, match="is full"):
            images.convert(host, f"oci:{source}", layout)
        assert not [path for path in layout.path.parent.iterdir() if path.name.startswith(".")]
    finally:
        host.unmount(str(tmp_path / "small"))


# --- Whoever can write the source, meanwhile ----------------------------------------------------------


class Meddler(Host):
    """A host on which somebody acts at each message."""

    def __init__(self, act: Callable[[str], None]) -> None:
        super().__init__()
        self._act = act

    def say(self, text: str) -> None:
        self._act(text)

    def run(self, command: object, **options: object) -> bytes:
        self._act(str(command))
        return super().run(command, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("when", ["converting", "making its file system"])
def test_a_source_that_changes_is_what_was_checked_or_refused(when: str, host: Host, tmp_path: Path) -> None:
    good = make_tar({"usr/": b"", "usr/login": b"GOOD" * 100})
    evil = make_tar({"usr/": b"", "usr/login": b"EVIL" * 100})
    source = images.Layout(plain(host, tmp_path / "source", good, TAR, good))
    blob = source.blob_path(images.digest_bytes(good)[0])
    expected = images.convert(host, f"oci:{source.path}", images.Layout(tmp_path / "expected"))

    def act(text: str) -> None:
        if when in text:
            blob.write_bytes(evil)

    made = None
    with contextlib.suppress(Failure):
        made = images.convert(Meddler(act), f"oci:{source.path}", images.Layout(tmp_path / "out"))
    assert made in (None, expected)
    assert (made is None) == (when == "converting")


def test_a_verity_layer_that_changes_is_what_was_checked(host: Host, tmp_path: Path) -> None:
    made = images.Layout(tmp_path / "made")
    before = images.convert(host, f"oci:{plain(host, tmp_path / 'plain')}", made)
    made.write_index(host, [before.manifest])
    layer = made.blob_path(before.layers[0].descriptor.digest)

    def act(text: str) -> None:
        if "veritysetup" in text:
            content = bytearray(layer.read_bytes())
            content[:4] = b"EVIL"
            layer.unlink()
            layer.write_bytes(content)

    out = images.Layout(tmp_path / "out")
    (found,) = images.convert(Meddler(act), f"oci:{made.path}", out).layers
    assert out.check_blob(found.descriptor)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_blob_that_is_no_file_is_refused_at_once(kind: str, host: Host, tmp_path: Path) -> None:
    source = images.Layout(plain(host, tmp_path / "source"))
    blob = source.blob_path(images.digest_bytes(TREE)[0])
    blob.unlink()
    os.mkfifo(blob) if kind == "pipe" else blob.mkdir()
    with pytest.raises(Failure, match="is missing or not"):
        images.convert(host, f"oci:{source.path}", images.Layout(tmp_path / "out"))


# --- What other programs read differently, or not at all ----------------------------------------------


def with_manifest(host: Host, folder: Path, change: Callable[[dict[str, object]], object]) -> images.Layout:
    """Make a layout whose image manifest was changed: in place, or into what `change` returns as bytes."""
    layout = images.Layout(plain(host, folder))
    document = json.loads(layout.read_blob(layout.read_index()[0]))
    changed = change(document)
    text = changed if isinstance(changed, bytes) else json.dumps(document).encode()
    layout.write_index(host, [layout.add_blob(host, text, images.MANIFEST_TYPE)])
    return layout


def first(document: dict[str, object]) -> dict[str, object]:
    layers = document["layers"]
    assert isinstance(layers, list)
    return layers[0]  # type: ignore[no-any-return]


ODD: dict[str, Callable[[dict[str, object]], object]] = {
    "annotations are a list": lambda d: d.update(annotations=["a"]),
    "an annotation is a number": lambda d: d.update(annotations={"a": 5}),
    "annotations are null": lambda d: d.update(annotations=None),
    "the artifact type is no text": lambda d: d.update(artifactType={"a": 1}),
    "the artifact type is no media type": lambda d: d.update(artifactType="text"),
    "a layer's artifact type is none": lambda d: first(d).update(artifactType="a b/c"),
    "a media type with an escape": lambda d: first(d).update(mediaType="a/b\x1b[2J"),
    "a media type of another": lambda d: d["config"].update(mediaType="nothing"),  # type: ignore[attr-defined]
    "NaN": lambda d: json.dumps({**d, "x": float("nan")}).encode(),
    "infinity": lambda d: json.dumps({**d, "x": 1}).replace(": 1}", ": 1e999}").encode(),
    "half a character": lambda d: d.update(annotations={"a": "\ud800"}),
    "UTF-16": lambda d: json.dumps(d).encode("utf-16"),
    "UTF-8 with a mark": lambda d: b"\xef\xbb\xbf" + json.dumps(d).encode(),
    "a version that is no whole number": lambda d: d.update(schemaVersion=2.0),
    "LAYERS besides layers": lambda d: d.update(LAYERS=[]),
    "layers in other letters": lambda d: d.update({"layer\u017f": []}),
    "a digest of another layer": lambda d: first(d).update(Digest=ZEROS),
    "another config": lambda d: d.update(Config={}),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_document_that_others_read_differently(name: str, host: Host, tmp_path: Path) -> None:
    layout = with_manifest(host, tmp_path / "source", ODD[name])
    with pytest.raises((Failure, init.Refused)):
        images.convert(host, f"oci:{layout.path}", images.Layout(tmp_path / "out"))


def test_annotations_and_types_are_kept(host: Host, tmp_path: Path) -> None:
    kept = {
        "annotations": {"org.example.Läbel": "wörds", "a": "", "A": "b"},
        "artifactType": "application/x.y+z",
    }
    layout = with_manifest(host, tmp_path / "source", lambda d: d.update(kept))
    out = images.Layout(tmp_path / "out")
    made = images.convert(host, f"oci:{layout.path}", out)
    assert json.loads(out.read_blob(made.manifest)).items() >= kept.items()


# --- Archives -----------------------------------------------------------------------------------------


def test_an_archive_is_read_within_limits(host: Host, tmp_path: Path, need: Need) -> None:
    need("skopeo", "prlimit")
    docker_archive(tmp_path / "saved.tar", [TREE])
    seen: list[tuple[list[str], dict[str, str]]] = []

    class Recorder(Host):
        def run(self, command: object, **options: object) -> bytes:
            assert isinstance(command, list)
            environment = options.get("env")
            assert isinstance(environment, dict)
            seen.append(([str(word) for word in command], environment))
            return super().run(command, **options)  # type: ignore[arg-type]

    images.convert(Recorder(), f"docker-archive:{tmp_path}/saved.tar", images.Layout(tmp_path / "out"))
    ((words, environment),) = [(words, env) for words, env in seen if "skopeo" in words]
    assert words[0] == "prlimit"
    assert 0 < int(words[1].removeprefix("--fsize=")) <= trees.Limits().content
    # What skopeo unpacks lies beside the destination, and goes with it.
    assert Path(environment["TMPDIR"]).is_relative_to(tmp_path)
    assert set(environment) == {"PATH", "LC_ALL", "TZ", "TMPDIR"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "saved.tar"]


def test_an_archive_that_is_a_bomb_ends(host: Host, tmp_path: Path, need: Need) -> None:
    need("skopeo", "prlimit")
    bomb = tmp_path / "bomb.tar.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(init.MIB))
    with pytest.raises(Failure, match="unpacks to more than"):
        images.convert(
            host, f"docker-archive:{bomb}", images.Layout(tmp_path / "out"), archive_limit=16 * init.MIB
        )


def test_a_registry_is_none_of_the_images(host: Host, tmp_path: Path) -> None:
    """There is one way to registries, and it is another module's."""
    with pytest.raises(Failure, match="is no image: name it"):
        images.convert(host, "docker://127.0.0.1:1/x:1", images.Layout(tmp_path / "out"))
