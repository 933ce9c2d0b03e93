"""Converted layers, kept in the user's cache: what was converted once is not converted again.

A record, named by a key of all that a conversion depends on, names a blob by its digest. Neither is
believed: a record carries its own digest, a blob is compared with its record while it is copied out, and
whatever does not fit is removed and made anew. Who may write the folder could write both; so it is the
user's own, of mode 0700, or it is not used. A cache that cannot be read or written costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mosinit import init
from mosinit.host import Host

LIMIT = 8 << 30  # bytes of all that is kept: the oldest go first
RESERVE = 4 << 30  # bytes of the disk that are never taken
RECORD_BYTES = 4096  # what any file takes at least
CHUNK = init.MIB


@dataclass(frozen=True)
class Kept:
    """A verity layer file: digest, size and root hash."""

    digest: str
    size: int
    root_hash: str


def encode(key: str, kept: Kept) -> bytes:
    """Return the record of a kept file, with a digest over all that it says."""
    fields = {"key": key, "digest": kept.digest, "size": kept.size, "root_hash": kept.root_hash}
    return json.dumps(fields | {"sum": _sum(fields)}).encode()


def parse(key: str, untrusted: bytes) -> Kept:
    """Return what a record says. Raises `ValueError` unless it is whole, and the one of this key."""
    fields = json.loads(untrusted)
    if not isinstance(fields, dict) or fields.pop("sum", None) != _sum(fields) or fields.get("key") != key:
        raise ValueError("the record is not the one that was written")
    kept = Kept(str(fields.get("digest")), int(fields.get("size", 0)), str(fields.get("root_hash")))
    if not init.DIGEST.fullmatch(kept.digest) or not init.HEX64.fullmatch(kept.root_hash):
        raise ValueError("the record names no layer")
    return kept


def _sum(fields: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """A folder of kept files. `maker` names the programs and the code that make them."""

    folder: Path
    maker: str
    limit: int = LIMIT
    reserve: int = RESERVE

    def key(self, source: object) -> str:
        """Name what is made of `source`, plain data that says all that it is made of."""
        return hashlib.sha256(json.dumps([self.maker, source]).encode()).hexdigest()

    def fetch(self, key: str, target: Path) -> Kept | None:
        """Copy what was kept under a key to a new file; None if there is nothing, or nothing sound."""
        record = self.folder / f"{key}.json"
        try:
            kept = parse(key, _read_record(record))
            blob = self._blob(kept)
            with _opened(blob) as source, target.open("xb") as copy:
                if os.fstat(source.fileno()).st_size != kept.size:
                    raise ValueError("the blob is of another size")
                # The copy is what counts: whatever happens to the cache now comes too late.
                if _copy(source, copy) != kept.digest:
                    raise ValueError("the blob is another")
            os.utime(blob)
            os.utime(record)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError):
            target.unlink(missing_ok=True)
            self._forget(record)
            return None
        return kept

    def keep(self, host: Host, key: str, path: Path, kept: Kept) -> None:
        """Keep a copy of a file under a key, if there is room."""
        try:
            if not self._make_room(kept.size + RECORD_BYTES):
                return
            with path.open("rb") as source, self._replacing(self._blob(kept)) as fresh:
                if _copy(source, fresh) != kept.digest:
                    return
            with self._replacing(self.folder / f"{key}.json") as fresh:
                fresh.write(encode(key, kept))
        except OSError as error:
            host.say(f"{self.folder} keeps no layer: {error.strerror or error}")

    def _blob(self, kept: Kept) -> Path:
        return self.folder / f"{kept.digest.removeprefix('sha256:')}.layer"

    def _forget(self, record: Path) -> None:
        """Remove a record that is of no use, and the blob that it may name."""
        with contextlib.suppress(OSError, ValueError):
            self._blob(parse(record.stem, _read_record(record))).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            record.unlink(missing_ok=True)

    def _make_room(self, size: int) -> bool:
        """Remove the oldest files until one more of a size fits; say whether it does."""
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                entry = path.lstat()
                found.append((entry.st_mtime, max(entry.st_size, RECORD_BYTES), path))
        total = sum(item[1] for item in found)
        for _, taken, path in sorted(found):
            if total + size <= self.limit or size > self.limit:
                break
            path.unlink(missing_ok=True)
            total -= taken
        return total + size <= self.limit and shutil.disk_usage(self.folder).free - size >= self.reserve

    @contextlib.contextmanager
    def _replacing(self, target: Path) -> Iterator[IO[bytes]]:
        """Yield a file that becomes `target` if all goes well."""
        # Not synced: after a power cut its digest tells what it is.
        handle, name = tempfile.mkstemp(prefix=".new-", dir=self.folder)
        try:
            with open(handle, "wb") as fresh:
                yield fresh
            os.rename(name, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def open_folder(host: Host, folder: Path) -> Path | None:
    """Return a folder that this user alone can use, made if need be; or None, and say why."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        host.say(f"{folder} keeps no layers: {error.strerror}")
        return None
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not mine or found.st_mode & 0o077:
        host.say(f"{folder} is not used, since others may write it: remove it, or chmod 700 {folder}")
        return None
    return folder


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a plain file, and nothing that could wait or lead elsewhere."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is no file")
        yield file


def _read_record(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read(RECORD_BYTES)


def _copy(source: IO[bytes], target: IO[bytes]) -> str:
    """Copy to the end and return the digest of what was copied."""
    hasher = hashlib.sha256()
    while chunk := source.read(CHUNK):
        hasher.update(chunk)
        target.write(chunk)
    return f"sha256:{hasher.hexdigest()}"
