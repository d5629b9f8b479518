"""How a pair is put to the model, and which words answer (spec: RetLLM section 2).

A framing gives every answer a value in [0, 1]: how much of a match it stands for. Yes and no are 1 and 0, a rating from
1 to 5 goes up in quarters. `slq.scoring.margin` reads all of them in the same way.
"""

from dataclasses import dataclass

from slq.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Framing:
    """A question with its answers.

    Attributes:
        name: Key in `FRAMINGS`.
        of_caption: Asks whether one text fits one image.
        of_pair: Asks whether a candidate fits a query, whatever they are made of.
        labels: Answers and their values. Each is one token, with or without a space before it, or is not used.
    """

    name: str
    of_caption: str
    of_pair: str
    labels: tuple[tuple[str, float], ...]

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


def framing_by_name(name: str) -> Framing:
    """The framing called `name`.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in FRAMINGS:
        raise ConfigError(f"framing {name!r} is unknown; choose one of {', '.join(FRAMINGS)}")
    return FRAMINGS[name]
