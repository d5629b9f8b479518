"""Corpora and recipes of the embedding benchmarks."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.loading import backbone_of, untrained_latents
from pipelines.recipe import Recipe
from slq.arrow import ITEMS
from slq.artifacts import save_adapter
from slq.benchmarks.scenes import ScenesConfig, write_scenes

_GROUP_ROWS = 4096
_SENTENCE = "red fox left of two big bees on a grey purple castle above the sleepy river"
WORDS = _SENTENCE.split(" ")


def write_images(folder: Path, count: int) -> Path:
    """A Parquet file of `count` scenes under ids of their own; 256 different ones."""
    scenes = ScenesConfig(train=8, test=256, unseen=4, seed=11)
    write_scenes(folder / "scenes", scenes)
    rows = pq.read_table(folder / "scenes" / "gallery.parquet", columns=["image"])
    images = rows["image"].to_pylist()[:256]
    path = folder / f"images-{count}.parquet"
    with pq.ParquetWriter(path, ITEMS) as writer:
        for start in range(0, count, _GROUP_ROWS):
            numbers = range(start, min(start + _GROUP_ROWS, count))
            table = {
                "id": [f"i{n}" for n in numbers],
                "image": [images[n % len(images)] for n in numbers],
                "text": pa.nulls(len(numbers), pa.string()),
            }
            writer.write_table(pa.table(table, schema=ITEMS))
    return path


def write_texts(folder: Path, count: int, *, seed: int = 3) -> Path:
    """A Parquet file of `count` texts with the lengths of web alt texts: log-normal about 12 words."""
    rng = np.random.default_rng(seed)
    path = folder / f"texts-{count}.parquet"
    with pq.ParquetWriter(path, ITEMS) as writer:
        for start in range(0, count, _GROUP_ROWS):
            numbers = range(start, min(start + _GROUP_ROWS, count))
            table = {
                "id": [f"t{n}" for n in numbers],
                "image": pa.nulls(len(numbers), pa.binary()),
                "text": [alt_text(rng) for _ in numbers],
            }
            writer.write_table(pa.table(table, schema=ITEMS))
    return path


def alt_text(rng: np.random.Generator) -> str:
    """One text of 1 to 100 words."""
    length = int(np.clip(np.exp(rng.normal(2.5, 0.7)), 1, 100))
    return " ".join(WORDS[int(n)] for n in rng.integers(0, len(WORDS), length))


def recipe_for(folder: Path, corpus: Path, name: str, **embed: Any) -> Recipe:
    """A recipe over a corpus, with an untrained adapter of the tiny backbone in its own run folder."""
    workers = embed.pop("workers", 1)
    recipe = Recipe.model_validate(
        {
            "data": {"dir": str(folder), "corpus": str(corpus)},
            "embed": embed,
            "resources": {"embed_workers": workers},
            "storage": {"dir": str(folder / name)},
        }
    )
    if not recipe.storage.adapter.is_dir():
        recipe.storage.dir.mkdir(parents=True, exist_ok=True)
        backbone = backbone_of(recipe)
        save_adapter(recipe.storage.adapter, backbone, untrained_latents(recipe, backbone))
    return recipe
