"""What tokens attend to, read off the passes in which they do.

The kernels never form attention weights. So while somebody watches, the weights of a few tokens are computed beside
them, from the very keys and queries that the kernel gets; nothing of the pass changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class Watch:
    """Attention of the last tokens of a pass of one row.

    Args:
        num_tokens: How many of them.

    Attributes:
        layers: Of each layer in turn a (length,) tensor, float32 or wider: the attention to each token from the first
            of the prefix on, averaged over heads and watched tokens, with the sum 1.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self.layers: list[Tensor] = []

    def see(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None = None
    ) -> None:
        """Take note of a layer; arguments as of `grouped_attention`."""
        weights = attention_weights(query, key, mask, scaling, num_tokens=self._num_tokens)
        self.layers.append(weights[0].mean(dim=(0, 1)))


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    *,
    num_tokens: int,
) -> Tensor:
    """Softmax weights of the last tokens of each row.

    Args:
        query: (batch, heads, n, dim).
        key: (batch, key_heads, length, dim); key heads are shared by groups of heads.
        mask: (batch, 1 or heads, n, length), bool or additive; causal if left out.
        scaling: Of the products; 1 / sqrt(dim) by default.
        num_tokens: At the end of the pass.

    Returns:
        (batch, heads, num_tokens, length), float32 or wider.
    """
    kind = torch.promote_types(query.dtype, torch.float32)
    last = query[:, :, -num_tokens:].to(kind)
    keys = key.to(kind).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = last @ keys.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if mask is None:
        shape = logits.shape[2:]
        mask = torch.ones(shape, dtype=torch.bool, device=key.device).tril(shape[1] - shape[0])
    else:
        mask = mask[:, :, -num_tokens:]
    logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1)


_CURRENT: ContextVar[Watch | None] = ContextVar("watch", default=None)


def current_watch() -> Watch | None:
    """Who watches passes of this thread, if anybody does."""
    return _CURRENT.get()


@contextmanager
def watching(num_tokens: int) -> Iterator[Watch]:
    """Watch passes of this thread until the end of the block.

    Args:
        num_tokens: At the end of the pass whose attention is wanted. There must be one pass, of one row.
    """
    watch = Watch(num_tokens)
    before = _CURRENT.set(watch)
    try:
        yield watch
    finally:
        _CURRENT.reset(before)
