"""Run mode on a real machine: a disk that was installed by hand, its TPM, firmware with Secure Boot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from installed import SIZES, UUIDS, Installed
from world import World, check_refused

from mosinit import init, luks, vm
from mosinit.machine import Hardware

Change = Callable[[Installed, Path], object]


@pytest.fixture(scope="module")
def machine(world: World, release: Path) -> Installed:
    """An installed machine, saved at the first line of its bring-up."""
    made = Installed(world, world.folder / "installed", release).make()
    if not world.cold:
        vm.save(world.host, made.options(snapshot=True), made.folder / "saved")
    return made


def place(machine: Installed, name: str) -> tuple[int, int]:
    """Return begin and size of a partition."""
    with machine.disk.open("rb") as file:
        head = file.read(1024 + 16384)
    parts = init.parse_gpt(head[512:1024], head[1024:], 512, machine.disk.stat().st_size // 512)
    return next((part.start, part.size) for part in parts if part.uuid == UUIDS[name])


def go_on(machine: Installed, tmp_path: Path, change: Change | None = None) -> vm.Outcome:
    """Let the machine go on with a changed copy of its disk; with --cold, from power-on."""
    host = machine.world.host
    disk = tmp_path / "disk.raw"
    host.run(["cp", "--sparse=always", machine.disk, disk])
    if change:
        change(machine, disk)
    options = vm.BootOptions(
        disk, tmp_path / "state", until="pivoted", timeout=240, hardware=Hardware(snapshot=True)
    )
    if machine.world.cold:
        shutil.copytree(machine.state, options.folder)
        return vm.boot(host, options)
    return vm.restore(host, machine.folder / "saved", options)


@pytest.mark.cold
def test_an_installed_machine_boots_from_its_own_disk_again_and_again(machine: Installed) -> None:
    for _ in range(2):
        outcome = vm.boot(machine.world.host, machine.options())
        assert outcome.status == 0, outcome.console.read_text(errors="replace")[-3000:]
        report = outcome.report
        assert report is not None
        assert (report["result"], report["mode"], report["sequence"]) == ("pivoted", "run", 7)
        assert (report["fenced"], report["watchdog"], report["tpm_epoch"]) == (True, True, 1)
        assert report["uki_id"] == machine.world.bootable.ukis["run"].uki_id
        passed = {check["id"] for check in report["checks"]}  # type: ignore[attr-defined]
        assert passed >= {"TPM-IDENTITY", "TPM-POLICY", "VOLUME-IDENTITY", "VOLUME-KEY", "LAYER-SIGNATURE"}


def test_the_saved_machine_goes_on(machine: Installed, tmp_path: Path) -> None:
    outcome = go_on(machine, tmp_path)
    assert outcome.status == 0, outcome.console.read_text(errors="replace")[-3000:]


def tokens(replace: Callable[[Installed, init.Tokens], init.Tokens]) -> Change:
    """Change tokens in config's header as cryptsetup does it."""

    def change(machine: Installed, disk: Path) -> None:
        host, wanted = machine.world.host, replace(machine, machine.tokens())
        with_header(machine, disk, lambda path: luks.import_tokens(host, path, wanted))

    return change


def with_header(machine: Installed, disk: Path, change: Callable[[Path], object]) -> None:
    """Take config's header out of the disk, change it, put it back."""
    start, size = place(machine, "config")
    file = disk.with_name("config")
    with disk.open("r+b") as whole:
        whole.seek(start)
        file.write_bytes(whole.read(size))
        change(file)
        whole.seek(start)
        whole.write(file.read_bytes())
    file.unlink()


def planted(*words: str) -> Change:
    """Have cryptsetup change config's header."""

    def change(machine: Installed, disk: Path) -> None:
        secret = machine.material.secret
        with_header(
            machine, disk, lambda path: machine.world.host.run(["cryptsetup", *words, path], stdin=secret)
        )

    return change


def write(name: str, at: int, data: bytes) -> Change:
    def change(machine: Installed, disk: Path) -> None:
        with disk.open("r+b") as file:
            file.seek(place(machine, name)[0] + at)
            file.write(data)

    return change


def copy_over(source: str, target: str) -> Change:
    """Write a volume over another one."""

    def change(machine: Installed, disk: Path) -> None:
        with disk.open("r+b") as file:
            file.seek(place(machine, source)[0])
            content = file.read(SIZES[source])
            file.seek(place(machine, target)[0])
            file.write(content)

    return change


def sfdisk(*words: str) -> Change:
    def change(machine: Installed, disk: Path) -> None:
        machine.world.host.run(["sfdisk", "--quiet", "--no-reread", words[0], disk, *words[1:]])

    return change


def break_primary_gpt(machine: Installed, disk: Path) -> None:
    with disk.open("r+b") as file:
        file.seek(512 + 60)
        file.write(b"broken")


ANOTHER = b"\0\x0b" + bytes(32)  # the name of no key
BAD: dict[str, tuple[str, Change]] = {
    "the disk of another machine": (
        "TPM-IDENTITY", tokens(lambda m, t: t._replace(record=m.record(storage_key=ANOTHER))),
    ),
    "a record of another CA": (
        "RECORD-SIGNATURE", tokens(lambda m, t: t._replace(record=m.record("manifest-ca"))),
    ),
    "a foreign secret under the same policy": (
        "VOLUME-IDENTITY",
        tokens(lambda m, t: t._replace(seal_public=m.foreign.public, seal_private=m.foreign.private)),
    ),
    "another firmware state": (
        "TPM-POLICY", tokens(lambda m, t: t._replace(approvals={"ab" * 32: bytes(256)})),
    ),
    "a planted token": ("LUKS-TOKEN", planted("token", "add", "--key-description", "x")),
    "damaged integrity": ("LUKS-HEADER", write("config", init.LUKS_DATA + 24, b"\x0a")),
    "damaged config": ("VOLUME-READ", write("config", init.LUKS_DATA + (2 << 20), bytes(40 << 20))),
    "another store": ("VOLUME-KEY", copy_over("state", "store")),
    "two config volumes": ("DISK-PARTITION", sfdisk("--part-type", "5", init.CONFIG_TYPE)),
    "a damaged primary GPT": ("DISK-ABSENT", break_primary_gpt),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused(machine: Installed, tmp_path: Path, case: str) -> None:
    check, change = BAD[case]
    check_refused(go_on(machine, tmp_path, change), check)


@pytest.mark.cold
def test_a_live_uki_opens_nothing_of_an_installed_disk(machine: Installed, tmp_path: Path) -> None:
    world = machine.world
    disk = tmp_path / "disk.raw"
    world.host.run(["cp", "--sparse=always", machine.disk, disk])
    machine.put_uki(disk, world.bootable.ukis["live"].path)
    shutil.copytree(machine.state, tmp_path / "state")
    options = vm.BootOptions(disk, tmp_path / "state", until="pivoted", timeout=240)
    outcome = vm.boot(world.host, options)
    check_refused(outcome, "DISK-PARTITION")
    assert '{"name": "unlock", "ok": true' in outcome.console.read_text(errors="replace")
