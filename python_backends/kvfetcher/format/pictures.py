"""Plain data and Protocols of the codec: what a picture is, what a profile does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvfetcher.errors import FormatError

if TYPE_CHECKING:
    from kvfetcher.spec import KVSpec

Chroma = Literal["4:2:0", "4:4:4"]
Integers: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16]

MIN_SIDE = 144
"""NVDEC's smallest HEVC picture (H100, A100: 144x144)."""
MAX_SIDE = 8192
"""NVDEC's largest HEVC picture."""
MAX_FRAMES = 1 << 16
MAX_PLANE_BYTES = 256 << 20
"""Decoded planes of one unit: the project's promise for extra memory while decoding."""
MAX_VALUE_BYTES = 512 << 20
"""Restored values of one unit."""

BIT_DEPTHS = (8, 10, 12)

ONLY_VARIANT = "-"
"""Variant name of profiles that have no choice of picture size."""

# Rows of one picture, all three planes: 256x640 decodes in about 1 ms and is large enough not to be
# bound by NVDEC's cost per picture (measured on an H100).
_PICTURE_CHANNELS = 1920


@dataclass(frozen=True, slots=True)
class PlaneGeometry:
    """Shape of a unit's decoded pictures.

    The planes array is ``[num_frames, num_planes, rows, width]``: for 4:4:4 three planes of
    `height` rows; for 4:2:0 one plane in NV12 order, `height` rows of luma and then ``height / 2``
    rows of U and V samples in turn, as both FFmpeg and NVDEC can give it.

    Example:
        >>> PlaneGeometry(num_frames=2, width=256, height=640, bit_depth=10).shape
        (2, 3, 640, 256)
        >>> PlaneGeometry(num_frames=2, width=256, height=640, bit_depth=8, chroma="4:2:0").shape
        (2, 1, 960, 256)
    """

    num_frames: int
    width: int
    height: int
    bit_depth: int
    """8, 10 or 12. Samples are uint8 at 8, else uint16 with the value in the low bits."""
    chroma: Chroma = "4:4:4"

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("height", self.height)):
            if not MIN_SIDE <= value <= MAX_SIDE:
                raise FormatError(f"picture {name} must be {MIN_SIDE} to {MAX_SIDE}, got {value}")
        if self.bit_depth not in BIT_DEPTHS:
            raise FormatError(f"bit depth must be one of {BIT_DEPTHS}, got {self.bit_depth}")
        if self.chroma not in ("4:2:0", "4:4:4"):
            raise FormatError(f"chroma must be 4:2:0 or 4:4:4, got {self.chroma!r}")
        if self.chroma == "4:2:0" and (self.width % 2 or self.height % 2):
            raise FormatError(
                f"a 4:2:0 picture has even sides, got {self.width}x{self.height} (width x height)"
            )
        if not 0 <= self.num_frames <= MAX_FRAMES:
            raise FormatError(f"a unit has up to {MAX_FRAMES} pictures, got {self.num_frames}")
        if self.num_bytes > MAX_PLANE_BYTES:
            raise FormatError(
                f"a unit's planes of {self.num_bytes} bytes are over the limit of {MAX_PLANE_BYTES}"
            )

    @property
    def num_planes(self) -> int:
        return 3 if self.chroma == "4:4:4" else 1

    @property
    def rows(self) -> int:
        """Rows of one plane of the array."""
        return self.height if self.chroma == "4:4:4" else self.height * 3 // 2

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.num_frames, self.num_planes, self.rows, self.width

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8) if self.bit_depth == 8 else np.dtype("<u2")

    @property
    def num_samples(self) -> int:
        """Number of samples of all planes of all pictures."""
        return self.num_frames * self.num_planes * self.rows * self.width

    @property
    def num_bytes(self) -> int:
        return self.num_samples * (1 if self.bit_depth == 8 else 2)

    @property
    def pix_fmt(self) -> str:
        """FFmpeg's name of the picture format."""
        base = "yuv444p" if self.chroma == "4:4:4" else "yuv420p"
        return base if self.bit_depth == 8 else f"{base}{self.bit_depth}le"


NO_PICTURES = PlaneGeometry(num_frames=0, width=MIN_SIDE, height=MIN_SIDE, bit_depth=8)
"""Geometry of units without video; their planes are an empty array."""


def layers_of_a_picture(spec: KVSpec) -> int:
    """Number of layers whose channels make a 4:4:4 picture of about 640 lines."""
    return max(1, _PICTURE_CHANNELS // spec.elements_per_layer_token)


def even_groups(num_layers: int, layers: int) -> tuple[tuple[int, int], ...]:
    """(first layer, number of layers) of groups of `layers`, the last one perhaps smaller.

    Example:
        >>> even_groups(30, 8)
        ((0, 8), (8, 8), (16, 8), (24, 6))
    """
    return tuple((start, min(layers, num_layers - start)) for start in range(0, num_layers, layers))
