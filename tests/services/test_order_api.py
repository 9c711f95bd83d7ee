"""Order's HTTP API with its service in a world: placing, reading, cancelling, and whose name stands in the history."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

import services.order.events as order_hears
from services.order import orders
from services.order.order import Order
from tests.integration.embedded import StoreAround
from tests.services.counter import CUPS, ORDER, OpenCounter, problem
from tests.services.shop import tell, types
from tidings import ANY, EventData
from tidings.errors import Contention, StoreUnavailable
from tidings.stores import Appended, Expected

# ---- placing ---------------------------------------------------------------------------


async def test_a_placed_order_is_there_at_once_where_the_answer_says(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        answer = await at.place()
        assert answer.status_code == 201
        assert answer.headers["ETag"] == '"0"'
        found = await at.http.get(answer.headers["Location"])
        assert found.json() == answer.json()
        assert found.json() == {
            "id": answer.headers["Location"].rpartition("/")[2],
            "version": 0,
            "status": "placed",
            "customer_id": "17850",
            "country": "France",
            "placed_at": "2010-12-01T08:26:00Z",
            "lines": [CUPS | {"amount": "5.10"}],
            "total": "5.10",
            "reserved": False,
            "authorised": False,
            "cancelled_by": None,
            "reason": None,
        }


async def test_a_guest_orders_now_when_no_time_is_given(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        answer = await at.http.post("/orders", json={"country": "Eire", "lines": [CUPS]})
        assert answer.json()["customer_id"] is None
        assert datetime.fromisoformat(answer.json()["placed_at"]).tzinfo is not None


async def test_the_same_key_and_body_get_the_same_order_in_the_same_answer(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        first = await at.place("a-key")
        await at.cancel(first.json()["id"])
        again = await at.place("a-key")
        assert (again.status_code, again.content) == (201, first.content)
        for header in ("ETag", "Location", "Tidings-Position"):
            assert again.headers[header] == first.headers[header]
        assert await at.created() == 1


async def test_a_body_is_the_same_however_it_is_written(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        first = await at.place("a-key", lines=[CUPS | {"unit_price": "2.50"}])
        otherwise = {"unit_price": "2.5", "quantity": 2, "description": "RED CUP", "sku": "CUP"}
        again = await at.place("a-key", placed_at="2010-12-01T08:26:00.000+00:00", lines=[otherwise])
        assert again.content == first.content


@pytest.mark.parametrize(
    "other", [{"country": "Eire"}, {"placed_at": None}, {"lines": [CUPS, CUPS]}, {"customer_id": None}]
)
async def test_the_same_key_with_another_body_is_refused(open_counter: OpenCounter, other: dict[str, Any]) -> None:
    async with open_counter() as at:
        await at.place("a-key")
        problem(await at.place("a-key", **other), 422, "idempotency-key-reused")
        assert await at.created() == 1


async def test_concurrent_requests_with_one_key_place_one_order(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        answers = await asyncio.gather(*(at.place("a-key") for _ in range(20)))
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.content for answer in answers}) == 1
        assert await at.created() == 1


async def test_without_a_key_each_request_is_an_order(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        assert await at.placed() != await at.placed()
        assert await at.created() == 2


class AnswersOnce(StoreAround):
    """A store whose first append takes effect and does not answer."""

    told = False

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        done = await super().append(stream, events, expected=expected)
        if self.told:
            return done
        self.told = True
        raise StoreUnavailable("database /secret/place is locked")


async def test_a_log_that_does_not_answer_is_asked_again_with_the_same_key(
    open_counter: OpenCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_counter() as at:
        monkeypatch.setattr(orders.running_now, "store", AnswersOnce(at.world.store))
        answer = await at.place("a-key")
        said = problem(answer, 503, "unavailable")
        assert "may or may not be placed. Repeat the request with the same key" in said["detail"]
        assert "secret" not in answer.text
        assert int(answer.headers["Retry-After"]) > 0
        again = await at.place("a-key")
        assert again.status_code == 201
        assert await at.created() == 1


# ---- reading ---------------------------------------------------------------------------


async def test_an_order_as_it_was(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        order_id = await at.placed()
        await at.cancel(order_id)
        history = (await at.http.get(f"/orders/{order_id}/history")).json()["events"]
        url = f"/orders/{order_id}"
        first = await at.http.get(url, params={"at_version": 0})
        assert (first.json()["status"], first.headers["ETag"]) == ("placed", '"0"')
        then = await at.http.get(url, params={"as_of": history[0]["recorded_at"]})
        assert then.json() == first.json()
        later = datetime.fromisoformat(history[1]["recorded_at"]) + timedelta(hours=1)
        assert (await at.http.get(url, params={"as_of": later.isoformat()})).json()["status"] == "cancelled"
        problem(await at.http.get(url, params={"at_version": 2}), 404, "unknown-version")
        problem(await at.http.get(url, params={"as_of": "2010-12-01T08:26:00Z"}), 404, "unknown-version")


@pytest.mark.parametrize("moment", ["2010-12-01T08:26:00", "2010-12-01", "1291191960", "2010-12-01 08:26Z", ""])
async def test_a_moment_without_a_zone_is_no_moment(open_counter: OpenCounter, moment: str) -> None:
    async with open_counter() as at:
        order_id = await at.placed()
        said = problem(await at.http.get(f"/orders/{order_id}", params={"as_of": moment}), 422, "invalid-request")
        assert said["errors"] == [{"in": "query", "at": "as_of", "detail": said["detail"].removeprefix("as_of: ")}]
        assert "with a zone" in said["detail"]
        problem(await at.place(placed_at=moment), 422, "invalid-request")


async def test_who_has_the_version_is_spared_the_body(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        order_id = await at.placed()
        for has in ('"0"', 'W/"0"', '"7", "0"', "*"):
            answer = await at.http.get(f"/orders/{order_id}", headers={"If-None-Match": has})
            assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", '"0"')
        await at.cancel(order_id)
        answer = await at.http.get(f"/orders/{order_id}", headers={"If-None-Match": '"0"'})
        assert (answer.status_code, answer.headers["ETag"]) == (200, '"1"')


async def test_the_history_says_who_and_why(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        order_id = await at.placed()
        body = {"reason": "wrong colour"}
        headers = {"Actor": "Anna at the desk", "X-Correlation-ID": "call-17"}
        await at.http.post(f"/orders/{order_id}/cancel", json=body, headers=headers)
        document = (await at.http.get(f"/orders/{order_id}/history")).json()
        assert document["order_id"] == order_id
        created, cancelled = document["events"]
        assert (created["version"], created["type"], created["actor"]) == (0, "OrderCreated", "customer 17850")
        assert created["data"]["lines"] == [CUPS]
        assert created["correlation_id"]
        assert cancelled["position"] > created["position"]
        assert {key: cancelled[key] for key in ("version", "type", "actor", "reason", "correlation_id")} == {
            "version": 1,
            "type": "OrderCancelled",
            "actor": "Anna at the desk",
            "reason": "wrong colour",
            "correlation_id": "call-17",
        }
        assert cancelled["data"] == {"order_id": order_id, "reason": "wrong colour", "by": "Anna at the desk"}


@pytest.mark.parametrize("path", ["", "/history", "/cancel"])
async def test_an_order_that_never_was_is_unknown(open_counter: OpenCounter, path: str) -> None:
    async with open_counter() as at:
        answer = await (at.cancel("nobody") if path == "/cancel" else at.http.get(f"/orders/nobody{path}"))
        assert problem(answer, 404, "unknown-order")["detail"] == "There is no order nobody."


async def test_an_order_that_was_deleted_for_ever_is_gone(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        order_id = (await at.place("a-key")).json()["id"]
        await at.world.store.tombstone(f"order-{order_id}")
        problem(await at.http.get(f"/orders/{order_id}"), 410, "order-deleted")
        problem(await at.place("a-key"), 410, "order-deleted")


# ---- cancelling ------------------------------------------------------------------------


async def test_an_order_that_many_change_at_once_is_no_failed_precondition_of_who_sent_none(
    open_counter: OpenCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def contended(*_: object, **__: object) -> None:
        raise Contention("order-1", 10, 90)

    async with open_counter() as at:
        order_id = await at.placed()
        monkeypatch.setattr("services.order.api.repository.change", contended)
        answer = await at.cancel(order_id)
        problem(answer, 503, "contention")
        assert int(answer.headers["Retry-After"]) > 0


async def test_cancelling_answers_with_the_cancelled_order(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        order_id = await at.placed()
        answer = await at.cancel(order_id, If_Match='"0"')
        assert (answer.status_code, answer.headers["ETag"]) == (200, '"1"')
        assert answer.json() == (await at.http.get(f"/orders/{order_id}")).json()
        assert [answer.json()[key] for key in ("status", "cancelled_by", "reason")] == [
            "cancelled",
            "customer",
            "changed my mind",
        ]


async def test_cancelling_another_version_changes_nothing(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        order_id = await at.placed()
        await tell(at.world, order_hears.StockReserved(order_id=order_id))
        for stale in ('"0"', 'W/"1"', '"one"', '"0", "7"'):
            problem(await at.cancel(order_id, If_Match=stale), 412, "order-changed")
        assert await types(at.world, f"order-{order_id}") == ["OrderCreated", "OrderReserved"]
        assert (await at.cancel(order_id, If_Match='"0", "1"')).json()["status"] == "cancelled"


async def test_cancelling_twice_is_as_good_as_once_and_needs_no_version(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        order_id = await at.placed()
        first = await at.cancel(order_id)
        second = await at.cancel(order_id, If_Match="*")
        assert (second.status_code, second.json()) == (200, first.json())
        assert "Tidings-Position" not in second.headers
        assert await types(at.world, f"order-{order_id}") == ["OrderCreated", "OrderCancelled"]


async def test_many_cancel_one_version_and_one_does(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        order_id = await at.placed()
        answers = await asyncio.gather(*(at.cancel(order_id, If_Match='"0"') for _ in range(10)))
        assert sorted(answer.status_code for answer in answers) == [200] + 9 * [412]
        answers = await asyncio.gather(*(at.cancel(order_id) for _ in range(10)))
        assert {answer.status_code for answer in answers} == {200}
        assert await types(at.world, f"order-{order_id}") == ["OrderCreated", "OrderCancelled"]


async def test_a_confirmed_order_is_being_cancelled_and_a_dispatched_one_is_kept(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        confirmed, dispatched = await at.placed(), await at.placed()
        for order_id in (confirmed, dispatched):
            await tell(
                at.world, order_hears.StockReserved(order_id=order_id), order_hears.PaymentAuthorised(order_id=order_id)
            )
        await tell(at.world, order_hears.ShipmentDispatched(order_id=dispatched))
        assert (await at.cancel(confirmed)).json()["status"] == "cancelling"
        said = problem(await at.cancel(dispatched), 409, "order-refused")
        assert "ask for a return" in said["detail"]


# ---- who asks, and what becomes of it ----------------------------------------------------

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_a_trace_is_the_correlation_and_goes_on_in_the_events(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        answer = await at.http.post("/orders", json=ORDER, headers={"traceparent": TRACE})
        assert answer.headers["X-Correlation-ID"] == TRACE.split("-")[1]
        (event,) = at.world.events(stream=f"order-{answer.json()['id']}")
        assert f'"traceparent":"{TRACE}"'.encode() in event.metadata
        assert f'"$correlationId":"{TRACE.split("-")[1]}"'.encode() in event.metadata


@pytest.mark.parametrize(
    "trace", ["00-0-0-01", TRACE.replace("-b7", "-B7"), TRACE + "x", "00-" + 32 * "0" + TRACE[35:]]
)
async def test_a_malformed_trace_is_not_passed_on(open_counter: OpenCounter, trace: str) -> None:
    async with open_counter() as at:
        answer = await at.http.post("/orders", json=ORDER, headers={"traceparent": trace})
        assert answer.status_code == 201
        (event,) = at.world.events(stream=f"order-{answer.json()['id']}")
        assert b"traceparent" not in event.metadata


async def test_a_fault_of_ours_is_told_to_the_log_and_not_to_the_caller(
    open_counter: OpenCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(order: Order, *told: object) -> None:
        structlog.get_logger().info("about.to.fail")
        raise ZeroDivisionError("the secret recipe")

    async with open_counter() as at:
        monkeypatch.setattr(Order, "place", broken)
        with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
            answer = await at.http.post("/orders", json=ORDER, headers={"X-Correlation-ID": "call-17"})
        assert problem(answer, 500)["correlation_id"] == "call-17"
        assert "secret" not in answer.text
        assert [line["correlation_id"] for line in logs if line["event"] in ("about.to.fail", "request.failed")] == [
            "call-17",
            "call-17",
        ]
        (failed,) = [line for line in logs if line["event"] == "request.failed"]
        assert failed["exc_info"]


async def test_probes_find_the_service_live_and_as_soon_as_events_get_through_ready(open_counter: OpenCounter) -> None:
    async with open_counter() as at:
        assert (await at.http.get("/live")).json()["status"] == "ok"
        async with asyncio.timeout(30):
            while (answer := await at.http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.05)
        assert "order.progress" in [check["name"] for check in answer.json()["checks"]]
