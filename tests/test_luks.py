"""Volumes as the package makes them: the core's parser takes them, and secrets are nowhere but in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mosinit import init, luks
from mosinit.host import Failure, Host
from tests import volumes
from tests.recorder import Watched

Need = Callable[..., None]


def test_a_volume_and_its_recovery_key(need: Need, tmp_path: Path) -> None:
    need("cryptsetup")
    host = Watched()
    path = volumes.plain(host, tmp_path / "volume")
    header = luks.read_header(host, path, "plain")
    assert (header.uuid, header.slots) == (volumes.UUID, (0,))
    luks.add_recovery(host, path, volumes.SECRET, volumes.RECOVERY)
    assert luks.read_header(host, path, "plain").slots == (0, 1)
    for key, slot in ((volumes.SECRET, "0"), (volumes.RECOVERY, "1")):
        words = ["open", "--test-passphrase", "--key-slot", slot, "--key-file", "-"]
        host.run(["cryptsetup", *words, path], stdin=key)
    with pytest.raises(Failure):
        luks.add_recovery(host, path, volumes.SECRET, b"another, where one is")
    with pytest.raises(Failure):
        luks.add_recovery(host, path, b"not the secret", b"another")
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]
    said = " ".join(word for command in host.ran for word in command)
    assert "luksAddKey" in said
    assert volumes.RECOVERY.decode() not in said


def test_format_asks_for_all_that_is_pinned() -> None:
    plain, config = (luks.format_command(Path("/dev/x"), kind, volumes.UUID) for kind in ("plain", "config"))
    assert [word for word in config if word not in plain] == ["--integrity", "hmac-sha256"]
    assert "--integrity-no-journal" not in config
    options = dict(zip(plain[3:-1:2], plain[4:-1:2], strict=True))
    assert (plain[:3], plain[-1]) == (["cryptsetup", "luksFormat", "--batch-mode"], "/dev/x")
    assert options == {
        "--type": "luks2", "--luks2-metadata-size": "64k", "--luks2-keyslots-size": "4096k",
        "--offset": "10240", "--sector-size": "4096", "--cipher": "aes-xts-plain64", "--key-size": "512",
        "--hash": "sha256", "--pbkdf": "pbkdf2", "--pbkdf-force-iterations": "1000",
        "--uuid": volumes.UUID, "--key-slot": "0", "--key-file": "-",
    }  # fmt: skip


def test_a_config_volume_with_integrity(need: Need, host: Host, tmp_path: Path) -> None:
    need("cryptsetup")
    path = tmp_path / "volume"
    path.touch()
    os.truncate(path, 64 << 20)
    if "device-mapper" not in Path("/proc/misc").read_text():
        with pytest.raises(Failure, match="cryptsetup failed"):
            luks.format_volume(host, path, "config", volumes.UUID, volumes.SECRET)
        return
    luks.format_volume(host, path, "config", volumes.UUID, volumes.SECRET)
    assert luks.import_tokens(host, path, volumes.TOKENS).tokens == volumes.TOKENS
    made = volumes.document_of(path.read_bytes()[: volumes.BYTES])
    assert made["segments"]["0"]["integrity"] == volumes.INTEGRITY


def test_tokens_come_back_as_they_were(need: Need, tmp_path: Path) -> None:
    need("cryptsetup")
    host = Watched()
    path = volumes.config(host, tmp_path / "volume")
    with pytest.raises(init.Refused) as error:
        luks.read_header(host, path, "config")
    assert (error.value.check, error.value.seen) == ("LUKS-TOKEN", "tokens.0: missing")
    header = luks.import_tokens(host, path, volumes.TOKENS)
    assert (header.tokens, header.slots) == (volumes.TOKENS, (0,))
    # Only what changed is written: each write of the header is a moment at which power may fail.
    changed = volumes.TOKENS._replace(order_statement=b'{"epoch": 3}', order_signature=b"x")
    host.started.clear()
    after = luks.import_tokens(host, path, changed)
    assert (after.tokens, after.seqid) == (changed, header.seqid + 1)
    assert sum("import" in command for command in host.ran) == 1
    assert luks.import_tokens(host, path, changed) == after
    host.run(["cryptsetup", "open", "--test-passphrase", "--key-file", "-", path], stdin=volumes.SECRET)


def test_tokens_that_a_boot_would_refuse_are_told(need: Need, host: Host, tmp_path: Path) -> None:
    need("cryptsetup")
    path = volumes.config(host, tmp_path / "volume")
    with pytest.raises(init.Refused) as error:
        luks.import_tokens(host, path, volumes.TOKENS._replace(record=bytes(4097)))
    assert error.value.check == "LUKS-TOKEN"


def test_the_tokens_are_json_of_one_spelling() -> None:
    encoded = luks.encode_tokens(volumes.TOKENS)
    assert list(encoded) == [0, 1, 2, 3]
    assert [json.loads(document)["type"] for document in encoded.values()] == [
        "mosinit-seal", "mosinit-record", "mosinit-approvals", "mosinit-order",
    ]  # fmt: skip
