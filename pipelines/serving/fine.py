"""The fine stage as a request asks for it: what is scored in the time that is left, and what is told of it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ray.serve.handle import DeploymentHandle

from pipelines.contents import Readable, as_content
from pipelines.messages import (
    DegradedReason,
    Explanation,
    RerankRequest,
    RerankResult,
    SearchResult,
)
from pipelines.serving.calls import ask
from pipelines.serving.candidates import Stored
from pipelines.serving.index_service import Found
from pipelines.serving.telemetry import stage, told
from slq.reranker import Ranked
from slq.reranking.depth import AdaptiveDepth, depth_of
from slq.schema import Item

_OVERRUN_S = 1.0  # for the pass that goes on when a budget ends; then a replica may stand still


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the fine stage made of the hits of a search.

    Attributes:
        results: All hits, in order.
        reranked: How many were scored.
        reasons: Why some that should have been were not.
    """

    results: list[SearchResult]
    reranked: int
    reasons: list[DegradedReason]


@dataclass(frozen=True, slots=True)
class FineStage:
    """The fine stage, for one request.

    Attributes:
        backbone: Scores.
        budget_s: Seconds that are left of the request's time; None is for as long as it takes.
        explain: Whether to tell what the model was about to say.
        adaptive: How many fewer hits are scored where coarse scores leave little to decide.
        tenant: Whose request it is.
        patience_s: How long a replica may be silent before another is asked.
    """

    backbone: DeploymentHandle
    budget_s: float | None = None
    explain: bool = False
    adaptive: AdaptiveDepth | None = None
    tenant: str = ""
    patience_s: float | None = None

    async def search(self, query: Item | None, found: Found, depth: int) -> Outcome:
        """The hits in the order of the fine stage.

        Args:
            query: What is searched for; None where it is an indexed item, or where only its vector is known, which
                the fine stage cannot read.
            found: What the index gave.
            depth: Hits to score at most, the best by coarse score; 0 scores none.
        """
        results = [
            SearchResult(
                id=hit.id,
                score=hit.score,
                coarse_score=hit.score,
                uri=row["uri"],
                text=row["text"],
                modality=row["modality"],
            )
            for hit, row in zip(found.hits, found.rows, strict=True)
        ]
        depth = depth_of(np.array([hit.score for hit in found.hits]), depth, self.adaptive)
        asked = Stored.of_row(found.like) if found.like is not None else query
        if asked is None or not results[:depth]:
            return Outcome(results, 0, [])
        if self.budget_s is not None and self.budget_s <= 0:
            return Outcome(results, 0, ["budget"])
        limit = asyncio.timeout(None if self.budget_s is None else self.budget_s + _OVERRUN_S)
        try:
            async with limit:
                ranked = await self._ranked(
                    asked,
                    [Stored.of_row(row) for row in found.rows[:depth]],
                    [hit.score for hit in found.hits[:depth]],
                )
        except TimeoutError:
            if not limit.expired():
                raise
            return Outcome(results, 0, ["budget"])
        placed = [self._told(results[one.index], one) for one in ranked]
        num_scored = sum(one.reading is not None for one in ranked)
        return Outcome(placed + results[depth:], num_scored, _reasons(ranked))

    async def documents(
        self, query: Item, body: RerankRequest, documents: Sequence[Readable]
    ) -> list[RerankResult]:
        """The documents of a request, the best first.

        One with a problem has no coarse place that it could keep, so it comes after those that were scored.

        Args:
            query: What they are held against.
            body: The request.
            documents: Its documents, as they can be read in another process.
        """
        ranked = await self._ranked(query, documents, None)
        ranked.sort(key=lambda one: one.reading is None)
        return [
            RerankResult(
                index=one.index,
                relevance_score=one.probability or 0.0,
                document=as_content(body.documents[one.index]) if body.return_documents else None,
                problem=one.problem,
            )
            for one in ranked[: body.top_n]
        ]

    async def _ranked(
        self,
        query: Item | Stored,
        candidates: Sequence[Readable],
        coarse: list[float] | None,
    ) -> list[Ranked]:
        with stage("queue"):  # until it is scored; how long that took comes with the answer
            ranked: list[Ranked] = await ask(
                self.backbone.rank,
                query,
                list(candidates),
                coarse,
                budget_s=self.budget_s,
                details=self.explain,
                tenant=self.tenant,
                patience_s=self.patience_s,
                told=told(),
            )
        return ranked

    def _told(self, result: SearchResult, one: Ranked) -> SearchResult:
        if one.reading is None or one.probability is None:
            return result.model_copy(update={"problem": one.problem})
        said = {"score": one.fine_score, "fine_score": one.fine_score}
        if not self.explain:
            return result.model_copy(update=said)
        of_reading = {
            name: getattr(one.reading, name)
            for name in ("margin", "label_mass", "entropy", "is_doubtful")
        }
        explanation = Explanation(**of_reading, probability=one.probability, is_match=one.is_match)
        return result.model_copy(update={**said, "explanation": explanation})


def _reasons(ranked: Sequence[Ranked]) -> list[DegradedReason]:
    """Why candidates that should have been scored were not."""
    left = [one.problem for one in ranked if one.reading is None]
    reasons: list[DegradedReason] = []
    if any(problem is not None for problem in left):
        reasons.append("candidates")
    if any(problem is None for problem in left):
        reasons.append("budget")
    return reasons
