"""Offline embedding on Ray Data: read and decode on CPU workers, encode in an actor pool, commit shard by shard.

One block carries one shard from end to end, so a shard is the unit of retry and of commit. The driver sees one small
record per finished shard and nothing else.
"""

import hashlib
import io
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import slq.errors
from pipelines.corpus import Record, ShardPlan, corpus_digest, plan_shards, read_shard, user_schema
from pipelines.ledger import Commit, Ledger, new_attempt
from pipelines.loading import encoder_of, use_threads
from pipelines.progress import show
from pipelines.recipe import Recipe, require_files
from slq.artifacts import file_sha256, load_adapter_config, require_same_fingerprint
from slq.errors import ConfigError, DataError, MediaError, SlqError, StorageError
from slq.media import decode_image, sanitise_text
from slq.schema import ERRORS, Item, embedding_schema

log = logging.getLogger(__name__)
_FAILURE = "slq_failure"


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
    ledger = Ledger(recipe.storage.embeddings)
    plans = plan_shards(corpus, recipe.embed.shard_rows)
    identity = {
        "fingerprint": adapter.fingerprint,
        "corpus": str(corpus),
        "corpus_digest": corpus_digest(corpus),
        "shard_rows": recipe.embed.shard_rows,
        "batch_size": recipe.embed.batch_size,
    }
    ledger.begin(identity)
    done = ledger.commits()
    pending = [plan for plan in plans if plan.shard_id not in done]
    if not pending and ledger.manifest() is not None:
        log.info("%s is complete: %d shards, nothing to do", ledger.root, len(done))
        return ledger.root
    if pending:
        _run(recipe, ledger, pending, total=len(plans))
    commits = ledger.commits()
    rows, quarantined = (
        sum(c.rows for c in commits.values()),
        sum(c.quarantined for c in commits.values()),
    )
    share = quarantined / (rows + quarantined)
    if share > recipe.embed.max_error_share:
        raise DataError(
            f"{quarantined} of {rows + quarantined} items ({share:.1%}) were quarantined, more than "
            f"embed.max_error_share allows ({recipe.embed.max_error_share:.1%}); see {ledger.root / 'errors'}"
        )
    (ledger.root / "README.md").write_text(_card(identity, adapter.hidden_size, rows, quarantined))
    manifest = {**identity, "dimension": adapter.hidden_size, "num_shards": len(plans)}
    ledger.finish({**manifest, "num_rows": rows, "num_quarantined": quarantined})
    log.info("%s: %d rows in %d shards, %d quarantined", ledger.root, rows, len(plans), quarantined)
    return ledger.root


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
    plans = [
        {"shard_id": p.shard_id, "source": p.source, "start": p.start, "stop": p.stop}
        for p in pending
    ]
    dataset = (
        ray.data.from_items(plans, override_num_blocks=len(plans))
        .map_batches(read_and_decode, batch_size=None, batch_format="pyarrow")
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


def read_and_decode(plan_rows: pa.Table) -> pa.Table:
    """Read one shard and decode its images to raw RGB; a bad item keeps its row and carries its reason."""
    plans = [ShardPlan(**row) for row in plan_rows.to_pylist()]
    rows = [
        {"shard_id": plan.shard_id, "row": number, **_decoded(record)}
        for plan in plans
        for number, record in enumerate(read_shard(plan))
    ]
    return pa.Table.from_pylist(rows)


def _decoded(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": record.id,
        "uri": record.uri,
        "text": record.text,
        "pixels": None,
        "width": None,
        "height": None,
        "content_hash": _content_hash(record),
        "error": None,
        "message": None,
        "columns": pa_json(record.columns),
    }
    if record.problem is not None:
        return row | {"error": "unreadable", "message": record.problem}
    try:
        if record.image is not None:
            image = decode_image(record.image)
            row |= {"pixels": image.tobytes(), "width": image.width, "height": image.height}
        elif not (record.text or "").strip():
            row |= {"error": "empty", "message": "the item has neither an image nor a text"}
        if record.text:
            sanitise_text(record.text, ())
    except MediaError as error:
        row |= {"pixels": None, "error": error.reason, "message": str(error)}
    return row


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
    """An encoder actor: loads the adapter once, then turns decoded shards into vectors.

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
        """Replace pixels by vectors; quarantined rows get none."""
        from PIL import Image

        if self._refusal is not None:
            return _failure(self._refusal)
        records = rows.to_pylist()
        good = [n for n, row in enumerate(records) if row["error"] is None]
        items = []
        for number in good:
            row = records[number]
            image = None
            if row["pixels"] is not None:
                image = Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"])
            items.append(Item(id=row["id"], text=row["text"], image=image))
        vectors = self._encoder.encode(items, batch_size=self._recipe.embed.batch_size)
        column: list[bytes | None] = [None] * len(records)
        for number, vector in zip(good, vectors, strict=True):
            column[number] = vector.astype(np.float16).tobytes()
        return rows.drop_columns(["pixels"]).append_column("vector", pa.array(column, pa.binary()))


def write_shard(rows: pa.Table, root: str, user_schema: bytes | None = None) -> pa.Table:
    """Write one shard's data and quarantine files; gives its commit record, or its failure, as one row."""
    if _FAILURE in rows.column_names:
        return rows
    try:
        return _write_shard(rows, root, user_schema)
    except SlqError as error:
        return _failure(error)


def _write_shard(rows: pa.Table, root: str, user_schema: bytes | None) -> pa.Table:
    ledger = Ledger(Path(root))
    records = rows.to_pylist()
    shard_id = int(records[0]["shard_id"])
    if any(row["shard_id"] != shard_id for row in records):
        raise DataError(f"shard {shard_id} arrived mixed with another; this is a bug in the flow")
    good = [row for row in records if row["error"] is None]
    bad = [row for row in records if row["error"] is not None]
    attempt = new_attempt()
    path = ledger.shard_path(shard_id)
    _write_parquet(path, shard_table(good, shard_id, user_schema), attempt)
    if bad:
        errors = [
            {**{key: row[key] for key in ("id", "uri", "error", "message")}, "stage": "decode"}
            for row in bad
        ]
        _write_parquet(
            ledger.errors_path(shard_id), pa.Table.from_pylist(errors, schema=ERRORS), attempt
        )
    return pa.Table.from_pylist(
        [
            {
                "shard_id": shard_id,
                "rows": len(good),
                "quarantined": len(bad),
                "sha256": file_sha256(path),
                "bytes": path.stat().st_size,
                "attempt": attempt,
            }
        ]
    )


def shard_table(
    rows: list[dict[str, Any]], shard_id: int, user_schema: bytes | None = None
) -> pa.Table:
    """Encoded rows in the public schema of a shard.

    Args:
        rows: As `EncodeShard` gives them, quarantined ones left out.
        shard_id: Of the shard.
        user_schema: Serialised types of the user's columns, so that they are the same in every
            shard, also where a column is null throughout; inferred from the rows by default.
    """
    dimension = len(rows[0]["vector"]) // 2 if rows else 1
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
    return "image+text" if (row["text"] or "").strip() else "image"


def _write_parquet(path: Path, table: pa.Table, attempt: str) -> None:
    """Write under a temporary name, then take the final one."""
    partial = path.with_name(f".{path.name}.{attempt}")
    # No dictionary over vectors: it would only cost. Not BYTE_STREAM_SPLIT either, though it saves a
    # tenth: DuckDB 2.0 cannot read it on float16.
    plain = [name for name in table.column_names if name != "embedding"]
    try:
        pq.write_table(
            table,
            partial,
            compression="zstd",
            use_dictionary=plain,
        )
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(
            f"{path} cannot be written: {error}; free space and run the same command again"
        ) from None


def _card(identity: dict[str, Any], dimension: int, rows: int, quarantined: int) -> str:
    return f"""# Embeddings

{rows:,} vectors of dimension {dimension} (float16, unit norm), {quarantined:,} items quarantined in `errors/`.
Read the shards named in `commits/`, for example with DuckDB:
`SELECT id, embedding FROM 'shards/*.parquet'`. Fingerprint: `{identity["fingerprint"]}`.
"""
