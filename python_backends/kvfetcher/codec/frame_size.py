"""Picture sizes as variants of a chunk: their names, and how many layers fill a picture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvfetcher.codec.layout import NUM_PLANES, RowGrid
from kvfetcher.errors import ConfigError
from kvfetcher.format.pictures import (
    MAX_PLANE_BYTES,
    MAX_SIDE,
    MIN_SIDE,
    ONLY_VARIANT,
    even_groups,
    layers_of_a_picture,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfetcher.spec import KVSpec

# Of the one variant where no sizes are asked for.
_ONLY_SIZE_COLUMNS = 1024
_MAX_SAMPLE_BYTES = 2
_FRAME_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


class FrameSize(NamedTuple):
    """The largest picture of a variant."""

    width: int
    height: int

    @property
    def rows(self) -> int:
        """Rows of samples of one picture, all planes."""
        return NUM_PLANES * self.height


def parse_frame_size(text: str) -> FrameSize:
    """A variant's name, ``WIDTHxHEIGHT``.

    Raises:
        ConfigError: it is none, or a side is not what NVDEC takes.
    """
    match = _FRAME_SIZE.fullmatch(text)
    width, height = map(int, match.groups()) if match else (0, 0)
    if not (MIN_SIDE <= width <= MAX_SIDE and MIN_SIDE <= height <= MAX_SIDE):
        raise ConfigError(
            f"codec.frame_sizes: a size is WIDTHxHEIGHT, each {MIN_SIDE} to {MAX_SIDE}, got {text!r}"
        )
    return FrameSize(width, height)


def check_frame_sizes(sizes: Sequence[str]) -> None:
    """Check the sizes that a chunk is to be stored in; none is allowed.

    Raises:
        ConfigError: one is not a size, or is named twice.
    """
    if len(set(sizes)) != len(sizes):
        raise ConfigError(f"codec.frame_sizes must name each size once, got {tuple(sizes)}")
    for size in sizes:
        parse_frame_size(size)


def max_unit_layers(spec: KVSpec, num_tokens: int) -> int:
    """Layers that a unit of several may have, so that its planes keep the format's limit."""
    return MAX_PLANE_BYTES // (_MAX_SAMPLE_BYTES * num_tokens * spec.elements_per_layer_token)


def layers_of_a_unit(spec: KVSpec, num_tokens: int, variant: str) -> int:
    """Layers of one unit of a variant whose units are one picture (of each tile of tokens)."""
    if variant == ONLY_VARIANT:
        return layers_of_a_picture(spec)
    in_picture = parse_frame_size(variant).rows // spec.elements_per_layer_token
    return max(1, min(in_picture, max_unit_layers(spec, num_tokens)))


@dataclass(frozen=True, slots=True)
class EvenUnits:
    """Picture sizes of a profile whose units may hold any number of layers."""

    unit_layers: int = 0
    """Layers of one unit; 0 = as many as fill the variant's picture."""
    frame_sizes: tuple[str, ...] = ()
    """Largest picture of each variant, ``WIDTHxHEIGHT``; none = one variant of about 640 lines."""

    def __post_init__(self) -> None:
        check_frame_sizes(self.frame_sizes)

    def variants(self) -> tuple[str, ...]:
        return self.frame_sizes or (ONLY_VARIANT,)

    def layer_groups(
        self, spec: KVSpec, num_tokens: int, variant: str
    ) -> tuple[tuple[int, int], ...]:
        """Groups of layers, the last one perhaps smaller."""
        layers = self.unit_layers or layers_of_a_unit(spec, num_tokens, variant)
        return even_groups(spec.num_layers, layers)


def row_grid(num_rows: int, num_tokens: int, variant: str) -> RowGrid:
    """The smallest number of pictures of a variant's size that hold the rows and tokens."""
    size = FrameSize(_ONLY_SIZE_COLUMNS, MAX_SIDE)
    if variant != ONLY_VARIANT:
        size = parse_frame_size(variant)
    return RowGrid.fit(
        num_rows, num_tokens, max_frame_rows=size.height, max_frame_columns=size.width
    )
