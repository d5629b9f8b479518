"""Which pairs run together: those of one image behind one open turn, and as many images at a time as memory allows."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Images:
    """The images of a pair, by key.

    Attributes:
        shared: Of what opens the turn, whether or not with one.
        others: Those that follow.
    """

    shared: Hashable
    others: tuple[Hashable, ...] = ()


def windows(pairs: Sequence[Images], most_images: int) -> Iterator[list[int]]:
    """Numbers of pairs in windows of few images, pairs of one shared image side by side.

    A window holds more than `most_images` only if one pair does. An image that is shared by the pairs of two windows
    stands last in the first one and first in the second, so that it can be kept in between.

    Args:
        pairs: Their images.
        most_images: Different images of a window.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault(pair.shared, []).append(number)
    window: list[int] = []
    held: set[Hashable] = set()
    for number in (number for group in groups.values() for number in group):
        wanted = {pairs[number].shared, *pairs[number].others}
        if window and len(held | wanted) > most_images:
            yield window
            window, held = [], set()
        window.append(number)
        held |= wanted
    if window:
        yield window


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Positions in batches of similar length, the longest first, so that a batch that does not fit fails at once.

    Args:
        lengths: Tokens of each sequence.
        size: Of a batch, at most.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    for start in range(0, len(order), size):
        yield order[start : start + size]
