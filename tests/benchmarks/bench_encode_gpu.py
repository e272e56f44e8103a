"""Saving on a GPU: the bare encoder, saves through tritonserver, and what a generation loses beside them.

    python tests/benchmarks/bench_encode_gpu.py --output FILE.json [--mps] [--parts bare,save,earlier]

The KV cache is synthetic, of an 8B model's shape (32 layers, 8 KV heads of 128), chunks of 1,024
tokens, profile `uncalibrated` (about 3.7 bits per element, as SmolLM2-135M has). This process owns the
arena and its leases, as an engine does; a client asks `kv_save`, whose chunks go through `kv_encode`
into a file store in memory. Every stored chunk is read again, and the integers of some units are
compared with those of the CPU's encoder.

Parts:

bare     `HevcEncoder` on pictures that lie on the GPU, up to bitstreams in host memory; with the
         memory that a server gives it, and with more
forward  values to pictures
save     4,096 and 16,384 tokens through the server, one save after the other, and an 8B generation
         beside saves that go on without a pause
earlier  the same save with ``codec.encoder = "x265"``: all values to the host, and all cores
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from bench_gpu import Neighbour, _generate, machine, run_under_mps

from kvfetcher import wire
from kvfetcher.backend.saving import seal_ticket
from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.gpu.forward import UncalibratedForward, units_together
from kvfetcher.codec.gpu.hevc_encode import MAX_MEMORY_BYTES, HevcEncoder, Picture
from kvfetcher.codec.gpu.hevc_kernels import KernelLauncher
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.config import MPS_PIPE_VARIABLE, load_config
from kvfetcher.format.container import check_unit, parse_header
from kvfetcher.format.unit import parse_unit
from kvfetcher.launcher import TritonServer
from kvfetcher.memory.control import ControlServer, socket_path
from kvfetcher.memory.gpu_arena import GpuArena
from kvfetcher.memory.leases import LeaseTable, SaveTicket, tokens_digest
from kvfetcher.memory.permits import Permits
from kvfetcher.memory.split_arena import publish_arena
from kvfetcher.spec import KVSpec, ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Iterator

SPEC = KVSpec(num_layers=32, num_kv_heads=8, head_dim=128)
CHUNK = 1024
BLOCK = 32
LONG = 16 * CHUNK
PARTS = ("bare", "forward", "save", "earlier")
REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
MEMORY = Path("/dev/shm")
WAIT_SECONDS = 60.0


def values(tokens: int, *, seed: int) -> torch.Tensor:
    """[L, K, H, T, D] bit patterns on the GPU: channels of many sizes, heavier tails than normal."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    layers = []
    for _ in range(SPEC.num_layers):
        shape = (2, SPEC.num_kv_heads, tokens, SPEC.head_dim)
        channels = (2, SPEC.num_kv_heads, 1, SPEC.head_dim)
        noise = torch.randn(shape, device="cuda", generator=generator)
        size = torch.randn(channels, device="cuda", generator=generator).mul_(0.5).exp_()
        mean = torch.randn(channels, device="cuda", generator=generator)
        gain = (
            torch.randn((2, SPEC.num_kv_heads, tokens, 1), device="cuda", generator=generator)
            .mul_(0.15)
            .exp_()
        )
        layers.append((noise * gain * size + mean).to(torch.bfloat16).view(torch.int16))
    return torch.stack(layers)


def rate(elements: int, seconds: list[float]) -> dict:
    """G elements per second, the median, and all times."""
    return {
        "g_per_s": 1e-9 * elements / statistics.median(seconds),
        "seconds": [round(s, 4) for s in seconds],
    }


def run_forward(report: dict) -> list[Picture]:
    """A chunk's pictures; 32 of them."""
    forward = UncalibratedForward(torch.device("cuda", 0))
    bits = values(CHUNK, seed=1)
    step = units_together(bits[0].numel(), 112 << 20)
    seconds, pictures = [], []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        pictures = []
        for first in range(0, SPEC.num_layers, step):
            part = bits[first : first + step].unsqueeze(1)
            for unit in forward.units(part, dtype=SPEC.dtype, first_position=CHUNK, variant="-"):
                pictures += [Picture(planes, unit.bit_depth) for planes in unit.planes]
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    report["forward"] = rate(bits.numel(), seconds[1:])
    print("forward", report["forward"], flush=True)
    return pictures


def run_bare(report: dict, chunk: list[Picture]) -> None:
    launcher = KernelLauncher(0)
    rows = report["bare"] = []
    for copies, memory in ((1, MAX_MEMORY_BYTES), (4, MAX_MEMORY_BYTES), (16, MAX_MEMORY_BYTES),
                           (16, 2 << 30), (16, 6 << 30)):  # fmt: skip
        encoder = HevcEncoder(launcher, torch.device("cuda", 0), memory_bytes=memory)
        pictures = [p._replace(samples=p.samples.clone()) for _ in range(copies) for p in chunk]
        samples = sum(p.samples.numel() for p in pictures)
        seconds, num_bytes = [], 0
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(6):
            torch.cuda.synchronize()
            began = time.perf_counter()
            num_bytes = 0
            for coded in encoder.encode(pictures):
                num_bytes += len(coded.data)
            seconds.append(time.perf_counter() - began)
        rows.append(
            {
                "pictures": len(pictures),
                "picture": "x".join(map(str, reversed(pictures[0].samples.shape[1:]))),
                "memory_limit_mib": memory >> 20,
                "peak_mib_beside_samples": (torch.cuda.max_memory_allocated() - before) >> 20,
                "bits_per_sample": 8 * num_bytes / samples,
                **rate(samples, seconds[2:]),
            }
        )
        print("bare", rows[-1], flush=True)
        del pictures


class Engine:
    """Arena, leases and control socket of a server without an LLM."""

    def __init__(self, server: TritonServer, tokens: int) -> None:
        path = MEMORY / f"kvfetcher-bench-{os.getpid()}-arena"
        self.arena = GpuArena.create_on(
            0, path, spec=SPEC, tokens_per_block=BLOCK, num_bytes=SPEC.bytes_per_token * tokens
        )
        self.leases = LeaseTable(num_blocks=self.arena.num_blocks, tokens_per_block=BLOCK)
        identity = ModelIdentity("w" * 64, "t" * 64, "", "rope", "bf16", SPEC)
        facts = {
            "identity": identity.to_dict(),
            "tokens_per_block": BLOCK,
            "max_prompt_tokens": tokens,
        }
        self.control = ControlServer(
            socket_path(server.run_dir),
            arena=self.arena,
            leases=self.leases,
            describe=lambda: facts,
            stats=dict,
        )
        self.permits = Permits.of_run(server.run_dir)
        publish_arena(server.run_dir, self.arena)
        for index in range(tokens // CHUNK):
            self.arena.write(self.target(index), 0, values(CHUNK, seed=index))

    def target(self, chunk: int):
        blocks = CHUNK // BLOCK
        return self.arena.target(tuple(range(chunk * blocks, (chunk + 1) * blocks)), CHUNK)

    def ticket(self, tokens: int, *, salt: str) -> tuple[np.ndarray, str]:
        """All blocks are leased anew, so that the first chunk lies in the first of them."""
        ids = np.arange(tokens, dtype=np.int32)
        now = time.monotonic()
        lease = self.leases.lease(self.arena.num_blocks * BLOCK, 100.0, now=now)
        self.leases.seal(lease.id, tokens, tokens_digest(ids), now=now)
        blocks = CHUNK // BLOCK
        targets = tuple(
            self.arena.target(lease.block_ids[n * blocks : (n + 1) * blocks], CHUNK)
            for n in range(tokens // CHUNK)
        )
        ticket = SaveTicket(lease.id, targets, 0, tuple(ids.tolist()), salt)
        return ids, seal_ticket(ticket, ids, self.permits)

    def close(self) -> None:
        self.control.close()
        self.arena.close()
        self.arena.unlink()


@contextmanager
def open_server(encoder: str, store: Path, *, in_flight: int) -> Iterator[TritonServer]:
    config = load_config(environ={})
    config = replace(
        config,
        server=replace(config.server, http_port=8100, grpc_port=8101, metrics_port=8102),
        codec=replace(
            config.codec, profile="uncalibrated", chunk_tokens=CHUNK, encoder=encoder, decoder="cpu"
        ),
        engine=replace(config.engine, arena="gpu", device="cuda:0", tokens_per_block=BLOCK),
        store=replace(config.store, kind="file", path=str(store)),
        save=replace(config.save, chunks_in_flight=in_flight, on_gpu=True),
    )
    folder = Path(tempfile.mkdtemp(prefix="kvfetcher-bench-"))
    for model in ("kv_encode", "kv_save"):
        (folder / model).symlink_to(REPOSITORY / model)
    server = TritonServer(config, model_repository=folder, log_path=folder / "log")
    server.start()
    try:
        yield server
    except BaseException:
        print((folder / "log").read_text(errors="replace")[-6000:], flush=True)
        raise
    finally:
        server.stop()


class Client:
    def __init__(self, server: TritonServer, engine: Engine) -> None:
        import tritonclient.grpc as grpcclient

        self._grpc = grpcclient
        self._client = grpcclient.InferenceServerClient(server.grpc_url)
        self._engine = engine
        self._count = 0

    def save(self, tokens: int) -> tuple[float, dict]:
        """Seconds until all is stored, and kv_save's report; every save under another salt."""
        self._count += 1
        ids, ticket = self._engine.ticket(tokens, salt=str(self._count))
        inputs = [
            self._grpc.InferInput(wire.INPUT_IDS, [len(ids)], "INT32"),
            self._grpc.InferInput(wire.KV_LEASE, [1], "BYTES"),
        ]
        inputs[0].set_data_from_numpy(ids)
        inputs[1].set_data_from_numpy(np.array([ticket], dtype=object))
        began = time.perf_counter()
        answer = self._client.infer(wire.KV_SAVE, inputs, client_timeout=WAIT_SECONDS)
        seconds = time.perf_counter() - began
        report = json.loads(answer.as_numpy(wire.KV_REPORT).reshape(-1)[0])
        if report["error"] or report["chunks_saved"] != tokens // CHUNK:
            raise SystemExit(f"kv_save: {report}")
        return seconds, report


def check_store(store: Path, engine: Engine, *, units: int) -> dict:
    """Read all that is stored; compare units' integers with the CPU's."""
    files = [path for path in store.rglob("*") if path.is_file() and path.stat().st_size > 1 << 20]
    chunks = 0
    compared = 0
    for path in files:
        data = path.read_bytes()
        header = parse_header(data)
        for entry in header.units:
            unit = data[entry.offset : entry.stop]
            check_unit(header, entry, unit)
            if compared < units:
                first = header.first_position // CHUNK
                bits = engine.arena.read(engine.target(first), entry.layer_start, entry.num_layers)
                source = UnitSource(bits, SPEC, entry.layer_start, header.first_position, _no_video)
                expected = parse_unit(UncalibratedProfile().encode(source, "-"))
                found = parse_unit(unit)
                if found.integer_digest != expected.integer_digest:
                    raise SystemExit(f"unit {entry} of {path.name} has other integers")
                compared += 1
        chunks += 1
    return {"chunks_read": chunks, "units_compared_with_the_cpu": compared}


def _no_video(planes, **_):
    return [b"\0"] * len(planes)


def clear(store: Path) -> None:
    for path in store.rglob("*"):
        if path.is_file():
            path.unlink()


def run_save(report: dict, *, rounds: int, in_flight: int) -> None:
    store = Path(tempfile.mkdtemp(prefix="kvfetcher-store-", dir=MEMORY))
    per_token = SPEC.elements_per_token
    with open_server("auto", store, in_flight=in_flight) as server:
        engine = Engine(server, LONG)
        try:
            client = Client(server, engine)
            row = report.setdefault("save", {})
            client.save(CHUNK)
            row["check"] = check_store(store, engine, units=8)
            print("save", row["check"], flush=True)
            for tokens in (CHUNK, 4 * CHUNK, LONG):
                seconds, last = [], {}
                for _ in range(rounds):
                    clear(store)
                    took, last = client.save(tokens)
                    seconds.append(took)
                row[f"{tokens}_tokens"] = {
                    **rate(tokens * per_token, seconds[1:]),
                    "bits_per_element": 8 * last["bytes_saved"] / (tokens * per_token),
                    "report": last,
                }
                print("save", tokens, row[f"{tokens}_tokens"], flush=True)
            clear(store)

            def go_on(seconds: float) -> float:
                began, tokens = time.perf_counter(), 0
                while time.perf_counter() - began < seconds:
                    client.save(LONG)
                    clear(store)
                    tokens += LONG
                return 1e-9 * tokens * per_token / (time.perf_counter() - began)

            with Neighbour(_generate) as neighbour:
                row["generation_tokens_per_s"] = neighbour.beside({"save": lambda: go_on(2.2)})
            print("generation", row["generation_tokens_per_s"], flush=True)
        finally:
            engine.close()
            clear(store)


def run_earlier(report: dict) -> None:
    store = Path(tempfile.mkdtemp(prefix="kvfetcher-store-", dir=MEMORY))
    tokens = 4 * CHUNK
    with open_server("x265", store, in_flight=1) as server:
        engine = Engine(server, tokens)
        try:
            client = Client(server, engine)
            client.save(CHUNK)
            clear(store)
            took, last = client.save(tokens)
            report["earlier"] = {
                **rate(tokens * SPEC.elements_per_token, [took]),
                "bits_per_element": 8 * last["bytes_saved"] / (tokens * SPEC.elements_per_token),
                "report": last,
            }
            print("earlier", report["earlier"], flush=True)
        finally:
            engine.close()
            clear(store)


def summary(report: dict) -> dict:
    """The numbers at the top; null = not measured."""
    save, earlier = report.get("save", {}), report.get("earlier")
    long, generation = save.get(f"{LONG}_tokens"), save.get("generation_tokens_per_s")
    bare = report.get("bare")
    return {
        "save_g_elements_per_s": long and long["g_per_s"],
        "bare_g_samples_per_s": bare and max(row["g_per_s"] for row in bare),
        "generation_loss_percent": generation and 100 * generation["save"]["lost"],
        "earlier_g_elements_per_s": earlier and earlier["g_per_s"],
        "save_16k_seconds": long and statistics.median(long["seconds"]),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument(
        "--rounds", type=int, default=5, help="saves of each length, one to warm up"
    )
    parser.add_argument("--in-flight", type=int, default=8, help="save.chunks_in_flight")
    parser.add_argument("--mps", action="store_true", help="under NVIDIA's MPS")
    args = parser.parse_args(arguments)
    if args.mps and MPS_PIPE_VARIABLE not in os.environ:
        return run_under_mps(sys.argv[1:] if arguments is None else arguments, script=__file__)
    parts = args.parts.split(",")
    found: dict = {}
    errors: dict[str, str] = {}

    def step(name: str, run) -> None:
        if name in parts:
            try:
                run()
            except (Exception, SystemExit) as exc:  # noqa: BLE001 - told in the report
                errors[name] = f"{type(exc).__name__}: {exc}"
                print(name, "failed:", errors[name], flush=True)
            command = " ".join(["bench_encode_gpu.py", *sys.argv[1:]])
            args.output.write_text(
                json.dumps(
                    {**summary(found), "command": command, "machine": machine(), "errors": errors,
                     **found}, indent=1,
                )
                + "\n"
            )  # fmt: skip

    torch.set_grad_enabled(False)
    chunk: list[Picture] = []
    step("forward", lambda: chunk.extend(run_forward(found)))
    step("bare", lambda: run_bare(found, chunk or run_forward({})))
    step("save", lambda: run_save(found, rounds=args.rounds, in_flight=args.in_flight))
    step("earlier", lambda: run_earlier(found))
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
