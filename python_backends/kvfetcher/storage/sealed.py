"""A store whose objects are sealed: signed, or encrypted and authenticated.

An object is cut into parts of 64 KiB, so that a range of it can be read and checked alone. A sealed
part, little-endian:

    bytes 0-3    magic ``KVS1``
    byte 4       kind: 1 = AES-256-GCM, 2 = HMAC-SHA256, 3 = Ed25519
    byte 5       1 = the object's last part, else 0
    bytes 6-7    zero
    bytes 8-15   id of the key, ASCII, zeros after it
    bytes 16-27  nonce (random; zeros where nothing is encrypted)
    bytes 28-    the part, encrypted with AES-256-GCM, else as it is
    then         the tag: 16, 32 or 64 bytes

The tag covers the head, the object's name, and the part's number, so that parts cannot change places,
objects or lengths. A part that does not open is a `ChecksumError`: the object is corrupt to its reader.
In a batched read it is answered as empty, since the answer there is bytes or the store's own error;
a read of that range alone says why.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Protocol

from kvfetcher.errors import ChecksumError, ConfigError, StoreError
from kvfetcher.format.keys import parse_object_name
from kvfetcher.storage.base import ByteRange, check_name, check_range, check_ranges

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from kvfetcher.storage.base import ObjectInfo, SetAside, Store
    from kvfetcher.storage.keyring import KeyRing

SealKind = Literal["hmac", "ed25519", "aes-gcm"]

PART_BYTES = 64 << 10

_HEAD = struct.Struct("<4sBBH8s12s")
_MAGIC = b"KVS1"
_NO_NONCE = bytes(12)
# Less is done at once: a thread costs more.
_INLINE_BYTES = 128 << 10
_THREADS = 2


class _Cipher(Protocol):
    """One way to seal a part."""

    code: int
    tag_bytes: int

    def seal(self, key_id: str, key: bytes, head: bytes, besides: bytes, part: bytes) -> bytes:
        """The part as stored, with its tag."""
        ...

    def open(self, key_id: str, key: bytes, head: bytes, besides: bytes, body: bytes) -> bytes:
        """The part; ChecksumError where the tag differs."""
        ...


class Sealer:
    """Seals and opens whole parts of objects.

    Args:
        kind: `store.seal`.
        ring: keys.

    Raises:
        ConfigError: the package `cryptography` is missing, or the ring lacks a key for it.
    """

    def __init__(self, kind: SealKind, ring: KeyRing) -> None:
        self._ring = ring
        self._cipher = _cipher(kind, ring)
        self._purpose = kind
        self.overhead = _HEAD.size + self._cipher.tag_bytes
        self.sealed_bytes = PART_BYTES + self.overhead

    def seal(self, name: str, data: bytes) -> bytes:
        """A whole object as it is stored.

        Raises:
            ConfigError: the ring has no key to seal with.
        """
        digits = _digits(name)
        keys = self._ring.of_tenant(digits)
        if not keys.current:
            raise ConfigError("the keyring of store.keys has no key to seal with, only public ones")
        key = self._ring.derived(keys.keys[keys.current], self._purpose, digits)
        raw = keys.keys[keys.current] if self._purpose == "ed25519" else key
        count = max(1, -(-len(data) // PART_BYTES))
        view, sealed = memoryview(data), []
        for index in range(count):
            nonce = os.urandom(12) if self._purpose == "aes-gcm" else _NO_NONCE
            is_last = index == count - 1
            head = _HEAD.pack(_MAGIC, self._cipher.code, is_last, 0, keys.current.encode(), nonce)
            part = bytes(view[index * PART_BYTES : (index + 1) * PART_BYTES])
            sealed += [
                head,
                self._cipher.seal(keys.current, raw, head, _besides(name, index), part),
            ]
        return b"".join(sealed)

    def open(self, name: str, data: bytes, *, first: int = 0, wanted: int | None = None) -> bytes:
        """The bytes of sealed parts.

        Args:
            name: of the object.
            data: sealed parts one after the other, from part `first` on.
            first: number of the first part.
            wanted: number of parts asked for: fewer only where the object ends; None = all.

        Raises:
            ChecksumError: a part is not what was sealed under this name, or a part is missing.
        """
        digits, opened = _digits(name), []
        keys = self._ring.of_tenant(digits)
        count = -(-len(data) // self.sealed_bytes)
        view = memoryview(data)
        for number in range(count):
            piece = view[number * self.sealed_bytes : (number + 1) * self.sealed_bytes]
            if len(piece) < self.overhead:
                raise _differs(name)
            head, body = bytes(piece[: _HEAD.size]), bytes(piece[_HEAD.size :])
            magic, code, last, zero, key_id, _ = _HEAD.unpack(head)
            if magic != _MAGIC or code != self._cipher.code or zero or last > 1:
                raise _differs(name)
            is_final = number == count - 1
            ends_short = len(piece) < self.sealed_bytes or wanted is None or count < wanted
            # The last part ends the object, and nothing else does.
            if (last and not is_final) or (is_final and ends_short and not last):
                raise _differs(name)
            chosen = key_id.rstrip(b"\0").decode("ascii", "replace")
            key = keys.keys.get(chosen)
            if key is None and self._purpose != "ed25519":
                raise _differs(name)
            raw = b"" if key is None else key
            if self._purpose != "ed25519":
                raw = self._ring.derived(raw, self._purpose, digits)
            try:
                opened.append(
                    self._cipher.open(chosen, raw, head, _besides(name, first + number), body)
                )
            except ChecksumError:
                raise _differs(name) from None
        return b"".join(opened)

    def plain_bytes(self, num_bytes: int) -> int:
        """Size of an object whose sealed size this is."""
        parts = -(-num_bytes // self.sealed_bytes)
        return max(0, num_bytes - parts * self.overhead)


class SealedStore:
    """See the module's text; verbs as in `storage.base`. One event loop."""

    def __init__(self, inner: Store, sealer: Sealer) -> None:
        self._inner = inner
        self._sealer = sealer
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="kvfetcher-seal")

    @property
    def lookup_batch_size(self) -> int:
        """See `GetRanges.lookup_batch_size`."""
        return self._inner.lookup_batch_size

    async def get(self, name: str) -> bytes:
        data = await self._inner.get(name)
        return await self._opened(name, data, 0, None)

    async def get_range(self, name: str, start: int, end: int) -> bytes:
        check_range(check_name(name), start, end)
        part = self._sealed_range(ByteRange(name, start, end))
        data = await self._inner.get_range(*part)
        return await self._cut(ByteRange(name, start, end), data)

    async def get_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes | StoreError]:
        check_ranges(ranges)
        answers = await self._inner.get_ranges([self._sealed_range(part) for part in ranges])
        result: list[bytes | StoreError] = []
        for part, answer in zip(ranges, answers, strict=True):
            if isinstance(answer, StoreError):
                result.append(answer)
                continue
            try:
                result.append(await self._cut(part, answer))
            except ChecksumError:
                result.append(b"")
        return result

    async def head(self, name: str) -> ObjectInfo | None:
        info = await self._inner.head(name)
        return None if info is None else self._plain(info)

    async def put(self, name: str, data: bytes) -> bool:
        check_name(name)
        if len(data) <= _INLINE_BYTES:
            return await self._inner.put(name, self._sealer.seal(name, data))
        loop = asyncio.get_running_loop()
        sealed = await loop.run_in_executor(self._threads, self._sealer.seal, name, data)
        return await self._inner.put(name, sealed)

    async def delete(self, name: str) -> None:
        await self._inner.delete(name)

    async def quarantine(self, name: str, reason: str) -> None:
        await self._inner.quarantine(name, reason)

    async def list_prefix(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        async for info in self._inner.list_prefix(prefix):
            yield self._plain(info)

    async def list_quarantined(self) -> AsyncIterator[SetAside]:
        async for aside in self._inner.list_quarantined():
            yield replace(aside, info=self._plain(aside.info))

    async def delete_quarantined(self, aside: SetAside) -> None:
        await self._inner.delete_quarantined(aside)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._inner.close()

    def _sealed_range(self, part: ByteRange) -> ByteRange:
        first, last = part.start // PART_BYTES, (part.end - 1) // PART_BYTES
        size = self._sealer.sealed_bytes
        return ByteRange(part.name, first * size, (last + 1) * size)

    async def _cut(self, part: ByteRange, data: bytes) -> bytes:
        first, last = part.start // PART_BYTES, (part.end - 1) // PART_BYTES
        opened = await self._opened(part.name, data, first, last - first + 1)
        begin = part.start - first * PART_BYTES
        return opened[begin : begin + part.end - part.start]

    async def _opened(self, name: str, data: bytes, first: int, wanted: int | None) -> bytes:
        if not data:
            if first == 0:  # even an empty object has a part
                raise _differs(name)
            return b""  # behind the object's end
        if len(data) <= _INLINE_BYTES:
            return self._sealer.open(name, data, first=first, wanted=wanted)
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: self._sealer.open(name, data, first=first, wanted=wanted)
        )

    def _plain(self, info: ObjectInfo) -> ObjectInfo:
        return replace(info, num_bytes=self._sealer.plain_bytes(info.num_bytes))


class _Hmac:
    code, tag_bytes = 2, 32

    def seal(self, key_id: str, key: bytes, head: bytes, besides: bytes, part: bytes) -> bytes:
        return part + hmac.digest(key, head + besides + part, "sha256")

    def open(self, key_id: str, key: bytes, head: bytes, besides: bytes, body: bytes) -> bytes:
        part, tag = body[: -self.tag_bytes], body[-self.tag_bytes :]
        if not hmac.compare_digest(tag, hmac.digest(key, head + besides + part, "sha256")):
            raise ChecksumError("the seal differs")
        return part


class _AesGcm:
    code, tag_bytes = 1, 16

    def __init__(self) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._aead, self._invalid = AESGCM, InvalidTag

    def seal(self, key_id: str, key: bytes, head: bytes, besides: bytes, part: bytes) -> bytes:
        return self._aead(key).encrypt(head[16:28], part, head + besides)

    def open(self, key_id: str, key: bytes, head: bytes, besides: bytes, body: bytes) -> bytes:
        try:
            return self._aead(key).decrypt(head[16:28], body, head + besides)
        except self._invalid:
            raise ChecksumError("the seal differs") from None


class _Ed25519:
    code, tag_bytes = 3, 64

    def __init__(self, ring: KeyRing) -> None:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import (
            Ed25519PrivateKey,
            Ed25519PublicKey,
        )

        self._invalid, self._private = InvalidSignature, Ed25519PrivateKey.from_private_bytes
        sets = [ring.general, *ring.tenants.values()]
        self._public = {
            seed: self._private(seed).public_key() for keys in sets for seed in keys.keys.values()
        }
        self._by_id = {
            name: Ed25519PublicKey.from_public_bytes(key) for name, key in ring.public.items()
        }

    def seal(self, key_id: str, key: bytes, head: bytes, besides: bytes, part: bytes) -> bytes:
        return part + self._private(key).sign(head + besides + part)

    def open(self, key_id: str, key: bytes, head: bytes, besides: bytes, body: bytes) -> bytes:
        part, tag = body[: -self.tag_bytes], body[-self.tag_bytes :]
        public = self._public.get(key) if key else self._by_id.get(key_id)
        try:
            if public is None:
                raise self._invalid
            public.verify(tag, head + besides + part)
        except self._invalid:
            raise ChecksumError("the seal differs") from None
        return part


def _cipher(kind: SealKind, ring: KeyRing) -> _Cipher:
    if kind == "hmac":
        return _Hmac()
    try:
        return _AesGcm() if kind == "aes-gcm" else _Ed25519(ring)
    except ModuleNotFoundError as exc:
        raise ConfigError(
            f"store.seal = {kind} needs the Python package {exc.name}: pip install 'kvfetcher[seal]'"
        ) from exc


def _digits(name: str) -> str:
    """The tenant's digits in a chunk's name; "" in other objects' names."""
    parts = parse_object_name(name)
    return "" if parts is None else parts.tenant


def _besides(name: str, index: int) -> bytes:
    return struct.pack("<HQ", len(name), index) + name.encode()


def _differs(name: str) -> ChecksumError:
    return ChecksumError(
        f"object {name} was not sealed with a key of store.keys, or was changed since"
    )
