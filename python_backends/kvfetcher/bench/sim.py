"""`kvfetcher bench sim`: picture sizes against bandwidth traces, with the planner of the fetcher.

What is simulated is the link and the decoders (`bench.simulate`); what decides is the code that
serves requests: `LinkEstimator`, `UnitWalk`, `decide`, `reconsider`. Policies compared, each over the
same traces, prompts and start times:

fixed SIZE   every unit in one picture size
nominal      one size, chosen once by the paper's rule for the trace's mean bandwidth
previous     the paper's rule: the bandwidth of the chunk before picks the next chunk's size, so that
             its transfer and its decoding take most nearly the same time
ours         `UnitWalk`, unit by unit, from all five picture sizes; from two of them; from the five
             and an uncompressed copy
gated        ours, with the gate: computing what is not worth fetching

Picture sizes are whole layer groups of one chunk side by side in a picture. Their bits were measured
with the project's codec, decode times on an H100 (`decode_times.H100_NVDEC`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvfetcher import __version__
from kvfetcher.bench.simulate import Limits, Outcome, SimUnit, simulate
from kvfetcher.bench.traces import GBIT, all_traces
from kvfetcher.fetch.bandwidth import LinkEstimator
from kvfetcher.fetch.decode_times import H100_NVDEC, picture_load
from kvfetcher.fetch.gate import Prompt, decide, reconsider
from kvfetcher.fetch.pipeline import Machine, finish_times
from kvfetcher.fetch.variants import UnitOption, UnitWalk
from kvfetcher.prefill_rate import PrefillModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kvfetcher.bench.simulate import Policy
    from kvfetcher.bench.traces import Trace
    from kvfetcher.fetch.bandwidth import LinkEstimate
    from kvfetcher.fetch.decode_times import DecodeTable
    from kvfetcher.fetch.variants import ChunkOptions

CHUNK_TOKENS = 256
HYSTERESIS = 0.1
GIVE_UP_MARGIN = 0.05
HALF_LIFE_SECONDS = 1.0
GATE_MARGIN = 0.1
PROBE_AGE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class PictureSize:
    """One variant of the simulated chunks, as measured."""

    name: str
    layers: int
    """Of a unit."""
    bits_per_element: float
    """Of a unit, all side data included."""
    video_bits_per_sample: float
    samples_per_element: float
    """Below 1: components that are nearly always zero are not in the picture."""


# Profile balanced, chunks of 256 tokens, SmolLM2-135M with 5 layer groups of 2304 channels, in pictures
# of 1, 2, 3 and 5 groups (tests/benchmarks/results/frame_sizes.json): sizes differ by 0.4 %. A
# layer of an 8B or 70B model has 2048 channels, so a group stands for a layer of it here; 4, 8 and 19
# layers have the bits of 3, 5 and 5 groups. 19 layers fill NVDEC's largest picture, 8192 lines.
# `raw` is the uncompressed copy that codec.raw_copy stores beside them.
PICTURE_SIZES = (
    PictureSize("small", 1, 1.8001, 2.978, 0.603),
    PictureSize("medium", 2, 1.8033, 2.987, 0.603),
    PictureSize("large", 4, 1.8014, 2.985, 0.603),
    PictureSize("huge", 8, 1.8065, 2.993, 0.603),
    PictureSize("largest", 19, 1.8065, 2.993, 0.603),
    PictureSize("raw", 4, 16.0, 0.0, 0.0),
)
DEFAULT_SIZE = "small"
"""One layer of 2048 channels per picture: what `exact` stores where no sizes are asked for. (A
calibration with 4096 values per layer group stores `medium` then.)"""
TWO_SIZES = ("large", "largest")
"""A pair that is about as good as all five, at two fifths of the storage."""
RAW = "raw"
OURS_TWO = "ours, two sizes"
OURS_WITH_RAW = "ours, with raw"


@dataclass(frozen=True, slots=True)
class Shape:
    """A model that is served."""

    name: str
    num_layers: int
    elements_per_layer_token: int
    prefill: PrefillModel


# Prefill: Hugging Face Llama code, bf16, H100, 30k / 22k / 17k and 3.8k / 3.1k / 2.6k tokens/s at
# 8k / 32k / 64k tokens; the model is the line through the first two.
SHAPES = (
    Shape("8B", 32, 2048, PrefillModel(2.93e-5, 1.0e-9)),
    Shape("70B", 80, 2048, PrefillModel(2.43e-4, 4.9e-9)),
)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt whose prefix is stored."""

    shape: Shape
    prefix_tokens: int
    suffix_tokens: int = 256

    @property
    def num_chunks(self) -> int:
        return self.prefix_tokens // CHUNK_TOKENS

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.prefix_tokens + self.suffix_tokens, CHUNK_TOKENS, self.shape.prefill)


REQUESTS = (
    Request(SHAPES[0], 2048),
    Request(SHAPES[0], 8192),
    Request(SHAPES[0], 32768),
    Request(SHAPES[1], 8192),
)
LIMITS = Limits(
    rtt_seconds=1e-3, max_transfers=8, transfer_bytes=1 << 20, max_waiting_bytes=64 << 20
)


PLANNED = ("nominal", "previous", "ours", OURS_TWO, "gated", OURS_WITH_RAW)
"""Policies that are not one size for all traces."""


class WalkPolicy:
    """The fetcher's own planner: `UnitWalk`, and the gate where it is asked for."""

    def __init__(self, library: Library, request: Request, *, sizes: Sequence[str]) -> None:
        self._library = library
        chunk = library.chunk(request.shape, sizes)
        self._walk = UnitWalk([chunk] * request.num_chunks, hysteresis=HYSTERESIS)

    def next(self, *, link: LinkEstimate, machine: Machine) -> SimUnit | None:
        step = self._walk.next(link=link, machine=machine)
        return None if step is None else self._library.unit(*step)

    def transfer_done(self, unit: SimUnit, started: float, finished: float) -> None:
        pass

    def num_wanted(self, num_ready: int, now: float, machine: Machine) -> int:
        return self._walk.num_chunks


class GatedPolicy(WalkPolicy):
    """`WalkPolicy` that stops where computing is predicted to be faster."""

    def __init__(
        self, library: Library, request: Request, estimator: LinkEstimator, *, start: float
    ) -> None:
        super().__init__(library, request, sizes=library.pictures)
        self._estimator, self._start = estimator, start
        self._prompt = request.prompt
        link = estimator.estimate(start)
        finish = finish_times(self._walk.costs(), link=link, machine=library.idle_machine())
        self.decision = decide(
            finish,
            self._prompt,
            margin=GATE_MARGIN,
            optimistic_seconds=finish_times(
                self._walk.costs(), link=link.at_best(), machine=library.idle_machine()
            )
            if link.age_seconds > PROBE_AGE_SECONDS
            else (),
        )
        self._wanted = self.decision.num_chunks
        self._walk.truncate(self._wanted)

    def num_wanted(self, num_ready: int, now: float, machine: Machine) -> int:
        if num_ready >= self._wanted:
            return num_ready
        if now - self._start > self.decision.deadline_seconds:
            self._wanted = num_ready
            return num_ready
        remaining = finish_times(
            self._walk.costs(num_ready), link=self._estimator.estimate(now), machine=machine
        )
        self._wanted = reconsider(
            remaining,
            self._prompt,
            num_ready=num_ready,
            num_wanted=self._wanted,
            margin=GIVE_UP_MARGIN,
        )
        self._walk.truncate(self._wanted)
        return self._wanted


class PreviousChunkPolicy:
    """The paper's rule: the next chunk's size from the bandwidth of the chunk before."""

    def __init__(self, library: Library, request: Request) -> None:
        self._library = library
        self._options = {name: library.chunk(request.shape, (name,)) for name in library.pictures}
        self._shape, self._num_chunks = request.shape, request.num_chunks
        self._chunk = 0
        self._queue: list[UnitOption] = []
        self._spans: dict[int, tuple[float, float, int]] = {}
        self._rate: float | None = None

    def next(self, *, link: LinkEstimate, machine: Machine) -> SimUnit | None:
        if not self._queue:
            if self._chunk == self._num_chunks:
                return None
            self._queue = list(self._options[self._choose()])
            self._chunk += 1
        return self._library.unit(self._chunk - 1, self._queue.pop(0))

    def transfer_done(self, unit: SimUnit, started: float, finished: float) -> None:
        first, _, size = self._spans.get(unit.chunk, (started, 0.0, 0))
        size += unit.option.num_bytes
        self._spans[unit.chunk] = (min(first, started), finished, size)
        # A chunk is measured when the last of its bytes has arrived.
        total = sum(option.num_bytes for option in self._options[unit.option.variant])
        if size == total:
            self._rate = size / (finished - min(first, started))

    def num_wanted(self, num_ready: int, now: float, machine: Machine) -> int:
        return self._num_chunks

    def _choose(self) -> str:
        if self._rate is None:
            return self._library.pictures[0]
        return self._library.matching_size(self._shape, bytes_per_second=self._rate)


class Library:
    """The stored chunks of every shape in every size, with their costs on one machine."""

    def __init__(self, table: DecodeTable, sizes: Sequence[PictureSize]) -> None:
        self._table = table
        self._sizes = {size.name: size for size in sizes}
        self._chunks: dict[tuple[str, tuple[str, ...]], ChunkOptions] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sizes)

    @property
    def pictures(self) -> tuple[str, ...]:
        """The sizes that are video."""
        return tuple(name for name in self._sizes if name != RAW)

    def idle_machine(self) -> Machine:
        return Machine(num_decoders=self._table.num_decoders)

    def chunk(self, shape: Shape, sizes: Sequence[str]) -> ChunkOptions:
        key = (shape.name, tuple(sizes))
        if key not in self._chunks:
            self._chunks[key] = tuple(
                self._option(shape, self._sizes[name], start)
                for name in sizes
                for start in range(0, shape.num_layers, self._sizes[name].layers)
            )
        return self._chunks[key]

    def matching_size(self, shape: Shape, *, bytes_per_second: float) -> str:
        """The paper's look-up: transfer and decoding of a chunk take most nearly the same time."""

        def bubble(name: str) -> float:
            options = self.chunk(shape, (name,))
            transfer = sum(option.num_bytes for option in options) / bytes_per_second
            decode = sum(option.decode_seconds for option in options) / self._table.num_decoders
            return abs(transfer - decode)

        return min(self.pictures, key=bubble)

    def unit(self, chunk: int, option: UnitOption) -> SimUnit:
        """The unit as the simulated decoder sees it."""
        size = self._sizes[option.variant]
        elements = option.restore_seconds * self._table.restore_elements_per_second
        pictures = 0 if size.name == RAW else 1
        return SimUnit(chunk, option, self._load(size, elements), pictures)

    def _option(self, shape: Shape, size: PictureSize, start: int) -> UnitOption:
        layers = min(size.layers, shape.num_layers - start)
        elements = layers * shape.elements_per_layer_token * CHUNK_TOKENS
        load = self._load(size, elements)
        busy = self._table.picture_seconds(load, num_busy=self._table.num_decoders)
        latency = self._table.latency_seconds(load)
        if size.name == RAW:
            busy = latency = 0.0
        return UnitOption(
            variant=size.name,
            layer_start=start,
            num_layers=layers,
            num_bytes=round(elements * size.bits_per_element / 8),
            decode_seconds=busy,
            latency_seconds=latency,
            restore_seconds=self._table.restore_seconds(elements),
        )

    @staticmethod
    def _load(size: PictureSize, elements: float) -> float:
        samples = elements * size.samples_per_element
        return picture_load(samples, samples * size.video_bits_per_sample)


SPACING_SECONDS = 7.37
"""Between the starts of requests; longer than nearly every fetch."""


def fixed_name(size: str) -> str:
    """Name of the policy that always takes one size."""
    return f"fixed {size}"


def run_trace(
    trace: Trace, library: Library, table: DecodeTable, requests: Sequence[Request]
) -> dict[str, list[Run]]:
    """Requests one after the other under all policies; every policy sees them at the same times."""
    policies = [*(fixed_name(name) for name in library.names), *PLANNED]
    return {name: list(_run_policy(name, trace, library, table, requests)) for name in policies}


@dataclass(frozen=True, slots=True)
class Run:
    """One simulated request."""

    request: Request
    ttft_seconds: float
    compute_seconds: float
    """If everything were computed."""
    outcome: Outcome


def _run_policy(
    name: str, trace: Trace, library: Library, table: DecodeTable, requests: Sequence[Request]
) -> Iterator[Run]:
    estimator = LinkEstimator(
        prior_bytes_per_second=8 * GBIT,
        prior_rtt_seconds=LIMITS.rtt_seconds,
        half_life_seconds=HALF_LIFE_SECONDS,
    )
    for index, request in enumerate(requests):
        # A moment after a piece of the trace begins, whatever the rounding.
        start = SPACING_SECONDS * index + 1e-6
        outcome = Outcome()
        policy: Policy
        if name == "previous":
            policy = PreviousChunkPolicy(library, request)
        elif name == "gated":
            policy = GatedPolicy(library, request, estimator, start=start)
        else:
            policy = WalkPolicy(library, request, sizes=_sizes(name, library, request, trace))
        wanted = policy.num_wanted(0, start, library.idle_machine())
        if wanted:
            outcome = simulate(
                policy,
                trace,
                table,
                estimator,
                LIMITS,
                start=start,
                num_chunks=wanted,
                num_layers=request.shape.num_layers,
            )
        prompt = request.prompt
        yield Run(
            request,
            outcome.fetch_seconds + prompt.compute_seconds(outcome.num_chunks),
            prompt.compute_seconds(0),
            outcome,
        )


def _sizes(policy: str, library: Library, request: Request, trace: Trace) -> tuple[str, ...]:
    """The sizes that a policy may choose from."""
    if policy == "ours":
        return library.pictures
    if policy == OURS_TWO:
        return TWO_SIZES
    if policy == OURS_WITH_RAW:
        return library.names
    if policy == "nominal":
        rate = trace.mean_bytes_per_second
        return (library.matching_size(request.shape, bytes_per_second=rate),)
    return (policy.removeprefix("fixed "),)


def _mean_ttft(runs: Iterable[Run]) -> float:
    return statistics.fmean(run.ttft_seconds for run in runs)


def trace_row(trace: Trace, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """JSON of one trace."""
    means = {name: _mean_ttft(found) for name, found in runs.items()}
    fixed = {name: mean for name, mean in means.items() if name.startswith("fixed ")}
    best_of_all = min(fixed, key=lambda name: fixed[name])
    del fixed[fixed_name(RAW)]
    best = min(fixed, key=lambda name: fixed[name])
    return {
        "trace": trace.name,
        "family": trace.family,
        "mean_gbit_per_second": trace.mean_bytes_per_second / GBIT,
        "best_fixed": best,
        "loss_vs_best_fixed": means["ours"] / means[best] - 1,
        "loss_by_prompt": _loss_by_prompt(runs),
        "two_sizes_loss_vs_best_fixed": means[OURS_TWO] / means[best] - 1,
        "best_fixed_with_raw": best_of_all,
        "with_raw_loss_vs_best_fixed": means[OURS_WITH_RAW] / means[best_of_all] - 1,
        "worst_gated_over_compute": max(
            run.ttft_seconds / run.compute_seconds for run in runs["gated"]
        ),
        "policies": {
            name: {
                "mean_ttft_seconds": means[name],
                "mean_network_bubble_seconds": statistics.fmean(
                    run.outcome.network_bubble_seconds for run in found
                ),
                "mean_decoder_bubble_seconds": statistics.fmean(
                    run.outcome.decoder_bubble_seconds for run in found
                ),
                "units": _sum_counts(run.outcome.variants for run in found),
            }
            for name, found in runs.items()
        },
    }


def _loss_by_prompt(runs: dict[str, list[Run]]) -> dict[str, float]:
    """`loss_vs_best_fixed` of each prompt by itself: the best size may differ between prompts."""
    losses = {}
    for request in dict.fromkeys(found.request for found in runs["ours"]):
        means = {
            name: _mean_ttft(r for r in found if r.request == request)
            for name, found in runs.items()
        }
        best = min(m for name, m in means.items() if name.startswith("fixed ") and RAW not in name)
        losses[f"{request.shape.name} {request.prefix_tokens}"] = means["ours"] / best - 1
    return losses


def _sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for found in counts:
        for name, number in found.items():
            total[name] = total.get(name, 0) + number
    return total


def run(
    traces: Sequence[Trace],
    requests: Sequence[Request],
    *,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The benchmark as JSON-ready data.

    Args:
        traces: of the link; at least one of family ``jitter``.
        requests: one after the other on each trace.
        say: gets a line per trace.
    """
    library = Library(H100_NVDEC, PICTURE_SIZES)
    rows: list[dict[str, Any]] = []
    jitter: dict[str, list[Run]] = {}
    for trace in traces:
        runs = run_trace(trace, library, H100_NVDEC, requests)
        rows.append(trace_row(trace, runs))
        say(format_row(rows[-1]))
        if trace.family == "jitter":
            for name, found in runs.items():
                jitter.setdefault(name, []).extend(found)
    means = {name: _mean_ttft(found) for name, found in jitter.items()}
    gains = {name: 1 - means["ours"] / mean for name, mean in means.items()}
    fixed = {name: gains[fixed_name(name)] for name in library.pictures}
    best_of_all = min(means[fixed_name(name)] for name in library.names)
    bytes_of_small = PICTURE_SIZES[0].bits_per_element
    return {
        "jitter_gain_vs_fixed": gains[fixed_name(DEFAULT_SIZE)],
        "jitter_gain_vs_fixed_is_against": (
            f"{fixed_name(DEFAULT_SIZE)}: one layer of 2048 channels per picture, what profile exact"
            " stores where codec.frame_sizes names no sizes; mean time to first token over all"
            " jitter traces and requests. Against larger fixed sizes the gain is smaller, see"
            " jitter_gain_vs_each_fixed: sizes cost nearly the same bits, and NVDEC decodes larger"
            " pictures faster up to about 3000 lines, so that a large fixed size is nearly best"
        ),
        "jitter_gain_vs_each_fixed": fixed,
        "jitter_gain_vs_best_fixed": min(fixed.values()),
        "jitter_gain_with_raw_vs_best_fixed": 1 - means[OURS_WITH_RAW] / best_of_all,
        "jitter_gain_vs_nominal_fixed": gains["nominal"],
        "jitter_gain_vs_previous_chunk_rule": gains["previous"],
        "worst_loss_vs_best_fixed": max(row["loss_vs_best_fixed"] for row in rows),
        "worst_loss_vs_best_fixed_of_one_prompt": max(
            max(row["loss_by_prompt"].values()) for row in rows
        ),
        "two_sizes_worst_loss_vs_best_fixed": max(
            row["two_sizes_loss_vs_best_fixed"] for row in rows
        ),
        "with_raw_worst_loss_vs_best_fixed": max(
            row["with_raw_loss_vs_best_fixed"] for row in rows
        ),
        "stored_bytes_over_one_size": {
            name: sum(s.bits_per_element for s in PICTURE_SIZES if s.name in sizes) / bytes_of_small
            for name, sizes in (
                ("ours", library.pictures),
                (OURS_TWO, TWO_SIZES),
                (OURS_WITH_RAW, library.names),
            )
        },
        "traces": rows,
        "sizes": [asdict(size) for size in PICTURE_SIZES],
        "requests": [
            {"shape": r.shape.name, "prefix_tokens": r.prefix_tokens, "suffix": r.suffix_tokens}
            for r in requests
        ],
        "limits": asdict(LIMITS),
        "decode_table": {"device": H100_NVDEC.device, "source": H100_NVDEC.source},
        "kvfetcher": __version__,
    }


def format_row(row: dict[str, Any]) -> str:
    """One line of the table as text."""
    times = " ".join(
        f"{name.removeprefix('fixed ')} {found['mean_ttft_seconds']:.3f}"
        for name, found in row["policies"].items()
    )
    return f"{row['trace']:46} {times}  {100 * row['loss_vs_best_fixed']:+.1f} %"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="kvfetcher bench sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="of each shape of jitter")
    parser.add_argument("--rounds", type=int, default=2, help="times that each request comes")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of the table")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.rounds < 1:
        parser.error("--seeds and --rounds are at least 1")

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    report = run(all_traces(seeds=args.seeds), REQUESTS * args.rounds, say=say)
    report["command"] = f"kvfetcher bench sim --json --seeds {args.seeds} --rounds {args.rounds}"
    if args.json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
        return 0
    shares = {name: value for name, value in report.items() if isinstance(value, float)}
    for name, value in shares.items():
        sys.stdout.write(f"{name} {100 * value:+.1f} %\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
