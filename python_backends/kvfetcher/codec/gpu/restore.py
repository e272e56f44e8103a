"""Decoded planes -> KV values in arena blocks, on the GPU that both lie on.

What the CPU restore does in passes over arrays is here one kernel per layer group (`gpu_kernels`).
Trailing rows are multiplied in 8 bits, as a CPU with VNNI does (`transform.inverse`), leading ones as
float16: integers are exact in one of them, or in two where a row has low bits, and the inverse transform
is rounded to 11 bits, eight times finer than bfloat16's result; sums are exact and float32. Values so
differ from such a CPU's by at most one step of the KV dtype but for sums that cancel; `exact` and
`uncalibrated` give the CPU's bits. A unit's side data goes to the GPU in one copy, and it is the number
of calls per unit that bounds the rate, so there are as few as can be.

Memory beside the arena: up to four bytes per sample of the unit at hand (at most 4 * MAX_SAMPLES), with
`restore` the unit's values, and per calibration the inverse transforms, which stay (one or two bytes per
entry).
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvfetcher.codec.exact import check_exact, plan_exact
from kvfetcher.codec.gpu import kernels as gpu_kernels
from kvfetcher.codec.gpu.rows import RANK8, TILE_ROWS, padded_trailing, plan_leading_rows, plan_rows
from kvfetcher.codec.ladder.inverse import scale_of_8_bits
from kvfetcher.codec.ladder.profile import plan_restore
from kvfetcher.codec.raw_tokens import exact_tokens
from kvfetcher.codec.symbols import check_digest, escapes
from kvfetcher.codec.uncalibrated import plan_uncalibrated
from kvfetcher.errors import ChecksumError, LayoutError
from kvfetcher.format import digest
from kvfetcher.format.sections import ProfileCode
from kvfetcher.format.unit import IS_PACKED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from kvfetcher.codec.gpu.rows import Part, RowPlan
    from kvfetcher.codec.ladder.artifact import Calibration, InverseFactors
    from kvfetcher.codec.ladder.profile import Place, RestorePlan
    from kvfetcher.codec.ladder.rope import LayerRope
    from kvfetcher.codec.layout import RowGrid
    from kvfetcher.format.unit import Unit

MAX_SAMPLES = 32 << 20
"""Of one unit; larger ones are left to the CPU, so that memory stays bounded."""
MAX_TABLES = 16
"""Number of chunks (position, length) whose angle tables are kept."""
MAX_MATRICES = 1024
"""Inverse transforms kept; one calibration has one for each layer group and head group."""

_MASK = (1 << 64) - 1
# Largest entry of an inverse transform after scaling: far from float16's ends on both sides.
_MATRIX_TOP = 2.0**12
_ESCAPES_BLOCK = 256
# Tiles of the matrix product. On an H100, of 4096 columns and 2451 rows, 410 of them leading: 28 us at
# 1024 tokens (40 with as many registers as the compiler wants: one program per multiprocessor; 32 with
# tiles of 128 x 256), 16 at 256 (18 with no more than 128 registers; 22 with the large tile).
_LARGE_TILE = {"TOKENS": 128, "COLUMNS": 128, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
_SMALL_TILE = {"TOKENS": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 4}
# Chunks up to this make so few large tiles that most of a GPU would wait.
_SMALL_TOKENS = 256
# Columns of one picture in one program of `unpack_rows`: 11 us of the above at 1024 tokens, 8 at 256; with
# 128 columns 12 and 13, with 16 rows of 256 12 and 10.
_UNPACK_COLUMNS = 64
# A store of 8 values of two bytes is as wide as a thread's can be.
_RUNS = (8, 4, 2)
_ZERO = np.zeros(1, np.int64)
_NONE = np.zeros(1, np.uint8)
# Of the parts of one copy.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class GpuPlanes:
    """A unit's decoded pictures on the GPU: [F, P, Y, X], uint8 or int16 for 16 bits."""

    data: torch.Tensor
    shift: int
    """Number of bits by which samples are shifted up."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Blocks [num_blocks, L, K, H, tokens_per_block, D] of bit patterns and which of them to fill."""

    blocks: torch.Tensor
    block_ids: torch.Tensor
    """int32, on the same GPU, in token order."""
    first_layer: int
    """Index in `blocks` of the unit's first layer."""

    @classmethod
    def fresh(
        cls, unit: Unit, device: torch.device, dtype: torch.dtype | None = None
    ) -> Destination:
        """One new block that holds exactly the unit."""
        bits = torch.int16 if unit.spec.item_bytes == 2 else torch.uint8
        blocks = torch.empty((1, *unit.shape), dtype=dtype or bits, device=device)
        return cls(blocks, torch.zeros(1, dtype=torch.int32, device=device), 0)

    @property
    def tokens_per_block(self) -> int:
        return int(self.blocks.shape[4])

    @property
    def layer_stride(self) -> int:
        return int(self.blocks.stride(1))


@dataclass(frozen=True, slots=True)
class PendingRestore:
    """Work given to the GPU, not checked yet (`GpuRestorer.finish`)."""

    unit: Unit
    sums: torch.Tensor
    """int64 [1]: the digest but for the length."""
    num_bytes: int
    check: Callable[[Unit, int], None]


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """Units given to the GPU together, on their way to be checked (`GpuRestorer.close_batch`)."""

    units: Sequence[PendingRestore]
    sums: torch.Tensor
    """int64 [units], in host memory once `over` has happened."""
    over: torch.cuda.Event | None
    """None = it has."""


class _Inverse(NamedTuple):
    """One inverse transform on the GPU, its columns in pairs (see `restore_columns`)."""

    matrix: torch.Tensor
    """float16 [n, leading rows], these padded with 0 to a multiple of RANK."""
    matrix8: torch.Tensor
    """int8 [n, trailing rows], these padded with 0 to a multiple of RANK8."""
    ratios: torch.Tensor
    """float32 [n]: what the entries of `matrix8` count in those of `matrix`."""
    means: torch.Tensor
    """float32 [n]."""
    scale: float
    """What the matrix is to be multiplied with."""
    tables: torch.Tensor
    """int32 [n / 2]."""
    heads: NDArray[np.int64]
    """[n] (layer, K/V, head) of each column, flat, relative to the layer group; on the host."""
    dims: NDArray[np.int64]
    """[n]."""
    num_bytes: int
    """Size of the matrices, without padding."""


class _RowTables(NamedTuple):
    """`gpu_rows.RowTables`."""

    low_bits: torch.Tensor
    lines: torch.Tensor
    tiles: torch.Tensor
    places: torch.Tensor


class _Rows(NamedTuple):
    """The rows of a unit's pictures, the same in all units of its kind."""

    plan: RowPlan
    on_gpu: _RowTables


class _PackedOnGpu(NamedTuple):
    """`packed.PackedRows`."""

    lines: torch.Tensor
    widths: torch.Tensor
    first_lines: torch.Tensor


class _Integers(NamedTuple):
    """A unit's integers, being unpacked: ``high * 2**HIGH_BITS + samples``, and ``trailing + extra``."""

    samples: torch.Tensor
    """float16 [leading rows, T]."""
    high: torch.Tensor
    """Of the same shape, defined for the first `num_high` rows of each transform."""
    trailing: torch.Tensor
    """int8 [T, trailing rows], each transform's padded with any numbers to a multiple of RANK8."""
    extra: Sequence[_ExtraOnGpu]
    """`gpu_rows.Extra` of each transform; empty = no trailing integer is beyond 8 bits."""
    parts: Sequence[Part]
    """Each transform's rows."""
    num_high: Sequence[int]
    """Number of rows that have a high part, in each transform."""
    sums: torch.Tensor
    """int64 [1]: the samples' digest but for the length."""


class _ExtraOnGpu(NamedTuple):
    columns: torch.Tensor
    amounts: torch.Tensor


class GpuRestorer:
    """Restores units on one GPU. Not thread-safe but for `finish`; one stream, the current one.

    What a unit needs is freed when its kernels are given to the stream: torch gives such memory only to
    what comes later on that stream.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._is_gpu = self._device.type == "cuda"
        self._weights = self._upload(digest.word_weights().view(np.int64))
        self._block_weights = self._upload(digest.block_weights().view(np.int64))
        self._inverses: OrderedDict[Any, _Inverse] = OrderedDict()
        self._offsets: OrderedDict[Any, tuple[torch.Tensor, int]] = OrderedDict()
        self._rows: OrderedDict[Any, _Rows] = OrderedDict()
        self._angles: OrderedDict[Any, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def can_restore(self, unit: Unit) -> bool:
        """Whether a unit is of a kind and size for the GPU; others are for the CPU."""
        packed = unit.num_elements if unit.flags & IS_PACKED else 0
        if max(packed, unit.geometry.num_bytes // unit.geometry.dtype.itemsize) > MAX_SAMPLES:
            return False
        return unit.profile in (ProfileCode.EXACT, ProfileCode.UNCALIBRATED) or (
            unit.profile == ProfileCode.TRANSFORM and unit.spec.head_dim % 2 == 0
        )

    def begin(self, unit: Unit, planes: GpuPlanes, to: Destination) -> PendingRestore:
        """Give a unit's restoring to the GPU; values are right only if `finish` does not object.

        Args:
            unit: one that `can_restore`.
            planes: its pictures; memory that is not torch's must stay until `finish`.
            to: where; of the unit's spec.

        Raises:
            FormatError: the unit breaks its profile's rules.
            LayoutError: planes or destination do not fit the unit.
            UnsupportedVersionError: its calibration is not on this machine.
            LeftToCpuError: only the CPU can.
        """
        if tuple(planes.data.shape) != unit.geometry.shape:
            raise LayoutError(
                f"planes must be {unit.geometry.shape}, got {tuple(planes.data.shape)}"
            )
        layers, factor, heads, tokens, dim = unit.shape
        blocks = to.blocks
        if (
            (blocks.shape[2], blocks.shape[3], blocks.shape[5]) != (factor, heads, dim)
            or to.first_layer + layers > blocks.shape[1]
            or len(to.block_ids) * to.tokens_per_block < tokens
        ):
            raise LayoutError(
                f"a unit of {unit.shape} does not fit {len(to.block_ids)} blocks of"
                f" {tuple(blocks.shape[1:])} from layer {to.first_layer} on"
            )
        begin = {
            int(ProfileCode.EXACT): self._begin_exact,
            int(ProfileCode.UNCALIBRATED): self._begin_uncalibrated,
        }
        with self._current_device():
            return begin.get(unit.profile, self._begin_transform)(unit, planes, to)

    def close_batch(self, pending: Sequence[PendingRestore]) -> PendingBatch:
        """Units that `finish` is to wait for at one time; nothing waits here. At least one."""
        with self._current_device():
            sums = torch.cat([one.sums for one in pending])
            if not self._is_gpu:
                return PendingBatch(pending, sums, None)
            host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            host.copy_(sums, non_blocking=True)
            over = torch.cuda.Event(blocking=True)  # it sleeps: another thread has work to launch
            over.record()
            return PendingBatch(pending, host, over)

    @staticmethod
    def finish(batch: PendingBatch) -> list[ChecksumError | None]:
        """Wait for the GPU and compare digests; one result per unit, None = it is right.

        May run in another thread than the other methods.
        """
        if batch.over is not None:
            batch.over.synchronize()
        found: list[ChecksumError | None] = []
        for one, total in zip(batch.units, batch.sums.tolist(), strict=True):
            try:
                one.check(one.unit, (total + one.num_bytes) & _MASK)
                found.append(None)
            except ChecksumError as exc:
                found.append(exc)
        return found

    def restore(self, unit: Unit, planes: GpuPlanes) -> torch.Tensor:
        """A unit's values [Lg, K, H, T, D] as bit patterns, in memory of their own; finished.

        Raises:
            ChecksumError: its digest differs.
            FormatError, LayoutError, UnsupportedVersionError: as `begin`.
        """
        to = Destination.fresh(unit, self._device)
        (error,) = self.finish(self.close_batch([self.begin(unit, planes, to)]))
        if error is not None:
            raise error
        return to.blocks[0]

    # Profiles

    def _begin_transform(self, unit: Unit, planes: GpuPlanes, to: Destination) -> PendingRestore:
        plan = plan_restore(unit)
        integers = self._integers(unit, plan, planes)
        is_fp8 = unit.spec.item_bytes == 1
        out = Destination.fresh(unit, self._device, torch.float32) if is_fp8 else to
        self._multiply(unit, plan, integers, out)
        if is_fp8:
            self._scatter(to, _to_bits(out.blocks[0], unit.spec.dtype))
        self._put_exact_tokens(unit, plan.num_raw_tokens, to)
        return PendingRestore(unit, integers.sums, _num_bytes(unit, plan.layout.grid), check_digest)

    def _begin_exact(self, unit: Unit, planes: GpuPlanes, to: Destination) -> PendingRestore:
        plan = plan_exact(unit)
        layers, factor, heads, tokens, dim = unit.shape
        grid, geometry = plan.grid, unit.geometry
        line = plan.row_of_channel // 3
        lines = (line // grid.frame_rows * 3 + plan.row_of_channel % 3) * geometry.height
        lines += line % grid.frame_rows
        sums, channel_lines, medians, remainders = self._upload_all(
            _ZERO,
            lines.astype(np.int32),
            plan.medians,
            np.frombuffer(plan.remainders, np.uint8),
        )
        groups = layers * factor * heads
        step = 32
        gpu_kernels.restore_bits[groups, -(-tokens // step)](
            planes.data,
            channel_lines,
            medians,
            remainders,
            to.blocks,
            sums,
            self._weights,
            self._block_weights,
            to.block_ids,
            tokens,
            grid.frame_columns,
            grid.num_blocks * 3 * geometry.height,
            geometry.width,
            unit.num_elements,
            to.first_layer * to.layer_stride,
            to.blocks.stride(3),
            to.blocks.stride(0),
            to.tokens_per_block,
            HEAD_DIM=dim,
            DIMS=_power_of_two(dim),
            TOKENS=step,
            ITEM_BYTES=unit.spec.item_bytes,
            WORD=1 if dim * unit.spec.item_bytes % 4 else 4 // unit.spec.item_bytes,
            EXPONENT_BITS=plan.bits.exponent_bits,
            MANTISSA_BITS=plan.bits.mantissa_bits,
        )
        num_bytes = unit.num_elements * unit.spec.item_bytes
        return PendingRestore(unit, sums, num_bytes, check_exact)

    def _begin_uncalibrated(self, unit: Unit, planes: GpuPlanes, to: Destination) -> PendingRestore:
        """Torch's own kernels: each step is rounded apart, so the bits are the CPU's."""
        plan = plan_uncalibrated(unit)
        grid = plan.grid
        places, values = escapes(unit, plan.num_escapes, grid.num_rows * grid.num_columns)
        sums, at, escaped, order, steps, means = self._upload_all(
            _ZERO,
            places,
            values.astype(np.float32),
            plan.order,
            plan.steps,
            plan.means,
        )
        depth = unit.geometry.bit_depth
        rows: _Rows = _kept(
            self._rows,
            grid.num_rows,
            MAX_MATRICES,
            lambda: self._upload_rows(plan_leading_rows(grid.num_rows, depth)),
        )
        samples = self._new_rows(grid.num_rows, grid)
        none = samples.new_empty(0, dtype=torch.int8)
        self._unpack(unit, planes, grid, samples, samples, none, sums, rows.on_gpu, sums)
        integers = samples.float()
        integers.view(-1)[at] = escaped
        ordered = torch.empty_like(integers)
        ordered[order] = integers
        layers, factor, heads, tokens, dim = unit.shape
        restored = ordered.view(layers, factor, heads, dim, tokens).mT * steps
        restored += means
        self._scatter(to, _to_bits(restored, unit.spec.dtype))
        self._put_exact_tokens(unit, plan.num_raw_tokens, to)
        return PendingRestore(unit, sums, _num_bytes(unit, grid), check_digest)

    # Parts

    def _integers(self, unit: Unit, plan: RestorePlan, planes: GpuPlanes) -> _Integers:
        """Samples, low bits and escapes of a unit, put together on the GPU."""
        grid = plan.layout.grid
        rows, on_gpu = self._rows_of(unit, plan)
        places, values = escapes(unit, plan.num_escapes, grid.num_rows * grid.num_columns)
        large = rows.large_escapes(places, values, grid.num_columns)
        samples = high = self._new_rows(rows.num_leading, grid)
        shape = (grid.num_columns, rows.num_trailing)
        trailing = torch.empty(shape, dtype=torch.int8, device=self._device)
        if any(n > len(s) for s, n in zip(rows.shifts, large.num_high, strict=True)):
            high = torch.zeros_like(samples)  # for rows of which nothing but escapes is large
        elif any(large.num_high):
            high = torch.empty_like(samples)
        found = (places.astype(np.int32), values) if len(places) else ()
        low_planes = _NONE if plan.low_planes is None else plan.low_planes.reshape(-1)
        packed_arrays = _packed_arrays(plan)
        extra_arrays: list[NDArray[Any]] = [array for pair in large.extra for array in pair]
        sums, low, *others = self._upload_all(
            _ZERO, low_planes, *found, *packed_arrays, *extra_arrays
        )
        escaped, others = others[: len(found)], others[len(found) :]
        packed = _PackedOnGpu(*others[:3]) if packed_arrays else None
        others = others[len(packed_arrays) :]
        extra = [_ExtraOnGpu(*pair) for pair in zip(others[::2], others[1::2], strict=True)]
        self._unpack(unit, planes, grid, samples, high, trailing, sums, on_gpu, low, packed)
        if escaped:
            gpu_kernels.put_escapes[(-(-len(places) // _ESCAPES_BLOCK),)](
                *escaped,
                len(places),
                on_gpu.places,
                samples,
                high,
                trailing,
                on_gpu.low_bits,
                on_gpu.lines,
                low,
                -(-grid.num_columns // 8),
                grid.num_columns,
                trailing.shape[1],
                BLOCK=_ESCAPES_BLOCK,
            )
        return _Integers(samples, high, trailing, extra, rows.parts, large.num_high, sums)

    def _new_rows(self, num_rows: int, grid: RowGrid) -> torch.Tensor:
        shape = (num_rows, grid.num_columns)
        return torch.empty(shape, dtype=torch.float16, device=self._device)

    def _unpack(
        self,
        unit: Unit,
        planes: GpuPlanes,
        grid: RowGrid,
        samples: torch.Tensor,
        high: torch.Tensor,
        trailing: torch.Tensor,
        sums: torch.Tensor,
        tables: _RowTables,
        low: torch.Tensor,
        packed: _PackedOnGpu | None = None,
    ) -> None:
        """Centred integers of the pictures, or of packed rows."""
        geometry = unit.geometry
        tiles, tile_columns = grid.num_tiles, grid.frame_columns
        if packed is not None:
            tiles, tile_columns = 1, grid.num_columns
        blocks = -(-min(grid.num_columns, tile_columns) // _UNPACK_COLUMNS)
        word = 4 // geometry.dtype.itemsize
        if grid.num_columns % word or (tiles > 1 and tile_columns % 8):
            word = 1
        lines, widths, first_lines = packed or (planes.data, tables.low_bits, tables.lines)
        gpu_kernels.unpack_rows[len(tables.tiles), tiles * blocks](
            lines,
            tables.tiles,
            samples,
            high,
            trailing,
            sums,
            self._weights,
            self._block_weights,
            tables.low_bits,
            tables.lines,
            low,
            -(-grid.num_columns // 8),
            widths,
            first_lines,
            grid.num_rows,
            grid.num_columns,
            trailing.shape[-1],
            grid.frame_rows,
            tile_columns,
            blocks,
            grid.num_blocks,
            geometry.height,
            geometry.width,
            1 << (geometry.bit_depth - 1),
            planes.shift,
            PACKED=packed is not None,
            ITEM_BYTES=geometry.dtype.itemsize,
            WORD=word,
            ROWS=TILE_ROWS,
            COLUMNS=_UNPACK_COLUMNS,
        )

    def _multiply(
        self, unit: Unit, plan: RestorePlan, integers: _Integers, to: Destination
    ) -> None:
        """The inverse transforms, each into its part of the destination."""
        calibration, spec = plan.calibration, unit.spec
        cosines, sines = self._angle_tables(calibration, unit)
        tile = _SMALL_TILE if unit.num_tokens <= _SMALL_TOKENS else _LARGE_TILE
        blocks = to.blocks
        if blocks.dtype == torch.int16:
            blocks = blocks.view(getattr(torch, spec.dtype))
        layer_stride, block_stride = to.layer_stride, blocks.stride(0)
        nothing: list[_ExtraOnGpu | None] = [None] * len(plan.places)
        for place, part, num_high, extra in zip(
            plan.places, integers.parts, integers.num_high, integers.extra or nothing, strict=True
        ):
            inverse = self._inverse(calibration, place, part)
            offsets, run = self._pair_offsets(calibration, place, inverse, to)
            n = len(inverse.heads)
            grid = -(-unit.num_tokens // tile["TOKENS"]), -(-n // tile["COLUMNS"])
            gpu_kernels.restore_columns[grid](
                integers.samples,
                integers.high,
                inverse.matrix,
                integers.trailing,
                inverse.matrix8,
                inverse.ratios,
                integers.samples if extra is None else extra.amounts,
                to.block_ids if extra is None else extra.columns,
                inverse.means,
                inverse.tables,
                cosines,
                sines,
                offsets,
                blocks,
                to.block_ids,
                inverse.scale * plan.step,
                part.first_leading,
                part.first_trailing // RANK8,
                unit.num_tokens,
                n,
                part.num_leading,
                num_high,
                part.num_trailing,
                0 if extra is None else len(extra.columns),
                # Of what has no columns the stride is 1: other code would be compiled for it.
                inverse.matrix.shape[1],
                integers.trailing.shape[1],
                inverse.matrix8.shape[1],
                spec.head_dim // 2,
                (to.first_layer + place.layers.start) * layer_stride,
                block_stride,
                to.tokens_per_block,
                spec.head_dim,
                CLAMP=spec.dtype == "float16",
                RUN=run,
                **tile,
            )

    def _put_exact_tokens(self, unit: Unit, num_raw: int, to: Destination) -> None:
        tokens, raw = exact_tokens(unit, num_raw)
        if not num_raw:
            return
        values, index, slot = self._upload_all(
            # [Lg, K, H, R, D] -> [R, Lg, K, H, D]
            np.moveaxis(raw.view(_signed(raw.dtype)), 3, 0),
            tokens // to.tokens_per_block,
            tokens % to.tokens_per_block,
        )
        layers = slice(to.first_layer, to.first_layer + unit.num_layers)
        to.blocks[to.block_ids[index].long(), layers, :, :, slot] = values

    def _scatter(self, to: Destination, bits: torch.Tensor) -> None:
        """Bit patterns [Lg, K, H, T, D] into the destination's blocks."""
        step, ids = to.tokens_per_block, to.block_ids.long()
        layers = slice(to.first_layer, to.first_layer + bits.shape[0])
        whole, rest = divmod(bits.shape[3], step)
        if whole:
            blocks = bits[:, :, :, : whole * step].unflatten(3, (whole, step))
            to.blocks[ids[:whole], layers] = blocks.movedim(3, 0)
        if rest:
            to.blocks[ids[whole : whole + 1], layers, :, :, :rest] = bits[:, :, :, -rest:][None]

    # What is kept from unit to unit

    def _inverse(self, calibration: Calibration, place: Place, part: Part) -> _Inverse:
        rank = part.rows.stop - part.rows.start
        key = (calibration.digest, *place.transform, rank, part.num_leading)
        if key not in self._inverses:
            columns = len(calibration.bases[place.transform].mean)
            self._make_room(calibration, columns * (rank + part.num_leading))
        return _kept(
            self._inverses,
            key,
            MAX_MATRICES,
            lambda: self._make_inverse(calibration, place, rank, part.num_leading),
        )

    def _make_room(self, calibration: Calibration, num_bytes: int) -> None:
        """Let go of a calibration's matrices until one more of that size may be kept.

        Units may name any rank and step: what is kept is never more than all components of every
        transform take, in two bytes each.
        """
        ours = [key for key in self._inverses if key[0] == calibration.digest]
        kept = sum(self._inverses[key].num_bytes for key in ours)
        for key in ours:  # the one unused for longest first
            if kept + num_bytes <= calibration.inverse_bytes // 2:
                break
            kept -= self._inverses.pop(key).num_bytes

    def _make_inverse(
        self, calibration: Calibration, place: Place, rank: int, leading: int
    ) -> _Inverse:
        spec = calibration.spec
        first = calibration.grouping.layer_starts[place.layer_group]
        ropes = calibration.rope.layers[first : first + place.layers.stop - place.layers.start]
        kinds = _rope_kinds(calibration)
        heads = place.heads[1] - place.heads[0]
        groups, dims, tables = [], [], []
        for layer, rope in enumerate(ropes):
            for factor in range(spec.kv_factor):
                rotates = factor == 0 and bool(rope.inv_freq)
                paired = _paired_dims(rope if rotates else None, spec.head_dim)
                for head in range(heads):
                    flat = (layer * spec.kv_factor + factor) * spec.num_kv_heads
                    groups.append(np.full(spec.head_dim, flat + place.heads[0] + head))
                    dims.append(paired)
                    table = kinds.index(rope) if rotates else -1
                    tables.append(np.full(spec.head_dim // 2, table, np.int32))
        order = np.concatenate(
            [index * spec.head_dim + paired for index, paired in enumerate(dims)]
        )
        inverse = self._multiplied_out(calibration.inverse_factors(place.transform, rank))
        top = float(inverse.abs().max()) or 1.0
        scale = 2.0 ** np.floor(np.log2(_MATRIX_TOP / top))
        columns, padded = len(order), -(-leading // gpu_kernels.RANK) * gpu_kernels.RANK
        inverse = inverse[self._upload(order)]
        matrix = torch.zeros((columns, padded), dtype=torch.float16, device=self._device)
        matrix[:, :leading] = inverse[:, :leading] * scale
        shape = (columns, padded_trailing(rank - leading))
        matrix8 = torch.zeros(shape, dtype=torch.int8, device=self._device)
        ratios = torch.ones(columns, dtype=torch.float32, device=self._device)
        if leading < rank:
            trailing = inverse[:, leading:]
            steps = scale_of_8_bits(trailing.abs().amax(dim=1))
            matrix8[:, : rank - leading] = (trailing / steps[:, None]).round()
            ratios = steps * scale
        return _Inverse(
            matrix,
            matrix8,
            ratios,
            self._upload(calibration.bases[place.transform].mean[order]),
            float(1 / scale),
            self._upload(np.concatenate(tables)),
            np.concatenate(groups),
            np.concatenate(dims),
            columns * (rank + leading),
        )

    def _multiplied_out(self, factors: InverseFactors) -> torch.Tensor:
        """float32 [n, m]; on the GPU, for on a CPU it takes a second for each layer group of an 8B model."""
        count, dim, _ = factors.blocks.shape
        blocks, rows = self._upload_all(factors.blocks, factors.rows)
        parts = rows.T.reshape(count, dim, -1)
        inverse = torch.empty(parts.shape, dtype=torch.float32, device=self._device)
        for block in range(count):  # float64: torch may be told to round float32 products
            inverse[block] = blocks[block].double() @ parts[block].double()
        return inverse.view(count * dim, -1)

    def _rows_of(self, unit: Unit, plan: RestorePlan) -> _Rows:
        layout, depth = plan.layout, unit.geometry.bit_depth
        key = plan.calibration.digest, plan.places[0].layer_group, layout, plan.step, depth

        def make() -> _Rows:
            of = [layout.rows_of(place) for place in plan.places]
            leading = [layout.ranks[place.number] for place in plan.places]
            if depth == 8:  # deeper pictures hold more than 8 bits
                leading = [
                    plan.calibration.num_leading(place.transform, rank, plan.step)
                    for place, rank in zip(plan.places, leading, strict=True)
                ]
            return self._upload_rows(
                plan_rows(layout.grid.num_rows, of, leading, plan.shifts, depth)
            )

        return _kept(self._rows, (*key, unit.flags), MAX_MATRICES, make)

    def _upload_rows(self, plan: RowPlan) -> _Rows:
        return _Rows(plan, _RowTables(*self._upload_all(*plan.tables)))

    def _pair_offsets(
        self, calibration: Calibration, place: Place, inverse: _Inverse, to: Destination
    ) -> tuple[torch.Tensor, int]:
        """Places [2, n / 2] of an inverse transform's columns, and how many follow each other."""
        step = to.tokens_per_block
        key = (calibration.digest, *place.transform, step)
        head_stride = step * calibration.spec.head_dim

        def make() -> tuple[torch.Tensor, int]:
            offsets = (inverse.heads * head_stride + inverse.dims).astype(np.int32)
            pairs = np.ascontiguousarray(offsets.reshape(-1, 2).T)
            return self._upload(pairs), _run(pairs, calibration.spec.head_dim // 2)

        return _kept(self._offsets, key, MAX_MATRICES, make)

    def _angle_tables(
        self, calibration: Calibration, unit: Unit
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [kinds, T, D / 2] of a unit's positions."""
        key = (calibration.digest, unit.first_position, unit.num_tokens)
        return _kept(self._angles, key, MAX_TABLES, lambda: self._make_angles(calibration, unit))

    def _make_angles(
        self, calibration: Calibration, unit: Unit
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kinds, tokens = _rope_kinds(calibration), unit.num_tokens
        shape = (max(1, len(kinds)), tokens, calibration.spec.head_dim // 2)
        cosines = torch.ones(shape, dtype=torch.float32, device=self._device)
        sines = torch.zeros(shape, dtype=torch.float32, device=self._device)
        first = unit.first_position
        positions = torch.arange(first, first + tokens, device=self._device).float()
        for index, rope in enumerate(kinds):
            frequencies = self._upload(np.asarray(rope.inv_freq, np.float32))
            # As `transform.rope.cos_sin`: a float32 product, then exact.
            angles = (positions[:, None] * frequencies[None, :]).double()
            count = len(rope.inv_freq)
            cosines[index, :, :count] = (angles.cos() * rope.amplitude).float()
            sines[index, :, :count] = (angles.sin() * rope.amplitude).float()
        return cosines, sines

    def _current_device(self) -> Any:
        """Kernels in the Triton language run on the current device, wherever their data lie."""
        return torch.cuda.device(self._device) if self._is_gpu else contextlib.nullcontext()

    def _upload(self, array: NDArray[Any]) -> torch.Tensor:
        (tensor,) = self._upload_all(array)
        return tensor

    def _upload_all(self, *arrays: NDArray[Any]) -> list[torch.Tensor]:
        """Arrays on the GPU, in one copy that nobody waits for.

        Where other processes share the GPU, waiting would cost a turn of each of them.
        """
        starts, size = [], 0
        for array in arrays:
            starts.append(size)
            size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        # torch reuses page-locked memory when the copies out of it are over.
        host = torch.empty(max(1, size), dtype=torch.uint8, pin_memory=self._is_gpu)
        view = host.numpy()
        for array, start in zip(arrays, starts, strict=True):
            part = view[start : start + array.nbytes].view(array.dtype)
            part.reshape(array.shape)[...] = array
        gpu = host.to(self._device, non_blocking=True)
        found = []
        for array, start in zip(arrays, starts, strict=True):
            tensor = gpu[start : start + array.nbytes]
            if array.dtype != np.uint8:
                tensor = tensor.view(_torch_dtype(array.dtype))
            found.append(tensor if array.ndim == 1 else tensor.view(array.shape))
        return found


def _kept(cache: OrderedDict[Any, Any], key: Any, limit: int, make: Callable[[], Any]) -> Any:
    """The cached value; the one unused for longest goes first."""
    if key not in cache:
        while len(cache) >= limit:
            cache.popitem(last=False)
        cache[key] = make()
    cache.move_to_end(key)
    return cache[key]


@functools.lru_cache(maxsize=64)
def _kinds_of(layers: tuple[LayerRope, ...]) -> tuple[LayerRope, ...]:
    return tuple(dict.fromkeys(layer for layer in layers if layer.inv_freq))


def _rope_kinds(calibration: Calibration) -> tuple[LayerRope, ...]:
    """The different rotations of a model's layers."""
    return _kinds_of(calibration.rope.layers)


def _paired_dims(rope: LayerRope | None, head_dim: int) -> NDArray[np.int64]:
    """Dims of a head so that those rotated together are neighbours; what is not rotated follows."""
    if rope is None:
        return _halves_paired(np.arange(head_dim))
    rotated = np.arange(rope.offset, rope.offset + rope.rotary_dim)
    others = np.setdiff1d(np.arange(head_dim), rotated)
    if rope.style == "half":
        rotated = _halves_paired(rotated)
    return np.concatenate([rotated, _halves_paired(others)])


def _halves_paired(dims: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each of the first half, followed by the one as far into the second."""
    return dims.reshape(2, -1).T.reshape(-1)


def _run(pairs: NDArray[np.int32], num_pairs: int) -> int:
    """How many pairs of a head follow each other, both of their places do, from a multiple of it on."""
    for run in _RUNS:
        if num_pairs % run:
            continue
        runs = pairs.reshape(-1, run)
        begins = runs[:, :1]
        if not np.any(begins % run) and np.array_equal(runs, begins + np.arange(run)):
            return run
    return 1


def _packed_arrays(plan: RestorePlan) -> tuple[NDArray[Any], ...]:
    """What `_PackedOnGpu` holds, on the host; nothing for pictures."""
    if plan.packed is None:
        return ()
    widths, lines = plan.packed
    return (lines.reshape(-1) if lines.size else _NONE), widths, plan.packed.first_lines


def _num_bytes(unit: Unit, grid: RowGrid) -> int:
    """Size of the samples that the digest covers."""
    return grid.num_rows * grid.num_columns * unit.geometry.dtype.itemsize


@functools.cache
def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _to_bits(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """`quant.float32_to_bits` on a GPU."""
    if dtype == "bfloat16":
        return values.to(torch.bfloat16).view(torch.int16)
    if dtype == "float16":
        return values.clamp(-65504.0, 65504.0).to(torch.float16).view(torch.int16)
    return values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)


def _signed(dtype: np.dtype[Any]) -> type[Any]:
    return np.int16 if dtype.itemsize == 2 else np.uint8


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
