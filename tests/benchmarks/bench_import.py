"""What importing Tidings costs beside the libraries that it cannot do without, and what it must not import.

python -m tests.benchmarks.bench_import
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 15
LIMIT = 1.3
OURS = "from tidings import Event, Service"
PEER = "import asyncio, pydantic, structlog; pydantic.BaseModel"
FORBIDDEN = ("sqlalchemy", "aio_pika", "grpc", "fastapi", "opentelemetry")


def seconds(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def main() -> int:
    """Run the benchmark. Return exit status 1 when the floor is missed."""
    for code in (OURS, PEER):  # compiles and warms the caches
        seconds(code)
    ratios = [seconds(OURS) / seconds(PEER) for _ in range(ROUNDS)]
    ratio = statistics.median(ratios)
    probe = f"{OURS}; import sys; print(*[m for m in {FORBIDDEN!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True).stdout.split()
    print(f"{OURS} / import pydantic, structlog, asyncio: {ratio:.2f} x (limit {LIMIT} x, {ROUNDS} pairs)")
    print(f"of {', '.join(FORBIDDEN)} it imports: {', '.join(found) or 'none'}")
    return int(ratio > LIMIT or bool(found))


if __name__ == "__main__":
    sys.exit(main())
