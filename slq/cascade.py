"""Several fine stages one after the other: a cheap model for many candidates, a better one for the best of those."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from slq.errors import ConfigError
from slq.reranker import Ranked, Reranker
from slq.reranking.depth import AdaptiveDepth


@dataclass(frozen=True, slots=True)
class Stage:
    """One fine stage of a cascade.

    Attributes:
        reranker: The model with its question.
        depth: Candidates that it scores at most, the best of the stage before.
    """

    reranker: Reranker
    depth: int


class Cascade:
    """Ranks by each stage in turn; what a later one does not reach keeps the order of the one before.

    Scores of different models cannot be compared, so a candidate has the score of the last stage that scored it, and
    says which one that was.

    Args:
        stages: The first looks at the most candidates.

    Raises:
        ConfigError: There are none, or a later one looks at more than an earlier one, which would mix the two orders.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        depths = [stage.depth for stage in stages]
        if not stages or depths != sorted(depths, reverse=True) or depths[-1] < 1:
            raise ConfigError(
                f"a cascade of depths {depths} makes no sense; let each stage score at least 1 candidate, and no more "
                "than the one before"
            )
        self._stages = tuple(stages)

    def rank(
        self,
        query: Any,
        candidates: Sequence[Any],
        coarse_scores: Sequence[float] | None = None,
        *,
        adaptive: AdaptiveDepth | None = None,
        budget_s: float | None = None,
        details: bool = False,
        tenant: str = "",
    ) -> list[Ranked]:
        """Order candidates; arguments and errors as `Reranker.rank`.

        Args:
            query: A text, an image, or a mapping of both.
            candidates: The same kinds.
            coarse_scores: One per candidate; the input order by default.
            adaptive: How many fewer the first stage scores; later ones score no more than it did.
            budget_s: Of all stages; the first ones may leave nothing of it to later ones.
            details: As of `Reranker.rank`.
            tenant: As of `Reranker.rank`.
        """
        began, first = time.monotonic(), self._stages[0]
        ranking = first.reranker.rank(
            query,
            candidates,
            coarse_scores,
            depth=first.depth,
            adaptive=adaptive,
            budget_s=budget_s,
            details=details,
            tenant=tenant,
        )
        ranking = [replace(one, stage=0 if one.reading else None) for one in ranking]
        for number, stage in enumerate(self._stages[1:], start=1):
            left = None if budget_s is None else budget_s - (time.monotonic() - began)
            scored = sum(one.reading is not None for one in ranking)
            found = stage.reranker.rank(
                query,
                [candidates[one.index] for one in ranking],
                [-float(place) for place in range(len(ranking))],
                depth=min(stage.depth, scored),
                budget_s=left,
                details=details,
                tenant=tenant,
            )
            ranking = [_later(ranking[one.index], one, number) for one in found]
        return ranking


def _later(before: Ranked, now: Ranked, stage: int) -> Ranked:
    """A candidate after a further stage, which may not have scored it."""
    if now.reading is None:
        return before
    return replace(now, index=before.index, coarse_score=before.coarse_score, stage=stage)
