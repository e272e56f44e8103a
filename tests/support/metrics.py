"""KVFetcher's series on a server's metrics endpoint."""

from __future__ import annotations

import urllib.request


def read_metrics(metrics_url: str) -> dict[str, float]:
    """Values by name with labels, as Prometheus writes them; only `kvfetcher_*`."""
    with urllib.request.urlopen(f"http://{metrics_url}/metrics") as response:
        lines = response.read().decode().splitlines()
    series = (line.rsplit(" ", 1) for line in lines if line.startswith("kvfetcher_"))
    return {name: float(value) for name, value in series}


def total(found: dict[str, float], name: str, *parts: str) -> float:
    """The sum of the series whose name begins so and that have all of these parts."""
    return sum(v for k, v in found.items() if k.startswith(name) and all(p in k for p in parts))
