"""EventStoreDB's service `Projections`: their register. It runs no JavaScript: such projections have no state."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import structlog

from tidings.errors import StreamDeleted, StreamNotFound
from tidings.server.calls import Call, Method, Send
from tidings.server.group_settings import ALL
from tidings.server.links import Linker
from tidings.server.log import ServedLog
from tidings.server.protocol import packed, projections, shared, struct_pb2
from tidings.server.refusals import Refusal, Status, shown, thrown, unimplemented
from tidings.server.security import Access
from tidings.server.stored import entries_of, restored
from tidings.server.wire import Malformed
from tidings.stores import EventData
from tidings.stores.rules import document_of
from tidings.stores.sqlite.store import SqliteStore

__all__ = ["Projections"]

log = structlog.get_logger(__name__)

SERVICE: Final = "/event_store.client.projections.Projections"
REGISTER: Final = "$projections-$all"
SYSTEM: Final = ("$by_category", "$by_event_type")


@dataclass(slots=True)
class _Projection:
    name: str
    query: str = ""
    mode: str = "Continuous"
    emit: bool = False
    track: bool = False
    running: bool = True


class Projections:
    """The service on one log, and the system projections, which run in `tasks`."""

    def __init__(self, store: SqliteStore, served: ServedLog, access: Access, tasks: asyncio.TaskGroup) -> None:
        self._store = store
        self._access = access
        self._known: dict[str, _Projection] = {}
        self._linker = Linker(store, served, tasks)
        self._changing = asyncio.Lock()

    def methods(self) -> list[Method]:
        return [
            Method(f"{SERVICE}/Create", projections.CreateReq, unary=self.create),
            Method(f"{SERVICE}/Update", projections.UpdateReq, unary=self.update),
            Method(f"{SERVICE}/Delete", projections.DeleteReq, unary=self.delete),
            Method(f"{SERVICE}/Statistics", projections.StatisticsReq, streaming=self.statistics),
            Method(f"{SERVICE}/Enable", projections.EnableReq, unary=self.enable),
            Method(f"{SERVICE}/Disable", projections.DisableReq, unary=self.disable),
            Method(f"{SERVICE}/Reset", projections.ResetReq, unary=self.reset),
            Method(f"{SERVICE}/State", projections.StateReq, unary=self.state),
            Method(f"{SERVICE}/Result", projections.ResultReq, unary=self.result),
            Method(f"{SERVICE}/RestartSubsystem", shared.Empty, unary=self.restart),
        ]

    async def load(self, *, start: bool) -> None:
        """What the log knows. The system projections begin with `start`, or where they have begun before."""
        self._known = {name: _Projection(name) for name in SYSTEM}
        try:
            async for event in self._store.read_stream(REGISTER, backwards=True, limit=1):
                for entry in entries_of(document_of(event.data), "projections"):
                    try:
                        projection = restored(_Projection, entry)
                    except Malformed as error:  # it is data, which never stops a start
                        advice = "create the projection again"
                        log.error("projection.unreadable", entry=shown(repr(entry)), reason=str(error), advice=advice)
                    else:
                        self._known[projection.name] = projection
        except (StreamNotFound, StreamDeleted):
            pass
        self._apply()
        if start or await self._linker.has_begun():
            self._linker.begin()

    async def stop(self) -> None:
        await self._linker.stop()

    async def wanted(self, stream: str, resolve: bool) -> None:
        """Somebody reads this stream, or `$all`: where links are asked for, what was appended until now is linked."""
        if stream.startswith(("$ce-", "$et-")) or (stream == ALL and resolve):
            self._linker.begin()
            await self._linker.catch_up()

    def _apply(self) -> None:
        self._linker.by_category, self._linker.by_type = (
            self._known[name].running if name in self._known else False for name in SYSTEM
        )

    async def _save(self) -> None:
        document = {"projections": [asdict(projection) for projection in self._known.values()]}
        await self._store.append(REGISTER, [EventData("$ProjectionsUpdated", json.dumps(document).encode())])
        self._apply()

    def _named(self, name: str) -> _Projection:
        try:
            return self._known[name]
        except KeyError:
            raise Refusal(Status.NOT_FOUND, f"Projection '{shown(name)}' was not found.") from None

    # ---- changes

    async def create(self, request: Any, call: Call) -> Any:
        self._access.check_operator(call.user)
        options = request.options
        mode = options.WhichOneof("mode")
        if mode == "one_time":
            projection = _Projection(f"one-time-{len(self._known)}", options.query, "OneTime")
        elif mode == "transient":
            projection = _Projection(options.transient.name, options.query, "Transient")
        elif mode == "continuous":
            wanted = options.continuous
            if wanted.track_emitted_streams and not wanted.emit_enabled:
                raise thrown()
            emit, track = wanted.emit_enabled, wanted.track_emitted_streams
            projection = _Projection(wanted.name, options.query, "Continuous", emit, track)
        else:
            raise thrown()
        async with self._changing:
            if projection.name in self._known:
                raise Refusal(Status.UNKNOWN, "Envelope callback expected Updated, received Conflict instead")
            self._known[projection.name] = projection
            await self._save()
        return projections.CreateResp()

    async def update(self, request: Any, call: Call) -> Any:
        self._access.check_operator(call.user)
        async with self._changing:
            projection = self._named(request.options.name)
            projection.query = request.options.query
            if request.options.WhichOneof("emit_option") == "emit_enabled":
                projection.emit = request.options.emit_enabled
            await self._save()
        return projections.UpdateResp()

    async def delete(self, request: Any, call: Call) -> Any:
        self._access.check_operator(call.user)
        async with self._changing:
            projection = self._named(request.options.name)
            # Without a query it cannot run, whatever was asked of it.
            if (projection.running and projection.query) or projection.name in SYSTEM:
                raise Refusal(Status.UNKNOWN, "Envelope callback expected Updated, received OperationFailed instead")
            del self._known[projection.name]
            await self._save()
        return projections.DeleteResp()

    async def enable(self, request: Any, call: Call) -> Any:
        await self._switch(request.options.name, call, running=True)
        if request.options.name in SYSTEM:
            self._linker.begin()
        return projections.EnableResp()

    async def disable(self, request: Any, call: Call) -> Any:
        await self._switch(request.options.name, call, running=False)
        return projections.DisableResp()

    async def _switch(self, name: str, call: Call, *, running: bool) -> None:
        self._access.check_operator(call.user)
        async with self._changing:
            self._named(name).running = running
            await self._save()

    async def reset(self, request: Any, call: Call) -> Any:
        self._access.check_operator(call.user)
        self._named(request.options.name)
        return projections.ResetResp()

    async def restart(self, request: Any, call: Call) -> Any:
        self._access.check_operator(call.user)
        return shared.Empty()

    # ---- what they know

    async def state(self, request: Any, call: Call) -> Any:
        self._access.check_user(call.user)
        await self._unknowable(request.options.name)
        return projections.StateResp(state=_EMPTY)

    async def result(self, request: Any, call: Call) -> Any:
        self._access.check_user(call.user)
        await self._unknowable(request.options.name)
        return projections.ResultResp(result=_EMPTY)

    async def _unknowable(self, name: str) -> None:
        """EventStoreDB never answers for a projection without a query."""
        projection = self._named(name)
        if not projection.query and name not in SYSTEM:
            await asyncio.Event().wait()

    async def statistics(self, request: Any, call: Call, send: Send) -> None:
        self._access.check_user(call.user)
        batch = [packed(projections.StatisticsResp(details=details)) for details in self._details(request.options)]
        if batch:
            await send(batch)

    def _details(self, options: Any) -> Iterator[Any]:
        mode = options.WhichOneof("mode")
        if mode is None:
            raise unimplemented("statistics without a mode")
        modes = {"transient": "Transient", "continuous": "Continuous", "one_time": "OneTime"}
        chosen = [self._named(options.name)] if mode == "name" else list(self._known.values())
        for projection in chosen:
            if mode in modes and projection.mode != modes[mode]:
                continue
            status = "Running" if projection.running else "Stopped"
            yield projections.StatisticsResp.Details(
                name=projection.name,
                effectiveName=projection.name,
                status=status,
                mode=projection.mode,
                progress=100.0 if projection.name in SYSTEM else -1.0,
            )


_EMPTY: Final = struct_pb2.Value(struct_value=struct_pb2.Struct())
