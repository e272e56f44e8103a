"""Calibration: run a model over texts, collect statistics, solve the bases. Resumable.

Deterministic given model, texts, settings and machine: labels come from a seeded generator per
document, and documents are counted in order.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvfetcher import __version__
from kvfetcher.calibration.capture import CaptureModel
from kvfetcher.calibration.certify import CertifySettings, certify, held_out_documents
from kvfetcher.calibration.journal import Journal
from kvfetcher.calibration.progress import Progress, no_progress
from kvfetcher.calibration.statistics import Statistics
from kvfetcher.calibration.steps import TARGETS, choose_steps
from kvfetcher.calibration.texts import Text, texts_digest
from kvfetcher.codec.ladder.artifact import ARTIFACT_VERSION, Calibration, StoredBasis
from kvfetcher.codec.ladder.groups import Grouping
from kvfetcher.codec.ladder.klt import fisher_roots, solve_basis
from kvfetcher.codec.ladder.rope import Rope, unrotate_keys
from kvfetcher.errors import ConfigError
from kvfetcher.models.identity import weights_digest
from kvfetcher.spec import LADDER

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kvfetcher.spec import KVDtype, KVSpec

log = logging.getLogger(__name__)

# Sinks have another distribution than all other tokens; in the statistics they would take the
# first components.
SINK_TOKENS = 4


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


@dataclass(frozen=True, slots=True)
class CalibrateSettings:
    """How a model is calibrated."""

    layers_per_group: int = 0
    """Neighbouring layers of one transform; more layers are fewer bits and more arithmetic. 0 = as
    many as `groups.DEFAULT_DIMENSION` allows."""
    heads_per_group: int = 0
    """KV heads of one transform; 0 = all. A tensor-parallel rank's heads, so that it decodes only
    its own."""
    dtype: KVDtype = "bfloat16"
    """KV dtype that the engine keeps."""
    sink_tokens: int = 3
    """Tokens at the start of a sequence that are kept exact. Of 8 held-out texts one needs 2 (KL
    4e-4 instead of 1e-2); a third and fourth change nothing (SmolLM2-135M, `balanced`)."""
    floor: float = 0.25
    """Components whose deviation is below this number of steps are not coded."""
    num_step_documents: int = 5
    """Texts that the steps are chosen on; the KL of single texts differs by 20 % and more."""
    collect: CollectSettings = field(default_factory=CollectSettings)
    certify: CertifySettings = field(default_factory=CertifySettings)


def calibrate(
    folder: Path,
    *,
    texts: list[Text],
    held_out: list[Text],
    settings: CalibrateSettings,
    checkpoint: Path | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Calibration:
    """Calibrate a model, choose its steps and certify it.

    Memory beside the model, in bytes: `statistics`, and with them while reading 48 per value of a
    document's cache (measured on SmolLM2-135M: 0.55 MB per token, 2.2 GB in all), while solving 68
    n^2 of the largest transform (measured at n = 1,024). They are freed before texts are measured:
    `num_step_documents` or `certify.num_documents` of them at a time, each of 4 per value of its
    cache and per log-probability (SmolLM2-135M: 46 kB per token, and 197 kB per following one: 1.0
    GB for 5).

    Args:
        folder: local Hugging Face model folder.
        texts: documents to read.
        held_out: documents to certify with; not among ``texts``.
        settings: groups and amounts.
        checkpoint: where the statistics are kept meanwhile, and resumed from; what was measured
            after them is kept in `journal_path` of it.
        device: where the model runs.
        progress: called after every document and measurement.

    Raises:
        EngineError: the model cannot be loaded.
        ConfigError: its geometry, rotation or the texts do not serve.
        FormatError: the checkpoint or its journal cannot be read.
    """
    model = CaptureModel.load(folder, device=device)
    _check_lengths(model, texts, held_out, settings)
    digest = weights_digest(folder)
    rope = model.measure_rope()
    spec = replace(model.measure_spec(), dtype=settings.dtype)
    grouping = Grouping.even(spec, layers=settings.layers_per_group, heads=settings.heads_per_group)
    run = json.dumps([ARTIFACT_VERSION, digest, device])
    collected = collect(
        model, rope, texts, grouping, settings.collect,
        run=run, checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    # Texts that the statistics have not seen, where there are more than they needed.
    unseen = [*collected.rest, *texts]
    progress("solve", 0, 1)
    draft = solve(
        collected.statistics,
        rope,
        model=digest,
        # A provisional ladder far below any that is chosen keeps every component of use.
        steps=dict.fromkeys(LADDER, _finest_step(spec, settings)),
        floor=settings.floor,
        sink_tokens=settings.sink_tokens,
        source={
            "texts": texts_digest(texts),
            "documents": collected.statistics.num_documents,
            "tokens": collected.statistics.num_tokens,
            "settings": asdict(settings),
        },
    )
    del collected
    journal = Journal(
        journal_path(checkpoint) if checkpoint is not None else None,
        context=json.dumps([run, __version__, draft.digest, TARGETS, texts_digest(held_out)]),
    )

    def steps() -> dict[str, float]:
        amount = replace(settings.certify, num_documents=settings.num_step_documents)
        tuning = held_out_documents(model, unseen, amount, progress=progress)
        return choose_steps(model, draft, tuning, journal=journal, progress=progress)

    calibration = draft.with_steps(journal.measured("steps", steps))
    documents = held_out_documents(model, held_out, settings.certify, progress=progress)
    return calibration.with_certificate(
        certify(model, calibration, held_out, documents, journal=journal, progress=progress)
    )


def journal_path(checkpoint: Path) -> Path:
    """The file beside a checkpoint that keeps what was measured after the statistics."""
    return checkpoint.with_suffix(".json")


def _check_lengths(
    model: CaptureModel, texts: list[Text], held_out: list[Text], settings: CalibrateSettings
) -> None:
    """Refuse now what would be found too short after all the reading."""
    needed = settings.certify.prefix_tokens + settings.certify.following_tokens
    for what, found in (("calibration", texts), ("held-out", held_out)):
        if not any(len(model.encode(text.text)) >= needed for text in found):
            raise ConfigError(
                f"none of {len(found)} {what} texts has {needed} tokens; give more or longer texts"
            )


def recertify(
    folder: Path,
    calibration: Calibration,
    *,
    held_out: list[Text],
    settings: CertifySettings,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Calibration:
    """Measure an existing calibration again.

    Raises:
        ConfigError: it was made for another model.
        EngineError: the model cannot be loaded.
    """
    if weights_digest(folder) != calibration.model:
        raise ConfigError(
            f"calibration {calibration.digest[:16]} was made for another model than {folder};"
            " calibrate this one"
        )
    model = CaptureModel.load(folder, device=device)
    documents = held_out_documents(model, held_out, settings, progress=progress)
    return calibration.with_certificate(
        certify(model, calibration, held_out, documents, progress=progress)
    )


def _finest_step(spec: KVSpec, settings: CalibrateSettings) -> float:
    """A third of the step whose predicted KL at 2,048 tokens is that of `near`."""
    return math.sqrt(24 * TARGETS["near"] / (2048 * spec.elements_per_token)) / 3


class Collected(NamedTuple):
    """What was read, and the texts after the last that was."""

    statistics: Statistics
    rest: list[Text]


def collect(
    model: CaptureModel,
    rope: Rope,
    texts: list[Text],
    grouping: Grouping,
    settings: CollectSettings,
    *,
    run: str = "",
    checkpoint: Path | None = None,
    checkpoint_documents: int = 8,
    progress: Progress = no_progress,
) -> Collected:
    """Statistics over the first ``num_documents`` texts that are long enough.

    Args:
        model: the model; its cache must have the geometry of ``grouping.spec``.
        rope: its rotation.
        texts: documents in order.
        grouping: which values are transformed together.
        settings: how much to read.
        run: what else a checkpoint must agree in: the model.
        checkpoint: file that the state is kept in, and resumed from where it is of the same run.
        checkpoint_documents: documents between two checkpoints; the last ends in one, too.
        progress: called after every document.

    Raises:
        ConfigError: no text is long enough.
        FormatError: the checkpoint cannot be read.
    """
    context = _context(run, rope, texts, grouping, settings)
    stats = None
    if checkpoint is not None and checkpoint.exists():
        stats = Statistics.load(checkpoint, grouping, context=context)
    stats = stats or Statistics(grouping)
    resumed = saved = stats.num_documents
    needed = settings.label_tokens * 2 + SINK_TOKENS
    done = num_read = 0
    total = min(settings.num_documents, len(texts))
    for text in texts:
        if done == settings.num_documents:
            break
        num_read += 1
        ids = model.encode(text.text)[: settings.prefix_tokens + settings.label_tokens]
        if len(ids) < needed:
            continue
        done += 1
        if done <= resumed:
            continue
        _count(model, rope, ids, stats, settings, done)
        is_last = done == settings.num_documents
        if checkpoint is not None and (is_last or done % checkpoint_documents == 0):
            stats.save(checkpoint, context=context)
            saved = done
        progress(f"read {text.name}", done, total)
    if checkpoint is not None and saved != done:
        stats.save(checkpoint, context=context)
    if not stats.num_documents:
        raise ConfigError(f"no calibration text has {needed} tokens; give longer texts")
    log.debug("calibration: %d documents, %d tokens", stats.num_documents, stats.num_tokens)
    return Collected(stats, texts[num_read:])


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
        floor: components whose sigma is below this number of steps are not coded.
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


def _context(
    run: str, rope: Rope, texts: list[Text], grouping: Grouping, settings: CollectSettings
) -> str:
    text = json.dumps(
        [
            run,
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
