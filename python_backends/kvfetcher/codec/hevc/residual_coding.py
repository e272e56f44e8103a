"""Binarisation of residual_coding() (H.265, 7.3.8.11) of a transform block coded without transform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numba import njit

from kvfetcher.codec.hevc.cabac import BYPASS, MAX_BYPASS_BITS
from kvfetcher.codec.hevc.tables import (
    BELOW_BIT,
    CODED_SUB_BLOCK_FLAG,
    COEFF_ABS_LEVEL_GREATER1_FLAG,
    COEFF_ABS_LEVEL_GREATER2_FLAG,
    LAST_PREFIX,
    LAST_SIG_COEFF_X_PREFIX,
    LAST_SIG_COEFF_Y_PREFIX,
    LAST_SUFFIX,
    LAST_SUFFIX_BITS,
    RIGHT_BIT,
    SCAN_X,
    SCAN_Y,
    SIG_COEFF_TOKENS,
    SUB_BLOCK_BIT,
    SUB_BLOCK_X,
    SUB_BLOCK_Y,
)
from kvfetcher.codec.hevc.vectors import as_int, lowest_bit, put_sig_coeff_flags, residual_4x4

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ONLY_FIRST = 1 << 15
"""Mask of a sub-block whose one coefficient that is not 0 is at scan position 0."""
_NEXT_GREATER1 = 0x03030200
"""greater1Ctx after itself and a flag (9.3.4.2.6), 4 bits each: [greater1Ctx << 1 | flag]."""
_SIG_COEFF_TOKENS = SIG_COEFF_TOKENS.reshape(-1)


@njit(nogil=True)
def find_coefficients(
    samples: NDArray[Any],
    at: int,
    stride: int,
    log2_size: int,
    prediction: int,
    residuals: NDArray[Any],
    masks: NDArray[Any],
    block: int,
) -> int:
    """Residuals of a transform block, which are its coefficients, in coding order.

    Args:
        samples: 1-D; `at` and `stride` say where the block lies.
        at: index of the block's first sample.
        stride: samples from one row to the next.
        log2_size: of the block, 3 to 5.
        prediction: value predicted for every sample.
        residuals: int16; sub-block i is written at ``16 * (block + i)``.
        masks: int64; which of a sub-block's coefficients are not 0 is written at ``block + i``.
        block: index of the block's first sub-block.

    Returns:
        The last sub-block that is not all 0; -1 = all are.
    """
    kind = log2_size - 2
    last = -1
    for i in range(1 << (2 * kind)):
        first = at + 4 * (SUB_BLOCK_Y[kind, i] * stride + SUB_BLOCK_X[kind, i])
        mask = residual_4x4(samples, first, stride, prediction, residuals, 16 * (block + i))
        masks[block + i] = mask
        if mask:
            last = i
    return last


@njit(nogil=True)
def put_residual_coding(
    residuals: NDArray[Any],
    masks: NDArray[Any],
    block: int,
    last: int,
    log2_size: int,
    c_idx: int,
    statistics: NDArray[Any],
    tokens: NDArray[Any],
    to: int,
) -> int:
    """Tokens of one transform block; returns the index behind the last.

    Args:
        residuals: from `find_coefficients`, as are `masks` and `last`.
        masks: see there.
        block: index of the block's first sub-block.
        last: the last sub-block that is not all 0, 0 or more.
        log2_size: of the block, 3 to 5.
        c_idx: 0 luma, 1 and 2 chroma.
        statistics: StatCoeff of chroma and luma (9.3.4.2.7... with bypass, sbType 1 and 3); updated.
        tokens: uint16, with room.
        to: index of the first token.
    """
    kind = log2_size - 2
    chroma = 1 if c_idx else 0
    coded = 0
    for i in range(last + 1):
        if masks[block + i]:
            coded |= SUB_BLOCK_BIT[kind, i]

    # last_sig_coeff_x_prefix ... y_suffix (9.3.4.2.3)
    begin = lowest_bit(masks[block + last])
    last_x = 4 * SUB_BLOCK_X[kind, last] + SCAN_X[15 - begin]
    last_y = 4 * SUB_BLOCK_Y[kind, last] + SCAN_Y[15 - begin]
    if chroma:
        ctx_offset, ctx_shift = 15, log2_size - 2
    else:
        ctx_offset, ctx_shift = 3 * kind + ((log2_size - 1) >> 2), (log2_size + 1) >> 2
    to = _put_last_prefix(
        LAST_SIG_COEFF_X_PREFIX + ctx_offset, ctx_shift, log2_size, LAST_PREFIX[last_x], tokens, to
    )
    to = _put_last_prefix(
        LAST_SIG_COEFF_Y_PREFIX + ctx_offset, ctx_shift, log2_size, LAST_PREFIX[last_y], tokens, to
    )
    bits = (LAST_SUFFIX[last_x] << LAST_SUFFIX_BITS[last_y]) | LAST_SUFFIX[last_y]
    num_bits = LAST_SUFFIX_BITS[last_x] + LAST_SUFFIX_BITS[last_y]
    if num_bits:
        tokens[to] = BYPASS | (1 << num_bits) | bits
        to += 1

    greater1_ctx = 1
    for i in range(last, -1, -1):
        mask = masks[block + i]
        right = 1 if coded & RIGHT_BIT[kind, i] else 0
        below = 1 if coded & BELOW_BIT[kind, i] else 0
        if 0 < i < last:  # 9.3.4.2.4
            context = CODED_SUB_BLOCK_FLAG + 2 * chroma + (right | below)
            tokens[to] = (context << 1) | (1 if mask else 0)
            to += 1
            if not mask:
                continue
        at = 16 * (block + i)
        table_row = 16 * (
            (chroma << 4)
            | (8 if log2_size == 3 else 0)
            | (4 if i == 0 else 0)
            | right
            | (below << 1)
        )
        if i == last:
            for k in range(begin + 1, 16):
                flag = 1 if residuals[at + k] else 0
                tokens[to] = _SIG_COEFF_TOKENS[table_row + k] | flag
                to += 1
        else:
            put_sig_coeff_flags(tokens, to, residuals, at, _SIG_COEFF_TOKENS, table_row)
            # of position 0 where all others are 0 it is inferred
            to += 15 if i > 0 and mask == _ONLY_FIRST else 16
        if not mask:
            continue
        to, greater1_ctx = _put_levels(
            residuals, at, mask, i, c_idx, greater1_ctx, statistics, tokens, to
        )
    return to


@njit(nogil=True)
def _put_last_prefix(
    first: int, shift: int, log2_size: int, prefix: int, tokens: NDArray[Any], to: int
) -> int:
    """A truncated unary last_sig_coeff prefix."""
    for k in range(prefix):
        tokens[to] = ((first + (k >> shift)) << 1) | 1
        to += 1
    if prefix < 2 * log2_size - 1:
        tokens[to] = (first + (prefix >> shift)) << 1
        to += 1
    return to


# Inlined: passing its arrays for every sub-block took 4 % of the encoder's time.
@njit(nogil=True, forceinline=True)
def _put_levels(
    residuals: NDArray[Any],
    at: int,
    mask: int,
    i: int,
    c_idx: int,
    greater1_ctx: int,
    statistics: NDArray[Any],
    tokens: NDArray[Any],
    to: int,
) -> tuple[int, int]:
    """Magnitudes and signs of one sub-block; returns the next token's index and greater1Ctx."""
    chroma = 1 if c_idx else 0
    # 9.3.4.2.6
    ctx_set = (0 if i == 0 or chroma else 2) + (1 if greater1_ctx == 0 else 0)
    context = COEFF_ABS_LEVEL_GREATER1_FLAG + 16 * chroma + 4 * ctx_set
    greater1_ctx = 1
    greater1 = 0  # flags, the first one lowest
    signs = 0
    count = 0
    left = mask
    while left and count < 8:
        value = as_int(residuals[at + lowest_bit(left)])
        left &= left - 1
        sign = value >> 63
        flag = 1 if (value ^ sign) - sign > 1 else 0
        tokens[to] = ((context + greater1_ctx) << 1) | flag
        to += 1
        greater1_ctx = (_NEXT_GREATER1 >> (8 * greater1_ctx + 4 * flag)) & 3
        greater1 |= flag << count
        signs = (signs << 1) | (sign & 1)
        count += 1
    if greater1 == 0 and left == 0:
        tokens[to] = BYPASS | (1 << count) | signs
        return to + 1, greater1_ctx
    # Levels from `index` on, those of `remaining`, may have a remainder; all before are 1.
    remaining, index, first_greater = left, 8, 16
    if greater1:
        first_greater = lowest_bit(greater1)
        remaining, index = mask, first_greater
        for _ in range(first_greater):
            remaining &= remaining - 1
        value = abs(as_int(residuals[at + lowest_bit(remaining)]))
        context = COEFF_ABS_LEVEL_GREATER2_FLAG + 4 * chroma + ctx_set
        tokens[to] = (context << 1) | (1 if value > 2 else 0)
        to += 1
    while left:
        signs = (signs << 1) | (1 if residuals[at + lowest_bit(left)] < 0 else 0)
        left &= left - 1
        count += 1

    # coeff_abs_level_remaining (9.3.3.11); pending bypass bits are in `bits`
    bits, num_bits = signs, count
    rice = statistics[1 - chroma] >> 2
    is_first = True
    while remaining:
        level = abs(as_int(residuals[at + lowest_bit(remaining)]))
        remaining &= remaining - 1
        base = 1
        if index < 8:
            base = 3 if index == first_greater else 2
        index += 1
        if level < base:
            continue
        value = level - base
        if value < 3 << rice:
            prefix = (value >> rice) + 1
            suffix_bits = rice
            suffix = value & ((1 << rice) - 1)
        else:
            suffix_bits = rice
            suffix = value - (3 << rice)
            while suffix >= 1 << suffix_bits:
                suffix -= 1 << suffix_bits
                suffix_bits += 1
            prefix = 4 + suffix_bits - rice
        bits = (((bits << prefix) | ((1 << prefix) - 2)) << suffix_bits) | suffix
        num_bits += prefix + suffix_bits
        while num_bits > MAX_BYPASS_BITS:
            num_bits -= MAX_BYPASS_BITS
            tokens[to] = BYPASS | (1 << MAX_BYPASS_BITS) | (bits >> num_bits)
            to += 1
            bits &= (1 << num_bits) - 1
        if is_first:  # 9.3.4.2.7... StatCoeff
            is_first = False
            statistic = statistics[1 - chroma]
            if value >= 3 << (statistic >> 2):
                statistics[1 - chroma] = statistic + 1
            elif 2 * value < 1 << (statistic >> 2) and statistic > 0:
                statistics[1 - chroma] = statistic - 1
        if level > 3 << rice:
            rice += 1
    while num_bits > MAX_BYPASS_BITS:
        num_bits -= MAX_BYPASS_BITS
        tokens[to] = BYPASS | (1 << MAX_BYPASS_BITS) | (bits >> num_bits)
        to += 1
        bits &= (1 << num_bits) - 1
    if num_bits:
        tokens[to] = BYPASS | (1 << num_bits) | bits
        to += 1
    return to, greater1_ctx
