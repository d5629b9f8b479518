"""The diagnostic pilot (SLQ's poster, figure 2): texts against images, by the cosine of their embeddings.

The last token of a frozen model is compared with the mean of latent queries that were never trained. Those are random
vectors, and one draw of them is noise: so there are several, and their mean is given with its spread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slq.encoder import Encoder, batches_by_length
from slq.schema import Item


@dataclass(frozen=True)
class Cosines:
    """What one method says.

    Attributes:
        draws: (draws, texts, images) float32 cosines; one draw where nothing is random.
    """

    draws: NDArray[np.float32]

    @property
    def mean(self) -> NDArray[np.float64]:
        """(texts, images)."""
        mean: NDArray[np.float64] = self.draws.mean(axis=0, dtype=np.float64)
        return mean

    @property
    def spread(self) -> NDArray[np.float64]:
        """(texts, images) standard deviations over draws, of a sample; 0 of a single one."""
        if len(self.draws) == 1:
            return np.zeros(self.draws.shape[1:])
        spread: NDArray[np.float64] = self.draws.std(axis=0, ddof=1, dtype=np.float64)
        return spread

    @property
    def best(self) -> NDArray[np.int64]:
        """(texts,) the image of the highest mean; of equals the first."""
        best: NDArray[np.int64] = self.mean.argmax(axis=1)
        return best

    def share_right(self, answers: Sequence[frozenset[int]]) -> list[float | None]:
        """Of each text the share of draws whose best image is right; None where nobody says what is.

        Args:
            answers: Of each text the right images, by number.
        """
        firsts = self.draws.argmax(axis=2)  # (draws, texts)
        return [
            float(np.isin(firsts[:, n], sorted(right)).mean()) if right else None
            for n, right in enumerate(answers)
        ]

    def to_json(self, answers: Sequence[frozenset[int]]) -> dict[str, Any]:
        """Plain data."""
        best = self.best.tolist()
        return {
            "num_draws": len(self.draws),
            "mean": self.mean.tolist(),
            "spread": self.spread.tolist(),
            "best": best,
            "is_right": [
                n in right if right else None for n, right in zip(best, answers, strict=True)
            ],
            "share_right": self.share_right(answers),
            "draws": self.draws.tolist(),
        }


@torch.no_grad()
def embedded(
    encoders: Sequence[Encoder], items: Sequence[Item], *, batch_size: int = 32
) -> NDArray[np.float32]:
    """Embeddings of items by several encoders, from one pass over each prefix.

    Args:
        encoders: Over one and the same backbone.
        items: Texts or images.
        batch_size: Items per pass.

    Returns:
        (encoders, items, hidden) float32 unit vectors.
    """
    backbone = encoders[0].backbone
    vectors = np.empty((len(encoders), len(items), backbone.hidden_size), np.float32)
    for chunk in batches_by_length(items, batch_size):
        prefix = backbone.prefix(backbone.prompts([items[n] for n in chunk]))
        for number, encoder in enumerate(encoders):
            vectors[number, chunk] = encoder.encode_prefix(prefix).cpu().numpy()
    return vectors


def cosines(
    encoders: Sequence[Encoder], texts: Sequence[Item], images: Sequence[Item]
) -> NDArray[np.float32]:
    """(encoders, texts, images) float32 cosines of every text with every image."""
    of_texts, of_images = embedded(encoders, texts), embedded(encoders, images)
    found: NDArray[np.float32] = np.einsum("eth,eih->eti", of_texts, of_images)
    return found
