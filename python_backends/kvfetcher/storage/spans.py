"""Which kept parts of an object hold the bytes of a read: plain arithmetic, no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection

UNBOUNDED = 1 << 62
"""An `end` that no object reaches: a read up to wherever the object ends."""


class Span(NamedTuple):
    """Bytes ``[start, stop)`` of an object; `is_last` where the object ends at `stop`."""

    start: int
    stop: int
    is_last: bool

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def span_of_answer(start: int, end: int, num_bytes: int) -> Span:
    """The span that a store's answer to a read of ``[start, end)`` is."""
    return Span(start, start + num_bytes, is_last=num_bytes < end - start)


def cover(spans: Collection[Span], start: int, end: int) -> list[Span] | None:
    """The fewest of `spans` that together answer a read of ``[start, end)``, in order.

    Returns:
        Spans, each of which begins at or before the place where the one before it stops; none of
        them for a read behind the object's end. None where a byte of the answer is missing, or
        where nothing tells whether the object ends.
    """
    size = next((span.stop for span in spans if span.is_last), None)
    if size is not None:
        end = min(end, size)
    chosen: list[Span] = []
    at = start
    while at < end:
        reaching = [span for span in spans if span.start <= at < span.stop]
        if not reaching:
            return None
        chosen.append(max(reaching, key=lambda span: span.stop))
        at = chosen[-1].stop
    return chosen


def join(parts: list[tuple[Span, bytes]], start: int, end: int) -> bytes:
    """The bytes ``[start, end)`` out of the covering `parts` (`cover`'s spans with their bytes)."""
    pieces = []
    at = start
    for span, data in parts:
        stop = min(span.stop, end)
        pieces.append(memoryview(data)[at - span.start : stop - span.start])
        at = stop
    return pieces[0].tobytes() if len(pieces) == 1 else b"".join(pieces)
