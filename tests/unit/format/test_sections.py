from pathlib import Path

from kvfetcher.format.sections import ProfileCode, SectionKind

FORMAT = Path(__file__).parents[3] / "docs" / "format.md"


def test_numbers_are_those_of_the_format():
    # every pair that docs/format.md gives; names of one number belong to different profiles
    kinds = {name: int(kind) for name, kind in SectionKind.__members__.items()}
    assert kinds == {
        "PACKET_LENGTHS": 1,
        "BITSTREAM": 2,
        "VALUES": 16,
        "MEDIANS": 16,
        "EXPONENT_SPREADS": 17,
        "REMAINDERS": 18,
        "MINIMA": 16,
        "SCALES": 17,
        "ESCAPE_INDICES": 17,
        "ESCAPE_VALUES": 18,
        "EXACT_TOKENS": 19,
        "EXACT_TOKEN_VALUES": 20,
        "MEANS": 21,
        "STEPS": 22,
        "SPREADS": 23,
        "LOW_BITS": 24,
        "PACKED_WIDTHS": 25,
        "PACKED_ROWS": 26,
    }
    assert [int(code) for code in ProfileCode] == [1, 2, 3, 4, 5]
    text = FORMAT.read_text()
    assert all(f"| {number} |" in text for number in kinds.values())
