"""Answers on a medium, which anybody may have written, and the port to whoever enrolls."""

from __future__ import annotations

import json
import os
import threading
import tty
from pathlib import Path

import pytest

from mosinit import demo, unattended
from mosinit.host import Failure


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "answers.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_answers_choose_disk_and_sizes(tmp_path: Path) -> None:
    path = write(tmp_path, 'version: 1\ndisk: /dev/disk/by-id/nvme-one\nerase: "0123"\nstate: 512\n')
    assert unattended.read_answers(path) == unattended.Answers(
        Path("/dev/disk/by-id/nvme-one"), "0123", 512 << 20
    )
    path = write(tmp_path, "version: 1\ndisk: /dev/vdb\n")
    assert unattended.read_answers(path) == unattended.Answers(Path("/dev/vdb"), None, 0)


def test_the_demo_s_answers_are_answers(tmp_path: Path) -> None:
    assert unattended.read_answers(write(tmp_path, demo.ANSWERS)).state


BAD = [
    "", "[]", "version: 1\n", "disk: /dev/vdb\n", "version: 2\ndisk: /dev/vdb\n",
    "version: 1\ndisk: vdb\n", "version: 1\ndisk: /etc/passwd\n", "version: 1\ndisk: 7\n",
    "version: 1\ndisk: /dev/vdb\ndisk: /dev/vda\n", "version: 1\ndisk: /dev/vdb\nsource: oci:/tmp\n",
    "version: 1\ndisk: /dev/vdb\nverify: false\n", "version: 1\ndisk: /dev/vdb\nstate: -1\n",
    "version: 1\ndisk: /dev/vdb\nstate: 1G\n", "version: 1\ndisk: /dev/vdb\nstate: true\n",
    "version: 1\ndisk: /dev/vdb\nerase: true\n", "version: 1\ndisk: /dev/vdb\nerase: [a]\n",
    "version: 1\ndisk: \"/dev/vdb\\n\"\n", "version: 1\ndisk: &a /dev/vdb\n", "#" * 5000, b"\xff\0",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_other_answers_are_refused_in_a_line(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="answers.yaml") as failure:
        unattended.read_answers(write(tmp_path, text))
    assert "\n" not in str(failure.value)


def test_answers_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="cannot read the answers"):
        unattended.read_answers(tmp_path / "none")


def exchanged(reply: bytes, request: bytes, seconds: float = 10) -> tuple[bytes, bytes]:
    """Exchange over a terminal in the place of a port; return what was asked and what came back."""
    ours, theirs = os.openpty()
    name = os.ttyname(theirs)
    tty.setraw(theirs)
    asked = bytearray()

    def other() -> None:
        while not asked.endswith(b"\n"):
            asked.extend(os.read(ours, 4096))
        os.write(ours, reply)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        return bytes(asked), unattended.exchange(Path(name), request, seconds)
    finally:
        thread.join()
        os.close(ours)
        os.close(theirs)


def test_a_request_is_one_line_and_so_is_the_answer() -> None:
    request = json.dumps({"a": ["b" * 60000, 1]}, indent=1).encode()
    _, reply = exchanged(b'{"answer": 1}\n', request)
    assert reply == b'{"answer": 1}\n'


def test_no_answer() -> None:
    with pytest.raises(Failure, match="no answer came"):
        exchanged(b"{", b"{}", seconds=0.2)
