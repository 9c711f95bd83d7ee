"""Commands may be run with the services' databases on PostgreSQL, as integration tests are."""

from __future__ import annotations

from tests.integration.conftest import on_postgresql

__all__ = ["on_postgresql"]
