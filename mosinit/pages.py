"""What a screen shows, as plain data: texts, choices, fields, buttons and a bar, one under another.

A flow (`installer`) makes pages and takes what is done on them; `screens` draws them in a terminal. So a
flow is tested without a terminal, and the terminal without a flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True)
class Text:
    """Words over one or more lines; `style` is "", "strong", "good", "warning" or "error"."""

    words: str
    style: str = ""


@dataclass(frozen=True)
class Choice:
    """A line of a list. With `refused` it cannot be chosen, and that says why; `details` are shown below the
    list while it is the current one.
    """

    action: str
    words: str
    refused: str = ""
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Field:
    """A line to type in; what is typed in a secret one is not shown."""

    name: str
    label: str
    value: str = ""
    secret: bool = False


@dataclass(frozen=True)
class Button:
    """Something to do."""

    action: str
    label: str


@dataclass(frozen=True)
class Bar:
    """How far something is."""

    done: int
    total: int
    words: str


Item: TypeAlias = Text | Choice | Field | Button | Bar


@dataclass(frozen=True)
class Page:
    """A screenful. `back` is what Esc does, `keys` says which keys there are; `focus` is the action or the
    field at which a person begins, "" for the first.
    """

    name: str
    title: str
    items: tuple[Item, ...]
    back: str = "back"
    keys: str = "Arrows, Tab: move   Enter: choose   Esc: back"
    focus: str = ""


class Flow(Protocol):
    """What leads a person from page to page."""

    over: bool

    def page(self) -> Page:
        """Return what is to be seen now."""

    def act(self, action: str, values: Mapping[str, str]) -> None:
        """Take what a person did, with what all fields hold; Ctrl-C is "interrupt"."""

    def tick(self) -> None:
        """Look whether something has happened meanwhile."""


def text(page: Page) -> str:
    """Return a page's words, for tests and logs."""
    lines = [page.title]
    for item in page.items:
        match item:
            case Text(words) | Bar(words=words):
                lines.append(words)
            case Choice(words=words, refused=refused, details=details):
                lines += [words, *([refused] if refused else []), *details]
            case Field(label=label):
                lines.append(f"{label}:")
            case Button(label=label):
                lines.append(f"[ {label} ]")
    return "\n".join(lines)
