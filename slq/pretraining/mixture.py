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

from slq.scenes.captions import COUNT_WORDS, explicit_caption, knowledge_caption, noun_phrase
from slq.scenes.layout import Scene
from slq.scenes.rendering import render
from slq.scenes.sampling import SceneSampler, hard_variants, with_other_object
from slq.scenes.sprites import Sprite
from slq.scoring import FRAMINGS

Skill = Literal["caption", "question", "match", "restate", "clue"]
_OTHER_SIDE = {"left_of": ("left", "right"), "above": ("above", "below")}


@dataclass(frozen=True, slots=True)
class Turn:
    """One user message and its answer; for image turns the message follows the image."""

    skill: Skill
    user: str
    answer: str


@dataclass(frozen=True, slots=True)
class ImageExample:
    """A picture (96, 96, 3) uint8 and several independent turns about it."""

    pixels: NDArray[np.uint8]
    turns: tuple[Turn, ...]


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
        return ImageExample(pixels, tuple(turns))

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
    """A question about counts, background, presence or position."""
    entity = scene.entities[int(rng.integers(len(scene.entities)))]
    sprite = sprites[entity.sprite_id]
    kind = int(rng.integers(4 if scene.relation else 3))
    if kind == 0:
        return Turn("question", f"how many {sprite.plural}?", COUNT_WORDS[entity.count])
    if kind == 1:
        return Turn("question", "which background?", scene.background)
    if kind == 2:
        return _presence_turn(scene, sprites, rng)
    return _position_turn(scene, sprites, rng)


def _presence_turn(scene: Scene, sprites: dict[str, Sprite], rng: Generator) -> Turn:
    present = bool(rng.random() < 0.5)
    if present:
        sprite_id = scene.entities[int(rng.integers(len(scene.entities)))].sprite_id
    else:
        absent = [s.id for s in sprites.values() if not s.held_out and s.id not in scene.sprite_ids]
        sprite_id = absent[int(rng.integers(len(absent)))]
    return Turn("question", f"is there a {sprites[sprite_id].name}?", "yes" if present else "no")


def _position_turn(scene: Scene, sprites: dict[str, Sprite], rng: Generator) -> Turn:
    assert scene.relation is not None
    first, second = scene.entities[:2]
    before, after = _OTHER_SIDE[scene.relation]
    if rng.random() < 0.5:
        question = f"what is {after} of {sprites[first.sprite_id].name}?"
        return Turn("question", question, noun_phrase(second, sprites[second.sprite_id]))
    question = f"what is {before} of {sprites[second.sprite_id].name}?"
    return Turn("question", question, noun_phrase(first, sprites[first.sprite_id]))


def match_turn(scene: Scene, other: Scene, sprites: dict[str, Sprite], rng: Generator) -> Turn:
    """A match prompt: half of them true, the others near misses of every kind.

    The caption is the scene's own, or that of a hard variant, of the scene with one object
    exchanged (what a coarse search brings up most), or of an unrelated scene.
    """
    draw = rng.random()
    if draw < 0.5:
        described = scene
    elif draw < 0.78:
        variants = hard_variants(scene)
        described = variants[int(rng.integers(len(variants)))]
    elif draw < 0.95:
        described = with_other_object(scene, sprites, rng)
    else:
        described = other
    return framed_match(described, described == scene, sprites, rng, explicit_caption)


def framed_match(
    described: Scene,
    matches: bool,
    sprites: dict[str, Sprite],
    rng: Generator,
    caption: Callable[[Scene, dict[str, Sprite], Generator], str],
) -> Turn:
    """A match prompt in one of the scorer's own framings, so that training and scoring use the same words."""
    framing = FRAMINGS["true_false" if rng.random() < 0.5 else "mcq"]
    answer = framing.positive[0] if matches else framing.negative[0]
    return Turn("match", framing.question(caption(described, sprites, rng)), answer)
