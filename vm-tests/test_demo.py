"""The demo's story: from nothing to a machine that boots from its own disk, and again, quickly."""

from __future__ import annotations

import itertools
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mosinit import bootentry, init, keys, layout, tools
from mosinit.machine import VARIABLES

pytestmark = pytest.mark.cold


def start(folder: Path) -> subprocess.Popen[str]:
    """Start the demo as a person would."""
    command = [sys.executable, "-m", "mosinit", "demo", "--json", "--dir", str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tools.checkout())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The first run: everything is built."""
    folder = tmp_path_factory.mktemp("demo")
    with start(folder) as running:
        printed, said = running.communicate()
    assert running.returncode == 0, said[-3000:]
    return folder, json.loads(printed)


def test_a_debian_hostfs_reaches_multi_user(first: tuple[Path, dict[str, Any]]) -> None:
    folder, result = first
    names = ("live", "machine-1", "machine-2")
    live, first_boot, report = (
        json.loads((folder / f"reports/{name}-report.json").read_bytes()) for name in names
    )
    modes = [(each["result"], each["mode"], each["failed"]) for each in (live, first_boot, report)]
    assert modes == [("pivoted", mode, None) for mode in ("live", "run", "run")]
    assert first_boot["generation"] == report["generation"]
    assert report == result["report"]
    assert "multi-user" in result["seconds"]
    assert {stage["name"] for stage in report["stages"]} >= {"check-firmware", "mount-layers", "stack"}
    refused = live["previous_refusal"]
    assert refused["id"] == "SB-MODE"  # the keys were enrolled from there
    assert all(check["ok"] and check["id"] in init.CHECKS for check in report["checks"])


def test_no_unit_failed_and_the_kernels_modules_are_there(first: tuple[Path, dict[str, Any]]) -> None:
    _, result = first
    assert result["system"] == {"failed_units": [], "modules": True}


def test_the_answers_came_both_ways(first: tuple[Path, dict[str, Any]]) -> None:
    _, result = first
    assert result["installed"]["answers"] == ["the medium", "SMBIOS"]


def test_the_firmware_has_an_entry_of_the_machine(first: tuple[Path, dict[str, Any]]) -> None:
    """It is there after two boots, and leads to the disk's own EFI system partition."""
    folder, result = first
    store = pytest.importorskip("virt.firmware.varstore.edk2")
    variables = store.Edk2VarStore(str(folder / "vm" / VARIABLES)).get_varlist()
    name = result["installed"]["boot entry"]
    number = int(name.removeprefix("Boot"), 16)
    assert number in struct.unpack(f"<{len(variables['BootOrder'].data) // 2}H", variables["BootOrder"].data)
    with (folder / "disk.raw").open("rb") as file:
        head = file.read(1024 + 16384)
    esp = init.parse_gpt(head[512:1024], head[1024:], 512, layout.SMALLEST // 512)[0]
    expected = bootentry.Entry(1, esp.start // 512, esp.size // 512, esp.uuid)
    assert bootentry.parse(bytes(variables[name].data)) == expected
    console = Path(result["console"]).read_text(errors="replace")
    assert f'BdsDxe: starting {name} "mosinit" from HD(1,GPT,{esp.uuid.upper()},' in console


def test_private_keys_are_for_their_owner_alone(first: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = first
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder / "keys").glob("*.key")}
    assert len(modes) == len(keys.ROLES)
    assert set(modes.values()) == {0o600}


def test_a_second_run_builds_nothing_and_ends_when_it_is_interrupted(
    first: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = first
    medium = (folder / "out/live.raw").stat()
    with start(folder) as running:
        assert running.stderr
        said = list(itertools.takewhile(lambda line: "is in setup mode" not in line, running.stderr))
        running.send_signal(signal.SIGINT)
        _, more = running.communicate()
    assert running.returncode == 130, (said, more)
    assert any("holds this very build already" in line for line in said)
    assert (folder / "out/live.raw").stat() == medium
    assert not [name for name in os.listdir("/proc") if name.isdigit() and _runs_in(name, folder)]


def _runs_in(process: str, folder: Path) -> bool:
    try:
        words = Path("/proc", process, "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return str(folder) in words and "pytest" not in words
