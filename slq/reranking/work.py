"""The passes of one call, in windows and batches: which turns are open is handed on from one window to the next."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from slq.reranking.layout import Layout
from slq.reranking.passes import Passes
from slq.reranking.planning import Images, batches, windows
from slq.reranking.turns import Head, Turn, View, prefix_of_turns


class Work:
    """What consecutive passes of one call hand on: names of images, and the turns that are open.

    Args:
        passes: Say what an image is found by, and open turns.
        tenant: Whose images they are.
        batch_size: Sequences per pass, and different images at a time.
        whole: Whether answers are read over the whole vocabulary.

    Attributes:
        context_free: Margins of pairs with an empty side that this call has read.
    """

    def __init__(
        self, passes: Passes, tenant: str, batch_size: int, *, whole: bool = False
    ) -> None:
        self._passes, self._tenant, self._batch_size = passes, tenant, batch_size
        self.whole = whole
        self.context_free: dict[Hashable, tuple[float, Any]] = {}
        self._names: dict[int, Hashable] = {}
        self._pictures: dict[Hashable, Image.Image] = {}
        self._alike: list[Image.Image] = []  # others of the same pixels, held for their ids
        self._open: dict[Head, Turn] = {}
        self._views: dict[Hashable, View] = {}

    @torch.no_grad()
    def answers(self, layouts: Sequence[Layout]) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers of layouts, a batch at a time, with (batch, hidden) states of what the model is about to say."""
        self._forget()
        heads = [self._head(layout) for layout in layouts]
        others = [tuple(map(self._name, layout.others)) for layout in layouts]
        for window in windows(list(map(Images, heads, others)), self._batch_size):
            opening = list(dict.fromkeys(heads[number] for number in window))
            seen = {name for number in window for name in others[number]}
            pictures = self._shown(n for pair in window for n in (heads[pair].image, *others[pair]))
            if self._passes.enhancement.is_on:
                seen |= pictures.keys()
            views = self._seen({n: picture for n, picture in pictures.items() if n in seen})
            turns = self._opened(opening, pictures, views)
            suffixes = [
                self._passes.suffix(layouts[n], [views[name] for name in others[n]]) for n in window
            ]
            for batch in batches([len(suffix.prompt) for suffix in suffixes], self._batch_size):
                numbers = [window[place] for place in batch]
                shared = [heads[number] for number in numbers]
                answers = self._passes.answer(
                    prefix_of_turns([turns[head] for head in shared]) if turns else None,
                    [(head, views.get(head.image)) for head in shared],
                    [suffixes[place] for place in batch],
                )
                yield numbers, answers

    def _forget(self) -> None:
        """Let go of images of earlier calls, but those that are handed on.

        Images are told apart by `id`, which another object may get once one is gone. So only what is held has a name.
        """
        handed_on = {head.image for head in self._open} | self._views.keys()
        self._pictures = {n: one for n, one in self._pictures.items() if n in handed_on}
        self._names = {id(one): name for name, one in self._pictures.items()}
        self._alike.clear()

    def _head(self, layout: Layout) -> Head:
        return Head(self._name(layout.shared), layout.before, layout.system)

    def _name(self, picture: Image.Image | None) -> Hashable:
        if id(picture) not in self._names:
            name = self._passes.key(picture, self._tenant)
            self._names[id(picture)] = name
            if picture is not None and self._pictures.setdefault(name, picture) is not picture:
                self._alike.append(picture)
        return self._names[id(picture)]

    def _shown(self, names: Iterable[Hashable]) -> dict[Hashable, Image.Image]:
        """Images by name; the name of no image is left out."""
        return {name: self._pictures[name] for name in names if name in self._pictures}

    def _seen(self, pictures: Mapping[Hashable, Image.Image]) -> dict[Hashable, View]:
        """Views by name; those of the window before that are wanted again are not made again."""
        new = {name: picture for name, picture in pictures.items() if name not in self._views}
        found = {name: self._views[name] for name in pictures if name in self._views}
        self._views = {**found, **self._passes.view(new)}
        return self._views

    def _opened(
        self,
        heads: Sequence[Head],
        pictures: Mapping[Hashable, Image.Image],
        views: Mapping[Hashable, View],
    ) -> dict[Head, Turn]:
        """Open turns by head, as `_seen`; none where pairs run whole."""
        if self._passes.enhancement.needs_whole:
            return {}
        new = [head for head in heads if head not in self._open]
        found = {head: self._open[head] for head in heads if head in self._open}
        self._open = {**found, **self._passes.open(new, pictures, views)}
        return self._open
