"""`Reranker`: the fine stage of RetLLM, by the same frozen backbone (spec: RetLLM sections 2 and 4).

Candidates with images share one open image prefix per image, which is the very prefix that embedding uses; only the
question's tokens run per pair, and only the label rows of the language-model head are multiplied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slq.backbones import Backbone
from slq.encoder import as_item
from slq.errors import ConfigError, DataError
from slq.prefix import Prefix
from slq.schema import Item
from slq.scoring import Framing, framing_by_name, margin


@dataclass(frozen=True, slots=True)
class Ranked:
    """One candidate's place.

    Attributes:
        index: Position in the given candidates.
        fine_score: Margin in nats; higher is better.
        coarse_score: As given, or 0.
    """

    index: int
    fine_score: float
    coarse_score: float


class Reranker:
    """Scores query-candidate pairs by label logits.

    Args:
        backbone: The frozen model, the same object that embeds.
        framing: A key of `slq.scoring.FRAMINGS`.
        batch_size: Pairs per forward pass.

    Raises:
        ConfigError: A label word is not a single token of this backbone's tokenizer.
    """

    def __init__(
        self, backbone: Backbone, *, framing: str = "true_false", batch_size: int = 64
    ) -> None:
        self.backbone = backbone
        self.framing: Framing = framing_by_name(framing)
        self._batch_size = batch_size
        self._positive = self._label_ids(self.framing.positive)
        self._negative = self._label_ids(self.framing.negative)

    def _label_ids(self, words: tuple[str, ...]) -> list[int]:
        """Single-token variants of the label words, with and without a leading space."""
        tokenizer = self.backbone.tokenizer
        variants = [variant for word in words for variant in (word, f" {word}")]
        encoded = [
            tokenizer(variant, add_special_tokens=False)["input_ids"] for variant in variants
        ]
        ids = sorted({int(ids[0]) for ids in encoded if len(ids) == 1})
        if not ids:
            raise ConfigError(
                f"framing {self.framing.name!r}: none of {', '.join(words)} is one token of {self.backbone.name}; "
                "choose another framing"
            )
        return ids

    def rank(
        self, query: Any, candidates: Sequence[Any], coarse_scores: Sequence[float] | None = None
    ) -> list[Ranked]:
        """Order candidates by margin, then coarse score, then position: total and deterministic.

        Args:
            query: A text, an image, or a mapping of both.
            candidates: The same kinds; one side of each pair must hold the image.
            coarse_scores: One per candidate; they break ties only.
        """
        coarse = list(coarse_scores) if coarse_scores is not None else [0.0] * len(candidates)
        if len(coarse) != len(candidates):
            raise DataError(
                f"{len(coarse)} coarse scores for {len(candidates)} candidates; give one for each"
            )
        item = as_item(query)  # once: pairs share a prefix by the identity of their image
        pairs = [(item, as_item(candidate)) for candidate in candidates]
        margins = self.score(pairs).tolist()
        ranked = [Ranked(n, margins[n], coarse[n]) for n in range(len(margins))]
        return sorted(ranked, key=lambda r: (-r.fine_score, -r.coarse_score, r.index))

    def score(self, pairs: Sequence[tuple[Item, Item]]) -> Tensor:
        """Margins of (query, candidate) pairs, (n,) float32 on the CPU, in input order.

        Raises:
            DataError: A pair has no image, two images, or no text.
        """
        sides = [_split_pair(query, candidate) for query, candidate in pairs]
        groups: dict[int, list[int]] = {}
        for number, (image_side, _) in enumerate(sides):
            groups.setdefault(id(image_side.image), []).append(number)
        ordered = [
            number for group in groups.values() for number in group
        ]  # pairs of one image stand together
        margins = torch.empty(len(pairs))
        for start in range(0, len(ordered), self._batch_size):
            chunk = ordered[start : start + self._batch_size]
            margins[chunk] = self._score_chunk([sides[number] for number in chunk]).cpu()
        return margins

    @torch.no_grad()
    def _score_chunk(self, sides: list[tuple[Item, str]]) -> Tensor:
        images: dict[int, Item] = {}
        for item, _ in sides:
            images.setdefault(id(item.image), item)
        row_of = {key: row for row, key in enumerate(images)}
        opened = self.open_prefix([Item(image=item.image) for item in images.values()])
        rows = torch.tensor(
            [row_of[id(item.image)] for item, _ in sides], device=self.backbone.device
        )
        return self.score_open(opened.select(rows), [text for _, text in sides])

    def open_prefix(self, items: Sequence[Item]) -> Prefix:
        """Prefixes of images with the user's turn still open."""
        return self.backbone.prefix(self.backbone.prompts(items, close=False))

    @torch.no_grad()
    def score_open(self, opened: Prefix, texts: Sequence[str]) -> Tensor:
        """Margins of texts, one per row of the open image prefixes: (batch,) float32."""
        ids, mask = self._questions(texts)
        hidden = self.backbone.follow(opened, self.backbone.embed_tokens(ids), mask)
        last = mask.sum(1) - 1
        answer = hidden[torch.arange(len(last), device=last.device), last]  # (batch, hidden)
        head: Any = self.backbone.model.get_output_embeddings()
        labels = [*self._positive, *self._negative]
        logits = (
            answer.float() @ head.weight[labels].float().T
        )  # label rows, not the whole vocabulary
        columns = torch.arange(len(labels), device=logits.device)
        return margin(logits, columns[: len(self._positive)], columns[len(self._positive) :])

    def _questions(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Right-padded tokens of each question with the closing of the turn."""
        backbone = self.backbone
        questions = [self.framing.question(backbone.clean_text(text)) for text in texts]
        rows = [[*backbone.token_ids(question), *backbone.closing_ids] for question in questions]
        length = max(len(row) for row in rows)
        ids = torch.zeros((len(rows), length), dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = True
        return ids.to(backbone.device), mask.to(backbone.device)


def _split_pair(query: Item, candidate: Item) -> tuple[Item, str]:
    """(the side with the image, the text of the pair)."""
    if (query.image is None) == (candidate.image is None):
        raise DataError(
            "a pair needs exactly one image: a text query with image candidates, or the reverse"
        )
    image_side, other = (query, candidate) if query.image is not None else (candidate, query)
    texts = [text for text in (image_side.text, other.text) if (text or "").strip()]
    if not texts:
        raise DataError("a pair needs a text beside its image")
    return image_side, "\n".join(str(text) for text in texts)
