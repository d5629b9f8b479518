"""`slq diff` on the command line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from jobs.console import AsJson, DryRun, Overrides, friendly_errors, out
from jobs.results import SYSTEM_NAMES
from slq.errors import ConfigError, StorageError

EXAMPLE = (
    "Example: slq diff runs/demo/eval/run_slq.parquet runs/demo/eval/run_slq_fine.parquet "
    "--data jobs/recipes/demo.yaml --out diff.html"
)


def diff(  # noqa: PLR0913 - the options of a command line
    run_a: Annotated[Path, typer.Argument(help="a run, Parquet (as `slq eval` writes) or TREC")],
    run_b: Annotated[Path, typer.Argument(help="the run that is compared with it")],
    data: Annotated[Path, typer.Option(help="YAML recipe of their queries, items and relevance")],
    page: Annotated[Path, typer.Option("--out", help="the HTML file")],
    overrides: Overrides = None,
    name_a: Annotated[str | None, typer.Option(help="of the first system, for the page")] = None,
    name_b: Annotated[str | None, typer.Option(help="of the second system")] = None,
    limit: Annotated[int, typer.Option(min=1, help="queries shown, won and lost each")] = 40,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Show which queries one system answers better than another, side by side, in one HTML file."""
    from jobs.report.diff_page import write_diff
    from pipelines.difference import compare_runs, summary
    from pipelines.recipe import load_recipe
    from slq import log

    log.configure()
    with friendly_errors():
        recipe = load_recipe(data, overrides)
        if page.is_dir():
            raise ConfigError(
                f"--out {page} is a folder; name a file, such as {page / 'diff.html'}"
            )
        found = compare_runs(recipe, run_a, run_b)
        names = (name_a or run_name(run_a, run_b), name_b or run_name(run_b, run_a))
        told = summary(found)
        if not dry_run:
            try:
                page.parent.mkdir(parents=True, exist_ok=True)
                write_diff(recipe, found, names, page, limit=limit)
            except OSError as error:
                raise StorageError(
                    f"{page} cannot be written: {error}; free space or choose another --out"
                ) from None
    if as_json:
        print(json.dumps(result(found, names, told)))
        return
    out.print(diff_table(names, told))
    for text in left_out(found.left_out, names):
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    out.print(
        "nothing written" if dry_run else f"[green]done[/] {escape(str(page))}", soft_wrap=True
    )


def run_name(path: Path, other: Path) -> str:
    """A system's name by its run file; with the folder where both files are called alike."""
    stem = path.stem.removeprefix("run_").replace(".variant.", ":").replace(".cut.", "@")
    name = SYSTEM_NAMES.get(stem, stem)
    if path.name != other.name:
        return name
    folder = path.resolve().parent
    run = folder.parent if folder.name == "eval" else folder
    return f"{name} ({run.name})"


def result(found: Any, names: tuple[str, str], told: Mapping[str, Any]) -> dict[str, Any]:
    """Everything as plain data: the summary, and both ranks of every query, what changed most first."""
    return {
        "systems": list(names),
        "summary": dict(told),
        "left_out": found.left_out,
        "queries": [
            {
                "query_id": one.query_id,
                "ranks": [one.first, one.second],
                "depths": list(one.depths),
                "outcome": one.outcome,
            }
            for one in found.changes
        ],
    }


def left_out(counts: Mapping[str, int], names: tuple[str, str]) -> list[str]:
    """Which queries were not compared, in words."""
    words = {
        "first only": f"only in the run of {names[0]}",
        "second only": f"only in the run of {names[1]}",
        "not judged": "in both runs, and not judged",
    }
    return [
        f"{counts[key]:,} queries are {text}: left out"
        for key, text in words.items()
        if counts[key]
    ]


def diff_table(names: tuple[str, str], told: Mapping[str, Any]) -> Table:
    """The summary for a terminal."""
    from jobs.report.tables import p_text

    title = escape(f"{names[1]} (B) against {names[0]} (A)")
    table = Table(title=title, title_justify="left", box=None)
    for name in ("queries", "n", "won", "lost", "same", "hit@1 A", "hit@1 B", "p"):
        table.add_column(name, justify="left" if name == "queries" else "right")
    for name, one in told.items():
        counts = [f"{one[key]:,}" for key in ("num_queries", "won", "lost", "same")]
        hits = [f"{100 * value:.1f}" for value in one["hit@1"]]
        table.add_row(escape(name), *counts, *hits, p_text(one["hit@1_p"]))
    return table
