"""Constant tables of the slice data: contexts, their first states, scans, sub-block contexts.

Names and numbers are those of ITU-T H.265 (clause 9.3 unless said otherwise). Only what an intra
picture of this coder needs is here: initType 0 (I slices), diagonal scan, blocks of 8 to 32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# First context of each syntax element in this coder's numbering.
TERMINATE = 0
"""end_of_slice_segment_flag, end_of_subset_one_bit and pcm_flag (9.3.4.3.5): a state that never changes."""
CU_TRANSQUANT_BYPASS_FLAG = 1
PART_MODE = 2
PREV_INTRA_LUMA_PRED_FLAG = 3
INTRA_CHROMA_PRED_MODE = 4
SPLIT_TRANSFORM_FLAG = 5
CBF_LUMA = 8
CBF_CHROMA = 10
LAST_SIG_COEFF_X_PREFIX = 15
LAST_SIG_COEFF_Y_PREFIX = 33
CODED_SUB_BLOCK_FLAG = 51
SIG_COEFF_FLAG = 55
COEFF_ABS_LEVEL_GREATER1_FLAG = 97
COEFF_ABS_LEVEL_GREATER2_FLAG = 121
NUM_CONTEXTS = 127

_LAST_PREFIX = (110, 110, 124, 125, 140, 153, 125, 127, 140, 109, 111, 143, 127, 111, 79, 108, 123)
# initValue of each context, initType 0 (tables 9-5 to 9-37).
_INIT_VALUES: dict[int, tuple[int, ...]] = {
    CU_TRANSQUANT_BYPASS_FLAG: (154,),
    PART_MODE: (184,),
    PREV_INTRA_LUMA_PRED_FLAG: (184,),
    INTRA_CHROMA_PRED_MODE: (63,),
    SPLIT_TRANSFORM_FLAG: (153, 138, 138),
    CBF_LUMA: (111, 141),
    CBF_CHROMA: (94, 138, 182, 154, 154),
    LAST_SIG_COEFF_X_PREFIX: (*_LAST_PREFIX, 63),
    LAST_SIG_COEFF_Y_PREFIX: (*_LAST_PREFIX, 63),
    CODED_SUB_BLOCK_FLAG: (91, 171, 134, 141),
    SIG_COEFF_FLAG: (
        *(111, 111, 125, 110, 110, 94, 124, 108, 124, 107, 125, 141, 179, 153, 125, 107, 125, 141),
        *(179, 153, 125, 107, 125, 141, 179, 153, 125, 140, 139, 182, 182, 152, 136, 152, 136, 153),
        *(136, 139, 111, 136, 139, 111),
    ),
    COEFF_ABS_LEVEL_GREATER1_FLAG: (
        *(140, 92, 137, 138, 140, 152, 138, 139, 153, 74, 149, 92),
        *(139, 107, 122, 152, 140, 179, 166, 182, 140, 227, 122, 197),
    ),
    COEFF_ABS_LEVEL_GREATER2_FLAG: (138, 153, 136, 167, 152, 152),
}

SLICE_QP = 26
"""SliceQpY. No coefficient is quantised: it sets nothing but the contexts' first states."""


def first_states() -> NDArray[np.uint8]:
    """[NUM_CONTEXTS] ``pStateIdx << 1 | valMps`` at the start of a slice (9.3.2.2)."""
    states = np.zeros(NUM_CONTEXTS, np.uint8)
    states[TERMINATE] = 63 << 1
    for start, values in _INIT_VALUES.items():
        for index, value in enumerate(values, start):
            slope, offset = (value >> 4) * 5 - 45, ((value & 15) << 3) - 16
            pre = min(max(((slope * SLICE_QP) >> 4) + offset, 1), 126)
            states[index] = (pre - 64) << 1 | 1 if pre > 63 else (63 - pre) << 1
    return states


# Table 9-52: rangeTabLps, [pStateIdx][qRangeIdx].
_RANGE_LPS = (
    *(128, 176, 208, 240, 128, 167, 197, 227, 128, 158, 187, 216, 123, 150, 178, 205),
    *(116, 142, 169, 195, 111, 135, 160, 185, 105, 128, 152, 175, 100, 122, 144, 166),
    *(95, 116, 137, 158, 90, 110, 130, 150, 85, 104, 123, 142, 81, 99, 117, 135),
    *(77, 94, 111, 128, 73, 89, 105, 122, 69, 85, 100, 116, 66, 80, 95, 110),
    *(62, 76, 90, 104, 59, 72, 86, 99, 56, 69, 81, 94, 53, 65, 77, 89),
    *(51, 62, 73, 85, 48, 59, 69, 80, 46, 56, 66, 76, 43, 53, 63, 72),
    *(41, 50, 59, 69, 39, 48, 56, 65, 37, 45, 54, 62, 35, 43, 51, 59),
    *(33, 41, 48, 56, 32, 39, 46, 53, 30, 37, 43, 50, 29, 35, 41, 48),
    *(27, 33, 39, 45, 26, 31, 37, 43, 24, 30, 35, 41, 23, 28, 33, 39),
    *(22, 27, 32, 37, 21, 26, 30, 35, 20, 24, 29, 33, 19, 23, 27, 31),
    *(18, 22, 26, 30, 17, 21, 25, 28, 16, 20, 23, 27, 15, 19, 22, 25),
    *(14, 18, 21, 24, 14, 17, 20, 23, 13, 16, 19, 22, 12, 15, 18, 21),
    *(12, 14, 17, 20, 11, 14, 16, 19, 11, 13, 15, 18, 10, 12, 15, 17),
    *(10, 12, 14, 16, 9, 11, 13, 15, 9, 11, 12, 14, 8, 10, 12, 14),
    *(8, 9, 11, 13, 7, 9, 11, 12, 7, 9, 10, 12, 7, 8, 10, 11),
    *(6, 8, 9, 11, 6, 7, 9, 10, 6, 7, 8, 9, 2, 2, 2, 2),
)
# Table 9-53: transIdxLps.
_NEXT_STATE_LPS = (
    *(0, 0, 1, 2, 2, 4, 4, 5, 6, 7, 8, 9, 9, 11, 11, 12, 13, 13, 15, 15, 16, 16, 18, 18, 19, 19),
    *(21, 21, 22, 22, 23, 24, 24, 25, 26, 26, 27, 27, 28, 29, 29, 30, 30, 30, 31, 32, 32, 33),
    *(33, 33, 34, 34, 35, 35, 35, 36, 36, 36, 37, 37, 37, 38, 38, 63),
)
STATE_MASK = 127
LPS_BIT = 40


def _bin_table() -> NDArray[np.int64]:
    """[state << 1 | bin]: what coding `bin` in `state` does.

    Bits 0 to 31: rangeTabLps of qRangeIdx 0 to 3, a byte each; 32 to 38: the next state; 40: whether
    `bin` is the less probable symbol.
    """
    table = np.zeros(256, np.int64)
    for state in range(128):
        index, mps = state >> 1, state & 1
        for value in range(2):
            if value == mps:
                after, is_lps = min(index + 1, 62) << 1 | mps if index < 63 else state, 0
            else:
                after, is_lps = _NEXT_STATE_LPS[index] << 1 | (mps ^ (index == 0)), 1
            packed = sum(_RANGE_LPS[4 * index + q] << (8 * q) for q in range(4))
            table[state << 1 | value] = packed | after << 32 | is_lps << LPS_BIT
    return table


BIN_TABLE = _bin_table()


def up_right_diagonal(size: int) -> list[tuple[int, int]]:
    """(x, y) of the positions of a size x size block in coding order (6.5.3)."""
    return [
        (x, diagonal - x)
        for diagonal in range(2 * size - 1)
        for x in range(size)
        if 0 <= diagonal - x < size
    ]


SCAN_4X4 = tuple(up_right_diagonal(4))

MAX_SUB_BLOCKS = 64


def _sub_block_scans() -> tuple[NDArray[np.int64], ...]:
    """Of transform blocks of 4 << k samples a side: x, y, and bits of the neighbours.

    Bits are numbered ``8 * y + x``; right and below are 0 where the block ends.
    """
    x = np.zeros((4, MAX_SUB_BLOCKS), np.int64)
    y, own, right, below = (np.zeros_like(x) for _ in range(4))
    for k in range(4):
        side = 1 << k
        for i, (column, row) in enumerate(up_right_diagonal(side)):
            x[k, i], y[k, i] = column, row
            own[k, i] = np.uint64(1 << (8 * row + column)).astype(np.int64)
            if column + 1 < side:
                right[k, i] = np.uint64(1 << (8 * row + column + 1)).astype(np.int64)
            if row + 1 < side:
                below[k, i] = np.uint64(1 << (8 * row + column + 8)).astype(np.int64)
    return x, y, own, right, below


SUB_BLOCK_X, SUB_BLOCK_Y, SUB_BLOCK_BIT, RIGHT_BIT, BELOW_BIT = _sub_block_scans()


def sig_coeff_ctx_inc(c_idx: int, log2_size: int, sub_block_0: bool, pattern: int, n: int) -> int:
    """The ctxInc of sig_coeff_flag at scan position `n` of a sub-block (9.3.4.2.5).

    Args:
        c_idx: 0 luma, 1 and 2 chroma.
        log2_size: of the transform block, 3 to 5.
        sub_block_0: whether it is the sub-block of the first coefficients.
        pattern: csbfCtx: 1 = the right one is coded, 2 = the one below.
        n: 0 to 15.
    """
    x, y = SCAN_4X4[n]
    if n == 0 and sub_block_0:
        sig_ctx = 0
    else:
        if pattern == 0:
            sig_ctx = 2 if x + y == 0 else 1 if x + y < 3 else 0
        elif pattern == 3:
            sig_ctx = 2
        else:
            along = y if pattern == 1 else x
            sig_ctx = 2 if along == 0 else 1 if along == 1 else 0
        if c_idx == 0:
            sig_ctx += 0 if sub_block_0 else 3
            sig_ctx += 9 if log2_size == 3 else 21
        else:
            sig_ctx += 9 if log2_size == 3 else 12
    return sig_ctx if c_idx == 0 else 27 + sig_ctx


def _sig_coeff_tokens() -> NDArray[np.uint16]:
    """[chroma << 4 | (size is 8) << 3 | (sub-block 0) << 2 | pattern, k]: context << 1 of position 15 - k."""
    table = np.zeros((32, 16), np.uint16)
    for row in range(32):
        chroma, is_8, is_first, pattern = row >> 4, row >> 3 & 1, row >> 2 & 1, row & 3
        for k in range(16):
            inc = sig_coeff_ctx_inc(chroma, 3 if is_8 else 5, bool(is_first), pattern, 15 - k)
            table[row, k] = (SIG_COEFF_FLAG + inc) << 1
    return table


SIG_COEFF_TOKENS = _sig_coeff_tokens()


def _last_positions() -> tuple[NDArray[np.int64], ...]:
    """Prefix, number of suffix bits and suffix of last_sig_coeff_x and _y, 0 to 31 (7.4.9.11)."""
    prefix, bits, suffix = (np.zeros(32, np.int64) for _ in range(3))
    for position in range(32):
        prefix[position] = position
        for candidate in range(4, 10):
            count = (candidate >> 1) - 1
            base = (1 << count) * (2 + (candidate & 1))
            if base <= position < base + (1 << count):
                prefix[position], bits[position] = candidate, count
                suffix[position] = position - base
    return prefix, bits, suffix


LAST_PREFIX, LAST_SUFFIX_BITS, LAST_SUFFIX = _last_positions()
SCAN_X = np.array([x for x, _ in SCAN_4X4])
SCAN_Y = np.array([y for _, y in SCAN_4X4])
