"""Packed rows: the same values as from pictures, and refused where they are not what they must be."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.ladder.library import register_calibration
from kvfetcher.codec.ladder.packed import MAX_WIDTH, NEUTRAL, PackedRows, pack, read_packed
from kvfetcher.codec.ladder.profile import TransformProfile, plan_restore
from kvfetcher.codec.profiles import decode_unit, encode_unnamed, make_profile, restore_unit
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.config import CodecConfig
from kvfetcher.errors import ChecksumError, ConfigError, FormatError, UnsupportedVersionError
from kvfetcher.format.container import parse_header
from kvfetcher.format.pictures import NO_PICTURES
from kvfetcher.format.sections import SectionKind
from kvfetcher.format.unit import IS_PACKED, parse_unit, raw_section, write_unit
from kvfetcher.spec import LADDER, KVSpec
from support.calibrations import correlated_values, make_calibration
from support.tamper import resealed_unit

SPEC = KVSpec(4, 2, 8)
TOKENS = 37  # no whole byte of bits


def encode(variant, *, name="balanced", heads=0, tokens=TOKENS, outlier=1.0):
    calibration = make_calibration(SPEC, heads=heads)
    register_calibration(calibration)
    values = correlated_values(SPEC, tokens)[:2]
    values[:, :, :, 9] *= outlier
    source = UnitSource(float32_to_bits(values, SPEC.dtype), SPEC, 0, 64)
    return TransformProfile(name, calibration, packed_copy=True).encode(source, variant)


def restore(unit):
    return restore_unit(unit, decode_unit(unit, VideoDecoder())).values


@pytest.fixture(scope="module")
def unit():
    return encode("packed")


@given(
    rows=st.lists(st.integers(0, 11), min_size=1, max_size=9),
    num_tokens=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_integers_come_back_but_for_the_escapes(rows, num_tokens, seed):
    rng = np.random.default_rng(seed)
    limits = 1 << np.array(rows)[:, None]
    integers = rng.integers(-limits, limits, (len(rows), num_tokens), dtype=np.int32)
    packing = pack(integers)
    widths, lines = packing.sections
    assert (widths.kind, lines.kind) == (SectionKind.PACKED_WIDTHS, SectionKind.PACKED_ROWS)
    kept = integers.copy()
    kept.reshape(-1)[packing.escaped] = 0
    np.testing.assert_array_equal(packing.samples, kept + NEUTRAL)
    of_rows = np.frombuffer(widths.stored, np.uint8)
    data = np.frombuffer(lines.stored, np.uint8).reshape(-1, -(-num_tokens // 8))
    assert len(of_rows) == len(rows)
    np.testing.assert_array_equal(PackedRows(of_rows, data).unpack(num_tokens), packing.samples)


def test_a_width_is_what_costs_least():
    integers = np.zeros((4, 256), np.int32)
    integers[1, 5] = 1  # one escape instead of 512 bits
    integers[2] = np.arange(256) % 8 - 4  # three bits each
    integers[3] = np.arange(256) % 2 * 1000  # beyond what a width holds, and in no few escapes
    packing = pack(integers)
    (widths, _) = packing.sections
    assert list(widths.stored) == [0, 0, 3, 0]
    np.testing.assert_array_equal(packing.escaped[:2], [256 + 5, 3 * 256 + 1])
    assert len(packing.escaped) == 1 + 128


@pytest.mark.parametrize("heads", [0, 1], ids=["all heads", "one head"])
@pytest.mark.parametrize("name", LADDER)
@pytest.mark.parametrize("outlier", [1.0, 60.0])
def test_restored_values_are_those_of_pictures(name, heads, outlier):
    packed = encode("packed", name=name, heads=heads, outlier=outlier)
    pictures = encode("-", name=name, heads=heads, outlier=outlier)
    parsed = parse_unit(packed)
    assert parsed.flags & IS_PACKED
    assert parsed.geometry == NO_PICTURES
    assert parsed.flags & ~IS_PACKED == parse_unit(pictures).flags
    np.testing.assert_array_equal(restore(packed), restore(pictures))


def test_a_chunk_holds_both_and_is_of_one_identity():
    calibration = make_calibration(SPEC, layers=1)
    register_calibration(calibration)
    bits = float32_to_bits(correlated_values(SPEC, TOKENS), SPEC.dtype)
    profile = TransformProfile("near", calibration, ("160x144",), packed_copy=True)
    assert profile.identity == TransformProfile("near", calibration).identity
    chunk = encode_unnamed(bits, spec=SPEC, profile=profile, first_position=0, num_threads=1)
    header = parse_header(chunk)
    assert header.variants == ("160x144", "packed")
    values = {
        variant: np.concatenate(
            [restore(chunk[e.offset : e.stop]) for e in header.units_of(variant)]
        )
        for variant in header.variants
    }
    np.testing.assert_array_equal(values["packed"], values["160x144"])
    # Layer groups are joined: what a unit costs beside its bytes is paid once.
    assert len(header.units_of("packed")) == 1


def test_long_chunks_have_a_packed_unit_for_each_layer_group():
    calibration = make_calibration(SPEC, layers=1)
    profile = TransformProfile("near", calibration, packed_copy=True)
    most = max(calibration.unit_rank(group, "near") for group in range(4))
    long = (5 << 20) // most
    assert len(profile.layer_groups(SPEC, long, "packed")) == 4
    assert len(profile.layer_groups(SPEC, long // 4, "packed")) == 1


def test_short_chunks_have_packed_units_half_as_large_as_their_pictures():
    spec = KVSpec(num_layers=128, num_kv_heads=4, head_dim=32)
    profile = TransformProfile("near", make_calibration(spec, layers=1), packed_copy=True)

    def num_units(num_tokens, variant):
        return len(profile.layer_groups(spec, num_tokens, variant))

    pictures = num_units(1023, "-")
    assert num_units(1023, "packed") in (2 * pictures - 1, 2 * pictures)
    assert num_units(1024, "packed") == num_units(1024, "-")


@pytest.mark.parametrize("profile", ["exact", "uncalibrated", "paper", "raw", "auto"])
def test_other_profiles_have_no_packed_copy(profile):
    with pytest.raises(ConfigError, match=r"packed_copy needs codec.profile near, .* or tiny, got"):
        make_profile(CodecConfig(profile=profile, packed_copy=True))


def test_flag_and_sections_go_together(unit):
    flags = parse_unit(unit).flags
    with pytest.raises(FormatError, match="has sections"):
        restore(resealed_unit(unit, 10, (flags & ~IS_PACKED).to_bytes(2, "little")))
    for other in (1, 2, 4, 5):
        with pytest.raises(UnsupportedVersionError, match="flag"):
            parse_unit(resealed_unit(unit, 24, other.to_bytes(2, "little")))


def test_picture_sides_of_a_packed_unit_are_0(unit):
    parsed = parse_unit(unit)
    params = bytearray(parsed.params)
    assert params[44:52] == bytes(8)
    params[44] = params[48] = 144
    with pytest.raises(FormatError, match="and no other, has picture sides of 0"):
        restore(write_unit(replace(parsed, params=bytes(params))))
    pictures = parse_unit(encode("-"))
    params = pictures.params[:44] + bytes(8) + pictures.params[52:]
    with pytest.raises(FormatError, match="and no other, has picture sides of 0"):
        restore(write_unit(replace(pictures, params=params)))


def with_section(unit, kind, change):
    parsed = parse_unit(unit)
    sections = tuple(
        raw_section(kind, change(bytearray(parsed.section(kind, num_bytes=s.raw_bytes))))
        if s.kind == kind
        else s
        for s in parsed.sections
    )
    return write_unit(replace(parsed, sections=sections))


def test_a_wrong_width_is_refused(unit):
    def widen(widths):
        widths[3] = MAX_WIDTH + 1
        return bytes(widths)

    with pytest.raises(FormatError, match="0 to 8 bits, the unit says 9"):
        restore(with_section(unit, SectionKind.PACKED_WIDTHS, widen))


@pytest.mark.parametrize("change", [-1, 1, 1 << 20])
def test_rows_of_another_length_are_refused(unit, change):
    def resize(rows):
        return (bytes(rows) + bytes(1 << 20))[: len(rows) + change]

    with pytest.raises(FormatError, match="section 26 of the unit must be"):
        restore(with_section(unit, SectionKind.PACKED_ROWS, resize))


def test_bits_behind_the_last_token_are_refused(unit):
    def set_last(rows):
        rows[-1] |= 1 << 7
        return bytes(rows)

    with pytest.raises(FormatError, match="unused bits"):
        restore(with_section(unit, SectionKind.PACKED_ROWS, set_last))


def test_a_changed_bit_is_found(unit):
    def flip(rows):
        rows[0] ^= 1
        return bytes(rows)

    with pytest.raises(ChecksumError, match="damaged"):
        restore(with_section(unit, SectionKind.PACKED_ROWS, flip))


def test_rows_are_a_view_of_the_unit(unit):
    parsed = parse_unit(unit)
    packed = read_packed(parsed, plan_restore(parsed).layout.grid.num_rows)
    assert packed.lines.base is not None
    assert not packed.lines.flags.owndata
