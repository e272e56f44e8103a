"""A unit without its bitstream restores as the unit does."""

from pathlib import Path

import numpy as np
import pytest

from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.codec.ladder.library import register_calibration
from kvfetcher.codec.profiles import decode_unit, restore_unit
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import FormatError
from kvfetcher.format.container import parse_header
from kvfetcher.format.sections import SectionKind
from kvfetcher.format.unit import parse_unit
from kvfetcher.format.unit_rest import without_bitstream

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.kvf")))
def test_rest_of_a_unit_restores_to_its_values(name):
    artifact = GOLDEN / f"{name}.safetensors"
    if artifact.is_file():
        register_calibration(Calibration.load(artifact))
    chunk = (GOLDEN / f"{name}.kvf").read_bytes()
    for entry in parse_header(chunk).units:
        unit = chunk[entry.offset : entry.stop]
        parsed = parse_unit(unit)
        rest = without_bitstream(parsed)
        video_bytes = sum(len(s.stored) for s in parsed.sections if s.kind == SectionKind.BITSTREAM)
        assert len(rest) == len(unit) - video_bytes
        planes = decode_unit(unit, VideoDecoder())
        np.testing.assert_array_equal(
            restore_unit(rest, planes).values, restore_unit(unit, planes).values
        )


def test_rest_of_a_unit_is_not_taken_for_one_that_decodes():
    chunk = (GOLDEN / "exact_bf16.kvf").read_bytes()
    entry = parse_header(chunk).units[0]
    rest = without_bitstream(parse_unit(chunk[entry.offset : entry.stop]))
    with pytest.raises(FormatError, match="section 2 of the unit"):
        decode_unit(rest, VideoDecoder())
