"""How many candidates of a query are worth the fine stage, by their coarse scores alone.

Coarse scores, divided by the temperature that the adapter was trained with, are logits over the candidates. Where the
best leads far enough there is nothing to decide. Else exp(entropy) of their softmax is how many candidates share the
query's attention, and so many, times a factor, are scored.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from slq.config import Section


class AdaptiveDepth(Section):
    """When the fine stage looks at fewer candidates than it may."""

    temperature: Annotated[float, Field(gt=0)] = 0.05
    """Coarse scores are divided by it; that of the adapter's training fits."""
    sure_lead: Annotated[float, Field(ge=0)] = 4.0
    """Lead of the best candidate over the second, in nats, from which on `least` are scored."""
    spread: Annotated[float, Field(gt=0)] = 1.5
    """Candidates that are scored for each effective one, of which there are exp(entropy)."""
    least: Annotated[int, Field(ge=0)] = 0
    """Candidates that are scored of every query."""


def depth_of(coarse: NDArray[np.floating], most: int, rule: AdaptiveDepth | None) -> int:
    """Candidates of one query to score, the best ones by coarse score.

    Args:
        coarse: (candidates,) scores of the pool, in any order.
        most: That may be scored.
        rule: How many fewer; none where it is None.
    """
    most = min(most, len(coarse))
    if rule is None or most == 0:
        return most
    logits = np.sort(coarse.astype(np.float64))[::-1] / rule.temperature
    logits = logits[np.isfinite(logits)]
    if len(logits) < 2 or logits[0] - logits[1] >= rule.sure_lead:
        return min(rule.least, most)
    shares = np.exp(logits - logits[0])
    shares /= shares.sum()
    entropy = float(-(shares * np.log(np.maximum(shares, np.finfo(float).tiny))).sum())
    return min(max(rule.least, int(np.ceil(rule.spread * np.exp(entropy)))), most)
