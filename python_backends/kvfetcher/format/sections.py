"""Numbers of everything that a unit may hold (docs/format.md)."""

from __future__ import annotations

from enum import IntEnum


class ProfileCode(IntEnum):
    """The rules by which a unit's integers became its values."""

    EXACT = 1
    PAPER = 2
    TRANSFORM = 3
    UNCALIBRATED = 4
    RAW = 5


class SectionKind(IntEnum):
    """What a section of a unit holds.

    Kinds 1 and 2 are the video of any unit. Those from 16 on belong to the unit's profile, and the
    same number is something else in another profile: such names are aliases here, equal as numbers
    are.
    """

    PACKET_LENGTHS = 1
    BITSTREAM = 2

    # profile code 5
    VALUES = 16

    # profile code 1
    MEDIANS = 16
    EXPONENT_SPREADS = 17
    REMAINDERS = 18

    # profile code 2
    MINIMA = 16
    SCALES = 17

    # profile codes 3 and 4
    ESCAPE_INDICES = 17
    ESCAPE_VALUES = 18
    EXACT_TOKENS = 19
    EXACT_TOKEN_VALUES = 20

    # profile code 4
    MEANS = 21
    STEPS = 22
    SPREADS = 23

    # profile code 3
    LOW_BITS = 24
    PACKED_WIDTHS = 25
    """One byte a row: its width in bits."""
    PACKED_ROWS = 26
    """Bit planes of the rows, one after the other."""
