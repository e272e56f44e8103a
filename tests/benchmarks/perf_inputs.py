"""Input data for perf_analyzer, as JSON on stdout or in a file.

    python tests/benchmarks/perf_inputs.py prompts --prompts 16 --tokens 8 --output prompts.json
    perf_analyzer -m kvfetcher -u 127.0.0.1:8001 -i grpc --streaming --async \\
        --input-data prompts.json --concurrency-range 1:2 \\
        --measurement-mode count_windows --measurement-request-count 8 --max-trials 3 --stability-percentage 999

    python tests/benchmarks/perf_inputs.py units chunk.kvf --output units.json
    perf_analyzer -m kv_pipeline -u 127.0.0.1:8001 -i grpc --input-data units.json --stability-percentage 50
    perf_analyzer -m kv_decode -u 127.0.0.1:8001 -i grpc --input-data units.json --stability-percentage 50

A chunk is any object of a store (`kvfetcher store ls`). `synthetic` writes one of random values.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from pathlib import Path

import numpy as np

DOCUMENT = Path(__file__).parents[1] / "data" / "documents" / "references_and_borrowing.txt"
SEED = 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    prompts = kinds.add_parser("prompts", help="requests of the model kvfetcher")
    prompts.add_argument("--prompts", type=int, default=16, help="different prompts")
    prompts.add_argument("--words", type=int, default=300, help="words of the shared document")
    prompts.add_argument("--tokens", type=int, default=32, help="max_tokens of each answer")
    prompts.set_defaults(run=lambda args: _prompts(args.prompts, args.words, args.tokens))
    units = kinds.add_parser("units", help="requests of kv_decode and kv_pipeline")
    units.add_argument("chunk", type=Path, help="a chunk object")
    units.set_defaults(run=lambda args: _units(args.chunk.read_bytes()))
    synthetic = kinds.add_parser("synthetic", help="the same of a chunk made of random values")
    synthetic.add_argument("--profile", default="exact", choices=("exact", "uncalibrated"))
    synthetic.set_defaults(run=lambda args: _units(_chunk(args.profile)))
    for sub in (prompts, units, synthetic):
        sub.add_argument("--output", type=Path, help="default: stdout")
    args = parser.parse_args()
    text = json.dumps({"data": args.run(args)})
    if args.output:
        args.output.write_text(text)
    else:
        sys.stdout.write(text)
    return 0


def _prompts(count: int, words: int, tokens: int) -> list[dict]:
    document = " ".join(DOCUMENT.read_text().split()[:words])
    return [
        {
            "text_input": [f"{document}\n\nQuestion {number}: what is said about references?"],
            "max_tokens": [tokens],
            "stream": [True],
        }
        for number in range(count)
    ]


def _units(chunk: bytes) -> list[dict]:
    from kvfetcher.format.container import parse_header

    units = [chunk[entry.offset : entry.stop] for entry in parse_header(chunk).units]
    return [
        {"unit": {"content": {"b64": base64.b64encode(u).decode()}, "shape": [len(u)]}}
        for u in units
    ]


def _chunk(profile: str) -> bytes:
    from kvfetcher.codec.profiles import encode_chunk, make_profile
    from kvfetcher.codec.quant import float32_to_bits
    from kvfetcher.config import CodecConfig
    from kvfetcher.spec import KVSpec

    spec = KVSpec(num_layers=8, num_kv_heads=8, head_dim=128, dtype="bfloat16")
    shape = (spec.num_layers, 2, spec.num_kv_heads, 256, spec.head_dim)
    values = np.random.default_rng(SEED).normal(0, 3, shape).astype(np.float32)
    return encode_chunk(
        float32_to_bits(values, spec.dtype),
        spec=spec,
        profile=make_profile(CodecConfig(profile=profile)),
        identity=bytes(32),
        chunk_key=bytes(32),
        token_ids=range(256),
        first_position=0,
        num_threads=2,
    )


if __name__ == "__main__":
    sys.exit(main())
