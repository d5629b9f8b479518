"""Offline embedding on Ray Data: read and check on CPU workers, decode and encode in an actor pool, commit by shard.

One block carries one shard from end to end, so a shard is the unit of retry and of commit. Images travel as their
encoded bytes; an encoder holds the pixels of one batch at a time. The driver sees one small record per finished shard
and nothing else.
"""

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import slq.errors
from pipelines.corpus import (
    Record,
    ShardPlan,
    corpus_state,
    plan_shards,
    read_shard,
    require_unchanged,
    rows_changed,
    state_digest,
    user_schema,
)
from pipelines.ledger import Commit, Ledger, attempt_path, new_attempt, sync_folder
from pipelines.loading import encoder_of, use_threads
from pipelines.progress import show
from pipelines.recipe import Recipe, require_files
from slq.arrow import ERRORS, embedding_schema
from slq.artifacts import load_adapter_config, require_same_fingerprint
from slq.encoder import batches_by_length
from slq.errors import ConfigError, DataError, MediaError, SlqError, StorageError
from slq.media import check_image, decode_image, sanitise_text
from slq.schema import Item

log = logging.getLogger(__name__)
_FAILURE = "slq_failure"
_ROWS = pa.schema(
    [
        ("shard_id", pa.int64()),
        ("row", pa.int64()),
        ("id", pa.string()),
        ("uri", pa.string()),
        ("text", pa.string()),
        ("image", pa.large_binary()),  # a shard may hold more than the 2 GiB of `binary`
        ("content_hash", pa.string()),
        ("error", pa.string()),
        ("message", pa.string()),
        ("columns", pa.binary()),
    ]
)
_ENCODED = pa.schema(
    [
        *(field for field in _ROWS if field.name != "image"),
        ("vector", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("stage", pa.string()),
    ]
)
_UNDECODED = Image.new("RGB", (1, 1))


def embed(recipe: Recipe) -> Path:
    """Embed the recipe's corpus; running it again finishes what is missing and touches nothing that is done.

    Returns:
        The embedding data set's folder.

    Raises:
        ArtifactMismatchError: The folder belongs to another adapter, corpus or plan.
        ConfigError: The cluster could not run the flow: Ray Data would stall without a word.
        DataError: More than `embed.max_error_share` of the items were quarantined.
        StorageError: The output cannot be written.
    """
    require_files(recipe, "corpus")
    corpus = recipe.data.path("corpus").resolve()
    adapter = load_adapter_config(recipe.storage.adapter)
    state = corpus_state(corpus)  # before the plan: what changes from here on is noticed at the end
    plans = plan_shards(corpus, recipe.embed.shard_rows)
    identity = {
        "fingerprint": adapter.fingerprint,
        "corpus": str(corpus),
        "corpus_digest": state_digest(state),
        "shard_rows": recipe.embed.shard_rows,
        "batch_size": recipe.embed.batch_size,
    }
    with Ledger(recipe.storage.embeddings) as ledger:
        ledger.begin(identity)
        done = ledger.commits()
        pending = [plan for plan in plans if plan.shard_id not in done]
        if not pending and ledger.manifest() is not None:
            log.info("%s is complete: %d shards, nothing to do", ledger.root, len(done))
            return ledger.root
        if pending:
            _run(recipe, ledger, pending, total=len(plans))
        require_unchanged(corpus, state, plans)
        commits = ledger.require_complete(len(plans))
        require_planned_rows(plans, commits)
        _finish(recipe, ledger, commits, {**identity, "dimension": adapter.hidden_size})
    return recipe.storage.embeddings


def require_planned_rows(plans: Sequence[ShardPlan], commits: Mapping[int, Commit]) -> None:
    """Check that each shard accounts for every planned row.

    Raises:
        DataError: Rows were lost or came twice; the shard is named.
    """
    for plan in plans:
        commit = commits[plan.shard_id]
        if commit.rows + commit.quarantined != plan.num_rows:
            raise rows_changed(plan, commit.rows + commit.quarantined)


def _finish(
    recipe: Recipe, ledger: Ledger, commits: Mapping[int, Commit], manifest: dict[str, Any]
) -> None:
    """Judge the share of quarantined items, then write card and manifest."""
    rows = sum(commit.rows for commit in commits.values())
    quarantined = sum(commit.quarantined for commit in commits.values())
    share = quarantined / (rows + quarantined)
    if share > recipe.embed.max_error_share:
        raise DataError(
            f"{quarantined} of {rows + quarantined} items ({share:.1%}) were quarantined, more than "
            f"embed.max_error_share allows ({recipe.embed.max_error_share:.1%}); see {ledger.root / 'errors'}"
        )
    ledger.sweep()
    (ledger.root / "README.md").write_text(_card(manifest, rows, quarantined))
    counts = {"num_shards": len(commits), "num_rows": rows, "num_quarantined": quarantined}
    ledger.finish({**manifest, **counts})
    log.info(
        "%s: %d rows in %d shards, %d quarantined", ledger.root, rows, len(commits), quarantined
    )


def _run(recipe: Recipe, ledger: Ledger, pending: list[ShardPlan], *, total: int) -> None:
    """The flow itself: the only place of this module that knows Ray Data."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    workers = min(recipe.resources.embed_workers, len(pending))
    require_free_cpu(
        ray.cluster_resources().get("CPU", 0), workers, recipe.resources.gpus_per_worker
    )
    context = DataContext.get_current()
    context.target_max_block_size = None  # a shard is never split over blocks
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    gpus = recipe.resources.gpus_per_worker
    plans = [{**asdict(plan), "paths": list(plan.paths)} for plan in pending]
    dataset = (
        ray.data.from_items(plans, override_num_blocks=len(plans))
        .map_batches(read_and_check, batch_size=None, batch_format="pyarrow")
        .map_batches(
            EncodeShard,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_kwargs={
                "recipe": recipe.model_dump(mode="json"),
                "fingerprint": load_adapter_config(recipe.storage.adapter).fingerprint,
            },
            compute=ActorPoolStrategy(size=workers),
            num_cpus=0 if gpus else 1,
            num_gpus=gpus or None,
        )
        .map_batches(
            write_shard,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={
                "root": str(ledger.root.resolve()),
                "dimension": load_adapter_config(recipe.storage.adapter).hidden_size,
                "user_schema": user_schema(recipe.data.path("corpus")).serialize().to_pybytes(),
            },
        )
    )
    _commit_as_they_come(dataset.iter_rows(), ledger, total=total, pending=len(pending))


def _failure(error: SlqError) -> pa.Table:
    """An error of ours as a record: raised in a worker, it would reach the driver as text of Ray's."""
    return pa.table({_FAILURE: [json.dumps([type(error).__name__, str(error)])]})


def _raise_failure(record: dict[str, Any]) -> None:
    """Raise what `_failure` recorded.

    Raises:
        SlqError: Of the class and with the message that it had in the worker.
    """
    if record.get(_FAILURE):
        name, message = json.loads(record[_FAILURE])
        kind: type[SlqError] = getattr(slq.errors, name)
        raise kind(message)


def _commit_as_they_come(
    records: Iterable[dict[str, Any]], ledger: Ledger, *, total: int, pending: int
) -> None:
    """Commit each finished shard and say how far the run is."""
    started, finished, rows = time.monotonic(), total - pending, 0
    for record in records:
        _raise_failure(record)
        commit = Commit(**record)
        ledger.commit(commit)
        finished, rows = finished + 1, rows + commit.rows
        elapsed = time.monotonic() - started
        left = elapsed / (finished - (total - pending)) * (total - finished)
        show(
            f"embed shard {finished}/{total}  {rows} rows  {rows / elapsed:.0f} rows/s  "
            f"quarantined {commit.quarantined}  ETA {left:.0f} s"
        )


def require_free_cpu(num_cpus: float, workers: int, gpus_per_worker: float) -> None:
    """Refuse actor pools that would hold every CPU: Ray Data 2.60 then waits forever, without an error.

    Raises:
        ConfigError: No CPU would be left for reading and writing.
    """
    if not gpus_per_worker and workers >= num_cpus:
        raise ConfigError(
            f"resources.embed_workers is {workers}, but the cluster has {num_cpus:g} CPUs and reading needs one; "
            f"set it to at most {max(1, int(num_cpus) - 1)}"
        )


def read_and_check(plan_rows: pa.Table) -> pa.Table:
    """Read one shard and check its items as far as headers tell; a bad item keeps its row and carries its reason.

    Returns:
        The rows in order, with images as encoded bytes; or the failure of the shard.
    """
    try:
        rows = [
            {"shard_id": plan["shard_id"], "row": number, **_checked(record)}
            for plan in plan_rows.to_pylist()
            for number, record in enumerate(
                read_shard(ShardPlan(**{**plan, "paths": tuple(plan["paths"])}))
            )
        ]
    except SlqError as error:
        return _failure(error)
    return pa.Table.from_pylist(rows, schema=_ROWS)


def _checked(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": record.id,
        "uri": record.uri,
        "text": record.text,
        "image": record.image,
        "content_hash": _content_hash(record),
        "error": None,
        "message": None,
        "columns": pa_json(record.columns),
    }
    if record.problem is not None:
        return row | {"error": record.reason, "message": record.problem}
    try:
        if record.image is not None:
            check_image(record.image)
        elif not _has_text(record.text):
            row |= {"error": "empty", "message": "the item has neither an image nor a text"}
        if _has_text(record.text):
            sanitise_text(record.text or "", ())
    except MediaError as error:
        row |= {"image": None, "error": error.reason, "message": str(error)}
    return row


def _has_text(text: str | None) -> bool:
    """Whether anything is left of a text without blanks and NULs."""
    return bool((text or "").replace("\x00", " ").strip())


def _content_hash(record: Record) -> str:
    digest = hashlib.sha256(record.image or b"")
    digest.update(b"\x00" + (record.text or "").encode("utf-8", "replace"))
    return digest.hexdigest()


def pa_json(columns: dict[str, Any]) -> bytes:
    """User columns of one row as Arrow IPC bytes, so that their types survive blocks of mixed rows."""
    buffer = io.BytesIO()
    table = pa.Table.from_pylist([columns]) if columns else pa.table({})
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


class EncodeShard:
    """An encoder actor: loads the adapter once, then turns shards of encoded images and texts into vectors.

    Args:
        recipe: The recipe as plain data; weights are loaded here, never shipped through the object store.
        fingerprint: What the data set is to be made with; another backbone type or revision gives another one.
    """

    def __init__(self, recipe: dict[str, Any], fingerprint: str) -> None:
        self._recipe = Recipe.model_validate(recipe)
        use_threads(self._recipe.embed.num_threads)
        self._refusal: SlqError | None = None
        try:
            self._encoder = encoder_of(self._recipe)
            require_same_fingerprint(
                fingerprint,
                self._encoder.fingerprint,
                expected_in=f"adapter {self._recipe.storage.adapter}",
                found_in="the encoder of this recipe",
                remedy="use the backbone name, revision and dtype that the adapter was trained with",
            )
        except SlqError as error:
            self._refusal = error  # a constructor that raises only kills its actor

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Replace images by vectors and sizes; quarantined rows get none."""
        if _FAILURE in rows.column_names:
            return rows
        if self._refusal is not None:
            return _failure(self._refusal)
        images = rows["image"]
        records = rows.drop_columns(["image"]).to_pylist()
        for row in records:
            row |= {"vector": None, "width": None, "height": None, "stage": "decode"}
        good = [n for n, row in enumerate(records) if row["error"] is None]
        kinds = [_kind(records[n], has_image=images[n].is_valid) for n in good]
        for chunk in batches_by_length(kinds, self._recipe.embed.batch_size):
            numbers = [good[position] for position in chunk]
            decoded = {n: _item(records[n], images[n].as_py()) for n in numbers}
            self._encode(
                [(records[n], item) for n, item in decoded.items() if isinstance(item, Item)]
            )
        return pa.Table.from_pylist(records, schema=_ENCODED)

    def _encode(self, batch: Sequence[tuple[dict[str, Any], Item]]) -> None:
        """Give each row its vector; a row that the model refuses is found by halving the batch, and set aside."""
        if not batch:
            return
        try:
            vectors = self._encoder.encode([item for _, item in batch], batch_size=len(batch))
        except (ValueError, RuntimeError, DataError) as error:
            self._require_health(error)
            if len(batch) > 1:
                self._encode(batch[: len(batch) // 2])
                self._encode(batch[len(batch) // 2 :])
                return
            reason = error.reason if isinstance(error, MediaError) else "model_refused"
            batch[0][0].update(error=reason, message=str(error), stage="encode")
            return
        for (row, _), vector in zip(batch, vectors, strict=True):
            row["vector"] = vector.astype(np.float16).tobytes()

    def _require_health(self, error: Exception) -> None:
        """Raise `error` where no row is to blame: memory ran out, or the model fails on a plain word too."""
        import torch

        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise error
        try:
            self._encoder.encode(["probe"])
        except Exception:  # noqa: BLE001 - whatever it is now, the first error is the one to tell
            raise error from None


def _kind(row: dict[str, Any], *, has_image: bool) -> Item:
    """The row as far as batching cares, which looks at modality and text length only."""
    text = row["text"] if _has_text(row["text"]) else None
    return Item(id=row["id"], text=text, image=_UNDECODED if has_image else None)


def _item(row: dict[str, Any], image: bytes | None) -> Item | None:
    """The row with its image decoded; None, and the row carries the reason, where that fails."""
    text = row["text"] if _has_text(row["text"]) else None
    if image is None:
        return Item(id=row["id"], text=text)
    try:
        picture = decode_image(image)
    except MediaError as error:
        row.update(error=error.reason, message=str(error))
        return None
    row.update(width=picture.width, height=picture.height)
    return Item(id=row["id"], text=text, image=picture)


def write_shard(
    rows: pa.Table, root: str, dimension: int, user_schema: bytes | None = None
) -> pa.Table:
    """Write one shard's data and quarantine files; gives its commit record, or its failure, as one row."""
    if _FAILURE in rows.column_names:
        return rows
    try:
        return _write_shard(rows, root, dimension, user_schema)
    except SlqError as error:
        return _failure(error)


def _write_shard(rows: pa.Table, root: str, dimension: int, user_schema: bytes | None) -> pa.Table:
    ledger = Ledger(Path(root))
    records = rows.to_pylist()
    shard_id = int(records[0]["shard_id"])
    if any(row["shard_id"] != shard_id for row in records):
        raise DataError(f"shard {shard_id} arrived mixed with another; this is a bug in the flow")
    good = [row for row in records if row["error"] is None]
    bad = [row for row in records if row["error"] is not None]
    attempt, errors_sha256 = new_attempt(), None
    if bad:
        errors = [
            {key: row[key] for key in ("id", "uri", "stage", "error", "message")} for row in bad
        ]
        errors_sha256, _ = _write_attempt(
            ledger.errors_path(shard_id), pa.Table.from_pylist(errors, schema=ERRORS), attempt
        )
    sha256, size = _write_attempt(
        ledger.shard_path(shard_id),
        shard_table(good, shard_id, dimension, user_schema),
        attempt,
    )
    commit = Commit(shard_id, len(good), len(bad), sha256, size, attempt, errors_sha256)
    return pa.Table.from_pylist([asdict(commit)])


def shard_table(
    rows: list[dict[str, Any]], shard_id: int, dimension: int, user_schema: bytes | None = None
) -> pa.Table:
    """Encoded rows in the public schema of a shard.

    Args:
        rows: As `EncodeShard` gives them, quarantined ones left out.
        shard_id: Of the shard.
        dimension: Of the vectors; a shard without rows has the same schema as the others.
        user_schema: Serialised types of the user's columns, so that they are the same in every
            shard, also where a column is null throughout; inferred from the rows by default.
    """
    columns = [pa.ipc.open_stream(row["columns"]).read_all() for row in rows]
    user = pa.concat_tables(columns, promote_options="permissive") if columns else pa.table({})
    if user_schema is not None:
        schema = pa.ipc.read_schema(pa.py_buffer(user_schema))
        user = pa.Table.from_pylist(user.to_pylist(), schema=schema)
    fields = list(user.schema) if user.num_columns else []
    vectors = np.frombuffer(b"".join(row["vector"] for row in rows), dtype=np.float16)
    own: dict[str, Any] = {
        "id": [row["id"] for row in rows],
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors), dimension),
        "modality": [_modality(row) for row in rows],
        "uri": [row["uri"] for row in rows],
        "text": [row["text"] for row in rows],
        "width": [row["width"] for row in rows],
        "height": [row["height"] for row in rows],
        "content_hash": [row["content_hash"] for row in rows],
        "shard_id": [shard_id] * len(rows),
        "row_in_shard": list(range(len(rows))),
    }
    schema = embedding_schema(dimension, fields)
    return pa.table({**own, **{f.name: user[f.name] for f in fields}}, schema=schema)


def _modality(row: dict[str, Any]) -> str:
    if row["width"] is None:
        return "text"
    return "image+text" if _has_text(row["text"]) else "image"


def _write_attempt(final: Path, table: pa.Table, attempt: str) -> tuple[str, int]:
    """Write and flush an attempt's file, which the ledger may give its final name.

    Returns:
        sha256 and size in bytes, read back through the same handle: another driver may remove the file meanwhile.
    """
    partial = attempt_path(final, attempt)
    # No dictionary over vectors: it would only cost. Not BYTE_STREAM_SPLIT either, though it saves a
    # tenth: DuckDB 2.0 cannot read it on float16.
    plain = [name for name in table.column_names if name != "embedding"]
    try:
        with partial.open("w+b") as file:
            pq.write_table(table, file, compression="zstd", use_dictionary=plain)
            file.flush()
            os.fsync(file.fileno())
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        sync_folder(partial.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(
            f"{final} cannot be written: {error}; free space and run the same command again"
        ) from None
    return sha256, size


def _card(manifest: dict[str, Any], rows: int, quarantined: int) -> str:
    return f"""# Embeddings

{rows:,} vectors of dimension {manifest["dimension"]} (float16, unit norm),
{quarantined:,} items quarantined in `errors/`.
Read the shards named in `commits/`, for example with DuckDB:
`SELECT id, embedding FROM 'shards/*.parquet'`. Fingerprint: `{manifest["fingerprint"]}`.
"""
