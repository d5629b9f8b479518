"""Shards of captions without Ray: nothing leaks through, everything is accounted for, images and judges decide."""

import io
import json
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from jobs.karr import funnel_table, summary_lines
from jobs.report.karr_plot import write_funnel_plot
from pipelines.karr.build import plan
from pipelines.karr.endpoint import Endpoint
from pipelines.karr.export import export
from pipelines.karr.identifying import CosineIdentifier, FineIdentifier
from pipelines.karr.judges import Candidate, ClueJudge, FrozenJudge, Judge, ModelJudge
from pipelines.karr.kept import KeptAnswers
from pipelines.karr.models import Models, load_models
from pipelines.karr.neighbours import Neighbours, image_places
from pipelines.karr.rows import ROWS, ShardMaker
from pipelines.karr.source import (
    captions,
    mend_plan,
    planned_rows,
    read_captions,
    source_state,
    write_plan,
)
from pipelines.recipe import Recipe, load_recipe
from pipelines.storage import open_store
from slq.arrow import vector_column
from slq.errors import ArtifactError, ArtifactMismatchError, ConfigError, DataError
from slq.karr.categories import CATEGORIES
from slq.karr.config import EndpointConfig, JudgeConfig, KarrConfig
from slq.karr.lexicon import Lexicon
from slq.karr.reasons import Funnel, RejectedError
from slq.karr.rewriting import ClueRewriter, Completion, ModelRewriter, Source
from slq.karr.targets import Rewriting, Target
from slq.scenes import load_sprites
from slq.schema import Item
from tests.integration.runs import changed
from tests.language_server import BAD_WORDS, LanguageServer, serving

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"


@pytest.fixture
def recipe(scenes_dir: Path, tmp_path: Path) -> Recipe:
    return changed(
        Recipe(),
        data={"dir": scenes_dir},
        karr={"kinds": ("explicit",), "shard_rows": 10},
        storage={"dir": tmp_path / "run"},
    )


def leaks(row: dict[str, Any]) -> bool:
    """Whether a new caption says its target's name, with none of our own code: letters in a row, lower case."""
    sprite = next(one for one in load_sprites().values() if row["target"] in (one.name, one.plural))
    letters = "".join(sign for sign in row["caption"].lower() if sign.isalnum() or sign == " ")
    return any(f" {word} " in f" {letters} " for word in (sprite.name, sprite.plural))


def test_the_clue_table_makes_a_row_of_each_caption(recipe: Recipe) -> None:
    found = captions(recipe)
    models = Models(ClueRewriter(), [ClueJudge("table")], Lexicon(), sprites=load_sprites())
    rows = ShardMaker(recipe.karr, models, 1.0).made(found)
    assert [row["source_id"] for row in rows] == [row["source_id"] for row in found]
    assert pa.Table.from_pylist(rows, schema=ROWS).num_rows == 32
    assert [row["reason"] for row in rows] == [None] * 32
    assert not any(map(leaks, rows))
    for row in rows:
        assert row["caption"].replace(row["clue"], "") != row["caption"]
        assert row["category"] in CATEGORIES
        assert row["votes"] == [{"judge": "table", "accept": True, "margin": None}]
        assert row["lead"] is None
        assert row["original"][row["start"] :].startswith(row["phrase"])


def test_a_bad_server_gets_nothing_through_and_all_is_accounted_for(
    recipe: Recipe, tmp_path: Path
) -> None:
    found = [
        {
            **row,
            "row": number,
            "source_id": f"{number}",
            "caption": f"{row['caption']}, page {number}",
        }
        for number, row in enumerate(captions(recipe) * 4)
    ]
    config = KarrConfig.parse({"rewriter": {"tries": 2}}, source="karr")
    assert isinstance(config, KarrConfig)
    with serving(LanguageServer(faults=0.06, lost=0.1, bad=0.7, slow_s=1.3, seed=5)) as server:
        settings = EndpointConfig(url=server.url, timeout_s=1.0, attempts=2, concurrency=8)
        kept = KeptAnswers(Endpoint(settings, sleep=lambda _: None), open_store(tmp_path))
        judge = ModelJudge(JudgeConfig(name="llm", kind="clues"), kept, 0, 4)
        models = Models(
            ModelRewriter(kept),
            [judge],
            Lexicon(),
            kept,
            sprites=load_sprites(),
            threads=8,
            answers=[kept],
        )
        rows = ShardMaker(config, models, 1.0).made(found)
    funnel = Funnel.of(row["reason"] for row in rows)
    assert funnel.num_in == 128
    assert 20 < funnel.num_out < 100
    seen = {reason for reason, count in funnel.rejected.items() if count}
    assert seen >= {
        "unanswered",
        "unparseable",
        "names_target",
        "changes_rest",
        "other_object",
        "judges",
    }
    assert set(server.answered) == {"good", *BAD_WORDS}
    kept_rows = [row for row in rows if row["reason"] is None]
    assert not any(map(leaks, kept_rows))
    for row in kept_rows:
        assert "<" not in row["caption"]
        assert row["prompt_hash"]
        assert row["tries"] in (1, 2)
        assert row["checks"][-1] == "unnamed_by_model"
        assert row["original"].replace(row["phrase"], row["clue"]) == row["caption"]
    assert all(row["detail"] for row in rows if row["reason"] is not None)
    assert models.counts()["asked"] > 200


def test_images_that_cannot_be_read_are_counted_before_anything_is_asked(
    recipe: Recipe, tmp_path: Path
) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, format="PNG")
    table = [
        {"id": "good", "image": picture.getvalue(), "text": "a dog"},
        {"id": "torn", "image": b"\x89PNG no image", "text": "a dog"},
        {"id": "none", "image": None, "text": "a dog"},
        {"id": "mute", "image": picture.getvalue(), "text": "  "},
        {"id": "plain", "image": picture.getvalue(), "text": "nothing to see"},
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "pairs.parquet")
    found = captions(changed(recipe, karr={"captions": tmp_path / "pairs.parquet"}))
    assert [row["reason"] for row in found] == [None, None, "unreadable_image", "no_caption", None]
    models = Models(ClueRewriter(), [], Lexicon(), sprites=load_sprites())
    rows = ShardMaker(recipe.karr, models, 1.0).made(found)
    assert [row["reason"] for row in rows] == [
        None, "unreadable_image", "unreadable_image", "no_caption", "no_entity",
    ]  # fmt: skip
    assert "none of JPEG, PNG, WEBP" in rows[1]["detail"]


@pytest.mark.parametrize("identified", [False, True])
def test_an_image_that_breaks_off_is_rejected_whoever_judges(
    recipe: Recipe, tmp_path: Path, identified: bool
) -> None:
    whole = noise()
    table = [
        {"id": "whole", "image": whole, "text": "a dog"},
        {"id": "torn", "image": whole[: len(whole) // 2], "text": "a dog"},
    ]
    with Image.open(io.BytesIO(table[1]["image"])) as opened:
        assert opened.size == (64, 64)  # the header is whole
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "pairs.parquet")
    found = captions(changed(recipe, karr={"captions": tmp_path / "pairs.parquet"}))
    places = neighbours(tmp_path, {"whole": [1, 0], "torn": [0, 1]}, 1, unreadable="torn")
    models = Models(
        ClueRewriter(),
        [ClueJudge("table"), FrozenJudge(JudgeConfig(name="red", min_margin=-999), Brightness())],  # type: ignore[arg-type]
        Lexicon(),
        identifier=CosineIdentifier(recipe, places, of_one(1.0, 0.0)) if identified else None,
        sprites=load_sprites(),
    )
    rows = ShardMaker(recipe.karr, models, 1.0).made(found)
    assert [row["reason"] for row in rows] == [None, "unreadable_image"]
    assert "cannot be decoded" in rows[1]["detail"]
    assert [len(row["votes"]) for row in rows] == [2, 0]


def pairs_of_files(folder: Path, names: Sequence[str], key: str | None = None) -> Path:
    """A table of captions whose images are files beside it; makes none of those."""
    table = [
        {"id": name, "uri": f"{name}.png", "text": "a dog", "image_key": key or name}
        for name in names
    ]
    pq.write_table(pa.Table.from_pylist(table), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def test_a_plan_is_mended_where_images_were_put_back(recipe: Recipe, tmp_path: Path) -> None:
    asked = changed(recipe, karr={"captions": pairs_of_files(tmp_path, "abcd"), "shard_rows": 3})
    for name in "bd":
        (tmp_path / f"{name}.png").write_bytes(picture("red"))
    store = open_store(tmp_path / "run")
    before = captions(asked)
    assert [row["reason"] for row in before] == ["unreadable_image", None] * 2
    write_plan(store, before, 3)
    (tmp_path / "a.png").write_bytes(picture("red"))
    (tmp_path / "d.png").unlink()  # was planned, and is counted when its shard is made
    mend_plan(asked, store)
    planned = read_captions(store)
    assert [row["reason"] for row in planned] == [None, None, "unreadable_image", None]
    assert planned[0]["uri"] == str(tmp_path / "a.png")
    assert [row["row"] for row in planned] == [0, 1, 2, 3]
    assert planned_rows(store) == [3, 1]
    rows = ShardMaker(recipe.karr, Models(ClueRewriter(), [], Lexicon()), 1.0).made(planned)
    wanted = [None, None, "unreadable_image", "unreadable_image"]
    assert [row["reason"] for row in rows] == wanted
    assert planned[1] == before[1]


def test_mended_images_get_no_more_captions_than_others(recipe: Recipe, tmp_path: Path) -> None:
    path = pairs_of_files(tmp_path, "abc", key="one image")
    asked = changed(recipe, karr={"captions": path})
    store = open_store(tmp_path / "run")
    write_plan(store, captions(asked), 3)
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(picture("red"))
    mend_plan(asked, store)
    reasons = [None, "further_caption", "further_caption"]
    assert [row["reason"] for row in read_captions(store)] == reasons


def test_other_captions_cannot_be_mended(recipe: Recipe, tmp_path: Path) -> None:
    asked = changed(recipe, karr={"captions": pairs_of_files(tmp_path, "abc")})
    (tmp_path / "b.png").write_bytes(picture("red"))
    store = open_store(tmp_path / "run")
    write_plan(store, captions(asked), 3)
    for names, first in (("acb", "b"), ("ab", "c"), ("abcd", "d")):
        pairs_of_files(tmp_path, names)
        with pytest.raises(
            ArtifactMismatchError, match=rf"the captions have changed .*, first '{first}'"
        ):
            mend_plan(asked, store)
    assert [row["source_id"] for row in read_captions(store)] == ["a", "b", "c"]


def test_captions_of_one_image_beyond_the_first_are_left_out(
    recipe: Recipe, scenes_dir: Path, tmp_path: Path
) -> None:
    rows = pq.read_table(scenes_dir / "gallery.parquet").slice(0, 2).to_pylist()
    table = [
        {
            "id": f"{row['id']}-{n}",
            "image": row["image"],
            "image_key": row["id"],
            "text": f"a dog, {n}",
        }
        for row in rows
        for n in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "pairs.parquet")
    asked = changed(recipe, karr={"captions": tmp_path / "pairs.parquet", "captions_per_image": 2})
    assert [row["reason"] for row in captions(asked)] == [None, None, "further_caption"] * 2
    assert {row["item_id"] for row in captions(asked)} == {row["id"] for row in rows}


def test_a_caption_must_belong_to_one_image(
    recipe: Recipe, scenes_dir: Path, tmp_path: Path
) -> None:
    relevance = pq.read_table(scenes_dir / "relevance.parquet").to_pylist()
    first, second = (row for row in relevance[:4] if row["query_id"].endswith("explicit"))
    more = [{**first, "item_id": second["item_id"]}]
    less = [row for row in relevance if row != second]
    path = tmp_path / "relevance.parquet"
    pq.write_table(pa.Table.from_pylist([*less, *more]), path)
    found = captions(changed(recipe, data={"relevance": path}))
    odd = {row["source_id"]: row["detail"] for row in found if row["reason"] == "not_one_image"}
    assert odd == {first["query_id"]: "2 images", second["query_id"]: "0 images"}
    pq.write_table(pa.Table.from_pylist([{**first, "item_id": "nowhere"}]), path)
    with pytest.raises(DataError, match="-> nowhere names no item of the corpus"):
        captions(changed(recipe, data={"relevance": path}))


def test_captions_that_cannot_be_used_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no caption of kinds riddle"):
        captions(changed(recipe, karr={"kinds": ("riddle",)}))
    with pytest.raises(ConfigError, match=r"relevance.*does not exist"):
        source_state(changed(recipe, data={"relevance": tmp_path / "nowhere.parquet"}))
    with pytest.raises(ConfigError, match=r"karr\.captions: .*nowhere\.parquet does not exist"):
        source_state(changed(recipe, karr={"captions": tmp_path / "nowhere.parquet"}))
    path = tmp_path / "twice.parquet"
    pq.write_table(pa.Table.from_pylist([{"id": "a", "image": b"x", "text": "a dog"}] * 2), path)
    with pytest.raises(DataError, match="id 'a' stands twice among the captions"):
        captions(changed(recipe, karr={"captions": path}))


def test_the_plan_is_read_as_it_was_written_and_the_first_ones_stays(
    recipe: Recipe, tmp_path: Path
) -> None:
    store, rows = open_store(tmp_path), captions(recipe)
    write_plan(store, rows, 10)
    write_plan(store, rows[:3], 2)
    assert planned_rows(store) == [10, 10, 10, 2]
    assert read_captions(store) == rows
    assert read_captions(store, 3) == rows[30:]
    (tmp_path / "plan.parquet").write_bytes(b"no table")
    with pytest.raises(ArtifactError, match=r"plan in .* cannot be read"):
        planned_rows(store)


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def noise() -> bytes:
    """A picture of as many bytes as its pixels have."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def of_one(*direction: float) -> Any:
    """An encoder that gives every text the same vector."""
    return lambda items: torch.tensor([direction] * len(items))


def candidate(number: int, item_id: str, caption: str, colour: str = "red") -> Candidate:
    rewriting = Rewriting(caption, caption, "encyclopaedic")
    return Candidate(
        Source(number, "a dog"), item_id, Target("dog", 0, 5), rewriting, picture(colour)
    )


def neighbours(
    folder: Path, vectors: dict[str, list[float]], count: int, unreadable: str = ""
) -> Neighbours:
    matrix = np.array(list(vectors.values()), dtype=np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    readable = [name != unreadable for name in vectors]
    table = pa.table({"id": list(vectors), "readable": readable, "vector": vector_column(matrix)})
    pq.write_table(table, folder / "vectors.parquet")
    return Neighbours(open_store(folder), count)


SPACE = {"a": [1, 0, 0], "b": [0.9, 0.4, 0], "c": [0.8, 0, 0.6], "d": [-1, 0, 0.1], "e": [0, 1, 0]}


def test_neighbours_are_the_nearest_images(tmp_path: Path) -> None:
    found = neighbours(tmp_path, SPACE, 2)
    assert [found.ids[place] for place in found.around("a")] == ["a", "b", "c"]
    assert [found.ids[place] for place in found.around("d")] == ["d", "e", "c"]
    assert len(neighbours(tmp_path, SPACE, 99).around("a")) == 5
    assert neighbours(tmp_path, SPACE, 2, unreadable="b").around("b") == []
    assert neighbours(tmp_path, {"a": [1, 0]}, 2, unreadable="a").around("a") == []
    with pytest.raises(ArtifactError, match=r"vectors.parquet cannot be read"):
        Neighbours(open_store(tmp_path / "nowhere"), 2)


def test_a_caption_must_lead_over_its_images_neighbours(recipe: Recipe, tmp_path: Path) -> None:
    directions = {"of a": [1.0, 0, 0], "of b": [0.5, 0.86, 0], "of all": [1.0, 0.2, 0.35]}

    def encode(items: Sequence[Item]) -> torch.Tensor:
        rows = torch.tensor([directions[str(item.text)] for item in items])
        return rows / rows.norm(dim=1, keepdim=True)

    found = neighbours(tmp_path, SPACE, 2)
    asked = [
        candidate(0, "a", "of a"),
        candidate(1, "a", "of b"),
        candidate(2, "a", "of all"),
        candidate(3, "x", "of a"),
    ]
    *leads, unknown = CosineIdentifier(recipe, found, encode).leads(asked)
    assert leads[0] > 0 > leads[1]
    by_hand = np.array([1.0, 0.2, 0.35]) / np.linalg.norm([1.0, 0.2, 0.35])
    unit = {name: np.array(row) / np.linalg.norm(row) for name, row in SPACE.items()}
    expected = by_hand @ unit["a"] - max(by_hand @ unit["b"], by_hand @ unit["c"])
    assert leads[2] == pytest.approx(float(expected), abs=1e-6)
    assert isinstance(unknown, RejectedError)
    assert (unknown.reason, str(unknown)) == (
        "unreadable_image",
        "image of x could not be read when images were embedded",
    )
    alone = neighbours(tmp_path, {"a": [1, 0, 0]}, 2)
    assert CosineIdentifier(recipe, alone, encode).leads(asked[:1]) == [None]


def test_what_has_no_neighbour_to_compare_with_is_kept_and_told_in_strict_json(
    recipe: Recipe, tmp_path: Path
) -> None:
    found = captions(recipe)[:2]
    readable, unreadable = (row["item_id"] for row in found)
    places = neighbours(tmp_path, {readable: [1, 0], unreadable: [0, 1]}, 2, unreadable=unreadable)
    identifier = CosineIdentifier(recipe, places, of_one(1.0, 0.0))
    models = Models(ClueRewriter(), [], Lexicon(), identifier=identifier)
    first, second = ShardMaker(recipe.karr, models, 1.0).made(found)
    assert (first["reason"], first["lead"]) == (None, None)
    assert not any(check.startswith("identified") for check in first["checks"])  # nothing was
    assert (second["reason"], second["lead"]) == ("unreadable_image", None)
    assert unreadable in second["detail"]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for lead in (None, float("inf")):  # as rows of older folders have it
        rows = [{**first, "lead": lead, "annotations": []}]
        export(tmp_path / "benchmark", rows, [(readable, first["uri"])], 1.0)
        line = (tmp_path / "benchmark" / "karr.jsonl").read_text()
        assert json.loads(line, parse_constant=refuse)["lead"] is None
        table = pq.read_table(tmp_path / "benchmark" / "karr.parquet")
        assert table["lead"].to_pylist() == [None]


def test_only_captions_in_use_say_where_images_are() -> None:
    rows = [
        {"item_id": "a", "uri": "a.png", "reason": None},
        {"item_id": "a", "uri": None, "reason": "not_one_image"},
        {"item_id": "b", "uri": "pairs.parquet#row=3", "reason": "unreadable_image"},
    ]
    assert image_places(rows) == {"a": "a.png"}


class Brightness:
    """Scores a pair by how red its image is; texts decide whether that is good."""

    def score(self, pairs: Sequence[tuple[Item, Item]]) -> torch.Tensor:
        found = []
        for query, item in pairs:
            assert item.image is not None
            red = float(np.asarray(item.image)[..., 0].mean())
            found.append(
                red if query.text == "red" else float("nan") if query.text == "odd" else -red
            )
        return torch.tensor(found)


def test_the_fine_stage_compares_an_image_with_its_neighbours(
    recipe: Recipe, tmp_path: Path
) -> None:
    colours = {"a": "#ff0000", "b": "#800000", "c": "#200000", "d": "#00ff00", "e": "#0000ff"}
    uris = {}
    for name, colour in colours.items():
        (tmp_path / f"{name}.png").write_bytes(picture(colour))
        uris[name] = str(tmp_path / f"{name}.png")
    identifier = FineIdentifier(recipe, neighbours(tmp_path, SPACE, 2), Brightness(), uris)  # type: ignore[arg-type]
    asked = [
        candidate(0, "a", "red"),
        candidate(1, "a", "dark"),
        candidate(2, "a", "odd"),
        candidate(3, "x", "red"),
    ]
    *leads, unknown = identifier.leads(asked)
    assert leads == [255 - 128, -255 + 32, -np.inf]
    assert isinstance(unknown, RejectedError)
    for change in (lambda path: path.write_bytes(b"gone bad"), Path.unlink):
        change(tmp_path / "c.png")
        (lead,) = identifier.leads(asked[:1])
        assert isinstance(lead, RejectedError)
        assert lead.reason == "unreadable_image"
        assert str(lead).startswith("image of c: ")
    alone = neighbours(tmp_path, {"a": [1, 0, 0]}, 2)
    assert FineIdentifier(recipe, alone, Brightness(), uris).leads(asked[:1]) == [None]  # type: ignore[arg-type]


def test_leads_and_votes_reject(recipe: Recipe, tmp_path: Path) -> None:
    class Leads:
        def leads(self, candidates: Sequence[Candidate]) -> list[float]:
            return [1.0 if one.source.row % 2 else 0.0 for one in candidates]

    class Votes:
        def __init__(self, name: str, period: int) -> None:
            self.name, self.period = name, period

        def votes(self, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
            accepts = [
                None if one.source.row == 3 else bool(one.source.row % self.period)
                for one in candidates
            ]
            return [{"judge": self.name, "accept": accept, "margin": None} for accept in accepts]

    models = Models(ClueRewriter(), [Votes("x", 5), Votes("y", 7)], Lexicon(), identifier=Leads())
    rows = ShardMaker(recipe.karr, models, 1.0).made(captions(recipe))
    for row in rows:
        number = row["row"]
        accepts = bool(number % 5) + bool(number % 7)
        expected = (
            "not_identified"
            if number % 2 == 0
            else "unanswered"
            if number == 3
            else None
            if accepts >= 1
            else "judges"
        )
        assert row["reason"] == expected, number
        assert row["lead"] is not None
        assert bool(row["votes"]) == bool(number % 2)
    strict = ShardMaker(recipe.karr.model_copy(update={"min_accept_share": 0.51}), models, 1.0)
    assert Counter(row["reason"] for row in strict.made(captions(recipe)))["judges"] >= 5


def test_a_frozen_judge_accepts_from_its_margin_on() -> None:
    judge = FrozenJudge(JudgeConfig(name="red", min_margin=200), Brightness())  # type: ignore[arg-type]
    asked = [
        candidate(0, "a", "red", "#ff0000"),
        candidate(1, "a", "red", "#800000"),
        candidate(2, "a", "odd"),
    ]
    assert judge.votes(asked) == [
        {"judge": "red", "accept": True, "margin": 255.0},
        {"judge": "red", "accept": False, "margin": 128.0},
        {"judge": "red", "accept": None, "margin": None},
    ]


def test_a_judge_that_is_not_reached_leaves_the_others_no_decision(
    recipe: Recipe, tmp_path: Path
) -> None:
    with serving(LanguageServer()) as server:
        pass  # it is down
    settings = EndpointConfig(url=server.url, attempts=2)
    down = KeptAnswers(Endpoint(settings, sleep=lambda _: None), open_store(tmp_path))
    named = JudgeConfig(name="llm", kind="clues")
    judges: list[Judge] = [ClueJudge("table"), ModelJudge(named, down, 0, 4)]
    models = Models(ClueRewriter(), judges, Lexicon(), sprites=load_sprites())
    rows = ShardMaker(recipe.karr, models, 1.0).made(captions(recipe)[:4])
    assert [row["reason"] for row in rows] == ["unanswered"] * 4
    detail = "judge llm: 2 requests failed, the last one: ConnectError"
    assert {row["detail"] for row in rows} == {detail}

    class Rambling:
        name = "llm"

        def settings(self, seed: int) -> dict[str, Any]:
            return {"seed": seed}

        def complete(self, chat: Any, seed: int) -> Completion:
            return Completion("Well, ", "", "")

    models.judges[1] = ModelJudge(named, Rambling(), 0, 4)
    rows = ShardMaker(recipe.karr, models, 1.0).made(captions(recipe)[:4])
    assert [row["reason"] for row in rows] == [None] * 4
    assert [vote["accept"] for vote in rows[0]["votes"]] == [True, None]


def test_a_judge_that_sees_gets_the_image(tmp_path: Path) -> None:
    with serving(LanguageServer()) as server:
        kept = KeptAnswers(Endpoint(EndpointConfig(url=server.url)), open_store(tmp_path))
        endpoint = {"url": server.url}
        config = JudgeConfig.parse(
            {"name": "eye", "kind": "endpoint", "endpoint": endpoint, "with_image": True},
            source="judge",
        )
        assert isinstance(config, JudgeConfig)
        assert (
            len(ModelJudge(config, kept, 0, 2).votes([candidate(0, "a", "the animal that barks")]))
            == 1
        )
    text, image = server.bodies[0]["messages"][1]["content"]
    assert text["type"] == "text"
    assert image["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_dry_run_says_how_much_would_be_asked(recipe: Recipe, tmp_path: Path) -> None:
    asked = {"kind": "endpoint", "endpoint": {"model": "m"}, "tries": 3, "ask_whether_named": True}
    judges = [
        {"name": "table", "kind": "clues"},
        {"name": "m", "kind": "endpoint", "endpoint": {"model": "m"}},
    ]
    found = plan(changed(recipe, karr={"rewriter": asked, "judges": judges}))
    assert (found["captions"], found["shards"], found["rewriter"]) == (32, 4, "m")
    assert found["questions"] == 32 * (3 + 1)
    assert found["questions_at_most"] == 32 * (3 * 3 + 1)
    assert plan(recipe)["questions"] == 0
    shown = CliRunner().invoke(
        app,
        [
            "karr",
            str(RECIPES / "karr.yaml"),
            "--dry-run",
            "--json",
            "--set",
            f"data.dir={tmp_path}",
        ],
    )
    assert shown.exit_code == 0, shown.output
    assert '"captions": 640' in shown.output
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_holds_its_images_as_bytes_and_as_files_and_no_others(
    recipe: Recipe, tmp_path: Path
) -> None:
    models = Models(ClueRewriter(), [], Lexicon(), sprites=load_sprites())
    rows = ShardMaker(recipe.karr, models, 1.0).made(captions(recipe))
    rows = [{**row, "annotations": []} for row in rows]
    gallery = [(row["item_id"], row["uri"]) for row in rows]
    folder = tmp_path / "benchmark"
    for kept in (rows, rows[:5]):  # the second as after a review
        export(folder, kept, gallery, 1.0)
        table = pq.read_table(folder / "karr.parquet").to_pylist()
        lines = [json.loads(line) for line in (folder / "karr.jsonl").read_text().splitlines()]
        assert len(table) == len(lines) == len(kept)
        for row, line in zip(table, lines, strict=True):
            assert (folder / line["image"]).read_bytes() == row["image"]
            assert {name: row[name] for name in line if name != "image"} == {
                name: value for name, value in line.items() if name != "image"
            }
        files = {f"images/{path.name}" for path in (folder / "images").iterdir()}
        assert files == {line["image"] for line in lines}
    assert pq.read_table(folder / "gallery.parquet").num_rows == 32
    gone = [{**rows[0], "uri": str(tmp_path / "gone.png")}]
    with pytest.raises(DataError, match=r"gone.png is gone since its caption was worded anew"):
        export(folder, gone, [], 1.0)


def test_models_are_loaded_once_and_from_the_root_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, endpoint = {"name": "models/small"}, {"model": "m"}
    judges = [
        {"name": "same", "kind": "endpoint", "endpoint": endpoint},
        {"name": "other", "kind": "endpoint", "endpoint": {"model": "n"}},
        {"name": "here", "kind": "local", "local": local},
    ]
    (tmp_path / "models" / "small").mkdir(parents=True)
    path = tmp_path / "recipe.yaml"
    rewriter = {
        "kind": "endpoint",
        "endpoint": {**endpoint, "concurrency": 6},
        "ask_whether_named": True,
    }
    path.write_text(yaml.safe_dump({"karr": {"rewriter": rewriter, "judges": judges}}))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    here = recipe.karr.judges[2].local
    assert here is not None
    assert here.name == str((tmp_path / "models" / "small").resolve())
    with pytest.raises(ConfigError, match=r"model .*models/small.* cannot be loaded"):
        load_models(recipe, open_store(tmp_path), 2)
    fewer = changed(recipe, karr={"judges": judges[:2]})
    found = load_models(fewer, open_store(tmp_path), 2)
    assert found.threads == 3
    assert found.asked_whether_named is found.rewriter.language_model  # type: ignore[attr-defined]
    assert len(found.answers) == 3  # its concurrency makes the rewriter's endpoint another one
    assert found.sprites is None
    assert load_models(
        changed(recipe, karr={"judges": [], "rewriter": {}}), open_store(tmp_path), 1
    ).sprites


def test_the_commands_help_has_an_example() -> None:
    shown = CliRunner().invoke(app, ["karr", "--help"])
    assert "slq karr jobs/recipes/karr.yaml" in shown.output


def result() -> dict[str, Any]:
    funnel = Funnel.of(
        [None] * 60 + ["names_target"] * 9 + ["changes_rest"] * 7 + ["judges"] * 24
    ).to_json()
    shares = {name: {"count": 10, "share": 1 / 6} for name in CATEGORIES}
    votes = {
        "rows": 84, "judges": 3, "rows_with_two_votes": 84, "percent_agreement": 0.8, "fleiss_kappa": None,
        "krippendorff_alpha": 0.4,
    }  # fmt: skip
    return {
        "funnel": funnel,
        "categories": shares,
        "agreement": {"judges": votes},
        "notes": {"identify": "switched off"},
        "cost": {"answers_asked": 12, "answers_kept": 3},
    }


def test_what_is_shown_tells_the_numbers_and_what_was_not_checked(tmp_path: Path) -> None:
    found = result()
    table = funnel_table(found)
    assert table.row_count == 9
    assert list(table.columns[2].cells)[4] == "9 names_target, 7 changes_rest"
    lines = summary_lines(found)
    assert "tool_use 16.7%" in lines[0]
    assert (
        lines[1] == "3 judges on 84 candidates: percent agreement 0.800, Krippendorff's alpha 0.400"
    )
    assert lines[2:] == ["answers: 12 asked for, 3 kept from before", "identify: switched off"]
    first = write_funnel_plot(found, tmp_path / "a.png").read_bytes()
    assert first == write_funnel_plot(found, tmp_path / "b.png").read_bytes()
    with Image.open(io.BytesIO(first)) as drawn:
        assert drawn.width > 1500


def test_captions_are_worded_at_once_as_far_as_the_endpoint_may_be_asked(
    recipe: Recipe, tmp_path: Path
) -> None:
    barrier = threading.Barrier(4, timeout=5)

    class Meeting(ClueRewriter):
        def choose(self, source: Source, trace: Any) -> Target:
            barrier.wait()
            return super().choose(source, trace)

    models = Models(Meeting(), [], Lexicon(), threads=4)
    rows = ShardMaker(recipe.karr, models, 1.0).made(captions(recipe))
    assert [row["reason"] for row in rows] == [None] * 32
