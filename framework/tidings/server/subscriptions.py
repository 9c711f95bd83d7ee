"""`Streams.Read` as a catch-up subscription: history, the word that it is caught up, then what is appended, for ever.

A subscriber that does not read on costs two pieces of history at most: the one on its way, and the next one.
"""

from __future__ import annotations

from contextlib import aclosing
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any
from uuid import uuid4

from tidings.errors import StreamDeleted
from tidings.server.calls import Send
from tidings.server.filters import choice_of_read
from tidings.server.log import Batch, ServedLog
from tidings.server.pages import Pages
from tidings.server.permissions import Reader
from tidings.server.protocol import packed, streams
from tidings.server.refusals import invalid_argument, stream_deleted
from tidings.server.wire import Encode, Malformed, stream_name
from tidings.stores.rules import MAX_VERSION

__all__ = ["follow_all", "follow_stream"]

PAGE = 512
WINDOW = 32
"""Events of a filter's window when the request names none: EventStoreDB's own page."""
UNSIGNED = 2**64 - 1
NOTHING_TOLD = -2
"""Below every checkpoint, the one of -1 included."""


def _confirmation() -> bytes:
    confirmation = streams.ReadResp.SubscriptionConfirmation(subscription_id=str(uuid4()))
    return packed(streams.ReadResp(confirmation=confirmation))


def _caught_up() -> bytes:
    return packed(streams.ReadResp(caught_up=streams.ReadResp.CaughtUp()))


def _checkpoint(position: int) -> bytes:
    unsigned = position & UNSIGNED
    checkpoint = streams.ReadResp.Checkpoint(commit_position=unsigned, prepare_position=unsigned)
    return packed(streams.ReadResp(checkpoint=checkpoint))


async def follow_stream(
    log: ServedLog, options: Any, encode: Encode, send: Send, reader: Reader | None, pages: Pages
) -> None:
    """One stream behind a revision, exclusive. A missing or softly deleted one is waited for."""
    wanted = options.stream
    stream = stream_name(wanted.stream_identifier)
    start = wanted.WhichOneof("revision_option")
    log.store.watch(+1)
    try:
        try:
            last = await log.last_version(stream)
            if last == MAX_VERSION:
                raise StreamDeleted(stream)
            after = {"end": last, "revision": min(wanted.revision, MAX_VERSION)}.get(start or "", -1)
            history = True
            # Asked for once before the confirmation: a stream that is closed refuses instead of confirming.
            look = partial(log.follow, stream, resolve=options.resolve_links, reader=reader)
            events, piece = await pages.read(partial(look, after=after, history=history), itemgetter(0))
            await send([_confirmation()])
            while True:
                if events:
                    await send([encode(event) for event in events])
                events.clear()
                pages.sent()
                if piece.version == MAX_VERSION:
                    raise StreamDeleted(stream)
                after = piece.version
                if piece.end:
                    if history:
                        history = False
                        await send([_caught_up()])
                    await log.touched(stream, piece.reached)
                events, piece = await pages.read(partial(look, after=after, history=history), itemgetter(0))
        except StreamDeleted:
            raise stream_deleted(stream) from None
    finally:
        log.store.watch(-1)


async def follow_all(
    log: ServedLog, options: Any, encode: Encode, send: Send, reader: Reader | None, pages: Pages
) -> None:
    """The whole log behind a position, exclusive.

    A position between two events is confirmed and then refused. With a filter, checkpoints say how far it was looked:
    after every window times the multiplier, and where history ends. A checkpoint never goes back.
    """
    wanted = options.all
    choice, window, interval = None, 0, 0
    if options.WhichOneof("filter_option") == "filter":
        choice = choice_of_read(options.filter)
        multiplier = options.filter.checkpointIntervalMultiplier
        if multiplier == 0:
            raise Malformed("checkpointIntervalMultiplier")
        window = options.filter.max or WINDOW
        interval = window * multiplier
    start = wanted.WhichOneof("all_option")
    log.store.watch(+1)
    try:
        head = await log.head()
        position = min(wanted.position.commit_position, MAX_VERSION)
        after = {"end": head, "position": position}.get(start or "", -1)
        await send([_confirmation()])
        if start == "position" and 0 < position <= head and not await log.is_record(position):
            raise invalid_argument(f"Position {position} is not that of an event.")
        counted, told = 0, NOTHING_TOLD
        looked = _Looked(after, window)
        pieces = log.history(choice, options.resolve_links, after=after, count=PAGE, reader=reader, pages=pages)
        async with aclosing(pieces) as history:
            async for batch in history:
                looked.over(batch)
                answers, counted, told = _answers(batch, encode, interval, counted, told)
                if batch.end:
                    if interval and start != "end" and looked.upto > told:
                        told, counted = looked.upto, 0
                        answers.append(_checkpoint(told))
                    answers.append(_caught_up())
                reached, end = batch.reached, batch.end
                del batch  # who waits for what comes next keeps nothing of what came before
                if answers:
                    await send(answers)
                pages.sent()
        while True:
            if end:
                await log.store.beyond(reached)
            look = partial(log.news, choice, options.resolve_links, reached, reader)
            batch = await pages.read(look, attrgetter("events"))
            answers, counted, told = _answers(batch, encode, interval, counted, told)
            reached, end = batch.reached, batch.end
            del batch
            if answers:
                await send(answers)
            pages.sent()
    finally:
        log.store.watch(-1)


class _Looked:
    """How far EventStoreDB 24.2 says that it looked when history ends: up to the last whole window, or the last event
    sent. That lags behind the end by less than a window; a log shorter than one was looked at up to where it began,
    and that is -1 where the subscription begins at the start (recorded: 2^64 - 1 on the wire)."""

    def __init__(self, start: int, window: int) -> None:
        self.upto = start
        self._window = window
        self._rest = 0
        """Events of the window that is not whole yet."""

    def over(self, batch: Batch) -> None:
        if not self._window:
            return
        whole, rest = divmod(self._rest + len(batch.considered), self._window)
        if whole:
            self.upto = max(self.upto, batch.considered[whole * self._window - self._rest - 1])
        if batch.events:
            self.upto = max(self.upto, batch.considered[batch.after[-1] - 1])
        self._rest = rest


def _answers(batch: Batch, encode: Encode, interval: int, counted: int, told: int) -> tuple[list[bytes], int, int]:
    """Events with the checkpoints between them, how many were considered since the last one, and where it was."""
    if not interval:
        return [encode(event) for event in batch.events], 0, told
    answers: list[bytes] = []
    at = 0
    due = interval - counted
    for event, rank in zip(batch.events, batch.after, strict=True):
        while due < rank:
            told = batch.considered[due - 1]
            answers.append(_checkpoint(told))
            at, due = due, due + interval
        answers.append(encode(event))
    while due <= len(batch.considered):
        told = batch.considered[due - 1]
        answers.append(_checkpoint(told))
        at, due = due, due + interval
    return answers, (counted + len(batch.considered)) if at == 0 else len(batch.considered) - at, told
