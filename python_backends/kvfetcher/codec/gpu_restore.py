"""Decoded planes -> KV values in arena blocks, on the GPU that both lie on.

What the CPU restore does in passes over arrays is here one kernel per layer group (`gpu_kernels`), on
float16 operands: samples are small integers, which float16 holds exactly, and the inverse transform
is rounded to its 11 bits, eight times finer than bfloat16's result; sums are float32. Values so differ
from the CPU's by at most one step of the KV dtype but for sums that cancel (H200, 8B shape: 0.02 % of
the values differ); `exact` and `uncalibrated` give the CPU's bits.

Memory beside the arena: two bytes per sample of the unit at hand (at most 2 * MAX_SAMPLES), four per
value of one transform where it has low bits (at most 4 * MAX_SAMPLES), with `restore` the unit's values, and per calibration the inverse transforms, which stay (two bytes per entry).
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvfetcher.codec import digest, gpu_kernels
from kvfetcher.codec.exact import check_exact, plan_exact
from kvfetcher.codec.gpu_low_bits import take_wide_rows
from kvfetcher.codec.raw_tokens import exact_tokens
from kvfetcher.codec.symbols import check_digest, escapes
from kvfetcher.codec.transform import plan_restore
from kvfetcher.codec.uncalibrated import plan_uncalibrated
from kvfetcher.codec.unit import EXACT, TRANSFORM, UNCALIBRATED
from kvfetcher.errors import ChecksumError, LayoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from kvfetcher.codec.low_bits import PackedLowBits
    from kvfetcher.codec.transform import Place, RestorePlan
    from kvfetcher.codec.unit import Unit
    from kvfetcher.layout import RowGrid
    from kvfetcher.transform.artifact import Calibration
    from kvfetcher.transform.rope import LayerRope

MAX_SAMPLES = 32 << 20
"""Of one unit; larger ones are left to the CPU, so that memory stays bounded."""
MAX_TABLES = 16
"""Angle tables kept: of so many chunks (position, length)."""
MAX_MATRICES = 1024
"""Inverse transforms kept; one calibration has one for each layer group and head group."""

_MASK = (1 << 64) - 1
# Integers up to this are exact in float16.
_EXACT_HALF = 2048
# Largest entry of an inverse transform after scaling: far from float16's ends on both sides.
_MATRIX_TOP = 2.0**12
_ESCAPES_AT_ONCE = 1024
_UNPACK_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class GpuPlanes:
    """A unit's decoded pictures on the GPU: [F, P, Y, X], uint8 or int16 for 16 bits."""

    data: torch.Tensor
    shift: int
    """Samples lie so many bits up."""


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
    keeps: tuple[Any, ...] = field(default=(), repr=False)
    """What must live until the GPU is done."""


class _Inverse(NamedTuple):
    """One inverse transform on the GPU, its columns in pairs (see `restore_columns`)."""

    matrix: torch.Tensor
    """float16 [n, m], rows of 128 bytes."""
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


class GpuRestorer:
    """Restores units on one GPU. Not thread-safe; one stream, the current one."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._weights = self._upload(digest.word_weights().view(np.int64))
        self._block_weights = self._upload(digest.block_weights().view(np.int64))
        self._inverses: OrderedDict[Any, _Inverse] = OrderedDict()
        self._offsets: OrderedDict[Any, torch.Tensor] = OrderedDict()
        self._angles: OrderedDict[Any, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def can_restore(self, unit: Unit) -> bool:
        """Whether a unit is of a kind and size for the GPU; others are for the CPU."""
        if unit.geometry.num_bytes // unit.geometry.dtype.itemsize > MAX_SAMPLES:
            return False
        if unit.flags and unit.num_elements > MAX_SAMPLES:
            return False
        return unit.profile in (EXACT, UNCALIBRATED) or (
            unit.profile == TRANSFORM and unit.spec.head_dim % 2 == 0
        )

    def begin(self, unit: Unit, planes: GpuPlanes, to: Destination) -> PendingRestore:
        """Give a unit's restoring to the GPU; values are right only if `finish` does not object.

        Args:
            unit: one that `can_restore`.
            planes: its pictures; they must stay until `finish`.
            to: where; of the unit's spec.

        Raises:
            FormatError: the unit breaks its profile's rules.
            LayoutError: planes or destination do not fit the unit.
            UnsupportedVersionError: its calibration is not on this machine.
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
        begin = {EXACT: self._begin_exact, UNCALIBRATED: self._begin_uncalibrated}
        with self._current_device():
            return begin.get(unit.profile, self._begin_transform)(unit, planes, to)

    def finish(self, pending: Sequence[PendingRestore]) -> list[ChecksumError | None]:
        """Wait for the GPU and compare digests; one result per unit, None = it is right."""
        if not pending:
            return []
        sums = torch.cat([one.sums for one in pending]).tolist()  # waits
        found: list[ChecksumError | None] = []
        for one, total in zip(pending, sums, strict=True):
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
        (error,) = self.finish([self.begin(unit, planes, to)])
        if error is not None:
            raise error
        return to.blocks[0]

    # Profiles

    def _begin_transform(self, unit: Unit, planes: GpuPlanes, to: Destination) -> PendingRestore:
        plan = plan_restore(unit)
        samples, sums = self._unpack(unit, planes, plan.layout.grid)
        large = self._put_escapes(unit, plan.num_escapes, samples)
        is_fp8 = unit.spec.item_bytes == 1
        out = Destination.fresh(unit, self._device, torch.float32) if is_fp8 else to
        for place, low_bits in zip(plan.places, plan.low_bits, strict=True):
            self._multiply(unit, plan, place, samples, large, low_bits, out)
        if is_fp8:
            self._scatter(to, _to_bits(out.blocks[0], unit.spec.dtype))
        self._put_exact_tokens(unit, plan.num_raw_tokens, to)
        num_bytes = samples.numel() * unit.geometry.dtype.itemsize
        return PendingRestore(unit, sums, num_bytes, check_digest, (samples, out.blocks))

    def _begin_exact(self, unit: Unit, planes: GpuPlanes, to: Destination) -> PendingRestore:
        plan = plan_exact(unit)
        layers, factor, heads, tokens, dim = unit.shape
        grid, geometry = plan.grid, unit.geometry
        line = plan.row_of_channel // 3
        lines = (line // grid.frame_rows * 3 + plan.row_of_channel % 3) * geometry.height
        lines += line % grid.frame_rows
        sums = torch.zeros(1, dtype=torch.int64, device=self._device)
        groups = layers * factor * heads
        step = 32
        gpu_kernels.restore_bits[groups, -(-tokens // step)](
            planes.data,
            self._upload(lines.astype(np.int32)),
            self._upload(plan.medians),
            self._upload(np.frombuffer(plan.remainders, np.uint8)),
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
            EXPONENT_BITS=plan.bits.exponent_bits,
            MANTISSA_BITS=plan.bits.mantissa_bits,
        )
        num_bytes = unit.num_elements * unit.spec.item_bytes
        return PendingRestore(unit, sums, num_bytes, check_exact)

    def _begin_uncalibrated(self, unit: Unit, planes: GpuPlanes, to: Destination) -> PendingRestore:
        """Torch's own kernels: each step is rounded apart, so the bits are the CPU's."""
        plan = plan_uncalibrated(unit)
        samples, sums = self._unpack(unit, planes, plan.grid)
        num_bytes = samples.numel() * unit.geometry.dtype.itemsize
        integers = samples.float()
        places, values = escapes(unit, plan.num_escapes, samples.numel())
        integers.view(-1)[self._upload(places)] = self._upload(values.astype(np.float32))
        rows = torch.empty_like(integers)
        rows[self._upload(plan.order)] = integers
        layers, factor, heads, tokens, dim = unit.shape
        restored = rows.view(layers, factor, heads, dim, tokens).mT * self._upload(plan.steps)
        restored += self._upload(plan.means)
        self._scatter(to, _to_bits(restored, unit.spec.dtype))
        self._put_exact_tokens(unit, plan.num_raw_tokens, to)
        return PendingRestore(unit, sums, num_bytes, check_digest)

    # Parts

    def _unpack(
        self, unit: Unit, planes: GpuPlanes, grid: RowGrid
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Centred samples float16 [rows, T], and the sums of their digest."""
        shape = (grid.num_rows, grid.num_columns)
        samples = torch.empty(shape, dtype=torch.float16, device=self._device)
        sums = torch.zeros(1, dtype=torch.int64, device=self._device)
        count, geometry = samples.numel(), unit.geometry
        gpu_kernels.unpack_rows[(-(-count // _UNPACK_BLOCK),)](
            planes.data,
            samples,
            sums,
            self._weights,
            self._block_weights,
            count,
            grid.num_columns,
            grid.frame_rows,
            grid.frame_columns,
            grid.num_blocks,
            geometry.height,
            geometry.width,
            1 << (geometry.bit_depth - 1),
            planes.shift,
            ITEM_BYTES=geometry.dtype.itemsize,
            BLOCK=_UNPACK_BLOCK,
        )
        return samples, sums

    def _put_escapes(
        self, unit: Unit, num_escapes: int, samples: torch.Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Put escaped integers into the samples; those too large for float16 are returned."""
        places, values = escapes(unit, num_escapes, samples.numel())
        is_large = np.abs(values) > _EXACT_HALF
        if num_escapes:
            small = np.where(is_large, 0, values).astype(np.float16)
            samples.view(-1).index_copy_(0, self._upload(places), self._upload(small))
        return places[is_large], values[is_large]

    def _multiply(
        self,
        unit: Unit,
        plan: RestorePlan,
        place: Place,
        samples: torch.Tensor,
        large: tuple[NDArray[np.int64], NDArray[np.int32]],
        low_bits: PackedLowBits | None,
        to: Destination,
    ) -> None:
        """One inverse transform into its part of the destination."""
        rows = plan.layout.rows_of(place)
        rank = rows.stop - rows.start
        inverse = self._inverse(plan.calibration, place)
        bias = self._bias(samples[rows], rows.start, large, low_bits, inverse)
        cosines, sines = self._angle_tables(plan.calibration, unit)
        n = len(inverse.means)
        kinds = {torch.int16: getattr(torch, unit.spec.dtype)}
        gpu_kernels.restore_columns[-(-unit.num_tokens // 128), -(-n // 128)](
            samples[rows],
            inverse.matrix,
            inverse.means,
            inverse.means if bias is None else bias,
            inverse.tables,
            cosines,
            sines,
            self._column_offsets(plan.calibration, place, inverse, to),
            to.blocks.view(kinds.get(to.blocks.dtype, to.blocks.dtype)),
            to.block_ids,
            inverse.scale * plan.step,
            unit.num_tokens,
            n,
            rank,
            inverse.matrix.stride(0),
            unit.spec.head_dim // 2,
            (to.first_layer + place.layers.start) * to.layer_stride,
            to.blocks.stride(0),
            to.tokens_per_block,
            unit.spec.head_dim,
            HAS_BIAS=bias is not None,
            CLAMP=unit.spec.dtype == "float16",
            TOKENS=128,
            COLUMNS=128,
            RANK=64,
            num_warps=8,
            num_stages=3,
        )

    def _bias(
        self,
        samples: torch.Tensor,
        first_row: int,
        large: tuple[NDArray[np.int64], NDArray[np.int32]],
        low_bits: PackedLowBits | None,
        inverse: _Inverse,
    ) -> torch.Tensor | None:
        """What integers too large for float16 add: float32 [T, n]; None = there are none.

        Args:
            samples: of one transform; those with low bits become 0.
            first_row: of these among all of the unit.
            large: as `_put_escapes` gives them.
            low_bits: of the transform.
            inverse: of the transform.
        """
        num_rows, num_tokens = samples.shape
        places, values = large
        row = places // num_tokens - first_row
        ours = (row >= 0) & (row < num_rows)
        is_wide = low_bits is not None and len(low_bits.shifts) > 0
        if not is_wide and not ours.any():
            return None
        bias = torch.zeros((num_tokens, len(inverse.means)), device=self._device)
        row, token, value = row[ours], (places % num_tokens)[ours], values[ours].astype(np.float32)
        if low_bits is not None and is_wide:
            take_wide_rows(samples, low_bits, inverse.matrix, bias)
            shifts = np.zeros(num_rows, np.int64)
            shifts[: len(low_bits.shifts)] = low_bits.shifts
            value = np.ldexp(value, shifts[row])
        for first in range(0, len(row), _ESCAPES_AT_ONCE):
            part = slice(first, first + _ESCAPES_AT_ONCE)
            columns = inverse.matrix[:, self._upload(row[part])].T.float()
            columns *= self._upload(value[part])[:, None]
            bias.index_add_(0, self._upload(token[part]), columns)
        return bias

    def _put_exact_tokens(self, unit: Unit, num_raw: int, to: Destination) -> None:
        tokens, raw = exact_tokens(unit, num_raw)
        if not num_raw:
            return
        # [Lg, K, H, R, D] -> [R, Lg, K, H, D]
        values = self._upload(np.moveaxis(raw.view(_signed(raw.dtype)), 3, 0))
        block = to.block_ids[self._upload(tokens // to.tokens_per_block)].long()
        layers = slice(to.first_layer, to.first_layer + unit.num_layers)
        slot = self._upload(tokens % to.tokens_per_block)
        to.blocks[block, layers, :, :, slot] = values

    def _scatter(self, to: Destination, bits: torch.Tensor) -> None:
        """Bit patterns [Lg, K, H, T, D] into the destination's blocks."""
        step, ids = to.tokens_per_block, to.block_ids.tolist()
        layers = slice(to.first_layer, to.first_layer + bits.shape[0])
        for index, block in enumerate(ids):
            part = bits[:, :, :, index * step : (index + 1) * step]
            to.blocks[block, layers, :, :, : part.shape[3]] = part

    # What is kept from unit to unit

    def _inverse(self, calibration: Calibration, place: Place) -> _Inverse:
        key = (calibration.digest, place.layer_group, place.head_group)
        return _kept(
            self._inverses, key, MAX_MATRICES, lambda: self._make_inverse(calibration, place)
        )

    def _make_inverse(self, calibration: Calibration, place: Place) -> _Inverse:
        basis = calibration.bases[place.layer_group, place.head_group]
        matrices = calibration.matrices((place.layer_group, place.head_group), len(basis.rows))
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
        top = float(np.abs(matrices.inverse).max()) or 1.0
        scale = 2.0 ** np.floor(np.log2(_MATRIX_TOP / top))
        columns, rank = len(order), len(basis.rows)
        matrix = torch.zeros(
            (columns, -(-rank // 64) * 64), dtype=torch.float16, device=self._device
        )
        matrix[:, :rank] = self._upload(
            np.ascontiguousarray((matrices.inverse * np.float32(scale)).T[order], np.float16)
        )
        return _Inverse(
            matrix,
            self._upload(matrices.mean[order]),
            float(1 / scale),
            self._upload(np.concatenate(tables)),
            np.concatenate(groups),
            np.concatenate(dims),
        )

    def _column_offsets(
        self, calibration: Calibration, place: Place, inverse: _Inverse, to: Destination
    ) -> torch.Tensor:
        step = to.tokens_per_block
        key = (calibration.digest, place.layer_group, place.head_group, step)
        head_stride = step * calibration.spec.head_dim

        def make() -> torch.Tensor:
            return self._upload((inverse.heads * head_stride + inverse.dims).astype(np.int32))

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
        on_gpu = self._device.type == "cuda"
        return torch.cuda.device(self._device) if on_gpu else contextlib.nullcontext()

    def _upload(self, array: NDArray[Any]) -> torch.Tensor:
        # Not blocking: the driver takes its own copy of pageable memory, and waiting for the GPU
        # here, where other processes share it, would cost a turn of each of them.
        host = torch.from_numpy(np.array(array, order="C"))
        return host.to(self._device, non_blocking=True)


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
        return np.arange(head_dim).reshape(2, -1).T.reshape(-1)
    rotated = np.arange(rope.offset, rope.offset + rope.rotary_dim)
    if rope.style == "half":
        rotated = rotated.reshape(2, -1).T.reshape(-1)
    return np.concatenate([rotated, np.setdiff1d(np.arange(head_dim), rotated)])


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
