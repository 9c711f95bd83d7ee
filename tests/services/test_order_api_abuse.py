"""What nobody in their right mind sends to Order's HTTP API: a clear answer each, nothing written, never a 500."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.order.documents import LINES, QUANTITY
from services.order.problems import BODY_LIMIT, SHOWN
from tests.services.counter import CUPS, ORDER, Counter, OpenCounter, problem
from tests.services.shop import types

JSON = {"Content-Type": "application/json"}


async def refused(at: Counter, status: int, kind: str, **request: Any) -> dict[str, Any]:
    """Send a POST /orders that is refused. Return the problem; asserts that no order was placed."""
    answer = await at.http.post("/orders", **request)
    said = problem(answer, status, kind)
    assert await at.created() == 0
    assert len(answer.content) < 10_000
    return said


@pytest.mark.parametrize(
    ("line", "at"),
    [
        ({"quantity": 0}, "#/lines/0/quantity"),
        ({"quantity": -1}, "#/lines/0/quantity"),
        ({"quantity": QUANTITY + 1}, "#/lines/0/quantity"),
        ({"quantity": 2**31}, "#/lines/0/quantity"),
        ({"quantity": 10**40}, "#/lines/0/quantity"),
        ({"quantity": 1.5}, "#/lines/0/quantity"),
        ({"quantity": "1"}, "#/lines/0/quantity"),
        ({"quantity": True}, "#/lines/0/quantity"),
        ({"quantity": None}, "#/lines/0/quantity"),
        ({"unit_price": "0"}, "#/lines/0/unit_price"),
        ({"unit_price": "0.00"}, "#/lines/0/unit_price"),
        ({"unit_price": "-1"}, "#/lines/0/unit_price"),
        ({"unit_price": "1e400"}, "#/lines/0/unit_price"),
        ({"unit_price": "NaN"}, "#/lines/0/unit_price"),
        ({"unit_price": "Infinity"}, "#/lines/0/unit_price"),
        ({"unit_price": "2.555"}, "#/lines/0/unit_price"),
        ({"unit_price": "1000000"}, "#/lines/0/unit_price"),
        ({"unit_price": "٣"}, "#/lines/0/unit_price"),
        ({"unit_price": "1\n"}, "#/lines/0/unit_price"),
        ({"unit_price": 2.55}, "#/lines/0/unit_price"),
        ({"sku": ""}, "#/lines/0/sku"),
        ({"sku": "A\0B"}, "#/lines/0/sku"),
        ({"sku": "A" * 65}, "#/lines/0/sku"),
        ({"sku": 1}, "#/lines/0/sku"),
        ({"description": "x" * 10_000}, "#/lines/0/description"),
        ({"quantitty": 1}, "#/lines/0/quantitty"),
        ({"a/b~c": 1}, "#/lines/0/a~1b~0c"),
    ],
)
async def test_a_line_that_no_service_could_keep(open_counter: OpenCounter, line: dict[str, Any], at: str) -> None:
    async with open_counter() as counter:
        body = json.dumps(ORDER | {"lines": [CUPS | line]})
        said = await refused(counter, 422, "invalid-request", content=body, headers=JSON)
        assert [(error["in"], error["at"]) for error in said["errors"]] == [("body", at)]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "1E999999999"])
async def test_numbers_that_are_none(open_counter: OpenCounter, number: str) -> None:
    async with open_counter() as at:
        for field in ("quantity", "unit_price"):
            line = f'{{"sku":"CUP","quantity":1,"unit_price":"1","{field}":{number}}}'
            body = f'{{"country":"France","lines":[{line}]}}'
            await refused(at, 422, "invalid-request", content=body, headers=JSON)


@pytest.mark.parametrize(
    "other",
    [
        {"lines": []},
        {"lines": [CUPS] * (LINES + 1)},
        {"lines": {}},
        {"country": ""},
        {"country": "x" * 65},
        {"country": None},
        {"customer_id": ""},
        {"customer_id": "1\r\n2"},
        {"placed_at": "2010-13-01T00:00:00Z"},
        {"placed_at": "2010-12-01T24:00:01Z"},
        {"placed_at": 1291191960},
        {"coupon": "FREE"},
        {"id": "mine"},
    ],
)
async def test_an_order_that_no_service_could_keep(open_counter: OpenCounter, other: dict[str, Any]) -> None:
    async with open_counter() as at:
        await refused(at, 422, "invalid-request", json=ORDER | other)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"order"',
        b'{"country": "\\ud800", "lines": []}',
        b'{"\\udfff": 1}',
        b'{"country": "France", "lines": ' + b"[" * 500 + b"]" * 500 + b"}",
    ],
)
async def test_bodies_that_are_json_and_no_order(open_counter: OpenCounter, body: bytes) -> None:
    async with open_counter() as at:
        await refused(at, 422, "invalid-request", content=body, headers=JSON)


@pytest.mark.parametrize(
    "body", [b"{", b"\xff\xfe", b"[" * 900_000, b'{"a":' * 100_000, b"9" * 100_000, b"order=1", b'{"a":1}{"a":1}']
)
async def test_bodies_that_are_no_json(open_counter: OpenCounter, body: bytes) -> None:
    async with open_counter() as at:
        await refused(at, 400, "malformed-json", content=body, headers=JSON)


async def test_a_hundred_thousand_mistakes_get_a_short_answer(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        body = b'{"lines":[' + b",".join([b"{}"] * LINES) + b"]}"
        said = await refused(at, 422, "invalid-request", content=body, headers=JSON)
        assert len(said["errors"]) == SHOWN
        assert f"(and {3 * LINES} more)" in said["detail"]


async def test_other_media_types_are_named_as_such(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        body = json.dumps(ORDER)
        for media_type in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""):
            await refused(at, 415, "unsupported-media-type", content=body, headers={"Content-Type": media_type})
        answer = await at.http.post(
            "/orders", content=body, headers={"Content-Type": "Application/JSON; charset=utf-8"}
        )
        assert answer.status_code == 201


async def test_a_body_over_the_limit_is_not_read_to_its_end(open_counter: OpenCounter) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 65536
            yield b" " * 65536

    async with open_counter() as at:
        await refused(at, 413, "body-too-large", content=b" " * (BODY_LIMIT + 1), headers=JSON)
        await refused(at, 413, "body-too-large", content=endless(), headers=JSON)
        assert read <= BODY_LIMIT + 2 * 65536


async def test_the_largest_order_is_taken_and_listed(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        line = {"sku": "本" * 64, "description": "😀" * 200, "quantity": QUANTITY, "unit_price": "999999.99"}
        body = json.dumps(ORDER | {"lines": [line] * LINES}, ensure_ascii=False).encode()
        assert len(body) < BODY_LIMIT
        answer = await at.http.post("/orders", content=body, headers=JSON)
        assert answer.status_code == 201, answer.text
        assert answer.json()["total"] == "79999999200000.00"
        page = (await at.http.get("/orders")).json()
        assert page["orders"][0]["total"] == "79999999200000.00"


@pytest.mark.parametrize(
    "moment", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999-23:59", "2010-12-01t08:26:00z"]
)
async def test_moments_at_the_ends_of_time_are_kept_as_they_are(open_counter: OpenCounter, moment: str) -> None:
    async with open_counter() as at:
        placed = await at.place(placed_at=moment)
        assert placed.status_code == 201, placed.text
        order_id, waiting = placed.json()["id"], {"Tidings-Position": placed.headers["Tidings-Position"]}
        assert (await at.http.get(f"/orders/{order_id}")).json()["placed_at"].lower() == moment.lower()
        assert (await at.http.get("/orders", headers=waiting)).json()["orders"][0]["id"] == order_id
        early = moment.startswith("0001")
        answer = await at.http.get(f"/orders/{order_id}", params={"as_of": moment})
        assert answer.status_code == (404 if early or moment.startswith("2010") else 200)


@pytest.mark.parametrize(
    ("order_id", "status", "kind"),
    [
        ("a%2Fb", 404, ""),
        ("a/b", 404, ""),
        ("%2e%2e%2f", 404, ""),
        ("%00", 422, "invalid-request"),
        ("%0a", 422, "invalid-request"),
        ("a%0a", 422, "invalid-request"),
        ("-a", 422, "invalid-request"),
        ("%ED%A0%80", 422, "invalid-request"),
        ("%F0%9F%98%80", 422, "invalid-request"),
        ("x" * 65, 422, "invalid-request"),
        ("x" * 10_000, 422, "invalid-request"),
        ("%24%24order", 422, "invalid-request"),
    ],
)
async def test_ids_that_no_order_has(open_counter: OpenCounter, order_id: str, status: int, kind: str) -> None:
    async with open_counter() as at:
        for answer in (
            await at.http.get(f"/orders/{order_id}"),
            await at.http.get(f"/orders/{order_id}/history"),
            await at.cancel(order_id),
        ):
            problem(answer, status, kind)
            assert len(answer.content) < 2000


@pytest.mark.parametrize(
    "headers",
    [
        {"Idempotency-Key": ""},
        {"Idempotency-Key": "two words"},
        {"Idempotency-Key": "k" * 256},
        {"Idempotency-Key": b"\xe9"},
        {"Actor": "\t"},
        {"Actor": b"\xff"},
        {"Actor": "a" * 101},
        {"X-Correlation-ID": "a b"},
        {"X-Correlation-ID": "x" * 129},
    ],
)
async def test_headers_that_are_not_visible_text(open_counter: OpenCounter, headers: dict[str, Any]) -> None:
    async with open_counter() as at:
        said = await refused(at, 422, "invalid-request", json=ORDER, headers=headers)
        assert said["errors"][0]["in"] == "header"
        assert said["errors"][0]["at"].lower() == next(iter(headers)).lower()


@pytest.mark.parametrize("tags", ["0", "'0'", '"0', '"0",', '"a b"', "**", "x" * 5000])
async def test_entity_tags_that_are_none(open_counter: OpenCounter, tags: str) -> None:
    async with open_counter() as at:
        order_id = await at.placed()
        problem(await at.http.get(f"/orders/{order_id}", headers={"If-None-Match": tags}), 422, "invalid-request")
        problem(await at.cancel(order_id, If_Match=tags), 422, "invalid-request")
        assert await types(at.world, f"order-{order_id}") == ["OrderCreated"]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=101",
        "limit=-1",
        "limit=x",
        "limit=",
        "limit=9999999999999999999999",
        "cursor=x",
        "cursor=-1",
        "cursor=" + "9" * 19,
        "cursor=%D9%A3",
        "status=new",
        "status=PLACED",
        "customer_id=",
        "customer_id=%00",
        "after_position=-1",
        "after_position=1e3",
        "after_position=99999999999999999999",
    ],
)
async def test_questions_that_the_list_cannot_answer(open_counter: OpenCounter, query: str) -> None:
    async with open_counter() as at:
        said = problem(await at.http.get(f"/orders?{query}"), 422, "invalid-request")
        assert said["errors"][0]["at"] == query.partition("=")[0]


@pytest.mark.parametrize("version", ["-1", str(2**31), str(2**63), "x", "1.5", ""])
async def test_versions_that_are_none(open_counter: OpenCounter, version: str) -> None:
    async with open_counter() as at:
        answer = await at.http.get(f"/orders/{await at.placed()}", params={"at_version": version})
        problem(answer, 422, "invalid-request")


@pytest.mark.parametrize("cursor", ["0", "9" * 18])
async def test_the_ends_of_the_list_are_pages_too(open_counter: OpenCounter, cursor: str) -> None:
    async with open_counter() as at:
        await at.placed()
        answer = await at.http.get("/orders", params={"cursor": cursor, "limit": 100})
        assert (answer.status_code, len(answer.json()["orders"])) == (200, 0 if cursor == "0" else 1)


@pytest.mark.parametrize("body", [{}, {"reason": ""}, {"reason": "x" * 201}, {"reason": "a\0"}, {"reason": 1}, []])
async def test_cancelling_needs_a_reason(open_counter: OpenCounter, body: Any) -> None:
    async with open_counter() as at:
        order_id = await at.placed()
        problem(await at.http.post(f"/orders/{order_id}/cancel", json=body), 422, "invalid-request")
        assert await types(at.world, f"order-{order_id}") == ["OrderCreated"]


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nothing", 404, None),
        ("GET", "/orders/", 404, None),
        ("GET", "//orders", 404, None),
        ("DELETE", "/orders", 405, "GET, POST"),
        ("PUT", "/orders/1", 405, "GET"),
        ("GET", "/orders/1/cancel", 405, "POST"),
        ("POST", "/orders/1/history", 405, "GET"),
    ],
)
async def test_routes_and_methods_that_are_not_there(
    open_counter: OpenCounter, method: str, path: str, status: int, allow: str | None
) -> None:
    async with open_counter() as at:
        answer = await at.http.request(method, f"http://shop{path}")
        problem(answer, status)
        assert answer.headers.get("Allow") == allow
