"""The picture of a benchmark's making: what is left after each stage, and which knowledge its rows ask for."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.report.style import COLOURS, INK, LINE, MUTED
from slq.karr.categories import CATEGORIES

_STAGES = {
    "source": "usable source",
    "choose": "target chosen",
    "rewrite": "worded anew",
    "check": "words checked",
    "identify": "identifies its image",
    "judge": "judges accept",
    "review": "after the review",
    "export": "benchmark",
}
_LINE_LETTERS = 48  # of the reasons beside a bar, on two lines at most


def write_funnel_plot(result: Mapping[str, Any], target: Path) -> Path:
    """Draw a run's funnel and categories into a PNG; the same numbers always give the same bytes."""
    funnel_figure(result).savefig(target, dpi=144, metadata={"Software": None})
    return target


def funnel_figure(result: Mapping[str, Any]) -> Figure:
    """Horizontal bars: captions left by stage, and shares of the categories beside those of the paper."""
    figure = Figure(figsize=(13, 4.2))
    figure.set_layout_engine("constrained", wspace=0.03, w_pad=0.08, h_pad=0.08)
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    _funnel(left, result)
    _categories(right, result)
    return figure


def _funnel(axes: Axes, result: Mapping[str, Any]) -> None:
    funnel, total = result["funnel"], max(1, result["funnel"]["num_in"])
    bars = [("captions read", funnel["num_in"], "")]
    bars += [
        (_STAGES[stage["stage"]], stage["num_out"], _reasons(stage, result["notes"]))
        for stage in funnel["stages"]
    ]
    last = len(bars) - 1
    for place, (_, count, told) in enumerate(bars):
        colour = COLOURS["slq_fine"] if place == last else COLOURS["slq"]
        axes.barh(place, count, height=0.66, color=colour, alpha=1 if place in (0, last) else 0.75)
        axes.annotate(
            f"{count:,}",
            (count, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
        if told:
            axes.annotate(
                told,
                (total * 1.24, place),
                va="center",
                fontsize=7.8,
                color=MUTED,
                annotation_clip=False,
            )
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.set_ylim(last + 0.6, -0.6)
    axes.set_xlim(0, total * 2.3)
    axes.set_xticks([])
    axes.set_title(
        "Captions left after each stage, and why others went", loc="left", fontsize=10.5, color=INK
    )
    _plain(axes)


def _reasons(stage: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """The reasons of a stage with their numbers, most frequent first; or that nothing was checked."""
    found = sorted(
        ((count, name) for name, count in stage["rejected"].items() if count), reverse=True
    )
    told = ", ".join(f"{count:,} {name.replace('_', ' ')}" for count, name in found)
    if told:
        told = f"\N{MINUS SIGN} {told}"
    elif stage["stage"] in ("identify", "judge") and stage["stage"] in notes:
        told = "not checked"
    return "\n".join(textwrap.wrap(told, _LINE_LETTERS, max_lines=2, placeholder=" ..."))


def _categories(axes: Axes, result: Mapping[str, Any]) -> None:
    found = result["categories"]
    for place, (name, one) in enumerate(CATEGORIES.items()):
        share, paper = 100 * found[name]["share"], 100 * one.paper_share
        axes.barh(place, share, height=0.66, color=COLOURS["slq_index"])
        label = None if place else "KARR-Bench of the paper"
        line: dict[str, Any] = {"color": INK, "linewidth": 1.6}
        axes.plot([paper, paper], [place - 0.42, place + 0.42], label=label, **line)
        axes.annotate(
            f"{share:.1f}%", (max(share, paper), place), (6, 0), textcoords="offset points", va="center",
            fontsize=9, color=INK,
        )  # fmt: skip
    axes.set_yticks(range(len(CATEGORIES)), [one.title for one in CATEGORIES.values()])
    axes.set_ylim(len(CATEGORIES) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(25.0, *(100 * one["share"] for one in found.values())))
    rows = result["funnel"]["num_out"]
    title = f"Categories of {rows:,} rows in %"
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    beside_title: dict[str, Any] = {
        "loc": "lower right",
        "bbox_to_anchor": (1.0, 0.99),
        "borderpad": 0.2,
    }
    axes.legend(**beside_title, frameon=False, fontsize=8.5, labelcolor=MUTED, handlelength=1.2)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("#9aa5b1")
    axes.tick_params(axis="x", length=0, labelcolor=MUTED, labelsize=9)
    axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9.5)
