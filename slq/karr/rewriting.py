"""Rewriters: who chooses the target of a caption and words it anew. One asks a language model, one the clue table."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from slq.errors import DataError
from slq.karr.answers import parse_answer
from slq.karr.categories import CATEGORIES
from slq.karr.prompts import (
    CHOOSE,
    CHOOSE_KEYS,
    JUDGE,
    JUDGE_KEYS,
    NAMED,
    NAMED_KEYS,
    REWRITE,
    REWRITE_KEYS,
    Message,
    messages,
)
from slq.karr.reasons import RejectedError
from slq.karr.targets import Rewriting, SceneTarget, Target, scene_targets, target_of
from slq.karr.words import mentions
from slq.scenes.captions import clue_phrase
from slq.scenes.sprites import Clue, Sprite, load_sprites


@dataclass(frozen=True, slots=True)
class Completion:
    """What a language model answered.

    Attributes:
        text: The answer.
        prompt_hash: Of what was asked.
        answered: When, as ISO 8601 in UTC; a kept answer keeps its time.
    """

    text: str
    prompt_hash: str
    answered: str


class LanguageModel(Protocol):
    """Answers chats."""

    @property
    def name(self) -> str:
        """The model's, for the provenance."""
        ...

    def settings(self, seed: int) -> dict[str, Any]:
        """What an answer depends on beside the chat, the model's name included; plain JSON."""
        ...

    def complete(self, chat: list[Message], seed: int) -> Completion:
        """The answer to a chat.

        Raises:
            RejectedError: `unanswered`: none came.
        """
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """One caption as it comes in.

    Attributes:
        row: Its number in the plan; decides what a rewriter draws.
        caption: Its words.
    """

    row: int
    caption: str


@dataclass(slots=True)
class Trace:
    """How a rewriting came about, for its provenance; filled in as answers come.

    Attributes:
        seed: Of the try.
        prompt_hash: Of the last question; empty without a model.
        answered: When it was answered.
    """

    seed: int
    prompt_hash: str = ""
    answered: str = ""

    def note(self, completion: Completion) -> Completion:
        """Keep what is told of an answer."""
        self.prompt_hash, self.answered = completion.prompt_hash, completion.answered
        return completion


class Rewriter(Protocol):
    """Chooses targets and words captions anew."""

    @property
    def kind(self) -> str:
        """For the provenance: `clues` or `model`."""
        ...

    @property
    def model(self) -> str:
        """The model's name, or the clue table's."""
        ...

    def choose(self, source: Source, trace: Trace) -> Target:
        """The thing to hide.

        Raises:
            RejectedError: `no_entity`, `unanswered` or `unparseable`.
        """
        ...

    def rewrite(self, source: Source, target: Target, trace: Trace) -> Rewriting:
        """The caption without the target's name; not checked yet.

        Raises:
            RejectedError: `no_entity`, `unanswered` or `unparseable`.
        """
        ...


@dataclass(frozen=True)
class ClueRewriter:
    """Words captions of the shipped scenes anew from the clue table; the same row and seed give the same words.

    Categories take turns over the rows. Where a caption has no clue of the one whose turn it is, the category with the
    fewest clues in the table goes first, so that none is rare.
    """

    seed: int = 0
    kind: str = "clues"
    model: str = "clue_table"
    sprites: dict[str, Sprite] = field(default_factory=load_sprites, repr=False)

    def choose(self, source: Source, trace: Trace) -> Target:
        """See `Rewriter.choose`."""
        return self._chosen(source, trace)[0].target

    def rewrite(self, source: Source, target: Target, trace: Trace) -> Rewriting:
        """See `Rewriter.rewrite`."""
        found, clue = self._chosen(source, trace)
        if found.target != target:
            raise RejectedError("no_entity", f"{target.name!r} is not what was chosen")
        said = clue_phrase(found.entity, clue)
        caption = source.caption[: target.start] + said + source.caption[target.end :]
        return Rewriting(caption, clue.text, clue.category)

    def _chosen(self, source: Source, trace: Trace) -> tuple[SceneTarget, Clue]:
        options = self._options(source)
        if not options:
            raise RejectedError(
                "no_entity", "no object of the clue table stands there exactly once"
            )
        categories = list(CATEGORIES)
        wanted = categories[(source.row + trace.seed) % len(categories)]
        rarest = min(
            (one[1].category for one in options), key=lambda name: (self._sizes[name], name)
        )
        pool = [one for one in options if one[1].category == wanted]
        pool = pool or [one for one in options if one[1].category == rarest]
        rng = np.random.default_rng([self.seed, source.row, trace.seed])
        return pool[int(rng.integers(len(pool)))]

    @cached_property
    def _sizes(self) -> Counter[str]:
        """Clues of each category."""
        return Counter(clue.category for one in self.sprites.values() for clue in one.clues)

    def _options(self, source: Source) -> list[tuple[SceneTarget, Clue]]:
        """Targets with clues that name nothing else of the caption."""
        found = scene_targets(source.caption, self.sprites)
        names = [word for one in found for word in (one.sprite.name, one.sprite.plural)]
        return [
            (one, clue)
            for one in found
            for clue in one.sprite.clues
            if not mentions(clue.text, names)
        ]


@dataclass(frozen=True)
class ModelRewriter:
    """Asks a language model."""

    language_model: LanguageModel
    kind: str = "model"

    @property
    def model(self) -> str:
        """See `Rewriter.model`."""
        return self.language_model.name

    def choose(self, source: Source, trace: Trace) -> Target:
        """See `Rewriter.choose`."""
        chat = messages(CHOOSE, {"caption": source.caption})
        answer = trace.note(self.language_model.complete(chat, trace.seed))
        found = parse_answer(answer.text, CHOOSE_KEYS)
        if found["phrase"] == "-":
            raise RejectedError("no_entity", "the model found nothing that can be seen")
        try:
            return target_of(source.caption, found["phrase"], found["name"])
        except DataError as error:
            raise RejectedError("no_entity", str(error)) from None

    def rewrite(self, source: Source, target: Target, trace: Trace) -> Rewriting:
        """See `Rewriter.rewrite`."""
        data = {"caption": source.caption, "phrase": target.phrase(source.caption)}
        chat = messages(REWRITE, {**data, "name": target.name})
        answer = trace.note(self.language_model.complete(chat, trace.seed))
        found = parse_answer(answer.text, REWRITE_KEYS)
        return Rewriting(found["caption"], found["clue"], found["category"])


def is_named(model: LanguageModel, rewriting: Rewriting, target: Target, seed: int) -> bool:
    """Whether a model finds the target named in a new caption.

    Raises:
        RejectedError: `unanswered` or `unparseable`.
    """
    chat = messages(NAMED, {"caption": rewriting.caption, "name": target.name})
    return bool(parse_answer(model.complete(chat, seed).text, NAMED_KEYS)["named"])


def is_accepted(
    model: LanguageModel,
    source: Source,
    target: Target,
    rewriting: Rewriting,
    *,
    seed: int,
    image: str | None = None,
) -> bool:
    """A language model's vote.

    Args:
        model: The judge.
        source: The caption as it was.
        target: What is hidden.
        rewriting: The caption as it is now.
        seed: Of the answer.
        image: A data URI, for models that see.

    Raises:
        RejectedError: `unanswered` or `unparseable`.
    """
    data = {"original": source.caption, "target": target.name}
    chat = messages(JUDGE, {**data, "caption": rewriting.caption, "clue": rewriting.clue}, image)
    return bool(parse_answer(model.complete(chat, seed).text, JUDGE_KEYS)["accept"])


def fits_clue_table(rewriting: Rewriting, target: Target, sprites: dict[str, Sprite]) -> bool:
    """The clue table's vote: the clue is in it, of the category that is said, and of the target alone."""
    owners = {
        (sprite.id, clue.category)
        for sprite in sprites.values()
        for clue in sprite.clues
        if mentions(rewriting.clue, [clue.text])
    }
    own = {sprite.id for sprite in sprites.values() if target.name in (sprite.name, sprite.plural)}
    return (
        bool(owners)
        and {owner for owner, _ in owners} <= own
        and rewriting.category in {category for _, category in owners}
    )
