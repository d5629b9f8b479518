"""Mining without Ray: tasks run in this process, and what the flow asks of Ray is kept."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.loading import backbone_of, encoder_of, untrained_adapter
from pipelines.mine import lay_out, mine, negatives_table, plan
from pipelines.mining_tasks import NONE, Asked, Gallery, Mined, embed_part, score_part, search_part
from pipelines.pairs import Pairs
from pipelines.recipe import MineConfig, Recipe, load_recipe
from slq.arrow import NEGATIVES, PAIRS
from slq.artifacts import save_adapter, trained_tensors
from slq.errors import ArtifactError, ArtifactMismatchError, ConfigError, DataError, StorageError
from slq.index import IndexConfig, build
from slq.media import decode_image
from slq.reranker import Reranker
from slq.schema import Item
from tests.integration.runs import changed, with_untrained_adapter

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Ref:
    """Stands for an object reference."""

    value: Any


class Recorder:
    """Stands for Ray: runs tasks at once in this process, and keeps how each was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], dict[str, Any], tuple[Any, ...]]] = []
        self.fetched: list[Any] = []

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        def bind(function: Callable[..., Any]) -> Any:
            def call(*arguments: Any) -> Any:
                self.calls.append((function, options, arguments))
                given = [a.value if isinstance(a, Ref) else a for a in arguments]
                result = function(*given)
                many = options.get("num_returns", 1) > 1
                return [Ref(part) for part in result] if many else Ref(result)

            return type("Task", (), {"remote": staticmethod(call)})

        return bind

    def get(self, refs: list[Ref]) -> list[Any]:
        self.fetched += refs
        return [ref.value for ref in refs]

    @staticmethod
    def wait(waiting: list[Ref], *, num_returns: int) -> tuple[list[Ref], list[Ref]]:
        return waiting[:num_returns], waiting[num_returns:]

    def of(self, function: Callable[..., Any]) -> list[tuple[dict[str, Any], tuple[Any, ...]]]:
        return [(options, args) for called, options, args in self.calls if called is function]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    import ray

    found = Recorder()
    for name, stand_in in (
        ("remote", found.remote),
        ("get", found.get),
        ("wait", found.wait),
        ("put", Ref),
    ):
        monkeypatch.setattr(ray, name, stand_in)
    return found


def scene_rows(recipe: Recipe) -> Rows:
    rows: Rows = pq.read_table(recipe.data.path("train")).to_pylist()
    return rows


def with_pairs(recipe: Recipe, folder: Path, rows: Rows, schema: pa.Schema = PAIRS) -> Recipe:
    """The recipe with other training pairs in a folder of their own, and an adapter without training."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "train.parquet")
    return with_untrained_adapter(changed(recipe, data={"dir": folder}))


def mined_rows(recipe: Recipe) -> Rows:
    rows: Rows = pq.read_table(recipe.data.path("negatives")).to_pylist()
    return rows


def test_the_flow_asks_for_gpus_where_the_model_runs_and_ships_no_pictures(
    tiny_run: Recipe, tmp_path: Path, recorder: Recorder
) -> None:
    rows = scene_rows(tiny_run)[:12]
    again = [row | {"id": f"again-{row['id']}", "text": f"here {row['text']}"} for row in rows]
    recipe = changed(
        with_pairs(tiny_run, tmp_path / "data", [*rows, *again]),
        mine={"depth": 6, "per_pair": 2, "margins": True, "max_share_of_positive": 5.0},
        resources={"gpus_per_worker": 0.5},
    )
    summary = mine(recipe)
    assert (summary["pairs"], summary["images"], summary["unreadable"]) == (24, 12, 0)
    embedded = recorder.of(embed_part)
    per_side = {
        side: [n for _, (_, numbers, of) in embedded if of == side for n in numbers.tolist()]
        for side in ("query", "positive")
    }
    assert per_side == {"query": list(range(12)), "positive": list(range(24))}
    kept = {"num_cpus": 1, "num_gpus": 0.5, "max_calls": 0}  # with the model that it has loaded
    assert all(o == {**kept, "num_returns": 2} for o, _ in embedded)
    assert all(o == kept for o, _ in recorder.of(score_part))
    assert all(o == {"num_cpus": 1} for o, _ in recorder.of(search_part))
    for _, options, arguments in recorder.calls:
        sent = [a for a in arguments if not isinstance(a, Ref)]
        assert len(pickle.dumps(sent)) < 20_000, options
    vectors = [args[3] for _, args in recorder.of(search_part)]
    assert not any(ref is fetched for ref in vectors for fetched in recorder.fetched)
    images = [n for _, (_, shown, _) in recorder.of(score_part) for n in shown.tolist()]
    assert len(images) == sum(1 + len(row["negatives"]) for row in mined_rows(recipe))
    changes = sum(a != b for a, b in pairwise(images))
    assert changes == len(set(images)) - 1, "an image's pairs stand together"


def test_a_broken_image_is_left_out_everywhere_and_too_many_are_refused(
    tiny_run: Recipe, tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    rows = scene_rows(tiny_run)[:10]
    rows[3]["image"] = b"no image"
    rows[5]["text"] = "  "
    recipe = with_pairs(tiny_run, tmp_path / "data", rows)
    recipe = changed(
        recipe,
        train={"max_error_share": 0.2},
        mine={"depth": 10, "per_pair": 9, "max_share_of_positive": 9.0},
    )
    summary = mine(recipe)
    assert (summary["pairs"], summary["images"], summary["unreadable"]) == (8, 8, 2)
    good = {row["id"] for n, row in enumerate(rows) if n not in (3, 5)}
    found = mined_rows(recipe)
    assert [row["id"] for row in found] == sorted(good)
    assert {name for row in found for name in row["negatives"]} <= good
    assert f"training pair {rows[3]['id']!r} is left out" in caplog.text
    with pytest.raises(DataError, match=rf"2 of 10 training pairs .* first '{rows[3]['id']}'"):
        mine(changed(recipe, train={"max_error_share": 0.1}))


def test_images_with_the_same_caption_are_never_negatives_of_it(
    tiny_run: Recipe, tmp_path: Path, recorder: Recorder
) -> None:
    rows = scene_rows(tiny_run)[:10]
    rows[7]["text"] = rows[2]["text"]
    recipe = changed(
        with_pairs(tiny_run, tmp_path / "data", rows),
        mine={"depth": 10, "per_pair": 9, "max_share_of_positive": 1000.0},
    )
    mine(recipe)
    for row, found in zip(rows, mined_rows(recipe), strict=True):
        assert set(found["negatives"]) == {r["id"] for r in rows if r["text"] != row["text"]}


def test_composed_queries_are_mined_and_those_of_one_image_are_no_negatives(
    tiny_run: Recipe, tmp_path: Path, recorder: Recorder
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for n, scene in enumerate(scene_rows(tiny_run)[:4]):
        (folder / f"{n}.png").write_bytes(scene["image"])
        for asked in ("what is here?", "which colour?"):
            rows.append(
                {
                    "id": f"{n}-{asked}",
                    "image_key": str(n),
                    "query_text": asked,
                    "query_uri": f"{n}.png",
                    "positive_text": f"{scene['text']} {asked}",
                    "positive_uri": None,
                }
            )
    schema = pa.schema([*[(name, pa.string()) for name in rows[0]]])
    recipe = changed(
        with_pairs(tiny_run, folder, rows, schema),
        mine={"depth": 8, "per_pair": 6, "margins": True, "max_share_of_positive": 1000.0},
    )
    assert mine(recipe)["images"] == 8
    for row in mined_rows(recipe):
        assert {name[0] for name in row["negatives"]} == set("0123") - {row["id"][0]}
        assert len(row["margins"]) == 1 + len(row["negatives"])


def test_a_search_equals_that_of_loops_over_all_vectors() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((30, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    captions = vectors[rng.permutation(30)] + 0.3 * rng.standard_normal((30, 8)).astype(np.float32)
    captions /= np.linalg.norm(captions, axis=1, keepdims=True)
    images = rng.integers(0, 20, size=30)
    gallery = Gallery(vectors, np.arange(30), images)
    places = rng.permutation(30)[:17]
    own = rng.integers(0, 30, size=17)
    right = [frozenset({int(images[row]), 3}) for row in own]
    config = MineConfig(depth=12, per_pair=3, max_share_of_positive=1.5)
    index = build(IndexConfig(), vectors)
    found = search_part(config, index, gallery, captions, Asked(places, own, right))
    doubtful = 0
    for n, place in enumerate(places):
        cosines = captions[place] @ vectors.T
        wanted = []
        for row in np.argsort(-cosines)[:12]:
            if images[row] in right[n]:
                continue
            if cosines[row] > 1.5 * cosines[own[n]]:
                doubtful += 1
            elif len(wanted) < 3:
                wanted.append(row)
        assert found.rows[n].tolist() == [*wanted, *[NONE] * (3 - len(wanted))]
        assert found.similarities[n, : len(wanted)] == pytest.approx(cosines[wanted])
    assert found.num_doubtful == doubtful


def test_the_table_has_the_public_schema_and_ragged_lists() -> None:
    found = Mined(
        np.array([[1, 0], [NONE, NONE], [2, NONE]]),
        np.array([[0.5, 0.25], [0, 0], [0.75, 0]], dtype=np.float32),
        0,
    )
    margins = np.array([[1, 2, 3], [4, np.nan, np.nan], [5, 6, np.nan]], dtype=np.float32)
    ids, stand_for, mined = ["a", "b", "c", "d"], np.array([0, 1, 3]), np.array([0, 1, 3])
    table = negatives_table(ids, stand_for, mined, found, margins)
    assert table.schema == NEGATIVES
    assert table.to_pylist() == [
        {"id": "a", "negatives": ["b", "a"], "similarities": [0.5, 0.25], "margins": [1, 2, 3]},
        {"id": "b", "negatives": [], "similarities": [], "margins": [4]},
        {"id": "d", "negatives": ["d"], "similarities": [0.75], "margins": [5, 6]},
    ]
    bare = negatives_table(ids, stand_for, mined, found, None)
    assert bare.schema == NEGATIVES
    assert bare["margins"].null_count == 3


def test_pairs_share_a_row_by_their_query_and_rows_name_their_first_readable_pair(
    tiny_run: Recipe, tmp_path: Path
) -> None:
    picture = scene_rows(tiny_run)[0]["image"]
    rows = [
        {"id": f"p{n}", "image_key": key, "image": picture, "text": text}
        for n, (key, text) in enumerate([("x", "a"), ("y", "b"), ("x", "c"), ("z", "b")])
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    layout = lay_out(Pairs(tmp_path / "pairs.parquet"), {0})
    assert layout.usable.tolist() == [1, 2, 3]
    assert layout.own.tolist() == [NONE, 0, 1, 2]
    assert layout.first.tolist() == [1, 2, 3]
    assert layout.images.tolist() == [0, 1, 0, 2]
    assert layout.right == {1: frozenset({1, 2}), 2: frozenset({0}), 3: frozenset({1, 2})}


def test_without_an_adapter_the_remedy_is_named(tiny_run: Recipe) -> None:
    with pytest.raises(ArtifactError, match="holds no adapter"):
        mine(tiny_run)


def test_an_adapter_of_another_weight_type_is_refused(tiny_run: Recipe, recorder: Recorder) -> None:
    recipe = changed(with_untrained_adapter(tiny_run), backbone={"dtype": "bfloat16"})
    with pytest.raises(ArtifactMismatchError, match="mine with the backbone section"):
        mine(recipe)


def test_pairs_that_cannot_be_mined_are_refused_before_any_work(
    tiny_run: Recipe, tmp_path: Path
) -> None:
    names = ("id", "query_text", "query_uri", "positive_text", "positive_uri")

    def pairs_of(*values: Any) -> Recipe:
        row = dict(zip(names, values, strict=True))
        schema = pa.schema([(name, pa.string()) for name in names])
        return with_pairs(tiny_run, tmp_path / "data", [row], schema)

    with pytest.raises(ConfigError, match="has positives with images; `slq mine` searches with"):
        mine(pairs_of("a", "a query", None, None, "a.png"))
    texts = changed(pairs_of("a", "a query", None, "an answer", None), mine={"margins": True})
    with pytest.raises(ConfigError, match=r"mine.margins: .* has queries without an image"):
        mine(texts)
    rows = scene_rows(tiny_run)[:3]
    rows[2]["id"] = rows[0]["id"]
    repeated = with_pairs(tiny_run, tmp_path / "data", rows)
    with pytest.raises(DataError, match=rf"'{rows[0]['id']}' stands there 2 times"):
        mine(repeated)
    rows[2]["id"] = None
    with pytest.raises(DataError, match="None stands there 1 times"):
        mine(with_pairs(tiny_run, tmp_path / "data", rows))
    with pytest.raises(DataError, match="holds no pairs"):
        mine(with_pairs(tiny_run, tmp_path / "data", []))
    few = changed(tiny_run, index={"kind": "ivf", "num_lists": 100})
    with pytest.raises(ConfigError, match=r"num_lists is 100, but .* only 64 images"):
        mine(with_untrained_adapter(few))
    with pytest.raises(ConfigError, match=r"data\.train: .* does not exist"):
        plan(changed(tiny_run, data={"train": "none.parquet"}))


def test_a_place_that_cannot_be_written_is_a_storage_error_and_keeps_the_old_file(
    tiny_run: Recipe, tmp_path: Path, recorder: Recorder
) -> None:
    recipe = with_pairs(tiny_run, tmp_path / "data", scene_rows(tiny_run)[:4])
    recipe = changed(recipe, mine={"depth": 3, "per_pair": 2})
    mine(recipe)
    written = recipe.data.path("negatives").read_bytes()
    partial = tmp_path / "data" / "negatives.parquet.partial"
    assert not partial.exists()
    partial.mkdir()
    with pytest.raises(StorageError, match=r"set data\.negatives to another place"):
        mine(recipe)
    assert recipe.data.path("negatives").read_bytes() == written


@pytest.mark.parametrize("method", ["slq", "lora"])
def test_margins_are_the_frozen_models_whatever_was_trained(
    tiny_run: Recipe, tmp_path: Path, recorder: Recorder, method: str
) -> None:
    rows = scene_rows(tiny_run)[:4]
    recipe = with_pairs(tiny_run, tmp_path / "data", rows)
    recipe = changed(recipe, mine={"depth": 4, "per_pair": 2, "margins": True})
    if method == "lora":
        recipe = changed(recipe, adapter={"method": "lora"})
        backbone = backbone_of(recipe)
        adapter = untrained_adapter(recipe, backbone)
        with torch.no_grad():
            for parameter in trained_tensors(adapter).values():
                parameter.add_(0.05)
        save_adapter(recipe.storage.adapter, backbone, adapter)
    mine(recipe)
    reranker = Reranker(backbone_of(recipe))
    for row, found in zip(rows, mined_rows(recipe), strict=True):
        own = (Item(text=row["text"]), Item(image=decode_image(row["image"])))
        assert found["margins"][0] == pytest.approx(reranker.score([own]).item(), abs=1e-4)


def test_the_file_names_the_adapter_that_mined(
    tiny_run: Recipe, tmp_path: Path, recorder: Recorder
) -> None:
    recipe = with_pairs(tiny_run, tmp_path / "data", scene_rows(tiny_run)[:4])
    mine(changed(recipe, mine={"depth": 3, "per_pair": 2}))
    metadata = pq.read_schema(recipe.data.path("negatives")).metadata
    assert metadata[b"fingerprint"].decode() == encoder_of(recipe).fingerprint


def test_more_negatives_than_images_looked_at_are_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "few.yaml"
    path.write_text("mine: {depth: 4, per_pair: 4}")
    with pytest.raises(ConfigError, match="per_pair is 4, but 4 images with the own one"):
        load_recipe(path)
