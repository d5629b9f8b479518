"""How far a mean over queries can be trusted: bootstrap intervals, paired permutation tests, Holm's correction."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slq.metrics.ranked import Floats

_AT_ONCE = 2**22  # random numbers of a block of resamples, 32 MiB


def bootstrap_interval(
    values: Floats, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over queries.

    Args:
        values: (queries,) per-query metric.
        confidence: Probability mass inside.
        resamples: Bootstrap samples.
        seed: Of the resampling.
    """
    (interval,) = bootstrap_intervals(
        values[None], confidence=confidence, resamples=resamples, seed=seed
    )
    return interval


def bootstrap_intervals(
    values: Floats, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> list[tuple[float, float]]:
    """`bootstrap_interval` of several metrics of the same queries, from the same samples of these.

    Args:
        values: (metrics, queries).
        confidence: Probability mass inside.
        resamples: Bootstrap samples.
        seed: Of the resampling.
    """
    return _intervals(_resampled(values, resamples, seed), confidence)


def _resampled(values: Floats, resamples: int, seed: int) -> Floats:
    """(metrics, resamples) means of (metrics, queries) numbers over the same samples of queries."""
    rng, count = np.random.default_rng(seed), values.shape[1]
    means = np.empty((len(values), resamples))
    for rows in _blocks(resamples, count):
        picks = rng.integers(count, size=(rows.stop - rows.start, count))
        for row, numbers in zip(means, values, strict=True):
            row[rows] = numbers[picks].mean(axis=1)
    return means


def _intervals(means: Floats, confidence: float) -> list[tuple[float, float]]:
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(means, [tail, 1.0 - tail], axis=1)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def paired_permutation(
    first: Floats, second: Floats, *, resamples: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of a paired randomisation test on the mean difference.

    Args:
        first: (queries,) per-query metric of one system.
        second: The same queries in the same order for the other.
        resamples: Random sign assignments.
        seed: Of the assignments.
    """
    found = permutation_p_values((first - second)[None], resamples=resamples, seed=seed)
    return float(found[0])


def permutation_p_values(differences: Floats, *, resamples: int = 10_000, seed: int = 0) -> Floats:
    """`paired_permutation` of several differences of the same queries, from the same assignments of signs.

    Args:
        differences: (comparisons, queries).
        resamples: Random sign assignments.
        seed: Of the assignments.

    Returns:
        (comparisons,) p-values, at least 1 / (resamples + 1).
    """
    rng, count = np.random.default_rng(seed), differences.shape[1]
    observed = np.abs(differences.mean(axis=1))
    extreme = np.zeros(len(differences), np.int64)
    for rows in _blocks(resamples, count):
        signs = rng.choice([-1.0, 1.0], size=(rows.stop - rows.start, count))
        means = np.abs(signs @ differences.T) / count
        extreme += (means >= observed - 1e-12).sum(axis=0)
    return (extreme + 1) / (resamples + 1)


def _blocks(resamples: int, count: int) -> Iterator[slice]:
    """Slices of the resamples whose random numbers fit the memory; the numbers are those of all at once."""
    size = max(1, _AT_ONCE // max(1, count))
    for start in range(0, resamples, size):
        yield slice(start, min(start + size, resamples))


def holm(p_values: Sequence[float] | NDArray[np.float64]) -> list[float]:
    """p-values of one family, corrected for how many they are (Holm 1979, step-down Bonferroni), in their order."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(raised, 1.0)
    return [float(value) for value in corrected]


def compared(
    values: Mapping[str, Mapping[str, Floats]], pairs: Sequence[tuple[str, str]]
) -> dict[str, list[dict[str, Any]]]:
    """Paired tests between systems on the same queries, by metric.

    Args:
        values: (queries,) numbers of each metric, by system and metric; the same queries and metrics for all.
        pairs: Systems to compare, by name.

    Returns:
        Of each metric and pair: `systems` (both names), `difference` (mean of the first less the second), `interval`
        (95%, bootstrap over queries), `p` of the paired permutation test, and `p_holm`, corrected over the pairs of
        this metric.
    """
    if not pairs:
        return {}
    metrics = list(values[pairs[0][0]])
    resampled = {
        name: _resampled(np.stack([values[name][metric] for metric in metrics]), 2000, 0)
        for name in {name for pair in pairs for name in pair}
    }
    differences = np.stack(
        [values[a][metric] - values[b][metric] for metric in metrics for a, b in pairs]
    )
    means = np.stack(
        [resampled[a][n] - resampled[b][n] for n in range(len(metrics)) for a, b in pairs]
    )
    intervals, p_values = _intervals(means, 0.95), permutation_p_values(differences)
    report: dict[str, list[dict[str, Any]]] = {}
    for n, metric in enumerate(metrics):
        family = slice(n * len(pairs), (n + 1) * len(pairs))
        found = zip(
            pairs,
            differences[family].mean(axis=1).tolist(),
            intervals[family],
            p_values[family].tolist(),
            holm(p_values[family]),
            strict=True,
        )
        report[metric] = [
            {"systems": pair, "difference": difference, "interval": interval, "p": p, "p_holm": h}
            for pair, difference, interval, p, h in found
        ]
    return report
