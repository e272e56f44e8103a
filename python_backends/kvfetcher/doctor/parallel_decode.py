"""Several processes that decode at the same time, one per engine, as the kv_decode models do.

The driver spreads decoding sessions over the engines by itself; as many processes as engines at
work at one time is how all of them are reached.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from kvfetcher.errors import CodecError, KVFetcherError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from kvfetcher.doctor.streams import Stream

DecoderKind = Literal["cpu", "nvdec"]

# A new process imports numpy and PyAV; one on a GPU makes a CUDA context as well.
_START_TIMEOUT_SECONDS = 120.0
_CALL_TIMEOUT_SECONDS = 60.0
_LATENCY_CALLS = 5


@dataclass(frozen=True, slots=True)
class Timing:
    """How fast one decoder worked."""

    latency_seconds: float
    """Median time of one picture that is asked for alone."""
    picture_seconds: float
    """Time of one picture among many in a row."""


class DecoderProcesses:
    """A context manager: decoding processes, started and warm. Not thread-safe.

    Args:
        kind: which decoder.
        size: how many processes.
        gpus: process i decodes on NVDEC of ``gpus[i % len(gpus)]``.

    Raises:
        CodecError: a process died or did not start in time; or its decoder is not usable.
    """

    def __init__(self, kind: DecoderKind, size: int, gpus: Sequence[int] = (0,)) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._members: list[tuple[BaseProcess, Connection]] = []
        self._gpus = [gpus[index % len(gpus)] for index in range(size)]
        for gpu in self._gpus:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, kind, gpu), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))
        try:
            for index in range(size):
                self._answer(index, _START_TIMEOUT_SECONDS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        return len(self._members)

    def digests(self, stream: Stream, *, gpu: int | None = None) -> list[str]:
        """`planes_sha256` of what each process decodes, all at the same time.

        Args:
            stream: what they decode.
            gpu: only the processes on this one do; None = all.

        Raises:
            CodecError: a process refused the stream, died, or did not answer in time.
        """
        asked = [i for i, its in enumerate(self._gpus) if gpu is None or its == gpu]
        answers: list[str] = self._ask_all(("digest", stream), asked)
        return answers

    def timings(self, stream: Stream, *, seconds: float, num_busy: int) -> list[Timing]:
        """How fast `num_busy` processes decode a one-picture stream at the same time.

        Raises:
            CodecError: as `digests`.
        """
        job = ("pace", stream, seconds)
        answers: list[Timing] = self._ask_all(job, range(num_busy))
        return answers

    def close(self) -> None:
        """End the processes. Safe to call twice."""
        for process, connection in self._members:
            connection.close()
            process.kill()
            process.join()
        self._members.clear()

    def _ask_all(self, job: tuple[Any, ...], members: Sequence[int]) -> list[Any]:
        for index in members:
            with contextlib.suppress(BrokenPipeError):  # it died; its answer will tell
                self._members[index][1].send(job)
        # All answers are taken before an error is raised: none is left for the next question.
        answers, error = [], None
        for index in members:
            try:
                answers.append(self._answer(index, _CALL_TIMEOUT_SECONDS))
            except KVFetcherError as exc:
                error = error or exc
        if error is not None:
            raise error
        return answers

    def _answer(self, index: int, timeout_seconds: float) -> Any:
        process, connection = self._members[index]
        name = f"decoding process {index + 1} of {self.size}"
        try:
            if not connection.poll(timeout_seconds):
                raise CodecError(f"{name} did not answer within {timeout_seconds:.0f} s")
            answer = connection.recv()
        except (EOFError, OSError) as exc:
            process.join(timeout=1)
            raise CodecError(f"{name} died (exit status {process.exitcode})") from exc
        if isinstance(answer, KVFetcherError):
            raise answer
        return answer


def _serve(connection: Connection, kind: DecoderKind, gpu: int) -> None:
    """The process: jobs in, answers out, until the connection closes."""
    decoder, run = _open(kind, gpu, connection)
    if decoder is None:
        return
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            connection.send(_work(job, decoder, run))
        except KVFetcherError as exc:
            connection.send(exc)


def _open(kind: DecoderKind, gpu: int, connection: Connection) -> tuple[Any, Callable[..., object]]:
    try:
        if kind == "nvdec":
            from kvfetcher.codec.gpu.nvdec import NvdecDecoder

            on_gpu = NvdecDecoder(gpu)
            return on_gpu, on_gpu.decode_on_gpu
        from kvfetcher.codec.video import VideoDecoder

        on_cpu = VideoDecoder()
    except KVFetcherError as exc:
        connection.send(exc)
        return None, len
    return on_cpu, on_cpu.decode


def _work(job: tuple[Any, ...], decoder: Any, run: Callable[..., object]) -> object:
    from dataclasses import replace

    from kvfetcher.doctor.streams import planes_sha256

    stream: Stream = job[1]
    if job[0] == "digest":
        return planes_sha256(decoder.decode(stream.packets, stream.geometry))
    seconds: float = job[2]
    run(stream.packets, stream.geometry)  # opens the decoder
    latencies = []
    for _ in range(_LATENCY_CALLS):
        started = time.perf_counter()
        run(stream.packets, stream.geometry)
        latencies.append(time.perf_counter() - started)
    latency = statistics.median(latencies)
    count = min(64, max(1, int(seconds / latency / 4)))
    geometry, packets = replace(stream.geometry, num_frames=count), stream.packets * count
    started, num_pictures = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds or not num_pictures:
        run(packets, geometry)
        num_pictures += count
    return Timing(latency, elapsed / num_pictures)
