"""The quality that a calibration must reach before `auto` takes its profile.

A certificate says what was measured; the bars here say what is good enough. Each is twice the goal
that `calibration.steps` sets for SmolLM2-135M, where certificates of it and of Gemma 3 270M reach
8.1e-5 to 9.5e-5 (near), 4.5e-4 to 5.2e-4 (balanced), 1.8e-3 to 2.2e-3 (compact) and 6.8e-3 to
7.2e-3 nats (tiny).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class QualityBar:
    """What a certificate must say of a profile.

    Attributes:
        max_kl: mean KL divergence of next-token distributions, in nats.
        min_top1_agreement: part of the positions whose likeliest token stays the same.
        max_perplexity_change: relative growth of the perplexity; a lower perplexity passes.
    """

    max_kl: float
    min_top1_agreement: float
    max_perplexity_change: float


QUALITY_BARS = {
    "near": QualityBar(2e-4, 0.99, 0.005),
    "balanced": QualityBar(1.2e-3, 0.98, 0.01),
    "compact": QualityBar(5e-3, 0.96, 0.02),
    "tiny": QualityBar(2e-2, 0.93, 0.04),
}


def below_bar(certificate: Mapping[str, Any] | None, profile: str) -> str:
    """Why a certificate is not good enough for a profile; "" = it is.

    Args:
        certificate: `Calibration.certificate`.
        profile: profile of the ladder.

    Example:
        >>> below_bar({"profiles": {"near": {"kl": 2.5e-3, "top1_agreement": 0.37,
        ...            "perplexity_change": 0.0}}}, "near")
        'near misses its quality bar: KL 2.5e-03 nats (at most 2.0e-04), top-1 37.0 % (at least 99.0 %)'
    """
    profiles = (certificate or {}).get("profiles")
    row = profiles.get(profile) if isinstance(profiles, dict) else None
    row = row if isinstance(row, dict) else {}
    kl, top1, perplexity = (
        _number(row.get(name)) for name in ("kl", "top1_agreement", "perplexity_change")
    )
    bar = QUALITY_BARS[profile]
    missed = []
    if not kl <= bar.max_kl:
        missed.append(f"KL {kl:.1e} nats (at most {bar.max_kl:.1e})")
    if not top1 >= bar.min_top1_agreement:
        missed.append(f"top-1 {100 * top1:.1f} % (at least {100 * bar.min_top1_agreement:.1f} %)")
    if not perplexity <= bar.max_perplexity_change:
        missed.append(
            f"perplexity {100 * perplexity:+.2f} %"
            f" (at most {100 * bar.max_perplexity_change:+.2f} %)"
        )
    return f"{profile} misses its quality bar: {', '.join(missed)}" if missed else ""


def _number(value: object) -> float:
    """A finite number as it is; NaN, which passes no bar, for anything else."""
    is_number = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    return float(value) if is_number else math.nan  # type: ignore[arg-type]
