"""The arena on a GPU, with host memory in the GPU's place: layout, ownership, refusals.

CUDA itself, and sharing between processes, are in tests/gpu and in bench_gpu.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvfetcher.config import EngineConfig
from kvfetcher.engines.host import open_arena
from kvfetcher.errors import ArenaError, ConfigError, LayoutError
from kvfetcher.memory import gpu_arena
from kvfetcher.memory.arena import Arena, read_arena_header
from kvfetcher.memory.gpu_arena import GpuArena
from kvfetcher.memory.split_arena import attach_arena, attach_part, create_arena
from kvfetcher.spec import HeadRange, KVSpec
from support.host_as_gpu import gpus_in_host_memory

SPEC = KVSpec(num_layers=4, num_kv_heads=2, head_dim=8)


@pytest.fixture
def gpu(monkeypatch):
    return gpus_in_host_memory(monkeypatch)[0]


@pytest.fixture
def arena(gpu, tmp_path):
    made = GpuArena.create_on(
        0, tmp_path / "arena", spec=SPEC, tokens_per_block=4, num_bytes=40_960
    )
    yield made
    made.close()


def values(num_tokens, num_layers=4, dtype=np.uint16):
    rng = np.random.default_rng(num_tokens)
    return rng.integers(0, 1 << 16, (num_layers, 2, 2, num_tokens, 8), dtype=dtype)


def test_what_is_written_is_read_as_numpy_and_as_a_tensor(arena):
    target = arena.target((5, 0, 9), 11)
    arena.write(target, 0, values(11))
    assert np.array_equal(arena.read(target), values(11))
    assert np.array_equal(arena.read(target, 1, 2), values(11)[1:3])
    loaded = arena.load(target)
    assert np.array_equal(loaded.numpy().view(np.uint16), values(11))
    other = arena.target((1, 2, 3), 11)
    arena.write(other, 0, loaded)
    assert np.array_equal(arena.read(other), values(11))


def test_layout_is_that_of_an_arena_in_host_memory(arena, tmp_path):
    host = Arena.create(tmp_path / "host", spec=SPEC, tokens_per_block=4, num_bytes=1 << 16)
    arena.blocks.fill_(0)
    for one in (host, arena):
        one.write(one.target((3, 1), 7), 2, values(7, num_layers=2))
    assert np.array_equal(arena.blocks.numpy().view(np.uint16)[:4], host.blocks[:4])
    host.close()


def test_attach_says_where_it_lies_and_maps_the_same_memory(arena, gpu):
    assert arena.gpu == 0
    header = read_arena_header(arena.path)
    assert header.gpu.index == 0
    other = attach_part(arena.path, generation=arena.generation)
    target = arena.target((2,), 4)
    arena.write(target, 0, values(4))
    assert np.array_equal(other.read(target), values(4))
    assert gpu.opened == 0  # the owner's own process: CUDA opens no handle there
    other.close()
    assert gpu.memory


def test_other_process_opens_the_handle_and_lets_go(arena, gpu, monkeypatch):
    header = replace(arena.header, gpu=replace(arena.header.gpu, owner=1))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(gpu_arena, "_own_memory", {})
        other = GpuArena.open(arena.path, header)
        assert gpu.opened == 1
        other.close()
        other.close()
        assert gpu.opened == 0


def test_dead_owner_is_an_arena_error(arena, gpu):
    header = replace(arena.header, gpu=replace(arena.header.gpu, handle="ab" * 64, owner=1))
    with pytest.raises(ArenaError, match="is the engine running"):
        GpuArena.open(arena.path, header)


def test_owner_frees_memory_and_lock(gpu, tmp_path):
    made = GpuArena.create_on(0, tmp_path / "a", spec=SPEC, tokens_per_block=4, num_bytes=40_960)
    made.close()
    made.close()
    assert not gpu.memory
    assert Arena.sweep(tmp_path, "a") == 1


def test_full_gpu_says_how_much_is_free(gpu, tmp_path):
    gpu.is_full = True
    with pytest.raises(ArenaError, match=r"5 of 10 free.*lower engine\.arena_bytes"):
        GpuArena.create_on(0, tmp_path / "a", spec=SPEC, tokens_per_block=4, num_bytes=40_960)
    assert not (tmp_path / "a").exists()


def test_no_file_frees_the_memory(gpu, tmp_path):
    with pytest.raises(ArenaError, match="cannot be created"):
        GpuArena.create_on(
            0, tmp_path / "no" / "a", spec=SPEC, tokens_per_block=4, num_bytes=40_960
        )
    assert not gpu.memory


def test_other_types_are_refused(arena):
    with pytest.raises(LayoutError, match="got int64"):
        arena.write(arena.target((0,), 4), 0, values(4).astype(np.int64))
    with pytest.raises(LayoutError, match=r"got torch\.float32"):
        arena.write(arena.target((0,), 4), 0, torch.zeros((4, 2, 2, 4, 8)))


def test_engine_arena_goes_where_the_setting_wants_it(gpu, tmp_path):
    cpu, cuda = "cpu", "cuda:0"
    for choice, device, expected in (
        ("auto", cpu, None), ("auto", cuda, 0), ("host", cuda, None), ("gpu", cuda, 0),
    ):  # fmt: skip
        config = EngineConfig(arena=choice, arena_bytes=1 << 20)
        made = open_arena(tmp_path / "arena", SPEC, config, devices=(device,))
        assert made.gpu == expected
        made.close()
    with pytest.raises(ConfigError, match=r"engine\.arena = 'gpu'"):
        open_arena(tmp_path / "arena", SPEC, EngineConfig(arena="gpu"), devices=(cpu,))


def test_ranks_get_their_heads_on_their_gpu_or_in_host_memory(monkeypatch, tmp_path):
    spec = replace(SPEC, num_kv_heads=4)
    gpus = gpus_in_host_memory(monkeypatch)
    two, four, eight = (tuple(f"cuda:{i}" for i in range(n)) for n in (2, 4, 8))
    halves, quarters = [(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]
    for choice, devices, heads, places in (
        ("gpu", two, halves, [0, 1]),
        ("auto", four, quarters, [0, 1, 2, 3]),
        (
            "auto",
            eight,
            quarters,
            [0, 2, 4, 6],
        ),  # neighbours share a head; the first of them has it
        ("host", two, halves, [None, None]),
        ("auto", ("cpu", "cpu"), halves, [None, None]),
    ):
        config = EngineConfig(arena=choice, arena_bytes=1 << 20, tokens_per_block=4)
        made = open_arena(tmp_path / "arena", spec, config, devices=devices)
        assert [(part.heads.start, part.heads.stop) for part in made.parts] == heads
        assert [part.gpu for part in made.parts] == places
        block_bytes = made.tokens_per_block * spec.bytes_per_token
        assert (1 << 20) - 5 * block_bytes < made.num_blocks * block_bytes <= 1 << 20
        made.close()
        made.unlink()
        assert not any(gpu.memory for gpu in gpus.values())
        assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="cannot be divided among 3"):
        open_arena(tmp_path / "arena", spec, EngineConfig(), devices=("cpu",) * 3)


def test_parts_on_two_gpus_hold_what_one_arena_in_host_memory_holds(monkeypatch, tmp_path):
    gpus_in_host_memory(monkeypatch)
    arena = create_arena(
        tmp_path / "arena",
        spec=SPEC,
        tokens_per_block=4,
        num_bytes=40_960,
        places={HeadRange(0, 1): 0, HeadRange(1, 2): 1},
    )
    host = Arena.create(tmp_path / "host", spec=SPEC, tokens_per_block=4, num_bytes=1 << 16)
    for part in arena.parts:
        part.blocks.fill_(0)
    for one in (host, arena):
        one.write(one.target((3, 1), 7), 2, values(7, num_layers=2))
    together = torch.cat([part.blocks for part in arena.parts], dim=3)
    assert np.array_equal(together.numpy().view(np.uint16)[:4], host.blocks[:4])
    other = attach_arena(arena.paths, generation=arena.generation)
    assert np.array_equal(other.read(arena.target((3, 1), 7)), host.read(host.target((3, 1), 7)))
    for one in (host, other, arena):
        one.close()


def test_current_device_of_the_caller_stays(monkeypatch, gpu, tmp_path):
    """A rank attaches to a part on its neighbour's GPU; its engine goes on with its own."""
    current = [3]

    def set_current(index):
        current[0] = index

    def use(index):
        set_current(index)
        return gpu

    monkeypatch.setattr(gpu_arena, "cuda_context", use)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", set_current)
    made = GpuArena.create_on(0, tmp_path / "a", spec=SPEC, tokens_per_block=4, num_bytes=40_960)
    assert current == [3]
    header = replace(made.header, gpu=replace(made.header.gpu, owner=1))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(gpu_arena, "_own_memory", {})
        other = GpuArena.open(made.path, header)
        assert (current, gpu.opened) == ([3], 1)
        other.close()
        assert (current, gpu.opened) == ([3], 0)
    made.close()
    assert current == [3]
    gpu.is_full = True
    with pytest.raises(ArenaError):
        GpuArena.create_on(0, tmp_path / "a", spec=SPEC, tokens_per_block=4, num_bytes=40_960)
    assert current == [3]


def test_gpu_that_lacks_the_memory_frees_the_parts_on_the_others(monkeypatch, tmp_path):
    gpus = gpus_in_host_memory(monkeypatch)
    gpus[1].is_full = True
    with pytest.raises(ArenaError, match="does not fit on GPU 1"):
        create_arena(
            tmp_path / "arena",
            spec=SPEC,
            tokens_per_block=4,
            num_bytes=40_960,
            places={HeadRange(0, 1): 0, HeadRange(1, 2): 1},
        )
    assert not gpus[0].memory
    assert not list(tmp_path.iterdir())
