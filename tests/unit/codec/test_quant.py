import numpy as np
import pytest
import torch

from kvfetcher.codec.quant import bits_to_float32, dequantise, float32_to_bits, quantise
from kvfetcher.errors import CodecError

TORCH = {
    "bfloat16": (torch.bfloat16, torch.uint16),
    "float16": (torch.float16, torch.uint16),
    "float8_e4m3fn": (torch.float8_e4m3fn, torch.uint8),
}


def all_patterns(dtype):
    return np.arange(256, dtype=np.uint8) if "8" in dtype else np.arange(65536, dtype=np.uint16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_every_bit_pattern_has_the_value_torch_gives_it(dtype):
    bits = all_patterns(dtype)
    expected = torch.from_numpy(bits.copy()).view(TORCH[dtype][0]).float().numpy()
    np.testing.assert_array_equal(bits_to_float32(bits, dtype), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_every_finite_pattern_survives_the_round_trip(dtype):
    bits = all_patterns(dtype)
    finite = bits[np.isfinite(bits_to_float32(bits, dtype))]
    assert (float32_to_bits(bits_to_float32(finite, dtype), dtype) == finite).all()


@pytest.mark.parametrize(
    ("dtype", "top"), [("bfloat16", 3e38), ("float16", 65504), ("float8_e4m3fn", 448)]
)
def test_rounding_is_torchs_also_on_ties(dtype, top):
    rng = np.random.default_rng(0)
    values = (rng.normal(0, 1, 20000) * np.exp2(rng.uniform(-20, 8, 20000))).astype(np.float32)
    every = bits_to_float32(all_patterns(dtype), dtype)
    every = np.unique(every[np.isfinite(every)]).astype(np.float64)
    ties = ((every[:-1] + every[1:]) / 2).astype(np.float32)
    values = np.clip(np.concatenate((values, ties)), -top, top)
    to, as_bits = TORCH[dtype]
    expected = torch.from_numpy(values).to(to).view(as_bits).numpy()
    np.testing.assert_array_equal(float32_to_bits(values, dtype), expected)


@pytest.mark.parametrize(
    ("dtype", "bits"), [("bfloat16", 0x7F80), ("float16", 0x7BFF), ("float8_e4m3fn", 0x7E)]
)
def test_overflow_is_as_the_format_says(dtype, bits):
    assert float32_to_bits(np.float32([3.4e38]), dtype)[0] == bits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_nan_stays_nan(dtype):
    bits = float32_to_bits(np.float32([np.nan]), dtype)
    assert np.isnan(bits_to_float32(bits, dtype)[0])


@pytest.mark.parametrize("bits", [2, 8, 12])
def test_quantiser_errs_by_at_most_half_a_step(bits):
    values = np.random.default_rng(0).normal(3, 5, (2, 50, 6)).astype(np.float32)
    codes, minima, scales = quantise(values, bits=bits)
    assert codes.dtype == (np.uint8 if bits <= 8 else np.uint16)
    assert codes.min() == 0
    assert codes.max() == 2**bits - 1
    error = np.abs(dequantise(codes, minima, scales) - values)
    assert (error <= scales * 0.501).all()


def test_constant_and_denormal_channels_are_kept():
    tiny = np.float32(1e-45)
    values = np.stack([np.full(5, 7.5), np.zeros(5), tiny * (np.arange(5) % 2)], axis=1)
    restored = dequantise(*quantise(values[None].astype(np.float32), bits=8))[0]
    assert (restored[:, 0] == 7.5).all()
    assert (np.abs(restored - values) <= tiny).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**101, -(2.0**101)])
def test_values_that_min_max_cannot_hold_are_refused(bad):
    values = np.zeros((1, 4, 2), np.float32)
    values[0, 2, 1] = bad
    with pytest.raises(CodecError, match="save them with profile exact"):
        quantise(values, bits=8)
