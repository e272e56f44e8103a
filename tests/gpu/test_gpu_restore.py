"""Restoring on the GPU against restoring on the CPU, profile by profile, into arena blocks.

With ``TRITON_INTERPRET=1`` the kernels are interpreted on the CPU (slow; for work on them without a GPU:
``KVFETCHER_REQUIRE_GPU=1 TRITON_INTERPRET=1 pytest tests/gpu/test_gpu_restore.py``).
"""

import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from kvfetcher.codec.base import LeftToCpuError
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.gpu.rows import EXTRA_FACTOR, HIGH_BITS
from kvfetcher.codec.ladder import artifact, inverse
from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.codec.ladder.library import register_calibration
from kvfetcher.codec.ladder.profile import TransformProfile, plan_restore
from kvfetcher.codec.ladder.rope import rotate_keys
from kvfetcher.codec.profiles import decode_unit, encode_chunk, restore_parsed
from kvfetcher.codec.quant import bits_to_float32, float32_to_bits
from kvfetcher.codec.symbols import escapes
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import ChecksumError, LayoutError
from kvfetcher.format.container import parse_header
from kvfetcher.format.pictures import PlaneGeometry
from kvfetcher.format.sections import ProfileCode, SectionKind
from kvfetcher.format.unit import HAS_LOW_BITS, IS_PACKED, packed_section, parse_unit, write_unit
from kvfetcher.spec import LADDER, KVSpec
from support.calibrations import OnlyPacked, correlated_values, make_calibration
from support.kv_values import special_values

pytestmark = pytest.mark.gpu

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda:0"
GOLDEN = Path(__file__).parents[1] / "data" / "golden"
DTYPES = ("bfloat16", "float16", "float8_e4m3fn")
TOKENS = 48 if IS_INTERPRETED else 256
BLOCK = 16


@pytest.fixture(autouse=True)
def _few_trailing_rows(monkeypatch):
    """Transforms are small here: few rows are worth a product in 8 bits."""
    monkeypatch.setattr(artifact, "MIN_TRAILING", 16)


def _add_scaled_product_int8(out, a, b, scale):
    out += np.matmul(a.astype(np.int32), b.astype(np.int32)) * scale


@pytest.fixture(scope="module")
def restorer():
    from kvfetcher.codec.gpu.restore import GpuRestorer  # the Triton language comes with it

    return GpuRestorer(DEVICE)


def spec_of(dtype="bfloat16", **changes):
    return replace(
        KVSpec(num_layers=4, num_kv_heads=2, head_dim=16 if IS_INTERPRETED else 64, dtype=dtype),
        **changes,
    )


def units_of(profile, spec, values, first_position=0):
    chunk = encode_chunk(
        values,
        spec=spec,
        profile=profile,
        identity=bytes(32),
        chunk_key=bytes(32),
        token_ids=range(values.shape[3]),
        first_position=first_position,
        num_threads=2,
    )
    return [chunk[e.offset : e.stop] for e in parse_header(chunk).units]


def on_gpu(planes, *, high_bits):
    """Planes as NVDEC leaves them (`high_bits`) or as a host decoder gives them."""
    from kvfetcher.codec.gpu.restore import GpuPlanes

    shift = 0
    if planes.dtype == np.uint16:
        if high_bits:
            shift = 16 - int(planes.max()).bit_length() if planes.max() > 1023 else 6
            planes = planes << np.uint16(shift)
        planes = planes.view(np.int16)
    return GpuPlanes(torch.from_numpy(planes.copy()).to(DEVICE), shift)


def restore_both(restorer, data, *, high_bits=True, planes=None):
    """Values [Lg, K, H, T, D] of the CPU, and of the GPU through scattered blocks."""
    from kvfetcher.codec.gpu.restore import Destination

    unit = parse_unit(data)
    decoded = decode_unit(data, VideoDecoder()) if planes is None else planes
    # As by a CPU with VNNI, but for pictures whose integers pass 8 bits.
    in_8_bits = unit.geometry.bit_depth == 8
    with (
        patch.object(artifact, "has_int8_product", lambda: in_8_bits),
        patch.object(inverse, "add_scaled_product_int8", _add_scaled_product_int8),
    ):
        expected = restore_parsed(unit, decoded)
    assert restorer.can_restore(unit)
    spec, tokens = unit.spec, unit.num_tokens
    count = -(-tokens // BLOCK)
    kind = torch.int16 if spec.item_bytes == 2 else torch.uint8
    shape = (count + 3, spec.num_layers, spec.kv_factor, spec.num_kv_heads, BLOCK, spec.head_dim)
    blocks = torch.full(shape, 77, dtype=kind, device=DEVICE)
    ids = np.random.default_rng(3).permutation(count + 3)[:count].astype(np.int32)
    to = Destination(blocks, torch.from_numpy(ids).to(DEVICE), unit.layer_start)
    pending = restorer.begin(unit, on_gpu(decoded, high_bits=high_bits), to)
    errors = restorer.finish(restorer.close_batch([pending]))
    bits = blocks.cpu().numpy()
    layers = slice(unit.layer_start, unit.layer_start + unit.num_layers)
    parts = [bits[i, layers] for i in ids]
    got = np.concatenate(parts, axis=3)[:, :, :, :tokens].view(expected.dtype)
    untouched = np.delete(bits, ids, axis=0)
    assert (untouched == 77).all()
    outside = [layer for layer in range(spec.num_layers) if layer not in range(*layers.indices(99))]
    assert (bits[:, outside] == 77).all()
    if tokens % BLOCK:
        assert (bits[ids[-1], layers, :, :, tokens % BLOCK :] == 77).all()
    return expected, got, errors


def assert_same_rounding(got, expected, dtype):
    """At most one step of the dtype apart, and that seldom, but near zero (sums that cancel)."""
    differs = got != expected  # tokens kept exact may hold NaN
    a, b = (np.where(differs, bits_to_float32(x, dtype), 0) for x in (got, expected))
    mantissa = {"bfloat16": 7, "float16": 10, "float8_e4m3fn": 3}[dtype]
    step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(b), 1e-9))) - mantissa)
    if IS_INTERPRETED and dtype == "bfloat16":  # the interpreter cuts instead of rounding
        step = step * 2
    # The inverse transform has 11 bits: a sum that cancels is right to its terms, not to its result.
    values = np.nan_to_num(bits_to_float32(expected, dtype))
    channel = np.sqrt(np.square(values, dtype=np.float64).mean(axis=3, keepdims=True)) + 1e-6
    worst = np.abs(a.astype(np.float64) - b) - (step * 1.01 + channel * 2.0**-8)
    assert worst.max() <= 0, f"{(worst > 0).sum()} of {worst.size} values, {worst.max()}"
    if not (IS_INTERPRETED and dtype == "bfloat16"):
        assert differs.mean() < (0.6 if dtype == "float16" else 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [TOKENS, TOKENS - 5])
def test_exact_gives_the_same_bits(restorer, dtype, num_tokens):
    spec = spec_of(dtype)
    for unit in units_of(ExactProfile(unit_layers=2), spec, special_values(spec, num_tokens)):
        expected, got, errors = restore_both(restorer, unit)
        assert errors == [None]
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_beside_an_arena_are_the_same_and_checked(restorer, dtype):
    spec = spec_of(dtype)
    for data in units_of(ExactProfile(unit_layers=2), spec, special_values(spec, TOKENS)):
        unit, decoded = parse_unit(data), decode_unit(data, VideoDecoder())
        expected = restore_parsed(unit, decoded)
        got = restorer.restore(unit, on_gpu(decoded, high_bits=True))
        np.testing.assert_array_equal(got.cpu().numpy().view(expected.dtype), expected)
        damaged = decoded.copy()
        damaged.reshape(-1)[:40] ^= 1
        with pytest.raises(ChecksumError):
            restorer.restore(unit, on_gpu(damaged, high_bits=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_uncalibrated_gives_the_same_bits(restorer, dtype):
    spec = spec_of(dtype)
    values = float32_to_bits(correlated_values(spec, TOKENS), dtype)
    values[1, 0, 1, 9, 3] = 0x7F if spec.item_bytes == 1 else 0x7FC1  # NaN: a token kept exact
    for high_bits in (False, True):
        for unit in units_of(UncalibratedProfile(unit_layers=2), spec, values):
            expected, got, errors = restore_both(restorer, unit, high_bits=high_bits)
            assert errors == [None]
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", LADDER)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ladder_gives_the_same_values_within_rounding(restorer, name, dtype):
    spec = spec_of(dtype)
    calibration = make_calibration(spec_of(), layers=2)
    register_calibration(calibration)
    values = float32_to_bits(correlated_values(spec, TOKENS), dtype)
    for first_position in (0, 4096):
        for unit in units_of(TransformProfile(name, calibration), spec, values, first_position):
            expected, got, errors = restore_both(restorer, unit)
            assert errors == [None]
            assert_same_rounding(got, expected, dtype)


@pytest.mark.parametrize("name", ["near", "compact"])  # all of the calibration's rows, or some
@pytest.mark.parametrize("heads", [0, 1])
def test_joined_layer_groups_head_groups_and_partial_blocks(restorer, heads, name):
    spec = spec_of()
    calibration = make_calibration(spec, layers=1, heads=heads)
    register_calibration(calibration)
    values = float32_to_bits(correlated_values(spec, TOKENS - 3), spec.dtype)
    profile = TransformProfile(name, calibration, frame_sizes=("160x144", "1024x1040"))
    if name != "near" and not heads:
        assert calibration.unit_rank(0, name) < calibration.unit_rank(0, "near")
    units = units_of(profile, spec, values)
    for unit in units:
        expected, got, errors = restore_both(restorer, unit)
        assert errors == [None]
        assert_same_rounding(got, expected, spec.dtype)


@pytest.mark.parametrize("heads", [0, 1])
@pytest.mark.parametrize("num_tokens", [TOKENS, TOKENS - 3])  # words of the digest, and not
@pytest.mark.parametrize("name", ["near", "compact"])
@pytest.mark.parametrize("outlier", [1, 400])
@pytest.mark.parametrize("in_8_bits", [True, False])
def test_packed_rows_give_the_bits_of_pictures(
    restorer, monkeypatch, name, num_tokens, heads, outlier, in_8_bits
):
    if not in_8_bits:  # no transform has so many rows
        monkeypatch.setattr(artifact, "MIN_TRAILING", 1 << 20)
        restorer = type(restorer)(DEVICE)  # it keeps which rows are trailing
    spec = spec_of()
    calibration = make_calibration(spec, layers=2, heads=heads)
    register_calibration(calibration)
    values = correlated_values(spec, num_tokens)
    rotate_keys(values[:, 0], calibration.rope, 0)  # the values that the calibration is for
    values[:, :, :, 17] *= outlier
    bits = float32_to_bits(values, spec.dtype)
    pictures, packed = (
        units_of(profile, spec, bits)
        for profile in (
            TransformProfile(name, calibration, ("160x1040",)),
            OnlyPacked(name, calibration),
        )
    )
    found = []
    for units in (pictures, packed):
        for unit in units:
            expected, got, errors = restore_both(restorer, unit)
            assert errors == [None]
            # A sum of an outlier's terms is right to these, which are as large as its largest values.
            others, of_outlier = np.arange(num_tokens) != 17, slice(17, 18)
            assert_same_rounding(got[..., others, :], expected[..., others, :], spec.dtype)
            a, b = (bits_to_float32(x[..., of_outlier, :], spec.dtype) for x in (got, expected))
            assert np.abs(a - b).max() <= 2.0**-7 * np.abs(b).max()
            found.append(got)
    assert all(parse_unit(unit).flags & IS_PACKED for unit in packed)
    is_shallow = all(parse_unit(unit).geometry.bit_depth == 8 for unit in pictures)
    assert is_shallow or outlier > 1
    if is_shallow or not in_8_bits:  # of deeper pictures all rows are multiplied as float16
        half = len(pictures)
        np.testing.assert_array_equal(np.concatenate(found[:half]), np.concatenate(found[half:]))


@pytest.mark.skipif(IS_INTERPRETED, reason="nothing is compiled")
def test_values_are_stored_16_bytes_at_a_time(restorer, monkeypatch):
    from kvfetcher.codec.gpu import kernels as gpu_kernels

    compiled = []

    class Recorder:
        def __getitem__(self, grid):
            kernel = restore_columns[grid]
            return lambda *args, **options: compiled.append(kernel(*args, **options))

    restore_columns = gpu_kernels.restore_columns
    monkeypatch.setattr(gpu_kernels, "restore_columns", Recorder())
    # Layers whose dims are rotated half by half; further layers of this model have no such runs.
    spec = spec_of(num_layers=2)
    calibration = make_calibration(spec, layers=2)
    register_calibration(calibration)
    values = float32_to_bits(correlated_values(spec, TOKENS), spec.dtype)
    (data,) = units_of(TransformProfile("balanced", calibration), spec, values)
    restorer.restore(parse_unit(data), on_gpu(decode_unit(data, VideoDecoder()), high_bits=True))
    # The compiler must know of every argument in a mask or a place that it is a multiple of 16.
    (kernel,) = compiled
    assert "st.global.v4.b32" in kernel.asm["ptx"]
    assert "st.global.b16" not in kernel.asm["ptx"]
    # Else the operands of the 8-bit product are loaded byte by byte, in eight times the time.
    assert kernel.n_spills < 64


def test_two_picture_sizes_of_the_same_rows(restorer):
    """Rows of later head groups lie elsewhere, although ranks, step and tokens are equal."""
    spec = spec_of(num_layers=6, head_dim=64)
    calibration = make_calibration(spec, layers=6, heads=1)
    # An odd number of lines, which two pictures share unevenly.
    while -(-calibration.unit_rank(0, "near") // 3) % 2 == 0:
        steps = {name: 1.01 * step for name, step in calibration.steps.items()}
        calibration = calibration.with_steps(steps)
    register_calibration(calibration)
    values = float32_to_bits(correlated_values(spec, 16), spec.dtype)
    profile = TransformProfile("near", calibration, frame_sizes=("160x144", "160x1040"))
    units = units_of(profile, spec, values)
    layouts = {plan_restore(parse_unit(unit)).layout.rows_per_head_group for unit in units}
    assert len(layouts) == len(units) == 2
    for unit in units:
        expected, got, errors = restore_both(restorer, unit)
        assert errors == [None]
        assert_same_rounding(got, expected, spec.dtype)


def test_outliers_beyond_half_precision_are_right(restorer):
    """A step so small that some integers pass 2048: they are added in float32."""
    spec = spec_of()
    calibration = make_calibration(spec, layers=2)
    fine = calibration.with_steps({name: step / 60 for name, step in calibration.steps.items()})
    register_calibration(fine)
    values = float32_to_bits(correlated_values(spec, TOKENS), spec.dtype)
    for unit in units_of(TransformProfile("near", fine), spec, values):
        expected, got, errors = restore_both(restorer, unit)
        assert errors == [None]
        assert_same_rounding(got, expected, spec.dtype)


@pytest.mark.parametrize("name", sorted(p.stem for p in GOLDEN.glob("*.kvf")))
def test_golden_chunks(restorer, name):
    artifact = GOLDEN / f"{name}.safetensors"
    if artifact.is_file():
        register_calibration(Calibration.load(artifact))
    chunk = (GOLDEN / f"{name}.kvf").read_bytes()
    for entry in parse_header(chunk).units:
        data = chunk[entry.offset : entry.stop]
        unit = parse_unit(data)
        if name.startswith("paper") or unit.profile == ProfileCode.RAW:
            assert not restorer.can_restore(unit)
            continue
        expected, got, errors = restore_both(restorer, data)
        assert errors == [None]
        if artifact.is_file():
            assert_same_rounding(got, expected, unit.spec.dtype)
        else:
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("profile", [ExactProfile(), UncalibratedProfile()])
def test_one_wrong_sample_is_found(restorer, profile):
    from kvfetcher.codec.gpu.restore import Destination

    spec = spec_of()
    values = float32_to_bits(correlated_values(spec, TOKENS), spec.dtype)
    data = units_of(profile, spec, values)[0]
    unit = parse_unit(data)
    planes = decode_unit(data, VideoDecoder())
    good = restorer.begin(unit, on_gpu(planes, high_bits=False), Destination.fresh(unit, DEVICE))
    planes[0, 1, 3, 7] ^= 1
    bad = restorer.begin(unit, on_gpu(planes, high_bits=False), Destination.fresh(unit, DEVICE))
    first, second = restorer.finish(restorer.close_batch([good, bad]))
    assert first is None
    assert isinstance(second, ChecksumError)
    assert "damaged" in str(second)


def test_what_does_not_fit_is_refused(restorer):
    from kvfetcher.codec.gpu.restore import Destination, GpuPlanes

    spec = spec_of()
    values = float32_to_bits(correlated_values(spec, TOKENS), spec.dtype)
    data = units_of(ExactProfile(), spec, values)[0]
    unit = parse_unit(data)
    planes = on_gpu(decode_unit(data, VideoDecoder()), high_bits=False)
    with pytest.raises(LayoutError, match="planes must be"):
        restorer.begin(unit, GpuPlanes(planes.data[:, :, 1:], 0), Destination.fresh(unit, DEVICE))
    blocks = torch.zeros((1, 4, 2, 2, BLOCK, spec.head_dim), dtype=torch.int16, device=DEVICE)
    ids = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(LayoutError, match="does not fit 1 blocks"):
        restorer.begin(unit, planes, Destination(blocks, ids, 0))
    huge = replace(unit, geometry=PlaneGeometry(3, 4096, 4096, 8))
    assert not restorer.can_restore(huge)


@pytest.mark.parametrize("outlier", [1, 40, 400])
def test_integers_of_wide_rows_and_escapes_are_exact(restorer, outlier):
    spec = spec_of()
    calibration = make_calibration(spec, layers=2)
    register_calibration(calibration)
    values = correlated_values(spec, TOKENS)
    rotate_keys(values[:, 0], calibration.rope, 0)  # the values that the calibration is for
    values[:, :, :, 17] *= outlier
    values = float32_to_bits(values, spec.dtype)
    num_escapes = 0
    pictures = units_of(TransformProfile("near", calibration), spec, values)
    for data in pictures + units_of(OnlyPacked("near", calibration), spec, values):
        unit, planes = parse_unit(data), decode_unit(data, VideoDecoder())
        plan = plan_restore(unit)
        assert unit.flags == HAS_LOW_BITS | (0 if plan.packed is None else IS_PACKED)
        grid = plan.layout.grid
        if plan.packed is None:
            samples = grid.gather(planes)
        else:
            samples = plan.packed.unpack(unit.num_tokens)
        expected = samples.astype(np.int64) - (1 << (unit.geometry.bit_depth - 1))
        places, escaped = escapes(unit, plan.num_escapes, expected.size)
        expected.reshape(-1)[places] = escaped
        num_escapes += len(places) if plan.packed is None else 0
        got = restorer._integers(unit, plan, on_gpu(planes, high_bits=True))
        low_bits = plan.low_bits(unit.num_tokens)
        for number, (place, low) in enumerate(zip(plan.places, low_bits, strict=True)):
            rows = plan.layout.rows_of(place)
            expected[rows][: len(low.low)] <<= low.shifts[:, None]
            expected[rows][: len(low.low)] |= low.low
            np.testing.assert_array_equal(integers_of(got, number), expected[rows])
        is_shallow = unit.geometry.bit_depth == 8
        assert all(bool(part.num_trailing) == is_shallow for part in got.parts)
        assert is_shallow or outlier > 1
    assert (num_escapes > 0) == (outlier > 1)


def integers_of(got, number):
    """Those of one transform, put together from all that holds parts of them."""
    part, num_high = got.parts[number], got.num_high[number]
    leading = slice(part.first_leading, part.first_leading + part.num_leading)
    integers = got.samples[leading].cpu().numpy().astype(np.int64)
    high = got.high[leading][:num_high].cpu().numpy().astype(np.int64)
    integers[:num_high] += high << HIGH_BITS
    columns = slice(part.first_trailing, part.first_trailing + part.num_trailing)
    trailing = got.trailing[:, columns].cpu().numpy().T.astype(np.int64)
    if got.extra:
        rows = got.extra[number].columns.cpu().numpy()
        amounts = got.extra[number].amounts.cpu().numpy().astype(np.int64)
        np.add.at(trailing, rows // 2, np.where(rows % 2, EXTRA_FACTOR, 1)[:, None] * amounts)
    return np.concatenate([integers, trailing])


def test_integers_beyond_two_halves_are_left_to_the_cpu(restorer):
    from kvfetcher.codec.gpu.restore import Destination

    spec = spec_of()
    calibration = make_calibration(spec, layers=2)
    register_calibration(calibration)
    values = float32_to_bits(correlated_values(spec, TOKENS), spec.dtype)
    data = units_of(TransformProfile("near", calibration), spec, values)[0]
    unit, planes = parse_unit(data), decode_unit(data, VideoDecoder())
    params = bytearray(unit.params)
    params[52:56] = (1).to_bytes(4, "little")  # the number of escapes
    sections = {s.kind: s for s in unit.sections}
    sections[SectionKind.ESCAPE_INDICES] = packed_section(SectionKind.ESCAPE_INDICES, bytes(4))
    huge = (1 << 26).to_bytes(4, "little")
    sections[SectionKind.ESCAPE_VALUES] = packed_section(SectionKind.ESCAPE_VALUES, huge)
    unit = parse_unit(
        write_unit(replace(unit, params=bytes(params), sections=tuple(sections.values())))
    )
    with pytest.raises(LeftToCpuError, match="beyond"):
        restorer.begin(unit, on_gpu(planes, high_bits=True), Destination.fresh(unit, DEVICE))
