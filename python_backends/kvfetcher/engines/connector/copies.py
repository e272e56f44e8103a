"""Moving KV blocks between an arena and the engine's pool, on the engine's stream or beside it.

The arena's blocks lie in host memory or on the GPU; the pool lies where the model runs. Where the model
runs on a CUDA device, host memory is page-locked once, so that copies are asynchronous DMA; a copy is
over when its `Done` says so. On a CPU a copy is over when the call returns.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvfetcher.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvfetcher.engines.connector.pool import Layout, PagedPool, PoolPart
    from kvfetcher.memory.arena import Arena
    from kvfetcher.spec import HeadRange, KVSpec

# What a load of one run takes on the GPU for a moment, at most.
_MAX_RUN_BYTES = 64 << 20

_log = logging.getLogger(__name__)


class Done:
    """When what was enqueued so far is over."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self._event = event

    def wait(self) -> None:
        """Block this thread until then (without spinning)."""
        if self._event is not None:
            self._event.synchronize()


class BlockCopier:
    """Copies of one rank. `load` and `save` may be called from different threads.

    Args:
        arena: attached; the part with the pool's heads and tokens per block.
        pool: pool of this rank.

    Raises:
        LayoutError: arena and pool do not fit each other.
    """

    def __init__(self, arena: Arena, pool: PagedPool) -> None:
        held = (arena.spec, arena.heads, arena.tokens_per_block)
        needed = (pool.spec, pool.heads, pool.tokens_per_block)
        if held != needed:
            raise LayoutError(
                f"arena {arena.path} holds {_text(*held)}, the pool needs {_text(*needed)}"
            )
        self._pool = pool
        self._is_cuda = pool.device.type == "cuda"
        self._blocks = _as_tensor(arena.blocks)
        block_bytes = self._blocks[0].numel() * self._blocks.element_size()
        self._max_run = max(1, _MAX_RUN_BYTES // block_bytes)
        self._pinned: int | None = None
        if self._is_cuda and self._blocks.device.type == "cpu":
            self._pinned = _page_lock(self._blocks, pool.device)
        self._side = {
            name: torch.cuda.Stream(pool.device) if self._is_cuda else None
            for name in ("load", "save")
        }

    def load(
        self,
        arena_blocks: Sequence[int],
        pool_blocks: Sequence[Sequence[int]],
        *,
        layout: Layout,
        stream: Any = None,
    ) -> Done:
        """Copy arena blocks into pool blocks, one to one; neighbours in both go together.

        Args:
            arena_blocks: sources.
            pool_blocks: destinations by layer group; as many in each.
            layout: layout of the pool.
            stream: torch's CUDA stream to enqueue on; None on a CPU.
        """
        # A pool that was made in inference mode takes writes in inference mode only, and the mode is
        # each thread's own.
        with torch.inference_mode(), _on(stream):
            for group, ids in enumerate(pool_blocks):
                parts = self._parts(group)
                for source, target, count in runs(arena_blocks, ids, longest=self._max_run):
                    values = self._blocks[source : source + count]
                    if self._is_cuda and len(pool_blocks) == 1:
                        # In one DMA; put in the pool's order there.
                        values = values.to(self._pool.device, non_blocking=True)
                    for part in parts:
                        into = self._pool.view(part, target, count, layout)
                        into.copy_(values[:, part.layers, part.kinds], non_blocking=self._is_cuda)
            return self._mark(stream)

    def save(
        self,
        pool_blocks: Sequence[Sequence[int]],
        arena_blocks: Sequence[int],
        *,
        layout: Layout,
        stream: Any = None,
    ) -> Done:
        """Copy pool blocks into arena blocks, one to one; see `load`."""
        with torch.inference_mode(), _on(stream):
            for group, ids in enumerate(pool_blocks):
                parts = self._parts(group)
                for source, target, count in runs(ids, arena_blocks, longest=self._max_run):
                    into = self._blocks[target : target + count]
                    for part in parts:
                        values = self._pool.view(part, source, count, layout).contiguous()
                        into[:, part.layers, part.kinds].copy_(values, non_blocking=self._is_cuda)
            return self._mark(stream)

    def _parts(self, group: int) -> list[PoolPart]:
        return [part for part in self._pool.parts if part.group == group]

    def side_stream(self, name: str, after: Any) -> Any:
        """A stream for copies beside the batch, behind the event `after`; None on a CPU."""
        side = self._side[name]
        if side is not None and after is not None:
            side.wait_event(after)
        return side

    def mark(self, stream: Any) -> Any:
        """A CUDA event behind all that `stream` holds now; None on a CPU."""
        return None if stream is None else stream.record_event()

    def close(self) -> None:
        """Undo the page lock."""
        if self._pinned is not None:
            status = int(torch.cuda.cudart().cudaHostUnregister(self._pinned))
            self._pinned = None
            if status:
                _log.info("the arena's page lock could not be undone (CUDA error %d)", status)
                _forget_error(self._pool.device)

    def _mark(self, stream: Any) -> Done:
        if stream is None:
            return Done()
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return Done(event)


def runs(
    sources: Sequence[int], targets: Sequence[int], *, longest: int
) -> Iterator[tuple[int, int, int]]:
    """Join pairs whose sources and targets both count up: (first source, first target, how many).

    Args:
        sources: block ids.
        targets: as many.
        longest: pairs in one run, at most.
    """
    pairs = zip(sources, targets, strict=True)
    first = next(pairs, None)
    if first is None:
        return
    (source, target), count = first, 1
    for following in pairs:
        if count < longest and following == (source + count, target + count):
            count += 1
            continue
        yield source, target, count
        (source, target), count = following, 1
    yield source, target, count


def _text(spec: KVSpec, heads: HeadRange, tokens_per_block: int) -> str:
    return f"{heads} of {spec} in blocks of {tokens_per_block} tokens"


def _as_tensor(blocks: Any) -> torch.Tensor:
    """The arena's memory as a tensor of bit patterns, without a copy."""
    if isinstance(blocks, torch.Tensor):
        return blocks.view(torch.int16) if blocks.element_size() == 2 else blocks.view(torch.uint8)
    return torch.from_numpy(blocks.view(np.int16) if blocks.itemsize == 2 else blocks)


def _page_lock(blocks: torch.Tensor, device: torch.device) -> int | None:
    """Page-lock memory for DMA; returns its address. None where the driver refuses: slower, not wrong."""
    address, size = blocks.data_ptr(), blocks.numel() * blocks.element_size()
    status = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
    if status:
        _log.warning(
            "%d bytes of arena could not be page-locked (CUDA error %d): copies will be slower;"
            " raise `ulimit -l` (docker: --ulimit memlock=-1)",
            size,
            status,
        )
        _forget_error(device)
        return None
    return address


def _forget_error(device: torch.device) -> None:
    """A CUDA call that failed leaves its error for this thread's next kernel launch to raise."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError as exc:
        _log.debug("cleared: %s", exc)


def _on(stream: Any) -> Any:
    return torch.cuda.stream(stream)  # a no-op for None
