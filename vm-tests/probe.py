"""Runs as root in a hostfs: tries what must not go, and says how each attempt ended, in one line of JSON.

An attempt ends with "done" or a value, or with the name of what refused it. Beside those that must be
refused stand others like them that must be done: they show that the means work.
"""

from __future__ import annotations

import base64
import ctypes
import enum
import errno
import fcntl
import json
import lzma
import os
import pwd
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, "/usr/lib/mosinit")
from mosinit import init, installed
from mosinit.generations import Quiet

HERE = Path("/usr/lib/probe")
EVENT_LOG = Path("/sys/kernel/security/tpm0/binary_bios_measurements")
PORT = "/dev/virtio-ports/org.mosinit.exchange"
PROBES: dict[str, Callable[[], object]] = {}
LIBC = ctypes.CDLL(None, use_errno=True)
# arch/x86/entry/syscalls/syscall_64.tbl
ADD_KEY, DELETE_MODULE, IOPL, KEXEC_LOAD, KEYCTL = 248, 176, 172, 246, 250
FINIT_MODULE, KEXEC_FILE_LOAD, BPF = 313, 320, 321
REMOUNT = installed.REMOUNT
FREE = init.MountFlag(0)


class Cc(enum.IntEnum):
    """Commands that the bring-up does not use: TPM 2.0 library, part 2, 6.5.2."""

    NV_UNDEFINE = 0x122
    CLEAR = 0x126
    PCR_RESET = 0x13D


def probe(work: Callable[[], object]) -> Callable[[], object]:
    """Put an attempt into the list, under its name."""
    PROBES[work.__name__.replace("_", " ")] = work
    return work


def outcome(work: Callable[[], object]) -> object:
    """Say how an attempt ended."""
    try:
        value = work()
    except init.Refused as error:
        return f"{error.check}: {error.seen}"
    except init.TpmError as error:
        return f"{error.command.name} {error.code:#x}"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, repr(error))
    except Exception as error:
        return repr(error)
    return "done" if value is None else value


def syscall(number: int, *arguments: object) -> int:
    """Do a system call. Raises OSError."""
    result = int(LIBC.syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def run(*words: str) -> str:
    """Run a program and return what it printed; what its exit status says is left alone."""
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def write(path: str | Path, data: bytes) -> None:
    """Write to a file, whole and at once."""
    with held(path, os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, data)


def held(path: str | Path, flags: int) -> Any:
    """Open a file for the length of a block."""
    return init.held(os.open(path, flags | os.O_CLOEXEC, 0o600))


def read(path: str | Path, size: int = 16) -> None:
    """Read the beginning of a file."""
    with held(path, os.O_RDONLY) as fd:
        os.read(fd, size)


# --- TPM: what was sealed, after the fence ---------------------------------------------------------------

K = Quiet()
GIVEN = json.loads((HERE / "given.json").read_text())


def tokens() -> init.Tokens:
    """Return the machine's own tokens."""
    with installed.open_config(K) as (_, header):
        return cast(init.Tokens, header.tokens)


def unsealed() -> object:
    """Do just what the bring-up did."""
    ours = init.LEFT + "/organisation"
    keys = init.policy_keys(*(Path(ours, name).read_bytes() for name in ("pcr.pub", "platform.pub")))
    approval = init.parse_uki_approval(GIVEN["approval"].encode())
    key = cast(bytes, init.read_storage_key(K))
    return bytes(init.unseal(K, tokens(), key, keys, approval)).hex()


@probe
def unseal_as_the_bring_up_does() -> object:
    return unsealed()


@probe
def unseal_with_the_approval_of_the_time_before_the_fence() -> object:
    # The session's policy is checked by the TPM: here it is said that PCR 11 still is what was approved.
    real, before = init.read_pcr, bytes.fromhex(GIVEN["pcr11"])
    init.read_pcr = lambda k, pcr: before if pcr == init.MEASURED else real(k, pcr)
    try:
        return unsealed()
    finally:
        init.read_pcr = real


def loaded(work: Callable[[int, bytes], object]) -> object:
    """Do something with the sealed object, which anybody may load."""
    sealed = tokens()
    area = b"".join(
        struct.pack(">H", len(part)) + part for part in (sealed.seal_private, sealed.seal_public)
    )
    item = init.tpm(K, init.Cc.LOAD, [init.SRK], area, init.EMPTY_PASSWORD).number(4)
    try:
        return work(item, init.tpm_name(sealed.seal_public))
    finally:
        init.flush(K, item)


@probe
def unseal_without_a_policy() -> object:
    def work(item: int, name: bytes) -> object:
        session = init.Session(K, cast(bytes, init.read_storage_key(K)))
        try:
            return bytes(init.tpm_in(K, session, init.Cc.UNSEAL, [item], name)).hex()
        finally:
            init.flush(K, session.handle)

    return loaded(work)


@probe
def unseal_by_an_empty_password() -> object:
    return loaded(lambda item, _: init.tpm(K, init.Cc.UNSEAL, [item], b"", init.EMPTY_PASSWORD).rest().hex())


def tpm(command: int, handles: list[int], parameters: bytes = b"") -> None:
    """Do one command with an empty password."""
    init.tpm(K, cast(init.Cc, command), handles, parameters, init.EMPTY_PASSWORD)


@probe
def reset_PCR_16() -> None:
    tpm(Cc.PCR_RESET, [16])


@probe
def reset_PCR_11() -> None:
    tpm(Cc.PCR_RESET, [init.MEASURED])


@probe
def set_an_epoch_bit_as_the_index() -> None:
    tpm(init.Cc.NV_SETBITS, [init.EPOCH_INDEX, init.EPOCH_INDEX], struct.pack(">Q", 2))


@probe
def set_an_epoch_bit_as_the_owner() -> None:
    tpm(init.Cc.NV_SETBITS, [init.RH_OWNER, init.EPOCH_INDEX], struct.pack(">Q", 2))


@probe
def remove_the_epoch_index() -> None:
    tpm(Cc.NV_UNDEFINE, [init.RH_OWNER, init.EPOCH_INDEX])


@probe
def clear_the_TPM_as_the_platform() -> None:
    tpm(Cc.CLEAR, [0x4000000C])


@probe
def the_epoch() -> object:
    return init.read_epoch(K)


# --- Keys of the volumes ---------------------------------------------------------------------------------


def key_of(table: str) -> str:
    """Return the key in a line of `dmsetup table`."""
    words = table.split()
    return words[4] if words[2] == "crypt" else ""


@probe
def keys_of_the_volumes() -> object:
    lines = run("dmsetup", "table", "--showkeys").splitlines()
    return {
        name: key for line in lines for name, _, table in [line.partition(": ")] if (key := key_of(table))
    }


@probe
def the_key_of_a_volume_with_a_plain_key() -> object:
    with open("/run/probe.img", "wb") as file:
        file.truncate(init.MIB)
    loop = run("losetup", "--find", "--show", "/run/probe.img")
    table = f"0 8 crypt aes-xts-plain64 {'5a' * 64} 0 {loop} 0"
    subprocess.run(["dmsetup", "create", "probe", "--table", table], check=True)
    try:
        return key_of(run("dmsetup", "table", "--showkeys", "probe"))
    finally:
        run("dmsetup", "remove", "--retry", "probe")
        run("losetup", "--detach", loop)


def key_content(serial: int) -> str:
    """Read a key."""
    buffer = ctypes.create_string_buffer(4096)
    size = syscall(KEYCTL, init.KEYCTL_READ, serial, buffer, 4096)
    return buffer.raw[:size].hex()


@probe
def every_key_of_the_kernel() -> object:
    rows = []
    for line in Path("/proc/keys").read_text().splitlines():
        words = line.split()
        if words[7] not in ("keyring", "asymmetri", "asymmetric"):
            content = outcome(lambda serial=int(words[0], 16): key_content(serial))  # type: ignore[misc]
            rows.append([words[7], " ".join(words[8:]), content])
    return rows


def added_key(kind: bytes) -> object:
    """Give the kernel a key and ask for it back."""
    serial = syscall(ADD_KEY, kind, b"probe:key", b"content", 7, init.PROCESS_KEYRING)
    return key_content(serial)


@probe
def read_a_key_of_the_kind_user() -> object:
    return added_key(b"user")


@probe
def read_a_key_of_the_kind_logon() -> object:
    return added_key(b"logon")


# --- The kernel's memory, and other kernels ----------------------------------------------------------------


@probe
def read_kcore() -> None:
    read("/proc/kcore")


@probe
def read_dev_mem() -> None:
    read("/dev/mem")


@probe
def read_dev_port() -> None:
    read("/dev/port")


@probe
def raise_the_IO_privilege() -> None:
    syscall(IOPL, 3)


@probe
def write_to_the_space_of_a_PCI_device() -> None:
    path = min(Path("/sys/bus/pci/devices").iterdir()) / "config"
    write(path, path.read_bytes()[:4])


@probe
def write_to_debugfs() -> None:
    K.mount("debugfs", "/sys/kernel/debug", "debugfs", FREE)
    write("/sys/kernel/debug/clear_warn_once", b"1")


@probe
def what_could_trace_the_kernel() -> object:
    # It stays mounted: Debian's kernel 6.12 panics when a tracefs that lockdown left empty is unmounted.
    K.mount("tracefs", "/sys/kernel/tracing", "tracefs", FREE)
    return sorted(os.listdir("/sys/kernel/tracing"))


def bpf(*instructions: bytes) -> None:
    """Load a program of the kind that kprobes run (linux/bpf.h)."""
    code, licence = ctypes.create_string_buffer(b"".join(instructions)), ctypes.create_string_buffer(b"GPL")
    addresses = [ctypes.addressof(code), ctypes.addressof(licence)]
    attributes = struct.pack("<IIQQIIQII", 2, len(instructions), *addresses, 0, 0, 0, 0, 0).ljust(128, b"\0")
    os.close(syscall(BPF, 5, attributes, 128))


RETURN = (bytes.fromhex("b700000000000000"), bytes.fromhex("9500000000000000"))  # r0 = 0; exit


@probe
def load_a_BPF_program() -> None:
    bpf(*RETURN)


@probe
def load_a_BPF_program_that_reads_the_kernel() -> None:
    # r1 = r10; r1 += -8; r2 = 8; r3 = 0; call bpf_probe_read_kernel
    words = (
        "bfa1000000000000",
        "07010000f8ffffff",
        "b702000008000000",
        "b703000000000000",
        "8500000071000000",
    )
    bpf(*map(bytes.fromhex, words), *RETURN)


@probe
def hibernation() -> object:
    return Path("/sys/power/disk").read_text().strip()


@probe
def load_a_kernel_by_kexec_load() -> None:
    syscall(KEXEC_LOAD, 0, 0, None, 0)


@probe
def load_a_kernel_by_kexec_file_load() -> None:
    with held(sys.executable, os.O_RDONLY) as fd:
        syscall(KEXEC_FILE_LOAD, fd, -1, 0, None, 4)


@probe
def allow_kexec_again() -> None:
    write("/proc/sys/kernel/kexec_load_disabled", b"0")


# --- Modules ---------------------------------------------------------------------------------------------


def module() -> bytes:
    """Return a module of this kernel that nothing uses."""
    folder = Path("/usr/lib/modules", os.uname().release, "kernel/drivers/net")
    path = next(path for path in folder.iterdir() if path.name.startswith("dummy.ko"))
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def load_module(data: bytes) -> None:
    """Have the kernel load a module, and unload it."""
    with init.held(os.memfd_create("module")) as fd:
        os.write(fd, data)
        syscall(FINIT_MODULE, fd, b"", 0)
    syscall(DELETE_MODULE, b"dummy", 0)


@probe
def load_a_signed_module() -> None:
    load_module(module())


@probe
def load_an_unsigned_module() -> None:
    # linux/module_signature.h
    magic, data = b"~Module signature appended~\n", module()
    assert data.endswith(magic)
    size = int.from_bytes(data[-len(magic) - 4 : -len(magic)], "big")
    load_module(data[: -len(magic) - 12 - size])


@probe
def load_a_changed_module() -> None:
    data = module()
    place = data.index(b"license=GPL")
    load_module(data[:place] + b"License" + data[place + 7 :])


# --- Files -----------------------------------------------------------------------------------------------


@probe
def write_into_config() -> None:
    write("/config/probe", b"x")


@probe
def write_into_the_store() -> None:
    write("/atomfs-cache/probe", b"x")


def remounted(folder: str) -> None:
    """Make a volume writable, write, take it back."""
    flags = init.SAFE | init.MountFlag.NOSYMFOLLOW | REMOUNT
    K.mount("", folder, "", flags)
    try:
        write(f"{folder}/probe", b"x")
        os.unlink(f"{folder}/probe")
    finally:
        K.mount("", folder, "", flags | init.MountFlag.RDONLY)


@probe
def write_into_config_after_a_remount() -> None:
    remounted("/config")


@probe
def write_into_the_store_after_a_remount() -> None:
    remounted("/atomfs-cache")


@probe
def write_to_a_layer() -> None:
    write("/dev/mapper/mosinit-hostfs-0", bytes(4096))


@probe
def options_of_the_volumes() -> object:
    rows = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    places = ("/config", "/atomfs-cache", "/scratch-writes", "/var")
    return {row[1]: sorted(set(row[3].split(",")) & {"ro", "rw", "nosuid", "nodev", "noexec", "nosymfollow"})
            for row in rows if row[1] in places}  # fmt: skip


@probe
def the_secret_of_services() -> object:
    path = Path("/run/mosinit/volume-secret")
    found = path.stat()
    return [stat.filemode(found.st_mode), found.st_uid, found.st_size, len(path.read_bytes())]


@probe
def the_secret_of_services_for_others() -> object:
    def work() -> object:
        child = os.fork()
        if child == 0:
            os.setgid(65534)
            os.setuid(65534)
            code = 0
            try:
                read("/run/mosinit/volume-secret")
            except OSError as error:
                code = error.errno or 255
            os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return errno.errorcode.get(cast(int, work()), "done")


def efi_write(name: str, guid: str, attributes: int) -> None:
    """Set an EFI variable."""
    path = Path(f"/sys/firmware/efi/efivars/{name}-{guid}")
    if path.exists():
        with held(path, os.O_RDONLY) as fd:
            fcntl.ioctl(fd, init.FS_IOC_SETFLAGS, struct.pack("<Q", 0))
    write(path, struct.pack("<I", attributes) + b"content")


@probe
def set_a_firmware_variable_of_ours() -> None:
    efi_write("MosinitProbe", init.OUR_GUID, 7)
    K.efi_write("MosinitProbe", init.OUR_GUID, b"")


@probe
def set_db() -> None:
    efi_write("db", init.EFI_IMAGE_SECURITY, 0x27)


@probe
def set_SetupMode() -> None:
    efi_write("SetupMode", init.EFI_GLOBAL, 6)


@probe
def remove_PK() -> None:
    K.efi_write("PK", init.EFI_GLOBAL, b"")


# --- What the bring-up left, and what nobody asked for ---------------------------------------------------


@probe
def devices_that_are_no_live_unit() -> object:
    names = [path.read_text().strip() for path in Path("/sys/block").glob("dm-*/dm/name")
             if not any((path.parent.parent / "holders").iterdir())]  # fmt: skip
    return [name for name in names if run("systemctl", "is-active", f"/dev/mapper/{name}") != "active"]


@probe
def devices() -> object:
    return sorted(path.read_text().strip() for path in Path("/sys/block").glob("dm-*/dm/name"))


@probe
def the_command_line() -> object:
    return Path("/proc/cmdline").read_text()


def processes() -> Iterator[tuple[str, str]]:
    """Yield id and program of each process that has one."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            yield path.name, os.readlink(path / "exe")
        except OSError:
            continue


@probe
def programs_that_run() -> object:
    return sorted({program for number, program in processes() if int(number) != os.getpid()})


@probe
def open_files_of_the_initrd() -> object:
    links = []
    for number, program in processes():
        for path in Path(f"/proc/{number}/fd").glob("*"):
            try:
                links.append((program, os.readlink(path)))
            except OSError:
                continue
    words = ("(deleted)", "/dev/tpm", "/dev/loop", "/dev/dm-", "/dev/vd", "/dev/mapper", "luks")
    return [[program, link] for program, link in links if any(word in link for word in words)]


@probe
def the_watchdog() -> object:
    folder = Path("/sys/class/watchdog/watchdog0")
    return {name: (folder / name).read_text().strip() for name in ("identity", "state", "timeout")}


@probe
def credentials() -> object:
    return [str(path) for path in (Path("/run/credentials/@system"), Path("/etc/evil")) if path.exists()]


@probe
def credentials_in_the_firmwares_table() -> object:
    return Path("/sys/firmware/dmi/tables/DMI").read_bytes().count(b"io.systemd.credential")


@probe
def a_unit_from_credentials() -> object:
    return run("systemctl", "show", "--property=LoadState,ActiveState", "evil.service").split()


@probe
def what_a_live_system_offers() -> object:
    units = (
        "mosinit-install.service", "mosinit-live-ssh.service", "mosinit-consoles.service",
        "mosinit-console@ttyS0.service",
    )  # fmt: skip
    run("systemctl", "start", *units)
    states = ("--property=LoadState", "--property=ConditionResult", "--property=ActiveState")
    return {unit: run("systemctl", "show", "--value", *states, unit).split() for unit in units}


@probe
def units_of_ssh() -> object:
    listed = run("systemctl", "list-units", "--all", "--plain", "--no-legend", "*ssh*").splitlines()
    return [line.split()[0] for line in listed if "inactive" not in line.split()]


@probe
def ports_that_others_reach() -> object:
    # linux/tcp_states.h: 0A is TCP_LISTEN. 127.0.0.0/8 and ::1 are this machine's alone.
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    places = [row[1].split(":") for row in rows if row[3] == "0A"]
    own = "0" * 24 + "01000000"
    return sorted(int(port, 16) for host, port in places if not host.endswith("7F") and host != own)


@probe
def accounts_with_a_password() -> object:
    lines = Path("/etc/shadow").read_text().splitlines()
    return [line.split(":")[0] for line in lines if line.split(":")[1] not in ("*", "!", "!*", "!!")]


@probe
def the_hosts_name() -> object:
    return os.uname().nodename


@probe
def the_shell_of_root() -> object:
    return pwd.getpwnam("root").pw_shell


@probe
def the_id_of_the_machine() -> object:
    return Path("/etc/machine-id").read_text().strip()


@probe
def the_verb_provision() -> object:
    words = [
        "mosinit",
        "provision",
        "--organisation",
        "/run/mosinit/organisation",
        "--dir",
        "/run/provision",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return [done.returncode, done.stderr]


@probe
def the_host_key_of_ssh() -> object:
    path = Path("/etc/ssh/ssh_host_ed25519_key")
    return [path.read_text(), stat.filemode(path.stat().st_mode)]


@probe
def extensions_that_systemd_finds() -> object:
    return [
        run(program, "list", "--no-legend").split()[:1] for program in ("systemd-sysext", "systemd-confext")
    ]


@probe
def laid_over_usr_or_etc() -> object:
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    evil = [str(path) for path in (Path("/usr/evil"), Path("/etc/evil")) if path.exists()]
    return [point for point in points if point in ("/usr", "/etc")] + evil


# --- What outlives this boot ------------------------------------------------------------------------------

LEFT = ("/root/left", "/etc/left", "/usr/lib/left", "/var/lib/left", "/run/left", "/scratch-writes/left")


@probe
def left_by_an_earlier_boot() -> object:
    found = [path for path in LEFT if Path(path).exists()]
    for path in LEFT:
        Path(path).parent.mkdir(exist_ok=True)
        write(path, b"left\n")
    os.sync()
    return found


# --- A change of firmware, approved before ----------------------------------------------------------------

OLDER = Path("/var/lib/event-log")  # of the boot before, left by `change_dbx`


@probe
def the_event_log() -> object:
    return base64.b64encode(EVENT_LOG.read_bytes()).decode()


def verb(*words: str) -> object:
    """Run a verb of mosinit and return its data, or why there is none."""
    done = subprocess.run(["mosinit", *words, "--json"], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else [done.returncode, done.stderr]


def change_dbx(answer: dict[str, str]) -> dict[str, object]:
    """Let the machine take approvals, then append to dbx as an update does."""
    file = Path("/run/approvals.json")
    write(file, answer["approvals"].encode())
    told = {"taken": verb("provision", "--approvals", str(file)), "status": verb("status")}
    write(OLDER, EVENT_LOG.read_bytes())
    variable = f"{init.EFIVARS}/dbx-{init.EFI_IMAGE_SECURITY}"
    with held(variable, os.O_RDONLY) as fd:
        fcntl.ioctl(fd, init.FS_IOC_SETFLAGS, struct.pack("<Q", 0))
    # UEFI 2.10, 8.2: non-volatile, boot service, runtime, time-based authenticated, append
    write(variable, struct.pack("<I", 0x67) + base64.b64decode(answer["update"]))
    os.sync()
    return told


def after_the_change() -> dict[str, object]:
    """Say what differs from the boot before."""
    logs = ("--event-log", str(EVENT_LOG), "--against", str(OLDER))
    told = {"differences": verb("explain", *logs), "last boot": verb("explain"), "status": verb("status")}
    OLDER.unlink()
    return told


def main() -> None:
    """Try everything, tell it, and do what is answered."""
    if OLDER.exists():
        results = {"after the change": outcome(after_the_change)}
    else:
        results = {name: outcome(work) for name, work in PROBES.items()}
    with open(PORT, "r+b", buffering=0) as port:
        port.write(json.dumps(results).encode() + b"\n")
        answer = json.loads(port.readline())
        if "update" in answer:
            port.write(json.dumps(outcome(lambda: change_dbx(answer))).encode() + b"\n")
    if answer.get("do") == "restart":
        subprocess.run(["systemctl", "--no-block", "reboot"], check=True)
    if answer.get("do") == "crash":
        # systemd catches it, and stays for ever.
        os.kill(1, signal.SIGSEGV)


if __name__ == "__main__":
    main()
