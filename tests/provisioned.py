"""A keyset, a software TPM whose firmware trusts it, and the way from a request to a closed TPM."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mosinit import approvals, enroll, exchange, explain, firmware, init, keys, provision
from mosinit.host import Host
from mosinit.tpm import open_tpm
from tests.eventlogs import encode_log
from tests.tpms import Swtpm, TpmMachine, swtpm

PASSWORDS = init.Permanent.OWNER_AUTH | init.Permanent.ENDORSEMENT_AUTH | init.Permanent.LOCKOUT_AUTH


@dataclass
class Site:
    """An organisation and one machine; `folder` is for what a test makes."""

    host: Host
    folder: Path
    keyset: keys.Keyset
    other: keys.Keyset  # somebody else's
    organisation: Path
    log: Path
    tpm: Swtpm

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def answer(self) -> Path:
        return self.folder / "answer.json"

    @property
    def machines(self) -> Path:
        return self.folder / "machines"

    def policy(self) -> init.PolicyKeys:
        return approvals.policy_keys(self.keyset)

    def start(self) -> None:
        """Do what a firmware does that trusts the keyset: measure it into PCR 7."""
        events = approvals.platform_events(firmware.certificates_of_keyset(self.keyset.folder))
        for event in events:
            self.tpm.extend(event.pcr, event.digest)
        self.log.write_bytes(encode_log(events))

    def restart(self) -> None:
        """Restart the machine."""
        self.tpm.reset()
        self.start()

    def renew(self, folder: Path) -> None:
        """Clear the TPM, and begin with an empty folder."""
        self.tpm.clear()
        self.start()
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    def options(
        self, *, tcti: str = "", state: Path | None = None, epoch: int = 1, again: bool = False
    ) -> provision.Options:
        files = (self.folder / "consent.json", self.folder / "auths.json") if again else (None, None)
        return provision.Options(
            organisation=self.organisation, folder=state or self.state, epoch=epoch, event_log=self.log,
            tcti=tcti or self.tpm.tcti, consent=files[0], auths=files[1],
        )  # fmt: skip

    def request(
        self, *, tcti: str = "", state: Path | None = None, epoch: int = 1, again: bool = False
    ) -> dict[str, object]:
        return provision.request(self.host, self.options(tcti=tcti, state=state, epoch=epoch, again=again))

    def enroll(self, state: Path | None = None, epoch: int = 1) -> dict[str, object]:
        request = (state or self.state) / "request.json"
        return enroll.enroll(self.host, request, self.keyset, self.answer, self.machines, epoch)

    def finish(self, *, tcti: str = "", state: Path | None = None) -> dict[str, object]:
        return provision.finish(self.host, state or self.state, self.answer, tcti or self.tpm.tcti)

    def provision(self) -> str:
        """Go the whole way and return the machine's serial."""
        self.request()
        self.enroll()
        return str(self.finish()["provisioned"])

    def consent(self, serial: str) -> exchange.Recovery:
        """Leave what --again takes."""
        recovery = enroll.open_recovery(self.machines / serial / "recovery.cms", self.keyset)
        auths = self.folder / "auths.json"
        auths.touch(0o600)
        auths.write_bytes(exchange.encode_recovery(recovery))
        enroll.consent(self.host, serial, self.keyset, self.folder / "consent.json", self.machines)
        return recovery

    def flags(self) -> init.Permanent:
        with open_tpm(self.tpm.tcti) as machine:
            return machine.flags()[0]

    def saved_auths(self) -> bytes:
        return (self.state / "auths.json").read_bytes()


@contextlib.contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Make an organisation and a machine."""
    os.environ.setdefault("TSS2_LOG", "all+NONE")
    host = Host()
    keyset = keys.new(host, folder / "keys", "acme")
    other = keys.new(host, folder / "other", "other")
    keys.export(host, folder / "keys", folder / "organisation")
    with swtpm(folder / "tpm") as tpm:
        work = folder / "work"
        work.mkdir()
        yield Site(host, work, keyset, other, folder / "organisation", folder / "event-log", tpm)


# --- What a machine is found to be

# TPM 2.0 library, part 2, 6.5.2: what leaves something behind in a TPM.
WRITES = {
    0x120: "EvictControl", 0x12A: "NV_DefineSpace", 0x122: "NV_UndefineSpace", 0x135: "NV_SetBits",
    0x129: "HierarchyChangeAuth", 0x127: "ClearControl", 0x13A: "DictionaryAttackParameters",
    0x12E: "SetPrimaryPolicy",
}  # fmt: skip


def writes(seen: Sequence[int]) -> list[str]:
    """Return which commands that change a TPM are among these codes."""
    return [WRITES[code] for code in seen if code in WRITES]


def read_record(site: Site, state: Path) -> tuple[exchange.Sealed, init.MachineRecord]:
    """Return what `provision` left in a folder: the seal, and the record in it, verified."""
    sealed = exchange.parse_sealed((state / "seal.json").read_bytes(), "seal.json")
    ca = site.keyset.certificate_path("sudi-ca").read_bytes()
    return sealed, init.verify_record(sealed.answer.certificate, ca, site.keyset.product)


def boot(site: Site) -> tuple[TpmMachine, init.UkiApproval]:
    """Restart up to enter-initrd, and approve what then is in PCR 11."""
    site.restart()
    machine = TpmMachine(site.tpm)
    init.extend_pcr(machine, init.MEASURED, init.ENTER_INITRD)
    pcr11 = init.read_pcr(machine, init.MEASURED)
    signed = site.policy().uki_policy(pcr11, 1, init.Cc.UNSEAL) + init.UKI_REF
    return machine, init.UkiApproval(1, site.keyset.signer("pcr").sign(signed), bytes(256))


def open_config(
    site: Site, booted: tuple[TpmMachine, init.UkiApproval], state: Path, record_of: Path | None = None
) -> bytes:
    """Do what the bring-up does, with what lies in `state` (and the record of another)."""
    (sealed, _), (_, record) = read_record(site, state), read_record(site, record_of or state)
    public = init.check_tpm(booted[0], record, 1)
    secret = init.unseal(booted[0], sealed.tokens(), public, site.policy(), booted[1])
    init.check_secret(record, secret)
    return bytes(secret)


def disable_endorsement(site: Site) -> None:
    """Switch the endorsement hierarchy off."""
    site.tpm.run("tpm2_hierarchycontrol", "-C", "e", "ehEnable", "clear")


def set_lockout(site: Site) -> None:
    """Set the lockout password."""
    site.tpm.run("tpm2_changeauth", "-c", "l", "secret")


def remedy(refused: BaseException) -> str:
    """Return what a person is told to do about a refusal."""
    assert isinstance(refused, init.Refused)
    return explain.refusal(refused)["remedy"]
