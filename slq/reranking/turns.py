"""What the passes of the fine stage hand to one another: images as seen, open turns, and what follows them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from slq.backbones.base import Prompt
from slq.backbones.vision import VisionFeatures
from slq.prefix import Prefix
from slq.reranking.layout import Words


@dataclass(frozen=True, eq=False)
class View:
    """An image as the model sees it.

    Attributes:
        opening: The tokens that open the user's turn with it, without its pixels.
        features: What the vision tower made of it.
    """

    opening: Prompt
    features: VisionFeatures

    @property
    def num_bytes(self) -> int:
        """Bytes held by all tensors."""
        light = sum(tensor.nbytes for tensor in self.opening.vision.values())
        return self.features.num_bytes + light


@dataclass(frozen=True, slots=True)
class Head:
    """What a turn opens with; pairs with equal ones share its keys and values.

    Attributes:
        image: Key of its image; of none, too.
        before: Our words that stand before the image.
        system: Message before the turn.
    """

    image: Hashable
    before: tuple[Words, ...] = ()
    system: str | None = None


@dataclass(frozen=True, eq=False)
class Turn:
    """An open turn.

    Attributes:
        prefix: Keys and values of some turns.
        row: Which of them it is.
    """

    prefix: Prefix
    row: int


def prefix_of_turns(turns: Sequence[Turn]) -> Prefix:
    """The turns as one batch; neighbours that come from one pass are taken out of it together."""
    parts = []
    for _, found in groupby(turns, key=lambda turn: id(turn.prefix)):
        same = list(found)
        whole = same[0].prefix
        rows = torch.tensor([turn.row for turn in same], device=whole.mask.device)
        parts.append(whole.repeat(len(same)) if len(whole) == 1 else whole.select(rows))
    return parts[0] if len(parts) == 1 else Prefix.stack(parts)


@dataclass(frozen=True, eq=False)
class Suffix:
    """What follows an open image, up to the end of the user's turn.

    Attributes:
        prompt: Its tokens, with the images among them.
        views: Those images, in order.
    """

    prompt: Prompt
    views: tuple[View, ...] = ()
