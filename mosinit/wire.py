"""HTTPS to one registry, and to whom it points.

TLS is not optional: nothing here can open a connection without it, whatever a registry names. A login goes
to the registry itself, or to a token server that is its own or that the person named, to nobody else. No
answer may take for ever, be without end, or become part of a message.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import json
import os
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mosinit.host import MOVING_BYTES, Failure

REDIRECTS = 5
REDIRECTING = (301, 302, 303, 307, 308)
LONGEST_SECONDS = 4 * 3600.0
DOCUMENT_SECONDS = 300.0  # for a document of at most 4 MiB, however slowly it trickles
TOKEN_BYTES = 64 << 10
PAUSES = (
    1.0,
    2.0,
    4.0,
    8.0,
    15.0,
    30.0,
    60.0,
)  # before a blob is gone on with; a cable is put back meanwhile
CHUNK = 256 << 10
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")  # Debian's and Ubuntu's, with what an owner added

# X509_V_ERR_…, openssl/x509_vfy.h
NOT_NOW, NOT_KNOWN, NOT_THIS_NAME = (9, 10), (2, 7, 18, 19, 20, 21), (62, 64)
NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")


class Interrupted(Failure):
    """The network or the registry failed in a way that may pass."""


class Absent(Failure):
    """The registry does not have what was asked for."""


class Denied(Failure):
    """The registry does not let us."""


@dataclass(frozen=True)
class Place:
    """Where an https:// address leads."""

    host: str
    port: int
    target: str

    @property
    def address(self) -> str:
        """Host and port: two ports of a computer are two servers."""
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The address that was read."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port}{self.target}"


def parse_place(url: str) -> Place:
    """Read an https:// address. Raises `ValueError`."""
    parts = urllib.parse.urlsplit(url)
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    plain = re.fullmatch(r"/(?!/)[!-~]*", target) and re.fullmatch(
        r"[a-z0-9.:-]{1,253}", parts.hostname or ""
    )
    if parts.scheme != "https" or not plain or parts.username is not None:
        raise ValueError(url)
    return Place(parts.hostname or "", 443 if parts.port is None else parts.port, target)


def open_context(more: Path | None) -> ssl.SSLContext:
    """Return what certificates are checked by: the system's CAs, and those of one file more."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks name and chain
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_default_certs()
    if CA_BUNDLE.is_file() and "SSL_CERT_FILE" not in os.environ:
        context.load_verify_locations(CA_BUNDLE)
    if more is not None:
        context.load_verify_locations(more)
    return context


@dataclass
class Wire:
    """A registry: who it is, how it is reached, and what opens it. It never shows a secret."""

    name: str  # what messages call what is asked for
    api: Place
    host: str
    context: ssl.SSLContext
    idle: float
    login: str | None = field(repr=False)  # USER:PASSWORD
    login_places: frozenset[str]  # addresses that may see it
    scope: str
    authorization: str = field(default="", repr=False)
    pauses: tuple[float, ...] = PAUSES

    def sign_in(self) -> None:
        """Ask the registry what it wants to know, and say it. Raises `Failure`."""
        with self._exchange("GET", self.api, {}, None, DOCUMENT_SECONDS) as answer:
            if answer.status == 401:
                self._answer_challenge(answer)
            elif answer.status in REDIRECTING:
                raise self.fault("{host} does not answer as registries do: check the name")
            elif answer.status != 404:  # one without this question answers the next
                self._check(answer)

    @contextlib.contextmanager
    def ask(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Callable[[], Iterable[bytes]] | None = None,
        longest: float = DOCUMENT_SECONDS,
    ) -> Iterator[http.client.HTTPResponse]:
        """Yield the answer to a request, which is not an error; redirects of what only reads are followed.

        `path` is one of the registry, or an https:// address that it named. Raises `Failure`.
        """
        place, asked_again = self.place(path, self.api), False
        for _ in range(REDIRECTS + 2):
            known = {"Authorization": self.authorization} if self.authorization else {}
            given = {**(headers or {}), **(known if place.address == self.api.address else {})}
            with self._exchange(method, place, given, body, longest) as answer:
                if answer.status in REDIRECTING and method in ("GET", "HEAD"):
                    place = self.place(answer.getheader("Location", ""), place)
                    continue
                if answer.status == 401 and place.address == self.api.address and not asked_again:
                    # A token is for a while.
                    asked_again = True
                    self._answer_challenge(answer)
                    continue
                self._check(answer)
                yield answer
                return
        raise self.fault("{host} sends elsewhere without end: look at the registry")

    def read(self, answer: http.client.HTTPResponse, limit: int) -> Iterator[bytes]:
        """Yield the body of an answer, of at most `limit` bytes, as long as it moves."""
        announced = answer.getheader("Content-Length")
        done = seen = 0
        since = time.monotonic()
        while True:
            with self._network():
                chunk = answer.read1(CHUNK)
            done += len(chunk)
            if done > limit:
                raise self.fault(
                    "{host} sends more than it announced: do not trust it; look at the registry"
                )
            if not chunk:
                break
            now = time.monotonic()
            if done - seen >= MOVING_BYTES:
                seen, since = done, now
            elif now - since > self.idle:
                raise self.late()
            yield chunk
        if announced is not None and announced != str(done) and not answer.chunked:
            raise self.interrupted("{host} broke off in the middle of an answer: try again")

    def document(self, answer: http.client.HTTPResponse, limit: int) -> bytes:
        """Return the body of an answer."""
        return b"".join(self.read(answer, limit))

    def place(self, url: str, base: Place) -> Place:
        """Return where an address leads that the registry named. Raises `Failure` unless it is by TLS."""
        try:
            joined = urllib.parse.urljoin(base.url, url)
            if re.match(r"(?i)(?!https:)[a-z][a-z0-9+.-]*:", joined):
                raise self.fault(
                    "{host} names a place without TLS (http://): let it know its own address, or what "
                    "stands before it"
                )
            return parse_place(joined)
        except ValueError:
            raise self.fault("{host} does not answer as registries do: check the name") from None

    # Who we are

    def _answer_challenge(self, answer: http.client.HTTPResponse) -> None:
        """Take what a registry wants to know from its answer to somebody whom it does not know."""
        for challenge in answer.headers.get_all("WWW-Authenticate") or []:
            kind, _, rest = challenge.strip().partition(" ")
            if kind.lower() == "bearer":
                words = dict(re.findall(r'(\w+)="([^"]*)"', rest))
                self.authorization = f"Bearer {self._token(words)}"
                return
            if kind.lower() == "basic" and self.login is not None:
                self.authorization = self._basic()
                return
        raise self._unknown()

    def _basic(self) -> str:
        return f"Basic {base64.b64encode((self.login or '').encode()).decode()}"

    def _token(self, challenge: Mapping[str, str]) -> str:
        """Fetch a token for just what we are about, wherever the registry has them made."""
        place = self.place(challenge.get("realm", ""), self.api)
        headers = {}
        if self.login is not None:
            if place.address not in self.login_places:
                raise self.fault(
                    f"{{host}} wants the login to go to {place.address}: if that is its token server, "
                    f"say so with --token-host {place.host if place.port == 443 else place.address}"
                )
            headers["Authorization"] = self._basic()
        query = urllib.parse.urlencode({"service": challenge.get("service", ""), "scope": self.scope})
        joint = "&" if "?" in place.target else "?"
        place = Place(place.host, place.port, f"{place.target}{joint}{query}")
        with self._exchange("GET", place, headers, None, DOCUMENT_SECONDS) as answer:
            self._check(answer)
            try:
                found = json.loads(self.document(answer, TOKEN_BYTES))
                token = found.get("token") or found.get("access_token")
            except (ValueError, RecursionError, AttributeError):
                token = None
        if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
            raise self.fault("{host} does not answer as registries do: check the name")
        return token

    # Faults

    def fault(self, words: str) -> Failure:
        """Return the error that names what was asked for, the registry, the fault and the remedy."""
        return Failure(self._words(words))

    def interrupted(self, words: str) -> Interrupted:
        """Return the same, of a fault that may pass."""
        return Interrupted(self._words(words))

    def late(self) -> Interrupted:
        """Return the error of a registry that stands still."""
        return self.interrupted(
            "{host} does not answer: look at the registry, try again, or give more time with --timeout"
        )

    def _words(self, words: str) -> str:
        return f"cannot use {self.name}: {words.format(host=self.host)}"

    def _unknown(self) -> Failure:
        if self.login is None:
            return self.fault(
                "{host} wants a login, and there is none for it: give one by --login FILE (USER:PASSWORD in "
                "it), MOSINIT_REGISTRY_LOGIN or `podman login {host}`"
            )
        return self.fault(
            "{host} does not accept the login: check --login, MOSINIT_REGISTRY_LOGIN or `podman login`"
        )

    def _check(self, answer: http.client.HTTPResponse) -> None:
        """Raise what the status of an answer means, unless it is that of a success."""
        status = answer.status
        if status == 401 or (status == 403 and self.login is None):
            raise self._unknown()
        if status == 403:
            raise Denied(
                self._words("the login at {host} may not do this: ask for the right, or check the name")
            )
        if status == 404:
            raise Absent(self._words("{host} does not have it: check name and tag"))
        if status == 429:
            raise self.interrupted("{host} allows no more requests now: wait, or log in")
        if status == 416:
            raise self.fault(
                "{host} has less of it than it sent before: do not trust it; look at the registry"
            )
        if status >= 500:
            raise self.interrupted(
                "{host} has a fault of its own (HTTP 5xx): look into the registry's log, then try again"
            )
        if not 200 <= status < 300:
            raise self.fault("{host} does not answer as registries do: check the name")

    @contextlib.contextmanager
    def _network(self) -> Iterator[None]:
        """Tell the faults of a network in our words."""
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            raise self.fault(_certificate_fault(error.verify_code)) from error
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
            raise self.interrupted("{host} broke off in the middle of an answer: try again") from error
        except ssl.SSLError as error:
            if error.reason in NO_TLS:
                raise self.fault("{host} does not speak TLS: give the registry a certificate") from error
            raise self.fault(
                "TLS with {host} fails: check the registry's certificate and --tls-ca"
            ) from error
        except TimeoutError as error:
            raise self.late() from error
        except ConnectionRefusedError as error:
            raise self.interrupted(
                "nothing listens at {host}: check name and port, start the registry"
            ) from error
        except socket.gaierror as error:
            raise self.interrupted("there is no computer of the name {host}: check it") from error
        except (ConnectionError, http.client.IncompleteRead) as error:
            raise self.interrupted("{host} broke off in the middle of an answer: try again") from error
        except (http.client.HTTPException, ValueError) as error:
            raise self.fault("{host} does not answer as registries do: check the name") from error
        except OSError as error:
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
                raise self.interrupted("{host} cannot be reached: check the network") from error
            raise self.interrupted("{host} cannot be reached: check the network and the proxy") from error

    # One request

    @contextlib.contextmanager
    def _exchange(
        self,
        method: str,
        place: Place,
        headers: Mapping[str, str],
        body: Callable[[], Iterable[bytes]] | None,
        longest: float,
    ) -> Iterator[http.client.HTTPResponse]:
        """Yield the answer to one request, on a connection of its own."""
        connection = _Connection(place, self.context, self.idle)
        try:
            with self._network():
                connection.connect()
            with _ended_after(connection.sock, longest):
                with self._network():
                    # What a server said before it hung up tells more.
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        connection.request(
                            method, place.target, body() if body else None, {"Accept": "*/*", **headers}
                        )
                    with _ended_after(connection.sock, self.idle):
                        answer = connection.getresponse()
                yield answer
        finally:
            connection.close()


def _certificate_fault(code: int) -> str:
    if code in NOT_NOW:
        return "the certificate of {host} is not valid at this time: renew it, or set this computer's clock"
    if code in NOT_KNOWN:
        return "the certificate of {host} comes from an unknown CA: name that CA with --tls-ca FILE"
    if code in NOT_THIS_NAME:
        return "the certificate of {host} is for another name: write the name that is in it"
    return "TLS with {host} fails: check the registry's certificate and --tls-ca"


class _Connection(http.client.HTTPSConnection):
    """A connection with TLS, through the tunnel of a proxy if the environment names one."""

    def __init__(self, place: Place, context: ssl.SSLContext, idle: float) -> None:
        self._server, self._trust, self._idle = place.host, context, idle
        proxy = _proxy(place.host)
        first = (place.host, place.port) if proxy is None else (proxy.hostname or "", proxy.port or 80)
        super().__init__(*first, timeout=idle, context=context, blocksize=CHUNK)
        if proxy is not None:
            words = (
                f"{urllib.parse.unquote(proxy.username or '')}:{urllib.parse.unquote(proxy.password or '')}"
            )
            known = {"Proxy-Authorization": f"Basic {base64.b64encode(words.encode()).decode()}"}
            self.set_tunnel(place.host, place.port, known if proxy.username else {})

    def connect(self) -> None:
        """Connect and shake hands, within the time that a server may stand still."""
        http.client.HTTPConnection.connect(self)
        with _ended_after(self.sock, self._idle):
            self.sock = self._trust.wrap_socket(self.sock, server_hostname=self._server)


def _proxy(host: str) -> urllib.parse.SplitResult | None:
    """Return the proxy that the environment names for a host. It is asked for a tunnel, and sees no more."""
    proxy = urllib.request.getproxies_environment().get("https", "")
    own = host in ("localhost", "::1") or host.startswith("127.")
    if not proxy or own or urllib.request.proxy_bypass(host):
        return None
    parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme != "http" or not parts.hostname:
        raise Failure("the variable https_proxy names no proxy of the kind http://HOST:PORT: correct it")
    return parts


@contextlib.contextmanager
def _ended_after(sock: socket.socket, seconds: float) -> Iterator[None]:
    """End a connection after a time, however busy it is: a socket's own limit is for each byte anew."""
    late = threading.Event()
    # The socket itself becomes another when TLS begins.
    twin = socket.socket(fileno=os.dup(sock.fileno()))

    def end() -> None:
        late.set()
        with contextlib.suppress(OSError):
            twin.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        if late.is_set():
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()
        timer.join()
        twin.close()
