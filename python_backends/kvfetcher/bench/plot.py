"""The rate-quality plot as SVG, without a plotting library: bits per element against KL."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTH, _HEIGHT = 820, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 190, 40, 60
_LINE, _LABEL_WIDTH = 14, 100
# Family of a row -> its colour on a light and on a dark page.
_COLOURS = {
    "ladder": ("#1a7f37", "#3fb950"),
    "ours": ("#0969da", "#4493f8"),
    "paper": ("#bc4c00", "#db6d28"),
    "other": ("#59636e", "#9198a1"),
}


def rate_quality_svg(rows: Sequence[dict[str, Any]], *, title: str) -> str:
    """A plot of table rows.

    Args:
        rows: with "name", "family" (a key of the colours), "bits_per_element" and "kl".
        title: above the plot.

    Returns:
        An SVG document. Both axes are logarithmic; rows without loss have no place on it.
    """
    shown = [row for row in rows if row["kl"] > 1e-7]
    bits = [row["bits_per_element"] for row in shown]
    kls = [row["kl"] for row in shown]
    x0, x1 = math.log2(min(bits)) - 0.3, math.log2(max(bits)) + 0.3
    y0, y1 = math.floor(math.log10(min(kls))), math.ceil(math.log10(max(kls)))

    def x(value: float) -> float:
        return _LEFT + (math.log2(value) - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (math.log10(value) - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
            ' font-family="sans-serif" font-size="12">'
        ),
        _style(),
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 14}">bits per KV element (log; bf16 = 16)</text>',
        (
            f'<text x="16" y="{_HEIGHT / 2}" transform="rotate(-90 16 {_HEIGHT / 2})"'
            ' text-anchor="middle">KL, nats per token (log; lower is better)</text>'
        ),
    ]
    for tick in (0.5, 1, 2, 4, 8, 16):
        if x0 <= math.log2(tick) <= x1:
            at = x(tick)
            parts.append(
                f'<line x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{_HEIGHT - _BOTTOM}"'
                f' class="axis"/><text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 18}"'
                f' text-anchor="middle">{tick:g}</text>'
            )
    for power in range(y0, y1 + 1):
        at = y(10.0**power)
        parts.append(
            f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - _RIGHT}" y2="{at:.1f}"'
            f' class="axis"/><text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{power}'
            "</text>"
        )
    ladder = sorted((r for r in shown if r["family"] == "ladder"), key=lambda r: r["kl"])
    if len(ladder) > 1:
        points = " ".join(f"{x(r['bits_per_element']):.1f},{y(r['kl']):.1f}" for r in ladder)
        parts.append(f'<polyline points="{points}" class="curve"/>')
    labels: list[tuple[float, float]] = []
    for row in sorted(shown, key=lambda r: r["kl"], reverse=True):
        kind = row["family"]
        at_x, at_y = x(row["bits_per_element"]), y(row["kl"])
        label_x, label_y = at_x + 7, at_y + 4
        # Labels of neighbours stand below each other.
        while any(
            abs(label_y - other_y) < _LINE and abs(label_x - other_x) < _LABEL_WIDTH
            for other_x, other_y in labels
        ):
            label_y += 1
        labels.append((label_x, label_y))
        parts.append(
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4" class="{kind}"/>'
            f'<text x="{label_x:.1f}" y="{label_y:.1f}" class="{kind}">{escape(row["name"])}</text>'
        )
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _style() -> str:
    """Colours for a light page, and for a dark one where the reader's system is dark."""

    def colours(index: int, text: str, axis: str) -> str:
        kinds = "".join(f".{kind}{{fill:{pair[index]}}}" for kind, pair in _COLOURS.items())
        curve = f".curve{{fill:none;stroke-width:2;stroke:{_COLOURS['ladder'][index]}}}"
        return f"text{{fill:{text}}}.axis{{stroke:{axis}}}{kinds}{curve}"

    light, dark = colours(0, "#1f2328", "#d1d9e0"), colours(1, "#f0f6fc", "#3d444d")
    return f"<style>{light}@media(prefers-color-scheme:dark){{{dark}}}</style>"
