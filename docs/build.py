"""Write docs/configuration.md, docs/commands.md and the pictures.

    python docs/build.py

`tests/unit/test_docs.py` and `test_config.py` fail where a file differs from what this writes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from kvfetcher import cli
from kvfetcher.bench.plot import rate_quality_svg
from kvfetcher.config import SECTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "tests" / "benchmarks" / "results"
CODEC_RESULTS = RESULTS / "codec_smollm2-135m.json"
REPORTS = RESULTS / "demo_reports.json"

HEAD = """\
# Configuration

This page is written by `python docs/build.py` from the settings themselves. `kvfetcher config` prints
the same settings with your values, and says where each value came from.

A setting gets its value from the last of these that has one:

1. the default below;
2. the TOML file that `--config` or `$KVFETCHER_CONFIG` names, one section per part;
3. the environment variable `KVFETCHER_<SECTION>_<FIELD>`, such as `KVFETCHER_STORE_PATH`. Lists are
   separated by commas, truth values are `true` or `false`.

Unknown sections, keys and `KVFETCHER_` variables, and values of a wrong type or outside their range,
are errors.

```toml
[server]
http_port = 9000

[store]
kind = "redis"
url = "redis://cache.example:6379/0"
```

These variables are no settings:

| variable | meaning |
|---|---|
| `KVFETCHER_CONFIG` | the TOML file |
| `KVFETCHER_MODEL_REPOSITORY` | folder of the Triton models; default `./model_repository`, or the checkout's |
| `KVFETCHER_STORE_USERNAME`, `KVFETCHER_STORE_PASSWORD` | credentials for Redis |
| `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN` | credentials for S3 |
| `CUDA_MPS_PIPE_DIRECTORY` | folder of an MPS daemon that runs already, see [gpu.md](gpu.md#mps) |
| `OPENBLAS_NUM_THREADS` | threads of numpy's linear algebra in the server's processes; 1 if it is not set |
| `XDG_CACHE_HOME` | models, calibrations and the default store are in its folder `kvfetcher`; default `~/.cache` |
"""


def configuration_page() -> str:
    """docs/configuration.md."""
    parts = [HEAD]
    for name, section in SECTIONS.items():
        hints = get_type_hints(section)
        parts.append(f"\n## [{name}]\n\n{section.__doc__}\n")
        parts.append("| setting | default | values | meaning |\n|---|---|---|---|")
        for f in fields(section):  # type: ignore[arg-type]
            values = _values(hints[f.name], f.metadata["low"], f.metadata["high"])
            parts.append(
                f"| `{name}.{f.name}` | {_default(f.default)} | {values} |"
                f" {f.metadata['doc'].replace('|', chr(92) + '|')} |"
            )
    return "\n".join(parts) + "\n"


def _default(value: Any) -> str:
    if value in ("", ()):
        return "empty"
    return f"`{json.dumps(value)}`"


def _values(hint: Any, low: float | None, high: float | None) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    item, *_ = get_args(hint) or (hint,)
    name = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}[item]
    if get_origin(hint) is tuple:
        name = {int: "list of integers", str: "list of texts"}[item]
    if low is None:
        return name
    return f"{name} >= {low:g}" if high is None else f"{name}, {low:g} to {high:g}"


COMMANDS_HEAD = """\
# Commands

This page is written by `python docs/build.py` from the commands themselves. Data goes to stdout,
everything else to stderr. Exit status: 0 done; 1 an error, said in one line; 2 the command line is
wrong; 130 interrupted. `kvfetcher store verify` ends with 3 if it found damage.
"""


def commands_page() -> str:
    """docs/commands.md."""
    parts = [COMMANDS_HEAD]
    for words in _commands([]):
        parser = _parser(words)
        parts.append(f"\n## kvfetcher {' '.join(words)}\n\n{_paragraph(parser.description)}")
        rows = [
            f"| `{_names(action)}` | {_paragraph(action.help % _facts(action))} |"
            for action in parser._actions
            if not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))
        ]
        if rows:
            parts += ["\n| argument | meaning |\n|---|---|", *rows]
    return "\n".join(parts) + "\n"


def _commands(words: list[str]) -> Iterator[list[str]]:
    """Every command line without its arguments."""
    parser = _parser(words)
    if words == ["bench"]:
        yield from ([*words, name] for name in parser._actions[-1].choices)
        return
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not nested:
        yield words
        return
    for name in nested[0].choices:
        yield from _commands([*words, name])


def _parser(words: list[str]) -> argparse.ArgumentParser:
    """The parser that would print the help of this command."""
    found: list[argparse.ArgumentParser] = []
    original = argparse.ArgumentParser.print_help
    argparse.ArgumentParser.print_help = lambda self, file=None: found.append(self)
    try:
        with contextlib.suppress(SystemExit):
            cli.main([*words, "--help"])
    finally:
        argparse.ArgumentParser.print_help = original
    return found[0]


def _names(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if action.choices is not None and action.metavar is None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return f"[{value}]" if action.nargs in ("?", "*") else str(value)
    return f"{', '.join(action.option_strings)} {value}".strip()


def _facts(action: argparse.Action) -> dict[str, Any]:
    return {"default": action.default, "prog": "kvfetcher"}


def _paragraph(text: str | None) -> str:
    """Docstring or help text as one paragraph of Markdown."""
    if not text:
        raise ValueError("every command and argument needs a help text")
    return " ".join(text.replace("|", "\\|").replace("``", "`").split())


# Pictures. An SVG that a page shows as an image follows the reader's light or dark mode by itself.

STYLE = """\
<style>
text { font: 13px sans-serif; fill: #1f2328 } .small { font-size: 11px; fill: #59636e }
.box { fill: #f6f8fa; stroke: #818b98 } .group { fill: none; stroke: #818b98; stroke-dasharray: 4 3 }
.line { stroke: #59636e; fill: none; stroke-width: 1.5 } .head { fill: #59636e }
.axis { stroke: #d1d9e0 } .a { fill: #0969da } .b { fill: #1a7f37 } .c { fill: #bc4c00 }
.d { fill: #8250df } .light { fill: #fff }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 } .box { fill: #151b23; stroke: #656c76 }
  .group { stroke: #656c76 } .line { stroke: #9198a1 } .head { fill: #9198a1 } .axis { stroke: #3d444d }
  .a { fill: #4493f8 } .b { fill: #3fb950 } .c { fill: #db6d28 } .d { fill: #ab7df8 }
}
</style>"""


def _svg(width: int, height: int, title: str, parts: list[str]) -> str:
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
                f' width="{width}" height="{height}" role="img">'
            ),
            f"<title>{escape(title)}</title>",
            STYLE,
            (
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
                ' markerHeight="7" orient="auto"><path class="head" d="M0,0 L8,4 L0,8 z"/></marker>'
                "</defs>"
            ),
            *parts,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, text: str, *, kind: str = "", anchor: str = "start") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, name: str, what: str) -> str:
    return (
        f'<rect class="box" x="{x:g}" y="{y:g}" width="{width:g}" height="50" rx="6"/>'
        + _text(x + width / 2, y + 21, name, anchor="middle")
        + _text(x + width / 2, y + 38, what, kind="small", anchor="middle")
    )


def _arrow(*points: tuple[float, float]) -> str:
    way = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline class="line" points="{way}" marker-end="url(#head)"/>'


def graph_svg() -> str:
    """The models, what flows between them, and the store."""
    parts = [
        '<rect class="group" x="10" y="74" width="780" height="66" rx="8"/>',
        _box(22, 82, 130, "preprocessing", "text to token ids"),
        _box(214, 82, 130, "kv_fetch", "decides and fetches"),
        _box(430, 82, 130, "tensorrt_llm", "engine and KV arena"),
        _box(648, 82, 130, "postprocessing", "answer to client"),
        _arrow((152, 107), (214, 107)),
        _text(183, 100, "ids", kind="small", anchor="middle"),
        _arrow((344, 107), (430, 107)),
        _text(387, 100, "ids, lease", kind="small", anchor="middle"),
        _arrow((560, 107), (648, 107)),
        _text(604, 100, "tokens", kind="small", anchor="middle"),
        _box(22, 10, 130, "client", "HTTP or gRPC"),
        _arrow((87, 60), (87, 82)),
        _arrow((713, 82), (713, 35), (152, 35)),
        _text(430, 29, "text, streamed, and kv_report", kind="small", anchor="middle"),
        _text(782, 155, "ensemble kvfetcher", kind="small", anchor="end"),
        '<rect class="group" x="100" y="186" width="330" height="66" rx="8"/>',
        _box(112, 194, 130, "kv_decode", "H.265 to pictures"),
        _box(288, 194, 130, "kv_restore", "pictures to KV values"),
        _arrow((242, 219), (288, 219)),
        _text(424, 267, "ensemble kv_pipeline", kind="small", anchor="end"),
        _arrow((240, 132), (177, 194)),
        _text(150, 166, "units", kind="small"),
        _arrow((418, 210), (472, 210), (472, 132)),
        _text(463, 170, "KV values", kind="small", anchor="end"),
        _arrow((520, 132), (520, 194)),
        _text(528, 170, "after the answer", kind="small"),
        _box(494, 194, 150, "kv_save, kv_encode", "KV values to chunks"),
        _box(288, 292, 130, "store", "file, redis or s3"),
        _arrow((565, 244), (565, 317), (418, 317)),
        _text(573, 300, "chunks", kind="small"),
        _arrow((288, 317), (60, 317), (60, 160), (225, 132)),
        _text(68, 300, "chunks", kind="small"),
    ]
    return _svg(800, 352, "The models of KVFetcher and what flows between them", parts)


def waterfall_svg(reports: dict[str, Any]) -> str:
    """Where the time to the first token goes, for a miss and a hit, by the clock.

    Args:
        reports: what `tests/demo/demo.py --reports` writes.
    """
    left, width, row = 118, 560, 28
    longest = max(reports[name]["time_to_first_token_ms"] for name in ("miss", "hit"))
    parts = []
    top = 34
    for name in ("miss", "hit"):
        facts = reports[name]
        report, whole = facts["kv_report"], facts["time_to_first_token_ms"]
        parts.append(
            _text(
                10, top - 12,
                f"{name}: {report['hit_tokens']} of {report['prompt_tokens']} tokens fetched, first token"
                f" after {whole / 1e3:.2f} s",
            )
        )  # fmt: skip
        at = 0.0
        for label, milliseconds, kind in _stages(report, whole):
            x, w = left + at / longest * width, max(1.5, milliseconds / longest * width)
            parts.append(_text(left - 8, top + 15, label, kind="small", anchor="end"))
            parts.append(
                f'<line class="axis" x1="{left}" x2="{left + width}" y1="{top + 22}" y2="{top + 22}"/>'
                f'<rect class="{kind}" x="{x:.1f}" y="{top + 3}" width="{w:.1f}" height="15" rx="2"/>'
            )
            text = f"{milliseconds:,.0f} ms"
            inside = x + w + 80 > left + width + 110
            parts.append(
                _text(x - 6, top + 15, text, kind="small", anchor="end")
                if inside
                else _text(x + w + 6, top + 15, text, kind="small")
            )
            at += milliseconds
            top += row
        top += 40
    return _svg(800, top - 30, "Time to the first token: a miss and a hit", parts)


def _stages(report: dict[str, Any], whole_ms: float) -> list[tuple[str, float, str]]:
    stages, engine = report["stages_ms"], report["engine"]
    found = [
        ("look up", stages.get("lookup", 0.0), "a"),
        ("fetch", stages.get("fetch", 0.0), "b"),
        ("copy KV", engine["load_ms"], "d"),
        ("compute", engine["prefill_ms"], "c"),
    ]
    known = sum(milliseconds for _, milliseconds, _ in found)
    return [("all else", max(0.0, whole_ms - known), "head"), *(s for s in found if s[1])]


def pictures() -> dict[str, str]:
    """File name in docs/pictures -> its text."""
    codec = json.loads(CODEC_RESULTS.read_text())
    rows = [row for row in codec["rows"] if row["text_set"] == "certificate"]
    return {
        "graph.svg": graph_svg(),
        "waterfall.svg": waterfall_svg(json.loads(REPORTS.read_text())),
        "rate_quality.svg": rate_quality_svg(
            rows, title=f"{codec['model']}: rate and quality of KV codecs"
        ),
    }


def outputs() -> dict[Path, str]:
    """Every file that this writes -> its text."""
    return {
        DOCS / "configuration.md": configuration_page(),
        DOCS / "commands.md": commands_page(),
        **{DOCS / "pictures" / name: text for name, text in pictures().items()},
    }


if __name__ == "__main__":
    for path, text in outputs().items():
        path.write_text(text)
        sys.stdout.write(f"{path}\n")
