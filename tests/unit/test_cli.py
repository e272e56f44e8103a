import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvfetcher
from kvfetcher.cli import main
from kvfetcher.config import SECTIONS
from support.triton_server import TritonServer, free_ports, server_config, write_model

NAME = "ab/cd/" + "abcd" * 16


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "kvfetcher.toml"
    path.write_text(f"[store]\npath = {json.dumps(str(tmp_path / 'store'))}\n")
    return path


@pytest.fixture
def stored(tmp_path, config_file):
    """A store with two objects; the configuration that names it."""
    for name, data in ((NAME, b"12345"), ("ff/00/x", b"1")):
        path = tmp_path / "store" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    return config_file


def test_version(capsys):
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"{kvfetcher.__version__}\n"


def test_config_shows_every_setting_with_its_source(capsys, config_file):
    assert main(["config", "--config", str(config_file)]) == 0
    output = capsys.readouterr().out
    assert f"({config_file})" in output
    for name in SECTIONS:
        assert f"{name}." in output


def test_config_as_json(capsys, config_file):
    assert main(["config", "--config", str(config_file), "--json"]) == 0
    settings = {s["name"]: s for s in json.loads(capsys.readouterr().out)}
    assert settings["store.path"]["source"] == str(config_file)
    assert settings["server.http_port"]["value"] == 8000


def test_known_error_is_one_line_without_traceback(capsys):
    assert main(["config", "--config", "/absent.toml"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "kvfetcher: configuration file /absent.toml cannot be read: No such file or directory\n"
    )


@pytest.mark.parametrize("arguments", [["absent"], ["serve", "--http-port", "x"], ["store"]])
def test_wrong_command_line_is_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: kvfetcher" in capsys.readouterr().err


def test_store_ls(capsys, stored):
    assert main(["store", "ls", "--config", str(stored)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["5", "1"]
    assert [line.split()[-1] for line in lines] == [NAME, "ff/00/x"]
    assert main(["store", "ls", "ab", "--json", "--config", str(stored)]) == 0
    assert [info["name"] for info in json.loads(capsys.readouterr().out)] == [NAME]


def test_store_stat(capsys, stored):
    assert main(["store", "stat", "--json", "--config", str(stored)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["objects"], facts["num_bytes"]) == (2, 6)
    assert main(["store", "stat", NAME, "--config", str(stored)]) == 0
    assert "num_bytes: 5\n" in capsys.readouterr().out
    assert main(["store", "stat", "ab/absent", "--config", str(stored)]) == 1
    assert "has no object ab/absent" in capsys.readouterr().err


def test_output_that_nobody_reads_is_no_error():
    process = subprocess.run(
        ["sh", "-c", f"(sleep 0.2; {sys.executable} -m kvfetcher.cli config) | true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stderr == ""


def test_inspect_refuses_what_is_no_chunk(capsys, tmp_path):
    (tmp_path / "x").write_bytes(b"no chunk at all" * 100)
    assert main(["inspect", str(tmp_path / "x")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["inspect", str(tmp_path / "absent")]) == 1
    assert "cannot be read: No such file" in capsys.readouterr().err


def test_serve_without_models_says_where_it_looked(capsys, tmp_path):
    assert main(["serve", "--model-repository", str(tmp_path / "absent")]) == 1
    assert "model repository" in capsys.readouterr().err


@pytest.mark.triton
def test_env_prints_shell_exports(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/usr/bin")
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("export ") for line in lines)
    path = next(line for line in lines if line.startswith("export PATH="))
    assert path.startswith(f"export PATH={Path(sys.executable).parent}:")


def test_generate_without_a_server_is_one_line(capsys):
    url = f"127.0.0.1:{free_ports(1)[0]}"
    assert main(["generate", "--no-chat", "question", "--url", url]) == 1
    error = capsys.readouterr().err
    assert "is `kvfetcher serve` running?" in error
    assert "Traceback" not in error


def test_generate_refuses_an_unreadable_document(capsys, tmp_path):
    assert main(["generate", "question", "--file", str(tmp_path / "absent")]) == 1
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert main(["generate", "question", "--file", str(tmp_path / "binary")]) == 1
    assert "is not UTF-8 text" in capsys.readouterr().err


ECHO_CONFIG = """
name: "kvfetcher"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [
  { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] optional: true },
  { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "kv_policy" data_type: TYPE_STRING dims: [ 1 ] optional: true },
  { name: "stop_words" data_type: TYPE_STRING dims: [ -1 ] optional: true }
]
output [
  { name: "text_output" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "output_ids" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "finish_reason" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "kv_report" data_type: TYPE_STRING dims: [ 1 ] }
]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""

ECHO_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils

REPORT = b'{"prompt_tokens": 9, "hit_tokens": 4, "bytes_fetched": 2000000, "reason": "not_stored"}'


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            prompt = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()[0]
            policy = pb_utils.get_input_tensor_by_name(request, "kv_policy")
            words = [b"[", prompt, b"]", policy.as_numpy()[0] if policy else b""]
            sender = request.get_response_sender()
            for i, word in enumerate(words):
                last = i == len(words) - 1
                values = {
                    "text_output": word,
                    "finish_reason": b"stop" if last else b"",
                    "kv_report": REPORT if last else b"",
                }
                tensors = [
                    pb_utils.Tensor(k, np.array([v], dtype=object)) for k, v in values.items()
                ]
                tensors.append(pb_utils.Tensor("output_ids", np.array([i], dtype=np.int32)))
                sender.send(pb_utils.InferenceResponse(tensors))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server whose model answers with the prompt and the policy it got."""
    repository = tmp_path_factory.mktemp("repository")
    write_model(repository, "kvfetcher", config=ECHO_CONFIG, model=ECHO_MODEL)
    with TritonServer(server_config(), model_repository=repository) as server:
        yield server.grpc_url


@pytest.mark.triton
@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_generate_prints_the_answer_and_sums_up_on_stderr(capsys, url, stream):
    assert (
        main(["generate", "--no-chat", "why?", "--url", url, "--kv-policy", "no_store", *stream])
        == 0
    )
    captured = capsys.readouterr()
    assert captured.out == "[why?]no_store\n"
    assert captured.err.startswith(
        "kvfetcher: 4 of 9 prompt tokens fetched (not_stored), 2.00 MB; first token after "
    )


@pytest.mark.triton
def test_generate_puts_the_document_first(capsys, url, tmp_path):
    (tmp_path / "doc.txt").write_text("The document.\n\n")
    assert (
        main(["generate", "--no-chat", "why?", "--url", url, "--file", str(tmp_path / "doc.txt")])
        == 0
    )
    assert capsys.readouterr().out == "[The document.\n\nwhy?]\n"


@pytest.mark.triton
def test_generate_as_json(capsys, url):
    assert main(["generate", "--no-chat", "é?", "--url", url, "--json", "--stream"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.pop("time_to_first_token_seconds") > 0
    assert answer == {
        "text": "[é?]",
        "output_ids": [0, 1, 2, 3],
        "finish_reason": "stop",
        "kv_report": {
            "prompt_tokens": 9,
            "hit_tokens": 4,
            "bytes_fetched": 2000000,
            "reason": "not_stored",
        },
    }


@pytest.mark.parametrize("kind", ["fifo", "device", "sparse", "folder"])
def test_inspect_reads_regular_files_and_no_more_than_a_chunk(tmp_path, capsys, kind):
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    assert main(["inspect", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kvfetcher: ")
    assert "Traceback" not in error
