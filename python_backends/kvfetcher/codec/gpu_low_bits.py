"""Integers with low bits on a GPU: what they add to the restored values, in float32.

Torch's own operations, so that it is tested where there is no GPU: with 8 low bits an integer is beyond
what float16 holds, in which `gpu_kernels` multiplies the others. The bits travel packed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from kvfetcher.codec.low_bits import PackedLowBits

# Of float32: integers, and rows of the inverse transform, at one time.
_ELEMENTS_AT_ONCE = 8 << 20


def take_wide_rows(
    samples: torch.Tensor, low_bits: PackedLowBits, matrix: torch.Tensor, bias: torch.Tensor
) -> None:
    """Add the product of the rows that have low bits to ``bias``; these samples become 0.

    Args:
        samples: float16 [m, T] centred samples of one transform, changed in place.
        low_bits: of its first w rows.
        matrix: float16 [n, m or more].
        bias: float32 [T, n], changed in place.
    """
    device = samples.device
    low = unpack(low_bits, samples.shape[1], device)
    factors = np.ldexp(np.float32(1), low_bits.shifts[:, None])
    scale = torch.from_numpy(factors).to(device, non_blocking=True)
    step = max(1, _ELEMENTS_AT_ONCE // max(samples.shape[1], len(matrix)))
    for first in range(0, len(low), step):
        rows = slice(first, min(first + step, len(low)))
        integers = samples[rows].float() * scale[rows] + low[rows]
        bias.addmm_(integers.T, matrix[:, rows].float().T)
    samples[: len(low)] = 0


def unpack(low_bits: PackedLowBits, num_tokens: int, device: torch.device) -> torch.Tensor:
    """`PackedLowBits.unpack` on a device: uint8 [w, T]."""
    planes = torch.from_numpy(np.array(low_bits.planes)).to(device, non_blocking=True)
    low = torch.zeros((len(low_bits.shifts), num_tokens), dtype=torch.uint8, device=device)
    places = torch.arange(8, dtype=torch.uint8, device=device)
    at = 0
    for bit, count in enumerate(low_bits.counts):
        bits = (planes[at : at + count, :, None] >> places) & 1
        low[:count] |= bits.view(count, -1)[:, :num_tokens] << bit
        at += count
    return low
