"""What is restored before the first request, on the GPU that the arena is expected on."""

from dataclasses import replace

import pytest

from kvfetcher.backend import warm_up
from kvfetcher.backend.coding import UnitRestorer
from kvfetcher.config import load_config
from kvfetcher.errors import GpuError
from kvfetcher.format.sections import ProfileCode
from kvfetcher.format.unit import parse_unit
from kvfetcher.spec import KVSpec
from support.calibrations import make_calibration


def config_of(arena="gpu", device="auto", **codec):
    config = load_config(environ={})
    return replace(
        config,
        engine=replace(config.engine, arena=arena, device=device),
        codec=replace(config.codec, chunk_tokens=256, **codec),
    )


@pytest.mark.parametrize(
    ("arena", "device", "gpu"),
    [
        ("host", "cuda:1", None),
        ("auto", "cpu", None),
        ("auto", "auto", 0),
        ("gpu", "cuda", 0),
        ("gpu", "cuda:3", 3),
    ],
)
def test_the_gpu_is_the_engines(arena, device, gpu):
    assert warm_up.gpu_of(config_of(arena, device)) == gpu


def test_units_are_of_the_profiles_and_the_dtype_that_will_come(tmp_path):
    units = [parse_unit(unit) for unit in warm_up.warm_up_units(config_of())]
    assert [(u.profile, u.spec.head_dim) for u in units] == [
        (ProfileCode.EXACT, 64),
        (ProfileCode.EXACT, 128),
    ]
    path = tmp_path / "calibration"
    make_calibration(KVSpec(num_layers=4, num_kv_heads=2, head_dim=32)).save(path)
    ladder = config_of(profile="balanced", calibration=str(path), allow_uncertified=True)
    *_, unit = map(parse_unit, warm_up.warm_up_units(ladder))
    assert (unit.profile, unit.num_tokens) == (ProfileCode.TRANSFORM, 256)


@pytest.mark.parametrize("error", [GpuError, KeyError])
def test_a_gpu_that_fails_does_not_keep_the_process_from_starting(monkeypatch, caplog, error):
    warmed = []

    def warm(gpu, unit, planes):
        assert planes.shape == unit.geometry.shape
        warmed.append(gpu)
        if len(warmed) == 2:
            raise error("no memory")

    restorer = UnitRestorer()
    monkeypatch.setattr(restorer._gpu, "warm_up", warm)
    restorer.warm_up(config_of(device="cuda:2"))
    assert warmed == [2, 2]
    assert f"not warmed up: {error.__name__}" in caplog.text
    restorer.warm_up(config_of(arena="host"))
    assert len(warmed) == 2
    restorer.close()
