"""The encoder's bytes are fixed: a coder on a GPU must give the same (tests/data/golden/hevc)."""

from pathlib import Path

import numpy as np
import pytest

from kvfetcher.codec import video
from kvfetcher.codec.hevc.encoder import encode_planes
from kvfetcher.codec.video import VideoDecoder
from support.hevc_pictures import GOLDEN, PCM, golden_picture

FOLDER = Path(__file__).parents[3] / "data" / "golden" / "hevc"


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_stream(name):
    geometry, planes = golden_picture(name)
    stream = (FOLDER / f"{name}.hevc").read_bytes()
    assert encode_planes(planes, bit_depth=geometry.bit_depth, chroma=geometry.chroma) == [stream]
    assert np.array_equal(VideoDecoder().decode([stream], geometry), planes)


def test_every_golden_stream_is_of_a_picture():
    assert {path.stem for path in FOLDER.glob("*.hevc")} == set(GOLDEN)


@pytest.mark.parametrize("name", PCM)
def test_what_cannot_be_compressed_takes_little_more_than_its_samples(name):
    geometry, planes = golden_picture(name)
    size = (FOLDER / f"{name}.hevc").stat().st_size
    assert 1 < size * 8 / (planes.size * geometry.bit_depth) < 1.03


def test_predicted_pictures_are_left_to_libx265():
    _, planes = golden_picture("rows_8")
    two = np.concatenate([planes, planes])
    assert encode_planes(two, bit_depth=8, gop=2) == video.encode_planes(two, bit_depth=8, gop=2)
