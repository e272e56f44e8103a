"""Tokens kept exact beside the video: attention sinks, and what a quantiser cannot hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.errors import FormatError
from kvfetcher.format.sections import SectionKind
from kvfetcher.format.unit import Section, Unit, packed_section

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.format.pictures import Integers


def raw_tokens(
    values: NDArray[np.float32], first_position: int, num_sinks: int, *, limit: float
) -> NDArray[np.int64]:
    """Tokens to keep exact, in order.

    Args:
        values: [Lg, K, H, T, D].
        first_position: position of token 0 in its sequence.
        num_sinks: positions at the start of a sequence that attention depends on most.
        limit: a token with a larger magnitude, an infinity or a NaN is kept exact.
    """
    tokens = np.arange(values.shape[3])
    # NaN fails the comparison.
    fits = (np.abs(values) <= limit).all(axis=(0, 1, 2, 4))
    return np.flatnonzero((tokens + first_position < num_sinks) | ~fits)


def raw_sections(values: Integers, tokens: NDArray[np.int64]) -> tuple[Section, Section]:
    """Sections of the tokens that are kept exact: numbers and bit patterns [Lg, K, H, R, D]."""
    return raw_sections_of(tokens, np.ascontiguousarray(values[:, :, :, tokens]))


def raw_sections_of(tokens: NDArray[np.int64], values: Integers) -> tuple[Section, Section]:
    """`raw_sections` of bit patterns [Lg, K, H, R, D] that were picked out already."""
    return (
        packed_section(SectionKind.EXACT_TOKENS, tokens.astype("<u4").tobytes()),
        packed_section(SectionKind.EXACT_TOKEN_VALUES, values.tobytes()),
    )


def exact_tokens(unit: Unit, num_raw: int) -> tuple[NDArray[np.int64], Integers]:
    """Numbers of the tokens that a unit keeps exact, and their bit patterns [Lg, K, H, R, D].

    Raises:
        FormatError: the token numbers do not rise below the unit's number of tokens.
    """
    layers, factor, heads, num_tokens, dim = unit.shape
    if num_raw > num_tokens:
        raise FormatError(f"a unit of {num_tokens} tokens cannot keep {num_raw} of them exact")
    found = np.frombuffer(unit.section(SectionKind.EXACT_TOKENS, num_bytes=4 * num_raw), "<u4")
    tokens = found.astype(np.int64)
    if num_raw and (np.any(np.diff(tokens) <= 0) or tokens[-1] >= num_tokens):
        raise FormatError(f"exact tokens of the unit must rise and stay below {num_tokens}")
    shape = (layers, factor, heads, num_raw, dim)
    num_bytes = layers * factor * heads * num_raw * dim * unit.spec.item_bytes
    dtype = "<u2" if unit.spec.item_bytes == 2 else "u1"
    raw = np.frombuffer(unit.section(SectionKind.EXACT_TOKEN_VALUES, num_bytes=num_bytes), dtype)
    return tokens, raw.reshape(shape)


def put_raw_tokens(unit: Unit, num_raw: int, values: Integers) -> None:
    """Overwrite the exact tokens in restored values, in place.

    Raises:
        FormatError: as `exact_tokens`.
    """
    tokens, raw = exact_tokens(unit, num_raw)
    values[:, :, :, tokens] = raw
