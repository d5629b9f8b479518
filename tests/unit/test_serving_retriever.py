"""Coarse search over two handles: in one embedding space, whatever moves meanwhile."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines.serving.adapters import Embedded
from pipelines.serving.index_service import Found, Moved
from pipelines.serving.pinned import Pinned
from pipelines.serving.retriever import Retriever
from slq.errors import ArtifactMismatchError, UnavailableError, UnknownModelError
from slq.index import Hit
from slq.schema import Item

QUERY = Item(text="a red apple")


class Service:
    """Model and index of several replicas, each of which is where it is."""

    def __init__(self, *replicas: tuple[str, ...]) -> None:
        self.models = {"slq": "a", "other": "b"}
        self.replicas = [list(spaces) for spaces in replicas]  # the first of each answers
        self.asked = 0
        self.embedded: list[str] = []
        self.described = 0
        self.backbone = SimpleNamespace(
            describe=self._of(lambda: {"fingerprint": "a", "models": self.models, "backbone": "x"}),
            embed=self._of(self._embed),
        )
        self.index = SimpleNamespace(
            describe=self._of(self._describe), search=self._of(self._search)
        )

    def _of(self, answer: Any) -> Any:
        async def remote(*given: Any, **_: Any) -> Any:
            await asyncio.sleep(0)
            return answer(*given)

        return SimpleNamespace(remote=remote)

    def _describe(self) -> dict[str, Any]:
        self.described += 1
        spaces = self.replicas[-1]
        return {"fingerprint": spaces[0], "dimension": 4, "shards_ok": 1, "shards_total": 1}

    def _embed(self, items: list[Item], _: str, model: str) -> Embedded:
        self.embedded.append(model)
        if model not in {*self.models, *self.models.values()}:
            raise UnknownModelError(f"there is no model {model!r}")
        return Embedded([np.ones(4, np.float32)] * len(items), self.models.get(model, model))

    def _search(self, _vector: Any, _k: int, space: str | None, where: str | None) -> Any:
        spaces = self.replicas[self.asked % len(self.replicas)]
        self.asked += 1
        if space is not None and space not in spaces:
            return Moved(spaces[0])
        hits = [Hit(where or "x", 0.5)]
        return Found(hits, [{}], "v1", 1, 1, space or spaces[0], spaces[0])

    def retriever(self) -> Retriever:
        parts: Any = (self.backbone, self.index)
        return Retriever(Pinned("a", "v000001"), *parts)


def search(retriever: Retriever, **options: Any) -> Found:
    return asyncio.run(retriever.search(QUERY, None, 3, **options))


def test_a_query_is_embedded_for_the_version_that_answers() -> None:
    service = Service(("a",))
    assert search(service.retriever(), where="price < 3").hits[0].id == "price < 3"
    assert service.embedded == ["a"]


def test_a_move_is_followed_and_the_next_query_knows_of_it() -> None:
    service = Service(("a",))
    retriever = service.retriever()
    search(retriever)
    service.replicas = [["b"]]
    assert search(retriever).fingerprint == "b"
    assert service.embedded == ["a", "a", "b"]
    assert search(retriever).fingerprint == "b"
    assert service.embedded == ["a", "a", "b", "b"]


def test_a_replica_that_lags_behind_is_answered_by_the_version_that_all_have() -> None:
    """The one that is ahead keeps the version before, so that what the other asks for is there."""
    service = Service(("a",), ("b", "a"))  # the second one describes itself
    retriever = service.retriever()
    for _ in range(20):
        assert search(retriever).fingerprint in ("a", "b")


def test_an_adapter_that_was_removed_after_a_move_back_leaves_no_replica_without_answers() -> None:
    service = Service(("b", "a"))
    retriever = service.retriever()
    assert search(retriever).fingerprint == "b"
    service.replicas = [["a"]]  # it moved back, which this replica has not heard,
    del service.models["other"]  # and the adapter that it embeds with is gone
    for _ in range(2):
        assert search(retriever).fingerprint == "a"


def test_what_moves_for_ever_is_given_up() -> None:
    service = Service(("a",), ("b",), ("c",))
    service.models["third"] = "c"
    with pytest.raises(UnavailableError, match="moves again and again"):
        search(service.retriever())


def test_a_search_by_a_model_is_refused_where_the_answer_came_from_another_space() -> None:
    service = Service(("a",))
    retriever = service.retriever()

    async def scenario() -> None:
        await retriever.require_searched("slq")
        service.replicas = [["b"]]
        found = await retriever.search(QUERY, None, 3)
        with pytest.raises(ArtifactMismatchError, match=r"'slq' has fingerprint a, .* with b"):
            await retriever.require_searched("slq", found)
        await retriever.require_searched("other", found)
        assert retriever.name_of(found.fingerprint) == "other"

    asyncio.run(scenario())


def test_whoever_asks_at_the_same_time_hears_the_same() -> None:
    service = Service(("a",))
    retriever = service.retriever()

    async def scenario() -> None:
        told = await asyncio.gather(*[retriever.describe() for _ in range(20)])
        assert service.described == 1
        told[0]["partitions"] = "of one who asked"
        assert "partitions" not in told[1]
        await retriever.describe()
        assert service.described == 2

    asyncio.run(scenario())


def test_one_who_asks_and_leaves_does_not_end_it_for_the_others() -> None:
    service = Service(("a",))
    retriever = service.retriever()

    async def scenario() -> None:
        first = asyncio.ensure_future(retriever.describe())
        second = asyncio.ensure_future(retriever.describe())
        await asyncio.sleep(0)
        first.cancel()
        assert (await second)["fingerprint"] == "a"

    asyncio.run(scenario())
