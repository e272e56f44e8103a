"""The fetch executor through the real server: sharing, warming, cancelling, and what is told."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from kvfetcher import wire
from kvfetcher.control import ControlClient, socket_path
from support.metrics import read_metrics, total
from support.servers import RedisServer, has_redis
from support.shaping import LinkShape, ShapedLink

from .conftest import start_server

pytestmark = [pytest.mark.triton, pytest.mark.slow]

NUM_AT_ONCE = 24
TIER = {"tier_memory_bytes": 64 << 20}


def metrics(running):
    return read_metrics(running.server.metrics_url)


def saved(running, question):
    """`question`, saved; its first answer."""
    answer = running.client.generate(question, max_tokens=2)
    running.settle()
    return answer


def test_many_requests_for_one_prefix_are_one_fetch(running, prompt):
    question = prompt(250)
    first = saved(running, question)
    before = metrics(running)

    def ask(_):
        return running.client.generate(question, max_tokens=2, kv_policy="fetch")

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        answers = list(pool.map(ask, range(NUM_AT_ONCE)))
    reports = [answer.report.raw for answer in answers]
    assert {answer.output_ids for answer in answers} == {first.output_ids}
    assert {report["outcome"] for report in reports} == {"hit"}
    fetched = [report for report in reports if report["units"]]
    units_of_a_fetch = fetched[0]["units"]
    # All that were there together shared one; one who came after its lease was read began anew.
    assert sum(report["shared"] for report in reports) >= NUM_AT_ONCE // 2
    assert sum(report["units"] for report in reports) == units_of_a_fetch * len(fetched)
    assert len(fetched) + sum(report["shared"] for report in reports) == NUM_AT_ONCE
    after = metrics(running)
    name = "kvfetcher_fetched_bytes_total"
    assert total(after, name) - total(before, name) == sum(r["bytes_fetched"] for r in reports)
    running.settle()


def test_the_gates_prediction_and_its_outcome_are_told(running, prompt):
    question = prompt(250)
    saved(running, question)
    report = running.client.generate(question, max_tokens=1).report.raw
    gate = report["gate"]
    assert gate["verdict"] in ("all", "part", "probe")
    assert gate["predicted_compute_ms"] > gate["predicted_ms"] > 0
    assert gate["predicted_all_fetch_ms"] >= gate["predicted_fetch_ms"] > 0
    assert gate["fetch_ms"] > 0
    assert gate["error_ms"] == pytest.approx(gate["fetch_ms"] - gate["predicted_fetch_ms"], abs=0.1)
    found = metrics(running)
    assert total(found, "kvfetcher_gate_decisions_total") > 0
    assert total(found, "kvfetcher_gate_error_seconds_count") > 0
    assert total(found, "kvfetcher_fetch_stage_seconds_count", 'stage="lookup"') > 0
    assert total(found, "kvfetcher_link_bytes_per_second") > 0
    for name in ("kvfetcher_store_breaker_open", "kvfetcher_save_store_breaker_open"):
        assert [v for k, v in found.items() if k.startswith(name)] == [0]


def test_warming_brings_a_prefix_near_and_generates_nothing(tmp_path, prompt):
    question = prompt(250)
    with start_server(tmp_path / "store", store=TIER) as running:
        saved(running, question)
        warmed = running.client.generate(question, kv_policy="warm")
        assert (warmed.text, warmed.output_ids, warmed.finish_reason) == ("", (), "warmed")
        report = warmed.report.raw
        assert (report["outcome"], report["hit_tokens"]) == ("warmed", 0)
        assert report["chunks_hit"] == report["chunks_stored"] > 1
        files = running.settle()
        assert report["bytes_fetched"] >= sum(
            f.stat().st_size for f in files[: report["chunks_hit"]]
        )
        for file in files:  # what is near needs the store no more
            file.write_bytes(b"")
        hit = running.generate_hit(question, max_tokens=2)
        assert hit.report.raw["chunks_hit"] == report["chunks_hit"]
        result = running.triton.infer(wire.PREPROCESSING, [_text_input(question)])
        ids = result.as_numpy(wire.INPUT_IDS).tolist()
        again = running.client.warm(ids).raw
        assert (again["outcome"], again["chunks_hit"]) == ("warmed", report["chunks_hit"])
        running.settle()


def _text_input(text):
    tensor = grpcclient.InferInput(wire.TEXT_INPUT, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=object))
    return tensor


def test_warming_without_copies_near_by_says_so(running, prompt):
    report = running.client.warm(prompt(150))
    assert (report.raw["outcome"], report.reason) == ("skipped", "no_copies")


@pytest.mark.skipif(not has_redis(), reason="redis-server not available")
def test_a_client_that_goes_away_stops_the_transfers_of_its_fetch(tmp_path, prompt):
    question = prompt(300)
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(RedisServer(tmp_path / "redis"))
        link = stack.enter_context(ShapedLink(("127.0.0.1", redis.port), LinkShape()))
        store = {"kind": "redis", "url": f"redis://{link.host}:{link.port}/0"}
        running = stack.enter_context(start_server(tmp_path / "unused", store=store))
        running.client.generate(question, max_tokens=1)
        running.settle()
        link.reshape(LinkShape(gbit_per_second=0.0008))  # 100 kB/s: over ten seconds
        before = link.stats().bytes_down
        with grpcclient.InferenceServerClient(running.server.grpc_url) as client:
            client.start_stream(lambda result, error: None)
            policy = grpcclient.InferInput(wire.KV_POLICY, [1], "BYTES")
            policy.set_data_from_numpy(np.array([b"fetch"], dtype=object))
            client.async_stream_infer(wire.KVFETCHER, [_text_input(question), policy])
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
        assert total(metrics(running), "kvfetcher_fetches_total", 'outcome="cancelled"') == 1
        link.reshape(LinkShape())
        running.generate_hit(question, max_tokens=1)
