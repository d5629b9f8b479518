"""The passes of one call, in windows and batches: which turns are open is handed on from one window to the next."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from slq.reranking.layout import Layout
from slq.reranking.passes import Passes, Turn, View, prefix_of_turns
from slq.reranking.planning import Images, batches, windows


class Work:
    """What consecutive passes of one call hand on: names of images, and the turns that are open.

    Args:
        passes: Say what an image is found by, and open turns.
        tenant: Whose images they are.
        batch_size: Sequences per pass, and different images at a time.
        whole: Whether answers are read over the whole vocabulary.
    """

    def __init__(
        self, passes: Passes, tenant: str, batch_size: int, *, whole: bool = False
    ) -> None:
        self._passes, self._tenant, self._batch_size = passes, tenant, batch_size
        self.whole = whole
        self._names: dict[int, Hashable] = {}
        self._pictures: dict[Hashable, Image.Image] = {}
        self._open: dict[Hashable, Turn] = {}
        self._views: dict[Hashable, View] = {}

    @torch.no_grad()
    def answers(self, layouts: Sequence[Layout]) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers of layouts, a batch at a time, with (batch, hidden) states of what the model is about to say."""
        images = [self._images(layout) for layout in layouts]
        for window in windows(images, self._batch_size):
            pictures = self._shown(images[number] for number in window)
            seen = {name for number in window for name in images[number].others}
            if self._passes.enhancement.is_on:
                seen |= pictures.keys()
            views = self._seen({n: picture for n, picture in pictures.items() if n in seen})
            shared = dict.fromkeys(images[number].shared for number in window)
            turns = self._opened({name: pictures.get(name) for name in shared}, views)
            suffixes = [
                self._passes.suffix(layouts[n], [views[name] for name in images[n].others])
                for n in window
            ]
            for batch in batches([len(suffix.prompt) for suffix in suffixes], self._batch_size):
                numbers = [window[place] for place in batch]
                names = [images[number].shared for number in numbers]
                answers = self._passes.answer(
                    prefix_of_turns([turns[name] for name in names]) if turns else None,
                    [views.get(name) for name in names],
                    [suffixes[place] for place in batch],
                )
                yield numbers, answers

    def _images(self, layout: Layout) -> Images:
        """Names of the images of a pair."""
        return Images(self._name(layout.shared), tuple(map(self._name, layout.others)))

    def _name(self, picture: Image.Image | None) -> Hashable:
        if id(picture) not in self._names:
            name = self._passes.key(picture, self._tenant)
            self._names[id(picture)] = name
            if picture is not None:
                self._pictures.setdefault(name, picture)
        return self._names[id(picture)]

    def _shown(self, images: Iterable[Images]) -> dict[Hashable, Image.Image]:
        """The different images of some pairs, by name."""
        names = (name for one in images for name in (one.shared, *one.others))
        return {name: self._pictures[name] for name in names if name in self._pictures}

    def _seen(self, pictures: Mapping[Hashable, Image.Image]) -> dict[Hashable, View]:
        """Views by name; those of the window before that are wanted again are not made again."""
        new = {name: picture for name, picture in pictures.items() if name not in self._views}
        found = {name: self._views[name] for name in pictures if name in self._views}
        self._views = {**found, **self._passes.view(new)}
        return self._views

    def _opened(
        self, pictures: Mapping[Hashable, Image.Image | None], views: Mapping[Hashable, View]
    ) -> dict[Hashable, Turn]:
        """Open turns by name, as `_seen`; none where pairs run whole."""
        if self._passes.enhancement.needs_whole:
            return {}
        new = {name: picture for name, picture in pictures.items() if name not in self._open}
        found = {name: self._open[name] for name in pictures if name in self._open}
        self._open = {**found, **self._passes.open(new, views)}
        return self._open
