"""KVFetcher's own series on Triton's metrics endpoint. Each name is defined here, once."""

from __future__ import annotations

from typing import Any

_COUNTERS = {
    "kvfetcher_fetches_total": "Requests that asked for their prefix, by outcome and reason",
    "kvfetcher_prompt_tokens_total": "Prompt tokens of those requests",
    "kvfetcher_hit_tokens_total": "Prompt tokens whose KV came from the store",
    "kvfetcher_fetched_bytes_total": "Bytes read from the store",
    "kvfetcher_saved_chunks_total": "Chunks written to the store",
    "kvfetcher_saved_bytes_total": "Bytes written to the store",
    "kvfetcher_save_errors_total": "Saves that stopped with an error",
    "kvfetcher_saves_dropped_total": "Saves dropped because too many were pending",
}
_GAUGES = {"kvfetcher_saves_pending": "Saves that wait or run"}


class Metrics:
    """Counters and gauges by name; families and label sets are made on first use."""

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Increase a counter (or move a gauge by `value`, which may be negative)."""
        if name in _COUNTERS and value <= 0:
            return
        self._metric(name, labels).increment(value)

    def _metric(self, name: str, labels: dict[str, str]) -> Any:
        key = (name, tuple(sorted(labels.items())))
        if key not in self._metrics:
            if name not in self._families:
                family = self._pb_utils.MetricFamily
                is_gauge = name in _GAUGES
                self._families[name] = family(
                    name=name,
                    description=(_GAUGES if is_gauge else _COUNTERS)[name],
                    kind=family.GAUGE if is_gauge else family.COUNTER,
                )
            self._metrics[key] = self._families[name].Metric(labels=labels)
        return self._metrics[key]

    def close(self) -> None:
        """Drop the series; Triton wants metrics gone before their families."""
        self._metrics.clear()
        self._families.clear()
