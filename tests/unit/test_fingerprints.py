"""A handler's fingerprint: the same in every process, another one when its code or what it calls changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

APP = """
import math, os, time
from functools import partial, wraps
from helping import helper
LIMIT = 5
STARTED, PROCESS = time.time(), os.getpid()
def made(process):
    def inner(event): return process
    return inner
inner = made(os.getpid())
class Base:
    def go(self): return 1
class Mine(Base):
    def go(self): return super().go() + helper(1)
def near(x):
    return x if x in {"a", "b", "c", "d"} else math.sqrt(LIMIT)
def loud(function):
    @wraps(function)
    async def wrapped(event): return await function(event)
    return wrapped
async def plain(event):
    return near(event)
async def far(event):
    return Mine().go()
@loud
async def decorated(event):
    return near(event)
class Callable:
    async def __call__(self, event): return near(event)
given = Callable()
bound = Callable().__call__
part = partial(plain)
def apart(event): return 0 if STARTED else PROCESS
def endless(event): return endless(event)
"""
HELPING = "import json\ndef helper(x): return json.dumps(x)\n"
NAMES = ("plain", "far", "decorated", "given", "bound", "part", "apart", "endless", "inner")


def fingerprints(folder: Path, app: str = APP, helping: str = HELPING, seed: str = "1") -> dict[str, str]:
    """Return the fingerprints that another process computes."""
    folder.mkdir(exist_ok=True)
    (folder / "app.py").write_text(app)
    (folder / "helping.py").write_text(helping)
    named = ", ".join(f"app.{name}" for name in NAMES)
    code = f"import app; from tidings.modelling.fingerprints import fingerprint; print(*map(fingerprint, [{named}]))"
    environment = {"PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return dict(zip(NAMES, done.stdout.split(), strict=True))


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return fingerprints(tmp_path_factory.mktemp("before"))


def test_it_is_the_same_in_every_process_and_folder_and_below_a_comment(before: dict[str, str], tmp_path: Path) -> None:
    assert fingerprints(tmp_path, "# a comment" + APP, seed="7") == before


@pytest.mark.parametrize(
    ("was", "now", "changed"),
    [
        ("return near(event)", "return near(event) or 1", {"plain", "decorated", "given", "bound", "part"}),
        ("LIMIT = 5", "LIMIT = 6", {"plain", "decorated", "given", "bound", "part"}),
        ('"d"}', '"e"}', {"plain", "decorated", "given", "bound", "part"}),
        ("math.sqrt", "math.log", {"plain", "decorated", "given", "bound", "part"}),
        ("def go(self): return 1", "def go(self): return 2", {"far"}),
        ("helper(1)", "helper(2)", {"far"}),
        ("return await function(event)", "return None", {"decorated"}),
        ("return 0 if", "return 0.5 if", {"apart"}),
    ],
)
def test_what_a_change_reaches_has_another_one_and_the_rest_has_not(
    before: dict[str, str], tmp_path: Path, was: str, now: str, changed: set[str]
) -> None:
    after = fingerprints(tmp_path, APP.replace(was, now))
    assert {name for name in NAMES if after[name] != before[name]} == changed


def test_a_module_beside_it_counts(before: dict[str, str], tmp_path: Path) -> None:
    after = fingerprints(tmp_path, helping=HELPING.replace("dumps", "loads"))
    assert {name for name in NAMES if after[name] != before[name]} == {"far"}


def test_a_new_version_of_the_package_counts_everywhere(before: dict[str, str], tmp_path: Path) -> None:
    after = fingerprints(tmp_path, APP + "\n__version__ = '2.0'\n")
    assert {name for name in NAMES if after[name] != before[name]} == set(NAMES)


VIEWS = """
from __future__ import annotations
from typing import Literal
from pydantic import BaseModel, Field, field_validator
from tidings import Event, upcaster
class Line(BaseModel):
    sku: str
class Placed(Event, version=2, key="order_id"):
    order_id: str
    lines: tuple[Line, ...] = ()
    kind: Literal["a", "b"] = Field("a", description="x")
    @staticmethod
    @upcaster(1)
    def step(data): return data
    @field_validator("kind")
    @classmethod
    def check(cls, kind): return kind
async def handle(event: Placed) -> None: pass
"""


def fingerprint_of_view(folder: Path, views: str, seed: str = "1") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "views.py").write_text(views)
    shown = "fingerprint(views.handle, (views.Placed,))"
    code = f"import views; from tidings.modelling.fingerprints import fingerprint; print({shown})"
    environment = {"PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_how_an_event_is_declared_counts_because_a_new_view_may_read_what_the_old_one_could_not(tmp_path: Path) -> None:
    before = fingerprint_of_view(tmp_path / "before", VIEWS)
    assert fingerprint_of_view(tmp_path / "same", "# a comment" + VIEWS, seed="7") == before
    for number, (was, now) in enumerate(
        [
            ("order_id: str", "order_id: int"),
            ("sku: str", "sku: int"),
            ('"b"]', '"c"]'),
            ("version=2", "version=2, oldest=2"),
            (', key="order_id"', ""),
            ("step(data): return data", "step(data): return {}"),
            ("check(cls, kind): return kind", "check(cls, kind): return 'b'"),
        ]
    ):
        assert was in VIEWS
        assert fingerprint_of_view(tmp_path / str(number), VIEWS.replace(was, now)) != before, now
