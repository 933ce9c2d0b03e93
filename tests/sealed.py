"""A machine sealed with other people's tools: tpm2-tools provisions and seals, openssl approves.

Nothing here calls the functions under test to make what they are tested with; the core's policy digests are
compared with those that a trial session of the TPM computes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mosinit import init
from tests.fake import PRODUCT
from tests.tpms import Swtpm, TpmMachine, swtpm

FIRMWARE, UKI = b"firmware state", b"sections of the UKI"
SRK = f"{init.SRK:#x}"
INDEX = f"{init.EPOCH_INDEX:#x}"
SRK_ATTRIBUTES = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt"
INDEX_ATTRIBUTES = "nt=bits|ownerwrite|policywrite|authread|no_da"
SEAL_ATTRIBUTES = "fixedtpm|fixedparent|adminwithpolicy|noda"
AUTHS = {"owner": "owner-password", "endorsement": "endorsement-password", "lockout": "lockout-password"}


def openssl(*words: str | Path, data: bytes = b"") -> bytes:
    """Run openssl."""
    command = ["openssl", *(str(word) for word in words)]
    return subprocess.run(command, input=data, capture_output=True, check=True, timeout=60).stdout


class Seal(NamedTuple):
    """A sealed object: TPMT_PUBLIC and TPM2B_PRIVATE, both without their sizes."""

    public: bytes
    private: bytes


class Material(NamedTuple):
    """What one provisioned machine consists of, and the keys of its organisation."""

    folder: Path
    secret: bytes
    seal: Seal
    keys: init.PolicyKeys
    record: init.MachineRecord
    pcrs: Mapping[init.Pcr, bytes]  # as they are at enter-initrd

    def sign(self, role: str, message: bytes) -> bytes:
        """Sign as the role's key does (RSASSA-SHA256)."""
        return openssl("dgst", "-sha256", "-sign", self.folder / f"{role}.key", data=message)

    def approval(self, epoch: int = 1, role: str = "pcr") -> init.UkiApproval:
        """Approve the UKI for an epoch."""
        pcr11 = self.pcrs[init.MEASURED]
        unseal = self.sign(role, self.keys.unseal_policy(pcr11, epoch) + init.UKI_REF)
        return init.UkiApproval(epoch, unseal, self.sign(role, init.epoch_policy(pcr11) + init.UKI_REF))

    def tokens(self, seal: Seal | None = None, platform: Mapping[str, bytes] | None = None) -> init.Tokens:
        """Return what the header of its config volume carries for the TPM."""
        approvals = self.platform() if platform is None else platform
        return init.Tokens(*(seal or self.seal), b"", approvals, b"", b"", b"")

    def platform(self, pcr7: bytes | None = None, role: str = "platform") -> dict[str, bytes]:
        """Approve a PCR 7 value, the right one unless told."""
        pcr7 = pcr7 or self.pcrs[init.Pcr(7)]
        return {pcr7.hex(): self.sign(role, self.keys.platform_policy(pcr7) + init.PLATFORM_REF)}


def start_up(tpm: Swtpm, *, firmware: bytes = FIRMWARE, uki: bytes = UKI, enter: bool = True) -> TpmMachine:
    """Measure what firmware, stub and bring-up do up to the phase in which secrets open."""
    k = TpmMachine(tpm)
    init.extend_pcr(k, init.Pcr(7), firmware)
    init.extend_pcr(k, init.MEASURED, uki)
    if enter:
        init.extend_pcr(k, init.MEASURED, init.ENTER_INITRD)
    k.commands.clear()
    return k


def make_keys(folder: Path, *roles: str) -> None:
    """Make RSA-2048 keys and their public halves."""
    for role in roles:
        openssl("genrsa", "-out", folder / f"{role}.key", "2048")
        openssl("rsa", "-in", folder / f"{role}.key", "-pubout", "-out", folder / f"{role}.pub")


def make_storage_key(tpm: Swtpm) -> None:
    """Make the storage root key and keep it where it belongs."""
    tpm.run("tpm2_createprimary", "-C", "o", "-G", "ecc256:aes128cfb", "-a", SRK_ATTRIBUTES, "-c", "srk.ctx")
    tpm.run("tpm2_evictcontrol", "-C", "o", "-c", "srk.ctx", SRK)
    tpm.run("tpm2_flushcontext", "-t")


def make_epoch_index(tpm: Swtpm, attributes: str = INDEX_ATTRIBUTES, policy: str = "seal.policy") -> None:
    """Define the epoch index and set its first bit."""
    tpm.run("tpm2_nvdefine", "-C", "o", "-s", "8", "-a", attributes, "-L", policy, INDEX)
    tpm.run("tpm2_nvsetbits", "-C", "o", "-i", "1", INDEX)


def authorized(tpm: Swtpm, role: str, reference: bytes, out: str) -> None:
    """Write the policy "what that key approves", as a trial session of the TPM computes it."""
    (tpm.folder / "ref").write_bytes(reference)
    tpm.run(
        "tpm2_loadexternal",
        "-C",
        "o",
        "-G",
        "rsa",
        "-u",
        f"{role}.pub",
        "-c",
        "key.ctx",
        "-n",
        f"{role}.name",
    )
    tpm.run("tpm2_flushcontext", "-t")
    tpm.run("tpm2_startauthsession", "-S", "trial.ctx")
    tpm.run("tpm2_policyauthorize", "-S", "trial.ctx", "-L", out, "-n", f"{role}.name", "-q", "ref")
    tpm.run("tpm2_flushcontext", "trial.ctx")


def take_ownership(tpm: Swtpm, auths: Mapping[str, str] = AUTHS) -> None:
    """Set the three passwords and forbid to clear the TPM."""
    tpm.run("tpm2_clearcontrol", "-C", "l", "s")
    for hierarchy, password in auths.items():
        tpm.run("tpm2_changeauth", "-c", hierarchy, password)


def seal(tpm: Swtpm, secret: bytes) -> Seal:
    """Seal a secret under the policy of the organisation's keys."""
    tpm.run("tpm2_create", "-C", SRK, "-i", "-", "-u", "seal.pub", "-r", "seal.priv",
            "-a", SEAL_ATTRIBUTES, "-L", "seal.policy", data=secret)  # fmt: skip
    tpm.run("tpm2_flushcontext", "-t")
    return Seal(*((tpm.folder / f"seal.{part}").read_bytes()[2:] for part in ("pub", "priv")))


def provision(folder: Path, keys_of: Path | None = None) -> Material:
    """Provision a new software TPM in `folder` and seal a secret to it; `keys_of` another one if told."""
    with swtpm(folder) as tpm:
        if keys_of is None:
            make_keys(folder, "pcr", "platform", "foreign")
        for path in [*keys_of.glob("*.key"), *keys_of.glob("*.pub")] if keys_of else []:
            shutil.copy(path, folder)
        authorized(tpm, "pcr", b"mosinit-uki", "uki.policy")
        authorized(tpm, "platform", b"mosinit-platform", "seal.policy")
        make_storage_key(tpm)
        make_epoch_index(tpm)
        secret = os.urandom(32)
        made = seal(tpm, secret)
        take_ownership(tpm)
        keys = init.policy_keys((folder / "pcr.pub").read_bytes(), (folder / "platform.pub").read_bytes())
        k = start_up(tpm)
        pcrs = init.read_pcrs(k, (init.Pcr(7), init.MEASURED, *init.EXTRA_PCRS))
        name = bytes.fromhex(tpm.run("tpm2_readpublic", "-c", SRK, "-n", "srk.name").decode().split()[1])
        index = init.tpm_name(init.read_epoch_index(k))
    record = init.MachineRecord(PRODUCT, init.secret_proof(secret, PRODUCT), name, index)
    return Material(folder, secret, made, keys, record, pcrs)


@contextmanager
def copy_of(material: Material, folder: Path) -> Iterator[Swtpm]:
    """Switch a copy of the provisioned machine on: its TPM, just started."""
    shutil.copytree(material.folder, folder, ignore=shutil.ignore_patterns("*.sock*", ".lock", "*volatile*"))
    with swtpm(folder) as tpm:
        yield tpm


def open_secret(
    k: TpmMachine,
    material: Material,
    epoch: int = 1,
    *,
    seal: Seal | None = None,
    approval: init.UkiApproval | None = None,
    platform: Mapping[str, bytes] | None = None,
) -> bytes:
    """Do what the bring-up does between reading the header and opening the volume."""
    approval = approval or material.approval(epoch)
    storage_key = init.check_tpm(k, material.record, epoch)
    tokens = material.tokens(seal, platform)
    secret = init.unseal(k, tokens, storage_key, material.keys, approval)
    init.check_secret(material.record, secret)
    return bytes(secret)
