"""The thing of a caption that a rewriting hides: which words it is, and what must stay."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from slq.errors import DataError
from slq.karr.words import mentions, plain, tokens, without_articles
from slq.scenes.captions import COUNT_WORDS
from slq.scenes.layout import Entity, Size
from slq.scenes.sprites import Sprite


@dataclass(frozen=True, slots=True)
class Target:
    """A phrase of a caption for one thing that can be seen.

    Attributes:
        name: What the thing is called, the words that must not be said: "dog".
        start: Of the phrase in the caption, as in "a small dog"; its words may change.
        end: Behind the phrase.
    """

    name: str
    start: int
    end: int

    def phrase(self, caption: str) -> str:
        """The phrase's words."""
        return caption[self.start : self.end]


@dataclass(frozen=True, slots=True)
class Rewriting:
    """A caption worded anew.

    Attributes:
        caption: The whole.
        clue: The words that stand for the target.
        category: A key of `slq.karr.categories.CATEGORIES`.
    """

    caption: str
    clue: str
    category: str


@dataclass(frozen=True, slots=True)
class SceneTarget:
    """A sprite that a caption of the shipped scenes names.

    Attributes:
        target: Where.
        sprite: Which.
        entity: How many, and of which size.
    """

    target: Target
    sprite: Sprite
    entity: Entity


def target_of(caption: str, phrase: str, name: str) -> Target:
    """The target that a phrase of a caption names.

    Args:
        caption: The whole.
        phrase: Words of it, in whatever case.
        name: Words of the phrase, those that must not be said.

    Raises:
        DataError: The phrase does not stand in the caption exactly once as whole words, or does not hold the name.
    """
    pattern = rf"(?<!\w){re.escape(phrase.strip())}(?!\w)"
    found = list(re.finditer(pattern, caption, re.IGNORECASE)) if phrase.strip() else []
    if len(found) != 1:
        raise DataError(f"{phrase!r} stands {len(found)} times in the caption, not once")
    if not tokens(name) or mentions(phrase, [name]) is None:
        raise DataError(f"{phrase!r} does not hold its name {name!r}")
    return Target(name.strip(), *found[0].span())


def replaced_words(caption: str, target: Target, rewritten: str) -> list[str] | None:
    """The words of a new caption that stand for the target; None where words outside of it changed.

    Words are compared in their plain form, in their order; articles may change, as "an owl" becomes "a bird".
    """
    before = without_articles(tokens(caption[: target.start]))
    after = without_articles(tokens(caption[target.end :]))
    words = without_articles(tokens(rewritten))
    stop = len(words) - len(after)
    if stop <= len(before) or words[: len(before)] != before or words[stop:] != after:
        return None
    return words[len(before) : stop]


@cache
def _scene_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    counts = "|".join(COUNT_WORDS[1:])
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    said = "|".join(map(re.escape, longest_first))
    return re.compile(
        rf"(?<!\w)(?:(an?|the|{counts}) )?(?:(small|big) )?({said})(?!\w)", re.IGNORECASE
    )


def scene_targets(caption: str, sprites: Mapping[str, Sprite]) -> list[SceneTarget]:
    """The sprites that a caption names exactly once, in the order of the caption; longer names win over shorter ones.

    Args:
        caption: Of a shipped scene, or any text.
        sprites: By id.
    """
    by_name = {name: sprite for sprite in sprites.values() for name in (sprite.plural, sprite.name)}
    text, found = plain(caption), []
    if len(text) != len(caption):
        return []  # places would not be those of the caption
    for match in _scene_pattern(tuple(by_name)).finditer(text):
        sprite = by_name[match[3]]
        count = COUNT_WORDS.index(match[1]) if match[1] in COUNT_WORDS else 1
        size: Size | None = {"small": "small", "big": "big"}.get(match[2] or "")  # type: ignore[assignment]
        name = caption[match.start(3) : match.end(3)]
        entity = Entity(sprite.id, count, size)
        found.append(SceneTarget(Target(name, *match.span()), sprite, entity))
    ids = [one.sprite.id for one in found]
    return [one for one in found if ids.count(one.sprite.id) == 1]
