"""The `s3` store: objects of one bucket, under one prefix, of any S3-compatible server.

    <prefix>/<name>                                objects
    <prefix>/.quarantine/<name with _>.<suffix>    corrupt objects, each with a ``.reason`` beside

S3 makes an object visible when its upload is whole. ``If-None-Match: *`` lets one of two writers
win; a server that does not know the condition answers 501, and then a look at the name before the
upload takes its place (two writers at once may both be told True; objects of one name have one
content). Uploads are single requests, which no crash can leave half done in the bucket.

The library (obstore) signs requests with the usual AWS variables, or as the role of the instance,
container or web identity; it does not read ~/.aws.
Each call is tried once here: whether to try again is for `storage.guard` to say.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore import exceptions as failures
from obstore.store import S3Store as Bucket

from kvfetcher.errors import (
    ChunkNotFoundError,
    ConfigError,
    StoreError,
    StoreFullError,
    StoreThrottledError,
    StoreTimeoutError,
    TransientStoreError,
)
from kvfetcher.storage.base import (
    MAX_OBJECT_BYTES,
    SINGLE_LOOKUP_BATCH,
    ObjectInfo,
    SetAside,
    allowed_seconds,
    check_name,
    check_prefix,
    check_range,
    flat_name,
    get_ranges_singly,
    is_name,
    name_of_flat,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from obstore.store import ClientConfig, S3Config

    from kvfetcher.config import BucketAddress
    from kvfetcher.storage.base import ByteRange

_QUARANTINE = ".quarantine"
_LIST_BATCH = 1000
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
# What the library asks for a role's credentials where the environment holds none.
_ROLE_CREDENTIALS = re.compile(r"/latest/(api/token|meta-data)")
_CERTIFICATE = re.compile(r"certificate|UnknownIssuer", re.IGNORECASE)
_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class _UnconditionalError(Exception):
    """The server knows no If-None-Match."""


class S3Store:
    """Objects of a bucket; see `kvfetcher.storage.base` for the contract.

    `list_prefix` yields in the server's order. That is the order of name wherever the server keeps
    to S3's; one that lists folder by folder differs for names with ``-`` or ``.``.
    """

    lookup_batch_size = SINGLE_LOOKUP_BATCH

    def __init__(
        self,
        address: BucketAddress,
        *,
        endpoint: str,
        region: str,
        timeout_seconds: float,
        connect_timeout_seconds: float,
        max_connections: int,
        trusted: bytes,
    ) -> None:
        """Does no I/O.

        Args:
            address: bucket and prefix.
            endpoint: URL of the server; "" = AWS.
            region: region of the bucket.
            timeout_seconds: longest wait for one call, its wait for a connection included; more
                for what carries much (`base.allowed_seconds`).
            connect_timeout_seconds: longest wait for a connection to be made.
            max_connections: calls at one time; further ones wait.
            trusted: PEM certificates to trust besides the system's.

        Raises:
            ConfigError: the library refuses a setting.
        """
        self._where = f"s3 store {'/'.join(part for part in address if part)}"
        self._timeout_seconds = timeout_seconds
        self._places = asyncio.Semaphore(max_connections)
        self._is_conditional = True
        options: ClientConfig = {
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=connect_timeout_seconds),
            # `_run` bounds calls by what they carry; this only must not end one before.
            "timeout": timedelta(seconds=allowed_seconds(timeout_seconds, MAX_OBJECT_BYTES)),
            "pool_max_idle_per_host": str(max_connections),
        }
        settings: S3Config = {"region": region}
        if endpoint:
            settings["endpoint"] = endpoint
        if trusted:
            options["root_certificate"] = trusted
        try:
            self._bucket = Bucket(
                address.name,
                prefix=address.prefix or None,
                config=settings,
                client_options=options,
                retry_config={"max_retries": 0},
            )
        except (failures.BaseError, ValueError) as exc:
            raise ConfigError(f"{self._where}: {_first_line(exc)}") from exc

    def __repr__(self) -> str:
        return f"S3Store({self._where!r})"

    async def get(self, name: str) -> bytes:
        check_name(name)
        return await self._run(f"get {name}", lambda: self._get(name))

    async def get_range(self, name: str, start: int, end: int) -> bytes:
        check_range(check_name(name), start, end)
        return await self._run(
            f"get {name}", lambda: self._get_range(name, start, end), num_bytes=end - start
        )

    async def get_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes | StoreError]:
        # All at once: `_run` lets as many through as there are connections.
        return await get_ranges_singly(self, ranges, max_concurrency=max(1, len(ranges)))

    async def head(self, name: str) -> ObjectInfo | None:
        check_name(name)
        try:
            meta = await self._run(f"head {name}", lambda: obstore.head_async(self._bucket, name))
        except ChunkNotFoundError:
            return None
        return ObjectInfo(name, meta["size"], meta["last_modified"].timestamp())

    async def put(self, name: str, data: bytes) -> bool:
        check_name(name)
        if self._is_conditional:
            try:
                return await self._run(
                    f"put {name}", lambda: self._put_new(name, data), num_bytes=len(data)
                )
            except _UnconditionalError:
                self._is_conditional = False
                _log.warning(
                    "%s: the server knows no If-None-Match; two writers at once may both hear"
                    " that they made the object",
                    self._where,
                )
        if await self.head(name) is not None:
            return False
        await self._run(f"put {name}", lambda: self._upload(name, data), num_bytes=len(data))
        return True

    async def delete(self, name: str) -> None:
        check_name(name)
        await self._run(f"delete {name}", lambda: obstore.delete_async(self._bucket, name))

    async def quarantine(self, name: str, reason: str) -> None:
        # The suffix keeps an earlier bad object of the same name.
        aside = f"{_QUARANTINE}/{flat_name(check_name(name), uuid.uuid4().hex[:8])}"
        what = f"quarantine {name}"
        try:
            await self._run(what, lambda: obstore.copy_async(self._bucket, name, aside))
        except ChunkNotFoundError:
            return
        why = f"{name}\n{reason}\n".encode()
        await self._run(what, lambda: self._upload(f"{aside}.reason", why))
        await self._run(what, lambda: obstore.delete_async(self._bucket, name))
        _log.warning("set object %s aside as %s: %s", name, aside, reason)

    async def list_prefix(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        what = f"list {check_prefix(prefix)!r}"
        folder = prefix.rpartition("/")[0]  # the library lists by whole segments
        async for info in self._list(what, folder or None):
            if info.name.startswith(prefix) and is_name(info.name):
                yield info

    async def list_quarantined(self) -> AsyncIterator[SetAside]:
        async for info in self._list("list the quarantine", _QUARANTINE):
            if name := name_of_flat(info.name.removeprefix(f"{_QUARANTINE}/")):
                yield SetAside(replace(info, name=name), info.name)

    async def delete_quarantined(self, aside: SetAside) -> None:
        # The reason goes first: what is left of half a removal is listed again.
        for path in (f"{aside.place}.reason", aside.place):
            await self._run(f"delete {path}", partial(obstore.delete_async, self._bucket, path))

    async def close(self) -> None:
        """See `Store.close`. The library closes its connections when nobody refers to its store."""
        del self._bucket

    async def _list(self, what: str, folder: str | None) -> AsyncIterator[ObjectInfo]:
        """All that lies in a folder; the name of each is its path."""
        batches = aiter(obstore.list(self._bucket, folder, chunk_size=_LIST_BATCH))
        while batch := await self._run(what, lambda: anext(batches, [])):
            for meta in batch:
                yield ObjectInfo(meta["path"], meta["size"], meta["last_modified"].timestamp())

    async def _get(self, name: str) -> bytes:
        result = await obstore.get_async(self._bucket, name)
        return bytes(await result.bytes_async())

    async def _get_range(self, name: str, start: int, end: int) -> bytes:
        try:
            return bytes(await obstore.get_range_async(self._bucket, name, start=start, end=end))
        except failures.BaseError as exc:
            if _status(exc) == 416:  # the object is there and ends at or before `start`
                return b""
            raise

    async def _put_new(self, name: str, data: bytes) -> bool:
        try:
            await obstore.put_async(self._bucket, name, data, mode="create", use_multipart=False)
        except failures.AlreadyExistsError:
            return False
        except failures.BaseError as exc:
            if _status(exc) == 501 or isinstance(exc, failures.NotSupportedError):
                raise _UnconditionalError from exc
            raise
        return True

    async def _upload(self, path: str, data: bytes) -> None:
        await obstore.put_async(self._bucket, path, data, use_multipart=False)

    async def _run(self, what: str, call: Callable[[], Awaitable[_T]], *, num_bytes: int = 0) -> _T:
        """Start `call` when there is a free slot, within the timeout; errors of obstore are translated."""
        seconds = allowed_seconds(self._timeout_seconds, num_bytes)
        try:
            async with asyncio.timeout(seconds), self._places:
                return await call()
        except (failures.BaseError, OSError) as exc:
            raise self._error(what, exc) from exc

    def _error(self, what: str, exc: Exception) -> StoreError:
        begin, text = f"{self._where}: {what}", str(exc)
        message = text.partition("Debug source")[0]  # what follows has the library's settings too
        status = _status(exc)
        if _ROLE_CREDENTIALS.search(message):
            return StoreError(
                f"{begin}: no credentials; set $AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY, or"
                " give this host a role"
            )
        if isinstance(exc, TimeoutError) or (status is None and _TIMED_OUT.search(message)):
            return StoreTimeoutError(
                f"{begin} took longer than store.timeout_seconds = {self._timeout_seconds:g} allows;"
                " is the server alive?"
            )
        code = found[1] if (found := _CODE.search(text)) else ""
        told = " ".join(part for part in (str(status or ""), code) if part) or _first_line(exc)
        if code == "NoSuchBucket":
            return StoreError(
                f"{begin}: {told}; create the bucket, or set store.url to another one"
            )
        if isinstance(exc, FileNotFoundError):
            return ChunkNotFoundError(f"{begin}: no such object")
        if status in (400, 401, 403):
            return StoreError(
                f"{begin}: {told}; set $AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY to a user that"
                " may list, read and write the bucket, and store.region to where it lies"
            )
        if status is None and _CERTIFICATE.search(text):
            return StoreError(f"{begin}: {told}; name the server's authority in store.ca_file")
        if status == 429 or code in _THROTTLED:
            return StoreThrottledError(
                f"{begin}: {told}; the store asks for fewer calls (store.max_connections)"
            )
        if status == 507 or code in _FULL:
            return StoreFullError(f"{begin}: {told}; free space there, or raise its quota")
        if status is None or status in (408, 409, 425, 429) or status >= 500:
            return TransientStoreError(
                f"{begin}: {told}; is the server reachable and not overloaded?"
            )
        return StoreError(f"{begin}: {told}")


# Answers of a store that lives: codes of S3 and of what speaks its protocol.
_THROTTLED = frozenset(
    {"SlowDown", "SlowDownRead", "SlowDownWrite", "TooManyRequests", "Throttling"}
)
_FULL = frozenset({"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"})


def _status(exc: Exception) -> int | None:
    """The HTTP status in an error of the library; None where no answer came."""
    found = _STATUS.search(str(exc))
    return int(found[1]) if found else None


def _first_line(exc: Exception) -> str:
    return str(exc).partition("\n")[0]
