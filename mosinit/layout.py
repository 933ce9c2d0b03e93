"""The disk of an installed machine: which partitions it gets, and which disks may be made into one.

First everything is looked at and a plan is made; only `write` changes anything, and only the planned disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mosinit import content, init
from mosinit.content import Row, printable
from mosinit.host import Failure, Host

GIB = 1 << 30
SMALLEST = 8 * GIB
ESP_BYTES, CONFIG_BYTES = 512 * init.MIB, 128 * init.MIB
SMALLEST_VOLUME = 64 * init.MIB
# A disk has this id while it is being installed: whoever finds it and our mark may begin without asking.
UNFINISHED = "5a3d1b0e-6f0c-4d7a-9c55-d0b3a1f7e2c4"
EDGES = init.MIB  # of a disk, where tables and superblocks lie
# Written before anything else, where no partition table reaches and no partition lies: so a disk whose table
# a power cut tore is known as one that was being installed.
MARK_BYTES = 4096
MARK_OFFSET = EDGES // 2
LAID_OUT = ("esp", "machine-config", "machine-store", "machine-scratch")  # and a volume for /var, or none
# linux/major.h has no list of what is no disk of its own; sysfs calls them so.
NO_DISKS = re.compile(
    r"(loop|ram|zram|dm-|md|sr|fd|mtdblock|nbd|zd|bcache|drbd)[0-9]|mmcblk[0-9]+(boot|rpmb)"
)


@dataclass(frozen=True)
class Disk:
    """What is known of a disk before anything is done with it. All text is printable."""

    path: Path
    name: str
    size: int
    sector: int
    read_only: bool
    serial: str  # its own, or else its name in this system
    model: str
    content: str  # what is on it, for a person; empty if nothing
    unfinished: bool = False  # of ours, broken off, and nothing else since: nobody has to be asked
    wwn: str = ""
    by_id: tuple[Path, ...] = ()  # names that lead to it, the best first
    transport: str = ""  # nvme, usb, sata, virtio, …
    rows: tuple[Row, ...] = ()
    unusable: str = ""  # why it can never be chosen, in one line; empty if it can
    fingerprint: str = ""  # of serial, size and what lies there, as it was looked at
    number: str = ""  # MAJOR:MINOR
    sequence: str = ""  # the kernel's own count of disks: none has it twice
    complete: str = ""  # all is on it, for the machine whose TPM has a storage key of this name

    @property
    def word(self) -> str:
        """What consents to losing just this: serial, then size and what lies there."""
        serial = re.sub(r"[^A-Za-z0-9._:+]+", "_", self.serial)[:64]
        return f"{serial}-{_size_mark(self.size)}{self.fingerprint[:10]}"

    @property
    def members(self) -> tuple[Row, ...]:
        """What is encrypted, or part of what may lie on other disks too."""
        return tuple(row for row in self.rows if row.member)


@dataclass(frozen=True)
class Partition:
    """A partition to be made; `start` and `size` in bytes, `holds` for a person."""

    number: int
    name: str
    kind: str
    uuid: str
    start: int
    size: int
    holds: str


@dataclass(frozen=True)
class Plan:
    """What will be on a disk, and what will no longer be there."""

    disk: Disk
    identity: str
    partitions: tuple[Partition, ...]
    lost: str

    def named(self, name: str) -> Partition:
        """Return the partition of that name."""
        return next(part for part in self.partitions if part.name == name)


def make_plan(
    disk: Disk, state: int = 0, new_uuid: Callable[[], str] = lambda: str(uuid.uuid4()), *,
    store: int = 0, scratch: int = 0,
) -> Plan:  # fmt: skip
    """Lay out a disk. Raises `Failure`.

    `state` is bytes of a volume for what must survive, 0 for none; store and scratch have half and a quarter
    of what is left, or so many bytes.
    """
    if disk.size < SMALLEST:
        raise Failure(
            f"{disk.path} has {disk.size >> 20} MiB: a machine needs a disk of {SMALLEST >> 20} MiB"
        )
    # The last MiB holds the second partition table.
    rest = disk.size // init.MIB * init.MIB - 2 * init.MIB - ESP_BYTES - CONFIG_BYTES
    asked = {init.STATE: state, "store": store, "scratch": scratch}
    sizes = {**asked, "store": store or rest // 2, "scratch": scratch or rest // 4}
    for name in sorted(sizes, key=lambda name: not asked[name]):
        most = rest - sum(_whole(size) for other, size in sizes.items() if other != name)
        if sizes[name] and not SMALLEST_VOLUME <= sizes[name] <= most:
            others = " and ".join(f"{sizes[other] >> 20} MiB of {other}" for other in sizes if other != name)
            raise Failure(
                f"a {name} volume on {disk.path} can have {SMALLEST_VOLUME >> 20} to {max(0, most) >> 20} "
                f"MiB beside {others}: choose other sizes"
            )
    rows = [
        ("esp", init.ESP_TYPE, ESP_BYTES, "boot loader and UKIs, FAT32"),
        ("machine-config", init.CONFIG_TYPE, CONFIG_BYTES, "/config, encrypted with integrity"),
        ("machine-store", init.STORE_TYPE, _whole(sizes["store"]), "/atomfs-cache, encrypted"),
        (
            "machine-scratch",
            init.SCRATCH_TYPE,
            _whole(sizes["scratch"]),
            "/scratch-writes, encrypted anew at each boot",
        ),
    ]
    if state:
        rows.append((init.STATE, init.LINUX_TYPE, _whole(state), "/var, encrypted"))
    partitions, start = [], init.MIB
    for number, (name, kind, size, holds) in enumerate(rows, 1):
        partitions.append(Partition(number, name, kind, new_uuid(), start, size, holds))
        start += size
    return Plan(disk, new_uuid(), tuple(partitions), disk.content)


def _whole(size: int) -> int:
    return size // init.MIB * init.MIB


def script(plan: Plan, identity: str) -> bytes:
    """Return what sfdisk makes the partition table from."""
    sector = plan.disk.sector
    lines = ["label: gpt", f"label-id: {identity}", "unit: sectors", f"first-lba: {init.MIB // sector}"]
    lines += [
        f"start={part.start // sector}, size={part.size // sector}, type={part.kind}, uuid={part.uuid}, "
        f"name={part.name}"
        for part in plan.partitions
    ]
    return "".join(f"{line}\n" for line in lines).encode()


# --- Looking ------------------------------------------------------------------------------------------


def disks(host: Host, block: Path = Path("/sys/block")) -> tuple[Disk, ...]:
    """Return every disk of this machine that is one, also those that cannot be used or read."""
    names = sorted(path.name for path in block.glob("*") if not NO_DISKS.match(path.name))
    hidden = {name for name in names if _first(block / name / "hidden") == "1"}
    found = [look(host, Path("/dev", name)) for name in names if name not in hidden]
    return mark_twins([disk for disk in found if disk is not None])


def look(host: Host, path: Path) -> Disk | None:
    """Return what is known of a disk, and why it cannot be used; None if it is a drive without a medium."""
    try:
        disk = inspect(host, path)
        return replace(disk, unusable=why_not(host, disk) or too_small(disk))
    except (Failure, OSError) as error:
        sectors = _first(Path("/sys/block", path.name, "size"))
        if sectors in ("", "0"):
            return None
        said = str(error).removeprefix(f"{path} ").removesuffix(": name another disk")
        return replace(_named(path), size=int(sectors) * 512, unusable=said)


def mark_twins(found: Sequence[Disk]) -> tuple[Disk, ...]:
    """Make unusable what cannot be told from another disk."""
    marked = []
    for disk in found:
        twins = [other for other in found if other.path != disk.path and _same(disk, other)]
        words = f"has the serial {disk.serial!r}, as {', '.join(str(twin.path) for twin in twins)} has"
        marked.append(replace(disk, unusable=disk.unusable or words) if twins else disk)
    return tuple(marked)


def _same(one: Disk, other: Disk) -> bool:
    """Say whether two disks cannot be told apart: those of one NVMe controller can, by their names."""
    return one.wwn == other.wwn if one.wwn and other.wwn else one.serial == other.serial


def _names(folder: Path = Path("/dev/disk/by-id")) -> str:
    """Return which disks there are, for a message: who installs may see this computer by no other way."""
    try:
        names = sorted(
            name for name in os.listdir(folder) if not re.search(r"-part[0-9]+$|^dm-|^wwn-", name)
        )
    except OSError:
        names = []
    return ", ".join(f"{folder}/{name}" for name in names[:8]) or str(folder)


def inspect(host: Host, path: Path) -> Disk:
    """Return what is known of a disk. Raises `Failure` for what is no whole disk, or cannot be read."""
    real = _whole_disk(path)
    disk = _named(real)
    try:
        fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size, sector = host.device_size(fd)
            if not size:
                raise Failure(f"{path} is empty, a drive without a medium: name another disk")
            seen = replace(disk, size=size, sector=sector, number=host.device_number(fd))
            ends = read_ends(host, fd, size)
        finally:
            os.close(fd)
        rows = content.rows(host, real, size, sector) if sector in (512, 4096) else ()
    except OSError as error:
        raise Failure(f"{path} cannot be read ({error.strerror or error}): name another disk") from error
    text, unfinished, complete = _content(seen, *ends)
    if not is_begun(rows):
        unfinished, complete = False, ""
    parts = [f"{row.size >> 20} MiB" for row in rows if row.number]
    if parts and text != "" and not text[0].isdigit():
        text = f"{len(parts)} partitions ({', '.join(parts)})"
    return replace(
        seen, content=text or ("data" if rows else ""), unfinished=unfinished, rows=rows,
        fingerprint=fingerprint(seen, *ends, rows), complete=complete,
    )  # fmt: skip


def _whole_disk(path: Path) -> Path:
    """Return the device that a name leads to, if it is a whole disk. Raises `Failure`."""
    real = Path(os.path.realpath(path))
    try:
        mode = real.stat().st_mode
    except OSError as error:
        raise Failure(f"there is no disk {path} ({error.strerror}): name one of {_names()}") from error
    whole = _first(Path("/sys/class/block", real.name, "partition"))
    if stat.S_ISBLK(mode) and whole:
        parent = Path(os.path.realpath(Path("/sys/class/block", real.name))).parent.name
        raise Failure(f"{path} is no whole disk, it is partition {whole} of /dev/{parent}: name that")
    if not stat.S_ISBLK(mode) or not Path("/sys/block", real.name).is_dir():
        raise Failure(f"{path} is no whole disk: name one of {_names()}")
    return real


def _named(path: Path) -> Disk:
    """Return what the kernel says of a disk without reading it."""
    folder = Path("/sys/block", path.name)
    return Disk(
        path, path.name, 0, 0, _first(folder / "ro") != "0", own_serial(folder) or path.name,
        printable(_first(folder / "device/model", folder / "device/name")), "",
        wwn=printable(_first(folder / "wwid", folder / "device/wwid")), by_id=_links(path),
        transport=transport(folder), sequence=_first(folder / "diskseq"),
    )  # fmt: skip


def own_serial(folder: Path) -> str:
    """Return the serial of a disk by its folder in sysfs, as it is printed on it where the kernel knows."""
    try:
        page = (folder / "device/vpd_pg80").read_bytes()  # SPC-4, 7.8.15: four bytes, then the serial
    except OSError:
        page = b""
    usb = next((up / "serial" for up in _above(folder) if (up / "idVendor").exists()), folder / "serial")
    said = _first(folder / "serial", folder / "device/serial") or printable(
        page[4:].decode("ascii", "replace")
    )
    return said or _first(usb, folder / "device/wwid", folder / "wwid", folder / "device/cid")


def _above(folder: Path) -> tuple[Path, ...]:
    return tuple(Path(os.path.realpath(folder)).parents)


def transport(folder: Path) -> str:
    """Say how a disk is connected."""
    place = f"{os.path.realpath(folder)}/"
    for part, words in (
        ("/usb", "usb"), ("/nvme", "nvme"), ("/virtio", "virtio"), ("/ata", "sata"), ("/mmc", "mmc"),
        ("/end_device", "sas"), ("/host", "scsi"),
    ):  # fmt: skip
        if re.search(rf"{part}[^/]*[0-9]", place):
            return words
    return ""


def _links(path: Path, folder: Path = Path("/dev/disk/by-id")) -> tuple[Path, ...]:
    """Return the names that lead to a disk, those for people first."""
    try:
        links = [link for link in folder.iterdir() if os.path.realpath(link) == str(path)]
    except OSError:
        return ()
    plain = [link for link in links if link.name.isprintable()]
    return tuple(sorted(plain, key=lambda link: (link.name.startswith(("wwn-", "nvme-eui.")), link.name)))


def _first(*paths: Path) -> str:
    for path in paths:
        try:
            text = "".join(c for c in path.read_text(errors="replace").strip() if c.isprintable())
        except OSError:
            continue
        if text:
            return text[:200]
    return ""


def read_ends(host: Host, fd: int, size: int) -> tuple[bytes, bytes]:
    """Read both ends of a disk, where tables and signatures lie."""
    part = min(EDGES, size)
    return host.read_at(fd, 0, part), host.read_at(fd, size - part, part)


def fingerprint(disk: Disk, head: bytes, tail: bytes, rows: Sequence[Row]) -> str:
    """Return the hash of a disk's serial and size, of what lies at both ends, and of what is said to lie
    between them: whoever consents has seen that.
    """
    said = f"mosinit disk\0{disk.serial}\0{disk.wwn}\0{disk.size}\0{rows!r}\0".encode()
    return hashlib.sha256(said + head + tail).hexdigest()


def _size_mark(size: int) -> str:
    """Return what of a word tells the size, so that one that changed can be named."""
    return hashlib.sha256(b"size %d" % size).hexdigest()[:2]


def mark(disk: Disk, storage_key: str = "") -> bytes:
    """Return what lies on a disk while it is installed, and on no copy of it.

    Once all was read back it names the storage key of the machine's TPM, which is closed from then on; it
    goes last of all, when the disk has its own id and starts a machine. All of it lies in one sector, which
    no power cut tears.
    """
    own = "" if disk.serial == disk.name else disk.serial
    said = f"mosinit is installing on this disk {UNFINISHED}\n{disk.size} {own}\n"
    said += f"complete for {storage_key}\n" if storage_key else ""
    return said.encode().ljust(MARK_BYTES, b"\0")


def _marked(disk: Disk, head: bytes) -> tuple[bool, str]:
    """Return whether a disk has our mark, and the storage key that it names."""
    seen = head[MARK_OFFSET : MARK_OFFSET + MARK_BYTES]
    found = re.search(rb"\ncomplete for ([0-9a-f]{68})\n", seen)
    name = found[1].decode() if found else ""
    return seen == mark(disk, name), name


def _content(disk: Disk, head: bytes, tail: bytes) -> tuple[str, bool, str]:
    """Say what a disk holds: its partitions if it has a table, or just that it is not empty; whether it is
    unfinished; and for which storage key it is complete.
    """
    sector, empty = disk.sector, not any(head) and not any(tail)
    if sector not in (512, 4096) or disk.size < 2 * EDGES:
        return ("" if empty else "data"), False, ""
    marked, name = _marked(disk, head)
    header, entries = head[sector : 2 * sector], head[2 * sector : 2 * sector + 16384]
    try:
        parts = init.parse_gpt(header, entries, sector, disk.size // sector)
    except init.Refused:
        # Once all is on a disk no power cut tears its table, of which one sector alone changes: something
        # else did, and a machine may have started from it.
        return ("" if empty else "data without a valid partition table"), marked and not name, ""
    unfinished = marked and disk_id(header) == UNFINISHED
    sizes = ", ".join(f"{part.size >> 20} MiB" for part in parts)
    text = f"{len(parts)} partitions ({sizes})" if parts else "an empty partition table"
    return text, unfinished, name if marked else ""


def is_begun(rows: Sequence[Row]) -> bool:
    """Say whether all that lies on a disk can be of an installation that was broken off.

    Our mark lies before the first partition, where a new table or LVM leaves it: whoever used the disk for
    something else since has not consented to lose that.
    """
    kinds = [row.kind for row in rows]
    laid = [content.KINDS[kind] for kind in (init.ESP_TYPE, *content.OURS)]
    # Where our table was torn, its protective MBR alone may be left; or nothing.
    ours = kinds in ([], [content.KINDS["ee"]], laid, [*laid, content.KINDS[init.LINUX_TYPE]])
    return ours and all(row.holds in ("", "vfat", "crypto_LUKS") and not row.member for row in rows)


def why_not(host: Host, disk: Disk) -> str:
    """Return why nothing can be written to a disk, in words that go on from its name; empty if it can."""
    if disk.read_only:
        return "cannot be written"
    if disk.sector not in (512, 4096):
        return f"has sectors of {disk.sector} bytes, and 512 or 4096 are supported"
    if medium := boot_medium(host, disk):
        return f"is the medium that this system was booted from ({medium})"
    # The kernel lends a disk to one user at a time, its partitions count: mounts, swap, RAID, mappings.
    try:
        os.close(os.open(disk.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return f"is in use ({users(disk) or error.strerror})"
    return ""


def too_small(disk: Disk) -> str:
    """Return that a disk is too small for a machine, in such words; empty if it is not."""
    if disk.size < SMALLEST:
        return f"has {disk.size >> 20} MiB, and a machine needs a disk of {SMALLEST >> 20} MiB"
    return ""


@dataclass(frozen=True)
class Consent:
    """What somebody said may be lost: the word of a disk, or just its serial where `serial_is_enough`; and
    whether what is encrypted, or belongs to other disks too, may go with it.
    """

    word: str | None = None
    members: bool = False
    serial_is_enough: bool = False


def check_usable(host: Host, disk: Disk, consent: Consent = Consent()) -> None:  # noqa: B008 (it is frozen)
    """Refuse a disk that is in use, too small, cannot be written, or holds what nobody said may be lost.

    Raises `Failure`.
    """
    if reason := why_not(host, disk) or too_small(disk):
        raise Failure(f"{disk.path} {reason}: {_another(reason)}")
    check_single(disk, consent.word if consent.serial_is_enough else None)
    check_consent(disk, consent)


def check_free(host: Host, disk: Disk) -> None:
    """Refuse a disk that is in use, cannot be written, or cannot be told from another. Raises `Failure`."""
    if reason := why_not(host, disk):
        raise Failure(f"{disk.path} {reason}: {_another(reason)}")
    check_single(disk)


def _another(reason: str) -> str:
    return "name another disk, or stop its user" if reason.startswith("is in use") else "name another disk"


def check_single(disk: Disk, serial: str | None = None) -> None:
    """Refuse a disk that cannot be told from another; `serial` is all that somebody said of it, if that is
    all. Raises `Failure`.
    """
    by_serial = serial == disk.serial
    twins = [
        other for other in _others(disk) if _same(disk, other) or (by_serial and disk.serial == other.serial)
    ]
    if twins:
        also = ", ".join(str(twin.path) for twin in twins)
        raise Failure(
            f"{disk.path} has the serial {disk.serial!r}, as {also} has: take out the one that is not meant"
        )


def _others(disk: Disk, block: Path = Path("/sys/block")) -> list[Disk]:
    names = (path.name for path in block.glob("*") if not NO_DISKS.match(path.name))
    return [
        _named(Path("/dev", name))
        for name in names
        if name != disk.name and _first(block / name / "hidden") != "1"
    ]


def check_consent(disk: Disk, consent: Consent) -> None:
    """Refuse to lose what nobody said may be lost. Raises `Failure`."""
    said = consent.word
    if said is not None and said != disk.word and not (consent.serial_is_enough and said == disk.serial):
        raise Failure(
            f"{disk.path} {_changed(disk, said)}: nothing was erased; look at it again with --plan"
        )
    if not disk.content or disk.unfinished:
        return
    if said is None:
        raise Failure(
            f"{disk.path} ({disk.model or 'no model'}) holds {disk.content}: to lose all of it, say "
            f"--erase {disk.word}"
        )
    if said != disk.word and is_machine(disk):
        raise Failure(
            f"{disk.path} holds an installed machine, and its serial alone does not let that be lost: give "
            f"erase: {disk.word}"
        )
    if disk.members and not consent.members:
        listed = "; ".join(map(str, disk.members[:4]))
        raise Failure(
            f"{disk.path} has what is encrypted or may belong to other disks too ({listed}): to lose that "
            "as well, say --erase-members (in answers: members: true)"
        )


def _changed(disk: Disk, said: str) -> str:
    """Say what of a disk is not as a word says."""
    serial, _, marks = said.rpartition("-")
    ours, _, now = disk.word.rpartition("-")
    if said == disk.serial or not re.fullmatch(r"[0-9a-f]{12}", marks):
        return f"wants the word {disk.word}, not {printable(said)!r}"
    if serial != ours:
        return f"has the serial {disk.serial!r}, not that of {printable(said)!r}"
    if marks[:2] != now[:2]:
        return f"has another size than when {printable(said)!r} was shown"
    return f"has other partition tables or signatures than when {printable(said)!r} was shown"


def is_machine(disk: Disk) -> bool:
    """Say whether a disk looks like that of a machine that was installed to its end."""
    kinds = [row.kind for row in disk.rows]
    return not disk.unfinished and all(kinds.count(content.KINDS[kind]) == 1 for kind in content.OURS)


def users(disk: Disk) -> str:
    """Say who uses a disk or its partitions, as far as the kernel tells."""
    folder = Path("/sys/block") / disk.name
    found = []
    for part in [folder, *sorted(path.parent for path in folder.glob("*/partition"))]:
        number, name = _first(part / "dev"), f"/dev/{part.name}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            words = line.split(" ")
            if words[2] == number:
                found.append(f"{name} is mounted at {words[4]}")
        for line in Path("/proc/swaps").read_text().splitlines()[1:]:
            if line.split()[0] == name:
                found.append(f"{name} is swap space")
        held = [_first(holder / "dm/name") or holder.name for holder in sorted(part.glob("holders/*"))]
        found += [f"{name} belongs to {holder}" for holder in held]
    return ", ".join(found)[:300]


def boot_medium(host: Host, disk: Disk) -> str:
    """Return the id of the partition that this system was started from if it lies on this disk."""
    hint = host.efi_read("LoaderDevicePartUUID", init.LOADER_GUID)
    wanted = hint[1].decode("utf-16-le", errors="replace").rstrip("\0").lower() if hint else ""
    if not wanted:
        return ""
    fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header, entries = (host.read_at(fd, at * disk.sector, 16384) for at in (1, 2))
        parts = init.parse_gpt(header[: disk.sector], entries, disk.sector, disk.size // disk.sector)
    except (init.Refused, OSError):
        return ""
    finally:
        os.close(fd)
    return wanted if wanted in {part.uuid for part in parts} else ""


# --- Acting -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(host: Host, disk: Disk) -> Iterator[None]:
    """Keep a disk open, so that no other gets its name when it is unplugged. Raises `Failure` if one did."""
    fd = _open_same(host, disk, os.O_RDONLY)
    try:
        yield
    finally:
        os.close(fd)


def _open_same(host: Host, disk: Disk, flags: int) -> int:
    """Open the disk that was looked at, and no other. Raises `Failure`, or `OSError` for one in use."""
    try:
        fd = os.open(disk.path, flags | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Failure(f"{disk.path} is gone since it was looked at: plug it in, and begin anew") from error
    now = replace(_named(disk.path), number=host.device_number(fd), size=host.device_size(fd)[0])
    for what in ("number", "sequence", "serial", "wwn", "size"):
        seen, wanted = getattr(now, what), getattr(disk, what)
        if seen != wanted:
            os.close(fd)
            words = {"number": "device number", "sequence": "sequence number"}.get(what, what)
            raise Failure(
                f"{disk.path} is another disk than the one that was looked at (its {words} was {wanted}, "
                f"and is {seen}): nothing was written; look at it again with --plan"
            )
    return fd


def _check_unchanged(host: Host, disk: Disk, fd: int) -> None:
    # Not what this computer remembers of the disk: another one may have written to it.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    rows = content.rows(host, disk.path, disk.size, disk.sector)
    if fingerprint(disk, *read_ends(host, fd, disk.size), rows) != disk.fingerprint:
        raise Failure(
            f"{disk.path} changed since it was looked at (partition tables or signatures): nothing was "
            "written; look at it again with --plan"
        )


def write(host: Host, plan: Plan) -> None:
    """Make the partition table, marked as unfinished; what was at the edges of the disk is wiped.

    The disk is compared with what was looked at once nobody else can use it any more.
    """
    disk, marked = plan.disk, mark(plan.disk)
    fd = _open_same(host, disk, os.O_RDWR | os.O_EXCL)
    try:
        _check_unchanged(host, disk, fd)
        os.pwrite(fd, marked, MARK_OFFSET)
        os.fsync(fd)
        os.pwrite(fd, bytes(MARK_OFFSET), 0)
        behind = MARK_OFFSET + len(marked)
        os.pwrite(fd, bytes(EDGES - behind), behind)
        os.pwrite(fd, bytes(EDGES), disk.size - EDGES)
        for part in plan.partitions:
            # Nothing that an earlier owner left may look like a volume of ours.
            for offset in (part.start, part.start + part.size - EDGES):
                os.pwrite(fd, bytes(EDGES), offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    host.run(
        ["sfdisk", "--quiet", "--lock=yes", "--wipe=always", "--wipe-partitions=never", disk.path],
        stdin=script(plan, UNFINISHED), timeout=120,
    )  # fmt: skip
    check(host, plan)


def note_complete(host: Host, plan: Plan, storage_key: bytes) -> None:
    """Note on the disk that all is on it, for the machine with that TPM: see `install.resume`."""
    fd = _open_same(host, plan.disk, os.O_RDWR)
    try:
        os.pwrite(fd, mark(plan.disk, storage_key.hex()), MARK_OFFSET)
        os.fsync(fd)
    finally:
        os.close(fd)


def plan_of(host: Host, disk: Disk) -> Plan:
    """Return the plan by which a disk was made that is complete, with the id that it has or is to get.

    Raises `Failure` if it was made by another one.
    """
    fd = _open_same(host, disk, os.O_RDONLY)
    try:
        header, entries = (host.read_at(fd, at * disk.sector, 16384) for at in (1, 2))
    finally:
        os.close(fd)
    seen = init.parse_gpt(header[: disk.sector], entries, disk.sector, disk.size // disk.sector)
    parts = [Partition(p.number, p.name, p.kind, p.uuid, p.start, p.size, "") for p in seen]
    if tuple(part.name for part in parts) not in (LAID_OUT, (*LAID_OUT, init.STATE)):
        raise Failure(
            f"{disk.path} is not laid out as its mark says: name another disk, or to lose all of it, say "
            f"--erase {disk.word}"
        )
    identity = disk_id(header)
    return Plan(disk, str(uuid.uuid4()) if identity == UNFINISHED else identity, tuple(parts), "")


def disk_id(header: bytes) -> str:
    """Return the disk id that a GPT header has."""
    return init.format_guid(header[56:72])  # UEFI specification 5.3.2


def take_id(host: Host, plan: Plan) -> None:
    """Give the disk its own id, before anything on it can start: from here it needs a word to be erased. One
    that has it is left as it is, since it may have started.
    """
    fd = _open_same(host, plan.disk, os.O_RDONLY)
    try:
        has = disk_id(host.read_at(fd, plan.disk.sector, plan.disk.sector))
    finally:
        os.close(fd)
    if has != plan.identity:
        words = ["--quiet", "--lock=yes", "--no-reread", "--disk-id", str(plan.disk.path), plan.identity]
        host.run(["sfdisk", *words], timeout=120)
        host.sync_file(plan.disk.path)
    check(host, plan)
    wait_for_devices(host, plan)


def wipe_mark(host: Host, plan: Plan) -> None:
    """Wipe the mark of a disk that has its own id and starts: nothing is left to be finished."""
    fd = _open_same(host, plan.disk, os.O_RDWR)
    try:
        os.pwrite(fd, bytes(MARK_BYTES), MARK_OFFSET)
        os.fsync(fd)
    finally:
        os.close(fd)
    check(host, plan)


def check(host: Host, plan: Plan) -> None:
    """See that the bring-up reads the table that was planned. Raises `Refused`, `Failure`."""
    disk = plan.disk
    fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header, entries = (host.read_at(fd, at * disk.sector, 16384) for at in (1, 2))
    finally:
        os.close(fd)
    seen = init.parse_gpt(header[: disk.sector], entries, disk.sector, disk.size // disk.sector)
    wanted = tuple((p.number, p.kind, p.uuid, p.start, p.size) for p in plan.partitions)
    if tuple((p.number, p.kind, p.uuid, p.start, p.size) for p in seen) != wanted:
        raise Failure(f"{disk.path} does not keep what is written to it: use another disk")


def device(plan: Plan, part: Partition) -> Path:
    """Return the block device of a partition; `devices` waits for it."""
    disk = plan.disk
    separator = "p" if disk.name[-1].isdigit() else ""
    return disk.path.with_name(f"{disk.name}{separator}{part.number}")


def wait_for_devices(host: Host, plan: Plan, seconds: float = 10) -> None:
    """Tell the kernel of the partitions, and wait until it shows them as they were planned."""
    # One that reads no such tables itself is told as well.
    host.run(["partx", "--update", plan.disk.path], timeout=60)
    deadline = host.monotonic() + seconds
    for part in plan.partitions:
        path = device(plan, part)
        wanted = f"{part.start // 512} {part.size // 512}"
        folder = Path("/sys/block") / plan.disk.name / path.name
        while (
            f"{_first(folder / 'start')} {_first(folder / 'size')}" != wanted or not path.is_block_device()
        ):
            if host.monotonic() > deadline:
                raise Failure(f"the kernel does not show {path}: restart and install again")
            host.sleep(0.05)
