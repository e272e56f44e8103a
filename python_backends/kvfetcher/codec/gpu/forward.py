"""KV values -> pictures on a GPU: what profile `uncalibrated` does before its encoder, in torch.

Integers, side data and so the unit's bytes are those of the CPU (`codec.uncalibrated`): every step is
one IEEE operation there and here, but for sums, which are float64. Those of a channel's values are
exact as long as their exponents lie within 35 of one another; those of squares, of which a step is
made, may differ in the last of 53 bits, a step then in one of 10 million in its last.

A few units of one shape go through together, because it is the number of calls that costs. Takes 26
bytes of GPU memory per element of theirs while it runs, and leaves the pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvfetcher.codec.frame_size import row_grid
from kvfetcher.codec.layout import NUM_PLANES, RowGrid
from kvfetcher.codec.quant import MAX_MAGNITUDE
from kvfetcher.codec.raw_tokens import raw_sections_of
from kvfetcher.codec.symbols import MAX_ESCAPES, escape_sections_of
from kvfetcher.codec.uncalibrated import CLASSES_PER_UNIT, SINK_TOKENS, STEP, UncalibratedRest
from kvfetcher.format import digest
from kvfetcher.format.pictures import BIT_DEPTHS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.spec import KVDtype

DTYPES: dict[KVDtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""KV dtypes that are coded here; float8 is left to the CPU."""
BYTES_PER_ELEMENT = 26

_MASK = (1 << 64) - 1
_LIMITS = [(1 << (depth - 1)) - 1 for depth in BIT_DEPTHS]
"""Largest integer of each bit depth's samples."""


@dataclass(frozen=True, slots=True)
class ForwardUnit:
    """A unit whose pictures are ready to be coded, and the rest of it in host memory."""

    planes: torch.Tensor
    """[F, 3, Y, X], uint8 or int16."""
    grid: RowGrid
    bit_depth: int
    integer_digest: int
    escapes: tuple[NDArray[np.int64], NDArray[np.int32]]
    """Places and integers."""
    exact: tuple[NDArray[np.int64], NDArray[np.uint16]]
    """Numbers of the tokens that are kept exact, and their bit patterns [Lg, K, H, R, D]."""
    means: NDArray[np.float32]
    steps: NDArray[np.float32]
    spreads: NDArray[np.uint8]

    def rest(self) -> UncalibratedRest:
        """All of the unit but its video; compresses side data, which is for a thread of its own."""
        return UncalibratedRest(
            grid=self.grid,
            bit_depth=self.bit_depth,
            integer_digest=self.integer_digest,
            num_escapes=len(self.escapes[0]),
            escapes=escape_sections_of(*self.escapes),
            num_raw_tokens=len(self.exact[0]),
            raw=raw_sections_of(*self.exact),
            means=self.means,
            steps=self.steps,
            spreads=self.spreads,
        )


class _Drawn(NamedTuple):
    """Some units' integers as samples of one bit depth."""

    planes: torch.Tensor
    """[U, F, 3, Y, X]"""
    digests: torch.Tensor
    """int64 [U], but for the length."""


class UncalibratedForward:
    """The forward half of `uncalibrated` on one device. Not thread-safe; on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._weights = self._upload(digest.word_weights().view(np.int64))
        self._block_weights = self._upload(digest.block_weights().view(np.int64))

    def units(
        self, bits: torch.Tensor, *, dtype: KVDtype, first_position: int, variant: str
    ) -> list[ForwardUnit]:
        """Pictures and side data of some units of one chunk.

        Args:
            bits: [U, Lg, K, H, T, D] bit patterns of U units, on the device.
            dtype: type of the values, one of `DTYPES`.
            first_position: position of the chunk's first token.
            variant: picture size.
        """
        count, layers, factor, heads, tokens, dim = bits.shape
        values = bits.view(DTYPES[dtype]).to(torch.float32)
        fits = values.abs().amax(dim=(1, 2, 3, 5)) <= MAX_MAGNITUDE  # of NaN, it is not
        fits[:, : max(SINK_TOKENS - first_position, 0)] = False
        left_out = ~fits[:, None, None, None, :, None]
        numbers = fits.sum(dim=1).clamp(min=1).to(torch.float64)
        values.masked_fill_(left_out, 0)
        sums = values.sum(dim=4, keepdim=True, dtype=torch.float64)
        means = (sums / numbers.view(-1, 1, 1, 1, 1, 1)).to(torch.float32)
        values -= means
        values.masked_fill_(left_out, 0)
        power = values.to(torch.float64).square_().sum(dim=(3, 4, 5)) / (heads * tokens * dim)
        power *= (tokens / numbers).view(-1, 1, 1)
        steps = (STEP * power.sqrt()).to(torch.float32)
        divisors = torch.where(steps > 0, steps, 1.0)[:, :, :, None, None, None]
        values /= divisors
        num_rows = layers * factor * heads * dim
        rows = values.round_().transpose(4, 5).reshape(count, num_rows, tokens)
        classes = _spread_classes(rows)
        order = torch.argsort(classes, dim=1, stable=True)
        rows = rows.gather(1, order[:, :, None].expand(-1, -1, tokens)).to(torch.int32)
        sizes = rows.abs()
        too_large = torch.stack([(sizes > limit).sum(dim=(1, 2)) for limit in _LIMITS])
        grid = row_grid(num_rows, tokens, variant)
        # The usual depth is drawn before anybody knows, so that the GPU is waited for once.
        usual = self._draw(rows, grid, BIT_DEPTHS[0])
        found, exact, digests = _host(too_large), _host(~fits), _host(usual.digests)
        host_means, host_steps = _host(means), _host(steps)
        host_spreads = _host(classes.to(torch.uint8))
        made = []
        for unit in range(count):
            enough = np.flatnonzero(found[:, unit] <= MAX_ESCAPES * num_rows * tokens)
            choice = int(enough[0]) if len(enough) else len(BIT_DEPTHS) - 1
            planes, total = usual.planes[unit], int(digests[unit])
            if choice:
                drawn = self._draw(rows[unit : unit + 1], grid, BIT_DEPTHS[choice])
                planes, total = drawn.planes[0], int(drawn.digests.item())
            escapes = np.empty(0, np.int64), np.empty(0, np.int32)
            if found[choice, unit]:
                at = torch.nonzero(sizes[unit].reshape(-1) > _LIMITS[choice]).reshape(-1)
                escapes = _host(at), _host(rows[unit].reshape(-1)[at])
            raw = np.flatnonzero(exact[unit])
            raw_values = np.empty((layers, factor, heads, 0, dim), np.uint16)
            if len(raw):
                raw_values = _host(bits[unit][:, :, :, self._upload(raw)]).view(np.uint16)
            num_bytes = num_rows * tokens * (1 if choice == 0 else 2)
            made.append(
                ForwardUnit(
                    planes=planes,
                    grid=grid,
                    bit_depth=BIT_DEPTHS[choice],
                    integer_digest=total + num_bytes & _MASK,
                    escapes=escapes,
                    exact=(raw, raw_values),
                    means=host_means[unit],
                    steps=host_steps[unit],
                    spreads=host_spreads[unit],
                )
            )
        return made

    def _draw(self, rows: torch.Tensor, grid: RowGrid, bit_depth: int) -> _Drawn:
        """Integers [U, N, T] in the order of their rows -> pictures."""
        limit = (1 << (bit_depth - 1)) - 1
        kind = torch.uint8 if bit_depth == BIT_DEPTHS[0] else torch.int16
        samples = rows.clamp(-limit, limit).add_(limit + 1).to(kind)
        digests = self._digests(samples)
        geometry = grid.geometry(bit_depth)
        shape = (len(rows), *geometry.shape)
        planes = torch.full(shape, limit + 1, dtype=kind, device=self._device)
        lines = planes.view(len(rows), grid.num_tiles, -1, geometry.width)
        for tile in range(grid.num_tiles):
            part = samples[:, :, tile * grid.frame_columns : (tile + 1) * grid.frame_columns]
            for block in range(grid.num_blocks):
                first = block * NUM_PLANES * grid.frame_rows
                of_block = part[:, first : first + NUM_PLANES * grid.frame_rows]
                for plane in range(NUM_PLANES):
                    own = of_block[:, plane::NUM_PLANES]
                    at = (block * NUM_PLANES + plane) * geometry.height
                    lines[:, tile, at : at + own.shape[1], : own.shape[2]] = own
        return _Drawn(planes, digests)

    def _digests(self, samples: torch.Tensor) -> torch.Tensor:
        """`digest.integer_digest` of each of some units' samples [U, N, T], but for the length."""
        data = samples.view(torch.uint8).reshape(len(samples), -1)
        block_bytes = 4 * digest.BLOCK_WORDS
        blocks = -(-data.shape[1] // block_bytes)
        if data.shape[1] % block_bytes:
            missing = blocks * block_bytes - data.shape[1]
            data = torch.nn.functional.pad(data, (0, missing))
        words = data.view(torch.int32).to(torch.int64).bitwise_and_(0xFFFFFFFF)
        sums = words.view(len(samples), blocks, -1).mul_(self._weights).sum(dim=2)
        return (sums * self._block_weights[:blocks]).sum(dim=1)

    def _upload(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(self._device)


def _spread_classes(rows: torch.Tensor) -> torch.Tensor:
    """`uncalibrated._spread_classes` of integers [U, N, T] in float32; float64, whole numbers."""
    count = rows.shape[2]
    wide = rows.to(torch.float64)
    totals = wide.sum(dim=2)
    squares = wide.square_().sum(dim=2)
    deviations = (count * squares - totals * totals).clamp_(min=0).sqrt_() / count
    return (deviations * CLASSES_PER_UNIT).clamp_(max=255.0).floor_()


def _host(tensor: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.contiguous().cpu().numpy()
    return array


def units_together(elements: int, free_bytes: int) -> int:
    """Number of units that fit into the memory at one time; at least one."""
    return max(1, free_bytes // (BYTES_PER_ELEMENT * elements))
