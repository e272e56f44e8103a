"""How a failure is told to clients, and what is done about a corrupt object."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvfetcher.errors import (
    ChunkNotFoundError,
    FormatError,
    KVFetcherError,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
)

if TYPE_CHECKING:
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


async def note_failure(store: Quarantine, name: str, exc: BaseException) -> tuple[Reason, str]:
    """The reason and detail that a failure at object `name` is reported with.

    A corrupt object is set aside; an unexpected error is logged, and told by its type only.

    Raises:
        BaseException: `exc`, where it is no Exception.
    """
    detail = f"{name}: {exc}"
    if isinstance(exc, FormatError):
        _log.warning("corrupt chunk %s set aside: %s", name, exc)
        try:
            await store.quarantine(name, str(exc))
        except StoreError as failed:
            _log.warning("chunk %s could not be set aside: %s", name, failed)
        return "corrupt_chunk", detail
    for kind, reason in _REASONS:
        if isinstance(exc, kind):
            return reason, detail
    if isinstance(exc, Exception):
        _log.error("unexpected %s on %s", type(exc).__name__, name, exc_info=exc)
        return "decode_error", f"{name}: {type(exc).__name__}"
    raise exc
