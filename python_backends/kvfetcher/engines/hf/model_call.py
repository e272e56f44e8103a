"""One call of a transformers model that appends to a KV cache."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel


def forward(
    model: PreTrainedModel, ids: torch.Tensor, cache: Any, *, num_logits: int = 1, **inputs: Any
) -> torch.Tensor:
    """Append tokens to the cache.

    Args:
        model: a causal language model.
        ids: [1, T] int64, on the model's device.
        cache: `transformers.Cache`; grows by T tokens.
        num_logits: number of last tokens whose logits are returned; 0 = all.
        inputs: more of the model's own, for example `position_ids`.

    Returns:
        [1, num_logits, vocab] logits.
    """
    inputs[_cache_argument(type(model).forward)] = cache
    logits: torch.Tensor = model(ids, use_cache=True, logits_to_keep=num_logits, **inputs).logits
    return logits


@functools.cache
def _cache_argument(method: Callable[..., Any]) -> str:
    """`cache` since transformers 5.24, which warns at the name that it had before."""
    return "cache" if "cache" in inspect.signature(method).parameters else "past_key_values"
