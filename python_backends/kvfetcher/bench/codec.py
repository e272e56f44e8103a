"""`kvfetcher bench codec`: the rate-quality table on real KV caches of a model.

Every coder runs over the same caches of the same texts in one process: those of the certificate and,
with ``--texts``, others beside them. Sizes are of whole chunk objects (video, tables, headers, exact
tokens), quality is that of `quality.compare`. Speeds are medians over chunks of one-threaded CPU time
(encoder threads included), so that a busy machine does not change them much: elements per CPU second.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvfetcher import __version__
from kvfetcher.bench import baselines
from kvfetcher.bench.plot import rate_quality_svg
from kvfetcher.calibration.calibrate import CalibrateSettings, calibrate
from kvfetcher.calibration.capture import CaptureModel
from kvfetcher.calibration.certify import CertifySettings, held_out_documents
from kvfetcher.calibration.quality import Document, measure
from kvfetcher.calibration.texts import default_texts, load_texts
from kvfetcher.codec.encoders import choose_encoder
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.codec.ladder.library import (
    model_calibration_path,
    register_calibration,
    store_calibration,
)
from kvfetcher.codec.ladder.low_bits import split
from kvfetcher.codec.ladder.profile import TransformProfile, plan_restore
from kvfetcher.codec.layout import RowGrid, Tiling
from kvfetcher.codec.paper import PaperProfile, search_tiling
from kvfetcher.codec.profiles import encode_unnamed, restore_unit
from kvfetcher.codec.quant import bits_to_float32, float32_to_bits
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.errors import ConfigError, KVFetcherError
from kvfetcher.format.container import parse_header
from kvfetcher.format.sections import ProfileCode, SectionKind
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import LADDER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from kvfetcher.calibration.quality import Coder
    from kvfetcher.calibration.texts import Text
    from kvfetcher.codec.base import Profile
    from kvfetcher.format.pictures import Integers
    from kvfetcher.format.unit import Unit
    from kvfetcher.spec import KVSpec

CHUNK_TOKENS = baselines.CHUNK_TOKENS

CERTIFICATE_TEXTS = "certificate"
"""The text set that certificates are measured on."""
GIVEN_TEXTS = "given"
"""That of ``--texts``."""

BANDS = {"widest": 16.0, "middle": 4.0, "rest": 0.0}
"""Classes of rows, and the least deviation of their integers, in steps."""

NO_SPEED = (
    "a model of the scheme in numpy that codes and restores in one pass, with the size of its"
    " entropy coder counted instead of coded: its time says nothing"
)

_PARALLEL_ROUNDS = 3
# Layers that the paper's tiling is searched on: one picture's three planes.
_SEARCHED_LAYERS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Speeds are None where the coder is not ours, `no_speed` says why."""

    name: str
    family: str
    """"ladder", "ours", "paper" or "other"."""
    text_set: str
    """CERTIFICATE_TEXTS or GIVEN_TEXTS."""
    bits_per_element: float
    ratio: float
    """Against bfloat16."""
    kl: float
    worst_kl: float
    perplexity_change: float
    top1_agreement: float
    encode_elements_per_second: float | None = None
    decode_elements_per_second: float | None = None
    restore_elements_per_second: float | None = None
    decode_restore_elements_per_second: float | None = None
    video_over_entropy: float | None = None
    """Bits of the H.265 streams and low bits over the order-0 entropy of the integers, 32 rows a class."""
    bands: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The same for each class of rows (`BANDS`) that there is: its share of the symbols, their entropy
    and `video_over_entropy` of pictures of these rows alone. On the last chunk of each document."""
    no_speed: str = ""
    kl_by_document: Sequence[float] = ()


class _Symbols(NamedTuple):
    """What a unit's pictures hold, row by row."""

    samples: Integers
    """[N, T] as they lie in the pictures."""
    integers: NDArray[np.int32]
    """[N, T] with their low bits; 0 and more."""
    low_bits: NDArray[np.int64]
    """[N] bits beside the pictures of each sample of a row."""


class _Rate:
    """Bits that symbols took, and their entropy."""

    def __init__(self) -> None:
        self._bits = self._entropy = 0.0
        self.symbols = 0

    def add(self, integers: NDArray[np.int32], bits: float) -> None:
        self._bits += bits
        self._entropy += baselines.order0_bits(integers, rows_per_class=32)
        self.symbols += integers.size

    @property
    def over_entropy(self) -> float | None:
        return self._bits / self._entropy if self._entropy else None

    @property
    def entropy_bits(self) -> float:
        """Per symbol."""
        return self._entropy / self.symbols


class ProfileCoder:
    """Codes caches with one profile, and keeps the times and sizes of every chunk."""

    def __init__(self, profile: Profile, spec: KVSpec) -> None:
        self._profile, self._spec = profile, spec
        self._decoder = VideoDecoder()
        self._encoder = choose_encoder("auto").encode
        self._rates: dict[str, list[float]] = {
            "encode": [],
            "decode": [],
            "restore": [],
            "both": [],
        }
        self._rate = _Rate()
        self._bands = {name: _Rate() for name in BANDS}

    def __call__(self, values: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """`quality.Coder`."""
        restored = np.empty_like(values)
        num_bytes = 0
        for start in range(0, values.shape[3], CHUNK_TOKENS):
            part = np.ascontiguousarray(values[:, :, :, start : start + CHUNK_TOKENS])
            bits = float32_to_bits(part, self._spec.dtype)
            chunk = self._encode(bits, start)
            num_bytes += len(chunk)
            is_last = start + CHUNK_TOKENS >= values.shape[3]
            self._decode(chunk, restored[:, :, :, start : start + CHUNK_TOKENS], bands=is_last)
        return restored, 8.0 * num_bytes

    def _encode(self, bits: NDArray[Any], start: int) -> bytes:
        began = time.process_time()
        chunk = encode_unnamed(
            bits,
            spec=self._spec,
            profile=self._profile,
            first_position=start,
            num_threads=1,
            encoder=self._encoder,
        )
        self._rates["encode"].append(bits.size / (time.process_time() - began))
        return chunk

    def _decode(self, chunk: bytes, out: NDArray[np.float32], *, bands: bool) -> None:
        decode_seconds = restore_seconds = 0.0
        for entry in parse_header(chunk).units:
            data = chunk[entry.offset : entry.stop]
            began = time.process_time()
            unit = parse_unit(data)
            planes = self._decoder.decode(unit.packets(), unit.geometry)
            decoded = time.process_time()
            values = restore_unit(data, planes).values
            decode_seconds += decoded - began
            restore_seconds += time.process_time() - decoded
            stop = entry.layer_start + entry.num_layers
            out[entry.layer_start : stop] = bits_to_float32(values, self._spec.dtype)
            symbols = _symbols(unit, planes)
            coded = sum(
                s.raw_bytes
                for s in unit.sections
                if s.kind in (SectionKind.BITSTREAM, SectionKind.LOW_BITS)
            )
            self._rate.add(symbols.integers, 8 * coded)
            if bands and unit.profile != ProfileCode.PAPER:  # its rows are tiles of many channels
                self._add_bands(symbols, unit.geometry.bit_depth)
        self._rates["decode"].append(out.size / decode_seconds)
        self._rates["restore"].append(out.size / restore_seconds)
        self._rates["both"].append(out.size / (decode_seconds + restore_seconds))

    def _add_bands(self, symbols: _Symbols, bit_depth: int) -> None:
        deviation = symbols.integers.std(axis=1)
        above = np.inf
        for name, least in BANDS.items():
            rows = (deviation >= least) & (deviation < above)
            above = least
            if not rows.any():
                continue
            samples = np.ascontiguousarray(symbols.samples[rows])
            grid = RowGrid.fit(*samples.shape, max_frame_rows=1024, max_frame_columns=1024)
            planes = grid.place(samples, bit_depth=bit_depth, padding=1 << (bit_depth - 1))
            bits = 8 * sum(map(len, self._encoder(planes, bit_depth=bit_depth)))
            low = int(symbols.low_bits[rows].sum()) * samples.shape[1]
            self._bands[name].add(symbols.integers[rows], bits + low)

    def measured(self) -> dict[str, Any]:
        """The last columns of `Row`."""
        median = {name: statistics.median(rates) for name, rates in self._rates.items()}
        return {
            "encode_elements_per_second": median["encode"],
            "decode_elements_per_second": median["decode"],
            "restore_elements_per_second": median["restore"],
            "decode_restore_elements_per_second": median["both"],
            "video_over_entropy": self._rate.over_entropy,
            "bands": self._band_facts(),
        }

    def _band_facts(self) -> dict[str, dict[str, float]]:
        total = sum(rate.symbols for rate in self._bands.values())
        return {
            name: {
                "share": rate.symbols / total,
                "entropy_bits": rate.entropy_bits,
                "video_over_entropy": rate.over_entropy,
            }
            for name, rate in self._bands.items()
            if rate.over_entropy is not None
        }


def _symbols(unit: Unit, planes: Integers) -> _Symbols:
    """The rows of a unit's pictures; of other profiles than the ladder with their padding."""
    if unit.profile != ProfileCode.TRANSFORM:
        lines: Integers = planes.swapaxes(1, 2).reshape(-1, planes.shape[3])
        return _Symbols(lines, lines.astype(np.int32), np.zeros(len(lines), np.int64))
    plan = plan_restore(unit)
    samples = plan.layout.grid.gather(planes)
    integers = samples.astype(np.int32) - (1 << (unit.geometry.bit_depth - 1))
    low_bits = np.zeros(len(samples), np.int64)
    if plan.low_planes is not None:
        for place, low in zip(plan.places, split(plan.low_planes, plan.shifts), strict=True):
            first = plan.layout.rows_of(place).start
            rows = slice(first, first + len(low.shifts))
            low_bits[rows] = low.shifts
            below = low.unpack(unit.num_tokens).low
            integers[rows] = (integers[rows] << low.shifts[:, None]) + below
    return _Symbols(samples, integers - integers.min(), low_bits)


def run(
    model: CaptureModel,
    calibration: Calibration,
    documents: list[Document],
    *,
    text_set: str = CERTIFICATE_TEXTS,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure every coder of the table.

    Args:
        model: whose caches they are.
        calibration: calibration of this model.
        documents: held-out texts, prefilled.
        text_set: what they are called in the rows.
        only: names of rows; empty = all.
        say: gets a line per row.

    Raises:
        ConfigError: ``only`` names a row that there is not.
    """
    register_calibration(calibration)
    candidates = _candidates(calibration, documents)
    unknown = set(only) - {name for name, _, _ in candidates}
    if unknown:
        raise ConfigError(
            f"no rows {sorted(unknown)}; there are {[name for name, _, _ in candidates]}"
        )
    rows = []
    for name, family, make in candidates:
        if only and name not in only:
            continue
        coder = make()
        found = measure(model, documents, coder)
        is_ours = isinstance(coder, ProfileCoder)
        row = Row(
            name,
            family,
            text_set,
            found.bits_per_element,
            16 / found.bits_per_element,
            found.quality.kl,
            found.worst_kl,
            found.quality.perplexity_change,
            found.quality.top1_agreement,
            **(coder.measured() if isinstance(coder, ProfileCoder) else {}),
            no_speed="" if is_ours else NO_SPEED,
            kl_by_document=found.kl_by_document,
        )
        rows.append(row)
        say(format_row(row))
    return rows


def parallel_encode(calibration: Calibration, document: Document) -> dict[str, Any]:
    """Wall time of encoding one chunk with more and more threads, profile `balanced`."""
    spec = calibration.spec
    profile = TransformProfile("balanced", calibration)
    bits = _first_chunk(document, spec)
    cores = len(os.sched_getaffinity(0))
    encoder = choose_encoder("auto").encode
    seconds = {}
    for threads in sorted({*(1 << i for i in range(cores.bit_length())), cores}):
        took = []
        for _ in range(_PARALLEL_ROUNDS):
            began = time.perf_counter()
            encode_unnamed(
                bits,
                spec=spec,
                profile=profile,
                first_position=0,
                num_threads=threads,
                encoder=encoder,
            )
            took.append(time.perf_counter() - began)
        seconds[str(threads)] = statistics.median(took)
    return {
        "profile": profile.name,
        "elements": bits.size,
        "units": len(profile.layer_groups(spec, bits.shape[3], profile.variants()[0])),
        "cores": cores,
        "wall_seconds_by_threads": seconds,
    }


def _first_chunk(document: Document, spec: KVSpec) -> Integers:
    """Bit patterns [L, K, H, T, D]."""
    part = np.ascontiguousarray(document.values[:, :, :, :CHUNK_TOKENS])
    return float32_to_bits(part, spec.dtype)


def _candidates(
    calibration: Calibration, documents: list[Document]
) -> list[tuple[str, str, Callable[[], Coder]]]:
    """Name, family and what makes the coder of each row."""
    spec = calibration.spec
    heads, dim = spec.num_kv_heads, spec.head_dim

    def ours(profile: Profile) -> Callable[[], Coder]:
        return lambda: ProfileCoder(profile, spec)

    def other(code: Coder) -> Callable[[], Coder]:
        return lambda: code

    def searched(bits: int) -> ProfileCoder:
        """The paper's intra-frame layout, with the tiling that its offline search finds."""
        size = "640x360"
        values = _first_chunk(documents[0], spec)[:_SEARCHED_LAYERS]
        best = search_tiling(values, spec=spec, frame_size=size, bits=bits, inter=True)[0]
        return ProfileCoder(PaperProfile((size,), bits=bits, tiling=best.tiling), spec)

    found: list[tuple[str, str, Callable[[], Coder]]] = [
        ("exact", "ours", ours(ExactProfile())),
        *((name, "ladder", ours(TransformProfile(name, calibration))) for name in LADDER),
        ("uncalibrated", "ours", ours(UncalibratedProfile())),
    ]
    flat = Tiling(1, heads, 1, dim)
    for bits in (8, 4):
        found += [
            (
                f"paper {bits} bit, quantiser only",
                "paper",
                other(functools.partial(baselines.uniform, bits=bits)),
            ),
            (
                f"paper {bits} bit, + inter-frame",
                "paper",
                ours(PaperProfile(("1024x1024",), bits=bits, tiling=flat)),
            ),
            (
                f"paper {bits} bit, + intra-frame",
                "paper",
                functools.partial(searched, bits),
            ),
        ]
    rivals: dict[str, Coder] = {
        "bf16": functools.partial(baselines.cast, dtype="bfloat16"),
        "fp8 e4m3": functools.partial(baselines.cast, dtype="float8_e4m3fn"),
        "zstd of bf16": baselines.zstd_bfloat16,
        "uniform int8": functools.partial(baselines.uniform, bits=8),
        "uniform int4": functools.partial(baselines.uniform, bits=4),
        "KIVI-like 4 bit": functools.partial(baselines.kivi, bits=4),
        "KIVI-like 2 bit": functools.partial(baselines.kivi, bits=2),
        "CacheGen": baselines.cachegen,
    }
    found += [(name, "other", other(code)) for name, code in rivals.items()]
    return found


HEADER = (
    f"{'coder':32} {'bits/el':>8} {'ratio':>6} {'KL':>8} {'worst':>8} {'d ppl':>8} {'top-1':>6}"
    f" {'encode':>7} {'decode':>7} {'restore':>7} {'dec+res':>7}  (M elements per CPU second)"
)


def format_row(row: Row) -> str:
    """One line of the table as text, under `HEADER`."""
    speeds = (
        row.encode_elements_per_second,
        row.decode_elements_per_second,
        row.restore_elements_per_second,
        row.decode_restore_elements_per_second,
    )
    return (
        f"{row.name:32} {row.bits_per_element:8.3f} {row.ratio:6.2f} {row.kl:8.1e}"
        f" {row.worst_kl:8.1e} {100 * row.perplexity_change:+7.2f}% {100 * row.top1_agreement:5.1f}%"
        + "".join(f" {'-' if s is None else format(s / 1e6, '.1f'):>7}" for s in speeds)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="kvfetcher bench codec", description=__doc__)
    parser.add_argument(
        "--model",
        default="smollm2-135m-instruct",
        help="name or folder of a model (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration", type=Path, help="calibration file (default: the one kept for the model)"
    )
    parser.add_argument("--texts", type=Path, help="folder of more texts, as a second text set")
    parser.add_argument(
        "--documents", type=int, default=5, help="largest number of documents of each text set"
    )
    parser.add_argument(
        "--prefix-tokens",
        type=int,
        default=2048,
        help="tokens whose KV is replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--following-tokens", type=int, default=512, help="tokens after them (default: %(default)s)"
    )
    parser.add_argument(
        "--only", action="append", default=[], help="measure this row; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--plot", type=Path, help="write the rate-quality plot (SVG) to this file")
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    origin = {"commit": _commit(), "command": shlex.join(["kvfetcher", "bench", "codec", *given])}

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    try:
        report = _report(args, say, **origin)
    except KVFetcherError as exc:
        say(f"kvfetcher bench codec: {exc}")
        return 1
    if args.plot is not None:
        args.plot.write_text(
            rate_quality_svg(
                [row for row in report["rows"] if row["text_set"] == CERTIFICATE_TEXTS],
                title=f"{report['model']}: rate and quality of KV codecs",
            )
        )
    if args.json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        for text_set in report["documents"]:
            rows = [format_row(Row(**r)) for r in report["rows"] if r["text_set"] == text_set]
            sys.stdout.write("\n".join([f"{text_set} texts", HEADER, *rows]) + "\n")
    return 0


def _report(
    args: argparse.Namespace, say: Callable[[str], None], *, commit: str, command: str
) -> dict[str, Any]:
    import torch

    from kvfetcher.models.folders import prepare_model
    from kvfetcher.models.identity import weights_digest

    folder = prepare_model(args.model, progress=say)
    calibration = _calibration(args, folder.path, weights_digest(folder.path), say)
    threads = torch.get_num_threads()
    model = CaptureModel.load(folder.path)
    sets: dict[str, list[Text]] = {CERTIFICATE_TEXTS: default_texts(held_out=True)}
    if args.texts:
        sets[GIVEN_TEXTS] = load_texts(args.texts)
    rows: list[Row] = []
    names: dict[str, list[str]] = {}
    parallel: dict[str, Any] = {}
    for text_set, texts in sets.items():
        documents = held_out_documents(
            model,
            texts,
            CertifySettings(args.documents, args.prefix_tokens, args.following_tokens),
            progress=lambda what, done, total: say(f"{what} ({done} of {total})"),
        )
        names[text_set] = [document.name for document in documents]
        say(f"{text_set} texts\n{HEADER}")
        torch.set_num_threads(1)
        try:
            rows += run(model, calibration, documents, text_set=text_set, only=args.only, say=say)
            parallel = parallel or parallel_encode(calibration, documents[0])
        finally:
            torch.set_num_threads(threads)
    return {
        "model": folder.name,
        "calibration": calibration.digest,
        "spec": calibration.spec.to_dict(),
        "groups": list(calibration.grouping.layer_counts),
        "heads_per_group": calibration.grouping.heads_per_group,
        "documents": names,
        "prefix_tokens": args.prefix_tokens,
        "following_tokens": args.following_tokens,
        "chunk_tokens": CHUNK_TOKENS,
        "rows": [asdict(row) for row in rows],
        "parallel_encode": parallel,
        "encoder": choose_encoder("auto").name,
        "machine": {
            "cpu": _cpu_name(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "kvfetcher": __version__,
            "commit": commit,
        },
        "command": command,
    }


def _calibration(
    args: argparse.Namespace, folder: Path, digest: str, say: Callable[[str], None]
) -> Calibration:
    path = args.calibration or model_calibration_path(digest)
    if args.calibration is not None or path.exists():
        calibration = Calibration.load(path)
        if calibration.model != digest:
            raise ConfigError(f"calibration {path} was made for another model than {folder}")
        return calibration
    say("this model has no calibration yet: making one, some minutes on a CPU")
    calibration = calibrate(
        folder,
        texts=default_texts(),
        held_out=default_texts(held_out=True),
        settings=CalibrateSettings(),
        progress=lambda what, done, total: say(f"{what} ({done} of {total})"),
    )
    store_calibration(calibration)
    return calibration


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((li.split(":", 1)[1].strip() for li in lines if li.startswith("model name")), "")


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
