from dataclasses import replace

import pytest

from kvfetcher.config import load_config
from kvfetcher.errors import ServerError
from kvfetcher.server.repository import decode_instances, find_repository, served_repository

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


def test_literal_repository_is_served_where_its_count_fits(repository, tmp_path):
    assert served_repository(repository, _config(2), tmp_path / "private") == repository
    assert not (tmp_path / "private").exists()


def test_private_copy_changes_the_count_alone(repository, tmp_path):
    private = served_repository(repository, _config(7), tmp_path / "private")
    assert (private / "kv_decode" / "config.pbtxt").read_text() == PBTXT.replace("2", "7")
    assert (private / "kv_decode" / "1" / "model.py").read_text() == "# kv_decode\n"
    assert (private / "other" / "1" / "model.py").read_text() == "# other\n"
    assert (repository / "kv_decode" / "config.pbtxt").read_text() == PBTXT


def test_repository_without_kv_decode_is_served_as_it_is(tmp_path):
    assert served_repository(tmp_path, _config(3), tmp_path / "private") == tmp_path


@pytest.mark.parametrize("text", ["", PBTXT * 2])
def test_config_without_one_count_is_refused(repository, tmp_path, text):
    (repository / "kv_decode" / "config.pbtxt").write_text(text)
    with pytest.raises(ServerError, match="must hold one 'count:'"):
        served_repository(repository, _config(3), tmp_path / "private")


def test_default_is_one_decoder_per_core_at_most_four():
    assert 1 <= decode_instances(_config(0)) <= 4
    assert decode_instances(_config(9)) == 9


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
