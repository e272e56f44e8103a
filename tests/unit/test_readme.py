"""README says what the code does: inputs, settings, metrics, commands."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from kvfetcher import cli, wire
from kvfetcher.codec.profiles import PROFILES
from kvfetcher.config import explain_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) <= 200


def test_every_setting_it_names_exists_with_that_default():
    settings = {setting.name: setting.value for setting in explain_config(environ={})}
    named = set(re.findall(r"`((?:server|engine|codec|store|fetch|save)\.[a-z_]+)`", README))
    assert named, "the README names settings"
    assert named <= set(settings)
    table = dict(re.findall(r"^\| `([a-z]+\.[a-z_]+)` \| `([^`]+)` \|", README, re.MULTILINE))
    for name, default in table.items():
        if name != "store.path":  # the code's default is "", which means that folder
            assert str(settings[name]) == default


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


def test_its_table_and_the_page_on_the_codec_show_the_results(report):
    page = (ROOT / "docs" / "codec.md").read_text()
    results = sorted((ROOT / "tests/benchmarks/results").glob("codec_*.json"))
    assert results
    for path in results:
        assert report.table(json.loads(path.read_text())) in page, path.name
    default = ROOT / "tests/benchmarks/results/codec_smollm2-135m.json"
    assert report.summary(json.loads(default.read_text())) in README


def test_the_page_on_fetching_shows_the_results(report):
    page = (ROOT / "docs" / "fetching.md").read_text()
    results = ROOT / "tests" / "benchmarks" / "results"
    for pattern, make in (("fetch_*", report.fetch_table), ("mixed_*", report.mixed_table)):
        paths = sorted(results.glob(f"{pattern}.json"))
        assert paths
        for path in paths:
            assert make(json.loads(path.read_text())) in page, path.name


def test_the_page_on_gpus_shows_the_results(report):
    page = (ROOT / "docs" / "gpu.md").read_text()
    results = ROOT / "tests" / "benchmarks" / "results"
    for pattern, make in (
        ("gpu_path_*", report.gpu_table),
        ("gpu_instances_*", report.instances_table),
    ):
        paths = sorted(results.glob(f"{pattern}.json"))
        assert paths
        for path in paths:
            assert make(json.loads(path.read_text())) in page, path.name


def test_its_files_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_its_commands_parse(capsys):
    verbs = set(re.findall(r"(?:bin/|`)kvfetcher ([a-z]+)", README))
    assert {"serve", "generate", "config"} <= verbs
    for verb in verbs:
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, "--help"])
        assert ended.value.code == 0
    capsys.readouterr()
