"""Faults between a real server and a real store: every request is answered, rightly and in time.

The prefix is saved over a healthy link; then the link, or the store, misbehaves while the same
prompt is asked again. Afterwards the breaker must have closed by itself: the next requests hit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvfetcher.config import StoreConfig
from kvfetcher.memory.control import ControlClient, socket_path
from kvfetcher.storage import open_backend
from support.metrics import read_metrics, total
from support.servers import RedisServer, S3Server
from support.shaping import LinkShape, ShapedLink

from .conftest import CHUNK_TOKENS, DOCUMENT, start_server

pytestmark = [pytest.mark.triton, pytest.mark.slow]

QUESTION = " ".join(DOCUMENT.split()[:150])
# Different prompts of a chunk and a bit each: so many look-ups at one time.
CROWD = [f"Number {i}. " + " ".join(DOCUMENT.split()[200:265]) for i in range(6)]
DEADLINE_SECONDS = 2.0
LATE = 1.2  # of the deadline
HEAL_SECONDS = 30.0
STORE = {
    "timeout_seconds": 1.0,
    "connect_timeout_seconds": 0.5,
    "max_retries": 1,
    "breaker_backoff_seconds": 0.2,
    "breaker_max_backoff_seconds": 1.0,
}
FETCH = {"deadline_seconds": DEADLINE_SECONDS, "min_hit_tokens": CHUNK_TOKENS}
# One small read after the other, so that something can happen between them.
SLOW_FETCH = {"max_inflight_units": 1, "max_inflight_bytes": 1 << 16, "max_read_bytes": 1}

FAULTS = {
    "latency": LinkShape(rtt_seconds=0.4, jitter_seconds=0.3),
    "slow link": LinkShape(gbit_per_second=0.004),
    "stall": LinkShape(is_stalled=True),
    "slow-loris": LinkShape(drip_bytes_per_second=20_000),
    "reset at once": LinkShape(is_down=True),
    "reset in the middle": LinkShape(cut_after_bytes=200_000),
    "short read": LinkShape(cut_after_bytes=200_000, cut="close"),
}
S3_FAULTS = {name: shape for name, shape in FAULTS.items() if name != "slow link"} | {
    f"status {code}": LinkShape(http_status=code) for code in (500, 503, 429)
}
# These let nothing through at all: the breaker must open.
OPENING = {("redis", "stall"), ("redis", "reset at once"), ("s3", "status 500")}
REDIS = pytest.param("redis", marks=pytest.mark.redis)


class Site:
    """A server, its store behind a link, and one prompt whose prefix is stored.

    Args:
        kind: of the store.
        running: the server.
        link: to the store; None for `file`.
        server: the store's; None for `file`.
        direct: the store without the link.
    """

    def __init__(self, kind, running, link, server, direct):
        self.kind, self.running, self.link = kind, running, link
        self.server, self.direct = server, direct
        first = running.client.generate(QUESTION, max_tokens=4)
        self.tokens = first.output_ids
        self.chunks = (first.report.prompt_tokens - 1) // CHUNK_TOKENS
        running.settle()
        self.expect_hit()
        started = time.monotonic()
        self.ask("recompute")
        self.compute_seconds = time.monotonic() - started

    def ask(self, policy="fetch"):
        answer = self.running.client.generate(QUESTION, max_tokens=4, kv_policy=policy)
        assert answer.output_ids == self.tokens, "a fault changed the answer"
        return answer

    def ask_in_time(self, policy):
        """One request; it took no longer than its deadline and a fifth, and computing."""
        started = time.monotonic()
        answer = self.ask(policy)
        took = time.monotonic() - started
        fetch = answer.report.stages_ms["total"] / 1e3
        assert fetch <= LATE * DEADLINE_SECONDS, f"{fetch:.2f} s: {answer.report.raw}"
        # As the client sees it; other work on the machine may slow computing down.
        allowed = LATE * DEADLINE_SECONDS + 3 * self.compute_seconds + 2.0
        assert took <= allowed, f"{took:.2f} s of {allowed:.2f} s: {answer.report.raw}"
        return answer

    def is_short(self, answer):
        return answer.report.hit_tokens < self.chunks * CHUNK_TOKENS

    def events(self, event):
        found = read_metrics(self.running.server.metrics_url)
        return total(found, "kvfetcher_store_events_total", f'event="{event}"')

    def breaker_is_open(self):
        found = read_metrics(self.running.server.metrics_url)
        return total(found, "kvfetcher_store_breaker_open")

    def expect_hit(self):
        """Hits again, after the breaker's back-off at the latest."""
        deadline = time.monotonic() + HEAL_SECONDS
        while self.is_short(answer := self.ask()):
            assert time.monotonic() < deadline, f"no hit any more: {answer.report.raw}"
            self.running.settle()
            time.sleep(0.05)

    def expect_refusal(self, opened_before):
        """The breaker opens, although requests that may compute soon leave their look-ups."""

        def ask(question):
            return self.running.client.generate(question, max_tokens=1, kv_policy="auto")

        deadline = time.monotonic() + HEAL_SECONDS
        with ThreadPoolExecutor(len(CROWD)) as pool:
            while self.events("opened") == opened_before:
                assert time.monotonic() < deadline, "the breaker never opened"
                assert all(answer.report.reason for answer in pool.map(ask, CROWD))
        while self.ask_in_time("auto").report.reason != "store_unavailable":
            assert time.monotonic() < deadline, "the store is asked although it is down"

    def lose_objects(self):
        async def lose():
            store = open_backend(self.direct)
            for info in [info async for info in store.list_prefix()]:
                await store.delete(info.name)
            await store.close()

        asyncio.run(lose())


@pytest.fixture(scope="module")
def site(request, tmp_path_factory, model):
    """A `Site` with the store that the parameter names; one at a time."""
    with contextlib.ExitStack() as stack:
        yield _open_site(request.param, tmp_path_factory.mktemp("site"), stack)


def _open_site(kind, folder, stack):
    if kind == "file":
        fetch = {**FETCH, **SLOW_FETCH}
        running = stack.enter_context(start_server(folder / "store", store=STORE, fetch=fetch))
        return Site(kind, running, None, None, running.config.store)
    if kind == "redis":
        server = stack.enter_context(RedisServer(folder / "redis"))
    else:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in S3Server.environment.items():
            patch.setenv(name, value)
        server = stack.enter_context(S3Server(folder / "s3"))
    link = stack.enter_context(ShapedLink(("127.0.0.1", server.port)))
    address, direct = (
        {"kind": "redis", "url": f"redis://127.0.0.1:{port}/0"}
        if kind == "redis"
        else {"kind": "s3", "url": "s3://faults/chunks", "endpoint": f"http://127.0.0.1:{port}"}
        for port in (link.port, server.port)
    )
    # So that a fetch from s3, too, does not ask for everything at its beginning.
    fetch = {**FETCH, "max_inflight_reads": 2}
    running = stack.enter_context(
        start_server(folder / "unused", store={**STORE, **address}, fetch=fetch)
    )
    return Site(kind, running, link, server, StoreConfig(**direct))


@pytest.fixture
def healing(site):
    """The site; afterwards everything is as it was, without help."""
    yield site
    if site.link is not None:
        site.link.reshape(LinkShape())
    site.expect_hit()
    assert not site.breaker_is_open()
    site.running.settle()


@pytest.mark.parametrize("site", [REDIS], indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_is_answered_in_time_whatever_the_link_does(healing, fault):
    check_answers_in_time(healing, fault, FAULTS[fault])


@pytest.mark.parametrize("site", ["s3"], indirect=True)
@pytest.mark.parametrize("fault", S3_FAULTS)
def test_every_request_is_answered_in_time_whatever_the_link_to_s3_does(healing, fault):
    check_answers_in_time(healing, fault, S3_FAULTS[fault])


def check_answers_in_time(site, fault, shape):
    opened, closed = site.events("opened"), site.events("closed")
    site.link.reshape(shape)
    site.ask_in_time("fetch")
    site.ask_in_time("auto")
    if (site.kind, fault) in OPENING:
        site.expect_refusal(opened)
        site.link.reshape(LinkShape())
        site.expect_hit()
        assert site.events("closed") > closed


@pytest.mark.parametrize("site", [REDIS, "s3"], indirect=True)
def test_a_link_that_fails_in_the_middle_of_a_fetch(healing):
    """The first part arrives; then nothing does."""
    healing.link.reshape(LinkShape(gbit_per_second=0.02))
    threading.Timer(0.4, healing.link.reshape, [LinkShape(is_stalled=True)]).start()
    answer = healing.ask_in_time("fetch")
    assert healing.is_short(answer)
    assert answer.report.reason


@pytest.mark.parametrize("site", [REDIS, "s3"], indirect=True)
def test_objects_that_disappear_during_the_fetch(healing):
    healing.link.reshape(LinkShape(gbit_per_second=0.02))
    timer = threading.Timer(0.25, healing.lose_objects)
    timer.start()
    assert healing.is_short(healing.ask_in_time("fetch"))
    timer.join()


@pytest.mark.parametrize("site", [REDIS], indirect=True)
def test_a_store_that_is_stopped_and_goes_on(healing):
    with healing.server.paused():
        healing.ask_in_time("fetch")
        healing.ask_in_time("auto")


DAMAGES = {
    "unlinked": (lambda path: path.unlink(), "not_stored"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "corrupt_chunk"),
}


@pytest.mark.parametrize("site", ["file"], indirect=True)
@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_damaged_during_the_fetch(healing, damage):
    harm, reason = DAMAGES[damage]
    last = max(healing.running.chunk_files(), key=lambda path: path.stat().st_mtime_ns)

    def harm_once_the_fetch_runs():
        with ControlClient(
            socket_path(healing.running.server.run_dir), timeout_seconds=10
        ) as engine:
            deadline = time.monotonic() + 10
            while not engine.stats()["blocks"]["open"] and time.monotonic() < deadline:
                time.sleep(0.001)
        harm(last)

    for _ in range(5):
        thread = threading.Thread(target=harm_once_the_fetch_runs)
        thread.start()
        answer = healing.ask_in_time("fetch")
        thread.join()
        if healing.is_short(answer):
            break
        healing.running.settle()  # read before it was harmed: once more
        healing.expect_hit()
    assert healing.is_short(answer)
    assert answer.report.reason == reason
