"""The remedies of checks of TPM, record and config, followed word by word: a boot refuses the machine by
that check, its TPM is cleared if they say so, it is provisioned again, `recover` is called as they say, and
then the TPM opens all volumes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mosinit import approvals, damage, enroll, init, install, layout, luks, machinedisk, recover, rekey
from mosinit.host import Host
from tests import provisioned, recovering, sealed, volumes
from tests.recovering import Site
from tests.test_recover import NEEDED, config_of
from tests.tpms import swtpm


@dataclass
class Machine:
    """A machine whose TPM and disk a test may spoil."""

    site: Site
    disk: Path
    serial: str

    @property
    def auths(self) -> dict[str, str]:
        """Return the passwords of its TPM, as the organisation has them."""
        record = enroll.open_recovery(self.site.record, self.site.made.keyset)
        return {name: value.decode() for name, value in record.auths.items()}

    def tokens(self, **changes: object) -> None:
        """Change tokens in config's header."""
        header = luks.read_header(Host(), config_of(self.disk), "config")
        assert header.tokens
        wanted = header.tokens._replace(**changes)  # type: ignore[arg-type]
        luks.import_tokens(Host(), config_of(self.disk), wanted)

    def opens(self) -> None:
        """Do what a boot does until all volumes are open. Raises `Refused`."""
        k, approval = provisioned.boot(self.site.made)
        policy, host = install.policy_of_live(self.site.left), Host()
        header = luks.read_header(host, config_of(self.disk), "config")
        tokens, ours = header.tokens, policy.organisation
        assert tokens
        record = init.verify_record(tokens.record, ours["sudi-ca.pem"], policy.product)
        order = (tokens.order_statement, tokens.order_signature, tokens.order_certificate)
        init.verify_epoch_order(*order, policy)
        storage_key = init.check_tpm(k, record, policy.epoch)
        policies = init.policy_keys(ours["pcr.pub"], ours["platform.pub"])
        secret = init.unseal(k, tokens, storage_key, policies, approval)
        init.check_secret(record, secret)
        parts = machinedisk.read_partitions(host, layout.inspect(host, self.disk))
        for name in damage.KINDS:
            part = parts.named(name)
            device = layout.device(parts, part)
            key = secret if name == "config" else init.derive_key(secret, name, part.uuid)
            header = luks.read_header(host, device, "config" if name == "config" else "plain")
            init.open_volume(host, header, str(device), bytearray(key), None)

    def provision(self) -> Path:
        """Provision its TPM, with the organisation's consent if it is provisioned; return STATE."""
        made = self.site.made
        state, again = made.folder / "again", bool(made.flags() & provisioned.PASSWORDS)
        if again:
            made.consent(self.serial)
        made.request(state=state, again=again)
        made.enroll(state=state)
        made.finish(state=state)
        return state


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A machine that was installed."""
    with recovering.site(tmp_path_factory.mktemp("machine")) as made:
        yield made


@pytest.fixture
def machine(shared: Site, need: Callable[..., None], memory: Path, tmp_path: Path) -> Iterator[Machine]:
    """The machine, with a copy of its disk and its TPM."""
    need(*NEEDED)
    running = shutil.ignore_patterns("*.sock*", ".lock", "*volatile*")
    shutil.copytree(shared.made.tpm.folder, tmp_path / "tpm", ignore=running)
    shutil.copytree(shared.made.folder, tmp_path / "work")
    with swtpm(tmp_path / "tpm") as tpm, recovering.copy_of(shared, memory) as disk:
        made = dataclasses.replace(shared.made, tpm=tpm, folder=tmp_path / "work")
        made.start()
        yield Machine(dataclasses.replace(shared, made=made), disk, shared.record.parent.name)


# --- What happens to a machine -----------------------------------------------------------------------------


def cleared(machine: Machine) -> None:
    machine.site.made.tpm.clear()


def without_storage_key(machine: Machine) -> None:
    machine.site.made.tpm.run("tpm2_evictcontrol", "-C", "o", "-P", machine.auths["owner"], "-c", sealed.SRK)


def another_index(machine: Machine) -> None:
    run, owner = machine.site.made.tpm.run, machine.auths["owner"]
    run("tpm2_nvundefine", "-C", "o", "-P", owner, sealed.INDEX)
    run("tpm2_nvdefine", "-C", "o", "-P", owner, "-s", "8", "-a", "nt=bits|authwrite|authread", sealed.INDEX)


def without_a_password(machine: Machine) -> None:
    machine.site.made.tpm.run("tpm2_changeauth", "-c", "l", "-p", machine.auths["lockout"])


def another_board(machine: Machine) -> None:
    """One whose TPM this organisation provisioned as well."""
    made, first = machine.site.made, machine.site.made.folder / "state"
    made.tpm.clear()
    made.start()
    first.rename(first.with_name("first"))
    machine.serial = made.provision()


def another_seal(machine: Machine) -> None:
    header = luks.read_header(Host(), config_of(machine.disk), "config")
    assert header.tokens
    private = bytearray(header.tokens.seal_private)
    private[-1] ^= 1
    machine.tokens(seal_private=bytes(private))


def another_order(machine: Machine) -> None:
    machine.tokens(order_signature=b"nobody's")


def damaged_record(machine: Machine) -> None:
    machine.tokens(record=b"damaged")


def missing_token(machine: Machine) -> None:
    def remove(document: dict[str, Any]) -> None:
        del document["tokens"]["3"]

    config = config_of(machine.disk)
    with config.open("r+b", buffering=0) as file:
        data = file.read(init.LUKS_BYTES)
        file.seek(0)
        file.write(volumes.changed(data, remove)[: 2 * init.LUKS_COPY])
        os.fsync(file.fileno())


def another_key(machine: Machine) -> None:
    """Slot 0 of the store takes a key that follows from no secret of this machine."""
    store = Path(f"{machine.disk}p3")
    header = luks.read_header(Host(), store, "plain")
    recovery = machine.site.recovery_key()
    key = luks.read_volume_key(header, 1, recovery)
    assert key
    fresh = rekey.renewed(Host(), header, "plain", key, rekey.Keys(bytes(range(32)), recovery), None)
    rekey.write(Host(), store, "plain", header, fresh)


def another_config(machine: Machine) -> None:
    """Somebody's, sealed to this TPM under the public policy, with this machine's record."""
    header = luks.read_header(Host(), config_of(machine.disk), "config")
    made, foreign = machine.site.made, machine.site.made.folder / "foreign"
    assert header.tokens
    (made.tpm.folder / "seal.policy").write_bytes(approvals.policy_keys(made.keyset).seal)
    theirs = sealed.seal(made.tpm, bytes(32))
    volumes.config(Host(), foreign, header.uuid, bytes(32))
    luks.import_tokens(
        Host(), foreign, header.tokens._replace(seal_public=theirs.public, seal_private=theirs.private)
    )
    with config_of(machine.disk).open("r+b", buffering=0) as file:
        file.write(foreign.read_bytes()[: init.LUKS_DATA])
        os.fsync(file.fileno())


FAULTS = {
    "TPM-CLEARED": cleared, "TPM-SRK": without_storage_key, "TPM-INDEX": another_index,
    "TPM-STATE": without_a_password, "TPM-IDENTITY": another_board, "TPM-SEAL": another_seal,
    "EPOCH-ORDER": another_order, "RECORD-FORMAT": damaged_record, "LUKS-TOKEN": missing_token,
    "VOLUME-KEY": another_key, "VOLUME-IDENTITY": another_config,
}  # fmt: skip


# --- And what brings it back -------------------------------------------------------------------------------


def test_each_check_that_takes_a_new_provisioning_is_here() -> None:
    wanted = {check for check, words in recover.HANDLED.items() if "--dir STATE" in words}
    assert set(FAULTS) == wanted


def test_nothing_is_wrong_with_it(machine: Machine) -> None:
    machine.opens()


@pytest.mark.parametrize("check", FAULTS)
def test_the_remedy_brings_it_back(machine: Machine, check: str) -> None:
    FAULTS[check](machine)
    with pytest.raises(init.Refused) as refused:
        machine.opens()
    assert refused.value.check == check
    if "clear the TPM" in init.CHECKS[check].remedy:
        machine.site.made.tpm.clear()
        machine.site.made.start()
    elif check == "TPM-CLEARED":
        machine.site.made.restart()
    state = machine.provision()
    done = machine.site.recover(machine.disk, state, anew="--anew" in recover.HANDLED[check])
    assert (done["status"], done["left"]) == (0, [])
    machine.opens()
