"""How fast an installation streams, beside dd of the same bytes to the same kind of disk in one machine.

    python3 -m mosinit tools run env PYTHONPATH=. python3 -B vm-tests/bench.py FOLDER > bench.json

A live machine first copies the release's blobs from its medium by `dd conv=fsync` to an empty disk, then
installs the release on another one: once from the medium, once from a registry over TLS on this computer.
What a step took is the time between its line on the console and the next one's, by the clock of the machine.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import cast

import installing
from probed import add_layer
from world import World, make_tar

from mosinit import accelerator, demo, disk, hostfs, init, layout, vm
from mosinit.host import Failure, Host
from mosinit.machine import Hardware
from tests import registries

SERVICE = b"""[Unit]
After=multi-user.target
Before=mosinit-install.service

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 -B /usr/lib/bench/bench.py
StandardOutput=journal+console
"""
# Nothing is in the cache before, nor afterwards for the installation.
PROGRAM = b"""
import json, os, subprocess, time
folder = "/atomfs-cache/mosinit/blobs/sha256"
names = sorted(os.path.join(folder, name) for name in os.listdir(folder))
def forget():
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")
forget()
begun = time.monotonic()
reader = subprocess.Popen(["cat", *names], stdout=subprocess.PIPE)
target = "/dev/disk/by-id/virtio-extra2"
copy = ["dd", f"of={target}", "bs=1M", "iflag=fullblock", "conv=fsync"]
subprocess.run(copy, stdin=reader.stdout, check=True)
seconds = time.monotonic() - begun
forget()
print("bench: " + json.dumps({"bytes": sum(map(os.path.getsize, names)), "seconds": seconds}), flush=True)
"""
LINE = re.compile(r"^\[ *([0-9.]+)\] mosinit\[[0-9]+\]: mosinit: (.*)$")
STEPS = {
    "provisioning": "provisioning, the TPM's part",
    "verifying": "verifying the release",
    "partitions": "partitions",
    "machine-config": "volume config",
    "machine-store": "volume store",
    "copying": "copying",
    "esp": "boot partition",
    "reading": "reading everything back",
    "TPM": "closing the TPM",
    "disk": "disk id, start and boot entry",
}


def steps(console: str, seconds: float) -> dict[str, float]:
    """Return what each step of an installation on a console took; what acts on the disk took `seconds`."""
    lines = [match for line in console.splitlines() if (match := LINE.match(line.strip()))]
    found = [(name, float(line[1])) for line in lines if (name := STEPS.get(line[2].split()[0].rstrip(":")))]
    begun = next(begin for name, begin in found if name == STEPS["partitions"])
    ends = [begin for _, begin in found[1:]] + [begun + seconds]
    taken: dict[str, float] = {}
    for (name, begin), after in zip(found, ends, strict=True):
        taken[name] = round(taken.get(name, 0.0) + after - begin, 2)
    return taken


def measure(
    world: World, folder: Path, medium: Path, source: str, more: dict[str, Path]
) -> dict[str, object]:
    """Install on a new machine and return the figures."""
    folder.mkdir()
    disks = tuple(folder / f"{name}.raw" for name in ("target", "dd"))
    for each in disks:
        with each.open("wb") as file:
            file.truncate(layout.SMALLEST)
    answers = f"version: 1\ndisk: /dev/disk/by-id/virtio-extra1\n{source}"
    answered = demo.add_answers(world.host, medium, folder / "medium.raw", answers)
    for place, path in more.items():
        world.host.run(["mcopy", "-i", f"{answered}@@{init.MIB}", path, f"::{place}"])
    options = vm.BootOptions(
        answered, folder / "state", keys=world.keyset.folder, until="installed", timeout=1800,
        exchange=installing.enroller(world, folder),
        hardware=Hardware(network="user", extra_disks=disks),
    )  # fmt: skip
    outcome = vm.boot(world.host, options)
    if outcome.status != 0:
        raise Failure(f"{outcome.reason}: see {outcome.console}")
    return figures(outcome)


def figures(outcome: vm.Outcome) -> dict[str, object]:
    """Return what a boot's console says."""
    console = outcome.console.read_text(errors="replace")
    plain = json.loads(console.partition("bench: ")[2].splitlines()[0])
    done = cast("dict[str, float]", outcome.system["installed"])
    taken = steps(console, done["seconds"])
    rate, plain_rate = plain["bytes"] / taken["copying"], plain["bytes"] / plain["seconds"]
    return {
        "bytes": plain["bytes"],
        "bytes per second": round(rate),
        "bytes per second of dd": round(plain_rate),
        "ratio": round(rate / plain_rate, 2),
        "seconds from power-on to the request": outcome.marks["request"],
        "seconds in all": outcome.marks["installed"],
        "seconds by step": taken,
    }


def main(folder: Path) -> None:
    """Make the medium, measure, print."""
    host = Host()
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        sys.exit(f"cannot make {folder}: {error.strerror}; name a folder that does not exist yet")
    world = World(host, folder, cold=True)
    image = folder / "bench-hostfs"
    shutil.copytree(hostfs.build(host, folder / "debian"), image)
    service = "usr/lib/systemd/system"
    files = {"usr/lib/bench/bench.py": PROGRAM, f"{service}/bench.service": SERVICE}
    files[f"{service}/multi-user.target.d/bench.conf"] = b"[Unit]\nWants=bench.service\n"
    add_layer(image, make_tar(files))
    release = world.release("bench", None)
    medium = folder / "bench.raw"
    disk.live_medium(host, world.bootable.ukis["live"].path, release, world.keyset, medium)
    authority = registries.Authority(folder)
    results: dict[str, object] = {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": accelerator.choose(host),
    }
    results["medium"] = measure(world, folder / "by-medium", medium, "", {})
    with registries.real_registry(folder, authority, login=False) as registry:
        installing.push(world, release, registry, authority)
        port = registry.address.partition(":")[2]
        source = f"source: docker://10.0.2.2:{port}/{installing.NAME}:7\n"
        more = {"mosinit/registry-ca.pem": authority.path}
        results["registry"] = measure(world, folder / "by-registry", medium, source, more)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("name the folder in which everything is made: it must not exist yet")
    main(Path(sys.argv[1]))
