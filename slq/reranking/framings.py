"""How a pair is put to the model, and which words answer (spec: RetLLM section 2).

A framing gives every answer a value in [0, 1]: how much of a match it stands for. Yes and no are 1 and 0, a rating from
1 to 5 goes up in quarters. `slq.scoring.margin` reads all of them in the same way.
"""

from dataclasses import dataclass

from slq.errors import ConfigError
from slq.reranking.presets import TEMPLATES, Slot, Template


@dataclass(frozen=True, slots=True)
class Framing:
    """A question with its answers.

    Attributes:
        name: Key in `FRAMINGS` or `PRESETS`.
        of_caption: Asks whether one text fits one image.
        of_pair: Asks whether a candidate fits a query, whatever they are made of.
        labels: Answers and their values. Each is one token, with or without a space before it, or is not used.
        template: The whole prompt of a trained reranker, in place of both questions; labels are then exactly as given.
    """

    name: str
    of_caption: str
    of_pair: str
    labels: tuple[tuple[str, float], ...]
    template: Template | None = None

    @property
    def system(self) -> str | None:
        """Message before the turn; None leaves the one of the model's chat template."""
        return self.template.system if self.template else None

    @property
    def empty(self) -> str:
        """What stands for the text of a side without content (`slq.reranking.context_free`)."""
        return (self.template.empty if self.template else None) or EMPTY

    @property
    def takes_instruction(self) -> bool:
        """Whether it has a place for what the search is for."""
        return self.template is not None and Slot.INSTRUCTION in self.template.slots

    @property
    def positive(self) -> str:
        """The answer that means a match the most."""
        return max(self.labels, key=lambda label: label[1])[0]

    @property
    def negative(self) -> str:
        """The answer that means none the most."""
        return min(self.labels, key=lambda label: label[1])[0]

    def around_caption(self) -> tuple[str, str]:
        """What stands before and behind a caption that follows its image."""
        return "Caption: ", f"\n{self.of_caption}"

    def question(self, caption: str) -> str:
        """The text that follows an image."""
        before, behind = self.around_caption()
        return f"{before}{caption}{behind}"


def _asked(of: str, answers: str) -> str:
    return f"Does the {of}? {answers}"


EMPTY = "N/A"
_CAPTION, _PAIR = "caption match the image", "candidate match the query"
_CHOICES = "A. yes, fully B. no or only partly. Answer A or B."
_LEVELS = 5

FRAMINGS: dict[str, Framing] = {
    framing.name: framing
    for framing in (
        Framing(
            "true_false",
            _asked(_CAPTION, "Answer True or False."),
            _asked(_PAIR, "Answer True or False."),
            (("True", 1.0), ("true", 1.0), ("False", 0.0), ("false", 0.0)),
        ),
        Framing(
            "mcq", _asked(_CAPTION, _CHOICES), _asked(_PAIR, _CHOICES), (("A", 1.0), ("B", 0.0))
        ),
        Framing(
            "yes_no",
            _asked(_CAPTION, "Answer yes or no."),
            _asked(_PAIR, "Answer yes or no."),
            (("Yes", 1.0), ("yes", 1.0), ("No", 0.0), ("no", 0.0)),
        ),
        Framing(
            "rate",
            f"How well does the caption match the image, from 1 (not at all) to {_LEVELS} (fully)? Answer a digit.",
            f"How well does the candidate match the query, from 1 (not at all) to {_LEVELS} (fully)? Answer a digit.",
            tuple((str(n + 1), n / (_LEVELS - 1)) for n in range(_LEVELS)),
        ),
    )
}

"""Questions to any model."""

PRESETS: dict[str, Framing] = {
    template.name: Framing(
        template.name,
        of_caption="",
        of_pair="",
        labels=tuple(zip(template.labels, (1.0, 0.0), strict=True)),
        template=template,
    )
    for template in TEMPLATES
}
"""Prompts of trained rerankers, each for one family of models."""


def framing_by_name(name: str) -> Framing:
    """The framing or preset called `name`.

    Raises:
        ConfigError: There is none of that name.
    """
    known = {**FRAMINGS, **PRESETS}
    if name not in known:
        raise ConfigError(f"framing {name!r} is unknown; choose one of {', '.join(known)}")
    return known[name]
