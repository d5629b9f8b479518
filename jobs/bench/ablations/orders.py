"""From what was read of pairs to what candidates are sorted by, and from that to figures. Ties count against us."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slq.errors import ConfigError
from slq.metrics import bootstrap_interval, hits, pessimistic_order
from slq.reranking.framings import Framing
from slq.scoring import hundredths, margin

Columns = Mapping[str, NDArray[Any]]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

ORDERS: dict[str, Callable[[Columns, Floats], list[NDArray[Any]]]] = {
    "margin": lambda _, margins: [margins],
    "probability": lambda columns, _: [columns["probability"]],
    "hundredths": lambda columns, _: [_cut(columns)],
    "entropy": lambda columns, _: [_cut(columns), -columns["entropy"]],
}
"""What candidates are sorted by before their coarse scores, from columns and margins of pairs; higher is better."""

LABELS: dict[str, Callable[[str, Framing], bool]] = {
    "all": lambda _, __: True,
    "plain": lambda word, framing: word in (framing.positive, framing.negative),
    "space": lambda word, framing: word in (f" {framing.positive}", f" {framing.negative}"),
    "lower": lambda word, _: word.strip().islower(),
}
"""Which variants of label words are read."""


def _cut(columns: Columns) -> Floats:
    return hundredths(torch.from_numpy(columns["probability"])).numpy().astype(np.float64)


def keys_of(
    columns: Columns,
    variants: Sequence[tuple[str, float]],
    framing: Framing,
    *,
    order: str,
    labels: str,
) -> Floats:
    """What pairs are sorted by, (n, num_keys), the first key first; higher is better.

    Args:
        columns: Of `jobs.bench.ablations.scores.Readings.at`.
        variants: Words and values of the columns of `labels`.
        framing: Of the scoring.
        order: A key of `ORDERS`.
        labels: A key of `LABELS`.

    Raises:
        ConfigError: As of `label_columns`.
    """
    kept = label_columns(variants, framing, labels)
    values = torch.tensor([variants[n][1] for n in kept])
    margins = margin(torch.from_numpy(columns["labels"][:, kept]), values)
    return np.stack(ORDERS[order](columns, margins.numpy().astype(np.float64)), axis=1)


def label_columns(
    variants: Sequence[tuple[str, float]], framing: Framing, labels: str
) -> list[int]:
    """Columns of the labels that are read.

    Args:
        variants: Words and values of the columns.
        framing: Whose words they are.
        labels: A key of `LABELS`.

    Raises:
        ConfigError: The model has no such labels on both sides.
    """
    kept = [n for n, (word, _) in enumerate(variants) if LABELS[labels](word, framing)]
    values = [variants[n][1] for n in kept]
    if not {0.0, 1.0} <= set(values):
        named = ", ".join(repr(variants[n][0]) for n in kept) or "none"
        raise ConfigError(
            f"the labels {labels!r} of {framing.name} are not single tokens on both sides ({named})"
        )
    return kept


def ranks(keys: Floats) -> NDArray[np.int64]:
    """(n,) whole numbers that order as rows of (n, num_keys) do, the first key first; equal rows are equal.

    NaN counts as the worst value.
    """
    clean = np.where(np.isnan(keys), -np.inf, keys)
    found: NDArray[np.int64] = np.unique(clean, axis=0, return_inverse=True)[1].reshape(len(keys))
    return found


def first_hits(keys: Floats, relevant: Bools) -> Floats:
    """hit@1 of each query, (queries,) of 0 or 1.

    Args:
        keys: (queries, depth, num_keys) of its scored candidates.
        relevant: (queries, depth).
    """
    scores = ranks(keys.reshape(-1, keys.shape[-1])).reshape(relevant.shape).astype(np.float32)
    order = pessimistic_order(scores, relevant)
    return hits(np.take_along_axis(relevant, order, axis=1), 1)


def tied_share(scores: Floats) -> float:
    """Share of queries whose best score belongs to more than one candidate, from (queries, depth)."""
    return float(((scores == scores.max(1, keepdims=True)).sum(1) > 1).mean())


def both_orders(scores: NDArray[Any]) -> dict[str, Bools]:
    """Which choices within hard pairs are right, in both directions; a tie is wrong.

    Args:
        scores: (pairs, 2, 2), of image i and caption j of a pair; those of the same number belong together.

    Returns:
        (pairs, 2) each: `image_to_text`, whether image i prefers its caption to the other one; `text_to_image`,
        whether caption j prefers its image.
    """
    own = np.stack([scores[:, 0, 0], scores[:, 1, 1]], axis=1)
    return {
        "image_to_text": own > np.stack([scores[:, 0, 1], scores[:, 1, 0]], axis=1),
        "text_to_image": own > np.stack([scores[:, 1, 0], scores[:, 0, 1]], axis=1),
    }


def pair_report(right: Mapping[str, Bools]) -> dict[str, Any]:
    """Shares of right choices, and of pairs with all choices right, as of Winoground; intervals over pairs.

    Args:
        right: Of `both_orders`.
    """
    groups: dict[str, Bools] = {name: np.all(found, axis=1) for name, found in right.items()}
    return {
        **{name: share(found.mean(1)) for name, found in right.items()},
        "text_group": share(groups["image_to_text"]),
        "image_group": share(groups["text_to_image"]),
        "group": share(groups["image_to_text"] & groups["text_to_image"]),
    }


def share(values: NDArray[Any]) -> dict[str, Any]:
    """A mean with its 95% bootstrap interval."""
    floats = values.astype(np.float64)
    interval = list(bootstrap_interval(floats))
    return {"value": float(floats.mean()), "interval": interval, "n": len(floats)}


def histogram(fired: NDArray[np.int64], asked: Sequence[int]) -> dict[str, int]:
    """How many pairs each layer was the first to be unsure of, and how many none was.

    Args:
        fired: (n,) layers; -1 where none fired.
        asked: The layers that are asked.
    """
    return {**{str(n): int((fired == n).sum()) for n in asked}, "never": int((fired < 0).sum())}
