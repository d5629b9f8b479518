"""`Reranker`: the fine stage of RetLLM, by the same frozen backbone (spec: RetLLM sections 2 and 4)."""

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
from slq.reranking.calibration import Calibration
from slq.reranking.context_free import ContextFree
from slq.reranking.depth import AdaptiveDepth, depth_of
from slq.reranking.framings import framing_by_name
from slq.reranking.layout import has_text
from slq.reranking.listwise import NAMES, averaged, rotations
from slq.reranking.profiles import (
    Profile,
    Reading,
    coarse_order,
    fine_score,
    fusible,
    ordered,
    profile_by_name,
)
from slq.reranking.reader import OFF, PairReader
from slq.reranking.work import Work
from slq.schema import Item

_FIRST_CHUNK = 1  # pairs of the first pass where time is short


@dataclass(frozen=True, slots=True)
class Ranked:
    """One candidate's place.

    Attributes:
        index: Position in the given candidates.
        fine_score: Of the profile, the margin in nats by default, or the fused sum; higher is better. None if it was
            not scored: such a candidate keeps the place that its coarse score gives it.
        coarse_score: As given, or 0.
        reading: What the model was about to say; None if it was not scored.
        problem: Why it cannot be scored, if it cannot.
        stage: Of a cascade, which one's score it is.
        probability: Of a match: the sigmoid of the margin, over the calibration's temperature if there is one; None if
            it was not scored.
        is_match: Whether the margin reaches the calibration's threshold; None without one.
    """

    index: int
    fine_score: float | None
    coarse_score: float
    reading: Reading | None = None
    problem: str | None = None
    stage: int | None = None
    probability: float | None = None
    is_match: bool | None = None


class Reranker(PairReader):
    """Scores query-candidate pairs by label logits.

    Args:
        backbone: The frozen model, the same object that embeds.
        profile: A key of `slq.reranking.profiles.PROFILES`: how candidates are ordered.
        framing: A key of `slq.reranking.framings.FRAMINGS`, or of `PRESETS` for a model that was trained to rerank;
            that of the profile if left out.
        instruction: What the search is for, in words of yours, where the framing has a place for it; its own if left
            out.
        context_free: Side to empty for a second pass, whose margin is subtracted (`slq.reranking.context_free`).
        batch_size: Pairs per forward pass, and different images at a time.
        enhancement: Whether layers look at the image again.
        coarse_weight: Nats of margin that one unit of coarse score is worth (`slq.reranking.fusion` fits it); 0
            leaves coarse scores to break ties.
        calibration: What was fitted to held-out pairs of this model and question; says how likely a match is.
        deterministic: One pair and one image per pass, so that a score has the same bits whatever is scored beside it;
            slower.
        vision_bytes: Vision features of images to keep between calls, in memory of the device.
        prefix_bytes: Keys and values of open images to keep.

    Raises:
        ConfigError: A label word is not a single token of this backbone's tokenizer; the framing has a system message,
            and the chat template has no place for one; the framing takes no instruction, or it holds control tokens;
            the profile does not order by what is subtracted from or added to; or the enhancement wants layers that
            the model does not have.
    """

    def __init__(  # noqa: PLR0913 - choices that do not depend on one another, each by its name
        self,
        backbone: Backbone,
        *,
        profile: str = "default",
        framing: str | None = None,
        instruction: str = "",
        context_free: ContextFree | None = None,
        batch_size: int = 64,
        enhancement: EnhancementConfig = OFF,
        coarse_weight: float = 0.0,
        calibration: Calibration | None = None,
        deterministic: bool = False,
        vision_bytes: int = 0,
        prefix_bytes: int = 0,
    ) -> None:
        self.profile: Profile = profile_by_name(profile)
        self.coarse_weight = fusible(self.profile, coarse_weight)
        self.calibration = calibration
        if context_free and self.profile.needs_vocabulary:
            raise ConfigError(
                f"profile {self.profile.name!r} does not order by margins, from which context_free subtracts; "
                "leave context_free out, or choose the profile default"
            )
        super().__init__(
            backbone,
            framing_by_name(framing or self.profile.framing),
            instruction=instruction,
            context_free=context_free,
            batch_size=1 if deterministic else batch_size,
            enhancement=enhancement,
            vision_bytes=vision_bytes,
            prefix_bytes=prefix_bytes,
        )

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
        if reading is None:
            return Ranked(number, None, coarse, None, problem)
        score = fine_score(reading, coarse, self.profile, self.coarse_weight)
        probability, is_match = reading.probability, None
        if self.calibration is not None:
            margin = reading.margin / self.calibration.temperature
            probability = Reading(margin).probability
            if self.calibration.threshold is not None:
                is_match = reading.margin >= self.calibration.threshold
        return Ranked(number, score, coarse, reading, probability=probability, is_match=is_match)

    def _within(
        self,
        numbers: Sequence[int],
        judge: Callable[[Sequence[int]], dict[int, Reading | str]],
        budget_s: float | None,
    ) -> dict[int, Reading | str]:
        """What `judge` finds of as many candidates, from the first on, as fit into a budget."""
        found = dict[int, Reading | str]()
        size = self._batch_size if budget_s is None else _FIRST_CHUNK
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

    @torch.no_grad()
    def compare(self, query: Any, candidates: Sequence[Any], *, tenant: str = "") -> Tensor:
        """Scores of candidates that the model sees side by side, (n,) float32 log-probabilities, higher is better.

        The candidates are options, and the model is about to say which one it takes. It prefers some places to others,
        so each candidate stands at each place once, and its log-probabilities are averaged. That is n passes of n
        candidates each. Framing, instruction and what is context-free are of pairs and do not matter here.

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
            said[numbers] = self._labels.logits(answers, ids).log_softmax(-1).cpu()
        return averaged(said)

    def _only_token(self, word: str) -> int:
        ids = self.backbone.token_ids(word)
        if len(ids) != 1:
            raise ConfigError(
                f"{word!r} is {len(ids)} tokens of {self.backbone.name}, so options cannot be told apart by one; "
                "score pairs one by one"
            )
        return ids[0]
