"""Enrolling, on the organisation's side: a machine's request is checked, and answered with everything that
the machine needs to open its disk by itself.

    MACHINES/SERIAL/machine.json     serial, product, storage key, machine record and PCR 7 of the machine
    MACHINES/SERIAL/recovery.cms     its recovery record, as encrypted as it came
    MACHINES/SERIAL/certificate.pem  the last SUDI certificate issued
    MACHINES/SERIAL/eventlog.bin     its firmware's event log, for `mosinit approve`

A record that a filed machine got is the only one it gets, and a storage key belongs to one machine: another
is refused, unless a person says that this serial is enrolled again. What was filed is kept then, in
SERIAL-1, SERIAL-2 and so on.

What a request says of its TPM nobody attests: whoever can make requests in a machine's name can have one
answered. Enroll what comes from machines that you hold.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mosinit import drift, eventlog, exchange, explain, images, init, records
from mosinit.host import Failure, Host, Usage
from mosinit.keys import Keyset, check_out, choose_epoch

_AGAIN = "make a new request on the machine"
_EXPORT = f"give the machine what `mosinit keys export` writes of this keyset, and {_AGAIN}"
# What the table says is for who stands before a machine.
_REMEDIES = {
    "RECORD-PRODUCT": f"name the keyset of the request's product by --keys, or {_EXPORT}",
    "TPM-SEAL": _EXPORT,
    "TPM-INDEX": _EXPORT,
}


class Approvals(NamedTuple):
    """Who decides about a machine's firmware, and who signs that."""

    # Event log and PCR 7; returns what is worth knowing of it, raises Failure if it is not to be approved.
    read_log: Callable[[Keyset, bytes, bytes], dict[str, object]]
    approve: Callable[[Keyset, bytes, int], init.PlatformApproval]


@dataclass(frozen=True)
class Verified:
    """A request that contradicts neither itself nor this organisation: only `verify_request` makes one."""

    serial: str
    key: ec.EllipticCurvePublicKey
    record: bytes
    digest: bytes
    storage_key: bytes  # name
    pcr7: bytes
    epoch: int
    recovery: bytes
    event_log: bytes


def enroll(
    host: Host,
    request: Path,
    keyset: Keyset,
    out: Path,
    machines: Path | None = None,
    epoch: int | None = None,
    approvals: Approvals | None = None,
    again: str | None = None,
) -> dict[str, object]:
    """Check a request, file its recovery record, and write the answer; nothing if the request is not right.

    The recovery record is filed first: no machine is closed whose passwords nobody has.
    """
    machines = machines or keyset.folder / "machines"
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise Usage(f"{out} cannot be written: name a file for the answer, in a folder that exists")
    check_out(out, keyset.folder, machines)
    untrusted = exchange.parse_request(exchange.read_file(request, exchange.DOCUMENT_BYTES), request.name)
    approvals = approvals or platform_approvals()
    epoch = choose_epoch(epoch, keyset.epoch)
    with explain.advising(_REMEDIES):
        wanted = verify_request(untrusted, keyset, epoch)
    _check_recovery(keyset, wanted)
    platform = approvals.read_log(keyset, untrusted.event_log, wanted.pcr7)
    known = read_machines(machines)
    earlier = check_filed(known, wanted, again)
    changes = _changes(machines, wanted, earlier)
    certificate = records.issue(keyset, wanted.key, wanted.record, wanted.digest)
    init.verify_record(certificate, keyset.certificate_path("sudi-ca").read_bytes(), keyset.product)
    answer = exchange.Answer(
        certificate,
        {wanted.pcr7.hex(): approvals.approve(keyset, wanted.pcr7, epoch)},
        sign_order(keyset, wanted.epoch),
    )
    folder = _file(host, machines, keyset.product, wanted, certificate, again)
    with host.replacing(out) as fresh:
        fresh.write_bytes(exchange.encode_answer(answer))
    return {
        "serial": wanted.serial, "product": keyset.product, "epoch": wanted.epoch,
        "storage_key": wanted.storage_key.hex(), "pcr7": wanted.pcr7.hex(), "platform": platform,
        "enrolled_before": earlier, "changes": changes, "answer": out, "machine": folder,
    }  # fmt: skip


def notes(done: Mapping[str, object], again: str | None = None) -> list[str]:
    """Say in words what `enroll` did, and what was filed of the machine already."""
    serial, earlier = done["serial"], done["enrolled_before"]
    assert isinstance(earlier, list)  # of `enroll`
    lines = [f"machine {serial} is enrolled: its firmware has Secure Boot on, with exactly this keyset"]
    lines += [f"this TPM was enrolled before, as {known}" for known in earlier if known != serial]
    if serial in earlier and serial != again:
        lines += [f"machine {serial} was filed already, with this very record: it is answered once more"]
    if again:
        lines += [f"enrolled again in place of {again}, as you said: its record of before holds no more"]
    return lines


def _changes(machines: Path, wanted: Verified, earlier: list[str]) -> list[str]:
    """Return what differs in PCR 7 from the logs that are filed of this machine: who asks once more may have
    put back an older dbx, which is approved like any.
    """
    found: dict[str, None] = {}
    for serial in earlier:
        path = machines / serial / "eventlog.bin"
        if not path.exists():
            continue
        try:
            logs = exchange.read_file(path, exchange.LOG_BYTES), wanted.event_log
            before, now = (eventlog.parse_event_log(log) for log in logs)
        except ValueError as error:
            raise Failure(f"cannot read {path} ({error}): restore it from a backup") from error
        found |= dict.fromkeys(each.what for each in drift.compare(before, now))
    return list(found)


def platform_approvals() -> Approvals:
    """Return the way in which this organisation's platform key approves PCR 7 values."""
    from mosinit import approvals, firmware

    def read_log(keyset: Keyset, log: bytes, pcr7: bytes) -> dict[str, object]:
        certificates = firmware.certificates_of_keyset(keyset.folder)
        seen = approvals.read_platform_log(log, pcr7, certificates).describe()
        return {name: value for name, value in seen.items() if name != "pcr7"}

    return Approvals(read_log, approvals.approve_platform)


def sign_order(keyset: Keyset, epoch: int) -> exchange.Order:
    """Return the product's signed statement that everything below `epoch` is unsafe."""
    statement = images.encode(init.epoch_statement(keyset.product, epoch))
    signature = keyset.signer("product").sign(statement)
    return exchange.Order(statement, signature, keyset.certificate_path("product").read_bytes())


# --- What a request must be --------------------------------------------------------------------------


def verify_request(untrusted: exchange.Request, keyset: Keyset, epoch: int) -> Verified:
    """Return the request if its key signed it, and it shows what this organisation's machines make."""
    if untrusted.product != keyset.product:
        raise init.Refused("RECORD-PRODUCT", expected=keyset.product, seen=untrusted.product)
    if untrusted.epoch != epoch:
        later = f"if the machine is to be of that epoch, say --epoch {untrusted.epoch}"
        refused = init.Refused("EPOCH", expected=f"epoch {epoch} (--epoch)", seen=f"epoch {untrusted.epoch}")
        raise explain.advised(refused, later if untrusted.epoch > epoch else _EXPORT)
    key, record, digest = _verify_csr(untrusted.csr)
    policy = init.policy_keys(*(keyset.public_path(role).read_bytes() for role in ("pcr", "platform")))
    try:
        records.parse_point(untrusted.storage_key, init.SRK_HEAD)
        sudi = records.parse_point(untrusted.sudi, records.SUDI_HEAD)
    except ValueError as error:
        raise Failure(
            f"the request shows no storage root key and SUDI key of their templates ({error}): {_AGAIN}"
        ) from error
    head = policy.sealed_head
    if not untrusted.sealed.startswith(head) or len(untrusted.sealed) != len(head) + 32:
        raise init.Refused(
            "TPM-SEAL",
            expected="a secret under this organisation's policy",
            seen=untrusted.sealed.hex()[:200],
        )
    if untrusted.epoch_index != policy.epoch_index:
        raise init.Refused(
            "TPM-INDEX", expected=policy.epoch_index.hex(), seen=untrusted.epoch_index.hex()[:200]
        )
    proof = record[-init.RECORD.size :][17:49]
    names = init.tpm_name(untrusted.storage_key), init.tpm_name(untrusted.epoch_index)
    if (record, key) != (records.encode_record(keyset.product, proof, *names), sudi):
        raise Failure(f"the certificate request is for other keys than come with it: {_AGAIN}")
    if digest != records.request_digest(untrusted, keyset.certificate):
        raise Failure(
            "the request is not the one that its machine signed, or the machine goes by other certificates "
            f"than this keyset's: export the keyset again, and {_AGAIN}"
        )
    serial = records.serial_of(key)
    rest = untrusted.pcr7, epoch, untrusted.recovery, untrusted.event_log
    return Verified(serial, key, record, digest, names[0], *rest)


def _verify_csr(untrusted: bytes) -> tuple[ec.EllipticCurvePublicKey, bytes, bytes]:
    """Return key, record and request digest of a certificate request that its own key signed."""
    try:
        request = x509.load_der_x509_csr(untrusted)
        extensions = list(request.extensions)
        key, signed = request.public_key(), request.is_signature_valid
        if [extension.oid for extension in extensions] != [records.RECORD_OID, records.REQUEST_OID]:
            raise ValueError("other extensions than a machine record and the request's digest")
        record, digest = (cast(x509.UnrecognizedExtension, each.value).value for each in extensions)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError(f"a key of the kind {type(key).__name__}")
    except Exception as error:  # of a spoiled request the parser raises more kinds than it names
        seen = f"{type(error).__name__}: {error}"[:300]
        raise Failure(f"the certificate request is none of a machine's ({seen}): {_AGAIN}") from error
    if not signed or digest[:2] != records.encode_digest(b""):
        raise Failure(f"the certificate request is not signed by its own key: {_AGAIN}")
    return key, record, digest[2:]


def _check_recovery(keyset: Keyset, wanted: Verified) -> None:
    """See that the recovery record opens and is this machine's: later would be too late."""
    recovery = open_cms(keyset, wanted.recovery, "the recovery record of the request")
    seen = (recovery.product, recovery.serial, recovery.storage_key)
    if seen != (keyset.product, wanted.serial, wanted.storage_key):
        raise Failure(
            f"the request of machine {wanted.serial} comes with the recovery record of machine "
            f"{recovery.serial}: {_AGAIN}"
        )


# --- The organisation's file of machines -------------------------------------------------------------


class Filed(NamedTuple):
    """What is filed of a machine: its serial, the name of its storage key, its record."""

    serial: str
    storage_key: bytes
    record: bytes


def read_machines(machines: Path) -> list[Filed]:
    """Return all that is filed, that of before too."""
    return [_read_filed(path.parent) for path in sorted(machines.glob("*/machine.json"))]


def _read_filed(folder: Path) -> Filed:
    path = folder / "machine.json"
    try:
        words = init.parse_json(path.read_bytes(), "")
        if not isinstance(words, dict) or words["serial"] != folder.name.partition("-")[0]:
            raise ValueError("another machine than its folder's name says")
        return Filed(words["serial"], *(bytes.fromhex(words[name]) for name in Filed._fields[1:]))
    except FileNotFoundError as error:
        raise Failure(
            f"no machine {folder.name} is filed in {folder.parent}: see the folders there"
        ) from error
    except (init.Refused, OSError, ValueError, KeyError, TypeError) as error:
        raise Failure(f"cannot read {path}: restore it from a backup") from error


def read_filed_log(machines: Path, serial: str) -> bytes:
    """Return the event log with which a machine was enrolled."""
    if not serial.isalnum():
        raise Usage(f"{serial!r} is no serial: name a folder of the machines")
    _read_filed(machines / serial)
    try:
        return exchange.read_file(machines / serial / "eventlog.bin", exchange.LOG_BYTES)
    except FileNotFoundError as error:
        raise Failure(f"no event log of machine {serial} is filed: name a file with its log") from error


def check_filed(known: list[Filed], wanted: Verified, again: str | None) -> list[str]:
    """Return the serials under which a TPM was enrolled before, if there is no other record of it.

    Whoever is root on a machine can make another request in its name, for a secret of their own: the first
    record is the machine's. Only a person can know that another is.
    """
    if again and again not in {machine.serial for machine in known}:
        raise Usage(f"no machine {again} is filed: --again names one that is enrolled again")
    same = [machine for machine in known if machine.storage_key == wanted.storage_key]
    others = {machine.serial for machine in same if machine.serial != wanted.serial}
    others |= {m.serial for m in known if m.serial == wanted.serial and m.record != wanted.record}
    for serial in sorted(others - {again}):
        what = "this TPM is filed as" if serial != wanted.serial else "there is another record of"
        raise Failure(
            f"{what} machine {serial}: find out who asks, and why; if it is right, say --again {serial}"
        )
    return sorted({machine.serial for machine in same} | (others & {again or ""}))


def _file(
    host: Host, machines: Path, product: str, wanted: Verified, certificate: bytes, again: str | None
) -> Path:
    """File a machine; its folder appears complete or not at all, and nothing that was filed is lost."""
    folder = machines / wanted.serial
    pem = x509.load_der_x509_certificate(certificate).public_bytes(serialization.Encoding.PEM)
    if os.path.lexists(folder):
        if _read_filed(folder).record == wanted.record:
            if (folder / "recovery.cms").read_bytes() != wanted.recovery:
                raise Failure(
                    f"{folder} has another recovery record of the same machine: move that folder away if it "
                    "is of no use any more"
                )
            _write(host, folder / "certificate.pem", pem)
            _write(host, folder / "eventlog.bin", wanted.event_log)
            return folder
        assert again == wanted.serial  # `check_filed` saw it
    machines.mkdir(mode=0o700, parents=True, exist_ok=True)
    words = {
        "schema": 1, "serial": wanted.serial, "product": product, "pcr7": wanted.pcr7.hex(),
        "storage_key": wanted.storage_key.hex(), "record": wanted.record.hex(),
    }  # fmt: skip
    with host.scratch(near=folder) as scratch:
        fresh = scratch / "machine"
        fresh.mkdir(mode=0o700)
        _write(host, fresh / "machine.json", (json.dumps(words, indent=1) + "\n").encode())
        _write(host, fresh / "recovery.cms", wanted.recovery)
        _write(host, fresh / "certificate.pem", pem)
        _write(host, fresh / "eventlog.bin", wanted.event_log)
        if os.path.lexists(folder):
            folder.rename(_free_name(folder))
        fresh.rename(folder)
        host.sync_file(machines)
    return folder


def _free_name(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def _write(host: Host, path: Path, content: bytes) -> None:
    with host.replacing(path, mode=0o600) as fresh:
        fresh.write_bytes(content)


# --- Recovery, and consent to provision again --------------------------------------------------------


def open_recovery(path: Path, keyset: Keyset) -> exchange.Recovery:
    """Decrypt a filed recovery record. Nothing else shows what is in one."""
    if not path.is_file():
        raise Failure(f"{path} is no file: {_name_record(keyset)}")
    return open_cms(keyset, exchange.read_file(path, 16384), str(path))


def save_recovery(
    host: Host, path: Path, keyset: Keyset, out: Path, machines: Path | None = None
) -> dict[str, object]:
    """Decrypt a filed recovery record into a file that nobody else can read."""
    check_out(out, keyset.folder, machines or keyset.folder / "machines")
    recovery = open_recovery(path, keyset)
    _write(host, out, exchange.encode_recovery(recovery))
    return {"recovery": out, "serial": recovery.serial}


def open_cms(keyset: Keyset, untrusted: bytes, name: str) -> exchange.Recovery:
    """Decrypt a recovery record (CMS, DER) by the keyset's recovery key."""
    try:
        clear = keyset.signer("recovery").open_cms(untrusted)
    except Failure as error:
        raise Failure(
            f"cannot open {name}: it is no recovery record for this keyset's recovery key: "
            f"{_name_record(keyset)}"
        ) from error
    return exchange.parse_recovery(clear, name)


def _name_record(keyset: Keyset) -> str:
    return f"name {keyset.folder}/machines/SERIAL/recovery.cms, and the keyset that enrolled the machine"


def consent(
    host: Host, serial: str, keyset: Keyset, out: Path, machines: Path | None = None
) -> dict[str, object]:
    """Sign that a filed machine may be provisioned again."""
    if not serial.isalnum():
        raise Usage(f"{serial!r} is no serial: name a folder of the machines")
    machines = machines or keyset.folder / "machines"
    check_out(out, keyset.folder, machines)
    storage_key = _read_filed(machines / serial).storage_key
    statement = exchange.consent_statement(keyset.product, storage_key)
    signed = exchange.Consent(statement, keyset.signer("sudi-ca").sign(statement))
    with host.replacing(out) as fresh:
        fresh.write_bytes(exchange.encode_consent(signed))
    return {"consent": out, "serial": serial, "storage_key": storage_key.hex()}
