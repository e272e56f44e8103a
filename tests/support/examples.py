"""How many random examples a property is tried with: all of them in CI, few at a desk."""

import os

from hypothesis import settings

IN_CI = bool(os.environ.get("CI"))
_DESK_EXAMPLES = 15


def examples(count: int) -> settings:
    """Settings for a property that CI tries `count` times, with seeds that differ from run to run."""
    return settings(max_examples=count if IN_CI else min(count, _DESK_EXAMPLES))
