"""Memory of the codec's jobs beyond what lay there before, in bytes per token and per element.

    python tests/benchmarks/bench_memory.py [--calibration FILE] > tests/benchmarks/results/memory.json

Peaks of the resident set (Linux: /proc/self), so the encoder's and decoder's own memory counts, not
only Python's. Each job runs in the calling thread, once before it is measured, on random values of
the calibration's geometry: how much memory it takes does not depend on them, but for escapes.
"""

import argparse
import ctypes
import functools
import json
import re
import sys
from pathlib import Path

import numpy as np

from kvfetcher.calibration.statistics import Statistics
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.codec.ladder.library import model_calibration_path, register_calibration
from kvfetcher.codec.ladder.profile import TransformProfile
from kvfetcher.codec.ladder.rope import rotate_keys
from kvfetcher.codec.profiles import encode_unnamed, restore_unit
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.format.container import parse_header
from kvfetcher.format.unit import parse_unit
from kvfetcher.models.folders import prepare_model
from kvfetcher.models.identity import weights_digest
from kvfetcher.spec import LADDER

_M_MMAP_THRESHOLD = -3


def peak_bytes(job):
    """Largest growth of the resident set while `job` runs the second time."""
    job()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    job()
    return max(0, _status("VmHWM") - before)


def _status(name):
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", text).group(1))


def likely_values(calibration, num_tokens):
    """Rotated keys and values [L, K, H, T, D] with the calibration's own deviations."""
    spec, grouping = calibration.spec, calibration.grouping
    rng = np.random.default_rng(0)
    values = np.empty(
        (spec.num_layers, spec.kv_factor, spec.num_kv_heads, num_tokens, spec.head_dim), np.float32
    )
    for a, (start, count) in enumerate(
        zip(grouping.layer_starts, grouping.layer_counts, strict=True)
    ):
        for b, (first, stop) in enumerate(grouping.head_ranges):
            basis = calibration.bases[a, b]
            matrices = calibration.matrices((a, b), len(basis.sigma))
            z = rng.normal(size=(num_tokens, len(basis.sigma))).astype(np.float32) * basis.sigma
            x = (z @ matrices.inverse + matrices.mean).reshape(
                num_tokens, count, spec.kv_factor, stop - first, spec.head_dim
            )
            values[start : start + count, :, first:stop] = x.transpose(1, 2, 3, 0, 4)
    rotate_keys(values[:, 0], calibration.rope, 4096)
    return values


def encode(bits, *, spec, profile):
    return encode_unnamed(bits, spec=spec, profile=profile, first_position=4096, num_threads=1)


def decode(chunk, decoder):
    """Decode and restore every unit, one at a time."""
    for entry in parse_header(chunk).units:
        data = chunk[entry.offset : entry.stop]
        unit = parse_unit(data)
        restore_unit(data, decoder.decode(unit.packets(), unit.geometry))


def count_document(calibration, num_tokens):
    """What calibration does with a document after the model ran."""
    spec = calibration.spec
    shape = (spec.num_layers, spec.kv_factor, spec.num_kv_heads, num_tokens, spec.head_dim)
    stats = Statistics(calibration.grouping)
    values = np.ones(shape, np.float32)
    return lambda: stats.add(values, values, num_evaluated=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    # Freed arrays go back to the system at once, so that a later peak is not hidden in them.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    path = args.calibration
    if path is None:
        path = model_calibration_path(weights_digest(prepare_model(args.model).path))
    calibration = Calibration.load(path)
    register_calibration(calibration)
    spec = calibration.spec
    bits = float32_to_bits(likely_values(calibration, args.tokens), spec.dtype)
    rows = {}
    for name in ("exact", *LADDER):
        profile = ExactProfile() if name == "exact" else TransformProfile(name, calibration)
        chunk = encode(bits, spec=spec, profile=profile)
        decoder = VideoDecoder()
        rows[name] = {
            "encode": peak_bytes(functools.partial(encode, bits, spec=spec, profile=profile)),
            "decode_and_restore": peak_bytes(functools.partial(decode, chunk, decoder)),
            "matrices": sum(
                sum(array.nbytes for array in kept)
                for kept in (*calibration._forwards.values(), *calibration._inverses.values())
            ),
        }
        calibration._forwards.clear()
        calibration._inverses.clear()
    document = 1792
    rows["calibrate, one document"] = {"count": peak_bytes(count_document(calibration, document))}
    for name, row in rows.items():
        tokens = document if "count" in row else args.tokens
        for job in [job for job in row if job != "matrices"]:
            row[f"{job}_bytes_per_token"] = round(row[job] / tokens)
            row[f"{job}_bytes_per_element"] = round(row[job] / tokens / spec.elements_per_token, 1)
        sys.stderr.write(f"{name}: {row}\n")
    report = {
        "command": "python tests/benchmarks/bench_memory.py " + " ".join(sys.argv[1:]),
        "calibration": calibration.digest,
        "spec": spec.to_dict(),
        "chunk_tokens": args.tokens,
        "elements_per_token": spec.elements_per_token,
        "statistics_bytes": sum(
            a.nbytes for a in Statistics(calibration.grouping).products.values()
        ),
        "rows": rows,
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
