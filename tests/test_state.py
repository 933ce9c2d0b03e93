"""What a machine keeps for its root."""

from __future__ import annotations

import re
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from mosinit import init, state
from mosinit.host import Host


def test_each_machine_has_an_id_and_host_keys_of_its_own(host: Host, tmp_path: Path) -> None:
    made: list[dict[str, bytes]] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        state.make(host, tmp_path / name, volume=name == "two")
        paths = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        made.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths})
        modes = {str(path.relative_to(tmp_path / name)): path.stat().st_mode & 0o777 for path in paths}
        assert {path: modes[path] for path in init.KEPT} == init.KEPT
    one, two = made
    assert set(one) == set(init.KEPT)
    assert set(two) - set(one) == {init.STATE_MARK.removeprefix(f"{init.CONFIG}/state/")}
    assert all(one[path] != two[path] for path in one)
    assert re.fullmatch(rb"[0-9a-f]{32}\n", one["etc/machine-id"])


def test_the_public_keys_are_those_of_the_private_ones() -> None:
    files = state.make_ssh_keys()
    for path in init.SSH_KEYS:
        key = serialization.load_ssh_private_key(files[path], None)
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        assert files[f"{path}.pub"] == public + b"\n"
        assert path.split("_")[2] in public.split()[0].decode()
