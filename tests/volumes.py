"""Encrypted volumes in files: real ones by cryptsetup, a config volume where there is no device-mapper, and
headers changed as an attacker would, with checksums that hold.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from mosinit import init, luks
from mosinit.host import Host

Change = Callable[[dict[str, Any]], object]

UUID = "6f3c1c1e-5a1b-4c4f-8f61-1d2f0c5f7a10"
SECRET = bytes(range(1, 33))
RECOVERY = b"correct horse battery staple"
SIZE = 16 << 20
COPY = 65536  # one binary header with its JSON
BYTES = 2 * COPY + (4 << 20)

TOKENS = init.Tokens(
    seal_public=os.urandom(90),
    seal_private=os.urandom(160),
    record=os.urandom(1500),
    approvals={name * 32: init.PlatformApproval(2, os.urandom(256)) for name in ("ab", "00")},
    order_statement=b'{"epoch": 2}',
    order_signature=os.urandom(72),
    order_certificate=b"-----BEGIN CERTIFICATE-----\n" * 20,
)

# What cryptsetup 2.7.5 writes for `luksFormat --integrity hmac-sha256` beside the options of `luks.FORMAT`.
INTEGRITY = {"type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none"}


# What dm-integrity writes in front of the data of such a volume (linux/drivers/md/dm-integrity.c).
SUPERBLOCK = struct.pack("<8sBBHIQIBB", b"integrt\0", 4, 15, 32, 7, 16 << 10, 8, 3, 12).ljust(512, b"\0")


def plain(host: Host, path: Path, uuid: str = UUID, secret: bytes = SECRET) -> Path:
    """Make a plain volume of 16 MiB with cryptsetup."""
    path.touch()
    os.truncate(path, SIZE)
    luks.format_volume(host, path, "plain", uuid, secret)
    return path


def config(host: Host, path: Path, uuid: str = UUID, secret: bytes = SECRET) -> Path:
    """Make the header of a config volume, without tokens, as cryptsetup makes it and takes it for its own.

    cryptsetup itself formats a volume with integrity only where there is a device-mapper.
    """
    data, key = plain(host, path, uuid, secret).read_bytes()[:BYTES], os.urandom(96)
    document = document_of(data)
    slot, digest = document["keyslots"]["0"], document["digests"]["0"]
    salts = [base64.b64decode(item["salt"]) for item in (slot["kdf"], digest)]
    area = encrypt(split(key), hashlib.pbkdf2_hmac("sha256", secret, salts[0], 1000, 64))
    slot["key_size"], slot["area"]["size"] = 96, str(len(area))
    digest["digest"] = base64.b64encode(hashlib.pbkdf2_hmac("sha256", key, salts[1], 1000, 32)).decode()
    document["segments"]["0"]["integrity"] = INTEGRITY
    changed = bytearray(with_text(data, dump(document)))
    changed[2 * COPY : 2 * COPY + len(area)] = area
    with path.open("r+b") as file:
        file.write(changed)
        file.seek(init.LUKS_DATA)
        file.write(SUPERBLOCK)
    return path


def split(key: bytes) -> bytes:
    """Split a key into 4000 stripes (LUKS1 specification 2.4), padded to whole blocks."""
    stripes, state = [], bytes(len(key))
    for _ in range(3999):
        stripes.append(os.urandom(len(key)))
        state = diffuse(xor(state, stripes[-1]))
    whole = b"".join(stripes) + xor(state, key)
    return whole + bytes(-len(whole) % 4096)


def diffuse(data: bytes) -> bytes:
    parts = [data[start : start + 32] for start in range(0, len(data), 32)]
    return b"".join(hashlib.sha256(struct.pack(">I", i) + part).digest() for i, part in enumerate(parts))


def xor(one: bytes, two: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, two, strict=True))


def encrypt(data: bytes, key: bytes) -> bytes:
    """Encrypt by aes-xts-plain64 in sectors of 512 bytes."""
    done = []
    for number in range(len(data) // 512):
        tweak = struct.pack("<QQ", number, 0)
        encryptor = Cipher(algorithms.AES(key), modes.XTS(tweak)).encryptor()
        done.append(encryptor.update(data[number * 512 : (number + 1) * 512]))
    return b"".join(done)


# --- Headers changed, with checksums that hold ------------------------------------------------------------


def document_of(data: bytes) -> dict[str, Any]:
    """Return the JSON of the first copy."""
    return dict(json.loads(data[4096:COPY].rstrip(b"\0")))


def dump(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def seal(copy: bytes) -> bytes:
    """Set the checksum of one copy."""
    blank = copy[:448] + bytes(64) + copy[512:]
    return copy[:448] + hashlib.sha256(blank).digest() + bytes(32) + copy[512:]


def patched(data: bytes, at: int, new: bytes, *, copies: tuple[int, ...] = (0, COPY)) -> bytes:
    """Change bytes of the copies (`at` counts from the start of each) and seal them."""
    for start in copies:
        copy = data[start : start + COPY]
        data = data[:start] + seal(copy[:at] + new + copy[at + len(new) :]) + data[start + COPY :]
    return data


def with_text(data: bytes, text: bytes, *, copies: tuple[int, ...] = (0, COPY)) -> bytes:
    """Put another JSON area into the copies."""
    return patched(data, 4096, text.ljust(COPY - 4096, b"\0")[: COPY - 4096], copies=copies)


def changed(data: bytes, change: Change) -> bytes:
    """Change the JSON of both copies."""
    document = document_of(data)
    change(document)
    return with_text(data, dump(document))
