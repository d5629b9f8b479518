"""Pairs of which one side is empty, and what the model says of them (spec: RetLLM section 2).

A model leans to an answer before it has seen anything, and each query and each candidate pushes it further. What it
says of the same pair with one side emptied is subtracted from the margin, as in contextual calibration
(arXiv 2102.09690):

- `candidate`: of the same query. Thresholds then mean the same over queries. The order of candidates of one kind stays.
- `query`: of the same candidate. What the model says of it whatever is asked is gone; this changes the order.

An empty side is of the kind of the one it stands for (a text, an image, both), because the prompt and what the model
makes of it depend on the kind, and of nothing else, so that one empty side serves all of its kind. An empty text is
"N/A", one of that paper's content-free inputs, or what a trained reranker's own prompt says where a side has nothing.
An empty image is uniform grey, near zero once it is normalised, and what families that pad images pad with. Its size is
always the same: were it that of the image it stands for, the order of candidates would depend on their sizes.
"""

from collections.abc import Hashable
from typing import Literal

from PIL import Image

from slq.reranking.layout import has_text
from slq.schema import Item

ContextFree = Literal["candidate", "query"]
"""The side that is emptied."""

_GREY = (127, 127, 127)
_SIDE = 224  # pixels; 49 to 64 visual tokens in the Qwen-VL families
EMPTY_IMAGE = Image.new("RGB", (_SIDE, _SIDE), _GREY)


def emptied(pair: tuple[Item, Item], side: ContextFree, word: str) -> tuple[Item, Item]:
    """The pair with one side empty.

    Args:
        pair: Query and candidate.
        side: The one to empty.
        word: Stands for its text.
    """
    query, candidate = pair
    if side == "query":
        return _empty(query, word), candidate
    return query, _empty(candidate, word)


def _empty(side: Item, word: str) -> Item:
    return Item(
        text=word if has_text(side) else None,
        image=None if side.image is None else EMPTY_IMAGE,
    )


def key(pair: tuple[Item, Item]) -> Hashable:
    """What tells pairs apart whose images stay in memory: texts, and images as objects."""
    return tuple((side.text, id(side.image)) for side in pair)
