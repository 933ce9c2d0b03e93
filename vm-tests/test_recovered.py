"""A machine that no longer opens is brought back on the live medium, and boots from its disk again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import probed
import pytest
from installed import RECOVERY, Installed, place, put_tpm
from test_installed_firmware import check_pivoted
from world import GOOD_HOSTFS, World, make_tar

from mosinit import approve, disk, enroll, firmware, hostfs, init, luks, vm
from mosinit.host import Host
from mosinit.machine import VARIABLES, Hardware
from tests import sealed

pytestmark = pytest.mark.cold
SECONDS = 600.0

SERVICE = b"""[Unit]
After=multi-user.target
Before=mosinit-report.service

[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/usr/bin/python3 -B /usr/lib/recovery/recovery.py
"""


def live(world: World, story: str) -> Path:
    """Make a live medium that recovers the machine beside it."""
    given = {"recovery": RECOVERY.decode(), "story": story}
    files = {
        "usr/lib/recovery/recovery.py": Path(__file__).with_name("recovery.py").read_bytes(),
        "usr/lib/recovery/given.json": json.dumps(given).encode(),
        "usr/lib/systemd/system/recovery.service": SERVICE,
        "usr/lib/systemd/system/multi-user.target.d/recovery.conf": b"[Unit]\nWants=recovery.service\n",
    }
    layout = world.folder / f"{story}-hostfs"
    shutil.copytree(hostfs.build(world.host, world.folder / "debian"), layout)
    probed.add_layer(layout, make_tar(files))
    target = world.folder / f"{story}-live.raw"
    uki = world.bootable.ukis["live"].path
    disk.live_medium(world.host, uki, world.release(story, None), world.keyset, target)
    return target


@pytest.fixture(scope="module")
def shut(world: World) -> Installed:
    """An installed machine."""
    return Installed(world, world.folder / "shut", world.release("opens", GOOD_HOSTFS)).make()


def copy(made: Installed, folder: Path) -> Installed:
    """Copy a machine with its disk."""
    copied = replace(made, folder=folder / "machine")
    copied.material, copied.foreign = made.material, made.foreign
    shutil.copytree(made.state, copied.state)
    made.world.host.run(["cp", "--sparse=always", made.disk, copied.disk])
    return copied


def organisation(world: World, folder: Path, told: list[dict[str, Any]]) -> Any:
    """Return the other end of the exchange port: enrols, approves, listens."""

    def answer(line: bytes) -> bytes:
        asked = json.loads(line)
        if asked["type"] == "request":
            (folder / "request.json").write_bytes(line)
            places = (folder / "request.json", world.keyset, folder / "answer.json", folder / "machines")
            enroll.enroll(world.host, *places)
            return json.dumps(json.loads((folder / "answer.json").read_bytes())).encode()
        if asked["type"] == "event log":
            (folder / "log").write_bytes(bytes.fromhex(asked["log"]))
            options = approve.Options([folder / "log"], epoch=init.MAX_EPOCH)
            approve.approve(world.host, world.keyset, folder / "approvals.json", options)
            return json.dumps(json.loads((folder / "approvals.json").read_bytes())).encode()
        told.append(asked["told"])
        return b"{}"

    return answer


def on_the_medium(machine: Installed, story: str, folder: Path) -> dict[str, Any]:
    """Boot the live medium beside the machine's disk; return what was said there."""
    told: list[dict[str, Any]] = []
    options = vm.BootOptions(
        live(machine.world, story), machine.state, until="multi-user", timeout=SECONDS,
        exchange=organisation(machine.world, folder, told), hardware=Hardware(extra_disks=(machine.disk,)),
    )  # fmt: skip
    outcome = vm.boot(machine.world.host, options)
    console = outcome.console.read_text(errors="replace")[-3000:]
    assert (outcome.status, len(told)) == (0, 1), outcome.reason + console
    assert "error" not in told[0], told[0]
    return told[0]


def boots(machine: Installed) -> vm.Outcome:
    """Boot the machine from its disk."""
    return vm.boot(machine.world.host, machine.options())


def test_a_new_tpm_and_no_boot_partition(shut: Installed, tmp_path: Path) -> None:
    machine = copy(shut, tmp_path)
    with sealed.copy_of(machine.material, tmp_path / "tpm") as tpm:
        tpm.clear()
    put_tpm(tmp_path / "tpm", machine.state)
    begin, size = place(machine, "esp")
    before = elsewhere(machine)
    with machine.disk.open("r+b") as file:
        file.seek(begin)
        file.write(bytes(size))
    told = on_the_medium(machine, "recover", tmp_path)
    print(json.dumps({name: each["seconds"] for name, each in told.items()}))
    assert [each["status"] for each in told.values()] == [0, 0, 1, 0, 0], told
    assert "opens neither config nor store" in told["wrong key"]["said"]
    plan, done = told["plan"]["result"], told["recover"]["result"]
    assert (plan["will do"], plan["found"]) == (done["will do"], done["found"])
    assert "make its FAT anew" in str(done["will do"])
    assert done["left"] == []
    # The recovery key that was typed is the machine's no more; the organisation has the new one.
    header = header_of(machine)
    assert header.slots == (0, 1)
    (filed,) = (tmp_path / "machines").glob("*/recovery.cms")
    record = enroll.open_recovery(filed, machine.world.keyset)
    assert luks.read_volume_key(header, 1, record.recovery_key.encode())
    assert not any(luks.read_volume_key(header, slot, RECOVERY) for slot in header.slots)
    assert elsewhere(machine) == before
    report = check_pivoted(boots(machine))
    assert report["sequence"] == machine.sequence


def elsewhere(machine: Installed) -> bytes:
    """Return what is nobody's to change: before the first partition, and where scratch begins."""
    begin, _ = place(machine, "scratch")
    with machine.disk.open("rb") as file:
        head = file.read(init.MIB)
        file.seek(begin)
        return head + file.read(init.MIB)


def header_of(machine: Installed) -> init.LuksHeader:
    """Read config's header."""
    begin, _ = place(machine, "config")
    part = machine.folder / "config"
    with machine.disk.open("rb") as file:
        file.seek(begin)
        part.write_bytes(file.read(init.LUKS_DATA + init.BLOCK))
    return luks.read_header(Host(), part, "config")


def test_another_dbx(shut: Installed, tmp_path: Path) -> None:
    machine = copy(shut, tmp_path)
    world = machine.world
    head, entry = firmware.EMPTY_DBX[:28], firmware.EMPTY_DBX[28:]
    size = (len(head) + 2 * len(entry)).to_bytes(4, "little")
    longer = head[:16] + size + head[20:] + entry + entry[:16] + bytes(range(32))
    dbx = firmware.Variable("dbx", init.EFI_IMAGE_SECURITY, longer, firmware.NV_BS_RT_TIMED)
    trusted = firmware.certificates_of_keyset(world.keyset.folder)
    (machine.state / VARIABLES).unlink()
    firmware.enroll(world.host, machine.state / VARIABLES, trusted, variables=(dbx,))
    before = header_of(machine)
    told = on_the_medium(machine, "reseal", tmp_path)
    print(json.dumps({name: each["seconds"] for name, each in told.items()}))
    assert [each["status"] for each in told.values()] == [1, 0, 0], told
    assert "TPM-POLICY" in str(told["ask"]["result"]["found"])
    assert told["again"]["result"]["found"] == []
    after = header_of(machine)
    assert before.tokens and after.tokens
    assert after.tokens._replace(approvals={}) == before.tokens._replace(approvals={})
    assert len(after.tokens.approvals) == 2
    assert after.key_slots == before.key_slots
    assert check_pivoted(boots(machine))["sequence"] == machine.sequence
