"""The cache: rounded as written, exported exactly, loaded as if computed."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from kvfetcher.engines.hf.kv_cache import SequenceCache
from kvfetcher.engines.hf.model_call import forward
from kvfetcher.errors import LayoutError
from kvfetcher.spec import KVSpec


def cache_of(dtype="bfloat16", capacity=8, **spec):
    return SequenceCache(
        KVSpec(num_layers=2, num_kv_heads=2, head_dim=4, dtype=dtype, **spec),
        capacity=capacity,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
    )


def fill(cache, number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for layer in range(2):
        keys, values = torch.randn(2, 1, 2, number, 4, generator=generator)
        cache.for_model.update(keys, values, layer)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_export_then_append_gives_the_same_cache(dtype):
    first, second = cache_of(dtype), cache_of(dtype)
    fill(first, 5)
    fill(first, 2, seed=1)
    bits = first.export(0, 7)
    assert bits.shape == (2, 2, 2, 7, 4)
    assert bits.dtype == (np.uint8 if dtype.startswith("float8") else np.uint16)
    second.append(bits[:, :, :, :3])
    second.append(bits[:, :, :, 3:])
    assert second.length == 7
    assert np.array_equal(second.export(2, 7), bits[:, :, :, 2:])
    for one, two in zip(first.for_model.layers, second.for_model.layers, strict=True):
        assert torch.equal(one.keys[:, :, :7], two.keys[:, :, :7])
        assert torch.equal(one.values[:, :, :7], two.values[:, :, :7])


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_values_out_of_range_are_clamped_not_made_infinite(dtype):
    cache = cache_of(dtype)
    huge = torch.tensor([1e9, -1e9, 0.0, 1.0]).expand(1, 2, 1, 4)
    keys, _ = cache.for_model.update(huge, huge, 0)
    assert keys.isfinite().all()
    assert keys[0, 0, 0, 0] == torch.finfo(getattr(torch, dtype)).max


def test_truncated_tokens_are_forgotten():
    cache = cache_of()
    fill(cache, 5)
    kept = cache.export(0, 3)
    cache.truncate(3)
    assert cache.length == cache.for_model.get_seq_length() == 3
    fill(cache, 4, seed=9)
    assert np.array_equal(cache.export(0, 3), kept)
    with pytest.raises(LayoutError, match="cannot be cut"):
        cache.truncate(8)


def test_what_does_not_fit_is_refused():
    cache = cache_of(capacity=64)
    good = np.zeros((2, 2, 2, 3, 4), np.uint16)
    for bad in (good[:1], good.astype(np.uint8), good[..., :2]):
        with pytest.raises(LayoutError, match="values must be"):
            cache.append(bad)
    with pytest.raises(LayoutError, match="no room"):
        cache.append(np.zeros((2, 2, 2, 65, 4), np.uint16))
    cache.append(good)
    for start, end in ((0, 4), (2, 2), (-1, 2)):
        with pytest.raises(LayoutError, match="are not in a cache"):
            cache.export(start, end)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SMALL),
    "llama, a KV head per query head": LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
    "qwen2": Qwen2Config(**SMALL),
    "mistral with a window": MistralConfig(**SMALL, sliding_window=24),
    "gemma 3": Gemma3TextConfig(
        **SMALL,
        sliding_window=24,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_slices_over_the_cache_give_the_logits_of_one_pass(config):
    """100 tokens, windows of 24: what a sliding layer must not see is long behind."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="sdpa"
    ).eval()
    ids = torch.randint(0, 64, (1, 100))
    spec = KVSpec(4, config.num_key_value_heads, config.head_dim, dtype="float16")
    cache = SequenceCache(
        spec, capacity=100, compute_dtype=torch.float32, device=torch.device("cpu")
    )
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits[0]
        parts = [
            forward(model, ids[:, a:b], cache.for_model, num_logits=0)[0]
            for a, b in ((0, 16), (16, 48), (48, 90), *((i, i + 1) for i in range(90, 100)))
        ]
        model.config.sliding_window = 1000
        unlimited = model(ids, use_cache=False).logits[0]
    # float16 keeps 11 bits of K and V; seeing through a window would show.
    assert (torch.cat(parts) - expected).std() < 0.01 * expected.std()
    if getattr(config, "sliding_window", None) == 24:
        assert (unlimited - expected).std() > 0.1 * expected.std()
    assert cache.is_uniform
    assert cache.length == 100
