"""Releases from registries: Debian's own over TLS, and one that misbehaves."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from mosinit import images, init, install, keys, layout, registry, releases, sources
from mosinit.host import Failure, Host, Usage
from mosinit.layout import Consent
from tests import installation, registries
from tests.fake import policy_json
from tests.installation import NativeInstaller, Setting
from tests.registries import Authority, Handler, Registry

NAME = "acme/release"
Blobs = dict[str, bytes]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who gives registries their certificates."""
    return Authority(tmp_path_factory.mktemp("authority"))


def blobs_of(release: Path) -> Blobs:
    return {f"sha256:{path.name}": path.read_bytes() for path in (release / "blobs/sha256").iterdir()}


def parts_of(release: Path) -> dict[str, str]:
    """Return digests of the release by what they are."""
    blobs = blobs_of(release)
    index = json.loads((release / "index.json").read_bytes())["manifests"][0]["digest"]
    listed = json.loads(blobs[index])["manifests"]
    artefact = next(item["digest"] for item in listed if "artifactType" in item)
    kinds = {part["mediaType"]: part["digest"] for part in json.loads(blobs[artefact])["layers"]}
    image = next(item["digest"] for item in listed if "artifactType" not in item)
    layer = json.loads(blobs[image])["layers"][0]["digest"]
    uki = f"sha256:{hashlib.sha256(installation.UKI).hexdigest()}"
    signature = init.SIGNATURE_MEDIA_TYPE
    return {
        "index": index, "artefact": artefact, "manifest": kinds[init.MANIFEST_MEDIA_TYPE],
        "signature": kinds[signature], "image": image, "layer": layer, "uki": uki,
    }  # fmt: skip


def fill(server: Registry, release: Path, blobs: Blobs | None = None, index: str = "") -> None:
    """Put a release into a registry that can misbehave, under the tag `7`."""
    blobs = blobs or blobs_of(release)
    index = index or parts_of(release)["index"]
    manifests = {item["digest"]: item["mediaType"] for item in json.loads(blobs[index])["manifests"]}
    for digest, content in blobs.items():
        if digest in manifests:
            server.manifests[digest] = (manifests[digest], content)
        elif digest != index:
            server.blobs[digest] = content
    server.add("7", images.INDEX_TYPE, blobs[index])


def access(authority: Authority, address: str) -> registry.Access:
    return registry.Access(authority.path, registry.Login(address, "anybody:knows"), 5, pauses=(0, 0))


def run(
    made: Setting, disk: Path, authority: Authority, address: str, host: NativeInstaller | None = None,
    **more: Any,
) -> dict[str, object]:  # fmt: skip
    options = {"source": f"docker://{address}/{NAME}:7", "access": access(authority, address), **more}
    return installation.run(host or NativeInstaller(), made, disk, **options)


def stored(host: Host, disk: Path) -> dict[str, str]:
    """Return the files of an installed disk's store with their digests."""
    with (
        installation.data_behind(Path(f"{disk}p3")) as data,
        host.mounted(data, "ext4", read_only=True) as store,
    ):
        folder = store / init.REPOSITORY
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.name: f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files}


# --- Debian's registry -----------------------------------------------------------------------------------


class Watched(NativeInstaller):
    """Notes what had been asked for when the disk began to change."""

    def __init__(self, registry: registries.Real) -> None:
        super().__init__()
        self.registry = registry
        self.before: list[tuple[str, str, int]] = []

    def say(self, text: str) -> None:
        """Look into the registry's log."""
        super().say(text)
        if text.startswith("partitions"):
            self.before = self.registry.requests()


def test_a_release_from_debian_s_registry(
    need: Callable[..., None], made: Setting, disk: Path, authority: Authority, tmp_path: Path
) -> None:
    need("docker-registry")
    login = registries.password_file(tmp_path)
    with registries.real_registry(tmp_path, authority) as real:
        source = f"docker://{real.address}/{NAME}:7"
        entry = registry.open_access(authority.path, login, 20, source, [])
        registry.push(Host(), entry, images.Layout(made.release), registry.parse_reference(source))
        pushed = len(real.requests())
        host = Watched(real)
        done = installation.run(host, made, disk, source=source, access=entry)
        asked = real.requests()[pushed:]
        before = host.before[pushed:]
        consent = Consent(layout.inspect(host, disk).word)
        with pytest.raises(Failure, match="wants a login, and there is none for it"):
            install.plan(Host(), installation.options(made, disk, source=source, consent=consent,
                                                      access=registry.Access(authority.path)))  # fmt: skip
    parts = parts_of(made.release)
    assert done["source"] == f"docker://{real.address}/{NAME}@{parts['index']}"
    files = stored(host, disk)
    names = {digest.removeprefix("sha256:"): digest for digest in blobs_of(made.release)}
    assert {name: digest for name, digest in files.items() if name in names} == names
    assert files.keys() == names.keys() | {"index.json", "oci-layout"}
    # One question by tag; and what is large is only looked for before the disk changes.
    by_tag = [path for _, path, _ in asked if "sha256:" not in path and not path.endswith("/v2/")]
    assert by_tag == [f"/v2/{NAME}/manifests/7"]
    large = [f"/v2/{NAME}/blobs/{parts[name]}" for name in ("layer", "uki")]
    assert sorted(path for method, path, _ in before if method == "GET" and path in large) == []
    assert sorted(path for method, path, _ in before if method == "HEAD" and path in large) == sorted(large)
    assert sorted(path for method, path, _ in asked if method == "GET" and path in large) == sorted(large)


# --- What is refused before the disk is touched ----------------------------------------------------------


def untouched(memory: Path) -> bool:
    return (memory / "disk").stat().st_blocks == 0


def changed(release: Path, change: Callable[[dict[str, Any], Blobs], None], which: str) -> tuple[Blobs, str]:
    """Change the index or the artefact, and make what leads there right again."""
    blobs, parts = blobs_of(release), parts_of(release)

    def put(document: object) -> tuple[str, int]:
        data = json.dumps(document).encode()
        digest, size = images.digest_bytes(data)
        blobs[digest] = data
        return digest, size

    index = json.loads(blobs[parts["index"]])
    document = index if which == "index" else json.loads(blobs[parts["artefact"]])
    change(document, blobs)
    if which == "artefact":
        digest, size = put(document)
        for item in index["manifests"]:
            if item["digest"] == parts["artefact"]:
                item |= {"digest": digest, "size": size}
    return blobs, put(index)[0]


def another_image(index: dict[str, Any], blobs: Blobs) -> None:
    data = b'{"schemaVersion": 2, "config": {}, "layers": []}'
    digest, size = images.digest_bytes(data)
    blobs[digest] = data
    index["manifests"].append({"mediaType": images.MANIFEST_TYPE, "digest": digest, "size": size})


def another_part(artefact: dict[str, Any], blobs: Blobs) -> None:
    digest, size = images.digest_bytes(b"more")
    blobs[digest] = b"more"
    artefact["layers"].append({"mediaType": "application/x", "digest": digest, "size": size})


def the_same_part_twice(artefact: dict[str, Any], blobs: Blobs) -> None:
    digest, size = images.digest_bytes(b"more")
    blobs[digest] = b"more"
    kind = init.CERTIFICATE_MEDIA_TYPE
    artefact["layers"].append({"mediaType": kind, "digest": digest, "size": size})


def a_huge_config(artefact: dict[str, Any], blobs: Blobs) -> None:
    artefact["config"]["size"] = 5 << 20


@pytest.mark.parametrize(
    ("which", "change"),
    [
        ("index", another_image), ("artefact", another_part), ("artefact", the_same_part_twice),
        ("artefact", a_huge_config),
    ],
)  # fmt: skip
def test_more_than_the_manifest_names(
    made: Setting, disk: Path, authority: Authority, memory: Path, which: str,
    change: Callable[[dict[str, Any], Blobs], None],
) -> None:  # fmt: skip
    blobs, index = changed(made.release, change, which)
    with registries.running(authority.server()) as server:
        fill(server, made.release, blobs, index)
        with pytest.raises(Failure, match="which its manifest does not name"):
            run(made, disk, authority, server.address)
        large = parts_of(made.release)["layer"]
        assert not [path for _, path, _ in server.seen if path.endswith(large)]
    assert untouched(memory)


def flipped(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize(
    ("part", "check"),
    [
        ("artefact", None), ("image", None), ("manifest", "MANIFEST-ABSENT"),
        ("signature", "MANIFEST-ABSENT"),
    ],
)  # fmt: skip
def test_a_document_of_another_digest(
    made: Setting, disk: Path, authority: Authority, memory: Path, part: str, check: str | None
) -> None:
    digest = parts_of(made.release)[part]
    with registries.running(authority.server()) as server:
        fill(server, made.release)
        if digest in server.manifests:
            kind, content = server.manifests[digest]
            server.manifests[digest] = (kind, flipped(content))
        else:
            server.blobs[digest] = flipped(server.blobs[digest])
        with pytest.raises((Failure, init.Refused)) as caught:
            run(made, disk, authority, server.address)
    assert getattr(caught.value, "check", None) == check
    if check is None:
        assert "something else than its digest says" in str(caught.value)
    assert untouched(memory)


@pytest.mark.parametrize("part", ["artefact", "manifest", "signature", "image", "layer", "uki"])
def test_a_blob_that_the_registry_lacks(
    made: Setting, disk: Path, authority: Authority, memory: Path, part: str
) -> None:
    digest = parts_of(made.release)[part]
    with registries.running(authority.server()) as server:
        fill(server, made.release)
        server.blobs.pop(digest, None)
        server.manifests.pop(digest, None)
        with pytest.raises(init.Refused) as caught:
            run(made, disk, authority, server.address)
    assert caught.value.check == "STORE-BLOB"
    assert untouched(memory)


def test_what_is_no_release(made: Setting, disk: Path, authority: Authority, memory: Path) -> None:
    parts, blobs = parts_of(made.release), blobs_of(made.release)
    with registries.running(authority.server()) as server:
        server.add("7", images.MANIFEST_TYPE, blobs[parts["image"]])
        with pytest.raises(init.Refused, match="MANIFEST-ABSENT"):
            run(made, disk, authority, server.address)
        del server.manifests["7"]
        with pytest.raises(Failure, match="does not have it: check name and tag"):
            run(made, disk, authority, server.address)
    assert untouched(memory)


def test_a_release_of_another_organisation_or_of_a_revoked_key(
    made: Setting, other: keys.Keyset, disk: Path, authority: Authority, memory: Path, tmp_path: Path
) -> None:
    foreign = installation.make_left(tmp_path / "other", other)
    revoking = installation.make_left(tmp_path / "revoking", made.keyset)
    certificate = made.keyset.certificate("product").public_bytes(serialization.Encoding.DER)
    revoked = [hashlib.sha256(certificate).hexdigest()]
    (revoking / "policy.json").write_bytes(policy_json(product=made.keyset.product, revoked=revoked))
    with registries.running(authority.server()) as server:
        fill(server, made.release)
        for left, check in ((foreign, "MANIFEST-CHAIN"), (revoking, "MANIFEST-REVOKED")):
            server.seen.clear()
            with pytest.raises(init.Refused, match=check):
                run(made, disk, authority, server.address, left=left)
            # Nothing that only the manifest leads to was asked for.
            image = parts_of(made.release)["image"]
            assert not [path for _, path, _ in server.seen if path.endswith(image)]
    assert untouched(memory)


def test_a_registry_of_an_unknown_authority(
    made: Setting, disk: Path, authority: Authority, memory: Path, tmp_path: Path
) -> None:
    with registries.running(authority.server()) as server:
        fill(server, made.release)
        (tmp_path / "another").mkdir()
        with pytest.raises(Failure, match="from an unknown CA"):
            run(made, disk, Authority(tmp_path / "another"), server.address)
    assert untouched(memory)


# --- What goes wrong on the way --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (registries.another_digest, "something else than its digest says"),
        (registries.half_a_body, "broke off"),
    ],
)
def test_a_blob_that_does_not_come(
    made: Setting, disk: Path, authority: Authority, fault: Callable[[Handler], None], words: str
) -> None:
    layer = parts_of(made.release)["layer"]

    def strike(handler: Handler, kind: str) -> bool:
        struck = kind == "blob" and handler.command == "GET" and handler.path.endswith(layer)
        if struck:
            fault(handler)
        return struck

    with registries.running(authority.server()) as server:
        fill(server, made.release)
        server.fault = strike
        host = NativeInstaller()
        with pytest.raises(Failure, match=words) as caught:
            run(made, disk, authority, server.address, host)
        assert "\n" not in str(caught.value)
        assert (layout.inspect(host, disk).unfinished, host.variables) == (True, {})
        server.fault = lambda handler, kind: False
        run(made, disk, authority, server.address, host)
    assert not layout.inspect(host, disk).unfinished


def test_what_the_store_gives_back_is_the_release_s(made: Setting, disk: Path, authority: Authority) -> None:
    """The UKI of the ESP comes from the store: nothing is fetched twice, and every byte is read back."""
    with registries.running(authority.server()) as server:
        fill(server, made.release)
        host = NativeInstaller()
        run(made, disk, authority, server.address, host)
        asked = [path for method, path, _ in server.seen if method == "GET" and "/blobs/" in path]
    large = {parts_of(made.release)[name] for name in ("layer", "uki")}
    assert sorted(path.rpartition("/")[2] for path in asked if path.rpartition("/")[2] in large) == sorted(
        large
    )
    with host.mounted(Path(f"{disk}p1"), "vfat", read_only=True) as esp:
        assert (esp / "EFI/Linux/mosinit_7+3.efi").read_bytes() == installation.UKI


def test_a_registry_s_uki_of_a_later_epoch_starts_nothing(
    made: Setting, disk: Path, authority: Authority, tmp_path: Path
) -> None:
    """What it is approved for is in its bytes, which are first seen when they are on the disk."""
    release = installation.make_release(Host(), tmp_path / "later", made.keyset, 8, epoch=3)
    with registries.running(authority.server()) as server:
        fill(server, release)
        host = NativeInstaller()
        with pytest.raises(init.Refused, match="TPM-APPROVAL: .* for epoch 3, seen one up to epoch 2"):
            run(made, disk, authority, server.address, host)
    assert layout.inspect(host, disk).unfinished
    assert not [step for step in host.steps if step.startswith("start")]


# --- Names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["oci:", "release", "", "docker-archive:x", "https://host/name"])
def test_sources_that_are_none(source: str) -> None:
    with pytest.raises(Usage, match="oci:DIR or docker://"):
        sources.open_source(source)


@pytest.mark.parametrize("source", ["docker:", "docker://HOST/Name", "docker://user:secret@host/name"])
def test_names_of_registries_that_are_none(source: str) -> None:
    with pytest.raises(Usage, match="write docker://") as caught:
        sources.open_source(source)
    assert "secret" not in str(caught.value)


def test_a_folder_without_a_release(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="has no index.json"):
        sources.open_source(f"oci:{tmp_path}")


def test_a_store_reads_documents_alone(made: Setting, authority: Authority) -> None:
    with registries.running(authority.server()) as server:
        fill(server, made.release)
        source = sources.open_source(
            f"docker://{server.address}/{NAME}:7", access(authority, server.address)
        )
        assert isinstance(source, sources.Registry)
        for path in ("/etc/passwd", f"{sources.STORE}/blobs/sha256/../x", f"{sources.STORE}/other"):
            with contextlib.suppress(FileNotFoundError):
                raise AssertionError(source.machine.read(path))
        with pytest.raises(Failure, match="more than it announced"):
            source.machine.read(init.blob_path(parts_of(made.release)["uki"]), 1000)


# --- A folder that lists more ----------------------------------------------------------------------------


def test_a_folder_that_lists_more_than_its_manifest_names(made: Setting, disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", made.release, copy], check=True)
    blobs, index = changed(made.release, another_image, "index")
    for digest, data in blobs.items():
        (copy / "blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(data)
    item = images.Descriptor(images.INDEX_TYPE, index, len(blobs[index]))
    (copy / "index.json").write_bytes(images.encode(images.index_of([item])))
    with pytest.raises(Failure, match="which its manifest does not name"):
        installation.run(NativeInstaller(), dataclasses.replace(made, release=copy), disk)


# --- A folder that changes -------------------------------------------------------------------------------


class Changing(sources.Folder):
    """A folder on a medium that shows something else once its list was read `times` times."""

    def __init__(self, folder: Path, times: int) -> None:
        super().__init__(folder)
        self.times = times
        read = self.machine.read

        def reading(path: str, limit: int = init.MIB) -> bytes:
            data = read(path, limit)
            if path == f"{sources.STORE}/index.json":
                self.times -= 1
                if not self.times:
                    (folder / "index.json").write_bytes(images.encode(images.index_of([])))
            return data

        self.machine.read = reading  # type: ignore[method-assign]


@pytest.fixture
def copied(made: Setting, tmp_path: Path) -> Path:
    """A copy of the release."""
    return Path(shutil.copytree(made.release, tmp_path / "copy"))


@pytest.mark.parametrize("times", [1, 2, 3, 4, 5])
def test_a_folder_that_changes_while_it_is_verified(made: Setting, copied: Path, times: int) -> None:
    host, policy = Host(), install.policy_of_live(made.left)
    before = releases.verify(host, sources.open_source(f"oci:{copied}"), policy)
    now = releases.verify(host, Changing(copied, times), policy)
    assert json.loads((copied / "index.json").read_bytes())["manifests"] == []
    assert dataclasses.replace(now, source=before.source) == before


class Swapping(NativeInstaller):
    """Somebody puts another release into the folder once the disk began to change."""

    def __init__(self, folder: Path, other: bytes) -> None:
        super().__init__()
        self.folder, self.other = folder, other

    def say(self, text: str) -> None:
        """Put it there."""
        super().say(text)
        if text.startswith("machine-store"):
            (self.folder / "index.json").write_bytes(self.other)
            (self.folder / "oci-layout").write_bytes(b"anything")


def test_a_folder_that_changes_between_looking_and_storing(made: Setting, copied: Path, disk: Path) -> None:
    """What was verified is stored: nothing reads the list again, neither here nor at a boot."""
    blobs, index = changed(made.release, another_image, "index")
    item = images.Descriptor(images.INDEX_TYPE, index, len(blobs[index]))
    host = Swapping(copied, images.encode(images.index_of([item])))
    done = installation.run(host, dataclasses.replace(made, release=copied), disk)
    assert (copied / "oci-layout").read_bytes() == b"anything"
    assert done["release"] == parts_of(made.release)["index"]
    files = stored(host, disk)
    for name in ("index.json", "oci-layout"):
        digest = f"sha256:{hashlib.sha256((made.release / name).read_bytes()).hexdigest()}"
        assert files[name] == digest, name


def test_what_a_list_says_beside_its_release_is_not_stored(made: Setting, copied: Path, disk: Path) -> None:
    listed = json.loads((copied / "index.json").read_bytes())
    listed["annotations"] = {"org.example": "anything"}
    listed["manifests"][0]["annotations"]["org.example"] = "anything"
    (copied / "index.json").write_text(json.dumps(listed))
    host = NativeInstaller()
    installation.run(host, dataclasses.replace(made, release=copied), disk)
    files, plain = stored(host, disk), (made.release / "index.json").read_bytes()
    assert files["index.json"] == f"sha256:{hashlib.sha256(plain).hexdigest()}"


# --- A connection that breaks ------------------------------------------------------------------------------


class Cable:
    """What happens to the requests for one blob, one after the other; the rest is answered as it should be.

    Each moment is how many bytes come before the connection ends; or a word for how the server errs.
    """

    def __init__(self, digest: str, *moments: int | str) -> None:
        self.digest, self.moments = digest, list(moments)
        self.asked: list[str] = []

    def __call__(self, handler: Handler, kind: str) -> bool:
        """Answer a request for the blob."""
        if kind != "blob" or handler.command != "GET" or not handler.path.endswith(self.digest):
            return False
        asked = handler.headers.get("Range", "")
        self.asked.append(asked)
        content = handler.server.blobs[self.digest]
        begin = int(asked.removeprefix("bytes=").removesuffix("-") or 0)
        moment = self.moments.pop(0) if self.moments else len(content)
        if moment == "HTTP 500":
            handler.answer(500)
        elif moment == "HTTP 416":
            handler.answer(416)
        elif moment == "no ranges":
            handler.answer(200, content)
        elif moment == "another place":
            handler.answer(206, content, Content_Range=f"bytes 0-{len(content) - 1}/{len(content)}")
        elif moment == "other bytes":
            rest = bytes(byte ^ 1 for byte in content[begin:])
            handler.answer(206, rest, Content_Range=f"bytes {begin}-{len(content) - 1}/{len(content)}")
        elif moment == "a part":
            rest = content[begin : begin + 9000]
            handler.answer(206, rest, Content_Range=f"bytes {begin}-{begin + len(rest) - 1}/{len(content)}")
        else:
            self.broken(handler, content, begin, int(moment))
        return True

    def broken(self, handler: Handler, content: bytes, begin: int, come: int) -> None:
        """Send what comes until the cable is pulled; all, if that is more than there is."""
        handler.send_response(206 if begin else 200)
        if begin:
            handler.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(content) - begin))
        handler.end_headers()
        handler.wfile.write(content[begin : begin + come])
        handler.close_connection = True


@pytest.fixture
def streamed(made: Setting, authority: Authority) -> Iterator[Callable[..., tuple[bytes, Cable, list[str]]]]:
    """Return a function that fetches the UKI while its cable is pulled."""
    uki = parts_of(made.release)["uki"]
    with registries.running(authority.server()) as server:
        fill(server, made.release)

        def fetch(*moments: int | str) -> tuple[bytes, Cable, list[str]]:
            server.fault = cable = Cable(uki, *moments)
            said: list[str] = []
            source = sources.open_source(
                f"docker://{server.address}/{NAME}:7", access(authority, server.address), said.append
            )
            data = b"".join(source.blob(sources.Blob(uki, len(installation.UKI))))
            return data, cable, said

        yield fetch


BROKEN: list[tuple[tuple[int | str, ...], list[str]]] = [
    ((10_000,), ["", "bytes=10000-"]),
    ((10_000, 20_000, 30_000), ["", "bytes=10000-", "bytes=30000-", "bytes=60000-"]),
    ((0,), ["", ""]),
    ((10_000, "HTTP 500"), ["", "bytes=10000-", "bytes=10000-"]),
    ((10_000, "no ranges"), ["", "bytes=10000-"]),
    ((10_000, "a part", "a part"), ["", "bytes=10000-", "bytes=19000-", "bytes=28000-"]),
    # As often as something comes: two pauses are all that a dead connection gets.
    (tuple([5000] * 9), ["", *(f"bytes={at * 5000}-" for at in range(1, 10))]),
]


@pytest.mark.parametrize(("moments", "asked"), BROKEN)
def test_a_blob_goes_on_where_its_connection_broke(
    streamed: Callable[..., tuple[bytes, Cable, list[str]]], moments: tuple[int | str, ...], asked: list[str]
) -> None:
    data, cable, said = streamed(*moments)
    assert data == installation.UKI
    assert cable.asked == asked
    broken = len([moment for moment in moments if isinstance(moment, int) or moment == "HTTP 500"])
    assert len(said) == broken
    assert all("by itself in 0 s, from " in line and "\n" not in line for line in said)


@pytest.mark.parametrize(
    ("moments", "words"),
    [
        ((10_000, "HTTP 500", "HTTP 500", "HTTP 500"), "has a fault of its own"),
        ((10_000, 0, 0, 0), "broke off in the middle"),
        ((10_000, "HTTP 416"), "has less of it than it sent before: do not trust it"),
        ((10_000, "another place"), "something else than its digest says"),
        ((10_000, "other bytes"), "something else than its digest says"),
    ],
)
def test_a_blob_that_does_not_go_on(
    streamed: Callable[..., tuple[bytes, Cable, list[str]]], moments: tuple[int | str, ...], words: str
) -> None:
    with pytest.raises(Failure, match=words) as caught:
        streamed(*moments)
    assert "\n" not in str(caught.value)


def test_an_installation_goes_on_where_its_connection_broke(
    made: Setting, disk: Path, authority: Authority
) -> None:
    layer = parts_of(made.release)["layer"]
    with registries.running(authority.server()) as server:
        fill(server, made.release)
        server.fault = cable = Cable(layer, 3000, "HTTP 500")
        host = NativeInstaller()
        run(made, disk, authority, server.address, host)
    assert cable.asked == ["", "bytes=3000-", "bytes=3000-"]
    assert len([step for step in host.steps if "by itself in 0 s" in step]) == 2
    assert not layout.inspect(host, disk).unfinished


def test_a_pipe_in_the_place_of_a_blob_keeps_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "blob")
    blob = sources.Blob("sha256:" + "0" * 64, 5)
    with pytest.raises(init.Refused, match="IMAGE-DIGEST"):
        list(sources.read_checked(str(tmp_path / "blob"), blob))
