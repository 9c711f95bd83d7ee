"""With `TIDINGS_TEST_DATABASE=postgresql`, each integration test has databases of its own on one server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.databases import ON_POSTGRESQL, PLACE
from tidings.testing.databases import PostgreSQL

if ON_POSTGRESQL:

    @pytest.fixture(autouse=True)
    async def _on_postgresql(postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
        async with postgresql.isolated() as url:
            monkeypatch.setenv(PLACE, url)
            yield
