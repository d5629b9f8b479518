"""What a scene says, apart from how it is drawn or worded.

A scene has one to three kinds of objects on a coloured background. Two kinds stand `left_of` or `above` each other;
a third kind stands beside that pair on the other axis. The stored form is canonical: "a left of b" and "b right of a"
are the same scene, so two captions mean the same exactly when their scenes are equal.
"""

from dataclasses import dataclass
from typing import Literal

Relation = Literal["left_of", "above"]
Size = Literal["small", "big"]

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "grey": (170, 170, 170),
    "red": (240, 150, 150),
    "blue": (150, 190, 250),
    "green": (160, 225, 160),
    "yellow": (250, 240, 150),
    "purple": (205, 165, 240),
    "brown": (195, 160, 125),
}
"""Background colours, RGB 0..255."""


@dataclass(frozen=True, slots=True)
class Entity:
    """`count` copies of one sprite; only a single one can be called small or big."""

    sprite_id: str
    count: int = 1
    size: Size | None = None


@dataclass(frozen=True, slots=True)
class Scene:
    """The meaning of a scene.

    Attributes:
        entities: One to three kinds. With two or three, `entities[0]` is `relation` `entities[1]`.
        background: A key of `BACKGROUNDS`.
        relation: `left_of` or `above`; None for a single kind.
        third_first: With three kinds, whether the third stands above (or left of) the pair rather than below
            (or right of) it. Its axis is the one that `relation` does not use.
    """

    entities: tuple[Entity, ...]
    background: str
    relation: Relation | None = None
    third_first: bool = False

    @property
    def sprite_ids(self) -> tuple[str, ...]:
        """The kinds of objects, sorted: the combination that splits hold out."""
        return tuple(sorted(entity.sprite_id for entity in self.entities))
