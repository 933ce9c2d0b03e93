"""The way back in, page by page, without a terminal: what is asked, when something is written, and where
every way out and error leads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mosinit import init, pages
from mosinit.installer import Outcome
from mosinit.jobs import Job
from mosinit.recovery import Flow
from tests.fakeworld import APPROVING, ENROLMENT, FACTS, FOUND, KEY, LOST, MACHINE, SSD, FakeWorld

WRITING = ("provision", "recover", "reseal", "install")


def flow_of(world: FakeWorld, *actions: str, **typed: str) -> Flow:
    """Make a flow whose work is done at once, and lead it through actions; `typed` is in all fields."""
    flow = Flow(world, start=lambda job: job.run())
    for action in actions:
        flow.act(action, typed)
    return flow


def words(flow: Flow) -> str:
    return pages.text(flow.page())


def wrote(world: FakeWorld) -> list[str]:
    return [call for call in world.calls if call.startswith(WRITING)]


def to_found(world: FakeWorld) -> Flow:
    flow = flow_of(world, "recover", "key", "look", key=KEY)
    assert flow.at == "found"
    return flow


# --- The ways ----------------------------------------------------------------------------------------------


def test_the_first_page_leads_to_the_ways_and_back() -> None:
    world = FakeWorld()
    flow = flow_of(world)
    assert "[ Recover a machine that no longer opens ]" in words(flow)
    flow.act("recover", {})
    for part in ("Firmware or its keys changed", "TPM is new, or the disk is damaged"):
        assert part in words(flow)
    flow.act("back", {})
    assert (flow.at, world.calls) == ("welcome", [])
    flow.act("go", {})
    assert flow.at == "source"


def test_a_system_that_cannot_install_does_not_recover_either() -> None:
    flow = flow_of(FakeWorld(known=replace(FACTS, problem="this is an installed machine")))
    assert "Recover" not in words(flow)


def test_the_network_page_leads_back_to_the_ways() -> None:
    flow = flow_of(FakeWorld(), "recover", "network")
    assert flow.at == "network"
    flow.act("go", {})
    assert flow.at == "ways"


@pytest.mark.parametrize("before", [(), ("key",), ("key", "look")])
def test_ctrl_c_leaves_from_everywhere_before_consent(before: tuple[str, ...]) -> None:
    world = FakeWorld()
    flow = flow_of(world, "recover", *before, "interrupt", key=KEY)
    assert (flow.over, flow.status, wrote(world)) == (True, 130, [])


# --- Which disk --------------------------------------------------------------------------------------------


def test_without_a_machine_s_disk_one_is_told() -> None:
    flow = flow_of(FakeWorld(of_machines=()), "recover", "reseal")
    assert flow.at == "ways"
    assert "no disk here has a machine's partitions" in words(flow)


@pytest.mark.parametrize(("way", "call"), [("key", ""), ("reseal", "reseal /dev/nvme0n1")])
def test_of_more_disks_one_is_chosen(way: str, call: str) -> None:
    world = FakeWorld(of_machines=(MACHINE, SSD))
    flow = flow_of(world, "recover", way)
    assert flow.at == "machines"
    assert wrote(world) == []
    flow.act("disk:/dev/nvme0n1", {})
    assert flow.rescue.disk is None if call else flow.rescue.disk == SSD.path
    assert wrote(world) == ([call] if call else [])


# --- With the recovery key ---------------------------------------------------------------------------------


def test_the_whole_way_with_the_tpm_as_it_was() -> None:
    world = FakeWorld()
    flow = to_found(world)
    assert world.calls == ["machines", "look /dev/vda 1  False"]
    for part in (FOUND.disk, *FOUND.found, *FOUND.will, "[ Do this to /dev/vda ]"):
        assert part in words(flow)
    assert wrote(world) == []
    flow.act("act", {})
    assert flow.at == "recovered"
    assert "remove the medium and restart" in words(flow)
    assert wrote(world) == ["recover /dev/vda"]
    flow.act("back", {})
    assert (flow.over, flow.status, flow.error) == (True, 0, None)


def test_a_new_tpm_is_provisioned_first() -> None:
    world = FakeWorld()
    flow = flow_of(world, "recover", "key", "enrol", key=KEY, source="docker://x.y/z:1")
    assert flow.at == "found"
    assert world.calls == ["machines", "provision", "look /dev/vda 1 docker://x.y/z:1 True"]


def test_a_machine_that_waits_to_be_enrolled_shows_the_installer_s_page() -> None:
    flow = flow_of(FakeWorld(), "recover", "key")
    job = waiting(flow, ENROLMENT)
    assert flow.at == "enrolment"
    assert words(flow).startswith("Recovery: enrolment")
    assert ENROLMENT.serial in words(flow)
    flow.act("save", {})
    assert flow.at == "sticks"
    flow.act("stick:0", {})
    assert flow.at == "enrolment"
    assert "saved as mosinit/request" in words(flow)
    for action in ("back", "stop"):
        flow.act(action, {})
    assert job.stopping


def test_without_a_key_nothing_is_done() -> None:
    world = FakeWorld()
    for action in ("look", "enrol"):
        flow = flow_of(world, "recover", "key", action, key=" ")
        assert flow.at == "key"
        assert "no recovery key was typed" in words(flow)
    for typed in ({"key": "x" * 600}, {"key": KEY, "other": "{}"}):
        flow = flow_of(world, "recover", "key", "enrol", **typed)
        assert flow.at == "key"
        assert flow.problem
    assert world.calls == ["machines"] * 4


def test_keys_show_nowhere_and_are_forgotten() -> None:
    world = FakeWorld()
    flow = flow_of(world, "recover", "key", "look", key=KEY, other=KEY.upper())
    assert KEY not in repr(flow.rescue) + words(flow) + "".join(world.calls)
    flow.act("back", {})
    flow.act("key", {})
    fields = [item for item in flow.page().items if isinstance(item, pages.Field) and item.value == KEY]
    assert [item.secret for item in fields] == [True]  # nobody types it twice
    flow.act("back", {})
    flow.act("back", {})
    assert flow.rescue.keys() == ()
    done = to_found(world)
    done.act("act", {})
    assert done.rescue.keys() == ()


def test_what_is_lost_takes_a_word() -> None:
    world = FakeWorld(seen_there=replace(FOUND, lost=LOST))
    flow = to_found(world)
    assert LOST in words(flow)
    for typed in ("", "Anew", "yes", KEY):
        flow.act("act", {"word": typed})
        assert flow.at == "found"
        assert "the word anew was not typed: nothing was written" in words(flow)
    assert wrote(world) == []
    flow.act("act", {"word": "anew"})
    assert wrote(world) == ["recover /dev/vda"]


def test_what_is_left_is_said_and_is_the_exit_status() -> None:
    left = Outcome(("left: run `mosinit recover --reseal` after this",), {"status": 1, "next": "see"})
    flow = to_found(FakeWorld(recovery=lambda job: left))
    flow.act("act", {})
    assert left.lines[0] in words(flow)
    flow.act("back", {})
    assert flow.status == 1


def test_after_it_one_can_go_another_way() -> None:
    flow = to_found(FakeWorld())
    flow.act("act", {})
    flow.act("ways", {})
    assert (flow.at, flow.outcome) == ("ways", None)


# --- Errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["machines", "provision", "look", "recover", "reseal"])
def test_an_error_leads_back_to_the_ways_with_what_to_do(where: str) -> None:
    refused = init.Refused("TPM-STATE", expected="a TPM that nobody provisioned", seen="owner password")
    world = FakeWorld(fail={where: refused})
    way = ("reseal",) if where == "reseal" else ("key", "look" if where == "look" else "enrol", "act")
    flow = flow_of(world, "recover")
    for action in way:
        if flow.at != "ways" or action == way[0]:
            flow.act(action, {"key": KEY})
    assert (flow.at, flow.over) == ("ways", False)
    assert "TPM-STATE: expected a TPM that nobody provisioned, seen owner password" in words(flow)
    assert init.CHECKS["TPM-STATE"].remedy in words(flow)


def test_a_recovery_is_stopped_only_after_a_question() -> None:
    flow = flow_of(FakeWorld(), "recover", "key")
    job = waiting(flow, None)
    assert flow.at == "progress"
    flow.act("interrupt", {})
    assert words(flow).startswith("Stop?\nStop the recovery?")
    before = job.stopping
    flow.act("stop", {})
    assert (before, job.stopping) == (False, True)
    job._work = lambda job: job.say("next")
    job.run()
    flow.tick()
    assert flow.at == "ways"
    assert "stopped by you" in words(flow)


# --- Approvals ---------------------------------------------------------------------------------------------


def waiting(flow: Flow, what: object) -> Job[Any]:
    """Let work of a flow that writes wait for something."""
    job: Job[Any] = Job("work", lambda job: Outcome(("done",)))
    job.waiting = what
    flow.installing, flow._ended, flow.at = job, flow._end_of_recovery, "progress"
    flow.tick()
    return job


def test_a_changed_firmware_takes_no_key() -> None:
    world = FakeWorld()
    flow = flow_of(world, "recover", "reseal")
    assert flow.at == "recovered"
    assert world.calls == ["machines", "reseal /dev/vda"]


def test_a_disk_that_waits_for_approvals_says_how_they_come() -> None:
    world = FakeWorld()
    flow = flow_of(world, "recover")
    job = waiting(flow, APPROVING)
    assert flow.at == "approving"
    for part in (APPROVING.disk, *APPROVING.found, *APPROVING.ways):
        assert part in words(flow)
    for action, said in (("log", "saved as mosinit/event-log-"), ("approvals", "approvals.json is taken")):
        flow.act(action, {})
        flow.act("again", {})
        flow.act("stick:0", {})
        assert flow.at == "approving"
        assert said in words(flow)
    assert [call for call in world.calls if call.endswith("sdd1")] == ["log sdd1", "approvals sdd1"]
    job.waiting = replace(APPROVING, wrong="TPM-POLICY: these approvals are for another state")
    assert "The last approvals were not taken: TPM-POLICY: these approvals are for" in words(flow)
    job.waiting = None
    flow.tick()
    went_on = flow.at
    job.run()
    flow.tick()
    assert (went_on, flow.at) == ("progress", "recovered")


def test_approvals_that_came_by_another_way_end_the_look_for_sticks() -> None:
    flow = flow_of(FakeWorld(), "recover")
    job = waiting(flow, APPROVING)
    flow.act("approvals", {})
    assert flow.at == "sticks"
    job.run()
    flow.tick()
    assert flow.at == "recovered"
