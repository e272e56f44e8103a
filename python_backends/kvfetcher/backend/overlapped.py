"""Requests answered by a second thread, so that the next batch is begun while one is waited for.

Triton gives a model's process its next batch when `execute` returns. Work that is launched in a
millisecond and then waited for would leave both sides idle in turn: a batch of units waits 3 to 5 ms
until the GPU, which other processes share, has restored it. So `execute` returns as soon as its batch
is begun, and responses go out through response senders, which models that are not decoupled have, too
(tritonserver 2.46 and later).
"""

from __future__ import annotations

import queue
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from kvfetcher.backend.respond import log_failure, send, send_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# One that is waited for, one whose responses are sent or that is next on the GPU, one being begun.
_MAX_BATCHES = 3
# Python lets another thread wait for 5 ms unless told otherwise: as long as a whole batch takes.
_SWITCH_SECONDS = 0.0005


class _Begun(NamedTuple):
    requests: Sequence[Any]
    """Kept, for their tensors are in memory that Triton takes back with them."""
    outcomes: list[Exception | None]
    """Why a request was not begun, or None."""
    batch: Any
    """What `close_batch` gave, or why it failed."""


class OverlappedResponses:
    """One response per request, for work that is begun one by one and waited for together.

    Whether a request is cancelled is not asked: the work is over sooner than the answer.

    Args:
        start: request -> work begun; may raise. Called by `execute`, as `close_batch`.
        close_batch: work begun -> what `finish` takes.
        finish: waits; output tensors of each, or why it failed. Called by a thread of its own.
        pb_utils: the module `triton_python_backend_utils`.
        after: called by that thread when a batch is answered.
    """

    def __init__(
        self,
        start: Callable[[Any], Any],
        close_batch: Callable[[list[Any]], Any],
        finish: Callable[[Any], list[list[Any] | Exception]],
        pb_utils: Any,
        *,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self._start = start
        self._close_batch = close_batch
        self._finish = finish
        self._pb_utils = pb_utils
        self._after = after
        self._slots = threading.Semaphore(_MAX_BATCHES)
        self._begun: queue.SimpleQueue[_Begun | None] = queue.SimpleQueue()
        sys.setswitchinterval(_SWITCH_SECONDS)
        self._thread = threading.Thread(target=self._answer_all, name="responses", daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Begin a batch; waits while too many are under way. For a model's `execute`."""
        self._slots.acquire()
        started: list[Any] = []
        outcomes: list[Exception | None] = []
        for request in requests:
            try:
                started.append(self._start(request))
                outcomes.append(None)
            except Exception as exc:  # noqa: BLE001 - the boundary: every failure is answered
                outcomes.append(exc)
        batch: Any = None
        if started:
            try:
                batch = self._close_batch(started)
            except Exception as exc:  # noqa: BLE001
                batch = exc
        self._begun.put(_Begun(requests, outcomes, batch))

    def close(self) -> None:
        """Answer what is under way, then end the thread."""
        self._begun.put(None)
        self._thread.join()

    def _answer_all(self) -> None:
        while (begun := self._begun.get()) is not None:
            try:
                self._answer(begun)
                self._after()
            except Exception as exc:  # noqa: BLE001 - this thread must outlive everything
                log_failure("answering a batch", exc)
            finally:
                del begun  # its requests' memory, too
                self._slots.release()

    def _answer(self, begun: _Begun) -> None:
        count = begun.outcomes.count(None)
        try:
            if isinstance(begun.batch, Exception):
                raise begun.batch
            results = iter(self._finish(begun.batch) if count else [])
        except Exception as exc:  # noqa: BLE001
            results = iter([exc] * count)
        for request, outcome in zip(begun.requests, begun.outcomes, strict=True):
            result = next(results) if outcome is None else outcome
            try:
                self._send(request.get_response_sender(), result)
            except Exception as exc:  # noqa: BLE001 - the others must be answered all the same
                log_failure("sending a response", exc)

    def _send(self, sender: Any, result: list[Any] | Exception) -> None:
        if isinstance(result, Exception):
            send_error(sender, result, self._pb_utils)
        else:
            response = self._pb_utils.InferenceResponse(output_tensors=result)
            send(sender, response, self._pb_utils, is_last=True)
