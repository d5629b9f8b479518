"""A pair as a sequence of tokens: an open image that others share, and what follows it.

The image stands first, because then its keys and values are those of every pair that shows it, and of the embedding of
the image too. The question stands last, so that a candidate's text does not have the last word. Of two images the
query's comes first. The order depends on what the pair is made of and on nothing else, so that a score does not depend
on which pairs are scored beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from slq.reranking.framings import Framing
from slq.schema import Item

ABOVE = "the image above"  # stands for the image that is shared


@dataclass(frozen=True, slots=True)
class Words:
    """Text of ours, or of a user: only ours may hold what means something to the model.

    Attributes:
        text: The words.
        trusted: Whether they are ours.
    """

    text: str
    trusted: bool


Run = Words | Image.Image


@dataclass(frozen=True, slots=True)
class Layout:
    """A pair, laid out.

    Attributes:
        shared: The first image, with which the turn opens; None if there is none.
        runs: What follows it, up to the end of the turn.
    """

    shared: Image.Image | None
    runs: tuple[Run, ...]

    @property
    def others(self) -> list[Image.Image]:
        """Images but the shared one."""
        return [run for run in self.runs if not isinstance(run, Words)]


def lay_out(framing: Framing, query: Item, candidate: Item) -> Layout:
    """The pair as one user's turn.

    Args:
        framing: What is asked.
        query: What is searched for.
        candidate: What may be it.
    """
    images = [side.image for side in (query, candidate) if side.image is not None]
    texts = [side.text for side in (query, candidate) if has_text(side)]
    shared = images[0] if images else None
    if len(images) == len(texts) == 1:
        before, behind = framing.around_caption()
        caption = Words(str(texts[0]), trusted=False)
        return Layout(shared, (Words(before, trusted=True), caption, Words(behind, trusted=True)))
    lines = [
        *described("Query", query, is_first=True),
        *described("Candidate", candidate, is_first=query.image is None),
    ]
    return Layout(shared, (*lines, Words(framing.of_pair, trusted=True)))


def has_text(item: Item) -> bool:
    """Whether there are words in it."""
    return bool((item.text or "").strip())


def described(role: str, side: Item, *, is_first: bool) -> Iterator[Run]:
    """One line; `is_first` says that the image of this side, if it has one, is the one above."""
    yield Words(f"{role}: ", trusted=True)
    if side.image is not None:
        yield Words(ABOVE, trusted=True) if is_first else side.image
        if has_text(side):
            yield Words(" and the text: ", trusted=True)
    if has_text(side):
        yield Words(str(side.text), trusted=False)
    yield Words("\n", trusted=True)
