"""`slq score`: runs against relevance in both formats, what is refused, and what ir-measures makes of our files."""

import io
import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import ir_measures as ir
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs.cli import app
from jobs.scoring import notes_of, score_table, scored
from pipelines.benchmark import Benchmark
from pipelines.evaluation_files import relevance_table, write_runs
from pipelines.ranking import Scores, rank_table, run_table, summarise
from pipelines.recipe import Recipe
from pipelines.runs import qrels_lines, read_judgements, trec_lines
from slq.arrow import RELEVANCE
from slq.errors import ConfigError, DataError, StorageError
from slq.metrics import paired_permutation, parse_metrics
from slq.reranking.profiles import Reading
from slq.schema import Item
from tests.integration.runs import changed

METRICS = "hit@1,hit@3,recall@3,precision@3,mrr,mrr@3,map,map@3,ndcg,ndcg@3"
MEASURES = {
    "hit@1": ir.Success @ 1, "hit@3": ir.Success @ 3, "recall@3": ir.R @ 3, "precision@3": ir.P @ 3,
    "mrr": ir.RR, "mrr@3": ir.RR @ 3, "map": ir.AP, "map@3": ir.AP @ 3, "ndcg": ir.nDCG,
    "ndcg@3": ir.nDCG @ 3,
}  # fmt: skip


def case(
    folder: Path, seed: int = 0, *, missing: int = 0, has_unanswered: bool = False
) -> tuple[Path, Path]:
    """A run of untied scores with ten of thirty items a query, and graded relevance; both TREC files."""
    rng = random.Random(seed)
    run, qrels = folder / f"run{seed}.trec", folder / "qrels.trec"
    lines = []
    for q in range(missing, 25):
        score = 9.0
        for item in rng.sample(range(30), 10):
            score -= rng.random()
            lines.append(f"q{q}\tQ0 i{item} 0  {score} ours\n")
    rng.shuffle(lines)  # neither order nor rank says anything
    run.write_text("".join(lines))
    judged = random.Random(99)
    qrels.write_text(
        "".join(
            f"q{q} 0 i{item} {judged.choice([0, 1, 1, 2, 3])}\n"
            for q in range(25)
            for item in judged.sample(range(30), 8)
        )
        + "none 0 i1 0\n" * has_unanswered
    )
    return run, qrels


def figures(run: Path, qrels: Path, metrics: str = METRICS) -> dict[str, Any]:
    return dict(scored([run], qrels, metrics)["runs"][0]["figures"])


def by_ir_measures(run: Path, qrels: Path) -> dict[str, float]:
    found = ir.calc_aggregate(
        list(MEASURES.values()),
        list(ir.read_trec_qrels(str(qrels))),
        list(ir.read_trec_run(str(run))),
    )
    return {name: found[measure] for name, measure in MEASURES.items()}


def test_figures_are_those_of_ir_measures_and_the_format_changes_none(tmp_path: Path) -> None:
    run, qrels = case(tmp_path)
    found = figures(run, qrels)
    told = by_ir_measures(run, qrels)
    assert {name: found[name] for name in told} == pytest.approx(told, abs=1e-6)
    rows = [line.split() for line in run.read_text().splitlines()]
    table = pa.table(
        {
            "query_id": [r[0] for r in rows],
            "item_id": [r[2] for r in rows],
            "score": [float(r[4]) for r in rows],
        }
    )
    pq.write_table(table, tmp_path / "run.parquet")
    judged = [line.split() for line in qrels.read_text().splitlines()]
    columns = zip(*[(r[0], r[2], int(r[3])) for r in judged], strict=True)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, RELEVANCE, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=RELEVANCE), tmp_path / "relevance.parquet")
    assert figures(tmp_path / "run.parquet", tmp_path / "relevance.parquet") == found
    assert figures(run, tmp_path / "relevance.parquet") == found


def test_ties_count_against_a_run_whatever_its_ranks_say(tmp_path: Path) -> None:
    (tmp_path / "r.trec").write_text(
        "q Q0 a 1 0.5 x\nq Q0 b 2 0.5 x\nq Q0 c 3 0.5 x\nq Q0 d 4 0.1 x\n"
    )
    (tmp_path / "q.trec").write_text("q 0 a 2\nq 0 b 1\n")
    found = figures(tmp_path / "r.trec", tmp_path / "q.trec", "mrr,hit@1,ndcg")
    assert (found["mrr"], found["hit@1"]) == (0.5, 0.0)
    # c, then b of the lower grade, then a
    gained = 1 / np.log2(3) + 2 / np.log2(4)
    assert found["ndcg"] == pytest.approx(gained / (2 + 1 / np.log2(3)))


def test_queries_that_cannot_be_measured_or_are_missing_are_counted_and_named(
    tmp_path: Path,
) -> None:
    run, qrels = case(tmp_path, missing=3, has_unanswered=True)
    run.write_text(run.read_text() + "stranger Q0 i1 1 0.5 x\n")
    found = scored([run], qrels, "hit@3")
    (one,) = found["runs"]
    assert found["without_relevant"] == {"count": 1, "first": ["none"]}
    assert one["missing"] == {"count": 3, "first": ["q0", "q1", "q2"]}
    assert one["unjudged"] == {"count": 1, "first": ["stranger"]}
    assert found["num_queries"] == one["figures"]["num_queries"] == 25
    told = ir.calc_aggregate(
        [ir.Success @ 3],
        [one for one in ir.read_trec_qrels(str(qrels)) if one.query_id != "none"],
        list(ir.read_trec_run(str(run))),
    )
    assert one["figures"]["hit@3"] == pytest.approx(
        told[ir.Success @ 3]
    )  # it counts 0 for them, too
    notes = list(notes_of(found))
    assert notes == [
        "not measured: 1 query (none) of the relevance without a relevant item",
        "run0.trec: 3 queries (q0, q1, q2) missing from the run, counted as 0",
        "run0.trec: 1 query (stranger) of the run not in the relevance, left out",
    ]


def test_two_runs_are_compared_query_by_query(tmp_path: Path) -> None:
    first, qrels = case(tmp_path, 1)
    second, _ = case(tmp_path, 2)
    found = scored([first, second], qrels, METRICS)
    queries = sorted({line.split()[0] for line in qrels.read_text().splitlines()})
    told = [
        {
            (value.query_id, value.measure): value.value
            for value in ir.iter_calc(
                list(MEASURES.values()),
                list(ir.read_trec_qrels(str(qrels))),
                list(ir.read_trec_run(str(path))),
            )
        }
        for path in (first, second)
    ]
    for name, (test,) in found["compared"].items():
        a, b = (np.array([of[q, MEASURES[name]] for q in queries]) for of in told)
        assert test["runs"] == [str(first), str(second)]
        assert test["difference"] == pytest.approx((a - b).mean(), abs=1e-6)
        assert test["p"] == test["p_holm"] == pytest.approx(paired_permutation(a, b), abs=0.02)
        low, high = test["interval"]
        assert low <= test["difference"] <= high
    same = scored([first, first], qrels, "mrr")["compared"]["mrr"][0]
    assert (same["difference"], same["p"]) == (0.0, 1.0)


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    first, qrels = case(tmp_path, 1)
    second, _ = case(tmp_path, 2, missing=1)
    given = ["score", str(first), str(second), "--qrels", str(qrels), "--metrics", "hit@1, ndcg@3"]
    shown = CliRunner().invoke(app, given, env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    for text in ("25 queries, in %", "hit@1", "ndcg@3", "first - second", "counted as 0"):
        assert text in shown.output
    told = CliRunner().invoke(app, [*given, "--json"])
    found = json.loads(told.stdout)
    assert found == json.loads(json.dumps(scored([first, second], qrels, "hit@1,ndcg@3")))
    assert "--qrels" in CliRunner().invoke(app, ["score", "--help"], env={"COLUMNS": "160"}).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "hit@1"], "--qrels is missing: a run is scored by relevance"),
        (["--qrels", "{q}", "--metrics", "ndgc@3"], "did you mean ndcg@3?"),
        (["--qrels", "{q}", "--metrics", ","], "no metric is named"),
        (["--qrels", "{q}.gone"], "does not exist; `slq eval` writes qrels.trec"),
    ],
)
def test_what_is_asked_wrongly_is_refused_in_words(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    run, qrels = case(tmp_path)
    given = [one.replace("{q}", str(qrels)) for one in arguments]
    result = CliRunner().invoke(app, ["score", str(run), *given])
    assert result.exit_code == 1
    assert message in result.output


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "q Q0 a 1 0.5 x\nq Q0 b\n",
            r"run: .*bad.trec: line 2 has 3 columns; a TREC run has 6: query, Q0",
        ),
        ("\nq Q0 a 1 0.5 x y\n", "line 2 has 7 columns"),
        ("q Q0 a 1 high x\n", "line 1 has score 'high', which is no number; a TREC run has 6"),
        ("q Q0 a 1 1_0 x\n", "line 1 has score '1_0', which is no number"),
        ("q Q0 a 1 nan x\n", "has scores that are no finite numbers"),
        ("q Q0 a 1 0.5 x\nq Q0 a 2 0.4 x\n", "has item 'a' for query 'q' 2 times"),
        ("\n", "holds no candidates"),
        ("q\xff", "cannot be read"),
    ],
)
def test_a_bad_line_of_a_run_is_named_with_what_is_expected(
    tmp_path: Path, lines: str, message: str
) -> None:
    _, qrels = case(tmp_path)
    path = tmp_path / "bad.trec"
    path.write_bytes(lines.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        scored([path], qrels, "mrr")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            "q 0 a 1\nq 0 b\n",
            r"qrels: .*bad.qrels: line 2 has 3 columns; a TREC file of relevance has 4",
        ),
        ("q 0 a yes\n", "line 1 has grade 'yes', which is no number"),
        ("q 0 a inf\n", "has grades that are no finite numbers"),
        ("q 0 a 1\nq 0 a 0\n", "has item 'a' for query 'q' 2 times"),
        ("", "holds no judgements"),
        ("q 0 a 0\nq 0 b -1\n", "has no grade above 0, so there is nothing to measure by"),
    ],
)
def test_a_bad_line_of_relevance_is_named_with_what_is_expected(
    tmp_path: Path, lines: str, message: str
) -> None:
    run, _ = case(tmp_path)
    path = tmp_path / "bad.qrels"
    path.write_text(lines)
    with pytest.raises(DataError, match=message):
        scored([run], path, "mrr")


def test_tables_without_the_columns_are_refused(tmp_path: Path) -> None:
    run, _ = case(tmp_path)
    path = tmp_path / "qrels.parquet"
    pq.write_table(pa.table({"query_id": ["q"], "item_id": ["a"]}), path)
    with pytest.raises(DataError, match="has no column grade; it has"):
        scored([run], path, "mrr")
    pq.write_table(pa.table({"query_id": ["q"], "item_id": ["a"], "grade": ["much"]}), path)
    with pytest.raises(DataError, match="much"):
        read_judgements(path)
    pq.write_table(
        pa.table({"query_id": ["q"], "item_id": ["a"], "grade": pa.array([None], pa.int32())}), path
    )
    with pytest.raises(DataError, match="1 nulls in grade"):
        read_judgements(path)


def test_ids_are_parted_by_the_white_space_of_ascii_alone(tmp_path: Path) -> None:
    (tmp_path / "r.trec").write_text("q\u00a0é Q0 a\u2028b 1 0.5 x\r\n")
    (tmp_path / "q.trec").write_text("q\u00a0é 0 a\u2028b 1\r\n")
    assert figures(tmp_path / "r.trec", tmp_path / "q.trec", "hit@1")["hit@1"] == 1.0


RELEVANT = np.array([[1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]], dtype=bool)
COARSE = np.array([[0.1, 0.5, 0.4, 0.4], [0.9, 0.8, 0.7, 0.6], [0.3, 0.9, 0.2, 0.1]], np.float32)


def benchmark(name: str = "i{}") -> Benchmark:
    items = [Item(text="x", id=name.format(n)) for n in range(4)]
    queries = [Item(text="x", id=f"q{n}") for n in range(3)]
    return Benchmark(items, queries, RELEVANT, grades={("q0", name.format(0)): 3.0})


@pytest.mark.parametrize("suffix", ["trec", "parquet"])
def test_the_runs_that_an_evaluation_writes_score_as_it_does(tmp_path: Path, suffix: str) -> None:
    recipe = changed(Recipe(), eval={"ks": (1, 3), "metrics": ("ndcg@3", "map@3", "mrr@3")})
    results = summarise(recipe, benchmark(), {"slq": Scores(COARSE)})
    write_runs(tmp_path / "eval", benchmark(), {"slq": Scores(COARSE)}, depth=3)
    ours = results["systems"]["slq"]["text_to_image"]["all"]
    names = [name for name in ours if name.partition("@")[2].isdigit()]
    found = figures(
        tmp_path / "eval" / f"run_slq.{suffix}", tmp_path / "eval" / "qrels.trec", ",".join(names)
    )
    assert found == {
        "num_queries": 3,
        **{k: ours[k] for name in names for k in (name, f"{name}_interval")},
    }
    told = by_ir_measures(tmp_path / "eval" / "run_slq.trec", tmp_path / "eval" / "qrels.trec")
    assert ours["hit@1"] == pytest.approx(told["hit@1"])


def test_files_of_an_evaluation_are_whole_and_those_of_other_systems_go(tmp_path: Path) -> None:
    write_runs(tmp_path, benchmark(), {"slq": Scores(COARSE), "slq@48": Scores(COARSE)}, depth=3)
    names = {"qrels.trec", "ranks.parquet"} | {
        f"run_slq{part}.{kind}" for part in ("", ".cut.48") for kind in ("parquet", "trec")
    }
    assert {path.name for path in tmp_path.iterdir()} == names
    for own in ("results.json", "bm25.trec"):
        (tmp_path / own).write_text("{}")
    write_runs(tmp_path, benchmark(), {"slq": Scores(COARSE)}, depth=3)
    kept = {
        "bm25.trec",
        "qrels.trec",
        "ranks.parquet",
        "results.json",
        "run_slq.parquet",
        "run_slq.trec",
    }
    assert {path.name for path in tmp_path.iterdir()} == kept
    relevance = relevance_table(benchmark()).to_pylist()
    assert [tuple(row.values()) for row in relevance] == [
        ("q0", "i0", 3), ("q0", "i3", 1), ("q1", "i2", 1), ("q2", "i1", 1),
    ]  # fmt: skip
    assert (tmp_path / "qrels.trec").read_text() == "q0 0 i0 3\nq0 0 i3 1\nq1 0 i2 1\nq2 0 i1 1\n"


def test_ids_with_blanks_leave_the_parquet_files_alone_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("slq"), "propagate", True)
    write_runs(tmp_path, benchmark(), {"slq": Scores(COARSE)}, depth=3)
    write_runs(tmp_path, benchmark("item {}"), {"slq": Scores(COARSE)}, depth=3)
    assert {path.name for path in tmp_path.iterdir()} == {"ranks.parquet", "run_slq.parquet"}
    assert "item_id 'item 1' holds white space, which a TREC file cannot carry" in caplog.text
    with pytest.raises(DataError, match="query_id 'a b' holds white space"):
        qrels_lines(pa.table({"query_id": ["a b"], "item_id": ["x"], "grade": [1]}))
    with pytest.raises(DataError, match="item_id '' holds white space"):
        qrels_lines(pa.table({"query_id": ["a"], "item_id": [""], "grade": [1]}))
    table = pa.table({"query_id": ["q"], "item_id": ["a"], "rank": [1], "score": [0.5]})
    with pytest.raises(DataError, match="name 'my system' holds white space"):
        trec_lines(table, "my system")


def test_ties_count_against_a_run_file_too_whoever_reads_it(tmp_path: Path) -> None:
    """The first right item of a run stands where the evaluation says, by rank and by score."""
    rng = np.random.default_rng(5)
    items = [Item(text="x", id=f"i{n}") for n in range(6)]
    queries = [Item(text="x", id=f"q{n}") for n in range(30)]
    relevant = rng.random((30, 6)) < 0.4
    relevant[np.arange(30), rng.integers(6, size=30)] = True
    tied = Benchmark(items, queries, relevant)
    coarse = rng.choice([0.25, 0.5], (30, 6)).astype(np.float32)
    readings = [
        {int(i): Reading(float(rng.choice([0.0, 1.0]))) for i in np.flatnonzero(row)}
        for row in rng.random((30, 6)) < 0.6
    ]
    systems = {"slq": Scores(coarse), "slq_fine": Scores(coarse, readings)}
    write_runs(tmp_path, tied, systems, depth=6)
    told = summarise(Recipe(), tied, systems)["systems"]
    for name, scores in systems.items():
        ours = told[name]["text_to_image"]["all"]
        for suffix in ("trec", "parquet"):
            found = figures(tmp_path / f"run_{name}.{suffix}", tmp_path / "qrels.trec", "mrr,hit@1")
            assert found["mrr"] == pytest.approx(ours["mrr"])
            assert found["hit@1"] == ours["hit@1"]
        first: dict[str, int] = {}
        for row in run_table(tied, scores, depth=6).to_pylist():
            if relevant[int(row["query_id"][1:]), int(row["item_id"][1:])]:
                first.setdefault(row["query_id"], row["rank"])
        ranks = rank_table(tied, {name: scores}).to_pylist()
        assert first == {row["query_id"]: row["rank"] for row in ranks}


@pytest.mark.parametrize("grade", [0.5, 1e12])
def test_grades_that_trec_cannot_carry_leave_no_file_of_relevance(
    tmp_path: Path, grade: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("slq"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("pipelines"), "propagate", True)
    write_runs(tmp_path, benchmark(), {"slq": Scores(COARSE)}, depth=3)
    graded = replace(benchmark(), grades={("q0", "i3"): grade, ("q0", "i0"): 3.0})
    write_runs(tmp_path, graded, {"slq": Scores(COARSE)}, depth=3)
    assert not (tmp_path / "qrels.trec").exists()
    assert (tmp_path / "run_slq.trec").exists()
    assert f"q0 -> i3 has the grade {grade:g}, and TREC's qrels hold whole numbers" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_runs(tmp_path / "file" / "eval", benchmark(), {}, depth=1)


def test_a_run_that_does_not_exist_is_named(tmp_path: Path) -> None:
    _, qrels = case(tmp_path)
    with pytest.raises(ConfigError, match=r"run: .*none.trec does not exist"):
        scored([tmp_path / "none.trec"], qrels, "mrr")
    assert parse_metrics(["mrr"])


def test_names_of_runs_are_no_markup(tmp_path: Path) -> None:
    run, qrels = case(tmp_path)
    odd = run.rename(tmp_path / "[red]mine[!].trec")
    out = io.StringIO()
    Console(file=out, width=200).print(score_table(scored([odd], qrels, "mrr")))
    assert "[red]mine[!].trec" in out.getvalue()
