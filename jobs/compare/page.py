"""A study as one HTML file: every figure of its tables, its charts, and what it was measured with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.compare.chart import category_figure, study_figure
from jobs.compare.papers import published_columns
from jobs.compare.study import ZERO_SHOT
from jobs.compare.tables import KEPT, LEGEND, category_columns, columns, is_quality
from jobs.report import template
from jobs.report.charts import svg
from jobs.report.evaluation import measured_with
from jobs.report.tables import Cell


@dataclass(frozen=True, slots=True)
class Figures:
    """A table of the page.

    Attributes:
        head: Names of columns.
        rows: Name and cells of each row.
    """

    head: list[str]
    rows: list[tuple[str, list[Cell]]]


def write_study_page(summary: Mapping[str, Any], target: Path) -> Path:
    """Write the page; it asks for no other file and runs no script.

    Args:
        summary: As of `study_summary`.
        target: Where to.
    """
    rows = summary["rows"]
    found, by_category = columns(rows), category_columns(rows)
    first = summary["results"][ZERO_SHOT]["results"]
    papers = published_columns(summary["results"])
    page = template("study.html.j2").render(
        study=summary["study"].removesuffix(".yaml"),
        baseline=summary["baseline"],
        num_systems=len(rows),
        num_queries=first.get("num_queries", 0),
        num_items=first.get("num_items", 0),
        chart=svg(study_figure(rows)),
        quality=_figures({k: v for k, v in found.items() if is_quality(k)}, found["run"]),
        tested=any(name.startswith("p, ") for name in found),
        categories=_figures(by_category, found["run"]) if by_category else None,
        category_chart=svg(category_figure(rows)) if by_category else None,
        cost=_figures({k: v for k, v in found.items() if not is_quality(k)}, found["run"]),
        papers=_figures(papers, papers["published"]) if papers else None,
        legend=" ".join([LEGEND[1], *([KEPT] if "weights" in found else [])]),
        direction=(first.get("benchmark") or {}).get(
            "direction", "text \N{RIGHTWARDS ARROW} image"
        ),
        measured=[*measured_with(first), *_elsewhere(summary["results"])],
        notes=summary["notes"],
    )
    target.write_text(page, encoding="utf-8")
    return target


def _elsewhere(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Runs that were measured on another machine, revision or day than the first one, and on which."""

    def told(run: str) -> str:
        known = results[run]["results"].get("provenance", {})
        machine = known.get("hardware", {})
        parts = [known.get("date", "")[:10], (known.get("git_revision") or "")[:12]]
        return ", ".join(
            part for part in [*parts, machine.get("cpu", ""), *machine.get("gpus", [])] if part
        )

    first = told(ZERO_SHOT)
    others = [(run, told(run)) for run in results]
    return [[f"measured apart: {run}", what] for run, what in others if what and what != first]


def _figures(found: Mapping[str, Sequence[str]], names: Sequence[str]) -> Figures | None:
    """Columns as rows of cells, an interval below its value; the best value of a column is marked."""
    shown = {name: cells for name, cells in found.items() if name not in ("run", "published")}
    if not shown:
        return None
    made = {name: [_cell(cell) for cell in cells] for name, cells in shown.items()}
    for name, cells in made.items():
        if "(n = " in name:
            best = max(float(cell.text) for cell in cells if cell.text)
            made[name] = [
                Cell(cell.text, cell.note, best=bool(cell.text) and float(cell.text) == best)
                for cell in cells
            ]
    rows = [[cells[n] for cells in made.values()] for n in range(len(names))]
    return Figures(["system", *shown], list(zip(names, rows, strict=True)))


def _cell(text: str) -> Cell:
    value, _, note = text.partition(" (")
    return Cell(value, note.removesuffix(")"))
