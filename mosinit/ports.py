"""A virtual machine's ports to whoever runs it: a line goes out, a line comes in.

Nobody need listen there, and then a plain write(2) waits for ever; a port takes one opener at a time, and at
most 32 KiB at once. So nothing here waits without an end.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.1


@contextmanager
def opened(port: Path, seconds: float, way: Callable[[Path, int], int] = os.open) -> Iterator[int]:
    """Yield an open port, once nobody else has it. Raises OSError."""
    until = time.monotonic() + seconds
    while True:
        try:
            fd = way(port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            break
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
        time.sleep(POLL_SECONDS)
    try:
        yield fd
    finally:
        os.close(fd)


def send(fd: int, line: bytes, seconds: float) -> None:
    """Send a line whole. Raises `TimeoutError` where nobody takes it."""
    until = time.monotonic() + seconds
    while line:
        left = until - time.monotonic()
        if left <= 0 or not select.select([], [fd], [], left)[1]:
            raise TimeoutError(errno.ETIMEDOUT, "nobody listens there")
        try:
            line = line[os.write(fd, line[:32768]) :]
        except BlockingIOError:
            time.sleep(min(POLL_SECONDS, left))


def receive(fd: int, limit: int, seconds: float) -> bytes:
    """Return the line that comes; what it is when the time is over, or nobody is there any more, or once it
    has more than `limit` bytes: then its end is no line break.
    """
    until, line = time.monotonic() + seconds, b""
    while not line.endswith(b"\n") and len(line) <= limit:
        ready, _, _ = select.select([fd], [], [], max(0, until - time.monotonic()))
        try:
            data = os.read(fd, 65536) if ready else b""
        except BlockingIOError:
            time.sleep(POLL_SECONDS)
            continue
        if not data:
            break
        line += data
    return line
