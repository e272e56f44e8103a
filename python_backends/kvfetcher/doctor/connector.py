"""Checks of the engines behind the KV connector: version, interface, arguments, and a real engine's first loads.

The last two start the engine, which takes as long as it takes in production, and needs its GPU memory.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from kvfetcher.doctor.check import Check, guarded
from kvfetcher.engines.base import GenerateRequest, SamplingParams
from kvfetcher.errors import EngineError
from kvfetcher.memory.leases import LeaseClaim, tokens_digest

if TYPE_CHECKING:
    from kvfetcher.config import Config
    from kvfetcher.engines.host import EngineHost

_WRITTEN_FOR = re.compile(r"1\.[234]\.")
_ANSWER_TOKENS = 8
_SUFFIX_TOKENS = 5
_COMPARE_SECONDS = 300.0


class Compared(NamedTuple):
    """Answers to prompts of equal length and equal end."""

    computed: tuple[int, ...]
    """With prefix A, asked again: as under a load, only the end of the prompt is computed."""
    other: tuple[int, ...]
    """With prefix B, computed."""
    loaded: tuple[int, ...]
    """With prefix C, in whose place the KV of A was loaded."""
    loaded_tokens: int
    reason: str
    """Why nothing was loaded, "" otherwise."""
    is_equal_kv: bool | None
    """Whether the KV loaded in place of C's was saved again byte for byte; None where the engine kept
    none of it and computed C's own."""


def check_tensorrt_llm(config: Config) -> list[Check]:
    """Everything that can be known of TensorRT-LLM here, up to a load that is compared."""
    from kvfetcher.engines import tensorrt_llm
    from kvfetcher.models.folders import prepare_model

    def version() -> Check:
        found = str(tensorrt_llm.import_tensorrt_llm().__version__)
        if _WRITTEN_FOR.match(found):
            return Check("tensorrt_llm version", "ok", found)
        return Check(
            "tensorrt_llm version",
            "warn",
            f"{found}; the KV connector is written for 1.2.1 to 1.4",
            "use an image tritonserver:26.04 to 26.07-trtllm-python-py3, or trust the checks below",
        )

    def arguments() -> Check:
        folder = prepare_model(config.engine.model).path
        given = tensorrt_llm.llm_arguments(config, folder)
        found = str(tensorrt_llm.import_tensorrt_llm().__version__)
        model = tensorrt_llm.read_model(folder, config, version=found, arguments=given)
        values = {name: value for name, value in given.values.items() if name != "model"}
        return Check(
            "tensorrt_llm arguments",
            "ok",
            f"{model.spec}, {given.num_ranks} rank(s), LLM({values}); arguments that tell chunks"
            f" apart: {tensorrt_llm.kv_arguments(values) or 'none'}",
        )

    checks = [
        guarded("tensorrt_llm version", version),
        guarded("connector interface", _check_interface),
        guarded("tensorrt_llm arguments", arguments),
    ]
    if any(check.status == "fail" for check in checks):
        return checks
    return checks + _check_running(config, "tensorrt_llm")


def check_paged(config: Config) -> list[Check]:
    """Start the paged engine; its pool's layout, and a load that is compared."""
    return _check_running(config, "paged")


def _check_running(config: Config, kind: Literal["paged", "tensorrt_llm"]) -> list[Check]:
    from kvfetcher.engines.connector.engine import ConnectedEngine
    from kvfetcher.engines.host import EngineHost

    # `--engine` may name another one than the configuration.
    config = replace(config, engine=replace(config.engine, kind=kind))
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="kvfetcher-doctor-") as folder:

        def start() -> Check:
            with EngineHost(config, run_folder=Path(folder)) as host:
                if isinstance(host.engine, ConnectedEngine):
                    host.engine.on_lost = None  # to be reported, not to end this process
                stats = host.engine.stats()
                layouts = ", ".join(stats["kv_layouts"])
                checks.append(
                    Check("KV layout", "ok", f"{layouts} by rank, block order proven")
                    if stats["kv_layout_proven"]
                    else Check("KV layout", "warn", f"{layouts} by rank, as configured, not proven")
                )
                checks.append(guarded("load then compare", lambda: judge(compare(host))))
            return Check("engine", "ok", f"{config.engine.kind} started and stopped")

        engine = guarded("engine", start)
    return [engine, *checks]


def judge(found: Compared) -> Check:
    """What the answers say of the connector."""
    name = "load then compare"
    if found.reason or not found.loaded_tokens:
        return Check(
            name,
            "fail",
            f"the engine loaded nothing: {found.reason}",
            "see the log of the engine for lines of kvfetcher.engines.connector",
        )
    if found.is_equal_kv is False:
        return Check(
            name,
            "fail",
            f"{found.loaded_tokens} loaded tokens came back from the engine with other KV than was"
            f" loaded; the answer was {found.loaded}, computed it is {found.computed}",
            "do not serve, and report this",
        )
    if found.computed == found.other:
        return Check(
            name,
            "warn",
            "two different prompts had the same answer, so a load proves nothing",
            "try a model that looks at its prompt",
        )
    kv = "" if found.is_equal_kv is None else ", and came back byte for byte"
    if found.loaded != found.computed:
        # Logits differ a little between passes of other shapes (by up to 0.16 in bf16 without any
        # connector), and random prompts leave the likeliest tokens close together.
        return Check(
            name,
            "warn",
            f"with {found.loaded_tokens} loaded tokens the answer was {found.loaded}, computed it is"
            f" {found.computed}{kv or '; their KV could not be compared'}",
            "compare a few real answers with and without a hit; if they part at once, set"
            " connector.kv_layout, do not serve, and report this",
        )
    return Check(
        name, "ok", f"{found.loaded_tokens} loaded tokens gave the answer of computing them{kv}"
    )


def compare(host: EngineHost) -> Compared:
    """Save the KV of a prompt, load it under another prompt of equal length, and compare.

    The other prompt is what keeps the engine's own block reuse out of the way: it was never computed.
    Asked once more without a lease, the engine saves what it kept of the load.

    Raises:
        EngineError: the engine failed, saved nothing, or took too long.
    """
    return asyncio.run(asyncio.wait_for(_compare(host), _COMPARE_SECONDS))


async def _compare(host: EngineHost) -> Compared:
    facts = host.engine.describe()
    size = facts.chunk_tokens
    dice = np.random.default_rng(20260207)  # any fixed number: the doctor says the same each time
    usable = [i for i in range(min(facts.vocab_size, 20000)) if i not in facts.eos_ids]

    def some(number: int) -> tuple[int, ...]:
        return tuple(int(i) for i in dice.choice(usable, number))

    suffix = some(_SUFFIX_TOKENS)
    prefixes = [some(size) for _ in range(3)]
    first = await _answer(host, prefixes[0] + suffix, save=True)
    if first.kv is None:
        raise EngineError("a finished request was not saved; see the engine's log")
    computed = await _answer(host, prefixes[0] + suffix)
    other = await _answer(host, prefixes[1] + suffix)
    lease = host.leases.lease(size, 60.0, now=time.monotonic())
    host.arena.write(host.arena.target(lease.block_ids, size), 0, first.kv)
    host.leases.seal(lease.id, size, tokens_digest(prefixes[2]), now=time.monotonic())
    claim = LeaseClaim(lease.id, size, host.arena.generation)
    loaded = await _answer(host, prefixes[2] + suffix, claim=claim)
    again = await _answer(host, prefixes[2] + suffix, save=True)
    is_kept = again.kv is not None and again.computed_tokens <= _SUFFIX_TOKENS
    return Compared(
        computed=computed.ids,
        other=other.ids,
        loaded=loaded.ids,
        loaded_tokens=loaded.loaded_tokens,
        reason=loaded.reason,
        is_equal_kv=bool(np.array_equal(again.kv, first.kv)) if is_kept else None,
    )


class _Answer(NamedTuple):
    ids: tuple[int, ...]
    kv: Any
    """KV of the first chunk if it was saved, else None."""
    computed_tokens: int
    loaded_tokens: int
    reason: str
    """Why nothing was loaded."""


async def _answer(
    host: EngineHost,
    prompt: tuple[int, ...],
    *,
    save: bool = False,
    claim: LeaseClaim | None = None,
) -> _Answer:
    sampling = SamplingParams(max_tokens=_ANSWER_TOKENS, min_length=_ANSWER_TOKENS)
    ids: tuple[int, ...] = ()
    kv, timings = None, None
    async for event in host.engine.generate(
        GenerateRequest(prompt, sampling, lease=claim, save=save, request_id="doctor")
    ):
        ids += event.new_token_ids
        timings = event.timings or timings
        if event.save is not None:
            kv = host.arena.read(event.save.targets[0])
            host.leases.release(event.save.lease_id, now=time.monotonic())
    if timings is None:
        raise EngineError("a request ended without its timings")
    return _Answer(ids, kv, timings.computed_tokens, timings.cached_tokens, timings.lease_error)


def _check_interface() -> Check:
    from kvfetcher.engines.connector import checks
    from kvfetcher.engines.connector import entry as trtllm_connector

    api = trtllm_connector.find_interface()
    checks.check_interface(api)
    return Check("connector interface", "ok", checks.interface_text(api))
