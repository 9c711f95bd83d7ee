"""Tools for tests: given/when/then for aggregates and handlers, worlds for services, conformance suites for stores and
buses (which need pytest), servers to run them on, and the simulation.

Its modules `bus_conformance`, `store_conformance`, `brokers`, `databases`, `event_stores`, `strategies`, `machines` and
`simulation` are public; others are internal. Importing it is cheap: each name is imported when it is used.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tidings._support.lazy import lazily

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

__getattr__, __dir__ = lazily(
    globals(),
    {
        "scenario.context": ("RecordingContext",),
        "scenario.decided": ("Decided",),
        "scenario.given": ("Given", "given"),
        "scenario.handling": ("Handling",),
        "scenario.stating": ("Emitted",),
        "world.seeds": ("world_seeds",),
        "world.standing": ("Unsettled",),
        "world.world": ("World",),
    },
)
