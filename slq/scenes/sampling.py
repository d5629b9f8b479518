"""Random scenes, reproducible one by one, in splits that are disjoint by construction.

Scene `i` of a split depends only on (seed, split, i): a million scenes cost no memory, and any worker can make any of
them. The split of a scene follows from its objects alone: a hash of the combination of kinds decides between `train`,
`validation` and `test`, and a scene with any held-out object belongs to `unseen`. So no combination of objects occurs
in two splits, whatever the seeds.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.random import Generator

from slq.errors import ConfigError
from slq.scenes.layout import BACKGROUNDS, Entity, Relation, Scene, Size
from slq.scenes.sprites import Sprite

Split = Literal["train", "validation", "test", "unseen"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test", "unseen")
_MAX_COUNT = {
    1: 4,
    2: 3,
    3: 2,
}  # copies of one kind, by number of kinds: they must fit into their cell
_KINDS_SHARE = (0.15, 0.55, 0.30)  # one, two and three kinds


def split_of(sprite_ids: tuple[str, ...], sprites: dict[str, Sprite]) -> Split:
    """The only split in which this combination of kinds (sorted ids) may occur."""
    if any(sprites[sprite_id].held_out for sprite_id in sprite_ids):
        return "unseen"
    if len(sprite_ids) == 1:
        return "train"  # a single kind is no combination that could be held out
    bucket = hashlib.sha256("+".join(sprite_ids).encode()).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


@dataclass(frozen=True)
class SceneSampler:
    """An endless, random-access sequence of scenes of one split.

    Attributes:
        split: Which combinations of objects may occur.
        seed: Another seed gives other scenes of the same split.
        sprites: All sprites by id.
    """

    split: Split
    seed: int
    sprites: dict[str, Sprite]

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"split {self.split!r} is unknown; choose one of {', '.join(SPLITS)}")

    def generator(self, index: int, purpose: int = 0) -> Generator:
        """The random generator of scene `index`; `purpose` separates layout (0), drawing (1) and wording (2...)."""
        return np.random.default_rng([self.seed, SPLITS.index(self.split), index, purpose])

    def scene(self, index: int) -> Scene:
        """Scene `index`, by rejection until its combination belongs to the split."""
        rng = self.generator(index)
        ids = self._candidate_ids()
        while True:
            scene = _random_scene(ids, rng)
            if split_of(scene.sprite_ids, self.sprites) == self.split:
                return scene

    def distinct(self, count: int) -> Iterator[tuple[int, Scene]]:
        """The first `count` scenes with pairwise different meaning, as (index, scene)."""
        seen: set[Scene] = set()
        index = 0
        while len(seen) < count:
            scene = self.scene(index)
            if scene not in seen:
                seen.add(scene)
                yield index, scene
            index += 1

    def _candidate_ids(self) -> list[str]:
        if self.split == "unseen":
            return list(self.sprites)
        return [sprite_id for sprite_id, sprite in self.sprites.items() if not sprite.held_out]


def _random_scene(ids: list[str], rng: Generator) -> Scene:
    num_kinds = 1 + int(rng.choice(3, p=_KINDS_SHARE))
    chosen = rng.choice(len(ids), size=num_kinds, replace=False)
    entities = tuple(_random_entity(ids[int(i)], _MAX_COUNT[num_kinds], rng) for i in chosen)
    relation: Relation | None = None
    if num_kinds > 1:
        relation = "left_of" if rng.random() < 0.5 else "above"
    return Scene(
        entities=entities,
        background=list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))],
        relation=relation,
        third_first=num_kinds == 3 and bool(rng.random() < 0.5),
    )


def _random_entity(sprite_id: str, max_count: int, rng: Generator) -> Entity:
    count = 1 + int(rng.choice(max_count, p=_count_share(max_count)))
    size: Size | None = None
    if count == 1 and rng.random() < 0.4:
        size = "small" if rng.random() < 0.5 else "big"
    return Entity(sprite_id, count, size)


def _count_share(max_count: int) -> list[float]:
    return [0.5] + [0.5 / (max_count - 1)] * (max_count - 1)


def hard_variants(scene: Scene) -> list[Scene]:
    """Scenes with the same objects and background that differ in one relation, count or size.

    They are what a caption must be told apart from, so they serve as hard negatives of the match skill and as
    neighbours in the evaluation gallery.
    """
    return arrangement_variants(scene) + amount_variants(scene)


def arrangement_variants(scene: Scene) -> list[Scene]:
    """The same objects standing otherwise: the pair exchanged, or one relation changed; none for a single kind."""
    if scene.relation is None:
        return []
    first, second, *third = scene.entities
    exchanged = replace(scene, entities=(second, first, *third))
    if third:
        return [exchanged, replace(scene, third_first=not scene.third_first)]
    other: Relation = "above" if scene.relation == "left_of" else "left_of"
    return [exchanged, replace(scene, relation=other)]


def amount_variants(scene: Scene) -> list[Scene]:
    """The same objects in the same places, one of them in another count or size."""
    entities = scene.entities
    return [
        replace(scene, entities=(*entities[:position], changed, *entities[position + 1 :]))
        for position, entity in enumerate(entities)
        for changed in _changed(entity, _MAX_COUNT[len(entities)])
    ]


def with_other_object(scene: Scene, sprites: dict[str, Sprite], rng: Generator) -> Scene:
    """The scene with one kind of object exchanged for another, still inside the scene's split."""
    split = split_of(scene.sprite_ids, sprites)
    ids = list(sprites)
    while True:
        position = int(rng.integers(len(scene.entities)))
        sprite_id = ids[int(rng.integers(len(ids)))]
        changed = replace(scene.entities[position], sprite_id=sprite_id)
        entities = (*scene.entities[:position], changed, *scene.entities[position + 1 :])
        other = replace(scene, entities=entities)
        if sprite_id not in scene.sprite_ids and split_of(other.sprite_ids, sprites) == split:
            return other


def _changed(entity: Entity, max_count: int) -> list[Entity]:
    counts = [count for count in range(1, max_count + 1) if count != entity.count]
    changed = [Entity(entity.sprite_id, count) for count in counts]
    if entity.size is not None:
        changed.append(Entity(entity.sprite_id, 1, "big" if entity.size == "small" else "small"))
    return changed
