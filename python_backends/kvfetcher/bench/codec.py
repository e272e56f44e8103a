"""`kvfetcher bench codec`: the rate-quality table on real KV caches of a model.

Every coder runs over the same caches of the same held-out texts in one process; sizes are of whole
chunk objects (video, tables, headers, exact tokens), quality is that of `quality.compare`. Speeds are
medians over chunks of one-threaded CPU time (encoder threads included), so that a busy machine
does not change them much: elements per CPU second.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher import __version__
from kvfetcher.bench import baselines
from kvfetcher.bench.plot import rate_quality_svg
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.paper import PaperProfile
from kvfetcher.codec.profiles import encode_chunk, restore_unit
from kvfetcher.codec.transform import TransformProfile
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.codec.unit import BITSTREAM, parse_unit
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.container import parse_header
from kvfetcher.errors import ConfigError, KVFetcherError
from kvfetcher.layout import Tiling
from kvfetcher.quant import bits_to_float32, float32_to_bits
from kvfetcher.transform.artifact import LADDER, Calibration
from kvfetcher.transform.calibrate import CalibrateSettings, calibrate
from kvfetcher.transform.capture import CaptureModel
from kvfetcher.transform.certify import CertifySettings, held_out_documents
from kvfetcher.transform.library import (
    model_calibration_path,
    register_calibration,
    store_calibration,
)
from kvfetcher.transform.quality import Document, measure
from kvfetcher.transform.texts import default_texts, load_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from kvfetcher.codec.base import Profile
    from kvfetcher.spec import KVSpec
    from kvfetcher.transform.quality import Coder

CHUNK_TOKENS = baselines.CHUNK_TOKENS


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Speeds are None where the coder is not ours."""

    name: str
    family: str
    """"ladder", "ours", "paper" or "other"."""
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
    """Bits of the H.265 streams over the order-0 entropy of their symbols, 32 rows a class."""
    kl_by_document: Sequence[float] = ()


class ProfileCoder:
    """Codes caches with one profile, and keeps the times and sizes of every chunk."""

    def __init__(self, profile: Profile, spec: KVSpec) -> None:
        self._profile, self._spec = profile, spec
        self._decoder = VideoDecoder()
        self._rates: dict[str, list[float]] = {
            "encode": [],
            "decode": [],
            "restore": [],
            "both": [],
        }
        self._video_bits = 0.0
        self._entropy_bits = 0.0

    def __call__(self, values: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """`quality.Coder`."""
        restored = np.empty_like(values)
        num_bytes = 0
        for start in range(0, values.shape[3], CHUNK_TOKENS):
            part = np.ascontiguousarray(values[:, :, :, start : start + CHUNK_TOKENS])
            bits = float32_to_bits(part, self._spec.dtype)
            chunk = self._encode(bits, start)
            num_bytes += len(chunk)
            self._decode(chunk, restored[:, :, :, start : start + CHUNK_TOKENS])
        return restored, 8.0 * num_bytes

    def _encode(self, bits: NDArray[Any], start: int) -> bytes:
        began = time.process_time()
        chunk = encode_chunk(
            bits,
            spec=self._spec,
            profile=self._profile,
            identity=bytes(32),
            chunk_key=bytes(32),
            token_ids=[0] * bits.shape[3],
            first_position=start,
            num_threads=1,
        )
        self._rates["encode"].append(bits.size / (time.process_time() - began))
        return chunk

    def _decode(self, chunk: bytes, out: NDArray[np.float32]) -> None:
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
            self._video_bits += 8 * next(s.raw_bytes for s in unit.sections if s.kind == BITSTREAM)
            rows = planes.swapaxes(1, 2).reshape(-1, planes.shape[3])
            self._entropy_bits += baselines.order0_bits(rows, rows_per_class=32)
        self._rates["decode"].append(out.size / decode_seconds)
        self._rates["restore"].append(out.size / restore_seconds)
        self._rates["both"].append(out.size / (decode_seconds + restore_seconds))

    def speeds(self) -> dict[str, float | None]:
        """The last columns of `Row`."""
        median = {name: statistics.median(rates) for name, rates in self._rates.items()}
        return {
            "encode_elements_per_second": median["encode"],
            "decode_elements_per_second": median["decode"],
            "restore_elements_per_second": median["restore"],
            "decode_restore_elements_per_second": median["both"],
            "video_over_entropy": (
                self._video_bits / self._entropy_bits if self._entropy_bits else None
            ),
        }


def run(
    model: CaptureModel,
    calibration: Calibration,
    documents: list[Document],
    *,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure every coder of the table.

    Args:
        model: whose caches they are.
        calibration: of this model.
        documents: held-out texts, prefilled.
        only: names of rows; empty = all.
        say: gets a line per row.

    Raises:
        ConfigError: ``only`` names a row that there is not.
    """
    register_calibration(calibration)
    candidates = _candidates(calibration)
    unknown = set(only) - {name for name, _, _ in candidates}
    if unknown:
        raise ConfigError(
            f"no rows {sorted(unknown)}; there are {[name for name, _, _ in candidates]}"
        )
    rows = []
    for name, family, coder in candidates:
        if only and name not in only:
            continue
        found = measure(model, documents, coder)
        row = Row(
            name,
            family,
            found.bits_per_element,
            16 / found.bits_per_element,
            found.quality.kl,
            found.worst_kl,
            found.quality.perplexity_change,
            found.quality.top1_agreement,
            **(coder.speeds() if isinstance(coder, ProfileCoder) else {}),
            kl_by_document=found.kl_by_document,
        )
        rows.append(row)
        say(format_row(row))
    return rows


def _candidates(calibration: Calibration) -> list[tuple[str, str, Coder]]:
    spec = calibration.spec
    heads, dim = spec.num_kv_heads, spec.head_dim

    def ours(profile: Profile) -> ProfileCoder:
        return ProfileCoder(profile, spec)

    found: list[tuple[str, str, Coder]] = [
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
                functools.partial(baselines.uniform, bits=bits),
            ),
            (
                f"paper {bits} bit, + inter-frame",
                "paper",
                ours(PaperProfile(("1024x1024",), bits=bits, tiling=flat)),
            ),
            (
                f"paper {bits} bit, + intra-frame",
                "paper",
                ours(PaperProfile(("640x360",), bits=bits)),
            ),
        ]
    found += [
        ("bf16", "other", functools.partial(baselines.cast, dtype="bfloat16")),
        ("fp8 e4m3", "other", functools.partial(baselines.cast, dtype="float8_e4m3fn")),
        ("zstd of bf16", "other", baselines.zstd_bfloat16),
        ("uniform int8", "other", functools.partial(baselines.uniform, bits=8)),
        ("uniform int4", "other", functools.partial(baselines.uniform, bits=4)),
        ("KIVI-like 4 bit", "other", functools.partial(baselines.kivi, bits=4)),
        ("KIVI-like 2 bit", "other", functools.partial(baselines.kivi, bits=2)),
        ("CacheGen", "other", baselines.cachegen),
    ]
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
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or folder")
    parser.add_argument("--calibration", type=Path, help="artifact; default = the model's own")
    parser.add_argument("--texts", type=Path, help="folder of test texts; default = held-out ones")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--prefix-tokens", type=int, default=2048)
    parser.add_argument("--following-tokens", type=int, default=512)
    parser.add_argument("--only", action="append", default=[], help="a row; may be repeated")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of the table")
    parser.add_argument("--plot", type=Path, help="write the rate-quality plot (SVG) here")
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
                report["rows"], title=f"{report['model']}: rate and quality of KV codecs"
            )
        )
    if args.json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        lines = [HEADER, *(format_row(Row(**row)) for row in report["rows"])]
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _report(
    args: argparse.Namespace, say: Callable[[str], None], *, commit: str, command: str
) -> dict[str, Any]:
    import torch

    from kvfetcher.engines.identity import weights_digest
    from kvfetcher.engines.models import prepare_model

    folder = prepare_model(args.model, progress=say)
    calibration = _calibration(args, folder.path, weights_digest(folder.path), say)
    threads = torch.get_num_threads()
    model = CaptureModel.load(folder.path)
    texts = load_texts(args.texts) if args.texts else default_texts(held_out=True)
    documents = held_out_documents(
        model,
        texts,
        CertifySettings(args.documents, args.prefix_tokens, args.following_tokens),
        progress=lambda what, done, total: say(f"{what} ({done} of {total})"),
    )
    torch.set_num_threads(1)
    say(HEADER)
    try:
        rows = run(model, calibration, documents, only=args.only, say=say)
    finally:
        torch.set_num_threads(threads)
    return {
        "model": folder.name,
        "calibration": calibration.digest,
        "spec": calibration.spec.to_dict(),
        "groups": list(calibration.grouping.layer_counts),
        "heads_per_group": calibration.grouping.heads_per_group,
        "documents": [document.name for document in documents],
        "prefix_tokens": args.prefix_tokens,
        "following_tokens": args.following_tokens,
        "chunk_tokens": CHUNK_TOKENS,
        "rows": [asdict(row) for row in rows],
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
