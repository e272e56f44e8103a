"""What goes over the link to a store: of many requests each chunk once, of one that left no more."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter

import numpy as np
import pytest
import redis
import tritonclient.grpc as grpcclient

from kvfetcher import wire
from kvfetcher.memory.control import ControlClient, socket_path
from support.metrics import read_metrics, total
from support.servers import RedisServer
from support.shaping import LinkShape, ShapedLink

from .conftest import CHUNK_TOKENS, start_server, text_input

pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.redis]

REQUESTS = 200
FIRST_BYTE = "8"  # of an object in its Redis value, after the time stamp


class KeyReads(threading.Thread):
    """What is read of each object, as the store itself sees it; from `start` to `stop`."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._listens = threading.Event()
        self.ranges: Counter = Counter()

    def run(self) -> None:
        with redis.Redis(port=self._port) as client, client.monitor() as monitor:
            self._listens.set()
            for command in monitor.listen():
                words = command["command"].split(" ")
                if words[0] == "GETRANGE":
                    self.ranges[tuple(words[1:4])] += 1
                elif words[-1] == "monitor:end":
                    return

    def __enter__(self):
        self.start()
        assert self._listens.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        with redis.Redis(port=self._port) as client:
            client.exists("monitor:end")
        self.join(10)


def fetch_at_once(running, ids, count, *, timeout=120.0):
    """`count` requests to `kv_fetch` over one stream; their leases and reports."""
    results, done = [], threading.Event()

    def callback(result, error):
        if error is not None:
            results.append(error)
        elif result.as_numpy(wire.KV_LEASE) is not None:
            results.append(result)
        if len(results) == count:
            done.set()

    with grpcclient.InferenceServerClient(running.server.grpc_url) as client:
        client.start_stream(callback)
        for number in range(count):
            tensors = [
                grpcclient.InferInput(wire.INPUT_IDS, list(ids.shape), "INT32"),
                grpcclient.InferInput(wire.KV_POLICY, [1], "BYTES"),
                grpcclient.InferInput(wire.PERMIT, [1], "BYTES"),
            ]
            tensors[0].set_data_from_numpy(ids)
            tensors[1].set_data_from_numpy(np.array([b"fetch"], dtype=object))
            permit = running.fetch_permit(ids).encode()
            tensors[2].set_data_from_numpy(np.array([permit], dtype=object))
            client.async_stream_infer(wire.KV_FETCH, tensors, request_id=str(number))
        assert done.wait(timeout), f"{len(results)} of {count} answered"
        client.stop_stream()
    return results


@pytest.fixture(scope="module")
def site(tmp_path_factory, model):
    """A Redis, the link to it, and a server whose store it is."""
    folder = tmp_path_factory.mktemp("site")
    with (
        RedisServer(folder / "redis") as store,
        ShapedLink(("127.0.0.1", store.port)) as link,
        start_server(
            folder / "unused",
            store={"kind": "redis", "url": f"redis://{link.host}:{link.port}/0"},
            fetch={
                "min_hit_tokens": CHUNK_TOKENS,
                "deadline_seconds": 60.0,
                "lease_ttl_seconds": 120.0,
            },
        ) as running,
    ):
        yield store, link, running


@contextlib.contextmanager
def shaped(link, shape):
    """The link is of this shape meanwhile. Gives the bytes it had carried before."""
    link.reshape(shape)
    try:
        yield link.stats().bytes_down
    finally:
        link.reshape(LinkShape())


def object_sizes(store):
    """Bytes of each object's value in Redis, by its key."""
    with redis.Redis(port=store.port) as raw:
        return {key.decode(): raw.strlen(key) for key in raw.keys("kvf:o:*")}


def test_200_requests_for_one_prefix_transfer_each_chunk_once(site, prompt):
    store, link, running = site
    question = prompt(220)
    ids = running.token_ids(question)
    whole = (len(ids) - 1) // CHUNK_TOKENS
    others = object_sizes(store)
    running.client.generate(question, max_tokens=1)
    running.settle()
    sizes = {name: n for name, n in object_sizes(store).items() if name not in others}
    assert len(sizes) == whole

    with (
        shaped(link, LinkShape(gbit_per_second=0.05, rtt_seconds=0.01)) as before,
        KeyReads(store.port) as reads,
    ):
        answers = fetch_at_once(running, ids, REQUESTS)
    moved = link.stats().bytes_down - before

    claims = [json.loads(answer.as_numpy(wire.KV_LEASE)[0]) for answer in answers]
    with ControlClient(socket_path(running.server.run_dir), timeout_seconds=10) as control:
        for claim in claims:
            control.release(claim["lease_id"])
    assert {claim["num_tokens"] for claim in claims} == {whole * CHUNK_TOKENS}
    assert {name for name, *_ in reads.ranges} == set(sizes)
    # Requests that come before the fetch has begun look the chunks up: a few read the headers.
    headers = {what: n for what, n in reads.ranges.items() if what[1] == FIRST_BYTE}
    units = {what: n for what, n in reads.ranges.items() if what[1] != FIRST_BYTE}
    assert set(units.values()) == {1}, "units were read more than once"
    assert max(headers.values()) < REQUESTS / 10
    assert moved < 1.1 * sum(sizes.values())
    running.settle()


def test_a_client_that_goes_away_stops_the_transfers_of_its_fetch(site, prompt):
    _, link, running = site
    question = prompt(300)
    running.client.generate(question, max_tokens=1)
    running.settle()
    already = num_cancelled(running)
    slow = LinkShape(gbit_per_second=0.0008)  # 100 kB/s: over ten seconds
    with shaped(link, slow) as before:
        with grpcclient.InferenceServerClient(running.server.grpc_url) as client:
            client.start_stream(lambda result, error: None)
            policy = grpcclient.InferInput(wire.KV_POLICY, [1], "BYTES")
            policy.set_data_from_numpy(np.array([b"fetch"], dtype=object))
            client.async_stream_infer(wire.KVFETCHER, [text_input(question), policy])
            deadline = time.monotonic() + 20
            while link.stats().bytes_down - before < 200_000:
                assert time.monotonic() < deadline, "the fetch never began"
                time.sleep(0.05)
            client.stop_stream(cancel_requests=True)
        with ControlClient(socket_path(running.server.run_dir), timeout_seconds=10) as control:
            deadline = time.monotonic() + 3
            while control.stats()["blocks"]["open"]:
                assert time.monotonic() < deadline, "the fetch goes on for nobody"
                time.sleep(0.05)
            assert control.stats()["running"] == 0
        time.sleep(1.0)  # what was on its way
        settled = link.stats().bytes_down
        time.sleep(1.0)
        assert link.stats().bytes_down - settled < 40_000, "the link carries 100 kB in this time"
        assert num_cancelled(running) == already + 1
    running.generate_hit(question, max_tokens=1)


def num_cancelled(running):
    found = read_metrics(running.server.metrics_url)
    return total(found, "kvfetcher_fetches_total", 'outcome="cancelled"')
