"""What all tests share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mosinit import install
from mosinit.host import Host


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a case by its number where it is bytes: keys, signatures and times in them are others each time,
    and two processes that share the tests must call them the same.
    """
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def need() -> Callable[..., None]:
    """Return a function that skips the test unless programs or files exist, or fails it for CI."""

    def is_path(tool: str | Path) -> bool:
        return "/" in str(tool) and Path(tool).exists()

    def check(*tools: str | Path) -> None:
        missing = [str(tool) for tool in tools if not shutil.which(tool) and not is_path(tool)]
        if missing and os.environ.get("MOSINIT_REQUIRE_TOOLS") == "1":
            pytest.fail(
                f"this needs {', '.join(missing)}, and MOSINIT_REQUIRE_TOOLS=1 says it must be there"
            )
        if missing:
            pytest.skip(f"this needs {', '.join(missing)}")

    return check


@pytest.fixture
def host() -> Host:
    """Return the real host: for what neither mounts nor asks."""
    return Host()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no cache of whoever runs the tests take part, nor grow."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _own_lock(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no other process's installation, nor its tests, be in the way."""
    monkeypatch.setattr(install, "LOCK", tmp_path_factory.getbasetemp() / "install.lock")


@pytest.fixture
def memory() -> Iterator[Path]:
    """Yield a folder in memory: nobody waits for a disk when all is synced."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)
