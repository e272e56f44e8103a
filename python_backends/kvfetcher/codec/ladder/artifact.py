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

from kvfetcher.codec.ladder.groups import Grouping
from kvfetcher.codec.ladder.inverse import LEADING_STEPS, MIN_TRAILING, SplitInverse
from kvfetcher.codec.ladder.klt import block_multiply
from kvfetcher.codec.ladder.product import has_int8_product
from kvfetcher.codec.ladder.rope import Rope
from kvfetcher.errors import ConfigError, FormatError, UnsupportedVersionError
from kvfetcher.spec import LADDER, KVSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

F32 = NDArray[np.float32]
F16 = NDArray[np.float16]

ARTIFACT_VERSION = 1
MAX_ARTIFACT_BYTES = 16 << 30
MAX_METADATA_CHARACTERS = 4 << 20
"""Of each of its two JSON texts; the model with most layers and frequencies needs 1.5 million."""

# What is certain of every root that `klt.fisher_roots` makes: equal halves up to the rounding to
# float32 (relative to the largest value), and a condition of at most sqrt(D / 0.1) = 200.
_ROOT_ASYMMETRY = 1e-6
_ROOT_CONDITION = 1e4
_ROOT_LIMITS = (1e-30, 1e30)


@dataclass(frozen=True)
class StoredBasis:
    """One transform as stored. Axes: m kept components, n values."""

    rows: F16
    """[m, n] orthonormal to float16 rounding, by descending sigma."""
    sigma: F32
    """[m] deviations in units of the square root of nats."""
    mean: F32
    """[n]."""


class Forward(NamedTuple):
    """The encoder's half of a transform: z = (x - mean) @ matrix.T."""

    matrix: F32
    """[m, n]."""
    mean: F32
    """[n]."""


class Matrices(NamedTuple):
    """Both directions of a transform: z = (x - mean) @ forward.T, x = z @ inverse + mean."""

    forward: F32
    """[m, n]."""
    inverse: F32
    """[m, n]."""
    mean: F32
    """[n]."""


class InverseFactors(NamedTuple):
    """The inverse of a transform is ``(blockdiag(blocks) @ rows.T).T``."""

    blocks: F32
    """[n / D, D, D]."""
    rows: NDArray[np.float16]
    """[m, n]."""


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
    """Bases by (layer group, head group)."""
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
    _forwards: dict[tuple[int, int, int], Forward] = field(
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

    def matrices(self, key: tuple[int, int], rank: int) -> Matrices:
        """The first ``rank`` components of one transform, made anew at each call.

        Args:
            key: (layer group, head group).
            rank: number of components.

        Raises:
            FormatError: it has fewer components.
        """
        return Matrices(
            self._times(self._roots(key), key, rank),
            self._times(_inverses(self._roots(key)), key, rank),
            self.bases[key].mean,
        )

    def inverse_factors(self, key: tuple[int, int], rank: int) -> InverseFactors:
        """`Matrices.inverse` before it is multiplied out, for callers that have something faster.

        Raises:
            FormatError: the transform has fewer components.
        """
        return InverseFactors(_inverses(self._roots(key)), self._rows(key, rank))

    def forward(self, key: tuple[int, int], rank: int) -> Forward:
        """The encoder's half of `matrices`, kept for the next call: 4 m n bytes.

        Raises:
            FormatError: it has fewer components.
        """
        with self._lock:
            found = self._forwards.get((*key, rank))
            if found is None:
                matrix = self._times(self._roots(key), key, rank)
                found = self._forwards[*key, rank] = Forward(matrix, self.bases[key].mean)
            return found

    def num_leading(self, key: tuple[int, int], rank: int, step: float) -> int:
        """How many of a transform's first components must not be multiplied in 8 bits."""
        leading = int(np.count_nonzero(self.bases[key].sigma[:rank] > LEADING_STEPS * step))
        return rank if rank - leading < MIN_TRAILING else leading

    def inverse(self, key: tuple[int, int], rank: int, step: float) -> SplitInverse:
        """What restores the integers of one transform, kept for the next call.

        Units may name any rank and step. What is kept takes at most `inverse_bytes`: one profile
        always fits, and of more what was used last stays.

        Raises:
            FormatError: the transform has fewer components.
        """
        leading = self.num_leading(key, rank, step) if has_int8_product() else rank
        name = (*key, rank, leading)
        with self._lock:
            found = self._inverses.pop(name, None)
            if found is None:
                rows = self._times(_inverses(self._roots(key)), key, rank)
                found = SplitInverse.split(rows, self.bases[key].mean, num_leading=leading)
                room = self.inverse_bytes - _num_bytes(found)
                while sum(map(_num_bytes, self._inverses.values())) > room:
                    self._inverses.pop(next(iter(self._inverses)))
            self._inverses[name] = found
            return found

    @cached_property
    def inverse_bytes(self) -> int:
        """Size in float32 of the inverses of all components of every transform."""
        return sum(4 * (len(b.sigma) + 2) * len(b.mean) for b in self.bases.values())

    def _roots(self, key: tuple[int, int]) -> F32:
        """[n / D, D, D] of one transform."""
        start = self.grouping.layer_starts[key[0]]
        stop = start + self.grouping.layer_counts[key[0]]
        first, last = self.grouping.head_ranges[key[1]]
        dim = self.spec.head_dim
        return self.roots[start:stop, :, first:last].reshape(-1, dim, dim)

    def _times(self, blocks: F32, key: tuple[int, int], rank: int) -> F32:
        """[m, n]: the first rows of a basis times a block-diagonal matrix."""
        columns = np.ascontiguousarray(self._rows(key, rank).astype(np.float32).T)
        return np.ascontiguousarray(block_multiply(blocks, columns).T)

    def _rows(self, key: tuple[int, int], rank: int) -> NDArray[np.float16]:
        rows = self.bases[key].rows
        if not 1 <= rank <= len(rows):
            raise FormatError(
                f"transform {key} of the calibration has {len(rows)} components, {rank} are"
                " asked for"
            )
        return rows[:rank]

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
            "floor": float(self.floor),
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
            FormatError: it breaks any other rule of docs/format.md.
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
                return _parse(file.metadata() or {}, file)
        except UnsupportedVersionError:
            raise
        except (SafetensorError, OSError) as exc:
            raise FormatError(f"calibration {path} is not a safetensors file: {exc}") from exc
        except (
            FormatError, ConfigError, LookupError, TypeError, ValueError, AttributeError,
            OverflowError, RecursionError,
        ) as exc:  # fmt: skip
            raise FormatError(f"calibration {path}: {exc}") from exc


def _parse(metadata: Mapping[str, str], file: Any) -> Calibration:
    """An artifact from its metadata and tensors, which are read once their shapes are right."""
    if "kvfetcher" not in metadata:
        raise FormatError("no `kvfetcher` entry in its metadata; it is not a calibration")
    head = _json(metadata["kvfetcher"])
    if head["version"] != ARTIFACT_VERSION:
        raise UnsupportedVersionError(
            f"calibration is of version {head['version']!r}, this build reads {ARTIFACT_VERSION};"
            " calibrate again"
        )
    spec = KVSpec(**head["spec"])
    counts = head["layer_counts"]
    numbers = (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.kv_factor, *counts)
    if not all(type(n) is int for n in (*numbers, head["heads_per_group"])):
        raise FormatError(f"geometry and groups must be integers, got {numbers}")
    grouping = Grouping(spec, tuple(counts), head["heads_per_group"])
    rope = Rope.from_dict(head["rope"])
    if len(rope.layers) != spec.num_layers:
        raise FormatError(f"rope facts of {len(rope.layers)} layers, expected {spec.num_layers}")
    dim = spec.head_dim
    if any(k.offset + k.rotary_dim > dim for k in rope.layers):
        raise FormatError(f"rope facts rotate more dims than a head's {dim}")
    steps = {name: float(head["steps"][name]) for name in LADDER}
    if not all(1e-30 < step < 1e30 for step in steps.values()):
        raise FormatError(f"steps must be positive numbers for {LADDER}, got {head['steps']}")
    floor, sinks = float(head["floor"]), head["sink_tokens"]
    if not 0 <= floor <= 100 or type(sinks) is not int or not 0 <= sinks <= 64:
        raise FormatError(f"floor {floor} or sink tokens {sinks!r} out of range")
    if not isinstance(head["model"], str) or not isinstance(head["source"], dict):
        raise FormatError("model digest or source is missing")
    certificate = _json(metadata["certificate"]) if "certificate" in metadata else None
    calibration = Calibration(
        head["model"], grouping, rope, *_read_tensors(file, grouping), steps, floor, sinks,
        head["source"], certificate,
    )  # fmt: skip
    # The digest is over what is stored, so there is one way to store it.
    if _dump(calibration._metadata()) != metadata["kvfetcher"]:
        raise FormatError(
            "its `kvfetcher` entry is not canonical JSON of the keys that docs/format.md lists, and no"
            " others; get the artifact again"
        )
    return calibration


def _read_tensors(file: Any, grouping: Grouping) -> tuple[F32, dict[tuple[int, int], StoredBasis]]:
    """Roots and bases."""
    spec, dim = grouping.spec, grouping.spec.head_dim
    keys = [
        (a, b) for a in range(len(grouping.layer_counts)) for b in range(len(grouping.head_ranges))
    ]
    names = set(file.keys())
    if len(names) != 1 + 3 * len(keys):
        raise FormatError(f"{len(names)} tensors, expected {1 + 3 * len(keys)}")
    shape = (spec.num_layers, spec.kv_factor, spec.num_kv_heads, dim, dim)
    roots = _tensor(file, names, "roots", np.float32, shape)
    for layer, blocks in enumerate(roots):
        _check_roots(blocks, layer)
    bases = {}
    for a, b in keys:
        n, name = grouping.dimension(a, b), f"basis.{a}.{b}"
        if f"{name}.sigma" not in names:
            raise FormatError(f"tensor {name}.sigma is missing")
        m = file.get_slice(f"{name}.sigma").get_shape()[0]
        if not 1 <= m <= n:
            raise FormatError(f"transform {a}.{b} has {m} components of {n} values")
        sigma = _tensor(file, names, f"{name}.sigma", np.float32, (m,))
        if np.any(sigma[1:] > sigma[:-1]) or sigma[-1] < 0:
            raise FormatError(f"sigma of transform {a}.{b} is not in descending order")
        bases[a, b] = StoredBasis(
            _tensor(file, names, f"{name}.rows", np.float16, (m, n)),
            sigma,
            _tensor(file, names, f"{name}.mean", np.float32, (n,)),
        )
    return roots, bases


def _check_roots(blocks: F32, layer: int) -> None:
    """Refuse roots [K, H, D, D] of a layer whose inverses float32 does not hold."""
    wide = blocks.astype(np.float64)
    flipped = np.swapaxes(wide, -1, -2)
    largest = np.abs(wide).max(axis=(-1, -2))
    if np.any(np.abs(wide - flipped).max(axis=(-1, -2)) > _ROOT_ASYMMETRY * largest):
        raise FormatError(f"a root of a Fisher matrix of layer {layer} is not symmetric")
    values = np.linalg.eigvalsh((wide + flipped) / 2)
    low, high = values[..., 0], values[..., -1]
    if np.any(low * _ROOT_CONDITION < high) or low.min() < _ROOT_LIMITS[0]:
        raise FormatError(f"a root of a Fisher matrix of layer {layer} is not positive definite")
    if high.max() > _ROOT_LIMITS[1]:
        raise FormatError(f"a root of a Fisher matrix of layer {layer} is over {_ROOT_LIMITS[1]}")


def _tensor(
    file: Any, names: set[str], name: str, dtype: type, shape: tuple[int, ...]
) -> NDArray[Any]:
    if name not in names:
        raise FormatError(f"tensor {name} is missing")
    stored = file.get_slice(name)
    code = f"F{8 * np.dtype(dtype).itemsize}"
    if stored.get_dtype() != code or tuple(stored.get_shape()) != shape:
        raise FormatError(
            f"tensor {name} must be {shape} {code}, got {tuple(stored.get_shape())}"
            f" {stored.get_dtype()}"
        )
    array: NDArray[Any] = file.get_tensor(name)
    if not np.isfinite(array).all():
        raise FormatError(f"tensor {name} holds values that are not finite")
    return array


def _num_bytes(inverse: SplitInverse) -> int:
    return sum(part.nbytes for part in inverse)


def _inverses(blocks: F32) -> F32:
    return np.linalg.inv(blocks.astype(np.float64)).astype(np.float32)


def _json(text: str) -> dict[str, Any]:
    """A JSON object of the metadata."""
    if len(text) > MAX_METADATA_CHARACTERS:
        raise FormatError(
            f"a metadata entry of {len(text)} characters is over {MAX_METADATA_CHARACTERS}"
        )
    data = json.loads(text, parse_constant=_refuse_constant)
    if not isinstance(data, dict):
        raise FormatError("a metadata entry is not a JSON object")
    return data


def _refuse_constant(name: str) -> None:
    raise FormatError(f"its metadata holds {name}, which is not a JSON number")


def _dump(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
