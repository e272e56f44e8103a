"""The own HEVC encoder beside libx265, on the pictures that every profile makes of real KV caches.

    python tests/benchmarks/bench_encode.py --calibration FILE > results/encode_cpu.json

One held-out text, as one chunk of 1,024 tokens and one of 256 (pictures of as many columns). Each
encoder has the settings that the product gives it (`exact`: libx265's fast ones) and codes each
unit's pictures in turn with the other, several rounds; speeds are samples per CPU second of one
thread. Every stream is decoded and compared before its bits count. Then a save of 3,500 tokens, in
chunks of 256: libx265 as it was used before (chunk after chunk, a thread for each unit), and
`kv_encode`'s threads with the own encoder; wall time on all cores, beside whatever else runs here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvfetcher import wire
from kvfetcher.backend.coding import ChunkEncoder
from kvfetcher.backend.encode_requests import EncodeRequests
from kvfetcher.calibration.capture import CaptureModel
from kvfetcher.calibration.texts import default_texts
from kvfetcher.codec import video
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.hevc import encoder as hevc
from kvfetcher.codec.ladder.artifact import LADDER, Calibration
from kvfetcher.codec.ladder.library import register_calibration
from kvfetcher.codec.ladder.profile import TransformProfile
from kvfetcher.codec.paper import PaperProfile
from kvfetcher.codec.profiles import encode_chunk, encode_unnamed
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.uncalibrated import UncalibratedProfile
from kvfetcher.config import CodecConfig
from kvfetcher.models.folders import prepare_model
from support import pb_utils

if TYPE_CHECKING:
    from kvfetcher.format.pictures import PlaneGeometry

MODEL = "smollm2-135m-instruct"
COLUMNS = (1024, 256)
SAVED_TOKENS, CHUNK_TOKENS = 3500, 256
ENCODERS = {"x265": video.encode_planes, "own": hevc.encode_planes}


class Unit(NamedTuple):
    planes: np.ndarray
    options: dict


def units_of(profile, bits, spec) -> list[Unit]:
    """The pictures of every unit of one chunk."""
    found = []

    def keep(planes, **options):
        found.append(Unit(planes.copy(), options))
        return ENCODERS["own"](planes, **options)

    encode_chunk(
        bits,
        spec=spec,
        profile=profile,
        identity=bytes(32),
        chunk_key=bytes(32),
        token_ids=[0] * bits.shape[3],
        first_position=0,
        num_threads=1,
        encoder=keep,
    )
    return found


def compare(units: list[Unit], rounds: int) -> dict:
    """Bits and speeds of both encoders, and what decoding their streams takes."""
    samples = sum(unit.planes.size for unit in units)
    encode = {name: [] for name in ENCODERS}
    decode = {name: [] for name in ENCODERS}
    sizes = {}
    decoder = video.VideoDecoder()
    for number in range(rounds):
        order = list(ENCODERS) if number % 2 else list(ENCODERS)[::-1]
        for name in order:
            began = time.process_time()
            streams = [ENCODERS[name](unit.planes, **unit.options) for unit in units]
            encode[name].append(samples / (time.process_time() - began))
            sizes[name] = sum(len(packet) for stream in streams for packet in stream)
            began = time.process_time()
            pictures = [
                decoder.decode(stream, geometry(unit))
                for unit, stream in zip(units, streams, strict=True)
            ]
            decode[name].append(samples / (time.process_time() - began))
            for unit, planes in zip(units, pictures, strict=True):
                if not np.array_equal(planes, unit.planes):
                    raise SystemExit(f"{name} changed samples")
    ratios = sorted(own / x265 for own, x265 in zip(encode["own"], encode["x265"], strict=True))
    return {
        "samples": samples,
        "pictures": sorted({"x".join(map(str, unit.planes.shape[2:])) for unit in units}),
        "bits_per_sample": {name: 8 * size / samples for name, size in sizes.items()},
        "bits_ratio": sizes["own"] / sizes["x265"],
        "encode_samples_per_second": {n: statistics.median(s) for n, s in encode.items()},
        "speed_ratio": statistics.median(ratios),
        "speed_ratio_spread": [ratios[0], ratios[-1]],
        "decode_samples_per_second": {n: statistics.median(s) for n, s in decode.items()},
        "decode_speed_ratio": statistics.median(
            own / x265 for own, x265 in zip(decode["own"], decode["x265"], strict=True)
        ),
    }


def geometry(unit: Unit) -> PlaneGeometry:
    depth = unit.options["bit_depth"]
    return video.checked_geometry(
        unit.planes, bit_depth=depth, chroma=unit.options.get("chroma", "4:4:4")
    )


def save_before(bits, spec, profile) -> None:
    """`kv_encode` of earlier builds: chunk after chunk, each by as many threads as cores."""
    for start in range(0, bits.shape[3] - CHUNK_TOKENS + 1, CHUNK_TOKENS):
        part = np.ascontiguousarray(bits[:, :, :, start : start + CHUNK_TOKENS])
        encode_unnamed(
            part,
            spec=spec,
            profile=profile,
            first_position=start,
            num_threads=len(os.sched_getaffinity(0)),
        )


def save_now(bits, spec, encoder: ChunkEncoder) -> None:
    """`kv_encode` of this build, without Triton."""
    requests = []
    for start in range(0, bits.shape[3] - CHUNK_TOKENS + 1, CHUNK_TOKENS):
        part = np.ascontiguousarray(bits[:, :, :, start : start + CHUNK_TOKENS])
        asked = {"spec": spec.to_dict(), "first_position": start}
        requests.append(
            pb_utils.Request(
                {
                    wire.INPUT_IDS: np.zeros(CHUNK_TOKENS, np.int32),
                    wire.KV_SPEC: np.array([json.dumps(asked).encode()], object),
                    wire.KV_VALUES: part.reshape(-1).view(np.uint8),
                }
            )
        )
    encode = EncodeRequests(encoder, pb_utils)
    encode.execute(requests)
    encode.close()
    for request in requests:
        (response,) = request.sender.responses
        if response.has_error():
            raise SystemExit(response.error.message())


def compare_saves(bits, spec, profiles, calibration_path: Path, rounds: int) -> dict:
    """Wall seconds of saving `SAVED_TOKENS` tokens."""
    found = {}
    for name in ("exact", "balanced"):
        config = CodecConfig(
            profile=name,
            encoder="own",
            calibration=str(calibration_path) if name in LADDER else "",
            allow_uncertified=True,
        )
        encoder = ChunkEncoder(config)
        before, now, cpu_before, cpu_now = [], [], [], []
        for _ in range(rounds):
            began, cpu = time.perf_counter(), time.process_time()
            save_before(bits, spec, profiles[name])
            before.append(time.perf_counter() - began)
            cpu_before.append(time.process_time() - cpu)
            began, cpu = time.perf_counter(), time.process_time()
            save_now(bits, spec, encoder)
            now.append(time.perf_counter() - began)
            cpu_now.append(time.process_time() - cpu)
        encoder.close()
        ratios = [a / b for a, b in zip(before, now, strict=True)]
        found[name] = {
            "tokens": SAVED_TOKENS // CHUNK_TOKENS * CHUNK_TOKENS,
            "seconds_before": statistics.median(before),
            "seconds_now": statistics.median(now),
            "ratio": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "cpu_seconds_before": statistics.median(cpu_before),
            "cpu_seconds_now": statistics.median(cpu_now),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    calibration = Calibration.load(args.calibration)
    register_calibration(calibration)
    spec = calibration.spec
    hevc.warm_up()
    model = CaptureModel.load(prepare_model(MODEL, progress=lambda _: None).path)
    tokens = [t for text in default_texts(held_out=True) for t in model.encode(text.text)[:1024]]
    values = model.prefill(tokens[:SAVED_TOKENS]).to_array()
    bits = float32_to_bits(values, spec.dtype)
    profiles = {
        "exact": ExactProfile(),
        **{name: TransformProfile(name, calibration) for name in LADDER},
        "uncalibrated": UncalibratedProfile(),
        "paper": PaperProfile(("640x360",)),
    }
    rows: dict[str, dict] = {str(columns): {} for columns in COLUMNS}
    for columns in COLUMNS:
        part = np.ascontiguousarray(bits[:, :, :, :columns])
        for name, profile in profiles.items():
            rows[str(columns)][name] = compare(units_of(profile, part, spec), args.rounds)
            found = rows[str(columns)][name]
            print(
                f"{name} {columns}: {found['speed_ratio']:.2f} times the speed,"
                f" {found['bits_ratio']:.4f} of the bits, decoding {found['decode_speed_ratio']:.3f}",
                file=sys.stderr,
            )
    saves = compare_saves(bits, spec, profiles, args.calibration, args.rounds)
    first = rows[str(COLUMNS[0])]
    report = {
        "speed_ratio_to_x265": {name: row["speed_ratio"] for name, row in first.items()},
        "bits_ratio_to_x265": {name: row["bits_ratio"] for name, row in first.items()},
        "bits_ratio_to_x265_256_columns": {
            name: row["bits_ratio"] for name, row in rows[str(COLUMNS[1])].items()
        },
        "decode_speed_ratio_to_x265": {
            name: row["decode_speed_ratio"] for name, row in first.items()
        },
        "save_3500_tokens": saves,
        "columns": rows,
        "rounds": args.rounds,
        "spread": "speed_ratio_spread of each row: least and greatest of the rounds",
        "model": MODEL,
        "calibration": calibration.digest,
        "machine": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg(),
            "python": platform.python_version(),
            "commit": commit(),
        },
        "command": f"python tests/benchmarks/{shlex.join([Path(sys.argv[0]).name])}"
        f" --calibration FILE --rounds {args.rounds}",
    }
    json.dump(report, sys.stdout, indent=1)
    print()


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((li.split(":", 1)[1].strip() for li in lines if li.startswith("model name")), "")


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
