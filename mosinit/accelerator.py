"""Whether this host runs machines in hardware: found out once per boot of the host, by running firmware."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from mosinit import firmware, tools
from mosinit.host import Failure, Host
from mosinit.machine import VARIABLES, Hardware, powered

PROBE_SECONDS = 20.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
KVM = Path("/dev/kvm")


def choose(host: Host) -> str:
    """Return "kvm" if the host's KVM runs our firmware, else "tcg" (QEMU translates every instruction).

    That /dev/kvm exists says little: inside many virtual machines it cannot do System Management Mode.
    """
    if not KVM.exists():
        return "tcg"
    answer = tools.own_cache() / f"accelerator-{BOOT_ID.read_text().strip()}-{tools.key()}"
    if answer.is_file() and (known := answer.read_text()) in ("kvm", "tcg"):
        return known
    found = "kvm" if _firmware_runs(host) else "tcg"
    host.say(
        "KVM runs the firmware"
        if found == "kvm"
        else "KVM does not run the firmware here: QEMU translates (TCG)"
    )
    for old in answer.parent.glob("accelerator-*"):
        old.unlink(missing_ok=True)
    with host.replacing(answer) as fresh:
        fresh.write_text(found)
    return found


def _firmware_runs(host: Host) -> bool:
    with host.scratch() as folder:
        shutil.copyfile(firmware.TEMPLATE, folder / VARIABLES)
        try:
            return asyncio.run(_firmware_speaks(folder))
        except (Failure, TimeoutError):
            return False


async def _firmware_speaks(folder: Path) -> bool:
    async with powered(Hardware(memory=256, tpm=False), [], folder, "kvm") as machine:
        await machine.go()
        async with asyncio.timeout(PROBE_SECONDS):
            return bool(await asyncio.get_running_loop().sock_recv(machine.console, 1))
