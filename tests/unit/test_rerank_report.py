"""What `slq rerank` shows: a table, sentences and a picture, from a result that is written out here."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from jobs.report.rerank_plot import rerank_figure, write_rerank_plot
from jobs.reranking import draw, rerank_table, summary_lines


def entry(first: float, queries: int) -> dict[str, Any]:
    hits = {"hit@1": first, "hit@1_interval": (first - 0.1, first + 0.1)}
    return {"num_queries": queries, "mrr": 0.9, **hits, "hit@5": 1.0, "hit@5_interval": (1.0, 1.0)}


CALIBRATION = {
    "temperature": 1.25,
    "coarse_weight": 4.0,
    "pairs": 300,
    "expected_calibration_error": {"before": 0.123, "after": 0.045},
    "reliability": {
        name: [{"pairs": 300, "probability": 0.5, "matches": share}]
        for name, share in (("before", 0.4), ("after", 0.5))
    },
    "threshold": 2.5,
    "precision_asked": 0.9,
    "precision_reached": 0.951,
    "share_above_threshold": 0.25,
}
PLAIN: dict[str, Any] = {
    "folder": "s3://bucket/rerank",
    "queries": 40,
    "candidates": 400,
    "scored": 198,
    "unscored": 2,
    "scored_per_query": 4.95,
    "doubtful": 7,
    "judged": 40,
    "systems": {"coarse": entry(0.5, 40), "fine": entry(0.75, 40)},
}
HELD_OUT = {
    **PLAIN,
    "judged_without_candidates": 3,
    "held_out": {
        "systems": {**PLAIN["systems"], "fused": entry(0.8, 22)},
        "calibration": CALIBRATION,
    },
}


def shown(table: Any) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_table_has_a_row_for_each_order_and_says_what_nothing_was_fitted_to() -> None:
    plain, held_out = shown(rerank_table(PLAIN)), shown(rerank_table(HELD_OUT))
    assert "50.0 (40.0-60.0)" in plain
    assert "75.0 (65.0-85.0)" in plain
    assert "nothing was fitted to" not in plain
    assert plain.count("coarse") == 1
    assert held_out.count("coarse") == 2
    assert "80.0 (70.0-90.0)" in held_out
    assert "queries that nothing was fitted to" in held_out


def test_sentences_tell_costs_missing_queries_and_the_calibration() -> None:
    (only,) = summary_lines(PLAIN)
    assert only == (
        "198 pairs scored, 2 could not be, 7 doubtful (label mass below 0.5); 4.95 of 10.0 candidates a query"
    )
    _, missing, fitted, threshold = summary_lines(HELD_OUT)
    assert missing == "3 judged queries have no candidates in the run, and are not counted"
    assert "temperature 1.25: expected calibration error 12.3% -> 4.5%" in fitted
    assert "4.00 nats" in fitted
    assert threshold == "margins of 2.50 and more: 95.1% matches (90% asked), 25.0% of pairs"
    assert summary_lines({**PLAIN, "not_calibrated": "too few"})[1] == "not calibrated: too few"


def test_the_picture_has_hits_and_where_there_is_one_the_calibration(tmp_path: Path) -> None:
    assert len(rerank_figure(PLAIN).axes) == 1
    hits, reliability = rerank_figure(HELD_OUT).axes
    heights = [
        bar.get_height() for group in hits.containers for bar in getattr(group, "patches", [])
    ]
    assert heights == pytest.approx([50, 100, 75, 100, 80, 100])
    names = [text.get_text() for text in reliability.get_legend().get_texts()]  # type: ignore[union-attr]
    assert names == ["sigmoid(margin): error 12.3%", "with the fitted temperature: error 4.5%"]
    path = write_rerank_plot(HELD_OUT, tmp_path / "a.png")
    assert path is not None
    assert Image.open(path).size[0] > 1000
    write_rerank_plot(HELD_OUT, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_nothing_is_drawn_without_judged_queries_or_into_an_object_store(tmp_path: Path) -> None:
    assert write_rerank_plot({"judged": 0}, tmp_path / "a.png") is None
    assert draw(PLAIN) is None
    assert draw({**PLAIN, "folder": str(tmp_path)}) == tmp_path / "rerank.png"
