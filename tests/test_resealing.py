"""PCR 7 changed without approval: the way back takes an approval, and no secret."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mosinit import approvals, eventlog, exchange, explain, init, luks, recoverykey, reseal, resealing
from mosinit.host import Failure, Host
from tests import recovering
from tests.eventlogs import encode_log
from tests.recovering import Site, fingerprint
from tests.test_recover import NEEDED, config_of


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A machine whose firmware changed: one event more in PCR 7 than was approved."""
    with recovering.site(tmp_path_factory.mktemp("machine")) as made:
        machine = made.made
        machine.restart()
        events = list(eventlog.parse_event_log(machine.log.read_bytes()))
        digest = hashlib.sha256(b"another event").digest()
        last = events[-1]
        machine.tpm.extend(7, digest)
        machine.log.write_bytes(encode_log([*events, last._replace(digest=digest, data=b"another event")]))
        yield made


@pytest.fixture
def disk(site: Site, need: Callable[..., None], memory: Path) -> Iterator[Path]:
    """A copy of the machine's disk."""
    need(*NEEDED)
    with recovering.copy_of(site, memory) as device:
        yield device


def options(site: Site, disk: Path, folder: Path, approved: Path | None = None) -> resealing.Options:
    return resealing.Options(disk, approved, folder / "event-log", site.left, site.made.log)


def approved(site: Site, folder: Path, pcr7: bytes, role: str = "", epoch: int = 1) -> Path:
    """Write approvals as the organisation does."""
    keyset = site.made.other if role else site.made.keyset
    approval = approvals.approve_platform(keyset, pcr7, epoch)
    policy = resealing.install.policy_of_live(site.left)  # type: ignore[attr-defined]
    name = init.tpm_name(reseal.keys_of(policy).platform)
    made = exchange.Approvals(
        policy.product, name, (exchange.Approval(pcr7, epoch, approval.signature, "a test"),)
    )
    path = folder / "approvals.json"
    path.write_bytes(exchange.encode_approvals(made))
    return path


def pcr7(site: Site) -> bytes:
    return init.read_pcr(site.host.machine(), init.Pcr(7))


def test_an_approval_opens_it_again(site: Site, disk: Path, memory: Path, tmp_path: Path) -> None:
    before = fingerprint(memory / "copy")
    asked = resealing.reseal_disk(site.host, options(site, disk, tmp_path))
    assert (asked["status"], "TPM-POLICY" in str(asked["found"])) == (1, True)
    assert "mosinit approve event-log" in str(asked["left"])
    log = (tmp_path / "event-log").read_bytes()
    assert eventlog.replay(eventlog.parse_event_log(log), init.Pcr(7)) == pcr7(site)
    file = approved(site, tmp_path, pcr7(site))
    plan = resealing.reseal_disk(site.host, options(site, disk, tmp_path, file), plan=True)
    assert pcr7(site).hex() in str(plan["will do"])
    assert fingerprint(memory / "copy") == before
    old = luks.read_header(Host(), config_of(disk), "config")
    done = resealing.reseal_disk(site.host, options(site, disk, tmp_path, file))
    assert (done["will do"], done["next"]) == (plan["will do"], "remove the medium and restart")
    new = luks.read_header(Host(), config_of(disk), "config")
    assert old.tokens and new.tokens
    assert new.tokens._replace(approvals={}) == old.tokens._replace(approvals={})
    assert set(new.tokens.approvals) == {*old.tokens.approvals, pcr7(site).hex()}
    assert (new.slots, new.key_slots) == (old.slots, old.key_slots)
    init.find_approval(site.host.machine(), new.tokens, 1)
    again = resealing.reseal_disk(site.host, options(site, disk, tmp_path))
    assert (again["found"], again["will do"]) == ([], [])


def test_an_approval_that_holds_for_longer_is_not_dropped(site: Site, disk: Path, tmp_path: Path) -> None:
    """A system of a later epoch than the disk's order opens nothing before it has one."""
    file = approved(site, tmp_path, pcr7(site))
    resealing.reseal_disk(site.host, options(site, disk, tmp_path, file))
    later = approved(site, tmp_path, pcr7(site), epoch=3)
    done = resealing.reseal_disk(site.host, options(site, disk, tmp_path, later))
    assert pcr7(site).hex() in str(done["will do"])
    header = luks.read_header(Host(), config_of(disk), "config")
    assert header.tokens
    init.find_approval(site.host.machine(), header.tokens, 3)
    again = resealing.reseal_disk(site.host, options(site, disk, tmp_path, later))
    assert (again["will do"], "up to epoch 3" in str(again["next"])) == ([], True)
    # An older one takes nothing away.
    file = approved(site, tmp_path, pcr7(site))
    assert resealing.reseal_disk(site.host, options(site, disk, tmp_path, file))["will do"] == []


class Forgetful(recovering.NativeRecoverer):
    """A host whose disk has lost what was written to it, when somebody looks at it for the second time."""

    def __init__(self, site: Site, disk: Path) -> None:
        super().__init__(site.made)
        self.config, self.looked = config_of(disk), 0
        self.before = self.config.open("rb").read(init.LUKS_BYTES)

    def efi_read(self, name: str, guid: str) -> tuple[int, bytes] | None:
        """Answer as ever: whoever looks at a disk asks first whether it is the medium."""
        self.looked += name == "LoaderDevicePartUUID"
        if self.looked == 2:
            with self.config.open("r+b", buffering=0) as file:
                file.write(self.before[: 2 * init.LUKS_COPY])
        return super().efi_read(name, guid)


def test_a_disk_that_forgets_the_approval_is_not_called_open(site: Site, disk: Path, tmp_path: Path) -> None:
    host, file = Forgetful(site, disk), approved(site, tmp_path, pcr7(site))
    with pytest.raises(init.Refused, match="TPM-POLICY"):
        resealing.reseal_disk(host, options(site, disk, tmp_path, file))
    assert host.looked == 2


@pytest.mark.parametrize("kind", ["another state", "another key", "another product"])
def test_other_approvals_change_nothing(
    site: Site, disk: Path, memory: Path, tmp_path: Path, kind: str
) -> None:
    before = fingerprint(memory / "copy")
    value = b"\1" * 32 if kind == "another state" else pcr7(site)
    file = approved(site, tmp_path, value, "other" if kind == "another key" else "")
    if kind == "another product":
        words = json.loads(file.read_text())
        words["product"] = "00000000-0000-4000-8000-000000000000"
        file.write_text(json.dumps(words))
    check = {"another state": "TPM-POLICY", "another key": "TPM-APPROVAL"}.get(kind, "RECORD-PRODUCT")
    with pytest.raises(init.Refused, match=check):
        resealing.reseal_disk(site.host, options(site, disk, tmp_path, file))
    assert fingerprint(memory / "copy") == before


def test_a_damaged_header_is_for_the_recovery_key(site: Site, disk: Path, tmp_path: Path) -> None:
    with open(config_of(disk), "r+b", buffering=0) as file:
        file.write(bytes(2 * init.LUKS_COPY))
    with pytest.raises(init.Refused, match="LUKS-HEADER") as error:
        resealing.reseal_disk(site.host, options(site, disk, tmp_path))
    assert "--key" in explain.refusal(error.value)["remedy"]


def test_another_file_is_not_replaced(site: Site, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "event-log").write_bytes(b"somebody's")
    with pytest.raises(Failure, match="--out"):
        resealing.reseal_disk(site.host, options(site, disk, tmp_path))
    assert (tmp_path / "event-log").read_bytes() == b"somebody's"


def test_another_tpm(site: Site, disk: Path, tmp_path: Path) -> None:
    """This comes last: it clears the TPM."""
    site.provision_anew()
    with pytest.raises(init.Refused, match="TPM-IDENTITY") as error:
        resealing.reseal_disk(
            site.host, dataclasses.replace(options(site, disk, tmp_path), event_log=site.made.log)
        )
    assert "mosinit provision" in explain.refusal(error.value)["remedy"]


KEY = "-".join(["cbdefghi"] * 8)


@pytest.mark.parametrize("typed", [KEY, f"{KEY}\n", KEY.upper(), f" {KEY} ", KEY.replace("-", "- ")])
def test_a_key_as_a_person_types_it(tmp_path: Path, typed: str) -> None:
    (tmp_path / "key").write_text(typed)
    (tmp_path / "key").chmod(0o600)
    assert recoverykey.read([str(tmp_path / "key")]) == (KEY.encode(),)


def test_a_key_in_a_recovery_record(tmp_path: Path) -> None:
    auths = dict.fromkeys(exchange.HIERARCHIES, b"0" * 32)
    record = exchange.Recovery("00000000-0000-4000-8000-000000000000", "0" * 16, bytes(34), auths, KEY)
    (tmp_path / "record").write_bytes(exchange.encode_recovery(record))
    (tmp_path / "record").chmod(0o600)
    (tmp_path / "key").write_text("another passphrase")
    (tmp_path / "key").chmod(0o600)
    names = [str(tmp_path / "record"), str(tmp_path / "key")]
    assert recoverykey.read(names) == (KEY.encode(), b"another passphrase")


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [("key", 0o644, "chmod 600"), ("", 0o600, "no recovery key"), ("a\nb", 0o600, "no recovery key"),
     ("{}", 0o600, "no recovery of schema 1"), ("x" * 600, 0o600, "no recovery key")],
)  # fmt: skip
def test_what_is_no_key(tmp_path: Path, content: str, mode: int, words: str) -> None:
    (tmp_path / "key").write_text(content)
    (tmp_path / "key").chmod(mode)
    with pytest.raises(Failure, match=words):
        recoverykey.read([str(tmp_path / "key")])
    with pytest.raises(Failure, match="there is no"):
        recoverykey.read([str(tmp_path / "none")])


class Terminal(io.StringIO):
    """A standard input at which somebody sits."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("ended", [EOFError, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no letter")])
def test_a_terminal_that_ends_is_no_key(monkeypatch: pytest.MonkeyPatch, ended: BaseException) -> None:
    def typed(_: str) -> str:
        raise ended

    monkeypatch.setattr("getpass.getpass", typed)
    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(Failure, match="what was typed is no recovery key"):
        recoverykey.read(["-"])
