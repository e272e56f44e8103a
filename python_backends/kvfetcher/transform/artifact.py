"""The calibration artifact: bases, steps and certificate of one model, in one safetensors file.

Immutable after reading. Its digest covers everything that restored values depend on (not the
certificate), and is part of the identity of every chunk that it codes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvfetcher.errors import ConfigError, FormatError, UnsupportedVersionError
from kvfetcher.spec import KVSpec
from kvfetcher.transform.groups import Grouping
from kvfetcher.transform.inverse import LEADING_STEPS, MIN_TRAILING, SplitInverse
from kvfetcher.transform.klt import block_multiply
from kvfetcher.transform.product import has_int8_product
from kvfetcher.transform.rope import Rope

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

F32 = NDArray[np.float32]
F16 = NDArray[np.float16]

ARTIFACT_VERSION = 1
MAX_ARTIFACT_BYTES = 16 << 30

# One per transform and profile; units say the rank, and a hostile one may say any.
_MAX_INVERSES = 128

LADDER = ("near", "balanced", "compact", "tiny")


@dataclass(frozen=True)
class StoredBasis:
    """One transform as stored. Axes: m kept components, n values."""

    rows: F16
    """[m, n] orthonormal to float16 rounding, by descending sigma."""
    sigma: F32
    """[m] deviations in units of the square root of nats."""
    mean: F32
    """[n]."""


class Matrices(NamedTuple):
    """One transform ready to multiply: z = (x - mean) @ forward.T, x = z @ inverse + mean."""

    forward: F32
    """[m, n]."""
    inverse: F32
    """[m, n]."""
    mean: F32
    """[n]."""


@dataclass(frozen=True)
class Calibration:
    """What `kvfetcher calibrate` makes. Thread-safe."""

    model: str
    """Hex SHA-256 of the weights that it was measured on."""
    grouping: Grouping
    rope: Rope
    roots: F32
    """[L, K, H, D, D] symmetric square roots of the Fisher matrices."""
    bases: Mapping[tuple[int, int], StoredBasis]
    """By (layer group, head group)."""
    steps: Mapping[str, float]
    """Quantiser step of each profile of the ladder."""
    floor: float
    """Components with sigma below ``floor`` steps are not coded."""
    sink_tokens: int
    """Tokens at the start of a sequence that are kept exact."""
    source: Mapping[str, Any]
    """How it was made: texts digest, tokens, settings."""
    certificate: Mapping[str, Any] | None = None
    """What was measured with it (`quality.certify`); None = not measured."""
    _cache: dict[tuple[int, int, int], Matrices] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _inverses: dict[tuple[int, int, int, int], SplitInverse] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _lock: threading.Lock = field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )

    @property
    def spec(self) -> KVSpec:
        return self.grouping.spec

    def unit_rank(self, layer_group: int, profile: str) -> int:
        """Components that a profile codes of a layer group: the same for all its head groups."""
        return self.rank_at(layer_group, self.steps[profile])

    def rank_at(self, layer_group: int, step: float) -> int:
        """Components coded at a step: at least 1, without those far below it in all head groups."""
        sigmas = [
            self.bases[layer_group, head_group].sigma
            for head_group in range(len(self.grouping.head_ranges))
        ]
        wanted = max(1, *(int(np.count_nonzero(sigma >= self.floor * step)) for sigma in sigmas))
        return min(wanted, *(len(sigma) for sigma in sigmas))

    def matrices(self, key: tuple[int, int], rank: int, *, keep: bool = True) -> Matrices:
        """The first ``rank`` components of one transform, ready to multiply.

        Args:
            key: (layer group, head group).
            rank: number of components.
            keep: hold the result for the next call.

        Raises:
            FormatError: it has fewer components.
        """
        if not keep:
            return self._make(key, rank)
        with self._lock:
            found = self._cache.get((*key, rank))
            if found is None:
                found = self._cache[(*key, rank)] = self._make(key, rank)
            return found

    def inverse(self, key: tuple[int, int], rank: int, step: float) -> SplitInverse:
        """The first ``rank`` components of one transform, ready to restore integers of a step.

        Raises:
            FormatError: it has fewer components.
        """
        leading = int(np.count_nonzero(self.bases[key].sigma[:rank] > LEADING_STEPS * step))
        if rank - leading < MIN_TRAILING or not has_int8_product():
            leading = rank
        with self._lock:
            found = self._inverses.get((*key, rank, leading))
            if found is None:
                matrices = self._make(key, rank)
                found = SplitInverse.split(matrices.inverse, matrices.mean, num_leading=leading)
                if len(self._inverses) == _MAX_INVERSES:
                    self._inverses.pop(next(iter(self._inverses)))
                self._inverses[*key, rank, leading] = found
            return found

    def _make(self, key: tuple[int, int], rank: int) -> Matrices:
        basis = self.bases[key]
        if not 1 <= rank <= len(basis.rows):
            raise FormatError(
                f"transform {key} of the calibration has {len(basis.rows)} components, {rank} are"
                " asked for"
            )
        start = self.grouping.layer_starts[key[0]]
        stop = start + self.grouping.layer_counts[key[0]]
        first, last = self.grouping.head_ranges[key[1]]
        dim = self.spec.head_dim
        roots = self.roots[start:stop, :, first:last].reshape(-1, dim, dim)
        inverse_roots = np.linalg.inv(roots.astype(np.float64)).astype(np.float32)
        columns = np.ascontiguousarray(basis.rows[:rank].astype(np.float32).T)
        return Matrices(
            np.ascontiguousarray(block_multiply(roots, columns).T),
            np.ascontiguousarray(block_multiply(inverse_roots, columns).T),
            basis.mean,
        )

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of all that restored values depend on."""
        state = hashlib.sha256(_dump(self._metadata()).encode())
        for name, array in sorted(self._tensors().items()):
            state.update(f"{name}{array.shape}".encode())
            state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()

    def _metadata(self) -> dict[str, Any]:
        return {
            "version": ARTIFACT_VERSION,
            "model": self.model,
            "spec": self.spec.to_dict(),
            "layer_counts": list(self.grouping.layer_counts),
            "heads_per_group": self.grouping.heads_per_group,
            "rope": self.rope.to_dict(),
            "steps": {name: float(step) for name, step in self.steps.items()},
            "floor": self.floor,
            "sink_tokens": self.sink_tokens,
            "source": dict(self.source),
        }

    def _tensors(self) -> dict[str, NDArray[Any]]:
        tensors: dict[str, NDArray[Any]] = {"roots": self.roots}
        for (a, b), basis in self.bases.items():
            tensors[f"basis.{a}.{b}.rows"] = basis.rows
            tensors[f"basis.{a}.{b}.sigma"] = basis.sigma
            tensors[f"basis.{a}.{b}.mean"] = basis.mean
        return tensors

    def with_certificate(self, certificate: Mapping[str, Any]) -> Calibration:
        """The same calibration with what was measured; its digest stays."""
        return replace(self, certificate=certificate)

    def with_steps(self, steps: Mapping[str, float]) -> Calibration:
        """The same bases with other steps, without the components that none of them codes."""
        changed = replace(self, steps=dict(steps), certificate=None)
        finest = min(steps.values())
        bases = {
            key: StoredBasis(basis.rows[:rank], basis.sigma[:rank], basis.mean)
            for key, basis in self.bases.items()
            for rank in [changed.rank_at(key[0], finest)]
        }
        return replace(changed, bases=bases)

    def save(self, path: Path) -> None:
        """Write the artifact, atomically."""
        from safetensors.numpy import save

        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"kvfetcher": _dump(self._metadata())}
        if self.certificate is not None:
            metadata["certificate"] = _dump(dict(self.certificate))
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        tensors = {name: np.ascontiguousarray(t) for name, t in self._tensors().items()}
        partial.write_bytes(save(tensors, metadata))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read and check an artifact.

        Raises:
            ConfigError: there is no such file.
            UnsupportedVersionError: a version that this build does not read.
            FormatError: it breaks any other rule of FORMAT.md.
        """
        from safetensors import SafetensorError, safe_open

        try:
            size = path.stat().st_size
        except OSError as exc:
            raise ConfigError(
                f"calibration {path} cannot be read ({exc.strerror}); make one with `kvfetcher"
                " calibrate`"
            ) from exc
        if size > MAX_ARTIFACT_BYTES:
            raise FormatError(f"calibration {path} of {size} bytes is over {MAX_ARTIFACT_BYTES}")
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as exc:
            raise FormatError(f"calibration {path} is not a safetensors file: {exc}") from exc
        try:
            return _parse(metadata, tensors)
        except UnsupportedVersionError:
            raise
        except (FormatError, ConfigError, KeyError, TypeError, ValueError, AttributeError) as exc:
            raise FormatError(f"calibration {path}: {exc}") from exc


def _parse(metadata: dict[str, str], tensors: dict[str, NDArray[Any]]) -> Calibration:
    if "kvfetcher" not in metadata:
        raise FormatError("no `kvfetcher` entry in its metadata; it is not a calibration")
    head = json.loads(metadata["kvfetcher"])
    if head["version"] != ARTIFACT_VERSION:
        raise UnsupportedVersionError(
            f"calibration is of version {head['version']!r}, this build reads {ARTIFACT_VERSION};"
            " calibrate again"
        )
    spec = KVSpec(**head["spec"])
    grouping = Grouping(spec, tuple(head["layer_counts"]), head["heads_per_group"])
    rope = Rope.from_dict(head["rope"])
    if len(rope.layers) != spec.num_layers:
        raise FormatError(f"rope facts of {len(rope.layers)} layers, expected {spec.num_layers}")
    dim = spec.head_dim
    if any(k.offset + k.rotary_dim > dim for k in rope.layers):
        raise FormatError(f"rope facts rotate more dims than a head's {dim}")
    steps = {name: float(head["steps"][name]) for name in LADDER}
    if not all(1e-30 < step < 1e30 for step in steps.values()) or len(head["steps"]) != len(steps):
        raise FormatError(f"steps must be positive numbers for {LADDER}, got {head['steps']}")
    floor, sinks = float(head["floor"]), head["sink_tokens"]
    if not 0 <= floor <= 100 or type(sinks) is not int or not 0 <= sinks <= 64:
        raise FormatError(f"floor {floor} or sink tokens {sinks!r} out of range")
    if not isinstance(head["model"], str) or not isinstance(head["source"], dict):
        raise FormatError("model digest or source is missing")
    roots = _tensor(
        tensors, "roots", np.float32, (spec.num_layers, spec.kv_factor, spec.num_kv_heads, dim, dim)
    )
    if np.linalg.eigvalsh(roots.astype(np.float64)).min() <= 0:
        raise FormatError("a root of a Fisher matrix is not positive definite")
    bases = {}
    for a in range(len(grouping.layer_counts)):
        for b in range(len(grouping.head_ranges)):
            n = grouping.dimension(a, b)
            m = len(tensors[f"basis.{a}.{b}.sigma"])
            if not 1 <= m <= n:
                raise FormatError(f"transform {a}.{b} has {m} components of {n} values")
            basis = StoredBasis(
                _tensor(tensors, f"basis.{a}.{b}.rows", np.float16, (m, n)),
                _tensor(tensors, f"basis.{a}.{b}.sigma", np.float32, (m,)),
                _tensor(tensors, f"basis.{a}.{b}.mean", np.float32, (n,)),
            )
            if np.any(np.diff(basis.sigma) > 0) or basis.sigma[-1] < 0:
                raise FormatError(f"sigma of transform {a}.{b} is not in descending order")
            bases[a, b] = basis
    if len(tensors) != 1 + 3 * len(bases):
        raise FormatError(f"{len(tensors)} tensors, expected {1 + 3 * len(bases)}")
    certificate = json.loads(metadata["certificate"]) if "certificate" in metadata else None
    if certificate is not None and not isinstance(certificate, dict):
        raise FormatError("its certificate is not a JSON object")
    return Calibration(
        head["model"], grouping, rope, roots, bases, steps, floor, sinks, head["source"],
        certificate,
    )  # fmt: skip


def _tensor(
    tensors: dict[str, NDArray[Any]], name: str, dtype: type, shape: tuple[int, ...]
) -> NDArray[Any]:
    if name not in tensors:
        raise FormatError(f"tensor {name} is missing")
    array = tensors[name]
    if array.dtype != dtype or array.shape != shape:
        raise FormatError(
            f"tensor {name} must be {shape} {np.dtype(dtype)}, got {array.shape} {array.dtype}"
        )
    if not np.isfinite(array).all():
        raise FormatError(f"tensor {name} holds values that are not finite")
    return array


def _dump(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
