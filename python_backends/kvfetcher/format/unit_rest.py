"""What of a unit is still needed once its video is decoded; smaller by most of its bytes."""

from __future__ import annotations

from dataclasses import replace

from kvfetcher.format.sections import SectionKind
from kvfetcher.format.unit import Unit, raw_section, serialise


def without_bitstream(unit: Unit) -> bytes:
    """The unit with an empty bitstream, its other sections as they are.

    ``parse_unit(..., checks_video=False)`` and every restorer take it as the unit itself. It decodes
    to nothing: its maker has checked and decoded the video.
    """
    sections = (
        raw_section(SectionKind.BITSTREAM, b"")
        if section.kind == SectionKind.BITSTREAM
        else section
        for section in unit.sections
    )
    return serialise(replace(unit, sections=tuple(sections)))
