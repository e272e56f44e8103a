"""Intra prediction of mode DC (H.265, 8.4.4.2): lossless, so that the samples are the neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numba import njit

from kvfetcher.codec.hevc.vectors import as_int

if TYPE_CHECKING:
    from numpy.typing import NDArray


@njit(nogil=True)
def dc_value(
    samples: NDArray[Any],
    at: int,
    stride: int,
    log2_size: int,
    has_left: bool,
    has_above: bool,
    grey: int,
) -> int:
    """The value dcVal of a block (8.4.4.2.5), neighbours that are missing substituted (8.4.4.2.2).

    Args:
        samples: 1-D, one plane after the other.
        at: index of the block's first sample.
        stride: samples from one row to the next.
        log2_size: of the block.
        has_left: whether the column to the left is of this picture.
        has_above: whether the row above is.
        grey: ``1 << (BitDepth - 1)``, which stands for neighbours where there are none.
    """
    if not has_left and not has_above:
        return grey
    size = 1 << log2_size
    total = 0
    if has_left:
        for y in range(size):
            total += as_int(samples[at + y * stride - 1])
    else:
        total += size * as_int(samples[at - stride])
    if has_above:
        for x in range(size):
            total += as_int(samples[at - stride + x])
    else:
        total += size * as_int(samples[at - 1])
    return (total + size) >> (log2_size + 1)


@njit(nogil=True)
def filtered_dc_residuals(
    samples: NDArray[Any],
    at: int,
    stride: int,
    log2_size: int,
    has_left: bool,
    has_above: bool,
    dc: int,
    out: NDArray[Any],
    to: int,
) -> None:
    """Residuals of a luma block below 32x32, whose first row and column are filtered (8.4.4.2.5).

    Args:
        samples: as of `dc_value`, as are `at`, `stride`, `log2_size`, `has_left` and `has_above`.
        dc: from `dc_value`.
        out: int16, rows of ``1 << log2_size``.
        to: index of the first residual.
    """
    size = 1 << log2_size
    for y in range(size):
        row = at + y * stride
        for x in range(size):
            out[to + (y << log2_size) + x] = as_int(samples[row + x]) - dc
    if not has_left and not has_above:
        return  # every neighbour is grey, and so is dc
    for k in range(size):
        left = as_int(samples[at + k * stride - 1]) if has_left else as_int(samples[at - stride])
        above = as_int(samples[at - stride + k]) if has_above else as_int(samples[at - 1])
        if k == 0:
            out[to] = as_int(samples[at]) - ((left + 2 * dc + above + 2) >> 2)
        else:
            out[to + k] = as_int(samples[at + k]) - ((above + 3 * dc + 2) >> 2)
            row = to + (k << log2_size)
            out[row] = as_int(samples[at + k * stride]) - ((left + 3 * dc + 2) >> 2)
