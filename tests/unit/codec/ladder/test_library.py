import pytest

from kvfetcher.codec.ladder import library
from kvfetcher.codec.profiles import make_profile, profile_id
from kvfetcher.config import CodecConfig
from kvfetcher.errors import ConfigError
from kvfetcher.spec import LADDER, KVSpec
from support.calibrations import certify, make_calibration

SPEC = KVSpec(3, 2, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_known", {})
    monkeypatch.setattr(library, "_served", {})
    return tmp_path


@pytest.fixture(scope="module")
def calibration():
    return certify(make_calibration(SPEC))


def test_stored_calibration_is_found_by_digest_and_by_model(calibration):
    path = library.store_calibration(calibration)
    library._known.clear()
    assert library.find_calibration(calibration.digest).digest == calibration.digest
    assert library.model_calibration_path(calibration.model).resolve() == path


def test_a_second_calibration_of_a_model_leaves_the_first_for_old_chunks(calibration):
    first = library.store_calibration(calibration)
    other = certify(make_calibration(SPEC, layers=1))
    second = library.store_calibration(other)
    assert first.exists()
    assert library.model_calibration_path(calibration.model).resolve() == second


def test_unknown_calibration_names_the_file_to_copy():
    with pytest.raises(ConfigError, match=r"0000\.safetensors"):
        library.find_calibration("0" * 64)


def test_file_with_another_calibration_than_its_name_is_refused(calibration):
    folder = library.calibration_folder()
    calibration.save(folder / f"{'1' * 64}.safetensors")
    with pytest.raises(ConfigError, match="another digest"):
        library.find_calibration("1" * 64)


@pytest.mark.parametrize("name", LADDER)
def test_ladder_profiles_come_from_the_configuration(calibration, name):
    path = library.store_calibration(calibration)
    config = CodecConfig(profile=name, calibration=str(path))
    assert make_profile(config).name == name
    assert profile_id(config, SPEC) == f"{name}/1 calibration={calibration.digest}"


def test_ladder_without_calibration_is_refused():
    with pytest.raises(ConfigError, match="kvfetcher calibrate"):
        make_profile(CodecConfig(profile="balanced"))


def test_missing_calibration_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        make_profile(CodecConfig(profile="balanced", calibration=str(tmp_path / "none")))


def test_uncertified_calibration_is_served_only_when_allowed(tmp_path):
    path = tmp_path / "c.safetensors"
    make_calibration(SPEC).save(path)
    with pytest.raises(ConfigError, match="certificate"):
        make_profile(CodecConfig(profile="near", calibration=str(path)))
    config = CodecConfig(profile="near", calibration=str(path), allow_uncertified=True)
    assert make_profile(config).name == "near"


def other_kv_dtype():
    return certify(make_calibration(SPEC)).certificate | {"dtype": "float16"}


@pytest.mark.parametrize(
    "certificate",
    [
        {},
        {"profiles": {}},
        certify(make_calibration(SPEC, layers=1)).certificate,
        other_kv_dtype(),
        certify(make_calibration(SPEC), balanced=(9.0, 1e-4)).certificate,
        certify(make_calibration(SPEC), near=("9", 1e-4)).certificate,
        certify(make_calibration(SPEC)).certificate | {"profiles": {"near": 1}},
        certify(make_calibration(SPEC)).certificate | {"profiles": ["near"]},
    ],
    ids=["empty", "no rows", "other", "dtype", "no near", "text", "row", "list"],
)
def test_certificate_of_something_else_counts_as_none(calibration, tmp_path, certificate):
    path = tmp_path / "c.safetensors"
    calibration.with_certificate(certificate).save(path)
    with pytest.raises(ConfigError, match="run `kvfetcher certify`, or set"):
        make_profile(CodecConfig(profile="near", calibration=str(path)))
    config = CodecConfig(profile="near", calibration=str(path), allow_uncertified=True)
    assert make_profile(config).name == "near"


def test_certified_calibration_does_not_serve_another_kv_dtype(calibration):
    path = str(library.store_calibration(calibration))
    fp8 = KVSpec(3, 2, 8, dtype="float8_e4m3fn")
    with pytest.raises(ConfigError, match=r"certified for bfloat16.*--kv-dtype float8_e4m3fn"):
        profile_id(CodecConfig(profile="near", calibration=path), fp8)
    config = CodecConfig(profile="near", calibration=path, allow_uncertified=True)
    assert profile_id(config, fp8).startswith("near/1")


def test_calibration_of_another_model_is_refused(calibration):
    config = CodecConfig(profile="near", calibration=str(library.store_calibration(calibration)))
    assert profile_id(config, SPEC, weights=calibration.model).startswith("near/1")
    with pytest.raises(ConfigError, match="another model"):
        profile_id(config, SPEC, weights="0" * 64)
    with pytest.raises(ConfigError, match="another model"):
        profile_id(config, KVSpec(4, 2, 8))
