"""Host memory in the place of GPUs, for what of an arena on a GPU is not CUDA itself."""

import ctypes
from collections import defaultdict

import numpy as np
import torch

from kvfetcher import gpu_arena
from kvfetcher.errors import GpuError


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


def gpus_in_host_memory(monkeypatch):
    """As many `HostAsGpu` as are asked for, by index; `GpuArena` works on them from now on."""
    gpus = defaultdict(HostAsGpu)

    def as_tensor(address, shape, *, item_bytes, gpu):
        assert address in gpus[gpu].memory
        size = int(np.prod(shape)) * item_bytes
        buffer = (ctypes.c_uint8 * size).from_address(address)
        kind = np.int16 if item_bytes == 2 else np.uint8
        return torch.from_numpy(np.frombuffer(buffer, kind).reshape(shape))

    monkeypatch.setattr(gpu_arena, "cuda_context", lambda index: gpus[index])
    monkeypatch.setattr(gpu_arena, "as_tensor", as_tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return gpus
