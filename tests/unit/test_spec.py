"""Which KV heads a tensor-parallel rank holds."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfetcher.errors import ConfigError
from kvfetcher.spec import HeadRange, heads_of_rank


@given(heads=st.integers(1, 64), ranks=st.integers(1, 64))
def test_ranks_cover_every_head_in_order(heads, ranks):
    try:
        parts = [heads_of_rank(heads, rank=rank, num_ranks=ranks) for rank in range(ranks)]
    except ConfigError:
        assert heads % ranks
        assert ranks % heads
        return
    assert parts[0].start == 0
    assert parts[-1].stop == heads
    assert len({part.count for part in parts}) == 1
    for before, after in pairwise(parts):
        assert after in (before, HeadRange(before.stop, before.stop + before.count))


def test_rank_out_of_range():
    with pytest.raises(ConfigError, match="rank 2 is not one of 2"):
        heads_of_rank(4, rank=2, num_ranks=2)
