"""More than one target, and more than one layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from programs import init_program
from world import GOOD_HOSTFS, HELLO, Files, Layer, Stacker, World, get, part_of

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


def script(interpreter: str) -> bytes:
    """Return a program for another one to run, long enough that every squashfs packs it."""
    return f"#!{interpreter}\n".encode() + b"#\n" * 4096


def test_layers_of_stacker_boot_as_they_are(world: World, medium: Path) -> None:
    """Each layer has what the one below starts with, the last the word that is heard."""
    atomfs, squashfs = init.ROOT_HASH_ANNOTATIONS
    data: list[Layer] = [Stacker({"data": b"data"}, annotation=name) for name in (atomfs, squashfs)]
    hostfs: list[Layer] = [
        {"sbin/init": init_program(b"hidden\n", "hang"), "usr/lib/systemd/systemd": script("/usr/zstd")},
        Stacker({"usr/zstd": script("/usr/gzip")}, "zstd", atomfs, hidden=("sbin/init",)),
        Stacker({"usr/gzip": script("/usr/xz")}, "gzip", squashfs),
        Stacker({"usr/xz": init_program(HELLO, "restart") + bytes(8192)}, "xz", squashfs),
    ]
    release = world.release("stacker", hostfs, more={"data": data})
    targets = init.parse_manifest(part_of(release, init.MANIFEST_MEDIA_TYPE)).targets
    published = {target.service_name: target.digest for target in targets}
    # Of an image that only stacker made nothing changes at all, of the other one its lowest layer.
    assert published["data"] == image_of(world.folder / "stacker-data")
    layouts = world.folder / "stacker-hostfs", release
    digests = image_of(layouts[0]), published["hostfs"]
    before, after = (json.loads(get(*each))["layers"][1:] for each in zip(layouts, digests, strict=True))
    assert before == after
    assert all(get(layouts[0], each["digest"]) == get(layouts[1], each["digest"]) for each in before)
    outcome = world.go_on(world.medium(release), until="multi-user")
    console = outcome.console.read_bytes()
    assert (outcome.status, outcome.reason) == (1, "the machine restarted before multi-user.target")
    assert console.index(b"mosinit-report: ") < console.index(HELLO.strip())
    assert b"hidden" not in console


def image_of(layout: Path) -> str:
    """Return the digest of a layout's one image."""
    (entry,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    return str(entry["digest"])
