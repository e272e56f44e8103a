"""CacheGen's own decoder, as the LMCache wheel has it, in a loop beside other work of the GPU."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

from gpu_bare import serve

# An 8B shape: K and V of 32 layers, 256 tokens, 1024 channels; bins of CacheGen's first layers.
_SHAPE = (64, 256, 1024)
_BINS = 32


def find_kernels() -> Path | None:
    """The extension module of an installed LMCache; None = there is none."""
    package = importlib.util.find_spec("lmcache")
    for folder in (package.submodule_search_locations or []) if package else []:
        for path in sorted(Path(folder).glob("c_ops*.so")):
            return path
    return None


def decode_cachegen_in_a_loop(pipe) -> None:
    """Elements per second of `decode_fast_prefsum`, whose result is compared once."""
    import torch  # before the extension, which needs its libraries

    spec = importlib.util.spec_from_file_location("c_ops", find_kernels())
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    layers, tokens, channels = _SHAPE
    spread = torch.randn(_SHAPE, device="cuda") * 2 + _BINS / 2
    symbols = spread.round().clamp(0, _BINS - 1).to(torch.int8)
    tables = kernels.calculate_cdf(symbols, _BINS)
    room = torch.zeros((layers, channels, 2 * tokens), dtype=torch.uint8, device="cuda")
    lengths = torch.zeros((layers, channels), dtype=torch.int32, device="cuda")
    kernels.encode_fast_new(tables, symbols, room, lengths)
    used = torch.arange(room.shape[-1], device="cuda") < lengths[..., None]
    stream = room[used]
    ends = lengths.flatten().cumsum(0).reshape(lengths.shape)
    out = torch.zeros(_SHAPE, dtype=torch.uint8, device="cuda")

    def once() -> None:
        kernels.decode_fast_prefsum(tables, stream, ends, out)

    once()
    if not torch.equal(out.to(torch.int8), symbols):
        pipe.send("CacheGen's decoder gave other symbols than were encoded")
        return

    def run(seconds, first, options) -> float:
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            once()
            torch.cuda.synchronize()
            count += symbols.numel()
        return count / (time.perf_counter() - start)

    serve(pipe, lambda units: None, run)
