"""The s3 store against a real server (SeaweedFS), whole and broken."""

import asyncio
import time
import uuid
from dataclasses import replace

import obstore
import pytest
from obstore.store import S3Store as Bucket

from kvfetcher.config import StoreConfig
from kvfetcher.errors import (
    ChunkNotFoundError,
    ConfigError,
    StoreError,
    StoreTimeoutError,
    TransientStoreError,
)
from kvfetcher.storage import ByteRange, open_backend, open_store
from support.bad_http import BadHttp, Fault
from support.servers import S3Server, make_certificates
from support.stores import NAME, OTHER, StoreTests


@pytest.fixture(autouse=True)
def _credentials(monkeypatch):
    for name, value in S3Server.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def own_prefix():
    """Of this test alone: that empties the store for it."""
    return f"test/{uuid.uuid4().hex}"


@pytest.fixture
def config(s3_server, own_prefix):
    return StoreConfig(
        kind="s3",
        url=f"s3://chunks/{own_prefix}",
        endpoint=s3_server.endpoint,
        timeout_seconds=30.0,
    )


@pytest.fixture
async def store(config):
    store = open_backend(config)
    yield store
    await store.close()


@pytest.fixture
def raw(s3_server, own_prefix):
    """The bucket, around the store."""
    return Bucket(
        "chunks",
        prefix=own_prefix,
        endpoint=s3_server.endpoint,
        client_options={"allow_http": True, "pool_max_idle_per_host": "4"},
    )


class _S3Tests(StoreTests):
    @pytest.fixture(autouse=True)
    def _raw(self, raw):
        self.raw = raw

    async def raw_get(self, store, name):
        return bytes(await (await obstore.get_async(self.raw, name)).bytes_async())

    async def raw_set(self, store, name, data):
        await obstore.put_async(self.raw, name, data)


class TestS3Store(_S3Tests):
    """The store itself (fixture `store` above)."""


class TestGuardedS3Store(_S3Tests):
    @pytest.fixture
    async def store(self, config):
        store = open_store(config)
        yield store
        await store.close()


class TestS3StoreWithoutConditionalPut(_S3Tests):
    """A server that knows no If-None-Match."""

    @pytest.fixture
    async def store(self, s3_server, config):
        async with BadHttp(s3_server.port) as proxy:
            proxy.fault = Fault("status", status=501, is_conditional=True)
            store = open_backend(_through(config, proxy))
            yield store
            await store.close()

    async def test_of_writers_at_once_one_makes_the_object(self, store):
        """Such a server cannot tell who won, but one of them did."""
        payloads = [bytes([i]) * 100_000 for i in range(8)]
        assert any(await asyncio.gather(*(store.put(NAME, p) for p in payloads)))
        assert await store.get(NAME) in payloads


def _through(config, proxy, **changes):
    return replace(config, endpoint=proxy.endpoint, **changes)


async def test_quarantine_keeps_bytes_and_reason(store, raw):
    await store.put(NAME, b"rotten")
    await store.quarantine(NAME, "unit 3: digest differs")
    kept = {
        meta["path"]: bytes(await (await obstore.get_async(raw, meta["path"])).bytes_async())
        for batch in obstore.list(raw)
        for meta in batch
    }
    assert sorted(kept.values()) == [b"%s\nunit 3: digest differs\n" % NAME.encode(), b"rotten"]
    assert all(path.startswith(".quarantine/") for path in kept)


async def test_objects_larger_than_one_part_come_back(store):
    data = bytes(range(256)) * 80_000  # 20 MB; the server cuts at 4 MB, clients at 5
    assert await store.put(NAME, data) is True
    assert await store.get(NAME) == data
    assert await store.get_range(NAME, 4_194_000, 12_000_000) == data[4_194_000:12_000_000]


async def test_a_bucket_without_prefix(s3_server):
    url = f"s3://chunks-{uuid.uuid4().hex[:8]}"
    store = open_backend(StoreConfig(kind="s3", url=url, endpoint=s3_server.endpoint))
    assert await store.put(NAME, b"data") is True
    assert [info.name async for info in store.list_prefix()] == [NAME]


async def test_a_missing_bucket_is_an_error_not_a_miss(s3_server):
    config = StoreConfig(kind="s3", url="s3://absent-bucket", endpoint=s3_server.endpoint)
    store = open_backend(config)
    with pytest.raises(
        StoreError, match=r"NoSuchBucket; create the bucket, or set store\.url"
    ) as e:
        await store.get(NAME)
    assert not isinstance(e.value, ChunkNotFoundError)
    with pytest.raises(StoreError, match="NoSuchBucket"):
        await anext(store.list_prefix())


async def test_wrong_credentials_are_refused_with_the_remedy(config, monkeypatch, caplog):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng")
    store = open_backend(config)
    for call in (store.get(NAME), store.put(NAME, b""), anext(store.list_prefix())):
        with pytest.raises(StoreError, match=r"403.*\$AWS_SECRET_ACCESS_KEY") as caught:
            await call
        assert not isinstance(caught.value, TransientStoreError)
        assert "wr0ng" not in f"{caught.value} {caplog.text} {store!r}"


async def test_missing_credentials_are_told_apart(config, monkeypatch):
    for name in S3Server.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")  # no role here
    store = open_backend(config)
    with pytest.raises(StoreError, match=r"no credentials; set \$AWS_ACCESS_KEY_ID"):
        await store.get(NAME)


async def test_a_reader_may_not_write(config, store, monkeypatch):
    await store.put(NAME, b"data")
    for name, value in S3Server.reader_environment.items():
        monkeypatch.setenv(name, value)
    reader = open_backend(config)
    assert await reader.get(NAME) == b"data"
    with pytest.raises(StoreError, match="403 AccessDenied"):
        await reader.put(OTHER, b"data")
    with pytest.raises(StoreError, match="403 AccessDenied"):
        await reader.quarantine(NAME, "why")
    assert await store.get(NAME) == b"data"


async def test_unreadable_certificates_are_refused_at_once(config, tmp_path):
    with pytest.raises(ConfigError, match=r"store\.ca_file .*absent\.pem cannot be read"):
        open_backend(replace(config, ca_file=str(tmp_path / "absent.pem")))
    (tmp_path / "rubbish.pem").write_text("-----BEGIN CERTIFICATE-----\nx\n")
    with pytest.raises(ConfigError, match="s3 store chunks"):
        open_backend(replace(config, ca_file=str(tmp_path / "rubbish.pem")))


async def test_a_place_is_waited_for_within_the_timeout(s3_server, config):
    async with BadHttp(s3_server.port) as proxy:
        store = open_backend(_through(config, proxy, max_connections=1))
        await store.put(NAME, b"0123456789")
        proxy.fault = Fault("stall", after_bytes=2, times=1)
        slow = asyncio.create_task(store.get(NAME))
        await asyncio.sleep(0.2)
        before = len(proxy.requests)
        waiting = asyncio.create_task(store.get(NAME))
        await asyncio.sleep(0.2)
        assert len(proxy.requests) == before  # not even sent
        slow.cancel()
        assert await waiting == b"0123456789"


CALLS = {
    "get": lambda store: store.get(NAME),
    "get_range": lambda store: store.get_range(NAME, 0, 8),
    "head": lambda store: store.head(NAME),
    "put": lambda store: store.put(OTHER, b"data"),
    "delete": lambda store: store.delete(OTHER),
    "quarantine": lambda store: store.quarantine(NAME, "why"),
    "list_prefix": lambda store: anext(store.list_prefix()),
}
READS = {verb: CALLS[verb] for verb in ("get", "get_range")}


@pytest.mark.parametrize("fault", [Fault("status", status=s) for s in (429, 500, 503)])
async def test_an_overloaded_server_is_a_failure_that_may_pass(s3_server, config, fault):
    await _fails_and_heals(s3_server, config, fault, CALLS, TransientStoreError)


async def test_a_reset_connection_is_a_failure_that_may_pass(s3_server, config):
    await _fails_and_heals(s3_server, config, Fault("reset"), CALLS, TransientStoreError)


async def test_a_short_read_is_a_failure_that_may_pass(s3_server, config):
    fault = Fault("cut", after_bytes=3)
    await _fails_and_heals(s3_server, config, fault, READS, TransientStoreError)


async def test_a_read_that_stalls_is_a_timeout(s3_server, config):
    fault = Fault("stall", after_bytes=3)
    await _fails_and_heals(s3_server, config, fault, READS, StoreTimeoutError)


async def _fails_and_heals(s3_server, config, fault, calls, error):
    async with BadHttp(s3_server.port) as proxy:
        store = open_backend(_through(config, proxy, timeout_seconds=0.5))
        await store.put(NAME, b"0123456789")
        proxy.fault = fault
        for verb, call in calls.items():
            started = time.monotonic()
            with pytest.raises(error):
                await call(store)
            assert time.monotonic() - started < 1.0, verb
        answers = await store.get_ranges([ByteRange(NAME, 0, 8), ByteRange(NAME, 2, 9)])
        assert all(isinstance(answer, error) for answer in answers)
        proxy.fault = None
        assert await store.get(NAME) == b"0123456789"
        assert await store.get_range(NAME, 2, 5) == b"234"


async def test_one_failure_among_many_costs_no_other(s3_server, config):
    async with BadHttp(s3_server.port) as proxy:
        store = open_backend(_through(config, proxy))
        await store.put(NAME, b"0123456789")
        proxy.fault = Fault("status", status=503, times=1)
        answers = await store.get_ranges([ByteRange(NAME, 0, 4)] * 5)
        assert [type(a) for a in answers].count(TransientStoreError) == 1
        assert answers.count(b"0123") == 4


async def test_a_guarded_store_gets_over_passing_failures(s3_server, config):
    async with BadHttp(s3_server.port) as proxy:
        store = open_store(_through(config, proxy))
        await store.put(NAME, b"0123456789")
        for fault in (
            Fault("status", status=503, times=2),
            Fault("reset", times=1),
            Fault("cut", after_bytes=3, times=1),
        ):
            proxy.fault = fault
            assert await store.get(NAME) == b"0123456789"


async def test_a_stopped_server_is_a_timeout_a_dead_one_an_error(tmp_path):
    with S3Server(tmp_path / "s3") as server:
        store = open_backend(
            StoreConfig(kind="s3", url="s3://chunks", endpoint=server.endpoint, timeout_seconds=1.0)
        )
        await _until_put(store, NAME, b"data")
        with server.paused():
            started = time.monotonic()
            with pytest.raises(StoreTimeoutError, match=r"store\.timeout_seconds"):
                await store.get(NAME)
            assert time.monotonic() - started < 5.0
        assert await store.get(NAME) == b"data"
        server.kill()
        for call in CALLS.values():
            with pytest.raises(TransientStoreError, match="is the server reachable"):
                await call(store)
        server.start()
        await _until_put(store, OTHER, b"data")
        assert await store.get(OTHER) == b"data"


async def _until_put(store, name, data):
    """A fresh server says that it is ready some time before it can store anything."""
    deadline = time.monotonic() + 30.0
    while True:
        try:
            return await store.put(name, data)
        except StoreError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.2)


async def test_tls_is_verified(tmp_path):
    authority, signed = make_certificates(tmp_path)
    with S3Server(tmp_path / "s3", tls=signed) as server:
        settings = {"kind": "s3", "url": "s3://chunks", "endpoint": server.endpoint}
        trusting = open_backend(StoreConfig(**settings, ca_file=str(authority)))
        await _until_put(trusting, NAME, b"data")
        assert await trusting.get(NAME) == b"data"
        wary = open_backend(StoreConfig(**settings))
        with pytest.raises(StoreError, match=r"name the server's authority in store\.ca_file"):
            await wary.get(NAME)
