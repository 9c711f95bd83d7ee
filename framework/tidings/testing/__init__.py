"""What proves a system right: conformance suites for stores and buses (they need pytest), brokers and databases to
run them on, and the simulation.

Its modules `bus_conformance`, `store_conformance`, `brokers`, `databases` and `simulation` are public; others are
internal.
"""

from __future__ import annotations

import sys

if "pytest" in sys.modules:
    import pytest

    # Before the suites are imported, so that a failing assertion of theirs shows its values in any project.
    pytest.register_assert_rewrite("tidings.testing.bus_conformance", "tidings.testing.store_conformance")
