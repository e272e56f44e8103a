import struct

import numpy as np
import pytest

from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.profiles import decode_unit, restore_unit
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import ChecksumError, FormatError
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import KVSpec
from support import reference_reader
from support.kv_values import finite_values, special_values
from support.tamper import resealed_unit as resealed

DTYPES = ["bfloat16", "float16", "float8_e4m3fn"]


def encode(spec, values, layer_start=0):
    source = UnitSource(values[layer_start:], spec, layer_start, first_position=0)
    return ExactProfile().encode(source, "-")


def restore(data):
    return restore_unit(data, decode_unit(data, VideoDecoder()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 33, 256])
def test_every_bit_comes_back(dtype, tokens):
    spec = KVSpec(3, 2, 24, dtype=dtype)
    values = special_values(spec, tokens)
    data = encode(spec, values, layer_start=1)
    restored = restore(data)
    assert restored.layer_start == 1
    assert restored.values.dtype == values.dtype
    assert restored.values.flags.c_contiguous
    np.testing.assert_array_equal(restored.values, values[1:])
    np.testing.assert_array_equal(reference_reader.read_unit(data), values[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_of_the_dtype_comes_back(dtype):
    size = 256 if "8" in dtype else 65536
    spec = KVSpec(1, 1, 64, kv_factor=1, dtype=dtype)
    values = np.arange(size).astype(np.uint8 if "8" in dtype else np.uint16)
    values = np.random.default_rng(0).permutation(values).reshape(1, 1, 1, -1, 64)
    np.testing.assert_array_equal(restore(encode(spec, values)).values, values)


@pytest.mark.parametrize("pattern", [0, 0x7FC0, 0xFFFF, 0x3F80])
def test_constant_values_come_back(pattern):
    spec = KVSpec(2, 2, 8)
    values = np.full((2, 2, 2, 40, 8), pattern, np.uint16)
    data = encode(spec, values)
    assert len(data) < 3000
    np.testing.assert_array_equal(restore(data).values, values)


def test_long_and_wide_units_take_several_pictures():
    spec = KVSpec(1, 2, 16)
    values = finite_values(spec, 2100)
    data = encode(spec, values)
    assert parse_unit(data).geometry.shape == (3, 3, 144, 700)
    np.testing.assert_array_equal(restore(data).values, values)
    spec = KVSpec(1, 8, 1600)  # 25,600 channels: more lines than a picture may have
    values = finite_values(spec, 8)
    data = encode(spec, values)
    assert parse_unit(data).geometry.shape == (2, 3, 4267, 144)
    np.testing.assert_array_equal(restore(data).values, values)


def test_units_hold_as_many_layers_as_make_a_good_picture():
    assert ExactProfile().layer_groups(KVSpec(7, 3, 64), 256, "-") == ((0, 5), (5, 2))
    assert ExactProfile().layer_groups(KVSpec(2, 8, 128), 256, "-") == ((0, 1), (1, 1))
    assert ExactProfile(unit_layers=3).layer_groups(KVSpec(4, 8, 128), 256, "-") == ((0, 3), (3, 1))


def test_wrong_samples_are_reported_not_restored():
    spec = KVSpec(1, 2, 16)
    data = encode(spec, finite_values(spec, 50))
    planes = decode_unit(data, VideoDecoder())
    planes[0, 1, 3, 5] ^= 1
    with pytest.raises(ChecksumError, match="layers 0 to 0: the restored values differ"):
        restore_unit(data, planes)


def test_padding_is_ignored():
    spec = KVSpec(1, 2, 16)
    values = finite_values(spec, 50)
    data = encode(spec, values)
    planes = decode_unit(data, VideoDecoder())
    planes[:, :, :, 50:] = 3
    planes[:, :, 22:] = 4
    np.testing.assert_array_equal(restore_unit(data, planes).values, values)


@pytest.mark.parametrize(
    ("offset", "replacement", "match"),
    [
        (88, struct.pack("<I", 0), "1 to 8192 picture rows"),
        (88, struct.pack("<I", 10000), "1 to 8192 picture rows"),
        (88, struct.pack("<I", 5), "its values need"),
        (92, struct.pack("<I", 25), "its values need"),
        (48, struct.pack("<I", 49), "must be"),
        (68, b"\x0a", "its values need"),
        (69, b"\1", "its values need"),
    ],
)
def test_unit_whose_parts_disagree_is_refused(offset, replacement, match):
    spec = KVSpec(1, 2, 16)
    data = encode(spec, finite_values(spec, 50))
    bad = resealed(data, offset, replacement)
    planes = np.zeros(parse_unit(bad).geometry.shape, parse_unit(bad).geometry.dtype)
    with pytest.raises(FormatError, match=match):
        restore_unit(bad, planes)
