"""The core's parsers: bytes in, types or a refusal out, never anything else."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosinit import init
from tests.fake import ESP_UUID, FakeMachine, gpt, policy_json, signature_list

SECTORS = 65536
OTHER_UUID = "99999999-2222-3333-4444-555555555555"


def read_gpt(image: bytes, sectors: int = SECTORS) -> tuple[init.Partition, ...]:
    return init.parse_gpt(image[512:1024], image[1024 : 1024 + 16384], 512, sectors)


def test_gpt_agrees_with_sfdisk(need: Callable[..., None], tmp_path: Path) -> None:
    need("sfdisk")
    disk = tmp_path / "disk"
    disk.write_bytes(b"")
    with disk.open("r+b") as file:
        file.truncate(SECTORS * 512)
    esp = f"start=2048, size=4096, type={init.ESP_TYPE}, uuid={ESP_UUID}"
    name = 'name="a label of thirty-six characters now"'
    script = f"label: gpt\n{esp}\nsize=8192, type={init.LIVE_STORE_TYPE}, {name}\n"
    subprocess.run(["sfdisk", "--quiet", disk], input=script.encode(), check=True)
    seen = json.loads(subprocess.run(["sfdisk", "--json", disk], capture_output=True, check=True).stdout)
    expected = [
        (
            index + 1,
            item["type"].lower(),
            item["uuid"].lower(),
            item["start"] * 512,
            item["size"] * 512,
            item.get("name", ""),
        )
        for index, item in enumerate(seen["partitiontable"]["partitions"])
    ]
    assert [tuple(each) for each in read_gpt(disk.read_bytes()[: 1 << 20])] == expected


def spoil(image: bytes, offset: int, data: bytes, *, seal: bool) -> bytes:
    """Change bytes of a GPT, and make its checksums fit again if `seal`."""
    image = image[:offset] + data + image[offset + len(data) :]
    if seal:
        entries = struct.pack("<I", zlib.crc32(image[1024 : 1024 + 16384]))
        image = image[: 512 + 88] + entries + image[512 + 92 :]
        head = image[512 : 512 + 16] + bytes(4) + image[512 + 20 : 512 + 92]
        image = image[: 512 + 16] + struct.pack("<I", zlib.crc32(head)) + image[512 + 20 :]
    return image


GOOD = gpt([(init.ESP_TYPE, ESP_UUID, 2048, 4095), (init.LIVE_STORE_TYPE, OTHER_UUID, 4096, 8191)])
ENTRY2 = 1024 + 128


@pytest.mark.parametrize(
    ("check", "offset", "data", "seal"),
    [
        ("GPT-HEADER", 512, b"EFI PARX", True),
        ("GPT-HEADER", 512 + 40, b"\1", False),
        ("GPT-HEADER", 512 + 8, struct.pack("<I", 0x20000), True),
        ("GPT-HEADER", 512 + 12, struct.pack("<I", 512), False),
        ("GPT-HEADER", 512 + 24, struct.pack("<Q", 5), True),
        ("GPT-HEADER", 512 + 48, struct.pack("<Q", SECTORS), True),
        ("GPT-HEADER", 512 + 72, struct.pack("<Q", 40), True),
        ("GPT-HEADER", 512 + 80, struct.pack("<I", 1 << 31), True),
        ("GPT-HEADER", 512 + 84, struct.pack("<I", 256), True),
        ("GPT-ENTRY", ENTRY2 + 56, b"n", False),
        ("GPT-ENTRY", ENTRY2 + 32, struct.pack("<Q", 4095), True),
        ("GPT-ENTRY", ENTRY2 + 32, struct.pack("<Q", 3), True),
        ("GPT-ENTRY", ENTRY2 + 40, struct.pack("<Q", SECTORS), True),
        ("GPT-ENTRY", ENTRY2 + 40, struct.pack("<Q", 4000), True),
        ("GPT-ENTRY", ENTRY2 + 16, GOOD[1024 + 16 : 1024 + 32], True),
    ],
)  # fmt: skip
def test_gpt_faults(check: str, offset: int, data: bytes, seal: bool) -> None:
    assert len(read_gpt(GOOD)) == 2
    with pytest.raises(init.Refused) as refused:
        read_gpt(spoil(GOOD, offset, data, seal=seal))
    assert refused.value.check == check


@given(st.binary(max_size=120), st.binary(max_size=300))
def test_gpt_of_anything_is_refused(header: bytes, entries: bytes) -> None:
    with pytest.raises(init.Refused):
        init.parse_gpt((b"EFI PART" + header).ljust(512, b"\0"), entries.ljust(16384, b"\0"), 512, SECTORS)


def test_signature_database() -> None:
    digests = [hashlib.sha256(data).hexdigest() for data in (b"one", b"three")]
    assert init.parse_signature_database(signature_list(b"one", b"three")) == tuple(digests)
    hashes = (
        bytes.fromhex("2616c4c14c509240aca941f936934328") + struct.pack("<III", 28 + 48, 0, 48) + bytes(48)
    )
    (entry,) = init.parse_signature_database(hashes)
    assert entry.startswith("c1c41626-504c-4092-aca9-41f936934328:")


@pytest.mark.parametrize(
    ("changes", "seen"),
    [({"schema": 2}, "policy schema 2"), ({"mode": "debug"}, "mode debug"), ({"mode": None}, "mode None")],
)
def test_a_policy_for_another_program_is_a_crash(changes: dict[str, object], seen: str) -> None:
    with pytest.raises(ValueError, match=seen):
        init.parse_policy(policy_json(**changes), b"id", {})


@pytest.mark.parametrize("cut", [1, 15, 27])
def test_a_signature_list_cut_short_is_a_fault(cut: int) -> None:
    with pytest.raises(ValueError, match="cut short"):
        init.parse_signature_database(signature_list(b"one") + bytes(cut))


@given(st.binary(max_size=200))
def test_signature_database_of_anything_ends(data: bytes) -> None:
    try:
        init.parse_signature_database(data)
    except (ValueError, struct.error) as error:
        assert str(error)


def test_signature_lists_without_an_end_are_faults() -> None:
    endless = bytes(16) + struct.pack("<III", 0, 0, 17)
    with pytest.raises(ValueError, match="impossible sizes"):
        init.parse_signature_database(endless)


def verity(folder: Path, blocks: int, *options: str) -> tuple[Path, str]:
    """Make a layer file of that many data blocks with veritysetup: its path and root hash."""
    layer = folder / f"layer-{blocks}"
    layer.write_bytes(bytes(blocks * 4096))
    place = ["--data-blocks", str(blocks), "--hash-offset", str(blocks * 4096)]
    command = ["veritysetup", "format", *place, *options, str(layer), str(layer)]
    out = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    found = re.search(r"Root hash:\s+([0-9a-f]{64})", out)
    assert found
    return layer, found[1]


@pytest.mark.parametrize("blocks", [1, 2, 127, 128, 129, 1000, 16384, 16385])
def test_data_blocks_follow_from_the_size_alone(
    need: Callable[..., None], tmp_path: Path, blocks: int
) -> None:
    need("veritysetup")
    layer, _ = verity(tmp_path, blocks)
    assert init.verity_data_blocks(layer.stat().st_size) == blocks
    for size in (layer.stat().st_size + 4096 * 200, layer.stat().st_size - 1):
        try:
            assert init.verity_data_blocks(size) != blocks
        except init.Refused as refused:
            assert refused.check == "LAYER-SIZE"


@given(st.integers(1, 1 << 40))
def test_no_two_sizes_have_the_same_answer(blocks: int) -> None:
    size = (blocks + 1 + init.verity_tree_blocks(blocks)) * init.BLOCK
    assert init.verity_data_blocks(size) == blocks


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 12287, 12289])
def test_sizes_that_no_layer_has(size: int) -> None:
    with pytest.raises(init.Refused, match="LAYER-SIZE"):
        init.verity_data_blocks(size)


def test_verity_superblock_gives_the_salt_and_nothing_else(
    need: Callable[..., None], tmp_path: Path
) -> None:
    need("veritysetup")
    layer, _ = verity(tmp_path, 10, "--salt", "ab" * 32)
    block = layer.read_bytes()[10 * 4096 :][:512]
    assert init.parse_verity_salt(block, 10) == "ab" * 32
    places = {
        "magic": 0,
        "version": 8,
        "type": 12,
        "algorithm": 32,
        "data": 64,
        "hash": 68,
        "blocks": 72,
        "salt": 80,
        "tail": 88 + 40,
    }
    for name, offset in places.items():
        changed = bytearray(block)
        changed[offset + (1 if name == "salt" else 0)] ^= 0xFF
        with pytest.raises(init.Refused, match="LAYER-SUPERBLOCK"):
            init.parse_verity_salt(bytes(changed), 10)


def live_seal(blocks: int = 77, signature: bytes = b"sig", length: int | None = None) -> bytes:
    root, size = b"\xab" * 32, len(signature) if length is None else length
    checksum = init.live_seal_checksum(blocks, root, signature)
    return (
        init.LIVE_SEAL.pack(init.LIVE_SEAL_MAGIC, 1, size, blocks, root, checksum) + signature + bytes(100)
    )


def test_live_seal() -> None:
    assert init.parse_live_seal(live_seal()) == init.LiveSeal(77, "ab" * 32, b"sig")
    for spoiled in (
        live_seal(length=0),
        live_seal(length=104),
        live_seal(blocks=0),
        live_seal(blocks=1 << 41),
        live_seal(signature=b"", length=3),
    ):
        with pytest.raises(init.Refused, match="STORE-SEAL"):
            init.parse_live_seal(spoiled)


def test_each_flipped_bit_of_a_seal_is_seen() -> None:
    seal = live_seal()
    for offset in range(len(seal)):
        with pytest.raises(init.Refused, match="STORE-SEAL"):
            init.parse_live_seal(seal[:offset] + bytes([seal[offset] ^ 1]) + seal[offset + 1 :])


def test_each_flipped_bit_of_a_partition_table_is_seen() -> None:
    for offset in (*range(512, 1024), *range(1024, 1024 + 256), 1024 + 16383):
        with pytest.raises(init.Refused, match="GPT-"):
            read_gpt(GOOD[:offset] + bytes([GOOD[offset] ^ 1]) + GOOD[offset + 1 :])


def test_the_salt_of_a_live_store_tells_size_and_purpose() -> None:
    assert len({init.live_store_salt(blocks) for blocks in range(1, 1000)}) == 999
    assert init.live_store_salt(5) == hashlib.sha256(b"mosinit live store\0\5" + bytes(7)).hexdigest()


def image(*layers: dict[str, object], **more: object) -> bytes:
    return json.dumps({"schemaVersion": 2, "layers": layers, **more}).encode()


def layer(**changes: object) -> dict[str, object]:
    root = {init.ROOT_HASH_ANNOTATIONS[0]: "cd" * 32}
    plain = {"mediaType": "x/y", "digest": "sha256:" + "ab" * 32, "size": 12288, "annotations": root}
    return {**plain, **changes}


TWO_ROOTS = dict(zip(init.ROOT_HASH_ANNOTATIONS, ("ab" * 32, "cd" * 32), strict=True))


def test_image() -> None:
    uki = layer(mediaType=init.UKI_MEDIA_TYPE, annotations={})
    data = image(layer(), uki, layer(), annotations={init.UKI_ID_ANNOTATIONS["live"]: "11", "x": "y"})
    one = init.Layer("x/y", "sha256:" + "ab" * 32, 12288, "cd" * 32)
    assert init.parse_image(data) == init.Image((one, one), {"live": "11"})


@pytest.mark.parametrize(
    ("check", "data"),
    [
        ("IMAGE-FORMAT", b"{"),
        ("IMAGE-FORMAT", b"[]"),
        ("IMAGE-FORMAT", b"[" * 100_000),
        ("IMAGE-FORMAT", image(layer()).replace(b'"layers"', b'"layers": [], "layers"')),
        ("IMAGE-FORMAT", image(layer()) + b"x"),
        ("IMAGE-FORMAT", image()),
        ("IMAGE-FORMAT", image(schemaVersion=1)),
        ("IMAGE-FORMAT", b'{"schemaVersion":2,"layers":"x"}'),
        ("IMAGE-FORMAT", image(layer(digest="sha256:../../etc"))),
        ("IMAGE-FORMAT", image(layer(digest="sha512:" + "ab" * 32))),
        ("IMAGE-FORMAT", image(layer(size=-1))),
        ("IMAGE-FORMAT", image(layer(size=True))),
        ("IMAGE-FORMAT", image(layer(size="12288"))),
        ("IMAGE-FORMAT", image(layer(annotations=[]))),
        ("IMAGE-FORMAT", image(layer(annotations={"a": 1}))),
        ("IMAGE-FORMAT", image(*[layer()] * 1025)),
        ("LAYER-ROOTHASH", image(layer(annotations={}))),
        ("IMAGE-FORMAT", image(layer(annotations=None))),
        ("LAYER-ROOTHASH", image(layer(annotations={init.ROOT_HASH_ANNOTATIONS[0]: "CD" * 32}))),
        ("LAYER-ROOTHASH", image(layer(annotations=TWO_ROOTS))),
    ],
)  # fmt: skip
def test_image_faults(check: str, data: bytes) -> None:
    with pytest.raises(init.Refused) as refused:
        init.parse_image(data)
    assert refused.value.check == check


def test_tpm_command_bytes() -> None:
    k = FakeMachine()
    k.banks = ["sha256"]
    init.extend_pcr(k, init.MEASURED, b"word")
    expected = "8002 00000041 00000182 0000000b 00000009 40000009 0000 00 0000 00000001 000b"
    digest = hashlib.sha256(b"word").hexdigest()
    assert [op[1] for op in k.ops if op[0] == "tpm"][-1] == bytes.fromhex(expected.replace(" ", "") + digest)


def test_the_root_is_planned() -> None:
    layers = ("/l/2", "/l/1")
    assert init.plan_root(layers, "all") == [init.Overlay("/sysroot", layers, "/scratch-writes/root")]
    root = init.Overlay("/sysroot", layers, "")
    assert init.plan_root(layers, "none") == [root]
    assert init.plan_root(layers, "etc") == [
        root,
        init.Overlay("/sysroot/etc", ("/sysroot/etc",), "/scratch-writes/etc"),
    ]
