"""An installation without a person: the port to whoever enrolls, and what the answers lead to."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mosinit import answers, install, layout, ports, unattended
from mosinit.answers import Answers
from mosinit.host import Failure
from tests.recorder import Recorder, Started
from tests.registries import Authority


def exchanged(reply: bytes, request: bytes, seconds: float = 10) -> tuple[bytes, bytes]:
    """Exchange over a terminal in the place of a port; return what was asked and what came back."""
    ours, theirs = os.openpty()
    name = os.ttyname(theirs)
    tty.setraw(theirs)
    asked = bytearray()

    def other() -> None:
        while not asked.endswith(b"\n"):
            asked.extend(os.read(ours, 4096))
        os.write(ours, reply)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        return bytes(asked), unattended.exchange(Path(name), request, seconds)
    finally:
        thread.join()
        os.close(ours)
        os.close(theirs)


def test_a_request_is_one_line_and_so_is_the_answer() -> None:
    request = json.dumps({"a": ["b" * 60000, 1]}, indent=1).encode()
    _, reply = exchanged(b'{"answer": 1}\n', request)
    assert reply == b'{"answer": 1}\n'


def test_no_answer() -> None:
    with pytest.raises(Failure, match="no answer came"):
        exchanged(b"{", b"{}", seconds=0.2)


@contextlib.contextmanager
def deaf() -> Iterator[Path]:
    """A port at which nobody listens: a terminal takes a few KiB, and then whoever writes waits for ever."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    try:
        yield Path(os.ttyname(theirs))
    finally:
        os.close(ours)
        os.close(theirs)


def ends(work: Callable[[], object]) -> bool:
    """Say whether something ends at all."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    return not thread.is_alive()


def test_nobody_listens_at_the_port() -> None:
    said: list[str] = []

    def exchange() -> None:
        try:
            unattended.exchange(port, json.dumps("a" * 100_000).encode(), 0.1)
        except Failure as failure:
            said.append(str(failure))

    with deaf() as port:
        assert ends(exchange)
    assert said == [
        f"nobody takes the request at {port}: connect whoever enrolls machines, then install again"
    ]


def test_a_port_that_cannot_be_had_is_told_with_what_to_do(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "port"))
        says = r"nobody takes the request at .*/port \(No such device.*\): connect whoever enrolls machines"
        with pytest.raises(Failure, match=says):
            unattended.exchange(tmp_path / "port", b"{}", 0.1)


def test_what_became_of_an_installation_waits_for_no_listener(tmp_path: Path) -> None:
    with deaf() as port:
        assert ends(lambda: answers.tell({"a": "b" * 100_000}, port, 0.1))
    # Whoever has the port, or what stands there: the installation is as it is.
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "port"))
        answers.tell({"a": 1}, tmp_path / "port", 0.1)


def test_a_port_that_somebody_else_has_is_waited_for() -> None:
    """It has one opener at a time: mosinit-report.service has it when the system is up."""
    tries = []

    def busy(path: Path, flags: int) -> int:
        tries.append(path)
        if len(tries) < 3:
            raise OSError(errno.EBUSY, "busy")
        return os.open(path, flags)

    with deaf() as port:
        with ports.opened(port, 60, busy) as fd:
            ports.send(fd, b"a line\n", 60)
        assert tries == [port] * 3
        with pytest.raises(FileNotFoundError), ports.opened(port.with_name("none"), 60):
            pass
        tries.clear()
        with pytest.raises(OSError, match="busy"), ports.opened(port, -1, busy):
            pass


def test_a_machine_that_nobody_can_enroll_is_told_so_before_its_tpm_is_asked(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="no port org.mosinit.exchange .* by hand"):
        unattended.check_port(tmp_path / unattended.PORT.name)
    (tmp_path / unattended.PORT.name).touch()
    unattended.check_port(tmp_path / unattended.PORT.name)


class Networked(Recorder):
    """A host whose network comes, or does not."""

    def __init__(self, *, comes: bool = True) -> None:
        super().__init__()
        self.comes = comes

    def answer(self, program: Started) -> bytes:
        """Wait for the network."""
        if not self.comes:
            raise Failure("timed out")
        return b""


def test_the_medium_s_release_needs_no_network(tmp_path: Path) -> None:
    host = Networked()
    given = Answers(Path("/dev/vdb"), "serial", "", 1, 2, 3)
    options = unattended.options_of(host, given, tmp_path / "answers.yaml")
    assert (options.disk, options.source) == (given.disk, install.MEDIUM_RELEASE)
    assert options.consent == layout.Consent("serial", serial_is_enough=True)
    assert (options.state, options.store, options.scratch, options.access) == (1, 2, 3, None)
    assert host.ran == []


def test_a_registry_is_reached_by_the_authority_beside_the_answers(tmp_path: Path) -> None:
    host = Networked()
    given = Answers(Path("/dev/vdb"), source="docker://registry.example/acme:7")
    path = tmp_path / "answers.yaml"
    plain = unattended.options_of(host, given, path).access
    assert plain is not None
    assert plain.tls_ca is None
    authority = Authority(tmp_path).path.rename(tmp_path / "registry-ca.pem")
    options = unattended.options_of(host, given, path)
    assert options.access is not None
    assert (options.source, options.access.tls_ca) == (given.source, authority)
    assert [words[0] for words in host.ran] == [unattended.WAIT_ONLINE] * 2
    authority.write_text("nothing")
    with pytest.raises(Failure, match="no certificate"):
        unattended.options_of(host, given, path)


def test_no_network(tmp_path: Path) -> None:
    given = Answers(Path("/dev/vdb"), source="docker://registry.example/acme:7")
    with pytest.raises(Failure, match="look at cable and DHCP"):
        unattended.options_of(Networked(comes=False), given, tmp_path / "answers.yaml")
