"""What a machine says: lines of its serial console and its boot report, all of it untrusted.

The report comes as one line of the console, `mosinit-report: {json}`, from the bring-up itself, and as one
line of JSON from a port of the started system. Nothing here believes a length, a type or a character of
either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

FRAME = b"mosinit-report: "
START = b"mosinit: start"
REPORT_LIMIT = 64 * 1024  # bytes of one report
LINE_LIMIT = REPORT_LIMIT + 1024
LOG_LIMIT = 16 * 1024 * 1024  # bytes of a console log
RESULTS = {"pivoted": 0, "refused": 3, "crashed": 1}  # with the exit status each means
CHECK_ID = re.compile(r"[A-Z][A-Z0-9]*(-[A-Z0-9]+){0,5}")
# Terminal control: CSI and OSC sequences as firmware and systemd write them, then every other control.
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)|[^\x20-\x7e\u00a0-\ud7ff]")

Report = dict[str, object]


class BadReport(ValueError):
    """The line is framed as a report and is none."""


def parse_report(untrusted: bytes) -> Report:
    """Parse the JSON of a boot report of schema 1. Raises `BadReport`."""
    return check_report(parse_json(untrusted))


def check_report(value: dict[str, object]) -> Report:
    """Return the object if it is a boot report of schema 1. Raises `BadReport`."""
    if value.get("schema") != 1:
        raise BadReport("its schema is not 1")
    result, failed = value.get("result"), value.get("failed")
    if not isinstance(result, str) or result not in RESULTS:
        raise BadReport("its result is none that is known")
    if failed is not None and not (
        isinstance(failed, str) and len(failed) <= 64 and CHECK_ID.fullmatch(failed)
    ):
        raise BadReport("what it names as failed is no check id")
    if result == "refused" and failed is None:
        raise BadReport("it refuses without naming a check")
    for name in ("checks", "stages"):
        rows = value.get(name, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise BadReport(f"its {name} are no list of objects")
    return value


def parse_json(untrusted: bytes) -> dict[str, object]:
    """Parse one JSON object of at most 64 KiB; drop control characters. Raises `BadReport`."""
    if len(untrusted) > REPORT_LIMIT:
        raise BadReport(f"it has more than {REPORT_LIMIT} bytes")
    try:
        value = json.loads(untrusted.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
        value = _cleaned(value)
    except RecursionError as error:
        raise BadReport("it is nested too deeply") from error
    except ValueError as error:
        raise BadReport(f"it is no JSON: {plain(str(error))}") from error
    if not isinstance(value, dict):
        raise BadReport("it is no JSON object")
    return value


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no number")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _cleaned(value: object) -> object:
    # A person reads these on a terminal, which an escape sequence could rewrite or drive; and a refused boot
    # may well quote an attacker.
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return value


def plain(text: str) -> str:
    """Return text without terminal control, for messages."""
    return _ESCAPES.sub("", text)


@dataclass
class Lines:
    """Cuts a stream of bytes into lines; of a line that is too long only the beginning is given."""

    limit: int = LINE_LIMIT
    _open: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take more of the stream and yield each line that ended, without its line end."""
        first, *rest = data.split(b"\n")
        self._take(first)
        for piece in rest:
            yield bytes(self._open).strip(b"\r")
            self._open.clear()
            self._take(piece)

    def _take(self, piece: bytes) -> None:
        self._open += piece[: self.limit - len(self._open)]


class Log:
    """The console log of a machine: a file that a machine cannot fill the disk with."""

    def __init__(self, path: Path, limit: int = LOG_LIMIT) -> None:
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._left = limit

    def write(self, data: bytes) -> None:
        """Append, up to the limit; what is beyond it is dropped, and the log says so."""
        if self._left > 0:
            self._file.write(data[: self._left])
            self._left -= len(data)
            if self._left <= 0:
                self._file.write(b"\n[the console log ends here: its limit is reached]\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
