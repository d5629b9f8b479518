"""What `slq score` measures and shows."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from jobs.report.tables import p_text
from pipelines.scored import score_runs
from slq.errors import ConfigError
from slq.metrics import parse_metrics

_SHOWN = 5


def scored(runs: Sequence[Path], qrels: Path | None, metrics: str) -> dict[str, Any]:
    """Figures of one run, or of two and their comparison.

    Args:
        runs: One or two files.
        qrels: Relevance.
        metrics: Names, with commas between them.

    Raises:
        ConfigError: A metric is unknown, a file is missing, or `qrels` is not given.
        DataError: A file is malformed.
    """
    wanted = parse_metrics(name.strip() for name in metrics.split(",") if name.strip())
    if qrels is None:
        raise ConfigError(
            "--qrels is missing: a run is scored by relevance, such as qrels.trec beside the runs of `slq eval`"
        )
    return score_runs(runs, qrels, wanted)


def score_table(found: Mapping[str, Any]) -> Table:
    """Metrics (rows) of each run with intervals and, of two, their difference.

    Args:
        found: As `scored` gives it.
    """
    table = Table(
        title=f"{found['num_queries']:,} queries, in % (95% interval)", title_justify="left"
    )
    table.add_column("metric")
    for one in found["runs"]:
        table.add_column(escape(Path(one["run"]).name), justify="right", overflow="fold")
    if found["compared"]:
        table.add_column("first - second", justify="right")
        table.add_column("p", justify="right")
    for name in found["metrics"]:
        cells = []
        for one in found["runs"]:
            figures = one["figures"]
            cells.append(percent(figures[name], figures[f"{name}_interval"]))
        if found["compared"]:
            (test,) = found["compared"][name]
            cells.append(percent(test["difference"], test["interval"], "+.1f"))
            cells.append(p_text(test["p"]).removeprefix("p ").removeprefix("= "))
        table.add_row(name, *cells)
    return table


def percent(value: float, interval: Sequence[float], form: str = ".1f") -> str:
    """A share and its interval in %; `form` says how numbers are written."""
    low, high = interval
    to = "-" if form == ".1f" else " to "
    return f"{100 * value:{form}} ({100 * low:{form}}{to}{100 * high:{form}})"


def notes_of(found: Mapping[str, Any]) -> Iterator[str]:
    """What was not measured, and what counts as missed, with the first ids."""
    without = found["without_relevant"]
    if without["count"]:
        yield f"not measured: {_ids(without)} of the relevance without a relevant item"
    for one in found["runs"]:
        name = Path(one["run"]).name
        if one["missing"]["count"]:
            yield f"{name}: {_ids(one['missing'])} missing from the run, counted as 0"
        if one["unjudged"]["count"]:
            yield f"{name}: {_ids(one['unjudged'])} of the run not in the relevance, left out"


def _ids(told: Mapping[str, Any]) -> str:
    shown, more = told["first"][:_SHOWN], told["count"] > _SHOWN
    noun = "query" if told["count"] == 1 else "queries"
    return f"{told['count']:,} {noun} ({', '.join(shown)}{', ...' if more else ''})"
