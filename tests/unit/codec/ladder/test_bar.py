import itertools
import json
import math
from pathlib import Path

import pytest

from kvfetcher.codec.ladder.bar import QUALITY_BARS, below_bar
from kvfetcher.spec import LADDER

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
GOOD = {"kl": 1e-5, "top1_agreement": 0.999, "perplexity_change": 0.0001}


def test_every_profile_of_the_ladder_has_a_bar_and_each_is_lower_than_the_one_before():
    assert tuple(QUALITY_BARS) == LADDER
    bars = [QUALITY_BARS[name] for name in LADDER]
    for better, worse in itertools.pairwise(bars):
        assert better.max_kl < worse.max_kl
        assert better.min_top1_agreement > worse.min_top1_agreement
        assert better.max_perplexity_change < worse.max_perplexity_change


def test_the_certificate_that_was_measured_on_the_default_model_passes():
    facts = json.loads((RESULTS / "calibrate_smollm2-135m.json").read_text())
    assert [below_bar(facts["certificate"], name) for name in LADDER] == [""] * 4


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kl": 2.5e-3}, "KL 2.5e-03"),
        ({"top1_agreement": 0.37}, "top-1 37.0 %"),
        ({"perplexity_change": 0.2}, "perplexity +20.00 %"),
        ({"kl": math.nan}, "KL nan"),
        ({"kl": "small"}, "KL nan"),
        ({"kl": True}, "KL nan"),
        ({"top1_agreement": None}, "top-1 nan"),
    ],
)
def test_each_figure_has_its_bar_and_what_is_no_number_passes_none(change, why):
    assert below_bar({"profiles": {"balanced": GOOD}}, "balanced") == ""
    assert why in below_bar({"profiles": {"balanced": GOOD | change}}, "balanced")


@pytest.mark.parametrize("certificate", [None, {}, {"profiles": 3}, {"profiles": {"near": []}}])
def test_a_certificate_that_says_nothing_passes_no_bar(certificate):
    assert "misses its quality bar" in below_bar(certificate, "near")
