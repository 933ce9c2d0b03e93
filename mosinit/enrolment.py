"""How a request leaves a live machine and the answer comes in, where a person carries both; and the event
log and approvals of a machine that is to be resealed.

By a stick: a FAT file system that is plugged in, or the medium's own EFI system partition. By SSH: the one
command that `sshd` lets somebody with a key of the signed image run (see `serve`). An answer is put in place
only if it is the organisation's, to this very request; `provision.finish` looks at it again. Approvals are
public, and each is verified before it is laid.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mosinit import init
from mosinit.host import Failure, Host, Usage, printable

STATE = Path("/run/mosinit-provision")
REQUEST, ANSWER = STATE / "request.json", STATE / "answer.json"
SSH_KEY = Path("/run/mosinit-ssh/host_key")  # of this very boot
FOLDER = "mosinit"  # on a stick
APPROVALS = "approvals.json"
USAGE = (
    "`ssh -t` without a command installs and recovers; `request` prints this machine's request for its "
    "enrolment, and `answer < FILE` takes the organisation's answer; `event-log` prints the firmware's "
    "event log, and `approvals < FILE` takes what `mosinit approve` made of it"
)
SKIPPED = ("loop", "ram", "zram", "dm-", "md", "fd", "mtd", "nbd", "sr")


@dataclass(frozen=True)
class Stick:
    """A FAT file system that files can be carried by; `medium` is the one this system was booted from."""

    device: Path
    label: str
    model: str
    size: int
    medium: bool = False

    @property
    def title(self) -> str:
        """Say which one it is, for a person."""
        what = "the medium itself" if self.medium else self.model or "no model"
        return f"{self.device} ({what}, {self.size >> 20} MiB{', ' + self.label if self.label else ''})"


@dataclass(frozen=True)
class Reseal:
    """Where approvals wait to be laid, and what they are about; tests have it elsewhere."""

    approvals: Path = Path("/run/mosinit-recovery") / APPROVALS
    left: Path = Path(init.LEFT)
    event_log: Path = Path("/sys/kernel/security/tpm0/binary_bios_measurements")


@dataclass(frozen=True)
class Places:
    """Where the kernel shows disks; tests have it elsewhere."""

    blocks: Path = Path("/sys/block")
    devices: Path = Path("/dev")


# --- Sticks ----------------------------------------------------------------------------------------------


def sticks(host: Host, places: Places | None = None) -> tuple[Stick, ...]:
    """Return what a person could carry files by, the medium last."""
    places = places or Places()
    medium = _medium(host, places)
    found = [
        stick
        for disk in sorted(places.blocks.iterdir())
        if not disk.name.startswith(SKIPPED)
        for stick in _of_disk(places, disk, medium)
    ]
    return tuple(sorted(found, key=lambda stick: (stick.medium, stick.device)))


def _medium(host: Host, places: Places) -> str:
    """Return the name of the partition that this system was booted from.

    A stick may claim to be it, and is then called so: nothing depends on that.
    """
    hint = host.efi_read("LoaderDevicePartUUID", init.LOADER_GUID)
    uuid = hint[1].decode("utf-16-le", errors="replace").rstrip("\0").lower() if hint else ""
    if not init.UUID.fullmatch(uuid):
        return ""
    link = places.devices / "disk/by-partuuid" / uuid
    return Path(os.path.realpath(link)).name if link.exists() else ""


def _of_disk(places: Places, disk: Path, medium: str) -> Iterator[Stick]:
    if _first(disk / "ro") != "0":
        return
    # Many sticks, and all disks in a case with a USB plug, do not say that they can be removed.
    portable = _first(disk / "removable") == "1" or re.search(r"/(usb|mmc)", os.path.realpath(disk))
    parts = sorted(path.parent for path in disk.glob("*/partition")) or [disk]
    for part in parts:
        if not portable and part.name != medium:
            continue
        label = _fat_label(places.devices / part.name)
        if label is not None:
            size = int(_first(part / "size") or 0) * 512
            model = _first(disk / "device/model", disk / "device/name")
            yield Stick(places.devices / part.name, label, model, size, part.name == medium)


def _first(*paths: Path) -> str:
    for path in paths:
        try:
            return printable(path.read_text(errors="replace").strip())[:60]
        except OSError:
            continue
    return ""


def _fat_label(device: Path) -> str | None:
    """Return the label of a FAT file system; None for whatever else is there, or nothing."""
    try:
        with device.open("rb") as file:
            sector = file.read(512)
    except OSError:
        return None
    return parse_fat_label(sector)


def parse_fat_label(untrusted: bytes) -> str | None:
    """Return the label in a FAT boot sector, None if it is none."""
    # Microsoft's FAT specification 1.03, "Boot sector": label and type stand before the code.
    if len(untrusted) != 512 or untrusted[510:] != b"\x55\xaa":
        return None
    for place, kinds in ((43, (b"FAT12   ", b"FAT16   ", b"FAT     ")), (71, (b"FAT32   ",))):
        label, kind = struct.unpack_from("<11s8s", untrusted, place)
        if kind in kinds:
            text = printable(label.decode("ascii", errors="replace").strip())
            return "" if text == "NO NAME" else text
    return None


def save_request(host: Host, stick: Stick, state: Path = STATE) -> str:
    """Write this machine's request to a stick; return its name there. Raises `Failure`."""
    request = read_request(state)
    return _save(host, stick, f"request-{serial(state)}.json", request)


def save_event_log(host: Host, stick: Stick, number: str, event_log: Path) -> str:
    """Write the firmware's event log of the machine with this serial to a stick; return its name there."""
    from mosinit import provision

    return _save(host, stick, f"event-log-{number}.bin", provision.read_event_log(event_log))


def _save(host: Host, stick: Stick, name: str, content: bytes) -> str:
    with _on(host, stick) as folder:
        folder.mkdir(exist_ok=True)
        # No `replacing`: FAT knows no modes. One rename, so that no half file is ever taken for one.
        fresh = folder / f"{name.partition('-')[0]}.new"
        fresh.write_bytes(content)
        host.sync_file(fresh)
        fresh.replace(folder / name)
        host.sync_file(folder)
    return f"{FOLDER}/{name}"


def take_answer(host: Host, stick: Stick, state: Path = STATE) -> str:
    """Put the answer on a stick in place; return its name there. Raises `Failure`, `Refused`."""
    from mosinit import exchange

    names = (f"answer-{serial(state)}.json", "answer.json")
    with _on(host, stick, read_only=True) as folder:
        name = next((name for name in names if (folder / name).exists()), None)
        if name is None:
            raise Failure(f"{stick.title} has no {FOLDER}/{names[0]}: copy the organisation's answer there")
        untrusted = exchange.read_file(folder / name, exchange.DOCUMENT_BYTES)
    put_answer(host, untrusted, f"{FOLDER}/{name}", state)
    return f"{FOLDER}/{name}"


def take_approvals(host: Host, stick: Stick, reseal: Reseal) -> str:
    """Put the approvals on a stick in place; return their name there. Raises `Failure`, `Refused`."""
    from mosinit import exchange

    name = f"{FOLDER}/{APPROVALS}"
    with _on(host, stick, read_only=True) as folder:
        if not (folder / APPROVALS).exists():
            raise Failure(f"{stick.title} has no {name}: copy what `mosinit approve` wrote there")
        untrusted = exchange.read_file(folder / APPROVALS, init.MIB)
    put_approvals(host, untrusted, name, reseal)
    return name


@contextlib.contextmanager
def _on(host: Host, stick: Stick, *, read_only: bool = False) -> Iterator[Path]:
    """Mount a stick and yield our folder on it. Raises `Failure`."""
    try:
        with host.mounted(stick.device, "vfat", read_only=read_only) as mounted:
            yield mounted / FOLDER
    except OSError as error:
        raise Failure(
            f"{stick.title} cannot be used ({error.strerror or error}): plug it in again, or use another"
        ) from error


# --- What is carried -------------------------------------------------------------------------------------


def read_request(state: Path = STATE) -> bytes:
    """Return this machine's request. Raises `Failure` while there is none."""
    from mosinit import exchange

    path = state / REQUEST.name
    if not path.is_file():
        raise Failure(
            "this machine has made no request yet: begin its installation, at its console or by `ssh -t`"
        )
    return exchange.read_file(path, exchange.DOCUMENT_BYTES)


def serial(state: Path = STATE) -> str:
    """Return the serial under which the organisation files this machine. Raises `Failure`."""
    from mosinit import provision, records

    return records.serial_of(records.parse_point(provision.read_state(state).sudi, records.SUDI_HEAD))


def put_answer(host: Host, untrusted: bytes, name: str, state: Path = STATE) -> None:
    """Put an answer where the installation waits for it, if it is the one to this machine's request.

    Raises `Failure`, `Refused`; `name` is how messages call it.
    """
    from mosinit import exchange, keys, provision

    read_request(state)
    answer = exchange.parse_answer(untrusted, name)
    kept, organisation = provision.read_state(state), keys.open_organisation(state / "organisation")
    provision.verify_answer(state, kept, organisation, provision.policy_keys(organisation), answer)
    with host.replacing(state / ANSWER.name, mode=0o600) as fresh:
        fresh.write_bytes(untrusted)


def put_approvals(host: Host, untrusted: bytes, name: str, reseal: Reseal) -> None:
    """Put approvals where a machine that is to be resealed waits for them, if they say that they are this
    organisation's. Raises `Failure`, `Refused`; `name` is how messages call them.
    """
    from mosinit import install
    from mosinit.reseal import parse_approvals

    parse_approvals(untrusted, name, install.policy_of_live(reseal.left))
    reseal.approvals.parent.mkdir(mode=0o700, exist_ok=True)
    with host.replacing(reseal.approvals, mode=0o600) as fresh:
        fresh.write_bytes(untrusted)


# --- By SSH ----------------------------------------------------------------------------------------------


def ssh_fingerprint(key: Path = SSH_KEY) -> str:
    """Return how a person tells that this machine answers them by SSH; empty where nobody can log in."""
    public = key.with_name(f"{key.name}.pub")
    try:
        blob = base64.b64decode(public.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return ""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def serve(
    host: Host, words: Sequence[str], stdin: IO[bytes], stdout: IO[bytes], state: Path = STATE,
    reseal: Reseal = Reseal(),  # noqa: B008 (it is frozen)
) -> None:  # fmt: skip
    """Do what somebody asks for by SSH: hand out request or event log, or take answer or approvals.

    Raises `Failure`. There is no other way to do anything: no word of theirs is a path or reaches another
    program.
    """
    from mosinit import exchange, provision

    match list(words):
        case ["request"]:
            stdout.write(read_request(state))
        case ["answer"]:
            read_request(state)
            put_answer(host, _received(stdin, exchange.DOCUMENT_BYTES, "answer"), "the answer", state)
            stdout.write(b"the answer was taken: the installation goes on\n")
        case ["event-log"]:
            stdout.write(provision.read_event_log(reseal.event_log))
        case ["approvals"]:
            put_approvals(host, _received(stdin, init.MIB, "approvals"), "the approvals", reseal)
            stdout.write(b"the approvals were taken: what waits for them goes on\n")
        case _:
            raise Usage(USAGE)
    stdout.flush()


def _received(stdin: IO[bytes], limit: int, name: str) -> bytes:
    """Return what somebody sent, which is never read without a bound."""
    untrusted = stdin.read(limit + 1)
    if len(untrusted) > limit:
        raise Failure(f"more than {limit} bytes came, too many for the {name}: send the right file")
    return untrusted
