"""Where integration tests have their services' databases: on PostgreSQL, if a test or the whole run asks for it."""

from __future__ import annotations

import pytest

from tests.integration.databases import EVERYWHERE, PLACE


@pytest.fixture(autouse=EVERYWHERE)
def on_postgresql(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test's services databases on PostgreSQL, which are dropped afterwards."""
    monkeypatch.setenv(PLACE, postgresql_url)


@pytest.fixture
def every_failure_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every failure of an outage logged, not only the first of its kind."""
    monkeypatch.setattr("tidings._support.telling.STILL_SECONDS", (0.0, 0.0))
