"""Choosing the quantiser step of each profile by the quality that it is to have.

A rung of the ladder is a promise about the model's output, not a number: its step is the one that
brings the KL divergence, measured on texts of the calibration, to `TARGETS`. KL grows about with
the square of the step, so two or three measurements find it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.calibration.quality import Document, compare
from kvfetcher.codec.ladder.groups import from_vectors, to_vectors
from kvfetcher.codec.ladder.product import multiply
from kvfetcher.codec.ladder.rope import rotate_keys, unrotate_keys
from kvfetcher.spec import LADDER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from kvfetcher.calibration.capture import CaptureModel
    from kvfetcher.calibration.journal import Journal
    from kvfetcher.calibration.progress import Progress
    from kvfetcher.codec.ladder.artifact import Calibration

TARGETS: Mapping[str, float] = {
    "near": 7e-5,
    "balanced": 4.5e-4,
    "compact": 2.2e-3,
    "tiny": 8e-3,
}
"""KL in nats per token, on the texts that steps are chosen on, for each profile.

Set so that certificates of SmolLM2-135M stay below 1e-4, 6e-4, 2.5e-3 and 1e-2 (the tolerance of the
search is 5 %, and single texts differ by 20 %): with 8.5e-5 for `near` its certificate said 1.05e-4,
with 5.2e-4 for `balanced` 6.1e-4.
"""

_TOLERANCE = 0.05
_MAX_TRIALS = 5


def choose_steps(
    model: CaptureModel,
    calibration: Calibration,
    documents: list[Document],
    *,
    journal: Journal,
    progress: Progress,
) -> dict[str, float]:
    """Step of each profile.

    Args:
        model: the model that is calibrated.
        calibration: its bases; whatever steps it has are ignored.
        documents: prefilled texts to measure on, none of those that certificates use.
        journal: journal of the divergences.
        progress: called after each measurement.

    Returns:
        Steps with three significant digits, rising along the ladder.
    """
    trials = 0

    def measured(step: float) -> float:
        nonlocal trials
        trials += 1
        kl = journal.measured(f"KL at {step!r}", lambda: divergence(step))
        progress(f"step {step:.3g} gives KL {kl:.2e}", trials, 0)
        return float(kl)

    def divergence(step: float) -> float:
        kl = [compare(model, d, round_cache(d.values, calibration, step)).kl for d in documents]
        return float(np.mean(kl))

    known: list[tuple[float, float]] = []
    steps: dict[str, float] = {}
    for name in LADDER:
        steps[name] = _find(measured, TARGETS[name], known, _first_guess(calibration, documents))
    return steps


def _first_guess(calibration: Calibration, documents: list[Document]) -> float:
    """The step whose predicted KL is 5e-4: KL = T * values per token * step^2 / 24."""
    values = sum(d.values.size for d in documents) / len(documents)
    return math.sqrt(24 * 5e-4 / values)


def _find(
    measured: Callable[[float], float],
    target: float,
    known: list[tuple[float, float]],
    guess: float,
) -> float:
    """The step whose KL is the target's; ``known`` (step, KL) pairs are used and added to."""
    for _ in range(_MAX_TRIALS):
        if known:
            step, kl = min(known, key=lambda pair: abs(math.log(pair[1] / target)))
            if abs(math.log(kl / target)) < _TOLERANCE:
                return step
            guess = step * math.sqrt(target / kl)
        guess = float(f"{guess:.2e}")
        if guess in (step for step, _ in known):
            return guess
        known.append((guess, max(measured(guess), 1e-12)))
    return min(known, key=lambda pair: abs(math.log(pair[1] / target)))[0]


def round_cache(
    values: NDArray[np.float32], calibration: Calibration, step: float
) -> NDArray[np.float32]:
    """What coding does to a cache, without video and without rounding to a KV dtype.

    Args:
        values: [L, K, H, T, D] from position 0, keys rotated.
        calibration: bases, floor and sinks.
        step: step of the quantiser.
    """
    work = values.copy()
    unrotate_keys(work[:, 0], calibration.rope, 0)
    result = np.empty_like(work)
    grouping = calibration.grouping
    for group, (start, count) in enumerate(
        zip(grouping.layer_starts, grouping.layer_counts, strict=True)
    ):
        rank = calibration.rank_at(group, step)
        for index, heads in enumerate(grouping.head_ranges):
            matrices = calibration.matrices((group, index), rank)
            vectors = to_vectors(work[start : start + count], heads)
            vectors -= matrices.mean
            scaled = multiply(matrices.forward, vectors.T)
            scaled /= np.float32(step)
            np.rint(scaled, out=scaled)
            scaled *= np.float32(step)
            restored = multiply(scaled.T, matrices.inverse)
            restored += matrices.mean
            from_vectors(restored, result[start : start + count], heads)
    rotate_keys(result[:, 0], calibration.rope, 0)
    sinks = calibration.sink_tokens
    result[:, :, :, :sinks] = values[:, :, :, :sinks]
    return result
