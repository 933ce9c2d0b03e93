"""Answers for an installation without a person, in live mode alone:

    version: 1
    disk: /dev/disk/by-id/virtio-machine    # the disk to install on
    erase: SERIAL                           # optional: the disk whose content may be lost, by its serial;
                                            # an installed machine only by the whole word of --plan
    members: true                           # optional: also what is encrypted, or of a RAID, LVM or ZFS
    source: docker://HOST/NAME:TAG          # optional: the release (default: the one on the medium)
    state: 512                              # optional: MiB of a volume for /var
    store: 4096                             # optional: MiB of the volumes for releases
    scratch: 1024                           #           and for what is lost at each boot

They lie in /mosinit/answers.yaml on the medium's EFI system partition, or are the systemd credential
`mosinit.answers` of a virtual machine (SMBIOS type 11, or QEMU's fw_cfg). Anybody may have written them:
they choose, and weaken nothing, since what is installed is verified as ever. Where they are in two places,
they must be the same: no one can know which of two was meant.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mosinit import init, ports, smbios
from mosinit.generations import Quiet
from mosinit.host import Failure, Host, Usage

NAME = "mosinit.answers"
BYTES, CA_BYTES = 4096, 64 << 10
ON_MEDIUM, CA_ON_MEDIUM = "mosinit/answers.yaml", "mosinit/registry-ca.pem"
REPORT_PORT = Path("/dev/virtio-ports/org.mosinit.report")
TELL_SECONDS = 10.0  # in which somebody has to take it
FIELDS = {"version", "disk", "erase", "members", "source", "state", "store", "scratch"}
SIZES = ("state", "store", "scratch")
NONE, FOUND, UNKNOWN = 1, 0, 255  # systemd.service(5), ExecCondition=


@dataclass(frozen=True)
class Places:
    """Where what lies, and where the answers are copied to; tests have it elsewhere."""

    report: Path = Path(init.LEFT, "report.json")
    table: Path = Path("/sys/firmware/dmi/tables/DMI")
    fw_cfg: Path = Path(f"/sys/firmware/qemu_fw_cfg/by_name/opt/io.systemd.credentials/{NAME}/raw")
    target: Path = Path("/run/mosinit-answers")


@dataclass(frozen=True)
class Answers:
    """What the answers say; sizes in bytes, 0 for what is usual, `source` empty for the medium's release."""

    disk: Path
    erase: str | None = None
    source: str = ""
    state: int = 0
    store: int = 0
    scratch: int = 0
    members: bool = False


# --- What they say ---------------------------------------------------------------------------------------


def read_answers(path: Path) -> Answers:
    """Read answers. Raises `Failure` that names what is wrong."""
    try:
        data = init.Kernel().read(str(path), BYTES)
    except OSError as error:
        raise Failure(
            f"cannot read the answers {path} ({error.strerror}): name a file that is there"
        ) from error
    return parse_answers(data, str(path))


def parse_answers(data: bytes, place: str) -> Answers:
    """Parse answers. Raises `Failure`."""
    try:
        node = init.parse_yaml(data)
    except init.Refused as refused:
        raise Failure(f"{place}: expected {refused.expected}, seen {refused.seen}") from refused
    words = node.value if isinstance(node.value, dict) else {}
    values: Mapping[str, object] = {str(key): each.value for key, each in words.items()}
    if odd := sorted(set(values) - FIELDS):
        raise Failure(f"{place}: {odd[0]} is no key of answers: they have {', '.join(sorted(FIELDS))}")
    if missing := sorted({"version", "disk"} - set(values)):
        raise Failure(f"{place}: {missing[0]} is missing: add it")
    if type(values["version"]) is not int or values["version"] != 1:
        raise Failure(f"{place}: another version: write `version: 1`, without quotes")
    disk, erase, source = values["disk"], values.get("erase"), values.get("source", "")
    if not isinstance(disk, str) or not re.fullmatch(r"/dev/[A-Za-z0-9._:/+-]{1,200}", disk):
        raise Failure(f"{place}: disk is no path below /dev")
    if erase is not None and (type(erase) not in (str, int) or not _is_word(str(erase))):
        raise Failure(
            f"{place}: erase is neither the serial of a disk nor what --plan shows: write it in quotes"
        )
    members = values.get("members", False)
    if not isinstance(members, bool):
        raise Failure(f"{place}: members is neither true nor false")
    if members and erase is None:
        raise Failure(
            f"{place}: members without erase lets nothing be lost: write the disk's serial to erase"
        )
    if source != "" and not _is_source(source):
        raise Failure(f"{place}: source is neither oci:/FOLDER nor docker://HOST/NAME:TAG")
    sizes = {name: values.get(name, 0) for name in SIZES}
    for name, size in sizes.items():
        if type(size) is not int or not 0 <= size < 1 << 30:
            raise Failure(f"{place}: {name} is no number of MiB: write 512, without a unit")
    whole = {name: size << 20 for name, size in sizes.items() if isinstance(size, int)}
    return Answers(Path(disk), None if erase is None else str(erase), str(source), members=members, **whole)


def _is_word(text: str) -> bool:
    return 0 < len(text) <= 200 and text.isprintable() and text == text.strip()


def _is_source(source: object) -> bool:
    if not isinstance(source, str):
        return False
    if re.fullmatch(r"oci:/[A-Za-z0-9._/+-]{1,300}", source):
        return True
    from mosinit import registry

    try:
        return bool(registry.parse_reference(source))
    except Usage:
        return False


# --- Where they are --------------------------------------------------------------------------------------


def find(host: Host, places: Places, medium: Callable[[Host], dict[str, bytes]]) -> list[str]:
    """Copy the answers to where `mosinit install` reads them; return where they were found.

    Raises `Failure`, `Refused` or `OSError` where nobody can know what was meant.
    """
    report = init.parse_json(host.read(str(places.report)), "")
    if not isinstance(report, dict) or report.get("mode") != "live":
        return []
    files = medium(host)
    found = {"the medium": files.get(ON_MEDIUM), **credentials(host, places)}
    answers = {place: data for place, data in found.items() if data is not None}
    if len(set(answers.values())) > 1:
        raise Failure(f"{' and '.join(answers)} hold different answers: leave those that you mean")
    if not answers:
        return []
    places.target.mkdir(mode=0o700, exist_ok=True)
    copies = {
        "answers.yaml": next(iter(answers.values())),
        "registry-ca.pem": files.get(CA_ON_MEDIUM),
        "places.json": json.dumps(list(answers)).encode(),
    }
    for name, data in copies.items():
        if data is not None:
            with host.replacing(places.target / name, mode=0o600) as fresh:
                fresh.write_bytes(data)
    return list(answers)


def credentials(host: Host, places: Places) -> dict[str, bytes | None]:
    """Return the credential from each place that a hypervisor may have put it into. Raises `Failure`."""
    found: dict[str, bytes | None] = {}
    if places.table.exists():
        with places.table.open("rb") as file:
            table = file.read(init.MIB)
        try:
            found["SMBIOS"] = smbios.credential(smbios.oem_strings(table), NAME)
        except ValueError as error:
            # Firmware of real machines errs too: without answers there, that stops nothing.
            if NAME.encode() in table:
                raise Failure(f"the answers in SMBIOS cannot be read ({error}): give them anew") from error
    if places.fw_cfg.exists():
        found["fw_cfg"] = host.read(str(places.fw_cfg), BYTES)
    return found


def on_medium(host: Host) -> dict[str, bytes]:
    """Return what lies for us on the EFI system partition that this system was started from."""
    machine = Quiet()
    fd, _ = init.open_partition(machine, init.find_disk(machine), init.ESP_TYPE)
    found = {}
    try:
        with host.mounted(Path(os.readlink(f"/proc/self/fd/{fd}")), "vfat", read_only=True) as folder:
            for name, limit in ((ON_MEDIUM, BYTES), (CA_ON_MEDIUM, CA_BYTES)):
                if (folder / name).is_file():
                    found[name] = host.read(str(folder / name), limit)
    finally:
        machine.close(fd)
    return found


def tell(words: Mapping[str, object], port: Path = REPORT_PORT, seconds: float = TELL_SECONDS) -> None:
    """Send one line to whoever runs this virtual machine, if anybody does: whatever became of that, what is
    told of stays as it is.
    """
    with contextlib.suppress(OSError):
        if port.exists():
            with ports.opened(port, seconds) as fd:
                ports.send(fd, json.dumps(words).encode() + b"\n", seconds)


def main() -> int:
    """Find the answers for mosinit-install.service; return what its condition is to be."""
    host = Host()
    try:
        found = find(host, Places(), on_medium)
    except (Failure, init.Refused, OSError) as error:
        host.say(f"error: {error}")
        tell({"target": "installed", "error": str(error)[:1000]})
        return UNKNOWN
    if found:
        host.say(f"answers for an installation: {', '.join(found)}")
    return FOUND if found else NONE
