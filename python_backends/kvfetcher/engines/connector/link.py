"""The connector's end of the socket to the arena's owner: one connection per rank, one reader thread.

Sending is handing over to a second thread, so that no callback of the engine ever waits for the socket.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from typing import TYPE_CHECKING, Protocol

from kvfetcher.engines.connector.messages import (
    MAX_LINE_BYTES,
    Hello,
    Refused,
    Welcome,
    from_line,
    to_line,
)
from kvfetcher.errors import EngineError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvfetcher.engines.connector.messages import Message

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.05


class Sender(Protocol):
    """What the connector's parts need of the link."""

    @property
    def is_open(self) -> bool:
        """Whether the owner is still there."""
        ...

    def send(self, message: Message) -> None:
        """Hand over; never waits, never raises. Lost when the owner is gone."""
        ...


class OwnerLink:
    """A rank's connection. Made at the engine's start; `receive` is called from the reader thread.

    Args:
        path: path of the owner's socket.
        rank: this rank.
        num_ranks: number of ranks of the engine.
        timeout_seconds: longest wait for the owner at the start.

    Raises:
        EngineError: the owner cannot be reached, or refuses this rank.
    """

    def __init__(self, path: Path, *, rank: int, num_ranks: int, timeout_seconds: float) -> None:
        self._receive: Callable[[Message], None] = _nobody_listens
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        deadline = time.monotonic() + timeout_seconds
        self._socket = _connect(path, deadline)
        self._lines = self._socket.makefile("rb")
        try:
            answer = self._greet(path, rank, num_ranks, deadline)
        except EngineError:
            self._lines.close()
            self._socket.close()
            raise
        self.welcome = answer
        self._socket.settimeout(None)
        self._threads = [
            threading.Thread(target=run, name=f"kvfetcher-link-{name}", daemon=True)
            for name, run in (("read", self._read), ("write", self._write))
        ]

    def _greet(self, path: Path, rank: int, num_ranks: int, deadline: float) -> Welcome:
        try:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            self._socket.sendall(to_line(Hello(rank=rank, num_ranks=num_ranks, pid=os.getpid())))
            answer = from_line(self._lines.readline(MAX_LINE_BYTES))
        except (OSError, RequestError) as exc:
            raise EngineError(f"the owner of the KV arena at {path} did not answer: {exc}") from exc
        if isinstance(answer, Refused):
            raise EngineError(f"the owner of the KV arena refuses rank {rank}: {answer.reason}")
        if not isinstance(answer, Welcome):
            raise EngineError(f"the owner of the KV arena at {path} answered {answer!r} to Hello")
        return answer

    def start(self, receive: Callable[[Message], None]) -> None:
        """Begin to hand messages to `receive`, from a thread of the link."""
        self._receive = receive
        for thread in self._threads:
            thread.start()

    @property
    def is_open(self) -> bool:
        return not self._closed.is_set()

    def send(self, message: Message) -> None:
        if not self._closed.is_set():
            self._outbox.put(message)

    def close(self) -> None:
        """Send what waits, then end the connection. Safe to call twice."""
        self._outbox.put(None)
        for thread in self._threads[1:]:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(timeout=5.0)
        self._shut()
        reader = self._threads[0]
        if reader.is_alive() and reader is not threading.current_thread():
            reader.join(timeout=5.0)
        self._lines.close()
        self._socket.close()

    def _shut(self) -> None:
        self._closed.set()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other end was first
            return

    def _read(self) -> None:
        try:
            while line := self._lines.readline(MAX_LINE_BYTES):
                self._receive(from_line(line))
        except (OSError, ValueError) as exc:
            _log.info("link to the owner of the KV arena: %s", exc)
        except RequestError:
            _log.exception("the owner of the KV arena speaks another version; link closed")
        except Exception:  # noqa: BLE001  nobody would hear the owner any more
            _log.exception("a message of the owner of the KV arena could not be taken in")
        finally:
            if not self._closed.is_set():
                _log.warning(
                    "the link to the owner of the KV arena is lost; nothing is offered any more"
                )
            self._shut()  # so that the owner knows
            self._outbox.put(None)

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._socket.sendall(to_line(message))
        except OSError as exc:
            _log.warning("the owner of the KV arena cannot be notified: %s", exc)
            self._shut()


def _connect(path: Path, deadline: float) -> socket.socket:
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection.connect(os.fspath(path))
        except OSError as exc:
            connection.close()
            if time.monotonic() >= deadline:
                raise EngineError(
                    f"the owner of the KV arena cannot be reached at {path}: {exc}; the connector"
                    " runs only under the model tensorrt_llm of `kvfetcher serve`, and needs its"
                    " $KVFETCHER_RUN_DIR (or $TRTLLM_KVFETCHER_RUN_DIR)"
                ) from exc
            time.sleep(_RETRY_SECONDS)
        else:
            return connection


def _nobody_listens(message: Message) -> None:
    raise RequestError(f"message before the link was started: {message!r}")
