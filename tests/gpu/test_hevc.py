"""The own HEVC streams on real hardware: NVDEC returns the samples, CUDA gives the CPU's bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kvfetcher.codec.gpu.hevc_encode import HevcEncoder, Picture, access_unit
from kvfetcher.codec.gpu.hevc_kernels import KernelLauncher
from kvfetcher.codec.gpu.nvdec import MIN_WIDTH, NvdecDecoder
from kvfetcher.codec.hevc.encoder import encode_planes
from kvfetcher.format.pictures import PlaneGeometry
from support.hevc_pictures import GOLDEN, golden_picture

pytestmark = pytest.mark.gpu

FOLDER = Path(__file__).parents[1] / "data" / "golden" / "hevc"
NVDEC_NAMES = tuple(
    name
    for name in GOLDEN
    if golden_picture(name).geometry.width >= MIN_WIDTH
    and golden_picture(name).geometry.height >= 144
)


@pytest.fixture(scope="module")
def decoder():
    made = NvdecDecoder()
    yield made
    made.close()


def test_some_golden_streams_are_large_enough_for_nvdec():
    assert NVDEC_NAMES


@pytest.mark.parametrize("name", NVDEC_NAMES)
def test_nvdec_returns_the_samples_of_golden_streams(decoder, name):
    geometry, planes = golden_picture(name)
    stream = (FOLDER / f"{name}.hevc").read_bytes()
    np.testing.assert_array_equal(decoder.decode([stream], geometry), planes)


@pytest.mark.parametrize("bit_depth", [8, 10, 12])
@pytest.mark.parametrize(("width", "height"), [(256, 640), (250, 150), (1024, 1634), (333, 201)])
def test_nvdec_returns_the_samples_of_new_streams(decoder, width, height, bit_depth):
    rng = np.random.default_rng([width, height, bit_depth])
    middle = 1 << (bit_depth - 1)
    spread = np.geomspace(40.0, 0.1, height)[:, None]
    values = np.rint(rng.normal(middle, spread, (3, 3, height, width))).clip(0, 2 * middle - 1)
    values[1, :, :64] = rng.integers(0, 2 * middle, values[1, :, :64].shape)  # hardly shrinks
    planes = values.astype(np.uint8 if bit_depth == 8 else np.uint16)
    geometry = PlaneGeometry(
        num_frames=3, height=height, width=width, bit_depth=bit_depth, chroma="4:4:4"
    )
    packets = encode_planes(planes, bit_depth=bit_depth, chroma="4:4:4")
    np.testing.assert_array_equal(decoder.decode(packets, geometry), planes)


def test_cuda_gives_the_bytes_of_the_golden_streams():
    names = [name for name in GOLDEN if golden_picture(name).geometry.chroma == "4:4:4"]
    pictures = []
    for name in names:
        geometry, planes = golden_picture(name)
        samples = planes[0] if geometry.bit_depth == 8 else planes[0].view(np.int16)
        pictures.append(Picture(torch.from_numpy(samples).cuda(), geometry.bit_depth))
    device = torch.device("cuda", 0)
    coded = HevcEncoder(KernelLauncher(0), device).encode(pictures)
    for name, given, substreams in zip(names, pictures, coded, strict=True):
        golden = (FOLDER / f"{name}.hevc").read_bytes()
        if substreams is None:  # left to the CPU's coder, which stores what does not shrink
            assert len(golden) * 8 > given.samples.numel() * given.bit_depth, name
            continue
        _, height, width = given.samples.shape
        assert access_unit(width, height, given.bit_depth, substreams) == golden, name
