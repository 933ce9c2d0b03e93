"""The README's pictures are what the code shows today."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs/pictures"


def test_pictures_are_current_small_and_fetch_nothing(need: Callable[..., None], tmp_path: Path) -> None:
    need("tmux")
    subprocess.run([sys.executable, ROOT / "docs/pictures.py", "--out", tmp_path], check=True, cwd=ROOT)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(made) == sorted(path.name for path in KEPT.iterdir())
    for name, content in made.items():
        assert (KEPT / name).read_text() == content, f"{name}: run docs/pictures.py"
        assert len(content) < 60 << 10
        assert "url(http" not in content
        assert "<script" not in content


def test_the_readme_shows_pictures_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    shown = [
        line.partition("](")[2].partition(")")[0] for line in readme.splitlines() if line.startswith("![")
    ]
    wanted = ("install-disk", "install-plan", "install-progress", "refusal", "report")
    assert [f"docs/pictures/{name}.svg" for name in wanted] == shown
    for name in shown:
        assert (ROOT / name).is_file()
