"""What `slq rerank` shows of its result."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from jobs.report.rerank_plot import write_rerank_plot

_PLOT = "rerank.png"


def rerank_table(result: Mapping[str, Any]) -> Table:
    """hit@k of each order (row) over all judged queries, and over those that nothing was fitted to.

    Args:
        result: As `pipelines.rerank.rerank` returned it, with judged queries.
    """
    systems = result["systems"]
    ks = sorted(
        int(name[4:])
        for name in next(iter(systems.values()))
        if name.startswith("hit@") and "_" not in name
    )
    table = Table(title="hit@k in % (95% interval)", title_justify="left")
    table.add_column("order")
    table.add_column("queries", justify="right")
    for k in ks:
        table.add_column(f"hit@{k}", justify="right")
    table.add_column("MRR", justify="right")
    _rows(table, systems, ks)
    if "held_out" in result:
        table.add_section()
        _rows(table, result["held_out"]["systems"], ks)
        table.caption = "below the line: queries that nothing was fitted to"
        table.caption_justify = "left"
    return table


def _rows(table: Table, systems: Mapping[str, Any], ks: list[int]) -> None:
    for name, entry in systems.items():
        cells = []
        for k in ks:
            low, high = entry[f"hit@{k}_interval"]
            cells.append(
                f"{100 * entry[f'hit@{k}']:.1f} [dim]({100 * low:.1f}-{100 * high:.1f})[/]"
            )
        table.add_row(name, f"{entry['num_queries']:,}", *cells, f"{entry['mrr']:.3f}")


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """What was scored, what could not be, and how far probabilities hold."""
    lines = [
        f"{result['scored']:,} pairs scored, {result['unscored']:,} could not be, "
        f"{result['doubtful']:,} doubtful (label mass below 0.5); "
        f"{result['scored_per_query']:g} of {result['candidates'] / result['queries']:.1f} candidates a query"
    ]
    missing = result.get("judged_without_candidates", 0)
    if missing:
        lines.append(
            f"{missing:,} judged queries have no candidates in the run, and are not counted"
        )
    if "not_calibrated" in result:
        lines.append(f"not calibrated: {result['not_calibrated']}")
    found = result.get("held_out", {}).get("calibration")
    if found:
        error = found["expected_calibration_error"]
        lines.append(
            f"temperature {found['temperature']:.2f}: expected calibration error {100 * error['before']:.1f}% -> "
            f"{100 * error['after']:.1f}%; a unit of coarse score is worth {found['coarse_weight']:.2f} nats"
        )
        if found["threshold"] is not None and found["precision_reached"] is not None:
            lines.append(
                f"margins of {found['threshold']:.2f} and more: {100 * found['precision_reached']:.1f}% matches "
                f"({100 * found['precision_asked']:.0f}% asked), {100 * found['share_above_threshold']:.1f}% of pairs"
            )
    return lines


def draw(result: Mapping[str, Any]) -> Path | None:
    """The picture beside the output, where that is a local folder and queries were judged."""
    folder = result["folder"]
    return None if "://" in folder else write_rerank_plot(result, Path(folder) / _PLOT)
