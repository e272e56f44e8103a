"""Ends a process whose late reply Triton would take for another request's, and counts its requests.

tritonserver (2.51) gives a model's process up when it shows no sign of life for about a second while
a message waits for it: the request fails. A process that then goes on answers all the same, and its
reply is read as that of the next request (seen: another tenant's prompt; more often, a crash). So
such a process must end before it answers: `watched` looks, before it takes a request and before it
replies, whether this process got no CPU for so long.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from kvfetcher.errors import ServerError
from kvfetcher.memory.control import run_dir
from kvfetcher.memory.vitals import Vitals, VitalsRecord, is_stopping

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STALL_SECONDS = 0.65
"""Triton looks after 1 s, at a mark that its own thread in this process sets every 0.3 s."""

_BEAT_SECONDS = 0.1
# What waited while this process stood still is taken at once when it goes on.
_AFTER_STALL_SECONDS = 0.5
# A thread of this process that keeps Python's lock stops the beat, too, but uses the CPU meanwhile.
_STALLED_CPU_SHARE = 0.5


class Pulse:
    """Notices that this process stood still, and counts what runs in it. Thread-safe.

    Args:
        run_folder: where the record is kept; None = nowhere.
        end: called instead of going on after a stall with a request.
        clock: seconds, monotonic.
        cpu_clock: seconds of CPU of this process.
    """

    def __init__(
        self,
        run_folder: Path | None,
        *,
        end: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._run_folder = run_folder
        self._end = end
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._record = None if run_folder is None else VitalsRecord(run_folder)
        self._lock = threading.Lock()
        self._beat = clock()
        self._cpu = cpu_clock()
        self._stall_ended = float("-inf")
        self._running = 0
        self._taken = 0

    def start(self) -> None:
        """Beat from a thread of its own until the process ends."""
        threading.Thread(target=self._run, name="kvfetcher-pulse", daemon=True).start()

    def beat(self) -> None:
        """Notice how long ago the last beat was."""
        with self._lock:
            now, cpu = self._clock(), self._cpu_clock()
            gap = now - self._beat
            if gap >= STALL_SECONDS and cpu - self._cpu < _STALLED_CPU_SHARE * gap:
                self._stall_ended = now
            self._beat, self._cpu = now, cpu
            self._write()

    def take(self) -> float:
        """A request arrives. Returns the moment, for `check`; ends the process after a stall."""
        self.beat()
        with self._lock:
            now = self._clock()
            if now - self._stall_ended < _AFTER_STALL_SECONDS:
                self._end("it stood still while a request may have waited for it")
            self._running += 1
            self._taken += 1
            self._write()
        return now

    def check(self, since: float) -> None:
        """Before a reply to what was taken at `since`: ends the process after a stall."""
        self.beat()
        if self._stall_ended >= since:
            self._end("it stood still while it worked on a request")

    def done(self) -> None:
        """Nothing more will be done for a request."""
        with self._lock:
            self._running -= 1
            self._write()

    def refuse_when_stopping(self) -> None:
        """Called where requests enter the server.

        Raises:
            ServerError: it is stopping.
        """
        if self._run_folder is not None and is_stopping(self._run_folder):
            raise ServerError(
                "the server is stopping and takes no new requests; send it to another server, or"
                " again once this one has started"
            )

    def _write(self) -> None:
        if self._record is not None:
            self._record.write(Vitals(self._beat, self._running, self._taken))

    def _run(self) -> None:
        while True:
            time.sleep(_BEAT_SECONDS)
            self.beat()


def end_process(reason: str) -> None:
    """End this process at once: nothing that it has begun to say may still be sent."""
    os.write(2, f"kvfetcher: process {os.getpid()} ends: {reason}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


@functools.cache
def pulse() -> Pulse:
    """This process's pulse, beating."""
    made = Pulse(run_dir(), end=end_process)
    made.start()
    return made


def watched(execute: Callable[..., Any]) -> Callable[..., Any]:
    """A model's `execute` (or one that returns a coroutine) under this process's pulse."""

    @functools.wraps(execute)
    def run(model: Any, requests: Any) -> Any:
        beating = pulse()
        since = beating.take()
        try:
            result = execute(model, requests)
        except BaseException:
            beating.done()
            raise
        if asyncio.iscoroutine(result):
            return _finish(result, beating, since)
        beating.done()
        beating.check(since)
        return result

    return run


async def _finish(execution: Any, beating: Pulse, since: float) -> Any:
    try:
        result = await execution
    finally:
        beating.done()
    if result is not None:  # a decoupled model's replies went out through senders
        beating.check(since)
    return result
