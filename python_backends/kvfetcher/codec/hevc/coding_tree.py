"""Tokens of one coding tree unit: one lossless intra CU of 32x32 and its transform tree (7.3.8.5 to .12)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numba import njit

from kvfetcher.codec.hevc import tables
from kvfetcher.codec.hevc.cabac import BYPASS
from kvfetcher.codec.hevc.prediction import dc_value, distance, filtered_dc_residuals
from kvfetcher.codec.hevc.residual_coding import find_coefficients, put_residual_coding

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOG2_CTB = 5
CTB = 1 << LOG2_CTB
BLOCKS = 64
"""Sub-blocks of 4x4 in a transform block of 32x32."""

_BYPASS_FLAG = tables.CU_TRANSQUANT_BYPASS_FLAG << 1 | 1
_PART_2NX2N = tables.PART_MODE << 1 | 1
_PCM_FLAG = tables.TERMINATE << 1
_PREV_INTRA = tables.PREV_INTRA_LUMA_PRED_FLAG << 1 | 1
_MPM_IDX_1 = BYPASS | 0b110
_CHROMA_AS_LUMA = tables.INTRA_CHROMA_PRED_MODE << 1
_SPLIT = tables.SPLIT_TRANSFORM_FLAG
_CBF_LUMA = tables.CBF_LUMA
_CBF_CHROMA = tables.CBF_CHROMA


@njit(nogil=True)
def put_cu_header(tokens: NDArray[Any], has_pcm: bool) -> int:
    """coding_unit() up to its prediction modes, which are DC for luma and chroma.

    All CUs are DC, or missing or PCM and taken for it, so that the most probable modes are planar, DC
    and vertical (8.4.2): mpm_idx 1.

    Args:
        tokens: uint16; written from 0 on.
        has_pcm: whether the stream has pcm_flag, which is 0 here.

    Returns:
        Number of tokens.
    """
    tokens[0] = _BYPASS_FLAG
    tokens[1] = _PART_2NX2N
    to = 2
    if has_pcm:
        tokens[2] = _PCM_FLAG
        to = 3
    tokens[to] = _PREV_INTRA
    tokens[to + 1] = _MPM_IDX_1
    tokens[to + 2] = _CHROMA_AS_LUMA
    return to + 3


@njit(nogil=True)
def put_coding_tree(
    samples: NDArray[Any],
    row: int,
    column: int,
    planes: NDArray[Any],
    grey: int,
    can_split: bool,
    has_pcm: bool,
    residuals: NDArray[Any],
    masks: NDArray[Any],
    tile: NDArray[Any],
    statistics: NDArray[Any],
    tokens: NDArray[Any],
) -> int:
    """Tokens of the CTU, without the terminating bins; returns their number.

    Args:
        samples: 1-D, three planes of whole CTUs.
        row: of the CTU.
        column: of the CTU.
        planes: [3, 3] int64: of each plane its first sample, its stride, and log2 of its CTBs' side.
        grey: ``1 << (BitDepth - 1)``.
        can_split: whether edge blocks may be split (4:4:4).
        has_pcm: whether the stream has pcm_flag.
        residuals: [3 * 1024] int16, scratch.
        masks: [3 * BLOCKS] int64, scratch.
        tile: [256] int16, scratch.
        statistics: [2] int64, StatCoeff; updated.
        tokens: uint16, with room.
    """
    has_left, has_above = column > 0, row > 0
    dc0, dc1, dc2 = grey, grey, grey
    off_dc = 0
    off_grey = 0
    is_edge = can_split and has_left != has_above
    for c_idx in range(3):
        size = 1 << planes[c_idx, 2]
        at = planes[c_idx, 0] + row * size * planes[c_idx, 1] + column * size
        stride = planes[c_idx, 1]
        dc = dc_value(samples, at, stride, planes[c_idx, 2], has_left, has_above, grey)
        if c_idx == 0:
            dc0 = dc
        elif c_idx == 1:
            dc1 = dc
        else:
            dc2 = dc
        if is_edge:
            off_dc += distance(samples, at, stride, size, dc)
            off_grey += distance(samples, at, stride, size, grey)
    to = put_cu_header(tokens, has_pcm)
    if is_edge and off_dc > off_grey + (off_grey >> 5):
        return _put_split_tree(
            samples,
            row,
            column,
            planes,
            grey,
            has_left,
            has_above,
            residuals,
            masks,
            tile,
            statistics,
            tokens,
            to,
        )

    last0, last1, last2 = -1, -1, -1
    for c_idx in range(3):
        log2_size, stride = planes[c_idx, 2], planes[c_idx, 1]
        at = planes[c_idx, 0] + ((row * stride + column) << log2_size)
        dc = dc0 if c_idx == 0 else dc1 if c_idx == 1 else dc2
        last = find_coefficients(
            samples, at, stride, log2_size, dc, residuals, masks, BLOCKS * c_idx
        )
        if c_idx == 0:
            last0 = last
        elif c_idx == 1:
            last1 = last
        else:
            last2 = last
    if can_split:
        tokens[to] = _SPLIT << 1
        to += 1
    tokens[to] = (_CBF_CHROMA << 1) | (1 if last1 >= 0 else 0)
    tokens[to + 1] = (_CBF_CHROMA << 1) | (1 if last2 >= 0 else 0)
    tokens[to + 2] = ((_CBF_LUMA + 1) << 1) | (1 if last0 >= 0 else 0)
    to += 3
    for c_idx in range(3):
        last = last0 if c_idx == 0 else last1 if c_idx == 1 else last2
        if last >= 0:
            to = put_residual_coding(
                residuals,
                masks,
                BLOCKS * c_idx,
                last,
                planes[c_idx, 2],
                c_idx,
                statistics,
                tokens,
                to,
            )
    return to


@njit(nogil=True)
def _find_small_block(
    samples: NDArray[Any],
    at: int,
    stride: int,
    log2_size: int,
    has_left: bool,
    has_above: bool,
    grey: int,
    c_idx: int,
    residuals: NDArray[Any],
    masks: NDArray[Any],
    tile: NDArray[Any],
    block: int,
) -> int:
    """`find_coefficients` of a block of 8x8 or 16x16 with its own prediction."""
    dc = dc_value(samples, at, stride, log2_size, has_left, has_above, grey)
    if c_idx:
        return find_coefficients(samples, at, stride, log2_size, dc, residuals, masks, block)
    filtered_dc_residuals(samples, at, stride, log2_size, has_left, has_above, dc, tile, 0)
    return find_coefficients(tile, 0, 1 << log2_size, log2_size, 0, residuals, masks, block)


@njit(nogil=True)
def _put_split_tree(
    samples: NDArray[Any],
    row: int,
    column: int,
    planes: NDArray[Any],
    grey: int,
    has_left: bool,
    has_above: bool,
    residuals: NDArray[Any],
    masks: NDArray[Any],
    tile: NDArray[Any],
    statistics: NDArray[Any],
    tokens: NDArray[Any],
    to: int,
) -> int:
    """transform_tree() of an edge CTU: blocks of 8x8 along the edge, of 16x16 elsewhere.

    Block ``4 * quarter + part`` of a component has room for 4 sub-blocks, a quarter for 16.
    """
    lasts = masks[3 * BLOCKS :]
    coded0, coded1, coded2 = 0, 0, 0  # bit 4 * quarter + part
    for c_idx in range(3):
        stride = planes[c_idx, 1]
        base = planes[c_idx, 0] + CTB * (row * stride + column)
        coded = 0
        for quarter in range(4):
            x, y = 16 * (quarter & 1), 16 * (quarter >> 1)
            is_cut = (x == 0 and not has_left) or (y == 0 and not has_above)
            log2_size = 3 if is_cut else 4
            for part in range(4 if is_cut else 1):
                x_part, y_part = x + 8 * (part & 1), y + 8 * (part >> 1)
                index = 4 * quarter + part
                last = _find_small_block(
                    samples,
                    base + y_part * stride + x_part,
                    stride,
                    log2_size,
                    has_left or x_part > 0,
                    has_above or y_part > 0,
                    grey,
                    c_idx,
                    residuals,
                    masks,
                    tile,
                    BLOCKS * c_idx + 4 * index,
                )
                lasts[16 * c_idx + index] = last
                if last >= 0:
                    coded |= 1 << index
        if c_idx == 0:
            coded0 = coded
        elif c_idx == 1:
            coded1 = coded
        else:
            coded2 = coded
    tokens[to] = (_SPLIT << 1) | 1
    tokens[to + 1] = (_CBF_CHROMA << 1) | (1 if coded1 else 0)
    tokens[to + 2] = (_CBF_CHROMA << 1) | (1 if coded2 else 0)
    to += 3
    for quarter in range(4):
        x, y = 16 * (quarter & 1), 16 * (quarter >> 1)
        is_cut = (x == 0 and not has_left) or (y == 0 and not has_above)
        log2_size = 3 if is_cut else 4
        tokens[to] = ((_SPLIT + 1) << 1) | (1 if is_cut else 0)
        to += 1
        quarter1 = (coded1 >> (4 * quarter)) & 15
        quarter2 = (coded2 >> (4 * quarter)) & 15
        if coded1:
            tokens[to] = ((_CBF_CHROMA + 1) << 1) | (1 if quarter1 else 0)
            to += 1
        if coded2:
            tokens[to] = ((_CBF_CHROMA + 1) << 1) | (1 if quarter2 else 0)
            to += 1
        for part in range(4 if is_cut else 1):
            index = 4 * quarter + part
            if is_cut and quarter1:
                tokens[to] = ((_CBF_CHROMA + 2) << 1) | ((coded1 >> index) & 1)
                to += 1
            if is_cut and quarter2:
                tokens[to] = ((_CBF_CHROMA + 2) << 1) | ((coded2 >> index) & 1)
                to += 1
            tokens[to] = (_CBF_LUMA << 1) | ((coded0 >> index) & 1)
            to += 1
            for c_idx in range(3):
                last = lasts[16 * c_idx + index]
                if last >= 0:
                    to = put_residual_coding(
                        residuals,
                        masks,
                        BLOCKS * c_idx + 4 * index,
                        last,
                        log2_size,
                        c_idx,
                        statistics,
                        tokens,
                        to,
                    )
    return to
