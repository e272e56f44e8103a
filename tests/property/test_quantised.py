"""Profiles with a quantiser, on values most of which go through it: integers are what the formula says,
values what the independent reader restores, and tokens that no quantiser holds come back exactly."""

import functools
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.ladder.library import register_calibration
from kvfetcher.codec.ladder.profile import TransformProfile
from kvfetcher.codec.ladder.rope import rotate_keys
from kvfetcher.codec.profiles import decode_unit, restore_unit
from kvfetcher.codec.quant import bits_to_float32, float32_to_bits
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import LADDER, KVSpec
from support import reference_reader
from support.calibrations import correlated_values, make_calibration
from support.examples import examples
from support.kv_values import SPECIALS

DECODER = VideoDecoder()
FOLDER = tempfile.TemporaryDirectory(prefix="kvfetcher-quantised-")
MANTISSA = {"bfloat16": 7, "float16": 10, "float8_e4m3fn": 3}

specs = st.builds(
    KVSpec,
    num_layers=st.integers(1, 5),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    kv_factor=st.sampled_from([1, 2]),
    dtype=st.sampled_from(list(MANTISSA)),
)
token_counts = st.sampled_from([1, 16, 33, 150])
positions = st.one_of(st.sampled_from([0, 1, 3, 4]), st.integers(5, 1 << 20))
variants = st.sampled_from(["-", "144x144", "160x200"])
few = examples(25)


@pytest.fixture(scope="module", autouse=True)
def _no_files_left():
    yield
    FOLDER.cleanup()


@functools.cache
def calibrated(spec, heads):
    """A calibration, and the file that the independent reader reads."""
    calibration = make_calibration(spec, heads=heads)
    register_calibration(calibration)
    path = Path(FOLDER.name) / f"{calibration.digest}.safetensors"
    calibration.save(path)
    return calibration, path


@st.composite
def places(draw, spec, tokens):
    """Up to three elements that are to hold a special value."""
    one = st.tuples(
        st.integers(0, spec.num_layers - 1),
        st.integers(0, spec.kv_factor - 1),
        st.integers(0, spec.num_kv_heads - 1),
        st.integers(0, tokens - 1),
        st.integers(0, spec.head_dim - 1),
    )
    return draw(st.lists(one, max_size=3))


def units_of(profile, bits, spec, position, variant):
    for start, count in profile.layer_groups(spec, bits.shape[3], variant):
        part = np.ascontiguousarray(bits[start : start + count])
        yield start, part, profile.encode(UnitSource(part, spec, start, position), variant)


def kept_exact(unit, part, dtype):
    """Which tokens the unit says it keeps exact: as many as it must, and they are."""
    (stored,) = (s.raw_bytes // 4 for s in unit.sections if s.kind == 19)
    numbers = np.frombuffer(unit.section(19, num_bytes=4 * stored), "<u4")
    kept = np.zeros(unit.num_tokens, bool)
    kept[numbers] = True
    must = ~np.isfinite(bits_to_float32(part, dtype)).all(axis=(0, 1, 2, 4))
    must |= unit.first_position + np.arange(unit.num_tokens) < 4  # attention sinks
    assert kept[must].all()
    return kept


def assert_close(values, other, dtype, *, scale):
    """To the rounding of binary32 sums in another order: a last place here and there."""
    a, b = bits_to_float32(values, dtype), bits_to_float32(other, dtype)
    np.testing.assert_allclose(a, b, rtol=2.0 ** -MANTISSA[dtype], atol=1e-4 * scale)
    assert np.count_nonzero(values != other) <= 0.05 * values.size


@few
@given(
    spec=specs,
    tokens=token_counts,
    position=positions,
    variant=variants,
    heads=st.integers(0, 2),
    rung=st.sampled_from(LADDER),
    factor=st.sampled_from([1, 30]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_ladder(spec, tokens, position, variant, heads, rung, factor, seed, data):
    geometry = replace(spec, dtype="bfloat16")  # an artifact serves every dtype
    calibration, path = calibrated(geometry, min(heads, spec.num_kv_heads))
    profile = TransformProfile(rung, calibration, () if variant == "-" else (variant,))
    values = correlated_values(spec, tokens, seed) * np.float32(factor)
    rotate_keys(values[:, 0], calibration.rope, position)
    bits = float32_to_bits(values, spec.dtype)
    for place in data.draw(places(spec, tokens)):
        bits[place] = data.draw(st.sampled_from(SPECIALS[spec.dtype]))
    for start, part, encoded in units_of(profile, bits, spec, position, variant):
        unit = parse_unit(encoded)
        kept = kept_exact(unit, part, spec.dtype)
        integers = reference_reader.read_unit(encoded, path, integers_only=True)
        (frame_rows,) = struct.unpack_from("<I", unit.params, 44)
        scaled = (
            []
            if kept.all()
            else coefficients(calibration, part, spec, start, position, rung, ~kept, frame_rows)
        )
        for first, z in scaled:
            coded = integers[first : first + len(z)][:, ~kept]
            # Half a step, and what sums in binary32 differ by from those in binary64.
            largest = np.abs(z).max(initial=0)
            assert np.abs(coded - z).max(initial=0) <= 0.5 + 1e-3 + 1e-5 * largest
            assert np.count_nonzero(coded != np.rint(z)) <= (0.02 + 1e-4 * largest) * z.size + 1
        restored = restore_unit(encoded, decode_unit(encoded, DECODER)).values
        other = reference_reader.read_unit(encoded, path)
        np.testing.assert_array_equal(restored[:, :, :, kept], part[:, :, :, kept])
        np.testing.assert_array_equal(other[:, :, :, kept], part[:, :, :, kept])
        assert_close(restored[:, :, :, ~kept], other[:, :, :, ~kept], spec.dtype, scale=factor * 10)


def coefficients(calibration, part, spec, start, position, rung, tokens, frame_rows):
    """(first row, z / step [rank, tokens] in binary64) of each transform of a unit, from the artifact."""
    x = bits_to_float32(part[:, :, :, tokens], spec.dtype).astype(np.float64)
    where = position + np.flatnonzero(tokens)
    for layer in range(len(x)):
        rope = calibration.rope.layers[start + layer]
        half = len(rope.inv_freq)
        for j, frequency in enumerate(rope.inv_freq):
            angle = (where.astype(np.float32) * np.float32(frequency)).astype(np.float64)
            a, b = (j, half + j) if rope.style == "half" else (2 * j, 2 * j + 1)
            a, b = a + rope.offset, b + rope.offset
            u, v = x[layer, 0, :, :, a].copy(), x[layer, 0, :, :, b].copy()
            x[layer, 0, :, :, a] = (u * np.cos(angle) + v * np.sin(angle)) / rope.amplitude
            x[layer, 0, :, :, b] = (v * np.cos(angle) - u * np.sin(angle)) / rope.amplitude
    grouping = calibration.grouping
    step = float(np.float32(calibration.steps[rung]))
    groups = [
        g for g, first in enumerate(grouping.layer_starts) if start <= first < start + len(part)
    ]
    ranks = [calibration.unit_rank(g, rung) for g in groups]
    stride = -(-sum(ranks) // (3 * frame_rows)) * 3 * frame_rows
    found = []
    for number, (first_head, stop) in enumerate(grouping.head_ranges):
        row = number * stride
        for g, rank in zip(groups, ranks, strict=True):
            first = grouping.layer_starts[g] - start
            layers = slice(first, first + grouping.layer_counts[g])
            y = x[layers, :, first_head:stop].transpose(3, 0, 1, 2, 4)
            roots = calibration.roots[start : start + len(part)][layers, :, first_head:stop]
            basis = calibration.bases[g, number]
            centred = y.reshape(len(y), -1) - basis.mean
            weighted = np.einsum(
                "bij,tbj->tbi",
                roots.reshape(-1, spec.head_dim, spec.head_dim).astype(np.float64),
                centred.reshape(len(y), -1, spec.head_dim),
            ).reshape(len(y), -1)
            found.append((row, basis.rows[:rank].astype(np.float64) @ weighted.T / step))
            row += rank
    return found


@few
@given(
    spec=specs,
    tokens=token_counts,
    position=positions,
    variant=variants,
    factor=st.sampled_from([1, 30]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_uncalibrated(spec, tokens, position, variant, factor, seed, data):
    profile = UncalibratedProfile(frame_sizes=() if variant == "-" else (variant,))
    bits = float32_to_bits(correlated_values(spec, tokens, seed), spec.dtype)
    place = data.draw(places(spec, tokens))
    for at in place[1:]:  # one far out, the others special
        bits[at] = data.draw(st.sampled_from(SPECIALS[spec.dtype]))
    for at in place[:1]:
        bits[at] = float32_to_bits(np.float32([factor]), spec.dtype)[0]
    for _, part, encoded in units_of(profile, bits, spec, position, variant):
        unit = parse_unit(encoded)
        kept = kept_exact(unit, part, spec.dtype)
        channels = unit.num_elements // tokens
        mean = np.frombuffer(unit.section(21, num_bytes=4 * channels), "<f4")
        steps = unit.section(22, num_bytes=4 * part.shape[0] * part.shape[1])
        spread = unit.section(23, num_bytes=channels)
        step = np.repeat(np.frombuffer(steps, "<f4"), spec.num_kv_heads * spec.head_dim)
        x = bits_to_float32(part, spec.dtype).swapaxes(3, 4).reshape(channels, tokens)[:, ~kept]
        with np.errstate(divide="ignore", invalid="ignore"):
            expected = np.rint((x - mean[:, None]) / step[:, None])
        expected[step == 0] = 0  # constant
        integers = reference_reader.read_unit(encoded, integers_only=True)
        order = sorted(range(channels), key=lambda c: (spread[c], c))
        np.testing.assert_array_equal(integers[:, ~kept], expected[order])
        restored = restore_unit(encoded, decode_unit(encoded, DECODER)).values
        np.testing.assert_array_equal(restored, reference_reader.read_unit(encoded))
        np.testing.assert_array_equal(restored[:, :, :, kept], part[:, :, :, kept])
