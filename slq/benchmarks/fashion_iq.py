"""FashionIQ: an image of a garment and two sentences that change it look for an image (Wu et al., CVPR 2021).

Reads https://github.com/XiaoxiaoGuo/fashion-iq as it is cloned: `captions/cap.CATEGORY.SPLIT.json`, a list of {target,
candidate, captions: [two]} where `candidate` is the reference image, and `image_splits/split.CATEGORY.SPLIT.json`, a
list of image names; images are NAME.jpg in one folder. Each category has a gallery of its own, the images of its split
file.

A query has two wordings, the sentences in either order joined by "and". Their scores are averaged, which ranks as the
sum does that is usual here. The reference image stays in the gallery, as in published numbers, unless
`exclude_reference` is set.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from slq.benchmarks.contract import EVERY_KIND, BenchmarkConfig, Entry, Facts, ImagePlace, Tables
from slq.benchmarks.overlap import refuse_shared_names
from slq.benchmarks.records import read_json, require_files, value_of
from slq.errors import DataError

SOURCE = "https://github.com/XiaoxiaoGuo/fashion-iq"
Category = Literal["dress", "shirt", "toptee"]
_QUERIES = {"dress": 2017, "shirt": 2038, "toptee": 1961}
_GALLERY = {"dress": 3817, "shirt": 6346, "toptee": 5373}


class FashionIqConfig(BenchmarkConfig):
    """Which categories and split of FashionIQ, and where they are."""

    format: Literal["fashion_iq"]
    """Names FashionIQ."""
    dir: Path = Path()
    """Folder with `captions` and `image_splits`."""
    images: str = "images"
    """Folder of the images in `data.dir`, or `s3://bucket/prefix`."""
    image_suffix: str = ".jpg"
    """What follows an image's name in the name of its file."""
    categories: Annotated[tuple[Category, ...], Field(min_length=1)] = ("dress", "shirt", "toptee")
    """Which to measure, each on its own gallery."""
    split: str = "val"
    """As in the file names."""
    exclude_reference: bool = False
    """Do not rank the reference image."""

    def facts(self) -> Facts:
        """See `BenchmarkConfig`."""
        known = self.split == "val"
        counts = {f"queries of {name}": _QUERIES[name] for name in self.categories}
        counts |= {f"gallery of {name}": _GALLERY[name] for name in self.categories}
        return Facts(
            name="FashionIQ",
            split=self.split,
            source=SOURCE,
            direction="image+text -> image",
            counts=counts if known else {},
            headline={EVERY_KIND: ("recall@10", "recall@50")},
            groups={"mean": self.categories},
        )

    def _files(self, folder: Path, category: str, split: str) -> tuple[Path, Path]:
        root = folder / self.dir
        name = f"{category}.{split}.json"
        return root / "captions" / f"cap.{name}", root / "image_splits" / f"split.{name}"

    def sources(self, folder: Path) -> list[Path]:
        """See `BenchmarkConfig`."""
        files = [self._files(folder, category, self.split) for category in self.categories]
        return require_files([path for pair in files for path in pair], SOURCE)

    def read(self, folder: Path) -> Tables:
        """See `BenchmarkConfig`."""
        place = ImagePlace(folder, self.images)
        gallery: list[Entry] = []
        queries: list[Entry] = []
        relevance: list[tuple[str, str]] = []
        excluded: dict[str, list[str]] = {}
        counts: dict[str, int] = {}
        for category in self.categories:
            captions, images = self._files(folder, category, self.split)
            uris = self._uris(images, place)
            _, train = self._files(folder, category, "train")
            if train.is_file() and self.split != "train":
                refuse_shared_names(uris, read_json(train, list), images)
            gallery += [Entry(f"{category}/{n}", uri=u, pool=category) for n, u in uris.items()]
            records = list(_records(captions, uris))
            for n, (reference, target, wordings) in enumerate(records):
                name = f"{category}-{n:05d}"
                queries += [
                    Entry(f"{name}-{w}", text, uris[reference], None, category, name, category)
                    for w, text in enumerate(wordings)
                ]
                relevance.append((name, f"{category}/{target}"))
                if self.exclude_reference:
                    excluded[name] = [f"{category}/{reference}"]
            counts |= {f"queries of {category}": len(records), f"gallery of {category}": len(uris)}
        where = folder / self.dir
        return Tables(gallery, queries, relevance, where, counts, excluded=excluded)

    def _uris(self, path: Path, place: ImagePlace) -> dict[str, str]:
        """Image name -> uri."""
        found: dict[str, str] = {}
        for name in read_json(path, list):
            if not isinstance(name, str):
                raise DataError(f"{path} must hold image names, not {name!r}")
            if name in found:
                raise DataError(f"{path}: image {name!r} stands there twice; ids must be unique")
            found[name] = place.uri(name + self.image_suffix, f"{path}: {name!r}")
        return found


def _records(path: Path, images: dict[str, str]) -> Iterator[tuple[str, str, tuple[str, str]]]:
    """Reference, target and the two wordings of each query."""
    for n, record in enumerate(read_json(path, list)):
        where = f"{path}: [{n}]"
        names = [str(value_of(record, key, str, where)) for key in ("candidate", "target")]
        for name in names:
            if name not in images:
                raise DataError(f"{where}: image {name!r} is not in the split's image file")
        yield names[0], names[1], _wordings(record, where)


def _wordings(record: Any, where: str) -> tuple[str, str]:
    given = value_of(record, "captions", list, where)
    texts = [" ".join(str(text).split()).strip(" .,?") for text in given]
    if len(texts) != 2 or not all(texts):
        raise DataError(
            f"{where}: 'captions' must be two sentences, not {record['captions']!r:.80}"
        )
    return f"{texts[0]} and {texts[1]}", f"{texts[1]} and {texts[0]}"
