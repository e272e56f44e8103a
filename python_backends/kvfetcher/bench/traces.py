"""Bandwidth over time, for the simulator: constant, steps, jitter, stalls. Pure and seeded."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

GBIT = 1e9 / 8
"""Bytes per second of one Gbit/s."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A link's rate, piece by piece, repeated for ever."""

    name: str
    family: str
    """``constant``, ``steps``, ``jitter`` or ``stalls``."""
    pieces: tuple[tuple[float, float], ...]
    """(seconds, bytes per second); a rate may be 0."""
    ends: tuple[float, ...]

    def at(self, seconds: float) -> tuple[float, float]:
        """(bytes per second, seconds until that changes) at a time."""
        period = self.ends[-1]
        phase = seconds % period
        index = min(bisect_right(self.ends, phase), len(self.pieces) - 1)
        # A rounded phase at a piece's very end must not stop the clock.
        return self.pieces[index][1], max(self.ends[index] - phase, 1e-9)

    def seconds_for(self, num_bytes: float, *, start: float) -> float:
        """Seconds to carry `num_bytes` from `start` on, with nothing else on the link."""
        now = start
        while True:
            rate, seconds = self.at(now)
            if rate * seconds >= num_bytes:
                return now + num_bytes / rate - start
            num_bytes -= rate * seconds
            now += seconds

    @property
    def mean_bytes_per_second(self) -> float:
        return sum(s * rate for s, rate in self.pieces) / self.ends[-1]


def make_trace(name: str, family: str, pieces: list[tuple[float, float]]) -> Trace:
    """A trace of (seconds, Gbit/s) pieces."""
    scaled = tuple((seconds, rate * GBIT) for seconds, rate in pieces)
    return Trace(name, family, scaled, tuple(accumulate(seconds for seconds, _ in scaled)))


def all_traces(*, seeds: int, first_seed: int = 0) -> list[Trace]:
    """The benchmark's traces.

    Args:
        seeds: of each shape of jitter.
        first_seed: the first of them; the others follow.
    """
    traces = [
        make_trace(f"constant {rate:g} Gbit/s", "constant", [(1.0, rate)])
        for rate in (1, 2, 4, 8, 16, 40)
    ]
    traces += [
        make_trace("steps 16-2 Gbit/s", "steps", [(0.4, 16), (0.4, 2)]),
        make_trace("steps 2-8-32-8 Gbit/s", "steps", [(0.2, 2), (0.2, 8), (0.2, 32), (0.2, 8)]),
        make_trace("one step 40 to 4 Gbit/s", "steps", [(0.15, 40), (7.22, 4)]),
        make_trace("one step 4 to 40 Gbit/s", "steps", [(0.15, 4), (7.22, 40)]),
        make_trace("stalls, 16 Gbit/s", "stalls", [(0.5, 16), (0.2, 0)]),
        make_trace("short stalls, 8 Gbit/s", "stalls", [(0.1, 8), (0.03, 0)]),
    ]
    for seed in range(first_seed, first_seed + seeds):
        traces += [
            lognormal_jitter(16, sigma=0.8, dwell_seconds=0.02, seed=seed),
            lognormal_jitter(16, sigma=0.8, dwell_seconds=0.2, seed=seed),
            lognormal_jitter(8, sigma=0.8, dwell_seconds=0.05, seed=seed),
            uniform_jitter(1, 40, dwell_seconds=0.1, seed=seed),
            on_off_jitter(24, 2, mean_seconds=0.1, seed=seed),
        ]
    return traces


def lognormal_jitter(mean: float, *, sigma: float, dwell_seconds: float, seed: int) -> Trace:
    """Rates whose logarithm wanders around (correlation 0.7), clipped to 1 to 40 Gbit/s."""
    rng = random.Random(f"lognormal {mean} {sigma} {dwell_seconds} {seed}")
    level, pieces = 0.0, []
    for _ in range(400):
        level = 0.7 * level + math.sqrt(1 - 0.7**2) * rng.gauss(0, 1)
        rate = mean * math.exp(sigma * level - sigma**2 / 2)
        pieces.append((dwell_seconds, min(max(rate, 1.0), 40.0)))
    name = f"jitter lognormal {mean:g} Gbit/s, {1e3 * dwell_seconds:g} ms, seed {seed}"
    return make_trace(name, "jitter", pieces)


def uniform_jitter(low: float, high: float, *, dwell_seconds: float, seed: int) -> Trace:
    """Rates drawn anew from a range."""
    rng = random.Random(f"uniform {low} {high} {dwell_seconds} {seed}")
    pieces = [(dwell_seconds, rng.uniform(low, high)) for _ in range(400)]
    return make_trace(
        f"jitter uniform {low:g}-{high:g} Gbit/s, {1e3 * dwell_seconds:g} ms, seed {seed}",
        "jitter",
        pieces,
    )


def on_off_jitter(high: float, low: float, *, mean_seconds: float, seed: int) -> Trace:
    """Two rates in turn for exponentially distributed times: a neighbour that comes and goes."""
    rng = random.Random(f"on-off {high} {low} {mean_seconds} {seed}")
    pieces = [(rng.expovariate(1 / mean_seconds), high if i % 2 == 0 else low) for i in range(400)]
    return make_trace(
        f"jitter on-off {high:g}/{low:g} Gbit/s, {1e3 * mean_seconds:g} ms, seed {seed}",
        "jitter",
        pieces,
    )
