"""The GPU data path: tritonserver (BLS -> kv_pipeline -> arena on the GPU) against bare decoders.

    python tests/benchmarks/bench_gpu.py --output FILE.json [--parts bare,rates,...]

The KV cache is synthetic: an 8B model's shape (32 layers, 8 KV heads of 128), coefficients with the
spectrum that SmolLM2-135M's calibration has, through the real codec. Baseline: processes with one
`NvdecDecoder` each that leave the pictures on the GPU, packets parsed beforehand, same units, same run.
Before a rate is printed, what lies in the arena is compared with the CPU's restore.

Parts, the most telling first; those that the time does not suffice for are named in `left_out`:

bare          7 and 14 decoders; 14 that copy pictures as kv_decode does; restoring alone, and beside 14
rates         14 decoders through tritonserver, for each number of kv_restore processes, and with more
              memory for planes; where each unit's time went
memory        GPU memory, from before the server's start to prefixes of 128k tokens
interference  a matrix product and a running generation beside it (and beside CacheGen's decoder)
more          other profiles, chunk lengths and picture sizes, and packed units, with the best number
              of kv_restore, and what a running generation loses beside each
instances     1 to 14 decoders, and what a running generation loses beside them

With ``--mps`` all of them run under NVIDIA's Multi-Process Service, with ``--gpus 0,1`` decoders take
turns on NVDEC of these GPUs; arena, restoring and what runs beside it stay on GPU 0, whose memory is told.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from gpu_bare import WAIT_SECONDS, DecoderProcesses, decode_in_a_loop, rate_of, restore_in_a_loop
from gpu_cachegen import decode_cachegen_in_a_loop, find_kernels
from gpu_counters import busy_cores, cpu_times, per_unit, stage_times, triton_counters

from kvfetcher.codec.ladder.artifact import Calibration, StoredBasis
from kvfetcher.codec.ladder.groups import Grouping, from_vectors
from kvfetcher.codec.ladder.library import store_calibration
from kvfetcher.codec.ladder.profile import TransformProfile
from kvfetcher.codec.ladder.rope import LayerRope, Rope, rotate_keys
from kvfetcher.codec.profiles import decode_unit, encode_chunk, restore_unit
from kvfetcher.codec.quant import bits_to_float32, float32_to_bits
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.config import MPS_PIPE_VARIABLE, load_config
from kvfetcher.format.container import parse_header
from kvfetcher.format.sections import SectionKind
from kvfetcher.format.unit import parse_unit
from kvfetcher.memory.cuda import cuda_context
from kvfetcher.memory.permits import Permits
from kvfetcher.memory.split_arena import publish_arena
from kvfetcher.spec import PACKED_VARIANT, KVSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1] / "model_repository"
SPEC = KVSpec(num_layers=32, num_kv_heads=8, head_dim=128)
GROUP_LAYERS = 2
TOKENS_PER_BLOCK = 32
FRONTS = 4
LENGTHS = (4096, 32768, 131072)
PARTS = ("bare", "rates", "memory", "interference", "more", "instances")
# (tokens, profile, layer groups in a picture; 0 = packed units)
MAIN = ((1024, "balanced", 1), (1024, "balanced", 2))
MORE = (
    (1024, "near", 1),
    (1024, "compact", 3),
    (256, "balanced", 8),
    (256, "near", 4),
    (256, "compact", 8),
    (1024, "balanced", 0),
    (256, "balanced", 0),
    (256, "balanced", 4),
    (1024, "balanced", 4),
    (256, "balanced", 2),
    (256, "balanced", 1),
)
SEED = 1

# Deviation of coefficients in steps of `balanced`, by the share of components before it (SmolLM2-135M,
# layers 12 to 17); `dense` is a step at which a coded stream has about 3.6 bits per element.
SHARES = (0, 0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
SIGMAS = (181.8, 96.3, 34.1, 12.0, 3.95, 1.78, 1.0, 0.61, 0.387, 0.248, 0.157, 0.095, 0.03)
STEPS = {"near": 0.2, "balanced": 1.0, "compact": 2.345, "tiny": 4.78}
NAMES = {"near": "dense", "balanced": "balanced", "compact": "compact"}
UNIT_STEP = 0.02
# A load that something runs beside, from before it is asked for its rate of a second.
_LOAD_SECONDS, _LEAD_SECONDS, _ROUNDS = 2.2, 0.7, 3
# A unit's time under load is 60 ms at most: then as many go in as come out.
_FILL_SECONDS = 0.15


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
            sum(s.raw_bytes for s in parse_unit(u).sections if s.kind == SectionKind.BITSTREAM)
            for u in self.units
        ]

    @property
    def has_pictures(self) -> bool:
        return parse_unit(self.units[0]).geometry.num_frames > 0


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
    half = SPEC.head_dim // 2
    table = tuple(float(f) for f in 500000.0 ** -(np.arange(half) / half))
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


def make_workloads(
    calibration: Calibration, wanted: Sequence[tuple[int, str, int]], bits: dict[int, np.ndarray]
) -> list[Workload]:
    """(tokens, profile, layer groups per picture) each; `bits` keeps values by their tokens."""
    made = []
    for tokens, profile, joined in wanted:
        if tokens not in bits:
            bits[tokens] = make_values(calibration, tokens)
        rank = calibration.unit_rank(0, profile)
        size = f"{max(tokens, 144)}x{-(-rank * max(joined, 1) // 3)}"
        coder = TransformProfile(profile, calibration, frame_sizes=(size,), packed_copy=not joined)
        variant = size if joined else PACKED_VARIANT
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
        units = [
            chunk[e.offset : e.stop] for e in parse_header(chunk).units if e.variant == variant
        ]
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(_restore_on_cpu, units))
        made.append(
            Workload(f"{NAMES[profile]}, {tokens} tokens, {variant}", units, np.concatenate(parts))
        )
    return made


def _restore_on_cpu(unit: bytes) -> np.ndarray:
    return restore_unit(unit, decode_unit(unit, VideoDecoder())).values


# Through the server


class Rig:
    """A tritonserver with the codec's models and `bench_front`, and an arena on the GPU."""

    def __init__(
        self,
        num_decoders: int,
        *,
        arena_bytes: int,
        restorers: int = 1,
        plane_bytes: int = 0,
        gpus: tuple[int, ...] = (0,),
    ) -> None:
        from kvfetcher.launcher import TritonServer
        from kvfetcher.memory.gpu_arena import (
            GpuArena,  # torch: not in the bare decoders' processes
        )

        config = load_config(environ={})
        ports = {"http_port": 8100, "grpc_port": 8101, "metrics_port": 8102}
        server = replace(
            config.server,
            decode_instances=num_decoders,
            decode_gpus=gpus,
            restore_instances=restorers,
            plane_bytes=plane_bytes or config.server.plane_bytes,
            **ports,
        )
        config = replace(
            config,
            server=server,
            codec=replace(config.codec, decoder="nvdec"),
            engine=replace(config.engine, arena_bytes=1 << 20, arena="gpu"),
        )
        self.folder = Path(tempfile.mkdtemp(prefix="kvfetcher-bench-"))
        for model in ("kv_decode", "kv_restore", "kv_pipeline"):
            (self.folder / model).symlink_to(REPOSITORY / model)
        (self.folder / "bench_front").symlink_to(HERE / "models" / "bench_front")
        self.restorers = restorers
        self.in_flight = config.fetch.units_in_flight(num_decoders)  # as kv_fetch
        self.free_bytes = {"before": _free_bytes()}
        self.arena = GpuArena.create_on(
            0,
            Path("/dev/shm") / f"kvfetcher-bench-{os.getpid()}-arena",
            spec=SPEC,
            tokens_per_block=TOKENS_PER_BLOCK,
            num_bytes=arena_bytes,
        )
        self.free_bytes["arena"] = _free_bytes()
        self.server = TritonServer(
            config, model_repository=self.folder, log_path=self.folder / "log"
        )
        self.server.start()
        publish_arena(self.server.run_dir, self.arena)
        self.free_bytes["server"] = _free_bytes()

    def targets(self, num_tokens: int, count: int) -> list[str]:
        """Targets for whole chunks, one behind the other."""
        blocks = num_tokens // TOKENS_PER_BLOCK
        count = min(count, self.arena.num_blocks // blocks)
        permits = Permits.of_run(self.server.run_dir)
        return [
            permits.seal(
                "write",
                self.arena.target(tuple(range(i * blocks, (i + 1) * blocks)), num_tokens).to_json(),
            )
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
        from kvfetcher.memory.arena import BlockTarget

        got = self.arena.read(BlockTarget.from_json(target.partition(" ")[2]))
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
                "seconds": seconds + _FILL_SECONDS,
                "lead_seconds": _FILL_SECONDS,
            }
            for i in range(fronts)
        ]
        before, ticks = self.counters(), cpu_times()
        results = self.call(plans)
        cores, after = busy_cores(ticks, cpu_times()), self.counters()
        elements = dict(zip(paths, work.elements, strict=True))
        video = dict(zip(paths, work.video_bytes, strict=True))
        units = [u for r in results for u in r["units"]]
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
            "how": how,
            "stages": stage_times(units, restorers=self.restorers),
            "triton_us_per_unit": per_unit(before, after),
            "busy_cores": cores,
        }

    def counters(self) -> dict[str, dict[str, float]]:
        url = f"http://{self.server.metrics_url}/metrics"
        with urllib.request.urlopen(url, timeout=WAIT_SECONDS) as answer:
            return triton_counters(answer.read().decode())

    def close(self) -> None:
        self.server.stop()
        self.arena.close()
        self.arena.unlink()


# Parts


class Plan:
    """What is still to be done, in the time that is left; writes the report as it grows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.bits: dict[int, np.ndarray] = {}
        self.report: dict = {
            "command": " ".join(["bench_gpu.py", *sys.argv[1:]]),
            "machine": machine(),
            "rates": {},
            "spent_seconds": {},
            "left_out": [],
            "errors": {},
        }
        self._began = time.monotonic()
        self._deadline = self._began + args.budget_seconds

    def has_time(self, name: str, seconds: float) -> bool:
        """Whether a step that takes so long may begin; else it is noted."""
        if time.monotonic() + seconds <= self._deadline:
            return True
        self.report["left_out"].append(name)
        return False

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step, and let the others go on if it fails."""
        began = time.monotonic()
        try:
            yield
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - told in the report
            self.report["errors"][name] = f"{type(exc).__name__}: {exc}"
            print(f"{name} failed: {exc}", flush=True)
        self.report["spent_seconds"][name] = round(time.monotonic() - began, 1)
        self.write()

    def write(self) -> None:
        self.args.output.write_text(json.dumps(self.report, indent=1) + "\n")

    def bare_decoders(self, count: int) -> DecoderProcesses:
        return DecoderProcesses(decode_in_a_loop, count, gpus=self.args.gpus)

    def row(self, work: Workload) -> dict:
        return self.report["rates"].setdefault(work.name, describe(work))


def run_bare(plan: Plan, works: list[Workload], *, seconds: float, all_arms: bool) -> None:
    """Bare decoders; with `all_arms` also what copying and restoring beside them cost."""
    with contextlib.ExitStack() as stack:
        decoders = stack.enter_context(plan.bare_decoders(max(plan.args.bare)))
        restorer = stack.enter_context(DecoderProcesses(restore_in_a_loop, 1)) if all_arms else None
        for work in works:
            row = plan.row(work)
            decoders.load(work.units)
            for n in plan.args.bare:
                row[f"bare_{n}"] = 1e-9 * decoders.rate(n, seconds)
            if restorer is not None:
                n = max(plan.args.bare)
                row[f"bare_{n}_with_ring_copy"] = 1e-9 * decoders.rate(n, seconds, ring=True)
                restorer.load(work.units)
                row["restorer_alone"] = 1e-9 * restorer.rate(1, seconds)
                beside = restorer.start(1, seconds)
                row[f"bare_{n}_beside_restorer"] = 1e-9 * decoders.rate(n, seconds, ring=True)
                row["restorer_beside_decoders"] = 1e-9 * rate_of(beside)
            print(work.name, row, flush=True)


def warm_up(rig: Rig, work: Workload) -> None:
    """Until every restorer has every inverse transform, and has let go of other profiles'."""
    rig.rate(work, 4.0)


def run_rate(plan: Plan, rig: Rig, work: Workload, key: str, *, seconds: float) -> None:
    row = plan.row(work)
    if "check" not in row:
        row["check"] = rig.check(work)
    warm_up(rig, work)
    found = row[key] = rig.rate(work, seconds)
    for n in plan.args.bare:
        if f"bare_{n}" in row:
            found[f"of_bare_{n}"] = round(found["elements_g_per_s"] / row[f"bare_{n}"], 3)
    deeper = rig.rate(work, seconds / 2, in_flight=2 * rig.in_flight)
    found["twice_in_flight_g_per_s"] = deeper["elements_g_per_s"]
    alone = rig.rate(work, 1.0, in_flight=1, fronts=1)
    found["alone_ms_median"], found["alone_ms_p95"] = (
        alone["latency_ms_median"],
        alone["latency_ms_p95"],
    )
    print(work.name, key, json.dumps(found), row["check"], flush=True)


@contextlib.contextmanager
def open_rig(plan: Plan, count: int, restorers: int, *, plane_bytes: int = 0) -> Iterator[Rig]:
    arena_bytes = SPEC.bytes_per_token * max(LENGTHS)
    rig = Rig(
        count,
        arena_bytes=arena_bytes,
        restorers=restorers,
        plane_bytes=plane_bytes,
        gpus=plan.args.gpus,
    )
    try:
        yield rig
    finally:
        if plan.args.show_log:
            print(rig.log_tail(), flush=True)
        rig.close()


def describe(work: Workload) -> dict:
    geometry = parse_unit(work.units[0]).geometry
    return {
        "units": len(work.units),
        "picture": f"{geometry.num_frames} x {geometry.width}x{geometry.height} {geometry.bit_depth} bit",
        "plane_bytes": geometry.num_bytes,
        "bits_per_element": 8 * sum(map(len, work.units)) / sum(work.elements),
    }


def run_rates(plan: Plan, works: list[Workload], parts: tuple[str, ...]) -> None:
    """The main rates, and in their server the memory and the interference."""
    count = plan.args.decoders
    arms = [(r, 0) for r in plan.args.restorers]
    arms += [(max(plan.args.restorers), plan.args.large_plane_bytes)] * bool(
        plan.args.large_plane_bytes
    )
    for restorers, plane_bytes in arms:
        key = f"triton_{count}_{restorers}" + (f"_{plane_bytes >> 20}_mib" if plane_bytes else "")
        if not plan.has_time(key, 60):
            continue
        with plan.step(key), open_rig(plan, count, restorers, plane_bytes=plane_bytes) as rig:
            if "memory" in parts and "memory" not in plan.report:
                with plan.step("memory"):  # first: nothing is decoded yet
                    run_memory(rig, works[-1], plan.report)
            for work in works if "rates" in parts else ():
                with plan.step(f"{key}, {work.name}"):
                    run_rate(plan, rig, work, key, seconds=plan.args.seconds)
            if "interference" in parts and "interference" not in plan.report:
                with plan.step("interference"):
                    run_interference(plan, rig, works, key)


def best_restorers(plan: Plan) -> int:
    """The number of kv_restore processes with the highest rate so far."""
    rates = {
        restorers: found["elements_g_per_s"]
        for restorers in plan.args.restorers
        for row in plan.report["rates"].values()
        if (found := row.get(f"triton_{plan.args.decoders}_{restorers}"))
    }
    return max(rates, key=rates.__getitem__, default=plan.args.restorers[0])


def run_more(plan: Plan, calibration: Calibration) -> None:
    """Other workloads, one by one while there is time, each bare and through one server."""
    restorers, seconds = best_restorers(plan), plan.args.seconds
    key = f"triton_{plan.args.decoders}_{restorers}"
    works = []
    for wanted in MORE:
        if plan.has_time(f"workload {wanted}", 90):
            works += make_workloads(calibration, [wanted], plan.bits)
    if works and plan.has_time("more", 60):
        with plan.step("more, bare"):
            drawn = [work for work in works if work.has_pictures]
            run_bare(plan, drawn, seconds=seconds, all_arms=False)
        with (
            plan.step("more"),
            Neighbour(_generate) as generation,
            open_rig(plan, plan.args.decoders, restorers) as rig,
        ):
            for work in works:
                if plan.has_time(work.name, 25):
                    run_rate(plan, rig, work, key, seconds=seconds)
                    beside = _beside_path(generation, rig, work)
                    plan.row(work)[key]["generation"] = beside["path"]


def run_instances(plan: Plan, works: list[Workload]) -> None:
    restorers, seconds = best_restorers(plan), plan.args.seconds
    table = plan.report["instances"] = {"restorers": restorers}
    for work in works:
        table[work.name] = {"bare": {}, "triton": {}}
    beside = table[works[-1].name]["generation"] = {}
    with plan.step("instances, bare"), plan.bare_decoders(max(plan.args.counts)) as processes:
        for work in works:
            processes.load(work.units)
            for count in plan.args.counts:
                table[work.name]["bare"][count] = 1e-9 * processes.rate(count, seconds)
    with Neighbour(_generate) as generation:
        for count in plan.args.counts:
            name = f"{count} instances"
            if not plan.has_time(name, 45):
                continue
            with plan.step(name), open_rig(plan, count, restorers) as rig:
                for work in works:
                    warm_up(rig, work)
                    table[work.name]["triton"][count] = rig.rate(work, seconds)
                beside[count] = _beside_path(generation, rig, works[-1])["path"]
    print("instances", table, flush=True)


def run_under_mps(arguments: Sequence[str], *, script: str = __file__) -> int:
    """All of it again in a process beside which nothing but its own children uses the GPU."""
    from kvfetcher.launcher.mps import start_mps
    from kvfetcher.launcher.rundir import RunDir

    run_dir = RunDir()
    try:
        mps = start_mps("on", run_dir.path)
        try:
            command = [sys.executable, script, *arguments]
            return subprocess.run(
                command, env={**os.environ, **mps.variables}, check=False
            ).returncode
        finally:
            mps.stop()
    finally:
        run_dir.remove()


def run_memory(rig: Rig, work: Workload, report: dict) -> None:
    """GPU memory over all processes, from before the server to prefixes of several lengths."""
    row = report["memory"] = {"workload": work.name, "extra_mib": {}, "seconds": {}}
    context, free = cuda_context(0), rig.free_bytes
    row["arena_mib"] = (free["before"] - free["arena"]) >> 20
    # Contexts, warm sessions and kernels of all processes, before the first unit.
    row["server_start_mib"] = (free["arena"] - free["server"]) >> 20

    def fetch(tokens: int) -> float:
        targets = rig.targets(work.num_tokens, tokens // work.num_tokens)
        shares = [targets[i::FRONTS] for i in range(FRONTS)]
        plan = {"units": rig.paths(work), "in_flight": 6, "once": True}
        began = time.perf_counter()
        rig.call([{**plan, "targets": share} for share in shares if share])
        return time.perf_counter() - began

    row["first_seconds"] = fetch(LENGTHS[0])
    fetch(LENGTHS[-1])  # every decoder has worked
    warm = _free_bytes()
    # What stays: planes, sessions of this picture size, inverse transforms.
    row["resident_mib"] = (free["server"] - warm) >> 20
    for tokens in LENGTHS:
        lowest, stop = [warm], threading.Event()

        def watch(lowest: list[int] = lowest, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                lowest[0] = min(lowest[0], context.memory_info()[0])
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        row["seconds"][tokens] = fetch(tokens)
        stop.set()
        watcher.join()
        row["extra_mib"][tokens] = (warm - lowest[0]) >> 20
    print("memory", row, flush=True)


def _free_bytes() -> int:
    return cuda_context(0).memory_info()[0]


def run_interference(plan: Plan, rig: Rig, works: list[Workload], key: str) -> None:
    """What a matrix product and a running generation lose beside decoding and restoring."""
    row = plan.report["interference"] = {"workload": works[-1].name}
    loads = {"path": _path_load(rig, works[-1])}
    with contextlib.ExitStack() as stack:
        if find_kernels() is None:
            row["cachegen"] = "no LMCache here: not measured"
        else:
            try:
                processes = stack.enter_context(DecoderProcesses(decode_cachegen_in_a_loop, 1))
            except SystemExit as exc:
                row["cachegen"] = str(exc)
            else:
                loads["cachegen"] = lambda: 1e-9 * processes.rate(1, _LOAD_SECONDS - 0.2)
        for name, target in (("gemm_tflop_per_s", _gemm), ("generation_tokens_per_s", _generate)):
            with Neighbour(target) as neighbour:
                row[name] = neighbour.beside(loads)
                for work in works if target is _generate else ():
                    found = plan.row(work).get(key)
                    if found is not None:
                        is_known = work is works[-1]
                        beside = row[name] if is_known else _beside_path(neighbour, rig, work)
                        found["generation"] = beside["path"]
            print("interference", name, row[name], flush=True)


def _path_load(rig: Rig, work: Workload) -> Callable[[], float]:
    return lambda: rig.rate(work, _LOAD_SECONDS)["elements_g_per_s"]


def _beside_path(neighbour: Neighbour, rig: Rig, work: Workload) -> dict:
    return neighbour.beside({"path": _path_load(rig, work)})


class Neighbour:
    """A context manager: a process that uses the GPU beside what is measured.

    Args:
        target: (pipe) -> None; says when it is ready, then answers seconds with its rate over them.
    """

    def __init__(self, target: Callable[[Connection], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs,), daemon=True)
        self._process.start()
        if not self._pipe.poll(WAIT_SECONDS):
            raise SystemExit(f"{target.__name__} did not start")
        self._pipe.recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._pipe.send(0)
        self._process.join(WAIT_SECONDS)

    def rate(self, seconds: float) -> float:
        """What it does in a second."""
        self._pipe.send(seconds)
        return self._pipe.recv()

    def beside(self, loads: dict[str, Callable[[], float]]) -> dict:
        """Its rate alone and beside each load, in turn; a load takes `_LOAD_SECONDS`, gives its own."""
        row: dict = {"alone": []}
        for _ in range(_ROUNDS):
            row["alone"].append(self.rate(1.0))
            for name, load in loads.items():
                found = row.setdefault(name, {"beside": [], "elements_g_per_s": []})
                with ThreadPoolExecutor(1) as pool:
                    running = pool.submit(load)
                    time.sleep(_LEAD_SECONDS)
                    found["beside"].append(self.rate(1.0))
                    found["elements_g_per_s"].append(running.result())
        for name in loads:
            row[name]["lost"] = 1 - float(np.median(row[name]["beside"]) / np.median(row["alone"]))
        return row


def _gemm(pipe) -> None:
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    _serve_rates(pipe, lambda: torch.mm(a, b, out=out), per_call=2 * 8192**3 * 1e-12, batch=16)


def _generate(pipe) -> None:
    """Tokens of an 8B model, one by one behind a prefix: a captured graph, as engines run it."""
    import torch

    torch.set_grad_enabled(False)
    step = _decoding_step(torch.device("cuda"), torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    _serve_rates(pipe, graph.replay, per_call=1.0, batch=4)


def _decoding_step(device, dtype, *, layers=32, width=4096, heads=32, kv_heads=8, inner=14336):
    """One token through a Llama of random weights, which attends to a KV cache of 4096 tokens."""
    import torch
    from torch.nn import functional

    dim = width // heads

    def weight(rows: int, columns: int):
        return torch.randn(rows, columns, device=device, dtype=dtype) / columns**0.5

    stack = [
        (
            weight(width + 2 * kv_heads * dim, width),
            weight(width, width),
            weight(2 * inner, width),
            weight(width, inner),
            torch.randn(2, 1, kv_heads, 4096, dim, device=device, dtype=dtype),
        )
        for _ in range(layers)
    ]
    head = weight(32000, width)
    hidden = torch.randn(1, width, device=device, dtype=dtype)
    token = torch.zeros(1, dtype=torch.long, device=device)

    def step():
        x = hidden
        for project, out, up, down, cache in stack:
            parts = functional.rms_norm(x, (width,)) @ project.T
            query, key, value = parts.split([width, kv_heads * dim, kv_heads * dim], dim=1)
            cache[0, :, :, -1] = key.view(1, kv_heads, dim)
            cache[1, :, :, -1] = value.view(1, kv_heads, dim)
            seen = functional.scaled_dot_product_attention(
                query.view(1, heads, 1, dim), cache[0], cache[1], enable_gqa=True
            )
            x = x + seen.reshape(1, width) @ out.T
            gate, linear = (functional.rms_norm(x, (width,)) @ up.T).chunk(2, dim=1)
            x = x + (functional.silu(gate) * linear) @ down.T
        token.copy_((functional.rms_norm(x, (width,)) @ head.T).argmax(dim=1))
        return token

    return step


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="no step begins later")
    parser.add_argument("--parts", type=_parts, default=PARTS, help=",".join(PARTS))
    parser.add_argument("--bare", type=_numbers, default=(7, 14), help="decoders of the baseline")
    parser.add_argument("--decoders", type=int, default=14, help="through the server")
    parser.add_argument("--restorers", type=_numbers, default=(1, 2, 4))
    parser.add_argument("--large-plane-bytes", type=int, default=1 << 30, help="0 = not measured")
    parser.add_argument("--counts", type=_numbers, default=(1, 2, 4, 7, 14), help="for the table")
    parser.add_argument("--gpus", type=_numbers, default=(0,), help="that decode, in turn")
    parser.add_argument("--mps", action="store_true", help="under NVIDIA's MPS")
    parser.add_argument("--show-log", action="store_true")
    args = parser.parse_args(arguments)
    if args.mps and MPS_PIPE_VARIABLE not in os.environ:
        return run_under_mps(sys.argv[1:] if arguments is None else arguments)
    plan = Plan(args)
    calibration = make_calibration()
    store_calibration(calibration)
    with plan.step("workloads"):
        works = make_workloads(calibration, MAIN, plan.bits)
    if plan.report["errors"]:
        return 1
    if "bare" in args.parts and plan.has_time("bare", 60):
        with plan.step("bare"):
            run_bare(plan, works, seconds=args.seconds, all_arms=True)
    if {"rates", "memory", "interference"} & set(args.parts):
        run_rates(plan, works, args.parts)
    if "more" in args.parts:
        run_more(plan, calibration)
    if "instances" in args.parts and plan.has_time("instances", 60):
        run_instances(plan, works)
    plan.write()
    return int(bool(plan.report["errors"]))


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no such part: {sorted(unknown)}; parts are {PARTS}")
    return parts


def machine() -> dict[str, object]:
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
