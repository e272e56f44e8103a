"""How long decoders take, by picture size: `kvfetcher doctor` measures it, the planner reads it.

A table holds points, each measured with real streams. Between points, times follow a power law of
the picture's *load*: its bits, or two bits per sample where it has fewer (below that NVDEC is
bound by samples; measured on an H100 with lossless 4:4:4 pictures). Pure but for `load_table` and
`store_table`.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from kvfetcher.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

TABLE_VERSION = 1
TABLE_FILE = "decode-times.json"
"""Name under the cache folder (`config.cache_home`)."""

MIN_BITS_PER_SAMPLE = 2.0
"""Pictures with fewer bits take a decoder as long as with so many. Those of the ladder hardly have
fewer: 1.92 at `tiny`, 2.16 at `compact`, 2.43 at `balanced`, 2.81 at `near` (SmolLM2-135M)."""

_SAMPLES_PER_PIXEL = 3  # 4:4:4
_LEARNING_RATE = 0.1
_MAX_CORRECTION = 8.0

_Curve: TypeAlias = tuple[tuple[float, float], ...]
"""(load, seconds), by load."""


def picture_load(num_samples: float, num_bits: float) -> float:
    """What a picture weighs for a decoder; the key between the points of a table."""
    return max(num_bits, MIN_BITS_PER_SAMPLE * num_samples)


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """Times of one picture size, measured."""

    width: int
    height: int
    bits_per_sample: float
    """Bits of bitstream per luma or chroma sample, 4:4:4."""
    latency_seconds: float
    """Time from a picture's packet to its planes, on an idle warm decoder."""
    alone_seconds: float
    """Per picture, back to back, while the other decoders rest."""
    busy_seconds: float
    """Per picture and decoder, back to back, while all decoders work."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ConfigError(
                    f"decode times: {name} must be a number above 0, got {value!r};"
                    " run `kvfetcher doctor` again"
                )

    @property
    def load(self) -> float:
        samples = _SAMPLES_PER_PIXEL * self.width * self.height
        return picture_load(samples, samples * self.bits_per_sample)


@dataclass(frozen=True, slots=True)
class DecodeTable:
    """Decode times of one machine's decoders."""

    device: str
    """Name of the GPU or CPU that was measured, for people to read."""
    decoder: str
    """``nvdec`` or ``cpu``."""
    num_decoders: int
    """Decoding processes that worked when `busy_seconds` was measured."""
    restore_elements_per_second: float
    """KV elements that one process restores per second, planes to values."""
    points: tuple[DecodePoint, ...]
    source: str
    """Where the numbers are from, for people."""
    restore_unit_seconds: float = 0.0
    """What a unit takes all restoring processes together, on top of its elements; 0 = not known."""
    _latency_seconds: _Curve = field(init=False, repr=False, compare=False)
    _alone_seconds: _Curve = field(init=False, repr=False, compare=False)
    _busy_seconds: _Curve = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_decoders < 1 or not self.restore_elements_per_second > 0 or not self.points:
            raise ConfigError(
                "decode times: a table has points, decoders and a restore rate; run"
                " `kvfetcher doctor` again"
            )
        points = tuple(sorted(self.points, key=lambda point: point.load))
        object.__setattr__(self, "points", points)
        for name in ("latency_seconds", "alone_seconds", "busy_seconds"):
            curve = tuple((point.load, getattr(point, name)) for point in points)
            object.__setattr__(self, f"_{name}", curve)

    def latency_seconds(self, load: float, *, num_pictures: int = 1) -> float:
        """Time from a unit's packets to its planes on an idle decoder.

        Args:
            load: load of one picture, `picture_load`.
            num_pictures: number of pictures of the unit, of that load each.
        """
        first = _interpolate(load, self._latency_seconds)
        return first + (num_pictures - 1) * self.picture_seconds(load, num_busy=1)

    def picture_seconds(self, load: float, *, num_busy: int) -> float:
        """Time of one decoder per picture, back to back.

        Args:
            load: load of the picture, `picture_load`.
            num_busy: decoders that work at the same time, this one included.
        """
        alone = _interpolate(load, self._alone_seconds)
        busy = _interpolate(load, self._busy_seconds)
        if self.num_decoders == 1:
            return busy
        share = (min(num_busy, self.num_decoders) - 1) / (self.num_decoders - 1)
        return alone + (busy - alone) * share

    def restore_seconds_per_unit(self, num_elements: int) -> float:
        """Seconds between two units that the restoring processes end together; 0 = not known."""
        if not self.restore_unit_seconds:
            return 0.0
        return self.restore_unit_seconds + self.restore_seconds(num_elements)

    def restore_seconds(self, num_elements: int) -> float:
        """Seconds from planes to the values of a number of KV elements, in one process."""
        return num_elements / self.restore_elements_per_second

    def to_json(self) -> str:
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        data["points"] = [asdict(point) for point in self.points]
        return json.dumps({"version": TABLE_VERSION, **data}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DecodeTable:
        """The table that `to_json` wrote.

        Raises:
            ConfigError: another version, or not a table.
        """
        try:
            data = json.loads(text)
            version = data.pop("version")
            points = [DecodePoint(**point) for point in data.pop("points")]
            if version != TABLE_VERSION:
                raise ConfigError(
                    f"decode times: version {version}, this build reads {TABLE_VERSION};"
                    " run `kvfetcher doctor` again"
                )
            return cls(points=tuple(points), **data)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ConfigError(
                f"decode times: not a table ({type(exc).__name__}: {exc});"
                " run `kvfetcher doctor` again"
            ) from exc


class Factors(NamedTuple):
    """Real times over the table's."""

    latency: float = 1.0
    """Factor for a unit that has a decoder to itself."""
    decode: float = 1.0
    """Factor for units back to back, while all decoders work."""
    restore: float = 1.0


AS_IN_TABLE = Factors()


class DecodeCorrection:
    """Learns by how much real times of a stage differ from a table's. Not thread-safe."""

    def __init__(self) -> None:
        self._log_factor = 0.0
        self._num_observed = 0

    @property
    def factor(self) -> float:
        """Multiply predicted decode times by this."""
        return math.exp(self._log_factor)

    def observe(self, predicted_seconds: float, actual_seconds: float) -> None:
        """Learn from a unit's predicted and actual time; one outlier moves the factor little."""
        if predicted_seconds <= 0 or actual_seconds <= 0:
            return
        limit = math.log(_MAX_CORRECTION)
        error = math.log(actual_seconds / predicted_seconds)
        error = min(max(error, -limit), limit)
        self._num_observed += 1
        # A mean at first, then exponential forgetting.
        rate = max(_LEARNING_RATE, 1 / (self._num_observed + 1))
        self._log_factor += rate * (error - self._log_factor)


def load_table(folder: Path, *, fallback: DecodeTable) -> DecodeTable:
    """The table that doctor left in the cache folder; `fallback` where there is none.

    Raises:
        ConfigError: there is a file, but it is not a table.
    """
    path = folder / TABLE_FILE
    try:
        text = path.read_text()
    except FileNotFoundError:
        return fallback
    except OSError as exc:
        raise ConfigError(f"decode times {path} cannot be read: {exc.strerror}") from exc
    return DecodeTable.from_json(text)


def store_table(folder: Path, table: DecodeTable) -> Path:
    """Keep a table for `load_table`; atomic. Returns its path.

    Raises:
        ConfigError: the folder cannot be written.
    """
    path = folder / TABLE_FILE
    partial = path.with_name(f".{TABLE_FILE}.{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(table.to_json())
        partial.replace(path)
    except OSError as exc:
        raise ConfigError(f"decode times {path} cannot be written: {exc.strerror}") from exc
    return path


def _interpolate(x: float, points: _Curve) -> float:
    """Y at x on the power law through the neighbouring points.

    Below the first point y stays (a decoder has a cost per picture); above the last it grows in
    proportion.
    """
    first_x, first_y = points[0]
    if x <= first_x:
        return first_y
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            if x1 == x0:
                return max(y0, y1)
            part = math.log(x / x0) / math.log(x1 / x0)
            return y0 * math.exp(part * math.log(y1 / y0))
    last_x, last_y = points[-1]
    return last_y * x / last_x


def _nvdec(width: int, height: int, latency: float, alone: float, busy: float) -> DecodePoint:
    """A point of the H100's table from G elements/s of one and of seven processes."""
    samples = _SAMPLES_PER_PIXEL * width * height
    return DecodePoint(
        width, height, 1.62, latency, samples / alone / 1e9, 7 * samples / busy / 1e9
    )


H100_NVDEC = DecodeTable(
    device="NVIDIA H100 80GB HBM3",
    decoder="nvdec",
    num_decoders=7,
    # An inverse transform of 1024 tokens and 2048 coefficients takes 0.08 ms (bf16 GEMM).
    restore_elements_per_second=25e9,
    # Four kv_restore under MPS restore 2665 units of 256x817 in a second, bound by their CPU time
    # (results/gpu_earlier_h100_mps.json).
    restore_unit_seconds=1 / 2665,
    points=(
        _nvdec(256, 640, 0.96e-3, 0.72, 2.40),
        _nvdec(1024, 640, 3.25e-3, 0.80, 3.47),
        _nvdec(1024, 1920, 7.6e-3, 0.88, 3.95),
        _nvdec(2048, 3840, 108e-3, 0.79, 3.90),
    ),
    source="profile balanced, 10 bit 4:4:4, seven warm processes, PyNvVideoCodec 2.2.4, 2026-11",
)
"""One process per NVDEC engine of an H100 on real streams: what is assumed of an NVDEC that was not
measured."""


def _cpu(height: int, seconds: float) -> DecodePoint:
    """A point of the CPU's table: a core's time is the same alone and among others."""
    return DecodePoint(256, height, 2.77, seconds, seconds, seconds)


def cpu_table(num_decoders: int) -> DecodeTable:
    """What is assumed of a CPU that was not measured.

    Args:
        num_decoders: decoding processes, one core each.
    """
    return DecodeTable(
        device="CPU",
        decoder="cpu",
        num_decoders=num_decoders,
        restore_elements_per_second=24e6,
        points=(
            _cpu(640, 11.2e-3),
            _cpu(1280, 22.2e-3),
            _cpu(1920, 33.1e-3),
            _cpu(3840, 66.2e-3),
        ),
        source=(
            "profile exact, 8 bit 4:4:4, FFmpeg through PyAV, CPU seconds of one thread of a Xeon;"
            " restoring: profile balanced; tests/benchmarks/results/frame_sizes.json"
        ),
    )
