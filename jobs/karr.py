"""`slq karr` on the command line: what it shows, and the pictures and pages beside its output."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from jobs.console import AsJson, DryRun, Overrides, RecipePath, out, run_stage
from pipelines.recipe import Recipe


def karr(
    recipe: RecipePath,
    overrides: Overrides = None,
    retry_errors: Annotated[
        bool,
        typer.Option(
            "--retry-errors", help="make shards again with captions without an answer or an image"
        ),
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Build a knowledge-aware retrieval benchmark from captioned images; run it again to go on, or after a review."""
    from jobs.report.karr_plot import write_funnel_plot
    from jobs.report.karr_review import write_review_pages
    from pipelines.karr.build import karr as build
    from pipelines.karr.build import plan as facts

    def stage(resolved: Recipe) -> dict[str, Any]:
        result = build(resolved, retry_errors=retry_errors)
        picture = write_funnel_plot(result, Path(result["folder"]) / "funnel.png")
        pages = write_review_pages(resolved, Path(result["review"]))
        if not as_json:
            out.print(funnel_table(result))
            for line in summary_lines(result):
                out.print(line, markup=False, highlight=False, soft_wrap=True)
            out.print(f"picture: {picture}", highlight=False, soft_wrap=True)
            for page in pages:
                out.print(f"review: {page}", highlight=False, soft_wrap=True)
            out.print(f"benchmark: {result['benchmark']}", highlight=False, soft_wrap=True)
        return result

    def plan(resolved: Recipe) -> dict[str, Any]:
        return {"plan": facts(resolved)}

    run_stage(recipe, overrides, dry_run=dry_run, as_json=as_json, stage=stage, plan=plan)


def funnel_table(result: Mapping[str, Any]) -> Table:
    """Captions after each stage, and why others went."""
    table = Table(title="from captions to rows", title_justify="left")
    table.add_column("stage")
    table.add_column("left", justify="right")
    table.add_column("rejected")
    funnel = result["funnel"]
    table.add_row("read", f"{funnel['num_in']:,}", "")
    for stage in funnel["stages"]:
        reasons = [f"{count:,} {name}" for name, count in stage["rejected"].items() if count]
        table.add_row(stage["stage"], f"{stage['num_out']:,}", ", ".join(reasons))
    return table


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """Categories, agreement, what it cost, and what was not checked."""
    shares = ", ".join(
        f"{name} {100 * found['share']:.1f}%" for name, found in result["categories"].items()
    )
    lines = [f"categories: {shares}"]
    for who, found in result["agreement"].items():
        if found["rows_with_two_votes"]:
            numbers = [
                f"{title} {found[name]:.3f}"
                for name, title in (
                    ("percent_agreement", "percent agreement"),
                    ("fleiss_kappa", "Fleiss' kappa"),
                    ("krippendorff_alpha", "Krippendorff's alpha"),
                )
                if found[name] is not None
            ]
            lines.append(
                f"{found['judges']} {who} on {found['rows']:,} candidates: {', '.join(numbers)}"
            )
    cost = result["cost"]
    if cost["answers_asked"] or cost["answers_kept"]:
        lines.append(
            f"answers: {cost['answers_asked']:,} asked for, {cost['answers_kept']:,} kept from before"
        )
    return lines + [f"{stage}: {note}" for stage, note in result["notes"].items()]
