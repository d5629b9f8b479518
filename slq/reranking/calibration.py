"""From margins to probabilities that mean what they say, fitted on held-out pairs (spec: RetLLM section 2)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from slq.config import Section
from slq.errors import ArtifactError, DataError
from slq.files import read_json, write_json
from slq.reranking.fusion import Judged, fit_coarse_weight

_LEAST, _MOST = 1e-6, 1e6  # of a temperature
_HALVINGS = 200
NUM_BINS = 15


class Calibration(Section):
    """What was fitted to held-out pairs; it holds for the model and the question that scored them.

    `load` and `save` keep it as JSON.
    """

    temperature: Annotated[float, Field(gt=0)]
    """`sigmoid(margin / temperature)` is the probability of a match."""
    coarse_weight: Annotated[float, Field(ge=0)] = 0.0
    """Nats of margin that one unit of coarse score is worth where the two are fused."""
    threshold: float | None = None
    """The lowest margin from which on `precision` of the pairs are matches; below it a result says little. None if
    there is no such margin."""
    precision: Annotated[float, Field(gt=0, le=1)] = 0.9
    """That `threshold` was chosen for."""
    scorer: str
    """Digest of the model and the question that scored the pairs."""
    held_out_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of queries that it was fitted to, those of which `is_held_out` says so; figures must leave them out."""
    num_queries: int
    """That it was fitted to."""
    num_pairs: int
    """Of those queries."""

    def probability(self, margins: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probabilities of a match."""
        return sigmoid(margins / self.temperature)

    def save(self, path: Path) -> None:
        """Write it; what was there is replaced."""
        write_json(path, self.model_dump())

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read what `save` wrote.

        Raises:
            ArtifactError: There is no such file, or it is none.
        """
        try:
            values = read_json(path)
        except ArtifactError as error:
            raise ArtifactError(
                f"calibration: {error}; `slq rerank` writes one where data.relevance judges its run"
            ) from None
        found = cls.parse(values if isinstance(values, dict) else {}, source=path.name)
        assert isinstance(found, cls)
        return found


def fit(
    queries: Sequence[Judged],
    *,
    scorer: str,
    held_out_share: float = 1.0,
    precision: float = 0.9,
) -> Calibration:
    """Everything that a calibration holds, fitted to held-out queries.

    Args:
        queries: Their scored candidates.
        scorer: Digest of what scored them.
        held_out_share: With which `is_held_out` chose them.
        precision: Share of matches among pairs at or above the threshold.

    Raises:
        DataError: They do not hold both matches and others.
    """
    if not queries:
        raise DataError("there are no held-out queries to calibrate on")
    margins = np.concatenate([one.margins for one in queries])
    matches = np.concatenate([one.relevant for one in queries])
    return Calibration(
        temperature=fit_temperature(margins, matches),
        coarse_weight=fit_coarse_weight(queries),
        threshold=threshold_for_precision(margins, matches, precision),
        precision=precision,
        scorer=scorer,
        held_out_share=held_out_share,
        num_queries=len(queries),
        num_pairs=len(margins),
    )


def is_held_out(query_id: str, share: float) -> bool:
    """Whether a query is one to fit to; it depends on its id alone."""
    digest = hashlib.sha256(query_id.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


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
    gaps = np.bincount(_bins(probabilities, num_bins), probabilities - matches, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(probabilities))


def reliability(
    probabilities: NDArray[np.float64], matches: NDArray[np.bool_], num_bins: int = NUM_BINS
) -> list[dict[str, float]]:
    """What a reliability diagram shows: of each bin that holds pairs how many, their mean probability and matches.

    Args:
        probabilities: (n,) in [0, 1].
        matches: (n,) whether each pair is a match.
        num_bins: Between 0 and 1, of equal width.
    """
    bins = _bins(probabilities, num_bins)
    counts = np.bincount(bins, minlength=num_bins)
    said, true = (np.bincount(bins, one, minlength=num_bins) for one in (probabilities, matches))
    return [
        {"pairs": int(count), "probability": float(p / count), "matches": float(m / count)}
        for count, p, m in zip(counts, said, true, strict=True)
        if count
    ]


def _bins(probabilities: NDArray[np.float64], num_bins: int) -> NDArray[np.int64]:
    return np.minimum((probabilities * num_bins).astype(np.int64), num_bins - 1)


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
