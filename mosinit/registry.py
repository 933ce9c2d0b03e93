"""Registries, through skopeo: an image comes from one, a release goes to one.

Everything a registry says is untrusted. It has to keep moving, may send no more than it announced, and what
it sent or keeps is compared by digest. TLS is not optional. Passwords travel in a file of mode 0600 in a
temporary folder, never in `argv` and never in a message.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from mosinit import init
from mosinit.host import Failure, Host, Usage, amount, logged

LOGIN_VARIABLE = "MOSINIT_REGISTRY_LOGIN"
DOCKER_HUB = "docker.io"  # what containers' tools mean by a name without a host
PLATFORM = ("linux", "amd64")
LONGEST_SECONDS = 4 * 3600.0
DOCUMENT_SECONDS = 300.0  # for a document of at most 4 MiB, however slowly it trickles

# What skopeo may see of our environment: where people keep their logins, and how the network is reached.
ENVIRONMENT = {
    "DOCKER_CONFIG", "HOME", "HTTPS_PROXY", "NO_PROXY", "PATH", "REGISTRY_AUTH_FILE", "SSL_CERT_DIR",
    "SSL_CERT_FILE", "TMPDIR", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "https_proxy", "no_proxy",
}  # fmt: skip

# Registries name other places for tokens and uploads, and skopeo takes the login there. One behind a proxy
# that it does not know of names http://, where anybody on the way reads it. So plain HTTP has to pass a port
# at which nobody can listen. (Go takes this computer itself, and what NO_PROXY lists, past any proxy.)
NO_PLAIN_HTTP = {"HTTP_PROXY": "http://127.0.0.1:0"}

_REFERENCE = re.compile(
    r"docker://(?:(?P<host>(?:[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?)/)?"
    r"(?P<name>[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class Reference:
    """An image or release in a registry. `host` includes the port; `tag` or `digest` may be empty."""

    host: str
    name: str
    tag: str
    digest: str

    def __str__(self) -> str:
        """Return the reference as skopeo takes it."""
        tag, digest = f":{self.tag}" if self.tag else "", f"@{self.digest}" if self.digest else ""
        return f"docker://{self.host}/{self.name}{digest or tag}"

    def at(self, digest: str) -> Reference:
        """Return the reference to just this content of the same name."""
        return Reference(self.host, self.name, "", digest)


def parse_reference(text: str) -> Reference:
    """Parse `docker://[HOST[:PORT]/]NAME[:TAG][@DIGEST]`. Raises `Usage`."""
    found = _REFERENCE.fullmatch(text)
    if not found:
        # Somebody may have written a password where other tools take one.
        shown = re.sub(r"//.*@", "//…@", text)
        raise Usage(f"{shown[:300]!r} names no image in a registry: write docker://HOST[:PORT]/NAME:TAG")
    host, name = found["host"] or "", found["name"]
    # The first word is a host only if no user of Docker's own registry could have that name.
    if host and not set(host) & set(".:[") and host != "localhost":
        host, name = "", f"{host}/{name}"
        if not _REFERENCE.fullmatch(f"docker://x.y/{name}"):
            raise Usage(f"{text[:300]!r} names no image in a registry: names are lower-case")
    return Reference(host or DOCKER_HUB, name, found["tag"] or "", found["digest"] or "")


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
    """How registries are reached: one more CA, a login, seconds that nothing may move.

    Without a login skopeo takes what `podman login` or `docker login` keep.
    """

    tls_ca: Path | None = None
    login: Login | None = None
    idle: float = 120.0


def open_access(
    tls_ca: Path | None, login: Path | None, idle: float, destination: str, sources: list[str]
) -> Access:
    """Read what the person named. The login is for the registry of the destination or, if that is a folder,
    for the only one of the sources: a password must not go wherever a manifest points to.

    Raises `Failure`, `Usage`.
    """
    if tls_ca is not None:
        _check_ca(tls_ca)
    words = _read_login(login)
    if words is None:
        return Access(tls_ca, None, idle)
    named = [destination] if destination.startswith("docker://") else sources
    hosts = sorted({parse_reference(item).host for item in named if item.startswith("docker://")})
    if len(hosts) != 1 and login is None:
        return Access(tls_ca, None, idle)  # the variable is set for other commands too
    if len(hosts) != 1:
        raise Usage(
            f"--login is for one registry, and these are {', '.join(hosts) or 'none'}: use `podman login`"
        )
    return Access(tls_ca, Login(hosts[0], words), idle)


def _check_ca(path: Path) -> None:
    try:
        x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise Failure(
            f"cannot read {path}: {error.strerror}; name the CA's certificate with --tls-ca"
        ) from error
    except ValueError as error:
        raise Failure(
            f"{path} holds no certificate in PEM form: name the CA's certificate with --tls-ca"
        ) from error


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


# --- skopeo -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Connection:
    """One registry, opened: the options that skopeo takes, by side (`src`, `dest`, or "" for inspect)."""

    host: Host
    access: Access
    reference: Reference
    folder: Path
    secrets: tuple[str, ...]

    def words(self, side: str = "") -> list[str]:
        """Return skopeo's options for this registry."""
        prefix = f"--{side}-" if side else "--"
        words = [f"{prefix}tls-verify=true", f"{prefix}cert-dir={self.folder}/certs"]
        # The name of this option has no prefix where there is one side alone.
        return [*words, f"{prefix}authfile={self.folder}/auth.json"] if self.secrets else words

    def skopeo(
        self,
        *words: str,
        longest: float = LONGEST_SECONDS,
        largest: int | None = None,
        advance: Callable[[int], None] = lambda written: None,
    ) -> bytes:
        """Run skopeo, which may write files of at most `largest` bytes; its faults are told in our words."""
        limit = [] if largest is None else ["prlimit", f"--fsize={largest}"]
        env = {name: value for name, value in os.environ.items() if name in ENVIRONMENT}
        try:
            return self.host.run_moving(
                [*limit, "skopeo", *words],
                env=env | NO_PLAIN_HTTP | {"LC_ALL": "C.UTF-8"},
                timeout=longest,
                idle=self.access.idle,
                advance=advance,
            )
        except Failure as failure:
            raise Failure(self.explain(str(failure))) from None

    def explain(self, message: str) -> str:
        """Return one line that names registry, fault and remedy, without any secret."""
        for secret in self.secrets:
            message = message.replace(secret, "…")
        # Names and addresses are no words of a message: a tag may be `404`.
        plain = message.replace(str(self.reference), " ")
        for name in (self.reference.host, self.reference.name, self.reference.tag):
            plain = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", " ", plain) if name else plain
        for words, remedy in REMEDIES:
            if re.search(words, plain, re.IGNORECASE):
                return f"cannot use {self.reference}: {remedy.format(host=self.reference.host)}"
        shown = "".join(c if c.isprintable() else "?" for c in logged(message))
        return f"cannot use {self.reference}: {shown[-400:]}; look into the registry's log"


# What skopeo's messages mean, most telling first; {host} is the registry.
REMEDIES = (
    (r"proxyconnect tcp: dial tcp 127\.0\.0\.1:0",
     "{host} names a place without TLS (http://): let it know its own address, or what stands before it"),
    (r"certificate has expired or is not yet valid",
     "the certificate of {host} is not valid at this time: renew it, or set this computer's clock"),
    (r"signed by unknown authority",
     "the certificate of {host} comes from an unknown CA: name that CA with --tls-ca FILE"),
    (r"certificate is valid for|doesn't contain any IP SANs|not valid for any names",
     "the certificate of {host} is for another name: write the name that is in it"),
    (r"HTTP response to HTTPS client|first record does not look like a TLS",
     "{host} does not speak TLS: give the registry a certificate"),
    (r"x509:|tls:", "TLS with {host} fails: check the registry's certificate and --tls-ca"),
    (r"authentication required|unauthorized|invalid username/password|status\D{0,30}401",
     "{host} does not accept the login: check --login, " + LOGIN_VARIABLE + " or `podman login`"),
    (r"\bdenied\b|forbidden|status\D{0,30}403",
     "the login at {host} may not do this: ask for the right, or check the name"),
    (r"manifest unknown|name unknown|not found|status\D{0,30}404",
     "{host} does not have it: check name and tag"),
    (r"toomanyrequests|too many requests|status\D{0,30}429",
     "{host} allows no more requests now: wait, or log in"),
    (r"connection refused", "nothing listens at {host}: check name and port, start the registry"),
    (r"no such host|name resolution", "there is no computer of the name {host}: check it"),
    (r"no route to host|network is unreachable", "{host} cannot be reached: check the network"),
    (r"did not move|did not end within|i/o timeout|deadline exceeded|handshake timeout",
     "{host} does not answer: look at the registry, try again, or give more time with --timeout"),
    (r"file too large|exceeded maximum allowed size",
     "{host} sends more than it announced: do not trust it; look at the registry"),
    (r"no space left", "the disk is full: make room, or name another folder with TMPDIR"),
    (r"digest did not match|does not match|doesn't match|invalid digest",
     "{host} sends something else than its digest says: do not trust it; look at the registry"),
    (r"unexpected EOF|connection reset|\bEOF\b|broken pipe|content-?length",
     "{host} broke off in the middle of an answer: try again"),
    (r"stopped after \d+ redirects|unsupported protocol scheme",
     "{host} sends elsewhere without end: look at the registry"),
    (r"status\D{0,30}5\d\d|internal server error",
     "{host} has a fault of its own (HTTP 5xx): look into the registry's log, then try again"),
    (r"unexpected HTTP status", "{host} does not answer as registries do: check the name"),
)  # fmt: skip


@contextlib.contextmanager
def connected(host: Host, access: Access, reference: Reference) -> Iterator[Connection]:
    """Yield a connection whose secrets lie in a folder of mode 0700 that is gone afterwards."""
    with host.scratch() as folder:
        (folder / "certs").mkdir()
        if access.tls_ca is not None:
            shutil.copyfile(access.tls_ca, folder / "certs/ca.crt")
        secrets: tuple[str, ...] = ()
        if access.login is not None and access.login.host == reference.host:
            words = access.login.words
            packed = base64.b64encode(words.encode()).decode()
            secrets = (words, packed, words.partition(":")[2])
            with host.replacing(folder / "auth.json", mode=0o600) as fresh:
                fresh.write_text(json.dumps({"auths": {reference.host: {"auth": packed}}}))
        yield Connection(host, access, reference, folder, secrets)


def read_document(connection: Connection, reference: Reference) -> bytes:
    """Return the manifest or index that a reference names; one that is named by digest has that digest."""
    data = connection.skopeo(
        "inspect", "--raw", *connection.words(), str(reference), longest=DOCUMENT_SECONDS
    )
    if reference.digest and digest_of(data) != reference.digest:
        raise Failure(connection.explain("digest did not match"))
    return data


@contextlib.contextmanager
def _moving(host: Host, label: str, done: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show how many bytes of all skopeo has passed on, and say in the end how many those were.

    It tells nobody; but what it writes is what it sends or keeps, a few per mille of TLS and HTTP included.
    """
    begun, moved = time.monotonic(), 0
    with host.progress(label, size) as show:

        def advance(written: int) -> None:
            nonlocal moved
            show(min(written, max(0, size - moved)))
            moved += written

        yield advance
        show(max(0, size - moved))  # what was there already
    host.say(f"{done} {amount(moved, size, time.monotonic() - begun)}")


def digest_of(data: bytes) -> str:
    """Return the digest of a document."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


# --- From a registry ----------------------------------------------------------------------------------


def fetch(host: Host, access: Access, source: str, folder: Path) -> Path:
    """Fetch the image for linux/amd64 that `source` names into a new OCI layout in `folder`.

    Its manifest is read first and everything else fetched by digest, so that nothing can change between, and
    no layer can be larger than it is announced. Raises `Failure`, `Usage`.
    """
    reference = parse_reference(source)
    with connected(host, access, reference) as connection:
        digest, data = _find_image(connection)
        sizes = _sizes(connection, data)
        free = shutil.disk_usage(folder).free
        if sum(sizes) > free:
            need = f"it needs {sum(sizes) >> 20} MiB, {folder} has {free >> 20} MiB free: make room"
            raise Failure(f"cannot fetch {reference}: {need}")
        target = folder / "image"
        with _moving(host, f"fetching {reference}", "fetched", sum(sizes)) as advance:
            connection.skopeo(
                "copy", "--quiet", "--dest-oci-accept-uncompressed-layers", *connection.words("src"),
                str(reference.at(digest)), f"oci:{target}",
                largest=max(sizes, default=0) + init.MIB, advance=advance,
            )  # fmt: skip
    return target


def _find_image(connection: Connection) -> tuple[str, bytes]:
    """Return digest and bytes of the image manifest; of several platforms, the one for linux/amd64."""
    reference = connection.reference
    data = read_document(connection, reference)
    raw = _document(connection, data)
    if "manifests" not in raw:
        return digest_of(data), data
    entries = raw["manifests"] if isinstance(raw["manifests"], list) else []
    ours = [entry.get("digest") for entry in entries if isinstance(entry, dict) and _is_ours(entry)]
    if not ours or not init.DIGEST.fullmatch(str(ours[0])):
        raise Failure(f"{reference} has no image for {'/'.join(PLATFORM)}: name one that has")
    digest = str(ours[0])
    return digest, read_document(connection, reference.at(digest))


def _is_ours(entry: dict[str, object]) -> bool:
    platform = entry.get("platform")
    return isinstance(platform, dict) and (platform.get("os"), platform.get("architecture")) == PLATFORM


def _document(connection: Connection, data: bytes) -> dict[str, object]:
    try:
        raw = init.parse_json(data, "IMAGE-FORMAT")
    except init.Refused:
        raw = None
    if not isinstance(raw, dict):
        raise Failure(f"{connection.reference} is no image (its manifest is no JSON object): name another")
    return raw


def _sizes(connection: Connection, data: bytes) -> list[int]:
    """Return the sizes of all blobs that an image manifest announces."""
    _document(connection, data)
    try:
        raw, layers = init.parse_descriptors(data, "layers", "IMAGE-FORMAT")
        config = init.parse_descriptor(raw.get("config"), "IMAGE-FORMAT")
    except init.Refused as refused:
        raise Failure(
            f"{connection.reference} is no image that can be used ({refused.seen[:100]}): name another"
        ) from refused
    return [config.size, *(layer.size for layer in layers)]


# --- To a registry ------------------------------------------------------------------------------------


def probe(host: Host, access: Access, destination: Reference) -> None:
    """See that a registry answers and knows us, before any long work. Raises `Failure`."""
    with connected(host, access, destination) as connection:
        try:
            read_document(connection, destination)
        except Failure as failure:
            # A release that is not there yet; and some registries deny to say so.
            if not re.search(r"does not have it|may not do this", str(failure)):
                raise


def push(host: Host, access: Access, layout: Path, tag: str, destination: Reference, digest: str) -> None:
    """Copy a release, an index and all it lists, and see that its tag then names exactly that index.

    Blobs that the registry has are not sent. The tag moves last: whoever looks sees the old release or the
    new one. Raises `Failure`.
    """
    size = sum(path.stat().st_size for path in (layout / "blobs/sha256").iterdir())
    label = f"sending the release to {destination}, without what is there already"
    with connected(host, access, destination) as connection:
        with _moving(host, label, "sent", size) as advance:
            connection.skopeo(
                "copy", "--quiet", "--all", "--preserve-digests", *connection.words("dest"),
                f"oci:{layout}:{tag}", str(destination), advance=advance,
            )  # fmt: skip
        try:
            kept = read_document(connection, destination)
        except Failure as failure:
            if "does not have it" not in str(failure):
                raise
            lost = f"{destination.host} took the release and does not have it: look at the registry"
            raise Failure(f"cannot use {destination}: {lost}") from None
        if digest_of(kept) != digest:
            raise Failure(connection.explain("digest did not match"))
