"""Approvals laid into the header of a config volume, so that its machine's TPM opens it in another firmware
state: by the machine before the change, or by `recover` on a live medium after it.

Nothing here needs a secret. An approval is public, the platform key's signature is all that it is, and the
TPM checks that again at each boot.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from mosinit import exchange, explain, init, luks
from mosinit.host import Failure, Host

LIMIT = exchange.APPROVALS  # of one header: what the bring-up reads
_OTHER = "take the file that this organisation's `mosinit approve` wrote for this product"
_LATER = "let the organisation approve it once more, with a keyset of this epoch (`mosinit approve`)"


class Laid(NamedTuple):
    """What became of a header's approvals: values of PCR 7 in hex."""

    header: init.LuksHeader
    added: tuple[str, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]

    def describe(self) -> dict[str, object]:
        """Return it as plain data."""
        return {name: list(values) for name, values in self._asdict().items() if name != "header"}


def read_approvals(path: Path, policy: init.Policy) -> exchange.Approvals:
    """Read a file of approvals: see `parse_approvals`."""
    return parse_approvals(exchange.read_file(path, init.MIB), path.name, policy)


def parse_approvals(data: bytes, name: str, policy: init.Policy) -> exchange.Approvals:
    """Parse approvals. Raises `Refused` unless they say that they are for this product, by this
    organisation's platform key; that the key signed them, `lay_approvals` sees.
    """
    untrusted = exchange.parse_approvals(data, name)
    if untrusted.product != policy.product:
        refused = init.Refused("RECORD-PRODUCT", expected=policy.product, seen=untrusted.product)
        raise explain.advised(refused, _OTHER)
    ours = init.tpm_name(keys_of(policy).platform)
    if untrusted.platform_key != ours:
        expected, seen = f"approvals by platform key {ours.hex()}", untrusted.platform_key.hex()
        raise explain.advised(init.Refused("TPM-APPROVAL", expected=expected, seen=seen), _OTHER)
    return untrusted


def keys_of(policy: init.Policy) -> init.PolicyKeys:
    """Return the keys that approve, from the files of the signed initrd."""
    return init.policy_keys(policy.organisation["pcr.pub"], policy.organisation["platform.pub"])


def verify_approval(
    platform: bytes, policy: init.PolicyKeys, pcr7: str, approval: init.PlatformApproval
) -> None:
    """Raise Refused unless the platform key (PEM) signed an approval: the TPM would say so only at boot."""
    key = serialization.load_pem_public_key(platform)
    assert isinstance(key, rsa.RSAPublicKey)  # `init.policy_keys` saw it
    signed = policy.platform_policy(bytes.fromhex(pcr7), approval.epoch) + init.PLATFORM_REF
    try:
        key.verify(approval.signature, signed, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature as error:
        raise init.Refused(
            "TPM-APPROVAL", expected="signatures of the platform key", seen=f"another for {pcr7}"
        ) from error


def lay_approvals(
    host: Host,
    device: Path,
    header: init.LuksHeader,
    policy: init.Policy,
    approvals: exchange.Approvals,
    keep: Collection[str] = (),
) -> Laid:
    """Lay approvals into the header of a config volume, which was read as a boot does, and read it back.

    `keep` are values of PCR 7, in hex, whose approvals stay whatever room is needed: that of now. Raises
    `Refused`, and changes nothing then, if the organisation of `policy` did not sign each of them, or if one
    ends before this machine's epoch; `Failure` if it is another header by now.
    """
    present = header.tokens
    assert present  # of a config volume
    fresh = {
        each.pcr7.hex(): init.PlatformApproval(each.epoch, each.signature) for each in approvals.approvals
    }
    merged = merge(present, policy, fresh, keep)
    if merged != present.approvals:
        wanted = present._replace(approvals=merged)
        # All tokens that differ are written: those of another disk would be lost.
        if luks.read_header(host, device, "config") != header:
            raise Failure(f"{device} is not as it was looked at: nothing was changed; run this again")
        header = luks.import_tokens(host, device, wanted)
        if header.tokens != wanted or header.note:
            raise Failure(f"{device} does not keep what is written to it ({header.note}): use another disk")
    dropped = tuple(value for value in present.approvals if value not in merged)
    added = tuple(value for value in fresh if merged.get(value) != present.approvals.get(value))
    return Laid(header, added, tuple(value for value in merged if value not in added), dropped)


def merge(
    tokens: init.Tokens,
    policy: init.Policy,
    fresh: Mapping[str, init.PlatformApproval],
    keep: Collection[str] = (),
) -> dict[str, init.PlatformApproval]:
    """Return the approvals of a header with new ones among them. Raises `Refused` if one is not valid.

    Of those that are there, what can hold no more goes; and where they are too many, the oldest.
    """
    platform, keys = policy.organisation["platform.pub"], keys_of(policy)
    order = init.verify_epoch_order(
        tokens.order_statement, tokens.order_signature, tokens.order_certificate, policy
    )
    lowest = max(order, policy.epoch)
    for value, approval in fresh.items():
        verify_approval(platform, keys, value, approval)
        if approval.epoch < lowest:
            expected, seen = (
                f"an approval up to epoch {lowest} or later",
                f"one up to epoch {approval.epoch}",
            )
            raise explain.advised(init.Refused("TPM-APPROVAL", expected=expected, seen=seen), _LATER)
    # Below the order's epoch nothing opens once a boot has raised the TPM's. A system of a later epoch that
    # did not prove good yet is no reason: the one before may have to start again.
    merged = {
        value: approval
        for value, approval in tokens.approvals.items()
        if _holds(platform, keys, value, approval) and (approval.epoch >= order or value in keep)
    }
    for value, approval in fresh.items():
        # An older file, laid late, takes no epochs away.
        if value not in merged or merged[value].epoch < approval.epoch:
            merged.pop(value, None)
            merged[value] = approval
    oldest = [value for value in merged if value not in keep and value not in fresh]
    for value in oldest[: max(0, len(merged) - LIMIT)]:
        del merged[value]
    if len(merged) > LIMIT:
        raise Failure(f"a header takes {LIMIT} approvals, and these are more: lay fewer at once")
    return merged


def _holds(platform: bytes, keys: init.PolicyKeys, value: str, approval: init.PlatformApproval) -> bool:
    """Say whether an approval that lies in a header is one: it is kept or dropped, never relied on."""
    try:
        verify_approval(platform, keys, value, approval)
    except init.Refused:
        return False
    return True
