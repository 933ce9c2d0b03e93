"""The `test` verb: everything that says whether a checkout is sound, in one run of pytest inside the tools
tree, two files of tests side by side.

Lint, types and the rules of the code are tests like the others (tests/test_rules.py).
"""

from __future__ import annotations

import os

from mosinit import tools
from mosinit.host import Host, Usage
from mosinit.machine import SLOTS

FOLDERS = {"unit": ("tests",), "vm": ("vm-tests",), None: ("tests", "vm-tests")}
# Two files at a time, and two machines however many a file starts beside each other: an emulated machine has
# one processor, and more at once starve each other.
MACHINES = 2
WORKERS = ("-n", "2", "--dist", "loadfile")


def command(strength: str | None, *, expression: str | None, cold: bool) -> list[str]:
    """Return pytest's command line for the unit tests, the VM tests or (None) both."""
    if cold and strength == "unit":
        raise Usage("--cold is for VM tests: unit tests boot nothing")
    folders = FOLDERS[strength]
    words = ["/usr/bin/python3", "-m", "pytest", *folders, *WORKERS]
    words += ["-k", expression] if expression else []
    return words + (["--cold"] if cold else [])


def run(host: Host, strength: str | None, *, expression: str | None = None, cold: bool = False) -> int:
    """Run the tests and return the exit status; the last line of output is pytest's own."""
    words = command(strength, expression=expression, cold=cold)
    # Inside the tools tree every program exists, so a test that skips for want of one would hide something.
    with host.scratch() as slots:
        for number in range(MACHINES):
            (slots / str(number)).touch()
        more = {"MOSINIT_REQUIRE_TOOLS": "1", SLOTS: str(slots)}
        status = host.call(words, env={**os.environ, **more}, cwd=tools.checkout())
    return 0 if status == 0 else 1
