"""CIRR: an image and a sentence that changes it look for an image (Liu et al., ICCV 2021).

Reads the branch `cirr_dataset` of https://github.com/Cuberick-Orion/CIRR as it is cloned:
`captions/cap.rc2.SPLIT.json`, a list of {pairid, reference, target_hard, caption, img_set: {members}}, and
`image_splits/split.rc2.SPLIT.json`, image name -> path below `img_raw` (NLVR2's images). The gallery is every image of
the split's file.

Two kinds of query: `all images` ranks the gallery without the reference image, `subset` only the other members of its
image set. Recall@k has one target, so it equals hit@k. Targets of `test1` are not published: its results come from the
authors' server only.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from slq.benchmarks.contract import BenchmarkConfig, Entry, Facts, ImagePlace, Tables
from slq.benchmarks.overlap import refuse_shared_names
from slq.benchmarks.records import read_json, require_files, text_of, value_of
from slq.errors import DataError

SOURCE = "https://github.com/Cuberick-Orion/CIRR (branch cirr_dataset)"
ALL, SUBSET = "all images", "subset"
_COUNTS = {"val": {"gallery": 2297, "queries": 4181}}


class CirrConfig(BenchmarkConfig):
    """Which split of CIRR, and where it is."""

    format: Literal["cirr"]
    """Names CIRR."""
    dir: Path = Path()
    """Folder with `captions` and `image_splits`."""
    images: str = "img_raw"
    """What the paths of the split's file are relative to: a folder in `data.dir`, or `s3://bucket/prefix`."""
    split: str = "val"
    """As in the file names; `val` has published targets, `test1` has none."""
    version: str = "rc2"
    """Of the annotations, as in their file names."""
    exclude_reference: bool = True
    """Do not rank the reference image, as all published numbers do."""
    train: bool = False
    """Make training pairs of the split `train` too."""

    @property
    def writes_train(self) -> bool:
        """See `BenchmarkConfig`."""
        return self.train

    def facts(self) -> Facts:
        """See `BenchmarkConfig`."""
        return Facts(
            name="CIRR",
            split=self.split,
            source=SOURCE,
            direction="image+text -> image",
            counts=_COUNTS.get(self.split, {}),
            headline={
                ALL: ("recall@1", "recall@5", "recall@10", "recall@50"),
                SUBSET: ("recall@1", "recall@2", "recall@3"),
            },
        )

    def _files(self, folder: Path, split: str) -> list[Path]:
        root = folder / self.dir
        return [
            root / "captions" / f"cap.{self.version}.{split}.json",
            root / "image_splits" / f"split.{self.version}.{split}.json",
        ]

    def sources(self, folder: Path) -> list[Path]:
        """See `BenchmarkConfig`."""
        splits = (self.split, "train") if self.train else (self.split,)
        found = [path for split in splits for path in self._files(folder, split)]
        return require_files(found, SOURCE)

    def read(self, folder: Path) -> Tables:
        """See `BenchmarkConfig`."""
        captions, images = self._files(folder, self.split)
        place = ImagePlace(folder, self.images)
        paths = _paths(images, place)
        records = read_json(captions, list)
        _, train_images = self._files(folder, "train")
        if train_images.is_file() and self.split != "train":
            refuse_shared_names(paths, read_json(train_images, dict), images)
        queries, relevance = [], []
        candidates: dict[str, list[str]] = {}
        excluded: dict[str, list[str]] = {}
        for n, record in enumerate(records):
            where = f"{captions}: [{n}]"
            reference, target, text = _reference(record, paths, where)
            members = _members(record, where)
            name = f"cirr-{value_of(record, 'pairid', int, where)}"
            for query, kind in ((name, ALL), (f"{name}-{SUBSET}", SUBSET)):
                queries.append(Entry(query, text, paths[reference], kind=kind))
                relevance.append((query, target))
                if self.exclude_reference:
                    excluded[query] = [reference]
            candidates[f"{name}-{SUBSET}"] = members
        gallery = [Entry(name, uri=uri) for name, uri in paths.items()]
        return Tables(
            gallery=gallery,
            queries=queries,
            relevance=relevance,
            where=captions,
            counts={"gallery": len(gallery), "queries": len(records)},
            candidates=candidates,
            excluded=excluded,
            train=list(self._pairs(folder, place)) if self.train else None,
        )

    def _pairs(self, folder: Path, place: ImagePlace) -> Iterator[dict[str, Any]]:
        captions, images = self._files(folder, "train")
        paths = _paths(images, place)
        for n, record in enumerate(read_json(captions, list)):
            where = f"{captions}: [{n}]"
            reference, target, text = _reference(record, paths, where)
            yield {
                "id": f"cirr-train-{value_of(record, 'pairid', int, where)}",
                "query_text": text,
                "query_uri": paths[reference],
                "positive_text": None,
                "positive_uri": paths[target],
                "image_key": paths[reference],
                "subset": "cirr",
            }


def _paths(path: Path, place: ImagePlace) -> dict[str, str]:
    """Image name -> uri."""
    found = {}
    for name, image in read_json(path, dict).items():
        where = f"{path}: {name!r}"
        if not isinstance(image, str):
            raise DataError(f"{where} must be a path, not {image!r}")
        found[name] = place.uri(image, where)
    return found


def _reference(record: Any, paths: Mapping[str, str], where: str) -> tuple[str, str, str]:
    """Reference image, target image and sentence of a record."""
    if isinstance(record, dict) and "target_hard" not in record:
        raise DataError(
            f"{where} has no 'target_hard': targets of the test split are not published, its results come from the "
            "authors' server; measure on split: val"
        )
    names = [str(value_of(record, key, str, where)) for key in ("reference", "target_hard")]
    for name in names:
        if name not in paths:
            raise DataError(f"{where}: image {name!r} is not in the split's image file")
    return names[0], names[1], text_of(record, "caption", where)


def _members(record: Any, where: str) -> list[str]:
    members = value_of(value_of(record, "img_set", dict, where), "members", list, where)
    if record["target_hard"] not in members:
        raise DataError(f"{where}: the target is not among the members of its img_set")
    return [str(name) for name in members]
