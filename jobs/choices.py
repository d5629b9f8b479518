"""What was tried for the goal of an index, as a table and as a picture."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pydantic import ByteSize
from rich.table import Table

from jobs.report.style import COLOURS, INK, LINE, MUTED

_SHOWN = 3
_COLOURS = ("#CC79A7", "#009E73", COLOURS["slq"], COLOURS["slq_fine"], "#E69F00", INK)


def best_trials(trials: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Of each kind of codes those that no other one of it beats in recall and latency, by recall."""
    for codes in dict.fromkeys(one["codes"] for one in trials):
        ours = [one for one in trials if one["codes"] == codes]
        best_yet = float("inf")
        kept = []
        for one in sorted(ours, key=lambda one: (-one["recall"], one["latency_ms"])):
            if one["latency_ms"] < best_yet:
                best_yet = one["latency_ms"]
                kept.append(one)
        yield from reversed(kept)


def choice_table(record: Mapping[str, Any]) -> Table:
    """The trials that are worth a look, and the chosen one marked; at the end what the whole index reached."""
    goal, chosen = record["goal"], record["chosen"]["name"]
    table = Table(
        title=f"trials on {record['sample_rows']:,} items", title_justify="left", box=None
    )
    for name in ("setting", f"recall@{goal['top_k']}", "ms alone", "queries/s", "memory"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for one in _near_goal(list(best_trials(record["trials"])), goal["recall"]):
        table.add_row(*_cells(one), style="bold green" if one["name"] == chosen else None)
    if "reached" in record:
        whole = {**record["chosen"], **record["reached"], "name": "the whole index"}
        table.add_section()
        table.add_row(*_cells(whole))
    return table


def _near_goal(trials: Sequence[Mapping[str, Any]], recall: float) -> Iterator[Mapping[str, Any]]:
    """Of each kind of codes the last that misses a recall, and the first ones that reach it."""
    for codes in dict.fromkeys(one["codes"] for one in trials):
        ours = [one for one in trials if one["codes"] == codes]
        missing = sum(one["recall"] < recall for one in ours)
        yield from ours[max(0, missing - 1) : missing + _SHOWN]


def _cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        one["name"],
        f"{one['recall']:.3f}",
        f"{one['latency_ms']:.2f}",
        f"{one['queries_per_s']:,.0f}",
        ByteSize(one["memory"]).human_readable(),
    )


def write_choice_chart(record: Mapping[str, Any], target: Path) -> Path:
    """Draw recall against latency, a line for each kind of codes, the goal as a corner, into a PNG."""
    figure = Figure(figsize=(6.4, 4))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    trials, goal, chosen = list(best_trials(record["trials"])), record["goal"], record["chosen"]
    kinds = list(dict.fromkeys(one["codes"] for one in trials))
    for codes, colour in zip(kinds, _COLOURS, strict=False):
        ours = [one for one in trials if one["codes"] == codes]
        label = f"{codes}, {ByteSize(ours[0]['memory']).human_readable()}"
        places = [[one[name] for one in ours] for name in ("recall", "latency_ms")]
        axes.plot(*places, "o-", color=colour, label=label, markersize=4)
    axes.axvline(goal["recall"], color=MUTED, linestyle=":", linewidth=1)
    if goal["latency_ms"] is not None:
        axes.axhline(goal["latency_ms"], color=MUTED, linestyle=":", linewidth=1)
    place = (chosen["recall"], chosen["latency_ms"])
    axes.plot(*place, "o", markersize=12, markerfacecolor="none", color=INK, label="chosen")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"recall@{goal['top_k']} of {record['num_queries']} text queries", color=MUTED)
    axes.set_ylabel("ms of a query alone", color=MUTED)
    title = f"Settings tried on {record['sample_rows']:,} items"
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.grid(color=LINE, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelcolor=MUTED, labelsize=9)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(target, dpi=144, metadata={"Software": None})
    return target
