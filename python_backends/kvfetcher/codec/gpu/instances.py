"""How many processes decode and restore on this machine, as configured or as it is best served."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfetcher.config import Config

_MAX_CPU_DECODERS = 4
_DECODERS_PER_ENGINE = 2


def decode_instances(config: Config) -> int:
    """How many kv_decode processes to run.

    ``server.decode_instances``; 0 = one per NVDEC engine of the GPUs that decode where the
    configuration allows NVDEC and the driver has it, else one per CPU core, at most 4. Where planes
    stay on the GPU, two share an engine: one prepares its pictures while the other one's are decoded
    (bare: 14 to 16 % more with 14 processes than with 7, H200, bench_gpu.py).
    """
    if config.server.decode_instances:
        return config.server.decode_instances
    engines = nvdec_engines(config)
    if engines and config.engine.arena != "host":
        return _DECODERS_PER_ENGINE * engines
    return engines or min(_MAX_CPU_DECODERS, len(os.sched_getaffinity(0)))


def restore_instances(config: Config) -> int:
    """How many kv_restore processes to run.

    ``server.restore_instances``; 0 = two where NVDEC leaves planes on the GPU, else one. With two of
    14 decoders' pictures of 1024x1634 all are restored in time, with one 60 %; four take each other's
    turns on the GPU. Under MPS there are no turns, and four restore 1.3 times as much of chunks of
    256 tokens, 1.5 times as much of pictures of 256x817 (H100, bench_gpu.py).
    """
    if config.server.restore_instances:
        return config.server.restore_instances
    if config.engine.arena == "host" or not nvdec_engines(config):
        return 1
    return 4 if config.server.mps == "on" else 2


def parallel_decoders(config: Config) -> int:
    """How many units decode side by side, each as fast as the table of decode times says.

    Processes that share an engine count once.
    """
    return min(decode_instances(config), nvdec_engines(config) or decode_instances(config))


def nvdec_engines(config: Config) -> int:
    """NVDEC engines of all GPUs that decode; 0 where the CPU does.

    GPUs that lack NVDEC, or are not there, count nothing.
    """
    if config.codec.decoder == "cpu":
        return 0
    from kvfetcher.codec.gpu.nvdec import count_engines  # numpy comes with it

    gpus = config.nvdec_gpus
    with ThreadPoolExecutor(len(gpus)) as pool:  # each takes a second or two
        return sum(pool.map(count_engines, gpus))
