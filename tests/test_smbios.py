"""SMBIOS strings, which whoever has the firmware writes."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as some

from mosinit import smbios

SYSTEM = b"\x01\x1b\x00\x01" + b"\x01\x02" + bytes(21) + b"QEMU\0Standard PC\0\0"
BARE = b"\x20\x0b\x00\x20" + bytes(7) + b"\0\0"
END = b"\x7f\x04\x00\x7f\0\0"
NAME = "mosinit.answers"
PLAIN, BINARY = (f"io.systemd.{kind}:{NAME}=".encode() for kind in ("credential", "credential.binary"))


def oem(strings: Sequence[bytes], count: int | None = None) -> bytes:
    """Encode strings of type 11 as QEMU does."""
    head = bytes([11, 5, 0, 14, len(strings) if count is None else count])
    return head + (b"".join(text + b"\0" for text in strings) or b"\0") + b"\0"


def test_strings_of_every_structure() -> None:
    table = (
        SYSTEM + oem([b"one", b"two"]) + BARE + oem([b"three"]) + oem([]) + END + oem([b"behind the end"])
    )
    assert smbios.oem_strings(table) == [b"one", b"two", b"three"]
    assert smbios.oem_strings(b"") == []


@given(some.lists(some.binary(min_size=1, max_size=40).filter(lambda text: b"\0" not in text), max_size=9))
def test_all_strings_come_back(strings: list[bytes]) -> None:
    assert smbios.oem_strings(SYSTEM + oem(strings) + END) == strings


@pytest.mark.parametrize(
    "table",
    [
        oem([b"one"], 2) + END, oem([b"one", b"two"], 1) + END, oem([], 1) + END, oem([b"one"])[:-1],
        b"\x0b", b"\x0b\x05\0", b"\x0b\x00\0\0\0\0", b"\x0b\x03\0\0\0\0", b"\x0b\xff\0\0" + bytes(20),
        b"\x0b\x06\0\0\1\0a\0\0", SYSTEM[:-1], SYSTEM + b"\x0b",
    ],
)  # fmt: skip
def test_tables_that_are_not_whole(table: bytes) -> None:
    with pytest.raises(ValueError, match="not whole|not as many"):
        smbios.oem_strings(table)


@given(some.binary(max_size=400))
def test_any_bytes_are_strings_or_an_error(data: bytes) -> None:
    for table in (data, SYSTEM + data, oem([b"a"]) + data):
        with contextlib.suppress(ValueError):
            assert all(b"\0" not in text for text in smbios.oem_strings(table))


def test_one_credential_of_that_name() -> None:
    others = [
        b"io.systemd.credential:passwd.hashed-password.root=x",
        b"io.systemd.credential:mosinit.answer=x",
    ]
    assert smbios.credential(others, NAME) is None
    assert smbios.credential([*others, PLAIN + b"version: 1\nx=y"], NAME) == b"version: 1\nx=y"
    binary = BINARY + base64.b64encode(b"version: 1\0\n")
    assert smbios.credential([binary, *others], NAME) == b"version: 1\0\n"
    assert smbios.credential([PLAIN + b"a", BINARY + b"YQ=="], NAME) == b"a"


@pytest.mark.parametrize(
    "strings", [[PLAIN + b"a", PLAIN + b"b"], [BINARY + b"YQ=="] + [PLAIN], [BINARY + b"not base64"]]
)
def test_credentials_that_contradict_each_other(strings: list[bytes]) -> None:
    with pytest.raises(ValueError, match="each time another|no base64"):
        smbios.credential(strings, NAME)
