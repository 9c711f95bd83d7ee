"""JSON that strangers wrote, looked at before it is parsed: how deep it nests, and whether it is JSON. Knows no events.

Parsing gives texts, numbers, lists and dictionaries and nothing else: no document names a class, a file or a query.
"""

from __future__ import annotations

import json
from array import array
from itertools import accumulate
from math import isinf
from typing import Any, Final

__all__ = ["DEPTH", "check", "parse"]

DEPTH: Final = 200
"""Brackets open at once; pydantic's parser takes no more either, so that all that read a document agree about it."""

_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[{]}"))


def check(document: bytes) -> None:
    """Raises `ValueError` for what nests over `DEPTH`, and for numbers that Python would read, and JSON does not have.

    That it says nothing does not make a document JSON: the parser decides.
    """
    # Single bytes first: looking for a word in each event's data would take longer than all the rest here.
    constants = (b"N" in document and b"NaN" in document) or (b"I" in document and b"Infinity" in document)
    if not constants and (len(document) <= DEPTH or document.count(b"[") + document.count(b"{") <= DEPTH):
        return
    # What is between texts. No pattern: one that can fail at the end of a long text can be made to take minutes.
    bare = b"".join(document.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    if constants and (b"NaN" in bare or b"Infinity" in bare):
        raise ValueError("it has NaN or Infinity, which JSON does not have")
    steps = array("b", bare.translate(_STEPS, _NO_BRACKETS))
    if max(accumulate(steps), default=0) > DEPTH:
        raise ValueError(f"it nests more than {DEPTH} lists or objects into each other")


def parse(document: bytes) -> Any:
    """The value. Raises `ValueError` for what is no JSON, nests over `DEPTH`, or has a number that could not be written
    again: a float beyond 1.8e308, an integer of more digits than the interpreter takes
    (`sys.set_int_max_str_digits`)."""
    check(document)
    # What `json.loads` does, which makes a decoder for each document.
    return _DECODER.decode(document.decode(json.detect_encoding(document), "surrogatepass"))


def _finite(digits: str) -> float:
    number = float(digits)
    if isinf(number):
        raise ValueError("it has a number beyond what a float can hold")
    return number


_DECODER: Final = json.JSONDecoder(parse_float=_finite)
