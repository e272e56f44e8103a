import json
from dataclasses import replace

import numpy as np
import pytest

from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.profiles import (
    RESTORERS,
    decode_unit,
    describe_chunk,
    encode_chunk,
    make_profile,
    profile_id,
    restore_unit,
)
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.config import CodecConfig
from kvfetcher.errors import (
    ChecksumError,
    CodecError,
    ConfigError,
    FormatError,
    LayoutError,
    UnsupportedVersionError,
)
from kvfetcher.format.container import UnitData, build_chunk, check_unit, parse_header
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import KVSpec
from support.kv_values import finite_values, special_values
from support.tamper import resealed_unit

SPEC = KVSpec(5, 2, 16)
TOKENS = 40


def encode(values=None, *, spec=SPEC, num_threads=2, **config):
    values = special_values(spec, TOKENS) if values is None else values
    return encode_chunk(
        values,
        spec=spec,
        profile=make_profile(CodecConfig(**config)),
        identity=b"i" * 32,
        chunk_key=b"c" * 32,
        parent_key=b"p" * 32,
        token_ids=tuple(range(values.shape[3])),
        first_position=64,
        num_threads=num_threads,
    )


def restore_all(data, variant):
    header = parse_header(data)
    decoder = VideoDecoder()
    parts = []
    for entry in header.units_of(variant):
        unit = data[entry.offset : entry.stop]
        check_unit(header, entry, unit)
        restored = restore_unit(unit, decode_unit(unit, decoder))
        assert restored.layer_start == entry.layer_start
        parts.append(restored.values)
    return np.concatenate(parts)


def test_exact_chunk_round_trip():
    data = encode(unit_layers=2)
    header = parse_header(data)
    assert (header.profile, header.identity, header.chunk_key) == ("exact/1", b"i" * 32, b"c" * 32)
    assert (header.first_position, header.token_ids) == (64, tuple(range(TOKENS)))
    assert [(u.layer_start, u.num_layers) for u in header.units] == [(0, 2), (2, 2), (4, 1)]
    np.testing.assert_array_equal(restore_all(data, "-"), special_values(SPEC, TOKENS))


def test_paper_chunk_holds_all_its_frame_sizes():
    sizes = ("144x144", "640x360")
    data = encode(finite_values(SPEC, TOKENS), profile="paper", frame_sizes=sizes, paper_bits=9)
    assert parse_header(data).variants == sizes
    np.testing.assert_array_equal(restore_all(data, sizes[0]), restore_all(data, sizes[1]))


@pytest.mark.parametrize("profile", ["exact", "uncalibrated"])
def test_larger_pictures_hold_more_layers_of_the_same_values(profile):
    spec = KVSpec(5, 2, 64)  # 256 channels a layer
    sizes = ("144x144", "64x144", "144x300")
    with pytest.raises(ConfigError, match="each 144 to 8192"):
        encode(spec=spec, profile=profile, frame_sizes=sizes)
    sizes = ("144x144", "144x300")
    data = encode(spec=spec, profile=profile, frame_sizes=sizes)
    header = parse_header(data)
    layers = {s: [u.num_layers for u in header.units_of(s)] for s in sizes}
    assert layers == {"144x144": [1, 1, 1, 1, 1], "144x300": [3, 2]}
    np.testing.assert_array_equal(restore_all(data, sizes[0]), restore_all(data, sizes[1]))
    for unit in describe_chunk(data)["units"]:
        width, height = map(int, unit["picture"].split("x"))
        limit_width, limit_height = map(int, unit["variant"].split("x"))
        assert unit["pictures"] == 1
        assert (width <= limit_width, height <= limit_height) == (True, True)


def test_a_picture_narrower_than_the_chunk_is_repeated():
    values = finite_values(SPEC, 200)
    data = encode(values, frame_sizes=("144x144",))
    assert {u["pictures"] for u in describe_chunk(data)["units"]} == {2}
    np.testing.assert_array_equal(restore_all(data, "144x144"), values)


def test_bytes_do_not_depend_on_the_number_of_threads():
    assert encode(num_threads=1, unit_layers=1) == encode(num_threads=3, unit_layers=1)


def test_units_know_their_position_and_model():
    data = encode(unit_layers=2)
    entry = parse_header(data).units[1]
    unit = parse_unit(data[entry.offset : entry.stop])
    assert (unit.spec, unit.first_position, unit.num_tokens) == (SPEC, 64, TOKENS)
    assert (unit.layer_start, unit.num_layers) == (2, 2)


@pytest.mark.parametrize(
    ("offset", "replacement"),
    [
        (26, b"\2"),  # dtype
        (27, b"\1"),  # kv_factor
        (28, (6).to_bytes(4, "little")),  # layers of the model
        (36, (8).to_bytes(4, "little")),  # head dim
        (40, (1).to_bytes(4, "little")),  # first layer
        (44, (1).to_bytes(4, "little")),  # layers
        (48, (41).to_bytes(4, "little")),  # tokens
        (52, (65).to_bytes(8, "little")),  # position
    ],
)
def test_unit_of_another_chunk_is_refused_although_its_digest_is_right(offset, replacement):
    data = encode(unit_layers=2)
    header = parse_header(data)
    parts = [
        UnitData(u.layer_start, u.num_layers, u.variant, data[u.offset : u.stop])
        for u in header.units
    ]
    parts[0] = replace(parts[0], data=resealed_unit(parts[0].data, offset, replacement))
    forged = build_chunk(
        parts,
        spec=SPEC,
        profile=header.profile,
        identity=header.identity,
        chunk_key=header.chunk_key,
        first_position=64,
        token_ids=header.token_ids,
    )
    first, second, _ = parse_header(forged).units
    header = parse_header(forged)
    check_unit(header, second, memoryview(forged)[second.offset : second.stop])
    with pytest.raises(FormatError, match="it says"):
        check_unit(header, first, memoryview(forged)[first.offset : first.stop])
    with pytest.raises(FormatError, match="it says"):
        describe_chunk(forged)


def test_planes_may_come_as_bytes():
    data = encode(finite_values(SPEC, TOKENS), profile="paper", paper_bits=10)
    entry = parse_header(data).units[0]
    unit = data[entry.offset : entry.stop]
    planes = decode_unit(unit, VideoDecoder())
    assert planes.dtype == np.uint16
    restored = restore_unit(unit, planes.view(np.uint8))
    np.testing.assert_array_equal(restored.values, restore_unit(unit, planes).values)


def test_planes_of_another_shape_are_refused():
    data = encode()
    entry = parse_header(data).units[0]
    unit = data[entry.offset : entry.stop]
    planes = decode_unit(unit, VideoDecoder())
    for wrong in (planes[:, :2], planes[:, :, :-1], planes.astype(np.uint16), planes[0]):
        with pytest.raises(LayoutError, match="planes must be"):
            restore_unit(unit, wrong)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_values_that_differ_from_the_spec_are_refused(dtype):
    values = finite_values(SPEC, TOKENS)
    with pytest.raises(LayoutError, match=r"\[L, K, H, T, D\] = \(5, 2, 2, 40, 16\) uint16"):
        encode(values[:, :1])
    with pytest.raises(LayoutError, match="KV values must be"):
        encode(values.astype(np.int32))
    with pytest.raises(LayoutError, match=r"\(5, 2, 2, 0, 16\)"):
        encode(values[:, :, :, :0])


def test_error_in_one_unit_is_the_chunks_error():
    values = finite_values(SPEC, TOKENS)
    values[4, 0, 0, 0, 0] = 0x7F80
    with pytest.raises(CodecError, match="save them with profile exact"):
        encode(values, profile="paper")


def test_profile_that_this_build_does_not_know_is_refused():
    data = encode()
    entry = parse_header(data).units[0]
    unit = data[entry.offset : entry.stop]
    planes = decode_unit(unit, VideoDecoder())
    unknown = resealed_unit(unit, 24, b"\xff\xff")
    assert 0xFFFF not in RESTORERS
    with pytest.raises(UnsupportedVersionError, match="profile 65535, this build restores"):
        restore_unit(unknown, planes)


def test_identity_text_names_what_changes_the_values():
    spec = KVSpec(2, 2, 8)
    assert profile_id(CodecConfig(), spec) == "exact/1"
    assert profile_id(CodecConfig(unit_layers=2), spec) == "exact/1"
    eight = CodecConfig(profile="paper", frame_sizes=("144x144",))
    assert profile_id(eight, spec) == "paper/1 bits=8"
    assert profile_id(CodecConfig(profile="paper", paper_bits=4), spec) == "paper/1 bits=4"


def test_unknown_profile_is_a_config_error():
    with pytest.raises(ConfigError, match="'nonsense'"):
        make_profile(CodecConfig(profile="nonsense"))


def test_description_adds_up():
    data = encode(unit_layers=3)
    described = json.loads(json.dumps(describe_chunk(data)))
    assert described["object_bytes"] == len(data)
    assert described["header_bytes"] + sum(u["bytes"] for u in described["units"]) == len(data)
    elements = SPEC.elements_per_token * TOKENS
    assert described["bits_per_element"] == {"-": pytest.approx(8 * len(data) / elements)}
    first = described["units"][0]
    assert first["layers"] == [0, 3]
    assert (first["profile"], first["bit_depth"], first["chroma"]) == ("exact", 8, "4:4:4")
    assert set(first["sections"]) == {"1", "2", "16", "17", "18"}
    assert first["sections"]["18"]["raw_bytes"] == 3 * 2 * 2 * 16 * TOKENS


def test_description_of_a_damaged_chunk_is_refused():
    data = bytearray(encode())
    with pytest.raises(FormatError, match="got"):
        describe_chunk(bytes(data[:-1]))
    data[-1] ^= 1
    with pytest.raises(ChecksumError, match="damaged"):
        describe_chunk(bytes(data))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_exact_values_without_redundancy_are_stored_raw(dtype):
    """Uniform bit patterns took 1.16 times their own size."""
    spec = KVSpec(2, 2, 64, dtype=dtype)
    item = np.uint8 if "8" in dtype else np.uint16
    values = np.random.default_rng(0).integers(0, 2 ** (8 * item().itemsize), (2, 2, 2, 256, 64))
    values = values.astype(item)
    chunk = encode_chunk(
        values, spec=spec, profile=ExactProfile(), identity=bytes(32), chunk_key=bytes(32),
        token_ids=range(256), first_position=0, num_threads=1,
    )  # fmt: skip
    header = parse_header(chunk)
    assert header.object_bytes - header.header_bytes < values.nbytes + 400
    for entry in header.units:
        data = chunk[entry.offset : entry.stop]
        restored = restore_unit(data, decode_unit(data, VideoDecoder())).values
        first, stop = entry.layer_start, entry.layer_start + entry.num_layers
        np.testing.assert_array_equal(restored, values[first:stop])
