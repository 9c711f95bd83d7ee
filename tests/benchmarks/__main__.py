"""Every benchmark, one after the other; `make bench`. Exit status 1 when any floor is missed."""

from __future__ import annotations

import sys

from tests.benchmarks import (
    bench_bus,
    bench_eventstoredb,
    bench_fleet,
    bench_import,
    bench_latency,
    bench_relay,
    bench_server,
    bench_service,
    bench_store,
)

BENCHES = (
    bench_import,
    bench_store,
    bench_eventstoredb,
    bench_server,
    bench_relay,
    bench_bus,
    bench_service,
    bench_latency,
    bench_fleet,
)

sys.exit(max([bench.main() for bench in BENCHES]))
