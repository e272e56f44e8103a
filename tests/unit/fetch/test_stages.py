"""How long reads are."""

import pytest

from kvfetcher.fetch.planning.bandwidth import LinkEstimate, LinkEstimator
from kvfetcher.fetch.planning.decode_times import cpu_table
from kvfetcher.fetch.stages import Stages

MBYTE = 1_000_000


def stages(max_read_bytes=4 * MBYTE):
    link = LinkEstimator(prior_bytes_per_second=1e9, prior_rtt_seconds=1e-3, half_life_seconds=1)
    return Stages(
        reads=None, link=link, table=cpu_table(2), num_decoders=2, run_unit=None,
        max_inflight_reads=8, one_read_fills_link=True, max_inflight_bytes=1 << 27,
        max_inflight_units=8, max_read_bytes=max_read_bytes, clock=lambda: 0.0,
    )  # fmt: skip


def link(bytes_per_second, rtt_seconds):
    return LinkEstimate(*[bytes_per_second] * 4, rtt_seconds)


@pytest.mark.parametrize(
    ("rate", "rtt", "expected"),
    [(50e6, 1e-3, MBYTE), (1e9, 1e-3, 4 * MBYTE), (50e6, 0.03, 3 * MBYTE)],
    ids=["20 ms", "at most max_read_bytes", "two round trips"],
)
def test_reads_last_so_long_that_their_round_trips_do_not_matter(rate, rtt, expected):
    assert stages().read_bytes(link(rate, rtt)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("left", "expected"),
    [(100 * MBYTE, 4 * MBYTE), (20 * MBYTE, 2 * MBYTE), (MBYTE, 250_000)],
    ids=["plenty", "a tenth of the rest", "together two round trips"],
)
def test_the_less_is_left_the_shorter_the_reads(left, expected):
    found = stages().read_bytes(link(1e9, 1e-3), left_bytes=left)
    assert found == pytest.approx(expected)
