"""How a failure is told to clients, and what is done about the object. One event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from kvfetcher.errors import (
    ChunkNotFoundError,
    FormatError,
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
    (KVFetcherError, "decode_error"),
)
"""The first that fits."""


_MAX_PENDING = 16
"""Objects that are being set aside; one more stays where it is until somebody reads it again."""


class Failures:
    """Tells failures, and sets corrupt objects aside while nobody waits for that.

    A store that hangs would otherwise hold requests beyond their deadlines. What is pending when the
    event loop ends is left: the object is found corrupt again.

    Args:
        store: where corrupt objects are set aside.
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

        A corrupt object will be set aside, one that does not decode is remembered; an unexpected
        error is logged, and told by its type only.

        Raises:
            BaseException: `exc`, where it is no Exception.
        """
        detail = f"{name}: {exc}"
        if isinstance(exc, FormatError):
            self._set_aside(name, exc)
            return "corrupt_chunk", detail
        self.undecodable.note(name, exc)
        for kind, reason in _REASONS:
            if isinstance(exc, kind):
                return reason, detail
        if isinstance(exc, Exception):
            _log.error("unexpected %s on %s", type(exc).__name__, name, exc_info=exc)
            return "decode_error", f"{name}: {type(exc).__name__}"
        raise exc

    def _set_aside(self, name: str, exc: FormatError) -> None:
        if name in self._pending:
            return
        if len(self._pending) >= _MAX_PENDING:
            _log.warning("corrupt chunk %s is not set aside, too many are: %s", name, exc)
            return
        _log.warning("corrupt chunk %s will be set aside: %s", name, exc)
        task = asyncio.create_task(self._quarantine(name, str(exc)))
        self._pending[name] = task
        task.add_done_callback(lambda _: self._pending.pop(name))

    async def _quarantine(self, name: str, reason: str) -> None:
        try:
            await self._store.quarantine(name, reason)
        except StoreError as failed:
            _log.warning("chunk %s could not be set aside: %s", name, failed)
