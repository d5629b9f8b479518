"""The report of a finished run: one HTML file, and a picture for the README."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from jobs.report.charts import hits_chart, svg
from jobs.report.galleries import Outcome, examples, outcome_counts, read_runs
from jobs.report.settings import JOBS, reproduce_command, settings
from jobs.report.tables import headline, metric_context, timing_rows
from jobs.report.training_plot import training_figure
from jobs.results import read_results
from pipelines.recipe import Recipe
from pipelines.training_log import HISTORY, read_history

_EXAMPLES: tuple[tuple[str, Outcome], ...] = (
    ("explicit hard", "corrected"),
    ("explicit", "corrected"),
    ("knowledge", "corrected"),
    ("explicit hard", "kept"),
    ("explicit", "kept"),
    ("knowledge", "kept"),
    ("explicit hard", "spoiled"),
    ("knowledge", "missed"),
)
"""What kind of query with which outcome each example of the report shows, where there is one."""


def write_report(recipe: Recipe, timings: dict[str, float]) -> Path:
    """Write `report.html` into the run folder; parts without data are left out.

    Args:
        recipe: The run's recipe.
        timings: Seconds by stage, in order.

    Raises:
        DataError: The run has no evaluation results.
    """
    results = read_results(recipe)
    runs = read_runs(recipe, results["systems"])
    history = recipe.storage.dir / "train" / HISTORY
    page = template("report.html.j2").render(
        recipe=recipe,
        results=results,
        settings=settings(recipe, results),
        command=reproduce_command(recipe),
        metrics=metric_context(results),
        systems=headline(results),
        hits_chart=svg(hits_chart(results)),
        training_chart=svg(training_figure(read_history(history))) if history.is_file() else None,
        examples=examples(recipe, runs, _EXAMPLES) if runs else [],
        outcomes=outcome_counts(runs) if runs else [],
        timings=timing_rows(timings),
    )
    path = recipe.storage.dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def template(name: str) -> Template:
    """A page's template; whatever is put into it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(JOBS / "templates"),
        autoescape=True,  # jinja's own rule goes by the suffix, and .j2 would not be escaped
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
