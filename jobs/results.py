"""An evaluation's results: read from a run folder, and as a table for the terminal."""

from datetime import UTC, datetime
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipelines.recipe import Recipe
from slq.errors import DataError
from slq.files import read_json

SYSTEM_NAMES = {
    "last_token": "zero-shot last token",
    "untrained": "zero-shot untrained latents",
    "slq": "SLQ (trained)",
    "slq_fine": "SLQ + fine stage",
    "slq_index": "SLQ through the index",
}


def results_table(results: dict[str, Any]) -> Table:
    """hit@1 of every system (column) on every text-to-image subset (row), with 95% intervals."""
    systems = results["systems"]
    entry = next(iter(next(iter(systems.values()))["text_to_image"].values()))
    depth = min(int(name[4:]) for name in entry if name.startswith("hit@") and "_" not in name)
    metric = f"hit@{depth}"
    table = Table(title=f"text -> image, {metric} in % (95% interval)", title_justify="left")
    table.add_column("queries")
    table.add_column("n", justify="right")
    for system in systems:
        table.add_column(escape(SYSTEM_NAMES.get(system, system)), justify="right")
    first = next(iter(systems.values()))["text_to_image"]
    for name in first:
        entries = [report["text_to_image"][name] for report in systems.values()]
        count = str(first[name]["num_queries"])
        table.add_row(escape(name), count, *[_cell(entry, metric) for entry in entries])
    return table


def _cell(entry: dict[str, Any], metric: str) -> str:
    low, high = entry[f"{metric}_interval"]
    return f"{100 * entry[metric]:.1f} [dim]({100 * low:.1f}-{100 * high:.1f})[/]"


def read_results(recipe: Recipe) -> dict[str, Any]:
    """The results of the last evaluation, systems in the order people read them.

    Raises:
        DataError: There are none.
    """
    path = recipe.storage.evaluation / "results.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist; run `slq eval` before the report")
    results: dict[str, Any] = read_json(path)
    order = [*SYSTEM_NAMES, *results["systems"]]  # the file sorts its keys
    systems = {name: results["systems"][name] for name in order if name in results["systems"]}
    measured = datetime.fromtimestamp(path.stat().st_mtime, tz=UTC)
    return {**results, "systems": systems, "measured": f"{measured:%Y-%m-%d %H:%M} UTC"}
