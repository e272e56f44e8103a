"""Block copies on a CPU, and what of CUDA can be seen without one."""

import numpy as np
import pytest
import torch

from kvfetcher.arena import Arena
from kvfetcher.engines.connector import copies
from kvfetcher.engines.connector.copies import BlockCopier
from kvfetcher.engines.connector.pool import HeadRange, PagedPool
from kvfetcher.errors import LayoutError
from kvfetcher.spec import KVSpec

SPEC = KVSpec(num_layers=2, num_kv_heads=4, head_dim=8)


@pytest.fixture
def arena(tmp_path):
    arena = Arena.create(tmp_path / "a", spec=SPEC, tokens_per_block=4, num_bytes=1 << 16)
    arena.blocks[:] = np.random.default_rng(0).integers(0, 1 << 15, arena.blocks.shape)
    yield arena
    arena.close()


def pool_of(heads=HeadRange(2, 4), spec=SPEC, tokens=4):  # noqa: B008  frozen
    flat = heads.count * tokens * spec.head_dim
    tensor = torch.zeros((6, spec.num_layers, 2, flat), dtype=torch.bfloat16)
    return PagedPool(tensor, spec=spec, heads=heads, tokens_per_block=tokens)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("arena_first_head", [0, 2])
def test_a_ranks_own_heads_travel_both_ways(tmp_path, arena, layout, arena_first_head):
    pool = pool_of(heads=HeadRange(arena_first_head, arena_first_head + 2))
    copier = BlockCopier(arena, arena_first_head=0, pool=pool)
    before = arena.blocks.copy()
    copier.load((3, 1), (0, 5), layout=layout).wait()
    heads = slice(arena_first_head, arena_first_head + 2)
    for block, source in ((0, 3), (5, 1)):
        np.testing.assert_array_equal(
            pool.block(block, layout).numpy().view(np.uint16), before[source][:, :, heads]
        )
    copier.save((0, 5), (6, 7), layout=layout).wait()
    np.testing.assert_array_equal(arena.blocks[6][:, :, heads], before[3][:, :, heads])
    rest = [head for head in range(4) if head not in range(4)[heads]]
    np.testing.assert_array_equal(arena.blocks[6][:, :, rest], before[6][:, :, rest])
    copier.close()


@pytest.mark.parametrize(
    ("pool", "first"),
    [
        (pool_of(tokens=8), 0),
        (pool_of(), 3),
        (pool_of(heads=HeadRange(4, 6)), 0),
        (pool_of(spec=KVSpec(3, 4, 8)), 0),
    ],
)
def test_arena_that_does_not_hold_the_pools_heads_is_refused(arena, pool, first):
    with pytest.raises(LayoutError, match="does not hold what the pool needs"):
        BlockCopier(arena, arena_first_head=first, pool=pool)


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
    copier = BlockCopier(arena, arena_first_head=0, pool=pool_of())
    runtime = Runtime(status=1)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)

    def fail(*_, **__):
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(torch, "zeros", fail)
    copier._pinned = 4096
    copier.close()
    copier.close()
    assert runtime.calls == [("unregister", 4096)]
