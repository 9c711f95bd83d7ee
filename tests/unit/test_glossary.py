"""Every word of the glossary is in use, and the words that it replaces are not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"
PAGES = [
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if page != GLOSSARY
]
ENTRIES = re.findall(
    r"^\* \*\*(.+?)\*\*: (.+?)(?=^\* |^#|\Z)", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
TERMS = [term for term, _ in ENTRIES]
FORBIDDEN = [
    (term, word)
    for term, entry in ENTRIES
    for never in re.findall(r"Never: (.+)", entry, re.DOTALL)
    for word in re.findall(r'"([^"]+)"', " ".join(never.split()))
]


def prose(text: str) -> str:
    """The text without code: what is quoted there is somebody's name, not a choice of words."""
    return " ".join(re.sub(r"```.*?```|`[^`]*`", " ", text, flags=re.DOTALL).split())


def occurs(word: str, text: str) -> re.Match[str] | None:
    return re.search(rf"\b{re.escape(word)}(?:s|es)?\b", text, re.IGNORECASE)


EVERYTHING = " ".join(
    " ".join(path.read_text(encoding="utf-8").split()) for path in (*PAGES, *sorted((ROOT / "framework").rglob("*.py")))
)


def test_the_glossary_is_read_as_it_is_written() -> None:
    assert {"stream", "watermark", "dead letter", "partition key", "verify"} <= set(TERMS)
    assert {("partition key", "message key"), ("stream", "topic")} <= set(FORBIDDEN)
    assert len(set(TERMS)) == len(TERMS), "a word has one line"
    assert not set(TERMS) & {word for _, word in FORBIDDEN}


@pytest.mark.parametrize("term", TERMS)
def test_every_word_of_the_glossary_is_in_use(term: str) -> None:
    assert occurs(term, EVERYTHING), f"{term!r} is used nowhere: take it out of docs/glossary.md"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_no_page_uses_a_word_that_the_glossary_replaces(page: Path) -> None:
    text = prose(page.read_text(encoding="utf-8"))
    for term, word in FORBIDDEN:
        if found := occurs(word, text):
            context = text[max(0, found.start() - 40) : found.end() + 40]
            raise AssertionError(f"{page.name} says {word!r} for {term!r}: ...{context}...")
