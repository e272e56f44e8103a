"""The fetch executor through the real server: sharing, and what is told."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from support.metrics import read_metrics, total

pytestmark = [pytest.mark.triton, pytest.mark.slow]

NUM_AT_ONCE = 24


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


def test_warming_without_copies_near_by_says_so(running, prompt):
    report = running.client.warm(prompt(150))
    assert (report.raw["outcome"], report.reason) == ("skipped", "no_copies")
