"""What proves an adapter right: conformance suites for stores and buses, and brokers to run them on. Needs pytest."""

from __future__ import annotations

import pytest

# Before the suites are imported, so that a failing assertion of theirs shows its values in any project.
pytest.register_assert_rewrite("tidings.testing.bus_conformance", "tidings.testing.store_conformance")
