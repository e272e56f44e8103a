"""TensorRT-LLM (1.2.x, PyTorch backend) behind its LLM API, with the KV connector.

The LLM runs in worker processes of its own; this process owns the KV arena, which the connector in the
workers reaches through the run folder (`trtllm_connector`). Requests go in as token ids, so that what was
looked up in the store is what the engine runs.

Nothing here was run against TensorRT-LLM itself: docs/tensorrt_llm.md says what is proven and how.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import logging
import math
import os
import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from kvfetcher.config import RUN_DIR_VARIABLE
from kvfetcher.engines.connector import checks
from kvfetcher.engines.connector import entry as trtllm_connector
from kvfetcher.engines.tokens import PRIOR_TOKENS_PER_SECOND, TokenStep
from kvfetcher.errors import ConfigError, EngineError, RequestError
from kvfetcher.models.geometry import cache_geometry
from kvfetcher.models.identity import config_rope_facts, rope_text, tokenizer_digest, weights_digest
from kvfetcher.models.limits import max_positions
from kvfetcher.models.tokenizer import check_tokenizer, end_token_ids
from kvfetcher.prefill_rate import PrefillEstimator
from kvfetcher.spec import ModelIdentity, heads_of_rank

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from kvfetcher.config import Config
    from kvfetcher.engines.base import FinishReason, SamplingParams
    from kvfetcher.prefill_rate import PrefillModel
    from kvfetcher.spec import KVDtype, KVSpec, RopeFacts

CONNECTOR = {
    "connector_module": "kvfetcher.trtllm_connector",
    "connector_scheduler_class": "KVFetcherScheduler",
    "connector_worker_class": "KVFetcherWorker",
}

# kv_cache_config.dtype by engine.kv_dtype; "auto" is the type that the model computes in.
_CACHE_DTYPES: dict[KVDtype, str] = {
    "bfloat16": "auto",
    "float16": "auto",
    "float8_e4m3fn": "fp8",
}
# Arguments of LLM() that say how fast it runs and how much it holds, or that the identity has by
# another name (weights, KV type). All others may change KV, and so do ones not heard of yet.
_PERFORMANCE_ARGUMENTS: dict[str, frozenset[str]] = {
    "": frozenset(
        {
            "backend",
            "batch_wait_max_tokens_ratio",
            "batch_wait_timeout_iters",
            "batch_wait_timeout_ms",
            "cuda_graph_config",
            "disable_overlap_scheduler",
            "enable_chunked_prefill",
            "enable_iter_perf_stats",
            "enable_iter_req_stats",
            "gpus_per_node",
            "iter_stats_max_iterations",
            "kv_connector_config",
            "max_batch_size",
            "max_num_tokens",
            "model",
            "num_postprocess_workers",
            "perf_metrics_max_requests",
            "print_iter_log",
            "request_stats_max_iterations",
            "return_perf_metrics",
            "scheduler_config",
            "stream_interval",
            "tensor_parallel_size",
        }
    ),
    "kv_cache_config": frozenset(
        {
            "copy_on_partial_reuse",
            "dtype",
            "enable_block_reuse",
            "enable_partial_reuse",
            "event_buffer_max_size",
            "free_gpu_memory_fraction",
            "host_cache_size",
            "max_gpu_total_bytes",
            "max_tokens",
            "tokens_per_block",
        }
    ),
}
_METRICS = {
    "kv_cache_metrics": (
        "total_allocated_blocks",
        "new_allocated_blocks",
        "reused_blocks",
        "missed_blocks",
        "hit_rate",
    ),
    "timing_metrics": (
        "arrival_time",
        "first_scheduled_time",
        "first_token_time",
        "last_token_time",
    ),
}
# Shorter prompts are dominated by fixed costs and say little of the rate.
_MIN_RATE_TOKENS = 256

_log = logging.getLogger(__name__)


class LlmArguments(NamedTuple):
    """What `LLM()` is called with."""

    values: dict[str, Any]
    num_ranks: int
    """Tensor-parallel processes."""


@dataclass(frozen=True, slots=True)
class TrtllmModel:
    """What must be known of a model that TensorRT-LLM serves; see `connected.ServedModel`."""

    folder: Path
    tokenizer: Any
    device: str
    spec: KVSpec
    identity: ModelIdentity
    rope: RopeFacts
    eos_ids: tuple[int, ...]
    vocab_size: int
    max_positions: int


def import_tensorrt_llm() -> Any:
    """The package `tensorrt_llm`.

    Raises:
        ConfigError: it is not installed, cannot be imported, or is too old.
    """
    try:
        package = importlib.import_module("tensorrt_llm")
    except Exception as exc:
        # Its import loads CUDA libraries and fails in many ways on a machine without them.
        raise ConfigError(
            'engine.kind = "tensorrt_llm", but tensorrt_llm cannot be imported'
            f" ({type(exc).__name__}: {exc}); run in an image that has it"
            ' (nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3), or set engine.kind = "torch"'
        ) from exc
    checks.check_version(str(package.__version__))
    return package


def llm_arguments(config: Config, folder: Path) -> LlmArguments:
    """Arguments of `LLM()`: those of `engine.llm_args`, and what the connector needs.

    Args:
        config: the whole configuration.
        folder: folder of the model.

    Raises:
        ConfigError: the file cannot be read, or says otherwise than what must be.
    """
    values = _read_yaml(config.engine.llm_args) if config.engine.llm_args else {}
    values.pop("triton_config", None)  # of Triton's own llmapi model; ours is in config.pbtxt
    if values.get("kv_connector_config", CONNECTOR) != CONNECTOR:
        raise ConfigError(
            f"{config.engine.llm_args}: kv_connector_config names another connector; leave it out"
        )
    required: dict[str, dict[str, Any]] = {
        "kv_cache_config": {
            "enable_block_reuse": True,
            "enable_partial_reuse": False,
            "tokens_per_block": config.engine.tokens_per_block,
            "dtype": _CACHE_DTYPES[config.engine.kv_dtype],
        },
        "scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
    }
    for section, wanted in required.items():
        given = values.get(section) or {}
        if not isinstance(given, dict):
            raise ConfigError(f"{config.engine.llm_args}: {section} must be a mapping")
        for key, value in wanted.items():
            if given.get(key, value) != value:
                raise ConfigError(
                    f"{config.engine.llm_args}: {section}.{key} = {given[key]!r}, the KV connector"
                    f" needs {value!r}; remove the line"
                    + (" or set engine.tokens_per_block" if key == "tokens_per_block" else "")
                    + (" or set engine.kv_dtype" if key == "dtype" else "")
                )
        values[section] = {**given, **wanted}
    if values.get("model", config.engine.model) not in (config.engine.model, str(folder)):
        raise ConfigError(
            f"{config.engine.llm_args}: model = {values['model']!r}, but engine.model ="
            f" {config.engine.model!r}, whose tokens and geometry are used; remove the line"
        )
    reasons = checks.refusals(_as_object(values))
    if reasons:
        raise ConfigError(f"{config.engine.llm_args or 'engine'}: " + "; ".join(reasons))
    values |= {
        "model": str(folder),
        "backend": "pytorch",
        "kv_connector_config": dict(CONNECTOR),
    }
    num_ranks = values.get("tensor_parallel_size", 1)
    if type(num_ranks) is not int or num_ranks < 1:
        raise ConfigError(f"tensor_parallel_size must be at least 1, got {num_ranks!r}")
    return LlmArguments(values, num_ranks)


def kv_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `LLM()` that may change KV: all but those known for speed and size alone.

    The number of ranks is left out: it changes the order of sums, as the batch size does.
    """
    kept = {}
    for name, value in values.items():
        if name in _PERFORMANCE_ARGUMENTS and isinstance(value, dict):
            fast = _PERFORMANCE_ARGUMENTS[name]
            value = {key: item for key, item in value.items() if key not in fast}
            if not value:
                continue
        if name not in _PERFORMANCE_ARGUMENTS[""]:
            kept[name] = value
    return kept


def read_model(
    folder: Path, config: Config, *, version: str, arguments: LlmArguments
) -> TrtllmModel:
    """Geometry and identity of a model folder, without its weights in memory.

    Args:
        folder: Hugging Face's.
        config: engine.kv_dtype.
        version: version of TensorRT-LLM; part of the identity, as its kernels are.
        arguments: arguments of `LLM()`; those that may change KV are part of the identity.

    Raises:
        ConfigError: the model cannot run behind the connector.
        EngineError: the folder cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer

    num_ranks = arguments.num_ranks
    try:
        whole = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        check_tokenizer(tokenizer, folder)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as exc:
        raise EngineError(f"model folder {folder} cannot be read: {exc}") from exc
    model = whole.get_text_config()  # the whole, but for models of several kinds of input
    for part in (whole, model):
        checks.refuse_model(part)
    try:
        spec = cache_geometry(model, config.engine.kv_dtype).spec
        vocab_size, longest = int(model.vocab_size), max_positions(model)
    except (AttributeError, TypeError) as exc:
        raise ConfigError(
            f"model folder {folder}: config.json of model type"
            f" {getattr(model, 'model_type', '?')!r} lacks what a KV cache is sized by ({exc}); only"
            " decoder models of uniform full attention are supported"
        ) from exc
    heads_of_rank(spec.num_kv_heads, rank=0, num_ranks=num_ranks)  # raises where it cannot be
    computes_in = _compute_dtype(arguments, model, whole)
    if spec.dtype != "float8_e4m3fn" and computes_in != spec.dtype:
        raise ConfigError(
            f"engine.kv_dtype = {spec.dtype!r}, but the model computes in {computes_in} and"
            " TensorRT-LLM keeps KV in that type or in fp8; set engine.kv_dtype to it or to"
            ' "float8_e4m3fn"'
        )
    identity = ModelIdentity(
        weights=weights_digest(folder),
        tokenizer=tokenizer_digest(folder),
        lora="",
        rope=rope_text(model),
        compute=(
            f"tensorrt_llm {version} pytorch {computes_in}, KV as {spec.dtype}, arguments"
            f" {_digest(kv_arguments(arguments.values))}"
        ),
        spec=spec,
    )
    return TrtllmModel(
        folder=folder,
        tokenizer=tokenizer,
        device=f"cuda x {num_ranks}",
        spec=spec,
        identity=identity,
        rope=config_rope_facts(model, num_layers=spec.num_layers, head_dim=spec.head_dim),
        eos_ids=end_token_ids(
            _generation_eos(folder),
            getattr(model, "eos_token_id", None),
            getattr(whole, "eos_token_id", None),
            tokenizer.eos_token_id,
        ),
        vocab_size=vocab_size,
        max_positions=longest,
    )


def _generation_eos(folder: Path) -> Any:
    """`eos_token_id` of generation_config.json; None where it says none."""
    try:
        return json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return None


class LlmRun:
    """One request of the LLM API; see `tokens.TokenRun`."""

    def __init__(self, result: Any) -> None:
        self._result = result
        self.queue_seconds = 0.0
        self.metrics: dict[str, dict[str, float]] = {}

    async def steps(self) -> AsyncIterator[TokenStep]:
        seen = 0
        try:
            async for output in self._result:
                completion = output.outputs[0]
                # Cumulative in every version; the differences are counted here.
                new = tuple(int(token) for token in completion.token_ids[seen:])
                self._note_metrics(completion)
                seen += len(new)
                reason = completion.finish_reason
                if new or reason:
                    yield TokenStep(new, _reason(reason))
                if reason:
                    return
        except (RuntimeError, ValueError, ConnectionError, OSError) as exc:
            raise EngineError(f"TensorRT-LLM failed at a request: {exc}") from exc

    def abort(self) -> None:
        try:
            self._result.abort()
        except Exception:  # noqa: BLE001  over already, or its workers are gone: nothing to end
            _log.info("a request could not be aborted", exc_info=True)

    def _note_metrics(self, completion: Any) -> None:
        """Keep the newest metrics; how long it waited is among them."""
        found = getattr(completion, "request_perf_metrics", None)
        if found is None:
            return
        self.metrics = read_metrics(found)
        timing = self.metrics.get("timing_metrics", {})
        if "arrival_time" in timing and "first_scheduled_time" in timing:
            waited = timing["first_scheduled_time"] - timing["arrival_time"]
            self.queue_seconds = max(0.0, waited)


def read_metrics(metrics: Any) -> dict[str, dict[str, float]]:
    """TensorRT-LLM's `request_perf_metrics` as plain numbers, by group; what is missing is left out.

    Versions differ in types (numbers, texts, timedeltas) and in names (`num_reused_blocks`,
    `reused_block`). Times are seconds of the engine's clock.
    """
    result: dict[str, dict[str, float]] = {}
    for group, names in _METRICS.items():
        holder = _member(metrics, group)
        found = {
            name: value
            for name in names
            if (value := _number(_first_member(holder, name))) is not None
        }
        if found:
            result[group] = found
    return result


def _first_member(holder: Any, name: str) -> Any:
    for spelling in (name, f"num_{name}", name.removesuffix("s"), f"kv_cache_{name}"):
        if (value := _member(holder, spelling)) is not None:
            return value
    return None


def _member(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)


def _number(value: Any) -> float | None:
    """None where it is none, or one that JSON cannot carry."""
    try:
        number = value.total_seconds() if isinstance(value, timedelta) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


class LlmSource:
    """See the module's text; methods as in `tokens.TokenSource`.

    Args:
        llm: TensorRT-LLM's `LLM`; closed with this.
        sampling_params: its class `SamplingParams`.
    """

    def __init__(self, llm: Any, sampling_params: Any) -> None:
        self._llm = llm
        self._sampling_params = sampling_params
        accepted = inspect.signature(llm.generate_async).parameters
        self._takes_salt = "cache_salt" in accepted
        self._lock = threading.Lock()
        self._estimator = PrefillEstimator(prior_tokens_per_second=PRIOR_TOKENS_PER_SECOND)
        self._prefill = self._estimator.model()
        self._closed = False

    @property
    def prefill(self) -> PrefillModel:
        return self._prefill

    def note_first_token(self, start: int, num_tokens: int, seconds: float) -> None:
        if num_tokens >= _MIN_RATE_TOKENS:
            with self._lock:
                self._estimator.observe(start, num_tokens, seconds)
                self._prefill = self._estimator.model()

    def start(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        *,
        max_tokens: int,
        eos_ids: tuple[int, ...],
        cache_salt: str,
    ) -> LlmRun:
        if self._closed:
            raise EngineError("the engine is closed")
        options: dict[str, Any] = {}
        if cache_salt:
            if not self._takes_salt:
                raise RequestError(
                    "this version of TensorRT-LLM knows no cache_salt, and would share KV on the GPU"
                    " between requests of different salts; send none, or upgrade it"
                )
            options["cache_salt"] = cache_salt
        try:
            result = self._llm.generate_async(
                {"prompt_token_ids": list(prompt)},
                sampling_params=self._sampling_params(
                    **sampling_arguments(sampling, max_tokens=max_tokens, eos_ids=eos_ids)
                ),
                streaming=True,
                **options,
            )
        except ValueError as exc:
            raise RequestError(f"TensorRT-LLM refuses the request: {exc}") from exc
        return LlmRun(result)

    def close(self) -> None:
        with self._lock:
            was_closed, self._closed = self._closed, True
        if not was_closed:
            self._llm.shutdown()


def sampling_arguments(
    sampling: SamplingParams, *, max_tokens: int, eos_ids: tuple[int, ...]
) -> dict[str, Any]:
    """Our sampling parameters as keyword arguments of TensorRT-LLM's `SamplingParams`.

    Stop words are not among them: the text is made here, and a stop word aborts the request.
    """
    arguments: dict[str, Any] = {
        "max_tokens": max_tokens,
        "detokenize": False,
        "add_special_tokens": False,
        "return_perf_metrics": True,
    }
    if eos_ids:
        # end_id alone is stopped at by the sampler; the others are stop tokens.
        arguments |= {"end_id": eos_ids[0], "pad_id": eos_ids[0]}
        if len(eos_ids) > 1:
            arguments["stop_token_ids"] = list(eos_ids[1:])
    else:
        arguments |= {"end_id": -1, "pad_id": 0}
    if sampling.min_length:
        arguments["min_tokens"] = sampling.min_length
    if not sampling.greedy:
        arguments["temperature"] = sampling.temperature
        if sampling.top_k:
            arguments["top_k"] = sampling.top_k
        if sampling.top_p < 1:
            arguments["top_p"] = sampling.top_p
        if sampling.seed is not None:
            arguments["seed"] = sampling.seed
    return arguments


def start_llm(arguments: LlmArguments, *, run_folder: Path) -> LlmSource:
    """Start TensorRT-LLM; takes minutes for a large model.

    Args:
        arguments: arguments of `LLM()`.
        run_folder: where the connector in the workers finds the arena's owner.

    Raises:
        ConfigError: TensorRT-LLM is not there, or its connector interface is another.
        EngineError: it does not start.
    """
    package = import_tensorrt_llm()
    checks.check_interface(trtllm_connector.find_interface())
    # The workers are children of this process and have another parent than the other models. Its pool
    # of MPI workers hands on only variables of its own names.
    for name in (RUN_DIR_VARIABLE, trtllm_connector.FORWARDED_RUN_DIR_VARIABLE):
        os.environ[name] = str(run_folder)
    try:
        llm = package.LLM(**arguments.values)
    except Exception as exc:
        raise EngineError(
            f"TensorRT-LLM {package.__version__} did not start: {type(exc).__name__}: {exc}; its log"
            " above has the reason"
        ) from exc
    return LlmSource(llm, package.SamplingParams)


def end_process(reason: str) -> None:
    """End this process, the stub of the Triton model: TensorRT-LLM's workers are gone for good.

    A model that answers errors only would pass for healthy; a stub that is gone makes the
    supervisor start tritonserver again, with its workers.
    """
    _log.critical("%s; the model's process ends, so that it is started again", reason)
    os._exit(1)


def _compute_dtype(arguments: LlmArguments, *configs: Any) -> str:
    """What the model computes in: as the arguments say, else the first configuration that tells."""
    given = str(arguments.values.get("dtype") or "auto").removeprefix("torch.")
    if given != "auto":
        return given
    for config in configs:
        found = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        if found is not None:
            return str(found).removeprefix("torch.")
    return "None"


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _reason(text: str | None) -> FinishReason:
    if text is None:
        return ""
    if text in ("stop", "length", "cancelled"):
        return text  # type: ignore[return-value]
    raise EngineError(f"TensorRT-LLM ended a request with {text!r}")


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as exc:
        raise ConfigError(f"engine.llm_args: {path} cannot be read: {exc.strerror}") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"engine.llm_args: {path} is not YAML: {exc}") from exc
    if not isinstance(data, dict):
        raise ConfigError(f"engine.llm_args: {path} must hold a mapping of LLM() arguments")
    return data


def _as_object(values: Mapping[str, Any]) -> SimpleNamespace:
    """Nested mappings with attributes, as TensorRT-LLM's argument classes have them."""
    return SimpleNamespace(
        **{
            str(name): _as_object(value) if isinstance(value, dict) else value
            for name, value in values.items()
        }
    )
