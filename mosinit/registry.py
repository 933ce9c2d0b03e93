"""Registries: an image comes from one, a release goes to one, by the OCI distribution specification 1.1.

Everything a registry says is untrusted. It has to keep moving, may send no more than it announced, and what
it sent or keeps is compared by digest. Passwords stay in this process: see `wire`, which holds the way.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from mosinit import images, init, wire
from mosinit.host import MOVING_BYTES, Failure, Host, Usage, amount

LOGIN_VARIABLE = "MOSINIT_REGISTRY_LOGIN"
HOSTFS_CA = Path("/etc/mosinit/registry-ca.pem")  # of `build --registry-ca`, under the image's signature
DOCKER_HUB = "docker.io"  # what containers' tools mean by a name without a host
HUB_API, HUB_TOKENS = "registry-1.docker.io", "auth.docker.io"  # where Docker's own really is
INDEX_KINDS = ", ".join((*images.MANIFEST_TYPES, *images.INDEX_TYPES))

_REFERENCE = re.compile(
    r"docker://(?:(?P<host>(?:[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?)/)?"
    r"(?P<name>[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)

_LOWERED = re.compile(r"(?<=docker://)[^:@]*(:[0-9]+/[^:@]*)?")  # host and name, not the tag


@dataclass(frozen=True)
class Reference:
    """An image or release in a registry. `host` includes the port; `tag` or `digest` may be empty."""

    host: str
    name: str
    tag: str
    digest: str

    def __str__(self) -> str:
        """Return the reference as a person writes it."""
        tag, digest = f":{self.tag}" if self.tag else "", f"@{self.digest}" if self.digest else ""
        return f"docker://{self.host}/{self.name}{digest or tag}"

    @property
    def api(self) -> wire.Place:
        """Where the registry's interface is."""
        host = HUB_API if self.host == DOCKER_HUB else self.host.lower()
        return wire.parse_place(f"https://{host}/v2/")

    @property
    def repository(self) -> str:
        """The name that the registry knows it by: Docker's own has a folder for names without one."""
        return f"library/{self.name}" if self.host == DOCKER_HUB and "/" not in self.name else self.name


def parse_reference(text: str) -> Reference:
    """Parse `docker://[HOST[:PORT]/]NAME[:TAG][@DIGEST]`. Raises `Usage`."""
    found = _REFERENCE.fullmatch(text)
    if not found:
        # Somebody may have written a password where other tools take one.
        shown = re.sub(r"//.*@", "//…@", text)
        small = _REFERENCE.fullmatch(_lowered(text))
        right = _lower_case(text) if small else "write docker://HOST[:PORT]/NAME:TAG"
        raise Usage(f"{shown[:300]!r} names no image in a registry: {right}")
    host, name = found["host"] or "", found["name"]
    # The first word is a host only if no user of Docker's own registry could have that name.
    if (port := re.search(r":(\d+)$", host)) and not 0 < int(port[1]) < 65536:
        raise Usage(f"{text[:300]!r} names no image in a registry: ports are from 1 to 65535")
    if host and not set(host) & set(".:[") and host != "localhost":
        host, name = "", f"{host}/{name}"
        if not _REFERENCE.fullmatch(f"docker://x.y/{name}"):
            raise Usage(f"{text[:300]!r} names no image in a registry: {_lower_case(text)}")
    reference = Reference(host or DOCKER_HUB, name, found["tag"] or "", found["digest"] or "")
    try:
        _ = reference.api
    except ValueError:
        raise Usage(f"{text[:300]!r} names no computer: write docker://HOST[:PORT]/NAME:TAG") from None
    return reference


def _lowered(text: str) -> str:
    return _LOWERED.sub(lambda part: part[0].lower(), text, count=1)


def _lower_case(text: str) -> str:
    return f"names of repositories are lower-case: write {_lowered(text)[:300]}"


# --- Who we are there, and whom we trust --------------------------------------------------------------


@dataclass(frozen=True)
class Login:
    """A user's name and password for one registry; it never shows what they are."""

    host: str
    words: str

    def __repr__(self) -> str:
        """Name the registry alone."""
        return f"Login({self.host!r})"


@dataclass(frozen=True)
class Access:
    """How registries are reached: one more CA, a login, seconds that nothing may move, and addresses besides
    the registry's own that may see its login.

    Without a login it is what `podman login` or `docker login` keep.
    """

    tls_ca: Path | None = None
    login: Login | None = None
    idle: float = 120.0
    token_hosts: frozenset[str] = frozenset()
    pauses: tuple[float, ...] = wire.PAUSES


def open_access(
    tls_ca: Path | None,
    login: Path | None,
    idle: float,
    destination: str,
    sources: list[str],
    token_hosts: Sequence[str] = (),
) -> Access:
    """Read what the person named. The login is for the registry of the destination or, if that is a folder,
    for the only one of the sources: a password must not go wherever a manifest points to.

    Without a CA it is that of this system's hostfs, if `build` gave it one. Raises `Failure`, `Usage`.
    """
    if tls_ca is None and HOSTFS_CA.exists():
        tls_ca = HOSTFS_CA
    if tls_ca is not None:
        read_ca(tls_ca)
    allowed = frozenset(map(_token_place, token_hosts))
    words = _read_login(login)
    if words is None:
        return Access(tls_ca, None, idle, allowed)
    named = [destination] if destination.startswith("docker://") else sources
    hosts = sorted({parse_reference(item).host for item in named if item.startswith("docker://")})
    if len(hosts) != 1 and login is None:
        return Access(tls_ca, None, idle, allowed)  # the variable is set for other commands too
    if len(hosts) != 1:
        raise Usage(
            f"--login is for one registry, and these are {', '.join(hosts) or 'none'}: use `podman login`"
        )
    return Access(tls_ca, Login(hosts[0], words), idle, allowed)


def _token_place(name: str) -> str:
    """Return the address of a token server that the person named. Raises `Usage`."""
    try:
        if set(name) & set("/?#@"):
            raise ValueError
        return wire.parse_place(f"https://{name.lower()}/").address
    except ValueError:
        raise Usage(f"{name[:100]!r} is no token server: write --token-host HOST[:PORT]") from None


def read_ca(path: Path, option: str = "--tls-ca") -> bytes:
    """Return the certificates of a CA: these alone, as PEM. Raises `Failure`."""
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise Failure(
            f"cannot read {path}: {error.strerror}; name the CA's certificate with {option}"
        ) from error
    except ValueError as error:
        raise Failure(
            f"{path} holds no certificate in PEM form: name the CA's certificate with {option}"
        ) from error
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in found)


def _read_login(path: Path | None) -> str | None:
    """Return USER:PASSWORD from a file or, without one, from the environment."""
    if path is None:
        words, where = os.environ.get(LOGIN_VARIABLE), f"the variable {LOGIN_VARIABLE}"
        if not words:
            return None
    else:
        where = str(path)
        try:
            if path.is_file() and path.stat().st_mode & 0o077:
                raise Failure(f"{path} holds a password and is open to others: chmod 600 {path}")
            words = path.read_text().removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise Failure(f"cannot read {path}: {reason}; write USER:PASSWORD into it") from error
    user, colon, password = words.partition(":")
    if not user or not colon or not password or not words.isprintable():
        raise Failure(f"{where} does not hold one line USER:PASSWORD: write it like that")
    return words


def _kept_login(reference: Reference) -> str | None:
    """Return USER:PASSWORD as `podman login` or `docker login` keep it for a registry, or a name in it.

    containers-auth.json(5). What a helper program keeps is not asked for: --login is there for that.
    """
    hub = ("https://index.docker.io/v1/", "index.docker.io") if reference.host == DOCKER_HUB else ()
    parts = reference.name.split("/")
    names = ["/".join((reference.host, *parts[:count])) for count in range(len(parts), -1, -1)]
    for path in _login_files():
        try:
            kept = json.loads(path.read_bytes())["auths"]
            for name in (*names, *hub):
                words = kept[name].get("auth") if name in kept else None
                if words:
                    return base64.b64decode(words, validate=True).decode()
        except OSError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Failure(f"{path} is no file of logins: log in again, or use --login") from None
    return None


def _login_files() -> list[Path]:
    """Return where logins may be kept, the first that knows a registry counts."""
    env = os.environ
    if env.get("REGISTRY_AUTH_FILE"):
        return [Path(env["REGISTRY_AUTH_FILE"])]
    home = Path(env.get("HOME") or "/nonexistent")
    run = Path(env.get("XDG_RUNTIME_DIR") or f"/run/containers/{os.getuid()}")
    return [
        run / ("containers/auth.json" if env.get("XDG_RUNTIME_DIR") else "auth.json"),
        Path(env.get("XDG_CONFIG_HOME") or home / ".config") / "containers/auth.json",
        Path(env.get("DOCKER_CONFIG") or home / ".docker") / "config.json",
    ]


# --- The registry's interface -------------------------------------------------------------------------


@dataclass(frozen=True)
class Connection:
    """One name in one registry, which knows who we are."""

    wire: wire.Wire
    reference: Reference

    def path(self, rest: str) -> str:
        """Return the path of something under our name."""
        return f"/v2/{self.reference.repository}/{rest}"

    def manifest(self, word: str) -> tuple[images.Descriptor, bytes]:
        """Return the manifest or index that a tag or digest names; one named by digest has that digest."""
        with self.wire.ask("GET", self.path(f"manifests/{word}"), headers={"Accept": INDEX_KINDS}) as answer:
            kind = answer.getheader("Content-Type", "").partition(";")[0].strip()
            data = self.wire.document(answer, images.DOCUMENT_LIMIT)
        digest, size = images.digest_bytes(data)
        if init.DIGEST.fullmatch(word) and digest != word:
            raise self.wrong()
        return images.Descriptor(kind, digest, size), data

    def read(self, blob: images.Descriptor) -> bytes:
        """Return a manifest or index that another one lists, which is exactly that."""
        found, data = self.manifest(blob.digest)
        if (found.media_type, found.size) != (blob.media_type, blob.size):
            raise self.wrong()
        return data

    def document(self, digest: str, limit: int) -> bytes:
        """Return a small blob of at most `limit` bytes, whose digest the caller compares."""
        with self.wire.ask("GET", self.path(f"blobs/{digest}")) as answer:
            return self.wire.document(answer, limit)

    def stream(self, blob: images.Descriptor, say: Callable[[str], None] | None = None) -> Iterator[bytes]:
        """Yield a blob as it comes; raises at the end unless it was what its descriptor says.

        With somebody to tell, it is gone on with where the connection breaks, as often as something came
        meanwhile; what a server then sends in the place of the rest has another digest.
        """
        pauses = self.wire.pauses if say else ()
        hasher, size, tries = hashlib.sha256(), 0, 0
        until = time.monotonic() + wire.LONGEST_SECONDS
        while True:
            begun = size
            try:
                for chunk in self._rest(blob, begun):
                    hasher.update(chunk)
                    size += len(chunk)
                    yield chunk
                if size == begun or size >= blob.size:
                    break
                if time.monotonic() > until:
                    raise self.wire.late()
            except wire.Interrupted as error:
                tries = 0 if size - begun >= MOVING_BYTES else tries
                if say is None or tries == len(pauses) or time.monotonic() > until:
                    raise
                pause, tries = pauses[tries], tries + 1
                say(f"{error} (by itself in {pause:.0f} s, from {size} of {blob.size} bytes)")
                time.sleep(pause)
        if (f"sha256:{hasher.hexdigest()}", size) != (blob.digest, blob.size):
            raise self.wrong()

    def _rest(self, blob: images.Descriptor, begin: int) -> Iterator[bytes]:
        """Yield what is behind the first bytes of a blob, by one request: RFC 9110, 14."""
        headers = {"Range": f"bytes={begin}-"} if begin else {}
        path = self.path(f"blobs/{blob.digest}")
        with self.wire.ask("GET", path, headers=headers, longest=wire.LONGEST_SECONDS) as answer:
            skip = begin
            if begin and answer.status == 206:
                if not re.match(
                    rf"bytes {begin}-\d+/(\*|{blob.size})$", answer.getheader("Content-Range", "")
                ):
                    raise self.wrong()
                skip = 0
            # A server need not know of ranges: then all of it comes once more.
            for chunk in self.wire.read(answer, blob.size - begin + skip):
                fresh, skip = chunk[skip:], max(0, skip - len(chunk))
                if fresh:
                    yield fresh

    def download(self, blob: images.Descriptor, target: Path, advance: Callable[[int], None]) -> None:
        """Fetch a blob into a new file; it has the digest and size that its descriptor says."""
        with target.open("xb") as file:
            for chunk in self.stream(blob):
                file.write(chunk)
                advance(len(chunk))

    def has(self, blob: images.Descriptor) -> bool:
        """Say whether the registry has a blob."""
        try:
            with self.wire.ask("HEAD", self.path(f"blobs/{blob.digest}")):
                return True
        except wire.Absent:
            return False

    def upload(self, blob: images.Descriptor, source: Path, advance: Callable[[int], None]) -> None:
        """Send a blob."""
        with self.wire.ask("POST", self.path("blobs/uploads/")) as answer:
            where = answer.getheader("Location", "")
        if not where:
            raise self.wire.fault("{host} does not answer as registries do: check the name")

        def body() -> Iterator[bytes]:
            with source.open("rb") as file:
                while chunk := file.read(wire.CHUNK):
                    yield chunk
                    advance(len(chunk))

        joint = "&" if "?" in where else "?"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)}
        with self.wire.ask(
            "PUT", f"{where}{joint}digest={blob.digest}", headers=headers, body=body,
            longest=wire.LONGEST_SECONDS,
        ):  # fmt: skip
            pass

    def put(self, word: str, kind: str, data: bytes) -> None:
        """Send a manifest or index, under a tag or its digest."""
        headers = {"Content-Type": kind, "Content-Length": str(len(data))}
        with self.wire.ask("PUT", self.path(f"manifests/{word}"), headers=headers, body=lambda: [data]):
            pass

    def wrong(self) -> Failure:
        """Return the error of a registry whose content is not what its digest says."""
        return self.wire.fault(
            "{host} sends something else than its digest says: do not trust it; look at the registry"
        )


def connect(access: Access, reference: Reference, *, push: bool = False) -> Connection:
    """Open a registry. Raises `Failure`."""
    login = access.login.words if access.login and access.login.host == reference.host else None
    words = login or _kept_login(reference)
    own = {reference.api.address} | ({f"{HUB_TOKENS}:443"} if reference.host == DOCKER_HUB else set())
    opened = wire.Wire(
        name=str(reference),
        api=reference.api,
        host=reference.host,
        context=wire.open_context(access.tls_ca),
        idle=access.idle,
        login=words,
        login_places=access.token_hosts | own,
        scope=f"repository:{reference.repository}:{'pull,push' if push else 'pull'}",
        pauses=access.pauses,
    )
    opened.sign_in()
    return Connection(opened, reference)


@contextlib.contextmanager
def _moving(host: Host, label: str, done: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show how many bytes of all have passed, and say in the end how many those were."""
    begun, moved = time.monotonic(), 0
    with host.progress(label, size) as show:

        def advance(written: int) -> None:
            nonlocal moved
            show(min(written, max(0, size - moved)))
            moved += written

        yield advance
        show(max(0, size - moved))  # what was there already
    if moved:
        host.say(f"{done} {amount(moved, size, time.monotonic() - begun)}")
    else:
        host.say(f"nothing had to be {done}: all {size / init.MIB:.1f} MiB are there already")


# --- From a registry ----------------------------------------------------------------------------------


def fetch(host: Host, access: Access, source: str, folder: Path) -> Path:
    """Fetch the image for linux/amd64 that `source` names into a new OCI layout in `folder`.

    Its manifest is read first and everything else fetched by digest, so that nothing can change between, and
    no layer can be larger than it is announced. Raises `Failure`, `Usage`.
    """
    reference = parse_reference(source)
    connection = connect(access, reference)
    image, data = _find_image(connection)
    blobs = _blobs(reference, data)
    size, free = sum(blob.size for blob in blobs), shutil.disk_usage(folder).free
    if size > free:
        need = f"it needs {size >> 20} MiB, {folder} has {free >> 20} MiB free: make room"
        raise Failure(f"cannot fetch {reference}: {need}")
    layout = images.Layout(folder / "image")
    layout.write_index(host, [image])
    layout.add_blob(host, data, image.media_type)
    with _moving(host, f"fetching {reference}", "fetched", size) as advance:
        for blob in blobs:
            connection.download(blob, layout.blob_path(blob.digest), advance)
    return layout.path


def _find_image(connection: Connection) -> tuple[images.Descriptor, bytes]:
    """Return the image manifest, by the rules that hold for the layout in a folder too."""
    reference = connection.reference
    listed, data = connection.manifest(reference.digest or reference.tag or "latest")
    known = {listed.digest: data}

    def read(descriptor: images.Descriptor) -> bytes:
        if descriptor.digest not in known:
            known[descriptor.digest] = connection.read(descriptor)
        return known[descriptor.digest]

    try:
        image = images.find_image(str(reference), listed, read)
        return image, read(image)
    except init.Refused as refused:
        raise Failure(_no_image(reference, refused)) from refused


def _no_image(reference: Reference, refused: init.Refused) -> str:
    return f"{reference} is no image that can be used ({refused.seen[:100]}): name another"


def _blobs(reference: Reference, data: bytes) -> list[images.Descriptor]:
    """Return all blobs that an image manifest announces, each once."""
    try:
        raw, layers = init.parse_descriptors(data, "layers", "IMAGE-FORMAT")
        config = init.parse_descriptor(raw.get("config"), "IMAGE-FORMAT")
    except init.Refused as refused:
        raise Failure(_no_image(reference, refused)) from refused
    return list({item.digest: images.Descriptor(*item) for item in (config, *layers)}.values())


# --- To a registry ------------------------------------------------------------------------------------


def probe(access: Access, destination: Reference) -> None:
    """See that a registry answers and knows us, before any long work. Raises `Failure`."""
    connection = connect(access, destination, push=True)
    # A release that is not there yet; and some registries deny to say so.
    with contextlib.suppress(wire.Absent, wire.Denied):
        connection.manifest(destination.tag)


def push(host: Host, access: Access, layout: images.Layout, destination: Reference) -> str:
    """Copy a release, an index and all it lists, and see that its tag then names exactly that index; return
    the digest that it named before, empty if that is not known.

    Blobs that the registry has are not sent. The tag moves last: whoever looks sees the old release or the
    new one. Raises `Failure`.
    """
    (index,) = layout.read_index()
    size = sum(path.stat().st_size for path in (layout.path / "blobs/sha256").iterdir())
    label = f"sending the release to {destination}, without what is there already"
    connection = connect(access, destination, push=True)
    with _moving(host, label, "sent", size) as advance:
        for manifest in images.listed(layout, index, "manifests"):
            for blob in {item.digest: item for item in images.listed(layout, manifest)}.values():
                if not connection.has(blob):
                    connection.upload(blob, layout.check_blob(blob), advance)
            data = layout.read_blob(manifest)
            connection.put(manifest.digest, manifest.media_type, data)
        before = _named(connection)
        connection.put(destination.tag, index.media_type, layout.read_blob(index))
    try:
        kept, _ = connection.manifest(destination.tag)
    except wire.Absent:
        raise connection.wire.fault(
            "{host} took the release and does not have it: look at the registry"
        ) from None
    if kept.digest != index.digest:
        raise connection.wrong()
    return before


def _named(connection: Connection) -> str:
    """Return the digest that a tag names, empty if it names nothing, or the registry does not say."""
    with contextlib.suppress(wire.Absent, wire.Denied):
        return connection.manifest(connection.reference.tag)[0].digest
    return ""
