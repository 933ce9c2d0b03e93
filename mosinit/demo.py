"""The `demo` verb: from nothing to a booted machine, on this computer, in one go."""

from __future__ import annotations

import time
from pathlib import Path

from mosinit import build, keys, vm
from mosinit.host import Host
from mosinit.machine import Hardware

NAME = "live"


def demo(host: Host, folder: Path, interactive: bool = False) -> dict[str, object]:
    """Make keys and medium, boot the medium in a VM with Secure Boot and a TPM, leave its report.

    Everything lies in `folder`: keys/, out/, vm/ and reports/. What is there already is used again. With
    `interactive` the machine is one that can log in, and the terminal is its console until it stops.
    Returns the report, the exit status and seconds by step.
    """
    begun = time.monotonic()
    keyset = folder / "keys"
    folder.mkdir(parents=True, exist_ok=True)
    if not keyset.exists():
        host.say(f"keys: a new keyset in {keyset}")
        keys.new(host, keyset, "demo")
    profile = "demo" if interactive else None
    built = build.build(host, keyset, folder / ("out-demo" if interactive else "out"), profile=profile)
    built_at = time.monotonic()
    reports = folder / "reports"
    reports.mkdir(exist_ok=True)
    host.say("booting the live medium in a VM: OVMF with Secure Boot, a software TPM")
    options = vm.BootOptions(
        disk=Path(str(built["medium"])),
        folder=folder / "vm",
        keys=keyset,
        report=reports / f"{NAME}-report.json",
        interactive=interactive,
        hardware=Hardware(snapshot=True),
    )
    outcome = vm.boot(host, options)
    return {
        "status": outcome.status,
        "report": outcome.report,
        "outcome": outcome.reason,
        "system": dict(outcome.system),
        "report file": str(options.report),
        "console": str(outcome.console),
        "seconds": {
            "build": round(built_at - begun, 1),
            "boot": round(outcome.seconds, 1),
            **{name: round(seconds, 1) for name, seconds in outcome.marks.items()},
        },
    }
