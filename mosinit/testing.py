"""The `test` verb: everything that says whether a checkout is sound, in one run of pytest inside the tools
tree, two files of tests side by side.

Lint, types and the rules of the code are tests like the others (tests/test_rules.py).
"""

from __future__ import annotations

import os

from mosinit import tools
from mosinit.host import Host, Usage

FOLDERS = {"unit": ("tests",), "vm": ("vm-tests",), None: ("tests", "vm-tests")}
# Two files at a time: an emulated machine has one processor, and more machines at once starve each other.
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
    status = host.call(words, env={**os.environ, "MOSINIT_REQUIRE_TOOLS": "1"}, cwd=tools.checkout())
    return 0 if status == 0 else 1
