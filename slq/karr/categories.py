"""The six categories of KARR-Bench, and the form of a clue."""

import re
from dataclasses import dataclass

from slq.scenes.sprites import CLUE_CATEGORIES


@dataclass(frozen=True, slots=True)
class Category:
    """One kind of knowledge that a clue asks for.

    Attributes:
        id: As it stands in files.
        title: For people.
        meaning: For prompts.
        paper_share: Share in the paper's benchmark of 2,915 pairs (spec: SLQ section 5).
    """

    id: str
    title: str
    meaning: str
    paper_share: float


CATEGORIES: dict[str, Category] = {
    one.id: one
    for one in (
        Category("tool_use", "tool and utensil use", "what one does with the thing", 0.188),
        Category("spatial_context", "contextual-spatial", "where the thing is found", 0.181),
        Category(
            "functional_relation",
            "functional relation",
            "what the thing does to or for others, or they for it",
            0.174,
        ),
        Category(
            "cultural_symbolism", "cultural symbolism", "what the thing stands for to people", 0.194
        ),
        Category("encyclopaedic", "encyclopaedic", "a fact that an encyclopaedia has", 0.149),
        Category(
            "logic_mathematics", "logic and mathematics", "a number or a rule to work out", 0.114
        ),
    )
}
"""By id, in the order of the spec."""
assert tuple(CATEGORIES) == CLUE_CATEGORIES

CLUE_TYPES = ("arithmetic", "negation", "comparison", "action", "description")
"""Forms of a clue, the first that fits: a sum or a number, a "not", a superlative or "like", a clause with a verb, or
other words. Ours: the paper has categories only."""

_NUMBERS = "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
_FORMS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("arithmetic", re.compile(rf"[\d+*=]|\b({_NUMBERS})\b")),
    ("negation", re.compile(r"\b(not|no|never|cannot|without)\b|n't\b")),
    ("comparison", re.compile(r"\b(most|least|best|worst|like|than)\b|\b\w{3,}est\b")),
    (
        "action",
        re.compile(r"\b(that|which|who|whose|used|made|known|said|branded|\w{3,}ed)\b"),
    ),
)
_NO_SUPERLATIVE = re.compile(r"\b(forest|chest|nest|guest|harvest|west|priest)\b")


def clue_type(clue: str) -> str:
    """The form of a clue, one of `CLUE_TYPES`."""
    words = _NO_SUPERLATIVE.sub(" ", clue.casefold())
    return next((name for name, form in _FORMS if form.search(words)), "description")
