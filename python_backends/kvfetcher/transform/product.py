"""The one matrix product, by the fastest library that is there.

torch's (MKL) float32 product is 10 times numpy's wheel (OpenBLAS, which does not know newer CPUs):
125 against 12 GFLOP/s on one AVX-512 core, [256, 1200] x [1200, 1920]. numpy serves where torch is
not installed.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def multiply(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """A @ b of two float32 matrices, each contiguous in one of its axes; a new array."""
    torch = _torch()
    if torch is None:
        return np.matmul(a, b)
    out = np.empty((a.shape[0], b.shape[1]), np.float32)
    with torch.inference_mode():
        torch.matmul(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))
    return out


@cache
def _torch() -> Any:
    """The torch module, or None. Imported on first use: it takes a second and 200 MB."""
    first = "torch" not in sys.modules
    try:
        import torch
    except ImportError:
        return None
    if first:
        # Nobody else in this process uses it: units run side by side, so one thread each.
        torch.set_num_threads(1)
    return torch
