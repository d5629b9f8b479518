"""The table of a benchmark's own metrics."""

import io
from typing import Any

from rich.console import Console

from jobs.headlines import headline_table
from jobs.results import results_table


def shown(results: dict[str, Any]) -> list[list[str]]:
    """Cells of the table's rows, as people see them."""
    table = headline_table(results)
    assert table is not None
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    lines = [line for line in out.getvalue().splitlines() if "│" in line]
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines]


def facts(headline: dict[str, list[str]]) -> dict[str, Any]:
    return {"name": "X", "split": "val", "direction": "image -> text", "headline": headline}


def test_each_kind_has_its_own_metrics_and_groups_the_general_ones() -> None:
    numbers = {"hit@1": 0.5, "hit@5": 0.75, "recall@2": 0.25}
    system = {
        "text_to_image": {"a": numbers, "subset": numbers},
        "groups": {"both": {"hit@1": 0.125, "hit@5": 1.0}},
    }
    results = {
        "benchmark": facts({"": ["hit@1", "hit@5"], "subset": ["recall@2"]}),
        "systems": {"slq": system, "slq:other": system},
    }
    assert shown(results) == [
        ["a", "hit@1", "50.0", "50.0"],
        ["a", "hit@5", "75.0", "75.0"],
        ["subset", "recall@2", "25.0", "25.0"],
        ["mean of both", "hit@1", "12.5", "12.5"],
        ["mean of both", "hit@5", "100.0", "100.0"],
    ]
    table = headline_table(results)
    assert table is not None
    assert table.title == "X (val), image -> text, in %"
    assert [column.header for column in table.columns][2:] == ["SLQ (trained)", "slq:other"]


def test_nothing_in_the_data_is_markup() -> None:
    numbers = {"hit@1": 0.5, "hit@1_interval": (0.25, 0.75), "num_queries": 4}
    system = {"text_to_image": {"[/x]": numbers}, "groups": {"[red]all": numbers}}
    told = facts({"": ["hit@1"]}) | {"name": "M-BEIR [/y]", "split": "[bold]val"}
    results = {"benchmark": told, "systems": {"slq:[/z]": system}}
    assert shown(results) == [["[/x]", "hit@1", "50.0"], ["mean of [red]all", "hit@1", "50.0"]]
    out = io.StringIO()
    Console(file=out, width=200).print(headline_table(results))
    assert "M-BEIR [/y] ([bold]val), image -> text" in out.getvalue()
    assert "slq:[/z]" in out.getvalue()
    out = io.StringIO()
    Console(file=out, width=200).print(results_table(results))
    assert "[/x]" in out.getvalue()
    assert "slq:[/z]" in out.getvalue()


def test_users_own_data_has_no_headline() -> None:
    assert headline_table({"systems": {}}) is None
