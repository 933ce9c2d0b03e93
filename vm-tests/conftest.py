"""What all VM tests share; the means are in world.py."""

from __future__ import annotations

import pytest
from world import World

from mosinit.host import Host


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cold", action="store_true", help="boot every machine from power-on")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> World:
    """The organisation of all VM tests."""
    return World(Host(), tmp_path_factory.mktemp("world"), bool(pytestconfig.getoption("--cold")))
