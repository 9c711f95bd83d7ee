"""Order's HTTP API does what its OpenAPI document says, with the real service behind it: schemathesis asks and looks.

It covers each constraint of the document from both sides, then tries what it can think of. All of its checks are on.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any, Final

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.python.asgi import shutdown_lifespans

from services.order.api import api
from tests.services.counter import ORDER

EXAMPLES: Final = 40
"""Requests per operation, besides those that cover its constraints."""

CONFIG: Final = {
    "generation": {
        "deterministic": True,
        "max-examples": EXAMPLES,
        "database": "none",
        # Headers that a server does not know it ignores (RFC 9110, section 5.1).
        "allow-extra-parameters": False,
    },
    "checks": {
        # As by default, and 412: a valid If-Match may name another version.
        "positive_data_acceptance": {"expected-statuses": ["2xx", "3xx", "404", "409", "412"]},
    },
}

schema = schemathesis.openapi.from_dict(api.openapi(), config=SchemathesisConfig.from_dict(CONFIG))
schema.app = api

orders: list[str] = []
"""Ids of orders that exist."""
numbers = count()


@pytest.fixture(scope="module", autouse=True)
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run Order with two orders while the tests of this module run, in a thread of schemathesis."""
    folder = tmp_path_factory.mktemp("contract")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TIDINGS_STORE", f"sqlite:///{folder}/events.db")
        environment.setenv("TIDINGS_DATABASE", f"sqlite:///{folder}/{{service}}.db")
        try:
            for _ in range(2):
                placed = schema["/orders"]["POST"].Case(body=ORDER, media_type="application/json").call()
                assert placed.status_code == 201, placed.text
                orders.append(placed.json()["id"])
            yield
        finally:
            shutdown_lifespans()


@schema.parametrize()
def test_every_answer_is_one_that_the_document_names(case: schemathesis.Case[Any]) -> None:
    if case.meta is not None and case.meta.generation.mode.is_positive:
        make_likely(case)
    case.call_and_validate()


def make_likely(case: schemathesis.Case[Any]) -> None:
    """Let valid requests name orders and versions that exist, and give each order its own key."""
    number = next(numbers)
    if case.path_parameters:
        case.path_parameters["order_id"] = orders[number % len(orders)]
    for name in ("If-Match", "If-None-Match"):
        if name in case.headers:  # schemathesis takes the quotes off some entity tags
            case.headers[name] = f'"{number % 3}"'
    if "Idempotency-Key" in case.headers:
        case.headers["Idempotency-Key"] = f"{case.headers['Idempotency-Key'][:200]}{number}"
