"""What importing costs: the client and the command line bring none of the heavy packages."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "av", "transformers", "PyNvVideoCodec", "pytriton", "scipy", "redis", "obstore")


def _loaded_by(statement):
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    return set(json.loads(output))


@pytest.mark.parametrize(
    "module", ["kvfetcher_client", "kvfetcher_client.cli", "kvfetcher.cli", "kvfetcher.launcher"]
)
def test_light_modules_stay_light(module):
    assert not _loaded_by(f"import {module}") & set(HEAVY)


@pytest.mark.parametrize(
    "module",
    ["errors", "wire", "config", "spec", "format.keys", "storage", "launcher", "cli"],
)
def test_stdlib_modules_bring_no_other_package(module):
    assert not _loaded_by(f"import kvfetcher.{module}") & {*HEAVY, "numpy", "grpc", "tritonclient"}


def test_only_the_models_import_tritons_utilities():
    assert "triton_python_backend_utils" not in _loaded_by(
        "import kvfetcher.cli, kvfetcher.launcher, kvfetcher_client"
    )


def test_the_connector_in_the_engines_processes_brings_torch_alone():
    loaded = _loaded_by("import kvfetcher.trtllm_connector")
    assert not loaded & {"transformers", "av", "PyNvVideoCodec", "pytriton", "tritonclient"}


def test_the_name_in_tensorrt_llms_configuration_is_the_connector_itself():
    import kvfetcher.trtllm_connector as alias
    from kvfetcher.engines.connector import entry

    assert alias is entry or alias.bind is entry.bind
