"""Fetch or compute: how much of a stored prefix is worth fetching, and until when. Pure.

The time to the first token is the fetch of the first n chunks and then computing the rest; n is
chosen so that it is least. Computing the tail costs more per token than the head, so "all", "none"
and "the first part" can each be best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfetcher.prefill_rate import PrefillModel

Verdict = Literal["all", "part", "none", "probe", "forced", "joined"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What the gate says of one request, with the prediction it rests on; seconds from now."""

    verdict: Verdict
    """`probe`: computing is probably faster, but the link was not measured for long: the first chunk
    is fetched to learn. `forced`: the gate was bypassed. `joined`: somebody fetches the prefix
    already, nothing was asked."""
    num_chunks: int
    """Chunks to fetch, from the first; 0 = compute everything."""
    considered_chunks: int
    """`num_chunks`, or for `none` the chunks of the best fetch there could have been; 0 = nothing is
    stored."""
    predicted_fetch_seconds: float
    """Fetching the considered chunks."""
    predicted_with_fetch_seconds: float
    """Fetching the considered chunks and then computing the rest."""
    predicted_all_fetch_seconds: float
    """Fetching all stored chunks."""
    predicted_compute_seconds: float
    """Computing everything."""
    deadline_seconds: float
    """What is not restored by then is computed. inf where the gate was bypassed."""

    @property
    def predicted_seconds(self) -> float:
        """Predicted time to the first token, by what was decided."""
        if self.num_chunks:
            return self.predicted_with_fetch_seconds
        return self.predicted_compute_seconds


@dataclass(frozen=True, slots=True)
class Prompt:
    """What would have to be computed."""

    num_tokens: int
    chunk_tokens: int
    prefill: PrefillModel

    def compute_seconds(self, num_chunks: int) -> float:
        """Seconds to compute what follows the first `num_chunks` chunks."""
        return self.prefill.seconds(num_chunks * self.chunk_tokens, self.num_tokens)


def decide(
    finish_seconds: Sequence[float],
    prompt: Prompt,
    *,
    margin: float,
    optimistic_seconds: Sequence[float] = (),
    bypass: bool = False,
) -> Decision:
    """How many of the stored chunks to fetch.

    Args:
        finish_seconds: item i = from now until chunks 0 to i are restored (`finish_times`).
        prompt: the request's.
        margin: fetching must be predicted faster than computing by this part of it.
        optimistic_seconds: `finish_seconds` if the link were as fast as it may be, given only
            where the link's estimate is old or a guess; empty = no probing.
        bypass: fetch everything whatever is predicted (kv_policy `fetch`).
    """
    compute = prompt.compute_seconds(0)
    best = _best(finish_seconds, prompt)
    if bypass:
        return _decision("forced", len(finish_seconds), finish_seconds, prompt, math.inf)
    if best and _total(best, finish_seconds, prompt) <= (1 - margin) * compute:
        verdict: Verdict = "all" if best == len(finish_seconds) else "part"
        return _decision(verdict, best, finish_seconds, prompt, _deadline(best, prompt))
    if optimistic_seconds:
        hope = _best(optimistic_seconds, prompt)
        if hope and _total(hope, optimistic_seconds, prompt) <= (1 - margin) * compute:
            return _decision("probe", 1, finish_seconds, prompt, _deadline(1, prompt))
    return _decision("none", 0, finish_seconds, prompt, 0.0)


def join(num_chunks: int, prompt: Prompt, *, left_seconds: float) -> Decision:
    """The decision to join a fetch of `num_chunks` chunks that ends in `left_seconds`."""
    finish = [left_seconds] * num_chunks
    return _decision("joined", num_chunks, finish, prompt, _deadline(num_chunks, prompt))


def reconsider(
    remaining_seconds: Sequence[float],
    prompt: Prompt,
    *,
    num_ready: int,
    num_wanted: int,
    margin: float,
) -> int:
    """How many chunks to end up with, asked while a fetch runs.

    Giving up cannot be taken back, so it must be predicted better than going on by `margin` of the
    time that is left.

    Args:
        remaining_seconds: item i = from now until chunk ``num_ready + i`` is restored.
        prompt: the request's.
        num_ready: chunks restored already, without gap from the first; what they cost is spent.
        num_wanted: chunks that the fetch is after at present, at least `num_ready`.
        margin: see above.

    Returns:
        A number of chunks from `num_ready` to `num_wanted`.
    """
    wanted = remaining_seconds[: num_wanted - num_ready]
    best = _best(wanted, prompt, first=num_ready, least=num_ready)
    going_on = _total(num_wanted, wanted, prompt, first=num_ready)
    giving_up = _total(best, wanted, prompt, first=num_ready)
    return best if giving_up < (1 - margin) * going_on else num_wanted


@dataclass(frozen=True, slots=True)
class Regret:
    """How a decision turned out. Seconds; positive = worse than predicted, or than not doing so."""

    error_seconds: float
    """Actual minus predicted time: of the fetch, or where there was none, of computing."""
    loss_seconds: float
    """Time lost against what was not done, as that was predicted: against computing everything, or
    for `none` against the best fetch that was considered; negative = gained."""


def regret(
    decision: Decision,
    prompt: Prompt,
    *,
    lookup_seconds: float,
    fetch_seconds: float,
    num_chunks: int,
) -> Regret:
    """What a fetch that took `fetch_seconds` and brought `num_chunks` chunks was worth.

    Who computes everything needs no look-up, so that what it took counts as lost, too.
    """
    spent = lookup_seconds + fetch_seconds + prompt.compute_seconds(num_chunks)
    return Regret(
        fetch_seconds - decision.predicted_fetch_seconds,
        spent - decision.predicted_compute_seconds,
    )


def _total(
    num_chunks: int, finish_seconds: Sequence[float], prompt: Prompt, *, first: int = 0
) -> float:
    fetch = finish_seconds[num_chunks - first - 1] if num_chunks > first else 0.0
    return fetch + prompt.compute_seconds(num_chunks)


def _best(
    finish_seconds: Sequence[float], prompt: Prompt, *, first: int = 0, least: int = 1
) -> int:
    """The number of chunks with the least total; of equals the largest: it spares the engine.

    0 where there are fewer than `least`.
    """
    candidates = range(first + len(finish_seconds), least - 1, -1)
    return min(candidates, key=lambda n: _total(n, finish_seconds, prompt, first=first), default=0)


def _deadline(num_chunks: int, prompt: Prompt) -> float:
    """When fetching has cost as much as computing what it replaces."""
    return prompt.compute_seconds(0) - prompt.compute_seconds(num_chunks)


def _decision(
    verdict: Verdict,
    num_chunks: int,
    finish_seconds: Sequence[float],
    prompt: Prompt,
    deadline_seconds: float,
) -> Decision:
    considered = num_chunks or _best(finish_seconds, prompt)
    return Decision(
        verdict=verdict,
        num_chunks=num_chunks,
        considered_chunks=considered,
        predicted_fetch_seconds=finish_seconds[considered - 1] if considered else 0.0,
        predicted_with_fetch_seconds=_total(considered, finish_seconds, prompt),
        predicted_all_fetch_seconds=finish_seconds[-1] if finish_seconds else 0.0,
        predicted_compute_seconds=prompt.compute_seconds(0),
        deadline_seconds=deadline_seconds,
    )
