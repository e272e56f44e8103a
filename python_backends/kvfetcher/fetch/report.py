"""What happened to one request's prefix, as the client sees it in `kv_report`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kvfetcher.fetch.planning.gate import Regret
from kvfetcher.fetch.reads import Tally

if TYPE_CHECKING:
    from kvfetcher.fetch.planning.bandwidth import LinkEstimate
    from kvfetcher.fetch.planning.gate import Decision

Outcome = Literal["hit", "partial", "miss", "skipped", "warmed"]

Reason = Literal[
    "",  # nothing to explain: every whole chunk of the prompt was hit
    "not_stored",  # the store has no (further) chunk of this prefix
    "no_copies",  # kv_policy `warm` without a tier on this host
    "short_prompt",  # no whole chunk before the last token
    "policy",  # kv_policy asked not to fetch
    "disabled",  # fetch.enabled is false
    "too_short",  # fewer tokens than fetch.min_hit_tokens
    "corrupt_chunk",  # quarantined; see detail
    "identity_mismatch",  # the object is of another model, profile or prefix
    "store_error",
    "store_timeout",
    "store_unavailable",  # it failed too often lately and was not asked
    "slower_than_computing",  # the gate's prediction, before the fetch
    "fell_behind",  # the gate's prediction, during the fetch; what had arrived was kept
    "decode_error",  # a unit's own bytes may be what is wrong
    "decoder_unavailable",  # nobody looked at the unit: no such model, a lost process, no decoder
    "gpu_error",  # the GPU refused: no memory, or planes on it are gone
    "arena_lost",  # the KV arena is gone: the engine ended or was restarted
    "arena_full",
    "line_full",  # fetch.max_waiting_requests prefixes wait already
    "deadline",
    "engine_error",
]


@dataclass(slots=True)
class GateReport:
    """What the gate decided, on which prediction, and how it turned out. Milliseconds.

    `predicted_ms` is to the first token by what was decided, `predicted_compute_ms` by computing
    everything. `chunks_considered` is `chunks_wanted`, or where none were wanted the best number
    that was considered; `predicted_fetch_ms` is fetching these, `predicted_with_fetch_ms` fetching
    these and then computing the rest, `predicted_all_fetch_ms` fetching all that are stored.

    Of a fetch that was made, `fetch_ms` is what it took, `error_ms` that minus its prediction, and
    `loss_ms` the time lost by looking up and fetching against computing everything (as that was
    predicted; negative = gained). For verdict `none`, `error_ms` is the engine's prefill minus its
    prediction and `loss_ms` the time lost against the best fetch.
    """

    verdict: str
    chunks_stored: int
    chunks_wanted: int
    chunks_considered: int
    predicted_fetch_ms: float
    predicted_with_fetch_ms: float
    predicted_all_fetch_ms: float
    predicted_ms: float
    predicted_compute_ms: float
    gbit_per_second: float
    rtt_ms: float
    link_transfers: int
    fetch_ms: float | None = None
    error_ms: float | None = None
    loss_ms: float | None = None

    @classmethod
    def of(cls, decision: Decision, link: LinkEstimate, *, num_chunks: int) -> GateReport:
        return cls(
            verdict=decision.verdict,
            chunks_stored=num_chunks,
            chunks_wanted=decision.num_chunks,
            chunks_considered=decision.considered_chunks,
            predicted_fetch_ms=_ms(decision.predicted_fetch_seconds),
            predicted_with_fetch_ms=_ms(decision.predicted_with_fetch_seconds),
            predicted_all_fetch_ms=_ms(decision.predicted_all_fetch_seconds),
            predicted_ms=_ms(decision.predicted_seconds),
            predicted_compute_ms=_ms(decision.predicted_compute_seconds),
            gbit_per_second=round(link.bytes_per_second * 8e-9, 4),
            rtt_ms=_ms(link.rtt_seconds),
            link_transfers=link.num_transfers,
        )

    def tell(self, regret: Regret, *, fetch_seconds: float) -> None:
        """How a fetch turned out."""
        self.fetch_ms = _ms(fetch_seconds)
        self.error_ms = _ms(regret.error_seconds)
        self.loss_ms = _ms(regret.loss_seconds)


def tell_computed(report: dict[str, Any], prefill_ms: float) -> Regret | None:
    """Put into a report how the gate's decision to fetch nothing turned out.

    Only the engine knows, in another process than the fetcher's.

    Args:
        report: a `FetchReport` that travelled as JSON; one that says nothing of such a decision
            stays as it is.
        prefill_ms: what computing the prompt took.

    Returns:
        What was put there; None where it stayed as it is.
    """
    gate = report.get("gate")
    if not isinstance(gate, dict) or gate.get("verdict") != "none":
        return None
    computed, fetched = gate.get("predicted_compute_ms"), gate.get("predicted_with_fetch_ms")
    if not (isinstance(computed, float) and isinstance(fetched, float)):
        return None
    result = Regret((prefill_ms - computed) / 1e3, (prefill_ms - fetched) / 1e3)
    gate["error_ms"], gate["loss_ms"] = _ms(result.error_seconds), _ms(result.loss_seconds)
    return result


@dataclass(slots=True)
class FetchReport:
    """Facts of one fetch; times in milliseconds, sizes in bytes.

    `bytes_bf16` is what the hit's values would weigh uncompressed in bfloat16. `stages_ms` holds
    wall-clock times of the request (`lookup`, `fetch`, `total`) and of the fetch it waited for
    (`wait` for its slot, `arena_wait`), and times summed over units that ran side by side
    (`transfer`, `decode`, `restore`): these may add up to more than `total`. Of requests that
    waited for one fetch, one report has its bytes and units; the others say `shared`.
    """

    policy: str
    prompt_tokens: int
    outcome: Outcome = "miss"
    reason: Reason = ""
    detail: str = ""
    hit_tokens: int = 0
    chunks_stored: int = 0
    chunks_hit: int = 0
    shared: bool = False
    reads: int = 0
    units: int = 0
    bytes_fetched: int = 0
    bytes_bf16: int = 0
    profile: str = ""
    decoders: dict[str, int] = field(default_factory=dict)
    variants: dict[str, int] = field(default_factory=dict)
    gate: GateReport | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)

    def add_ms(self, stage: str, milliseconds: float) -> None:
        """Add time to a stage."""
        self.stages_ms[stage] = round(self.stages_ms.get(stage, 0.0) + milliseconds, 3)

    def add_run(self, facts: RunFacts) -> None:
        """Take over what a fetch moved and decoded."""
        self.reads += facts.tally.num_reads
        self.units += facts.num_units
        self.bytes_fetched += facts.tally.num_bytes
        self.decoders, self.variants = dict(facts.decoders), dict(facts.variants)
        for stage, milliseconds in facts.stages_ms.items():
            self.add_ms(stage, milliseconds)

    def give_up(self, reason: Reason, detail: str = "") -> None:
        """Say why the hit is shorter than it could be; the first reason stays."""
        if not self.reason:
            self.reason, self.detail = reason, detail

    def replace_reason(self, reason: Reason, detail: str = "") -> None:
        """Say a nearer reason than the one that was given before."""
        self.reason, self.detail = reason, detail

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


@dataclass(slots=True)
class RunFacts:
    """What a fetch did, for the report; times in milliseconds, summed over units side by side."""

    profile: str
    reason: Reason = ""
    detail: str = ""
    tally: Tally = field(default_factory=Tally)
    num_units: int = 0
    decoders: dict[str, int] = field(default_factory=dict)
    variants: dict[str, int] = field(default_factory=dict)
    stages_ms: dict[str, float] = field(default_factory=dict)

    def add_ms(self, stage: str, seconds: float) -> None:
        self.stages_ms[stage] = self.stages_ms.get(stage, 0.0) + seconds * 1e3

    def end(self, reason: Reason, detail: str) -> None:
        """Say why not everything came; the first reason stays."""
        if not self.reason:
            self.reason, self.detail = reason, detail
