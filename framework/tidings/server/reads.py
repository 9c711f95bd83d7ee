"""`Streams.Read` as a read: a stream or `$all`, forwards or backwards, once to its end. Subscriptions are elsewhere."""

from __future__ import annotations

from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, Final

from tidings.errors import StreamDeleted, StreamNotFound
from tidings.server.calls import Send
from tidings.server.filters import choice_of_read
from tidings.server.log import ServedLog
from tidings.server.pages import Pages
from tidings.server.permissions import Reader
from tidings.server.protocol import packed, streams
from tidings.server.refusals import stream_deleted, unknown
from tidings.server.wire import Encode, stream_name
from tidings.stores.rules import MAX_VERSION

__all__ = ["PAGE", "read_all", "read_stream"]

PAGE: Final = 512
"""Events of one batch: bounds what a reader that has stopped keeps in memory."""


async def read_stream(
    log: ServedLog, options: Any, encode: Encode, send: Send, reader: Reader | None, pages: Pages
) -> None:
    """Forwards from a revision inclusive, backwards from one; what retention hides is left out."""
    wanted, left = options.stream, options.count
    stream = stream_name(wanted.stream_identifier)
    backwards = options.read_direction == streams.ReadReq.Options.Backwards
    at_end = wanted.WhichOneof("revision_option") == "end"
    if left == 0 or (at_end and not backwards):
        raise unknown("ReadStreamResult", "Error")
    try:
        view, last = await log.view(stream)
    except StreamNotFound:
        missing = streams.ReadResp.StreamNotFound(stream_identifier=wanted.stream_identifier)
        await send([packed(streams.ReadResp(stream_not_found=missing))])
        return
    except StreamDeleted:
        raise stream_deleted(stream) from None
    start = min(wanted.revision, MAX_VERSION)
    first = view.first
    if not backwards:
        view = view._replace(first=max(view.first, start))
    elif not at_end:
        view = view._replace(last=min(view.last, start))
    with_edges = options.control_option.compatibility >= 1
    found, more = False, view.first <= view.last
    while more and left > 0:
        look = partial(
            log.stream,
            stream,
            view,
            options.resolve_links,
            backwards=backwards,
            count=min(left, PAGE),
            reader=reader,
        )
        events, version, more = await pages.read(look, itemgetter(0))
        if events:
            found = True
            await send([encode(event) for event in events])
            view = view._replace(last=version - 1) if backwards else view._replace(first=version + 1)
            left -= len(events)
        pages.sent()
    if with_edges:
        edges = [] if found or backwards or first == start else [streams.ReadResp(first_stream_position=first)]
        await send([packed(edge) for edge in (*edges, streams.ReadResp(last_stream_position=last))])


async def read_all(
    log: ServedLog, options: Any, encode: Encode, send: Send, reader: Reader | None, pages: Pages
) -> None:
    """Forwards from a position inclusive, backwards from one exclusive; `count` is of events that match the filter."""
    wanted, left = options.all, options.count
    backwards = options.read_direction == streams.ReadReq.Options.Backwards
    filtered = options.WhichOneof("filter_option") == "filter"
    choice = choice_of_read(options.filter) if filtered else None
    after, before = -1, MAX_VERSION
    start = wanted.WhichOneof("all_option")
    if start == "position":
        position = wanted.position.commit_position
        result, head = "FilteredReadAllResult" if filtered else "ReadAllResult", await log.head()
        if 0 < position <= head and not await log.is_record(position):
            raise unknown(result, "InvalidPosition")
        if backwards and position > head:
            raise unknown(result, "Error")
        if backwards:
            before = min(position, MAX_VERSION)
        else:
            after = min(position, MAX_VERSION) - 1
    elif (start == "end") != backwards:
        return
    end = False
    while not end and left > 0:
        look = partial(
            log.all,
            choice,
            options.resolve_links,
            after=after,
            before=before,
            backwards=backwards,
            count=PAGE,
            reader=reader,
        )
        batch = await pages.read(look, attrgetter("events"))
        events = batch.events[:left]
        if events:
            await send([encode(event) for event in events])
        pages.sent()
        left -= len(events)
        end = batch.end
        if backwards:
            before = batch.reached
        else:
            after = batch.reached
