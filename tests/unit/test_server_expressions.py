"""Regular expressions of filters: what they find, which engine finds it, and that none takes for ever."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("esdbclient", reason="pip install 'tidings[eventstoredb]'")

from tidings.server import expressions
from tidings.server.dialect import for_re
from tidings.server.expressions import LONGEST, LOOKED_AT_BY_RE, STEPS, Expression
from tidings.server.wire import Malformed

FOUND = [
    ("b|^c$", "abc", True),
    ("^b|^c$", "abc", False),
    (r"^(?!(\$.+$|PersistentConfig\d+$))", "order-1", True),
    (r"^(?!(\$.+$|PersistentConfig\d+$))", "$order", False),
    (r"^(?!(\$.+$|PersistentConfig\d+$))", "PersistentConfig7", False),
    (r"^(?!(?:tidings_|\$))(?:order|stock)", "order-1", True),
    (r"^(?!(?:tidings_|\$))(?:order|stock)", "tidings_order", False),
    (r"^(?!(?:tidings_|\$))(?:order|stock)", "shipping", False),
    (r"^(?!a)(?=.b)", "xb", True),
    (r"^(?!a)(?=.b)", "xa", False),
    (r"^(?![()|\]])x", "x|", True),
    (r"^Order.*Placed$", "OrderWasPlaced", True),
]


@pytest.fixture(params=["google-re2", "re"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each of the two engines; where google-re2 is not installed, only Python's."""
    if request.param == "re":
        monkeypatch.setattr(expressions, "_RE2", None)
    else:
        pytest.importorskip("re2", reason="pip install 'tidings[server]'")
    expressions._compiled.cache_clear()
    yield request.param
    expressions._compiled.cache_clear()


@pytest.mark.parametrize(("pattern", "name", "found"), FOUND)
def test_what_clients_build_is_found_by_either_engine(engine: str, pattern: str, name: str, found: bool) -> None:
    assert expressions.engine() == engine
    assert Expression(pattern).search(name) is found
    assert (re.search(pattern, name) is not None) is found


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|a)*$", r"(a|aa)+$", r"(\w+\s?)*$", r"(.*)*x", r".*.*.*=.*"])
def test_an_expression_that_would_backtrack_for_ever_ends(engine: str, pattern: str) -> None:
    """pytest's timeout ends one that does not."""
    if engine == "google-re2":
        Expression(pattern).search("a" * 100_000 + "!")
    else:
        with pytest.raises(Malformed, match="install google-re2"):
            Expression(pattern)


@pytest.mark.parametrize("pattern", [r"(a)\1", r"(a+)+(?!b)\1$", "(a|a)" * 20 + r"\1"])
def test_what_only_a_backtracking_engine_knows_is_refused(engine: str, pattern: str) -> None:
    says = "google-re2 does not run" if engine == "google-re2" else "not run"
    with pytest.raises(Malformed, match=says):
        Expression(pattern)


def test_what_google_re2_refuses_does_not_run_on_an_engine_that_backtracks() -> None:
    pytest.importorskip("re2", reason="pip install 'tidings[server]'")
    for pattern in (r"^(?!a)b|c", r"b(?=a)", r"(?<=a)b", r"(a)\1"):
        with pytest.raises(Malformed, match=r"google-re2 does not run.*look-aheads only"):
            Expression(pattern)


PIECES = ["a", "aa", ".", "[ab]", "a?", "(a|a)", "(?:a|aa)", "a*", ".*", "a+", "$", "a{3}", "(?=a)", r"(?:\$.+|b)"]


@given(st.booleans(), st.lists(st.sampled_from(PIECES), min_size=1, max_size=12))
def test_what_python_runs_is_searched_in_a_bounded_number_of_steps(anchored: bool, parts: list[str]) -> None:
    """The steps that are counted are no fewer than the ways in which an engine that backtracks can fail."""
    pattern = f"{'^' if anchored else ''}{''.join(parts)}X"
    repetitions = sum(part in ("a*", ".*", "a+") for part in parts)
    inner = sum(part.startswith(r"(?:\$") for part in parts)
    doubled = sum(part in ("a?", "(a|a)", "(?:a|aa)") for part in parts)
    steps = expressions._steps(importlib.import_module("re._parser").parse(pattern))
    if steps <= STEPS:
        assert repetitions + inner <= 1
        assert 2**doubled * (1 if anchored else LOOKED_AT_BY_RE) <= STEPS
        assert anchored or not repetitions
        re.compile(pattern).search("a" * LOOKED_AT_BY_RE)


def test_pythons_engine_takes_what_is_usual_and_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "_RE2", None)
    expressions._compiled.cache_clear()
    for usual in (
        "^order-",
        "^(order|stock)-",
        "^Order.*Placed$",
        "Placed$",
        r"^(?!(\$.+$|PersistentConfig\d+$))",
        "^^x.*$",
    ):
        Expression(usual)
    for costly in ("a*b", "(?:a?){30}a", "a?" * 30, "^" + "a?" * 30 + "X", "^.*" + "a" * 500, "^a*a*b"):
        with pytest.raises(Malformed, match="install google-re2"):
            Expression(costly)
    expressions._compiled.cache_clear()


@pytest.mark.parametrize("pattern", ["(", "[a", "a{2,1}", "*", "x" * (LONGEST + 1), r"\p{Nonsense}"])
def test_what_cannot_be_read_is_refused(engine: str, pattern: str) -> None:
    with pytest.raises(Malformed):
        Expression(pattern)


def test_letters_of_any_script_and_the_end_of_a_name_as_net_writes_them() -> None:
    pytest.importorskip("re2", reason="pip install 'tidings[server]'")
    assert Expression(r"^(?<first>\p{L}+)-\d+\z").search("größe-12")
    assert not Expression(r"^\p{L}+\z").search("a-1")


NET = [
    (r"^\w+$", "größe", True),
    (r"^\w+$", "größe-1", False),
    (r"^\W$", "é", False),
    (r"^\d+$", "٣٤", True),  # Arabic digits
    (r"^[\w-]+$", "größe-1", True),
    (r"^[^\w]+$", "größe", False),
    (r"^\S+$", "a\u2003b", False),
    (r"^\s$", "\u2003", True),
    (r"^(?<kind>größe)-\d+\z", "größe-12", True),
    (r"^(?'kind'\w+)-", "größe-12", True),
    (r"a\Z", "ba", True),
    (r"a\Z", "a\n", True),
    (r"a\Z", "ab", False),
    (r"a\z", "a\n", False),
    (r"^\u00e9$", "é", True),
    (r"^\\u00e9$", r"\u00e9", True),
    (r"^[\u00e0-\u00ff]$", "é", True),
    (r"^[[:a]+$", "a[:", True),
    (r"^[]a]+$", "a]", True),
    (r"^[^]a]+$", "b", True),
    (r"^[\]a]+$", "a]", True),
]


@pytest.mark.parametrize(("pattern", "name", "found"), NET)
def test_what_net_reads_in_another_way_is_read_as_net_does(
    engine: str, pattern: str, name: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expressions, "STEPS", 1 << 30)  # what they find is asked here, not what they cost
    assert Expression(pattern).search(name) is found


@pytest.mark.parametrize("pattern", ["[a-z-[aeiou]]", r"^(?'kind"])
def test_what_an_engine_would_read_as_something_else_is_refused(engine: str, pattern: str) -> None:
    with pytest.raises(Malformed):
        Expression(pattern)


def test_what_is_no_letter_within_a_set_is_refused_where_it_cannot_be_said() -> None:
    pytest.importorskip("re2", reason="pip install 'tidings[server]'")
    with pytest.raises(Malformed, match=r"\\W within \[ \]"):
        Expression(r"[\W_]")


@given(st.text("ab[]^-\\()?<>'|.*", max_size=12))
def test_what_python_reads_as_net_does_stays_as_it_is(text: str) -> None:
    """Only a bracket within a set is written in another way. It means the same."""
    try:
        with warnings.catch_warnings(action="ignore"):  # Python may read "[[" as something else some day
            expected = re.compile(text)
            told = re.compile(for_re(text))
    except (re.error, Malformed, OverflowError):
        return
    for name in ("", "a", "b", "[", "ab[", "]a", "a^", "-", "b|a"):
        assert (told.search(name) is not None) == (expected.search(name) is not None)


pieces = st.recursive(
    st.sampled_from(["a", "b", r"\$", "[ab]", "[^a]", ".", r"\d"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        inner.map(lambda part: f"({part})?"),
        st.sampled_from(["a*", "[ab]+", "b?", ".*"]),
    ),
    max_leaves=6,
)
names = st.text("ab$1-", max_size=8)


@given(st.tuples(st.booleans(), pieces, pieces), names)
def test_a_look_ahead_at_the_beginning_means_what_it_says(parts: tuple[bool, str, str], name: str) -> None:
    pytest.importorskip("re2", reason="pip install 'tidings[server]'")
    negative, ahead, rest = parts
    pattern = f"^(?{'!' if negative else '='}{ahead}){rest}"
    assert Expression(pattern).search(name) == (re.search(pattern, name) is not None)


def test_the_server_starts_without_google_re2() -> None:
    program = (
        "import sys; sys.modules['re2'] = None\n"
        "from tidings.server.expressions import Expression, engine\n"
        "print(engine(), Expression('^order-').search('order-1'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["re", "True"]
