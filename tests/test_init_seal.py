"""Who may open a machine's disk: on a real TPM, against what tpm2-tools and openssl make and refuse."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mosinit import init
from tests.fake import FakeMachine, answer
from tests.sealed import (
    AUTHS,
    INDEX,
    INDEX_ATTRIBUTES,
    SEAL_ATTRIBUTES,
    SRK,
    UKI,
    Material,
    Seal,
    authorized,
    copy_of,
    make_epoch_index,
    make_storage_key,
    open_secret,
    provision,
    start_up,
    take_ownership,
)
from tests.tpms import Swtpm, TpmMachine, swtpm

PCR7, PCR12, PCR13 = init.Pcr(7), *init.EXTRA_PCRS
RETRIES = 50


@pytest.fixture(autouse=True)
def tools(need: Callable[..., None]) -> None:
    """Skip, or fail for CI, where the programs are missing."""
    need("swtpm", "tpm2_create", "openssl")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """One machine, provisioned once."""
    return provision(tmp_path_factory.mktemp("provisioned"))


@pytest.fixture
def tpm(material: Material, tmp_path: Path) -> Iterator[Swtpm]:
    """Its TPM, just switched on."""
    with copy_of(material, tmp_path / "tpm") as running:
        yield running


def refused(check: str, action: Callable[[], object]) -> init.Refused:
    """Expect that refusal."""
    with pytest.raises(init.Refused) as caught:
        action()
    assert caught.value.check == check, caught.value
    return caught.value


# --- The golden vector: what tpm2-tools compute is what the core computes ----------------------------


def test_the_names_are_those_of_tpm2_tools(material: Material) -> None:
    for role, public in (("pcr", material.keys.pcr), ("platform", material.keys.platform)):
        assert init.tpm_name(public) == (material.folder / f"{role}.name").read_bytes()
    assert init.tpm_name(material.keys.epoch_index) == material.record.epoch_index
    assert material.record.storage_key == (material.folder / "srk.name").read_bytes()


def test_the_policies_are_those_of_a_trial_session(material: Material, tpm: Swtpm) -> None:
    start_up(tpm)
    keys, pcrs = material.keys, material.pcrs

    def trial(*steps: tuple[str, ...]) -> bytes:
        tpm.run("tpm2_startauthsession", "-S", "trial.ctx")
        for program, *words in steps:
            tpm.run(program, "-S", "trial.ctx", "-L", "out.policy", *words)
        tpm.run("tpm2_flushcontext", "trial.ctx")
        return (tpm.folder / "out.policy").read_bytes()

    (tpm.folder / "mask").write_bytes(b"\xff" * 7 + b"\xfc")
    nv = ("tpm2_policynv", "-i", "mask", INDEX, "bc")
    unseal = trial(("tpm2_policypcr", "-l", "sha256:11"), nv, ("tpm2_policycommandcode", "TPM2_CC_Unseal"))
    assert keys.uki_policy(pcrs[init.MEASURED], 2, init.Cc.UNSEAL) == unseal
    command = ("tpm2_policycommandcode", "TPM2_CC_NV_SetBits")
    raising = trial(("tpm2_policypcr", "-l", "sha256:11"), nv, command)
    assert keys.uki_policy(pcrs[init.MEASURED], 2, init.Cc.NV_SETBITS) == raising
    (tpm.folder / "ref").write_bytes(b"mosinit-uki")
    inner = ("tpm2_policyauthorize", "-n", "pcr.name", "-q", "ref")
    outer = trial(inner, ("tpm2_policypcr", "-l", "sha256:7,12,13"), nv)
    assert keys.platform_policy(pcrs[PCR7], 2) == outer
    assert keys.seal == (material.folder / "seal.policy").read_bytes()


def test_pcrs_and_banks_are_those_of_tpm2_tools(tpm: Swtpm) -> None:
    k = start_up(tpm)
    tpm.run("tpm2_pcrread", "-o", "values", "sha256:7,11,12,13")
    seen = init.read_pcrs(k, (PCR7, init.MEASURED, PCR12, PCR13))
    assert (tpm.folder / "values").read_bytes() == b"".join(seen[pcr] for pcr in sorted(seen))
    assert init.active_banks(k) == ["sha1", "sha256", "sha384", "sha512"]
    tpm.run("tpm2_pcrallocate", "-P", "", "sha1:none+sha256:all+sha384:none+sha512:none")
    tpm.reset()
    assert init.active_banks(k) == ["sha256"]


def test_the_structures_are_those_of_tpm2_pytss(material: Material, tpm: Swtpm) -> None:
    """Each area that the core makes or takes apart is read by another library, and comes out the same."""
    types = pytest.importorskip("tpm2_pytss.types")
    k = start_up(tpm)

    def read(kind: str, data: bytes) -> Any:
        structure, used = getattr(types, kind).unmarshal(data)
        assert (used, bytes(structure.marshal())) == (len(data), data)
        return structure

    storage_key, index = init.read_storage_key(k) or b"", init.read_epoch_index(k)
    for area in (material.keys.pcr, material.keys.platform, storage_key, material.seal.public):
        assert bytes(read("TPMT_PUBLIC", area).get_name()) == init.tpm_name(area)
    assert bytes(read("TPMS_NV_PUBLIC", index).get_name()) == init.tpm_name(index)
    theirs = types.TPML_PCR_SELECTION.parse("sha256:7,12,13")
    assert init.pcr_selection([PCR7, PCR12, PCR13]) == bytes(theirs.marshal())
    session = read("TPMT_SYM_DEF", init.SALTED_POLICY[1:7])
    assert (session.algorithm, session.keyBits.sym, session.mode.sym) == (0x0006, 128, 0x0043)


# --- It opens ----------------------------------------------------------------------------------------


def test_it_opens_before_the_fence_and_again_after_a_restart(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    assert open_secret(k, material) == material.secret
    tpm.reset()
    k = start_up(tpm)
    assert open_secret(k, material) == material.secret
    assert len(k.commands) < 30
    assert k.report.facts["tpm_epoch"] == 1


def test_nothing_of_it_is_left_in_the_tpm(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    for _ in range(5):  # a TPM has room for three objects and as many sessions
        open_secret(k, material)
    for kind in ("handles-transient", "handles-loaded-session"):
        assert tpm.run("tpm2_getcap", kind) == b""


def test_the_secret_never_crosses_the_bus_in_clear(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    wire: list[bytes] = []
    direct = k.tpm

    def tapped(command: bytes) -> bytes:
        wire.extend((command, direct(command)))
        return wire[-1]

    k.tpm = tapped  # type: ignore[method-assign]
    assert open_secret(k, material) == material.secret
    assert not any(material.secret[:8] in message for message in wire)


# --- Each of these off by one event: it stays closed -------------------------------------------------

STATES: list[tuple[str, str, Callable[[TpmMachine], None]]] = [
    ("PCR 7 one event more", "TPM-POLICY", lambda k: init.extend_pcr(k, PCR7, b"x")),
    ("PCR 12 not zero", "TPM-POLICY", lambda k: init.extend_pcr(k, PCR12, b"x")),
    ("PCR 13 not zero", "TPM-POLICY", lambda k: init.extend_pcr(k, PCR13, b"x")),
    ("PCR 11 one event more", "TPM-APPROVAL", lambda k: init.extend_pcr(k, init.MEASURED, b"x")),
    ("after the fence", "TPM-APPROVAL", init.fence),
]


@pytest.mark.parametrize(("check", "change"), [state[1:] for state in STATES], ids=[s[0] for s in STATES])
def test_another_state_does_not_open(
    material: Material, tpm: Swtpm, check: str, change: Callable[[TpmMachine], None]
) -> None:
    k = start_up(tpm)
    change(k)
    refused(check, lambda: open_secret(k, material))


def test_before_enter_initrd_it_does_not_open(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm, enter=False)
    refused("TPM-APPROVAL", lambda: open_secret(k, material))


def test_another_uki_does_not_open(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm, uki=UKI + b" of somebody else")
    refused("TPM-APPROVAL", lambda: open_secret(k, material))


def test_approvals_of_another_key_do_not_count(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    foreign = material.approval(role="foreign")
    refused("TPM-APPROVAL", lambda: open_secret(k, material, approval=foreign))
    swapped = material.approval(role="platform")
    refused("TPM-APPROVAL", lambda: open_secret(k, material, approval=swapped))
    refused("TPM-APPROVAL", lambda: open_secret(k, material, platform=material.platform(role="foreign")))
    refused("TPM-APPROVAL", lambda: open_secret(k, material, platform=material.platform(role="pcr")))


def test_an_approval_for_another_command_does_not_count(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    good = material.approval()
    refused("TPM-APPROVAL", lambda: open_secret(k, material, approval=good._replace(unseal=good.set_epoch)))
    # The same policy under the policyRef of another kind.
    policy = material.keys.uki_policy(material.pcrs[init.MEASURED], 1, init.Cc.UNSEAL)
    mixed = good._replace(unseal=material.sign("pcr", policy + init.PLATFORM_REF))
    refused("TPM-APPROVAL", lambda: open_secret(k, material, approval=mixed))


def test_a_pcr_7_that_nobody_approved_is_named(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm, firmware=b"another firmware")
    error = refused("TPM-POLICY", lambda: open_secret(k, material))
    assert error.seen == init.read_pcr(k, PCR7).hex()
    assert material.pcrs[PCR7].hex() in error.expected


def test_an_approval_of_the_new_pcr_7_opens(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm, firmware=b"another firmware")
    both = {**material.platform(), **material.platform(init.read_pcr(k, PCR7))}
    assert open_secret(k, material, platform=both) == material.secret


def test_an_approval_of_another_machine_replayed_for_this_one_does_not_open(
    material: Material, tpm: Swtpm
) -> None:
    k = start_up(tpm, firmware=b"changed by an attacker")
    here, (approved,) = init.read_pcr(k, PCR7).hex(), material.platform().values()
    refused("TPM-APPROVAL", lambda: open_secret(k, material, platform={here: approved}))


# --- Epochs: what was good once is not good for ever -------------------------------------------------


def test_a_stale_epoch_stays_closed_with_whatever_header(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    storage_key = init.check_tpm(k, material.record, 2)
    init.raise_epoch(k, material.tokens(), storage_key, material.keys, material.approval(2), 2)
    assert init.read_epoch(k) == 0b11
    tpm.reset()
    k = start_up(tpm)
    # The header of before, whole: seal, approvals and record are those of the first test.
    error = refused("EPOCH", lambda: open_secret(k, material, 1))
    assert error.seen == "epoch 2"
    # Our own check left out, the TPM says the same.
    storage_key = init.read_storage_key(k) or b""
    stale = (material.tokens(), storage_key, material.keys, material.approval(1))
    refused("EPOCH", lambda: init.unseal(k, *stale))
    # The old approval called a newer one.
    lying = material.approval(1)._replace(epoch=2)
    refused("TPM-APPROVAL", lambda: open_secret(k, material, 2, approval=lying))
    assert open_secret(k, material, 2) == material.secret


def test_an_epoch_is_never_raised_above_the_uki_s_own(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    storage_key = init.check_tpm(k, material.record, 3)
    init.raise_epoch(k, material.tokens(), storage_key, material.keys, material.approval(3), 64)
    assert init.read_epoch(k) == 0b111
    k.commands.clear()
    init.raise_epoch(k, material.tokens(), storage_key, material.keys, material.approval(3), 2)
    assert init.Cc.NV_SETBITS not in k.commands


def test_after_the_fence_no_epoch_bit_is_set(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    storage_key = init.check_tpm(k, material.record, 2)
    init.fence(k)
    refused(
        "TPM-APPROVAL",
        lambda: init.raise_epoch(k, material.tokens(), storage_key, material.keys, material.approval(2), 2),
    )
    assert init.read_epoch(k) == 1


def test_in_a_firmware_that_is_not_approved_no_epoch_bit_is_set(material: Material, tpm: Swtpm) -> None:
    """PCR 11 can be replayed where Secure Boot is off; who does that must not use epochs up."""
    k = start_up(tpm, firmware=b"Secure Boot is off")
    storage_key = init.check_tpm(k, material.record, 2)
    here, (approved,) = init.read_pcr(k, PCR7).hex(), material.platform().values()
    for check, platform in (("TPM-POLICY", material.platform()), ("TPM-APPROVAL", {here: approved})):
        tokens = material.tokens(None, platform)
        raising = (tokens, storage_key, material.keys, material.approval(2), 2)
        refused(check, lambda raising=raising: init.raise_epoch(k, *raising))  # type: ignore[misc]
    assert init.read_epoch(k) == 1


def test_an_approval_of_a_firmware_ends_with_its_epoch(material: Material, tpm: Swtpm) -> None:
    """Otherwise a loader that turned out to be bad could never be revoked: its PCR 7 stays what it was."""
    k = start_up(tpm)
    storage_key = init.check_tpm(k, material.record, 3)
    init.raise_epoch(k, material.tokens(), storage_key, material.keys, material.approval(3), 3)
    assert open_secret(k, material, 3) == material.secret
    stale = material.platform(epoch=2)
    error = refused("TPM-APPROVAL", lambda: open_secret(k, material, 3, platform=stale))
    assert "up to epoch 2, the TPM is at 3" in error.seen
    lying = {pcr7: approval._replace(epoch=3) for pcr7, approval in stale.items()}
    refused("TPM-APPROVAL", lambda: open_secret(k, material, 3, platform=lying))


def test_an_epoch_is_never_raised_above_what_the_firmware_is_approved_for(
    material: Material, tpm: Swtpm
) -> None:
    """The next boot would find no approval that holds. Nothing opens with one that is older than the UKI: it
    would keep the TPM from that UKI's epoch.
    """
    k = start_up(tpm)
    storage_key = init.check_tpm(k, material.record, 3)
    tokens = material.tokens(None, material.platform(epoch=2))
    before = init.read_epoch(k)
    refused(
        "TPM-APPROVAL",
        lambda: init.raise_epoch(k, tokens, storage_key, material.keys, material.approval(3), 3),
    )
    assert init.read_epoch(k) == before
    refused("TPM-APPROVAL", lambda: open_secret(k, material, 3, platform=tokens.approvals))
    init.raise_epoch(k, tokens, storage_key, material.keys, material.approval(2), 3)
    assert init.read_epoch(k) == 0b11
    assert open_secret(k, material, 2, platform=tokens.approvals) == material.secret


def test_a_revoked_uki_cannot_use_epochs_up(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    storage_key = init.check_tpm(k, material.record, 3)
    init.raise_epoch(k, material.tokens(), storage_key, material.keys, material.approval(2), 2)
    old = material.approval(1)
    with init.asking_tpm("x"):
        session = init.Session(k, storage_key)
        with pytest.raises(init.TpmError, match="POLICY_NV"):
            init.satisfy(k, session, material.tokens(), material.keys, old, init.Cc.NV_SETBITS)
        init.flush(k, session.handle)


def test_all_64_epochs_can_be_told_apart() -> None:
    assert init.epoch_bits(64) == (1 << 64) - 1
    assert len({init.policy_epoch(init.POLICY_START, b"name", epoch) for epoch in range(1, 65)}) == 64


# --- Root of the running system, after the fence: everything is tried with tpm2-tools ----------------

ROOT_TRIES = [
    ("tpm2_nvsetbits", "-C", INDEX, "-i", "2", INDEX),
    ("tpm2_nvsetbits", "-C", "o", "-i", "2", INDEX),
    ("tpm2_nvundefine", "-C", "o", INDEX),
    ("tpm2_nvwrite", "-C", "o", "-i", "mask", INDEX),
    ("tpm2_nvdefine", "-C", "o", "-s", "8", "-a", INDEX_ATTRIBUTES, "0x1845051"),
    ("tpm2_evictcontrol", "-C", "o", "-c", SRK),
    ("tpm2_clear", "-c", "l"),
    ("tpm2_clear", "-c", "p"),
    ("tpm2_changeauth", "-c", "o", "mine"),
    ("tpm2_clearcontrol", "-C", "l", "c"),
    ("tpm2_unseal", "-c", "seal.ctx"),
    ("tpm2_unseal", "-c", "seal.ctx", "-p", "session:policy.ctx"),
    ("tpm2_pcrreset", "11"),
]


@pytest.mark.parametrize("words", ROOT_TRIES, ids=[" ".join(words[:3]) for words in ROOT_TRIES])
def test_root_after_the_fence_can_do_nothing(material: Material, tpm: Swtpm, words: tuple[str, ...]) -> None:
    k = start_up(tpm)
    init.fence(k)
    (tpm.folder / "mask").write_bytes(bytes(8))
    tpm.run("tpm2_load", "-C", SRK, "-u", "seal.pub", "-r", "seal.priv", "-c", "seal.ctx")
    tpm.run("tpm2_flushcontext", "-t")
    if "session:policy.ctx" in words:
        # The best session that root can make: the real outer approval over an inner one that does not fit.
        tpm.run("tpm2_startauthsession", "--policy-session", "-S", "policy.ctx")
        tpm.run("tpm2_policypcr", "-S", "policy.ctx", "-l", "sha256:7,12,13")
    tpm.run(*words, fails=True)
    assert init.read_epoch(k) == 1
    tpm.reset()
    assert open_secret(start_up(tpm), material) == material.secret


def test_premise_those_commands_work_for_who_has_the_passwords(material: Material, tpm: Swtpm) -> None:
    """Otherwise the tests above would prove nothing: the same words, with what root does not have."""
    start_up(tpm)
    tpm.run("tpm2_nvsetbits", "-C", "o", "-P", AUTHS["owner"], "-i", "2", INDEX)
    tpm.run("tpm2_nvundefine", "-C", "o", "-P", AUTHS["owner"], INDEX)
    tpm.run("tpm2_nvdefine", "-C", "o", "-P", AUTHS["owner"], "-s", "8", "-a", INDEX_ATTRIBUTES, "0x1845051")
    tpm.run("tpm2_evictcontrol", "-C", "o", "-P", AUTHS["owner"], "-c", SRK)
    tpm.run("tpm2_clearcontrol", "-C", "p", "c")
    tpm.run("tpm2_clear", "-c", "l", AUTHS["lockout"])


def test_premise_the_tpm_itself_wants_both_approvals(material: Material, tpm: Swtpm) -> None:
    """tpm2-tools open the seal with both approvals, and do not with either alone."""
    start_up(tpm)
    folder, keys, pcr11 = tpm.folder, material.keys, material.pcrs[init.MEASURED]
    approval = material.approval()
    tpm.run("tpm2_load", "-C", SRK, "-u", "seal.pub", "-r", "seal.priv", "-c", "seal.ctx")
    tpm.run("tpm2_flushcontext", "-t")

    def authorize(role: str, policy: bytes, reference: bytes, signature: bytes) -> None:
        (folder / "policy").write_bytes(policy)
        (folder / "ref").write_bytes(reference)
        (folder / "signature").write_bytes(signature)
        (folder / "message").write_bytes(policy + reference)
        tpm.run("tpm2_loadexternal", "-C", "o", "-G", "rsa", "-u", f"{role}.pub", "-c", "key.ctx")
        tpm.run("tpm2_verifysignature", "-c", "key.ctx", "-g", "sha256", "-m", "message", "-s", "signature",
                "-t", "ticket", "-f", "rsassa")  # fmt: skip
        tpm.run("tpm2_flushcontext", "-t")
        tpm.run("tpm2_policyauthorize", "-S", "s.ctx", "-i", "policy", "-n", f"{role}.name", "-q", "ref",
                "-t", "ticket")  # fmt: skip

    def session(*, inner: bool, outer: bool) -> None:
        tpm.run("tpm2_startauthsession", "--policy-session", "-S", "s.ctx")
        if inner:
            (folder / "mask").write_bytes(b"\xff" * 7 + b"\xfe")
            tpm.run("tpm2_policypcr", "-S", "s.ctx", "-l", "sha256:11")
            tpm.run("tpm2_policynv", "-S", "s.ctx", "-i", "mask", INDEX, "bc")
            tpm.run("tpm2_policycommandcode", "-S", "s.ctx", "TPM2_CC_Unseal")
            authorize("pcr", keys.uki_policy(pcr11, 1, init.Cc.UNSEAL), b"mosinit-uki", approval.unseal)
        if outer:
            (folder / "mask").write_bytes(b"\xff" * 7 + b"\xf8")
            tpm.run("tpm2_policypcr", "-S", "s.ctx", "-l", "sha256:7,12,13")
            tpm.run("tpm2_policynv", "-S", "s.ctx", "-i", "mask", INDEX, "bc")
            pcr7 = material.pcrs[PCR7]
            approved = material.platform()[pcr7.hex()]
            authorize("platform", keys.platform_policy(pcr7, 3), b"mosinit-platform", approved.signature)

    session(inner=True, outer=True)
    assert tpm.run("tpm2_unseal", "-c", "seal.ctx", "-p", "session:s.ctx") == material.secret
    tpm.run("tpm2_flushcontext", "-l")
    session(inner=True, outer=False)
    tpm.run("tpm2_unseal", "-c", "seal.ctx", "-p", "session:s.ctx", fails=True)
    tpm.run("tpm2_flushcontext", "-l")
    with pytest.raises(AssertionError, match="policyauthorize"):
        session(inner=False, outer=True)


# --- The TPM itself: absent parts, another one, cleared, recreated -----------------------------------


def test_another_tpm_is_refused_as_that(material: Material, tmp_path: Path) -> None:
    other = provision(tmp_path / "other", keys_of=material.folder)
    with copy_of(other, tmp_path / "running") as tpm:
        k = start_up(tpm)
        refused("TPM-IDENTITY", lambda: open_secret(k, material))
        # Even with a record that names the other one: the sealed object does not load there.
        refused("TPM-SEAL", lambda: open_secret(k, material._replace(record=other.record)))


@pytest.mark.parametrize("hierarchy", ["l", "p"])
def test_a_cleared_tpm_is_refused_as_that(material: Material, tpm: Swtpm, hierarchy: str) -> None:
    tpm.run("tpm2_clearcontrol", "-C", "p", "c")  # only the firmware can do that
    tpm.run("tpm2_clear", "-c", hierarchy, *([AUTHS["lockout"]] if hierarchy == "l" else []))
    k = start_up(tpm)
    refused("TPM-CLEARED", lambda: open_secret(k, material))
    # An attacker makes everything again, but without passwords.
    make_storage_key(tpm)
    make_epoch_index(tpm)
    refused("TPM-CLEARED", lambda: open_secret(k, material))
    # And with passwords: then it is another machine.
    take_ownership(tpm, dict.fromkeys(AUTHS, "mine"))
    refused("TPM-IDENTITY", lambda: open_secret(k, material))


def test_parts_that_are_missing_or_wrong_are_told_apart(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    owner = ("-P", AUTHS["owner"])
    tpm.run("tpm2_nvundefine", "-C", "o", *owner, INDEX)
    refused("TPM-INDEX", lambda: open_secret(k, material))
    tpm.run(
        "tpm2_nvdefine", "-C", "o", *owner, "-s", "8", "-a", INDEX_ATTRIBUTES, "-L", "seal.policy", INDEX
    )
    refused("TPM-INDEX", lambda: open_secret(k, material))  # never written: no bit says anything
    tpm.run("tpm2_nvundefine", "-C", "o", *owner, INDEX)
    wider = f"{INDEX_ATTRIBUTES}|authwrite"
    tpm.run("tpm2_nvdefine", "-C", "o", *owner, "-s", "8", "-a", wider, "-L", "seal.policy", INDEX)
    tpm.run("tpm2_nvsetbits", "-C", "o", *owner, "-i", "1", INDEX)
    refused("TPM-INDEX", lambda: open_secret(k, material))
    tpm.run("tpm2_evictcontrol", "-C", "o", *owner, "-c", SRK)
    refused("TPM-SRK", lambda: open_secret(k, material))


def test_an_epoch_index_under_another_policy_is_refused(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    owner = ("-P", AUTHS["owner"])
    tpm.run("tpm2_nvundefine", "-C", "o", *owner, INDEX)
    tpm.run(
        "tpm2_loadexternal", "-C", "o", "-G", "rsa", "-u", "foreign.pub", "-c", "k.ctx", "-n", "foreign.name"
    )
    tpm.run("tpm2_flushcontext", "-t")
    authorized(tpm, "foreign", b"mosinit-platform", "mine.policy")
    tpm.run(
        "tpm2_nvdefine", "-C", "o", *owner, "-s", "8", "-a", INDEX_ATTRIBUTES, "-L", "mine.policy", INDEX
    )
    tpm.run("tpm2_nvsetbits", "-C", "o", *owner, "-i", "1", INDEX)
    refused("TPM-INDEX", lambda: open_secret(k, material))


def test_a_half_provisioned_tpm_is_refused(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    tpm.run("tpm2_changeauth", "-c", "o", "-p", AUTHS["owner"])  # as if it had never been set
    error = refused("TPM-STATE", lambda: open_secret(k, material))
    assert "OWNER_AUTH" in error.expected and "OWNER_AUTH" not in error.seen


def test_a_disabled_hierarchy_is_refused(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    tpm.run("tpm2_hierarchycontrol", "-C", "p", "shEnable", "clear")
    refused("TPM-STATE", lambda: open_secret(k, material))


def test_a_dictionary_lockout_is_noted_and_does_not_keep_the_machine_from_booting(
    material: Material, tpm: Swtpm
) -> None:
    """Else whoever is root for a moment could lock the machine up: the seal counts no wrong passwords."""
    k = start_up(tpm)
    lock_out(tpm)
    assert open_secret(k, material) == material.secret
    assert k.report.facts["tpm_locked_out"] is True


def lock_out(tpm: Swtpm) -> None:
    """Spend the wrong passwords that a TPM allows."""
    tpm.run("tpm2_dictionarylockout", "-s", "-n", "1", "-t", "600", "-l", "600", "-p", AUTHS["lockout"])
    tpm.run("tpm2_create", "-C", SRK, "-i", "-", "-p", "right", "-u", "da.pub", "-r", "da.priv", data=b"x")
    tpm.run("tpm2_load", "-C", SRK, "-u", "da.pub", "-r", "da.priv", "-c", "da.ctx")
    tpm.run("tpm2_flushcontext", "-t")
    tpm.run("tpm2_unseal", "-c", "da.ctx", "-p", "wrong", fails=True)
    assert b"inLockout:                 1" in tpm.run("tpm2_getcap", "properties-variable")


# --- The volume: somebody else's ---------------------------------------------------------------------


def test_a_volume_that_an_attacker_sealed_to_the_public_policy_is_refused(
    material: Material, tpm: Swtpm
) -> None:
    k = start_up(tpm)
    tpm.run("tpm2_create", "-C", SRK, "-i", "-", "-u", "own.pub", "-r", "own.priv", "-a", SEAL_ATTRIBUTES,
            "-L", "seal.policy", data=os.urandom(32))  # fmt: skip
    tpm.run("tpm2_flushcontext", "-t")
    own = Seal((tpm.folder / "own.pub").read_bytes()[2:], (tpm.folder / "own.priv").read_bytes()[2:])
    refused("VOLUME-IDENTITY", lambda: open_secret(k, material, seal=own))


@pytest.mark.parametrize("size", [1, 31, 33, 64, 128])
def test_a_secret_of_another_size_is_refused(material: Material, tpm: Swtpm, size: int) -> None:
    k = start_up(tpm)
    tpm.run("tpm2_create", "-C", SRK, "-i", "-", "-u", "own.pub", "-r", "own.priv", "-a", SEAL_ATTRIBUTES,
            "-L", "seal.policy", data=os.urandom(size))  # fmt: skip
    tpm.run("tpm2_flushcontext", "-t")
    own = Seal((tpm.folder / "own.pub").read_bytes()[2:], (tpm.folder / "own.priv").read_bytes()[2:])
    refused("VOLUME-IDENTITY", lambda: open_secret(k, material, seal=own))


@pytest.mark.parametrize(
    "attributes", [f"{SEAL_ATTRIBUTES}|userwithauth", "adminwithpolicy|noda", "fixedtpm|fixedparent|noda"]
)
def test_a_seal_of_other_attributes_is_refused(material: Material, tpm: Swtpm, attributes: str) -> None:
    k = start_up(tpm)
    tpm.run("tpm2_create", "-C", SRK, "-i", "-", "-u", "own.pub", "-r", "own.priv", "-a", attributes,
            "-L", "seal.policy", data=material.secret)  # fmt: skip
    tpm.run("tpm2_flushcontext", "-t")
    own = Seal((tpm.folder / "own.pub").read_bytes()[2:], (tpm.folder / "own.priv").read_bytes()[2:])
    refused("TPM-SEAL", lambda: open_secret(k, material, seal=own))


def test_a_damaged_seal_is_refused(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    public, private = material.seal
    for broken in (
        Seal(public, private[:-1] + bytes([private[-1] ^ 1])),
        Seal(public, private[:-1]),
        Seal(public, b""),
        Seal(public[:-1] + bytes([public[-1] ^ 1]), private),
        Seal(public + b"\0", private),
        Seal(b"", private),
    ):
        with pytest.raises(init.Refused) as caught:
            open_secret(k, material, seal=broken)
        assert caught.value.check in ("TPM-SEAL", "TPM-ANSWER")
    assert open_secret(k, material) == material.secret


# --- Whatever the TPM answers ------------------------------------------------------------------------


def test_an_interposer_cannot_change_the_secret_or_an_epoch(material: Material, tpm: Swtpm) -> None:
    """Every bit of the answer to the commands that a session protects, flipped: never taken for true."""
    k = start_up(tpm)
    direct = k.tpm
    for position in range(10, 14 + 34 + 34 + 1 + 34, 3):  # sizes, secret, nonce, attributes, proof

        def flipping(command: bytes, position: int = position) -> bytes:
            told = bytearray(direct(command))
            if command[6:10] == struct.pack(">I", init.Cc.UNSEAL):
                told[position] ^= 4
            return bytes(told)

        k.tpm = flipping  # type: ignore[method-assign]
        refused("TPM-ANSWER", lambda: open_secret(k, material))


def test_an_old_answer_is_not_taken_again(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    direct, kept = k.tpm, []

    def keeping(command: bytes) -> bytes:
        told = direct(command)
        if command[6:10] == struct.pack(">I", init.Cc.UNSEAL):
            kept.append(told)
            return kept[0]
        return told

    k.tpm = keeping  # type: ignore[method-assign]
    assert open_secret(k, material) == material.secret
    refused("TPM-ANSWER", lambda: open_secret(k, material))


ANSWERS: list[Callable[[bytes, random.Random], bytes]] = [
    lambda told, _: b"",
    lambda told, rng: told[: rng.randrange(len(told))],
    lambda told, rng: told + bytes(rng.randrange(1, 30)),
    lambda told, rng: rng.randbytes(4096),
    lambda told, rng: told[:10] + rng.randbytes(len(told) - 10),
    lambda told, rng: told[:10] + b"\xff" * (len(told) - 10),
    lambda told, rng: told[:10] + bytes(len(told) - 10),
    lambda told, rng: answer(told[10:], 0, 0x8001 + rng.randrange(2)),
    lambda told, rng: answer(rng.randbytes(rng.randrange(80))),
    lambda told, rng: answer(b"", rng.choice((0x101, 0x18B, 0x1DF, 0x99D, 0x921, 0x126, 0x910, 0xFFFFFFFF))),
    lambda told, rng: answer(b"", init.TPM_RETRY[0]),
]


@pytest.mark.parametrize("kind", range(len(ANSWERS)))
def test_whatever_the_tpm_answers_is_a_refusal_within_bounds(
    material: Material, tpm: Swtpm, kind: int
) -> None:
    k = start_up(tpm)
    open_secret(k, material)
    count, direct, rng = len(k.commands), k.tpm, random.Random(kind)
    for wrong in range(count):
        k.commands.clear()

        def lying(command: bytes, wrong: int = wrong) -> bytes:
            told = direct(command)
            return ANSWERS[kind](told, rng) if len(k.commands) > wrong else told

        k.tpm = lying  # type: ignore[method-assign]
        try:
            secret = open_secret(k, material)
        except init.Refused as error:
            assert error.check in init.CHECKS
        else:
            assert secret == material.secret  # what was spoilt was not looked at, such as a flush
        assert len(k.commands) <= count + 4 * RETRIES  # one command, and three flushes that nobody waits for
        k.tpm = direct  # type: ignore[method-assign]
        tpm.forget()
    assert open_secret(k, material) == material.secret  # nothing was refused as it was full


PROPERTIES = struct.Struct(">BII IIII")
ONE_PCR = struct.pack(">I", 0) + init.pcr_selection([PCR7]) + struct.pack(">I", 1)
MALFORMED: list[tuple[Callable[[init.Kernel], object], bytes]] = [
    (init.read_tpm_flags, answer(PROPERTIES.pack(0, 6, 2, 0x200, 0, 0x201, 0))[:-1]),
    (init.read_tpm_flags, answer(PROPERTIES.pack(0, 6, 2, 0x200, 0, 0x201, 0)) + b"\0"),
    (init.read_tpm_flags, answer(PROPERTIES.pack(0, 6, 2, 0x200, 0, 0x201, 0) + b"\0")),
    (init.read_tpm_flags, answer(PROPERTIES.pack(0, 6, 2, 0x200, 0, 0x201, 0), tag=init.ST_SESSIONS)),
    (init.read_tpm_flags, answer(PROPERTIES.pack(0, 6, 2, 0x200, 0, 0x202, 0))),
    (init.read_tpm_flags, answer(PROPERTIES.pack(0, 6, 2, 0x200, 0, 0x200, 0))),
    (init.read_tpm_flags, answer(PROPERTIES.pack(0, 6, 1, 0x200, 0, 0x201, 0))),
    (init.read_tpm_flags, answer(PROPERTIES.pack(0, 5, 2, 0x200, 0, 0x201, 0))),
    (lambda k: init.read_pcr(k, PCR7), answer(ONE_PCR + struct.pack(">H", 20) + bytes(20))),
    (lambda k: init.read_pcr(k, PCR7), answer(ONE_PCR + struct.pack(">H", 32) + bytes(31))),
    (lambda k: init.read_pcr(k, PCR7), answer(ONE_PCR + struct.pack(">H", 32) + bytes(33))),
    (lambda k: init.read_pcr(k, PCR12), answer(ONE_PCR + struct.pack(">H", 32) + bytes(32))),
    (init.read_epoch, answer(struct.pack(">IH", 9, 7) + bytes(7), tag=init.ST_SESSIONS)),
    (init.read_storage_key, answer(b"\xff\xff")),
    (init.read_epoch_index, answer(b"")),
]


def test_premise_those_answers_are_taken_when_they_are_whole() -> None:
    k = FakeMachine()
    k.tpm = lambda command: answer(PROPERTIES.pack(0, 6, 2, 0x200, 7, 0x201, 2))  # type: ignore[method-assign]
    assert init.read_tpm_flags(k) == (7, 2)
    k.tpm = lambda command: answer(ONE_PCR + struct.pack(">H", 32) + bytes(32))  # type: ignore[method-assign]
    assert init.read_pcr(k, PCR7) == bytes(32)


@pytest.mark.parametrize(("ask", "told"), MALFORMED)
def test_an_answer_is_read_strictly(ask: Callable[[init.Kernel], object], told: bytes) -> None:
    k = FakeMachine()
    k.tpm = lambda command: told  # type: ignore[method-assign]
    with pytest.raises(init.TpmError) as error:
        ask(k)
    assert error.value.code == 0


def test_an_epoch_that_the_tpm_only_says_it_took_is_refused(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    storage_key, direct = init.check_tpm(k, material.record, 2), k.tpm

    def forgetful(command: bytes) -> bytes:
        told = direct(command)
        read = command[6:10] == struct.pack(">I", init.Cc.NV_READ)
        return (
            told[:-6] + b"\1" + told[-5:] if read else told
        )  # the last byte of the index, before the session's

    k.tpm = forgetful  # type: ignore[method-assign]
    raising = (material.tokens(), storage_key, material.keys, material.approval(2), 2)
    refused("EPOCH", lambda: init.raise_epoch(k, *raising))


def test_a_lockout_of_the_tpm_has_a_name(material: Material, tpm: Swtpm) -> None:
    k = start_up(tpm)
    direct = k.tpm

    def locked(command: bytes) -> bytes:
        return answer(b"", 0x921) if command[6:10] == struct.pack(">I", init.Cc.LOAD) else direct(command)

    k.tpm = locked  # type: ignore[method-assign]
    refused("TPM-LOCKOUT", lambda: open_secret(k, material))


def test_a_tpm_that_is_gone_in_the_middle_is_refused(material: Material, tmp_path: Path) -> None:
    with swtpm(tmp_path / "empty") as empty:
        k = TpmMachine(empty)
    refused("TPM-ANSWER", lambda: open_secret(k, material))


# --- Approvals as the stub hands them over -----------------------------------------------------------


GOOD_APPROVAL: dict[str, object] = {"schema": 1, "epoch": 3, "unseal": "ab" * 256, "set_epoch": "cd" * 256}
APPROVAL_FAULTS = [
    json.dumps({**GOOD_APPROVAL, **change}).encode()
    for change in ({"schema": 2}, {"epoch": 0}, {"epoch": 65}, {"epoch": True}, {"epoch": "3"},
                   {"unseal": "ab"}, {"unseal": None}, {"set_epoch": "AB" * 256}, {"more": 1})
]  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        *APPROVAL_FAULTS,
        b"",
        b"[]",
        b"{",
        b'{"schema":1}',
        b"\xff",
        json.dumps(GOOD_APPROVAL).encode() + b"x",
    ],
)
def test_an_approval_is_read_strictly(data: bytes) -> None:
    good = json.dumps(GOOD_APPROVAL).encode()
    assert init.parse_uki_approval(good) == (3, b"\xab" * 256, b"\xcd" * 256)
    refused("TPM-APPROVAL", lambda: init.parse_uki_approval(data))


def test_only_rsa_2048_keys_approve(material: Material) -> None:
    good = (material.folder / "pcr.pub").read_bytes()
    from tests.sealed import openssl

    for words in (("genrsa", "3072"), ("ecparam", "-name", "prime256v1", "-genkey", "-noout")):
        key = openssl(*words)
        public = openssl("pkey", "-pubout", data=key)
        with pytest.raises(ValueError, match="RSA-2048"):
            init.policy_keys(public, good)
