"""How fast units really leave the decoders while all of these are busy. Pure.

A unit's own times, which the decoder reports, leave out what carries it there and back: messages
between processes, copies, cores that are shared. On two cores a fetch of `exact` chunks took twice
what those times add up to (bench_fetch). While every decoder has work, the time from one unit's end
to the next one's holds all of that.
"""

from __future__ import annotations

from typing import NamedTuple

# Ends come in bursts, so single intervals say little; so many units for each decoder are taken
# together.
_UNITS_PER_DECODER = 2


class Stretch(NamedTuple):
    """A stretch in which all decoders were busy."""

    predicted_seconds: float
    """What the units of the stretch should have taken."""
    actual_seconds: float
    """What they took."""


class DecodeThroughput:
    """Watches units come and go. Not thread-safe.

    Args:
        num_decoders: units that are decoded side by side.
    """

    def __init__(self, num_decoders: int) -> None:
        self._num_decoders = num_decoders
        self._num_inside = 0
        self._since: float | None = None
        """The end from which all decoders have had work without a gap; None = there was one."""
        self._num_units = 0
        self._predicted_seconds = 0.0

    def begin(self) -> None:
        """A unit goes to the decoders."""
        self._num_inside += 1

    def drop(self) -> None:
        """A unit came back without having been decoded: the stretch says nothing."""
        self._num_inside -= 1
        self._restart(None)

    def end(self, decode_seconds: float, now: float) -> Stretch | None:
        """A unit is done.

        Args:
            decode_seconds: decode time of one decoder, as predicted for it.
            now: seconds, monotonic.

        Returns:
            A stretch that this unit completes; None where there is none to tell of.
        """
        self._num_inside -= 1
        found = None
        if self._since is not None:
            self._num_units += 1
            self._predicted_seconds += decode_seconds / self._num_decoders
            if self._num_units >= _UNITS_PER_DECODER * self._num_decoders:
                found = Stretch(self._predicted_seconds, now - self._since)
        is_busy = self._num_inside >= self._num_decoders
        if found is not None or self._since is None or not is_busy:
            self._restart(now if is_busy else None)
        return found

    @property
    def is_saturated(self) -> bool:
        """Whether a stretch is under way: single units' times need not be asked then."""
        return self._since is not None

    def _restart(self, since: float | None) -> None:
        self._since = since
        self._num_units = 0
        self._predicted_seconds = 0.0
