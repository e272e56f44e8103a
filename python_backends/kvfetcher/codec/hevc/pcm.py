"""CTUs of PCM samples (H.265, 7.3.8.7): for pictures that arithmetic coding would make larger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numba import njit

from kvfetcher.codec.hevc import tables
from kvfetcher.codec.hevc.cabac import COUNT, LOW, RANGE, encode_bins, flush
from kvfetcher.codec.hevc.coding_tree import CTB
from kvfetcher.codec.hevc.prediction import dc_value
from kvfetcher.codec.hevc.vectors import as_int

if TYPE_CHECKING:
    from numpy.typing import NDArray


@njit(nogil=True)
def put_pcm_ctu(
    samples: NDArray[Any],
    row: int,
    column: int,
    planes: NDArray[Any],
    bits: int,
    tokens: NDArray[Any],
    states: NDArray[Any],
    engine: NDArray[Any],
    words: NDArray[Any],
    at: int,
) -> int:
    """A CTU that is one CU with pcm_flag 1; returns the index of the next word.

    Args:
        samples: see `put_coding_tree`, as for `row`, `column` and `planes`.
        row: row of the CTU.
        column: column of the CTU.
        planes: see there.
        bits: number of bits of one sample, PcmBitDepth.
        tokens: uint16, scratch.
        states: states of the contexts; updated.
        engine: the arithmetic coder; flushed before the samples and started after them.
        words: uint32, with room.
        at: index of the next word.
    """
    tokens[0] = tables.CU_TRANSQUANT_BYPASS_FLAG << 1 | 1
    tokens[1] = tables.PART_MODE << 1 | 1
    tokens[2] = tables.TERMINATE << 1 | 1  # pcm_flag
    at = encode_bins(tokens, 3, states, engine, words, at)
    # pcm_alignment_zero_bit: flush left zeros behind its last bit
    pending_bits = (flush(engine, words, at) + 7) & ~7
    if pending_bits >= 32:
        at += 1
        pending_bits -= 32
    pending = as_int(words[at]) >> (32 - pending_bits) if pending_bits else 0
    for c_idx in range(3):
        side, stride = 1 << planes[c_idx, 2], planes[c_idx, 1]
        first = planes[c_idx, 0] + side * (row * stride + column)
        for y in range(side):
            for x in range(side):
                pending = (pending << bits) | as_int(samples[first + y * stride + x])
                pending_bits += bits
                if pending_bits >= 32:
                    pending_bits -= 32
                    words[at] = pending >> pending_bits
                    pending &= (1 << pending_bits) - 1
                    at += 1
    # 9.3.2.5; what is pending, whole bytes, lies above the engine's 9 bits
    engine[LOW] = pending << 9
    engine[RANGE] = 510
    engine[COUNT] = pending_bits - 1
    return at


@njit(nogil=True)
def fill_padding(
    samples: NDArray[Any],
    row: int,
    column: int,
    planes: NDArray[Any],
    width: int,
    height: int,
    grey: int,
) -> None:
    """Set what the conformance window cuts off to the CTU's prediction, so that it costs no bits.

    Args:
        samples: see `put_coding_tree`, as for `row`, `column`, `planes` and `grey`; written to.
        row: row of the CTU.
        column: column of the CTU.
        planes: see there.
        width: width of the picture's luma.
        height: height of the picture's luma.
        grey: see there.
    """
    for c_idx in range(3):
        log2_size, stride = planes[c_idx, 2], planes[c_idx, 1]
        side = 1 << log2_size
        first = planes[c_idx, 0] + side * (row * stride + column)
        dc = dc_value(samples, first, stride, log2_size, column > 0, row > 0, grey)
        # chroma of 4:2:0 is half of luma each way
        columns = min(width * side // CTB - column * side, side)
        rows = min(height * side // CTB - row * side, side)
        for y in range(side):
            for x in range(0 if y >= rows else columns, side):
                samples[first + y * stride + x] = dc
