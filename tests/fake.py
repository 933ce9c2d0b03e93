"""A machine that exists only in memory: it records what the bring-up does to it, in order."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import NoReturn

from mosinit import init

PRODUCT = "7d0f8a3e-0c1d-4c5a-9a55-1f2e3d4c5b6a"
UKI_ID = "ab" * 32
ESP_UUID = "11111111-2222-3333-4444-555555555555"
CMDLINE = "console=ttyS0 panic=10 --"
SKIS = ("aa" * 20, "bb" * 20)
CERTIFICATES = (b"uki certificate", b"layer certificate")


class Ended(BaseException):
    """The machine left the program: restarted, switched off, or became hostfs."""


def signature_list(*certificates: bytes) -> bytes:
    """Encode an EFI signature database with one X.509 entry for each."""
    kind = bytes.fromhex("a159c0a5e494a74a87b5ab155c2bf072")
    return b"".join(
        struct.pack("<16sIII", kind, 28 + 16 + len(data), 0, 16 + len(data)) + bytes(16) + data
        for data in certificates
    )


def guid_bytes(text: str) -> bytes:
    """Encode a GUID as UEFI does."""
    a, b, c, d, e = text.split("-")
    return struct.pack("<IHH", int(a, 16), int(b, 16), int(c, 16)) + bytes.fromhex(d + e)


def gpt(
    partitions: Sequence[tuple[str, str, int, int]],
    sectors: int = 65536,
    sector: int = 512,
    names: Mapping[str, str] | None = None,
) -> bytes:
    """Encode sectors 0 to 33 of a disk: (type, uuid, first sector, last sector) of each partition.

    `names` are the labels of partitions, by uuid.
    """
    labels = {uuid: name.encode("utf-16-le") for uuid, name in (names or {}).items()}
    entries = b"".join(
        struct.pack(
            "<16s16sQQQ72s", guid_bytes(kind), guid_bytes(uuid), first, last, 0, labels.get(uuid, b"")
        )
        for kind, uuid, first, last in partitions
    ).ljust(128 * 128, b"\0")
    fields = (b"EFI PART", 0x10000, 92, 0, 0, 1, sectors - 1, 34, sectors - 34, bytes(16), 2, 128, 128)
    header = struct.pack("<8sIIIIQQQQ16sQIII", *fields, zlib.crc32(entries))
    header = header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]
    return bytes(sector) + header.ljust(sector, b"\0") + entries


Rows = tuple[tuple[str, dict[str, str], bool], ...]
MODULES: Rows = (("dm_verity", {"require_signatures": "Y"}, False), ("ahci", {}, True))


def policy_json(**changes: object) -> bytes:
    """Encode a policy that fits the fake machine."""
    policy = {
        "schema": 1, "mode": "live", "product": PRODUCT, "epoch": 1, "kernel": "6.12", "cmdline": CMDLINE,
        "db": [hashlib.sha256(data).hexdigest() for data in CERTIFICATES], "platform": list(SKIS),
        "revoked": [],
        "modules": [
            {"name": name, "path": f"/{name}.ko", "parameters": parameters, "background": background}
            for name, parameters, background in MODULES
        ],
    }  # fmt: skip
    return json.dumps({**policy, **changes}).encode()


def answer(body: bytes, code: int = 0, tag: int = init.ST_NO_SESSIONS) -> bytes:
    """Encode what a TPM answers."""
    return struct.pack(">HII", tag, 10 + len(body), code) + body


class FakeMachine(init.Machine):
    """Files are a dict; effects are recorded in `ops`; `fail` makes a method raise."""

    def __init__(self) -> None:
        self.report = init.Report()
        self.ops: list[tuple[object, ...]] = []
        self.console = ""
        self.now = 0.0
        self.failing: dict[str, BaseException] = {}
        self.pcrs = {11: hashlib.sha256(b"stub").digest(), 12: bytes(32), 13: bytes(32)}
        self.deaf_tpm = False
        self.banks = ["sha1", "sha256"]
        self.variables = {
            f"SecureBoot-{init.EFI_GLOBAL}": (6, b"\1"),
            f"SetupMode-{init.EFI_GLOBAL}": (6, b"\0"),
            f"db-{init.EFI_IMAGE_SECURITY}": (0x27, signature_list(*CERTIFICATES)),
            f"LoaderDevicePartUUID-{init.LOADER_GUID}": (6, (ESP_UUID.upper() + "\0").encode("utf-16-le")),
        }
        self.keyrings: dict[str, list[str]] = {
            ".platform": [f"some: words: {ski}" for ski in SKIS],
            ".machine": [],
        }
        self.files: dict[str, bytes] = {
            "/etc/mosinit/policy.json": policy_json(),
            "/etc/mosinit/uki-id": UKI_ID.encode() + b"\n",
            "/etc/mosinit/organisation/manifest-ca.pem": b"ca",
            "/sys/module/dm_verity/parameters/require_signatures": b"Y\n",
            "/sys/kernel/security/lockdown": b"none integrity [confidentiality]\n",
            "/sys/class/tpm/tpm0/tpm_version_major": b"2\n",
            "/proc/cmdline": CMDLINE.encode() + b"\n",
            "/proc/sys/kernel/random/boot_id": b"00000000-0000-0000-0000-000000000000\n",
            "/.extra/os-release": b"ID=mosinit\n",
        }
        self.modes: dict[str, int] = {}
        self.disks: dict[str, bytes] = {}
        self.add_disk("vda")

    def add_disk(self, name: str, content: bytes | None = None) -> None:
        """Plug in a disk; by default one with the ESP that the stub names."""
        if content is None:
            content = gpt([(init.ESP_TYPE, ESP_UUID, 2048, 4095)]).ljust(65536 * 512, b"\0")
        self.disks[f"/dev/{name}"] = content
        self.files[f"/sys/block/{name}/diskseq"] = b"1\n"

    def fail(self, method: str, error: BaseException | None = None) -> None:
        """Make a method raise from now on."""
        self.failing[method] = error or OSError(errno.EIO, "input/output error")

    def _do(self, method: str, *arguments: object) -> None:
        self.ops.append((method, *arguments))
        if method in self.failing:
            raise self.failing[method]

    def print(self, text: str) -> None:
        self.console += text

    def open_consoles(self) -> None:
        self._do("open_consoles")

    def log(self, text: str) -> None:
        self.ops.append(("log", text))

    def quiet_kernel(self, level: int) -> None:
        self._do("quiet_kernel", level)

    def read(self, path: str, limit: int = init.MIB) -> bytes:
        if path not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        if len(self.files[path]) > limit:
            raise OSError(errno.EFBIG, f"{path} is larger than {limit} bytes")
        return self.files[path]

    def write(self, path: str, data: bytes | bytearray, mode: int = 0o644) -> None:
        self._do("write", path, bytes(data))
        self.files[path] = bytes(data)
        self.modes[path] = mode

    def exists(self, path: str) -> bool:
        return any(name == path or name.startswith(f"{path}/") for name in self.files)

    def names(self, path: str) -> list[str]:
        if path == init.EFIVARS:
            return sorted(self.variables)
        below = [name.removeprefix(f"{path}/") for name in self.files if name.startswith(f"{path}/")]
        return sorted({name.partition("/")[0] for name in below})

    def make_folder(self, path: str, mode: int = 0o755) -> None:
        self._do("make_folder", path)

    def is_folder(self, path: str) -> bool:
        return self.exists(path)

    def efi_read(self, name: str, guid: str) -> tuple[int, bytes] | None:
        return self.variables.get(f"{name}-{guid}")

    def efi_write(self, name: str, guid: str, value: bytes) -> None:
        self._do("efi_write", name, value)
        self.variables.pop(f"{name}-{guid}", None)
        if value:
            self.variables[f"{name}-{guid}"] = (7, value)

    def mount(
        self,
        source: str,
        target: str,
        fstype: str,
        flags: init.MountFlag = init.RO_SAFE,
        data: str = "",
    ) -> None:
        self._do("mount", source, target, fstype, flags)

    def unmount(self, target: str, *, lazy: bool = False) -> None:
        self._do("unmount", target)

    def mount_overlay(
        self, target: str, lowers: Sequence[str], options: Mapping[str, str], *, read_only: bool
    ) -> None:
        self._do("mount_overlay", target, tuple(lowers), read_only)

    def load_module(self, path: str, parameters: str) -> None:
        self._do("load_module", path, parameters)

    def keyring(self, name: str) -> list[str] | None:
        return self.keyrings.get(name)

    def open_device(self, path: str) -> int:
        if path not in self.disks:
            raise FileNotFoundError(errno.ENOENT, "no such device", path)
        return list(self.disks).index(path) + 1000

    def device_size(self, fd: int) -> tuple[int, int]:
        return len(list(self.disks.values())[fd - 1000]), 512

    def read_at(self, fd: int, offset: int, size: int) -> bytes:
        return list(self.disks.values())[fd - 1000][offset : offset + size]

    def open_luks(self, header: bytes, device: str, secret: bytearray, slot: int, name: str | None) -> None:
        self._do("open_luks", device, slot, name)

    def format_ext4(self, device: str) -> None:
        self._do("format_ext4", device)

    def close(self, fd: int) -> None:
        self._do("close", fd)

    def tpm(self, command: bytes) -> bytes:
        self._do("tpm", command)
        code = struct.unpack_from(">I", command, 6)[0]
        if code == init.Cc.GET_CAPABILITY:
            rows = [struct.pack(">HB3s", init.TPM_ALGORITHMS[bank], 3, b"\xff" * 3) for bank in self.banks]
            return answer(b"\0" + struct.pack(">II", 5, len(rows)) + b"".join(rows))
        if code == init.Cc.PCR_READ:
            mask = int.from_bytes(command[17:20], "little") if "sha256" in self.banks else 0
            values = [struct.pack(">H", 32) + self.pcrs[pcr] for pcr in range(24) if mask >> pcr & 1]
            selection = struct.pack(">IHB3s", 1, 0x000B, 3, mask.to_bytes(3, "little"))
            return answer(bytes(4) + selection + struct.pack(">I", len(values)) + b"".join(values))
        assert code == init.Cc.PCR_EXTEND, hex(code)
        pcr = struct.unpack_from(">I", command, 10)[0]
        digests = command[10 + 4 + 4 + 9 + 4 :]
        digest = digests[digests.index(b"\0\x0b") + 2 :][:32]
        if not self.deaf_tpm:
            self.pcrs[pcr] = hashlib.sha256(self.pcrs[pcr] + digest).digest()
        return answer(struct.pack(">IHBH", 0, 0, 1, 0), tag=init.ST_SESSIONS)

    def random(self, size: int) -> bytes:
        self.now += 0.001
        return hashlib.shake_256(str(self.now).encode()).digest(size)

    def arm_watchdog(self, seconds: int) -> bool:
        self._do("arm_watchdog", seconds)
        return True

    def feed_watchdog(self) -> None:
        self._do("feed_watchdog")

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self._do("sleep", seconds)
        self.now += seconds

    def restart(self) -> NoReturn:
        self.ops.append(("restart",))
        raise Ended("restart")

    def power_off(self) -> NoReturn:
        self.ops.append(("power_off",))
        raise Ended("power_off")

    def framed(self) -> dict[str, object]:
        """Return the report that the console shows."""
        lines = [line for line in self.console.splitlines() if line.startswith("mosinit-report: ")]
        assert len(lines) == 1, self.console
        report = json.loads(lines[0].removeprefix("mosinit-report: "))
        assert isinstance(report, dict)
        return report
