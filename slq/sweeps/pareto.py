"""Which of several choices no other one beats."""

from collections.abc import Sequence


def front(costs: Sequence[float], values: Sequence[float]) -> list[bool]:
    """Whether each choice lies on the Pareto front: no other is worth as much for less, or more for as much.

    Args:
        costs: Less is better.
        values: More is better. Of choices that are equal in both, all are on the front or none is.
    """
    pairs = list(zip(costs, values, strict=True))
    return [
        not any(
            (cost <= own and value >= worth) and (cost, value) != (own, worth)
            for cost, value in pairs
        )
        for own, worth in pairs
    ]
