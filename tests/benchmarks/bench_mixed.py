"""Requests that hit nothing beside requests that fetch over a slow link: do they wait?

    PYTHONPATH=tests python tests/benchmarks/bench_mixed.py --output results/mixed.json

Open-loop load on a real tritonserver on this machine's CPU: Poisson arrivals from a seed, the same
in both arms, which take turns:

    mixed    requests that hit one of several prefixes, fetched over a slow link (kv_policy=fetch),
             several in flight at one time, beside the misses
    short    the same, but instead of each hit a prompt that is as long as what a hit leaves to
             compute, and that fetches nothing (kv_policy=no_store): what hits cost that need no
             fetching
    alone    the same misses at the same times, without the hits

A miss is longer than a chunk and looks the store up (kv_policy=auto), but nothing is saved: the
prefixes are stored by a server before, and the one that is measured saves nothing. What counts is
the median time to first token of the misses: at most 10 % more in `mixed` than in `alone`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median

from fetch_rig import (
    Prompts,
    Served,
    cpu_seconds,
    machine,
    servers_first,
    serving,
    spread,
    store_behind_link,
    talk,
    write,
)

from kvfetcher_client import AsyncClient
from support.shaping import LinkShape

BOUND = 0.10
ARMS = ("alone", "short", "mixed")
CHUNK = 256


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
    served: Served, misses: list[tuple[float, str]], others: list[tuple[float, str]], policy: str
) -> dict[str, list]:
    """All requests of one arm, as (seconds, prompt); `policy` is of the others."""
    async with AsyncClient(served.server.grpc_url) as client:
        start = asyncio.get_running_loop().time() + 0.2
        tasks = [
            *(("other", one(client, prompt, policy, start + at)) for at, prompt in others),
            *(("miss", one(client, prompt, "auto", start + at)) for at, prompt in misses),
        ]
        results = await asyncio.gather(*(task for _, task in tasks))
    found: dict[str, list] = {"other": [], "miss": []}
    for (kind, _), result in zip(tasks, results, strict=True):
        found[kind].append(result)
    return found


def title_of(prefix: int) -> str:
    """What one of the stored prefixes begins with."""
    return f"Collection {prefix}. "


def computed(results: list[tuple[float, dict]]) -> float:
    """Prompt tokens that these requests' engine computed, mean."""
    return round(fmean(report["engine"]["computed_tokens"] for _, report in results), 1)


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
    parser.add_argument(
        "--around-nice",
        type=int,
        default=10,
        help="store, link and client yield the cores to the server, as other machines would"
        " (niceness of their session above its); 0 = they compete with it",
    )
    args = parser.parse_args()
    arms: dict[str, dict[str, list]] = {name: {"other": [], "miss": []} for name in ARMS}
    used: dict[str, Counter[str]] = {name: Counter() for name in ARMS}
    started = time.time()
    most = 0
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        servers_first(args.around_nice),
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
            # What a hit leaves to compute is its question.
            others = {"mixed": [hits], "short": [Prompts(served.config, 1)], "alone": []}
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
                # Each arm comes first, second and last in turns.
                for name in (*ARMS[number % 3 :], *ARMS[: number % 3]):
                    # A miss begins as nothing else does: nothing of it is stored.
                    arm_misses = [
                        (at, misses.another(f"Document {number} {name} {at}. "))
                        for at in miss_times
                    ]
                    arm_others = [
                        (at, of.another(title_of(i % args.prefixes)))
                        for of in others[name]
                        for i, at in enumerate(hit_times)
                    ]
                    before = cpu_seconds(served.server)
                    policy = "fetch" if name == "mixed" else "no_store"
                    found = asyncio.run(load(served, arm_misses, arm_others, policy))
                    served.settle()
                    used[name].update(cpu_seconds(served.server))
                    used[name].subtract(before)
                    for kind, results in found.items():
                        arms[name][kind] += results
                    if name == "mixed":
                        most = max(most, most_at_once(hit_times, [s for s, _ in found["other"]]))
                talk(f"round {number + 1} of {args.rounds}")
    for _, report in arms["mixed"]["other"]:
        if report["hit_tokens"] < args.hit_tokens // CHUNK * CHUNK:
            raise SystemExit(f"a hit was none: {report}")
    for arm in arms.values():
        for _, report in arm["miss"]:
            if report["reason"] != "not_stored" or "lookup" not in report["stages_ms"]:
                raise SystemExit(f"a miss did not look the store up, or found something: {report}")
    times = {name: [s for s, _ in arm["miss"]] for name, arm in arms.items()}
    medians = {name: median(seconds) for name, seconds in times.items()}
    ratio = medians["mixed"] / medians["alone"]
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
        "around_nice": args.around_nice,
        "most_hits_in_flight": most,
        "seconds_in_all": round(time.time() - started),
        "machine": machine(),
        "misses_mixed_over_alone": round(ratio, 4),
        "misses_short_over_alone": round(medians["short"] / medians["alone"], 4),
        **{f"misses_{name}": spread(seconds) for name, seconds in times.items()},
        "hits": spread([s for s, _ in arms["mixed"]["other"]]),
        "short_prompts": spread([s for s, _ in arms["short"]["other"]]),
        "computed_tokens": {
            "hits": computed(arms["mixed"]["other"]),
            "short_prompts": computed(arms["short"]["other"]),
        },
        "cpu_seconds": {
            name: {of: round(seconds, 2) for of, seconds in sorted(each.items()) if seconds > 0}
            for name, each in used.items()
        },
    }
    talk(
        f"misses: {medians['mixed']:.3f} s with hits ({ratio - 1:+.1%}), {medians['short']:.3f} s"
        f" with short prompts, {medians['alone']:.3f} s alone"
    )
    write(args.output, report)
    return 0 if ratio <= 1 + BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
