import struct

import numpy as np
import pytest

from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.layout import Tiling
from kvfetcher.codec.paper import PaperProfile, search_tiling
from kvfetcher.codec.profiles import decode_unit, restore_unit
from kvfetcher.codec.quant import bits_to_float32
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import ChecksumError, CodecError, ConfigError, FormatError, LayoutError
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import KVSpec
from support import reference_reader
from support.kv_values import finite_values
from support.tamper import resealed_unit as resealed

SPEC = KVSpec(4, 3, 20)


def encode(profile, spec=SPEC, tokens=37, variant=None):
    source = UnitSource(finite_values(spec, tokens), spec, 0, first_position=0)
    return profile.encode(source, variant or profile.frame_sizes[0])


def restore(data):
    return restore_unit(data, decode_unit(data, VideoDecoder())).values


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("bits", [2, 8, 9, 12])
@pytest.mark.parametrize("inter", [False, True])
def test_restored_values_are_those_of_the_independent_reader(dtype, bits, inter):
    spec = KVSpec(4, 3, 20, dtype=dtype)
    data = encode(PaperProfile(("152x144",), bits=bits, inter=inter), spec)
    expected = reference_reader.read_unit(data)
    values = restore(data)
    assert values.dtype == expected.dtype
    np.testing.assert_array_equal(values, expected)


def test_error_is_at_most_half_a_quantiser_step_and_the_rounding_of_the_dtype():
    spec = KVSpec(3, 2, 16, dtype="float16")
    values = bits_to_float32(finite_values(spec, 60), "float16")
    restored = bits_to_float32(restore(encode(PaperProfile(("144x144",)), spec, 60)), "float16")
    step = np.ptp(values, axis=3, keepdims=True) / 255
    assert (np.abs(restored - values) <= 0.5 * step + 1e-3 * np.abs(values) + 1e-6).all()


def test_variants_hold_the_same_integers_in_other_pictures():
    profile = PaperProfile(("144x144", "640x360"))
    small, large = (encode(profile, tokens=800, variant=v) for v in profile.variants())
    assert parse_unit(small).geometry.num_frames > parse_unit(large).geometry.num_frames
    assert parse_unit(small).integer_digest == parse_unit(large).integer_digest
    np.testing.assert_array_equal(restore(small), restore(large))


def test_predicted_pictures_start_anew_for_each_run():
    data = encode(PaperProfile(("144x144",)), tokens=800)
    unit = parse_unit(data)
    runs, frames = 4, unit.geometry.num_frames // 4  # K and V of layers 0-2, K and V of layer 3
    assert frames > 1
    planes = decode_unit(data, VideoDecoder())
    for run in range(runs):
        part = slice(run * frames, (run + 1) * frames)
        packets = unit.packets()[part]
        geometry = type(unit.geometry)(frames, 144, unit.geometry.height, 8)
        assert (VideoDecoder().decode(packets, geometry) == planes[part]).all()


def test_tiling_is_chosen_by_measured_size():
    spec = KVSpec(3, 2, 12)
    values = finite_values(spec, 40)
    costs = search_tiling(values, spec=spec, frame_size="144x144", bits=4, inter=True)
    assert {c.tiling for c in costs} == set(Tiling.all(2, 12))
    assert [c.num_bytes for c in costs] == sorted(c.num_bytes for c in costs)
    best = PaperProfile(("144x144",), bits=4, tiling=costs[0].tiling)
    source = UnitSource(values, spec, 0, 0)
    assert len(best.encode(source, "144x144")) == costs[0].num_bytes
    np.testing.assert_array_equal(restore(best.encode(source, "144x144")).shape, values.shape)


def test_values_that_the_quantiser_cannot_hold_are_refused():
    values = finite_values(SPEC, 8)
    values[1, 0, 2, 3, 4] = 0x7FC0
    with pytest.raises(CodecError, match="save them with profile exact"):
        PaperProfile(("144x144",)).encode(UnitSource(values, SPEC, 0, 0), "144x144")


def test_token_larger_than_the_picture_is_refused():
    with pytest.raises(LayoutError, match="choose a larger frame size"):
        encode(PaperProfile(("144x144",)), KVSpec(1, 64, 512), tokens=2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bits": 1}, "codec.paper_bits must be 2 to 12, got 1"),
        ({"bits": 13}, "codec.paper_bits"),
        ({"frame_sizes": ()}, "one or more frame sizes"),
        ({"frame_sizes": ("144x144", "144x144")}, "each size once"),
        ({"frame_sizes": ("640*360",)}, "a size is WIDTHxHEIGHT"),
        ({"frame_sizes": ("640x143",)}, "each 144 to 8192"),
        ({"frame_sizes": ("8193x144",)}, "each 144 to 8192"),
    ],
)
def test_parameters_are_checked(changes, match):
    with pytest.raises(ConfigError, match=match):
        PaperProfile(**{"frame_sizes": ("640x360",), **changes})


def test_wrong_samples_are_reported_not_restored():
    data = encode(PaperProfile(("144x144",)))
    planes = decode_unit(data, VideoDecoder())
    planes[0, 0, 0, 0] ^= 1
    with pytest.raises(ChecksumError, match="decoded integers differ"):
        restore_unit(data, planes)


@pytest.mark.parametrize(
    ("offset", "replacement", "match"),
    [
        (88, struct.pack("<H", 2), "does not hold 3 heads of 20"),
        (88, struct.pack("<HHHH", 3, 1, 0, 0), "does not hold"),
        (96, struct.pack("<I", 0), "needs tiles and slots"),
        (96, struct.pack("<I", 1 << 30), "picture height must be"),
        (104, b"\1", "bits 1"),
        (104, b"\x0c", "its values need"),
        (105, b"\2", "inter 2"),
        (106, b"\1", "reserved 1"),
        (48, struct.pack("<I", 4000), "its values need"),
    ],
)
def test_unit_whose_parts_disagree_is_refused(offset, replacement, match):
    bad = resealed(encode(PaperProfile(("144x144",))), offset, replacement)
    planes = np.zeros(parse_unit(bad).geometry.shape, np.uint8)
    with pytest.raises(FormatError, match=match):
        restore_unit(bad, planes)
