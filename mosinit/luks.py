"""Encrypted volumes as the bring-up accepts them: made by cryptsetup, then read by the core's own parser.

Key slot 0 takes the machine's secret (32 bytes that nobody types), slot 1 the recovery key. The tokens of
the config volume are those of `init.Tokens`; `import_tokens` writes them, also over older ones.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mosinit import init
from mosinit.host import Host

SECRET_SLOT, RECOVERY_SLOT = 0, 1
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
READ_ONLY = 1  # libcryptsetup.h, CRYPT_ACTIVATE_READONLY
SECTOR = 512  # the unit of cryptsetup's --offset

# Everything that `init.parse_luks_header` pins is asked for, whatever this cryptsetup's defaults are.
FORMAT = (
    "--batch-mode", "--type", "luks2", "--luks2-metadata-size", f"{init.LUKS_COPY >> 10}k",
    "--luks2-keyslots-size", f"{init.LUKS_SLOT_BYTES >> 10}k", "--offset", str(init.LUKS_DATA // SECTOR),
    "--sector-size", str(init.BLOCK), "--cipher", init.LUKS_CIPHER, "--key-size", "512",
)  # fmt: skip
# No --keyslot-cipher: cryptsetup refuses it beside integrity, and takes the one that is pinned.
SLOT = ("--hash", "sha256")
# All that opens a volume is made of 32 random bytes, the recovery key too: stretching would only take time.
QUICK = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
INTEGRITY: Mapping[str, tuple[str, ...]] = {"config": ("--integrity", "hmac-sha256"), "plain": ()}


def format_command(path: Path, kind: str, uuid: str) -> list[str]:
    """Return the command that makes a volume, its secret on standard input."""
    words = ("--uuid", uuid, "--key-slot", str(SECRET_SLOT), "--key-file", "-", str(path))
    return ["cryptsetup", "luksFormat", *FORMAT, *INTEGRITY[kind], *SLOT, *QUICK, *words]


def format_volume(host: Host, path: Path, kind: str, uuid: str, secret: bytes | bytearray) -> None:
    """Make a `config` or `plain` volume on a device or file: whatever was there is gone.

    A config volume needs the kernel's device-mapper and gets no tokens yet: see `import_tokens`.
    """
    host.run(format_command(path, kind, uuid), stdin=bytes(secret))


def add_recovery(host: Host, path: Path, secret: bytes | bytearray, recovery: bytes | bytearray) -> None:
    """Give a volume the key slot of the recovery key."""
    with _lent(recovery) as file:
        words = ("--batch-mode", "--key-slot", str(RECOVERY_SLOT), "--key-file", "-", *SLOT, *QUICK)
        host.run(["cryptsetup", "luksAddKey", *words, path, file], stdin=bytes(secret))


def add_key(host: Host, path: Path, slot: int, volume_key: bytes, secret: bytes) -> None:
    """Give a volume whose own key is known one more key slot."""
    with _lent(volume_key) as volume, _lent(secret) as file:
        words = ("--batch-mode", "--key-slot", str(slot), "--volume-key-file", volume, *SLOT, *QUICK)
        host.run(["cryptsetup", "luksAddKey", *words, path, file])


def _library() -> ctypes.CDLL:
    """Return libcryptsetup, which tells nothing but by what it returns."""
    library = ctypes.CDLL("libcryptsetup.so.12")
    library.crypt_token_external_disable()
    library.crypt_set_log_callback(None, _SILENT, None)
    return library


def read_volume_key(header: init.LuksHeader, slot: int, secret: bytes) -> bytes | None:
    """Return the key that a volume's data is encrypted by, None if the slot does not take this secret."""
    library = _library()
    file, context = os.memfd_create("luks"), ctypes.c_void_p()
    key, size = ctypes.create_string_buffer(128), ctypes.c_size_t(128)
    try:
        os.write(file, init.detached_header(header))
        code = library.crypt_init(ctypes.byref(context), f"/proc/self/fd/{file}".encode())
        code = code or library.crypt_load(context, b"LUKS2", None)
        if code == 0:
            words = (slot, key, ctypes.byref(size), secret, ctypes.c_size_t(len(secret)))
            code = library.crypt_volume_key_get(context, *words)
        return key.raw[: size.value] if code >= 0 else None
    finally:
        library.crypt_free(context)
        os.close(file)
        ctypes.memset(key, 0, 128)


def activate(
    header: init.LuksHeader, device: Path, volume_key: bytes, name: str, *, read_only: bool
) -> None:
    """Open a volume by its own key and a header that was checked. Raises OSError."""
    library = _library()
    os.putenv("DM_DISABLE_UDEV", "1")  # as the bring-up does it; who mounts waits for nobody
    file, context = os.memfd_create("luks"), ctypes.c_void_p()
    try:
        os.write(file, init.detached_header(header))
        paths = (f"/proc/self/fd/{file}".encode(), os.fsencode(device))
        code = library.crypt_init_data_device(ctypes.byref(context), *paths)
        code = code or library.crypt_load(context, b"LUKS2", None)
        if code == 0:
            words = (name.encode(), volume_key, ctypes.c_size_t(len(volume_key)), READ_ONLY * read_only)
            code = library.crypt_activate_by_volume_key(context, *words)
    finally:
        library.crypt_free(context)
        os.close(file)
    if code < 0:
        raise OSError(-code, f"cannot open {device}: {os.strerror(-code)}")


@contextlib.contextmanager
def _lent(secret: bytes | bytearray) -> Iterator[str]:
    """Yield the path of a file that lies in memory alone."""
    fd = os.memfd_create("secret")
    try:
        os.write(fd, secret)
        yield f"/proc/{os.getpid()}/fd/{fd}"
    finally:
        os.close(fd)


def encode_tokens(tokens: init.Tokens) -> dict[int, bytes]:
    """Encode the tokens of config's header as JSON, by number; `init.parse_luks_header` reads them."""
    approvals = [
        {"pcr7": pcr7, "epoch": approval.epoch, "signature": _base64(approval.signature)}
        for pcr7, approval in tokens.approvals.items()
    ]
    documents: tuple[dict[str, object], ...] = (
        {
            "type": "mosinit-seal", "keyslots": [str(SECRET_SLOT)],
            "public": _base64(tokens.seal_public), "private": _base64(tokens.seal_private),
        },
        {"type": "mosinit-record", "keyslots": [], "certificate": _base64(tokens.record)},
        {"type": "mosinit-approvals", "keyslots": [], "approvals": approvals},
        {
            "type": "mosinit-order", "keyslots": [], "statement": _base64(tokens.order_statement),
            "signature": _base64(tokens.order_signature),
            "certificate": _base64(tokens.order_certificate),
        },
    )  # fmt: skip
    return {number: json.dumps(document).encode() for number, document in enumerate(documents)}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def import_tokens(host: Host, path: Path, tokens: init.Tokens) -> init.LuksHeader:
    """Write the tokens of a config volume, those that changed, and return its header as a boot will see it.

    Each token is one update of the header: a power cut leaves some old and some new ones, all of them whole.
    """
    wanted, present = encode_tokens(tokens), _tokens_of(host, path)
    for number, document in wanted.items():
        if present.get(str(number)) != json.loads(document):
            replace = ["--token-replace"] if str(number) in present else []
            words = [*replace, "--token-id", str(number), "--json-file", "-", str(path)]
            host.run(["cryptsetup", "token", "import", *words], stdin=document)
    return read_header(host, path, "config")


def _tokens_of(host: Host, path: Path) -> dict[str, object]:
    dump = json.loads(host.run(["cryptsetup", "luksDump", "--dump-json-metadata", path]))
    return dict(dump["tokens"])


def read_header(host: Host, path: Path, kind: str) -> init.LuksHeader:
    """Read a volume's header as the bring-up does. Raises `Refused` with the boot's ids."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return init.read_luks_header(host, fd, kind)
    finally:
        host.close(fd)
