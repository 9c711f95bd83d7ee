"""EventStoreDB's services `Gossip`, `ServerFeatures`, `Monitoring`, and gRPC's health: one node, its own leader.

The messages of the last three are in no client package: they are a few fields, written here as bytes.
"""

from __future__ import annotations

import asyncio
import os
import resource
from time import monotonic, time
from typing import Any, Final
from uuid import uuid4

from tidings.server.calls import Call, Method, Send
from tidings.server.protocol import gossip, shared
from tidings.server.releases import Release
from tidings.server.security import Access

__all__ = ["Cluster"]

STATS_PERIOD: Final = 30.0
"""Seconds between statistics."""


class Cluster:
    """What a client asks of a node before it uses it. `methods` are those that the node offers."""

    def __init__(self, host: str, port: int, methods: list[Method], access: Access, release: Release) -> None:
        self._access = access
        self._release = release
        self._host, self._port = host, port
        self._offered = [method.path for method in methods]
        self._id = uuid4()
        self._since = monotonic()

    def methods(self) -> list[Method]:
        return [
            Method("/event_store.client.gossip.Gossip/Read", shared.Empty, unary=self.gossip, public=True),
            Method(
                "/event_store.client.server_features.ServerFeatures/GetSupportedMethods",
                shared.Empty,
                unary=self.supported,
                public=True,
            ),
            Method("/event_store.client.monitoring.Monitoring/Stats", shared.Empty, streaming=self.stats, endless=True),
            Method("/grpc.health.v1.Health/Check", shared.Empty, unary=self.healthy, public=True),
            Method("/grpc.health.v1.Health/Watch", shared.Empty, streaming=self.watch_health, public=True),
        ]

    async def gossip(self, request: Any, call: Call) -> Any:
        member = gossip.MemberInfo(
            instance_id=shared.UUID(string=str(self._id)),
            time_stamp=int(time() * 10_000_000),
            state=gossip.MemberInfo.Leader,
            is_alive=True,
            http_end_point=gossip.EndPoint(address=self._host, port=self._port),
        )
        return gossip.ClusterInfo(members=[member])

    async def supported(self, request: Any, call: Call) -> bytes:
        """`SupportedMethods`: methods = 1 (method_name = 1, service_name = 2, features = 3),
        event_store_server_version = 2. Clients decide by the features which fields they may use."""
        answer = b""
        for path in (*self._offered, *(method.path for method in self.methods())):
            _, service, method = path.lower().split("/")
            features = b"".join(_field(3, feature.encode()) for feature in _features_of(service, method))
            if "client" in service or service.startswith("kurrentdb"):  # gRPC's own health is not one of them
                answer += _field(1, _field(1, method.encode()) + _field(2, service.encode()) + features)
        return answer + _field(2, self._release.version.encode())

    async def stats(self, request: Any, call: Call, send: Send) -> None:
        """`StatsResp`: stats = 1, a map of texts (key = 1, value = 2). The request's own wishes are not looked at."""
        self._access.check_user(call.user)
        while True:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            stats = {
                "es-version": self._release.version,
                "proc-id": os.getpid(),
                "proc-uptime-s": round(monotonic() - self._since),
                "proc-cpu-s": round(usage.ru_utime + usage.ru_stime, 3),
                "proc-mem-max-kib": usage.ru_maxrss,
            }
            entries = (_field(1, name.encode()) + _field(2, str(value).encode()) for name, value in stats.items())
            await send([b"".join(_field(1, entry) for entry in entries)])
            await asyncio.sleep(STATS_PERIOD)

    async def healthy(self, request: Any, call: Call) -> bytes:
        """`HealthCheckResponse`: status = 1, SERVING."""
        return b"\x08\x01"

    async def watch_health(self, request: Any, call: Call, send: Send) -> None:
        """Says it once: it changes only when the connection ends."""
        await send([b"\x08\x01"])


def _features_of(service: str, method: str) -> tuple[str, ...]:
    """Return what EventStoreDB 24.2 says that the method can do beyond its first form."""
    if service.endswith(".streams"):
        return {"read": ("position", "events"), "batchappend": ("deadline_duration",)}.get(method, ())
    if service.endswith(".persistentsubscriptions") and method != "restartsubsystem":
        return ("stream", "all")
    return ()


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited protobuf field."""
    size, length = len(value), b""
    while size > 0x7F:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value
