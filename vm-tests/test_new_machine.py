"""From a machine that trusts nobody to one that boots from its own disk: keys are enrolled in the medium's
menu, the verified live system installs from a registry. And what may happen to that: disks that fail or
vanish, a cable that is pulled, the power that goes at some write.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import subprocess
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from driven import Beside
from installing import (
    FOREIGN,
    SERIAL,
    TARGET,
    TWIN,
    Asking,
    boot_variables,
    empty_disk,
    end_of,
    errors,
    in_stream,
    partitions,
    recorded,
    starts_nothing,
    words_of,
)

from mosinit import bootentry, disk, layout, vm
from mosinit.machine import VARIABLES, Hardware
from tests import tpms
from tests.test_power_cut import Disk, pieces, read_log

pytestmark = pytest.mark.cold

PLANNED = layout.make_plan(layout.Disk(Path("/dev/x"), "x", layout.SMALLEST, 512, False, "", "", ""))
CONFIG = PLANNED.named("machine-config").start


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- A machine in setup mode -------------------------------------------------------------------------


def test_a_machine_in_setup_mode_is_refused_and_gets_its_keys(asking: Asking) -> None:
    console = (asking.state / "console.log").read_text(errors="replace")
    refused = console.index('"failed": "SB-MODE"')
    chosen = console.index("Enroll Secure Boot keys: mosinit", refused)
    enrolled = console.index("successfully enrolled", chosen)
    assert console.index('"result": "pivoted"') > enrolled
    stored = (asking.saved.folder / VARIABLES).read_bytes()
    for role in disk.ENROLMENT.values():
        assert asking.world.keyset.certificate(role).public_bytes(Encoding.DER) in stored


def test_the_live_system_then_passes_what_it_was_refused_by(asking: Asking) -> None:
    console = (asking.state / "console.log").read_text(errors="replace")
    line = next(line for line in console.splitlines() if '"result": "pivoted"' in line)
    report = cast("dict[str, Any]", json.loads(line.partition("mosinit-report: ")[2]))
    passed = {check["id"] for check in report["checks"]}
    assert passed >= {"SB-MODE", "SB-OFF", "SB-DB", "SB-KEYRING"}


def test_firmware_keeps_what_was_planted_up_to_the_installation(asking: Asking) -> None:
    order, entries = boot_variables(asking.saved.folder)
    assert {number: entries[number] for number in FOREIGN} == FOREIGN
    assert [number for number in order if number in FOREIGN] == list(FOREIGN)


# --- Two stories beside each other: one that ends well, and one whose disk vanishes -------------------


async def cable_is_pulled(asking: Asking, folder: Path) -> dict[str, Any]:
    """The network goes in mid-stream, and the registry restarts meanwhile; every write is recorded."""
    image = empty_disk(folder)
    target = words_of(TARGET, image, recorded(folder / "log"))
    async with asking.goes_on(folder, *target) as machine:
        await asking.enroll(machine)
        await in_stream(machine)
        await machine.machine.command("set_link", name="net", up=False)
        await asyncio.to_thread(asking.registry.stop)
        await asyncio.to_thread(asking.registry.start)
        await machine.machine.command("set_link", name="net", up=True)
        return await end_of(machine)


async def disk_vanishes(asking: Asking, folder: Path) -> dict[str, Any]:
    """The disk is unplugged in mid-stream."""
    async with asking.goes_on(folder, *words_of(TARGET, empty_disk(folder))) as machine:
        await asking.enroll(machine)
        await in_stream(machine)
        await machine.machine.command("device_del", id=f"blk{TARGET}")
        await machine.happens("DEVICE_DELETED")
        return await end_of(machine)


Ended = tuple[Path, "Future[dict[str, Any]]"]


def untouched(asking: Asking, folder: Path) -> None:
    """See that somebody's disk and the medium are what they were, to the byte."""
    for image in (asking.other, asking.medium):
        assert sha256(folder / image.name) == sha256(image), image.name


@pytest.fixture(scope="module")
def vanished(asking: Asking, beside: Beside) -> Ended:
    """A machine whose disk vanishes."""
    folder = asking.folder / "vanishes"
    folder.mkdir()
    return folder, beside.start(disk_vanishes(asking, folder))


@pytest.fixture(scope="module")
def done(asking: Asking, beside: Beside, vanished: Ended) -> tuple[Path, dict[str, Any]]:
    """A machine that is installed in spite of all, beside a disk of somebody's."""
    folder = asking.folder / "pulled"
    folder.mkdir()
    ended = beside.start(cable_is_pulled(asking, folder)).result()
    assert "error" not in ended, ended
    return folder, ended["installed"]


def test_a_pulled_cable_is_waited_for_and_other_disks_stay_as_they_are(
    asking: Asking, done: tuple[Path, dict[str, Any]]
) -> None:
    folder, installed = done
    untouched(asking, folder)
    assert installed["source"].startswith("docker://10.0.2.2:")
    partial = [status for method, path, status in asking.registry.requests() if "/blobs/" in path]
    assert 206 in partial, "nothing was resumed"


def test_boot_entries_of_others_stay_and_ours_is_the_first(
    asking: Asking, done: tuple[Path, dict[str, Any]]
) -> None:
    folder, installed = done
    order, entries = boot_variables(asking.saved.folder)
    after, now = boot_variables(folder / "state")
    ours = int(installed["boot entry"].removeprefix("Boot"), 16)
    assert ours not in entries
    entry, (esp, *_) = bootentry.parse(now[ours]), partitions(folder / "target.raw")
    assert entry == bootentry.Entry(1, esp.start // 512, esp.size // 512, esp.uuid)
    assert after == [ours, *(number for number in order if number != ours)]
    assert {number: now[number] for number in now if number != ours} == entries
    assert {number: now[number] for number in FOREIGN} == FOREIGN


def test_no_moment_of_an_installation_leaves_half_a_machine(
    asking: Asking, done: tuple[Path, dict[str, Any]]
) -> None:
    """Each write to tables and boot partition, as the machine's kernel made them; then the first disk that
    firmware starts is started, in the firmware as it was then.
    """
    folder, _ = done
    final, disk = (Disk(image, SERIAL) for image in (folder / "target.raw", empty_disk(folder / "state")))
    loader, machine, checked, complete = final.loader(), final.asks(), 0, 0
    assert loader
    for write in read_log(folder / "log"):
        for sector, data in pieces(write, disk):
            disk.put(sector, data)
            if layout.EDGES + layout.ESP_BYTES <= sector * 512 < disk.size - layout.EDGES:
                continue
            checked += 1
            found = disk.loader()
            assert found in ((None, loader) if complete == 0 else (loader,))
            if found is None:
                assert disk.asks() == "" or disk.complete()
                continue
            # What may have started is never taken without a word, whatever became of its TPM.
            assert disk.asks() == machine
            complete += 1
            if complete == 1:
                subprocess.run(["cp", "--sparse=always", disk.image, folder / "first.raw"], check=True)
    assert (checked > 100, complete > 0) == (True, True)
    assert (disk.asks(), disk.complete(), bool(machine)) == (machine, False, True)
    state = folder / "state"
    shutil.copyfile(asking.saved.folder / VARIABLES, state / VARIABLES)
    options = vm.BootOptions(folder / "first.raw", state, until="pivoted", hardware=Hardware(bus="usb"))
    outcome = vm.boot(asking.world.host, options)
    assert outcome.status == 0, f"{outcome.reason}\n{outcome.console.read_text(errors='replace')[-3000:]}"
    assert outcome.report
    assert outcome.report["mode"] == "run"


def test_a_disk_that_vanishes_ends_the_installation_with_one_line(asking: Asking, vanished: Ended) -> None:
    folder, story = vanished
    failed(folder, story.result())
    starts_nothing(folder / "target.raw")
    untouched(asking, folder)
    # The next boot of the medium makes a new request, which takes nobody's consent.
    assert passwords(folder) == dict.fromkeys(("ownerAuthSet", "endorsementAuthSet", "lockoutAuthSet"), "0")


def passwords(folder: Path) -> dict[str, str]:
    """Return which hierarchies of a machine's TPM have a password."""
    copy = folder / "tpm"
    shutil.copytree(folder / "state/tpm", copy)
    with tpms.swtpm(copy) as tpm:
        told = tpm.run("tpm2_getcap", "properties-variable").decode()
    rows = [line.strip().partition(":") for line in told.splitlines()]
    return {name: value.strip() for name, _, value in rows if name.endswith("AuthSet")}


def failed(folder: Path, ended: dict[str, Any]) -> str:
    """See that an installation failed, with one line, and left no boot entry; return what it said."""
    words = ended["error"]
    assert isinstance(words, str)
    assert "\n" not in words
    # Those that firmware itself makes, one for each disk, are others where a disk more is plugged in.
    order, entries = boot_variables(folder / "state")
    assert {number: entries[number] for number in FOREIGN} == FOREIGN
    assert [number for number in order if number in FOREIGN] == list(FOREIGN)
    assert not any(bootentry.parse(entry) for entry in entries.values())
    return words


# --- A disk that cannot be written at some place ------------------------------------------------------


@pytest.mark.parametrize(("what", "place"), [("table", 512), ("volume", CONFIG)])
def test_a_write_error_ends_the_installation_with_one_line(
    asking: Asking, tmp_path: Path, what: str, place: int
) -> None:
    async def story() -> dict[str, Any]:
        image = empty_disk(tmp_path)
        async with asking.goes_on(tmp_path, *words_of(TARGET, image, errors(place))) as machine:
            await asking.enroll(machine)
            return await end_of(machine)

    assert "/dev/sda" in failed(tmp_path, asyncio.run(story()))
    starts_nothing(tmp_path / "target.raw")
    untouched(asking, tmp_path)


# --- Two disks that cannot be told from each other ----------------------------------------------------


def test_two_equal_disks_are_refused_and_stay_as_they_are(asking: Asking, tmp_path: Path) -> None:
    image, twin = empty_disk(tmp_path), empty_disk(asking.folder)
    disks = (*words_of(TARGET, image), *words_of(TWIN, twin, serial=SERIAL))

    async def story() -> dict[str, Any]:
        async with asking.goes_on(tmp_path, *disks, cold=True) as machine:
            return await end_of(machine)

    words = failed(tmp_path, asyncio.run(story()))
    assert len(set(re.findall("/dev/sd[abc]", words))) == 2, words
    assert (image.stat().st_blocks, twin.stat().st_blocks) == (0, 0)
    untouched(asking, tmp_path)
