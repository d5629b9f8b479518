"""Whether an answer is the one that the same query had before."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NEAR = 1e-4
"""Scores of one item differ so much at most with what shares a pass; items nearer than that may change places."""


@dataclass(frozen=True, slots=True)
class Found:
    """Results of a search.

    Attributes:
        ids: Best first.
        scores: Of each.
    """

    ids: tuple[str, ...]
    scores: tuple[float, ...]

    @classmethod
    def of(cls, body: bytes) -> "Found":
        """From the body of an answer.

        Raises:
            ValueError, KeyError, TypeError: It is none.
        """
        results = json.loads(body)["results"]
        return cls(
            tuple(one["id"] for one in results), tuple(float(one["score"]) for one in results)
        )

    def equals(self, other: "Found") -> bool:
        """Whether both hold the same items with the same scores, but for the order of equal ones."""
        if len(self.ids) != len(other.ids):
            return False
        theirs = dict(zip(other.ids, other.scores, strict=True))
        last = other.scores[-1] if other.scores else 0.0
        by_rank = zip(self.scores, other.scores, strict=True)
        # an item that is not in the other list must be as good as its last one: the cut went between equals
        by_item = (
            (score, theirs.get(name, last))
            for name, score in zip(self.ids, self.scores, strict=True)
        )
        return all(abs(a - b) <= _NEAR for pairs in (by_rank, by_item) for a, b in pairs)


def wrong_answers(
    bodies: Sequence[bytes], targets: Sequence[int], truth: Mapping[int, Found]
) -> list[bool]:
    """Of each answer whether it is another than the truth of what was asked; False where there is no answer.

    Args:
        bodies: Of answers; empty without one.
        targets: What was asked.
        truth: By target.
    """
    return [
        bool(body) and not _is(body, truth[target])
        for body, target in zip(bodies, targets, strict=True)
    ]


def _is(body: bytes, truth: Found) -> bool:
    try:
        return Found.of(body).equals(truth)
    except (ValueError, KeyError, TypeError):
        return False
