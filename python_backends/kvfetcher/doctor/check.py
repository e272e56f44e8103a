"""The result of one check, and how a check that breaks becomes one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvfetcher.errors import KVFetcherError

if TYPE_CHECKING:
    from collections.abc import Callable

Status = Literal["ok", "warn", "fail"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found."""

    name: str
    status: Status
    """ok: works; warn: works with less, or later; fail: does not work."""
    detail: str
    """One sentence or list of facts."""
    remedy: str = ""
    """What to do; empty where nothing is to be done."""


def guarded(name: str, run: Callable[[], Check]) -> Check:
    """The result of `run`; an error of it is a failed check of that name, never the doctor's end."""
    try:
        return run()
    except KVFetcherError as exc:
        return Check(name, "fail", str(exc), "see the message")
    except Exception as exc:  # noqa: BLE001 - the boundary
        _log.debug("check %s broke", name, exc_info=True)
        return Check(
            name,
            "fail",
            f"the check itself broke: {type(exc).__name__}: {exc}",
            "report this as a bug of kvfetcher",
        )
