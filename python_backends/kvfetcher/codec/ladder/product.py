"""The costly arithmetic of the transform profiles, by the fastest library that is there.

torch's (MKL) float32 product is 10 times numpy's wheel (OpenBLAS, which does not know newer CPUs):
125 against 12 GFLOP/s on one AVX-512 core, [256, 1200] x [1200, 1920]. numpy serves where torch is
not installed.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfetcher.codec.quant import float32_to_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvfetcher.format.pictures import Integers
    from kvfetcher.spec import KVDtype


def multiply(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """A @ b of two float32 matrices, each contiguous in one of its axes; a new array."""
    torch = _torch()
    if torch is None:
        return np.matmul(a, b)
    out = np.empty((a.shape[0], b.shape[1]), np.float32)
    with torch.inference_mode():
        torch.matmul(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))
    return out


def multiply_add(
    a: NDArray[np.float32], b: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    """A @ b + bias, the bias added to every row; as `multiply`."""
    torch = _torch()
    if torch is None:
        return np.matmul(a, b) + bias
    out = np.empty((a.shape[0], b.shape[1]), np.float32)
    with torch.inference_mode():
        torch.addmm(*map(torch.from_numpy, (bias, a, b)), out=torch.from_numpy(out))
    return out


def has_int8_product() -> bool:
    """Whether this CPU multiplies 8-bit integers, and torch is there to do it.

    Without VNNI the library's 8-bit product is slow, and saturates on older CPUs.
    """
    torch = _torch()
    return torch is not None and bool(torch.cpu.get_capabilities().get("avx512_vnni", False))


def add_scaled_product_int8(
    out: NDArray[np.float32], a: NDArray[np.int8], b: NDArray[np.int8], scale: NDArray[np.float32]
) -> None:
    """``out += (a @ b) * scale``, the scale along rows; the product is exact.

    Args:
        out: [T, n], C-contiguous, changed in place.
        a: [T, m], contiguous in one of its axes; m is at most 2^17.
        b: [m, n].
        scale: [n].
    """
    torch = _torch()
    if torch is None or len(a) == 1:  # torch 2.13's product of a single row is wrong
        out += np.matmul(a.astype(np.int32), b.astype(np.int32)) * scale
        return
    with torch.inference_mode():
        product = torch._int_mm(torch.from_numpy(a), torch.from_numpy(b))
        torch.from_numpy(out).addcmul_(product.float(), torch.from_numpy(scale))


def round_to_bits(values: NDArray[np.float32], dtype: KVDtype) -> Integers:
    """`quant.float32_to_bits`, for bfloat16 in one pass of torch (10 times faster).

    Args:
        values: C-contiguous.
        dtype: what to round to.
    """
    torch = _torch()
    if torch is None or dtype != "bfloat16":
        return float32_to_bits(values, dtype)
    rounded = torch.from_numpy(values).to(torch.bfloat16)
    return rounded.view(torch.uint16).numpy()


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
