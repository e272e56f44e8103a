"""What calibration counts: first and second moments of K and V, and their Fisher information.

Memory in bytes, whatever the amount of text: 8 * sum(n^2) over the transforms (n = layers * 2 *
heads * head_dim of one) plus 8 * L * 2 * H * D^2. SmolLM2-135M in groups of 5 layers: 182 MB.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvfetcher.codec.ladder.groups import Grouping, to_vectors
from kvfetcher.codec.ladder.product import multiply
from kvfetcher.errors import FormatError

if TYPE_CHECKING:
    from pathlib import Path

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass
class Statistics:
    """Running sums over calibration documents. Mutable; one writer."""

    grouping: Grouping
    num_tokens: int = 0
    num_documents: int = 0
    sums: dict[tuple[int, int], F64] = field(default_factory=dict)
    products: dict[tuple[int, int], F64] = field(default_factory=dict)
    fisher: F64 = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        spec = self.grouping.spec
        for layer_group in range(len(self.grouping.layer_counts)):
            for head_group in range(len(self.grouping.head_ranges)):
                n = self.grouping.dimension(layer_group, head_group)
                self.sums.setdefault((layer_group, head_group), np.zeros(n))
                self.products.setdefault((layer_group, head_group), np.zeros((n, n)))
        if not self.fisher.size:
            shape = (spec.num_layers, spec.kv_factor, spec.num_kv_heads)
            self.fisher = np.zeros((*shape, spec.head_dim, spec.head_dim))

    def add(self, values: F32, gradients: F32, *, num_evaluated: int) -> None:
        """Count one document.

        Args:
            values: [L, K, H, T, D] float32, keys before rotation, sink tokens left out.
            gradients: same shape, of the summed log-likelihood of ``num_evaluated`` labels.
            num_evaluated: positions whose labels were drawn.
        """
        grouping = self.grouping
        for layer_group, (start, count) in enumerate(
            zip(grouping.layer_starts, grouping.layer_counts, strict=True)
        ):
            for head_group, heads in enumerate(grouping.head_ranges):
                x = to_vectors(values[start : start + count], heads)
                self.sums[layer_group, head_group] += x.sum(axis=0, dtype=np.float64)
                self.products[layer_group, head_group] += multiply(x.T, x)
        # Tokens outside a sliding window have no influence at all: the mean is over those inside.
        inside = np.any(gradients != 0, axis=(1, 2, 4)).sum(axis=1)
        moments = np.matmul(gradients.transpose(0, 1, 2, 4, 3), gradients)
        scale = 1.0 / (np.maximum(inside, 1) * float(num_evaluated))
        self.fisher += moments * scale[:, None, None, None, None]
        self.num_tokens += values.shape[3]
        self.num_documents += 1

    def mean(self, key: tuple[int, int]) -> F64:
        """[n] mean vector of one transform."""
        return self.sums[key] / max(self.num_tokens, 1)

    def covariance(self, key: tuple[int, int]) -> F64:
        """[n, n] covariance of one transform."""
        mean = self.mean(key)
        return self.products[key] / max(self.num_tokens, 1) - np.outer(mean, mean)

    def save(self, path: Path, *, context: str) -> None:
        """Write a checkpoint, atomically. ``context`` names the run that may resume it."""
        arrays: dict[str, Any] = {
            "context": np.frombuffer(context.encode(), np.uint8),
            "counts": np.array([self.num_tokens, self.num_documents], np.int64),
            "fisher": self.fisher,
        }
        for key in self.sums:
            arrays[f"sum.{key[0]}.{key[1]}"] = self.sums[key]
            arrays[f"product.{key[0]}.{key[1]}"] = self.products[key]
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial.npz")
        np.savez(partial, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, grouping: Grouping, *, context: str) -> Statistics | None:
        """Read a checkpoint; None where it belongs to another run.

        Raises:
            FormatError: the file is not a checkpoint of this grouping.
        """
        try:
            # Opened here: numpy does not close a file that turns out to be no archive.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                if data["context"].tobytes().decode() != context:
                    return None
                stats = cls(grouping)
                stats.num_tokens, stats.num_documents = (int(c) for c in data["counts"])
                stats.fisher = _like(data["fisher"], stats.fisher, path)
                for a, b in stats.sums:
                    stats.sums[a, b] = _like(data[f"sum.{a}.{b}"], stats.sums[a, b], path)
                    stats.products[a, b] = _like(
                        data[f"product.{a}.{b}"], stats.products[a, b], path
                    )
        except (
            OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error,
            MemoryError,
        ) as exc:  # fmt: skip
            raise FormatError(
                f"calibration checkpoint {path} cannot be read ({exc}); delete it to start over"
            ) from exc
        return stats


def _like(array: F64, expected: F64, path: Path) -> F64:
    if array.shape != expected.shape or array.dtype != expected.dtype:
        raise FormatError(
            f"calibration checkpoint {path}: an array is {array.shape}, expected {expected.shape};"
            " delete it to start over"
        )
    return array
