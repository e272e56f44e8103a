"""KVFetcher's own series on Triton's metrics endpoint. Each name is defined here, once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from kvfetcher.fetch.planning.gate import Verdict
from kvfetcher.fetch.report import Reason
from kvfetcher.storage.guard import GuardEvent
from kvfetcher.storage.tier import TierEvent

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvfetcher.storage import StoreEvent

_COUNTERS = {
    "kvfetcher_fetches_total": "Requests that kv_fetch handled, by outcome and reason",
    "kvfetcher_prompt_tokens_total": "Prompt tokens of those requests",
    "kvfetcher_hit_tokens_total": "Prompt tokens whose KV came from the store",
    "kvfetcher_fetched_bytes_total": "Bytes read from the store",
    "kvfetcher_store_events_total": "Events of the store that kv_fetch reads, by event",
    "kvfetcher_shared_fetches_total": "Requests that waited for a fetch which another request began",
    "kvfetcher_gate_decisions_total": "Decisions between fetching and computing, by verdict",
    "kvfetcher_gate_lost_seconds_total": "Seconds that fetches lost against computing, as that was predicted",
    "kvfetcher_gate_gained_seconds_total": "Seconds that fetches gained against computing, as that was predicted",
    "kvfetcher_gate_compute_lost_seconds_total": "Seconds that computing lost against fetching, as that was predicted",
    "kvfetcher_gate_compute_gained_seconds_total": "Seconds that computing gained against fetching, as that was predicted",
    "kvfetcher_units_total": "Units decoded and restored, by decoder, place of their pictures, and restorer",
    "kvfetcher_unit_fallbacks_total": "Units that took another way than planned, by decoder; the log of kv_decode says why",
    "kvfetcher_saved_chunks_total": "Chunks written to the store",
    "kvfetcher_saved_bytes_total": "Bytes written to the store",
    "kvfetcher_save_errors_total": "Saves that ended with an error",
    "kvfetcher_saves_dropped_total": "Saves dropped because too many were pending",
    "kvfetcher_save_store_events_total": "Events of the store that kv_save writes, by event",
}
_GAUGES = {
    "kvfetcher_saves_pending": "Saves that wait or run",
    "kvfetcher_fetches_waiting": "Fetches that wait for a slot now",
    "kvfetcher_inflight_bytes": "Bytes that were asked for and are not restored yet",
    "kvfetcher_link_bytes_per_second": "Estimated rate of the link to the store",
    "kvfetcher_store_breaker_open": "1 while kv_fetch does not ask the store because it failed too often",
    "kvfetcher_save_store_breaker_open": "1 while kv_save does not ask the store because it failed too often",
}
_HISTOGRAMS = {
    "kvfetcher_fetch_stage_seconds": "Time of fetches by stage, in seconds; transfer, decode and restore are sums over units",
    "kvfetcher_gate_error_seconds": "Error of the predicted fetch time, in seconds",
    "kvfetcher_gate_compute_error_seconds": "Error of the predicted prefill time, in seconds, for requests that the gate chose to compute",
    "kvfetcher_time_to_first_token_seconds": "Seconds from the start of the look-up to the first token, by outcome",
}
NAMES = (*_COUNTERS, *_GAUGES, *_HISTOGRAMS)
"""Every series there can be."""
_BUCKETS_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


# What starts at 0, so that `rate()` sees the first event too: (name, labels).
Series = tuple[tuple[str, dict[str, str]], ...]

FETCH_SERIES: Series = (
    *(
        (name, {})
        for name in (
            "kvfetcher_prompt_tokens_total",
            "kvfetcher_hit_tokens_total",
            "kvfetcher_fetched_bytes_total",
            "kvfetcher_shared_fetches_total",
            "kvfetcher_gate_lost_seconds_total",
            "kvfetcher_gate_gained_seconds_total",
        )
    ),
    ("kvfetcher_fetches_total", {"outcome": "hit", "reason": ""}),
    ("kvfetcher_fetches_total", {"outcome": "cancelled", "reason": ""}),
    *(
        ("kvfetcher_fetches_total", {"outcome": outcome, "reason": reason})
        for outcome in ("miss", "partial")
        for reason in get_args(Reason)
        if reason
    ),
    *(("kvfetcher_gate_decisions_total", {"verdict": v}) for v in get_args(Verdict)),
)
"""Of `kv_fetch`."""
GENERATE_SERIES: Series = tuple(
    (name, {})
    for name in (
        "kvfetcher_saved_chunks_total",
        "kvfetcher_saved_bytes_total",
        "kvfetcher_save_errors_total",
        "kvfetcher_saves_dropped_total",
        "kvfetcher_saves_pending",
        "kvfetcher_gate_compute_lost_seconds_total",
        "kvfetcher_gate_compute_gained_seconds_total",
    )
)
"""Of `tensorrt_llm`."""


class Metrics:
    """Counters, gauges and histograms by name; families and label sets are made on first use."""

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}

    def start(self, series: Series) -> None:
        """Make series that begin at 0 before their first event."""
        for name, labels in series:
            self._metric(name, labels)

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Increase a counter (or move a gauge by `value`, which may be negative)."""
        if name in _COUNTERS and value <= 0:
            return
        self._metric(name, labels).increment(value)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._metric(name, {}).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        self._metric(name, labels).observe(value)

    def _metric(self, name: str, labels: dict[str, str]) -> Any:
        key = (name, tuple(sorted(labels.items())))
        if key not in self._metrics:
            if name not in self._families:
                self._families[name] = self._family(name)
            more = {"buckets": _BUCKETS_SECONDS} if name in _HISTOGRAMS else {}
            self._metrics[key] = self._families[name].Metric(labels=labels, **more)
        return self._metrics[key]

    def _family(self, name: str) -> Any:
        family = self._pb_utils.MetricFamily
        for known, kind in (
            (_COUNTERS, family.COUNTER),
            (_GAUGES, family.GAUGE),
            (_HISTOGRAMS, family.HISTOGRAM),
        ):
            if name in known:
                return family(name=name, description=known[name], kind=kind)
        raise AssertionError(f"metric {name} is not defined")

    def close(self) -> None:
        """Drop the series; Triton wants metrics gone before their families."""
        self._metrics.clear()
        self._families.clear()


def count_unit(metrics: Metrics, status: dict[str, Any]) -> None:
    """Count one unit by its `kv_status`."""
    decoder: str = status["decoder"]
    planes: str = status.get("planes", "host")
    metrics.add(
        "kvfetcher_units_total", decoder=decoder, planes=planes, restorer=status["restorer"]
    )
    if "fallback" in status:
        metrics.add("kvfetcher_unit_fallbacks_total", decoder=decoder)


def store_observer(metrics: Metrics, prefix: str) -> Callable[[StoreEvent], None]:
    """Counts a store's events and shows its breaker, in the series that begin with `prefix`.

    Each process has a store, and so a breaker, of its own.
    """
    metrics.set(f"{prefix}_breaker_open", 0.0)
    events = (*get_args(GuardEvent), *get_args(TierEvent))
    metrics.start(tuple((f"{prefix}_events_total", {"event": event}) for event in events))

    def observe(event: StoreEvent) -> None:
        metrics.add(f"{prefix}_events_total", event=event)
        if event in ("opened", "closed"):
            metrics.set(f"{prefix}_breaker_open", float(event == "opened"))

    return observe
