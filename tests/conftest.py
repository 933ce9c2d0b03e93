"""What all tests share."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mosinit import init, install, keys
from mosinit.host import Host
from tests import installation
from tests.installation import Setting
from tests.test_layout import loop

if TYPE_CHECKING:
    from tests.provisioned import Site


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a case by its number where it is bytes: keys, signatures and times in them are others each time,
    and two processes that share the tests must call them the same.
    """
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
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


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system that has next to no room."""
    if os.geteuid() != 0:
        pytest.skip("this needs root, to mount a small file system")
    host, folder = Host(), tmp_path / "full"
    folder.mkdir()
    try:
        host.mount("none", str(folder), "tmpfs", init.MountFlag(0), "size=16k")
    except OSError as error:
        pytest.skip(f"this needs a mount: {error}")
    try:
        yield folder
    finally:
        host.unmount(str(folder))


# --- What many tests share, and none changes ----------------------------------------------------------


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """See that a folder is at the end what it was in the beginning."""

    def content() -> dict[Path, tuple[int, bytes]]:
        return {
            path: (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in folder.rglob("*")
        }

    before = content()
    yield
    assert content() == before, "a test changed what others share"


def lent(folder: Path, product: str) -> Iterator[keys.Keyset]:
    made = keys.new(Host(), folder, product)
    with unchanged(folder):
        yield made


@pytest.fixture(scope="session")
def keyset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[keys.Keyset]:
    """The keyset of an organisation."""
    yield from lent(tmp_path_factory.mktemp("keys") / "keyset", "acme")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[keys.Keyset]:
    """Somebody else's keyset."""
    yield from lent(tmp_path_factory.mktemp("keys") / "other", "other")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """What an installation starts from: keyset, release, live system, provisioned machine."""
    folder = tmp_path_factory.mktemp("setting")
    setting = installation.setting(Host(), folder)
    with unchanged(folder):
        yield setting


@pytest.fixture
def disk(need: Callable[..., None], memory: Path) -> Iterator[Path]:
    """An empty disk of 8 GiB."""
    need(*installation.TOOLS)
    with loop(memory / "disk") as device:
        yield device


# --- Machines with a software TPM; what drives one is in the tools tree alone ---------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One organisation and one software TPM."""
    from tests import provisioned

    with provisioned.site(tmp_path_factory.mktemp("site")) as made:
        yield made


@pytest.fixture
def site(shared: Site, tmp_path: Path) -> Site:
    """The same, with a new TPM and an empty folder."""
    shared.renew(tmp_path / "work")
    return shared


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A provisioned machine, which tests leave as it is."""
    from tests import provisioned

    with provisioned.site(tmp_path_factory.mktemp("done")) as made:
        made.start()
        made.provision()
        yield made
