"""Block copies on a CPU, and what of CUDA can be seen without one."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvfetcher.engines.connector import copies
from kvfetcher.engines.connector.copies import BlockCopier
from kvfetcher.engines.connector.pool import PagedPool
from kvfetcher.errors import LayoutError
from kvfetcher.memory.arena import Arena, plan_arena
from kvfetcher.spec import HeadRange, KVSpec

SPEC = KVSpec(num_layers=2, num_kv_heads=4, head_dim=8)


@pytest.fixture
def arena(tmp_path):
    """Of the heads that `pool_of` gives the pool."""
    plan = plan_arena(SPEC, tokens_per_block=4, num_bytes=1 << 16)
    arena = Arena.create_from(replace(plan, heads=HeadRange(2, 4)), tmp_path / "a")
    arena.blocks[:] = np.random.default_rng(0).integers(0, 1 << 15, arena.blocks.shape)
    yield arena
    arena.close()


def pool_of(heads=HeadRange(2, 4), spec=SPEC, tokens=4):  # noqa: B008  frozen
    flat = heads.count * tokens * spec.head_dim
    tensor = torch.zeros((6, spec.num_layers, 2, flat), dtype=torch.bfloat16)
    return PagedPool(tensor, spec=spec, heads=heads, tokens_per_block=tokens)


def block_of(pool, block, layout):
    """[L, K, H, T, D] of a pool of one part."""
    return pool.view(pool.parts[0], block, 1, layout)[0]


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_ranks_blocks_travel_both_ways(arena, layout):
    pool = pool_of()
    copier = BlockCopier(arena, pool)
    before = arena.blocks.copy()
    copier.load((3, 1), ((0, 5),), layout=layout).wait()
    for block, source in ((0, 3), (5, 1)):
        np.testing.assert_array_equal(
            block_of(pool, block, layout).numpy().view(np.uint16), before[source]
        )
    assert not block_of(pool, 1, layout).any()
    copier.save(((0, 5),), (6, 7), layout=layout).wait()
    np.testing.assert_array_equal(arena.blocks[[6, 7]], before[[3, 1]])
    np.testing.assert_array_equal(arena.blocks[:6], before[:6])
    copier.close()


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_any_blocks_travel_to_any_others(arena, layout):
    """Neighbours go together; whatever the order, each block goes where it was sent."""
    pool = pool_of()
    copier = BlockCopier(arena, pool)
    before = arena.blocks.copy()
    copier.load((3, 4, 5, 1, 0, 2), ((0, 1, 2, 3, 5, 4),), layout=layout).wait()
    for block, source in enumerate((3, 4, 5, 1, 2, 0)):
        np.testing.assert_array_equal(
            block_of(pool, block, layout).numpy().view(np.uint16), before[source]
        )
    copier.save(((4, 5, 0, 2),), (6, 7, 9, 8), layout=layout).wait()
    np.testing.assert_array_equal(arena.blocks[[6, 7, 9, 8]], before[[2, 0, 3, 5]])
    np.testing.assert_array_equal(arena.blocks[:6], before[:6])
    copier.close()


@pytest.mark.parametrize(
    ("sources", "targets", "joined"),
    [
        ((), (), []),
        ((7,), (2,), [(7, 2, 1)]),
        ((1, 2, 3), (5, 6, 7), [(1, 5, 3)]),
        ((1, 2, 3, 4, 5), (5, 6, 7, 8, 9), [(1, 5, 4), (5, 9, 1)]),
        ((1, 2, 4, 5), (5, 6, 7, 8), [(1, 5, 2), (4, 7, 2)]),
        ((1, 2, 3), (5, 6, 8), [(1, 5, 2), (3, 8, 1)]),
        ((3, 2, 1), (5, 6, 7), [(3, 5, 1), (2, 6, 1), (1, 7, 1)]),
    ],
)
def test_neighbours_are_joined(sources, targets, joined):
    assert list(copies.runs(sources, targets, longest=4)) == joined


def test_long_load_is_cut_for_the_gpus_memory(arena, monkeypatch):
    whole = BlockCopier(arena, pool_of())
    assert whole._max_run == copies._MAX_RUN_BYTES // arena.blocks[0].nbytes
    monkeypatch.setattr(copies, "_MAX_RUN_BYTES", 1)
    assert BlockCopier(arena, pool_of())._max_run == 1


def test_pool_made_in_inference_mode_is_filled_by_other_threads(arena):
    """The mode is each thread's own; an engine's pool is often made in it."""
    with torch.inference_mode():
        pool = pool_of()
    copier = BlockCopier(arena, pool)
    faults = []

    def run():
        try:
            copier.load((3,), ((0,),), layout="NHD").wait()
            copier.save(((0,),), (6,), layout="NHD").wait()
        except RuntimeError as exc:
            faults.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert not faults
    np.testing.assert_array_equal(arena.blocks[6], arena.blocks[3])
    copier.close()


@pytest.mark.parametrize(
    ("pool", "needs"),
    [
        (pool_of(tokens=8), "blocks of 8 tokens"),
        (pool_of(heads=HeadRange(0, 2)), "start=0, stop=2"),
        (pool_of(heads=HeadRange(2, 3)), "start=2, stop=3"),
        (pool_of(spec=KVSpec(3, 4, 8)), "num_layers=3"),
    ],
)
def test_arena_that_does_not_hold_the_pools_heads_is_refused(arena, pool, needs):
    with pytest.raises(LayoutError, match=f"start=2, stop=4.*the pool needs .*{needs}"):
        BlockCopier(arena, pool)


class Runtime:
    def __init__(self, status):
        self.status = status
        self.calls = []

    def cudaHostRegister(self, address, size, flags):
        self.calls.append(("register", address, size))
        return self.status

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address))
        return self.status


def test_memory_that_cannot_be_locked_is_copied_slower(monkeypatch, caplog):
    runtime = Runtime(status=1)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    blocks = torch.zeros(8, dtype=torch.int16)
    assert copies._page_lock(blocks, torch.device("cpu")) is None
    assert "could not be page-locked (CUDA error 1)" in caplog.text
    assert runtime.calls == [("register", blocks.data_ptr(), 16)]


def test_lock_is_undone_and_a_failure_of_that_forgotten(monkeypatch, arena):
    copier = BlockCopier(arena, pool_of())
    runtime = Runtime(status=1)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)

    def fail(*_, **__):
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(torch, "zeros", fail)
    copier._pinned = 4096
    copier.close()
    copier.close()
    assert runtime.calls == [("unregister", 4096)]
