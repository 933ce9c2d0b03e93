"""An installed machine about itself: `status` says what runs and from where, `boot-good` that it runs well,
and `provision --approvals` takes, before its firmware changes, what opens its disk after that.

A boot that proved good is written down in three places, in this order: a mark in manifest.git; on the ESP
the UKI loses its counter of tries (as systemd-bless-boot does it); the release's epoch order goes into the
header of the config volume, from where the next boot carries it out. The last step cuts off what is older.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mosinit import generations, init, lastgood, luks, publish, reseal
from mosinit.generations import Elsewhere, Quiet
from mosinit.host import Failure, Host

REMOUNT = init.MountFlag(32)  # linux/mount.h


@dataclass(frozen=True)
class Paths:
    """Where a running machine has what; tests have it elsewhere."""

    left: Path = Path(init.LEFT)
    config: Path = Path(init.CONFIG)
    store: Path = Path(init.STORE)
    event_log: Path = lastgood.EVENT_LOG
    lock: Path = Path("/run/mosinit-header.lock")

    @property
    def repository(self) -> Path:
        """manifest.git."""
        return self.config / "manifest.git"


@dataclass(frozen=True)
class Running:
    """What the bring-up left: its report, and the policy of the UKI that runs."""

    report: Mapping[str, object]
    policy: init.Policy

    @property
    def generation(self) -> str:
        """The commit that runs."""
        return str(self.report["generation"])

    @property
    def sequence(self) -> int:
        """The sequence of what runs."""
        return int(str(self.report["sequence"]))


def running(paths: Paths) -> Running:
    """Return what runs. Raises `Failure` on a system that mosinit did not start."""
    try:
        report = init.parse_json((paths.left / "report.json").read_bytes(), "")
        folder = paths.left / "organisation"
        organisation = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
        assert isinstance(report, dict)  # the bring-up wrote it
        uki_id = str(report["uki_id"]).encode()
        policy = init.parse_policy((paths.left / "policy.json").read_bytes(), uki_id, organisation)
    except OSError as error:
        raise Failure(
            "this system was not started by mosinit: do this on one that was, by a medium or from its disk"
        ) from error
    return Running(report, policy)


# --- status ----------------------------------------------------------------------------------------------


def status(host: Host, paths: Paths | None = None, machine: init.Machine | None = None) -> dict[str, object]:
    """Return what runs, from where, and how the TPM is. Nothing is changed."""
    paths, machine = paths or Paths(), machine or Quiet()
    now = running(paths)
    facts: dict[str, object] = {
        "mode": now.policy.mode,
        "product": now.policy.product,
        "sequence": now.report["sequence"],
        "uki": now.policy.uki_id,
        "epoch": now.policy.epoch,
        "entry": selected_entry(machine),
        "tpm": describe_tpm(machine),
    }
    if now.policy.mode == "run":
        facts |= _describe_machine(paths, machine, now)
    facts["previous refusal"] = now.report.get("previous_refusal")
    return {**facts, "report": dict(now.report)}


def _describe_machine(paths: Paths, machine: init.Machine, now: Running) -> dict[str, object]:
    with open_config(machine) as (device, header):
        tokens = header.tokens
        assert tokens  # of a config volume
        order = init.verify_epoch_order(
            tokens.order_statement, tokens.order_signature, tokens.order_certificate, now.policy
        )
    rows = [
        {
            "sequence": each.sequence,
            "generation": each.commit,
            "runs": each.commit == now.generation,
            "good": generations.is_good(paths.repository, each.commit),
        }
        for each in generations.list_all(paths.repository, now.policy.product)
    ]
    return {
        "machine id": _read_machine_id(paths.config / "state/etc/machine-id"),
        "config": str(device),
        "epoch order": order,
        "approved firmware states": _describe_approvals(tokens, machine),
        "generation": now.generation,
        "good": generations.is_good(paths.repository, now.generation),
        "generations": rows,
    }


def _read_machine_id(path: Path) -> str | None:
    """Return what lies there, if it is a machine's id: root may have left anything."""
    try:
        words = Quiet().read(str(path), 64).decode(errors="replace").strip()
    except OSError:
        return None
    return words if re.fullmatch("[0-9a-f]{32}", words) else None


def _describe_approvals(tokens: init.Tokens, machine: init.Machine) -> list[dict[str, object]]:
    now = current_pcr7(machine)
    return [
        {"pcr7": pcr7[:16], "epoch": approval.epoch, "in force": pcr7 == now}
        for pcr7, approval in tokens.approvals.items()
    ]


def current_pcr7(machine: init.Machine) -> str | None:
    """Return PCR 7 of this boot in hex, None without a TPM."""
    if not machine.exists(init.TPM_SYSFS):
        return None
    with init.asking_tpm("PCR 7"):
        return init.read_pcr(machine, init.PLATFORM_STATE[0]).hex()


def selected_entry(machine: init.Machine) -> str | None:
    """Return the boot loader's name of what it started."""
    entry = machine.efi_read("LoaderEntrySelected", init.LOADER_GUID)
    return entry[1].decode("utf-16-le", "replace").rstrip("\0") if entry else None


def describe_tpm(machine: init.Machine) -> dict[str, object]:
    """Return the state of the TPM as plain data."""
    if not machine.exists(init.TPM_SYSFS):
        return {"present": False}
    with init.asking_tpm("the TPM to tell its state"):
        flags, _ = init.read_tpm_flags(machine)
        key = init.read_storage_key(machine)
    facts: dict[str, object] = {
        "present": True,
        "provisioned": flags & init.PROVISIONED == init.PROVISIONED,
        "locked out": bool(flags & init.Permanent.IN_LOCKOUT),
        "storage key": init.tpm_name(key).hex() if key else None,
    }
    try:
        with init.asking_tpm("the epoch index"):
            facts["epoch"] = init.read_epoch(machine).bit_length()
    except init.Refused:
        facts["epoch"] = None
    return facts


@contextlib.contextmanager
def open_config(machine: init.Machine) -> Iterator[tuple[Path, init.LuksHeader]]:
    """Yield the device of this machine's config volume, and its header as a boot reads it."""
    fd, _ = init.open_partition(machine, init.find_disk(machine), init.CONFIG_TYPE)
    try:
        yield Path(os.readlink(f"/proc/self/fd/{fd}")), init.read_luks_header(machine, fd, "config")
    finally:
        machine.close(fd)


# --- boot-good -------------------------------------------------------------------------------------------


def boot_good(
    host: Host, paths: Paths | None = None, machine: init.Machine | None = None
) -> dict[str, object]:
    """Write down that this boot went well; done twice, it changes nothing the second time."""
    paths, machine = paths or Paths(), machine or Quiet()
    now = running(paths)
    if now.policy.mode != "run":
        raise Failure("this is a live system: only what runs from a machine's own disk can prove good")
    host.unshare_mounts()
    with writable(host, paths.config):
        generations.mark_good(host, paths.repository, now.generation)
    esp, _ = init.open_partition(machine, init.find_disk(machine), init.ESP_TYPE)
    try:
        with host.mounted(Path(os.readlink(f"/proc/self/fd/{esp}")), "vfat") as folder:
            blessed = bless(host, folder, now.sequence)
            lastgood.keep(host, folder, paths.event_log)
    finally:
        machine.close(esp)
    return {
        "generation": now.generation,
        "sequence": now.sequence,
        "uki": blessed,
        "epoch order": lay_order(host, now.policy, paths, machine),
    }


@contextlib.contextmanager
def writable(host: Host, folder: Path) -> Iterator[None]:
    """Make a file system writable for this process alone, whose mounts nobody else sees."""
    flags = init.SAFE | init.MountFlag.NOSYMFOLLOW | REMOUNT
    host.mount("", str(folder), "", flags)
    try:
        yield
    finally:
        host.sync_file(folder)
        host.mount("", str(folder), "", flags | init.MountFlag.RDONLY)


def bless(host: Host, esp: Path, sequence: int) -> str:
    """Take the counter of tries out of a UKI's name, durably, and return the name.

    One rename, as the boot loader itself counts: a power cut leaves the old name or the new one.
    """
    folder = esp / "EFI/Linux"
    plain = f"mosinit_{sequence}.efi"
    counted = re.compile(rf"mosinit_{sequence}\+[0-9]+(-[0-9]+)?\.efi")
    found = sorted(name for name in os.listdir(folder) if counted.fullmatch(name))
    if not found and plain not in os.listdir(folder):
        raise Failure(f"the UKI of sequence {sequence} is not on the ESP: install the release again")
    for name in found:
        (folder / name).rename(folder / plain)
    host.sync_file(folder / plain)
    host.sync_file(folder)
    return plain


def lay_order(host: Host, policy: init.Policy, paths: Paths, machine: init.Machine) -> int:
    """Lay the release's epoch order into config's header, never one of an earlier epoch; return what lies
    there.
    """
    order = publish.read_epoch_order(Elsewhere({init.STORE: paths.store}), policy)
    with changing(paths), open_config(machine) as (device, header):
        tokens = header.tokens
        assert tokens  # of a config volume
        parts = (tokens.order_statement, tokens.order_signature, tokens.order_certificate)
        present = init.verify_epoch_order(*parts, policy)
        if order.epoch <= present:
            return present
        fresh = tokens._replace(
            order_statement=order.statement,
            order_signature=order.signature,
            order_certificate=order.certificate,
        )
        luks.import_tokens(host, device, fresh)
    return order.epoch


# --- provision --approvals -------------------------------------------------------------------------------


def take_approvals(
    host: Host, file: Path, paths: Paths | None = None, machine: init.Machine | None = None
) -> dict[str, object]:
    """Lay approvals into config's header before this machine's firmware changes; done twice, it changes
    nothing the second time.

    Raises `Refused` and changes nothing unless the organisation signed every one of them for this product.
    """
    paths, machine = paths or Paths(), machine or Quiet()
    now = running(paths)
    if now.policy.mode != "run":
        raise Failure(
            "this is a live system, and the disk's own system takes approvals: here, `mosinit recover "
            "--reseal --approvals FILE` does"
        )
    approvals = reseal.read_approvals(file, now.policy)
    current = current_pcr7(machine)
    with changing(paths), open_config(machine) as (device, header):
        laid = reseal.lay_approvals(
            host, device, header, now.policy, approvals, [current] if current else []
        )
    return {"config": device, **laid.describe(), "in force": current}


@contextlib.contextmanager
def changing(paths: Paths) -> Iterator[None]:
    """Be the only one that changes config's header: it is read, changed and written as a whole."""
    with paths.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
