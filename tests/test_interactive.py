"""The pages of the installer before a real TPM in software, a real release and a real disk (a loop device):
what they do is what the verbs do.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mosinit import content, enrolment, images, interactive, layout, network, pages, registry
from mosinit.host import Failure
from mosinit.installer import INTERRUPTED, Choices, DiskView, Flow
from mosinit.interactive import Given, Live
from mosinit.jobs import Job, Stopped
from tests import installation, registries
from tests.provisioned import Site, site
from tests.test_layout import loop

SECONDS = 120.0


class NativeShown(interactive.Shown, installation.NativeInstaller):
    """An installer for this kernel that tells a job."""


class OnLoop(Live):
    """A machine whose disks are loop devices, which otherwise are none."""

    def __init__(self, given: Given, *paths: Path) -> None:
        super().__init__(NativeShown(Job("", lambda job: None)), given)
        self.paths = paths

    def disks(self, job: Job[Any]) -> Sequence[DiskView]:
        """List them."""
        return [interactive.view(layout.inspect(self._given.shown(job), path)) for path in self.paths]


@dataclasses.dataclass
class Bench:
    """A machine before its installation."""

    site: Site
    given: Given
    disk: Path

    def flow(self) -> Flow:
        return Flow(OnLoop(self.given, self.disk))


@pytest.fixture(scope="module")
def organisation(
    need: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Site, Path]]:
    need("swtpm", "sfdisk", "cryptsetup", "mkfs.erofs", "mcopy")
    folder = tmp_path_factory.mktemp("interactive")
    with site(folder / "site") as made:
        release = installation.make_release(made.host, folder / "release", made.keyset, 7)
        yield made, release


@pytest.fixture
def bench(organisation: tuple[Site, Path], tmp_path: Path, memory: Path) -> Iterator[Bench]:
    """Begin with a cleared TPM and a disk that somebody used."""
    made, release = organisation
    made.renew(tmp_path / "machine")
    left = installation.make_left(tmp_path / "left", made.keyset)
    shutil.rmtree(left / "organisation")
    shutil.copytree(made.organisation, left / "organisation")
    (tmp_path / "loader.efi").write_bytes(installation.LOADER)
    given = Given(
        state=made.state, left=left, loader=tmp_path / "loader.efi", tcti=made.tpm.tcti, event_log=made.log,
        port=tmp_path / "no-port", medium=f"oci:{release}", shown=NativeShown,
    )  # fmt: skip
    with loop(memory / "disk") as disk:
        table = b"label: gpt\nsize=64MiB, type=linux, name=photos\n"
        subprocess.run(["sfdisk", "--quiet", disk], input=table, check=True)
        yield Bench(made, given, disk)


def wait(flow: Flow, *pages_awaited: str) -> None:
    """Let work go on until the flow is on one of these pages."""
    deadline = time.monotonic() + SECONDS
    while flow.at not in pages_awaited:
        assert time.monotonic() < deadline, pages.text(flow.page())
        assert flow.at != "failed" or "failed" in pages_awaited, pages.text(flow.page())
        time.sleep(0.02)
        flow.tick()


def to_plan(flow: Flow, disk: Path) -> None:
    flow.act("go", {})
    flow.act("medium", {})
    wait(flow, "disks", "source")
    assert flow.at == "disks", flow.problem
    flow.act(f"disk:{disk}", {})
    wait(flow, "plan", "disks")
    assert flow.at == "plan", flow.problem


def serial_of(flow: Flow) -> str:
    assert flow.planned
    return flow.planned.serial


def test_from_the_first_page_to_a_machine(bench: Bench) -> None:
    flow = bench.flow()
    assert flow.facts.problem == ""
    assert (flow.facts.product, flow.facts.tpm) == (
        bench.site.keyset.product,
        "2.0, ready to be provisioned",
    )
    before = bench.disk.open("rb").read(4 << 20)
    to_plan(flow, bench.disk)
    text = pages.text(flow.page())
    assert "ALL OF THIS WILL BE LOST" in text
    assert "'photos'" in text
    assert bench.disk.open("rb").read(4 << 20) == before
    assert not bench.given.state.exists()
    flow.act("install", {"serial": serial_of(flow)})
    wait(flow, "enrolment")
    assert enrolment.serial(bench.given.state) in pages.text(flow.page())
    assert bench.disk.open("rb").read(4 << 20) == before
    answer = bench.given.state / "answer.json"
    answer.write_text("{}")
    while "The last answer was not taken" not in pages.text(flow.page()):
        flow.tick()
    bench.site.enroll()
    fresh = answer.with_name("fresh")
    fresh.write_bytes(bench.site.answer.read_bytes())
    fresh.rename(answer)
    wait(flow, "done")
    assert "sequence 7" in pages.text(flow.page())
    found = layout.inspect(bench.site.host, bench.disk)
    assert (layout.is_machine(found), found.unfinished) == (True, False)
    flow.act("back", {})
    done = interactive.ending(flow)
    assert (done["sequence"], done["next"]) == (7, "remove the medium and restart")
    json.dumps(done, default=str)


def test_a_release_from_a_registry_with_a_login(
    bench: Bench, tmp_path: Path, need: Callable[..., None]
) -> None:
    """What is typed on the page reaches Debian's registry; the plan says it, and the disk gets it."""
    need("docker-registry")
    authority, host = registries.Authority(tmp_path), bench.site.host
    with registries.real_registry(tmp_path, authority) as real:
        source, release = f"docker://{real.address}/acme/os:7", Path(bench.given.medium.removeprefix("oci:"))
        login = registry.Login(real.address, f"{registries.USER}:{registries.PASSWORD}")
        access = registry.Access(authority.path, login, 20)
        registry.push(host, access, images.Layout(release), registry.parse_reference(source))
        given = dataclasses.replace(bench.given, tls_ca=authority.path, medium=f"oci:{tmp_path / 'none'}")
        flow = Flow(OnLoop(given, bench.disk))
        for action in ("go", "registry"):
            flow.act(action, {})
        typed = {"source": source, "user": registries.USER, "password": "wrong"}
        flow.act("verify", typed)
        wait(flow, "registry", "disks")
        assert (flow.at, real.address in flow.problem) == ("registry", True)
        flow.act("verify", {**typed, "password": registries.PASSWORD})
        wait(flow, "registry", "disks")
        assert flow.at == "disks", flow.problem
        assert source in pages.text(flow.page())
        flow.act(f"disk:{bench.disk}", {})
        wait(flow, "plan")
        shown = f"docker://{real.address}/acme/os@sha256:"
        assert shown in pages.text(flow.page())
        pushed = len(real.requests())
        flow.act("install", {"serial": serial_of(flow)})
        wait(flow, "enrolment")
        bench.site.enroll()
        (given.state / "answer.json").write_bytes(bench.site.answer.read_bytes())
        wait(flow, "done")
        fetched = {
            path.rpartition(":")[2] for method, path, _ in real.requests()[pushed:] if method == "GET"
        }
    large = max((release / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    assert large.name in fetched
    assert interactive.ending(flow)["source"].startswith(shown)  # type: ignore[attr-defined]


def test_a_disk_that_is_written_to_after_the_plan_was_shown(bench: Bench) -> None:
    flow = bench.flow()
    to_plan(flow, bench.disk)
    table = b"label: gpt\nsize=65MiB, type=linux, name=others\n"
    subprocess.run(["sfdisk", "--quiet", "--wipe=always", bench.disk], input=table, check=True)
    flow.act("install", {"serial": serial_of(flow)})
    wait(flow, "disks")
    assert "other partition tables or signatures" in pages.text(flow.page())
    assert not bench.given.state.exists()  # nor was the TPM asked for anything


def test_a_disk_that_is_written_to_while_the_machine_waits(bench: Bench) -> None:
    flow = bench.flow()
    to_plan(flow, bench.disk)
    flow.act("install", {"serial": serial_of(flow)})
    wait(flow, "enrolment")
    table = b"label: gpt\nsize=65MiB, type=linux, name=others\n"
    subprocess.run(["sfdisk", "--quiet", "--wipe=always", bench.disk], input=table, check=True)
    before = bench.disk.open("rb").read(4 << 20)
    bench.site.enroll()
    (bench.given.state / "answer.json").write_bytes(bench.site.answer.read_bytes())
    wait(flow, "disks")
    assert "other partition tables or signatures" in pages.text(flow.page())
    assert bench.disk.open("rb").read(4 << 20) == before


def test_stopped_while_it_waits_and_begun_again_it_goes_on_with_the_same_request(bench: Bench) -> None:
    flow = bench.flow()
    to_plan(flow, bench.disk)
    flow.act("install", {"serial": serial_of(flow)})
    wait(flow, "enrolment")
    request = (bench.given.state / "request.json").read_bytes()
    flow.act("back", {})
    flow.act("stop", {})
    wait(flow, "failed")
    flow.act("back", {})
    assert flow.status == INTERRUPTED
    with pytest.raises(KeyboardInterrupt):
        interactive.ending(flow)
    again = bench.flow()
    to_plan(again, bench.disk)
    again.act("install", {"serial": serial_of(again)})
    wait(again, "enrolment")
    assert (bench.given.state / "request.json").read_bytes() == request
    again.close(30)
    assert again.installing
    assert isinstance(again.installing.error, Stopped)


def test_only_one_installs(bench: Bench) -> None:
    flow, other = bench.flow(), bench.flow()
    for each in (flow, other):
        to_plan(each, bench.disk)
    flow.act("install", {"serial": serial_of(flow)})
    wait(flow, "enrolment")
    other.act("install", {"serial": serial_of(other)})
    wait(other, "failed")
    assert "another installation runs" in pages.text(other.page())
    flow.close(30)


def test_a_release_that_is_not_ours_is_refused_at_once(bench: Bench, tmp_path: Path) -> None:
    other = installation.make_release(bench.site.host, tmp_path / "other", bench.site.other, 7)
    given = dataclasses.replace(bench.given, medium=f"oci:{other}")
    flow = Flow(OnLoop(given, bench.disk))
    for action in ("go", "medium"):
        flow.act(action, {})
    wait(flow, "source")
    assert "MANIFEST-CHAIN" in flow.problem


def test_an_installed_machine_offers_nothing(bench: Bench, tmp_path: Path) -> None:
    left = installation.make_left(tmp_path / "run", bench.site.keyset, mode="run")
    facts = Live(bench.site.host, Given(left=left, tcti=bench.site.tpm.tcti)).facts()
    assert "boot the live medium to install" in facts.problem
    assert "not started by mosinit" in Live(bench.site.host, Given(left=tmp_path / "none")).facts().problem


def test_a_login_goes_to_the_registry_that_was_typed(bench: Bench) -> None:
    live = Live(bench.site.host, bench.given)
    access = live._access(Choices("docker://registry.example:5000/os:1", "me", "secret"))
    assert access
    assert access.login
    assert (access.login.host, access.login.words) == ("registry.example:5000", "me:secret")
    for wrong in (("a:b", "secret"), ("me", "sec\nret")):
        with pytest.raises(Failure, match="this is no login"):
            live._access(Choices("docker://registry.example/os:1", *wrong))


def test_the_login_of_the_command_line_is_for_the_registry_that_it_names(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "login").write_text("me:secret\n")
    (tmp_path / "login").chmod(0o600)
    given = dataclasses.replace(
        bench.given, source="docker://registry.example/os:1", login=tmp_path / "login"
    )
    live = Live(bench.site.host, given)
    same, other = (
        live._access(Choices(f"docker://{host}/os:2")) for host in ("registry.example", "evil.example")
    )
    assert same
    assert other
    assert (same.login and same.login.words, other.login) == ("me:secret", None)
    monkeypatch.setenv("MOSINIT_REGISTRY_LOGIN", "me:secret")
    live = Live(bench.site.host, dataclasses.replace(given, login=None))
    other = live._access(Choices("docker://evil.example/os:2"))
    assert other
    assert other.login is None


def test_how_the_request_gets_out_is_said_as_it_is(tmp_path: Path) -> None:
    link = network.Link("enp1s0", "52:54:00:12:34:56", True, ("10.0.2.15/24",), "10.0.2.2", "dhcp")
    assert interactive.words_of(link) == "52:54:00:12:34:56  10.0.2.15/24 (dhcp) via 10.0.2.2"
    said = interactive.ways((link,), "SHA256:abc", tmp_path / "no-port")
    assert "  ssh root@10.0.2.15 answer < answer.json" in said
    assert "This machine's host key: SHA256:abc" in said
    assert interactive.ways((link,), "", tmp_path / "no-port") == ("By a USB stick, with what is below.",)
    (tmp_path / "port").touch()
    assert any("port" in line for line in interactive.ways((), "", tmp_path / "port"))


def test_a_person_sees_all_that_is_known_of_a_disk() -> None:
    rows = (content.Row(1, 100 << 20, "Linux", "ext4", "photos"), content.Row(2, 1 << 30, "Linux RAID"))
    disk = layout.Disk(
        Path("/dev/nvme0n1"), "nvme0n1", 931 << 30, 512, False, "S5GXNX0R123456", "Samsung SSD 980", "data",
        transport="nvme", rows=rows, unusable="is in use (/dev/nvme0n1p1 is mounted at /mnt)",
    )  # fmt: skip
    seen = interactive.view(disk)
    assert (seen.path, seen.unusable) == (disk.path, disk.unusable)
    for words in ("nvme0n1", "931.0 GiB", "nvme", "S5GXNX0R123456", "Samsung SSD 980"):
        assert words in seen.line
    told = ("Samsung SSD 980, serial S5GXNX0R123456", "partition 1, 100 MiB: ext4 'photos'",
            "partition 2, 1024 MiB: Linux RAID")  # fmt: skip
    assert seen.details == told
    name = interactive.name_of(disk)
    for words in ("/dev/nvme0n1", "Samsung SSD 980", "serial S5GXNX0R123456", "931.0 GiB"):
        assert words in name


def test_an_installation_that_was_broken_off_is_called_one(bench: Bench) -> None:
    disk = layout.inspect(bench.site.host, bench.disk)
    rows = interactive.view(dataclasses.replace(disk, unfinished=True)).rows
    assert rows[0].startswith("an installation that was broken off")
    assert rows[1:] == interactive.view(disk).rows != ()


def test_a_serial_that_no_keyboard_has_can_be_typed(bench: Bench) -> None:
    disk = layout.inspect(bench.site.host, bench.disk)
    for serial, typed in (("S5GX 12é3", "S5GX_12_3"), ("WD-WCC4E1", "WD-WCC4E1"), ("QM00001", "QM00001")):
        assert interactive.typed_serial(dataclasses.replace(disk, serial=serial)) == typed


def test_secure_boot_is_told_as_the_bring_up_saw_it() -> None:
    report = {"checks": [{"id": "SB-DB", "ok": True}]}
    assert interactive.secure_boot(report) == "on, with this organisation's keys alone"
    assert interactive.secure_boot({}) == "on"
