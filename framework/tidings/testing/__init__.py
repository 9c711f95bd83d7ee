"""Tools for tests: given/when/then for aggregates and handlers, worlds for services, conformance suites for stores and
buses (which need pytest), servers to run them on, and the simulation.

Its modules `bus_conformance`, `store_conformance`, `brokers`, `databases`, `event_stores`, `strategies`, `machines` and
`simulation` are public; others are internal. Importing it is cheap: each name is imported when it is used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidings.testing.scenario.context import RecordingContext
    from tidings.testing.scenario.decided import Decided
    from tidings.testing.scenario.given import Given, given
    from tidings.testing.scenario.handling import Handling
    from tidings.testing.scenario.stating import Emitted
    from tidings.testing.world.seeds import world_seeds
    from tidings.testing.world.standing import Unsettled
    from tidings.testing.world.world import World

if "pytest" in sys.modules:
    import pytest

    # Before the suites are imported, so that their failing assertions show values in any project.
    pytest.register_assert_rewrite("tidings.testing.bus_conformance", "tidings.testing.store_conformance")

__all__ = [
    "Decided",
    "Emitted",
    "Given",
    "Handling",
    "RecordingContext",
    "Unsettled",
    "World",
    "given",
    "world_seeds",
]

_PLACES = {
    "scenario.context": ("RecordingContext",),
    "scenario.decided": ("Decided",),
    "scenario.given": ("Given", "given"),
    "scenario.handling": ("Handling",),
    "scenario.stating": ("Emitted",),
    "world.seeds": ("world_seeds",),
    "world.standing": ("Unsettled",),
    "world.world": ("World",),
}
_MODULES = {name: f"tidings.testing.{module}" for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
