"""`kvfetcher bench sim`: picture sizes against bandwidth traces, with the fetcher itself.

What is simulated is the clock, the link and the decoders (`bench.simulate`); all that decides is
the code that serves requests, `fetch.Fetcher` with the settings that it has by default. Policies
compared, each over the same traces, prompts and start times:

fixed SIZE   every unit in one picture size: only that one is stored
nominal      one size, chosen once by the paper's rule for the trace's mean bandwidth
previous     the paper's rule: the bandwidth of the chunk before picks the next chunk's size, so that
             its transfer and its decoding take most nearly the same time
ours         `UnitWalk`, unit by unit, from all five picture sizes and the copy without video that
             `codec.packed_copy` stores; and from fewer: one picture size and that copy, the five
             sizes alone, two of them, the five and an uncompressed copy
gated        ours with kv_policy=auto: computing what is not worth fetching. All others fetch whatever
             it takes (kv_policy=fetch)
ideal        no policy: the link is never idle with the fewest bytes of all sizes, all decoders work
             on what has come at the quickest size's rate, and nothing else is waited for. No choice of
             sizes is faster

Picture sizes are whole layer groups of one chunk side by side in a picture. Their bits were measured
with the project's codec, decode times on an H100 (`decode_times.H100_NVDEC`).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from kvfetcher import __version__
from kvfetcher.bench.simulate import (
    CHUNK_TOKENS,
    Outcome,
    SimFetcher,
    SimPrompt,
    UnitWork,
    make_header,
    run_simulated,
)
from kvfetcher.bench.traces import GBIT, all_traces
from kvfetcher.config import FetchConfig
from kvfetcher.fetch.planning.decode_times import H100_NVDEC, picture_load
from kvfetcher.fetch.planning.gate import Prompt
from kvfetcher.fetch.planning.variants import UnitOption, UnitWalk, chunk_options
from kvfetcher.prefill_rate import PrefillModel
from kvfetcher.spec import PACKED_VARIANT, RAW_VARIANT, KVSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kvfetcher.bench.simulate import Walk
    from kvfetcher.bench.traces import Trace
    from kvfetcher.fetch.planning.bandwidth import LinkEstimate
    from kvfetcher.fetch.planning.decode_times import DecodeTable
    from kvfetcher.fetch.planning.pipeline import Machine
    from kvfetcher.fetch.planning.variants import ChunkOptions

_LAYER_CHANNELS = 2048
_SAMPLES_PER_PIXEL = 3  # 4:4:4


@dataclass(frozen=True, slots=True)
class PictureSize:
    """One variant of the simulated chunks, as measured."""

    name: str
    layers: int
    """Number of layers of a unit."""
    bits_per_element: float
    """Bits per element of a unit, all side data included."""
    video_bits_per_sample: float
    samples_per_element: float
    """Below 1: components that are nearly always zero are not in the picture."""

    @property
    def variant(self) -> str:
        """Its name in a chunk's table: the largest picture that holds its layers."""
        if self.name in COPIES:
            return COPIES[self.name]
        lines = self.layers * _LAYER_CHANNELS * self.samples_per_element / _SAMPLES_PER_PIXEL
        return f"1024x{math.ceil(lines / 16) * 16}"


# Profile balanced, chunks of 256 tokens, SmolLM2-135M with 3 layer groups of 3840 channels, in pictures
# of 405, 809, 1538 and 2252 lines (tests/benchmarks/results/frame_sizes_packed.json): sizes differ by
# 1 %. A layer of an 8B or 70B model has 2048 channels: so many layers have the bits of so many lines here
# as make the nearest picture; 19 layers would fill NVDEC's largest, 8192 lines. `packed` is what
# codec.packed_copy stores beside them, `raw` the uncompressed copy of codec.raw_copy.
PICTURE_SIZES = (
    PictureSize("small", 1, 1.6745, 2.514, 0.5875),
    PictureSize("medium", 2, 1.6582, 2.489, 0.5867),
    PictureSize("large", 4, 1.6578, 2.490, 0.5867),
    PictureSize("huge", 8, 1.6561, 2.490, 0.5865),
    PictureSize("largest", 16, 1.6561, 2.490, 0.5865),
    PictureSize("packed", 8, 2.1304, 0.0, 0.0),
    PictureSize("raw", 4, 16.0, 0.0, 0.0),
)
DEFAULT_SIZE = "largest"
"""Sixteen layers of 2048 channels per picture: what profiles with a calibration store of such a model
where `codec.frame_sizes` names no sizes (eight groups of 4096 values)."""
TWO_SIZES = ("large", "largest")
"""A pair that is about as good as all five, at two fifths of the storage."""
RAW = "raw"
PACKED = "packed"
COPIES = {RAW: RAW_VARIANT, PACKED: PACKED_VARIANT}
"""Names of sizes that are no video, and of their variants."""
OURS_SIZES = "ours, sizes alone"
OURS_TWO = "ours, two sizes"
OURS_ONE = "ours, one size and packed"
OURS_WITH_RAW = "ours, sizes and raw"


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
    Shape("8B", 32, _LAYER_CHANNELS, PrefillModel(2.93e-5, 1.0e-9)),
    Shape("70B", 80, _LAYER_CHANNELS, PrefillModel(2.43e-4, 4.9e-9)),
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
RTT_SECONDS = 1e-3
"""Round trip of the simulated link; what the fetcher expects is in `FetchConfig`."""

PLANNED = (
    *("nominal", "previous", "gated"),
    *("ours", OURS_ONE, OURS_SIZES, OURS_TWO, OURS_WITH_RAW),
)
"""Policies that are not one size for all traces."""


class PreviousChunkWalk(UnitWalk):
    """The paper's rule: the next chunk's size from the bandwidth of the chunk before."""

    def __init__(self, chunks: Sequence[ChunkOptions], table: DecodeTable) -> None:
        super().__init__(chunks, hysteresis=0.0)
        self._table = table
        self._spans: dict[int, tuple[float, float, int]] = {}
        self._variants: dict[int, str] = {}
        self._rate: float | None = None

    def next(self, *, link: LinkEstimate, machine: Machine) -> tuple[int, UnitOption] | None:
        if self._chunk >= len(self._chunks):
            return None
        index = self._chunk
        if self._layer == 0:
            self._variants[index] = self._choose(self._chunks[index])
        option = self._starting[index][self._layer][self._variants[index]]
        self._layer = option.layer_stop
        if self._layer == self._num_layers[index]:
            self._chunk, self._layer = index + 1, 0
        return index, option

    def arrived(self, chunk: int, num_bytes: int, started: float, finished: float) -> None:
        first, _, size = self._spans.get(chunk, (started, 0.0, 0))
        first, size = min(first, started), size + num_bytes
        self._spans[chunk] = (first, finished, size)
        # A chunk is measured when the last of its bytes has arrived.
        if size == self._totals[chunk][self._variants[chunk]].num_bytes:
            self._rate = size / (finished - first)

    def _choose(self, chunk: ChunkOptions) -> str:
        if self._rate is None:
            return chunk[0].variant
        return matching_size(chunk, self._table, bytes_per_second=self._rate)


def matching_size(chunk: ChunkOptions, table: DecodeTable, *, bytes_per_second: float) -> str:
    """The paper's look-up: the variant whose transfer and decoding take most nearly the same time."""

    def bubble(variant: str) -> float:
        options = [option for option in chunk if option.variant == variant]
        transfer = sum(option.num_bytes for option in options) / bytes_per_second
        decode = sum(option.decode_seconds for option in options) / table.num_decoders
        return abs(transfer - decode)

    return min(dict.fromkeys(option.variant for option in chunk), key=bubble)


class Library:
    """The stored chunks of every shape in every size."""

    def __init__(self, table: DecodeTable, sizes: Sequence[PictureSize]) -> None:
        self._table = table
        self._sizes = {size.name: size for size in sizes}
        self._prompts: dict[tuple[Request, tuple[str, ...]], SimPrompt] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sizes)

    @property
    def pictures(self) -> tuple[str, ...]:
        """The sizes that are video."""
        return tuple(name for name in self._sizes if name not in COPIES)

    @property
    def adaptive(self) -> tuple[str, ...]:
        """What `ours` chooses from."""
        return (*self.pictures, PACKED)

    def prompt(self, request: Request, sizes: Sequence[str]) -> SimPrompt:
        """A request whose prefix is stored in some sizes."""
        key = (request, tuple(sizes))
        if key not in self._prompts:
            self._prompts[key] = self._prompt(request, [self._sizes[name] for name in sizes])
        return self._prompts[key]

    def matching_size(self, request: Request, *, bytes_per_second: float) -> str:
        """See `matching_size`."""
        header = self.prompt(request, self.pictures).header
        options = chunk_options(header, self._table)
        return self.name_of(matching_size(options, self._table, bytes_per_second=bytes_per_second))

    def name_of(self, variant: str) -> str:
        """The size that is stored under the name of a variant."""
        return next(s.name for s in self._sizes.values() if s.variant == variant)

    def _prompt(self, request: Request, sizes: Sequence[PictureSize]) -> SimPrompt:
        shape = request.shape
        spec = KVSpec(shape.num_layers, shape.elements_per_layer_token // 256, 128)
        units: list[tuple[str, int, int, int]] = []
        works = []
        for size in sizes:
            for start in range(0, shape.num_layers, size.layers):
                layers = min(size.layers, shape.num_layers - start)
                elements = layers * shape.elements_per_layer_token * CHUNK_TOKENS
                num_bytes = round(elements * size.bits_per_element / 8)
                units.append((size.variant, start, layers, num_bytes))
                samples = elements * size.samples_per_element
                works.append(
                    UnitWork(
                        load=picture_load(samples, samples * size.video_bits_per_sample),
                        num_pictures=0 if size.name in COPIES else 1,
                        restore_seconds=self._table.restore_seconds_per_unit(elements),
                    )
                )
        header = make_header(spec, units)
        return SimPrompt(
            request.prefix_tokens,
            request.suffix_tokens,
            shape.prefill,
            header,
            {entry.offset: work for entry, work in zip(header.units, works, strict=True)},
        )


SPACING_SECONDS = 7.37
"""Between the starts of requests; longer than nearly every fetch."""


def fixed_name(size: str) -> str:
    """Name of the policy that always takes one size."""
    return f"fixed {size}"


def run_trace(
    trace: Trace, requests: Sequence[Request], *, num_together: int = 1
) -> dict[str, list[Run]]:
    """Requests one after the other under all policies; every policy sees them at the same times.

    Args:
        trace: trace of the link.
        requests: one after the other.
        num_together: number of prompts that come at one time.
    """
    library = Library(H100_NVDEC, PICTURE_SIZES)
    policies = [*(fixed_name(name) for name in library.names), *PLANNED]
    return {
        name: run_policy(name, trace, library, H100_NVDEC, requests, num_together=num_together)
        for name in policies
    }


def _map(
    work: Callable[[Trace], dict[str, list[Run]]], traces: Sequence[Trace], num_jobs: int
) -> Iterator[dict[str, list[Run]]]:
    if num_jobs == 1:
        yield from map(work, traces)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_jobs, mp_context=context) as pool:
        yield from pool.map(work, traces)


@dataclass(frozen=True, slots=True)
class Run:
    """One simulated request."""

    request: Request
    ttft_seconds: float
    compute_seconds: float
    """If everything were computed."""
    outcome: Outcome


def run_policy(
    name: str,
    trace: Trace,
    library: Library,
    table: DecodeTable,
    requests: Sequence[Request],
    *,
    num_together: int = 1,
) -> list[Run]:
    """Requests one after the other under one policy."""
    is_gated = name == "gated"
    # Without the gate a fetch goes on whatever it takes.
    config = FetchConfig() if is_gated else FetchConfig(deadline_seconds=3600.0)

    def rewalk(chunks: list[ChunkOptions]) -> Walk:
        return PreviousChunkWalk(chunks, table)

    async def serve() -> list[Run]:
        fetcher = SimFetcher(
            trace,
            table,
            config,
            rtt_seconds=RTT_SECONDS,
            rewalk=rewalk if name == "previous" else None,
        )
        runs: list[Run] = []
        for first in range(0, len(requests), num_together):
            burst = requests[first : first + num_together]
            outcomes = await fetcher.serve(
                [library.prompt(r, _sizes(name, library, r, trace)) for r in burst],
                at=_start(first // num_together),
                policy="auto" if is_gated else "fetch",
            )
            for request, outcome in zip(burst, outcomes, strict=True):
                prompt = request.prompt
                rest = prompt.compute_seconds(outcome.num_chunks)
                whole = prompt.compute_seconds(0)
                runs.append(Run(request, outcome.fetch_seconds + rest, whole, outcome))
        return runs

    return cast("list[Run]", run_simulated(serve))


def ideal_seconds(
    trace: Trace,
    library: Library,
    table: DecodeTable,
    request: Request,
    *,
    start: float,
    sizes: Sequence[str],
) -> float:
    """Time to first token that no choice of these picture sizes can undercut.

    At every moment what has not come yet is still to be decoded, by all decoders at once.
    """
    prompt = library.prompt(request, sizes)
    bytes_of: dict[str, int] = {}
    seconds_of: dict[str, float] = {}
    for entry in prompt.header.units:
        load = prompt.works[entry.offset].load
        busy = table.picture_seconds(load, num_busy=table.num_decoders)
        bytes_of[entry.variant] = bytes_of.get(entry.variant, 0) + entry.length
        seconds_of[entry.variant] = seconds_of.get(entry.variant, 0.0) + busy / table.num_decoders
    num_bytes = request.num_chunks * min(bytes_of.values())
    left = float(num_bytes)
    work = request.num_chunks * min(seconds_of.values())
    now, done = 0.0, work
    while True:
        rate, seconds = trace.at(start + now)
        if rate * seconds >= left:
            done = max(done, now + left / rate)
            return done + request.prompt.compute_seconds(request.num_chunks)
        left -= rate * seconds
        now += seconds
        done = max(done, now + work * left / num_bytes)


def _start(burst: int) -> float:
    """When requests come, on the trace's clock: a moment after a piece of it begins."""
    return SPACING_SECONDS * burst + 1e-6


def _sizes(policy: str, library: Library, request: Request, trace: Trace) -> tuple[str, ...]:
    """The sizes that a policy may choose from."""
    if policy in ("ours", "gated"):
        return library.adaptive
    if policy in (OURS_SIZES, "previous"):
        return library.pictures
    if policy == OURS_TWO:
        return TWO_SIZES
    if policy == OURS_ONE:
        return (DEFAULT_SIZE, PACKED)
    if policy == OURS_WITH_RAW:
        return (*library.pictures, RAW)
    if policy == "nominal":
        rate = trace.mean_bytes_per_second
        return (library.matching_size(request, bytes_per_second=rate),)
    return (policy.removeprefix("fixed "),)


def _mean_ttft(runs: Iterable[Run]) -> float:
    return statistics.fmean(run.ttft_seconds for run in runs)


def trace_row(trace: Trace, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """JSON of one trace."""
    means = {name: _mean_ttft(found) for name, found in runs.items()}
    pictures = [size.name for size in PICTURE_SIZES if size.name not in COPIES]

    def best_of(*names: str) -> str:
        return min(map(fixed_name, names), key=lambda name: means[name])

    best, best_size = best_of(*pictures, PACKED), best_of(*pictures)
    best_with_raw = best_of(*pictures, RAW)
    return {
        "trace": trace.name,
        "family": trace.family,
        "mean_gbit_per_second": trace.mean_bytes_per_second / GBIT,
        "best_fixed": best,
        "loss_vs_best_fixed": means["ours"] / means[best] - 1,
        "loss_by_prompt": _loss_by_prompt(runs),
        "one_size_loss_vs_best_fixed": means[OURS_ONE] / means[best_of(DEFAULT_SIZE, PACKED)] - 1,
        "best_fixed_size": best_size,
        "sizes_alone_loss_vs_best_fixed": means[OURS_SIZES] / means[best_size] - 1,
        "two_sizes_loss_vs_best_fixed": means[OURS_TWO] / means[best_size] - 1,
        "best_fixed_with_raw": best_with_raw,
        "with_raw_loss_vs_best_fixed": means[OURS_WITH_RAW] / means[best_with_raw] - 1,
        "worst_gated_over_compute": max(
            run.ttft_seconds / run.compute_seconds for run in runs["gated"]
        ),
        "gated_over_ungated": means["gated"] / means["ours"],
        "gated_over_better_of_both": means["gated"]
        / statistics.fmean(min(run.ttft_seconds, run.compute_seconds) for run in runs["ours"]),
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
    num_together: int = 1,
    num_jobs: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The benchmark as JSON-ready data.

    Args:
        traces: traces of the link; at least one of family ``jitter``.
        requests: one after the other on each trace.
        num_together: number of prompts that come at one time.
        num_jobs: processes that share the traces.
        say: gets a line per trace.
    """
    library = Library(H100_NVDEC, PICTURE_SIZES)
    simulated = partial(run_trace, requests=requests, num_together=num_together)
    rows: list[dict[str, Any]] = []
    everywhere: list[tuple[Trace, dict[str, list[Run]]]] = []
    ideals: dict[tuple[str, ...], list[float]] = {
        sizes: [] for sizes in (library.pictures, *((name,) for name in library.pictures))
    }
    for trace, runs in zip(traces, _map(simulated, traces, num_jobs), strict=True):
        rows.append(trace_row(trace, runs))
        say(format_row(rows[-1]))
        everywhere.append((trace, runs))
        if trace.family == "jitter":
            for sizes, found in ideals.items():
                found += [
                    ideal_seconds(
                        trace,
                        library,
                        H100_NVDEC,
                        request,
                        start=_start(index // num_together),
                        sizes=sizes,
                    )
                    for index, request in enumerate(requests)
                ]
    jitter = [runs for trace, runs in everywhere if trace.family == "jitter"]
    means = {name: _mean_ttft(r for runs in jitter for r in runs[name]) for name in jitter[0]}
    gains = {name: 1 - means["ours"] / mean for name, mean in means.items()}
    fixed = {name: gains[fixed_name(name)] for name in library.adaptive}
    sizes_alone = {
        name: 1 - means[OURS_SIZES] / means[fixed_name(name)] for name in library.pictures
    }
    ideal = statistics.fmean(ideals[library.pictures])
    possible = {name: 1 - ideal / means[fixed_name(name)] for name in library.pictures}
    possible_by_size = {
        name: 1 - ideal / statistics.fmean(ideals[name,]) for name in library.pictures
    }
    best_with_raw = min(means[fixed_name(name)] for name in (*library.pictures, RAW))
    bytes_of_one = PICTURE_SIZES[0].bits_per_element
    return {
        "jitter_gain_vs_fixed": gains[fixed_name(DEFAULT_SIZE)],
        "jitter_gain_vs_fixed_is_against": (
            f"{fixed_name(DEFAULT_SIZE)}: sixteen layers of 2048 channels per picture, what calibrated"
            " profiles store of such a model where codec.frame_sizes names no sizes; mean time to"
            " first token over all jitter traces and requests. sizes_alone: without the packed copy."
            " There jitter_gain_possible_vs_each_fixed is what a fetcher that waits for nothing but"
            " bytes would gain over the fixed size as it is fetched, jitter_gain_possible_by_size"
            " over the fixed size fetched without waiting either"
        ),
        "jitter_gain_vs_each_fixed": fixed,
        "jitter_gain_possible_vs_each_fixed": possible,
        "jitter_gain_possible_by_size": possible_by_size,
        "jitter_gain_vs_best_fixed": min(fixed.values()),
        "jitter_gain_vs_best_fixed_size": min(fixed[name] for name in library.pictures),
        "one_size_jitter_gain_vs_each_fixed": {
            name: 1 - means[OURS_ONE] / means[fixed_name(name)] for name in library.adaptive
        },
        "sizes_alone_jitter_gain_vs_each_fixed": sizes_alone,
        "jitter_gain_with_raw_vs_best_fixed": 1 - means[OURS_WITH_RAW] / best_with_raw,
        "jitter_gain_vs_nominal_fixed": gains["nominal"],
        "jitter_gain_vs_previous_chunk_rule": gains["previous"],
        "sizes_alone_jitter_gain_vs_previous_chunk_rule": 1 - means[OURS_SIZES] / means["previous"],
        "worst_loss_vs_best_fixed": max(row["loss_vs_best_fixed"] for row in rows),
        "worst_loss_vs_best_fixed_of_one_prompt": max(
            max(row["loss_by_prompt"].values()) for row in rows
        ),
        **{
            f"{name}_worst_loss_vs_best_fixed": max(
                row[f"{name}_loss_vs_best_fixed"] for row in rows
            )
            for name in ("one_size", "sizes_alone", "two_sizes", "with_raw")
        },
        "worst_gated_over_compute": max(row["worst_gated_over_compute"] for row in rows),
        "worst_gated_over_ungated": max(row["gated_over_ungated"] for row in rows),
        "worst_gated_over_better_of_both": max(row["gated_over_better_of_both"] for row in rows),
        "mean_ttft_seconds": {
            name: _mean_ttft(run for _, runs in everywhere for run in runs[policy])
            for name, policy in (("gated", "gated"), ("ungated", "ours"))
        }
        | {
            "computed": statistics.fmean(
                run.compute_seconds for _, runs in everywhere for run in runs["ours"]
            ),
            "better_of_both": statistics.fmean(
                min(run.ttft_seconds, run.compute_seconds)
                for _, runs in everywhere
                for run in runs["ours"]
            ),
        },
        "stored_bytes_over_one_size": {
            name: sum(s.bits_per_element for s in PICTURE_SIZES if s.name in sizes) / bytes_of_one
            for name, sizes in (
                ("ours", library.adaptive),
                (OURS_ONE, (DEFAULT_SIZE, PACKED)),
                (OURS_SIZES, library.pictures),
                (OURS_TWO, TWO_SIZES),
                (OURS_WITH_RAW, (*library.pictures, RAW)),
            )
        },
        "traces": rows,
        "sizes": [asdict(size) for size in PICTURE_SIZES],
        "requests": [
            {"shape": r.shape.name, "prefix_tokens": r.prefix_tokens, "suffix": r.suffix_tokens}
            for r in requests
        ],
        "fetch": asdict(FetchConfig()),
        "rtt_seconds": RTT_SECONDS,
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
    parser.add_argument(
        "--seeds", type=int, default=4, help="number of seeds for each shape of jitter"
    )
    parser.add_argument(
        "--first-seed",
        type=int,
        default=0,
        help="the first seed; settings were chosen on seeds 0 to 3",
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="number of times that each request comes"
    )
    parser.add_argument(
        "--together", type=int, default=1, help="number of requests that come at one time"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of processes that share the traces"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args(argv)
    if min(args.seeds, args.rounds, args.together, args.jobs) < 1:
        parser.error("--seeds, --rounds, --together and --jobs are at least 1")

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    # Those that come together are of one kind.
    requests = [r for r in REQUESTS for _ in range(args.together)] * args.rounds
    report = run(
        all_traces(seeds=args.seeds, first_seed=args.first_seed),
        requests,
        num_together=args.together,
        num_jobs=args.jobs,
        say=say,
    )
    report["command"] = (
        f"kvfetcher bench sim --json --seeds {args.seeds} --first-seed {args.first_seed}"
        f" --rounds {args.rounds} --together {args.together} --jobs {args.jobs}"
    )
    if args.json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
        return 0
    for name, value in report.items():
        if isinstance(value, float) and "_over_" in name:
            sys.stdout.write(f"{name} {value:.2f}\n")
        elif isinstance(value, float) and ("gain" in name or "loss" in name):
            sys.stdout.write(f"{name} {100 * value:+.1f} %\n")
        elif name == "jitter_gain_vs_each_fixed":
            sizes = ", ".join(f"{size} {100 * gain:+.1f} %" for size, gain in value.items())
            sys.stdout.write(f"{name} {sizes}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
