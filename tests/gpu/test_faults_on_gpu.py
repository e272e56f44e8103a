"""Faults of a server whose decoders, arena and engine are on a GPU: answers stay right, nothing leaks.

After each fault the GPU's memory, as the driver counts it over all processes, is what it was before.

With ``KVFETCHER_TEST_FAULTS_ON_CPU=1`` the same faults meet a server with the CPU decoder and an arena
in host memory, and GPU memory is not looked at (for work on them without a GPU:
``KVFETCHER_REQUIRE_GPU=1 KVFETCHER_TEST_FAULTS_ON_CPU=1 pytest tests/gpu/test_faults_on_gpu.py``).
"""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from kvfetcher import wire
from kvfetcher.errors import KVFetcherError
from kvfetcher.format.container import UnitData, build_chunk, parse_header
from kvfetcher.format.sections import SectionKind
from kvfetcher.format.unit import parse_unit, video_sections, write_unit
from kvfetcher.launcher import supervise
from kvfetcher.memory.arena import read_arena_header
from kvfetcher.memory.control import ControlClient, socket_path
from server.test_supervision import heal, watch
from support.gpu_site import (
    CHUNK,
    HEAL_SECONDS,
    NUM_DECODERS,
    ON_CPU,
    QUESTIONS,
    SHARED_MEMORY,
    is_hit,
    open_site,
)

pytestmark = [pytest.mark.gpu, pytest.mark.triton, pytest.mark.slow]


def garbled(chunk):
    """A chunk whose first unit holds no video, but is sealed as its writer would have done."""
    header = parse_header(chunk)
    parts = [chunk[entry.offset : entry.stop] for entry in header.units]
    unit = parse_unit(parts[0])
    assert unit.geometry.num_frames
    packets = [b"\0\0\0\1" + bytes(range(256)) * 4 for _ in range(unit.geometry.num_frames)]
    rest = [
        s
        for s in unit.sections
        if s.kind not in (SectionKind.PACKET_LENGTHS, SectionKind.BITSTREAM)
    ]
    parts[0] = write_unit(replace(unit, sections=(*video_sections(packets), *rest)))
    return build_chunk(
        [
            UnitData(entry.layer_start, entry.num_layers, entry.variant, part)
            for entry, part in zip(header.units, parts, strict=True)
        ],
        spec=header.spec,
        profile=header.profile,
        identity=header.identity,
        chunk_key=header.chunk_key,
        parent_key=header.parent_key,
        first_position=header.first_position,
        token_ids=header.token_ids,
    )


def flipped_in_video(chunk):
    """A chunk with a few bytes of its first unit's bitstream changed."""
    entry = parse_header(chunk).units[0]
    video = bytes(parse_unit(chunk[entry.offset : entry.stop]).packets()[0])
    at = chunk.index(video) + len(video) // 2
    changed = bytearray(chunk)
    changed[at : at + 4] = bytes(byte ^ 0x55 for byte in changed[at : at + 4])
    return bytes(changed)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with open_site(tmp_path_factory.mktemp) as opened:
        yield opened


@pytest.fixture
def tidy_at_once(monkeypatch):
    """A function: the supervisor clears away what is left of dead models from now on at once."""

    def start():
        monkeypatch.setattr(supervise, "_RETIRE_SECONDS", 0.0)
        monkeypatch.setattr(supervise, "_RECLAIM_SECONDS", 0.0)

    return start


def test_prefixes_are_decoded_and_kept_where_the_settings_say(site):
    """Else the faults below would meet something else."""
    site.expect_hit()
    run = site.running.server.run_dir.name
    header = read_arena_header(SHARED_MEMORY / f"kvfetcher-{run}-arena")
    assert (header.gpu is None) == ON_CPU


def test_a_decoder_killed_amid_hits_costs_hits_not_answers(site, tidy_at_once):
    before = site.used()
    answers, stop = [], threading.Event()

    def keep_asking(question):
        while not stop.is_set():
            answers.append(site.ask(question))

    def wait_for(number):
        deadline = time.monotonic() + HEAL_SECONDS
        while len(answers) < number and not any(each.done() for each in asking):
            assert time.monotonic() < deadline, "requests hang"
            time.sleep(0.01)

    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        asking = [pool.submit(keep_asking, question) for question in QUESTIONS]
        try:
            wait_for(2 * len(QUESTIONS))
            old = site.stubs(wire.KV_DECODE)
            os.kill(min(old), signal.SIGKILL)
            repair = heal(site.supervisor)
            wait_for(len(answers) + 2 * len(QUESTIONS))
        finally:
            stop.set()
    for each in asking:
        each.result()
    assert (repair.kind, repair.models) == ("reload", (wire.KV_DECODE,))
    assert is_hit(answers[0])
    site.expect_hit()
    tidy_at_once()
    site.expect_nothing_left(before)
    new = site.stubs(wire.KV_DECODE)
    assert len(new) == NUM_DECODERS
    assert not new & old


def test_a_unit_with_flipped_bits_is_set_aside_and_saved_anew(site):
    before, processes = site.used(), site.running.server.stubs()
    bad = flipped_in_video(site.first_chunk.read_bytes())
    site.first_chunk.write_bytes(bad)
    report = site.ask().report
    assert (report.hit_tokens, report.reason) == (0, "corrupt_chunk")
    site.running.settle()  # it was computed, and saved again
    assert site.num_set_aside() == 1
    assert site.first_chunk.read_bytes() != bad
    site.expect_hit()
    site.expect_nothing_left(before)
    assert site.running.server.stubs() == processes


def test_a_video_that_does_not_decode_resets_the_decoder_and_costs_no_process(site):
    before, processes = site.used(), site.running.server.stubs()
    log = site.running.server.log_path
    logged = log.stat().st_size
    for number in range(NUM_DECODERS):  # each twice, so that every decoder may meet one
        question = QUESTIONS[0].replace("Question", f"Undecodable {number}")
        chunk = site.store(question)
        chunk.write_bytes(garbled(chunk.read_bytes()))
        for _ in range(2):
            report = site.ask(question).report
            assert (report.hit_tokens, report.reason) == (0, "decode_error")
        report = site.ask(question).report
        assert report.raw["outcome"] == "miss", "passed over from now on"
    if not ON_CPU:
        told = log.read_bytes()[logged:]
        assert b"a unit is not kept on the GPU" in told
        assert b"a unit is decoded by the CPU" in told
    site.expect_hit()
    site.expect_nothing_left(before)  # all decoders decode, and all on DECODER
    assert site.running.server.stubs() == processes


def test_requests_that_do_not_fit_the_arena_answer(site):
    before = site.used()
    running = site.running
    with ControlClient(socket_path(running.server.run_dir), timeout_seconds=10) as control:
        block = running.config.engine.tokens_per_block
        free = control.stats()["blocks"]["free"]
        held, _ = control.lease((free * block) - 2 * CHUNK, ttl_seconds=120)
        answers = site.ask_all()  # room for one
        waits = [answer.report.stages_ms.get("arena_wait", 0.0) for answer in answers]
        assert max(waits) > 1.0, "the arena was not full"
        assert any(map(is_hit, answers))
        rest, _ = control.lease(2 * CHUNK, ttl_seconds=120)
        report = site.ask().report
        assert (report.hit_tokens, report.reason) == (0, "arena_full")
        control.release(held)
        control.release(rest)
    site.expect_hit()
    site.expect_nothing_left(before)


def test_a_killed_engine_gives_its_arena_back_and_the_next_requests_hit(site):
    before = site.used()
    client, run_dir = site.running.client, site.running.server.run_dir
    with ThreadPoolExecutor(2) as pool:
        answers = [
            pool.submit(client.generate, question, max_tokens=1000, min_length=1000)
            for question in QUESTIONS[:2]
        ]
        time.sleep(0.5)
        assert not any(answer.done() for answer in answers)
        (engine,) = site.stubs(wire.TENSORRT_LLM)
        os.kill(engine, signal.SIGKILL)
        repairs = watch(site.supervisor, answers)
    assert [repair.kind for repair in repairs] == ["restart"]
    assert all(isinstance(answer.exception(), KVFetcherError) for answer in answers)
    assert not run_dir.exists()
    assert not list(SHARED_MEMORY.glob(f"kvfetcher-{run_dir.name}-*"))
    site.expect_hit()
    site.expect_nothing_left(before)
