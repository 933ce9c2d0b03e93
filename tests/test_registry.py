"""Registries: a real one takes and gives releases; one that misbehaves gets nothing and breaks nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mosinit import cli, commands, images, keys, publish, registry
from mosinit.host import Failure, Host, Usage
from tests import registries
from tests.recorder import Watched
from tests.registries import PASSWORD, USER
from tests.test_images import PROGRAM, make_tar, plain

Need = Callable[..., None]
TREE = make_tar({"sbin/": b"", "sbin/init": PROGRAM + b"init " * 5000})

WRITTEN = """\
version: 1
product: {product}
sequence: {sequence}
epoch: 1
update_type: partial
targets:
  - service_name: hostfs
    service_type: hostfs
    source: {source}
    version: 1.0.0
"""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> registries.Authority:
    return registries.Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def real(need: Need, tmp_path: Path, authority: registries.Authority) -> Iterator[registries.Real]:
    need("docker-registry", "skopeo", "mkfs.erofs", "veritysetup")
    folder = tmp_path / "registry"
    folder.mkdir()
    with registries.real_registry(folder, authority) as running:
        yield running


@pytest.fixture
def bad(need: Need, authority: registries.Authority) -> Iterator[registries.Registry]:
    need("skopeo", "mkfs.erofs", "veritysetup")
    with registries.running(authority.server()) as running:
        yield running


@pytest.fixture
def source(host: Host, tmp_path: Path) -> images.Layout:
    return images.Layout(plain(host, tmp_path / "hostfs", TREE, tar=TREE))


@pytest.fixture(autouse=True)
def _no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no login of whoever runs the tests take part."""
    for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_RUNTIME_DIR", registry.LOGIN_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


class Command:
    """The publish verb through the command line."""

    def __init__(self, folder: Path, keyset: keys.Keyset, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.keyset, self.capsys = folder, keyset, capsys
        # What skopeo must notice itself takes it a second or two, on a busy machine more.
        self.words: list[str] = ["--timeout", "8"]
        self.out = ""

    def patience(self, fault: str) -> None:
        """Give up soon on a registry that says nothing: nobody waits for the end of that."""
        self.words[self.words.index("--timeout") + 1] = "1" if fault == "nothing" else "8"

    def __call__(self, to: str, source: str = "oci:./hostfs", sequence: int = 1) -> tuple[int, str]:
        """Publish; returns status and messages."""
        manifest = self.folder / "manifest.yaml"
        manifest.write_text(WRITTEN.format(product=self.keyset.product, source=source, sequence=sequence))
        words = [
            "publish",
            str(manifest),
            "--keys",
            str(self.keyset.folder),
            "--to",
            to,
            *self._words(to, source),
        ]
        table = tuple(verb for verb in commands.VERBS if verb.words == "publish")
        status = cli.main(words, tuple(_outside(verb) for verb in table))
        shown = self.capsys.readouterr()
        assert PASSWORD not in shown.out + shown.err
        self.out = shown.out
        return status, shown.err

    def _words(self, to: str, source: str) -> list[str]:
        """Leave away what is for registries where none takes part."""
        return self.words if "docker://" in to + source else []


def _outside(verb: commands.Verb) -> commands.Verb:
    """Return a verb that takes the tools that are there."""
    return commands.Verb(verb.words, verb.summary, verb.example, verb.run, verb.options, tools=False)


@pytest.fixture
def command(
    tmp_path: Path,
    keyset: keys.Keyset,
    capsys: pytest.CaptureFixture[str],
    authority: registries.Authority,
) -> Command:
    made = Command(tmp_path, keyset, capsys)
    made.words += ["--tls-ca", str(authority.path), "--login", str(registries.password_file(tmp_path))]
    return made


def skopeo(side: str, authority: registries.Authority, folder: Path, *words: str) -> None:
    """Copy by skopeo: another program than ours, which logs in at the registry of one side."""
    (folder / "certs").mkdir()
    shutil.copy(authority.path, folder / "certs/ca.crt")
    known = [f"--{side}-cert-dir={folder}/certs", f"--{side}-creds={USER}:{PASSWORD}"]
    subprocess.run(["skopeo", "copy", "--quiet", *known, *words], check=True)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


# --- A real registry ----------------------------------------------------------------------------------


def test_a_release_goes_to_a_registry_and_comes_back_unchanged(
    command: Command, real: registries.Real, source: images.Layout, host: Host, tmp_path: Path,
    authority: registries.Authority,
) -> None:  # fmt: skip
    assert command(f"oci:{tmp_path}/release")[0] == 0
    assert command(f"docker://{real.address}/acme/release:1")[0] == 0
    access = registry.Access(authority.path, registry.Login(real.address, f"{USER}:{PASSWORD}"))
    reference = registry.parse_reference(f"docker://{real.address}/acme/release:1")
    _, raw = registry.connect(access, reference).manifest("1")
    skopeo("src", authority, tmp_path, "--all", "--preserve-digests", str(reference), f"oci:{tmp_path}/back")
    (index,) = images.Layout(tmp_path / "release").read_index()
    assert digest_of(raw) == index.digest
    blobs = [{p.name for p in (tmp_path / name / "blobs/sha256").iterdir()} for name in ("release", "back")]
    assert blobs[0] == blobs[1]


def test_layers_that_are_there_are_not_sent_again(
    command: Command, real: registries.Real, source: images.Layout
) -> None:
    def sent() -> int:
        return sum(method == "PUT" and "/blobs/" in path for method, path, _ in real.requests())

    to = f"docker://{real.address}/acme/release:current"
    assert command(to)[0] == 0
    first = sent()
    assert command(to)[0] == 0
    assert sent() == first  # the same release: nothing at all
    assert command(to, sequence=2)[0] == 0
    assert first > sent() - first == 2  # the manifest and its signature


class Telling(Watched):
    """A host that says at once how far it is."""

    plain_seconds = 0.0


def test_a_push_tells_how_far_it_is(
    real: registries.Real, keyset: keys.Keyset, host: Host, tmp_path: Path, authority: registries.Authority
) -> None:
    tar = make_tar({"sbin/": b"", "sbin/init": PROGRAM, "random": os.urandom(6 << 20)})
    plain(host, tmp_path / "hostfs", tar, tar=tar)
    manifest, to = tmp_path / "manifest.yaml", f"docker://{real.address}/acme/release:1"
    access = registry.Access(authority.path, registry.Login(real.address, f"{USER}:{PASSWORD}"))
    sent, placed, digests = [], [], []
    for sequence in (1, 2):
        manifest.write_text(WRITTEN.format(product=keyset.product, source="oci:./hostfs", sequence=sequence))
        telling = Telling()
        made = publish.publish(telling, manifest, keyset, to, access)
        told = [line for line in telling.said if line.startswith(("sending", "sent"))]
        assert told[0] == f"sending the release to {to}, without what is there already"
        # Lines on the way, and one at the end: done, of all, how fast.
        assert len(told) >= 3
        placed.append(made.replaced)
        digests.append(made.index_digest)
        found = [re.search(r"(\d+\.\d) of (6\.\d) MiB, \d+\.\d MiB/s$", line) for line in told[1:]]
        assert all(found)
        assert told[-1].startswith("sent ")
        sent.append(float(found[-1][1]) if found[-1] else -1)
    assert sent[0] >= 6
    assert sent[1] < 0.5  # the layer is there already
    assert placed == ["", digests[0]]  # what the tag named before is told


def test_a_push_of_what_is_there_already_says_so(
    command: Command, real: registries.Real, source: images.Layout
) -> None:
    to = f"docker://{real.address}/acme/release:1"
    assert [command(to)[0], command(to)[0]] == [0, 0]
    status, said = command(to)
    assert status == 0
    assert re.search(
        r"^mosinit: nothing had to be sent: all \d+\.\d MiB are there already$", said, re.MULTILINE
    )
    assert "MiB/s" not in said


def test_progress_and_the_result_as_json_go_different_ways(
    command: Command, real: registries.Real, source: images.Layout
) -> None:
    command.words.append("--json")
    status, said = command(f"docker://{real.address}/acme/release:1")
    assert (status, json.loads(command.out)["sequence"]) == (0, 1)
    assert re.search(r"^mosinit: sent \d+\.\d of \d+\.\d MiB, ", said, re.MULTILINE)


BAR = "from mosinit.host import Host\nwith Host().progress('sending', 8 << 20) as advance: advance(8 << 20)"


def test_on_a_terminal_there_is_a_bar() -> None:
    pytest.importorskip("rich")
    ours, theirs = pty.openpty()
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(cli.__file__).parent.parent),
        "TERM": "xterm",
        "COLUMNS": "120",
    }
    try:
        subprocess.run([sys.executable, "-c", BAR], stderr=theirs, check=True, env=env)
        shown = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "mosinit: sending" in shown
    assert "8.0/8.0 MiB" in shown


def test_a_source_comes_from_a_registry(
    command: Command, real: registries.Real, source: images.Layout, host: Host, tmp_path: Path,
    authority: registries.Authority,
) -> None:  # fmt: skip
    reference = registry.parse_reference(f"docker://{real.address}/acme/hostfs:1.0")
    skopeo("dest", authority, tmp_path, f"oci:{source.path}", str(reference))
    assert command(f"oci:{tmp_path}/one")[0] == 0
    assert command(f"oci:{tmp_path}/two", source=str(reference))[0] == 0
    one, two = (images.Layout(tmp_path / name).read_index() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("where", ["file", "variable", "auth.json"])
def test_where_a_login_may_come_from(
    where: str, command: Command, real: registries.Real, source: images.Layout, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if where != "file":
        command.words = command.words[:4]
    if where == "variable":
        monkeypatch.setenv(registry.LOGIN_VARIABLE, f"{USER}:{PASSWORD}")
    if where == "auth.json":
        packed = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        (tmp_path / "auth.json").write_text(json.dumps({"auths": {real.address: {"auth": packed}}}))
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    assert command(f"docker://{real.address}/acme/release:1")[0] == 0


def test_no_program_ever_sees_a_secret(
    command: Command, real: registries.Real, source: images.Layout, keyset: keys.Keyset, tmp_path: Path,
    authority: registries.Authority, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(registry.LOGIN_VARIABLE, f"{USER}:{PASSWORD}")
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(WRITTEN.format(product=keyset.product, source="oci:./hostfs", sequence=1))
    to = f"docker://{real.address}/acme/release:1"
    access = registry.open_access(authority.path, None, 30, to, [])
    assert PASSWORD not in repr(access)
    assert PASSWORD not in repr(registry.connect(access, registry.parse_reference(to)))
    watched = Watched()
    publish.publish(watched, manifest, keyset, to, access)
    packed = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    seen = [str(each) for each in watched.started]
    assert seen
    assert not [words for words in seen if PASSWORD in words or USER in words or packed in words]


def test_the_ca_that_hostfs_has_counts_unless_another_is_named(
    real: registries.Real, authority: registries.Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a medium of `build --registry-ca` nobody can name a file."""
    to, login = f"docker://{real.address}/acme/none:1", registries.password_file(tmp_path)

    def reach(tls_ca: Path | None = None) -> str:
        access = registry.open_access(tls_ca, login, 30, to, [])
        with pytest.raises(Failure) as failure:
            registry.connect(access, registry.parse_reference(to)).manifest("1")
        return str(failure.value)

    monkeypatch.setattr(registry, "HOSTFS_CA", tmp_path / "none")
    assert "--tls-ca" in reach()
    made = tmp_path / "ca.pem"
    made.write_bytes(registry.read_ca(authority.path))
    monkeypatch.setattr(registry, "HOSTFS_CA", made)
    assert "does not have it: check name and tag" in reach()
    (tmp_path / "other").mkdir()
    other = registries.Authority(tmp_path / "other")
    assert "--tls-ca" in reach(other.path)


def test_nothing_but_certificates_is_taken_from_the_file_of_a_ca(
    authority: registries.Authority, tmp_path: Path
) -> None:
    """It becomes part of an image, and a key may lie beside the certificate."""
    certificate, key = authority.path.read_bytes(), authority.server().read_bytes()
    (tmp_path / "both").write_bytes(key + certificate)
    assert b"PRIVATE KEY" in key
    assert b"PRIVATE KEY" not in registry.read_ca(tmp_path / "both")
    assert registry.read_ca(tmp_path / "both").endswith(certificate)


def test_a_wrong_password_is_one_line_and_changes_nothing(
    command: Command, real: registries.Real, source: images.Layout, tmp_path: Path
) -> None:
    registries.password_file(tmp_path, f"{USER}:wrong-{PASSWORD[::-1]}")
    status, said = command(f"docker://{real.address}/acme/release:1")
    assert (status, said.count("\n")) == (1, 1)
    assert "does not accept the login: check --login" in said
    assert "wrong-" not in said
    assert not any(status < 400 for _, path, status in real.requests() if path != "/v2/")


def test_who_gave_no_login_is_told_how(
    command: Command, real: registries.Real, source: images.Layout
) -> None:
    command.words = command.words[:4]
    status, said = command(f"docker://{real.address}/acme/release:1")
    assert (status, said.count("\n")) == (1, 1)
    assert "wants a login, and there is none" in said
    assert (
        f"--login FILE (USER:PASSWORD in it), MOSINIT_REGISTRY_LOGIN or `podman login {real.address}`"
        in said
    )
    assert not any(status < 400 for _, path, status in real.requests() if path != "/v2/")


# --- Faults -------------------------------------------------------------------------------------------

Misbehave = Callable[[registries.Handler], None]

FAULTS: dict[str, tuple[Misbehave, str]] = {
    "500": (registries.http_500, "a fault of its own"),
    "half a body": (registries.half_a_body, "broke off in the middle|sends more than it announced"),
    "nothing": (registries.nothing, "does not answer"),
    "another digest": (registries.another_digest, "something else than its digest says|is no image"),
    "endless body": (registries.endless_body, "sends more than it announced"),
}
# What the first question is answered with does not matter, if it is answered at all.
PLACES = [
    (fault, kind)
    for fault in FAULTS
    for kind in ("ping", "manifest", "blob")
    if kind != "ping" or fault in ("500", "nothing")
]


def misbehaving(kind: str, misbehave: Misbehave) -> registries.Fault:
    """Make the fault that happens at one kind of request."""

    def fault(handler: registries.Handler, asked: str) -> bool:
        if asked == kind:
            misbehave(handler)
        return asked == kind

    return fault


def the_error(said: str) -> str:
    """Return the one line that is not progress: the last."""
    *progress, line = said.splitlines()
    assert line.startswith("mosinit: error: ")
    assert not [other for other in progress if "error" in other or not other.startswith("mosinit: ")]
    return line


def serve(bad: registries.Registry, source: images.Layout) -> str:
    """Put an image into the registry; returns its reference."""
    (image,) = source.read_index()
    bad.add("1", image.media_type, source.read_blob(image))
    for blob in (source.path / "blobs/sha256").iterdir():
        bad.blobs[f"sha256:{blob.name}"] = blob.read_bytes()
    return f"docker://{bad.address}/acme/hostfs:1"


def files(folder: Path) -> list[str]:
    """List what lies in a folder, besides what tools keep for themselves."""
    return sorted(str(path) for path in folder.rglob("*") if ".local" not in path.parts)


@pytest.mark.parametrize(("fault", "kind"), PLACES)
def test_a_source_whose_registry_misbehaves(
    fault: str, kind: str, command: Command, bad: registries.Registry, source: images.Layout, tmp_path: Path
) -> None:
    reference = serve(bad, source)
    misbehave, says = FAULTS[fault]
    bad.fault = misbehaving(kind, misbehave)
    command.patience(fault)
    (tmp_path / "manifest.yaml").touch()
    before, begun = files(tmp_path), time.monotonic()
    status, said = command(f"oci:{tmp_path}/release", source=reference)
    assert (status, files(tmp_path)) == (1, before)
    assert re.search(says, the_error(said))
    assert bad.address in the_error(said)
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("500", "ping", "a fault of its own"),
        ("500", "manifest", "a fault of its own"),
        ("500", "blob", "a fault of its own"),
        ("500", "upload", "a fault of its own"),
        ("500", "put", "a fault of its own"),
        ("nothing", "ping", "does not answer"),
        ("nothing", "manifest", "does not answer"),
        ("nothing", "blob", "does not answer"),
        ("nothing", "upload", "does not answer"),
        ("nothing", "put", "does not answer"),
        ("half a body", "manifest", "broke off in the middle"),
        ("half a body", "upload", "does not answer as registries do"),
        ("endless body", "manifest", "sends more than it announced"),
        ("endless body", "put", "something else than its digest says"),
        ("half a body", "put", "something else than its digest says"),
        ("endless body", "upload", "does not answer as registries do"),
    ],
)
def test_a_destination_that_misbehaves_keeps_its_old_release(
    fault: str, kind: str, says: str, command: Command, bad: registries.Registry, source: images.Layout
) -> None:
    to = f"docker://{bad.address}/acme/release:1"
    assert command(to)[0] == 0
    old = bad.manifests["1"]
    bad.fault = misbehaving(kind, FAULTS[fault][0])
    command.patience(fault)
    begun = time.monotonic()
    status, said = command(to, sequence=2)
    assert (status, bad.manifests["1"]) == (1, old)
    assert re.search(says, the_error(said))
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("what", ["token", "upload", "manifest", "blob"])
def test_a_registry_that_names_a_place_without_tls(
    what: str, command: Command, bad: registries.Registry, source: images.Layout
) -> None:
    """As one does that knows nothing of what stands before it. The login must not go there, nor anything."""
    to, nowhere = f"docker://{bad.address}/acme/release:1", "http://192.0.2.1/v2/x"
    assert command(to)[0] == 0
    old = bad.manifests["1"]

    def fault(handler: registries.Handler, kind: str) -> bool:
        if what == "token" and kind == "ping":
            handler.answer(401, b"{}", WWW_Authenticate=f'Bearer realm="{nowhere}",service="x"')
        elif what == "upload" and handler.command == "POST":
            handler.answer(202, Location=nowhere, Range="0-0")
        elif what == kind:
            handler.answer(307, Location=nowhere)
        else:
            return False
        return True

    bad.fault = fault
    status, said = command(to, sequence=2)
    assert (status, bad.manifests["1"]) == (1, old)
    assert "names a place without TLS (http://): let it know its own address" in the_error(said)


def test_a_registry_that_forgets_at_once_is_noticed(
    command: Command, bad: registries.Registry, source: images.Layout
) -> None:
    def fault(handler: registries.Handler, kind: str) -> bool:
        if kind == "put":
            handler.answer(201, Docker_Content_Digest=digest_of(handler.body()))
        return kind == "put"

    bad.fault = fault
    status, said = command(f"docker://{bad.address}/acme/release:1")
    assert status == 1
    assert f"{bad.address} took the release and does not have it" in the_error(said)


def test_a_registry_that_keeps_something_else_is_noticed(
    command: Command, bad: registries.Registry, source: images.Layout
) -> None:
    def fault(handler: registries.Handler, kind: str) -> bool:
        if kind == "put" and handler.path.endswith("/1"):
            digest = digest_of(handler.body())
            bad.add("1", "application/vnd.oci.image.index.v1+json", b'{"schemaVersion":2,"manifests":[]}')
            handler.answer(201, Docker_Content_Digest=digest)
            return True
        return False

    bad.fault = fault
    status, said = command(f"docker://{bad.address}/acme/release:1")
    assert status == 1
    assert "something else than its digest says" in the_error(said)


@pytest.mark.parametrize("kind", ["manifest", "blob"])
def test_a_redirect_to_elsewhere_takes_no_password_along(
    kind: str, command: Command, bad: registries.Registry, source: images.Layout, tmp_path: Path,
    authority: registries.Authority,
) -> None:  # fmt: skip
    reference = serve(bad, source)
    with registries.running(authority.server("other")) as other:
        bad.fault = misbehaving(kind, registries.elsewhere(f"localhost:{other.server_port}"))
        status, said = command(f"oci:{tmp_path}/release", source=reference)
        asked = list(other.seen)
    assert (status, (tmp_path / "release").exists()) == (1, False)
    assert the_error(said)
    assert asked
    assert [secret for _, _, secret in asked if secret] == []
    assert [secret for _, _, secret in bad.seen if secret] != []


def test_a_blob_may_lie_elsewhere(
    command: Command, bad: registries.Registry, source: images.Layout, tmp_path: Path,
    authority: registries.Authority,
) -> None:  # fmt: skip
    """As at all registries that keep blobs with a content delivery network: by TLS, without the login."""
    reference = serve(bad, source)
    with registries.running(authority.server("other")) as other:
        other.blobs = bad.blobs
        bad.fault = misbehaving("blob", registries.elsewhere(f"localhost:{other.server_port}"))
        assert command(f"oci:{tmp_path}/release", source=reference)[0] == 0
        assert other.seen
        assert [secret for _, _, secret in other.seen if secret] == []


def tokens(handler: registries.Handler, kind: str) -> bool:
    """Make a token for whoever asks."""
    asks = handler.path.startswith("/token")
    if asks:
        handler.answer(200, b'{"token": "abc", "expires_in": 300}')
    return asks


def wants_token(realm: str) -> registries.Fault:
    def fault(handler: registries.Handler, kind: str) -> bool:
        unknown = "Bearer" not in handler.headers.get("Authorization", "")
        if unknown:
            handler.body()
            handler.answer(401, b"{}", WWW_Authenticate=f'Bearer realm="{realm}",service="x"')
        return unknown

    return fault


@pytest.mark.parametrize("way", ["source", "destination"])
@pytest.mark.parametrize("tls", [True, False])
def test_a_login_does_not_go_to_another_token_server(
    tls: bool, way: str, command: Command, bad: registries.Registry, source: images.Layout, tmp_path: Path,
    authority: registries.Authority,
) -> None:  # fmt: skip
    reference = serve(bad, source)
    with registries.running(authority.server("other") if tls else None) as other:
        other.fault = tokens
        bad.fault = wants_token(f"http{'s' * tls}://{other.address}/token")
        if way == "source":
            status, said = command(f"oci:{tmp_path}/release", source=reference)
        else:
            status, said = command(f"docker://{bad.address}/acme/release:2")
        assert (status, other.seen) == (1, [])
    if tls:
        assert f"{bad.address} wants the login to go to {other.address}" in the_error(said)
        assert f"--token-host {other.address}" in the_error(said)
    else:
        assert "names a place without TLS" in the_error(said)


def test_a_token_server_that_the_person_named(
    command: Command, bad: registries.Registry, source: images.Layout, authority: registries.Authority
) -> None:
    with registries.running(authority.server("other")) as other:
        other.fault = tokens
        bad.fault = wants_token(f"https://{other.address}/token")
        command.words += ["--token-host", other.address]
        assert command(f"docker://{bad.address}/acme/release:1")[0] == 0
        assert {secret for _, _, secret in other.seen} == {
            f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"
        }
    # The registry itself sees the token alone.
    assert {secret for _, _, secret in bad.seen} == {"", "Bearer abc"}


def test_who_has_no_login_may_be_sent_anywhere_for_a_token(
    command: Command, bad: registries.Registry, source: images.Layout, tmp_path: Path,
    authority: registries.Authority,
) -> None:  # fmt: skip
    reference = serve(bad, source)
    command.words = command.words[:4]
    with registries.running(authority.server("other")) as other:
        other.fault = tokens
        bad.fault = wants_token(f"https://{other.address}/token")
        assert command(f"oci:{tmp_path}/release", source=reference)[0] == 0


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("kind", ["ping", "manifest", "blob"])
def test_a_redirect_to_a_place_without_tls_is_not_followed(
    kind: str, name: str, command: Command, bad: registries.Registry, source: images.Layout, tmp_path: Path
) -> None:
    """Whoever is on the way would answer in its stead, and see the login if the name is the same."""
    reference = serve(bad, source)
    with registries.running(None) as plainly:
        serve(plainly, source)
        where = f"http://{name}:{plainly.server_port}"

        def fault(handler: registries.Handler, asked: str) -> bool:
            if asked == kind:
                handler.answer(307, Location=where + handler.path)
            return asked == kind

        bad.fault = fault
        status, said = command(f"oci:{tmp_path}/release", source=reference)
        assert (status, plainly.seen, (tmp_path / "release").exists()) == (1, [], False)
    assert re.search("names a place without TLS|does not answer as registries do", the_error(said))


def test_a_redirect_without_end(
    command: Command, bad: registries.Registry, source: images.Layout, tmp_path: Path
) -> None:
    reference = serve(bad, source)
    bad.fault = misbehaving("manifest", registries.elsewhere(bad.address))
    status, said = command(f"oci:{tmp_path}/release", source=reference)
    assert status == 1
    assert "elsewhere without end" in the_error(said)


# --- A full disk --------------------------------------------------------------------------------------


def test_a_full_disk_on_the_way_to_a_registry(
    command: Command, bad: registries.Registry, source: images.Layout, full: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TMPDIR", str(full))
    status, said = command(f"docker://{bad.address}/acme/release:1")
    assert (status, bad.manifests, files(full)) == (1, {}, [])
    assert "make room" in the_error(said)


def test_an_image_that_does_not_fit_is_not_fetched(
    command: Command, bad: registries.Registry, source: images.Layout, full: Path
) -> None:
    reference = serve(bad, source)
    status, said = command(f"oci:{full}/release", source=reference)
    assert (status, files(full)) == (1, [])
    assert "make room" in the_error(said)
    assert [path for _, path, _ in bad.seen if "/blobs/" in path] == []


# --- TLS ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("certificate", "says"),
    [
        ("expired", "is not valid at this time: renew it"),
        ("not yet", "is not valid at this time: renew it"),
        ("foreign", "comes from an unknown CA: name that CA with --tls-ca FILE"),
        ("none", "does not speak TLS"),
    ],
)
def test_a_server_that_is_not_who_it_should_be_gets_nothing(
    certificate: str, says: str, command: Command, source: images.Layout, tmp_path: Path, need: Need,
    authority: registries.Authority,
) -> None:  # fmt: skip
    need("skopeo", "mkfs.erofs", "veritysetup")
    (tmp_path / "foreign").mkdir()
    path = {
        "expired": authority.server("old", -9, -1),
        "not yet": authority.server("early", 1, 9),
        "foreign": registries.Authority(tmp_path / "foreign").server(),
        "none": None,
    }[certificate]
    with registries.running(path) as server:
        status, said = command(f"docker://{server.address}/acme/release:1")
        assert [secret for _, _, secret in server.seen if secret] == []
    assert status == 1
    assert says in the_error(said)


def test_nobody_is_there(command: Command, source: images.Layout, need: Need) -> None:
    need("skopeo")
    status, said = command("docker://127.0.0.1:1/acme/release:1")
    assert (status, said.count("\n")) == (1, 1)
    assert "nothing listens at 127.0.0.1:1: check name and port" in said


# --- Names and options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("docker://r.example/a:1", "docker://r.example/a:1"),
        ("docker://r.example:5000/a/b-c/d.e", "docker://r.example:5000/a/b-c/d.e"),
        ("docker://localhost/a:1", "docker://localhost/a:1"),
        ("docker://[::1]:5000/a:1", "docker://[::1]:5000/a:1"),
        ("docker://busybox", "docker://docker.io/busybox"),
        ("docker://alpine/git:2", "docker://docker.io/alpine/git:2"),
        (f"docker://r.example/a@sha256:{'a' * 64}", f"docker://r.example/a@sha256:{'a' * 64}"),
        (f"docker://r.example/a:1@sha256:{'a' * 64}", f"docker://r.example/a@sha256:{'a' * 64}"),
    ],
)
def test_references(text: str, means: str) -> None:
    assert str(registry.parse_reference(text)) == means


@pytest.mark.parametrize(
    "text",
    ["docker://", "docker:///a", "docker://r.example/", "docker://r.example/A:1", "docker://r.example/a:",
     "docker://u:p@r.example/a:1", "docker://r.example/a/../b:1", "docker://r.example/a b", "docker://r.example//a",
     "docker://r.example/a@sha256:12", "docker://R/a", "docker://-/a", "docker://r.example:port/a"],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(Usage):
        registry.parse_reference(text)


@pytest.mark.parametrize("text", ["docker://r.example/Acme/release:1", "docker://Acme/release"])
def test_capital_letters_in_a_name_are_told(text: str) -> None:
    with pytest.raises(Usage, match=r"names of repositories are lower-case: write .*/acme/release"):
        registry.parse_reference(text)


@pytest.mark.parametrize("host", ["[1:2:3]", "[::1:2:3:4:5:6:7:8]", "[.]", ".".join(["a" * 60] * 5)])
def test_a_host_that_no_computer_has(host: str) -> None:
    with pytest.raises(Usage, match="names no computer: write docker://HOST"):
        registry.parse_reference(f"docker://{host}/name:1")


def test_a_login_is_for_one_registry_that_the_person_named(tmp_path: Path) -> None:
    login = registries.password_file(tmp_path)

    def host_of(to: str, *sources: str) -> str:
        access = registry.open_access(None, login, 9, to, list(sources))
        assert access.login
        return access.login.host

    assert host_of("docker://a.example/x:1", "docker://b.example/y:1") == "a.example"
    assert host_of("oci:x", "docker://b.example/y:1", "oci:z") == "b.example"
    for sources in (["docker://a.example/x", "docker://b.example/y"], ["oci:x"]):
        with pytest.raises(Usage, match="for one registry"):
            registry.open_access(None, login, 9, "oci:x", sources)


def test_what_a_registry_says_is_no_message(
    command: Command, bad: registries.Registry, source: images.Layout, tmp_path: Path
) -> None:
    """An error's body may hold the password that was sent, or move a terminal's cursor."""

    def fault(handler: registries.Handler, kind: str) -> bool:
        if kind == "manifest":
            handler.answer(418, f"{PASSWORD} \x1b[31m {handler.headers['Authorization']}".encode())
        return kind == "manifest"

    reference = serve(bad, source)
    bad.fault = fault
    status, said = command(f"oci:{tmp_path}/release", source=reference)
    assert status == 1
    assert "does not answer as registries do" in the_error(said)
    assert "\x1b" not in said


# --- One answer, wherever the image lies --------------------------------------------------------------


def an_index(
    host: Host, layout: images.Layout, *entries: tuple[images.Descriptor, object]
) -> images.Descriptor:
    listed = [item.json() | ({"platform": platform} if platform else {}) for item, platform in entries]
    document = {"schemaVersion": 2, "mediaType": images.INDEX_TYPE, "manifests": listed}
    return layout.add_blob(host, json.dumps(document).encode(), images.INDEX_TYPE)


AMD64, ARM64 = {"os": "linux", "architecture": "amd64"}, {"os": "linux", "architecture": "arm64"}
Shape = Callable[[Host, images.Layout, images.Descriptor], images.Descriptor]
SHAPES: dict[str, tuple[Shape, bool]] = {
    "image": (lambda h, s, i: i, True),
    "index": (lambda h, s, i: an_index(h, s, (i, AMD64)), True),
    "two platforms": (lambda h, s, i: an_index(h, s, (i, AMD64), (i, ARM64)), True),
    "no platform": (lambda h, s, i: an_index(h, s, (i, None)), False),
    "another platform": (lambda h, s, i: an_index(h, s, (i, ARM64)), False),
    "two of ours": (lambda h, s, i: an_index(h, s, (i, {**AMD64, "variant": "v4"}), (i, AMD64)), False),
    "index in index": (lambda h, s, i: an_index(h, s, (an_index(h, s, (i, AMD64)), None)), True),
    "another's index": (lambda h, s, i: an_index(h, s, (an_index(h, s, (i, AMD64)), ARM64)), False),
    "too deep": (
        lambda h, s, i: an_index(h, s, (an_index(h, s, (an_index(h, s, (i, AMD64)), None)), None)),
        False,
    ),
    "in other letters": (
        lambda h, s, i: s.add_blob(
            h, s.read_blob(i).replace(b'"layers"', b'"LAYERS":[],"layers"'), i.media_type
        ),
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_registry_and_layout_agree(
    name: str, command: Command, bad: registries.Registry, source: images.Layout, host: Host, tmp_path: Path
) -> None:
    shape, fine = SHAPES[name]
    top = shape(host, source, source.read_index()[0])
    source.write_index(host, [top])
    reference = serve(bad, source)
    for blob in (source.path / "blobs/sha256").iterdir():
        kind = json.loads(blob.read_bytes()).get("mediaType") if blob.stat().st_size < 9999 else None
        if kind:
            bad.add("-", kind, blob.read_bytes())
    statuses = [
        command(f"oci:{tmp_path}/{number}", source=where)[0]
        for number, where in enumerate(("oci:./hostfs", reference))
    ]
    assert statuses == ([0, 0] if fine else [1, 1])
    if fine:
        one, two = (images.Layout(tmp_path / name).read_index() for name in ("0", "1"))
        assert one == two
