"""`Reranker`: the fine stage of RetLLM, by the same frozen backbone (spec: RetLLM sections 2 and 4).

Pairs that show the same image share its open turn, which is the very prefix that embedding uses; only what follows it
runs per pair, and only the label rows of the language-model head are multiplied.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slq.backbones import Backbone
from slq.encoder import as_item
from slq.enhancement import EnhancementConfig
from slq.errors import ConfigError, DataError
from slq.media import sanitise_text
from slq.reranking.depth import AdaptiveDepth, depth_of
from slq.reranking.framings import Framing, framing_by_name
from slq.reranking.layout import Layout, has_text, lay_out
from slq.reranking.listwise import NAMES, averaged, rotations
from slq.reranking.passes import Counts, Passes
from slq.reranking.profiles import (
    Profile,
    Reading,
    coarse_order,
    fusible,
    ordered,
    profile_by_name,
)
from slq.reranking.work import Work
from slq.schema import Item
from slq.scoring import entropy, hundredths, label_mass, margin, probability

_OFF = EnhancementConfig()
_FIRST_CHUNK = 1  # pairs of the first pass where time is short


@dataclass(frozen=True, slots=True)
class Ranked:
    """One candidate's place.

    Attributes:
        index: Position in the given candidates.
        fine_score: Of the profile, the margin in nats by default; higher is better. None if it was not scored: such a
            candidate keeps the place that its coarse score gives it.
        coarse_score: As given, or 0.
        reading: What the model was about to say; None if it was not scored.
        problem: Why it cannot be scored, if it cannot.
    """

    index: int
    fine_score: float | None
    coarse_score: float
    reading: Reading | None = None
    problem: str | None = None


class Reranker:
    """Scores query-candidate pairs by label logits.

    Args:
        backbone: The frozen model, the same object that embeds.
        profile: A key of `slq.reranking.profiles.PROFILES`: how candidates are ordered.
        framing: A key of `slq.reranking.framings.FRAMINGS`; that of the profile if left out.
        batch_size: Pairs per forward pass, and different images at a time.
        enhancement: Whether layers look at the image again.
        coarse_weight: Nats of margin that one unit of coarse score is worth (`slq.reranking.fusion` fits it); 0
            leaves coarse scores to break ties.
        deterministic: One pair and one image per pass, so that a score has the same bits whatever is scored beside it;
            slower.
        vision_bytes: Vision features of images to keep between calls, in memory of the device.
        prefix_bytes: Keys and values of open images to keep.

    Raises:
        ConfigError: A label word is not a single token of this backbone's tokenizer, the enhancement wants layers
            that the model does not have, or coarse scores are to be fused with a profile that does not rank by margin.
    """

    def __init__(  # noqa: PLR0913 - one name for each setting, as users write them
        self,
        backbone: Backbone,
        *,
        profile: str = "default",
        framing: str | None = None,
        batch_size: int = 64,
        enhancement: EnhancementConfig = _OFF,
        coarse_weight: float = 0.0,
        deterministic: bool = False,
        vision_bytes: int = 0,
        prefix_bytes: int = 0,
    ) -> None:
        self.backbone = backbone
        self.profile: Profile = profile_by_name(profile)
        self.coarse_weight = fusible(self.profile, coarse_weight)
        self.framing: Framing = framing_by_name(framing or self.profile.framing)
        self._batch_size = 1 if deterministic else batch_size
        labels = self._labels()
        self._label_ids = list(labels)
        self._values = torch.tensor(list(labels.values()), device=backbone.device)
        self._positive = self._positive_id()
        self.passes = Passes(
            backbone, enhancement, vision_bytes=vision_bytes, prefix_bytes=prefix_bytes
        )

    @property
    def counts(self) -> Counts:
        """What has been run so far."""
        return self.passes.counts

    def close(self) -> None:
        """Take the hooks of the enhancement off the model."""
        self.passes.close()

    def _labels(self) -> dict[int, float]:
        """Values of single-token variants of the label words, with and without a leading space."""
        found: dict[int, float] = {}
        for word, value in self.framing.labels:
            for variant in (word, f" {word}"):
                ids = self.backbone.token_ids(variant)
                if len(ids) == 1:
                    found[ids[0]] = value
        for bound in (0.0, 1.0):
            if bound not in found.values():
                words = [word for word, value in self.framing.labels if value == bound]
                raise ConfigError(
                    f"framing {self.framing.name!r}: none of {', '.join(words)} is one token of {self.backbone.name}; "
                    "choose another framing"
                )
        return dict(sorted(found.items()))

    def _positive_id(self) -> int:
        """The token of the positive label as it begins an answer."""
        ids = self.backbone.token_ids(self.backbone.answer_lead + self.framing.positive)
        return ids[0] if len(ids) == 1 else self._label_ids[int(self._values.argmax())]

    def rank(
        self,
        query: Any,
        candidates: Sequence[Any],
        coarse_scores: Sequence[float] | None = None,
        *,
        depth: int | None = None,
        adaptive: AdaptiveDepth | None = None,
        budget_s: float | None = None,
        details: bool = False,
        tenant: str = "",
    ) -> list[Ranked]:
        """Order candidates by what the model says of them, then coarse score, then position.

        A candidate that is not scored keeps its coarse place: one beyond `depth`, one that the budget did not reach,
        and one that cannot be read.

        Args:
            query: A text, an image, or a mapping of both.
            candidates: The same kinds. Each is asked for just before its pass, so a sequence may read them as they
                are asked for; DataError and OSError say that one cannot be read.
            coarse_scores: One per candidate; the input order by default.
            depth: Candidates to score, the best by coarse score; all by default.
            adaptive: How many fewer where coarse scores leave little to decide.
            budget_s: Seconds, from now on, after which no further pass begins. Passes begin with the best candidate by
                coarse score and grow, so that the last one tells how long the next one takes, with the time that its
                candidates took to be read; 0 scores none.
            details: Whether readings hold what takes the whole vocabulary, too; always with the profile `compat`.
            tenant: As of `score`.

        Raises:
            DataError: The query cannot be read, there are too few or too many scores, one is no number, or `depth` is
                negative.
        """
        coarse = list(coarse_scores) if coarse_scores is not None else [0.0] * len(candidates)
        if len(coarse) != len(candidates):
            raise DataError(
                f"{len(coarse)} coarse scores for {len(candidates)} candidates; give one for each"
            )
        if any(math.isnan(score) for score in coarse):
            raise DataError("a coarse score is no number")
        if depth is not None and depth < 0:
            raise DataError(f"depth is {depth}; it must be 0 or more")
        item = self._readable(query)
        most = depth_of(np.array(coarse), len(coarse) if depth is None else depth, adaptive)
        work = self._work(tenant, whole=details or self.profile.needs_vocabulary)

        def judge(numbers: Sequence[int]) -> dict[int, Reading | str]:
            return self._judged(item, candidates, numbers, work)

        found = self._within(coarse_order(coarse)[:most], judge, budget_s)
        problems = {n: one for n, one in found.items() if isinstance(one, str)}
        readings = {n: one for n, one in found.items() if isinstance(one, Reading)}
        return [
            self._ranked(number, coarse[number], readings.get(number), problems.get(number))
            for number in ordered(readings, coarse, self.profile, coarse_weight=self.coarse_weight)
        ]

    def _readable(self, value: Any) -> Item:
        """An item whose text the guards let pass."""
        item = as_item(value)
        if has_text(item):
            sanitise_text(str(item.text), self.backbone.special_tokens)
        return item

    def _ranked(
        self, number: int, coarse: float, reading: Reading | None, problem: str | None
    ) -> Ranked:
        score = None if reading is None else self.profile.score(reading)
        return Ranked(number, score, coarse, reading, problem)

    def _within(
        self,
        numbers: Sequence[int],
        judge: Callable[[Sequence[int]], dict[int, Reading | str]],
        budget_s: float | None,
    ) -> dict[int, Reading | str]:
        """What `judge` finds of as many candidates, from the first on, as fit into a budget."""
        found = dict[int, Reading | str]()
        size = len(numbers) if budget_s is None else _FIRST_CHUNK
        began, each = time.monotonic(), 0.0
        while numbers:
            now = time.monotonic()
            late = budget_s is not None and now - began + each * min(size, len(numbers)) > budget_s
            if late or (budget_s is not None and budget_s <= 0):
                break
            is_open = any(isinstance(one, Reading) for one in found.values())
            chunk, numbers = numbers[:size], numbers[size:]
            found |= judge(chunk)
            if is_open:  # the first pass also opens what all of them share
                each = (time.monotonic() - now) / len(chunk)
            size = min(2 * size, self._batch_size)
        return found

    def _judged(
        self, query: Item, candidates: Sequence[Any], numbers: Sequence[int], work: Work
    ) -> dict[int, Reading | str]:
        """Readings, or what is wrong with a candidate that cannot be read or that the model cannot take."""
        found: dict[int, Reading | str] = {}
        pairs: dict[int, tuple[Item, Item]] = {}
        for number in numbers:
            try:
                pairs[number] = (query, self._readable(candidates[number]))
            except (DataError, OSError) as error:  # OSError: an image that is read only now
                found[number] = str(error)
        if pairs:
            found |= zip(pairs, self._each(list(pairs.values()), work), strict=True)
        return found

    def _each(self, pairs: Sequence[tuple[Item, Item]], work: Work) -> list[Reading | str]:
        """Readings, and what is wrong with pairs that the model cannot take, none of which costs another its score."""
        try:
            found = self._read(pairs, work)
        except (DataError, OSError, ValueError) as error:
            # Processors refuse shapes of images by ValueError.
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

    def score(self, pairs: Sequence[tuple[Item, Item]], *, tenant: str = "") -> Tensor:
        """Margins of (query, candidate) pairs, (n,) float32 on the CPU, in input order.

        Args:
            pairs: Texts, images or both on either side.
            tenant: Whose they are; what is kept of one tenant's images another does not find.
        """
        margins = torch.empty(len(pairs))
        for numbers, answers in self._work(tenant).answers(self._laid_out(pairs)):
            margins[numbers] = self.margins(answers).cpu()
        return margins

    def read(self, pairs: Sequence[tuple[Item, Item]], *, tenant: str = "") -> list[Reading]:
        """What the model is about to say of each pair; as `score`, with the whole vocabulary at the answer."""
        return self._read(pairs, self._work(tenant, whole=True))

    @torch.no_grad()
    def compare(self, query: Any, candidates: Sequence[Any], *, tenant: str = "") -> Tensor:
        """Scores of candidates that the model sees side by side, (n,) float32 log-probabilities, higher is better.

        The candidates are options, and the model is about to say which one it takes. It prefers some places to others,
        so each candidate stands at each place once, and its log-probabilities are averaged. That is n passes of n
        candidates each.

        Args:
            query: A text, an image, or a mapping of both.
            candidates: The same kinds, 2 to 26.
            tenant: As of `score`.

        Raises:
            ConfigError: The names of options are not single tokens of this backbone's tokenizer.
            DataError: There are too few or too many candidates, or one cannot be read.
        """
        items = [as_item(candidate) for candidate in candidates]
        layouts = rotations(as_item(query), items)
        lead = self.backbone.answer_lead
        ids = [self._only_token(lead + name) for name in NAMES[: len(items)]]
        said = torch.empty(len(items), len(items))
        for numbers, answers in self._work(tenant).answers(layouts):
            said[numbers] = self._of_tokens(answers, ids).log_softmax(-1).cpu()
        return averaged(said)

    def _only_token(self, word: str) -> int:
        ids = self.backbone.token_ids(word)
        if len(ids) != 1:
            raise ConfigError(
                f"{word!r} is {len(ids)} tokens of {self.backbone.name}, so options cannot be told apart by one; "
                "score pairs one by one"
            )
        return ids[0]

    @torch.no_grad()
    def _read(self, pairs: Sequence[tuple[Item, Item]], work: Work) -> list[Reading]:
        found: dict[int, Reading] = {}
        labels = torch.tensor(self._label_ids, device=self.backbone.device)
        for numbers, answers in work.answers(self._laid_out(pairs)):
            columns = [self.margins(answers)]
            if work.whole:
                logits = self._of_tokens(answers)
                columns += [
                    label_mass(logits, labels),
                    entropy(logits),
                    hundredths(probability(logits, self._positive)),
                ]
            rows = zip(*(column.tolist() for column in columns), strict=True)
            found |= zip(numbers, (Reading(*row) for row in rows), strict=True)
        return [found[number] for number in range(len(pairs))]

    def _work(self, tenant: str, *, whole: bool = False) -> Work:
        return Work(self.passes, tenant, self._batch_size, whole=whole)

    def _laid_out(self, pairs: Sequence[tuple[Item, Item]]) -> list[Layout]:
        return [lay_out(self.framing, query, candidate) for query, candidate in pairs]

    def margins(self, answers: Tensor) -> Tensor:
        """(batch,) float32 margins from (batch, hidden) states of what the model is about to say."""
        return margin(self._of_tokens(answers, self._label_ids), self._values)

    def _of_tokens(self, answers: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """(batch, num_ids) logits of some tokens, or of all, float32 or wider whatever the type of the weights."""
        head: Any = self.backbone.model.get_output_embeddings()
        kind = torch.promote_types(answers.dtype, torch.float32)
        rows = head.weight if ids is None else head.weight[list(ids)]
        logits: Tensor = answers.to(kind) @ rows.to(kind).T
        return logits
