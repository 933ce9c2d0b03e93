"""Updates of PK, KEK, db and dbx as a firmware takes them, and what a variable then holds."""

from __future__ import annotations

import struct
import uuid
from pathlib import Path
from typing import NamedTuple

from mosinit import firmware, init
from mosinit.drift import Entry, parse_entries
from mosinit.eventlog import DB, DBX, KEK, PK
from mosinit.host import Failure, Host
from mosinit.keys import Keyset

NAMES = {"pk": PK, "kek": KEK, "db": DB, "dbx": DBX}
SIGNERS = {PK: ("PK",), KEK: ("PK",), DB: ("KEK", "PK"), DBX: ("KEK", "PK")}  # UEFI 2.10, 8.2.2 and 32.3
APPEND = 0x40  # UEFI 2.10, 8.2: EFI_VARIABLE_APPEND_WRITE
LIMIT = 128 << 10  # bytes of a file; no firmware keeps a variable of half of that
_STAMP = 16  # EFI_TIME
_CERTIFICATE = struct.Struct("<IHH16s")  # UEFI 2.10, 32.2.4: WIN_CERTIFICATE_UEFI_GUID


class Update(NamedTuple):
    """What a variable is given: its whole content, or what is appended to it."""

    content: bytes
    append: bool

    def applied(self, before: bytes) -> bytes:
        """Return what the variable holds afterwards."""
        return append(before, self.content) if self.append else self.content


def read_update(host: Host, keyset: Keyset, name: tuple[str, str], data: bytes, what: str) -> Update:
    """Return what a file does to a variable: bare signature lists are all that it then holds, and of a
    signed update (`.auth`) the signature says whether it is appended.

    Raises `Failure` unless it is well formed, and the keyset signed it: no firmware would take another.
    """
    content, signature = _take_apart(data)
    update = Update(content, False)
    if signature:
        update = Update(content, _is_append(host, keyset, name, data[:_STAMP], content, signature, what))
    try:
        parse_entries(content)
    except ValueError as error:
        raise Failure(
            f"{what} holds no signature lists ({error}): name EFI_SIGNATURE_LISTs, or a signed update"
        ) from error
    return update


def _take_apart(data: bytes) -> tuple[bytes, bytes]:
    """Return content and signature of an EFI_VARIABLE_AUTHENTICATION_2 (UEFI 2.10, 8.2.2), or of a bare list
    the list, and none.
    """
    if len(data) < _STAMP + _CERTIFICATE.size:
        return data, b""
    size, *kind = _CERTIFICATE.unpack_from(data, _STAMP)
    ours = [0x0200, 0x0EF1, uuid.UUID(firmware.PKCS7_GUID).bytes_le]
    if kind != ours or not _CERTIFICATE.size < size <= len(data) - _STAMP:
        return data, b""
    return data[_STAMP + size :], data[_STAMP + _CERTIFICATE.size : _STAMP + size]


def _is_append(
    host: Host,
    keyset: Keyset,
    name: tuple[str, str],
    stamp: bytes,
    content: bytes,
    signature: bytes,
    what: str,
) -> bool:
    """Say whether a signed update is appended: the attributes are part of what was signed."""
    vendor, variable = name
    for attributes in (firmware.NV_BS_RT_TIMED | APPEND, firmware.NV_BS_RT_TIMED):
        head = variable.encode("utf-16-le") + uuid.UUID(vendor).bytes_le + struct.pack("<I", attributes)
        for role in SIGNERS[name]:
            if _signed(host, head + stamp + content, signature, keyset.certificate_path(role)):
                return bool(attributes & APPEND)
    roles = " or ".join(SIGNERS[name])
    raise Failure(
        f"{what} is no update of {variable} that this keyset's {roles} signed, so its machines' firmware "
        "does not take it: sign its content anew, or name the content alone"
    )


def _signed(host: Host, message: bytes, signature: bytes, certificate: Path) -> bool:
    """Say whether the one with this certificate signed a message (PKCS#7, wrapped or bare)."""
    with host.scratch() as scratch:
        (scratch / "signature").write_bytes(wrapped(signature))
        (scratch / "message").write_bytes(message)
        try:
            host.run(
                ["openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", scratch / "signature",
                 "-content", scratch / "message", "-nointern", "-certfile", certificate, "-noverify",
                 "-out", "/dev/null"],
                timeout=60,
            )  # fmt: skip
        except Failure:
            return False
    return True


_SIGNED_DATA = bytes.fromhex("06092a864886f70d010702")  # RFC 5652, 5.1: id-signedData


def wrapped(signature: bytes) -> bytes:
    """Return a SignedData as PKCS#7 wraps it (RFC 5652, 3); one that is, as it is."""
    if _SIGNED_DATA in signature[:24]:
        return signature
    inner = _SIGNED_DATA + _der(0xA0, signature)
    return _der(0x30, inner)


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    count = (size.bit_length() + 7) // 8
    head = bytes([size]) if size < 0x80 else bytes([0x80 | count]) + size.to_bytes(count, "big")
    return bytes([tag]) + head + content


_LIST = struct.Struct("<16sIII")  # UEFI 2.10, 32.4.1, EFI_SIGNATURE_LIST


def append(before: bytes, more: bytes) -> bytes:
    """Return a signature database after lists were appended, as a firmware does it (UEFI 2.10, 8.2.2 and
    32.4.1): an entry that is there is skipped, and a list of which nothing is left.

    The entries of a list are compared with those that were there before, of the same type and size.
    """
    present = set(parse_entries(before))
    appended = b""
    while more:
        kind, size, header, each = _LIST.unpack_from(more)
        entries = [more[start : start + each] for start in range(_LIST.size, size, each)]
        kept = [entry for entry in entries if _entry(kind, entry) not in present]
        if kept:
            appended += _LIST.pack(kind, _LIST.size + each * len(kept), header, each) + b"".join(kept)
        more = more[size:]
    return before + appended


def _entry(kind: bytes, entry: bytes) -> Entry:
    return Entry(init.format_guid(kind), init.format_guid(entry), entry[16:])
