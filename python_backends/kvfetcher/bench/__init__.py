"""Measurements that ship with the package: `kvfetcher bench ...`."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_BENCHMARKS = {
    "codec": "rate and quality of every codec profile and of its rivals, on real KV",
    "sim": "picture sizes against simulated bandwidth, with the planner of the fetcher",
}


def make_parser() -> argparse.ArgumentParser:
    """The command line of `kvfetcher bench`, up to the benchmark's name."""
    parser = argparse.ArgumentParser(
        prog="kvfetcher bench",
        description="Measure.",
        epilog="; ".join(f"{name}: {text}" for name, text in _BENCHMARKS.items()),
    )
    parser.add_argument("benchmark", choices=sorted(_BENCHMARKS))
    return parser


def main(argv: Sequence[str]) -> int:
    """Run `kvfetcher bench`; returns the exit status."""
    arguments = make_parser().parse_args(argv[:1])
    return int(importlib.import_module(f"{__name__}.{arguments.benchmark}").main(argv[1:]))
