"""The NVENC side against a stand-in of PyNvVideoCodec's documented encoder, which codes with libx265.

No machine at hand has NVENC: what these tests cannot show is that the real library behaves so.
"""

from __future__ import annotations

import numpy as np
import pytest

from kvfetcher.codec.encoders import choose_encoder
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.gpu import nvdec, nvenc
from kvfetcher.codec.gpu.nvenc import NvencEncoder
from kvfetcher.codec.profiles import decode_unit, encode_chunk, restore_unit
from kvfetcher.codec.video import VideoDecoder, checked_geometry, encode_planes
from kvfetcher.errors import CodecError, EncoderUnavailableError
from kvfetcher.format.container import parse_header
from kvfetcher.spec import KVSpec
from support.kv_values import special_values

CAPS = {
    "num_encoder_engines": 1,
    "support_lossless_encode": 1,
    "support_yuv444_encode": 1,
    "support_10bit_encode": 1,
    "width_max": 8192,
    "height_max": 8192,
}
FORMATS = {
    "YUV444": ("4:4:4", 8), "YUV444_16BIT": ("4:4:4", 10), "NV12": ("4:2:0", 8), "P010": ("4:2:0", 10),
}  # fmt: skip


class StandIn:
    """`CreateEncoder` and `GetEncoderCaps` as the sample programs of PyNvVideoCodec 2.2 call them."""

    def __init__(self, caps=None, **fault):
        self.caps = CAPS if caps is None else caps
        self.fault = fault
        self.sessions = []

    def GetEncoderCaps(self, gpuid=0, codec="h264"):
        assert codec == "hevc"
        if isinstance(self.caps, Exception):
            raise self.caps
        return self.caps

    def CreateEncoder(self, width, height, fmt, usecpuinputbuffer, **options):
        assert usecpuinputbuffer is True
        assert options["tuning_info"] == "lossless"
        if "create" in self.fault:
            raise self.fault["create"]
        session = Session(width, height, fmt, options, self.fault)
        self.sessions.append(session)
        return session


class Session:
    def __init__(self, width, height, fmt, options, fault):
        self.size, self.options, self.fault = (width, height), options, fault
        self.chroma, self.depth = FORMATS[fmt]
        self.pictures = []

    def Encode(self, surface):
        assert surface.dtype == np.uint8
        assert surface.ndim == 1
        width, height = self.size
        shape = (3, height, width) if self.chroma == "4:4:4" else (1, height * 3 // 2, width)
        samples = surface if self.depth == 8 else surface.view("<u2") >> 6
        self.pictures.append(samples.reshape(shape))
        return []  # held back, as NVENC does

    def EndEncode(self):
        planes = np.stack(self.pictures)
        if self.fault.get("changes"):
            planes[0, 0, 0, 0] ^= 1
        packets = encode_planes(
            planes, bit_depth=self.depth, chroma=self.chroma, gop=self.options["gop"]
        )
        return [{"data": p} for p in packets[: self.fault.get("keeps", len(packets))]]


@pytest.fixture
def with_library(monkeypatch):
    """A function: NvencEncoder over a stand-in."""

    def make(*args, **fault):
        library = StandIn(*args, **fault)
        monkeypatch.setattr(nvenc, "import_library", lambda: library)
        return NvencEncoder(), library

    return make


def pictures(depth, chroma="4:4:4", size=(256, 160), count=2):
    width, height = size
    rows = (3, height) if chroma == "4:4:4" else (1, height * 3 // 2)
    planes = np.random.default_rng(depth).integers(0, 1 << depth, (count, *rows, width))
    return planes.astype(np.uint8 if depth == 8 else np.uint16)


@pytest.mark.parametrize("gop", [1, 2])
@pytest.mark.parametrize("chroma", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("depth", [8, 10])
def test_pictures_come_back_as_they_were(with_library, depth, chroma, gop):
    encoder, library = with_library()
    planes = pictures(depth, chroma)
    packets = encoder(planes, bit_depth=depth, chroma=chroma, gop=gop)
    geometry = checked_geometry(planes, bit_depth=depth, chroma=chroma)
    np.testing.assert_array_equal(VideoDecoder().decode(packets, geometry), planes)
    assert encoder.is_proven(geometry, gop=gop)
    assert len(library.sessions) == 1
    assert library.sessions[0].options["idrperiod"] == gop


@pytest.mark.parametrize(
    ("planes", "depth", "caps"),
    [
        (pictures(12), 12, CAPS),
        (pictures(10), 10, {**CAPS, "support_10bit_encode": 0}),
        (pictures(8), 8, {**CAPS, "support_yuv444_encode": 0}),
        (pictures(8, size=(257, 160)), 8, CAPS),
        (pictures(8), 8, {**CAPS, "width_max": 128}),
    ],
    ids=["12 bit", "no 10 bit", "no 4:4:4", "odd", "too wide"],
)
def test_what_nvenc_cannot_do_is_done_by_libx265(with_library, planes, depth, caps):
    encoder, library = with_library(caps)
    packets = encoder(planes, bit_depth=depth)
    assert packets == encode_planes(planes, bit_depth=depth)
    assert not library.sessions


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"changes": True}, "changed the samples"),
        ({"keeps": 1}, "1 packets for 2 pictures"),
        ({"create": RuntimeError("error 2")}, "error 2"),
    ],
)
def test_an_encoder_that_is_wrong_once_is_not_asked_again(with_library, caplog, fault, reason):
    encoder, library = with_library(**fault)
    planes = pictures(8)
    for _ in range(2):
        assert encoder(planes, bit_depth=8) == encode_planes(planes, bit_depth=8)
    assert len(library.sessions) <= 1
    assert reason in caplog.text
    assert not encoder.is_proven(checked_geometry(planes, bit_depth=8, chroma="4:4:4"), gop=1)


def test_pictures_that_do_not_fit_are_refused(with_library):
    encoder, _ = with_library()
    with pytest.raises(CodecError, match="planes hold"):
        encoder(np.full((1, 3, 160, 256), 1024, np.uint16), bit_depth=10)


@pytest.mark.parametrize(
    ("caps", "reason"),
    [
        (
            RuntimeError("PyNvEncoderCaps :\nreturned error 2\n"),
            r"has no NVENC.*: returned error 2\)$",
        ),
        ({**CAPS, "num_encoder_engines": 0}, "has no NVENC"),
        ({**CAPS, "support_lossless_encode": 0}, "without loss"),
    ],
)
def test_a_gpu_without_lossless_nvenc_is_told(with_library, caps, reason):
    with pytest.raises(EncoderUnavailableError, match=reason):
        with_library(caps)


def test_the_probe_passes_what_is_right_and_refuses_what_is_not(with_library, capsys):
    with_library()
    assert nvenc.main() == 0
    with_library({**CAPS, "support_10bit_encode": 0})
    assert nvenc.main() == 1
    assert "no 10 bits" in capsys.readouterr().err
    with_library(changes=True)
    assert nvenc.main() == 1
    assert "did not code" in capsys.readouterr().err


def test_without_a_driver_nvenc_cannot_be_asked_for():
    if nvdec.has_driver():
        pytest.skip("this machine has a driver: not tested")
    with pytest.raises(EncoderUnavailableError, match=r"libcuda\.so\.1"):
        choose_encoder("nvenc")


def test_a_probe_that_crashes_or_hangs_is_an_error(monkeypatch, tmp_path):
    script = tmp_path / "python"
    monkeypatch.setattr(nvenc.sys, "executable", str(script))
    with pytest.raises(EncoderUnavailableError, match="probe of NVENC failed"):
        choose_encoder("nvenc")
    script.write_text("#!/bin/sh\nkill -SEGV $$\n")
    script.chmod(0o755)
    with pytest.raises(EncoderUnavailableError, match="status -11"):
        choose_encoder("nvenc")
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(nvenc, "_PROBE_TIMEOUT_SECONDS", 0.3)
    with pytest.raises(EncoderUnavailableError, match="timed out"):
        choose_encoder("nvenc")


def test_a_proven_nvenc_encodes_chunks(with_library, monkeypatch):
    _, library = with_library()
    monkeypatch.setattr(nvenc, "_probe_elsewhere", lambda: None)
    chosen = choose_encoder("nvenc")
    assert chosen.name == "nvenc"
    spec = KVSpec(num_layers=3, num_kv_heads=4, head_dim=64)
    values = special_values(spec, 64)
    chunk = encode_chunk(
        values, spec=spec, profile=ExactProfile(), identity=bytes(32), chunk_key=bytes(32),
        token_ids=range(64), first_position=0, num_threads=2, encoder=chosen.encode,
    )  # fmt: skip
    for entry in parse_header(chunk).units:
        unit = chunk[entry.offset : entry.stop]
        restored = restore_unit(unit, decode_unit(unit, VideoDecoder()))
        expected = values[entry.layer_start : entry.layer_start + entry.num_layers]
        np.testing.assert_array_equal(restored.values, expected)
    assert library.sessions
