"""Checks of the LLM engines: the place where each kind hangs in its own.

An entry is a function of the configuration that gives checks; it is imported only when asked for,
because engines bring heavy packages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvfetcher.doctor.check import Check
from kvfetcher.errors import KVFetcherError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvfetcher.config import Config

ENGINE_CHECKS: Mapping[str, tuple[str, str]] = {
    "paged": ("kvfetcher.doctor.connector", "check_paged"),
    "tensorrt_llm": ("kvfetcher.doctor.connector", "check_tensorrt_llm"),
}
"""Engine kind -> (module, function ``(Config) -> Sequence[Check]``)."""


_REMEDY = "fix what the message names, then run `kvfetcher doctor` again"


def check_engine(
    config: Config, kind: str, *, known: Mapping[str, tuple[str, str]] = ENGINE_CHECKS
) -> list[Check]:
    """The checks of one engine kind; a kind without any has none."""
    if kind not in known:
        return []
    module, function = known[kind]
    try:
        return list(getattr(importlib.import_module(module), function)(config))
    except KVFetcherError as exc:
        return [Check(f"engine {kind}", "fail", str(exc), _REMEDY)]
    except ImportError as exc:
        return [
            Check(
                f"engine {kind}",
                "fail",
                f"the engine's package cannot be imported: {exc}",
                "install it, or choose another engine.kind",
            )
        ]
