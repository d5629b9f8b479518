"""The picture of the ablations: hit@1 of every row, over pairs scored, and by place of the right option."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.bench.ablations.subject import KINDS
from jobs.report.style import COLOURS, INK, LINE, MUTED

Result = Mapping[str, Any]
_COLOURS = dict(zip(KINDS, (COLOURS["slq"], COLOURS["slq_fine"]), strict=True))
_DIRECTIONS = {"image_to_text": "#009E73", "text_to_image": "#CC79A7"}


def write_chart(rows: Sequence[Result], target: Path) -> Path:
    """Draw a run into a PNG; the same rows always give the same bytes."""
    shown = [row for row in rows if "problem" not in row]
    sides = [row for row in shown if "position" in row["pairs"]]
    figure = Figure(figsize=(12.6, max(4.2, 1.4 + 0.28 * len(shown))))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1, wspace=0.04)
    layout: list[Any] = [["rows", "depth"], ["rows", "places" if sides else "depth"]]
    panels = figure.subplot_mosaic(layout, width_ratios=(3, 2))
    _all_rows(panels["rows"], shown)
    _depths(panels["depth"], [row for row in shown if _is_depth(row)])
    if sides:
        _places(panels["places"], sides[0], _default(shown))
    figure.savefig(target, dpi=144, metadata={"Software": None})
    return target


def _default(rows: Sequence[Result]) -> Result:
    return next(row for row in rows if row["name"] == "default")


def _is_depth(row: Result) -> bool:
    return row["name"] in ("coarse", "default") or row["group"] == "depth"


def _all_rows(axes: Axes, rows: Sequence[Result]) -> None:
    for place, row in enumerate(rows):
        for kind, shift in zip(KINDS, (-0.16, 0.16), strict=True):
            _point(axes, row["hits"][kind], place + shift, _COLOURS[kind])
    for kind in KINDS:
        value = 100 * _default(rows)["hits"][kind]["value"]
        axes.axvline(value, color=_COLOURS[kind], linewidth=0.8, linestyle=":")
        axes.plot([], [], "o", color=_COLOURS[kind], markersize=4.5, label=kind)
    axes.set_yticks(range(len(rows)), [row["says"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("hit@1 on the hard subset, %", color=MUTED)
    axes.set_title("every row, with 95% intervals", loc="left", fontsize=10.5, color=INK)
    axes.legend(frameon=False, fontsize=9.5, loc="lower left", bbox_to_anchor=(0.1, 0.1))
    _plain(axes)


def _places(axes: Axes, sides: Result, default: Result) -> None:
    """Choices within hard pairs: side by side by place of the right option, and one by one."""
    names = {"option_1": "right one first", "option_2": "right one second", "averaged": "averaged"}
    for direction, colour in _DIRECTIONS.items():
        shift = -0.12 if direction == next(iter(_DIRECTIONS)) else 0.12
        for place, name in enumerate(names):
            _point(axes, sides["pairs"]["position"][direction][name], place + shift, colour)
        _point(axes, default["pairs"][direction], len(names) + shift, colour)
        axes.plot([], [], "o", color=colour, markersize=4.5, label=direction.replace("_", " "))
    axes.axvline(50, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names) + 1), [*names.values(), "one by one"])
    axes.set_ylim(len(names) + 0.6, -0.6)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("right choices within hard pairs, %", color=MUTED)
    title = "two options side by side, and one by one"
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.legend(frameon=False, fontsize=9.5, loc="lower left")
    _plain(axes)


def _point(axes: Axes, told: Mapping[str, Any], place: float, colour: str) -> None:
    value, (low, high) = 100 * told["value"], (100 * end for end in told["interval"])
    style: dict[str, Any] = {"color": colour, "markersize": 4.5, "elinewidth": 1.3}
    reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
    axes.errorbar(value, place, xerr=reach, fmt="o", **style)


def _depths(axes: Axes, rows: Sequence[Result]) -> None:
    ordered = sorted(rows, key=lambda row: row["num_pairs"])
    num_queries = 2 * rows[0]["hits"][KINDS[0]]["n"]
    depths = [row["num_pairs"] // num_queries for row in ordered]
    for kind in KINDS:
        values = [100 * row["hits"][kind]["value"] for row in ordered]
        low, high = (
            [100 * row["hits"][kind]["interval"][end] for row in ordered] for end in (0, 1)
        )
        axes.fill_between(depths, low, high, color=_COLOURS[kind], alpha=0.15, lw=0)
        axes.plot(depths, values, "o-", color=_COLOURS[kind], markersize=4.5)
    axes.set_xscale("symlog", linthresh=5)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    axes.set_xlabel("pairs scored of a query (0: coarse alone)", color=MUTED)
    axes.set_ylabel("hit@1 on the hard subset, %", color=MUTED)
    axes.set_title("depth", loc="left", fontsize=10.5, color=INK)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelcolor=INK, labelsize=9, length=0)
