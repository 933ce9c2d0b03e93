"""An installation on a loop device: real partitions, headers, file systems and git; encryption stands aside,
where the kernel has no device-mapper.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from mosinit import bootentry, explain, generations, init, install, keys, layout, luks, tools
from mosinit.esp import LOADER, LOADER_CONF, NOT_YET, STARTED
from mosinit.host import Failure, Host
from mosinit.layout import Consent
from tests import installation
from tests.fake import policy_json
from tests.installation import Meddled, NativeInstaller, Setting
from tests.test_layout import GIB, loop


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
        "loader/loader.conf": hashlib.sha256(LOADER_CONF).hexdigest(),
    }
    with (
        installation.data_behind(Path(f"{disk}p2")) as data,
        host.mounted(data, "ext4") as config,
    ):
        names = {path.name for path in config.iterdir()}
        assert names == {"lost+found", "manifest.git", "state", "sudi"}
        modes = {path.name: path.stat().st_mode & 0o777 for path in (config / "sudi").iterdir()}
        assert modes == dict.fromkeys(install.SUDI_FILES, 0o400)
        kept = {str(path.relative_to(config / "state")) for path in (config / "state").rglob("*_key*")}
        assert kept | {"etc/machine-id"} == set(init.KEPT)
        assert (config / "state").stat().st_mode & 0o777 == 0o700
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
    with pytest.raises(Failure, match="is not installed .*Input/output error.*: run this command again"):
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
    with pytest.raises(Failure, match=f"--erase {disk.name}-"):
        installation.run(host, made, disk)
    installation.run(host, made, disk, consent=Consent(layout.inspect(host, disk).word))


def test_a_plan_changes_nothing(made: Setting, disk: Path, memory: Path) -> None:
    shown = install.show_plan(Host(), installation.options(made, disk))
    assert shown["lost"] == "nothing: the disk is empty"
    assert json.dumps([str(part["name"]) for part in shown["partitions"]])  # type: ignore[attr-defined]
    assert (memory / "disk").stat().st_blocks == 0


def test_what_a_plan_says_is_what_is_done(made: Setting, disk: Path) -> None:
    subprocess.run(["sfdisk", "--quiet", disk], input=b"size=1GiB, type=8e\nsize=1GiB\n", check=True)
    before = digest_of_edges(disk)
    shown = install.show_plan(Host(), installation.options(made, disk, state=64 << 20))
    word = layout.inspect(Host(), disk).word
    assert (shown["erase"], digest_of_edges(disk)) == (word, before)
    assert shown["lost"] == "2 partitions (1024 MiB, 1024 MiB)"
    assert shown["content"] == ["partition 1, 1024 MiB: Linux LVM", "partition 2, 1024 MiB: Linux"]
    assert shown["members"] == ["partition 1, 1024 MiB: Linux LVM"]
    assert str(shown["release"]).startswith("sha256:")
    text = install.plan_text(shown)
    assert f"--erase {word} --erase-members" in text
    assert all(line.isprintable() for line in text.splitlines())
    host = NativeInstaller()
    consent = Consent(word, members=True)
    done = installation.run(host, made, disk, state=64 << 20, consent=consent)
    planned: list[dict[str, str]] = shown["steps"]  # type: ignore[assignment]
    steps = [f"{step['step']}: {step['does']}" for step in planned if step["step"] != "TPM"]
    assert [step for step in host.steps if step.partition(":")[0] in install.ACTS] == steps
    same = (
        "disk",
        "serial",
        "bytes",
        "lost",
        "erase",
        "content",
        "members",
        "partitions",
        "release",
        "source",
    )
    assert {name: done[name] for name in same} == {name: shown[name] for name in same}


def digest_of_edges(disk: Path) -> str:
    with disk.open("rb") as file:
        data = file.read(2 << 20)
        file.seek(-(2 << 20), os.SEEK_END)
        return hashlib.sha256(data + file.read()).hexdigest()


def test_members_are_lost_only_for_who_says_so(made: Setting, disk: Path) -> None:
    subprocess.run(["sfdisk", "--quiet", disk], input=b"size=1GiB, type=8e\n", check=True)
    before, word = digest_of_edges(disk), layout.inspect(Host(), disk).word
    with pytest.raises(Failure, match=r"Linux LVM.*--erase-members"):
        installation.run(NativeInstaller(), made, disk, consent=Consent(word))
    assert digest_of_edges(disk) == before


def test_a_disk_that_changes_between_plan_and_act(made: Setting, disk: Path) -> None:
    def overwrite() -> None:
        subprocess.run(["mkfs.ext4", "-q", disk], check=True)

    host = Meddled("partitions", overwrite)
    with pytest.raises(Failure, match="changed since it was looked at .*: nothing was written") as caught:
        installation.run(host, made, disk)
    assert "\n" not in str(caught.value)
    assert [str(row) for row in layout.inspect(Host(), disk).rows] == ["the whole disk, 8192 MiB: ext4"]


# --- What is chosen, and what a release demands -----------------------------------------------------------


def partitions(done: dict[str, object]) -> dict[str, int]:
    parts: list[dict[str, object]] = done["partitions"]  # type: ignore[assignment]
    return {str(part["name"]).removeprefix("machine-"): int(str(part["bytes"])) >> 20 for part in parts}


def test_sizes_are_chosen(made: Setting, disk: Path) -> None:
    sizes = {"store": 1 << 30, "scratch": 64 << 20, "state": 2 << 30}
    done = installation.run(NativeInstaller(), made, disk, **sizes)
    expected = {"esp": 512, "config": 128, "store": 1024, "scratch": 64, "state": 2048}
    assert partitions(done) == expected
    assert [each["bytes"] >> 20 for each in table(disk)] == list(expected.values())


def table(disk: Path) -> list[dict[str, int]]:
    words = ["lsblk", "--json", "--bytes", "--output", "NAME,SIZE", str(disk)]
    listed = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)["blockdevices"]
    # lsblk sorts by device numbers, which others who attach disks at the same time may mix up.
    parts = sorted(listed[0].get("children", listed[1:]), key=lambda part: str(part["name"]))
    return [{"bytes": int(part["size"])} for part in parts]


def test_a_store_in_which_the_release_has_no_room(made: Setting, disk: Path) -> None:
    with pytest.raises(Failure, match="takes a store of 74 MiB, and that of /dev/loop.* has 64 MiB"):
        installation.run(NativeInstaller(), made, disk, store=64 << 20)
    assert layout.inspect(Host(), disk).content == ""


@pytest.fixture(scope="module")
def demanding(made: Setting, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A release that demands a volume for /var."""
    storage = "storage:\n  - {label: state, persistent: true, size: 102401K}\n"
    folder = tmp_path_factory.mktemp("demanding")
    release = installation.make_release(Host(), folder, made.keyset, 8, storage=storage)
    return dataclasses.replace(made, release=release)


@pytest.mark.parametrize(("asked", "size"), [(0, 101), (101, 101), (200, 200)])
def test_a_state_volume_that_the_release_demands(
    demanding: Setting, disk: Path, asked: int, size: int
) -> None:
    shown = install.show_plan(Host(), installation.options(demanding, disk, state=asked << 20))
    assert partitions(shown)["state"] == size
    if not asked:
        done = installation.run(NativeInstaller(), demanding, disk)
        assert partitions(done)["state"] == table(disk)[-1]["bytes"] >> 20 == size


def test_less_state_than_the_release_demands(demanding: Setting, disk: Path) -> None:
    with pytest.raises(Failure, match="demands a state volume of 101 MiB, 100 MiB were asked for"):
        installation.run(NativeInstaller(), demanding, disk, state=100 << 20)
    with pytest.raises(Failure, match="a state volume on .* can have 64 to 64 MiB"):
        installation.run(NativeInstaller(), demanding, disk, store=7422 << 20, scratch=64 << 20)
    assert layout.inspect(Host(), disk).content == ""


@pytest.mark.parametrize("more", ["persistent: false", "persistent: true, nsgroup: web"])
def test_a_state_volume_that_nobody_could_keep(made: Setting, tmp_path: Path, more: str) -> None:
    storage = f"storage:\n  - {{label: state, {more}, size: 100M}}\n"
    with pytest.raises(Failure, match="storage state is /var"):
        installation.make_release(Host(), tmp_path / "release", made.keyset, 8, storage=storage)


# --- The firmware ----------------------------------------------------------------------------------------


def test_the_firmware_gets_an_entry_once(made: Setting, disk: Path) -> None:
    host = NativeInstaller()
    for _ in range(2):
        consent = Consent(layout.inspect(host, disk).word)
        done = installation.run(host, made, disk, consent=consent)
        assert done["boot entry"] == "Boot0000"
        with disk.open("rb") as file:
            head = file.read(1024 + 16384)
        esp = init.parse_gpt(head[512:1024], head[1024:], 512, 8 * GIB // 512)[0]
        expected = bootentry.Entry(1, 2048, layout.ESP_BYTES // 512, esp.uuid)
        assert host.variables == {"Boot0000": bootentry.encode(expected), "BootOrder": b"\0\0"}


class Full(NativeInstaller):
    """Firmware whose memory for variables is full."""

    def efi_write(self, name: str, guid: str, value: bytes) -> None:
        """Refuse."""
        raise OSError(28, "No space left on device")


def test_firmware_that_takes_no_entry_is_told_of(made: Setting, disk: Path) -> None:
    host = Full()
    done = installation.run(host, made, disk)
    assert done["boot entry"] is None
    (words,) = (step for step in host.steps if step.startswith("the firmware took no boot entry"))
    assert "No space left" in words
    assert "EFI/BOOT/BOOTX64.EFI" in words
    assert "\n" not in words
    assert not layout.inspect(host, disk).unfinished


# --- Nobody else -----------------------------------------------------------------------------------------


def test_two_installations_at_a_time(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Failure, match="another installation runs"), install.alone(Host(), lock):
            raise AssertionError("not alone")


def test_who_comes_second_is_told_where_the_first_is(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    ours, theirs = os.openpty()
    first = (
        "import pathlib, signal; from mosinit import install; from mosinit.host import Host\n"
        "host = Host(); host.unshare_mounts = lambda: None\n"
        f"with install.alone(host, pathlib.Path({str(lock)!r}), pathlib.Path({str(tmp_path)!r})):\n"
        "    print(flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", first]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, cwd=tools.checkout()) as child:
        assert child.stdout
        child.stdout.readline()
        says = f"another installation runs \\(on {os.ttyname(theirs)}\\): go on there"
        try:
            with pytest.raises(Failure, match=says), install.alone(Host(), lock):
                raise AssertionError("not alone")
        finally:
            child.kill()
    os.close(ours)
    os.close(theirs)


class Leftover(Host):
    """A host on which an installation was killed."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[object] = []

    def unshare_mounts(self) -> None:
        """Note it."""
        self.done.append("unshare")

    def sleep(self, seconds: float) -> None:
        """Not here."""

    def dm(
        self, command: init.DmCommand, name: str, flags: int = 0, table: tuple[int, str, str] | None = None
    ) -> str:
        """Remove a device, unless its file system is still used by another."""
        self.done.append((command.name, name))
        if name.endswith("store") and ("DEV_REMOVE", "mosinit-install-zot-0") not in self.done:
            raise OSError(16, "Device or resource busy")
        return ""


def test_what_a_killed_installation_left_open_is_closed(tmp_path: Path) -> None:
    for name in ("control", "mosinit-store", "mosinit-install-machine-store", "mosinit-install-zot-0"):
        (tmp_path / name).touch()
    host = Leftover()
    with install.alone(host, tmp_path / "lock", tmp_path):
        assert host.done == [
            "unshare",
            ("DEV_REMOVE", "mosinit-install-machine-store"),
            ("DEV_REMOVE", "mosinit-install-zot-0"),
            ("DEV_REMOVE", "mosinit-install-machine-store"),
        ]


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


def test_a_release_of_another_organisation(
    made: Setting, other: keys.Keyset, disk: Path, tmp_path: Path
) -> None:
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


def test_a_release_that_the_tpm_of_this_machine_calls_unsafe(
    made: Setting, disk: Path, memory: Path
) -> None:
    provisioned = installation.make_provisioned(made.keyset, epoch=2)
    with pytest.raises(init.Refused, match="EPOCH: expected a release of epoch 2 or later.*seen epoch 1"):
        installation.run(NativeInstaller(), dataclasses.replace(made, provisioned=provisioned), disk)
    assert (memory / "disk").stat().st_blocks == 0


def test_a_uki_of_a_later_epoch_than_this_firmware_is_approved_for(
    made: Setting, disk: Path, memory: Path, tmp_path: Path
) -> None:
    """It is approved up to epoch 2: what was installed would refuse to start, by TPM-APPROVAL."""
    release = installation.make_release(Host(), tmp_path / "later", made.keyset, 8, epoch=3)
    later = dataclasses.replace(made, release=release)
    with pytest.raises(init.Refused, match="TPM-APPROVAL: .* for epoch 3, seen one up to epoch 2") as caught:
        installation.run(NativeInstaller(), later, disk)
    assert "install a release of epoch 2; or" in explain.refusal(caught.value)["remedy"]
    assert (memory / "disk").stat().st_blocks == 0
    again = installation.make_release(Host(), tmp_path / "again", made.keyset, 9, epoch=2)
    installation.run(NativeInstaller(), dataclasses.replace(made, release=again), disk)


def test_a_record_of_another_organisation(made: Setting, other: keys.Keyset, disk: Path) -> None:
    foreign = dataclasses.replace(made, provisioned=installation.make_provisioned(other))
    assert refused(foreign, disk) == "RECORD-SIGNATURE"


def test_an_installed_system_installs_nothing(made: Setting, disk: Path, tmp_path: Path) -> None:
    left = installation.make_left(tmp_path / "left", made.keyset, mode="run")
    with pytest.raises(Failure, match="boot the live medium"):
        install.plan(Host(), installation.options(made, disk, left=left))
    with pytest.raises(Failure, match="was not started by mosinit"):
        install.plan(Host(), installation.options(made, disk, left=tmp_path / "none"))


# --- What is found when it is read back ------------------------------------------------------------------


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
        installation.run(Meddled("reading everything back", spoil_store), made, disk)
    assert layout.inspect(Host(), disk).unfinished


def test_a_header_with_other_tokens(made: Setting, disk: Path) -> None:
    def spoil_tokens() -> None:
        others = made.provisioned.tokens._replace(seal_public=b"another")
        luks.import_tokens(Host(), Path(f"{disk}p2"), others)

    with pytest.raises(init.Refused, match="LUKS-TOKEN"):
        installation.run(Meddled("reading everything back", spoil_tokens), made, disk)


def spoil_config(disk: Path) -> None:
    """The first generation goes."""
    with (
        installation.data_behind(Path(f"{disk}p2")) as data,
        NativeInstaller().mounted(data, "ext4") as config,
    ):
        (config / "manifest.git/refs/heads/main").unlink()


def spoil_generation(disk: Path) -> None:
    """Another commit with the same content takes the place of the first generation."""
    with (
        installation.data_behind(Path(f"{disk}p2")) as data,
        NativeInstaller().mounted(data, "ext4") as config,
    ):
        repository = config / "manifest.git"
        words = ["git", f"--git-dir={repository}", "-c", "user.name=m", "-c", "user.email=m@localhost"]
        tree = subprocess.check_output([*words, "rev-parse", "main^{tree}"], text=True).strip()
        made = subprocess.check_output([*words, "commit-tree", "-m", "another", tree], text=True).strip()
        (repository / "refs/heads/main").write_text(f"{made}\n")


def spoil_esp(name: str) -> Callable[[Path], None]:
    """One bit of a file on the boot partition."""

    def change(disk: Path) -> None:
        with NativeInstaller().mounted(Path(f"{disk}p1"), "vfat") as folder:
            data = bytearray((folder / name).read_bytes())
            data[5000] ^= 1
            (folder / name).write_bytes(data)

    return change


def spoil_table(disk: Path) -> None:
    """A partition is of another type."""
    words = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--part-type"]
    subprocess.run([*words, disk, "4", init.LINUX_TYPE], check=True)


KEPT_BADLY: list[tuple[Callable[[Path], None], type[Exception], str]] = [
    (spoil_config, Failure, r"is not installed \(GIT-REF: "),
    (spoil_generation, init.Refused, "GENERATION"),
    (spoil_esp("EFI/Linux/mosinit_7+3.efi"), init.Refused, "IMAGE-DIGEST"),
    (spoil_esp(LOADER), Failure, "does not keep what is written to it: use another disk"),
    (spoil_esp(NOT_YET), Failure, "does not keep what is written to it: use another disk"),
    (spoil_table, Failure, "does not keep what is written to it"),
]


@pytest.mark.parametrize(("change", "kind", "says"), KEPT_BADLY)
def test_each_part_is_read_back(
    made: Setting, disk: Path, change: Callable[[Path], None], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        installation.run(Meddled("reading everything back", lambda: change(disk)), made, disk)
    # Who gave it another table since has to be asked; nobody else has.
    assert layout.inspect(Host(), disk).unfinished is (change is not spoil_table)
    with NativeInstaller().mounted(Path(f"{disk}p1"), "vfat", read_only=True) as folder:
        assert not (folder / STARTED).exists()


# --- A disk that fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mebibytes", [1, 12, 30, 45])
def test_a_disk_on_which_nothing_more_fits(made: Setting, disk: Path, memory: Path, mebibytes: int) -> None:
    """Behind a loop device is a file system that is full: writes fail, wherever they are."""
    folder = memory / "full"
    folder.mkdir()
    Host().mount("tmpfs", str(folder), "tmpfs", init.MountFlag(0), f"size={mebibytes}m")
    other = digest_of_edges(disk)
    try:
        with loop(folder / "disk") as failing:
            host = NativeInstaller()
            with pytest.raises(Failure) as caught:
                installation.run(host, made, failing)
            said = str(caught.value)
            assert f"{failing} " in said
            assert "\n" not in said
            assert host.variables == {}
    finally:
        Host().unmount(str(folder), lazy=True)
    assert digest_of_edges(disk) == other
    installation.run(NativeInstaller(), made, disk)
