"""From a machine that trusts nobody to one that boots from its own disk: keys are enrolled in the menu of
the medium, the verified live system installs from a registry, and faults come on the way.
"""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from installing import FOREIGN, Asking, boot_variables

from mosinit import disk
from mosinit.machine import VARIABLES

pytestmark = pytest.mark.cold


def test_a_machine_in_setup_mode_is_refused_and_gets_its_keys(asking: Asking) -> None:
    console = (asking.state / "console.log").read_text(errors="replace")
    refused = console.index('"failed": "SB-MODE"')
    chosen = console.index("Enroll Secure Boot keys: mosinit", refused)
    enrolled = console.index("successfully enrolled", chosen)
    assert console.index('"result": "pivoted"') > enrolled
    stored = (asking.saved.folder / VARIABLES).read_bytes()
    for role in disk.ENROLMENT.values():
        assert asking.world.keyset.certificate(role).public_bytes(Encoding.DER) in stored


def test_the_live_system_then_passes_what_it_was_refused_by(asking: Asking) -> None:
    console = (asking.state / "console.log").read_text(errors="replace")
    line = next(line for line in console.splitlines() if '"result": "pivoted"' in line)
    report = cast("dict[str, Any]", json.loads(line.partition("mosinit-report: ")[2]))
    passed = {check["id"] for check in report["checks"]}
    assert passed >= {"SB-MODE", "SB-OFF", "SB-DB", "SB-KEYRING"}


def test_firmware_keeps_what_was_planted_up_to_the_installation(asking: Asking) -> None:
    order, entries = boot_variables(asking.saved.folder)
    assert {number: entries[number] for number in FOREIGN} == FOREIGN
    assert [number for number in order if number in FOREIGN] == list(FOREIGN)
