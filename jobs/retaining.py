"""`slq retention`: which of the backbone's own abilities are left with an adapter loaded."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from jobs.console import AsJson, DryRun, Overrides, RecipePath, out, run_stage
from pipelines.recipe import Recipe

EXAMPLE = (
    "Example: slq retention jobs/recipes/demo.yaml --set retention.scenes=128 "
    "--set retention.realworldqa.dir=/data/RealworldQA"
)


def retention(
    recipe: RecipePath,
    adapter: Annotated[
        Path | None,
        typer.Option(help="adapter folder; the run folder's if there is one, else none is loaded"),
    ] = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Ask the backbone MMMU, RealWorldQA, OCRBench and scenes, without and with an adapter; run it again to go on."""
    from pipelines.retention import measure_retention
    from pipelines.retention import plan as facts

    def stage(resolved: Recipe) -> dict[str, Any]:
        from pipelines.retaining.outcome import identity_lines, left_out_lines, score_lines

        result = measure_retention(resolved, adapter)
        if not as_json:
            out.print(retention_table(result))
            reports = result["plain"]["sets"].values()
            for line in (
                *score_lines(result),
                *identity_lines(result),
                *(x for one in reports for x in left_out_lines(one)),
            ):
                out.print(line, markup=False, highlight=False, soft_wrap=True)
            place = resolved.storage.dir / "retention" / "retention.md"
            out.print(f"by subject and type: {place}", highlight=False, soft_wrap=True)
        return result

    def plan(resolved: Recipe) -> dict[str, Any]:
        return {"plan": facts(resolved, adapter)}

    run_stage(recipe, overrides, dry_run=dry_run, as_json=as_json, stage=stage, plan=plan)


def retention_table(result: Mapping[str, Any]) -> Table:
    """The abilities, a row each, without and with the adapter."""
    from pipelines.retaining.outcome import ability_rows

    table = Table(title="right answers in % (95% interval)", title_justify="left")
    table.add_column("ability")
    right = partial(table.add_column, justify="right")
    right("n")
    right("backbone")
    if result["adapter"] is not None:
        right("with the adapter")
        right("same answers")
    for cells in ability_rows(result):
        table.add_row(*cells)
    return table
