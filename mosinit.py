#!/usr/bin/python3 -ISB
"""mosinit - bring a machine from its signed initrd to hostfs.

Runs as PID 1. In order: mount the pseudo file systems, load the modules that the build listed, check the
firmware, measure, find the boot disk, have the TPM give its secret, close the fence, open the volumes,
verify the manifest, set up the verity layers, stack hostfs, hand over. Live mode has no secret, and a signed
medium in place of volumes. Each step fails closed, and there is one way out: `main` fences, says on one
screen what was refused and what to do, and restarts the machine.

One file: standard library, cryptography, yaml; the last two are imported only where they are used. Every
line here is in the signed initrd: a change is a new UKI. Words: `untrusted_*` is a byte string from disk
that nobody vouched for.
"""

from __future__ import annotations

import _thread
import binascii
import contextlib
import ctypes
import enum
import errno
import fcntl
import functools
import hashlib
import hmac
import json
import os
import re
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NewType, NoReturn, TypeVar, cast

if TYPE_CHECKING:
    from cryptography import x509

# What functions below import when they need it. The build freezes these beside this file, and nothing else.
_PRIMITIVES = (
    "asymmetric.ec", "asymmetric.ed25519", "asymmetric.padding", "asymmetric.rsa", "ciphers", "hashes",
    "serialization",
)  # fmt: skip
FROZEN_IMPORTS = (
    "cryptography.exceptions", *(f"cryptography.hazmat.primitives.{name}" for name in _PRIMITIVES),
    "cryptography.x509", "cryptography.x509.oid", "encodings.utf_16_le", "ipaddress", "yaml",
)  # fmt: skip

# --- Errors: what is refused, and the table of everything that can be --------------------------------------


class Refused(Exception):
    """A check that failed: people see its title and remedy, not a traceback."""

    def __init__(self, check: str, *, expected: str, seen: str) -> None:
        super().__init__(f"{check}: expected {expected}, seen {seen}")
        self.check, self.expected, self.seen = check, expected, seen


class Check(NamedTuple):
    """One decision of the bring-up. Its id is a public interface and is never reused."""

    title: str
    remedy: str


def parse_checks(table: str) -> dict[str, Check]:
    """Read lines ID: TITLE, the remedy of each in the indented lines below it."""
    rows = re.findall(r"^([A-Z0-9-]+): (.*)\n((?: {4}.*\n)+)", table, re.MULTILINE)
    return {name: Check(title, " ".join(remedy.split())) for name, title, remedy in rows}


CHECKS = parse_checks(
    """
MODULE-LOAD: a kernel module that the build listed does not load
    the UKI and its initrd do not fit each other: build the UKI again with `mosinit build`
MODULE-PARAMETER: a kernel module does not have the parameter that the build set
    build the UKI again; if it repeats, the kernel does not know the parameter
SB-OFF: Secure Boot is off
    switch Secure Boot on in the firmware's setup
SB-MODE: the firmware is in setup or audit mode, where anybody can enrol keys
    choose `Enroll Secure Boot keys` in the menu that the restarted medium shows for a minute, or enrol the
    keyset's PK, KEK and db certificates in the firmware's setup
SB-DB: the firmware trusts other certificates than this system was built for
    make the firmware's db hold exactly the uki and the layer certificate of your keyset
SB-MOK: a variable of the shim boot loader was set, and this boot's kernel trusts the keys in it
    it is deleted where the firmware allows it; restart. If it returns, remove shim from this machine, or
    reset the variables in the firmware's setup
SB-KEYRING: the kernel trusts keys that this system was not built for
    find where the extra key comes from (db, shim, firmware) and remove it there
SB-LOCKDOWN: the kernel is not locked down, so its memory can be read
    boot the UKI as it was built, under Secure Boot
TPM-ABSENT: there is no TPM 2.0
    switch the TPM on in the firmware's setup (also called PTT, fTPM or security device)
TPM-BANK: the TPM's SHA-256 bank does not hold the measurements of this boot
    switch the TPM's SHA-256 bank on in the firmware's setup; boot the UKI through the firmware
TPM-EXTEND: the TPM does not take measurements
    switch the machine off and on; if it repeats, the TPM is broken
TPM-FENCE: the TPM does not close, so secrets could still be taken from it
    the machine is switched off; switch it on again. If it repeats, the TPM is broken
TPM-ANSWER: the TPM did not do what it was asked, or answered what makes no sense
    switch the machine off and on; if it repeats, the TPM is broken, or something sits on its bus
TPM-STATE: the TPM is not in the state in which provisioning leaves it
    finish `mosinit provision`; or clear the TPM, provision and `mosinit recover --dir STATE --key FILE`
TPM-LOCKOUT: the TPM is locked out after too many wrong passwords
    leave the machine on until the lockout ends, or end it with the lockout password of the recovery record
    (`tpm2_dictionarylockout --clear-lockout`)
TPM-CLEARED: the TPM was cleared after this machine was provisioned
    if it was you: provision again, then `mosinit recover --dir STATE --key FILE` on the live medium
TPM-SRK: the TPM has no storage root key, although it was provisioned
    clear the TPM, provision again, then `mosinit recover --dir STATE --key FILE` on the live medium
TPM-IDENTITY: this TPM is not the one in the machine record: the disk of another machine, or a new TPM
    put the disk back, or provision this one and `mosinit recover --dir STATE --key FILE` there
TPM-INDEX: the TPM's epoch index is missing or is not the one that provisioning made
    clear the TPM, provision again, then `mosinit recover --dir STATE --key FILE` on the live medium
TPM-SEAL: the sealed secret was not made by this TPM for this system
    boot the live medium, provision again and run `mosinit recover --dir STATE --key FILE`
TPM-APPROVAL: an approval of this UKI or of this firmware's state is not valid
    boot the live medium and run `mosinit recover --reseal`; if it is the UKI's, install again
TPM-POLICY: the TPM does not open the disk: firmware, its keys or the boot loader changed without approval
    undo the change; if it is to stay, boot the live medium and run `mosinit recover --reseal`
EPOCH: this system is older than what its publisher still calls safe
    boot or install a newer release
EPOCH-ORDER: the order to raise the epoch is not valid
    publish or install the release again; or provision again and run `mosinit recover --dir STATE --key FILE`
RECORD-FORMAT: the machine record is damaged
    boot the live medium, provision again and run `mosinit recover --dir STATE --key FILE`
RECORD-SIGNATURE: the machine record is not signed by this system's SUDI CA
    enroll the machine with the keyset that this UKI was built with
RECORD-PRODUCT: the machine record is for another product
    use a UKI of the product that this machine was enrolled for
VOLUME-IDENTITY: the config volume is not the one in the machine record: somebody else's was put in its place
    find out who changed it; `mosinit recover --anew --dir STATE --key FILE` makes a new one
CMDLINE: the kernel command line is not the signed one
    remove what adds words to it: SMBIOS strings of the hypervisor, add-ons beside the UKI
ESP-EXTRA: the boot stub took credentials, extensions or add-ons that the UKI does not sign
    remove *.cred, *.raw, *.addon.efi on the ESP; or boot the live medium: `mosinit recover --key FILE`
DISK-HINT: the boot stub did not say from which partition it was started
    boot the medium or disk through UEFI, not a network; a stored variable is deleted: restart. If it stays,
    reset the variables in the firmware's setup
DISK-ABSENT: the disk that this system was booted from does not show up
    check cable and controller; if what was seen names a GPT fault, write the medium again
DISK-AMBIGUOUS: two disks carry the partition that this system was booted from
    remove the copy of the disk or medium
DISK-PARTITION: the boot disk does not have exactly one partition of a kind that is needed
    write the medium again from its image
GPT-HEADER: the partition table's header is damaged
    write the medium again from its image
GPT-ENTRY: an entry of the partition table is not valid
    write the medium again from its image
LUKS-HEADER: the header of an encrypted volume is not one that mosinit makes
    boot the live medium and run `mosinit recover --key FILE`: of two copies it takes the good one
LUKS-TOKEN: the config volume does not carry exactly the tokens of a provisioned machine
    boot the live medium, provision again and run `mosinit recover --dir STATE --key FILE`
VOLUME-KEY: an encrypted volume does not open with this machine's key
    use this machine's own disk; or provision again and run `mosinit recover --dir STATE --key FILE`
VOLUME-READ: an encrypted volume does not hold the file system that mosinit made there
    boot the live medium and run `mosinit recover --key FILE`: it repairs what loses no file
VOLUME-STATE: /var lies in a volume `state`, and this machine's disk does not have it
    if the manifest names it first, install the machine again; if not, somebody took it away
STORE-SEAL: the medium's seal is damaged
    write the medium again from its image
STORE-SIGNATURE: the kernel does not accept the signature of the medium's store
    write the medium again from its image, made with the layer key that is in this firmware's db
STORE-READ: the store cannot be read as it was sealed
    the medium is damaged or was changed: write it again from its image, or use another one
STORE-BLOB: a blob that belongs to the release is missing from the store, or cannot be read
    the store is damaged: write the medium again; or `mosinit recover SOURCE --key FILE`
MANIFEST-ABSENT: the store holds no install manifest
    make the medium again with `mosinit build`
MANIFEST-FORMAT: the install manifest is not valid
    correct what is named here and publish it again
MANIFEST-CERTIFICATE: the certificate of the install manifest is not one that can sign manifests
    publish the manifest with the keyset's product key
MANIFEST-CHAIN: the certificate of the install manifest was not issued by this system's manifest CA
    publish the manifest with the keyset that this UKI was built with
MANIFEST-REVOKED: the certificate of the install manifest was revoked
    publish the manifest again with the product key that replaced the revoked one
MANIFEST-SIGNATURE: the signature of the install manifest is wrong
    the manifest was changed after it was signed: publish it again
MANIFEST-PRODUCT: the install manifest is for another product
    use a manifest and medium of this machine's product
MANIFEST-EPOCH: the install manifest is older than what its publisher still calls safe
    use a newer release
MANIFEST-UKI: the install manifest belongs to another UKI than the one that runs
    make the medium again, so that UKI and manifest come from the same build
MANIFEST-SEQUENCE: a generation says something else than the install manifests that it names
    install the release again, or boot another generation
GENERATION: no generation of this machine belongs to the UKI that runs
    boot a UKI that was installed on this machine, or the live medium: `mosinit recover --key FILE`
GIT-REF: manifest.git has no branch main
    boot the live medium and run `mosinit recover --key FILE`: it makes manifest.git anew
GIT-OBJECT: an object of manifest.git is missing or damaged
    boot the live medium and run `mosinit recover --key FILE`: it makes manifest.git anew
GIT-PACKED: somebody's git packed objects or refs of manifest.git
    boot the live medium and run `mosinit recover --key FILE`: it unpacks them
MANIFEST-TARGET: the install manifest does not name one hostfs and one bootkit to start from
    add the missing target to the manifest, or remove the doubled one, and publish it again
IMAGE-DIGEST: an image manifest is not the signed one
    the store is damaged: write the medium again; or `mosinit recover SOURCE --key FILE`
IMAGE-FORMAT: an image manifest is not valid
    publish the image again with `mosinit publish`
LAYER-ROOTHASH: a layer has no dm-verity root hash
    publish the image again with `mosinit publish`, which converts layers
LAYER-SIZE: a layer does not have its signed size
    the store is damaged: write the medium again; or `mosinit recover SOURCE --key FILE`
LAYER-SUPERBLOCK: the dm-verity superblock of a layer is not what mosinit accepts
    publish the image again; verity data must be version 1, sha256, blocks of 4096 bytes
LAYER-SIGNATURE: the kernel does not accept the signature of a layer
    publish the image again with the layer key that is in this firmware's db
LAYER-READ: a layer does not hold what was signed
    the store is damaged: write the medium again; or `mosinit recover SOURCE --key FILE`
LAYER-FILESYSTEM: a layer is neither erofs nor squashfs
    publish the image again with `mosinit publish`, which converts layers
OVERLAY-MOUNT: the layers of hostfs cannot be stacked
    see what was seen; use fewer or other layers
OVERLAY-MOUNTPOINT: hostfs lacks a folder that something must be mounted on
    add the folder to the hostfs image, as a folder and not a link
HOSTFS-INIT: hostfs has no init
    add /sbin/init (a program, for example systemd's) to the hostfs image
"""
)


# --- Constants: formats and numbers of others, with their source -------------------------------------------

Pcr = NewType("Pcr", int)

BLOCK = 4096  # of dm-verity data and hashes, of layers and the store: pinned, never taken from a medium
MIB = 1 << 20

ESP_TYPE = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"  # UEFI specification 5.3.3
# The three of mos, and its tools know them; the fourth: Discoverable Partitions Specification.
CONFIG_TYPE = "f79962b9-24e6-9948-9f94-e6bfdad2771a"
STORE_TYPE = "f79962b9-24e6-9948-9f94-e6bfdad2771b"
SCRATCH_TYPE = "f79962b9-24e6-9948-9f94-e6bfdad2771c"
LINUX_TYPE = "0fc63daf-8483-4772-8e79-3d69d8477de4"
LIVE_STORE_TYPE = "7299327d-41b9-4c11-9222-cba2654b5141"  # ours: the store of a live medium
LIVE_SEAL_TYPE = "1b71b0fa-830c-4ab4-91c4-0b5287589b46"  # ours: its root hash and signature

EFI_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"  # UEFI specification 3.3
EFI_IMAGE_SECURITY = "d719b2cb-3d3a-4596-a3bc-dad00e67656f"  # UEFI specification 32.4.1
EFI_CERT_X509 = "a5c059a1-94e4-4aa7-87b5-ab155c2bf072"  # UEFI specification 32.4.1
LOADER_GUID = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"  # systemd Boot Loader Interface
SHIM_GUID = "605dab50-e046-4300-abb6-3dd810dd8b23"  # shim's variables
# systemd-boot sets it at each boot, whether there is a shim or not; it holds no key.
SHIM_HARMLESS = (f"ShimRetainProtocol-{SHIM_GUID}",)
OUR_GUID = "c084e374-b002-47a5-ad36-30f438fe6019"
EFI_NON_VOLATILE, EFIVARS = 1, "/sys/firmware/efi/efivars"

MEASURED = Pcr(11)  # UAPI group, "Linux TPM PCR Registry": UKI sections and boot phases
EXTRA_PCRS = (Pcr(12), Pcr(13))  # the same: command-line additions and credentials, extension images
ENTER_INITRD, LEAVE_INITRD = b"enter-initrd", b"leave-initrd"  # systemd-pcrphase's words

REPOSITORY = "mosinit"  # the OCI layout in the store
CONFIG, STORE, SCRATCH, SYSROOT = "/config", "/atomfs-cache", "/scratch-writes", "/sysroot"
MOVED = ("/proc", "/sys", "/dev", "/run", STORE, SCRATCH)  # into the new root, of live mode too
STATE = "state"  # the GPT name of the storage volume that is mounted at /var, and its label in a manifest
# What of the root outlives a boot, in /config/state by its path in the root. Nothing else of it gets there.
SSH_KEYS = [f"etc/ssh/ssh_host_{kind}_key" for kind in ("ecdsa", "ed25519", "rsa")]
KEPT = {"etc/machine-id": 0o444} | dict.fromkeys(SSH_KEYS, 0o600)
KEPT |= {f"{key}.pub": 0o644 for key in SSH_KEYS}
STATE_MARK = f"{CONFIG}/state/volume"  # there is one to be mounted at /var: without it nothing starts
POLICY_FOLDER = "/etc/mosinit"
OURS = f"{POLICY_FOLDER}/organisation"
APPROVAL_FILE = "/.extra/tpm2-pcr-signature.json"  # where the stub leaves the section .pcrsig
LEFT = "/run/mosinit"  # what the bring-up leaves to hostfs

WATCHDOG_SECONDS = 240  # the whole bring-up; an iTCO watchdog takes at most 613 s
DISK_SECONDS = 30  # a USB stick behind hubs may take ten
DEFAULT_INITS = ("/sbin/init", "/usr/lib/systemd/systemd")
THREADS = 8  # that wait for the kernel at the same time; more save nothing that can be measured


# --- Kernel: the only code here that touches the world -----------------------------------------------------


class MountFlag(enum.IntFlag):
    """Flags of mount(2), linux/mount.h."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    NOSYMFOLLOW = 256
    BIND = 4096
    MOVE = 8192
    REC = 16384
    SLAVE = 1 << 19


SAFE = MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC
RO_SAFE = MountFlag.RDONLY | SAFE
RO_STRICT = RO_SAFE | MountFlag.NOSYMFOLLOW

SYS = {  # arch/x86/entry/syscalls/syscall_64.tbl
    "add_key": 248, "keyctl": 250, "finit_module": 313, "move_mount": 429, "fsopen": 430, "fsconfig": 431,
    "fsmount": 432, "openat2": 437,
}  # fmt: skip
AT_FDCWD = -100
KEYCTL_DESCRIBE, KEYCTL_READ, KEYCTL_CLEAR = 6, 11, 7  # linux/keyctl.h
PROCESS_KEYRING = -2
LOOP_CTL_GET_FREE, LOOP_CONFIGURE = 0x4C82, 0x4C0A  # linux/loop.h
LO_READ_ONLY, LO_AUTOCLEAR, LO_DIRECT_IO = 1, 4, 16
WDIOC_SETTIMEOUT = 0xC0045706  # linux/watchdog.h
BLKSSZGET, BLKGETSIZE64 = 0x1268, 0x80081272  # linux/fs.h
FS_IOC_SETFLAGS = 0x40086602
TCGETS, TCSETS, IXON = 0x5401, 0x5402, 0x400  # asm-generic/ioctls.h, termbits.h
RB_AUTOBOOT, RB_POWER_OFF = 0x01234567, 0x4321FEDC  # linux/reboot.h
RESOLVE_IN_ROOT = 0x10  # linux/openat2.h

_LOOP_CONFIG = struct.Struct("<II 5Q 4I 64s 64s 32s 2Q 8Q")  # linux/loop.h, loop_config with loop_info64
assert _LOOP_CONFIG.size == 304
_DM_IOCTL = struct.Struct("<3I I I I i I I I Q 128s 129s 7x")  # linux/dm-ioctl.h, dm_ioctl
assert _DM_IOCTL.size == 312
_DM_TARGET = struct.Struct("<QQiI16s")  # linux/dm-ioctl.h, dm_target_spec
assert _DM_TARGET.size == 40


class DmCommand(enum.IntEnum):
    """linux/dm-ioctl.h: _IOWR(0xfd, number, struct dm_ioctl)."""

    DEV_CREATE = 0xC138FD03
    DEV_REMOVE = 0xC138FD04
    DEV_SUSPEND = 0xC138FD06
    DEV_STATUS = 0xC138FD07
    TABLE_LOAD = 0xC138FD09


DM_READONLY = 1
DM_SKIP_LOCKFS = 1 << 10


@contextlib.contextmanager
def held(fd: int) -> Iterator[int]:
    """Close a descriptor when the block ends, however it ends."""
    try:
        yield fd
    finally:
        os.close(fd)


def os_error(what: str, name: str) -> OSError:
    """Make the OSError of the libc call that just failed, naming what was attempted."""
    code = ctypes.get_errno()
    return OSError(code, f"cannot {what} {name}: {os.strerror(code)}")


class Kernel:
    """Mounts, ioctls, files, the clock and restart. Each method is thin and holds no policy."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._consoles: list[int] = [1]
        self._watchdog = self._tpm = -1

    # Console and log

    def print(self, text: str) -> None:
        """Write to every console; a console that does not take it is no reason to stop."""
        for fd in self._consoles:
            with contextlib.suppress(OSError):
                os.write(fd, text.encode(errors="backslashreplace"))

    def open_consoles(self) -> None:
        """Find the consoles that the kernel uses (screen and serial line)."""
        names = self.read("/sys/class/tty/console/active").decode().split()
        fds = [os.open(f"/dev/{name}", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC) for name in names]
        self._consoles = fds or self._consoles
        for fd in self._consoles:
            settings = bytearray(60)
            with contextlib.suppress(OSError):
                fcntl.ioctl(fd, TCGETS, settings)
                # One XOFF byte on the serial line would otherwise stop PID 1 at its next word.
                settings[:4] = (int.from_bytes(settings[:4], "little") & ~IXON).to_bytes(4, "little")
                fcntl.ioctl(fd, TCSETS, settings)

    def log(self, text: str) -> None:
        """Write a line to the kernel log."""
        with contextlib.suppress(OSError):
            self.write("/dev/kmsg", f"<6>mosinit: {text}\n".encode())

    def quiet_kernel(self, level: int) -> None:
        """Let only kernel messages below `level` reach the console, so that lines of ours stay whole."""
        self._libc.klogctl(8, None, level)

    # Files

    def read(self, path: str, limit: int = MIB) -> bytes:
        """Read a file of at most `limit` bytes; OSError with EFBIG beyond it."""
        with held(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)) as fd:
            data = bytearray()
            while chunk := os.read(fd, min(MIB, limit + 1 - len(data))):
                data += chunk
                if len(data) > limit:
                    raise OSError(errno.EFBIG, f"{path} is larger than {limit} bytes")
            return bytes(data)

    def write(self, path: str, data: bytes | bytearray, mode: int = 0o644) -> None:
        """Write a file in one write(2), as pseudo files want it; `mode` is that of a new file."""
        with held(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode)) as fd:
            os.write(fd, data)

    def exists(self, path: str) -> bool:
        """Say whether something, a dangling link too, has this name."""
        return os.path.lexists(path)

    def names(self, path: str) -> list[str]:
        """List a folder, sorted; empty if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(path))
        return []

    def make_folder(self, path: str, mode: int = 0o755) -> None:
        """Make a folder and its parents; one that exists is left as it is."""
        os.makedirs(path, mode, exist_ok=True)

    def is_folder(self, path: str) -> bool:
        """Say whether `path` itself, not what a link points to, is a folder."""
        with contextlib.suppress(FileNotFoundError):
            return stat.S_ISDIR(os.lstat(path).st_mode)
        return False

    def read_in_root(self, root: str, path: str, size: int) -> tuple[int, bytes] | None:
        """Return mode and first bytes of a file, links taken as if `root` were /; None if there is none."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a fifo has nobody who writes
        how = struct.pack("<QQQ", flags, 0, RESOLVE_IN_ROOT)
        with held(os.open(root, os.O_PATH | os.O_CLOEXEC)) as top:
            try:
                file = self._syscall("openat2", top, path.encode(), how, len(how))
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    return None
                raise
        with held(file) as fd:
            mode = os.fstat(fd).st_mode
            return mode, os.read(fd, size) if stat.S_ISREG(mode) else b""

    # EFI variables

    def efi_read(self, name: str, guid: str) -> tuple[int, bytes] | None:
        """Return attributes and value of an EFI variable, None if it is not set."""
        try:
            data = self.read(f"{EFIVARS}/{name}-{guid}")
        except FileNotFoundError:
            return None
        return int.from_bytes(data[:4], "little"), data[4:]

    def efi_write(self, name: str, guid: str, value: bytes) -> None:
        """Set a non-volatile EFI variable of boot and run time; an empty value deletes it."""
        path = f"{EFIVARS}/{name}-{guid}"
        with contextlib.suppress(FileNotFoundError):
            with held(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
                # efivarfs protects what it does not know against `rm -rf`.
                fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("<Q", 0))
            if not value:
                os.unlink(path)
        if value:
            self.write(path, struct.pack("<I", 7) + value)

    # Mounts

    def mount(
        self, source: str, target: str, fstype: str, flags: MountFlag = RO_SAFE, data: str = ""
    ) -> None:
        """Mount; read-only, nosuid, nodev and noexec unless the caller writes what it relaxes."""
        arguments = (source.encode(), target.encode(), fstype.encode(), ctypes.c_ulong(flags), data.encode())
        if self._libc.mount(*arguments) < 0:
            raise os_error("mount", target)

    def unmount(self, target: str, *, lazy: bool = False) -> None:
        """Unmount; `lazy` (MNT_DETACH) takes it out of the tree now and ends it when its last user does."""
        if self._libc.umount2(target.encode(), 2 if lazy else 0) < 0:
            raise os_error("unmount", target)

    def mount_overlay(
        self, target: str, lowers: Sequence[str], options: Mapping[str, str], *, read_only: bool
    ) -> None:
        """Mount an overlay by the mount API, where no path is parsed for separators and 500 lowers fit."""
        with held(self._syscall("fsopen", b"overlay", 1)) as context:
            for key, value in [("lowerdir+", lower) for lower in lowers] + list(options.items()):
                self._syscall("fsconfig", context, 1, key.encode(), value.encode(), 0)
            if read_only:
                self._syscall("fsconfig", context, 0, b"ro", None, 0)
            self._syscall("fsconfig", context, 6, None, None, 0)
            with held(self._syscall("fsmount", context, 1, 1 if read_only else 0)) as mounted:
                self._syscall("move_mount", mounted, b"", AT_FDCWD, target.encode(), 4)

    def _syscall(self, name: str, *arguments: object) -> int:
        result = int(self._libc.syscall(SYS[name], *arguments))
        if result < 0:
            raise os_error("call", name)
        return result

    # Modules, keys, devices

    def load_module(self, path: str, parameters: str) -> None:
        """Load a kernel module with its parameters, unless it is loaded or its hardware is absent."""
        with held(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
            failed = self._libc.syscall(SYS["finit_module"], fd, parameters.encode(), 0) < 0
            if failed and ctypes.get_errno() not in (errno.EEXIST, errno.ENODEV):
                raise os_error("load", path)

    def keyring(self, name: str) -> list[str] | None:
        """Return the description of each key in one of the kernel's own keyrings, None if it has none."""
        pattern = re.compile(rf"^([0-9a-f]+) .* keyring +{re.escape(name)}: ", re.MULTILINE)
        found = pattern.search(self.read("/proc/keys").decode(errors="replace"))
        if found is None:
            return None
        ring, buffer = int(found[1], 16), ctypes.create_string_buffer(BLOCK)
        size = self._syscall("keyctl", KEYCTL_READ, ring, buffer, BLOCK)
        serials = struct.unpack(f"<{size // 4}i", buffer.raw[: size // 4 * 4])
        descriptions = []
        for serial in serials:
            length = self._syscall("keyctl", KEYCTL_DESCRIBE, serial, buffer, BLOCK)
            # type;uid;gid;perm;description
            descriptions.append(buffer.raw[: length - 1].decode(errors="replace").split(";", 4)[-1])
        return descriptions

    def add_key(self, name: str, payload: bytes) -> None:
        """Give the kernel a blob that a device-mapper table names."""
        self._syscall("add_key", b"user", name.encode(), payload, len(payload), PROCESS_KEYRING)

    def clear_keys(self) -> None:
        """Drop what `add_key` added."""
        self._syscall("keyctl", KEYCTL_CLEAR, PROCESS_KEYRING)

    def dm(
        self, command: DmCommand, name: str, flags: int = 0, table: tuple[int, str, str] | None = None
    ) -> str:
        """Do one device-mapper ioctl; `table`: (sectors, type, parameters). Returns the device's path."""
        payload = b""
        if table is not None:
            sectors, kind, parameters = table
            text = parameters.encode() + b"\0"
            text += bytes(-len(text) % 8)
            payload = _DM_TARGET.pack(0, sectors, 0, _DM_TARGET.size + len(text), kind.encode()) + text
        # No larger than what is said: above 1024 bytes Python's ioctl lets no other thread run meanwhile.
        size = _DM_IOCTL.size + len(payload)
        fields = (4, 0, 0, size, _DM_IOCTL.size, 1 if table else 0, 0, flags, 0, 0, 0, name.encode(), b"")
        buffer = bytearray(_DM_IOCTL.pack(*fields) + payload)
        with held(os.open("/dev/mapper/control", os.O_RDWR | os.O_CLOEXEC)) as fd:
            fcntl.ioctl(fd, command, buffer)
        device = int(_DM_IOCTL.unpack_from(buffer)[10])
        return f"/dev/dm-{(device & 0xFF) | (device >> 12 & 0xFFF00)}"

    def attach_loop(self, path: str) -> tuple[int, int]:
        """Attach a read-only loop device of 4096-byte sectors, with direct I/O, to a file.

        Returns the open loop device and the file's bytes. The loop ends by itself with its last user.
        """
        with (
            held(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)) as file,
            held(os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)) as control,
        ):
            number, name = fcntl.ioctl(control, LOOP_CTL_GET_FREE), path.encode()[-63:]
            flags = LO_READ_ONLY | LO_AUTOCLEAR | LO_DIRECT_IO
            config = _LOOP_CONFIG.pack(file, BLOCK, *[0] * 8, flags, name, b"", b"", 0, 0, *[0] * 8)
            loop = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
            fcntl.ioctl(loop, LOOP_CONFIGURE, config)
            return loop, os.fstat(file).st_size

    def open_device(self, path: str) -> int:
        """Open a block device for reading."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.ENOTBLK, f"{path} is no block device")
        return fd

    def device_size(self, fd: int) -> tuple[int, int]:
        """Return (bytes, bytes of a sector) of an open block device."""
        sector, size = bytearray(4), bytearray(8)
        fcntl.ioctl(fd, BLKSSZGET, sector)
        fcntl.ioctl(fd, BLKGETSIZE64, size)
        return int.from_bytes(size, "little"), int.from_bytes(sector, "little")

    def device_number(self, fd: int) -> str:
        """Return MAJOR:MINOR of an open block device."""
        number = os.fstat(fd).st_rdev
        return f"{os.major(number)}:{os.minor(number)}"

    def read_at(self, fd: int, offset: int, size: int) -> bytes:
        """Read exactly `size` bytes; OSError if the device ends before."""
        data = os.pread(fd, size, offset)
        if len(data) != size:
            raise OSError(errno.EIO, f"only {len(data)} of {size} bytes at {offset}")
        return data

    def open_luks(self, header: bytes, device: str, secret: bytearray, slot: int, name: str | None) -> None:
        """Open a volume by a detached header and one key slot; without a name, only try the secret."""
        library = ctypes.CDLL("libcryptsetup.so.12")
        library.crypt_token_external_disable()
        os.putenv("DM_DISABLE_UDEV", "1")  # nobody would answer in an initrd
        file, context = os.memfd_create("luks"), ctypes.c_void_p()
        try:
            os.write(file, header)
            paths = (f"/proc/self/fd/{file}".encode(), device.encode())
            code = library.crypt_init_data_device(ctypes.byref(context), *paths)
            code = code or library.crypt_load(context, b"LUKS2", None)
            if code == 0:
                # Lent, not copied: its owner wipes it.
                key = (ctypes.c_char * len(secret)).from_buffer(secret)
                words = (name.encode() if name else None, slot, key, ctypes.c_size_t(len(secret)), 0)
                code = library.crypt_activate_by_passphrase(context, *words)
        finally:
            library.crypt_free(context)
            os.close(file)
        if code < 0:
            raise OSError(-code, f"cannot open {device} by key slot {slot}: {os.strerror(-code)}")

    def format_ext4(self, device: str) -> None:
        """Make an ext4 file system that needs no journal, for nothing in it outlives this boot."""
        words = ["/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal"]
        child = os.posix_spawn(words[0], [*words, "-E", "lazy_itable_init=1,nodiscard", device], {})
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise OSError(errno.EIO, f"mke2fs ended with status {code}")

    def close(self, fd: int) -> None:
        """Close a file descriptor."""
        os.close(fd)

    # TPM, watchdog, clock

    def tpm(self, command: bytes) -> bytes:
        """Send one command to the TPM and return its response (at most 4096 bytes)."""
        if self._tpm < 0:
            # One open file for all: the resource manager drops sessions and objects when it is closed.
            self._tpm = os.open("/dev/tpmrm0", os.O_RDWR | os.O_CLOEXEC)
        os.write(self._tpm, command)
        return os.read(self._tpm, 4096)

    def random(self, size: int) -> bytes:
        """Return random bytes; waits until the kernel's generator is seeded."""
        return os.urandom(size)

    def arm_watchdog(self, seconds: int) -> bool:
        """Start the hardware watchdog; False if there is none. Nothing here ever stops it."""
        with contextlib.suppress(OSError):
            self._watchdog = os.open("/dev/watchdog", os.O_WRONLY | os.O_CLOEXEC)
            fcntl.ioctl(self._watchdog, WDIOC_SETTIMEOUT, struct.pack("<i", seconds))
            return True
        return False

    def feed_watchdog(self) -> None:
        """Give the watchdog its full time again."""
        with contextlib.suppress(OSError):  # there may be none
            os.write(self._watchdog, b"\0")

    def monotonic(self) -> float:
        """Return seconds since power-on, roughly."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    # Ends

    def free_initramfs(self) -> None:
        """Delete every file of the initramfs, which is memory; mounted file systems are not entered."""
        root, folders = os.lstat("/").st_dev, ["/"]
        for folder in folders:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False):
                        with contextlib.suppress(OSError):
                            os.unlink(entry.path)
                    elif entry.stat(follow_symlinks=False).st_dev == root:
                        folders.append(entry.path)
        for folder in reversed(folders[1:]):
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def enter_root(self, root: str) -> None:
        """Make `root` the root of everything."""
        os.chdir(root)
        self.mount(".", "/", "", MountFlag.MOVE)
        os.chroot(".")
        os.chdir("/")

    def become(self, init: str) -> NoReturn:
        """Become hostfs's init, with an empty environment."""
        os.execve(init, [init], {})

    def restart(self) -> NoReturn:
        """Restart the machine now."""
        self._libc.sync()
        self._libc.reboot(RB_AUTOBOOT)
        os._exit(1)  # PID 1 that ends is a panic, and panic=10 restarts too

    def power_off(self) -> NoReturn:
        """Switch the machine off now."""
        self._libc.reboot(RB_POWER_OFF)
        os._exit(1)


# --- Report: what this boot decided, for people and machines -----------------------------------------------


class Report:
    """Everything one boot says about itself: stages, checks, and what was refused."""

    def __init__(self) -> None:
        self.facts: dict[str, object] = {"mode": None, "product": None, "sequence": None, "generation": None}
        self.checks: list[dict[str, object]] = []
        self.stages: list[dict[str, object]] = []
        self.fenced = False

    def passed(self, check: str, expected: str, seen: str) -> None:
        """Note a check that held."""
        self.checks.append({"id": check, "ok": True, "expected": expected, "seen": seen})

    def document(self, result: str, failure: Refused | None = None) -> dict[str, object]:
        """Return the report in the form of its JSON schema 1."""
        failed = [] if failure is None else [
            {"id": failure.check, "ok": False, "expected": failure.expected, "seen": failure.seen}
        ]  # fmt: skip
        return {
            "schema": 1, "result": result, **self.facts, "failed": failure.check if failure else None,
            "fenced": self.fenced, "checks": self.checks + failed, "stages": self.stages,
        }  # fmt: skip


class Machine(Kernel):
    """The kernel with the report of this boot: what every stage is given."""

    def __init__(self) -> None:
        super().__init__()
        self.report = Report()


F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def stage(step: F) -> F:
    """Log and time one stage of the boot."""
    name = step.__name__.replace("_", "-")

    @functools.wraps(step)
    def run(k: Machine, *arguments: object) -> object:
        start = k.monotonic()
        entry: dict[str, object] = {"name": name, "ok": False}
        k.report.stages.append(entry)
        try:
            result = step(k, *arguments)
            entry["ok"] = True
            return result
        finally:
            entry["ms"] = round(1000 * (k.monotonic() - start))
            words = f"{name}: {'ok' if entry['ok'] else 'failed'}, {entry['ms']} ms"
            k.log(words)
            k.print(f"mosinit: {words}\n")

    return cast(F, run)


def demand(k: Machine, check: str, *, expected: str, seen: str) -> None:
    """Note the check if both are equal, refuse the boot if not."""
    if seen != expected:
        raise Refused(check, expected=expected, seen=seen)
    k.report.passed(check, expected, seen)


def only(items: Sequence[T], check: str, expected: str) -> T:
    """Return the one item that there is, refuse if there are none or more."""
    if len(items) != 1:
        raise Refused(check, expected=expected, seen=str(len(items)))
    return items[0]


@contextlib.contextmanager
def refusing(check: str, expected: str) -> Iterator[None]:
    """Turn an operating-system error into a refusal by `check`."""
    try:
        yield
    except OSError as error:
        raise Refused(check, expected=expected, seen=str(error)) from error


def in_parallel(work: Callable[[T], object], items: Sequence[T]) -> None:
    """Do `work` with each item, a few at a time; when all have ended, raise what the first failure was."""
    queue, failures = iter(items), list[BaseException]()

    def run(ended: _thread.LockType) -> None:
        try:
            for item in queue:
                work(item)
        except BaseException as error:
            failures.append(error)
        finally:
            ended.release()

    locks = [_thread.allocate_lock() for _ in items[:THREADS]]
    for lock in locks:
        lock.acquire()
        _thread.start_new_thread(run, (lock,))
    for lock in locks:
        lock.acquire()
    if failures:
        raise failures[0]


# --- Formats: parsers of bytes, strict and bounded ---------------------------------------------------------


def parse_json(data: bytes, check: str) -> object:
    """Parse verified JSON; a repeated key, or what others read differently, is refused by `check`."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return result

    try:
        value = json.loads(data.decode(), object_pairs_hook=once)
        # Half a character, NaN, 1e999: Python has them, and UTF-8 or JSON has not.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        return cast(object, value)
    except (ValueError, RecursionError) as error:
        raise Refused(check, expected="JSON", seen=str(error)) from error


def match(value: object, shape: object, path: str, check: str) -> None:
    """Refuse a value that is not of a shape: a mapping of shapes, a pattern, range, test or constant."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for key in {**shape, **value}:
            here = f"{path}.{key}"[:100].strip(".")
            match(value.get(key, ...), shape.get(key, ...), here, check)  # what is not there is no JSON
        return
    if isinstance(shape, re.Pattern):
        fits = isinstance(value, str) and bool(shape.fullmatch(value))
    elif isinstance(shape, range):
        fits = type(value) is int and value in shape
    elif callable(shape):
        fits = bool(shape(value))
    else:
        fits = type(value) is type(shape) and value == shape
    if not fits:
        words = str(value)[:60] if isinstance(value, str | int) else type(value).__name__
        seen = f"{path}: {'missing' if value is ... else words}"
        raise Refused(check, expected="what mosinit writes there, nothing else", seen=seen)


def _sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


class Module(NamedTuple):
    """A kernel module to load: name as in /sys/module, path, parameters, probing without a wait."""

    name: str
    path: str
    parameters: dict[str, str]
    background: bool


class Policy(NamedTuple):
    """What the build decided and signed into the initrd."""

    mode: str
    product: str
    epoch: int
    kernel: str
    cmdline: str
    db: tuple[str, ...]  # SHA-256 of each DER certificate that the firmware's db must hold, no other
    platform: tuple[str, ...]  # how the kernel describes those certificates in its keyring
    modules: tuple[Module, ...]
    revoked: tuple[str, ...]  # SHA-256 of each product certificate (DER) that counts no more
    uki_id: str
    organisation: Mapping[str, bytes]  # the public parts of the keyset, by file name

    @property
    def manifest_ca(self) -> bytes:
        """The certificate (PEM) under which product certificates are issued."""
        return self.organisation["manifest-ca.pem"]


def parse_policy(data: bytes, uki_id: bytes, organisation: Mapping[str, bytes]) -> Policy:
    """Parse the policy of a signed initrd. It is our own build's: a fault is a crash, not a refusal."""
    raw = cast(dict[str, Any], json.loads(data))
    if raw["schema"] != 1 or raw["mode"] not in ("live", "run"):
        raise ValueError(f"policy schema {raw['schema']}, mode {raw['mode']}: known are 1, live and run")
    fields = {key: raw[key] for key in ("mode", "product", "epoch", "kernel", "cmdline")}
    fields |= {key: tuple(raw[key]) for key in ("db", "platform", "revoked")}
    fields["modules"] = tuple(Module(**module) for module in raw["modules"])
    return Policy(**fields, uki_id=uki_id.decode().strip(), organisation=organisation)


def format_guid(raw: bytes) -> str:
    """Return an EFI GUID (mixed-endian) as text."""
    a, b, c = struct.unpack("<IHH", raw[:8])
    return f"{a:08x}-{b:04x}-{c:04x}-{raw[8:10].hex()}-{raw[10:16].hex()}"


_SIGNATURE_LIST = struct.Struct("<16sIII")  # UEFI specification 32.4.1, EFI_SIGNATURE_LIST


def parse_signature_database(data: bytes) -> tuple[str, ...]:
    """Return the entries of an EFI signature database: SHA-256 of certificates, TYPE:SHA-256 of others."""
    entries = []
    while data:
        if len(data) < _SIGNATURE_LIST.size:
            raise ValueError("a signature list is cut short")
        kind, size, header, each = _SIGNATURE_LIST.unpack_from(data)
        body = data[_SIGNATURE_LIST.size : size]
        # No known kind has a header of its own: what hid in one, others might read.
        if header or not _SIGNATURE_LIST.size < size <= len(data) or each <= 16 or len(body) % each:
            raise ValueError("a signature list has impossible sizes")
        for start in range(0, len(body), each):
            digest = hashlib.sha256(body[start + 16 : start + each]).hexdigest()
            entries.append(digest if format_guid(kind) == EFI_CERT_X509 else f"{format_guid(kind)}:{digest}")
        data = data[size:]
    return tuple(entries)


class Partition(NamedTuple):
    """One GPT entry; offsets in bytes."""

    number: int
    kind: str
    uuid: str
    start: int
    size: int
    name: str


_GPT = struct.Struct("<8sIIIIQQQQ16sQIII")  # UEFI specification 5.3.2
assert _GPT.size == 92
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")  # UEFI specification 5.3.3
assert _GPT_ENTRY.size == 128


def parse_gpt(
    untrusted_header: bytes, untrusted_entries: bytes, sector: int, sectors: int
) -> tuple[Partition, ...]:
    """Read a primary GPT, strictly: entries at sector 2, 128 bytes each, none overlapping, ids unique."""
    entries_crc = _check_gpt_header(untrusted_header, sectors)
    first, last, count = struct.unpack_from("<QQ24xI", untrusted_header, 40)
    table = untrusted_entries[: count * _GPT_ENTRY.size]
    if zlib.crc32(table) != entries_crc:
        raise Refused("GPT-ENTRY", expected=f"checksum {entries_crc:08x}", seen=f"{zlib.crc32(table):08x}")
    found = []
    for number in range(count):
        kind, uuid, start, end, _, label = _GPT_ENTRY.unpack_from(table, number * _GPT_ENTRY.size)
        if kind == bytes(16):
            continue
        if not first <= start <= end <= last:
            raise Refused("GPT-ENTRY", expected=f"sectors within {first}-{last}", seen=f"{start}-{end}")
        size, name = (end - start + 1) * sector, label.decode("utf-16-le", "replace").partition("\0")[0]
        found.append(Partition(number + 1, format_guid(kind), format_guid(uuid), start * sector, size, name))
    _check_partitions_apart(found)
    return tuple(found)


def _check_gpt_header(untrusted: bytes, sectors: int) -> int:
    """Check the fixed fields of a GPT header and return the checksum of its entries."""
    magic, revision, size, crc, zero, mine, _, first, last, _, *rest = _GPT.unpack_from(untrusted)
    table, count, each, entries_crc = rest
    if magic != b"EFI PART":
        raise Refused("GPT-HEADER", expected="a GPT", seen="no signature")
    found = zlib.crc32(untrusted[:16] + bytes(4) + untrusted[20:92])
    if found != crc:
        raise Refused("GPT-HEADER", expected=f"checksum {crc:08x}", seen=f"{found:08x}")
    fixed = (revision, size, zero, mine, table, each)
    if fixed != (0x10000, 92, 0, 1, 2, 128) or any(untrusted[92:]):
        raise Refused("GPT-HEADER", expected="revision 1.0, entries at sector 2", seen=str(fixed))
    if not (1 <= count <= 128 and 2 < first <= last < sectors):
        seen = f"{count} entries, {first}-{last}"
        raise Refused("GPT-HEADER", expected=f"within {sectors} sectors", seen=seen)
    return int(entries_crc)


def _check_partitions_apart(partitions: list[Partition]) -> None:
    if len({partition.uuid for partition in partitions}) != len(partitions):
        raise Refused("GPT-ENTRY", expected="partition ids that differ", seen="two partitions with one id")
    ordered = sorted(partitions, key=lambda partition: partition.start)
    for one, two in zip(ordered, ordered[1:], strict=False):
        if one.start + one.size > two.start:
            seen = f"{one.number} and {two.number} overlap"
            raise Refused("GPT-ENTRY", expected="partitions apart", seen=seen)


class LiveSeal(NamedTuple):
    """What vouches for the store of a live medium: size in blocks, root hash, the layer key's PKCS#7."""

    data_blocks: int
    root_hash: str
    signature: bytes


# magic, version, signature's bytes, data blocks, root hash, checksum
LIVE_SEAL = struct.Struct("<8sIIQ32s32s")
LIVE_SEAL_MAGIC = b"MOSLIVE1"
assert LIVE_SEAL.size == 88


def live_seal_checksum(data_blocks: int, root_hash: bytes, signature: bytes) -> bytes:
    """Return the SHA-256 that shows a damaged seal: a PKCS#7 has bytes that nobody else checks."""
    return hashlib.sha256(struct.pack("<Q", data_blocks) + root_hash + signature).digest()


def parse_live_seal(untrusted: bytes) -> LiveSeal:
    """Check the fixed header of a seal; nothing of it counts before the kernel accepted the signature."""
    magic, version, length, blocks, root, checksum = LIVE_SEAL.unpack_from(untrusted)
    if (magic, version) != (LIVE_SEAL_MAGIC, 1):
        raise Refused("STORE-SEAL", expected=f"{LIVE_SEAL_MAGIC!r}, version 1", seen=f"{magic!r}, {version}")
    end = LIVE_SEAL.size + length
    if length == 0 or end > len(untrusted) or any(untrusted[end:]) or not 0 < blocks < 1 << 40:
        seen = f"a signature of {length} bytes, {blocks} blocks"
        raise Refused("STORE-SEAL", expected="plausible sizes and nothing behind the signature", seen=seen)
    signature = untrusted[LIVE_SEAL.size : end]
    if live_seal_checksum(blocks, root, signature) != checksum:
        raise Refused("STORE-SEAL", expected=f"checksum {checksum.hex()}", seen="another")
    return LiveSeal(blocks, root.hex(), signature)


def live_store_salt(data_blocks: int) -> str:
    """Return the dm-verity salt of a live store of that size.

    The signature covers the root hash alone. With a salt made from size and purpose, the root hash vouches
    for both: a shorter store, or a layer in place of a store, would need another root hash.
    """
    return hashlib.sha256(b"mosinit live store\0" + struct.pack("<Q", data_blocks)).hexdigest()


def verity_tree_blocks(data_blocks: int) -> int:
    """Return how many 4096-byte blocks a dm-verity SHA-256 tree over that many blocks takes."""
    total, level = 0, data_blocks
    while level > 1:
        level = -(-level // (BLOCK // 32))
        total += level
    return total


def verity_data_blocks(size: int) -> int:
    """Return how many data blocks a layer file of `size` bytes (data, superblock, tree) has.

    The size is signed and has one answer only. Never take the count from the superblock: fewer blocks under
    the same root hash and signature verify too, and end the file system where an attacker likes.
    """
    blocks = size // BLOCK
    low, high = 1, max(1, blocks)
    while low < high:
        middle = (low + high + 1) // 2
        if middle + 1 + verity_tree_blocks(middle) <= blocks:
            low = middle
        else:
            high = middle - 1
    if size % BLOCK or low + 1 + verity_tree_blocks(low) != blocks:
        raise Refused("LAYER-SIZE", expected="whole blocks of data and hashes", seen=f"{size} bytes")
    return low


# cryptsetup, lib/verity/verity.c: struct verity_sb
_VERITY = struct.Struct("<8sII16s32sIIQH6x256s168x")
assert _VERITY.size == 512


def parse_verity_salt(untrusted: bytes, data_blocks: int) -> str:
    """Return the salt of a verity superblock in which everything else is what we pin anyway."""
    magic, version, kind, _, name, data, hashes, blocks, size, salt = _VERITY.unpack_from(untrusted)
    fixed = (magic, version, kind, name.rstrip(b"\0"), data, hashes, blocks)
    pinned = (b"verity\0\0", 1, 1, b"sha256", BLOCK, BLOCK, data_blocks)
    if fixed != pinned or size > 256 or any(salt[size:]):
        raise Refused("LAYER-SUPERBLOCK", expected=str(pinned), seen=f"{fixed}, {size} bytes of salt")
    if salt[:size].hex() == live_store_salt(data_blocks):
        # Its signature, once the layer key has made it, would vouch for a store as well.
        raise Refused("LAYER-SUPERBLOCK", expected="a layer", seen="the salt of a live store")
    return str(salt[:size].hex())


DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
HEX64 = re.compile(r"[0-9a-f]{64}")
ROOT_HASH_ANNOTATIONS = (
    "io.stackeroci.stacker.atomfs_verity_root_hash",
    "io.stackeroci.stacker.squashfs_verity_root_hash",
)
UKI_MEDIA_TYPE = "application/vnd.machine.uki.v1+efi"
UKI_ID_ANNOTATIONS = {"run": "io.mosinit.uki-id", "live": "io.mosinit.live-uki-id"}  # of a bootkit
RELEASE_ARTIFACT = "application/vnd.machine.install"
MANIFEST_MEDIA_TYPE = "application/vnd.machine.install.v1+yaml"
SIGNATURE_MEDIA_TYPE = "application/vnd.machine.signature"
CERTIFICATE_MEDIA_TYPE = "application/vnd.machine.pubkeycrt"
LAYER_SIGNATURE_MEDIA_TYPE = "application/vnd.machine.layer-signature.v1+pkcs7"
EPOCH_MEDIA_TYPE = "application/vnd.machine.epoch.v1+json"
EPOCH_SIGNATURE_MEDIA_TYPE = "application/vnd.machine.epoch-signature"


class Descriptor(NamedTuple):
    """OCI content descriptor (image specification 1.1, descriptor.md)."""

    media_type: str
    digest: str
    size: int
    artifact_type: str
    annotations: dict[str, str]


class Layer(NamedTuple):
    """A verity layer of an image: where it lies, how many bytes it has, its root hash."""

    media_type: str
    digest: str
    size: int
    root_hash: str


class Image(NamedTuple):
    """What the bring-up takes from an OCI image manifest."""

    layers: tuple[Layer, ...]
    uki_ids: Mapping[str, str]  # of a bootkit: by mode, the UKI that belongs to it


def parse_descriptor(raw: object, check: str) -> Descriptor:
    """Take an OCI descriptor out of parsed JSON."""
    fields = raw if isinstance(raw, dict) else {}
    kind, digest, size = (fields.get(name, ...) for name in ("mediaType", "digest", "size"))
    annotations, artifact = fields.get("annotations", {}), fields.get("artifactType", "")
    notes = annotations.values() if isinstance(annotations, dict) else [None]
    texts = all(isinstance(text, str) for text in (kind, digest, artifact, *notes))
    if not (texts and DIGEST.fullmatch(digest) and type(size) is int and 0 <= size < 1 << 50):
        raise Refused(check, expected="an OCI descriptor", seen=json.dumps(raw)[:300])
    return Descriptor(kind, digest, size, artifact, annotations)


def parse_descriptors(data: bytes, key: str, check: str) -> tuple[dict[str, object], tuple[Descriptor, ...]]:
    """Parse an OCI index (`manifests`) or image manifest (`layers`): all of it, and its descriptors."""
    raw = parse_json(data, check)
    if not isinstance(raw, dict) or raw.get("schemaVersion") != 2 or not isinstance(raw.get(key), list):
        raise Refused(check, expected=f"an OCI document with {key}", seen=data[:60].decode(errors="replace"))
    if len(raw[key]) > 1024:
        raise Refused(check, expected=f"at most 1024 {key}", seen=str(len(raw[key])))
    return raw, tuple(parse_descriptor(item, check) for item in raw[key])


def parse_image(data: bytes) -> Image:
    """Parse an OCI image manifest whose digest is signed."""
    raw, descriptors = parse_descriptors(data, "layers", "IMAGE-FORMAT")
    annotations = raw.get("annotations")
    named = annotations if isinstance(annotations, dict) else {}
    ids = {mode: str(named[key]) for mode, key in UKI_ID_ANNOTATIONS.items() if key in named}
    layers = []
    for item in descriptors:
        if item.media_type == UKI_MEDIA_TYPE:
            continue
        roots = {item.annotations[name] for name in ROOT_HASH_ANNOTATIONS if name in item.annotations}
        if len(roots) != 1 or not HEX64.fullmatch(min(roots)):
            seen = f"{sorted(roots)} in {item.digest}"
            raise Refused("LAYER-ROOTHASH", expected="one dm-verity root hash", seen=seen)
        layers.append(Layer(item.media_type, item.digest, item.size, min(roots)))
    if not layers:
        raise Refused("IMAGE-FORMAT", expected="at least one layer", seen="none")
    return Image(tuple(layers), ids)


# --- YAML: the small language in which manifests are written -----------------------------------------------

MANIFEST_BYTES, MANIFEST_NODES, MANIFEST_DEPTH = MIB, 20_000, 12
PLAIN_CHARACTERS = 256  # of text without quotes


class Node(NamedTuple):
    """A YAML value and the line it stands in, counted from 1."""

    value: object
    line: int


def fault(node: Node, path: str, expected: str) -> Refused:
    """Make the refusal that names line, key and what should stand there."""
    words = str(node.value if isinstance(node.value, str | int) else type(node.value).__name__)
    seen = f"line {node.line}, {path or 'top'}: {words[:100]!r}"
    return Refused("MANIFEST-FORMAT", expected=expected, seen=seen)


def parse_yaml(data: bytes) -> Node:
    """Parse one YAML document: no anchors, tags, repeated keys, nor words that versions read differently."""
    import yaml

    if len(data) > MANIFEST_BYTES:
        raise Refused("MANIFEST-FORMAT", expected="at most 1 MiB", seen=f"{len(data)} bytes")
    parsed = yaml.parse(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    try:
        events = [event for _, event in zip(range(MANIFEST_NODES + 2), parsed, strict=False)]
        if len(events) > MANIFEST_NODES + 1:
            raise Refused("MANIFEST-FORMAT", expected=f"at most {MANIFEST_NODES} YAML nodes", seen="more")
        return _yaml_document(events)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused("MANIFEST-FORMAT", expected="YAML", seen=" ".join(str(error).split())[:300]) from error


def _yaml_document(events: list[Any]) -> Node:
    starts = [event for event in events if type(event).__name__ == "DocumentStartEvent"]
    if len(starts) != 1:
        seen = f"another at line {_line(starts[1])}" if starts else "an empty file"
        raise Refused("MANIFEST-FORMAT", expected="one YAML document", seen=seen)
    following = iter(events[2:])  # behind the beginnings of stream and document
    return _yaml_node(next(following), following, "", 0)


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _yaml_node(event: Any, events: Iterator[Any], path: str, depth: int) -> Node:
    kind, line = type(event).__name__, _line(event)
    if kind == "AliasEvent" or event.anchor is not None:
        raise fault(Node("an anchor or alias", line), path, "no YAML anchors or aliases")
    if event.tag is not None:
        raise fault(Node(event.tag, line), path, "no YAML tags")
    if depth > MANIFEST_DEPTH:
        raise fault(Node("nested deeper", line), path, f"at most {MANIFEST_DEPTH} levels")
    if kind == "ScalarEvent":
        return Node(_yaml_scalar(event, path, line), line)
    if kind == "SequenceStartEvent":
        items: list[Node] = []
        while type(event := next(events)).__name__ != "SequenceEndEvent":
            items.append(_yaml_node(event, events, f"{path}[{len(items)}]", depth + 1))
        return Node(items, line)
    fields: dict[str, Node] = {}
    while type(event := next(events)).__name__ != "MappingEndEvent":
        key = _yaml_node(event, events, path, depth + 1)
        if not isinstance(key.value, str):
            raise fault(key, path, "a plain word as key")
        here = f"{path}.{key.value}" if path else key.value
        if key.value in fields:
            raise fault(key, here, "each key once")
        value = _yaml_node(next(events), events, here, depth + 1)
        fields[key.value] = Node(value.value, key.line)
    return Node(fields, line)


_AMBIGUOUS = re.compile(
    r"~|null|yes|no|on|off|y|n|[-+.0-9][0-9_.:eExXoObB+-]*|<<|=|true|false|\.inf|\.nan", re.IGNORECASE
)

# 1.2.3 and a uuid that happens to have digits alone: no YAML version takes them for numbers.
_ONE_READING = re.compile(r"[0-9]+\.[0-9]+\.[0-9][-+.\w]*|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _yaml_scalar(event: Any, path: str, line: int) -> str | int | bool:
    text = str(event.value)
    if event.style:
        return text
    if len(text) > PLAIN_CHARACTERS:
        expected = f"at most {PLAIN_CHARACTERS} characters (put longer text into quotes)"
        raise fault(Node(text, line), path, expected)
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"0|-?[1-9][0-9]{0,18}", text):
        return int(text)
    # 1.10, 012, 1:30, no, ~: what these mean depends on who reads them.
    if (not text or _AMBIGUOUS.fullmatch(text)) and not _ONE_READING.fullmatch(text):
        raise fault(Node(text, line), path, "a value of one reading only (numbers as 42, text in quotes)")
    return text


# --- Manifest: what a product's install manifest may say ---------------------------------------------------

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,63}")
IPV4 = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){3}/(0|[1-9][0-9]?)")
IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}/(0|[1-9][0-9]{0,2})")
MAX_EPOCH, MAX_SEQUENCE = 64, (1 << 63) - 1
EPOCHS = range(1, MAX_EPOCH + 1)


class Volume(NamedTuple):
    """A storage volume: label, whether it survives a reboot, id range that owns it, bytes."""

    label: str
    persistent: bool
    nsgroup: str
    size: int


class Port(NamedTuple):
    """A TCP port of the host that leads to one of the container."""

    host: int
    container: int


class Network(NamedTuple):
    """How a container reaches the network: host, none, or simple with its own addresses."""

    type: str
    ipv4: str
    ipv6: str
    ports: tuple[Port, ...]


class StorageMount(NamedTuple):
    """Where a target sees a storage volume."""

    dest: str
    label: str


class Target(NamedTuple):
    """One image with a role. A person's manifest has a source, a signed one digest, size, signatures."""

    service_name: str
    service_type: str
    version: str
    source: str
    digest: str
    size: int
    layer_signatures: tuple[str, ...]
    nsgroup: str
    writable: str
    network: Network
    storage: tuple[StorageMount, ...]


class Contents(NamedTuple):
    """What an install manifest says. It proves nothing: see `Manifest`."""

    version: int
    product: str
    sequence: int
    epoch: int
    update_type: str
    storage: tuple[Volume, ...]
    targets: tuple[Target, ...]


class Field(NamedTuple):
    """One key of a mapping: how to read it, and what it is if absent (REQUIRED: it may not be)."""

    read: Callable[[Node, str], Any]
    default: object


REQUIRED = object()


def _record(build: Callable[..., Any], fields: Mapping[str, Field]) -> Callable[[Node, str], Any]:
    """Make the reader of a mapping with exactly these keys."""

    def read(node: Node, path: str) -> Any:
        if not isinstance(node.value, dict):
            raise fault(node, path, "a mapping")
        given = cast(dict[str, Node], node.value)
        for key, value in given.items():
            if key not in fields:
                raise fault(Node(key, value.line), f"{path}.{key}".strip("."), f"one of {', '.join(fields)}")
        values = {key: field.default for key, field in fields.items()}
        values |= {key: fields[key].read(each, f"{path}.{key}".strip(".")) for key, each in given.items()}
        for key in (key for key in fields if values[key] is REQUIRED):
            raise fault(Node(f"no {key}", node.line), path, f"the key {key}")
        return build(**values)

    return read


def _list_of(read: Callable[[Node, str], Any], limit: int) -> Callable[[Node, str], Any]:
    def read_list(node: Node, path: str) -> Any:
        if not isinstance(node.value, list) or len(node.value) > limit:
            raise fault(node, path, f"a list of at most {limit}")
        return tuple(read(item, f"{path}[{index}]") for index, item in enumerate(node.value))

    return read_list


def _value(fits: Callable[[Any], bool], expected: str) -> Callable[[Node, str], Any]:
    def read(node: Node, path: str) -> Any:
        if not fits(node.value):
            raise fault(node, path, expected)
        return node.value

    return read


def text_like(pattern: re.Pattern[str], expected: str) -> Callable[[Node, str], str]:
    """Make the reader of text that a pattern matches whole."""
    return _value(lambda value: isinstance(value, str) and bool(pattern.fullmatch(value)), expected)


def _choice(*words: str) -> Callable[[Node, str], str]:
    return text_like(re.compile("|".join(re.escape(word) for word in words)), f"one of {', '.join(words)}")


def _number(low: int, high: int) -> Callable[[Node, str], int]:
    expected = f"a whole number from {low} to {high}"
    return _value(lambda value: type(value) is int and low <= value <= high, expected)


def _size(node: Node, path: str) -> int:
    found = re.fullmatch(r"([1-9][0-9]{0,8})([KMGT])", node.value) if isinstance(node.value, str) else None
    if found is None:
        raise fault(node, path, "a size with its unit: K, M, G or T (powers of 1024)")
    return int(found[1]) << 10 * (1 + "KMGT".index(found[2]))


def _address(pattern: re.Pattern[str], version: int) -> Callable[[Node, str], str]:
    def fits(value: Any) -> bool:
        import ipaddress

        with contextlib.suppress(ValueError):
            # Python takes more for an address: masks, scopes that are any text, also lines of a unit file.
            matched = isinstance(value, str) and pattern.fullmatch(value)
            return bool(matched) and ipaddress.ip_interface(value).version == version
        return False

    return _value(fits, f"an IPv{version} address with its prefix length")


# Commas, colons and backslashes would be read as separators by mount options and unit files.
_PATH = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._+@-]{1,255})+")
_mount_path = text_like(_PATH, "an absolute path of plain names")
_boolean = _value(lambda value: isinstance(value, bool), "true or false")
_name = text_like(NAME, "a name of a-z, 0-9, '.', '_', '-', at most 64 characters")
_digest = text_like(DIGEST, "sha256: and 64 hex digits")
_NO_NETWORK = Network("none", "", "", ())
_PORT = _record(Port, dict.fromkeys(("host", "container"), Field(_number(1, 65535), REQUIRED)))
_NETWORK = _record(Network, {
    "type": Field(_choice("host", "none", "simple"), REQUIRED),
    "ipv4": Field(_address(IPV4, 4), ""),
    "ipv6": Field(_address(IPV6, 6), ""),
    "ports": Field(_list_of(_PORT, 1024), ()),
})  # fmt: skip
_STORAGE_MOUNT = _record(
    StorageMount, {"dest": Field(_mount_path, REQUIRED), "label": Field(_name, REQUIRED)}
)
_VOLUME = _record(Volume, {
    "label": Field(_name, REQUIRED),
    "persistent": Field(_boolean, REQUIRED),
    "nsgroup": Field(_name, ""),
    "size": Field(_size, REQUIRED),
})  # fmt: skip
TARGET = {
    "service_name": Field(_name, REQUIRED),
    "service_type": Field(_choice("hostfs", "container", "fs-only", "bootkit"), REQUIRED),
    "version": Field(text_like(VERSION, "a version (in quotes if it looks like a number)"), REQUIRED),
    "nsgroup": Field(_name, ""),
    "writable": Field(_choice("all", "etc", "none"), ""),
    "network": Field(_NETWORK, _NO_NETWORK),
    "storage": Field(_list_of(_STORAGE_MOUNT, 64), ()),
}
_SIGNED = {
    **TARGET,
    "digest": Field(_digest, REQUIRED),
    "size": Field(_number(1, 4 * MIB), REQUIRED),
    "layer_signatures": Field(_list_of(_digest, 512), REQUIRED),
}
_ABSENT = {"source": "", "digest": "", "size": 0, "layer_signatures": ()}


def _contents(target: Mapping[str, Field]) -> Callable[[Node, str], Any]:
    read_target = _record(lambda **values: Target(**{**_ABSENT, **values}), target)
    return _record(Contents, {
        "version": Field(_number(1, 1), REQUIRED),
        "product": Field(text_like(UUID, "a product id (lower-case uuid)"), REQUIRED),
        "sequence": Field(_number(1, MAX_SEQUENCE), REQUIRED),
        "epoch": Field(_number(1, MAX_EPOCH), REQUIRED),
        "update_type": Field(_choice("complete", "partial"), REQUIRED),
        "storage": Field(_list_of(_VOLUME, 256), ()),
        "targets": Field(_list_of(read_target, 256), REQUIRED),
    })  # fmt: skip


def parse_manifest(text: bytes, keys: Mapping[str, Field] = _SIGNED) -> Contents:
    """Parse an install manifest, as signed unless a target's `keys` are others."""
    node = parse_yaml(text)
    contents = cast(Contents, _contents(keys)(node, ""))
    fields = cast(dict[str, Node], node.value)
    _check_unique([volume.label for volume in contents.storage], fields.get("storage"), "storage", "label")
    services = [target.service_name for target in contents.targets]
    _check_unique(services, fields["targets"], "targets", "service_name")
    labels = {volume.label for volume in contents.storage}
    for index, target in enumerate(contents.targets):
        item = cast(list[Node], fields["targets"].value)[index]
        _check_target(target, labels, Node(target.service_name, item.line), f"targets[{index}]")
    return contents


def _check_unique(names: list[str], node: Node | None, path: str, key: str) -> None:
    for index, name in enumerate(names):
        if name in names[:index] and node is not None:
            line = cast(list[Node], node.value)[index].line
            raise fault(Node(name, line), f"{path}[{index}].{key}", "each name once")


def _check_target(target: Target, labels: set[str], node: Node, path: str) -> None:
    """Check what one target's keys must be together."""
    network = Node(target.network.type, node.line)
    for mount in target.storage:
        if mount.label not in labels:
            expected = f"a label of storage: {sorted(labels)}"
            raise fault(Node(mount.label, node.line), f"{path}.storage", expected)
    if (target.service_type in ("hostfs", "bootkit")) and target.service_name != target.service_type:
        raise fault(node, f"{path}.service_name", f"the name {target.service_type} for such a target")
    if target.writable and target.service_type != "hostfs":
        raise fault(Node(target.writable, node.line), f"{path}.writable", "writable at hostfs only")
    if target.network.type != "simple" and target.network[1:] != _NO_NETWORK[1:]:
        raise fault(network, f"{path}.network", "addresses and ports with type simple only")
    if target.network != _NO_NETWORK and target.service_type != "container":
        raise fault(network, f"{path}.network", "a network at containers only")


# --- Trust: who signed this, and is it exactly what they signed? -------------------------------------------


class Manifest(NamedTuple):
    """An install manifest that is proven: only `verify_manifest` makes one."""

    contents: Contents
    sha256: str


def verify_manifest(untrusted: bytes, signature: bytes, certificate: bytes, policy: Policy) -> Manifest:
    """Return the manifest if this product's certificate, under the manifest CA, signed just these bytes."""
    signer = verify_certificate(certificate, policy)
    verify_signature(signer, signature, untrusted)
    contents = parse_manifest(untrusted)
    if contents.product != policy.product:
        raise Refused("MANIFEST-PRODUCT", expected=policy.product, seen=contents.product)
    if contents.epoch < policy.epoch:
        expected = f"epoch {policy.epoch} or later"
        raise Refused("MANIFEST-EPOCH", expected=expected, seen=f"epoch {contents.epoch}")
    return Manifest(contents, hashlib.sha256(untrusted).hexdigest())


def verify_certificate(untrusted: bytes, policy: Policy) -> x509.Certificate:
    """Return the certificate if the manifest CA issued it to sign manifests of the product (RFC 5280).

    Validity dates do not count here: a machine with a flat clock battery must boot. They count when a
    manifest is published or installed.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    authority = x509.load_pem_x509_certificate(policy.manifest_ca)
    try:
        if untrusted.count(b"-----BEGIN") != 1 or len(untrusted) > 16384:
            raise ValueError("not one PEM certificate")
        certificate = x509.load_pem_x509_certificate(untrusted)
        uses, issuer = _certificate_uses(certificate), certificate.issuer.rfc4514_string()
        certificate.public_key()
    except Exception as error:  # of a spoiled certificate the parser raises more kinds than it names
        expected, seen = "a certificate for code signing", f"{type(error).__name__}: {error}"
        raise Refused("MANIFEST-CERTIFICATE", expected=expected, seen=seen) from error
    check_issuer(certificate, authority, issuer, "MANIFEST-CHAIN")
    if uses[:-1] != ("leaf", "digitalSignature", "codeSigning"):
        raise Refused("MANIFEST-CERTIFICATE", expected="a leaf for code signing", seen=", ".join(uses))
    if uses[-1] != f"urn:uuid:{policy.product}":
        raise Refused("MANIFEST-PRODUCT", expected=f"one for urn:uuid:{policy.product}", seen=uses[-1])
    if (digest := _sha256(certificate.public_bytes(Encoding.DER)).hex()) in policy.revoked:
        raise Refused("MANIFEST-REVOKED", expected="a certificate that still counts", seen=digest)
    return certificate


def check_issuer(leaf: x509.Certificate, authority: x509.Certificate, issuer: str, check: str) -> None:
    """Refuse by `check` a certificate that the authority did not sign."""
    try:
        leaf.verify_directly_issued_by(authority)
    except Exception as error:
        seen = f"issued by {issuer} ({error or 'the signature does not fit'})"
        expected = f"issued by {authority.subject.rfc4514_string()}"
        raise Refused(check, expected=expected, seen=seen) from error


def _certificate_uses(certificate: x509.Certificate) -> tuple[str, str, str, str]:
    """Return what a certificate is for, in words: leaf or ca, key usage, extended usage, its one URI."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    known = (x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage, x509.SubjectAlternativeName)
    for extension in certificate.extensions:
        if extension.critical and not isinstance(extension.value, known):
            raise ValueError(f"unknown critical extension {extension.oid.dotted_string}")
    find = certificate.extensions.get_extension_for_class
    usage = find(x509.KeyUsage).value
    signs_only = usage.digital_signature and not (usage.key_cert_sign or usage.crl_sign)
    code = list(find(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CODE_SIGNING]
    names = find(x509.SubjectAlternativeName).value.get_values_for_type(x509.UniformResourceIdentifier)
    return (
        "ca" if find(x509.BasicConstraints).value.ca else "leaf",
        "digitalSignature" if signs_only else "other key usage",
        "codeSigning" if code else "other extended key usage",
        names[0] if len(names) == 1 else f"{len(names)} names",
    )


# Our extension of a SUDI certificate, under the arc for uuids (X.667): a DER octet string with RECORD in it.
RECORD_OID = f"2.25.{int(OUR_GUID.replace('-', ''), 16)}"
RECORD = struct.Struct(">B16s32s34s34s")
RECORD_HEAD = bytes([4, RECORD.size])


class MachineRecord(NamedTuple):
    """What belongs together, said by the SUDI CA: only `verify_record` makes one."""

    product: str
    secret_proof: bytes  # HMAC of the config volume's secret
    storage_key: bytes  # TPM names, like the next
    epoch_index: bytes


def verify_record(untrusted: bytes, ca: bytes, product: str) -> MachineRecord:
    """Return the machine record in a SUDI certificate (DER, up to 4 KiB) if `ca` signed it for `product`."""
    from cryptography import x509

    authority = x509.load_pem_x509_certificate(ca)
    try:
        if len(untrusted) > BLOCK:
            raise ValueError(f"{len(untrusted)} bytes")
        certificate = x509.load_der_x509_certificate(untrusted)
        oid = x509.ObjectIdentifier(RECORD_OID)
        extension = cast(x509.UnrecognizedExtension, certificate.extensions.get_extension_for_oid(oid).value)
        head, body = extension.value[:2], extension.value[2:]
        version, raw, proof, storage_key, index = RECORD.unpack(body)
        issuer = certificate.issuer.rfc4514_string()
        if (head, version, storage_key[:2], index[:2]) != (RECORD_HEAD, 1, b"\0\x0b", b"\0\x0b"):
            raise ValueError("not a machine record of version 1")
    except Exception as error:  # of a spoiled certificate the parser raises more kinds than it names
        expected, seen = "a SUDI certificate with a machine record", f"{type(error).__name__}: {error}"
        raise Refused("RECORD-FORMAT", expected=expected, seen=seen) from error
    check_issuer(certificate, authority, issuer, "RECORD-SIGNATURE")
    named = re.sub("(.{8})(.{4})(.{4})(.{4})", r"\1-\2-\3-\4-", raw.hex())
    if named != product:
        raise Refused("RECORD-PRODUCT", expected=product, seen=named)
    return MachineRecord(named, proof, storage_key, index)


def verify_epoch_order(statement: bytes, signature: bytes, certificate: bytes, policy: Policy) -> int:
    """Return the epoch that the publisher's statement orders; it is signed and checked like a manifest."""
    try:
        verify_signature(verify_certificate(certificate, policy), signature, statement)
        fields = cast(dict[str, Any], parse_json(statement, "EPOCH-ORDER"))
        match(fields, {**epoch_statement(policy.product, 1), "epoch": EPOCHS}, "", "EPOCH-ORDER")
    except Refused as error:
        seen = f"{error.check}: {error.seen}"
        raise Refused("EPOCH-ORDER", expected=error.expected, seen=seen) from error
    return int(fields["epoch"])


def epoch_statement(product: str, epoch: int) -> dict[str, object]:
    """Return what a publisher signs, as JSON, to call everything of the product below `epoch` unsafe."""
    return {"schema": 1, "type": "epoch", "product": product, "epoch": epoch}


def verify_signature(signer: x509.Certificate, signature: bytes, untrusted: bytes) -> None:
    """Raise Refused unless `signature` is the signer's over exactly these bytes.

    The algorithm follows from the certificate's key: ECDSA P-256 with SHA-256, P-384 with SHA-384, RSA from
    3072 bits with PKCS#1 v1.5 and SHA-256, Ed25519. Nothing in the data chooses it.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

    key = signer.public_key()
    try:
        if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1":
            key.verify(signature, untrusted, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp384r1":
            key.verify(signature, untrusted, ec.ECDSA(hashes.SHA384()))
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, untrusted)
        elif isinstance(key, rsa.RSAPublicKey) and key.key_size >= 3072:
            key.verify(signature, untrusted, padding.PKCS1v15(), hashes.SHA256())
        else:
            expected = "ECDSA P-256 or P-384, Ed25519 or RSA from 3072 bits"
            raise Refused("MANIFEST-CERTIFICATE", expected=expected, seen=str(key))
    except InvalidSignature as error:
        seen = f"a signature that does not fit the manifest or {signer.subject.rfc4514_string()}"
        raise Refused("MANIFEST-SIGNATURE", expected="the signature of these bytes", seen=seen) from error


# --- LUKS2: the header of a volume, taken apart before anything else reads it ------------------------------

# LUKS2 On-Disk Format Specification 1.1, 2: two copies of a binary header with its JSON, then the key slots.
# The sizes are those that mosinit has volumes made with, the data of a volume begins at LUKS_DATA.
LUKS_COPY, LUKS_SLOT_BYTES, LUKS_DATA = 64 << 10, 4 * MIB, 5 * MIB
LUKS_BYTES = 2 * LUKS_COPY + LUKS_SLOT_BYTES
LUKS_CIPHER = "aes-xts-plain64"
LUKS_KEY_BYTES = {"plain": 64, "config": 96}  # two keys of AES-256 for XTS; config's has one for HMAC, too
_LUKS = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s3584s")  # the same, 2.1
assert _LUKS.size == BLOCK


class PlatformApproval(NamedTuple):
    """The platform key's signature for one PCR 7, and the last epoch in which it holds."""

    epoch: int
    signature: bytes


class Tokens(NamedTuple):
    """What config's header carries for the bring-up: the sealed secret, and what others signed about it."""

    seal_public: bytes
    seal_private: bytes
    record: bytes
    approvals: Mapping[str, PlatformApproval]  # by PCR 7 in hex
    order_statement: bytes
    order_signature: bytes
    order_certificate: bytes


class LuksHeader(NamedTuple):
    """A header with nothing in it but what we allow: only `parse_luks_header` makes one."""

    uuid: str
    seqid: int
    text: bytes
    slots: tuple[int, ...]
    tokens: Tokens | None
    key_slots: bytes
    note: str  # which copy was passed over and why; empty if both agree


class _LuksCopy(NamedTuple):
    seqid: int
    uuid: str
    area: bytes


def read_luks_header(k: Kernel, fd: int, kind: str) -> LuksHeader:
    """Read everything in front of a volume's data, once; nothing of it may be read again."""
    with refusing("LUKS-HEADER", "a header that can be read"):
        untrusted = k.read_at(fd, 0, LUKS_BYTES)
        if kind == "config":
            check_integrity(k.read_at(fd, LUKS_DATA, 512))
    return parse_luks_header(untrusted, kind)


def check_integrity(untrusted: bytes) -> None:
    """See that the superblock of config's dm-integrity, which no key protects, asks for nothing unusual.

    Its flags could have tags computed anew, its journal could take any amount of memory.
    """
    # linux/drivers/md/dm-integrity.c, struct superblock; flag 8: SB_FLAG_FIXED_PADDING
    *fixed, journal, _, flags, block = struct.unpack_from("<8sBBHIQIB", untrusted)
    pinned = [b"integrt\0", 4, 15, 32, 8, 3]
    if [*fixed, flags, block] != pinned or not 0 < journal <= 64 or any(untrusted[30:]):
        seen = f"{[*fixed, flags, block]}, {journal} sections, {untrusted[30:64].hex()}"
        raise Refused("LUKS-HEADER", expected=f"integrity as {pinned}", seen=seen)


def parse_luks_header(untrusted: bytes, kind: str) -> LuksHeader:
    """Check a header of a `config` or `plain` volume against the list of what it may say."""
    if len(untrusted) != LUKS_BYTES:
        raise Refused("LUKS-HEADER", expected=f"{LUKS_BYTES} bytes", seen=f"{len(untrusted)} bytes")
    copies = [_parse_luks_copy(untrusted[: 2 * LUKS_COPY], offset) for offset in (0, LUKS_COPY)]
    copy, note = _choose_luks_copy(*copies)
    text = copy.area.rstrip(b"\0")
    # Python would take other encodings, libcryptsetup would stop at a NUL.
    if not text.isascii() or b"\0" in text or len(text) == len(copy.area):
        raise Refused("LUKS-HEADER", expected="JSON of ASCII and zeros behind it", seen="other bytes")
    raw = cast(dict[str, Any], parse_json(text, "LUKS-HEADER"))
    slots = _check_luks_json(raw, kind)
    tokens = _parse_tokens(raw["tokens"]) if kind == "config" else None
    # What libcryptsetup will read is made from what was checked here: two parsers, one reading.
    text = json.dumps(raw, separators=(",", ":")).encode()
    return LuksHeader(copy.uuid, copy.seqid, text, slots, tokens, untrusted[2 * LUKS_COPY :], note)


def detached_header(header: LuksHeader) -> bytes:
    """Return the header as libcryptsetup reads it from a file, both copies equal."""
    copy = _LuksCopy(header.seqid, header.uuid, header.text.ljust(LUKS_COPY - BLOCK, b"\0"))
    return b"".join(_encode_luks_copy(offset, copy) for offset in (0, LUKS_COPY)) + header.key_slots


def _encode_luks_copy(offset: int, copy: _LuksCopy, salt: bytes = b"") -> bytes:
    magic, uuid = b"SKUL\xba\xbe" if offset else b"LUKS\xba\xbe", copy.uuid.encode()
    fields = (magic, 2, LUKS_COPY, copy.seqid, b"", b"sha256", salt, uuid, b"", offset, b"")
    checksum = hashlib.sha256(_LUKS.pack(*fields, b"", b"") + copy.area).digest()
    return _LUKS.pack(*fields, checksum, b"") + copy.area


def _parse_luks_copy(untrusted: bytes, offset: int) -> _LuksCopy | None:
    """Return one copy; None if its checksum, which cryptsetup writes last, does not hold."""
    raw = untrusted[offset : offset + LUKS_COPY]
    fields = _LUKS.unpack_from(raw)
    if hashlib.sha256(raw[:448] + bytes(64) + raw[512:]).digest() != fields[11][:32]:
        return None
    copy = _LuksCopy(fields[3], fields[7].rstrip(b"\0").decode("ascii", "replace"), raw[BLOCK:])
    ours = _encode_luks_copy(offset, copy, fields[6])
    if raw != ours or not UUID.fullmatch(copy.uuid):
        pairs = zip(fields, _LUKS.unpack_from(ours), strict=True)
        seen = [field for field, wanted in pairs if field != wanted] or [copy.uuid]
        words = f"{str(seen[0])[:60]} at {offset}"
        raise Refused("LUKS-HEADER", expected="a header as mosinit makes it", seen=words)
    return copy


def _choose_luks_copy(first: _LuksCopy | None, second: _LuksCopy | None) -> tuple[_LuksCopy, str]:
    """Return the copy that counts, and a note if the other one was passed over.

    cryptsetup writes and syncs the first copy, then the second, with one number: a power cut leaves one copy
    without its checksum or the first copy one ahead, and nothing else.
    """
    if first and second and first != second:
        if (first.seqid, first.uuid) == (second.seqid + 1, second.uuid):
            return first, "the second copy of the header is older"
        seen = f"seqid {first.seqid} and {second.seqid}, with different contents"
        raise Refused("LUKS-HEADER", expected="two copies that agree", seen=seen)
    if chosen := first or second:
        return chosen, "" if first and second else "one copy of the header is damaged"
    raise Refused("LUKS-HEADER", expected="a LUKS2 header", seen="no copy with the right checksum")


def _base64(least: int, most: int) -> Callable[[object], bool]:
    """Make the test for base64, in its one spelling, of so many bytes."""

    def fits(value: object) -> bool:
        try:
            data = binascii.a2b_base64(cast(str, value), strict_mode=True)
        except (TypeError, ValueError):
            return False
        return least <= len(data) <= most and binascii.b2a_base64(data, newline=False).decode() == value

    return fits


_SALT = _base64(32, 32)
_PBKDF2 = {"type": "pbkdf2", "hash": "sha256", "iterations": range(1000, 10_000_001), "salt": _SALT}
_QUICK = {**_PBKDF2, "iterations": range(1000, 100_001)}
_ARGON2ID = {  # memory in KiB
    "type": "argon2id", "time": range(1, 21), "memory": range(32, MIB + 1), "cpus": range(1, 5),
    "salt": _SALT,
}  # fmt: skip
_SEGMENT = {
    "type": "crypt", "offset": str(LUKS_DATA), "size": "dynamic", "iv_tweak": "0", "encryption": LUKS_CIPHER,
    "sector_size": BLOCK,
}  # fmt: skip
_INTEGRITY = {"type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none"}
_TOKENS = {
    "0": {
        "type": "mosinit-seal", "keyslots": ["0"], "public": _base64(1, 1024), "private": _base64(1, 1024),
    },
    "1": {"type": "mosinit-record", "keyslots": [], "certificate": _base64(1, 4096)},
    "2": {
        "type": "mosinit-approvals", "keyslots": [],
        "approvals": lambda value: isinstance(value, list) and 1 <= len(value) <= 16,
    },
    "3": {
        "type": "mosinit-order", "keyslots": [], "statement": _base64(1, 1024),
        "signature": _base64(1, 1024), "certificate": _base64(1, 16384),
    },
}  # fmt: skip
_APPROVAL = {"pcr7": HEX64, "epoch": range(1, MAX_EPOCH + 1), "signature": _base64(256, 256)}


def _check_luks_json(raw: dict[str, Any], kind: str) -> tuple[int, ...]:
    """Check the JSON of a header, tokens included, and return the numbers of its key slots."""
    given = raw.get("keyslots") if isinstance(raw, dict) else None
    slots = given if isinstance(given, dict) else {}
    if "0" not in slots or len(slots) > 4 or set(slots) - set("01234567"):
        seen = f"keyslots: {', '.join(slots)[:60] or 'none'}"
        raise Refused("LUKS-HEADER", expected="key slot 0 and at most three others", seen=seen)
    segment = {**_SEGMENT, "integrity": _INTEGRITY} if kind == "config" else _SEGMENT
    digest = {
        **_PBKDF2, "digest": _base64(32, 32), "segments": ["0"],
        "keyslots": lambda value: (
            isinstance(value, list) and len(value) == len(slots) and all(slot in value for slot in slots)
        ),
    }  # fmt: skip
    size = -(-LUKS_KEY_BYTES[kind] * 4000 // BLOCK) * BLOCK
    shape = {
        "keyslots": {
            slot: _slot_shape(slot, value, LUKS_KEY_BYTES[kind], size) for slot, value in slots.items()
        },
        "segments": {"0": segment},
        "digests": {"0": digest},
        "config": {"json_size": str(LUKS_COPY - BLOCK), "keyslots_size": str(LUKS_SLOT_BYTES)},
    }
    match(raw.get("tokens", ...), _TOKENS if kind == "config" else {}, "tokens", "LUKS-TOKEN")
    match({key: value for key, value in raw.items() if key != "tokens"}, shape, "", "LUKS-HEADER")
    free = 2 * LUKS_COPY
    for start, slot in sorted((int(value["area"]["offset"]), slot) for slot, value in slots.items()):
        if start % BLOCK or not free <= start <= LUKS_BYTES - size:
            seen = f"keyslots.{slot}.area.offset: {start}"
            raise Refused("LUKS-HEADER", expected="key slots apart, in their area", seen=seen)
        free = start + size
    return tuple(sorted(int(slot) for slot in slots))


def _slot_shape(slot: str, untrusted: object, key_bytes: int, size: int) -> dict[str, object]:
    """Return what a key slot must be; slot 0, which the boot tries, must cost next to nothing."""
    fields = untrusted if isinstance(untrusted, dict) else {}
    kdf = fields.get("kdf")
    argon = isinstance(kdf, dict) and kdf.get("type") == "argon2id"
    return {
        "type": "luks2",
        "key_size": key_bytes,
        "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
        "area": {
            "type": "raw", "offset": re.compile("[1-9][0-9]{5,6}"), "size": str(size),
            "encryption": LUKS_CIPHER, "key_size": 64,
        },
        "kdf": _QUICK if slot == "0" else (_ARGON2ID if argon else _PBKDF2),
        **({"priority": range(3)} if "priority" in fields else {}),
    }  # fmt: skip


def _parse_tokens(raw: dict[str, Any]) -> Tokens:
    """Take apart the tokens of config, whose outer shape is checked."""
    seal, record, approvals, order = raw["0"], raw["1"], raw["2"]["approvals"], raw["3"]
    for index, approval in enumerate(approvals):
        match(approval, _APPROVAL, f"tokens.2.approvals[{index}]", "LUKS-TOKEN")
    decode = binascii.a2b_base64
    signed = {a["pcr7"]: PlatformApproval(a["epoch"], decode(a["signature"])) for a in approvals}
    if len(signed) != len(approvals):
        seen = "tokens.2.approvals: a value of PCR 7 twice"
        raise Refused("LUKS-TOKEN", expected="one approval for each value", seen=seen)
    return Tokens(
        decode(seal["public"]), decode(seal["private"]), decode(record["certificate"]), signed,
        *(decode(order[key]) for key in ("statement", "signature", "certificate")),
    )  # fmt: skip


def open_volume(k: Kernel, header: LuksHeader, device: str, secret: bytearray, name: str | None) -> None:
    """Open a volume by its checked header and key slot 0; without a name, only try the secret."""
    with refusing("VOLUME-KEY", f"the volume {header.uuid} opened by this machine's key"):
        k.open_luks(detached_header(header), device, secret, 0, name)


# --- Generations: manifest.git, read without git -----------------------------------------------------------

MANIFEST_GIT = f"{CONFIG}/manifest.git"
MAX_GENERATIONS = 64


class Generation(NamedTuple):
    """One commit of manifest.git: which install manifest defines each target, and the UKI that boots it."""

    commit: str
    sequence: int
    uki: str
    targets: tuple[tuple[str, str], ...]  # service name, SHA-256 of an install manifest
    files: Mapping[str, str]  # name in the commit to object id
    parent: str | None


_GENERATION = _record(lambda **values: values, {
    "version": Field(_number(1, 1), REQUIRED),
    "product": Field(text_like(UUID, "a product id"), REQUIRED),
    "sequence": Field(_number(1, MAX_SEQUENCE), REQUIRED),
    "uki": Field(text_like(HEX64, "the id of a UKI"), REQUIRED),
    "targets": Field(_list_of(_record(lambda **values: (values["service_name"], values["manifest"]), {
        "service_name": Field(_name, REQUIRED),
        "manifest": Field(text_like(HEX64, "the SHA-256 of an install manifest"), REQUIRED),
    }), 256), REQUIRED),
})  # fmt: skip
_GIT_NAME = re.compile(r"manifest\.yaml|[0-9a-f]{64}\.(yaml|yaml\.signed|pem)")


def read_git_object(k: Machine, name: str, kind: str) -> bytes:
    """Return a loose object of manifest.git (gitformat-loose(5)) if it is of that kind and has its SHA-1.

    Git vouches for nothing here: what counts in these files is signed.
    """
    path = f"{MANIFEST_GIT}/objects/{name[:2]}/{name[2:]}"
    stream, data, whole = zlib.decompressobj(), b"", False
    with refusing("GIT-OBJECT", f"{kind} {name}"), contextlib.suppress(zlib.error):
        if not k.exists(path) and k.names(f"{MANIFEST_GIT}/objects/pack"):
            raise Refused("GIT-PACKED", expected=f"the loose {kind} {name}", seen="packs")
        data = stream.decompress(k.read(path), MIB)
        whole = stream.eof and not stream.unused_data
    head, _, body = data.partition(b"\0")
    if not whole or head != f"{kind} {len(body)}".encode() or hashlib.sha1(data).hexdigest() != name:
        raise Refused("GIT-OBJECT", expected=f"{kind} {name}", seen=f"{head[:40]!r}, {len(data)} bytes")
    return body


def read_git_tree(k: Machine, name: str) -> dict[str, str]:
    """Return the files of a tree, name to object id: only those that belong into manifest.git."""
    data, files = read_git_object(k, name, "tree"), {}
    while data:
        head, zero, rest = data.partition(b"\0")
        mode, _, file = head.decode(errors="replace").partition(" ")
        if mode != "100644" or not zero or not _GIT_NAME.fullmatch(file) or len(rest) < 20 or file in files:
            raise Refused("GIT-OBJECT", expected="manifests, signatures, certificates", seen=repr(head[:90]))
        files[file], data = rest[:20].hex(), rest[20:]
    return files


def read_generations(k: Machine, product: str) -> Iterator[Generation]:
    """Yield the generations that manifest.git has, newest first, along first parents."""
    with refusing("GIT-PACKED" if k.exists(f"{MANIFEST_GIT}/packed-refs") else "GIT-REF", "the branch main"):
        untrusted = k.read(f"{MANIFEST_GIT}/refs/heads/main", 64)
    commit: str | None = untrusted.decode(errors="replace").rstrip("\n")
    for _ in range(MAX_GENERATIONS):
        if commit is None:
            return
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise Refused("GIT-REF", expected="the id of a commit", seen=repr(commit[:64]))
        data = read_git_object(k, commit, "commit")
        head = re.match(rb"tree ([0-9a-f]{40})\n(?:parent ([0-9a-f]{40})\n)?", data)
        if head is None:
            raise Refused("GIT-OBJECT", expected="a commit", seen=commit)
        files = read_git_tree(k, head[1].decode())
        if "manifest.yaml" not in files:
            raise Refused("GIT-OBJECT", expected="manifest.yaml", seen=", ".join(files)[:200])
        values = _GENERATION(parse_yaml(read_git_object(k, files["manifest.yaml"], "blob")), "")
        if values["product"] != product:
            raise Refused("MANIFEST-PRODUCT", expected=product, seen=values["product"])
        parent = head[2].decode() if head[2] else None
        yield Generation(commit, values["sequence"], values["uki"], values["targets"], files, parent)
        commit = parent


def verify_generation(k: Machine, generation: Generation, policy: Policy) -> Manifest:
    """Return the targets of a generation, each from the install manifest that defines it, all verified."""
    verified: dict[str, Manifest] = {}
    for sha256 in dict(generation.targets).values():
        parts = [f"{sha256}{ending}" for ending in (".yaml", ".yaml.signed", ".pem")]
        if missing := [part for part in parts if part not in generation.files]:
            raise Refused("MANIFEST-ABSENT", expected=", ".join(missing), seen=generation.commit)
        if sha256 not in verified:
            blobs = [read_git_object(k, generation.files[part], "blob") for part in parts]
            verified[sha256] = verify_manifest(blobs[0], blobs[1], blobs[2], policy)
    if not verified:
        raise Refused("MANIFEST-TARGET", expected="targets", seen="none")
    targets: dict[str, tuple[str, Target]] = {}
    volumes: dict[str, Volume] = {}
    sequences = {manifest.contents.sequence: manifest for manifest in verified.values()}
    for _, manifest in sorted(sequences.items()):
        if manifest.contents.update_type == "complete":
            targets, volumes = {}, {}
        targets |= {each.service_name: (manifest.sha256, each) for each in manifest.contents.targets}
        volumes |= {each.label: each for each in manifest.contents.storage}
    # A generation is nobody's signed word: its manifests decide its number, and who defines a target.
    decided = max(sequences), sorted((name, sha256) for name, (sha256, _) in targets.items())
    if decided != (generation.sequence, sorted(generation.targets)):
        seen = f"{generation.sequence}, {sorted(generation.targets)}"
        raise Refused("MANIFEST-SEQUENCE", expected=f"{decided[0]}, {decided[1]}", seen=seen)
    newest, chosen = sequences[decided[0]], tuple(target for _, target in targets.values())
    return Manifest(newest.contents._replace(targets=chosen, storage=tuple(volumes.values())), newest.sha256)


def pick_generation(k: Machine, policy: Policy) -> Manifest:
    """Return the newest generation of this UKI that verifies, or before it the one the menu named."""
    attributes, value = k.efi_read("LoaderEntrySelected", LOADER_GUID) or (EFI_NON_VOLATILE, b"")
    named = re.match(r"mosinit_([0-9]{1,19})(?:\+|\.efi)", value.decode("utf-16-le", "replace"))
    wanted = int(named[1]) if named and not attributes & EFI_NON_VOLATILE else 0
    ours: list[Generation] = []
    try:
        for each in read_generations(k, policy.product):
            ours += [each] if each.uki == policy.uki_id else []
    except Refused as error:
        if not ours:
            raise
        k.log(f"no generation is read behind a damaged one: {error}")
    ours.sort(key=lambda generation: generation.sequence != wanted)  # stable: then newest first
    failure = Refused("GENERATION", expected=f"a generation of UKI {policy.uki_id}", seen="none")
    for generation in ours:
        try:
            manifest = verify_generation(k, generation, policy)
        except Refused as error:
            k.log(f"generation {generation.sequence}: {error}")
            failure = error if failure.check == "GENERATION" else failure
            continue
        k.report.facts |= {"generation": generation.commit, "sequence": generation.sequence}
        return manifest
    raise failure


# --- TPM: commands of our own, the policy tree, and the fence ----------------------------------------------

TPM_SYSFS = "/sys/class/tpm/tpm0"
MEASURE_LOG = "/run/log/systemd/tpm2-measure.log"
# TCG algorithm registry
TPM_ALGORITHMS = {"sha1": 0x0004, "sha256": 0x000B, "sha384": 0x000C, "sha512": 0x000D}


class Cc(enum.IntEnum):
    """Command codes, TPM 2.0 library, part 2, 6.5.2."""

    NV_SETBITS = 0x135
    POLICY_NV = 0x149
    NV_READ = 0x14E
    LOAD = 0x157
    UNSEAL = 0x15E
    FLUSH_CONTEXT = 0x165
    LOAD_EXTERNAL = 0x167
    NV_READ_PUBLIC = 0x169
    POLICY_AUTHORIZE = 0x16A
    POLICY_COMMAND_CODE = 0x16C
    READ_PUBLIC = 0x173
    START_AUTH_SESSION = 0x176
    VERIFY_SIGNATURE = 0x177
    GET_CAPABILITY = 0x17A
    PCR_READ = 0x17E
    POLICY_PCR = 0x17F
    PCR_EXTEND = 0x182


# The same: TPM_ST, TPM_RH and TPM_RS; TPM_RC_RETRY, _TESTING, _YIELDED; TPM_EO_BITCLEAR; TPMA_SESSION
ST_NO_SESSIONS, ST_SESSIONS = 0x8001, 0x8002
RH_NULL, RS_PASSWORD, RH_OWNER = 0x40000007, 0x40000009, 0x40000001
TPM_RETRY = (0x922, 0x90A, 0x908)
EO_BITCLEAR, ENCRYPT_RESPONSE = 0x000B, 0x40
SALTED_POLICY = struct.pack(">BHHHH", 1, 0x0006, 128, 0x0043, 0x000B)  # policy session, AES-128-CFB, SHA-256

NvIndex, Handle = NewType("NvIndex", int), NewType("Handle", int)
# Ours alone, in the owner's range for storage keys (TCG registry of reserved handles, 2.3.1). Provisioning
# makes a new one each time, so that what was sealed before loads no more.
SRK = Handle(0x81004D53)
EPOCH_INDEX = NvIndex(0x01845050)  # ours, in the owner's range (TCG registry of reserved handles, 2.2)
# Owner write, so that provisioning makes the first bits; policy write, so that a UKI's initrd adds to them;
# type BITS, auth read, no dictionary attack protection, written (part 2, 13.4 TPMA_NV).
EPOCH_ATTRIBUTES = 0x2 | 0x8 | 0x20 | 0x40000 | 0x2000000 | 0x20000000
# What is sealed: fixedTPM, fixedParent, adminWithPolicy, noDA; not userWithAuth: only the policy opens it.
_SEALED_HEAD = struct.pack(">HHIH", 0x0008, 0x000B, 0x2 | 0x10 | 0x80 | 0x400, 32)
# A signature key as `tpm2_loadexternal -G rsa` makes it: decrypt, sign, userWithAuth.
_RSA_HEAD = struct.pack(">HHIHHHHIH", 0x0001, 0x000B, 0x60040, 0, 0x0010, 0x0010, 2048, 65537, 256)
# The storage root key: TCG EK Credential Profile's template for ECC P-256 SRKs.
SRK_ATTRIBUTES = 0x2 | 0x10 | 0x20 | 0x40 | 0x400 | 0x10000 | 0x20000
SRK_HEAD = struct.pack(">HHIHHHHHHH", 0x23, 0x0B, SRK_ATTRIBUTES, 0, 0x06, 128, 0x43, 0x10, 0x03, 0x10)

PLATFORM_STATE = (Pcr(7), *EXTRA_PCRS)
# Approvals of one kind must not pass for another: each kind has its policyRef.
UKI_REF, PLATFORM_REF = b"mosinit-uki", b"mosinit-platform"
POLICY_START = bytes(32)


def _sized(data: bytes) -> bytes:
    """Encode a TPM2B."""
    return struct.pack(">H", len(data)) + data


def tpm_name(public: bytes) -> bytes:
    """Return the Name of an object or NV index with this public area (TPM 2.0 library, part 1, 16)."""
    return b"\0\x0b" + _sha256(public)


def epoch_bits(epoch: int) -> int:
    """Return the bits that say that everything below `epoch` is unsafe: one for each epoch up to it."""
    return (1 << epoch) - 1


def pcr_selection(pcrs: Sequence[Pcr]) -> bytes:
    """Encode a TPML_PCR_SELECTION of the SHA-256 bank."""
    return struct.pack(">IHB3s", 1, 0x000B, 3, sum(1 << pcr for pcr in pcrs).to_bytes(3, "little"))


def policy_pcr(digest: bytes, values: Mapping[Pcr, bytes]) -> bytes:
    """Extend a policy digest by TPM2_PolicyPCR (part 3, 23.7)."""
    pcrs = sorted(values)
    seen = _sha256(*(values[pcr] for pcr in pcrs))
    return _sha256(digest, struct.pack(">I", Cc.POLICY_PCR), pcr_selection(pcrs), seen)


def policy_epoch(digest: bytes, index_name: bytes, epoch: int) -> bytes:
    """Extend a policy digest by TPM2_PolicyNV: no bit of the index above `epoch` is set (part 3, 23.9)."""
    arguments = _sha256(_unset_bits(epoch), struct.pack(">HH", 0, EO_BITCLEAR))
    return _sha256(digest, struct.pack(">I", Cc.POLICY_NV), arguments, index_name)


def _unset_bits(epoch: int) -> bytes:
    return struct.pack(">Q", ~epoch_bits(epoch) & (1 << 64) - 1)


def policy_authorize(key_name: bytes, reference: bytes) -> bytes:
    """Return the policy digest after TPM2_PolicyAuthorize by a key, whatever was before (part 3, 23.16)."""
    return _sha256(_sha256(POLICY_START, struct.pack(">I", Cc.POLICY_AUTHORIZE), key_name), reference)


class PolicyKeys(NamedTuple):
    """The public areas (TPMT_PUBLIC) of the keys that approve: pcr a UKI, platform a PCR 7 value."""

    pcr: bytes
    platform: bytes

    @property
    def seal(self) -> bytes:
        """The policy that guards the secret of the config volume, and what writes the epoch index."""
        return policy_authorize(tpm_name(self.platform), PLATFORM_REF)

    @property
    def epoch_index(self) -> bytes:
        """The public area (TPMS_NV_PUBLIC) of the epoch index, once it was written."""
        return struct.pack(">IHI", EPOCH_INDEX, 0x000B, EPOCH_ATTRIBUTES) + _sized(self.seal) + b"\0\x08"

    @property
    def sealed_head(self) -> bytes:
        """The public area (TPMT_PUBLIC) of that secret, up to the 32 bytes that each has of its own."""
        return _SEALED_HEAD + self.seal + struct.pack(">HH", 0x0010, 32)

    def uki_policy(self, pcr11: bytes, epoch: int, command: Cc) -> bytes:
        """Return what the pcr key signs (with UKI_REF), so that a UKI of this epoch may do the command."""
        digest = policy_pcr(POLICY_START, {MEASURED: pcr11})
        digest = policy_epoch(digest, tpm_name(self.epoch_index), epoch)
        return _sha256(digest, struct.pack(">II", Cc.POLICY_COMMAND_CODE, command))  # part 3, 23.11

    def platform_policy(self, pcr7: bytes, epoch: int) -> bytes:
        """Return what the platform key signs (with PLATFORM_REF): in this PCR 7 and up to this epoch, what
        pcr approved.
        """
        digest = policy_authorize(tpm_name(self.pcr), UKI_REF)
        digest = policy_pcr(digest, {PLATFORM_STATE[0]: pcr7, **dict.fromkeys(EXTRA_PCRS, bytes(32))})
        return policy_epoch(digest, tpm_name(self.epoch_index), epoch)


def policy_keys(pcr: bytes, platform: bytes) -> PolicyKeys:
    """Return the public areas of two RSA-2048 keys (SubjectPublicKeyInfo, PEM); ValueError for others."""
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    areas = []
    for pem in (pcr, platform):
        key = load_pem_public_key(pem)
        if not isinstance(key, rsa.RSAPublicKey) or (key.key_size, key.public_numbers().e) != (2048, 65537):
            raise ValueError("a TPM policy key is no RSA-2048 key with exponent 65537")
        areas.append(_RSA_HEAD + key.public_numbers().n.to_bytes(256, "big"))
    return PolicyKeys(*areas)


SIGNATURE = re.compile(r"[0-9a-f]{512}")  # RSA-2048


class UkiApproval(NamedTuple):
    """What the pcr key signed for one UKI: its epoch, and the two RSASSA-SHA256 signatures."""

    epoch: int
    unseal: bytes
    set_epoch: bytes


def parse_uki_approval(data: bytes) -> UkiApproval:
    """Parse the section .pcrsig as the stub hands it over. It is not measured: the TPM checks it."""
    raw = cast(dict[str, Any], parse_json(data, "TPM-APPROVAL"))
    shape = {"schema": 1, "epoch": EPOCHS, "unseal": SIGNATURE, "set_epoch": SIGNATURE}
    match(raw, shape, "", "TPM-APPROVAL")
    return UkiApproval(raw["epoch"], *(bytes.fromhex(raw[name]) for name in ("unseal", "set_epoch")))


class TpmError(OSError):
    """A command that the TPM did not do, or an answer that makes no sense (`code` is 0 then)."""

    def __init__(self, command: Cc, code: int, words: str = "") -> None:
        super().__init__(errno.EIO, f"TPM2_{command.name}: {words or f'the TPM answered {code:#x}'}")
        self.command, self.code = command, code


class Answer:
    """What a TPM answered, taken apart from its front; whatever does not fit is a TpmError."""

    def __init__(self, command: Cc, untrusted: bytes) -> None:
        self.command, self._rest = command, untrusted

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        if size > len(self._rest):
            raise TpmError(self.command, 0, f"{len(self._rest)} bytes where {size} must follow")
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def number(self, size: int) -> int:
        """Return the next number of `size` bytes."""
        return int.from_bytes(self.take(size), "big")

    def sized(self, width: int = 2) -> bytes:
        """Return the next bytes that their size precedes, as in a TPM2B."""
        return self.take(self.number(width))

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._rest))

    def end(self) -> None:
        """See that nothing is left."""
        if self._rest:
            raise TpmError(self.command, 0, f"{len(self._rest)} bytes too many")


EMPTY_PASSWORD = struct.pack(">IHBH", RS_PASSWORD, 0, 0, 0)


def tpm(
    k: Kernel, command: Cc, handles: Sequence[int], parameters: bytes = b"", authorization: bytes = b""
) -> Answer:
    """Do one command (TPM 2.0 library, part 1, 18) and return what follows the answer's header."""
    area = struct.pack(">I", len(authorization)) + authorization if authorization else b""
    body = struct.pack(f">{len(handles)}I", *handles) + area + parameters
    tag = ST_SESSIONS if authorization else ST_NO_SESSIONS
    for _ in range(50):
        untrusted = k.tpm(struct.pack(">HII", tag, 10 + len(body), command) + body)
        answer = Answer(command, untrusted)
        seen, size, code = answer.number(2), answer.number(4), answer.number(4)
        if code not in TPM_RETRY:
            break
        k.sleep(0.1)
    if code:
        raise TpmError(command, code)
    if (seen, size) != (tag, len(untrusted)):
        raise TpmError(command, 0, f"an answer of kind {seen:#x} that says it has {size} bytes")
    return answer


def read_capability(k: Kernel, capability: int, first: int, count: int) -> Answer:
    """Return what follows the capability's number in the answer to TPM2_GetCapability (part 3, 30.2)."""
    answer = tpm(k, Cc.GET_CAPABILITY, [], struct.pack(">III", capability, first, count))
    answer.take(1)  # whether there is more
    if answer.number(4) != capability:
        raise TpmError(Cc.GET_CAPABILITY, 0, "another capability than asked for")
    return answer


def active_banks(k: Kernel) -> list[str]:
    """Return the names of the PCR banks in use, as far as this program can compute their hashes."""
    answer, names = read_capability(k, 5, 0, 1), {number: name for name, number in TPM_ALGORITHMS.items()}
    banks = []
    for _ in range(min(answer.number(4), 16)):
        number, selected = answer.number(2), answer.sized(1)
        banks += [names[number]] if number in names and any(selected) else []
    answer.end()
    return banks


def read_pcrs(k: Kernel, pcrs: Sequence[Pcr]) -> dict[Pcr, bytes]:
    """Return up to eight PCRs of the SHA-256 bank."""
    selection = pcr_selection(pcrs)
    answer = tpm(k, Cc.PCR_READ, [], selection)
    answer.take(4)  # how often PCRs changed
    if answer.take(len(selection)) != selection or answer.number(4) != len(pcrs):
        raise TpmError(Cc.PCR_READ, 0, "no SHA-256 bank, or other PCRs than asked for")
    values = {pcr: answer.sized() for pcr in sorted(pcrs)}
    answer.end()
    if any(len(value) != 32 for value in values.values()):
        raise TpmError(Cc.PCR_READ, 0, "PCRs of another size")
    return values


def read_pcr(k: Kernel, pcr: Pcr) -> bytes:
    """Return a PCR of the SHA-256 bank."""
    return read_pcrs(k, [pcr])[pcr]


def extend_pcr(k: Machine, pcr: Pcr, word: bytes) -> None:
    """Extend every bank of a PCR with a word, append the event to systemd's log; OSError if that fails."""
    digests = {bank: hashlib.new(bank, word).digest() for bank in active_banks(k)}
    values = b"".join(struct.pack(">H", TPM_ALGORITHMS[bank]) + digest for bank, digest in digests.items())
    tpm(k, Cc.PCR_EXTEND, [pcr], struct.pack(">I", len(digests)) + values, EMPTY_PASSWORD)
    # As systemd-pcrphase does: TCG canonical event log as JSON, RFC 7464 framing.
    content = {
        "string": word.decode(), "timestamp": round(1_000_000 * k.monotonic()), "eventType": "phase",
        "bootId": k.read("/proc/sys/kernel/random/boot_id").decode().strip().replace("-", ""),
    }  # fmt: skip
    hashes = [{"hashAlg": bank, "digest": digest.hex()} for bank, digest in digests.items()]
    record = {"pcr": pcr, "digests": hashes, "content_type": "systemd", "content": content}
    k.make_folder(os.path.dirname(MEASURE_LOG))
    earlier = k.read(MEASURE_LOG) if k.exists(MEASURE_LOG) else b""
    k.write(MEASURE_LOG, earlier + b"\x1e" + json.dumps(record).encode() + b"\n")


class Session:
    """A policy session, salted and encrypted to the storage root key (part 1, 19): only its TPM answers."""

    def __init__(self, k: Kernel, storage_key: bytes) -> None:
        from cryptography.hazmat.primitives.asymmetric import ec

        point = storage_key[len(SRK_HEAD) :]
        x, y = (int.from_bytes(part, "big") for part in (point[2:34], point[36:68]))
        ours = ec.generate_private_key(ec.SECP256R1())
        theirs = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
        numbers = ours.public_key().public_numbers()
        mine = numbers.x.to_bytes(32, "big"), numbers.y.to_bytes(32, "big")
        shared = ours.exchange(ec.ECDH(), theirs)
        salt = _sha256(b"\0\0\0\1", shared, b"SECRET\0", mine[0], point[2:34])  # KDFe, part 1, 11.4.10.3
        nonce = k.random(32)
        secret = _sized(_sized(mine[0]) + _sized(mine[1]))
        answer = tpm(k, Cc.START_AUTH_SESSION, [SRK, RH_NULL], _sized(nonce) + secret + SALTED_POLICY)
        self.handle, self.nonce_tpm = answer.number(4), answer.sized()
        answer.end()
        self.key = kdfa(salt, b"ATH", self.nonce_tpm, nonce)


def kdfa(key: bytes, label: bytes, one: bytes, two: bytes) -> bytes:
    """Derive 256 bits (SP 800-108 counter mode with HMAC-SHA256; TPM 2.0 library, part 1, 11.4.10.2)."""
    data = b"\0\0\0\1" + label + b"\0" + one + two + struct.pack(">I", 256)
    return hmac.digest(key, data, "sha256")


def tpm_in(
    k: Kernel, session: Session, command: Cc, handles: Sequence[int], name: bytes, parameters: bytes = b""
) -> bytearray:
    """Do one command by that session, which ends with it; all its handles have one name.

    Returns what TPM2_Unseal gives, which nobody on the bus can read; nothing for other commands.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    nonce, flags = k.random(32), bytes([ENCRYPT_RESPONSE if command == Cc.UNSEAL else 0])
    asked = _sha256(struct.pack(">I", command), name * len(handles), parameters)
    proof = hmac.digest(session.key, asked + nonce + session.nonce_tpm + flags, "sha256")
    authorization = struct.pack(">I", session.handle) + _sized(nonce) + flags + _sized(proof)
    answer = tpm(k, command, handles, parameters, authorization)
    body, nonce_tpm, echoed, seen = answer.sized(4), answer.sized(), answer.take(1), answer.sized()
    answer.end()
    said = _sha256(struct.pack(">II", 0, command), body)
    proof = hmac.digest(session.key, said + nonce_tpm + nonce + flags, "sha256")
    if echoed != flags or not hmac.compare_digest(seen, proof):
        raise TpmError(command, 0, "an answer that the TPM of this session did not make")
    if command != Cc.UNSEAL:
        return bytearray()
    keys, inner = kdfa(session.key, b"CFB", nonce_tpm, nonce), Answer(command, body)
    cipher = Cipher(algorithms.AES(keys[:16]), modes.CFB(keys[16:]))
    secret = bytearray(cipher.decryptor().update(inner.sized()))
    inner.end()
    return secret


def flush(k: Kernel, handle: int) -> None:
    """Drop an object or session; the resource manager does it at the latest when we end."""
    with contextlib.suppress(OSError):
        tpm(k, Cc.FLUSH_CONTEXT, [], struct.pack(">I", handle))


def authorize(k: Kernel, session: int, key: bytes, policy: bytes, ref: bytes, signature: bytes) -> None:
    """Replace the session's policy by "what that key approves", if it approved just the policy of now."""
    answer = tpm(k, Cc.LOAD_EXTERNAL, [], _sized(b"") + _sized(key) + struct.pack(">I", RH_OWNER))
    loaded = answer.number(4)
    try:
        signed = _sized(_sha256(policy, ref)) + struct.pack(">HH", 0x0014, 0x000B) + _sized(signature)
        ticket = tpm(k, Cc.VERIFY_SIGNATURE, [loaded], signed).rest()
    finally:
        flush(k, loaded)
    approved = _sized(policy) + _sized(ref) + _sized(tpm_name(key)) + ticket
    tpm(k, Cc.POLICY_AUTHORIZE, [session], approved)


def fence(k: Machine) -> None:
    """Extend PCR 11 past the state in which anything can be unsealed, and see that it happened.

    Every way out of this program comes through here; the second time does nothing. If it refuses, nothing
    may run here any more. Without a TPM and its SHA-256 bank nothing could be unsealed.
    """
    if k.report.fenced:
        return
    try:
        if not k.names("/sys/class"):
            raise OSError(errno.ENOENT, "/sys is not there")
        # Whatever is sealed for mosinit is sealed to this bank.
        if not k.exists(TPM_SYSFS) or "sha256" not in active_banks(k):
            if any(each["name"] == "measure" and each["ok"] for each in k.report.stages):
                raise OSError(errno.ENODEV, "the TPM that was measured into is not there any more")
            return
        before = read_pcr(k, MEASURED)
        extend_pcr(k, MEASURED, LEAVE_INITRD)
        if read_pcr(k, MEASURED) != _sha256(before, _sha256(LEAVE_INITRD)):
            raise OSError(errno.EIO, "PCR 11 did not change as it must")
    except Exception as error:
        seen = f"{type(error).__name__}: {error}"
        raise Refused("TPM-FENCE", expected="PCR 11 extended by leave-initrd", seen=seen) from error
    k.report.fenced = True


# --- Seal: who may open the config volume, decided by the TPM ----------------------------------------------

RC_ABSENT, RC_LOCKOUT = 0x18B, 0x921  # TPM_RC_HANDLE for the first handle; TPM_RC_LOCKOUT
# Which check an answer of the TPM stands for (TPM 2.0 library, part 2, 6.6.3).
TPM_REFUSALS = {
    (Cc.READ_PUBLIC, RC_ABSENT): "TPM-SRK",
    (Cc.NV_READ_PUBLIC, RC_ABSENT): "TPM-INDEX",
    (Cc.POLICY_NV, 0x126): "EPOCH",  # TPM_RC_POLICY
    (Cc.LOAD, 0x1DF): "TPM-SEAL",  # TPM_RC_INTEGRITY
    (Cc.VERIFY_SIGNATURE, 0x2DB): "TPM-APPROVAL",  # TPM_RC_SIGNATURE
    (Cc.POLICY_AUTHORIZE, 0x1C4): "TPM-POLICY",  # TPM_RC_VALUE
    (Cc.UNSEAL, 0x99D): "TPM-POLICY",  # TPM_RC_POLICY_FAIL
    (Cc.NV_SETBITS, 0x99D): "TPM-POLICY",
}


@contextlib.contextmanager
def asking_tpm(expected: str) -> Iterator[None]:
    """Turn whatever the TPM does not do into the refusal that it stands for."""
    try:
        yield
    except TpmError as error:
        check = TPM_REFUSALS.get((error.command, error.code), "TPM-ANSWER")
        check = "TPM-LOCKOUT" if error.code == RC_LOCKOUT else check
        raise Refused(check, expected=expected, seen=str(error.strerror)) from error
    except OSError as error:
        raise Refused("TPM-ANSWER", expected=expected, seen=str(error)) from error


class Permanent(enum.IntFlag):
    """TPMA_PERMANENT, part 2, 8.6."""

    OWNER_AUTH = 1
    ENDORSEMENT_AUTH = 2
    LOCKOUT_AUTH = 4
    CLEAR_DISABLED = 1 << 8
    IN_LOCKOUT = 1 << 9


PROVISIONED = Permanent(1 | 2 | 4 | 1 << 8)


def read_tpm_flags(k: Kernel) -> tuple[Permanent, int]:
    """Return TPMA_PERMANENT and TPMA_STARTUP_CLEAR (bit 1: the owner's hierarchy is enabled)."""
    answer = read_capability(k, 6, 0x200, 2)
    count, found = answer.number(4), {answer.number(4): answer.number(4) for _ in range(2)}
    answer.end()
    if count != 2 or set(found) != {0x200, 0x201}:
        raise TpmError(Cc.GET_CAPABILITY, 0, "other properties than asked for")
    return Permanent(found[0x200]), found[0x201]


def read_storage_key(k: Kernel) -> bytes | None:
    """Return the public area of the storage root key, None if there is none."""
    try:
        return tpm(k, Cc.READ_PUBLIC, [SRK]).sized()
    except TpmError as error:
        if error.code != RC_ABSENT:
            raise
        return None


def read_epoch_index(k: Kernel) -> bytes:
    """Return the public area of the epoch index."""
    return tpm(k, Cc.NV_READ_PUBLIC, [EPOCH_INDEX]).sized()


def read_epoch(k: Kernel) -> int:
    """Return the bits of the epoch index."""
    answer = tpm(k, Cc.NV_READ, [EPOCH_INDEX, EPOCH_INDEX], struct.pack(">HH", 8, 0), EMPTY_PASSWORD)
    bits = Answer(Cc.NV_READ, answer.sized(4)).sized()
    if len(bits) != 8:
        raise TpmError(Cc.NV_READ, 0, f"{len(bits)} bytes of an index that has 8")
    return int.from_bytes(bits, "big")


def check_tpm(k: Machine, record: MachineRecord, epoch: int) -> bytes:
    """Return the storage root key of the record's TPM, as provisioning left it, at no epoch above ours."""
    with asking_tpm("the TPM to tell its state"):
        permanent, startup = read_tpm_flags(k)
        storage_key = read_storage_key(k)
    whole = permanent & PROVISIONED == PROVISIONED
    seen = f"{permanent & PROVISIONED!r}, hierarchies {startup & 7:#x}"
    k.report.facts["tpm_locked_out"] = bool(permanent & Permanent.IN_LOCKOUT)
    if not startup & 2:
        raise Refused("TPM-STATE", expected="the owner's hierarchy to be enabled", seen=seen)
    name = tpm_name(storage_key) if storage_key else b""
    if name != record.storage_key:
        check = ("TPM-IDENTITY" if storage_key else "TPM-SRK") if whole else "TPM-CLEARED"
        expected, seen = f"storage key {record.storage_key.hex()}", f"{name.hex() or 'none'}, {seen}"
        raise Refused(check, expected=expected, seen=seen)
    k.report.passed("TPM-IDENTITY", name.hex(), name.hex())
    demand(k, "TPM-STATE", expected=f"{PROVISIONED!r}", seen=f"{permanent & PROVISIONED!r}")
    with asking_tpm("the epoch index"):
        public = read_epoch_index(k)
        demand(k, "TPM-INDEX", expected=record.epoch_index.hex(), seen=tpm_name(public).hex())
        bits = read_epoch(k)
    k.report.facts["tpm_epoch"] = bits.bit_length()
    if bits & ~epoch_bits(epoch):
        seen = f"epoch {bits.bit_length()}"
        raise Refused("EPOCH", expected=f"a TPM at epoch {epoch} or before", seen=seen)
    k.report.passed("EPOCH", f"at most {epoch}", str(bits.bit_length()))
    return cast(bytes, storage_key)


def find_approval(k: Machine, tokens: Tokens, epoch: int) -> tuple[bytes, PlatformApproval]:
    """Return PCR 7 and its approval, if there is one that holds in the TPM's epoch and in this UKI's."""
    pcr7, bits = read_pcr(k, PLATFORM_STATE[0]), read_epoch(k)
    approval = tokens.approvals.get(pcr7.hex())
    if approval is None:
        expected = f"an approved PCR 7: {', '.join(tokens.approvals)[:300]}"
        raise Refused("TPM-POLICY", expected=expected, seen=pcr7.hex())
    # An older approval, which anybody may put back, would keep the TPM from this UKI's epoch for ever.
    if bits & ~epoch_bits(approval.epoch) or approval.epoch < epoch:
        seen = f"one up to epoch {approval.epoch}, the TPM is at {bits.bit_length()}, this UKI at {epoch}"
        raise Refused("TPM-APPROVAL", expected=f"an approval of PCR 7 {pcr7.hex()} that holds", seen=seen)
    return pcr7, approval


def satisfy(
    k: Machine, session: Session, tokens: Tokens, keys: PolicyKeys, approval: UkiApproval, command: Cc
) -> None:
    """Satisfy the policy: this UKI before the fence, one command, approved firmware, no epoch too late."""
    (pcr7, platform), pcr11 = find_approval(k, tokens, approval.epoch), read_pcr(k, MEASURED)
    signature = approval.unseal if command == Cc.UNSEAL else approval.set_epoch
    uki = keys.pcr, keys.uki_policy(pcr11, approval.epoch, command), UKI_REF, signature
    firmware = keys.platform, keys.platform_policy(pcr7, platform.epoch), PLATFORM_REF, platform.signature
    steps = (([MEASURED], approval.epoch, uki), (PLATFORM_STATE, platform.epoch, firmware))
    for pcrs, epoch, approved in steps:
        tpm(k, Cc.POLICY_PCR, [session.handle], _sized(b"") + pcr_selection(pcrs))
        bits = _sized(_unset_bits(epoch)) + struct.pack(">HH", 0, EO_BITCLEAR)
        tpm(k, Cc.POLICY_NV, [EPOCH_INDEX, EPOCH_INDEX, session.handle], bits, EMPTY_PASSWORD)
        if approved is uki:
            tpm(k, Cc.POLICY_COMMAND_CODE, [session.handle], struct.pack(">I", command))
        authorize(k, session.handle, *approved)


def unseal(k: Machine, tokens: Tokens, srk: bytes, keys: PolicyKeys, approval: UkiApproval) -> bytearray:
    """Return the sealed secret if the TPM agrees. The caller wipes it."""
    head = keys.sealed_head
    if not tokens.seal_public.startswith(head) or len(tokens.seal_public) != len(head) + 32:
        seen = tokens.seal_public.hex()[:200]
        raise Refused("TPM-SEAL", expected="a secret under this system's policy", seen=seen)
    with asking_tpm("the TPM to open the secret"), contextlib.ExitStack() as undo:
        area = _sized(tokens.seal_private) + _sized(tokens.seal_public)
        item = tpm(k, Cc.LOAD, [SRK], area, EMPTY_PASSWORD).number(4)
        undo.callback(flush, k, item)
        session = Session(k, srk)
        undo.callback(flush, k, session.handle)
        satisfy(k, session, tokens, keys, approval, Cc.UNSEAL)
        return tpm_in(k, session, Cc.UNSEAL, [item], tpm_name(tokens.seal_public))


def raise_epoch(
    k: Machine, tokens: Tokens, storage_key: bytes, keys: PolicyKeys, approval: UkiApproval, epoch: int
) -> None:
    """Set the TPM's epoch bits up to `epoch`, and see that they are set."""
    name = tpm_name(keys.epoch_index)
    with asking_tpm(f"the TPM to take epoch {epoch}"):
        # Not above what the UKI is approved for: the next boot would find nothing that opens.
        bits = epoch_bits(min(epoch, approval.epoch))
        if read_epoch(k) & bits == bits:
            return
        session = Session(k, storage_key)
        try:
            satisfy(k, session, tokens, keys, approval, Cc.NV_SETBITS)
            tpm_in(k, session, Cc.NV_SETBITS, [EPOCH_INDEX, EPOCH_INDEX], name, struct.pack(">Q", bits))
        finally:
            flush(k, session.handle)
        seen = read_epoch(k)
    if seen & bits != bits:
        raise Refused("EPOCH", expected=f"epoch bits {bits:#x}", seen=f"{seen:#x}")
    k.report.facts["tpm_epoch"] = seen.bit_length()


def check_secret(record: MachineRecord, secret: bytearray) -> None:
    """See that the secret is the record's: what somebody else sealed to the same policy ends here."""
    proof = secret_proof(secret, record.product)
    if len(secret) != 32 or not hmac.compare_digest(proof, record.secret_proof):
        raise Refused("VOLUME-IDENTITY", expected=record.secret_proof.hex(), seen=proof.hex())


def secret_proof(secret: bytes | bytearray, product: str) -> bytes:
    """Return what a machine record says of the config volume's secret (HMAC-SHA256)."""
    return hmac.digest(bytes(secret), b"mosinit config volume\0" + product.encode(), "sha256")


def derive_key(secret: bytearray, purpose: str, partition: str = "") -> bytearray:
    """Return a key of 32 bytes for one purpose (RFC 5869: HKDF-SHA256 without salt). The caller wipes it."""
    # The purpose and not the place alone, or two partitions whose entries were exchanged would both open.
    root = bytearray(hmac.digest(bytes(32), secret, "sha256"))
    try:
        info = f"mosinit {purpose} volume {partition}".encode()
        return bytearray(hmac.digest(root, info + b"\1", "sha256"))
    finally:
        wipe(root)


def wipe(secret: bytearray) -> None:
    """Overwrite a secret; CPython may have copied it before, so this is the best that can be done."""
    secret[:] = bytes(len(secret))


# --- Stages, in the order of boot() ------------------------------------------------------------------------


@stage
def set_up(k: Machine) -> Policy:
    """Mount the pseudo file systems, open the consoles, read what the build decided."""
    k.mount("proc", "/proc", "proc", SAFE)
    k.mount("sysfs", "/sys", "sysfs", SAFE)
    k.mount("devtmpfs", "/dev", "devtmpfs", MountFlag.NOSUID | MountFlag.NOEXEC, "mode=0755")
    k.mount("tmpfs", "/run", "tmpfs", SAFE, "mode=0755")
    k.mount("securityfs", "/sys/kernel/security", "securityfs", SAFE)
    k.open_consoles()
    k.quiet_kernel(4)
    data, uki_id = (k.read(f"{POLICY_FOLDER}/{name}") for name in ("policy.json", "uki-id"))
    policy = parse_policy(data, uki_id, {name: k.read(f"{OURS}/{name}") for name in k.names(OURS)})
    facts = {"mode": policy.mode, "product": policy.product, "uki_id": policy.uki_id, "epoch": policy.epoch}
    k.report.facts |= facts
    return policy


def import_ahead() -> None:
    """Import what later stages need while the kernel probes devices."""
    os.environ["CRYPTOGRAPHY_OPENSSL_NO_LEGACY"] = "1"  # the initrd has no legacy provider
    with contextlib.suppress(ImportError):  # the importing function says it better
        for name in FROZEN_IMPORTS:
            __import__(name)


@stage
def load_modules(k: Machine, policy: Policy) -> None:
    """Load what the build listed, in its order, read parameters back, arm the watchdog once it is there."""
    armed = False
    for module in policy.modules:
        given = [f"{name}={value}" for name, value in module.parameters.items()]
        given += ["async_probe=1"] if module.background else []
        with refusing("MODULE-LOAD", f"{module.name} to load"):
            k.load_module(module.path, " ".join(given))
        for name, value in module.parameters.items():
            with refusing("MODULE-PARAMETER", f"{module.name}.{name}={value}"):
                seen = k.read(f"/sys/module/{module.name}/parameters/{name}", BLOCK).decode().strip()
            words = f"{module.name}.{name}="
            demand(k, "MODULE-PARAMETER", expected=words + value, seen=words + seen)
        armed = armed or k.arm_watchdog(WATCHDOG_SECONDS)
    k.report.facts["watchdog"] = armed


@stage
def check_firmware(k: Machine, policy: Policy) -> None:
    """See that firmware, kernel and boot stub are in the state that the signatures rely on."""
    k.mount("efivarfs", EFIVARS, "efivarfs", SAFE)
    _check_secure_boot(k)
    _check_trusted_keys(k, policy)
    lockdown = re.search(r"\[(\w+)\]", k.read("/sys/kernel/security/lockdown").decode())
    demand(k, "SB-LOCKDOWN", expected="confidentiality", seen=lockdown[1] if lockdown else "none")
    _check_tpm(k)
    seen = k.read("/proc/cmdline", 65536).decode(errors="backslashreplace").removesuffix("\n")
    demand(k, "CMDLINE", expected=policy.cmdline, seen=seen)
    _check_nothing_extra(k)


def _check_secure_boot(k: Machine) -> None:
    # AuditMode came with UEFI 2.5; SetupMode was always there.
    absent = {"SetupMode": b"absent", "AuditMode": b"\0"}
    modes = [name for name in absent if (k.efi_read(name, EFI_GLOBAL) or (0, absent[name]))[1] != b"\0"]
    if "SetupMode" in modes:
        # systemd-boot on the medium offers its keys in its menu; that is shown only if somebody asks for it.
        with contextlib.suppress(OSError):
            k.efi_write("LoaderConfigTimeoutOneShot", LOADER_GUID, "60\0".encode("utf-16-le"))
    demand(k, "SB-MODE", expected="user mode", seen=", ".join(modes) or "user mode")
    secure_boot = k.efi_read("SecureBoot", EFI_GLOBAL)
    demand(k, "SB-OFF", expected="on", seen="on" if secure_boot and secure_boot[1] == b"\1" else "off")


def _check_trusted_keys(k: Machine, policy: Policy) -> None:
    """See that the firmware's db and the kernel's keyrings hold what the build listed, nothing of shim."""
    shim = [name for name in k.names(EFIVARS) if name.endswith(SHIM_GUID) and name not in SHIM_HARMLESS]
    for name in shim:
        with contextlib.suppress(OSError):
            k.efi_write(name.removesuffix(f"-{SHIM_GUID}"), SHIM_GUID, b"")
    demand(k, "SB-MOK", expected="none", seen=", ".join(shim) or "none")
    try:
        db = parse_signature_database((k.efi_read("db", EFI_IMAGE_SECURITY) or (0, b""))[1])
    except (ValueError, struct.error) as error:
        raise Refused("SB-DB", expected=_words(policy.db), seen=str(error)) from error
    demand_same(k, "SB-DB", "", expected=policy.db, seen=db)
    # Only the key id counts: the words before it are the certificate's own and anybody can choose them.
    for ring, listed in ((".platform", policy.platform), (".machine", ())):
        keys = [description.rpartition(": ")[2] for description in k.keyring(ring) or ()]
        demand_same(k, "SB-KEYRING", f"{ring} ", expected=listed, seen=keys)


def demand_same(k: Machine, check: str, name: str, *, expected: Sequence[str], seen: Sequence[str]) -> None:
    """Note the check if both hold the same items, each as often, in any order; refuse the boot if not."""
    # The items decide, not the words for people, which leave out what is too much for a screen.
    if sorted(seen) != sorted(expected):
        raise Refused(check, expected=name + _words(expected), seen=name + _words(seen))
    k.report.passed(check, name + _words(expected), name + _words(seen))


def _words(items: Sequence[str]) -> str:
    shown = sorted(items)[:8]
    return ", ".join(shown + [f"and {len(items) - 8} more"] * (len(items) > 8)) or "empty"


def _check_tpm(k: Machine) -> None:
    """See that there is a TPM 2.0 whose SHA-256 bank got this boot's measurements, and no others."""
    major = k.read(f"{TPM_SYSFS}/tpm_version_major") if k.exists(TPM_SYSFS) else b"no TPM"
    demand(k, "TPM-ABSENT", expected="TPM 2", seen=f"TPM {major.decode().strip()}")
    with refusing("TPM-BANK", "a SHA-256 bank"):
        value = read_pcr(k, MEASURED)
    seen = "nothing into PCR 11" if value in (bytes(32), b"\xff" * 32) else "measured into PCR 11"
    demand(k, "TPM-BANK", expected="measured into PCR 11", seen=seen)


def _check_nothing_extra(k: Machine) -> None:
    """See that the stub took nothing from beside the UKI: no credential, extension, add-on, command line."""
    signed = ("os-release", APPROVAL_FILE.rpartition("/")[2])
    extra = [f"/.extra/{name}" for name in k.names("/.extra") if name not in signed]
    extra += [f"PCR {pcr}" for pcr in EXTRA_PCRS if any(read_pcr(k, pcr))]
    demand(k, "ESP-EXTRA", expected="nothing", seen=", ".join(extra) or "nothing")


@stage
def measure(k: Machine) -> None:
    """Extend PCR 11 with the phase that approvals are made for."""
    with refusing("TPM-EXTEND", "the TPM to take a measurement"):
        extend_pcr(k, MEASURED, ENTER_INITRD)


class BootDisk(NamedTuple):
    """The disk that the stub was loaded from, by its name in /sys/block, and its partition table."""

    name: str
    partitions: tuple[Partition, ...]

    def find(self, kind: str, name: str = "") -> list[Partition]:
        """Return the partitions of that type and, if one is given, name."""
        return [each for each in self.partitions if each.kind == kind and name in ("", each.name)]


@stage
def find_disk(k: Machine) -> BootDisk:
    """Wait for the disk with the partition that the stub was started from."""
    hint = k.efi_read("LoaderDevicePartUUID", LOADER_GUID)
    if hint is None or hint[0] & EFI_NON_VOLATILE:
        with contextlib.suppress(OSError):
            k.efi_write("LoaderDevicePartUUID", LOADER_GUID, b"")
        seen = "not set" if hint is None else "a stored variable, which anybody may have written"
        raise Refused("DISK-HINT", expected="LoaderDevicePartUUID of this boot", seen=seen)
    wanted = hint[1].decode("utf-16-le", errors="replace").rstrip("\0").lower()
    if not UUID.fullmatch(wanted):
        raise Refused("DISK-HINT", expected="a partition's uuid", seen=repr(wanted[:80]))
    deadline = k.monotonic() + DISK_SECONDS
    found, others = _scan_disks(k, wanted)
    while not found and k.monotonic() <= deadline:
        k.sleep(0.02)
        found, others = _scan_disks(k, wanted)
    if not found:
        seen = "; ".join(others) or "no disk"
        raise Refused("DISK-ABSENT", expected=f"a disk with partition {wanted}", seen=seen)
    twins = " and ".join(disk.name for disk in found[1:])
    demand(k, "DISK-AMBIGUOUS", expected="on one disk", seen=f"on {twins} too" if twins else "on one disk")
    return found[0]


def _scan_disks(k: Machine, wanted: str) -> tuple[list[BootDisk], list[str]]:
    """Return the disks with an EFI system partition of that id, and what was seen on the others."""
    found, others = [], []
    for name in k.names("/sys/block"):
        if name.startswith(("loop", "ram", "zram", "dm-", "md", "fd", "mtd")):
            continue
        try:
            partitions = _read_gpt(k, name)
        except (OSError, Refused) as error:
            others.append(f"{name}: {error}")
            continue
        if any(partition.kind == ESP_TYPE and partition.uuid == wanted for partition in partitions):
            found.append(BootDisk(name, partitions))
        else:
            others.append(f"{name}: {len(partitions)} other partitions")
    return found, others


def _read_gpt(k: Machine, name: str) -> tuple[Partition, ...]:
    fd = k.open_device(f"/dev/{name}")
    try:
        size, sector = k.device_size(fd)
        if size < MIB or sector not in (512, 4096):
            raise OSError(errno.ENOMEDIUM, f"{size} bytes in sectors of {sector}")
        header, entries = k.read_at(fd, sector, sector), k.read_at(fd, 2 * sector, 128 * _GPT_ENTRY.size)
        return parse_gpt(header, entries, sector, size // sector)
    finally:
        k.close(fd)


def open_partition(k: Machine, disk: BootDisk, kind: str, name: str = "") -> tuple[int, Partition]:
    """Open the one partition of that type (and name) on the boot disk, where kernel and table agree."""
    partition = only(disk.find(kind, name), "DISK-PARTITION", f"one partition of type {kind} {name}".strip())
    expected = f"partition {partition.number} of {partition.size} bytes at {partition.start}"
    for name in k.names(f"/sys/block/{disk.name}"):
        folder = f"/sys/block/{disk.name}/{name}"
        if not k.exists(f"{folder}/partition"):
            continue
        with refusing("DISK-PARTITION", expected):
            files = ("partition", "start", "size")
            number, start, size = (int(k.read(f"{folder}/{file}", 64)) for file in files)
        if number == partition.number:
            seen = f"partition {number} of {size * 512} bytes at {start * 512}"
            demand(k, "DISK-PARTITION", expected=expected, seen=seen)
            with refusing("DISK-PARTITION", expected):
                return k.open_device(f"/dev/{name}"), partition
    raise Refused("DISK-PARTITION", expected=expected, seen="a disk without it")


class Verity(NamedTuple):
    """An active dm-verity device and what it takes to load its table again."""

    name: str
    path: str
    data_blocks: int
    parameters: str  # up to the optional ones
    signature: bytes


def activate_verity(
    k: Machine, name: str, device: str, data_blocks: int, root_hash: str, salt: str, signature: bytes,
    check: str,
) -> Verity:  # fmt: skip
    """Make a dm-verity device whose root hash the kernel itself checked, or refuse by `check`.

    `device` is MAJOR:MINOR and holds data, one block of superblock, and the tree.
    """
    places = f"1 {device} {device} {BLOCK} {BLOCK} {data_blocks} {data_blocks + 1}"
    parameters = f"{places} sha256 {root_hash} {salt or '-'}"
    path = ""
    try:
        path = k.dm(DmCommand.DEV_CREATE, name)
        verity = Verity(name, path, data_blocks, parameters, signature)
        load_verity_table(k, verity)
        k.dm(DmCommand.DEV_SUSPEND, name)  # without the suspend flag: resume
    except OSError as error:
        if path:
            k.dm(DmCommand.DEV_REMOVE, name)
        seen = f"{error.strerror or error} for {name}"
        raise Refused(check, expected="a root hash signed by the layer key", seen=seen) from error
    k.report.passed(check, "a root hash signed by the layer key", f"{root_hash} of {name}")
    return verity


def load_verity_table(k: Machine, verity: Verity, *extra: str) -> None:
    """Load a verity table with its signature, which the kernel checks against its platform keyring."""
    key = f"mosinit:{verity.name}"
    options = ("root_hash_sig_key_desc", key, *extra)
    k.add_key(key, verity.signature)
    try:
        words = f"{verity.parameters} {len(options)} {' '.join(options)}"
        table = (verity.data_blocks * (BLOCK // 512), "verity", words)
        k.dm(DmCommand.TABLE_LOAD, verity.name, DM_READONLY, table)
    finally:
        k.clear_keys()


class Config(NamedTuple):
    """The config volume before it is opened: the descriptor that all of this was read from, and its key."""

    fd: int
    header: LuksHeader
    secret: bytearray


@stage
def unlock(k: Machine, disk: BootDisk, policy: Policy, owned: contextlib.ExitStack) -> Config | None:
    """Have the TPM give config's secret to the machine and volume of the record, and raise its epoch.

    None in live mode, which no approval lets unseal. What is to be wiped and closed goes to `owned`.
    """
    if policy.mode != "run":
        return None
    fd, _ = open_partition(k, disk, CONFIG_TYPE)
    owned.callback(k.close, fd)
    header, ours = read_luks_header(k, fd, "config"), policy.organisation
    k.report.passed("LUKS-HEADER", "a header as mosinit makes it", header.note or header.uuid)
    tokens = cast(Tokens, header.tokens)
    record = verify_record(tokens.record, ours["sudi-ca.pem"], policy.product)
    order = (tokens.order_statement, tokens.order_signature, tokens.order_certificate)
    epoch = verify_epoch_order(*order, policy)
    with refusing("TPM-APPROVAL", "an approval of this UKI"):
        approval = parse_uki_approval(k.read(APPROVAL_FILE))
    keys = policy_keys(ours["pcr.pub"], ours["platform.pub"])
    storage_key = check_tpm(k, record, policy.epoch)
    secret = unseal(k, tokens, storage_key, keys, approval)
    owned.callback(wipe, secret)
    check_secret(record, secret)
    for check in ("RECORD-SIGNATURE", "EPOCH-ORDER", "TPM-POLICY", "VOLUME-IDENTITY"):
        k.report.passed(check, "valid", "valid")
    raise_epoch(k, tokens, storage_key, keys, approval, min(epoch, policy.epoch))
    return Config(fd, header, secret)


class Volumes(NamedTuple):
    """What was opened: verity devices, folders that the new root gets, devices of encrypted volumes."""

    verity: tuple[Verity, ...]
    folders: tuple[str, ...]
    opened: Mapping[str, str]


@stage
def open_volumes(k: Machine, disk: BootDisk, config: Config | None, owned: contextlib.ExitStack) -> Volumes:
    """Open what this system runs from: the machine's encrypted volumes, or the medium's sealed store."""
    if config is None:
        store = open_live_store(k, disk)
        k.mount("tmpfs", SCRATCH, "tmpfs", SAFE, "mode=0700")
        return Volumes((store,), MOVED, {})
    opened = {"config": open_encrypted(k, config.fd, config.header, config.secret, "config")}
    opened["store"] = open_derived(k, disk, config.secret, "store", STORE_TYPE, owned)
    if disk.find(LINUX_TYPE, STATE):
        opened[STATE] = open_derived(k, disk, config.secret, STATE, LINUX_TYPE, owned, STATE)
    opened["scratch"] = make_scratch(k, disk, owned)
    services = derive_key(config.secret, "service")
    owned.callback(wipe, services)
    k.make_folder(LEFT)
    k.write(f"{LEFT}/volume-secret", services, 0o400)
    return Volumes((), (*MOVED, CONFIG), opened)


@stage
def mount_volumes(k: Machine, volumes: Volumes) -> None:
    """Mount what was opened, now that no secret is left in memory."""
    places = (("config", CONFIG, RO_STRICT), ("store", STORE, RO_STRICT), ("scratch", SCRATCH, SAFE))
    for name, target, flags in places if volumes.opened else ():  # live mode has none
        mount_ext4(k, volumes.opened[name], target, flags)


def open_derived(
    k: Machine, disk: BootDisk, secret: bytearray, purpose: str, kind: str, owned: contextlib.ExitStack,
    name: str = "",
) -> str:  # fmt: skip
    """Open a volume whose key follows from config's secret and return its device."""
    fd, partition = open_partition(k, disk, kind, name)
    owned.callback(k.close, fd)
    key = derive_key(secret, purpose, partition.uuid)
    owned.callback(wipe, key)
    return open_encrypted(k, fd, read_luks_header(k, fd, "plain"), key, purpose)


def open_encrypted(k: Machine, fd: int, header: LuksHeader, key: bytearray, purpose: str) -> str:
    """Open a volume by the header that was checked and the descriptor that it came from."""
    name = f"mosinit-{purpose}"
    # No name is looked up again: what the path leads to is the open device, whatever /dev now says.
    open_volume(k, header, f"/proc/self/fd/{fd}", key, name)
    k.report.passed("VOLUME-KEY", "opened by this machine's key", f"{purpose} {header.uuid}")
    return k.dm(DmCommand.DEV_STATUS, name)


# filesystems/ext4/super.rst: s_magic, s_errors, s_feature_incompat, s_journal_inum and _dev, s_mount_opts
_EXT4 = struct.Struct("<56xHxxH34xI124xII280x64s448x")
assert _EXT4.size == 1024


def mount_ext4(k: Machine, device: str, target: str, flags: MountFlag) -> None:
    """Mount the file system of a volume that this machine's key opened, if its journal lies in it.

    One on a disk in clear would be replayed into it: bytes that nobody vouches for.
    """
    with refusing("VOLUME-READ", f"an ext4 file system for {target}"):
        fd = k.open_device(device)
        *fields, options = _EXT4.unpack(k.read_at(fd, 1024, 1024))
        k.close(fd)
        magic, errors, incompatible, journal, elsewhere = fields
        # 3: EXT4_ERRORS_PANIC; 8: EXT4_FEATURE_INCOMPAT_JOURNAL_DEV, and the inode of a journal of its own
        odd = errors == 3 or incompatible & 8 or journal not in (0, 8) or elsewhere
        if magic != 0xEF53 or odd or any(options):
            raise OSError(errno.EINVAL, f"a superblock that says {fields}, {options.hex()[:32]}")
        k.mount(device, target, "ext4", flags)


def make_scratch(k: Machine, disk: BootDisk, owned: contextlib.ExitStack) -> str:
    """Make a fresh file system under a key that nobody will ever have again; return its device."""
    fd, partition = open_partition(k, disk, SCRATCH_TYPE)
    owned.callback(k.close, fd)
    name = "mosinit-scratch"
    words = f"{LUKS_CIPHER} :64:user:{name} 0 {k.device_number(fd)} 0 2 sector_size:{BLOCK} iv_large_sectors"
    with refusing("VOLUME-READ", "a fresh scratch volume"):
        path = k.dm(DmCommand.DEV_CREATE, name)
        k.add_key(name, k.random(64))
        try:
            k.dm(DmCommand.TABLE_LOAD, name, 0, (partition.size // BLOCK * 8, "crypt", words))
        finally:
            k.clear_keys()
        k.dm(DmCommand.DEV_SUSPEND, name)  # without the suspend flag: resume
        k.format_ext4(path)
    return path


def open_live_store(k: Machine, disk: BootDisk) -> Verity:
    """Mount the medium's store: one erofs image under verity, its root hash signed by the layer key."""
    seal_fd, partition = open_partition(k, disk, LIVE_SEAL_TYPE)
    with refusing("STORE-SEAL", "a readable seal"):
        seal = parse_live_seal(k.read_at(seal_fd, 0, min(partition.size, 16384)))
    k.close(seal_fd)
    store_fd, partition = open_partition(k, disk, LIVE_STORE_TYPE)
    needed = (seal.data_blocks + 1 + verity_tree_blocks(seal.data_blocks)) * BLOCK
    if needed > partition.size:
        expected = f"a store within {partition.size} bytes"
        raise Refused("STORE-SEAL", expected=expected, seen=f"{needed} bytes")
    # The descriptor stays open: its device number cannot pass to another disk before device-mapper holds it.
    device, salt = k.device_number(store_fd), live_store_salt(seal.data_blocks)
    sealed = (seal.data_blocks, seal.root_hash, salt, seal.signature)
    verity = activate_verity(k, "mosinit-store", device, *sealed, "STORE-SIGNATURE")
    with refusing("STORE-READ", "an erofs file system"):
        k.mount(verity.path, STORE, "erofs", RO_STRICT)
    return verity


def blob_path(digest: str) -> str:
    """Return where the store keeps a blob; `digest` has passed DIGEST."""
    return f"{STORE}/{REPOSITORY}/blobs/sha256/{digest.removeprefix('sha256:')}"


def read_blob(k: Machine, digest: str, size: int, check: str) -> bytes:
    """Return a small blob of the store if it is exactly what digest and size say, or else `check`."""
    if size > 4 * MIB:
        raise Refused(check, expected="at most 4 MiB", seen=f"{size} bytes")
    with refusing("STORE-BLOB", f"blob {digest}"):
        untrusted = k.read(blob_path(digest), 4 * MIB)
    seen = "sha256:" + hashlib.sha256(untrusted).hexdigest()
    if (seen, len(untrusted)) != (digest, size):
        raise Refused(check, expected=f"{digest}, {size} bytes", seen=f"{seen}, {len(untrusted)} bytes")
    return untrusted


def find_release(k: Machine) -> dict[str, Descriptor]:
    """Return the install artefact of the store's one release: descriptors by media type."""
    with refusing("MANIFEST-ABSENT", "a release"):
        data = k.read(f"{STORE}/{REPOSITORY}/index.json")
    _, releases = parse_descriptors(data, "manifests", "MANIFEST-ABSENT")
    release = only(releases, "MANIFEST-ABSENT", "one release")
    data = read_blob(k, release.digest, release.size, "MANIFEST-ABSENT")
    _, images = parse_descriptors(data, "manifests", "MANIFEST-ABSENT")
    artefacts = [image for image in images if image.artifact_type == RELEASE_ARTIFACT]
    artefact = only(artefacts, "MANIFEST-ABSENT", "one install artefact")
    data = read_blob(k, artefact.digest, artefact.size, "MANIFEST-ABSENT")
    _, parts = parse_descriptors(data, "layers", "MANIFEST-ABSENT")
    return {part.media_type: part for part in reversed(parts)}


def verify_release(k: Machine, policy: Policy) -> Manifest:
    """Return the install manifest of the store's one release: signature, chain, product, epoch hold."""
    release = find_release(k)
    blobs = []
    for kind in (MANIFEST_MEDIA_TYPE, SIGNATURE_MEDIA_TYPE, CERTIFICATE_MEDIA_TYPE):
        if kind not in release:
            raise Refused("MANIFEST-ABSENT", expected=kind, seen=", ".join(release))
        blobs.append(read_blob(k, release[kind].digest, release[kind].size, "MANIFEST-ABSENT"))
    manifest = verify_manifest(blobs[0], blobs[1], blobs[2], policy)
    k.report.facts["sequence"] = manifest.contents.sequence
    return manifest


@stage
def load_manifest(k: Machine, policy: Policy, volumes: Volumes) -> Manifest:
    """Verify what is to run: a generation of this machine, or the release of the live medium."""
    manifest = (pick_generation if policy.mode == "run" else verify_release)(k, policy)
    contents = manifest.contents
    # Whoever took the volume away would have the machine begin anew with an empty /var.
    wanted = STATE in {each.label for each in contents.storage} or k.exists(STATE_MARK)
    if policy.mode == "run" and wanted and STATE not in volumes.opened:
        raise Refused("VOLUME-STATE", expected="a volume `state`, as manifest or machine say", seen="none")
    k.report.facts["manifest"] = manifest.sha256
    for check in ("MANIFEST-CERTIFICATE", "MANIFEST-CHAIN", "MANIFEST-SIGNATURE", "MANIFEST-FORMAT"):
        k.report.passed(check, "valid", manifest.sha256)
    k.report.passed("MANIFEST-PRODUCT", policy.product, contents.product)
    k.report.passed("MANIFEST-EPOCH", f"epoch {policy.epoch} or later", f"epoch {contents.epoch}")
    return manifest


def boot_targets(contents: Contents) -> tuple[Target, Target]:
    """Return the two targets that a machine starts from: hostfs and bootkit."""
    found = [[t for t in contents.targets if t.service_type == kind] for kind in ("hostfs", "bootkit")]
    if [len(targets) for targets in found] != [1, 1]:
        seen = ", ".join(f"{target.service_name} ({target.service_type})" for target in contents.targets)
        raise Refused("MANIFEST-TARGET", expected="one hostfs and one bootkit", seen=seen or "no targets")
    return found[0][0], found[1][0]


MAX_LOWERS = 499  # linux/fs/overlayfs/params.h, OVL_MAX_STACK, less one for `lay_state`


def check_lowers(layers: int) -> None:
    """Refuse more layers of hostfs and bootkit than one overlay takes."""
    if layers > MAX_LOWERS:
        expected = f"at most {MAX_LOWERS} layers of hostfs and bootkit together"
        raise Refused("OVERLAY-MOUNT", expected=expected, seen=str(layers))


class Mounted(NamedTuple):
    """The verified layers that make the root, uppermost first, and their verity devices."""

    folders: tuple[str, ...]
    devices: tuple[Verity, ...]
    writable: str


@stage
def mount_layers(k: Machine, manifest: Manifest, policy: Policy) -> Mounted:
    """Mount each layer of hostfs and, below them, the kernel's modules from the bootkit."""
    hostfs, bootkit = boot_targets(manifest.contents)
    folders: list[str] = []
    devices: list[Verity] = []
    for target in (hostfs, bootkit):
        image = parse_image(read_blob(k, target.digest, target.size, "IMAGE-DIGEST"))
        if target is bootkit:
            demand(k, "MANIFEST-UKI", expected=policy.uki_id, seen=str(image.uki_ids.get(policy.mode)))
        if len(image.layers) != len(target.layer_signatures):
            seen = f"{len(target.layer_signatures)} for {len(image.layers)} layers of {target.service_name}"
            raise Refused("LAYER-SIGNATURE", expected="a signature for each layer", seen=seen)
        k.report.passed("IMAGE-DIGEST", target.digest, target.digest)
        check_lowers(len(folders) + len(image.layers))
        # The last layer of an image is its uppermost.
        for index in range(len(image.layers) - 1, -1, -1):
            name = f"mosinit-{target.service_name}-{index}"
            device = open_layer(k, name, image.layers[index], target.layer_signatures[index])
            folders.append(mount_layer(k, device))
            devices.append(device)
    return Mounted(tuple(folders), tuple(devices), hostfs.writable or "all")


def open_layer(k: Machine, name: str, layer: Layer, signature_digest: str) -> Verity:
    """Set up loop and dm-verity for one layer of the store; only the salt is taken from the layer itself."""
    with refusing("STORE-BLOB", f"blob {signature_digest}"):
        signature = k.read(blob_path(signature_digest), 16384)
    if "sha256:" + hashlib.sha256(signature).hexdigest() != signature_digest:
        raise Refused("LAYER-SIGNATURE", expected=signature_digest, seen=f"another blob for {name}")
    with refusing("STORE-BLOB", f"blob {layer.digest}"):
        loop, size = k.attach_loop(blob_path(layer.digest))
    if size != layer.size:
        raise Refused("LAYER-SIZE", expected=f"{layer.size} bytes", seen=f"{size} bytes in {layer.digest}")
    blocks = verity_data_blocks(size)
    with refusing("LAYER-READ", "a readable verity superblock"):
        salt = parse_verity_salt(k.read_at(loop, blocks * BLOCK, 512), blocks)
    device = k.device_number(loop)
    verity = activate_verity(k, name, device, blocks, layer.root_hash, salt, signature, "LAYER-SIGNATURE")
    k.close(loop)
    return verity


def find_filesystem(head: bytes, name: str) -> str:
    """Return the type of the file system that begins with these bytes, if it is one that layers may have."""
    if head[1024:1028] == struct.pack("<I", 0xE0F5E1E2):  # linux/magic.h, EROFS_SUPER_MAGIC_V1
        return "erofs"
    if head[:4] == b"hsqs":  # linux/magic.h, SQUASHFS_MAGIC
        return "squashfs"
    raise Refused("LAYER-FILESYSTEM", expected="erofs or squashfs", seen=f"{head[:4].hex()} in {name}")


def mount_layer(k: Machine, device: Verity) -> str:
    """Mount a layer read-only where nobody but the overlay will see it."""
    with refusing("LAYER-READ", "blocks that fit the root hash"):
        fd = k.open_device(device.path)
        head = k.read_at(fd, 0, BLOCK)
        k.close(fd)
    fstype = find_filesystem(head, device.name)
    folder = f"/run/mosinit/layers/{device.name}"
    k.make_folder(folder, 0o700)
    with refusing("LAYER-READ", f"{fstype} in {device.name}"):
        k.mount(device.path, folder, fstype, MountFlag.RDONLY)
    return folder


class Overlay(NamedTuple):
    """One overlay mount of the plan; without `upper` it is read-only."""

    target: str
    lowers: tuple[str, ...]
    upper: str


def plan_root(layers: tuple[str, ...], writable: str) -> list[Overlay]:
    """Return the overlays that make the root: a writable layer over all of it, over /etc, or none."""
    if writable == "all":
        return [Overlay(SYSROOT, layers, f"{SCRATCH}/root")]
    root = Overlay(SYSROOT, layers, "")
    etc = Overlay(f"{SYSROOT}/etc", (f"{SYSROOT}/etc",), f"{SCRATCH}/etc")
    return [root, etc] if writable == "etc" else [root]


def lay_state(k: Machine) -> tuple[str, ...]:
    """Lay what the config volume keeps for the root into a layer of its own, in memory, and return it."""
    kept = [path for path in KEPT if k.exists(f"{CONFIG}/state/{path}")]
    if not kept:
        return ()
    folder = f"{LEFT}/layers/state"
    k.make_folder(folder, 0o700)
    k.mount("tmpfs", folder, "tmpfs", SAFE, "mode=0755,size=1m")
    with refusing("VOLUME-READ", "what is kept in /config/state"):
        for path in kept:
            k.make_folder(os.path.dirname(f"{folder}/{path}"))
            k.write(f"{folder}/{path}", k.read(f"{CONFIG}/state/{path}", 16384), KEPT[path])
    return (folder,)


@stage
def stack(k: Machine, layers: Mounted) -> str:
    """Stack the verified layers under a fresh writable one and return the init of the result."""
    folders = (*lay_state(k), *layers.folders)
    for overlay in plan_root(folders, layers.writable):
        # Nothing in a layer may redirect to data of another place than its own.
        options = {"redirect_dir": "nofollow", "metacopy": "off", "index": "off", "xino": "off"}
        if overlay.upper:
            options |= {"upperdir": f"{overlay.upper}/upper", "workdir": f"{overlay.upper}/work"}
            for folder in ("upper", "work"):
                k.make_folder(f"{overlay.upper}/{folder}")
        with refusing("OVERLAY-MOUNT", f"{len(overlay.lowers)} layers on {overlay.target}"):
            k.mount_overlay(overlay.target, overlay.lowers, options, read_only=not overlay.upper)
    for folder in folders:
        k.unmount(folder, lazy=True)
    return find_init(k)


def find_init(k: Machine) -> str:
    """Return the path of hostfs's init: a program that can be executed, its interpreter too."""
    with refusing("LAYER-READ", "a readable hostfs"):
        for path in DEFAULT_INITS:
            if _is_program(k, path):
                k.report.passed("HOSTFS-INIT", "a program", path)
                return path
    raise Refused("HOSTFS-INIT", expected=f"a program at {' or '.join(DEFAULT_INITS)}", seen="none")


def _is_program(k: Machine, path: str) -> bool:
    found = k.read_in_root(SYSROOT, path, BLOCK)
    if found is None or not stat.S_ISREG(found[0]) or not found[0] & 0o111:
        return False
    interpreter = find_interpreter(found[1])
    return interpreter == "" or bool(interpreter and k.read_in_root(SYSROOT, interpreter, 4))


def find_interpreter(head: bytes) -> str | None:
    """Return what the kernel starts a program with: "" for a static one, None for no program of x86-64."""
    if head.startswith(b"#!"):
        words = head[2:].split(b"\n")[0].split()
        return words[0].decode(errors="replace") if words else None
    try:
        # elf(5), Elf64_Ehdr
        magic, machine, table, size, count = struct.unpack_from("<4s14xH12xQ14xHH", head)
        if (magic, machine, size) != (b"\x7fELF", 62, 56):
            return None
        for number in range(count):
            kind, offset, length = struct.unpack_from("<I4xQ16xQ", head, table + number * size)  # Elf64_Phdr
            if kind == 3:  # PT_INTERP
                return head[offset : offset + length].rstrip(b"\0").decode(errors="replace")
    except struct.error:
        return None
    return ""


@stage
def prepare_root(k: Machine, volumes: Volumes, layers: Sequence[Verity]) -> None:
    """Make the new root ready: mount points, the volume `state`, restart on corruption, no kexec."""
    for folder in (*volumes.folders, *(["/var"] if STATE in volumes.opened else [])):
        with refusing("OVERLAY-MOUNTPOINT", f"the folder {folder} in hostfs"):
            if not k.is_folder(SYSROOT + folder):
                k.make_folder(SYSROOT + folder)
        seen = folder if k.is_folder(SYSROOT + folder) else "a link"
        demand(k, "OVERLAY-MOUNTPOINT", expected=folder, seen=seen)
    if STATE in volumes.opened:
        mount_ext4(k, volumes.opened[STATE], f"{SYSROOT}/var", MountFlag.NOSUID | MountFlag.NODEV)

    def swap(device: Verity) -> None:
        with refusing("LAYER-SIGNATURE", f"{device.name} to take its table again"):
            # Nothing is frozen for it: these devices are read-only, so there is nothing to be written back.
            k.dm(DmCommand.DEV_SUSPEND, device.name, DM_SKIP_LOCKFS)

    # From here a corrupt block is somebody's attack on a running system, or a dying disk: nothing may go on
    # with it. What the bring-up itself reads is refused at the next boot; the rest restarts again.
    devices = (*volumes.verity, *layers)
    for device in devices:
        with refusing("LAYER-SIGNATURE", f"{device.name} to load its table again"):
            load_verity_table(k, device, "restart_on_corruption")
    # A swap waits until no CPU is left in the old table; tables are each device's own: wait together.
    in_parallel(swap, devices)
    k.write("/proc/sys/kernel/kexec_load_disabled", b"1")


def hand_over(k: Machine, policy: Policy, folders: Sequence[str], init: str) -> NoReturn:
    """Leave the report and what is public of the keyset, free the initramfs, become hostfs's init."""
    k.report.facts["previous_refusal"] = read_refusal(k)
    document = json.dumps(k.report.document("pivoted"))
    k.make_folder(f"{LEFT}/organisation")
    k.write(f"{LEFT}/report.json", document.encode() + b"\n")
    k.write(f"{LEFT}/policy.json", k.read(f"{POLICY_FOLDER}/policy.json"))
    for name, content in policy.organisation.items():
        k.write(f"{LEFT}/organisation/{name}", content)
    if policy.mode == "live":
        k.print("mosinit: live: nothing of an installed system was opened, nothing written here survives\n")
    for folder in folders:
        k.mount(folder, SYSROOT + folder, "", MountFlag.MOVE)
    k.free_initramfs()
    k.enter_root(SYSROOT)
    # Nothing that can fail is left but the kernel's own loading of a program that was looked at.
    if k.report.facts["previous_refusal"]:
        with contextlib.suppress(OSError):
            k.efi_write(REFUSAL_VARIABLE, OUR_GUID, b"")
    k.quiet_kernel(1)
    k.print(f"\nmosinit-report: {document}\n")
    k.quiet_kernel(4)
    k.become(init)


# --- The boot, and the one way out -------------------------------------------------------------------------


def boot(k: Machine) -> NoReturn:
    """Bring this machine up, or raise."""
    k.print("mosinit: start\n")
    policy = set_up(k)
    _thread.start_new_thread(import_ahead, ())
    load_modules(k, policy)
    with contextlib.ExitStack() as owned:  # secrets are wiped at its end, however that comes
        try:
            check_firmware(k, policy)
            measure(k)
            disk = find_disk(k)
            config = unlock(k, disk, policy, owned)
        finally:
            fence(k)  # from here nobody can unseal, we included
        volumes = open_volumes(k, disk, config, owned)
    mount_volumes(k, volumes)
    manifest = load_manifest(k, policy, volumes)
    layers = mount_layers(k, manifest, policy)
    init = stack(k, layers)
    prepare_root(k, volumes, layers.devices)
    hand_over(k, policy, volumes.folders, init)


REFUSAL_VARIABLE = "MosinitRefusal"
FIRST_WAIT, LONGEST_WAIT = 10, 600


_WORD = re.compile(r"[\w-]{1,64}")
_REFUSAL = {
    "id": _WORD, "uki": _WORD, "count": range(1, 65),
    "sequence": lambda value: value is None or type(value) is int,
}  # fmt: skip


def read_refusal(k: Machine) -> dict[str, object] | None:
    """Return what the last refused boot left. Anybody can write it: it is shown and counts a wait."""
    with contextlib.suppress(OSError, Refused):
        _, untrusted = k.efi_read(REFUSAL_VARIABLE, OUR_GUID) or (0, b"")
        raw = parse_json(untrusted if len(untrusted) <= 1024 else b"", "")
        match(raw, _REFUSAL, "", "")
        return cast(dict[str, object], raw)
    return None


def count_refusal(k: Machine, report: Mapping[str, object]) -> int:
    """Note this refusal in the firmware and return how many there were in a row."""
    same = {"id": report["failed"] or "crash", "sequence": report["sequence"], "uki": report.get("uki_id")}
    last = read_refusal(k)
    count = 1 + cast(int, last["count"]) if last and {key: last[key] for key in same} == same else 1
    # The wait grows no more after seven, and flash wears: then the variable stays as it is.
    if count <= 7:
        with contextlib.suppress(OSError):
            k.efi_write(REFUSAL_VARIABLE, OUR_GUID, json.dumps({**same, "count": count}).encode()[:1024])
    return count


def screen(report: Mapping[str, object], error: BaseException) -> str:
    """Return the one screen that says what was refused and what to do."""
    stages = cast(list[dict[str, object]], report["stages"])
    rows = [("stage", str(stages[-1]["name"]) if stages else "start")]
    if isinstance(error, Refused):
        check = CHECKS[error.check]
        rows = [("check", error.check), ("", check.title), *rows]
        rows += [("expected", error.expected), ("seen", error.seen), ("what to do", check.remedy)]
    else:
        rows.append(("crash", f"{type(error).__name__}: {error}"))
        rows.append(("what to do", "this is a fault of mosinit: report it"))
    uki = str(report.get("uki_id"))[:16]
    facts = ("system", f"UKI {uki}, manifest sequence {report['sequence']}, mode {report['mode']}")
    rows = [(name, "".join(c if c.isprintable() else "?" for c in text)) for name, text in (*rows, facts)]
    lines, bar = [f"  {name:<12}{text[:600]}" for name, text in rows], "=" * 78
    return "\n".join(["", bar, "  mosinit does not start this machine", bar, *lines, bar, ""])


def tell(k: Machine, error: BaseException) -> int:
    """Say on console, screen and log why this machine does not start; return the seconds to wait."""
    if isinstance(error, Refused):
        report = k.report.document("refused", error)
    else:
        crash = f"{type(error).__name__}: {error} {_where(error)}"[:1000]
        report = {**k.report.document("crashed"), "crash": crash}
    k.log(str(error))
    k.quiet_kernel(1)
    k.print(screen(report, error))
    k.print(f"\nmosinit-report: {json.dumps(report)}\n")
    return min(LONGEST_WAIT, FIRST_WAIT << count_refusal(k, report) - 1)


def _where(error: BaseException) -> str:
    """Return the lines of this file that led to a crash."""
    trace, lines = error.__traceback__, []
    while trace is not None:
        lines.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " > ".join(lines)


def give_up(k: Machine, error: BaseException) -> NoReturn:
    """Take the one way out: fence, tell, wait, restart; without a fence, power off."""
    leave, words, longest = k.restart, "restart", LONGEST_WAIT
    try:
        try:
            fence(k)
        except BaseException as failure:
            leave, words, longest, error = k.power_off, "power off", FIRST_WAIT, failure
        for left in range(min(tell(k, error), longest), 0, -1):
            k.feed_watchdog()
            k.print(f"\rmosinit: {words} in {left} s  ")
            k.sleep(1)
    finally:
        leave()


def main() -> NoReturn:
    """Be PID 1. Arguments and environment are whatever the kernel was told: neither is looked at."""
    os.environ.clear()
    k = Machine()
    try:
        boot(k)
    except BaseException as error:  # PID 1 must not end: whatever happened, the way out is the same
        give_up(k, error)


if __name__ == "__main__":
    main()
