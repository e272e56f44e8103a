"""The `redis` store: objects as values of Redis or Valkey.

    kvf:o:<name>             8 bytes: when it was put, seconds since the epoch, binary64
                             little-endian; then the object
    kvf:q:<name>:<suffix>    a corrupt object, as it was; goes after `QUARANTINE_SECONDS`
    kvf:r:<name>:<suffix>    why, as text; goes with it

One key per object: ``SET NX`` makes it whole or not at all, of two writers one wins, and there is
no index that could differ from what is stored (a listing scans the database). With a TTL, Redis
drops what has not been read for that long; every read of an object begins its time anew.

Of redis-py, commands of one call travel in one pipeline, so each verb but `list_prefix` and
`quarantine` is one round trip. Works on one event loop; connections are made when first needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import struct
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from redis import exceptions as failures  # two of them would hide built-in names
from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvfetcher.errors import (
    ChunkNotFoundError,
    ConfigError,
    StoreError,
    StoreFullError,
    StoreTimeoutError,
    TransientStoreError,
)
from kvfetcher.storage.base import (
    ByteRange,
    ObjectInfo,
    SetAside,
    allowed_seconds,
    check_name,
    check_prefix,
    check_range,
    check_ranges,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Sequence

    from kvfetcher.config import RedisAddress, StoreCredentials

QUARANTINE_SECONDS = 7 * 86400
"""How long a corrupt object is kept for a look at it: memory is what Redis has least of."""

MAX_VALUE_BYTES = 512 << 20
"""Redis' own limit of one value (``proto-max-bulk-len``)."""

_OBJECT = "kvf:o:"
_QUARANTINE = "kvf:q:"
_REASON = "kvf:r:"
_TIME = struct.Struct("<d")
_SCAN_COUNT = 1000
_LIST_BATCH = 256
_REFUSED = (
    failures.AuthenticationError,
    failures.AuthorizationError,
    failures.NoPermissionError,
)
_PASSING = (
    failures.BusyLoadingError,
    failures.ReadOnlyError,
    failures.TryAgainError,
    failures.ConnectionError,
    OSError,
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class RedisStore:
    """Objects in one database of a Redis server; see `kvfetcher.storage.base` for the contract."""

    lookup_batch_size = 128  # one pipeline; at most 1 MB of headers comes back

    def __init__(
        self,
        address: RedisAddress,
        *,
        credentials: StoreCredentials,
        timeout_seconds: float,
        connect_timeout_seconds: float,
        max_connections: int,
        ttl_seconds: float,
        trusted: bytes,
    ) -> None:
        """Does no I/O.

        Args:
            address: where the server is.
            credentials: user name and password; empty ones are not sent.
            timeout_seconds: longest wait for one call, its wait for a connection included; more
                for what carries much (`base.allowed_seconds`).
            connect_timeout_seconds: longest wait for a connection to be made.
            max_connections: connections at one time; further calls wait for one.
            ttl_seconds: an object that was not read for this time is dropped; 0 = never.
            trusted: PEM certificates to trust besides the system's.

        Raises:
            ConfigError: `trusted` is not PEM text.
        """
        self._where = f"redis store {address.host}:{address.port}/{address.database}"
        self._timeout_seconds = timeout_seconds
        self._ttl_ms = round(ttl_seconds * 1000)
        tls: dict[str, Any] = {"ssl_ca_data": _pem(trusted)} if address.tls and trusted else {}
        self._pool = BlockingConnectionPool(
            max_connections=max_connections,
            timeout=None,  # `_run` bounds the wait for a connection together with the call
            connection_class=SSLConnection if address.tls else Connection,
            host=address.host,
            port=address.port,
            db=address.database,
            username=credentials.username or None,
            password=credentials.password or None,
            socket_timeout=None,  # `_run` bounds it, by how much is to come
            socket_connect_timeout=connect_timeout_seconds,
            # Once, at once: a pooled connection may be from before the server's restart.
            retry=Retry(NoBackoff(), 1, supported_errors=(failures.ConnectionError,)),
            protocol=2,  # the newest that every Redis and Valkey speaks
            **tls,
        )
        self._redis: Redis = Redis(connection_pool=self._pool)

    def __repr__(self) -> str:
        return f"RedisStore({self._where!r})"

    async def get(self, name: str) -> bytes:
        key = _OBJECT + check_name(name)
        value, *_ = await self._pipeline(f"get {name}", [("GET", key), *self._renew(key)])
        if value is None:
            raise self._not_found(name)
        return bytes(value[_TIME.size :])

    async def get_range(self, name: str, start: int, end: int) -> bytes:
        check_range(check_name(name), start, end)
        (answer,) = await self._read_ranges(f"get {name}", [ByteRange(name, start, end)])
        if isinstance(answer, StoreError):
            raise answer
        return answer

    async def get_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes | StoreError]:
        check_ranges(ranges)
        if not ranges:
            return []
        try:
            return await self._read_ranges(f"get {len(ranges)} ranges", ranges)
        except StoreError as exc:
            return [exc] * len(ranges)

    async def head(self, name: str) -> ObjectInfo | None:
        (info,) = await self._describe(f"head {name}", _OBJECT, [check_name(name)])
        return info

    async def put(self, name: str, data: bytes) -> bool:
        key = _OBJECT + check_name(name)
        if _TIME.size + len(data) > MAX_VALUE_BYTES:
            raise StoreError(
                f"{self._where}: put {name}: {len(data)} bytes are more than a Redis value holds"
                f" ({MAX_VALUE_BYTES >> 20} MiB); lower codec.chunk_tokens, or use another store"
            )
        ttl = ["PX", self._ttl_ms] if self._ttl_ms else []
        value = _TIME.pack(time.time()) + data
        (made,) = await self._pipeline(
            f"put {name}", [("SET", key, value, "NX", *ttl)], num_bytes=len(data)
        )
        return made is not None

    async def delete(self, name: str) -> None:
        await self._pipeline(f"delete {name}", [("UNLINK", _OBJECT + check_name(name))])

    async def quarantine(self, name: str, reason: str) -> None:
        what = f"quarantine {name}"
        # The suffix keeps an earlier bad object of the same name.
        suffix = f"{check_name(name)}:{uuid.uuid4().hex[:8]}"
        rename = ("RENAME", _OBJECT + name, _QUARANTINE + suffix)
        (moved,) = await self._run(what, self._commands([rename]))
        if isinstance(moved, failures.ResponseError) and "no such key" in str(moved):
            return
        self._check(what, moved)
        await self._pipeline(
            what,
            [
                ("EXPIRE", _QUARANTINE + suffix, QUARANTINE_SECONDS),
                ("SET", _REASON + suffix, reason, "EX", QUARANTINE_SECONDS),
            ],
        )
        _log.warning("set object %s aside as %s: %s", name, _QUARANTINE + suffix, reason)

    async def list_prefix(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See `ListPrefix`. Holds all names that match in memory, to sort them."""
        async for info in self._list(f"list {check_prefix(prefix)!r}", _OBJECT, prefix):
            yield info

    async def list_quarantined(self) -> AsyncIterator[SetAside]:
        async for info in self._list("list the quarantine", _QUARANTINE, ""):
            name = info.name.rpartition(":")[0]
            yield SetAside(replace(info, name=name), info.name)

    async def delete_quarantined(self, aside: SetAside) -> None:
        command = ("UNLINK", _QUARANTINE + aside.place, _REASON + aside.place)
        await self._pipeline(f"delete {_QUARANTINE}{aside.place}", [command])

    async def close(self) -> None:
        """See `Store.close`. A server that does not take leave in time is left without."""
        with contextlib.suppress(failures.RedisError, OSError):
            await self._pool.disconnect()

    async def _read_ranges(
        self, what: str, ranges: Sequence[ByteRange]
    ) -> list[bytes | StoreError]:
        commands: list[tuple[Any, ...]] = []
        for name, start, end in ranges:
            key = _OBJECT + name
            first, last = start + _TIME.size, end + _TIME.size - 1
            commands += [("GETRANGE", key, first, last), ("EXISTS", key), *self._renew(key)]
        num_bytes = sum(end - start for _, start, end in ranges)
        replies = await self._run(what, self._commands(commands), num_bytes=num_bytes)
        step = len(replies) // len(ranges)
        return [
            self._range_answer(part, *replies[i * step : i * step + 2])
            for i, part in enumerate(ranges)
        ]

    def _range_answer(self, part: ByteRange, data: Any, exists: Any) -> bytes | StoreError:
        for reply in (data, exists):
            if isinstance(reply, Exception):
                return self._error(f"get {part.name}", reply)
        if not data and not exists:
            return self._not_found(part.name)
        return bytes(data)

    async def _list(self, what: str, kind: str, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Keys that start with `kind` and `prefix`, in order; `kind` is no part of their names."""
        names: set[str] = set()
        cursor: int | bytes = 0
        while True:
            ((cursor, keys),) = await self._pipeline(
                what, [("SCAN", cursor, "MATCH", f"{kind}{prefix}*", "COUNT", _SCAN_COUNT)]
            )
            names.update(key.decode().removeprefix(kind) for key in keys)
            if not int(cursor):
                break
        ordered = sorted(names)
        for start in range(0, len(ordered), _LIST_BATCH):
            for info in await self._describe(what, kind, ordered[start : start + _LIST_BATCH]):
                if info is not None:  # None: it went meanwhile
                    yield info

    async def _describe(
        self, what: str, kind: str, names: Sequence[str]
    ) -> list[ObjectInfo | None]:
        commands: list[tuple[Any, ...]] = []
        for name in names:
            key = kind + name
            commands += [("STRLEN", key), ("GETRANGE", key, 0, _TIME.size - 1)]
        replies = await self._pipeline(what, commands)
        return [
            ObjectInfo(name, length - _TIME.size, _TIME.unpack(stamp)[0])
            if len(stamp) == _TIME.size
            else None
            for name, length, stamp in zip(names, replies[::2], replies[1::2], strict=True)
        ]

    def _renew(self, key: str) -> list[tuple[Any, ...]]:
        """The command that begins the object's time anew, where it has one."""
        return [("PEXPIRE", key, self._ttl_ms)] if self._ttl_ms else []

    async def _pipeline(
        self, what: str, commands: list[tuple[Any, ...]], *, num_bytes: int = 0
    ) -> list[Any]:
        """Run commands in one round trip; one that fails fails the call."""
        replies = await self._run(what, self._commands(commands), num_bytes=num_bytes)
        for reply in replies:
            self._check(what, reply)
        return replies

    async def _commands(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        """Replies of `commands`; what the server refused is an exception among them."""
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return list(await pipeline.execute(raise_on_error=False))

    def _check(self, what: str, reply: Any) -> None:
        if isinstance(reply, Exception):
            raise self._error(what, reply) from reply

    async def _run(self, what: str, call: Awaitable[_T], *, num_bytes: int = 0) -> _T:
        """Await `call` within the timeout, errors of redis-py translated."""
        try:
            async with asyncio.timeout(allowed_seconds(self._timeout_seconds, num_bytes)):
                return await call
        except (failures.RedisError, OSError) as exc:
            raise self._error(what, exc) from exc

    def _not_found(self, name: str) -> ChunkNotFoundError:
        return ChunkNotFoundError(f"{self._where}: get {name}: no such object")

    def _error(self, what: str, exc: Exception) -> StoreError:
        """What an exception of redis-py means. Its text never holds the password."""
        begin = f"{self._where}: {what}"
        if isinstance(exc, TimeoutError | failures.TimeoutError):
            return StoreTimeoutError(
                f"{begin} took longer than store.timeout_seconds = {self._timeout_seconds:g} allows;"
                " is the server at store.url alive?"
            )
        if isinstance(exc, _REFUSED):
            return StoreError(
                f"{begin}: {exc}; set $KVFETCHER_STORE_USERNAME and $KVFETCHER_STORE_PASSWORD to a"
                " user that may read and write keys kvf:*"
            )
        if isinstance(exc, failures.AskError | failures.ClusterDownError):
            kind = TransientStoreError if isinstance(exc, failures.ClusterDownError) else StoreError
            return kind(
                f"{begin}: the server is a node of a Redis Cluster ({exc}), which store.kind 'redis'"
                " does not speak; name a single server, or put a cluster proxy before the nodes"
            )
        if isinstance(exc, failures.OutOfMemoryError):
            return StoreFullError(
                f"{begin}: {exc}; give the server more maxmemory, or the policy allkeys-lru"
            )
        if isinstance(exc, _PASSING):
            return TransientStoreError(f"{begin}: {exc}; is the server at store.url running?")
        return StoreError(f"{begin}: {exc}")


def _pem(certificates: bytes) -> str:
    """The text of PEM certificates, proven to be such (redis-py would find out per call)."""
    try:
        text = certificates.decode("ascii")
        ssl.create_default_context(cadata=text)
    except (ValueError, ssl.SSLError) as exc:
        raise ConfigError(f"store.ca_file holds no PEM certificates: {exc}") from exc
    return text
