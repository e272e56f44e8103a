"""Calibration: run a model over texts, collect statistics, solve the bases. Resumable.

Deterministic given model, texts, settings and machine: labels come from a seeded generator per
document, and documents are counted in order.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvfetcher.errors import ConfigError
from kvfetcher.transform.artifact import Calibration, StoredBasis
from kvfetcher.transform.klt import fisher_roots, solve_basis
from kvfetcher.transform.rope import Rope, unrotate_keys
from kvfetcher.transform.statistics import Statistics
from kvfetcher.transform.texts import Text, texts_digest

if TYPE_CHECKING:
    from pathlib import Path

    from kvfetcher.transform.capture import CaptureModel
    from kvfetcher.transform.groups import Grouping

log = logging.getLogger(__name__)

# Sinks have another distribution than all other tokens; in the statistics they would take the
# first components.
SINK_TOKENS = 4

Progress = Callable[[str, int, int], None]
"""Called with (what is done, number done, number in all)."""


def no_progress(what: str, done: int, total: int) -> None:
    """The `Progress` that says nothing."""


@dataclass(frozen=True, slots=True)
class CollectSettings:
    """How much is read. 40 documents of 2,048 tokens suffice: 2 documents cost 10 % more bits."""

    num_documents: int = 40
    prefix_tokens: int = 1792
    label_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("num_documents", 1), ("prefix_tokens", 64), ("label_tokens", 16)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}")


def collect(
    model: CaptureModel,
    rope: Rope,
    texts: list[Text],
    grouping: Grouping,
    settings: CollectSettings,
    *,
    checkpoint: Path | None = None,
    checkpoint_documents: int = 8,
    progress: Progress = no_progress,
) -> Statistics:
    """Statistics over the first ``num_documents`` texts that are long enough.

    Args:
        model: the model; its cache must have the geometry of ``grouping.spec``.
        rope: its rotation.
        texts: documents in order.
        grouping: which values are transformed together.
        settings: how much to read.
        checkpoint: file that the state is kept in, and resumed from where it is of the same run.
        checkpoint_documents: documents between two checkpoints.
        progress: called after every document.

    Raises:
        ConfigError: no text is long enough.
        FormatError: the checkpoint cannot be read.
    """
    context = _context(rope, texts, grouping, settings)
    stats = None
    if checkpoint is not None and checkpoint.exists():
        stats = Statistics.load(checkpoint, grouping, context=context)
    stats = stats or Statistics(grouping)
    resumed = stats.num_documents
    needed = settings.label_tokens * 2 + SINK_TOKENS
    done = 0
    total = min(settings.num_documents, len(texts))
    for text in texts:
        if done == settings.num_documents:
            break
        ids = model.encode(text.text)[: settings.prefix_tokens + settings.label_tokens]
        if len(ids) < needed:
            continue
        done += 1
        if done <= resumed:
            continue
        _count(model, rope, ids, stats, settings, done)
        progress(f"read {text.name}", done, total)
        if checkpoint is not None and done % checkpoint_documents == 0:
            stats.save(checkpoint, context=context)
    if not stats.num_documents:
        raise ConfigError(f"no calibration text has {needed} tokens; give longer texts")
    log.debug("calibration: %d documents, %d tokens", stats.num_documents, stats.num_tokens)
    return stats


def solve(
    stats: Statistics,
    rope: Rope,
    *,
    model: str,
    steps: Mapping[str, float],
    floor: float,
    sink_tokens: int,
    source: Mapping[str, Any],
) -> Calibration:
    """Bases from statistics. Components that no profile codes are left out.

    Args:
        stats: from `collect`.
        rope: the rotation that was undone in them.
        model: hex SHA-256 of the weights.
        steps: of each profile of the ladder.
        floor: components with sigma below so many steps are not coded.
        sink_tokens: tokens at the start of a sequence that are kept exact.
        source: how the statistics were made; kept in the artifact.
    """
    grouping, spec = stats.grouping, stats.grouping.spec
    roots, _ = fisher_roots(stats.fisher / stats.num_documents)
    least = floor * min(steps.values())
    bases = {}
    for group, (start, count) in enumerate(
        zip(grouping.layer_starts, grouping.layer_counts, strict=True)
    ):
        solved = {}
        for head_group, (first, stop) in enumerate(grouping.head_ranges):
            key = (group, head_group)
            blocks = roots[start : start + count, :, first:stop]
            blocks = blocks.reshape(-1, spec.head_dim, spec.head_dim)
            solved[key] = solve_basis(stats.mean(key), stats.covariance(key), blocks)
        kept = max(1, *(int(np.count_nonzero(b.sigma >= least)) for b in solved.values()))
        for key, basis in solved.items():
            bases[key] = StoredBasis(
                basis.rows[:kept].astype(np.float16), basis.sigma[:kept], basis.mean
            )
    return Calibration(
        model, grouping, rope, roots, bases, dict(steps), floor, sink_tokens, dict(source)
    )


def _count(
    model: CaptureModel,
    rope: Rope,
    ids: list[int],
    stats: Statistics,
    settings: CollectSettings,
    index: int,
) -> None:
    prefix, labels = ids[: -settings.label_tokens], ids[-settings.label_tokens :]
    kv = model.prefill(prefix)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
    gradients = model.sensitivity(labels, kv, generator=generator)
    values = kv.to_array()
    unrotate_keys(values[:, 0], rope, 0)
    # d/dk = R^T d/dk' (amplitude included): the inverse rotation times the squared amplitude.
    unrotate_keys(gradients[:, 0], rope, 0)
    amplitudes = np.array([layer.amplitude**2 for layer in rope.layers], np.float32)
    gradients[:, 0] *= amplitudes[:, None, None, None]
    stats.add(
        np.ascontiguousarray(values[:, :, :, SINK_TOKENS:]),
        np.ascontiguousarray(gradients[:, :, :, SINK_TOKENS:]),
        num_evaluated=len(labels),
    )


def _context(rope: Rope, texts: list[Text], grouping: Grouping, settings: CollectSettings) -> str:
    text = json.dumps(
        [
            rope.digest(),
            texts_digest(texts),
            grouping.spec.to_dict(),
            grouping.layer_counts,
            grouping.heads_per_group,
            settings.num_documents,
            settings.prefix_tokens,
            settings.label_tokens,
            settings.seed,
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()
