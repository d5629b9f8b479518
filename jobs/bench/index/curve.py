"""The picture of `slq bench index`: recall against queries per second, a panel for each number of threads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.report.style import COLOURS, INK, LINE, MUTED

_SIDES = {
    "flat": INK,
    "hnswlib": "#CC79A7",
    "pq4 opq": COLOURS["slq"],
    "rabitq random": "#009E73",
    "gpu flat": MUTED,
    "gpu float16": "#E69F00",
    "gpu int8": "#56B4E9",
}


def write_curve(found: Mapping[str, Any], target: Path) -> Path:
    """Draw the result of a run into a PNG."""
    panels = found["threads"]
    figure = Figure(figsize=(1 + 4.6 * len(panels), 3.8))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for place, (count, measured) in zip(axes, panels.items(), strict=True):
        _panel(place, measured["points"], f"{count} thread{'s' if count != '1' else ''}")
    axes[0].set_ylabel("queries per second", color=MUTED)
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    title = (
        f"{found['rows']:,} images of {found['dimension']} values, {found['queries']:,} texts ask"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    figure.savefig(target, dpi=144, metadata={"Software": None})
    return target


def _panel(axes: Axes, points: Sequence[Mapping[str, Any]], title: str) -> None:
    for side, colour in _SIDES.items():
        best = _front([(one["recall"], one["qps"]) for one in points if one["side"] == side])
        if best:
            axes.plot(*zip(*best, strict=True), "o-", color=colour, label=side, markersize=4)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(0.5, 1.005)
    axes.set_xlabel("recall@10", color=MUTED)
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.grid(color=LINE, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelcolor=MUTED, labelsize=9)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other one beats in both, by recall."""
    kept = [
        one
        for one in points
        if not any(other != one and other[0] >= one[0] and other[1] >= one[1] for other in points)
    ]
    return sorted(kept)
