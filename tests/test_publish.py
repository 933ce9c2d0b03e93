"""A release: openssl, veritysetup and skopeo agree with it, and nothing doubtful is ever published."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import hashlib
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from mosinit import cli, commands, images, init, keys, publish
from mosinit.host import Failure, Host, Usage
from tests.test_images import PROGRAM, TAR, image, make_tar, plain

Need = Callable[..., None]
TREE = make_tar({"sbin/": b"", "sbin/init": PROGRAM + b"init " * 5000})
DAY = datetime.timedelta(days=1)

WRITTEN = """\
version: 1
product: {product}
sequence: 42
epoch: 3
update_type: partial
storage:
  - label: zot-data
    persistent: true
    nsgroup: zot
    size: 3G
targets:
  - service_name: hostfs
    service_type: hostfs
    source: oci:./hostfs
    version: 1.0.0
    writable: all
  - service_name: zot
    service_type: container
    source: oci:images/zot
    version: "2.10"
    nsgroup: zot
    network:
      type: simple
      ipv4: 10.0.3.99/24
      ports:
        - host: 80
          container: 5000
    storage:
      - dest: /zot
        label: zot-data
"""


@pytest.fixture
def written(need: Need, keyset: keys.Keyset, host: Host, tmp_path: Path) -> Path:
    """A person's manifest with its images beside it."""
    need("mkfs.erofs", "veritysetup", "openssl")
    plain(host, tmp_path / "hostfs", TREE, tar=TREE)
    plain(host, tmp_path / "images/zot")
    path = tmp_path / "manifest.yaml"
    path.write_text(WRITTEN.format(product=keyset.product))
    return path


def parts(layout: images.Layout) -> dict[str, list[bytes]]:
    """Return the blobs of the install artefact by media type."""
    (index,) = layout.read_index()
    entries = json.loads(layout.read_blob(index))["manifests"]
    blobs: dict[str, list[bytes]] = {}
    for layer in json.loads(layout.blob_path(entries[0]["digest"]).read_bytes())["layers"]:
        blobs.setdefault(layer["mediaType"], []).append(layout.blob_path(layer["digest"]).read_bytes())
    return blobs


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def openssl(*words: str | Path) -> bool:
    return subprocess.run(["openssl", *words], capture_output=True, check=False).returncode == 0


# --- What a release is --------------------------------------------------------------------------------


def test_the_signed_manifest_says_what_the_person_wrote(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    published = publish.publish(host, written, keyset, f"oci:{tmp_path}/release")
    layout = images.Layout(tmp_path / "release")
    (text,) = parts(layout)[init.MANIFEST_MEDIA_TYPE]
    before, after = init.parse_manifest(written.read_bytes(), publish.WRITTEN), init.parse_manifest(text)
    signed = {"source", "digest", "size", "layer_signatures"}
    for one, two in zip(before.targets, after.targets, strict=True):
        assert {k: v for k, v in one._asdict().items() if k not in signed} == {
            k: v for k, v in two._asdict().items() if k not in signed
        }
        assert two.size == layout.blob_path(two.digest).stat().st_size
        assert published.targets[two.service_name] == two.digest
    assert before._replace(targets=()) == after._replace(targets=())
    assert published.sequence == 42
    assert published.manifest_sha256 == hashlib.sha256(text).hexdigest()


def test_openssl_verifies_the_manifest(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    publish.publish(host, written, keyset, f"oci:{tmp_path}/release")
    blobs = parts(images.Layout(tmp_path / "release"))
    for name, kind in (("text", init.MANIFEST_MEDIA_TYPE), ("sig", init.SIGNATURE_MEDIA_TYPE)):
        (tmp_path / name).write_bytes(blobs[kind][0])
    (tmp_path / "crt").write_bytes(blobs[init.CERTIFICATE_MEDIA_TYPE][0])
    check = ["pkeyutl", "-verify", "-rawin", "-digest", "sha256", "-certin", "-inkey", str(tmp_path / "crt"),
             "-sigfile", str(tmp_path / "sig"), "-in", str(tmp_path / "text")]  # fmt: skip
    assert openssl(*check)
    assert openssl("verify", "-CAfile", keyset.certificate_path("manifest-ca"), tmp_path / "crt")
    (tmp_path / "text").write_bytes(blobs[init.MANIFEST_MEDIA_TYPE][0] + b"\n")
    assert not openssl(*check)


def test_openssl_verifies_the_epoch_order(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    publish.publish(host, written, keyset, f"oci:{tmp_path}/release")
    blobs = parts(images.Layout(tmp_path / "release"))
    (statement,), (signature,) = blobs[init.EPOCH_MEDIA_TYPE], blobs[init.EPOCH_SIGNATURE_MEDIA_TYPE]
    assert statement == b'{"epoch":3,"product":"%s","schema":1,"type":"epoch"}' % keyset.product.encode()
    for name, data in (("text", statement), ("sig", signature)):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "crt").write_bytes(blobs[init.CERTIFICATE_MEDIA_TYPE][0])
    check = ["pkeyutl", "-verify", "-rawin", "-digest", "sha256", "-certin", "-inkey", str(tmp_path / "crt"),
             "-sigfile", str(tmp_path / "sig"), "-in", str(tmp_path / "text")]  # fmt: skip
    assert openssl(*check)
    (tmp_path / "text").write_bytes(statement.replace(b"3", b"4"))
    assert not openssl(*check)


def test_a_statement_is_no_manifest_and_a_manifest_no_statement(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    """One key signs both: what they say must tell them apart."""
    publish.publish(host, written, keyset, f"oci:{tmp_path}/release")
    blobs = {kind: found[0] for kind, found in parts(images.Layout(tmp_path / "release")).items()}
    policy = publish.check_signer(keyset, init.parse_manifest(blobs[init.MANIFEST_MEDIA_TYPE]))
    statement = blobs[init.EPOCH_MEDIA_TYPE], blobs[init.EPOCH_SIGNATURE_MEDIA_TYPE]
    manifest = blobs[init.MANIFEST_MEDIA_TYPE], blobs[init.SIGNATURE_MEDIA_TYPE]
    certificate = blobs[init.CERTIFICATE_MEDIA_TYPE]
    assert init.verify_manifest(*manifest, certificate, policy).contents.epoch == 3
    assert init.verify_epoch_order(*statement, certificate, policy) == 3
    with pytest.raises(init.Refused) as refused:
        init.verify_manifest(*statement, certificate, policy)
    assert refused.value.check == "MANIFEST-FORMAT"
    with pytest.raises(init.Refused) as refused:
        init.verify_epoch_order(*manifest, certificate, policy)
    assert refused.value.check == "EPOCH-ORDER"


def test_openssl_verifies_each_root_hash_and_veritysetup_each_layer(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    publish.publish(host, written, keyset, f"oci:{tmp_path}/release")
    layout = images.Layout(tmp_path / "release")
    manifest = init.parse_manifest(parts(layout)[init.MANIFEST_MEDIA_TYPE][0])
    for target in manifest.targets:
        layers = init.parse_image(layout.blob_path(target.digest).read_bytes()).layers
        for layer, signature in zip(layers, target.layer_signatures, strict=True):
            images.check_layer(host, layout.blob_path(layer.digest), layer.root_hash)
            (tmp_path / "root").write_text(layer.root_hash)
            pkcs7 = str(layout.blob_path(signature))
            check = ["smime", "-verify", "-binary", "-inform", "DER", "-in", pkcs7,
                     "-content", str(tmp_path / "root"), "-nointern", "-noverify",
                     "-certfile", str(keyset.certificate_path("layer"))]  # fmt: skip
            assert openssl(*check)
            (tmp_path / "root").write_text(layer.root_hash + "\n")
            assert not openssl(*check)


def test_the_same_input_gives_the_same_bytes(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    first = publish.publish(host, written, keyset, f"oci:{tmp_path}/release")
    elsewhere = tmp_path / "else/where"
    elsewhere.mkdir(parents=True)
    for name in ("hostfs", "images", "manifest.yaml"):
        shutil.move(tmp_path / name, elsewhere / name)
    second = publish.publish(host, elsewhere / "manifest.yaml", keyset, f"oci:{elsewhere}/release")
    assert first == second
    assert snapshot(tmp_path / "release") == snapshot(elsewhere / "release")


def test_skopeo_copies_a_release_unchanged(
    written: Path, keyset: keys.Keyset, host: Host, need: Need, tmp_path: Path
) -> None:
    need("skopeo")
    published = publish.publish(host, written, keyset, f"oci:{tmp_path}/release")
    raw = host.run(["skopeo", "inspect", "--raw", f"oci:{tmp_path}/release:{publish.TAG}"])
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == published.index_digest
    kinds = [entry.get("artifactType") for entry in json.loads(raw)["manifests"]]
    assert kinds == [init.RELEASE_ARTIFACT, None, None]
    host.run(
        ["skopeo", "copy", "--all", "--preserve-digests", f"oci:{tmp_path}/release", f"oci:{tmp_path}/copy"]
    )
    for name in ("release", "copy"):
        (tmp_path / name / "index.json").unlink()
        (tmp_path / name / "oci-layout").unlink()
    assert snapshot(tmp_path / "release") == snapshot(tmp_path / "copy")


# --- What is never published --------------------------------------------------------------------------


def with_dates(
    keyset: keys.Keyset, folder: Path, role: str, begin: datetime.timedelta, end: datetime.timedelta
) -> keys.Keyset:
    """Copy a keyset and give one of its certificates other dates, relative to now."""
    shutil.copytree(keyset.folder, folder)
    signer = "manifest-ca" if role == "product" else role
    issuer = serialization.load_pem_private_key((folder / f"{signer}.key").read_bytes(), None)
    assert isinstance(issuer, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)
    old = keyset.certificate(role)
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), old.serial_number)
    builder = builder.not_valid_before(now + begin).not_valid_after(now + end)
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    certificate = builder.sign(issuer, hashes.SHA384())
    (folder / f"{role}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return keys.open_keyset(Host(), folder)


@pytest.mark.parametrize(("begin", "end", "fine"), [(-9, -1, False), (1, 9, False), (-1, 1, True)])
@pytest.mark.parametrize("role", ["product", "manifest-ca", "layer"])
def test_a_certificate_out_of_its_dates_publishes_nothing(
    role: str, begin: int, end: int, fine: bool, written: Path, keyset: keys.Keyset, host: Host,
    tmp_path: Path,
) -> None:  # fmt: skip
    odd = with_dates(keyset, tmp_path / "keys", role, begin * DAY, end * DAY)
    if fine:
        publish.publish(host, written, odd, f"oci:{tmp_path}/release")
        return
    with pytest.raises(Failure, match=f"the {role} certificate is valid from .*: renew it"):
        publish.publish(host, written, odd, f"oci:{tmp_path}/release")
    assert not (tmp_path / "release").exists()


def test_a_manifest_of_another_product_is_refused(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    written.write_text(WRITTEN.format(product="aaaaaaaa-2222-4333-8444-555555555555"))
    with pytest.raises(Failure, match="the manifest is for product aaaaaaaa"):
        publish.publish(host, written, keyset, f"oci:{tmp_path}/release")


def test_a_manifest_below_the_epoch_of_the_keyset_is_refused(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    with pytest.raises(init.Refused, match="EPOCH.*epoch 4 or later.*seen epoch 3"):
        publish.publish(host, written, dataclasses.replace(keyset, epoch=4), f"oci:{tmp_path}/release")


def test_a_fault_in_the_manifest_is_named_with_its_line(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    written.write_text(written.read_text().replace("epoch: 3", "epoch: 65"))
    with pytest.raises(init.Refused, match="line 4"):
        publish.publish(host, written, keyset, f"oci:{tmp_path}/release")


@pytest.mark.parametrize("line", ["epoch: 03", "epoch: 0x3", "epoch: yes"])
def test_a_word_with_two_readings_has_a_remedy(
    line: str, written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    written.write_text(written.read_text().replace("epoch: 3", line))
    with pytest.raises(init.Refused, match=r"line 4") as caught:
        publish.publish(host, written, keyset, f"oci:{tmp_path}/release")
    assert caught.value.expected == "a value of one reading only (numbers as 42, text in quotes)"


def test_a_certificate_of_another_ca_is_refused(
    written: Path, keyset: keys.Keyset, other: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(keyset.folder, mixed)
    for name in ("manifest-ca.pem", "manifest-ca.key"):
        shutil.copy(other.folder / name, mixed / name)
    shutil.rmtree(tmp_path / "hostfs")  # found before any image is looked at
    with pytest.raises(init.Refused, match="MANIFEST-CHAIN"):
        publish.publish(host, written, keys.open_keyset(host, mixed), f"oci:{tmp_path}/release")


def test_a_failure_leaves_the_earlier_release_as_it_was(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    target = tmp_path / "out/release"
    publish.publish(host, written, keyset, f"oci:{target}")
    before = snapshot(target)
    shutil.rmtree(tmp_path / "images/zot")
    written.write_text(written.read_text().replace("sequence: 42", "sequence: 43"))
    with pytest.raises(Failure, match="no OCI image layout"):
        publish.publish(host, written, keyset, f"oci:{target}")
    assert snapshot(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["release"]


def test_a_new_release_replaces_the_earlier_one(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    target = tmp_path / "out/release"
    first = publish.publish(host, written, keyset, f"oci:{target}")
    written.write_text(written.read_text().replace("sequence: 42", "sequence: 43"))
    second = publish.publish(host, written, keyset, f"oci:{target}")
    (listed,) = images.Layout(target).read_index()
    assert listed.digest == second.index_digest != first.index_digest
    assert not (target / "blobs/sha256" / first.manifest_sha256).exists()
    assert [path.name for path in target.parent.iterdir()] == ["release"]


def test_what_is_replaced_is_told(
    written: Path, keyset: keys.Keyset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, said = tmp_path / "out/release", []
    bare = tuple(dataclasses.replace(verb, tools=False, secrets=False) for verb in commands.VERBS)
    words = ["publish", str(written), "--keys", str(keyset.folder), "--to", f"oci:{target}"]
    target.mkdir(parents=True)  # an empty folder is as good as none
    for sequence in (42, 42, 44):
        written.write_text(written.read_text().replace("sequence: 42", f"sequence: {sequence}"))
        assert cli.main(words, bare) == 0
        out, err = capsys.readouterr()
        assert "published" not in err
        said.append(out.splitlines()[0])
    to = f"published sequence 42 to oci:{target}"
    assert said == [to, to, f"published sequence 44 to oci:{target}, in place of sequence 42"]


def other_content(folder: Path, host: Host) -> None:
    shutil.rmtree(folder / "hostfs")
    tar = make_tar({"sbin/": b"", "sbin/init": PROGRAM})
    plain(host, folder / "hostfs", tar, tar=tar)


@pytest.mark.parametrize("sequence", [41, 42, 43])
def test_no_release_takes_the_place_of_one_that_does_not_come_before_it(
    sequence: int, written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    """Two of one sequence nobody could tell apart, and the later of two would be lost."""
    target = tmp_path / "out/release"
    publish.publish(host, written, keyset, f"oci:{target}")
    before = snapshot(target)
    written.write_text(written.read_text().replace("sequence: 42", f"sequence: {sequence}"))
    other_content(tmp_path, host)
    if sequence == 43:
        publish.publish(host, written, keyset, f"oci:{target}")
        assert snapshot(target) != before
        return
    says = {41: "holds sequence 42, and this is 41: ", 42: "holds another release of sequence 42: "}
    with pytest.raises(Failure, match=f"{says[sequence]}write `sequence: 43` into the manifest"):
        publish.publish(host, written, keyset, f"oci:{target}")
    assert snapshot(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["release"]
    # A build makes all that is in its folder anew.
    publish.publish(host, written, keyset, f"oci:{target}", anew=True)
    assert snapshot(target) != before


def test_a_release_of_another_product_or_with_more_beside_it_is_left_alone(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    target, other = tmp_path / "release", keys.new(host, tmp_path / "other", "other")
    publish.publish(host, written, keyset, f"oci:{target}")
    before = snapshot(target)
    mine = written.read_text()
    written.write_text(mine.replace(keyset.product, other.product).replace("sequence: 42", "sequence: 43"))
    with pytest.raises(Failure, match=f"holds a release of product {keyset.product}: name another folder"):
        publish.publish(host, written, other, f"oci:{target}")
    written.write_text(mine.replace("sequence: 42", "sequence: 43"))
    for place in ("", "blobs", "blobs/sha256"):
        (target / place / "notes").write_text("precious")
        for anew in (False, True):
            with pytest.raises(Failure, match=r"holds more than a release \(notes\): name another folder"):
                publish.publish(host, written, keyset, f"oci:{target}", anew=anew)
        assert (target / place / "notes").read_text() == "precious"
        (target / place / "notes").unlink()
    assert snapshot(target) == before
    (index,) = images.Layout(target).read_index()
    images.Layout(target).blob_path(index.digest).unlink()
    with pytest.raises(Failure, match="the release in .* cannot be read .*: remove it, or name another"):
        publish.publish(host, written, keyset, f"oci:{target}")


def test_a_folder_that_is_no_layout_is_never_replaced(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("content")
    with pytest.raises(Failure, match="exists and is no OCI image layout"):
        publish.publish(host, written, keyset, f"oci:{tmp_path}/precious")
    assert (tmp_path / "precious/file").read_text() == "content"
    for destination in ("docker://registry.example/x", "docker://A/b:1", "oci:", str(tmp_path)):
        with pytest.raises(Usage):
            publish.publish(host, written, keyset, destination)


# --- What a machine would say -------------------------------------------------------------------------


def spoil(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("cut", "LAYER-SIZE"),
        ("longer", "LAYER-SIZE"),
        ("superblock", "LAYER-SUPERBLOCK"),
        ("magic", "LAYER-FILESYSTEM"),
        ("absent", "STORE-BLOB"),
        ("content", "LAYER-READ"),
        ("signature", "LAYER-SIGNATURE"),
        ("padded signature", "LAYER-SIGNATURE"),
        ("foreign signature", "LAYER-SIGNATURE"),
        ("image", "IMAGE-DIGEST"),
    ],
)
def test_what_a_machine_would_refuse_is_refused_before(
    fault: str, check: str, written: Path, keyset: keys.Keyset, other: keys.Keyset, host: Host,
    tmp_path: Path,
) -> None:  # fmt: skip
    publish.publish(host, written, keyset, f"oci:{tmp_path}/release")
    layout = images.Layout(tmp_path / "release")
    contents = init.parse_manifest(parts(layout)[init.MANIFEST_MEDIA_TYPE][0])
    policy = publish.check_signer(keyset, contents)
    assert publish.check_release(host, layout, policy, keyset).contents == contents
    target = contents.targets[0]
    (layer,) = init.parse_image(layout.blob_path(target.digest).read_bytes()).layers
    path, signature = layout.blob_path(layer.digest), layout.blob_path(target.layer_signatures[0])
    superblock = init.verity_data_blocks(layer.size) * init.BLOCK
    foreign = other.signer("layer").sign_pkcs7(layer.root_hash.encode())
    spoilers: dict[str, Callable[[], None]] = {
        "cut": lambda: os.truncate(path, layer.size - init.BLOCK),
        "longer": lambda: os.truncate(path, layer.size + 1),
        "superblock": lambda: spoil(path, superblock, bytes(8)),
        "magic": lambda: spoil(path, 1024, bytes(4)),
        "absent": path.unlink,
        "content": lambda: spoil(path, layer.size - 1, b"x"),
        "padded signature": lambda: spoil(signature, signature.stat().st_size, bytes(1)),
        "signature": lambda: spoil(signature, 100, b"changed"),
        "foreign signature": lambda: spoil(signature, 0, foreign),
        "image": lambda: spoil(layout.blob_path(target.digest), 1, b"x"),
    }
    spoilers[fault]()
    with pytest.raises(init.Refused) as refused:
        publish.check_release(host, layout, policy, keyset)
    assert refused.value.check == check


@pytest.mark.parametrize("fault", ["another epoch", "another product", "unsigned", "absent", "no signature"])
def test_a_release_without_its_epoch_order_is_refused(
    fault: str, written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    layout = images.Layout(tmp_path / "release")
    contents = init.parse_manifest(written.read_bytes(), publish.WRITTEN)
    policy, sign = publish.check_signer(keyset, contents), keyset.signer("product").sign
    publish.publish(host, written, keyset, f"oci:{layout.path}")
    signed = {kind: found[0] for kind, found in parts(layout).items()}
    product = "00000000-1111-2222-3333-444444444444" if fault == "another product" else keyset.product
    statement = images.encode(init.epoch_statement(product, 4 if fault == "another epoch" else 3))
    signed[init.EPOCH_MEDIA_TYPE] = statement
    signed[init.EPOCH_SIGNATURE_MEDIA_TYPE] = sign(statement + b"\n" if fault == "unsigned" else statement)
    if fault in ("absent", "no signature"):
        del signed[init.EPOCH_MEDIA_TYPE if fault == "absent" else init.EPOCH_SIGNATURE_MEDIA_TYPE]
    publish._write_release(host, layout, signed, [])
    with pytest.raises(init.Refused) as refused:
        publish.check_release(host, layout, policy, keyset)
    assert refused.value.check == "EPOCH-ORDER"


# --- The encoding -------------------------------------------------------------------------------------

names = st.from_regex(init.NAME, fullmatch=True)
digests = st.from_regex(init.DIGEST, fullmatch=True)
volumes = st.builds(
    init.Volume,
    label=names,
    persistent=st.booleans(),
    nsgroup=names | st.just(""),
    size=st.builds(lambda n, unit: n << 10 * unit, st.integers(1, 999_999_999), st.integers(1, 4)),
)
images_made = st.builds(
    images.ConvertedImage,
    manifest=st.builds(images.Descriptor, st.just("a/b"), digests, st.integers(1, 4 * init.MIB)),
    layers=st.just(()),
)
signatures = st.lists(st.builds(images.Descriptor, st.just("a/b"), digests, st.just(9)), max_size=3)
ipv4 = st.builds("{}/{}".format, st.ip_addresses(v=4), st.integers(0, 32))
ipv6 = st.builds("{}/{}".format, st.ip_addresses(v=6), st.integers(0, 128))
tcp = st.integers(1, 65535)
networks = st.one_of(
    st.just(init.Network("none", "", "", ())),
    st.just(init.Network("host", "", "", ())),
    st.builds(
        init.Network,
        type=st.just("simple"),
        ipv4=st.just("") | ipv4,
        ipv6=st.just("") | ipv6,
        ports=st.lists(st.builds(init.Port, tcp, tcp), max_size=3).map(tuple),
    ),
)
paths = st.lists(st.from_regex(r"[A-Za-z0-9_+@-]{1,9}", fullmatch=True), min_size=1, max_size=3).map(
    lambda parts: "/" + "/".join(parts)
)


@st.composite
def manifests(draw: st.DrawFn) -> tuple[init.Contents, list[publish.SignedTarget]]:
    """Make a manifest that uses every field."""
    storage = draw(st.lists(volumes, max_size=3, unique_by=lambda volume: volume.label))
    targets: list[publish.SignedTarget] = []
    for name in draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        kind = draw(st.sampled_from(["container", "fs-only", "hostfs", "bootkit"]))
        boots = kind in ("hostfs", "bootkit")
        if boots and kind in [item.target.service_name for item in targets]:
            continue
        labels = st.sampled_from([volume.label for volume in storage]) if storage else st.nothing()
        mounts = st.lists(st.builds(init.StorageMount, paths, labels), max_size=2 if storage else 0)
        target = init.Target(
            service_name=kind if boots else name,
            service_type=kind,
            version=draw(st.from_regex(init.VERSION, fullmatch=True)),
            source="oci:x",
            digest="",
            size=0,
            layer_signatures=(),
            nsgroup=draw(names | st.just("")),
            writable=draw(st.sampled_from(["", "all", "etc", "none"])) if kind == "hostfs" else "",
            network=draw(networks) if kind == "container" else init.Network("none", "", "", ()),
            storage=tuple(draw(mounts)),
        )
        targets.append(publish.SignedTarget(target, draw(images_made), tuple(draw(signatures))))
    contents = init.Contents(
        version=1,
        product=str(draw(st.uuids())),
        sequence=draw(st.integers(1, init.MAX_SEQUENCE)),
        epoch=draw(st.integers(1, init.MAX_EPOCH)),
        update_type=draw(st.sampled_from(["complete", "partial"])),
        storage=tuple(storage),
        targets=(),
    )
    return contents, targets


@settings(max_examples=60, deadline=None)
@given(manifests())
def test_whatever_is_encoded_reads_back(
    made: tuple[init.Contents, list[publish.SignedTarget]],
) -> None:
    contents, targets = made
    read = init.parse_manifest(publish.encode_manifest(contents, targets))
    assert read._replace(targets=()) == contents
    for one, two in zip(targets, read.targets, strict=True):
        assert two == one.target._replace(
            source="",
            digest=one.image.manifest.digest,
            size=one.image.manifest.size,
            layer_signatures=tuple(signature.digest for signature in one.signatures),
        )


def test_a_layout_of_somebodys_images_is_never_replaced(
    written: Path, keyset: keys.Keyset, host: Host
) -> None:
    """Sources lie beside the manifest: one of them as the destination would be lost."""
    sources = [path.parent for path in written.parent.glob("*/oci-layout")]
    before = {path: sorted(path.rglob("*")) for path in sources}
    assert before
    for path in sources:
        with pytest.raises(Failure, match="no release"):
            publish.publish(host, written, keyset, f"oci:{path}")
    assert {path: sorted(path.rglob("*")) for path in sources} == before


def test_a_release_of_kept_layers_is_the_same(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = images.open_cache(host)
    assert cache
    for name, kept_before in (("plain", None), ("one", 0), ("two", 2)):
        with_cache = cache if kept_before is not None else None
        publish.publish(host, written, keyset, f"oci:{tmp_path}/{name}", cache=with_cache)
        assert capsys.readouterr().err.count("converted before") == (kept_before or 0)
    assert snapshot(tmp_path / "plain") == snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


# --- The destination, meanwhile -----------------------------------------------------------------------


class Meddler(Host):
    """A host on which somebody acts when layers are made."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self._act = act

    def say(self, text: str) -> None:
        if "making its file system" in text:
            self._act()


@pytest.mark.parametrize("before", [False, True])
def test_a_destination_that_became_somebodys_is_left_alone(
    before: bool, written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    target = tmp_path / "out/release"
    if before:
        publish.publish(host, written, keyset, f"oci:{target}")

    def act() -> None:
        if not (target / "precious").exists():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(tmp_path / "hostfs", target)
            (target / "precious").write_text("somebody's images")

    with pytest.raises(Failure, match="holds images that are no release"):
        publish.publish(Meddler(act), written, keyset, f"oci:{target}")
    assert (target / "precious").read_text() == "somebody's images"
    assert [path.name for path in target.parent.iterdir()] == ["release"]


def test_what_came_out_is_looked_at_and_put_back(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    """Between the last look and the swap is a moment still."""
    target = tmp_path / "out/release"
    publish.publish(host, written, keyset, f"oci:{target}")

    class Late(Host):
        def swap(self, one: Path, two: Path) -> None:
            if not (target / "precious").exists() and not (one / "precious").exists():
                (target / "index.json").unlink()
                (target / "precious").write_text("text")
            super().swap(one, two)

    with pytest.raises(Failure, match="no OCI image layout"):
        publish.publish(Late(), written, keyset, f"oci:{target}")
    assert (target / "precious").read_text() == "text"


@pytest.mark.parametrize("fault", [errno.EIO, errno.EINVAL])
def test_a_swap_that_fails_loses_nothing(
    fault: int, written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    target = tmp_path / "out/release"
    publish.publish(host, written, keyset, f"oci:{target}")

    class Failing(Host):
        def swap(self, one: Path, two: Path) -> None:
            if fault == errno.EINVAL:
                (target / "oci-layout").unlink()  # it becomes something else before it is moved aside
            raise OSError(fault, "a fault")

    before = snapshot(target)
    with pytest.raises(Failure, match="cannot put the release in its place|no OCI image layout"):
        publish.publish(Failing(), written, keyset, f"oci:{target}")
    assert {**snapshot(target), "oci-layout": before["oci-layout"]} == before
    assert [path.name for path in target.parent.iterdir()] == ["release"]


def test_a_file_system_that_cannot_swap(
    written: Path, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    class Old(Host):
        def swap(self, one: Path, two: Path) -> None:
            raise OSError(errno.EINVAL, "not here")

    target = tmp_path / "out/release"
    first = publish.publish(host, written, keyset, f"oci:{target}")
    written.write_text(written.read_text().replace("sequence: 42", "sequence: 43"))
    second = publish.publish(Old(), written, keyset, f"oci:{target}")
    (listed,) = images.Layout(target).read_index()
    assert listed.digest == second.index_digest != first.index_digest
    assert [path.name for path in target.parent.iterdir()] == ["release"]


# --- What a machine could not start -------------------------------------------------------------------

STARTS = """\
version: 1
product: {product}
sequence: 1
epoch: 1
update_type: {update_type}
targets:
"""


def starts(folder: Path, keyset: keys.Keyset, *targets: str, update_type: str = "partial") -> Path:
    """Write a manifest of targets that are named like their types."""
    lines = [
        f"  - {{service_name: {name}, service_type: {name}, source: 'oci:./{name}', version: '1.0'}}\n"
        for name in targets
    ]
    path = folder / "manifest.yaml"
    path.write_text(STARTS.format(product=keyset.product, update_type=update_type) + "".join(lines))
    return path


def verity_image(
    host: Host, folder: Path, content: bytes, count: int = 1, kind: str = images.EROFS_TYPE
) -> None:
    """Make an image whose layers claim to be file systems under verity."""
    layout, file = images.Layout(folder), folder.parent / "layer"
    file.write_bytes(content + bytes(-len(content) % init.BLOCK))
    root = images.append_verity(host, file, salt="aa" * 32, name="11" * 32)
    layer = layout.add_blob(host, file, kind, annotations={images.ROOT_HASH: root})
    config = layout.add_blob(host, b"{}", images.EMPTY_TYPE)
    document = {
        "schemaVersion": 2,
        "config": config.json(),
        "layers": [layer.json()] * count,
        "annotations": dict.fromkeys(init.UKI_ID_ANNOTATIONS.values(), "ab" * 32),
    }
    layout.write_index(host, [layout.add_blob(host, images.encode(document), images.MANIFEST_TYPE)])


def an_erofs(host: Host, folder: Path) -> bytes:
    (folder / "tree.tar").write_bytes(TREE)
    images.make_erofs(host, folder / "tree.tar", folder / "erofs")
    return (folder / "erofs").read_bytes()


def a_squashfs(host: Host, folder: Path) -> bytes:
    (folder / "tree/sbin").mkdir(parents=True)
    (folder / "tree/sbin/init").write_bytes(PROGRAM * 99)
    host.run(["mksquashfs", folder / "tree", folder / "squashfs", "-quiet", "-no-progress"])
    return (folder / "squashfs").read_bytes()


@pytest.mark.parametrize("kind", ["erofs", "squashfs"])
@pytest.mark.parametrize("fault", ["none", "magic alone", "superblock alone"])
def test_a_file_system_that_does_not_mount_is_not_published(
    fault: str, kind: str, need: Need, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    need("mkfs.erofs", "fsck.erofs", "veritysetup", "openssl", "mksquashfs", "unsquashfs")
    whole = an_erofs(host, tmp_path) if kind == "erofs" else a_squashfs(host, tmp_path)
    magic = bytes(1024) + whole[1024:1028] if kind == "erofs" else whole[:4]
    content = {
        "none": whole,
        "magic alone": magic + bytes(4092),
        "superblock alone": whole[: 1152 if kind == "erofs" else 96] + bytes(len(whole)),
    }[fault]
    verity_image(host, tmp_path / "hostfs", content)
    manifest = starts(tmp_path, keyset, "hostfs")
    if fault == "none":
        publish.publish(host, manifest, keyset, f"oci:{tmp_path}/release")
        return
    with pytest.raises(Failure, match=f"its {kind} cannot be read .*: make it again"):
        publish.publish(host, manifest, keyset, f"oci:{tmp_path}/release")


@pytest.mark.parametrize(("hostfs", "bootkit", "fine"), [(250, 249, True), (250, 250, False)])
@pytest.mark.parametrize("update_type", ["partial", "complete"])
def test_no_more_layers_than_one_root_takes(
    hostfs: int, bootkit: int, fine: bool, update_type: str, need: Need, keyset: keys.Keyset, host: Host,
    tmp_path: Path,
) -> None:  # fmt: skip
    need("mkfs.erofs", "fsck.erofs", "veritysetup", "openssl")
    content = an_erofs(host, tmp_path)
    verity_image(host, tmp_path / "hostfs", content, hostfs)
    verity_image(host, tmp_path / "bootkit", content, bootkit)
    manifest = starts(tmp_path, keyset, "hostfs", "bootkit", update_type=update_type)
    if fine:
        publish.publish(host, manifest, keyset, f"oci:{tmp_path}/release")
        return
    with pytest.raises(init.Refused, match="OVERLAY-MOUNT: expected at most 499 layers .*, seen 500"):
        publish.publish(host, manifest, keyset, f"oci:{tmp_path}/release")


INTERPRETER = struct.pack("<4s14xH12xQ14xHH", b"\x7fELF", 62, 64, 56, 1).ljust(64, b"\0") + struct.pack(
    "<I4xQ16xQ", 3, 120, 8
).ljust(56, b"\0")
DYNAMIC = INTERPRETER + b"/lib/ld\0"

INITS: dict[str, tuple[list[dict[str, bytes]], bool]] = {
    "static": ([{"sbin/": b"", "sbin/init": PROGRAM}], True),
    "systemd": ([{"usr/lib/systemd/": b"", "usr/lib/systemd/systemd": PROGRAM}], True),
    "merged usr": ([{"usr/sbin/": b"", "usr/sbin/init": PROGRAM, "sbin@": b"usr/sbin"}], True),
    "absolute link": ([{"sbin/": b"", "opt/": b"", "opt/x": PROGRAM, "sbin/init@": b"/opt/x"}], True),
    "link upwards": ([{"sbin/": b"", "opt/": b"", "opt/x": PROGRAM, "sbin/init@": b"../../opt/x"}], True),
    "interpreter": ([{"sbin/": b"", "lib/": b"", "lib/ld": PROGRAM, "sbin/init": DYNAMIC}], True),
    "upper layer": ([{"etc/": b""}, {"sbin/": b"", "sbin/init": PROGRAM}], True),
    "removed": ([{"sbin/": b"", "sbin/init": PROGRAM}, {"sbin/.wh.init": b""}], False),
    "none": ([{"etc/": b""}], False),
    "empty": ([{"sbin/": b"", "sbin/init": b""}], False),
    "no program": ([{"sbin/": b"", "sbin/init": b"text"}], False),
    "no interpreter": ([{"sbin/": b"", "sbin/init": DYNAMIC}], False),
    "folder": ([{"sbin/": b"", "sbin/init/": b""}], False),
    "loop": ([{"sbin/": b"", "sbin/init@": b"init"}], False),
    "dangling": ([{"sbin/": b"", "sbin/init@": b"/opt/x"}], False),
}


@pytest.mark.parametrize("name", INITS)
def test_a_hostfs_without_init_is_refused(
    name: str, need: Need, keyset: keys.Keyset, host: Host, tmp_path: Path
) -> None:
    need("mkfs.erofs", "veritysetup", "openssl")
    layers, fine = INITS[name]
    layout, made = images.Layout(tmp_path / "hostfs"), [make_tar(files) for files in layers]
    layout.write_index(host, [image(host, layout, [layout.add_blob(host, tar, TAR) for tar in made], made)])
    manifest, cache = starts(tmp_path, keyset, "hostfs"), images.open_cache(host)
    # The second time its layers come from the cache.
    for _ in range(2):
        if fine:
            publish.publish(host, manifest, keyset, f"oci:{tmp_path}/release", cache=cache)
        else:
            with pytest.raises(init.Refused, match="HOSTFS-INIT"):
                publish.publish(host, manifest, keyset, f"oci:{tmp_path}/release", cache=cache)
