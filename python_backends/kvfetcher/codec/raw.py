"""Profile `raw`: the values as they are, without video; and raw copies beside another profile.

For links that are faster than the decoders: nothing is smaller to decode than nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.codec.exact import FLOAT_BITS
from kvfetcher.errors import ChecksumError, FormatError
from kvfetcher.format.digest import integer_digest
from kvfetcher.format.pictures import NO_PICTURES, even_groups
from kvfetcher.format.sections import ProfileCode, SectionKind
from kvfetcher.format.unit import Unit, raw_section, write_unit
from kvfetcher.spec import RAW_VARIANT

if TYPE_CHECKING:
    from kvfetcher.codec.base import Profile, UnitSource
    from kvfetcher.format.pictures import Integers
    from kvfetcher.spec import KVSpec


# Small enough that transfer and restore of one request overlap, large enough that a unit's way
# through Triton (about 2 ms on a CPU) is a fraction of its copy.
_UNIT_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class RawProfile:
    """Encoder of profile `raw`."""

    unit_layers: int = 0
    """Layers of one unit; 0 = about 4 MiB."""

    @property
    def identity(self) -> str:
        return "raw/1"

    def variants(self) -> tuple[str, ...]:
        return (RAW_VARIANT,)

    def layer_groups(
        self, spec: KVSpec, num_tokens: int, variant: str
    ) -> tuple[tuple[int, int], ...]:
        """Groups of layers, the last one perhaps smaller."""
        layer_bytes = spec.elements_per_layer_token * spec.item_bytes * num_tokens
        layers = self.unit_layers or max(1, _UNIT_BYTES // layer_bytes)
        return even_groups(spec.num_layers, layers)

    def encode(self, source: UnitSource, variant: str) -> bytes:
        """One unit's bytes; any bit pattern is representable."""
        unit = Unit(
            profile=ProfileCode.RAW,
            spec=source.spec,
            layer_start=source.layer_start,
            num_layers=source.num_layers,
            num_tokens=source.num_tokens,
            first_position=source.first_position,
            geometry=NO_PICTURES,
            params=b"",
            integer_digest=integer_digest(source.values),
            sections=(raw_section(SectionKind.VALUES, source.values.tobytes()),),
        )
        return write_unit(unit)


@dataclass(frozen=True, slots=True)
class WithRawCopy:
    """Another profile whose chunks hold the values as they are, too, as one more variant."""

    coded: Profile

    @property
    def identity(self) -> str:
        """The coded profile's where it is bit-exact: a raw copy then restores the same values."""
        identity = self.coded.identity
        return identity if identity.startswith("exact/") else f"{identity};raw-copy"

    def variants(self) -> tuple[str, ...]:
        return (*self.coded.variants(), RAW_VARIANT)

    def layer_groups(
        self, spec: KVSpec, num_tokens: int, variant: str
    ) -> tuple[tuple[int, int], ...]:
        """The coded profile's, or those of profile `raw`."""
        return self._of(variant).layer_groups(spec, num_tokens, variant)

    def encode(self, source: UnitSource, variant: str) -> bytes:
        """One unit's bytes in the variant that is asked for."""
        return self._of(variant).encode(source, variant)

    def _of(self, variant: str) -> Profile:
        return RawProfile() if variant == RAW_VARIANT else self.coded


def restore_raw(unit: Unit, planes: Integers) -> Integers:
    """Values [Lg, K, H, T, D] of a `raw` unit, checked against its integer digest.

    Args:
        unit: parsed.
        planes: empty, as there is no video.

    Raises:
        ChecksumError: the values differ from those that were saved.
        FormatError: the unit breaks the profile's rules.
    """
    unit.require_sections(SectionKind.VALUES)
    if unit.params or unit.geometry != NO_PICTURES:
        raise FormatError("a raw unit has neither parameters nor pictures")
    bits = FLOAT_BITS[unit.spec.dtype]
    data = unit.section(SectionKind.VALUES, num_bytes=unit.num_elements * unit.spec.item_bytes)
    values = np.frombuffer(data, bits.item_dtype).reshape(unit.shape)
    if integer_digest(values) != unit.integer_digest:
        raise ChecksumError(
            f"unit of layers {unit.layer_start} to {unit.layer_start + unit.num_layers - 1}: the"
            " values differ from those saved; the unit is damaged"
        )
    return values
