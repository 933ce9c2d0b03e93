"""The firmware's event log: read whole or refused, and worth no more than the PCR that it gives."""

from __future__ import annotations

import hashlib
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mosinit import eventlog, init
from tests.eventlogs import SIZES, encode_event, encode_head, encode_log, measured, unmeasured

GOLDEN = Path(__file__).parent / "golden"
SEVEN = init.Pcr(7)
SEPARATOR = 4
EVENTS = (measured(0, 8, b"version"), measured(7, SEPARATOR, bytes(4)), measured(7, 5, b"words"))

kinds = st.integers(0, 0xFFFFFFFF)
some_events = st.builds(
    eventlog.Event, st.integers(0, 23).map(init.Pcr), kinds, st.binary(min_size=32, max_size=32),
    st.binary(max_size=200),
)  # fmt: skip


@given(st.lists(some_events, max_size=8), st.sampled_from([["sha256"], ["sha1", "sha256"], [*SIZES]]))
def test_whatever_a_firmware_writes_reads_back(events: list[eventlog.Event], banks: list[str]) -> None:
    assert eventlog.parse_event_log(encode_log(events, banks)) == tuple(events)


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    for log in (data, encode_log(EVENTS) + data, encode_head({"sha256": 32}) + data):
        try:
            events = eventlog.parse_event_log(log)
            assert all(len(eventlog.replay(events, init.Pcr(pcr))) == 32 for pcr in (0, 7))
        except ValueError:
            continue


@given(st.data())
def test_no_spoiled_byte_does_more_than_be_refused(data: st.DataObject) -> None:
    log = bytearray(encode_log(EVENTS))
    for _ in range(data.draw(st.integers(1, 4))):
        log[data.draw(st.integers(0, len(log) - 1))] = data.draw(st.integers(0, 255))
    try:
        eventlog.replay(eventlog.parse_event_log(bytes(log)), SEVEN)
    except ValueError:
        return


def test_no_shorter_log_is_taken_for_a_whole_one() -> None:
    log = encode_log(EVENTS)
    ends = {len(encode_log(EVENTS[:count])) for count in range(len(EVENTS) + 1)}
    for size in set(range(len(log))) - ends:
        with pytest.raises(ValueError, match="event log"):
            eventlog.parse_event_log(log[:size])


HEAD = {"sha1": 20, "sha256": 32}
EVENT = encode_event(EVENTS[1], HEAD)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (b"", "cannot have 28 at 0"),
        (encode_head(HEAD, ident=b"Spec ID Event02\0"), "not crypto-agile"),
        (b"\1" + encode_head(HEAD)[1:], "not crypto-agile"),
        (encode_head({"sha1": 20}), "without SHA-256"),
        (encode_head({"sha256": 20}), "without SHA-256"),
        (encode_head(HEAD)[:-1] + b"\1\0", "another head"),
        (encode_head(HEAD, b"words")[:28] + struct.pack("<I", 99) + encode_head(HEAD)[32:], "another head"),
        (encode_head(HEAD) + EVENT[:8] + struct.pack("<I", 1) + EVENT[12:], "one digest of each kind"),
        (encode_head(HEAD) + EVENT[:8] + struct.pack("<I", 3) + EVENT[12:34] + EVENT[12:], "one digest"),
        (encode_head(HEAD) + EVENT[:8] + struct.pack("<I", 3) + EVENT[12:], "one digest"),
        (encode_head(HEAD) + EVENT[:12] + b"\x0b\0" + bytes(32) + EVENT[34:], "one digest"),
        (encode_head(HEAD) + encode_event(measured(7, 1, bytes(65537)), HEAD), "cannot have 65537"),
        (encode_log(measured(1, 1, bytes(60000)) for _ in range(18)), "an event log of"),
        (encode_log([measured(1, 1, b"")] * 4097), "event 4096 .* one too many"),
    ],
)  # fmt: skip
def test_what_is_no_log_is_refused(log: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        eventlog.parse_event_log(log)


def test_the_largest_log_is_read() -> None:
    assert len(eventlog.parse_event_log(encode_log([measured(1, 1, b"")] * 4096))) == 4096


def test_replay_folds_the_events_of_one_pcr() -> None:
    value = bytes(32)
    for data in (bytes(4), b"words"):
        value = hashlib.sha256(value + hashlib.sha256(data).digest()).digest()
    assert eventlog.replay([*EVENTS, unmeasured(b"not this", 7)], SEVEN) == value
    assert eventlog.replay(EVENTS, init.Pcr(11)) == bytes(32)


def test_the_locality_of_the_start_is_that_of_pcr_0() -> None:
    start = unmeasured(b"StartupLocality\0\3")
    value = hashlib.sha256(bytes(31) + b"\3" + hashlib.sha256(b"version").digest()).digest()
    assert eventlog.replay([start, *EVENTS], init.Pcr(0)) == value
    assert eventlog.replay([start, *EVENTS], SEVEN) == eventlog.replay(EVENTS, SEVEN)
    for log in ([EVENTS[0], start], [unmeasured(b"StartupLocality\0")], [start, start]):
        with pytest.raises(ValueError, match="StartupLocality"):
            eventlog.replay(log, init.Pcr(0))


def test_tpm2_eventlog_agrees(need: Callable[..., None], tmp_path: Path) -> None:
    need("tpm2_eventlog")
    start, words = unmeasured(b"StartupLocality\0\3"), measured(7, 5, b"words")
    (tmp_path / "made").write_bytes(encode_log([start, EVENTS[0], EVENTS[1], words], [*SIZES]))
    for log in (tmp_path / "made", GOLDEN / "ovmf-event-log.bin"):
        done = subprocess.run(["tpm2_eventlog", log], capture_output=True, check=True)
        theirs = yaml.load(done.stdout, yaml.CBaseLoader)
        events = eventlog.parse_event_log(log.read_bytes())
        for pcr, value in theirs["pcrs"]["sha256"].items():
            assert eventlog.replay(events, init.Pcr(int(pcr))).hex() == f"{int(value, 16):064x}", (log, pcr)
        seen = [(int(each["PCRIndex"]), each["DigestCount"]) for each in theirs["events"][1:]]
        assert [pcr for pcr, _ in seen] == [event.pcr for event in events]
