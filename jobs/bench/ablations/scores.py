"""Scores of pairs, computed once for all rows that share them and kept on disk."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from jobs.bench.ablations.settings import Scoring
from slq.backbones.base import Backbone, Prompts
from slq.enhancement import EnhancementConfig, Sight
from slq.errors import ConfigError, StorageError
from slq.prefix import Prefix
from slq.reranking.framings import Framing, framing_by_name
from slq.reranking.layout import Layout, Words, lay_out
from slq.reranking.passes import Passes
from slq.reranking.turns import Head, Suffix, View
from slq.reranking.work import Work
from slq.schema import Item
from slq.scoring import entropy, label_mass, margin, probability

ROOM = 2**31  # bytes of images that are kept: each goes through the tower once
Pairs = NDArray[np.int64]  # (n, 2) numbers of a query and an item


class Watched(Passes):
    """Passes that note what became of each row of the last one.

    Args:
        backbone: The model.
        enhancement: Whether layers look at the image again.
        beside: Passes of the same model whose images these find, as far as an image is the same to both.

    Attributes:
        fired: The layer after which each row was unsure of its answer; -1 where none was.
        lengths: Tokens of each row that ran.
    """

    def __init__(
        self, backbone: Backbone, enhancement: EnhancementConfig, beside: Passes | None = None
    ) -> None:
        shares = beside is not None and not enhancement.touches_prefix
        super().__init__(
            backbone, enhancement, vision_bytes=ROOM, prefix_bytes=ROOM if shares else 0
        )
        if beside is not None:
            self.views = beside.views
            if shares:
                self.prefixes = beside.prefixes
        self.fired: list[int] = []
        self.lengths: list[int] = []
        self._sights: list[Sight] = []  # of the pass, if layers looked

    @property
    def asked(self) -> list[int]:
        """The layers that are asked whether they are unsure."""
        return [] if self._enhancer is None else self._enhancer.asked

    def answer(
        self,
        prefix: Prefix | None,
        shared: Sequence[tuple[Head, View | None]],
        suffixes: Sequence[Suffix],
    ) -> Tensor:
        """As of `Passes`."""
        self._sights.clear()
        hidden = super().answer(prefix, shared, suffixes)
        before = [0 if prefix is not None else len(self.opening(*one)) for one in shared]
        self.lengths = [n + len(one.prompt) for n, one in zip(before, suffixes, strict=True)]
        fired = [sight.fired_at.tolist() for sight in self._sights]
        self.fired = fired[0] if fired else [-1] * len(suffixes)
        return hidden

    @contextmanager
    def _seeing(
        self,
        seen: Sequence[Sequence[View]],
        prompts: Prompts,
        *,
        begun: Tensor | None = None,
        asked: bool = True,
    ) -> Iterator[Any]:
        with super()._seeing(seen, prompts, begun=begun, asked=asked) as sight:
            if sight is not None:
                self._sights.append(sight)
            yield sight


def label_tokens(backbone: Backbone, framing: Framing) -> list[tuple[str, int, float]]:
    """Word, token and value of each variant of a label word that is one token, with and without a space before it."""
    found: dict[int, tuple[str, int, float]] = {}
    for word, value in framing.labels:
        for variant in (word, f" {word}"):
            ids = backbone.token_ids(variant)
            if len(ids) == 1:
                found.setdefault(ids[0], (variant, ids[0], value))
    values = {value for _, _, value in found.values()}
    if not {0.0, 1.0} <= values:
        raise ConfigError(f"{backbone.name} has no single tokens for the labels of {framing.name}")
    return list(found.values())


def text_first(framing: Framing, text: str, image: Any) -> Layout:
    """The words of a pair as `lay_out` has them, with the image behind the caption."""
    before, behind = framing.around_caption()
    words = (Words(before, trusted=True), Words(text, trusted=False), Words("\n", trusted=True))
    return Layout(None, (*words, image, Words(behind, trusted=True)))


class Scorer:
    """Reads what the model is about to say of pairs of a text and an image, in one way.

    Args:
        backbone: The frozen model.
        scoring: How pairs are put to it.
        batch_size: Pairs per pass, and different images at a time.
        beside: As of `Watched`.

    Attributes:
        scoring: As given.
        framing: Its question.
        labels: Words, tokens and values of the answers.
        passes: What has been run.
    """

    def __init__(
        self,
        backbone: Backbone,
        scoring: Scoring,
        batch_size: int,
        beside: Passes | None = None,
    ) -> None:
        self.framing = framing_by_name(scoring.framing)
        self.labels = label_tokens(backbone, self.framing)
        self.passes = Watched(backbone, scoring.enhancement, beside)
        self.scoring = scoring
        self._backbone, self._batch_size = backbone, batch_size
        ids = backbone.token_ids(backbone.answer_lead + self.framing.positive)
        self._positive = ids[0] if len(ids) == 1 else max(self.labels, key=lambda one: one[2])[1]

    def close(self) -> None:
        """Take hooks off the model."""
        self.passes.close()

    @torch.no_grad()
    def read(self, pairs: Sequence[tuple[Item, Item]]) -> dict[str, NDArray[Any]]:
        """Columns of (text, image) pairs, in input order.

        Returns:
            `labels`: (n, num_labels) float32 logits of `self.labels`; (n,) each: `margin` over all of them,
            `probability` of the positive label, `entropy` and `label_mass` over the whole vocabulary, `fired` and
            `length` as of `Watched`.
        """
        layouts = [self._laid_out(*pair) for pair in pairs]
        found: dict[str, NDArray[Any]] = {}
        for numbers, logits in self.logits(layouts):
            for name, column in self._columns(logits).items():
                place = found.setdefault(
                    name, np.empty((len(pairs), *column.shape[1:]), column.dtype)
                )
                place[numbers] = column
        return found

    def logits(self, layouts: Sequence[Layout]) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers of layouts, a batch at a time, with (batch, vocab) logits of what the model is about to say."""
        head: Any = self._backbone.model.get_output_embeddings()
        work = Work(self.passes, "", self._batch_size, whole=True)
        for numbers, answers in work.answers(layouts):
            kind = torch.promote_types(answers.dtype, torch.float32)
            yield numbers, answers.to(kind) @ head.weight.to(kind).T

    def _laid_out(self, query: Item, candidate: Item) -> Layout:
        if self.scoring.text_first:
            return text_first(self.framing, str(query.text), candidate.image)
        return lay_out(self.framing, query, candidate)

    def _columns(self, logits: Tensor) -> dict[str, NDArray[Any]]:
        ids = torch.tensor([token for _, token, _ in self.labels], device=logits.device)
        values = torch.tensor([value for _, _, value in self.labels], device=logits.device)
        tensors = {
            "labels": logits[:, ids],
            "margin": margin(logits[:, ids], values),
            "probability": probability(logits, self._positive),
            "entropy": entropy(logits),
            "label_mass": label_mass(logits, ids),
        }
        return {
            **{name: one.float().cpu().numpy() for name, one in tensors.items()},
            "fired": np.array(self.passes.fired, np.int64),
            "length": np.array(self.passes.lengths, np.int64),
        }


class Readings:
    """Columns of the pairs of one scoring that have been read, each once.

    Args:
        num_queries: Of the subject.
        num_items: Of the subject.
    """

    def __init__(self, num_queries: int, num_items: int) -> None:
        self._row = np.full((num_queries, num_items), -1, np.int64)
        self._pairs: Pairs = np.empty((0, 2), np.int64)
        self._columns: dict[str, NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def missing(self, pairs: Pairs) -> Pairs:
        """Those that have not been read, each once, pairs of one image side by side."""
        unread = np.unique(pairs[self._row[pairs[:, 0], pairs[:, 1]] < 0], axis=0)
        return unread[np.lexsort((unread[:, 0], unread[:, 1]))]

    def add(self, pairs: Pairs, columns: dict[str, NDArray[Any]]) -> None:
        """Take columns of pairs that were missing."""
        self._row[pairs[:, 0], pairs[:, 1]] = len(self) + np.arange(len(pairs))
        self._pairs = np.concatenate([self._pairs, pairs])
        for name, column in columns.items():
            before = self._columns.get(name, column[:0])
            self._columns[name] = np.concatenate([before, column])

    def at(self, pairs: Pairs) -> dict[str, NDArray[Any]]:
        """Columns of pairs that have been read, in their order."""
        rows = self._row[pairs[:, 0], pairs[:, 1]]
        if (rows < 0).any():
            raise KeyError(f"{int((rows < 0).sum())} pairs have not been read")
        return {name: column[rows] for name, column in self._columns.items()}

    def save(self, path: Path, identity: Any) -> None:
        """Write a file with what they depend on; it appears whole or not at all.

        Raises:
            StorageError: It cannot be written.
        """
        partial = path.with_name(f".{path.name}.partial")
        try:
            named = {"identity": json.dumps(identity, sort_keys=True)}
            save_file({**self._columns, "pairs": self._pairs}, partial, metadata=named)
            partial.replace(path)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {error}; free space or choose another --out"
            ) from None

    def load(self, path: Path, identity: Any) -> None:
        """Take what a file holds that depends on the same; a damaged or foreign one is as good as none."""
        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("identity") != json.dumps(identity, sort_keys=True):
                    return
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return
        self.add(columns.pop("pairs"), columns)
