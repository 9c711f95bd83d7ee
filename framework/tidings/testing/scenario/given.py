"""Where a test begins: what has happened before."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, cast

import sqlalchemy as sa

from tidings.errors import ConfigurationError
from tidings.modelling.aggregate import Aggregate
from tidings.modelling.events import Event, partition_key, wire_name
from tidings.service import Service
from tidings.testing.replaced import check_replaced
from tidings.testing.scenario.decided import Decided, loaded
from tidings.testing.scenario.finding import aggregate_of, check_handles, handler_of, service_of
from tidings.testing.scenario.handling import Handling, Task
from tidings.testing.scenario.stating import Raw, Stated, stated

__all__ = ["Given", "given"]

A = TypeVar("A", bound=Aggregate)
P = ParamSpec("P")


def given(
    *before: Stated | sa.Executable,
    id: str | None = None,
    aggregate: type[Aggregate] | None = None,
    service: Service | None = None,
) -> Given:
    """State what has happened before, oldest first.

        given(OrderCreated(...)).when(Order.confirm).then(OrderConfirmed(...))
        given(GoodsReceived(...)).handling(reserve, OrderCreated(...)).emits(StockReserved(...))

    For a decision, the events are the aggregate's stream. For a handler, the log holds them, and the service has
    handled those that it declares, each before the next one came. An event may be stated with its stream:
    `("order-1", OrderCreated(...))`. Without one, it is in the stream of the aggregate that evolves it. SQLAlchemy
    statements fill a service's tables.

    `id` is the aggregate's id, by default the partition key that the events share, or "1". `aggregate` and `service`
    are needed only if the decision or the handler belongs to none, or several, in the imported modules.
    """
    return Given(before, id, aggregate, service)


class Given:
    """What has happened before; made by `given`."""

    def __init__(
        self,
        before: Sequence[Stated | sa.Executable],
        id: str | None,
        aggregate: type[Aggregate] | None,
        service: Service | None,
    ) -> None:
        self._before: Final = [one if isinstance(one, sa.Executable) else stated(one) for one in before]
        self._id = id
        self._aggregate = aggregate
        self._service = service

    def when(self, decide: Callable[Concatenate[A, P], Any], *args: P.args, **kwargs: P.kwargs) -> Decided[A]:
        """Let the aggregate decide: `when(Order.cancel, "changed my mind")`. It needs no event loop."""
        if any(isinstance(one, sa.Executable) for one in self._before):
            raise ConfigurationError("when(...): an aggregate has no tables: state events alone")
        events = [cast("tuple[str, Event | Raw]", one)[1] for one in self._before]
        names = [wire_name(event) if isinstance(event, Event) else event.type for event in events]
        kind = cast("type[A]", self._aggregate or aggregate_of(decide, names))
        return Decided(loaded(kind, self._id_of(events), events)).when(decide, *args, **kwargs)

    def handling(
        self,
        handler: Callable[..., Awaitable[None] | None],
        event: Stated,
        *,
        metadata: Mapping[str, Any] | None = None,
        resources: Mapping[Any, Any] | None = None,
        attempt: int = 1,
        replayed: bool = False,
    ) -> Handling:
        """Let a service's handler handle an event, with everything that it asks for.

        It runs on a log and a database in memory, by the code that runs it in production: with injection, its timeout,
        a transaction that is undone if it fails, and events that are appended after the commit. It is tried once.
        `metadata` are the producer's own keys. `resources` replaces what the service's lifespan yields, by the type
        that handlers ask for. See `Handling` for how to run it in an async test.
        """
        service = self._service or service_of(handler)
        declared = handler_of(service, handler)
        stream, what = stated(event)
        check_handles(declared, what)
        instead = dict(resources or {})
        check_replaced(instead, [service])
        return Handling(Task(service, declared, self._before, stream, what, metadata, instead, attempt, replayed))

    def _id_of(self, events: Sequence[Event | Raw]) -> str:
        if self._id is not None:
            return self._id
        keys = {partition_key(event) for event in events if isinstance(event, Event)}
        return (keys.pop() if len(keys) == 1 else None) or "1"
