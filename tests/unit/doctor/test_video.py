"""Golden streams, decoding processes and what the checks make of them. No GPU here: that is real."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest

from kvfetcher.codec.encoders import ChosenEncoder
from kvfetcher.codec.gpu import nvdec
from kvfetcher.codec.gpu.nvdec import DecoderCaps
from kvfetcher.codec.video import VideoDecoder, encode_planes
from kvfetcher.doctor import timing, video
from kvfetcher.doctor.parallel_decode import DecoderProcesses
from kvfetcher.doctor.streams import golden_streams, noise_stream, planes_sha256
from kvfetcher.errors import (
    CodecError,
    ConfigError,
    DecoderUnavailableError,
    EncoderUnavailableError,
)
from kvfetcher.fetch.planning.decode_times import H100_NVDEC, load_table
from kvfetcher.format.pictures import BIT_DEPTHS


def without(*missing):
    return lambda name: name not in missing


@pytest.mark.parametrize(
    ("choice", "missing", "status"),
    [
        ("auto", (), "ok"),
        ("nvdec", (), "ok"),
        ("cpu", nvdec.DRIVER_LIBRARIES, "ok"),
        ("auto", nvdec.DRIVER_LIBRARIES, "ok"),
        ("nvdec", nvdec.DRIVER_LIBRARIES, "fail"),
        ("auto", ("libnvcuvid.so.1",), "warn"),
        ("nvdec", ("libnvidia-encode.so.1",), "fail"),
    ],
)
def test_each_lack_of_the_driver_is_told(choice, missing, status):
    check = video.check_driver(choice, loads=without(*missing))
    assert check.status == status
    assert ("capability `video`" in check.remedy) == (status != "ok")


def test_this_machines_driver_is_asked():
    loads = nvdec.loads_library("libcuda.so.1")
    check = video.check_driver("nvdec", loads=nvdec.loads_library)
    assert loads or check.status == "fail"
    assert nvdec.loads_library("libc.so.6")


def caps(**engines):
    return [
        DecoderCaps(chroma, depth, engines.get(f"n{depth}", 7), 144, 144, 8192, 8192)
        for chroma in ("4:2:0", "4:4:4")
        for depth in BIT_DEPTHS
    ]


def test_capabilities_name_engines_formats_and_sizes():
    check = video.check_capabilities(caps)
    assert check.status == "ok"
    assert "7 engines" in check.detail
    assert "144x144 to 8192x8192" in check.detail
    partly = video.check_capabilities(lambda: caps(n12=0))
    assert partly.status == "warn"
    assert partly.detail.endswith("not 4:2:0 12 bit, 4:4:4 12 bit")
    assert video.check_capabilities(lambda: caps(n8=0, n10=0, n12=0)).status == "fail"
    assert check.name == "NVDEC"
    assert video.check_capabilities(caps, gpu=1).name == "NVDEC, GPU 1"


def test_capabilities_without_a_driver_fail_with_the_remedy():
    if nvdec.has_driver():
        pytest.skip("this machine has a driver: not tested")
    check = video.check_capabilities(lambda: nvdec.ask_caps(0))
    assert check.status == "fail"
    assert "libcuda.so.1" in check.detail
    assert "capability `video`" in check.remedy


@pytest.mark.parametrize(
    "program",
    ["print('[]x')", "import sys; sys.exit('the reason')", "print('[{\"chroma\": 1}]')", ""],
)
def test_a_driver_that_does_not_answer_is_an_error(monkeypatch, tmp_path, program):
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(DecoderUnavailableError):
        nvdec.ask_caps(0)


def test_the_encoder_is_named_with_its_reason():
    def check(name, reason=""):
        made = ChosenEncoder(encode_planes, name, reason)
        return video.check_encoder(lambda: made, num_cores=16)

    def chosen(name):
        return check(name).detail

    assert chosen("nvenc").startswith("NVENC, proven")
    assert chosen("x265") == "libx265 on 16 cores"
    assert chosen("own") == "the own HEVC encoder on 16 cores"
    fallback = check("x265", "numba is missing")
    assert (fallback.status, fallback.detail) == ("warn", "libx265 on 16 cores: numba is missing")

    def refuse():
        raise EncoderUnavailableError("NVENC is asked for")

    assert video.check_encoder(refuse, num_cores=1).status == "fail"


def test_golden_streams_cover_every_format():
    streams = golden_streams()
    formats = {(s.geometry.chroma, s.geometry.bit_depth) for s in streams}
    assert formats == {(c, d) for c in ("4:2:0", "4:4:4") for d in BIT_DEPTHS}
    assert all(s.geometry.width >= nvdec.MIN_WIDTH for s in streams), "NVDEC takes them"
    assert video.check_cpu_golden(VideoDecoder()).status == "ok"


class OneBitWrong:
    def decode(self, packets, geometry):
        planes = VideoDecoder().decode(packets, geometry)
        planes[0, 0, 0, 0] ^= geometry.bit_depth == 10
        return planes

    def close(self):
        pass


class Failing(OneBitWrong):
    def decode(self, packets, geometry):
        raise CodecError("the decoder is broken")


def test_one_wrong_bit_on_the_cpu_fails():
    check = video.check_cpu_golden(OneBitWrong())
    assert check.status == "fail"
    assert check.detail == "420_10bit: other samples; 444_10bit: other samples"
    assert "the decoder is broken" in video.check_cpu_golden(Failing()).detail


@pytest.fixture(scope="module")
def processes():
    with DecoderProcesses("cpu", 2) as made:
        yield made


def test_every_process_decodes_every_golden_stream(processes):
    check = video.check_golden_everywhere("cpu", processes, rounds=2)
    assert check.status == "ok"
    assert "6 streams, 2 processes at once, 2 times each" in check.detail


def test_processes_on_one_of_several_gpus_are_asked_alone():
    stream = golden_streams()[0]
    with DecoderProcesses("cpu", 3, gpus=(4, 2)) as processes:
        asked = [len(processes.digests(stream, gpu=gpu)) for gpu in (4, 2, 0, None)]
    assert asked == [2, 1, 0, 3]


class Liar:
    """Of two engines the second gives other samples for one format; on GPU 1 both are right."""

    def digests(self, stream, *, gpu=None):
        is_wrong = stream.name == "444_12bit" and gpu != 1
        return [stream.sha256, "0" * 64 if is_wrong else stream.sha256]


class Broken(Liar):
    def digests(self, stream, *, gpu=None):
        raise CodecError("decoding process 2 of 2 died (exit status -11)")


def test_one_wrong_engine_fails_with_the_stream_and_the_count():
    check = video.check_golden_everywhere("nvdec", Liar(), rounds=3)
    assert check.status == "fail"
    assert check.detail.endswith("444_12bit 3 of 6 times")
    on_gpus = [video.check_golden_everywhere("nvdec", Liar(), rounds=3, gpu=g) for g in (0, 1)]
    assert [(c.name, c.status) for c in on_gpus] == [
        ("nvdec golden, GPU 0", "fail"), ("nvdec golden, GPU 1", "ok"),
    ]  # fmt: skip
    assert "exit status -11" in video.check_golden_everywhere("nvdec", Broken(), rounds=1).detail


def test_a_damaged_stream_is_the_processes_error_and_the_next_one_decodes(processes):
    stream = golden_streams()[0]
    with pytest.raises(CodecError, match="video"):
        processes.digests(replace(stream, packets=(b"\0\0\1garbage", b"x")))
    assert processes.digests(stream) == [stream.sha256] * 2


def test_a_process_that_dies_is_told_by_number_and_status():
    with DecoderProcesses("cpu", 1) as processes:
        os.kill(processes._members[0][0].pid, signal.SIGKILL)
        with pytest.raises(CodecError, match=r"process 1 of 1 died \(exit status -9\)"):
            processes.digests(golden_streams()[0])


def test_a_process_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr("kvfetcher.doctor.parallel_decode._CALL_TIMEOUT_SECONDS", 0.2)
    with DecoderProcesses("cpu", 1) as processes:
        os.kill(processes._members[0][0].pid, signal.SIGSTOP)
        with pytest.raises(CodecError, match="did not answer within 0 s"):
            processes.digests(golden_streams()[0])


def test_nvdec_processes_without_a_driver_say_so():
    if nvdec.has_driver():
        pytest.skip("this machine has a driver: not tested")
    with pytest.raises(DecoderUnavailableError, match=r"libcuda\.so\.1"):
        DecoderProcesses("nvdec", 1)


def test_noise_is_what_it_says():
    stream = noise_stream(256, 160)
    planes = VideoDecoder().decode(stream.packets, stream.geometry)
    assert planes_sha256(planes) == stream.sha256
    assert 1.2 < 8 * len(stream.packets[0]) / planes.size < 2.2
    assert np.ptp(planes) > 2


def test_the_measured_table_is_kept_and_read_back(processes, tmp_path, monkeypatch):
    monkeypatch.setitem(timing.PICTURE_SIZES, "cpu", ((160, 144), (256, 320)))
    said = []

    def measure():
        return timing.measure_table(
            "cpu", processes, device="a test", seconds=0.05, progress=said.append
        )

    check = timing.check_decode_times(measure, folder=tmp_path)
    assert check.status == "ok"
    table = load_table(tmp_path, fallback=H100_NVDEC)
    assert (table.device, table.decoder, table.num_decoders) == ("a test", "cpu", 2)
    small, large = table.points
    assert (small.width, large.width) == (160, 256)
    assert 0 < small.latency_seconds < large.latency_seconds
    assert large.alone_seconds <= large.busy_seconds * 2
    assert table.restore_elements_per_second > 1e5
    assert said == ["timing pictures of 160x144", "timing pictures of 256x320"]


def test_a_table_that_cannot_be_kept_fails(tmp_path):
    (tmp_path / "file").write_text("")
    check = timing.check_decode_times(lambda: H100_NVDEC, folder=tmp_path / "file")
    assert check.status == "fail"

    def refuse():
        raise ConfigError("no table")

    assert timing.check_decode_times(refuse, folder=tmp_path).detail == "no table"
