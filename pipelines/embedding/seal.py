"""Last stage: join the pieces of a finished shard into its files, and hash them for the commit record."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.commits import Commit, attempt_name, errors_name, new_attempt, shard_name
from pipelines.embedding.flow import Flow
from pipelines.embedding.pieces import table_from_bytes
from pipelines.embedding.write import Written, piece_name
from pipelines.failpoints import reach
from pipelines.ledger import Ledger
from pipelines.shard_files import GROUP_ROWS, write_shard
from pipelines.storage import Store
from slq.arrow import ERRORS
from slq.errors import ArtifactError, DataError


def seal(flow: Flow, pieces: list[Written], before: Commit | None) -> Commit:
    """Write the files of a shard whose pieces are all there.

    Args:
        flow: What the run knows.
        pieces: All pieces of the shard, in order.
        before: The shard's last commit, where these pieces are its quarantined rows read again.

    Returns:
        The record to commit. The pieces are left to be removed after it.

    Raises:
        ArtifactError: A piece or an older generation is gone: another driver has committed the shard and removed it.
        DataError: Rows that were read again are not the quarantined ones, or have other columns.
        StorageError: The files cannot be written.
    """
    ledger = flow.ledger()
    shard_id, attempt = pieces[0].shard_id, new_attempt()
    generation = 0 if before is None else before.generation + 1
    data: Iterator[pa.Table] = _tables(ledger.store, flow.run, pieces, "data")
    errors = list(_tables(ledger.store, flow.run, pieces, "errors"))
    if before is not None:
        new = pa.concat_tables([flow.shard_schema.empty_table(), *data])
        require_same_items(_read(ledger, errors_name(shard_id, before.generation)), [new, *errors])
        old = _read(ledger, shard_name(shard_id, before.generation))
        if old.schema != new.schema:
            raise DataError(
                f"the corpus' own columns are not those that shard {shard_id} was made with; embed it into another "
                "storage.dir"
            )
        data = iter([pa.concat_tables([old, new]).sort_by("row_in_shard")])
    reach("shard_before_write")
    name = attempt_name(shard_name(shard_id, generation), attempt)
    sha256, size, rows = write_shard(
        ledger.store, name, _groups(data, flow.shard_schema), flow.shard_schema
    )
    errors_sha256, bad = None, 0
    if errors:
        name = attempt_name(errors_name(shard_id, generation), attempt)
        errors_sha256, _, bad = write_shard(ledger.store, name, iter(errors), ERRORS)
    reach("shard_after_write")
    return Commit(
        shard_id=shard_id,
        rows=rows,
        quarantined=bad,
        sha256=sha256,
        bytes=size,
        attempt=attempt,
        errors_sha256=errors_sha256,
        generation=generation,
    )


def require_same_items(quarantined: pa.Table, found: list[pa.Table]) -> None:
    """Rows that are read again must be the items that were quarantined: a mended corpus may not be another one.

    Raises:
        DataError: A row holds another item, or is gone.
    """
    shard_id = quarantined["shard_id"][0]
    names = dict(
        zip(*(quarantined[name].to_pylist() for name in ("row_in_shard", "id")), strict=True)
    )
    for table in found:
        rows, ids = (table[name].to_pylist() for name in ("row_in_shard", "id"))
        for row, name in zip(rows, ids, strict=True):
            before = names.pop(row, None)
            if before != name:
                raise DataError(
                    f"row {row} of shard {shard_id} was item {before!r} and is now {name!r}: the corpus has other rows "
                    "than before; embed it into another storage.dir"
                )
    if names:
        row, name = next(iter(names.items()))
        raise DataError(
            f"row {row} of shard {shard_id} was item {name!r} and is gone: the corpus has other rows than before; "
            "embed it into another storage.dir"
        )


def remove_pieces(store: Store, run: str, pieces: list[Written]) -> None:
    """Remove the pieces of a committed shard."""
    for piece in pieces:
        for kind, rows in (("data", piece.good), ("errors", piece.bad)):
            if rows:
                store.remove(piece_name(run, piece.shard_id, piece.number, kind))


def _tables(store: Store, run: str, pieces: list[Written], kind: str) -> Iterator[pa.Table]:
    for piece in pieces:
        if piece.good if kind == "data" else piece.bad:
            name = piece_name(run, piece.shard_id, piece.number, kind)
            try:
                yield table_from_bytes(store.read(name))
            except FileNotFoundError:
                raise ArtifactError(
                    f"piece {store.url(name)} is gone before its shard was committed"
                ) from None


def _read(ledger: Ledger, name: str) -> pa.Table:
    try:
        with ledger.store.open(name) as file:
            return pq.read_table(file)
    except FileNotFoundError:
        raise ArtifactError(
            f"{ledger.store.url(name)} is gone: another run has made it anew; run the same command again"
        ) from None


def _groups(tables: Iterator[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The same rows in tables of `GROUP_ROWS`, whatever the pieces were."""
    held = schema.empty_table()
    for table in tables:
        held = pa.concat_tables([held, table.cast(schema)])
        while held.num_rows >= GROUP_ROWS:
            yield held.slice(0, GROUP_ROWS)
            held = held.slice(GROUP_ROWS)
    if held.num_rows:
        yield held
