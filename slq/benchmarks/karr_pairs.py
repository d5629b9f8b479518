"""KARR-Bench and tables of its form: one image, one text and the category of its clue a row, both ways.

KARR-Bench (SLQ, arXiv 2604.13710) has 2,915 pairs in six categories. Its file was not among those of
https://github.com/CnFaker/SLQ when this was written, so columns can be named. Reads Parquet, JSON (a list) or JSONL.
`image` is a path, or in Parquet the encoded bytes, or Hugging Face's {bytes, path}.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from slq.benchmarks.contract import BenchmarkConfig, Entry, Facts, ImagePlace, Tables
from slq.benchmarks.records import read_json, read_lines, require_files, text_of
from slq.errors import DataError

SOURCE = "https://github.com/CnFaker/SLQ"
_OWN = ("id", "image", "text", "category")


class KarrConfig(BenchmarkConfig):
    """Where the pairs are."""

    format: Literal["karr"]
    """Names KARR-Bench or a table of its form."""
    annotations: Path = Path("karr_bench.jsonl")
    """.parquet, .json or .jsonl."""
    images: str = "."
    """What image paths are relative to: a folder in `data.dir`, or `s3://bucket/prefix`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """How the file calls our columns (id, image, text, category): ours -> its own. `id` may be absent."""

    @model_validator(mode="after")
    def _known_columns(self) -> "KarrConfig":
        unknown = sorted(set(self.columns) - set(_OWN))
        if unknown:
            raise ValueError(f"columns.{unknown[0]} is unknown; {', '.join(_OWN)} can be mapped")
        return self

    def facts(self) -> Facts:
        """See `BenchmarkConfig`."""
        counts = {"gallery": 2915, "queries": 2915, "categories": 6}
        return Facts("KARR-Bench", "all", SOURCE, counts=counts, overall="all", both_ways=True)

    def sources(self, folder: Path) -> list[Path]:
        """See `BenchmarkConfig`."""
        return require_files([folder / self.annotations], SOURCE)

    def read(self, folder: Path) -> Tables:
        """See `BenchmarkConfig`."""
        (path,) = self.sources(folder)
        place = ImagePlace(folder, self.images)
        gallery: list[Entry] = []
        queries: list[Entry] = []
        seen: dict[Any, str] = {}
        for n, (where, row) in enumerate(_rows(path)):
            record = {own: row.get(self.columns.get(own, own)) for own in _OWN}
            name = str(n if record["id"] is None else record["id"])
            image = _image(record["image"], where)
            if image in seen:
                raise DataError(
                    f"{where} has the image of {seen[image]}; ids must be unique, the benchmark is one to one"
                )
            seen[image] = where
            text, category = (text_of(record, key, where) for key in ("text", "category"))
            path_given = isinstance(image, str)
            uri = place.uri(image, where) if path_given else None
            gallery.append(Entry(f"karr-{name}", uri=uri, image=None if path_given else image))
            queries.append(Entry(f"karr-{name}-text", text, kind=category))
        relevance = [(query.id, item.id) for query, item in zip(queries, gallery, strict=True)]
        counts = {
            "gallery": len(gallery),
            "queries": len(queries),
            "categories": len({query.kind for query in queries}),
        }
        return Tables(gallery, queries, relevance, path, counts)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row)."""
    if path.suffix == ".jsonl":
        yield from read_lines(path)
    elif path.suffix == ".json":
        for n, record in enumerate(read_json(path, list)):
            if not isinstance(record, dict):
                raise DataError(f"{path}: [{n}] must be a JSON object")
            yield f"{path}: [{n}]", record
    else:
        try:
            rows = pq.read_table(path).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from None
        yield from ((f"{path}: row {n}", row) for n, row in enumerate(rows))


def _image(value: Any, where: str) -> Any:
    """A path or bytes."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes) or not value:
        raise DataError(f"{where}: 'image' must be a path or encoded bytes, not {value!r:.80}")
    return value
