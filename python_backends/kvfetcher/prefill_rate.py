"""How long an engine computes a prompt: learnt from its prefill slices. Pure, standard library.

Attention reads all tokens before it, so a token costs more the later it stands: seconds per token
are ``base + slope * position``. Computing the tail of a prompt is dearer than its head.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

_MAX_SLICES = 128
_ROUNDS = 4
# Slices further off than so many times the median error count less (Huber's rule): another
# request's work or a page fault is in them.
_TOLERANCE = 1.5


@dataclass(frozen=True, slots=True)
class PrefillModel:
    """Time to compute tokens, by their position."""

    base_seconds: float
    """Seconds for one token at position 0; above 0."""
    slope_seconds: float
    """More per token and position; at least 0."""
    num_slices: int = 0
    """Slices that it was learnt from; 0 = assumed."""

    def __post_init__(self) -> None:
        if not (self.base_seconds > 0 and self.slope_seconds >= 0):
            raise ValueError(f"prefill takes base > 0 and slope >= 0 seconds, got {self}")

    def seconds(self, start: int, stop: int) -> float:
        """To compute the tokens at positions [start, stop), all before `start` being there."""
        if stop <= start:
            return 0.0
        middle = (start + stop - 1) / 2
        return (stop - start) * (self.base_seconds + self.slope_seconds * middle)


class PrefillEstimator:
    """Learns a `PrefillModel` from slices as they run. Not thread-safe."""

    def __init__(self, *, prior_tokens_per_second: float) -> None:
        """An estimator that has seen nothing; the prior is the rate at position 0."""
        self._prior = PrefillModel(1.0 / prior_tokens_per_second, 0.0)
        self._slices: deque[tuple[float, float, float]] = deque(maxlen=_MAX_SLICES)

    def observe(self, start: int, num_tokens: int, seconds: float) -> None:
        """Learn how long a slice of `num_tokens` took, from position `start` on."""
        if num_tokens > 0 and seconds > 0:
            middle = start + (num_tokens - 1) / 2
            self._slices.append((middle, seconds / num_tokens, float(num_tokens)))

    def model(self) -> PrefillModel:
        """The best fit so far; the prior where nothing was seen."""
        if not self._slices:
            return self._prior
        points = list(self._slices)
        weights = [tokens for *_, tokens in points]
        base, slope = _fit(points, weights)
        for _ in range(_ROUNDS):
            errors = [abs(cost - base - slope * middle) for middle, cost, _ in points]
            scale = _TOLERANCE * sorted(errors)[len(errors) // 2]
            weights = [
                tokens * (1.0 if error <= scale else scale / error)
                for error, (*_, tokens) in zip(errors, points, strict=True)
            ]
            base, slope = _fit(points, weights)
        return PrefillModel(base, slope, len(points))


def _fit(points: list[tuple[float, float, float]], weights: list[float]) -> tuple[float, float]:
    """(base, slope) of the weighted least-squares line, kept to base > 0 and slope >= 0."""
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y, _) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _, _) in zip(weights, points, strict=True))
    if spread <= 1e-12 * total * max(mean_x, 1.0) ** 2:
        return mean_y, 0.0  # all at one position
    slope = (
        sum(w * (x - mean_x) * (y - mean_y) for w, (x, y, _) in zip(weights, points, strict=True))
        / spread
    )
    if slope <= 0:
        return mean_y, 0.0
    base = mean_y - slope * mean_x
    if base <= 0:  # through the origin: the base is kept at a token's cost one position in
        slope = mean_y / (mean_x + 1)
        return slope, slope
    return base, slope
