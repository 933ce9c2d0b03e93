"""What an installation is made from: a keyset, a release, a provisioned machine, a live system; and an
installer for a kernel without device-mapper.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mosinit import approvals, images, init, install, keys, luks, publish, uki
from mosinit.host import Host
from mosinit.hostfs import KernelTree
from tests import volumes
from tests.fake import policy_json
from tests.test_approvals import make_pe
from tests.test_images import PROGRAM, make_tar, plain

TOOLS = ("sfdisk", "losetup", "cryptsetup", "mkfs.ext4", "mkfs.vfat", "git", "mkfs.erofs", "openssl")
RUN_ID, LIVE_ID = "12" * 32, "34" * 32
_APPROVAL = {"schema": 1, "epoch": 1, "unseal": "ab" * 256, "set_epoch": "cd" * 256}


def make_uki(epoch: int = 1) -> bytes:
    """Make a UKI of run mode, as far as an installation looks into it."""
    approval = json.dumps({**_APPROVAL, "epoch": epoch}).encode()
    return make_pe([(".linux", b"the UKI of run mode " * 100_000, 0), (approvals.APPROVAL, approval, 0)])


UKI = make_uki()
LOADER = b"a signed boot loader " * 5000
RECOVERY = b"cccccccc-dddddddd"
DATA = init.LUKS_DATA + init.BLOCK  # behind what dm-integrity writes in front of it


@dataclass(frozen=True)
class Setting:
    """Everything that an installation starts from."""

    keyset: keys.Keyset
    release: Path
    left: Path
    loader: Path
    provisioned: install.Provisioned


def setting(host: Host, folder: Path, sequence: int = 7) -> Setting:
    """Make keyset, release, live system and provisioned machine below `folder`."""
    keyset = keys.new(host, folder / "keyset", "install-tests")
    release = make_release(host, folder, keyset, sequence)
    (folder / "loader.efi").write_bytes(LOADER)
    left = make_left(folder / "left", keyset)
    return Setting(keyset, release, left, folder / "loader.efi", make_provisioned(keyset))


def make_release(
    host: Host, folder: Path, keyset: keys.Keyset, sequence: int, *, storage: str = "", epoch: int = 1
) -> Path:
    """Publish hostfs and bootkit; `storage` is lines of the manifest, `epoch` that of manifest and UKI."""
    folder.mkdir(exist_ok=True)
    tree = make_tar({"sbin/": b"", "sbin/init": PROGRAM + b"init " * 5000})
    plain(host, folder / "hostfs", tree, tar=tree)
    (folder / "modules").mkdir()
    (folder / "modules/modules.dep").write_text("")
    (folder / "run.efi").write_bytes(make_uki(epoch))
    kernel = KernelTree("6.12", folder / "vmlinuz", folder / "modules")
    ukis = {"run": uki.Uki(folder / "run.efi", RUN_ID), "live": uki.Uki(folder / "run.efi", LIVE_ID)}
    uki.bootkit(host, kernel, ukis, images.Layout(folder / "bootkit"))
    rows = "".join(
        f"  - service_name: {name}\n    service_type: {name}\n    source: oci:./{name}\n    version: '1'\n"
        for name in ("hostfs", "bootkit")
    )
    text = f"version: 1\nproduct: {keyset.product}\nsequence: {sequence}\nepoch: {epoch}\n"
    (folder / "manifest.yaml").write_text(f"{text}update_type: complete\n{storage}targets:\n{rows}")
    publish.publish(host, folder / "manifest.yaml", keyset, f"oci:{folder / 'release'}")
    return folder / "release"


def make_left(folder: Path, keyset: keys.Keyset, mode: str = "live") -> Path:
    """Make what the bring-up leaves to a live system."""
    (folder / "organisation").mkdir(parents=True)
    for path in keyset.folder.iterdir():
        if path.suffix in (".pem", ".pub"):
            (folder / "organisation" / path.name).write_bytes(path.read_bytes())
    report = {"schema": 1, "result": "pivoted", "mode": mode, "product": keyset.product, "epoch": 1}
    (folder / "report.json").write_text(json.dumps({**report, "sequence": 7, "uki_id": LIVE_ID}))
    (folder / "policy.json").write_bytes(policy_json(mode=mode, product=keyset.product))
    return folder


def make_provisioned(
    keyset: keys.Keyset, secret: bytes = volumes.SECRET, epoch: int = 1
) -> install.Provisioned:
    """Make the secrets of a machine, and tokens that its organisation signed."""
    record = init.RECORD.pack(
        1, uuid.UUID(keyset.product).bytes, init.secret_proof(secret, keyset.product), bytes(34), bytes(34)
    )
    record = record[:49] + b"\0\x0b" + record[51:83] + b"\0\x0b" + record[85:]
    statement = json.dumps(init.epoch_statement(keyset.product, epoch)).encode()
    tokens = volumes.TOKENS._replace(
        record=sudi_certificate(keyset, init.RECORD_HEAD + record),
        order_statement=statement,
        order_signature=keyset.signer("product").sign(statement),
        order_certificate=keyset.certificate_path("product").read_bytes(),
    )
    sudi = tuple((name, name.encode()) for name in install.SUDI_FILES)
    return install.Provisioned(secret, RECOVERY, tokens, sudi)


def sudi_certificate(keyset: keys.Keyset, record: bytes) -> bytes:
    """Issue a SUDI certificate with that machine record."""
    authority = keyset.certificate("sudi-ca")
    key = serialization.load_pem_private_key((keyset.folder / "sudi-ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(
        authority.subject, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "machine")]),
        ec.generate_private_key(ec.SECP256R1()).public_key(), x509.random_serial_number(), now,
        now + datetime.timedelta(days=9),
    )  # fmt: skip
    for extension, critical in (
        (x509.BasicConstraints(False, None), True),
        (x509.KeyUsage(True, *[False] * 8), True),
        (x509.UnrecognizedExtension(x509.ObjectIdentifier(init.RECORD_OID), record), False),
    ):
        builder = builder.add_extension(extension, critical)
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.DER)


class NativeInstaller(install.Installer):
    """An installer on a kernel without device-mapper: headers are real, what they encrypt is not.

    A volume "opens" if its header opens with the key; its data then lies behind the header in clear. A slot
    for the recovery key, which is made to be slow, there is only if it is asked for.
    """

    def __init__(self, *, recovery: bool = False) -> None:
        super().__init__()
        self.recovery = recovery
        self.steps: list[str] = []
        self.failing = ""
        self.layers: list[str] = []
        self.variables: dict[str, bytes] = {}

    # The firmware of whoever runs the tests is theirs.

    def names(self, path: str) -> list[str]:
        """List a folder, or the variables."""
        if path == init.EFIVARS:
            return [f"{name}-{init.EFI_GLOBAL}" for name in self.variables]
        return super().names(path)

    def efi_read(self, name: str, guid: str) -> tuple[int, bytes] | None:
        """Return a variable of the specification's own."""
        return (7, self.variables[name]) if guid == init.EFI_GLOBAL and name in self.variables else None

    def efi_write(self, name: str, guid: str, value: bytes) -> None:
        """Set or delete a variable."""
        assert guid == init.EFI_GLOBAL
        self.variables.pop(name, None)
        if value:
            self.variables[name] = value

    def say(self, text: str) -> None:
        """Note the step, and fail where the test says so."""
        self.steps.append(text)
        if self.failing and text.startswith(self.failing):
            raise OSError(5, "Input/output error", text)

    def format_volume(self, path: Path, kind: str, uuid: str, key: bytes, recovery: bytes) -> None:
        """Make the header of a volume."""
        if kind == "plain":
            luks.format_volume(self, path, kind, uuid, key)
            if self.recovery:
                luks.add_recovery(self, path, key, recovery)
            return
        with self.scratch() as folder:
            made = volumes.config(self, folder / "volume", uuid, key)
            if self.recovery:
                luks.add_recovery(self, made, key, recovery)
            with path.open("r+b") as device:
                device.write(made.read_bytes()[: init.LUKS_DATA] + volumes.SUPERBLOCK)
                os.fsync(device.fileno())

    @contextlib.contextmanager
    def opened(self, path: Path, kind: str, key: bytes, name: str) -> Iterator[Path]:
        """Try the key, and yield the data behind the header as a device."""
        init.open_volume(self, luks.read_header(self, path, kind), str(path), bytearray(key), None)
        with data_behind(path) as device:
            yield device

    @contextlib.contextmanager
    def mounted(self, device: Path, fstype: str, *, read_only: bool = False) -> Iterator[Path]:
        """Mount; FAT, which this kernel may lack, is copied out and back by mtools."""
        if fstype != "vfat":
            with super().mounted(device, fstype, read_only=read_only) as folder:
                yield folder
            return
        with self.scratch() as folder:
            self.run(["mcopy", "-s", "-n", "-i", device, "::", folder])
            before = {path for path in folder.rglob("*") if path.is_file()}
            yield folder
            if not read_only:
                paths = sorted(path for path in folder.iterdir())
                self.run(["mcopy", "-s", "-o", "-i", device, *paths, "::"])
                for path in before - set(folder.rglob("*")):
                    self.run(["mdel", "-i", device, f"::{path.relative_to(folder)}"])

    def check_layer(self, machine: init.Machine, name: str, layer: init.Layer, signature: str) -> None:
        """Note which layers would be checked."""
        machine.read(init.blob_path(signature))
        self.layers.append(layer.digest)


class Meddled(NativeInstaller):
    """An installer behind whose back somebody acts, when it says what it does next."""

    def __init__(self, before: str, act: Callable[[], None]) -> None:
        super().__init__()
        self.before, self.act = before, act

    def say(self, text: str) -> None:
        """Let them act."""
        super().say(text)
        if text.startswith(self.before):
            self.act()


@contextlib.contextmanager
def data_behind(path: Path) -> Iterator[Path]:
    """Attach the data of a volume as a device."""
    command = ["losetup", "--find", "--show", "--offset", str(DATA), str(path)]
    device = subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def options(made: Setting, disk: Path, **changes: object) -> install.Options:
    """Return options for this setting."""
    values = {"source": f"oci:{made.release}", "left": made.left, "loader": made.loader, **changes}
    return install.Options(disk, Path("/nonexistent"), **values)  # type: ignore[arg-type]


def run(host: NativeInstaller, made: Setting, disk: Path, **changes: object) -> dict[str, object]:
    """Install as the verb does, with a machine that is provisioned already."""
    given = options(made, disk, **changes)
    planned, release, policy = install.plan(host, given)
    install.check_tokens(made.provisioned, policy)
    return install.act(host, planned, release, policy, made.provisioned, given.loader)
