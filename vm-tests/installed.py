"""An installed disk and the TPM of its machine, made here step by step from what the boot asks for.

The TPM is provisioned by tpm2-tools, the volumes are made by cryptsetup and mke2fs in User Mode Linux, and
manifest.git by git: none of it by the code that installs machines.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import pickle
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from world import World, part_of

from mosinit import approvals, disk, firmware, init, luks, vm
from mosinit.host import Host
from mosinit.machine import VARIABLES, Hardware
from mosinit.uki import Uki
from tests import sealed, uml

MIB = init.MIB
KINDS = {
    "esp": init.ESP_TYPE, "config": init.CONFIG_TYPE, "store": init.STORE_TYPE, "scratch": init.SCRATCH_TYPE,
    "state": init.LINUX_TYPE,
}  # fmt: skip
UUIDS = {name: str(uuid.uuid5(uuid.NAMESPACE_DNS, name)) for name in KINDS}
SIZES = {"config": 64 * MIB, "store": 320 * MIB, "scratch": 256 * MIB, "state": 64 * MIB}
ROOM = 16 * MIB
RECOVERY = b"the recovery key of a test"
# What the machine keeps, and what somebody left in its /var: systemd would lay it over /usr and /etc.
KEPT = {"etc/machine-id": "5eed" * 8 + "\n", "etc/ssh/ssh_host_ed25519_key": "a private key\n"}
LEFT_IN_VAR = {
    "lib/extensions/evil/usr/evil": "evil\n",
    "lib/extensions/evil/usr/lib/extension-release.d/extension-release.evil": "ID=_any\n",
    "lib/confexts/evil/etc/evil": "evil\n",
    "lib/confexts/evil/etc/extension-release.d/extension-release.evil": "ID=_any\n",
}
FOREIGN = bytes(32)  # somebody else's secret of a config volume

# Runs in User Mode Linux: `rows` says what to make on which device.
FORMAT = """
import pickle, uuid
from pathlib import Path
from mosinit import luks
from mosinit.host import Host
host = Host()
for number, (device, kind, key, tokens, content) in enumerate(pickle.loads(Path({rows!r}).read_bytes())):
    path, name = Path(device), f"volume{{number}}"
    luks.format_volume(host, path, kind, str(uuid.uuid4()), key)
    luks.add_recovery(host, path, key, {recovery!r})
    if kind == "config":
        luks.import_tokens(host, path, init.Tokens(*tokens))
    run("cryptsetup", "open", "--key-file", "-", path, name, data=key)
    run("mke2fs", "-q", "-t", "ext4", f"/dev/mapper/{{name}}")
    os.makedirs(f"/mnt/{{name}}")
    k.mount(f"/dev/mapper/{{name}}", f"/mnt/{{name}}", "ext4", init.MountFlag(0))
    if os.path.isdir(content):
        run("cp", "-a", f"{{content}}/.", f"/mnt/{{name}}")
    k.unmount(f"/mnt/{{name}}")
    run("cryptsetup", "close", name)
"""


class Row(NamedTuple):
    """A volume to be made: its device in User Mode Linux, what it is, and the folder that goes into it."""

    device: str
    kind: str
    key: bytes
    tokens: tuple[object, ...]
    content: str


def make_volumes(work: Path, rows: Sequence[Row], disks: Sequence[Path]) -> None:
    """Make encrypted volumes on disks of User Mode Linux."""
    listed = work / "rows"
    listed.write_bytes(pickle.dumps([tuple(row) for row in rows]))
    uml.run(work, FORMAT.format(rows=str(listed), recovery=RECOVERY), disks)


@dataclass
class Installed:
    """A machine: its disk, the folder with its TPM and its firmware's variables, what was sealed."""

    world: World
    folder: Path  # that is to be made
    release: Path
    sequence: int = 7
    older: Path | None = None  # the release of a generation before, with the same UKI
    tries: str = ""  # what systemd-boot counts in the UKI's name: "+3"
    sizes: dict[str, int] = field(default_factory=lambda: dict(SIZES))
    smbios: tuple[str, ...] = ()
    given: Uki | None = None  # what it boots, if not the organisation's own
    material: sealed.Material = field(init=False)
    foreign: sealed.Seal = field(init=False)  # another secret, sealed to the same TPM under the same policy

    @property
    def uki(self) -> Uki:
        return self.given or self.world.bootable.ukis["run"]

    @property
    def uki_place(self) -> str:
        return f"EFI/Linux/mosinit_{self.sequence}{self.tries}.efi"

    @property
    def disk(self) -> Path:
        return self.folder / "disk.raw"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def saved(self) -> Path:
        return self.folder / "saved"

    @property
    def empty(self) -> Path:
        return self.folder / "empty.raw"

    def make(self) -> Installed:
        """Provision the TPM, make the disk, and the firmware's variables."""
        self.folder.mkdir(parents=True)
        self.material = sealed.provision(self.folder / "tpm", self.world.keyset.folder)
        with sealed.copy_of(self.material, self.folder / "attacker") as tpm:
            self.foreign = sealed.seal(tpm, FOREIGN)
        self.state.mkdir()
        certificates = firmware.certificates_of_keyset(self.world.keyset.folder)
        firmware.enroll(self.world.host, self.state / VARIABLES, certificates)
        put_tpm(self.folder / "tpm", self.state)
        self.write_disk(self.tokens())
        return self

    def save(self) -> None:
        """Save it at the first line of its bring-up, with a second disk that is empty."""
        self.empty.touch()
        os.truncate(self.empty, self.disk.stat().st_size)
        if not self.world.cold:
            hardware = Hardware(snapshot=True, extra_disks=(self.empty,))
            vm.save(self.world.host, self.options(hardware), self.saved)

    def options(self, hardware: Hardware | None = None) -> vm.BootOptions:
        """Return how to boot it up to the end of the bring-up."""
        return boot_options(self.disk, self.state, hardware or Hardware(smbios=self.smbios))

    def go_on(
        self, folder: Path, change: Change | None = None, second: Callable[[Path], Path] | None = None
    ) -> vm.Outcome:
        """Let it go on with a changed copy of its disk; with --cold, from power-on.

        `second` makes the second disk in `folder`, which is empty otherwise.
        """
        disk = self.copy_disk(folder, change)
        extra = second(disk) if second else self.empty
        options = boot_options(disk, folder / "state", Hardware(snapshot=True, extra_disks=(extra,)))
        if self.world.cold:
            shutil.copytree(self.state, options.folder)
            return vm.boot(self.world.host, options)
        return vm.restore(self.world.host, self.saved, options)

    def copy_disk(self, folder: Path, change: Change | None = None) -> Path:
        """Make a copy of its disk, changed."""
        disk = folder / "disk.raw"
        self.world.host.run(["cp", "--sparse=always", self.disk, disk])
        if change:
            change(self, disk)
        return disk

    def another(self, folder: Path, release: Path, older: Path | None = None, tries: str = "") -> Installed:
        """Make a disk with other releases for this very machine."""
        made = Installed(self.world, folder, release, self.sequence, older, tries, self.sizes, self.smbios)
        made.material, made.foreign = self.material, self.foreign
        shutil.copytree(self.state, made.state)
        made.write_disk(made.tokens())
        return made

    def put_uki(self, disk: Path, uki: Path) -> None:
        """Put another UKI in the place of the one on a copy of the disk."""
        put_files(self.world.host, disk, {self.uki_place: uki.read_bytes()})

    # --- What lies in config's header

    def tokens(self) -> init.Tokens:
        """Return the tokens of its config volume."""
        keyset = self.world.keyset
        trusted = firmware.certificates_of_keyset(keyset.folder)
        pcr7 = approvals.predict_pcr7(trusted, firmware.EMPTY_DBX)
        approval = approvals.approve_platform(keyset, pcr7, init.MAX_EPOCH)
        order, order_signature, certificate = (
            part_of(self.release, kind)
            for kind in (init.EPOCH_MEDIA_TYPE, init.EPOCH_SIGNATURE_MEDIA_TYPE, init.CERTIFICATE_MEDIA_TYPE)
        )
        return init.Tokens(
            *self.material.seal, self.record(), {pcr7.hex(): approval}, order, order_signature, certificate
        )

    def record(self, role: str = "sudi-ca", **changes: object) -> bytes:
        """Return its SUDI certificate with the machine record, or one that says other things."""
        keyset, record = self.world.keyset, self.material.record._replace(**changes)  # type: ignore[arg-type]
        proof = init.secret_proof(self.material.secret, keyset.product)
        product = uuid.UUID(keyset.product).bytes
        value = init.RECORD_HEAD + init.RECORD.pack(
            1, product, proof, record.storage_key, record.epoch_index
        )
        authority = keyset.certificate("sudi-ca")
        key = serialization.load_pem_private_key((keyset.folder / f"{role}.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        now = datetime.datetime(2026, 1, 1)
        builder = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(authority.subject)
        builder = builder.serial_number(7).not_valid_before(now).not_valid_after(now.replace(year=2040))
        builder = builder.public_key(ec.generate_private_key(ec.SECP256R1()).public_key())
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(init.RECORD_OID), value)
        signed = builder.add_extension(extension, critical=False).sign(key, hashes.SHA384())
        return signed.public_bytes(serialization.Encoding.DER)

    # --- The disk

    def write_disk(self, tokens: init.Tokens) -> None:
        """Make the partitions and what is in them."""
        host, world = self.world.host, self.world
        with host.scratch(near=self.disk) as work:
            files = disk.esp_files(self.uki.path, world.keyset, work)
            del files[disk.UKI_PLACE]
            names = [self.uki_place, *([f"EFI/Linux/mosinit_{self.sequence - 1}.efi"] if self.older else [])]
            files |= dict.fromkeys(names, self.uki.path)
            files["room"] = bytes(ROOM)  # for what tests put there
            esp = disk.make_esp(host, files, work / "esp", hashlib.sha256(b"esp").hexdigest())
            host.run(["mdel", "-i", esp, "::room"])
            rows, sizes = (
                ["label: gpt", "unit: sectors", "first-lba: 2048"],
                {"esp": esp.stat().st_size, **self.sizes},
            )
            start = MIB
            for name, size in sizes.items():
                label = name if name in ("esp", "state") else f"machine-{name}"
                row = f"start={start // 512}, size={size // 512}, type={KINDS[name]}"
                rows.append(f"{row}, name={label}, uuid={UUIDS[name]}")
                start += -(-size // MIB) * MIB
            with self.disk.open("wb") as file:
                file.truncate(start + MIB)
            script = "".join(f"{row}\n" for row in rows).encode()
            host.run(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", self.disk], stdin=script)
            with self.disk.open("r+b") as file:
                file.seek(MIB)
                file.write(esp.read_bytes())
            self.manifest_git(work / "config/manifest.git")
            for folder, texts in ((work / "config/state", KEPT), (work / "state", LEFT_IN_VAR)):
                for path, text in texts.items():
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_text(text)
            for each in filter(None, (self.older, self.release)):
                shutil.copytree(each, work / "store/mosinit", dirs_exist_ok=True)
            make_volumes(work, list(self.rows(sizes, tokens, work)), [self.disk])

    def rows(self, sizes: Mapping[str, int], tokens: init.Tokens, work: Path) -> Iterator[Row]:
        """Yield the volumes of the disk, which lie on its partitions in the order of `sizes`."""
        secret = self.material.secret
        for number, name in enumerate(sizes, 1):
            device, content = f"/dev/ubda{number}", str(work / name)
            if name == "config":
                yield Row(device, "config", secret, tuple(tokens), content)
            elif name in ("store", "state"):
                key = bytes(init.derive_key(bytearray(secret), name, UUIDS[name]))
                yield Row(device, "plain", key, (), content)

    def manifest_git(self, folder: Path) -> None:
        """Make manifest.git with the generation that runs the release, and with the one before."""
        work = folder.with_name("tree")
        words = ["-c", "gc.auto=0", "-c", "user.name=m", "-c", "user.email=m@localhost"]
        git = ["git", *words, f"--git-dir={folder}", f"--work-tree={work}"]

        def run(*words: str) -> None:
            subprocess.run([*git, *words], check=True, cwd=work, capture_output=True)

        work.mkdir(parents=True)
        # Bare: where it was made is nothing to the machine, whose git would look for that folder.
        subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", folder], check=True)
        generations = [(self.sequence - 1, self.older), (self.sequence, self.release)]
        for sequence, release in generations:
            if release is not None:
                shutil.rmtree(work)
                work.mkdir()
                for name, data in self.generation(sequence, release).items():
                    (work / name).write_bytes(data)
                run("add", "--all")
                run("commit", "--quiet", "--message", "generation")
        shutil.rmtree(work)

    def generation(self, sequence: int, release: Path) -> dict[str, bytes]:
        """Return the files of the generation that runs a release."""
        kinds = (init.MANIFEST_MEDIA_TYPE, init.SIGNATURE_MEDIA_TYPE, init.CERTIFICATE_MEDIA_TYPE)
        text, signature, certificate = (part_of(release, kind) for kind in kinds)
        sha256 = hashlib.sha256(text).hexdigest()
        lines = [
            "version: 1",
            f"product: {self.world.keyset.product}",
            f"sequence: {sequence}",
            f'uki: "{self.uki.uki_id}"',
            "targets:",
        ]
        for target in init.parse_manifest(text).targets:
            lines.append(f"  - {{service_name: {target.service_name}, manifest: {sha256}}}")
        return {
            "manifest.yaml": ("\n".join(lines) + "\n").encode(),
            f"{sha256}.yaml": text,
            f"{sha256}.yaml.signed": signature,
            f"{sha256}.pem": certificate,
        }


# --- A machine and its disk, changed

Change = Callable[[Installed, Path], object]


def boot_options(disk: Path, state: Path, hardware: Hardware) -> vm.BootOptions:
    """Return how to boot a machine up to the end of its bring-up."""
    return vm.BootOptions(disk, state, until="pivoted", timeout=240, hardware=hardware)


def put_tpm(source: Path, state: Path) -> None:
    """Give a machine the TPM whose state lies in `source`."""
    (state / "tpm").mkdir(exist_ok=True)
    shutil.copy(source / "tpm2-00.permall", state / "tpm")


def put_files(host: Host, disk: Path, files: Mapping[str, bytes]) -> None:
    """Put files on the EFI system partition of a disk, in the place of those that are there."""
    image = f"{disk}@@{MIB}"
    folders = {str(parent) for place in files for parent in PurePath(place).parents} - {"."}
    for folder in sorted(folders):
        # -D s: one that is there is skipped.
        subprocess.run(["mmd", "-D", "s", "-i", image, f"::{folder}"], check=False, capture_output=True)
    for place, content in files.items():
        host.run(["mcopy", "-o", "-i", image, "-", f"::{place}"], stdin=content)
        # mcopy says nothing of a disk that is full.
        assert host.run(["mtype", "-i", image, f"::{place}"]) == content, place


def place(machine: Installed, name: str) -> tuple[int, int]:
    """Return begin and size of a partition."""
    with machine.disk.open("rb") as file:
        head = file.read(1024 + 16384)
    parts = init.parse_gpt(head[512:1024], head[1024:], 512, machine.disk.stat().st_size // 512)
    return next((part.start, part.size) for part in parts if part.uuid == UUIDS[name])


def with_tokens(replace: Callable[[Installed, init.Tokens], init.Tokens]) -> Change:
    """Change tokens in config's header as cryptsetup does it."""

    def change(machine: Installed, disk: Path) -> None:
        host, wanted = machine.world.host, replace(machine, machine.tokens())
        with_header(machine, disk, lambda path: luks.import_tokens(host, path, wanted))

    return change


def with_header(machine: Installed, disk: Path, change: Callable[[Path], object]) -> None:
    """Take config's header out of the disk, change it, put it back."""
    start, size = place(machine, "config")
    file = disk.with_name("config")
    with disk.open("r+b") as whole:
        whole.seek(start)
        file.write_bytes(whole.read(size))
        change(file)
        whole.seek(start)
        whole.write(file.read_bytes())
    file.unlink()
