"""A folder of plain files: `vectors.npy`, `items.parquet` in the same order, and what they are."""

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from slq.engines.base import Collection, Engine
from slq.errors import ConfigError, StorageError
from slq.files import sync, write_json
from slq.index.parts import EMBEDDING, matrix
from slq.index.vectors import VECTORS, VectorsWriter

ITEMS = "items.parquet"
DESCRIPTION = "description.json"


class Arrays(Engine):
    """Files in the folder `target`/`name`, which is there as a whole or not at all."""

    def write(self, collection: Collection) -> Iterator[int]:
        """See `Engine.write`."""
        if "://" in self.target:
            raise ConfigError(f"plain arrays go into a folder, and {self.target} is none")
        folder = Path(self.target, self.name)
        if folder.exists():
            raise ConfigError(f"{folder} exists already; choose another --name, or remove it")
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.partial")
        try:
            partial.mkdir(parents=True)
            yield from self._write(partial, collection)
            partial.rename(folder)
            sync(folder.parent)
        except OSError as error:
            raise StorageError(
                f"{folder} cannot be written: {error}; free space or choose another folder"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _write(self, folder: Path, collection: Collection) -> Iterator[int]:
        shape, count = (collection.num_rows, collection.dimension), 0
        schema = collection.schema.remove(collection.schema.get_field_index(EMBEDDING))
        with (
            (folder / VECTORS).open("wb") as file,
            pq.ParquetWriter(folder / ITEMS, schema) as items,
        ):
            vectors = VectorsWriter(file, shape)
            for table in collection.tables:
                vectors.add(matrix(table[EMBEDDING]))
                items.write_table(table.drop_columns([EMBEDDING]))
                count += table.num_rows
                yield count
            vectors.finish()
        description = {
            "fingerprint": collection.fingerprint,
            "num_rows": count,
            "dimension": collection.dimension,
        }
        write_json(folder / DESCRIPTION, description)
        for path in folder.iterdir():
            sync(path)
