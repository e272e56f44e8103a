"""The GPU data path: tritonserver (BLS -> kv_pipeline -> arena on the GPU) against bare decoders.

    python tests/benchmarks/bench_gpu.py --output FILE.json [--parts rates,instances,memory,...]

The KV cache is synthetic: an 8B model's shape (32 layers, 8 KV heads of 128), coefficients with the
spectrum that SmolLM2-135M's calibration has, through the real codec. Baseline: processes with one
`NvdecDecoder` each that leave the pictures on the GPU, packets parsed beforehand, same units, same run.
Before a rate is printed, what lies in the arena is compared with the CPU's restore.

Parts: rates (chunk lengths, picture sizes, profiles), instances (1 to 14 decoders), memory (prefixes of
4k, 32k, 128k tokens), interference (a matrix product and a running generation beside it).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.codec.nvdec import NvdecDecoder
from kvfetcher.codec.profiles import decode_unit, encode_chunk, restore_unit
from kvfetcher.codec.transform import TransformProfile
from kvfetcher.codec.unit import BITSTREAM, parse_unit
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.config import load_config
from kvfetcher.container import parse_header
from kvfetcher.cuda import cuda_context
from kvfetcher.quant import bits_to_float32, float32_to_bits
from kvfetcher.spec import KVSpec
from kvfetcher.transform.artifact import Calibration, StoredBasis
from kvfetcher.transform.groups import Grouping, from_vectors
from kvfetcher.transform.library import store_calibration
from kvfetcher.transform.rope import LayerRope, Rope, rotate_keys

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1] / "model_repository"
SPEC = KVSpec(num_layers=32, num_kv_heads=8, head_dim=128)
GROUP_LAYERS = 2
TOKENS_PER_BLOCK = 32
FRONTS = 4
LENGTHS = (4096, 32768, 131072)
WAIT_SECONDS = 240.0
SEED = 1

# Deviation of coefficients in steps of `balanced`, by the share of components before it (SmolLM2-135M,
# layers 12 to 17); `dense` is a step at which a coded stream has about 3.6 bits per element.
SHARES = (0, 0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
SIGMAS = (181.8, 96.3, 34.1, 12.0, 3.95, 1.78, 1.0, 0.61, 0.387, 0.248, 0.157, 0.095, 0.03)
STEPS = {"near": 0.2, "balanced": 1.0, "compact": 2.345, "tiny": 4.78}
NAMES = {"near": "dense", "balanced": "balanced", "compact": "compact"}
UNIT_STEP = 0.02


@dataclass(frozen=True)
class Workload:
    """Units of one chunk in one picture size."""

    name: str
    units: list[bytes]
    values: np.ndarray
    """[L, K, H, T, D] as the CPU restores them."""

    @property
    def num_tokens(self) -> int:
        return int(self.values.shape[3])

    @property
    def elements(self) -> list[int]:
        return [parse_unit(u).num_elements for u in self.units]

    @property
    def video_bytes(self) -> list[int]:
        return [
            next(s.raw_bytes for s in parse_unit(u).sections if s.kind == BITSTREAM)
            for u in self.units
        ]


def make_calibration() -> Calibration:
    """One orthonormal basis of size 4096 for every layer group; the spectrum above."""
    rng = np.random.default_rng(SEED)
    grouping = Grouping.even(SPEC, layers=GROUP_LAYERS)
    n = grouping.dimension(0, 0)
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < n:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    sigma = np.exp(np.interp(np.arange(n) / n, SHARES, np.log(SIGMAS))).astype(np.float32)
    kept = int(np.count_nonzero(sigma >= 0.25 * min(STEPS.values())))
    rows = hadamard[rng.permutation(n)[:kept]] * rng.choice([-1.0, 1.0], n) / np.sqrt(n)
    basis = StoredBasis(
        rows.astype(np.float16),
        sigma[:kept] * np.float32(UNIT_STEP),
        rng.normal(0, 0.5, n).astype(np.float32),
    )
    table = tuple(float(f) for f in 500000.0 ** -(np.arange(64) / 64))
    eye = np.eye(SPEC.head_dim, dtype=np.float32)
    roots = np.broadcast_to(eye, (SPEC.num_layers, 2, SPEC.num_kv_heads, *eye.shape)).copy()
    return Calibration(
        "cd" * 32,
        grouping,
        Rope((LayerRope(table),) * SPEC.num_layers),
        roots,
        {(g, 0): basis for g in range(len(grouping.layer_counts))},
        {name: step * UNIT_STEP for name, step in STEPS.items()},
        0.25,
        0,
        {"texts": "none: synthetic"},
    )


def make_values(calibration: Calibration, num_tokens: int) -> np.ndarray:
    """KV bit patterns whose coefficients have the calibration's spectrum."""
    rng = np.random.default_rng([SEED, num_tokens])
    shape = (SPEC.num_layers, 2, SPEC.num_kv_heads, num_tokens, SPEC.head_dim)
    values = np.empty(shape, np.float32)
    grouping = calibration.grouping
    for group, start in enumerate(grouping.layer_starts):
        basis = calibration.bases[group, 0]
        z = rng.normal(size=(num_tokens, len(basis.sigma))).astype(np.float32) * basis.sigma
        vectors = z @ basis.rows.astype(np.float32) + basis.mean
        part = values[start : start + grouping.layer_counts[group]]
        from_vectors(vectors, part, (0, SPEC.num_kv_heads))
    rotate_keys(values[:, 0], calibration.rope, 0)
    return float32_to_bits(values, SPEC.dtype)


def make_workloads(calibration: Calibration, wanted: list[tuple[int, str, int]]) -> list[Workload]:
    """(tokens, profile, layer groups per picture) each."""
    made, bits = [], {}
    for tokens, profile, joined in wanted:
        if tokens not in bits:
            bits[tokens] = make_values(calibration, tokens)
        rank = calibration.unit_rank(0, profile)
        size = f"{max(tokens, 144)}x{-(-rank * joined // 3)}"
        coder = TransformProfile(profile, calibration, frame_sizes=(size,))
        chunk = encode_chunk(
            bits[tokens],
            spec=SPEC,
            profile=coder,
            identity=bytes(32),
            chunk_key=bytes(32),
            token_ids=range(tokens),
            first_position=0,
            num_threads=len(os.sched_getaffinity(0)),
        )
        units = [chunk[e.offset : e.stop] for e in parse_header(chunk).units]
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(_restore_on_cpu, units))
        made.append(
            Workload(f"{NAMES[profile]}, {tokens} tokens, {size}", units, np.concatenate(parts))
        )
    return made


def _restore_on_cpu(unit: bytes) -> np.ndarray:
    return restore_unit(unit, decode_unit(unit, VideoDecoder())).values


# Bare decoders


def bare_rate(work: Workload, count: int, seconds: float) -> float:
    """Elements per second of `count` processes; pictures stay on the GPU."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    workers = [
        context.Process(target=_bare_worker, args=(work.units, i, seconds, barrier, results))
        for i in range(count)
    ]
    for worker in workers:
        worker.start()
    total = sum(results.get(timeout=WAIT_SECONDS) for _ in workers)
    for worker in workers:
        worker.join(WAIT_SECONDS)
    return total


def _bare_worker(data, first, seconds, barrier, results) -> None:
    decoder = NvdecDecoder()
    units = [parse_unit(unit) for unit in data]
    packets = [unit.packets() for unit in units]
    for unit, part in zip(units[:2], packets, strict=False):
        decoder.decode_on_gpu(part, unit.geometry)
    barrier.wait(WAIT_SECONDS)
    start, elements, index = time.perf_counter(), 0, first
    while time.perf_counter() - start < seconds:
        unit = units[index % len(units)]
        decoder.decode_on_gpu(packets[index % len(units)], unit.geometry)
        elements += unit.num_elements
        index += 1
    results.put(elements / (time.perf_counter() - start))
    barrier.wait(WAIT_SECONDS)


# Through the server


class Rig:
    """A tritonserver with the codec's models and `bench_front`, and an arena on the GPU."""

    def __init__(self, num_decoders: int, *, arena_bytes: int, restorers: int = 1) -> None:
        from kvfetcher.gpu_arena import GpuArena  # torch: not in the bare decoders' processes
        from kvfetcher.server import TritonServer

        config = load_config(environ={})
        ports = {"http_port": 8100, "grpc_port": 8101, "metrics_port": 8102}
        server = replace(
            config.server, decode_instances=num_decoders, restore_instances=restorers, **ports
        )
        config = replace(
            config,
            server=server,
            codec=replace(config.codec, decoder="nvdec"),
            engine=replace(config.engine, arena_bytes=1 << 20),
        )
        self.folder = Path(tempfile.mkdtemp(prefix="kvfetcher-bench-"))
        for model in ("kv_decode", "kv_restore", "kv_pipeline"):
            (self.folder / model).symlink_to(REPOSITORY / model)
        (self.folder / "bench_front").symlink_to(HERE / "models" / "bench_front")
        self.in_flight = max(8, 2 * num_decoders + 4)
        self.arena = GpuArena.create_on(
            0,
            Path("/dev/shm") / f"kvfetcher-bench-{os.getpid()}-arena",
            spec=SPEC,
            tokens_per_block=TOKENS_PER_BLOCK,
            num_bytes=arena_bytes,
        )
        self.server = TritonServer(
            config, model_repository=self.folder, log_path=self.folder / "log"
        )
        self.server.start()

    def targets(self, num_tokens: int, count: int) -> list[str]:
        """Targets for whole chunks, one behind the other."""
        blocks = num_tokens // TOKENS_PER_BLOCK
        count = min(count, self.arena.num_blocks // blocks)
        return [
            self.arena.target(tuple(range(i * blocks, (i + 1) * blocks)), num_tokens).to_json()
            for i in range(count)
        ]

    def call(self, plans: list[dict]) -> list[dict]:
        """Run plans side by side, one in each front."""
        with ThreadPoolExecutor(len(plans)) as pool:
            return list(pool.map(self._call, plans))

    def _call(self, plan: dict) -> dict:
        import tritonclient.grpc as grpcclient

        client = grpcclient.InferenceServerClient(self.server.grpc_url)
        given = grpcclient.InferInput("plan", [1], "BYTES")
        given.set_data_from_numpy(np.array([json.dumps(plan)], dtype=object))
        answer = client.infer("bench_front", [given], client_timeout=WAIT_SECONDS)
        result = json.loads(answer.as_numpy("result")[0])
        if result["errors"]:
            raise SystemExit(f"kv_pipeline failed: {result['errors']}\n{self.log_tail()}")
        return result

    def log_tail(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]

    def paths(self, work: Workload) -> list[str]:
        found = []
        for index, unit in enumerate(work.units):
            path = self.folder / f"{work.name.replace(' ', '')}-{index}.unit"
            if not path.exists():
                path.write_bytes(unit)
            found.append(str(path))
        return found

    def check(self, work: Workload) -> dict[str, float]:
        """Restore the chunk once, and compare what lies in the arena with the CPU's values."""
        target = self.targets(work.num_tokens, 1)[0]
        self.arena.blocks.fill_(-1)
        paths = self.paths(work)
        self.call([{"units": paths, "targets": [target], "in_flight": 2, "once": True}])
        from kvfetcher.arena import BlockTarget

        got = self.arena.read(BlockTarget.from_json(target))
        differs = got != work.values
        a, b = bits_to_float32(got, SPEC.dtype), bits_to_float32(work.values, SPEC.dtype)
        scale = np.sqrt(np.square(b).mean(axis=3, keepdims=True))
        step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(b), 1e-9))) - 7)
        over = np.abs(a - b) - np.maximum(1.01 * step, scale * 2.0**-9)
        if not over.max() <= 0:
            raise SystemExit(f"{work.name}: {(over > 0).sum()} values differ by more than rounding")
        return {
            "values_one_step_apart": float(differs.mean()),
            "largest_difference": float(np.abs(a - b).max()),
        }

    def rate(
        self, work: Workload, seconds: float, *, in_flight: int = 0, fronts: int = FRONTS
    ) -> dict:
        """Elements per second of the whole path."""
        per_front = max(1, (in_flight or self.in_flight) // fronts)
        targets, paths = self.targets(work.num_tokens, 8), self.paths(work)
        plans = [
            {
                "units": paths,
                "targets": targets[i % len(targets) :] + targets[: i % len(targets)],
                "first": i * 3,
                "in_flight": per_front,
                "seconds": seconds,
            }
            for i in range(fronts)
        ]
        results = self.call(plans)
        elements = dict(zip(paths, work.elements, strict=True))
        video = dict(zip(paths, work.video_bytes, strict=True))
        stages = {
            name: sorted(x for r in results for x in r[name])
            for name in ("decode_ms", "restore_ms")
        }
        ms = sorted(x for r in results for x in r["latency_ms"])
        done = [(p, n / r["seconds"]) for r in results for p, n in r["done"].items()]
        how: dict[str, int] = {}
        for result in results:
            for key, n in result["how"].items():
                how[key] = how.get(key, 0) + n
        return {
            "elements_g_per_s": 1e-9 * sum(elements[p] * n for p, n in done),
            "video_gbit_per_s": 8e-9 * sum(video[p] * n for p, n in done),
            "units_per_s": sum(n for _, n in done),
            "in_flight": per_front * fronts,
            "latency_ms_median": ms[len(ms) // 2],
            "latency_ms_p95": ms[int(0.95 * len(ms))],
            **{f"{name}_median": found[len(found) // 2] for name, found in stages.items()},
            "how": how,
        }

    def close(self) -> None:
        self.server.stop()
        self.arena.close()
        self.arena.unlink()


# Parts


def run_bare(works: list[Workload], args: argparse.Namespace, report: dict) -> None:
    for work in works:
        row = report["rates"][work.name] = describe(work)
        for n in (7, 14):
            row[f"bare_{n}"] = 1e-9 * bare_rate(work, n, args.seconds)
        print(work.name, row, flush=True)


def run_rate(rig: Rig, work: Workload, args: argparse.Namespace, report: dict) -> None:
    row = report["rates"][work.name]
    server = rig.server.config.server
    key = f"triton_{server.decode_instances}_{server.restore_instances}"
    row["check"] = rig.check(work)
    rig.rate(work, 1.0)
    found = row[key] = rig.rate(work, args.seconds)
    for n in (7, 14):
        found[f"of_bare_{n}"] = round(found["elements_g_per_s"] / row[f"bare_{n}"], 3)
    alone = rig.rate(work, 1.0, in_flight=1, fronts=1)
    found["alone_ms_median"], found["alone_ms_p95"] = (
        alone["latency_ms_median"],
        alone["latency_ms_p95"],
    )
    print(work.name, key, json.dumps(found), row["check"], flush=True)


def with_rig(count: int, restorers: int, work: Callable[[Rig], None], args, report: dict) -> None:
    rig = Rig(count, arena_bytes=SPEC.bytes_per_token * max(LENGTHS), restorers=restorers)
    try:
        work(rig)
    finally:
        if args.show_log:
            print(rig.log_tail(), flush=True)
        rig.close()
        args.output.write_text(json.dumps(report, indent=1) + "\n")


def describe(work: Workload) -> dict:
    geometry = parse_unit(work.units[0]).geometry
    return {
        "units": len(work.units),
        "picture": f"{geometry.num_frames} x {geometry.width}x{geometry.height} {geometry.bit_depth} bit",
        "bits_per_element": 8 * sum(map(len, work.units)) / sum(work.elements),
    }


def run_instances(work: Workload, args: argparse.Namespace, report: dict) -> None:
    row = report["instances"] = {"workload": work.name, "bare": {}, "triton": {}}
    for count in args.counts:
        row["bare"][count] = 1e-9 * bare_rate(work, count, args.seconds)

        def measure(rig: Rig, count: int = count) -> None:
            rig.rate(work, 1.0)
            row["triton"][count] = rig.rate(work, args.seconds)

        with_rig(count, args.restorers[0], measure, args, report)
        found = row["triton"][count]["elements_g_per_s"]
        print(count, "decoders: bare", row["bare"][count], "triton", found, flush=True)


def run_memory(rig: Rig, work: Workload, report: dict) -> None:
    """Extra GPU memory, over all processes, while prefixes of several lengths are restored."""
    row = report["memory"] = {"workload": work.name, "extra_mib": {}, "seconds": {}}
    context = cuda_context(0)
    cold = context.memory_info()[0]
    rig.rate(work, 2.0)
    warm = context.memory_info()[0]
    row["warm_up_mib"] = (cold - warm) >> 20
    for tokens in LENGTHS:
        targets = rig.targets(work.num_tokens, tokens // work.num_tokens)
        lowest, stop = [warm], threading.Event()

        def watch(lowest: list[int] = lowest, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                lowest[0] = min(lowest[0], context.memory_info()[0])
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        shares = [targets[i::FRONTS] for i in range(FRONTS)]
        plan = {"units": rig.paths(work), "in_flight": 6, "once": True}
        began = time.perf_counter()
        rig.call([{**plan, "targets": share} for share in shares if share])
        row["seconds"][tokens] = time.perf_counter() - began
        stop.set()
        watcher.join()
        row["extra_mib"][tokens] = (warm - lowest[0]) >> 20
    print("memory", row, flush=True)


def run_interference(rig: Rig, work: Workload, report: dict) -> None:
    """What a matrix product and a running generation lose beside decoding and restoring."""
    row = report["interference"] = {"workload": work.name}
    for name, target in (("gemm_tflop_per_s", _gemm), ("generation_tokens_per_s", _generate)):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        worker = context.Process(target=target, args=(theirs,))
        worker.start()
        if not ours.poll(WAIT_SECONDS):
            raise SystemExit(f"{name} did not start")
        ours.recv()
        rates: dict[str, list[float]] = {"alone": [], "beside": []}
        path = []
        for _ in range(3):
            rates["alone"].append(_ask(ours, 1.0))
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(rig.rate, work, 2.2)
                time.sleep(0.7)
                rates["beside"].append(_ask(ours, 1.0))
                path.append(running.result()["elements_g_per_s"])
        ours.send(0)
        worker.join(WAIT_SECONDS)
        alone, beside = (float(np.median(rates[k])) for k in ("alone", "beside"))
        row[name] = {**rates, "lost": 1 - beside / alone, "path_elements_g_per_s": path}
        print("interference", name, row[name], flush=True)


def _ask(pipe, seconds: float) -> float:
    pipe.send(seconds)
    return pipe.recv()


def _gemm(pipe) -> None:
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    _serve_rates(pipe, lambda: torch.mm(a, b, out=out), per_call=2 * 8192**3 * 1e-12, batch=16)


def _generate(pipe) -> None:
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from kvfetcher.engines.forward import forward

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=32768,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
    ids = torch.zeros((1, 1024), dtype=torch.long, device="cuda")
    with torch.inference_mode():
        cache = DynamicCache()
        forward(model, ids, cache)

        def step() -> None:
            forward(model, ids[:, :1], cache)
            if cache.get_seq_length() > 4096:
                cache.crop(1024)

        _serve_rates(pipe, step, per_call=1.0, batch=1)


def _serve_rates(pipe, call, *, per_call: float, batch: int) -> None:
    import torch

    for _ in range(10):
        call()
    torch.cuda.synchronize()
    pipe.send("ready")
    while seconds := pipe.recv():
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            for _ in range(batch):
                call()
            torch.cuda.synchronize()
            calls += batch
        pipe.send(per_call * calls / (time.perf_counter() - start))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--parts", default="rates,instances,memory,interference")
    parser.add_argument("--decoders", type=_numbers, default=(14, 7), help="for the rates")
    parser.add_argument("--counts", type=_numbers, default=(1, 2, 4, 7, 14), help="for the table")
    parser.add_argument("--restorers", type=_numbers, default=(1,))
    parser.add_argument("--few", action="store_true", help="three workloads instead of all")
    parser.add_argument("--show-log", action="store_true")
    args = parser.parse_args()
    calibration = make_calibration()
    store_calibration(calibration)
    wanted = [(1024, "balanced", 1), (1024, "balanced", 2), (1024, "compact", 2)]
    if not args.few:
        wanted += [
            (1024, "balanced", 4),
            (1024, "compact", 1),
            (1024, "near", 1),
            (256, "balanced", 1),
            (256, "balanced", 4),
            (256, "compact", 4),
            (256, "near", 4),
        ]
    began = time.perf_counter()
    works = make_workloads(calibration, wanted)
    print(f"workloads made in {time.perf_counter() - began:.1f} s", flush=True)
    report: dict = {"command": " ".join(sys.argv), "machine": _machine(), "rates": {}}
    parts = args.parts.split(",")
    if "rates" in parts:
        run_bare(works, args, report)

    def measure(rig: Rig) -> None:
        for work in works if "rates" in parts else ():
            run_rate(rig, work, args, report)
        if "memory" in parts and "memory" not in report:
            run_memory(rig, works[1], report)
        if "interference" in parts and "interference" not in report:
            run_interference(rig, works[1], report)

    for decoders, restorers in itertools.product(args.decoders, args.restorers):
        with_rig(decoders, restorers, measure, args, report)
    if "instances" in parts:
        run_instances(works[1], args, report)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _machine() -> dict[str, object]:
    import PyNvVideoCodec
    import torch
    import triton

    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return {
        "gpu": subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip(),
        "cores": len(os.sched_getaffinity(0)),
        "PyNvVideoCodec": PyNvVideoCodec.__version__,
        "torch": torch.__version__,
        "triton_language": triton.__version__,
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
