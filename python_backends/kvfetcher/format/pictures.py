"""Plain data and Protocols of the codec: what a picture is, what a profile does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvfetcher.errors import FormatError

if TYPE_CHECKING:
    from kvfetcher.format.unit import Unit
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


class LeftToCpuError(RuntimeError):
    """A unit of a kind that a GPU restores, but whose contents are not for it."""


@dataclass(frozen=True, slots=True)
class PlaneGeometry:
    """Shape of a unit's decoded pictures.

    The planes array is ``[num_frames, num_planes, rows, width]``: for 4:4:4 three planes of
    `height` rows; for 4:2:0 one plane in NV12 order, `height` rows of luma and then ``height / 2``
    rows of U and V samples in turn, as both FFmpeg and NVDEC can give it.
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
    def num_bytes(self) -> int:
        samples = self.num_frames * self.num_planes * self.rows * self.width
        return samples * (1 if self.bit_depth == 8 else 2)

    @property
    def pix_fmt(self) -> str:
        """FFmpeg's name of the picture format."""
        base = "yuv444p" if self.chroma == "4:4:4" else "yuv420p"
        return base if self.bit_depth == 8 else f"{base}{self.bit_depth}le"


NO_PICTURES = PlaneGeometry(num_frames=0, width=MIN_SIDE, height=MIN_SIDE, bit_depth=8)
"""Geometry of units without video; their planes are an empty array."""


class PlaneEncoder(Protocol):
    """Turns pictures into packets without loss, as `video.encode_planes` does. Thread-safe."""

    def __call__(
        self,
        planes: Integers,
        *,
        bit_depth: int,
        chroma: Chroma = "4:4:4",
        gop: int = 1,
        fast: bool = False,
    ) -> list[bytes]:
        """One access unit per picture of `planes` [F, P, Y, X].

        Raises:
            CodecError: shape, dtype or range do not fit, or the encoder failed.
        """


@dataclass(frozen=True, slots=True)
class UnitSource:
    """The values that one unit is made of, before coding."""

    values: Integers
    """[Lg, K, H, T, D] bit patterns of `spec.dtype`."""
    spec: KVSpec
    """Geometry of the whole model (`spec.num_layers` counts all layers)."""
    layer_start: int
    first_position: int
    encoder: PlaneEncoder | None = None
    """Of its pictures; None = libx265."""

    @property
    def num_layers(self) -> int:
        return int(self.values.shape[0])

    @property
    def num_tokens(self) -> int:
        return int(self.values.shape[3])


@dataclass(frozen=True, slots=True)
class RestoredUnit:
    """What comes out of a unit."""

    layer_start: int
    values: Integers
    """[Lg, K, H, T, D] bit patterns of the unit's dtype, C-contiguous, little-endian."""


class Profile(Protocol):
    """How values become units: the encoding side. Instances are immutable and thread-safe."""

    @property
    def identity(self) -> str:
        """Canonical ASCII text of the profile and of every parameter that changes its values."""

    def variants(self) -> tuple[str, ...]:
        """Names under which each layer group is stored; one or more."""

    def layer_groups(
        self, spec: KVSpec, num_tokens: int, variant: str
    ) -> tuple[tuple[int, int], ...]:
        """(layer_start, num_layers) of each unit of a variant, covering all layers in order."""

    def encode(self, source: UnitSource, variant: str) -> bytes:
        """One unit's bytes. Single-threaded; units are encoded side by side.

        Raises:
            CodecError: the encoder failed, or the profile cannot hold these values.
        """


class Restorer(Protocol):
    """How decoded planes become values again: the decoding side of one profile code."""

    def __call__(self, unit: Unit, planes: Integers) -> Integers:
        """Values [Lg, K, H, T, D] from planes [F, P, Y, X].

        Raises:
            ChecksumError: the restored integers differ from the digest in the unit.
            FormatError: a section breaks the profile's rules.
        """


class Decoder(Protocol):
    """Turns a unit's packets into planes. Not thread-safe: one per thread."""

    def decode(self, packets: list[memoryview], geometry: PlaneGeometry) -> Integers:
        """Planes ``geometry.shape`` of `geometry.dtype`, a new array.

        Raises:
            CodecError: the stream is damaged, or its pictures differ from `geometry`.
            DecoderUnavailableError: this decoder cannot do such pictures.
        """

    def close(self) -> None:
        """Free the decoder; safe to call twice."""


def layers_of_a_picture(spec: KVSpec) -> int:
    """So many layers that their channels make a 4:4:4 picture of about 640 lines."""
    return max(1, _PICTURE_CHANNELS // spec.elements_per_layer_token)


def even_groups(num_layers: int, layers: int) -> tuple[tuple[int, int], ...]:
    """(first layer, number of layers) of groups of `layers`, the last one perhaps smaller."""
    return tuple((start, min(layers, num_layers - start)) for start in range(0, num_layers, layers))
