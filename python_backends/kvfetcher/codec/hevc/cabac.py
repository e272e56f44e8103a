"""The arithmetic coder (H.265, 9.3.4.3 turned round; encoder in 9.3.5) and emulation prevention.

Its input are *tokens* of 16 bits: ``context << 1 | bin``, or `BYPASS` with 1 to 14 bypass bits below
a leading one. Its output are 32-bit words, the first byte highest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numba import njit

from kvfetcher.codec.hevc.tables import BIN_TABLE, LPS_BIT, STATE_MASK
from kvfetcher.codec.hevc.vectors import as_int, leading_zeros

if TYPE_CHECKING:
    from numpy.typing import NDArray

BYPASS = 0x8000
MAX_BYPASS_BITS = 14

LOW, RANGE, COUNT = 0, 1, 2
"""Items of an engine: ivlLow with what was not written yet, ivlCurrRange, bits not written less one."""


@njit(nogil=True)
def start_engine(engine: NDArray[Any]) -> None:
    """Initialise the arithmetic coding engine (9.3.5.2); the first bit is never written."""
    engine[LOW] = 0
    engine[RANGE] = 510
    engine[COUNT] = -1


@njit(nogil=True)
def encode_bins(
    tokens: NDArray[Any],
    num_tokens: int,
    states: NDArray[Any],
    engine: NDArray[Any],
    words: NDArray[Any],
    at: int,
) -> int:
    """Code tokens; returns the index behind the last word.

    Args:
        tokens: [>= num_tokens] uint16.
        num_tokens: number of tokens.
        states: [NUM_CONTEXTS] uint8, ``pStateIdx << 1 | valMps``; updated.
        engine: [3] int64; updated.
        words: uint32, with room for 14 bits a token.
        at: index of the next word.
    """
    low, span, count = engine[LOW], engine[RANGE], engine[COUNT]
    for i in range(num_tokens):
        token = as_int(tokens[i])
        if token < BYPASS:  # 9.3.5.3
            context = token >> 1
            entry = BIN_TABLE[(as_int(states[context]) << 1) | (token & 1)]
            states[context] = (entry >> 32) & STATE_MASK
            lps = (entry >> ((span >> 3) & 24)) & 255
            mps = span - lps
            if (entry >> LPS_BIT) & 1:
                low += mps
                span = lps
            else:
                span = mps
            shift = leading_zeros(span) - 55
            span <<= shift
            low <<= shift
            count += shift
        else:  # 9.3.5.5
            bits = 63 - leading_zeros(token & 0x7FFF)
            low = (low << bits) + (token & ((1 << bits) - 1)) * span
            count += bits
        if count >= 32:
            rest = count - 22
            word = low >> rest
            low -= word << rest
            count -= 32
            if word >> 32:
                _carry(words, at)
            words[at] = word & 0xFFFFFFFF
            at += 1
    engine[LOW], engine[RANGE], engine[COUNT] = low, span, count
    return at


@njit(nogil=True)
def _carry(words: NDArray[Any], at: int) -> None:
    """Add one to the number that ends before word `at`; it never overflows."""
    at -= 1
    while words[at] == 0xFFFFFFFF:
        words[at] = 0
        at -= 1
    words[at] += 1


@njit(nogil=True)
def flush(engine: NDArray[Any], words: NDArray[Any], at: int) -> int:
    """After a terminating bin of 1 (9.3.5.6): the last bits, whose last one is 1.

    That one is rbsp_stop_one_bit, or alignment_bit_equal_to_one, or comes before
    pcm_alignment_zero_bit. Up to two words are written from `at` on.

    Returns:
        Number of bits beyond the words before `at`.
    """
    bits = engine[COUNT] + 3
    value = (engine[LOW] >> 7) | 1
    if value >> bits:
        _carry(words, at)
        value -= 1 << bits
    if bits <= 32:
        words[at] = (value << (32 - bits)) & 0xFFFFFFFF
    else:
        words[at] = (value >> (bits - 32)) & 0xFFFFFFFF
        words[at + 1] = (value << (64 - bits)) & 0xFFFFFFFF
    return bits


@njit(nogil=True)
def escape_words(words: NDArray[Any], num_bytes: int, out: NDArray[Any], at: int) -> int:
    """Write the first bytes of `words` with emulation_prevention_three_byte (7.4.2).

    The byte before ``out[at]`` must not be 0.

    Returns:
        The index behind the last byte; -1 = `out` is too small.
    """
    zeros = 0
    for index in range((num_bytes + 3) >> 2):
        if at + 6 > len(out):  # a word is 4 bytes, and 2 more at most
            return -1
        word = as_int(words[index])
        left = num_bytes - 4 * index
        if left >= 4 and zeros == 0 and not (word - 0x01010101) & ~word & 0x80808080:
            out[at] = word >> 24
            out[at + 1] = (word >> 16) & 255
            out[at + 2] = (word >> 8) & 255
            out[at + 3] = word & 255
            at += 4
            continue
        for k in range(min(left, 4)):
            byte = (word >> (24 - 8 * k)) & 255
            if zeros >= 2 and byte <= 3:
                out[at] = 3
                at += 1
                zeros = 0
            out[at] = byte
            at += 1
            zeros = zeros + 1 if byte == 0 else 0
    return at
