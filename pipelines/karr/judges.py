"""Judges, who accept or reject a new caption: a language model, the frozen model, the clue table."""

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from PIL import Image

from slq.karr.config import JudgeConfig
from slq.karr.reasons import RejectedError
from slq.karr.rewriting import LanguageModel, Source, fits_clue_table, is_accepted
from slq.karr.targets import Rewriting, Target
from slq.media import decode_image
from slq.reranker import Reranker
from slq.scenes.sprites import Sprite, load_sprites
from slq.schema import Item


@dataclass(frozen=True, slots=True)
class Candidate:
    """A new caption that has passed the checks of its words.

    Attributes:
        source: The caption as it was.
        item_id: Of its image.
        target: What is hidden.
        rewriting: The caption as it is now.
        image: Encoded.
    """

    source: Source
    item_id: str
    target: Target
    rewriting: Rewriting
    image: bytes

    def picture(self) -> Image.Image:
        """The image, decoded."""
        return decode_image(self.image)


Vote = dict[str, Any]
"""`judge`, `accept` (null where no vote was given) and `margin` (null but of frozen judges)."""


class Judge(Protocol):
    """Votes on candidates."""

    def votes(self, candidates: Sequence[Candidate]) -> Sequence[Vote | RejectedError]:
        """One for each candidate; an error, `unanswered`, where the judge could not be reached."""
        ...


@dataclass(frozen=True)
class ClueJudge:
    """The clue table as a judge."""

    name: str
    sprites: dict[str, Sprite] = field(default_factory=load_sprites, repr=False)

    def votes(self, candidates: Sequence[Candidate]) -> list[Vote]:
        """See `Judge.votes`."""
        return [
            _vote(self.name, fits_clue_table(one.rewriting, one.target, self.sprites))
            for one in candidates
        ]


@dataclass(frozen=True)
class FrozenJudge:
    """The recipe's own model, which is asked whether image and caption match."""

    config: JudgeConfig
    reranker: Reranker

    def votes(self, candidates: Sequence[Candidate]) -> list[Vote]:
        """See `Judge.votes`."""
        pairs = [
            (Item(text=one.rewriting.caption), Item(image=one.picture())) for one in candidates
        ]
        margins = self.reranker.score(pairs).tolist() if pairs else []
        return [
            _vote(self.config.name, margin >= self.config.min_margin, margin)
            if np.isfinite(margin)
            else _vote(self.config.name, None)
            for margin in margins
        ]


@dataclass(frozen=True)
class ModelJudge:
    """A language model as a judge."""

    config: JudgeConfig
    model: LanguageModel
    seed: int
    threads: int

    def votes(self, candidates: Sequence[Candidate]) -> list[Vote | RejectedError]:
        """See `Judge.votes`; an answer that cannot be read leaves its vote open."""
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._vote, candidates))

    def _vote(self, one: Candidate) -> Vote | RejectedError:
        image = _data_uri(one.image) if self.config.with_image else None
        ask = partial(is_accepted, self.model, one.source, one.target, one.rewriting)
        try:
            return _vote(self.config.name, ask(seed=self.seed, image=image))
        except RejectedError as error:
            if error.reason == "unanswered":
                return RejectedError(error.reason, f"judge {self.config.name}: {error}")
            return _vote(self.config.name, None)


def _vote(judge: str, accept: bool | None, margin: float | None = None) -> Vote:
    return {"judge": judge, "accept": accept, "margin": margin}


def _data_uri(image: bytes) -> str:
    kind = Image.MIME[str(_format(image))]
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def _format(image: bytes) -> str | None:
    with Image.open(io.BytesIO(image)) as opened:
        return opened.format
