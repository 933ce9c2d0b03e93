"""Registries for tests: Debian's own, with TLS and a password, and one that misbehaves as it is told."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import hashlib
import ipaddress
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

USER, PASSWORD = "publisher", "sesame-open-73519"
DAY = datetime.timedelta(days=1)


# --- Certificates -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Authority:
    """A CA of its own, in a folder; `path` is its certificate."""

    folder: Path
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    @property
    def path(self) -> Path:
        """The CA's certificate."""
        path = self.folder / "ca.pem"
        if not path.exists():
            path.write_bytes(self._make("a test CA", self.key, -DAY, DAY, ca=True))
        return path

    def server(self, name: str = "server", begin: int = -1, end: int = 1) -> Path:
        """Make a certificate for this computer, with its key in the same file."""
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = self.folder / f"{name}.pem"
        path.write_bytes(self._make(name, key, begin * DAY, end * DAY, ca=False) + private)
        return path

    def _make(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        begin: datetime.timedelta,
        end: datetime.timedelta,
        *,
        ca: bool,
    ) -> bytes:
        now = datetime.datetime.now(datetime.timezone.utc)
        # The second is what machines on QEMU's user network call this computer.
        addresses = [x509.IPAddress(ipaddress.ip_address(text)) for text in ("127.0.0.1", "10.0.2.2")]
        names = [*addresses, x509.DNSName("localhost")]
        builder = (
            x509.CertificateBuilder(_name("a test CA"), _name(name), key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begin)
            .not_valid_after(now + end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        certificate = builder.sign(self.key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def password_file(folder: Path, words: str = f"{USER}:{PASSWORD}") -> Path:
    """Write a login as --login takes it."""
    path = folder / "login"
    path.touch(0o600)
    path.write_text(words + "\n")
    return path


# --- Debian's docker-registry -------------------------------------------------------------------------


@dataclass(frozen=True)
class Real:
    """A running docker-registry: its address and its access log, and how it is started."""

    address: str
    log: Path
    command: list[str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with self.log.open("ab") as output:
            self.processes.append(subprocess.Popen(self.command, stdout=output, stderr=output))
        _wait_for(int(self.address.partition(":")[2]))

    def stop(self) -> None:
        """End it, and every connection with it."""
        process = self.processes.pop()
        process.terminate()
        process.wait(10)

    def requests(self) -> list[tuple[str, str, int]]:
        """Return method, path and status of every request so far."""
        found = re.findall(r'"([A-Z]+) (\S+) HTTP/1\.1" (\d+) ', self.log.read_text())
        return [(method, path, int(status)) for method, path, status in found]


@contextlib.contextmanager
def real_registry(folder: Path, authority: Authority, *, login: bool = True) -> Iterator[Real]:
    """Run docker-registry on a free port of 127.0.0.1, with TLS and, for a `login`, a password (bcrypt)."""
    certificate, port = authority.server(), _free_port()
    (folder / "htpasswd").write_text(f"{USER}:{_bcrypt(PASSWORD)}\n")
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: warn, accesslog: {{disabled: false}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}', tls: {{certificate: {certificate}, key: {certificate}}}}}\n"
        + (f"auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}\n" if login else "")
    )
    command = ["docker-registry", "serve", str(folder / "config.yml")]
    registry = Real(f"127.0.0.1:{port}", folder / "registry.log", command)
    registry.start()
    try:
        yield registry
    finally:
        registry.stop()


def _bcrypt(password: str) -> str:
    """Hash a password as docker-registry wants it, by the C library that every Debian has."""
    crypt = ctypes.CDLL("libcrypt.so.1").crypt
    crypt.restype = ctypes.c_char_p
    hashed: bytes = crypt(password.encode(), b"$2y$05$abcdefghijklmnopqrstuu")
    return hashed.decode()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _wait_for(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens at port {port}")


# --- One that misbehaves ------------------------------------------------------------------------------

# What a request is for: "ping", "manifest", "blob", "upload" (of a blob), "put" (of a manifest).
Fault = Callable[["Handler", str], bool]


class Registry(ThreadingHTTPServer):
    """A registry in memory. `fault` sees each request first and returns True if it has dealt with it."""

    daemon_threads = True

    def __init__(self, certificate: Path | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.seen: list[tuple[str, str, str]] = []
        self.fault: Fault = lambda handler, kind: False
        self.over = threading.Event()
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.server_port}"

    def add(self, name: str, kind: str, content: bytes) -> str:
        """Keep a manifest under its digest and a tag; returns the digest."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.manifests[name] = self.manifests[digest] = (kind, content)
        return digest

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing when a client leaves."""


class Handler(BaseHTTPRequestHandler):
    """The few requests of the distribution API that copies need."""

    protocol_version = "HTTP/1.1"
    server: Registry

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""

    def handle_any(self) -> None:
        """Let the fault happen, or answer as a registry should."""
        path = self.path.partition("?")[0]
        self.server.seen.append((self.command, path, self.headers.get("Authorization", "")))
        kind = {"GET": "manifest", "HEAD": "manifest"}.get(self.command, "put")
        if path == "/v2/":
            kind = "ping"
        elif "/blobs/" in path:
            kind = "blob" if self.command in ("GET", "HEAD") else "upload"
        if not self.server.fault(self, kind):
            getattr(self, f"on_{kind}")(path.rpartition("/")[2])

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = handle_any  # noqa: N815

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send one whole answer."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        """Read what the client sends."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def on_ping(self, name: str) -> None:
        """Answer that this is a registry, and that it wants a password."""
        known = "Authorization" in self.headers
        self.answer(200 if known else 401, b"{}", WWW_Authenticate='Basic realm="test"')

    def on_manifest(self, name: str) -> None:
        """Hand out a manifest."""
        kind, content = self.server.manifests.get(name, ("", b""))
        if not kind:
            return self.answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}')
        return self.answer(200, content, Content_Type=kind)

    def on_blob(self, name: str) -> None:
        """Hand out a blob."""
        known = name in self.server.blobs
        self.answer(200 if known else 404, self.server.blobs.get(name, b""))

    def on_upload(self, name: str) -> None:
        """Take a blob, in as many requests as the client likes."""
        data = self.body()
        here = f"https://{self.server.address}/v2/x/blobs/uploads/1"
        if self.command == "PUT":
            digest = self.path.rpartition("digest=")[2].replace("%3A", ":")
            content = self.server.blobs.pop("upload", b"") + data
            self.server.blobs[digest] = content
            return self.answer(201, Docker_Content_Digest=digest, Location=here)
        if self.command == "PATCH":
            self.server.blobs["upload"] = self.server.blobs.get("upload", b"") + data
        return self.answer(202, Location=here, Range="0-0")

    def on_put(self, name: str) -> None:
        """Take a manifest."""
        digest = self.server.add(name, str(self.headers["Content-Type"]), self.body())
        self.answer(201, Docker_Content_Digest=digest)


@contextlib.contextmanager
def running(certificate: Path | None) -> Iterator[Registry]:
    """Run a registry that can misbehave."""
    with Registry(certificate) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


# --- Ways to misbehave --------------------------------------------------------------------------------


def http_500(handler: Handler) -> None:
    """Fail."""
    handler.body()
    handler.answer(500, b"a stack trace\nof many lines\n")


def half_a_body(handler: Handler) -> None:
    """Break off."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{" + b" " * 500)
    handler.close_connection = True


def nothing(handler: Handler) -> None:
    """Wait for ever."""
    handler.server.over.wait(60)
    handler.close_connection = True


def another_digest(handler: Handler) -> None:
    """Send something else, of the right size."""
    name = handler.path.rpartition("/")[2]
    kind, content = handler.server.manifests.get(name, ("", handler.server.blobs.get(name, b"")))
    handler.answer(200, bytes(byte ^ 1 for byte in content), Content_Type=kind or "application/octet-stream")


def endless_body(handler: Handler) -> None:
    """Never stop."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    with contextlib.suppress(OSError):
        while not handler.server.over.is_set():
            handler.wfile.write(chunk)
    handler.close_connection = True


def elsewhere(address: str) -> Callable[[Handler], None]:
    """Send the client to another server."""

    def redirect(handler: Handler) -> None:
        handler.body()
        handler.answer(307, Location=f"https://{address}{handler.path}")

    return redirect
