"""The way back into a machine whose TPM is new: what is found, said, done, and read back as a boot does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mosinit import damage, esp, explain, generations, init, layout, luks, machinedisk, recover, rekey
from mosinit.host import Failure, Host
from tests import installation, recovering
from tests.installation import TOOLS
from tests.recovering import NativeRecoverer, Site, fingerprint

NEEDED = (*TOOLS, "swtpm", "tpm2_clear", "e2fsck", "fsck.vfat", "mcopy")


@pytest.fixture(scope="module")
def renewed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A machine whose TPM was cleared, and provisioned anew: its folder is `made.state` now."""
    with recovering.site(tmp_path_factory.mktemp("machine")) as site:
        site.provision_anew()
        yield site


@pytest.fixture
def disk(renewed: Site, need: Callable[..., None], memory: Path) -> Iterator[Path]:
    """A copy of the machine's disk."""
    need(*NEEDED)
    with recovering.copy_of(renewed, memory) as device:
        yield device


def test_a_new_tpm(renewed: Site, disk: Path, memory: Path) -> None:
    before, state = fingerprint(memory / "copy"), renewed.made.state
    plan = renewed.plan(disk, state)
    assert plan["left"] == []
    assert plan["will do"] == [
        "give config the key of the new provisioning and its recovery key in place of the old",
        "give store the key of the new provisioning and its recovery key in place of the old",
        "give state the key of the new provisioning and its recovery key in place of the old",
        "lay the new one",
    ]
    assert fingerprint(memory / "copy") == before
    kept = machine_id(disk)
    done = renewed.recover(disk, state)
    assert (done["will do"], done["left"], done["status"]) == (plan["will do"], [], 0)
    assert renewed.boots(disk, state).contents.sequence == 7
    assert machine_id(disk) == kept
    check_keys(renewed, disk, state)
    # Done is done: nothing more is found.
    assert renewed.recover(disk, state, recovery=())["found"] == []


def config_of(disk: Path) -> Path:
    return Path(f"{disk}p2")


def machine_id(disk: Path) -> str:
    with (
        installation.data_behind(config_of(disk)) as data,
        Host().mounted(data, "ext4", read_only=True) as folder,
    ):
        return (folder / "state/etc/machine-id").read_text()


def check_keys(site: Site, disk: Path, state: Path) -> None:
    """See that the new recovery key opens each volume, and nothing of before does."""
    new = (state / "recovery.key").read_bytes()
    for number in (2, 3, 5):
        header = luks.read_header(Host(), Path(f"{disk}p{number}"), "config" if number == 2 else "plain")
        assert header.slots == (0, 1)
        assert luks.read_volume_key(header, 1, new)
        for slot in header.slots:
            assert luks.read_volume_key(header, slot, site.recovery_key()) is None
    with (
        installation.data_behind(config_of(disk)) as data,
        Host().mounted(data, "ext4", read_only=True) as folder,
    ):
        for name in ("sudi.key", "sudi.auth", "sudi.pem"):
            assert (folder / "sudi" / name).read_bytes() == (state / name).read_bytes()
            assert (folder / "sudi" / name).stat().st_mode & 0o777 == 0o400


@pytest.mark.parametrize("cut", range(1, 25, 2))
def test_interrupted_at_a_write_it_goes_on(renewed: Site, disk: Path, cut: int) -> None:
    """Three headers are written anew, each by two slots, two copies, and what is overwritten."""
    host = renewed.host
    host.cut = cut
    try:
        renewed.recover(disk, renewed.made.state, host)
    except KeyboardInterrupt:
        assert cut < 22
        old = renewed.recovery_key()
        done = renewed.recover(disk, renewed.made.state, recovery=(old,))
        assert done["status"] == 0
    assert renewed.boots(disk, renewed.made.state).contents.sequence == 7
    check_keys(renewed, disk, renewed.made.state)


STEPS = (
    "config: the key", "store: the key", "state: the key", "reading everything back",
)  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_interrupted_at_a_step_it_goes_on(renewed: Site, disk: Path, step: str) -> None:
    host = renewed.host
    host.failing = step
    with pytest.raises(OSError, match="Input/output"):
        renewed.recover(disk, renewed.made.state, host)
    assert renewed.recover(disk, renewed.made.state)["status"] == 0
    check_keys(renewed, disk, renewed.made.state)


class Forgetful(NativeRecoverer):
    """Changes something on the disk just before all is read back."""

    def __init__(self, site: Site, change: Callable[[], object]) -> None:
        super().__init__(site.made)
        self.change = change

    def say(self, text: str) -> None:
        """Note the step."""
        super().say(text)
        if text == "reading everything back":
            self.change()


def old_tokens(site: Site, disk: Path) -> None:
    before = luks.read_header(Host(), Path(f"{site.image}-config"), "config")
    assert before.tokens
    luks.import_tokens(Host(), config_of(disk), before.tokens)


def one_copy(site: Site, disk: Path) -> None:
    with open(f"{disk}p5", "r+b", buffering=0) as file:
        file.write(bytes(4096))


def another_key(site: Site, disk: Path) -> None:
    header = luks.read_header(Host(), Path(f"{disk}p3"), "plain")
    recovery = (site.made.state / "recovery.key").read_bytes()
    key = luks.read_volume_key(header, 1, recovery)
    assert key
    fresh = rekey.renewed(Host(), header, "plain", key, rekey.Keys(bytes(32), recovery), None)
    rekey.write(Host(), Path(f"{disk}p3"), "plain", header, fresh)


def no_generation(site: Site, disk: Path) -> None:
    with installation.data_behind(config_of(disk)) as data, Host().mounted(data, "ext4") as folder:
        (folder / "manifest.git/refs/heads/main").unlink()


def no_loader(site: Site, disk: Path) -> None:
    Host().run(["mdel", "-i", f"{disk}p1", f"::{esp.STARTED}"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (old_tokens, "LUKS-TOKEN"), (one_copy, "LUKS-HEADER"), (another_key, "VOLUME-KEY"),
        (no_generation, "GIT-REF"), (no_loader, "does not keep what is written to it"),
    ],
)  # fmt: skip
def test_a_disk_that_changes_what_it_keeps_is_not_called_recovered(
    renewed: Site, disk: Path, change: Callable[[Site, Path], None], words: str
) -> None:
    with open(config_of(disk), "rb") as file:
        Path(f"{renewed.image}-config").write_bytes(file.read(init.LUKS_DATA + init.BLOCK))
    host = Forgetful(renewed, lambda: change(renewed, disk))
    with pytest.raises((init.Refused, Failure), match=words):
        renewed.recover(disk, renewed.made.state, host)
    assert not host.variables  # nor does the firmware start it by an entry of ours


def test_the_wrong_recovery_key_changes_nothing(renewed: Site, disk: Path, memory: Path) -> None:
    before = fingerprint(memory / "copy")
    for recovery, words in (((b"wrong",), "opens neither config nor store"), ((), "--key")):
        with pytest.raises(Failure, match=words) as error:
            renewed.recover(disk, renewed.made.state, recovery=recovery)
        assert "\n" not in str(error.value)
    assert fingerprint(memory / "copy") == before


def test_without_a_new_provisioning_it_says_so(renewed: Site, disk: Path, memory: Path) -> None:
    before = fingerprint(memory / "copy")
    done = renewed.recover(disk)
    assert done["status"] == 1
    assert "TPM-IDENTITY" in str(done["found"])
    assert "mosinit provision" in str(done["left"])
    assert fingerprint(memory / "copy") == before


def test_a_volume_of_another_machine(renewed: Site, disk: Path, memory: Path) -> None:
    """One whose slots the recovery key does not open is nobody's to write."""
    store = Path(f"{disk}p3")
    header = luks.read_header(Host(), store, "plain")
    luks.format_volume(Host(), store, "plain", header.uuid, bytes(32))
    luks.add_recovery(Host(), store, bytes(32), b"somebody else's")
    before = fingerprint(memory / "copy")
    with pytest.raises(init.Refused, match="VOLUME-KEY.*store"):
        renewed.recover(disk, renewed.made.state)
    assert fingerprint(memory / "copy") == before


@pytest.mark.parametrize("name", ["store", "state"])
def test_after_a_recovery_that_was_cut_off_the_other_key_comes_first(
    renewed: Site, disk: Path, name: str
) -> None:
    """Before anything is given up: the volume may have the key of the provisioning in between."""
    volume, between = Path(f"{disk}p{3 if name == 'store' else 5}"), b"of the provisioning in between"
    header = luks.read_header(Host(), volume, "plain")
    luks.format_volume(Host(), volume, "plain", header.uuid, bytes(32))
    luks.add_recovery(Host(), volume, bytes(32), between)
    old = renewed.recovery_key()
    with pytest.raises(init.Refused, match=f"VOLUME-KEY.*{name}") as caught:
        renewed.plan(disk, renewed.made.state, recovery=(old,))
    first, _, rest = explain.refusal(caught.value)["remedy"].partition("; ")
    assert "--key" in first and "--key" not in rest
    assert "--anew" not in first and ("--anew" in rest) == (name == "store")
    assert renewed.plan(disk, renewed.made.state, recovery=(old, between))["left"] == []


def test_an_older_epoch_is_not_good_again(renewed: Site, disk: Path, memory: Path) -> None:
    """The disk's order names epoch 1, as the organisation's did; here it names a later one."""
    host, keyset = Host(), renewed.made.keyset
    header = luks.read_header(host, config_of(disk), "config")
    assert header.tokens
    statement = json.dumps(init.epoch_statement(keyset.product, 3)).encode()
    later = header.tokens._replace(
        order_statement=statement, order_signature=keyset.signer("product").sign(statement),
        order_certificate=keyset.certificate_path("product").read_bytes(),
    )  # fmt: skip
    luks.import_tokens(host, config_of(disk), later)
    before = fingerprint(memory / "copy")
    with pytest.raises(init.Refused, match="EPOCH.*medium of epoch 3"):
        renewed.recover(disk, renewed.made.state)
    policy = renewed.left / "policy.json"
    text = policy.read_text()
    policy.write_text(text.replace('"epoch": 1', '"epoch": 3'))
    try:
        assert policy.read_text() != text
        with pytest.raises(init.Refused, match="EPOCH.*order of epoch 3"):
            renewed.recover(disk, renewed.made.state)
    finally:
        policy.write_text(text)
    assert fingerprint(memory / "copy") == before


def test_a_disk_in_use(renewed: Site, disk: Path) -> None:
    fd = os.open(f"{disk}p5", os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(Failure, match="in use"):
            renewed.recover(disk, renewed.made.state)
    finally:
        os.close(fd)


def test_a_disk_that_changes_meanwhile(renewed: Site, disk: Path) -> None:
    host = renewed.host
    seen = damage.look(host, renewed.options(disk, renewed.made.state))
    words = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--disk-id", str(disk)]
    host.run([*words, "5a3d1b0e-6f0c-4d7a-9c55-d0b3a1f7e2c5"])
    with pytest.raises(Failure, match="not the disk that was looked at"):
        recover.act(host, seen)


def test_it_is_for_live_media(renewed: Site, disk: Path, tmp_path: Path) -> None:
    left = installation.make_left(tmp_path / "left", renewed.made.keyset, "run")
    with pytest.raises(Failure, match="live medium"):
        renewed.recover(disk, renewed.made.state, left=left)


def test_a_disk_must_be_named_unless_there_is_one(renewed: Site) -> None:
    class Disks(NativeRecoverer):
        def names(self, path: str) -> list[str]:
            return [] if path == "/sys/block" else super().names(path)

    with pytest.raises(Failure, match="no disk could be the machine's: name its disk by --disk"):
        damage.look(Disks(renewed.made), replace(renewed.options(Path("/dev/null")), disk=None))


def test_no_other_partition_is_read_as_ours(renewed: Site, disk: Path) -> None:
    parts = machinedisk.read_partitions(Host(), layout.inspect(Host(), disk))
    assert [part.name for part in parts.partitions] == ["esp", "config", "store", "scratch", "state"]


def generations_of(disk: Path, product: str) -> list[int]:
    with (
        installation.data_behind(config_of(disk)) as data,
        Host().mounted(data, "ext4", read_only=True) as folder,
    ):
        return [each.sequence for each in generations.list_all(folder / "manifest.git", product)]
