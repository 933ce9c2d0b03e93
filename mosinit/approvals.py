"""Approvals: what an organisation signs so that a machine's TPM opens its secrets, and the values it signs.

The pcr key approves a UKI by its PCR 11, and the platform key a firmware by its PCR 7. PCR 11 is computed
from the UKI's file. A machine's PCR 7 is approved only if its firmware's event log gives that value, and
tells of nothing but Secure Boot with the certificates of the keyset.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mosinit import eventlog, firmware, images, init, pe
from mosinit.eventlog import (
    DB,
    DBX,
    EV_AUTHORITY,
    EV_SEPARATOR,
    EV_VARIABLE,
    KEK,
    PK,
    PLATFORM,
    SECURE_BOOT,
    SEPARATOR,
    Variable,
    encode_variable,
    parse_variable,
)
from mosinit.host import Failure
from mosinit.keys import Keyset

# systemd-stub 257 measures the sections of a UKI in this order, .pcrsig is none of them (systemd's
# src/fundamental/uki.h). `.profile` would select sections, so a UKI with it or another is not for us.
STUB_ORDER = (
    ".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey",
)  # fmt: skip
UNMEASURED = {".text", ".rodata", ".data", ".reloc", ".sdmagic", ".pcrsig"}
APPROVAL = ".pcrsig"

REQUIRED = (SECURE_BOOT, PK, KEK, DB, DBX)
# Not every firmware has or measures them. Who is in dbr may start a recovery, and dbt excuses from dbx.
OPTIONAL = {
    (init.EFI_GLOBAL, "AuditMode"): (b"\0",),
    (init.EFI_GLOBAL, "DeployedMode"): (b"\0", b"\1"),
    (init.EFI_IMAGE_SECURITY, "dbt"): (b"",),
    (init.EFI_IMAGE_SECURITY, "dbr"): (b"",),
}


def policy_keys(keyset: Keyset) -> init.PolicyKeys:
    """Return the public areas of the keyset's keys that approve."""
    pcr, platform = (keyset.public_path(role).read_bytes() for role in ("pcr", "platform"))
    return init.policy_keys(pcr, platform)


# --- PCR 11: which UKI runs, and how far --------------------------------------------------------------


def predict_pcr11(uki: bytes) -> bytes:
    """Return PCR 11 of a UKI at the phase enter-initrd.

    Raises `Failure` if the stub could measure it otherwise.
    """
    value = bytes(32)
    for word in (*_measured(uki), init.ENTER_INITRD):
        value = hashlib.sha256(value + hashlib.sha256(word).digest()).digest()
    return value


def _measured(uki: bytes) -> Iterator[bytes]:
    """Yield what the stub measures: each section's name with a zero byte, and the section once loaded."""
    try:
        image = pe.parse(uki)
    except ValueError as error:
        raise Failure(f"this is no UKI: {error}") from error
    names = [section.name for section in image.sections]
    odd = {*names} - {*STUB_ORDER, *UNMEASURED}
    odd |= {each.name for each in image.sections if names.count(each.name) > 1 or not each.memory}
    if odd or not {".linux", ".initrd", ".cmdline"} <= {*names}:
        raise Failure(f"cannot tell what systemd's stub measures of a UKI with {', '.join(names)}")
    for name in STUB_ORDER:
        for section in image.sections:
            if section.name == name:
                content = uki[section.offset : section.offset + section.size]
                yield name.encode() + b"\0"
                yield content.ljust(section.memory, b"\0")


def approve_uki(keyset: Keyset, uki: bytes, epoch: int) -> bytes:
    """Return the section .pcrsig with which a UKI of run mode opens its machine's secrets, before the fence.

    The section itself is not measured. Raises `Refused` if the bring-up could not read it.
    """
    pcr11, policies, signer = predict_pcr11(uki), policy_keys(keyset), keyset.signer("pcr")

    def sign(command: init.Cc) -> str:
        return signer.sign(policies.uki_policy(pcr11, epoch, command) + init.UKI_REF).hex()

    fields = {
        "schema": 1,
        "epoch": epoch,
        "unseal": sign(init.Cc.UNSEAL),
        "set_epoch": sign(init.Cc.NV_SETBITS),
    }
    section = images.encode(fields)
    init.parse_uki_approval(section)
    return section


# --- PCR 7: whom the firmware trusts ------------------------------------------------------------------


def platform_events(
    certificates: firmware.Certificates, dbx: bytes = b"", loader: x509.Certificate | None = None
) -> tuple[eventlog.Event, ...]:
    """Return what a firmware measures into PCR 7 that was enrolled with these certificates by us.

    `loader` is the certificate that verified what was started, the first of db if None.
    """
    entry = (loader or certificates.db[0]).public_bytes(Encoding.DER)
    lists = [
        b"".join(firmware.signature_list(each) for each in group)
        for group in ((certificates.pk,), (certificates.kek,), certificates.db)
    ]
    variables = zip(REQUIRED, (b"\1", *lists, dbx), strict=True)
    events = [(EV_VARIABLE, encode_variable(Variable(name, content))) for name, content in variables]
    authority = Variable(DB, uuid.UUID(firmware.OWNER).bytes_le + entry)
    events += [(EV_SEPARATOR, SEPARATOR), (EV_AUTHORITY, encode_variable(authority))]
    return tuple(
        eventlog.Event(PLATFORM, kind, hashlib.sha256(data).digest(), data) for kind, data in events
    )


def predict_pcr7(
    certificates: firmware.Certificates, dbx: bytes = b"", loader: x509.Certificate | None = None
) -> bytes:
    """Return PCR 7 of such a firmware. Others may measure more, or name another owner: read their log."""
    return eventlog.replay(platform_events(certificates, dbx, loader), PLATFORM)


@dataclass(frozen=True)
class Platform:
    """A firmware that trusts exactly the keyset: its PCR 7, and what else it measured there."""

    pcr7: bytes
    dbx: bytes
    options: tuple[str, ...]

    def describe(self) -> dict[str, object]:
        """Return it as plain data."""
        return {
            "pcr7": self.pcr7.hex(),
            "dbx_bytes": len(self.dbx),
            "dbx_sha256": hashlib.sha256(self.dbx).hexdigest(),
            "options": list(self.options),
        }


_NEW_LOG = "restart the machine and make a new request, with its own log"
_ENROLL = (
    "switch Secure Boot on and let its firmware trust exactly this keyset (`Enroll Secure Boot keys` in the "
    "medium's menu), restart it and make a new request"
)


def read_platform_log(log: bytes, pcr7: bytes, certificates: firmware.Certificates) -> Platform:
    """Return what the event log of a machine says of its PCR 7, if that may be approved.

    Raises `Failure` that names the event unless Secure Boot is on, PK, KEK and db hold exactly these
    certificates, and nothing was started but by the first of db; the layer key's signatures start nothing.
    """
    try:
        events = eventlog.parse_event_log(log)
        seen = eventlog.replay(events, PLATFORM)
    except ValueError as error:
        raise Failure(f"the machine's event log cannot be read: {error}; {_NEW_LOG}") from error
    if seen != pcr7:
        said = f"gives PCR 7 {seen.hex()}, its TPM has {pcr7.hex()}"
        raise Failure(f"the machine's event log {said}: {_NEW_LOG}")
    return check_platform(events, certificates, _ENROLL)


def check_platform(
    events: Sequence[eventlog.Event], certificates: firmware.Certificates, remedy: str
) -> Platform:
    """Return what these events make of PCR 7, if it may be approved: see `read_platform_log`."""
    found: dict[tuple[str, str], bytes] = {}
    begun = started = False
    for number, event in enumerate(events):
        if event.pcr != PLATFORM:
            continue
        try:
            if hashlib.sha256(event.data).digest() != event.digest:
                raise ValueError("what was measured is something else")
            if event.kind == EV_SEPARATOR and event.data == SEPARATOR and not begun:
                begun = True
            elif event.kind == EV_VARIABLE and not begun:
                _take_variable(parse_variable(event.data), found, certificates)
            elif event.kind == EV_AUTHORITY and begun:
                _check_authority(parse_variable(event.data), certificates)
                started = True
            else:
                raise ValueError("nothing of this kind belongs there")
        except ValueError as error:
            where = f"event {number} of PCR 7 in the machine's event log, {eventlog.name(event)}"
            raise Failure(f"{where}: {error}; {remedy}") from error
    missing = [name[1] for name in REQUIRED if name not in found]
    missing += [word for word, there in (("separator", begun), ("authority", started)) if not there]
    if missing:
        raise Failure(f"the machine's event log has no {missing[0]} for PCR 7: {remedy}")
    pcr7 = eventlog.replay(events, PLATFORM)
    return Platform(pcr7, found[DBX], tuple(name[1] for name in found if name in OPTIONAL))


def _take_variable(
    variable: Variable, found: dict[tuple[str, str], bytes], certificates: firmware.Certificates
) -> None:
    """Add a variable that is as it must be to those found. Raises ValueError for others."""
    name, content = variable
    if name in found:
        raise ValueError("it was measured twice")
    keys = {PK: (certificates.pk,), KEK: (certificates.kek,), DB: certificates.db}
    if name in keys:
        seen = sorted(init.parse_signature_database(content))
        if seen != sorted(_fingerprint(each.public_bytes(Encoding.DER)) for each in keys[name]):
            raise ValueError(f"it holds other certificates than the keyset's: {', '.join(seen) or 'none'}")
    elif name == SECURE_BOOT or name in OPTIONAL:
        if content not in OPTIONAL.get(name, (b"\1",)):
            raise ValueError(f"its value is {content.hex()[:80] or 'empty'}")
    elif name == DBX:
        init.parse_signature_database(content)
    else:
        raise ValueError("it is none that we know")
    found[name] = content


def _check_authority(variable: Variable, certificates: firmware.Certificates) -> None:
    """See that what was started was verified by the uki certificate; ValueError if by something else."""
    uki, *others = (_fingerprint(each.public_bytes(Encoding.DER)) for each in certificates.db)
    if variable.name != DB:
        raise ValueError(f"what was started was verified by {variable.name[1]}, not by db")
    seen = _fingerprint(variable.content[16:])  # behind the entry's owner
    if seen != uki:
        whose = "the layer key" if seen in others else f"a foreign one, {seen}"
        raise ValueError(f"what was started was verified by {whose}, not by the uki key")


def _fingerprint(der: bytes) -> str:
    return hashlib.sha256(der).hexdigest()


def approve_platform(keyset: Keyset, pcr7: bytes, epoch: int) -> init.PlatformApproval:
    """Return the platform key's approval by which a machine with this PCR 7 may open its secrets.

    It ends when the machine's epoch is raised above `epoch`: that is how a loader, or a key in db, that is
    found to be bad is revoked. Whether it may be approved, `read_platform_log` and `predict_pcr7` say.
    """
    if len(pcr7) != 32 or pcr7 in (bytes(32), b"\xff" * 32):
        raise Failure(f"{pcr7.hex()} is no PCR 7 of a machine with firmware: its SHA-256 bank is not in use")
    policy = policy_keys(keyset).platform_policy(pcr7, epoch)
    return init.PlatformApproval(epoch, keyset.signer("platform").sign(policy + init.PLATFORM_REF))
