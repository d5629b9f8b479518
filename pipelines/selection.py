"""Which pairs of a table a run trains on, which it measures on, and the negatives that belong to them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.negatives import MinedNegatives, read_negatives
from pipelines.pairs import Pairs
from pipelines.recipe import Recipe
from slq.errors import ConfigError
from slq.schema import Item
from slq.training import Side

_HOLD_OUT_STREAM = 2**30  # keeps its generator apart from those of the sampler


class ChosenPairs:
    """Some of the pairs, numbered anew.

    Args:
        pairs: All of them.
        numbers: (chosen,) int64.
    """

    def __init__(self, pairs: Pairs, numbers: NDArray[np.int64]) -> None:
        self._pairs = pairs
        self._numbers = numbers
        self.image_keys = [pairs.image_keys[n] for n in numbers]
        self.query_keys = [pairs.query_keys[n] for n in numbers]
        names = pairs.ids
        self.ids = [names[n] for n in numbers]

    def item(self, pair: int, side: Side) -> Item:
        """One decoded side of a pair.

        Raises:
            DataError: It cannot be used.
        """
        return self._pairs.item(int(self._numbers[pair]), side)

    def digest(self, pair: int) -> str:
        """sha256 of the query's content as stored.

        Raises:
            DataError: It cannot be read.
        """
        return self._pairs.digest(int(self._numbers[pair]))


def hold_out(
    image_keys: Sequence[str], usable: Sequence[int], count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Set images aside, with all their pairs.

    Args:
        image_keys: The image of each pair.
        usable: The pairs that may be used at all.
        count: Images to set aside.
        seed: Of the draw.

    Returns:
        (pairs,) int64 to train on, and (count,) int64, one pair of each image that is set aside.

    Raises:
        ConfigError: There are not that many images.
    """
    images = list(dict.fromkeys(image_keys[n] for n in usable))
    if count >= len(images) > 0:
        raise ConfigError(
            f"train.held_out is {count}, but the data has only {len(images)} images; lower it"
        )
    chosen = np.random.default_rng([seed, _HOLD_OUT_STREAM]).permutation(len(images))[:count]
    aside = {images[n] for n in chosen}
    first = {image_keys[n]: n for n in reversed(usable)}
    kept = [n for n in usable if image_keys[n] not in aside]
    held = [first[images[n]] for n in sorted(chosen)]
    return np.array(kept, dtype=np.int64), np.array(held, dtype=np.int64)


def negatives_of(recipe: Recipe, pairs: ChosenPairs) -> MinedNegatives | None:
    """The mined negatives of a run's pairs, where the recipe wants some.

    Raises:
        ConfigError: They were not mined, or not with margins.
        DataError: The file cannot be used.
    """
    config = recipe.train
    if not config.negatives:
        return None
    return read_negatives(
        recipe.data.path("negatives"),
        pairs.ids,
        pairs.image_keys,
        config.negatives,
        teacher=config.distillation > 0,
    )
