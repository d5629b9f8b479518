"""What a verification tells: how much was looked at, and what is wrong."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

CHECKS = ("files", "counts", "schema", "rows", "vectors", "ids", "embedding")
"""In the order in which they are told."""
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong.

    Attributes:
        check: One of `CHECKS`.
        place: The file, as it is called in the data set.
        message: What is wrong with it, and the way out where there is one.
    """

    check: str
    place: str
    message: str


@dataclass(slots=True)
class Report:
    """What was looked at, and what is wrong.

    Attributes:
        location: The data set.
        checked: How much each check looked at: files, shards (counts and schema), rows, vectors, ids,
            vectors made anew.
        findings: In the order of `CHECKS`.
        notes: What could not be looked at, though nothing is known to be wrong with it.
        largest_difference: Length of the largest difference between a stored vector and that of the same input
            embedded anew; None where none was.
    """

    location: str
    checked: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CHECKS, 0))
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    largest_difference: float | None = None

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Plain data for machines."""
        return {**asdict(self), "is_sound": self.is_sound}


def first_few(names: Sequence[Any]) -> str:
    """The first names of many, and how many more there are."""
    shown = ", ".join(str(name) for name in names[:_NAMED])
    more = len(names) - _NAMED
    return f"{shown} and {more} more" if more > 0 else shown
