"""The order of the demo's boots, and with which disks: what those boots do is for the VM tests."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from mosinit import build, demo, keys, layout, vm
from mosinit.host import Host


class Quiet(Host):
    """A host whose programs copy nothing."""

    def run(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """Run nothing."""
        return b""


class Seen(NamedTuple):
    """A boot: its options, and whether anything was on the machine's disk by then."""

    options: vm.BootOptions
    written: bool


def boots(monkeypatch: pytest.MonkeyPatch, folder: Path, *statuses: int) -> tuple[list[Seen], int]:
    """Run the demo in a folder where the machine of an earlier one lies; return boots and exit status."""
    seen: list[Seen] = []

    def boot(host: Host, options: vm.BootOptions) -> vm.Outcome:
        seen.append(Seen(options, (folder / "disk.raw").stat().st_blocks > 0))
        with (folder / "disk.raw").open("r+b") as disk:
            disk.write(b"installed")
        options.folder.mkdir(exist_ok=True)
        (options.folder / "firmware").touch()
        return vm.Outcome(statuses[len(seen) - 1], None, "", folder / "log", 1.0, {})

    monkeypatch.setattr(vm, "boot", boot)
    monkeypatch.setattr(keys, "new", lambda host, path, name: path.mkdir())
    monkeypatch.setattr(build, "build", lambda host, keyset, out, profile: {"medium": folder / "medium"})
    (folder / "vm").mkdir()
    (folder / "vm/of-an-earlier-one").touch()
    (folder / "disk.raw").write_bytes(b"an earlier one")
    status = demo.demo(Quiet(), folder)["status"]
    assert isinstance(status, int)
    assert not (folder / "vm/of-an-earlier-one").exists()
    return seen, status


def test_a_new_machine_and_an_empty_disk_then_the_disk_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (medium, *others), status = boots(monkeypatch, tmp_path, 0, 0, 0)
    disk = tmp_path / "disk.raw"
    assert (status, len(others)) == (0, 2)
    assert (medium.options.setup_mode, medium.options.until) == (True, "installed")
    assert (medium.options.hardware.extra_disks, medium.written) == ((disk,), False)
    assert disk.stat().st_size == layout.SMALLEST == 8 << 30
    for each in others:
        hardware = each.options.hardware
        # The same machine: its TPM and its firmware's variables lie in its folder.
        assert (each.options.disk, each.options.folder) == (disk, medium.options.folder)
        assert (hardware.extra_disks, hardware.smbios, hardware.snapshot) == ((), (), False)
        assert (each.options.setup_mode, each.options.until) == (False, "multi-user")
    reports = [each.options.report for each in (medium, *others)]
    names = ("live", "machine-1", "machine-2")
    assert reports == [tmp_path / f"reports/{name}-report.json" for name in names]


@pytest.mark.parametrize(("statuses", "count"), [((3,), 1), ((0, 3), 2), ((0, 0, 1), 3)])
def test_what_fails_ends_the_demo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, statuses: tuple[int, ...], count: int
) -> None:
    seen, status = boots(monkeypatch, tmp_path, *statuses)
    assert (len(seen), status) == (count, statuses[-1])
