"""More than one target, and more than one layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from world import GOOD_HOSTFS, Files, World

from mosinit import init

DATA: list[Files] = [{f"usr/share/data/{number}": b"%d\n" % number * 1000} for number in range(5)]


def stack_of(count: int) -> list[Files]:
    """Return the layers of a hostfs whose init is in the lowest one."""
    return [GOOD_HOSTFS, *({f"usr/layer-{number}": b"%d\n" % number} for number in range(1, count))]


def test_another_target_comes_along_with_all_its_layers(world: World, medium: Path) -> None:
    release = world.release("two-targets", GOOD_HOSTFS, more={"data": DATA})
    mixed = world.medium(release)
    outcome = world.go_on(mixed)
    assert outcome.status == 0, outcome.reason
    store = store_of(world, mixed)
    blobs = {path.name for path in (release / "blobs/sha256").iterdir()}
    assert {path.name for path in (store / "mosinit/blobs/sha256").iterdir()} == blobs
    assert len(blobs) >= len(DATA) * 2


def store_of(world: World, medium: Path) -> Path:
    """Unpack a medium's store."""
    raw = medium.read_bytes()
    parts = init.parse_gpt(raw[512:1024], raw[1024 : 1024 + 16384], 512, len(raw) // 512)
    (part,) = (part for part in parts if part.kind == init.LIVE_STORE_TYPE)
    image, folder = medium.with_suffix(".store"), medium.with_suffix(".unpacked")
    image.write_bytes(raw[part.start : part.start + part.size])
    world.host.run(["fsck.erofs", "--no-preserve", f"--extract={folder}", image])
    return folder


@pytest.mark.parametrize("count", [1, 8, 64])
def test_a_stack_of_layers_boots(world: World, medium: Path, count: int) -> None:
    outcome = world.go_on(world.medium(world.release(f"layers-{count}", stack_of(count))))
    assert outcome.status == 0, outcome.console.read_text(errors="replace")[-3000:]
    report = cast(dict[str, Any], outcome.report)
    stages = {stage["name"]: stage for stage in report["stages"]}
    signed = [check for check in report["checks"] if check["id"] == "LAYER-SIGNATURE"]
    assert len(signed) >= count
    print(f"{count} layers: {[stages[name] for name in ('mount-layers', 'stack', 'prepare-root')]}")
