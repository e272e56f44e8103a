"""When to leave a failing store alone: a circuit breaker. No clock, no I/O: time is passed in.

``closed``: calls pass. Once at least half of the last `window` calls failed, and at least
`min_failures` of them: ``open``, nothing passes until a back-off is over. Then ``half-open``: one
call passes as a probe and decides alone. Its success closes the breaker; its failure opens it again
for about twice as long. Back-offs are jittered, so that many servers do not come back at once.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

BreakerState = Literal["closed", "open", "half-open"]


class Breaker:
    """State of one store. Not thread-safe.

    Args:
        window: number of finished calls that are remembered.
        min_failures: fewer failures in the window never open it, >= 1.
        min_backoff_seconds: first back-off; doubled after each failed probe.
        max_backoff_seconds: no back-off is longer.
        random: uniform in [0, 1); a back-off is 0.5 to 1 times its nominal length.
    """

    def __init__(
        self,
        *,
        window: int,
        min_failures: int,
        min_backoff_seconds: float,
        max_backoff_seconds: float,
        random: Callable[[], float],
    ) -> None:
        self._recent: deque[bool] = deque(maxlen=window)
        self._min_failures = min_failures
        self._min_backoff_seconds = min_backoff_seconds
        self._max_backoff_seconds = max_backoff_seconds
        self._random = random
        self._backoff_seconds = min_backoff_seconds
        self._retry_at = 0.0
        self._state: BreakerState = "closed"
        self._probe_is_out = False
        # Counts changes of state: a call from before one says nothing of the state after it.
        self._epoch = 0

    @property
    def state(self) -> BreakerState:
        return self._state

    def wait_seconds(self, now: float) -> float:
        """How long no call passes from now on; 0 = one may pass, or only a probe is out."""
        return max(0.0, self._retry_at - now) if self._state == "open" else 0.0

    def admit(self, now: float) -> int | None:
        """Ask for one call.

        Returns:
            A ticket that obliges to `succeeded`, `failed` or `abandoned`; None = do not call.
        """
        if self._state == "open" and now >= self._retry_at:
            self._enter("half-open")
        if self._state == "closed":
            return self._epoch
        if self._state == "half-open" and not self._probe_is_out:
            self._probe_is_out = True
            return self._epoch
        return None

    def succeeded(self, ticket: int) -> None:
        """The call was answered (that there is no such object is an answer)."""
        if ticket != self._epoch:
            return
        if self._state == "half-open":
            self._backoff_seconds = self._min_backoff_seconds
            self._recent.clear()
            self._enter("closed")
        self._recent.append(True)

    def failed(self, ticket: int, now: float) -> None:
        """The call was not answered."""
        if ticket != self._epoch:
            return
        if self._state == "half-open":
            self._backoff_seconds = min(2 * self._backoff_seconds, self._max_backoff_seconds)
            self._open(now)
            return
        self._recent.append(False)
        failures = self._recent.count(False)
        if failures >= self._min_failures and 2 * failures >= len(self._recent):
            self._open(now)

    def abandoned(self, ticket: int) -> None:
        """The call was given up without a verdict; where it was the probe, the next call is."""
        if ticket == self._epoch:
            self._probe_is_out = False

    def _open(self, now: float) -> None:
        self._retry_at = now + self._backoff_seconds * (0.5 + 0.5 * self._random())
        self._enter("open")

    def _enter(self, state: BreakerState) -> None:
        self._state = state
        self._probe_is_out = False
        self._epoch += 1
