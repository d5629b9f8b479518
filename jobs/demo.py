"""`slq demo`: every stage in order on the shipped scenes, then a real server and real queries."""

import json
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.table import Table

from jobs.console import command_line, out
from jobs.report import write_report
from jobs.report.picture import gallery_picture
from jobs.results import results_table
from jobs.searching import Question, search_url
from pipelines.recipe import Recipe, load_recipe
from slq.benchmarks.scenes import write_scenes

_NUM_QUERIES = 10


def demo_recipe(path: Path, out_dir: Path, overrides: list[str] | None) -> Recipe:
    """The demo recipe with every output below `out_dir`."""
    folders = {"storage.dir": out_dir, "data.dir": out_dir / "data"}
    places = [f"{key}={json.dumps(str(folder))}" for key, folder in folders.items()]
    return load_recipe(path, [*places, *(overrides or [])])


def run_demo(recipe: Recipe) -> None:
    """Run all stages; raises slq errors from any of them."""
    from pipelines.runtime import connect

    timings: dict[str, float] = {}
    _stage(timings, "scenes", lambda: _make_scenes(recipe))
    started = time.monotonic()
    with connect(recipe.resources):
        timings["start Ray"] = time.monotonic() - started
        for name, stage in _flows(recipe).items():
            _stage(timings, name, stage)
        results = _stage(timings, "eval", lambda: _evaluate(recipe))
        out.print(results_table(results))
        _stage(timings, "serve", lambda: _serve_and_query(recipe))
    report = write_report(recipe, timings)
    gallery_picture(recipe, recipe.storage.dir / "gallery.png")
    total = sum(timings.values())
    out.print(f"[green]done[/] in {total:.0f} s; open {report}")


def _flows(recipe: Recipe) -> dict[str, Any]:
    from jobs.indexing import build
    from pipelines.embed import embed
    from pipelines.train import train

    return {
        "train": lambda: train(recipe),
        "embed": lambda: embed(recipe),
        "index": lambda: build(recipe),
    }


def _stage(timings: dict[str, float], name: str, stage: Any) -> Any:
    """Run one stage under a heading and keep its time."""
    out.rule(f"[bold]{name}[/]", align="left")
    started = time.monotonic()
    result = stage()
    timings[name] = time.monotonic() - started
    shown = f" -> {result}" if isinstance(result, Path) else ""
    out.print(f"{name}: {timings[name]:.1f} s{shown}", highlight=False, soft_wrap=True)
    return result


def _make_scenes(recipe: Recipe) -> Path:
    assert recipe.data.scenes is not None
    write_scenes(recipe.data.dir, recipe.data.scenes)
    return recipe.data.dir


def _evaluate(recipe: Recipe) -> dict[str, Any]:
    from jobs.report.evaluation import write_markdown
    from pipelines.evaluate import evaluate

    results = evaluate(recipe, command=command_line())
    write_markdown(recipe.storage.evaluation, results)
    return results


def _serve_and_query(recipe: Recipe) -> None:
    """Start the service, ask it over HTTP, and stop it again."""
    from pipelines.serve import start, stop

    url = start(recipe)
    try:
        table = Table("query", "first by cosine", "first by fine stage", "right one", box=None)
        for query_id, text in example_queries(recipe):
            coarse = search_url(url, Question(text), top_k=5, mode="coarse")["results"]
            fine = search_url(url, Question(text), top_k=5, mode="fine")["results"]
            wanted = query_id.rsplit("-", 1)[0]
            cells = [_marked(result[0]["id"], wanted) for result in (coarse, fine)]
            table.add_row(text, *cells, wanted)
        out.print(table)
    finally:
        stop()


def example_queries(recipe: Recipe) -> list[tuple[str, str]]:
    """(id, text) of the first explicit queries of the held-out split."""
    rows = pq.read_table(recipe.data.path("queries"), columns=["id", "text", "kind"]).to_pylist()
    explicit = [(row["id"], row["text"]) for row in rows if row["kind"] == "explicit"]
    return explicit[:_NUM_QUERIES]


def _marked(found: str, wanted: str) -> str:
    return f"[green]{found} ✓[/]" if found == wanted else f"[red]{found}[/]"
