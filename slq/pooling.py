"""From hidden states to one unit vector (spec: SLQ section 1, read-out)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mean_pool(hidden: Tensor) -> Tensor:
    """Mean over the latent positions: (batch, num_latents, hidden) -> (batch, hidden), float32 or wider.

    The hidden states must come from after the final norm; before it, massive activations drown the rest.
    """
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32)).mean(dim=1)


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The state at each row's last real token, for left or right padding.

    Args:
        hidden: (batch, seq, hidden).
        mask: (batch, seq), non-zero at real tokens; each row has one at least.

    Returns:
        (batch, hidden) float32.
    """
    seq = mask.shape[1]
    last = seq - 1 - mask.long().flip(1).argmax(1)
    rows = last.new_tensor(range(hidden.shape[0]))
    return hidden[rows, last].float()


def unit_norm(vectors: Tensor) -> Tensor:
    """L2-normalised rows; computed in float32, or float64 where the input is."""
    return F.normalize(vectors, dim=-1)
