import dataclasses

import numpy as np
import pytest

from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.ladder.library import register_calibration
from kvfetcher.codec.ladder.profile import TransformProfile, restore_transform
from kvfetcher.codec.ladder.rope import rotate_keys
from kvfetcher.codec.quant import bits_to_float32, float32_to_bits
from kvfetcher.codec.uncalibrated import UncalibratedProfile, restore_uncalibrated
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import ChecksumError, FormatError
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import LADDER, KVSpec
from support.calibrations import correlated_values, make_calibration


def cache_values(calibration, spec, num_tokens, first_position, seed=3):
    """Bit patterns [L, K, H, T, D] with rotated keys."""
    values = correlated_values(spec, num_tokens, seed)
    rotate_keys(values[:, 0], calibration.rope, first_position)
    return float32_to_bits(values, spec.dtype)


def code(profile, bits, spec, first_position, variant="-", *, groups=None):
    """Every unit of a chunk, of the profile's layer groups or of `groups`, and the restored values."""
    units, parts = [], []
    for start, count in groups or profile.layer_groups(spec, bits.shape[3], variant):
        part = np.ascontiguousarray(bits[start : start + count])
        data = profile.encode(UnitSource(part, spec, start, first_position), variant)
        units.append(data)
        parts.append(restore(data))
    return units, np.concatenate(parts)


def restore(data):
    unit = parse_unit(data)
    planes = VideoDecoder().decode(unit.packets(), unit.geometry)
    restorer = {3: restore_transform, 4: restore_uncalibrated}[unit.profile]
    return restorer(unit, planes)


@pytest.fixture(scope="module")
def calibrated():
    spec = KVSpec(5, 2, 8)
    calibration = make_calibration(spec)
    register_calibration(calibration)
    return spec, calibration


@pytest.mark.parametrize("name", LADDER)
def test_error_follows_the_step(calibrated, name):
    spec, calibration = calibrated
    bits = cache_values(calibration, spec, 64, 512)
    _, restored = code(TransformProfile(name, calibration), bits, spec, 512)
    error = bits_to_float32(restored, spec.dtype) - bits_to_float32(bits, spec.dtype)
    # The gradients of the test calibration are white with unit power: F is about identity.
    expected = calibration.steps[name] / np.sqrt(12)
    assert 0.2 * expected < np.sqrt(np.mean(error**2)) < 4 * expected + 0.01


def test_coarser_profiles_are_smaller(calibrated):
    spec, calibration = calibrated
    bits = cache_values(calibration, spec, 256, 0)
    sizes = [
        sum(map(len, code(TransformProfile(name, calibration), bits, spec, 0)[0]))
        for name in LADDER
    ]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("first_position", [0, 2, 100])
def test_sinks_are_exact_only_at_the_start_of_the_sequence(calibrated, first_position):
    spec, calibration = calibrated
    bits = cache_values(calibration, spec, 32, first_position)
    _, restored = code(TransformProfile("tiny", calibration), bits, spec, first_position)
    exact = (restored == bits).all(axis=(0, 1, 2, 4))
    np.testing.assert_array_equal(exact, np.arange(32) + first_position < 4)


def test_tokens_that_are_not_finite_are_kept_exact(calibrated):
    spec, calibration = calibrated
    bits = cache_values(calibration, spec, 48, 256)
    bits[1, 0, 1, 17, 3] = 0x7FC0  # NaN
    bits[2, 1, 0, 5, 0] = 0xFF80  # -infinity
    bits[0, 1, 0, 40, 2] = 0x7F00  # 1.7e38
    _, restored = code(TransformProfile("balanced", calibration), bits, spec, 256)
    np.testing.assert_array_equal(restored[0:2, :, :, 17], bits[0:2, :, :, 17])
    np.testing.assert_array_equal(restored[2:4, :, :, 5], bits[2:4, :, :, 5])
    np.testing.assert_array_equal(restored[0:2, :, :, 40], bits[0:2, :, :, 40])


def test_head_groups_restore_each_head(calibrated):
    spec = KVSpec(4, 4, 8)
    calibration = make_calibration(spec, heads=1)
    register_calibration(calibration)
    bits = cache_values(calibration, spec, 64, 256)
    units, restored = code(TransformProfile("near", calibration), bits, spec, 256)
    assert parse_unit(units[0]).geometry.num_frames == 4
    error = bits_to_float32(restored, spec.dtype) - bits_to_float32(bits, spec.dtype)
    assert np.sqrt(np.mean(error**2)) < 0.05


@pytest.mark.parametrize("heads", [0, 1])
def test_a_picture_of_several_layer_groups_holds_the_same_values(heads):
    spec = KVSpec(10, 2, 32)
    calibration = make_calibration(spec, heads=heads)
    register_calibration(calibration)
    bits = cache_values(calibration, spec, 64, 2)
    sizes = ("144x144", "144x400")
    profile = TransformProfile("balanced", calibration, frame_sizes=sizes)
    grouping = calibration.grouping
    groups = list(zip(grouping.layer_starts, grouping.layer_counts, strict=True))
    apart, expected = code(TransformProfile("balanced", calibration), bits, spec, 2, groups=groups)
    small, restored = code(profile, bits, spec, 2, sizes[0])
    np.testing.assert_array_equal(restored, expected)
    large, restored = code(profile, bits, spec, 2, sizes[1])
    np.testing.assert_array_equal(restored, expected)
    assert len(apart) == 5
    assert len(large) < len(small) < 6
    pictures = {parse_unit(data).geometry.num_frames for data in large}
    assert pictures == {2 if heads else 1}


def test_units_of_short_chunks_have_more_layer_groups():
    spec = KVSpec(num_layers=64, num_kv_heads=2, head_dim=32)
    calibration = make_calibration(spec, layers=1)
    register_calibration(calibration)
    profile = TransformProfile("near", calibration)
    rank = max(calibration.unit_rank(group, "near") for group in range(64))

    def most(num_tokens):
        return max(count for _, count in profile.layer_groups(spec, num_tokens, "-"))

    long = (5 << 20) // rank
    assert [most(long), most(long // 4), most(long // 16)] == [1, 4, 16]
    assert most(16) == most(144) == 64, "pictures of both are as wide"
    # All in one picture, which has thousands of lines.
    values = cache_values(calibration, spec, 32, 0)
    (unit,), _ = code(profile, values, spec, 0)
    geometry = parse_unit(unit).geometry
    assert (geometry.num_frames, geometry.width) == (1, 144)
    assert geometry.height > 2048


@pytest.mark.parametrize("variant", ["-", "1024x8192"])
def test_no_unit_of_a_chunk_is_larger_than_so_few_need(variant):
    spec = KVSpec(num_layers=64, num_kv_heads=2, head_dim=32)
    calibration = make_calibration(spec, layers=1)
    profile = TransformProfile("near", calibration)
    ranks = [calibration.unit_rank(group, "near") for group in range(64)]
    counts = set()
    for num_tokens in range(1024, 16384, 1024):
        units = profile.layer_groups(spec, num_tokens, variant)
        rows = [sum(ranks[start : start + count]) for start, count in units]
        assert [start for start, _ in units] == [
            sum(c for _, c in units[:i]) for i in range(len(units))
        ]
        assert max(rows) <= sum(ranks) / len(units) + max(ranks)
        counts.add(len(units))
    assert len(counts) > 3 or variant != "-"


def test_unit_whose_layer_groups_are_not_its_layers_is_refused(calibrated):
    spec, calibration = calibrated
    bits = cache_values(calibration, spec, 32, 64)
    profile = TransformProfile("balanced", calibration, frame_sizes=("144x144",))
    (data,), _ = code(profile, bits, spec, 64, "144x144")
    unit = parse_unit(data)
    planes = VideoDecoder().decode(unit.packets(), unit.geometry)
    fewer = dataclasses.replace(unit, params=unit.params[:-4])
    with pytest.raises(FormatError, match="2 layer groups from 0 on, its layers are 3 from 0"):
        restore_transform(fewer, planes)
    with pytest.raises(FormatError, match="4 for each further layer group, got 67"):
        restore_transform(dataclasses.replace(unit, params=unit.params[:-1]), planes)
    part = np.ascontiguousarray(bits[1:4])
    with pytest.raises(FormatError, match="layers 1 to 3 are not whole groups"):
        profile.encode(UnitSource(part, spec, 1, 64), "144x144")


def test_latent_attention_is_coded_with_one_tensor():
    spec = KVSpec(3, 1, 16, kv_factor=1)
    calibration = make_calibration(spec)
    register_calibration(calibration)
    bits = cache_values(calibration, spec, 64, 256)
    _, restored = code(TransformProfile("near", calibration), bits, spec, 256)
    error = bits_to_float32(restored, spec.dtype) - bits_to_float32(bits, spec.dtype)
    assert np.sqrt(np.mean(error**2)) < 0.05


def test_wrong_integers_are_noticed(calibrated):
    spec, calibration = calibrated
    bits = cache_values(calibration, spec, 64, 0)
    units, _ = code(TransformProfile("balanced", calibration), bits, spec, 0)
    unit = parse_unit(units[0])
    planes = VideoDecoder().decode(unit.packets(), unit.geometry)
    planes[0, 1, 2, 3] ^= 1
    with pytest.raises(ChecksumError, match="decoded integers differ"):
        restore_transform(unit, planes)


def test_values_of_another_geometry_are_refused(calibrated):
    _, calibration = calibrated
    spec = KVSpec(5, 1, 8)
    bits = float32_to_bits(correlated_values(spec, 16), spec.dtype)
    with pytest.raises(FormatError, match="num_kv_heads"):
        code(TransformProfile("near", calibration), bits, spec, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_uncalibrated_error_is_a_quarter_of_the_spread(dtype):
    spec = KVSpec(3, 2, 16, 2, dtype)
    values = correlated_values(spec, 300)
    bits = float32_to_bits(values, dtype)
    units, restored = code(UncalibratedProfile(), bits, spec, 4096)
    centred = values - values.mean(axis=3, keepdims=True)
    spread = np.sqrt(np.mean(centred**2, axis=(2, 3, 4)))
    error = bits_to_float32(restored, dtype) - bits_to_float32(bits, dtype)
    relative = np.sqrt(np.mean(error**2, axis=(2, 3, 4))) / spread
    # 0.25 / sqrt(12), and the rounding of fp8 (3 mantissa bits) on top.
    assert relative.max() < (0.09 if dtype != "float8_e4m3fn" else 0.13)
    assert sum(map(len, units)) < 0.45 * bits.size * 2


def test_constant_values_restore_to_themselves():
    spec = KVSpec(2, 1, 8)
    bits = float32_to_bits(np.full((2, 2, 1, 64, 8), 1.5, np.float32), spec.dtype)
    _, restored = code(UncalibratedProfile(), bits, spec, 64)
    np.testing.assert_array_equal(restored, bits)
