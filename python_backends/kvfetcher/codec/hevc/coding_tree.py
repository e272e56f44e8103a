"""Tokens of one coding tree unit: one lossless intra CU of 32x32 and its transform tree (7.3.8.5 to .12)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numba import njit

from kvfetcher.codec.hevc import tables
from kvfetcher.codec.hevc.cabac import BYPASS
from kvfetcher.codec.hevc.prediction import dc_value, filtered_dc_residuals
from kvfetcher.codec.hevc.residual_coding import find_coefficients, put_residual_coding
from kvfetcher.codec.hevc.vectors import distance_16x16

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
_SPLIT_COST = 24
"""Of a split transform tree, in units of the sum of absolute residuals; 0 to 48 are much the same."""


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
        row: row of the CTU.
        column: column of the CTU.
        planes: [3, 3] int64: of each plane its first sample, its stride, and log2 of its CTBs' side.
        grey: ``1 << (BitDepth - 1)``.
        can_split: whether transform blocks may be split (4:4:4).
        has_pcm: whether the stream has pcm_flag.
        residuals: [3 * 1024] int16, scratch.
        masks: [3 * BLOCKS + 12] int64, scratch.
        tile: [256] int16, scratch.
        statistics: [2] int64, StatCoeff; updated.
        tokens: uint16, with room.
    """
    lasts = masks[3 * BLOCKS :]
    to = put_cu_header(tokens, has_pcm)
    if can_split and _is_better_split(samples, row, column, planes, grey):
        num_parts, shrink, blocks = 4, 1, BLOCKS // 4
    else:
        num_parts, shrink, blocks = 1, 0, BLOCKS
    coded0, coded1, coded2 = 0, 0, 0  # cbf_luma, cbf_cb, cbf_cr: a bit for each part
    for c_idx in range(3):
        log2_size, stride = planes[c_idx, 2] - shrink, planes[c_idx, 1]
        first = planes[c_idx, 0] + ((row * stride + column) << planes[c_idx, 2])
        coded = 0
        for part in range(num_parts):
            x, y = (part & 1) << log2_size, (part >> 1) << log2_size
            at = first + y * stride + x
            has_left, has_above = column > 0 or x > 0, row > 0 or y > 0
            dc = dc_value(samples, at, stride, log2_size, has_left, has_above, grey)
            block = BLOCKS * c_idx + blocks * part
            if c_idx == 0 and shrink:
                filtered_dc_residuals(
                    samples, at, stride, log2_size, has_left, has_above, dc, tile, 0
                )
                last = find_coefficients(
                    tile, 0, 1 << log2_size, log2_size, 0, residuals, masks, block
                )
            else:
                last = find_coefficients(
                    samples, at, stride, log2_size, dc, residuals, masks, block
                )
            lasts[4 * c_idx + part] = last
            if last >= 0:
                coded |= 1 << part
        if c_idx == 0:
            coded0 = coded
        elif c_idx == 1:
            coded1 = coded
        else:
            coded2 = coded

    # transform_tree() (7.3.8.8): context 5 - log2TrafoSize is 0, and trafoDepth 0 or `shrink`
    if can_split:
        tokens[to] = (tables.SPLIT_TRANSFORM_FLAG << 1) | shrink
        to += 1
    tokens[to] = (tables.CBF_CHROMA << 1) | (1 if coded1 else 0)
    tokens[to + 1] = (tables.CBF_CHROMA << 1) | (1 if coded2 else 0)
    to += 2
    for part in range(num_parts):
        if shrink and coded1:
            tokens[to] = ((tables.CBF_CHROMA + 1) << 1) | ((coded1 >> part) & 1)
            to += 1
        if shrink and coded2:
            tokens[to] = ((tables.CBF_CHROMA + 1) << 1) | ((coded2 >> part) & 1)
            to += 1
        tokens[to] = ((tables.CBF_LUMA + 1 - shrink) << 1) | ((coded0 >> part) & 1)
        to += 1
        for c_idx in range(3):
            last = lasts[4 * c_idx + part]
            if last >= 0:
                to = put_residual_coding(
                    residuals,
                    masks,
                    BLOCKS * c_idx + blocks * part,
                    last,
                    planes[c_idx, 2] - shrink,
                    c_idx,
                    statistics,
                    tokens,
                    to,
                )
    return to


@njit(nogil=True)
def _is_better_split(
    samples: NDArray[Any], row: int, column: int, planes: NDArray[Any], grey: int
) -> bool:
    """Whether four blocks of 16x16 of each component are nearer to their DC than one of 32x32.

    By the sum of absolute residuals, without the filter of luma's edges. Counting bits instead (H.265
    with the contexts' states) saves 0.03 % more (SmolLM2-135M, all profiles).
    """
    off_whole = 0
    off_split = 0
    for c_idx in range(3):
        stride = planes[c_idx, 1]
        first = planes[c_idx, 0] + CTB * (row * stride + column)
        whole = dc_value(samples, first, stride, LOG2_CTB, column > 0, row > 0, grey)
        for part in range(4):
            x, y = 16 * (part & 1), 16 * (part >> 1)
            at = first + y * stride + x
            has_left, has_above = column > 0 or x > 0, row > 0 or y > 0
            dc = dc_value(samples, at, stride, 4, has_left, has_above, grey)
            if dc != whole:
                off_whole += distance_16x16(samples, at, stride, whole)
                off_split += distance_16x16(samples, at, stride, dc)
    return off_split + _SPLIT_COST < off_whole
