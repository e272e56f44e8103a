"""What of TensorRT-LLM's LLM API the engine uses, over the paged executor: names and behaviour as documented.

Put the folder above on sys.path to import it as `tensorrt_llm`. It is strict where the real one is:
unknown arguments are errors, connector classes are found by name and made in two threads at once.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

from kvfetcher.engines import base
from kvfetcher.engines.hf.loader import load_model
from kvfetcher.engines.paged.contract import OneRank
from kvfetcher.engines.paged.executor import PagedExecutor, Rules
from kvfetcher.engines.paged.model import PagedModel
from kvfetcher.engines.paged.source import PagedSource
from support.trtllm_contract.ranks import ProcessRanks
from tensorrt_llm import _utils

__version__ = "1.2.1"

# Of this package and of `support`, for the processes of the other ranks.
_PATH = (str(Path(__file__).parents[1]), str(Path(__file__).parents[3]))

_KV_CACHE = {
    "enable_block_reuse": True,
    "enable_partial_reuse": True,
    "tokens_per_block": 32,
    "dtype": "auto",
    "host_cache_size": None,
    "max_attention_window": None,
    "free_gpu_memory_fraction": 0.9,
}


@dataclass
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    stop_token_ids: list[int] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    detokenize: bool = True
    add_special_tokens: bool = True
    return_perf_metrics: bool = False


@dataclass
class CompletionOutput:
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    request_perf_metrics: object = None


class RequestOutput:
    """Cumulative tokens; iterating gives the object itself after every step."""

    def __init__(self, run, params):
        self._run = run
        self._tells_metrics = params.return_perf_metrics
        self._arrival = time.monotonic()
        self.outputs = [CompletionOutput()]

    def abort(self):
        self._run.abort()

    async def __aiter__(self):
        async for step in self._run.steps():
            self.outputs[0].token_ids.extend(step.token_ids)
            self.outputs[0].finish_reason = step.finish_reason or None
            if self._tells_metrics:
                self.outputs[0].request_perf_metrics = self._metrics()
            yield self

    def _metrics(self):
        """In the types that were seen: timedeltas, numbers, and numbers as text."""
        scheduled = timedelta(seconds=self._arrival + self._run.queue_seconds)
        return SimpleNamespace(
            timing_metrics=SimpleNamespace(
                arrival_time=timedelta(seconds=self._arrival),
                first_scheduled_time=scheduled,
                first_token_time=scheduled,
                last_token_time=timedelta(seconds=time.monotonic()),
            ),
            kv_cache_metrics=SimpleNamespace(
                num_total_allocated_blocks=9, num_reused_blocks="2", kv_cache_hit_rate=0.25
            ),
        )


def as_arguments(
    model,
    *,
    backend="pytorch",
    tensor_parallel_size=1,
    kv_cache_config=None,
    scheduler_config=None,
    kv_connector_config=None,
    max_batch_size=8,
):
    """As the connector sees them; unknown ones are refused."""
    unknown = set(kv_cache_config or {}) - set(_KV_CACHE)
    if unknown:
        raise ValueError(f"Extra inputs are not permitted: {sorted(unknown)}")
    return SimpleNamespace(
        model=model,
        backend=backend,
        tensor_parallel_size=tensor_parallel_size,
        kv_cache_config=SimpleNamespace(**_KV_CACHE | (kv_cache_config or {})),
        scheduler_config=SimpleNamespace(**(scheduler_config or {})),
        kv_connector_config=kv_connector_config,
        max_beam_width=1,
        max_batch_size=max_batch_size,
    )


def make_executor(args, ranks, *, scheduler, worker, sink):
    """One rank's."""
    cache = args.kv_cache_config
    dtype = "float8_e4m3fn" if cache.dtype == "fp8" else "bfloat16"
    paged = PagedModel(
        load_model(Path(args.model), device="cpu", kv_dtype=dtype),
        ranks=ranks,
        num_blocks=64,
        tokens_per_block=cache.tokens_per_block,
        layout="HND",
    )
    return PagedExecutor(
        paged,
        ranks=ranks,
        scheduler=scheduler,
        worker=worker,
        rules=Rules(
            part_tokens=16,
            max_batch=args.max_batch_size,
            tokens_per_block=cache.tokens_per_block,
            reuse=cache.enable_block_reuse,
            tells_salt=False,
        ),
        sink=sink,
    )


class LLM:
    """Rank 0 in this process, the others in children of it."""

    def __init__(self, model, **options):
        args = as_arguments(model, **options)
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            ranks = self._start_ranks(args, {"model": model, **options}, stack)
            connector = args.kv_connector_config
            module = importlib.import_module(connector["connector_module"])
            with ThreadPoolExecutor(2) as pool:
                worker, scheduler = pool.map(
                    lambda name: getattr(module, connector[name])(args),
                    ("connector_worker_class", "connector_scheduler_class"),
                )
            stack.callback(scheduler.close)
            stack.callback(worker.close)
            self._source = PagedSource(
                lambda sink: make_executor(
                    args, ranks, scheduler=scheduler, worker=worker, sink=sink
                )
            )
            stack.callback(self._source.close)
            self._closing = stack.pop_all()

    @staticmethod
    def _start_ranks(args, arguments, stack):
        size = args.tensor_parallel_size
        if size == 1:
            return OneRank()
        _utils.place = (0, size)
        meeting = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "meeting"
        for rank in range(1, size):
            settings = {"place": (rank, size), "meeting": str(meeting), "arguments": arguments}
            child = subprocess.Popen(
                [sys.executable, "-m", "tensorrt_llm._worker", json.dumps(settings)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(_PATH)},
            )
            stack.callback(child.wait)
            stack.callback(child.kill)
        ranks = ProcessRanks(str(meeting), 0, size)
        stack.callback(ranks.close)
        return ranks

    def generate_async(
        self, inputs, sampling_params=None, lora_request=None, streaming=False, cache_salt=None
    ):
        params = sampling_params
        end = [] if params.end_id == -1 else [params.end_id]
        run = self._source.start(
            tuple(inputs["prompt_token_ids"]),
            base.SamplingParams(
                max_tokens=params.max_tokens,
                temperature=params.temperature or 0.0,
                top_k=params.top_k or 0,
                top_p=params.top_p or 1.0,
                seed=params.seed,
                min_length=params.min_tokens or 0,
            ),
            max_tokens=params.max_tokens,
            eos_ids=(*end, *(params.stop_token_ids or ())),
            cache_salt=cache_salt or "",
        )
        return RequestOutput(run, params)

    def shutdown(self):
        self._closing.close()
