import dataclasses
import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from kvfetcher.codec.ladder.artifact import Calibration
from kvfetcher.codec.ladder.rope import LayerRope, Rope
from kvfetcher.errors import ConfigError, FormatError, UnsupportedVersionError
from kvfetcher.spec import LADDER, KVSpec
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


def canonical(data):
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def broken(artifact, tmp_path, *, head=None, tensors=None, metadata=None):
    """The artifact with some entries replaced."""
    arrays, meta = load_file(artifact), metadata_of(artifact)
    arrays.update(tensors or {})
    arrays = {name: array for name, array in arrays.items() if array is not None}
    meta["kvfetcher"] = canonical({**json.loads(meta["kvfetcher"]), **(head or {})})
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
        {"layer_counts": [2.0, 2.0, 1.0]},
        {"layer_counts": [True, 2, 2]},
        {"heads_per_group": 2.0},
        {"spec": {"num_layers": 5, "num_kv_heads": 2, "head_dim": 8, "kv_factor": 2.0}},
        {"another": 1},
        {"heads_per_group": 0},
        {"rope": {}},
        {"rope": {"kinds": [], "layers": []}},
        {"steps": {}},
        {"steps": {"near": 0, "balanced": 1, "compact": 1, "tiny": 1}},
        {"steps": {"near": "x", "balanced": 1, "compact": 1, "tiny": 1}},
        {"steps": {"near": 10**400, "balanced": 1, "compact": 1, "tiny": 1}},
        {"floor": -1},
        {"floor": 10**400},
        {"floor": 0},
        {"sink_tokens": 1000},
        {"sink_tokens": 1.5},
        {"model": 7},
        {"source": 7},
    ],
)
def test_artifact_with_a_wrong_head_is_refused(artifact, tmp_path, head):
    with pytest.raises(FormatError):
        Calibration.load(broken(artifact, tmp_path, head=head))


def roots_with(change):
    """Identities, but for what is added to the first dims of one."""
    roots = np.tile(np.eye(8, dtype=np.float32), (5, 2, 2, 1, 1))
    roots[3, 1, 0, :2, :2] += np.array(change, np.float32)
    return roots


@pytest.mark.parametrize(
    "tensors",
    [
        {"roots": None},
        {"roots": np.zeros((5, 2, 2, 8, 8), np.float32)},
        {"roots": np.zeros((1,), np.float32)},
        {"roots": roots_with([[0, 1], [0, 0]])},
        {"roots": roots_with([[0, 0], [1, 0]])},
        {"roots": roots_with([[-1, 0], [0, 0]])},
        {"roots": roots_with([[1e-7 - 1, 0], [0, 0]])},
        {"roots": np.float32(1e-35) * roots_with([[0, 0], [0, 0]])},
        {"roots": np.float32(1e35) * roots_with([[0, 0], [0, 0]])},
        {"basis.0.0.rows": np.zeros((3, 3), np.float16)},
        {"basis.0.0.sigma": np.zeros((0,), np.float32)},
        {"basis.0.0.sigma": np.zeros((), np.float32)},
        {"basis.0.0.sigma": None, "another": np.zeros(1, np.float32)},
        {"basis.1.0.mean": np.full((64,), np.nan, np.float32)},
        {"basis.1.0.mean": np.zeros((64,), np.float64)},
        {"another": np.zeros(1, np.float32)},
    ],
)
def test_artifact_with_a_wrong_tensor_is_refused(artifact, tmp_path, tensors):
    with pytest.raises(FormatError):
        Calibration.load(broken(artifact, tmp_path, tensors=tensors))


def test_identity_roots_are_accepted(artifact, tmp_path):
    changed = {"roots": roots_with([[0, 1e-7], [0, 0]])}
    calibration = Calibration.load(broken(artifact, tmp_path, tensors=changed))
    assert np.isfinite(calibration.matrices((1, 0), 4).inverse).all()


@pytest.mark.parametrize(
    "text",
    [
        lambda text: json.dumps(json.loads(text), indent=1),
        lambda text: text + " ",
        lambda text: text.replace('"floor":0.25', '"floor":2.5e-1'),
        lambda text: text.replace('"floor":0.25', '"floor":1,"floor":0.25'),
        lambda text: text.replace('"floor":0.25', '"floor":NaN'),
        lambda text: text.replace('"source":{', '"source":' + "[" * 100_000 + '{"'),
        lambda text: text.replace('"source":{', '"source":{"x":"' + "x" * (4 << 20) + '",'),
        lambda _: "[]",
        lambda _: "",
    ],
    ids=["indent", "space", "float", "twice", "NaN", "deep", "long", "list", "empty"],
)
def test_metadata_that_is_not_canonical_is_refused(artifact, tmp_path, text):
    meta = metadata_of(artifact)
    changed = {**meta, "kvfetcher": text(meta["kvfetcher"])}
    with pytest.raises(FormatError):
        Calibration.load(broken(artifact, tmp_path, metadata=changed))


@pytest.mark.parametrize("text", ["[]", "NaN", "{", "[" * 100_000, '{"kl":NaN}'])
def test_certificate_that_is_no_object_is_refused(artifact, tmp_path, text):
    changed = {**metadata_of(artifact), "certificate": text}
    with pytest.raises(FormatError):
        Calibration.load(broken(artifact, tmp_path, metadata=changed))


def test_whole_numbers_are_stored_as_they_are_read(calibration, tmp_path):
    layers = tuple(LayerRope((1, 0), amplitude=2) for _ in range(SPEC.num_layers))
    whole = dataclasses.replace(
        calibration, floor=1, steps=dict.fromkeys(LADDER, 1), rope=Rope(layers)
    )
    whole.save(tmp_path / "whole.safetensors")
    assert Calibration.load(tmp_path / "whole.safetensors").digest == whole.digest


def test_shapes_are_checked_before_tensors_are_read(artifact, tmp_path):
    huge = {"roots": np.zeros((16, 1 << 20), np.float32)}
    path = broken(artifact, tmp_path, tensors=huge)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="roots must be"):
            Calibration.load(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def places(data, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


WRONG = (
    None, True, -1, 0, 1, 2.5, 1e308, 10**400, 1 << 63, "", "x", "\ud800", [], [[]], {}, {"x": 1}
)  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_field_ends_in_an_error_or_another_digest(
    calibration, artifact, tmp_path, data
):
    head = json.loads(metadata_of(artifact)["kvfetcher"])
    path = data.draw(st.sampled_from(sorted(set(places(head)) - {()}, key=str)))
    inner = head
    for key in path[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[path[-1]] = data.draw(st.sampled_from(WRONG))
    elif isinstance(inner, dict):
        del inner[path[-1]]
    else:
        inner.append(inner[path[-1]])
    meta = {**metadata_of(artifact), "kvfetcher": canonical(head)}
    try_to_use(calibration, broken(artifact, tmp_path, metadata=meta))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_tensor_ends_in_an_error_or_another_digest(
    calibration, artifact, tmp_path, data
):
    arrays = load_file(artifact)
    name = data.draw(st.sampled_from(sorted(arrays)))
    array = arrays[name]
    how = data.draw(st.sampled_from(["cut", "reshape", "dtype", "value", "drop", "rename"]))
    changed = {name: None}
    if how == "cut":
        axis = data.draw(st.integers(0, array.ndim - 1))
        kept = data.draw(st.integers(0, array.shape[axis] - 1))
        changed = {name: np.ascontiguousarray(array.take(range(kept), axis))}
    elif how == "reshape":
        shape = data.draw(st.sampled_from([(-1,), (1, *array.shape), array.shape[::-1]]))
        changed = {name: array.reshape(shape)}
    elif how == "dtype":
        changed = {name: array.astype(data.draw(st.sampled_from(["f2", "f4", "f8", "i4", "?"])))}
    elif how == "value":
        array = array.copy()
        place = data.draw(st.integers(0, array.size - 1))
        values = [np.nan, np.inf, -np.inf, 6e4, -6e4, 0, 1e-7, np.finfo(array.dtype).max]
        array.reshape(-1)[place] = data.draw(st.sampled_from(values))
        changed = {name: array}
    elif how == "rename":
        changed = {name: None, data.draw(st.sampled_from(["", "x", f"{name} "])): array}
    try_to_use(calibration, broken(artifact, tmp_path, tensors=changed))


def try_to_use(calibration, path):
    """Load and restore with what was changed: refused, or another calibration that computes."""
    try:
        again = Calibration.load(path)
    except FormatError:
        return
    if again.digest == calibration.digest:
        assert again.rope == calibration.rope
        return
    for key in again.bases:
        rank = again.unit_rank(key[0], "near")
        with np.errstate(over="ignore", invalid="ignore"):  # as `restore_transform` does
            again.inverse(key, rank, again.steps["near"])
            again.forward(key, rank)


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
