"""Headers of encrypted volumes, repaired and given other keys, without a moment at which none would do.

A new header is made in memory by cryptsetup, beside the slots of the old one; it is what the bring-up takes
before any of it is written. On the disk first its new key slots are laid where the old header has none, then
one copy of the header, then the other: as `init.read_luks_header` reads a header, a power cut leaves the old
keys or the new ones. What no slot uses is overwritten in the end, so that old slots are gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosinit import init, luks
from mosinit.host import Failure, Host

COPIES = (0, init.LUKS_COPY)
WORK_BYTES = 16 * init.MIB  # of the file in which cryptsetup works: more than what is before the data
Regions = set[tuple[int, int]]


@dataclass(frozen=True)
class Found:
    """The header of a volume: what of it can be used, and what is wrong with it, if anything."""

    header: init.LuksHeader | None
    fault: init.Refused | None = None  # a boot takes no such header
    note: str = ""  # a boot takes it, and still it is damaged

    @property
    def whole(self) -> bool:
        """Say whether both copies are as they should be."""
        return self.header is not None and self.fault is None and not self.note


@dataclass(frozen=True)
class Keys:
    """What a volume's slots are to take: key slot 0 of the machine's, and the recovery key."""

    secret: bytes
    recovery: bytes


# --- Looking ---------------------------------------------------------------------------------------------


def find_header(host: Host, path: Path, kind: str, tokens: init.Tokens | None = None) -> Found:
    """Read a volume's header as a boot does; of one that no boot takes, the copy that it would take alone.

    With `tokens`, they may be in the place of the ones that are there.
    """
    with init.held(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        try:
            untrusted = host.read_at(fd, 0, init.LUKS_BYTES)
            if kind == "config":
                init.check_integrity(host.read_at(fd, init.LUKS_DATA, 512))
        except OSError as error:
            return Found(
                None, init.Refused("LUKS-HEADER", expected="a header that can be read", seen=str(error))
            )
        except init.Refused as refused:
            return Found(None, refused)
    return choose(untrusted, kind, tokens)


def choose(untrusted: bytes, kind: str, tokens: init.Tokens | None = None) -> Found:
    """Return the header among these bytes that counts."""
    try:
        header = init.parse_luks_header(untrusted, kind)
        return Found(header, note=header.note)
    except init.Refused as refused:
        fault = refused
    alone = [_without(untrusted, offset) for offset in reversed(COPIES)]
    if tokens and kind == "config":
        for each in tuple(alone):
            with contextlib.suppress(init.Refused, ValueError):
                alone.append(_with_tokens(each, tokens))
    headers: list[init.LuksHeader] = []
    for each in alone:
        with contextlib.suppress(init.Refused, ValueError):
            headers.append(init.parse_luks_header(each, kind))
    # Either is what a boot would take, were it the only one: the newer, or as cryptsetup has it, the first.
    return Found(max(headers, key=lambda header: header.seqid) if headers else None, fault)


def _without(untrusted: bytes, offset: int) -> bytes:
    """Blank one copy of a header."""
    return untrusted[:offset] + bytes(init.LUKS_COPY) + untrusted[offset + init.LUKS_COPY :]


def _with_tokens(untrusted: bytes, tokens: init.Tokens) -> bytes:
    """Give the one copy of a header that is left other tokens; ValueError if there is none."""
    offset = next((at for at in COPIES if any(untrusted[at : at + init.BLOCK])), 0)
    raw = untrusted[offset : offset + init.LUKS_COPY]
    # Refuses what nests too deeply, as a boot does.
    document = init.parse_json(raw[init.BLOCK :].rstrip(b"\0"), "LUKS-HEADER")
    if not isinstance(document, dict):
        raise ValueError("no header")
    document["tokens"] = _tokens(tokens)
    area = _dump(document).ljust(init.LUKS_COPY - init.BLOCK, b"\0")
    changed = _as_copy(raw[: init.BLOCK] + area, offset)
    return untrusted[:offset] + changed + untrusted[offset + init.LUKS_COPY :]


def _as_copy(raw: bytes, offset: int) -> bytes:
    """Return a copy of a header as the one at `offset`, with its checksum (LUKS2 specification, 2.1)."""
    magic = b"SKUL\xba\xbe" if offset else b"LUKS\xba\xbe"
    head = magic + raw[6:256] + offset.to_bytes(8, "big") + raw[264:448]
    checksum = hashlib.sha256(head + bytes(64) + raw[512:]).digest()
    return head + checksum + bytes(32) + raw[512:]


def _tokens(tokens: init.Tokens) -> dict[str, object]:
    return {str(number): json.loads(text) for number, text in luks.encode_tokens(tokens).items()}


def _dump(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


# --- Making ----------------------------------------------------------------------------------------------


def renewed(
    host: Host, header: init.LuksHeader, kind: str, volume_key: bytes, keys: Keys,
    tokens: init.Tokens | None,
) -> init.LuksHeader:  # fmt: skip
    """Return the header that takes these keys, and no others, for the same volume. Nothing is written.

    Raises `Refused` if a boot would not take it.
    """
    with host.scratch() as folder:
        work = folder / "header"
        work.write_bytes(init.detached_header(header))
        os.truncate(work, WORK_BYTES)
        used = {int(name) for name in json.loads(header.text)["keyslots"]}
        free = (number for number in range(32) if number not in used)
        secret, recovery = next(free), next(free)
        luks.add_key(host, work, secret, volume_key, keys.secret)
        luks.add_key(host, work, recovery, volume_key, keys.recovery)
        made = work.read_bytes()[: init.LUKS_BYTES]
    raw = json.loads(made[init.BLOCK : init.LUKS_COPY].rstrip(b"\0"))
    # Each is in a new place: the old ones are whole until the new header counts.
    slots = {str(luks.SECRET_SLOT): secret, str(luks.RECOVERY_SLOT): recovery}
    raw["keyslots"] = {name: raw["keyslots"][str(number)] for name, number in slots.items()}
    raw["digests"]["0"]["keyslots"] = list(slots)
    raw["tokens"] = _tokens(tokens) if tokens else {}
    fresh = header._replace(
        seqid=header.seqid + 1, text=_dump(raw), slots=(0, 1), tokens=tokens, note="",
        key_slots=made[2 * init.LUKS_COPY :],
    )  # fmt: skip
    return init.parse_luks_header(init.detached_header(fresh), kind)


def regions(header: init.LuksHeader) -> Regions:
    """Return where the key slots of a header lie: begin and end."""
    slots: dict[str, Any] = json.loads(header.text)["keyslots"]
    areas = [slot["area"] for slot in slots.values()]
    return {(int(area["offset"]), int(area["offset"]) + int(area["size"])) for area in areas}


# --- Writing ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[int]:
    """Open a volume that nobody else uses."""
    with init.held(os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)) as fd:
        yield fd


def heal(host: Host, path: Path, kind: str, found: Found) -> None:
    """Make the copies of a header agree: the one that does not count becomes like the other.

    One whose tokens no boot takes is left: it is written anew as a whole.
    """
    assert found.header  # only such can be healed
    with _writing(path) as fd:
        untrusted = os.pread(fd, init.LUKS_BYTES, 0)
        good = next((at for at in COPIES if _reads_as(untrusted, kind, at, found.header)), None)
        if good is None:
            return
        other = init.LUKS_COPY - good
        # To the byte: two texts that say the same would be two headers.
        host.write_at(fd, other, _as_copy(untrusted[good : good + init.LUKS_COPY], other))


def _reads_as(untrusted: bytes, kind: str, offset: int, header: init.LuksHeader) -> bool:
    """Say whether one copy alone is that header."""
    with contextlib.suppress(init.Refused):
        alone = init.parse_luks_header(_without(untrusted, init.LUKS_COPY - offset), kind)
        return (alone.seqid, alone.text) == (header.seqid, header.text)
    return False


def write(host: Host, path: Path, kind: str, old: init.LuksHeader, new: init.LuksHeader) -> None:
    """Let a new header take the place of the one that counts, in one step; nothing of the old is left."""
    data, kept = init.detached_header(new), regions(old)
    with _writing(path) as fd:
        seen = choose(host.read_at(fd, 0, init.LUKS_BYTES), kind, old.tokens).header
        if seen is None or (seen.seqid, seen.text) != (old.seqid, old.text):
            raise Failure(f"{path} was changed by another program meanwhile: run this again")
        for begin, end in sorted(regions(new)):
            assert not any(begin < last and first < end for first, last in kept), "slots lie apart"
            host.write_at(fd, begin, data[begin:end])
        for offset in COPIES:
            host.write_at(fd, offset, data[offset : offset + init.LUKS_COPY])
    wipe_unused(host, path, new)


def wipe_unused(host: Host, path: Path, header: init.LuksHeader) -> None:
    """Overwrite where no slot of a header lies: what was there could still open the volume."""
    place = 2 * init.LUKS_COPY
    with _writing(path) as fd:
        for begin, end in [*sorted(regions(header)), (init.LUKS_BYTES, init.LUKS_BYTES)]:
            if begin > place:
                host.write_at(fd, place, host.random(begin - place))
            place = end
