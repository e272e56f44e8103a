"""Planes <-> lossless H.265 on any CPU: libx265 and FFmpeg's decoder, through PyAV.

Encoding is lossless always; one access unit per picture. Neither side is thread-safe; work on
different units runs side by side, because PyAV releases the GIL while it codes.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np

from kvfetcher.errors import CodecError, DecoderUnavailableError
from kvfetcher.format.pictures import PlaneGeometry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvfetcher.codec.base import PlaneEncoder, UnitSource
    from kvfetcher.format.pictures import Chroma, Integers

# All work in the calling thread (units are the parallelism), so no pool and no wavefront, whose
# entry points also cost bits. Presets slower than ultrafast gain 0.2 % (reference: KLT symbols).
# A lossless picture passes the loop filters unchanged; off, the decoder need not look.
_X265 = (
    "lossless=1:info=0:repeat-headers=1:log-level=none:pools=none:frame-threads=1:wpp=0"
    ":deblock=0:sao=0:bframes=0:scenecut=0:rc-lookahead=0:open-gop=0"
)

_FAST_UNIT = 32


def encode_planes(
    planes: Integers,
    *,
    bit_depth: int,
    chroma: Chroma = "4:4:4",
    gop: int = 1,
    fast: bool = False,
) -> list[bytes]:
    """Encode pictures without loss.

    Args:
        planes: [F, P, Y, X] as `PlaneGeometry` describes it; uint8 at bit depth 8, else uint16.
        bit_depth: 8, 10 or 12; samples are below ``2**bit_depth``.
        chroma: "4:4:4" (P = 3) or "4:2:0" (P = 1, NV12 order).
        gop: pictures from one intra picture to the next; 1 = every packet decodes alone.
        fast: coding units of 32x32 only, where both sides are multiples of 32: about 1.7 times the
            speed for 0.6 to 1 % more bits.

    Returns:
        One access unit (Annex B, with parameter sets) per picture.

    Raises:
        CodecError: shape, dtype or range do not fit, or the encoder failed.

    Example:
        >>> planes = np.zeros((2, 3, 144, 160), np.uint8)  # two pictures of 160x144, 4:4:4
        >>> packets = encode_planes(planes, bit_depth=8)
        >>> len(packets)
        2
        >>> back = VideoDecoder().decode(packets, PlaneGeometry(2, 160, 144, 8))
        >>> np.array_equal(back, planes)
        True
    """
    geometry = checked_geometry(planes, bit_depth=bit_depth, chroma=chroma)
    packets: list[bytes] = []
    try:
        context = av.CodecContext.create("libx265", "w")
        context.width, context.height = geometry.width, geometry.height
        context.pix_fmt = geometry.pix_fmt
        context.time_base, context.framerate = Fraction(1, 25), Fraction(25)
        context.options = {
            "preset": "ultrafast",
            "x265-params": x265_params(geometry, gop=gop, fast=fast),
        }
        for index, picture in enumerate(planes):
            frame = av.VideoFrame(geometry.width, geometry.height, geometry.pix_fmt)
            _fill(frame, picture, geometry)
            frame.pts = index
            packets += map(bytes, context.encode(frame))
        packets += map(bytes, context.encode(None))
    except (av.FFmpegError, ValueError, MemoryError) as exc:
        raise CodecError(f"libx265 failed on {geometry}: {exc}") from exc
    if len(packets) != geometry.num_frames:
        raise CodecError(
            f"libx265 gave {len(packets)} packets for {geometry.num_frames} pictures of {geometry}"
        )
    return packets


def x265_params(geometry: PlaneGeometry, *, gop: int, fast: bool) -> str:
    """Parameters for x265, as key=value joined by colons; the arguments are `encode_planes`'s.

    FFmpeg only warns of a key or a value that x265 does not know: a test asks x265 itself.
    """
    # Other sizes x265 would fill up to whole coding units with memory that nobody wrote: streams
    # that differ from run to run, and at times do not decode to the picture (x265 in PyAV 18.1,
    # 144x200 at 12 bits: up to a third of them).
    whole = geometry.width % _FAST_UNIT == 0 and geometry.height % _FAST_UNIT == 0
    smallest = f":min-cu-size={_FAST_UNIT}" if fast and whole else ""
    return f"{_X265}:keyint={gop}:min-keyint={gop}{smallest}"


def encode_for(
    source: UnitSource, planes: Integers, *, bit_depth: int, gop: int = 1, fast: bool = False
) -> list[bytes]:
    """`encode_planes` of 4:4:4 pictures, with the encoder that `source` was given."""
    encode: PlaneEncoder = source.encoder or encode_planes
    return encode(planes, bit_depth=bit_depth, gop=gop, fast=fast)


def checked_geometry(planes: Integers, *, bit_depth: int, chroma: Chroma) -> PlaneGeometry:
    """What pictures `planes` [F, P, Y, X] are.

    Raises:
        CodecError: shape, dtype or range do not fit.
    """
    height = planes.shape[2] if chroma == "4:4:4" else planes.shape[2] * 2 // 3
    geometry = PlaneGeometry(planes.shape[0], planes.shape[3], height, bit_depth, chroma)
    if planes.shape != geometry.shape or planes.dtype != geometry.dtype:
        raise CodecError(
            f"planes must be {geometry.shape} {geometry.dtype} for {bit_depth} bit {chroma}, got"
            f" {planes.shape} {planes.dtype}"
        )
    if bit_depth > 8 and int(planes.max()) >> bit_depth:
        raise CodecError(f"planes hold {int(planes.max())}, which is not below 2**{bit_depth}")
    return geometry


class VideoDecoder:
    """FFmpeg's HEVC decoder, kept open from unit to unit of the same geometry.

    Not thread-safe: one per thread. Decodes in the calling thread.
    """

    def __init__(self) -> None:
        self._context: av.VideoCodecContext | None = None
        self._opened_for: tuple[int, int, str] | None = None

    def decode(self, packets: Sequence[bytes | memoryview], geometry: PlaneGeometry) -> Integers:
        """Decode one unit's packets.

        Args:
            packets: one access unit per picture; the first is an intra picture.
            geometry: what the pictures must be.

        Returns:
            ``geometry.shape`` of ``geometry.dtype``; a new array.

        A damaged slice may give wrong samples without an error (FFmpeg conceals what it cannot
        read, and does not always say so): the unit's CRC-32 and integer digest are there for that.

        Raises:
            CodecError: the stream is damaged or its pictures are not what `geometry` says.
            DecoderUnavailableError: this FFmpeg has no HEVC decoder.
        """
        planes = np.empty(geometry.shape, geometry.dtype)
        count = 0
        context = self._open(geometry)
        try:
            for packet in (*packets, None):
                for frame in context.decode(None if packet is None else av.Packet(packet)):
                    if count == geometry.num_frames:
                        raise CodecError(f"video holds more than {geometry.num_frames} pictures")
                    _read(frame, planes[count], geometry)
                    count += 1
            context.flush_buffers()
        except BaseException as exc:
            self.close()  # an unknown state is not kept
            if isinstance(exc, av.FFmpegError | ValueError):
                raise CodecError(f"video of {geometry} does not decode: {exc}") from exc
            raise
        if count != geometry.num_frames:
            self.close()
            raise CodecError(f"video holds {count} pictures, expected {geometry.num_frames}")
        return planes

    def close(self) -> None:
        """Free the decoder; the next `decode` opens a new one."""
        self._context = None
        self._opened_for = None

    def _open(self, geometry: PlaneGeometry) -> av.VideoCodecContext:
        key = (geometry.width, geometry.height, geometry.pix_fmt)
        if self._context is not None and self._opened_for == key:
            return self._context
        try:
            context = av.CodecContext.create("hevc", "r")
        except (av.FFmpegError, ValueError) as exc:  # PyAV's UnknownCodecError is a ValueError
            raise DecoderUnavailableError(
                "this FFmpeg has no HEVC decoder; install the `av` wheel from PyPI"
            ) from exc
        assert isinstance(context, av.VideoCodecContext)
        context.thread_count = 1
        context.options = {
            # Errors that the decoder does notice stop it.
            "err_detect": "crccheck+bitstream+buffer+explode",
            # A hostile stream may claim 8192x8192; nothing larger than announced is allocated
            # (FFmpeg counts padded rows and the size before cropping: up to 63 more each way).
            "max_pixels": str(
                (geometry.width + 63) // 64 * 64 * ((geometry.height + 63) // 64) * 64
            ),
        }
        self._context, self._opened_for = context, key
        return context


def _fill(frame: av.VideoFrame, picture: Integers, geometry: PlaneGeometry) -> None:
    """Copy one picture [P, Y, X] into a frame's padded rows."""
    if geometry.chroma == "4:4:4":
        sources = [picture[0], picture[1], picture[2]]
    else:
        luma, chroma = picture[0, : geometry.height], picture[0, geometry.height :]
        sources = [luma, chroma[:, 0::2], chroma[:, 1::2]]
    for plane, source in zip(frame.planes, sources, strict=True):
        rows = np.frombuffer(plane, geometry.dtype).reshape(plane.height, -1)
        rows[:, : source.shape[1]] = source


def _read(frame: av.VideoFrame, out: Integers, geometry: PlaneGeometry) -> None:
    """Copy a decoded frame into one picture [P, Y, X], after checking that it is one of ours."""
    got = (frame.width, frame.height, frame.format.name)
    if got != (geometry.width, geometry.height, geometry.pix_fmt):
        raise CodecError(f"video has a picture of {got}, expected {geometry}")
    if geometry.chroma == "4:4:4":
        targets = [out[0], out[1], out[2]]
    else:
        chroma = out[0, geometry.height :]
        targets = [out[0, : geometry.height], chroma[:, 0::2], chroma[:, 1::2]]
    for plane, target in zip(frame.planes, targets, strict=True):
        rows = np.frombuffer(plane, geometry.dtype).reshape(plane.height, -1)
        target[...] = rows[:, : target.shape[1]]
