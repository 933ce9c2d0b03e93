"""From the store to hostfs on a machine in memory: a good release, and each way in which it can be wrong."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from mosinit import init
from tests.fake import ESP_UUID, UKI_ID, Ended, FakeMachine, gpt, policy_json
from tests.test_init_boot import end
from tests.test_init_manifest import CA, CA_KEY, HEAD, P256, certificate, sign

INDEX = f"{init.STORE}/{init.REPOSITORY}/index.json"
INIT = struct.pack("<4s14xH12xQ14xHH", b"\x7fELF", 62, 64, 56, 0).ljust(64, b"\0")
SEAL_UUID, STORE_UUID = "22222222-2222-3333-4444-555555555555", "33333333-2222-3333-4444-555555555555"


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def layer_file(blocks: int = 4, head: bytes = struct.pack("<I", 0xE0F5E1E2), salt: bytes = b"salt") -> bytes:
    """Make the bytes of a layer: data, superblock, as much of a tree as its size must say."""
    data = (bytes(1024) + head).ljust(blocks * 4096, b"\0")
    block = struct.pack(
        "<8sII16s32sIIQH6x256s168x", b"verity\0\0", 1, 1, b"", b"sha256", 4096, 4096, blocks, len(salt), salt
    )
    return data + block.ljust(4096, b"\0") + bytes(4096 * init.verity_tree_blocks(blocks))


class Release:
    """What lies in a store; a test changes a part before it is laid down."""

    def __init__(self) -> None:
        self.layers = {"hostfs": [layer_file(4), layer_file(5)], "bootkit": [layer_file(6)]}
        self.roots = {"hostfs": ["a1" * 32, "a2" * 32], "bootkit": ["b1" * 32]}
        self.signatures = {"hostfs": [b"signature 1", b"signature 2"], "bootkit": [b"signature 3"]}
        self.uki_id = UKI_ID
        self.writable = ""
        self.names = ["hostfs", "bootkit"]
        self.change_image: Callable[[dict[str, object]], object] = lambda image: None
        self.change_text: Callable[[str], str] = lambda text: text
        self.change_blobs: Callable[[dict[str, bytes]], object] = lambda blobs: None
        self.artefacts, self.releases = 1, 1
        self.parts = [init.MANIFEST_MEDIA_TYPE, init.SIGNATURE_MEDIA_TYPE, init.CERTIFICATE_MEDIA_TYPE]

    def image(self, name: str) -> bytes:
        """Encode a target's image manifest."""
        layers = [
            {"mediaType": "x/erofs", "digest": digest(data), "size": len(data),
             "annotations": {init.ROOT_HASH_ANNOTATIONS[0]: root}}
            for data, root in zip(self.layers[name], self.roots[name], strict=True)
        ]  # fmt: skip
        image: dict[str, object] = {"schemaVersion": 2, "layers": layers}
        if name == "bootkit":
            image["annotations"] = dict.fromkeys(init.UKI_ID_ANNOTATIONS.values(), self.uki_id)
        self.change_image(image)
        return json.dumps(image).encode()

    def manifest(self) -> bytes:
        """Encode the signed manifest."""
        text = HEAD + "targets:\n"
        for name in self.names:
            image = self.image(name)
            signatures = ", ".join(f"'{digest(data)}'" for data in self.signatures[name])
            text += f"  - {{service_name: {name}, service_type: {name}, version: '1', size: {len(image)},\n"
            text += f"     digest: '{digest(image)}', layer_signatures: [{signatures}]"
            text += f", writable: {self.writable}}}\n" if self.writable and name == "hostfs" else "}\n"
        return self.change_text(text).encode()

    def lay_down(self, k: FakeMachine) -> None:
        """Put index and blobs into the machine's store."""
        text = self.manifest()
        contents = dict(zip(
            (init.MANIFEST_MEDIA_TYPE, init.SIGNATURE_MEDIA_TYPE, init.CERTIFICATE_MEDIA_TYPE),
            (text, sign(P256, text), certificate(P256, CA_KEY)), strict=True,
        ))  # fmt: skip
        blobs: dict[str, bytes] = {}

        def put(data: bytes, kind: str, artefact: str = "") -> dict[str, object]:
            blobs[digest(data)] = data
            more = {"artifactType": artefact} if artefact else {}
            return {"mediaType": kind, "digest": digest(data), "size": len(data), **more}

        for name in self.names:
            for data in (*self.layers[name], *self.signatures[name], self.image(name)):
                put(data, "x/blob")
        layers = [put(contents[kind], kind) for kind in self.parts]
        artefact = put(
            json.dumps({"schemaVersion": 2, "layers": layers}).encode(), "x/m", init.RELEASE_ARTIFACT
        )
        release = {"schemaVersion": 2, "manifests": [artefact] * self.artefacts}
        top = {"schemaVersion": 2, "manifests": [put(json.dumps(release).encode(), "x/i")] * self.releases}
        k.files[INDEX] = json.dumps(top).encode()
        self.change_blobs(blobs)
        k.files |= {init.blob_path(name): data for name, data in blobs.items()}


class StoreMachine(FakeMachine):
    """A machine with a medium, loops, device-mapper, and a hostfs that appears when it is stacked."""

    def __init__(self, release: Release, blocks: int = 10) -> None:
        super().__init__()
        self.files["/etc/mosinit/policy.json"] = policy_json()
        self.files["/etc/mosinit/organisation/manifest-ca.pem"] = CA
        self.loops: list[bytes] = []
        self.tables: dict[str, str] = {}
        self.unreadable: set[str] = set()
        self.hostfs: dict[str, tuple[int, bytes]] = {"/sbin/init": (stat.S_IFREG | 0o755, INIT)}
        self.links: set[str] = set()
        self.read_only = ""
        self.folders = {f"{init.SYSROOT}{name}" for name in init.MOVED}
        parts = [(init.ESP_TYPE, ESP_UUID, 2048, 4095), (init.LIVE_SEAL_TYPE, SEAL_UUID, 4096, 4127),
                 (init.LIVE_STORE_TYPE, STORE_UUID, 6144, 8191)]  # fmt: skip
        self.add_disk("vda", gpt(parts).ljust(65536 * 512, b"\0"))
        for number, (_, _, first, last) in enumerate(parts, 1):
            folder = f"/sys/block/vda/vda{number}"
            values = {"partition": number, "start": first, "size": last - first + 1}
            self.files |= {f"{folder}/{name}": f"{value}\n".encode() for name, value in values.items()}
            self.disks[f"/dev/vda{number}"] = bytes(512 * (last - first + 1))
        root = b"\xcc" * 32
        checksum = init.live_seal_checksum(blocks, root, b"seal")
        seal = init.LIVE_SEAL.pack(init.LIVE_SEAL_MAGIC, 1, 4, blocks, root, checksum) + b"seal"
        self.disks["/dev/vda2"] = seal.ljust(16384, b"\0")
        release.lay_down(self)

    def device_number(self, fd: int) -> str:
        return f"254:{fd}"

    def attach_loop(self, path: str) -> tuple[int, int]:
        data = self.read(path, 1 << 30)
        self.disks[f"/dev/loop{len(self.loops)}"] = data
        self.loops.append(data)
        return self.open_device(f"/dev/loop{len(self.loops) - 1}"), len(data)

    def dm(
        self, command: init.DmCommand, name: str, flags: int = 0, table: tuple[int, str, str] | None = None
    ) -> str:
        self._do("dm", command.name, name, flags, table)
        if f"dm {command.name} {name}" in self.failing:
            raise self.failing[f"dm {command.name} {name}"]
        if table is not None:
            self.tables[name] = table[2]
        if command == init.DmCommand.DEV_CREATE and name not in ("mosinit-store", "mosinit-scratch"):
            self.disks[f"/dev/dm-{name}"] = self.loops[-1]
        return f"/dev/dm-{name}"

    def read_at(self, fd: int, offset: int, size: int) -> bytes:
        if list(self.disks)[fd - 1000] in self.unreadable:
            raise OSError(errno.EIO, "input/output error")
        return super().read_at(fd, offset, size)

    def add_key(self, name: str, payload: bytes) -> None:
        self._do("add_key", name, payload)

    def clear_keys(self) -> None:
        self._do("clear_keys")

    def read_in_root(self, root: str, path: str, size: int) -> tuple[int, bytes] | None:
        self._do("read_in_root", root, path)
        found = self.hostfs.get(path)
        return None if found is None else (found[0], found[1][:size])

    def is_folder(self, path: str) -> bool:
        return path in self.folders

    def make_folder(self, path: str, mode: int = 0o755) -> None:
        super().make_folder(path, mode)
        if path == self.read_only:
            raise OSError(errno.EROFS, "read-only file system")
        if path not in self.links:
            self.folders.add(path)

    def becomes_link(self, path: str) -> None:
        """Put a link to a folder where a folder was."""
        self.folders.remove(path)
        self.links.add(path)

    def cannot_make(self, path: str) -> None:
        """Let a mount point be missing where nothing can be written."""
        self.folders.remove(path)
        self.read_only = path

    def free_initramfs(self) -> None:
        self._do("free_initramfs")

    def enter_root(self, root: str) -> None:
        self._do("enter_root", root)

    def become(self, init: str) -> NoReturn:
        self._do("become", init)
        raise Ended(f"became {init}")


def done(k: FakeMachine, *names: str) -> list[tuple[object, ...]]:
    return [op for op in k.ops if op[0] in names]


# --- The good release --------------------------------------------------------------------------------


def test_a_good_release_becomes_hostfs() -> None:
    k = StoreMachine(Release())
    assert end(k) == "became /sbin/init"
    report = k.framed()
    assert (report["result"], report["sequence"], report["fenced"]) == ("pivoted", 42, True)
    assert json.loads(k.files["/run/mosinit/report.json"]) == report
    assert [op[0] for op in k.ops[-5:]] == [
        "free_initramfs",
        "enter_root",
        "quiet_kernel",
        "quiet_kernel",
        "become",
    ]
    assert k.console.rstrip().splitlines()[-1].startswith("mosinit-report: ")


def test_each_device_has_a_table_of_ours_and_a_signature() -> None:
    k = StoreMachine(Release())
    end(k)
    loads = [op for op in done(k, "dm") if op[1] == "TABLE_LOAD"]
    names = ["mosinit-store", "mosinit-hostfs-1", "mosinit-hostfs-0", "mosinit-bootkit-0"]
    assert [op[2] for op in loads] == names * 2
    assert all(op[3] == init.DM_READONLY for op in loads)
    salt = init.live_store_salt(10)
    fd = k.open_device("/dev/vda3")
    head = f"1 254:{fd} 254:{fd} 4096 4096 10 11 sha256 {'cc' * 32} {salt}"
    assert loads[0][4] == (80, "verity", f"{head} 2 root_hash_sig_key_desc mosinit:mosinit-store")
    assert [op[4][0] // 8 for op in loads[1:4]] == [5, 4, 6]  # type: ignore[index]
    roots = [str(op[4]).split()[10] for op in loads[1:4]]
    assert roots == ["a2" * 32, "a1" * 32, "b1" * 32]
    # Once hostfs runs, a corrupt block restarts the machine.
    for first, second in zip(loads[:4], loads[4:], strict=True):
        words = str(first[4][2]).replace(" 2 root_hash", " 3 root_hash") + " restart_on_corruption"  # type: ignore[index]
        assert second[4] == (*first[4][:2], words)  # type: ignore[index]
    # Each new table is in force: the devices are resumed again, side by side.
    resumes = [op for op in done(k, "dm") if op[1] == "DEV_SUSPEND"]
    assert [op[2:] for op in resumes[:4]] == [(name, 0, None) for name in names]
    swaps = sorted(str(op[2]) for op in resumes[4:] if op[3] == init.DM_SKIP_LOCKFS)
    assert swaps == sorted(names)
    assert k.ops.index(loads[-1]) < k.ops.index(resumes[4])
    keys = [op[2] for op in done(k, "add_key")]
    assert keys == [b"seal", b"signature 2", b"signature 1", b"signature 3"] * 2
    assert len(done(k, "clear_keys")) == 8


def test_the_last_layer_is_on_top_and_the_modules_are_below() -> None:
    k = StoreMachine(Release())
    end(k)
    below = "/run/mosinit/layers/mosinit-"
    lowers = (f"{below}hostfs-1", f"{below}hostfs-0", f"{below}bootkit-0")
    assert done(k, "mount_overlay") == [("mount_overlay", "/sysroot", lowers, False)]
    assert [op[1] for op in done(k, "unmount")] == list(lowers)


def test_what_is_mounted_how() -> None:
    k = StoreMachine(Release())
    end(k)
    flags = {(op[2], op[3]): op[4] for op in done(k, "mount")}
    assert flags[init.STORE, "erofs"] == init.RO_SAFE | init.MountFlag.NOSYMFOLLOW
    assert flags["/run/mosinit/layers/mosinit-hostfs-0", "erofs"] == init.MountFlag.RDONLY
    assert flags[init.SCRATCH, "tmpfs"] == init.SAFE
    moved = [(op[1], op[2]) for op in done(k, "mount") if op[4] == init.MountFlag.MOVE]
    assert moved == [(folder, f"/sysroot{folder}") for folder in init.MOVED]
    assert ("write", "/proc/sys/kernel/kexec_load_disabled", b"1") in k.ops


@pytest.mark.parametrize(("writable", "overlays"), [
    ("all", [("/sysroot", False)]),
    ("none", [("/sysroot", True)]),
    ("etc", [("/sysroot", True), ("/sysroot/etc", False)]),
])  # fmt: skip
def test_how_much_is_writable(writable: str, overlays: list[tuple[str, bool]]) -> None:
    release = Release()
    release.writable = writable
    k = StoreMachine(release)
    assert end(k) == "became /sbin/init"
    assert [(op[1], op[3]) for op in done(k, "mount_overlay")] == overlays


def test_a_missing_mount_point_is_made_where_it_can_be() -> None:
    k = StoreMachine(Release())
    k.folders.remove("/sysroot/atomfs-cache")
    assert end(k) == "became /sbin/init"
    assert ("make_folder", "/sysroot/atomfs-cache") in k.ops


def test_an_earlier_refusal_is_told_once_and_forgotten() -> None:
    k = StoreMachine(Release())
    left = {"id": "SB-OFF", "sequence": None, "uki": UKI_ID, "count": 3}
    name = f"{init.REFUSAL_VARIABLE}-{init.OUR_GUID}"
    k.variables[name] = (7, json.dumps(left).encode())
    end(k)
    assert k.framed()["previous_refusal"] == left
    assert name not in k.variables


def test_the_overlay_takes_no_redirection() -> None:
    seen: list[Mapping[str, str]] = []

    class Machine(StoreMachine):
        def mount_overlay(
            self, target: str, lowers: Sequence[str], options: Mapping[str, str], *, read_only: bool
        ) -> None:
            seen.append(options)

    end(Machine(Release()))
    (options,) = seen
    assert options == {
        "redirect_dir": "nofollow", "metacopy": "off", "index": "off", "xino": "off",
        "upperdir": "/scratch-writes/root/upper", "workdir": "/scratch-writes/root/work",
    }  # fmt: skip


# --- Everything that can be wrong --------------------------------------------------------------------

Fault = Callable[[Release], Callable[[StoreMachine], object] | None]


def of(**changes: object) -> Fault:
    return lambda release: release.__dict__.update(changes)


def blob(name: str, index: int, change: Callable[[bytes], bytes]) -> Fault:
    """Change the bytes of a layer's blob, not its name."""

    def fault(release: Release) -> None:
        key = digest(release.layers[name][index])
        release.change_blobs = lambda blobs: blobs.update({key: change(blobs[key])})

    return fault


def without(pick: Callable[[Release], bytes]) -> Fault:
    """Take a blob away."""

    def fault(release: Release) -> None:
        key = digest(pick(release))
        release.change_blobs = lambda blobs: blobs.pop(key)

    return fault


def spoiled(pick: Callable[[Release], bytes]) -> Fault:
    """Flip a bit of a blob, not its name."""

    def fault(release: Release) -> None:
        key = digest(pick(release))
        release.change_blobs = lambda blobs: blobs.update({key: bytes([blobs[key][0] ^ 1]) + blobs[key][1:]})

    return fault


def layers(name: str, **changes: object) -> Fault:
    """Make the only layer of a target another, named and sized as it is."""

    def fault(release: Release) -> None:
        release.layers[name] = [layer_file(**changes)]  # type: ignore[arg-type]
        release.roots[name], release.signatures[name] = ["b1" * 32], [b"signature 3"]

    return fault


def machine(change: Callable[[StoreMachine], object]) -> Fault:
    return lambda release: change


def refused_table(name: str) -> Fault:
    """Let the kernel refuse a device's signature."""
    return machine(lambda k: k.fail(f"dm TABLE_LOAD mosinit-{name}", OSError(errno.ENOKEY, "no key")))


def init_is(mode: int, content: bytes) -> Fault:
    return machine(lambda k: k.hostfs.update({"/sbin/init": (stat.S_IFREG | mode, content)}))


def no_roots(image: dict[str, object]) -> None:
    for item in image["layers"]:  # type: ignore[attr-defined]
        item["annotations"] = {}


def seal(blocks: int) -> Fault:
    def change(k: StoreMachine) -> None:
        checksum = init.live_seal_checksum(blocks, bytes(32), b"seal")
        head = init.LIVE_SEAL.pack(init.LIVE_SEAL_MAGIC, 1, 4, blocks, bytes(32), checksum)
        k.disks["/dev/vda2"] = (head + b"seal").ljust(16384, b"\0")

    return lambda release: change


def partition_file(name: str, value: bytes) -> Fault:
    return machine(lambda k: k.files.update({f"/sys/block/vda/{name}": value}))


FIFO = {"/sbin/init": (stat.S_IFIFO | 0o755, b"")}
FAULTS: list[tuple[str, Fault]] = [
    ("STORE-SEAL", machine(lambda k: k.disks.update({"/dev/vda2": bytes(16384)}))),
    ("STORE-SEAL", machine(lambda k: k.unreadable.add("/dev/vda2"))),
    ("STORE-SEAL", seal(254)),
    ("STORE-SEAL", seal(100_000)),
    ("DISK-PARTITION", partition_file("vda2/start", b"4095\n")),
    ("DISK-PARTITION", partition_file("vda3/size", b"2047\n")),
    ("DISK-PARTITION", machine(lambda k: k.disks.pop("/dev/vda3"))),
    ("DISK-PARTITION", machine(lambda k: k.files.pop("/sys/block/vda/vda3/partition"))),
    ("STORE-SIGNATURE", refused_table("store")),
    ("STORE-READ", machine(lambda k: k.fail("mount-erofs"))),
    ("MANIFEST-ABSENT", machine(lambda k: k.files.pop(INDEX))),
    ("MANIFEST-ABSENT", machine(lambda k: k.files.update({INDEX: b"[]"}))),
    ("MANIFEST-ABSENT", of(releases=2)),
    ("MANIFEST-ABSENT", of(releases=0)),
    ("MANIFEST-ABSENT", of(artefacts=2)),
    ("MANIFEST-ABSENT", of(artefacts=0)),
    ("MANIFEST-ABSENT", of(parts=[init.MANIFEST_MEDIA_TYPE, init.CERTIFICATE_MEDIA_TYPE])),
    ("MANIFEST-ABSENT", spoiled(lambda r: r.manifest())),
    ("STORE-BLOB", without(lambda r: r.manifest())),
    ("MANIFEST-TARGET", of(names=["hostfs"])),
    ("MANIFEST-TARGET", of(names=["bootkit"])),
    ("IMAGE-DIGEST", spoiled(lambda r: r.image("hostfs"))),
    ("STORE-BLOB", without(lambda r: r.image("bootkit"))),
    ("IMAGE-FORMAT", of(change_image=lambda image: image.pop("layers"))),
    ("LAYER-ROOTHASH", of(change_image=no_roots)),
    ("MANIFEST-UKI", of(uki_id="cd" * 32)),
    ("MANIFEST-UKI", of(change_image=lambda image: image.pop("annotations", None))),
    ("LAYER-SIGNATURE", lambda r: r.signatures.update(hostfs=[b"signature 1"])),
    ("LAYER-SIGNATURE", spoiled(lambda r: r.signatures["hostfs"][1])),
    ("STORE-BLOB", without(lambda r: r.signatures["bootkit"][0])),
    ("LAYER-SIGNATURE", refused_table("hostfs-0")),
    ("STORE-BLOB", without(lambda r: r.layers["hostfs"][0])),
    ("LAYER-SIZE", blob("hostfs", 0, lambda data: data[:-4096])),
    ("LAYER-SIZE", blob("hostfs", 0, lambda data: data + bytes(4096))),
    ("LAYER-SUPERBLOCK", blob("hostfs", 0, lambda data: data[:16384] + b"X" + data[16385:])),
    ("LAYER-SUPERBLOCK", layers("bootkit", blocks=6, salt=bytes.fromhex(init.live_store_salt(6)))),
    ("LAYER-READ", machine(lambda k: k.unreadable.add("/dev/loop1"))),
    ("LAYER-READ", machine(lambda k: k.unreadable.add("/dev/dm-mosinit-bootkit-0"))),
    ("LAYER-READ", machine(lambda k: k.fail("mount-layer"))),
    ("OVERLAY-MOUNTPOINT", machine(lambda k: k.cannot_make("/sysroot/run"))),
    ("LAYER-FILESYSTEM", layers("bootkit", head=b"ext4")),
    ("OVERLAY-MOUNT", machine(lambda k: k.fail("mount_overlay"))),
    ("LAYER-READ", machine(lambda k: k.fail("read_in_root"))),
    ("HOSTFS-INIT", machine(lambda k: k.hostfs.clear())),
    ("HOSTFS-INIT", machine(lambda k: k.hostfs.update(FIFO))),
    ("HOSTFS-INIT", init_is(0o644, INIT)),
    ("HOSTFS-INIT", init_is(0o755, b"\x7fELF")),
    ("HOSTFS-INIT", init_is(0o755, b"#!/missing\n")),
    ("OVERLAY-MOUNTPOINT", machine(lambda k: k.becomes_link("/sysroot/run"))),
    ("LAYER-SIGNATURE", machine(lambda k: k.fail("second load"))),
    ("LAYER-SIGNATURE", machine(lambda k: k.fail("second resume"))),
]  # fmt: skip


def lists_of(release: Release) -> list[dict[str, Any]]:
    return [release.layers, release.roots, release.signatures]


@pytest.mark.parametrize("count", [497, 498])
def test_as_many_layers_as_one_overlay_takes(count: int) -> None:
    release = Release()
    for part in lists_of(release):
        part["bootkit"] *= count
    k = StoreMachine(release)
    assert end(k) == ("became /sbin/init" if count == 497 else "restart")


@pytest.mark.parametrize(
    ("check", "fault"), FAULTS, ids=[f"{n}-{check}" for n, (check, _) in enumerate(FAULTS)]
)
def test_faults(check: str, fault: Fault) -> None:
    release = Release()
    spoil = fault(release)
    k = StoreMachine(release)
    if spoil is not None:
        spoil(k)
    late(k)
    assert end(k) == "restart"
    report = k.framed()
    assert (report["result"], report["failed"], report["fenced"]) == ("refused", check, True)
    assert not done(k, "become", "enter_root")


def late(k: StoreMachine) -> None:
    """Let a fault of the store's mount, or of the second load of a table, happen there and not before."""
    plain_mount, plain_dm = k.mount, k.dm

    def mount(
        source: str, target: str, fstype: str, flags: init.MountFlag = init.RO_SAFE, data: str = ""
    ) -> None:
        plain_mount(source, target, fstype, flags, data)
        if target == init.STORE and "mount-erofs" in k.failing:
            raise k.failing["mount-erofs"]
        if target.startswith("/run/mosinit/layers/") and "mount-layer" in k.failing:
            raise k.failing["mount-layer"]

    def dm(
        command: init.DmCommand, name: str, flags: int = 0, table: tuple[int, str, str] | None = None
    ) -> str:
        if table and "restart_on_corruption" in table[2] and "second load" in k.failing:
            raise k.failing["second load"]
        if command == init.DmCommand.DEV_SUSPEND and flags and "second resume" in k.failing:
            raise k.failing["second resume"]
        return plain_dm(command, name, flags, table)

    k.mount, k.dm = mount, dm  # type: ignore[method-assign]


# Of these each must be in a table of faults, which expects it of a whole boot.
LIVE_CHECKS = ("CMDLINE", "DISK-", "ESP-", "HOSTFS-", "IMAGE-", "LAYER-", "OVERLAY-", "SB-", "STORE-")


def test_every_check_is_expected_somewhere() -> None:
    from tests.test_init_boot import FIRMWARE_FAULTS

    seen = {check for check, _ in (*FAULTS, *FIRMWARE_FAULTS)}
    live = {check for check in init.CHECKS if check.startswith(LIVE_CHECKS)} | {"TPM-ABSENT", "TPM-BANK"}
    assert live - seen == set()
    texts = "".join(path.read_text() for path in Path(__file__).parent.glob("test_init_*.py"))
    assert [check for check in init.CHECKS if f'"{check}"' not in texts] == []


def test_no_flipped_bit_of_a_certificate_is_more_than_a_refusal() -> None:
    der = x509.load_pem_x509_certificate(certificate(P256, CA_KEY)).public_bytes(serialization.Encoding.DER)
    policy = init.parse_policy(policy_json(), UKI_ID.encode(), {"manifest-ca.pem": CA})
    accepted = 0
    for bit in range(0, 8 * len(der), 3):
        spoilt = bytearray(der)
        spoilt[bit // 8] ^= 1 << bit % 8
        pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(spoilt) + b"-----END CERTIFICATE-----\n"
        try:
            init.verify_certificate(pem, policy)
            accepted += 1
        except init.Refused as refused:
            assert refused.check in ("MANIFEST-CERTIFICATE", "MANIFEST-CHAIN", "MANIFEST-PRODUCT")
    assert accepted <= 1  # the count of unused bits of a signature is not part of it


@pytest.mark.parametrize(
    ("head", "interpreter"),
    [
        (INIT, ""),
        (b"#!/bin/sh -e\nx", "/bin/sh"),
        (b"#!\n", None),
        (b"#! /bin/sh", "/bin/sh"),
        (b"MZ", None),
        (b"", None),
        (INIT[:20], None),
        (b"\x7fELF" + INIT[4:18] + b"\x03\0" + INIT[20:], None),
        (INIT[:56] + b"\1\0" + bytes(6) + struct.pack("<I4xQ16xQ16x", 3, 120, 4) + b"/ld\0", "/ld"),
        (INIT[:56] + b"\xff\xff" + bytes(6), None),
    ],
)
def test_what_starts_a_program(head: bytes, interpreter: str | None) -> None:
    assert init.find_interpreter(head) == interpreter
