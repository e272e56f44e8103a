"""The own HEVC encoder against FFmpeg's decoder, whatever the geometry, depth and samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfetcher.codec.hevc.encoder import encode_planes
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import CodecError
from kvfetcher.format.pictures import PlaneGeometry
from support import hevc_pictures

DECODER = VideoDecoder()
seeds = st.integers(0, 2**32 - 1)


@st.composite
def pictures(draw):
    chroma = draw(st.sampled_from(["4:4:4", "4:4:4", "4:2:0"]))
    side = st.integers(144, 330) if chroma == "4:4:4" else st.integers(72, 160).map(lambda n: 2 * n)
    geometry = PlaneGeometry(
        draw(st.integers(1, 2)), draw(side), draw(side), draw(st.sampled_from([8, 10, 12])), chroma
    )
    top = (1 << geometry.bit_depth) - 1
    rng = np.random.default_rng(draw(seeds))
    kind = draw(
        st.sampled_from(["noise", "constant", "checkerboard", "extremes", "white", "sparse"])
    )
    if kind == "noise":
        deviation = draw(st.floats(0.05, top / 3))
        still = PlaneGeometry(1, geometry.width, geometry.height, geometry.bit_depth, chroma)
        parts = [
            hevc_pictures.noise(still, rng, deviation, gain=draw(st.sampled_from([0, 0.5])))
            for _ in range(geometry.num_frames)
        ]
        return geometry, np.concatenate(parts)
    if kind == "constant":
        return geometry, hevc_pictures.constant(geometry, rng, draw(st.integers(0, top)))
    return geometry, getattr(hevc_pictures, kind)(geometry, rng)


@settings(max_examples=60)
@given(pictures())
def test_every_sample_comes_back(drawn):
    geometry, planes = drawn
    packets = encode_planes(planes, bit_depth=geometry.bit_depth, chroma=geometry.chroma)
    assert np.array_equal(DECODER.decode(packets, geometry), planes)


@settings(max_examples=20)
@given(seeds, st.integers(144, 300), st.integers(144, 300), st.sampled_from([8, 10, 12]))
def test_white_noise_grows_by_less_than_five_percent(seed, width, height, bit_depth):
    geometry = PlaneGeometry(1, width, height, bit_depth)
    planes = hevc_pictures.white(geometry, np.random.default_rng(seed))
    (packet,) = encode_planes(planes, bit_depth=bit_depth)
    assert len(packet) * 8 < 1.05 * planes.size * bit_depth


@settings(max_examples=15)
@given(seeds, st.sampled_from([8, 10, 12]), st.sampled_from(["extremes", "checkerboard", "black"]))
def test_the_worst_pictures_grow_by_less_than_a_fifth(seed, bit_depth, kind):
    geometry = PlaneGeometry(1, 160, 160, bit_depth)
    rng = np.random.default_rng(seed)
    if kind == "black":
        planes = rng.choice([0, (1 << bit_depth) - 1], geometry.shape, p=[0.8, 0.2])
        planes = planes.astype(geometry.dtype)
    else:
        planes = getattr(hevc_pictures, kind)(geometry, rng)
    (packet,) = encode_planes(planes, bit_depth=bit_depth)
    assert len(packet) * 8 < 1.2 * planes.size * bit_depth


def test_pictures_that_are_not_what_they_are_said_to_be_are_refused():
    with pytest.raises(CodecError, match="planes hold"):
        encode_planes(np.full((1, 3, 160, 160), 1024, np.uint16), bit_depth=10)
    with pytest.raises(CodecError, match="planes must be"):
        encode_planes(np.zeros((1, 2, 160, 160), np.uint8), bit_depth=8)
