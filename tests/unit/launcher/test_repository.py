from dataclasses import replace
from types import SimpleNamespace

import pytest

from kvfetcher.codec.gpu.instances import decode_instances, parallel_decoders, restore_instances
from kvfetcher.config import FetchConfig, load_config
from kvfetcher.errors import ServerError
from kvfetcher.launcher import TritonServer
from kvfetcher.launcher.repository import (
    find_repository,
    is_decoupled,
    mark_changed,
    served_repository,
)

PBTXT = 'name: "kv_decode"\ninstance_group [ { count: 2 kind: KIND_CPU } ]\n'


def _config(instances):
    config = load_config(environ={})
    return replace(config, server=replace(config.server, decode_instances=instances))


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "models"
    for model in ("kv_decode", "other"):
        (folder / model / "1").mkdir(parents=True)
        (folder / model / "1" / "model.py").write_text(f"# {model}\n")
        (folder / model / "config.pbtxt").write_text(f'name: "{model}"\n')
    (folder / "kv_decode" / "config.pbtxt").write_text(PBTXT)
    return folder


@pytest.mark.parametrize("count", [2, 7])
def test_private_copy_has_the_configured_count_and_links_the_rest(repository, tmp_path, count):
    private = served_repository(repository, _config(count), tmp_path / "private")
    assert private == tmp_path / "private"
    changed = PBTXT.replace("2", str(count))
    assert (private / "kv_decode" / "config.pbtxt").read_text() == changed
    assert (private / "kv_decode" / "1" / "model.py").read_text() == "# kv_decode\n"
    assert (private / "other" / "1" / "model.py").readlink().is_relative_to(repository)
    assert (repository / "kv_decode" / "config.pbtxt").read_text() == PBTXT


def test_repository_without_kv_decode_is_served_with_its_own_counts(repository, tmp_path):
    (repository / "kv_decode").rename(repository / "decode")
    private = served_repository(repository, _config(3), tmp_path / "private")
    assert (private / "decode" / "config.pbtxt").read_text() == PBTXT


def test_marking_a_model_as_changed_leaves_the_repository_alone(repository, tmp_path):
    private = served_repository(repository, _config(2), tmp_path / "private")
    before = [(folder / "other" / "1").stat().st_mtime_ns for folder in (private, repository)]
    mark_changed(private, "other")
    after = [(folder / "other" / "1").stat().st_mtime_ns for folder in (private, repository)]
    assert after[0] > before[0]
    assert after[1] == before[1]


def test_decoupled_models_are_told_by_their_configuration(repository, tmp_path):
    text = "model_transaction_policy { decoupled: true }\n"
    (repository / "other" / "config.pbtxt").write_text(text)
    assert is_decoupled(repository, "other")
    assert not is_decoupled(repository, "kv_decode")


@pytest.mark.parametrize("text", ["", PBTXT * 2])
def test_config_without_one_count_is_refused(repository, tmp_path, text):
    (repository / "kv_decode" / "config.pbtxt").write_text(text)
    with pytest.raises(ServerError, match="must hold one 'count:'"):
        served_repository(repository, _config(3), tmp_path / "private")


def test_default_is_one_decoder_per_core_at_most_four():
    assert 1 <= decode_instances(_config(0)) <= 4
    assert decode_instances(_config(9)) == 9


@pytest.mark.parametrize(
    ("arena", "mps", "engines", "setting", "processes"),
    [
        ("host", "off", 7, 0, 1),
        ("gpu", "off", 7, 0, 2),
        ("auto", "off", 7, 0, 2),
        ("gpu", "on", 7, 0, 4),
        ("host", "on", 7, 0, 1),
        ("gpu", "on", 0, 0, 1),
        ("host", "off", 0, 3, 3),
        ("gpu", "on", 7, 3, 3),
    ],
)
def test_restorers_are_as_many_as_the_gpu_has_turns_for(
    monkeypatch, arena, mps, engines, setting, processes
):
    monkeypatch.setattr("kvfetcher.codec.gpu.nvdec.count_engines", lambda gpu: engines)
    config = load_config(environ={})
    server = replace(config.server, restore_instances=setting, mps=mps)
    config = replace(config, server=server, engine=replace(config.engine, arena=arena))
    assert restore_instances(config) == processes


@pytest.mark.parametrize(
    ("arena", "instances", "processes", "side_by_side"),
    [("host", 0, 7, 7), ("gpu", 0, 14, 7), ("auto", 0, 14, 7), ("gpu", 3, 3, 3)],
)
def test_two_decoders_share_an_engine_where_planes_stay_on_the_gpu(
    monkeypatch, arena, instances, processes, side_by_side
):
    monkeypatch.setattr("kvfetcher.codec.gpu.nvdec.count_engines", lambda gpu: 7)
    config = _config(instances)
    config = replace(config, engine=replace(config.engine, arena=arena))
    assert decode_instances(config) == processes
    assert parallel_decoders(config) == side_by_side
    on_cpu = replace(config, codec=replace(config.codec, decoder="cpu"))
    assert parallel_decoders(on_cpu) == decode_instances(on_cpu) <= 4


@pytest.mark.parametrize(
    ("arena", "gpus", "processes", "side_by_side"),
    [
        ("host", (0, 1), 10, 10),
        ("gpu", (0, 1), 20, 10),
        ("gpu", (1,), 6, 3),
        ("gpu", (0, 5), 14, 7),
        ("gpu", (), 6, 3),
    ],
    ids=["both", "both, planes there", "one", "one that is not there", "the engine's"],
)
def test_engines_of_all_gpus_that_decode_count(monkeypatch, arena, gpus, processes, side_by_side):
    engines = {0: 7, 1: 3}
    monkeypatch.setattr("kvfetcher.codec.gpu.nvdec.count_engines", lambda gpu: engines.get(gpu, 0))
    config = load_config(environ={})
    config = replace(
        config,
        server=replace(config.server, decode_gpus=gpus),
        engine=replace(config.engine, arena=arena, device="cuda:1"),
    )
    assert decode_instances(config) == processes
    assert parallel_decoders(config) == side_by_side
    assert restore_instances(config) == (1 if arena == "host" else 2)


@pytest.mark.parametrize(
    ("setting", "decoders", "units"), [(0, 1, 8), (0, 4, 8), (0, 14, 28), (5, 14, 5)]
)
def test_units_in_flight_follow_the_decoders(setting, decoders, units):
    assert FetchConfig(max_inflight_units=setting).units_in_flight(decoders) == units


@pytest.mark.parametrize(("units", "flag"), [(0, ""), (32, ""), (40, "thread-pool-size=40")])
def test_backend_has_a_thread_for_each_unit_in_flight(tmp_path, units, flag):
    config = _config(2)
    config = replace(config, fetch=replace(config.fetch, max_inflight_units=units))
    server = TritonServer(config)
    server._run_dir = SimpleNamespace(shared_memory_prefix="x")
    flags = " ".join(server._flags(SimpleNamespace(backend_folder=tmp_path), tmp_path))
    assert ("thread-pool-size" in flags) == bool(flag)
    assert flag in flags


def test_repository_is_looked_for_in_order(tmp_path, monkeypatch):
    chosen, named, here = (tmp_path / n for n in ("chosen", "named", "model_repository"))
    for folder in (chosen, named, here):
        folder.mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_repository() == here
    monkeypatch.setenv("KVFETCHER_MODEL_REPOSITORY", str(named))
    assert find_repository() == named
    assert find_repository(chosen) == chosen


def test_missing_repository_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ServerError, match="absent is not a folder"):
        find_repository(tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvfetcher.__file__", str(tmp_path / "a" / "b" / "__init__.py"))
    with pytest.raises(ServerError, match="no model repository"):
        find_repository()
