"""Pages in a terminal: urwid draws them, a person leads through them with the keyboard alone.

Made for the worst terminal that a machine has, a serial line of 80x24 that says nothing of its size and
knows neither colours nor line drawing, at 960 bytes a second: only rows that changed are sent, a few times
a second at most. Whatever a page says is made harmless here, wherever it comes from. The terminal is as it
was afterwards, however this ends.
"""

from __future__ import annotations

import contextlib
import os
import sys
import termios
from collections.abc import Callable, Iterator, Mapping

import urwid

from mosinit import pages
from mosinit.host import printable

TICK_SECONDS = 0.25
# An arrow is several bytes, which a slow line brings one after another: Esc alone is what nothing follows.
ESCAPE_SECONDS = 0.3
ASSUMED, SMALLEST = (80, 24), (40, 12)
DETAIL_ROWS = 7
PALETTE = [
    ("head", "white", "dark blue", "standout"),
    ("keys", "black", "light gray", ""),
    ("focus", "black", "light gray", "standout"),
    ("field", "white", "dark blue", "underline"),
    ("strong", "white", "", "bold"),
    ("good", "light green", "", "bold"),
    ("warning", "yellow", "", "bold"),
    ("error", "light red", "", "bold"),
    ("refused", "dark gray", "", ""),
    ("bar", "light green", "", ""),
]
PLAIN_TERMINALS = ("vt", "ansi", "dumb", "unknown")


class Look:
    """What a terminal can show."""

    def __init__(self, term: str, encoding: str) -> None:
        self.plain = not term or term.startswith(PLAIN_TERMINALS) or "utf" not in encoding.lower()
        self.rule, self.full, self.empty = ("-", "#", ".") if self.plain else ("─", "█", "░")
        self.trough = "|" if self.plain else "│"

    def clean(self, text: str) -> str:
        """Return what can do nothing to the terminal: no controls, and on a plain one ASCII alone."""
        lines = [printable(line) for line in text.replace("\t", " ").split("\n")]
        if self.plain:
            lines = [line.encode("ascii", "replace").decode() for line in lines]
        return "\n".join(lines)

    def line(self, text: str) -> str:
        """Return the same as one line."""
        return self.clean(text.replace("\n", " "))


class Terminal(urwid.display.raw.Screen):
    """A terminal that may not know its size."""

    def get_cols_rows(self) -> tuple[int, int]:
        """Return columns and rows; a serial line says 0 for both."""
        seen = super().get_cols_rows()
        columns, rows = (
            max(there, least) if there > 0 else assumed
            for there, assumed, least in zip(seen, ASSUMED, SMALLEST, strict=True)
        )
        self.maxrow = rows
        return columns, rows


class Line(urwid.WidgetWrap):
    """A line that can be chosen: marked by a sign, by the cursor, and by how it looks."""

    def __init__(self, action: str, words: str, details: tuple[str, ...] = ()) -> None:
        self.action, self.words, self.details = action, words, details
        here = urwid.SelectableIcon(f"> {words}", 0)
        here.set_layout("left", "ellipsis")
        self._here = urwid.AttrMap(here, "focus")
        super().__init__(urwid.Text(f"  {words}", wrap="ellipsis"))

    def selectable(self) -> bool:
        """It can have the focus."""
        return True

    def keypress(self, size: object, key: str) -> str:
        """Take no key: what Enter does, the view knows."""
        return key

    def get_cursor_coords(self, size: tuple[int]) -> tuple[int, int]:
        """Show the cursor where the sign is."""
        return 0, 0

    def render(self, size: tuple[int], focus: bool = False) -> urwid.Canvas:
        """Draw it."""
        return urwid.CompositeCanvas((self._here if focus else self._w).render(size, focus))


class Entry(urwid.WidgetWrap):
    """A line to type in."""

    def __init__(self, field: pages.Field, label: str, value: str) -> None:
        self.name = field.name
        self.edit = urwid.Edit(("", f"  {label}: "), value, mask="*" if field.secret else None)
        super().__init__(urwid.AttrMap(self.edit, None, "field"))


class Meter(urwid.Text):
    """A bar as wide as the screen."""

    def __init__(self, bar: pages.Bar, look: Look) -> None:
        self._share = min(1.0, bar.done / bar.total) if bar.total else 0.0
        self._look = look
        super().__init__("")

    def render(self, size: tuple[int], focus: bool = False) -> urwid.Canvas:
        """Draw it."""
        width = size[0] - 11
        full = int(width * self._share)
        bar = self._look.full * full + self._look.empty * (width - full)
        words = urwid.Text([f"  {self._share:4.0%} [", ("bar", bar), "]"], wrap="clip")
        return urwid.CompositeCanvas(words.render(size))


class View(urwid.WidgetWrap):
    """One page in the terminal."""

    def __init__(self, page: pages.Page, look: Look, act: Callable[[str], None]) -> None:
        self.page, self._look, self._act, self._sized = page, look, act, False
        rows: list[urwid.Widget] = []
        for item in page.items:
            rows += self._widgets(item)
        self._rows = urwid.SimpleFocusListWalker(rows or [urwid.Text("")])
        self._list = urwid.ListBox(self._rows)
        body = urwid.ScrollBar(self._list, thumb_char=look.full, trough_char=look.trough)
        head = urwid.AttrMap(urwid.Text(look.line(f" mosinit | {page.title}"), wrap="ellipsis"), "head")
        # One row each, whatever a disk says of itself: else they would leave none for the list.
        self._details = urwid.Text("", wrap="clip")
        head = urwid.Pile([head, urwid.Divider()])
        inner = urwid.Padding(body, left=1, right=1)
        super().__init__(urwid.Frame(inner, header=head, footer=self._footer()))
        self._focus_first()
        self._show_details()

    def _widgets(self, item: pages.Item) -> list[urwid.Widget]:
        clean, line = self._look.clean, self._look.line
        match item:
            case pages.Text(words, style):
                return [urwid.Text((style, clean(words)))]
            case pages.Choice(words=words, refused=refused) if refused:
                return [urwid.Text(("refused", f"  {clean(words)}\n    cannot be chosen: {clean(refused)}"))]
            case pages.Choice(action, words, _, details):
                return [Line(action, line(words), tuple(map(line, details)))]
            case pages.Field():
                return [Entry(item, line(item.label), line(item.value))]
            case pages.Button(action, label):
                return [Line(action, f"[ {line(label)} ]")]
            case pages.Bar(words=words):
                return [Meter(item, self._look), urwid.Text(f"  {clean(words)}")]

    def _footer(self) -> urwid.Widget:
        keys = urwid.AttrMap(urwid.Text(f" {self._look.line(self.page.keys)}", wrap="clip"), "keys")
        if not any(isinstance(item, pages.Choice) and item.details for item in self.page.items):
            return keys
        below = urwid.Padding(self._details, left=1)
        return urwid.Pile([urwid.Divider(self._look.rule), below, keys])

    # --- Focus

    def _places(self) -> list[int]:
        return [place for place, row in enumerate(self._rows) if row.selectable()]

    def _name(self, place: int) -> str:
        row = self._rows[place]
        return row.action if isinstance(row, Line) else row.name if isinstance(row, Entry) else ""

    def _focus_first(self) -> None:
        """Begin where the page says, or at the first line of a list. Else the first line on the screen that
        can be chosen is the current one: a long text begins at its beginning.
        """
        wanted = self.page.focus
        for place in self._places():
            row = self._rows[place]
            if self._name(place) == wanted if wanted else isinstance(row, Line) and row.details:
                self._go(place)
                return

    def _go(self, place: int) -> None:
        """Make a line the current one, with what is around it."""
        self._list.set_focus(place)
        self._list.set_focus_valign("middle")

    def _move(self, by: int) -> None:
        """Go to the next or the last line that can be chosen."""
        places = self._places()
        here = self._rows.focus or 0
        behind = [place for place in places if (place > here if by > 0 else place < here)]
        if places:
            self._rows.set_focus((behind or places)[0 if by > 0 else -1])

    def _jump(self, letter: str) -> None:
        """Go to the next line that begins with a letter."""
        here = self._rows.focus or 0
        places = sorted(self._places(), key=lambda place: (place <= here, place))
        for place in places:
            row = self._rows[place]
            if isinstance(row, Line) and row.words.lstrip("[ ").lower().startswith(letter.lower()):
                self._rows.set_focus(place)
                return

    def _show_details(self) -> None:
        """Show what belongs to the current line, always in as many rows."""
        row = self._rows[self._rows.focus or 0]
        lines = list(row.details) if isinstance(row, Line) else []
        most = max([0, *(len(row.details) for row in self._rows if isinstance(row, Line))])
        height = min(DETAIL_ROWS, most)
        if len(lines) > height:
            lines = [*lines[: height - 1], f"  ... and {len(lines) - height + 1} more"]
        self._details.set_text("\n".join(lines + [""] * (height - len(lines))))

    # --- What was typed

    @property
    def values(self) -> dict[str, str]:
        """What all fields hold."""
        return {row.name: row.edit.edit_text for row in self._rows if isinstance(row, Entry)}

    def take_over(self, before: View) -> None:
        """Go on where an earlier picture of the same page stood."""
        for row in self._rows:
            if isinstance(row, Entry) and row.name in before.values:
                row.edit.set_edit_text(before.values[row.name])
                row.edit.set_edit_pos(len(row.edit.edit_text))
        name = before._name(before._rows.focus or 0)
        for place in self._places():
            if name and self._name(place) == name:
                self._go(place)
        self._show_details()

    def keypress(self, size: tuple[int, int], key: str) -> str | None:
        """Take a key."""
        if not self._sized:
            # Typed ahead: urwid's parts learn how large they are when they are drawn.
            self.render(size, focus=True)
            self._sized = True
        row = self._rows[self._rows.focus or 0]
        if key == "ctrl c":
            self._act("interrupt")
        elif key == "esc":
            self._act(self.page.back)
        elif key in ("enter", " ") and isinstance(row, Line):
            self._act(row.action)
        elif key in ("tab", "shift tab") or (key == "enter" and isinstance(row, Entry)):
            self._move(-1 if key == "shift tab" else 1)
        elif key == "ctrl l":
            return key  # urwid draws all of it anew: others may have written to this terminal
        elif super().keypress(size, key) and len(key) == 1:
            self._jump(key)
        self._show_details()
        return None


class App:
    """A flow on a terminal."""

    def __init__(self, flow: pages.Flow, screen: Terminal, look: Look) -> None:
        self._flow, self._look = flow, look
        self._view = View(flow.page(), look, self._act)
        self._loop = urwid.MainLoop(self._view, PALETTE, screen, handle_mouse=False)

    def run(self) -> None:
        """Go on until the flow is over."""
        self._loop.set_alarm_in(TICK_SECONDS, self._tick)
        self._loop.run()

    def _act(self, action: str) -> None:
        self._flow.act(action, self._view.values)
        self._show()

    def _tick(self, loop: object, data: object) -> None:
        self._flow.tick()
        self._show()
        self._loop.set_alarm_in(TICK_SECONDS, self._tick)

    def _show(self) -> None:
        """Draw the page if it is another one now."""
        if self._flow.over:
            raise urwid.ExitMainLoop
        page, before = self._flow.page(), self._view
        if page == before.page:
            return
        self._view = View(page, self._look, self._act)
        if page.name == before.page.name:
            self._view.take_over(before)
        self._loop.widget = self._view


@contextlib.contextmanager
def _restored(fd: int) -> Iterator[None]:
    """Keep the terminal's keys from being signals: those would reach every program that is started, too."""
    before = termios.tcgetattr(fd)
    quiet = termios.tcgetattr(fd)
    quiet[3] &= ~termios.ISIG
    termios.tcsetattr(fd, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def run(flow: pages.Flow, environment: Mapping[str, str] = os.environ) -> None:
    """Lead a person through a flow, on standard input and output."""
    look = Look(environment.get("TERM", ""), sys.stdout.encoding or "ascii")
    urwid.set_encoding("ascii" if look.plain else "utf-8")
    screen = Terminal()
    screen.set_input_timeouts(complete_wait=ESCAPE_SECONDS)
    screen.set_terminal_properties(colors=1 if look.plain else 16)
    with _restored(sys.stdin.fileno()):
        App(flow, screen, look).run()
