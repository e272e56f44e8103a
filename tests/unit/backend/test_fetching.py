"""Which decode times the fetcher plans with, and what its metrics show meanwhile."""

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from kvfetcher.backend import fetching
from kvfetcher.backend.metrics import store_observer
from kvfetcher.config import cache_home, load_config
from kvfetcher.fetch.fetcher import Fetched, FetchLoad
from kvfetcher.fetch.planning.decode_times import H100_NVDEC, cpu_table, store_table
from kvfetcher.fetch.report import FetchReport
from support import pb_utils


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def table_for(decoder):
    config = load_config(environ={})
    codec = replace(config.codec, decoder=decoder)
    server = replace(config.server, decode_instances=3)
    return fetching._decode_table(replace(config, codec=codec, server=server))


def test_measured_times_are_planned_with():
    assert table_for("cpu") == cpu_table(3)
    measured = replace(cpu_table(2), device="this one")
    store_table(cache_home(), measured)
    assert table_for("cpu") == measured


def test_times_of_another_decoder_than_the_one_in_use_are_not():
    store_table(cache_home(), H100_NVDEC)
    assert table_for("cpu") == cpu_table(3)


@dataclass
class Shown:
    """Metrics that remember what gauges show and how often counters were counted."""

    gauges: dict = field(default_factory=dict)
    counts: dict = field(default_factory=dict)

    def set(self, name, value):
        self.gauges[name] = value

    def start(self, series):
        self.started = {name for name, _ in series}

    def add(self, name, value=1, **labels):
        key = (name, *labels.values())
        self.counts[key] = self.counts.get(key, 0) + value

    def observe(self, name, value, **labels):
        self.add(name, **labels)


@dataclass
class Fetches:
    """A fetcher whose load changes while one request waits."""

    end: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0

    async def fetch(self):
        await self.end.wait()
        return Fetched(None, FetchReport(policy="auto", prompt_tokens=5))

    late_bytes: int = 0
    """Of reads that nobody waits for any more."""

    def load(self):
        return FetchLoad(self.waiting, 7 * self.waiting + self.late_bytes, 1e6)


async def test_gauges_follow_what_is_fetched_while_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFETCHER_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(fetching, "_SHOW_SECONDS", 0.01)
    service = fetching.FetchService(load_config(environ={}), pb_utils)
    service._metrics, service._fetcher = shown, fetches = Shown(), Fetches()
    request = asyncio.create_task(service.fetch())

    async def shows(waiting):
        async with asyncio.timeout(5):
            while shown.gauges.get("kvfetcher_fetches_waiting") != waiting:
                await asyncio.sleep(0.01)
        assert shown.gauges["kvfetcher_inflight_bytes"] == 7 * waiting

    for fetches.waiting in (3, 1, 2):
        await shows(fetches.waiting)
    fetches.waiting = 0
    fetches.end.set()
    await request
    await shows(0)
    async with asyncio.timeout(5):
        while service._showing is not None:
            await asyncio.sleep(0.01)


async def test_bytes_of_reads_that_were_given_up_go_without_another_request(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFETCHER_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(fetching, "_SHOW_SECONDS", 0.01)
    service = fetching.FetchService(load_config(environ={}), pb_utils)
    service._metrics, service._fetcher = shown, fetches = Shown(), Fetches(late_bytes=210_081)
    fetches.end.set()
    await service.fetch()
    assert shown.gauges["kvfetcher_inflight_bytes"] == 210_081
    fetches.late_bytes = 0
    async with asyncio.timeout(5):
        while shown.gauges["kvfetcher_inflight_bytes"]:
            await asyncio.sleep(0.01)


def test_each_store_has_series_of_its_own():
    shown = Shown()
    reads, saves = store_observer(shown, "kvfetcher_store"), store_observer(shown, "other")
    assert shown.gauges == {"kvfetcher_store_breaker_open": 0, "other_breaker_open": 0}
    for event in ("failure", "opened"):
        saves(event)
    assert shown.gauges == {"kvfetcher_store_breaker_open": 0, "other_breaker_open": 1}
    for event in ("closed", "retry"):
        saves(event)
    reads("retry")
    assert shown.gauges["other_breaker_open"] == 0
    assert shown.counts == {
        ("other_events_total", "failure"): 1,
        ("other_events_total", "opened"): 1,
        ("other_events_total", "closed"): 1,
        ("other_events_total", "retry"): 1,
        ("kvfetcher_store_events_total", "retry"): 1,
    }
