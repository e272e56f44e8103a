"""Units are counted by the way that they took."""

from types import SimpleNamespace

import pytest

from kvfetcher.backend.metrics import Metrics, count_unit


class Family:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self, *, name, description, kind):
        assert (kind, bool(description)) == ("counter", True)
        self.name = name

    def Metric(self, *, labels):
        return SimpleNamespace(increment=lambda by: COUNTED.append((self.name, labels, by)))


COUNTED = []


@pytest.mark.parametrize(
    ("status", "units", "fallbacks"),
    [
        ({"decoder": "cpu", "restorer": "cpu"}, ("cpu", "host", "cpu"), []),
        ({"decoder": "nvdec", "planes": "gpu", "restorer": "gpu"}, ("nvdec", "gpu", "gpu"), []),
        (
            {"decoder": "nvdec", "planes": "host", "restorer": "gpu", "fallback": "no room"},
            ("nvdec", "host", "gpu"),
            ["nvdec"],
        ),
        (
            {"decoder": "cpu", "restorer": "cpu", "fallback": "reset"},
            ("cpu", "host", "cpu"),
            ["cpu"],
        ),
    ],
)
def test_units_are_counted_by_their_way_and_what_left_it(status, units, fallbacks):
    COUNTED.clear()
    count_unit(Metrics(SimpleNamespace(MetricFamily=Family)), status)
    labels = dict(zip(("decoder", "planes", "restorer"), units, strict=True))
    expected = [("kvfetcher_units_total", labels, 1)]
    expected += [("kvfetcher_unit_fallbacks_total", {"decoder": d}, 1) for d in fallbacks]
    assert expected == COUNTED
