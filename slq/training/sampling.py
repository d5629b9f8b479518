"""Which pairs form the global batch of a step; depends on nothing but the settings and the step.

No image stands twice in a batch: its second caption would be a false negative. Every image has a *lane* for the whole
run, and a batch is sorted by lane, so that the worker that holds an image's prefix meets the image again, however many
workers there are.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from slq.errors import ConfigError

_LANES = 64  # worker counts that divide it get whole lanes
_LANE_STREAM = 2**31  # keeps the generator of the lanes apart from those of the epochs


@dataclass(frozen=True)
class PairSampler:
    """The order of pairs.

    `uniform` permutes all pairs of an epoch. `block` permutes the images, cuts them into blocks, and shows every image
    of a block once per sub-epoch, each time with another caption, before the next block (spec: SLQ section 3). Both
    show each pair once per epoch at most; pairs that fill no whole batch of distinct images are left out of it.

    Args:
        image_keys: For each pair, what identifies its image.
        global_batch: Pairs per step.
        seed: Seed of all permutations.
        order: `block` or `uniform`.
        block_batches: Images of a block, in global batches.

    Raises:
        ConfigError: There are fewer distinct images than pairs in a batch.
    """

    image_keys: Sequence[str]
    global_batch: int
    seed: int
    order: Literal["block", "uniform"] = "uniform"
    block_batches: int = 4

    def __post_init__(self) -> None:
        distinct = len(self._captions)
        if distinct < self.global_batch:
            raise ConfigError(
                f"train.global_batch is {self.global_batch}, but the data has only {distinct} distinct images; "
                "lower global_batch or add pairs"
            )

    @cached_property
    def _image_of(self) -> NDArray[np.int64]:
        """(pairs,) the number of each pair's image, by first appearance."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(key, len(numbers)) for key in self.image_keys])

    @cached_property
    def _captions(self) -> list[list[int]]:
        """The pairs of each image."""
        pairs: dict[str, list[int]] = defaultdict(list)
        for pair, key in enumerate(self.image_keys):
            pairs[key].append(pair)
        return list(pairs.values())

    @property
    def _num_lanes(self) -> int:
        return math.gcd(self.global_batch, _LANES)

    @cached_property
    def _lane_of(self) -> NDArray[np.int64]:
        """(images,) the lane of each image, the same in every epoch; lanes differ by one image at most."""
        count = len(self._captions)
        lanes: NDArray[np.int64] = (
            np.random.default_rng([self.seed, _LANE_STREAM]).permutation(count) % self._num_lanes
        )
        return lanes

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """The batches of one epoch, (global_batch,) int64 pairs each."""
        rng = np.random.default_rng([self.seed, number])
        if self.order == "uniform":
            return self._filled(rng.permutation(len(self.image_keys)))
        batches: list[NDArray[np.int64]] = []
        rest: list[int] = []
        # with several captions an image, each epoch pairs sub-epochs and captions anew
        captions = [rng.permutation(pairs) for pairs in self._captions]
        for block in self._blocks(rng):
            for turn in range(max(len(captions[image]) for image in block)):
                shown = [image for image in block if turn < len(captions[image])]
                whole, left = self._dealt(shown, rng)
                batches += [np.array([captions[i][turn] for i in batch]) for batch in whole]
                rest += [int(captions[i][turn]) for i in left]
        return batches + self._filled(rng.permutation(np.array(rest, dtype=np.int64)))

    def _blocks(self, rng: Generator) -> list[list[int]]:
        """Images in blocks that hold the same number of each lane."""
        per_lane = self.block_batches * (self.global_batch // self._num_lanes)
        order = rng.permutation(len(self._captions))
        lanes: list[list[int]] = [[] for _ in range(self._num_lanes)]
        for image in map(int, order):
            lanes[self._lane_of[image]].append(image)
        return [
            [image for lane in lanes for image in lane[start : start + per_lane]]
            for start in range(0, max(map(len, lanes)), per_lane)
        ]

    def _dealt(self, images: Sequence[int], rng: Generator) -> tuple[list[list[int]], list[int]]:
        """Shuffle images into batches that take the same number from each lane; and what is left."""
        share = self.global_batch // self._num_lanes
        lanes: list[list[int]] = [[] for _ in range(self._num_lanes)]
        for image in map(int, rng.permutation(images)):
            lanes[self._lane_of[image]].append(image)
        count = min(len(lane) for lane in lanes) // share
        batches = [
            [image for lane in lanes for image in lane[n * share : (n + 1) * share]]
            for n in range(count)
        ]
        return batches, [image for lane in lanes for image in lane[count * share :]]

    def _filled(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Batches of distinct images in the given order of pairs; a second caption waits for a later batch."""
        batches: list[NDArray[np.int64]] = []
        waiting: list[int] = []
        current: list[int] = []
        used: set[int] = set()
        for pair in map(int, order):
            image = int(self._image_of[pair])
            if image in used:
                waiting.append(pair)
                continue
            current.append(pair)
            used.add(image)
            if len(current) == self.global_batch:
                batches.append(self._by_lane(current))
                current, used = [], set()
                waiting = self._fill(waiting, current, used)
        return batches

    def _by_lane(self, pairs: list[int]) -> NDArray[np.int64]:
        batch = np.array(pairs, dtype=np.int64)
        lanes = self._lane_of[self._image_of[batch]]
        sorted_batch: NDArray[np.int64] = batch[np.argsort(lanes, kind="stable")]
        return sorted_batch

    def _fill(self, waiting: list[int], current: list[int], used: set[int]) -> list[int]:
        left = []
        for pair in waiting:
            image = int(self._image_of[pair])
            if image in used or len(current) == self.global_batch - 1:
                left.append(pair)
            else:
                current.append(pair)
                used.add(image)
        return left

    def batches(self, first_step: int, last_step: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(step, pairs) for the steps from `first_step` to `last_step` - 1."""
        step = number = 0
        while step < last_step:
            for batch in self.epoch(number):
                if step >= last_step:
                    return
                if step >= first_step:
                    yield step, batch
                step += 1
            number += 1


def rank_slice(batch: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """This rank's contiguous part of a global batch; parts differ by one pair at most."""
    return np.array_split(batch, world_size)[rank]
