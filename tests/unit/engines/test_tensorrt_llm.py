"""The TensorRT-LLM engine over a stand-in of its LLM API (support/trtllm_stand_in)."""

import asyncio
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import support
from kvfetcher.config import CodecConfig, Config, ConnectorConfig, EngineConfig
from kvfetcher.engines import tensorrt_llm
from kvfetcher.engines.base import GenerateRequest, SamplingParams
from kvfetcher.engines.connector import entry as trtllm_connector
from kvfetcher.engines.host import EngineHost
from kvfetcher.errors import ConfigError, EngineError, RequestError
from kvfetcher.memory.leases import LeaseClaim, tokens_digest
from support.engine_rig import BLOCK, CHUNK, SLICE, collect, edit_json, some_ids, write_model

STAND_IN = Path(support.__path__[0]) / "trtllm_stand_in"


def forget_tensorrt_llm():
    for name in [n for n in sys.modules if n.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]
    for name in ("KVFetcherScheduler", "KVFetcherWorker"):
        trtllm_connector.__dict__.pop(name, None)


@pytest.fixture
def stand_in(monkeypatch):
    forget_tensorrt_llm()
    monkeypatch.syspath_prepend(str(STAND_IN))
    # `start_llm` sets both for good, as the process of an engine has one run folder.
    for name in ("KVFETCHER_RUN_DIR", trtllm_connector.FORWARDED_RUN_DIR_VARIABLE):
        monkeypatch.setenv(name, "")
    yield
    forget_tensorrt_llm()


@pytest.fixture(scope="module")
def bf16_folder(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("bf16"))
    edit_json(folder / "config.json", dtype="bfloat16")  # TensorRT-LLM computes in this
    return folder


def config_of(folder, *, connector=None, **engine):
    settings = {
        "kind": "tensorrt_llm",
        "model": str(folder),
        "tokens_per_block": BLOCK,
        "prefill_slice_tokens": SLICE,
        "arena_bytes": 1 << 20,
    }
    return Config(
        engine=EngineConfig(**settings | engine),
        connector=ConnectorConfig(**connector or {}),
        codec=CodecConfig(chunk_tokens=CHUNK),
    )


@pytest.fixture
def host(stand_in, bf16_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KVFETCHER_RUN_DIR", str(tmp_path))
    with EngineHost(config_of(bf16_folder), run_folder=tmp_path, arena_folder=tmp_path) as opened:
        yield opened


def request(ids, *, max_tokens=12, save=False, lease=None, salt="", **sampling):
    return GenerateRequest(
        tuple(ids),
        SamplingParams(max_tokens=max_tokens, **sampling),
        save=save,
        lease=lease,
        cache_salt=salt,
    )


async def test_a_hit_gives_the_tokens_and_bytes_of_computing(host):
    described = host.engine.describe()
    assert described.engine == "tensorrt_llm"
    assert described.identity.compute == (
        "tensorrt_llm 1.2.1 pytorch bfloat16, KV as bfloat16, arguments 44136fa355b3678a"
    )
    assert host.engine.stats()["kv_layouts"] == ["HND"]
    await check_a_hit(host)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
async def test_ranks_in_processes_load_from_and_save_into_their_own_parts(
    stand_in, bf16_folder, tmp_path, monkeypatch, kv_dtype
):
    """Everything that the engine process opens for `tensor_parallel_size` 2."""
    for name in ("run", "shm"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("KVFETCHER_RUN_DIR", str(tmp_path / "run"))
    yaml = tmp_path / "model.yaml"
    yaml.write_text("tensor_parallel_size: 2\n")
    config = config_of(bf16_folder, llm_args=str(yaml), kv_dtype=kv_dtype)
    with EngineHost(config, run_folder=tmp_path / "run", arena_folder=tmp_path / "shm") as host:
        assert host.engine.stats()["kv_layouts"] == ["HND", "HND"]
        files = sorted(str(path) for path in (tmp_path / "shm").iterdir())
        assert list(host.engine.describe().arena) == files
        assert [part.heads.count for part in host.arena.parts] == [1, 1]
        values = await check_a_hit(host)
        assert not np.array_equal(values[:, :, 0], values[:, :, 1])
        assert host.engine.stats()["dead"] == ""
    assert not list((tmp_path / "run").iterdir())
    assert not list((tmp_path / "shm").iterdir())


async def check_a_hit(host):
    """A prompt is computed and saved; another with its KV in the lease goes on as it did. The KV."""
    ids = some_ids(75)
    full = await collect(host.engine.generate(request(ids, save=True)))
    assert full.reason in ("stop", "length")
    values = np.concatenate([host.arena.read(t) for t in full.ticket.targets], axis=3)
    # Another prompt of the same length, with this one's KV in its lease: only a load explains it.
    other = some_ids(64, seed=8) + ids[64:]
    lease = host.leases.lease(64, 60.0, now=time.monotonic())
    host.arena.write(host.arena.target(lease.block_ids, 64), 0, values[:, :, :, :64])
    host.leases.seal(lease.id, 64, tokens_digest(other[:64]), now=time.monotonic())
    claim = LeaseClaim(lease.id, 64, host.arena.generation)
    loaded = await collect(host.engine.generate(request(other, lease=claim)))
    assert loaded.ids == full.ids
    assert loaded.timings[0].cached_tokens == 64
    metrics = loaded.timings[-1].metrics
    assert metrics["kv_cache_metrics"] == {
        "total_allocated_blocks": 9,
        "reused_blocks": 2,
        "hit_rate": 0.25,
    }
    assert set(metrics["timing_metrics"]) == {
        "arrival_time",
        "first_scheduled_time",
        "first_token_time",
        "last_token_time",
    }
    return values


async def test_stream_ends_when_its_client_goes(host):
    seen = []
    events = host.engine.generate(
        request(some_ids(20), max_tokens=400, min_length=400), is_cancelled=lambda: len(seen) > 2
    )
    async for event in events:
        seen.append(event)  # noqa: PERF401  `is_cancelled` looks at it meanwhile
    assert seen[-1].finish_reason == "cancelled"
    async with asyncio.timeout(5):
        while host.engine.stats()["connector"]["open"]:
            await asyncio.sleep(0.01)


async def test_stop_word_aborts_the_request(host):
    plain = await collect(host.engine.generate(request(some_ids(20), max_tokens=30, min_length=30)))
    word = plain.text[3:5]
    output = await collect(
        host.engine.generate(
            request(some_ids(20), max_tokens=30, min_length=30, stop_words=(word,))
        )
    )
    assert output.reason == "stop"
    assert output.text == plain.text[: plain.text.index(word)]


async def test_salt_is_passed_on_and_refused_where_it_cannot_be(host, monkeypatch):
    salted = await collect(host.engine.generate(request(some_ids(40), salt="tenant")))
    assert salted.reason
    monkeypatch.setattr(host.engine._source, "_takes_salt", False)
    with pytest.raises(RequestError, match="knows no cache_salt"):
        await collect(host.engine.generate(request(some_ids(40), salt="tenant")))


async def test_refusals_and_failures_of_the_llm_are_told_apart(host, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("too long")

    monkeypatch.setattr(host.engine._source._llm, "generate_async", refuse)
    with pytest.raises(RequestError, match="refuses the request: too long"):
        await collect(host.engine.generate(request(some_ids(20))))

    class Broken:
        async def __aiter__(self):
            raise RuntimeError("CUDA error")
            yield

        def abort(self):
            raise RuntimeError("no worker")

    monkeypatch.setattr(host.engine._source._llm, "generate_async", lambda *_, **__: Broken())
    with pytest.raises(EngineError, match="failed at a request: CUDA error"):
        await collect(host.engine.generate(request(some_ids(20))))
    assert host.engine.stats()["failed"] == 2


async def test_only_what_still_runs_is_aborted(host, monkeypatch):
    aborted = []
    monkeypatch.setattr(tensorrt_llm.LlmRun, "abort", lambda self: aborted.append(self))
    plain = await collect(host.engine.generate(request(some_ids(20), max_tokens=30, min_length=30)))
    assert not aborted
    stopped = request(some_ids(20), max_tokens=30, min_length=30, stop_words=(plain.text[3:5],))
    await collect(host.engine.generate(stopped))
    assert len(aborted) == 1


async def test_ranks_that_are_lost_end_the_models_process(host, monkeypatch):
    assert host.engine.on_lost is tensorrt_llm.end_process
    told = asyncio.Event()
    loop, reasons = asyncio.get_running_loop(), []

    def note(reason):
        reasons.append(reason)
        loop.call_soon_threadsafe(told.set)

    host.engine.on_lost = note
    host.engine._hub._ranks[0].shut()  # as when the worker process dies
    async with asyncio.timeout(10):
        await told.wait()
    assert reasons == ["rank 0 of the engine is gone; restart the server"]
    with pytest.raises(EngineError, match="rank 0 of the engine is gone"):
        await collect(host.engine.generate(request(some_ids(20))))


def test_end_of_the_process_is_logged_and_an_error():
    program = (
        "from kvfetcher.engines.tensorrt_llm import end_process; end_process('rank 1 is gone')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert "rank 1 is gone; the model's process ends" in ended.stderr


def test_without_tensorrt_llm_the_error_names_the_image(bf16_folder, tmp_path):
    forget_tensorrt_llm()
    with pytest.raises(ConfigError, match="trtllm-python-py3"):
        EngineHost(config_of(bf16_folder), run_folder=tmp_path, arena_folder=tmp_path)
    with pytest.raises(ConfigError, match="interface cannot be imported"):
        trtllm_connector.find_interface()
    assert not list(tmp_path.iterdir())


def test_llm_that_does_not_start_is_an_engine_error(stand_in, bf16_folder, tmp_path):
    yaml = tmp_path / "model.yaml"
    yaml.write_text("kv_cache_config: {unheard_of: 1}\n")
    config = config_of(bf16_folder, llm_args=str(yaml))
    with pytest.raises(EngineError, match=r"1\.2\.1 did not start: ValueError: Extra inputs"):
        EngineHost(config, run_folder=tmp_path, arena_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.yaml"]


def test_newer_module_path_is_found_too(stand_in, monkeypatch):
    import types

    from kvfetcher.engines.paged import contract

    new = types.ModuleType(trtllm_connector.INTERFACES[0])
    new.KvCacheConnectorScheduler = contract.KvCacheConnectorScheduler
    new.KvCacheConnectorWorker = contract.KvCacheConnectorWorker
    parent = types.ModuleType(new.__name__.rpartition(".")[0])
    parent.__path__ = []
    monkeypatch.setitem(sys.modules, parent.__name__, parent)
    monkeypatch.setitem(sys.modules, new.__name__, new)
    assert trtllm_connector.find_interface() is new
    assert issubclass(trtllm_connector.KVFetcherWorker, contract.KvCacheConnectorWorker)
    with pytest.raises(AttributeError, match="Nobody"):
        _ = trtllm_connector.Nobody


class TestArguments:
    def test_what_the_connector_needs_is_filled_in(self, bf16_folder, tmp_path):
        yaml = tmp_path / "model.yaml"
        yaml.write_text(
            "tensor_parallel_size: 2\n"
            "kv_cache_config: {free_gpu_memory_fraction: 0.7}\n"
            "triton_config: {decoupled: true}\n"
        )
        values, num_ranks = tensorrt_llm.llm_arguments(
            config_of(bf16_folder, llm_args=str(yaml), kv_dtype="float8_e4m3fn"), bf16_folder
        )
        assert num_ranks == 2
        assert values == {
            "model": str(bf16_folder),
            "backend": "pytorch",
            "tensor_parallel_size": 2,
            "kv_cache_config": {
                "free_gpu_memory_fraction": 0.7,
                "enable_block_reuse": True,
                "enable_partial_reuse": False,
                "tokens_per_block": BLOCK,
                "dtype": "fp8",
            },
            "scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
            "kv_connector_config": tensorrt_llm.CONNECTOR,
        }

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("kv_cache_config: {enable_partial_reuse: true}", "needs False; remove the line"),
            ("kv_cache_config: {tokens_per_block: 64}", "set engine.tokens_per_block"),
            ("kv_cache_config: {dtype: nvfp4}", "set engine.kv_dtype"),
            ("kv_cache_config: 3", "must be a mapping"),
            ("scheduler_config: {capacity_scheduler_policy: MAX_UTILIZATION}", "NO_EVICT"),
            ("kv_cache_config: {host_cache_size: 1000}", "set it to 0"),
            ("kv_cache_config: {max_attention_window: [512, 4096]}", "VSWA"),
            ("kv_cache_config: {max_attention_window: [512]}", "is 512 and max_seq_len not set"),
            ("model: some/other", r"model = 'some/other', but engine\.model ="),
            ("backend: tensorrt", "backend is 'tensorrt'"),
            ("max_beam_width: 4", "max_beam_width is above 1"),
            ("pipeline_parallel_size: 2", "use tensor_parallel_size alone"),
            ("context_parallel_size: 2", "use tensor_parallel_size alone"),
            ("enable_attention_dp: true", "enable_attention_dp"),
            ("speculative_config: {decoding_type: Eagle}", "speculative_config"),
            ("tensor_parallel_size: none", "must be at least 1"),
            ("kv_connector_config: {connector: lmcache}", "names another connector"),
            ("- 1", "must hold a mapping"),
            ("a: [", "is not YAML"),
        ],
    )
    def test_what_cannot_run_is_refused_by_name(self, bf16_folder, tmp_path, text, message):
        yaml = tmp_path / "model.yaml"
        yaml.write_text(text)
        with pytest.raises(ConfigError, match=message):
            tensorrt_llm.llm_arguments(config_of(bf16_folder, llm_args=str(yaml)), bf16_folder)

    def test_missing_file(self, bf16_folder):
        with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
            tensorrt_llm.llm_arguments(config_of(bf16_folder, llm_args="nowhere.yaml"), bf16_folder)


class TestModel:
    def read(self, folder, num_ranks=1, arguments=(), **engine):
        return tensorrt_llm.read_model(
            folder,
            config_of(folder, **engine),
            version="1.2.1",
            arguments=tensorrt_llm.LlmArguments(dict(arguments), num_ranks),
        )

    def test_facts_are_those_of_the_loaded_model(self, bf16_folder, loaded):
        model = self.read(bf16_folder, num_ranks=2)
        assert model.spec == loaded.spec
        assert model.rope == loaded.rope
        assert model.identity.weights == loaded.identity.weights
        assert model.identity.rope == loaded.identity.rope
        assert model.eos_ids == (256,)

    def test_kv_dtype_must_be_what_the_engine_keeps(self, bf16_folder):
        with pytest.raises(ConfigError, match="computes in bfloat16"):
            self.read(bf16_folder, kv_dtype="float16")
        assert self.read(bf16_folder, kv_dtype="float8_e4m3fn").spec.dtype == "float8_e4m3fn"

    def test_heads_must_fit_the_ranks(self, bf16_folder):
        with pytest.raises(ConfigError, match="cannot be divided among 3"):
            self.read(bf16_folder, num_ranks=3)

    def test_mixed_layers_are_refused(self, tmp_path):
        folder = write_model(tmp_path / "m")
        edit_json(folder / "config.json", hybrid_override_pattern="M-M*")
        with pytest.raises(ConfigError, match="uniform full attention"):
            self.read(folder)

    def test_configuration_without_what_a_cache_needs_is_refused(self, bf16_folder, monkeypatch):
        from transformers import AutoConfig, LlamaConfig

        class Thinker(LlamaConfig):
            def get_text_config(self, **_):
                return SimpleNamespace(model_type="thinker", num_hidden_layers=2)

        monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: Thinker())
        with pytest.raises(EngineError, match="'thinker' is not a decoder-only language model"):
            self.read(bf16_folder)

    def test_model_inside_one_of_several_inputs_is_the_one_that_counts(
        self, bf16_folder, monkeypatch
    ):
        from transformers import AutoConfig, LlamaConfig

        inner = AutoConfig.from_pretrained(bf16_folder)

        class Seeing(LlamaConfig):
            def get_text_config(self, **_):
                return inner

        plain = self.read(bf16_folder)
        monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: Seeing())
        assert self.read(bf16_folder).spec == plain.spec

    def test_arguments_that_may_change_kv_are_part_of_the_identity(self, bf16_folder):
        def compute(**arguments):
            return self.read(bf16_folder, arguments=arguments).identity.compute

        plain = compute()
        for fast in (
            {"max_batch_size": 64, "tensor_parallel_size": 2, "enable_chunked_prefill": True},
            {"cuda_graph_config": {"enable_padding": True}, "model": "/elsewhere"},
            {"kv_cache_config": {"free_gpu_memory_fraction": 0.5, "tokens_per_block": 64}},
            {"scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"}},
        ):
            assert compute(**fast) == plain
        others = [
            compute(**changed)
            for changed in (
                {"quant_config": {"quant_algo": "FP8"}},
                {"quant_config": {"quant_algo": "NVFP4"}},
                {"model_kwargs": {"num_hidden_layers": 1}},
                {"load_format": "dummy"},
                {"dtype": "bfloat16"},
                {"kv_cache_config": {"max_attention_window": [4096]}},
                {"never_heard_of": 1},
            )
        ]
        assert len({plain, *others}) == 8

    def test_type_that_the_arguments_ask_for_is_the_one_computed_in(self, bf16_folder):
        with pytest.raises(ConfigError, match="computes in float16"):
            self.read(bf16_folder, arguments={"dtype": "float16"})
        fp8 = self.read(bf16_folder, arguments={"dtype": "float16"}, kv_dtype="float8_e4m3fn")
        assert "pytorch float16, KV as float8_e4m3fn" in fp8.identity.compute

    def test_no_model(self, tmp_path):
        with pytest.raises(EngineError, match="cannot be read"):
            self.read(tmp_path)


def test_sampling_arguments():
    greedy = tensorrt_llm.sampling_arguments(SamplingParams(), max_tokens=5, eos_ids=())
    assert greedy == {
        "max_tokens": 5,
        "detokenize": False,
        "add_special_tokens": False,
        "return_perf_metrics": True,
        "end_id": -1,
        "pad_id": 0,
    }
    sampled = tensorrt_llm.sampling_arguments(
        SamplingParams(max_tokens=9, temperature=0.7, top_k=5, top_p=0.9, seed=3, min_length=2),
        max_tokens=9,
        eos_ids=(1, 2, 3),
    )
    assert sampled["end_id"] == 1
    assert sampled["stop_token_ids"] == [2, 3]
    assert (sampled["temperature"], sampled["top_k"], sampled["top_p"]) == (0.7, 5, 0.9)
    assert (sampled["seed"], sampled["min_tokens"]) == (3, 2)


async def test_prefill_is_learnt_from_what_was_computed_alone(host):
    source = host.engine._source
    source.note_first_token(0, 100, 1.0)  # too short to say anything
    assert source.prefill.num_slices == 0
    noted = []
    source.note_first_token = lambda *facts: noted.append(facts)
    await collect(host.engine.generate(request(some_ids(75, seed=3))))
    ((start, computed, seconds),) = noted
    assert (start, computed) == (0, 75)
    assert 0 < seconds < 60
    await asyncio.gather(
        *(collect(host.engine.generate(request(some_ids(75, seed=i)))) for i in (4, 5))
    )
    assert len(noted) <= 2  # only the last of them may have been alone
    del source.note_first_token
    source.note_first_token(0, 1000, 1.0)
    assert source.prefill.base_seconds == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("arrival", "scheduled", "waited"),
    [
        (timedelta(seconds=5), timedelta(seconds=5.25), 0.25),
        (5, 5.25, 0.25),
        ("5.5", "5.75", 0.25),
        (6, 5, 0.0),
        (5, object(), 0.0),
        (5, "soon", 0.0),
        (5, "nan", 0.0),
        (None, 5, 0.0),
    ],
)
def test_waiting_time_comes_from_the_metrics_whatever_their_type(arrival, scheduled, waited):
    run = tensorrt_llm.LlmRun(None)
    timing = SimpleNamespace(arrival_time=arrival, first_scheduled_time=scheduled)
    run._note_metrics(SimpleNamespace(request_perf_metrics=SimpleNamespace(timing_metrics=timing)))
    assert run.queue_seconds == waited


def test_metrics_under_every_name_that_was_seen():
    assert tensorrt_llm.LlmRun(None).metrics == {}
    run = tensorrt_llm.LlmRun(None)
    run._note_metrics(SimpleNamespace())
    assert run.metrics == {}
    for names in (
        {"num_reused_blocks": 3, "num_missed_blocks": "4", "kv_cache_hit_rate": "0.5"},
        {"reused_block": 3, "missed_block": 4.0, "hit_rate": 0.5},
        {"reused_blocks": "3", "missed_blocks": "4", "hit_rate": "0.5"},
    ):
        for metrics in (
            {"kv_cache_metrics": names},
            SimpleNamespace(kv_cache_metrics=SimpleNamespace(**names)),
        ):
            assert tensorrt_llm.read_metrics(metrics) == {
                "kv_cache_metrics": {"reused_blocks": 3, "missed_blocks": 4, "hit_rate": 0.5}
            }


def test_workers_find_the_run_folder_by_either_name(tmp_path):
    own, forwarded = tmp_path / "own", tmp_path / "forwarded"
    find, other = trtllm_connector.find_run_folder, trtllm_connector.FORWARDED_RUN_DIR_VARIABLE
    assert other == "TRTLLM_KVFETCHER_RUN_DIR"  # of those that its MPI pool hands on
    assert find({"KVFETCHER_RUN_DIR": str(own), other: str(forwarded)}) == own
    assert find({other: str(forwarded)}) == forwarded


async def test_start_tells_the_workers_by_both_names(host, tmp_path):
    assert os.environ[trtllm_connector.FORWARDED_RUN_DIR_VARIABLE] == str(tmp_path)
    assert os.environ["KVFETCHER_RUN_DIR"] == str(tmp_path)
