"""Small calibrations made from random statistics, as `kvfetcher calibrate` makes them from a model."""

import numpy as np

from kvfetcher.calibration.calibrate import solve
from kvfetcher.calibration.statistics import Statistics
from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.codec.ladder.groups import Grouping
from kvfetcher.codec.ladder.profile import TransformProfile
from kvfetcher.codec.ladder.rope import LayerRope, Rope
from kvfetcher.spec import LADDER, KVSpec

STEPS = {"near": 0.02, "balanced": 0.06, "compact": 0.12, "tiny": 0.25}


class OnlyPacked(TransformProfile):
    """Chunks of packed units, without the pictures that these are kept beside."""

    def variants(self) -> tuple[str, ...]:
        return ("packed",)


def make_rope(spec: KVSpec) -> Rope:
    """Every kind of layer: rotated in both styles, scaled, partly, not at all."""
    table = tuple(float(f) for f in 10000.0 ** -(np.arange(spec.head_dim // 2) * 2 / spec.head_dim))
    kinds = (
        LayerRope(table),
        LayerRope(),
        LayerRope(table, "interleaved", 1.25),
        LayerRope(table[: len(table) // 2], offset=spec.head_dim - 2 * (len(table) // 2)),
    )
    return Rope(tuple(kinds[i % len(kinds)] for i in range(spec.num_layers)))


def correlated_values(spec: KVSpec, num_tokens: int, seed: int = 0) -> np.ndarray:
    """[L, K, H, T, D] float32: few common factors and a little noise, as KV caches have."""
    rng = np.random.default_rng(7)
    size = spec.elements_per_token
    mixing = rng.normal(size=(max(2, size // 8), size)) * 0.7
    mean = rng.normal(size=size)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_tokens, len(mixing))) @ mixing + mean
    x += 0.03 * rng.normal(size=x.shape)
    shape = (num_tokens, spec.num_layers, spec.kv_factor, spec.num_kv_heads, spec.head_dim)
    return np.ascontiguousarray(x.reshape(shape).transpose(1, 2, 3, 0, 4), np.float32)


def make_calibration(
    spec: KVSpec, *, layers: int = 2, heads: int = 0, model: str = "ab" * 32
) -> Calibration:
    """A calibration for `correlated_values` (keys before rotation)."""
    grouping = Grouping.even(spec, layers=layers, heads=heads)
    stats = Statistics(grouping)
    values = correlated_values(spec, 400, seed=1)
    rng = np.random.default_rng(2)
    gradients = rng.normal(size=values.shape).astype(np.float32)
    stats.add(values, gradients, num_evaluated=1)
    return solve(
        stats,
        make_rope(spec),
        model=model,
        steps=STEPS,
        floor=0.25,
        sink_tokens=4,
        source={"texts": "none"},
    )


def certify(calibration: Calibration, **rows: tuple[float, float]) -> Calibration:
    """The calibration with (ratio, KL) of profiles certified; without any, of the whole ladder."""
    rows = rows or dict.fromkeys(LADDER, (9.75, 5.1e-4))
    return calibration.with_certificate(
        {
            "calibration": calibration.digest,
            "dtype": calibration.spec.dtype,
            "profiles": {
                name: {"ratio": ratio, "kl": kl, "top1_agreement": 0.995, "perplexity_change": 0.0}
                for name, (ratio, kl) in rows.items()
            },
        }
    )
