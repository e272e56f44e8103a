"""Time to first token over a link of an asked-for rate: computing, raw KV, and ours.

    PYTHONPATH=tests python tests/benchmarks/bench_fetch.py --output results/fetch.json

A real tritonserver on this machine's CPU, a real Redis behind a shaped link. Four arms take turns in
every round:

    compute  kv_policy=no_store: the whole prompt is computed
    raw      profile `raw`, kv_policy=fetch: the same prefix as plain bf16, the same pipeline
    coded    the profile under test without its raw copy, kv_policy=fetch: no gate
    ours     the profile under test with raw copies, kv_policy=auto: gate and choice of variant

Every prompt has the same stored prefix and a question of its own, so the store is never asked for
more than the prefix. Before a number counts, all arms must have answered with the same first token
(profile `exact`) and the fetching ones must have hit all of the prefix.

Then the crossovers, each with a sweep of rates of its own (`--crossovers`): where fetching coded
becomes as fast as computing, and where raw becomes as fast as coded. Measured is where the arms'
medians cross, between the two rates beside it on a line in the logarithms; predicted is where what
the planner said of the same requests crosses (`kv_report.gate`: fetching everything, against
computing, or raw against coded).
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

from fetch_rig import Prompts, Served, machine, serving, spread, store_behind_link, talk, write

from support.shaping import LinkShape

ARMS = ("compute", "raw", "coded", "ours")
MARGIN = 0.05
CROSSOVER_BOUND = 1.5
"""Predicted and measured crossovers differ by less than this factor."""
MAX_LEARNING = 12
STEADY = 1.25


@dataclass(slots=True)
class Arm:
    """One way to answer, and what it took."""

    name: str
    served: Served
    policy: str
    salt: str
    seconds: list[float] = field(default_factory=list)
    reports: list[dict] = field(default_factory=list)

    def ask(self, prompt: str, *, counts: bool) -> int:
        """The first token of the answer."""
        answer = self.served.first_token(prompt, self.policy, cache_salt=self.salt)
        if counts:
            self.seconds.append(answer.time_to_first_token_seconds)
            self.reports.append(dict(answer.report.raw))
        self.served.settle()
        return answer.output_ids[0]


def learn(arms: list[Arm], prompts: Prompts) -> int:
    """Warm up over a new shape of the link; requests until ours decides and estimates steadily."""
    for arm in arms:
        if arm.name in ("raw", "coded"):
            arm.ask(prompts.another(), counts=False)
    ours = arms[-1]
    decisions: list[tuple[object, ...]] = []
    rates: list[float] = [0.0, 0.0]
    while len(decisions) < MAX_LEARNING:
        ours.ask(prompts.another(), counts=True)
        report = ours.reports[-1]
        gate = report.get("gate") or {}
        decisions.append((gate.get("chunks_wanted"), tuple(sorted(report.get("variants", {})))))
        talk(f"    learning: {gate.get('gbit_per_second')} Gbit/s, {decisions[-1]}")
        rates.append(gate.get("gbit_per_second") or 0.0)
        if len(set(decisions[-3:])) == 1 and max(rates[-3:]) < STEADY * min(rates[-3:]):
            break
    ours.seconds, ours.reports = [], []
    return len(decisions)


def measure(
    arms: list[Arm], prompts: Prompts, link, shape: LinkShape, *, rounds: int, is_exact: bool
) -> dict[str, object]:
    """All arms over one shape of the link, in turns."""
    for arm in arms:
        arm.seconds, arm.reports = [], []
    link.reshape(shape)
    learnt_after = learn(arms, prompts)
    for number in range(rounds):
        prompt = prompts.another()
        turn = arms[number % len(arms) :] + arms[: number % len(arms)]
        tokens = {arm.name: arm.ask(prompt, counts=True) for arm in turn}
        if is_exact and len(set(tokens.values())) > 1:
            raise SystemExit(f"the arms answer differently: {tokens}")
    row: dict[str, object] = {
        "gbit_per_second": shape.gbit_per_second,
        "rtt_ms": shape.rtt_seconds * 1e3,
        "requests_until_learnt": learnt_after,
    }
    for arm in arms:
        row[arm.name] = spread(arm.seconds) | {
            "hit_tokens": [r["hit_tokens"] for r in arm.reports],
            "bytes_fetched": [r["bytes_fetched"] for r in arm.reports],
            "variants": arm.reports[-1].get("variants", {}),
            "reason": arm.reports[-1]["reason"],
        }
    row["decisions"] = [report.get("gate") for report in arms[-1].reports]
    medians = {arm.name: row[arm.name]["median_seconds"] for arm in arms}
    others = min(v for name, v in medians.items() if name != "ours")
    row["ours_over_best_other"] = round(medians["ours"] / others, 4)
    talk(
        f"{shape.gbit_per_second:5g} Gbit/s "
        + "  ".join(f"{name} {seconds:.3f} s" for name, seconds in medians.items())
        + f"  ours/best {row['ours_over_best_other']:.3f}"
    )
    return row


def crossing(rates: list[float], first: list[float], second: list[float]) -> float | None:
    """The rate at which two curves cross; None where they do not.

    Args:
        rates: increasing.
        first: seconds at each rate.
        second: likewise.
    """
    ahead = [math.log(a / b) for a, b in zip(first, second, strict=True)]
    points = zip((math.log(rate) for rate in rates), ahead, strict=True)
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 == 0 or y0 * y1 < 0:
            return math.exp(x0 + (x1 - x0) * y0 / (y0 - y1))
    return rates[-1] if ahead[-1] == 0 else None


def predicted_seconds(arm: Arm, *, is_computed: bool = False) -> float:
    """What the planner said of an arm's requests: of computing, or of fetching everything."""
    gates = [report["gate"] for report in arm.reports]
    name = "predicted_compute_ms" if is_computed else "predicted_all_fetch_ms"
    return median(gate[name] for gate in gates) / 1e3


def rest_seconds(arm: Arm) -> float:
    """What the planner said of computing what follows the prefix, of an arm that fetches it all."""
    gates = [report["gate"] for report in arm.reports]
    return median(g["predicted_with_fetch_ms"] - g["predicted_fetch_ms"] for g in gates) / 1e3


def sweep(
    arms: list[Arm], prompts: Prompts, link, shapes: list[LinkShape], pair: str, *, rounds: int
) -> dict[str, object]:
    """Where two arms cross, measured and predicted."""
    by_name = {arm.name: arm for arm in arms}
    slow, quick = (by_name[name] for name in pair.split("/"))
    ours, coded = by_name["ours"], by_name["coded"]
    turn = list({arm.name: arm for arm in (slow, quick, coded, ours)}.values())
    points = []
    for shape in shapes:
        for arm in arms:
            arm.seconds, arm.reports = [], []
        link.reshape(shape)
        learn(arms, prompts)
        for number in range(rounds):
            prompt = prompts.another()
            for arm in turn[number % len(turn) :] + turn[: number % len(turn)]:
                arm.ask(prompt, counts=True)
        if slow.name == "compute":
            said = predicted_seconds(ours, is_computed=True), predicted_seconds(ours)
            said = said[0], said[1] + rest_seconds(coded)
        else:
            said = predicted_seconds(slow), predicted_seconds(quick)
        points.append(
            {
                "gbit_per_second": shape.gbit_per_second,
                "measured_seconds": [round(median(arm.seconds), 4) for arm in (slow, quick)],
                "predicted_seconds": [round(seconds, 4) for seconds in said],
                "runs": {arm.name: [round(s, 4) for s in arm.seconds] for arm in turn},
                "ours_fetched": sum(r["chunks_hit"] > 0 for r in ours.reports),
                "gates": [report.get("gate") for report in ours.reports],
            }
        )
        talk(f"  {pair} {shape.gbit_per_second:g} Gbit/s: {points[-1]}"[:200])
    rates = [shape.gbit_per_second for shape in shapes]
    found: dict[str, object] = {"pair": pair, "rates": rates}
    for kind in ("measured", "predicted"):
        curves = zip(*(point[f"{kind}_seconds"] for point in points), strict=True)
        rate = crossing(rates, *map(list, curves))
        found[f"{kind}_gbit_per_second"] = None if rate is None else round(rate, 4)
    measured, predicted = (found[f"{k}_gbit_per_second"] for k in ("measured", "predicted"))
    ratio = predicted / measured if measured and predicted else None
    found["predicted_over_measured"] = None if ratio is None else round(ratio, 3)
    found["points"] = points
    talk(f"{pair}: measured {measured}, predicted {predicted} Gbit/s, ratio {ratio}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--tokens", type=int, default=1536, help="of the shared prefix")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rates", default="0.02,0.05,0.1,0.5,1,5", help="Gbit/s, by commas")
    parser.add_argument(
        "--crossovers",
        nargs="*",
        default=[],
        metavar="PAIR=RATES",
        help="compute/coded=0.025,0.035,0.05,0.07,0.1 coded/raw=0.3,0.5,0.8,1.3,2",
    )
    parser.add_argument("--crossover-rounds", type=int, default=3)
    parser.add_argument("--rtt-ms", type=float, default=2.0)
    parser.add_argument("--profile", default="exact")
    parser.add_argument("--calibration", default="", help="for near, balanced, compact, tiny")
    args = parser.parse_args()
    for pair, _, _ in (text.partition("=") for text in args.crossovers):
        if pair not in ("compute/coded", "coded/raw"):
            parser.error(f"--crossovers knows compute/coded and coded/raw, got {pair!r}")

    def shapes(rates: str) -> list[LinkShape]:
        return [
            LinkShape(gbit_per_second=float(rate), rtt_seconds=args.rtt_ms / 1e3)
            for rate in rates.split(",")
            if rate
        ]

    codec = {"profile": args.profile, "calibration": args.calibration}
    # Without these, a slow fetch is given up for reasons other than the gate's.
    patient = {"fetch": {"deadline_seconds": 120.0}}
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as stack:
        _, link = stack.enter_context(store_behind_link(Path(folder)))
        raw = stack.enter_context(serving(link, codec={"profile": "raw"}, **patient))
        ours = stack.enter_context(serving(link, codec={**codec, "raw_copy": True}, **patient))
        coded = stack.enter_context(serving(link, codec=codec, **patient))
        arms = [
            Arm("compute", ours, "no_store", ""),
            Arm("raw", raw, "fetch", ""),
            # A salt of its own: chunks of `exact` have one identity with and without raw copies.
            Arm("coded", coded, "fetch", "coded"),
            Arm("ours", ours, "auto", ""),
        ]
        prompts = Prompts(ours.config, args.tokens)
        for arm in arms:
            if arm.name != "compute":
                arm.ask(prompts.another(), counts=False)  # a miss, saved
                talk(f"prefix saved for {arm.name}")
        rows = [
            measure(
                arms, prompts, link, shape, rounds=args.rounds, is_exact=args.profile == "exact"
            )
            for shape in shapes(args.rates)
        ]
        crossovers = [
            sweep(arms, prompts, link, shapes(rates), pair, rounds=args.crossover_rounds)
            for pair, _, rates in (text.partition("=") for text in args.crossovers)
        ]
    worst = max((row["ours_over_best_other"] for row in rows), default=0.0)
    report = {
        "benchmark": "fetch",
        "profile": args.profile,
        "prefix_tokens": args.tokens,
        "rounds": args.rounds,
        "seconds_in_all": round(time.time() - started),
        "machine": machine(),
        "worst_ours_over_best_other": worst,
        "rows": rows,
        "crossover_bound": CROSSOVER_BOUND,
        "crossovers": crossovers,
    }
    write(args.output, report)
    for found in crossovers:
        ratio = found["predicted_over_measured"]
        if ratio is None or not 1 / CROSSOVER_BOUND < ratio < CROSSOVER_BOUND:
            talk(
                f"{found['pair']}: the crossover is not where the planner said, or beyond the rates"
            )
            return 1
    if worst > 1 + MARGIN:
        talk(f"ours is up to {worst - 1:.1%} slower than the best of the others")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
