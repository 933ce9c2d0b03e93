"""An installation on a loop device: real partitions, headers, file systems and git; encryption stands aside,
where the kernel has no device-mapper.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from mosinit import generations, init, install, keys, layout, luks
from mosinit.host import Failure, Host
from tests import installation
from tests.fake import policy_json
from tests.installation import NativeInstaller, Setting
from tests.test_layout import GIB, loop

TOOLS = ("sfdisk", "losetup", "cryptsetup", "mkfs.ext4", "mkfs.vfat", "git", "mkfs.erofs", "openssl")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Keyset, release, live system, provisioned machine."""
    return installation.setting(Host(), tmp_path_factory.mktemp("setting"))


@pytest.fixture
def disk(need: Callable[..., None], memory: Path) -> Iterator[Path]:
    """An empty disk of 8 GiB."""
    need(*TOOLS)
    with loop(memory / "disk") as device:
        yield device


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_empty_disk_becomes_a_machine(made: Setting, disk: Path) -> None:
    host = NativeInstaller()
    done = installation.run(host, made, disk)
    assert (done["sequence"], done["uki"]) == (7, installation.RUN_ID)
    found = layout.inspect(host, disk)
    assert (found.unfinished, len(host.layers)) == (False, 2)
    esp = Path(f"{disk}p1")
    with host.mounted(esp, "vfat", read_only=True) as folder:
        files = {str(path.relative_to(folder)): digest(path) for path in folder.rglob("*") if path.is_file()}
    loader = hashlib.sha256(installation.LOADER).hexdigest()
    assert files == {
        "EFI/BOOT/BOOTX64.EFI": loader,
        "EFI/systemd/systemd-bootx64.efi": loader,
        "EFI/Linux/mosinit_7+3.efi": hashlib.sha256(installation.UKI).hexdigest(),
        "loader/loader.conf": hashlib.sha256(install.LOADER_CONF).hexdigest(),
    }
    with (
        installation.data_behind(Path(f"{disk}p2")) as data,
        host.mounted(data, "ext4") as config,
    ):
        names = {path.name for path in config.iterdir()}
        assert names == {"lost+found", "manifest.git", "state", "sudi"}
        modes = {path.name: path.stat().st_mode & 0o777 for path in (config / "sudi").iterdir()}
        assert modes == dict.fromkeys(install.SUDI_FILES, 0o400)
        (only,) = generations.list_all(config / "manifest.git", made.keyset.product)
        assert (only.sequence, only.commit, only.uki) == (7, done["generation"], installation.RUN_ID)
    for number in (1, 2, 3):
        check = ["fsck.vfat", "-n", f"{disk}p1"]
        if number > 1:
            with installation.data_behind(Path(f"{disk}p{number}")) as data:
                subprocess.run(["e2fsck", "-fn", data], check=True, capture_output=True)
        else:
            subprocess.run(check, check=True, capture_output=True)


def test_each_volume_opens_with_its_key_and_the_recovery_key(made: Setting, disk: Path) -> None:
    host = NativeInstaller(recovery=True)
    installation.run(host, made, disk, state=64 << 20)
    secret, recovery = made.provisioned.secret, made.provisioned.recovery
    fd = os.open(disk, os.O_RDONLY)
    header, entries = os.pread(fd, 512, 512), os.pread(fd, 16384, 1024)
    os.close(fd)
    parts = init.parse_gpt(header, entries, 512, 8 * GIB // 512)
    assert [part.name for part in parts] == [
        "esp",
        "machine-config",
        "machine-store",
        "machine-scratch",
        "state",
    ]
    keys = {
        2: secret,
        3: bytes(init.derive_key(bytearray(secret), "store", parts[2].uuid)),
        5: bytes(init.derive_key(bytearray(secret), "state", parts[4].uuid)),
    }
    for number, key in keys.items():
        path = Path(f"{disk}p{number}")
        opened = luks.read_header(host, path, "config" if number == 2 else "plain")
        for slot, words in ((0, key), (1, recovery)):
            host.open_luks(init.detached_header(opened), str(path), bytearray(words), slot, None)
    header_of_config = luks.read_header(host, Path(f"{disk}p2"), "config")
    assert header_of_config.tokens == made.provisioned.tokens


@pytest.mark.parametrize("step", ["partitions", "machine-config", "copying", "esp", "reading everything"])
def test_what_fails_can_be_run_again(made: Setting, disk: Path, step: str) -> None:
    host = NativeInstaller()
    host.failing = step
    with pytest.raises(OSError, match="Input/output error"):
        installation.run(host, made, disk)
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if str(disk) in line]
    attached = subprocess.run(
        ["losetup", "--list", "--noheadings"], capture_output=True, text=True, check=True
    )
    assert f"{disk}p" not in attached.stdout
    if step != "partitions":
        assert layout.inspect(host, disk).unfinished
    host.failing = ""
    installation.run(host, made, disk)
    assert not layout.inspect(host, disk).unfinished


def test_a_machine_is_not_installed_over_without_a_word(made: Setting, disk: Path) -> None:
    host = NativeInstaller()
    installation.run(host, made, disk)
    with pytest.raises(Failure, match=f"--erase {disk.name}"):
        installation.run(host, made, disk)
    installation.run(host, made, disk, erase=disk.name)


def test_a_plan_changes_nothing(made: Setting, disk: Path, memory: Path) -> None:
    shown = install.show_plan(Host(), installation.options(made, disk))
    assert shown["lost"] == "nothing: the disk is empty"
    assert json.dumps([str(part["name"]) for part in shown["partitions"]])  # type: ignore[attr-defined]
    assert (memory / "disk").stat().st_blocks == 0


def test_other_disks_are_never_touched(made: Setting, disk: Path, memory: Path) -> None:
    with loop(memory / "other", 8 * GIB) as other:
        layout.write(Host(), layout.make_plan(layout.inspect(Host(), other)))
        before = beginning(other), os.stat(memory / "other").st_blocks
        installation.run(NativeInstaller(), made, disk)
        assert (beginning(other), os.stat(memory / "other").st_blocks) == before


def beginning(disk: Path) -> bytes:
    with disk.open("rb") as file:
        return hashlib.sha256(file.read(700 << 20)).digest()


# --- What is refused before anything is written ----------------------------------------------------------


def refused(made: Setting, disk: Path, **changes: object) -> str:
    with pytest.raises(init.Refused) as caught:
        installation.run(NativeInstaller(), made, disk, **changes)
    assert layout.inspect(Host(), disk).content == ""
    return caught.value.check


def spoilt(made: Setting, folder: Path, choose: Callable[[Path], bool]) -> Path:
    """Return a copy of the release with one bit of a blob flipped."""
    copy = folder / "spoilt"
    subprocess.run(["cp", "-r", made.release, copy], check=True)
    blob = next(path for path in sorted((copy / "blobs/sha256").iterdir()) if choose(path))
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    return copy


def test_a_bit_in_any_blob_is_found_before_the_disk_is_touched(
    made: Setting, disk: Path, tmp_path: Path
) -> None:
    for blob in sorted((made.release / "blobs/sha256").iterdir()):
        folder = tmp_path / blob.name[:8]
        folder.mkdir()
        copy = spoilt(made, folder, lambda path, name=blob.name: path.name == name)  # type: ignore[misc]
        check = refused(made, disk, source=f"oci:{copy}")
        assert check in ("IMAGE-DIGEST", "MANIFEST-ABSENT", "EPOCH-ORDER"), blob


def test_a_blob_that_is_not_there(made: Setting, disk: Path, tmp_path: Path) -> None:
    for blob in sorted((made.release / "blobs/sha256").iterdir()):
        copy = tmp_path / blob.name[:8]
        subprocess.run(["cp", "-r", made.release, copy], check=True)
        (copy / "blobs/sha256" / blob.name).unlink()
        assert refused(made, disk, source=f"oci:{copy}") == "STORE-BLOB"


def test_a_release_of_another_organisation(made: Setting, disk: Path, tmp_path: Path) -> None:
    host = Host()
    other = keys.new(host, tmp_path / "keyset", "other")
    left = installation.make_left(tmp_path / "left", other)
    assert refused(made, disk, left=left) == "MANIFEST-CHAIN"


def test_a_release_that_a_revoked_key_signed(made: Setting, disk: Path, tmp_path: Path) -> None:
    left = installation.make_left(tmp_path / "left", made.keyset)
    certificate = made.keyset.certificate("product").public_bytes(serialization.Encoding.DER)
    revoked = [hashlib.sha256(certificate).hexdigest()]
    (left / "policy.json").write_bytes(policy_json(product=made.keyset.product, revoked=revoked))
    assert refused(made, disk, left=left) == "MANIFEST-REVOKED"


def test_tokens_of_another_machine(made: Setting, disk: Path) -> None:
    another = installation.make_provisioned(made.keyset, bytes(32))
    mixed = dataclasses.replace(made.provisioned, tokens=another.tokens)
    assert refused(dataclasses.replace(made, provisioned=mixed), disk) == "VOLUME-IDENTITY"


def test_a_record_of_another_organisation(made: Setting, disk: Path, tmp_path: Path) -> None:
    other = keys.new(Host(), tmp_path / "keyset", "other")
    foreign = dataclasses.replace(made, provisioned=installation.make_provisioned(other))
    assert refused(foreign, disk) == "RECORD-SIGNATURE"


def test_an_installed_system_installs_nothing(made: Setting, disk: Path, tmp_path: Path) -> None:
    left = installation.make_left(tmp_path / "left", made.keyset, mode="run")
    with pytest.raises(Failure, match="boot the live medium"):
        install.plan(Host(), installation.options(made, disk, left=left))
    with pytest.raises(Failure, match="was not started by mosinit"):
        install.plan(Host(), installation.options(made, disk, left=tmp_path / "none"))


# --- What is found when it is read back ------------------------------------------------------------------


class Forgetful(NativeInstaller):
    """Changes something behind the installer's back, just before it reads everything back."""

    def __init__(self, change: Callable[[], None]) -> None:
        super().__init__()
        self.change = change

    def say(self, text: str) -> None:
        super().say(text)
        if text.startswith("reading everything back"):
            self.change()


def test_a_disk_that_changes_what_it_keeps(made: Setting, disk: Path) -> None:
    def spoil_store() -> None:
        host = NativeInstaller()
        with (
            installation.data_behind(Path(f"{disk}p3")) as data,
            host.mounted(data, "ext4") as store,
        ):
            for blob in (store / "mosinit/blobs/sha256").iterdir():
                if blob.stat().st_size > 100_000:
                    with blob.open("r+b") as file:
                        file.seek(5000)
                        file.write(b"?")

    with pytest.raises(init.Refused, match="IMAGE-DIGEST"):
        installation.run(Forgetful(spoil_store), made, disk)
    assert layout.inspect(Host(), disk).unfinished


def test_a_header_with_other_tokens(made: Setting, disk: Path) -> None:
    def spoil_tokens() -> None:
        others = made.provisioned.tokens._replace(seal_public=b"another")
        luks.import_tokens(Host(), Path(f"{disk}p2"), others)

    with pytest.raises(init.Refused, match="LUKS-TOKEN"):
        installation.run(Forgetful(spoil_tokens), made, disk)
