"""A supervised server whose decoders, arena and engine are on a GPU, for tests of its faults.

With ``KVFETCHER_TEST_FAULTS_ON_CPU=1`` it has the CPU decoder and an arena in host memory, and GPU
memory is not looked at: for work on such tests without a GPU.
"""

import asyncio
import contextlib
import gc
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kvfetcher import wire
from kvfetcher.format.container import parse_header
from kvfetcher.launcher import Supervisor
from kvfetcher.memory.cuda import cuda_context
from kvfetcher.memory.plane_ring import NUM_TICKETS
from kvfetcher.storage import open_backend
from server.conftest import start_server
from server.test_supervision import shared_memory, watch
from support.engine_rig import write_model

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


def server_sections(model, **server):
    """The server's settings; the GPU is in these alone."""
    return {
        "server": {"decode_instances": NUM_DECODERS, "probe_seconds": 0, **server},
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


class Site:
    """A supervised server in whose store the prefix of each of `QUESTIONS` lies.

    Attributes:
        tokens: question -> the answer's, computed.
        first_chunk: file of the first chunk of the first question.
    """

    def __init__(self, running, supervisor):
        self.running, self.supervisor = running, supervisor
        self.tokens = {}
        self._stored = set()
        self.first_chunk, *_ = [self.store(question) for question in QUESTIONS]

    def store(self, question):
        """Ask a question for the first time; the file of its prefix's first chunk."""
        first = self._generate(question)
        assert first.report.raw["outcome"] == "miss"
        self.tokens[question] = first.output_ids
        before, self._stored = self._stored, set(self.running.settle())
        (found,) = filter(is_first, self._stored - before)
        return found

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


@contextlib.contextmanager
def open_site(make_folder, /, **server):
    """A `Site`, in folders of `make_folder` (a name -> a folder), with settings of [server]."""
    model = write_model(
        make_folder("tiny"),
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
    )
    gc.collect()  # what earlier tests hold on the GPU must not go during these
    with start_server(make_folder("store"), **server_sections(model, **server)) as running:
        supervisor = Supervisor(running.server)
        yield Site(running, supervisor)
        supervisor.close()
