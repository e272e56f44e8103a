"""Threads for blocking I/O of one file system, so that one that hangs takes nobody else's.

A call that hangs cannot be stopped: its asker leaves after the timeout, and the thread stays taken
until the file system lives again. So the threads are few, calls that nobody waits for any more
never begin, once too many hang further ones are refused at once, and no thread keeps the
interpreter from ending.
"""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

# Threads without work end after this, so that a store that is dropped unclosed leaves none.
_LINGER_SECONDS = 1.0

_T = TypeVar("_T")


@dataclass(eq=False, slots=True)
class _Job:
    call: Callable[[], Any]
    timeout_seconds: float
    future: Future[Any] = field(default_factory=Future)
    started: float = 0.0
    is_late: bool = False
    """Its asker waited in vain."""


class IoThreads:
    """See the module's text. Any event loop; threads are made when needed.

    Args:
        name: name of the threads.
        max_threads: calls at one time; further ones wait.
        max_stuck: number of calls beyond their timeout at which further ones are refused.
    """

    def __init__(self, name: str, *, max_threads: int, max_stuck: int) -> None:
        self._name = name
        self._max_threads = max_threads
        self._max_stuck = max_stuck
        self._wake = threading.Condition()  # guards all that follows
        self._waiting: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._num_threads = 0
        self._num_idle = 0

    async def run(self, call: Callable[[], _T], *, timeout_seconds: float) -> _T:
        """Run `call` in a thread; its errors are raised here.

        Args:
            call: what to run.
            timeout_seconds: longest wait for it, its wait for a thread included.

        Raises:
            TimeoutError: it took too long, and ends by itself; or others do, and it did not begin.
            OSError: the process may have no thread for it.
        """
        job = _Job(call, timeout_seconds)
        self._enqueue(job)
        try:
            async with asyncio.timeout(timeout_seconds):
                result: _T = await asyncio.wrap_future(job.future)
                return result
        except TimeoutError:
            job.is_late = True
            raise
        finally:
            if not job.started:
                self._withdraw(job)

    def _enqueue(self, job: _Job) -> None:
        now = time.monotonic()
        with self._wake:
            stuck = sum(
                other.is_late or now - other.started >= other.timeout_seconds
                for other in self._running
            )
            if stuck >= self._max_stuck:
                raise TimeoutError(f"{stuck} earlier calls hang")
            if len(self._waiting) >= self._num_idle and self._num_threads < self._max_threads:
                self._start_thread()
            self._waiting.append(job)
            self._wake.notify()

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError as exc:  # the process may have no more; those that there are will do
            if not self._num_threads:
                raise OSError(errno.EAGAIN, str(exc)) from exc
        else:
            self._num_threads += 1

    def _withdraw(self, job: _Job) -> None:
        """Forget a job, and what it would write, that no thread has begun."""
        with self._wake:
            if job in self._waiting:
                self._waiting.remove(job)

    def _work(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Wait for a job and run it; False where none came."""
        with self._wake:
            self._num_idle += 1
            has_work = self._wake.wait_for(lambda: self._waiting, timeout=_LINGER_SECONDS)
            self._num_idle -= 1
            if not has_work:
                self._num_threads -= 1
                return False
            job = self._waiting.popleft()
            if not job.future.set_running_or_notify_cancel():
                return True
            job.started = time.monotonic()
            self._running.add(job)
        try:
            result = job.call()
        except BaseException as exc:  # noqa: BLE001  it is the asker's
            self._end(job)
            job.future.set_exception(exc)
        else:
            self._end(job)
            job.future.set_result(result)
        del job  # an error's traceback holds this frame, which would hold the bytes of a write
        return True

    def _end(self, job: _Job) -> None:
        with self._wake:
            self._running.remove(job)
