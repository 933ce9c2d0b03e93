"""Approvals laid into a header: those of the platform key alone, never too old, and the others stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mosinit import approvals, exchange, init, keys, luks, reseal
from mosinit.host import Failure, Host
from tests import volumes
from tests.fake import policy_json
from tests.installation import make_provisioned

Change = Callable[[dict[str, Any]], object]


@dataclass
class Volume:
    """A config volume's header in a file, and the organisation of its machine."""

    host: Host
    keyset: keys.Keyset
    other: keys.Keyset
    path: Path

    def policy(self, epoch: int = 1) -> init.Policy:
        folder = self.keyset.folder
        files = {
            path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".pem", ".pub")
        }
        data = policy_json(mode="run", product=self.keyset.product, epoch=epoch)
        return init.parse_policy(data, b"12" * 32, files)

    def approved(self, *names: int, epoch: int = 1) -> exchange.Approvals:
        """Return approvals of values of PCR 7 that these numbers name."""
        rows = []
        for name in names:
            made = approvals.approve_platform(self.keyset, bytes([name]) * 32, epoch)
            rows.append(exchange.Approval(bytes([name]) * 32, made.epoch, made.signature, f"state {name}"))
        key = init.tpm_name(approvals.policy_keys(self.keyset).platform)
        return exchange.Approvals(self.keyset.product, key, tuple(rows))

    def write(self, present: exchange.Approvals, epoch: int = 1) -> init.LuksHeader:
        """Write a header with these approvals and an order of this epoch."""
        statement = json.dumps(init.epoch_statement(self.keyset.product, epoch)).encode()
        tokens = make_provisioned(self.keyset).tokens._replace(
            approvals={a.pcr7.hex(): init.PlatformApproval(a.epoch, a.signature) for a in present.approvals},
            order_statement=statement,
            order_signature=self.keyset.signer("product").sign(statement),
        )
        return luks.import_tokens(self.host, self.path, tokens)

    def header(self) -> init.LuksHeader:
        return luks.read_header(self.host, self.path, "config")

    def lay(self, made: exchange.Approvals, epoch: int = 1, keep: tuple[int, ...] = ()) -> reseal.Laid:
        kept = [value(name) for name in keep]
        return reseal.lay_approvals(self.host, self.path, self.header(), self.policy(epoch), made, kept)

    def file(self, made: exchange.Approvals) -> Path:
        path = self.path.with_name("approvals.json")
        path.write_bytes(exchange.encode_approvals(made))
        return path


def value(name: int) -> str:
    return f"{name:02x}" * 32


def names(tokens: init.Tokens | None) -> Mapping[int, int]:
    """Return what is approved up to which epoch."""
    assert tokens
    return {bytes.fromhex(pcr7)[0]: approval.epoch for pcr7, approval in tokens.approvals.items()}


@pytest.fixture
def volume(
    need: Callable[..., None], host: Host, keyset: keys.Keyset, other: keys.Keyset, tmp_path: Path
) -> Volume:
    need("cryptsetup")
    return Volume(host, keyset, other, volumes.config(host, tmp_path / "volume"))


def test_new_approvals_lie_beside_those_of_before_and_all_else_stays(volume: Volume) -> None:
    before = volume.write(volume.approved(1, epoch=3))
    laid = volume.lay(volume.approved(2, 3))
    assert (laid.added, laid.kept, laid.dropped) == ((value(2), value(3)), (value(1),), ())
    after = volume.header()
    assert after == laid.header
    assert names(after.tokens) == {1: 3, 2: 1, 3: 1}
    assert before.tokens
    assert after.tokens
    assert after.tokens._replace(approvals={}) == before.tokens._replace(approvals={})
    assert (after.slots, after.uuid, after.key_slots) == (before.slots, before.uuid, before.key_slots)
    # Both copies carry them: either alone is enough for a boot.
    for place in (0, init.LUKS_COPY):
        data = bytearray(volume.path.read_bytes()[: init.LUKS_BYTES])
        data[place + 100] ^= 1
        assert names(init.parse_luks_header(bytes(data), "config").tokens) == {1: 3, 2: 1, 3: 1}


def test_laid_twice_nothing_is_written(volume: Volume) -> None:
    volume.write(volume.approved(1))
    volume.lay(volume.approved(2))
    seen = volume.path.read_bytes()
    laid = volume.lay(volume.approved(2))
    assert (laid.added, laid.kept, laid.dropped) == ((), (value(1), value(2)), ())
    assert volume.path.read_bytes() == seen


def spoiled(made: exchange.Approvals) -> exchange.Approvals:
    """Return approvals of which the last one is for another value than was signed."""
    *good, last = made.approvals
    return made._replace(approvals=(*good, last._replace(pcr7=bytes([9]) * 32)))


def test_what_the_platform_key_did_not_sign_is_not_laid(volume: Volume) -> None:
    before = volume.write(volume.approved(1))
    foreign = Volume(volume.host, volume.other, volume.keyset, volume.path).approved(2)
    longer = volume.approved(2)
    longer = longer._replace(approvals=(longer.approvals[0]._replace(epoch=2),))
    for made in (spoiled(volume.approved(2, 3)), foreign, longer):
        with pytest.raises(init.Refused, match="TPM-APPROVAL: expected signatures of the platform key"):
            volume.lay(made)
    assert volume.header() == before


def test_what_ends_before_the_epoch_of_system_or_order_is_not_laid(volume: Volume) -> None:
    before = volume.write(volume.approved(1, epoch=9), epoch=3)
    for epoch, given in ((1, 2), (4, 3)):
        with pytest.raises(init.Refused, match="TPM-APPROVAL: expected an approval up to epoch") as caught:
            volume.lay(volume.approved(2, epoch=given), epoch)
        assert "mosinit approve" in caught.value.__notes__[0]
    assert volume.header() == before
    assert volume.lay(volume.approved(2, epoch=4), 4).added == (value(2),)


def test_what_can_hold_no_more_is_dropped_but_not_that_of_now(volume: Volume) -> None:
    old, new = volume.approved(1, 2, epoch=2), volume.approved(3, epoch=3)
    volume.write(old._replace(approvals=(*old.approvals, *new.approvals, *spoiled(new).approvals)), epoch=3)
    laid = volume.lay(volume.approved(4, epoch=3), keep=(2,))
    assert (laid.dropped, laid.kept) == ((value(1), value(9)), (value(2), value(3)))
    assert names(volume.header().tokens) == {2: 2, 3: 3, 4: 3}


def test_a_system_that_is_not_good_yet_takes_nothing_from_the_one_before(volume: Volume) -> None:
    volume.write(volume.approved(1, epoch=1))
    assert volume.lay(volume.approved(2, epoch=2), epoch=2).dropped == ()


def test_an_older_file_takes_no_epochs_away(volume: Volume) -> None:
    volume.write(volume.approved(1, epoch=7))
    assert volume.lay(volume.approved(1, epoch=5)).added == ()
    assert names(volume.header().tokens) == {1: 7}
    assert volume.lay(volume.approved(1, epoch=8)).added == (value(1),)
    assert names(volume.header().tokens) == {1: 8}


def test_a_full_header_loses_the_oldest_but_not_that_of_now(volume: Volume) -> None:
    volume.write(volume.approved(*range(1, 17)))
    laid = volume.lay(volume.approved(20, 21), keep=(1,))
    assert laid.dropped == (value(2), value(3))
    assert list(names(volume.header().tokens)) == [1, *range(4, 17), 20, 21]
    with pytest.raises(Failure, match="takes 16 approvals"):
        volume.lay(volume.approved(*range(30, 46)), keep=(1,))


def test_the_largest_header_takes_as_many(volume: Volume) -> None:
    """Records, orders and certificates at their limits leave room for all approvals."""
    header = volume.write(volume.approved(1))
    assert header.tokens
    large = header.tokens._replace(
        record=bytes(4096), order_certificate=bytes(16384), seal_public=bytes(1024)
    )
    sixteen = reseal.merge(header.tokens, volume.policy(), as_header(volume.approved(*range(2, 17))))
    after = luks.import_tokens(volume.host, volume.path, large._replace(approvals=sixteen))
    assert len(names(after.tokens)) == 16


def as_header(made: exchange.Approvals) -> Mapping[str, init.PlatformApproval]:
    return {each.pcr7.hex(): init.PlatformApproval(each.epoch, each.signature) for each in made.approvals}


# --- The file ----------------------------------------------------------------------------------------


def test_a_file_reads_back(volume: Volume) -> None:
    made = volume.approved(1, 2, epoch=64)
    assert reseal.read_approvals(volume.file(made), volume.policy()) == made


def test_a_file_for_others_says_so(volume: Volume) -> None:
    made = volume.approved(1)
    for change, words in (
        ({"product": volume.other.product}, "RECORD-PRODUCT"),
        ({"platform_key": b"\0\x0b" + bytes(32)}, "TPM-APPROVAL: expected approvals by platform key"),
    ):
        with pytest.raises(init.Refused, match=words) as caught:
            reseal.read_approvals(volume.file(made._replace(**change)), volume.policy())
        assert "this organisation's `mosinit approve`" in caught.value.__notes__[0]


def row(**changes: object) -> Change:
    def change(words: dict[str, Any]) -> None:
        words["approvals"][0].update(changes)

    return change


BAD: dict[str, tuple[Change, str]] = {
    "another kind": (lambda w: w.update(type="answer"), "no approvals of schema 1"),
    "a later schema": (lambda w: w.update(schema=2), "no approvals of schema 1"),
    "a field more": (lambda w: w.update(more=1), "unknown field 'more'"),
    "a field less": (lambda w: w.pop("platform_key"), "lacks the field 'platform_key'"),
    "no product": (lambda w: w.update(product="acme"), "product is not a uuid"),
    "a short key": (lambda w: w.update(platform_key="00"), "platform_key is not 34 bytes in hex"),
    "none": (lambda w: w.update(approvals=[]), "approvals is not a list of 1 to 16"),
    "no list": (lambda w: w.update(approvals={}), "approvals is not a list of 1 to 16"),
    "too many": (lambda w: w.update(approvals=[w["approvals"]] * 17), "approvals is not a list of 1 to 16"),
    "one twice": (
        lambda w: w.update(approvals=[*w["approvals"], *w["approvals"]]),
        "not one approval for each PCR 7",
    ),
    "one that is none": (lambda w: w.update(approvals=[1]), "not a list of approvals: pcr7"),
    "a field more in one": (row(more=1), "not a list of approvals: pcr7"),
    "PCR 7 in capitals": (row(pcr7="AB" * 32), "not 32 bytes in hex"),
    "an epoch too high": (row(epoch=65), "not a number from 1 to 64"),
    "an epoch that is none": (row(epoch=True), "not a number from 1 to 64"),
    "a short signature": (row(signature="00"), "not 256 bytes in hex"),
    "a reason that moves the cursor": (row(reason="\x1b[2J"), "not 1 to 200 letters and signs"),
    "a long reason": (row(reason="x" * 201), "not 1 to 200 letters and signs"),
}


@pytest.mark.parametrize("case", BAD)
def test_another_file_is_refused(volume: Volume, case: str) -> None:
    change, words = BAD[case]
    document = json.loads(exchange.encode_approvals(volume.approved(1)))
    change(document)
    path = volume.path.with_name("approvals.json")
    path.write_text(json.dumps(document))
    with pytest.raises(Failure, match=words):
        reseal.read_approvals(path, volume.policy())
    path.write_bytes(b"x" * (init.MIB + 1))
    with pytest.raises(Failure, match="more than 1048576 bytes"):
        reseal.read_approvals(path, volume.policy())


def test_a_header_that_became_another_is_not_written(volume: Volume) -> None:
    """Between look and write the disk may be exchanged: that one's seal and record would be lost."""
    volume.write(volume.approved(1))
    seen = volume.header()
    tokens = volume.write(volume.approved(3), epoch=2).tokens
    assert tokens
    luks.import_tokens(volume.host, volume.path, tokens._replace(seal_private=b"another machine's"))
    before = volume.path.read_bytes()
    with pytest.raises(Failure, match="is not as it was looked at: nothing was changed"):
        reseal.lay_approvals(volume.host, volume.path, seen, volume.policy(), volume.approved(2))
    assert volume.path.read_bytes() == before
