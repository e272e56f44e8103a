"""The doctor's checks of engines behind the KV connector, on a real paged engine and the stand-in."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

import support
from kvfetcher.config import CodecConfig, Config, ConnectorConfig, EngineConfig
from kvfetcher.doctor.connector import Compared, judge
from kvfetcher.doctor.engine import check_engine
from kvfetcher.engines.connector import copies, scheduler
from kvfetcher.engines.connector import entry as trtllm_connector
from support.engine_rig import BLOCK, CHUNK, SLICE, edit_json, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_model(tmp_path_factory.mktemp("doctor"))
    edit_json(made / "config.json", dtype="bfloat16")
    return made


@pytest.fixture(autouse=True)
def _own_shared_memory(monkeypatch, tmp_path):
    def forget():
        for name in [n for n in sys.modules if n.split(".")[0] == "tensorrt_llm"]:
            del sys.modules[name]
        for name in ("KVFetcherScheduler", "KVFetcherWorker"):
            trtllm_connector.__dict__.pop(name, None)

    monkeypatch.setenv("KVFETCHER_RUN_DIR", str(tmp_path))
    forget()
    yield
    forget()


def config_of(folder, kind="paged", **connector_options):
    return Config(
        engine=EngineConfig(
            kind=kind,
            model=str(folder),
            tokens_per_block=BLOCK,
            prefill_slice_tokens=SLICE,
            arena_bytes=1 << 20,
        ),
        connector=ConnectorConfig(**{"pool_bytes": 1 << 20} | connector_options),
        codec=CodecConfig(chunk_tokens=CHUNK),
    )


def by_name(checks):
    return {check.name: check for check in checks}


@pytest.mark.parametrize("configured", ["paged", "torch"])
def test_healthy_paged_engine(folder, configured):
    found = by_name(check_engine(config_of(folder, configured), "paged"))
    assert [check.status for check in found.values()] == ["ok"] * 3
    assert "HND by rank" in found["KV layout"].detail
    assert found["load then compare"].detail == (
        f"{CHUNK} loaded tokens gave the answer of computing them, and came back byte for byte"
    )


def test_engine_that_keeps_nothing_is_judged_by_its_answers(folder):
    found = by_name(check_engine(config_of(folder, device_reuse=False), "paged"))
    assert found["load then compare"].status == "ok"
    assert found["load then compare"].detail.endswith("the answer of computing them")


def test_layout_that_is_set_wrongly_does_not_start(folder):
    """Saved and loaded in the same wrong order values come back right: another engine would see it."""
    found = by_name(check_engine(config_of(folder, kv_layout="NHD"), "paged"))
    assert found["engine"].status == "fail"
    assert "kv_layout = 'NHD', but" in found["engine"].detail


def test_layout_that_is_set_rightly_is_proven_too(folder):
    found = by_name(check_engine(config_of(folder, kv_layout="HND"), "paged"))
    assert (found["KV layout"].status, found["load then compare"].status) == ("ok", "ok")


def test_loads_that_go_wrong_are_a_failure(folder, monkeypatch):
    right = copies.BlockCopier.load

    def wrong(self, source, target, **options):
        # (An exchange of blocks would not show: attention does not ask for the order of its keys.)
        return right(self, [source[0]] * len(source), target, **options)

    monkeypatch.setattr(copies.BlockCopier, "load", wrong)
    found = by_name(check_engine(config_of(folder), "paged"))
    assert found["load then compare"].status == "fail"
    assert "with other KV than was loaded" in found["load then compare"].detail
    assert "do not serve" in found["load then compare"].remedy


def test_engine_that_never_asks_is_a_failure(folder, monkeypatch):
    monkeypatch.setattr(scheduler.Announcements, "take", lambda *_: None)
    config = config_of(folder, kv_layout="HND")
    found = by_name(check_engine(config, "paged"))
    assert found["engine"].status == "fail"
    assert "without asking the KV connector" in found["engine"].detail


def test_engine_that_does_not_start_is_one_failed_check(folder):
    config = config_of(folder, pool_bytes=1 << 16)
    config = replace(config, engine=replace(config.engine, model=str(folder / "none")))
    (check,) = check_engine(config, "paged")
    assert (check.name, check.status) == ("engine", "fail")


def test_tensorrt_llm_that_is_not_installed(folder):
    found = by_name(check_engine(config_of(folder, "tensorrt_llm"), "tensorrt_llm"))
    assert found["tensorrt_llm version"].status == "fail"
    assert "cannot be imported" in found["tensorrt_llm version"].detail
    assert found["connector interface"].status == "fail"
    assert "engine" not in found


def test_tensorrt_llm_stand_in(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(support.__path__[0]) / "trtllm_stand_in"))
    found = by_name(check_engine(config_of(folder, "tensorrt_llm"), "tensorrt_llm"))
    assert {check.status for check in found.values()} == {"ok"}, found
    assert found["tensorrt_llm version"].detail == "1.2.1"
    assert "abstract KvCacheConnectorWorker.get_finished(self" in (
        found["connector interface"].detail
    )
    assert "1 rank(s), LLM({" in found["tensorrt_llm arguments"].detail
    import tensorrt_llm

    monkeypatch.setattr(tensorrt_llm, "__version__", "1.5.0")
    found = by_name(check_engine(config_of(folder, "tensorrt_llm"), "tensorrt_llm"))
    assert found["tensorrt_llm version"].status == "warn"


@pytest.mark.parametrize(
    ("found", "status", "text"),
    [
        (Compared((1,), (2,), (1,), 32, "", True), "ok", "32 loaded tokens"),
        (Compared((1,), (2,), (1,), 32, "", None), "ok", "32 loaded tokens"),
        # A healthy engine may answer otherwise where the likeliest tokens lie close together.
        (Compared((1,), (2,), (3,), 32, "", True), "warn", "came back byte for byte"),
        (Compared((1,), (2,), (3,), 32, "", None), "warn", "could not be compared"),
        (Compared((1,), (2,), (1,), 32, "", False), "fail", "with other KV than was loaded"),
        (Compared((1,), (1,), (1,), 32, "", False), "fail", "with other KV than was loaded"),
        (Compared((1,), (1,), (1,), 32, "", True), "warn", "proves nothing"),
        (Compared((1,), (2,), (1,), 0, "no reason", None), "fail", "loaded nothing: no reason"),
    ],
)
def test_judgement(found, status, text):
    check = judge(found)
    assert check.status == status
    assert text in check.detail
