"""A keyset, a software TPM whose firmware trusts it, and the way from a request to a closed TPM."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mosinit import approvals, enroll, exchange, firmware, init, keys, provision
from mosinit.host import Host
from mosinit.tpm import open_tpm
from tests.eventlogs import encode_log
from tests.tpms import Swtpm, swtpm

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
