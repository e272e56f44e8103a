"""Bit patterns <-> float32, and float32 <-> integer codes. Pure numpy.

Rounding is to nearest, ties to even, everywhere; what two machines restore from the same codes is
the same bits, because each step is one IEEE 754 operation.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvfetcher.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.format.pictures import Integers
    from kvfetcher.spec import KVDtype

MAX_MAGNITUDE = 2.0**100
"""Larger values are no KV values; below it no step of the quantiser overflows."""


def bits_to_float32(values: Integers, dtype: KVDtype) -> NDArray[np.float32]:
    """Exact float32 values of bit patterns; NaN and infinities included.

    Example:
        >>> bits_to_float32(np.array([0x3F80, 0xC000], np.uint16), "bfloat16")
        array([ 1., -2.], dtype=float32)
    """
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "float16":
        return values.view(np.float16).astype(np.float32)
    return _fp8_values()[values]


def float32_to_bits(values: NDArray[np.float32], dtype: KVDtype) -> Integers:
    """Bit patterns nearest to float32 values.

    Beyond the largest finite value of `dtype` the result is that value (float16, float8) or the
    infinity (bfloat16); NaN stays NaN.

    Example:
        >>> [hex(bits) for bits in float32_to_bits(np.array([1.0, -2.0], np.float32), "bfloat16")]
        ['0x3f80', '0xc000']
    """
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        rounded[np.isnan(values)] = 0x7FC0
        return rounded
    if dtype == "float16":
        return np.clip(values, -65504.0, 65504.0).astype(np.float16).view(np.uint16)
    # Upper bounds of each code's interval; a tie belongs to the even one of the two.
    codes = np.searchsorted(_fp8_bounds(), np.abs(values)).astype(np.uint8)
    codes[np.signbit(values)] |= np.uint8(0x80)
    codes[np.isnan(values)] = 0x7F
    return codes


class Quantised(NamedTuple):
    """Integer codes with what turns them back: ``value = codes * scales + minima``."""

    codes: Integers
    """[..., T, D], 0 to 2**bits - 1; uint8 up to 8 bits, else uint16."""
    minima: NDArray[np.float32]
    """[..., 1, D]"""
    scales: NDArray[np.float32]
    """[..., 1, D]; 0 where a channel is constant."""


def quantise(values: NDArray[np.float32], *, bits: int) -> Quantised:
    """Uniform min-max quantisation of every channel over its tokens. Lossy.

    Args:
        values: [..., T, D] finite float32.
        bits: 2 to 12.

    Raises:
        CodecError: a value is NaN, infinite or beyond MAX_MAGNITUDE.

    Example:
        >>> coded = quantise(np.array([[0.0], [1.0], [3.0]], np.float32), bits=8)
        >>> coded.codes.ravel()
        array([  0,  85, 255], dtype=uint8)
        >>> dequantise(coded.codes, coded.minima, coded.scales).ravel()
        array([0., 1., 3.], dtype=float32)
    """
    minima, maxima = values.min(axis=-2, keepdims=True), values.max(axis=-2, keepdims=True)
    # NaN fails both comparisons.
    if not (minima.min() >= -MAX_MAGNITUDE and maxima.max() <= MAX_MAGNITUDE):
        raise CodecError(
            "KV values hold NaN, infinity or a magnitude over 2**100, which min-max quantisation"
            " cannot represent; save them with profile exact"
        )
    top = np.float32((1 << bits) - 1)
    scales = (maxima - minima) / top
    steps = np.where(scales == 0, np.float32(1), scales)
    codes = np.clip(np.rint((values - minima) / steps), 0, top)
    return Quantised(codes.astype(np.uint8 if bits <= 8 else "<u2"), minima, scales)


def dequantise(
    codes: Integers, minima: NDArray[np.float32], scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    """``codes * scales + minima`` in float32, product and sum rounded apart (no fused step)."""
    values = codes.astype(np.float32)
    values *= scales
    values += minima
    return values


@cache
def _fp8_values() -> NDArray[np.float32]:
    """float32 value of each float8_e4m3fn code."""
    codes = np.arange(256)
    exponents, mantissas = (codes >> 3) & 15, codes & 7
    magnitudes = np.where(
        exponents == 0,
        np.ldexp(mantissas / 8.0, -6),
        np.ldexp(1 + mantissas / 8.0, exponents - 7),
    )
    magnitudes[(codes & 127) == 127] = np.nan
    values = np.where(codes >= 128, -magnitudes, magnitudes).astype(np.float32)
    values.flags.writeable = False
    return values


@cache
def _fp8_bounds() -> NDArray[np.float32]:
    """Largest magnitude that rounds to each of the codes 0 to 125; larger ones are code 126."""
    values = _fp8_values()[:127]
    middles = (values[:-1] + values[1:]) / np.float32(2)
    middles[1::2] = np.nextafter(middles[1::2], np.float32(0))
    middles.flags.writeable = False
    return middles
