"""A machine that was installed, and what happens to it: a real TPM in software, real headers and file
systems on a loop device; only encryption stands aside, where the kernel has no device-mapper.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mosinit import damage, enroll, init, install, layout, luks, machinedisk, recover
from mosinit.generations import Elsewhere
from mosinit.host import Host
from tests import installation, provisioned
from tests.installation import NativeInstaller
from tests.test_layout import loop
from tests.tpms import TpmMachine

STATE_BYTES = 64 * init.MIB


class NativeRecoverer(NativeInstaller, damage.Recoverer):
    """A recoverer without device-mapper: a volume's data lies in clear behind its header."""

    def __init__(self, site: provisioned.Site | None = None) -> None:
        super().__init__()
        self.site = site
        self.cut = -1  # before which durable write the power fails

    def write_at(self, fd: int, offset: int, data: bytes) -> None:
        """Write, or let the power fail in the middle of it."""
        self.cut -= 1
        if self.cut == 0:
            super().write_at(fd, offset, data[: len(data) // 8192 * 4096])
            raise KeyboardInterrupt
        super().write_at(fd, offset, data)

    def format_volume(self, path: Path, kind: str, uuid: str, key: bytes, recovery: bytes) -> None:
        """Make the header of a volume, with its recovery key."""
        super().format_volume(path, kind, uuid, key, recovery)
        luks.add_recovery(self, path, key, recovery)

    def machine(self) -> init.Machine:
        """Return the machine with the TPM in software."""
        assert self.site
        return TpmMachine(self.site.tpm)

    @contextlib.contextmanager
    def unlocked(
        self, path: Path, header: init.LuksHeader, key: bytes, name: str, *, read_only: bool = False
    ) -> Iterator[Path]:
        """Yield the data behind the header as a device."""
        assert len(key) == init.LUKS_KEY_BYTES["config" if "config" in name else "plain"]
        with installation.data_behind(path) as device:
            yield device


@dataclass
class Site:
    """An organisation, a machine that was installed, and its disk as a file, to be copied."""

    made: provisioned.Site
    folder: Path
    image: Path
    release: Path
    left: Path
    record: Path  # the encrypted recovery record
    first: Path  # what the provisioning left that the disk was installed with

    @property
    def host(self) -> NativeRecoverer:
        return NativeRecoverer(self.made)

    @property
    def loader(self) -> Path:
        return self.folder / "loader.efi"

    def recovery_key(self) -> bytes:
        """Return the recovery key of the installed disk, as the organisation has it."""
        return enroll.open_recovery(self.record, self.made.keyset).recovery_key.encode()

    def provision_anew(self) -> None:
        """Clear the TPM and provision it again: `made.state` is the new one's from here."""
        self.made.renew(self.folder / "renewed")
        self.made.provision()

    def options(self, disk: Path, state: Path | None = None, **changes: object) -> damage.Options:
        values: dict[str, object] = {"recovery": (self.recovery_key(),), "provisioned": state}
        values |= {"left": self.left, "loader": self.loader, **changes}
        return damage.Options(disk, **values)  # type: ignore[arg-type]

    def recover(
        self, disk: Path, state: Path | None = None, host: NativeRecoverer | None = None, **changes: object
    ) -> dict[str, object]:
        """Recover as the verb does."""
        host = host or self.host
        return recover.act(host, damage.look(host, self.options(disk, state, **changes)))

    def plan(self, disk: Path, state: Path | None = None, **changes: object) -> dict[str, object]:
        """Say what would be done."""
        return damage.describe(damage.look(self.host, self.options(disk, state, **changes)))

    def boots(self, disk: Path, state: Path) -> init.Manifest:
        """See that a boot would open and verify the disk with what the TPM holds, and its volumes' keys."""
        machine = TpmMachine(self.made.tpm)
        policy = install.policy_of_live(self.left)._replace(uki_id=installation.RUN_ID)
        parts = machinedisk.read_partitions(Host(), layout.inspect(Host(), disk))
        header = luks.read_header(Host(), layout.device(parts, parts.named("config")), "config")
        assert header.tokens
        record = init.verify_record(header.tokens.record, policy.organisation["sudi-ca.pem"], policy.product)
        init.check_tpm(machine, record, policy.epoch)
        init.find_approval(machine, header.tokens, policy.epoch)
        kept = install.read_provisioned(state, policy)
        init.check_secret(record, bytearray(kept.secret))
        with contextlib.ExitStack() as opened:
            places = {}
            for name in damage.KINDS:
                device = layout.device(parts, parts.named(name))
                key = bytearray(damage.key_of(kept, name, parts.named(name).uuid))
                header = luks.read_header(Host(), device, "config" if name == "config" else "plain")
                assert header.note == ""
                init.open_volume(Host(), header, str(device), key, None)
                data = opened.enter_context(installation.data_behind(device))
                places[name] = opened.enter_context(Host().mounted(data, "ext4", read_only=True))
            where = {init.CONFIG: places["config"], init.STORE: places["store"]}
            return init.pick_generation(Elsewhere(where), policy)


@contextlib.contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Provision a machine and install it."""
    with provisioned.site(folder) as made:
        made.start()
        record = made.machines / made.provision() / "recovery.cms"
        release = installation.make_release(made.host, folder / "published", made.keyset, 7)
        left = installation.make_left(folder / "left", made.keyset)
        (folder / "loader.efi").write_bytes(installation.LOADER)
        found = Site(made, folder, folder / "disk", release, left, record, made.state)
        with loop(found.image) as disk:
            options = install.Options(
                disk, made.state, f"oci:{release}", state=STATE_BYTES, left=left, loader=found.loader
            )
            host = NativeInstaller()
            planned, verified, policy = install.plan(host, options)
            kept = install.read_provisioned(made.state, policy)
            install.act(host, planned, verified, policy, kept, found.loader)
            parts = machinedisk.read_partitions(host, layout.inspect(host, disk))
            for name in damage.KINDS:
                part = parts.named(name)
                key = damage.key_of(kept, name, part.uuid)
                luks.add_recovery(host, layout.device(parts, part), key, kept.recovery)
        yield found


@contextlib.contextmanager
def copy_of(site: Site, folder: Path) -> Iterator[Path]:
    """Attach a copy of the machine's disk."""
    target = folder / "copy"
    subprocess.run(["cp", "--sparse=always", site.image, target], check=True)
    with loop(target) as disk:
        layout.wait_for_devices(Host(), machinedisk.read_partitions(Host(), layout.inspect(Host(), disk)))
        yield disk


def fingerprint(image: Path) -> str:
    """Return a digest of all that a sparse file holds."""
    digest, place = hashlib.sha256(), 0
    with image.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        while place < end:
            try:
                place = os.lseek(file.fileno(), place, os.SEEK_DATA)
            except OSError:
                break
            until = os.lseek(file.fileno(), place, os.SEEK_HOLE)
            file.seek(place)
            for at in range(place, until, 65536):
                data = file.read(min(65536, until - at))
                if any(data):
                    digest.update(at.to_bytes(8, "big") + data)
            place = until
    return digest.hexdigest()
