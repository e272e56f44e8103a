"""What the connector refuses to run with: other interfaces, and every argument that would make it wrong."""

import enum
from abc import ABC, abstractmethod
from types import SimpleNamespace

import pytest

from kvfetcher.engines.connector import checks
from kvfetcher.engines.connector import entry as trtllm_connector
from kvfetcher.engines.paged import contract
from kvfetcher.errors import ConfigError


class Policy(enum.Enum):
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    MAX_UTILIZATION = "MAX_UTILIZATION"


class Numbered(enum.Enum):
    NVFP4 = 1
    GUARANTEED_NO_EVICT = 2


def arguments(*, cache=None, **changes):
    """As TensorRT-LLM's: those that are not given are not there."""
    return SimpleNamespace(kv_cache_config=SimpleNamespace(**cache or {}), **changes)


def scheduler(policy):
    return {"scheduler_config": SimpleNamespace(capacity_scheduler_policy=policy)}


@pytest.mark.parametrize(
    "given",
    [
        SimpleNamespace(),
        arguments(),
        arguments(cache={"enable_block_reuse": True, "enable_partial_reuse": False}),
        arguments(cache={"host_cache_size": 0, "max_attention_window": None, "dtype": "auto"}),
        arguments(cache={"max_attention_window": [4096, 4096]}, max_seq_len=4096),
        arguments(cache={"use_kv_cache_manager_v2": False}),
        arguments(cache={"use_kv_cache_manager_v2": "auto"}),
        arguments(cache={"use_kv_cache_manager_v2": True}),
        arguments(cache={"use_kv_cache_manager_v2": "auto"}, **scheduler("MAX_UTILIZATION")),
        arguments(**scheduler("GUARANTEED_NO_EVICT")),
        arguments(**scheduler(Policy.GUARANTEED_NO_EVICT)),
        arguments(**scheduler(Numbered.GUARANTEED_NO_EVICT)),
        arguments(**scheduler("CapacitySchedulerPolicy.GUARANTEED_NO_EVICT")),
        arguments(**scheduler(None)),
        arguments(orchestrator_type=None, sparse_attention_config=None, speculative_config=None),
        arguments(orchestrator_type="mpi", backend="pytorch", max_beam_width=1),
        arguments(pipeline_parallel_size=1, context_parallel_size=None, enable_attention_dp=False),
        arguments(quant_config=SimpleNamespace(kv_cache_quant_algo="FP8")),
    ],
)
def test_what_may_run(given):
    assert checks.refusals(given) == []


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (arguments(**scheduler("MAX_UTILIZATION")), "capacity_scheduler_policy is MAX_UTILIZATION"),
        (arguments(**scheduler(Policy.MAX_UTILIZATION)), "policy is MAX_UTILIZATION"),
        (arguments(cache={"enable_partial_reuse": True}), "enable_partial_reuse is on"),
        (arguments(cache={"enable_block_reuse": False}), "enable_block_reuse is off"),
        (arguments(cache={"host_cache_size": 1 << 30}), "host_cache_size"),
        (arguments(cache={"max_attention_window": [512, 4096]}, max_seq_len=512), "VSWA"),
        (arguments(cache={"max_attention_window": [512]}), "is 512 and max_seq_len not set"),
        (
            arguments(cache={"max_attention_window": [512, 512]}, max_seq_len=513),
            "is 512 and max_seq_len 513",
        ),
        (arguments(cache={"dtype": "nvfp4"}), "NVFP4"),
        (arguments(quant_config=SimpleNamespace(kv_cache_quant_algo="NVFP4")), "NVFP4"),
        (
            arguments(quant_config=SimpleNamespace(kv_cache_quant_algo=Numbered.NVFP4)),
            "NVFP4",
        ),
        (arguments(max_beam_width=2), "max_beam_width is above 1"),
        (arguments(pipeline_parallel_size=2), "pipeline_parallel_size is above 1"),
        (arguments(context_parallel_size=2), "context_parallel_size is above 1"),
        (arguments(enable_attention_dp=True), "enable_attention_dp"),
        (arguments(speculative_config=SimpleNamespace()), "speculative_config is set"),
        (arguments(sparse_attention_config=SimpleNamespace()), "sparse_attention_config is set"),
        (arguments(orchestrator_type="ray"), "orchestrator_type is ray"),
        (arguments(orchestrator_type="rpc"), "orchestrator_type is rpc"),
        (arguments(backend="tensorrt"), "backend is 'tensorrt'"),
        (arguments(backend=SimpleNamespace(value="_autodeploy")), "backend is"),
    ],
)
def test_what_is_refused(given, reason):
    (found,) = checks.refusals(given)
    assert reason in found


def test_every_reason_is_told_at_once():
    found = checks.refusals(arguments(max_beam_width=2, enable_attention_dp=True))
    assert len(found) == 2


@pytest.mark.parametrize("name", ["scheduler", "worker"])
def test_both_classes_refuse_before_they_ask_for_the_owner(name, tmp_path):
    classes = trtllm_connector.bind(contract, socket_path=tmp_path / "nobody")
    with pytest.raises(ConfigError, match=r"does not run with these .*max_beam_width is above 1"):
        getattr(classes, name)(arguments(max_beam_width=2))


def test_policy_of_auto_is_judged_by_the_manager_that_it_came_to():
    given = arguments(cache={"use_kv_cache_manager_v2": "auto"}, **scheduler("MAX_UTILIZATION"))
    assert checks.manager_refusals(given, is_v2=True) == []
    (found,) = checks.manager_refusals(given, is_v2=False)
    assert "capacity_scheduler_policy is MAX_UTILIZATION" in found


class TestInterface:
    def module(self, **classes):
        return SimpleNamespace(
            __name__="api",
            **{
                "KvCacheConnectorScheduler": contract.KvCacheConnectorScheduler,
                "KvCacheConnectorWorker": contract.KvCacheConnectorWorker,
            }
            | classes,
        )

    def test_the_documented_one_is_accepted(self):
        checks.check_interface(contract)
        text = checks.interface_text(contract)
        assert "abstract KvCacheConnectorWorker.get_finished(self, finished_gen_req_ids" in text
        assert "  KvCacheConnectorWorker.bind_connector_meta(self, metadata" in text

    def test_one_that_asks_for_less_is_accepted(self):
        class Less(ABC):
            @abstractmethod
            def get_finished(self): ...

        checks.check_interface(self.module(KvCacheConnectorWorker=Less))

    @pytest.mark.parametrize("name", ["KvCacheConnectorScheduler", "KvCacheConnectorWorker"])
    def test_unknown_abstract_methods_are_named(self, name):
        class More(getattr(contract, name)):
            @abstractmethod
            def reserve_prefix(self): ...

            @abstractmethod
            def forget(self): ...

        with pytest.raises(ConfigError, match=rf"api\.{name} asks for forget, reserve_prefix"):
            checks.check_interface(self.module(**{name: More}))
        with pytest.raises(ConfigError, match="asks for"):
            trtllm_connector.bind(self.module(**{name: More}))

    @pytest.mark.parametrize("name", ["KvCacheConnectorScheduler", "KvCacheConnectorWorker"])
    @pytest.mark.parametrize("found", [None, print])
    def test_missing_class_is_named(self, name, found):
        with pytest.raises(ConfigError, match=f"api has no class {name}"):
            checks.check_interface(self.module(**{name: found}))


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["sliding_attention"] * 2},
        *(
            {name: 4}
            for name in (
                "mamba_num_heads",
                "mamba_n_heads",
                "mamba_d_state",
                "state_size",
                "ssm_cfg",
                "attn_layer_period",
            )
        ),
        {"hybrid_override_pattern": "M-M*"},
        {"layers_block_type": ["mamba", "attention"]},
        {"block_types": ["recurrent", "attention"]},
    ],
    ids=str,
)
def test_models_of_other_layers_are_refused(fields):
    with pytest.raises(ConfigError, match=r"model type 'x' has layers .*uniform full attention"):
        checks.refuse_model(SimpleNamespace(model_type="x", **fields))


def test_models_of_attention_alone_are_accepted():
    checks.refuse_model(SimpleNamespace(model_type="x"))
    checks.refuse_model(SimpleNamespace(layer_types=["full_attention"] * 3, state_size=None))


@pytest.mark.parametrize("version", ["1.2.0", "1.1.0", "0.21.0", "1.2.1rc3", "1.2.0.post1"])
def test_versions_with_corrupted_kv_are_refused(version):
    with pytest.raises(ConfigError, match=rf"{version} is too old: 1\.2\.1"):
        checks.check_version(version)


@pytest.mark.parametrize(
    "version", ["1.2.1", "1.2.1.post1", "1.3.0rc29", "1.4.0rc1", "2.0.0", "of unknown version"]
)
def test_later_versions_are_taken(version):
    checks.check_version(version)
