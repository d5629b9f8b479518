"""The captions of a run, with the place of the image that each belongs to; planned once, a row group per shard."""

import io
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus import Record, corpus_of, open_corpus
from pipelines.recipe import Recipe, require_files
from pipelines.storage import Store
from slq.errors import ArtifactError, ArtifactMismatchError, ConfigError, DataError
from slq.files import file_sha256
from slq.karr.reasons import ERRORS

PLAN = "plan.parquet"
Row = dict[str, Any]
CAPTIONS = pa.schema(
    [
        ("row", pa.int64()),
        ("source_id", pa.string()),
        ("item_id", pa.string()),
        ("uri", pa.string()),
        ("caption", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""One caption each; `reason` is set where it is rejected before anything is asked, `detail` says more."""


def captions_path(recipe: Recipe) -> Path | None:
    """The table of captioned images, where the recipe names one."""
    path = recipe.karr.captions
    return path if path is None or path.is_absolute() else recipe.data.dir / path


def source_state(recipe: Recipe) -> dict[str, str]:
    """What the captions come from, and digests of it.

    Raises:
        ConfigError: A file is missing.
    """
    path = captions_path(recipe)
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"karr.captions: {path} does not exist")
        return {"captions_sha256": file_sha256(path)}
    require_files(recipe, "corpus", "queries", "relevance")
    files = {name: recipe.data.path(name) for name in ("queries", "relevance")}
    digests = {f"{name}_sha256": file_sha256(path) for name, path in files.items()}
    return {**digests, "corpus_state": corpus_of(recipe).digest()}


def captions(recipe: Recipe) -> list[Row]:
    """Every caption as a row of `CAPTIONS`, in the order of the source.

    Raises:
        ConfigError: A file is missing.
        DataError: An id stands there twice, a relevance names no item, or there is no caption at all.
        StorageError: A store cannot be read.
    """
    path = captions_path(recipe)
    rows = list(_of_pairs(recipe, path) if path is not None else _of_benchmark(recipe))
    if not rows:
        kinds = f" of kinds {', '.join(recipe.karr.kinds)}" if recipe.karr.kinds else ""
        raise DataError(f"{path or recipe.data.path('queries')} holds no caption{kinds}")
    twice = [name for name, count in Counter(row["source_id"] for row in rows).items() if count > 1]
    if twice:
        raise DataError(f"id {twice[0]!r} stands twice among the captions; ids must be unique")
    taken: Counter[str] = Counter()
    for number, row in enumerate(rows):
        row["row"] = number
        _leave_out_further(row, taken, recipe.karr.captions_per_image)
    return rows


def _leave_out_further(row: Row, taken: Counter[str], limit: int) -> None:
    """Reject a caption whose image has its captions already; count it otherwise."""
    if row["reason"] is None:
        taken[row["item_id"]] += 1
        if taken[row["item_id"]] > limit:
            row["reason"] = "further_caption"


def _row(source: Record, item_id: str, image: Record | None, **rejected: str) -> Row:
    """One caption; its image's problem, or an empty text, rejects it."""
    text = " ".join((source.text or "").split())
    row = {
        "source_id": source.id,
        "item_id": item_id,
        "uri": image.uri if image else None,
        "caption": text,
        "reason": None,
        "detail": "",
        **rejected,
    }
    if row["reason"] is None and not text:
        row["reason"] = "no_caption"
    if row["reason"] is None and image is not None and (image.problem or image.image is None):
        row["reason"] = "unreadable_image"
        row["detail"] = image.problem or "the row has no image"
    return row


def _of_pairs(recipe: Recipe, path: Path) -> Iterator[Row]:
    for record in open_corpus(path, retry_s=recipe.storage.retry_s).all_records():
        yield _row(record, str(record.columns.get("image_key") or record.id), record)


def _of_benchmark(recipe: Recipe) -> Iterator[Row]:
    images = {record.id: _light(record) for record in corpus_of(recipe).all_records()}
    answers: dict[str, list[str]] = {}
    for entry in pq.read_table(recipe.data.path("relevance")).to_pylist():
        if entry["grade"] > 0:
            answers.setdefault(entry["query_id"], []).append(entry["item_id"])
    kinds = recipe.karr.kinds
    for query in open_corpus(recipe.data.path("queries")).all_records():
        if kinds and query.columns.get("kind") not in kinds:
            continue
        found = answers.get(query.id, [])
        unknown = [name for name in found if name not in images]
        if unknown:
            raise DataError(
                f"{recipe.data.path('relevance')}: {query.id} -> {unknown[0]} names no item of the corpus"
            )
        if len(found) != 1 or query.image is not None:
            detail = f"{len(found)} images" if query.image is None else "the query has an image"
            yield _row(
                query, found[0] if found else "", None, reason="not_one_image", detail=detail
            )
            continue
        yield _row(query, found[0], images[found[0]])


def _light(record: Record) -> Record:
    """The record without its image's bytes: only whether there are any matters."""
    image = None if record.image is None else b""
    return Record(record.id, record.uri, image, None, {}, record.problem, record.reason)


def write_plan(store: Store, rows: list[Row], shard_rows: int) -> None:
    """Store the plan; where two drivers do, the first one's stays."""
    store.create(PLAN, _as_parquet(rows, shard_rows))


def _as_parquet(rows: list[Row], shard_rows: int) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=CAPTIONS)
    pq.write_table(table, sink, compression="zstd", row_group_size=shard_rows)
    return sink.getvalue()


def mend_plan(recipe: Recipe, store: Store) -> None:
    """Plan anew the captions whose image could not be read when it was planned, where it can be read by now.

    All others stay as they are planned, as shards of theirs may be committed. Errors as `captions`, and:

    Raises:
        ArtifactMismatchError: The source holds other captions by now.
    """
    planned = read_captions(store)
    if not any(row["reason"] in ERRORS for row in planned):
        return
    found = captions(recipe)
    taken = Counter(row["item_id"] for row in planned if row["reason"] is None)
    _require_same_captions(store, planned, found)
    for row, now in zip(planned, found, strict=True):
        if row["reason"] not in ERRORS or now["reason"] in ERRORS:
            continue
        if row["source_id"] == now["source_id"]:
            row.update(now)
            row["reason"] = None if now["reason"] == "further_caption" else now["reason"]
            _leave_out_further(row, taken, recipe.karr.captions_per_image)
    store.write(PLAN, _as_parquet(planned, recipe.karr.shard_rows))


def _require_same_captions(store: Store, planned: list[Row], found: list[Row]) -> None:
    """Check that the captions that could be read before stand where they stood.

    Raises:
        ArtifactMismatchError: They do not; the first is named.
    """
    for row, now in zip_longest(planned, found):
        if row is not None and now is not None:
            same = all(row[name] == now[name] for name in ("source_id", "item_id", "caption"))
            if same or row["reason"] in ERRORS:
                continue
        raise ArtifactMismatchError(
            f"the captions have changed since {store.location} was planned, first {(row or now)['source_id']!r}; "
            "--retry-errors takes up mended images of the same captions: put those back or use another folder"
        )


def planned_rows(store: Store) -> list[int]:
    """Captions of each shard.

    Raises:
        ArtifactError: The plan is missing or damaged.
    """
    try:
        with store.open(PLAN) as file:
            plan = pq.ParquetFile(file).metadata
            return [plan.row_group(group).num_rows for group in range(plan.num_row_groups)]
    except (FileNotFoundError, pa.ArrowException) as error:
        raise _damaged(store, error) from None


def read_captions(store: Store, shard_id: int | None = None) -> list[Row]:
    """The captions of one shard, or of all; errors as `planned_rows`."""
    try:
        with store.open(PLAN) as file:
            plan = pq.ParquetFile(file)
            table = plan.read() if shard_id is None else plan.read_row_group(shard_id)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise _damaged(store, error) from None
    rows: list[Row] = table.to_pylist()
    return rows


def _damaged(store: Store, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"the plan in {store.location} cannot be read: {error}; remove the folder and run `slq karr` again"
    )
