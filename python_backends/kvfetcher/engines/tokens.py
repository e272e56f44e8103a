"""Where an engine's tokens come from, apart from text, leases and saving: one Protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from kvfetcher.engines.base import FinishReason, SamplingParams
    from kvfetcher.prefill_rate import PrefillModel


PRIOR_TOKENS_PER_SECOND = 1000.0
"""Assumed of an engine that has computed nothing yet."""


class TokenStep(NamedTuple):
    """New tokens of a request; with a reason, the last."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class TokenRun(Protocol):
    """One request in the engine."""

    def steps(self) -> AsyncIterator[TokenStep]:
        """Its tokens; ends behind the step that has a reason.

        Raises:
            EngineError: the engine failed at it.
        """
        ...

    def abort(self) -> None:
        """End it soon; nothing happens where it is over. Never waits."""
        ...

    @property
    def queue_seconds(self) -> float:
        """How long it waited to be scheduled; 0 where that is not known (yet)."""
        ...

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """What the engine measured of it by itself, by group; {} where it tells nothing (yet)."""
        ...


class TokenSource(Protocol):
    """Runs requests. `start` from an event loop; all methods are thread-safe."""

    @property
    def prefill(self) -> PrefillModel:
        """What computing prompts takes, learnt while running."""
        ...

    def note_first_token(self, start: int, num_tokens: int, seconds: float) -> None:
        """Learn the time to first token of a request that ran alone, computing from `start` on.

        For sources that cannot measure by themselves; others do nothing.
        """
        ...

    def start(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        *,
        max_tokens: int,
        eos_ids: tuple[int, ...],
        cache_salt: str,
    ) -> TokenRun:
        """Give a request to the engine.

        Args:
            prompt: token ids.
            sampling: how tokens are chosen; stop words are not looked at here.
            max_tokens: largest number of tokens.
            eos_ids: generation ends with one of these.
            cache_salt: requests of different salts share no KV on the device.

        Raises:
            RequestError: the engine cannot run it.
            EngineError: the engine is closed.
        """
        ...

    def close(self) -> None:
        """End running requests and free everything. Safe to call twice."""
        ...
