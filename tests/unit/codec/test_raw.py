"""Profile `raw`, and raw copies beside another profile."""

from dataclasses import replace

import numpy as np
import pytest

from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.paper import PaperProfile
from kvfetcher.codec.profiles import (
    decode_unit,
    describe_chunk,
    encode_chunk,
    make_profile,
    restore_unit,
)
from kvfetcher.codec.raw import RawProfile, WithRawCopy
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.config import CodecConfig
from kvfetcher.errors import ChecksumError, FormatError, UnsupportedVersionError
from kvfetcher.format.container import parse_header
from kvfetcher.format.unit import parse_unit, write_unit
from kvfetcher.spec import KVSpec
from support import reference_reader
from support.kv_values import finite_values, special_values
from support.tamper import resealed_sections
from support.tamper import resealed_unit as resealed

SPEC = KVSpec(3, 2, 8)
PROFILE_AT, PICTURES_AT, CODEC_AT = 24, 60, 70


def encode(values, spec=SPEC):
    return RawProfile().encode(UnitSource(values, spec, 0, first_position=0), "raw")


def restore(data):
    return restore_unit(data, decode_unit(data, VideoDecoder())).values


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("tokens", [1, 33])
def test_every_bit_comes_back_without_video(dtype, tokens):
    spec = KVSpec(3, 1, 7, dtype=dtype)
    values = special_values(spec, tokens)
    data = encode(values, spec)
    assert parse_unit(data).packets() == []
    np.testing.assert_array_equal(restore(data), values)
    np.testing.assert_array_equal(reference_reader.read_unit(data), values)


def test_units_are_of_a_few_megabytes():
    llama = KVSpec(32, 8, 128)
    assert RawProfile().layer_groups(llama, 256, "raw")[0] == (0, 4)
    assert RawProfile().layer_groups(llama, 8192, "raw")[0] == (0, 1)
    assert RawProfile(unit_layers=2).layer_groups(SPEC, 64, "raw") == ((0, 2), (2, 1))


def test_a_raw_copy_is_one_more_variant_with_the_same_values():
    profile = make_profile(CodecConfig(profile="exact", raw_copy=True))
    values = special_values(SPEC, 40)
    data = encode_chunk(
        values, spec=SPEC, profile=profile, identity=bytes(32), chunk_key=bytes(32),
        token_ids=range(40), first_position=0, num_threads=1,
    )  # fmt: skip
    header = parse_header(data)
    assert header.variants == ("-", "raw")
    for variant in header.variants:
        units = [data[e.offset : e.stop] for e in header.units_of(variant)]
        np.testing.assert_array_equal(np.concatenate([restore(u) for u in units]), values)
    raw = [unit for unit in describe_chunk(data)["units"] if unit["variant"] == "raw"]
    assert {(u["profile"], u["pictures"], u["picture"]) for u in raw} == {("raw", 0, "")}


def test_only_a_bit_exact_profile_keeps_its_identity_with_a_raw_copy():
    """Whether a lossy chunk or its raw copy is fetched changes the values that the engine sees."""
    assert WithRawCopy(ExactProfile()).identity == ExactProfile().identity
    lossy = PaperProfile(("640x360",), bits=8)
    assert WithRawCopy(lossy).identity != lossy.identity
    assert make_profile(CodecConfig(profile="raw", raw_copy=True)).identity == "raw/1"


def test_changed_values_are_reported():
    data = bytearray(encode(finite_values(SPEC, 20)))
    data[-1] ^= 1
    with pytest.raises(ChecksumError, match="values differ from those saved"):
        restore(resealed_sections(bytes(data)))


def test_a_unit_without_video_describes_no_pictures():
    data = encode(finite_values(SPEC, 20))
    with pytest.raises(FormatError, match="describes no pictures"):
        parse_unit(resealed(data, PICTURES_AT, b"\1"))


def test_video_of_no_pictures_is_refused():
    source = UnitSource(finite_values(SPEC, 20), SPEC, 0, first_position=0)
    data = ExactProfile().encode(source, "-")
    with pytest.raises(FormatError, match="1 to 65536 pictures"):
        parse_unit(resealed(data, PICTURES_AT, bytes(4)))


def test_an_unknown_codec_is_refused():
    data = encode(finite_values(SPEC, 20))
    with pytest.raises(UnsupportedVersionError, match="codec or chroma"):
        parse_unit(resealed(data, CODEC_AT, b"\2"))


def test_a_unit_of_a_video_profile_without_video_is_refused():
    data = resealed(encode(finite_values(SPEC, 20)), PROFILE_AT, b"\1")  # exact
    with pytest.raises(FormatError, match="sections"):
        restore(data)


def test_a_raw_unit_with_parameters_is_refused():
    unit = parse_unit(encode(finite_values(SPEC, 20)))
    with pytest.raises(FormatError, match="neither parameters"):
        restore(write_unit(replace(unit, params=b"1234")))
