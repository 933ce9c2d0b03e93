"""A machine is installed and its TPM closed last; the power fails meanwhile, and takes STATE with it.

The TPM is one in software, the disk a loop device. Whatever the moment, the same command goes on from what
lies on the disk and what the TPM is: it finishes, or begins anew without anybody's consent.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mosinit import init, install, layout, provision
from mosinit import tpm as tpms
from mosinit.host import Failure, Host
from tests import installation, provisioned
from tests.installation import TOOLS, NativeInstaller
from tests.provisioned import PASSWORDS, Site, read_record
from tests.test_layout import loop
from tests.tpms import Breaking

CLOSED = init.PROVISIONED


@dataclass
class Machine:
    """A machine whose live system was started, with an empty disk."""

    site: Site
    options: install.Options
    disk: Path

    def installer(self, failing: str = "") -> NativeInstaller:
        host = NativeInstaller()
        host.failing = failing
        return host

    def take(self) -> None:
        """Provision it as far as an installation needs."""
        self.site.request()
        self.site.enroll()
        provision.take(self.site.host, self.site.state, self.site.answer, self.site.tpm.tcti)

    def run(self, *, failing: str = "", tcti: str = "") -> dict[str, object]:
        given = replace(self.options, tcti=tcti or self.options.tcti)
        return install.install_provisioned(self.installer(failing), given)

    def lose_power(self) -> None:
        """What lay in memory is gone."""
        shutil.rmtree(self.site.state, ignore_errors=True)
        self.site.restart()

    def starts(self) -> bool:
        """Say whether firmware finds a boot loader on the disk."""
        part = next(path for path in (Path(f"{self.disk}p1"),) if path.exists())
        listed = subprocess.run(
            ["mdir", "-b", "-i", part, "::EFI/BOOT"], capture_output=True, check=False, text=True
        )
        return "BOOTX64.EFI" in listed.stdout

    def check_whole(self) -> None:
        """See that disk and TPM are those of a machine that starts."""
        found = layout.inspect(Host(), self.disk)
        assert (found.unfinished, found.complete, self.starts()) == (False, "", True)
        assert self.site.flags() & CLOSED == CLOSED


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, install.Options]]:
    """An organisation with a release, and a machine that booted its medium."""
    folder = tmp_path_factory.mktemp("site")
    with provisioned.site(folder) as site:
        release = installation.make_release(site.host, folder / "made", site.keyset, 7)
        (folder / "loader.efi").write_bytes(installation.LOADER)
        left = installation.make_left(folder / "left", site.keyset)
        options = install.Options(
            Path("/dev/none"), folder, source=f"oci:{release}", left=left, loader=folder / "loader.efi"
        )
        yield site, options


@pytest.fixture
def machine(
    need: Callable[..., None], shared: tuple[Site, install.Options], memory: Path, tmp_path: Path
) -> Iterator[Machine]:
    """The machine, with a new TPM and an empty disk."""
    need("mdir", *TOOLS)
    site, options = shared
    site.renew(tmp_path / "work")
    with loop(memory / "disk") as device:
        given = replace(options, disk=device, provisioned=site.state, tcti=site.tpm.tcti)
        yield Machine(site, given, device)


def test_the_tpm_is_closed_last(machine: Machine) -> None:
    machine.take()
    assert machine.site.flags() & PASSWORDS == init.Permanent(0)
    with pytest.raises(Failure, match="is not installed"):
        machine.run(failing="reading everything back")
    assert machine.site.flags() & PASSWORDS == init.Permanent(0)
    assert (machine.site.state / "auths.json").exists()
    # The same command once more, as nothing was lost.
    done = machine.run()
    assert done["sequence"] == 7
    machine.check_whole()
    assert not (machine.site.state / "auths.json").exists()
    sealed, record = read_record(machine.site, machine.site.state)
    assert record.storage_key == init.tpm_name(provision.read_state(machine.site.state).storage_key)
    assert sealed.tokens().record


@pytest.mark.parametrize("step", ["partitions", "machine-store", "reading everything back", "TPM"])
def test_power_that_fails_before_the_tpm_is_closed(machine: Machine, step: str) -> None:
    machine.take()
    with pytest.raises(Failure, match="is not installed"):
        machine.run(failing=step)
    machine.lose_power()
    assert machine.site.flags() & PASSWORDS == init.Permanent(0)
    # Nobody has to consent, neither to what happens to the TPM nor to the disk.
    machine.take()
    machine.run()
    machine.check_whole()


ENDING = ("disk id", "start", "boot entry", "mark")


def cut_off(machine: Machine, step: str) -> dict[str, bytes]:
    """Have the power fail where a step behind the closing of the TPM begins; return its passwords."""
    machine.take()
    auths = dict(provision._read_auths(machine.site.state))
    with pytest.raises(Failure, match="is not installed"):
        machine.run(failing=step)
    machine.lose_power()
    assert machine.site.flags() & CLOSED == CLOSED
    assert machine.starts() == (step in ENDING[2:])
    return auths


@pytest.mark.parametrize("step", ENDING)
def test_power_that_fails_behind(machine: Machine, step: str) -> None:
    cut_off(machine, step)
    shown = install.show_plan(Host(), machine.options)
    assert [each["step"] for each in shown["steps"]] == ["TPM", *ENDING]  # type: ignore[attr-defined]
    assert "it is closed already" in install.plan_text(shown)
    identity = disk_id(machine.disk)
    assert machine.run()["finished"] == "what was broken off"
    machine.check_whole()
    # The table of a disk that has an id of its own is not written again.
    assert (disk_id(machine.disk) == identity) == (step != "disk id")


@pytest.mark.parametrize("step", ["TPM", *ENDING])
def test_power_that_fails_again_while_that_is_finished(machine: Machine, step: str) -> None:
    cut_off(machine, "disk id")
    with pytest.raises(Failure, match="is not installed"):
        machine.run(failing=step)
    machine.lose_power()
    found = layout.inspect(Host(), machine.disk)
    assert (machine.starts(), found.unfinished) == (step in ENDING[2:], step in ("TPM", "disk id"))
    assert machine.run()["finished"] == "what was broken off"
    machine.check_whole()


def disk_id(disk: Path) -> str:
    told = subprocess.run(["sfdisk", "--disk-id", disk], capture_output=True, check=True, text=True)
    return told.stdout.strip()


@pytest.mark.parametrize("step", ENDING)
def test_power_that_fails_behind_and_a_tpm_that_is_cleared_later(machine: Machine, step: str) -> None:
    """What may have started holds what is nowhere else, and the note for its TPM says nothing any more."""
    cut_off(machine, step)
    machine.site.tpm.clear()
    machine.site.start()
    assert install.resume(machine.installer(), machine.options) is None
    if step == "disk id":
        machine.take()
        machine.run()
        machine.check_whole()
        return
    serial = layout.inspect(Host(), machine.disk).serial
    bare = layout.Consent(serial, members=True, serial_is_enough=True)
    for consent in (layout.Consent(), bare):
        with pytest.raises(Failure, match="to lose all of it|its serial alone does not let that be lost"):
            install.plan(Host(), replace(machine.options, consent=consent))
    with machine.disk.open("r+b", buffering=0) as file:
        file.seek(512)
        file.write(bytes(512))
    with pytest.raises(Failure, match="to lose all of it"):
        install.plan(Host(), machine.options)


def test_the_tpm_of_what_has_started_is_never_set_back(machine: Machine) -> None:
    """With the passwords of the recovery record somebody opened it since: no power cut leaves it so."""
    auths, site = cut_off(machine, "mark"), machine.site
    with tpms.open_tpm(site.tpm.tcti) as opened:
        opened.open_hierarchies(auths)
    site.tpm.allow_clear()
    site.tpm.run("tpm2_changeauth", "-c", "e", "secret")
    found = layout.inspect(Host(), machine.disk)
    assert (bool(found.complete), found.unfinished) == (True, False)
    assert install.find_broken_off(Host(), found, machine.options) is None
    assert install.resume(machine.installer(), machine.options) is None
    assert site.flags() & PASSWORDS == init.Permanent.ENDORSEMENT_AUTH
    with tpms.open_tpm(site.tpm.tcti) as opened:
        assert opened.find_storage_key()


def writes_of_closing(machine: Machine) -> list[tuple[str, int]]:
    """Close the TPM once, and return at which command something stays behind."""
    with Breaking(machine.site.tpm) as way:
        provision.close(machine.site.host, machine.site.state, way.tcti)
    return [
        (provisioned.WRITES[code], at) for at, code in enumerate(way.seen, 1) if code in provisioned.WRITES
    ]


def test_power_that_fails_while_the_tpm_is_closed(machine: Machine, memory: Path) -> None:
    site = machine.site
    machine.take()
    auths = provision._read_auths(site.state)
    with pytest.raises(Failure, match="is not installed"):
        machine.run(failing="TPM")
    record = read_record(site, site.state)[1]
    layout.note_complete(
        Host(), layout.plan_of(Host(), layout.inspect(Host(), machine.disk)), record.storage_key
    )
    subprocess.run(["cp", "--sparse=always", memory / "disk", memory / "saved"], check=True)
    saved = shutil.copytree(site.state, site.folder / "saved")

    def take_back(known: dict[str, bytes]) -> None:
        with tpms.open_tpm(site.tpm.tcti) as opened:
            opened.open_hierarchies(known)
        site.tpm.allow_clear()
        shutil.rmtree(site.state, ignore_errors=True)
        shutil.copytree(saved, site.state)
        subprocess.run(["dd", f"if={memory}/saved", f"of={machine.disk}", "bs=1M", "count=1", "conv=fsync"],
                       check=True, capture_output=True)  # fmt: skip

    moments = writes_of_closing(machine)
    assert [name for name, _ in moments][-4:] == [
        "HierarchyChangeAuth", "HierarchyChangeAuth", "ClearControl", "HierarchyChangeAuth",
    ]  # fmt: skip
    take_back(dict(auths))
    seen = []
    for _, at in moments[-4:]:
        with Breaking(site.tpm, at, done=True) as broken, contextlib.suppress(Failure, init.Refused):
            provision.close(site.host, site.state, broken.tcti)
        site.restart()
        flags = site.flags() & CLOSED
        seen.append(flags)
        # STATE is there: the passwords that the organisation knows are set.
        assert machine.run()["finished"]
        assert site.flags() & CLOSED == CLOSED
        take_back(dict(auths))  # which needs them
    owner, endorsement = init.Permanent.OWNER_AUTH, init.Permanent.ENDORSEMENT_AUTH
    off = init.Permanent.CLEAR_DISABLED
    assert seen == [endorsement, endorsement | owner, endorsement | owner | off, CLOSED]


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_power_that_takes_the_passwords_while_they_are_set(machine: Machine, which: int) -> None:
    site = machine.site
    machine.take()
    # What passes after the answer was taken is the same each time.
    with Breaking(site.tpm) as way, pytest.raises(Failure, match="is not installed"):
        machine.run(failing="start", tcti=way.tcti)
    changes = [at for at, code in enumerate(way.seen, 1) if code in (0x129, 0x127)]
    assert len(changes) == 4
    site.renew(site.folder)
    subprocess.run(["blkdiscard", "--force", machine.disk], check=True)
    machine.take()
    with (
        Breaking(site.tpm, changes[which], done=True) as broken,
        pytest.raises((Failure, init.Refused)),
    ):
        machine.run(tcti=broken.tcti)
    assert not machine.starts()
    machine.lose_power()
    if which < 2:
        shown = install.show_plan(Host(), machine.options)
        assert "cleared" in install.plan_text(shown)
        with pytest.raises(Failure, match="run `mosinit provision`"):
            machine.run()
        assert site.flags() & PASSWORDS == init.Permanent(0)
        machine.take()
        machine.run()
    else:
        host = machine.installer()
        assert install.resume(host, machine.options)
        assert any("the recovery record has others" in step for step in host.steps) == (which == 2)
    machine.check_whole()


def test_a_tpm_in_which_another_system_keeps_a_key_is_not_cleared(machine: Machine) -> None:
    site = machine.site
    for words in (
        ("createprimary", "-C", "o", "-c", "k"),
        ("evictcontrol", "-C", "o", "-c", "k", "0x81000001"),
        ("flushcontext", "-t"),
    ):
        site.tpm.run(f"tpm2_{words[0]}", *words[1:])
    machine.take()
    auths = provision._read_auths(site.state)
    with pytest.raises(Failure, match="is not installed"):
        machine.run(failing="TPM")
    record = read_record(site, site.state)[1]
    disk = layout.inspect(Host(), machine.disk)
    layout.note_complete(Host(), layout.plan_of(Host(), disk), record.storage_key)
    machine.lose_power()
    site.tpm.run("tpm2_changeauth", "-c", "e", auths["endorsement"].decode())
    assert "with new passwords" in install.plan_text(install.show_plan(Host(), machine.options))
    machine.run()
    machine.check_whole()
    site.tpm.run("tpm2_readpublic", "-c", "0x81000001")


def complete(machine: Machine) -> dict[str, bytes]:
    """Make a disk complete while the TPM is not closed; return the passwords."""
    machine.take()
    auths = dict(provision._read_auths(machine.site.state))
    with pytest.raises(Failure, match="is not installed"):
        machine.run(failing="TPM")
    record = read_record(machine.site, machine.site.state)[1]
    planned = layout.plan_of(Host(), layout.inspect(Host(), machine.disk))
    layout.note_complete(Host(), planned, record.storage_key)
    machine.lose_power()
    return auths


def test_a_tpm_in_which_another_system_keeps_an_index_is_not_cleared(machine: Machine) -> None:
    run = machine.site.tpm.run
    run("tpm2_nvdefine", "-C", "o", "-s", "8", "-a", "ownerread|ownerwrite|authread", "0x1500016")
    auths = complete(machine)
    run("tpm2_changeauth", "-c", "e", auths["endorsement"].decode())
    assert "with new passwords" in install.plan_text(install.show_plan(Host(), machine.options))
    machine.run()
    machine.check_whole()
    run("tpm2_nvreadpublic", "0x1500016")


def test_what_the_makers_of_a_tpm_keep_in_it_does_not_count(machine: Machine) -> None:
    run = machine.site.tpm.run
    run("tpm2_nvdefine", "-C", "p", "-s", "8", "-a", "ppread|ppwrite|platformcreate|authread", "0x1c00002")
    with tpms.open_tpm(machine.site.tpm.tcti) as opened:
        assert not opened.keeps_others()
    machine.take()
    with tpms.open_tpm(machine.site.tpm.tcti) as opened:
        assert not opened.keeps_others()


@pytest.mark.parametrize("planted", ["no record", "another name"])
def test_a_mark_alone_clears_no_tpm(machine: Machine, planted: str) -> None:
    """Who lets it be cleared is the organisation: by its record, for this TPM, on that disk."""
    auths = complete(machine)
    disk = layout.inspect(Host(), machine.disk)
    if planted == "no record":
        with machine.disk.open("r+b", buffering=0) as file:
            file.seek(layout.plan_of(Host(), disk).named("machine-config").start)
            file.write(bytes(init.MIB))
    else:
        subprocess.run(["sfdisk", "--part-label", machine.disk, "2", "config"], check=True)
    machine.site.tpm.run("tpm2_changeauth", "-c", "e", auths["endorsement"].decode())
    with pytest.raises((Failure, init.Refused), match="LUKS-HEADER|is not laid out as its mark says"):
        machine.run()
    assert machine.site.flags() & PASSWORDS == init.Permanent.ENDORSEMENT_AUTH


def test_what_somebody_planted_while_closing_was_broken_off_does_not_stay(machine: Machine) -> None:
    auths, run = complete(machine), machine.site.tpm.run
    for handle, name in (("e", "endorsement"), ("o", "owner")):
        run("tpm2_changeauth", "-c", handle, auths[name].decode())
    run("tpm2_clearcontrol", "-C", "l", "s")
    policy = machine.site.folder / "policy"
    policy.write_bytes(bytes(32))
    run("tpm2_setprimarypolicy", "-C", "l", "-L", str(policy), "-g", "sha256")
    run("tpm2_dictionarylockout", "-s", "-n", "4000000000", "-t", "1", "-l", "1")
    machine.run()
    machine.check_whole()
    with tpms.open_tpm(machine.site.tpm.tcti) as opened:
        assert opened.policies() == []
    assert "TPM2_PT_MAX_AUTH_FAIL: 0x20" in run("tpm2_getcap", "properties-variable").decode()


def test_a_tpm_that_somebody_else_closed_is_left_alone(machine: Machine) -> None:
    """The note on the disk names another TPM, or none is there."""
    machine.take()
    with pytest.raises(Failure, match="is not installed"):
        machine.run(failing="TPM")
    disk = layout.inspect(Host(), machine.disk)
    layout.note_complete(Host(), layout.plan_of(Host(), disk), b"\0\x0b" + bytes(32))
    machine.lose_power()
    machine.site.tpm.run("tpm2_changeauth", "-c", "o", "secret")
    assert layout.inspect(Host(), machine.disk).complete == "000b" + "00" * 32
    assert install.resume(machine.installer(), machine.options) is None
    assert machine.site.flags() & PASSWORDS == init.Permanent.OWNER_AUTH
    with pytest.raises(init.Refused, match="TPM-STATE"):
        machine.site.request()
