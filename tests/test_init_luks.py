"""Headers of LUKS2 volumes: real ones are taken, and nothing that differs from them in anything."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosinit import init, luks
from mosinit.host import Host
from tests import volumes
from tests.volumes import BYTES, COPY, SECRET, Change, changed, dump, patched, with_text

Need = Callable[..., None]

# Headers are made once: each test changes bytes of its own.
_MADE: dict[str, bytes] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers")


def made(folder: Path, kind: str) -> bytes:
    if kind not in _MADE:
        make = {"plain": volumes.plain, "config": volumes.config}[kind]
        path = make(Host(), folder / kind)
        luks.add_recovery(Host(), path, SECRET, volumes.RECOVERY)
        if kind == "config":
            luks.import_tokens(Host(), path, volumes.TOKENS)
        _MADE[kind] = path.read_bytes()[:BYTES]
    return _MADE[kind]


@pytest.fixture
def plain(need: Need, folder: Path) -> bytes:
    need("cryptsetup")
    return made(folder, "plain")


@pytest.fixture
def config(need: Need, folder: Path) -> bytes:
    need("cryptsetup")
    return made(folder, "config")


def refused(untrusted: bytes, kind: str = "config") -> tuple[str, str]:
    with pytest.raises(init.Refused) as error:
        init.parse_luks_header(untrusted, kind)
    return error.value.check, error.value.seen


# --- What cryptsetup makes -------------------------------------------------------------------------------


def test_a_plain_volume(plain: bytes) -> None:
    header = init.parse_luks_header(plain, "plain")
    assert (header.uuid, header.slots, header.tokens, header.note) == (volumes.UUID, (0, 1), None, "")
    assert json.loads(header.text) == volumes.document_of(plain)
    assert header.key_slots == plain[2 * COPY :]


def test_a_config_volume(config: bytes) -> None:
    header = init.parse_luks_header(config, "config")
    assert (header.uuid, header.slots, header.note) == (volumes.UUID, (0, 1), "")
    assert header.tokens == volumes.TOKENS


def test_one_kind_is_not_the_other(plain: bytes, config: bytes) -> None:
    assert refused(plain, "config")[0] in ("LUKS-HEADER", "LUKS-TOKEN")
    assert refused(config, "plain")[0] in ("LUKS-HEADER", "LUKS-TOKEN")
    without = changed(config, lambda d: d.update(tokens={}))
    assert refused(without, "plain") == ("LUKS-HEADER", "keyslots.0.key_size: 96")


def test_a_header_is_read_once(plain: bytes) -> None:
    class Disk(init.Kernel):
        def __init__(self) -> None:
            self.reads: list[tuple[int, int]] = []

        def read_at(self, fd: int, offset: int, size: int) -> bytes:
            self.reads.append((offset, size))
            return plain[offset : offset + size]

    disk = Disk()
    assert init.read_luks_header(disk, 3, "plain") == init.parse_luks_header(plain, "plain")
    assert disk.reads == [(0, BYTES)]


def test_a_device_that_ends_before(need: Need, folder: Path, tmp_path: Path) -> None:
    need("cryptsetup")
    (tmp_path / "short").write_bytes(bytes(100_000))
    with pytest.raises(init.Refused) as error:
        luks.read_header(Host(), tmp_path / "short", "plain")
    assert error.value.check == "LUKS-HEADER"
    for size in (0, BYTES - 1, BYTES + 1):
        whole = made(folder, "plain") + b"\0"
        assert refused(whole[:size], "plain") == ("LUKS-HEADER", f"{size} bytes")
    assert refused(bytes(BYTES)) == ("LUKS-HEADER", "no copy with the right checksum")


def run(*words: str | Path, stdin: bytes = b"") -> None:
    done = subprocess.run(["cryptsetup", *words], input=stdin, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("kind", ["plain", "config"])
def test_slots_come_and_go_and_a_backup_comes_back(
    kind: str, need: Need, host: Host, folder: Path, tmp_path: Path
) -> None:
    need("cryptsetup")
    path = tmp_path / "volume"
    path.write_bytes((made(folder, kind).ljust(init.LUKS_DATA) + volumes.SUPERBLOCK).ljust(volumes.SIZE))
    before = luks.read_header(host, path, kind)
    (tmp_path / "other").write_bytes(b"other")
    run("luksHeaderBackup", path, "--header-backup-file", tmp_path / "backup")
    run("luksAddKey", "--key-file", "-", *luks.QUICK, path, tmp_path / "other", stdin=SECRET)
    assert luks.read_header(host, path, kind).slots == (0, 1, 2)
    run("luksKillSlot", "--batch-mode", "--key-file", "-", path, "1", stdin=SECRET)
    after = luks.read_header(host, path, kind)
    assert (after.slots, after.tokens) == ((0, 2), before.tokens)
    run("luksHeaderRestore", "--batch-mode", path, "--header-backup-file", tmp_path / "backup")
    assert luks.read_header(host, path, kind) == before


@pytest.mark.parametrize(
    ("at", "new"),
    [
        (0, b"x"), (8, b"\3"), (8, b"\5"), (9, b"\0"), (10, b"\x20\1"), (12, bytes(4)), (12, b"\x41"),
        (24, b"\0"), (24, b"\x0a"), (24, b"\x0c"), (24, b"\x18"), (24, b"\x28"), (28, b"\0"), (32, b"\1"),
        (48, b"\1"), (511, b"\1"),
    ],
)  # fmt: skip
def test_what_dm_integrity_could_be_told_is_refused(at: int, new: bytes) -> None:
    init.check_integrity(volumes.SUPERBLOCK)
    with pytest.raises(init.Refused, match="LUKS-HEADER"):
        init.check_integrity(volumes.SUPERBLOCK[:at] + new + volumes.SUPERBLOCK[at + len(new) :])


# --- What libcryptsetup is given -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "config"])
def test_the_detached_header_is_cryptsetups_own(kind: str, need: Need, folder: Path, tmp_path: Path) -> None:
    need("cryptsetup")
    header = init.parse_luks_header(made(folder, kind), kind)
    (tmp_path / "header").write_bytes(init.detached_header(header))
    # The disk has no header any more: whatever opens is the detached one.
    (tmp_path / "disk").write_bytes(bytes(volumes.SIZE))
    words = ("open", "--test-passphrase", "--header", tmp_path / "header", "--key-file", "-")
    run(*words, tmp_path / "disk", stdin=SECRET)
    run(*words, tmp_path / "disk", stdin=volumes.RECOVERY)
    again = init.parse_luks_header((tmp_path / "header").read_bytes(), kind)
    assert again == header
    dumped = subprocess.check_output(["cryptsetup", "luksDump", "--dump-json-metadata", tmp_path / "header"])
    assert json.loads(dumped) == volumes.document_of(made(folder, kind))


@pytest.mark.parametrize("kind", ["plain", "config"])
def test_a_volume_opens_by_its_secret_alone(
    kind: str, need: Need, host: Host, folder: Path, tmp_path: Path
) -> None:
    need("cryptsetup")
    header = init.parse_luks_header(made(folder, kind), kind)
    (tmp_path / "disk").write_bytes(bytes(volumes.SIZE))
    secret = bytearray(SECRET)
    init.open_volume(host, header, str(tmp_path / "disk"), secret, None)
    assert secret == SECRET
    for wrong in (bytearray(32), bytearray(volumes.RECOVERY), bytearray(1)):
        with pytest.raises(init.Refused) as error:
            init.open_volume(host, header, str(tmp_path / "disk"), wrong, None)
        assert (error.value.check, "Operation not permitted" in error.value.seen) == ("VOLUME-KEY", True)
    # The recovery slot is another one, and only who asks for it gets it.
    whole = init.detached_header(header)
    host.open_luks(whole, str(tmp_path / "disk"), bytearray(volumes.RECOVERY), 1, None)
    with pytest.raises(OSError):
        host.open_luks(whole[:COPY], str(tmp_path / "disk"), secret, 0, None)
    with pytest.raises(OSError):
        host.open_luks(whole, str(tmp_path / "no-disk"), secret, 0, None)


def test_what_is_passed_on_was_read_by_us_alone(plain: bytes) -> None:
    """White space, escapes and the bytes of the binary header end here."""
    document = json.dumps(volumes.document_of(plain), indent=3).replace("crypt", "cr\\u0079pt").encode()
    odd = init.parse_luks_header(with_text(plain, document), "plain")
    assert odd == init.parse_luks_header(plain, "plain")
    salted = patched(plain, 104, os.urandom(64))
    assert init.detached_header(init.parse_luks_header(salted, "plain")) == init.detached_header(odd)


# --- Two copies ------------------------------------------------------------------------------------------


def later(data: bytes, steps: int = 1) -> bytes:
    """Return a header as the next update leaves it: other contents and number in both copies."""
    seqid = int.from_bytes(data[16:24], "big") + steps
    return patched(
        changed(data, lambda d: d["keyslots"]["0"].update(priority=2)), 16, seqid.to_bytes(8, "big")
    )


def torn(copy: bytes) -> bytes:
    """Return a copy as a power cut leaves it: written, its checksum not yet."""
    return copy[:448] + bytes(64) + copy[512:]


def test_every_power_cut_of_an_update_leaves_a_header(plain: bytes) -> None:
    """In cryptsetup's order of writes: the binary header, the JSON, the checksum; then the second copy."""
    new = later(plain)
    old_header, new_header = (init.parse_luks_header(data, "plain") for data in (plain, new))
    states = [
        (torn(new[:4096]) + plain[4096:COPY], plain, old_header),
        (torn(new[:COPY]), plain, old_header),
        (new[:COPY], plain, new_header),
        (new[:COPY], plain[:COPY] + torn(new[COPY : COPY + 4096]) + plain[COPY + 4096 :], new_header),
        (new[:COPY], plain[:COPY] + torn(new[COPY : 2 * COPY]), new_header),
    ]
    for first, second, wanted in states:
        seen = init.parse_luks_header(first + second[COPY : 2 * COPY] + plain[2 * COPY :], "plain")
        assert seen.note != ""
        assert seen._replace(note="") == wanted


def test_copies_that_no_power_cut_leaves(plain: bytes) -> None:
    new, far = later(plain), later(plain, 2)
    first, second, rest = slice(0, COPY), slice(COPY, 2 * COPY), plain[2 * COPY :]
    assert "different contents" in refused(plain[first] + new[second] + rest, "plain")[1]
    assert "different contents" in refused(far[first] + plain[second] + rest, "plain")[1]
    same = changed(plain, lambda d: d["keyslots"]["0"].update(priority=2))
    assert "different contents" in refused(same[first] + plain[second] + rest, "plain")[1]
    other = patched(new, 168, b"0" * 8)
    assert "different contents" in refused(other[first] + plain[second] + rest, "plain")[1]
    gone = torn(plain[first]) + torn(plain[second]) + rest
    assert refused(gone, "plain") == ("LUKS-HEADER", "no copy with the right checksum")
    # A second copy in the place of the first, and the other way round.
    assert refused(plain[second] + plain[first] + rest, "plain")[0] == "LUKS-HEADER"


@pytest.mark.parametrize(
    ("at", "new"),
    [
        (0, b"LUKT\xba\xbe"), (6, b"\0\1"), (8, (COPY * 2).to_bytes(8, "big")), (24, b"label"),
        (55, b"\1"), (72, b"sha512"), (79, b"x"), (168, b"6F3C1C1E"), (168, bytes(40)), (168, b"\xff"),
        (206, b"x"), (208, b"subsystem"), (256, b"\1"), (264, b"\1"), (447, b"\1"), (512, b"\1"),
        (4095, b"\1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("copies", [(0, COPY), (0,), (COPY,)])
def test_every_field_of_the_binary_header(
    at: int, new: bytes, copies: tuple[int, ...], plain: bytes
) -> None:
    bad = patched(plain, at, new, copies=copies)
    assert refused(bad, "plain")[0] == "LUKS-HEADER"


def test_the_rest_of_the_checksum_field_is_zero(plain: bytes) -> None:
    bad = plain[:480] + b"\1" + plain[481:]
    assert refused(bad, "plain")[0] == "LUKS-HEADER"


def test_a_label_is_named(plain: bytes) -> None:
    assert "my disk" in refused(patched(plain, 24, b"my disk"), "plain")[1]
    assert volumes.UUID.upper() in refused(patched(plain, 168, volumes.UUID.upper().encode()), "plain")[1]


# --- What attackers write there --------------------------------------------------------------------------


def slot(number: str = "0", **changes: Any) -> Change:
    return lambda d: d["keyslots"][number].update(changes)


def segment(**changes: Any) -> Change:
    return lambda d: d["segments"]["0"].update(changes)


def kdf(number: str = "0", **changes: Any) -> Change:
    return lambda d: d["keyslots"][number]["kdf"].update(changes)


def area(number: str = "0", **changes: Any) -> Change:
    return lambda d: d["keyslots"][number]["area"].update(changes)


def digest(**changes: Any) -> Change:
    return lambda d: d["digests"]["0"].update(changes)


def planted(number: str, *, offset: int = 2 << 20, assigned: bool = True) -> Change:
    def change(d: dict[str, Any]) -> None:
        other = json.loads(json.dumps(d["keyslots"]["0"]))
        other["area"]["offset"] = str(offset)
        d["keyslots"][number] = other
        if assigned:
            d["digests"]["0"]["keyslots"].append(number)

    return change


def both(*changes: Change) -> Change:
    return lambda d: [change(d) for change in changes]


ARABIC = "\u0661\u0663\u0661\u0660\u0667\u0662"  # digits to Python, which reads 131072
BOMB = {"type": "argon2id", "time": 4, "memory": 1 << 20, "cpus": 4, "salt": "A" * 43 + "="}
TAMPERS: list[tuple[str, Change]] = [
    ("segments.0.encryption: cipher_null-ecb", segment(encryption="cipher_null-ecb")),
    ("segments.0.encryption: aes-cbc-essiv:sha256", segment(encryption="aes-cbc-essiv:sha256")),
    ("segments.0.offset: 8388608", segment(offset="8388608")),
    ("segments.0.offset: 5242880", segment(offset=5242880)),
    ("segments.0.size: 4096", segment(size="4096")),
    ("segments.0.iv_tweak: 8", segment(iv_tweak="8")),
    ("segments.0.sector_size: 512", segment(sector_size=512)),
    ("segments.0.sector_size: float", segment(sector_size=4096.0)),
    ("segments.0.type: linear", segment(type="linear")),
    ("segments.0.type: hw-opal-crypt", segment(type="hw-opal-crypt")),
    ("segments.0.flags: list", segment(flags=["in-reencryption"])),
    ("segments.0.flags: list", segment(flags=[])),
    ("segments.1: dict", lambda d: d["segments"].update({"1": d["segments"]["0"]})),
    ("segments.0: missing", lambda d: d["segments"].clear()),
    ("segments.0: missing", lambda d: d.update(segments={"1": d["segments"]["0"]})),
    ("segments: list", lambda d: d.update(segments=[])),
    ("config.requirements: dict", lambda d: d["config"].update(requirements={"mandatory": []})),
    ("config.flags: list", lambda d: d["config"].update(flags=["allow-discards"])),
    ("config.json_size: 12288", lambda d: d["config"].update(json_size="12288")),
    ("config.keyslots_size: 8388608", lambda d: d["config"].update(keyslots_size="8388608")),
    ("k" * 99 + ": 1", lambda d: d.update({"k" * 50000: 1})),
    ("reencrypt: dict", lambda d: d.update(reencrypt={})),
    ("config: missing", lambda d: d.pop("config")),
    ("keyslots: none", lambda d: d.pop("keyslots")),
    ("keyslots: none", lambda d: d.update(keyslots=["0"])),
    ("keyslots: 1", lambda d: d["keyslots"].pop("0")),
    ("keyslots: 0, 1, 2, 3, 4", both(*(planted(n, offset=int(n) << 20) for n in "234"))),
    ("keyslots: 0, 1, 8", planted("8")),
    ("keyslots: 0, 1, 00", planted("00")),
    ("digests.0.keyslots: list", planted("2", assigned=False)),
    ("digests.0.keyslots: list", digest(keyslots=["0"])),
    ("digests.0.keyslots: list", digest(keyslots=["0", "0"])),
    ("digests.0.keyslots: list", digest(keyslots=["0", "7"])),
    ("digests.0.keyslots: list", digest(keyslots=["0", "1", "1"])),
    ("digests.0.keyslots: 2", digest(keyslots=2)),
    ("digests.0.keyslots: list", digest(keyslots=["0", ["1"]])),
    ("digests.0.segments: list", digest(segments=[])),
    ("digests.0.segments: list", digest(segments=["0", "1"])),
    ("digests.0.type: none", digest(type="none")),
    ("digests.0.hash: sha1", digest(hash="sha1")),
    ("digests.0.iterations: 10000001", digest(iterations=10_000_001)),
    ("digests.0.digest: AAAA", digest(digest="AAAA")),
    ("digests.1: dict", lambda d: d["digests"].update({"1": d["digests"]["0"]})),
    ("keyslots.0.type: reencrypt", slot(type="reencrypt")),
    ("keyslots.0.key_size: 32", slot(key_size=32)),
    ("keyslots.0.priority: 3", slot(priority=3)),
    ("keyslots.0.priority: True", slot(priority=True)),
    ("keyslots.0.extra: 1", slot(extra=1)),
    ("keyslots.0: float", lambda d: d["keyslots"].update({"0": 1.5})),
    ("keyslots.0.af.stripes: 1", lambda d: d["keyslots"]["0"]["af"].update(stripes=1)),
    ("keyslots.0.af.hash: sha1", lambda d: d["keyslots"]["0"]["af"].update(hash="sha1")),
    ("keyslots.0.kdf.iterations: 999", kdf(iterations=999)),
    ("keyslots.0.kdf.iterations: 4000000000", kdf(iterations=4_000_000_000)),
    ("keyslots.0.kdf.iterations: True", kdf(iterations=True)),
    ("keyslots.0.kdf.hash: sha512", kdf(hash="sha512")),
    ("keyslots.0.kdf.type: argon2i", kdf(type="argon2i")),
    ("keyslots.0.kdf.type: list", kdf(type=[])),
    ("keyslots.0.kdf.salt: AAAA", kdf(salt="AAAA")),
    ("keyslots.0.kdf.salt: " + "A" * 42 + "B=", kdf(salt="A" * 42 + "B=")),
    ("keyslots.0.kdf.salt: float", kdf(salt=1.5)),
    ("keyslots.0.kdf: list", slot(kdf=[])),
    ("keyslots.1.kdf.time: 21", slot("1", kdf={**BOMB, "time": 21})),
    ("keyslots.1.kdf.memory: 1048577", slot("1", kdf={**BOMB, "memory": (1 << 20) + 1})),
    ("keyslots.1.kdf.cpus: 5", slot("1", kdf={**BOMB, "cpus": 5})),
    ("keyslots.1.kdf.iterations: 1000", slot("1", kdf={**BOMB, "iterations": 1000})),
    ("keyslots.0.area.type: journal", area(type="journal")),
    ("keyslots.0.area.encryption: cipher_null-ecb", area(encryption="cipher_null-ecb")),
    ("keyslots.0.area.key_size: 32", area(key_size=32)),
    ("keyslots.0.area.size: 4096", area(size="4096")),
    ("keyslots.0.area.offset: 131073", area(offset="131073")),
    ("keyslots.0.area.offset: 126976", area(offset="126976")),
    ("keyslots.0.area.offset: 0", area(offset="0")),
    ("keyslots.0.area.offset: 4325376", area(offset="4325376")),
    ("keyslots.1.area.offset: 131072", both(area(offset="131072"), area("1", offset="131072"))),
    ("keyslots.1.area.offset: 135168", area("1", offset="135168")),
    (f"keyslots.0.area.offset: {ARABIC}", area(offset=ARABIC)),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "change"), TAMPERS, ids=[seen for seen, _ in TAMPERS])
@pytest.mark.parametrize("kind", ["plain", "config"])
def test_a_changed_header_is_refused_and_named(
    seen: str, change: Change, kind: str, plain: bytes, config: bytes
) -> None:
    bad = changed({"plain": plain, "config": config}[kind], change)
    assert refused(bad, kind) == ("LUKS-HEADER", seen)


def test_bounds_are_taken(plain: bytes) -> None:
    for change in (
        kdf(iterations=10_000_000), digest(iterations=10_000_000), slot("1", kdf=BOMB),
        slot("1", kdf={**BOMB, "time": 20, "memory": 32, "cpus": 1}), slot(priority=0), slot(priority=2),
        both(planted("2"), planted("7", offset=3 << 20)), area(offset=str(BYTES - 258048)),
        digest(keyslots=["1", "0"]),
    ):  # fmt: skip
        init.parse_luks_header(changed(plain, change), "plain")


def test_integrity_is_pinned(config: bytes, plain: bytes) -> None:
    def integrity(**changes: Any) -> Change:
        return lambda d: d["segments"]["0"]["integrity"].update(changes)

    for seen, change in (
        ("segments.0.integrity: missing", lambda d: d["segments"]["0"].pop("integrity")),
        ("segments.0.integrity.type: crc32c", integrity(type="crc32c")),
        ("segments.0.integrity.journal_integrity: hmac", integrity(journal_integrity="hmac")),
        ("segments.0.integrity.key_size: 32", integrity(key_size=32)),
    ):
        assert refused(changed(config, change)) == ("LUKS-HEADER", seen)
    assert refused(changed(plain, segment(integrity=volumes.INTEGRITY)), "plain") == (
        "LUKS-HEADER", "segments.0.integrity: dict",
    )  # fmt: skip


# --- Tokens ----------------------------------------------------------------------------------------------


def token(number: str, **changes: Any) -> Change:
    return lambda d: d["tokens"][number].update(changes)


def approval(**changes: Any) -> Change:
    return lambda d: d["tokens"]["2"]["approvals"][1].update(changes)


def b64(size: int) -> str:
    return luks._base64(bytes(size))


ONE = {"pcr7": "ab" * 32, "signature": b64(256)}
SYSTEMD = {
    "type": "systemd-tpm2",
    "keyslots": ["1"],
    "tpm2-blob": "",
    "tpm2-pcrs": [],
    "tpm2-policy-hash": "",
}
TOKEN_TAMPERS: list[tuple[str, Change]] = [
    ("tokens.4: dict", lambda d: d["tokens"].update({"4": SYSTEMD})),
    ("tokens.0.type: systemd-tpm2", lambda d: d["tokens"].update({"0": SYSTEMD})),
    ("tokens.4: dict", lambda d: d["tokens"].update({"4": d["tokens"]["0"]})),
    ("tokens.0: missing", lambda d: d["tokens"].pop("0")),
    ("tokens.1: missing", lambda d: d["tokens"].pop("1")),
    ("tokens.2: missing", lambda d: d["tokens"].pop("2")),
    ("tokens.3: missing", lambda d: d["tokens"].pop("3")),
    ("tokens: missing", lambda d: d.pop("tokens")),
    ("tokens: list", lambda d: d.update(tokens=[])),
    ("tokens.0: list", lambda d: d["tokens"].update({"0": []})),
    ("tokens.0.type: mosinit-record", token("0", type="mosinit-record")),
    ("tokens.0.keyslots: list", token("0", keyslots=["1"])),
    ("tokens.0.keyslots: list", token("0", keyslots=[])),
    ("tokens.1.keyslots: list", token("1", keyslots=["0"])),
    ("tokens.0.extra: 1", token("0", extra=1)),
    ("tokens.0.public: ", token("0", public="")),
    ("tokens.0.public: AA=A", token("0", public="AA=A")),
    ("tokens.0.public: AB==", token("0", public="AB==")),
    ("tokens.0.public: AA==\n", token("0", public="AA==\n")),
    ("tokens.0.public: A-_A", token("0", public="A-_A")),
    ("tokens.0.public: \xe4", token("0", public="\xe4")),
    ("tokens.0.public: 7", token("0", public=7)),
    (f"tokens.0.public: {b64(1025)[:60]}", token("0", public=b64(1025))),
    (f"tokens.0.private: {b64(1025)[:60]}", token("0", private=b64(1025))),
    (f"tokens.1.certificate: {b64(4097)[:60]}", token("1", certificate=b64(4097))),
    (f"tokens.3.statement: {b64(1025)[:60]}", token("3", statement=b64(1025))),
    (f"tokens.3.signature: {b64(1025)[:60]}", token("3", signature=b64(1025))),
    (f"tokens.3.certificate: {b64(16385)[:60]}", token("3", certificate=b64(16385))),
    ("tokens.2.approvals: list", token("2", approvals=[])),
    ("tokens.2.approvals: list", token("2", approvals=[{**ONE, "pcr7": f"{n:064x}"} for n in range(17)])),
    ("tokens.2.approvals: dict", token("2", approvals={"0": ONE})),
    ("tokens.2.approvals: 7", token("2", approvals=7)),
    ("tokens.2.approvals: a value of PCR 7 twice", token("2", approvals=[ONE, ONE])),
    ("tokens.2.approvals[0]: list", token("2", approvals=[[]])),
    ("tokens.2.approvals[1].pcr7: " + "AB" * 30, approval(pcr7="AB" * 32)),
    ("tokens.2.approvals[1].pcr7: " + "ab" * 30, approval(pcr7="ab" * 33)),
    (f"tokens.2.approvals[1].signature: {b64(255)[:60]}", approval(signature=b64(255))),
    (f"tokens.2.approvals[1].signature: {b64(257)[:60]}", approval(signature=b64(257))),
    ("tokens.2.approvals[1].note: x", approval(note="x")),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "change"), TOKEN_TAMPERS, ids=[seen for seen, _ in TOKEN_TAMPERS])
def test_a_changed_token_is_refused_and_named(seen: str, change: Change, config: bytes) -> None:
    assert refused(changed(config, change)) == ("LUKS-TOKEN", seen)


def test_a_plain_volume_has_no_token(plain: bytes) -> None:
    bad = changed(plain, lambda d: d["tokens"].update({"0": SYSTEMD}))
    assert refused(bad, "plain") == ("LUKS-TOKEN", "tokens.0: dict")


def test_the_largest_tokens_fit(config: bytes) -> None:
    sixteen = [{**ONE, "pcr7": f"{n:064x}"} for n in range(16)]
    change = both(
        token("0", public=b64(1024), private=b64(1024)), token("1", certificate=b64(4096)),
        token("2", approvals=sixteen),
        token("3", statement=b64(1024), signature=b64(1024), certificate=b64(16384)),
        planted("2"), planted("7", offset=3 << 20),
    )  # fmt: skip
    header = init.parse_luks_header(changed(config, change), "config")
    assert header.tokens is not None
    assert len(header.tokens.approvals) == 16
    assert len(header.text) < 45_000


# --- JSON that others read otherwise, or for too long ----------------------------------------------------


def test_the_json_area(plain: bytes) -> None:
    text = dump(volumes.document_of(plain))
    double = text.replace(b'{"keyslots"', b'{"config":{},"keyslots"')
    assert len(double) > len(text)
    for bad in (
        text + b"\0x", text + b"x", text + b"{}", text[:-1], b"", b"[]", b"null", b"0", b'"config"', double,
        b"\xef\xbb\xbf" + text, text.decode().encode("utf-16-le"), text.decode().encode("utf-32-be"),
        text.replace(b'"crypt"', b'"\xc3\xa4"'), text.replace(b"4096", b"NaN"),
        text.replace(b"4096", b"Infinity"), text.replace(b"4096", b"4.096e3"), text.replace(b"4096", b"00"),
        text.replace(b"4096", b"9" * 5000), text.replace(b"4096", b"9" * 4000), text + b" " * 61440,
        text.replace(b"4096", b"4096/**/"), text.replace(b'"4194304"', b"'4194304'"),
        text.replace(b'"dynamic"', b'"dyn\\u0000amic"'),
    ):  # fmt: skip
        assert refused(with_text(plain, bad), "plain")[0] == "LUKS-HEADER", bad[:60]


@pytest.mark.parametrize(
    "text", [b"[" * 61000, b'{"a":' * 10000, b"[" * 30000 + b"]" * 30000, b'{"keyslots":' + b"[" * 900]
)
def test_deep_nesting_ends_soon(text: bytes, plain: bytes) -> None:
    start = time.monotonic()
    assert refused(with_text(plain, text), "plain")[0] == "LUKS-HEADER"
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("depth", range(100, 1000, 90))
@pytest.mark.parametrize("place", ["kdf", "salt", "digest"])
def test_deep_values_at_known_keys(depth: int, place: str, plain: bytes) -> None:
    text = dump(volumes.document_of(plain)).decode()
    head, _, tail = text.partition(f'"{place}":')
    _, _, tail = tail.partition("," if place != "kdf" else "}")
    bad = f'{head}"{place}":{"[" * depth}{"]" * depth},{tail}'.encode()
    assert refused(with_text(plain, bad), "plain")[0] == "LUKS-HEADER"


# --- Anything at all -------------------------------------------------------------------------------------


def survives(untrusted: bytes, kind: str) -> None:
    try:
        header = init.parse_luks_header(untrusted, kind)
    except init.Refused as error:
        assert error.check in init.CHECKS
        assert len(error.seen) < 300
    else:
        assert init.parse_luks_header(init.detached_header(header), kind) == header._replace(note="")


QUIET = settings(deadline=5000, max_examples=150)


@QUIET
@given(data=st.binary(max_size=9000), kind=st.sampled_from(["plain", "config"]), whole=st.booleans())
def test_arbitrary_bytes(data: bytes, kind: str, whole: bool) -> None:
    survives(data.ljust(BYTES, b"\0") if whole else data, kind)


@QUIET
@given(flips=st.lists(st.tuples(st.integers(0, 2 * COPY - 1), st.integers(0, 255)), max_size=3))
def test_flipped_bytes(flips: list[tuple[int, int]]) -> None:
    data = bytearray(header_for_fuzzing("plain"))
    for at, value in flips:
        data[at] = value
    survives(bytes(data), "plain")


@QUIET
@given(
    flips=st.lists(st.tuples(st.integers(0, 1500) | st.integers(4096, 7000), st.binary(max_size=4))),
    kind=st.sampled_from(["plain", "config"]),
)
def test_flipped_bytes_under_a_right_checksum(flips: list[tuple[int, bytes]], kind: str) -> None:
    data = header_for_fuzzing(kind)
    for at, new in flips:
        data = patched(data, at, new)
    survives(data, kind)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("0"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("01"), inner, max_size=3),
    max_leaves=8,
)


@QUIET
@given(draw=st.data(), kind=st.sampled_from(["plain", "config"]))
def test_any_value_at_any_place(draw: st.DataObject, kind: str) -> None:
    data = header_for_fuzzing(kind)
    document = volumes.document_of(data)
    here: Any = document
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = draw.draw(st.sampled_from(keys) if keys else st.just(0))
        deeper = keys and isinstance(here[key], dict | list) and here[key]
        if not deeper or draw.draw(st.integers(0, 3)) == 0:
            break
        here = here[key]
    if isinstance(here, dict) or keys:
        here[key] = draw.draw(VALUES)
    survives(with_text(data, dump(document)), kind)


def header_for_fuzzing(kind: str) -> bytes:
    if kind not in _MADE:
        pytest.skip("no real header was made before: run the whole file")
    return _MADE[kind]
