"""Provisioning in steps: policies that others planted, interruptions, answers, and beginning anew."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from mosinit import approvals, enroll, exchange, init, keys, provision, records
from mosinit import tpm as tpms
from mosinit.host import Failure
from tests.eventlogs import encode_log, measured
from tests.provisioned import (
    PASSWORDS,
    WRITES,
    Site,
    boot,
    disable_endorsement,
    open_config,
    remedy,
    set_lockout,
    writes,
)
from tests.tpms import Breaking

# --- Policies that others planted ---------------------------------------------------------------------


def plant(site: Site) -> None:
    """Let whoever knows no password do everything with owner, endorsement and lockout."""
    run = site.tpm.run
    run("tpm2_startauthsession", "-S", "s.ctx")
    run("tpm2_policycommandcode", "-S", "s.ctx", "-L", "planted", "TPM2_CC_NV_UndefineSpace")
    run("tpm2_flushcontext", "s.ctx")
    for hierarchy in ("o", "e", "l"):
        run("tpm2_setprimarypolicy", "-C", hierarchy, "-L", "planted", "-g", "sha256")


def planted(site: Site) -> list[str]:
    with tpms.open_tpm(site.tpm.tcti) as machine:
        return machine.policies()


@pytest.mark.parametrize("when", ["before the request", "before the answer"])
def test_policies_that_others_planted_are_removed(
    site: Site, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if when == "before the request":
        plant(site)
    site.request()
    assert planted(site) == []
    site.enroll()
    if when == "before the answer":
        plant(site)
    site.finish()
    assert planted(site) == []
    assert "policy of lockout, endorsement, owner" in capsys.readouterr().err
    run = site.tpm.run
    run("tpm2_startauthsession", "--policy-session", "-S", "s.ctx")
    run("tpm2_policycommandcode", "-S", "s.ctx", "TPM2_CC_NV_UndefineSpace")
    run("tpm2_nvundefine", "-C", "o", "-P", "session:s.ctx", hex(init.EPOCH_INDEX), fails=True)


# --- Run twice, and interrupted ------------------------------------------------------------------------


def test_a_request_is_told_again(site: Site) -> None:
    first = site.request()
    assert first["next"] == (
        f"take {site.state}/request.json to where the keyset is, there `mosinit enroll request.json --keys "
        f"KEYSET --out answer.json`, then here `mosinit provision --dir {site.state} --answer answer.json "
        f"--tpm {site.tpm.tcti}`"
    )
    content = (site.state / "request.json").read_bytes()
    assert site.request() == first
    assert (site.state / "request.json").read_bytes() == content


def test_what_a_killed_run_left_is_removed(site: Site) -> None:
    """Not what another one is using, nor what others made, nor what was made just now."""
    old, new, link, foreign = (
        site.folder / f".mosinit-{name}" for name in ("old", "new", "link", "foreign")
    )
    for folder in (old, new, foreign):
        (folder / "state").mkdir(parents=True)
        (folder / "state/auths.json").write_text("{}")
    link.symlink_to(new)
    os.chown(foreign, 65534, -1)
    with site.host.scratch(near=site.state) as used:
        for folder in (old, foreign, used):
            os.utime(folder, (0, 0))
        site.request()
        assert used.exists()
    assert not old.exists()
    assert all((folder / "state/auths.json").exists() for folder in (new, link, foreign))


def test_a_state_of_other_things_is_not_touched(site: Site) -> None:
    site.request()
    with pytest.raises(Failure, match="for another TPM or epoch: remove it"):
        site.request(epoch=2)
    site.tpm.clear()
    site.start()
    with pytest.raises(Failure, match="for another TPM or epoch: remove it"):
        site.request()
    (site.folder / "something").mkdir(mode=0o700)
    with pytest.raises(Failure, match="is not what `mosinit provision") as told:
        site.request(state=site.folder / "something")
    assert "remove" not in str(told.value)  # it may be anything: a keyset, a home
    site.state.chmod(0o755)
    with pytest.raises(Failure, match="chmod 700"):
        site.request()


@pytest.mark.parametrize("name", ["machine.json", "auths.json", "organisation/keyset.json"])
@pytest.mark.parametrize(
    "content", ["[" * 100000, "9" * 5000, "[1]", "null"], ids=["deep", "digits", "list", "null"]
)
def test_a_damaged_state_is_told(done: Site, tmp_path: Path, name: str, content: str) -> None:
    state = shutil.copytree(done.state, tmp_path / "state")
    (state / name).write_text(content)
    with pytest.raises(Failure, match=r"is not what|cannot read"):
        done.finish(state=state)


def test_a_state_of_somebody_else_is_not_used(done: Site, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    state = shutil.copytree(done.state, tmp_path / "state")
    for path in (state, state / "config.key"):
        os.chown(path, 65534, -1)
        with pytest.raises(Failure, match="belongs to another user"):
            done.finish(state=state)
        os.chown(path, 0, -1)


def test_a_state_for_another_organisation_is_not_taken(site: Site) -> None:
    site.request()
    other = site.folder / "other"
    keys.export(site.host, site.other.folder, other)
    options = provision.Options(other, site.state, event_log=site.log, tcti=site.tpm.tcti)
    with pytest.raises(init.Refused, match="TPM-INDEX"):
        provision.request(site.host, replace(options, folder=site.folder / "new"))
    with pytest.raises(Failure, match="for another organisation"):
        provision.request(site.host, options)


def test_a_closed_tpm_with_a_planted_policy_is_refused(site: Site) -> None:
    """As an older mosinit left it."""
    site.request()
    site.enroll()
    auths = {name: word.encode() for name, word in json.loads(site.saved_auths()).items()}
    site.finish()
    with tpms.open_tpm(site.tpm.tcti) as machine:
        machine.open_hierarchies(auths)
    plant(site)
    for hierarchy, word in auths.items():
        site.tpm.run("tpm2_changeauth", "-c", hierarchy, word.decode())
    with pytest.raises(init.Refused, match="TPM-STATE.*no policy.*owner"):
        site.finish()


def test_all_done_a_second_run_only_looks(site: Site) -> None:
    site.provision()
    with Breaking(site.tpm) as way:
        site.finish(tcti=way.tcti)
    assert writes(way.seen) == []
    with pytest.raises(Failure, match="has its answer already"):
        site.request()
    with pytest.raises(init.Refused, match="TPM-STATE.*owner password, endorsement password, lockout"):
        site.request(state=site.folder / "second")


def breaks(seen: Sequence[int]) -> Iterator[tuple[int, bool]]:
    """Yield where to break: before each command, and after those that leave something behind.

    After all others is the same as before the next.
    """
    for at, code in enumerate(seen, 1):
        yield at, False
        if code in WRITES:
            yield at, True


def test_a_request_may_be_interrupted_at_any_command(site: Site, tmp_path: Path) -> None:
    with Breaking(site.tpm) as way:
        site.request(tcti=way.tcti)
    assert writes(way.seen) == ["EvictControl", "NV_DefineSpace", "NV_SetBits"]
    assert len(way.seen) > 40
    policy, secrets = site.policy(), provision.make_secrets(site.host)
    for at, done in breaks(way.seen):
        site.renew(tmp_path / "work")
        with Breaking(site.tpm, at, done=done) as broken, contextlib.suppress(Failure, init.Refused):
            site.request(tcti=broken.tcti)
            # Nobody waits for what is only tidied up.
            assert broken.seen[-1] == init.Cc.FLUSH_CONTEXT
            site.state.rename(site.folder / "whole")
        assert [path.name for path in site.folder.iterdir() if path.name != "whole"] == []
        site.restart()
        with tpms.open_tpm(site.tpm.tcti) as machine:
            # The rest of a request touches nothing that stays.
            provision.inspect(machine, policy, 1)
            made = provision.make_objects(machine, policy, 1, secrets)
        assert made.epoch_index == policy.epoch_index
    site.provision()


def test_an_answer_may_be_interrupted_at_any_command(site: Site) -> None:
    site.request()
    site.enroll()
    auths = {name: word.encode() for name, word in json.loads(site.saved_auths()).items()}
    saved = shutil.copytree(site.state, site.folder / "saved")

    def take_back() -> None:
        with tpms.open_tpm(site.tpm.tcti) as machine:
            machine.open_hierarchies(auths)
        site.tpm.allow_clear()
        shutil.rmtree(site.state)
        shutil.copytree(saved, site.state)

    with Breaking(site.tpm) as way:
        site.finish(tcti=way.tcti)
    assert writes(way.seen) == [
        *["SetPrimaryPolicy"] * 3, "DictionaryAttackParameters", *["HierarchyChangeAuth"] * 2,
        "ClearControl", "HierarchyChangeAuth",
    ]  # fmt: skip
    take_back()
    for at, done in breaks(way.seen):
        whole = False
        with Breaking(site.tpm, at, done=done) as broken, contextlib.suppress(Failure, init.Refused):
            site.finish(tcti=broken.tcti)
            whole = True
            assert broken.seen[-1] == init.Cc.FLUSH_CONTEXT
        assert (site.state / "auths.json").exists() != whole
        site.restart()
        site.finish()
        assert site.flags() & init.PROVISIONED == init.PROVISIONED
        assert not (site.state / "auths.json").exists()
        take_back()


def test_passwords_of_somebody_else_are_not_tried(site: Site) -> None:
    """One wrong lockout password locks the TPM for a day."""
    site.request()
    site.enroll()
    set_lockout(site)
    with Breaking(site.tpm) as way, pytest.raises(init.Refused, match="TPM-STATE.*seen lockout password"):
        site.finish(tcti=way.tcti)
    assert writes(way.seen) == []
    assert not site.flags() & init.Permanent.IN_LOCKOUT


# --- The answer ----------------------------------------------------------------------------------------


def other_machine(site: Site) -> None:
    site.request(state=site.folder / "second")
    site.enroll(site.folder / "second")


def change_answer(site: Site, **changes: Any) -> None:
    site.enroll()
    answer = exchange.parse_answer(site.answer.read_bytes(), "answer")
    site.answer.write_bytes(exchange.encode_answer(answer._replace(**changes)))


def foreign_approval(site: Site) -> None:
    answer = exchange.parse_answer(site.answer.read_bytes(), "answer") if site.answer.exists() else None
    assert answer is None
    site.enroll()
    answer = exchange.parse_answer(site.answer.read_bytes(), "answer")
    change_answer(site, approvals={pcr7: init.PlatformApproval(1, bytes(256)) for pcr7 in answer.approvals})


def other_firmware(site: Site) -> None:
    site.enroll()
    site.tpm.extend(7, bytes(32))


def other_tpm(site: Site) -> None:
    site.enroll()
    site.tpm.clear()
    site.start()


def lost_index(site: Site) -> None:
    site.enroll()
    site.tpm.run("tpm2_nvundefine", "-C", "o", hex(init.EPOCH_INDEX))


def disabled_since(site: Site) -> None:
    site.enroll()
    disable_endorsement(site)


def raised_epoch(site: Site) -> None:
    site.enroll()
    site.tpm.run("tpm2_nvsetbits", "-C", "o", "-i", "3", hex(init.EPOCH_INDEX))


def other_ca(site: Site) -> None:
    other = site.other
    site.enroll()
    record = records.encode_record(other.product, bytes(32), bytes(34), bytes(34))
    key = records.parse_point(_sudi(site), records.SUDI_HEAD)
    change_answer(site, certificate=records.issue(other, key, record, bytes(32)))


def other_secret(site: Site) -> None:
    """All is this machine's own but the secret."""
    site.enroll()
    words = json.loads((site.state / "machine.json").read_text())
    names = [init.tpm_name(bytes.fromhex(words[name])) for name in ("storage_key", "epoch_index")]
    record = records.encode_record(site.keyset.product, bytes(32), *names)
    key = records.parse_point(_sudi(site), records.SUDI_HEAD)
    change_answer(site, certificate=records.issue(site.keyset, key, record, request_digest(site)))


def other_request(site: Site) -> None:
    """An answer for this very machine and record, but to a request with another recovery record."""
    site.enroll()
    answer = exchange.parse_answer(site.answer.read_bytes(), "answer")
    certificate = x509.load_der_x509_certificate(answer.certificate)
    record = certificate.extensions.get_extension_for_oid(records.RECORD_OID).value
    assert isinstance(record, x509.UnrecognizedExtension)
    key = records.parse_point(_sudi(site), records.SUDI_HEAD)
    change_answer(site, certificate=records.issue(site.keyset, key, record.value, bytes(32)))


def request_digest(site: Site) -> bytes:
    return bytes.fromhex(json.loads((site.state / "machine.json").read_text())["request"])


def _sudi(site: Site) -> bytes:
    return bytes.fromhex(json.loads((site.state / "machine.json").read_text())["sudi"])


def broken_order(site: Site) -> None:
    site.enroll()
    order = exchange.parse_answer(site.answer.read_bytes(), "answer").order
    statement = re.sub(rb'("epoch": ?)1', rb"\g<1>2", order.statement)
    assert statement != order.statement
    change_answer(site, order=order._replace(statement=statement))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_machine, "TPM-IDENTITY.*the answer to this machine's request"),
        (other_secret, "TPM-IDENTITY.*the answer to this machine's request"),
        (other_request, "the answer is to another request .* with another recovery record"),
        (foreign_approval, "TPM-APPROVAL"),
        (other_firmware, "TPM-POLICY.*an approved PCR 7"),
        (other_tpm, "TPM-IDENTITY.*seen none"),
        (lost_index, "TPM-INDEX.*seen none"),
        (raised_epoch, "EPOCH.*seen epoch 2"),
        (disabled_since, "TPM-STATE.*seen hierarchies 0x3"),
        (other_ca, "RECORD-FORMAT|RECORD-SIGNATURE"),
        (broken_order, "EPOCH-ORDER"),
    ],
)
def test_wrong_answers_change_nothing(site: Site, spoil: Callable[[Site], None], says: str) -> None:
    site.request()
    spoil(site)
    before = sorted(path.name for path in site.state.iterdir())
    with Breaking(site.tpm) as way, pytest.raises((Failure, init.Refused), match=says):
        site.finish(tcti=way.tcti)
    assert writes(way.seen) == []
    assert sorted(path.name for path in site.state.iterdir()) == before
    assert not site.flags() & PASSWORDS


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("approvals", "TPM-APPROVAL: expected approvals up to epoch 2 or later, seen one up to epoch 1"),
        ("order", "EPOCH-ORDER: expected an order of epoch 2, seen one of epoch 1"),
    ],
)
def test_parts_of_an_earlier_epoch_are_not_taken(site: Site, part: str, says: str) -> None:
    """Approvals and orders are public: who carries an answer has those of before, as they were signed."""
    site.request(epoch=2)
    site.enroll(epoch=2)
    whole = exchange.parse_answer(site.answer.read_bytes(), "answer")
    earlier: dict[str, Any] = {
        "approvals": {
            pcr7: approvals.approve_platform(site.keyset, bytes.fromhex(pcr7), 1) for pcr7 in whole.approvals
        },
        "order": enroll.sign_order(site.keyset, 1),
    }
    site.answer.write_bytes(exchange.encode_answer(whole._replace(**{part: earlier[part]})))
    with Breaking(site.tpm) as way, pytest.raises(init.Refused, match=says) as caught:
        site.finish(tcti=way.tcti)
    assert "the answer that `mosinit enroll` wrote to" in remedy(caught.value)
    assert writes(way.seen) == []
    assert not (site.state / "seal.json").exists()
    site.answer.write_bytes(exchange.encode_answer(whole))
    site.finish()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_machine, "the answer that `mosinit enroll` wrote to"),
        (foreign_approval, "the answer that `mosinit enroll` wrote to"),
        (broken_order, "the answer that `mosinit enroll` wrote to"),
        (other_ca, "the answer that `mosinit enroll` wrote to"),
        (other_firmware, "what it was for the request, or .*new request"),
        (other_tpm, "remove .*new request"),
        (lost_index, "remove .*new request"),
        (raised_epoch, "remove .*new request with --epoch 2"),
    ],
)
def test_a_wrong_answer_has_a_remedy_for_who_provisions(
    site: Site, spoil: Callable[[Site], None], says: str
) -> None:
    site.request()
    spoil(site)
    with pytest.raises(init.Refused) as caught:
        site.finish()
    assert re.search(says, remedy(caught.value))


def test_a_tpm_that_was_cleared_afterwards_has_a_remedy(site: Site) -> None:
    site.provision()
    site.tpm.clear()
    site.start()
    with pytest.raises(init.Refused, match="TPM-IDENTITY") as caught:
        site.finish()
    assert re.search("remove .*new request", remedy(caught.value))


def test_lost_passwords_are_told(site: Site) -> None:
    site.request()
    site.enroll()
    (site.state / "auths.json").unlink()
    with pytest.raises(Failure, match="clear the TPM in the firmware's setup, remove .* and begin anew"):
        site.finish()
    assert not site.flags() & PASSWORDS


# --- Once more -------------------------------------------------------------------------------------------


def test_a_machine_is_provisioned_again_by_consent(site: Site) -> None:
    serial = site.provision()
    first = site.consent(serial)
    second = site.folder / "second"
    site.request(state=second, again=True)
    assert not site.flags() & PASSWORDS
    answer = site.enroll(second)
    assert site.finish(state=second)["provisioned"] != serial
    assert site.flags() & init.PROVISIONED == init.PROVISIONED
    # What was sealed and said before is of no use any more.
    booted = boot(site)
    assert open_config(site, booted, second) == (second / "config.key").read_bytes()
    with pytest.raises(init.Refused, match="TPM-IDENTITY"):
        open_config(site, booted, site.state)
    with pytest.raises(init.Refused, match="TPM-SEAL"):
        open_config(site, booted, site.state, record_of=second)
    # The consent is still good, but the old passwords are not.
    with pytest.raises(Failure, match="owner password in the recovery record is not this TPM's"):
        site.request(state=site.folder / "third", again=True)
    assert site.flags() & init.PROVISIONED == init.PROVISIONED
    assert first.auths != site.consent(str(answer["serial"])).auths


def test_to_begin_anew_may_be_interrupted_at_any_command(site: Site) -> None:
    serial = site.provision()
    auths = site.consent(serial).auths
    organisation, policy = keys.open_organisation(site.organisation), site.policy()

    def again(tcti: str) -> None:
        with tpms.open_tpm(tcti) as machine:
            provision.start_over(machine, organisation, policy, site.options(again=True))
            provision.inspect(machine, policy, 1)

    with Breaking(site.tpm) as way:
        again(way.tcti)
    assert writes(way.seen) == ["HierarchyChangeAuth"] * 3
    for at, done in breaks(way.seen):
        with tpms.open_tpm(site.tpm.tcti) as machine:
            machine.close_hierarchies(auths)
        with Breaking(site.tpm, at, done=done) as broken, contextlib.suppress(Failure, init.Refused):
            again(broken.tcti)
        site.restart()
        again(site.tpm.tcti)
        assert not site.flags() & PASSWORDS


def test_to_begin_anew_is_told_again(site: Site) -> None:
    """The same command, for who did not see the end of the first."""
    site.consent(site.provision())
    second = site.folder / "second"
    first = site.request(state=second, again=True)
    content = (second / "request.json").read_bytes()
    with Breaking(site.tpm) as way:
        site.request(tcti=way.tcti, state=second, again=True)
    assert writes(way.seen) == []
    assert site.request(state=second, again=True) == first
    assert (second / "request.json").read_bytes() == content
    site.enroll(second)
    site.finish(state=second)
    for state in (site.state, second):
        with pytest.raises(Failure, match="has its answer already: .* another --dir"):
            site.request(state=state, again=True)


def test_a_request_that_another_one_overtook_is_told(site: Site) -> None:
    site.request(state=site.folder / "first")
    site.consent(site.provision())
    with pytest.raises(Failure, match="for another TPM or epoch"):
        site.request(state=site.folder / "first", again=True)


def other_consent(site: Site, serial: str) -> None:
    other = site.other
    consent = exchange.parse_consent((site.folder / "consent.json").read_bytes(), "consent")
    signature = other.signer("sudi-ca").sign(consent.statement)
    (site.folder / "consent.json").write_bytes(
        exchange.encode_consent(consent._replace(signature=signature))
    )


def consent_for_another(site: Site, serial: str) -> None:
    statement = exchange.consent_statement(site.keyset.product, bytes(34))
    signature = site.keyset.signer("sudi-ca").sign(statement)
    (site.folder / "consent.json").write_bytes(
        exchange.encode_consent(exchange.Consent(statement, signature))
    )


def record_of_another(site: Site, serial: str) -> None:
    """Consent and record agree, but not about this TPM."""
    path = site.folder / "auths.json"
    words = json.loads(path.read_text())
    words["storage_key"] = "00" * 34
    path.write_text(json.dumps(words))
    consent_for_another(site, serial)


def wrong_passwords(site: Site, serial: str) -> None:
    path = site.folder / "auths.json"
    words = json.loads(path.read_text())
    words["auths"]["owner"] = "0" * 32
    path.write_text(json.dumps(words))


def consent_as_passwords(site: Site, serial: str) -> None:
    (site.folder / "auths.json").unlink()
    shutil.copy(site.folder / "consent.json", site.folder / "auths.json")


def passwords_as_consent(site: Site, serial: str) -> None:
    shutil.copy(site.folder / "auths.json", site.folder / "consent.json")


def open_passwords(site: Site, serial: str) -> None:
    (site.folder / "auths.json").chmod(0o644)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_consent, "RECORD-SIGNATURE.*a consent that the SUDI CA signed"),
        (consent_for_another, "TPM-IDENTITY.*a consent for"),
        (record_of_another, "TPM-IDENTITY.*expected storage key 00"),
        (wrong_passwords, "owner password"),
        (open_passwords, "auths.json is open to others: chmod 600"),
        (consent_as_passwords, "auths.json is no recovery of schema 1: name the right file"),
        (passwords_as_consent, "consent.json is no consent of schema 1: name the right file"),
    ],
)
def test_without_consent_and_passwords_nothing_begins_anew(
    site: Site, spoil: Callable[[Site, str], None], says: str
) -> None:
    serial = site.provision()
    site.consent(serial)
    spoil(site, serial)
    with Breaking(site.tpm) as way, pytest.raises((Failure, init.Refused), match=says) as caught:
        site.request(tcti=way.tcti, state=site.folder / "second", again=True)
    assert writes(way.seen) == []
    if isinstance(caught.value, init.Refused):
        assert "`mosinit enroll --consent SERIAL`" in remedy(caught.value)


def test_with_the_event_log_of_another_start_nothing_begins_anew(site: Site) -> None:
    """Its passwords would be gone, and with them the machine of before: it opens no TPM without."""
    site.consent(site.provision())
    other = site.folder / "other-log"
    other.write_bytes(encode_log([measured(7, 4, bytes(4))]))
    with Breaking(site.tpm) as way, pytest.raises(Failure, match="other-log gives PCR 7 .* the TPM has"):
        given = site.options(tcti=way.tcti, state=site.folder / "second", again=True)
        provision.request(site.host, replace(given, event_log=other))
    assert writes(way.seen) == []
    assert site.flags() & init.PROVISIONED == init.PROVISIONED


def test_the_epoch_does_not_fall_when_a_machine_begins_anew(site: Site) -> None:
    site.request(epoch=2)
    site.enroll(epoch=2)
    serial = str(site.finish()["provisioned"])
    site.consent(serial)
    with Breaking(site.tpm) as way, pytest.raises(init.Refused, match="EPOCH"):
        site.request(tcti=way.tcti, state=site.folder / "second", again=True)
    assert writes(way.seen) == []
    site.request(state=site.folder / "second", again=True, epoch=2)
