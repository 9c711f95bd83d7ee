"""Every benchmark, one after the other; `make bench`. Exit status 1 when any floor is missed."""

from __future__ import annotations

import sys

from tests.benchmarks import (
    bench_bus,
    bench_databases,
    bench_eventstoredb,
    bench_fleet,
    bench_healing,
    bench_held,
    bench_import,
    bench_inbox,
    bench_latency,
    bench_newcomer,
    bench_postgresql_store,
    bench_recovery,
    bench_relay,
    bench_server,
    bench_service,
    bench_store,
    bench_world,
)

BENCHES = (
    bench_import,
    bench_store,
    bench_postgresql_store,
    bench_eventstoredb,
    bench_server,
    bench_relay,
    bench_bus,
    bench_service,
    bench_databases,
    bench_latency,
    bench_inbox,
    bench_held,
    bench_healing,
    bench_recovery,
    bench_newcomer,
    bench_fleet,
    bench_world,
)

sys.exit(max([bench.main() for bench in BENCHES]))
