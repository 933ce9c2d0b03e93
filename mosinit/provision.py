"""Provisioning, on the machine's side: identity, epoch and seal in its TPM; a request out, the answer in.

    STATE/request.json       what goes to the organisation
    STATE/machine.json       public: product, epoch, public areas, PCR 7
    STATE/organisation/      the public parts of the keyset
    STATE/sudi.key sudi.auth the SUDI key as only this TPM can load it (TSS2 PEM), and its password
    STATE/config.key         secret of the config volume
    STATE/recovery.key       recovery key of the disk
    STATE/seal.json sudi.pem what `install` needs, once the answer was taken
    STATE/closing            passwords are being set
    STATE/auths.json         passwords of the TPM; gone when it is closed

The TPM gets its first password when all of this is durable. Before that every step can be done again; after
it, a second run goes on from what the TPM says is done. STATE may be lost with the power, and with it the
passwords: so an installation takes the answer, makes the disk, and closes the TPM last.
"""

from __future__ import annotations

import hmac
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from mosinit import eventlog, exchange, explain, init, keys, records, reseal
from mosinit.host import Failure, Host, Usage, closed_environment
from mosinit.tpm import DEVICE, Tpm, WrongAuth, open_tpm

EVENT_LOG = Path("/sys/kernel/security/tpm0/binary_bios_measurements")
FLAGS = {
    init.Permanent.OWNER_AUTH: "owner password",
    init.Permanent.ENDORSEMENT_AUTH: "endorsement password",
    init.Permanent.LOCKOUT_AUTH: "lockout password",
    init.Permanent.CLEAR_DISABLED: "TPM2_Clear switched off",
}
# TPM2_Clear switched off alone is harmless: a TPM that is provisioned once more has it so from before.
PASSWORDS = init.PROVISIONED & ~init.Permanent.CLEAR_DISABLED

_CLEAR = "clear the TPM in the firmware's setup"
_AGAIN = (
    "let the organisation consent (`mosinit enroll --consent SERIAL`, `--open-recovery`) and say --again "
    f"CONSENT --auths FILE, or {_CLEAR}"
)
_CONSENT = (
    "name what `mosinit enroll --consent SERIAL` and `--open-recovery` wrote of this machine's last "
    "provisioning, by the keyset that --organisation came from"
)
# Without passwords nobody can have set one aside but whoever made it: no machine of ours depends on it.
_FOREIGN_INDEX = (
    "it is of another organisation's request that was not finished, or of another program: remove it "
    f"(`tpm2_nvundefine -C o {init.EPOCH_INDEX:#x}`), or {_CLEAR}"
)


@dataclass(frozen=True)
class Options:
    """What a request is made from."""

    organisation: Path
    folder: Path
    epoch: int | None = None  # the organisation's
    event_log: Path = EVENT_LOG
    tcti: str = DEVICE
    consent: Path | None = None
    auths: Path | None = None


class Made(NamedTuple):
    """What the TPM made for one request."""

    storage_key: bytes
    epoch_index: bytes
    seal: exchange.Seal
    sudi: bytes
    sudi_pem: bytes
    pcr7: bytes


class Secrets(NamedTuple):
    """What nobody but this machine, and the recovery record, may know; and what makes its storage key one of
    its own, which is no secret.
    """

    config: bytes
    sudi_auth: bytes
    recovery_key: str
    auths: Mapping[str, bytes]
    unique: bytes


class State(NamedTuple):
    """What a request left for the answer. Written by us, mode 0600."""

    epoch: int
    storage_key: bytes
    epoch_index: bytes
    sudi: bytes
    request: bytes  # its digest
    seal: exchange.Seal


# --- Step 1: the request -----------------------------------------------------------------------------


def request(host: Host, options: Options) -> dict[str, object]:
    """Make identity, epoch index and seal in the TPM, and the request; STATE appears complete or not at all.

    Refuses before it writes anything to a TPM that is provisioned, locked out or holds what is not ours.
    """
    if (options.consent is None) != (options.auths is None):
        raise Usage("--again and --auths go together: the consent and the opened recovery record")
    organisation = keys.open_organisation(options.organisation)
    policy, epoch = policy_keys(organisation), keys.choose_epoch(options.epoch, organisation.epoch)
    log = read_event_log(options.event_log)
    if os.path.lexists(options.folder):
        return _made_before(options, organisation, policy, log)
    options.folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    secrets = make_secrets(host)
    with open_tpm(options.tcti) as machine:
        if options.consent and options.auths:
            # What can be refused is refused while the machine of before still opens.
            _check_bank(machine)
            _check_event_log(machine, log, options.event_log)
            start_over(machine, organisation, policy, options)
        inspect(machine, policy, epoch)
        _check_event_log(machine, log, options.event_log)
        _remove_planted(host, machine)
        _warn_of_epoch(host, machine, policy, epoch, organisation.epoch)
        made = make_objects(machine, policy, epoch, secrets)
    with host.scratch(near=options.folder) as scratch:
        fresh = scratch / "state"
        _write_state(host, fresh, organisation, made, secrets)
        unsigned = exchange.Request(
            organisation.product, epoch, b"", made.storage_key, made.epoch_index, made.seal.public,
            made.sudi, made.pcr7, log, encrypt_recovery(host, fresh, organisation, made, secrets),
        )  # fmt: skip
        digest = records.request_digest(unsigned, organisation.certificate)
        csr = make_csr(host, fresh, options.tcti, made, organisation.product, secrets.config, digest)
        sent = unsigned._replace(csr=csr)
        _write(host, fresh / "machine.json", _encode_state(made, epoch, digest))
        _write(host, fresh / "request.json", exchange.encode_request(sent))
        fresh.rename(options.folder)
        host.sync_file(options.folder.absolute().parent)
    return _asked(options, organisation, epoch, made.sudi)


def _asked(options: Options, organisation: keys.Organisation, epoch: int, sudi: bytes) -> dict[str, object]:
    folder, tpm = options.folder, "" if options.tcti == DEVICE else f" --tpm {options.tcti}"
    serial = records.serial_of(records.parse_point(sudi, records.SUDI_HEAD))
    later = f" --epoch {epoch}" if epoch > organisation.epoch else ""
    enroll = f"mosinit enroll request.json --keys KEYSET{later} --out answer.json"
    take = f"mosinit provision --dir {folder} --answer answer.json{tpm}"
    return {
        "request": folder / "request.json",
        "product": organisation.product,
        "serial": serial,
        "next": f"take {folder / 'request.json'} to where the keyset is, there `{enroll}`, then here "
        f"`{take}`",
    }


def policy_keys(organisation: keys.Organisation) -> init.PolicyKeys:
    """Return the public areas of the two keys that approve."""
    try:
        return init.policy_keys(organisation.files["pcr.pub"], organisation.files["platform.pub"])
    except ValueError as error:
        raise Failure(f"{organisation.folder} cannot be used: {error}; make a new keyset") from error


def read_event_log(path: Path) -> bytes:
    """Read the firmware's event log; the organisation reads it again, but then the TPM was written to."""
    if not path.exists():
        raise Failure(
            f"there is no event log at {path}: switch the TPM on in the firmware's setup, mount securityfs, "
            "or name one by --event-log; firmware that keeps none cannot be approved"
        )
    log = exchange.read_file(path, exchange.LOG_BYTES)
    if not log:
        raise Failure(f"the event log {path} is empty: restart the machine through its firmware")
    try:
        eventlog.parse_event_log(log)
    except ValueError as error:
        raise Failure(
            f"{path} is no event log of a firmware ({error}): leave --event-log away for the kernel's copy, "
            "or name a copy of that"
        ) from error
    return log


def _check_event_log(machine: Tpm, log: bytes, path: Path) -> None:
    """Refuse an event log of another machine or start: the organisation would."""
    with init.asking_tpm("PCR 7"):
        seen = init.read_pcr(machine, init.PLATFORM_STATE[0])
    said = eventlog.replay(eventlog.parse_event_log(log), init.PLATFORM_STATE[0])
    if said != seen:
        raise Failure(
            f"the event log {path} gives PCR 7 {said.hex()}, the TPM has {seen.hex()}: name the log of this "
            "machine, since it was started last"
        )


def make_secrets(host: Host) -> Secrets:
    """Make every secret of a new machine. Passwords are hex: a TPM drops zeros at the end of one."""
    auths = {name: host.random(16).hex().encode() for name in exchange.HIERARCHIES}
    recovery_key = exchange.make_recovery_key(host.random(32))
    return Secrets(host.random(32), host.random(16).hex().encode(), recovery_key, auths, host.random(64))


def inspect(machine: Tpm, policy: init.PolicyKeys, epoch: int) -> None:
    """Refuse a TPM that cannot be provisioned, or is; nothing is written."""
    _check_bank(machine)
    flags = _check_usable(machine)
    if flags & PASSWORDS:
        expected = "a TPM that nobody provisioned (or --again with the organisation's consent)"
        raise explain.advised(init.Refused("TPM-STATE", expected=expected, seen=words_of(flags)), _AGAIN)
    machine.find_storage_key()
    with explain.advising({"TPM-INDEX": _FOREIGN_INDEX}):
        _check_epoch(machine, policy, epoch, "say")


def _check_bank(machine: Tpm) -> None:
    with init.asking_tpm("the TPM to tell its banks"):
        banks = init.active_banks(machine)
    if "sha256" not in banks:
        raise init.Refused("TPM-BANK", expected="a SHA-256 bank", seen=", ".join(banks) or "none")


def _check_usable(machine: Tpm) -> init.Permanent:
    """Return what of provisioning a TPM has, if it can be worked with."""
    flags, startup = machine.flags()
    if startup & 6 != 6:
        expected = "the hierarchies of owner and endorsement to be enabled"
        refused = init.Refused("TPM-STATE", expected=expected, seen=f"hierarchies {startup & 7:#x}")
        raise explain.advised(refused, "restart; or switch the hierarchies on in the firmware's setup")
    if flags & init.Permanent.IN_LOCKOUT:
        raise init.Refused("TPM-LOCKOUT", expected="a TPM that is not locked out", seen="locked out")
    return flags


def _remove_planted(host: Host, machine: Tpm) -> None:
    """Remove policies that open the hierarchies of a TPM that has no passwords: they would outlive ours."""
    planted = machine.policies()
    if planted:
        host.say(f"the TPM has a policy of {', '.join(planted)}, set by somebody before: it is removed")
        machine.remove_policies()
        _check_no_policy(machine)


def _check_no_policy(machine: Tpm) -> None:
    planted = machine.policies()
    if planted:
        expected = "no policy of owner, endorsement and lockout"
        raise init.Refused("TPM-STATE", expected=expected, seen=f"one of {', '.join(planted)}")


def _check_epoch(machine: Tpm, policy: init.PolicyKeys, epoch: int, remedy: str) -> None:
    """Refuse a TPM whose epoch is later already, or whose epoch index is somebody else's.

    The remedy ends in the option for another epoch.
    """
    if machine.find_epoch_index(policy) == policy.epoch_index:
        with init.asking_tpm("the epoch index"):
            bits = init.read_epoch(machine)
        if bits & ~init.epoch_bits(epoch):
            expected, seen = f"a TPM at epoch {epoch} or before (--epoch)", bits.bit_length()
            refused = init.Refused("EPOCH", expected=expected, seen=f"epoch {seen}")
            raise explain.advised(refused, f"{remedy} --epoch {seen} or later: a TPM's epoch never falls")


def _warn_of_epoch(host: Host, machine: Tpm, policy: init.PolicyKeys, epoch: int, lowest: int) -> None:
    """Say what it means if the TPM's epoch rises above the organisation's own: it may be meant."""
    if epoch <= lowest:
        return
    if machine.find_epoch_index(policy) == policy.epoch_index:
        with init.asking_tpm("the epoch index"):
            if init.read_epoch(machine).bit_length() >= epoch:
                return
    host.say(
        f"warning: epoch {epoch} is later than the organisation's, {lowest}: from here this TPM refuses all "
        "of an earlier epoch, until somebody clears it; if all machines are to be of it, raise the keyset's "
        f"(`mosinit keys epoch KEYSET {epoch}`, `mosinit keys export` again)"
    )


def words_of(flags: init.Permanent) -> str:
    """Say what of provisioning a TPM has."""
    return ", ".join(words for flag, words in FLAGS.items() if flags & flag) or "nothing set"


def make_objects(machine: Tpm, policy: init.PolicyKeys, epoch: int, secrets: Secrets) -> Made:
    """Make what the request names. Of what an interrupted run left, the storage key is made anew, and the
    epoch index used again.

    That comes last: that the storage root key can be used is then known.
    """
    storage_key = machine.make_storage_key(secrets.unique)
    sudi = machine.make_identity(secrets.sudi_auth)
    seal = machine.seal(policy, secrets.config)
    index = machine.make_epoch_index(policy, epoch)
    with init.asking_tpm("PCR 7"):
        pcr7 = init.read_pcr(machine, init.PLATFORM_STATE[0])
    return Made(storage_key, index, seal, sudi.public, sudi.pem, pcr7)


def _write(host: Host, path: Path, content: bytes) -> None:
    with host.replacing(path, mode=0o600) as fresh:
        fresh.write_bytes(content)


def _encode_state(made: Made, epoch: int, request: bytes) -> bytes:
    words = {
        "schema": 1, "epoch": epoch, "pcr7": made.pcr7.hex(), "storage_key": made.storage_key.hex(),
        "epoch_index": made.epoch_index.hex(), "sudi": made.sudi.hex(), "request": request.hex(),
        "seal": {"public": made.seal.public.hex(), "private": made.seal.private.hex()},
    }  # fmt: skip
    return (json.dumps(words, indent=1) + "\n").encode()


def _write_state(
    host: Host, folder: Path, organisation: keys.Organisation, made: Made, secrets: Secrets
) -> None:
    folder.mkdir(mode=0o700)
    keys.write_organisation(host, organisation, folder / "organisation")
    _write(host, folder / "sudi.key", made.sudi_pem)
    _write(host, folder / "sudi.auth", secrets.sudi_auth + b"\n")
    _write(host, folder / "config.key", secrets.config)
    _write(host, folder / "recovery.key", secrets.recovery_key.encode())
    auths = {name: secrets.auths[name].decode() for name in exchange.HIERARCHIES}
    _write(host, folder / "auths.json", (json.dumps(auths) + "\n").encode())


def make_csr(
    host: Host, folder: Path, tcti: str, made: Made, product: str, secret: bytes, request: bytes
) -> bytes:
    """Return a certificate request (PKCS#10, DER) that the SUDI key signs in the TPM, with the
    machine record and the digest of the whole request.
    """
    serial = records.serial_of(records.parse_point(made.sudi, records.SUDI_HEAD))
    record = records.encode_record(
        product,
        init.secret_proof(secret, product),
        init.tpm_name(made.storage_key),
        init.tpm_name(made.epoch_index),
    )
    config = (
        "[req]\nprompt = no\ndistinguished_name = dn\nreq_extensions = extensions\n"
        f"[dn]\nCN = {serial}\n[extensions]\n{init.RECORD_OID} = DER:{record.hex()}\n"
        f"{records.REQUEST_OID.dotted_string} = DER:{records.encode_digest(request).hex()}\n"
    )
    with host.scratch() as scratch:
        (scratch / "request.cnf").write_text(config)
        with_tpm = closed_environment(TPM2OPENSSL_TCTI=tcti, TSS2_LOG="all+NONE")
        words: list[str | Path] = [
            "openssl", "req", "-new", "-sha256", "-outform", "DER", "-config", scratch / "request.cnf",
            "-provider", "tpm2", "-provider", "default",
            "-key", folder / "sudi.key", "-passin", f"file:{folder / 'sudi.auth'}",
        ]  # fmt: skip
        try:
            return host.run(words, env=with_tpm, timeout=120)
        except Failure as error:
            raise Failure(
                f"the TPM did not sign the request ({error}): run the same command again"
            ) from error


def encrypt_recovery(
    host: Host, folder: Path, organisation: keys.Organisation, made: Made, secrets: Secrets
) -> bytes:
    """Return the recovery record, encrypted for the organisation (CMS, RSA-OAEP, AES-256-GCM)."""
    serial = records.serial_of(records.parse_point(made.sudi, records.SUDI_HEAD))
    name = init.tpm_name(made.storage_key)
    recovery = exchange.Recovery(organisation.product, serial, name, secrets.auths, secrets.recovery_key)
    return host.run(
        ["openssl", "cms", "-encrypt", "-binary", "-aes-256-gcm", "-outform", "DER",
         "-recip", folder / "organisation/recovery.pem",
         "-keyopt", "rsa_padding_mode:oaep", "-keyopt", "rsa_oaep_md:sha256"],
        stdin=exchange.encode_recovery(recovery), env=closed_environment(),
    )  # fmt: skip


def _made_before(
    options: Options, organisation: keys.Organisation, policy: init.PolicyKeys, log: bytes
) -> dict[str, object]:
    """Tell again of the request that an earlier run left, if it was made of the same.

    With --again that run came behind its beginning: nothing of before is left to undo.
    """
    folder = options.folder
    state, other = read_state(folder), f"{folder} is from another run"
    if (folder / "seal.json").exists() or (folder / "closing").exists():
        raise Failure(
            f"{folder} has its answer already: take that to its end by --answer, or name another --dir"
        )
    epoch = keys.choose_epoch(options.epoch, organisation.epoch)
    if keys.open_organisation(folder / "organisation").files != organisation.files:
        raise Failure(f"{other}, for another organisation: remove it, or name another --dir")
    if _read_request(folder).event_log != log:
        raise Failure(f"{other}, with another event log: remove it, or name another --dir")
    with open_tpm(options.tcti) as machine, explain.advising({"TPM-INDEX": _FOREIGN_INDEX}):
        seen = machine.find_storage_key(), machine.find_epoch_index(policy)
        if (*seen, epoch) != (state.storage_key, state.epoch_index, state.epoch):
            raise Failure(f"{other}, for another TPM or epoch: remove it, or name another --dir")
        inspect(machine, policy, epoch)
    return _asked(options, organisation, epoch, state.sudi)


def _read_request(folder: Path) -> exchange.Request:
    path = folder / "request.json"
    return exchange.parse_request(exchange.read_file(path, exchange.DOCUMENT_BYTES), str(path))


def read_state(folder: Path) -> State:
    """Read what a request left."""
    try:
        if folder.is_dir() and stat.S_IMODE(folder.stat().st_mode) & 0o077:
            raise Failure(f"{folder} is open to others: chmod 700 {folder}")
        keys.check_owner(folder, *folder.iterdir())
        words = init.parse_json((folder / "machine.json").read_bytes(), "")
        if not isinstance(words, dict):
            raise ValueError("no object")
        seal = exchange.Seal(*(bytes.fromhex(words["seal"][name]) for name in exchange.Seal._fields))
        storage_key, index, sudi, request = (bytes.fromhex(words[name]) for name in State._fields[1:5])
        return State(int(words["epoch"]), storage_key, index, sudi, request, seal)
    except (init.Refused, OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Failure(
            f"{folder} is not what `mosinit provision --organisation` makes ({reason}): name the folder "
            "that it made, or begin anew in a new one"
        ) from error


# --- Once more: a provisioned machine ----------------------------------------------------------------


def start_over(
    machine: Tpm, organisation: keys.Organisation, policy: init.PolicyKeys, options: Options
) -> None:
    """Undo a provisioning, if the organisation consents and the passwords are right.

    An interrupted run goes on from what is still set. The consent names the storage key, which stays until
    the next request makes another: then the seal and the record of before are of no use.
    """
    consent, auths = options.consent, options.auths
    assert consent and auths  # `request` saw it
    recovery = exchange.parse_recovery(exchange.read_file(auths, exchange.DOCUMENT_BYTES), str(auths))
    # Only what is one: to close another file would be no help.
    if stat.S_IMODE(auths.stat().st_mode) & 0o077:
        raise Failure(f"{auths} is open to others: chmod 600 {auths}")
    agreed = exchange.parse_consent(exchange.read_file(consent, exchange.DOCUMENT_BYTES), str(consent))
    epoch = keys.choose_epoch(options.epoch, organisation.epoch)
    with explain.advising(dict.fromkeys(("RECORD-SIGNATURE", "TPM-IDENTITY"), _CONSENT)):
        _check_consent(organisation, agreed, recovery)
        _undo(machine, recovery, policy, epoch)


def _check_consent(
    organisation: keys.Organisation, agreed: exchange.Consent, recovery: exchange.Recovery
) -> None:
    """Refuse a consent that the organisation did not sign, or that is for another machine."""
    try:
        init.verify_signature(organisation.certificate("sudi-ca"), agreed.signature, agreed.statement)
    except init.Refused as error:
        expected = "a consent that the SUDI CA signed"
        raise init.Refused("RECORD-SIGNATURE", expected=expected, seen="another signature") from error
    wanted = exchange.consent_statement(organisation.product, recovery.storage_key)
    if agreed.statement != wanted or recovery.product != organisation.product:
        seen = agreed.statement.decode()[:200]
        raise init.Refused("TPM-IDENTITY", expected=f"a consent for {wanted.decode()}", seen=seen)


def _undo(machine: Tpm, recovery: exchange.Recovery, policy: init.PolicyKeys, epoch: int) -> None:
    if not _check_usable(machine) & PASSWORDS:
        return  # an earlier run came this far
    try:
        machine.check_owner(recovery.auths)
    except WrongAuth as error:
        raise Failure(
            "the owner password in the recovery record is not this TPM's: name the record of this machine's "
            "last provisioning"
        ) from error
    seen = machine.find_storage_key()
    name = init.tpm_name(seen) if seen else b""
    if recovery.storage_key != name:
        raise init.Refused(
            "TPM-IDENTITY", expected=f"storage key {recovery.storage_key.hex()}", seen=name.hex() or "none"
        )
    try:
        # An index of this organisation stays: its epoch must not fall.
        _check_epoch(machine, policy, epoch, "say")
    except init.Refused as refused:
        if refused.check != "TPM-INDEX":
            raise
        machine.remove_epoch_index()
    machine.open_hierarchies(recovery.auths)


# --- Step 2: the answer ------------------------------------------------------------------------------


def finish(host: Host, folder: Path, answer: Path, tcti: str = DEVICE) -> dict[str, object]:
    """Take the organisation's answer, and close the TPM: passwords set, TPM2_Clear off.

    Run again after an interruption it goes on; run again when all is done it only looks.
    """
    taken = take(host, folder, answer, tcti)
    close(host, folder, tcti)
    return {
        **taken,
        "next": f"`mosinit install --disk DEV --dir {folder}`; keep {folder} until that is done, then erase "
        "it: it holds the secrets of the disk, and what the machine needs is on the disk then",
    }


def take(host: Host, folder: Path, answer: Path, tcti: str = DEVICE) -> dict[str, object]:
    """Take the organisation's answer: all that an installation needs is in `folder` then, and the TPM is as
    it was.
    """
    state, organisation = read_state(folder), keys.open_organisation(folder / "organisation")
    policy = policy_keys(organisation)
    taken = exchange.parse_answer(exchange.read_file(answer, exchange.DOCUMENT_BYTES), str(answer))
    with explain.advising(_other_answer(folder)):
        record = verify_answer(folder, state, organisation, policy, taken)
    with open_tpm(tcti) as machine, explain.advising(_other_tpm(folder)):
        _check_same_tpm(machine, folder, state, policy, taken)
        if not is_closed(folder):
            _read_auths(folder)
            _check_untouched(folder, machine)
        else:
            check_closed(machine, record, state.epoch)
    pem = x509.load_der_x509_certificate(taken.certificate).public_bytes(serialization.Encoding.PEM)
    _write(host, folder / "sudi.pem", pem)
    sealed = exchange.Sealed(organisation.product, state.seal, taken)
    _write(host, folder / "seal.json", exchange.encode_sealed(sealed))
    serial = records.serial_of(records.parse_point(state.sudi, records.SUDI_HEAD))
    return {
        "provisioned": serial,
        "product": organisation.product,
        "epoch": state.epoch,
        "seal": folder / "seal.json",
        "certificate": folder / "sudi.pem",
    }


def is_closed(folder: Path) -> bool:
    """Say whether the TPM of what `take` left has its passwords: then they are nowhere here."""
    return (folder / "seal.json").exists() and not (folder / "auths.json").exists()


def close(host: Host, folder: Path, tcti: str = DEVICE) -> None:
    """Close the TPM whose answer was taken: passwords set, TPM2_Clear off. Again it only looks."""
    state, organisation = read_state(folder), keys.open_organisation(folder / "organisation")
    policy = policy_keys(organisation)
    path = folder / "seal.json"
    sealed = exchange.parse_sealed(exchange.read_file(path, exchange.DOCUMENT_BYTES), str(path))
    record = verify_answer(folder, state, organisation, policy, sealed.answer)
    with open_tpm(tcti) as machine, explain.advising(_other_tpm(folder)):
        _check_same_tpm(machine, folder, state, policy, sealed.answer)
        if not is_closed(folder):
            auths = _read_auths(folder)
            _begin_closing(host, folder, machine)
            machine.close_hierarchies(auths)
        check_closed(machine, record, state.epoch)
    (folder / "auths.json").unlink(missing_ok=True)
    host.sync_file(folder)


def check_closed(machine: Tpm, record: init.MachineRecord, epoch: int) -> None:
    """See that a TPM is what a boot takes, and that nothing opens it but its passwords."""
    _check_no_policy(machine)
    init.check_tpm(machine, record, epoch)


def _other_answer(folder: Path) -> dict[str, str]:
    """Return what to do about an answer that is not the one to the request in `folder`, by check."""
    checks = (
        "RECORD-FORMAT",
        "RECORD-PRODUCT",
        "RECORD-SIGNATURE",
        "TPM-IDENTITY",
        "TPM-APPROVAL",
        "EPOCH-ORDER",
    )
    remedy = (
        f"take the answer that `mosinit enroll` wrote to {folder / 'request.json'}, or let it answer again"
    )
    return dict.fromkeys(checks, remedy)


def _other_tpm(folder: Path) -> dict[str, str]:
    """Return what to do about a TPM that is not as the request in `folder` left it, by check."""
    anew = f"remove {folder} and make a new request"
    cleared = f"if this is the machine of the request in {folder}, its TPM was cleared since: {anew}"
    return {
        "TPM-IDENTITY": f"{cleared}; if not, take the answer there",
        "TPM-CLEARED": f"{cleared}; if not, take the answer there",
        "TPM-SRK": f"{_CLEAR}, {anew}",
        "TPM-INDEX": f"somebody changed the TPM since the request: {_CLEAR}, {anew}",
        "TPM-POLICY": f"bring Secure Boot in the firmware back to what it was for the request, or {anew}",
    }


def verify_answer(
    folder: Path,
    state: State,
    organisation: keys.Organisation,
    policy: init.PolicyKeys,
    untrusted: exchange.Answer,
) -> init.MachineRecord:
    """Return the machine record if the whole answer is the organisation's, and for this very machine."""
    ca, product = organisation.files["sudi-ca.pem"], organisation.product
    record = init.verify_record(untrusted.certificate, ca, product)
    certificate = x509.load_der_x509_certificate(untrusted.certificate)
    secret = exchange.read_file(folder / "config.key", 32)
    ours = (
        init.tpm_name(state.storage_key),
        init.tpm_name(policy.epoch_index),
        records.parse_point(state.sudi, records.SUDI_HEAD),
    )
    named = (record.storage_key, record.epoch_index, certificate.public_key())
    proof = init.secret_proof(secret, product)
    if ours != named or not hmac.compare_digest(proof, record.secret_proof):
        raise init.Refused(
            "TPM-IDENTITY", expected="the answer to this machine's request",
            seen=f"one for {certificate.subject.rfc4514_string()}, storage key {record.storage_key.hex()}",
        )  # fmt: skip
    _check_request(certificate, state)
    verify_approvals(organisation, policy, untrusted.approvals)
    order = untrusted.order
    ordered = init.verify_epoch_order(
        order.statement, order.signature, order.certificate, organisation.policy()
    )
    _check_epochs(state, untrusted.approvals, ordered)
    return record


def _check_epochs(state: State, approvals: Mapping[str, init.PlatformApproval], ordered: int) -> None:
    """Refuse what was signed for an earlier epoch: it is public, no signature holds an answer together, and
    with the TPM's bits of today nothing would open.
    """
    if ordered < state.epoch:
        expected = f"an order of epoch {state.epoch}"
        raise init.Refused("EPOCH-ORDER", expected=expected, seen=f"one of epoch {ordered}")
    least = min(approval.epoch for approval in approvals.values())
    if least < state.epoch:
        expected = f"approvals up to epoch {state.epoch} or later"
        raise init.Refused("TPM-APPROVAL", expected=expected, seen=f"one up to epoch {least}")


def _check_request(certificate: x509.Certificate, state: State) -> None:
    """See that the organisation answers what this machine asked, and filed the recovery record that it sent:
    nobody else will have the passwords.
    """
    try:
        answered = records.parse_digest(certificate).hex()
    except ValueError as error:
        answered = str(error)
    if answered != state.request.hex():
        raise Failure(
            f"the answer is to another request of this machine ({answered}), with another recovery record: "
            "have the request in this folder enrolled"
        )


def verify_approvals(
    organisation: keys.Organisation, policy: init.PolicyKeys, approvals: Mapping[str, init.PlatformApproval]
) -> None:
    """Raise Refused unless the platform key signed each approval: the TPM would say so only at boot."""
    for pcr7, approval in approvals.items():
        reseal.verify_approval(organisation.files["platform.pub"], policy, pcr7, approval)


def _check_same_tpm(
    machine: Tpm, folder: Path, state: State, policy: init.PolicyKeys, answer: exchange.Answer
) -> None:
    """See that this is the TPM as the request left it, in a firmware that the answer approves."""
    with init.asking_tpm("the storage root key"):
        seen = init.read_storage_key(machine)
        pcr7 = init.read_pcr(machine, init.PLATFORM_STATE[0])
    if seen != state.storage_key:
        name = init.tpm_name(seen).hex() if seen else "none"
        expected = f"storage key {init.tpm_name(state.storage_key).hex()}"
        raise init.Refused("TPM-IDENTITY", expected=expected, seen=name)
    index = machine.find_epoch_index(policy)
    if index != state.epoch_index:
        raise init.Refused(
            "TPM-INDEX", expected=state.epoch_index.hex(), seen=index.hex() if index else "none"
        )
    _check_epoch(machine, policy, state.epoch, f"remove {folder} and make a new request with")
    if pcr7.hex() not in answer.approvals:
        approved = ", ".join(answer.approvals)
        raise init.Refused("TPM-POLICY", expected=f"an approved PCR 7: {approved[:300]}", seen=pcr7.hex())


def _begin_closing(host: Host, folder: Path, machine: Tpm) -> None:
    """Note that from here the TPM's passwords are ours: whatever else is set is somebody else's.

    Trying a password would tell it as well, but one wrong lockout password locks the TPM for a day.
    """
    _check_untouched(folder, machine)
    if not (folder / "closing").exists():
        _remove_planted(host, machine)
        _write(host, folder / "closing", b"")


def _check_untouched(folder: Path, machine: Tpm) -> None:
    """See that nobody but us set a password since the request."""
    flags = _check_usable(machine)
    if flags & PASSWORDS and not (folder / "closing").exists():
        expected = "the TPM as the request left it"
        raise init.Refused("TPM-STATE", expected=expected, seen=words_of(flags))


def _read_auths(folder: Path) -> Mapping[str, bytes]:
    try:
        words = init.parse_json((folder / "auths.json").read_bytes(), "")
        if not isinstance(words, dict):
            raise ValueError("no object")
        return {name: words[name].encode() for name in exchange.HIERARCHIES}
    except (init.Refused, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(
            f"cannot read {folder / 'auths.json'}: clear the TPM in the firmware's setup, remove {folder} "
            "and begin anew"
        ) from error
