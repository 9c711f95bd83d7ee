"""Every benchmark, one after the other; `make bench`. Exit status 1 when any floor is missed."""

from __future__ import annotations

import sys

from tests.benchmarks import bench_import, bench_relay, bench_store

sys.exit(max(bench.main() for bench in (bench_import, bench_store, bench_relay)))
