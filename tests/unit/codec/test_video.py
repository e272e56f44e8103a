import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from kvfetcher.codec.video import VideoDecoder, encode_planes, x265_params
from kvfetcher.errors import CodecError, DecoderUnavailableError, FormatError
from kvfetcher.format.pictures import PlaneGeometry


def noise(geometry, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1 << geometry.bit_depth, geometry.shape).astype(geometry.dtype)


def encode(planes, geometry, **options):
    return encode_planes(planes, bit_depth=geometry.bit_depth, chroma=geometry.chroma, **options)


@pytest.mark.parametrize("depth", [8, 10, 12])
@pytest.mark.parametrize("chroma", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("fast", [False, True])
def test_full_range_noise_comes_back_bit_for_bit(depth, chroma, fast):
    geometry = PlaneGeometry(2, 150, 146, depth, chroma)
    planes = noise(geometry)
    packets = encode(planes, geometry, fast=fast)
    assert len(packets) == 2
    decoded = VideoDecoder().decode(packets, geometry)
    assert decoded.dtype == geometry.dtype
    assert (decoded == planes).all()


@pytest.mark.parametrize("sides", [(144, 144), (145, 147), (161, 1000), (8192, 144)])
def test_odd_and_extreme_sides(sides):
    geometry = PlaneGeometry(1, *sides, 8)
    planes = noise(geometry)
    assert (VideoDecoder().decode(encode(planes, geometry), geometry) == planes).all()


def test_every_packet_decodes_alone_when_all_intra():
    geometry = PlaneGeometry(4, 144, 144, 8)
    planes = noise(geometry)
    packets = encode(planes, geometry)
    one = PlaneGeometry(1, 144, 144, 8)
    decoder = VideoDecoder()
    for index in (3, 1, 0, 2):
        assert (decoder.decode([packets[index]], one)[0] == planes[index]).all()


def test_predicted_pictures_are_smaller_and_exact():
    geometry = PlaneGeometry(6, 144, 144, 8)
    planes = np.repeat(noise(PlaneGeometry(1, 144, 144, 8)), 6, axis=0)
    planes[3:, :, 20, 20] ^= 1
    intra, inter = encode(planes, geometry), encode(planes, geometry, gop=3)
    assert (VideoDecoder().decode(inter, geometry) == planes).all()
    assert sum(map(len, inter)) < 0.5 * sum(map(len, intra))
    # a new group starts at picture 3: it decodes without the pictures before
    half = PlaneGeometry(3, 144, 144, 8)
    assert (VideoDecoder().decode(inter[3:], half) == planes[3:]).all()


def test_warm_decoder_changes_geometry_between_units():
    decoder = VideoDecoder()
    for turn in range(2):
        for width, depth in ((144, 8), (200, 8), (144, 10)):
            geometry = PlaneGeometry(2, width, 144, depth)
            planes = noise(geometry, seed=turn)
            assert (decoder.decode(encode(planes, geometry), geometry) == planes).all()


@pytest.mark.parametrize(
    "wrong",
    [
        PlaneGeometry(2, 160, 144, 8),
        PlaneGeometry(2, 144, 160, 8),
        PlaneGeometry(2, 144, 144, 10),
        PlaneGeometry(2, 144, 144, 8, "4:2:0"),
        PlaneGeometry(1, 144, 144, 8),
        PlaneGeometry(3, 144, 144, 8),
    ],
    ids=str,
)
def test_other_pictures_than_promised_are_refused(wrong):
    geometry = PlaneGeometry(2, 144, 144, 8)
    packets = encode(noise(geometry), geometry)
    with pytest.raises(CodecError):
        VideoDecoder().decode(packets, wrong)


def test_larger_pictures_than_promised_are_not_even_allocated():
    geometry = PlaneGeometry(1, 1024, 1024, 8)
    packets = encode(noise(geometry), geometry)
    with pytest.raises(CodecError, match="does not decode"):
        VideoDecoder().decode(packets, PlaneGeometry(1, 144, 144, 8))


HOSTILE = """
import sys, time
from kvfetcher.format.pictures import PlaneGeometry
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import CodecError

def peak_kib():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))

small, *packets = [open(path, "rb").read() for path in sys.argv[1:]]
geometry = PlaneGeometry(1 + len(packets), 144, 144, 8)
decoder = VideoDecoder()
decoder.decode([small], PlaneGeometry(1, 144, 144, 8))  # what a good unit takes
before, started = peak_kib(), time.monotonic()
for _ in range(5):
    try:
        decoder.decode([small, *packets], geometry)
        sys.exit("decoded")
    except CodecError as exc:
        print(exc)
grown = (peak_kib() - before) >> 10
print("grown by", grown, "MiB in", time.monotonic() - started, "s")
sys.exit(grown > 24 or time.monotonic() - started > 10)
"""


@pytest.mark.parametrize("joined", [False, True], ids=["a later picture", "in one packet"])
def test_a_stream_that_turns_into_a_huge_one_takes_neither_memory_nor_time(tmp_path, joined):
    """A decoded picture of the huge size alone would be 48 MiB."""
    small_geometry, huge_geometry = PlaneGeometry(1, 144, 144, 8), PlaneGeometry(1, 4096, 4096, 8)
    (small,) = encode(noise(small_geometry), small_geometry)
    (huge,) = encode(np.full(huge_geometry.shape, 128, np.uint8), huge_geometry)
    packets = [small, small + huge] if joined else [small, huge]
    files = [tmp_path / f"{index}" for index in range(len(packets))]
    for file, packet in zip(files, packets, strict=True):
        file.write_bytes(packet)
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, *map(str, files)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_decoder_works_again_after_a_damaged_stream():
    geometry = PlaneGeometry(2, 144, 144, 8)
    planes = noise(geometry)
    packets = encode(planes, geometry)
    decoder = VideoDecoder()
    for bad in ([packets[0][:50], packets[1]], [b"\0" * 100] * 2, [packets[1][:90], b"\1"]):
        with pytest.raises(CodecError):
            decoder.decode(bad, geometry)
        assert (decoder.decode(packets, geometry) == planes).all()


def test_missing_swapped_and_repeated_packets_are_refused():
    geometry = PlaneGeometry(4, 144, 144, 8)
    planes = np.repeat(noise(PlaneGeometry(1, 144, 144, 8)), 4, axis=0)
    packets = encode(planes, geometry, gop=4)
    for order in ((1, 2, 3), (0, 2, 1, 3), (0, 1, 1, 3), (0, 2, 3), (0, 1, 2)):
        with pytest.raises(CodecError):
            VideoDecoder().decode([packets[i] for i in order], geometry)


def test_encoder_refuses_what_does_not_fit():
    planes = np.zeros((1, 3, 144, 144), np.uint8)
    with pytest.raises(CodecError, match="planes must be"):
        encode_planes(planes[:, :2], bit_depth=8)
    with pytest.raises(CodecError, match="planes must be"):
        encode_planes(planes, bit_depth=10)
    with pytest.raises(CodecError, match=r"hold 1024, which is not below 2\*\*10"):
        encode_planes(np.full(planes.shape, 1024, np.uint16), bit_depth=10)
    with pytest.raises(FormatError, match="picture height must be 144"):
        encode_planes(planes[:, :, :143], bit_depth=8)


def test_encoder_that_does_not_open_is_a_codec_error(monkeypatch):
    monkeypatch.setattr("kvfetcher.codec.video._X265", "log-level=none:rd=0")  # out of range
    with pytest.raises(CodecError, match="libx265 failed"):
        encode_planes(np.zeros((1, 3, 144, 144), np.uint8), bit_depth=8)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((65537, 144, 144, 8), "up to 65536 pictures"),
        ((1, 143, 144, 8), "width must be 144"),
        ((1, 144, 8193, 8), "height must be 144 to 8192"),
        ((1, 144, 144, 9), "bit depth"),
        ((1, 144, 144, 8, "4:2:2"), "chroma"),
        ((1, 145, 144, 8, "4:2:0"), "even sides"),
        ((2, 8192, 8192, 8), "over the limit"),
    ],
)
def test_geometry_that_nvdec_or_memory_cannot_hold_is_refused(arguments, match):
    with pytest.raises(FormatError, match=match):
        PlaneGeometry(*arguments)


def test_decoders_of_two_threads_do_not_disturb_each_other():
    geometry = PlaneGeometry(3, 256, 256, 8)
    planes = [noise(geometry, seed) for seed in range(2)]
    packets = [encode(p, geometry) for p in planes]
    results = []

    def work(index):
        decoder = VideoDecoder()
        for _ in range(5):
            decoded = decoder.decode(packets[index], geometry)
            results.append(bool((decoded == planes[index]).all()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 10


def test_streams_carry_no_encoder_banner():
    geometry = PlaneGeometry(1, 144, 144, 8)
    (packet,) = encode(noise(geometry), geometry)
    assert b"x265" not in packet


def test_machine_without_a_decoder_is_named(monkeypatch):
    def no_codec(name, mode):
        raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr(av.CodecContext, "create", no_codec)
    with pytest.raises(DecoderUnavailableError, match="no HEVC decoder"):
        VideoDecoder().decode([b"x"], PlaneGeometry(1, 144, 144, 8))


@pytest.mark.parametrize("depth", [8, 10, 12])
def test_equal_pictures_give_equal_streams_that_decode_to_them(depth):
    # Sides that are no multiples of the largest coding unit, in part filled as few bits.
    geometry = PlaneGeometry(2, 144, 200, depth)
    planes = np.random.default_rng(2).integers(0, 1 << (depth - 2), geometry.shape)
    planes = planes.astype(geometry.dtype)
    streams = [encode_planes(planes, bit_depth=depth, fast=True) for _ in range(6)]
    assert all(stream == streams[0] for stream in streams)
    decoder = VideoDecoder()
    np.testing.assert_array_equal(decoder.decode(streams[0], geometry), planes)
    decoder.close()


class X265:
    """The libx265 that PyAV has loaded, asked directly: FFmpeg only warns of what it does not know."""

    def __init__(self):
        av.CodecContext.create("libx265", "w")
        maps = Path("/proc/self/maps").read_text().splitlines()
        library = ctypes.CDLL(next(line.split()[-1] for line in maps if "libx265" in line))
        library.x265_param_alloc.restype = ctypes.c_void_p
        self._parse = library.x265_param_parse
        self._parse.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
        self._param = library.x265_param_alloc()

    def parse(self, key, value):
        """0 = taken, -1 = no such key, -2 = no such value (x265.h)."""
        return self._parse(self._param, key.encode(), value.encode())


def test_x265_knows_every_key_and_value_in_use():
    geometry = PlaneGeometry(1, 160, 160, 8)
    used = {
        part
        for gop in (1, 4)
        for fast in (False, True)
        for part in x265_params(geometry, gop=gop, fast=fast).split(":")
    }
    x265 = X265()
    assert {part: x265.parse(*part.split("=")) for part in used} == dict.fromkeys(used, 0)
    assert {"lossless=1", "min-cu-size=32", "keyint=4"} <= used
    # What makes this worth asking: FFmpeg passes both without an error, and encodes with loss.
    assert x265.parse("losless", "1") == -1
    assert x265.parse("lossless", "maybe") == -2
