"""A bound on bytes between their request and their restored values. One event loop."""

from __future__ import annotations

from kvfetcher.fetch.turns import Turns


class ByteBudget(Turns):
    """At most `max_bytes` are out at one time; one that is larger goes alone."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes

    def _fits(self, num_bytes: int) -> bool:
        return not self.used_bytes or self.used_bytes + num_bytes <= self._max_bytes
