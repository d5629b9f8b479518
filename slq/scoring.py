"""Relevance scores read from next-token logits (spec: RetLLM section 2).

Given the label sets Y+ and Y-: `margin = logsumexp(z[Y+]) - logsumexp(z[Y-])`, `p = sigmoid(margin)` and `label_mass`,
the probability of any label over the full vocabulary. All in float32, never truncated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slq.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Framing:
    """How a query-candidate pair is put to the model, and which words are its answers.

    Attributes:
        name: Key in `FRAMINGS`.
        instruction: Stands after the candidate, so that a candidate's text cannot have the last word.
        positive: Label words that mean a match; every variant must be one token.
        negative: Label words that mean no match.
    """

    name: str
    instruction: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def question(self, caption: str) -> str:
        """The user text that follows the image."""
        return f"Caption: {caption}\n{self.instruction}"


FRAMINGS: dict[str, Framing] = {
    framing.name: framing
    for framing in (
        Framing(
            "true_false",
            "Does the caption match the image? Answer True or False.",
            ("True", "true"),
            ("False", "false"),
        ),
        Framing(
            "mcq",
            "Does the caption match the image? A. yes, fully B. no or only partly. Answer A or B.",
            ("A",),
            ("B",),
        ),
        Framing(
            "yes_no",
            "Does the caption match the image? Answer yes or no.",
            ("Yes", "yes"),
            ("No", "no"),
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


def margin(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """How much more the model believes in a match than in none.

    Args:
        logits: (batch, vocab) or only the label columns; any float type.
        positive: (num_positive,) int64 columns of `logits`.
        negative: (num_negative,) int64 columns.

    Returns:
        (batch,) float32 in nats; higher means a better match.
    """
    scores = logits.float()
    return scores[:, positive].logsumexp(-1) - scores[:, negative].logsumexp(-1)


def label_mass(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Probability that the next token is any label: (batch,) float32, from (batch, vocab) full logits.

    Below 0.5 the model did not answer the question, and the margin means little.
    """
    scores = logits.float()
    labels = scores[:, torch.cat([positive, negative])].logsumexp(-1)
    return (labels - scores.logsumexp(-1)).exp()


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the next token over the full vocabulary, (batch,) float32 in nats, from (batch, vocab)."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
