"""Benchmark results (results/codec_*.json) -> Markdown tables, as the README shows them.

    python tests/benchmarks/report.py

Results are written by `kvfetcher bench codec --json > tests/benchmarks/results/codec_NAME.json`.
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def table(report: dict) -> str:
    """One model's rate-quality table."""
    lines = [
        (
            f"{report['model']}: {len(report['documents'])} held-out texts, prefix of"
            f" {report['prefix_tokens']} tokens replaced, {report['following_tokens']} tokens"
            " teacher-forced after it."
        ),
        "",
        (
            "| coder | bits per element | smaller than bf16 | KL (nats) | worst text | perplexity"
            " | top-1 | encode | decode + restore |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [line(row) for row in report["rows"]]
    lines += [
        "",
        (
            f"Speeds: million elements per CPU second, {report['machine']['cpu']}; medians over"
            f" chunks of {report['chunk_tokens']} tokens. Commit {report['machine']['commit']}."
        ),
    ]
    return "\n".join(lines)


def line(row: dict) -> str:
    """One row of the table."""

    def speed(name: str) -> str:
        value = row[f"{name}_elements_per_second"]
        return "" if value is None else f"{value / 1e6:.1f}"

    return (
        f"| {row['name']} | {row['bits_per_element']:.2f} | {row['ratio']:.2f}x"
        f" | {row['kl']:.1e} | {row['worst_kl']:.1e} | {100 * row['perplexity_change']:+.2f} %"
        f" | {100 * row['top1_agreement']:.1f} % | {speed('encode')} | {speed('decode_restore')} |"
    )


if __name__ == "__main__":
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("codec_*.json"))]
    sys.stdout.write("\n\n".join(map(table, reports)) + "\n")
