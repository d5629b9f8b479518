"""The metrics that a benchmark's papers report, as a table for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from jobs.results import SYSTEM_NAMES
from slq.benchmarks.contract import EVERY_KIND


def headline_table(results: dict[str, Any]) -> Table | None:
    """Headline metrics of every system (column) by kind of query and by group; None of users' own data."""
    facts = results.get("benchmark")
    if facts is None:
        return None
    title = f"{facts['name']} ({facts['split']}), {facts['direction']}, in %"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("queries")
    table.add_column("metric")
    systems = results["systems"]
    for system in systems:
        table.add_column(escape(SYSTEM_NAMES.get(system, system)), justify="right")
    for name, metric, entries in _rows(facts, list(systems.values())):
        table.add_row(escape(name), metric, *[_cell(entry, metric) for entry in entries])
    return table


def _rows(
    facts: Mapping[str, Any], systems: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str, list[Mapping[str, Any]]]]:
    """(kind or group, metric, each system's numbers)."""
    headline = facts["headline"]
    others = headline.get(EVERY_KIND, [])
    for kind in systems[0]["text_to_image"]:
        for metric in headline.get(kind, others):
            yield kind, metric, [system["text_to_image"][kind] for system in systems]
    for group in systems[0].get("groups", {}):
        for metric in others:
            yield f"mean of {group}", metric, [system["groups"][group] for system in systems]


def _cell(entry: Mapping[str, Any], metric: str) -> str:
    return f"{100 * entry[metric]:.1f}"
