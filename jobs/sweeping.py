"""`slq sweep` on the command line: the table for a terminal and as Markdown, and the plot."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from jobs.console import AsJson, DryRun, Overrides, RecipePath, out, run_stage
from pipelines.recipe import Recipe

EXAMPLE = "Example: slq sweep jobs/recipes/demo.yaml --set sweep.dimensions=[48,96,192] --price 0.5"
PLOT, MARKDOWN = "sweep.png", "sweep.md"
_MOST_ROWS = 40
_SHOWN = ("cell", "hit@1", "recall@10", "search ms", "B/vector", "per million", "front")


def sweep(
    recipe: RecipePath,
    overrides: Overrides = None,
    price: Annotated[
        float, typer.Option(min=0, help="of one machine for one hour, in any currency")
    ] = 2.5,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Measure what dimension, precision, index and re-ranking depth cost and find; run it again to go on."""
    from jobs.report.sweep_plot import write_sweep_plot
    from pipelines.sweep import plan as facts
    from pipelines.sweep import sweep as run

    def stage(resolved: Recipe) -> dict[str, Any]:
        result = run(resolved, price=price)
        folder = resolved.storage.sweep
        (folder / MARKDOWN).write_text(sweep_markdown(result), encoding="utf-8")
        picture = write_sweep_plot(result, folder / PLOT)
        if not as_json:
            out.print(sweep_table(result))
            for line in notes(result):
                out.print(line, markup=False, highlight=False, soft_wrap=True)
            out.print(f"picture: {picture}", markup=False, highlight=False, soft_wrap=True)
        return result

    def plan(resolved: Recipe) -> dict[str, Any]:
        return {"plan": facts(resolved)}

    run_stage(recipe, overrides, dry_run=dry_run, as_json=as_json, stage=stage, plan=plan)


def columns(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """The table as text, column by column."""
    from jobs.planning import amount

    rows = result["cells"]
    found: dict[str, list[str]] = {"cell": [row["name"] for row in rows]}
    for name in ("hit@1", "hit@5", "hit@10", "recall@10"):
        found[name] = [_percent(row, name) for row in rows]
    found["search ms"] = [f"{row['search_ms']:.3f}" for row in rows]
    found["x exact"] = [f"{row['search_ms'] / row['exact_ms']:.2f}" for row in rows]
    found["fine ms"] = [f"{row['fine_ms']:.1f}" if row["depth"] else "" for row in rows]
    found["B/vector"] = [f"{row['bytes_per_vector']:,}" for row in rows]
    found["index"] = [amount(row["index_bytes"]) for row in rows]
    found["per million"] = [f"{row['cost_per_million']:.2f}" for row in rows]
    found["front"] = [_front(row) for row in rows]
    return found


def _percent(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{100 * row[name]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _front(row: Mapping[str, Any]) -> str:
    names = {"time": row["on_latency_front"], "bytes": row["on_bytes_front"]}
    return ", ".join(name for name, is_on in names.items() if is_on)


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the table needs to be read rightly."""
    first = result["cells"][0]
    return [
        f"hit@k and recall@10 in % with 95% bootstrap intervals over {result['num_queries']:,} queries, of "
        f"{result['num_items']:,} items; recall@10 is of the coarse ranking, against exact search of whole float32 "
        "vectors.",
        f"Milliseconds are medians of one query alone: search with {result['search_threads']} thread(s), in turns with "
        f"exact search ('x exact' is their ratio); embedding a query takes {first['embed_ms']:.1f} ms in every cell, "
        f"with {result['model_threads']} thread(s), as the fine stage has.",
        f"Per million queries at {result['price_per_hour']:g} per machine hour: {result['formula']}.",
        "Front: no other row finds more at hit@1 in as little time (to two digits), or with as few bytes per vector.",
    ]


def sweep_table(result: Mapping[str, Any]) -> Table:
    """The table for a terminal: all rows, or of many those on a front; intervals and the rest stand in the files."""
    found = columns(result)
    is_long = len(found["cell"]) > _MOST_ROWS
    shown = {name: cells for name, cells in found.items() if name in _SHOWN}
    title = f"on a front, of {len(found['cell'])} rows (all in {MARKDOWN})" if is_long else None
    table = Table(title=title, title_justify="left", box=None)
    for name in shown:
        side: Any = "left" if name in ("cell", "front") else "right"
        table.add_column(name, justify=side, no_wrap=name == "cell", overflow="fold")
    for row in zip(*shown.values(), strict=True):
        if row[-1] or not is_long:
            table.add_row(*(escape(cell.partition(" (")[0]) for cell in row))
    return table


def sweep_markdown(result: Mapping[str, Any]) -> str:
    """The whole table and its notes, to paste into a README."""
    found = columns(result)
    rules = ["---" if name in ("cell", "front") else "---:" for name in found]
    rows = [list(found), rules, *(list(cells) for cells in zip(*found.values(), strict=True))]
    lines = ["| " + " | ".join(one.replace("|", "\\|") for one in row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(result)), ""])
