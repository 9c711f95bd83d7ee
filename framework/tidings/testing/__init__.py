"""Tools for tests: conformance suites for stores and buses (which need pytest), servers to run them on, and the
simulation.

Its modules `bus_conformance`, `store_conformance`, `brokers`, `databases` and `simulation` are public; others are
internal.
"""

from __future__ import annotations

import sys

if "pytest" in sys.modules:
    import pytest

    # Before the suites are imported, so that their failing assertions show values in any project.
    pytest.register_assert_rewrite("tidings.testing.bus_conformance", "tidings.testing.store_conformance")
