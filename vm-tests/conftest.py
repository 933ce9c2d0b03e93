"""What all VM tests share; the means are in world.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from driven import Beside
from installed import Installed
from installing import Asking, asking
from world import GOOD_HOSTFS, World

from mosinit.host import Host


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cold", action="store_true", help="boot every machine from power-on")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> World:
    """The organisation of all VM tests."""
    return World(Host(), tmp_path_factory.mktemp("world"), bool(pytestconfig.getoption("--cold")))


@pytest.fixture(scope="session")
def release(world: World) -> Path:
    """A good release."""
    return world.release("good", GOOD_HOSTFS)


@pytest.fixture(scope="session")
def medium(world: World, release: Path) -> Path:
    """A good medium; the machine that is saved with it serves all tests with other content."""
    target = world.medium(release)
    world.save(target)
    return target


@pytest.fixture(scope="session")
def machine(world: World, release: Path) -> Installed:
    """An installed machine, saved at the first line of its bring-up."""
    made = Installed(world, world.folder / "installed", release).make()
    made.save()
    return made


@pytest.fixture(scope="session", name="asking")
def _asking(world: World) -> Iterator[Asking]:
    """A live machine that asks to be enrolled, to install itself then."""
    with asking(world) as made:
        yield made


@pytest.fixture(scope="module")
def beside() -> Iterator[Beside]:
    """A thread for machines that mostly wait."""
    made = Beside()
    try:
        yield made
    finally:
        made.close()
