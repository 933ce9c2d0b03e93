"""Built twice, in other folders, at another time, by somebody with another umask: the same bytes.

hostfs has a test of its own (test_hostfs.py); the kernel is Debian's package.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from world import GOOD_HOSTFS, World

from mosinit import init


def parts_of(world: World, medium: Path) -> dict[str, str]:
    """Return the digest of each thing that was built, and of each part of the medium."""
    built = [each.path for each in world.bootable.initrds.values()]
    built += [each.path for each in world.bootable.ukis.values()]
    files = {path.name: path.read_bytes() for path in built}
    for layout in (world.bootable.bootkit, world.folder / "good"):
        blobs = sorted(path for path in layout.rglob("*") if path.is_file())
        files[layout.name] = b"\n".join(str(path.relative_to(layout)).encode() for path in blobs)
        files[f"{layout.name}'s blobs"] = b"".join(path.read_bytes() for path in blobs)
    raw = medium.read_bytes()
    partitions = init.parse_gpt(raw[512:1024], raw[1024 : 1024 + 16384], 512, len(raw) // 512)
    names = {init.ESP_TYPE: "ESP", init.LIVE_SEAL_TYPE: "seal", init.LIVE_STORE_TYPE: "store"}
    files |= {names[part.kind]: raw[part.start : part.start + part.size] for part in partitions}
    files["medium"] = raw
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_two_builds_are_equal_part_by_part(
    world: World, medium: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = parts_of(world, medium)
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    monkeypatch.setenv("LANG", "C")
    started = time.time()
    before = os.umask(0o077)
    try:
        folder = tmp_path / "a longer name/of another folder"
        folder.mkdir(parents=True)
        again = World(world.host, folder, world.cold, world.keyset)
        other = again.medium(again.release("good", GOOD_HOSTFS))
    finally:
        os.umask(before)
    assert started - medium.stat().st_mtime >= 2  # as fine as FAT's dates are, the coarsest of all
    different = [name for name, digest in parts_of(again, other).items() if digest != seen[name]]
    assert different == []
