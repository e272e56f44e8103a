"""Faults between a real server and a real store: every request is answered, rightly and in time.

The prefix is saved over a healthy link; then the link, or the store, misbehaves while the same
prompt is asked again. Afterwards the breaker must have closed by itself: the next requests hit.
"""

from __future__ import annotations

import threading
import time

import pytest
import redis

from support.servers import RedisServer, S3Server
from support.shaping import LinkShape, ShapedLink

from .conftest import CHUNK_TOKENS, DOCUMENT, start_server

pytestmark = [pytest.mark.triton, pytest.mark.slow]

QUESTION = " ".join(DOCUMENT.split()[:150])
DEADLINE_SECONDS = 2.0
LATE = 1.2  # of the deadline
HEAL_SECONDS = 10.0
STORE = {
    "timeout_seconds": 1.0,
    "connect_timeout_seconds": 0.5,
    "max_retries": 1,
    "breaker_backoff_seconds": 0.2,
    "breaker_max_backoff_seconds": 1.0,
}
FETCH = {"deadline_seconds": DEADLINE_SECONDS, "min_hit_tokens": CHUNK_TOKENS}

FAULTS = {
    "latency": LinkShape(rtt_seconds=0.4, jitter_seconds=0.3),
    "slow link": LinkShape(gbit_per_second=0.004),
    "stall": LinkShape(is_stalled=True),
    "slow-loris": LinkShape(drip_bytes_per_second=20_000),
    "reset at once": LinkShape(is_down=True),
    "reset in the middle": LinkShape(cut_after_bytes=200_000),
    "short read": LinkShape(cut_after_bytes=200_000, cut="close"),
}


class Setup:
    """A server, its store behind a link, and one prompt whose prefix is stored."""

    def __init__(self, running, link, question):
        self.running, self.link, self.question = running, link, question
        first = running.client.generate(question, max_tokens=4)
        self.tokens = first.output_ids
        self.chunks = (first.report.prompt_tokens - 1) // CHUNK_TOKENS
        running.settle()
        self.expect_hit()

    def ask(self, policy="fetch"):
        answer = self.running.client.generate(self.question, max_tokens=4, kv_policy=policy)
        assert answer.output_ids == self.tokens, "a fault changed the answer"
        return answer

    def ask_in_time(self, policy):
        """One request; its fetch took no longer than its deadline and a fifth."""
        answer = self.ask(policy)
        took = answer.report.stages_ms["total"] / 1e3
        assert took <= LATE * DEADLINE_SECONDS, f"{took:.2f} s: {answer.report.raw}"
        return answer

    def expect_hit(self):
        """Hits again, after the breaker's back-off at the latest."""
        deadline = time.monotonic() + HEAL_SECONDS
        while (answer := self.ask()).report.hit_tokens < self.chunks * CHUNK_TOKENS:
            assert time.monotonic() < deadline, f"no hit any more: {answer.report.raw}"
            self.running.settle()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def over_redis(tmp_path_factory, store, model):
    with (
        ShapedLink(("127.0.0.1", store.port)) as link,
        start_server(
            tmp_path_factory.mktemp("unused"),
            store={**STORE, "kind": "redis", "url": f"redis://{link.host}:{link.port}/0"},
            fetch=FETCH,
        ) as running,
    ):
        yield Setup(running, link, QUESTION)


@pytest.fixture
def setup(over_redis):
    yield over_redis
    over_redis.link.reshape(LinkShape())
    over_redis.expect_hit()
    over_redis.running.settle()


@pytest.mark.redis
@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_is_answered_in_time_whatever_the_link_does(setup, fault):
    setup.link.reshape(FAULTS[fault])
    setup.ask_in_time("fetch")
    setup.ask_in_time("auto")


@pytest.mark.redis
def test_a_link_that_fails_in_the_middle_of_a_fetch(setup):
    """The first part arrives; then nothing does."""
    setup.link.reshape(LinkShape(gbit_per_second=0.02))
    threading.Timer(0.4, setup.link.reshape, [LinkShape(is_stalled=True)]).start()
    answer = setup.ask_in_time("fetch")
    assert answer.report.hit_tokens < setup.chunks * CHUNK_TOKENS
    assert answer.report.reason


@pytest.mark.redis
def test_objects_that_disappear_during_the_fetch(setup, store):
    with redis.Redis(port=store.port) as raw:
        kept = {key: raw.get(key) for key in raw.keys("kvf:o:*")}
        setup.link.reshape(LinkShape(gbit_per_second=0.02))
        threading.Timer(0.25, raw.flushall).start()
        answer = setup.ask_in_time("fetch")
        assert answer.report.hit_tokens < setup.chunks * CHUNK_TOKENS
        setup.running.settle()
        for key, value in kept.items():
            raw.set(key, value)


@pytest.mark.redis
def test_a_store_that_is_stopped_and_goes_on(setup, store):
    with store.paused():
        setup.ask_in_time("fetch")
        setup.ask_in_time("auto")


@pytest.fixture(scope="module")
def over_s3(tmp_path_factory, model):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in S3Server.environment.items():
            patch.setenv(name, value)
        with (
            S3Server(tmp_path_factory.mktemp("s3")) as server,
            ShapedLink(("127.0.0.1", server.port)) as link,
            start_server(
                tmp_path_factory.mktemp("unused"),
                store={
                    **STORE,
                    "kind": "s3",
                    "url": "s3://faults/chunks",
                    "endpoint": f"http://{link.host}:{link.port}",
                },
                fetch=FETCH,
            ) as running,
        ):
            yield Setup(running, link, QUESTION)


def test_an_s3_store_that_refuses_resets_or_stalls(over_s3):
    shapes = [LinkShape(http_status=status) for status in (500, 503, 429)]
    for shape in [*shapes, LinkShape(cut_after_bytes=200_000), LinkShape(is_stalled=True)]:
        over_s3.link.reshape(shape)
        over_s3.ask_in_time("fetch")
        over_s3.ask_in_time("auto")
        over_s3.link.reshape(LinkShape())
        over_s3.expect_hit()
    over_s3.running.settle()
