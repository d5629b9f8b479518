"""Writes the shipped scenes as the files that stages read: training pairs, a gallery, queries and relevance.

The gallery is made of groups that share objects and background and differ in one relation, count or size. They are
the hard subset: a coarse embedding easily takes one for the other.
"""

import hashlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from slq.arrow import ITEMS, PAIRS, RELEVANCE
from slq.config import Section
from slq.errors import StorageError
from slq.scenes import (
    CLUE_CATEGORIES,
    Scene,
    SceneSampler,
    explicit_caption,
    hard_variants,
    knowledge_caption,
    load_sprites,
    render_png,
)
from slq.scenes.sampling import Split

_ROWS_PER_GROUP = 1024
_GALLERY_SEED_OFFSET = 1000
_GENERATOR_VERSION = (
    1  # raise it when captions or drawing change, so that files of an older one are made anew
)
_FILES = ("train.parquet", "gallery.parquet", "queries.parquet", "relevance.parquet")


class ScenesConfig(Section):
    """How many scenes to generate; ignored for users' own files."""

    train: Annotated[int, Field(ge=2)] = 3072
    """Training pairs, one caption each."""
    test: Annotated[int, Field(ge=4)] = 512
    """Gallery scenes of held-out combinations, one query of each kind per scene."""
    unseen: Annotated[int, Field(ge=0)] = 128
    """Gallery scenes with objects that occur in no training data."""
    hard_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the gallery that stands in groups of two hard variants."""
    seed: int = 7


QUERIES = pa.schema(
    [
        *ITEMS,
        ("kind", pa.string()),
        ("category", pa.string()),
        ("hard", pa.bool_()),
        ("split", pa.string()),
    ]
)


def write_scenes(folder: Path, config: ScenesConfig) -> None:
    """Write `train.parquet`, `gallery.parquet`, `queries.parquet` and `relevance.parquet`; does nothing twice.

    Raises:
        StorageError: The files cannot be written.
    """
    marker = folder / "scenes.json"
    recorded = json.dumps({"generator": _generator(), **config.model_dump()}, sort_keys=True)
    try:
        complete = all((folder / name).is_file() for name in _FILES)
        if complete and marker.is_file() and marker.read_text() == recorded:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "train.parquet", PAIRS, training_pairs(config))
        gallery = list(gallery_scenes(config))
        _write(folder / "gallery.parquet", ITEMS, _gallery_rows(gallery))
        _write(folder / "queries.parquet", QUERIES, _query_rows(gallery))
        _write(folder / "relevance.parquet", RELEVANCE, _relevance_rows(gallery))
        marker.write_text(recorded)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error}; free space or choose another folder"
        ) from None


def _generator() -> str:
    """What the files depend on beside their settings."""
    sprites = resources.files("slq.scenes").joinpath("sprites.parquet").read_bytes()
    return f"{_GENERATOR_VERSION}-{hashlib.sha256(sprites).hexdigest()[:12]}"


def training_pairs(config: ScenesConfig) -> Iterator[dict[str, Any]]:
    """Rows of the training file."""
    sampler = SceneSampler("train", config.seed, load_sprites())
    for index, scene in sampler.distinct(config.train):
        yield {
            "id": f"train-{index:07d}",
            "image": render_png(scene, sampler.sprites, sampler.generator(index, 1)),
            "text": explicit_caption(scene, sampler.sprites, sampler.generator(index, 2)),
        }


class GalleryScene:
    """One gallery scene with the sampler that words and draws it."""

    def __init__(self, number: int, scene: Scene, sampler: SceneSampler, hard: bool) -> None:
        self.id = f"{sampler.split}-{number:05d}"
        self.number = number
        self.scene = scene
        self.sampler = sampler
        self.hard = hard


def gallery_scenes(config: ScenesConfig) -> Iterator[GalleryScene]:
    """Scenes of the gallery with pairwise different meaning."""
    sprites = load_sprites()
    splits: tuple[tuple[Split, int], ...] = (("test", config.test), ("unseen", config.unseen))
    for split, count in splits:
        if count:
            sampler = SceneSampler(split, config.seed + _GALLERY_SEED_OFFSET, sprites)
            yield from _grouped(sampler, count, config.hard_share)


def _grouped(sampler: SceneSampler, count: int, hard_share: float) -> Iterator[GalleryScene]:
    seen: set[Scene] = set()
    hard_count = int(count * hard_share) // 2 * 2
    number = 0
    for index, scene in sampler.distinct(10 * count):
        if number == count:
            return
        if scene in seen:
            continue
        variants = [variant for variant in hard_variants(scene) if variant not in seen]
        group = [scene]
        if number < hard_count and variants:
            group.append(variants[int(sampler.generator(index, 4).integers(len(variants)))])
        for member in group:
            seen.add(member)
            yield GalleryScene(number, member, sampler, hard=len(group) == 2)
            number += 1


def _gallery_rows(gallery: list[GalleryScene]) -> Iterator[dict[str, Any]]:
    for entry in gallery:
        rng = entry.sampler.generator(entry.number, 11)
        yield {
            "id": entry.id,
            "image": render_png(entry.scene, entry.sampler.sprites, rng),
            "text": None,
        }


def _query_rows(gallery: list[GalleryScene]) -> Iterator[dict[str, Any]]:
    for entry in gallery:
        rng = entry.sampler.generator(entry.number, 12)
        wanted = CLUE_CATEGORIES[entry.number % len(CLUE_CATEGORIES)]
        knowledge, category = knowledge_caption(entry.scene, entry.sampler.sprites, rng, wanted)
        explicit = explicit_caption(entry.scene, entry.sampler.sprites, rng)
        for kind, text, named in (("explicit", explicit, None), ("knowledge", knowledge, category)):
            yield {
                "id": f"{entry.id}-{kind}",
                "image": None,
                "text": text,
                "kind": kind,
                "category": named,
                "hard": entry.hard,
                "split": entry.sampler.split,
            }


def _relevance_rows(gallery: list[GalleryScene]) -> Iterator[dict[str, Any]]:
    for entry in gallery:
        for kind in ("explicit", "knowledge"):
            yield {"query_id": f"{entry.id}-{kind}", "item_id": entry.id, "grade": 1}


def _write(path: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> None:
    partial = path.with_name(path.name + ".partial")
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        block: list[dict[str, Any]] = []
        for row in rows:
            block.append(row)
            if len(block) == _ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(block, schema=schema))
                block = []
        if block:
            writer.write_table(pa.Table.from_pylist(block, schema=schema))
    partial.replace(path)
