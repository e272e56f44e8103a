"""The GPU's HEVC coder on the CPU (support/cuda_on_host.h): its bytes are those of the golden streams."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kvfetcher.codec.gpu import hevc_encode
from kvfetcher.codec.gpu.hevc_encode import HevcEncoder, Picture, access_unit
from support.hevc_pictures import GOLDEN, PCM, golden_picture
from support.kernels_on_host import build

FOLDER = Path(__file__).parents[3] / "data" / "golden" / "hevc"
NAMES = tuple(name for name in GOLDEN if golden_picture(name).geometry.chroma == "4:4:4")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    # An overflow, a shift too far or an index beyond an array ends the process.
    return build(
        tmp_path_factory.mktemp("kernels"), "-fsanitize=undefined", "-fno-sanitize-recover"
    )


def encoder(launcher, **options):
    return HevcEncoder(launcher, torch.device("cpu"), **options)


def picture(name):
    geometry, planes = golden_picture(name)
    samples = planes[0] if geometry.bit_depth == 8 else planes[0].view(np.int16)
    return Picture(torch.from_numpy(samples), geometry.bit_depth)


def packet(given, coded):
    height, width = given.samples.shape[1:]
    return access_unit(width, height, given.bit_depth, coded)


def golden(name):
    return (FOLDER / f"{name}.hevc").read_bytes()


def test_bytes_are_those_of_the_golden_streams_in_one_batch(launcher):
    pictures = [picture(name) for name in NAMES]
    for name, given, coded in zip(NAMES, pictures, encoder(launcher).encode(pictures), strict=True):
        if coded is None:  # the CPU coder finds out whether PCM is smaller
            assert len(golden(name)) * 8 > given.samples.numel() * given.bit_depth, name
        else:
            assert packet(given, coded) == golden(name), name


@pytest.mark.parametrize("name", [name for name in PCM if name in NAMES])
def test_what_does_not_shrink_is_left_to_the_cpu(launcher, name):
    assert list(encoder(launcher).encode([picture(name)])) == [None]


def test_batches_that_memory_cuts_give_the_same_bytes(launcher):
    names = ("window", "rows_10", "grey", "window")
    pictures = [picture(name) for name in names]
    one = hevc_encode.batch_bytes(
        hevc_encode.BatchSize().with_picture(pictures[1]), hevc_encode.usual_rooms(10)
    )
    small = encoder(launcher, memory_bytes=2 * one)
    assert len(list(small.batches(pictures))) > 1
    for name, given, coded in zip(names, pictures, small.encode(pictures), strict=True):
        assert packet(given, coded) == golden(name)


@pytest.mark.parametrize("short", [{"tokens": 0.2}, {"words": 0.01}])
def test_a_picture_that_does_not_fit_its_rooms_is_coded_again(launcher, monkeypatch, short):
    usual = hevc_encode.usual_rooms
    monkeypatch.setattr(hevc_encode, "usual_rooms", lambda depth: usual(depth)._replace(**short))
    names = ("grey", "rows_10")
    pictures = [picture(name) for name in names]
    for name, given, coded in zip(names, pictures, encoder(launcher).encode(pictures), strict=True):
        assert packet(given, coded) == golden(name)


def test_a_picture_beyond_all_rooms_is_left_to_the_cpu(launcher, monkeypatch):
    few = hevc_encode.Rooms(tokens=0.2, words=0.01)
    monkeypatch.setattr(hevc_encode, "usual_rooms", lambda depth: few)
    monkeypatch.setattr(hevc_encode, "WORST", few)
    assert list(encoder(launcher).encode([picture("rows_10")])) == [None]


def test_samples_may_lie_anywhere(launcher):
    """Rows of a larger tensor, at an address that no vector load takes."""
    given = picture("faint")
    _, height, width = given.samples.shape
    around = torch.zeros((3, height + 1, width + 3), dtype=torch.uint8)
    around[:, 1:, 3:] = given.samples
    (coded,) = encoder(launcher).encode([Picture(around[:, 1:, 3:], 8)])
    assert packet(given, coded) == golden("faint")
