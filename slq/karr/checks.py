"""What a new caption must pass before it is looked at with its image."""

from slq.karr.categories import CATEGORIES
from slq.karr.lexicon import Lexicon
from slq.karr.reasons import RejectedError
from slq.karr.targets import Rewriting, Target, replaced_words
from slq.karr.words import tokens, without_articles
from slq.scenes.sprites import Sprite

_JOINING = (
    "of",
    "shown",
)  # as in "two of the animal that barks", "the animal that barks shown small"
PASSED = ("length", "category", "rest_unchanged", "target_unnamed", "clue_table")
"""Names of the checks, in their order, as a row's provenance lists them."""


def check_words(
    caption: str,
    target: Target,
    rewriting: Rewriting,
    lexicon: Lexicon,
    *,
    max_chars: int = 400,
    max_clue_words: int = 30,
    sprites: dict[str, Sprite] | None = None,
) -> tuple[str, ...]:
    """Check the words of a new caption; cheap, and asks no model.

    Args:
        caption: As it was.
        target: What is hidden.
        rewriting: As it is now.
        lexicon: Knows other names of the target.
        max_chars: Of the new caption.
        max_clue_words: That stand for the target.
        sprites: By id; a clue of their table must belong to the target. None where captions are not of these.

    Returns:
        The checks that it passed.

    Raises:
        RejectedError: With reason `too_long`, `unknown_category`, `changes_rest`, `names_target`, `names_synonym`,
            `names_translation` or `other_object`.
        ConfigError: WordNet is asked for and missing.
    """
    if len(rewriting.caption) > max_chars:
        raise RejectedError(
            "too_long", f"it has {len(rewriting.caption)} characters, not {max_chars}"
        )
    if rewriting.category not in CATEGORIES:
        raise RejectedError("unknown_category", f"{rewriting.category[:80]!r} is none of the six")
    words = replaced_words(caption, target, rewriting.caption)
    names = lexicon.names_of(target.name)
    if words is None:
        named = names.named_by(rewriting.caption, rewriting.caption)
        if named is not None:  # the graver fault of the two
            raise RejectedError(named[0], f"it says {named[1]!r}")
        raise RejectedError(
            "changes_rest",
            f"words outside of {target.phrase(caption)!r} changed: {rewriting.caption!r}",
        )
    if len(words) > max_clue_words:
        raise RejectedError("too_long", f"the clue has {len(words)} words, not {max_clue_words}")
    for clue in (" ".join(words), rewriting.clue, _unaltered(caption, target, rewriting.caption)):
        named = names.named_by(rewriting.caption, clue)
        if named is not None:
            raise RejectedError(named[0], f"it says {named[1]!r}")
    if sprites is not None:
        _require_own_clue(target, words, sprites)
    if rewriting.clue:
        _require_clue_alone(target.phrase(caption), words, rewriting.clue)
    return PASSED if sprites is not None else PASSED[:-1]


def _unaltered(caption: str, target: Target, rewritten: str) -> str:
    """The replaced words as they are written, about: spelling tricks go with punctuation, which `words` lacks."""
    tail = len(caption) - target.end
    return rewritten[min(target.start, len(rewritten)) : max(0, len(rewritten) - tail)]


def _require_clue_alone(phrase: str, words: list[str], clue: str) -> None:
    """Refuse what slipped in beside the clue: at either end of a caption it would pass for a part of it.

    Raises:
        RejectedError: `changes_rest`.
    """
    wanted = without_articles(tokens(clue))
    starts = [n for n in range(len(words)) if words[n : n + len(wanted)] == wanted]
    if not wanted or not starts:
        raise RejectedError("changes_rest", f"the new caption does not hold its clue {clue!r}")
    others = [*words[: starts[0]], *words[starts[0] + len(wanted) :]]
    slipped = [word for word in others if word not in {*tokens(phrase), *_JOINING}]
    if slipped:
        raise RejectedError(
            "changes_rest", f"{' '.join(slipped)!r} is neither of {phrase!r} nor of the clue"
        )


def _require_own_clue(target: Target, words: list[str], sprites: dict[str, Sprite]) -> None:
    """Refuse a clue that the table gives to another sprite and not to the target's.

    Raises:
        RejectedError: `other_object`.
    """
    said = " ".join(words)
    owners = {
        sprite.id
        for sprite in sprites.values()
        for clue in sprite.clues
        if " ".join(tokens(clue.text.removeprefix("the "))) in said
    }
    own = {
        sprite.id
        for sprite in sprites.values()
        if tokens(target.name) in (tokens(sprite.name), tokens(sprite.plural))
    }
    if owners and not owners & own:
        other = sprites[sorted(owners)[0]].name
        raise RejectedError(
            "other_object", f"the clue is that of a {other}, not of a {target.name}"
        )
