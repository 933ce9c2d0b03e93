"""Hosts that note which programs they are told to start, and with what."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, NoReturn

from mosinit.host import Host

Command = Sequence[str | os.PathLike[str]]


class Started(NamedTuple):
    """A program as it was to be started; `environment` is all that it sees."""

    words: list[str]
    stdin: object
    environment: dict[str, str]
    timeout: float | None


class Watched(Host):
    """A host that does what it is told, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[Started] = []
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)
        super().say(text)

    @property
    def ran(self) -> list[list[str]]:
        """Return the words of what was started."""
        return [each.words for each in self.started]

    def note(
        self, command: Command, *, stdin: object = None, env: Mapping[str, str] | None = None,
        timeout: float | None = None, **more: object,
    ) -> Started:  # fmt: skip
        environment = dict(os.environ if env is None else env)
        self.started.append(Started([str(word) for word in command], stdin, environment, timeout))
        return self.started[-1]

    def run(self, command: Command, **options: Any) -> bytes:
        self.note(command, **options)
        return super().run(command, **options)

    @contextlib.contextmanager
    def pipe(self, command: Command, **options: Any) -> Iterator[IO[bytes]]:
        self.note(command, **options)
        with super().pipe(command, **options) as end:
            yield end

    def call(self, command: Command, **options: Any) -> int:
        self.note(command, **options)
        return super().call(command, **options)


class Recorder(Watched):
    """A host that starts nothing, says nothing, and remembers what it was told."""

    def say(self, text: str) -> None:
        self.said.append(text)

    def answer(self, program: Started) -> bytes:
        """Return what a program prints, or raise what comes of it."""
        return b""

    def run(self, command: Command, **options: Any) -> bytes:
        return self.answer(self.note(command, **options))

    def pipe(self, command: Command, **options: Any) -> NoReturn:
        raise AssertionError(f"nobody foresaw {command}")

    def call(self, command: Command, **options: Any) -> int:
        self.answer(self.note(command, **options))
        return 0
