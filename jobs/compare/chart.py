"""The picture of a study: hit@1 of every row with its interval, a panel for each kind of query."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.compare.study import ZERO_SHOT
from jobs.compare.tables import Row, main_subsets
from jobs.report.style import COLOURS, INK, LINE, MUTED

_PALE = COLOURS["last_token"]
_ABREAST = 3
_PANEL_COLOURS = (COLOURS["slq"], COLOURS["slq_fine"], "#009E73", "#CC79A7")


def write_study_chart(summary: Mapping[str, Any], target: Path) -> Path:
    """Draw a study's rows into a PNG; the same rows always give the same bytes."""
    study_figure(summary["rows"]).savefig(target, dpi=144, metadata={"Software": None})
    return target


def write_category_chart(summary: Mapping[str, Any], target: Path) -> Path | None:
    """The same of knowledge by category; None where queries have none."""
    if not any(row.get("categories") for row in summary["rows"]):
        target.unlink(missing_ok=True)
        return None
    figure = category_figure(summary["rows"])
    figure.savefig(target, dpi=144, metadata={"Software": None})
    return target


def study_figure(rows: Sequence[Row]) -> Figure:
    """Horizontal bars of hit@1 in %, the first row on top; zero-shot rows in grey."""
    subsets = main_subsets(rows)
    longest = max(len(row["name"]) for row in rows)
    size = (1 + 0.07 * longest + 3.9 * len(subsets), 0.9 + 0.36 * len(rows))
    figure = Figure(figsize=size)
    figure.set_layout_engine("constrained", wspace=0.04, w_pad=0.08, h_pad=0.08)
    panels = figure.subplots(1, len(subsets), sharey=True, squeeze=False)[0]
    for number, (axes, subset) in enumerate(zip(panels, subsets, strict=True)):
        _panel(axes, rows, subset, _PANEL_COLOURS[number % len(_PANEL_COLOURS)])
    panels[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    return figure


def category_figure(rows: Sequence[Row]) -> Figure:
    """hit@1 in % by category of knowledge: a panel for each, a bar for each row."""
    names = list(next(row["categories"] for row in rows if row.get("categories")))
    longest = max(len(row["name"]) for row in rows)
    num_rows = -(-len(names) // _ABREAST)
    size = (1 + 0.07 * longest + 2.7 * _ABREAST, num_rows * (0.7 + 0.27 * len(rows)))
    figure = Figure(figsize=size)
    figure.set_layout_engine("constrained", wspace=0.04, w_pad=0.08, h_pad=0.1)
    panels = figure.subplots(num_rows, _ABREAST, sharey=True, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        _bars(axes, rows, partial(_of_category, name), _PANEL_COLOURS[1])
        size_of = next(row["categories"][name] for row in rows if name in row["categories"])
        title = f"{name.replace('_', ' ')}  (n = {size_of['num_queries']})"
        axes.set_title(title, loc="left", fontsize=10, color=INK)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    panels[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    return figure


def _of_category(name: str, row: Row) -> Mapping[str, Any] | None:
    entry: Mapping[str, Any] | None = row["categories"].get(name)
    return entry


def _panel(axes: Axes, rows: Sequence[Row], subset: str, colour: str) -> None:
    _bars(axes, rows, lambda row: row["hits"].get(subset), colour)
    size = next(row["hits"][subset]["num_queries"] for row in rows if subset in row["hits"])
    title = f"{subset}: hit@1 text \N{RIGHTWARDS ARROW} image in %  (n = {size})"
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)


def _bars(
    axes: Axes,
    rows: Sequence[Row],
    entry_of: Callable[[Row], Mapping[str, Any] | None],
    colour: str,
) -> None:
    """A bar with its interval for each row that has one."""
    for place, row in enumerate(rows):
        entry = entry_of(row)
        if entry is None:
            continue
        value, (low, high) = 100 * entry["value"], (100 * end for end in entry["interval"])
        axes.barh(place, value, height=0.62, color=_PALE if row["run"] == ZERO_SHOT else colour)
        reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
        bars: dict[str, Any] = {"ecolor": INK, "elinewidth": 1, "capsize": 2.5, "fmt": "none"}
        axes.errorbar(value, place, xerr=reach, **bars)
        style: dict[str, Any] = {"va": "center", "fontsize": 8.5, "color": INK}
        end = (max(value, high), place)
        axes.annotate(f"{value:.1f}", end, (5, 0), textcoords="offset points", **style)
    axes.set_xlim(0, 109)
    axes.set_xticks(range(0, 101, 20))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("#9aa5b1")
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", length=0, labelcolor=MUTED, labelsize=9)
    axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9.5)
