"""How a failure is reported to clients, and what is done about the object. One event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from kvfetcher.errors import (
    ArenaError,
    ChunkNotFoundError,
    DecoderUnavailableError,
    FormatError,
    GpuError,
    KVFetcherError,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from kvfetcher.fetch.undecodable import Undecodable

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.fetch.report import Reason
    from kvfetcher.storage.base import Quarantine

_log = logging.getLogger(__name__)

_REASONS: tuple[tuple[type[KVFetcherError], Reason], ...] = (
    (ChunkNotFoundError, "not_stored"),
    (StoreUnavailableError, "store_unavailable"),
    (StoreTimeoutError, "store_timeout"),
    (StoreError, "store_error"),
    (ArenaError, "arena_lost"),
    (GpuError, "gpu_error"),
    (DecoderUnavailableError, "decoder_unavailable"),
    (KVFetcherError, "decode_error"),
)
"""The first that fits."""

_MAX_PENDING = 16
"""Largest number of objects that are being quarantined; one more waits until it is read again."""


class Failures:
    """Reports failures, and quarantines corrupt objects while nobody waits for that.

    A store that hangs would otherwise hold requests beyond their deadlines. What is pending when the
    event loop ends is left: the object is found corrupt again.

    Args:
        store: where corrupt objects are quarantined.
        clock: seconds, monotonic.

    Attributes:
        undecodable: objects that are whole and do not decode here.
    """

    def __init__(self, store: Quarantine, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.undecodable = Undecodable(clock)
        self._store = store
        self._pending: dict[str, asyncio.Task[None]] = {}

    def note(self, name: str, exc: BaseException) -> tuple[Reason, str]:
        """The reason and detail that a failure at object `name` is reported with.

        A corrupt object will be quarantined, one that does not decode is remembered; an unexpected
        error is logged, and reported by its type only.

        Raises:
            BaseException: `exc`, where it is no Exception.
        """
        detail = f"{name}: {exc}"
        if isinstance(exc, FormatError):
            self.set_aside(name, str(exc))
            return "corrupt_chunk", detail
        self.undecodable.note(name, exc)
        for kind, reason in _REASONS:
            if isinstance(exc, kind):
                return reason, detail
        if isinstance(exc, Exception):
            _log.error("unexpected %s on %s", type(exc).__name__, name, exc_info=exc)
            return "decode_error", f"{name}: {type(exc).__name__}"
        raise exc

    def set_aside(self, name: str, reason: str) -> None:
        """Have an object quarantined that can't be used by anybody, while nobody waits for it."""
        if name in self._pending:
            return
        if len(self._pending) >= _MAX_PENDING:
            _log.warning("chunk %s is not quarantined now, too many are: %s", name, reason)
            return
        _log.warning("chunk %s will be quarantined: %s", name, reason)
        task = asyncio.create_task(self._quarantine(name, reason))
        self._pending[name] = task
        task.add_done_callback(lambda _: self._pending.pop(name))

    async def _quarantine(self, name: str, reason: str) -> None:
        try:
            await self._store.quarantine(name, reason)
        except StoreError as failed:
            _log.warning("chunk %s could not be quarantined: %s", name, failed)
