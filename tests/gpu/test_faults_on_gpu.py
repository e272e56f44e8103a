"""Faults of a server whose decoders, arena and engine are on a GPU: answers stay right, nothing leaks.

After each fault the GPU's memory, as the driver counts it over all processes, is what it was before.

With ``KVFETCHER_TEST_FAULTS_ON_CPU=1`` the same faults meet a server with the CPU decoder and an arena
in host memory, and GPU memory is not looked at (for work on them without a GPU:
``KVFETCHER_REQUIRE_GPU=1 KVFETCHER_TEST_FAULTS_ON_CPU=1 pytest tests/gpu/test_faults_on_gpu.py``).
"""

import asyncio
import gc
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvfetcher import wire
from kvfetcher.arena import read_arena_header
from kvfetcher.codec.unit import BITSTREAM, PACKET_LENGTHS, parse_unit, video_sections, write_unit
from kvfetcher.container import UnitData, build_chunk, parse_header
from kvfetcher.control import ControlClient, socket_path
from kvfetcher.cuda import cuda_context
from kvfetcher.errors import KVFetcherError
from kvfetcher.plane_ring import NUM_TICKETS
from kvfetcher.server import Supervisor, supervise
from kvfetcher.storage import open_backend
from server.conftest import start_server
from server.test_supervision import heal, shared_memory, watch
from support.engine_rig import write_model

pytestmark = [pytest.mark.gpu, pytest.mark.triton, pytest.mark.slow]

ON_CPU = os.environ.get("KVFETCHER_TEST_FAULTS_ON_CPU") == "1"
DECODER = "cpu" if ON_CPU else "nvdec"
SHARED_MEMORY = Path("/dev/shm")
CHUNK = 256
NUM_DECODERS = 2
# Two chunks and a bit each, a byte a token.
QUESTIONS = tuple(
    f"Question {i}. {'Why is the sky blue, and not green? ' * 20}"[: 2 * CHUNK + 40]
    for i in range(6)
)
# Of a fetch; a request computes what has not come by then.
DEADLINE_SECONDS = 3.0
HEAL_SECONDS = 30.0
# Less than a decoder's memory for planes (112 MiB), the arena (256 MiB), or a context.
SLACK_BYTES = 64 << 20
# As test_supervision: less than what one instance's shared memory grows by.
SHARED_SLACK_BYTES = 8 << 20


def server_sections(model):
    """The server's settings; the GPU is in these alone."""
    return {
        "server": {"decode_instances": NUM_DECODERS, "probe_seconds": 0},
        "codec": {
            "decoder": DECODER, "chunk_tokens": CHUNK, "profile": "exact", "unit_layers": 2,
        },
        "engine": {
            "model": str(model),
            "device": "cpu" if ON_CPU else "cuda:0",
            "arena": "host" if ON_CPU else "gpu",
            # A hit computes its last tokens in the same slice as without it: the same bits.
            "prefill_slice_tokens": CHUNK,
        },
        # Nothing is predicted faster than so small a model: the tests ask with kv_policy "fetch".
        "fetch": {
            "min_hit_tokens": CHUNK,
            "deadline_seconds": DEADLINE_SECONDS,
            "lease_ttl_seconds": 1.5 * DEADLINE_SECONDS,
        },
    }  # fmt: skip


def used_gpu_bytes():
    """Of all processes; 0 where there is no GPU."""
    if ON_CPU:
        return 0
    free, total = cuda_context(0).memory_info()
    return total - free


def garbled(chunk):
    """A chunk whose first unit holds no video, but is sealed as its writer would have done."""
    header = parse_header(chunk)
    parts = [chunk[entry.offset : entry.stop] for entry in header.units]
    unit = parse_unit(parts[0])
    assert unit.geometry.num_frames
    packets = [b"\0\0\0\1" + bytes(range(256)) * 4 for _ in range(unit.geometry.num_frames)]
    rest = [s for s in unit.sections if s.kind not in (PACKET_LENGTHS, BITSTREAM)]
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


class Site:
    """A supervised server in whose store the prefix of each of `QUESTIONS` lies.

    Attributes:
        tokens: question -> the answer's, computed.
        first_chunk: file of the first chunk of the first question.
    """

    def __init__(self, running, supervisor):
        self.running, self.supervisor = running, supervisor
        self.tokens = {}
        for question in QUESTIONS:
            first = self._generate(question)
            assert first.report.raw["outcome"] == "miss"
            self.tokens[question] = first.output_ids
            stored = running.settle()
            if question == QUESTIONS[0]:
                (self.first_chunk,) = (path for path in stored if is_first(path))

    def _generate(self, question):
        return self.running.client.generate(question, max_tokens=8, min_length=8, kv_policy="fetch")

    def ask(self, question=QUESTIONS[0]):
        answer = self._generate(question)
        assert answer.output_ids == self.tokens[question], "a fault changed the answer"
        return answer

    def ask_all(self):
        """All questions at one time."""
        with ThreadPoolExecutor(len(QUESTIONS)) as pool:
            answers = [pool.submit(self.ask, question) for question in QUESTIONS]
            assert watch(self.supervisor, answers) == []
        return [answer.result() for answer in answers]

    def expect_hit(self, question=QUESTIONS[0]):
        """Everything is fetched, and decoded by what should decode it, before long."""
        deadline = time.monotonic() + HEAL_SECONDS
        while not is_hit(answer := self.ask(question)):
            assert time.monotonic() < deadline, f"no hit any more: {answer.report.raw}"
            self.running.settle()
            time.sleep(0.1)

    def stubs(self, model):
        return {stub.process_id for stub in self.running.server.stubs() if stub.model == model}

    def plane_tables(self):
        """Process id -> tickets that are out, of each decoder's memory for planes."""
        prefix = f"kvfetcher-{self.running.server.run_dir.name}-planes-"
        return {
            int(path.name.removeprefix(prefix)): int(
                np.count_nonzero(np.fromfile(path, np.uint64, NUM_TICKETS))
            )
            for path in SHARED_MEMORY.glob(f"{prefix}*")
        }

    def used(self):
        """(bytes of the GPU, files in /dev/shm, their bytes), every process having worked."""
        deadline = time.monotonic() + HEAL_SECONDS
        while not (
            all(map(is_hit, answers := self.ask_all()))
            and (ON_CPU or self.stubs(wire.KV_DECODE) <= self.plane_tables().keys())
        ):
            assert time.monotonic() < deadline, [answer.report.raw for answer in answers]
            self.running.settle()
        self.running.settle()
        return used_gpu_bytes(), *shared_memory(self.running)

    def expect_nothing_left(self, before):
        """What is used is what was used `before`; no ticket and no lease is out."""
        deadline = time.monotonic() + HEAL_SECONDS
        while True:
            self.used()  # kv_restore lets go of a dead decoder's planes when it restores the next unit
            assert self.supervisor.look() is None
            self.running.settle()
            gpu, files, file_bytes = used_gpu_bytes(), *shared_memory(self.running)
            tables = self.plane_tables()
            if (
                gpu <= before[0] + SLACK_BYTES
                and files <= before[1]
                and file_bytes <= before[2] + SHARED_SLACK_BYTES
                and not any(tables.values())
                and (ON_CPU or tables.keys() == self.stubs(wire.KV_DECODE))
            ):
                return
            assert time.monotonic() < deadline, f"{before} -> {(gpu, files, file_bytes)}, {tables}"
            time.sleep(0.2)

    def num_set_aside(self):
        async def count():
            store = open_backend(self.running.config.store)
            found = [aside async for aside in store.list_quarantined()]
            await store.close()
            return len(found)

        return asyncio.run(count())


def is_first(path):
    return parse_header(path.read_bytes()).first_position == 0


def is_hit(answer):
    raw = answer.report.raw
    return raw["outcome"] == "hit" and set(raw["decoders"]) == {DECODER}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    model = write_model(
        tmp_path_factory.mktemp("tiny"),
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
    )
    gc.collect()  # what earlier tests hold on the GPU must not go during these
    with start_server(tmp_path_factory.mktemp("store"), **server_sections(model)) as running:
        supervisor = Supervisor(running.server)
        yield Site(running, supervisor)
        supervisor.close()


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
    good = site.first_chunk.read_bytes()
    log = site.running.server.log_path
    logged = log.stat().st_size
    site.first_chunk.write_bytes(garbled(good))
    for _ in range(2 * NUM_DECODERS):  # so that it may meet every decoder
        report = site.ask().report
        assert (report.hit_tokens, report.reason) == (0, "decode_error")
    site.first_chunk.write_bytes(good)
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
