"""Provisioning and installing without a person: answers on the medium, and a port to whoever enrolls.

    /mosinit/answers.yaml on the medium's EFI system partition, which anybody may write:

    version: 1
    disk: /dev/disk/by-id/virtio-machine    # the disk to install on
    erase: SERIAL                           # optional: the disk whose content may be lost
    state: 512                              # optional: MiB of a volume for /var

They choose, and weaken nothing: what is installed is verified as ever. The request goes out as one line of
JSON, and the organisation's answer is the one line that comes back.
"""

from __future__ import annotations

import json
import os
import re
import select
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mosinit import init, install, provision
from mosinit.host import Failure

PORT = Path("/dev/virtio-ports/org.mosinit.exchange")
REPORT_PORT = Path("/dev/virtio-ports/org.mosinit.report")
STATE = Path("/run/mosinit-provision")
ANSWER_BYTES = 4 << 20
ANSWER_SECONDS = 3600.0  # somebody may have to look at the request
FIELDS = {"version", "disk", "erase", "state"}


@dataclass(frozen=True)
class Answers:
    """What the answers say; `state` in bytes."""

    disk: Path
    erase: str | None
    state: int


def read_answers(path: Path) -> Answers:
    """Read answers. Raises `Failure` that names what is wrong."""
    try:
        with path.open("rb") as file:
            data = file.read(4097)
    except OSError as error:
        raise Failure(f"cannot read the answers {path}: {error.strerror}") from error
    if len(data) > 4096:
        raise Failure(f"{path} is larger than 4096 bytes, which no answers are")
    try:
        node = init.parse_yaml(data)
    except init.Refused as refused:
        raise Failure(f"{path}: expected {refused.expected}, seen {refused.seen}") from refused
    words = node.value if isinstance(node.value, dict) else {}
    values: Mapping[str, object] = {str(key): each.value for key, each in words.items()}
    odd = sorted(set(values) - FIELDS) or sorted({"version", "disk"} - set(values))
    if odd or values["version"] != 1:
        raise Failure(f"{path}: {odd[0] if odd else 'version'} is missing, unknown or wrong")
    disk, erase, state = values["disk"], values.get("erase"), values.get("state", 0)
    if not isinstance(disk, str) or not re.fullmatch(r"/dev/[A-Za-z0-9._:/+-]{1,200}", disk):
        raise Failure(f"{path}: disk is no path below /dev")
    if erase is not None and type(erase) not in (str, int):
        raise Failure(f"{path}: erase is no serial")
    if type(state) is not int or not 0 <= state < 1 << 30:
        raise Failure(f"{path}: state is no number of MiB")
    return Answers(Path(disk), None if erase is None else str(erase), state << 20)


def run(host: install.Installer, answers: Path) -> dict[str, object]:
    """Provision this machine and install on its disk; says how it went on the report port, too."""
    try:
        done = _run(host, read_answers(answers))
    except (Failure, init.Refused, OSError) as error:
        _tell({"target": "installed", "error": str(error)[:1000]})
        raise
    _tell({"target": "installed", "installed": json.loads(json.dumps(done, default=str))})
    return done


def _run(host: install.Installer, answers: Answers) -> dict[str, object]:
    options = install.Options(answers.disk, STATE, erase=answers.erase, state=answers.state)
    # All that can be refused is refused before the TPM is touched.
    install.show_plan(host, options)
    if not (STATE / "seal.json").exists():
        host.say("provisioning: the request goes out")
        asked = provision.request(host, provision.Options(install.LEFT / "organisation", STATE))
        reply = exchange(PORT, Path(str(asked["request"])).read_bytes())
        (STATE / "answer.json").write_bytes(reply)
        provision.finish(host, STATE, STATE / "answer.json")
    return install.install(host, options)


def exchange(port: Path, request: bytes, seconds: float = ANSWER_SECONDS) -> bytes:
    """Send a request as one line and return the line that comes back."""
    line = json.dumps(json.loads(request)).encode() + b"\n"
    fd = os.open(port, os.O_RDWR | os.O_CLOEXEC)
    try:
        while line:
            line = line[os.write(fd, line[:32768]) :]
        reply = b""
        while not reply.endswith(b"\n"):
            ready, _, _ = select.select([fd], [], [], seconds)
            data = os.read(fd, 65536) if ready else b""
            if not data:
                raise Failure(f"no answer came from {port}: enroll the machine, then install again")
            reply += data
            if len(reply) > ANSWER_BYTES:
                raise Failure(f"what came from {port} is no answer: it has more than {ANSWER_BYTES} bytes")
        return reply
    finally:
        os.close(fd)


def _tell(words: Mapping[str, object]) -> None:
    """Send one line to whoever runs this virtual machine, if anybody does."""
    if REPORT_PORT.exists():
        with REPORT_PORT.open("wb", buffering=0) as port:
            port.write(json.dumps(words).encode() + b"\n")
