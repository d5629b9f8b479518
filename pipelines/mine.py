"""Mines hard negatives for training: the nearest wrong images of every caption, found with the recipe's own adapter.

Every image is embedded once, however many captions it has, and for the fine stage's margins an image's pairs stand
together, so that its prefix is computed once too. Vectors of captions go from task to task and never through the
driver.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.mining_tasks import (
    NONE,
    Asked,
    Gallery,
    Job,
    Mined,
    embed_part,
    score_part,
    search_part,
)
from pipelines.pairs import Pairs
from pipelines.recipe import Recipe, require_files
from pipelines.tasks import collect, model_task, parts
from slq.arrow import NEGATIVES
from slq.artifacts import load_adapter_config
from slq.errors import ConfigError, DataError, StorageError
from slq.index import build
from slq.training import Side

log = logging.getLogger(__name__)
_PART_ROWS = 4096  # of a task at most, so that progress shows and a lost task costs little


@dataclass(frozen=True)
class Embedded:
    """A task's vectors, by reference, of the pairs that could be read, and why the others could not."""

    vectors: Any
    numbers: NDArray[np.int64]
    lost: dict[int, str]


@dataclass(frozen=True)
class Layout:
    """How pairs and gallery rows belong together.

    Attributes:
        usable: (mined,) int64, the pairs that are mined, ascending.
        first: (rows,) int64, the first of those pairs for each gallery row.
        own: (pairs,) int64, the gallery row of each pair's query; -1 where it is not mined.
        images: (pairs,) int64 numbers of the image keys.
        right: By pair, for those that are mined, all images with the same text; its own image is among them.
    """

    usable: NDArray[np.int64]
    first: NDArray[np.int64]
    own: NDArray[np.int64]
    images: NDArray[np.int64]
    right: dict[int, frozenset[int]]


def plan(recipe: Recipe) -> dict[str, Any]:
    """What mining would do, without doing it.

    Raises:
        ConfigError: The training file is missing, or its pairs cannot be mined.
    """
    data, config = recipe.data, recipe.mine
    facts = {"depth": config.depth, "writes": str(data.path("negatives"))}
    if not data.path("train").exists():
        if data.scenes is not None:
            return {"pairs": data.scenes.train, "images": data.scenes.train, **facts}
        trains = data.benchmark is not None and data.benchmark.writes_train
        if data.karpathy is not None or data.mmeb is not None or trains:
            return {"pairs": "generated first", **facts}
    pairs = _minable_pairs(recipe)
    return {"pairs": len(pairs), "images": len(set(pairs.query_keys)), **facts}


def mine(recipe: Recipe) -> dict[str, Any]:
    """Write hard negatives of all training pairs that can be read; what an earlier run wrote is replaced.

    Returns:
        Counts, seconds and the file.

    Raises:
        ArtifactError: There is no adapter yet, or it belongs to another backbone.
        ConfigError: The pairs cannot be mined.
        DataError: Too many pairs cannot be read.
        StorageError: The file cannot be written, or the store of the images cannot be reached.
    """
    started = time.monotonic()
    job = Job(recipe.model_dump_json(), load_adapter_config(recipe.storage.adapter).fingerprint)
    pairs = _minable_pairs(recipe)
    images, captions, unreadable = _embed_both(recipe, job, pairs)
    layout = lay_out(pairs, unreadable)
    gallery = _gallery(layout, images, pairs.query_keys)
    found = _search(recipe, gallery, captions, layout)
    margins = _margins(recipe, job, gallery, layout, found) if recipe.mine.margins else None
    table = negatives_table(pairs.ids, gallery.pairs, layout.usable, found, margins)
    path = recipe.data.path("negatives")
    _write(path, table.replace_schema_metadata({"fingerprint": job.fingerprint}))
    present = found.rows != NONE
    log.info(
        "%s: %d negatives for %d pairs; %d candidates dropped as possible right answers, %d pairs unreadable",
        path,
        present.sum(),
        table.num_rows,
        found.num_doubtful,
        len(unreadable),
    )
    return {
        "pairs": table.num_rows,
        "images": len(gallery.pairs),
        "negatives_per_pair": float(present.sum(axis=1).mean()),
        "dropped_as_possible_answers": found.num_doubtful,
        "unreadable": len(unreadable),
        "seconds": round(time.monotonic() - started, 1),
        "fingerprint": job.fingerprint,
        "file": str(path),
    }


def _minable_pairs(recipe: Recipe) -> Pairs:
    """The training pairs, refused here if they would fail in a task or at the end."""
    require_files(recipe, "train")
    path = recipe.data.path("train")
    pairs = Pairs(path)
    if pairs.positive_texts is None:
        raise ConfigError(
            f"data.train: {path} has positives with images; `slq mine` searches with texts, so give pairs whose "
            "positives are texts"
        )
    if recipe.mine.margins and not pairs.queries_have_images:
        raise ConfigError(
            f"mine.margins: {path} has queries without an image, and the fine stage scores an image with a text; set "
            "mine.margins=false"
        )
    _require_own_ids(path, pairs.ids)
    num_images = len(set(pairs.query_keys))
    if recipe.index.kind == "ivf" and recipe.index.num_lists > num_images:
        raise ConfigError(
            f"index.num_lists is {recipe.index.num_lists}, but {path} has only {num_images} images; set index.kind=flat"
        )
    return pairs


def _require_own_ids(path: Path, ids: Sequence[str | None]) -> None:
    if not ids:
        raise DataError(f"{path} holds no pairs; there is nothing to mine")
    counts = Counter(ids)
    if None in counts or len(counts) < len(ids):
        name, count = (None, counts[None]) if None in counts else counts.most_common(1)[0]
        raise DataError(
            f"{path}: negatives are named by the id of their pair, so every pair needs one of its own; {name!r} stands "
            f"there {count} times"
        )


def _numbered(keys: Iterable[str]) -> NDArray[np.int64]:
    """Numbers for keys, in the order in which they first come."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)


def _embed_both(
    recipe: Recipe, job: Job, pairs: Pairs
) -> tuple[list[Embedded], list[Embedded], dict[int, str]]:
    """Distinct queries, all positives, and why pairs that lack one of the two cannot be mined.

    Raises:
        DataError: More pairs cannot be read than training would accept.
    """
    first = np.unique(_numbered(pairs.query_keys), return_index=True)[1]
    images = _embed(recipe, job, first, "query")
    lost = {pairs.query_keys[n]: why for part in images for n, why in part.lost.items()}
    unreadable = {n: lost[key] for n, key in enumerate(pairs.query_keys) if key in lost}
    _require_few(recipe, pairs, unreadable)
    captions = _embed(recipe, job, np.arange(len(pairs)), "positive")
    for part in captions:
        unreadable |= part.lost
    _require_few(recipe, pairs, unreadable)
    ids = pairs.ids
    for number, why in unreadable.items():
        log.warning("training pair %r is left out: %s", ids[number], why)
    return images, captions, unreadable


def _embed(recipe: Recipe, job: Job, numbers: NDArray[np.int64], side: Side) -> list[Embedded]:
    """One side of pairs, in parallel tasks."""
    gpus = recipe.resources.gpus_per_worker
    task = model_task(embed_part, gpus, num_returns=2)
    begun = [task.remote(job, numbers[part], side) for part in _slices(len(numbers))]
    what = "images" if side == "query" else "captions"
    told = collect([facts for _, facts in begun], f"mine embedded {what} part")
    return [Embedded(vectors, *facts) for (vectors, _), facts in zip(begun, told, strict=True)]


def _slices(count: int) -> list[slice]:
    return parts(count, max(8, -(-count // _PART_ROWS)))


def _require_few(recipe: Recipe, pairs: Pairs, unreadable: dict[int, str]) -> None:
    allowed = min(recipe.train.max_error_share * len(pairs), len(pairs) - 1)
    if len(unreadable) > allowed:
        number, reason = next(iter(unreadable.items()))
        raise DataError(
            f"{len(unreadable)} of {len(pairs)} training pairs cannot be read, first {pairs.ids[number]!r}: {reason}; "
            "mend them or raise train.max_error_share"
        )


def lay_out(pairs: Pairs, unreadable: Collection[int]) -> Layout:
    """Give each distinct query of the readable pairs a gallery row."""
    usable = np.array([n for n in range(len(pairs)) if n not in unreadable], dtype=np.int64)
    own = np.full(len(pairs), NONE)
    own[usable] = _numbered(pairs.query_keys[n] for n in usable)
    images = _numbered(pairs.image_keys)
    texts = pairs.positive_texts or []
    same: dict[str, set[int]] = defaultdict(set)
    for n in usable.tolist():
        same[texts[n]].add(int(images[n]))
    shared = {text: frozenset(found) for text, found in same.items()}
    return Layout(
        usable=usable,
        first=usable[np.unique(own[usable], return_index=True)[1]],
        own=own,
        images=images,
        right={n: shared[texts[n]] for n in usable.tolist()},
    )


def _gallery(layout: Layout, images: list[Embedded], query_keys: Sequence[str]) -> Gallery:
    """The gallery's vectors in the order of its rows."""
    import ray

    vectors = np.concatenate(ray.get([part.vectors for part in images]))
    numbers = np.concatenate([part.numbers for part in images])
    place = {query_keys[n]: at for at, n in enumerate(numbers)}
    chosen = [place[query_keys[n]] for n in layout.first]
    return Gallery(vectors[chosen], layout.first, layout.images[layout.first])


def _search(recipe: Recipe, gallery: Gallery, captions: list[Embedded], layout: Layout) -> Mined:
    """Negatives of all pairs that are mined, in parallel tasks; the vectors of captions go there by reference."""
    import ray

    task = ray.remote(num_cpus=1)(search_part)
    index, shared = ray.put(build(recipe.index, gallery.vectors)), ray.put(gallery)
    tasks = []
    for part in captions:
        places = np.flatnonzero(layout.own[part.numbers] != NONE)
        if len(places):
            numbers = part.numbers[places]
            right = [layout.right[n] for n in numbers.tolist()]
            asked = Asked(places, layout.own[numbers], right)
            tasks.append(task.remote(recipe.mine, index, shared, part.vectors, asked))
    found: list[Mined] = collect(tasks, "mine searched part")
    return Mined(
        np.concatenate([part.rows for part in found]),
        np.concatenate([part.similarities for part in found]),
        sum(part.num_doubtful for part in found),
    )


def _margins(
    recipe: Recipe, job: Job, gallery: Gallery, layout: Layout, found: Mined
) -> NDArray[np.float32]:
    """(mined, 1 + per_pair) margins of each caption with its own image and its negatives; NaN where there is none."""
    rows = np.concatenate([layout.own[layout.usable][:, None], found.rows], axis=1)
    at, column = np.nonzero(rows != NONE)
    order = np.argsort(rows[at, column], kind="stable")  # an image's pairs stand together
    at, column = at[order], column[order]
    images, captions = gallery.pairs[rows[at, column]], layout.usable[at]
    task = model_task(score_part, recipe.resources.gpus_per_worker)
    tasks = [task.remote(job, images[part], captions[part]) for part in _slices(len(at))]
    margins = np.full(rows.shape, np.nan, dtype=np.float32)
    margins[at, column] = np.concatenate(collect(tasks, "mine fine stage part"))
    return margins


def negatives_table(
    ids: Sequence[str | None],
    gallery_pairs: NDArray[np.int64],
    mined: NDArray[np.int64],
    found: Mined,
    margins: NDArray[np.float32] | None,
) -> pa.Table:
    """The file's content.

    Args:
        ids: Of all pairs.
        gallery_pairs: (rows,) int64, the pair that stands for each gallery row.
        mined: (mined,) int64, the pairs that `found` speaks of.
        found: Their negatives.
        margins: (mined, 1 + per_pair), or None.
    """
    names = pa.array(ids, pa.string())
    present = found.rows != NONE
    columns = [
        names.take(pa.array(mined)),
        _lists(names.take(pa.array(gallery_pairs[found.rows[present]])), present),
        _lists(pa.array(found.similarities[present]), present),
    ]
    if margins is None:
        columns.append(pa.nulls(len(mined), NEGATIVES.field("margins").type))
    else:
        scored = np.concatenate([np.ones((len(mined), 1), dtype=bool), present], axis=1)
        columns.append(_lists(pa.array(margins[scored]), scored))
    return pa.Table.from_arrays(columns, schema=NEGATIVES)


def _lists(values: pa.Array, present: NDArray[np.bool_]) -> pa.Array:
    """One list for each row, of as many values as are present there."""
    ends = np.cumsum(present.sum(axis=1), dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]), pa.int32()), values)


def _write(path: Path, table: pa.Table) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, partial, compression="zstd")
        partial.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error}; free space or set data.negatives to another place"
        ) from None
