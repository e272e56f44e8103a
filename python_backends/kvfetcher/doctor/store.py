"""Checks that the configured store takes, gives back and removes an object."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from typing import TYPE_CHECKING

from kvfetcher.doctor.check import Check
from kvfetcher.errors import KVFetcherError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.config import Config
    from kvfetcher.storage.base import Store

_PROBE_BYTES = 1 << 20
_REMEDY = (
    "check that the store runs and may be reached and written by this user; a request without it"
    " computes its prefix"
)


def check_store(config: Config, *, open_it: Callable[[], Store]) -> Check:
    """Put, head, get, get a range, and delete a probe object of 1 MiB; timed.

    Args:
        config: says which store, for the message.
        open_it: makes the store.
    """
    place = config.store.url or str(config.store.folder)
    try:
        seconds = asyncio.run(round_trip(open_it))
    except KVFetcherError as exc:
        return Check("store", "fail", f"{config.store.kind} {place}: {exc}", _REMEDY)
    times = ", ".join(f"{verb} {value * 1e3:.1f} ms" for verb, value in seconds.items())
    return Check("store", "ok", f"{config.store.kind} {place}: 1 MiB {times}")


async def round_trip(
    open_it: Callable[[], Store], *, num_bytes: int = _PROBE_BYTES
) -> dict[str, float]:
    """Write, read and delete an object of random bytes.

    Returns:
        Seconds of each verb.

    Raises:
        KVFetcherError: a call failed, or gave other bytes back.
    """
    name = f"doctor-{secrets.token_hex(16)}"
    data = os.urandom(num_bytes)
    seconds: dict[str, float] = {}
    store = open_it()
    try:
        started = time.perf_counter()
        await store.put(name, data)
        seconds["put"] = time.perf_counter() - started
        try:
            started = time.perf_counter()
            back = await store.get(name)
            seconds["get"] = time.perf_counter() - started
            started = time.perf_counter()
            part = await store.get_range(name, 1000, 2000)
            seconds["range"] = time.perf_counter() - started
            info = await store.head(name)
        finally:
            started = time.perf_counter()
            await store.delete(name)
            seconds["delete"] = time.perf_counter() - started
        gone = await store.head(name) is None
    finally:
        await store.close()
    if back != data or part != data[1000:2000] or info is None or info.num_bytes != len(data):
        raise _wrong("gives back other bytes than it was given")
    if not gone:
        raise _wrong("still has an object after its deletion")
    return seconds


def _wrong(what: str) -> KVFetcherError:
    from kvfetcher.errors import StoreError

    return StoreError(f"the store {what}; it must not be used")
