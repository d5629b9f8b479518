"""COCO and Flickr30K in Karpathy's splits: training pairs, a gallery, queries and relevance.

Reads `dataset_coco.json` and `dataset_flickr30k.json`: `images` holds records with `cocoid` or `imgid`, `filename`,
`filepath` (COCO), `split`, `sentids` and `sentences` (each with `raw`).

COCO's official splits cut its images differently: of Karpathy's 5,000 test images most are among the official training
images. So the splits are taken from the ids here, and compared again by id and by file name.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from slq.arrow import RELEVANCE
from slq.benchmarks.contract import Facts
from slq.benchmarks.overlap import file_stem
from slq.benchmarks.tables import generate, uri_prefix, write_rows
from slq.benchmarks.writing import require_counts, require_images
from slq.config import Section
from slq.errors import ConfigError, DataError
from slq.files import file_sha256

log = logging.getLogger(__name__)
_KIND = "caption"
_SOURCE = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
_NAMES = {"dataset_coco": "COCO 5K", "dataset_flickr30k": "Flickr30K 1K"}
_KNOWN = {  # images and captions of a split; five captions an image become queries
    ("COCO 5K", "test"): {"gallery": 5000, "captions": 25_010},
    ("COCO 5K", "val"): {"gallery": 5000},
    ("Flickr30K 1K", "test"): {"gallery": 1000, "captions": 5000},
    ("Flickr30K 1K", "val"): {"gallery": 1014, "captions": 5070},
}
_PUBLISHED = {(name, "test", 5) for name in _NAMES.values()}  # split, and captions of an image
_EVAL_FILES = ("gallery.parquet", "queries.parquet", "relevance.parquet")

PAIRS_BY_URI = pa.schema([(name, pa.string()) for name in ("id", "image_key", "uri", "text")])
"""Training pairs whose images lie elsewhere; pairs with one `image_key` share the image."""

GALLERY = pa.schema([("id", pa.string()), ("uri", pa.string())])
"""Images to find."""

QUERIES = pa.schema([("id", pa.string()), ("text", pa.string()), ("kind", pa.string())])
"""Captions to search with."""


class KarpathyConfig(Section):
    """Which images and captions of a Karpathy file to use, and where the images are."""

    annotations: Path = Path("dataset_coco.json")
    """Karpathy's JSON file; relative paths belong to `data.dir`."""
    images: str = "."
    """What the file's image paths are relative to: a folder in `data.dir`, or `s3://bucket/prefix`."""
    train_splits: tuple[str, ...] = ("train", "restval")
    """Splits of the training pairs, every caption of an image; none for a benchmark that is only measured."""
    eval_split: str = "test"
    """Split of the gallery and its queries."""
    eval_captions: Annotated[int, Field(gt=0)] = 5
    """Queries of each gallery image: its first captions."""
    expected: dict[str, Annotated[int, Field(ge=0)]] | None = None
    """Counts (gallery, captions, queries, train) that must be found, in place of the known ones of `dataset_coco.json`
    and `dataset_flickr30k.json`; `{}` checks none."""

    def facts(self) -> Facts:
        """Known by the file's name; another file is not held to any counts."""
        name = _NAMES.get(self.annotations.stem, self.annotations.stem)
        counts = dict(_KNOWN.get((name, self.eval_split), {}))
        if counts and self.eval_captions <= 5:  # every image has five
            counts["queries"] = counts["gallery"] * self.eval_captions
        is_published = (name, self.eval_split, self.eval_captions) in _PUBLISHED
        return Facts(
            name,
            self.eval_split,
            _SOURCE,
            counts=counts,
            both_ways=True,
            is_published=is_published and self.expected is None,
        )

    @model_validator(mode="after")
    def _apart(self) -> "KarpathyConfig":
        if self.eval_split in self.train_splits:
            raise ValueError(f"eval_split {self.eval_split!r} is among train_splits; leave it out")
        return self


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """One record of a Karpathy file.

    Attributes:
        id: Data set and number, such as `coco-391895`.
        path: Where the image is, relative to the images' root.
        captions: (caption id, text) in the file's order, without empty ones.
        num_empty: How many empty captions were left out.
    """

    id: str
    path: str
    split: str
    captions: tuple[tuple[str, str], ...]
    num_empty: int

    @property
    def stem(self) -> str:
        """What names the image in every release of COCO, for example `000000391895`."""
        return file_stem(self.path)


def write_karpathy(folder: Path, config: KarpathyConfig, *, train: Path | None = None) -> None:
    """Write `gallery`, `queries`, `relevance` and, with `train_splits`, `train` as Parquet files; does nothing twice.

    Args:
        folder: Where to write; relative paths of `config` belong to it.
        config: What to take.
        train: The training file that will be used. One that is not ours is searched for images of the eval split.

    Raises:
        ConfigError: The annotations are missing, a split does not occur, images lie outside `folder`, or a file of
            another origin is in the way.
        DataError: A record is malformed or an id stands twice, or training and eval split share an image.
        StorageError: The files cannot be written.
    """
    marker = folder / "karpathy.json"
    annotations = folder / config.annotations
    settings = {**config.model_dump(mode="json"), "sha256": _digest(annotations, marker)}
    files = ("train.parquet", *_EVAL_FILES) if config.train_splits else _EVAL_FILES
    if generate(marker, files, settings, lambda: _write(folder, annotations, config)):
        log.info("%s: %s", folder, json.loads(marker.read_text())["counts"])
    if train is not None and train.is_file() and train not in {folder / name for name in files}:
        require_disjoint(train, folder / "gallery.parquet")


def _digest(annotations: Path, marker: Path) -> str:
    """The file's sha256; the recorded one once the file is gone, which is needed no more after the tables are made."""
    if annotations.is_file():
        return file_sha256(annotations)
    try:
        return str(json.loads(marker.read_text())["settings"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"data.karpathy.annotations: {annotations} does not exist; it is one of the files of Karpathy's "
            "caption_datasets.zip"
        ) from None


def _write(folder: Path, annotations: Path, config: KarpathyConfig) -> dict[str, int]:
    prefix = uri_prefix(folder, config.images, "data.karpathy.images")
    images = read_karpathy(annotations)
    train = _of_splits(images, config.train_splits, annotations)
    held_out = _of_splits(images, (config.eval_split,), annotations)
    _require_apart(train, held_out, annotations)
    _require_captions(held_out, annotations)
    queries = list(_queries(held_out, config.eval_captions))
    counts = {
        "gallery": len(held_out),
        "captions": sum(len(image.captions) + image.num_empty for image in held_out),
        "queries": len(queries),
        "train": sum(len(image.captions) for image in train),
        "empty_captions": sum(image.num_empty for image in (*train, *held_out)),
    }
    require_counts(config.expected, counts, config.facts(), annotations)
    require_images(folder, (prefix + image.path for image in held_out))
    if config.train_splits:
        write_rows(folder / "train.parquet", PAIRS_BY_URI, _pair_rows(train, prefix))
    gallery = ({"id": image.id, "uri": prefix + image.path} for image in held_out)
    write_rows(folder / "gallery.parquet", GALLERY, gallery)
    query_rows = ({"id": name, "text": text, "kind": _KIND} for name, text, _ in queries)
    write_rows(folder / "queries.parquet", QUERIES, query_rows)
    answers = ({"query_id": name, "item_id": item, "grade": 1} for name, _, item in queries)
    write_rows(folder / "relevance.parquet", RELEVANCE, answers)
    if counts["empty_captions"]:
        log.warning("%s: %d empty captions left out", annotations, counts["empty_captions"])
    return counts


def _pair_rows(images: Iterable[CaptionedImage], prefix: str) -> Iterator[dict[str, str]]:
    for image in images:
        for number, text in image.captions:
            yield {
                "id": f"{image.id}-{number}",
                "image_key": image.id,
                "uri": prefix + image.path,
                "text": text,
            }


def _queries(images: Iterable[CaptionedImage], per_image: int) -> Iterator[tuple[str, str, str]]:
    """(query id, text, image id)."""
    for image in images:
        for number, text in image.captions[:per_image]:
            yield f"{image.id}-{number}", text, image.id


def read_karpathy(path: Path) -> list[CaptionedImage]:
    """Every image of a Karpathy file, in its order.

    Raises:
        DataError: The file is no JSON of that form, a record lacks a field, or an image or caption id stands twice.
    """
    try:
        with path.open("rb") as file:
            content = json.load(file, object_hook=_without_tokens)
        records = content["images"]
        dataset = content.get("dataset") or path.stem.removeprefix("dataset_")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read as a Karpathy file, a JSON object with `images`: {error!r}"
        ) from None
    images = [_image(record, n, dataset, path) for n, record in enumerate(records)]
    _require_unique(((image.id, image.split) for image in images), "image", path)
    captions = (
        (f"{image.id}-{name}", image.split) for image in images for name, _ in image.captions
    )
    _require_unique(captions, "caption", path)
    return images


def _without_tokens(found: dict[str, Any]) -> dict[str, Any]:
    """Tokens are most of the file and not needed: dropped while it is parsed, they never fill the memory."""
    found.pop("tokens", None)
    return found


def _image(record: dict[str, Any], position: int, dataset: str, path: Path) -> CaptionedImage:
    try:
        number = record["cocoid"] if "cocoid" in record else record["imgid"]
        texts = [" ".join(sentence["raw"].split()) for sentence in record["sentences"]]
        captions = tuple(zip(map(str, record["sentids"]), texts, strict=True))
        place = PurePosixPath(record.get("filepath") or "") / record["filename"]
        split = record["split"]
    except KeyError as error:
        raise DataError(f"{path}: images[{position}] has no {error.args[0]!r}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: images[{position}] is malformed: {error}") from None
    kept = tuple(caption for caption in captions if caption[1])
    return CaptionedImage(f"{dataset}-{number}", str(place), split, kept, len(captions) - len(kept))


def _require_unique(names: Iterable[tuple[str, str]], what: str, path: Path) -> None:
    seen: dict[str, str] = {}
    for name, split in names:
        if name in seen:
            raise DataError(
                f"{path}: {what} {name!r} stands there twice, in split {seen[name]!r} and in split {split!r}; "
                "ids must be unique, or training might see what is measured"
            )
        seen[name] = split


def _of_splits(
    images: list[CaptionedImage], splits: Collection[str], path: Path
) -> list[CaptionedImage]:
    known = {image.split for image in images}
    for split in splits:
        if split not in known:
            raise ConfigError(
                f"data.karpathy: {path} has no split {split!r}; it has {', '.join(sorted(known))}"
            )
    return [image for image in images if image.split in splits]


def _require_apart(train: list[CaptionedImage], held_out: list[CaptionedImage], path: Path) -> None:
    """Ids are unique in the file, so this catches one picture under two ids."""
    stems = {image.stem: image for image in held_out}
    for image in train:
        twin = stems.get(image.stem)
        if twin is not None:
            raise DataError(
                f"{path}: {image.id} of split {image.split!r} and {twin.id} of split {twin.split!r} are the same file "
                f"({image.path}, {twin.path}); training on what is measured is refused, remove one"
            )


def _require_captions(held_out: list[CaptionedImage], path: Path) -> None:
    for image in held_out:
        if not image.captions:
            raise DataError(
                f"{path}: {image.id} of split {image.split!r} has no caption; the results would not be comparable"
            )


def require_disjoint(train: Path, gallery: Path) -> None:
    """Refuse a training file that holds images of the gallery.

    Compared are `image_key`, `image_id` or `cocoid` with the gallery's ids (with or without the data set's name),
    `uri` or `filename` with its file names (in the spelling of any release), and `id` with ids made here.

    Args:
        train: Parquet file of training pairs, of any origin.
        gallery: Parquet file with `id` and `uri`.

    Raises:
        DataError: They share an image; the first is named. Or one of the files cannot be read.
    """
    try:
        checks = _checks(pq.read_table(gallery, columns=["id", "uri"]))
        file = pq.ParquetFile(train)
        columns = [name for name in checks if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=columns):
            for name in columns:
                _refuse_held_out(batch[name].to_pylist(), checks[name], f"{train}: {name}", gallery)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{train} cannot be compared with {gallery}: {error}") from None
    if not set(columns) - {"id"}:
        log.warning(
            "%s has none of %s: only ids were compared with %s", train, ", ".join(checks), gallery
        )


def _checks(gallery: pa.Table) -> dict[str, Callable[[str], bool]]:
    """For each column of a training file, whether a value of it names an image of the gallery."""
    ids = set(gallery["id"].to_pylist())
    numbers = {name.rpartition("-")[2] for name in ids}
    stems = {file_stem(uri) for uri in gallery["uri"].to_pylist()}

    def by_number(value: str) -> bool:
        return value in ids or value.lstrip("0") in numbers

    def by_file(value: str) -> bool:
        return file_stem(value) in stems

    def by_own_id(value: str) -> bool:  # bare numbers would count the pairs of many a file
        return value in ids or value.rpartition("-")[0] in ids

    return {
        "image_key": by_number,
        "image_id": by_number,
        "cocoid": by_number,
        "uri": by_file,
        "filename": by_file,
        "id": by_own_id,
    }


def _refuse_held_out(
    values: list[Any], held_out: Callable[[str], bool], where: str, gallery: Path
) -> None:
    for value in values:
        if value is not None and held_out(str(value)):
            raise DataError(
                f"{where} {value!r} is an image of {gallery}; training on what is measured is refused, remove every "
                "image of the eval split"
            )
