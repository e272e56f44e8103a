"""Stores under test: the conformance suite of every backend, and wrappers that make trouble.

A backend's test class inherits `StoreTests` and supplies a fixture ``store`` and the coroutines
``raw_get`` and ``raw_set`` that reach the backend *around* the API under test.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest

from kvfetcher.errors import ChunkNotFoundError, StoreError
from kvfetcher.storage.base import MAX_NAME_CHARS, ByteRange, get_ranges_singly

NAME = "ab/cd/" + "abcd" * 16
OTHER = "ab/ce/" + "abce" * 16

BAD_NAMES = [
    "",
    "/",
    "/etc/passwd",
    "../escape",
    "ab/../../escape",
    "ab/./cd",
    "ab//cd",
    "ab/",
    ".partial/x",
    "ab/.hidden",
    "ab\\cd",
    "ab cd",
    "ab\ncd",
    "ab\0cd",
    "ab\n",
    "é",
    "a" * (MAX_NAME_CHARS + 1),
]


class StoreTests:
    """What every store promises (``kvfetcher.storage.base``)."""

    async def raw_get(self, store, name) -> bytes:
        raise NotImplementedError

    async def raw_set(self, store, name, data) -> None:
        raise NotImplementedError

    async def test_put_stores_the_bytes(self, store):
        assert await store.put(NAME, b"\0\xffdata") is True
        assert await self.raw_get(store, NAME) == b"\0\xffdata"

    async def test_get_returns_the_bytes(self, store):
        await self.raw_set(store, NAME, b"\0\xffdata")
        assert await store.get(NAME) == b"\0\xffdata"

    async def test_an_empty_object_is_an_object(self, store):
        await store.put(NAME, b"")
        assert await store.get(NAME) == b""
        assert (await store.head(NAME)).num_bytes == 0

    async def test_get_missing_object_is_not_found(self, store):
        with pytest.raises(ChunkNotFoundError, match=NAME):
            await store.get(NAME)

    async def test_name_of_a_folder_is_not_an_object(self, store):
        await store.put(NAME, b"data")
        for folder in ("ab", "ab/cd"):
            assert await store.head(folder) is None
            with pytest.raises(ChunkNotFoundError):
                await store.get(folder)
        with pytest.raises(ChunkNotFoundError):
            await store.get(f"{NAME}/below")

    async def test_second_put_keeps_the_first_object(self, store):
        assert await store.put(NAME, b"first") is True
        assert await store.put(NAME, b"second") is False
        assert await store.get(NAME) == b"first"

    async def test_of_writers_at_once_one_makes_the_object(self, store):
        payloads = [bytes([i]) * 100_000 for i in range(8)]
        made = await asyncio.gather(*(store.put(NAME, p) for p in payloads))
        assert sum(made) == 1
        assert await store.get(NAME) == payloads[made.index(True)]

    @pytest.mark.parametrize(
        ("start", "end", "expected"),
        [
            (0, 10, b"0123456789"),
            (0, 1, b"0"),
            (3, 7, b"3456"),
            (9, 10, b"9"),
            (8, 99, b"89"),
            (10, 11, b""),
            (50, 60, b""),
        ],
    )
    async def test_range_is_half_open_and_cut_at_the_end(self, store, start, end, expected):
        await self.raw_set(store, NAME, b"0123456789")
        assert await store.get_range(NAME, start, end) == expected

    @pytest.mark.parametrize(("start", "end"), [(0, 0), (5, 5), (5, 3), (-1, 3), (-3, -1)])
    async def test_empty_or_negative_range_is_an_error(self, store, start, end):
        await self.raw_set(store, NAME, b"0123456789")
        with pytest.raises(StoreError, match="empty or negative"):
            await store.get_range(NAME, start, end)

    async def test_range_of_missing_object_is_not_found(self, store):
        with pytest.raises(ChunkNotFoundError, match=NAME):
            await store.get_range(NAME, 0, 1)

    async def test_ranges_of_many_objects_are_answered_in_order(self, store):
        names = [f"aa/{i:03d}" for i in range(40)]
        await asyncio.gather(*(self.raw_set(store, n, n.encode() * 10) for n in names))
        wanted = [ByteRange(name, 3, 6 + i) for i, name in enumerate(names)]
        expected = [(n.encode() * 10)[3 : 6 + i] for i, n in enumerate(names)]
        assert await store.get_ranges(wanted) == expected
        assert await store.get_ranges(wanted[::-1]) == expected[::-1]
        assert await store.get_ranges([]) == []

    async def test_a_look_up_of_the_size_it_names_is_answered(self, store):
        await self.raw_set(store, NAME, b"header")
        wanted = [ByteRange(NAME, 0, 8192)] + [
            ByteRange(f"ab/absent{i}", 0, 8192) for i in range(1, store.lookup_batch_size)
        ]
        first, *rest = await store.get_ranges(wanted)
        assert first == b"header"
        assert {type(answer) for answer in rest} == {ChunkNotFoundError}

    async def test_missing_objects_among_many_cost_no_other(self, store):
        await self.raw_set(store, NAME, b"0123456789")
        await self.raw_set(store, OTHER, b"")
        first, absent, past_the_end, empty = await store.get_ranges(
            [
                ByteRange(NAME, 0, 4),
                ByteRange("ab/absent", 0, 4),
                ByteRange(NAME, 10, 20),
                ByteRange(OTHER, 0, 5),
            ]
        )
        assert (first, past_the_end, empty) == (b"0123", b"", b"")
        assert isinstance(absent, ChunkNotFoundError)
        assert "ab/absent" in str(absent)

    @pytest.mark.parametrize("bad", [ByteRange(NAME, 4, 4), ByteRange("../escape", 0, 4)])
    async def test_a_bad_range_among_many_refuses_all(self, store, bad):
        await self.raw_set(store, NAME, b"0123456789")
        with pytest.raises(StoreError, match=r"empty or negative|not allowed"):
            await store.get_ranges([ByteRange(NAME, 0, 4), bad])

    async def test_head_tells_size_and_time(self, store):
        before = time.time()
        await store.put(NAME, b"12345")
        info = await store.head(NAME)
        assert (info.name, info.num_bytes) == (NAME, 5)
        assert before - 5 < info.modified_time_seconds < time.time() + 5

    async def test_head_of_missing_object_is_none(self, store):
        assert await store.head(NAME) is None

    async def test_delete_removes_the_object(self, store):
        await self.raw_set(store, NAME, b"data")
        await store.delete(NAME)
        assert await store.head(NAME) is None
        assert await store.put(NAME, b"again") is True

    async def test_delete_of_missing_object_is_no_error(self, store):
        await store.delete(NAME)
        await self.raw_set(store, OTHER, b"data")
        await store.delete(f"{OTHER}/below")
        assert await store.get(OTHER) == b"data"

    async def test_list_is_in_order_of_name_with_sizes(self, store):
        names = [f"{a}/{b}/{a}{b}" for a in ("0a", "0b", "ff") for b in ("00", "7f", "a0")]
        for i, name in enumerate(reversed(names)):
            await self.raw_set(store, name, b"x" * i)
        listed = [info async for info in store.list_prefix()]
        assert [info.name for info in listed] == names
        assert [info.num_bytes for info in listed] == list(reversed(range(len(names))))

    @pytest.mark.parametrize(
        ("prefix", "expected"),
        [
            ("", ["ab/cd/abcd1", "ab/cd/abcd2", "ab/ce/x", "abc", "b/y"]),
            ("ab", ["ab/cd/abcd1", "ab/cd/abcd2", "ab/ce/x", "abc"]),
            ("ab/", ["ab/cd/abcd1", "ab/cd/abcd2", "ab/ce/x"]),
            ("ab/c", ["ab/cd/abcd1", "ab/cd/abcd2", "ab/ce/x"]),
            ("ab/cd/abcd2", ["ab/cd/abcd2"]),
            ("zz", []),
        ],
    )
    async def test_list_by_prefix(self, store, prefix, expected):
        for name in ["b/y", "abc", "ab/ce/x", "ab/cd/abcd2", "ab/cd/abcd1"]:
            await self.raw_set(store, name, b"data")
        assert [info.name async for info in store.list_prefix(prefix)] == expected

    async def test_list_of_an_empty_store_is_empty(self, store):
        assert [info async for info in store.list_prefix()] == []

    async def test_list_of_many_objects_lists_each_once(self, store):
        names = [f"aa/{i:04d}" for i in range(600)]
        await asyncio.gather(*(self.raw_set(store, name, b"") for name in names))
        assert [info.name async for info in store.list_prefix("aa/")] == names

    async def test_a_listing_may_be_left_early(self, store):
        for i in range(3):
            await self.raw_set(store, f"aa/{i}", b"")
        listing = store.list_prefix()
        assert (await anext(listing)).name == "aa/0"
        await listing.aclose()

    async def test_quarantined_object_is_gone_and_its_name_free(self, store):
        await self.raw_set(store, NAME, b"rotten")
        await store.quarantine(NAME, "digest differs")
        assert await store.head(NAME) is None
        assert [info async for info in store.list_prefix()] == []
        assert await store.put(NAME, b"fresh") is True
        assert await store.get(NAME) == b"fresh"

    async def test_quarantine_of_missing_object_is_no_error(self, store):
        await store.quarantine(NAME, "digest differs")

    async def test_quarantine_twice_keeps_the_fresh_object_apart(self, store):
        for content in (b"rotten", b"rotten again"):
            await self.raw_set(store, NAME, content)
            await store.quarantine(NAME, "digest differs")
        assert await store.head(NAME) is None

    async def test_what_was_set_aside_is_listed_and_may_be_removed(self, store):
        assert [aside async for aside in store.list_quarantined()] == []
        before = time.time()
        for name, content in ((NAME, b"rotten"), (NAME, b"rotten again"), (OTHER, b"bad")):
            await store.put(name, content)
            await store.quarantine(name, "digest differs")
        await store.put(NAME, b"fresh")
        found = [aside async for aside in store.list_quarantined()]
        sizes = sorted((aside.info.name, aside.info.num_bytes) for aside in found)
        assert sizes == [(NAME, 6), (NAME, 12), (OTHER, 3)]
        for aside in found:
            assert before - 5 < aside.info.modified_time_seconds < time.time() + 5
        for aside in found:
            if aside.info.name == NAME:
                await store.delete_quarantined(aside)
                await store.delete_quarantined(aside)
        assert [aside.info.name async for aside in store.list_quarantined()] == [OTHER]
        assert await store.get(NAME) == b"fresh"

    @pytest.mark.parametrize("name", BAD_NAMES)
    async def test_bad_name_is_refused_by_every_verb(self, store, name):
        calls = [
            store.get(name),
            store.get_range(name, 0, 1),
            store.head(name),
            store.put(name, b""),
            store.delete(name),
            store.quarantine(name, "why"),
        ]
        for call in calls:
            with pytest.raises(StoreError, match="not allowed") as caught:
                await call
            assert not isinstance(caught.value, ChunkNotFoundError)

    @pytest.mark.parametrize("prefix", ["/", "..", "ab/../", ".partial/", "ab//"])
    async def test_bad_prefix_is_refused(self, store, prefix):
        with pytest.raises(StoreError, match="cannot start"):
            await anext(store.list_prefix(prefix))


@dataclass
class WrappedStore:
    """Passes every verb on after `before(verb, name)`; counts the calls by verb."""

    inner: object
    calls: Counter = field(default_factory=Counter)

    @property
    def lookup_batch_size(self):
        return self.inner.lookup_batch_size

    async def before(self, verb: str, name: str) -> None:
        """Hook of the subclasses."""

    async def _call(self, verb, name, *args):
        self.calls[verb] += 1
        await self.before(verb, name)
        return await getattr(self.inner, verb)(name, *args)

    async def get(self, name):
        return await self._call("get", name)

    async def get_range(self, name, start, end):
        return await self._call("get_range", name, start, end)

    async def get_ranges(self, ranges):
        """Each range counts, waits and fails as a `get_range`; the batch counts as `get_ranges`."""
        self.calls["get_ranges"] += 1
        return await get_ranges_singly(self, ranges, max_concurrency=max(1, len(ranges)))

    async def head(self, name):
        return await self._call("head", name)

    async def put(self, name, data):
        return await self._call("put", name, data)

    async def delete(self, name):
        return await self._call("delete", name)

    async def quarantine(self, name, reason):
        return await self._call("quarantine", name, reason)

    async def list_prefix(self, prefix=""):
        self.calls["list_prefix"] += 1
        await self.before("list_prefix", prefix)
        async for info in self.inner.list_prefix(prefix):
            yield info

    async def list_quarantined(self):
        self.calls["list_quarantined"] += 1
        await self.before("list_quarantined", "")
        async for aside in self.inner.list_quarantined():
            yield aside

    async def delete_quarantined(self, aside):
        self.calls["delete_quarantined"] += 1
        await self.before("delete_quarantined", aside.info.name)
        await self.inner.delete_quarantined(aside)

    async def close(self):
        await self.inner.close()


@dataclass
class LatencyStore(WrappedStore):
    """Delays every call; `bytes_per_second` > 0 makes reads take their transfer time as well."""

    latency_seconds: float = 0.0
    bytes_per_second: float = 0.0

    async def before(self, verb, name):
        await asyncio.sleep(self.latency_seconds)

    async def _call(self, verb, name, *args):
        result = await super()._call(verb, name, *args)
        if self.bytes_per_second and isinstance(result, bytes):
            await asyncio.sleep(len(result) / self.bytes_per_second)
        return result


@dataclass
class FaultyStore(WrappedStore):
    """Fails or damages chosen calls.

    Attributes:
        errors: verb -> exception to raise on every call of it.
        fail_after: verb -> number of calls that still succeed before `errors` applies.
        flip_byte: name -> offset in the object of a byte that reads deliver inverted.
        truncate: name -> bytes of the object that reads still deliver.
    """

    errors: dict = field(default_factory=dict)
    fail_after: dict = field(default_factory=dict)
    flip_byte: dict = field(default_factory=dict)
    truncate: dict = field(default_factory=dict)

    async def before(self, verb, name):
        if verb in self.errors and self.calls[verb] > self.fail_after.get(verb, 0):
            raise self.errors[verb]

    async def get(self, name):
        return self._damage(name, 0, await super().get(name))

    async def get_range(self, name, start, end):
        return self._damage(name, start, await super().get_range(name, start, end))

    def _damage(self, name, start, data):
        if name in self.truncate:
            data = data[: max(0, self.truncate[name] - start)]
        offset = self.flip_byte.get(name, -1) - start
        if 0 <= offset < len(data):
            damaged = bytearray(data)
            damaged[offset] ^= 0xFF
            data = bytes(damaged)
        return data
