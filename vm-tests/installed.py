"""An installed disk and the TPM of its machine, made here step by step from what the boot asks for.

The TPM is provisioned by tpm2-tools, the volumes are made by cryptsetup and mke2fs in User Mode Linux, and
manifest.git by git: none of it by the code that installs machines.
"""

from __future__ import annotations

import datetime
import hashlib
import pickle
import shutil
import subprocess
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from world import World, part_of

from mosinit import approvals, disk, firmware, init, vm
from mosinit.machine import VARIABLES, Hardware
from tests import sealed, uml

MIB = init.MIB
KINDS = {
    "esp": init.ESP_TYPE, "config": init.CONFIG_TYPE, "store": init.STORE_TYPE, "scratch": init.SCRATCH_TYPE,
    "state": init.LINUX_TYPE,
}  # fmt: skip
UUIDS = {name: str(uuid.uuid5(uuid.NAMESPACE_DNS, name)) for name in KINDS}
SIZES = {"config": 64 * MIB, "store": 320 * MIB, "scratch": 256 * MIB, "state": 64 * MIB}
RECOVERY = b"the recovery key of a test"

# Runs in User Mode Linux: `work` holds what it needs, the disk is /dev/ubda.
FORMAT = """
import pickle, uuid
from pathlib import Path
from mosinit import luks
from mosinit.host import Host
host, work = Host(), Path({work!r})
numbers, secret, tokens, uuids = pickle.loads((work / "needed").read_bytes())
tokens = init.Tokens(*tokens)
def key(name):
    return secret if name == "config" else bytes(init.derive_key(bytearray(secret), name, uuids[name]))
for name in ("config", "store", "state"):
    path, kind = Path(f"/dev/ubda{{numbers[name]}}"), "config" if name == "config" else "plain"
    luks.format_volume(host, path, kind, str(uuid.uuid4()), key(name))
    luks.add_recovery(host, path, key(name), {recovery!r})
    if kind == "config":
        luks.import_tokens(host, path, tokens)
    run("cryptsetup", "open", "--key-file", "-", path, name, data=key(name))
    run("mke2fs", "-q", "-t", "ext4", f"/dev/mapper/{{name}}")
    os.makedirs(f"/mnt/{{name}}")
    k.mount(f"/dev/mapper/{{name}}", f"/mnt/{{name}}", "ext4", init.MountFlag(0))
    if (work / name).exists():
        run("cp", "-a", f"{{work}}/{{name}}/.", f"/mnt/{{name}}")
    k.unmount(f"/mnt/{{name}}")
    run("cryptsetup", "close", name)
"""


@dataclass
class Installed:
    """A machine: its disk, the folder with its TPM and its firmware's variables, what was sealed."""

    world: World
    folder: Path
    release: Path
    sequence: int = 7
    older: Path | None = None  # the release of a generation before, with the same UKI
    tries: str = ""  # what systemd-boot counts in the UKI's name: "+3"
    sizes: dict[str, int] = field(default_factory=lambda: dict(SIZES))
    smbios: tuple[str, ...] = ()
    material: sealed.Material = field(init=False)
    foreign: sealed.Seal = field(init=False)  # another secret, sealed to the same TPM under the same policy

    @property
    def disk(self) -> Path:
        return self.folder / "disk.raw"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def make(self) -> Installed:
        """Provision the TPM, make the disk, and the firmware's variables."""
        self.folder.mkdir(parents=True)
        self.material = sealed.provision(self.folder / "tpm", self.world.keyset.folder)
        with sealed.copy_of(self.material, self.folder / "attacker") as tpm:
            self.foreign = sealed.seal(tpm, bytes(32))
        self.state.mkdir()
        certificates = firmware.certificates_of_keyset(self.world.keyset.folder)
        firmware.enroll(self.world.host, self.state / VARIABLES, certificates)
        (self.state / "tpm").mkdir()
        shutil.copy(self.folder / "tpm/tpm2-00.permall", self.state / "tpm")
        self.write_disk(self.tokens())
        return self

    def another(self, folder: Path, release: Path, older: Path | None = None, tries: str = "") -> Installed:
        """Make a disk with other releases for this very machine."""
        made = Installed(self.world, folder, release, self.sequence, older, tries, self.sizes, self.smbios)
        made.material, made.foreign = self.material, self.foreign
        shutil.copytree(self.state, made.state)
        made.write_disk(made.tokens())
        return made

    def options(self, *, snapshot: bool = False) -> vm.BootOptions:
        """Return how to boot it up to the end of the bring-up."""
        hardware = Hardware(snapshot=snapshot, smbios=self.smbios)
        return vm.BootOptions(self.disk, self.state, until="pivoted", timeout=240, hardware=hardware)

    def put_uki(self, disk: Path, uki: Path) -> None:
        """Put another UKI in the place of the one on a copy of the disk."""
        image = f"{disk}@@{MIB}"
        self.world.host.run(["mcopy", "-o", "-i", image, uki, f"::EFI/Linux/mosinit_{self.sequence}.efi"])

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
            files = disk.esp_files(world.bootable.ukis["run"].path, world.keyset, work)
            del files[disk.UKI_PLACE]
            names = [f"mosinit_{self.sequence}{self.tries}"]
            names += [f"mosinit_{self.sequence - 1}"] if self.older else []
            for name in names:
                files[f"EFI/Linux/{name}.efi"] = world.bootable.ukis["run"].path
            esp = disk.make_esp(host, files, work / "esp", hashlib.sha256(b"esp").hexdigest())
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
            for each in filter(None, (self.older, self.release)):
                shutil.copytree(each, work / "store/mosinit", dirs_exist_ok=True)
            numbers = {name: number for number, name in enumerate(sizes, 1)}
            needed = (numbers, self.material.secret, tuple(tokens), UUIDS)
            (work / "needed").write_bytes(pickle.dumps(needed))
            uml.run(work, FORMAT.format(work=str(work), recovery=RECOVERY), [self.disk])

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
            f'uki: "{self.world.bootable.ukis["run"].uki_id}"',
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
