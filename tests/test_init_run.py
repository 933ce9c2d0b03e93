"""Run mode in memory, with a real TPM: what is opened, in which order, and that a refusal opens nothing."""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from mosinit import init, luks
from mosinit.host import Host
from tests import sealed, volumes
from tests.fake import ESP_UUID, PRODUCT, answer, gpt, policy_json
from tests.test_init_boot import end
from tests.test_init_generations import Repository
from tests.test_init_manifest import CA, CA_KEY, P256, certificate, sign
from tests.test_init_record import record
from tests.test_init_store import Release, StoreMachine, done
from tests.tpms import Swtpm

UUIDS = [str(uuid.UUID(int=number)) for number in range(1, 9)]
KINDS = [
    (init.ESP_TYPE, "esp"), (init.CONFIG_TYPE, "machine-config"), (init.STORE_TYPE, "machine-store"),
    (init.SCRATCH_TYPE, "machine-scratch"), (init.LINUX_TYPE, "state"), (init.LINUX_TYPE, "zot-data"),
]  # fmt: skip
Change = Callable[["RunMachine"], object]


class Organisation:
    """A provisioned machine's parts, made once."""

    def __init__(self, folder: Path) -> None:
        self.material = sealed.provision(folder / "tpm")
        self.host = Host()
        self.config = volumes.config(self.host, folder / "config")
        self.plain = volumes.plain(self.host, folder / "plain").read_bytes()[: volumes.BYTES]
        self.repository = Repository(folder / "git")
        self.repository.add(42, Release().manifest())

    def header(self, folder: Path, **changes: object) -> bytes:
        """Return a config volume up to its data, with changed tokens."""
        path = folder / "config"
        path.write_bytes(self.config.read_bytes())
        luks.import_tokens(self.host, path, self.tokens()._replace(**changes))  # type: ignore[arg-type]
        return path.read_bytes()

    def tokens(self) -> init.Tokens:
        order = self.order(1)
        return init.Tokens(*self.material.seal, self.record(), self.material.platform(), *order)

    def record(self, key: ec.EllipticCurvePrivateKey = CA_KEY, **changes: object) -> bytes:
        made = self.material.record._replace(**changes)  # type: ignore[arg-type]
        fields = (1, uuid.UUID(made.product).bytes, made.secret_proof, made.storage_key, made.epoch_index)
        return record(init.RECORD_HEAD + init.RECORD.pack(*fields), key)

    def order(self, epoch: int) -> tuple[bytes, bytes, bytes]:
        statement = json.dumps(init.epoch_statement(PRODUCT, epoch)).encode()
        return statement, sign(P256, statement), certificate(P256, CA_KEY)

    def approval(self, epoch: int = 1) -> bytes:
        made = self.material.approval(epoch)
        words = {"unseal": made.unseal.hex(), "set_epoch": made.set_epoch.hex()}
        return json.dumps({"schema": 1, "epoch": epoch, **words}).encode()


@pytest.fixture(scope="module")
def organisation(tmp_path_factory: pytest.TempPathFactory) -> Organisation:
    folder = tmp_path_factory.mktemp("run")
    (folder / "git").mkdir()
    return Organisation(folder)


class RunMachine(StoreMachine):
    """An installed machine whose TPM is real; the secrets that volumes were opened with are kept."""

    def __init__(self, organisation: Organisation, header: bytes, tpm: Swtpm) -> None:
        super().__init__(Release())
        self.real = sealed.start_up(tpm, enter=False)
        self.secrets: dict[str, tuple[bytearray, bytes]] = {}
        self.rows = list(KINDS)
        self.superblock: dict[str, bytes] = {}
        self.contents = {
            "vda2": (header[: init.LUKS_DATA + 512]).ljust(init.LUKS_DATA + 4096, b"\0"),
            "vda3": organisation.plain, "vda5": organisation.plain,
        }  # fmt: skip
        self.folders |= {f"{init.SYSROOT}{name}" for name in (init.CONFIG, "/var")}
        keys = organisation.material.folder
        ours = {"manifest-ca.pem": CA, "sudi-ca.pem": CA}
        ours |= {f"{role}.pub": (keys / f"{role}.pub").read_bytes() for role in ("pcr", "platform")}
        self.files |= {f"{init.OURS}/{name}": data for name, data in ours.items()}
        self.files["/etc/mosinit/policy.json"] = policy_json(mode="run")
        self.files[init.APPROVAL_FILE] = organisation.approval()
        self.use(organisation.repository)

    def use(self, repository: Repository) -> None:
        """Have this repository as manifest.git."""
        self.files = {path: data for path, data in self.files.items() if init.MANIFEST_GIT not in path}
        git = repository.folder / ".git"
        for path in (path for path in git.rglob("*") if path.is_file()):
            self.files[f"{init.MANIFEST_GIT}/{path.relative_to(git)}"] = path.read_bytes()

    def plug(self) -> RunMachine:
        """Plug in the disk that its rows describe."""
        rows = [
            (kind, UUIDS[n], 2048 * (n + 1), 2048 * (n + 2) - 1) for n, (kind, _) in enumerate(self.rows)
        ]
        names = {UUIDS[n]: name for n, (_, name) in enumerate(self.rows)}
        disk = gpt([(rows[0][0], ESP_UUID, *rows[0][2:]), *rows[1:]], names=names)
        self.add_disk("vda", disk.ljust(65536 * 512, b"\0"))
        for number, (_, _, first, last) in enumerate(rows, 1):
            folder = f"/sys/block/vda/vda{number}"
            values = {"partition": number, "start": first, "size": last - first + 1}
            self.files |= {f"{folder}/{name}": f"{value}\n".encode() for name, value in values.items()}
            self.disks[f"/dev/vda{number}"] = self.contents.get(f"vda{number}", bytes(4096))
        return self

    def tpm(self, command: bytes) -> bytes:
        self.ops.append(("tpm", command))
        return self.real.tpm(command)

    def random(self, size: int) -> bytes:
        return self.real.random(size)

    def open_luks(self, header: bytes, device: str, secret: bytearray, slot: int, name: str | None) -> None:
        self.secrets[str(name)] = secret, bytes(secret)
        self._do("open_luks", device, slot, name)
        if f"open {name}" in self.failing:
            raise self.failing[f"open {name}"]
        self.hold_ext4(f"/dev/dm-{name}")

    def format_ext4(self, device: str) -> None:
        super().format_ext4(device)
        self.hold_ext4(device)

    def hold_ext4(self, device: str) -> None:
        """Have a file system on a device, as mke2fs makes it unless the test says otherwise."""
        name = device.rpartition("-")[2]
        self.disks[device] = bytes(1024) + self.superblock.get(name, superblock())

    def mount(
        self, source: str, target: str, fstype: str, flags: init.MountFlag = init.RO_SAFE, data: str = ""
    ) -> None:
        super().mount(source, target, fstype, flags, data)
        if f"mount {target}" in self.failing:
            raise self.failing[f"mount {target}"]


def superblock(
    magic: int = 0xEF53, errors: int = 1, incompatible: int = 0x2C2, journal: int = 8, device: int = 0,
    options: bytes = b"",
) -> bytes:  # fmt: skip
    return struct.pack(
        "<56xHxxH34xI124xII280x64s448x", magic, errors, incompatible, journal, device, options
    )


@pytest.fixture
def tpm(organisation: Organisation, tmp_path: Path) -> Iterator[Swtpm]:
    with sealed.copy_of(organisation.material, tmp_path / "tpm") as running:
        yield running


@pytest.fixture
def k(organisation: Organisation, tpm: Swtpm, tmp_path: Path) -> RunMachine:
    return RunMachine(organisation, organisation.header(tmp_path), tpm)


def opened(k: RunMachine) -> list[tuple[object, ...]]:
    """Return what touched a volume, in order."""
    return [op for op in done(k, "open_luks", "format_ext4", "mount") if op[0] != "mount" or op[3] == "ext4"]


def keys_are_gone(k: RunMachine) -> None:
    for secret, _ in k.secrets.values():
        assert bytes(secret) == bytes(len(secret))


# --- The good machine ---------------------------------------------------------------------------------


def test_an_installed_machine_becomes_hostfs(k: RunMachine, organisation: Organisation) -> None:
    assert end(k.plug()) == "became /sbin/init"
    report = k.framed()
    assert (report["mode"], report["result"], report["sequence"]) == ("run", "pivoted", 42)
    assert report["generation"] == organisation.repository.git("rev-parse", "HEAD")
    fds = {number: f"/proc/self/fd/{k.open_device(f'/dev/vda{number}')}" for number in (2, 3, 5)}
    strict = init.RO_SAFE | init.MountFlag.NOSYMFOLLOW
    assert opened(k) == [
        ("open_luks", fds[2], 0, "mosinit-config"),
        ("open_luks", fds[3], 0, "mosinit-store"),
        ("open_luks", fds[5], 0, "mosinit-state"),
        ("format_ext4", "/dev/dm-mosinit-scratch"),
        ("mount", "/dev/dm-mosinit-config", "/config", "ext4", strict),
        ("mount", "/dev/dm-mosinit-store", "/atomfs-cache", "ext4", strict),
        ("mount", "/dev/dm-mosinit-scratch", "/scratch-writes", "ext4", init.SAFE),
        (
            "mount",
            "/dev/dm-mosinit-state",
            "/sysroot/var",
            "ext4",
            init.MountFlag.NOSUID | init.MountFlag.NODEV,
        ),
    ]
    moved = [op[1] for op in done(k, "mount") if op[4] == init.MountFlag.MOVE]
    assert moved == [*init.MOVED, "/config"]


def test_nothing_is_opened_before_the_fence_nor_asked_of_the_tpm_behind_it(k: RunMachine) -> None:
    end(k.plug())
    fence = max(index for index, op in enumerate(k.ops) if op[0] == "tpm")
    assert k.ops.index(opened(k)[0]) > fence
    assert not any(op[0] in ("dm", "attach_loop") for op in k.ops[:fence])


def test_keys_are_of_one_purpose_and_partition_and_are_wiped(
    k: RunMachine, organisation: Organisation
) -> None:
    secret = organisation.material.secret
    end(k.plug())
    seen = {name: value for name, (_, value) in k.secrets.items()}
    assert seen == {
        "mosinit-config": secret,
        "mosinit-store": bytes(init.derive_key(bytearray(secret), "store", UUIDS[2])),
        "mosinit-state": bytes(init.derive_key(bytearray(secret), "state", UUIDS[4])),
    }
    keys_are_gone(k)
    path = "/run/mosinit/volume-secret"
    assert (k.files[path], k.modes[path]) == (bytes(init.derive_key(bytearray(secret), "service")), 0o400)
    assert len({*seen.values(), k.files[path]}) == 4


def test_a_derived_key_is_hkdf() -> None:
    """RFC 5869, as cryptography has it."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    secret = bytearray(range(32))
    expected = HKDF(hashes.SHA256(), 32, None, b"mosinit store volume " + UUIDS[0].encode())
    assert init.derive_key(secret, "store", UUIDS[0]) == expected.derive(bytes(secret))
    assert secret == bytearray(range(32))


def test_the_public_parts_of_the_organisation_are_left_to_hostfs(k: RunMachine) -> None:
    end(k.plug())
    left = {name for name in k.files if name.startswith("/run/mosinit/organisation/")}
    assert {name.rpartition("/")[2] for name in left} == set(k.names(init.OURS))
    assert all(k.files[name] == k.files[name.replace("/run/", "/etc/")] for name in left)


def test_scratch_has_a_new_key_that_no_table_shows(k: RunMachine) -> None:
    end(k.plug())
    table = k.tables["mosinit-scratch"]
    device = k.device_number(k.open_device("/dev/vda4"))
    assert table == (
        f"aes-xts-plain64 :64:user:mosinit-scratch 0 {device} 0 2 sector_size:4096 iv_large_sectors"
    )
    index = k.ops.index(next(op for op in k.ops if op[:2] == ("add_key", "mosinit-scratch")))
    assert len(k.ops[index][2]) == 64  # type: ignore[arg-type]
    assert [op[0] for op in k.ops[index + 1 : index + 3]] == ["dm", "clear_keys"]


def test_a_machine_without_the_volume_state_has_a_var_of_its_hostfs(k: RunMachine) -> None:
    k.rows[4] = (init.LINUX_TYPE, "other")
    assert end(k.plug()) == "became /sbin/init"
    assert "mosinit-state" not in k.secrets
    assert not [op for op in done(k, "mount") if op[2] == "/sysroot/var"]


def test_what_the_machine_keeps_lies_over_the_layers_and_nothing_else_does(k: RunMachine) -> None:
    kept = {path: path.encode() for path in init.KEPT}
    k.files |= {f"/config/state/{path}": data for path, data in kept.items()}
    k.files |= {
        f"/config/state/{path}": b"?" for path in ("etc/shadow", "etc/ssh/sshd_config", "machine-id")
    }
    assert end(k.plug()) == "became /sbin/init"
    place = "/run/mosinit/layers/state"
    assert ("mount", "tmpfs", place, "tmpfs", init.SAFE) in k.ops
    laid = {op[1]: op[2] for op in done(k, "write") if str(op[1]).startswith(place)}
    assert laid == {f"{place}/{path}": data for path, data in kept.items()}
    private = {path for path in kept if path.endswith("_key")}
    assert {path for path in kept if k.modes[f"{place}/{path}"] == 0o600} == private
    assert len(private) == 3
    (overlay,) = done(k, "mount_overlay")
    assert overlay[2][0] == place  # type: ignore[index]
    assert ("unmount", place) in k.ops


def test_a_machine_that_keeps_nothing_has_the_layers_alone(k: RunMachine) -> None:
    assert end(k.plug()) == "became /sbin/init"
    (overlay,) = done(k, "mount_overlay")
    assert all("state" not in folder for folder in overlay[2])  # type: ignore[attr-defined]


def test_a_manifest_with_the_volume_state_starts_on_no_disk_without_it(
    organisation: Organisation, tpm: Swtpm, tmp_path: Path
) -> None:
    release = Release()
    storage = "storage:\n  - {label: state, persistent: true, size: 1G}\ntargets:\n"
    release.change_text = lambda text: text.replace("targets:\n", storage)
    (tmp_path / "git").mkdir()
    repository = Repository(tmp_path / "git")
    repository.add(42, release.manifest())
    for with_volume in (False, True):
        k = RunMachine(organisation, organisation.header(tmp_path), tpm)
        k.use(repository)
        k.rows[4] = (init.LINUX_TYPE, "state" if with_volume else "other")
        assert end(k.plug()) == ("became /sbin/init" if with_volume else "restart")
        assert k.framed()["failed"] == (None if with_volume else "VOLUME-STATE")
        tpm.reset()


def test_an_order_raises_the_epoch_and_never_above_the_uki(
    organisation: Organisation, tpm: Swtpm, tmp_path: Path
) -> None:
    names = ("order_statement", "order_signature", "order_certificate")
    header = organisation.header(tmp_path, **dict(zip(names, organisation.order(9), strict=True)))
    k = RunMachine(organisation, header, tpm)
    k.files["/etc/mosinit/policy.json"] = policy_json(mode="run", epoch=2)
    k.files[init.APPROVAL_FILE] = organisation.approval(2)
    end(k.plug())
    assert k.report.facts["tpm_epoch"] == 2
    assert init.read_epoch(k.real) == 3
    # The UKI of epoch 1 opens nothing from here on.
    tpm.reset()
    old = RunMachine(organisation, header, tpm)
    assert end(old.plug()) == "restart"
    assert (old.framed()["failed"], opened(old)) == ("EPOCH", [])


def test_old_approvals_put_back_keep_no_tpm_from_its_epoch(
    organisation: Organisation, tpm: Swtpm, tmp_path: Path
) -> None:
    """Approvals are public, and the header is nobody's word: with those of epoch 1 nothing opens."""
    names = ("order_statement", "order_signature", "order_certificate")
    changes = dict(zip(names, organisation.order(2), strict=True))
    for epoch in (1, 2):
        approvals = organisation.material.platform(epoch=epoch)
        header = organisation.header(tmp_path, **changes, approvals=approvals)
        k = RunMachine(organisation, header, tpm)
        k.files["/etc/mosinit/policy.json"] = policy_json(mode="run", epoch=2)
        k.files[init.APPROVAL_FILE] = organisation.approval(2)
        end(k.plug())
        assert (k.framed()["failed"] == "TPM-APPROVAL") == (epoch == 1)
        assert init.read_epoch(k.real).bit_length() == epoch
        tpm.reset()


def test_a_tpm_that_disappears_once_it_was_measured_into_is_no_fence(k: RunMachine) -> None:
    answer = k.real.tpm

    def without_sha256(command: bytes) -> bytes:
        unsealed = any(op[0] == "tpm" and op[1][6:10] == b"\0\0\x01\x5e" for op in k.ops)  # type: ignore[index]
        banks = command[6:] == struct.pack(">IIII", init.Cc.GET_CAPABILITY, 5, 0, 1)
        return answer_with_banks("sha1") if unsealed and banks else answer(command)

    k.real.tpm = without_sha256  # type: ignore[method-assign]
    assert end(k.plug()) == "power_off"
    assert (k.framed()["failed"], k.framed()["fenced"]) == ("TPM-FENCE", False)
    assert not done(k, "open_luks")


def answer_with_banks(*banks: str) -> bytes:
    """Encode what a TPM says of its PCR banks."""
    rows = [struct.pack(">HB3s", init.TPM_ALGORITHMS[bank], 3, b"\xff" * 3) for bank in banks]
    return answer(b"\0" + struct.pack(">II", 5, len(rows)) + b"".join(rows))


# --- What is refused before anything is opened ----------------------------------------------------------


def flip(name: str, at: int) -> Change:
    def change(k: RunMachine) -> None:
        data = bytearray(k.contents[name])
        data[at] ^= 1
        k.contents[name] = bytes(data)

    return change


def rows(number: int, *kinds: tuple[str, str]) -> Change:
    return lambda k: k.rows.__setitem__(slice(number, number + 1), kinds)


CONFIG_ROW = (init.CONFIG_TYPE, "machine-config")
BEFORE: list[tuple[str, Change]] = [
    ("DISK-PARTITION", rows(1)),
    ("DISK-PARTITION", rows(5, CONFIG_ROW)),
    ("LUKS-HEADER", lambda k: k.contents.update(vda2=bytes(8 << 20))),
    ("LUKS-HEADER", flip("vda2", init.LUKS_DATA + 24)),
    ("TPM-APPROVAL", lambda k: k.files.pop(init.APPROVAL_FILE)),
    ("TPM-APPROVAL", lambda k: k.files.update({init.APPROVAL_FILE: b"{}"})),
    ("TPM-POLICY", lambda k: init.extend_pcr(k.real, init.Pcr(7), b"another boot loader")),
    ("RECORD-PRODUCT", lambda k: k.files.update({"/etc/mosinit/policy.json": policy_json(
        mode="run", product=PRODUCT[:-1] + "b")})),
]  # fmt: skip


@pytest.mark.parametrize(("check", "change"), BEFORE, ids=[f"{n}-{c}" for n, (c, _) in enumerate(BEFORE)])
def test_refused_before_anything_is_opened(k: RunMachine, check: str, change: Change) -> None:
    change(k)
    refused_unopened(k, check)


def refused_unopened(k: RunMachine, check: str) -> None:
    assert end(k.plug()) == "restart"
    report = k.framed()
    assert (report["result"], report["failed"], report["fenced"]) == ("refused", check, True)
    assert (opened(k), k.secrets) == ([], {})
    keys_are_gone(k)


def test_tokens_that_others_made(organisation: Organisation, tpm: Swtpm, tmp_path: Path) -> None:
    material = organisation.material
    foreign = {"ab" * 32: init.PlatformApproval(1, material.sign("platform", b"another"))}
    cases: list[tuple[str, dict[str, object]]] = [
        ("RECORD-FORMAT", {"record": b"x"}),
        ("RECORD-SIGNATURE", {"record": organisation.record(key=P256)}),
        ("TPM-IDENTITY", {"record": organisation.record(storage_key=b"\0\x0b" + bytes(32))}),
        ("TPM-INDEX", {"record": organisation.record(epoch_index=b"\0\x0b" + bytes(32))}),
        ("VOLUME-IDENTITY", {"record": organisation.record(secret_proof=bytes(32))}),
        ("EPOCH-ORDER", {"order_signature": b"x"}),
        ("TPM-POLICY", {"approvals": foreign}),
        (
            "TPM-APPROVAL",
            {"approvals": dict.fromkeys(material.platform(), init.PlatformApproval(1, bytes(256)))},
        ),
        ("TPM-SEAL", {"seal_private": bytes(len(material.seal.private))}),
    ]
    for check, changes in cases:
        refused_unopened(RunMachine(organisation, organisation.header(tmp_path, **changes), tpm), check)
        tpm.reset()


def test_live_mode_asks_the_tpm_for_nothing(k: RunMachine) -> None:
    k.files["/etc/mosinit/policy.json"] = policy_json()
    refused_unopened(k, "DISK-PARTITION")
    asked = {int.from_bytes(op[1][6:10], "big") for op in done(k, "tpm")}  # type: ignore[index]
    assert asked == {init.Cc.GET_CAPABILITY, init.Cc.PCR_READ, init.Cc.PCR_EXTEND}


# --- What is refused behind the fence -------------------------------------------------------------------


BEHIND: list[tuple[str, Change]] = [
    ("VOLUME-KEY", lambda k: k.fail("open mosinit-config")),
    ("VOLUME-KEY", lambda k: k.fail("open mosinit-store")),
    ("VOLUME-KEY", lambda k: k.fail("open mosinit-state")),
    ("VOLUME-READ", lambda k: k.fail("mount /config")),
    ("VOLUME-READ", lambda k: k.fail("mount /atomfs-cache")),
    ("VOLUME-READ", lambda k: k.fail("mount /scratch-writes")),
    ("VOLUME-READ", lambda k: k.fail("mount /sysroot/var")),
    ("VOLUME-READ", lambda k: k.fail("format_ext4")),
    ("VOLUME-READ", lambda k: k.fail("dm TABLE_LOAD mosinit-scratch")),
    ("LUKS-HEADER", lambda k: k.contents.update(vda3=bytes(volumes.BYTES))),
    ("DISK-PARTITION", rows(2)),
    ("DISK-PARTITION", rows(3, (init.LINUX_TYPE, "no scratch"))),
    ("DISK-PARTITION", rows(5, (init.LINUX_TYPE, "state"))),
    ("OVERLAY-MOUNTPOINT", lambda k: k.becomes_link("/sysroot/var")),
    ("OVERLAY-MOUNTPOINT", lambda k: k.becomes_link("/sysroot/config")),
    ("VOLUME-STATE", lambda k: (k.files.update({init.STATE_MARK: b""}), rows(4)(k))),
    *(
        ("VOLUME-READ", lambda k, bad=bad: k.superblock.update(config=bad))
        for bad in (
            superblock(magic=0),
            superblock(errors=3),
            superblock(incompatible=0x2CA),
            superblock(journal=9),
            superblock(device=0x701),
            superblock(options=b"journal_path=/dev/vda1"),
        )
    ),
    *(
        ("VOLUME-READ", lambda k, name=name: k.superblock.update({name: superblock(device=0x701)}))
        for name in ("store", "state")
    ),
    ("VOLUME-READ", lambda k: k.files.update({"/config/state/etc/machine-id": bytes(16385)})),
    ("GIT-REF", lambda k: k.files.pop(f"{init.MANIFEST_GIT}/refs/heads/main")),
    ("GENERATION", lambda k: k.files.update({"/etc/mosinit/uki-id": b"cd" * 32})),
]


@pytest.mark.parametrize(("check", "change"), BEHIND, ids=[f"{n}-{c}" for n, (c, _) in enumerate(BEHIND)])
def test_refused_behind_the_fence(k: RunMachine, check: str, change: Change) -> None:
    change(k)
    assert end(k.plug()) == "restart"
    report = k.framed()
    assert (report["result"], report["failed"], report["fenced"]) == ("refused", check, True)
    keys_are_gone(k)
    assert not done(k, "become", "enter_root")


@pytest.mark.parametrize("method", ["open_luks", "add_key", "dm"])
def test_a_crash_among_open_secrets_leaves_none(k: RunMachine, method: str) -> None:
    k.fail(method, RuntimeError("cannot happen"))
    assert end(k.plug()) == "restart"
    keys_are_gone(k)
    assert k.framed()["fenced"] is True
