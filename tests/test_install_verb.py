"""`mosinit install --plan` as it is called on a live machine: the plan is printed, nothing changes."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mosinit import init, install, layout, tools
from mosinit.host import Host
from tests import installation
from tests.installation import Setting
from tests.recovering import fingerprint


@pytest.fixture
def disk(need: Callable[..., None], disk: Path) -> Path:
    """A disk on which something lies."""
    need("unshare")
    subprocess.run(["mkfs.ext4", "-q", "-L", "photos", disk], check=True)
    return disk


def mosinit(made: Setting, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Call the command where /run/mosinit is what the bring-up leaves to a live system."""
    command = shlex.join([sys.executable, "-m", "mosinit", *map(str, words)])
    left = shlex.quote(str(made.left))
    # /run is a folder of its own there: nothing of whoever runs the tests is in the way.
    script = (
        f"mount -t tmpfs none /run && mkdir {init.LEFT} && mount --bind {left} {init.LEFT} && exec {command}"
    )
    return subprocess.run(
        ["unshare", "--mount", "--propagation=private", "sh", "-c", script],
        capture_output=True, text=True, check=False, cwd=tools.checkout(),
    )  # fmt: skip


def test_a_plan_is_printed_as_text_and_as_json_and_changes_nothing(
    made: Setting, disk: Path, memory: Path, tmp_path: Path
) -> None:
    state, before = tmp_path / "state", fingerprint(memory / "disk")
    words = ("install", f"oci:{made.release}", "--disk", disk, "--dir", state, "--state", "64", "--plan")
    text, data = mosinit(made, *words), mosinit(made, *words, "--json")
    assert (text.returncode, data.returncode) == (0, 0), text.stderr + data.stderr
    options = installation.options(made, disk, state=64 * init.MIB)
    wanted = install.show_plan(Host(), dataclasses.replace(options, provisioned=state))
    assert json.loads(data.stdout) == json.loads(json.dumps(wanted, default=str))
    assert text.stdout == install.plan_text(wanted) + "\n"
    assert ("'photos'" in text.stdout, "step 1 " in text.stdout) == (True, True)
    assert fingerprint(memory / "disk") == before
    assert not state.exists()


def test_a_word_that_is_not_this_disk_s_has_no_plan(made: Setting, disk: Path, tmp_path: Path) -> None:
    words = ("install", f"oci:{made.release}", "--disk", disk, "--dir", tmp_path / "state", "--plan")
    word = layout.inspect(Host(), disk).word
    assert mosinit(made, *words, "--erase", word).returncode == 0
    other = mosinit(made, *words, "--erase", word[:-1] + ("0" if word[-1] != "0" else "1"))
    assert (other.returncode, other.stdout) == (1, "")
    assert "other partition tables or signatures" in other.stderr
