"""Lossless H.265 from NVENC, the GPU's video encoder, through PyNvVideoCodec.

Written against the interface of PyNvVideoCodec 2.2 and **never run on a GPU that has NVENC**: the
H100 and H200 at hand have none (so do the A100s, by their data sheets). What it gives is therefore
trusted nowhere: a probe in a process of its own encodes and decodes pictures of 8 and 10 bits
before NVENC is used at all, and the first unit of every picture size is decoded by the CPU and
compared, sample by sample. Whatever NVENC refuses or changes is encoded by libx265.

``python -m kvfetcher.codec.gpu.nvenc`` runs the probe: exit status 0 = usable, else says why not.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher.codec.gpu.nvdec import import_library
from kvfetcher.codec.video import VideoDecoder, checked_geometry, encode_planes
from kvfetcher.errors import CodecError, EncoderUnavailableError

if TYPE_CHECKING:
    from kvfetcher.format.pictures import Chroma, Integers, PlaneGeometry

# Names of input surfaces. Samples of 10 bits lie in the high bits of 16, as NVDEC gives them.
_SURFACES: dict[tuple[Chroma, int], str] = {
    ("4:4:4", 8): "YUV444",
    ("4:4:4", 10): "YUV444_16BIT",
    ("4:2:0", 8): "NV12",
    ("4:2:0", 10): "P010",
}
# All of P1 to P7 are lossless with this tuning, which sets the quantiser to 0 and bypasses the
# transform; which one is best for such pictures could not be measured.
_PRESET = "P4"
_PROBE_TIMEOUT_SECONDS = 60.0

_log = logging.getLogger(__name__)


class NvencEncoder:
    """The `PlaneEncoder` on NVENC. Thread-safe; units are encoded one after the other.

    Args:
        gpu: index of the GPU, as CUDA counts.

    Raises:
        EncoderUnavailableError: no driver, no PyNvVideoCodec, or no NVENC that codes HEVC without
            loss.
    """

    def __init__(self, gpu: int = 0) -> None:
        try:
            self._nvc = import_library()
        except CodecError as exc:
            raise EncoderUnavailableError(f"NVENC is not usable: {exc}") from exc
        self._gpu = gpu
        self._caps = _ask(self._nvc, gpu)
        self._lock = threading.Lock()
        self._proven: dict[tuple[PlaneGeometry, int], bool] = {}
        """By geometry of one picture and group size: whether NVENC gave back what it was given."""

    def __call__(
        self,
        planes: Integers,
        *,
        bit_depth: int,
        chroma: Chroma = "4:4:4",
        gop: int = 1,
        fast: bool = False,
    ) -> list[bytes]:
        """Encode as `video.encode_planes` does; `fast` matters to libx265 alone."""
        geometry = checked_geometry(planes, bit_depth=bit_depth, chroma=chroma)
        if not self.refusal(geometry):
            with self._lock:
                packets = self._encode_proven(planes, geometry, gop)
            if packets is not None:
                return packets
        return encode_planes(planes, bit_depth=bit_depth, chroma=chroma, gop=gop, fast=fast)

    def refusal(self, geometry: PlaneGeometry) -> str:
        """Why pictures of `geometry` are not for NVENC; empty = they may be."""
        if (geometry.chroma, geometry.bit_depth) not in _SURFACES:
            return f"NVENC codes no {geometry.chroma} of {geometry.bit_depth} bits"
        if geometry.bit_depth == 10 and not self._caps.ten_bit:
            return "this GPU's NVENC codes no 10 bits"
        if geometry.chroma == "4:4:4" and not self._caps.yuv444:
            return "this GPU's NVENC codes no 4:4:4"
        if geometry.width % 2 or geometry.height % 2:
            return "NVENC codes pictures with even sides"
        if geometry.width > self._caps.max_width or geometry.height > self._caps.max_height:
            return f"this GPU's NVENC codes up to {self._caps.max_width}x{self._caps.max_height}"
        return ""

    def is_proven(self, geometry: PlaneGeometry, *, gop: int) -> bool:
        """Whether such pictures came back as they were."""
        with self._lock:
            return self._proven.get((_one_picture(geometry), gop), False)

    def _encode_proven(
        self, planes: Integers, geometry: PlaneGeometry, gop: int
    ) -> list[bytes] | None:
        """Packets that are known to decode to `planes`; None = not from NVENC."""
        key = (_one_picture(geometry), gop)
        if self._proven.get(key) is False:
            return None
        try:
            packets = self._encode(planes, geometry, gop)
            if key not in self._proven:
                decoded = VideoDecoder().decode(packets, geometry)
                if not np.array_equal(decoded, planes):
                    raise CodecError("it changed the samples of a lossless picture")
                self._proven[key] = True
        except CodecError as exc:
            self._proven[key] = False
            _log.warning("NVENC is not used for %s: %s", geometry, exc)
            return None
        return packets

    def _encode(self, planes: Integers, geometry: PlaneGeometry, gop: int) -> list[bytes]:
        """One access unit per picture, from a session of its own.

        A session ends with its last picture: only then NVENC gives out the ones that it held back.
        """
        shift = 0 if geometry.bit_depth == 8 else 16 - geometry.bit_depth
        try:
            encoder = self._nvc.CreateEncoder(
                geometry.width,
                geometry.height,
                _SURFACES[geometry.chroma, geometry.bit_depth],
                True,  # the input is host memory
                gpu_id=self._gpu,
                codec="hevc",
                preset=_PRESET,
                tuning_info="lossless",
                gop=gop,
                idrperiod=gop,
                bf=0,
                repeatspspps=1,
            )
            packets = []
            for picture in planes:
                surface = np.ascontiguousarray(picture << shift if shift else picture)
                packets += encoder.Encode(surface.reshape(-1).view(np.uint8))
            packets += encoder.EndEncode()
            units = [bytes(packet["data"]) for packet in packets]
        except Exception as exc:
            # The library has errors of its own, RuntimeErrors and TypeErrors of its bindings.
            raise CodecError(f"NVENC failed on {geometry}: {exc}") from exc
        if len(units) != geometry.num_frames:
            raise CodecError(f"NVENC gave {len(units)} packets for {geometry.num_frames} pictures")
        return units


def proven_encoder() -> NvencEncoder:
    """NVENC, after its probe.

    Raises:
        EncoderUnavailableError: it is missing, fails, or changes samples.
    """
    _probe_elsewhere()
    return NvencEncoder()


def probe() -> None:
    """Encode pictures on NVENC and compare.

    Raises:
        EncoderUnavailableError: NVENC is missing, fails, or changes samples.
    """
    encoder = NvencEncoder()
    for bit_depth in (8, 10):
        rng = np.random.default_rng(bit_depth)
        noise = rng.integers(0, 1 << bit_depth, (2, 3, 160, 256))
        planes: Integers = noise.astype(np.uint8) if bit_depth == 8 else noise.astype(np.uint16)
        geometry = checked_geometry(planes, bit_depth=bit_depth, chroma="4:4:4")
        if reason := encoder.refusal(geometry):
            raise EncoderUnavailableError(f"{reason}; chunks are 4:4:4 of 8 and 10 bits")
        encoder(planes, bit_depth=bit_depth, gop=1)
        if not encoder.is_proven(geometry, gop=1):
            raise EncoderUnavailableError(
                f"NVENC did not code {geometry} without loss; the log says how"
            )


def _probe_elsewhere() -> None:
    """`probe` in a process of its own: it leaves a CUDA context behind, and may crash."""
    command = [sys.executable, "-m", "kvfetcher.codec.gpu.nvenc"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as exc:
        raise EncoderUnavailableError(f"the probe of NVENC failed: {exc}") from exc
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise EncoderUnavailableError(
            lines[-1] if lines else f"the probe of NVENC ended with status {done.returncode}"
        )


@dataclass(frozen=True, slots=True)
class _Caps:
    """What the driver says about NVENC's HEVC."""

    yuv444: bool
    ten_bit: bool
    max_width: int
    max_height: int


def _ask(nvc: Any, gpu: int) -> _Caps:
    try:
        caps = nvc.GetEncoderCaps(gpuid=gpu, codec="hevc")
    except Exception as exc:
        raise EncoderUnavailableError(
            f"this GPU has no NVENC: opening an encoder fails ({' '.join(str(exc).split())})"
        ) from exc
    if not caps.get("num_encoder_engines", 0):
        raise EncoderUnavailableError("this GPU has no NVENC")
    if not caps.get("support_lossless_encode", 0):
        raise EncoderUnavailableError("this GPU's NVENC does not code without loss")
    return _Caps(
        yuv444=bool(caps.get("support_yuv444_encode", 0)),
        ten_bit=bool(caps.get("support_10bit_encode", 0)),
        max_width=caps.get("width_max", 0),
        max_height=caps.get("height_max", 0),
    )


def _one_picture(geometry: PlaneGeometry) -> PlaneGeometry:
    return replace(geometry, num_frames=1)


def main() -> int:
    """Run the probe; exit status 1 where NVENC is not usable."""
    try:
        probe()
    except EncoderUnavailableError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
