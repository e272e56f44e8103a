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
from typing import TYPE_CHECKING, Any

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
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvfetcher.spec import KVDtype

DTYPES: dict[KVDtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""KV dtypes that are coded here; float8 is left to the CPU."""
BYTES_PER_ELEMENT = 26

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class ForwardUnit:
    """A unit whose pictures are ready to be coded."""

    planes: torch.Tensor
    """[F, 3, Y, X], uint8 or int16."""
    rest: UncalibratedRest


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
        kept = fits[:, None, None, None, :, None]
        numbers = fits.sum(dim=1).clamp(min=1).to(torch.float64)
        values.masked_fill_(~kept, 0)
        sums = values.sum(dim=4, keepdim=True, dtype=torch.float64)
        means = (sums / numbers.view(-1, 1, 1, 1, 1, 1)).to(torch.float32)
        values -= means
        values.masked_fill_(~kept, 0)
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
        limits = [(1 << (depth - 1)) - 1 for depth in BIT_DEPTHS]
        too_large = torch.stack([(sizes > limit).sum(dim=(1, 2)) for limit in limits])
        found = too_large.cpu().numpy()  # waits for the GPU
        exact = _host(~fits)
        host = [_host(tensor) for tensor in (means, steps, classes.to(torch.uint8))]
        units = []
        for unit in range(count):
            enough = np.flatnonzero(found[:, unit] <= MAX_ESCAPES * num_rows * tokens)
            choice = int(enough[0]) if len(enough) else len(BIT_DEPTHS) - 1
            raw = np.flatnonzero(exact[unit])
            picked = bits[unit][:, :, :, self._upload(raw)]
            raw_values = _host(picked).view(np.uint16)
            units.append(
                self._unit(
                    rows[unit],
                    sizes[unit],
                    int(found[choice, unit]),
                    BIT_DEPTHS[choice],
                    row_grid(num_rows, tokens, variant),
                    {
                        "num_raw_tokens": len(raw),
                        "raw": raw_sections_of(raw, raw_values),
                        "means": host[0][unit],
                        "steps": host[1][unit],
                        "spreads": host[2][unit],
                    },
                )
            )
        return units

    def _unit(
        self,
        rows: torch.Tensor,
        sizes: torch.Tensor,
        num_escapes: int,
        bit_depth: int,
        grid: RowGrid,
        side: dict[str, Any],
    ) -> ForwardUnit:
        """Integers [N, T] of one unit, in the order of their rows -> its pictures."""
        limit = (1 << (bit_depth - 1)) - 1
        places, beyond = np.empty(0, np.int64), np.empty(0, np.int32)
        if num_escapes:
            at = torch.nonzero(sizes.reshape(-1) > limit).reshape(-1)
            places, beyond = _host(at), _host(rows.reshape(-1)[at])
        kind = torch.uint8 if bit_depth == 8 else torch.int16
        samples = (rows.clamp(-limit, limit) + (limit + 1)).to(kind)
        total, num_bytes = self._digest(samples)
        rest = UncalibratedRest(
            grid=grid,
            bit_depth=bit_depth,
            integer_digest=(total + num_bytes) & _MASK,
            num_escapes=num_escapes,
            escapes=escape_sections_of(places, beyond),
            **side,
        )
        return ForwardUnit(self._place(samples, grid, bit_depth), rest)

    def _place(self, samples: torch.Tensor, grid: RowGrid, bit_depth: int) -> torch.Tensor:
        """`RowGrid.place` on the device."""
        geometry = grid.geometry(bit_depth)
        planes = torch.full(
            geometry.shape, 1 << (bit_depth - 1), dtype=samples.dtype, device=self._device
        )
        flat = planes.view(grid.num_tiles, -1, geometry.width)
        for tile in range(grid.num_tiles):
            part = samples[:, tile * grid.frame_columns : (tile + 1) * grid.frame_columns]
            for block in range(grid.num_blocks):
                for plane in range(NUM_PLANES):
                    first = block * NUM_PLANES * grid.frame_rows
                    lines = part[first : first + NUM_PLANES * grid.frame_rows][plane::NUM_PLANES]
                    at = (block * NUM_PLANES + plane) * geometry.height
                    flat[tile, at : at + len(lines), : lines.shape[1]] = lines
        return planes

    def _digest(self, samples: torch.Tensor) -> tuple[int, int]:
        """`digest.integer_digest` but for the length, and that."""
        data = samples.reshape(-1).view(torch.uint8)
        block_bytes = 4 * digest.BLOCK_WORDS
        blocks = -(-len(data) // block_bytes)
        padded = torch.nn.functional.pad(data, (0, blocks * block_bytes - len(data)))
        words = padded.view(torch.int32).to(torch.int64).bitwise_and_(0xFFFFFFFF)
        sums = (words.view(blocks, -1) * self._weights).sum(dim=1)
        total = (sums * self._block_weights[:blocks]).sum()
        return int(total.item()), len(data)

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


def as_pictures(units: Sequence[ForwardUnit]) -> list[tuple[torch.Tensor, int]]:
    """Samples [3, Y, X] and bit depth of each picture of some units, in order."""
    return [(planes, unit.rest.bit_depth) for unit in units for planes in unit.planes]
