"""The weight of coarse scores beside margins, fitted on held-out queries.

`margin + weight * coarse` orders candidates. With a conditional logit, P(c) = softmax(a margin + b coarse) over the
candidates of a query, the log-likelihood of the relevant ones is concave in (a, b), and weight = b / a.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slq.errors import DataError

_RIDGE = 1e-3  # of a and b in units of their columns' spread: where relevant ones always win there is no maximum
_STEPS, _HALVINGS, _CLOSE = 100, 60, 1e-10

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Judged:
    """The scored candidates of one held-out query.

    Attributes:
        margins: (candidates,) in nats.
        coarse: (candidates,).
        relevant: (candidates,) bool.
    """

    margins: Floats
    coarse: Floats
    relevant: NDArray[np.bool_]

    @property
    def decides(self) -> bool:
        """Whether there is something to tell apart."""
        return bool(self.relevant.any() and not self.relevant.all())


def fit_coarse_weight(queries: Sequence[Judged]) -> float:
    """Nats of margin that one unit of coarse score is worth; 0 or more.

    Args:
        queries: Held out from whatever the weight is used or reported on.

    Raises:
        DataError: No query has both relevant and other candidates, or margins say nothing of relevance there.
    """
    usable = [one for one in queries if one.decides]
    if not usable:
        raise DataError(
            f"none of {len(queries)} held-out queries has both relevant and other candidates among those scored; "
            "give more queries or a larger rerank.depth"
        )
    features = [np.stack([one.margins, one.coarse], axis=1) for one in usable]  # (candidates, 2)
    spread = np.concatenate([one - one.mean(0) for one in features]).std(0)
    spread[spread == 0] = 1.0
    scaled = [one / spread for one in features]
    a, b = _maximum(scaled, [one.relevant for one in usable]) / spread
    if a <= 0:
        raise DataError(
            f"margins do not tell relevant candidates from others on {len(usable)} held-out queries, so they cannot be "
            "weighed; use coarse scores alone"
        )
    return max(0.0, float(b / a))


def _maximum(features: Sequence[Floats], relevant: Sequence[NDArray[np.bool_]]) -> Floats:
    """(2,) weights of the largest penalised likelihood, by Newton's method with halved steps."""
    weights = np.zeros(2)
    value, slope, curve = _likelihood(weights, features, relevant)
    for _ in range(_STEPS):
        step = np.linalg.solve(-curve, slope)
        found = _likelihood(weights + step, features, relevant)
        for _ in range(_HALVINGS):
            if found[0] >= value - _CLOSE:
                break
            step = step / 2
            found = _likelihood(weights + step, features, relevant)
        weights = weights + step
        value, slope, curve = found
        if np.abs(step).max() < _CLOSE:
            break
    return weights


def _likelihood(
    weights: Floats, features: Sequence[Floats], relevant: Sequence[NDArray[np.bool_]]
) -> tuple[float, Floats, Floats]:
    """Mean log-likelihood of relevant candidates, its slope (2,) and curvature (2, 2)."""
    value, slope, curve = 0.0, np.zeros(2), np.zeros((2, 2))
    for rows, is_relevant in zip(features, relevant, strict=True):
        logits = rows @ weights
        logits -= logits.max()
        shares = np.exp(logits) / np.exp(logits).sum()
        centre = shares @ rows
        value += float((logits - np.log(np.exp(logits).sum()))[is_relevant].mean())
        slope += rows[is_relevant].mean(0) - centre
        curve -= (rows * shares[:, None]).T @ rows - np.outer(centre, centre)
    count = len(features)
    return (
        value / count - _RIDGE / 2 * float(weights @ weights),
        slope / count - _RIDGE * weights,
        curve / count - _RIDGE * np.eye(2),
    )
