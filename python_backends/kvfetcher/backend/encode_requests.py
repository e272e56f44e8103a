"""Requests of `kv_encode`, answered by a thread that takes all that wait together.

Triton gives a model's process its next request when `execute` returns, and chunks on a GPU are to be
coded together: so `execute` puts requests into a queue, and a thread of its own answers them, through
response senders. Chunks for the CPU it gives to as many threads as there are cores: the encoder runs
without the GIL, and a chunk may be one unit, which one thread encodes.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from kvfetcher import wire
from kvfetcher.backend.respond import log_failure, respond_each, send, send_error
from kvfetcher.backend.tensors import bytes_tensor, read_bytes, read_ids, read_text, text_tensor
from kvfetcher.errors import GpuError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from kvfetcher.backend.coding import ChunkEncoder, ChunkJob
    from kvfetcher.backend.gpu_encoding import ChunkSource, GpuChunkEncoder

ON_GPU = "gpu"
"""Name of that encoder in a status."""

_log = logging.getLogger(__name__)


class _Request(NamedTuple):
    sender: Any
    job: ChunkJob


class EncodeRequests:
    """One response per request of `kv_encode`.

    Args:
        encoder: encoder of chunks; used by this object's threads alone.
        pb_utils: the module `triton_python_backend_utils`.
        after: called by that thread when nothing waits any more.
        at_once: whether `execute` encodes on the CPU and returns the responses itself.
    """

    def __init__(
        self,
        encoder: ChunkEncoder,
        pb_utils: Any,
        *,
        after: Callable[[], None] = lambda: None,
        at_once: bool = False,
    ) -> None:
        self._at_once = at_once
        self._encoder = encoder
        self._pb_utils = pb_utils
        self._after = after
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._put_back: list[_Request | None] = []
        self._sending = threading.Lock()
        cores = encoder.num_cores
        # One more waits with its values read, so that no core waits for a copy.
        self._cpu = ThreadPoolExecutor(cores, thread_name_prefix="kvfetcher-chunk")
        self._places = threading.BoundedSemaphore(cores + 1)
        self._num_on_cpu = 0
        self._counting = threading.Lock()
        self._thread = threading.Thread(target=self._answer_all, name="encode", daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer requests, or queue them (None). For a model's `execute`."""
        if self._at_once:
            return respond_each(requests, self._tensors_of, self._pb_utils)
        for request in requests:
            sender = request.get_response_sender()
            try:
                job = self._read(request)
            except Exception as exc:  # noqa: BLE001 - the boundary: every failure is answered
                self._refuse(sender, exc)
                continue
            self._queue.put(_Request(sender, job))
        return None

    def _read(self, request: Any) -> ChunkJob:
        return self._encoder.read(
            read_ids(request, wire.INPUT_IDS, self._pb_utils),
            spec_json=read_text(request, wire.KV_SPEC, self._pb_utils),
            target_json=read_text(request, wire.KV_TARGET, self._pb_utils, default=""),
            values=read_bytes(request, wire.KV_VALUES, self._pb_utils),
        )

    def _tensors_of(self, request: Any) -> list[Any]:
        return self._tensors(*self._encoder.encode_job(self._read(request)))

    def _tensors(self, chunk: bytes, status: str) -> list[Any]:
        return [
            bytes_tensor(wire.CHUNK, chunk, self._pb_utils),
            text_tensor(wire.KV_STATUS, status, self._pb_utils),
        ]

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        self._queue.put(None)
        self._thread.join()
        self._cpu.shutdown()

    def _answer_all(self) -> None:
        while (request := self._next()) is not None:
            try:
                self._answer(request)
                if self._queue.empty():
                    self._after()
            except Exception as exc:  # noqa: BLE001 - this thread must outlive everything
                log_failure("answering kv_encode", exc)

    def _next(self) -> _Request | None:
        return self._put_back.pop() if self._put_back else self._queue.get()

    def _answer(self, request: _Request) -> None:
        try:
            on_gpu = self._encoder.source_on_gpu(request.job)
        except Exception as exc:  # noqa: BLE001
            self._refuse(request.sender, exc)
            return
        if on_gpu is None:
            self._encode_on_cpu(request)
        else:
            self._encode_on_gpu(request, *on_gpu)

    def _encode_on_cpu(self, request: _Request) -> None:
        """Read a chunk's values, and leave the rest to a thread; waits while enough are in hand."""
        self._places.acquire()
        try:
            values = self._encoder.values_of(request.job)
        except Exception as exc:  # noqa: BLE001
            self._places.release()
            self._refuse(request.sender, exc)
            return
        with self._counting:
            self._num_on_cpu += 1
        self._cpu.submit(self._encode_values, request, values)

    def _encode_values(self, request: _Request, values: NDArray[Any]) -> None:
        # Cores that no other chunk needs help with this one's units.
        chunks = self._num_on_cpu + self._queue.qsize()
        threads = max(1, self._encoder.num_cores // chunks)
        try:
            result = self._encoder.encode_values(request.job, values, num_threads=threads)
        except Exception as exc:  # noqa: BLE001
            self._refuse(request.sender, exc)
        else:
            self._send(request.sender, *result)
        finally:
            with self._counting:
                self._num_on_cpu -= 1
            self._places.release()

    def _encode_on_gpu(
        self, request: _Request, encoder: GpuChunkEncoder, source: ChunkSource
    ) -> None:
        """Encode a chunk and all that come while the GPU is at it."""
        taken = {0: request}

        def sources() -> Iterator[ChunkSource]:
            yield source
            for number in itertools.count(1):
                following = self._following(encoder)
                if following is None:
                    return
                taken[number] = following[0]
                yield following[1]

        def hand_over(number: int, chunk: Future[bytes]) -> None:
            done = taken.pop(number)
            chunk.add_done_callback(lambda made: self._answer_with(done, made))

        try:
            encoder.encode(sources(), hand_over)
        except (RuntimeError, GpuError) as exc:
            _log.warning("%d chunks are encoded by the CPU: %s", len(taken), exc, exc_info=exc)
            for left in taken.values():
                self._encode_on_cpu(left)
        except Exception as exc:  # noqa: BLE001
            for left in taken.values():
                self._refuse(left.sender, exc)

    def _following(self, encoder: GpuChunkEncoder) -> tuple[_Request, ChunkSource] | None:
        """The next request if it waits already and is for the same encoder."""
        while True:
            try:
                request = self._queue.get_nowait()
            except queue.Empty:
                return None
            if request is None:
                self._put_back.append(None)
                return None
            try:
                on_gpu = self._encoder.source_on_gpu(request.job)
            except Exception as exc:  # noqa: BLE001
                self._refuse(request.sender, exc)
                continue
            if on_gpu is None or on_gpu[0] is not encoder:
                self._put_back.append(request)
                return None
            return request, on_gpu[1]

    def _answer_with(self, request: _Request, made: Future[bytes]) -> None:
        exc = made.exception()
        if exc is not None:
            self._refuse(request.sender, exc)
        else:
            chunk = made.result()
            self._send(request.sender, chunk, request.job.status(ON_GPU, chunk))

    def _send(self, sender: Any, chunk: bytes, status: str) -> None:
        with self._sending:
            try:
                response = self._pb_utils.InferenceResponse(
                    output_tensors=self._tensors(chunk, status)
                )
                send(sender, response, self._pb_utils, is_last=True)
            except Exception as exc:  # noqa: BLE001 - the others must be answered all the same
                log_failure("sending a chunk", exc)

    def _refuse(self, sender: Any, exc: BaseException) -> None:
        with self._sending:
            try:
                send_error(sender, exc, self._pb_utils)
            except Exception as failure:  # noqa: BLE001
                log_failure("sending an error", failure)
