"""URLs that may be shown: without their secrets.

Internal: settings, logs and errors use it.
"""

from __future__ import annotations

from tidings._support.masking import redact

__all__ = ["redact"]
