"""The words that answer, as tokens of one model, and what its states say of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slq.backbones import Backbone
from slq.errors import ConfigError
from slq.reranking.framings import Framing
from slq.scoring import margin


class Labels:
    """A framing's answers in a model's vocabulary.

    Args:
        backbone: The model.
        framing: Names the words.

    Attributes:
        ids: Tokens of all answers.
        positive: The one that means a match, as it begins an answer.

    Raises:
        ConfigError: A word is not a single token.
    """

    def __init__(self, backbone: Backbone, framing: Framing) -> None:
        self._backbone, self._framing = backbone, framing
        values = self._resolved()
        self.ids = list(values)
        self._values = torch.tensor(list(values.values()), device=backbone.device)
        lead = "" if framing.template else backbone.answer_lead
        ids = backbone.token_ids(lead + framing.positive)
        self.positive = ids[0] if len(ids) == 1 else self.ids[int(self._values.argmax())]

    def _resolved(self) -> dict[int, float]:
        """Values of single tokens: the trained word alone, or any word with and without a leading space."""
        found: dict[int, float] = {}
        for word, value in self._framing.labels:
            for variant in (word,) if self._framing.template else (word, f" {word}"):
                ids = self._backbone.token_ids(variant)
                if len(ids) == 1:
                    found[ids[0]] = value
        for bound in (0.0, 1.0):
            if bound not in found.values():
                words = [word for word, value in self._framing.labels if value == bound]
                raise ConfigError(
                    f"framing {self._framing.name!r}: none of {', '.join(words)} is one token of "
                    f"{self._backbone.name}; choose another framing"
                )
        return dict(sorted(found.items()))

    def margins(self, states: Tensor) -> Tensor:
        """(batch,) float32 margins from (batch, hidden) states of what the model is about to say."""
        return margin(self.logits(states, self.ids), self._values)

    def logits(self, states: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """(batch, num_ids) logits of some tokens, or of all, float32 or wider whatever the type of the weights."""
        return self._backbone.token_logits(states, ids)
