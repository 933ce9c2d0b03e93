"""A real terminal without a person: tmux runs a program, keys go in, what is on the screen comes out."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SECONDS = 60.0  # until something has to be on the screen; nothing waits that long unless it fails


class Terminal:
    """One program in one terminal. What was on the screen before, and how it ended, is there afterwards."""

    def __init__(self, folder: Path, command: Sequence[str], size: tuple[int, int], term: str) -> None:
        self.folder = folder
        # A socket's name must be short, and no configuration of whoever runs the tests may count.
        self._tmux = ["tmux", "-u", "-f", "/dev/null", "-S", str(folder / "tmux")]
        script = (
            f"echo what was here before; stty -g > before; {shlex.join(command)} 2> errors; "
            'echo "ended with $?"; stty -g > after; exec sleep 600'
        )
        columns, rows = size
        words = ["new-session", "-d", "-x", str(columns), "-y", str(rows), "-c", str(folder)]
        option = ["set-option", "-g"]
        self._run(
            *option, "status", "off", ";", *option, "default-terminal", "tmux-256color", ";",
            *words, "env", f"TERM={term}", "sh", "-c", script,
        )  # fmt: skip
        self._session = self.ask("pane_pid")

    def _run(self, *words: str) -> str:
        done = subprocess.run([*self._tmux, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"tmux {words[0]}: {done.stderr}"
        return done.stdout

    def press(self, *keys: str) -> None:
        """Press keys, called as tmux calls them."""
        self._run("send-keys", *keys)

    def type(self, text: str) -> None:
        """Type a text."""
        self._run("send-keys", "-l", text)

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size."""
        self._run("resize-window", "-x", str(columns), "-y", str(rows))

    def ask(self, what: str) -> str:
        """Return what tmux knows of the terminal."""
        return self._run("display-message", "-p", f"#{{{what}}}").strip()

    def record(self, file: Path) -> None:
        """Keep every byte that the program writes from here."""
        self._run("pipe-pane", "-O", f"cat > {shlex.quote(str(file))}")

    def screen(self, *, escapes: bool = False) -> str:
        """Return what is on the screen."""
        return self._run("capture-pane", "-p", *(["-e"] if escapes else []))

    def wait(self, *texts: str, gone: str = "") -> str:
        """Return the screen once all these texts are on it, and `gone` is not."""
        deadline = time.monotonic() + SECONDS
        while True:
            seen = self.screen()
            if all(text in seen for text in texts) and not (gone and gone in seen):
                return seen
            if time.monotonic() > deadline:
                errors = (self.folder / "errors").read_text() if (self.folder / "errors").exists() else ""
                raise AssertionError(f"no {texts} (or still {gone!r}) in:\n{seen}\n{errors}")
            time.sleep(0.03)

    def ended(self, status: int) -> str:
        """Wait for the program's end; see that the terminal is what it was, and return its screen."""
        seen = self.wait(f"ended with {status}")
        assert "what was here before" in seen
        deadline = time.monotonic() + SECONDS
        while not (self.folder / "after").exists() or not (self.folder / "after").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.03)
        assert (self.folder / "after").read_text() == (self.folder / "before").read_text()
        assert (self.ask("alternate_on"), self.ask("cursor_flag")) == ("0", "1")
        return seen

    def close(self) -> None:
        """End it, and wait for whatever runs in it: that still writes to our folder."""
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, check=False)
        deadline = time.monotonic() + SECONDS
        while any(map(self._runs, Path("/proc").glob("[0-9]*/stat"))) and time.monotonic() < deadline:
            time.sleep(0.03)

    def _runs(self, stat: Path) -> bool:
        """Say whether a process is one of this terminal's (proc(5): state and session follow its name)."""
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return False
        return words[3] == self._session and words[0] != "Z"


@contextmanager
def terminal(
    command: Sequence[str], size: tuple[int, int] = (80, 24), term: str = "vt220"
) -> Iterator[Terminal]:
    """Run a program in a terminal; FOLDER in its words becomes the folder that it runs in."""
    with tempfile.TemporaryDirectory(prefix="mosinit-screen-") as name:
        words = [word.replace("FOLDER", name) for word in command]
        made = Terminal(Path(name), words, size, term)
        try:
            yield made
        finally:
            made.close()
