"""Headers given other keys: whatever is written last when the power fails, one of both opens the volume."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mosinit import init, luks, rekey
from mosinit.host import Failure, Host
from tests import volumes
from tests.recorder import Watched

Need = Callable[..., None]
KEYS = rekey.Keys(b"n" * 32, b"another recovery key")
TOKENS = volumes.TOKENS._replace(record=b"the record of another provisioning", seal_private=b"another")
SECTOR = 4096


class Recorder(Host):
    """A host that remembers what it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int, bytes]] = []

    def write_at(self, fd: int, offset: int, data: bytes) -> None:
        self.written.append((offset, data))
        super().write_at(fd, offset, data)


class Renewed(NamedTuple):
    """A volume before and after, and what was written."""

    kind: str
    before: bytes
    after: bytes
    old: init.LuksHeader
    new: init.LuksHeader
    written: list[tuple[int, bytes]]
    path: Path


@pytest.fixture(scope="module", params=["plain", "config"])
def renewed(request: pytest.FixtureRequest, need: Need, tmp_path_factory: pytest.TempPathFactory) -> Renewed:
    need("cryptsetup")
    host, kind = Recorder(), str(request.param)
    path = tmp_path_factory.mktemp("volume") / "volume"
    (volumes.plain if kind == "plain" else volumes.config)(host, path)
    luks.add_recovery(host, path, volumes.SECRET, volumes.RECOVERY)
    tokens = TOKENS if kind == "config" else None
    if tokens:
        luks.import_tokens(host, path, volumes.TOKENS)
    before = path.read_bytes()
    found = rekey.find_header(host, path, kind)
    assert (found.whole, found.fault) == (True, None)
    assert found.header
    key = luks.read_volume_key(found.header, luks.RECOVERY_SLOT, volumes.RECOVERY)
    assert key
    assert luks.read_volume_key(found.header, luks.SECRET_SLOT, volumes.RECOVERY) is None
    assert luks.read_volume_key(found.header, luks.SECRET_SLOT, volumes.SECRET) == key
    new = rekey.renewed(host, found.header, kind, key, KEYS, tokens)
    assert path.read_bytes() == before
    rekey.write(host, path, kind, found.header, new)
    return Renewed(kind, before, path.read_bytes(), found.header, new, host.written, path)


def test_the_new_keys_open_it_and_the_old_ones_do_not(renewed: Renewed) -> None:
    header = luks.read_header(Host(), renewed.path, renewed.kind)
    assert (header.text, header.slots, header.note) == (renewed.new.text, (0, 1), "")
    assert header.tokens == (TOKENS if renewed.kind == "config" else None)
    for slot, new, old in ((0, KEYS.secret, volumes.SECRET), (1, KEYS.recovery, volumes.RECOVERY)):
        assert luks.read_volume_key(header, slot, new)
        assert luks.read_volume_key(header, slot, old) is None
    # Other people's program has the last word.
    words: list[str | Path] = ["cryptsetup", "open", "--test-passphrase", "--key-file", "-", renewed.path]
    Host().run(words, stdin=KEYS.recovery)
    with pytest.raises(Failure):
        Host().run(words, stdin=volumes.RECOVERY)


def test_nothing_of_the_old_slots_is_left(renewed: Renewed) -> None:
    for begin, end in rekey.regions(renewed.old):
        for place in range(begin, end, SECTOR):
            assert renewed.before[place : place + SECTOR] not in renewed.after
    # A header that somebody kept finds nothing to open.
    kept = renewed.before[: 2 * init.LUKS_COPY] + renewed.after[2 * init.LUKS_COPY : init.LUKS_BYTES]
    header = init.parse_luks_header(kept, renewed.kind)
    assert luks.read_volume_key(header, 0, volumes.SECRET) is None


def moments(renewed: Renewed) -> Iterator[bytes]:
    """Yield the volume as it is at each moment, writes torn at each block of headers."""
    image = bytearray(renewed.before)
    for offset, data in renewed.written:
        step = SECTOR if offset < 2 * init.LUKS_COPY else len(data)
        for at in range(0, len(data), step):
            image[offset + at : offset + at + step] = data[at : at + step]
            yield bytes(image)


def test_at_each_moment_one_of_both_headers_counts_with_its_slots(renewed: Renewed) -> None:
    seen, count = [], 0
    for image in moments(renewed):
        # By the boot's own reading, which takes no other.
        header = init.parse_luks_header(image[: init.LUKS_BYTES], renewed.kind)
        side = renewed.old if header.seqid == renewed.old.seqid else renewed.new
        assert (header.uuid, header.slots, header.tokens) == (side.uuid, side.slots, side.tokens)
        whole = renewed.before if side is renewed.old else renewed.after
        for begin, end in rekey.regions(side):
            assert image[begin:end] == whole[begin:end]
        seen.append(side is renewed.new)
        count += 1
    assert seen == sorted(seen)
    assert (seen[0], seen[-1], count > 30) == (False, True, True)
    assert image == renewed.after


def test_what_is_there_meanwhile_is_seen(renewed: Renewed, tmp_path: Path) -> None:
    path = tmp_path / "volume"
    path.write_bytes(renewed.after)
    with pytest.raises(Failure, match="changed by another program"):
        rekey.write(Host(), path, renewed.kind, renewed.old, renewed.new)
    assert path.read_bytes() == renewed.after


@pytest.mark.parametrize("spoiled", [0, init.LUKS_COPY])
def test_one_damaged_copy_is_made_again(renewed: Renewed, tmp_path: Path, spoiled: int) -> None:
    path, host = tmp_path / "volume", Host()
    path.write_bytes(renewed.after[:spoiled] + bytes(SECTOR) + renewed.after[spoiled + SECTOR :])
    found = rekey.find_header(host, path, renewed.kind)
    assert (found.fault, found.note, found.whole) == (None, "one copy of the header is damaged", False)
    rekey.heal(host, path, renewed.kind, found)
    assert path.read_bytes() == renewed.after


def test_copies_that_disagree(renewed: Renewed, tmp_path: Path) -> None:
    """One of them somebody changed: the one that a boot would take alone is the one that counts."""
    path, host = tmp_path / "volume", Host()

    def raise_cost(document: dict[str, object]) -> None:
        document["keyslots"]["0"]["kdf"]["iterations"] = 10**9  # type: ignore[index]

    text = volumes.document_of(renewed.after)
    raise_cost(text)
    for copy in (0, volumes.COPY):
        path.write_bytes(volumes.with_text(renewed.after, volumes.dump(text), copies=(copy,)))
        with pytest.raises(init.Refused, match="LUKS-HEADER"):
            luks.read_header(host, path, renewed.kind)
        found = rekey.find_header(host, path, renewed.kind)
        assert found.fault and found.fault.check == "LUKS-HEADER"
        assert found.header and found.header.text == renewed.new.text
        rekey.heal(host, path, renewed.kind, found)
        assert luks.read_header(host, path, renewed.kind).text == renewed.new.text


def test_of_two_that_a_boot_would_take_the_newer_counts(renewed: Renewed, tmp_path: Path) -> None:
    path, host, half = tmp_path / "volume", Host(), init.LUKS_COPY
    newer = renewed.new._replace(seqid=renewed.new.seqid + 5)
    data = init.detached_header(newer)
    path.write_bytes(renewed.after[:half] + data[half : 2 * half] + renewed.after[2 * half :])
    found = rekey.find_header(host, path, renewed.kind)
    assert found.fault and found.header and found.header.seqid == newer.seqid
    rekey.heal(host, path, renewed.kind, found)
    assert luks.read_header(host, path, renewed.kind).seqid == newer.seqid


def test_nothing_that_could_be_used(renewed: Renewed, tmp_path: Path) -> None:
    path = tmp_path / "volume"
    path.write_bytes(bytes(2 * init.LUKS_COPY) + renewed.after[2 * init.LUKS_COPY :])
    found = rekey.find_header(Host(), path, renewed.kind)
    assert (found.header, found.fault and found.fault.check) == (None, "LUKS-HEADER")
    path.write_bytes(b"short")
    assert rekey.find_header(Host(), path, renewed.kind).header is None


def test_tokens_that_no_boot_takes_may_be_others(renewed: Renewed, tmp_path: Path) -> None:
    if renewed.kind == "plain":
        return
    path = tmp_path / "volume"

    def remove_record(document: dict[str, object]) -> None:
        del document["tokens"]["1"]  # type: ignore[attr-defined]

    path.write_bytes(volumes.changed(renewed.after, remove_record))
    assert rekey.find_header(Host(), path, "config").header is None
    found = rekey.find_header(Host(), path, "config", volumes.TOKENS)
    assert found.fault and found.fault.check == "LUKS-TOKEN"
    assert found.header and found.header.tokens == volumes.TOKENS
    assert luks.read_volume_key(found.header, 0, KEYS.secret)


def test_a_volume_with_unusual_integrity(renewed: Renewed, tmp_path: Path) -> None:
    path = tmp_path / "volume"
    data = bytearray(renewed.after)
    data[init.LUKS_DATA] ^= 1
    path.write_bytes(data)
    found = rekey.find_header(Host(), path, renewed.kind)
    assert (found.header is None) == (renewed.kind == "config")


def test_no_secret_is_in_words(renewed: Renewed, tmp_path: Path, need: Need) -> None:
    need("cryptsetup")
    path = tmp_path / "volume"
    shutil.copy(renewed.path, path)
    key = luks.read_volume_key(renewed.new, 0, KEYS.secret)
    assert key
    host = Watched()
    luks.add_key(host, path, 5, key, b"quick secret")
    header = luks.read_header(Host(), path, renewed.kind)
    assert luks.read_volume_key(header, 5, b"quick secret") == key
    assert host.ran
    assert not any("quick secret" in word or key.hex() in word for words in host.ran for word in words)
    assert os.listdir(tmp_path) == ["volume"]


def test_a_header_that_nests_without_end() -> None:
    head = b"LUKS\xba\xbe".ljust(init.BLOCK, b"\0")
    for text in (b"[" * 50_000, b'{"tokens":' * 5_000):
        untrusted = (head + text).ljust(init.LUKS_BYTES, b"\0")
        found = rekey.choose(untrusted, "config", TOKENS)
        assert found.header is None
        assert found.fault is not None
        assert found.fault.check == "LUKS-HEADER"
