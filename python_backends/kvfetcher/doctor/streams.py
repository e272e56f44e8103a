"""Streams whose samples are known: golden ones of every format, and noise of a size for timing.

Golden streams lie beside this file (made once by tests/data/make_doctor_streams.py): an intra and a
P picture of 160x144, small noise around the middle with samples of the whole range strewn in.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.format.pictures import PlaneGeometry

if TYPE_CHECKING:
    from kvfetcher.format.pictures import Integers

# Like the coefficients of profile `balanced`: about 1.6 bits per sample after coding.
_NOISE_DEVIATION = 0.62
_NOISE_BIT_DEPTH = 10


@dataclass(frozen=True, slots=True)
class Stream:
    """Packets and what they decode to."""

    name: str
    geometry: PlaneGeometry
    packets: tuple[bytes, ...]
    """One access unit per picture."""
    sha256: str
    """`planes_sha256` of the planes' bytes."""


def planes_sha256(planes: Integers) -> str:
    """Digest of decoded planes: C order, little-endian."""
    return hashlib.sha256(planes.tobytes()).hexdigest()


def golden_streams() -> list[Stream]:
    """Every chroma format and bit depth that units may have."""
    folder = resources.files("kvfetcher.doctor") / "golden"
    streams = []
    for name, facts in json.loads((folder / "streams.json").read_text()).items():
        data = (folder / f"{name}.h265").read_bytes()
        stops = np.cumsum(facts["packet_bytes"]).tolist()
        packets = [data[a:b] for a, b in zip([0, *stops[:-1]], stops, strict=True)]
        geometry = PlaneGeometry(**facts["geometry"])
        streams.append(Stream(name, geometry, tuple(packets), facts["sha256"]))
    return streams


def noise_stream(width: int, height: int) -> Stream:
    """One intra picture of 10-bit 4:4:4, encoded now; takes a second per 7 million samples.

    Raises:
        CodecError: the encoder failed.
    """
    from kvfetcher.codec.video import encode_planes

    geometry = PlaneGeometry(1, width, height, _NOISE_BIT_DEPTH)
    middle = 1 << (_NOISE_BIT_DEPTH - 1)
    noise = np.random.default_rng([width, height]).normal(middle, _NOISE_DEVIATION, geometry.shape)
    planes = np.rint(noise).astype(geometry.dtype)
    packets = encode_planes(planes, bit_depth=_NOISE_BIT_DEPTH)
    return Stream(f"{width}x{height}", geometry, tuple(packets), planes_sha256(planes))
