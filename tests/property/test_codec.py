"""Encode, decode and restore are exact inverses, whatever the geometry, dtype and values."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.layout import RowGrid, TileGrid, Tiling
from kvfetcher.codec.paper import PaperProfile
from kvfetcher.codec.profiles import decode_unit, encode_chunk, restore_unit
from kvfetcher.codec.quant import bits_to_float32, quantise
from kvfetcher.codec.video import VideoDecoder, encode_planes
from kvfetcher.format.container import UnitData, build_chunk, parse_header
from kvfetcher.format.digest import integer_digest
from kvfetcher.format.pictures import PlaneGeometry
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import KVSpec
from support import reference_reader
from support.examples import examples
from support.kv_values import SPECIALS, finite_values, special_values

DECODER = VideoDecoder()  # warm from example to example, as a server keeps it

dtypes = st.sampled_from(["bfloat16", "float16", "float8_e4m3fn"])
specs = st.builds(
    KVSpec,
    num_layers=st.integers(1, 5),
    num_kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 33),
    kv_factor=st.sampled_from([1, 2]),
    dtype=dtypes,
)
token_counts = st.integers(1, 70)
seeds = st.integers(0, 2**32 - 1)
slow = examples(40)
quick = examples(150)


@st.composite
def bit_patterns(draw, spec, tokens):
    """Whole arrays of one kind: mixed, raw bits, constant, special values only."""
    kind = draw(st.sampled_from(["mixed", "raw", "constant", "specials"]))
    rng = np.random.default_rng(draw(seeds))
    mixed = special_values(spec, tokens, seed=draw(st.integers(0, 1000)))
    if kind == "raw":
        return rng.integers(0, np.iinfo(mixed.dtype).max + 1, mixed.shape).astype(mixed.dtype)
    if kind == "constant":
        return np.full_like(mixed, rng.integers(0, np.iinfo(mixed.dtype).max + 1))
    if kind == "specials":
        return rng.choice(SPECIALS[spec.dtype], mixed.shape).astype(mixed.dtype)
    return mixed


@slow
@given(st.data(), specs, token_counts, st.integers(0, 3))
def test_exact_gives_every_bit_back(data, spec, tokens, unit_layers):
    values = data.draw(bit_patterns(spec, tokens))
    chunk = encode_chunk(
        values,
        spec=spec,
        profile=ExactProfile(unit_layers=unit_layers),
        identity=bytes(32),
        chunk_key=bytes(32),
        token_ids=range(tokens),
        first_position=0,
        num_threads=1,
    )
    parts = []
    for entry in parse_header(chunk).units:
        unit = chunk[entry.offset : entry.stop]
        parts.append(restore_unit(unit, decode_unit(unit, DECODER)).values)
    np.testing.assert_array_equal(np.concatenate(parts), values)
    np.testing.assert_array_equal(reference_reader.read_chunk(chunk)[1], values)


@slow
@given(
    specs,
    token_counts,
    seeds,
    st.integers(2, 12),
    st.booleans(),
    st.integers(144, 200),
    st.integers(144, 200),
    st.data(),
)
def test_paper_gives_every_integer_back(spec, tokens, seed, bits, inter, width, height, data):
    tiling = data.draw(st.sampled_from(Tiling.all(spec.num_kv_heads, spec.head_dim)))
    size = f"{width}x{height}"
    profile = PaperProfile((size,), bits=bits, tiling=tiling, inter=inter)
    values = finite_values(spec, tokens, seed)
    encoded = profile.encode(UnitSource(values, spec, 0, 0), size)
    planes = decode_unit(encoded, DECODER)
    codes = quantise(bits_to_float32(values, spec.dtype), bits=bits).codes
    assert parse_unit(encoded).integer_digest == integer_digest(codes)
    restored = restore_unit(encoded, planes).values  # checks the digest of the integers
    np.testing.assert_array_equal(restored, reference_reader.read_unit(encoded))


@examples(25)
@given(
    st.integers(1, 3),
    st.integers(72, 110),
    st.integers(72, 110),
    st.sampled_from([8, 10, 12]),
    st.sampled_from(["4:4:4", "4:2:0"]),
    st.integers(1, 3),
    st.booleans(),
    seeds,
)
def test_video_is_lossless(frames, half_width, half_height, depth, chroma, gop, fast, seed):
    geometry = PlaneGeometry(frames, 2 * half_width, 2 * half_height, depth, chroma)
    rng = np.random.default_rng(seed)
    top = 1 << int(rng.integers(0, depth + 1))
    planes = rng.integers(0, top, geometry.shape).astype(geometry.dtype)
    packets = encode_planes(planes, bit_depth=depth, chroma=chroma, gop=gop, fast=fast)
    np.testing.assert_array_equal(DECODER.decode(packets, geometry), planes)


@quick
# At least 8 by 8: each picture is padded to what decoders take, and a unit's are bounded.
@given(st.integers(1, 400), st.integers(1, 50), st.integers(8, 90), st.integers(8, 60), seeds)
def test_rows_come_back_from_planes(rows, columns, max_rows, max_columns, seed):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
    grid = RowGrid.fit(rows, columns, max_frame_rows=max_rows, max_frame_columns=max_columns)
    np.testing.assert_array_equal(grid.gather(grid.place(data, bit_depth=8, padding=1)), data)


@quick
@given(specs, st.integers(1, 200), st.data(), seeds)
def test_tiles_come_back_from_planes(spec, tokens, data, seed):
    shape = (spec.num_layers, spec.kv_factor, spec.num_kv_heads, tokens, spec.head_dim)
    codes = np.random.default_rng(seed).integers(0, 4096, shape).astype(np.uint16)
    tiling = data.draw(st.sampled_from(Tiling.all(spec.num_kv_heads, spec.head_dim)))
    grid = TileGrid.fit(*shape[:2], tokens, tiling, max_width=160, max_height=160)
    np.testing.assert_array_equal(grid.gather(grid.place(codes, bit_depth=12, padding=9)), codes)


names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=24)
keys = st.binary(min_size=32, max_size=32)


@quick
@given(
    specs,
    st.lists(names, min_size=1, max_size=3, unique=True),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40),
    st.tuples(keys, keys, keys),
    st.integers(0, 2**40),
    st.data(),
)
def test_header_is_read_as_it_was_written(spec, variants, tokens, three_keys, position, data):
    units = []
    for variant in variants:
        layer = 0
        while layer < spec.num_layers:
            count = data.draw(st.integers(1, spec.num_layers - layer))
            payload = data.draw(st.binary(min_size=1, max_size=9))
            units.append(UnitData(layer, count, variant, payload))
            layer += count
    chunk = build_chunk(
        units,
        spec=spec,
        profile="p",
        identity=three_keys[0],
        chunk_key=three_keys[1],
        parent_key=three_keys[2],
        first_position=position,
        token_ids=tokens,
    )
    header = parse_header(chunk[: parse_header(chunk).header_bytes])
    assert (header.spec, header.first_position) == (spec, position)
    assert (header.identity, header.chunk_key, header.parent_key) == three_keys
    assert header.token_ids == tuple(tokens)
    assert header.variants == tuple(variants)
    read = [
        UnitData(u.layer_start, u.num_layers, u.variant, chunk[u.offset : u.stop])
        for u in header.units
    ]
    assert read == units
