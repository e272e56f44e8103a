"""The command: what it prints, its exit status, the store and the engines' own checks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvfetcher.cli import main
from kvfetcher.codec.gpu import nvdec
from kvfetcher.codec.gpu.nvdec import DecoderCaps
from kvfetcher.config import cache_home, load_config
from kvfetcher.doctor import command, timing
from kvfetcher.doctor.check import Check
from kvfetcher.doctor.engine import check_engine
from kvfetcher.doctor.store import check_store
from kvfetcher.errors import DecoderUnavailableError, EngineError
from kvfetcher.fetch.planning.decode_times import H100_NVDEC, load_table
from kvfetcher.storage import LocalStore


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """The table of this machine is not overwritten by a test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / "kvfetcher.toml"
    path.write_text(f"[store]\npath = {json.dumps(str(tmp_path / 'store'))}\n")
    return path


def test_a_whole_run_here_checks_everything_and_keeps_the_table(
    settings, monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(timing.PICTURE_SIZES, "cpu", ((160, 144),))
    monkeypatch.setattr(command, "_TIMING_SECONDS", 0.05)
    status = main(["doctor", "--json", "--config", str(settings)])
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    found = {check["name"]: check["status"] for check in facts["checks"]}
    assert list(found) == [
        "packages", "tritonserver", "shared memory", "ports", "model", "calibration", "store", "trust",
        "driver", "MPS", "CPU decoder", "encoder", *(["NVDEC"] if "NVDEC" in found else []),
        *(name for name in found if name.endswith(" golden")), "decode times",
    ]  # fmt: skip
    assert found["model"] == "warn", "the cache is empty"
    assert found["CPU decoder"] == found["decode times"] == found["store"] == "ok"
    assert facts["ok"] == (status == 0)
    assert "timing pictures of 160x144" in captured.err
    assert load_table(cache_home(), fallback=H100_NVDEC).source.startswith("kvfetcher doctor")
    assert not list((tmp_path / "store").rglob("doctor-*")), "the probe object is gone"


class FakeProcesses:
    """Whose processes decode as they should."""

    def __init__(self, kind, size, gpus):
        assert (kind, size) == ("nvdec", len(gpus))
        self._gpus = gpus

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def digests(self, stream, *, gpu):
        return [stream.sha256] * sum(gpu is None or its == gpu for its in self._gpus)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([0], {"NVDEC": "ok", "nvdec golden": "ok"}),
        (
            [2, 0, 5],
            {
                "NVDEC, GPU 2": "ok",
                "NVDEC, GPU 0": "ok",
                "NVDEC, GPU 5": "fail",
                "nvdec golden, GPU 2": "ok",
                "nvdec golden, GPU 0": "ok",
            },
        ),
        ([0, 5], {"NVDEC, GPU 0": "ok", "NVDEC, GPU 5": "fail", "nvdec golden, GPU 0": "ok"}),
    ],
)
def test_each_gpu_that_decodes_is_checked_by_name(tmp_path, monkeypatch, capsys, gpus, expected):
    def ask(gpu):
        if gpu == 5:
            raise DecoderUnavailableError("there is no GPU 5 here")
        return [DecoderCaps("4:4:4", 10, 3 + gpu, 144, 144, 8192, 8192)]

    monkeypatch.setattr(nvdec, "loads_library", lambda library: True)
    monkeypatch.setattr(nvdec, "ask_caps", ask)
    monkeypatch.setattr(nvdec, "count_engines", lambda gpu: 3 + gpu)
    monkeypatch.setattr("kvfetcher.doctor.parallel_decode.DecoderProcesses", FakeProcesses)
    path = tmp_path / "gpus.toml"
    path.write_text(f"[server]\ndecode_gpus = {gpus}\n")
    main(["doctor", "--json", "--quick", "--config", str(path)])
    checks = json.loads(capsys.readouterr().out)["checks"]
    found = {c["name"]: c for c in checks if c["name"].lower().startswith("nvdec")}
    assert {name: check["status"] for name, check in found.items()} == expected
    for name, check in found.items():
        if "golden" in name:
            gpu = int(name.rpartition(" ")[2]) if "GPU" in name else 0
            assert f"{3 + gpu} processes at once" in check["detail"]
        if check["status"] == "fail":
            assert "server.decode_gpus" in check["remedy"]


def test_people_get_a_line_per_check_with_its_remedy(settings, monkeypatch, capsys):
    checks = [
        Check("packages", "ok", "all there"),
        Check("driver", "warn", "half of it", "the other half"),
        Check("store", "fail", "it is down", "start it"),
    ]
    monkeypatch.setattr(command, "_checks", lambda *_: iter(checks))
    assert main(["doctor", "--config", str(settings)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok    packages       all there",
        "warn  driver         half of it",
        "                     remedy: the other half",
        "fail  store          it is down",
        "                     remedy: start it",
        "3 checks, 1 warnings, 1 failed",
    ]


def test_a_missing_package_ends_the_video_checks_not_the_doctor(settings, monkeypatch, capsys):
    missing = Check("packages", "fail", "av missing", "pip install 'kvfetcher[codec]'")
    monkeypatch.setattr(command.host, "check_packages", lambda *_, **__: missing)
    monkeypatch.setattr(command, "_VIDEO_PACKAGES", ("numpy", "no_such_av"))
    assert main(["doctor", "--json", "--config", str(settings)]) == 1
    last = json.loads(capsys.readouterr().out)["checks"][-1]
    assert (last["name"], last["status"]) == ("video", "fail")
    assert last["detail"] == "not checked without no_such_av"
    assert last["remedy"] == "pip install 'kvfetcher[codec]'"


def test_nvdec_that_must_be_usable_and_is_not_fails(settings, monkeypatch, capsys):
    monkeypatch.setenv("KVFETCHER_CODEC_DECODER", "nvdec")
    if command.Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a driver: not tested")
    assert main(["doctor", "--quick", "--json", "--config", str(settings)]) == 1
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["driver"]["status"] == "fail"
    assert "capability `video`" in checks["driver"]["remedy"]
    assert "decode times" not in checks


def test_the_store_alone(settings, capsys, tmp_path):
    assert main(["doctor", "--store", "--config", str(settings)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("ok    store          file")
    (tmp_path / "store").rename(tmp_path / "away")
    (tmp_path / "store").write_text("in the way")
    assert main(["doctor", "--store", "--config", str(settings)]) == 1
    assert "remedy: check that the store runs" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--absent"], ["--engine", "absent"], ["word"]])
def test_wrong_command_line_is_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *arguments])
    assert ended.value.code == 2
    assert "usage: kvfetcher doctor" in capsys.readouterr().err


class Forgetful(LocalStore):
    async def get(self, name):
        return b"x" * len(await super().get(name))


class Keeping(LocalStore):
    async def delete(self, name):
        pass


@pytest.mark.parametrize(("kind", "reason"), [(Forgetful, "other bytes"), (Keeping, "deletion")])
def test_a_store_that_lies_fails(tmp_path, kind, reason):
    config = load_config(environ={})
    config = replace(config, store=replace(config.store, path=str(tmp_path)))
    check = check_store(config, open_it=lambda: kind(tmp_path, timeout_seconds=5))
    assert check.status == "fail"
    assert reason in check.detail


def good(config):
    return [Check("engine thing", "ok", config.engine.kind)]


def bad(config):
    raise EngineError("the layout is another one")


def test_engines_bring_their_own_checks():
    config = load_config(environ={})
    known = {
        "torch": (__name__, "good"),
        "paged": (__name__, "bad"),
        "tensorrt_llm": ("kvfetcher_no_such_module", "checks"),
    }
    assert check_engine(config, "torch", known=known) == [Check("engine thing", "ok", "torch")]
    (failed,) = check_engine(config, "paged", known=known)
    assert (failed.status, failed.detail) == ("fail", "the layout is another one")
    (missing,) = check_engine(config, "tensorrt_llm", known=known)
    assert "cannot be imported" in missing.detail
    assert check_engine(config, "torch", known={}) == []
