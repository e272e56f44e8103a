"""Chunks whose values lie on a GPU: transformed, quantised and coded there, up to the bitstream.

Chunks of all requests that wait are coded together (`hevc_encode`): a GPU takes as long for one row
of coding tree blocks as for ten thousand. What a chunk's pictures are coded to is made a chunk object
by threads, while the GPU codes the next ones, and handed over as it is finished.

GPU memory beside the arena: `MEMORY_BYTES`, and a CUDA context of the process.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from kvfetcher.codec.gpu.forward import (
    DTYPES,
    ForwardUnit,
    UncalibratedForward,
    units_together,
)
from kvfetcher.codec.gpu.hevc_encode import HevcEncoder, Picture, Substreams, access_unit
from kvfetcher.codec.gpu.hevc_kernels import KernelLauncher
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.format.container import UnitData, build_chunk
from kvfetcher.format.pictures import ONLY_VARIANT
from kvfetcher.memory.cuda import cuda_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kvfetcher.codec.base import PlaneEncoder, Profile
    from kvfetcher.codec.gpu.hevc_encode import Launcher
    from kvfetcher.memory.arena import BlockTarget
    from kvfetcher.memory.gpu_arena import GpuArena
    from kvfetcher.spec import KVSpec

MEMORY_BYTES = 512 << 20
"""GPU memory that saving takes: for pictures that are coded, and for values on their way to them."""

_FORWARD_BYTES = 112 << 20
# Units made into objects side by side: SHA-256, CRC-32 and zstd leave the GIL alone.
_MAX_THREADS = 8

_WARM_UP_TOKENS = 160

_log = logging.getLogger(__name__)
_NO_PLANES = torch.empty(0)


@dataclass(frozen=True, slots=True)
class ChunkSource:
    """One chunk in an arena on a GPU, and what its object says of it."""

    arena: GpuArena
    target: BlockTarget
    token_ids: Sequence[int]
    first_position: int
    identity: bytes
    chunk_key: bytes
    parent_key: bytes

    @property
    def spec(self) -> KVSpec:
        return self.arena.spec


class _Piece(NamedTuple):
    """One unit of a chunk."""

    variant: str
    layer_start: int
    num_layers: int


@dataclass(slots=True)
class _Chunk:
    """A chunk whose pictures are being coded."""

    number: int
    source: ChunkSource
    left: int
    """Units that are not coded yet."""
    units: list[Future[UnitData]] = field(default_factory=list)


_CodedPicture: TypeAlias = tuple[int, int, Substreams] | torch.Tensor
"""Width, height and slice data, or the samples [3, Y, X] of one that is left to the CPU."""


@dataclass(slots=True)
class _Waiting:
    """A unit whose pictures were given to the encoder."""

    chunk: _Chunk
    piece: _Piece
    unit: ForwardUnit
    coded: list[_CodedPicture] = field(default_factory=list)


class GpuChunkEncoder:
    """Encodes chunks on one GPU. Not thread-safe.

    Args:
        gpu: index, as CUDA counts.
        profile: profile of the chunks, one that `can_encode`.
        on_cpu: encoder of pictures that the GPU leaves to the CPU.
        launcher: launcher of the kernels; None = compiled for this GPU, or loaded.
        device: where values and pictures are; None = that GPU.

    Raises:
        GpuError, DecoderUnavailableError: no such GPU, or kernels cannot be made for it.
    """

    def __init__(
        self,
        gpu: int,
        profile: Profile,
        on_cpu: PlaneEncoder,
        *,
        launcher: Launcher | None = None,
        device: torch.device | None = None,
    ) -> None:
        device = device or torch.device("cuda", gpu)
        if device.type == "cuda":
            torch.cuda.init()
        self._gpu = gpu
        self._device = device
        self._profile = profile
        self._on_cpu = on_cpu
        self._forward = UncalibratedForward(device)
        self._encoder = HevcEncoder(
            launcher or KernelLauncher(gpu), device, memory_bytes=MEMORY_BYTES - _FORWARD_BYTES
        )
        threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvfetcher-chunk")

    @staticmethod
    def can_encode(profile: Profile, spec: KVSpec) -> bool:
        """Whether such chunks can be coded on a GPU; others are for the CPU."""
        return isinstance(profile, UncalibratedProfile) and spec.dtype in DTYPES

    def encode(
        self, sources: Iterable[ChunkSource], hand_over: Callable[[int, Future[bytes]], None]
    ) -> None:
        """Encode chunks together; returns when the GPU is done with them.

        Args:
            sources: of any requests; asked for the next one as memory becomes free.
            hand_over: called once for each, with its number among `sources` and what becomes its
                object or an error; objects are finished in about that order.

        Raises:
            GpuError, torch.OutOfMemoryError: the GPU failed; chunks not handed over are the caller's.
            ArenaError, LayoutError: an arena is gone or does not fit; likewise.
        """
        waiting: deque[_Waiting] = deque()
        for found in self._encoder.encode(self._pictures(sources, waiting)):
            first = waiting[0]
            planes = first.unit.planes
            # Samples are let go as soon as they are coded.
            number = len(first.coded)
            height, width = planes.shape[2:]
            first.coded.append(planes[number] if found is None else (width, height, found))
            if number + 1 < len(planes):
                continue
            waiting.popleft()
            chunk = first.chunk
            job = (chunk.source, first.piece, replace(first.unit, planes=_NO_PLANES), first.coded)
            chunk.units.append(self._pool.submit(self._write_unit, *job))
            chunk.left -= 1
            if not chunk.left:
                hand_over(chunk.number, self._pool.submit(self._write_chunk, chunk))

    def warm_up(self) -> None:
        """Take one small unit through, so that no request waits for what is loaded at first use.

        Raises:
            GpuError, torch.OutOfMemoryError: the GPU failed, or lacks the memory.
        """
        shape = (1, 1, 2, 1, _WARM_UP_TOKENS, 64)
        bits = torch.randn(shape, device=self._device).to(torch.bfloat16).view(torch.int16)
        units = self._forward.units(bits, dtype="bfloat16", first_position=0, variant=ONLY_VARIANT)
        pictures = [Picture(planes, unit.bit_depth) for unit in units for planes in unit.planes]
        for _ in self._encoder.encode(pictures):
            pass

    def is_lost(self) -> bool:
        """Whether the GPU failed so that this process can use it no more."""
        return cuda_context(self._gpu).is_lost()

    def close(self) -> None:
        """Finish what threads do."""
        self._pool.shutdown()

    def _pictures(
        self, sources: Iterable[ChunkSource], waiting: deque[_Waiting]
    ) -> Iterator[Picture]:
        """Pictures of all units; made when they are asked for."""
        for number, source in enumerate(sources):
            spec, tokens = source.spec, source.target.num_tokens
            pieces = [
                _Piece(variant, start, layers)
                for variant in self._profile.variants()
                for start, layers in self._profile.layer_groups(spec, tokens, variant)
            ]
            chunk = _Chunk(number, source, len(pieces))
            for (variant, layers), alike in groupby(pieces, lambda p: (p.variant, p.num_layers)):
                same = list(alike)
                elements = layers * spec.elements_per_layer_token * tokens
                step = units_together(elements, _FORWARD_BYTES)
                for first in range(0, len(same), step):
                    part = same[first : first + step]
                    bits = source.arena.gather(
                        source.target, part[0].layer_start, layers * len(part)
                    )
                    units = self._forward.units(
                        bits.view(len(part), layers, *bits.shape[1:]),
                        dtype=spec.dtype,
                        first_position=source.first_position,
                        variant=variant,
                    )
                    del bits
                    for piece, unit in zip(part, units, strict=True):
                        waiting.append(_Waiting(chunk, piece, unit))
                        for planes in unit.planes:
                            yield Picture(planes, unit.bit_depth)

    def _write_unit(
        self,
        source: ChunkSource,
        piece: _Piece,
        unit: ForwardUnit,
        coded: Sequence[_CodedPicture],
    ) -> UnitData:
        packets = []
        for picture in coded:
            if isinstance(picture, torch.Tensor):
                host = picture.cpu().numpy()
                samples = host if unit.bit_depth == 8 else host.view("<u2")
                packets += self._on_cpu(samples[None], bit_depth=unit.bit_depth)
            else:
                width, height, substreams = picture
                packets.append(access_unit(width, height, unit.bit_depth, substreams))
        data = unit.rest().write(
            packets,
            spec=source.spec,
            layer_start=piece.layer_start,
            num_layers=piece.num_layers,
            num_tokens=source.target.num_tokens,
            first_position=source.first_position,
        )
        return UnitData(piece.layer_start, piece.num_layers, piece.variant, data)

    def _write_chunk(self, chunk: _Chunk) -> bytes:
        # Its units' tasks came before this one, so that a pool of one thread gets here, too.
        source = chunk.source
        return build_chunk(
            [unit.result() for unit in chunk.units],
            spec=source.spec,
            profile=self._profile.identity,
            identity=source.identity,
            chunk_key=source.chunk_key,
            parent_key=source.parent_key,
            first_position=source.first_position,
            token_ids=source.token_ids,
        )
