"""The pages of the recovery before a real TPM in software and the disk of a machine that was installed: what
they do is what `recover` does.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mosinit import enrolment, eventlog, init, interactive, layout, luks, pages, recovery
from mosinit.host import Host
from mosinit.installer import DiskView
from mosinit.interactive import Given, Live
from mosinit.jobs import Job
from tests import recovering
from tests.eventlogs import encode_log
from tests.recovering import NativeRecoverer, Site, fingerprint
from tests.test_interactive import NativeShown, wait
from tests.test_recover import NEEDED, config_of
from tests.test_resealing import approved, pcr7


class NativeShownRecoverer(NativeShown, NativeRecoverer):
    """A recoverer for this kernel that tells a job."""


class OnLoop(Live):
    """A machine whose disk is a loop device, which otherwise is none."""

    def __init__(self, given: Given, disk: Path) -> None:
        super().__init__(NativeShown(Job("", lambda job: None)), given)
        self.disk = disk

    def machines(self, job: Job[Any]) -> Sequence[DiskView]:
        """List it."""
        return [interactive.view(layout.inspect(self._given.shown(job), self.disk))]


@dataclass
class Bench:
    """A live system at a machine, and its disk as a file."""

    site: Site
    given: Given
    disk: Path
    image: Path

    def flow(self) -> recovery.Flow:
        return recovery.Flow(OnLoop(self.given, self.disk))

    def key(self) -> str:
        return self.site.recovery_key().decode()

    def answer(self) -> None:
        """Bring the organisation's answer, as SSH does."""
        self.site.made.enroll()
        enrolment.put_answer(Host(), self.site.made.answer.read_bytes(), "x", self.given.state)


def bench_of(site: Site, folder: Path, disk: Path, image: Path) -> Bench:
    def recoverer(job: Job[Any]) -> NativeShownRecoverer:
        made = NativeShownRecoverer(job)
        made.site = site.made
        return made

    given = Given(
        state=site.made.state, left=site.left, loader=site.loader, tcti=site.made.tpm.tcti,
        event_log=site.made.log, port=folder / "no-port", medium=f"oci:{site.release}",
        approvals=folder / "run/approvals.json", shown=NativeShown, recovering=recoverer,
    )  # fmt: skip
    return Bench(site, given, disk, image)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A machine whose firmware changed: one event more in PCR 7 than was approved."""
    with recovering.site(tmp_path_factory.mktemp("machine")) as made:
        machine = made.made
        shutil.rmtree(made.left / "organisation")
        shutil.copytree(machine.organisation, made.left / "organisation")
        machine.restart()
        events = list(eventlog.parse_event_log(machine.log.read_bytes()))
        digest = hashlib.sha256(b"another event").digest()
        machine.tpm.extend(7, digest)
        last = events[-1]._replace(digest=digest, data=b"another event")
        machine.log.write_bytes(encode_log([*events, last]))
        yield made


@pytest.fixture
def bench(site: Site, need: Callable[..., None], memory: Path, tmp_path: Path) -> Iterator[Bench]:
    """A copy of the machine's disk."""
    need(*NEEDED)
    with recovering.copy_of(site, memory) as disk:
        yield bench_of(site, tmp_path, disk, memory / "copy")


def go(flow: recovery.Flow, *actions: str, until: str, **typed: str) -> str:
    """Lead a flow through actions up to a page; return its words."""
    for action in actions:
        flow.act(action, typed)
        wait(flow, until, "ways", "key", "found", "enrolment", "approving", "recovered")
    wait(flow, until, "ways", "recovered")
    assert flow.at == until, pages.text(flow.page())
    return pages.text(flow.page())


# --- The firmware changed ----------------------------------------------------------------------------------


def test_approvals_that_come_open_it_again(bench: Bench, site: Site, tmp_path: Path) -> None:
    before, flow = fingerprint(bench.image), bench.flow()
    flow.act("recover", {})
    text = go(flow, "reseal", until="approving")
    header = luks.read_header(Host(), config_of(bench.disk), "config")
    assert header.tokens
    number = site.record.parent.name
    assert "TPM-POLICY" in text
    assert f"mosinit approve event-log --machine {number} --keys DIR" in text
    reseal = bench.given.reseal
    other = approved(site, tmp_path, b"\1" * 32)
    enrolment.put_approvals(Host(), other.read_bytes(), "x", reseal)
    while "The last approvals were not taken: TPM-POLICY" not in pages.text(flow.page()):
        flow.tick()
    assert fingerprint(bench.image) == before
    right = approved(site, tmp_path, pcr7(site))
    enrolment.put_approvals(Host(), right.read_bytes(), "x", reseal)
    text = go(flow, until="recovered")
    assert f"done: lay the approval of PCR 7 {pcr7(site).hex()}" in text
    new = luks.read_header(Host(), config_of(bench.disk), "config")
    assert new.tokens
    assert set(new.tokens.approvals) == {*header.tokens.approvals, pcr7(site).hex()}
    assert not reseal.approvals.exists()
    flow.act("back", {})
    assert (flow.status, interactive.ending(flow)["next"]) == (0, "remove the medium and restart")
    again = bench.flow()
    again.act("recover", {})
    assert "nothing: the TPM opens the disk" in go(again, "reseal", until="recovered")


def test_only_one_recovers(bench: Bench) -> None:
    flow, other = bench.flow(), bench.flow()
    for each in (flow, other):
        each.act("recover", {})
    go(flow, "reseal", until="approving")
    other.act("reseal", {})
    wait(other, "ways")
    assert "another installation runs" in pages.text(other.page())
    flow.close(30)


# --- The recovery key --------------------------------------------------------------------------------------


def test_a_key_that_is_not_this_disk_s_changes_nothing(bench: Bench) -> None:
    before, flow = fingerprint(bench.image), bench.flow()
    flow.act("recover", {})
    text = go(flow, "key", "look", until="ways", key="-".join(["cbdefghi"] * 8))
    assert "opens neither config nor store" in text
    assert fingerprint(bench.image) == before


def damage(bench: Bench) -> None:
    """Spoil the second copy of config's header."""
    with open(config_of(bench.disk), "r+b", buffering=0) as file:
        file.seek(init.LUKS_COPY)
        file.write(bytes(4096))


def test_a_damaged_header_is_mended_after_consent(bench: Bench) -> None:
    damage(bench)
    before, flow = fingerprint(bench.image), bench.flow()
    flow.act("recover", {})
    text = go(flow, "key", "look", until="found", key=bench.key())
    assert "make both copies of the header agree with the good one" in text
    assert fingerprint(bench.image) == before
    text = go(flow, "act", until="recovered")
    assert "done: make both copies of the header agree" in text
    assert luks.read_header(Host(), config_of(bench.disk), "config").note == ""
    json.dumps(interactive.ending(flow), default=str)


def test_a_disk_that_changed_after_it_was_shown_is_not_written(bench: Bench) -> None:
    flow = bench.flow()
    flow.act("recover", {})
    go(flow, "key", "look", until="found", key=bench.key())
    damage(bench)
    before = fingerprint(bench.image)
    assert "is not as it was shown: nothing was written" in go(flow, "act", until="ways")
    assert fingerprint(bench.image) == before


def test_a_new_tpm_and_a_config_that_is_lost(bench: Bench, site: Site) -> None:
    """This comes last: it clears the TPM."""
    site.made.renew(site.folder / "renewed")
    bench = bench_of(site, site.folder / "renewed", bench.disk, bench.image)
    before, flow = fingerprint(bench.image), bench.flow()
    flow.act("recover", {})
    text = go(flow, "key", "enrol", until="enrolment", key=bench.key())
    assert enrolment.serial(bench.given.state) in text
    bench.answer()
    text = go(flow, until="found")
    assert "give config the key of the new provisioning and its recovery key" in text
    assert fingerprint(bench.image) == before
    with open(config_of(bench.disk), "r+b", buffering=0) as file:
        file.write(bytes(2 * init.LUKS_COPY))
    before = fingerprint(bench.image)
    # What was provisioned is used again.
    text = go(flow, "back", "key", "enrol", until="found", key=bench.key())
    assert "machine-id and SSH host keys will be new" in text
    assert "To consent that this is made anew, type: anew" in text
    flow.act("act", {"word": ""})
    assert fingerprint(bench.image) == before
    go(flow, "act", until="recovered", word="anew")
    assert site.boots(bench.disk, bench.given.state).contents.sequence == 7
