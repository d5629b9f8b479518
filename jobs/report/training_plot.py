"""A picture of a training run: what its history says of loss, temperature, retrieval, gradients and time."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from jobs.report.charts import plain
from jobs.report.style import COLOURS, INK, LINE, MUTED
from pipelines.training_log import read_history
from slq.errors import ConfigError, DataError

Floats = NDArray[np.float64]
History = Sequence[dict[str, float]]

_HIT = re.compile(r"(?P<direction>\w+)/hit@(?P<k>\d+)")
_SECONDS = "seconds/"
_BLUE, _RED = COLOURS["slq"], COLOURS["slq_fine"]
_HIT_COLOURS = (_BLUE, _RED, "#009E73", "#CC79A7")
_PART_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#999999")
_LAYOUTS = {1: (1,), 2: (2,), 3: (3,), 4: (2, 2), 5: (2, 3)}
"""How many panels stand in each row, for each number of panels."""
_COLUMNS = 6  # what a row of one, two or three panels divides
_SMOOTH_FROM, _BINS = 60, 40
"""Points from which a curve is drawn pale, with its running mean over it; columns of the time panel at most."""


def write_training_plot(history: Path, target: Path) -> Path:
    """Draw a run's history into a file; the same history always gives the same bytes.

    Args:
        history: `history.jsonl` of a run, finished or still going on.
        target: A `.svg` or `.png` file; replaced if it exists.

    Returns:
        The target.

    Raises:
        ArtifactError: The history is missing or damaged.
        ConfigError: The target is of another kind.
        DataError: The history has no step, or nothing that can be drawn.
    """
    kind = target.suffix.removeprefix(".").lower()
    if kind not in ("svg", "png"):
        raise ConfigError(f"{target} is neither .svg nor .png; name one of them")
    figure = training_figure(read_history(history))
    unsigned: dict[str, Any] = dict.fromkeys(
        ("Date", "Creator", "Format", "Type") if kind == "svg" else ("Software",)
    )
    with mpl.rc_context({"svg.hashsalt": "slq"}):
        figure.savefig(target, format=kind, metadata=unsigned, dpi=144)
    return target


def training_figure(history: History) -> Figure:
    """Panels of loss, hit@k, temperature, gradient norm and share of time; those without data are left out.

    Args:
        history: As `pipelines.training_log.read_history` gives it. Values that are not finite are gaps.

    Raises:
        DataError: There is no step, or nothing that can be drawn.
    """
    panels = _panels(history)
    if not panels:
        raise DataError(
            f"the history has {len(history)} steps and nothing to draw; "
            "it needs a loss, a temperature, hits, a gradient norm or seconds"
        )
    layout = _LAYOUTS[len(panels)]
    figure = Figure(figsize=(11, 0.2 + 2.7 * len(layout)), layout="constrained")
    grid = figure.add_gridspec(len(layout), _COLUMNS)
    waiting = iter(panels)
    for row, count in enumerate(layout):
        width = _COLUMNS // count
        for column in range(count):
            axes = figure.add_subplot(grid[row, column * width : (column + 1) * width])
            next(waiting)(axes, history)
            _steps_below(axes, history)
    return figure


def _panels(history: History) -> list[Callable[[Axes, History], None]]:
    """What there is to draw, in reading order."""
    names = {name for entry in history for name, value in entry.items() if math.isfinite(value)}
    wanted: list[tuple[bool, Callable[[Axes, History], None]]] = [
        ("loss" in names, _loss),
        (any(_HIT.fullmatch(name) for name in names), _hits),
        ("temperature" in names, _temperature),
        ("gradient_norm" in names, _gradient_norm),
        (any(name.startswith(_SECONDS) for name in names), _time),
    ]
    return [draw for there, draw in wanted if there]


def _loss(axes: Axes, history: History) -> None:
    steps, values = _curve(history, "loss")
    _draw(axes, steps, values, _BLUE)
    lost = steps[~np.isfinite(values)]
    title = "loss"
    if len(lost):
        # on the axis itself: there is no height that would be true
        ticks: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(lost, np.zeros(len(lost)), "x", color=_RED, markersize=6, **ticks)
        title += f"  (\N{MULTIPLICATION SIGN} not finite in {len(lost)} {'step' if len(lost) == 1 else 'steps'})"
    _finish(axes, title)


def _temperature(axes: Axes, history: History) -> None:
    steps, values = _curve(history, "temperature")
    axes.plot(steps, values, color=_RED, lw=1.8, marker="o" if len(steps) < 2 else "")
    _finish(axes, "temperature")


def _gradient_norm(axes: Axes, history: History) -> None:
    _draw(axes, *_curve(history, "gradient_norm"), "#009E73")
    axes.set_ylim(bottom=0)
    _finish(axes, "gradient norm before clipping")


def _hits(axes: Axes, history: History) -> None:
    """A colour for each k, a dashed line for image to text."""
    found = {name for entry in history for name in entry if _HIT.fullmatch(name)}
    keys = sorted((int(name.rsplit("@", 1)[1]), name) for name in found)
    depths = sorted({k for k, _ in keys})
    for k, name in sorted(keys, key=lambda key: (key[0], not key[1].startswith("text"))):
        steps, values = _curve(history, name)
        label = f"hit@{k} {name.split('/')[0].replace('_to_', ' → ')}"
        axes.plot(
            steps,
            values,
            color=_HIT_COLOURS[depths.index(k) % len(_HIT_COLOURS)],
            linestyle="-" if name.startswith("text") else (0, (4, 2)),
            marker="o",
            markersize=3.5,
            lw=1.6,
            label=label,
        )
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axes)
    _finish(axes, "hit@k of evaluations")


def _time(axes: Axes, history: History) -> None:
    """Shares of the seconds of all parts, over bins of steps; the largest part at the bottom."""
    names = sorted({name for entry in history for name in entry if name.startswith(_SECONDS)})
    rows = [[max(0.0, entry.get(name, 0.0)) for name in names] for entry in history]
    seconds = np.nan_to_num(np.array(rows, dtype=np.float64))  # (steps, parts)
    totals = seconds.sum(0)
    order = np.argsort(-totals, kind="stable")
    size = -(-len(history) // _BINS)
    bins = [slice(start, start + size) for start in range(0, len(history), size)]
    sums = np.array([seconds[bin_].sum(0) for bin_ in bins])[:, order]  # (bins, parts)
    shares = sums / np.maximum(sums.sum(1, keepdims=True), 1e-12)
    edges = [history[bin_.start]["step"] - 1 for bin_ in bins] + [history[-1]["step"]]
    tops = np.cumsum(shares, axis=1)
    for place, part in enumerate(order):
        share = totals[part] / max(totals.sum(), 1e-12)
        shown = f"{share:.0%}" if share >= 0.005 else "<1%"
        axes.stairs(
            tops[:, place],
            edges,
            baseline=tops[:, place] - shares[:, place],
            fill=True,
            color=_PART_COLOURS[place % len(_PART_COLOURS)],
            label=f"{names[part].removeprefix(_SECONDS).replace('_', ' ')} {shown}",
        )
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axes)
    _finish(axes, "share of time")


def _curve(history: History, name: str) -> tuple[Floats, Floats]:
    """Steps that have a metric, and its values there."""
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    steps, values = np.array(points, dtype=np.float64).T
    return steps, values


def _draw(axes: Axes, steps: Floats, values: Floats, colour: str) -> None:
    """A curve; a long one pale, under its running mean."""
    long = len(steps) >= _SMOOTH_FROM
    marker = "o" if len(steps) < 2 else ""
    style: dict[str, Any] = {"lw": 0.8, "alpha": 0.35} if long else {"lw": 1.8, "marker": marker}
    axes.plot(steps, values, color=colour, **style)
    if long:
        axes.plot(steps, running_mean(values, len(values) // 40), color=colour, lw=1.8)


def running_mean(values: Floats, reach: int) -> Floats:
    """Mean of the finite values around each place: (points,) -> (points,), NaN where there is none.

    The window takes `reach` places to either side, near an end only as many as there are on both: so it stays centred,
    and a curve that falls is not drawn too low where it begins.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(places, places[::-1]))
    low, high = places - reaches, places + reaches + 1
    total = counts[high] - counts[low]
    return np.where(total > 0, (sums[high] - sums[low]) / np.maximum(total, 1), np.nan)


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.0, 1.03),
        frameon=False,
        reverse=True,  # what lies on top in the panel stands first
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1.6,
        borderaxespad=0.2,
    )


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    plain(axes)


def _steps_below(axes: Axes, history: History) -> None:
    """The same steps under every panel, so that they can be read across."""
    axes.set_xlabel("step", color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(axis="x", labelcolor=MUTED, color=LINE, labelsize=9)
    first, last = history[0]["step"], history[-1]["step"]
    margin = 0.02 * max(1.0, last - first)
    axes.set_xlim(min(first, last - 1) - margin, last + margin)
