"""The report's tables: metrics by subset and system, and seconds by stage."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.report.style import COLOURS, MUTED
from jobs.results import SYSTEM_NAMES


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell: a number, a small line below it, and whether it is the best of its row."""

    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Metrics by subset.

    Attributes:
        groups: Metric names, each spanning one column per system.
        columns: System names, repeated for each group.
        rows: Subset name, its number of queries, and the cells.
        has_change: Whether a last column compares the fine stage with the coarse one.
    """

    groups: list[str]
    columns: list[str]
    rows: list[tuple[str, int, list[Cell]]]
    has_change: bool = False


def metric_context(results: Mapping[str, Any]) -> dict[str, Any]:
    """The depths that were measured, the chance level, and the three tables."""
    systems = list(results["systems"])
    # The fine stage and an index are asked by text only.
    coarse = [name for name in systems if "image_to_text" in results["systems"][name]]
    depths = hit_depths(results)
    return {
        "depths": depths,
        "chance": f"{100 * depths[0] / results['num_items']:.1f}",
        "first": metrics_table(results, "text_to_image", systems, depths[:1]),
        "deeper": metrics_table(results, "text_to_image", systems, depths[1:])
        if len(depths) > 1
        else None,
        "reverse": metrics_table(results, "image_to_text", coarse, depths) if coarse else None,
    }


def hit_depths(results: Mapping[str, Any]) -> list[int]:
    """The k of every hit@k in the results, ascending."""
    report = next(iter(results["systems"].values()))["text_to_image"]
    names = next(iter(report.values()))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"hit@(\d+)", name)))


def metrics_table(
    results: Mapping[str, Any], direction: str, systems: Sequence[str], depths: Sequence[int]
) -> Table:
    """hit@k of systems (columns) on subsets (rows), the best of each row marked.

    The table of hit@1 alone also compares the fine stage with the coarse one, where both ran.
    """
    p_values = results.get("fine_against_coarse_p") or {}
    has_change = bool(p_values) and list(depths) == [1] and {"slq", "slq_fine"} <= set(systems)
    reports = {name: results["systems"][name][direction] for name in systems}
    rows = []
    for subset, entry in next(iter(reports.values())).items():
        entries = [reports[name][subset] for name in systems]
        cells = [cell for k in depths for cell in _cells(entries, f"hit@{k}")]
        if has_change:
            change = reports["slq_fine"][subset]["hit@1"] - reports["slq"][subset]["hit@1"]
            cells.append(Cell(signed(100 * change, 1), p_text(p_values[subset])))
        rows.append((subset, int(entry["num_queries"]), cells))
    names = [SYSTEM_NAMES.get(name, name) for name in systems]
    return Table([f"hit@{k}" for k in depths], names * len(depths), rows, has_change)


def _cells(entries: Sequence[Mapping[str, Any]], metric: str) -> list[Cell]:
    best = max(entry[metric] for entry in entries)
    cells = []
    for entry in entries:
        low, high = entry[f"{metric}_interval"]
        note = f"{100 * low:.1f}\N{EN DASH}{100 * high:.1f}"
        cells.append(Cell(f"{100 * entry[metric]:.1f}", note, best=entry[metric] == best))
    return cells


def p_text(value: float) -> str:
    """A p-value as papers print it."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def signed(value: float, digits: int) -> str:
    """A number with its sign, a true minus sign included."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def headline(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The first subset's first metric of every system."""
    metric = f"hit@{hit_depths(results)[0]}"
    rows = []
    for name, report in results["systems"].items():
        entry = next(iter(report["text_to_image"].values()))
        colour = COLOURS.get(name, MUTED)
        value = f"{100 * entry[metric]:.1f}"
        rows.append({"name": SYSTEM_NAMES.get(name, name), "colour": colour, "value": value})
    return rows


def timing_rows(timings: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Stage, seconds, and the share of the longest stage in percent."""
    longest = max(timings.values(), default=0.0) or 1.0
    return [(name, seconds, 100 * seconds / longest) for name, seconds in timings.items()]
