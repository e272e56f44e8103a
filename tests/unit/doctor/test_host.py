"""Checks of the host, each in environments that fail and in one that passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvfetcher.config import load_config
from kvfetcher.doctor import host
from kvfetcher.doctor.check import Check, guarded
from kvfetcher.errors import ConfigError, EngineError, ServerError
from kvfetcher.launcher.installation import Installation
from kvfetcher.models.folders import prepared_folder
from kvfetcher.models.geometry import refuse_folder
from kvfetcher.spec import KVSpec
from support.calibrations import certify, make_calibration
from support.tiny_models import write_family

GOOD = {
    "numpy": "1.26.4", "tritonclient": "2.73.0", "av": "18.1.0", "zstandard": "0.25.0", "isal": "1.9.1",
    "torch": "2.13.0", "transformers": "5.0", "safetensors": "0.8", "PyNvVideoCodec": "2.2.4",
}  # fmt: skip
MIB = 1 << 20


def config(**sections):
    made = load_config(environ={})
    return replace(made, **{n: replace(getattr(made, n), **v) for n, v in sections.items()})


def versions(**changed):
    return lambda name: {**GOOD, **changed}.get(name, "")


def test_a_whole_environment_is_ok():
    check = host.check_packages(config(), version=versions(), has_gpu=True)
    assert (check.status, check.remedy) == ("ok", "")
    assert "numpy 1.26.4" in check.detail


@pytest.mark.parametrize(
    ("settings", "changed", "status", "remedy"),
    [
        ({}, {"numpy": "2.1.0"}, "fail", "pip install 'numpy<2'"),
        ({}, {"av": "", "torch": ""}, "fail", "pip install 'kvfetcher[codec,engine]'"),
        ({}, {"numpy": ""}, "fail", "pip install numpy"),
        ({"store": {"kind": "s3", "url": "s3://bkt"}}, {}, "fail", "pip install 'kvfetcher[s3]'"),
        ({"engine": {"kind": "tensorrt_llm"}}, {}, "fail", "pip install tensorrt_llm"),
        ({}, {"PyNvVideoCodec": ""}, "warn", "pip install 'kvfetcher[gpu]'"),
        ({}, {"PyNvVideoCodec": "2.2.3"}, "warn", "pip install 'PyNvVideoCodec>=2.2.4,<3'"),
        (
            {"codec": {"decoder": "nvdec"}},
            {"PyNvVideoCodec": "2.0.4"},
            "fail",
            "pip install 'PyNvVideoCodec>=2.2.4,<3'",
        ),
    ],
)
def test_a_missing_or_wrong_package_has_its_remedy(settings, changed, status, remedy):
    check = host.check_packages(config(**settings), version=versions(**changed), has_gpu=True)
    assert (check.status, check.remedy) == (status, remedy)


def test_pynvvideocodec_is_not_missed_without_a_gpu_or_for_the_cpu_decoder():
    none = versions(PyNvVideoCodec="")
    assert host.check_packages(config(), version=none, has_gpu=False).status == "ok"
    cpu = config(codec={"decoder": "cpu"})
    assert host.check_packages(cpu, version=none, has_gpu=True).status == "ok"


MPS_FACTS = {
    "has_driver": True, "control": "/usr/bin/nvidia-cuda-mps-control", "in_use": None,
    "compute_mode": "Default",
}  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "changed", "status", "detail"),
    [
        ("off", {}, "ok", "is here and not used (server.mps = off, compute mode Default)"),
        ("auto", {}, "ok", "`serve` starts a daemon (server.mps = auto, compute mode Default)"),
        ("off", {"in_use": Path("/run/mps")}, "ok", "the daemon of /run/mps is used"),
        ("off", {"has_driver": False}, "ok", "no NVIDIA driver here"),
        ("on", {"has_driver": False}, "warn", "no NVIDIA driver here"),
        (
            "auto",
            {"control": None, "compute_mode": ""},
            "ok",
            "compute mode unknown): processes take",
        ),
        ("on", {"control": None}, "warn", "nvidia-cuda-mps-control is not installed"),
        ("off", {"compute_mode": "Exclusive_Process"}, "warn", "compute mode Exclusive_Process"),
    ],
)
def test_mps_is_told_of_and_its_absence_fails_nothing(mode, changed, status, detail):
    check = host.check_mps(config(server={"mps": mode}), **{**MPS_FACTS, **changed})
    assert check.status == status
    assert detail in check.detail
    assert bool(check.remedy) == (status == "warn")


def test_this_environment_has_what_it_says():
    assert host.installed_version("numpy").startswith("1.")
    assert host.installed_version("no-such-package") == ""


def test_tritonserver_is_found_or_missing():
    found = Installation(Path("/opt/tritonserver/bin/tritonserver"), Path("/b"), (), "system")
    assert "/opt/tritonserver" in host.check_tritonserver(lambda: found).detail

    def refuse():
        raise ServerError("no tritonserver found")

    check = host.check_tritonserver(refuse)
    assert (check.status, check.remedy) == ("fail", "pip install 'kvfetcher[server]'")


@pytest.mark.parametrize(
    ("free", "total", "status"),
    [(2048, 4096, "ok"), (1050, 4096, "warn"), (700, 4096, "fail"), (60, 64, "fail")],
)
def test_shared_memory_must_hold_the_arena(free, total, status):
    check = host.check_shared_memory(config(), free_bytes=free * MIB, total_bytes=total * MIB)
    assert check.status == status
    assert ("--shm-size" in check.remedy) == (status != "ok")


def test_shared_memory_of_this_machine_is_read():
    free, total = host.shared_memory_bytes(Path("/dev/shm"))
    assert 0 <= free <= total > 0


def test_a_taken_port_warns():
    assert host.check_free_ports(config(), check=lambda: None).status == "ok"

    def taken():
        raise ServerError("port 8000 of 127.0.0.1 (server.http_port) cannot be bound")

    check = host.check_free_ports(config(), check=taken)
    assert check.status == "warn"
    assert "port 8000" in check.detail


def test_a_model_is_there_or_fetched_or_wrong(tmp_path):
    assert host.check_model(config(), find=lambda _: tmp_path).status == "ok"
    write_family(tmp_path / "mamba", "mamba2")
    found = {"find": lambda _: tmp_path / "mamba", "refuse": refuse_folder}
    check = host.check_model(config(), **found)
    assert check.status == "fail"
    assert "recurrent layers" in check.detail
    write_family(tmp_path / "mla", "deepseek-v3-mla")
    found["find"] = lambda _: tmp_path / "mla"
    assert host.check_model(config(), **found).status == "ok"
    check = host.check_model(config(), find=lambda _: None)
    assert (check.status, check.remedy) == ("warn", "run `kvfetcher prepare` now")
    wrong = host.check_model(config(engine={"model": "absent"}), find=prepared_folder)
    assert wrong.status == "fail"
    assert "'absent' is neither" in wrong.detail


def test_a_built_in_model_that_is_not_here_is_told_without_fetching_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert prepared_folder("smollm2-135m-instruct") is None
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """(certified, uncertified) calibration files."""
    folder = tmp_path_factory.mktemp("calibrations")
    plain = make_calibration(KVSpec(num_layers=2, num_kv_heads=1, head_dim=16))
    plain.save(folder / "plain")
    certify(plain, balanced=(9.51, 5.8e-4)).save(folder / "certified")
    return str(folder / "certified"), str(folder / "plain")


def test_a_profile_without_calibration_needs_none():
    exact = config(codec={"profile": "exact"})
    check = host.check_calibration(exact, read=host.read_certificate)
    assert (check.status, check.detail) == ("ok", "profile exact needs none")


def test_a_certificate_is_told_and_its_lack_refused(artifacts):
    certified, plain = artifacts

    def checked(**codec):
        made = config(codec={"profile": "balanced", **codec})
        return host.check_calibration(made, read=host.read_certificate)

    assert "9.5x smaller at KL 5.8e-04" in checked(calibration=certified).detail
    assert checked(calibration=certified).status == "ok"
    assert checked(calibration=plain).status == "fail"
    assert checked(calibration=plain).remedy == f"kvfetcher certify {plain}"
    assert checked(calibration=plain, allow_uncertified=True).status == "warn"
    assert checked().status == "fail"
    assert "names none" in checked().detail
    assert checked(calibration="/absent").status == "fail"


def test_an_error_of_a_check_is_a_failed_check():
    def known():
        raise ConfigError("the rule")

    def unknown():
        raise ZeroDivisionError("a bug")

    assert guarded("x", known) == Check("x", "fail", "the rule", "see the message")
    broken = guarded("x", unknown)
    assert (broken.status, "ZeroDivisionError" in broken.detail) == ("fail", True)
    with pytest.raises(EngineError):
        prepared_folder("absent")
