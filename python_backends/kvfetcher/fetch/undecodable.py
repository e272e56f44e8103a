"""Chunks that came whole and yet did not decode here, passed over for a while. Pure.

They are not set aside as corrupt ones are: their digests are right, so that what is wrong may be
this host (a decoder, a kernel, an older build), and a store is shared by many. What one process
remembers for some minutes takes no good chunk from anybody, and costs each process two tries in that
time instead of one per request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvfetcher.errors import CodecError, DecoderUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

# One failure may be a decoder's that was lost at that moment.
_FAILURES = 2
# Pause until another try: the decoder may have been replaced, or the build mended.
_PASS_OVER_SECONDS = 600.0
# The oldest goes first: a host on which nothing decodes would remember all that it is asked for.
_MAX_REMEMBERED = 4096


class Undecodable:
    """Counts failures in a row by chunk. Not thread-safe.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: dict[str, tuple[int, float]] = {}

    def note(self, name: str, exc: BaseException) -> None:
        """A chunk failed; only what its own bytes may have caused counts.

        A decoder that is not there, a full arena or a lost GPU says nothing of the chunk.
        """
        if not isinstance(exc, CodecError) or isinstance(exc, DecoderUnavailableError):
            return
        number, _ = self._failures.pop(name, (0, 0.0))
        self._failures[name] = number + 1, self._clock()
        if len(self._failures) > _MAX_REMEMBERED:
            del self._failures[next(iter(self._failures))]

    def forget(self, name: str) -> None:
        """A chunk was restored."""
        self._failures.pop(name, None)

    def is_passed_over(self, name: str) -> bool:
        """Whether a chunk had better be computed, as if the store did not hold it."""
        number, at = self._failures.get(name, (0, 0.0))
        if number and self._clock() - at > _PASS_OVER_SECONDS:
            self.forget(name)
            return False
        return number >= _FAILURES
