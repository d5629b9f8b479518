"""From margins to probabilities that mean what they say, fitted on held-out pairs (spec: RetLLM section 2)."""

import numpy as np
from numpy.typing import NDArray

from slq.errors import DataError

_LEAST, _MOST = 1e-6, 1e6  # of a temperature
_HALVINGS = 200
NUM_BINS = 15


def fit_temperature(margins: NDArray[np.float64], matches: NDArray[np.bool_]) -> float:
    """The temperature T with which `sigmoid(margin / T)` gives held-out matches the largest likelihood.

    The likelihood is log-concave in 1/T, so the only zero of its slope is found by halving. Where every margin has the
    right sign it has none, and the result is so small that all probabilities are 0 or 1.

    Args:
        margins: (n,) in nats.
        matches: (n,) whether each pair is a match.

    Raises:
        DataError: There are only matches, or none, or a margin is not finite.
    """
    _require_both(margins, matches)
    low, high = 1 / _MOST, 1 / _LEAST
    for _ in range(_HALVINGS):
        middle = float(np.sqrt(low * high))  # temperatures span magnitudes
        slope = float(((matches - sigmoid(middle * margins)) * margins).sum())
        low, high = (middle, high) if slope > 0 else (low, middle)
    return 1 / float(np.sqrt(low * high))


def expected_calibration_error(
    probabilities: NDArray[np.float64], matches: NDArray[np.bool_], num_bins: int = NUM_BINS
) -> float:
    """How far probabilities lie from the share of matches, in bins of equal width, weighted by their pairs.

    Args:
        probabilities: (n,) in [0, 1].
        matches: (n,) whether each pair is a match.
        num_bins: Between 0 and 1.

    Returns:
        In [0, 1]; 0 is perfect.
    """
    bins = np.minimum((probabilities * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, probabilities - matches, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(probabilities))


def threshold_for_precision(
    margins: NDArray[np.float64], matches: NDArray[np.bool_], precision: float
) -> float | None:
    """The lowest margin from which on, of all pairs at or above it, this share are matches.

    Args:
        margins: (n,) in nats, held out.
        matches: (n,) whether each pair is a match.
        precision: In (0, 1].

    Returns:
        A margin that occurs; None if no threshold reaches the precision, so that one has to abstain always.
    """
    _require_both(margins, matches)
    order = np.argsort(-margins, kind="stable")
    sorted_margins = margins[order]
    shares = np.cumsum(matches[order]) / np.arange(1, len(order) + 1)
    is_last = np.append(sorted_margins[1:] != sorted_margins[:-1], True)  # equal margins together
    good = np.flatnonzero(is_last & (shares >= precision))
    return float(sorted_margins[good[-1]]) if len(good) else None


def sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`1 / (1 + exp(-x))` without overflow."""
    half: NDArray[np.float64] = 0.5 * (1 + np.tanh(0.5 * values))
    return half


def _require_both(margins: NDArray[np.float64], matches: NDArray[np.bool_]) -> None:
    if not np.isfinite(margins).all():
        raise DataError("margins to calibrate on must be finite")
    if matches.all() or not matches.any():
        kind = "only matches" if len(matches) and matches.all() else "no match"
        raise DataError(f"there is {kind} among {len(matches)} pairs; calibrate on both kinds")
