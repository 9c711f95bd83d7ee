"""The server answers as EventStoreDB 24.2.0 did, case by case, to EventStoreDB's own client."""

from __future__ import annotations

import asyncio
import json
from importlib import import_module
from pathlib import Path

import pytest
from esdbclient import EventStoreDBClient

from tests.conformance.server_cases.probe import CASES, Probe
from tidings.server import EventStoreServer

RECORDED = json.loads((Path(__file__).parent / "eventstoredb_cases.json").read_text(encoding="utf-8"))
for part in ("appends", "reads", "subscriptions", "groups"):
    import_module(f"tests.conformance.server_cases.{part}")


def test_every_recorded_case_is_asked() -> None:
    assert set(CASES) == set(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
async def test_the_answer_is_the_recorded_one(name: str) -> None:
    async with EventStoreServer() as server:

        def ask() -> object:
            client = EventStoreDBClient(server.uri)
            try:
                return json.loads(json.dumps(CASES[name](Probe(client))))
            finally:
                client.close()

        assert await asyncio.to_thread(ask) == RECORDED[name]
