"""Runs as root on a live medium: brings the machine beside it back as a person would, by the command.

The organisation is at the other end of the exchange port. Last it tells what was said, in one line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, "/usr/lib/mosinit")
from mosinit import unattended

STATE = Path("/run/provision")
DISK = "/dev/disk/by-id/virtio-extra1"
GIVEN = json.loads(Path("/usr/lib/recovery/given.json").read_text())
TOLD: dict[str, object] = {}


def mosinit(name: str, *words: str, typed: str = "") -> dict[str, object]:
    """Run the command, and note what it said."""
    begun = time.monotonic()
    done = subprocess.run(
        ["mosinit", *words, "--json"], capture_output=True, input=typed, text=True, check=False
    )
    seconds = round(time.monotonic() - begun, 1)
    TOLD[name] = {"status": done.returncode, "said": done.stderr[-3000:], "seconds": seconds}
    result = json.loads(done.stdout) if done.stdout else {}
    TOLD[name] |= {"result": result}  # type: ignore[operator]
    assert isinstance(result, dict)
    return result


def ask(document: bytes) -> bytes:
    """Ask the organisation."""
    return unattended.exchange(unattended.PORT, document)


def recover() -> None:
    """A new TPM: provision, then recover with the key that the organisation keeps."""
    mosinit("request", "provision", "--organisation", "/run/mosinit/organisation", "--dir", str(STATE))
    (STATE / "answer.json").write_bytes(ask((STATE / "request.json").read_bytes()))
    mosinit("answer", "provision", "--dir", str(STATE), "--answer", str(STATE / "answer.json"))
    words = ["recover", "--disk", DISK, "--dir", str(STATE), "--key", "-"]
    mosinit("wrong key", *words[:-2], "--key", "-", typed="another key\n")
    mosinit("plan", *words, "--plan", typed=GIVEN["recovery"])
    mosinit("recover", *words, typed=GIVEN["recovery"])


def reseal() -> None:
    """Another PCR 7: have it approved, and lay the approval. No disk is named: there is one."""
    mosinit("ask", "recover", "--reseal", "--out", "/run/event-log")
    log = Path("/run/event-log").read_bytes().hex()
    approved = ask(json.dumps({"type": "event log", "log": log}).encode())
    Path("/run/approvals.json").write_bytes(approved)
    mosinit("reseal", "recover", "--reseal", "--approvals", "/run/approvals.json")
    mosinit("again", "recover", "--reseal", "--out", "/run/event-log")


try:
    {"recover": recover, "reseal": reseal}[GIVEN["story"]]()
except Exception as error:
    TOLD["error"] = repr(error)
ask(json.dumps({"type": "told", "told": TOLD}).encode())
