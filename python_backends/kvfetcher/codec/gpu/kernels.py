"""Kernels that turn decoded planes into KV values on a GPU, in the Triton language.

Samples out of pictures with their low bits and digest, escapes, coefficients into values (matrix
product, dequantisation, rotation, rounding, scatter into blocks in one), and profile `exact`. Which
element goes where is in tables that `gpu_restore` makes once per geometry; nothing here knows a model.

Coefficients of leading rows are float16 [rows, T], those of trailing rows 8-bit integers [T, columns]
(`gpu_rows`).

A 64-bit sum with wrap-around is the integer digest of `codec.digest`, term by term.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvfetcher.codec.gpu.rows import EXACT_HALF, EXTRA_FACTOR, HIGH_BITS, RANK8, RANK_EXTRA
from kvfetcher.codec.ladder.low_bits import MAX_SHIFT
from kvfetcher.format.digest import BLOCK_WORDS

RANK = 64
"""Leading coefficients that `restore_columns` multiplies at one time."""

_HIGH_BITS = tl.constexpr(HIGH_BITS)
_HIGH_STEP = tl.constexpr(1 << HIGH_BITS)
_HIGH_HALF = tl.constexpr(1 << (HIGH_BITS - 1))
_EXACT_HALF = tl.constexpr(EXACT_HALF)
_MAX_SHIFT = tl.constexpr(MAX_SHIFT)
_RANK = tl.constexpr(RANK)
_RANK8 = tl.constexpr(RANK8)
_RANK_EXTRA = tl.constexpr(RANK_EXTRA)
_EXTRA_FACTOR = tl.constexpr(EXTRA_FACTOR)
_BLOCK_WORDS = tl.constexpr(BLOCK_WORDS)


@triton.jit
def _digest(  # type: ignore[no-untyped-def]
    items,
    starts,
    first,
    num_bytes,
    weights,
    block_weights,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ITEM_BYTES: tl.constexpr,
    WORD: tl.constexpr,
):
    """What items [ROWS, COLUMNS], 0 where there are none, add to the digest of `num_bytes` bytes.

    Rows begin with the items of number ``starts`` [ROWS] + `first`. `WORD` of them are a word of the
    digest, unless a row or a picture may begin within one: then it is 1.
    """
    if WORD > 1:
        places = tl.arange(0, WORD) * (8 * ITEM_BYTES)
        items = tl.reshape(items, (ROWS, COLUMNS // WORD, WORD)) << places[None, None, :]
        values = tl.sum(items, axis=2).to(tl.uint32, bitcast=True).to(tl.int64)
        begins = starts // WORD + first // WORD
        words = begins[:, None] + tl.arange(0, COLUMNS // WORD)[None, :]
    else:
        at = (starts[:, None] + (first + tl.arange(0, COLUMNS))[None, :]) * ITEM_BYTES
        values = items.to(tl.int64) << (at % 4 * 8).to(tl.int64)
        begins = (starts + first) * ITEM_BYTES // 4
        words = at // 4
    mask = words * 4 < num_bytes
    # `%` where `&` would do: of its results the compiler knows that they follow each other.
    weight = tl.load(weights + words % _BLOCK_WORDS, mask=mask, other=0)
    # A row has words of one block or of two.
    block = begins // _BLOCK_WORDS
    left = block * (4 * _BLOCK_WORDS)
    this = tl.load(block_weights + block, mask=left < num_bytes, other=0)
    following = tl.load(
        block_weights + block + 1, mask=left + 4 * _BLOCK_WORDS < num_bytes, other=0
    )
    block = tl.where(words // _BLOCK_WORDS == block[:, None], this[:, None], following[:, None])
    return tl.sum(tl.sum(values * weight * block, axis=1), axis=0)


@triton.jit
def _line_bits(  # type: ignore[no-untyped-def]
    data,
    lines,
    has,
    stride,
    first,
    mask,
    bit,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
):
    """One bit of integers [ROWS, COLUMNS] from column `first` on, in its place.

    Row i's are in line ``lines[i]`` of ``data`` if ``has[i]``; a line is ``stride`` bytes of a bit for
    each column, the lowest bit of a byte first. `WHOLE_BYTES`: `first` is a multiple of 8.
    """
    starts = (lines * stride)[:, None]
    if WHOLE_BYTES:  # a byte is loaded once
        some = first // 8 + tl.arange(0, COLUMNS // 8)
        has_byte = has[:, None] & (some < stride)[None, :]
        byte = tl.load(data + starts + some[None, :], mask=has_byte, other=0).to(tl.int32)
        bits = byte[:, :, None] >> tl.arange(0, 8)[None, None, :]
        found = (tl.reshape(bits, (ROWS, COLUMNS)) & 1) << bit
    else:
        each = (first + tl.arange(0, COLUMNS))[None, :]
        found = _low_bit(data, starts, each, bit, has[:, None] & mask)
    return found


@triton.jit
def _low_bit(low_planes, lines, token, bit, mask):  # type: ignore[no-untyped-def]
    """One of the low bits of integers, in its place, from the lines that have it (`low_bits.PackedLowBits`)."""
    byte = tl.load(low_planes + lines + token // 8, mask=mask, other=0).to(tl.int32)
    return ((byte >> (token % 8)) & 1) << bit


@triton.jit
def _store(value, index, has_high, mask, out, high):  # type: ignore[no-untyped-def]
    """Integers as one float16, or two where they pass 2048; elsewhere the other is 0 or undefined."""
    top = tl.where(tl.abs(value) > _EXACT_HALF, (value + _HIGH_HALF) >> _HIGH_BITS, 0)
    tl.store(high + index, top.to(tl.float16), mask=mask & has_high)
    tl.store(out + index, (value - (top << _HIGH_BITS)).to(tl.float16), mask=mask)


# Arguments that say nothing about alignment, so that new values need no new compilation.
@triton.jit(
    do_not_specialize=[
        "num_rows",
        "frame_rows",
        "blocks_per_frame",
        "num_blocks",
        "height",
        "half",
        "shift",
        "line_bytes",
    ]
)
def unpack_rows(  # type: ignore[no-untyped-def]
    planes,
    tiles,
    out,
    high,
    out8,
    digest,
    weights,
    block_weights,
    row_shifts,
    low_rows,
    low_planes,
    line_bytes,
    widths,
    first_lines,
    num_rows,
    num_tokens,
    stride8,
    frame_rows,
    frame_columns,
    blocks_per_frame,
    num_blocks,
    height,
    width,
    half,
    shift,
    PACKED: tl.constexpr,
    ITEM_BYTES: tl.constexpr,
    WORD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Samples of a `RowGrid` -> centred integers; adds the samples' digest to ``digest[0]``.

    One program: a tile of at most `ROWS` rows, and `COLUMNS` columns of one picture, of which there are
    ``blocks_per_frame`` beside each other. ``tiles`` [tiles, 4] has the first row, the row behind the
    last, and where they go: from which row of ``out`` [rows, T] on, or from which column of ``out8``
    [T, `stride8`] on, a multiple of `ROWS`, with as many columns as that; -1 = not there. Rows that have
    low bits, ``row_shifts`` [rows] of them, go to ``out`` and ``high``. ``low_rows`` [rows, MAX_SHIFT]
    is the line of each bit in ``low_planes``, whose lines are ``line_bytes`` long. `WORD` as for
    `_digest`; if it is not 1, pictures begin with a whole byte of the low bits, too.

    `PACKED`: samples are no pictures but ``widths`` [rows] lines of each row, from ``first_lines``
    [rows] of ``planes`` on (`packed.PackedRows`); ``half`` is their neutral sample.
    """
    tile = tiles + tl.program_id(0) * 4
    rows = tl.load(tile) + tl.arange(0, ROWS)
    row_mask = rows < tl.load(tile + 1)
    line = rows // 3
    line = (line // frame_rows * 3 + rows % 3) * height + line % frame_rows
    frame = tl.program_id(1) // blocks_per_frame
    left = (tl.program_id(1) % blocks_per_frame) * COLUMNS
    columns = left + tl.arange(0, COLUMNS)
    first = frame * frame_columns
    # Two conditions, for the compiler knows both limits' alignment and not their minimum's.
    token_mask = (columns < frame_columns) & (first + columns < num_tokens)
    mask = row_mask[:, None] & token_mask[None, :]
    if PACKED:
        bits = tl.load(widths + rows, mask=row_mask, other=0).to(tl.int32)
        lines = tl.load(first_lines + rows, mask=row_mask, other=0)
        sample = tl.zeros((ROWS, COLUMNS), tl.int32) + (half - ((1 << bits) >> 1))[:, None]
        for bit in range(tl.max(bits, axis=0)):
            sample += _line_bits(
                planes,
                lines + bit,
                bits > bit,
                line_bytes,
                first + left,
                mask,
                bit,
                ROWS,
                COLUMNS,
                WORD > 1,
            )
        sample = tl.where(mask, sample, 0)
    else:
        at = (frame * num_blocks * 3 * height * width + line * width)[:, None] + columns[None, :]
        sample = tl.load(planes + at, mask=mask, other=0).to(tl.int32)
        if ITEM_BYTES == 2:
            sample = (sample & 0xFFFF) >> shift
    value = sample - half
    out_row = tl.load(tile + 2)
    column = tl.load(tile + 3)
    if out_row >= 0:
        index = ((out_row + tl.arange(0, ROWS)) * num_tokens)[:, None] + (first + columns)[None, :]
        low_bits = tl.load(row_shifts + rows, mask=row_mask, other=0).to(tl.int32)
        num_low = tl.max(low_bits, axis=0)
        if num_low > 0:
            low = tl.zeros_like(value)
            for bit in range(num_low):
                has = low_bits > bit
                lines = tl.load(low_rows + rows * _MAX_SHIFT + bit, mask=has, other=0)
                low |= _line_bits(
                    low_planes,
                    lines,
                    has,
                    line_bytes,
                    first + left,
                    mask,
                    bit,
                    ROWS,
                    COLUMNS,
                    WORD > 1,
                )
            value = (value << low_bits[:, None]) + low
            _store(value, index, (low_bits > 0)[:, None], mask, out, high)
        else:
            tl.store(out + index, value.to(tl.float16), mask=mask)
    elif column >= 0:
        column = tl.multiple_of(column, ROWS)
        index = ((first + columns) * stride8)[:, None] + (column + tl.arange(0, ROWS))[None, :]
        # All of the tile's columns: a mask along what is contiguous would make stores narrow.
        tl.store(out8 + index, tl.trans(value.to(tl.int8)), mask=token_mask[:, None])
    total = _digest(
        sample,
        rows * num_tokens,
        first + left,
        num_rows * num_tokens * ITEM_BYTES,
        weights,
        block_weights,
        ROWS,
        COLUMNS,
        ITEM_BYTES,
        WORD,
    )
    tl.atomic_add(digest, total)


@triton.jit(do_not_specialize=["count", "num_tokens", "low_stride", "stride8"])
def put_escapes(  # type: ignore[no-untyped-def]
    places,
    values,
    count,
    row_places,
    out,
    high,
    out8,
    row_shifts,
    low_rows,
    low_planes,
    low_stride,
    num_tokens,
    stride8,
    BLOCK: tl.constexpr,
):
    """Escaped integers to their places, as `unpack_rows` puts the others; in ``out8`` as near as it has.

    ``row_places`` [rows] is each row's in ``out`` and ``high``, or -1 - its column in ``out8``.
    """
    escape = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = escape < count
    index = tl.load(places + escape, mask=mask, other=0)
    value = tl.load(values + escape, mask=mask, other=0)
    row = index // num_tokens
    token = index % num_tokens
    place = tl.load(row_places + row, mask=mask, other=0)
    is_leading = place >= 0
    small = tl.minimum(tl.maximum(value, -128), 127).to(tl.int8)
    tl.store(out8 + token * stride8 - 1 - place, small, mask=mask & ~is_leading)
    mask = mask & is_leading
    low_bits = tl.load(row_shifts + row, mask=mask, other=0).to(tl.int32)
    low = tl.zeros_like(value)
    for bit in tl.static_range(_MAX_SHIFT):
        has = low_bits > bit
        lines = tl.load(low_rows + row * _MAX_SHIFT + bit, mask=has, other=0) * low_stride
        low |= _low_bit(low_planes, lines, token, bit, has)
    value = (value << low_bits) + low
    has_high = (low_bits > 0) | (tl.abs(value) > _EXACT_HALF)
    _store(value, place * num_tokens + token, has_high, mask, out, high)


@triton.jit(
    do_not_specialize=["first_row", "rank", "num_high", "first_tile8", "rank8", "num_extra"]
)
def restore_columns(  # type: ignore[no-untyped-def]
    samples,
    high,
    matrix,
    samples8,
    matrix8,
    ratios,
    extra,
    extra_columns,
    means,
    pair_tables,
    cosines,
    sines,
    pair_offsets,
    out,
    block_ids,
    scale,
    first_row,
    first_tile8,
    num_tokens,
    num_columns,
    rank,
    num_high,
    rank8,
    num_extra,
    matrix_stride,
    stride8,
    matrix8_stride,
    num_pairs,
    base_offset,
    block_stride,
    tokens_per_block,
    head_dim,
    CLAMP: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Coefficients x inverse transform -> values in blocks.

    Leading ones [rank, T] x ``matrix`` [columns, rank]: rows of ``samples`` from `first_row` on; the
    first `num_high` have a part in ``high``, too. ``matrix`` goes on, with any finite numbers, to the
    next multiple of RANK: a mask along what is contiguous would make loads narrow.

    Trailing ones [T, rank8] x ``matrix8`` [columns, rank8], a row of which counts in ``ratios``
    [columns] of ``matrix``'s: RANK8 columns of ``samples8`` from ``first_tile8 * RANK8`` on, and so on;
    what is more than there are coefficients has zeros in ``matrix8``. ``extra`` [num_extra,
    T] is what they are beyond 8 bits, ``extra_columns`` [num_extra] where: twice the trailing one, and 1
    more where it counts EXTRA_FACTOR times; a multiple of RANK_EXTRA.

    Columns come in pairs that are rotated together, `num_pairs` of them for each head: ``pair_tables``
    says which table of ``cosines`` and ``sines`` [tables, T, num_pairs] a pair uses, or -1 = not
    rotated; ``pair_offsets`` [2, pairs] the places of both columns within a block. Of `RUN` pairs that
    follow each other, from a multiple of it on, the tables are equal and the places follow each other,
    too: each store writes `RUN` values.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token_mask = tokens < num_tokens
    column_mask = columns < num_columns

    steps8 = tl.arange(0, _RANK8)
    sample_at8 = samples8 + (tokens * stride8)[:, None] + (first_tile8 * _RANK8 + steps8)[None, :]
    columns_at8 = matrix8 + (columns.to(tl.int64) * matrix8_stride)[None, :]
    matrix_at8 = columns_at8 + steps8[:, None]
    total8 = tl.zeros((TOKENS, COLUMNS), dtype=tl.int32)
    for _ in range(0, rank8, _RANK8):
        a8 = tl.load(sample_at8, mask=token_mask[:, None], other=0)
        b8 = tl.load(matrix_at8, mask=column_mask[None, :], other=0)
        total8 = tl.dot(a8, b8, total8, out_dtype=tl.int32)
        sample_at8 += _RANK8
        matrix_at8 += _RANK8
    total = total8.to(tl.float32)
    for start in tl.range(0, num_extra, _RANK_EXTRA, num_stages=1):
        some = start + tl.arange(0, _RANK_EXTRA)
        at = (some * num_tokens)[:, None] + tokens[None, :]
        a = tl.load(extra + at, mask=token_mask[None, :], other=0.0)
        which = tl.load(extra_columns + some)
        at = columns_at8 + (which // 2)[:, None]
        b = tl.load(at, mask=column_mask[None, :], other=0).to(tl.int32)
        b = tl.where((which % 2 == 1)[:, None], b * _EXTRA_FACTOR, b).to(tl.float16)
        total = tl.dot(tl.trans(a), b, total)
    ratio = tl.load(ratios + columns, mask=column_mask, other=0.0)
    total *= (ratio * (1.0 / _HIGH_STEP))[None, :]

    steps = tl.arange(0, _RANK)
    within = (first_row + steps)[:, None] * num_tokens + tokens[None, :]
    columns_at = matrix + columns[None, :].to(tl.int64) * matrix_stride + steps[:, None]
    sample_at, matrix_at = high + within, columns_at
    for start in range(0, num_high, _RANK):
        left = steps < num_high - start
        a = tl.load(sample_at, mask=left[:, None] & token_mask[None, :], other=0.0)
        b = tl.load(matrix_at, mask=column_mask[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total)
        sample_at += _RANK * num_tokens
        matrix_at += _RANK
    total *= _HIGH_STEP
    sample_at, matrix_at = samples + within, columns_at
    for start in range(0, rank, _RANK):
        left = steps < rank - start
        a = tl.load(sample_at, mask=left[:, None] & token_mask[None, :], other=0.0)
        b = tl.load(matrix_at, mask=column_mask[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total)
        sample_at += _RANK * num_tokens
        matrix_at += _RANK
    mean = tl.load(means + columns, mask=column_mask, other=0.0)
    values = total * scale + mean[None, :]

    first, second = tl.split(tl.reshape(values, (TOKENS, COLUMNS // 2, 2)))
    pairs = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    pair_mask = pairs < num_columns // 2
    table = tl.max_constancy(tl.load(pair_tables + pairs, mask=pair_mask, other=-1), RUN)
    of_head = tl.max_contiguous(tl.multiple_of(pairs % num_pairs, RUN), RUN)
    angle = (table[None, :] * num_tokens + tokens[:, None]) * num_pairs + of_head[None, :]
    rotated = (table >= 0)[None, :] & token_mask[:, None]
    cosine = tl.load(cosines + angle, mask=rotated, other=1.0)
    sine = tl.load(sines + angle, mask=rotated, other=0.0)
    turned_first = first * cosine - second * sine
    turned_second = second * cosine + first * sine
    if CLAMP:  # float16: beyond its range the CPU gives its largest value, not infinity
        turned_first = tl.minimum(tl.maximum(turned_first, -65504.0), 65504.0)
        turned_second = tl.minimum(tl.maximum(turned_second, -65504.0), 65504.0)

    block = tl.load(block_ids + tokens // tokens_per_block, mask=token_mask, other=0)
    within = (tokens % tokens_per_block) * head_dim
    row = out + block.to(tl.int64) * block_stride + base_offset + within
    store = token_mask[:, None] & pair_mask[None, :]
    kind = out.dtype.element_ty
    at = tl.load(pair_offsets + pairs, mask=pair_mask, other=0)
    at = tl.max_contiguous(tl.multiple_of(at, RUN), RUN)
    tl.store(row[:, None] + at[None, :], turned_first.to(kind), mask=store)
    at = tl.load(pair_offsets + num_columns // 2 + pairs, mask=pair_mask, other=0)
    at = tl.max_contiguous(tl.multiple_of(at, RUN), RUN)
    tl.store(row[:, None] + at[None, :], turned_second.to(kind), mask=store)


@triton.jit(do_not_specialize=["num_elements", "tile_lines"])
def restore_bits(  # type: ignore[no-untyped-def]
    planes,
    channel_lines,
    medians,
    remainders,
    out,
    digest,
    weights,
    block_weights,
    block_ids,
    num_tokens,
    frame_columns,
    tile_lines,
    width,
    num_elements,
    base_offset,
    group_stride,
    block_stride,
    tokens_per_block,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    TOKENS: tl.constexpr,
    ITEM_BYTES: tl.constexpr,
    WORD: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
):
    """Exponents from pictures and remainders -> bit patterns in blocks, with their digest.

    One program: some tokens of one group (layer, K or V, head). ``channel_lines`` has the line of
    each channel (group, dim) among the `tile_lines` lines of one tile's pictures.
    """
    group = tl.program_id(0)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    dims = tl.arange(0, DIMS)
    token_mask = tokens < num_tokens
    dim_mask = dims < HEAD_DIM
    mask = token_mask[:, None] & dim_mask[None, :]
    channels = group * HEAD_DIM + dims
    lines = tl.load(channel_lines + channels, mask=dim_mask, other=0)
    median = tl.load(medians + channels, mask=dim_mask, other=0).to(tl.int32)
    tile = tokens // frame_columns
    at = (tile * tile_lines)[:, None] + lines[None, :]
    at = at * width + (tokens % frame_columns)[:, None]
    exponent = tl.load(planes + at, mask=mask, other=0).to(tl.int32)
    exponent = (exponent + median[None, :] - 128) & ((1 << EXPONENT_BITS) - 1)

    index = (group * num_tokens + tokens)[:, None] * HEAD_DIM + dims[None, :]
    if MANTISSA_BITS == 7:  # bfloat16: whole bytes
        remainder = tl.load(remainders + index, mask=mask, other=0).to(tl.int32)
    elif MANTISSA_BITS == 10:  # float16: fields of 8, 2 and 1 bits, one after the other
        pairs = remainders + num_elements
        bits = pairs + (num_elements + 3) // 4
        low = tl.load(remainders + index, mask=mask, other=0).to(tl.int32)
        middle = tl.load(pairs + index // 4, mask=mask, other=0).to(tl.int32)
        high = tl.load(bits + index // 8, mask=mask, other=0).to(tl.int32)
        remainder = low | ((middle >> (index % 4 * 2)) & 3) << 8
        remainder = remainder | ((high >> (index % 8)) & 1) << 10
    else:  # float8_e4m3fn: 4 bits
        packed = tl.load(remainders + index // 2, mask=mask, other=0).to(tl.int32)
        remainder = (packed >> (index % 2 * 4)) & 15
    value = (exponent << MANTISSA_BITS) | (remainder & ((1 << MANTISSA_BITS) - 1))
    value = value | (remainder >> MANTISSA_BITS) << (MANTISSA_BITS + EXPONENT_BITS)
    value = tl.where(mask, value, 0)

    block = tl.load(block_ids + tokens // tokens_per_block, mask=token_mask, other=0)
    row = block.to(tl.int64) * block_stride + base_offset + group.to(tl.int64) * group_stride
    row += (tokens % tokens_per_block) * HEAD_DIM
    tl.store(out + row[:, None] + dims[None, :], value.to(out.dtype.element_ty), mask=mask)
    starts = (group * num_tokens + tokens) * HEAD_DIM
    num_bytes = num_elements * ITEM_BYTES
    total = _digest(
        value, starts, 0, num_bytes, weights, block_weights, TOKENS, DIMS, ITEM_BYTES, WORD
    )
    tl.atomic_add(digest, total)
