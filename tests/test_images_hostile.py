"""Images that do not mean well: what their documents say, how large they are, who changes them meanwhile."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosinit import images, init, trees
from mosinit.host import Failure, Host
from tests.recorder import Watched
from tests.test_images import TAR, TREE, ZEROS, docker_archive, image, make_tar, plain, put

Need = Callable[..., None]


@pytest.fixture(autouse=True)
def tools(need: Need) -> None:
    need("mkfs.erofs", "veritysetup", "zstd")


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
    watched = Watched()
    images.convert(watched, f"docker-archive:{tmp_path}/saved.tar", images.Layout(tmp_path / "out"))
    for program in watched.started:
        assert set(program.environment) <= {"PATH", "LC_ALL", "TZ", "TMPDIR"}
    ((words, _, environment, _),) = [each for each in watched.started if "skopeo" in each.words]
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
