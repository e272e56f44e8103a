"""What `kvfetcher serve` checks before it starts tritonserver, each fault said in one line.

A fault found here costs a second; found by a model it costs half a minute, and stands in the middle
of Triton's log. What may pass by itself (a store that does not answer just now) is a warning,
because a server without its store computes every prompt and goes on.
"""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvfetcher.doctor.store import round_trip
from kvfetcher.errors import (
    ConfigError,
    KVFetcherError,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
    TransientStoreError,
)

if TYPE_CHECKING:
    from kvfetcher.config import Config

_PASSING = (StoreTimeoutError, StoreUnavailableError, TransientStoreError)
_PROBE_BYTES = 4096

_ENGINE_PACKAGES = {
    "torch": (("torch", "transformers", "safetensors"), "pip install 'kvfetcher[engine]'"),
    "paged": (("torch", "transformers", "safetensors"), "pip install 'kvfetcher[engine]'"),
    "tensorrt_llm": (
        ("tensorrt_llm",),
        "start in a container with TensorRT-LLM (docs/tensorrt_llm.md), or set engine.kind",
    ),
}


def check_engine_can_start(config: Config) -> None:
    """The engine's packages, and the GPU where the configuration names one.

    Raises:
        ConfigError: names the setting and the remedy.
    """
    from kvfetcher.codec.gpu.nvdec import has_driver, loads_library

    packages, remedy = _ENGINE_PACKAGES[config.engine.kind]
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ConfigError(
            f'engine.kind = "{config.engine.kind}" needs the Python package {", ".join(missing)},'
            f" which is not installed; {remedy}"
        )
    needs_gpu = {
        f'engine.device = "{config.engine.device}"': config.engine.device.startswith("cuda"),
        'engine.arena = "gpu"': config.engine.arena == "gpu",
    }
    for setting, is_set in needs_gpu.items():
        if is_set and not has_driver():
            raise ConfigError(
                f"{setting} needs an NVIDIA GPU, and this machine has no NVIDIA driver (libcuda.so.1);"
                " set engine.device and engine.arena to auto or leave them out"
            )
    if config.codec.decoder == "nvdec" and not loads_library("libnvcuvid.so.1"):
        raise ConfigError(
            'codec.decoder = "nvdec" needs the NVIDIA driver\'s video library (libnvcuvid.so.1), which'
            ' is not on this machine; set codec.decoder = "auto"'
        )


def check_store_is_of_use(config: Config) -> str:
    """Write, read and delete a small object.

    Returns:
        "" where that works; else what may pass by itself, for a warning.

    Raises:
        StoreError, ConfigError: the store will be of no use as it is configured.
    """
    from kvfetcher.storage import open_backend

    if not (config.fetch.enabled or config.save.enabled):
        return ""
    place = config.store.url or str(config.store.folder)
    try:
        asyncio.run(round_trip(lambda: open_backend(config.store), num_bytes=_PROBE_BYTES))
    except _PASSING as exc:
        return (
            f"{exc}; until the store answers every prompt is computed (`kvfetcher doctor --store`"
            " tries it again)"
        )
    except StoreError as exc:
        raise StoreError(
            f"the store {place} cannot be used: {exc}. `serve` does not start with a store that"
            " nothing can be fetched from or saved to; fix it, or set fetch.enabled and"
            " save.enabled to false"
        ) from exc
    return ""


def check_before_start(config: Config) -> list[str]:
    """All of it.

    Returns:
        Warnings, each one line.

    Raises:
        KVFetcherError: the server could not work; one line.
    """
    try:
        check_engine_can_start(config)
        warning = check_store_is_of_use(config)
    except KVFetcherError as exc:
        raise type(exc)(" ".join(str(exc).split())) from exc
    return [" ".join(warning.split())] if warning else []
