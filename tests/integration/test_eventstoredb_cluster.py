"""The EventStoreDB adapter in a cluster: nodes that gossip about who leads, and refuse what only the leader may do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

import pytest

from tests.integration.eventstoredb import PATIENCE, Proxy, many
from tidings.errors import StoreUnavailable
from tidings.server import EventStoreServer
from tidings.stores.eventstoredb.protos import streams_pb2
from tidings.stores.eventstoredb.store import EventStoreDB
from tidings.testing.store_conformance import events, numbers, read, take

gossip: Any = import_module(streams_pb2.__name__.replace("streams_pb2", "gossip_pb2"))
grpc: Any = import_module("grpc")
aio: Any = import_module("grpc.aio")


class Follower(grpc.GenericRpcHandler):  # type: ignore[misc] # gRPC has no types
    """A node that only gossips. `gossip` is the leader in its opinion, `leader` the real one."""

    def __init__(self) -> None:
        self.port = 0
        self.gossip: int | None = None
        self.leader = 0
        self.asked = 0
        """How often it was asked who leads."""

    def service(self, details: Any) -> Any:
        if details.method == "/event_store.client.gossip.Gossip/Read":
            return grpc.unary_unary_rpc_method_handler(
                self.read, response_serializer=lambda info: info.SerializeToString()
            )
        return grpc.stream_stream_rpc_method_handler(self.refuse)

    async def read(self, request: bytes, context: Any) -> Any:
        self.asked += 1
        states = gossip.MemberInfo.VNodeState
        ports = {self.port} | ({self.gossip} if self.gossip is not None else set())
        return gossip.ClusterInfo(
            members=[
                gossip.MemberInfo(
                    state=states.Leader if port == self.gossip else states.Follower,
                    is_alive=True,
                    http_end_point=gossip.EndPoint(address="127.0.0.1", port=port),
                )
                for port in (*ports, 1)
            ]
        )

    async def refuse(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        trailers = (
            ("exception", "not-leader"),
            ("leader-endpoint-host", "127.0.0.1"),
            ("leader-endpoint-port", str(self.leader)),
        )
        context.set_trailing_metadata(trailers)
        await context.abort(grpc.StatusCode.NOT_FOUND, "Leader info available")
        yield b""


@asynccontextmanager
async def following() -> AsyncIterator[Follower]:
    node = Follower()
    server = aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((node,))
    node.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield node
    finally:
        await server.stop(None)


@asynccontextmanager
async def cluster(deadline: int = 10) -> AsyncIterator[tuple[EventStoreDB, EventStoreServer, Follower]]:
    """Run a leader and a follower. The store knows the follower, and a node that does not exist."""
    async with EventStoreServer() as leader, following() as node:
        node.gossip = node.leader = leader.port
        store = EventStoreDB(f"esdb://127.0.0.1:1,127.0.0.1:{node.port}?Tls=false&DefaultDeadline={deadline}")
        try:
            async with asyncio.timeout(PATIENCE):
                yield store, leader, node
        finally:
            await store.close()


async def test_the_leader_is_found_by_gossip() -> None:
    async with cluster() as (store, leader, _):
        assert (await store.append("s", events(0))).version == 0
        assert await read(store, "s") == [(0, 0)]
        assert {connection.peer for connection in store.connections} == {f"127.0.0.1:{leader.port}"}


async def test_a_node_that_is_not_the_leader_any_more_leads_to_the_one_that_is() -> None:
    async with cluster() as (store, _, node):
        node.gossip = node.port  # it still thinks that it leads
        assert (await store.append("s", events(0))).version == 0
        assert await read(store, "s") == [(0, 0)]


async def test_one_node_that_is_not_the_leader_says_who_is() -> None:
    async with following() as node:
        node.leader = 4711
        store = EventStoreDB(f"esdb://127.0.0.1:{node.port}?Tls=false")
        async with asyncio.timeout(PATIENCE):
            for use in (store.append("s", events(0)), store.head(), read(store, "s")):
                with pytest.raises(StoreUnavailable, match=r"not the leader of its cluster \(127\.0\.0\.1:4711 is\)"):
                    await use
            await store.close()


async def test_a_cluster_without_leader_is_unavailable() -> None:
    async with cluster(deadline=1) as (store, leader, node):
        node.gossip = None
        with pytest.raises(StoreUnavailable, match="the leader was not found"):
            await store.append("s", events(0))
        node.gossip = leader.port
        assert (await store.append("s", events(0))).version == 0


async def test_a_leader_that_stops_is_left_for_the_next_one() -> None:
    """A paused leader keeps its connections and answers nothing: appends and a subscription find the new leader."""
    async with cluster(deadline=4) as (store, leader, node), Proxy() as old:
        old.target, node.gossip = leader.port, old.port
        await store.append("s", events(0))
        source = store.subscribe_stream("s")
        await take(source, many(1))
        old.mute = True
        appending = [asyncio.ensure_future(store.append("s", events(n))) for n in (1, 2, 3)]
        node.gossip, asked = leader.port, node.asked
        assert [(await answer).version for answer in appending] == [1, 2, 3]
        assert numbers(await take(source, many(3))) == [1, 2, 3]
        assert node.asked > asked
        assert await read(store, "s") == [(n, n) for n in range(4)]
