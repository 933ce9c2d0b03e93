"""`recover --reseal`: firmware, its keys or the boot loader changed without approval, and the TPM, otherwise
as it was, keeps the disk shut. An approval of what PCR 7 is now opens it.

Neither the recovery key nor any other secret is needed: approvals are public, and signed by the platform key
that the signed initrd knows. Without one, what the organisation needs to make it is written down.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from mosinit import exchange, explain, init, install, layout, luks, machinedisk, provision, records, reseal
from mosinit.damage import Recoverer
from mosinit.host import Failure, Host

_MEND = "recover with the recovery key first (`mosinit recover --key FILE`)"
_OTHER_TPM = (
    "this is not the TPM that the disk is sealed to: provision the machine (`mosinit provision`), then "
    "recover with --dir and the recovery key"
)


@dataclass(frozen=True)
class Options:
    """Which disk, and approvals or where the event log goes, if there is none."""

    disk: Path | None = None
    approvals: Path | None = None
    out: Path = Path("event-log")
    left: Path = install.LEFT
    event_log: Path = provision.EVENT_LOG


@dataclass(frozen=True)
class Seen:
    """What was found: the disk, its config volume's header, PCR 7, and why the TPM keeps it shut, if so."""

    planned: layout.Plan
    device: Path
    header: init.LuksHeader
    policy: init.Policy
    pcr7: str
    shut: init.Refused | None


def look(host: Recoverer, options: Options) -> Seen:
    """See that the disk is this TPM's, and whether it would open. Raises `Refused`, `Failure`."""
    policy = install.policy_of_live(options.left)
    planned = machinedisk.find_disk(host, options.disk)
    device = layout.device(planned, planned.named("config"))
    with explain.advising(dict.fromkeys(("LUKS-HEADER", "LUKS-TOKEN"), _MEND)):
        header = luks.read_header(host, device, "config")
    tokens = header.tokens
    assert tokens  # of a config volume
    record = init.verify_record(tokens.record, policy.organisation["sudi-ca.pem"], policy.product)
    order = (tokens.order_statement, tokens.order_signature, tokens.order_certificate)
    lowest = init.verify_epoch_order(*order, policy)
    machine = host.machine()
    others = ("TPM-CLEARED", "TPM-SRK", "TPM-IDENTITY", "TPM-STATE", "TPM-INDEX")
    with explain.advising(dict.fromkeys(others, _OTHER_TPM)):
        init.check_tpm(machine, record, policy.epoch)
    with init.asking_tpm("PCR 7"):
        pcr7 = init.read_pcr(machine, init.PLATFORM_STATE[0]).hex()
    return Seen(planned, device, header, policy, pcr7, shut(machine, tokens, lowest, policy))


def shut(machine: init.Machine, tokens: init.Tokens, order: int, policy: init.Policy) -> init.Refused | None:
    """Return why the TPM would keep a volume with these tokens shut, as the bring-up finds it."""
    try:
        # The machine's own UKI may be of an earlier epoch than the medium.
        init.find_approval(machine, tokens, min(order, policy.epoch))
        pcr7 = init.read_pcr(machine, init.PLATFORM_STATE[0]).hex()
        platform, keys = policy.organisation["platform.pub"], reseal.keys_of(policy)
        # The TPM looks at the signature as well.
        reseal.verify_approval(platform, keys, pcr7, tokens.approvals[pcr7])
    except init.Refused as refused:
        return refused
    return None


def lacks_approval(seen: Seen) -> bool:
    """Say whether an approval of what PCR 7 is now is needed, for the disk or for the medium's epoch."""
    tokens = seen.header.tokens
    assert tokens  # of a config volume
    return seen.shut is not None or tokens.approvals[seen.pcr7].epoch < seen.policy.epoch


def serial(seen: Seen) -> str:
    """Return the serial under which the organisation files the machine that the disk is of."""
    tokens = seen.header.tokens
    assert tokens  # of a config volume
    key = x509.load_der_x509_certificate(tokens.record).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)  # the SUDI CA signs no others
    return records.serial_of(key)


def describe(seen: Seen) -> dict[str, object]:
    """Return what was found as plain data."""
    disk = seen.planned.disk
    return {
        "disk": str(disk.path),
        "model": disk.model,
        "serial": disk.serial,
        "pcr7": seen.pcr7,
        "found": [f"{seen.shut.check}: {seen.shut}"] if seen.shut else [],
    }


def run(host: Recoverer, options: Options, *, plan: bool = False) -> dict[str, object]:
    """Lay an approval of what PCR 7 is now into config's header; `plan` writes nothing."""
    with install.alone(host):
        return reseal_disk(host, options, plan=plan)


def reseal_disk(host: Recoverer, options: Options, *, plan: bool = False) -> dict[str, object]:
    """The same, for who is `alone`."""
    seen = look(host, options)
    tokens = seen.header.tokens
    assert tokens  # of a config volume
    if options.approvals is None:
        return nothing(seen) if seen.shut is None else ask(host, options, seen, plan=plan)
    found = reseal.read_approvals(options.approvals, seen.policy)
    fresh = {each.pcr7.hex(): init.PlatformApproval(each.epoch, each.signature) for each in found.approvals}
    merged = reseal.merge(tokens, seen.policy, fresh, (seen.pcr7,))
    order = _order(tokens, seen.policy)
    if still := shut(host.machine(), tokens._replace(approvals=merged), order, seen.policy):
        what = f"these approvals are for another state: have this one approved, PCR 7 {seen.pcr7}"
        raise explain.advised(still, f"{what} (`mosinit recover --reseal` writes its event log)")
    # One that holds for longer is laid, too: a system of a later epoch may wait for it (TPM-APPROVAL).
    if seen.shut is None and merged.get(seen.pcr7) == tokens.approvals[seen.pcr7]:
        return nothing(seen)
    done = {**describe(seen), "will do": [f"lay the approval of PCR 7 {seen.pcr7} into config's header"]}
    if plan:
        return done
    reseal.lay_approvals(host, seen.device, seen.header, seen.policy, found, (seen.pcr7,))
    now = look(host, options)
    if now.shut:
        raise now.shut
    return {**done, "next": "remove the medium and restart"}


def nothing(seen: Seen) -> dict[str, object]:
    """Say that the disk opens, and which systems' disk: one of a later epoch does not open anything."""
    tokens = seen.header.tokens
    assert tokens  # of a config volume
    epoch = tokens.approvals[seen.pcr7].epoch
    word = f"nothing: the TPM opens the disk in this firmware, for systems up to epoch {epoch}"
    if epoch < seen.policy.epoch:
        word += f"; for the medium's epoch {seen.policy.epoch} it needs another approval (`mosinit approve`)"
    return {**describe(seen), "will do": [], "next": word}


def _order(tokens: init.Tokens, policy: init.Policy) -> int:
    parts = (tokens.order_statement, tokens.order_signature, tokens.order_certificate)
    return init.verify_epoch_order(*parts, policy)


def ask(host: Host, options: Options, seen: Seen, *, plan: bool) -> dict[str, object]:
    """Write the event log for the organisation, and say what to do with it."""
    log = provision.read_event_log(options.event_log)
    steps = (
        f"where the keyset is: `mosinit approve {options.out.name} --machine {serial(seen)} --keys DIR "
        "--out approvals.json`, once you know why PCR 7 changed; then here `mosinit recover --reseal "
        "--approvals approvals.json`"
    )
    done = {**describe(seen), "will do": [f"write the event log to {options.out}"], "left": [steps]}
    if not plan:
        if options.out.exists() and exchange.read_file(options.out, exchange.LOG_BYTES) != log:
            raise Failure(f"{options.out} is there already: name another by --out")
        with host.replacing(options.out) as fresh:
            fresh.write_bytes(log)
        done["event log"] = str(options.out)
    return {**done, "status": 1}
