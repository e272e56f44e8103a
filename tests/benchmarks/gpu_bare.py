"""The parts of the GPU path alone, in processes of their own: NVDEC, and restoring in a loop."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from typing import Self

from kvfetcher.codec.gpu.nvdec import NvdecDecoder
from kvfetcher.codec.profiles import decode_unit
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import KVFetcherError
from kvfetcher.format.unit import parse_unit

WAIT_SECONDS = 240.0
# Between the question and the work: all processes have it by then.
_LEAD_SECONDS = 0.2
_BATCH = 8
_SLOTS = 2


class DecoderProcesses:
    """A context manager: processes that do one job when asked, all at the same time.

    Args:
        work: (pipe) -> None; says "ready" or the error's text, then answers (job, ...) tuples.
        size: how many.
        gpus: number i is given ``gpus[i % len(gpus)]`` too; none = nothing.
    """

    def __init__(self, work, size: int, *, gpus: tuple[int, ...] = ()) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._members = []
        for index in range(size):
            ours, theirs = context.Pipe()
            given = (theirs, gpus[index % len(gpus)]) if gpus else (theirs,)
            process = context.Process(target=work, args=given, daemon=True)
            process.start()
            self._members.append((process, ours))
        for _, pipe in self._members:
            if (answer := _answer(pipe)) != "ready":
                raise SystemExit(f"a process of the baseline did not start: {answer}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        for process, pipe in self._members:
            pipe.close()
            process.join(5)
            process.kill()
            process.join()

    def load(self, units: list[bytes]) -> None:
        """The units to work on from now on."""
        for _, pipe in self._members:
            pipe.send(("load", units))
        for _, pipe in self._members:
            _answer(pipe)

    def start(self, count: int, seconds: float, **options) -> list:
        """Let `count` of them work; their pipes, for `rate`."""
        begin = time.monotonic() + _LEAD_SECONDS
        pipes = [pipe for _, pipe in self._members[:count]]
        for index, pipe in enumerate(pipes):
            pipe.send(("run", begin, seconds, index, options))
        return pipes

    def rate(self, count: int, seconds: float, **options) -> float:
        """Elements per second of `count` of them."""
        return rate_of(self.start(count, seconds, **options))


def rate_of(pipes: list) -> float:
    """The sum of what `DecoderProcesses.start` let work, elements per second."""
    return sum(map(_answer, pipes))


def _answer(pipe):
    if not pipe.poll(WAIT_SECONDS):
        raise SystemExit("a process of the baseline does not answer")
    return pipe.recv()


def serve(pipe, load, run) -> None:
    """Answer until the pipe closes."""
    pipe.send("ready")
    while True:
        try:
            job, *rest = pipe.recv()
        except EOFError:
            return
        if job == "load":
            pipe.send(load(*rest))
        else:
            begin, *rest = rest
            time.sleep(max(0.0, begin - time.monotonic()))
            pipe.send(run(*rest))


def decode_in_a_loop(pipe, gpu: int) -> None:
    """One `NvdecDecoder` of a GPU; packets are parsed beforehand.

    Option `ring`: pictures are copied to memory of their own, as kv_decode does.
    """
    try:
        decoder = NvdecDecoder(gpu)
    except KVFetcherError as exc:
        pipe.send(str(exc))
        return
    state: dict = {}

    def load(data) -> None:
        units = [parse_unit(unit) for unit in data]
        state["units"] = [(unit, unit.packets()) for unit in units]
        for unit, packets in state["units"][:2]:
            decoder.decode_on_gpu(packets, unit.geometry)

    def run(seconds, first, options) -> float:
        units, context = state["units"], decoder.context
        place, event, memory = None, 0, 0
        if options.get("ring"):
            largest = max(unit.geometry.num_bytes for unit, _ in units)
            memory, event = context.allocate(_SLOTS * largest), context.new_event()
            slots = itertools.cycle(memory + i * largest for i in range(_SLOTS))
            place = slots.__next__
        start, elements, index = time.perf_counter(), 0, first
        while time.perf_counter() - start < seconds:
            unit, packets = units[index % len(units)]
            decoder.decode_on_gpu(packets, unit.geometry, place)
            if event:
                context.record(event)
            elements += unit.num_elements
            index += 1
        rate = elements / (time.perf_counter() - start)
        if memory:
            context.synchronize()
            context.free_event(event)
            context.free(memory)
        return rate

    serve(pipe, load, run)


def restore_in_a_loop(pipe) -> None:
    """One `GpuRestorer`; planes are on the GPU, values go to blocks as large as a unit."""
    import torch

    from kvfetcher.codec.gpu.restore import Destination, GpuPlanes, GpuRestorer

    device = torch.device("cuda", 0)
    restorer = GpuRestorer(device)
    state: dict = {}

    def load(data) -> None:
        jobs = []
        for bits in data[:_BATCH]:
            unit = parse_unit(bits)
            planes = decode_unit(bits, VideoDecoder())
            signed = torch.from_numpy(planes.view("i2") if planes.itemsize == 2 else planes)
            on_gpu = GpuPlanes(signed.to(device), 0)
            jobs.append((unit, on_gpu, Destination.fresh(unit, device)))
        state["jobs"] = jobs
        once()

    def once() -> int:
        batch = restorer.close_batch([restorer.begin(*job) for job in state["jobs"]])
        found = restorer.finish(batch)
        errors = [error for error in found if error is not None]
        if errors:
            raise errors[0]
        return sum(unit.num_elements for unit, _, _ in state["jobs"])

    def run(seconds, first, options) -> float:
        start, elements = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            elements += once()
        return elements / (time.perf_counter() - start)

    serve(pipe, load, run)
