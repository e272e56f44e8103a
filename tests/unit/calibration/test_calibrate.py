"""Calibration end to end on a tiny random Llama: real code paths, meaningless text."""

import numpy as np
import pytest
import torch

from kvfetcher.calibration.calibrate import (
    CalibrateSettings,
    CollectSettings,
    calibrate,
    collect,
    recertify,
)
from kvfetcher.calibration.capture import CaptureModel
from kvfetcher.calibration.certify import CertifySettings
from kvfetcher.calibration.journal import Journal
from kvfetcher.calibration.quality import compare, prepare
from kvfetcher.codec.ladder.groups import Grouping
from kvfetcher.errors import ConfigError, FormatError
from kvfetcher.spec import LADDER
from support.tiny_llama import save_tiny_llama
from support.tiny_llama import walk_text as text

SHORT = CertifySettings(num_documents=3, prefix_tokens=128, following_tokens=32)
SMALL = CollectSettings(num_documents=3, prefix_tokens=96, label_tokens=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder):
    return CaptureModel.load(folder)


def test_rope_is_measured_with_its_scaling(model):
    rope = model.measure_rope()
    inv_freq = model.model.model.rotary_emb.inv_freq.tolist()
    assert all(layer.inv_freq == tuple(inv_freq) for layer in rope.layers)
    assert {layer.style for layer in rope.layers} == {"half"}


def test_rope_that_explains_nothing_is_refused(model, monkeypatch):
    from kvfetcher.codec.ladder.rope import LayerRope

    monkeypatch.setattr(
        CaptureModel, "_rope_candidates", lambda *_: [LayerRope(), LayerRope((0.5, 0.1))]
    )
    with pytest.raises(ConfigError, match="explains the keys"):
        model.measure_rope()


def test_sensitivity_is_the_gradient_of_the_likelihood(model):
    ids = model.encode(text(5).text)
    kv = model.prefill(ids[:64])
    following = ids[64:80]
    gradient = model.sensitivity(following, kv, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        log_p = torch.log_softmax(model.logits(following, kv), dim=-1)
        generator = torch.Generator().manual_seed(1)
        labels = torch.multinomial(log_p.exp(), 1, generator=generator)
        values = kv.to_array()
        direction = np.random.default_rng(0).normal(size=values.shape).astype(np.float32)
        size = 1e-2
        moved = []
        for sign in (-1, 1):
            changed = model.take(values + sign * size * direction)
            changed_p = torch.log_softmax(model.logits(following, changed), dim=-1)
            moved.append(float(changed_p.gather(1, labels).double().sum()))
    expected = (moved[1] - moved[0]) / (2 * size)
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=0.02, abs=1e-3)


def test_unchanged_cache_has_no_divergence(model):
    document = prepare(model, text(1), prefix_tokens=128, following_tokens=32)
    quality = compare(model, document, document.values)
    assert quality.kl == pytest.approx(0, abs=1e-9)
    assert quality.top1_agreement == 1
    worse = compare(model, document, document.values + np.float32(0.3))
    assert worse.kl > 1e-6


def test_short_text_is_no_document(model):
    assert prepare(model, text(1, 100), prefix_tokens=128, following_tokens=32) is None


class Stopped(Exception):
    pass


def test_collecting_resumes_where_it_stopped(model, tmp_path):
    rope, texts = model.measure_rope(), [text(i) for i in range(3)]
    grouping = Grouping.even(model.measure_spec(), layers=2)
    whole = collect(model, rope, texts, grouping, SMALL).statistics

    def stop(what, done, total):
        if done == 2:
            raise Stopped

    path = tmp_path / "state.npz"
    with pytest.raises(Stopped):
        collect(
            model, rope, texts, grouping, SMALL,
            checkpoint=path, checkpoint_documents=1, progress=stop,
        )  # fmt: skip
    done = []
    resumed = collect(
        model, rope, texts, grouping, SMALL,
        checkpoint=path, progress=lambda what, n, total: done.append(n),
    ).statistics  # fmt: skip
    assert done == [3]
    np.testing.assert_array_equal(resumed.fisher, whole.fisher)
    for key in whole.products:
        np.testing.assert_array_equal(resumed.products[key], whole.products[key])


def test_checkpoint_of_another_run_is_not_resumed(model, tmp_path):
    rope, path = model.measure_rope(), tmp_path / "state.npz"
    grouping = Grouping.even(model.measure_spec(), layers=2)
    collect(model, rope, [text(0)], grouping, SMALL, checkpoint=path, checkpoint_documents=1)
    done = []
    collect(
        model, rope, [text(1)], grouping, SMALL,
        checkpoint=path, progress=lambda what, n, total: done.append(n),
    )  # fmt: skip
    assert done == [1]


def test_damaged_checkpoint_names_the_remedy(model, tmp_path):
    path = tmp_path / "state.npz"
    path.write_bytes(b"no archive")
    grouping = Grouping.even(model.measure_spec(), layers=2)
    with pytest.raises(FormatError, match="delete it"):
        collect(model, model.measure_rope(), [text(0)], grouping, SMALL, checkpoint=path)


@pytest.mark.parametrize("kept", [0.2, 0.9])
def test_truncated_checkpoint_names_the_remedy(model, tmp_path, kept):
    path = tmp_path / "state.npz"
    grouping = Grouping.even(model.measure_spec(), layers=2)
    collect(model, model.measure_rope(), [text(0)], grouping, SMALL, checkpoint=path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(FormatError, match="delete it"):
        collect(model, model.measure_rope(), [text(0)], grouping, SMALL, checkpoint=path)


def test_statistics_of_another_model_are_not_resumed(model, tmp_path):
    rope, path = model.measure_rope(), tmp_path / "state.npz"
    grouping = Grouping.even(model.measure_spec(), layers=2)
    done = []
    for run in ("one", "other"):
        collect(
            model, rope, [text(0)], grouping, SMALL,
            run=run, checkpoint=path, progress=lambda what, n, total: done.append(n),
        )  # fmt: skip
    assert done == [1, 1]


def test_texts_after_the_last_that_was_read_are_the_rest(model):
    grouping = Grouping.even(model.measure_spec(), layers=2)
    texts = [text(0), text(1, 20), text(2), text(3, 20), text(4), text(5, 20), text(6)]
    collected = collect(model, model.measure_rope(), texts, grouping, SMALL)
    assert collected.statistics.num_documents == 3
    assert collected.rest == texts[5:]


def test_texts_that_are_too_short_are_refused(model):
    grouping = Grouping.even(model.measure_spec(), layers=2)
    with pytest.raises(ConfigError, match="longer texts"):
        collect(model, model.measure_rope(), [text(0, 20)], grouping, SMALL)


TEXTS = [text(i) for i in range(6)]
HELD_OUT = [text(i) for i in range(10, 13)]


def calibrate_small(folder, *, texts=TEXTS, held_out=HELD_OUT, **more):
    return calibrate(
        folder,
        texts=texts,
        held_out=held_out,
        settings=CalibrateSettings(
            layers_per_group=2, num_step_documents=2, collect=SMALL, certify=SHORT
        ),
        **more,
    )


@pytest.fixture(scope="module")
def calibrated(folder):
    return calibrate_small(folder)


def test_certificate_has_the_ladder_in_order(calibrated):
    certificate = calibrated.certificate
    rows = [certificate["profiles"][name] for name in LADDER]
    bits = [row["bits_per_element"] for row in rows]
    assert bits == sorted(bits, reverse=True)
    # The random model hardly looks back: beyond 3e-4 nats no step costs it more.
    divergences = [row["kl"] for row in rows]
    assert divergences[0] < 0.5 * min(divergences[1:])
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert certificate["calibration"] == calibrated.digest
    assert certificate["documents"] == ["user/10", "user/11", "user/12"]


def test_equal_inputs_give_equal_calibrations(folder, calibrated):
    again = calibrate_small(folder)
    assert again.digest == calibrated.digest


def test_a_calibration_that_is_stopped_at_every_stage_goes_on_where_it_was(
    folder, calibrated, tmp_path
):
    path, said = tmp_path / "state.npz", []

    def stop_after(beginning, count):
        found = []

        def progress(what, done, total):
            said.append(what)
            found.append(what.startswith(beginning))
            if sum(found) == count:
                raise Stopped

        return progress

    stages = [
        ("read", 2), ("read", 3), ("solve", 1), ("prefilled", 1), ("step", 3), ("step", 5),
        ("prefilled", 3), ("measured near", 1), ("measured compact", 1), ("measured tiny", 1),
    ]  # fmt: skip
    for stage in stages:
        with pytest.raises(Stopped):
            calibrate_small(folder, checkpoint=path, progress=stop_after(*stage))
    assert said.count("read user/2") == 1
    said.clear()
    again = calibrate_small(folder, checkpoint=path, progress=stop_after("nothing", 1))
    assert not [what for what in said if what.startswith(("read", "step"))]
    assert again.digest == calibrated.digest
    assert again.certificate == calibrated.certificate


def test_journal_keeps_what_was_measured_for_the_same_run_only(tmp_path):
    path, value = tmp_path / "state.json", {"kl": 0.1 + 0.2, "n": 3}
    assert Journal(path, context="x").measured("a", lambda: value) == value
    assert Journal(path, context="x").measured("a", lambda: None) == value
    assert Journal(path, context="y").measured("a", lambda: 5) == 5
    assert Journal().measured("a", lambda: 6) == 6


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"context": "x"}', b"\xff", b"[" * 100_000]
)
def test_damaged_journal_names_the_remedy(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="delete it"):
        Journal(path, context="x")


@pytest.mark.parametrize(
    ("what", "texts"),
    [
        ("held-out", {"held_out": []}),
        ("held-out", {"held_out": [text(10, 100)]}),
        ("calibration", {"texts": []}),
        ("calibration", {"texts": [text(0, 100)]}),
    ],
)
def test_texts_that_no_stage_could_use_are_refused_before_any_is_read(folder, what, texts):
    said = []
    with pytest.raises(ConfigError, match=f"{what} texts has 160 tokens"):
        calibrate_small(folder, progress=lambda *args: said.append(args), **texts)
    assert said == []


def test_recertifying_measures_the_same(folder, calibrated):
    again = recertify(folder, calibrated, held_out=[text(i) for i in range(10, 13)], settings=SHORT)
    assert again.certificate == calibrated.certificate


def test_certifying_for_another_model_is_refused(folder, calibrated):
    from dataclasses import replace

    with pytest.raises(ConfigError, match="another model"):
        recertify(folder, replace(calibrated, model="0" * 64), held_out=[], settings=SHORT)
