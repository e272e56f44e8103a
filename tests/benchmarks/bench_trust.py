"""What the checks of trust cost beside decode + restore, and what sealing costs.

    python tests/benchmarks/bench_trust.py --output tests/benchmarks/results/trust.json

Per chunk the server seals one target (kv_fetch), and per unit opens it twice (kv_decode with NVDEC,
kv_restore). Rounds with
and without that work take turns on one core, over the same units, and every round's values are compared
with the first round's. Times are CPU seconds of the process, which other processes do not lengthen much. Sealing of objects is measured alone, per GB of chunk.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvfetcher.codec.profiles import decode_unit, encode_chunk, make_profile, restore_unit
from kvfetcher.codec.quant import float32_to_bits
from kvfetcher.codec.video import VideoDecoder
from kvfetcher.config import CodecConfig
from kvfetcher.format.container import parse_header
from kvfetcher.memory.arena import BlockTarget
from kvfetcher.memory.permits import Permits
from kvfetcher.spec import KVSpec
from kvfetcher.storage.keyring import parse_keyring
from kvfetcher.storage.sealed import Sealer

SEED = 20
TOKENS = 256
SPEC = KVSpec(num_layers=8, num_kv_heads=8, head_dim=128, dtype="bfloat16")
CHUNK = f"{'0' * 16}/{'0' * 16}/000/{'0' * 64}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each kind")
    parser.add_argument("--output", type=Path, help="default: stdout")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    units = _units()
    facts = {
        "command": "python tests/benchmarks/bench_trust.py",
        "seconds": "CPU time of the process, one core",
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "profile": "uncalibrated",
        "units": len(units),
        "unit_bytes": statistics.median(len(unit) for unit in units),
        "permits": _permits(units, args.rounds),
        "seals": _seals(b"".join(units), args.rounds),
    }
    text = json.dumps(facts, indent=2) + "\n"
    if args.output:
        args.output.write_text(text)
    else:
        sys.stdout.write(text)
    return 0


def _units() -> list[bytes]:
    shape = (SPEC.num_layers, 2, SPEC.num_kv_heads, TOKENS, SPEC.head_dim)
    values = np.random.default_rng(SEED).normal(0, 3, shape).astype(np.float32)
    chunk = encode_chunk(
        float32_to_bits(values, SPEC.dtype),
        spec=SPEC,
        profile=make_profile(CodecConfig(profile="uncalibrated")),
        identity=bytes(32),
        chunk_key=bytes(32),
        token_ids=range(TOKENS),
        first_position=0,
        num_threads=1,
    )
    return [chunk[entry.offset : entry.stop] for entry in parse_header(chunk).units]


def _permits(units: list[bytes], rounds: int) -> dict[str, object]:
    permits, decoder = Permits(bytes(32)), VideoDecoder()
    target = BlockTarget("0" * 32, tuple(range(TOKENS // 16)), TOKENS, "1" * 32, "t", 1e9)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    checks: list[float] = []
    digest = ""
    for number in range(2 * rounds + 2):
        with_checks = bool(number % 2)
        started = time.process_time()
        found = hashlib.sha256()
        spent = 0.0
        for unit in units:
            if with_checks:
                begun = time.process_time()
                if unit is units[0]:
                    named = replace(target, tenant=permits.tenant("s"))
                    sealed = permits.seal("write", named.to_json(), expires_at=1e9)
                for _ in range(2):
                    BlockTarget.from_json(permits.open("write", sealed))
                spent += time.process_time() - begun
            found.update(restore_unit(unit, decode_unit(unit, decoder)).values.tobytes())
        whole = time.process_time() - started
        digest = digest or found.hexdigest()
        assert found.hexdigest() == digest, "the values differ"
        if number >= 2:
            seconds[with_checks].append(whole)
            if with_checks:
                checks.append(spent)
    decoder.close()
    plain, checked = (statistics.median(seconds[kind]) for kind in (False, True))
    return {
        "rounds": rounds,
        "decode_restore_ms_per_unit": round(1e3 * plain / len(units), 3),
        "with_checks_ms_per_unit": round(1e3 * checked / len(units), 3),
        "checks_us_per_unit": round(1e6 * statistics.median(checks) / len(units), 1),
        "checks_percent": round(100 * statistics.median(checks) / plain, 3),
        "spread_percent": round(100 * (max(seconds[False]) - min(seconds[False])) / plain, 1),
    }


def _seals(data: bytes, rounds: int) -> dict[str, dict[str, float]]:
    key = base64.b64encode(bytes(32)).decode()
    ring = parse_keyring(json.dumps({"names": key, "current": "k", "keys": {"k": key}}))
    data *= max(1, (8 << 20) // len(data))
    result = {}
    for kind in ("hmac", "ed25519", "aes-gcm"):
        sealer = Sealer(kind, ring)
        times: dict[str, list[float]] = {"seal": [], "open": []}
        for _ in range(rounds):
            started = time.process_time()
            sealed = sealer.seal(CHUNK, data)
            times["seal"].append(time.process_time() - started)
            started = time.process_time()
            opened = sealer.open(CHUNK, sealed)
            times["open"].append(time.process_time() - started)
            assert opened == data
        result[kind] = {
            f"{verb}_gb_per_s": round(len(data) / 1e9 / statistics.median(found), 2)
            for verb, found in times.items()
        } | {"larger_percent": round(100 * (len(sealed) / len(data) - 1), 3)}
    return result


if __name__ == "__main__":
    sys.exit(main())
