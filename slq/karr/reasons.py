"""Why a caption does not become a row of the benchmark, and the account of all of them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slq.errors import DataError

STAGES: dict[str, dict[str, str]] = {
    "source": {
        "no_caption": "the source row has no text",
        "not_one_image": "the source row does not belong to exactly one image",
        "further_caption": "the image has as many captions as are taken already",
        "unreadable_image": "the image cannot be read",
    },
    "choose": {"no_entity": "no thing that can be seen was found in the caption"},
    "rewrite": {
        "unanswered": "the model gave no answer",
        "unparseable": "the answer is not the JSON that was asked for",
        "unknown_category": "the answer names none of the six categories",
        "too_long": "the new caption, or its clue, is too long",
    },
    "check": {
        "names_target": "the new caption names the target",
        "names_synonym": "the new caption names the target by a synonym",
        "names_translation": "the new caption names the target in another language",
        "names_by_model": "a model finds the target named",
        "changes_rest": "the new caption changes more than the target",
        "other_object": "the clue belongs to another object",
    },
    "identify": {"not_identified": "the new caption fits a neighbour as well as its own image"},
    "judge": {"judges": "too few judges accept it"},
    "review": {
        "annotators": "people reject it",
        "unreviewed": "nobody has looked at it yet",
    },
    "export": {"duplicate": "another image has the same new caption"},
}
"""Reasons of each stage with their meaning, in the order in which a caption meets them."""

ERRORS = frozenset({"unreadable_image", "unanswered"})
"""Reasons that say nothing about the caption: over a share they fail a run, and can be tried again."""

STAGE_OF = {reason: stage for stage, reasons in STAGES.items() for reason in reasons}


class RejectedError(DataError):
    """A caption does not become a row; `reason` is one of `STAGE_OF`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["RejectedError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class Funnel:
    """What became of every caption.

    Attributes:
        num_in: Captions that were read.
        num_out: Rows of the benchmark.
        rejected: Captions by reason; every known reason has a number.
    """

    num_in: int
    num_out: int
    rejected: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, reasons: Iterable[str | None]) -> "Funnel":
        """Count the outcome of each caption; None is a row of the benchmark.

        Raises:
            DataError: A reason is unknown, or captions are not all accounted for.
        """
        found = Counter(reasons)
        num_in, num_out = found.total(), found.pop(None, 0)
        unknown = [reason for reason in found if reason not in STAGE_OF]
        if unknown:
            raise DataError(f"reason {unknown[0]!r} is unknown; known: {', '.join(STAGE_OF)}")
        funnel = cls(num_in, num_out, {reason: found[reason] for reason in STAGE_OF})
        funnel.require_balanced()
        return funnel

    def require_balanced(self) -> None:
        """Check that captions in are rows out and rejected ones.

        Raises:
            DataError: They are not.
        """
        lost = self.num_in - self.num_out - sum(self.rejected.values())
        if lost:
            raise DataError(
                f"the funnel does not add up: {self.num_in} captions in, {self.num_out} rows out, "
                f"{sum(self.rejected.values())} rejected, so {lost} are unaccounted for"
            )

    def stages(self) -> list[dict[str, Any]]:
        """Each stage with what went in, what it rejected by reason, and what is left."""
        found, left = [], self.num_in
        for stage, reasons in STAGES.items():
            rejected = {reason: self.rejected.get(reason, 0) for reason in reasons}
            before, left = left, left - sum(rejected.values())
            found.append({"stage": stage, "num_in": before, "rejected": rejected, "num_out": left})
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "num_in": self.num_in,
            "num_out": self.num_out,
            "rejected": self.rejected,
            "stages": self.stages(),
        }


def funnel_markdown(funnel: Funnel, notes: Mapping[str, str]) -> str:
    """The funnel as a Markdown table, a row per stage and one per reason that occurred.

    Args:
        funnel: The account.
        notes: What is to be said of a stage, such as that it was switched off.
    """
    lines = ["| stage | captions | share of all |", "|---|---:|---:|"]
    lines.append(f"| **read** | {funnel.num_in:,} | {_share(funnel.num_in, funnel.num_in)} |")
    for stage in funnel.stages():
        for reason, count in stage["rejected"].items():
            if count:
                meaning = STAGES[stage["stage"]][reason]
                lines.append(
                    f"| - {reason}: {meaning} | -{count:,} | {_share(count, funnel.num_in)} |"
                )
        note = f" ({notes[stage['stage']]})" if stage["stage"] in notes else ""
        share = _share(stage["num_out"], funnel.num_in)
        lines.append(f"| **{stage['stage']}**{note} | {stage['num_out']:,} | {share} |")
    return "\n".join(lines)


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}%" if total else ""
