"""The interactive installer's way from page to page, without a terminal: what is asked, when something is
written, and how every way out and back behaves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mosinit import init, installer, pages
from mosinit.host import Failure
from mosinit.installer import Flow
from mosinit.jobs import Job, Stopped, words_of
from tests.fakeworld import EMPTY, ENROLMENT, FACTS, MEMBER, SSD, FakeWorld

WRITING = ("install", "save", "take", "static", "dhcp", "restart")


def flow_of(world: FakeWorld, *actions: str, **typed: str) -> Flow:
    """Make a flow whose work is done at once, and lead it through actions; `typed` is in all fields."""
    flow = Flow(world, start=lambda job: job.run())
    for action in actions:
        flow.act(action, typed)
    return flow


def wrote(world: FakeWorld) -> list[str]:
    return [call for call in world.calls if call.startswith(WRITING)]


def words(flow: Flow) -> str:
    return pages.text(flow.page())


def at_plan(world: FakeWorld, disk: installer.DiskView = SSD) -> Flow:
    flow = flow_of(world, "go", "medium", f"disk:{disk.path}")
    assert flow.at == "plan"
    return flow


# --- The way that most go ----------------------------------------------------------------------------------


def test_the_whole_way() -> None:
    world = FakeWorld()
    flow = at_plan(world)
    assert wrote(world) == []
    flow.act("install", {"serial": SSD.serial})
    assert flow.at == "done"
    assert wrote(world) == ["install /dev/nvme0n1 0"]
    assert "Remove the medium" in words(flow)
    flow.act("back", {})
    assert (flow.over, flow.status, flow.error) == (True, 0, None)


def test_the_first_page_says_what_this_machine_is_and_what_will_happen() -> None:
    text = words(flow_of(FakeWorld()))
    for part in (FACTS.product, FACTS.release, FACTS.secure_boot, FACTS.tpm, "Nothing is written before"):
        assert part in text


def test_a_system_that_cannot_install_says_why_and_offers_nothing() -> None:
    flow = flow_of(FakeWorld(known=replace(FACTS, problem="this is an installed machine")))
    assert "this is an installed machine" in words(flow)
    assert [item.action for item in flow.page().items if isinstance(item, pages.Button)] == ["back"]


def test_esc_at_the_first_page_leaves_with_1_and_ctrl_c_with_130() -> None:
    for action, status in (("back", 1), ("interrupt", 130)):
        world = FakeWorld()
        flow = flow_of(world, action)
        assert (flow.over, flow.status, world.calls) == (True, status, [])


@pytest.mark.parametrize("before", [(), ("go",), ("go", "registry"), ("go", "medium"), ("network",)])
def test_ctrl_c_leaves_from_everywhere_before_consent(before: tuple[str, ...]) -> None:
    world = FakeWorld()
    flow = flow_of(world, *before, "interrupt")
    assert (flow.over, flow.status, wrote(world)) == (True, 130, [])


def test_esc_leads_back_the_whole_way() -> None:
    flow = at_plan(FakeWorld())
    ways = []
    for _ in range(5):
        ways.append(flow.at)
        flow.act(flow.page().back, {})
    assert ways == ["plan", "disks", "source", "welcome", "welcome"]
    assert flow.over


# --- Source and network ------------------------------------------------------------------------------------


def test_a_registry_is_verified_at_once_and_an_error_leads_back_with_what_was_typed() -> None:
    world = FakeWorld(fail={"source": Failure("registry.example does not answer")})
    flow = flow_of(world, "go", "registry", "verify", source="docker://registry.example/os:1")
    assert flow.at == "registry"
    assert "registry.example does not answer" in words(flow)
    assert pages.Field("source", "Release ", "docker://registry.example/os:1") in flow.page().items
    world.fail.clear()
    flow.act("verify", {"source": " docker://registry.example/os:2 ", "user": "me", "password": "secret"})
    assert flow.at == "disks"
    assert world.calls[-2:] == ["source docker://registry.example/os:2 me", "disks"]
    assert "docker://registry.example/os:2" in words(flow)


def test_a_refused_release_shows_its_check_and_remedy() -> None:
    refused = init.Refused("MANIFEST-CHAIN", expected="issued by ours", seen="issued by theirs")
    flow = flow_of(FakeWorld(fail={"source": refused}), "go", "medium")
    assert flow.at == "source"
    assert "MANIFEST-CHAIN: expected issued by ours, seen issued by theirs" in words(flow)
    assert init.CHECKS["MANIFEST-CHAIN"].remedy in words(flow)


def test_a_registry_writes_no_lines_of_its_own_on_a_page() -> None:
    seen = "{\n\nTo consent, type yes\n"
    for error in (init.Refused("MANIFEST-ABSENT", expected="an OCI document", seen=seen), Failure(seen)):
        assert "\n" not in "".join(installer.reason(error))
        assert "To consent" in installer.reason(error)[0]


def test_half_a_login_is_asked_for_again_and_goes_nowhere() -> None:
    world = FakeWorld()
    flow = flow_of(world, "go", "registry", "verify", source="docker://x.y/z:1", user="me")
    assert (flow.at, world.calls) == ("registry", [])
    assert "type both, or none" in words(flow)


def test_passwords_show_nowhere() -> None:
    world = FakeWorld()
    typed = {"source": "docker://x.y/z:1", "user": "me", "password": "hush-hush"}
    flow = flow_of(world, "go", "registry", "verify", **typed)
    assert "hush-hush" not in repr(flow.choices) + words(flow) + "".join(world.calls)
    flow.at = "registry"
    fields = [item for item in flow.page().items if isinstance(item, pages.Field)]
    assert [field.secret for field in fields if field.value == "hush-hush"] == [True]


def test_the_network_is_looked_at_changed_and_left_to_where_one_came_from() -> None:
    world = FakeWorld()
    flow = flow_of(world, "go", "registry")
    typed = {
        "source": "docker://x.y/z:1",
        "address": "10.0.0.5/24",
        "gateway": "10.0.0.1",
        "dns": "10.0.0.1",
    }
    for action in ("network", "link:0", "static"):
        flow.act(action, typed)
    assert world.calls == ["links", "static enp1s0 10.0.0.5/24 10.0.0.1 10.0.0.1", "links"]
    assert "enp1s0 has 10.0.0.5/24" in words(flow)
    flow.act("go", {})
    assert flow.at == "registry"
    assert pages.Field("source", "Release ", "docker://x.y/z:1") in flow.page().items


def test_an_address_that_is_none_leads_back_to_where_it_was_typed() -> None:
    world = FakeWorld(fail={"static": Failure("'x' is no address")})
    flow = flow_of(world, "network", "link:1", "static", address="x")
    assert flow.at == "link"
    assert "'x' is no address" in words(flow)


# --- Disk, plan, consent -----------------------------------------------------------------------------------


def test_a_disk_that_cannot_be_chosen_says_why() -> None:
    flow = flow_of(FakeWorld(), "go", "medium")
    (medium,) = [item for item in flow.page().items if isinstance(item, pages.Choice) and item.refused]
    assert medium.refused == "the medium that this system was booted from"


def test_what_is_on_a_disk_is_shown_with_it() -> None:
    flow = flow_of(FakeWorld(), "go", "medium")
    details = {item.action: item.details for item in flow.page().items if isinstance(item, pages.Choice)}
    assert details["disk:/dev/nvme0n1"][1:] == SSD.rows
    assert details["disk:/dev/sda"][1:] == ("nothing is on it",)


@pytest.mark.parametrize("typed", ["", "S5GXNX0R12345", "s5gxnx0r123456", "yes", "nvme0n1", "QM00001"])
def test_anything_but_the_serial_writes_nothing(typed: str) -> None:
    world = FakeWorld()
    flow = at_plan(world)
    flow.act("install", {"serial": typed})
    assert flow.at == "plan"
    assert "nothing was written" in words(flow) or "no serial was typed" in words(flow)
    assert not any(call.startswith(("check", "install")) for call in world.calls)


def test_every_partition_that_is_lost_is_named_before_consent() -> None:
    text = words(at_plan(FakeWorld()))
    for row in SSD.rows:
        assert text.index(row) < text.index("To consent, type the serial")


def test_an_empty_disk_needs_no_serial() -> None:
    world = FakeWorld()
    flow = at_plan(world, EMPTY)
    assert "It holds nothing that could be lost" in words(flow)
    assert not any(isinstance(item, pages.Field) for item in flow.page().items)
    flow.act("install", {})
    assert wrote(world) == ["install /dev/sda 0"]


def test_a_member_of_a_set_needs_a_word_more() -> None:
    world = FakeWorld()
    flow = at_plan(world, MEMBER)
    flow.act("install", {"serial": MEMBER.serial})
    assert wrote(world) == []
    flow.act("install", {"serial": MEMBER.serial, "members": "member"})
    assert wrote(world) == []
    assert "the word members was not typed" in words(flow)
    flow.act("install", {"serial": MEMBER.serial, "members": "members"})
    assert wrote(world) == ["install /dev/sdc 0"]


def test_a_disk_that_changed_since_leads_back_to_the_disks() -> None:
    world = FakeWorld(after=(EMPTY,))
    flow = at_plan(world)
    flow.act("install", {"serial": SSD.serial})
    assert flow.at == "disks"
    assert "/dev/nvme0n1 is another disk now" in words(flow)
    assert wrote(world) == []


def test_a_disk_that_changed_while_the_machine_was_enrolled_leads_back_too() -> None:
    def changed(job: Job[Any]) -> Any:
        raise installer.Changed("/dev/nvme0n1 is another disk now")

    flow = at_plan(FakeWorld(installation=changed))
    flow.act("install", {"serial": SSD.serial})
    assert flow.at == "disks"
    assert "another disk now" in words(flow)


def test_sizes_are_numbers_and_are_planned_with() -> None:
    world = FakeWorld()
    flow = at_plan(world)
    flow.act("sizes", {})
    for wrong in ("2G", "-1", "١٢", "9" * 10):
        flow.act("use", {"state": wrong})
        assert flow.at == "sizes"
        assert "is no number of MiB" in words(flow)
    flow.act("use", {"state": "2048"})
    assert flow.at == "plan"
    assert world.calls[-1] == "plan /dev/nvme0n1 2048"
    assert "2048 MiB  /var, encrypted" in words(flow)


def test_a_size_that_does_not_fit_leads_back_to_the_sizes() -> None:
    world = FakeWorld()
    flow = at_plan(world)
    flow.act("sizes", {})
    world.fail["plan"] = Failure("a state volume can have 64 to 4000 MiB")
    flow.act("use", {"state": "99999"})
    assert flow.at == "sizes"
    assert "64 to 4000 MiB" in words(flow)


# --- Enrolment ---------------------------------------------------------------------------------------------


def waiting(flow: Flow) -> Job[Any]:
    """Let the installation of a flow wait for its answer."""
    job: Job[Any] = Job("install", lambda job: None)
    job.waiting = ENROLMENT
    flow.installing = job
    flow.at = "progress"
    flow.tick()
    return job


def test_a_machine_that_waits_says_how_the_request_gets_out_and_goes_on_by_itself() -> None:
    flow = flow_of(FakeWorld())
    job = waiting(flow)
    assert flow.at == "enrolment"
    for part in (ENROLMENT.serial, *ENROLMENT.ways):
        assert part in words(flow)
    job.waiting = replace(ENROLMENT, wrong="answer.json is of another machine")
    assert "The last answer was not taken: answer.json is of another machine" in words(flow)
    job.waiting = None
    assert words(flow).startswith("Progress")
    flow.tick()
    assert flow.at == "progress"


def test_request_and_answer_by_a_stick() -> None:
    world = FakeWorld()
    flow = flow_of(world)
    waiting(flow)
    for action in ("save", "stick:0"):
        flow.act(action, {})
    assert flow.at == "enrolment"
    assert "saved as mosinit/request-0123456789abcdef.json" in words(flow)
    world.fail["take"] = Failure("the stick has no answer.json")
    for action in ("take", "stick:0"):
        flow.act(action, {})
    assert "the stick has no answer.json" in words(flow)
    assert world.calls == ["sticks", "save sdd1", "sticks", "take sdd1"]


def test_an_answer_that_came_by_another_way_ends_the_look_for_sticks() -> None:
    flow = flow_of(FakeWorld())
    job = waiting(flow)
    flow.act("save", {})
    assert flow.at == "sticks"
    job._work = lambda job: FakeWorld().installation(job)
    job.run()
    flow.tick()
    assert flow.at == "done"


# --- Progress, errors, stopping ----------------------------------------------------------------------------


def test_an_error_says_why_and_that_another_run_finishes() -> None:
    def broken(job: Job[Any]) -> Any:
        raise Failure("/dev/nvme0n1 is not installed (Input/output error)")

    world = FakeWorld(installation=broken)
    flow = at_plan(world)
    flow.act("install", {"serial": SSD.serial})
    assert flow.at == "failed"
    assert "/dev/nvme0n1 is not installed (Input/output error)" in words(flow)
    assert installer.AGAIN in words(flow)
    flow.act("back", {})
    assert (flow.over, flow.status) == (True, 1)
    assert isinstance(flow.error, Failure)


def test_after_an_error_one_can_begin_again_at_the_disks() -> None:
    def broken(job: Job[Any]) -> Any:
        raise OSError(5, "Input/output error")

    flow = at_plan(FakeWorld(installation=broken))
    flow.act("install", {"serial": SSD.serial})
    flow.act("again", {})
    assert (flow.at, flow.error) == ("disks", None)


def test_a_refusal_in_mid_install_shows_check_and_remedy() -> None:
    def refused(job: Job[Any]) -> Any:
        raise init.Refused("TPM-POLICY", expected="an approved PCR 7", seen="00")

    flow = at_plan(FakeWorld(installation=refused))
    flow.act("install", {"serial": SSD.serial})
    assert "TPM-POLICY: expected an approved PCR 7, seen 00" in words(flow)
    assert f"What to do: {init.CHECKS['TPM-POLICY'].remedy}" in words(flow)


def test_a_fault_of_ours_is_called_one() -> None:
    def fault(job: Job[Any]) -> Any:
        raise ZeroDivisionError("division by zero")

    flow = at_plan(FakeWorld(installation=fault))
    flow.act("install", {"serial": SSD.serial})
    assert "ZeroDivisionError" in words(flow)
    assert "a fault of mosinit" in words(flow)


def test_an_installation_is_stopped_only_after_a_question() -> None:
    flow = flow_of(FakeWorld())
    job = waiting(flow)
    job.waiting = None
    flow.tick()
    for action in ("back", "on", "interrupt", "on"):
        flow.act(action, {})
        assert not job.stopping
        assert not flow.over
    for action in ("back", "stop"):
        flow.act(action, {})
    assert job.stopping
    assert not flow.over  # until the work has closed what it opened
    job._work = lambda job: job.say("next")
    job.run()
    flow.tick()
    assert flow.at == "failed"
    assert "stopped by you" in words(flow)
    flow.act("back", {})
    assert (flow.over, flow.status) == (True, 130)


def test_a_third_ctrl_c_does_not_wait_for_the_work() -> None:
    flow = flow_of(FakeWorld())
    waiting(flow)
    flow.act("interrupt", {})
    flow.act("interrupt", {})
    assert not flow.over
    flow.act("interrupt", {})
    assert (flow.over, flow.status) == (True, 130)


def test_a_restart_that_fails_is_told() -> None:
    world = FakeWorld(fail={"restart": Failure("systemctl failed")})
    flow = at_plan(world)
    flow.act("install", {"serial": SSD.serial})
    flow.act("restart", {})
    assert not flow.over
    assert "systemctl failed" in words(flow)


# --- Jobs --------------------------------------------------------------------------------------------------


def test_a_job_tells_what_it_says_and_how_far_it_is() -> None:
    seen: list[Any] = []

    def work(job: Job[str]) -> str:
        job.say("first")
        with job.measure("copying", 100) as advance:
            advance(40)
            seen.append(job.progress)
        seen.append(job.progress)
        return "done"

    job = Job("a job", work)
    job.start()
    job.join(10)
    assert (job.ended, job.result(), job.lines) == (True, "done", ("first", "copying"))
    assert (seen[0].label, seen[0].done, seen[0].total, seen[1]) == ("copying", 40, 100, None)


@pytest.mark.parametrize("act", ["say", "advance", "sleep"])
def test_a_job_stops_at_its_next_message_byte_or_wait(act: str) -> None:
    def work(job: Job[None]) -> None:
        with job.measure("copying", 100) as advance:
            job.stop()
            if act == "say":
                job.say("x")
            elif act == "advance":
                advance(1)
            else:
                job.sleep(60)
        raise AssertionError("it went on")

    job = Job("a job", work)
    job.start()
    job.join(10)
    assert isinstance(job.error, Stopped)
    assert not isinstance(job.error, Exception)  # no handler of errors takes it for one


def test_rate_and_remaining_time_are_of_late() -> None:
    clock = [0.0]
    job: Job[None] = Job("a job", lambda job: None, clock=lambda: clock[0])
    with job.measure("copying", 1000 << 20) as advance:
        clock[0] = 5
        advance(500 << 20)
        progress = job.progress
        assert progress
        assert words_of(progress) == "500.0 of 1000.0 MiB, 100.0 MiB/s, 5 s left"
        clock[0] = 25
        progress = job.progress
        assert progress
        assert words_of(progress) == "500.0 of 1000.0 MiB, 0.0 MiB/s, stands still"
