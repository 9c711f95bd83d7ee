"""A service inside a FastAPI application, with nothing configured: events appended by a request are handled."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient

from tidings import Event, Service, health_routes


class Noted(Event):
    text: str


async def test_a_service_in_a_web_application_handles_what_requests_append(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    notes = Service("notes")
    handled: asyncio.Queue[str] = asyncio.Queue()

    @notes.on(Noted)
    async def keep(event: Noted) -> None:
        handled.put_nowait(event.text)

    app = FastAPI(lifespan=notes.lifespan)
    app.router.routes.extend(health_routes(notes))

    @app.post("/notes")
    async def post(text: str) -> int:
        return (await notes.append("notes-1", Noted(text=text))).version

    async with app.router.lifespan_context(app):
        async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
            answer = await client.post("/notes", params={"text": "hello"})
            live = await client.get("/live")
            ready = await client.get("/ready")
        assert answer.json() == 0
        assert (live.status_code, live.headers["content-type"]) == (200, "application/health+json")
        assert {check["name"] for check in ready.json()["checks"]} >= {"notes.running", "notes.bus", "notes.markers"}
        assert "/live" not in app.openapi()["paths"], "probes are not the API's"
        assert await asyncio.wait_for(handled.get(), 20) == "hello"
