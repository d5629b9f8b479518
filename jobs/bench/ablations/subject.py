"""What is measured on: scenes of the gallery that have a neighbour with the same objects, and coarse scores of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.benchmark import Benchmark, load_benchmark
from pipelines.loading import encoder_of, use_processors
from pipelines.recipe import Recipe
from slq.artifacts import ADAPTER_CONFIG
from slq.backbones import Backbone
from slq.benchmarks.scenes import gallery_scenes, write_scenes
from slq.errors import ArtifactError, ConfigError
from slq.media import pixels_sha256
from slq.schema import Item

KINDS = ("explicit", "knowledge")
_SPLIT = "test"  # objects that the backbone has seen, in combinations that it has not


@dataclass(frozen=True)
class Subject:
    """Queries of both kinds for hard scenes, the whole gallery, and what the coarse stage says.

    Attributes:
        backbone: Of the coarse stage, and of the fine stage.
        items: The gallery's images.
        queries: Captions: those of kind `explicit`, then those of kind `knowledge`, both in the order of the scenes.
        relevant: (queries, items) bool.
        coarse: (queries, items) float32 cosines.
        pairs: (pairs, 2) numbers of the scenes of a pair: of their explicit captions in `queries`.
        own: (queries,) number of each query's image in `items`.
        identity: What all of it depends on.
    """

    backbone: Backbone
    items: list[Item]
    queries: list[Item]
    relevant: NDArray[np.bool_]
    coarse: NDArray[np.float32]
    pairs: NDArray[np.int64]
    own: NDArray[np.int64]
    identity: Mapping[str, Any]

    def of_kind(self, kind: str) -> slice:
        """The queries of one of `KINDS`."""
        half = len(self.queries) // 2
        return slice(0, half) if kind == KINDS[0] else slice(half, None)

    def best(self, depth: int) -> NDArray[np.int64]:
        """(queries, depth) items by coarse score, the best first; of equals the first."""
        order: NDArray[np.int64] = np.argsort(-self.coarse, axis=1, kind="stable")[:, :depth]
        return order

    def candidates(self, depth: int) -> NDArray[np.int64]:
        """(queries * depth, 2) numbers of each query and its best items."""
        best = self.best(depth)
        rows = np.repeat(np.arange(len(best)), best.shape[1])
        return np.stack([rows, best.reshape(-1)], axis=1)

    def needed(self, depth: int) -> NDArray[np.int64]:
        """All pairs that a row of this depth reads; some stand there twice."""
        return np.concatenate([self.candidates(depth), self.within_pairs()])

    def within_pairs(self) -> NDArray[np.int64]:
        """(pairs * 4, 2): a query and an item, of image 0 and 1 with caption 0 and 1 of each hard pair."""
        captions = np.tile(self.pairs[:, None, :], (1, 2, 1))  # (pairs, image, caption)
        images = np.tile(self.own[self.pairs][:, :, None], (1, 1, 2))
        return np.stack([captions.reshape(-1), images.reshape(-1)], axis=1)


def hard_scenes(recipe: Recipe, most: int | None = None) -> list[str]:
    """Ids of the gallery's hard scenes; the two of a pair stand side by side.

    Args:
        recipe: Says which scenes there are.
        most: Of them, the first.

    Raises:
        ConfigError: The recipe has no scenes of ours, or the number is not an even one.
    """
    if recipe.data.scenes is None:
        raise ConfigError(
            "the ablations need pairs of scenes that differ in one thing; give a recipe with data.scenes"
        )
    if most is not None and (most < 2 or most % 2):
        raise ConfigError(f"--scenes {most} must be an even number, as hard scenes come in pairs")
    hard = [
        one
        for one in gallery_scenes(recipe.data.scenes)
        if one.hard and one.sampler.split == _SPLIT
    ][:most]
    if not hard:
        raise ConfigError(
            "there is no hard scene; raise data.scenes.hard_share or data.scenes.test"
        )
    for first, second in zip(hard[::2], hard[1::2], strict=True):
        assert first.scene.sprite_ids == second.scene.sprite_ids
    return [one.id for one in hard]


def require_adapter(recipe: Recipe) -> None:
    """Check that there is a trained adapter, before any work is done.

    Raises:
        ArtifactError: There is none.
    """
    folder = recipe.storage.adapter
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ArtifactError(
            f"{folder} holds no adapter, and the ablations re-rank what a trained one finds; run `slq demo`, or "
            "`slq train` with the same recipe and --set, first"
        )


def load_subject(recipe: Recipe, most: int | None = None) -> Subject:
    """Read or make the scenes, and embed them and their captions with the trained adapter.

    Args:
        recipe: Names scenes, backbone and the folder of the adapter.
        most: Hard scenes, the first of the gallery; all by default.

    Raises:
        ArtifactError: There is no trained adapter.
        ConfigError: As of `hard_scenes`.
    """
    scenes = hard_scenes(recipe, most)
    require_adapter(recipe)
    use_processors(recipe.eval.num_threads)
    assert recipe.data.scenes is not None
    write_scenes(recipe.data.dir, recipe.data.scenes)
    benchmark = load_benchmark(recipe)
    chosen = _rows(benchmark, [f"{scene}-{kind}" for kind in KINDS for scene in scenes])
    queries = [benchmark.queries[n] for n in chosen]
    relevant = benchmark.relevant[chosen]
    encoder = encoder_of(recipe)
    vectors = encoder.encode([*benchmark.items, *queries], batch_size=recipe.embed.batch_size)
    num_items = len(benchmark.items)
    return Subject(
        backbone=encoder.backbone,
        items=benchmark.items,
        queries=queries,
        relevant=relevant,
        coarse=vectors[num_items:] @ vectors[:num_items].T,
        pairs=np.arange(len(scenes)).reshape(-1, 2),
        own=relevant.argmax(axis=1),
        identity={
            "fingerprint": encoder.fingerprint,
            "items": [[item.id, _pixels(item)] for item in benchmark.items],
            "queries": [[query.id, query.text] for query in queries],
        },
    )


def _rows(benchmark: Benchmark, names: list[str]) -> list[int]:
    row = {query.id: n for n, query in enumerate(benchmark.queries)}
    return [row[name] for name in names]


def _pixels(item: Item) -> str:
    assert item.image is not None
    return pixels_sha256(item.image)
