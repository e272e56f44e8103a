"""Sampling parameters mean what they say."""

import math

import pytest
import torch

from kvfetcher.engines.base import SamplingParams
from kvfetcher.engines.sampling import Sampler
from kvfetcher.errors import RequestError

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0])


def drawn(params, logits=LOGITS, number=400, eos_ids=()):
    sampler = Sampler(params, eos_ids)
    return [sampler.choose(logits, 0) for _ in range(number)]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=5.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-6, seed=1),
        SamplingParams(temperature=1e-3, seed=1),
    ],
    ids=["default", "top_k 1", "tiny top_p", "tiny temperature"],
)
def test_likeliest_token_is_chosen(params):
    assert set(drawn(params)) == {1}


def test_frequencies_follow_the_softmax():
    tokens = drawn(SamplingParams(temperature=1.0, seed=3), number=4000)
    for token, probability in enumerate(LOGITS.softmax(-1).tolist()):
        error = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(tokens.count(token) / 4000 - probability) < 5 * error


def test_top_k_and_top_p_cut_the_tail():
    assert set(drawn(SamplingParams(temperature=5.0, top_k=2, seed=1))) == {1, 2}
    # 0.644, 0.237, 0.087, 0.032: the first two reach 0.85, not 0.6 alone.
    assert set(drawn(SamplingParams(temperature=1.0, top_p=0.85, seed=1))) == {1, 2}
    assert set(drawn(SamplingParams(temperature=1.0, top_p=0.6, seed=1))) == {1}


def test_seed_fixes_the_draws_and_none_does_not():
    params = SamplingParams(temperature=3.0, seed=5)
    assert drawn(params) == drawn(params)
    fresh = SamplingParams(temperature=3.0)
    assert drawn(fresh) != drawn(fresh)


def test_eos_waits_for_min_length():
    sampler = Sampler(SamplingParams(max_tokens=9, min_length=2), (1,))
    assert [sampler.choose(LOGITS, n) for n in range(3)] == [2, 2, 1]
    assert LOGITS[1] == 3.0  # not changed in place


def test_bfloat16_logits_are_accepted():
    assert Sampler(SamplingParams(), ()).choose(LOGITS.bfloat16(), 0) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 4, "min_length": 5}, "min_length must be 0 to 4"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop_words": ("",)}, "stop word"),
        ({"stop_words": ("x",) * 65}, "at most 64"),
    ],
    ids=range(12),
)
def test_parameters_out_of_range_are_the_senders_fault(change, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**change)
