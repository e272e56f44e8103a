"""The KV arena on a GPU: blocks in memory that the processes of one server share by CUDA IPC.

The engine process allocates it with plain ``cuMemAlloc`` (IPC takes no other kind) and writes its
handle into the arena's file; a process that attaches gets the same memory. When the owner dies, its file loses
its lock and is swept like any other; the driver keeps the memory until the last process that
attached lets go, which is when it sees the next generation.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvfetcher.errors import ArenaError, GpuError, LayoutError
from kvfetcher.memory.arena import (
    HEADER_BYTES,
    Arena,
    ArenaHeader,
    BlockTarget,
    GpuMemory,
    plan_arena,
    storage_dtype,
    write_arena_file,
)
from kvfetcher.memory.cuda import cuda_context

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvfetcher.spec import KVSpec

# CUDA does not open a handle in the process that made it: there, the address is looked up here.
_own_memory: dict[str, int] = {}


@contextlib.contextmanager
def _keeps_device() -> Iterator[None]:
    """Leave the thread's current CUDA device as it was.

    The driver calls of `cuda` make the arena's GPU the current one, which is another than the
    engine's own where a rank shares a part with its neighbour.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        if device is not None:
            torch.cuda.set_device(device)


class GpuArena(Arena):
    """An arena whose `blocks` are a torch tensor of bit patterns on a GPU: int16 or uint8.

    Make one with `create_on` (the owner) or `split_arena.attach_part`. Not thread-safe as to `close`. What a
    method does to the blocks is over when it returns; whoever writes `blocks` directly synchronises
    before telling another process.
    """

    def __init__(
        self, path: Path, header: ArenaHeader, address: int, *, lock_fd: int | None = None
    ) -> None:
        assert header.gpu is not None
        self.path = path
        self.header = header
        self._lock_fd = lock_fd
        self._address = address
        self._memory_of = header.gpu
        shape = header.blocks_shape
        self._blocks = as_tensor(
            address, shape, item_bytes=header.spec.item_bytes, gpu=header.gpu.index
        )

    @classmethod
    def create_on(
        cls,
        gpu: int,
        path: str | Path,
        *,
        spec: KVSpec,
        tokens_per_block: int,
        num_bytes: int,
    ) -> GpuArena:
        """Allocate an arena on a GPU, as `Arena.create` does in host memory.

        Raises:
            ConfigError: `num_bytes` holds no block, or too many.
            ArenaError: the GPU lacks the memory, or the file cannot be made.
        """
        plan = plan_arena(
            spec, tokens_per_block=tokens_per_block, num_bytes=num_bytes + HEADER_BYTES
        )
        return cls.create_on_from(plan, gpu, path)

    @classmethod
    @_keeps_device()
    def create_on_from(cls, plan: ArenaHeader, gpu: int, path: str | Path) -> GpuArena:
        """`create_on` as `plan_arena` says, perhaps with some of the heads only.

        Raises:
            ArenaError: as `create_on`.
        """
        path = Path(path)
        context = cuda_context(gpu)
        try:
            address = context.allocate(plan.blocks_bytes)
        except GpuError as exc:
            free, total = context.memory_info()
            raise ArenaError(
                f"a KV arena of {plan.blocks_bytes} bytes does not fit on GPU {gpu}, which has"
                f" {free} of {total} free ({exc}); lower engine.arena_bytes"
            ) from exc
        try:
            handle = context.share(address).hex()
            header = replace(plan, gpu=GpuMemory(gpu, handle, os.getpid()))
            lock_fd = write_arena_file(path, header, num_bytes=HEADER_BYTES)
        except (ArenaError, GpuError):
            context.free(address)
            raise
        _own_memory[handle] = address
        return cls(path, header, address, lock_fd=lock_fd)

    @classmethod
    @_keeps_device()
    def open(cls, path: Path, header: ArenaHeader) -> GpuArena:
        """Map what a header names; `split_arena.attach_part` calls it.

        Raises:
            ArenaError: the owner is gone.
        """
        assert header.gpu is not None
        handle = header.gpu.handle
        if header.gpu.owner == os.getpid() and handle in _own_memory:
            return cls(path, header, _own_memory[handle])
        try:
            address = cuda_context(header.gpu.index).open_shared(bytes.fromhex(handle))
        except (GpuError, ValueError) as exc:
            raise ArenaError(
                f"arena {path} on GPU {header.gpu.index} cannot be opened ({exc}); is the engine"
                " running?"
            ) from exc
        return cls(path, header, address)

    @property
    def is_owner(self) -> bool:
        return self._lock_fd is not None

    def write(self, target: BlockTarget, layer_start: int, values: Any) -> None:
        """Store values of some layers of a target's tokens; over when this returns.

        Args:
            target: where; of this arena's generation.
            layer_start: first layer of `values`.
            values: [Lg, K, H, T, D] bit patterns, a numpy array or a torch tensor on any device.

        Raises:
            ArenaError: the target is of another generation.
            LayoutError: shape, dtype, layers or block ids do not fit.
        """
        layers = self.check_values(target, layer_start, tuple(values.shape))
        blocks, step = self.blocks, self.tokens_per_block
        # In one piece to this GPU; the blocks are then filled there.
        bits = as_bits(values, self.spec).to(blocks.device)
        for index, block_id in enumerate(target.block_ids):
            part = bits[:, :, :, index * step : (index + 1) * step]
            blocks[block_id, layers.start : layers.stop, :, :, : part.shape[3]] = part
        torch.cuda.synchronize(blocks.device)

    def read(self, target: BlockTarget, layer_start: int = 0, num_layers: int | None = None) -> Any:
        """Copy values out into host memory, as `Arena.read`: a numpy array [Lg, K, H, T, D]."""
        layers = self._read_layers(target, layer_start, num_layers)
        return self._gather(target, layers).cpu().numpy().view(storage_dtype(self.spec))

    def load(self, target: BlockTarget) -> Any:
        """Values of a target's tokens as a tensor [L, K, H, T, D] of this GPU, a finished copy."""
        values = self._gather(target, self._read_layers(target, 0, None))
        torch.cuda.synchronize(values.device)
        return values

    def gather(self, target: BlockTarget, layer_start: int, num_layers: int) -> torch.Tensor:
        """Values of some layers of a target's tokens, [Lg, K, H, T, D]; on the current stream.

        Raises:
            ArenaError, LayoutError: as `read`.
        """
        return self._gather(target, self._read_layers(target, layer_start, num_layers))

    @_keeps_device()
    def close(self) -> None:
        """Let go of the memory; the owner frees it. Safe to call twice.

        `blocks` and tensors made from it must not be used after that.
        """
        if self._blocks is None:
            return
        self._blocks = None
        context = cuda_context(self._memory_of.index)
        context.settle()  # units in flight may be written to it
        if self.is_owner:
            del _own_memory[self._memory_of.handle]
            context.free(self._address)
        elif self._memory_of.handle not in _own_memory:
            context.close_shared(self._address)
        self._unlock()

    def _gather(self, target: BlockTarget, layers: range) -> torch.Tensor:
        blocks = self.blocks
        ids = torch.tensor(target.block_ids, device=blocks.device)
        # [n, Lg, K, H, t, D] -> [Lg, K, H, n t, D]
        found = blocks[:, layers.start : layers.stop].index_select(0, ids).movedim(0, 3)
        return found.flatten(3, 4)[:, :, :, : target.num_tokens].contiguous()


class _CudaMemory:
    """Foreign GPU memory as torch takes it, without a copy."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": typestr,
            "version": 3,
        }


def as_tensor(address: int, shape: tuple[int, ...], *, item_bytes: int, gpu: int) -> torch.Tensor:
    """GPU memory as a tensor, int16 or uint8; it must outlive the tensor."""
    memory = _CudaMemory(address, shape, "<i2" if item_bytes == 2 else "|u1")
    return torch.as_tensor(memory, device=f"cuda:{gpu}")


def as_bits(values: Any, spec: KVSpec) -> torch.Tensor:
    """KV values as a tensor of the arena's item type, without a copy where that is possible.

    Raises:
        LayoutError: another dtype than the spec's bit patterns.
    """
    wanted = torch.int16 if spec.item_bytes == 2 else torch.uint8
    if isinstance(values, np.ndarray):
        if values.dtype == storage_dtype(spec):
            signed = values.view(np.int16) if spec.item_bytes == 2 else values
            return torch.from_numpy(np.ascontiguousarray(signed))
    elif values.dtype == wanted:
        return values
    raise LayoutError(f"values must be {storage_dtype(spec)} bit patterns, got {values.dtype}")
