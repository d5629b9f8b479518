"""MMEB's evaluation (v1): 36 sets of 1,000 queries, each of which ranks candidates of its own (Jiang et al., 2024).

Reads https://huggingface.co/datasets/TIGER-Lab/MMEB-eval: one folder per set with `test-*.parquet`, columns `qry_text`,
`qry_img_path`, and the lists `tgt_text` and `tgt_img_path`, whose first entry is the right one; images are below
`images/` once images.zip is unpacked. Image placeholders such as `<|image_1|>` belong to another model's template and
are cut.

That the right candidate stands first must not leak: an item is named by a hash of its content, items and candidates are
sorted by these names, and ties count against us. Candidates of equal content are one item, so a wrong one that equals
the right one is right.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from slq.benchmarks.contract import EVERY_KIND, BenchmarkConfig, Entry, Facts, ImagePlace, Tables
from slq.benchmarks.mmeb import plain_text
from slq.errors import ConfigError, DataError

SOURCE = "https://huggingface.co/datasets/TIGER-Lab/MMEB-eval"
GROUPS: dict[str, tuple[str, ...]] = {
    "classification": (
        "ImageNet-1K", "N24News", "HatefulMemes", "VOC2007", "SUN397", "Place365", "ImageNet-A",
        "ImageNet-R", "ObjectNet", "Country211",
    ),
    "VQA": (
        "OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W", "ScienceQA",
        "VizWiz", "GQA", "TextVQA",
    ),
    "retrieval": (
        "VisDial", "CIRR", "VisualNews_t2i", "VisualNews_i2t", "MSCOCO_t2i", "MSCOCO_i2t", "NIGHTS",
        "WebQA", "FashionIQ", "Wiki-SS-NQ", "OVEN", "EDIS",
    ),
    "grounding": ("MSCOCO", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing"),
}  # fmt: skip
"""The 36 sets by meta-task."""
SETS = tuple(name for names in GROUPS.values() for name in names)
_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


class MmebEvalConfig(BenchmarkConfig):
    """Which sets of MMEB-eval, and where they are."""

    unique_names: ClassVar[bool] = False  # each set numbers its own files

    format: Literal["mmeb_eval"]
    """Names MMEB's evaluation."""
    dir: Path = Path()
    """Folder with one folder per set."""
    images: str = "images"
    """What the image paths are relative to: a folder in `data.dir`, or `s3://bucket/prefix`."""
    subsets: tuple[str, ...] = SETS
    """Sets to read. All 36 at once need hundreds of GB of memory, as every decoded image and every score is kept."""

    def facts(self) -> Facts:
        """See `BenchmarkConfig`."""
        groups = {
            name: tuple(one for one in self.subsets if one in members)
            for name, members in GROUPS.items()
        }
        whole, chosen = GROUPS | {"all": SETS}, {*self.subsets}
        return Facts(
            name="MMEB v1",
            split="test",
            source=SOURCE,
            direction="query -> candidates",
            counts=dict.fromkeys(self.subsets, 1000),
            headline={EVERY_KIND: ("hit@1",)},
            groups={name: kinds for name, kinds in groups.items() if kinds} | {"all": self.subsets},
            is_published=self.expected is None,
            published_groups=tuple(name for name, kinds in whole.items() if {*kinds} <= chosen),
        )

    def _files(self, folder: Path, subset: str) -> list[Path]:
        return sorted((folder / self.dir / subset).glob("test-*.parquet"))

    def sources(self, folder: Path) -> list[Path]:
        """See `BenchmarkConfig`."""
        for subset in self.subsets:
            if not self._files(folder, subset):
                raise ConfigError(
                    f"data.benchmark.subsets: {folder / self.dir / subset} has no test-*.parquet; get it from "
                    f"{SOURCE}, or name the sets that are there"
                )
        return [path for subset in self.subsets for path in self._files(folder, subset)]

    def read(self, folder: Path) -> Tables:
        """See `BenchmarkConfig`."""
        self.sources(folder)
        place = ImagePlace(folder, self.images)
        gallery: list[Entry] = []
        queries: list[Entry] = []
        relevance: list[tuple[str, str]] = []
        candidates: dict[str, list[str]] = {}
        for subset in self.subsets:
            items: dict[str, Entry] = {}
            ranked: dict[str, list[str]] = {}
            for n, (where, row) in enumerate(_rows(self._files(folder, subset))):
                query = f"{subset}-{n:05d}"
                text, uri = _side(row["qry_text"], row["qry_img_path"], place, where)
                queries.append(Entry(query, text, uri, kind=subset, pool=subset))
                found = [_item(subset, *side) for side in _targets(row, place, where)]
                relevance.append((query, found[0].id))
                items.update((entry.id, entry) for entry in found)
                ranked[query] = sorted({entry.id for entry in found})
            gallery += [items[name] for name in sorted(items)]
            # What ranks the whole pool needs no list.
            candidates |= {q: ids for q, ids in ranked.items() if len(ids) < len(items)}
        counts = dict.fromkeys(self.subsets, 0)
        for one in queries:
            counts[one.kind or ""] += 1
        return Tables(gallery, queries, relevance, folder / self.dir, counts, candidates)


def _rows(files: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row)."""
    for path in files:
        try:
            table = pq.ParquetFile(path)
            for name in _COLUMNS:
                if name not in table.schema_arrow.names:
                    raise DataError(
                        f"{path} has no column {name!r}; MMEB-eval has {', '.join(_COLUMNS)}"
                    )
            number = 0
            for batch in table.iter_batches(64, columns=list(_COLUMNS)):
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", row
                    number += 1
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from None


Side = tuple[str | None, str | None]


def _side(text: Any, path: Any, place: ImagePlace, where: str) -> Side:
    """Text and uri of a query or a candidate."""
    if not all(value is None or isinstance(value, str) for value in (text, path)):
        raise DataError(
            f"{where}: text and image path must be strings, not {text!r:.40}, {path!r:.40}"
        )
    said = plain_text(text)
    uri = place.uri(path, where) if path else None
    if said is None and uri is None:
        raise DataError(f"{where} has a side with neither text nor image")
    return said, uri


def _targets(row: dict[str, Any], place: ImagePlace, where: str) -> list[Side]:
    texts, paths = row["tgt_text"], row["tgt_img_path"]
    if not (isinstance(texts, list) and isinstance(paths, list)) or len(texts) != len(paths):
        raise DataError(f"{where}: tgt_text and tgt_img_path must be lists of the same length")
    if not texts:
        raise DataError(f"{where} has no candidates")
    return [_side(text, path, place, where) for text, path in zip(texts, paths, strict=True)]


def _item(subset: str, text: str | None, uri: str | None) -> Entry:
    digest = hashlib.sha256(f"{text or ''}\0{uri or ''}".encode()).hexdigest()
    return Entry(f"{subset}/{digest[:20]}", text, uri, pool=subset)
