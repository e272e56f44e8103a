"""Benchmark results (results/*.json) -> Markdown tables, as README and docs/measurements show them.

    python tests/benchmarks/report.py

Results are written by `kvfetcher bench codec --json > tests/benchmarks/results/codec_NAME.json`.
"""

import json
import sys
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parent / "results"


SETS = {
    "": "held-out texts",
    "certificate": "texts of the certificate",
    "given": "texts of other kinds",
}


def table(report: dict) -> str:
    """One model's rate-quality tables, one for each text set."""
    documents = report["documents"]
    if isinstance(documents, list):  # written when there was one set
        documents = {"": documents}
    parts = []
    for text_set, names in documents.items():
        rows = [row for row in report["rows"] if row.get("text_set", "") == text_set]
        parts.append(_table(report, rows, f"{len(names)} {SETS[text_set]}"))
    return "\n\n".join(parts)


def _table(report: dict, rows: list[dict], texts: str) -> str:
    lines = [
        (
            f"{report['model']}: {texts}, prefix of"
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
    lines += [line(row) for row in rows]
    lines += [
        "",
        (
            f"Speeds: million elements per CPU second, {report['machine']['cpu']}; medians over"
            f" chunks of {report['chunk_tokens']} tokens. Commit {report['machine']['commit']}."
        ),
    ]
    return "\n".join(lines)


SUMMARY = (
    "exact",
    "near",
    "balanced",
    "compact",
    "tiny",
    "fp8 e4m3",
    "KIVI-like 4 bit",
    "CacheGen",
)


def summary(report: dict) -> str:
    """The coders of `SUMMARY` in short: size, and divergence on both text sets."""
    rows = {(row["text_set"], row["name"]): row for row in report["rows"]}
    lines = ["| coder | smaller than bf16 | KL (nats) | other kinds of text |", "|---|---|---|---|"]
    for name in SUMMARY:
        held_out, other = rows["certificate", name], rows["given", name]
        lines.append(
            f"| {name} | {held_out['ratio']:.2f}x | {held_out['kl']:.1e}"
            f" | {other['ratio']:.2f}x, {other['kl']:.1e} |"
        )
    return "\n".join(lines)


def fetch_summary(report: dict) -> str:
    """Medians of time to first token, in seconds, by the link's rate."""
    lines = [
        "| link, Gbit/s | computing | fetching bf16 as it is | KVFetcher |",
        "|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [f"{row[arm]['median_seconds']:.2f}" for arm in ("compute", "raw", "ours")]
        lines.append(f"| {row['gbit_per_second']:g} | {' | '.join(cells)} |")
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


def fetch_table(report: dict) -> str:
    """Time to first token over links of several rates."""
    arms = ("compute", "raw", "coded", "ours")
    lines = [
        (
            f"Profile `{report['profile']}`, stored prefix of {report['prefix_tokens']} tokens,"
            f" {report['rounds']} rounds in turns, medians (range) in seconds;"
            f" {report['machine']['cores']} cores of an {report['machine']['cpu']}, commit"
            f" {report['machine']['commit']}, {report['machine']['date']}."
        ),
        "",
        "| Gbit/s | full prefill | raw bf16 | coded, no gate | ours | ours / best other | ours did |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [
            f"{row[arm]['median_seconds']:.2f} ({row[arm]['min_seconds']:.2f} to"
            f" {row[arm]['max_seconds']:.2f})"
            for arm in arms
        ]
        names = {"-": "coded", "raw": "raw"}
        units = row["ours"]["variants"]
        did = ", ".join(f"{n} {names.get(v, v)} units" for v, n in sorted(units.items()))
        lines.append(
            f"| {row['gbit_per_second']:g} | {' | '.join(cells)}"
            f" | {row['ours_over_best_other']:.2f} | {did or 'computed'} |"
        )
    for found in report.get("crossovers", ()):
        lines += [
            "",
            (
                f"Crossover {found['pair']}: measured at {found['measured_gbit_per_second']} Gbit/s,"
                f" predicted at {found['predicted_gbit_per_second']} (ratio"
                f" {found['predicted_over_measured']})."
            ),
        ]
    return "\n".join(lines)


def mixed_table(report: dict) -> str:
    """Misses with and without hits beside them."""
    load = f"a request every {report['interval_seconds']:g} s"
    if "arrivals" in report:
        load = (
            f"a miss every {report['interval_seconds']:g} s and a hit every"
            f" {report['hit_interval_seconds']:g} s on average ({report['arrivals']}), up to"
            f" {report['most_hits_in_flight']} hits in flight"
        )
    return (
        f"Misses of {report['miss_tokens']} tokens beside hits of {report['hit_tokens']} tokens over"
        f" {report['gbit_per_second']:g} Gbit/s, {load}: median time to first token of the misses"
        f" {report['misses_mixed']['median_seconds']:.2f} s,"
        f" {report['misses_alone']['median_seconds']:.2f} s without the hits"
        f" ({100 * (report['misses_mixed_over_alone'] - 1):+.0f} %);"
        f" commit {report['machine']['commit']}, {report['machine']['date']}."
    )


def gpu_table(report: dict) -> str:
    """Rates through the server against bare decoders, and what else runs on the GPU."""
    has_loss = any("generation" in f for r in report["rates"].values() for f in _found(r).values())
    lines = [
        (
            "| units | bits per element | kv_restore | G elements/s | of 7 bare | of 14 bare"
            " | one alone, ms | under load, ms |"
            + " 8B generation beside it (at G elements/s) |"
            * has_loss
        ),
        "|---|---|---|---|---|---|---|---|" + "---|" * has_loss,
    ]
    for name, row in report["rates"].items():
        for key, found in _found(row).items():
            of_bare = [
                f"{found['elements_g_per_s'] / row[bare]:.2f}" if bare in row else ""
                for bare in ("bare_7", "bare_14")
            ]
            cells = [
                name,
                f"{row['bits_per_element']:.2f}",
                key.split("_")[2],
                f"{found['elements_g_per_s']:.2f}",
                *of_bare,
                f"{found['alone_ms_median']:.1f}",
                f"{found['latency_ms_median']:.1f} (p95 {found['latency_ms_p95']:.1f})",
            ]
            if has_loss:
                beside = found.get("generation")  # there may have been no time for it
                cells.append("" if beside is None else _loss(beside))
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| beside it | alone | beside ours (at G elements/s) | beside CacheGen (at) |"]
    lines.append("|---|---|---|---|")
    names = {
        "gemm_tflop_per_s": "bf16 product, TFLOP/s",
        "generation_tokens_per_s": "8B generation, tokens/s",
    }
    for key, title in names.items():
        row = report["interference"][key]
        cells = [title, f"{median(row['alone']):.0f}"]
        for load in ("path", "cachegen"):
            found = row[load]
            cells.append(
                f"{median(found['beside']):.0f}, {-100 * found['lost']:+.0f} %"
                f" ({median(found['elements_g_per_s']):.1f})"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _place(report)])


def _loss(beside: dict) -> str:
    """Percent, and the rate of what it ran beside."""
    return f"{-100 * beside['lost']:+.1f} % ({median(beside['elements_g_per_s']):.1f})"


def _found(row: dict) -> dict[str, dict]:
    """What was measured through the server, by decoders and restorers."""
    return {key: found for key, found in row.items() if key.startswith("triton_")}


def _place(report: dict) -> str:
    machine = report["machine"]
    return f"{machine['gpu']}, {machine['cores']} cores, {machine['time'][:10]}."


def instances_table(report: dict) -> str:
    """G elements/s of bare decoders and through the server, by the number of decoders."""
    works = {name: row for name, row in report["instances"].items() if isinstance(row, dict)}
    counts = list(next(iter(works.values()))["bare"])
    lines = [f"| decoders | {' | '.join(counts)} |", "|---" * (1 + len(counts)) + "|"]
    for name, row in works.items():
        bare = [f"{row['bare'][count]:.2f}" for count in counts]
        ours = [f"{row['triton'][count]['elements_g_per_s']:.2f}" for count in counts]
        lines.append(f"| {name}: bare, G elements/s | {' | '.join(bare)} |")
        lines.append(f"| through the server | {' | '.join(ours)} |")
        if row.get("generation"):
            lost = [f"{100 * row['generation'][count]['lost']:.1f} %" for count in counts]
            lines.append(f"| 8B generation beside it loses | {' | '.join(lost)} |")
    return "\n".join([*lines, "", _place(report)])


if __name__ == "__main__":
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("codec_*.json"))]
    texts = [
        make(report)
        for report in reports
        for make in ((summary, table) if isinstance(report["documents"], dict) else (table,))
    ]
    for name, make in (
        ("fetch_*.json", fetch_table),
        ("fetch_*.json", fetch_summary),
        ("mixed_*.json", mixed_table),
        ("gpu_path_*.json", gpu_table),
        ("gpu_instances_*.json", instances_table),
    ):
        texts += [make(json.loads(path.read_text())) for path in sorted(RESULTS.glob(name))]
    sys.stdout.write("\n\n".join(texts) + "\n")
