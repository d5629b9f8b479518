"""Objectives beyond the paper's: nested dimensions, distillation of the fine stage, mined hard negatives.

Like `slq.losses`, they see the whole (gathered) batch, and every similarity is a cosine. With no extra dimension and no
negative each of the InfoNCE forms is `info_nce`, up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from slq.errors import ConfigError
from slq.losses import info_nce
from slq.pooling import unit_norm


@dataclass(frozen=True, slots=True, eq=False)
class HardNegatives:
    """Mined wrong candidates, each for one query of the batch only.

    Attributes:
        vectors: (batch, num_negatives, hidden) unit vectors; row i is wrong for query i. Where `present` is False the
            values do not matter, but they must be finite.
        present: (batch, num_negatives) bool; False where a query has fewer than num_negatives.

    Raises:
        ConfigError: The shapes or the mask's type do not fit.
    """

    vectors: Tensor
    present: Tensor

    def __post_init__(self) -> None:
        vectors, present = self.vectors, self.present
        if vectors.ndim != 3 or present.shape != vectors.shape[:2] or present.dtype != torch.bool:
            raise ConfigError(
                "hard negatives need vectors (batch, num_negatives, hidden) and a bool mask "
                f"(batch, num_negatives), not {tuple(vectors.shape)} and {tuple(present.shape)} of {present.dtype}"
            )


def matryoshka_info_nce(
    images: Tensor,
    texts: Tensor,
    temperature: Tensor,
    dimensions: Sequence[int],
    *,
    negative_images: HardNegatives | None = None,
) -> Tensor:
    """Mean InfoNCE over nested prefixes of the vectors, so that cut embeddings retrieve too.

    Source: Kusupati et al. 2022 (arXiv 2205.13147), equation 1 with equal weights, as a mean instead of a sum. Each
    prefix is normalised again, as a search on cut vectors does.

    Args:
        images: (batch, hidden) unit vectors.
        texts: (batch, hidden) unit vectors; row i belongs to image i and to no other.
        temperature: Scalar that divides the similarities, the same for every prefix.
        dimensions: Lengths of the prefixes, without duplicates. The full length always counts, named or not.
        negative_images: Wrong images of each text, cut like the others; see `info_nce_with_negatives`.

    Returns:
        Scalar loss in nats.

    Raises:
        ConfigError: A length lies outside 1..hidden or is named twice.
    """
    hidden = images.shape[1]
    wrong = [d for d in dimensions if not 1 <= d <= hidden]
    if wrong or len(set(dimensions)) != len(dimensions):
        raise ConfigError(
            f"dimensions {list(dimensions)} must be different lengths from 1 to the embedding's {hidden}"
        )
    losses = []
    for length in (hidden, *sorted(set(dimensions) - {hidden})):
        sides, negatives = (images, texts), negative_images
        if length < hidden:
            sides = (unit_norm(images[:, :length]), unit_norm(texts[:, :length]))
            negatives = negatives and replace(
                negatives, vectors=unit_norm(negatives.vectors[..., :length])
            )
        if negatives is None:
            losses.append(info_nce(*sides, temperature))
        else:
            losses.append(info_nce_with_negatives(*sides, temperature, negative_images=negatives))
    return torch.stack(losses).mean()


def distillation_loss(
    similarities: Tensor,
    margins: Tensor,
    temperature: Tensor | float,
    teacher_temperature: float,
    *,
    present: Tensor | None = None,
) -> Tensor:
    """KL divergence of the coarse stage from the fine stage over each query's candidates.

    The teacher is softmax(margins / teacher_temperature), the student softmax(similarities / temperature), and the
    loss KL(teacher || student), averaged over queries. Hinton et al. 2015 (arXiv 1503.02531) scale by the square of
    one temperature that both sides share; here each side has its own, so nothing is scaled.

    Args:
        similarities: (queries, candidates) cosines.
        margins: (queries, candidates) `slq.scoring.margin` of the same pairs, in nats; finite, no gradient goes there.
        temperature: Divides the similarities; the learned one that InfoNCE uses.
        teacher_temperature: Divides the margins; above 0. A small one trusts only the best candidate.
        present: (queries, candidates) bool, False where a query has fewer candidates; None if all are there.

    Returns:
        Scalar in nats, 0 where both sides agree. A query with fewer than two candidates costs nothing, but counts in
        the mean.

    Raises:
        ConfigError: The shapes differ, or the teacher's temperature is not above 0.
    """
    shapes = [similarities.shape, margins.shape] + ([] if present is None else [present.shape])
    if len(set(shapes)) > 1:
        shown = " and ".join(str(tuple(shape)) for shape in shapes)
        raise ConfigError(f"similarities, margins and mask must have one shape, not {shown}")
    if not teacher_temperature > 0:
        raise ConfigError(f"teacher_temperature is {teacher_temperature}; it must be above 0")
    teacher = margins.detach().to(similarities.dtype) / teacher_temperature
    student = similarities / temperature
    if present is not None:
        # The lowest finite number, not -inf: 0 * -inf would be NaN, and a query may have no candidate at all.
        lowest = torch.finfo(similarities.dtype).min
        teacher = teacher.masked_fill(~present, lowest)
        student = student.masked_fill(~present, lowest)
    log_teacher, log_student = teacher.log_softmax(-1), student.log_softmax(-1)
    terms = log_teacher.exp() * (log_teacher - log_student)  # (queries, candidates)
    if present is not None:
        terms = terms.masked_fill(~present, 0.0)
    return terms.sum(-1).mean()


def info_nce_with_negatives(
    images: Tensor,
    texts: Tensor,
    temperature: Tensor,
    *,
    negative_images: HardNegatives | None = None,
    negative_texts: HardNegatives | None = None,
) -> Tensor:
    """Symmetric InfoNCE whose rows have mined hard negatives besides those of the batch.

    A negative joins the denominator of its own query only: `negative_images` those of text->image, `negative_texts`
    those of image->text (as the hard negatives of DPR, Karpukhin et al. 2020, arXiv 2004.04906, section 3.2, which
    however let them serve the whole batch). A scene with one changed relation is wrong for its own caption, but nobody
    checked it against the others. A negative that also stands in the batch counts twice.

    Args:
        images: (batch, hidden) unit vectors.
        texts: (batch, hidden) unit vectors; row i belongs to image i and to no other.
        temperature: Scalar that divides the similarities.
        negative_images: Wrong images of each text; None for none.
        negative_texts: Wrong texts of each image; None for none.

    Returns:
        Scalar loss in nats.

    Raises:
        ConfigError: Negatives belong to a batch of another size or width.
    """
    logits = images @ texts.T / temperature
    target = torch.arange(len(logits), device=logits.device)
    image_rows = _with_negatives(logits, images, negative_texts, temperature)
    text_rows = _with_negatives(logits.T, texts, negative_images, temperature)
    return (F.cross_entropy(image_rows, target) + F.cross_entropy(text_rows, target)) / 2


def _with_negatives(
    logits: Tensor, queries: Tensor, negatives: HardNegatives | None, temperature: Tensor
) -> Tensor:
    """(batch, batch) logits with columns for each query's own negatives: (batch, batch + num_negatives)."""
    if negatives is None:
        return logits
    batch, _, hidden = negatives.vectors.shape
    if (batch, hidden) != tuple(queries.shape):
        raise ConfigError(
            f"hard negatives {tuple(negatives.vectors.shape)} do not belong to a batch of {tuple(queries.shape)}; "
            "give one row of negatives for each query, gathered over workers like the batch"
        )
    own = torch.einsum("bh,bnh->bn", queries, negatives.vectors) / temperature
    # -inf is safe: the query's own positive is always in the row
    own = own.masked_fill(~negatives.present, float("-inf"))
    return torch.cat([logits, own], dim=1)
