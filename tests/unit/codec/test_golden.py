"""Chunks written once (tests/data/golden/PROVENANCE.md) are read the same for ever."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.codec.ladder.library import register_calibration
from kvfetcher.codec.profiles import decode_unit, describe_chunk, restore_unit
from kvfetcher.codec.quant import bits_to_float32
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.format.container import check_unit, parse_header
from kvfetcher.format.unit import parse_unit
from support import reference_reader

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
ALL = json.loads((GOLDEN / "expected.json").read_text())
LAST_PLACE = {"bfloat16": 7, "float16": 10, "float8_e4m3fn": 3}
# Profiles that restore by integer or single IEEE operations give the same bits everywhere.
EXPECTED = {name: entry for name, entry in ALL.items() if "artifact" not in entry}
LADDER = {name: entry for name, entry in ALL.items() if "artifact" in entry}


def test_every_golden_file_is_expected_and_small():
    files = sorted(GOLDEN.glob("*.kvf"))
    assert [f.stem for f in files] == sorted(ALL)
    assert sum(f.stat().st_size for f in files) < 200_000


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_golden_chunk_restores_to_the_recorded_values(name):
    data = (GOLDEN / f"{name}.kvf").read_bytes()
    assert hashlib.sha256(data).hexdigest() == EXPECTED[name]["file_sha256"]
    header = parse_header(data)
    decoder = VideoDecoder()
    for variant in header.variants:
        parts = []
        for entry in header.units_of(variant):
            unit = data[entry.offset : entry.stop]
            check_unit(header, entry, unit)
            parts.append(restore_unit(unit, decode_unit(unit, decoder)).values)
        values = np.concatenate(parts)
        assert list(values.shape) == EXPECTED[name]["values_shape"]
        assert hashlib.sha256(values.tobytes()).hexdigest() == EXPECTED[name]["values_sha256"]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_independent_reader_agrees_with_every_variant(name):
    data = (GOLDEN / f"{name}.kvf").read_bytes()
    header = parse_header(data)
    for variant in header.variants:
        fields, values = reference_reader.read_chunk(data, variant)
        assert hashlib.sha256(values.tobytes()).hexdigest() == EXPECTED[name]["values_sha256"]
        assert fields["token_ids"] == list(header.token_ids)
        assert fields["profile"] == header.profile
        assert fields["chunk_key"] == header.chunk_key
    assert describe_chunk(data)["num_tokens"] == values.shape[3]


def read_ladder(name):
    """(chunk, values of the package, values of the independent reader), the last two as int64."""
    data = (GOLDEN / f"{name}.kvf").read_bytes()
    artifact = GOLDEN / f"{name}.safetensors"
    assert hashlib.sha256(data).hexdigest() == LADDER[name]["file_sha256"]
    assert register_calibration(Calibration.load(artifact)) == LADDER[name]["artifact"]
    decoder = VideoDecoder()
    parts = []
    for entry in parse_header(data).units:
        unit = data[entry.offset : entry.stop]
        parts.append(restore_unit(unit, decode_unit(unit, decoder)).values)
    _, other = reference_reader.read_chunk(data, artifact=artifact)
    return data, np.concatenate(parts), other


@pytest.mark.parametrize("name", sorted(LADDER))
def test_ladder_chunk_restores_to_the_recorded_values_but_for_float_rounding(name):
    data, values, other = read_ladder(name)
    recorded = np.frombuffer((GOLDEN / f"{name}.values").read_bytes(), values.dtype)
    recorded = recorded.reshape(LADDER[name]["values_shape"])
    dtype = parse_header(data).spec.dtype
    for read in (values, other):
        # Sums of binary32 in another order: a last place of the KV dtype here and there.
        a, b = bits_to_float32(read, dtype), bits_to_float32(recorded, dtype)
        np.testing.assert_allclose(a, b, rtol=2.0 ** -LAST_PLACE[dtype], atol=1e-4)
        assert np.mean(read != recorded) < 0.02


@pytest.mark.parametrize("name", sorted(LADDER))
def test_ladder_chunk_keeps_sinks_and_what_is_not_finite(name):
    data, values, other = read_ladder(name)
    sinks = range(max(0, 4 - parse_header(data).first_position))
    for token in (*sinks, 7):
        np.testing.assert_array_equal(values[:2, :, :, token], other[:2, :, :, token])


def test_ladder_covers_units_of_several_layer_groups():
    (entry,) = parse_header((GOLDEN / "ladder_joined_groups.kvf").read_bytes()).units
    assert (entry.layer_start, entry.num_layers, entry.variant) == (0, 5, "144x144")


def test_ladder_covers_every_bit_depth_escapes_and_head_groups():
    units = {
        name: [parse_unit(data[entry.offset : entry.stop]) for entry in parse_header(data).units]
        for name in LADDER
        for data in [(GOLDEN / f"{name}.kvf").read_bytes()]
    }
    assert {u.geometry.bit_depth for us in units.values() for u in us} == {8, 10, 12}
    escapes = [
        s.raw_bytes for u in units["ladder_12bit_escapes"] for s in u.sections if s.kind == 17
    ]
    assert max(escapes) > 0
    assert units["ladder_10bit_head_groups"][0].geometry.num_frames == 2


def test_low_bits_are_covered_with_escapes_later_positions_and_both_rotations():
    for name, depth in (("ladder_low_bits", 8), ("ladder_low_bits_escapes", 12)):
        data, _, _ = read_ladder(name)
        header = parse_header(data)
        assert header.first_position > 0
        for entry in header.units:
            unit = parse_unit(data[entry.offset : entry.stop])
            sizes = {section.kind: section.raw_bytes for section in unit.sections}
            assert (unit.flags, unit.geometry.bit_depth, sizes[24] > 0) == (1, depth, True)
            assert (sizes[17] > 0) == (depth == 12)
        rope = Calibration.load(GOLDEN / f"{name}.safetensors").rope
        assert {k.style for k in rope.layers if k.inv_freq} == {"half", "interleaved"}


def test_packed_rows_are_covered_with_low_bits_escapes_and_head_groups():
    data, _, _ = read_ladder("ladder_packed")
    (entry,) = parse_header(data).units
    unit = parse_unit(data[entry.offset : entry.stop])
    sizes = {section.kind: section.raw_bytes for section in unit.sections}
    assert (entry.variant, unit.flags, unit.geometry.num_frames) == ("packed", 3, 0)
    assert min(sizes[17], sizes[24], sizes[25], sizes[26]) > 0
    calibration = Calibration.load(GOLDEN / "ladder_packed.safetensors")
    assert len(calibration.grouping.head_ranges) == 2


@pytest.mark.parametrize("depth", [8, 10, 12])
def test_uncalibrated_quantises_most_tokens_at_every_bit_depth(depth):
    data = (GOLDEN / f"uncalibrated_{depth}bit.kvf").read_bytes()
    for entry in parse_header(data).units:
        unit = parse_unit(data[entry.offset : entry.stop])
        exact = {section.kind: section.raw_bytes for section in unit.sections}[19] // 4
        assert unit.geometry.bit_depth == depth
        assert 0 < exact < unit.num_tokens // 4
