"""Reads what the model is about to say of pairs (spec: RetLLM sections 2 and 4).

Pairs that show the same image share its open turn, which is the very prefix that embedding uses; only what follows it
runs per pair, and only the label rows of the language-model head are multiplied.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slq.backbones import Backbone
from slq.enhancement import EnhancementConfig
from slq.errors import ConfigError, DataError
from slq.prefix import Prefix
from slq.reranking.context_free import ContextFree, emptied, key
from slq.reranking.framings import PRESETS, Framing
from slq.reranking.labels import Labels
from slq.reranking.layout import Layout, lay_out
from slq.reranking.passes import Counts, Passes
from slq.reranking.profiles import Reading
from slq.reranking.turns import Head, prefix_of_turns
from slq.reranking.work import Work
from slq.schema import Item
from slq.scoring import entropy, hundredths, label_mass, probability

OFF = EnhancementConfig()


class PairReader:
    """Puts pairs of a query and a candidate to a frozen model, and reads the logits of the answer's labels.

    Args:
        backbone: The frozen model.
        framing: How a pair is put to it.
        instruction: As of `Reranker`, and so are the others.
        context_free: Side that is emptied for what is subtracted.
        batch_size: Pairs per forward pass, and different images at a time.
        enhancement: Whether layers look at the image again.
        vision_bytes: Vision features to keep between calls.
        prefix_bytes: Keys and values of open images to keep.

    Attributes:
        passes: What has been run and kept.

    Raises:
        ConfigError: The framing's labels are no single tokens, or the model has no use for what is asked for.
    """

    def __init__(
        self,
        backbone: Backbone,
        framing: Framing,
        *,
        instruction: str = "",
        context_free: ContextFree | None = None,
        batch_size: int = 64,
        enhancement: EnhancementConfig = OFF,
        vision_bytes: int = 0,
        prefix_bytes: int = 0,
    ) -> None:
        self.backbone = backbone
        self.framing = framing
        self._batch_size = batch_size
        self._instruction, self._context_free = instruction, context_free
        self._require_sense()
        self._labels = Labels(backbone, framing)
        self.passes = Passes(
            backbone, enhancement, vision_bytes=vision_bytes, prefix_bytes=prefix_bytes
        )

    def _require_sense(self) -> None:
        """Refuse what the framing or the chat template has no use for."""
        self.backbone.start_ids(self.framing.system)
        if self._instruction and not self.framing.takes_instruction:
            takers = ", ".join(name for name, one in PRESETS.items() if one.takes_instruction)
            raise ConfigError(
                f"framing {self.framing.name!r} takes no instruction; leave it out, or choose one of {takers}"
            )
        if any(token in self._instruction for token in self.backbone.special_tokens):
            raise ConfigError(
                "the instruction holds a control token of this model; write it in plain words"
            )

    @property
    def counts(self) -> Counts:
        """What has been run so far."""
        return self.passes.counts

    def close(self) -> None:
        """Take the hooks of the enhancement off the model."""
        self.passes.close()

    def _each(self, pairs: Sequence[tuple[Item, Item]], work: Work) -> list[Reading | str]:
        """Readings, and what is wrong with pairs that the model cannot take, none of which costs another its score."""
        try:
            found = self._read(pairs, work)
        except (DataError, OSError, ValueError, torch.OutOfMemoryError) as error:
            # Processors refuse shapes of images by ValueError. Of too little memory no pair is guilty, but half as many
            # may fit.
            if len(pairs) == 1 and isinstance(error, torch.OutOfMemoryError):
                raise
            if len(pairs) == 1:
                return [str(error)]
            half = len(pairs) // 2
            return [*self._each(pairs[:half], work), *self._each(pairs[half:], work)]
        return [
            one if math.isfinite(one.margin) else "the model gave no finite score" for one in found
        ]

    def read_each(
        self, pairs: Sequence[tuple[Item, Item]], *, tenant: str = ""
    ) -> list[Reading | str]:
        """As `read`, but where the model cannot take a pair, what is wrong with it; no other pair loses by it."""
        return self._each(pairs, self._work(tenant, whole=True))

    @property
    def opens_as_embedded(self) -> bool:
        """Whether an image's open turn is that of its embedding; not where the enhancement changes it."""
        return not self.passes.enhancement.touches_prefix

    @torch.no_grad()
    def prefix(self, items: Sequence[Item], *, tenant: str = "") -> Prefix:
        """What `Backbone.prefix` computes of items, for an encoder, through what is kept of their images.

        An image that is embedded first and scored then, as a query's, is seen and opened once if there is room to keep
        it; so is a candidate that was scored before.

        Args:
            items: Texts, images or both.
            tenant: As of `score`.

        Raises:
            ConfigError: The enhancement changes open turns, so that embeddings would change with them.
        """
        if not self.opens_as_embedded:
            raise ConfigError(
                f"the enhancement (mode {self.passes.enhancement.mode}, positions all) changes the turns of images, so "
                "embeddings cannot share them; embed with the encoder alone"
            )
        names = [self.passes.key(item.image, tenant) for item in items]
        pictures = {
            name: item.image
            for name, item in zip(names, items, strict=True)
            if item.image is not None
        }
        turns = self.passes.open([Head(name) for name in dict.fromkeys(names)], pictures, {})
        opened = prefix_of_turns([turns[Head(name)] for name in names])
        return self.backbone.extended(
            opened, [self.backbone.ids_behind_opening(item) for item in items]
        )

    def score(self, pairs: Sequence[tuple[Item, Item]], *, tenant: str = "") -> Tensor:
        """Margins of (query, candidate) pairs, (n,) float32 on the CPU, in input order, as `Reading.margin`.

        Args:
            pairs: Texts, images or both on either side.
            tenant: Whose they are; what is kept of one tenant's images another does not find.
        """
        return torch.tensor([one.margin for one in self._read(pairs, self._work(tenant))])

    def read(self, pairs: Sequence[tuple[Item, Item]], *, tenant: str = "") -> list[Reading]:
        """What the model is about to say of each pair; as `score`, with the whole vocabulary at the answer."""
        return self._read(pairs, self._work(tenant, whole=True))

    def _read(self, pairs: Sequence[tuple[Item, Item]], work: Work) -> list[Reading]:
        if self._context_free is None:
            return self._asked(pairs, work)
        empties = [emptied(pair, self._context_free, self.framing.empty) for pair in pairs]
        new = {key(pair): pair for pair in empties if key(pair) not in work.context_free}
        asked = self._asked([*pairs, *new.values()], work)
        found, free = asked[: len(pairs)], asked[len(pairs) :]
        work.context_free |= {
            name: (one.margin, pair)  # with the pair, or another image might get the id of its own
            for (name, pair), one in zip(new.items(), free, strict=True)
        }
        subtracted = [work.context_free[key(pair)][0] for pair in empties]
        return [
            replace(one, margin=one.margin - less, context_free=less)
            for one, less in zip(found, subtracted, strict=True)
        ]

    @torch.no_grad()
    def _asked(self, pairs: Sequence[tuple[Item, Item]], work: Work) -> list[Reading]:
        """What is said of the pairs alone."""
        found: dict[int, Reading] = {}
        labels = torch.tensor(self._labels.ids, device=self.backbone.device)
        layouts = [self.laid_out(*pair) for pair in pairs]
        for numbers, answers in work.answers(layouts):
            columns = [self.margins(answers)]
            if work.whole:
                logits = self._labels.logits(answers)
                columns += [
                    label_mass(logits, labels),
                    entropy(logits),
                    hundredths(probability(logits, self._labels.positive)),
                ]
            rows = zip(*(column.tolist() for column in columns), strict=True)
            found |= zip(numbers, (Reading(*row) for row in rows), strict=True)
        return [found[number] for number in range(len(pairs))]

    def laid_out(self, query: Item, candidate: Item) -> Layout:
        """A pair as it is put to the model.

        Raises:
            DataError: A trained reranker has no place for what a side is made of.
        """
        return lay_out(self.framing, query, candidate, self._instruction)

    def _work(self, tenant: str, *, whole: bool = False) -> Work:
        return Work(self.passes, tenant, self._batch_size, whole=whole)

    def margins(self, answers: Tensor) -> Tensor:
        """(batch,) float32 margins from (batch, hidden) states of what the model is about to say, of pairs alone."""
        return self._labels.margins(answers)
