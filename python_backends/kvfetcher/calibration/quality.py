"""What a coding costs in the model's own terms: KL of next-token distributions, perplexity, top-1.

A document's prefix is computed once; its cache is replaced by a coded and restored copy, and the
tokens that follow are teacher-forced with both. The reference is the unrounded float32 cache, so
the figures include the rounding to the KV dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kvfetcher.calibration.capture import CaptureModel
    from kvfetcher.calibration.texts import Text

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Document:
    """One text, prefilled: 4 bytes per value of its cache and per log-probability."""

    name: str
    ids: list[int]
    following: list[int]
    values: F32
    """[L, 2, H, T, D], keys rotated."""
    reference: torch.Tensor
    """[T, V] log-probabilities after the exact cache."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How two next-token distributions differ, averaged over positions."""

    kl: float
    """Nats per token, KL(exact || coded)."""
    perplexity_change: float
    """Relative: 0.01 = 1 % more."""
    top1_agreement: float
    """Share of positions with the same likeliest token."""
    num_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def prepare(
    model: CaptureModel, text: Text, *, prefix_tokens: int, following_tokens: int
) -> Document | None:
    """Prefill one document; None where the text is too short."""
    ids = model.encode(text.text)[: prefix_tokens + following_tokens]
    if len(ids) < prefix_tokens + following_tokens:
        return None
    prefix, following = ids[:prefix_tokens], ids[prefix_tokens:]
    kv = model.prefill(prefix)
    with torch.no_grad():
        reference = torch.log_softmax(model.logits(following, kv).float(), dim=-1)
    return Document(text.name, prefix, following, kv.to_array(), reference)


def compare(model: CaptureModel, document: Document, values: F32) -> Quality:
    """Quality of a cache [L, 2, H, T, D] in place of the document's own."""
    kv = model.take(values)
    with torch.no_grad():
        coded = torch.log_softmax(model.logits(document.following, kv).float(), dim=-1)
        exact = document.reference
        kl = (exact.exp() * (exact - coded)).sum(dim=-1).double().mean()
        same = (exact.argmax(dim=-1) == coded.argmax(dim=-1)).double().mean()
        labels = torch.tensor(document.following[1:], device=coded.device)[:, None]
        worse = (exact[:-1].gather(1, labels) - coded[:-1].gather(1, labels)).double().mean()
    return Quality(float(kl), float(torch.expm1(worse)), float(same), len(document.following))


def average(qualities: list[Quality]) -> Quality:
    """Mean over documents, each weighted by its tokens."""
    weights = np.array([q.num_tokens for q in qualities], float)
    weights /= weights.sum()
    log_change = sum(
        w * np.log1p(q.perplexity_change) for w, q in zip(weights, qualities, strict=True)
    )
    return Quality(
        float(sum(w * q.kl for w, q in zip(weights, qualities, strict=True))),
        float(np.expm1(log_change)),
        float(sum(w * q.top1_agreement for w, q in zip(weights, qualities, strict=True))),
        sum(q.num_tokens for q in qualities),
    )


Coder = Callable[[F32], tuple[F32, float]]
"""A cache [L, 2, H, T, D] to (its coded and restored copy, bits of all of it)."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Quality and rate of one coder over documents."""

    quality: Quality
    worst_kl: float
    bits_per_element: float
    kl_by_document: tuple[float, ...]


def measure(model: CaptureModel, documents: list[Document], coder: Coder) -> Measured:
    """Run a coder over every document."""
    qualities, bits, elements = [], 0.0, 0
    for document in documents:
        values, size = coder(document.values)
        qualities.append(compare(model, document, values))
        bits += size
        elements += document.values.size
    divergences = tuple(q.kl for q in qualities)
    return Measured(average(qualities), max(divergences), bits / elements, divergences)
