"""Units like those that will come, so that the first one does not wait for what is made once.

On a GPU these are torch's import, a CUDA context, compiled kernels and the inverse transforms.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvfetcher.codec.base import UnitSource
from kvfetcher.codec.exact import ExactProfile
from kvfetcher.codec.ladder.profile import TransformProfile
from kvfetcher.codec.profiles import make_profile
from kvfetcher.format.pictures import ONLY_VARIANT
from kvfetcher.memory.arena import storage_dtype
from kvfetcher.spec import PACKED_VARIANT, KVSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvfetcher.codec.base import Profile
    from kvfetcher.config import Config

# Kernels are compiled for each; which one the model has, the engine knows.
_HEAD_DIMS = (64, 128)


def gpu_of(config: Config) -> int | None:
    """The GPU on which the arena is expected; None = in host memory."""
    if config.engine.arena == "host" or config.engine.device == "cpu":
        return None
    return config.engine.gpu


def warm_up_units(config: Config) -> Iterator[bytes]:
    """One unit of each kind that the configuration makes likely, of values that are zero.

    Raises:
        KVFetcherError: profile or calibration are not usable.
    """
    dtype = config.engine.kv_dtype
    for head_dim in _HEAD_DIMS:
        spec = KVSpec(num_layers=1, num_kv_heads=1, head_dim=head_dim, dtype=dtype)
        yield _first_unit(ExactProfile(), spec, config.codec.chunk_tokens, ONLY_VARIANT)
    profile = make_profile(replace(config.codec, raw_copy=False))
    if isinstance(profile, TransformProfile):
        spec = replace(profile.calibration.spec, dtype=dtype)
        variants = profile.variants()
        # All picture sizes are alike to the kernels.
        for variant in (variants[0], *(v for v in variants if v == PACKED_VARIANT)):
            yield _first_unit(profile, spec, config.codec.chunk_tokens, variant)


def _first_unit(profile: Profile, spec: KVSpec, num_tokens: int, variant: str) -> bytes:
    first, count = profile.layer_groups(spec, num_tokens, variant)[0]
    shape = (count, spec.kv_factor, spec.num_kv_heads, num_tokens, spec.head_dim)
    values = np.zeros(shape, storage_dtype(spec))
    return profile.encode(UnitSource(values, spec, first, 0), variant)
