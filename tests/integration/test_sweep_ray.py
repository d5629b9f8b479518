"""A sweep on a few scenes: every figure again by a straight computation, nothing done twice, and what is refused."""

import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.report.sweep_plot import write_sweep_plot
from jobs.sweeping import columns, sweep_markdown
from pipelines.benchmark import Benchmark, load_benchmark
from pipelines.embed import embed
from pipelines.recipe import Recipe
from pipelines.sweep import priced, sweep
from pipelines.sweeping.cells import Cells
from pipelines.sweeping.vectors import Vectors, committed, vectors_of
from slq.artifacts import save_adapter
from slq.benchmarks.scenes import ScenesConfig, write_scenes
from slq.encoder import Encoder
from slq.errors import ArtifactError, ArtifactMismatchError, ConfigError, DataError
from slq.metrics import bootstrap_interval
from slq.reranker import Reranker
from slq.schema import Item
from slq.sweeps import Cell, cells_of
from tests.integration.runs import changed, fingerprints_of_files, with_untrained_adapter

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
SCENES = ScenesConfig(train=2, test=16, unseen=4, seed=7)
DEPTHS = (0, 3, 6)
SWEEP = {
    "dimensions": (96, 192),
    "precisions": ("float32", "int8", "binary"),
    "indexes": ("flat", "rabitq"),
    "depths": DEPTHS,
    "rounds": 1,
    "timed_queries": 3,
    "timed_fine_queries": 2,
}
PRICE = 7.2


@pytest.fixture(scope="module")
def recipe(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """An embedded gallery; lists of which all are visited."""
    scenes_dir = tmp_path_factory.mktemp("sweep-scenes")
    write_scenes(scenes_dir, SCENES)
    found = with_untrained_adapter(
        changed(
            Recipe(),
            data={"dir": scenes_dir},
            adapter={"num_latents": 4},
            embed={"shard_rows": 10},
            index={"num_lists": 4, "num_probes": 4, "oversample": 8.0},
            sweep=SWEEP,
            storage={"dir": tmp_path_factory.mktemp("sweep") / "run"},
        )
    )
    embed(found)
    return found


@pytest.fixture(scope="module")
def benchmark(recipe: Recipe) -> Benchmark:
    return load_benchmark(recipe)


@pytest.fixture(scope="module")
def swept(recipe: Recipe) -> dict[str, Any]:
    return sweep(recipe, price=PRICE)


@pytest.fixture(scope="module")
def encoder(recipe: Recipe) -> Encoder:
    return Encoder.from_pretrained(recipe.storage.adapter)


@pytest.fixture(scope="module")
def truth(encoder: Encoder, benchmark: Benchmark) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gallery and queries as encoded here, and the margin of every pair."""
    gallery = encoder.encode(benchmark.items).astype(np.float16).astype(np.float64)
    pairs = [(query, item) for query in benchmark.queries for item in benchmark.items]
    margins = Reranker(encoder.backbone).score(pairs).numpy().reshape(len(benchmark.queries), -1)
    return gallery, encoder.encode(benchmark.queries).astype(np.float64), margins


def scored(cell: dict[str, Any], gallery: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(queries, items) scores of a flat cell, written out."""
    sides = []
    for values in (gallery, queries):
        short = values[:, : cell["dimension"]]
        sides.append(short / np.linalg.norm(short, axis=1, keepdims=True))
    items, asked = sides
    if cell["precision"] == "int8":
        step = np.quantile(np.abs(items), 0.9999) / 127
        items, asked = (np.clip(np.rint(side / step), -127, 127) * step for side in (items, asked))
    elif cell["precision"] == "binary":
        medians = np.median(items, axis=0)
        items, asked = (np.where(side > medians, 1.0, -1.0) for side in (items, asked))
    return (asked @ items.T).round(6)


def rank_of(scores: np.ndarray, margins: np.ndarray, right: int, depth: int) -> int:
    """Of the right item: among equal scores last, then by margin in the first `depth` places."""
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], n == right, n))
    head = sorted(order[:depth], key=lambda n: -margins[n])
    return [*head, *order[depth:]].index(right) + 1


def test_figures_of_flat_cells_equal_a_straight_computation(
    swept: dict[str, Any], benchmark: Benchmark, truth: tuple[np.ndarray, ...]
) -> None:
    gallery, queries, margins = truth
    rights = benchmark.relevant.argmax(axis=1)
    whole = {"dimension": 192, "precision": "float32"}
    exact = np.argsort(-scored(whole, gallery, queries), axis=1, kind="stable")[:, :10]
    flat = [cell for cell in swept["cells"] if cell["index"] == "flat"]
    assert len(flat) == 2 * 3 * len(DEPTHS)
    for cell in flat:
        scores = scored(cell, gallery, queries)
        ranks = [
            rank_of(scores[q], margins[q], right, cell["depth"]) for q, right in enumerate(rights)
        ]
        for k in (1, 5, 10):
            values = np.array([rank <= k for rank in ranks], float)
            # a score that lies on the edge of two codes may fall to either side
            assert cell[f"hit@{k}"] == pytest.approx(values.mean(), abs=1.01 / len(ranks)), cell[
                "name"
            ]
            if cell["precision"] == "float32":
                assert cell[f"hit@{k}"] == pytest.approx(values.mean())
                assert cell[f"hit@{k}_interval"] == pytest.approx(bootstrap_interval(values))
        if cell["precision"] != "binary":  # whose ties leave open which ten are meant
            best = np.argsort(-scores, axis=1, kind="stable")[:, :10]
            kept = [
                len({*a} & {*b}) / 10 for a, b in zip(best.tolist(), exact.tolist(), strict=True)
            ]
            assert cell["recall@10"] == pytest.approx(np.mean(kept), abs=0.005)
        counts: Counter[str] = (
            Counter()
        )  # as `slq eval` counts: objects that training has not seen stand apart
        for query in benchmark.queries:
            kind, is_unseen = query.columns["kind"], query.columns["split"] == "unseen"
            counts[f"{kind}, unseen objects" if is_unseen else kind] += 1
            counts[f"{kind}, hard subset"] += bool(query.columns["hard"]) and not is_unseen
        found = {name: one["num_queries"] for name, one in cell["kinds"].items()}
        assert found == dict(+counts)
        assert any(name.endswith("unseen objects") for name in found)


def test_costs_follow_the_stated_formula_and_fronts_are_of_all_rows(swept: dict[str, Any]) -> None:
    for cell in swept["cells"]:
        total = cell["embed_ms"] + cell["search_ms"] + cell["fine_ms"]
        hours = total / 1000 / 3600
        assert cell["cost_per_million"] == pytest.approx(PRICE * hours * 1_000_000)
        assert cell["search_ms"] > 0
        assert cell["exact_ms"] > 0
        assert (cell["fine_ms"] > 0) == (cell["depth"] > 0)
        if cell["on_bytes_front"]:
            smaller = [
                o for o in swept["cells"] if o["bytes_per_vector"] < cell["bytes_per_vector"]
            ]
            assert all(other["hit@1"] < cell["hit@1"] for other in smaller)
    assert any(cell["on_latency_front"] for cell in swept["cells"])
    sizes = {(c["precision"], c["dimension"]): c for c in swept["cells"] if c["index"] == "flat"}
    assert sizes["binary", 96]["bytes_per_vector"] == 12
    assert sizes["int8", 192]["index_bytes"] == 192 * swept["num_items"]


def test_every_pair_was_scored_once_and_nothing_that_was_there_embedded(
    swept: dict[str, Any], recipe: Recipe, benchmark: Benchmark
) -> None:
    files = list((recipe.storage.sweep / "readings").glob("*.parquet"))
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    pairs = {(row["query"], row["item"]) for row in rows}
    assert len(rows) == len(pairs) == swept["scored_now"]
    assert len(pairs) <= len(benchmark.queries) * len(benchmark.items)
    assert swept["vectors"] == {
        "gallery": recipe.storage.embeddings,
        "encoded_now": len(benchmark.queries),
    }


def test_the_files_hold_the_same_rows(swept: dict[str, Any], recipe: Recipe) -> None:
    folder = recipe.storage.sweep
    assert json.loads((folder / "sweep.json").read_text()) == json.loads(json.dumps(swept))
    rows = pq.read_table(folder / "sweep.parquet").to_pylist()
    with (folder / "sweep.csv").open(newline="") as file:
        texts = list(csv.DictReader(file))
    assert len(rows) == len(texts) == len(swept["cells"]) == 2 * 3 * 2 * len(DEPTHS)
    for row, text, cell in zip(rows, texts, swept["cells"], strict=True):
        assert row["hit@1_low"] == float(text["hit@1_low"]) == cell["hit@1_interval"][0]
        assert row["explicit/hit@1"] == cell["kinds"]["explicit"]["hit@1"]
        assert row["name"] == text["name"] == cell["name"]


def test_table_and_plot_name_every_row(swept: dict[str, Any], tmp_path: Path) -> None:
    found = columns(swept)
    assert found["cell"] == [cell["name"] for cell in swept["cells"]]
    assert sweep_markdown(swept).count("\n| ") == len(swept["cells"]) + 1
    assert swept["formula"] in sweep_markdown(swept)
    first = write_sweep_plot(swept, tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert write_sweep_plot(swept, tmp_path / "b.png").read_bytes() == first


def test_run_again_it_does_nothing_and_a_new_cell_is_all_that_is_done(
    swept: dict[str, Any], recipe: Recipe
) -> None:
    cells = recipe.storage.sweep / "cells"
    before = fingerprints_of_files(cells)
    again = sweep(recipe, price=PRICE)
    assert (again["searched_now"], again["scored_now"]) == ([], 0)
    assert again["vectors"]["encoded_now"] == 0
    assert again["cells"] == swept["cells"]
    assert fingerprints_of_files(cells) == before
    more = changed(recipe, sweep={**SWEEP, "dimensions": (48, 96, 192), "precisions": ("float32",)})
    found = sweep(more, price=2 * PRICE)
    assert found["searched_now"] == ["48 float32 flat", "48 float32 rabitq"]
    same = {cell["name"]: cell for cell in swept["cells"]}
    for cell in found["cells"]:
        if cell["name"] in same:
            assert cell["hit@1"] == same[cell["name"]]["hit@1"]
            assert cell["cost_per_million"] == pytest.approx(
                2 * same[cell["name"]]["cost_per_million"]
            )


def test_readings_that_are_lost_or_damaged_are_read_again(
    swept: dict[str, Any], recipe: Recipe
) -> None:
    lost, damaged, *_ = sorted((recipe.storage.sweep / "readings").glob("*.parquet"))
    count = pq.read_table(lost).num_rows + pq.read_table(damaged).num_rows
    lost.unlink()
    damaged.write_bytes(b"PAR1")
    again = sweep(recipe, price=PRICE)
    assert 0 < again["scored_now"] <= count
    for cell, other in zip(again["cells"], swept["cells"], strict=True):
        assert cell["hit@1"] == other["hit@1"]


class Recorder:
    """An encoder's place: counts what it is asked for."""

    def __init__(self, encoder: Encoder) -> None:
        self.asked: list[tuple[str, int]] = []
        self._encoder = encoder

    def __call__(self, items: Sequence[Item], what: str) -> np.ndarray:
        self.asked.append((what, len(items)))
        return self._encoder.encode(items)


def test_committed_embeddings_are_used_and_others_are_made_once(
    recipe: Recipe, benchmark: Benchmark, encoder: Encoder, tmp_path: Path
) -> None:
    call, num_queries = Recorder(encoder), len(benchmark.queries)
    own = changed(
        recipe, storage={"dir": tmp_path / "a", "embedding_dir": recipe.storage.embeddings}
    )
    save_adapter(own.storage.adapter, encoder.backbone, encoder.adapter)  # type: ignore[arg-type]
    found = vectors_of(own, benchmark, committed(own), call)
    assert call.asked == [("queries", num_queries)]
    again = vectors_of(own, benchmark, committed(own), call)
    assert call.asked == [("queries", num_queries)]
    assert (found.encoded, again.encoded, found.sha256) == (num_queries, 0, again.sha256)
    bare = changed(recipe, storage={"dir": tmp_path / "b"})
    save_adapter(bare.storage.adapter, encoder.backbone, encoder.adapter)  # type: ignore[arg-type]
    assert committed(bare) is None
    made = vectors_of(bare, benchmark, None, call)
    assert call.asked[1:] == [("queries", num_queries), ("gallery", len(benchmark.items))]
    np.testing.assert_allclose(made.gallery, found.gallery, atol=2**-10)
    vectors_of(bare, benchmark, None, call)
    assert len(call.asked) == 3
    (bare.storage.sweep / "vectors.safetensors").write_bytes(b"broken")
    vectors_of(bare, benchmark, None, call)
    assert len(call.asked) == 5


def test_embeddings_of_another_space_or_gallery_are_refused(
    recipe: Recipe, benchmark: Benchmark, tmp_path: Path
) -> None:
    other = changed(recipe, storage={"dir": tmp_path, "embedding_dir": recipe.storage.embeddings})
    other = with_untrained_adapter(other, seed=5)
    with pytest.raises(ArtifactMismatchError, match=r"data set .* fingerprint .* adapter .* has"):
        sweep(other, price=1)
    rows = pq.read_table(recipe.data.path("corpus"))
    found = committed(recipe)
    renamed = rows.set_column(1, "image", rows["image"].take([*range(1, len(rows)), 0]))
    for table, message in (
        (renamed, "or not so"),
        (rows.slice(1), "which the gallery has not"),
    ):
        pq.write_table(table, tmp_path / "gallery.parquet")
        moved = changed(recipe, data={"corpus": str(tmp_path / "gallery.parquet")})
        few = Benchmark(benchmark.items[-len(table) :], benchmark.queries, benchmark.relevant)
        with pytest.raises(DataError, match=message):
            vectors_of(moved, few, found, lambda items, _: np.ones((len(items), 192), np.float32))


KILLED = """
import os, signal, sys
import numpy as np
from pipelines.recipe import Recipe
from pipelines.sweeping.cells import Cells
from pipelines.sweeping.vectors import Vectors
from slq.sweeps import cells_of
recipe = Recipe.model_validate_json(sys.stdin.read())
values = np.load(sys.argv[1])
number = 0
def told(cell):
    global number
    number += 1
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
cells = Cells(recipe, Vectors(values["gallery"], values["queries"], "", 0), told)
for cell in cells_of(recipe.sweep, 192):
    cells.searched(cell)
"""


def test_after_a_kill_only_cells_that_were_not_finished_are_searched(
    recipe: Recipe, truth: tuple[np.ndarray, ...], tmp_path: Path
) -> None:
    gallery, queries = (values.astype(np.float32) for values in truth[:2])
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    np.savez(tmp_path / "values.npz", gallery=gallery, queries=queries)
    killed = changed(recipe, storage={"dir": tmp_path / "killed"})
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "values.npz")],
        input=killed.model_dump_json(),
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == -9
    vectors, run = Vectors(gallery, queries, "", 0), []
    wanted = cells_of(recipe.sweep, 192)
    cells = Cells(killed, vectors, run.append)
    found = [cells.searched(cell) for cell in wanted]
    assert run == wanted[2:]
    whole = Cells(changed(recipe, storage={"dir": tmp_path / "whole"}), vectors)
    for one, cell in zip(found, wanted, strict=True):
        other = whole.searched(cell)
        assert (one.found.rows == other.found.rows).all()
        assert (one.found.scores == other.found.scores).all()
    cells.path(wanted[0]).write_bytes(b"PAR1")
    cells.searched(wanted[0])
    assert run == [*wanted[2:], wanted[0]]
    slower = changed(killed, sweep={**SWEEP, "num_threads": 2})
    assert Cells(slower, vectors).finished(wanted[1]) is None
    assert Cells(killed, Vectors(gallery, -queries, "", 0)).finished(wanted[1]) is None


def slq(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


def test_the_command_lists_its_cells_and_refuses_before_any_work(
    recipe: Recipe, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    values = recipe.model_dump(mode="json", include={"data", "adapter", "index", "storage"})
    file.write_text(json.dumps(values))
    before = fingerprints_of_files(recipe.storage.dir)
    shown = json.loads(slq(file, "--dry-run", "--json", "--set", "sweep.dimensions=[96]").stdout)
    plan = shown["plan"]
    assert plan["cells"][:2] == ["96 float32 flat", "96 float32 rabitq"]
    assert (plan["rows"], plan["items"]) == (32, SCENES.test + SCENES.unseen)
    for setting, message in {
        "sweep.dimensions=[193]": "cell '193 float32 flat' cannot be built",
        "index.num_lists=21": "cell '192 float32 rabitq' cannot be built: index.num_lists is 21",
        "sweep.depths=[21]": "depth 21 cannot be re-ranked",
        "rerank.profile=compat": "rerank.profile has no place in a sweep",
        "rerank.adaptive={}": "rerank.adaptive has no place in a sweep",
        f"storage.dir={tmp_path / 'none'}": "holds no adapter",
    }.items():
        for options in ([], ["--dry-run"]):
            done = slq(file, "--set", setting, *options)
            assert done.exit_code == 1, done.output
            assert message in " ".join(done.stderr.split()), setting
    assert fingerprints_of_files(recipe.storage.dir) == before


def test_a_sweep_without_an_adapter_or_with_too_few_items_says_so(
    recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="holds no adapter"):
        sweep(changed(recipe, storage={"dir": tmp_path}), price=1)
    with pytest.raises(ConfigError, match="'192 float32 rabitq' cannot be built"):
        sweep(changed(recipe, index={"num_lists": 21}, sweep={**SWEEP, "dimensions": ()}), price=1)


def test_times_that_differ_by_noise_put_no_row_on_the_front() -> None:
    base = {"embed_ms": 10.0, "fine_ms": 0.0, "bytes_per_vector": 4}
    rows = [{**base, "search_ms": 0.020, "hit@1": 0.5}, {**base, "search_ms": 0.021, "hit@1": 0.6}]
    assert [row["on_latency_front"] for row in priced(rows, 1.0)] == [False, True]


def test_a_cell_has_a_name_that_is_a_file() -> None:
    assert Cell(96, "int8", "rabitq").name == "96 int8 rabitq"
