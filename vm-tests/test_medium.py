"""The medium in machines of other make, and what somebody lays beside the UKI. Each is a cold boot."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from world import World, check_refused, make_cpio

from mosinit import disk, init, vm
from mosinit.machine import Hardware

pytestmark = pytest.mark.cold

ADDON_STUB = Path("/usr/lib/systemd/boot/efi/addonx64.efi.stub")
BESIDE = f"{disk.UKI_PLACE}.extra.d"


def with_extras(world: World, medium: Path, name: str, extras: dict[str, bytes]) -> Path:
    """Copy a medium and lay files onto its EFI system partition."""
    target = world.folder / f"{name}.raw"
    shutil.copyfile(medium, target)
    esp = f"{target}@@{init.MIB}"
    folders = {str(parent) for path in extras for parent in Path(path).parents}
    for folder in sorted(folders - {".", "EFI", "EFI/Linux", "loader"}, key=len):
        world.host.run(["mmd", "-D", "s", "-i", esp, f"::{folder}"])
    for path, content in extras.items():
        world.host.run(["mcopy", "-i", esp, "-", f"::{path}"], stdin=content)
    return target


def addon(world: World, role: str, sections: dict[str, bytes]) -> bytes:
    """Make an add-on for the stub, with these sections, signed by a role of the keyset."""
    folder = world.folder / f"addon-{role}"
    folder.mkdir()
    command: list[str | Path] = ["ukify", "build", f"--stub={ADDON_STUB}", f"--output={folder}/unsigned"]
    for section, content in sections.items():
        (folder / section[1:]).write_bytes(content)
        command.append(f"--section={section}:@{folder}/{section[1:]}")
    world.host.run(command)
    world.keyset.signer(role).sign_pe(folder / "unsigned", folder / "signed")
    return (folder / "signed").read_bytes()


def boot(world: World, medium: Path, **hardware: object) -> vm.Outcome:
    """Boot a medium on a new machine."""
    switches = Hardware(snapshot=True, **hardware)  # type: ignore[arg-type]
    return vm.boot(world.host, world.options(medium, hardware=switches))


def test_credentials_extensions_and_an_initrd_beside_the_uki(world: World, medium: Path) -> None:
    initrd = make_cpio(world.host, {".extra/by-an-add-on": b"the layer key is for layers"})
    extras = {
        f"{BESIDE}/root.cred": b"password",
        f"{BESIDE}/tools.sysext.raw": b"x" * 4096,
        f"{BESIDE}/etc.confext.raw": b"x" * 4096,
        f"{BESIDE}/init.addon.efi": addon(world, "layer", {".initrd": initrd}),
        "loader/credentials/all.cred": b"password",
    }
    outcome = boot(world, with_extras(world, medium, "extras", extras))
    check_refused(outcome, "ESP-EXTRA")
    seen = str(outcome.report)
    for words in ("credentials", "global_credentials", "sysext", "confext", "by-an-add-on"):
        assert f"/.extra/{words}" in seen, seen
    assert "PCR 12, PCR 13" in seen


def test_words_in_add_ons(world: World, medium: Path) -> None:
    extras = {
        f"{BESIDE}/uki.addon.efi": addon(world, "uki", {".cmdline": b"by-the-uki-key"}),
        "loader/addons/pk.addon.efi": addon(world, "PK", {".cmdline": b"by-the-pk"}),
    }
    outcome = boot(world, with_extras(world, medium, "add-ons", extras))
    check_refused(outcome, "CMDLINE")
    assert "-- by-the-uki-key" in str(outcome.report)
    assert "by-the-pk" not in str(outcome.report)


def test_a_stick_in_a_machine_with_another_disk(world: World, medium: Path) -> None:
    empty = world.folder / "empty.raw"
    empty.touch()
    os.truncate(empty, 64 << 20)
    outcome = boot(
        world, medium, bus="usb", extra_bus="nvme", extra_disks=(empty,), nic="e1000e", network="restricted"
    )
    assert outcome.status == 0, outcome.console.read_text(errors="replace")[-3000:]
