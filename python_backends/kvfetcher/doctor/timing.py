"""Measures how long decoding takes by picture size, into the table that the fetcher plans with."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.doctor.check import Check
from kvfetcher.doctor.streams import noise_stream
from kvfetcher.errors import KVFetcherError
from kvfetcher.fetch.planning.decode_times import H100_NVDEC, DecodePoint, DecodeTable, store_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvfetcher.doctor.parallel_decode import DecoderKind, DecoderProcesses, Timing
    from kvfetcher.doctor.streams import Stream

# What chunks of 256 and 1024 tokens are stored in; the largest only where decoding it is quick.
PICTURE_SIZES = {
    "cpu": ((256, 640), (1024, 640), (1024, 1920)),
    "nvdec": ((256, 640), (1024, 640), (1024, 1920), (2048, 3840)),
}
_RESTORE_TOKENS = 256
_RESTORE_RUNS = 5


def measure_table(
    kind: DecoderKind,
    processes: DecoderProcesses,
    *,
    device: str,
    seconds: float,
    progress: Callable[[str], None] = lambda _: None,
    restore_rate: Callable[[], float] | None = None,
) -> DecodeTable:
    """Time every picture size on one process and on all of them.

    Args:
        kind: which decoder `processes` has.
        processes: as many processes as will serve.
        device: the machine's or GPU's name, for people.
        seconds: of each measurement.
        progress: gets one sentence before each size.
        restore_rate: KV elements per second, planes to values; None = measured here on the CPU.

    Raises:
        CodecError: a process refused a stream or died.
    """
    points = []
    for width, height in PICTURE_SIZES[kind]:
        progress(f"timing pictures of {width}x{height}")
        stream = noise_stream(width, height)
        (alone,) = processes.timings(stream, seconds=seconds, num_busy=1)
        busy = processes.timings(stream, seconds=seconds, num_busy=processes.size)
        points.append(_point(stream, alone, busy))
    return DecodeTable(
        device=device,
        decoder=kind,
        num_decoders=processes.size,
        restore_elements_per_second=(restore_rate or measure_restore)(),
        points=tuple(points),
        source=f"kvfetcher doctor, {time.strftime('%Y-%m-%d', time.gmtime())}",
        # Not measured here: it takes a whole server.
        restore_unit_seconds=H100_NVDEC.restore_unit_seconds if kind == H100_NVDEC.decoder else 0.0,
    )


def measure_restore() -> float:
    """KV elements that one process restores per second on the CPU (profile `uncalibrated`)."""
    from kvfetcher.codec import profiles
    from kvfetcher.codec.base import UnitSource
    from kvfetcher.codec.quant import float32_to_bits
    from kvfetcher.codec.uncalibrated import UncalibratedProfile
    from kvfetcher.codec.video import VideoDecoder
    from kvfetcher.spec import KVSpec

    spec = KVSpec(num_layers=4, num_kv_heads=4, head_dim=64)
    shape = (spec.num_layers, 2, spec.num_kv_heads, _RESTORE_TOKENS, spec.head_dim)
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    source = UnitSource(float32_to_bits(noise, spec.dtype), spec, 0, 0)
    profile = UncalibratedProfile()
    unit = profile.encode(source, profile.variants()[0])
    planes = profiles.decode_unit(unit, VideoDecoder())
    times = []
    for _ in range(_RESTORE_RUNS):
        started = time.perf_counter()
        profiles.restore_unit(unit, planes)
        times.append(time.perf_counter() - started)
    return noise.size / statistics.median(times)


def check_decode_times(measure: Callable[[], DecodeTable], *, folder: Path) -> Check:
    """Measure, keep the table in `folder`, and say what it holds."""
    try:
        table = measure()
        path = store_table(folder, table)
    except KVFetcherError as exc:
        return Check("decode times", "fail", str(exc), "the fetcher plans with a built-in table")
    detail = "; ".join(
        f"{p.width}x{p.height} {p.latency_seconds * 1e3:.1f} ms, {p.busy_seconds * 1e3:.1f} ms busy"
        for p in table.points
    )
    rate = sum(3 * p.width * p.height / p.busy_seconds for p in table.points[-1:])
    return Check(
        "decode times",
        "ok",
        f"{table.decoder}, {table.num_decoders} at once: {detail};"
        f" {rate * table.num_decoders / 1e9:.3g} G elements/s in all; kept in {path}",
    )


def _point(stream: Stream, alone: Timing, busy: list[Timing]) -> DecodePoint:
    geometry = stream.geometry
    samples = 3 * geometry.width * geometry.height
    return DecodePoint(
        width=geometry.width,
        height=geometry.height,
        bits_per_sample=8 * len(stream.packets[0]) / samples,
        latency_seconds=alone.latency_seconds,
        alone_seconds=alone.picture_seconds,
        busy_seconds=statistics.fmean(pace.picture_seconds for pace in busy),
    )
