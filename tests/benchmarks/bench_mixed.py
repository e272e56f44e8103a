"""Requests that hit nothing beside requests that fetch over a slow link: do they wait?

    PYTHONPATH=tests python tests/benchmarks/bench_mixed.py --output results/mixed.json

Open-loop load on a real tritonserver on this machine's CPU: every `--interval` seconds one request,
all at the same times in both arms, which take turns:

    mixed    every second request hits a prefix that is fetched over a slow link (kv_policy=fetch)
    alone    the same misses at the same times, without the hits

What counts is the median time to first token of the misses: at most 10 % more in `mixed`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from fetch_rig import Prompts, Served, machine, serving, spread, store_behind_link, talk, write

from kvfetcher_client import AsyncClient
from support.shaping import LinkShape

BOUND = 0.10


async def one(client: AsyncClient, prompt: str, policy: str, at: float) -> tuple[float, dict]:
    """A request sent at `at` (event loop's clock): seconds to its first token, and its report."""
    await asyncio.sleep(max(0.0, at - asyncio.get_running_loop().time()))
    answer = await client.generate(prompt, max_tokens=1, kv_policy=policy)
    return answer.time_to_first_token_seconds, dict(answer.report.raw)


async def load(
    served: Served, hits: Prompts, misses: Prompts, *, num_each: int, interval: float, mixed: bool
) -> dict[str, list]:
    """All requests of one arm."""
    async with AsyncClient(served.server.grpc_url) as client:
        start = asyncio.get_running_loop().time() + 0.2
        tasks = []
        for index in range(num_each):
            at = start + 2 * index * interval
            if mixed:
                tasks.append(("hit", one(client, hits.another(), "fetch", at)))
            # A beginning of its own: nothing of it is stored.
            title = f"Document {time.monotonic_ns()}. "
            miss = one(client, misses.another(title), "auto", at + interval)
            tasks.append(("miss", miss))
        results = await asyncio.gather(*(task for _, task in tasks))
    found: dict[str, list] = {"hit": [], "miss": []}
    for (kind, _), result in zip(tasks, results, strict=True):
        found[kind].append(result)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--hit-tokens", type=int, default=512, help="of the stored prefix")
    parser.add_argument(
        "--miss-tokens", type=int, default=128, help="of a miss: too few to be saved"
    )
    parser.add_argument("--requests", type=int, default=8, help="of each kind in one arm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--interval", type=float, default=1.2, help="seconds between requests")
    parser.add_argument("--gbit-per-second", type=float, default=0.05)
    parser.add_argument("--rtt-ms", type=float, default=10.0)
    args = parser.parse_args()
    arms: dict[str, dict[str, list]] = {
        "mixed": {"hit": [], "miss": []},
        "alone": {"hit": [], "miss": []},
    }
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        store_behind_link(Path(folder)) as (_, link),
        serving(link, fetch={"deadline_seconds": 120.0}) as served,
    ):
        hits = Prompts(served.config, args.hit_tokens)
        misses = Prompts(served.config, args.miss_tokens)
        served.first_token(hits.another(), "auto")
        served.settle()
        link.reshape(LinkShape(args.gbit_per_second, args.rtt_ms / 1e3))
        for number in range(args.rounds):
            for name in ("mixed", "alone") if number % 2 else ("alone", "mixed"):
                found = asyncio.run(
                    load(
                        served, hits, misses, num_each=args.requests,
                        interval=args.interval, mixed=name == "mixed",
                    )
                )  # fmt: skip
                for kind, results in found.items():
                    arms[name][kind] += results
                served.settle()
            talk(f"round {number + 1} of {args.rounds}")
    for _, report in arms["mixed"]["hit"]:
        if report["hit_tokens"] < args.hit_tokens // 256 * 256:
            raise SystemExit(f"a hit was none: {report}")
    times = {name: [s for s, _ in arm["miss"]] for name, arm in arms.items()}
    ratio = median(times["mixed"]) / median(times["alone"])
    report = {
        "benchmark": "mixed",
        "gbit_per_second": args.gbit_per_second,
        "rtt_ms": args.rtt_ms,
        "hit_tokens": args.hit_tokens,
        "miss_tokens": args.miss_tokens,
        "interval_seconds": args.interval,
        "machine": machine(),
        "misses_mixed_over_alone": round(ratio, 4),
        "misses_mixed": spread(times["mixed"]),
        "misses_alone": spread(times["alone"]),
        "hits": spread([s for s, _ in arms["mixed"]["hit"]]),
    }
    talk(
        f"misses: {median(times['mixed']):.3f} s with hits, {median(times['alone']):.3f} s without"
        f" ({ratio - 1:+.1%}); hits {report['hits']['median_seconds']:.3f} s"
    )
    write(args.output, report)
    return 0 if ratio <= 1 + BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
