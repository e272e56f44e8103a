"""Integers <-> pictures: exact inverses, pure numpy.

`RowGrid` lays channels as rows and tokens as columns (profile `exact` and the transform profiles);
`TileGrid` lays each token's [head, dim] as a tile (profile `paper`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.codec.base import MAX_SIDE, MIN_SIDE, PlaneGeometry
from kvfetcher.errors import FormatError, LayoutError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.codec.base import Integers

NUM_PLANES = 3


@dataclass(frozen=True, slots=True)
class RowGrid:
    """Rows interleaved over three planes, columns cut into tiles of tokens.

    Row ``r`` lies in plane ``r % 3`` at line ``r // 3``; lines beyond `frame_rows` go to the next
    picture, tokens beyond `frame_columns` to the next set of pictures. Picture number =
    ``token_tile * num_blocks + row_block``. What a picture has beyond that is padding.
    """

    num_rows: int
    num_columns: int
    frame_rows: int
    """Lines used per plane of a picture."""
    frame_columns: int
    """Columns used per picture."""

    def __post_init__(self) -> None:
        for name, value in (("rows", self.frame_rows), ("columns", self.frame_columns)):
            if not 1 <= value <= MAX_SIDE:
                raise FormatError(f"a grid uses 1 to {MAX_SIDE} picture {name}, got {value}")
        if self.num_rows < 1 or self.num_columns < 1:
            raise FormatError(f"a grid has rows and columns, got {self.num_rows, self.num_columns}")

    @classmethod
    def fit(
        cls, num_rows: int, num_columns: int, *, max_frame_rows: int, max_frame_columns: int
    ) -> RowGrid:
        """The grid with the fewest pictures within the bounds, these evenly filled."""
        lines = -(-num_rows // NUM_PLANES)
        blocks = -(-lines // max_frame_rows)
        tiles = -(-num_columns // max_frame_columns)
        return cls(num_rows, num_columns, -(-lines // blocks), -(-num_columns // tiles))

    @property
    def num_blocks(self) -> int:
        return -(-self.num_rows // (NUM_PLANES * self.frame_rows))

    @property
    def num_tiles(self) -> int:
        return -(-self.num_columns // self.frame_columns)

    def geometry(self, bit_depth: int) -> PlaneGeometry:
        """The 4:4:4 pictures of this grid, padded to what NVDEC accepts."""
        return PlaneGeometry(
            num_frames=self.num_blocks * self.num_tiles,
            width=max(self.frame_columns, MIN_SIDE),
            height=max(self.frame_rows, MIN_SIDE),
            bit_depth=bit_depth,
        )

    def place(self, rows: Integers, *, bit_depth: int, padding: int) -> Integers:
        """Rows [N, T] -> planes [F, 3, Y, X]; padding is filled with one value.

        Raises:
            LayoutError: `rows` has another shape or dtype.
        """
        geometry = self.geometry(bit_depth)
        if rows.shape != (self.num_rows, self.num_columns) or rows.dtype != geometry.dtype:
            raise LayoutError(
                f"rows must be {(self.num_rows, self.num_columns)} {geometry.dtype}, got"
                f" {rows.shape} {rows.dtype}"
            )
        planes = np.full(geometry.shape, padding, geometry.dtype)
        lines = self._lines(geometry.height)
        for flat, start, width in self._tiles(planes):
            flat[lines, :width] = rows[:, start : start + width]
        return planes

    def gather(
        self,
        planes: Integers,
        order: NDArray[np.integer] | None = None,
    ) -> Integers:
        """Planes [F, 3, Y, X] -> rows [N, T]; exact inverse of `place`.

        Args:
            planes: as `geometry` says.
            order: [N] row number to take for each line of the result; None = as they lie.
        """
        lines = self._lines(planes.shape[2])
        if order is not None:
            lines = lines[order]
        rows = np.empty((self.num_rows, self.num_columns), planes.dtype)
        for flat, start, width in self._tiles(planes):
            if width == flat.shape[1] == self.num_columns:
                np.take(flat, lines, axis=0, out=rows)
            else:
                rows[:, start : start + width] = flat[lines, :width]
        return rows

    def _lines(self, height: int) -> NDArray[np.int64]:
        """Index of each row among the lines of one tile's pictures."""
        row = np.arange(self.num_rows)
        block, line = np.divmod(row // NUM_PLANES, self.frame_rows)
        return (block * NUM_PLANES + row % NUM_PLANES) * height + line

    def _tiles(self, planes: Integers) -> list[tuple[Integers, int, int]]:
        """(lines of the tile's pictures as a view, first column, number of columns)."""
        flat = planes.reshape(self.num_tiles, -1, planes.shape[3])
        return [
            (flat[tile], start, min(self.frame_columns, self.num_columns - start))
            for tile, start in enumerate(range(0, self.num_columns, self.frame_columns))
        ]
