"""What firmware, TPM, boot partition and command line decide of an installed machine, from power-on.

Nothing that is wrong there opens the disk, and nothing asks a person for a passphrase that would.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from installed import (
    Change,
    Installed,
    boot_options,
    place,
    put_files,
    put_tpm,
    with_tokens,
)
from world import GOOD_HOSTFS, World, check_closed, make_cpio

from mosinit import (
    approvals,
    approve,
    eventlog,
    exchange,
    firmware,
    images,
    init,
    keys,
    pe,
    reseal,
    tools,
    uki,
    vm,
)
from mosinit.console import Report
from mosinit.host import Host
from mosinit.machine import VARIABLES, Hardware
from tests import sealed
from tests.eventlogs import encode_log
from tests.tpms import Swtpm


def check_pivoted(outcome: vm.Outcome) -> Report:
    """Expect that the machine is up; return its report."""
    console = outcome.console.read_text(errors="replace")
    assert outcome.status == 0, console[-3000:]
    assert outcome.report is not None
    assert "passphrase" not in console.lower()
    return outcome.report


def start(machine: Installed, folder: Path, disk: Path | None = None, **hardware: object) -> vm.Outcome:
    """Boot a machine of which `folder` may hold the state already; no disk keeps anything."""
    state = folder / "state"
    if not state.exists():
        shutil.copytree(machine.state, state)
    switches = Hardware(snapshot=True, **hardware)  # type: ignore[arg-type]
    return vm.boot(machine.world.host, boot_options(disk or machine.disk, state, switches))


# --- The TPM -----------------------------------------------------------------------------------------------


@pytest.mark.cold
def test_no_tpm(machine: Installed, tmp_path: Path) -> None:
    # There is nothing that could be fenced, or unseal.
    check_closed(start(machine, tmp_path, tpm=False), "TPM-ABSENT", fenced=False)


@pytest.mark.cold
def test_a_cleared_tpm(machine: Installed, tmp_path: Path) -> None:
    shutil.copytree(machine.state, tmp_path / "state")
    with sealed.copy_of(machine.material, tmp_path / "tpm") as tpm:
        tpm.clear()
    put_tpm(tmp_path / "tpm", tmp_path / "state")
    seen = check_closed(start(machine, tmp_path), "TPM-CLEARED")
    assert seen.startswith("none, ")


# --- Another TPM, other firmware variables, another signer of the UKI --------------------------------------


@dataclass(frozen=True)
class Changed:
    """The machine after somebody had it: its TPM cleared and provisioned anew, an entry more in dbx, and
    its UKI signed by the layer key. What lies in config's header decides how far it gets.
    """

    machine: Installed
    folder: Path
    seal: sealed.Seal  # the machine's own secret, sealed to the new TPM
    storage_key: bytes

    @property
    def dbx(self) -> bytes:
        """An EFI_CERT_SHA256 list of two entries: the one that was there, and one more."""
        head, entry = firmware.EMPTY_DBX[:28], firmware.EMPTY_DBX[28:]
        more = entry[:16] + hashlib.sha256(b"a boot loader that was revoked").digest()
        size = (len(head) + len(entry) + len(more)).to_bytes(4, "little")
        return head[:16] + size + head[20:] + entry + more

    def events(self, *signers: str) -> list[eventlog.Event]:
        """Return what the firmware measures where what was started was signed by these keys, one after the
        other.
        """
        keyset = self.machine.world.keyset
        trusted = firmware.certificates_of_keyset(keyset.folder)
        *before, authority = approvals.platform_events(trusted, self.dbx)
        for signer in signers:
            entry = keyset.certificate(signer).public_bytes(Encoding.DER)
            content = uuid.UUID(firmware.OWNER).bytes_le + entry
            data = eventlog.encode_variable(eventlog.Variable(eventlog.DB, content))
            before.append(authority._replace(digest=hashlib.sha256(data).digest(), data=data))
        return before

    def pcr7(self, *signers: str) -> bytes:
        """Return PCR 7 of these events."""
        return eventlog.replay(self.events(*signers), eventlog.PLATFORM)

    def before(self) -> list[eventlog.Event]:
        """Return what the firmware measured before somebody had the machine."""
        trusted = firmware.certificates_of_keyset(self.machine.world.keyset.folder)
        return list(approvals.platform_events(trusted, firmware.EMPTY_DBX))

    def approved_in_advance(self, folder: Path) -> exchange.Approvals:
        """Return what `mosinit approve` writes about the new dbx, from the log of the time before."""
        (folder / "log").write_bytes(encode_log(self.before()))
        (folder / "dbx").write_bytes(self.dbx)
        options = approve.Options([folder / "log"], changes={"dbx": folder / "dbx"}, epoch=init.MAX_EPOCH)
        world = self.machine.world
        approve.approve(world.host, world.keyset, folder / "approvals", options)
        return exchange.parse_approvals((folder / "approvals").read_bytes(), "approvals")

    def sealed_again(self, *signers: str, laid: exchange.Approvals | None = None) -> Change:
        """Seal the disk to the new TPM; approve PCR 7 of these signers, or only what was approved before, or
        lay what is given as a machine does.
        """

        def tokens_of(machine: Installed, tokens: init.Tokens) -> init.Tokens:
            approved = dict(tokens.approvals)
            if signers:
                value = self.pcr7(*signers)
                keyset = machine.world.keyset
                approved[value.hex()] = approvals.approve_platform(keyset, value, init.MAX_EPOCH)
            if laid:
                approved = dict(laying(machine, tokens, laid).approvals)
            record = machine.record(storage_key=self.storage_key)
            public, private = self.seal
            return tokens._replace(
                seal_public=public, seal_private=private, record=record, approvals=approved
            )

        return with_tokens(tokens_of)

    def go_on(self, folder: Path, change: Change | None = None) -> vm.Outcome:
        """Let it go on with a changed copy of its disk; with --cold, from power-on."""
        host, disk = self.machine.world.host, self.machine.copy_disk(folder, change)
        self.machine.put_uki(disk, self.folder / "layer.efi")
        options = boot_options(disk, folder / "state", Hardware(snapshot=True))
        if self.machine.world.cold:
            shutil.copytree(self.folder / "state", options.folder)
            return vm.boot(host, options)
        return vm.restore(host, self.folder / "saved", options)


def laying(machine: Installed, tokens: init.Tokens, laid: exchange.Approvals) -> init.Tokens:
    """Return the tokens of a machine that took approvals."""
    policy = keys.trust(machine.world.keyset.product, keys.open_organisation(organisation(machine)).files)
    fresh = {each.pcr7.hex(): init.PlatformApproval(each.epoch, each.signature) for each in laid.approvals}
    return tokens._replace(approvals=reseal.merge(tokens, policy, fresh))


def organisation(machine: Installed) -> Path:
    """Return the public parts of the machine's keyset."""
    folder = machine.folder / "organisation"
    if not folder.exists():
        keys.export(machine.world.host, machine.world.keyset.folder, folder)
    return folder


def provision_again(tpm: Swtpm, secret: bytes) -> tuple[sealed.Seal, bytes]:
    """Clear a TPM, provision it, seal a secret to it; return that and the new storage key's name."""
    tpm.clear()
    sealed.make_storage_key(tpm)
    sealed.make_epoch_index(tpm)
    made = sealed.seal(tpm, secret)
    sealed.take_ownership(tpm)
    told = tpm.run("tpm2_readpublic", "-c", sealed.SRK, "-n", "srk.name").decode()
    return made, bytes.fromhex(told.split()[1])


def sign_by(machine: Installed, signer: str, target: Path) -> None:
    """Take the signature off the machine's UKI and sign it by another key."""
    host = machine.world.host
    shutil.copy(machine.uki.path, target)
    host.run(["sbattach", "--remove", target])
    machine.world.keyset.signer(signer).sign_pe(target, target)
    certificate = machine.world.keyset.certificate_path(signer)
    host.run(["sbverify", "--cert", certificate, target])


@pytest.fixture(scope="module")
def changed(machine: Installed, tmp_path_factory: pytest.TempPathFactory) -> Changed:
    """That machine, saved at the first line of its bring-up."""
    folder, world = tmp_path_factory.mktemp("changed"), machine.world
    with sealed.copy_of(machine.material, folder / "tpm") as tpm:
        made = Changed(machine, folder, *provision_again(tpm, machine.material.secret))
    (folder / "state").mkdir()
    put_tpm(folder / "tpm", folder / "state")
    dbx = firmware.Variable("dbx", init.EFI_IMAGE_SECURITY, made.dbx, firmware.NV_BS_RT_TIMED)
    trusted = firmware.certificates_of_keyset(world.keyset.folder)
    firmware.enroll(world.host, folder / "state" / VARIABLES, trusted, variables=(dbx,))
    sign_by(machine, "layer", folder / "layer.efi")
    if not world.cold:
        disk = machine.copy_disk(folder)
        machine.put_uki(disk, folder / "layer.efi")
        vm.save(world.host, boot_options(disk, folder / "state", Hardware(snapshot=True)), folder / "saved")
        disk.unlink()
    return made


def test_a_tpm_that_was_cleared_and_provisioned_by_somebody(changed: Changed, tmp_path: Path) -> None:
    seen = check_closed(changed.go_on(tmp_path), "TPM-IDENTITY")
    assert seen.startswith(changed.storage_key.hex())


def explained(
    changed: Changed, outcome: vm.Outcome, folder: Path, approved: list[eventlog.Event]
) -> list[str]:
    """Return what `explain` names, from the console of a refused boot, and logs of it and of a good one."""
    logs = {"now": changed.events("uki", "layer"), "good": approved}
    for name, events in logs.items():
        (folder / name).write_bytes(encode_log(events))
    words = ["--event-log", str(folder / "now"), "--against", str(folder / "good"), "--json"]
    command = [sys.executable, "-m", "mosinit", "explain", str(outcome.console), *words]
    told = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=tools.checkout()).stdout)
    assert (told["failed"], told["refused"]["seen"]) == ("TPM-POLICY", changed.pcr7("uki", "layer").hex())
    return [each["what"] for each in told["differences"]]


def test_other_firmware_variables_without_approval(changed: Changed, tmp_path: Path) -> None:
    outcome = changed.go_on(tmp_path, changed.sealed_again())
    assert check_closed(outcome, "TPM-POLICY") == changed.pcr7("uki", "layer").hex()
    dbx, loader = explained(changed, outcome, tmp_path, changed.before())
    assert dbx.startswith("dbx changed: 1 entry added: program ")
    assert loader.startswith("something more was started, verified by the entry of db: certificate ")


def test_a_uki_signed_by_the_layer_key(changed: Changed, tmp_path: Path) -> None:
    """The firmware starts it, and what it trusts was approved in advance: but not that it started this."""
    approved = changed.approved_in_advance(tmp_path)
    assert [each.pcr7 for each in approved.approvals] == [changed.pcr7("uki")]
    outcome = changed.go_on(tmp_path, changed.sealed_again(laid=approved))
    assert check_closed(outcome, "TPM-POLICY") == changed.pcr7("uki", "layer").hex()
    (loader,) = explained(changed, outcome, tmp_path, changed.events("uki"))
    assert loader.startswith("something more was started, verified by the entry of db: certificate ")


def test_the_same_machine_once_its_state_is_approved(changed: Changed, tmp_path: Path) -> None:
    """Nothing else was wrong with it. No organisation would approve the layer key's part."""
    check_pivoted(changed.go_on(tmp_path, changed.sealed_again("uki", "layer")))


# --- db changes ------------------------------------------------------------------------------------------


def under_another_owner(machine: Installed) -> bytes:
    """Return the content of a db with the same two certificates, which somebody else's tool enrolled.

    No boot takes other certificates; but their owner is measured too.
    """
    trusted = firmware.certificates_of_keyset(machine.world.keyset.folder)
    ours, others = uuid.UUID(firmware.OWNER).bytes_le, uuid.uuid5(uuid.NAMESPACE_DNS, "another").bytes_le
    return b"".join(firmware.signature_list(each).replace(ours, others) for each in trusted.db)


def approved_before(machine: Installed, folder: Path, db: bytes) -> exchange.Approvals:
    """Return what `mosinit approve` writes about a signed update of db, from the log of the time before."""
    world = machine.world
    trusted = firmware.certificates_of_keyset(world.keyset.folder)
    (folder / "log").write_bytes(encode_log(approvals.platform_events(trusted, firmware.EMPTY_DBX)))
    (folder / "db.auth").write_bytes(firmware.signed_update(world.keyset.signer("KEK"), "db", db))
    options = approve.Options([folder / "log"], changes={"db": folder / "db.auth"}, epoch=init.MAX_EPOCH)
    approve.approve(world.host, world.keyset, folder / "approvals", options)
    return exchange.parse_approvals((folder / "approvals").read_bytes(), "approvals")


@pytest.mark.cold
def test_another_db_opens_the_disk_only_if_it_was_approved_before(
    machine: Installed, tmp_path: Path
) -> None:
    db = under_another_owner(machine)
    laid = approved_before(machine, tmp_path, db)
    (wanted,) = laid.approvals
    changed = firmware.Variable("db", init.EFI_IMAGE_SECURITY, db, firmware.NV_BS_RT_TIMED)
    trusted = firmware.certificates_of_keyset(machine.world.keyset.folder)
    for name in ("without", "with"):
        shutil.copytree(machine.state, tmp_path / name / "state")
        (tmp_path / name / "state" / VARIABLES).unlink()
        firmware.enroll(
            machine.world.host, tmp_path / name / "state" / VARIABLES, trusted, variables=(changed,)
        )
    assert check_closed(start(machine, tmp_path / "without"), "TPM-POLICY") == wanted.pcr7.hex()
    disk = machine.copy_disk(tmp_path / "with", with_tokens(lambda m, tokens: laying(m, tokens, laid)))
    report = check_pivoted(start(machine, tmp_path / "with", disk))
    assert report["sequence"] == machine.sequence


# --- An older system ---------------------------------------------------------------------------------------


def next_epoch(world: World, folder: Path, machine: Installed) -> Installed:
    """Return the disk of the same machine with a UKI, a release and an order of epoch 2."""
    host, keyset, kernel = world.host, world.keyset, world.bootable.kernel
    # One byte of the policy is all that a build of epoch 2 changes in an initrd, and packing it takes long.
    built = world.bootable.initrds["run"]
    archive = host.run(["zstd", "-dcq", built.path])
    assert archive.count(b'"epoch": 1,') == 1
    packed = folder / "run.cpio.zst"
    newer_archive = archive.replace(b'"epoch": 1,', b'"epoch": 2,')
    packed.write_bytes(host.run(["zstd", "-3", "-cq"], stdin=newer_archive))
    newer = uki.build(host, kernel, replace(built, path=packed), keyset, folder / "run.efi")
    uki.bootkit(host, kernel, {"run": newer}, images.Layout(world.folder / "epoch-2-bootkit"))
    release = world.release("epoch-2", GOOD_HOSTFS, epoch=2, sequence=8, bootkit="epoch-2-bootkit")
    disk = Installed(world, folder / "machine", release, sequence=8, given=newer)
    disk.folder.mkdir()
    disk.material, disk.foreign = machine.material, machine.foreign
    disk.write_disk(disk.tokens())
    return disk


@pytest.mark.cold
def test_an_older_system_after_the_epoch_was_raised(
    world: World, machine: Installed, tmp_path: Path
) -> None:
    """All of the old disk is put back: UKI, generation, store, and the header with its older order."""
    newer = next_epoch(world, tmp_path, machine)
    report = check_pivoted(start(machine, tmp_path, newer.disk))
    assert (report["epoch"], report["tpm_epoch"], report["sequence"]) == (2, 2, 8)
    assert report["uki_id"] == newer.uki.uki_id
    assert check_closed(start(machine, tmp_path), "EPOCH") == "epoch 2"


# --- What lies on the boot partition beside the UKI, and what the hypervisor says --------------------------


def addon(host: Host, machine: Installed, folder: Path, *words: str) -> bytes:
    """Make an add-on of the boot stub, signed by the layer key."""
    target = folder / "made.addon.efi"
    stub = uki.STUB.with_name("addonx64.efi.stub")
    host.run(["ukify", "build", f"--stub={stub}", "--efi-arch=x64", *words, f"--output={target}"])
    machine.world.keyset.signer("layer").sign_pe(target, target)
    return target.read_bytes()


@pytest.mark.cold
def test_credentials_extensions_and_an_addon(world: World, machine: Installed, tmp_path: Path) -> None:
    (tmp_path / "more.cpio").write_bytes(make_cpio(world.host, {"etc/planted": b"planted\n"}))
    extra = f"{machine.uki_place}.extra.d"
    files = {
        f"{extra}/x.cred": b"a credential",
        f"{extra}/x.raw": b"a system extension",
        f"{extra}/x.confext.raw": b"a configuration extension",
        f"{extra}/x.addon.efi": addon(world.host, machine, tmp_path, f"--initrd={tmp_path / 'more.cpio'}"),
        "loader/credentials/y.cred": b"a credential for all",
    }
    disk = machine.copy_disk(tmp_path, lambda _, path: put_files(world.host, path, files))
    seen = check_closed(start(machine, tmp_path, disk), "ESP-EXTRA").split(", ")
    folders = [f"/.extra/{name}" for name in ("confext", "credentials", "global_credentials", "sysext")]
    assert seen == [*folders, "PCR 12", "PCR 13"]


@pytest.mark.cold
def test_words_for_the_kernel_from_an_addon_and_the_hypervisor(
    world: World, machine: Installed, tmp_path: Path
) -> None:
    """A credential of the hypervisor's, beside them, does nothing: see the good boot."""
    files = {
        f"{machine.uki_place}.extra.d/x.addon.efi": addon(
            world.host, machine, tmp_path, "--cmdline=init=/x addon"
        )
    }
    disk = machine.copy_disk(tmp_path, lambda _, path: put_files(world.host, path, files))
    smbios = ("io.systemd.stub.kernel-cmdline-extra=LD_PRELOAD=/x hypervisor",)
    seen = check_closed(start(machine, tmp_path, disk, smbios=smbios), "CMDLINE")
    assert seen.startswith(uki.CMDLINE)
    added = seen.removeprefix(uki.CMDLINE).split()
    assert sorted(added) == ["LD_PRELOAD=/x", "addon", "hypervisor", "init=/x"]


ENTRY = b"""title a foreign initrd
linux /vmlinuz
initrd /foreign
options console=ttyS0,115200
"""


@pytest.mark.cold
def test_the_kernel_of_the_uki_with_a_foreign_initrd(
    world: World, machine: Installed, tmp_path: Path
) -> None:
    whole = machine.uki.path.read_bytes()
    files = {
        "vmlinuz": pe.parse(whole).section(whole, ".linux"),
        "foreign": make_cpio(world.host, {"init": GOOD_HOSTFS["sbin/init"]}),
        "loader/entries/foreign.conf": ENTRY,
        "loader/loader.conf": b"timeout 0\ndefault foreign.conf\n",
    }
    disk = machine.copy_disk(tmp_path, lambda _, path: put_files(world.host, path, files))
    outcome = start(machine, tmp_path, disk)
    console = outcome.console.read_text(errors="replace")
    assert (outcome.status, outcome.report) == (1, None), console[-3000:]
    assert "Error loading \\vmlinuz: Access denied" in console
    assert not {"kernel", "start"} & set(outcome.marks)
    accepted = check_boot_partition(world, machine, disk)
    assert accepted == {"UKI", "systemd-boot"}


def check_boot_partition(world: World, machine: Installed, disk: Path) -> set[str]:
    """Return the kinds of programs that db accepts on a disk's boot partition."""
    begin, size = place(machine, "esp")
    esp = disk.with_name("esp")
    with disk.open("rb") as file:
        file.seek(begin)
        esp.write_bytes(file.read(size))
    db = [world.keyset.certificate_path(role) for role in ("uki", "layer")]
    found = uki.check_signed_binaries(world.host, [esp], db)
    assert any("vmlinuz" in binary.place and not binary.accepted for binary in found)
    return {binary.kind for binary in found if binary.accepted}


# --- Two disks ---------------------------------------------------------------------------------------------


def with_other_ids(disk: Path) -> Path:
    """Copy a disk and give it and its partitions ids of their own; types and labels stay."""
    copy = disk.with_name("other.raw")
    host = Host()
    host.run(["cp", "--sparse=always", disk, copy])
    for number in range(1, 6):
        words = ["sfdisk", "--quiet", "--no-reread", "--part-uuid", str(copy), str(number)]
        host.run([*words, str(uuid.uuid4())])
    host.run(["sfdisk", "--quiet", "--no-reread", "--disk-id", copy, str(uuid.uuid4())])
    return copy


def test_beside_a_disk_with_other_ids_it_boots_from_its_own(machine: Installed, tmp_path: Path) -> None:
    report = check_pivoted(machine.go_on(tmp_path, second=with_other_ids))
    assert report["sequence"] == machine.sequence


def test_beside_its_own_clone_it_does_not_boot(machine: Installed, tmp_path: Path) -> None:
    outcome = machine.go_on(tmp_path, second=lambda disk: disk)
    assert check_closed(outcome, "DISK-AMBIGUOUS") == "on vdb too"
