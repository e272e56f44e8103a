"""How calibration says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is done, number done, number in all)."""


def no_progress(what: str, done: int, total: int) -> None:
    """The `Progress` that says nothing."""
