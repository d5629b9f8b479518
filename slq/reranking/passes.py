"""Forward passes of the fine stage: open images, and what follows them, with what is kept between them.

What is kept is found again by the bytes of an image, so that it does not matter where an image comes from. It never
crosses tenants.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from slq.backbones.base import Backbone, Prompt, Prompts, last_places
from slq.backbones.prompting import join_vision
from slq.backbones.vision import VisionFeatures
from slq.enhancement import EnhancementConfig, Enhancer, Sight
from slq.kept import Kept
from slq.media import pixels_sha256
from slq.prefix import Prefix
from slq.reranking.layout import Layout, Words
from slq.reranking.turns import Head, Suffix, Turn, View
from slq.schema import Item

_TOKENS_AT_ONCE = (1280, 2**16)  # of images, on a CPU and on a GPU


@dataclass(frozen=True)
class Counts:
    """What passes cost, in numbers that do not depend on the machine.

    Attributes:
        vision_passes: Images that went through the vision tower.
        prefix_tokens: Tokens of open images that went through the language model.
        suffix_tokens: Tokens of what follows them.
        padded_tokens: Further places of those passes, which hold nothing.
    """

    vision_passes: int = 0
    prefix_tokens: int = 0
    suffix_tokens: int = 0
    padded_tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        names = [one.name for one in fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})


class Passes:
    """Runs a frozen backbone over open images and what follows.

    Args:
        backbone: The model.
        enhancement: Whether layers look at the image again.
        vision_bytes: Vision features of images to keep, in memory of the device; 0 keeps none.
        prefix_bytes: Keys and values of open images to keep there.

    Attributes:
        counts: What has been run so far.
        views: Kept vision features.
        prefixes: Kept keys and values.
    """

    def __init__(
        self,
        backbone: Backbone,
        enhancement: EnhancementConfig,
        *,
        vision_bytes: int = 0,
        prefix_bytes: int = 0,
    ) -> None:
        self.backbone = backbone
        self.enhancement = enhancement
        self._enhancer = Enhancer(backbone, enhancement) if enhancement.is_on else None
        self._keeps, self._keeps_prefixes = vision_bytes + prefix_bytes > 0, prefix_bytes > 0
        self._lock = Lock()
        self.counts = Counts()
        self.views: Kept[View] = Kept(vision_bytes)
        self.prefixes: Kept[Prefix] = Kept(prefix_bytes)

    def close(self) -> None:
        """Take hooks off the model, if there are any."""
        if self._enhancer is not None:
            self._enhancer.close()

    def key(self, image: Image.Image | None, tenant: str = "") -> Hashable:
        """What an image is found by: its pixels where anything is kept, else the object."""
        if image is None or not self._keeps:
            return id(image)
        return tenant, pixels_sha256(image)

    @torch.no_grad()
    def view(self, images: Mapping[Hashable, Image.Image]) -> dict[Hashable, View]:
        """What the vision tower makes of images, by key; it runs over those that are not kept."""
        keys, pictures = list(images), list(images.values())

        def compute(missing: list[int]) -> list[View]:
            items = [Item(image=pictures[number]) for number in missing]
            prompts = self.backbone.tokenised(items, close=False)
            with self._lock:
                self.counts += Counts(vision_passes=len(prompts))
            features = [
                of_image
                for part in self._at_once([len(prompt) for prompt in prompts])
                for of_image in self.backbone.vision_features(self.backbone.collate(prompts[part]))
            ]
            return [
                View(_without_pixels(prompt), of_image)
                for prompt, of_image in zip(prompts, features, strict=True)
            ]

        return dict(zip(keys, self.views.get(keys, compute), strict=True))

    @torch.no_grad()
    def open(
        self,
        heads: Sequence[Head],
        pictures: Mapping[Hashable, Image.Image],
        views: Mapping[Hashable, View],
    ) -> dict[Head, Turn]:
        """Turns that are open behind their heads.

        Args:
            heads: Different ones.
            pictures: The images, by key.
            views: Of some of them; the vision tower runs over those others whose prefix is not kept.
        """

        def compute(missing: list[int]) -> list[Prefix]:
            wanted = [heads[number] for number in missing]
            names = {head.image for head in wanted if head.image not in views}
            unseen = {name: pictures[name] for name in pictures if name in names}
            found = {**views, **self.view(unseen)}
            return self._opened([(head, found.get(head.image)) for head in wanted])

        if not heads:
            return {}
        if not self._keeps_prefixes:  # no detour over single rows
            found = [
                Turn(batch, row)
                for batch in compute(list(range(len(heads))))
                for row in range(len(batch))
            ]
            return dict(zip(heads, found, strict=True))
        rows = self.prefixes.get(
            heads, lambda missing: [row for batch in compute(missing) for row in batch.split()]
        )
        return {head: Turn(row, 0) for head, row in zip(heads, rows, strict=True)}

    def _opened(self, shown: Sequence[tuple[Head, View | None]]) -> list[Prefix]:
        """Open turns, in their order, in as many passes as are needed."""
        openings = [self.opening(head, view) for head, view in shown]
        found = []
        for part in self._at_once([len(one) for one in openings]):
            prompts = self.backbone.collate(openings[part])
            seen = [() if view is None else (view,) for _, view in shown[part]]
            with self._seeing(seen, prompts, asked=self.enhancement.touches_prefix):
                found.append(self.backbone.prefix(prompts, _features(seen)))
            self._count("prefix_tokens", [len(one) for one in openings[part]])
        return found

    def _at_once(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Parts of so many tokens that a pass of them is fast: on a CPU it then stays in the caches."""
        most = _TOKENS_AT_ONCE[self.backbone.device.type != "cpu"]
        start = total = 0
        for place, length in enumerate(lengths):
            if place > start and total + length > most:
                yield slice(start, place)
                start, total = place, 0
            total += length
        if lengths:
            yield slice(start, len(lengths))

    def suffix(self, layout: Layout, others: Sequence[View]) -> Suffix:
        """Tokens of what follows the shared image of a layout.

        Args:
            layout: The pair.
            others: Views of its images but the shared one, in order.
        """
        backbone = self.backbone
        text = backbone.text_lead if layout.shared is None else ""
        ids: list[int] = []
        views = iter(others)
        for run in layout.runs:
            if isinstance(run, Words):
                text += run.text if run.trusted else self._one_line(run.text)
                continue
            shown, tail = backbone.within_turn(next(views).opening.ids)
            ids += [*backbone.token_ids(text), *shown]
            text = tail
        ids += [*backbone.token_ids(text), *backbone.closing_ids]
        vision = join_vision([view.opening.vision for view in others])
        return Suffix(Prompt(ids, vision), tuple(others))

    def _one_line(self, text: str) -> str:
        """A user's text without line breaks, with which it could write lines that look like ours."""
        return " ".join(self.backbone.clean_text(text).split())

    @torch.no_grad()
    def answer(
        self,
        prefix: Prefix | None,
        shared: Sequence[tuple[Head, View | None]],
        suffixes: Sequence[Suffix],
    ) -> Tensor:
        """(batch, hidden) states of the last tokens after the final norm: what the model is about to say.

        Args:
            prefix: An open turn for each suffix; None where `enhancement.needs_whole`.
            shared: The head of each, and what it shows, if that was looked at.
            suffixes: What follows.
        """
        if prefix is None:
            return self._whole(shared, suffixes)
        prompts = self.backbone.collate([suffix.prompt for suffix in suffixes])
        seen = _seen(shared, suffixes)
        begun = torch.tensor([view is not None for _, view in shared])
        with self._seeing(seen, prompts, begun=begun):
            later = [view.features for suffix in suffixes for view in suffix.views]
            hidden = self.backbone.follow_prompts(prefix, prompts, later)
        self._count("suffix_tokens", [len(suffix.prompt) for suffix in suffixes])
        return hidden[last_places(prompts.mask)]

    def _whole(
        self, shared: Sequence[tuple[Head, View | None]], suffixes: Sequence[Suffix]
    ) -> Tensor:
        """As `answer`, in one pass each: for what changes tokens before the one that is asked."""
        whole = []
        for (head, view), suffix in zip(shared, suffixes, strict=True):
            opening = self.opening(head, view)
            vision = join_vision([opening.vision, suffix.prompt.vision])
            whole.append(Prompt([*opening.ids, *suffix.prompt.ids], vision))
        prompts, seen = self.backbone.collate(whole), _seen(shared, suffixes)
        with self._seeing(seen, prompts):
            prefix = self.backbone.prefix(prompts, _features(seen))
        self._count("suffix_tokens", [len(prompt) for prompt in whole])
        return prefix.last_hidden

    def opening(self, head: Head, view: View | None) -> Prompt:
        """Tokens of a head. An image alone opens the turn with the very tokens with which it is embedded."""
        start = self.backbone.start_ids(head.system)
        if view is None:
            return Prompt(start)
        if not head.before and head.system is None:
            return view.opening
        shown, tail = self.backbone.within_turn(view.opening.ids)
        words = "".join(run.text for run in head.before)
        before = self.backbone.token_ids(self.backbone.text_lead + words) if words else []
        return Prompt(
            [*start, *before, *shown, *self.backbone.token_ids(tail)], view.opening.vision
        )

    def _seeing(
        self,
        seen: Sequence[Sequence[View]],
        prompts: Prompts,
        *,
        begun: Tensor | None = None,
        asked: bool = True,
    ) -> AbstractContextManager[Any]:
        """A block whose passes look at images again.

        Args:
            seen: Of each row.
            prompts: Of the pass.
            begun: How many of each row's images stand before them; none by default.
            asked: False for a block that does nothing.
        """
        if self._enhancer is None or not asked or not any(seen):
            return nullcontext()
        sight = Sight(
            self.enhancement,
            [[view.features for view in row] for row in seen],
            ids=prompts.input_ids,
            mask=prompts.mask,
            image_token_id=self.backbone.image_token_id,
            begun=torch.zeros(len(seen), dtype=torch.long) if begun is None else begun.long(),
        )
        return self._enhancer.seeing(sight)

    def _count(self, kind: str, lengths: Sequence[int]) -> None:
        real = sum(lengths)
        padded = max(lengths) * len(lengths) - real
        with self._lock:
            self.counts += Counts(**{kind: real}, padded_tokens=padded)


def _seen(
    shared: Sequence[tuple[Head, View | None]], suffixes: Sequence[Suffix]
) -> list[tuple[View, ...]]:
    """All images of each row, in order."""
    return [
        suffix.views if view is None else (view, *suffix.views)
        for (_, view), suffix in zip(shared, suffixes, strict=True)
    ]


def _features(seen: Sequence[Sequence[View]]) -> list[VisionFeatures]:
    return [view.features for row in seen for view in row]


def _without_pixels(prompt: Prompt) -> Prompt:
    """The prompt with what says how its image is cut, but none of it: the tower has seen it."""
    light = {
        name: value[:0].clone() if name.startswith("pixel") else value
        for name, value in prompt.vision.items()
    }
    return Prompt(prompt.ids, light)
