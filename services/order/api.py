"""Order's HTTP API, with the service itself running behind it: `uvicorn services.order.api:api`. No I/O at import.

* An order is placed once per `Idempotency-Key`: the key's own stream says which order it stands for, and a stream can
  begin only once. If a process dies before it answers, the same request again gets the same order. Without a key, a
  client that gets no answer cannot know whether its order was placed.
* Who sends a request is what `principal.principal_of` says: by default, anybody may do everything.
* The version of an order is its `ETag`. `If-Match` cancels that version or nothing. Without it, the order is cancelled
  whatever has happened to it in the meantime, if the order allows it.
* `GET /orders/{id}` reads the order's stream, so it never lags. `GET /orders` reads a table that follows the log:
  answers to POST wait a little for it, and a client that passes on `Tidings-Position` makes the list wait for that
  position.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Final
from uuid import uuid4

import structlog
from fastapi import Depends, Header, Path, Query, Request, Response

from services.order import read_model
from services.order.contract import ETAG, POSITION, Api, headers, problems
from services.order.documents import (
    Cancellation,
    History,
    HistoryEvent,
    ListedStatus,
    Moment,
    Name,
    NewOrder,
    OrderDocument,
    OrderPage,
    OrderSummary,
    Position,
    Quoted,
)
from services.order.edge import CORRELATION_ID, Correlated, Limited, traceparent_of
from services.order.order import CUSTOMER, Order
from services.order.placement import Placement, placement_of
from services.order.principal import Principal, principal_of
from services.order.problems import HANDLERS, Problem
from services.order.service import orders, placements, repository
from tidings import health_routes
from tidings.errors import DatabaseUnavailable, StoreUnavailable, WrongExpectedVersion

__all__ = ["api"]

log = structlog.get_logger("order.api")

WRITE_WAITS: Final = 1.0
"""Seconds for which the answer to a POST waits for the list. Then it is sent anyway, because the log has the event."""
LIST_WAITS: Final = 3.0
"""Seconds for which the list waits for a position. The relay sends a marker every second."""

api = Api(
    title="Orders",
    version="1",
    lifespan=orders.lifespan,
    redirect_slashes=False,
    exception_handlers=HANDLERS,
)
api.router.routes.extend(health_routes(orders))
api.add_middleware(Limited)
api.add_middleware(Correlated)

# ---- who asks --------------------------------------------------------------------------

_VISIBLE: Final = r"^[!-~]([ -~]{0,98}[!-~])?$"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request, and its correlation."""

    principal: Principal
    actor: str | None
    correlation_id: str
    traceparent: str | None

    def why(self, default: str, reason: str) -> dict[str, str]:
        """Return the metadata for events that this request causes."""
        trace = {"traceparent": self.traceparent} if self.traceparent else {}
        proved = {"principal": self.principal.name} if self.principal.name else {}
        return {"actor": self.actor or default, "reason": reason, **proved, **trace}


async def _caller(
    request: Request,
    principal: Annotated[Principal, Depends(principal_of)],
    actor: Annotated[
        str | None,
        Header(
            pattern=_VISIBLE,
            description="Who sends the request, for the history; by default the principal. Somebody unknown who may "
            "speak for others speaks for the customer. "
            "Another name than the principal's is refused (403), unless the principal may speak for others.",
        ),
    ] = None,
    x_correlation_id: Annotated[
        str | None,
        Header(
            pattern=CORRELATION_ID,
            alias="X-Correlation-ID",
            description="By default the trace id of `traceparent`, or a new one.",
        ),
    ] = None,
) -> Caller:
    if actor is not None and actor != principal.name and not principal.speaks_for_others:
        raise Problem(
            403, "actor-not-yours", f"You are {principal.name or 'unknown'}, and may not act in another name."
        )
    actor = actor or principal.name or (None if principal.speaks_for_others else "unknown")
    return Caller(principal, actor, request.state.correlation_id, traceparent_of(request.headers))


async def _json(request: Request) -> None:
    """Refuse a body of another media type, which would otherwise be reported as invalid."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Problem(
            415, "unsupported-media-type", "Send the body as application/json.", headers={"Accept": "application/json"}
        )


FromCaller = Annotated[Caller, Depends(_caller)]
OrderId = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


def _customer(customer_id: str | None) -> str:
    return f"customer {customer_id}" if customer_id else "guest"


# ---- placing an order ------------------------------------------------------------------


@api.post(
    "/orders",
    status_code=201,
    dependencies=[Depends(_json)],
    responses={
        201: {
            "description": "Placed.",
            "headers": headers(ETag=ETAG, Location="The order.", Tidings_Position=POSITION),
        },
        **problems(400, 410, 415),
    },
)
async def place_order(
    body: NewOrder,
    caller: FromCaller,
    answer: Response,
    idempotency_key: Annotated[
        str | None,
        Header(
            pattern=r"^[!-~]{1,255}$",
            description="Makes the request repeatable: the same key and body always get the same order in the same "
            "answer; the same key with another body is refused (422). Keys are for ever. Each principal has its own; "
            "callers without one share theirs: use a UUID.",
        ),
    ] = None,
) -> OrderDocument:
    """Place an order."""
    why = caller.why(_customer(body.customer_id), "ordered over HTTP")
    what = (body.order_lines(), body.customer_id, body.country, body.placed_at or datetime.now(UTC))
    try:
        order_id = str(uuid4()) if idempotency_key is None else await _number(idempotency_key, body, caller, why)
        placed = await repository.create(
            order_id, Order.place, *what, metadata=why, correlation_id=caller.correlation_id
        )
        order, position = placed.aggregate, placed.position
    except WrongExpectedVersion:
        order, position = await _placed_before(order_id)
    except StoreUnavailable as error:
        log.warning("order.unknown_outcome", error=f"{error}")
        again = (
            "Repeat the request with the same key."
            if idempotency_key
            else "Only a request with an Idempotency-Key is safe to repeat."
        )
        raise Problem(
            503, "unavailable", f"The log does not answer: the order may or may not be placed. {again}"
        ) from error
    answer.headers["Location"] = f"/orders/{order_id}"
    return await _changed(answer, order, position)


async def _number(key: str, body: NewOrder, caller: Caller, why: dict[str, str]) -> str:
    """Return the id of the order for which the caller's key stands: a new one for a new key."""
    placement, fingerprint = placement_of(caller.principal.name, key), body.fingerprint()
    try:
        done = await placements.create(
            placement,
            Placement.number,
            str(uuid4()),
            fingerprint,
            metadata=why,
            correlation_id=caller.correlation_id,
        )
        return done.aggregate.order_id
    except WrongExpectedVersion:
        found = await placements.load(placement)
    if found.fingerprint != fingerprint:
        detail = "This Idempotency-Key was used for another order. Give each order a key of its own."
        raise Problem(422, "idempotency-key-reused", detail)
    return found.order_id


async def _placed_before(order_id: str) -> tuple[Order, int]:
    """Return the order as it was placed with this key, and its position in the log."""
    first, *_ = [entry async for entry in repository.history(order_id)]
    return await repository.load(order_id, at_version=first.version), first.position


async def _changed(answer: Response, order: Order, position: int) -> OrderDocument:
    """Answer with the order when the list has caught up, or after `WAIT_SECONDS`."""
    answer.headers["ETag"] = f'"{order.version}"'
    if position >= 0:
        answer.headers["Tidings-Position"] = str(position)
        try:
            async with asyncio.timeout(WRITE_WAITS):
                await orders.running_now.handled(position, order.id, timeout=WRITE_WAITS)
        except (TimeoutError, StoreUnavailable, DatabaseUnavailable) as error:
            log.info("list.lags", order_id=order.id, position=position, error=f"{error}")
    return OrderDocument.of(order)


# ---- reading one order -----------------------------------------------------------------


@api.get(
    "/orders/{order_id}",
    response_model=OrderDocument,
    responses={
        200: {"description": "The order.", "headers": headers(ETag=ETAG)},
        304: {"description": "It still has the version that If-None-Match names.", "headers": headers(ETag=ETAG)},
        **problems(404, 410),
    },
)
async def get_order(
    order_id: OrderId,
    answer: Response,
    caller: FromCaller,
    at_version: Annotated[
        int | None,
        Query(ge=0, le=2**31 - 1, description="The order at this version (from 0)."),
    ] = None,
    as_of: Annotated[Moment | None, Query(description="The order at this moment (RFC 3339, with a zone).")] = None,
    if_none_match: Annotated[
        Quoted | None, Header(description="Versions that the client has. If one is current: 304, without a body.")
    ] = None,
) -> OrderDocument | Response:
    """One order, now or as it was."""
    order = await repository.load(order_id, at_version=at_version, as_of=as_of)
    tag = f'"{order.version}"'
    if if_none_match is not None and (if_none_match == "*" or tag in _tags(if_none_match.replace("W/", ""))):
        return Response(status_code=304, headers={"ETag": tag})
    answer.headers["ETag"] = tag
    return OrderDocument.of(order)


def _tags(header: str) -> list[str]:
    """Return the entity tags, with their quotes. A comma inside a tag does no harm: our tags consist of digits."""
    return [tag.strip() for tag in header.split(",")]


@api.get(
    "/orders/{order_id}/history",
    responses={200: {"description": "Its events.", "headers": headers()}, **problems(404, 410)},
)
async def get_history(order_id: OrderId, caller: FromCaller) -> History:
    """What happened to an order: when, who and why."""
    return History(order_id=order_id, events=[HistoryEvent.of(entry) async for entry in repository.history(order_id)])


# ---- cancelling ------------------------------------------------------------------------


@api.post(
    "/orders/{order_id}/cancel",
    dependencies=[Depends(_json)],
    responses={
        200: {"description": "Cancelled, or asked for.", "headers": headers(ETag=ETAG, Tidings_Position=POSITION)},
        **problems(400, 404, 409, 410, 412, 415),
    },
)
async def cancel_order(
    order_id: OrderId,
    body: Cancellation,
    caller: FromCaller,
    answer: Response,
    if_match: Annotated[
        Quoted | None, Header(description="Cancel only if the order still has this version; otherwise 412.")
    ] = None,
) -> OrderDocument:
    """Cancel an order. If its parcel may be on its way, it becomes `cancelling`: look again later. Repeating it is
    harmless."""
    order = await repository.load(order_id)
    expected = None
    if if_match is not None and if_match != "*":
        if f'"{order.version}"' not in _tags(if_match):
            raise WrongExpectedVersion(Order.stream_of(order_id), if_match, order.version)
        expected = order.version
    done = await repository.change(
        order_id,
        Order.cancel,
        body.reason,
        caller.actor or CUSTOMER,
        expected=expected,
        metadata=caller.why(_customer(order.customer_id), body.reason),
        correlation_id=caller.correlation_id,
    )
    return await _changed(answer, done.aggregate, done.position)


# ---- the list --------------------------------------------------------------------------


@api.get(
    "/orders",
    responses={
        200: {"description": "A page of the list.", "headers": headers(Link="The next page, as `next` (RFC 8288).")},
        **problems(409),
    },
)
async def list_orders(
    request: Request,
    answer: Response,
    caller: FromCaller,
    limit: Annotated[int, Query(ge=1, le=100, description="Orders on one page.")] = 20,
    cursor: Annotated[
        str | None,
        Query(pattern=r"^[0-9]{1,18}$", description="`next` of the previous page."),
    ] = None,
    status: Annotated[ListedStatus | None, Query()] = None,
    customer_id: Annotated[Name | None, Query()] = None,
    after_position: Annotated[
        Position | None,
        Query(description="Wait until the list has reached this position: `Tidings-Position` of an earlier answer."),
    ] = None,
    tidings_position: Annotated[Position | None, Header(description="The same as `after_position`.")] = None,
) -> OrderPage:
    """Return all orders, newest first. New orders do not move others to another page."""
    await _follow(max(after_position or 0, tidings_position or 0))
    before = None if cursor is None else int(cursor)
    # One row more than asked for shows whether there is a next page.
    query = read_model.page(limit + 1, before=before, status=status, customer_id=customer_id)
    async with orders.running_now.database.reading() as connection:
        rows = (await connection.execute(query)).all()
    following = str(rows[limit - 1].position) if len(rows) > limit else None
    if following is not None:
        here = request.url.include_query_params(cursor=following).replace(scheme="", netloc="")
        answer.headers["Link"] = f'<{here}>; rel="next"'
    return OrderPage(orders=[OrderSummary.of(row) for row in rows[:limit]], next=following)


async def _follow(position: int) -> None:
    """Wait until the list has reached a position."""
    running = orders.running_now
    if position <= 0 or await running.reached(position, timeout=0):
        return
    head = await running.store.head()
    if position > head:
        detail = f"The log ends at position {head}: {position} is of another log, or of one that is ahead of this one."
        raise Problem(409, "position-ahead", detail)
    if not await running.reached(position, timeout=LIST_WAITS):
        raise Problem(503, "list-lags", f"The list has not reached position {position} yet. Repeat the request.")
