"""What a profile, a coder and a restorer are: plain data and Protocols of the codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvfetcher.format.pictures import Chroma, Integers, PlaneGeometry
    from kvfetcher.format.unit import Unit
    from kvfetcher.spec import KVSpec


class LeftToCpuError(RuntimeError):
    """A unit of a kind that a GPU restores, but whose contents are not for it."""


class PlaneEncoder(Protocol):
    """_ByteQueue pictures into packets without loss, as `video.encode_planes` does. Thread-safe."""

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
    """Encoder of its pictures; None = the default."""

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
    """_ByteQueue a unit's packets into planes. Not thread-safe: one per thread."""

    def decode(self, packets: list[memoryview], geometry: PlaneGeometry) -> Integers:
        """Planes ``geometry.shape`` of `geometry.dtype`, a new array.

        Raises:
            CodecError: the stream is damaged, or its pictures differ from `geometry`.
            DecoderUnavailableError: this decoder cannot do such pictures.
        """

    def close(self) -> None:
        """Free the decoder; safe to call twice."""
