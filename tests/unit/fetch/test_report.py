"""What a report says after its journey to the engine."""

import json

import pytest

from kvfetcher.fetch.planning.bandwidth import LinkEstimate
from kvfetcher.fetch.planning.gate import Prompt, decide
from kvfetcher.fetch.report import FetchReport, GateReport, tell_computed
from kvfetcher.prefill_rate import PrefillModel

PROMPT = Prompt(4 * 256 + 100, 256, PrefillModel(1e-3, 0.0))  # 1.124 s to compute
LINK = LinkEstimate(1e6, 1e6, 1e6, 1e6, 0.001)


def travelled(finish_seconds):
    decision = decide(finish_seconds, PROMPT, margin=0.1)
    report = FetchReport(policy="auto", prompt_tokens=PROMPT.num_tokens)
    report.gate = GateReport.of(decision, LINK, num_chunks=4)
    return json.loads(report.to_json())


def test_the_engine_tells_how_computing_turned_out():
    report = travelled([0.3, 0.6, 0.8, 1.2])  # best: 3 chunks in 0.8 s, and 0.356 s of computing
    tell_computed(report, 1524.0)
    gate = report["gate"]
    assert (gate["verdict"], gate["fetch_ms"]) == ("none", None)
    assert gate["error_ms"] == pytest.approx(400.0)
    assert gate["loss_ms"] == pytest.approx(1524.0 - 1156.0)


@pytest.mark.parametrize("report", [{}, {"gate": None}, {"gate": {"verdict": "none"}}])
def test_a_report_without_such_a_decision_stays_as_it_is(report):
    before = json.dumps(report)
    tell_computed(report, 100.0)
    assert json.dumps(report) == before


def test_a_fetch_is_not_told_again():
    report = travelled([0.1, 0.2, 0.3, 0.4])
    tell_computed(report, 100.0)
    assert report["gate"]["error_ms"] is None
