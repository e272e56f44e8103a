"""Decode rates of NVDEC: bare decoder processes against `kv_decode` behind a real tritonserver.

    python tests/benchmarks/bench_nvdec.py --chunks FOLDER --output FILE.json

`--chunks` is a folder of chunk objects (``*.kvf``), of a store for example; chunks of one profile
and length are one workload. Without it, chunks of `exact` and `uncalibrated` are made from random
values of an 8B model's shape.

What is compared, in one run and on the same units:

gpu     processes with one `NvdecDecoder` each, pictures left on the GPU: what the engines can do
bare    the same, planes copied to host memory: the work of kv_decode without a server
triton  kv_decode behind tritonserver; units and planes in the client's shared memory, so that
        neither passes through a socket

Every decoder's planes are compared with those of the CPU decoder before a rate is printed.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvfetcher.codec.gpu.nvdec import NvdecDecoder, all_caps
from kvfetcher.codec.profiles import encode_chunk, make_profile
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.config import CodecConfig, load_config
from kvfetcher.format.container import parse_header
from kvfetcher.format.sections import SectionKind
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import KVSpec

REPOSITORY = Path(__file__).parents[2] / "model_repository"
MAX_CLIENT_PROCESSES = 7
WAIT_SECONDS = 120.0
SEED = 1


@dataclass(frozen=True)
class Work:
    """One unit with what a right decoder makes of it."""

    data: bytes
    video_bytes: int
    samples: int
    elements: int
    plane_bytes: int
    crc: int

    @classmethod
    def of(cls, data: bytes, decoder: VideoDecoder) -> Work:
        unit = parse_unit(data)
        planes = decoder.decode(unit.packets(), unit.geometry)
        return cls(
            data,
            next(s.raw_bytes for s in unit.sections if s.kind == SectionKind.BITSTREAM),
            planes.size,
            unit.num_elements,
            planes.nbytes,
            zlib.crc32(planes),
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunks", type=Path, help="folder of *.kvf")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--processes", type=_numbers, default=(1, 2, 4, 7, 14))
    parser.add_argument("--modes", type=lambda t: t.split(","), default=["gpu", "bare"])
    parser.add_argument("--instances", type=_numbers, default=(7, 14))
    args = parser.parse_args()
    chunks = _read_chunks(args.chunks) if args.chunks else _make_chunks()
    report = {
        "command": " ".join(sys.argv),
        "machine": _machine(),
        "seconds": args.seconds,
        "workloads": [],
    }
    works = {name: _works(data) for name, data in chunks.items()}
    for name, work in works.items():
        report["workloads"].append(_bare_rows(name, work, args))
        _save(args.output, report)
    for count in args.instances:
        with _kv_decode_server(count) as server:
            for row, work in zip(report["workloads"], works.values(), strict=True):
                row["triton"][str(count)] = rates = _triton_rate(server, work, count, args.seconds)
                bare = row["bare"].get(str(count))
                rates["of_bare"] = (
                    rates["video_gbit_per_s"] / bare["video_gbit_per_s"] if bare else None
                )
                print(f"{row['name']:24} triton {count:2} instances  {_text(rates)}", flush=True)
                _save(args.output, report)
    return 0


def _bare_rows(name: str, works: list[Work], args: argparse.Namespace) -> dict:
    geometry = parse_unit(works[0].data).geometry
    row = {
        "name": name,
        "units": len(works),
        "picture": f"{geometry.num_frames} x {geometry.width}x{geometry.height}"
        f" {geometry.chroma} {geometry.bit_depth} bit",
        "unit_bytes": [len(w.data) for w in works],
        "video_bits_per_sample": 8
        * sum(w.video_bytes for w in works)
        / sum(w.samples for w in works),
        "bits_per_element": 8 * sum(len(w.data) for w in works) / sum(w.elements for w in works),
        "latency_ms": _latency(works),
        "gpu": {},
        "bare": {},
        "triton": {},
    }
    print(f"{name:24} {row['picture']}  alone: {row['latency_ms']}", flush=True)
    for mode in args.modes:
        for count in args.processes:
            row[mode][str(count)] = rates = _bare_rate(works, count, mode, args.seconds)
            print(f"{name:24} {mode:6} {count:2} processes  {_text(rates)}", flush=True)
    return row


def _latency(works: list[Work], repeats: int = 60) -> dict[str, float]:
    """Milliseconds of one unit on an idle, warm decoder, planes in host memory."""
    decoder = NvdecDecoder()
    times = {"bare": [], "gpu": []}
    for index in range(repeats):
        unit = parse_unit(works[index % len(works)].data)
        packets = unit.packets()
        for mode, decode in (("bare", decoder.decode), ("gpu", decoder.decode_on_gpu)):
            start = time.perf_counter()
            decode(packets, unit.geometry)
            times[mode].append(1e3 * (time.perf_counter() - start))
    decoder.close()
    return {
        f"{mode}_{key}": round(value, 3)
        for mode, all_ms in times.items()
        for ms in [sorted(all_ms[len(works) :])]
        for key, value in (("median", statistics.median(ms)), ("p95", ms[int(0.95 * len(ms))]))
    }


def _bare_rate(works: list[Work], count: int, mode: str, seconds: float) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    workers = [
        context.Process(target=_bare_worker, args=(works, i, mode, seconds, barrier, results))
        for i in range(count)
    ]
    return _collect(workers, results)


def _bare_worker(works, first, mode, seconds, barrier, results) -> None:
    decoder = NvdecDecoder()
    units = [parse_unit(work.data) for work in works]
    packets = [unit.packets() for unit in units]
    for work, unit, part in zip(works, units, packets, strict=True):
        planes = decoder.decode(part, unit.geometry)
        if zlib.crc32(planes) != work.crc:
            results.put("NVDEC gave other planes than the CPU decoder")
    decode = decoder.decode if mode == "bare" else decoder.decode_on_gpu
    barrier.wait(WAIT_SECONDS)

    def once(index: int) -> int:
        index = (first + index) % len(works)
        decode(packets[index], units[index].geometry)
        return index

    results.put(_timed(works, once, seconds))
    barrier.wait(WAIT_SECONDS)  # nobody leaves early: the load stays the same for all


def _timed(works, once, seconds: float) -> dict[str, float]:
    """Call `once(i)`, which says which unit it decoded, for some seconds."""
    done = defaultdict(int)
    start = time.perf_counter()
    index = 0
    while time.perf_counter() - start < seconds:
        done[once(index)] += 1
        index += 1
    elapsed = time.perf_counter() - start
    total = {
        name: sum(n * getattr(works[i], name) for i, n in done.items()) / elapsed
        for name in ("video_bytes", "samples", "elements", "plane_bytes")
    }
    return {**total, "units": index / elapsed}


def _collect(workers, results) -> dict[str, float]:
    for worker in workers:
        worker.start()
    parts = []
    for _ in workers:
        part = results.get(timeout=WAIT_SECONDS)
        if isinstance(part, str):
            for worker in workers:
                worker.terminate()
            raise SystemExit(f"wrong: {part}")
        parts.append(part)
    for worker in workers:
        worker.join(WAIT_SECONDS)
    return _sum(parts)


def _sum(parts: list[dict[str, float]]) -> dict[str, float]:
    total = {name: sum(p[name] for p in parts) for name in parts[0]}
    return {
        "video_gbit_per_s": 8e-9 * total["video_bytes"],
        "samples_g_per_s": 1e-9 * total["samples"],
        "elements_g_per_s": 1e-9 * total["elements"],
        "plane_gbyte_per_s": 1e-9 * total["plane_bytes"],
        "units_per_s": total["units"],
    }


def _kv_decode_server(count: int):
    from kvfetcher.launcher import TritonServer

    config = load_config(environ={})
    config = replace(
        config,
        server=replace(
            config.server,
            decode_instances=count,
            http_port=8100,
            grpc_port=8101,
            metrics_port=8102,
        ),
        codec=replace(config.codec, decoder="nvdec"),
        engine=replace(config.engine, arena_bytes=1 << 20),
    )
    folder = Path(tempfile.mkdtemp(prefix="kvfetcher-bench-"))
    (folder / "kv_decode").symlink_to(REPOSITORY / "kv_decode")
    return TritonServer(config, model_repository=folder, log_path=folder / "log")


def _triton_rate(server, works: list[Work], count: int, seconds: float) -> dict[str, float]:
    """Two requests in flight per instance, spread over a few client processes."""
    num_processes = min(count, MAX_CLIENT_PROCESSES)
    threads = 2 * count // num_processes
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(num_processes), context.Queue()
    workers = [
        context.Process(
            target=_triton_worker,
            args=(server.grpc_url, works, i, threads, seconds, barrier, results),
        )
        for i in range(num_processes)
    ]
    return {"in_flight": threads * num_processes, **_collect(workers, results)}


def _triton_worker(url, works, number, num_threads, seconds, barrier, results) -> None:
    slots = [_Slot(url, works, f"kvfetcher-bench-{os.getpid()}-{i}") for i in range(num_threads)]
    try:
        for slot in slots:
            for index in range(len(works)):
                slot.decode(index)
                if not slot.is_right(index):
                    results.put("kv_decode gave other planes than the CPU decoder")
        barrier.wait(WAIT_SECONDS)
        parts = []

        def run(slot: _Slot, first: int) -> None:
            parts.append(_timed(works, lambda i: slot.decode((first + i) % len(works)), seconds))

        threads = [
            threading.Thread(target=run, args=(slot, number * num_threads + i))
            for i, slot in enumerate(slots)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        results.put({name: sum(p[name] for p in parts) for name in parts[0]})
        barrier.wait(WAIT_SECONDS)
    finally:
        for slot in slots:
            slot.close()


class _Slot:
    """One request in flight: a client, its units and its room for planes in shared memory."""

    def __init__(self, url: str, works: list[Work], name: str) -> None:
        import tritonclient.grpc as grpcclient

        self._client = grpcclient.InferenceServerClient(url)
        self._works = works
        units = sum(len(w.data) for w in works)
        self._room = max(w.plane_bytes for w in works)
        self._path = Path("/dev/shm") / name
        self._name, self._units_bytes = name, units
        with self._path.open("wb+") as file:
            file.truncate(units + self._room)
            self._memory = mmap.mmap(file.fileno(), units + self._room)
        self._client.register_system_shared_memory(name, f"/{name}", units + self._room)
        self._requests = []
        at = 0
        for work in works:
            self._memory[at : at + len(work.data)] = work.data
            unit = grpcclient.InferInput("unit", [1, len(work.data)], "UINT8")
            unit.set_shared_memory(name, len(work.data), offset=at)
            planes = grpcclient.InferRequestedOutput("planes")
            planes.set_shared_memory(name, self._room, offset=units)
            self._requests.append(([unit], [planes]))
            at += len(work.data)

    def decode(self, index: int) -> int:
        inputs, outputs = self._requests[index]
        self._client.infer("kv_decode", inputs, outputs=outputs)
        return index

    def is_right(self, index: int) -> bool:
        work = self._works[index]
        start = self._units_bytes
        return zlib.crc32(self._memory[start : start + work.plane_bytes]) == work.crc

    def close(self) -> None:
        self._client.unregister_system_shared_memory(self._name)
        self._client.close()
        self._memory.close()
        self._path.unlink()


def _read_chunks(folder: Path) -> dict[str, list[bytes]]:
    chunks = defaultdict(list)
    for path in sorted(folder.glob("*.kvf")):
        data = path.read_bytes()
        header = parse_header(data)
        chunks[f"{header.profile.split('/')[0]}, {header.num_tokens} tokens"].append(data)
    if not chunks:
        raise SystemExit(f"{folder} holds no *.kvf")
    return dict(chunks)


def _make_chunks() -> dict[str, list[bytes]]:
    """One chunk of each profile that needs no calibration; an 8B model's layers, 8 of 32."""
    spec = KVSpec(num_layers=8, num_kv_heads=8, head_dim=128, dtype="bfloat16")
    rng = np.random.default_rng(SEED)
    chunks = {}
    for tokens in (256, 1024):
        channel = (spec.num_layers, 2, spec.num_kv_heads, 1, spec.head_dim)
        values = rng.normal(0, 3, channel) + np.exp(rng.normal(0, 1, channel)) * rng.normal(
            size=(*channel[:3], tokens, spec.head_dim)
        )
        bits = float32_to_bits(values.astype(np.float32), spec.dtype)
        for profile in ("exact", "uncalibrated"):
            chunk = encode_chunk(
                bits,
                spec=spec,
                profile=make_profile(CodecConfig(profile=profile)),
                identity=bytes(32),
                chunk_key=bytes(32),
                token_ids=range(tokens),
                first_position=0,
                num_threads=len(os.sched_getaffinity(0)),
            )
            chunks[f"{profile} (8B shape), {tokens} tokens"] = [chunk]
    return chunks


def _works(chunks: list[bytes], most: int = 12) -> list[Work]:
    """The units of some chunks, with what the CPU decoder makes of them."""
    decoder = VideoDecoder()
    units = [chunk[e.offset : e.stop] for chunk in chunks for e in parse_header(chunk).units]
    step = max(1, len(units) // most)
    return [Work.of(unit, decoder) for unit in units[::step][:most]]


def _machine() -> dict[str, object]:
    import PyNvVideoCodec

    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    caps = max(all_caps(0), key=lambda c: c.num_engines)
    return {
        "gpu": subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip(),
        "cores": len(os.sched_getaffinity(0)),
        "nvdec_engines": caps.num_engines,
        "PyNvVideoCodec": PyNvVideoCodec.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _text(rates: dict[str, float]) -> str:
    share = rates.get("of_bare")
    return (
        f"{rates['video_gbit_per_s']:6.2f} Gbit/s {rates['samples_g_per_s']:5.2f} G samples/s"
        f" {rates['elements_g_per_s']:5.2f} G elements/s {rates['units_per_s']:7.0f} units/s"
        + (f"  {100 * share:.0f} % of bare" if share else "")
    )


def _save(path: Path, report: dict) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
