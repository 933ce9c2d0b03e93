"""The `demo` verb: the life of a machine, from nothing to an installed one that boots by itself, in VMs on
this computer, in one go.
"""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mosinit import answers, build, enroll, init, keys, layout, vm
from mosinit.host import Host, Usage

INSTALL_SECONDS = 1800.0
ESP_OFFSET = init.MIB  # of a medium that `build` made
ANSWERS = "version: 1\ndisk: /dev/disk/by-id/virtio-extra1\nstate: 256\n"


def demo(host: Host, folder: Path, interactive: bool = False) -> dict[str, object]:
    """Make keys and medium, enrol the keys in a new machine's firmware, install the machine from the medium,
    remove it, boot the machine twice.

    Everything lies in `folder`: keys/, out/, vm/, disk.raw and reports/. Keys and builds that are there are
    used again, the machine is a new one each time. With `interactive` it is one that can log in, and the
    terminal is the console of its second boot until it stops. Returns its report, the exit status and
    seconds by step.
    """
    begun = time.monotonic()
    keyset = folder / "keys"
    if (folder / "keyset.json").exists():
        raise Usage(f"{folder} is a keyset, where nothing else goes: name another place by --dir")
    folder.mkdir(parents=True, exist_ok=True)
    if not keyset.exists():
        host.say(f"keys: a new keyset in {keyset}")
        keys.new(host, keyset, "demo")
    profile = "demo" if interactive else None
    built = build.build(host, keyset, folder / ("out-demo" if interactive else "out"), profile=profile)
    seconds = {"build": round(time.monotonic() - begun, 1)}
    shutil.rmtree(folder / "vm", ignore_errors=True)
    disk = folder / "disk.raw"
    disk.unlink(missing_ok=True)
    with disk.open("wb") as file:
        file.truncate(layout.SMALLEST)
    (folder / "reports").mkdir(exist_ok=True)
    options = vm.BootOptions(disk, folder / "vm", report=folder / "reports/live-report.json")
    outcome = install(host, options, Path(str(built["medium"])), keyset)
    seconds["install"] = round(outcome.seconds, 1)
    installed = outcome.system.get("installed")
    for number in (1, 2) if outcome.status == 0 else ():
        host.say(f"boot {number} of the installed machine, without the medium")
        options = replace(options, report=folder / f"reports/machine-{number}-report.json")
        outcome = vm.boot(host, replace(options, interactive=interactive and number == 2))
        seconds[f"boot {number}"] = round(outcome.seconds, 1)
        if outcome.status != 0:
            break
    return {
        "status": outcome.status,
        "report": outcome.report,
        "outcome": outcome.reason,
        "system": dict(outcome.system),
        "installed": installed,
        "report file": str(options.report),
        "console": str(outcome.console),
        "seconds": {**seconds, **{name: round(mark, 1) for name, mark in outcome.marks.items()}},
    }


def install(host: Host, options: vm.BootOptions, medium: Path, keyset: Path) -> vm.Outcome:
    """Boot the medium beside the disk of a machine in setup mode, and enroll it when it asks for it.

    The answers come both ways, as a file and as a credential: what comes twice must agree.
    """
    credential = base64.b64encode(ANSWERS.encode()).decode()
    smbios = (f"io.systemd.credential.binary:{answers.NAME}={credential}",)
    with host.scratch(near=options.disk) as folder:
        answered = add_answers(host, medium, folder / "medium.raw", ANSWERS)
        host.say("installing in a VM: OVMF in setup mode, a software TPM, an empty disk of 8 GiB")
        return vm.boot(
            host,
            replace(
                options,
                disk=answered,
                setup_mode=True,
                until="installed",
                timeout=INSTALL_SECONDS,
                exchange=enroller(host, keyset, folder),
                hardware=replace(options.hardware, extra_disks=(options.disk,), smbios=smbios),
            ),
        )


def add_answers(host: Host, medium: Path, target: Path, text: str) -> Path:
    """Copy a medium and put answers for an installation without a person on its ESP."""
    host.run(["cp", "--sparse=always", medium, target])
    esp = f"{target}@@{ESP_OFFSET}"
    host.run(["mmd", "-i", esp, "::mosinit"])
    host.run(["mcopy", "-i", esp, "-", "::mosinit/answers.yaml"], stdin=text.encode())
    return target


def enroller(host: Host, folder_of_keys: Path, folder: Path) -> Callable[[bytes], bytes]:
    """Return the organisation's side of an enrolment: from a machine's request to the answer."""

    def answer(request: bytes) -> bytes:
        (folder / "request.json").write_bytes(request)
        keyset = keys.open_keyset(host, folder_of_keys)
        done = enroll.enroll(host, folder / "request.json", keyset, folder / "answer.json")
        for note in enroll.notes(done):
            host.say(note)
        return json.dumps(json.loads((folder / "answer.json").read_bytes())).encode()

    return answer
