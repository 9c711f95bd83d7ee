"""Which resource of a handler raised an error, as its traceback shows it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest

from tidings import Event, Service
from tidings.cli._culprits import failing_alike
from tidings.cli._literals import Imports
from tidings.operations.capture import Run


class Asked(Event):
    pence: int


class Refused(Exception):
    """An error of this module."""


class Coded(Exception):
    """An error that takes more than its text."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)


class Bank:
    def pay(self, pence: int) -> None:
        raise self.error

    error: Exception = Refused("no money")


class Post:
    def send(self) -> None: ...


def helper(bank: Bank) -> None:
    bank.pay(1)


def deeper(bank: Bank) -> None:
    method = bank.pay
    method(1)


def alike(handle: Callable[..., None], *, machine: str = "") -> tuple[list[str], Imports]:
    """Let a handler fail, and return the lines that a captured test has of it."""
    service, imports = Service("till"), Imports()

    @service.on(Asked)
    def handler(event: Asked, bank: Bank, post: Post) -> None:
        handle(bank)

    try:
        handler(Asked(pence=1), Bank(), Post())
    except Exception as error:
        detail = "".join(traceback.format_exception(error)).replace(__file__, machine or __file__)
        run = Run(service.named["handler"], "dead", f"{type(error).__name__}: {error}", detail=detail)
        return list(failing_alike(run, imports, lambda text: text.replace("money", "x"))), imports
    raise AssertionError("it did not fail")


def test_the_method_of_a_resource_that_raised_is_named_with_its_error() -> None:
    lines, imports = alike(helper)
    assert lines == ['RESOURCES[Bank].pay.side_effect = Refused("no x")']
    assert {"Bank", "Refused"} <= imports.namespace().keys()


def test_an_error_of_python_itself_needs_no_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bank, "error", RuntimeError("shut"))
    lines, imports = alike(helper)
    assert lines == ['RESOURCES[Bank].pay.side_effect = RuntimeError("shut")']
    assert imports.namespace().keys() == {"Bank"}


@pytest.mark.parametrize(("error", "handle"), [(Coded(3, "no"), helper), (Refused("no"), deeper)])
def test_where_it_cannot_tell_a_comment_says_where_it_failed(
    monkeypatch: pytest.MonkeyPatch, error: Exception, handle: Any
) -> None:
    monkeypatch.setattr(Bank, "error", error)
    lines, _ = alike(handle, machine="/elsewhere/bank.py")
    assert all(line.startswith("# ") for line in lines)
    assert lines[0].startswith("# It failed in pay (bank.py, line ")


def test_an_error_of_the_handler_itself_needs_nothing() -> None:
    def own(bank: Bank) -> None:
        raise Refused("by the handler")

    for machine in ("", "/elsewhere/tests/unit/test_capture_culprits.py"):
        assert alike(own, machine=machine)[0] == []
