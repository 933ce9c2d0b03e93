"""Make the README's pictures: `python3 -m mosinit tools run python3 docs/pictures.py`, in the top folder.

The installer's are what its real screens show in a terminal, before a machine that exists only in memory;
the refusal and the report are what the bring-up and `mosinit explain` write. The same code makes the same
bytes: `--out DIR` writes them elsewhere, and a test compares.
"""

from __future__ import annotations

import argparse
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich._export_format import CONSOLE_SVG_FORMAT  # noqa: E402 (found from here)
from rich.console import Console  # noqa: E402
from rich.text import Text  # noqa: E402

from mosinit import explain, init  # noqa: E402
from tests.fakeworld import SSD  # noqa: E402
from tests.terminals import terminal  # noqa: E402

SIZE = (80, 25)
# No font is fetched from anywhere: whoever reads a README is not to be seen by others.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S).replace("Fira Code, ", "")
REPORT = {
    "schema": 1, "result": "pivoted", "mode": "run", "product": "7d0f8a3e-0c1d-4c5a-9a55-1f2e3d4c5b6a",
    "sequence": 42, "uki_id": "5f2b1c9ae07d4c3b" * 4, "failed": None,
    "checks": [
        {"id": "SB-OFF", "ok": True, "expected": "on", "seen": "on"},
        {"id": "SB-DB", "ok": True, "expected": "2 certificates", "seen": "uki and layer certificate"},
        {"id": "TPM-ABSENT", "ok": True, "expected": "a TPM 2.0", "seen": "TPM 2.0"},
        {"id": "CMDLINE", "ok": True, "expected": "the signed one", "seen": "the signed one"},
        {"id": "TPM-POLICY", "ok": True, "expected": "an approved state", "seen": "an approved state"},
        {"id": "EPOCH", "ok": True, "expected": "epoch 1 or later", "seen": "epoch 1"},
        {"id": "MANIFEST-CHAIN", "ok": True, "expected": "the manifest CA", "seen": "the manifest CA"},
    ],
    "stages": [
        {"name": "set-up", "ms": 31}, {"name": "check-firmware", "ms": 58}, {"name": "find-disk", "ms": 44},
        {"name": "unlock", "ms": 412}, {"name": "open-volumes", "ms": 380}, {"name": "stack", "ms": 12},
    ],
}  # fmt: skip
REFUSED = init.Refused(
    "TPM-POLICY",
    expected="a PCR 7 that this organisation approved",
    seen="PCR 7 3a1f0c66d2b94e7180aa5c0de2f4b7196cf08b53d1e2a497f05c6b8d7e9f1023",
)


def svg(name: str, title: str, text: Text) -> str:
    """Draw a text as a terminal shows it."""
    console = Console(
        record=True, width=SIZE[0], file=io.StringIO(), force_terminal=True, color_system="truecolor",
        legacy_windows=False, _environ={},
    )  # fmt: skip
    console.print(text, soft_wrap=True, end="")
    drawn: str = console.export_svg(title=title, code_format=FORMAT, unique_id=f"mosinit-{name}")
    return "".join(f"{line.rstrip()}\n" for line in drawn.splitlines())


def installer() -> Iterator[tuple[str, str, str]]:
    """Go through the installer; yield the name, the title and the screen of each picture."""
    program = shlex.join(
        [sys.executable, "-W", "ignore", "-m", "tests.fakeworld", "FOLDER", "enrol", "still"]
    )
    command = ["sh", "-c", f"cd {shlex.quote(str(ROOT))} && exec {program}"]
    with terminal(command, SIZE, "tmux-256color") as shown:
        shown.wait("> [ Continue ]")
        shown.press("Enter")
        shown.wait("> This medium")
        shown.press("Enter")
        shown.wait("> nvme0n1", "photos-and-thesis")
        yield "disk", "mosinit install: which disk", shown.screen(escapes=True)
        shown.press("Enter")
        shown.wait("[ Erase this disk and install ]")
        shown.type(SSD.serial)
        shown.wait(f"Serial: {SSD.serial}")
        yield "plan", "mosinit install: plan and consent", shown.screen(escapes=True)
        shown.press("Enter", "Enter")
        shown.wait("waits to be enrolled")
        yield "enrolment", "mosinit install: enrolment", shown.screen(escapes=True)
        for name in ("wrong", "answer"):
            (shown.folder / name).touch()
        shown.wait("47%", "62.5 MiB/s, 2 s left")
        yield "progress", "mosinit install: progress", shown.screen(escapes=True)


def pictures() -> Iterator[tuple[str, str]]:
    """Yield the name and the content of every picture."""
    for name, title, screen in installer():
        yield f"install-{name}.svg", svg(name, title, Text.from_ansi(screen))
    stages = REPORT["stages"]
    assert isinstance(stages, list)
    refused = {**REPORT, "stages": stages[:4]}
    yield (
        "refusal.svg",
        svg("refusal", "a machine whose firmware changed", folded(init.screen(refused, REFUSED))),
    )
    yield "report.svg", svg("report", "a boot report", folded(explain.report_text(REPORT)))


def folded(text: str) -> Text:
    """Break lines where a terminal does."""
    width = SIZE[0]
    rows = [line[at : at + width] for line in text.split("\n") for at in range(0, max(len(line), 1), width)]
    return Text("\n".join(rows))


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description="makes the pictures of the README")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/pictures", help="where they go")
    out = parser.parse_args().out
    out.mkdir(exist_ok=True)
    for name, content in pictures():
        (out / name).write_text(content)


if __name__ == "__main__":
    main()
