"""A pair as a sequence of tokens: an open image that others share, and what follows it.

The image stands first, because then its keys and values are those of every pair that shows it, and of the embedding of
the image too. The question stands last, so that a candidate's text does not have the last word. Of two images the
query's comes first. The order depends on what the pair is made of and on nothing else, so that a score does not depend
on which pairs are scored beside it.

Trained rerankers have an order of their own (`slq.reranking.presets`), which is kept. There the turn's first image is
shared too, if nothing of a user stands before it, with our words before it and the system message.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile

from PIL import Image

from slq.errors import DataError
from slq.reranking.framings import Framing
from slq.reranking.presets import Slot, Template
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
        before: Our words that open the turn before it; none if there is no such image.
        system: Message before the turn; None leaves the one of the model's chat template.
    """

    shared: Image.Image | None
    runs: tuple[Run, ...]
    before: tuple[Words, ...] = ()
    system: str | None = None

    @property
    def others(self) -> list[Image.Image]:
        """Images but the shared one."""
        return [run for run in self.runs if not isinstance(run, Words)]


def lay_out(framing: Framing, query: Item, candidate: Item, instruction: str = "") -> Layout:
    """The pair as one user's turn.

    Args:
        framing: What is asked.
        query: What is searched for.
        candidate: What may be it.
        instruction: What the search is for, of ours, where the framing has a place for it; its own by default.

    Raises:
        DataError: A trained reranker has no place for what a side is made of.
    """
    if framing.template is not None:
        return _filled(framing.template, query, candidate, instruction)
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


def _filled(template: Template, query: Item, candidate: Item, instruction: str) -> Layout:
    """The pair in the words and the order of a trained reranker."""
    asked = instruction or template.instruction
    given: dict[Slot, Run | None] = {
        Slot.INSTRUCTION: Words(asked, trusted=True) if asked else None,
        Slot.QUERY_IMAGE: query.image,
        Slot.QUERY_TEXT: _text_of(query),
        Slot.CANDIDATE_IMAGE: candidate.image,
        Slot.CANDIDATE_TEXT: _text_of(candidate),
    }
    for slot, run in given.items():
        if run is not None and slot not in template.slots:
            raise DataError(
                f"{template.name} was trained on pairs without {slot.value} and has no place for it; "
                "choose another framing"
            )
    runs = list(_runs(template, given))
    before = list(takewhile(lambda run: isinstance(run, Words) and run.trusted, runs))
    first = runs[len(before)] if len(before) < len(runs) else None
    if first is None or isinstance(first, Words):
        return Layout(None, tuple(runs), system=template.system)
    words = tuple(run for run in before if isinstance(run, Words))
    return Layout(first, tuple(runs[len(before) + 1 :]), words, template.system)


def _runs(template: Template, given: Mapping[Slot, Run | None]) -> Iterator[Run]:
    for part in template.parts:
        if isinstance(part, str):
            yield Words(part, trusted=True)
            continue
        there = [run for slot in part if (run := given[slot]) is not None]
        for number, run in enumerate(there):
            if number:
                yield Words(" ", trusted=True)
            yield run


def _text_of(side: Item) -> Words | None:
    return Words(str(side.text), trusted=False) if has_text(side) else None


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
