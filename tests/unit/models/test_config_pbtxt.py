"""The literal config.pbtxt files agree with wire.py, and every model's docstring is its contract."""

import ast
import re
from pathlib import Path

import pytest
from tritonclient.grpc import model_config_pb2

from google.protobuf import text_format  # isort: skip
from kvfetcher import wire

ROOT = Path(__file__).parents[3] / "model_repository"
MODELS = sorted(path.parent.name for path in ROOT.glob("*/config.pbtxt"))
PYTHON_MODELS = sorted(path.parents[1].name for path in ROOT.glob("*/1/model.py"))


def parse(model):
    return text_format.Parse(
        (ROOT / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )


def wire_names():
    return {
        value for name, value in vars(wire).items() if name.isupper() and isinstance(value, str)
    }


def test_every_model_of_the_design_exists():
    assert sorted(
        [
            wire.KVFETCHER, wire.PREPROCESSING, wire.KV_FETCH, wire.KV_PIPELINE, wire.KV_DECODE,
            wire.KV_RESTORE, wire.KV_ENCODE, wire.KV_SAVE, wire.TENSORRT_LLM, wire.POSTPROCESSING,
            wire.KVFETCHER_OPENAI, wire.OPENAI_INPUT,
        ]
    ) == MODELS  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_config_parses_and_names_its_folder(model):
    config = parse(model)
    assert config.name == model
    assert (ROOT / model / "1").is_dir()


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_name_is_in_wire(model):
    config = parse(model)
    names = {tensor.name for tensor in [*config.input, *config.output]}
    assert names <= wire_names()


@pytest.mark.parametrize("model", MODELS)
def test_every_name_that_wire_calls_a_model_input_is_used_with_one_type(model):
    types = {}
    for other in MODELS:
        for tensor in [*parse(other).input, *parse(other).output]:
            types.setdefault(tensor.name, set()).add(tensor.data_type)
    for tensor in [*parse(model).input, *parse(model).output]:
        assert len(types[tensor.name]) == 1, tensor.name


@pytest.mark.parametrize("model", [m for m in MODELS if m not in PYTHON_MODELS])
def test_ensemble_steps_map_existing_tensors(model):
    for step in parse(model).ensemble_scheduling.step:
        inner = parse(step.model_name)
        inputs = {tensor.name: tensor.optional for tensor in inner.input}
        assert set(step.input_map) <= set(inputs)
        assert {name for name, optional in inputs.items() if not optional} <= set(step.input_map)
        assert set(step.output_map) <= {tensor.name for tensor in inner.output}


@pytest.mark.parametrize("model", PYTHON_MODELS)
def test_model_docstring_names_every_tensor(model):
    docstring = ast.get_docstring(ast.parse((ROOT / model / "1" / "model.py").read_text()))
    if model in (wire.KV_FETCH,):  # its client inputs are one phrase there
        names = {tensor.name for tensor in parse(model).output}
    else:
        names = {tensor.name for tensor in [*parse(model).input, *parse(model).output]}
    missing = {name for name in names if not re.search(rf"\b{name}\b", docstring)}
    assert not missing


@pytest.mark.parametrize("model", PYTHON_MODELS)
def test_model_stays_thin(model):
    tree = ast.parse((ROOT / model / "1" / "model.py").read_text())
    code_lines = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)}
    assert len(code_lines) <= 60
