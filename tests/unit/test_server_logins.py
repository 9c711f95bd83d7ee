"""Passwords that wait: whose turn it is, who is refused at once, and what is never checked twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("esdbclient", reason="pip install 'tidings[eventstoredb]'")

from tidings.server import logins
from tidings.server.budgets import Allowance, Limits, Treasury
from tidings.server.logins import WAITING, WAITING_OF_ONE, Logins, User
from tidings.server.refusals import Refusal

RIGHT = "right"


class Checks:
    """The checks that were begun, by user; the first one lasts until it is let go."""

    def __init__(self) -> None:
        self.of: list[str] = []
        self.let_go = threading.Event()

    def has(self, user: User, password: str) -> bool:
        self.of.append(user.name)
        assert self.let_go.wait(30)
        return password == RIGHT


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Checks]:
    checks = Checks()
    monkeypatch.setattr(User, "has", lambda user, password: checks.has(user, password))
    yield checks
    checks.let_go.set()


def user(name: str) -> User:
    return User(name, (), b"salt", b"hash", disabled=False)


class Server:
    """Logins of connections that nobody shares."""

    def __init__(self, **limits: int) -> None:
        self.logins = Logins(limits.pop("user_failed_logins", 50))
        self.treasury = Treasury(Limits(**limits))

    def login(self, name: str, password: str, *, known: bool = True) -> asyncio.Task[bool]:
        allowance = Allowance(self.treasury)
        return asyncio.create_task(self.logins.check(user(name) if known else None, name, password, allowance))

    async def waiting(self, tasks: list[asyncio.Task[bool]]) -> int:
        """How many of these wait; the others were refused."""
        for _ in range(5):
            await asyncio.sleep(0)
        return sum(not task.done() for task in tasks)


async def test_names_that_do_not_exist_fill_no_line_and_wait_behind_those_that_do(checks: Checks) -> None:
    server = Server()
    unknown = [server.login(f"nobody-{n}", "guess", known=False) for n in range(500)]
    assert await server.waiting(unknown) == 1 + WAITING_OF_ONE
    honest = server.login("honest", RIGHT)
    assert await server.waiting([honest]) == 1
    checks.let_go.set()
    assert await honest
    assert checks.of[:2] == ["", "honest"]
    outcomes = await asyncio.gather(*unknown, return_exceptions=True)
    assert outcomes.count(False) == 1 + WAITING_OF_ONE
    assert server.treasury.refused["logins"] == 500 - 1 - WAITING_OF_ONE


async def test_one_name_takes_a_part_of_the_line_alone(checks: Checks) -> None:
    server = Server()
    guesses = [server.login("admin", f"guess {n}") for n in range(100)]
    assert await server.waiting(guesses) == 1 + WAITING_OF_ONE
    other = server.login("other", RIGHT)
    checks.let_go.set()
    assert await other
    await asyncio.gather(*guesses, return_exceptions=True)


async def test_a_line_full_of_names_that_failed_makes_room_for_one_that_did_not(checks: Checks) -> None:
    server = Server()
    checks.let_go.set()
    for n in range(10):
        assert not await server.login(f"known-{n}", "guess")
    checks.let_go.clear()
    guesses = [server.login(f"known-{n % 10}", f"guess {n}") for n in range(100)]
    assert await server.waiting(guesses) == 1 + WAITING
    honest = server.login("honest", RIGHT)
    assert await server.waiting([honest]) == 1
    assert await server.waiting(guesses) == WAITING
    while len(checks.of) < 11:  # the first guess is being checked
        await asyncio.sleep(0.001)
    checks.let_go.set()
    assert await honest
    assert checks.of[11] == "honest"
    outcomes = await asyncio.gather(*guesses, return_exceptions=True)
    assert all(outcome is False or isinstance(outcome, Refusal) for outcome in outcomes)


async def test_who_leaves_while_waiting_leaves_the_line_and_who_leaves_meanwhile_is_counted(checks: Checks) -> None:
    server = Server(user_failed_logins=2)
    first = server.login("admin", "guess")
    waiting = [server.login("admin", "guess") for _ in range(WAITING_OF_ONE)]
    assert await server.waiting(waiting) == WAITING_OF_ONE
    for task in (first, *waiting):
        task.cancel()
    await asyncio.gather(first, *waiting, return_exceptions=True)
    again = server.login("admin", RIGHT)
    assert await server.waiting([again]) == 1
    assert checks.of == ["admin"], "one at a time, also when the first has left"
    checks.let_go.set()
    assert await again
    assert not await server.login("admin", "guess")
    with pytest.raises(Refusal, match="Too many wrong passwords"):
        await server.login("admin", "guess")


async def test_a_password_that_was_right_is_not_checked_again_until_the_user_changes(checks: Checks) -> None:
    server, known = Server(), user("admin")
    checks.let_go.set()
    assert not server.logins.remembers(known, RIGHT)
    assert await server.login("admin", RIGHT)
    assert server.logins.remembers(known, RIGHT)
    assert not server.logins.remembers(known, "guess")
    assert not server.logins.remembers(User("admin", (), b"salt", b"other", disabled=False), RIGHT)
    assert not server.logins.remembers(user("other"), RIGHT)


def test_a_password_of_any_characters_can_be_hashed() -> None:
    assert len(logins.hashed("p\udcffä\0", b"salt")) == 64


async def test_all_who_say_the_same_password_are_answered_by_one_check(checks: Checks) -> None:
    """A restarted server is called by every connection of a service at once."""
    server = Server()
    herd = [server.login("service", RIGHT) for _ in range(3 * WAITING_OF_ONE)]
    assert await server.waiting(herd) == len(herd)
    checks.let_go.set()
    assert all(await asyncio.gather(*herd))
    assert checks.of == ["service"]


async def test_who_leaves_while_it_is_checked_for_others_leaves_the_check_to_them(checks: Checks) -> None:
    server = Server()
    busy = server.login("other", RIGHT)
    assert await server.waiting([busy]) == 1
    first, second = server.login("service", RIGHT), server.login("service", RIGHT)
    assert await server.waiting([first, second]) == 2
    first.cancel()
    checks.let_go.set()
    assert await second
    assert await busy


async def test_who_leaves_in_the_moment_of_its_turn_stops_nobody(checks: Checks) -> None:
    server = Server()
    busy, leaver = server.login("busy", RIGHT), None
    assert await server.waiting([busy]) == 1
    leaver, last = server.login("leaver", RIGHT), server.login("last", RIGHT)
    assert await server.waiting([leaver, last]) == 2
    leaver.cancel()
    server.logins._next()  # the check before it ends in the same turn of the loop
    checks.let_go.set()
    assert await last
    assert await busy
    assert await server.login("later", RIGHT)
