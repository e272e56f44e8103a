import pytest

from kvfetcher.codec.ladder import library
from kvfetcher.codec.profiles import make_profile
from kvfetcher.config import CodecConfig
from kvfetcher.errors import ConfigError
from kvfetcher.launcher.profile import choose_profile
from kvfetcher.models.identity import weights_digest
from kvfetcher.spec import KVSpec
from support.calibrations import certify, make_calibration
from support.engine_rig import write_model

ROWS = {"near": (5.5, 8e-5), "balanced": (9.75, 5.1e-4), "tiny": (25.0, 7e-3)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def calibration(model):
    return make_calibration(KVSpec(3, 2, 8), model=weights_digest(model))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_known", {})
    monkeypatch.setattr(library, "_served", {})


def test_a_certified_calibration_makes_balanced_the_profile(model, calibration):
    path = library.store_calibration(certify(calibration, **ROWS))
    codec, reason = choose_profile(CodecConfig(), model)
    assert (codec.profile, codec.calibration) == ("balanced", str(path))
    assert make_profile(codec).identity == f"balanced/1 calibration={calibration.digest}"
    assert "9.8 times smaller at KL 5.1e-04" in reason


def test_a_later_calibration_does_not_change_what_was_chosen(model, calibration):
    library.store_calibration(certify(calibration, **ROWS))
    codec, _ = choose_profile(CodecConfig(), model)
    later = make_calibration(KVSpec(3, 2, 8), layers=1, model=calibration.model)
    library.store_calibration(certify(later, **ROWS))
    assert make_profile(codec).calibration.digest == calibration.digest
    assert (
        make_profile(choose_profile(CodecConfig(), model).codec).calibration.digest == later.digest
    )


def test_without_calibration_the_profile_is_exact_and_the_remedy_is_named(model):
    codec, reason = choose_profile(CodecConfig(), model)
    assert codec.profile == "exact"
    assert "kvfetcher calibrate" in reason


def test_an_uncertified_calibration_is_passed_over_unless_allowed(model, calibration):
    library.store_calibration(calibration)
    codec, reason = choose_profile(CodecConfig(), model)
    assert codec.profile == "exact"
    assert "certificate" in reason
    codec, reason = choose_profile(CodecConfig(allow_uncertified=True), model)
    assert codec.profile == "balanced"
    assert "not certified" in reason


def test_a_ladder_profile_gets_the_calibration_that_is_kept(model, calibration):
    path = library.store_calibration(certify(calibration, **ROWS))
    codec, reason = choose_profile(CodecConfig(profile="tiny"), model)
    assert (codec.profile, codec.calibration) == ("tiny", str(path))
    assert "25.0 times" in reason


def test_a_ladder_profile_with_an_uncertified_calibration_is_refused(model, calibration):
    library.store_calibration(calibration)
    with pytest.raises(ConfigError, match="certificate"):
        choose_profile(CodecConfig(profile="tiny"), model)


def test_what_is_configured_stays(model, calibration, tmp_path):
    library.store_calibration(certify(calibration, **ROWS))
    own = tmp_path / "own.safetensors"
    certify(calibration, **ROWS).save(own)
    for codec in (
        CodecConfig(profile="exact"),
        CodecConfig(profile="near", calibration=str(own)),
    ):
        assert choose_profile(codec, model).codec == codec
    codec, reason = choose_profile(CodecConfig(calibration=str(own)), model)
    assert (codec.profile, codec.calibration) == ("balanced", str(own))
    assert reason == "codec.calibration is set: 9.8 times smaller at KL 5.1e-04 nats"


def test_a_certificate_that_says_nothing_is_passed_over_unless_allowed(model, calibration):
    library.store_calibration(calibration.with_certificate({}))
    codec, reason = choose_profile(CodecConfig(), model)
    assert codec.profile == "exact"
    assert "kvfetcher certify" in reason
    codec, reason = choose_profile(CodecConfig(allow_uncertified=True), model)
    assert codec.profile == "balanced"
    assert "not certified" in reason


def test_a_certificate_of_another_kv_dtype_is_passed_over(model, calibration, tmp_path):
    library.store_calibration(certify(calibration))
    assert choose_profile(CodecConfig(), model, dtype="bfloat16").codec.profile == "balanced"
    codec, reason = choose_profile(CodecConfig(), model, dtype="float8_e4m3fn")
    assert codec.profile == "exact"
    assert "--kv-dtype float8_e4m3fn" in reason
    own = tmp_path / "own.safetensors"
    certify(calibration).save(own)
    named = CodecConfig(profile="near", calibration=str(own))
    with pytest.raises(ConfigError, match="certified for bfloat16"):
        choose_profile(named, model, dtype="float8_e4m3fn")


def test_an_uncalibrated_profile_says_that_nothing_is_certified(model):
    codec, reason = choose_profile(CodecConfig(profile="uncalibrated"), model)
    assert codec.profile == "uncalibrated"
    assert "not certified" in reason
    assert "kvfetcher calibrate" in reason


def test_a_ladder_profile_without_any_calibration_is_refused(model):
    with pytest.raises(ConfigError, match="kvfetcher calibrate"):
        choose_profile(CodecConfig(profile="near"), model)


def test_a_named_calibration_of_another_model_is_refused(model, tmp_path):
    other = tmp_path / "other.safetensors"
    certify(make_calibration(KVSpec(3, 2, 8)), **ROWS).save(other)
    with pytest.raises(ConfigError, match="another model"):
        choose_profile(CodecConfig(profile="near", calibration=str(other)), model)


@pytest.mark.parametrize("is_named", [False, True])
def test_auto_stays_exact_below_the_quality_bar_and_says_why(
    model, calibration, tmp_path, is_named
):
    poor = certify(calibration, **(ROWS | {"balanced": (9.75, 2.5e-3)}))
    path = library.store_calibration(poor)
    named = {"calibration": str(path)} if is_named else {}
    codec, reason = choose_profile(CodecConfig(**named), model)
    assert codec.profile == "exact"
    assert "balanced misses its quality bar: KL 2.5e-03 nats (at most 1.2e-03)" in reason
    codec, reason = choose_profile(CodecConfig(profile="balanced"), model)
    assert (codec.profile, codec.calibration) == ("balanced", str(path))
    assert "misses its quality bar" in reason
    assert choose_profile(CodecConfig(allow_uncertified=True), model).codec.profile == "balanced"
