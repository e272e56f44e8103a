"""Two ranks in processes of their own: the connector over real process boundaries."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvfetcher.arena import Arena
from kvfetcher.engines.connector.hub import ConnectorHub, HubSettings, RankArena
from kvfetcher.leases import LeaseTable, tokens_digest
from support.engine_rig import some_ids
from support.trtllm_contract.engine import BLOCK, CHUNK

TESTS = Path(__file__).parents[2]
PROMPTS = [tuple(some_ids(length, seed=length)) for length in (40, 64, 65, 97)]


class Engine:
    """Two rank processes and the owner of their arena."""

    def __init__(self, loaded, folder, *, layout="HND", async_load_tokens=0):
        self.stack = contextlib.ExitStack()
        self.arena = Arena.create(
            folder / "arena", spec=loaded.spec, tokens_per_block=BLOCK, num_bytes=1 << 18
        )
        self.stack.callback(self.arena.close)
        self.leases = LeaseTable(num_blocks=self.arena.num_blocks, tokens_per_block=BLOCK)
        place = RankArena(str(self.arena.path), self.arena.generation, 0)
        self.hub = ConnectorHub(
            folder / "c.sock",
            arenas=[place, place],
            arena=self.arena,
            leases=self.leases,
            settings=HubSettings(
                spec=loaded.spec,
                tokens_per_block=BLOCK,
                chunk_tokens=CHUNK,
                layout=layout,
                async_load_tokens=async_load_tokens,
                save_timeout_seconds=10.0,
                save_generated=True,
                lease_ttl_seconds=60.0,
            ),
            clock=time.monotonic,
        )
        self.stack.callback(self.hub.close)
        self.ranks = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "support.trtllm_contract.rank_process",
                    json.dumps(
                        {
                            "model": str(loaded.folder),
                            "meeting": str(folder / "meeting"),
                            "rank": rank,
                            "num_ranks": 2,
                            "socket": str(self.hub.path),
                            "layout": layout,
                        }
                    ),
                ],
                stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": str(TESTS)},
            )
            for rank in range(2)
        ]
        self.stack.callback(self.stop)
        self.hub.wait_ready(90)
        self.handles = {}

    def stop(self):
        self.hub.expect_end()
        with contextlib.suppress(OSError):
            self.ranks[0].stdin.close()
        for rank in self.ranks:
            try:
                rank.wait(timeout=20)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
        self.ranks[0].stdout.close()

    def step(self, submit=(), cancel=()):
        self.ranks[0].stdin.write(json.dumps({"submit": submit, "cancel": cancel}) + "\n")
        self.ranks[0].stdin.flush()
        return json.loads(self.ranks[0].stdout.readline())

    def announce(self, request_id, prompt, lease=None):
        handle = self.hub.announce(prompt, cache_salt="", lease=lease, save=True)
        assert handle.is_announced.result(timeout=10)
        self.handles[request_id] = handle
        return [request_id, prompt, 6]

    def lease(self, prompt, values):
        number = len(prompt) // CHUNK * CHUNK
        lease = self.leases.lease(number, 60.0, now=time.monotonic())
        target = self.arena.target(lease.block_ids, number)
        self.arena.write(target, 0, np.ascontiguousarray(values[:, :, :, :number]))
        now = time.monotonic()
        self.leases.seal(lease.id, number, tokens_digest(prompt[:number]), now=now)
        return self.leases.claim(lease.id, now=now)

    def drain(self):
        until = time.monotonic() + 60
        state = self.step()
        while not state["idle"]:
            assert time.monotonic() < until
            state = self.step()
        tickets = {}
        for request_id, handle in self.handles.items():
            self.hub.settle(handle, save=True)
            tickets[request_id] = handle.ticket.result(timeout=10)
        self.handles.clear()
        return state, tickets

    def is_at_rest(self):
        until = time.monotonic() + 10
        while self.leases.usage()["free"] < self.arena.num_blocks or self.hub.num_open:
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        return True


@pytest.mark.parametrize(("layout", "async_load_tokens"), [("HND", 0), ("NHD", 1)])
def test_saves_loads_and_cancels(loaded, tmp_path, layout, async_load_tokens):
    engine = Engine(loaded, tmp_path, layout=layout, async_load_tokens=async_load_tokens)
    with engine.stack:
        # First everything is computed and saved ...
        engine.step(submit=[engine.announce(i, p) for i, p in enumerate(PROMPTS)])
        state, tickets = engine.drain()
        tokens = {prompt: state["tokens"][str(i)] for i, prompt in enumerate(PROMPTS)}
        values = {}
        for i, prompt in enumerate(PROMPTS):
            values[prompt] = np.concatenate(
                [engine.arena.read(target) for target in tickets[i].targets], axis=3
            )
            engine.leases.release(tickets[i].lease_id, now=time.monotonic())
        assert engine.is_at_rest()
        # ... then loaded, at random times, and some of it cancelled.
        dice = random.Random(5)
        asked = {}
        for request_id in range(100, 130):
            prompt = asked[request_id] = dice.choice(PROMPTS)
            submit = engine.announce(request_id, prompt, engine.lease(prompt, values[prompt]))
            cancel = [dice.randint(100, request_id)] if dice.random() < 0.3 else []
            state = engine.step(submit=[submit], cancel=cancel)
            for _ in range(dice.randint(0, 4)):
                state = engine.step()
        state, tickets = engine.drain()
        for ticket in filter(None, tickets.values()):
            engine.leases.release(ticket.lease_id, now=time.monotonic())
        ended = [i for i in range(100, 130) if state["ends"][str(i)] == "length"]
        assert len(ended) > 10
        for request_id in ended:
            assert state["tokens"][str(request_id)] == tokens[asked[request_id]]
        assert engine.is_at_rest()
        assert engine.hub.counters.loaded_tokens > 30 * 32


def test_rank_that_dies_gives_every_lease_back(loaded, tmp_path):
    engine = Engine(loaded, tmp_path)
    with engine.stack:
        prompt = PROMPTS[1]
        spec = loaded.spec
        values = np.zeros(
            (spec.num_layers, 2, spec.num_kv_heads, len(prompt), spec.head_dim), np.uint16
        )
        handle = engine.hub.announce(
            prompt, cache_salt="", lease=engine.lease(prompt, values), save=True
        )
        assert handle.is_announced.result(timeout=10)
        engine.ranks[1].kill()
        assert handle.ticket.result(timeout=10) is None
        assert engine.is_at_rest()
        assert "rank 1 of the engine is gone" in engine.hub.dead
        late = engine.hub.announce(prompt, cache_salt="", lease=None, save=True)
        assert late.is_announced.result(timeout=1) is False
        engine.ranks[0].kill()
