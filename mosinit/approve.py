"""Approving in advance, on the organisation's side: which PCR 7 a machine will have, and that it may open.

The value of now comes from a firmware's event log; that of tomorrow from the same log, with the variable
that will change in its new form. A firmware update is not predicted: the log of a machine of the same model
that has it gives the value. What is approved is checked as `enroll` checks it: Secure Boot on, exactly the
keyset's certificates, nothing started but by the uki key.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.serialization import Encoding

from mosinit import approvals, drift, enroll, eventlog, exchange, firmware, init, siglists
from mosinit.eventlog import DB, DBX, EV_AUTHORITY, EV_VARIABLE, PLATFORM, Event, Variable
from mosinit.host import Failure, Host, Usage
from mosinit.keys import Keyset, check_out, choose_epoch
from mosinit.siglists import Update

# UEFI 2.10, 32.4.1: EFI_CERT_X509_SHA256_GUID and its kin. A time of revocation follows the hash.
X509_SHA256 = "3bd2a492-96c0-4079-b420-fcf98ef103ed"
X509_HASHES = {
    X509_SHA256: hashlib.sha256,
    "7076876e-80c2-4ee6-aad2-28b349a6865b": hashlib.sha384,
    "446dbf63-2502-4cda-bcfa-2465d2b0fe9d": hashlib.sha512,
}
_REMEDY = "no machine in this state would start what this organisation signed; name another log or content"
_LOG = "name a file as /sys/kernel/security/tpm0/binary_bios_measurements of that machine, or its request"


@dataclass(frozen=True)
class Options:
    """What is to be approved: logs, or the log filed of a machine; what changes, by the word for it."""

    logs: Sequence[Path] = ()
    machine: str | None = None
    machines: Path | None = None
    changes: Mapping[str, Path] = field(default_factory=dict)
    epoch: int | None = None
    reason: str | None = None


class Log(NamedTuple):
    """One event log, and how it is called."""

    name: str
    events: tuple[Event, ...]


def approve(host: Host, keyset: Keyset, out: Path, options: Options) -> dict[str, object]:
    """Write the approvals of what these logs give once the changes are made; return what they are.

    Raises `Failure`, and writes nothing, if one of them may not be approved.
    """
    machines = options.machines or keyset.folder / "machines"
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise Usage(f"{out} cannot be written: name a file for the approvals, in a folder that exists")
    check_out(out, keyset.folder, machines)
    if options.reason is not None and not re.fullmatch("[ -~]{1,200}", options.reason):
        raise Usage("--reason takes 1 to 200 letters and signs of ASCII")
    filed = _filed_log(machines, options.machine) if options.machine else None
    logs = [_read_log(path) for path in options.logs] or [filed for filed in [filed] if filed]
    if not logs:
        raise Usage("name an event log, a machine's request, or a filed machine by --machine SERIAL")
    certificates = firmware.certificates_of_keyset(keyset.folder)
    changes = _read_changes(host, keyset, options.changes)
    epoch = choose_epoch(options.epoch, keyset.epoch)
    made: dict[bytes, tuple[exchange.Approval, dict[str, object]]] = {}
    for log in logs:
        events = predict(log.events, changes, certificates)
        platform = approvals.check_platform(events, certificates, f"{_REMEDY} ({log.name})")
        _check_not_revoked(platform.dbx, certificates)
        reason = options.reason or _reason(log, changes)
        signed = approvals.approve_platform(keyset, platform.pcr7, epoch)
        approval = exchange.Approval(platform.pcr7, signed.epoch, signed.signature, reason)
        # With changes of ours too: what else a log says differs from what was filed is not for them to hide.
        differences = drift.compare((filed or log).events, events)
        told = {"reason": reason, **platform.describe(), "changes": [each.what for each in differences]}
        made.setdefault(platform.pcr7, (approval, told))
    key = init.tpm_name(approvals.policy_keys(keyset).platform)
    document = exchange.Approvals(keyset.product, key, tuple(each for each, _ in made.values()))
    encoded = exchange.encode_approvals(document)
    exchange.parse_approvals(encoded, out.name)
    with host.replacing(out) as fresh:
        fresh.write_bytes(encoded)
    return {
        "approvals": out,
        "product": keyset.product,
        "epoch": epoch,
        "approved": [told for _, told in made.values()],
        "next": f"before the change, `mosinit provision --approvals {out.name}` on each machine; after it, "
        f"`mosinit recover --reseal --approvals {out.name}` on a live medium",
    }


def notes(done: Mapping[str, object]) -> list[str]:
    """Say in words what `approve` signed."""
    approved = done["approved"]
    assert isinstance(approved, list)  # of `approve`
    what = "one state of firmware" if len(approved) == 1 else f"{len(approved)} states of firmware"
    return [f"approved {what} (PCR 7) up to epoch {done['epoch']}: Secure Boot with exactly this keyset"]


def _reason(log: Log, changes: Mapping[tuple[str, str], Update]) -> str:
    names = ", ".join(name for _, name in changes)
    words = f"{names} changed, from {log.name}" if names else f"as in {log.name}"
    return "".join(c if " " <= c <= "~" else "?" for c in words)[:200]


# --- Logs --------------------------------------------------------------------------------------------


def _read_log(path: Path) -> Log:
    data, pcr7 = exchange.read_event_log(path)
    return _parse(path.name, data, pcr7)


def _filed_log(machines: Path, serial: str) -> Log:
    return _parse(f"machine {serial}", enroll.read_filed_log(machines, serial), None)


def _parse(name: str, data: bytes, pcr7: bytes | None) -> Log:
    try:
        events = eventlog.parse_event_log(data)
    except ValueError as error:
        raise Failure(f"{name} is no event log of a firmware ({error}): {_LOG}") from error
    seen = eventlog.replay(events, PLATFORM)
    if pcr7 not in (None, seen):
        raise Failure(f"the event log of {name} does not give the PCR 7 that it says: {_LOG}")
    return Log(name, events)


# --- What changes ------------------------------------------------------------------------------------


def _read_changes(host: Host, keyset: Keyset, files: Mapping[str, Path]) -> dict[tuple[str, str], Update]:
    found = {}
    for word, path in files.items():
        data, name = exchange.read_file(path, siglists.LIMIT), siglists.NAMES[word]
        found[name] = siglists.read_update(host, keyset, name, data, str(path))
    return found


def predict(
    events: Sequence[Event], changes: Mapping[tuple[str, str], Update], certificates: firmware.Certificates
) -> list[Event]:
    """Return the events of PCR 7 once these variables were changed, in their order.

    Raises `Failure` if the log does not have one of them.
    """
    made: list[Event] = []
    left, replaced = dict(changes), set[Event]()
    for event in events:
        variable = _variable_of(event)
        if event.pcr != PLATFORM:
            continue
        if variable and event.kind == EV_VARIABLE and variable.name in left:
            update = left.pop(variable.name)
            event = _event(event.kind, Variable(variable.name, _applied(update, variable)))
        elif variable and event.kind == EV_AUTHORITY and variable.name == DB and DB in changes:
            event = _event(event.kind, _authority(variable, changes[DB].content, certificates))
            # A firmware measures an entry of db the first time that it verifies something.
            if event in replaced:
                continue
            replaced.add(event)
        made.append(event)
    for _, name in left:
        raise Failure(f"the log measures no {name} that could change: {_LOG}")
    return made


def _applied(update: Update, variable: Variable) -> bytes:
    try:
        return update.applied(variable.content)
    except ValueError as error:
        raise Failure(f"{variable.name[1]} of the log cannot be read ({error}): {_LOG}") from error


def _variable_of(event: Event) -> Variable | None:
    """Return the variable of an event, None if it is of none, or says another thing than was measured."""
    if hashlib.sha256(event.data).digest() != event.digest:
        return None
    try:
        return eventlog.parse_variable(event.data)
    except ValueError:
        return None


def _event(kind: int, variable: Variable) -> Event:
    data = eventlog.encode_variable(variable)
    return Event(PLATFORM, kind, hashlib.sha256(data).digest(), data)


def _authority(before: Variable, db: bytes, certificates: firmware.Certificates) -> Variable:
    """Return by which entry of a new db the same loader is verified: by the one of the same certificate, or
    else, signed anew, by the uki key's. Its owner is part of what is measured.
    """
    entries = [each for each in drift.parse_entries(db) if each.kind == init.EFI_CERT_X509]
    uki = certificates.db[0].public_bytes(Encoding.DER)
    for wanted in (before.content[16:], uki):
        for entry in entries:
            if entry.data == wanted:
                return Variable(DB, uuid.UUID(entry.owner).bytes_le + entry.data)
    return before  # no such db is approved


def _check_not_revoked(dbx: bytes, certificates: firmware.Certificates) -> None:
    """Refuse a dbx that revokes the keyset itself: no machine would start."""
    entries = drift.parse_entries(dbx)
    for certificate in (certificates.kek, *certificates.db):
        der, signed = certificate.public_bytes(Encoding.DER), certificate.tbs_certificate_bytes
        own = {init.EFI_CERT_X509: der} | {
            kind: digest(signed).digest() for kind, digest in X509_HASHES.items()
        }
        if any(each.kind in own and each.data.startswith(own[each.kind]) for each in entries):
            subject = certificate.subject.rfc4514_string()
            raise Failure(
                f"{DBX[1]} would revoke the keyset's own {subject}: no machine would start with it"
            )
