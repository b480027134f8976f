"""The results as CSV, JSON, Markdown tables, plots and one HTML page with players."""

import csv
import html
import io
import json
from pathlib import Path
from typing import Any

from codec_bridge.atomic import atomic_write
from vampnet_jax.evaluation.conditions import BITRATE_PLOT, plot_name
from vampnet_jax.evaluation.intervals import Interval
from vampnet_jax.evaluation.summary import Result, as_json

IN_TABLES = ("bitrate", "mel", "frechet", "kad", "share")
"""Measures, or sorts of them, that the Markdown tables show."""


def write_report(
    folder: Path,
    results: list[Result],
    tokens: dict[str, Interval],
    settings: dict[str, Any],
    n_listen: int,
) -> None:
    """Write all of it into a folder, over what an earlier run wrote there.

    Args:
      folder: where the recordings to listen to are in `audio/`.
      results: as `summarise` returns.
      tokens: as `summarise_tokens` returns.
      settings: what was run, for the record.
      n_listen: recordings of each condition.
    """
    content = {"settings": settings, "results": as_json(results)}
    content["tokens"] = {name: list(interval) for name, interval in tokens.items()}
    _write(folder / "results.json", json.dumps(content, indent=1) + "\n")
    _write(folder / "results.csv", _csv(results))
    _write(folder / "results.md", tables(results))
    plots = _plots(folder, results)
    _write(folder / "report.html", _page(results, tokens, settings, plots, n_listen))


def tables(results: list[Result]) -> str:
    """A Markdown table per experiment, for documentation."""
    parts = []
    for experiment in dict.fromkeys(r.condition.experiment for r in results):
        rows = [r for r in results if r.condition.experiment == experiment]
        found = dict.fromkeys(name for r in rows for name in r.figures)
        names = [n for sort in IN_TABLES for n in found if n == sort or n.startswith(f"{sort} ")]
        lines = [f"| {experiment} | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        for r in rows:
            cells = (_words(r.figures.get(name)) for name in names)
            lines.append(f"| {r.condition.name} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _words(interval: Interval | None) -> str:
    """A figure and its interval, if it has a width."""
    if interval is None:
        return ""
    value, low, high = (f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}" for x in interval)
    return value if low == high else f"{value} [{low}, {high}]"


def _csv(results: list[Result]) -> str:
    names = list(dict.fromkeys(name for r in results for name in r.figures))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = [f"{name}{part}" for name in names for part in ("", " low", " high")]
    writer.writerow(["experiment", "condition", "kind", *parts])
    for r in results:
        cells: list[Any] = [r.condition.experiment, r.condition.name, r.condition.kind]
        for name in names:
            cells += [f"{x:.6g}" for x in r.figures[name]] if name in r.figures else [""] * 3
        writer.writerow(cells)
    return text.getvalue()


def _plots(folder: Path, results: list[Result]) -> list[str]:
    """Mel and Fréchet distances by condition, and against the bitrate."""
    from matplotlib.figure import Figure

    made = []
    experiments = list(dict.fromkeys(r.condition.experiment for r in results))
    measures = ["mel", *(n for n in results[0].figures if n.startswith("frechet"))]
    for experiment in experiments:
        rows = [r for r in results if r.condition.experiment == experiment]
        figure = Figure(figsize=(4 + 4 * len(measures), 1 + 0.3 * len(rows)), layout="constrained")
        for axes, measure in zip(
            figure.subplots(1, len(measures), sharey=True, squeeze=False)[0], measures, strict=True
        ):
            for place, r in enumerate(rows):
                value, low, high = r.figures[measure]
                axes.plot([low, high], [place, place], color="0.6")
                axes.plot(value, place, "o", color="C0")
            axes.set_yticks(range(len(rows)), [r.condition.name for r in rows])
            axes.invert_yaxis()
            axes.set_xlabel(measure)
        made.append(_save(folder, plot_name(experiment), figure))
    with_bits = [r for r in results if "bitrate" in r.figures]
    if with_bits:
        figure = Figure(figsize=(6 * len(measures), 5), layout="constrained")
        for axes, measure in zip(
            figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True
        ):
            for kind in dict.fromkeys(r.condition.kind for r in with_bits):
                rows = sorted(
                    (r for r in with_bits if r.condition.kind == kind),
                    key=lambda r: r.figures["bitrate"].value,
                )
                x, y = ([r.figures[name].value for r in rows] for name in ("bitrate", measure))
                axes.plot(x, y, "o" if kind == "compress" else "o-", label=kind)
            axes.set_xscale("log")
            axes.set_xlabel("bits per second")
            axes.set_ylabel(measure)
        axes.legend()
        made.append(_save(folder, BITRATE_PLOT, figure))
    return made


def _save(folder: Path, name: str, figure: Any) -> str:
    with atomic_write(folder / name) as temporary:
        figure.savefig(temporary, dpi=110)
    return name


def _page(
    results: list[Result],
    tokens: dict[str, Interval],
    settings: dict[str, Any],
    plots: list[str],
    n_listen: int,
) -> str:
    parts = [_HEAD, "<h1>Evaluation</h1><p>"]
    parts += [f"{html.escape(k)}: {html.escape(str(v))}<br>" for k, v in settings.items()]
    parts.append("</p><p>Brackets are 95 % bootstrap intervals over the excerpts.</p>")
    if n_listen:
        players = "".join(_player("original", i) for i in range(n_listen))
        parts.append(f"<h2>Originals</h2><p>{players}</p>")
    for experiment in dict.fromkeys(r.condition.experiment for r in results):
        rows = [r for r in results if r.condition.experiment == experiment]
        names = list(dict.fromkeys(name for r in rows for name in r.figures))
        parts.append(f"<h2>{html.escape(experiment)}</h2><table><tr><th>condition</th>")
        parts += [f"<th>{html.escape(name)}</th>" for name in names]
        parts.append("<th>listen</th></tr>")
        for r in rows:
            cells = "".join(f"<td>{_cell(r.figures.get(name))}</td>" for name in names)
            players = "".join(_player(r.condition.slug, i) for i in range(n_listen))
            name = html.escape(r.condition.name)
            parts.append(f"<tr><th>{name}</th>{cells}<td>{players}</td></tr>")
        parts.append("</table>")
    parts.append("<h2>Held-out tokens</h2><table>")
    for name, interval in tokens.items():
        parts.append(f"<tr><th>{html.escape(name)}</th><td>{_cell(interval)}</td></tr>")
    parts.append("</table>")
    parts += [f'<p><img src="{name}" alt="{name}"></p>' for name in plots]
    return "\n".join([*parts, "</body></html>\n"])


def _player(slug: str, number: int) -> str:
    return f'<audio controls preload="none" src="audio/{slug}-{number}.flac"></audio>'


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return ""
    value, low, high = (f"{x:.4g}" for x in interval)
    return f"{value} <small>[{low}, {high}]</small>"


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>
<style>
body { font: 15px/1.4 sans-serif; margin: 2em; }
table { border-collapse: collapse; }
td, th { border-bottom: 1px solid #ccc; padding: .2em .6em; text-align: left; }
small { color: #777; }
audio { width: 14em; height: 2em; display: block; }
img { max-width: 100%; }
</style></head><body>"""
