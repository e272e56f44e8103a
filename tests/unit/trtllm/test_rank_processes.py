"""Ranks in processes of their own: the connector over real process boundaries."""

import contextlib
import multiprocessing
import random
import time

import numpy as np
import pytest

from kvfetcher.engines.connector.server import ConnectorHub, HubSettings
from kvfetcher.engines.hf.loader import load_model
from kvfetcher.memory.leases import LeaseTable, tokens_digest
from support.engine_rig import some_ids, write_model
from support.trtllm_contract.engine import BLOCK, CHUNK, Reference, arena_of
from support.trtllm_contract.rank_process import start_rank

PROMPTS = [tuple(some_ids(length, seed=length)) for length in (40, 64, 65, 97)]


class Engine:
    """Rank processes and the owner of their arenas."""

    def __init__(self, loaded, folder, *, num_ranks=2, layout="HND", async_load_tokens=0):
        self.stack = contextlib.ExitStack()
        self.arena = arena_of(loaded.spec, folder, num_ranks=num_ranks, num_blocks=120)
        self.stack.callback(self.arena.close)
        self.leases = LeaseTable(num_blocks=self.arena.num_blocks, tokens_per_block=BLOCK)
        self.hub = ConnectorHub(
            folder / "c.sock",
            num_ranks=num_ranks,
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
        self.commands, pipe = multiprocessing.Pipe()
        self.ranks = [
            start_rank(
                {
                    "model": str(loaded.folder),
                    "meeting": str(folder / "meeting"),
                    "rank": rank,
                    "num_ranks": num_ranks,
                    "socket": str(self.hub.path),
                    "layout": layout,
                },
                pipe if rank == 0 else None,
            )
            for rank in range(num_ranks)
        ]
        pipe.close()
        self.stack.callback(self.stop)
        self.hub.wait_ready(90)
        self.handles = {}

    def stop(self):
        self.hub.expect_end()
        self.commands.close()
        for rank in self.ranks:
            rank.join(20)
            rank.kill()
            rank.join()
            rank.close()

    def step(self, submit=(), cancel=()):
        self.commands.send({"submit": submit, "cancel": cancel})
        return self.commands.recv()

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


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory):
    folder = write_model(
        tmp_path_factory.mktemp("four"),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return load_model(folder, device="cpu", kv_dtype="bfloat16")


def test_saves_loads_and_cancels(four_heads, tmp_path):
    """Four ranks; fewer are in test_contract.py, in threads."""
    num_ranks = 4
    engine = Engine(four_heads, tmp_path, num_ranks=num_ranks, layout="NHD", async_load_tokens=1)
    reference = Reference(four_heads, num_ranks=num_ranks)
    with engine.stack:
        assert len(engine.arena.parts) == num_ranks
        # First everything is computed and saved ...
        engine.step(submit=[engine.announce(i, p) for i, p in enumerate(PROMPTS)])
        state, tickets = engine.drain()
        tokens = {prompt: state["tokens"][i] for i, prompt in enumerate(PROMPTS)}
        values = {}
        for i, prompt in enumerate(PROMPTS):
            values[prompt] = np.concatenate(
                [engine.arena.read(target) for target in tickets[i].targets], axis=3
            )
            engine.leases.release(tickets[i].lease_id, now=time.monotonic())
            computed, kv = reference(prompt)
            assert tuple(tokens[prompt]) == computed[:6]
            saved = values[prompt].shape[3]
            np.testing.assert_array_equal(values[prompt], kv[:, :, :, :saved])
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
        ended = [i for i in range(100, 130) if state["ends"][i] == "length"]
        assert len(ended) > 10
        for request_id in ended:
            assert state["tokens"][request_id] == tokens[asked[request_id]]
        assert engine.is_at_rest()
        assert engine.hub.counters.loaded_tokens > 30 * 32


def test_ranks_that_died_give_every_lease_back(loaded, tmp_path):
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
        assert engine.ranks[0].is_alive()
        time.sleep(0.5)  # rank 0 lives, and was told of the lease
        assert engine.leases.usage()["claimed"] > 0
        engine.ranks[0].kill()
        assert engine.is_at_rest()
        assert "rank 1 of the engine is gone" in engine.hub.dead
        late = engine.hub.announce(prompt, cache_salt="", lease=None, save=True)
        assert late.is_announced.result(timeout=1) is False
