"""The container's files agree with the code: names, settings, arguments, a user without rights."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from kvfetcher.config import is_setting_variable, load_config
from kvfetcher.engines.tensorrt_llm import llm_arguments
from kvfetcher.launcher.repository import REPOSITORY_VARIABLE

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "python_backends/deploy/compose.yaml").read_text())


def stages():
    """Instructions of each stage of the Dockerfile, by name; continuation lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    found, name = {}, "head"
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            name = rest.split(" AS ")[1]
        found.setdefault(name, []).append((instruction, rest.strip()))
    return found


STAGES = stages()


@pytest.mark.parametrize("stage", ["plain", "trtllm"])
def test_stage_is_complete(stage):
    by_name = {}
    for instruction, rest in STAGES[stage]:
        by_name.setdefault(instruction, []).append(rest)
    assert by_name["USER"][-1] == "10001"
    assert by_name["ENTRYPOINT"] == ['["kvfetcher"]']
    assert by_name["CMD"] == ['["serve"]']
    assert "v2/health/ready" in by_name["HEALTHCHECK"][0]
    settings = dict(part.split("=", 1) for part in by_name["ENV"][0].split())
    assert settings["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility,video"
    ours = {name for name in settings if name.startswith("KVFETCHER_")}
    assert all(is_setting_variable(name) for name in ours - {REPOSITORY_VARIABLE})
    environ = {name: settings[name] for name in ours}
    config = load_config(environ=environ)
    assert config.server.host == "0.0.0.0"
    assert config.engine.kind == ("tensorrt_llm" if stage == "trtllm" else "torch")
    for rest in by_name["COPY"]:
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source


def test_default_stage_is_the_pinned_tensorrt_llm_image():
    assert list(STAGES)[-1] == "trtllm"
    arguments = dict(rest.split("=", 1) for name, rest in STAGES["head"] if name == "ARG")
    assert re.fullmatch(r"26\.0[4-7]-trtllm-python-py3", arguments["TRITON_TAG"])
    assert COMPOSE["services"]["kvfetcher"]["build"]["target"] == "trtllm"
    assert (
        arguments["TRITON_TAG"] in COMPOSE["services"]["kvfetcher"]["build"]["args"]["TRITON_TAG"]
    )


def test_compose_configuration_is_one_that_runs(tmp_path):
    toml = tmp_path / "kvfetcher.toml"
    toml.write_text(COMPOSE["configs"]["kvfetcher"]["content"])
    arguments = tmp_path / "llm_args.yaml"
    arguments.write_text(COMPOSE["configs"]["llm_args"]["content"])
    service = COMPOSE["services"]["kvfetcher"]
    targets = {item["target"] for item in service["configs"]}
    given = tomllib.loads(toml.read_text())
    assert given["engine"]["llm_args"] in targets
    assert service["environment"]["KVFETCHER_CONFIG"] in targets
    environ = {
        name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value)
        for name, value in service["environment"].items()
        if is_setting_variable(name)
    } | {"KVFETCHER_ENGINE_LLM_ARGS": str(arguments)}
    config = load_config(toml, environ=environ)
    assert config.store.redis_address.host in COMPOSE["services"]
    values, num_ranks = llm_arguments(config, Path("/models/model"))
    assert num_ranks == 1
    assert values["kv_cache_config"]["tokens_per_block"] == config.engine.tokens_per_block
    gigabytes = int(service["shm_size"].removesuffix("gb"))
    assert gigabytes << 30 >= config.engine.arena_bytes + (2 << 30)


def test_containers_get_cuda_and_nvdec_and_come_back():
    service = COMPOSE["services"]["kvfetcher"]
    capabilities = set(service["environment"]["NVIDIA_DRIVER_CAPABILITIES"].split(","))
    assert capabilities == {"compute", "utility", "video"}
    # Docker appends what else stands here as another NVIDIA_DRIVER_CAPABILITIES, which then wins.
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    added = set(device["capabilities"]) - {"gpu"}
    assert not added or added == capabilities
    assert service["init"] is True
    assert {s["restart"] for s in COMPOSE["services"].values()} == {"unless-stopped"}


def test_every_test_file_that_the_page_names_exists():
    page = (ROOT / "docs/measurements/tensorrt_llm.md").read_text()
    for name in re.findall(r"`(tests/[\w/.]+)`", page):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(test_\w+\.py)`", page):
        assert (ROOT / "tests/unit/trtllm" / name).is_file(), name
