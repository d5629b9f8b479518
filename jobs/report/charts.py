"""The report's charts."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.report.style import COLOURS, INK, LINE, MUTED, data_uri
from jobs.report.tables import hit_depths
from jobs.results import SYSTEM_NAMES


def hits_chart(results: Mapping[str, Any]) -> Figure:
    """Bars of the first hit@k by subset and system, with their 95% intervals."""
    systems = results["systems"]
    metric = f"hit@{hit_depths(results)[0]}"
    subsets = list(next(iter(systems.values()))["text_to_image"])
    subsets = [name for name in subsets if name != "all"] or subsets
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(systems)
    for n, (system, report) in enumerate(systems.items()):
        entries = [report["text_to_image"][name] for name in subsets]
        places = [s + (n - (len(systems) - 1) / 2) * width for s in range(len(subsets))]
        _bars(axes, places, entries, metric=metric, width=width, system=system)
    axes.set_xticks(range(len(subsets)), [name.replace(", ", ",\n") for name in subsets])
    axes.tick_params(axis="x", length=0, colors=INK, labelsize=9.5)
    axes.set_ylabel(f"{metric} in %", color=MUTED)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9.5)
    plain(axes)
    return figure


def _bars(
    axes: Axes,
    places: Sequence[float],
    entries: Sequence[Mapping[str, Any]],
    *,
    metric: str,
    width: float,
    system: str,
) -> None:
    values = [100 * entry[metric] for entry in entries]
    lows, highs = zip(*(entry[f"{metric}_interval"] for entry in entries), strict=True)
    below = [value - 100 * low for value, low in zip(values, lows, strict=True)]
    above = [100 * high - value for value, high in zip(values, highs, strict=True)]
    axes.bar(
        places,
        values,
        width=0.92 * width,
        color=COLOURS.get(system, MUTED),
        label=SYSTEM_NAMES.get(system, system),
        yerr=[[max(0.0, v) for v in below], [max(0.0, v) for v in above]],
        error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2.5},
    )
    for place, value, high in zip(places, values, highs, strict=True):
        top = (place, max(value, 100 * high))
        style: dict[str, Any] = {"ha": "center", "fontsize": 7.5, "color": INK}
        axes.annotate(f"{value:.1f}", top, (0, 3), textcoords="offset points", **style)


def plain(axes: Axes) -> None:
    """The look of every chart: a faint grid, no frame."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9aa5b1")
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, labelcolor=MUTED, labelsize=9)


def svg(figure: Figure) -> str:
    """A figure as a data URI; the same figure always gives the same bytes."""
    buffer = io.BytesIO()
    unsigned: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": "slq"}):
        figure.savefig(buffer, format="svg", metadata=unsigned)
    return data_uri(buffer.getvalue(), "image/svg+xml")
