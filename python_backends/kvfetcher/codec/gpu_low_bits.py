"""Integers with low bits on a GPU: what they add to the restored values, in float32.

Torch's own operations, so that it is tested where there is no GPU: with 8 low bits an integer is beyond
what float16 holds, in which `gpu_kernels` multiplies the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvfetcher.transform.inverse import LowBits

# Rows of the inverse transform in float32 at one time: 34 MB of the widest there is.
_ROWS_AT_ONCE = 512


def take_wide_rows(
    samples: torch.Tensor, low_bits: LowBits, matrix: torch.Tensor, bias: torch.Tensor
) -> None:
    """Add the product of the rows that have low bits to ``bias``; these samples become 0.

    Args:
        samples: float16 [m, T] centred samples of one transform, changed in place.
        low_bits: of its first w rows.
        matrix: float16 [n, m or more].
        bias: float32 [T, n], changed in place.
    """
    device = samples.device
    factors = torch.from_numpy(low_bits.factors).to(device)
    low = torch.from_numpy(low_bits.low).to(device)
    for first in range(0, len(low), _ROWS_AT_ONCE):
        rows = slice(first, min(first + _ROWS_AT_ONCE, len(low)))
        integers = samples[rows].float() * factors[rows] + low[rows]
        bias.addmm_(integers.T, matrix[:, rows].float().T)
    samples[: len(low)] = 0
