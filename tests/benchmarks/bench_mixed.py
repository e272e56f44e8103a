"""Requests that hit nothing beside requests that fetch over a slow link: do they wait?

    PYTHONPATH=tests python tests/benchmarks/bench_mixed.py --output results/mixed.json

Open-loop load on a real tritonserver on this machine's CPU: Poisson arrivals from a seed, the same
in both arms, which take turns:

    mixed    requests that hit one of several prefixes, fetched over a slow link (kv_policy=fetch),
             several in flight at one time, beside the misses
    alone    the same misses at the same times, without the hits

A miss is longer than a chunk and looks the store up (kv_policy=auto), but nothing is saved: the
prefixes are stored by a server before, and the one that is measured saves nothing. What counts is
the median time to first token of the misses: at most 10 % more in `mixed`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from itertools import accumulate
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


def arrivals(seed: str, *, num: int, interval: float) -> list[float]:
    """Seconds at which requests come: Poisson, one every `interval` on average."""
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(1 / interval) for _ in range(num)))


async def load(
    served: Served,
    prompts: Prompts,
    hits: Prompts,
    *,
    hit_times: list[float],
    miss_times: list[float],
    num_prefixes: int,
) -> dict[str, list]:
    """All requests of one arm."""
    async with AsyncClient(served.server.grpc_url) as client:
        start = asyncio.get_running_loop().time() + 0.2
        tasks = [
            ("hit", one(client, hits.another(title_of(i % num_prefixes)), "fetch", start + at))
            for i, at in enumerate(hit_times)
        ]
        # A beginning of its own: nothing of it is stored.
        tasks += [
            (
                "miss",
                one(
                    client, prompts.another(f"Document {time.monotonic_ns()}. "), "auto", start + at
                ),
            )
            for at in miss_times
        ]
        results = await asyncio.gather(*(task for _, task in tasks))
    found: dict[str, list] = {"hit": [], "miss": []}
    for (kind, _), result in zip(tasks, results, strict=True):
        found[kind].append(result)
    return found


def title_of(prefix: int) -> str:
    """What one of the stored prefixes begins with."""
    return f"Collection {prefix}. "


def most_at_once(starts: list[float], seconds: list[float]) -> int:
    """Requests in flight at one time, at most."""
    ends = [at + length for at, length in zip(starts, seconds, strict=True)]
    return max(
        (sum(s <= at < e for s, e in zip(starts, ends, strict=True)) for at in starts), default=0
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--hit-tokens", type=int, default=512, help="of the stored prefix")
    parser.add_argument("--miss-tokens", type=int, default=320, help="of a miss, at least a chunk")
    parser.add_argument("--prefixes", type=int, default=4, help="stored ones, in turns")
    parser.add_argument("--requests", type=int, default=12, help="of each kind in one arm")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--interval", type=float, default=3.0, help="seconds between misses, mean")
    parser.add_argument(
        "--hit-interval", type=float, default=2.0, help="seconds between hits, mean"
    )
    parser.add_argument("--seed", default="0", help="of the arrivals")
    parser.add_argument("--gbit-per-second", type=float, default=0.05)
    parser.add_argument("--rtt-ms", type=float, default=10.0)
    args = parser.parse_args()
    arms: dict[str, dict[str, list]] = {
        "mixed": {"hit": [], "miss": []},
        "alone": {"hit": [], "miss": []},
    }
    started = time.time()
    most = 0
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        store_behind_link(Path(folder)) as (_, link),
    ):
        with serving(link) as saving:
            hits = Prompts(saving.config, args.hit_tokens)
            for prefix in range(args.prefixes):
                saving.first_token(hits.another(title_of(prefix)), "auto")
                saving.settle()
        talk(f"{args.prefixes} prefixes saved")
        fetch = {"deadline_seconds": 120.0}
        with serving(link, fetch=fetch, save={"enabled": False}) as served:
            misses = Prompts(served.config, args.miss_tokens)
            link.reshape(LinkShape(args.gbit_per_second, args.rtt_ms / 1e3))
            # Engine and planner learn before anything counts.
            for prefix in range(args.prefixes):
                served.first_token(hits.another(title_of(prefix)), "fetch")
                served.first_token(misses.another(f"Preface {prefix}. "), "auto")
            for number in range(args.rounds):
                miss_times = arrivals(
                    f"misses {args.seed} {number}", num=args.requests, interval=args.interval
                )
                hit_times = arrivals(
                    f"hits {args.seed} {number}",
                    num=int(miss_times[-1] / args.hit_interval),
                    interval=args.hit_interval,
                )
                for name in ("mixed", "alone") if number % 2 else ("alone", "mixed"):
                    found = asyncio.run(
                        load(
                            served,
                            misses,
                            hits,
                            hit_times=hit_times if name == "mixed" else [],
                            miss_times=miss_times,
                            num_prefixes=args.prefixes,
                        )
                    )
                    for kind, results in found.items():
                        arms[name][kind] += results
                    if name == "mixed":
                        most = max(most, most_at_once(hit_times, [s for s, _ in found["hit"]]))
                    served.settle()
                talk(f"round {number + 1} of {args.rounds}")
    for _, report in arms["mixed"]["hit"]:
        if report["hit_tokens"] < args.hit_tokens // 256 * 256:
            raise SystemExit(f"a hit was none: {report}")
    for arm in arms.values():
        for _, report in arm["miss"]:
            if report["reason"] != "not_stored" or "lookup" not in report["stages_ms"]:
                raise SystemExit(f"a miss did not look the store up, or found something: {report}")
    times = {name: [s for s, _ in arm["miss"]] for name, arm in arms.items()}
    ratio = median(times["mixed"]) / median(times["alone"])
    report = {
        "benchmark": "mixed",
        "gbit_per_second": args.gbit_per_second,
        "rtt_ms": args.rtt_ms,
        "hit_tokens": args.hit_tokens,
        "miss_tokens": args.miss_tokens,
        "interval_seconds": args.interval,
        "hit_interval_seconds": args.hit_interval,
        "arrivals": f"Poisson, seed {args.seed}, the same in both arms",
        "prefixes": args.prefixes,
        "most_hits_in_flight": most,
        "seconds_in_all": round(time.time() - started),
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
