"""What happened in a boot and what to do: from a report, a console log, and the event logs of two boots."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosinit import approvals, drift, eventlog, explain, firmware, init, lastgood
from mosinit.eventlog import DBX, Event
from mosinit.host import Failure, Host, Usage
from tests.eventlogs import encode_log
from tests.test_approvals import GOLDEN, certificates, swap
from tests.test_cli import mosinit
from tests.test_drift import DBX_NOW, GOOD

POLICY = {
    "id": "TPM-POLICY", "ok": False, "expected": "an approved PCR 7: 00ff", "seen": "ab" * 32,
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "schema": 1, "result": "refused", "mode": "run", "product": "p", "sequence": 7, "generation": None,
    "uki_id": "12" * 32, "failed": "TPM-POLICY", "fenced": True,
    "checks": [{"id": "SB-OFF", "ok": True, "expected": "on", "seen": "on"}, POLICY],
    "stages": [{"name": "set-up", "ok": True, "ms": 12}, {"name": "unlock", "ok": False, "ms": 412}],
}  # fmt: skip
STARTED: dict[str, Any] = {
    **REFUSED, "result": "pivoted", "failed": None, "checks": REFUSED["checks"][:1],
    "previous_refusal": None, "stages": [{"name": "set-up", "ok": True, "ms": 12}],
}  # fmt: skip
EARLIER = {"id": "TPM-POLICY", "sequence": 7, "uki": "12" * 32, "count": 3}


def console(*reports: object) -> bytes:
    lines = [b"mosinit: start", *(b"mosinit-report: " + json.dumps(each).encode() for each in reports)]
    return b"\x1b[2J\r\n".join([*lines, b"mosinit: restart in 10 s"])


# --- Where the report comes from ---------------------------------------------------------------------


def test_a_report_is_found_in_its_file_and_in_a_console_log() -> None:
    for data in (json.dumps(REFUSED).encode(), b" " + json.dumps(REFUSED, indent=1).encode() + b"\n"):
        assert explain.find_report(data, "x") == REFUSED
    assert explain.find_report(console(REFUSED).replace(b"\x1b[2J", b""), "x") == REFUSED
    assert explain.find_report(console(REFUSED, STARTED).replace(b"\x1b[2J", b""), "x") == STARTED


def test_a_line_that_another_program_wrote_into_is_passed_over() -> None:
    torn = console(REFUSED, STARTED).replace(b"\x1b[2J", b"")
    place = torn.rindex(b'"result"')
    assert explain.find_report(torn[:place] + b"[  1.0] kernel words" + torn[place:], "x") == REFUSED


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no line `mosinit-report"),
        (b"words", "no line `mosinit-report"),
        (b"{}", "its schema is not 1"),
        (b'{"schema": 1', "it is no JSON"),
        (b"mosinit-report: {", "it is no JSON"),
        (b'mosinit-report: {"schema": 2}', "its schema is not 1"),
        (json.dumps({**STARTED, "x": "x" * 70000}).encode(), "more than 65536 bytes"),
    ],
)
def test_what_is_no_report_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(Failure, match=words):
        explain.find_report(data, "x")


@given(st.binary(max_size=60))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    for each in (data, b"{" + data, b"mosinit-report: " + data):
        with pytest.raises(Failure, match="no boot report"):
            explain.find_report(each, "x\x1b[2J")


# --- What it says ------------------------------------------------------------------------------------


def test_a_refusal_is_told_in_order_with_what_to_do() -> None:
    told = explain.story({**REFUSED, "failed": "SB-OFF"})
    assert told["do"] == [init.CHECKS["SB-OFF"].remedy]
    assert told["stages"] == REFUSED["stages"]
    text = explain.story_text(explain.story(REFUSED))
    places = [
        text.index(words)
        for words in (
            "refused by TPM-POLICY: this machine was not started", "mode run, manifest sequence 7, UKI 1212",
            init.CHECKS["TPM-POLICY"].title, "what happened:", "set-up: ok", "unlock: failed",
            "expected an approved PCR 7: 00ff", "seen     abab", "what to do:",
            f"1. {init.CHECKS['TPM-POLICY'].remedy}", "2. to see what changed: `mosinit explain`",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    assert "412" not in text


def test_a_good_boot_says_that_and_what_was_before() -> None:
    assert explain.story(STARTED)["do"] == []
    assert explain.story_text(explain.story(STARTED)).startswith("started: every check held\n")
    told = explain.story({**STARTED, "previous_refusal": EARLIER}, [])
    assert told["previous refusal"] == EARLIER
    assert told["do"] == [explain._RESTORED]
    text = explain.story_text(told)
    assert "started: every check held; before that it was refused by TPM-POLICY, 3 times in a row" in text
    assert "what differs in PCR 7 from the last good boot:\n  nothing" in text


def test_what_differs_comes_before_the_general_remedy() -> None:
    found = drift.compare(GOOD, swap(GOOD, DBX, DBX_NOW))
    told = explain.story(REFUSED, found)
    assert told["differences"] == [each._asdict() for each in found]
    assert told["do"] == [found[0].remedy, init.CHECKS["TPM-POLICY"].remedy]
    assert "  dbx changed: 3 entries added" in explain.story_text(told)
    # A change that was approved, in a system that runs, is nobody's fault.
    assert explain.story(STARTED, found)["do"] == []
    assert explain.story({**STARTED, "mode": "live"}, found)["do"] == [found[0].remedy]


def test_a_crash_and_a_check_of_another_version() -> None:
    crashed = {**STARTED, "result": "crashed", "crash": "KeyError: x main:3"}
    text = explain.story_text(explain.story(crashed))
    assert "crashed: this machine was not started" in text
    assert "KeyError: x main:3" in text
    assert "1. this is a fault of mosinit" in text
    assert explain.story({**REFUSED, "failed": "NEW-ID"})["do"] == [explain._UNKNOWN]


def test_a_report_moves_no_cursor() -> None:
    for name in ("crash", "mode", "sequence", "uki_id"):
        told = explain.story({**STARTED, "result": "crashed", "crash": "x", name: "\x1b[2J\n"})
        text = explain.story_text(told)
        assert ("\x1b" in text, "?[2J?" in text) == (False, True), name


values = st.sampled_from(
    [None, True, 7, "a\x1b[2J\n", "\u202e", [], ["x"], {}, [{"id": "\x1b"}], [{"ok": False, "seen": ["\n"]}]]
    + [{"id": "\x07", "count": []}, [{"name": "\r", "ok": 1, "ms": {}}]]
)
keys = st.sampled_from([*STARTED, "crash", "id", "x"])


@given(st.dictionaries(keys, values, max_size=6))
def test_whatever_a_report_says_is_shown_plainly(report: dict[str, object]) -> None:
    text = explain.story_text(explain.story(report))
    assert all(c.isprintable() for line in text.split("\n") for c in line)


# --- On a machine ------------------------------------------------------------------------------------


def left(folder: Path, report: object) -> Path:
    (folder / "left").mkdir()
    (folder / "left/report.json").write_text(json.dumps(report))
    return folder / "left"


class Root(Host):
    """A host whose mounts are its own already."""

    def unshare_mounts(self) -> None:
        """Do nothing."""


def test_the_last_boot_is_compared_with_what_the_disk_keeps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = left(tmp_path, {**STARTED, "mode": "live", "previous_refusal": EARLIER})
    log = tmp_path / "log"
    log.write_bytes(encode_log(swap(GOOD, DBX, DBX_NOW)))
    kept = [("vda", encode_log(GOOD)), ("vdb", b"not a log")]
    monkeypatch.setattr(lastgood, "find", lambda host, machine: kept)
    told = explain.last_boot(Root(), folder, log)
    wanted = [each._asdict() for each in drift.compare(GOOD, swap(GOOD, DBX, DBX_NOW))]
    assert told["differences"] == wanted
    assert told["do"] == [wanted[0]["remedy"], init.CHECKS["TPM-POLICY"].remedy]
    said = capsys.readouterr().err
    assert "compared with the last good boot of the system on vda" in said
    assert "what vdb keeps cannot be compared" in said
    for nothing in ([], kept[1:]):
        monkeypatch.setattr(lastgood, "find", lambda host, machine, found=nothing: found)
        assert explain.last_boot(Root(), folder, log)["differences"] is None
    log.unlink()
    assert explain.last_boot(Root(), folder, log)["differences"] is None
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert explain.last_boot(Root(), folder, log)["previous refusal"] == EARLIER
    assert "run this as root" in capsys.readouterr().err


def test_on_another_system_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="was not started by mosinit"):
        explain.last_boot(Root(), tmp_path)


# --- What the boot partition keeps -------------------------------------------------------------------


def test_a_log_is_kept_once_and_replaced_when_it_differs(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, esp = tmp_path / "log", tmp_path / "esp"
    esp.mkdir()
    log.write_bytes(encode_log(GOOD))
    place = esp / lastgood.PLACE
    assert lastgood.keep(host, esp, log)
    assert place.read_bytes() == log.read_bytes()
    before = place.stat()
    assert not lastgood.keep(host, esp, log)
    assert (place.stat().st_ino, place.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    log.write_bytes(encode_log(GOOD[:3]))
    (place.parent / ".eventlog.bin.left").write_bytes(b"by a power cut")
    assert lastgood.keep(host, esp, log)
    assert [path.name for path in place.parent.iterdir()] == ["eventlog.bin"]
    assert place.read_bytes() == log.read_bytes()
    assert capsys.readouterr().err == ""


def test_what_cannot_be_kept_is_said_and_costs_nothing(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, esp = tmp_path / "log", tmp_path / "esp"
    place = esp / lastgood.PLACE
    for content in (None, b"", b"words", encode_log(GOOD) + bytes(lastgood.LIMIT)):
        if content is not None:
            log.write_bytes(content)
        assert not lastgood.keep(host, esp, log)
        assert "is not kept for `mosinit explain`" in capsys.readouterr().err
        assert not place.exists()
    log.write_bytes(encode_log(GOOD))
    for content in (b"x" * (lastgood.LIMIT + 1), b"damaged"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        assert lastgood.keep(host, esp, log)
    place.unlink()
    place.mkdir()
    assert not lastgood.keep(host, esp, log)


def test_what_is_kept_is_read_as_a_file_of_bounded_size(tmp_path: Path) -> None:
    place = tmp_path / "eventlog.bin"
    os.mkfifo(place)
    with pytest.raises(ValueError, match="is no file"):
        lastgood.read(place)
    place.unlink()
    place.symlink_to("/dev/zero")
    with pytest.raises(OSError, match="symbolic"):
        lastgood.read(place)
    place.unlink()
    place.write_bytes(bytes(lastgood.LIMIT + 1))
    with pytest.raises(ValueError, match="more than"):
        lastgood.read(place)


# --- The verb, on bare Python ------------------------------------------------------------------------


def logs(folder: Path, now: Sequence[Event]) -> tuple[str, ...]:
    (folder / "good").write_bytes(encode_log(GOOD))
    (folder / "now").write_bytes(encode_log(now))
    return "--event-log", str(folder / "now"), "--against", str(folder / "good")


def test_a_report_is_explained_with_pythons_own_library(tmp_path: Path) -> None:
    (tmp_path / "console").write_bytes(console(REFUSED).replace(b"\x1b[2J", b""))
    done = mosinit("explain", str(tmp_path / "console"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("refused by TPM-POLICY")
    given = logs(tmp_path, swap(GOOD, DBX, DBX_NOW))
    data = json.loads(mosinit("explain", str(tmp_path / "console"), "--json", *given).stdout)
    assert data["stages"][1] == {"name": "unlock", "ok": False, "ms": 412}
    assert data["differences"][0]["event"] == "dbx"
    told = json.loads(mosinit("explain", "--json", *given).stdout)
    assert told == data["differences"]
    text = mosinit("explain", *logs(tmp_path, GOOD)).stdout
    assert text == "PCR 7 is the same in both boots\n"


def test_standard_input_is_a_report_too() -> None:
    command = ["/usr/bin/python3", "-S", "-B", "-m", "mosinit", "explain", "-"]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        command, input=json.dumps(REFUSED).encode(), capture_output=True, cwd=root, check=True
    )
    assert done.stdout.startswith(b"refused by TPM-POLICY")


def test_real_logs_are_compared(tmp_path: Path) -> None:
    """OVMF's log, and the one that it would keep with three more entries in dbx."""
    real = GOLDEN / "ovmf-event-log.bin"
    now = swap(eventlog.parse_event_log(real.read_bytes()), DBX, DBX_NOW)
    (tmp_path / "now").write_bytes(encode_log(now))
    done = mosinit("explain", "--event-log", str(tmp_path / "now"), "--against", str(real))
    assert done.stdout.startswith("dbx changed: 3 entries added: program ")
    assert approvals.predict_pcr7(certificates("ovmf"), DBX_NOW) == eventlog.replay(now, init.Pcr(7))
    assert firmware.EMPTY_DBX in DBX_NOW


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ("", 1, "was not started by mosinit: name a report"),
        ("SB-OFF --all", 2, "one id"),
        ("SB-OFF --event-log x --against y", 2, "go with a report, or alone"),
        ("--all --event-log x --against y", 2, "go with a report, or alone"),
        ("--event-log x", 2, "go together"),
        ("--event-log /nonexistent --against y", 1, "cannot use /nonexistent|cannot use y"),
        ("--event-log /etc/passwd --against /etc/passwd", 1, "/etc/passwd cannot be read"),
        ("/etc/passwd", 1, "/etc/passwd is no boot report"),
        ("./none.json", 2, "neither a check's id nor a file"),
    ],
)
def test_wrong_words_are_one_line(words: str, status: int, says: str) -> None:
    done = mosinit("explain", *words.split())
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.count("\n") == 1
    assert any(each in done.stderr for each in says.split("|"))


def test_an_id_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="no check has the id"):
        explain.explain("nothing")
