"""Mining on a local Ray finds what plain loops over the encoder and the re-ranker find."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.loading import backbone_of, encoder_of
from pipelines.mine import mine
from pipelines.recipe import Recipe
from slq.arrow import NEGATIVES, PAIRS
from slq.errors import ArtifactMismatchError, DataError
from slq.media import decode_image
from slq.reranker import Reranker
from slq.schema import Item
from tests.integration.runs import changed, with_untrained_adapter

pytestmark = [pytest.mark.ray, pytest.mark.slow]
DEPTH, PER_PAIR, SHARE = 12, 3, 0.98
BROKEN = 5


@pytest.fixture(scope="module")
def mined(
    ray_cluster: None, scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, list[dict[str, Any]], dict[str, Any]]:
    """24 scenes with two captions each, one of them broken, two with a caption in common; mined with margins."""
    folder = tmp_path_factory.mktemp("mine")
    rows = []
    for scene in pq.read_table(scenes_dir / "train.parquet").to_pylist()[:24]:
        rows += [scene, {**scene, "id": f"{scene['id']}-again", "text": f"see {scene['text']}"}]
    rows[2 * BROKEN]["image"] = rows[2 * BROKEN + 1]["image"] = b"no image"
    rows[11 * 2]["text"] = rows[3 * 2]["text"]
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), folder / "train.parquet")
    recipe = changed(
        Recipe(),
        data={"dir": folder},
        adapter={"num_latents": 4},
        train={"max_error_share": 0.05},
        mine={
            "depth": DEPTH,
            "per_pair": PER_PAIR,
            "max_share_of_positive": SHARE,
            "margins": True,
        },
        embed={"batch_size": 8},
        storage={"dir": folder / "run"},
    )
    recipe = with_untrained_adapter(recipe)
    return recipe, rows, mine(recipe)


def test_negatives_and_similarities_are_those_of_plain_loops(
    mined: tuple[Recipe, list[dict[str, Any]], dict[str, Any]],
) -> None:
    recipe, rows, summary = mined
    table = pq.read_table(recipe.data.path("negatives"))
    assert table.schema.remove_metadata() == NEGATIVES
    encoder = encoder_of(recipe)
    readable = [n for n in range(len(rows)) if n // 2 != BROKEN]
    images = [n for n in readable if n % 2 == 0]  # the first pair of each image stands for it
    gallery = encoder.encode([decode_image(rows[n]["image"]) for n in images])
    captions = encoder.encode([rows[n]["text"] for n in readable])
    found = table.to_pylist()
    assert [row["id"] for row in found] == [rows[n]["id"] for n in readable]
    doubtful = 0
    for n, vector, row in zip(readable, captions, found, strict=True):
        cosines = gallery @ vector
        own = cosines[images.index(n - n % 2)]
        same = {m - m % 2 for m in readable if rows[m]["text"] == rows[n]["text"]}
        wanted = []
        for column in np.argsort(-cosines, kind="stable")[:DEPTH]:
            if images[column] in same:
                continue
            if cosines[column] > SHARE * own:
                doubtful += 1
            elif len(wanted) < PER_PAIR:
                wanted.append(column)
        assert row["negatives"] == [rows[images[column]]["id"] for column in wanted]
        assert row["similarities"] == pytest.approx(cosines[wanted], abs=1e-5)
    counts = [len(row["negatives"]) for row in found]
    assert sum(counts) > 0
    assert doubtful > 0, "a case that shows nothing of the filter"
    assert summary == {
        "pairs": 46,
        "images": 23,
        "negatives_per_pair": pytest.approx(np.mean(counts)),
        "dropped_as_possible_answers": doubtful,
        "unreadable": 2,
        "seconds": summary["seconds"],
        "fingerprint": encoder.fingerprint,
        "file": str(recipe.data.path("negatives")),
    }


def test_margins_are_those_of_the_reranker(
    mined: tuple[Recipe, list[dict[str, Any]], dict[str, Any]],
) -> None:
    recipe, rows, _ = mined
    by_id = {row["id"]: row for row in rows}
    reranker = Reranker(backbone_of(recipe), framing=recipe.rerank.framing)
    for row in pq.read_table(recipe.data.path("negatives")).to_pylist():
        text = Item(text=by_id[row["id"]]["text"])
        shown = [
            Item(image=decode_image(by_id[name]["image"]))
            for name in (row["id"], *row["negatives"])
        ]
        margins = reranker.score([(text, image) for image in shown])
        assert row["margins"] == pytest.approx(margins.tolist(), abs=1e-4)


def test_an_inverted_index_that_visits_every_list_finds_the_same_without_margins(
    mined: tuple[Recipe, list[dict[str, Any]], dict[str, Any]],
) -> None:
    recipe, _, _ = mined
    exact = pq.read_table(recipe.data.path("negatives"))
    other = changed(
        recipe,
        index={"kind": "ivf", "num_lists": 4, "num_probes": 4},
        mine={"margins": False},
        data={"negatives": "ivf.parquet"},
    )
    mine(other)
    table = pq.read_table(other.data.path("negatives"))
    assert table["negatives"].to_pylist() == exact["negatives"].to_pylist()
    assert table["margins"].null_count == table.num_rows == exact.num_rows


def test_more_broken_pairs_than_training_accepts_end_the_run_and_keep_the_file(
    mined: tuple[Recipe, list[dict[str, Any]], dict[str, Any]],
) -> None:
    recipe, rows, _ = mined
    before = recipe.data.path("negatives").read_bytes()
    strict = changed(recipe, train={"max_error_share": 0.04})
    with pytest.raises(DataError, match=rf"2 of 48 training pairs .*{rows[2 * BROKEN]['id']}"):
        mine(strict)
    assert recipe.data.path("negatives").read_bytes() == before


def test_another_weight_type_is_refused_in_the_tasks(
    mined: tuple[Recipe, list[dict[str, Any]], dict[str, Any]],
) -> None:
    other = changed(mined[0], backbone={"dtype": "bfloat16"})
    with pytest.raises(ArtifactMismatchError, match="mine with the backbone section"):
        mine(other)
