from types import SimpleNamespace

import pytest
import torch

from kvfetcher.engines.hf.model_call import forward


class Newer:
    """As of transformers 5.24."""

    def forward(self, input_ids, cache=None, use_cache=None, logits_to_keep=0):
        return SimpleNamespace(logits=(cache, use_cache, logits_to_keep))

    __call__ = forward


class Older:
    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        return SimpleNamespace(logits=(past_key_values, use_cache, logits_to_keep))

    __call__ = forward


@pytest.mark.parametrize("kind", [Newer, Older])
def test_the_cache_is_passed_under_the_name_that_the_model_has_for_it(kind):
    cache = object()
    ids = torch.zeros((1, 2), dtype=torch.long)
    assert forward(kind(), ids, cache, num_logits=2) == (cache, True, 2)
