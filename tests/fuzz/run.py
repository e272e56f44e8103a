"""Coverage-guided fuzzing of one target: python -m fuzz.run TARGET [--seconds N] [--corpus DIR].

libFuzzer through atheris, which only this needs (dependency group `fuzz`). Prints how many inputs
were run. What it finds is an input that makes the target raise; it is kept as crash-* in the folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvfetcher"]):
    from fuzz.targets import targets

# Beyond these an input has made a parser allocate what its own size does not justify.
MAX_MEMORY_MIB = 2048
MAX_ALLOCATION_MIB = 600  # the format's own limit of a unit's values is 512
MAX_INPUT_BYTES = 1 << 16
TIMEOUT_SECONDS = 10


def main() -> None:
    """Run until the time is up; libFuzzer ends the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=sorted(targets()))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"))
    arguments = parser.parse_args()
    target = targets()[arguments.target]
    corpus = arguments.corpus / arguments.target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={arguments.seconds}",
        f"-rss_limit_mb={MAX_MEMORY_MIB}",
        f"-malloc_limit_mb={MAX_ALLOCATION_MIB}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={TIMEOUT_SECONDS}",
        f"-artifact_prefix={corpus}/",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
