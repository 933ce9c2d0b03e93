"""Long work beside a screen: a thread that says how far it is, and can be asked to stop.

A `Job` is where thread and screen meet: the screen reads what the work says, and what the person asks for
reaches the work at its next message, byte or wait.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

from mosinit import init

T = TypeVar("T")
KEPT_LINES = 200
WINDOW_SECONDS = 10.0  # over which a rate is taken: a line that stands still is seen soon


class Stopped(KeyboardInterrupt):
    """The person asked to stop; no handler of errors takes it for one."""


class Progress(NamedTuple):
    """How far a step is: bytes, and bytes per second of late."""

    label: str
    done: int
    total: int
    rate: float

    @property
    def seconds(self) -> float | None:
        """Seconds that are left; None if nobody can know."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None


def words_of(progress: Progress) -> str:
    """Say how far a step is, how fast, and how long it will take still."""
    done, total, rate = (value / init.MIB for value in (progress.done, progress.total, progress.rate))
    words = f"{done:.1f} of {total:.1f} MiB, {rate:.1f} MiB/s"
    if (seconds := progress.seconds) is None:
        return f"{words}, stands still"
    left = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f"{words}, {left} left"


class Job(Generic[T]):
    """Work in a thread of its own, what it said so far, and how it ended."""

    def __init__(
        self, name: str, work: Callable[[Job[T]], T], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name, self._work, self.clock = name, work, clock
        self.waiting: object = None  # what it waits for, if a person has to do something
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._samples: deque[tuple[float, int]] = deque(maxlen=64)
        self._label, self._done, self._total = "", 0, 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._result: T | None = None
        self._error: BaseException | None = None

    # --- The screen's side

    def start(self) -> None:
        """Begin. The process does not wait for the thread at its end: whoever stops twice means it."""
        self._thread = threading.Thread(target=self.run, name=self.name, daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Do the work here and now."""
        try:
            self._result = self._work(self)
        except BaseException as error:
            self._error = error
        self._ended.set()

    def stop(self) -> None:
        """Ask it to stop: it does at its next message, byte or wait."""
        self._stopping.set()

    def join(self, seconds: float) -> None:
        """Wait for its end, for a while."""
        if self._thread:
            self._thread.join(seconds)

    @property
    def ended(self) -> bool:
        """Whether it is done, or failed."""
        return self._ended.is_set()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stopping.is_set()

    @property
    def error(self) -> BaseException | None:
        """What it failed with."""
        return self._error

    def result(self) -> T:
        """Return what came of it; raises what it failed with."""
        if self._error:
            raise self._error
        return self._result  # type: ignore[return-value]  # set where there is no error

    @property
    def lines(self) -> tuple[str, ...]:
        """What it said, oldest first."""
        with self._lock:
            return tuple(self._lines)

    @property
    def progress(self) -> Progress | None:
        """How far its current step is; None if that has no measure."""
        if not self._total:
            return None
        with self._lock:
            samples = tuple(self._samples)
        now = self.clock()
        begin = next((sample for sample in samples if now - sample[0] <= WINDOW_SECONDS), None)
        moved = self._done - begin[1] if begin else 0
        rate = moved / max(now - begin[0], 0.001) if begin else 0.0
        return Progress(self._label, min(self._done, self._total), self._total, rate)

    # --- The work's side

    def check(self) -> None:
        """Raise `Stopped` if the person asked for it."""
        if self._stopping.is_set():
            raise Stopped

    def say(self, text: str) -> None:
        """Tell a line."""
        self.check()
        with self._lock:
            self._lines.append(text)

    def sleep(self, seconds: float) -> None:
        """Wait, but not for who wants to stop."""
        self._stopping.wait(seconds)
        self.check()

    @contextlib.contextmanager
    def measure(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Measure a step in bytes; call what is yielded with how many more are done."""
        self.say(label)
        with self._lock:
            self._samples.clear()
            self._samples.append((self.clock(), 0))
        self._label, self._done, self._total = label, 0, total

        def advance(more: int) -> None:
            self.check()
            self._done += more
            now = self.clock()
            if now - self._samples[-1][0] >= WINDOW_SECONDS / 20:
                with self._lock:
                    self._samples.append((now, self._done))

        try:
            yield advance
        finally:
            self._total = 0
