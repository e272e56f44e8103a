import json
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from kvfetcher.errors import ConfigError, FormatError, UnsupportedVersionError
from kvfetcher.spec import KVSpec
from kvfetcher.transform.artifact import LADDER, Calibration
from support.calibrations import make_calibration

SPEC = KVSpec(5, 2, 8)


@pytest.fixture(scope="module")
def calibration():
    return make_calibration(SPEC)


@pytest.fixture(scope="module")
def artifact(calibration, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "model.safetensors"
    calibration.save(path)
    return path


def metadata_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length])["__metadata__"]


def test_artifact_reads_back_equal(calibration, artifact):
    again = Calibration.load(artifact)
    assert again.digest == calibration.digest
    assert again.rope == calibration.rope
    assert again.grouping == calibration.grouping
    for group in range(3):
        a, b = calibration.matrices((group, 0), 4), again.matrices((group, 0), 4)
        np.testing.assert_array_equal(a.forward, b.forward)
        np.testing.assert_array_equal(a.inverse, b.inverse)


def test_certificate_is_kept_and_does_not_change_the_digest(calibration, tmp_path):
    certified = calibration.with_certificate({"kl": 1e-4})
    certified.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    assert again.certificate == {"kl": 1e-4}
    assert again.digest == calibration.digest


def test_inverse_undoes_forward(calibration):
    matrices = calibration.matrices((0, 0), len(calibration.bases[0, 0].rows))
    identity = matrices.forward @ matrices.inverse.T
    np.testing.assert_allclose(identity, np.eye(len(identity)), atol=2e-2)


def test_coarser_profiles_code_fewer_components(calibration):
    ranks = [calibration.unit_rank(0, name) for name in LADDER]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[-1] >= 1


def test_more_components_than_stored_are_refused(calibration):
    with pytest.raises(FormatError, match="components"):
        calibration.matrices((0, 0), 10_000)


def test_missing_artifact_names_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match="kvfetcher calibrate"):
        Calibration.load(tmp_path / "none.safetensors")


def broken(artifact, tmp_path, *, head=None, tensors=None, metadata=None):
    """The artifact with some entries replaced."""
    arrays, meta = load_file(artifact), metadata_of(artifact)
    arrays.update(tensors or {})
    arrays = {name: array for name, array in arrays.items() if array is not None}
    meta["kvfetcher"] = json.dumps({**json.loads(meta["kvfetcher"]), **(head or {})})
    path = tmp_path / "broken.safetensors"
    save_file(arrays, path, metadata if metadata is not None else meta)
    return path


@pytest.mark.parametrize(
    "head",
    [
        {"spec": {"num_layers": 5, "num_kv_heads": 2, "head_dim": 16}},
        {"spec": {"num_layers": 10**9, "num_kv_heads": 2, "head_dim": 8}},
        {"spec": {"layers": 5}},
        {"spec": None},
        {"layer_counts": [2, 2]},
        {"layer_counts": [5, 0]},
        {"layer_counts": "ab"},
        {"heads_per_group": 0},
        {"rope": {}},
        {"rope": {"kinds": [], "layers": []}},
        {"steps": {}},
        {"steps": {"near": 0, "balanced": 1, "compact": 1, "tiny": 1}},
        {"steps": {"near": "x", "balanced": 1, "compact": 1, "tiny": 1}},
        {"floor": -1},
        {"sink_tokens": 1000},
        {"sink_tokens": 1.5},
        {"model": 7},
        {"source": 7},
    ],
)
def test_artifact_with_a_wrong_head_is_refused(artifact, tmp_path, head):
    with pytest.raises(FormatError):
        Calibration.load(broken(artifact, tmp_path, head=head))


@pytest.mark.parametrize(
    "tensors",
    [
        {"roots": None},
        {"roots": np.zeros((5, 2, 2, 8, 8), np.float32)},
        {"roots": np.zeros((1,), np.float32)},
        {"basis.0.0.rows": np.zeros((3, 3), np.float16)},
        {"basis.0.0.sigma": np.zeros((0,), np.float32)},
        {"basis.1.0.mean": np.full((64,), np.nan, np.float32)},
        {"basis.1.0.mean": np.zeros((64,), np.float64)},
        {"another": np.zeros(1, np.float32)},
    ],
)
def test_artifact_with_a_wrong_tensor_is_refused(artifact, tmp_path, tensors):
    with pytest.raises(FormatError):
        Calibration.load(broken(artifact, tmp_path, tensors=tensors))


def test_other_versions_are_refused(artifact, tmp_path):
    with pytest.raises(UnsupportedVersionError, match="calibrate again"):
        Calibration.load(broken(artifact, tmp_path, head={"version": 2}))


def test_safetensors_of_something_else_is_refused(artifact, tmp_path):
    with pytest.raises(FormatError, match="not a calibration"):
        Calibration.load(broken(artifact, tmp_path, metadata={"format": "pt"}))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_end_in_format_errors_or_differ_in_digest(
    calibration, artifact, tmp_path, data
):
    content = bytearray(artifact.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    try:
        again = Calibration.load(path)
    except FormatError:
        return
    assert again.digest != calibration.digest
