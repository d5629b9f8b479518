"""Other names of a thing: its inflected forms, synonyms, and names in other languages.

Forms and the synonyms of the shipped sprites are always known. Beyond them, WordNet can be asked through the package
`wn` (extra `wordnet`), which reads lexicons in WN-LMF form from its own data base; translations are the words of the
same synset, by its interlingual index, in the other lexicons.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from slq.errors import ConfigError
from slq.karr.words import inflected, mentions, tokens
from slq.scenes.sprites import Sprite, load_sprites

_MODIFIERS = frozenset({"hot", "top", "soft", "big", "small", "light", "old", "new", "o"})
_LEAST_WORD = 3  # letters of a part of a name that gives it away


@dataclass(frozen=True, slots=True)
class Names:
    """What a thing is called.

    Attributes:
        forms: Of its own name, plural and derived words.
        parts: Words of a name of several, which give it away in a clue.
        synonyms: In the language of the captions.
        translations: In other languages.
    """

    forms: frozenset[str]
    parts: frozenset[str] = frozenset()
    synonyms: frozenset[str] = frozenset()
    translations: frozenset[str] = frozenset()

    def named_by(self, text: str, clue: str) -> tuple[str, str] | None:
        """Reason and word by which a text names the thing, or None.

        Args:
            text: The whole caption.
            clue: The part of it that stands for the thing.
        """
        for reason, words, where in (
            ("names_target", self.forms, text),
            ("names_target", self.parts, clue),
            ("names_synonym", self.synonyms, text),
            ("names_translation", self.translations, clue),
        ):
            word = mentions(where, sorted(words))
            if word is not None:
                return reason, word
        return None


@cache
def sprite_names() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Synonyms and translations (French, German, Spanish, Italian) of each shipped sprite, by id."""
    text = resources.files("slq.karr").joinpath("names.tsv").read_text(encoding="utf-8")
    rows = csv.reader(text.splitlines(), delimiter="\t")
    return {name: (_split(synonyms), _split(foreign)) for name, synonyms, foreign in rows}


def _split(words: str) -> tuple[str, ...]:
    return tuple(word for word in words.split(",") if word)


@cache
def sprite_called(name: str) -> Sprite | None:
    """The shipped sprite of a name, singular or plural, as its words; None where there is none."""
    wanted = tokens(name)
    for sprite in load_sprites().values():
        if wanted in (tokens(sprite.name), tokens(sprite.plural)):
            return sprite
    return None


@dataclass(frozen=True)
class Lexicon:
    """Looks names up.

    Attributes:
        wordnet: Specifiers of `wn` lexicons, the first of the captions' own language; empty for none.
    """

    wordnet: tuple[str, ...] = ()
    _known: dict[str, Names] = field(default_factory=dict, compare=False, repr=False)

    def names_of(self, name: str) -> Names:
        """Everything that a thing is called, found once.

        Raises:
            ConfigError: WordNet is asked for, and the package or a lexicon is missing.
        """
        if name not in self._known:
            self._known[name] = self._look_up(name)
        return self._known[name]

    def _look_up(self, name: str) -> Names:
        forms = inflected(name)
        sprite = sprite_called(name)
        synonyms, foreign = sprite_names().get(sprite.id, ((), ())) if sprite else ((), ())
        if sprite:
            forms |= inflected(sprite.name) | inflected(sprite.plural)
        if self.wordnet:
            more, others = _of_wordnet(self.wordnet, name)
            synonyms, foreign = (*synonyms, *more), (*foreign, *others)
        words = tokens(name)
        parts = {word for word in words if len(word) >= _LEAST_WORD and word not in _MODIFIERS}
        return Names(
            frozenset(forms),
            frozenset(form for part in parts if len(words) > 1 for form in inflected(part)),
            frozenset(form for word in synonyms for form in inflected(word)) - forms,
            frozenset(form for word in foreign for form in inflected(word)) - forms,
        )


def require_wordnet(lexicons: Sequence[str]) -> None:
    """Check that WordNet can be asked, before any work is done.

    Raises:
        ConfigError: The package or one of the lexicons is missing; how to get it is said.
    """
    wn = _package()
    for lexicon in lexicons:
        try:
            found = wn.lexicons(lexicon=lexicon)
        except wn.Error:
            found = []
        if not found:
            raise ConfigError(
                f"karr.wordnet: lexicon {lexicon} is not in the data base of the package `wn`; add it with "
                f"`python -m wn download {lexicon}`, or leave karr.wordnet empty: forms and the sprites' own synonyms "
                "are checked all the same"
            )


def _package() -> Any:
    try:
        import wn
    except ImportError:
        raise ConfigError(
            "karr.wordnet needs the package `wn`; install the extra with `pip install 'slq[wordnet]'`, or leave "
            "karr.wordnet empty: forms and the sprites' own synonyms are checked all the same"
        ) from None
    return wn


def _of_wordnet(lexicons: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """Synonyms of a noun in the first lexicon, and words of the same synsets in the others."""
    wn = _package()
    own, *others = lexicons
    senses = wn.Wordnet(lexicon=own, expand="").synsets(name, pos="n")
    for form in sorted(inflected(name)) if not senses else ():
        senses = senses or wn.Wordnet(lexicon=own, expand="").synsets(form, pos="n")
    synonyms = [lemma for sense in senses for lemma in sense.lemmas()]
    foreign = [
        lemma
        for sense in senses
        if sense.ili is not None
        for other in others
        for same in wn.synsets(ili=sense.ili, lexicon=other)
        for lemma in same.lemmas()
    ]
    return synonyms, foreign
