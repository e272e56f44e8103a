import numpy as np
import pytest

from kvfetcher.codec.layout import RowGrid, TileGrid, Tiling
from kvfetcher.errors import FormatError, LayoutError


def test_rows_are_interleaved_over_planes_and_padded_to_what_nvdec_takes():
    grid = RowGrid(num_rows=7, num_columns=5, frame_rows=3, frame_columns=5)
    rows = np.arange(35, dtype=np.uint8).reshape(7, 5)
    planes = grid.place(rows, bit_depth=8, padding=99)
    assert planes.shape == (1, 3, 144, 144)
    assert (planes[0, 0, 0, :5] == rows[0]).all()
    assert (planes[0, 1, 0, :5] == rows[1]).all()
    assert (planes[0, 0, 2, :5] == rows[6]).all()
    assert (planes[0, 1, 2] == 99).all()
    assert (planes[0, :, :, 5:] == 99).all()


@pytest.mark.parametrize(
    ("rows", "columns", "max_rows", "max_columns"),
    [
        (1, 1, 8192, 8192),
        (10, 7, 1, 1),
        (10, 7, 3, 4),
        (500, 300, 8192, 8192),
        (431, 289, 50, 100),
        (432, 144, 8192, 8192),
    ],
)
def test_row_grid_round_trip(rows, columns, max_rows, max_columns):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 1024, (rows, columns)).astype(np.uint16)
    grid = RowGrid.fit(rows, columns, max_frame_rows=max_rows, max_frame_columns=max_columns)
    planes = grid.place(data, bit_depth=10, padding=0)
    assert planes.shape == grid.geometry(10).shape
    assert grid.frame_rows <= max_rows
    assert grid.frame_columns <= max_columns
    assert (grid.gather(planes) == data).all()
    order = rng.permutation(rows)
    assert (grid.gather(planes, order) == data[order]).all()


def test_row_grid_refuses_other_shapes():
    grid = RowGrid(3, 4, 1, 4)
    with pytest.raises(LayoutError, match=r"rows must be \(3, 4\) uint8"):
        grid.place(np.zeros((4, 3), np.uint8), bit_depth=8, padding=0)
    with pytest.raises(LayoutError, match="rows must be"):
        grid.place(np.zeros((3, 4), np.uint16), bit_depth=8, padding=0)


@pytest.mark.parametrize("sides", [(0, 1), (1, 0), (8193, 1), (1, 8193)])
def test_row_grid_refuses_impossible_pictures(sides):
    with pytest.raises(FormatError, match="1 to 8192"):
        RowGrid(3, 4, *sides)


def test_tile_keeps_heads_whole_and_apart():
    tiling = Tiling(head_rows=2, head_columns=1, dim_rows=2, dim_columns=3)
    assert (tiling.name, tiling.rows, tiling.columns) == ("h2x1_d2x3", 4, 3)
    codes = np.arange(12, dtype=np.uint8).reshape(1, 1, 2, 1, 6)
    grid = TileGrid(1, 1, 1, tiling, slot_rows=1, slot_columns=1)
    planes = grid.place(codes, bit_depth=8, padding=0)
    assert planes[0, 0, :4, :3].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_next_token_is_in_the_next_picture_at_the_same_place():
    codes = np.arange(6, dtype=np.uint8).reshape(1, 1, 1, 6, 1)
    grid = TileGrid(1, 1, 6, Tiling(1, 1, 1, 1), slot_rows=1, slot_columns=2)
    planes = grid.place(codes, bit_depth=8, padding=0)
    assert planes[:, 0, 0, :2].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_three_layers_are_three_planes_and_a_missing_one_is_padding():
    codes = np.arange(8, dtype=np.uint8).reshape(4, 2, 1, 1, 1)
    grid = TileGrid(4, 2, 1, Tiling(1, 1, 1, 1), slot_rows=1, slot_columns=1)
    planes = grid.place(codes, bit_depth=8, padding=77)
    # runs: K of layers 0-2, V of layers 0-2, K of layer 3, V of layer 3
    assert planes[:, :, 0, 0].tolist() == [[0, 2, 4], [1, 3, 5], [6, 77, 77], [7, 77, 77]]


@pytest.mark.parametrize("tiling", Tiling.all(4, 6))
@pytest.mark.parametrize(("layers", "factor", "tokens"), [(1, 1, 1), (5, 2, 13), (3, 2, 300)])
def test_tile_grid_round_trip(tiling, layers, factor, tokens):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (layers, factor, 4, tokens, 6)).astype(np.uint8)
    grid = TileGrid.fit(layers, factor, tokens, tiling, max_width=160, max_height=150)
    planes = grid.place(codes, bit_depth=8, padding=128)
    assert planes.shape[2] <= 150
    assert planes.shape[3] <= 160
    assert (grid.gather(planes) == codes).all()


def test_tilings_are_all_factorisations_most_square_first():
    tilings = Tiling.all(2, 4)
    sides = [max(t.rows, t.columns) for t in tilings]
    assert sides == sorted(sides)
    assert sorted(t.name for t in tilings) == sorted(
        f"h{h}_d{d}" for h in ("1x2", "2x1") for d in ("1x4", "2x2", "4x1")
    )
    assert "h1x8_d32x4" in {t.name for t in Tiling.all(8, 128)}


def test_tile_larger_than_the_picture_is_refused():
    with pytest.raises(LayoutError, match=r"h1x1_d1x512 of 512x1 does not fit into 320x144"):
        TileGrid.fit(1, 2, 8, Tiling(1, 1, 1, 512), max_width=320, max_height=144)
