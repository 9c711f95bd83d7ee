"""The pytest plugin `tidings`, found by its entry point. pytest loads it in every run, so it imports nothing heavy.

It fails a test that states something with `given` and compares nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Generator

import pytest

__all__ = ["pytest_runtest_call"]

_UNCHECKED = "tidings.testing.scenario.unchecked"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Fail a test that has passed without comparing what came of a decision, or without running a handler."""
    module = sys.modules.get(_UNCHECKED)
    if module is not None:
        module.left()
    result = yield
    module = sys.modules.get(_UNCHECKED)
    if module is not None and (left := module.left()):
        pytest.fail("\n".join(left), pytrace=False)
    return result
