"""The sprite pack: nameable objects with a picture, a plural, tags and knowledge clues.

The pictures are Noto emoji (Apache-2.0, see NOTICE), packed by `jobs/pack_sprites.py` into one Parquet file.
"""

import hashlib
import io
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

CLUE_CATEGORIES = (
    "tool_use",
    "spatial_context",
    "functional_relation",
    "cultural_symbolism",
    "encyclopaedic",
    "logic_mathematics",
)
"""The six categories of KARR-Bench (spec: SLQ, KARR-Bench figure 3b)."""

HELD_OUT_SHARE = 10  # one object in ten never occurs in training


@dataclass(frozen=True, slots=True)
class Clue:
    """A noun phrase that singles out one sprite without naming it."""

    category: str
    text: str


@dataclass(frozen=True, slots=True)
class Sprite:
    """One object that scenes are made of."""

    id: str
    name: str
    plural: str
    group: str
    tags: tuple[str, ...]
    clues: tuple[Clue, ...]
    png: bytes

    @property
    def held_out(self) -> bool:
        """Whether this object is kept out of every training split (a stable hash of its id)."""
        return hashlib.sha256(self.id.encode()).digest()[0] % HELD_OUT_SHARE == 0

    def rgba(self, size: int) -> NDArray[np.float32]:
        """The picture as (size, size, 4) float32 in 0..1, colours premultiplied by alpha."""
        return _rgba(self.png, size)


@cache
def _rgba(png: bytes, size: int) -> NDArray[np.float32]:
    picture = Image.open(io.BytesIO(png)).convert("RGBA").convert("RGBa")
    picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(picture, dtype=np.float32) / 255.0


@cache
def load_sprites() -> dict[str, Sprite]:
    """All shipped sprites by id, in file order."""
    with resources.files("slq.scenes").joinpath("sprites.parquet").open("rb") as file:
        rows = pq.read_table(file).to_pylist()
    return {row["id"]: _from_row(row) for row in rows}


def _from_row(row: dict[str, Any]) -> Sprite:
    return Sprite(
        id=row["id"],
        name=row["name"],
        plural=row["plural"],
        group=row["group"],
        tags=tuple(row["tags"]),
        clues=tuple(Clue(clue["category"], clue["text"]) for clue in row["clues"]),
        png=row["png"],
    )
