"""What a picture size costs in bits and CPU decode time, on real KV caches.

    python tests/benchmarks/bench_frame_sizes.py --calibration FILE > results/frame_sizes.json

Every profile codes the caches of held-out texts in chunks of 256 and 1024 tokens and in several
sizes of pictures; sizes are those of the chunk objects' units, all side data included. Decode times
are CPU seconds of one thread per unit, warm decoder, medians; every unit is restored once, and each
variant's values are compared with the first variant's before a number is printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher import __version__
from kvfetcher.calibration.capture import CaptureModel
from kvfetcher.calibration.texts import default_texts
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.codec.ladder.library import register_calibration
from kvfetcher.codec.ladder.profile import TransformProfile
from kvfetcher.codec.paper import PaperProfile
from kvfetcher.codec.profiles import decode_parsed, encode_unnamed, restore_unit
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.format.container import parse_header
from kvfetcher.format.sections import SectionKind
from kvfetcher.format.unit import parse_unit
from kvfetcher.models.folders import prepare_model

if TYPE_CHECKING:
    from kvfetcher.spec import KVSpec

MODEL = "smollm2-135m-instruct"
# Five layer groups of up to 500 lines: one, two, three and five of them in a picture.
TRANSFORM_SIZES = ("1024x540", "1024x1040", "1024x1560", "1024x2560")
# 384 channels a layer, 128 lines: 5, 10, 15 and 30 layers.
EXACT_SIZES = ("1024x640", "1024x1280", "1024x1920", "1024x3840")
PAPER_SIZES = ("640x360", "1280x720", "1920x1080")
REPEATS = 3


def measure(profile, bits: np.ndarray, spec: KVSpec, first_position: int) -> dict[str, dict]:
    """One chunk in every variant of a profile."""
    data = encode_unnamed(
        bits, spec=spec, profile=profile, first_position=first_position, num_threads=1
    )
    header = parse_header(data)
    decoder = VideoDecoder()
    found, reference = {}, None
    for variant in header.variants:
        units, parts, pictures = [], [], []
        for entry in header.units_of(variant):
            unit_data = data[entry.offset : entry.stop]
            unit = parse_unit(unit_data)
            seconds = []
            for _ in range(REPEATS):
                began = time.process_time()
                planes = decode_parsed(unit, decoder)
                seconds.append(time.process_time() - began)
            began = time.process_time()
            parts.append(restore_unit(unit_data, planes).values)
            restore = time.process_time() - began
            video = sum(s.raw_bytes for s in unit.sections if s.kind == SectionKind.BITSTREAM)
            units.append((entry.length, video, min(seconds), restore))
            pictures.append(unit.geometry)
        values = np.concatenate(parts)
        reference = values if reference is None else reference
        if not np.array_equal(values, reference):
            raise SystemExit(f"variant {variant} of {profile.identity} restores other values")
        found[variant] = {
            "units": units,
            "pictures": sum(p.num_frames for p in pictures),
            "picture": f"{pictures[0].width}x{pictures[0].height}"
            if pictures[0].num_frames
            else "",
            "samples": sum(3 * p.num_frames * p.width * p.height for p in pictures),
        }
    return found


def row(name: str, tokens: int, variant: str, chunks: list[dict], elements: int) -> dict:
    """Sums over chunks, medians over units."""
    units = [unit for chunk in chunks for unit in chunk["units"]]
    video_bits = 8 * sum(unit[1] for unit in units)
    samples = sum(chunk["samples"] for chunk in chunks)
    decode = sum(unit[2] for unit in units)
    return {
        "profile": name,
        "chunk_tokens": tokens,
        "variant": variant,
        "picture": chunks[0]["picture"],
        "units_per_chunk": len(units) // len(chunks),
        "pictures_per_chunk": chunks[0]["pictures"],
        "bits_per_element": 8 * sum(unit[0] for unit in units) / elements,
        "video_bits_per_sample": video_bits / samples if samples else 0.0,
        "samples_per_element": samples / elements,
        "unit_decode_seconds": statistics.median(unit[2] for unit in units),
        "decode_elements_per_second": elements / decode if samples else None,
        "decode_video_bits_per_second": video_bits / decode if samples else 0.0,
        "restore_elements_per_second": elements / sum(unit[3] for unit in units),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--profiles", default="", help="of them, separated by commas; none = all")
    args = parser.parse_args()
    calibration = Calibration.load(args.calibration)
    register_calibration(calibration)
    spec = calibration.spec
    model = CaptureModel.load(prepare_model(MODEL, progress=lambda _: None).path)
    texts = default_texts(held_out=True)[: args.documents]
    caches = [model.prefill(model.encode(text.text)[:2048]).to_array() for text in texts]
    profiles = {
        **{
            name: TransformProfile(name, calibration, TRANSFORM_SIZES, packed_copy=True)
            for name in ("balanced", "compact")
        },
        "exact": ExactProfile(frame_sizes=EXACT_SIZES),
        "paper 8 bit": PaperProfile(PAPER_SIZES, bits=8),
        "paper 4 bit": PaperProfile(PAPER_SIZES, bits=4),
    }
    if args.profiles:
        profiles = {name: profiles[name] for name in args.profiles.split(",")}
    rows = []
    for name, profile in profiles.items():
        for tokens in (256, 1024):
            chunks, elements = [], 0
            for cache in caches:
                # From the second kilotoken on: the first tokens are kept exact beside the video.
                for start in range(1024, 2048, tokens):
                    part = np.ascontiguousarray(cache[:, :, :, start : start + tokens])
                    bits = float32_to_bits(part, spec.dtype)
                    chunks.append(measure(profile, bits, spec, start))
                    elements += bits.size
            for variant in chunks[0]:
                found = row(name, tokens, variant, [c[variant] for c in chunks], elements)
                rows.append(found)
                sys.stderr.write(
                    f"{name:12} {tokens:5} {variant:10} {found['picture']:10}"
                    f" {found['bits_per_element']:.3f} bits"
                    f" {(found['decode_elements_per_second'] or 0) / 1e6:.1f} M elements/s decoded\n"
                )
    report = {
        "model": MODEL,
        "calibration": calibration.digest,
        "texts": [text.name for text in texts],
        "rows": rows,
        "machine": {
            "cpu": next(
                line.split(":", 1)[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            "python": platform.python_version(),
            "kvfetcher": __version__,
        },
        "command": " ".join(
            [
                "python tests/benchmarks/bench_frame_sizes.py --calibration FILE",
                *([f"--profiles {args.profiles}"] if args.profiles else []),
            ]
        ),
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
