"""The screen of whoever sits at a machine's serial line: 80 columns, 24 rows, and a keyboard."""

from __future__ import annotations

import asyncio
from typing import Any

from driven import SECONDS, Driven
from urwid import vterm

from mosinit.console import FRAME

COLUMNS, ROWS = 80, 24
ENTER, TAB, BACK_TAB = b"\r", b"\t", b"\x1b[Z"


class _Window:
    """What an emulated terminal is in: it answers nobody."""

    def __init__(self) -> None:
        self.term_modes = vterm.TermModes()

    def respond(self, words: str) -> None:
        """Answer a question for the kind of terminal."""

    def beep(self) -> None:
        """Ring."""

    def leds(self, which: str) -> None:
        """Light a lamp."""

    def set_title(self, title: str) -> None:
        """Take another title."""


class Screen:
    """A machine's serial console as a person sees it, from the hand-over on."""

    def __init__(self, machine: Driven) -> None:
        self.machine = machine
        self._terminal: Any = vterm.TermCanvas(COLUMNS, ROWS, _Window())
        self._shown = -1

    def text(self) -> str:
        """Return what is on the screen now."""
        console = self.machine.console
        if self._shown < 0 and (begin := console.find(FRAME)) >= 0:
            self._shown = begin
        if self._shown >= 0:
            self._terminal.addstr(bytes(console[self._shown :]))
            self._shown = len(console)
        rows = (b"".join(cell[2] for cell in row).decode(errors="replace") for row in self._terminal.term)
        return "\n".join(row.rstrip() for row in rows)

    async def shows(self, words: str, seconds: float = SECONDS) -> str:
        """Wait until these words are on the screen; return all of it."""
        try:
            await self.machine.until(lambda: words in self.text(), repr(words), seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- the screen:\n{self.text()}") from None
        return self.text()

    async def type(self, keys: bytes) -> None:
        """Press keys, as fast as a serial line takes them."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.machine.machine.console, keys)
