"""What the tiny backbone learns from: captions, questions, match prompts and restatements over training scenes.

There is no retrieval loss anywhere. Images and texts end in the same opened assistant turn (image -> caption,
text -> the same caption in other words), because that is where the latent queries will read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from slq.reranking.framings import FRAMINGS
from slq.scenes.captions import (
    COUNT_WORDS,
    explicit_arrangement,
    explicit_caption,
    knowledge_caption,
    noun_phrase,
)
from slq.scenes.layout import Relation, Scene
from slq.scenes.rendering import CANVAS, coverage, render
from slq.scenes.sampling import (
    SceneSampler,
    amount_variants,
    arrangement_variants,
    with_other_object,
)
from slq.scenes.sprites import Sprite

Skill = Literal["caption", "question", "match", "restate", "clue", "cover"]
PATCH, MERGE = 8, 2  # pixels of a patch, patches of a visual token, along one side
GRID = CANVAS // PATCH // MERGE  # visual tokens along one side
_SIDES = {"left_of": ("left", "right"), "above": ("above", "below")}
_CROSSING: dict[str, Relation] = {"left_of": "above", "above": "left_of"}


@dataclass(frozen=True, slots=True)
class Turn:
    """One user message and its answer; for image turns the message follows the image."""

    skill: Skill
    user: str
    answer: str


@dataclass(frozen=True, slots=True)
class ImageExample:
    """A picture and several independent turns about it.

    Attributes:
        pixels: (96, 96, 3) uint8.
        turns: What is asked and answered about it.
        cover: The name of what covers each visual token, row by row, "" for background; empty teaches none.
    """

    pixels: NDArray[np.uint8]
    turns: tuple[Turn, ...]
    cover: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mixture:
    """Draws examples of the training mixture; example `i` depends only on the sampler's seed and `i`.

    Attributes:
        sampler: Scenes of the split to learn from.
        num_matches: Match prompts per image, half of them true.
        num_questions: Questions per image.
    """

    sampler: SceneSampler
    num_matches: int = 3
    num_questions: int = 2

    @property
    def sprites(self) -> dict[str, Sprite]:
        """All sprites by id."""
        return self.sampler.sprites

    def image_example(self, index: int) -> ImageExample:
        """One picture with a caption turn, questions and match prompts."""
        scene = self.sampler.scene(index)
        rng = self.sampler.generator(index, purpose=2)
        turns = [Turn("caption", "", explicit_caption(scene, self.sprites, rng))]
        turns += [question_turn(scene, self.sprites, rng) for _ in range(self.num_questions)]
        other = self.sampler.scene(index + 1)
        turns += [match_turn(scene, other, self.sprites, rng) for _ in range(self.num_matches)]
        pixels = render(scene, self.sprites, self.sampler.generator(index, purpose=1))
        return ImageExample(pixels, tuple(turns), self._cover(scene, index))

    def _cover(self, scene: Scene, index: int) -> tuple[str, ...]:
        names = [self.sprites[entity.sprite_id].name for entity in scene.entities]
        cover = coverage(scene, self.sampler.generator(index, purpose=1), GRID)
        return tuple("" if number < 0 else names[number] for number in cover.flat)

    def text_turn(self, index: int) -> Turn:
        """One text-only turn: restate a caption, resolve clues, or answer a clue question."""
        rng = self.sampler.generator(index, purpose=3)
        scene = self.sampler.scene(index)
        kind = rng.random()
        target = explicit_caption(scene, self.sprites, rng)
        if kind < 0.4:
            return Turn("restate", explicit_caption(scene, self.sprites, rng), target)
        if kind < 0.8:
            return Turn("restate", knowledge_caption(scene, self.sprites, rng)[0], target)
        return clue_turn(self.sprites[scene.entities[0].sprite_id], rng)


def clue_turn(sprite: Sprite, rng: Generator) -> Turn:
    """Ask "which is the animal that barks?" -> "a dog", or the other way round."""
    clue = sprite.clues[int(rng.integers(len(sprite.clues)))].text
    if rng.random() < 0.7:
        return Turn("clue", f"which is {clue}?", sprite.name)
    return Turn("clue", f"what is known of a {sprite.name}?", clue)


def question_turn(scene: Scene, sprites: dict[str, Sprite], rng: Generator) -> Turn:
    """A question about counts, background, presence or, for most scenes with several kinds, positions.

    Positions get the larger share because they are learned last: a model that says objects and counts
    already lowers every loss, and one that never asks where things stand stays there.
    """
    if scene.relation is not None and rng.random() < 0.75:
        return _position_turn(scene, sprites, rng)
    entity = scene.entities[int(rng.integers(len(scene.entities)))]
    kind = int(rng.integers(3))
    if kind == 0:
        question = f"how many {sprites[entity.sprite_id].plural}?"
        return Turn("question", question, COUNT_WORDS[entity.count])
    if kind == 1:
        return Turn("question", "which background?", scene.background)
    return _presence_turn(scene, sprites, rng)


def _presence_turn(scene: Scene, sprites: dict[str, Sprite], rng: Generator) -> Turn:
    present = bool(rng.random() < 0.5)
    if present:
        sprite_id = scene.entities[int(rng.integers(len(scene.entities)))].sprite_id
    else:
        absent = [s.id for s in sprites.values() if not s.held_out and s.id not in scene.sprite_ids]
        sprite_id = absent[int(rng.integers(len(absent)))]
    return Turn("question", f"is there a {sprites[sprite_id].name}?", "yes" if present else "no")


def _position_turn(scene: Scene, sprites: dict[str, Sprite], rng: Generator) -> Turn:
    """Whether things stand as said, what stands beside an object, where one stands, or what stands in a place."""
    kind = int(rng.integers(6))
    if kind < 3:
        return _arrangement_turn(scene, sprites, rng)
    if kind == 3:
        return _neighbour_turn(scene, sprites, rng)
    position = int(rng.integers(len(scene.entities)))
    entity, place = scene.entities[position], _places(scene)[position]
    sprite = sprites[entity.sprite_id]
    if kind == 4:
        return Turn("question", f"where is {sprite.name}?", place)
    return Turn("question", f"what is {place}?", noun_phrase(entity, sprite))


def _arrangement_turn(scene: Scene, sprites: dict[str, Sprite], rng: Generator) -> Turn:
    """A match prompt in short: the words of a caption, and only the arrangement may be wrong."""
    true = bool(rng.random() < 0.5)
    described = scene if true else _one_of(arrangement_variants(scene), rng)
    question = f"{explicit_arrangement(described, sprites, rng)}?"
    return Turn("question", question, "yes" if true else "no")


def _neighbour_turn(scene: Scene, sprites: dict[str, Sprite], rng: Generator) -> Turn:
    """What stands on one side of an object of the pair: the other one, or nothing; only the side decides."""
    assert scene.relation is not None
    position, side = int(rng.integers(2)), int(rng.integers(2))
    name = sprites[scene.entities[position].sprite_id].name
    other = scene.entities[1 - position]
    # before the second stands the first, after the first the second
    found = noun_phrase(other, sprites[other.sprite_id]) if position != side else "nothing"
    return Turn("question", f"what is {_SIDES[scene.relation][side]} of {name}?", found)


def _places(scene: Scene) -> list[str]:
    """Words for the place of each kind in the picture, such as ["left", "right"] or ["above left", ..., "below"]."""
    assert scene.relation is not None
    pair = list(_SIDES[scene.relation])
    if len(scene.entities) == 2:
        return pair
    before, after = _SIDES[_CROSSING[scene.relation]]
    of_third, of_pair = (before, after) if scene.third_first else (after, before)
    return [*(f"{of_pair} {side}" for side in pair), of_third]


def match_turn(scene: Scene, other: Scene, sprites: dict[str, Sprite], rng: Generator) -> Turn:
    """A match prompt: half of them true, the others near misses of every kind.

    The caption, which names its objects or gives only clues, is the scene's own, or that of the same
    objects standing otherwise, or in other amounts, of the scene with one object exchanged (what a
    coarse search brings up most), or of an unrelated scene.
    """
    draw = rng.random()
    if draw < 0.5:
        described = scene
    elif draw < 0.82 and scene.relation is not None:
        described = _one_of(arrangement_variants(scene), rng)
    elif draw < 0.91:
        described = _one_of(amount_variants(scene), rng)
    elif draw < 0.98:
        described = with_other_object(scene, sprites, rng)
    else:
        described = other
    caption = _knowledge_words if rng.random() < 0.35 else explicit_caption
    return framed_match(described, described == scene, sprites, rng, caption)


def _one_of(scenes: list[Scene], rng: Generator) -> Scene:
    return scenes[int(rng.integers(len(scenes)))]


def _knowledge_words(scene: Scene, sprites: dict[str, Sprite], rng: Generator) -> str:
    return knowledge_caption(scene, sprites, rng)[0]


def framed_match(
    described: Scene,
    matches: bool,
    sprites: dict[str, Sprite],
    rng: Generator,
    caption: Callable[[Scene, dict[str, Sprite], Generator], str],
) -> Turn:
    """A match prompt in one of the scorer's own framings, so that training and scoring use the same words."""
    framing = FRAMINGS["true_false" if rng.random() < 0.5 else "mcq"]
    answer = framing.positive if matches else framing.negative
    return Turn("match", framing.question(caption(described, sprites, rng)), answer)
