"""OCI layouts and verity layers: against veritysetup, fsck.erofs and skopeo, and twice the same."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mosinit import images, init, trees
from mosinit.host import Failure, Host
from tests.recorder import Watched

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
    packed = subprocess.run(["zstd", "-qc"], input=TREE, capture_output=True, check=True).stdout
    source = plain(host, tmp_path / "source", packed, f"{TAR}+zstd")
    watched = Watched()
    images.convert(watched, f"oci:{source}", images.Layout(tmp_path / "out"))
    assert len(watched.started) >= 3
    for program in watched.started:
        assert set(program.environment) <= {"PATH", "LC_ALL", "TZ", "TMPDIR"}, program.words


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
