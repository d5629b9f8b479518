"""Contrastive losses (spec: SLQ section 2)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(images: Tensor, texts: Tensor, temperature: Tensor) -> Tensor:
    """Symmetric InfoNCE over a whole (gathered) batch: the mean of image->text and text->image.

    Args:
        images: (batch, hidden) unit vectors.
        texts: (batch, hidden) unit vectors; row i belongs to image i and to no other.
        temperature: Scalar that divides the similarities.

    Returns:
        Scalar loss in nats.
    """
    logits = images @ texts.T / temperature
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
