"""What the engine must be like for the connector to be right; everything else is refused by name.

TensorRT-LLM 1.2.x rejects only some of these set-ups itself; with the others it would run and answer
wrongly. The fields are those of its `TorchLlmArgs`; one that a version does not have is taken as unset.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from kvfetcher.errors import ConfigError
from kvfetcher.models.geometry import STATE_FIELDS

MIN_VERSION = (1, 2, 1)

_REQUIRED_POLICY = "GUARANTEED_NO_EVICT"

# Abstract methods of both classes over all versions that this connector was written for.
_KNOWN_ABSTRACT = {
    "KvCacheConnectorScheduler": {
        "build_connector_meta",
        "get_num_new_matched_tokens",
        "request_finished",
        "update_state_after_alloc",
    },
    "KvCacheConnectorWorker": {
        "register_kv_caches",
        "start_load_kv",
        "wait_for_layer_load",
        "save_kv_layer",
        "wait_for_save",
        "get_finished",
    },
}


def check_version(version: str) -> None:
    """Refuse a TensorRT-LLM older than 1.2.1.

    Args:
        version: as the package states it; one that is not numbers is let through, for
            `check_interface` to judge.

    Raises:
        ConfigError: it is older: 1.2.1 repairs corruption of the KV cache (#12825).
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?((?:rc|a|b|\.dev)\d*)?", version)
    if found is None:
        return
    numbers = tuple(int(part or 0) for part in found.groups()[:3])
    if numbers < MIN_VERSION or (numbers == MIN_VERSION and found[4]):
        wanted = ".".join(map(str, MIN_VERSION))
        raise ConfigError(
            f"TensorRT-LLM {version} is too old: {wanted} repairs a corruption of the KV cache; use"
            f" {wanted} or later (nvcr.io/nvidia/tritonserver:26.04-trtllm-python-py3 has it)"
        )


def check_interface(api: Any) -> None:
    """Refuse a connector interface that asks for methods this build does not have.

    Args:
        api: the module that holds the two abstract classes.

    Raises:
        ConfigError: a class is missing, or has an abstract method that is not known.
    """
    for name, known in _KNOWN_ABSTRACT.items():
        base = getattr(api, name, None)
        if not inspect.isclass(base):
            raise ConfigError(
                f"{api.__name__} has no class {name}: this version of TensorRT-LLM has another KV"
                " connector interface; use 1.2.1 or later"
            )
        unknown = sorted(getattr(base, "__abstractmethods__", frozenset()) - known)
        if unknown:
            raise ConfigError(
                f"{api.__name__}.{name} asks for {', '.join(unknown)}, which this build of KVFetcher"
                " does not implement; use TensorRT-LLM 1.2.1 or a newer KVFetcher"
            )


def interface_text(api: Any) -> str:
    """Signatures of both abstract classes, a line each, for logs and the doctor."""
    lines = [f"interface: {api.__name__}"]
    for name in _KNOWN_ABSTRACT:
        base = getattr(api, name)
        abstract: frozenset[str] = getattr(base, "__abstractmethods__", frozenset())
        for method, function in inspect.getmembers(base, inspect.isfunction):
            if not method.startswith("_"):
                mark = "abstract " if method in abstract else ""
                lines.append(f"  {mark}{name}.{method}{inspect.signature(function)}")
    return "\n".join(lines)


def refusals(llm_args: Any) -> list[str]:
    """Why the connector must not run with these arguments; [] = it may. Each says the remedy."""
    found = []
    cache = getattr(llm_args, "kv_cache_config", None)
    scheduler = getattr(llm_args, "scheduler_config", None)
    if _get(cache, "use_kv_cache_manager_v2", False) not in (True, "auto"):
        # The second manager has a policy of its own, whatever is set.
        found += _policy_refusals(scheduler)
    if _get(cache, "enable_partial_reuse", False):
        found.append(
            "kv_cache_config.enable_partial_reuse is on, so prefixes end inside blocks; set it false"
        )
    if not _get(cache, "enable_block_reuse", True):
        found.append(
            "kv_cache_config.enable_block_reuse is off, and the connector is only asked with it on;"
            " set it true"
        )
    if _get(cache, "host_cache_size", 0):
        found.append("kv_cache_config.host_cache_size moves blocks to the host; set it to 0")
    windows = _get(cache, "max_attention_window", None)
    longest = _get(llm_args, "max_seq_len", None)
    if windows and len(set(windows)) > 1:
        found.append(
            "kv_cache_config.max_attention_window varies over the layers (VSWA), so that the KV lies"
            " in several pools; use one window for all"
        )
    elif windows and (longest is None or min(windows) < longest):
        found.append(
            f"kv_cache_config.max_attention_window is {min(windows)} and max_seq_len"
            f" {'not set' if longest is None else longest}: sequences longer than the window lose"
            " blocks; remove the window, or set max_seq_len to it at most"
        )
    dtypes = (
        _text(_get(cache, "dtype", "")),
        _text(_get(_get(llm_args, "quant_config", None), "kv_cache_quant_algo", "")),
    )
    if any("nvfp4" in text.lower() for text in dtypes):
        found.append(
            "the KV cache is NVFP4, whose scales lie outside the pool; use fp8 or bfloat16"
        )
    if _get(llm_args, "max_beam_width", 1) > 1:
        found.append("max_beam_width is above 1; set it to 1")
    found.extend(
        f"{name} is above 1; use tensor_parallel_size alone"
        for name in ("pipeline_parallel_size", "context_parallel_size")
        if _get(llm_args, name, 1) > 1
    )
    if _get(llm_args, "enable_attention_dp", False):
        found.append("enable_attention_dp spreads requests over the ranks; set it false")
    if _get(llm_args, "speculative_config", None) is not None:
        found.append("speculative_config is set, which is not supported with the connector")
    if _get(llm_args, "sparse_attention_config", None) is not None:
        found.append(
            "sparse_attention_config is set, so that KV is left out or kept beside the pool; remove it"
        )
    orchestrator = _text(_get(llm_args, "orchestrator_type", ""))
    if orchestrator not in ("", "mpi"):
        found.append(
            f"orchestrator_type is {orchestrator}; the connector finds its rank through MPI: remove it"
        )
    if _text(_get(llm_args, "backend", "pytorch")) not in ("pytorch", "", "None"):
        found.append(f"backend is {llm_args.backend!r}; the KV connector exists in `pytorch` only")
    return found


def manager_refusals(llm_args: Any, *, is_v2: bool) -> list[str]:
    """`refusals` that hang on which KV cache manager the engine has made; [] = none."""
    scheduler = getattr(llm_args, "scheduler_config", None)
    return [] if is_v2 else _policy_refusals(scheduler)


def _policy_refusals(scheduler: Any) -> list[str]:
    policy = _text(getattr(scheduler, "capacity_scheduler_policy", None))
    if not policy or policy.rpartition(".")[2] == _REQUIRED_POLICY:
        return []
    reason = (
        f"scheduler_config.capacity_scheduler_policy is {policy}, with which the first KV cache manager"
        f" may evict a request whose KV is being loaded; set {_REQUIRED_POLICY}"
    )
    return [reason]


def refuse_model(config: Any) -> None:
    """Refuse a model whose layers do not all keep plain attention KV.

    Args:
        config: the model's configuration (transformers).

    Raises:
        ConfigError: recurrent or mixed layers.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    mixed = any(getattr(config, name, None) for name in STATE_FIELDS)
    if mixed or not kinds <= {"full_attention"}:
        raise ConfigError(
            f"model type {getattr(config, 'model_type', '?')!r} has layers of kinds {sorted(kinds)}"
            f"{' and recurrent ones' if mixed else ''}; with TensorRT-LLM only models of uniform full"
            " attention are supported"
        )


def _get(holder: Any, name: str, default: Any) -> Any:
    value = getattr(holder, name, None)
    return default if value is None else value


def _text(value: Any) -> str:
    """A setting as text; of an enumeration its value, or its name where values are numbers."""
    text = getattr(value, "value", value)
    if not isinstance(text, str):
        text = getattr(value, "name", text)
    return "" if text is None else str(text)
