"""README says what the code does: inputs, settings, profiles, figures."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from kvfetcher import wire
from kvfetcher.config import PROFILES, explain_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert not [line for line in lines if len(line) > 100]


def test_every_setting_it_names_exists_with_that_default():
    settings = {setting.name: setting.value for setting in explain_config(environ={})}
    named = set(re.findall(r"`((?:server|engine|codec|store|fetch|save)\.[a-z_]+)`", README))
    assert named, "the README names settings"
    assert named <= set(settings)


def test_every_client_input_and_policy_is_there():
    text = (ROOT / "model_repository" / wire.KVFETCHER / "config.pbtxt").read_text()
    inputs = set(re.findall(r'name: "([a-z_]+)" data_type: \w+ dims: \[ -?1 \] optional', text))
    assert {wire.MAX_TOKENS, wire.KV_POLICY} <= inputs
    missing = {name for name in inputs if f"`{name}`" not in README}
    assert not missing
    assert all(f"`{policy}`" in README for policy in wire.KV_POLICIES)


def test_every_profile_is_there():
    assert not {profile for profile in PROFILES if f"`{profile}`" not in README}


@pytest.fixture(scope="module")
def report():
    """tests/benchmarks/report.py."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "tests/benchmarks/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_tables_show_the_results(report):
    results = ROOT / "tests" / "benchmarks" / "results"
    codec = json.loads((results / "codec_smollm2-135m.json").read_text())
    assert report.summary(codec) in README
    fetch = json.loads((results / "fetch_smollm2-135m_exact.json").read_text())
    assert report.fetch_summary(fetch) in README
