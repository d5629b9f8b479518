"""What training does to the embedding space and to the latents, as plain numbers.

Rows of `images` and `texts` are pairs: row i of one belongs to row i of the other. Every measure is computed in
float64, and rows are normalised here, so their lengths do not matter; a row without a direction (zero, NaN, infinite)
is an error.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from slq.errors import ConfigError, DataError
from slq.metrics import Bools, hits, pessimistic_order

DEAD_BELOW = 0.01
"""Variation under which a latent is called dead: its state moves less than a tenth of the average state's length."""
_BLOCK_ROWS = 512


def modality_gap(images: Tensor, texts: Tensor) -> float:
    """Distance between the mean unit vectors of the two sides, 0 to 2 (Liang et al. 2022, arXiv 2203.02053).

    Args:
        images: (batch, hidden), any float type; one row is enough.
        texts: (other_batch, hidden); need not be pairs.

    Raises:
        DataError: A side has no rows, or a row has no direction.
    """
    gap = _directions(images, "images").mean(0) - _directions(texts, "texts").mean(0)
    return float(gap.norm())


def alignment(images: Tensor, texts: Tensor) -> float:
    """Mean squared distance of pairs, 0 (equal) to 4 (opposite); lower is better.

    Source: Wang & Isola 2020 (arXiv 2005.10242), equation 2 with alpha = 2; for unit vectors 2 - 2 cosine.

    Args:
        images: (batch, hidden), any float type; one pair is enough.
        texts: (batch, hidden).

    Raises:
        DataError: The sides do not pair up, have no rows, or a row has no direction.
    """
    first, second = _pairs(images, texts)
    return float((first - second).square().sum(1).mean())


def uniformity(vectors: Tensor, t: float = 2.0) -> float:
    """Log mean exp(-t d^2) over all pairs of different rows: 0 if all rows are equal, lower is more even.

    Source: Wang & Isola 2020 (arXiv 2005.10242), equation 3. Takes time quadratic in the rows, memory linear.

    Args:
        vectors: (batch, hidden), any float type, two rows at least.
        t: Sharpness, above 0; 2 in the paper.

    Returns:
        Nats, from -4 t (all pairs opposite) to 0.

    Raises:
        ConfigError: t is not above 0.
        DataError: There are fewer than two rows, or a row has no direction.
    """
    if not t > 0:
        raise ConfigError(f"uniformity's t is {t}; it must be above 0")
    rows = _directions(vectors, "vectors")
    if len(rows) < 2:
        raise DataError(
            "uniformity compares pairs of rows, and there is only one; give two or more"
        )
    sums = []
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        squared = (2 - 2 * block @ rows[start:].T).clamp(min=0)  # (block, rows from start on)
        seen = torch.ones_like(squared, dtype=torch.bool).tril()  # earlier rows, and the row itself
        sums.append((-t * squared).masked_fill(seen, -math.inf).flatten().logsumexp(0))
    return float(torch.stack(sums).logsumexp(0)) - math.log(math.comb(len(rows), 2))


def latent_norms(latents: Tensor) -> Tensor:
    """Lengths of the latent queries: (num_latents, hidden) of any float type -> (num_latents,) float64.

    Raises:
        DataError: The shape is another, there is no latent, or a value is not finite.
    """
    if latents.ndim != 2 or not len(latents):
        raise DataError(f"latents must be (num_latents, hidden), not {tuple(latents.shape)}")
    norms: Tensor = torch.linalg.vector_norm(_finite(latents, "latents"), dim=1)
    return norms


def latent_variation(states: Tensor) -> Tensor:
    """How far the read-out state of each latent depends on the input.

    The mean squared distance of a latent's state from its own mean over the inputs, divided by the mean squared length
    of all states of all latents. The read-out is the mean over latents: a state that is the same for every input adds
    one and the same vector to every embedding and tells no two inputs apart, however long it is; nor does a state so
    short that the others drown it. The common divisor shows both, and shows latents that all collapse together. A copy
    of another latent varies as that one does: redundancy is not seen.

    Args:
        states: (batch, num_latents, hidden) states after the final norm, any float type, two inputs at least. Give one
            modality at a time: over both, a latent that only tells images from texts would seem alive.

    Returns:
        (num_latents,) float64, each zero or more and their mean at most 1; all 0 if every state is zero.

    Raises:
        DataError: The shape is another, there are fewer than two inputs, or a value is not finite.
    """
    if states.ndim != 3 or states.shape[0] < 2 or not states.shape[1]:
        raise DataError(
            "variation needs states (batch, num_latents, hidden) of two or more inputs, "
            f"not {tuple(states.shape)}"
        )
    values = _finite(states, "states")
    spread = (values - values.mean(0)).square().sum(-1).mean(0)  # (num_latents,)
    energy = values.square().sum(-1).mean()
    return spread / energy if energy > 0 else torch.zeros_like(spread)


def dead_latents(states: Tensor, threshold: float = DEAD_BELOW) -> Tensor:
    """Which latents say nothing of the input: those whose `latent_variation` is under `threshold`.

    Args:
        states: (batch, num_latents, hidden) as for `latent_variation`.
        threshold: Above 0; a share of the mean squared length of the states.

    Returns:
        (num_latents,) bool.

    Raises:
        ConfigError: The threshold is not above 0.
        DataError: As for `latent_variation`.
    """
    if not threshold > 0:
        raise ConfigError(
            f"threshold is {threshold}; it must be above 0, or no latent is ever dead"
        )
    return latent_variation(states) < threshold


def retrieval_report(
    images: Tensor, texts: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """hit@k in both directions, where the only right answer to row i is row i; ties count against us.

    Sorts every row of similarities: meant for the few thousand pairs of an evaluation during training.

    Args:
        images: (batch, hidden), any float type.
        texts: (batch, hidden).
        ks: Depths, one or more; a depth beyond the batch gives 1.

    Returns:
        `text_to_image/hit@k` and `image_to_text/hit@k` for each k, in 0..1.

    Raises:
        ConfigError: A depth is under 1.
        DataError: The sides do not pair up, have no rows, or a row has no direction.
    """
    if not ks or min(ks) < 1:
        raise ConfigError(f"ks is {list(ks)}; name one depth or more, each 1 or above")
    first, second = _pairs(images, texts)
    report: dict[str, float] = {}
    for name, queries, documents in (
        ("text_to_image", second, first),
        ("image_to_text", first, second),
    ):
        found = _own_row_found(queries, documents, max(ks))
        report |= {f"{name}/hit@{k}": float(hits(found, k).mean()) for k in ks}
    return report


def _own_row_found(queries: Tensor, documents: Tensor, depth: int) -> Bools:
    """(batch, depth) whether the document at each rank is the query's own."""
    ranked = []
    for start in range(0, len(queries), _BLOCK_ROWS):
        # float32 as in search: similarities that differ by less are ties
        scores = (queries[start : start + _BLOCK_ROWS] @ documents.T).float().cpu().numpy()
        own = np.eye(len(scores), len(documents), k=start, dtype=np.bool_)
        order = pessimistic_order(scores, own)[:, :depth]
        ranked.append(np.take_along_axis(own, order, axis=1))
    return np.concatenate(ranked)


def diagnose(
    images: Tensor,
    texts: Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
    latents: Tensor | None = None,
    states: Mapping[str, Tensor] | None = None,
    dead_below: float = DEAD_BELOW,
) -> dict[str, float]:
    """Every measure of this module on one evaluation set, by flat names that a training log can take.

    Args:
        images: (batch, hidden) embeddings, any float type; two pairs at least.
        texts: (batch, hidden); row i belongs to image i.
        ks: Depths of hit@k.
        latents: (num_latents, hidden) latent queries; their lengths are left out without them.
        states: (batch, num_latents, hidden) read-out states by modality (`images`, `texts`).
        dead_below: Threshold of `dead_latents`.

    Returns:
        `space/modality_gap`, `space/alignment`, `space/uniformity_images`, `space/uniformity_texts`, and
        `text_to_image/hit@k` and `image_to_text/hit@k`; with latents `latents/norm_min`, `_mean` and `_max`; for each
        modality of `states` `latents/variation_min_<modality>` and `latents/dead_<modality>` (a count).

    Raises:
        ConfigError: A setting is out of range.
        DataError: As for the measures; the first unusable row is named.
    """
    report = {
        "space/modality_gap": modality_gap(images, texts),
        "space/alignment": alignment(images, texts),
        "space/uniformity_images": uniformity(images),
        "space/uniformity_texts": uniformity(texts),
        **retrieval_report(images, texts, ks),
    }
    if latents is not None:
        norms = latent_norms(latents)
        report |= {
            "latents/norm_min": float(norms.min()),
            "latents/norm_mean": float(norms.mean()),
            "latents/norm_max": float(norms.max()),
        }
    for modality, values in (states or {}).items():
        report[f"latents/variation_min_{modality}"] = float(latent_variation(values).min())
        report[f"latents/dead_{modality}"] = float(dead_latents(values, dead_below).sum())
    return report


def _pairs(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape != texts.shape:
        raise DataError(
            f"images {tuple(images.shape)} and texts {tuple(texts.shape)} are no pairs; give one row of each per pair"
        )
    return _directions(images, "images"), _directions(texts, "texts")


def _directions(vectors: Tensor, name: str) -> Tensor:
    """(batch, hidden) float64 unit rows, without gradient."""
    if vectors.ndim != 2 or not len(vectors):
        raise DataError(
            f"{name} must be (batch, hidden) with one row or more, not {tuple(vectors.shape)}"
        )
    values = _finite(vectors, name)
    lengths = torch.linalg.vector_norm(values, dim=1)
    if not bool((lengths > 0).all()):
        row = int((lengths == 0).nonzero()[0])
        raise DataError(f"{name}: row {row} of {len(values)} is all zero, so it has no direction")
    return values.div(lengths[:, None])


def _finite(values: Tensor, name: str) -> Tensor:
    """`values` in float64 without gradient, if all are numbers."""
    exact = values.detach().double()
    broken = ~exact.isfinite().flatten(1).all(1)
    if bool(broken.any()):
        row = int(broken.nonzero()[0])
        raise DataError(
            f"{name}: {int(broken.sum())} of {len(exact)} rows hold NaN or infinity, first row {row}; "
            "look for a loss that is not finite or a type that overflows"
        )
    return exact
