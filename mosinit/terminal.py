"""The person's terminal, joined to a machine's serial console."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import termios
import tty
from collections.abc import Iterator

from mosinit.host import Usage

LEAVE = b"\x1d"  # Ctrl-], as in telnet and virsh


def need() -> None:
    """Raise `Usage` unless a person is there."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Usage("an interactive machine needs a terminal on standard input and output")


@contextlib.contextmanager
def joined(console: socket.socket, left: asyncio.Event) -> Iterator[None]:
    """Send what is typed to the machine, unseen by the terminal's own line editing; Ctrl-] sets `left`.

    The terminal is as it was afterwards, however this ends.
    """
    stdin, loop = sys.stdin.fileno(), asyncio.get_running_loop()
    before = termios.tcgetattr(stdin)

    def typed() -> None:
        data = os.read(stdin, 4096)
        if not data or LEAVE in data:
            left.set()
        with contextlib.suppress(BlockingIOError, OSError):
            console.send(data.partition(LEAVE)[0])

    tty.setraw(stdin)
    loop.add_reader(stdin, typed)
    try:
        yield
    finally:
        loop.remove_reader(stdin)
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def show(data: bytes) -> None:
    """Write the machine's bytes to the terminal as they are."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
