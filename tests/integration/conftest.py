"""Where integration tests have their services' databases: on PostgreSQL, if a test or the whole run asks for it."""

from __future__ import annotations

import pytest

from tests.integration.databases import EVERYWHERE, PLACE


@pytest.fixture(autouse=EVERYWHERE)
def on_postgresql(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test's services databases on PostgreSQL, which are dropped afterwards."""
    monkeypatch.setenv(PLACE, postgresql_url)
