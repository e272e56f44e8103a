"""Running answers by name, so that another process can say that nobody wants one any more."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


_MAX_REMEMBERED = 4096  # a fetch asks within a second


class Streams:
    """The answers that an engine process is giving. Thread-safe.

    Why this exists: Triton (2.51 to 2.73dev) marks an ensemble's *next* step as cancelled when the
    client goes away, never the running one. The step behind the engine (`postprocessing`) sees the
    mark and tells the engine process here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, threading.Event] = {}
        self._gone: OrderedDict[str, None] = OrderedDict()

    @contextmanager
    def open(self) -> Iterator[tuple[str, threading.Event]]:
        """Name a new answer; its event is set once the answer is cancelled."""
        stream_id, gone = secrets.token_hex(8), threading.Event()
        with self._lock:
            self._running[stream_id] = gone
        try:
            yield stream_id, gone
        finally:
            with self._lock:
                del self._running[stream_id]

    def cancel(self, stream_id: str) -> bool:
        """Cancel an answer; False where it is over already (no error: a race that is lost).

        What does not run here is remembered for a while: it may be a fetch in another process,
        which asks `was_cancelled`.
        """
        with self._lock:
            gone = self._running.get(stream_id)
            if gone is None:
                self._gone[stream_id] = None
                if len(self._gone) > _MAX_REMEMBERED:
                    self._gone.popitem(last=False)
        if gone is not None:
            gone.set()
        return gone is not None

    def was_cancelled(self, stream_id: str) -> bool:
        """Whether `cancel` was called for something that does not run here."""
        with self._lock:
            return stream_id in self._gone
