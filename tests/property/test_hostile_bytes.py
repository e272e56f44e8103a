"""Whatever bytes come: FormatError or CodecError, in bounded time and memory. Never a crash, never
wrong values."""

import functools
import time
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.ladder.library import register_calibration
from kvfetcher.codec.ladder.profile import TransformProfile
from kvfetcher.codec.paper import PaperProfile
from kvfetcher.codec.profiles import decode_unit, describe_chunk, encode_chunk, restore_unit
from kvfetcher.codec.raw import RawProfile
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import ChecksumError, CodecError, FormatError
from kvfetcher.format.container import header_size, parse_header
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import KVSpec
from support.calibrations import make_calibration
from support.examples import examples
from support.kv_values import finite_values
from support.tamper import resealed_chunk, resealed_sections, resealed_unit

SPEC = KVSpec(2, 2, 8)
VALUES = finite_values(SPEC, 20)
DECODER = VideoDecoder()
CALIBRATION = make_calibration(SPEC)
register_calibration(CALIBRATION)
SOURCE = UnitSource(VALUES, SPEC, 0, 0)
UNITS = {
    "exact": ExactProfile().encode(SOURCE, "-"),
    "paper": PaperProfile(("144x144",), bits=4).encode(SOURCE, "144x144"),
    "paper10": PaperProfile(("144x144",), bits=10).encode(SOURCE, "144x144"),
    "ladder": TransformProfile("balanced", CALIBRATION).encode(SOURCE, "-"),
    "uncalibrated": UncalibratedProfile().encode(SOURCE, "-"),
    "raw": RawProfile().encode(SOURCE, "raw"),
}
EXPECTED = {name: restore_unit(u, decode_unit(u, DECODER)).values for name, u in UNITS.items()}
CHUNK = encode_chunk(
    VALUES,
    spec=SPEC,
    profile=ExactProfile(unit_layers=1),
    identity=bytes(32),
    chunk_key=bytes(32),
    token_ids=range(20),
    first_position=0,
    num_threads=1,
)
HEADER_BYTES = header_size(CHUNK)

many = examples(300)
some = examples(120)
unit_names = st.sampled_from(sorted(UNITS))
with_video = st.sampled_from(sorted(set(UNITS) - {"raw"}))

# Of one hostile input; a sound one takes milliseconds, and the machine may be busy.
MAX_SECONDS = 20.0


def in_bounded_time(function):
    @functools.wraps(function)
    def timed(data, *args):
        began = time.process_time()
        try:
            return function(data, *args)
        finally:
            assert time.process_time() - began < MAX_SECONDS

    return timed


def test_the_ladder_unit_has_low_bits():
    assert [section.kind for section in parse_unit(UNITS["ladder"]).sections][-1] == 24


@in_bounded_time
def read_unit(data):
    return restore_unit(data, decode_unit(data, DECODER)).values


def read_or_refuse(data, expected):
    """A hostile unit is refused, or says just what the sound one said."""
    try:
        values = read_unit(data)
    except (FormatError, CodecError):
        return
    np.testing.assert_array_equal(values, expected)


@many
@given(st.binary(max_size=4000))
def test_random_bytes_are_refused(data):
    for parse in (header_size, parse_header, describe_chunk, parse_unit):
        with pytest.raises(FormatError):
            in_bounded_time(parse)(data)


@many
@given(st.binary(max_size=2000))
def test_random_bytes_behind_a_magic_are_refused(data):
    with pytest.raises(FormatError):
        parse_header(CHUNK[:12] + data)
    with pytest.raises(FormatError):
        parse_unit(UNITS["exact"][:12] + data)


@many
@given(st.integers(0, len(CHUNK) - 1))
def test_truncated_chunk_is_refused(size):
    with pytest.raises(FormatError):
        describe_chunk(CHUNK[:size])


@many
@given(st.integers(0, len(CHUNK) * 8 - 1))
def test_flipped_bit_of_a_chunk_is_refused(bit):
    data = bytearray(CHUNK)
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FormatError):
        describe_chunk(bytes(data))


@many
@given(st.integers(0, HEADER_BYTES - 33), st.binary(min_size=1, max_size=8))
def test_forged_chunk_header_is_refused_or_sound(at, replacement):
    data = resealed_chunk(CHUNK, at, replacement[: HEADER_BYTES - 32 - at])
    try:
        header = parse_header(data)
    except FormatError:
        return
    assert header.object_bytes == len(CHUNK)
    assert [u.offset for u in header.units] == [u.offset for u in parse_header(CHUNK).units]


@some
@given(unit_names, st.data())
def test_forged_unit_header_never_gives_other_integers(name, data):
    unit = UNITS[name]
    size = int.from_bytes(unit[12:16], "little")
    at = data.draw(st.integers(0, size - 5))
    replacement = data.draw(st.binary(min_size=1, max_size=8))[: size - 4 - at]
    forged = resealed_unit(unit, at, replacement)
    try:
        values = read_unit(forged)
    except (FormatError, CodecError):
        return
    # What may change unnoticed by a unit alone says nothing about its integers: which layers and
    # positions these are (the chunk's SHA-256 covers it) and which dtype they are rounded to.
    assert values.size == EXPECTED[name].size


@some
@given(unit_names, st.data())
def test_forged_sections_never_give_other_integers(name, data):
    unit = bytearray(UNITS[name])
    size = int.from_bytes(unit[12:16], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(size, len(unit) - 1))
        unit[at] ^= data.draw(st.integers(1, 255))
    forged = resealed_sections(bytes(unit))
    if name in ("exact", "raw"):
        read_or_refuse(forged, EXPECTED[name])
        return
    # The quantiser's tables are no integers: the chunk's SHA-256 covers them.
    with suppress(FormatError, CodecError):
        assert read_unit(forged).shape == EXPECTED[name].shape


@some
@given(with_video, st.data())
def test_damaged_video_is_refused(name, data):
    """Bits of the video flipped and every checksum made right: the integer digest is left."""
    unit = bytearray(UNITS[name])
    parsed = parse_unit(UNITS[name])
    start = int.from_bytes(unit[12:16], "little") + len(parsed.sections[0].stored)
    stop = start + len(parsed.sections[1].stored)
    for _ in range(data.draw(st.integers(1, 3))):
        unit[data.draw(st.integers(start, stop - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        values = read_unit(resealed_sections(bytes(unit)))
    except (CodecError, ChecksumError):
        return
    np.testing.assert_array_equal(values, EXPECTED[name])  # a bit that means nothing


@some
@given(
    st.integers(0, 2**32 - 1),
    st.one_of(
        st.tuples(st.just("exact"), st.sampled_from([36, 40, 44, 48, 60, 88, 92])),
        st.tuples(st.just("ladder"), st.sampled_from([36, 44, 48, 60, *range(120, 148, 4)])),
        st.tuples(st.just("uncalibrated"), st.sampled_from([36, 44, 48, 60, *range(88, 104, 4)])),
        st.tuples(st.just("paper"), st.sampled_from([36, 44, 48, 60, *range(88, 108, 4)])),
        st.tuples(st.just("raw"), st.sampled_from([36, 44, 48, 60, 88 + 8, 88 + 16])),
    ),
)
def test_huge_counts_do_not_allocate(value, place):
    name, at = place
    forged = resealed_unit(UNITS[name], at, value.to_bytes(4, "little"))
    shape = (0, 3, 144, 144) if name == "raw" else (1, 3, 144, 144)
    tracemalloc.start()
    try:
        in_bounded_time(restore_unit)(forged, np.zeros(shape, np.uint8))
    except Exception as exc:
        if not isinstance(exc, FormatError) and "planes must be" not in str(exc):
            raise
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 << 20
