"""What an installed machine says of itself and writes about itself, on a disk that was installed here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mosinit import approvals, exchange, generations, images, init, installed, lastgood, layout, luks
from mosinit.generations import Quiet
from mosinit.host import Failure, Host
from tests import installation, sealed
from tests.eventlogs import encode_log, measured
from tests.fake import policy_json
from tests.installation import TOOLS, NativeInstaller, Setting
from tests.test_layout import loop
from tests.tpms import TpmMachine


class Machine(Quiet):
    """A machine whose disk vdz is a loop device, with what its firmware says."""

    def __init__(self, disk: Path, esp: str, entry: str) -> None:
        super().__init__()
        self.disk = disk
        self.variables = {"LoaderDevicePartUUID": esp.upper(), "LoaderEntrySelected": entry}

    def _real(self, path: str) -> str:
        return path.replace("vdz", self.disk.name)

    def names(self, path: str) -> list[str]:
        """List a folder."""
        found = ["vdz"] if path == "/sys/block" else super().names(self._real(path))
        return [name.replace(self.disk.name, "vdz") for name in found]

    def exists(self, path: str) -> bool:
        """Say whether there is such a file; there is no TPM."""
        return path != init.TPM_SYSFS and super().exists(self._real(path))

    def read(self, path: str, limit: int = init.MIB) -> bytes:
        """Read a file."""
        return super().read(self._real(path), limit)

    def open_device(self, path: str) -> int:
        """Open a device."""
        return super().open_device(self._real(path))

    def efi_read(self, name: str, guid: str) -> tuple[int, bytes] | None:
        """Return what the boot loader left."""
        value = self.variables.get(name)
        return None if value is None else (6, (value + "\0").encode("utf-16-le"))


@dataclasses.dataclass(frozen=True)
class Running:
    """An installed machine that runs."""

    setting: Setting
    disk: Path
    machine: Machine
    paths: installed.Paths
    commit: str


@pytest.fixture(scope="module")
def installed_disk(made: Setting) -> Iterator[Path]:
    """A disk that was installed once for all tests; they copy it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        with loop(Path(folder, "disk")) as device:
            installation.run(NativeInstaller(), made, device)
        yield Path(folder, "disk")


@pytest.fixture
def running(
    made: Setting,
    installed_disk: Path,
    need: Callable[..., None],
    host: Host,
    tmp_path: Path,
    memory: Path,
) -> Iterator[Running]:
    need(*TOOLS)
    host.run(["cp", "--sparse=always", installed_disk, memory / "disk"])
    shutil.copytree(made.left, tmp_path / "left")
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(loop(memory / "disk"))
        host.run(["partx", "--update", device])
        data = stack.enter_context(installation.data_behind(Path(f"{device}p2")))
        config = stack.enter_context(host.mounted(data, "ext4"))
        (only,) = generations.list_all(config / "manifest.git", made.keyset.product)
        path = tmp_path / "left/report.json"
        report = json.loads(path.read_text()) | {"mode": "run", "generation": only.commit, "sequence": 7}
        path.write_text(json.dumps({**report, "uki_id": only.uki}))
        policy = policy_json(mode="run", product=made.keyset.product)
        (tmp_path / "left/policy.json").write_bytes(policy)
        shutil.copytree(made.release, tmp_path / "store" / init.REPOSITORY)
        esp = partitions(device)[0].uuid
        machine = Machine(device, esp, "mosinit_7+2-1.efi")
        paths = installed.Paths(
            tmp_path / "left", config, tmp_path / "store", tmp_path / "log", tmp_path / "lock"
        )
        yield Running(made, device, machine, paths, only.commit)


def partitions(device: Path) -> tuple[init.Partition, ...]:
    with device.open("rb") as file:
        file.seek(512)
        head = file.read(512 + 16384)
    return init.parse_gpt(head[:512], head[512:], 512, layout.SMALLEST // 512)


def test_what_runs_and_from_where(running: Running, host: Host) -> None:
    told = installed.status(host, running.paths, running.machine)
    wanted = {
        "mode": "run",
        "product": running.setting.keyset.product,
        "sequence": 7,
        "epoch": 1,
        "entry": "mosinit_7+2-1.efi",
        "tpm": {"present": False},
        "config": f"{running.disk}p2",
        "epoch order": 1,
        "approved firmware states": [
            {"pcr7": name * 8, "epoch": 2, "in force": False} for name in ("ab", "00")
        ],
        "generation": running.commit,
        "good": False,
        "previous refusal": None,
        "report": json.loads((running.paths.left / "report.json").read_text()),
    }
    assert {name: told[name] for name in wanted} == wanted
    assert told["uki"] == json.loads((running.paths.left / "report.json").read_text())["uki_id"]
    kept = (running.paths.config / "state/etc/machine-id").read_text()
    assert f"{told['machine id']}\n" == kept
    path = running.paths.config / "state/etc/machine-id"
    for content in (b"\xff\xfe", b"\x1b[2J", b"x" * 100, b""):
        path.write_bytes(content)
        assert installed._read_machine_id(path) is None
    path.write_text(kept)
    generations.mark_good(host, running.paths.repository, running.commit)
    again = installed.status(host, running.paths, running.machine)
    rows = [{"sequence": 7, "generation": running.commit, "runs": True, "good": True}]
    assert (again["good"], again["generations"]) == (True, rows)


def test_the_state_of_the_tpm(need: Callable[..., None], tmp_path: Path) -> None:
    need("swtpm", "tpm2_createprimary")
    material = sealed.provision(tmp_path / "tpm")
    with sealed.copy_of(material, tmp_path / "copy") as tpm:
        machine = TpmMachine(tpm)
        key = material.record.storage_key.hex()
        wanted = {"present": True, "provisioned": True, "locked out": False, "storage key": key, "epoch": 1}
        assert installed.describe_tpm(machine) == wanted
        tpm.clear()
        cleared = {**wanted, "provisioned": False, "storage key": None, "epoch": None}
        assert installed.describe_tpm(machine) == cleared


def test_a_live_system_says_that_it_is(made: Setting, host: Host, tmp_path: Path) -> None:
    left = installation.make_left(tmp_path / "left", made.keyset)
    paths = installed.Paths(left)
    told = installed.status(host, paths, Machine(tmp_path, "", ""))
    assert (told["mode"], "generation" in told) == ("live", False)
    with pytest.raises(Failure, match="this is a live system"):
        installed.boot_good(host, paths)
    with pytest.raises(Failure, match="was not started by mosinit"):
        installed.status(host, installed.Paths(tmp_path / "none"))


# --- boot-good -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [("mosinit_7+3.efi",), ("mosinit_7+2-1.efi",), ("mosinit_7.efi",),
     ("mosinit_7.efi", "mosinit_7+1-2.efi"), ("mosinit_7+0-3.efi", "mosinit_8+3.efi", "mosinit_77+3.efi")],
)  # fmt: skip
def test_the_uki_loses_its_counter(names: tuple[str, ...], host: Host, tmp_path: Path) -> None:
    folder = tmp_path / "EFI/Linux"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)
    for _ in range(2):
        assert installed.bless(host, tmp_path, 7) == "mosinit_7.efi"
        left = {path.name for path in folder.iterdir()}
        assert left == {"mosinit_7.efi"} | {name for name in names if not name.startswith("mosinit_7")} | (
            {"mosinit_77+3.efi"} & set(names)
        )
    assert (folder / "mosinit_7.efi").read_text() == names[-1 if len(names) == 2 else 0]


def test_a_uki_that_is_not_there(host: Host, tmp_path: Path) -> None:
    (tmp_path / "EFI/Linux").mkdir(parents=True)
    (tmp_path / "EFI/Linux/mosinit_8+3.efi").touch()
    with pytest.raises(Failure, match="install the release again"):
        installed.bless(host, tmp_path, 7)


class Proving(NativeInstaller):
    """An installed machine, whose mounts are those of the tests."""

    def unshare_mounts(self) -> None:
        """Stay in the tests' namespace."""
        self.steps.append("unshare mounts")


def test_a_good_boot_is_written_down_where_it_counts(running: Running) -> None:
    """The mark, the UKI's name, the order: and config is not writable any more."""
    host, device = Proving(), Path(f"{running.disk}p2")
    running.paths.event_log.write_bytes(encode_log([measured(7, 4, bytes(4))]))
    later(host, running, 3)
    done = []
    for _ in range(2):
        done.append(installed.boot_good(host, running.paths, running.machine))
        assert generations.is_good(running.paths.repository, running.commit)
        with host.mounted(Path(f"{running.disk}p1"), "vfat", read_only=True) as esp:
            assert [path.name for path in (esp / "EFI/Linux").iterdir()] == ["mosinit_7.efi"]
            assert (esp / lastgood.PLACE).read_bytes() == running.paths.event_log.read_bytes()
        tokens = luks.read_header(host, device, "config").tokens
        assert tokens
        assert json.loads(tokens.order_statement)["epoch"] == 3
        with pytest.raises(OSError, match="Read-only file system"):
            (running.paths.config / "new").touch()
    told = {"generation": running.commit, "sequence": 7, "uki": "mosinit_7.efi", "epoch order": 3}
    assert done == [told, told]
    assert host.steps == 2 * ["unshare mounts"]


def test_the_order_cuts_off_what_is_older_and_comes_last(running: Running) -> None:
    host, device = Proving(), Path(f"{running.disk}p2")
    later(host, running, 3)
    before = luks.read_header(host, device, "config")
    running.paths.event_log.unlink(missing_ok=True)
    with host.mounted(Path(f"{running.disk}p1"), "vfat") as esp:
        (esp / "EFI/Linux/mosinit_7+3.efi").unlink()
    with pytest.raises(Failure, match="install the release again"):
        installed.boot_good(host, running.paths, running.machine)
    assert luks.read_header(host, device, "config") == before


def test_the_order_of_the_release_goes_into_the_header(running: Running, host: Host) -> None:
    device, policy = Path(f"{running.disk}p2"), installed.running(running.paths).policy
    before = luks.read_header(host, device, "config")
    assert installed.lay_order(host, policy, running.paths, running.machine) == 1
    assert luks.read_header(host, device, "config") == before
    later(host, running, 3)
    assert installed.lay_order(host, policy, running.paths, running.machine) == 3
    after = luks.read_header(host, device, "config")
    assert after.tokens
    assert before.tokens
    order = (after.tokens.order_statement, after.tokens.order_signature, after.tokens.order_certificate)
    assert init.verify_epoch_order(*order, policy) == 3
    same = after.tokens._replace(
        order_statement=before.tokens.order_statement, order_signature=before.tokens.order_signature
    )
    assert (same, after.slots) == (before.tokens, before.slots)


def test_an_older_release_never_takes_an_order_back(running: Running, host: Host) -> None:
    policy = installed.running(running.paths).policy
    later(host, running, 5)
    installed.lay_order(host, policy, running.paths, running.machine)
    shutil.rmtree(running.paths.store / init.REPOSITORY)
    shutil.copytree(running.setting.release, running.paths.store / init.REPOSITORY)
    assert installed.lay_order(host, policy, running.paths, running.machine) == 5


def test_an_order_that_nobody_signed_is_not_laid(running: Running, host: Host) -> None:
    device, policy = Path(f"{running.disk}p2"), installed.running(running.paths).policy
    before = luks.read_header(host, device, "config")
    later(host, running, 3, signer="layer")
    with pytest.raises(init.Refused, match="EPOCH-ORDER"):
        installed.lay_order(host, policy, running.paths, running.machine)
    assert luks.read_header(host, device, "config") == before


# --- Approvals, and the event log ------------------------------------------------------------------------


def approved(running: Running, folder: Path, *names: int, epoch: int = 1) -> Path:
    """Write approvals of the values of PCR 7 that these numbers name."""
    keyset = running.setting.keyset
    rows = []
    for name in names:
        made = approvals.approve_platform(keyset, bytes([name]) * 32, epoch)
        rows.append(exchange.Approval(bytes([name]) * 32, made.epoch, made.signature, "a test"))
    key = init.tpm_name(approvals.policy_keys(keyset).platform)
    path = folder / "approvals.json"
    path.write_bytes(exchange.encode_approvals(exchange.Approvals(keyset.product, key, tuple(rows))))
    return path


def test_approvals_are_taken_before_the_change(
    running: Running, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "current_pcr7", lambda machine: "02" * 32)
    device, machine = Path(f"{running.disk}p2"), running.machine
    told = installed.take_approvals(host, approved(running, tmp_path, 2, 1), running.paths, machine)
    wanted = {"added": ["02" * 32, "01" * 32], "kept": [], "dropped": ["ab" * 32, "00" * 32]}
    assert told == {"config": device, **wanted, "in force": "02" * 32}
    rows = installed.status(host, running.paths, machine)["approved firmware states"]
    assert rows == [{"pcr7": name * 8, "epoch": 1, "in force": name == "02"} for name in ("02", "01")]
    # Fifteen more: that of now stays, whatever else goes.
    many = approved(running, tmp_path, *range(10, 25))
    told = installed.take_approvals(host, many, running.paths, machine)
    assert (told["kept"], told["dropped"]) == (["02" * 32], ["01" * 32])


def test_approvals_of_others_are_not_taken(running: Running, host: Host, tmp_path: Path) -> None:
    device = Path(f"{running.disk}p2")
    before = luks.read_header(host, device, "config")
    path = approved(running, tmp_path, 1)
    words = json.loads(path.read_text())
    words["approvals"][0]["pcr7"] = "03" * 32
    path.write_text(json.dumps(words))
    with pytest.raises(init.Refused, match="TPM-APPROVAL"):
        installed.take_approvals(host, path, running.paths, running.machine)
    assert luks.read_header(host, device, "config") == before


def test_a_live_system_takes_no_approvals(made: Setting, host: Host, tmp_path: Path) -> None:
    left = installation.make_left(tmp_path / "left", made.keyset)
    with pytest.raises(Failure, match="mosinit recover --reseal --approvals FILE"):
        installed.take_approvals(host, tmp_path / "none", installed.Paths(left), Machine(tmp_path, "", ""))


def test_the_event_log_on_the_boot_partition_is_found(running: Running) -> None:
    host = NativeInstaller()
    log = running.paths.event_log
    log.write_bytes(encode_log([measured(7, 4, bytes(4))]))
    with host.mounted(Path(f"{running.disk}p1"), "vfat") as esp:
        assert lastgood.keep(host, esp, log)
    assert lastgood.find(host, running.machine) == [("vdz", log.read_bytes())]
    assert [disk.name for disk in lastgood.installed_disks(running.machine)] == ["vdz"]
    with host.mounted(Path(f"{running.disk}p1"), "vfat") as esp:
        (esp / lastgood.PLACE).unlink()
    assert lastgood.find(host, running.machine) == []


def later(host: Host, running: Running, epoch: int, signer: str = "product") -> None:
    """Put a release of a later epoch into the store: as much of it as orders need."""
    keyset, store = running.setting.keyset, running.paths.store / init.REPOSITORY
    shutil.rmtree(store)
    made = images.Layout(store)
    statement = json.dumps(init.epoch_statement(keyset.product, epoch)).encode()
    blobs = {
        init.EPOCH_MEDIA_TYPE: statement,
        init.EPOCH_SIGNATURE_MEDIA_TYPE: keyset.signer(signer).sign(statement),
        init.CERTIFICATE_MEDIA_TYPE: keyset.certificate_path("product").read_bytes(),
    }
    layers = [made.add_blob(host, content, kind).json() for kind, content in blobs.items()]
    artefact = images.encode({"schemaVersion": 2, "layers": layers})
    index = images.index_of(
        [made.add_blob(host, artefact, images.MANIFEST_TYPE, artifact_type=init.RELEASE_ARTIFACT)]
    )
    made.write_index(host, [made.add_blob(host, images.encode(index), images.INDEX_TYPE)])
