"""Processes that die under load, and other faults: every request answers, and nothing is left."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from kvfetcher import wire
from kvfetcher.errors import KVFetcherError
from kvfetcher.launcher import Supervisor, probe, supervise
from kvfetcher.memory.control import ControlClient, socket_path
from kvfetcher.memory.vitals import mark_suspect

pytestmark = [pytest.mark.triton, pytest.mark.slow]

SHARED_MEMORY = Path("/dev/shm")
# All faults of one test together, over which no request may take longer.
ANSWER_SECONDS = 60


def kill(running, model):
    victims = [stub.process_id for stub in running.server.stubs() if stub.model == model]
    assert victims
    for victim in victims:
        os.kill(victim, signal.SIGKILL)


def shared_memory(running):
    """(files, bytes) of the server in /dev/shm, and bytes it maps of files that were removed."""
    run = f"kvfetcher-{running.server.run_dir.name}-"
    files = list(SHARED_MEMORY.glob(f"{run}*"))
    return len(files), sum(path.stat().st_blocks * 512 for path in files)


def watch(supervisor, answers, *, seconds=ANSWER_SECONDS):
    """Supervise until all answers are there. Returns the repairs."""
    repairs, deadline = [], time.monotonic() + seconds
    while not all(answer.done() for answer in answers):
        assert time.monotonic() < deadline, f"a request hangs: {repairs}"
        if (repair := supervisor.look()) is not None:
            repairs.append(repair)
        time.sleep(0.05)
    return repairs


def heal(supervisor, *, seconds=ANSWER_SECONDS):
    """The next repair."""
    deadline = time.monotonic() + seconds
    while (repair := supervisor.look()) is None:
        assert time.monotonic() < deadline, "nothing was repaired"
        time.sleep(0.05)
    return repair


@pytest.fixture(scope="module")
def watched(running):
    supervisor = Supervisor(running.server)
    yield running, supervisor
    supervisor.close()


@pytest.fixture(autouse=True)
def _repairs_of_other_tests_do_not_count(watched):
    watched[1]._history.clear()


@pytest.mark.parametrize("model", [wire.KV_DECODE, wire.KV_RESTORE])
def test_a_codec_process_killed_under_load_costs_hits_not_answers(
    watched, prompt, model, monkeypatch
):
    running, supervisor = watched
    question = prompt(150)
    first = running.client.generate(question, max_tokens=4)
    running.settle()
    before = shared_memory(running)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(running.client.generate, question, max_tokens=4) for _ in range(12)]
        while not any(answer.done() for answer in answers):
            time.sleep(0.01)
        kill(running, model)
        repairs = watch(supervisor, answers)
    assert [(r.kind, r.models) for r in repairs or [heal(supervisor)]] == [("reload", (model,))]
    assert {tuple(answer.result().output_ids) for answer in answers} == {tuple(first.output_ids)}
    again = running.generate_hit(question, max_tokens=4)
    assert again.output_ids == first.output_ids
    running.settle()  # every lease came back
    monkeypatch.setattr(supervise, "_RETIRE_SECONDS", 0.0)
    monkeypatch.setattr(supervise, "_RECLAIM_SECONDS", 0.0)
    deadline = time.monotonic() + 15
    while shared_memory(running)[0] > before[0] or supervisor._known.lost:
        assert time.monotonic() < deadline, (before, shared_memory(running))
        assert supervisor.look() is None
        time.sleep(0.2)
    after = shared_memory(running)
    assert after[1] <= before[1] + (8 << 20), "less than what one instance's memory grows by"
    running.generate_hit(question, max_tokens=4)


def test_requests_are_answered_without_decoders(watched, prompt):
    """A lost decoder process is a miss with a reason, not a failed request."""
    running, supervisor = watched
    question = prompt(150)
    first = running.client.generate(question, max_tokens=4)
    running.settle()
    kill(running, wire.KV_DECODE)
    again = running.client.generate(question, max_tokens=4)
    assert again.output_ids == first.output_ids
    assert again.report.hit_tokens == 0
    # Triton's error, or the gate's patience with a fetch that does not move: what ends first.
    assert again.report.reason in ("decoder_unavailable", "fell_behind")
    running.settle()  # every lease came back
    assert heal(supervisor).models == (wire.KV_DECODE,)


def test_a_corrupt_unit_is_refused_and_costs_no_process(watched):
    running, supervisor = watched
    before = {stub.process_id for stub in running.server.stubs()}
    good = probe.probe_unit()

    def run(unit):
        tensor = grpcclient.InferInput(wire.UNIT, [1, len(unit)], "UINT8")
        tensor.set_data_from_numpy(np.frombuffer(unit, np.uint8)[None])
        return running.triton.infer(wire.KV_PIPELINE, [tensor]).as_numpy(wire.KV_VALUES)

    for at in range(0, len(good), 97):
        bad = bytearray(good)
        bad[at] ^= 0x55
        with pytest.raises(InferenceServerException, match="unit"):
            run(bytes(bad))
    assert run(good).size == 6144
    assert supervisor.look() is None
    assert {stub.process_id for stub in running.server.stubs()} == before


def test_the_probe_tells_a_pipeline_that_works_from_one_that_does_not(watched):
    running, supervisor = watched
    host, _, port = running.server.http_url.rpartition(":")
    assert probe.probe_pipeline(host, int(port), timeout_seconds=20) == ""
    kill(running, wire.KV_RESTORE)
    assert "not healthy" in probe.probe_pipeline(host, int(port), timeout_seconds=20)
    assert heal(supervisor).models == (wire.KV_RESTORE,)
    assert probe.probe_pipeline(host, int(port), timeout_seconds=20) == ""


def test_a_decoder_that_hangs_is_found_by_the_probe_and_replaced(watched, prompt, monkeypatch):
    running, supervisor = watched
    question = prompt(150)
    first = running.client.generate(question, max_tokens=4)
    running.settle()
    before = shared_memory(running)
    hung = [stub.process_id for stub in running.server.stubs() if stub.model == wire.KV_DECODE]
    monkeypatch.setattr(supervise, "_PROBE_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(supervise, "_STOPPED_SECONDS", float("inf"))  # as if it hung by itself
    monkeypatch.setattr(supervise, "_RETIRE_SECONDS", 0.0)
    monkeypatch.setattr(supervise, "_RECLAIM_SECONDS", 0.0)
    supervisor._prober = supervise._Prober(running.server, every_seconds=0.1)
    try:
        for process in hung:
            os.kill(process, signal.SIGSTOP)
        repair = heal(supervisor)
    finally:
        supervisor.close()
    assert repair.models == (wire.KV_DECODE, wire.KV_RESTORE)
    assert "kv_pipeline fails" in repair.reason
    again = running.generate_hit(question, max_tokens=4)
    assert again.output_ids == first.output_ids
    deadline = time.monotonic() + 15
    while shared_memory(running)[0] > before[0] or set(hung) & {
        stub.process_id for stub in running.server.stubs()
    }:
        assert time.monotonic() < deadline, (before, shared_memory(running))
        supervisor.look()
        time.sleep(0.2)


def test_a_stopped_process_is_killed_and_replaced_within_seconds(watched, prompt):
    """It may not go on: Triton would take its late reply for another request's."""
    running, supervisor = watched
    question = prompt(150)
    first = running.client.generate(question, max_tokens=4)
    running.settle()
    stopped = [
        stub.process_id for stub in running.server.stubs() if stub.model == wire.PREPROCESSING
    ]
    for process in stopped:
        os.kill(process, signal.SIGSTOP)
    started = time.monotonic()
    repair = heal(supervisor)
    assert (repair.kind, repair.models) == ("reload", (wire.PREPROCESSING,))
    assert time.monotonic() - started < 30
    assert not set(stopped) & {stub.process_id for stub in running.server.stubs()}
    again = running.generate_hit(question, max_tokens=4)
    assert again.output_ids == first.output_ids


def test_a_model_that_replied_wrongly_is_replaced(watched, prompt):
    running, supervisor = watched
    before = [stub.process_id for stub in running.server.stubs() if stub.model == wire.KV_SAVE]
    mark_suspect(running.server.run_dir, wire.KV_SAVE)
    repair = heal(supervisor)
    assert (repair.kind, repair.models) == ("reload", (wire.KV_SAVE,))
    assert not set(before) & {stub.process_id for stub in running.server.stubs()}
    assert running.client.generate(prompt(40), max_tokens=2).output_ids


def test_a_full_arena_is_a_miss_with_its_reason(watched, prompt):
    running, supervisor = watched
    question = prompt(150)
    first = running.client.generate(question, max_tokens=4)
    running.settle()
    with ControlClient(socket_path(running.server.run_dir), timeout_seconds=10) as control:
        blocks = control.stats()["blocks"]["total"]
        lease, _ = control.lease(
            blocks * running.config.engine.tokens_per_block, ttl_seconds=ANSWER_SECONDS
        )
        full = running.client.generate(question, max_tokens=4, kv_policy="fetch")
        assert (full.report.raw["outcome"], full.report.raw["reason"]) == ("miss", "arena_full")
        assert full.output_ids == first.output_ids
        control.release(lease)
    running.generate_hit(question, max_tokens=4)
    running.settle()
    assert supervisor.look() is None


def test_a_killed_engine_ends_its_requests_and_the_next_ones_are_answered(watched, prompt):
    running, supervisor = watched
    question = prompt(150)
    first = running.client.generate(question, max_tokens=4)
    running.settle()
    run_dir = running.server.run_dir
    with ThreadPoolExecutor(2) as pool:
        answers = [
            pool.submit(running.client.generate, prompt(60), max_tokens=700) for _ in range(2)
        ]
        time.sleep(1.0)
        assert not any(answer.done() for answer in answers)
        kill(running, wire.TENSORRT_LLM)
        repairs = watch(supervisor, answers)
    assert [repair.kind for repair in repairs] == ["restart"]
    assert all(isinstance(answer.exception(), KVFetcherError) for answer in answers)
    assert not run_dir.exists()
    assert not list(SHARED_MEMORY.glob(f"kvfetcher-{run_dir.name}-*"))
    again = running.generate_hit(question, max_tokens=4)
    assert again.output_ids == first.output_ids
    assert supervisor.look() is None
