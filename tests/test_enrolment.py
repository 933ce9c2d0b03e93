"""How a request leaves a live machine and the answer comes in: sticks, and the command of SSH."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mosinit import approvals, enrolment, exchange, init
from mosinit.enrolment import Places, Reseal, Stick
from mosinit.host import Failure, Host, Usage
from mosinit.state import make_ssh_keys
from tests import installation, provisioned
from tests.provisioned import Site

MEDIUM = "11111111-2222-3333-4444-555555555555"


class Carried(Host):
    """A host that mounts a folder in the place of any device, and remembers how."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.fails = folder, 0
        self.mounts: list[tuple[str, str, bool]] = []
        self.hint = MEDIUM

    @contextlib.contextmanager
    def mounted(self, device: Path, fstype: str, *, read_only: bool = False) -> Iterator[Path]:
        """Yield the folder."""
        self.mounts.append((device.name, fstype, read_only))
        if self.fails:
            raise OSError(self.fails, os.strerror(self.fails), str(device))
        yield self.folder

    def efi_read(self, name: str, guid: str) -> tuple[int, bytes] | None:
        """Tell from which partition this system was started."""
        assert (name, guid) == ("LoaderDevicePartUUID", init.LOADER_GUID)
        return (6, (self.hint.upper() + "\0").encode("utf-16-le")) if self.hint else None


@pytest.fixture
def carried(tmp_path: Path) -> Carried:
    (tmp_path / "stick").mkdir()
    return Carried(tmp_path / "stick")


# --- Sticks ----------------------------------------------------------------------------------------------


def fat(kind: bytes, label: bytes = b"NO NAME    ") -> bytes:
    """Return a boot sector as mkfs.fat makes it."""
    place = 71 if kind.startswith(b"FAT32") else 43
    sector = bytearray(512)
    sector[place : place + 19] = label + kind
    return bytes(sector[:510]) + b"\x55\xaa"


class Machine:
    """The folders in which a kernel shows disks."""

    def __init__(self, folder: Path) -> None:
        self.places = Places(folder / "block", folder / "dev")
        (folder / "block").mkdir()
        (folder / "dev/disk/by-partuuid").mkdir(parents=True)
        self.folder = folder

    def disk(self, name: str, bus: str = "pci0/virtio1", *, model: str = "", **attributes: str) -> Path:
        """Plug in a disk, which can be written and is not removable."""
        folder = self.folder / "devices" / bus / "block" / name
        (folder / "device").mkdir(parents=True)
        for file, text in {"ro": "0", "removable": "0", "size": "2048", **attributes}.items():
            (folder / file).write_text(f"{text}\n")
        if model:
            (folder / "device/model").write_text(f"{model}\n")
        (self.places.blocks / name).symlink_to(folder)
        (self.places.devices / name).write_bytes(bytes(4096))
        return folder

    def partition(self, disk: Path, name: str, content: bytes, uuid: str = "") -> None:
        """Give a disk a partition."""
        (disk / name).mkdir()
        (disk / name / "partition").write_text("1\n")
        (disk / name / "size").write_text("204800\n")
        device = self.places.devices / name
        device.write_bytes(content)
        if uuid:
            (self.places.devices / "disk/by-partuuid" / uuid).symlink_to(device)

    def devices(self, host: Host) -> list[tuple[str, bool]]:
        """Return what of it counts as a stick, and whether it is the medium."""
        return [(stick.device.name, stick.medium) for stick in enrolment.sticks(host, self.places)]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with a medium, and a disk that has a FAT file system but is none to carry away."""
    made = Machine(tmp_path)
    made.partition(made.disk("vda"), "vda1", fat(b"FAT32   ", b"ESP        "), MEDIUM)
    made.partition(made.disk("nvme0n1"), "nvme0n1p1", fat(b"FAT32   "), MEDIUM[::-1])
    return made


def test_the_medium_itself_is_the_last_way(machine: Machine, carried: Carried) -> None:
    assert machine.devices(carried) == [("vda1", True)]
    usb = machine.disk("sda", "pci0/usb1/1-1", model="A stick\x1b[2J")
    machine.partition(usb, "sda1", fat(b"FAT16   ", b"A\x1b[2JLABEL "))
    machine.partition(usb, "sda2", b"ext4".ljust(512))
    assert machine.devices(carried) == [("sda1", False), ("vda1", True)]
    stick, medium = enrolment.sticks(carried, machine.places)
    assert (stick.label, stick.model, stick.size) == (r"A\x1b[2JLABEL", r"A stick\x1b[2J", 100 << 20)
    assert r"A stick\x1b[2J, 100 MiB, A\x1b[2JLABEL" in stick.title
    assert "the medium itself, 100 MiB, ESP" in medium.title


@pytest.mark.parametrize(
    ("bus", "attributes"),
    [("pci0/usb1", {}), ("pci0/mmc_host/mmc0", {}), ("pci0/ata1", {"removable": "1"})],
)
def test_what_can_be_carried_away(
    bus: str, attributes: dict[str, str], machine: Machine, carried: Carried
) -> None:
    machine.disk("sda", bus, **attributes)
    (machine.places.devices / "sda").write_bytes(fat(b"FAT12   "))  # the whole disk, without a table
    assert machine.devices(carried) == [("sda", False), ("vda1", True)]
    (machine.folder / "devices" / bus / "block/sda/ro").write_text("1\n")
    assert machine.devices(carried) == [("vda1", True)]


def test_a_drive_without_a_medium_and_a_system_that_was_started_otherwise(
    machine: Machine, carried: Carried
) -> None:
    machine.disk("sdb", "pci0/usb1")
    (machine.places.devices / "sdb").unlink()
    for hint in ("", "../../vda1", MEDIUM.replace("1", "9")):
        carried.hint = hint
        assert machine.devices(carried) == []


def test_boot_sectors() -> None:
    assert enrolment.parse_fat_label(fat(b"FAT32   ")) == ""
    assert enrolment.parse_fat_label(fat(b"FAT16   ", b"KEYS       ")) == "KEYS"
    for odd in (b"", bytes(512), fat(b"NTFS    "), fat(b"FAT32   ")[:510], fat(b"FAT32   ")[:-1] + b"\0"):
        assert enrolment.parse_fat_label(odd) is None


# --- What is carried -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One organisation and one machine, which asked to be enrolled and has an answer in a file."""
    with provisioned.site(tmp_path_factory.mktemp("site")) as made:
        made.renew(made.folder)
        made.request()
        made.enroll()
        yield made


@pytest.fixture
def state(shared: Site) -> Iterator[Path]:
    yield shared.state
    (shared.state / "answer.json").unlink(missing_ok=True)


STICK = Stick(Path("/dev/sda1"), "KEYS", "A stick", 1 << 20)


def test_a_stick_carries_the_request_out_and_the_answer_in(
    shared: Site, state: Path, carried: Carried
) -> None:
    name = enrolment.save_request(carried, STICK, state)
    number = enrolment.serial(state)
    assert name == f"mosinit/request-{number}.json"
    assert (carried.folder / name).read_bytes() == (state / "request.json").read_bytes()
    assert [path.name for path in (carried.folder / "mosinit").iterdir()] == [f"request-{number}.json"]
    with pytest.raises(Failure, match=f"has no mosinit/answer-{number}.json"):
        enrolment.take_answer(carried, STICK, state)
    shutil.copy(shared.answer, carried.folder / "mosinit/answer.json")
    assert enrolment.take_answer(carried, STICK, state) == "mosinit/answer.json"
    assert (state / "answer.json").read_bytes() == shared.answer.read_bytes()
    assert (state / "answer.json").stat().st_mode & 0o777 == 0o600
    # That of this machine comes first, whatever else lies there.
    (carried.folder / "mosinit/answer.json").write_text("of another machine")
    shutil.copy(shared.answer, carried.folder / f"mosinit/answer-{number}.json")
    assert enrolment.take_answer(carried, STICK, state) == f"mosinit/answer-{number}.json"
    assert carried.mounts == [("sda1", "vfat", read_only) for read_only in (False, True, True, True)]


def test_a_stick_that_does_not_work(state: Path, carried: Carried) -> None:
    carried.fails = errno.EIO
    with pytest.raises(Failure, match=r"A stick, 1 MiB, KEYS\) cannot be used \(Input/output error\)"):
        enrolment.save_request(carried, STICK, state)
    with pytest.raises(Failure, match="cannot be used"):
        enrolment.take_answer(carried, STICK, state)


def test_no_request_yet(host: Host, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="no request yet"):
        enrolment.save_request(host, STICK, tmp_path)
    for words in (["request"], ["answer"]):
        with pytest.raises(Failure, match="no request yet"):
            enrolment.serve(host, words, io.BytesIO(b"{}"), io.BytesIO(), tmp_path)


def refused_answers(shared: Site) -> dict[str, bytes]:
    """Return what is no answer to this machine's request."""
    answer = exchange.parse_answer(shared.answer.read_bytes(), "answer")
    damaged = bytearray(answer.order.signature)
    damaged[-1] ^= 1
    return {
        "nothing": b"",
        "text": b"no JSON",
        "no answer": (shared.state / "request.json").read_bytes(),
        "large": b" " * (exchange.DOCUMENT_BYTES + 1),
        "damaged": exchange.encode_answer(
            answer._replace(order=answer.order._replace(signature=bytes(damaged)))
        ),
    }


@pytest.mark.parametrize("kind", ["nothing", "text", "no answer", "large", "damaged"])
def test_only_the_answer_to_this_request_gets_in(
    kind: str, shared: Site, state: Path, carried: Carried
) -> None:
    untrusted = refused_answers(shared)[kind]
    (carried.folder / "mosinit").mkdir()
    (carried.folder / "mosinit/answer.json").write_bytes(untrusted)
    with pytest.raises((Failure, init.Refused)):
        enrolment.take_answer(carried, STICK, state)
    stdout = io.BytesIO()
    with pytest.raises((Failure, init.Refused)):
        enrolment.serve(carried, ["answer"], io.BytesIO(untrusted), stdout, state)
    assert not (state / "answer.json").exists()
    assert stdout.getvalue() == b""


def test_the_answer_to_another_machine_stays_outside(
    shared: Site, state: Path, host: Host, tmp_path: Path
) -> None:
    """The very same organisation, another request."""
    theirs = tmp_path / "theirs"
    shutil.copytree(state, theirs)
    (theirs / "config.key").write_bytes(bytes(32))
    with pytest.raises(init.Refused) as refused:
        enrolment.put_answer(host, shared.answer.read_bytes(), "the answer", theirs)
    assert refused.value.check == "TPM-IDENTITY"
    assert not (theirs / "answer.json").exists()


# --- By SSH ----------------------------------------------------------------------------------------------


def test_ssh_hands_out_the_request_and_takes_the_answer(shared: Site, state: Path, host: Host) -> None:
    stdout = io.BytesIO()
    enrolment.serve(host, ["request"], io.BytesIO(), stdout, state)
    assert stdout.getvalue() == (state / "request.json").read_bytes()
    stdout = io.BytesIO()
    enrolment.serve(host, ["answer"], io.BytesIO(shared.answer.read_bytes()), stdout, state)
    assert stdout.getvalue() == b"the answer was taken: the installation goes on\n"
    assert (state / "answer.json").read_bytes() == shared.answer.read_bytes()


# --- Event log and approvals -----------------------------------------------------------------------------


@pytest.fixture
def reseal(shared: Site, tmp_path: Path) -> Reseal:
    """A live system of the organisation, where nothing was taken yet."""
    left = installation.make_left(tmp_path / "left", shared.keyset)
    return Reseal(tmp_path / "run" / "approvals.json", left, shared.log)


def approvals_of(shared: Site, **changes: object) -> bytes:
    """Return approvals as the organisation writes them."""
    signed = approvals.approve_platform(shared.keyset, b"\1" * 32, 1)
    key = init.tpm_name(approvals.policy_keys(shared.keyset).platform)
    row = exchange.Approval(b"\1" * 32, 1, signed.signature, "a test")
    made = exchange.Approvals(shared.keyset.product, key, (row,))
    return exchange.encode_approvals(made._replace(**changes))  # type: ignore[arg-type]


def test_ssh_hands_out_the_event_log_and_takes_approvals(shared: Site, host: Host, reseal: Reseal) -> None:
    stdout = io.BytesIO()
    enrolment.serve(host, ["event-log"], io.BytesIO(), stdout, reseal=reseal)
    assert stdout.getvalue() == shared.log.read_bytes()
    stdout = io.BytesIO()
    made = approvals_of(shared)
    enrolment.serve(host, ["approvals"], io.BytesIO(made), stdout, reseal=reseal)
    assert stdout.getvalue() == b"the approvals were taken: what waits for them goes on\n"
    assert reseal.approvals.read_bytes() == made
    assert reseal.approvals.stat().st_mode & 0o777 == 0o600
    assert reseal.approvals.parent.stat().st_mode & 0o777 == 0o700


def test_a_stick_carries_the_event_log_out_and_approvals_in(
    shared: Site, carried: Carried, reseal: Reseal
) -> None:
    name = enrolment.save_event_log(carried, STICK, "0" * 16, reseal.event_log)
    assert name == f"mosinit/event-log-{'0' * 16}.bin"
    assert (carried.folder / name).read_bytes() == shared.log.read_bytes()
    assert [path.name for path in (carried.folder / "mosinit").iterdir()] == [Path(name).name]
    with pytest.raises(Failure, match=r"has no mosinit/approvals\.json"):
        enrolment.take_approvals(carried, STICK, reseal)
    (carried.folder / "mosinit/approvals.json").write_bytes(approvals_of(shared))
    assert enrolment.take_approvals(carried, STICK, reseal) == "mosinit/approvals.json"
    assert reseal.approvals.read_bytes() == approvals_of(shared)
    assert carried.mounts == [("sda1", "vfat", read_only) for read_only in (False, True, True)]


@pytest.mark.parametrize("kind", ["nothing", "text", "large", "another product", "another key", "an answer"])
def test_only_approvals_of_this_organisation_get_in(
    kind: str, shared: Site, carried: Carried, reseal: Reseal
) -> None:
    untrusted = {
        "nothing": b"",
        "text": b"no JSON",
        "large": approvals_of(shared) + b" " * init.MIB,
        "another product": approvals_of(shared, product=shared.other.product),
        "another key": approvals_of(shared, platform_key=bytes(34)),
        "an answer": shared.answer.read_bytes(),
    }[kind]
    (carried.folder / "mosinit").mkdir()
    (carried.folder / "mosinit/approvals.json").write_bytes(untrusted)
    with pytest.raises((Failure, init.Refused)):
        enrolment.take_approvals(carried, STICK, reseal)
    stdout = io.BytesIO()
    with pytest.raises((Failure, init.Refused)):
        enrolment.serve(carried, ["approvals"], io.BytesIO(untrusted), stdout, reseal=reseal)
    assert not reseal.approvals.exists()
    assert stdout.getvalue() == b""


def test_a_machine_without_an_event_log_says_so(host: Host, reseal: Reseal) -> None:
    with pytest.raises(Failure, match="there is no event log"):
        enrolment.serve(
            host, ["event-log"], io.BytesIO(), io.BytesIO(),
            reseal=dataclasses.replace(reseal, event_log=reseal.left / "none"),
        )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [[], ["sh"], ["event-log", "x"], ["approvals", "/etc/passwd"], ["Event-log"],
     ["request", "auths.json"], ["request;sh"], ["answer", "/etc/passwd"], ["../request"],
     ["scp", "-t", "/"], ["Request"], [""]],
)  # fmt: skip
def test_nothing_else_is_served(words: list[str], state: Path, host: Host) -> None:
    stdout = io.BytesIO()
    with pytest.raises(Usage, match="`request` prints"):
        enrolment.serve(host, words, io.BytesIO(b"x"), stdout, state)
    assert stdout.getvalue() == b""


def test_the_fingerprint_is_the_one_that_ssh_shows(tmp_path: Path) -> None:
    key = tmp_path / "host_key"
    assert enrolment.ssh_fingerprint(key) == ""
    (tmp_path / "host_key.pub").write_bytes(make_ssh_keys()["etc/ssh/ssh_host_ed25519_key.pub"])
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", f"{key}.pub"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split()[1] == enrolment.ssh_fingerprint(key)
    (tmp_path / "host_key.pub").write_text("ssh-ed25519\n")
    assert enrolment.ssh_fingerprint(key) == ""
