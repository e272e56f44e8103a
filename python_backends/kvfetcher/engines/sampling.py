"""From logits to a token: greedy, or temperature / top-k / top-p with a seed of its own."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import torch

from kvfetcher.engines.base import MAX_SEED

if TYPE_CHECKING:
    from kvfetcher.engines.base import SamplingParams


class Sampler:
    """Chooses the tokens of one request.

    Sampling runs on the CPU in float32, whatever the model runs on, so that a seed means the same
    everywhere; requests never share random state.
    """

    def __init__(self, params: SamplingParams, eos_ids: tuple[int, ...]) -> None:
        self._params = params
        self._eos_ids = list(eos_ids)
        self._generator = torch.Generator(device="cpu")
        seed = params.seed if params.seed is not None else secrets.randbelow(MAX_SEED)
        self._generator.manual_seed(seed)

    def choose(self, logits: torch.Tensor, num_generated: int) -> int:
        """Pick the next token.

        Args:
            logits: [vocab], any float dtype and device; not changed.
            num_generated: tokens generated before this one (for `min_length`).
        """
        params = self._params
        scores = logits.detach().to("cpu", torch.float32)
        if num_generated < params.min_length and self._eos_ids:
            scores = scores.clone()
            scores[self._eos_ids] = -torch.inf
        if params.greedy:
            return int(scores.argmax())
        scores = scores / params.temperature
        if 0 < params.top_k < scores.numel():
            worst = scores.topk(params.top_k).values[-1]
            scores = scores.masked_fill(scores < worst, -torch.inf)
        if params.top_p < 1:
            ordered, order = scores.sort(descending=True)
            probabilities = ordered.softmax(-1)
            # A token stays while the sum before it is short of top_p: at least one always does.
            surplus = probabilities.cumsum(-1) - probabilities >= params.top_p
            scores = scores.masked_fill(
                torch.zeros_like(surplus).scatter(0, order, surplus), -torch.inf
            )
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
