"""Other ways to make a KV cache smaller, for the rate-quality table: plain numpy, no video.

Each takes float32 values [L, 2, H, T, D] (keys rotated) and returns what would come back and the bits
of all that would be stored. They work chunk by chunk, as a store does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import zstandard

from kvfetcher.codec.quant import bits_to_float32, float32_to_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.spec import KVDtype

    F32 = NDArray[np.float32]

CHUNK_TOKENS = 256

_HALF_BITS = 16
# LMCache 0.5: bins of CacheGen's default configuration for models it does not list.
_CACHEGEN_KEY_BINS = ((10, 32), (None, 16))
_CACHEGEN_VALUE_BINS = ((2, 32), (None, 16))


def cast(values: F32, dtype: KVDtype) -> tuple[F32, float]:
    """Rounding to a KV dtype and nothing else."""
    bits = float32_to_bits(values, dtype)
    return bits_to_float32(bits, dtype), 8.0 * bits.nbytes


def zstd_bfloat16(values: F32) -> tuple[F32, float]:
    """bfloat16, low and high bytes apart, zstd level 3: without loss."""
    bits = float32_to_bits(values, "bfloat16")
    size = 0
    for chunk in _chunks(bits):
        halves = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).reshape(-1, 2)
        for half in halves.T:
            data = np.ascontiguousarray(half).tobytes()
            size += len(zstandard.ZstdCompressor(level=3).compress(data))
    return bits_to_float32(bits, "bfloat16"), 8.0 * size


def uniform(values: F32, bits: int) -> tuple[F32, float]:
    """Integers by minimum and maximum of each channel over a chunk's tokens, packed."""
    out = np.empty_like(values)
    size = 0.0
    for source, target in zip(_chunks(values), _chunks(out), strict=True):
        target[...] = _min_max(source, bits, axis=3)
        size += bits * source.size + 2 * _HALF_BITS * source[:, :, :, 0].size
    return out, size


def kivi(values: F32, bits: int, *, group: int = 32) -> tuple[F32, float]:
    """KIVI-like: K per channel over 32 tokens, V per token over 32 channels; float16 scales."""
    out = np.empty_like(values)
    layers, _, heads, tokens, dim = values.shape
    whole = tokens // group * group
    keys = values[:, 0, :, :whole].reshape(layers, heads, -1, group, dim)
    out[:, 0, :, :whole] = _min_max(keys, bits, axis=3).reshape(layers, heads, whole, dim)
    out[:, 0, :, whole:] = values[:, 0, :, whole:]
    vs = values[:, 1].reshape(layers, heads, tokens, -1, min(group, dim))
    out[:, 1] = _min_max(vs, bits, axis=4).reshape(values[:, 1].shape)
    size = values.size * bits + 2 * _HALF_BITS * values.size / group
    return out, size


def cachegen(values: F32) -> tuple[F32, float]:
    """CacheGen as LMCache ships it: per-token absmax, layer-wise bins, per-channel entropy coder.

    The coder is counted as ideal (order-0 entropy of each channel's symbols in a chunk). Stored with
    it, as LMCache does: int16 tables [2 L, channels, bins + 1] (as wide as the most bins), float16
    maxima of every layer and token, and stream lengths of every token's group (left out here).
    """
    out = np.empty_like(values)
    size = 0.0
    layers, _, heads, _, dim = values.shape
    for source, target in zip(_chunks(values), _chunks(out), strict=True):
        tokens = source.shape[3]
        for factor, table in enumerate((_CACHEGEN_KEY_BINS, _CACHEGEN_VALUE_BINS)):
            for layer in range(layers):
                bins = next(b for stop, b in table if stop is None or layer < stop)
                top = np.float32(bins // 2 - 1)
                x = source[layer, factor].transpose(1, 0, 2).reshape(tokens, heads * dim)
                largest = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-30))
                codes = np.rint(x * (top / largest))
                restored = (codes * (largest / top)).reshape(tokens, heads, dim)
                target[layer, factor] = restored.transpose(1, 0, 2)
                size += _column_entropy(codes.astype(np.int64) + bins // 2, bins)
                size += _HALF_BITS * tokens
        size += _HALF_BITS * 2 * layers * heads * dim * (32 + 1)
    return out, size


def order0_bits(rows: NDArray[np.integer[Any]], *, rows_per_class: int = 32) -> float:
    """Order-0 entropy in bits of integers from 0 to some thousand, pooled over classes of adjacent rows."""
    total = 0.0
    for start in range(0, len(rows), rows_per_class):
        counts = np.bincount(rows[start : start + rows_per_class].reshape(-1))
        counts = counts[counts > 0]
        total -= float((counts * np.log2(counts / counts.sum())).sum())
    return total


def _chunks(values: NDArray) -> list[NDArray]:  # type: ignore[type-arg]
    """Views of `CHUNK_TOKENS` tokens each."""
    return [
        values[:, :, :, start : start + CHUNK_TOKENS]
        for start in range(0, values.shape[3], CHUNK_TOKENS)
    ]


def _min_max(values: F32, bits: int, *, axis: int) -> F32:
    low, high = values.min(axis=axis, keepdims=True), values.max(axis=axis, keepdims=True)
    low = low.astype(np.float16).astype(np.float32)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    step = np.where(scale > 0, scale, np.float32(1))
    codes = np.clip(np.rint((values - low) / step), 0, 2**bits - 1)
    return codes * scale + low


def _column_entropy(codes: NDArray[np.int64], bins: int) -> float:
    """Sum over columns of the order-0 entropy of a column's codes, in bits."""
    tokens, channels = codes.shape
    flat = codes + np.arange(channels) * (bins + 1)
    counts = np.bincount(flat.ravel(), minlength=channels * (bins + 1))
    positive = counts[counts > 0]
    return float(-(positive * np.log2(positive / tokens)).sum())
