"""Pictures of what loads did."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.bench.load.arrivals import Piece
from jobs.bench.load.sending import Outcome
from jobs.report.charts import plain
from jobs.report.style import COLOURS, INK, LINE, MUTED

_COLOURS = (COLOURS["slq"], COLOURS["slq_fine"], COLOURS["slq_index"], "#E69F00", "#CC79A7", INK)
_PERCENTILES = {"p50": "-", "p90": "--", "p99": "-.", "p99.9": ":"}


def latency_chart(by_mode: Mapping[str, Any], target: Path) -> Path:
    """Percentiles of latency over the offered rate, a panel for each kind of search."""
    figure = Figure(figsize=(5.6 * len(by_mode), 3.9), layout="constrained")
    panels = figure.subplots(1, len(by_mode), squeeze=False)[0]
    for axes, (mode, found) in zip(panels, by_mode.items(), strict=True):
        rows = [row for row in found["rates"] if row["latency_ms"]["p50"] is not None]
        offered = [row["offered_per_s"] for row in rows]
        for colour, (name, line) in zip(_COLOURS, _PERCENTILES.items(), strict=False):
            values = [row["latency_ms"][name] for row in rows]
            axes.plot(offered, values, line, marker="o", markersize=4, color=colour, label=name)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylabel("ms from when a request was due", color=MUTED)
        _named(axes, f"{mode} search", "requests per second")
    return _saved(figure, target)


def overload_chart(by_mode: Mapping[str, Any], target: Path) -> Path:
    """Offered and timely rates of each run, and resident memory over time."""
    figure = Figure(figsize=(10.4, 3.6 * len(by_mode)), layout="constrained")
    rows = figure.subplots(len(by_mode), 2, squeeze=False)
    for (left, right), (mode, found) in zip(rows, by_mode.items(), strict=True):
        points = [*found["probes"], *found["runs"]]
        points.sort(key=lambda one: one["offered_per_s"])
        offered = [one["offered_per_s"] for one in points]
        good = [one["goodput_per_s"] for one in points]
        left.plot(offered, good, "o-", color=_COLOURS[0], markersize=4, label="answered in time")
        left.axhline(found["peak_goodput_per_s"], color=MUTED, linestyle=":", linewidth=1)
        left.set_ylim(bottom=0)
        left.set_ylabel("per second", color=MUTED)
        _named(left, f"{mode} search", "requests per second")
        for colour, run in zip(_COLOURS, found["runs"], strict=False):
            memory = run["memory"]
            label = f"{run['factor']:g} times the peak's rate"
            right.plot(memory["seconds"], memory["mib"], color=colour, label=label)
        right.set_ylim(0, 1.1 * max(run["memory"]["max_mib"] for run in found["runs"]))
        right.set_ylabel("resident MiB of all Serve processes", color=MUTED)
        _named(right, "memory", "seconds")
    return _saved(figure, target)


def chaos_chart(outcome: Outcome, faults: Sequence[Any], target: Path) -> Path:
    """Every request by when it was due and how long it took, with faults and failures marked."""
    figure = Figure(figsize=(10.4, 3.9), layout="constrained")
    axes = figure.subplots()
    records = outcome.records
    at, latency = records.scheduled - outcome.start, 1000 * records.latency
    sorts = {"answered": records.answered, "not answered": ~records.answered}
    for colour, (name, which) in zip(_COLOURS, sorts.items(), strict=False):
        axes.plot(at[which], latency[which], ".", markersize=3, color=colour, label=name)
    for fault in faults:
        began = fault.at - outcome.start
        axes.axvline(began, color=MUTED, linewidth=1, linestyle=":")
        if fault.healed_s is not None:
            axes.axvspan(began, began + fault.healed_s, color=LINE, alpha=0.5, linewidth=0)
        place: dict[str, Any] = {
            "xycoords": axes.get_xaxis_transform(),
            "rotation": 90,
            "va": "top",
        }
        words = f"{fault.signal} {fault.kind}"
        axes.annotate(words, (began, 0.98), fontsize=8, color=INK, ha="right", **place)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("ms from when a request was due", color=MUTED)
    _named(axes, "faults, and how long they took to heal (shaded)", "seconds")
    return _saved(figure, target)


def autoscale_chart(
    series: Mapping[str, Any], phases: Mapping[str, Sequence[Piece]], target: Path
) -> Path:
    """Rates and running replicas over time, in two panels."""
    figure = Figure(figsize=(10.4, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for colour, name in zip(_COLOURS, ("offered", "answered"), strict=False):
        rates = np.array(series[f"{name}_per_s"], float)
        above.step(np.arange(len(rates)), rates, where="post", color=colour, lw=1.2, label=name)
    for n, (name, counts) in enumerate(series["replicas"].items()):
        # beside one another where they are equal
        shifted = np.array(counts, float) + 0.04 * n
        colour = _COLOURS[n % len(_COLOURS)]
        below.step(series["sample_s"], shifted, where="post", color=colour, label=name)
    start = 0.0
    for name, pieces in phases.items():
        for axes in (above, below):
            axes.axvline(start, color=MUTED, linewidth=0.8, linestyle=":")
        place: dict[str, Any] = {
            "xycoords": above.get_xaxis_transform(),
            "va": "top",
            "fontsize": 9,
            "color": INK,
        }
        above.annotate(f" {name}", (start, 0.99), **place)
        start += sum(piece.seconds for piece in pieces)
    above.set_ylim(0, 1.1 * above.get_ylim()[1])  # room for the names
    above.set_ylabel("requests per second", color=MUTED)
    below.set_ylim(bottom=0)
    below.set_ylabel("running replicas", color=MUTED)
    _named(above, "rates", "")
    _named(below, "replicas", "seconds")
    return _saved(figure, target)


def _named(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel(below, color=MUTED)
    above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderpad": 0}
    axes.legend(frameon=False, fontsize=9, ncols=6, **above)
    plain(axes)


def _saved(figure: Figure, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=144, metadata={"Software": None})
    return target
