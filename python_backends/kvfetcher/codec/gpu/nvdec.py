"""Planes of a unit from NVDEC, the GPU's video engine, through PyNvVideoCodec.

Packets go from memory straight into the driver's parser: no container, no demuxer. Decoders stay
open from unit to unit. The planes are copied to host memory, or kept on the GPU for `kv_restore`.

One process per engine is the way to use all engines: seven threads of one process reach a third of
what seven processes do (H100, PyNvVideoCodec 2.2.4). ``python -m kvfetcher.codec.gpu.nvdec [GPU]`` prints
what the driver offers as JSON.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher.errors import CodecError, DecoderUnavailableError, GpuError
from kvfetcher.format.pictures import BIT_DEPTHS
from kvfetcher.memory import cuda
from kvfetcher.memory.cuda import cuda_context

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvfetcher.format.pictures import Chroma, Integers, PlaneGeometry
    from kvfetcher.memory.cuda import CudaContext

MIN_LIBRARY = "2.2.4"
"""Of PyNvVideoCodec. 2.2.0 to 2.2.3 give the strides of 16-bit pictures in bytes, not in samples."""
# PyNvVideoCodec loads both, the encoder's too although nothing here encodes.
DRIVER_LIBRARIES = ("libcuda.so.1", "libnvcuvid.so.1", "libnvidia-encode.so.1")
REMEDY = f'{cuda.REMEDY}; or set codec.decoder = "cpu"'
_CHROMAS: tuple[Chroma, ...] = ("4:2:0", "4:4:4")
# At the driver's own lower limit of 144 columns NVDEC gave wrong samples for six golden units of 8-bit
# 4:4:4 (H100, driver 580.159; in ladder_8bit, paper_8bit_two_sizes, uncalibrated_fp8; 6 of 23 in each
# of 100 passes), yet right ones for noise of that size. From 145 columns, coded as 152, on none was
# wrong. The cause is not known; such small pictures are left to the CPU decoder.
MIN_WIDTH = 150
MAX_SESSIONS = 8
"""Open decoders kept by one `NvdecDecoder`; the one unused for longest goes first.

The layer groups of a chunk have a few different sizes, which come again with every chunk; opening a
decoder takes 60 to 500 ms.
"""
MAX_SESSION_BYTES = 256 << 20
"""Of one picture of each of them, together; an open decoder keeps a few pictures on the GPU.

Eight usual sizes (1024x1634, 10 bits) have 80 MB; large ones push others out.
"""
# Asking means creating a CUDA context: a second or two on a busy host, much more on a sick one.
_ASK_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class DecoderCaps:
    """What the driver says about HEVC of one chroma format and bit depth."""

    chroma: Chroma
    bit_depth: int
    num_engines: int
    """0 = not supported."""
    min_width: int
    min_height: int
    max_width: int
    max_height: int

    def refusal(self, geometry: PlaneGeometry) -> str:
        """Why pictures of `geometry` cannot be decoded; empty = they can."""
        width, height = geometry.width, geometry.height
        # The driver sees the coded size, in whole coding units of at least 8x8.
        coded_width, coded_height = _round_up(width, 8), _round_up(height, 8)
        fits = (
            self.num_engines > 0
            and width >= MIN_WIDTH
            and self.min_width <= coded_width <= self.max_width
            and self.min_height <= coded_height <= self.max_height
        )
        if fits:
            return ""
        if not self.num_engines:
            return f"NVDEC of this GPU has no HEVC {self.chroma} of {self.bit_depth} bits"
        return (
            f"NVDEC of this GPU decodes HEVC {self.chroma} of {self.bit_depth} bits from"
            f" {max(self.min_width, MIN_WIDTH)}x{self.min_height} to {self.max_width}x{self.max_height}, the unit's"
            f" pictures are {width}x{height}"
        )


class NvdecDecoder:
    """The `Decoder` of format/pictures.py on NVDEC. Not thread-safe: one per thread, one per process.

    Args:
        gpu: index of the GPU, as CUDA counts.

    Raises:
        DecoderUnavailableError: no GPU, no driver library, or no PyNvVideoCodec; with the remedy.
    """

    def __init__(self, gpu: int = 0) -> None:
        self._nvc = import_library()
        self._gpu = gpu
        self.context = cuda_context(gpu)
        self._copies = _PinnedCopies(self.context)
        self._sessions: dict[tuple[int, int, int, Chroma], _Session] = {}
        self._caps: dict[tuple[int, Chroma], DecoderCaps] = {}

    def caps(self, bit_depth: int, chroma: Chroma) -> DecoderCaps:
        """What the driver offers for such pictures; asked once."""
        key = (bit_depth, chroma)
        if key not in self._caps:
            self._caps[key] = _ask(self._nvc, self._gpu, bit_depth, chroma)
        return self._caps[key]

    def decode(self, packets: Sequence[bytes | memoryview], geometry: PlaneGeometry) -> Integers:
        """Decode one unit's packets.

        Args:
            packets: one access unit per picture; the first is an intra picture.
            geometry: what the pictures must be.

        Returns:
            ``geometry.shape`` of ``geometry.dtype`` in host memory; a new array.

        A damaged slice may give wrong samples without an error, as with any video decoder: the
        unit's CRC-32 and integer digest are there for that.

        Raises:
            CodecError: the stream is damaged or its pictures are not what `geometry` says. The
                session is dropped; the next call opens a fresh one.
            DecoderUnavailableError: the engine refuses such pictures; quotes its limits.
        """
        planes = np.empty(geometry.shape, geometry.dtype)
        for index, frame in self._frames(packets, geometry):
            self._copies.copy_out(frame, planes[index], shift=sample_shift(geometry))
        return planes

    def decode_on_gpu(
        self,
        packets: Sequence[bytes | memoryview],
        geometry: PlaneGeometry,
        place: Callable[[], int | None] | None = None,
    ) -> Integers | None:
        """Decode and keep the pictures on the GPU.

        Args:
            packets: as for `decode`.
            geometry: as for `decode`.
            place: asked when the first picture is there, so that memory is held only from then on:
                the address of ``geometry.num_bytes`` of GPU memory for the planes, whose samples
                lie `sample_shift` bits up there. The copies are given to `context`'s default
                stream, not waited for. It gives None = there is no room. No `place` = the pictures
                are dropped (the engine's own rate).

        Returns:
            None; where there was no room, the planes in host memory, as from `decode`.

        Raises:
            CodecError, DecoderUnavailableError: as `decode`.
            GpuError: a copy failed.
        """
        num_bytes = _picture_bytes(geometry)
        address: int | None = None
        planes: Integers | None = None
        for index, frame in self._frames(packets, geometry):
            if place is None:
                continue
            if index == 0 and (address := place()) is None:
                planes = np.empty(geometry.shape, geometry.dtype)
            if address is not None:
                # On the stream that PyNvVideoCodec uses: in order, before the surface is reused.
                self.context.copy(address + index * num_bytes, frame, num_bytes)
            elif planes is not None:
                self._copies.copy_out(frame, planes[index], shift=sample_shift(geometry))
        return planes

    def is_lost(self) -> bool:
        """Whether no further unit can be decoded by this process; waits for the GPU."""
        return self.context.is_lost()

    def close(self) -> None:
        """Free the sessions; the next `decode` opens new ones."""
        self._sessions.clear()
        self._copies.free()

    def _frames(self, packets: Sequence[bytes | memoryview], geometry: PlaneGeometry) -> Any:
        """(index, address) of each picture; an address is good until the next one is asked for."""
        caps = self.caps(geometry.bit_depth, geometry.chroma)
        if refusal := caps.refusal(geometry):
            raise DecoderUnavailableError(f"{refusal}; it is left to the CPU decoder")
        count = 0
        try:
            session = self._session(geometry)
            for packet in packets:
                for frame in session.feed(packet):
                    if count == geometry.num_frames:
                        raise CodecError(f"video holds more than {geometry.num_frames} pictures")
                    yield count, _checked_address(frame, geometry)
                    count += 1
            if count != geometry.num_frames:
                raise CodecError(f"video holds {count} pictures, expected {geometry.num_frames}")
        except BaseException as exc:
            self._sessions.pop(_session_key(geometry), None)  # an unknown state is not kept
            if isinstance(exc, CodecError | GpuError) or not isinstance(exc, Exception):
                raise
            # The library has errors of its own and RuntimeErrors of the driver.
            raise CodecError(f"video of {geometry} does not decode on NVDEC: {exc}") from exc

    def _session(self, geometry: PlaneGeometry) -> _Session:
        key = _session_key(geometry)
        session = self._sessions.pop(key, None)
        if session is None:
            room = MAX_SESSION_BYTES - _picture_bytes(geometry)
            while self._sessions and (
                len(self._sessions) >= MAX_SESSIONS
                or sum(s.picture_bytes for s in self._sessions.values()) > room
            ):
                del self._sessions[next(iter(self._sessions))]
            session = _Session(self._nvc, self._gpu, geometry)
        self._sessions[key] = session  # the latest at the end
        return session


class _Session:
    """One open decoder for pictures of one size, bit depth and chroma format.

    `setReconfigParams` of PyNvVideoCodec 2.2.4 does not serve for other sizes: it makes the engine
    scale to the size that it is given, which changes the samples of pictures with odd sides, and
    without a size it keeps the old one (H100).
    """

    def __init__(self, nvc: Any, gpu: int, geometry: PlaneGeometry) -> None:
        self._nvc = nvc
        self.picture_bytes = _picture_bytes(geometry)
        self._decoder = nvc.CreateDecoder(
            gpuid=gpu,
            codec=nvc.cudaVideoCodec.HEVC,
            cudacontext=0,
            cudastream=0,
            usedevicememory=True,
            # The driver counts the size before cropping, up to 63 more each way.
            maxwidth=_round_up(geometry.width, 64),
            maxheight=_round_up(geometry.height, 64),
            latency=nvc.DisplayDecodeLatencyType.LOW,
        )

    def feed(self, packet: bytes | memoryview) -> list[Any]:
        """The pictures that one access unit completes: its own, as there is no reordering."""
        data = np.frombuffer(packet, np.uint8)
        handed = self._nvc.PacketData()
        handed.bsl_data = data.ctypes.data
        handed.bsl = data.size
        # Else the parser holds a picture back until it sees the next one begin.
        handed.decode_flag = self._nvc.VideoPacketFlag.ENDOFPICTURE
        frames: list[Any] = self._decoder.Decode(handed)
        return frames


class _PinnedCopies:
    """Copies of decoded pictures to the host.

    They pass through page-locked memory: to pageable memory the driver copies in small steps.
    """

    def __init__(self, context: CudaContext) -> None:
        self._context = context
        self._address = 0
        self._num_bytes = 0

    def copy_out(self, address: int, target: Integers, *, shift: int) -> None:
        """Copy a contiguous picture into `target` [P, Y, X], its values shifted to the low bits."""
        if self._num_bytes < target.nbytes:
            self.free()
            self._address = self._context.allocate_host(target.nbytes)
            self._num_bytes = target.nbytes
        # PyNvVideoCodec copies the picture off the engine's surface asynchronously.
        self._context.synchronize()
        self._context.copy_to_host(self._address, address, target.nbytes)
        buffer = (ctypes.c_uint8 * target.nbytes).from_address(self._address)
        source = np.frombuffer(memoryview(buffer), target.dtype).reshape(target.shape)
        if shift:
            np.right_shift(source, shift, out=target)
        else:
            target[...] = source

    def free(self) -> None:
        if self._num_bytes:
            self._num_bytes = 0
            self._context.free_host(self._address)


def has_driver() -> bool:
    """Whether an NVIDIA driver is on this machine, with or without its video libraries."""
    return loads_library("libcuda.so.1")


@functools.cache
def count_engines(gpu: int) -> int:
    """NVDEC engines of a GPU that decode HEVC 4:4:4; 0 where there are none, or no such GPU."""
    installed = importlib.util.find_spec("PyNvVideoCodec") is not None
    if not (installed and all(map(loads_library, DRIVER_LIBRARIES))):
        return 0
    try:
        caps = ask_caps(gpu)
    except DecoderUnavailableError:
        return 0
    return max((c.num_engines for c in caps if c.chroma == "4:4:4"), default=0)


def ask_caps(gpu: int) -> list[DecoderCaps]:
    """`all_caps` from a process of its own: asking leaves a CUDA context behind.

    Raises:
        DecoderUnavailableError: as `all_caps`; or there was no answer.
    """
    command = [sys.executable, "-m", "kvfetcher.codec.gpu.nvdec", str(gpu)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ASK_TIMEOUT_SECONDS, check=False
        )
        if done.returncode == 0:
            return [DecoderCaps(**caps) for caps in json.loads(done.stdout.splitlines()[-1])]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError) as exc:
        raise DecoderUnavailableError(f"the driver was asked what it can do: {exc}") from exc
    reason = done.stderr.strip() or f"exit status {done.returncode}"
    raise DecoderUnavailableError(reason.splitlines()[-1])


def all_caps(gpu: int) -> list[DecoderCaps]:
    """What the driver offers for every chroma format and bit depth of this codec.

    Raises:
        DecoderUnavailableError: as `NvdecDecoder`.
    """
    nvc = import_library()
    cuda_context(gpu)  # says so where there is no such GPU
    return [_ask(nvc, gpu, depth, chroma) for chroma in _CHROMAS for depth in BIT_DEPTHS]


def import_library() -> Any:
    """PyNvVideoCodec, after making sure that the driver's libraries are there.

    Raises:
        DecoderUnavailableError: a library or the package is missing or too old; with the remedy.
    """
    for library in DRIVER_LIBRARIES:
        if not loads_library(library):
            raise DecoderUnavailableError(f"NVDEC is not usable: no {library} here; {REMEDY}")
    try:
        import PyNvVideoCodec
    except (ImportError, RuntimeError) as exc:
        raise DecoderUnavailableError(
            f"NVDEC is not usable: PyNvVideoCodec cannot be imported ({exc}); pip install"
            f" 'kvfetcher[gpu]'; {REMEDY}"
        ) from exc
    if is_too_old(found := str(getattr(PyNvVideoCodec, "__version__", ""))):
        raise DecoderUnavailableError(
            f"NVDEC is not usable: PyNvVideoCodec {found} gives the strides of 10- and 12-bit"
            f" pictures in bytes; pip install 'PyNvVideoCodec>={MIN_LIBRARY},<3', or set"
            ' codec.decoder = "cpu"'
        )
    return PyNvVideoCodec


def is_too_old(version: str) -> bool:
    """Whether a version of PyNvVideoCodec is below `MIN_LIBRARY`; one that is not numbers is not.

    Example:
        >>> is_too_old("2.2.3"), is_too_old("2.10.0")
        (True, False)
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    lowest = tuple(int(part) for part in MIN_LIBRARY.split("."))
    return found is not None and tuple(int(part or 0) for part in found.groups()) < lowest


def loads_library(library: str) -> bool:
    """Whether the dynamic linker finds and loads a shared library of this name."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _ask(nvc: Any, gpu: int, bit_depth: int, chroma: Chroma) -> DecoderCaps:
    formats = nvc.cudaVideoChromaFormat.__members__
    try:
        found = nvc.GetDecoderCaps(
            gpuid=gpu,
            codec=nvc.cudaVideoCodec.HEVC,
            chromaformat=formats[chroma.replace(":", "")],
            bitdepth=bit_depth,
        )
    except Exception as exc:
        raise DecoderUnavailableError(
            f"the driver does not say what NVDEC of GPU {gpu} can do: {exc}; {REMEDY}"
        ) from exc
    return DecoderCaps(
        chroma=chroma,
        bit_depth=bit_depth,
        num_engines=found.get("num_decoder_engines", 0),
        min_width=found.get("width_min", 0),
        min_height=found.get("height_min", 0),
        max_width=found.get("width_max", 0),
        max_height=found.get("height_max", 0),
    )


def _checked_address(frame: Any, geometry: PlaneGeometry) -> int:
    """Where a picture lies, after checking that it is one of ours and has no gaps."""
    rows = geometry.num_planes * geometry.rows
    shape = tuple(int(n) for n in frame.shape)
    if shape[:2] != (rows, geometry.width):
        raise CodecError(f"video has a picture of {shape} (rows, columns), expected {geometry}")
    # Of all the pointers only the first is right: those of 16-bit 4:4:4 count samples, not bytes.
    num_bytes = rows * geometry.width * geometry.dtype.itemsize
    if tuple(frame.strides) != (geometry.width, 1) or int(frame.framesize()) != num_bytes:
        raise DecoderUnavailableError(
            f"PyNvVideoCodec gives pictures of {geometry} with strides {tuple(frame.strides)}, expected"
            f" {(geometry.width, 1)} (samples); use PyNvVideoCodec {MIN_LIBRARY} or a later 2.x"
        )
    return int(frame.GetPtrToPlane(0))


def sample_shift(geometry: PlaneGeometry) -> int:
    """Number of bits by which NVDEC shifts samples up; more than 8 bits lie in the high bits of 16."""
    return 0 if geometry.bit_depth == 8 else 16 - geometry.bit_depth


def _picture_bytes(geometry: PlaneGeometry) -> int:
    return geometry.num_bytes // geometry.num_frames


def _session_key(geometry: PlaneGeometry) -> tuple[int, int, int, Chroma]:
    return geometry.width, geometry.height, geometry.bit_depth, geometry.chroma


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def main(arguments: Sequence[str]) -> int:
    """Print the capabilities of a GPU as JSON; exit status 1 where there are none.

    Args:
        arguments: the GPU; none = 0.
    """
    try:
        caps = all_caps(int(arguments[0]) if arguments else 0)
    except DecoderUnavailableError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    sys.stdout.write(json.dumps([asdict(c) for c in caps]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
