"""Words for scenes: explicit captions in several phrasings, and captions that name objects only by a clue."""

import re
from collections.abc import Callable

from numpy.random import Generator

from slq.scenes.layout import Entity, Scene
from slq.scenes.sprites import Clue, Sprite

COUNT_WORDS = ("zero", "one", "two", "three", "four")
Namer = Callable[[Entity], str]

_CONSONANT_SOUND = ("uni", "ufo")

_FORWARD = {"left_of": ("left of", "to the left of"), "above": ("above", "over")}
_INVERSE = {"left_of": ("right of", "to the right of"), "above": ("below", "under")}
_THIRD = {
    # relation of the pair -> (word for "pair stands before third", word for "third stands before pair")
    "left_of": ("above", "below"),
    "above": ("left of", "right of"),
}


def noun_phrase(entity: Entity, sprite: Sprite) -> str:
    """Words such as "a small dog", "an owl", "three dogs"."""
    if entity.count > 1:
        return f"{COUNT_WORDS[entity.count]} {sprite.plural}"
    words = f"{entity.size} {sprite.name}" if entity.size else sprite.name
    return f"{_article(words)} {words}"


def _article(words: str) -> str:
    sounds_open = words[0] in "aeiou" and not words.startswith(_CONSONANT_SOUND)
    return "an" if sounds_open or words.startswith("hour") else "a"


def clue_phrase(entity: Entity, clue: Clue) -> str:
    """Words such as "the animal that barks", "the animal that barks shown small"."""
    if entity.count > 1:
        return f"{COUNT_WORDS[entity.count]} of {clue.text}"
    return f"{clue.text} shown {entity.size}" if entity.size else clue.text


def _arrangements(scene: Scene, name: Namer) -> list[str]:
    """Every way to say which objects there are and how they stand, without the background."""
    names = [name(entity) for entity in scene.entities]
    if scene.relation is None:
        return names
    first, second = names[0], names[1]
    pairs = [f"{first} {word} {second}" for word in _FORWARD[scene.relation]]
    pairs += [f"{second} {word} {first}" for word in _INVERSE[scene.relation]]
    if len(names) == 2:
        return pairs
    pair_first, third_first = _THIRD[scene.relation]
    if scene.third_first:
        pair_first, third_first = third_first, pair_first
    triples = [f"{pair}, both {pair_first} {names[2]}" for pair in pairs]
    return triples + [f"{names[2]} {third_first} this pair: {pair}" for pair in pairs]


def _sentences(scene: Scene, name: Namer) -> list[str]:
    background = scene.background
    sentences = []
    for arrangement in _arrangements(scene, name):
        sentences.append(f"{arrangement} on a {background} background")
        sentences.append(f"on {background}, {arrangement}")
        sentences.append(f"{arrangement}, {background} background")
    return sentences


def explicit_captions(scene: Scene, sprites: dict[str, Sprite]) -> list[str]:
    """Every caption that states the whole scene by name; each of them is true of this scene alone."""
    return _sentences(scene, lambda entity: noun_phrase(entity, sprites[entity.sprite_id]))


def explicit_caption(scene: Scene, sprites: dict[str, Sprite], rng: Generator) -> str:
    """One of `explicit_captions`.

    Args:
        scene: What to describe.
        sprites: All sprites by id.
        rng: Chooses the phrasing, the direction of relations and the order.
    """
    captions = explicit_captions(scene, sprites)
    return captions[int(rng.integers(len(captions)))]


def explicit_arrangement(scene: Scene, sprites: dict[str, Sprite], rng: Generator) -> str:
    """The part of a caption that says which objects there are and how they stand, such as "a dog left of two owls"."""
    arrangements = _arrangements(
        scene, lambda entity: noun_phrase(entity, sprites[entity.sprite_id])
    )
    return arrangements[int(rng.integers(len(arrangements)))]


def knowledge_caption(
    scene: Scene, sprites: dict[str, Sprite], rng: Generator, category: str | None = None
) -> tuple[str, str]:
    """A KARR-style caption: every object only through a clue, never by its name.

    Args:
        scene: What to describe.
        sprites: All sprites by id.
        rng: Chooses the clues and the phrasing.
        category: Wanted category of the first object's clue, where it has one.

    Returns:
        The caption, and the category of the clue for the first object.
    """
    chosen: dict[str, Clue] = {}
    for entity in scene.entities:
        clues = _clues_beside(sprites[entity.sprite_id], scene, sprites)
        wanted = [clue for clue in clues if clue.category == category] if not chosen else []
        pool = wanted or list(clues)
        chosen[entity.sprite_id] = pool[int(rng.integers(len(pool)))]
    captions = _sentences(scene, lambda entity: clue_phrase(entity, chosen[entity.sprite_id]))
    return captions[int(rng.integers(len(captions)))], chosen[scene.entities[0].sprite_id].category


def _clues_beside(sprite: Sprite, scene: Scene, sprites: dict[str, Sprite]) -> tuple[Clue, ...]:
    """The clues that name no object of the scene; all of them if none is left."""
    words = [word for id_ in scene.sprite_ids for word in (sprites[id_].name, sprites[id_].plural)]
    named = re.compile(rf"(?<![a-z])({'|'.join(map(re.escape, words))})(?![a-z])")
    return tuple(clue for clue in sprite.clues if not named.search(clue.text)) or sprite.clues
