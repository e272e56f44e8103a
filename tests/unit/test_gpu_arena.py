"""The arena on a GPU, with host memory in the GPU's place: layout, ownership, refusals.

CUDA itself, and sharing between processes, are in tests/gpu and in bench_gpu.py.
"""

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvfetcher import gpu_arena
from kvfetcher.arena import Arena, read_arena_header
from kvfetcher.config import EngineConfig
from kvfetcher.engines.host import open_arena
from kvfetcher.errors import ArenaError, ConfigError, GpuError, LayoutError
from kvfetcher.gpu_arena import GpuArena
from kvfetcher.spec import KVSpec

SPEC = KVSpec(num_layers=4, num_kv_heads=2, head_dim=8)


class HostAsGpu:
    """`CudaContext` over host memory."""

    def __init__(self):
        self.memory = {}
        self.is_full = False
        self.opened = 0

    def allocate(self, num_bytes):
        if self.is_full:
            raise GpuError("out of memory")
        buffer = (ctypes.c_uint8 * num_bytes)()
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        return address

    def free(self, address):
        del self.memory[address]

    def share(self, address):
        return address.to_bytes(64, "little")

    def open_shared(self, handle):
        address = int.from_bytes(handle, "little")
        if address not in self.memory:
            raise GpuError("its owner is gone")
        self.opened += 1
        return address

    def close_shared(self, address):
        self.opened -= 1

    def memory_info(self):
        return 5, 10


@pytest.fixture
def gpu(monkeypatch):
    made = HostAsGpu()

    def as_tensor(address, shape, *, item_bytes, gpu):
        size = int(np.prod(shape)) * item_bytes
        buffer = (ctypes.c_uint8 * size).from_address(address)
        kind = np.int16 if item_bytes == 2 else np.uint8
        return torch.from_numpy(np.frombuffer(buffer, kind).reshape(shape))

    monkeypatch.setattr(gpu_arena, "cuda_context", lambda index: made)
    monkeypatch.setattr(gpu_arena, "as_tensor", as_tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return made


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
    other = Arena.attach(arena.path, generation=arena.generation)
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
        made = open_arena(tmp_path / "arena", SPEC, config, device=device)
        assert made.gpu == expected
        made.close()
    with pytest.raises(ConfigError, match=r"engine\.arena = 'gpu'"):
        open_arena(tmp_path / "arena", SPEC, EngineConfig(arena="gpu"), device=cpu)
