"""NVDEC against the CPU decoder: the same planes, bit for bit, whatever came before."""

import json
from pathlib import Path

import numpy as np
import pytest

from kvfetcher.backend.coding import UnitDecoder
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.gpu import nvdec
from kvfetcher.codec.gpu.instances import decode_instances
from kvfetcher.codec.gpu.nvdec import DecoderCaps, NvdecDecoder
from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.codec.ladder.library import register_calibration
from kvfetcher.codec.ladder.profile import TransformProfile
from kvfetcher.codec.paper import PaperProfile
from kvfetcher.codec.profiles import decode_unit, encode_chunk, restore_unit
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.codec.video import VideoDecoder, encode_planes
from kvfetcher.config import Config
from kvfetcher.errors import CodecError, DecoderUnavailableError
from kvfetcher.format.container import parse_header
from kvfetcher.format.pictures import PlaneGeometry
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import LADDER, KVSpec
from support.calibrations import correlated_values, make_calibration
from support.kv_values import special_values

pytestmark = pytest.mark.gpu

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SPECS = {
    dtype: KVSpec(num_layers=6, num_kv_heads=4, head_dim=64, dtype=dtype)
    for dtype in ("bfloat16", "float16", "float8_e4m3fn")
}
EVEN_SIZES = [(160, 144), (256, 640), (640, 368), (250, 150), (1024, 640), (1920, 1088)]
ODD_SIZES = [(333, 201), (151, 147), (1023, 641)]


@pytest.fixture(scope="module")
def decoder():
    made = NvdecDecoder()
    yield made
    made.close()


def noise(geometry, seed=0):
    """Rounded Gaussian around the middle, as quantised KV is."""
    rng = np.random.default_rng([seed, geometry.width, geometry.height, geometry.bit_depth])
    spread = 2.0 if geometry.bit_depth == 8 else 40.0
    middle, top = 1 << (geometry.bit_depth - 1), (1 << geometry.bit_depth) - 1
    values = np.rint(rng.normal(middle, spread, geometry.shape))
    values[:, :, ::7, ::5] = rng.integers(0, top + 1, values[:, :, ::7, ::5].shape)
    return np.clip(values, 0, top).astype(geometry.dtype)


def coded(geometry, *, gop=1, seed=0):
    planes = noise(geometry, seed)
    packets = encode_planes(
        planes, bit_depth=geometry.bit_depth, chroma=geometry.chroma, gop=gop, fast=seed % 2 == 1
    )
    return planes, packets


def chunk_of(profile, spec, values):
    return encode_chunk(
        values,
        spec=spec,
        profile=profile,
        identity=bytes(32),
        chunk_key=bytes(32),
        token_ids=range(values.shape[3]),
        first_position=0,
        num_threads=4,
    )


def assert_same_on_both(chunk, decoder):
    """Planes and restored values of every unit; returns how many units there were."""
    cpu = VideoDecoder()
    units = parse_header(chunk).units
    for entry in units:
        unit = chunk[entry.offset : entry.stop]
        geometry = parse_unit(unit).geometry
        if not geometry.num_frames:  # a raw copy: no pictures, whatever decodes them
            assert decode_unit(unit, decoder).size == 0
            continue
        if geometry.width < nvdec.MIN_WIDTH:
            with pytest.raises(DecoderUnavailableError, match="150x144 to"):
                decode_unit(unit, decoder)
            continue
        expected, got = decode_unit(unit, cpu), decode_unit(unit, decoder)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(
            restore_unit(unit, got).values, restore_unit(unit, expected).values
        )
    return len(units)


@pytest.mark.parametrize("gop", [1, 3])
@pytest.mark.parametrize("bit_depth", [8, 10, 12])
@pytest.mark.parametrize("chroma", ["4:2:0", "4:4:4"])
def test_every_depth_chroma_and_size_decodes_to_what_was_encoded(decoder, chroma, bit_depth, gop):
    """One decoder for all: sizes go up and down between calls."""
    sizes = EVEN_SIZES if chroma == "4:2:0" else EVEN_SIZES + ODD_SIZES
    streams = []
    for seed, (width, height) in enumerate(sizes):
        geometry = PlaneGeometry(3, width, height, bit_depth, chroma)
        streams.append((geometry, *coded(geometry, gop=gop, seed=seed)))
    wrong = []
    for geometry, planes, packets in [*streams, *reversed(streams)]:
        got = decoder.decode(packets, geometry)
        assert got.shape == geometry.shape
        assert got.dtype == geometry.dtype
        if not np.array_equal(got, planes):
            wrong.append((geometry.width, geometry.height, int((got != planes).sum())))
    assert not wrong


@pytest.mark.parametrize("name", sorted(p.stem for p in GOLDEN.glob("*.kvf")))
def test_golden_chunks_decode_as_on_the_cpu_or_are_refused(decoder, name):
    artifact = GOLDEN / f"{name}.safetensors"
    if artifact.is_file():
        register_calibration(Calibration.load(artifact))
    assert assert_same_on_both((GOLDEN / f"{name}.kvf").read_bytes(), decoder) > 0


@pytest.mark.parametrize("dtype", sorted(SPECS))
@pytest.mark.parametrize(
    "profile",
    [
        ExactProfile(),
        PaperProfile(frame_sizes=("640x360", "1280x720"), bits=8, unit_layers=3),
        PaperProfile(frame_sizes=("640x360",), bits=4, unit_layers=3),
        UncalibratedProfile(),
    ],
    ids=["exact", "paper 8 bits, two sizes", "paper 4 bits", "uncalibrated"],
)
def test_profiles_restore_the_same_values(decoder, profile, dtype):
    spec = SPECS[dtype]
    values = special_values(spec, 256)
    if isinstance(profile, PaperProfile):  # finite values only
        values = float32_to_bits(correlated_values(spec, 256), dtype)
    assert assert_same_on_both(chunk_of(profile, spec, values), decoder) > 0


@pytest.mark.parametrize("name", LADDER)
def test_ladder_restores_the_same_values(decoder, name):
    spec = SPECS["bfloat16"]
    calibration = make_calibration(spec)
    register_calibration(calibration)
    values = float32_to_bits(correlated_values(spec, 256), spec.dtype)
    assert assert_same_on_both(chunk_of(TransformProfile(name, calibration), spec, values), decoder)


@pytest.mark.parametrize("bit_depth", [8, 10])
def test_pictures_stay_on_the_gpu_where_there_is_room(decoder, bit_depth):
    geometry = PlaneGeometry(3, 256, 640, bit_depth)
    planes, packets = coded(geometry)
    context, asked = decoder.context, []
    address = context.allocate(geometry.num_bytes)
    try:
        kept = decoder.decode_on_gpu(packets, geometry, lambda: asked.append(1) or address)
        assert kept is None
        context.synchronize()
        got = np.empty(geometry.shape, geometry.dtype)
        context.copy_to_host(got.ctypes.data, address, got.nbytes)
    finally:
        context.free(address)
    np.testing.assert_array_equal(got >> nvdec.sample_shift(geometry), planes)
    assert len(asked) == 1
    in_host_memory = decoder.decode_on_gpu(packets, geometry, lambda: None)
    np.testing.assert_array_equal(in_host_memory, planes)
    assert not decoder.is_lost()


def test_stream_of_another_size_is_refused_and_the_next_unit_decodes(decoder):
    small, large = PlaneGeometry(1, 256, 160, 10), PlaneGeometry(1, 512, 320, 10)
    planes, packets = coded(small)
    with pytest.raises(CodecError, match=r"picture|NVDEC"):
        decoder.decode(packets, large)
    np.testing.assert_array_equal(decoder.decode(packets, small), planes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda packets: packets[:-1],
        lambda packets: [*packets, packets[0]],
        lambda packets: [b"\0\0\0\1" + bytes(range(256)) * 4 for _ in packets],
        lambda packets: [packet[: len(packet) // 8] for packet in packets[:1]],
    ],
    ids=["one missing", "one too many", "garbage", "truncated and alone"],
)
def test_damaged_stream_is_an_error_and_the_next_unit_decodes(decoder, damage):
    geometry = PlaneGeometry(3, 256, 640, 10)
    planes, packets = coded(geometry)
    try:
        got = decoder.decode(damage(packets), geometry)
    except CodecError:
        pass
    else:
        pytest.fail(f"decoded, {int((got != planes).sum())} samples differ")
    np.testing.assert_array_equal(decoder.decode(packets, geometry), planes)


def test_flipped_bits_never_pass_for_the_unit_and_the_next_one_decodes(decoder):
    """NVDEC conceals what it cannot read; the integer digest is what catches it."""
    geometry = PlaneGeometry(2, 640, 368, 8)
    planes, packets = coded(geometry)
    rng = np.random.default_rng(5)
    for _ in range(8):
        data = bytearray(packets[1])
        data[int(rng.integers(len(data) // 2, len(data)))] ^= 1 << int(rng.integers(8))
        try:
            got = decoder.decode([packets[0], bytes(data)], geometry)
        except CodecError:
            pass
        else:
            np.testing.assert_array_equal(got[0], planes[0])
            assert not np.array_equal(got, planes)
        np.testing.assert_array_equal(decoder.decode(packets, geometry), planes)


def test_driver_names_its_engines_and_limits(decoder):
    caps = decoder.caps(10, "4:4:4")
    assert caps.num_engines >= 1
    assert caps.min_width <= 144
    assert caps.max_width >= 4096
    assert nvdec.count_engines(0) == caps.num_engines
    assert decode_instances(Config()) == caps.num_engines


def test_what_the_engine_cannot_do_is_refused_with_its_limits(decoder, monkeypatch):
    small = DecoderCaps("4:4:4", 8, 7, 144, 144, 512, 512)
    monkeypatch.setitem(decoder._caps, (8, "4:4:4"), small)
    geometry = PlaneGeometry(1, 640, 368, 8)
    with pytest.raises(DecoderUnavailableError, match=r"150x144 to 512x512.*640x368"):
        decoder.decode(coded(geometry)[1], geometry)


def test_unit_decoder_uses_nvdec_and_falls_back_by_unit(monkeypatch):
    spec = SPECS["bfloat16"]
    chunk = chunk_of(ExactProfile(), spec, special_values(spec, 256))
    entry = parse_header(chunk).units[0]
    unit = chunk[entry.offset : entry.stop]
    made = UnitDecoder("nvdec")
    try:
        assert made.name == "nvdec"
        planes, status = made.decode(unit)
        assert json.loads(status)["decoder"] == "nvdec"
        assert "fallback" not in json.loads(status)
        none = DecoderCaps("4:4:4", 8, 0, 0, 0, 0, 0)
        monkeypatch.setitem(made._nvdec._caps, (8, "4:4:4"), none)
        again, status = made.decode(unit)
        np.testing.assert_array_equal(again, planes)
        assert json.loads(status)["decoder"] == "cpu"
        assert "no HEVC 4:4:4 of 8 bits" in json.loads(status)["fallback"]
    finally:
        made.close()
