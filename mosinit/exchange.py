"""What a machine and its organisation send each other while a machine is provisioned, as JSON (schema 1).

    request    machine to organisation: a CSR with the record and a digest of all, PCR 7 with its log,
               and the recovery record, encrypted for the organisation
    answer     back: the SUDI certificate, approvals of PCR 7, the epoch order
    recovery   what only the organisation keeps: passwords of the TPM, recovery key of the disk
    consent    organisation to machine: that a provisioned machine may be provisioned again
    approvals  organisation to its machines: values of PCR 7 in which they may open

Each is read strictly: all keys, no others, sizes bounded. What is read is untrusted until somebody verifies
it.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from mosinit import init
from mosinit.host import Failure

LOG_BYTES = 1 << 20
DOCUMENT_BYTES = 4 << 20
HIERARCHIES = ("owner", "endorsement", "lockout")
APPROVALS = 16  # in one file, and in one header: see `init.parse_luks_header`
Reader: TypeAlias = Callable[[object], object]


class Request(NamedTuple):
    """What a machine asks for. Nothing in it is verified."""

    product: str
    epoch: int
    csr: bytes  # PKCS#10, DER
    storage_key: bytes  # TPMT_PUBLIC, like the next but one and the last
    epoch_index: bytes  # TPMS_NV_PUBLIC
    sealed: bytes
    sudi: bytes
    pcr7: bytes
    event_log: bytes
    recovery: bytes  # CMS, DER


class Order(NamedTuple):
    """An epoch statement, and what verifies it (`init.verify_epoch_order`)."""

    statement: bytes
    signature: bytes
    certificate: bytes


class Answer(NamedTuple):
    """What an organisation answers. Nothing in it is verified."""

    certificate: bytes  # DER
    approvals: Mapping[str, init.PlatformApproval]  # by PCR 7 in hex
    order: Order


class Approval(NamedTuple):
    """The platform key's signature for one PCR 7, up to an epoch, and what it is for, in words."""

    pcr7: bytes
    epoch: int
    signature: bytes
    reason: str


class Approvals(NamedTuple):
    """Approvals for every machine of a product. Nothing in it is verified."""

    product: str
    platform_key: bytes  # its TPM name
    approvals: tuple[Approval, ...]


class Recovery(NamedTuple):
    """What is needed when a machine no longer opens by itself."""

    product: str
    serial: str
    storage_key: bytes  # its TPM name
    auths: Mapping[str, bytes]  # of each hierarchy
    recovery_key: str


class Consent(NamedTuple):
    """A statement, and the SUDI CA's signature of its exact bytes."""

    statement: bytes
    signature: bytes


# --- Reading -----------------------------------------------------------------------------------------


def read_file(path: Path, limit: int) -> bytes:
    """Read a file of at most `limit` bytes."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise Failure(f"{path} is no file: name one")
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Failure(
            f"{path} has more than {limit} bytes, too much for what it should be: name the right file"
        )
    return data


def _fields(data: bytes, name: str, kind: str, fields: Mapping[str, Reader]) -> dict[str, Any]:
    """Read a document of one kind: exactly these fields, each by its reader (ValueError says what is right).

    `name` is how messages call the document.
    """
    try:
        raw = init.parse_json(data, "")
    except init.Refused as error:
        raise Failure(f"{name} is no JSON ({error.seen[:100]}): get the {kind} again") from error
    if not isinstance(raw, dict) or (raw.get("schema"), raw.get("type")) != (1, kind):
        raise Failure(f"{name} is no {kind} of schema 1: name the right file, or get it again")
    words = {key: value for key, value in raw.items() if key not in ("schema", "type")}
    odd = sorted(set(words) ^ set(fields))
    if odd:
        what = "has an unknown" if odd[0] in words else "lacks the"
        raise Failure(f"{name} {what} field {odd[0][:60]!r}: get the {kind} again from a mosinit like this")
    read = {}
    for key, reader in fields.items():
        try:
            read[key] = reader(words[key])
        except (ValueError, TypeError) as error:
            raise Failure(f"{name}: {key} is not {error}: get the {kind} again") from error
    return read


def _bytes(limit: int) -> Callable[[object], bytes]:
    def read(value: object) -> bytes:
        try:
            data = base64.b64decode(value.encode() if isinstance(value, str) else b"!", validate=True)
        except (binascii.Error, UnicodeError) as error:
            raise ValueError("base64") from error
        if not 0 < len(data) <= limit:
            raise ValueError(f"1 to {limit} bytes")
        return data

    return read


def _hex(size: int) -> Callable[[object], bytes]:
    def read(value: object) -> bytes:
        if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", value):
            raise ValueError(f"{size} bytes in hex")
        return bytes.fromhex(value)

    return read


def _text(pattern: str, what: str) -> Callable[[object], str]:
    def read(value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(what)
        return value

    return read


def _epoch(value: object) -> int:
    if type(value) is not int or not 1 <= value <= init.MAX_EPOCH:
        raise ValueError(f"a number from 1 to {init.MAX_EPOCH}")
    return value


_product = _text(init.UUID.pattern, "a uuid")
_serial = _text("[0-9a-f]{16}", "a serial of 16 hex digits")


def _dump(kind: str, fields: Mapping[str, object]) -> bytes:
    return (json.dumps({"schema": 1, "type": kind, **fields}, indent=1) + "\n").encode()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- Request -----------------------------------------------------------------------------------------

_REQUEST: Mapping[str, Reader] = {
    "product": _product,
    "epoch": _epoch,
    "csr": _bytes(init.BLOCK),
    "storage_key": _bytes(512),
    "epoch_index": _bytes(512),
    "sealed": _bytes(512),
    "sudi": _bytes(512),
    "pcr7": _hex(32),
    "event_log": _bytes(LOG_BYTES),
    "recovery": _bytes(16384),
}


def encode_request(request: Request) -> bytes:
    """Encode a request."""
    words = {name: _base64(item) if isinstance(item, bytes) else item for name, item in _named(request)}
    return _dump("request", {**words, "pcr7": request.pcr7.hex()})


def parse_request(untrusted: bytes, name: str) -> Request:
    """Parse a request."""
    return Request(**_fields(untrusted, name, "request", _REQUEST))


def read_event_log(path: Path) -> tuple[bytes, bytes | None]:
    """Read an event log as a firmware keeps it, or the one in a request, which says what PCR 7 was, too."""
    data = read_file(path, DOCUMENT_BYTES)
    if data[:1] == b"{":
        request = parse_request(data, path.name)
        return request.event_log, request.pcr7
    return data, None


def _named(record: Request) -> list[tuple[str, object]]:
    return list(record._asdict().items())


# --- Answer ------------------------------------------------------------------------------------------


def _approvals(value: object) -> Mapping[str, init.PlatformApproval]:
    if not isinstance(value, dict) or not 1 <= len(value) <= APPROVALS:
        raise ValueError(f"1 to {APPROVALS} approvals")
    return {_hex(32)(pcr7).hex(): _approval(item) for pcr7, item in value.items()}


def _approval(value: object) -> init.PlatformApproval:
    if not isinstance(value, dict) or set(value) != set(init.PlatformApproval._fields):
        raise ValueError("an approval: epoch and signature")
    return init.PlatformApproval(_epoch(value["epoch"]), _hex(256)(value["signature"]))


def _order(value: object) -> Order:
    if not isinstance(value, dict) or set(value) != set(Order._fields):
        raise ValueError("an epoch order")
    return Order(*(_bytes(16384)(value[name]) for name in Order._fields))


def encode_answer(answer: Answer) -> bytes:
    """Encode an answer."""
    return _dump("answer", answer_fields(answer))


def answer_fields(answer: Answer) -> dict[str, object]:
    """Return an answer as plain data."""
    return {
        "certificate": _base64(answer.certificate),
        "approvals": {
            pcr7: {"epoch": approval.epoch, "signature": approval.signature.hex()}
            for pcr7, approval in answer.approvals.items()
        },
        "order": {name: _base64(item) for name, item in answer.order._asdict().items()},
    }


_ANSWER: Mapping[str, Reader] = {
    "certificate": _bytes(init.BLOCK),
    "approvals": _approvals,
    "order": _order,
}


def parse_answer(untrusted: bytes, name: str) -> Answer:
    """Parse an answer."""
    return Answer(**_fields(untrusted, name, "answer", _ANSWER))


# --- What a provisioned machine keeps for its installation -------------------------------------------


class Seal(NamedTuple):
    """A sealed secret: TPMT_PUBLIC and TPM2B_PRIVATE, both without their sizes."""

    public: bytes
    private: bytes


class Sealed(NamedTuple):
    """What opens the config volume of one machine."""

    product: str
    seal: Seal
    answer: Answer

    def tokens(self) -> init.Tokens:
        """Return it as the header of the volume holds it."""
        return init.Tokens(*self.seal, self.answer.certificate, self.answer.approvals, *self.answer.order)


def encode_sealed(sealed: Sealed) -> bytes:
    """Encode what `install` needs of a provisioned machine."""
    seal = {"public": _base64(sealed.seal.public), "private": _base64(sealed.seal.private)}
    return _dump("seal", {"product": sealed.product, "seal": seal, **answer_fields(sealed.answer)})


def parse_sealed(data: bytes, name: str) -> Sealed:
    """Parse what `provision` left for `install`."""
    fields = _fields(data, name, "seal", {"product": _product, "seal": parse_seal, **_ANSWER})
    product, seal = fields.pop("product"), fields.pop("seal")
    return Sealed(product, seal, Answer(**fields))


def parse_seal(value: object) -> Seal:
    """Parse a sealed secret; ValueError if it is none."""
    if not isinstance(value, dict) or set(value) != {"public", "private"}:
        raise ValueError("a sealed secret")
    return Seal(_bytes(512)(value["public"]), _bytes(512)(value["private"]))


# --- Approvals of PCR 7, in advance ------------------------------------------------------------------

_APPROVAL: Mapping[str, Reader] = {
    "pcr7": _hex(32),
    "epoch": _epoch,
    "signature": _hex(256),
    "reason": _text("[ -~]{1,200}", "1 to 200 letters and signs"),
}


def _listed_approvals(value: object) -> tuple[Approval, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= APPROVALS:
        raise ValueError(f"a list of 1 to {APPROVALS} approvals")
    if any(not isinstance(item, dict) or set(item) != set(_APPROVAL) for item in value):
        raise ValueError(f"a list of approvals: {', '.join(_APPROVAL)}")
    listed: list[dict[str, Any]] = [
        {name: reader(item[name]) for name, reader in _APPROVAL.items()} for item in value
    ]
    if len({item["pcr7"] for item in listed}) != len(listed):
        raise ValueError("one approval for each PCR 7")
    return tuple(Approval(**item) for item in listed)


def encode_approvals(made: Approvals) -> bytes:
    """Encode approvals."""
    rows = [
        {**each._asdict(), "pcr7": each.pcr7.hex(), "signature": each.signature.hex()}
        for each in made.approvals
    ]
    fields = {"product": made.product, "platform_key": made.platform_key.hex(), "approvals": rows}
    return _dump("approvals", fields)


def parse_approvals(untrusted: bytes, name: str) -> Approvals:
    """Parse approvals."""
    fields: Mapping[str, Reader] = {
        "product": _product, "platform_key": _hex(34), "approvals": _listed_approvals,
    }  # fmt: skip
    return Approvals(**_fields(untrusted, name, "approvals", fields))


# --- Recovery record ---------------------------------------------------------------------------------


def _auths(value: object) -> Mapping[str, bytes]:
    if not isinstance(value, dict) or set(value) != set(HIERARCHIES):
        raise ValueError(f"a password for each of {', '.join(HIERARCHIES)}")
    return {name: _text("[0-9a-f]{32}", "32 hex digits each")(value[name]).encode() for name in HIERARCHIES}


_RECOVERY: Mapping[str, Reader] = {
    "product": _product,
    "serial": _serial,
    "storage_key": _hex(34),
    "auths": _auths,
    "recovery_key": _text("([cbdefghijklnrtuv]{8}-){7}[cbdefghijklnrtuv]{8}", "a recovery key"),
}


def encode_recovery(recovery: Recovery) -> bytes:
    """Encode a recovery record, in clear: for encryption, or for who may read it."""
    auths = {name: recovery.auths[name].decode() for name in HIERARCHIES}
    return _dump(
        "recovery", {**recovery._asdict(), "storage_key": recovery.storage_key.hex(), "auths": auths}
    )


def parse_recovery(data: bytes, name: str) -> Recovery:
    """Parse a decrypted recovery record."""
    return Recovery(**_fields(data, name, "recovery", _RECOVERY))


def make_recovery_key(random: bytes) -> str:
    """Write 256 bits so that a person can type them, as systemd does: modhex, 8 groups of 8."""
    letters = "".join("cbdefghijklnrtuv"[int(digit, 16)] for digit in random.hex())
    return "-".join(letters[start : start + 8] for start in range(0, 64, 8))


# --- Consent -----------------------------------------------------------------------------------------


def consent_statement(product: str, storage_key: bytes) -> bytes:
    """Return what the SUDI CA signs, so that the machine with this storage key may be provisioned again."""
    words = {"schema": 1, "type": "provision-again", "product": product, "storage_key": storage_key.hex()}
    return json.dumps(words).encode()


def encode_consent(consent: Consent) -> bytes:
    """Encode a consent."""
    return _dump(
        "consent", {"statement": consent.statement.decode(), "signature": _base64(consent.signature)}
    )


def parse_consent(untrusted: bytes, name: str) -> Consent:
    """Parse a consent."""
    fields = _fields(
        untrusted, name, "consent",
        {"statement": lambda value: _text(r"[ -~]{1,1000}", "a statement")(value).encode(),
         "signature": _bytes(512)},
    )  # fmt: skip
    return Consent(**fields)
