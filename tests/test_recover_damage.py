"""The way back into a machine whose disk is damaged, its TPM as it was: each fault is found, said, mended
and read back; what a boot would refuse is what is told.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mosinit import approvals, esp, exchange, explain, generations, init, luks
from mosinit.host import Failure, Host
from tests import installation, recovering, volumes
from tests.installation import TOOLS
from tests.recovering import Site, fingerprint
from tests.test_recover import NEEDED, config_of, generations_of, machine_id


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A machine whose TPM is as it was."""
    with recovering.site(tmp_path_factory.mktemp("machine")) as made:
        yield made


@pytest.fixture
def disk(site: Site, need: Callable[..., None], memory: Path) -> Iterator[Path]:
    """A copy of the machine's disk."""
    need(*NEEDED, *TOOLS)
    with recovering.copy_of(site, memory) as device:
        yield device


def overwrite(path: str | Path, offset: int, data: bytes) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)
        os.fsync(file.fileno())


def mended(site: Site, disk: Path, check: str, will: str, source: str | None = None) -> dict[str, object]:
    """See that a fault is found and mended, and then is none; the plan writes nothing."""
    image = disk_image(disk)
    before = fingerprint(image)
    plan = site.plan(disk, source=source)
    assert fingerprint(image) == before
    assert check in str(plan["found"])
    assert will in str(plan["will do"])
    done = site.recover(disk, source=source)
    assert (done["found"], done["will do"], done["status"]) == (plan["found"], plan["will do"], 0)
    assert site.boots(disk, site.first).contents.sequence >= 7
    assert site.recover(disk)["found"] == []
    return done


def disk_image(disk: Path) -> Path:
    done = subprocess.run(["losetup", "-nO", "BACK-FILE", disk], capture_output=True, check=True, text=True)
    return Path(done.stdout.strip())


def test_nothing_is_wrong(site: Site, disk: Path) -> None:
    before = fingerprint(disk_image(disk))
    plan = site.plan(disk)
    assert (plan["found"], plan["will do"], plan["left"]) == ([], [], [])
    done = site.recover(disk)
    assert (done["status"], done["boot entry"], done["next"]) == (
        0,
        "Boot0000",
        "remove the medium and restart",
    )
    assert fingerprint(disk_image(disk)) == before


@pytest.mark.parametrize("copy", [0, init.LUKS_COPY])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_one_copy_of_a_header(site: Site, disk: Path, number: int, copy: int) -> None:
    overwrite(f"{disk}p{number}", copy, bytes(4096))
    mended(site, disk, "LUKS-HEADER", "make both copies of the header agree")


def test_copies_of_a_header_that_disagree(site: Site, disk: Path) -> None:
    data = config_of(disk).open("rb").read(init.LUKS_BYTES)
    document = volumes.document_of(data)
    document["keyslots"]["0"]["kdf"]["iterations"] = 10**9
    overwrite(config_of(disk), 0, volumes.with_text(data, volumes.dump(document), copies=(0,))[:65536])
    mended(site, disk, "LUKS-HEADER", "make both copies of the header agree")


def test_a_lost_header(site: Site, disk: Path) -> None:
    takes = {"config": ("--anew", "--dir"), "store": ("--anew", "SOURCE", "--dir"), "state": ("by hand",)}
    for number, name in ((2, "config"), (3, "store"), (5, "state")):
        with open(f"{disk}p{number}", "rb") as file:
            kept = file.read(2 * init.LUKS_COPY)
        overwrite(f"{disk}p{number}", 0, bytes(len(kept)))
        before = fingerprint(disk_image(disk))
        with pytest.raises(init.Refused, match="LUKS-HEADER") as error:
            site.recover(disk)
        told = str(error.value.__notes__)
        assert [word for word in (name, *takes[name]) if word not in told] == []
        assert fingerprint(disk_image(disk)) == before
        overwrite(f"{disk}p{number}", 0, kept)


def test_a_lost_config_is_made_anew(site: Site, disk: Path) -> None:
    old = machine_id(disk)
    overwrite(config_of(disk), 0, bytes(2 * init.LUKS_COPY))
    with pytest.raises(Failure, match="mosinit provision"):
        site.recover(disk, anew=True)
    plan = site.plan(disk, site.first, anew=True)
    assert "machine-id and SSH host keys will be new" in str(plan["will do"])
    done = site.recover(disk, site.first, anew=True)
    assert done["status"] == 0
    assert site.boots(disk, site.first).contents.sequence == 7
    assert machine_id(disk) != old
    with (
        installation.data_behind(config_of(disk)) as data,
        Host().mounted(data, "ext4", read_only=True) as folder,
    ):
        assert {path.name for path in folder.iterdir()} == {"lost+found", "manifest.git", "state", "sudi"}
        assert (folder / "state/volume").exists()
        assert (folder / "sudi/sudi.key").read_bytes() == (site.first / "sudi.key").read_bytes()
    assert site.recover(disk)["found"] == []


def test_a_lost_store_is_filled_again(site: Site, disk: Path) -> None:
    overwrite(f"{disk}p3", 0, bytes(2 * init.LUKS_COPY))
    with pytest.raises(Failure, match="name the release"):
        site.recover(disk, site.first, anew=True)
    done = site.recover(disk, site.first, anew=True, source=f"oci:{site.release}")
    assert done["status"] == 0
    assert site.boots(disk, site.first).contents.sequence == 7
    assert site.recover(disk)["found"] == []


def in_config(disk: Path, change: Callable[[Path], object]) -> None:
    """Change files of config."""
    with installation.data_behind(config_of(disk)) as data, Host().mounted(data, "ext4") as folder:
        change(folder)


def in_store(disk: Path, change: Callable[[Path], object]) -> None:
    with installation.data_behind(Path(f"{disk}p3")) as data, Host().mounted(data, "ext4") as folder:
        change(folder / init.REPOSITORY)


def git(folder: Path, *words: str) -> None:
    command = ["git", "-c", "safe.directory=*", f"--git-dir={folder / 'manifest.git'}", *words]
    subprocess.run(command, check=True, capture_output=True)


def test_packs(site: Site, disk: Path) -> None:
    def pack(folder: Path) -> None:
        git(folder, "gc", "--quiet")
        git(folder, "pack-refs", "--all")

    in_config(disk, pack)
    mended(site, disk, "GIT-PACKED", "make manifest.git anew, with generation 7")
    assert generations_of(disk, site.made.keyset.product) == [7]


@pytest.mark.parametrize(
    ("what", "check"), [("refs/heads/main", "GIT-REF"), ("objects", "GIT-OBJECT"), ("", "GIT-REF")]
)
def test_a_damaged_manifest_git(site: Site, disk: Path, what: str, check: str) -> None:
    def remove(folder: Path) -> None:
        target = folder / "manifest.git" / what
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    old = machine_id(disk)
    in_config(disk, remove)
    mended(site, disk, check, "make manifest.git anew, with generation 7")
    assert generations_of(disk, site.made.keyset.product) == [7]
    assert machine_id(disk) == old


def test_a_good_generation_starts_without_tries(site: Site, disk: Path) -> None:
    def mark(folder: Path) -> None:
        head = generations.head(folder / "manifest.git")
        assert head
        generations.mark_good(Host(), folder / "manifest.git", head)

    in_config(disk, mark)
    subprocess.run(["mkfs.vfat", f"{disk}p1"], check=True, capture_output=True)
    mended(site, disk, "EFI system partition", "make its FAT anew")
    assert "EFI/Linux/mosinit_7.efi" in esp_files(disk)


def esp_files(disk: Path) -> dict[str, bytes]:
    host = installation.NativeInstaller()
    with host.mounted(Path(f"{disk}p1"), "vfat", read_only=True) as folder:
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }


def wipe(disk: Path) -> None:
    overwrite(f"{disk}p1", 0, bytes(8 << 20))


def remove(*names: str) -> Callable[[Path], None]:
    def work(disk: Path) -> None:
        for name in names:
            subprocess.run(["mdel", "-i", f"{disk}p1", f"::{name}"], check=True)

    return work


def other(name: str, folder: str = "") -> Callable[[Path], None]:
    def work(disk: Path) -> None:
        if folder:
            subprocess.run(["mmd", "-i", f"{disk}p1", f"::{folder}"], check=True)
        command = ["mcopy", "-o", "-i", f"{disk}p1", "-", f"::{name}"]
        subprocess.run(command, input=b"something else", check=True)

    return work


@pytest.mark.parametrize(
    "damage",
    [
        wipe, remove(esp.STARTED), remove(esp.LOADER), remove("EFI/Linux/mosinit_7+3.efi"),
        other(esp.STARTED), other("EFI/Linux/mosinit_7+3.efi"), other("EFI/Linux/mosinit_7.efi"),
        other("loader/loader.conf"), other("EFI/Linux/zzz.efi"), other("EFI/Linux/mosinit_8.efi"),
        other("EFI/Linux/mosinit_7.efi.extra.d"), other("loader/entries/x.conf", "loader/entries"),
        other("loader/addons/a.addon.efi", "loader/addons"),
        other("loader/credentials/a.cred", "loader/credentials"),
        other("EFI/systemd/drivers/a.efi", "EFI/systemd/drivers"),
    ],
)  # fmt: skip
def test_a_damaged_esp(site: Site, disk: Path, damage: Callable[[Path], None]) -> None:
    good = esp_files(disk)
    damage(disk)
    with open(disk, "rb") as file:
        file.seek(513 << 20)
        behind = file.read(64 << 20)
    mended(site, disk, "EFI system partition", "make its FAT anew")
    assert esp_files(disk) == good
    with open(disk, "rb") as file:
        file.seek(513 << 20)
        assert file.read(64 << 20) == behind


def test_a_damaged_file_system(site: Site, disk: Path) -> None:
    """A free block is called used, as a kernel that died may leave it: nothing is asked, nothing lost."""
    for number in (2, 3, 5):
        with installation.data_behind(Path(f"{disk}p{number}")) as data:
            words: list[str | Path] = ["debugfs", "-w", "-R", "setb 9000 20", data]
            subprocess.run(words, check=True, capture_output=True)
            assert subprocess.run(["e2fsck", "-fn", data], capture_output=True, check=False).returncode == 4
    done = mended(site, disk, "VOLUME-READ", "e2fsck -p")
    assert len(done["will do"]) == 3  # type: ignore[arg-type]


def test_a_file_system_that_would_lose_files(site: Site, disk: Path) -> None:
    with installation.data_behind(Path(f"{disk}p5")) as data:
        subprocess.run(["debugfs", "-w", "-R", "clri <2>", data], check=True, capture_output=True)
    with pytest.raises(Failure, match="e2fsck by hand"):
        site.recover(disk)


def spoil_blob(folder: Path) -> None:
    path = max((folder / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    path.write_bytes(b"x" + path.read_bytes()[1:])


def lose_blob(folder: Path) -> None:
    min((folder / "blobs/sha256").iterdir()).unlink()


def another_kind(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Put something that is no file in the place of a blob and of the list."""

    def work(folder: Path) -> None:
        for path in (max((folder / "blobs/sha256").iterdir()), folder / "index.json"):
            path.unlink()
            make(path)

    return work


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


@pytest.mark.parametrize(
    "damage",
    [
        spoil_blob, lose_blob, shutil.rmtree, another_kind(os.mkfifo), another_kind(os.mkdir),
        no_folder,
    ],
)  # fmt: skip
def test_a_damaged_store(site: Site, disk: Path, damage: Callable[[Path], None]) -> None:
    in_store(disk, damage)
    plan = site.plan(disk)
    assert (plan["will do"], "name the release" in str(plan["left"])) == ([], True)
    mended(site, disk, "the store has no whole release", "fill the store", source=f"oci:{site.release}")


def test_an_older_release_does_not_fill_it(site: Site, disk: Path, tmp_path: Path) -> None:
    in_store(disk, spoil_blob)
    older = installation.make_release(Host(), tmp_path / "older", site.made.keyset, 6)
    with pytest.raises(init.Refused, match="MANIFEST-SEQUENCE"):
        site.recover(disk, source=f"oci:{older}")


def test_a_release_below_the_epoch_of_the_disk_counts_for_nothing(
    site: Site, disk: Path, tmp_path: Path
) -> None:
    """The one that lies in the store no more than one that is to fill it: only a release of that epoch."""
    host, keyset, product = Host(), site.made.keyset, site.made.keyset.product
    header = luks.read_header(host, config_of(disk), "config")
    assert header.tokens
    statement = json.dumps(init.epoch_statement(product, 2)).encode()
    later = header.tokens._replace(
        order_statement=statement, order_signature=keyset.signer("product").sign(statement)
    )
    luks.import_tokens(host, config_of(disk), later)
    left = installation.make_left(tmp_path / "left", keyset)
    policy = left / "policy.json"
    policy.write_text(policy.read_text().replace('"epoch": 1', '"epoch": 2'))
    before = fingerprint(disk_image(disk))
    assert "MANIFEST-EPOCH" in str(site.plan(disk, left=left)["found"])
    older = installation.make_release(host, tmp_path / "older", keyset, 8)
    with pytest.raises(init.Refused, match="MANIFEST-EPOCH"):
        site.recover(disk, left=left, source=f"oci:{older}")
    assert fingerprint(disk_image(disk)) == before


def test_a_newer_release_fills_it(site: Site, disk: Path, tmp_path: Path) -> None:
    in_store(disk, spoil_blob)
    newer = installation.make_release(Host(), tmp_path / "newer", site.made.keyset, 8)
    mended(site, disk, "no whole release", "add that generation", source=f"oci:{newer}")
    assert generations_of(disk, site.made.keyset.product) == [8, 7]
    assert "EFI/Linux/mosinit_8+3.efi" in esp_files(disk)


def test_an_unusual_header_is_not_written(site: Site, disk: Path) -> None:
    """What a boot refuses is no good copy, also if the recovery key opens it."""
    data = config_of(disk).open("rb").read(init.LUKS_BYTES)
    document = volumes.document_of(data)
    document["segments"]["0"]["encryption"] = "cipher_null-ecb"
    overwrite(config_of(disk), 0, volumes.with_text(data, volumes.dump(document)))
    before = fingerprint(disk_image(disk))
    with pytest.raises(init.Refused, match="LUKS-HEADER"):
        site.recover(disk)
    assert fingerprint(disk_image(disk)) == before


def test_a_config_that_somebody_else_put_there(site: Site, disk: Path, tmp_path: Path) -> None:
    """The store is this machine's: with a word more config is made anew."""
    other = volumes.config(Host(), tmp_path / "other", secret=bytes(32))
    luks.import_tokens(Host(), other, volumes.TOKENS)
    overwrite(config_of(disk), 0, other.read_bytes()[: init.LUKS_DATA])
    before = fingerprint(disk_image(disk))
    with pytest.raises(init.Refused, match="VOLUME-KEY") as error:
        site.recover(disk, site.first)
    assert "--anew" in explain.refusal(error.value)["remedy"]
    assert fingerprint(disk_image(disk)) == before
    assert site.recover(disk, site.first, anew=True)["status"] == 0
    assert site.boots(disk, site.first).contents.sequence == 7


def test_the_record_of_another_product_or_organisation(site: Site, disk: Path) -> None:
    header = luks.read_header(Host(), config_of(disk), "config")
    assert header.tokens
    foreign = installation.make_provisioned(site.made.other)
    luks.import_tokens(Host(), config_of(disk), header.tokens._replace(record=foreign.tokens.record))
    with pytest.raises(init.Refused, match="RECORD-SIGNATURE"):
        site.recover(disk)


def test_a_damaged_record_takes_a_new_provisioning(site: Site, disk: Path) -> None:
    header = luks.read_header(Host(), config_of(disk), "config")
    assert header.tokens
    luks.import_tokens(Host(), config_of(disk), header.tokens._replace(record=b"damaged"))
    assert "mosinit provision" in str(site.plan(disk)["left"])
    done = site.recover(disk, site.first)
    assert (done["status"], "RECORD-FORMAT" in str(done["found"])) == (0, True)
    assert site.boots(disk, site.first).contents.sequence == 7


def test_tokens_that_no_boot_takes(site: Site, disk: Path) -> None:
    data = config_of(disk).open("rb").read(init.LUKS_BYTES)

    def remove_order(document: dict[str, Any]) -> None:
        del document["tokens"]["3"]

    overwrite(config_of(disk), 0, volumes.changed(data, remove_order)[: 2 * init.LUKS_COPY])
    with pytest.raises(init.Refused, match="LUKS-TOKEN") as error:
        site.recover(disk)
    assert "mosinit provision" in explain.refusal(error.value)["remedy"]
    done = site.recover(disk, site.first)
    assert (done["status"], "LUKS-TOKEN" in str(done["found"])) == (0, True)
    assert site.boots(disk, site.first).contents.sequence == 7
    assert site.recover(disk)["found"] == []


def test_what_root_left_in_place_of_the_identity(site: Site, disk: Path) -> None:
    def plant(folder: Path) -> None:
        shutil.rmtree(folder / "sudi")
        (folder / "sudi").symlink_to("/etc")

    in_config(disk, plant)
    before = sorted(os.listdir("/etc"))
    done = site.recover(disk, site.first)
    assert (done["status"], "machine identity" in str(done["found"])) == (0, True)
    assert sorted(os.listdir("/etc")) == before
    assert site.recover(disk, site.first)["found"] == []


def test_a_state_of_another_provisioning(site: Site, disk: Path, tmp_path: Path) -> None:
    """What was provisioned for another TPM, by this organisation, gives its disk to nobody."""
    folder = tmp_path / "other"
    shutil.copytree(site.first, folder)
    sealed = exchange.parse_sealed((folder / "seal.json").read_bytes(), "seal")
    other = installation.make_provisioned(site.made.keyset, secret=bytes(32))
    answer = sealed.answer._replace(certificate=other.tokens.record)
    (folder / "seal.json").write_bytes(exchange.encode_sealed(sealed._replace(answer=answer)))
    (folder / "config.key").write_bytes(bytes(32))
    before = fingerprint(disk_image(disk))
    with pytest.raises(init.Refused, match="TPM-IDENTITY") as error:
        site.recover(disk, folder)
    assert "last provisioning" in explain.refusal(error.value)["remedy"]
    assert fingerprint(disk_image(disk)) == before


def test_the_boot_entry_of_a_new_board(site: Site, disk: Path) -> None:
    host = site.host
    site.recover(disk, host=host)
    assert set(host.variables) == {"Boot0000", "BootOrder"}


def test_approvals_that_nobody_signed(site: Site, disk: Path) -> None:
    """With an approval of its own the disk would look open, and the TPM would keep it shut."""
    header = luks.read_header(Host(), config_of(disk), "config")
    assert header.tokens
    forged = {value: init.PlatformApproval(9, bytes(256)) for value in header.tokens.approvals}
    luks.import_tokens(Host(), config_of(disk), header.tokens._replace(approvals=forged))
    assert "TPM-APPROVAL" in str(site.plan(disk)["found"])
    assert "--reseal" in str(site.plan(disk)["left"])
    plan = site.plan(disk, site.first)
    assert "new tokens" in str(plan["will do"])
    assert site.recover(disk, site.first)["status"] == 0
    mended = luks.read_header(Host(), config_of(disk), "config")
    assert mended.tokens == header.tokens


def test_a_release_of_a_later_epoch_than_this_firmware_is_approved_for(
    site: Site, disk: Path, tmp_path: Path
) -> None:
    """The TPM would keep the disk shut to its UKI, whether that lies in the store or is to come."""
    later = f"oci:{installation.make_release(Host(), tmp_path / 'later', site.made.keyset, 8, epoch=3)}"
    in_store(disk, shutil.rmtree)
    done = site.recover(disk, source=later)
    assert done["status"] == 1
    assert "TPM-APPROVAL" in str(done["found"])
    assert "up to epoch 1, the TPM is at 1, this UKI at 3" in str(done["found"])
    assert done["left"] == ["run `mosinit recover --reseal` after this"]
    plan = site.plan(disk)
    assert [each.partition(":")[0] for each in plan["found"]] == ["TPM-APPROVAL"]  # type: ignore[attr-defined]
    assert plan["left"] == done["left"]


def test_approvals_that_came_later_stay(site: Site, disk: Path) -> None:
    header = luks.read_header(Host(), config_of(disk), "config")
    assert header.tokens
    keyset, later = site.made.keyset, {}
    for value, epoch in (*((value, 3) for value in header.tokens.approvals), ("11" * 32, 1)):
        later[value] = approvals.approve_platform(keyset, bytes.fromhex(value), epoch)
    more = {**later, "22" * 32: init.PlatformApproval(1, bytes(256))}
    luks.import_tokens(Host(), config_of(disk), header.tokens._replace(approvals=more))
    assert site.recover(disk, site.first)["status"] == 0
    mended = luks.read_header(Host(), config_of(disk), "config")
    assert mended.tokens == header.tokens._replace(approvals=later)


class Swapping(recovering.NativeRecoverer):
    """Somebody changes what a source lists once all was looked at."""

    def __init__(self, site: Site, source: Path) -> None:
        super().__init__(site.made)
        self.source = source

    def say(self, text: str) -> None:
        """Change it."""
        super().say(text)
        if text.startswith("found:"):
            for name in ("index.json", "oci-layout"):
                (self.source / name).write_text("anything")


def test_a_source_that_changes_between_looking_and_storing(site: Site, disk: Path, tmp_path: Path) -> None:
    """What was verified is stored."""
    source = Path(shutil.copytree(site.release, tmp_path / "source"))
    in_store(disk, shutil.rmtree)
    host = Swapping(site, source)
    done = site.recover(disk, host=host, source=f"oci:{source}")
    assert ((source / "index.json").read_text(), done["status"]) == ("anything", 0)
    assert site.recover(disk)["found"] == []
