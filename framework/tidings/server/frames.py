"""Where frames begin and end in what a client sends, before h2 has them whole. It keeps no bytes.

h2 keeps the bytes of a frame until it is whole, and those of a header block until its last frame has come, which may be
never: here they are counted, so that they can be charged, limited and waited for.
"""

from __future__ import annotations

from typing import Final

__all__ = ["BLOCK", "Frames"]

BLOCK: Final = 32 * 1024
"""Bytes of one header block, as it travels: what EventStoreDB's web server accepts of a request's headers."""
PREFACE: Final = 24
"""Bytes that come before the first frame (RFC 9113, section 3.4)."""
_HEAD: Final = 9
_HEADERS: Final = (0x1, 0x5, 0x9)
"""HEADERS, PUSH_PROMISE and CONTINUATION."""
_CONTINUATION: Final = 0x9
_END_HEADERS: Final = 0x4


class Frames:
    """The frames of one connection."""

    def __init__(self) -> None:
        self.unfinished = 0
        """Bytes of the frame, or of the header block, that is not whole yet."""
        self.done = 0
        """Frames and header blocks that were whole."""
        self._left = PREFACE
        """Bytes of the frame that have not come."""
        self._head = bytearray()
        self._block = 0
        """Bytes of the header block that has begun."""
        self._open = False
        """The header block goes on behind this frame."""

    def feed(self, data: bytes) -> bool:
        """Look at what came. Return whether it may go on: no header block is longer than `BLOCK`."""
        at, end = 0, len(data)
        while at < end:
            if self._left:
                step = min(self._left, end - at)
                self._left -= step
                self.unfinished += step
                at += step
            else:
                step = min(_HEAD - len(self._head), end - at)
                self._head += data[at : at + step]
                self.unfinished += step
                at += step
                if len(self._head) < _HEAD:
                    break
                if not self._begin():
                    return False
            if not self._left and not self._head and not self._open:
                self.unfinished = self._block = 0
                self.done += 1
        return True

    def _begin(self) -> bool:
        head = self._head
        self._left, kind = int.from_bytes(head[:3]), head[3]
        self._head = bytearray()
        if kind in _HEADERS:
            self._open = not head[4] & _END_HEADERS
            self._block = (self._block if kind == _CONTINUATION else 0) + _HEAD + self._left
        return self._block <= BLOCK
