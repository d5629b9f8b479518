"""The frozen prefix: keys and values that a causal model computes once and that nothing appended can change.

Because attention is causal, what follows the prefix never alters it, and because the backbone is frozen no gradient
flows through it. So it runs under `no_grad`, and is kept for every latent query, caption, epoch, adapter or candidate
that follows (spec: SLQ section 3).
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from slq.kept import Kept


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a batch of encoded prefixes.

    Attributes:
        keys: One (batch, kv_heads, seq, head_dim) tensor per layer.
        values: The same for values.
        mask: (batch, seq) bool, True at real tokens.
        next_position: (batch,) int64, the position of the token that would follow. Under M-RoPE it is smaller than
            the number of tokens, because an image takes only max(rows, columns) positions.
        last_hidden: (batch, hidden), the last token's state after the final norm.
        shows_image: (batch,) bool, whether an image is among its tokens.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor
    next_position: Tensor
    last_hidden: Tensor
    shows_image: Tensor

    def __len__(self) -> int:
        return int(self.mask.shape[0])

    @property
    def num_bytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def cache(self) -> DynamicCache:
        """A fresh Hugging Face cache over these tensors.

        A forward pass grows the cache it is given, so each pass needs one of its own; growing concatenates into new
        tensors, so ours are shared, not copied.
        """
        return DynamicCache(ddp_cache_data=list(zip(self.keys, self.values, strict=True)))

    def to(self, device: torch.device | str) -> "Prefix":
        """The same tensors on a device; itself if they are there already."""
        return Prefix(
            keys=tuple(key.to(device) for key in self.keys),
            values=tuple(value.to(device) for value in self.values),
            mask=self.mask.to(device),
            next_position=self.next_position.to(device),
            last_hidden=self.last_hidden.to(device),
            shows_image=self.shows_image.to(device),
        )

    def select(self, rows: Tensor) -> "Prefix":
        """The given rows, (n,) int64, in that order; a row may occur several times."""
        return Prefix(
            keys=tuple(key[rows] for key in self.keys),
            values=tuple(value[rows] for value in self.values),
            mask=self.mask[rows],
            next_position=self.next_position[rows],
            last_hidden=self.last_hidden[rows],
            shows_image=self.shows_image[rows],
        )

    def repeat(self, count: int) -> "Prefix":
        """The only row `count` times, on the memory of the one."""

        def of(tensor: Tensor) -> Tensor:
            return tensor.expand(count, *tensor.shape[1:])

        return Prefix(
            keys=tuple(of(key) for key in self.keys),
            values=tuple(of(value) for value in self.values),
            mask=of(self.mask),
            next_position=of(self.next_position),
            last_hidden=of(self.last_hidden),
            shows_image=of(self.shows_image),
        )

    def split(self) -> list["Prefix"]:
        """One prefix per row, without its padding, on its own memory."""
        starts = self.mask.long().argmax(1).tolist()
        lengths = self.mask.sum(1).tolist()
        return [
            self._row(number, slice(start, start + length))
            for number, (start, length) in enumerate(zip(starts, lengths, strict=True))
        ]

    def _row(self, number: int, keep: slice) -> "Prefix":
        return Prefix(
            keys=tuple(key[number : number + 1, :, keep].clone() for key in self.keys),
            values=tuple(value[number : number + 1, :, keep].clone() for value in self.values),
            mask=torch.ones_like(self.mask[number : number + 1, keep]),
            next_position=self.next_position[number : number + 1].clone(),
            last_hidden=self.last_hidden[number : number + 1].clone(),
            shows_image=self.shows_image[number : number + 1].clone(),
        )

    @staticmethod
    def stack(rows: Sequence["Prefix"]) -> "Prefix":
        """Join prefixes into one batch, padded on the right; the opposite of `split`."""
        seq = max(row.mask.shape[1] for row in rows)

        def pad(
            tensor: Tensor,
        ) -> Tensor:  # (n, kv_heads, s, head_dim) -> (n, kv_heads, seq, head_dim)
            short = seq - tensor.shape[2]
            return F.pad(tensor, (0, 0, 0, short)) if short else tensor

        layers = range(len(rows[0].keys))
        return Prefix(
            keys=tuple(torch.cat([pad(row.keys[layer]) for row in rows]) for layer in layers),
            values=tuple(torch.cat([pad(row.values[layer]) for row in rows]) for layer in layers),
            mask=torch.cat([F.pad(row.mask, (0, seq - row.mask.shape[1])) for row in rows]),
            next_position=torch.cat([row.next_position for row in rows]),
            last_hidden=torch.cat([row.last_hidden for row in rows]),
            shows_image=torch.cat([row.shows_image for row in rows]),
        )


class PrefixCache:
    """Least-recently-used single-row prefixes in host memory, bounded in bytes.

    Args:
        max_bytes: Keys and values held at most; 0 keeps nothing.
        device: Where batches are wanted.

    Attributes:
        hits: Rows that were found.
        misses: Rows that had to be computed.
    """

    def __init__(self, max_bytes: int, device: torch.device | str = "cpu") -> None:
        self._max_bytes = max_bytes
        self._device = device
        self._rows: Kept[Prefix] = Kept(max_bytes)
        self.hits = 0
        self.misses = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._rows

    def get(self, keys: Sequence[Hashable], compute: Callable[[list[int]], Prefix]) -> Prefix:
        """The prefixes of `keys` as one batch.

        Args:
            keys: What identifies each row: content and backbone fingerprint, not position.
            compute: Called once with the positions in `keys` that are missing.
        """
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        if self._max_bytes == 0 and len(first) == len(keys):  # no detour over the host
            self.misses += len(keys)
            return compute(list(range(len(keys)))).to(self._device)
        distinct = list(dict.fromkeys(keys))

        def rows(missing: list[int]) -> list[Prefix]:
            self.misses += len(missing)
            self.hits -= len(missing)
            return compute([first[distinct[number]] for number in missing]).to("cpu").split()

        self.hits += len(keys)
        found = dict(zip(distinct, self._rows.get(distinct, rows), strict=True))
        return Prefix.stack([found[key] for key in keys]).to(self._device)
