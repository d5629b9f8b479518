"""Retrieval metrics by name, per query, with intervals and paired tests.

All of them follow from the ranks (and grades) of a query's relevant items, however those were found: `ranks_of_order`
and `ranks_of_scores` look at the whole matrix of scores, `blockwise_ranks` never holds it.

*Ties count against us.* Among equal scores irrelevant items come first, then relevant ones with the lower grade first;
NaN is the worst score, and so is -inf. A relevant item whose score equals that of m irrelevant ones therefore stands
behind all m. Other tools break ties by item id or by position, and agree where no scores are equal.
"""

from slq.metrics.blockwise import blockwise_ranks, ranks_of_blocks
from slq.metrics.named import KNOWN, Metric, figures, parse_metric, parse_metrics, values_of
from slq.metrics.ranked import (
    Bools,
    Floats,
    hits,
    ndcg,
    pessimistic_order,
    recalls,
    reciprocal_ranks,
)
from slq.metrics.ranks import (
    Ranks,
    Relevance,
    ranks_of_order,
    ranks_of_scores,
    with_equal_items,
)
from slq.metrics.significance import (
    bootstrap_interval,
    bootstrap_intervals,
    compared,
    holm,
    paired_permutation,
    permutation_p_values,
)

__all__ = [
    "KNOWN",
    "Bools",
    "Floats",
    "Metric",
    "Ranks",
    "Relevance",
    "blockwise_ranks",
    "bootstrap_interval",
    "bootstrap_intervals",
    "compared",
    "figures",
    "hits",
    "holm",
    "ndcg",
    "paired_permutation",
    "parse_metric",
    "parse_metrics",
    "permutation_p_values",
    "pessimistic_order",
    "ranks_of_blocks",
    "ranks_of_order",
    "ranks_of_scores",
    "recalls",
    "reciprocal_ranks",
    "values_of",
    "with_equal_items",
]
