"""Bad input at every verb: one line that names the thing and the remedy, the right status, nothing left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mosinit import cli, commands, init, keys
from mosinit.host import FullDisk, Host
from tests.test_images import PROGRAM, docker_archive, make_tar, plain

Need = Callable[..., None]
TREE = make_tar({"sbin/": b"", "sbin/init": PROGRAM + bytes(200_000)})

# Verbs enter the tools tree first; here they take what is there.
VERBS = tuple(replace(verb, tools=False) for verb in commands.VERBS)

MANIFEST = """\
version: 1
product: {product}
sequence: 1
epoch: 1
update_type: partial
targets:
  - service_name: hostfs
    service_type: hostfs
    source: oci:./hostfs
    version: 1.0.0
"""


# Manifests that name an image each that is none.
SOURCES = {
    "garbagearchive": "docker-archive:./garbage",
    "emptyarchive": "docker-archive:./empty",
    "folderarchive": "docker-archive:./folder",
    "cutarchive": "docker-archive:./cut.tar",
    "namelessarchive": "docker-archive:./saved.tar:no/such:1",
    "noindex": "oci:./noindex",
    "otherindex": "oci:./otherindex",
    "noblobs": "oci:./noblobs",
    "notag": "oci:./hostfs:none",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of good and bad things, that no verb may change."""
    folder = tmp_path_factory.mktemp("world")
    host = Host()
    keyset = keys.new(host, folder / "keys", "acme")
    keys.new(host, folder / "other", "other")
    keys.export(host, folder / "keys", folder / "organisation")
    (folder / "file").write_bytes(b"content")
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "folder/file").touch()
    (folder / "garbage").write_bytes(bytes(range(256)) * 300)
    plain(host, folder / "hostfs", TREE, tar=TREE)
    (folder / "good.yaml").write_text(MANIFEST.format(product=keyset.product))
    (folder / "foreign.yaml").write_text(MANIFEST.format(product="11111111-2222-4333-8444-555555555555"))
    (folder / "nosource.yaml").write_text(
        MANIFEST.format(product=keyset.product).replace("/hostfs", "/none")
    )
    (folder / "filesource.yaml").write_text(
        MANIFEST.format(product=keyset.product).replace("/hostfs", "/file")
    )
    for name, source in SOURCES.items():
        (folder / f"{name}.yaml").write_text(
            MANIFEST.format(product=keyset.product).replace("oci:./hostfs", source)
        )
    docker_archive(folder / "saved.tar", [TREE])
    (folder / "cut.tar").write_bytes((folder / "saved.tar").read_bytes()[:9000])
    for name, index in {"noindex": b"\xff{", "otherindex": b"{}"}.items():
        shutil.copytree(folder / "hostfs", folder / name)
        (folder / name / "index.json").write_bytes(index)
    shutil.copytree(folder / "hostfs", folder / "noblobs")
    shutil.rmtree(folder / "noblobs/blobs")
    (folder / "short.yaml").write_text(
        MANIFEST.format(product=keyset.product).replace("partial", "complete")
    )
    (folder / "broken.yaml").write_text(
        MANIFEST.format(product=keyset.product).replace("epoch: 1", "epoch: 0")
    )
    (folder / "huge.yaml").write_bytes(b"#" * (init.MANIFEST_BYTES + 1))
    for name, words in {
        "login": "user:secret-73519",
        "nologin": "secret-73519",
        "open": "a:secret-73519",
    }.items():
        (folder / name).touch(0o600)
        (folder / name).write_text(words)
    (folder / "open").chmod(0o644)
    (folder / "binary").touch(0o600)
    (folder / "binary").write_bytes(b"user:secret-73519\xff")
    (folder / "disk").write_bytes(bytes(1 << 20))
    _bad_keysets(folder)
    return folder


def _bad_keysets(folder: Path) -> None:
    """Make keysets each of which has one fault."""

    def spoiled(name: str) -> Path:
        shutil.copytree(folder / "keys", folder / name)
        return folder / name

    (spoiled("keys-json") / "keyset.json").write_text("{")
    (spoiled("keys-schema") / "keyset.json").write_text('{"schema": 9}')
    (spoiled("keys-list") / "keyset.json").write_text("[]")
    (spoiled("keys-lost") / "layer.key").unlink()
    (spoiled("keys-open") / "layer.key").chmod(0o640)
    (spoiled("keys-garbage") / "layer.key").write_bytes(b"\0garbage")
    (spoiled("keys-pem") / "layer.pem").write_bytes(b"\0garbage")
    shutil.copy(folder / "other/layer.key", spoiled("keys-foreign") / "layer.key")
    (spoiled("keys-folder") / "uki.pem").unlink()
    (folder / "keys-folder/uki.pem").mkdir()
    (spoiled("keys-encrypted") / "layer.key").write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )


def state(folder: Path) -> list[tuple[str, int, float]]:
    """List everything below a folder with size and date."""
    found = [(str(path), path.lstat()) for path in folder.rglob("*")]
    return sorted((name, entry.st_size, entry.st_mtime) for name, entry in found)


PUBLISH = "publish good.yaml --keys keys --to oci:new"
PUSH = "publish good.yaml --keys keys --to docker://127.0.0.1:1/x:1"
VM = "vm boot --disk disk --dir new"
KEYSETS = {
    "none": "none is no keyset (it has no keyset.json): make one by `mosinit keys new`",
    "file": "cannot read file/keyset.json: Not a directory; restore it",
    "folder": "folder is no keyset",
    "keys-json": "cannot read keys-json/keyset.json",
    "keys-list": "cannot read keys-list/keyset.json",
    "keys-schema": "has schema 9",
    "keys-lost": "the keyset lacks keys-lost/layer.key: restore it from a backup",
    "keys-open": "chmod 600 keys-open/layer.key",
    "keys-garbage": "cannot read keys-garbage/layer.key",
    "keys-encrypted": "cannot read keys-encrypted/layer.key",
    "keys-pem": "cannot read role layer",
    "keys-foreign": "keys-foreign/layer.key does not fit",
    "keys-folder": "cannot read role uki",
}

CASES: list[tuple[str, int, str]] = [
    # keys
    ("keys new file --product acme", 1, "file exists already and keys are never overwritten"),
    ("keys new folder --product acme", 1, "folder exists already"),
    ("keys new file/new --product acme", 1, "file"),
    ("keys new new --product Acme", 2, "product name 'Acme'"),
    (
        "keys new new --product ",
        2,
        "product name '' does not fit: name one of 1 to 64 small letters, digits",
    ),
    ("keys new /proc/new --product acme", 1, "nothing can be made in /proc (No such file"),
    ("keys export keys --out /proc/new", 1, "nothing can be made in /proc (No such file"),
    ("keys new new --product ../x", 2, "product name '../x'"),
    *((f"keys show {name}", 1, says) for name, says in KEYSETS.items()),
    # provision
    ("provision --organisation o --answer a --dir d", 2, "name one thing: --organisation ORG"),
    # build
    *((f"build --keys {name} --out new", 1, says) for name, says in KEYSETS.items()),
    ("build --keys keys --out file", 1, "file is not a folder: name another one with --out"),
    ("build --keys keys --out file/new", 1, "file"),
    ("build --keys keys --out new --epoch 0", 2, "--epoch"),
    ("build --keys keys --out new --epoch 65", 2, "--epoch"),
    ("build --keys keys --out new --epoch -1", 2, "--epoch"),
    ("build --keys keys --out new --epoch 1.5", 2, "--epoch"),
    ("build --keys keys --out new --profile none", 2, "no profile none: --profile takes demo ("),
    ("build --keys keys --out new --profile ../x", 2, "no profile ../x"),
    (
        "build --keys organisation --out new",
        1,
        "organisation holds public parts alone: name the keyset itself",
    ),
    ("build --keys keys --out new --manifest none.yaml", 1, "cannot read none.yaml"),
    ("build --keys keys --out new --manifest broken.yaml", 3, "broken.yaml: line 4, epoch"),
    ("build --keys keys --out new --manifest good.yaml --epoch 3", 1, "good.yaml is of epoch 1"),
    ("build --keys keys --out new --manifest nosource.yaml", 1, "oci:./none of hostfs is not there"),
    # publish
    *((f"publish good.yaml --keys {name} --to oci:new", 1, says) for name, says in KEYSETS.items()),
    ("publish none.yaml --keys keys --to oci:new", 1, "cannot read none.yaml: No such file"),
    ("publish folder --keys keys --to oci:new", 1, "cannot read folder: Is a directory"),
    ("publish file/x --keys keys --to oci:new", 1, "cannot read file/x: Not a directory"),
    ("publish garbage --keys keys --to oci:new", 3, "MANIFEST-FORMAT"),
    ("publish empty --keys keys --to oci:new", 3, "MANIFEST-FORMAT"),
    ("publish huge.yaml --keys keys --to oci:new", 1, "huge.yaml is larger than"),
    ("publish broken.yaml --keys keys --to oci:new", 3, "line 4, epoch"),
    ("publish short.yaml --keys keys --to oci:new", 3, "MANIFEST-TARGET"),
    ("publish foreign.yaml --keys keys --to oci:new", 1, "the manifest is for product 11111111"),
    ("publish nosource.yaml --keys keys --to oci:new", 1, "none"),
    ("publish filesource.yaml --keys keys --to oci:new", 1, "file"),
    ("publish garbagearchive.yaml --keys keys --to oci:new", 1, "invalid tar header; save it again"),
    ("publish emptyarchive.yaml --keys keys --to oci:new", 1, "file does not exist; save it again"),
    ("publish folderarchive.yaml --keys keys --to oci:new", 1, "folder is no file: name an archive"),
    ("publish cutarchive.yaml --keys keys --to oci:new", 1, "unexpected EOF; save it again"),
    (
        "publish namelessarchive.yaml --keys keys --to oci:new",
        1,
        "not found; save it again, or check its name",
    ),
    ("publish noindex.yaml --keys keys --to oci:new", 1, "noindex is no image that can be used"),
    ("publish otherindex.yaml --keys keys --to oci:new", 1, "otherindex is no image that can be used"),
    (
        "publish noblobs.yaml --keys keys --to oci:new",
        1,
        "bytes long: fetch the image again",
    ),
    ("publish notag.yaml --keys keys --to oci:new", 1, "has 0 images tagged none: name one of (no tag)"),
    ("publish good.yaml --keys other --to oci:new", 1, "name the other's keyset by --keys"),
    ("publish good.yaml --keys keys --to new", 2, "cannot publish to new"),
    ("publish good.yaml --keys keys --to oci:", 2, "cannot publish to oci: without a folder: a release"),
    ("publish good.yaml --keys keys --to oci:file", 1, "file exists and is no OCI image layout"),
    ("publish good.yaml --keys keys --to oci:folder", 1, "folder exists and is no OCI image layout"),
    ("publish good.yaml --keys keys --to oci:file/new", 1, "file"),
    ("publish good.yaml --keys keys --to docker://r.example/x", 2, "needs a tag"),
    ("publish good.yaml --keys keys --to docker://u:secret-73519@r.example/x:1", 2, "names no image"),
    (f"{PUSH} --tls-ca none", 1, "cannot read none: No such file"),
    (f"{PUSH} --tls-ca folder", 1, "cannot read folder: Is a directory"),
    (f"{PUSH} --tls-ca garbage", 1, "garbage holds no certificate in PEM form"),
    (f"{PUSH} --login none", 1, "cannot read none: No such file"),
    (f"{PUSH} --login folder", 1, "cannot read folder: Is a directory"),
    (f"{PUSH} --login open", 1, "open holds a password and is open to others: chmod 600 open"),
    (f"{PUSH} --login nologin", 1, "nologin does not hold one line USER:PASSWORD"),
    (f"{PUSH} --login binary", 1, "cannot read binary: it is no text"),
    (f"{PUBLISH} --login login", 2, "--login goes with a registry"),
    *((f"{PUBLISH} --timeout {value}", 2, "--timeout") for value in ("0", "-1", "nan", "inf", "x")),
    # uki sign
    *(
        (f"uki sign garbage --initrd file --keys {name} --out new", 1, says)
        for name, says in KEYSETS.items()
    ),
    ("uki sign none --initrd file --keys keys --out new", 1, "none"),
    ("uki sign folder --initrd file --keys keys --out new", 1, "folder"),
    (
        "uki sign garbage --initrd file --keys keys --out new",
        1,
        "garbage is not a UKI (no PE file): name the one",
    ),
    ("uki sign empty --initrd file --keys keys --out new", 1, "empty is not a UKI"),
    # vm boot
    ("vm boot --disk none --dir new", 1, "cannot read the disk none: make it first, or name another"),
    ("vm boot --disk folder --dir new", 1, "cannot read the disk folder"),
    ("vm boot --disk disk --dir file", 1, "file"),
    ("vm boot --disk disk --dir new", 1, "disk has no partition table that can be read: name an image"),
    ("vm boot --disk empty --dir new", 1, "empty has no partition table that can be read"),
    ("vm boot --disk garbage --dir new", 1, "garbage has no partition table that can be read"),
    (f"{VM} --keys none", 1, "none is no keyset: make one by `mosinit keys new`"),
    (f"{VM} --keys file", 1, "file is no keyset"),
    *((f"{VM} --timeout {value}", 2, "--timeout") for value in ("0", "-1", "nan", "inf", "x")),
    # the rest
    ("demo --dir file", 1, "file"),
    ("demo --dir keys", 2, "keys is a keyset, where nothing else goes: name another place by --dir"),
    ("test unit --cold", 2, "--cold"),
    ("test neither", 2, "invalid choice"),
    ("explain", 1, "not started by mosinit: name a report"),
    ("explain SB-OFF --all", 2, "one id"),
    ("explain --event-log file --against garbage", 1, "garbage cannot be read"),
    ("explain \x1b[31m", 2, "no check has the id ?[31m"),
    ("explain " + "x" * 5000, 2, "explain --all"),
]


@pytest.mark.parametrize(("words", "status", "says"), CASES, ids=lambda value: str(value)[:60])
def test_bad_input(
    words: str, status: int, says: str, world: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], need: Need,
) -> None:  # fmt: skip
    need("mkfs.erofs", "veritysetup", "sfdisk", "mtype", "virt-fw-vars", "skopeo")
    monkeypatch.chdir(world)
    before = state(world)
    try:
        assert cli.main(words.split(" "), VERBS) == status
        # The folder of a machine is one whether it boots or not.
        if not words.startswith("vm boot"):
            assert state(world) == before
    finally:
        shutil.rmtree(world / "new", ignore_errors=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    starts = ("mosinit: error: ", "mosinit: refused: ")
    (fault,) = [line for line in shown.err.splitlines() if line.startswith(starts)]
    assert says in fault
    assert len(fault) < 700
    assert all(character.isprintable() or character == "\n" for character in shown.err)
    assert "secret-73519" not in shown.err
    assert state(world) == before


# --- A full disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "keys new {full}/keys --product acme",
        "publish good.yaml --keys keys --to oci:{full}/release",
        "publish good.yaml --keys keys --to oci:{full}/a/b/release",
        "vm boot --disk disk --dir {full}/vm --keys keys",
    ],
)
def test_a_full_disk(
    words: str, full: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    need: Need,
) -> None:  # fmt: skip
    need("mkfs.erofs", "veritysetup", "virt-fw-vars")
    monkeypatch.chdir(world)
    before = state(world)
    assert cli.main(words.format(full=full).split(" "), VERBS) == 1
    said = capsys.readouterr().err
    assert "make room" in said.splitlines()[-1]
    assert str(full) in said.splitlines()[-1]
    assert state(world) == before
    assert [path for path in full.rglob("*") if path.is_file() and path.stat().st_size] == []


def test_a_tree_that_a_full_disk_stops_is_one_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    each = [("from/a", "to/a", "[Errno 28] No space left on device: 'to/a'"), ("from/b", "to/b", "the same")]
    reason = r"is full: make room there \(\[Errno 28\] No space"
    with pytest.raises(FullDisk, match=reason) as told, Host().scratch(near=tmp_path / "new"):
        raise shutil.Error(each)
    assert "from/" not in str(told.value)
