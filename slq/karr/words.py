"""Words as a reader sees them, whatever letters they are written with, and the forms that one word takes.

A caption that must not name a thing may still spell it: "DOG", "d-o-g", "hot-dog" for "hot dog", letters of other
scripts that look the same, invisible characters in between, an emoji. Texts are brought to one form before they are
compared, so that each of these is found.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable
from functools import lru_cache

_LOOKALIKES = {
    letter: latin
    for letters, plains in (
        ("аеорсухіјѕԁһԛԝѵкмнтвгпи", "aeopcyxijsdhqwvkmhtbrnu"),
        ("αεικνορτυχγηωβμ", "aeikvoptuxynwbm"),
        ("ıłøđħɑɡð", "ilodhagd"),
    )
    for letter, latin in zip(map(ord, letters), plains, strict=True)
} | {ord(letter): latin for letter, latin in (("æ", "ae"), ("œ", "oe"), ("þ", "th"))}
_DIGITS_AS_LETTERS = str.maketrans("0134578@$!", "oleastbasi")
_WORD = re.compile(r"[^\W_]+")
_SPELT = re.compile(r"(?<![^\W_])[^\W_](?:[\W_]{1,3}[^\W_]){2,}(?![^\W_])")
_SYMBOLS = {"So", "Sk", "Sm"}
ARTICLES = frozenset({"a", "an", "the"})

_IRREGULAR = {
    "mouse": "mice", "louse": "lice", "goose": "geese", "foot": "feet", "tooth": "teeth", "man": "men",
    "woman": "women", "child": "children", "person": "people", "ox": "oxen", "die": "dice", "cactus": "cacti",
    "fungus": "fungi", "octopus": "octopi", "leaf": "leaves", "loaf": "loaves", "wolf": "wolves", "knife": "knives",
    "wife": "wives", "life": "lives", "half": "halves", "calf": "calves", "shelf": "shelves", "thief": "thieves",
    "elf": "elves", "scarf": "scarves", "hoof": "hooves", "matrix": "matrices", "index": "indices",
}  # fmt: skip
_DERIVED = (
    "ing",
    "ed",
    "er",
    "ers",
    "y",
    "ie",
    "ies",
    "like",
    "ish",
    "let",
    "lets",
    "ling",
    "lings",
)


@lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """Text in small Latin letters: no accents, no invisible characters, no lookalikes; an emoji becomes its name."""
    found = []
    for sign in unicodedata.normalize("NFKD", text):
        kind = unicodedata.category(sign)
        if kind in {"Mn", "Me", "Cf", "Cc"}:  # accents, invisible and control characters
            found.append(" " if sign in "\n\t\r" else "")
        elif kind in _SYMBOLS and not sign.isascii():
            found.append(f" {unicodedata.name(sign, '').lower()} ")
        else:
            found.append(sign)
    return "".join(found).casefold().translate(_LOOKALIKES)


def tokens(text: str) -> list[str]:
    """Words and numbers of a text in its plain form, without punctuation."""
    return _WORD.findall(plain(text))


def mentions(text: str, forms: Iterable[str]) -> str | None:
    """The first of some words or phrases that a text holds, however it is spelt; None where it holds none.

    Args:
        text: Any text.
        forms: Words or phrases, each compared as whole words.
    """
    views = _views(text)
    for form in forms:
        wanted = tokens(form)
        if wanted and any(_holds(view, wanted) for view in views):
            return form
    return None


def _views(text: str) -> list[list[str]]:
    """Ways to read a text: as it is, with digits read as letters, and with letters that stand apart put together."""
    base = plain(text)
    joined = _SPELT.sub(lambda found: "".join(_WORD.findall(found[0])), base)
    return [
        _WORD.findall(base),
        _WORD.findall(base.translate(_DIGITS_AS_LETTERS)),
        _WORD.findall(joined),
    ]


def _holds(words: list[str], wanted: list[str]) -> bool:
    """Whether words stand in a row, or the same letters do with the gaps elsewhere ("hotdog", "do g")."""
    goal = "".join(wanted)
    for start in range(len(words)):
        read = ""
        for word in words[start:]:
            read += word
            if read == goal:
                return True
            if not goal.startswith(read):
                break
    return False


def inflected(word: str) -> set[str]:
    """A word with its plural, its singular, and what is made of it by an ending ("dogs", "doggy", "doglike").

    Args:
        word: One word or a phrase, whose last word changes.
    """
    words = tokens(word)
    if not words:
        return set()
    *first, last = words
    found = {last}
    for one in _singulars(last) | {last}:
        found |= _plurals(one) | _derived(one) | {one}
    return {" ".join([*first, form]) for form in found}


def _plurals(word: str) -> set[str]:
    found = {word + "s", word + "es", _IRREGULAR.get(word, word)}
    if word.endswith("y"):
        found.add(word[:-1] + "ies")
    if word.endswith("man"):
        found.add(word[:-3] + "men")
    return found


def _singulars(word: str) -> set[str]:
    found = {one for one, many in _IRREGULAR.items() if many == word}
    if word.endswith("men"):
        found.add(word[:-3] + "man")
    if word.endswith("ies") and len(word) > 4:
        found.add(word[:-3] + "y")
    if word.endswith("es") and len(word) > 4:
        found.add(word[:-2])
    if word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        found.add(word[:-1])
    return found


def _derived(word: str) -> set[str]:
    if len(word) < 3:
        return set()
    stems = {word, word.removesuffix("e")} | ({word + word[-1]} if _doubles(word) else set())
    return {stem + ending for stem in stems for ending in _DERIVED}


def _doubles(word: str) -> bool:
    """Whether the last letter doubles before an ending ("dog", "doggy")."""
    vowels = "aeiou"
    return word[-1] not in vowels + "wxy" and word[-2] in vowels and word[-3] not in vowels


def without_articles(words: Collection[str]) -> list[str]:
    """Words without "a", "an" and "the", which a rewriting may change."""
    return [word for word in words if word not in ARTICLES]
