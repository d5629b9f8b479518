"""The fine stage of the service, without its deployments: what is read, scored, and told of the rest."""

import asyncio
import base64
import io
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.contents import Content
from pipelines.loading import reranker_of
from pipelines.messages import RerankRequest
from pipelines.recipe import Recipe, RerankConfig
from pipelines.serving import fine
from pipelines.serving.candidates import Candidates, Stored
from pipelines.serving.fine import FineStage, Outcome
from pipelines.serving.index_service import Found
from slq.backbones.base import Backbone
from slq.errors import DataError
from slq.index import Hit
from slq.reranker import Ranked, Reranker
from slq.reranking.depth import AdaptiveDepth
from slq.reranking.profiles import PROFILES
from slq.schema import Item
from tests.families import BUILDERS, picture
from tests.integration.runs import changed

QUERY = Item(text="a small red dog")
SECRET = "secret-folder"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return BUILDERS["qwen3_vl"]()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """An image, a text, both, an image whose file is gone, a file that is no image, nothing, and another image."""
    folder = tmp_path / SECRET
    folder.mkdir()
    for n in (0, 2, 6):
        (folder / f"{n}.png").write_bytes(png(picture(2, 2, n)))
    (folder / "4.png").write_bytes(b"<html></html>")
    files = [0, None, 2, 3, 4, None, 6]
    texts = [None, "two blue cats", "a red dog", "a caption of what is gone", None, None, None]
    kinds = ["image", "text", "image+text", "image+text", "image", "text", "image"]
    return [
        {
            "uri": None if n is None else str(folder / f"{n}.png"),
            "text": text,
            "modality": kind,
        }
        for n, text, kind in zip(files, texts, kinds, strict=True)
    ]


def found(rows: list[dict[str, Any]]) -> Found:
    hits = [Hit(f"i{n}", 0.9 - n / 10) for n in range(len(rows))]
    return Found(hits, rows, "v000001", 1, 1, "3f2a", "3f2a")


class Handle:
    """Stands where the handle of the backbone stands: ranks with a reranker, and keeps what it was asked."""

    def __init__(self, reranker: Reranker) -> None:
        self.reranker, self.asked = reranker, list[dict[str, Any]]()
        self.rank = self

    def remote(self, query: Item, candidates: Any, coarse: Any, **options: Any) -> Awaitable[Any]:
        options.pop("told")
        self.asked.append(options)

        async def answer() -> list[Ranked]:
            return self.reranker.rank(query, Candidates(candidates), coarse, **options)

        return answer()


def searched(handle: Handle, given: Found, depth: int, **options: Any) -> Outcome:
    stage: Any = FineStage(handle, **options)
    outcome: Outcome = asyncio.run(stage.search(QUERY, given, depth))
    return outcome


# ---- what is read ----


def test_a_stored_item_is_read_as_it_was_embedded(rows: list[dict[str, Any]]) -> None:
    image, text, both = (Stored.of_row(row).item() for row in rows[:3])
    assert (image.modality, text.modality, both.modality) == ("image", "text", "image+text")
    assert text.text == "two blue cats"
    assert image.image is not None
    assert np.array_equal(np.asarray(image.image), np.asarray(picture(2, 2, 0)))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (3, "its image cannot be read any more"),  # though its text is there
        (4, "the file is none of JPEG, PNG, WEBP"),
        (5, "the index holds neither a text nor an image of it"),
    ],
)
def test_what_cannot_be_read_says_so_and_names_no_place(
    rows: list[dict[str, Any]], row: int, problem: str
) -> None:
    with pytest.raises(DataError) as caught:
        Stored.of_row(rows[row]).item()
    assert str(caught.value) == problem
    assert SECRET not in str(caught.value)


def test_candidates_are_read_when_they_are_asked_for(rows: list[dict[str, Any]]) -> None:
    given = Candidates([*map(Stored.of_row, rows), Content(text="sent")])
    assert len(given) == 8
    assert (given[1].text, given[7].text) == ("two blue cats", "sent")
    with pytest.raises(DataError):
        given[3]


# ---- search ----


def margins_of(backbone: Backbone, rows: list[dict[str, Any]], numbers: list[int]) -> list[float]:
    """Pair by pair, without a batch and without places."""
    reranker = Reranker(backbone)
    items = [Stored.of_row(rows[n]).item() for n in numbers]
    return [reranker.score([(QUERY, item)]).item() for item in items]


@pytest.mark.parametrize("depth", [2, 5, 7])
def test_what_is_flagged_and_what_lies_below_the_depth_keep_their_coarse_places(
    backbone: Backbone, rows: list[dict[str, Any]], depth: int
) -> None:
    outcome = searched(Handle(Reranker(backbone)), found(rows), depth)
    scored = [n for n in (0, 1, 2, 6) if n < depth]
    margins = dict(zip(scored, margins_of(backbone, rows, scored), strict=True))
    best_first = iter(sorted(scored, key=lambda n: -margins[n]))
    expected = [next(best_first) if n in scored else n for n in range(7)]
    assert [result.id for result in outcome.results] == [f"i{n}" for n in expected]
    for n, result in zip(expected, outcome.results, strict=True):
        assert result.coarse_score == 0.9 - n / 10
        fine = result.fine_score
        assert fine == (pytest.approx(margins[n], abs=1e-4) if n in margins else None)
        assert result.score == (result.coarse_score if fine is None else fine)
        assert (result.problem is not None) == (n in (3, 4, 5) and n < depth)
        assert SECRET not in str(result.problem)
        assert result.explanation is None
    assert outcome.reranked == len(scored)
    assert outcome.reasons == (["candidates"] if depth > 3 else [])


@pytest.mark.parametrize("budget_s", [0.0, -0.2])
def test_without_time_left_nobody_is_asked_and_the_coarse_order_is_flagged(
    backbone: Backbone, rows: list[dict[str, Any]], budget_s: float
) -> None:
    handle = Handle(Reranker(backbone))
    outcome = searched(handle, found(rows), 5, budget_s=budget_s)
    assert handle.asked == []
    assert [result.id for result in outcome.results] == [f"i{n}" for n in range(7)]
    assert (outcome.reranked, outcome.reasons) == (0, ["budget"])


def test_what_the_time_did_not_suffice_for_is_told_beside_what_cannot_be_read(
    backbone: Backbone, rows: list[dict[str, Any]]
) -> None:
    class Hasty(Reranker):
        """Has time for four candidates, the best."""

        def rank(self, query: Any, candidates: Any, *arguments: Any, **options: Any) -> Any:
            return super().rank(query, candidates, *arguments, **{**options, "depth": 4})

    outcome = searched(Handle(Hasty(backbone)), found(rows), 7, budget_s=100.0)
    assert outcome.reasons == ["candidates", "budget"]
    assert outcome.reranked == 3
    assert [result.id for result in outcome.results[3:]] == ["i3", "i4", "i5", "i6"]
    assert [result.problem is None for result in outcome.results[3:]] == [False, True, True, True]


def test_nothing_is_scored_and_nothing_flagged_where_nobody_asks_for_it(
    backbone: Backbone, rows: list[dict[str, Any]]
) -> None:
    handle = Handle(Reranker(backbone))
    stage: Any = FineStage(handle)
    for query, given, depth in (
        (None, found(rows), 5),
        (QUERY, found(rows), 0),
        (QUERY, found([]), 5),
    ):
        outcome = asyncio.run(stage.search(query, given, depth))
        assert (outcome.reranked, outcome.reasons, handle.asked) == (0, [], [])
        assert len(outcome.results) == len(given.hits)


def test_an_explanation_comes_with_what_was_scored(
    backbone: Backbone, rows: list[dict[str, Any]]
) -> None:
    handle = Handle(Reranker(backbone))
    outcome = searched(handle, found(rows), 7, explain=True, tenant="a")
    assert [(asked["details"], asked["tenant"]) for asked in handle.asked] == [(True, "a")]
    for result in outcome.results:
        assert (result.explanation is None) == (result.fine_score is None)
        if result.explanation is not None:
            (item,) = [Stored.of_row(r).item() for n, r in enumerate(rows) if f"i{n}" == result.id]
            (reading,) = Reranker(backbone).read([(QUERY, item)])
            told = result.explanation
            assert told.margin == result.fine_score
            assert told.margin == pytest.approx(reading.margin, abs=1e-4)
            assert told.probability == pytest.approx(1 / (1 + np.exp(-reading.margin)), abs=1e-4)
            assert told.label_mass == pytest.approx(reading.label_mass, abs=1e-5)
            assert told.entropy == pytest.approx(reading.entropy, abs=1e-4)
            assert told.is_doubtful is (told.label_mass < 0.5)


def test_the_profile_of_the_recipe_orders(backbone: Backbone, rows: list[dict[str, Any]]) -> None:
    recipe = changed(Recipe(), rerank={"profile": "compat", "framing": None})
    reranker = reranker_of(recipe, backbone)
    assert (reranker.profile.name, reranker.framing.name) == ("compat", "true_false")
    outcome = searched(Handle(reranker), found(rows), 7, explain=True)
    numbers = [0, 1, 2, 6]
    plain = Reranker(backbone, framing="true_false")
    items = [Stored.of_row(rows[n]).item() for n in numbers]
    read = dict(zip(numbers, plain.read([(QUERY, one) for one in items]), strict=True))
    best = sorted(
        numbers, key=lambda n: (-(read[n].hundredths or 0), round(read[n].entropy or 0, 4), n)
    )
    ids = [result.id for result in outcome.results]
    assert [int(name[1:]) for name in ids if int(name[1:]) in numbers] == best
    assert ids[3:6] == ["i3", "i4", "i5"]
    for result in outcome.results:
        if result.fine_score is not None:
            assert result.fine_score == (read[int(result.id[1:])].hundredths or 0) / 100


def test_recipes_know_the_profiles_and_leave_the_question_to_them() -> None:
    for name in PROFILES:
        assert RerankConfig(profile=name).profile == name
    with pytest.raises(ValueError, match="'default' or 'compat'"):
        RerankConfig(profile="best")
    assert (RerankConfig().profile, RerankConfig().framing) == ("default", None)


def test_an_adaptive_depth_leaves_a_decided_query_alone_and_says_nothing_of_a_budget(
    backbone: Backbone, rows: list[dict[str, Any]]
) -> None:
    """The hits fall by 0.1, so at a temperature of 0.01 the best leads by 10 nats, and at 1 nobody leads."""
    handle, hits = Handle(Reranker(backbone)), found(rows[:3])
    sure = searched(handle, hits, 3, adaptive=AdaptiveDepth(temperature=0.01))
    assert ([one.id for one in sure.results], sure.reranked, sure.reasons) == (
        ["i0", "i1", "i2"],
        0,
        [],
    )
    assert handle.asked == []
    open_ = searched(handle, hits, 2, adaptive=AdaptiveDepth(temperature=1.0))
    assert (open_.reranked, open_.reasons) == (2, [])


# ---- documents ----

DOCUMENTS = [
    "two blue cats",
    {"image": "no base64!"},
    {"image": base64.b64encode(png(picture(2, 2, 1))).decode()},
    {"text": ""},
    {"text": "a red dog", "image": base64.b64encode(png(picture(2, 2, 5))).decode()},
]


def documents(backbone: Backbone, **options: Any) -> list[dict[str, Any]]:
    body = RerankRequest.model_validate({"query": QUERY.text, "documents": DOCUMENTS, **options})
    stage: Any = FineStage(Handle(Reranker(backbone)))
    return [
        one.model_dump(exclude_none=True)
        for one in asyncio.run(stage.documents(QUERY, body, body.contents()))
    ]


def test_documents_come_by_relevance_and_those_with_a_problem_at_the_end(
    backbone: Backbone,
) -> None:
    items = [Item(text="two blue cats"), Item(image=picture(2, 2, 1))]
    items.append(Item(text="a red dog", image=picture(2, 2, 5)))
    margins = [Reranker(backbone).score([(QUERY, item)]).item() for item in items]
    relevance = dict(zip((0, 2, 4), 1 / (1 + np.exp(-np.array(margins))), strict=True))
    results = documents(backbone)
    assert [one["index"] for one in results] == [
        *sorted(relevance, key=lambda n: -relevance[n]), 1, 3,
    ]  # fmt: skip
    for one in results[:3]:
        assert one == {
            "index": one["index"],
            "relevance_score": pytest.approx(relevance[one["index"]], abs=1e-5),
        }
    for one, problem in zip(
        results[3:], ("not valid base64", "neither an image nor a"), strict=True
    ):
        assert set(one) == {"index", "relevance_score", "problem"}
        assert one["relevance_score"] == 0
        assert problem in one["problem"]


def test_as_many_documents_as_asked_are_answered_with_themselves(backbone: Backbone) -> None:
    whole = documents(backbone)
    for top_n in (1, 4, 9):
        found = documents(backbone, top_n=top_n, return_documents=True)
        assert [one["index"] for one in found] == [one["index"] for one in whole[:top_n]]
        for one in found:
            given = DOCUMENTS[one["index"]]
            assert one["document"] == ({"text": given} if isinstance(given, str) else given)


def test_a_replica_that_stands_still_does_not_outlast_a_budget_by_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fine, "_OVERRUN_S", 0.05)

    class Silent:
        def __init__(self) -> None:
            self.rank = self

        async def remote(self, *_: Any, **__: Any) -> Any:
            await asyncio.sleep(3600)

    rows = [{"uri": None, "text": f"text {n}", "modality": "text"} for n in range(3)]
    stage: Any = FineStage(Silent(), budget_s=0.05)
    outcome = asyncio.run(stage.search(QUERY, found(rows), 3))
    assert (outcome.reranked, outcome.reasons) == (0, ["budget"])
    assert [one.id for one in outcome.results] == ["i0", "i1", "i2"]
