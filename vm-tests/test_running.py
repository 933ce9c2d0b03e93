"""A machine after the hand-over: what root cannot do, what outlives a boot, how a dead one comes back."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import probed
import pytest
from driven import SECONDS, Beside, Driven, running
from installed import KEPT, SIZES, UUIDS, Installed
from programs import init_program
from world import GOOD_HOSTFS, HELLO, World

from mosinit import answers, approve, eventlog, exchange, firmware, init, lastgood, uki, vm
from mosinit.console import FRAME, parse_report

EVIL = base64.b64encode(b"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n").decode()
WANTS = base64.b64encode(b"[Unit]\nWants=evil.service\n").decode()
ANSWERS = base64.b64encode(b"version: 1\ndisk: /dev/vda\n").decode()
# What a hypervisor may tell systemd, and would be obeyed (systemd.system-credentials(7)); and what a live
# system would install by.
CREDENTIALS = (
    "io.systemd.credential:system.machine_id=" + 32 * "1",
    "io.systemd.credential:system.hostname=evil",
    "io.systemd.credential:passwd.plaintext-password.root=evil",
    "io.systemd.credential:tmpfiles.extra=f /etc/evil",
    "io.systemd.credential.binary:systemd.extra-unit.evil.service=" + EVIL,
    "io.systemd.credential.binary:systemd.unit-dropin.multi-user.target=" + WANTS,
    f"io.systemd.credential.binary:{answers.NAME}=" + ANSWERS,
)
KERNEL = b"Linux version "
HANDED_OVER = FRAME + b'{"schema": 1, "result": "pivoted"'


@pytest.fixture(scope="module")
def base(world: World) -> Installed:
    """A machine whose hostfs does nothing, saved at the first line of its bring-up."""
    sizes = {**SIZES, "store": 512 * init.MIB}
    release = world.release("calm", GOOD_HOSTFS)
    older = world.release("calm-6", GOOD_HOSTFS, sequence=6)
    folder = world.folder / "running"
    made = Installed(world, folder, release, 7, older, "+3", sizes, CREDENTIALS).make()
    if not world.cold:
        vm.save(world.host, made.options(), made.folder / "saved")
        assert entries(made) == ["mosinit_6.efi", "mosinit_7+2-1.efi"]
    return made


def saved(base: Installed) -> Path | None:
    """Return where the machine is saved; with --cold it is not."""
    return None if base.world.cold else base.folder / "saved"


def entries(made: Installed) -> list[str]:
    """List the UKIs on a machine's ESP."""
    listed = made.world.host.run(["mdir", "-b", "-i", f"{made.disk}@@{init.MIB}", "::EFI/Linux"])
    return sorted(line.rpartition("/")[2] for line in listed.decode().split())


def copy(base: Installed, name: str, tries: str) -> Installed:
    """Copy a machine with its disk, on which the boot loader will have counted so far once it has begun."""
    host, made = base.world.host, replace(base, folder=base.folder / name)
    shutil.copytree(base.state, made.state)
    host.run(["cp", "--sparse=always", base.disk, made.disk])
    counts(made, tries)
    return made


def counts(made: Installed, tries: str) -> None:
    """Have the boot loader have counted so far, when it has started this machine."""
    # A restored machine is beyond its boot loader; one that is switched on meets it first.
    before = {"+2-1": "+3", "+1-2": "+2-1", "+0-3": "+1-2"}[tries] if made.world.cold else tries
    found = next(name for name in entries(made) if name.startswith("mosinit_7"))
    if found != f"mosinit_7{before}.efi":
        old, new = f"::EFI/Linux/{found}", f"::EFI/Linux/mosinit_7{before}.efi"
        made.world.host.run(["mren", "-i", f"{made.disk}@@{init.MIB}", old, new])


# --- A machine that dies comes back, and the boot loader counts --------------------------------------------


Story = Callable[[Installed, Path | None], Coroutine[object, object, Any]]


async def disk_hangs(made: Installed, saved: Path | None) -> list[str]:
    """A disk whose reads never return, while layers are mounted."""
    async with running(made, saved) as machine:
        await machine.says(b"mosinit: load-manifest: ok")
        await machine.starve_disk()
        said = await comes_back(machine)
        assert HANDED_OVER not in said
        return entries(made)


async def unlock_hangs(made: Installed, saved: Path | None) -> bytes:
    """The same while volumes are opened; returns what the machine's memory holds then."""
    async with running(made, saved) as machine:
        await machine.says(b"mosinit: unlock: ok")
        await machine.starve_disk()
        return await machine.memory()


async def hostfs_hangs(made: Installed, saved: Path | None) -> tuple[bytes, list[str]]:
    """A hostfs that does nothing; returns what the machine's memory held."""
    async with running(made, saved) as machine:
        await machine.says(HELLO.strip())
        memory = await machine.memory()
        await comes_back(machine)
        return memory, entries(made)


async def comes_back(machine: Driven) -> bytes:
    """Wait for the watchdog, and for the boot loader to have started the next kernel."""
    place = len(machine.console)
    await machine.happens("WATCHDOG", init.WATCHDOG_SECONDS + 30)
    await machine.feed_disk()
    await machine.happens("RESET")
    await machine.says(KERNEL)
    return bytes(machine.console[place:])


async def init_ends(made: Installed, saved: Path | None) -> tuple[bytes, bytes, list[str]]:
    """A hostfs whose init ends at once, in a last try; returns what it says, and the next boot."""
    async with running(made, saved) as machine:
        await machine.says(HANDED_OVER)
        last = await machine.says(b"Kernel panic - not syncing: ")
        await machine.happens("RESET")
        await machine.says(FRAME)
        return last, await machine.says(b"\n"), entries(made)


@pytest.fixture(scope="module")
def waiting(base: Installed, beside: Beside) -> dict[str, Future[Any]]:
    """The machines that hang until the watchdog fires: minutes, in which the other tests go on."""
    ends = base.world.release("ends", {"sbin/init": init_program(HELLO, "end")})
    mortal = base.another(base.folder / "mortal", ends, base.older, base.tries)
    counts(mortal, "+0-3")
    machines: dict[Story, Installed] = {
        hostfs_hangs: copy(base, "hostfs", "+2-1"),
        disk_hangs: copy(base, "disk", "+1-2"),
        init_ends: mortal,
    }
    return {story.__name__: beside.start(story(made, saved(base))) for story, made in machines.items()}


# --- Root in a real hostfs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def debian(base: Installed, waiting: dict[str, Future[Any]]) -> Installed:
    """The machine with the real hostfs and the probe on its disk."""
    made = base.another(base.folder / "debian", probed.release(base.world), base.older, base.tries)
    counts(made, "+2-1")
    return made


def boot(base: Installed, made: Installed, number: int) -> tuple[vm.Outcome, dict[str, Any]]:
    """Boot the machine with its disk as it is, and return what its probe tells."""
    told: list[dict[str, Any]] = []

    def answer(line: bytes) -> bytes:
        told.append(json.loads(line))
        return b"{}"

    options = replace(made.options(), until="multi-user", exchange=answer)
    if memory := saved(base):
        options = replace(options, folder=made.folder / f"state-{number}")
        outcome = vm.restore(made.world.host, memory, options)
    else:
        outcome = vm.boot(made.world.host, options)
    assert outcome.status == 0, outcome.reason + outcome.console.read_text(errors="replace")[-3000:]
    assert len(told) == 1
    return outcome, told[0]


@pytest.fixture(scope="module")
def first(base: Installed, debian: Installed) -> tuple[vm.Outcome, dict[str, Any]]:
    """Its first boot."""
    return boot(base, debian, 1)


@pytest.fixture(scope="module")
def told(first: tuple[vm.Outcome, dict[str, Any]]) -> dict[str, Any]:
    """What the probe of the first boot tells."""
    return first[1]


# After the fence, what the bring-up did leads nowhere; the last word is which command the TPM refused.
REFUSED = {
    "unseal as the bring up does": "TPM-APPROVAL",
    "unseal with the approval of the time before the fence": "TPM-POLICY",
    "unseal without a policy": "UNSEAL 0x99d",
    "unseal by an empty password": "UNSEAL 0x12f",
    "reset PCR 11": "PCR_RESET 0x907",
    "set an epoch bit as the index": "NV_SETBITS 0x12f",
    "set an epoch bit as the owner": "NV_SETBITS 0x9a2",
    "remove the epoch index": "NV_UNDEFINE 0x9a2",
    "clear the TPM as the platform": "CLEAR 0x9a2",
    "read a key of the kind logon": "ENOTSUP",
    "read kcore": "EPERM",
    "read dev mem": "EPERM",
    "read dev port": "EPERM",
    "raise the IO privilege": "EPERM",
    "write to the space of a PCI device": "EPERM",
    "write to debugfs": "EPERM",
    "what could trace the kernel": "[]",
    "load a BPF program that reads the kernel": "EINVAL",
    "load a kernel by kexec load": "EPERM",
    "load a kernel by kexec file load": "EPERM",
    "allow kexec again": "EINVAL",
    "load an unsigned module": "EKEYREJECTED",
    "load a changed module": "EKEYREJECTED",
    "write into config": "EROFS",
    "write into the store": "EROFS",
    "write to a layer": "EPERM",
    "the secret of services for others": "EACCES",
    "set db": "EACCES",
    "set SetupMode": "EROFS",
    "remove PK": "EINVAL",
    "hibernation": "[disabled]",
}
# Beside them: the same means, where nothing forbids it.
DONE = {
    "reset PCR 16": "done",
    "the epoch": 1,
    "the key of a volume with a plain key": 64 * "5a",
    "read a key of the kind user": b"content".hex(),
    "load a BPF program": "done",
    "load a signed module": "done",
    "set a firmware variable of ours": "done",
    # Root is root on a running system: what lies there is checked again at the next boot.
    "write into config after a remount": "done",
    "write into the store after a remount": "done",
}


def test_what_root_is_refused(told: dict[str, Any]) -> None:
    assert {name: str(told[name]).partition(":")[0] for name in REFUSED} == REFUSED
    assert "POLICY_AUTHORIZE" in told["unseal with the approval of the time before the fence"]


def test_the_means_of_the_probe_work(told: dict[str, Any]) -> None:
    assert {name: told[name] for name in DONE} == DONE


def test_no_key_of_a_volume_can_be_read(told: dict[str, Any]) -> None:
    tables = told["keys of the volumes"]
    assert set(tables) == {"mosinit-config", "mosinit-scratch", "mosinit-state", "mosinit-store"}
    assert all(re.fullmatch(r":(64|96):(logon|user):[^ ]+", key) for key in tables.values()), tables
    readable = {row[1] for row in told["every key of the kernel"] if re.fullmatch("([0-9a-f]{2})+", row[2])}
    assert readable == {"invocation_id: 16"}  # systemd's, of each unit


def test_what_the_bring_up_leaves(told: dict[str, Any]) -> None:
    assert told["the command line"] == uki.CMDLINE + "\n"
    assert told["devices that are no live unit"] == []
    names = {"config", "scratch", "state", "store", "hostfs-0", "hostfs-1", "bootkit-0"}
    assert set(told["devices"]) == {*(f"mosinit-{name}" for name in names), "mosinit-config_dif"}
    assert told["the secret of services"] == ["-r--------", 0, 32, 32]
    # The probe's own is there, so others would be.
    assert [link for _, link in told["open files of the initrd"]] == ["/dev/tpmrm0"]
    assert told["the watchdog"] == {"identity": "i6300ESB timer", "state": "active", "timeout": "60"}
    strict = ["nodev", "noexec", "nosuid", "nosymfollow", "ro"]
    assert told["options of the volumes"] == {
        "/config": strict,
        "/atomfs-cache": strict,
        "/scratch-writes": ["nodev", "noexec", "nosuid", "rw"],
        "/var": ["nodev", "nosuid", "rw"],
    }


def test_no_program_that_anybody_could_log_in_by(told: dict[str, Any]) -> None:
    names = {Path(program).name for program in told["programs that run"]}
    assert "systemd" in names
    assert not names & {"bash", "dash", "sh", "agetty", "login", "sulogin", "sshd"}
    assert told["accounts with a password"] == []


def test_nothing_that_a_live_system_offers(told: dict[str, Any]) -> None:
    """Neither by itself nor when it is asked to: an installation although there are answers, the installer,
    and sshd although the image has a key.
    """
    offered = told["what a live system offers"]
    assert set(offered) == {
        "mosinit-install.service", "mosinit-live-ssh.service", "mosinit-consoles.service",
        "mosinit-console@ttyS0.service",
    }  # fmt: skip
    assert {tuple(sorted(state)) for state in offered.values()} == {("inactive", "loaded", "no")}
    assert told["units of ssh"] == []
    assert told["ports that others reach"] == []


def test_credentials_of_the_hypervisor_have_no_effect(told: dict[str, Any]) -> None:
    assert told["credentials in the firmwares table"] == len(CREDENTIALS)
    assert told["credentials"] == []
    assert told["a unit from credentials"] == ["LoadState=not-found", "ActiveState=inactive"]
    assert told["the hosts name"] != "evil"
    assert told["the id of the machine"] != 32 * "1"


def test_provisioning_runs_with_what_hostfs_has(told: dict[str, Any]) -> None:
    """On a machine that is provisioned it is refused, and needs no tools tree to say so."""
    status, words = told["the verb provision"]
    assert (status, "TPM-STATE" in words) == (3, True), words


def test_a_good_boot_is_counted_no_more(first: tuple[vm.Outcome, dict[str, Any]], debian: Installed) -> None:
    assert first[0].system == {"failed_units": [], "modules": True}
    assert entries(debian) == ["mosinit_6.efi", "mosinit_7.efi"]


# --- What outlives a boot ----------------------------------------------------------------------------------


Told = tuple[dict[str, Any], bytes]  # what the probe tells, and the console after its answer


def session(base: Installed, made: Installed, answer: bytes, *events: tuple[str, float]) -> Told:
    """Let the machine with its disk as it is do what the answer says, until these events."""

    async def story() -> Told:
        async with running(made, saved(base)) as machine:
            told = json.loads(await machine.asks())
            place = len(machine.console)
            await machine.answer(answer)
            for event, seconds in events:
                await machine.happens(event, seconds)
            return told, bytes(machine.console[place:])

    return asyncio.run(story())


@pytest.fixture(scope="module")
def update(world: World, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An update that appends to dbx: what is there already, and one program more."""
    folder, keyset = tmp_path_factory.mktemp("update"), world.keyset
    head, entry = firmware.EMPTY_DBX[:28], firmware.EMPTY_DBX[28:]
    both = entry + entry[:16] + hashlib.sha256(b"a boot loader that was revoked").digest()
    (folder / "list").write_bytes(head[:16] + struct.pack("<III", 28 + len(both), 0, 48) + both)
    signer = ("-k", keyset.folder / "KEK.key", "-c", keyset.certificate_path("KEK"))
    world.host.run(["sign-efi-sig-list", "-a", *signer, "dbx", folder / "list", folder / "auth"])
    return (folder / "auth").read_bytes()


@pytest.fixture(scope="module")
def approved(
    world: World, told: dict[str, Any], update: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the organisation approves in advance, from the log of the first boot."""
    folder = tmp_path_factory.mktemp("approved")
    (folder / "log").write_bytes(base64.b64decode(told["the event log"]))
    (folder / "dbx.auth").write_bytes(update)
    options = approve.Options([folder / "log"], changes={"dbx": folder / "dbx.auth"})
    approve.approve(world.host, world.keyset, folder / "approvals.json", options)
    return folder / "approvals.json"


class Second(NamedTuple):
    """The next boot, its orderly restart after dbx was changed, and the boot after that."""

    told: dict[str, Any]
    changed: dict[str, Any]
    console: bytes
    after: dict[str, Any]


@pytest.fixture(scope="module")
def second(first: object, base: Installed, debian: Installed, approved: Path, update: bytes) -> Second:
    """The next boots."""
    answer = {
        "do": "restart", "approvals": approved.read_text(), "update": base64.b64encode(update).decode(),
    }  # fmt: skip

    async def story() -> Second:
        async with running(debian, saved(base)) as machine:
            told = json.loads(await machine.asks())
            place = len(machine.console)
            await machine.answer(json.dumps(answer).encode())
            changed = json.loads(await machine.asks())
            await machine.happens("RESET")
            said = bytes(machine.console[place:])
            return Second(told, changed, said, json.loads(await machine.asks())["after the change"])

    return asyncio.run(story())


@pytest.fixture(scope="module")
def third(second: object, base: Installed, debian: Installed) -> Told:
    """The one after it, without the volume `state`, until PID 1 dies of a fault."""
    disk = debian.disk
    debian.world.host.run(["sfdisk", "--quiet", "--no-reread", "--part-label", disk, "5", "other"])
    # RuntimeWatchdogSec= of hostfs
    return session(base, debian, b'{"do": "crash"}', ("WATCHDOG", 60 + 30), ("RESET", SECONDS))


def test_only_the_volume_state_outlives_a_boot(told: dict[str, Any], second: Second, third: Told) -> None:
    left = [each["left by an earlier boot"] for each in (told, second.told, third[0])]
    assert left == [[], ["/var/lib/left"], []]


def test_each_boot_has_what_the_machine_keeps(told: dict[str, Any], second: Second) -> None:
    for each in (told, second.told):
        assert each["the id of the machine"] + "\n" == KEPT["etc/machine-id"]
        assert each["the host key of ssh"] == [KEPT["etc/ssh/ssh_host_ed25519_key"], "-rw-------"]


def test_nothing_in_var_is_laid_over_usr_or_etc(told: dict[str, Any]) -> None:
    assert told["extensions that systemd finds"] == [["evil"], ["evil"]]
    assert told["laid over usr or etc"] == []


def test_a_restart_in_an_orderly_way(second: Second) -> None:
    assert b"reboot.target" in second.console
    assert b"Kernel panic" not in second.console


# --- dbx changes, and was approved before ------------------------------------------------------------------


def test_the_event_log_of_a_good_boot_lies_on_the_boot_partition(
    told: dict[str, Any], first: object, debian: Installed, approved: Path
) -> None:
    esp = f"{debian.disk}@@{init.MIB}"
    kept = debian.world.host.run(["mtype", "-i", esp, f"::{lastgood.PLACE}"])
    assert eventlog.replay(eventlog.parse_event_log(kept), eventlog.PLATFORM)
    assert base64.b64decode(told["the event log"]) == (approved.parent / "log").read_bytes()


def test_the_machine_takes_approvals_before_the_change(second: Second, approved: Path) -> None:
    (wanted,) = exchange.parse_approvals(approved.read_bytes(), "approvals").approvals
    taken = second.changed["taken"]
    assert (taken["added"], taken["kept"], taken["dropped"]) == (
        [wanted.pcr7.hex()],
        [taken["in force"]],
        [],
    )
    states = {taken["in force"]: True, wanted.pcr7.hex(): False}
    rows = [{"pcr7": pcr7[:16], "epoch": 1, "in force": now} for pcr7, now in states.items()]
    rows[0]["epoch"] = init.MAX_EPOCH
    assert second.changed["status"]["approved firmware states"] == rows


def test_status_says_what_runs_and_how_the_tpm_is(second: Second, debian: Installed) -> None:
    """It is the second boot: the first one has proved its generation good."""
    said = dict(second.changed["status"])
    report, rows, entry = said.pop("report"), said.pop("generations"), said.pop("entry")
    said_of_it = (report["result"], report["failed"], report["generation"])
    assert said_of_it == ("pivoted", None, said["generation"])
    assert re.fullmatch(r"mosinit_7(\+[0-9]+(-[0-9]+)?)?\.efi", entry)
    known = [(row["sequence"], row["runs"], row["good"]) for row in rows]
    assert known == [(7, True, True), (6, False, False)]
    assert rows[0]["generation"] == said.pop("generation")
    del said["approved firmware states"]
    assert said == {
        "mode": "run", "product": debian.world.keyset.product, "sequence": 7, "uki": debian.uki.uki_id,
        "epoch": 1, "machine id": KEPT["etc/machine-id"].strip(), "config": "/dev/vda2", "epoch order": 1,
        "good": True, "previous refusal": None,
        "tpm": {
            "present": True, "provisioned": True, "locked out": False, "epoch": 1,
            "storage key": debian.material.record.storage_key.hex(),
        },
    }  # fmt: skip


def test_the_firmware_appends_as_was_predicted_and_the_disk_opens(second: Second) -> None:
    """What is there already was skipped, or this boot would have been refused by TPM-POLICY."""
    states = second.after["status"]["approved firmware states"]
    assert [row["in force"] for row in states] == [False, True]


def test_the_change_of_dbx_is_named(second: Second) -> None:
    digest = hashlib.sha256(b"a boot loader that was revoked").hexdigest()
    (only,) = second.after["differences"]
    assert only["what"] == f"dbx changed: 1 entry added: program {digest[:16]}…"
    # This boot has proved good already, and its own log is the one that is kept.
    last = second.after["last boot"]
    assert (last["result"], last["previous refusal"], last["differences"]) == ("pivoted", None, [])


def test_a_systemd_that_died_is_restarted_by_the_watchdog(third: Told) -> None:
    # It let go of the watchdog, and whoever ends does not stop it.
    assert b"watchdog0: watchdog did not stop!" in third[1]
    assert b"Kernel panic" not in third[1]


# --- How the hung ones ended -------------------------------------------------------------------------------


def test_a_disk_that_hangs_costs_a_try(waiting: dict[str, Future[Any]]) -> None:
    assert waiting["disk_hangs"].result() == ["mosinit_6.efi", "mosinit_7+0-3.efi"]


def test_a_hostfs_that_hangs_costs_a_try(waiting: dict[str, Future[Any]]) -> None:
    assert waiting["hostfs_hangs"].result()[1] == ["mosinit_6.efi", "mosinit_7+1-2.efi"]


def test_after_the_last_try_the_generation_before_starts(waiting: dict[str, Future[Any]]) -> None:
    last, report, names = waiting["init_ends"].result()
    # Not what the program says: a panic leaves behind what the serial line has not sent.
    assert b'"sequence": 7' in last and last.endswith(b"Kernel panic - not syncing: ")
    found = parse_report(report)
    assert (found["result"], found["sequence"]) == ("pivoted", 6)
    assert names == ["mosinit_6.efi", "mosinit_7+0-3.efi"]


def test_no_secret_stays_in_memory(base: Installed, beside: Beside, waiting: dict[str, Future[Any]]) -> None:
    secret = base.material.secret
    keys = {"config": secret, "services": bytes(init.derive_key(bytearray(secret), "service"))}
    for name in ("store", "state"):
        keys[name] = bytes(init.derive_key(bytearray(secret), name, UUIDS[name]))
    before = beside.start(unlock_hangs(copy(base, "unlock", "+2-1"), saved(base))).result()
    after, _ = waiting["hostfs_hangs"].result()
    assert secret in before
    assert {name: after.count(key) for name, key in keys.items()} == dict.fromkeys(keys, 0) | {"services": 1}
