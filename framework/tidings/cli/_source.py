"""Finds where this Tidings was installed from, so that pip can install it from there again."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

__all__ = ["source", "source_of"]


def source() -> str | None:
    """Return arguments for pip; None if it came from an index, or is no longer where it was."""
    try:
        text = distribution("tidings").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return None if text is None else source_of(text)


def source_of(text: str) -> str | None:
    """Return arguments for pip from the text of a `direct_url.json`, which installers write (PEP 610); else None."""
    try:
        found: Any = json.loads(text)
        url = str(found["url"])
        version_control = found.get("vcs_info")
        editable = bool(found.get("dir_info", {}).get("editable"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    parts = urlsplit(url)
    if version_control is not None:
        wanted = f"tidings @ {version_control.get('vcs', 'git')}+{url}@{version_control.get('commit_id', 'HEAD')}"
    elif parts.scheme == "file":
        wanted = url2pathname(parts.path)
        if not Path(wanted).exists():
            return None
    else:
        wanted = f"tidings @ {url}"
    if any(character in wanted for character in "'\n\r"):
        return None
    return f"{'--editable ' if editable else ''}'{wanted}'"
