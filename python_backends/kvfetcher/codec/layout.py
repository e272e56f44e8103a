"""Integers <-> pictures: exact inverses, pure numpy.

`RowGrid` lays channels as rows and tokens as columns (profile `exact` and the transform profiles);
`TileGrid` lays each token's [head, dim] as a tile (profile `paper`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher.errors import FormatError, LayoutError
from kvfetcher.format.pictures import MAX_SIDE, MIN_SIDE, PlaneGeometry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.format.pictures import Integers

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
        order: NDArray[np.int64] | None = None,
    ) -> Integers:
        """Planes [F, 3, Y, X] -> rows [N, T]; exact inverse of `place`.

        Args:
            planes: as `geometry` says.
            order: [N] row number to take for each line of the result; None = as they lie.
        """
        lines = self._lines(planes.shape[2])
        if order is not None:
            lines = lines[order]
        rows: NDArray[Any] = np.empty((self.num_rows, self.num_columns), planes.dtype)
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


@dataclass(frozen=True, slots=True, order=True)
class Tiling:
    """How one token's [H, D] values lie in a two-dimensional tile, heads kept whole and apart.

    Head ``h`` is at (``h // head_columns``, ``h % head_columns``) of a grid of head blocks; dim
    ``d`` is at (``d // dim_columns``, ``d % dim_columns``) of its head's block.
    """

    head_rows: int
    head_columns: int
    dim_rows: int
    dim_columns: int

    @property
    def rows(self) -> int:
        return self.head_rows * self.dim_rows

    @property
    def columns(self) -> int:
        return self.head_columns * self.dim_columns

    @property
    def name(self) -> str:
        """A short name, for example ``h1x8_d32x4``."""
        return f"h{self.head_rows}x{self.head_columns}_d{self.dim_rows}x{self.dim_columns}"

    @classmethod
    def all(cls, num_kv_heads: int, head_dim: int) -> tuple[Tiling, ...]:
        """Every tiling of a geometry, the most square tile first."""
        tilings = [
            cls(hr, num_kv_heads // hr, dr, head_dim // dr)
            for hr in range(1, num_kv_heads + 1)
            if num_kv_heads % hr == 0
            for dr in range(1, head_dim + 1)
            if head_dim % dr == 0
        ]
        return tuple(sorted(tilings, key=lambda t: (max(t.rows, t.columns), t.rows, t)))


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Token tiles in pictures: token = time, three layers = three planes (profile `paper`).

    A *run* holds K or V of three layers: run ``g * kv_factor + k`` has layers ``3 g`` to
    ``3 g + 2`` in planes 0 to 2 (a missing layer is padding) and `run_frames` pictures. Token ``t``
    lies in picture ``t % run_frames`` of its run, in slot ``t // run_frames``, so that the next
    token is in the next picture at the same place. Slots go along rows of `slot_columns`.
    """

    num_layers: int
    kv_factor: int
    num_tokens: int
    tiling: Tiling
    slot_rows: int
    slot_columns: int

    def __post_init__(self) -> None:
        if min(self.slot_rows, self.slot_columns, self.tiling.rows, self.tiling.columns) < 1:
            raise FormatError(f"a tile grid needs tiles and slots, got {self}")

    @classmethod
    def fit(
        cls,
        num_layers: int,
        kv_factor: int,
        num_tokens: int,
        tiling: Tiling,
        *,
        max_width: int,
        max_height: int,
    ) -> TileGrid:
        """The grid with the fewest pictures of at most that size, cropped to what they hold.

        Raises:
            LayoutError: one tile is larger than the picture.
        """
        columns, rows = max_width // tiling.columns, max_height // tiling.rows
        if not columns or not rows:
            raise LayoutError(
                f"a token's tile {tiling.name} of {tiling.columns}x{tiling.rows} does not fit into"
                f" {max_width}x{max_height} pictures; choose a larger frame size"
            )
        frames = -(-num_tokens // (columns * rows))
        slots = -(-num_tokens // frames)
        columns = min(columns, slots)
        return cls(num_layers, kv_factor, num_tokens, tiling, -(-slots // columns), columns)

    @property
    def run_frames(self) -> int:
        """Pictures of one run."""
        return -(-self.num_tokens // (self.slot_rows * self.slot_columns))

    @property
    def num_runs(self) -> int:
        return -(-self.num_layers // NUM_PLANES) * self.kv_factor

    def geometry(self, bit_depth: int) -> PlaneGeometry:
        """The 4:4:4 pictures of this grid, padded to what NVDEC accepts."""
        return PlaneGeometry(
            num_frames=self.num_runs * self.run_frames,
            width=max(self.slot_columns * self.tiling.columns, MIN_SIDE),
            height=max(self.slot_rows * self.tiling.rows, MIN_SIDE),
            bit_depth=bit_depth,
        )

    def place(self, codes: Integers, *, bit_depth: int, padding: int) -> Integers:
        """Codes [Lg, K, H, T, D] -> planes [F, 3, Y, X]; padding is filled with one value."""
        geometry = self.geometry(bit_depth)
        groups, tiling = self.num_runs // self.kv_factor, self.tiling
        heads, dims = codes.shape[2], codes.shape[4]
        slots = self.slot_rows * self.slot_columns
        full = np.full(
            (groups * NUM_PLANES, self.kv_factor, heads, slots * self.run_frames, dims),
            padding,
            geometry.dtype,
        )
        full[: self.num_layers, :, :, : self.num_tokens] = codes
        # g p k hi hj R C f di dj -> g k f p R hi di C hj dj
        axes = full.reshape(
            groups,
            NUM_PLANES,
            self.kv_factor,
            tiling.head_rows,
            tiling.head_columns,
            self.slot_rows,
            self.slot_columns,
            self.run_frames,
            tiling.dim_rows,
            tiling.dim_columns,
        ).transpose(0, 2, 7, 1, 5, 3, 8, 6, 4, 9)
        planes = np.full(geometry.shape, padding, geometry.dtype)
        rows, columns = self.slot_rows * tiling.rows, self.slot_columns * tiling.columns
        planes[:, :, :rows, :columns] = axes.reshape(geometry.num_frames, NUM_PLANES, rows, columns)
        return planes

    def gather(self, planes: Integers) -> Integers:
        """Planes [F, 3, Y, X] -> codes [Lg, K, H, T, D], a new array; exact inverse of `place`."""
        groups, tiling = self.num_runs // self.kv_factor, self.tiling
        heads = tiling.head_rows * tiling.head_columns
        dims = tiling.dim_rows * tiling.dim_columns
        rows, columns = self.slot_rows * tiling.rows, self.slot_columns * tiling.columns
        axes = planes[:, :, :rows, :columns].reshape(
            groups,
            self.kv_factor,
            self.run_frames,
            NUM_PLANES,
            self.slot_rows,
            tiling.head_rows,
            tiling.dim_rows,
            self.slot_columns,
            tiling.head_columns,
            tiling.dim_columns,
        )
        # g k f p R hi di C hj dj -> g p k hi hj R C f di dj
        full = axes.transpose(0, 3, 1, 5, 8, 4, 7, 2, 6, 9).reshape(
            groups * NUM_PLANES, self.kv_factor, heads, -1, dims
        )
        return np.ascontiguousarray(full[: self.num_layers, :, :, : self.num_tokens])
