"""Who sends a request to Order's HTTP API: proved or not, in the history and in `tidings why`; keys of their own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Annotated, Any
from uuid import UUID

import pytest
from fastapi import Header
from hypothesis import given
from hypothesis import strategies as st

from services.order.api import api
from services.order.placement import placement_of
from services.order.principal import Principal, principal_of
from services.order.problems import Problem
from tests.services.counter import ORDER, Counter, OpenCounter, problem
from tidings.operations.timeline import trace
from tidings.stores import EventData

KNOWN = {
    "one": Principal("alice"),
    "two": Principal("bob"),
    "shop": Principal("shop", speaks_for_others=True),
    "guest": Principal(""),
}


def by_token(authorization: Annotated[str | None, Header()] = None) -> Principal:
    """Know callers by a token, as a deployment may."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme != "Bearer" or token not in KNOWN:
        raise Problem(401, "unknown-caller", "Send a token.", headers={"WWW-Authenticate": "Bearer"})
    return KNOWN[token]


@asynccontextmanager
async def guarded(open_counter: OpenCounter) -> AsyncIterator[Counter]:
    api.dependency_overrides[principal_of] = by_token
    try:
        async with open_counter() as at:
            yield at
    finally:
        del api.dependency_overrides[principal_of]


def as_(token: str, **headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", **headers}


async def placed(at: Counter, token: str, *, key: str | None = None, **headers: str) -> Any:
    keyed = {} if key is None else {"Idempotency-Key": key}
    return await at.http.post("/orders", json=ORDER, headers=as_(token, **headers) | keyed)


# ---- proved, or not ---------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer three", "Basic one", "Bearer one two"])
async def test_whoever_is_unknown_gets_nothing(open_counter: OpenCounter, header: str | None) -> None:
    async with guarded(open_counter) as at:
        order_id = (await placed(at, "one")).json()["id"]
        headers = {} if header is None else {"Authorization": header}
        for method, path, body in (
            ("POST", "/orders", ORDER),
            ("GET", "/orders", None),
            ("GET", f"/orders/{order_id}", None),
            ("GET", f"/orders/{order_id}/history", None),
            ("POST", f"/orders/{order_id}/cancel", {"reason": "because"}),
        ):
            answer = await at.http.request(method, path, json=body, headers=headers)
            problem(answer, 401, "unknown-caller")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert await at.created() == 1


async def test_the_principal_stands_in_the_history_and_nobody_acts_in_anothers_name(open_counter: OpenCounter) -> None:
    async with guarded(open_counter) as at:
        order_id = (await placed(at, "one")).json()["id"]
        cancel = f"/orders/{order_id}/cancel"
        for path, body in (("/orders", ORDER), (cancel, {"reason": "x"})):
            forged = await at.http.post(path, json=body, headers=as_("two", actor="the-ceo"))
            problem(forged, 403, "actor-not-yours")
        answer = await at.http.post(cancel, json={"reason": "x"}, headers=as_("two", actor="bob"))
        assert answer.json()["cancelled_by"] == "bob"
        history = (await at.http.get(f"/orders/{order_id}/history", headers=as_("one"))).json()["events"]
        assert [event["actor"] for event in history] == ["alice", "bob"]
        events = at.world.events(stream=f"order-{order_id}")
        assert [json.loads(event.metadata)["principal"] for event in events] == ["alice", "bob"]


async def test_a_principal_that_speaks_for_others_names_them_and_why_tells_both(open_counter: OpenCounter) -> None:
    async with guarded(open_counter) as at:
        order_id = (await placed(at, "shop", actor="carol")).json()["id"]
        timeline = await trace(at.world.store, [], (f"order-{order_id}", 0))
        assert (timeline.event.actor, timeline.event.principal) == ("carol", "shop")


async def test_somebody_unknown_who_may_not_speak_for_others_stands_in_nobodys_name(open_counter: OpenCounter) -> None:
    async with guarded(open_counter) as at:
        order_id = (await placed(at, "guest")).json()["id"]
        await at.http.post(f"/orders/{order_id}/cancel", json={"reason": "x"}, headers=as_("guest"))
        history = (await at.http.get(f"/orders/{order_id}/history", headers=as_("one"))).json()["events"]
        assert [event["actor"] for event in history] == ["unknown", "unknown"]


async def test_by_default_anybody_may_claim_to_be_anybody(open_counter: OpenCounter) -> None:
    """As README says."""
    async with open_counter() as at:
        answer = await at.http.post("/orders", json=ORDER, headers={"actor": "the-ceo"})
        (event,) = at.world.events(stream=f"order-{answer.json()['id']}")
        assert json.loads(event.metadata)["actor"] == "the-ceo"
        assert "principal" not in json.loads(event.metadata)


@pytest.mark.parametrize("name", [" ", "a ", "a\n", "é", "x" * 101, "\x7f"])
def test_a_principal_has_a_name_that_a_header_could_hold(name: str) -> None:
    with pytest.raises(ValueError, match="visible ASCII"):
        Principal(name)


# ---- keys and ids ---------------------------------------------------------------------------------


async def test_each_principal_has_its_own_keys(open_counter: OpenCounter) -> None:
    async with guarded(open_counter) as at:
        alice, again, bob = [await placed(at, token, key="k-1") for token in ("one", "one", "two")]
        assert alice.json()["id"] == again.json()["id"] != bob.json()["id"]
        headers = as_("two") | {"Idempotency-Key": "k-2"}
        other = await at.http.post("/orders", json=ORDER | {"country": "Eire"}, headers=headers)
        assert other.status_code == 201, "it tells nobody that another has used the key"
        assert (await placed(at, "one", key="k-2")).status_code == 201
        problem(await placed(at, "two", key="k-2"), 422, "idempotency-key-reused")
        assert await at.created() == 4


async def test_an_orders_id_does_not_follow_from_its_key(open_counter: OpenCounter) -> None:
    ids = []
    for _ in range(2):
        async with open_counter() as at:
            ids.append((await at.place("a-key")).json()["id"])
    assert ids[0] != ids[1]
    assert {UUID(order_id).version for order_id in ids} == {4}


async def test_an_order_that_was_numbered_and_not_placed_is_placed_by_the_next_request(
    open_counter: OpenCounter,
) -> None:
    async with open_counter() as at:
        first = await at.place("another-key")
        (event,) = at.world.events(stream=f"placement-{placement_of('', 'another-key')}")
        fingerprint = json.loads(event.data)["fingerprint"]
        numbered = EventData("OrderNumbered", json.dumps({"order_id": "o-1", "fingerprint": fingerprint}).encode())
        await at.world.store.append(f"placement-{placement_of('', 'a-key')}", [numbered])
        answers = await asyncio.gather(*(at.place("a-key") for _ in range(5)))
        assert {answer.json()["id"] for answer in answers} == {"o-1"}
        assert len({answer.content for answer in answers}) == 1
        assert first.json()["id"] != "o-1"
        assert await at.created() == 2


@given(st.text("a:1", max_size=4), st.text("a:1", max_size=4), st.text("a:1", max_size=4), st.text("a:1", max_size=4))
def test_no_two_callers_share_a_placement(scope: str, key: str, other_scope: str, other_key: str) -> None:
    same = (scope, key) == (other_scope, other_key)
    assert (placement_of(scope, key) == placement_of(other_scope, other_key)) == same
    assert len(placement_of(scope, key)) == len(sha256().hexdigest())
