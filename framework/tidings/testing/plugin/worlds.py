"""Options of pytest for worlds: where they are, and with which seed random ones run. It imports nothing heavy."""

from __future__ import annotations

import sys

import pytest

__all__ = ["pytest_addoption", "pytest_configure", "pytest_unconfigure"]

_PLACES = ("memory", "rabbitmq", "rabbitmq+esdb")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--tidings` and `--tidings-seed`."""
    group = parser.getgroup("tidings")
    group.addoption(
        "--tidings",
        choices=_PLACES,
        default="memory",
        help="where tidings.testing.World runs: in memory and in virtual time (the default), or on real servers",
    )
    group.addoption(
        "--tidings-seed", type=int, default=None, metavar="N", help="run tests with @world_seeds with this seed alone"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Tell worlds of the options."""
    name, seed = config.getoption("--tidings", "memory"), config.getoption("--tidings-seed", None)
    if name != "memory" or seed is not None:
        from tidings.testing.world.place import WHERE

        WHERE.name, WHERE.seed = name, seed


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the servers that worlds have started."""
    module = sys.modules.get("tidings.testing.world.place")
    if module is not None:
        module.WHERE.close()
