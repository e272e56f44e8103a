"""Remote stores behind a link that misbehaves: right bytes or an error in time, then healed."""

import asyncio
import time
import uuid

import pytest

from kvfetcher.config import StoreConfig
from kvfetcher.errors import StoreError
from kvfetcher.storage import ByteRange, open_store
from kvfetcher.storage.base import allowed_seconds
from support.servers import S3Server
from support.shaping import LinkShape, ShapedLink
from support.stores import NAME, OTHER

DATA = bytes(range(256)) * 4096  # 1 MiB
TIMEOUT_SECONDS = 0.5
RETRIES = 1
# Each try up to its timeout for its bytes, a back-off between them, and a busy machine.
ALLOWED_SECONDS = (RETRIES + 1) * allowed_seconds(TIMEOUT_SECONDS, 2 * len(DATA)) + 0.1 + 1.0
SETTINGS = {
    "timeout_seconds": TIMEOUT_SECONDS,
    "connect_timeout_seconds": 0.3,
    "max_retries": RETRIES,
    "breaker_failures": 3,
    "breaker_backoff_seconds": 0.1,
    "breaker_max_backoff_seconds": 0.4,
}

HARMLESS = {
    "latency": LinkShape(rtt_seconds=0.08),
    "jitter": LinkShape(rtt_seconds=0.02, jitter_seconds=0.06),
    "slow": LinkShape(gbit_per_second=0.05),
}
FATAL = {
    "stall": LinkShape(is_stalled=True),
    "slow-loris": LinkShape(drip_bytes_per_second=10_000),
    "down": LinkShape(is_down=True),
    "reset": LinkShape(cut_after_bytes=200_000),
    "short read": LinkShape(cut_after_bytes=200_000, cut="close"),
}
REFUSALS = {str(status): LinkShape(http_status=status) for status in (429, 500, 503)}


@pytest.fixture(params=[pytest.param("redis", marks=pytest.mark.redis), "s3"])
async def setup(request, monkeypatch):
    """(store behind a healthy link, the link); the store holds NAME."""
    server = request.getfixturevalue(f"{request.param}_server")
    with ShapedLink(("127.0.0.1", server.port)) as link:
        if request.param == "redis":
            where = {"kind": "redis", "url": f"redis://{link.host}:{link.port}/0"}
        else:
            for name, value in S3Server.environment.items():
                monkeypatch.setenv(name, value)
            endpoint = f"http://{link.host}:{link.port}"
            url = f"s3://chunks/{uuid.uuid4().hex}"
            where = {"kind": "s3", "url": url, "endpoint": endpoint}
        patient = open_store(StoreConfig(**where))  # the first upload makes the bucket
        if request.param == "redis":
            await patient.delete(NAME)
        await patient.put(NAME, DATA)
        await patient.close()
        store = open_store(StoreConfig(**where, **SETTINGS))
        yield store, link
        await store.close()


async def expect_healed(store, link):
    link.reshape(LinkShape())
    deadline = time.monotonic() + 5
    while True:
        try:
            assert await store.get(NAME) == DATA
        except StoreError:
            assert time.monotonic() < deadline, "the breaker did not close again"
            await asyncio.sleep(0.05)
        else:
            return


async def failure(call):
    """The error that a call ends with."""
    with pytest.raises(StoreError) as caught:
        await call
    return caught.value


def read_all(store):
    ranges = [ByteRange(NAME, 0, len(DATA)), ByteRange(NAME, 5, 70_000)]
    return store.get_range(NAME, 0, len(DATA)), store.get(NAME), store.get_ranges(ranges)


@pytest.mark.parametrize("fault", HARMLESS)
async def test_a_bad_link_costs_time_not_bytes(setup, fault):
    store, link = setup
    link.reshape(HARMLESS[fault])
    expected = [DATA, DATA, [DATA, DATA[5:70_000]]]
    for read, data in zip(read_all(store), expected, strict=True):
        assert await read == data


async def test_a_large_object_has_more_time_over_a_slow_link(setup):
    store, link = setup
    link.reshape(LinkShape(gbit_per_second=0.012))  # 1.5 MB/s: 0.7 s for the object
    started = time.monotonic()
    assert await store.get_range(NAME, 0, len(DATA) + 1) == DATA
    assert await store.put(OTHER, DATA) is True
    assert time.monotonic() - started > 2 * TIMEOUT_SECONDS
    assert await store.get_range(OTHER, len(DATA) - 9, len(DATA)) == DATA[-9:]
    await store.delete(OTHER)


@pytest.mark.parametrize("fault", FATAL)
async def test_a_broken_link_is_an_error_in_time_and_heals(setup, fault):
    store, link = setup
    link.reshape(FATAL[fault])
    for read in read_all(store):
        start = time.monotonic()
        try:
            answers = await read
        except StoreError as exc:
            answers = [exc]
        assert time.monotonic() - start < ALLOWED_SECONDS
        # A batch answers one by one, and its small range may fit; bytes are never other bytes.
        assert isinstance(answers, list), "the whole object cannot have passed"
        assert isinstance(answers[0], StoreError)
        assert all(isinstance(a, StoreError) or a == DATA[5:70_000] for a in answers)
    await expect_healed(store, link)


@pytest.mark.parametrize("setup", ["s3"], indirect=True)
@pytest.mark.parametrize("status", REFUSALS)
async def test_a_refusing_s3_server_is_an_error_in_time_and_heals(setup, status):
    store, link = setup
    link.reshape(REFUSALS[status])
    for _ in range(4):
        start = time.monotonic()
        with pytest.raises(StoreError):
            await store.get(NAME)
        assert time.monotonic() - start < ALLOWED_SECONDS
    await expect_healed(store, link)


async def test_an_open_breaker_asks_nobody(setup):
    store, link = setup
    link.reshape(LinkShape(is_down=True))
    for _ in range(4):
        await failure(store.get(NAME))
    before = link.stats().connections
    refusals = [str(await failure(store.get(OTHER))) for _ in range(20)]
    assert sum("asked again in" in refusal for refusal in refusals) > 10
    assert link.stats().connections <= before + 4 * (RETRIES + 1)  # a few probes
    await expect_healed(store, link)
