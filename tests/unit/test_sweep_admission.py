"""Benchmarks that a sweep refuses, and how its tables show what could be read as markup."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from jobs.sweeping import sweep_markdown, sweep_table
from pipelines.recipe import Recipe
from pipelines.sweep import plan, sweep
from slq.arrow import CANDIDATES, RELEVANCE
from slq.errors import ConfigError
from tests.integration.runs import changed, with_untrained_adapter

Row = dict[str, Any]
NAMES = ("a", "b", "c", "d")
ONLY_A = {"query_id": "q", "item_ids": ["a"], "excluded_ids": None}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """With an adapter, and cells that four items suffice for."""
    return with_untrained_adapter(
        changed(
            Recipe(),
            adapter={"num_latents": 4},
            sweep={"indexes": ("flat",), "depths": (0,)},
            storage={"dir": tmp_path_factory.mktemp("admission") / "run"},
        )
    )


def written(
    recipe: Recipe, folder: Path, queries: list[Row], candidates: list[Row] | None = None
) -> Recipe:
    """The recipe over four items, of which the first answers every query."""
    items = [{"id": name, "text": f"text of {name}", "pool": "x"} for name in NAMES]
    pq.write_table(pa.Table.from_pylist(items), folder / "gallery.parquet")
    rows = [{"text": f"text of {query['id']}", **query} for query in queries]
    pq.write_table(pa.Table.from_pylist(rows), folder / "queries.parquet")
    named = {query.get("query_group") or query["id"] for query in queries}
    answers = [{"query_id": name, "item_id": "a", "grade": 1} for name in sorted(named)]
    pq.write_table(pa.Table.from_pylist(answers, schema=RELEVANCE), folder / "relevance.parquet")
    if candidates is not None:
        table = pa.Table.from_pylist(candidates, schema=CANDIDATES)
        pq.write_table(table, folder / "candidates.parquet")
    return changed(recipe, data={"dir": folder})


@pytest.mark.parametrize(
    ("queries", "candidates", "message"),
    [
        ([{"id": "q"}], [ONLY_A], "which items a query of this recipe ranks"),
        (
            [{"id": "q"}],
            [{"query_id": "q", "item_ids": None, "excluded_ids": ["b"]}],
            "which items a query of this recipe ranks",
        ),
        (
            [{"id": "q", "pool": "x"}, {"id": "r", "pool": None}],
            None,
            "column `pool` .* which items a query of this recipe ranks",
        ),
        (
            [{"id": "q-0", "query_group": "q"}, {"id": "q-1", "query_group": "q"}],
            None,
            "column `query_group` .* several wordings",
        ),
    ],
)
def test_queries_that_do_not_rank_everything_in_one_wording_are_refused(
    trained: Recipe, tmp_path: Path, queries: list[Row], candidates: list[Row] | None, message: str
) -> None:
    recipe = written(trained, tmp_path, queries, candidates)
    message = rf"ranks the whole gallery .*{message}.* `slq eval`"
    with pytest.raises(ConfigError, match=message):
        plan(recipe)
    with pytest.raises(ConfigError, match=message):
        sweep(recipe, price=1.0)
    assert not recipe.storage.sweep.exists()
    file = tmp_path / "recipe.yaml"
    values = recipe.model_dump(mode="json", include={"data", "adapter", "sweep", "storage"})
    file.write_text(json.dumps(values))
    done = CliRunner().invoke(app, ["sweep", str(file), "--dry-run"])
    assert done.exit_code == 1
    assert "a sweep ranks the whole gallery" in " ".join(done.stderr.split())


def test_tables_that_restrict_nothing_are_planned(trained: Recipe, tmp_path: Path) -> None:
    queries = [{"id": "q", "pool": None, "query_group": "p"}, {"id": "r", "query_group": None}]
    assert plan(written(trained, tmp_path, queries, candidates=[]))["items"] == len(NAMES)
    (tmp_path / "candidates.parquet").write_bytes(b"PAR1")  # a sweep reads it and says so
    assert plan(changed(trained, data={"dir": tmp_path}))["items"] == len(NAMES)


def test_names_are_shown_as_they_are_in_both_tables() -> None:
    interval = [0.1, 0.3]
    cell = {
        "name": "8 | [/x] flat",
        **dict.fromkeys(("hit@1", "hit@5", "hit@10", "recall@10"), 0.2),
        **{f"{name}_interval": interval for name in ("hit@1", "hit@5", "hit@10", "recall@10")},
        **dict.fromkeys(("search_ms", "exact_ms", "fine_ms", "embed_ms"), 1.0),
        "bytes_per_vector": 8,
        "index_bytes": 8,
        "cost_per_million": 1.0,
        "depth": 0,
        "on_latency_front": True,
        "on_bytes_front": False,
    }
    facts = {"num_queries": 1, "num_items": 1, "search_threads": 1, "model_threads": 1}
    result = {**facts, "cells": [cell], "price_per_hour": 1.0, "formula": "f"}
    header, _, row, *_ = sweep_markdown(result).splitlines()
    assert row.startswith("| 8 \\| [/x] flat | 20.0 ")
    assert row.replace("\\|", "").count("|") == header.count("|")
    console = Console(width=200)
    with console.capture() as shown:
        console.print(sweep_table(result))
    assert "8 | [/x] flat" in shown.get()
