"""KV-like bit patterns, with the values that break codecs mixed in."""

import numpy as np

from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.spec import KVSpec

SPECIALS = {
    # NaNs of both signs and payloads, infinities, zeros, least and largest denormals and normals
    "bfloat16": (0x7FC0, 0xFFC1, 0x7F81, 0x7F80, 0xFF80, 0, 0x8000, 1, 0x807F, 0x0080, 0x7F7F),
    "float16": (0x7E00, 0xFE01, 0x7C01, 0x7C00, 0xFC00, 0, 0x8000, 1, 0x83FF, 0x0400, 0x7BFF),
    "float8_e4m3fn": (0x7F, 0xFF, 0, 0x80, 1, 0x87, 0x08, 0x7E, 0xFE),
}


def shape(spec: KVSpec, num_tokens: int) -> tuple[int, int, int, int, int]:
    return spec.num_layers, spec.kv_factor, spec.num_kv_heads, num_tokens, spec.head_dim


def finite_values(spec: KVSpec, num_tokens: int, seed: int = 0) -> np.ndarray:
    """[L, K, H, T, D]: channels with their own mean and spread, as real KV caches have them."""
    rng = np.random.default_rng(seed)
    full = shape(spec, num_tokens)
    channel = (*full[:3], 1, full[4])
    mean, spread = rng.normal(0, 3, channel), np.exp(rng.normal(0, 1, channel))
    values = mean + spread * rng.normal(0, 1, full)
    return float32_to_bits(np.clip(values, -400, 400).astype(np.float32), spec.dtype)


def special_values(spec: KVSpec, num_tokens: int, seed: int = 0) -> np.ndarray:
    """The same with one element in eight replaced by NaN, infinity, zero, denormal, extreme."""
    rng = np.random.default_rng(seed + 1)
    values = finite_values(spec, num_tokens, seed)
    where = rng.random(values.shape) < 0.125
    values[where] = rng.choice(SPECIALS[spec.dtype], where.sum()).astype(values.dtype)
    return values
