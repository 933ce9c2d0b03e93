"""OCI layouts and verity layers: against veritysetup, fsck.erofs and skopeo, and twice the same."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mosinit import images, init
from mosinit.host import Failure, Host

Need = Callable[..., None]
TAR = "application/vnd.oci.image.layer.v1.tar"
ZEROS = "sha256:" + 64 * "0"


@pytest.fixture(autouse=True)
def tools(need: Need) -> None:
    need("mkfs.erofs", "veritysetup", "zstd")


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
        (TREE, TAR + "+gzip", "not the gzip file"),
        (gzip.compress(TREE)[:-9], TAR + "+gzip", "not the gzip file"),
        (TREE, TAR + "+zstd", "zstd failed"),
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
