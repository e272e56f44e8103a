"""One request through an engine as Triton responses: pieces, heartbeats, cancellation, ticket."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest

from kvfetcher.backend import generating
from kvfetcher.backend.generating import Generation
from kvfetcher.backend.params import GenerationOptions
from kvfetcher.engines.base import GenerateEvent, GenerateTimings, SamplingParams
from kvfetcher.engines.streams import Streams
from kvfetcher.memory.leases import SaveTicket
from support import pb_utils

TIMINGS = GenerateTimings(1.0, 0.0, 2.0, 5, 0, 100.0)
TICKET = SaveTicket("lease", (), 0, (1, 2), "")


@dataclasses.dataclass
class Host:
    """An engine host whose engine says what it is told to, with a pause before each event."""

    events: list
    pause: float = 0.0
    streams: Streams = dataclasses.field(default_factory=Streams)
    closed: bool = False

    @property
    def engine(self):
        return self

    async def generate(self, request, *, is_cancelled):
        try:
            for event in self.events:
                for _ in range(int(self.pause / 0.01) + 1):
                    await asyncio.sleep(0.01 if self.pause else 0)
                    if is_cancelled():
                        yield GenerateEvent(finish_reason="cancelled", timings=TIMINGS)
                        return
                yield event
        finally:
            self.closed = True


def answer_of(*texts):
    events = [
        GenerateEvent((i,), text, timings=None if i else TIMINGS) for i, text in enumerate(texts)
    ]
    last = dataclasses.replace(events.pop(), finish_reason="stop", timings=TIMINGS)
    return [*events, last, GenerateEvent(save=TICKET)]


def generation(**options):
    return Generation(
        np.arange(5, dtype=np.int32),
        GenerationOptions(SamplingParams(), **options),
        None,
        {"hit_tokens": 0},
        "request",
        pb_utils,
    )


async def collect(running, host, is_cancelled=lambda: False):
    return [item async for item in running.responses(host, is_cancelled)]


async def test_streaming_sends_each_piece_and_reports_on_the_first_and_the_last():
    running, host = generation(stream=True), Host(answer_of("a", "b", "c"))
    responses = await collect(running, host)
    assert [r["text_output"][0].decode() for r, _ in responses] == ["a", "b", "c"]
    assert [is_last for _, is_last in responses] == [False, False, True]
    reports = [r["kv_report"][0].decode() for r, _ in responses]
    assert [bool(text) for text in reports] == [True, False, True]
    assert json.loads(reports[-1])["engine"]["computed_tokens"] == 5
    assert running.ticket == TICKET
    assert host.closed


async def test_without_streaming_there_is_one_whole_answer():
    ((response, is_last),) = await collect(generation(), Host(answer_of("a", "b", "c")))
    assert is_last
    assert response["text_output"][0] == b"abc"
    assert response["output_ids"].tolist() == [0, 1, 2]
    assert response["finish_reason"][0] == b"stop"


async def test_the_engine_tells_how_a_decision_to_compute_turned_out():
    running = generation()
    running.report["gate"] = {
        "verdict": "none", "predicted_compute_ms": 1.5, "predicted_with_fetch_ms": 5.0
    }  # fmt: skip
    ((response, _),) = await collect(running, Host(answer_of("a", "b")))
    gate = json.loads(response["kv_report"][0])["gate"]
    assert (gate["error_ms"], gate["loss_ms"]) == (TIMINGS.prefill_ms - 1.5, -3.0)

    class Counts(dict):
        add = observe = dict.__setitem__

    counts = Counts()
    running.count(counts)
    assert counts == {
        "kvfetcher_gate_compute_error_seconds": pytest.approx(0.0005),
        "kvfetcher_gate_compute_lost_seconds_total": pytest.approx(-0.003),
        "kvfetcher_gate_compute_gained_seconds_total": pytest.approx(0.003),
    }


async def test_heartbeats_are_empty_and_come_before_the_answer_only(monkeypatch):
    monkeypatch.setattr(generating, "_POLL_SECONDS", 0.02)
    responses = await collect(generation(heartbeat=True), Host(answer_of("a", "b"), pause=0.1))
    *beats, (answer, is_last) = responses
    assert len(beats) >= 3
    assert all(not r["text_output"][0] and not r["output_ids"].size for r, _ in beats)
    assert answer["text_output"][0] == b"ab"
    assert is_last


@pytest.mark.parametrize("pause", [0.0, 0.3])
async def test_a_client_that_went_away_ends_the_engines_work(monkeypatch, pause):
    monkeypatch.setattr(generating, "_POLL_SECONDS", 0.01)
    host = Host(answer_of(*["x"] * 100_000), pause=pause)
    responses = await asyncio.wait_for(
        collect(generation(stream=True), host, is_cancelled=lambda: True), timeout=10
    )
    last, is_last = responses[-1]
    assert is_last
    assert last is None
    assert host.closed


async def test_another_process_can_cancel_by_stream_id(monkeypatch):
    monkeypatch.setattr(generating, "_POLL_SECONDS", 0.01)
    host, running = Host(answer_of(*["x"] * 100_000), pause=0.01), generation(stream=True)
    responses = running.responses(host, lambda: False)
    first, _ = await anext(responses)
    assert host.streams.cancel(first["stream_id"][0].decode())
    *_, (last, is_last) = [item async for item in responses]
    assert is_last
    assert last is None
    assert not host.streams.cancel(running.stream_id)


async def test_nobody_is_asked_after_the_last_response(monkeypatch):
    """tritonserver 2.51 crashes when a closed response sender is asked whether it is cancelled."""
    monkeypatch.setattr(generating, "_POLL_SECONDS", 0.001)
    answered = False

    def is_cancelled():
        assert not answered
        return False

    host = Host(answer_of("a", "b"), pause=0.02)
    async for _, is_last in generation(stream=True, heartbeat=True).responses(host, is_cancelled):
        answered = answered or is_last
    assert answered


async def test_a_request_that_only_warms_is_answered_without_the_engine():
    running, host = generation(generate=False), Host([])
    ((response, is_last),) = await collect(running, host)
    assert is_last
    assert response["finish_reason"][0].decode() == "warmed"
    assert (response["text_output"][0].decode(), len(response["output_ids"])) == ("", 0)
    assert json.loads(response["kv_report"][0]) == {"hit_tokens": 0}
    assert not host.closed, "the engine was never asked"


@pytest.mark.parametrize("is_gone", [True, False])
async def test_a_fetchs_sign_of_life_is_dropped_and_tells_whether_the_client_is_there(is_gone):
    running, host = generation(fetch_id="f1"), Host([])
    assert await collect(running, host, lambda: is_gone) == [(None, True)]
    assert host.streams.was_cancelled("f1") is is_gone
