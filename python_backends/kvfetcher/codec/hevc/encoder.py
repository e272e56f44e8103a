"""Pictures -> access units: the `PlaneEncoder` of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher.codec import video
from kvfetcher.codec.hevc import slice_data
from kvfetcher.codec.hevc.headers import LOG2_CTB, StreamFormat, parameter_sets, slice_header
from kvfetcher.codec.video import checked_geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.format.pictures import Chroma, Integers, PlaneGeometry

_CTB = 1 << LOG2_CTB
# Of a picture's samples, so that a picture which would take more is coded as PCM instead.
_MAX_EXPANSION = 1.03
# Times the samples: more than any picture takes one way or the other.
_MANY = 4
_SLACK_BYTES = 256


def encode_planes(
    planes: Integers,
    *,
    bit_depth: int,
    chroma: Chroma = "4:4:4",
    gop: int = 1,
    fast: bool = False,
) -> list[bytes]:
    """Encode pictures without loss, in the calling thread; the GIL is free meanwhile. Thread-safe.

    Args:
        planes: [F, P, Y, X] as `PlaneGeometry` describes it; uint8 at bit depth 8, else uint16.
        bit_depth: 8, 10 or 12; samples are below ``2**bit_depth``.
        chroma: "4:4:4" (P = 3) or "4:2:0" (P = 1, NV12 order).
        gop: 1 = every packet decodes alone. Predicted pictures, which `paper` alone asks for, are left
            to libx265.
        fast: not used: there is one speed.

    Returns:
        One access unit (Annex B, with parameter sets) per picture.

    Raises:
        CodecError: shape, dtype or range do not fit, or libx265 failed.
    """
    if gop > 1:
        return video.encode_planes(planes, bit_depth=bit_depth, chroma=chroma, gop=gop, fast=fast)
    geometry = checked_geometry(planes, bit_depth=bit_depth, chroma=chroma)
    return [_encode(picture, geometry) for picture in planes]


def _encode(picture: Integers, geometry: PlaneGeometry) -> bytes:
    """The access unit of one picture [P, Y, X]."""
    raw_bytes = picture.size * geometry.bit_depth // 8
    unit = _encode_as(picture, geometry, int(raw_bytes * _MAX_EXPANSION))
    if unit is not None:
        return unit
    # Emulation prevention makes PCM samples that are 0 up to a half larger.
    both = [
        _encode_as(picture, geometry, _MANY * raw_bytes, has_pcm=has_pcm)
        for has_pcm in (True, False)
    ]
    return min((unit for unit in both if unit is not None), key=len)


def _encode_as(
    picture: Integers, geometry: PlaneGeometry, room: int, *, has_pcm: bool = False
) -> bytes | None:
    """The access unit, or None where the slice data take more than `room` bytes and a few."""
    samples, planes = _whole_ctus(picture, geometry)
    stream = StreamFormat(
        geometry.width, geometry.height, geometry.bit_depth, geometry.chroma, has_pcm
    )
    out = np.empty(room + _SLACK_BYTES, np.uint8)
    ends = np.zeros(stream.num_rows, np.int64)
    num_bytes = slice_data.compiled()(
        samples,
        planes,
        stream.num_rows,
        stream.num_columns,
        1 << (geometry.bit_depth - 1),
        stream.can_split,
        geometry.width,
        geometry.height,
        geometry.bit_depth if has_pcm else 0,
        out,
        ends,
    )
    if num_bytes < 0:
        return None
    sizes = np.diff(ends, prepend=0).tolist()
    return parameter_sets(stream) + slice_header(stream, sizes) + out[:num_bytes].tobytes()


def _whole_ctus(
    picture: Integers, geometry: PlaneGeometry
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The three planes one after the other, mid-grey up to whole CTUs, and where they lie.

    Returns:
        [num_samples] and, for each plane, its first sample, its stride and log2 of its CTBs' side.
    """
    rows, columns = (-(-side // _CTB) * _CTB for side in (geometry.height, geometry.width))
    if geometry.chroma == "4:4:4":
        places = [(plane * rows * columns, columns, LOG2_CTB) for plane in range(3)]
        if (rows, columns) == picture.shape[1:]:
            samples = np.ascontiguousarray(picture).reshape(-1)
        else:
            padded = np.full((3, rows, columns), 1 << (geometry.bit_depth - 1), picture.dtype)
            padded[:, : geometry.height, : geometry.width] = picture
            samples = padded.reshape(-1)
        return samples, np.array(places, np.int64)
    half = rows * columns // 4
    places = [
        (0, columns, LOG2_CTB),
        (4 * half, columns // 2, LOG2_CTB - 1),
        (5 * half, columns // 2, LOG2_CTB - 1),
    ]
    samples = np.full(6 * half, 1 << (geometry.bit_depth - 1), picture.dtype)
    luma, chroma = picture[0, : geometry.height], picture[0, geometry.height :]
    samples[: 4 * half].reshape(rows, columns)[: geometry.height, : geometry.width] = luma
    for plane in range(2):
        part = samples[(4 + plane) * half :][:half].reshape(rows // 2, columns // 2)
        part[: geometry.height // 2, : geometry.width // 2] = chroma[:, plane::2]
    return samples, np.array(places, np.int64)


def warm_up() -> None:
    """Compile what `encode_planes` needs, or read it from numba's cache: about 20 s or 0.2 s."""
    encode_planes(np.zeros((1, 3, 160, 160), np.uint8), bit_depth=8)
    encode_planes(np.zeros((1, 3, 160, 160), np.uint16), bit_depth=10)
