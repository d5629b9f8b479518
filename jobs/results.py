"""The table of an evaluation, as a terminal shows it."""

from typing import Any

from rich.table import Table

SYSTEM_NAMES = {
    "last_token": "zero-shot last token",
    "untrained": "zero-shot untrained latents",
    "slq": "SLQ (trained)",
    "slq_fine": "SLQ + fine stage",
}


def results_table(results: dict[str, Any]) -> Table:
    """hit@1 of every system (column) on every text-to-image subset (row), with 95% intervals."""
    systems = results["systems"]
    table = Table(title="text -> image, hit@1 in % (95% interval)", title_justify="left")
    table.add_column("queries")
    table.add_column("n", justify="right")
    for system in systems:
        table.add_column(SYSTEM_NAMES.get(system, system), justify="right")
    first = next(iter(systems.values()))["text_to_image"]
    for name in first:
        entries = [report["text_to_image"][name] for report in systems.values()]
        table.add_row(name, str(first[name]["num_queries"]), *[_cell(entry) for entry in entries])
    return table


def _cell(entry: dict[str, Any]) -> str:
    low, high = entry["hit@1_interval"]
    return f"{100 * entry['hit@1']:.1f} [dim]({100 * low:.1f}-{100 * high:.1f})[/]"
