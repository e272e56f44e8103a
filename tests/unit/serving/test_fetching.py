"""Which decode times the fetcher plans with."""

from dataclasses import replace

import pytest

from kvfetcher.config import cache_home, load_config
from kvfetcher.fetch.decode_times import H100_NVDEC, cpu_table, store_table
from kvfetcher.serving import fetching


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def table_for(decoder):
    config = load_config(environ={})
    codec = replace(config.codec, decoder=decoder)
    server = replace(config.server, decode_instances=3)
    return fetching._decode_table(replace(config, codec=codec, server=server))


def test_measured_times_are_planned_with():
    assert table_for("cpu") == cpu_table(3)
    measured = replace(cpu_table(2), device="this one")
    store_table(cache_home(), measured)
    assert table_for("cpu") == measured


def test_times_of_another_decoder_than_the_one_in_use_are_not():
    store_table(cache_home(), H100_NVDEC)
    assert table_for("cpu") == cpu_table(3)
