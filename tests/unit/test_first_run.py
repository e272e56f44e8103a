"""What went wrong for a new user once (defects D1 to D25 of a trial), each as its whole kind."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest

import kvfetcher
import kvfetcher_client
from kvfetcher.backend.metrics import FETCH_SERIES, GENERATE_SERIES, Metrics
from kvfetcher.cli import main
from kvfetcher.config import load_config
from kvfetcher.doctor.engine import check_engine
from kvfetcher.doctor.preflight import check_before_start, check_store_is_of_use
from kvfetcher.errors import ConfigError, KVFetcherError, StoreError
from kvfetcher.fetch.report import FetchReport, GateReport, Reason
from kvfetcher_client.cli import _summary, _warmed
from kvfetcher_client.protocol import Generation, KVReport
from support import pb_utils
from support.triton_server import free_ports

ROOT = Path(__file__).parents[2]
NAME = "ab/cd/" + "abcd" * 16


def config_of(tmp_path, **sections):
    config = load_config(environ={})
    sections.setdefault("store", {"path": str(tmp_path / "store")})
    return replace(
        config, **{name: replace(getattr(config, name), **v) for name, v in sections.items()}
    )


class TestD3TheStoreIsTriedBeforeTheStart:
    def test_a_useful_one_gives_no_warning_and_keeps_nothing(self, tmp_path):
        assert check_store_is_of_use(config_of(tmp_path)) == ""
        assert [p for p in (tmp_path / "store").rglob("*") if p.is_file()] == []

    def test_a_file_is_refused_in_one_line(self, tmp_path):
        (tmp_path / "store").write_bytes(b"")
        with pytest.raises(StoreError, match="is not a folder") as caught:
            check_before_start(config_of(tmp_path))
        assert "\n" not in str(caught.value)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_may_not_be_written_is_refused(self, tmp_path):
        (tmp_path / "store").mkdir(mode=0o500)
        with pytest.raises(StoreError, match="write permission"):
            check_before_start(config_of(tmp_path))

    def test_one_that_does_not_answer_now_is_a_warning(self, tmp_path):
        pytest.importorskip("redis")
        store = {"kind": "redis", "url": f"redis://127.0.0.1:{free_ports(1)[0]}/0"}
        (warning,) = check_before_start(config_of(tmp_path, store=store))
        assert "until the store answers every prompt is computed" in warning
        assert "\n" not in warning

    def test_where_nothing_is_fetched_or_saved_no_store_is_needed(self, tmp_path):
        (tmp_path / "store").write_bytes(b"")
        config = config_of(tmp_path, fetch={"enabled": False}, save={"enabled": False})
        assert check_before_start(config) == []


class TestD4WrongSettingsAreFoundBeforeTheStart:
    @pytest.mark.parametrize(
        ("variable", "value", "reason"),
        [
            ("CODEC_PROFILE", "balancd", "did you mean balanced"),
            ("ENGINE_DEVICE", "gpu", "auto, cpu, cuda or cuda:N"),
            ("CODEC_FRAME_SIZES", "1024", "WIDTHxHEIGHT"),
        ],
    )
    def test_config_validates(self, monkeypatch, capsys, variable, value, reason):
        monkeypatch.setenv(f"KVFETCHER_{variable}", value)
        assert main(["config"]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert reason in captured.err
        assert captured.err.count("\n") == 1

    @pytest.mark.parametrize(
        "sections",
        [
            {"engine": {"kind": "tensorrt_llm"}},
            {"engine": {"device": "cuda"}},
            {"engine": {"arena": "gpu"}},
            {"codec": {"decoder": "nvdec"}},
        ],
    )
    def test_what_this_machine_lacks_is_named_with_its_setting(self, tmp_path, sections):
        ((section, fields),) = sections.items()
        ((field, value),) = fields.items()
        if Path("/proc/driver/nvidia").exists():
            pytest.skip("this machine may have it")
        with pytest.raises(ConfigError, match=f'{section}.{field} = "{value}"'):
            check_before_start(config_of(tmp_path, **sections))


def page(name):
    return (ROOT / name).read_text()


def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tests" / "demo" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestTheDemo:
    def answer(self, text, seconds, **report):
        facts = {"prompt_tokens": 3500, "hit_tokens": 3328, "stages_ms": {"total": 1000.0}}
        report = KVReport.from_json(json.dumps(facts | report))
        return Generation(text, (), "length", report, seconds)

    @pytest.mark.parametrize(("other", "says"), [("a", "the same answer"), ("b", "DIFFERENT")])
    def test_it_says_what_its_table_means(self, other, says):
        rows = self.answer("x", 13.4), self.answer("a", 3.5), self.answer(other, 14.0)
        text = demo().summary(*rows, 256)
        assert "4.0 times faster" in text
        assert says in text
        assert "172 tokens of the hit were computed" in text
        assert "1000 went by until the prefix" in text
        assert "Next: `make serve`" in text

    def test_d1_it_has_no_chat_format_of_its_own(self):
        assert "<|im_start|>" not in page("tests/demo/demo.py")
        assert demo().chat("why?")[-1]["content"].endswith("Question: why?")


class TestWhatPagesSay:
    def test_d2_how_to_run_it_with_tensorrt_llm_is_linked_from_the_readme(self):
        assert "docs/tensorrt_llm.md" in page("README.md")
        for word in ("docker compose", "doctor --engine tensorrt_llm"):
            assert word in page("docs/tensorrt_llm.md")

    def test_d8_the_gpu_extra_is_installed_from_here(self):
        assert ".venv/bin/pip install -e '.[gpu]'" in " ".join(page("docs/gpu.md").split())
        assert "pip install 'kvfetcher[gpu]'" not in page("README.md")

    def test_d9_every_reason_and_field_is_explained(self):
        text = page("docs/operations.md")
        for reason in filter(None, get_args(Reason)):
            assert f"`{reason}`" in text, reason
        for field in (*fields(FetchReport), *fields(GateReport)):
            assert f"`{field.name}`" in text, field.name

    def test_d16_harmless_lines_are_named(self):
        text = " ".join(page("docs/operations.md").split())
        for line in ("CudaDriverHelper", "unable to create stream", "Cannot remove future"):
            assert line in text

    def test_d23_perf_analyzer_is_installed_by_version(self):
        assert "'perf_analyzer>=2.60'" in page("docs/openai.md")

    def test_d24_streaming_over_http_has_its_own_address(self):
        assert "generate_stream" in page("docs/operations.md")

    def test_d25_restricted_apis_are_explained(self):
        assert "This API is restricted" in page("docs/openai.md")


def test_d5_an_s3_command_ends_with_its_own_status():
    """The library's threads are running when the program ends; without a server: status 1."""
    pytest.importorskip("obstore")
    code = "import obstore.store, sys; from kvfetcher.cli import main; main()"
    environ = {
        **os.environ,
        "KVFETCHER_STORE_KIND": "s3",
        "KVFETCHER_STORE_URL": "s3://bucket",
        "KVFETCHER_STORE_ENDPOINT": f"http://127.0.0.1:{free_ports(1)[0]}",
        "KVFETCHER_STORE_MAX_RETRIES": "0",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }
    for arguments, status in ((["version"], 0), (["store", "ls"], 1), (["store", "ls", "-x"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environ,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == status, done.stderr.decode()


def test_d11_every_error_of_a_request_is_a_client_error():
    for name in kvfetcher_client.__all__:
        kind = getattr(kvfetcher_client, name)
        if isinstance(kind, type) and issubclass(kind, Exception):
            assert issubclass(kind, kvfetcher_client.ClientError), name
    with (
        kvfetcher_client.Client("127.0.0.1:1") as client,
        pytest.raises(kvfetcher_client.ClientError),
    ):
        client.generate("text", nonsense=1)
    assert issubclass(kvfetcher_client.RequestError, kvfetcher.errors.RequestError)


class TestD12UnknownVariablesAreErrors:
    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("KVFETCHER_STORE_PTH", "did you mean KVFETCHER_STORE_PATH?"),
            ("KVFETCHER_STOREPATH", "did you mean KVFETCHER_STORE_PATH?"),
            ("KVFETCHER_PROFILE", "kvfetcher config"),
        ],
    )
    def test_with_the_nearest_setting(self, name, hint):
        with pytest.raises(ConfigError, match=re.escape(hint)) as caught:
            load_config(environ={name: "/x"})
        assert name in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("KVFETCHER_CONFIG", ""),
            ("KVFETCHER_RUN_DIR", "x"),
            ("KVFETCHER_MODEL_REPOSITORY", "x"),
            ("KVFETCHER_STORE_PASSWORD", "x"),
            ("KVFETCHER_REQUIRE_TRITON", "1"),
            ("KVFETCHER_SERVICE_HOST", "10.0.0.1"),
            ("KVFETCHER_SERVICE_PORT", "8000"),
            ("KVFETCHER_SERVICE_PORT_HTTP", "8000"),
            ("KVFETCHER_PORT", "tcp://10.0.0.1:8000"),
            ("KVFETCHER_PORT_8000_TCP_ADDR", "10.0.0.1"),
            ("KVFETCHER_REDIS_PORT", "tcp://10.0.0.1:6379"),
            ("HOME", "x"),
        ],
    )
    def test_but_others_of_ours_and_of_kubernetes_are_not(self, name, value):
        load_config(environ={name: value})


def test_d14_series_are_there_before_their_first_event():
    families = {}

    class Family(pb_utils.MetricFamily):
        def __init__(self, **facts):
            super().__init__(**facts)
            families[self.name] = self

    class Utils:
        MetricFamily = Family

    Metrics(Utils).start(FETCH_SERIES)
    Metrics(Utils).start(GENERATE_SERIES)
    fetches = families["kvfetcher_fetches_total"].series
    assert (("outcome", "miss"), ("reason", "not_stored")) in fetches
    assert {metric.value for metric in fetches.values()} == {0}
    assert "kvfetcher_save_errors_total" in families
    assert "kvfetcher_saves_dropped_total" in families


def test_d15_a_dry_run_says_would(tmp_path, capsys):
    path = tmp_path / "store" / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(b"12345")
    config = tmp_path / "kvfetcher.toml"
    config.write_text(f"[store]\npath = {json.dumps(str(tmp_path / 'store'))}\n")
    purge = ["store", "purge", "--prefix", "ab", "--config", str(config)]
    assert main(purge) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "would remove: purged" in line
    assert path.exists()
    assert main([*purge, "--delete"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "would" not in line


@pytest.mark.parametrize("name", ["kv", "UPPER", "under_score", "-kv-", "a" * 64, "kv-"])
def test_d18_a_name_that_no_bucket_can_have_is_refused_by_its_rule(name):
    environ = {"KVFETCHER_STORE_KIND": "s3", "KVFETCHER_STORE_URL": f"s3://{name}"}
    with pytest.raises(ConfigError, match="3 to 63 characters"):
        load_config(environ=environ)


def test_d19_version_and_help_as_everywhere(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{kvfetcher.__version__}\n"
    assert main([]) == 0
    assert "serve" in capsys.readouterr().out


def test_d20_every_remedy_of_the_doctor_says_what_to_do(monkeypatch):
    def fails(_):
        raise KVFetcherError("it is broken")

    monkeypatch.setattr("kvfetcher.doctor.connector.check_paged", fails)
    (check,) = check_engine(load_config(environ={}), "paged")
    assert check.status == "fail"
    assert "kvfetcher doctor" in check.remedy


class TestD21LinesFitWhatHappened:
    def generation(self, finish_reason, **report):
        return Generation("", (), finish_reason, KVReport.from_json(json.dumps(report)), 0.029)

    def test_warming(self):
        report = {"outcome": "warmed", "chunks_hit": 2, "chunks_stored": 3}
        line = _summary(self.generation("warmed", **report))
        assert "2 of 3 stored chunks" in line
        assert "first token" not in line
        assert line.endswith(_warmed(KVReport.from_json(json.dumps(report))))

    def test_a_short_prompt(self):
        line = _summary(self.generation("stop", prompt_tokens=3, reason="short_prompt"))
        assert "3 prompt tokens, too few for a chunk" in line
        assert "0 of 3" not in line


def test_d22_an_object_of_any_store_comes_out(tmp_path, capsysbinary):
    path = tmp_path / "store" / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\0\xff12345")
    config = tmp_path / "kvfetcher.toml"
    config.write_text(f"[store]\npath = {json.dumps(str(tmp_path / 'store'))}\n")
    get = ["store", "get", "--config", str(config)]
    assert main([*get, NAME]) == 0
    assert capsysbinary.readouterr().out == b"\0\xff12345"
    assert main([*get, NAME, "--output", str(tmp_path / "out"), "--json"]) == 0
    assert (tmp_path / "out").read_bytes() == b"\0\xff12345"
    assert json.loads(capsysbinary.readouterr().out)["num_bytes"] == 7
    assert main([*get, "ab/absent"]) == 1
    assert main([*get, NAME, "--output", str(tmp_path / "no" / "out")]) == 1
    assert b"cannot be written" in capsysbinary.readouterr().err


class TestD25FlagsOfTritonserverPassThrough:
    @pytest.mark.parametrize(
        "flag",
        [
            "--grpc-use-ssl=true",
            "--trace-config=mode=opentelemetry",
            "--http-thread-count=16",
            "--http-restricted-api=inference,trace:api-key=secret",
        ],
    )
    def test_what_serve_does_not_set(self, flag):
        environ = {"KVFETCHER_SERVER_EXTRA_ARGS": json.dumps([flag])}
        assert load_config(environ=environ).server.extra_args == (flag,)

    @pytest.mark.parametrize(
        ("flag", "reason"),
        [
            ("--http-port=1", "is set by `serve` itself"),
            ("--model-control-mode=poll", "is set by `serve` itself"),
            ("-x", "--NAME=VALUE"),
            ("--trace-config mode=x", "--NAME=VALUE"),
            ("--http-restricted-api=model-repository:a=b", "leave out model-repository"),
            ("--grpc-restricted-protocol=health,model-repository:a=b", "leave out"),
            ("--http-restricted-api=health", "API[,API]:HEADER=VALUE"),
        ],
    )
    def test_but_not_what_it_sets(self, flag, reason):
        with pytest.raises(ConfigError, match=re.escape(reason)):
            load_config(environ={"KVFETCHER_SERVER_EXTRA_ARGS": json.dumps([flag])})

    def test_the_launcher_knows_the_headers_that_it_must_send(self):
        flags = ["--http-restricted-api=health,metadata:key=v", "--http-thread-count=2"]
        config = load_config(environ={"KVFETCHER_SERVER_EXTRA_ARGS": json.dumps(flags)})
        assert config.server.restricted_headers == {"key": "v"}


def test_item_8_completion_knows_every_command_and_option(capsys):
    for shell in ("bash", "zsh"):
        assert main(["completion", shell]) == 0
        text = capsys.readouterr().out
        for word in ("serve", "calibrate", "--kv-policy", "--model-repository", "--quarantine"):
            assert word in text, (shell, word)


def test_item_8_version_as_json(capsys):
    assert main(["version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kvfetcher"] == kvfetcher.__version__
