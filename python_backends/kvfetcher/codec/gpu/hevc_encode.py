"""Lossless H.265 on a GPU: the bytes of `kvfetcher.codec.hevc`, made by the kernels of hevc_encode.cu.

Pictures of any number of units and chunks are coded together, because one row of coding tree blocks is
one thread's work and a GPU has room for ten thousand. They go through in strips of two CTUs' width, so
that tokens, the largest thing, exist of a strip or two only; what a batch takes is known before it
starts (`batch_bytes`), and larger ones are cut. A picture that does not fit its rooms is coded again
with rooms for the worst case, and is the caller's to code elsewhere where it does not fit those.

The arithmetic coder's time is that of the longest row, however many there are: 1,024 columns of
3.8 bits take about 20 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from kvfetcher.codec.hevc import tables
from kvfetcher.codec.hevc.headers import StreamFormat, parameter_sets, slice_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

CTB = 32
MAX_MEMORY_BYTES = 512 << 20
"""GPU memory that a batch may take, its pictures' samples included."""

STRIP_CTUS = 2
"""Width of a strip. The first must have the two CTUs that a row's contexts come from."""
_SAMPLES = 3 * CTB * CTB
_SUB_BLOCKS = 192
_CONTEXT_BYTES = 128
_PLAN_BYTES = 8
_STATE_BYTES = 32
_ROW_BYTES = _CONTEXT_BYTES + _STATE_BYTES + 4 + 4 + 4 + 4 + 8
_PLAN_WARPS = _TOKEN_WARPS = 4
_IS_WIDE, _IS_ALIGNED = 1, 2

_PICTURE = np.dtype(
    [
        ("samples", "<u8"),
        ("plane", "<i8"),
        *((name, "<i4") for name in ("stride", "width", "height", "ctus", "ctu_rows")),
        *((name, "<i4") for name in ("first_row", "first_ctu", "bit_depth", "flags", "reserved")),
    ],
    align=True,
)


class Rooms(NamedTuple):
    """Memory for what a batch makes of a sample, on average over a CTU or a row."""

    tokens: float
    """Of 16 bits each."""
    words: float
    """Bytes of bitstream, before emulation prevention."""


# White noise of 8 bits makes 2.6 tokens a sample, the ladder's pictures 1.2, `uncalibrated` ones 1.9.
_USUAL_TOKENS = 2.75
# By bit depth; a row may be denser than its picture: units' rows come by falling deviation.
_USUAL_WORDS = {8: 0.85, 10: 1.0, 12: 1.4}
# 16 bits of significance, greater1 and sign, and 32 of the longest coeff_abs_level_remaining. More
# bytes than that no picture needs that is not for PCM, but for a row of its own kind.
WORST = Rooms(tokens=5.5, words=3.0)
_NO_ROOMS = Rooms(0, 0)
_LANES = 2


class Launcher(Protocol):
    """Starts kernels of hevc_encode.cu."""

    def launch(
        self,
        kernel: str,
        blocks: tuple[int, int],
        threads: int,
        parameters: Parameters,
        stream: int,
    ) -> None:
        """Start one on a CUDA stream (its handle).

        Raises:
            GpuError: the driver refused.
        """


class Parameters(ctypes.Structure):
    """`Batch` of hevc_encode.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_uint64)
            for name in (
                *("pictures", "row_picture", "row_order", "scan8", "range_lps", "next_state"),
                *("contexts", "plans", "stats", "tokens", "counts", "starts", "states", "words"),
                *("bits", "lengths", "offsets", "out"),
            )
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                "num_pictures",
                "num_rows",
                "first_column",
                "columns",
                "room",
                "words_room",
            )
        ),
    )


class Picture(NamedTuple):
    """One 4:4:4 picture on the GPU."""

    samples: torch.Tensor
    """[3, Y, X], uint8 at 8 bits, else int16; X contiguous."""
    bit_depth: int


class Substreams(NamedTuple):
    """The slice data of one picture: the substream of each row of CTUs, as in the bitstream."""

    data: memoryview
    lengths: NDArray[np.int64]
    """[rows] bytes of each."""


@dataclass(frozen=True, slots=True)
class _Geometry:
    """Numbers of CTUs of a batch's pictures."""

    ctus: NDArray[np.int64]
    """Columns of each picture."""
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, pictures: Sequence[Picture]) -> _Geometry:
        shapes = np.array([picture.samples.shape[1:] for picture in pictures], np.int64)
        sides = -(-shapes // CTB)
        return cls(sides[:, 1], sides[:, 0])


class BatchSize(NamedTuple):
    """What a batch's memory depends on."""

    num_rows: int = 0
    num_ctus: int = 0
    most_ctus: int = 0
    sample_bytes: int = 0

    def with_picture(self, picture: Picture) -> BatchSize:
        height, width = picture.samples.shape[1:]
        rows, ctus = -(-height // CTB), -(-width // CTB)
        return BatchSize(
            self.num_rows + rows,
            self.num_ctus + rows * ctus,
            max(self.most_ctus, ctus),
            self.sample_bytes + picture.samples.numel() * picture.samples.element_size(),
        )


class _Failed(NamedTuple):
    """In place of a picture that did not fit its rooms."""


@dataclass(frozen=True, slots=True)
class _Started:
    """A batch on its way."""

    pictures: list[Picture]
    rows: NDArray[np.int64]
    """CTU rows of each picture."""
    parameters: Parameters
    held: list[torch.Tensor]
    """What kernels use until the batch is over."""
    sizes: torch.Tensor
    """int32 [2, rows]: bits and lengths, in host memory once `measured` has happened."""
    measured: Any
    lane: Any


def usual_rooms(bit_depth: int) -> Rooms:
    """Those of a picture's first try."""
    return Rooms(_USUAL_TOKENS, _USUAL_WORDS[bit_depth])


def _room(rooms: Rooms) -> int:
    """Tokens of a CTU, a multiple of what is read at one time."""
    return (int(_SAMPLES * rooms.tokens) + 64) // 8 * 8


def _words_room(rooms: Rooms, ctus: int) -> int:
    """32-bit words of a row."""
    return int(ctus * _SAMPLES * rooms.words) // 4 + 64


def access_unit(width: int, height: int, bit_depth: int, coded: Substreams) -> bytes:
    """The access unit of one picture: what `hevc.encoder.encode_planes` gives."""
    stream = StreamFormat(width, height, bit_depth, "4:4:4", has_pcm=False)
    header = slice_header(stream, coded.lengths.tolist())
    return b"".join((parameter_sets(stream), header, coded.data))


def batch_bytes(size: BatchSize, rooms: Rooms) -> int:
    """GPU memory that a batch takes, with its samples."""
    strips = 1 if size.most_ctus <= STRIP_CTUS else 2
    return (
        size.sample_bytes
        + size.num_rows * (_ROW_BYTES + 4 * _words_room(rooms, size.most_ctus))
        + strips * size.num_rows * STRIP_CTUS * (2 * _room(rooms) + 4)
        + size.num_ctus * (_PLAN_BYTES + _SUB_BLOCKS)
    )


class HevcEncoder:
    """Codes pictures on one GPU. Not thread-safe.

    Args:
        launcher: launcher of the kernels.
        device: where the pictures lie.
        memory_bytes: what a batch may take, with its pictures.
    """

    def __init__(
        self, launcher: Launcher, device: torch.device, *, memory_bytes: int = MAX_MEMORY_BYTES
    ) -> None:
        self._launcher = launcher
        self._device = device
        self._memory_bytes = memory_bytes
        self._is_gpu = device.type == "cuda"
        entries = tables.BIN_TABLE
        scan = [x | y << 3 for x, y in tables.up_right_diagonal(8)]
        contexts = np.zeros(_CONTEXT_BYTES, np.uint8)
        contexts[: tables.NUM_CONTEXTS] = tables.first_states()
        self._tables = {
            "scan8": self._upload(np.array(scan, np.uint8)),
            "range_lps": self._upload((entries[::2] & 0xFFFFFFFF).astype(np.uint32).view(np.int32)),
            "next_state": self._upload((entries >> 32 & tables.STATE_MASK).astype(np.uint8)),
            "contexts": self._upload(contexts),
        }
        self._lanes = [_Lane(device) for _ in range(_LANES)] if self._is_gpu else []

    def encode(self, pictures: Iterable[Picture]) -> Iterator[Substreams | None]:
        """Slice data of each picture, in order; None = it is the CPU coder's.

        That codes pictures which would be larger than their samples, and those that are beyond all
        rooms. Pictures may differ in size and bit depth. They are asked for as memory becomes free, and
        let go when they are coded; what makes them may still run on the current stream.

        Raises:
            GpuError, torch.OutOfMemoryError: the GPU failed, or lacks the memory.
        """
        started: list[_Started] = []
        for turn, (batch, rooms) in enumerate(self.batches(pictures)):
            if len(started) == _LANES:
                yield from self._results(started.pop(0))
            lane = self._lanes[turn % _LANES] if self._is_gpu else None
            started.append(self._start(batch, rooms, lane))
        while started:
            yield from self._results(started.pop(0))

    def _results(self, batch: _Started) -> list[Substreams | None]:
        found = self._finish(batch)
        for number, result in enumerate(found):
            picture = batch.pictures[number]
            if isinstance(result, _Failed) and self._fits(BatchSize().with_picture(picture), WORST):
                # Alone: such a picture is rare, and takes more than its share.
                (found[number],) = self._finish(self._start([picture], WORST, batch.lane))
        return [None if isinstance(result, _Failed) else result for result in found]

    def batches(self, pictures: Iterable[Picture]) -> Iterator[tuple[list[Picture], Rooms]]:
        """As many pictures at a time as fit a lane, in order; one that fits none is alone."""
        batch: list[Picture] = []
        size, rooms = BatchSize(), _NO_ROOMS
        for picture in pictures:
            own = usual_rooms(picture.bit_depth)
            if batch and not self._fits(size.with_picture(picture), max(rooms, own)):
                yield batch, rooms
                batch, size, rooms = [], BatchSize(), _NO_ROOMS
            batch.append(picture)
            size, rooms = size.with_picture(picture), max(rooms, own)
        if batch:
            yield batch, rooms

    def _fits(self, size: BatchSize, rooms: Rooms) -> bool:
        return batch_bytes(size, rooms) <= self._memory_bytes // _LANES

    def _start(self, pictures: list[Picture], rooms: Rooms, lane: _Lane | None) -> _Started:
        """Give a batch to the GPU, up to the lengths of its substreams."""
        if lane is None:
            return self._start_on(pictures, rooms, None)
        lane.main.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(lane.main):
            return self._start_on(pictures, rooms, lane)

    def _start_on(self, pictures: list[Picture], rooms: Rooms, lane: _Lane | None) -> _Started:
        geometry = _Geometry.of(pictures)
        rows, most_ctus = geometry.rows, int(geometry.ctus.max())
        num_rows, num_ctus = int(rows.sum()), int((rows * geometry.ctus).sum())
        room, words_room = _room(rooms), _words_room(rooms, most_ctus)
        first_row = np.cumsum(rows) - rows
        of_row = np.repeat(np.arange(len(pictures), dtype=np.int32), rows)
        # Neighbouring threads take like rows of different pictures: they end at about the same time.
        depth = (np.arange(num_rows) - first_row[of_row]) / rows[of_row]
        order = np.argsort(depth, kind="stable").astype(np.int32)
        table = _picture_table(pictures, geometry, first_row)
        sizes = self._empty(2 * 4 * num_rows)
        held = {
            "pictures": self._upload(table.view(np.uint8)),
            "row_picture": self._upload(of_row),
            "row_order": self._upload(order),
            "plans": self._empty(num_ctus * _PLAN_BYTES),
            "stats": self._empty(num_ctus * _SUB_BLOCKS),
            "starts": self._empty(num_rows * _CONTEXT_BYTES),
            "states": self._empty(num_rows * _STATE_BYTES),
            "words": self._empty(num_rows * words_room * 4),
            "bits": sizes,
            "lengths": sizes[4 * num_rows :],
        }
        p = Parameters(
            num_pictures=len(pictures),
            num_rows=num_rows,
            columns=STRIP_CTUS,
            room=room,
            words_room=words_room,
            **{name: one.data_ptr() for name, one in {**held, **self._tables}.items()},
        )
        strips = range(0, most_ctus, STRIP_CTUS)
        slots = num_rows * STRIP_CTUS
        tokens = [self._empty(slots * room * 2) for _ in strips[:2]]
        counts = [self._empty(slots * 4) for _ in strips[:2]]
        self._launch("plan", (num_rows, -(-most_ctus // _PLAN_WARPS)), 32 * _PLAN_WARPS, p)
        self._launch("stats", (len(pictures), 1), 256, p)
        if lane is not None:
            lane.ahead.wait_stream(lane.main)
        coded: list[Any] = []
        for number, column in enumerate(strips):
            p.first_column = column
            p.tokens = tokens[number % 2].data_ptr()
            p.counts = counts[number % 2].data_ptr()
            # Tokens of a strip are made while those of the one before are coded.
            with contextlib.nullcontext() if lane is None else torch.cuda.stream(lane.ahead):
                if number >= 2:
                    self._wait(coded[number - 2])
                self._launch("tokens", (num_rows, 1), 32 * _TOKEN_WARPS, p)
                made = self._event()
            self._wait(made)
            if number == 0:
                self._launch("chain", (len(pictures), 1), 128, p)
            self._launch("arith", (-(-num_rows // 32), 1), 32, p)
            coded.append(self._event())
        self._launch("measure", (num_rows, 1), 128, p)
        on_host = self._download(sizes).view(torch.int32).view(2, num_rows)
        everything = [*held.values(), *tokens, *counts]
        return _Started(pictures, rows, p, everything, on_host, self._event(), lane)

    def _finish(self, batch: _Started) -> list[Substreams | _Failed | None]:
        """Wait for a batch."""
        if batch.measured is not None:
            batch.measured.synchronize()
        bits, lengths = batch.sizes.numpy().astype(np.int64)
        stops = np.cumsum(lengths)
        p = batch.parameters
        with contextlib.nullcontext() if batch.lane is None else torch.cuda.stream(batch.lane.main):
            out = self._empty(max(int(stops[-1]), 1))
            offsets = self._upload(stops - lengths)
            p.offsets, p.out = offsets.data_ptr(), out.data_ptr()
            self._launch("compact", (p.num_rows, 1), 128, p)
            on_host = self._download(out)
            copied = self._event()
        if copied is not None:
            copied.synchronize()
        data = memoryview(on_host.numpy())
        found: list[Substreams | _Failed | None] = []
        row = start = 0
        for picture, count in zip(batch.pictures, batch.rows.tolist(), strict=True):
            own, stop = slice(row, row + count), int(stops[row + count - 1])
            if (bits[own] < 0).any():
                found.append(_Failed())
            elif 8 * (stop - start) <= picture.samples.numel() * picture.bit_depth:
                found.append(Substreams(data[start:stop], lengths[own]))
            else:
                found.append(None)
            row, start = row + count, stop
        return found

    # GPU or, in tests, the CPU

    def _empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def _upload(self, array: NDArray[Any]) -> torch.Tensor:
        """The driver takes its own copy of small arrays, so that nothing waits."""
        host = torch.from_numpy(np.ascontiguousarray(array))
        return host.to(self._device, non_blocking=True)

    def _download(self, tensor: torch.Tensor) -> torch.Tensor:
        """To host memory, after what the current stream was given."""
        if not self._is_gpu:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def _launch(self, kernel: str, blocks: tuple[int, int], threads: int, p: Parameters) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._is_gpu else 0
        self._launcher.launch(kernel, blocks, threads, p, stream)

    def _event(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event() if self._is_gpu else None

    def _wait(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


class _Lane:
    """Streams of one batch; two batches are on their way, so that one fills the other's gaps."""

    def __init__(self, device: torch.device) -> None:
        self.main = torch.cuda.Stream(device)
        self.ahead = torch.cuda.Stream(device)


def _picture_table(
    pictures: Sequence[Picture], geometry: _Geometry, first_row: NDArray[np.int64]
) -> NDArray[Any]:
    """`Picture` of hevc_encode.cu, for each."""
    table = np.zeros(len(pictures), _PICTURE)
    table["ctus"], table["ctu_rows"] = geometry.ctus, geometry.rows
    ctus = geometry.ctus * geometry.rows
    table["first_row"], table["first_ctu"] = first_row, np.cumsum(ctus) - ctus
    for entry, (samples, bit_depth) in zip(table, pictures, strict=True):
        wide = samples.element_size() == 2
        plane, stride, step = samples.stride()
        assert (step, samples.shape[0], wide) == (1, 3, bit_depth > 8)
        aligned = (
            stride % 4 == 0 and plane % 4 == 0 and samples.data_ptr() % (8 if wide else 4) == 0
        )
        entry["samples"], entry["plane"], entry["stride"] = samples.data_ptr(), plane, stride
        entry["height"], entry["width"] = samples.shape[1:]
        entry["bit_depth"] = bit_depth
        entry["flags"] = (_IS_WIDE if wide else 0) | (_IS_ALIGNED if aligned else 0)
    return table
