"""Relevance scores read from next-token logits (spec: RetLLM section 2).

Every label i has a logit z_i and a value v_i in [0, 1], how much of a match it stands for. Then
`margin = logsumexp(z + ln v) - logsumexp(z + ln(1 - v))`. Where values are 1 and 0 only it is
`logsumexp(z[Y+]) - logsumexp(z[Y-])`, and always `sigmoid(margin)` is the value to expect, given that a label comes.
`label_mass` is the probability of any label over the full vocabulary. All in float32, never truncated or rounded.
"""

import torch
from torch import Tensor


def margin(logits: Tensor, values: Tensor) -> Tensor:
    """How much more the labels speak for a match than against one.

    Args:
        logits: (batch, num_labels), any float type.
        values: (num_labels,) in [0, 1], with one above 0 and one below 1.

    Returns:
        (batch,) float32 in nats; higher means a better match.
    """
    scores, shares = logits.float(), values.to(logits.device).float()
    return (scores + shares.log()).logsumexp(-1) - (scores + (1 - shares).log()).logsumexp(-1)


def label_mass(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability that the next token is a label: (batch,) float32, from (batch, vocab) full logits.

    Below 0.5 the model did not answer the question, and the margin means little.
    """
    scores = logits.float()
    return (scores[:, labels].logsumexp(-1) - scores.logsumexp(-1)).exp()


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the next token over the full vocabulary, (batch,) float32 in nats, from (batch, vocab)."""
    nats: Tensor = torch.special.entr(logits.float().softmax(-1)).sum(-1)
    return nats


def hundredths(probabilities: Tensor) -> Tensor:
    """Probabilities cut to two decimals, as RetLLM's release does: (batch,) whole hundredths, int64.

    It makes ties that the margin does not have; only the `compat` profile ranks by it.
    """
    return (probabilities.double() * 100).floor().long()


def probability(logits: Tensor, token: int) -> Tensor:
    """Probability of one token over the full vocabulary: (batch,) float32, from (batch, vocab)."""
    return logits.float().log_softmax(-1)[:, token].exp()
