"""A live machine that installs itself from a registry, saved where it asks to be enrolled.

It began in setup mode, with boot entries of others in its firmware. From where
it is saved it goes on with disks that are good or bad, each time with the same answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from driven import Driven, started
from world import World

from mosinit import demo, disk, firmware, hostfs, init, layout, machine, vm
from mosinit.machine import VARIABLES, Hardware
from tests import registries
from tests.test_power_cut import Disk

MIB = init.MIB
TARGET, OTHER, TWIN = 1, 2, 3  # numbers of disks; 0 is the medium
SERIAL = f"extra{TARGET}"  # of the disk that is installed on
BY_ID = "/dev/disk/by-id/usb-QEMU_QEMU_HARDDISK_extra1-0:0"
HARDWARE = Hardware(extra_bus="usb", network="user")
OTHER_BYTES = 16 * MIB
NAME = "installs"
SECONDS = 600.0  # for an installation
STREAMED = 16 * MIB  # of a release: enough to be in the midst of it

# What others put into this firmware, and what follows their device path.
LOADER = "\\EFI\\other\\grubx64.efi\0".encode("utf-16-le")


def _foreign(label: str, path: bytes) -> bytes:
    """Encode an EFI_LOAD_OPTION of somebody's, with data of his own behind it (UEFI 2.10, 3.1.3)."""
    return struct.pack("<IH", 1, len(path)) + f"{label}\0".encode("utf-16-le") + path + b"his own data"


FOREIGN = {
    0x0042: _foreign(
        "another system", struct.pack("<BBH", 4, 4, 4 + len(LOADER)) + LOADER + b"\x7f\xff\x04\0"
    ),
    0x0007: _foreign("a third one", b"\x7f\xff\x04\0"),
}


def partitions(image: Path) -> tuple[init.Partition, ...]:
    """Return the partitions of a disk."""
    with image.open("rb") as file:
        head = file.read(1024 + 16384)
    return init.parse_gpt(head[512:1024], head[1024:], 512, image.stat().st_size // 512)


def planted() -> tuple[firmware.Variable, ...]:
    """Return the firmware's boot entries before the machine is first switched on.

    None of an older mosinit is among them: OVMF drops what leads to no disk, before any system runs.
    """
    order = struct.pack(f"<{len(FOREIGN)}H", *FOREIGN)
    values = {"BootOrder": order} | {f"Boot{number:04X}": value for number, value in FOREIGN.items()}
    return tuple(firmware.Variable(name, init.EFI_GLOBAL, value) for name, value in values.items())


def boot_variables(state: Path) -> tuple[list[int], dict[int, bytes]]:
    """Read the order of boot entries and the entries from a machine's firmware."""
    from virt.firmware.varstore import edk2

    found = {
        name: bytes(each.data)
        for name, each in edk2.Edk2VarStore(str(state / VARIABLES)).get_varlist().items()
    }
    order = found["BootOrder"]
    names = [name for name in found if len(name) == 8 and name.startswith("Boot")]
    entries = {int(name[4:], 16): found[name] for name in names if name[4:].isalnum() and name != "BootNext"}
    return list(struct.unpack(f"<{len(order) // 2}H", order)), entries


# --- Disks -------------------------------------------------------------------------------------------------


def words_of(number: int, image: Path, *filters: Mapping[str, object], serial: str = "") -> tuple[str, ...]:
    """Return QEMU's words for one more disk on the USB; `filters` lie on its file, from below."""
    option, node, device, words = machine._disk(number, image, HARDWARE.extra_bus, False)
    lower = cast("dict[str, object]", json.loads(node))
    nodes = [lower]
    for step, each in enumerate(filters):
        lower["node-name"] = f"disk{number}-{step}"
        below = "image" if each["driver"] == "blkdebug" else "file"
        lower = {**each, "node-name": f"disk{number}", below: lower["node-name"]}
        nodes.append(lower)
    blocks = [word for each in nodes for word in (option, json.dumps(each))]
    return (*blocks, device, words.replace(f"serial=extra{number}", f"serial={serial or f'extra{number}'}"))


def errors(*places: int) -> dict[str, object]:
    """Return a filter that fails each write which touches one of these places, in bytes."""
    rules = [
        {"event": "none", "iotype": "write", "errno": 5, "sector": place // 512, "once": False}
        for place in places
    ]
    return {"driver": "blkdebug", "inject-error": rules}


def recorded(log: Path) -> dict[str, object]:
    """Return a filter that records every write."""
    log.touch()
    return {
        "driver": "blklogwrites", "log-sector-size": 512,
        "log": {"driver": "file", "filename": str(log)},
    }  # fmt: skip


def empty_disk(folder: Path) -> Path:
    """Make a disk to install on."""
    image = folder / "target.raw"
    with image.open("wb") as file:
        file.truncate(layout.SMALLEST)
    return image


# --- The machine -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking:
    """The machine: its medium, where it was saved, what it asks and what it is answered."""

    world: World
    folder: Path
    medium: Path
    registry: registries.Real
    state: Path
    saved: vm.Saved
    answer: bytes
    other: Path  # a disk of somebody's

    @contextlib.asynccontextmanager
    async def goes_on(self, folder: Path, *words: str, cold: bool = False) -> AsyncIterator[Driven]:
        """Let it go on with this disk to install on, where it asks to be enrolled; its STATE is made in
        `folder`. If it has to see another disk from the start, or with --cold, it is switched on.
        """
        state, saved = folder / "state", None if cold or self.world.cold else self.saved.folder
        state.mkdir()
        shutil.copyfile(self.saved.folder / VARIABLES, state / VARIABLES)
        medium, other = (self.copied(each, folder) for each in (self.medium, self.other))
        words = (*words, *words_of(OTHER, other))
        async with started(self.world.host, HARDWARE, [medium], state, saved, words) as driven:
            yield driven

    def copied(self, image: Path, folder: Path) -> Path:
        """Return a copy of a disk: a running machine has its disks for itself."""
        self.world.host.run(["cp", "--sparse=always", image, folder / image.name])
        return folder / image.name

    async def enroll(self, driven: Driven) -> None:
        """Answer what it asks."""
        answer = self.answer
        if self.world.cold:
            answer = await asyncio.to_thread(enroller(self.world, driven.folder), await driven.asks())
        await driven.answer(answer)


def enroller(world: World, folder: Path) -> Callable[[bytes], bytes]:
    """Return the side of an organisation that has not seen any machine yet."""
    keyset = folder / "keys"
    shutil.copytree(world.keyset.folder, keyset, ignore=shutil.ignore_patterns("machines"))
    return demo.enroller(world.host, keyset, folder)


def ends(driven: Driven) -> dict[str, Any] | None:
    """Return how the installation ended, if it did."""
    messages = [cast("dict[str, Any]", json.loads(line)) for line in driven.told]
    return next((each for each in messages if each.get("target") == "installed"), None)


async def end_of(driven: Driven) -> dict[str, Any]:
    """Wait for the end of the installation."""
    await driven.until(lambda: ends(driven) is not None, "end of the installation", SECONDS)
    return cast("dict[str, Any]", ends(driven))


async def in_stream(driven: Driven) -> None:
    """Wait until the release is being copied, and some of it has reached the disk."""
    words = b"copying the release"
    await driven.until(lambda: words in driven.console or ends(driven) is not None, repr(words), SECONDS)
    begin = await _written(driven)
    while await _written(driven) < begin + STREAMED:
        assert ends(driven) is None, ends(driven)
        await asyncio.sleep(0.05)


async def _written(driven: Driven) -> int:
    answer = cast("list[dict[str, Any]]", await driven.machine.command("query-blockstats"))
    stats = next(row["stats"] for row in answer if row.get("node-name") == f"disk{TARGET}")
    return cast(int, stats["wr_bytes"])


def starts_nothing(image: Path) -> None:
    """See that firmware finds nothing to start on a disk, and the same medium takes it without asking."""
    looked = Disk(image, SERIAL)
    assert looked.loader() is None
    assert looked.asks() == ""


@contextlib.contextmanager
def asking(world: World) -> Iterator[Asking]:
    """Make the machine: switched on in setup mode, it is refused, gets its keys, boots, and asks."""
    folder = world.folder / "asking"
    folder.mkdir()
    shutil.copytree(hostfs.build(world.host, folder), world.folder / f"{NAME}-hostfs")
    release = world.release(NAME, None)
    plain = folder / "plain.raw"
    disk.live_medium(world.host, world.bootable.ukis["live"].path, release, world.keyset, plain)
    authority = registries.Authority(folder)
    with registries.real_registry(folder, authority, login=False) as registry:
        push(world, release, registry, authority)
        port = registry.address.partition(":")[2]
        answers = f"version: 1\ndisk: {BY_ID}\nsource: docker://10.0.2.2:{port}/{NAME}:7\n"
        medium = demo.add_answers(world.host, plain, folder / "medium.raw", answers)
        esp = f"{medium}@@{MIB}"
        world.host.run(["mcopy", "-i", esp, authority.path, "::mosinit/registry-ca.pem"])
        other = folder / "other.raw"
        other.write_bytes(os.urandom(OTHER_BYTES))
        target = empty_disk(folder)
        state = folder / "state"
        firmware.empty(world.host, state / VARIABLES, planted())
        options = vm.BootOptions(
            medium, state, until="request", timeout=600, setup_mode=True,
            hardware=Hardware(**{**vars(HARDWARE), "extra_disks": (target, other)}),
        )  # fmt: skip
        saved = vm.save(world.host, options, folder / "saved")
        answer = enroller(world, folder)(saved.request)
        yield Asking(world, folder, medium, registry, state, saved, answer, other)


def push(world: World, release: Path, registry: registries.Real, authority: registries.Authority) -> None:
    """Send a release to the registry, as people mirror one."""
    folder = authority.folder / "certs.d"
    folder.mkdir()
    shutil.copyfile(authority.path, folder / "ca.crt")
    target = f"docker://{registry.address}/{NAME}:7"
    copy = ["skopeo", "copy", "--quiet", "--all", "--preserve-digests", f"--dest-cert-dir={folder}"]
    subprocess.run([*copy, f"oci:{release}", target], check=True)
