"""The plot of a sweep: hit@1 against the time of a query, and against the bytes of a vector."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from jobs.report.style import COLOURS, INK, LINE, MUTED

Row = Mapping[str, Any]
_DEPTH_COLOURS = (MUTED, COLOURS["slq"], COLOURS["slq_index"], COLOURS["slq_fine"], "#CC79A7")
_MARKERS = "osD^vPX"
_METRIC = "hit@1"


def write_sweep_plot(result: Mapping[str, Any], target: Path) -> Path:
    """Draw a sweep's cells into a PNG; the same cells always give the same bytes."""
    sweep_figure(result).savefig(target, dpi=110, metadata={"Software": None})
    return target


def sweep_figure(result: Mapping[str, Any]) -> Figure:
    """Two panels over the same rows; what is on a Pareto front is joined, named and has its interval."""
    rows = result["cells"]
    figure = Figure(figsize=(12, 5.4))
    figure.set_layout_engine("constrained", w_pad=0.08)
    panels = figure.subplots(1, 2, sharey=True)
    threads = (
        f"search with {result['search_threads']}, model with {result['model_threads']} thread(s)"
    )
    _panel(panels[0], rows, "ms", "on_latency_front", f"ms of a query alone ({threads})")
    _panel(panels[1], rows, "bytes_per_vector", "on_bytes_front", "bytes of a vector in memory")
    size = f"{result['num_items']:,} items, {result['num_queries']:,} queries"
    panels[0].set_title(f"hit@1 in % against time: {size}", loc="left", fontsize=11, color=INK)
    panels[1].set_title("hit@1 in % against memory", loc="left", fontsize=11, color=INK)
    panels[0].set_ylabel("hit@1 in %", color=MUTED)
    figure.legend(
        handles=_legend(rows), loc="outside lower center", ncols=7, frameon=False, fontsize=9
    )
    return figure


def _panel(axes: Axes, rows: Sequence[Row], cost: str, front: str, label: str) -> None:
    depths, indexes = _different(rows, "depth"), _different(rows, "index")
    for row in rows:
        colour = _DEPTH_COLOURS[depths.index(row["depth"]) % len(_DEPTH_COLOURS)]
        marker = _MARKERS[indexes.index(row["index"]) % len(_MARKERS)]
        place = (row[cost], 100 * row[_METRIC])
        size = 7 if row[front] else 5
        axes.plot(*place, marker, color=colour, markersize=size, alpha=1 if row[front] else 0.45)
    best = sorted((row for row in rows if row[front]), key=lambda row: (row[cost], row["name"]))
    places = [(row[cost], 100 * row[_METRIC]) for row in best]
    axes.plot(*zip(*places, strict=True), color=INK, linewidth=1, zorder=1)
    for row, (x, y) in zip(best, places, strict=True):
        low, high = (100 * end for end in row[f"{_METRIC}_interval"])
        reach = [[max(0.0, y - low)], [max(0.0, high - y)]]
        axes.errorbar(x, y, yerr=reach, ecolor=INK, elinewidth=0.8, capsize=2, fmt="none", zorder=1)
    _name(axes, best, places)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label, color=MUTED)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelcolor=MUTED, labelsize=9)


def _name(axes: Axes, best: Sequence[Row], places: Sequence[tuple[float, float]]) -> None:
    """Numbers at the points of the front, and what they are in a corner where no point is."""
    lines = []
    for number, (row, place) in enumerate(zip(best, places, strict=True), start=1):
        axes.annotate(
            str(number), place, (-4, 6), textcoords="offset points", ha="right", fontsize=8.5
        )
        lines.append(f"{number}  {row['name']}: {100 * row[_METRIC]:.1f}")
    axes.text(
        *(0.985, 0.03),
        "\n".join(lines),
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        fontsize=8.5,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": LINE, "boxstyle": "round,pad=0.5"},
    )


def _legend(rows: Sequence[Row]) -> list[Line2D]:
    handles = [
        Line2D([], [], linestyle="", marker="o", color=colour, label=_depth_name(depth))
        for depth, colour in zip(_different(rows, "depth"), _DEPTH_COLOURS, strict=False)
    ]
    handles += [
        Line2D([], [], linestyle="", marker=marker, color=INK, markerfacecolor="none", label=index)
        for index, marker in zip(_different(rows, "index"), _MARKERS, strict=False)
    ]
    return [*handles, Line2D([], [], color=INK, linewidth=1, label="Pareto front, 95% intervals")]


def _depth_name(depth: int) -> str:
    return f"{depth} re-ranked" if depth else "coarse only"


def _different(rows: Sequence[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))
