"""The redis store against a real server, whole and broken."""

import asyncio
import contextlib
import re
import struct
import time
from collections import Counter
from pathlib import Path

import pytest
import redis

from kvfetcher.config import StoreConfig
from kvfetcher.errors import (
    ConfigError,
    StoreError,
    StoreFullError,
    StoreTimeoutError,
    TransientStoreError,
)
from kvfetcher.storage import ByteRange, open_backend, open_store
from kvfetcher.storage.redis import MAX_VALUE_BYTES, QUARANTINE_SECONDS
from support.servers import RedisServer, make_certificates
from support.stores import NAME, OTHER, StoreTests

pytestmark = pytest.mark.redis

STAMP = struct.Struct("<d")


def config_of(server, **settings):
    settings = {"timeout_seconds": 10.0, **settings}
    return StoreConfig(kind="redis", url=server.url, **settings)


@pytest.fixture
def raw(redis_server):
    """A client of its own that goes around the store; the database is empty."""
    with redis.Redis(port=redis_server.port) as client:
        client.flushall()
        yield client


@pytest.fixture
async def store(redis_server, raw):
    store = open_backend(config_of(redis_server))
    yield store
    await store.close()


class _RedisTests(StoreTests):
    @pytest.fixture(autouse=True)
    def _raw(self, raw):
        self.raw = raw

    async def raw_get(self, store, name):
        return self.raw.get(f"kvf:o:{name}")[8:]

    async def raw_set(self, store, name, data):
        self.raw.set(f"kvf:o:{name}", STAMP.pack(time.time()) + data)


class TestRedisStore(_RedisTests):
    """The store itself (fixture `store` above)."""


class TestRedisStoreWithTimeToLive(_RedisTests):
    @pytest.fixture
    async def store(self, redis_server, raw):
        store = open_backend(config_of(redis_server, ttl_seconds=60.0))
        yield store
        await store.close()


class TestGuardedRedisStore(_RedisTests):
    @pytest.fixture
    async def store(self, redis_server, raw):
        store = open_store(config_of(redis_server))
        yield store
        await store.close()


async def test_many_headers_cost_one_round_trip(store, raw):
    for i in range(50):
        await store.put(f"aa/{i}", b"x" * 1000)
    before = raw.info("stats")["total_reads_processed"]
    answers = await store.get_ranges([ByteRange(f"aa/{i}", 0, 100) for i in range(50)])
    assert answers == [b"x" * 100] * 50
    # Ours, and the one of `info` itself.
    assert raw.info("stats")["total_reads_processed"] - before == 2


async def test_an_object_that_is_not_read_goes_after_its_time(redis_server, raw):
    store = open_backend(config_of(redis_server, ttl_seconds=0.4))
    await store.put(NAME, b"data")
    await store.put(OTHER, b"data")
    for _ in range(8):
        await asyncio.sleep(0.1)
        assert await store.get_ranges([ByteRange(NAME, 0, 4)]) == [b"data"]
    assert await store.head(OTHER) is None
    assert await store.get(NAME) == b"data"
    await asyncio.sleep(0.5)
    assert await store.head(NAME) is None
    assert [info async for info in store.list_prefix()] == []
    await store.close()


async def test_without_a_time_objects_stay(store, raw):
    await store.put(NAME, b"data")
    await store.get(NAME)
    assert raw.ttl(f"kvf:o:{NAME}") == -1


async def test_quarantine_keeps_bytes_and_reason_for_a_week(store, raw):
    await store.put(NAME, b"rotten")
    await store.quarantine(NAME, "unit 3: digest differs")
    (kept,) = raw.keys("kvf:q:*")
    (why,) = raw.keys("kvf:r:*")
    assert raw.get(kept)[8:] == b"rotten"
    assert raw.get(why) == b"unit 3: digest differs"
    assert all(0 < raw.ttl(key) <= QUARANTINE_SECONDS for key in (kept, why))


async def test_quarantine_of_nothing_leaves_nothing(store, raw):
    await store.quarantine(NAME, "why")
    assert raw.keys() == []


async def test_an_object_too_large_for_redis_is_refused_with_the_remedy(store):
    with pytest.raises(StoreError, match=r"512 MiB\); lower codec\.chunk_tokens"):
        await store.put(NAME, bytes(MAX_VALUE_BYTES))
    assert await store.head(NAME) is None


async def test_a_key_of_another_type_is_an_error_that_names_it(store, raw):
    raw.lpush(f"kvf:o:{NAME}", "x")
    with pytest.raises(StoreError, match=f"get {NAME}.*WRONGTYPE"):
        await store.get(NAME)
    await store.put(OTHER, b"data")
    wrong, right = await store.get_ranges([ByteRange(NAME, 0, 4), ByteRange(OTHER, 0, 4)])
    assert "WRONGTYPE" in str(wrong)
    assert right == b"data"
    with pytest.raises(StoreError, match="WRONGTYPE"):
        await store.head(NAME)


async def test_keys_of_others_in_the_database_are_not_touched(store, raw):
    raw.set("session:1", "x")
    assert [info async for info in store.list_prefix()] == []
    assert await store.head("session") is None
    assert raw.get("session:1") == b"x"


async def test_a_cancelled_call_does_not_hand_its_answer_to_the_next(store):
    for i in range(4):
        await store.put(f"aa/{i}", bytes([i]) * 3_000_000)
    for i in range(60):
        call = asyncio.create_task(store.get(f"aa/{i % 4}"))
        await asyncio.sleep(0.0005 * (i % 12))
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert (await store.get_range(f"aa/{(i + 1) % 4}", 0, 2)) == bytes([(i + 1) % 4]) * 2


async def test_more_calls_than_connections_wait_for_one(redis_server, raw):
    store = open_backend(config_of(redis_server, max_connections=2))
    await store.put(NAME, b"data")
    connected = raw.info("clients")["connected_clients"]
    assert await asyncio.gather(*(store.get(NAME) for _ in range(40))) == [b"data"] * 40
    assert raw.info("clients")["connected_clients"] <= connected + 2
    await store.close()


CALLS = {
    "get": lambda store: store.get(NAME),
    "get_range": lambda store: store.get_range(NAME, 0, 2),
    "head": lambda store: store.head(NAME),
    "put": lambda store: store.put(OTHER, b"data"),
    "delete": lambda store: store.delete(OTHER),
    "quarantine": lambda store: store.quarantine(OTHER, "why"),
    "list_prefix": lambda store: anext(store.list_prefix()),
}


@pytest.fixture
def own_server(tmp_path):
    """A server that a test may break."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


async def test_a_stopped_server_is_a_timeout_and_heals(own_server):
    store = open_backend(config_of(own_server, timeout_seconds=0.3))
    await store.put(NAME, b"data")
    with own_server.paused():
        for verb, call in CALLS.items():
            started = time.monotonic()
            with pytest.raises(StoreTimeoutError, match=r"store\.timeout_seconds"):
                await call(store)
            assert time.monotonic() - started < 1.0, verb
        (answer,) = await store.get_ranges([ByteRange(NAME, 0, 4)])
        assert isinstance(answer, StoreTimeoutError)
    assert await store.get(NAME) == b"data"
    await store.close()


async def test_impatient_look_ups_open_the_breaker_of_a_stopped_server_and_it_heals(own_server):
    events = Counter()
    settings = {"timeout_seconds": 1.0, "breaker_failures": 3, "breaker_backoff_seconds": 0.05}
    config = config_of(own_server, **settings)
    store = open_store(config, observe=lambda event: events.update([event]))
    await store.put(NAME, b"data")
    header = [ByteRange(NAME, 0, 8 << 10)]
    deadline = time.monotonic() + 30
    with own_server.paused():
        while not events["opened"]:
            assert time.monotonic() < deadline, "the breaker never opened"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(store.get_ranges(header), timeout=0.2)
        assert events["failure"] >= 3
    while await store.get_ranges(header) != [b"data"]:
        assert time.monotonic() < deadline, "the breaker never closed again"
        await asyncio.sleep(0.05)
    assert events["closed"] == 1
    await store.close()


async def test_a_dead_server_is_an_error_and_a_new_one_is_used(own_server):
    store = open_backend(config_of(own_server))
    await asyncio.gather(*(store.put(f"aa/{i}", b"data") for i in range(20)))
    own_server.kill()
    for call in CALLS.values():
        with pytest.raises(TransientStoreError, match=r"is the server at store\.url running"):
            await call(store)
    answers = await store.get_ranges([ByteRange(NAME, 0, 4), ByteRange(OTHER, 0, 4)])
    assert [type(answer) for answer in answers] == [TransientStoreError] * 2
    own_server.start()
    # All pooled connections are from before; none of them may cost a call.
    assert await asyncio.gather(*(store.put(f"aa/{i}", b"data") for i in range(20))) == [True] * 20
    await store.close()


async def test_a_server_dying_mid_read_is_an_error(own_server):
    store = open_backend(config_of(own_server))
    await store.put(NAME, bytes(100_000_000))
    read = asyncio.create_task(store.get(NAME))
    await asyncio.sleep(0.05)
    own_server.kill()
    with pytest.raises(StoreError):
        await read
    await store.close()


async def test_a_server_without_memory_says_so(tmp_path):
    with RedisServer(tmp_path, options=["--maxmemory", "3mb"]) as server:
        store = open_backend(config_of(server))
        answers = await asyncio.gather(
            *(store.put(f"aa/{i}", bytes(1_000_000)) for i in range(10)), return_exceptions=True
        )
        refused = [str(answer) for answer in answers if answer is not True]
        assert refused
        assert all("maxmemory, or the policy allkeys-lru" in text for text in refused)
        assert {type(a) for a in answers if a is not True} == {StoreFullError}
        made = [i for i, answer in enumerate(answers) if answer is True]
        listed = [info.name async for info in store.list_prefix()]
        assert listed == [f"aa/{i}" for i in made]
        await store.close()


async def test_credentials_come_from_the_environment_and_show_nowhere(
    tmp_path, monkeypatch, caplog
):
    options = ["--user", *["kv", "on", ">s3cret", "~kvf:*", "+@all"], "--user", "default", "off"]
    with RedisServer(tmp_path, options=options) as server:
        denied = open_backend(config_of(server))
        with pytest.raises(StoreError, match=r"\$KVFETCHER_STORE_PASSWORD"):
            await denied.get(NAME)
        monkeypatch.setenv("KVFETCHER_STORE_USERNAME", "kv")
        monkeypatch.setenv("KVFETCHER_STORE_PASSWORD", "wr0ng")
        wrong = open_backend(config_of(server))
        with pytest.raises(StoreError, match="user that may read and write") as caught:
            await wrong.put(NAME, b"data")
        assert not isinstance(caught.value, TransientStoreError)
        monkeypatch.setenv("KVFETCHER_STORE_PASSWORD", "s3cret")
        right = open_backend(config_of(server))
        assert await right.put(NAME, b"data") is True
        for store in (denied, wrong, right):
            await store.close()
        told = f"{caught.value} {caplog.text} {right!r} {wrong!r} {vars(right)}"
        assert "wr0ng" not in told
        assert "s3cret" not in told


async def test_a_user_without_the_right_is_refused_with_the_remedy(tmp_path, monkeypatch):
    options = ["--user", *["reader", "on", ">pw", "~kvf:*", "+@read"]]
    with RedisServer(tmp_path, options=options) as server:
        monkeypatch.setenv("KVFETCHER_STORE_USERNAME", "reader")
        monkeypatch.setenv("KVFETCHER_STORE_PASSWORD", "pw")
        store = open_backend(config_of(server))
        with pytest.raises(StoreError, match="user that may read and write"):
            await store.put(NAME, b"data")
        assert await store.head(NAME) is None
        await store.close()


async def test_the_documented_user_may_do_all_that_is_needed(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "stores.md").read_text()
    (rule,) = re.findall(r"^ACL SETUSER (.*)$", page, re.MULTILINE)
    with RedisServer(tmp_path, options=["--user", *rule.split()]) as server:
        monkeypatch.setenv("KVFETCHER_STORE_USERNAME", "kvfetcher")
        monkeypatch.setenv("KVFETCHER_STORE_PASSWORD", "PASSWORD")
        store = open_backend(config_of(server, ttl_seconds=60.0))
        assert await store.put(NAME, b"data") is True
        assert await store.get(NAME) == b"data"
        assert await store.get_ranges([ByteRange(NAME, 0, 2)]) == [b"da"]
        assert (await store.head(NAME)).num_bytes == 4
        assert [info.name async for info in store.list_prefix("ab/")] == [NAME]
        await store.quarantine(NAME, "why")
        (aside,) = [aside async for aside in store.list_quarantined()]
        await store.delete_quarantined(aside)
        await store.put(NAME, b"data")
        await store.delete(NAME)
        assert [info async for info in store.list_prefix()] == []
        await store.close()


async def test_tls_is_verified(tmp_path):
    authority, signed = make_certificates(tmp_path)
    with RedisServer(tmp_path / "redis", tls=signed) as server:
        trusting = open_backend(config_of(server, ca_file=str(authority)))
        assert await trusting.put(NAME, b"data") is True
        assert await trusting.get(NAME) == b"data"
        await trusting.close()
        wary = open_backend(config_of(server))
        with pytest.raises(StoreError, match="certificate"):
            await wary.get(NAME)
        await wary.close()


async def test_closing_does_not_need_the_server(tmp_path):
    authority, signed = make_certificates(tmp_path)
    with RedisServer(tmp_path / "redis", tls=signed) as server:
        config = config_of(server, ca_file=str(authority), connect_timeout_seconds=0.5)
        store = open_backend(config)
        await store.put(NAME, b"data")
        with server.paused():  # TLS says goodbye in both directions
            started = time.monotonic()
            await store.close()
            assert time.monotonic() - started < 2.0


def test_rubbish_instead_of_certificates_is_refused_at_once(tmp_path):
    path = tmp_path / "rubbish.pem"
    for content in (b"no certificate", b"\xff"):
        path.write_bytes(content)
        config = StoreConfig(kind="redis", url="rediss://127.0.0.1", ca_file=str(path))
        with pytest.raises(ConfigError, match=r"store\.ca_file holds no PEM certificates"):
            open_backend(config)


async def test_a_node_of_a_cluster_is_named(tmp_path):
    """Its own words are `5511 127.0.0.1:17002`, and by chance a part of the keys works."""
    with RedisServer(tmp_path, options=["--cluster-enabled", "yes"]) as server:
        store = open_backend(config_of(server))
        with pytest.raises(StoreError, match="Redis Cluster"):
            await store.put("aa/1", b"x")
        moved = store._error("put aa/1", redis.exceptions.MovedError("5511 127.0.0.1:17002"))
        assert "node of a Redis Cluster (5511 127.0.0.1:17002)" in str(moved)
        await store.close()
