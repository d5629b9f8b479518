"""Two rankings of the same queries, compared by the rank of the first relevant item."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["won", "lost", "same"]


@dataclass(frozen=True)
class Standing:
    """Where a ranking has its first relevant item.

    Attributes:
        rank: From 1; None where it gives none.
        depth: How many items it gives.
    """

    rank: int | None
    depth: int


@dataclass(frozen=True)
class Change:
    """One query in both systems.

    Attributes:
        query_id: Which.
        first: Rank of the first relevant item by the first system, from 1; None where it gives none.
        second: The same by the second.
        depths: How many items each gives.
    """

    query_id: str
    first: int | None
    second: int | None
    depths: tuple[int, int]

    @property
    def outcome(self) -> Outcome:
        """Whether the second system ranks it better (`won`), worse (`lost`), or as the first does."""
        if self.ranks[0] == self.ranks[1]:
            return "same"
        return "won" if self.ranks[1] < self.ranks[0] else "lost"

    @property
    def ranks(self) -> tuple[int, int]:
        """Both ranks; what is in neither or one of the rankings counts as just behind the longer one."""
        behind = max(self.depths) + 1
        return self.first or behind, self.second or behind

    @property
    def size(self) -> tuple[int, float]:
        """How much changed: places, and of equally many what is nearer to the top."""
        before, after = self.ranks
        return abs(before - after), abs(1 / before - 1 / after)


def changes(first: Mapping[str, Standing], second: Mapping[str, Standing]) -> list[Change]:
    """Queries that both systems rank, those that changed most first; of equals by id.

    Args:
        first: Of each judged query.
        second: The same by the other system.
    """
    found = [
        Change(name, one.rank, second[name].rank, (one.depth, second[name].depth))
        for name, one in first.items()
        if name in second
    ]
    return sorted(found, key=lambda one: (-one.size[0], -one.size[1], one.query_id))
