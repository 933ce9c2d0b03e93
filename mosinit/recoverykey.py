"""The recovery key, as a person gives it: from a file of theirs, or typed; never in a command line."""

from __future__ import annotations

import getpass
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from mosinit import exchange
from mosinit.host import Failure

MOST = 512
_TYPED = re.compile("([cbdefghijklnrtuv]{8}-){7}[cbdefghijklnrtuv]{8}")


def read(names: Sequence[str]) -> tuple[bytes, ...]:
    """Return the recovery keys that were named; `-` is standard input, without echo if it is a terminal."""
    return tuple(parse(_typed() if name == "-" else _read_file(Path(name)), name) for name in names)


def _typed() -> bytes:
    if sys.stdin.isatty():
        try:
            return getpass.getpass("recovery key: ").encode()
        except (EOFError, UnicodeError):
            return b""  # no key, as `parse` says
    return sys.stdin.buffer.readline(MOST + 1)


def _read_file(path: Path) -> bytes:
    if not path.exists():
        raise Failure(f"there is no {path}: name the file with the recovery key, or - to type it")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise Failure(f"{path} is open to others: chmod 600 {path}")
    return exchange.read_file(path, exchange.DOCUMENT_BYTES)


def parse(data: bytes, name: str) -> bytes:
    """Return the key of a file or of what was typed: an opened recovery record, or the key alone."""
    if data.lstrip().startswith(b"{"):
        return exchange.parse_recovery(data, name).recovery_key.encode()
    key = data.strip()
    if not 0 < len(key) <= MOST or b"\n" in key or b"\0" in key:
        raise Failure(f"{name if name != '-' else 'what was typed'} is no recovery key: name the right file")
    # Letters are those of modhex, which every keyboard has: a person may type them large.
    typed = key.decode(errors="replace").lower().replace(" ", "")
    return typed.encode() if _TYPED.fullmatch(typed) else key
